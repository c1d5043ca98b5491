"""What the worker and its client say: JSON lines on stdin and stdout, and arrays as .npy files in a private folder.

requests   {"op": "hello", "protocol"} first, then, each with an "id" of its own: load_volume {volume, file, geometry},
           unload_volume {volume}, predict {volume, models, options, measures, keep}, click {volume, model, options, lesion,
           prompts, measures, keep}, add_case {volume, mask, case}, dataset {folder, action, case, version}, cancel {target},
           ping, shutdown
answers    unasked {"event": "starting", "pid"} at once and {"event": "hello", "protocol", "core", "python", "pid"} when it
           can work; for an id any number of "progress" {fraction, text}, then one of "done", "result", "click", "cancelled",
           "error" {error: a sentence, kind}
clicks     a request holds all of a lesion's prompts in their order, so that the worker may forget or die: prompts that it
           knows cost nothing, fewer than before undo, none warm it up. A lesion's mask is small and travels in its line.
cases      add_case writes a corrected mask into a dataset folder and dataset shows or changes one; both are answered by "done"
           with the folder's summary. keep: the answer is kept for a later case, see kept.py, and comes without mutual_information
errors     kind is "user" (the input), "memory" or "internal"; the worker lives on after all of them. objection: what add_case
           would do where that is allowed
arrays     volume-<id>.npy is the client's and stays until it is unloaded; result-<id>-<name>.npy is written by the worker,
           read and deleted by the client; mask-<id>.npy is the client's until its request is over; the client deletes the
           folder (0700), or the worker when the client died, or, where both died at once, any worker that starts later: for as
           long as it lives the client holds the lock <folder>.lock

Nothing is pickled, and both sides check everything that they receive.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ..files import move_file
from ..image import Box, Image, UserError, check_geometry, crop_mask
from ..inference.click import Answer, Prompt, check_prompt
from ..inference.predict import Options, Prediction
from ..model import Label, intensity_errors
from ..steps import Steps, complete

PROTOCOL = 4
FOLDER_PREFIX = "unetseg-worker-"
LOCK = ".lock"  # beside a folder, after its name
NEW_S = 10.0  # a lock that was made less long ago may be about to be held
KINDS = ("user", "memory", "internal")
MAX_LINE = 4 << 20  # a card, whose labels a result repeats, has at most 1 MB
_FILE = re.compile(r"(volume|result|mask)-[0-9]+(-[a-z_]+)?\.npy")
_PART = ".part"  # a file that is still being written
_PIECE = 1 << 20  # bytes moved between two yields: a few ms, also into memory that the system must first find
_CUT = 64 << 20  # bytes deleted between two yields
_MAX_MASK = 1 << 32  # voxels
_MAPS = ("uncertainty", "mutual_information", "probabilities")
# Windows cannot delete a file that is mapped, so there arrays are read instead.
_MAPPED: Literal["r"] | None = None if os.name == "nt" else "r"


class ProtocolError(Exception):
    """The other side said something that the protocol does not know."""


@dataclass(frozen=True, eq=False)
class WorkerPrediction(Prediction):
    """A Prediction, what measure() says of it where that was asked for, the uncertain_places() of its uncertainty, and the key
    under which its labels are kept; "" where they are not."""

    measures: list[dict[str, Any]] | None = None
    places: list[dict[str, Any]] | None = None
    kept: str = ""


@dataclass(frozen=True, eq=False)
class WorkerAnswer(Answer):
    """A click session's Answer: mask (z, y, x) uint8 of 0 and 1 in `box` of the image's index space. measures: describe()
    of it, where that was asked for; seconds: where the time went; warnings: what a person should know of the image."""

    measures: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    engine: str = ""


# --------------------------------------------------------------------------------------------------------------- lines


class Lines:
    """Cuts a stream of bytes into lines; a line that is too long comes out as None."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes | None]:
        out: list[bytes | None] = []
        *complete, rest = data.split(b"\n")
        for part in complete:
            line = bytes(self._rest + part)
            self._rest.clear()
            if self._skipping or len(line) > MAX_LINE:
                out.append(None)
            elif line.strip():
                out.append(line)
            self._skipping = False
        if not self._skipping:
            self._rest += rest
        if len(self._rest) > MAX_LINE:
            self._rest.clear()
            self._skipping = True
        return out


def dumps(message: dict[str, Any]) -> bytes:
    """One line; UserError for a number that is not finite, which JSON cannot hold."""
    try:
        return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    except ValueError as e:
        raise UserError("One of the settings is not a finite number; correct it and try again.") from e


def loads(line: bytes | None) -> dict[str, Any]:
    def constant(text: str) -> None:
        raise ValueError(text)

    if line is None:
        raise ProtocolError("The message is too long.")
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise ProtocolError("The message is not a line of JSON.") from e
    if not isinstance(message, dict):
        raise ProtocolError("The message is not a JSON object.")
    return message


def get(message: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a message; True is no int here."""
    value = message.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProtocolError(f"The message has no valid {name!r}.")
    return value


def numbers(message: dict[str, Any], name: str, count: int, kind: type | tuple[type, ...] = (int, float)) -> tuple[Any, ...]:
    values: list[Any] = get(message, name, list)
    if len(values) != count or not all(_is_number(v, kind) for v in values):
        raise ProtocolError(f"The message's {name!r} is not {count} numbers.")
    return tuple(values)


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    # Not isfinite(), of which an integer of 400 digits, which JSON may hold, makes an OverflowError.
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # type: ignore[arg-type, operator]


def strings(message: dict[str, Any], name: str) -> tuple[str, ...]:
    values = get(message, name, list)
    if not all(isinstance(v, str) for v in values):
        raise ProtocolError(f"The message's {name!r} is not a list of strings.")
    return tuple(values)


# -------------------------------------------------------------------------------------------------------------- arrays


def save_array(folder: Path, name: str, array: np.ndarray) -> Steps[str]:
    """Returns the name. The file appears when it is whole, or never. UserError where the disk is full."""
    turned = array.flags.f_contiguous and not array.flags.c_contiguous
    values = array.T if turned else array
    head = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": turned, "shape": array.shape}
    path, part = folder / name, folder / f"{name}{_PART}"
    try:
        with open(part, "wb") as file:
            np.lib.format.write_array_header_1_0(file, head)
            for block in _blocks(values.shape, values.itemsize):
                file.write(np.ascontiguousarray(values[block]))
                yield
        move_file(part, path)
    except BaseException as e:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise UserError(f"The temporary folder {folder} cannot hold the volume ({e.strerror or e}); free some disk space.") from e
        raise
    return name


def load_array(folder: Path, name: str) -> np.ndarray:
    """A file of the folder, memory-mapped read-only (Windows: read)."""
    try:
        array = np.load(_path(folder, name), mmap_mode=_MAPPED, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ProtocolError(f"The array {name} cannot be read ({e}).") from e
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ProtocolError(f"The array {name} does not hold numbers.")
    return array.view(np.ndarray)


def fill_array(folder: Path, name: str, target: np.ndarray) -> Steps[None]:
    """Read a file of the folder into an array of its shape and type."""
    try:
        with open(_path(folder, name), "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("its version is unknown")
            if np.lib.format.read_array_header_1_0(file) != (target.shape, False, target.dtype) or target.dtype.kind not in "biuf":
                raise ValueError("it is not what was announced")
            for block in _blocks(target.shape, target.itemsize):
                part = target[block]
                piece = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
                if file.readinto(piece) != piece.nbytes:  # type: ignore[arg-type]
                    raise ValueError("it ends too early")
                if piece is not part:
                    part[...] = piece
                yield
    except (OSError, ValueError, EOFError) as e:
        raise ProtocolError(f"The array {name} cannot be read ({e}).") from e


def _path(folder: Path, name: str) -> Path:
    if not _FILE.fullmatch(name) or (folder / name).is_symlink():
        raise ProtocolError(f"{name!r} is no name of an array.")
    return folder / name


def _blocks(shape: Sequence[int], itemsize: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut a C-ordered array, in its order, into pieces of at most about _PIECE bytes."""
    axis, size = len(shape) - 1, itemsize
    while axis > 0 and size * shape[axis] <= _PIECE:
        size *= shape[axis]
        axis -= 1
    step = max(1, _PIECE // max(1, size))
    for lead in np.ndindex(*shape[:axis]):
        for start in range(0, shape[axis], step):
            yield (*lead, slice(start, start + step))


def remove_files(folder: Path, pattern: str = "*") -> None:
    """Delete arrays of the protocol, and nothing else that may lie there."""
    for path in list(folder.glob(pattern)):
        if _FILE.fullmatch(path.name.removesuffix(_PART)):
            with suppress(OSError):  # Windows, while it is mapped: with its folder, in the end
                path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete the folder of a session with its arrays; it stays if it holds anything else."""
    if not folder.name.startswith(FOLDER_PREFIX):
        return
    for _ in range(3):  # the other thread may just be writing a result
        remove_files(folder)
        with suppress(OSError):
            folder.rmdir()
            break
    if not folder.exists():  # else the lock says later that it may go
        if folder in _held:
            _held.pop(folder).close()  # Windows deletes no open file
        with suppress(OSError):
            _lock_of(folder).unlink()


_held: dict[Path, IO[bytes]] = {}  # the locks of this process, which the system frees however it ends


def hold_folder(folder: Path) -> None:
    """Say that the new folder's owner lives, until remove_folder() or the end of this process."""
    with suppress(OSError):  # where a file system knows no locks, the folder is never taken for a dead one's
        file = open(_lock_of(folder), "xb", opener=lambda path, flags: os.open(path, flags, 0o600))
        _held[folder] = file
        _take(file)


def abandoned(folder: Path) -> bool:
    """Whether the process that held the folder is gone; False where that cannot be found out."""
    with suppress(OSError), _lock_of(folder).open("rb+") as file:
        if time.time() - os.fstat(file.fileno()).st_mtime > NEW_S:
            _take(file)
            return True
    return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)


def _take(file: IO[bytes]) -> None:
    """OSError where another process has it. Not by process ids, which another container or computer may use too."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --------------------------------------------------------------------------------------------------- images and options


def encode_image(image: Image, folder: Path, volume: int) -> Steps[dict[str, Any]]:
    """Write the array and say where it lies; UserError for an image that no worker would take."""
    geometry = encode_geometry(image)
    file = yield from save_array(folder, f"volume-{volume}.npy", image.array)
    return {"volume": volume, "file": file, "geometry": geometry}


def encode_geometry(image: Image) -> dict[str, Any]:
    """Where an image lies, and what it was read from; UserError where that is nowhere."""
    check_geometry(image)
    return {**image.geometry, "source": None if image.source is None else str(image.source)}


def decode_image(message: dict[str, Any], folder: Path) -> Image:
    geometry = get(message, "geometry", dict)
    spacing, origin = numbers(geometry, "spacing", 3), numbers(geometry, "origin", 3)
    source = geometry.get("source")
    array = load_array(folder, get(message, "file", str))
    if array.ndim not in (3, 4) or not (source is None or isinstance(source, str)):
        raise ProtocolError("The volume is no image.")
    image = Image(array, spacing, origin, numbers(geometry, "direction", 9), None if source is None else Path(source))  # type: ignore[arg-type]
    check_geometry(image)
    return image


def _encode_box(box: Box) -> list[list[int]]:
    return [[int(v) for v in box.start], [int(v) for v in box.stop]]


def _decode_box(message: dict[str, Any], name: str) -> Box:
    corners = get(message, name, list)
    if len(corners) != 2:
        raise ProtocolError(f"The message's {name!r} is no box.")
    ends = {"start": corners[0], "stop": corners[1]}
    return Box(numbers(ends, "start", 3, int), numbers(ends, "stop", 3, int))


def encode_options(options: Options) -> dict[str, Any]:
    """All fields of Options, as JSON."""
    if options.at is not None and not all(math.isfinite(v) for v in options.at):
        raise UserError("The point must be three numbers in mm.")
    if options.roi is not None and len(options.roi.start) != 3:
        raise UserError("The ROI is empty; give it a size along every axis.")
    out = {f.name: getattr(options, f.name) for f in fields(Options)}
    out["roi"] = None if options.roi is None else _encode_box(options.roi)
    out["at"] = None if options.at is None else [float(v) for v in options.at]
    return out


_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "tta": str,
    "overlap": (int, float),
    "batch": int,
    "engine": str,
    "device": str,
    "precision": str,
    "threads": int,
    "uncertainty": bool,
    "probabilities": bool,
    "postprocess": bool,
}


def decode_options(data: dict[str, Any]) -> Options:
    unknown = set(data) - {f.name for f in fields(Options)}
    if unknown:
        raise ProtocolError(f"There is no option {sorted(unknown)[0]!r}.")
    out: dict[str, Any] = {name: get(data, name, kind) for name, kind in _OPTIONS.items() if data.get(name) is not None}
    if not (1 <= out.get("batch", 1) <= 1024 and 0 <= out.get("threads", 0) <= 4096):
        raise UserError("The batch must be from 1 to 1024 and the threads from 0 to 4096; correct them.")
    if data.get("roi") is not None:
        out["roi"] = _decode_box(data, "roi")
    if data.get("at") is not None:
        out["at"] = numbers(data, "at", 3)
    intensity = data.get("intensity")
    if intensity is not None:
        for error in intensity_errors(intensity, "the intensity"):
            raise UserError(f"The window is not valid: {error}; correct it.")
        out["intensity"] = intensity
    return Options(**out)


# ---------------------------------------------------------------------------------------------------------- predictions


def encode_prediction(
    prediction: Prediction,
    folder: Path,
    request: int,
    measures: list[dict[str, Any]] | None,
    places: list[dict[str, Any]] | None,
    kept: str = "",
) -> dict[str, Any]:
    """Write the arrays and say where they lie. Of the labels only the box of what is not 0 travels, of the maps the ROI."""
    arrays: dict[str, Any] = {}

    def put(name: str, array: np.ndarray, box: Box) -> None:
        file = None if box.empty else complete(save_array(folder, f"result-{request}-{name}.npy", array[box.trailing]))
        arrays[name] = {"file": file, "box": _encode_box(box), "dtype": array.dtype.name, "shape": list(array.shape)}

    inside = Box.around(prediction.labels.array[prediction.roi.slices])
    put("labels", prediction.labels.array, inside.shifted(prediction.roi.start) if inside else Box((0, 0, 0), (0, 0, 0)))
    for name in _MAPS:
        image = getattr(prediction, name)
        if image is not None:
            put(name, image.array, prediction.roi)
    return {
        "arrays": arrays,
        "label_defs": [asdict(label) for label in prediction.label_defs],
        "model_name": prediction.model_name,
        "roi": _encode_box(prediction.roi),
        "engines": list(prediction.engines),
        "warnings": list(prediction.warnings),
        "seconds": prediction.seconds,
        "tiles": prediction.tiles,
        "measures": measures,
        "places": places,
        "kept": kept,
    }


def decode_prediction(message: dict[str, Any], folder: Path, image: Image) -> Steps[WorkerPrediction]:
    """The prediction on the grid of `image`; the files are deleted. The maps are the caller's own arrays."""
    arrays = get(message, "arrays", dict)
    label_defs = tuple(_decode_label(item) for item in get(message, "label_defs", list))
    labels = yield from _decode_array(arrays, "labels", folder, image)
    maps: dict[str, Any] = {}
    for name in _MAPS:
        if name in arrays:
            maps[name] = image.like((yield from _decode_array(arrays, name, folder, image)))
    return WorkerPrediction(
        labels=image.like(labels),
        label_defs=label_defs,
        model_name=get(message, "model_name", str),
        roi=_decode_box(message, "roi"),
        engines=strings(message, "engines"),
        warnings=strings(message, "warnings"),
        seconds=get(message, "seconds", (int, float)),
        tiles=get(message, "tiles", int),
        measures=_decode_measures(message.get("measures")),
        places=_decode_places(message.get("places")),
        kept=get(message, "kept", str),
        **maps,
    )


def _decode_array(arrays: dict[str, Any], name: str, folder: Path, image: Image) -> Steps[np.ndarray]:
    entry = get(arrays, name, dict)
    box, dtype = _decode_box(entry, "box"), get(entry, "dtype", str)
    lead = tuple(get(entry, "shape", list)[:-3])
    if dtype not in (("uint8", "uint16") if name == "labels" else ("float32",)) or box & Box.whole(image.shape) != box:
        raise ProtocolError(f"The result's {name} do not fit the volume.")
    if len(lead) != (name == "probabilities") or not all(isinstance(n, int) and 0 < n <= 65536 for n in lead):
        raise ProtocolError(f"The result's {name} have an unknown shape.")
    full = np.zeros((*lead, *image.shape), dtype)
    if entry.get("file") is None:
        return full
    file = get(entry, "file", str)
    if not file.startswith("result-"):
        raise ProtocolError(f"{file!r} is no result.")
    yield from fill_array(folder, file, full[box.trailing])
    with suppress(OSError):  # Windows refuses while a virus scanner reads it; the result is here all the same
        for size in range((folder / file).stat().st_size - _CUT, 0, -_CUT):
            os.truncate(folder / file, size)  # to delete 400 MB takes 30 ms
            yield
    remove_files(folder, file)
    return full


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A corrected mask on its way into a dataset folder; see Dataset.add() for what is not said here.

    labels: what the values of the mask mean. create: name and channels of the dataset to make where there is none yet, whose
    labels are `offered` and those of the mask. own: (key, {value: label value}) of kept answers, the model's own mask; or
    own_file: a mask file. patient: None: the case is a patient of its own.
    """

    folder: str
    labels: tuple[Label, ...]
    create: tuple[str, tuple[str, ...]] | None = None
    offered: tuple[Label, ...] = ()
    own: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    own_file: str = ""
    patient: str | None = None
    modality: str = ""
    model: str = ""
    by: str = ""
    dated: bool = False
    allow: tuple[str, ...] = ()


def encode_case(case: Case) -> dict[str, Any]:
    """As JSON; UserError where a name is no text that can be sent."""
    out = asdict(case)
    out["create"] = None if case.create is None else {"name": case.create[0], "channels": list(case.create[1])}
    return out


def decode_case(data: dict[str, Any]) -> Case:
    create = data.get("create")
    if create is not None:
        create = (get(get(data, "create", dict), "name", str), strings(create, "channels"))
    own = []
    for item in get(data, "own", list):
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str) or not isinstance(item[1], list):
            raise ProtocolError("The message has no valid 'own'.")
        own.append((item[0], tuple(numbers({"pair": pair}, "pair", 2, int) for pair in item[1])))
    patient = data.get("patient")
    return Case(
        folder=get(data, "folder", str),
        labels=tuple(_decode_label(item) for item in get(data, "labels", list)),
        create=create,
        offered=tuple(_decode_label(item) for item in get(data, "offered", list)),
        own=tuple(own),  # type: ignore[arg-type]
        own_file=get(data, "own_file", str),
        patient=None if patient is None else get(data, "patient", str),
        modality=get(data, "modality", str),
        model=get(data, "model", str),
        by=get(data, "by", str),
        dated=get(data, "dated", bool),
        allow=strings(data, "allow"),
    )


def encode_part(array: np.ndarray, start: Sequence[int], folder: Path, request: int) -> Steps[dict[str, Any]]:
    """Write label values (z, y, x), uint8, of a box of a volume; nothing is written for an empty one."""
    if array.dtype != np.uint8:
        raise UserError(f"A mask for a dataset holds label values from 0 to 255, not {array.dtype}; convert it.")
    box = Box(tuple(int(v) for v in start), tuple(int(a) + n for a, n in zip(start, array.shape)))
    file = None if box.empty else (yield from save_array(folder, f"mask-{request}.npy", array))
    return {"box": _encode_box(box), "file": file}


def decode_part(message: dict[str, Any], folder: Path, shape: Sequence[int]) -> np.ndarray:
    """The label values on a grid of this shape, 0 elsewhere."""
    box, out = _decode_box(message, "box"), np.zeros(tuple(shape), np.uint8)
    if message.get("file") is not None:
        array = load_array(folder, get(message, "file", str))
        if array.dtype != np.uint8 or array.shape != box.shape or box & Box.whole(out.shape) != box:
            raise ProtocolError("The mask does not fit the volume.")
        out[box.slices] = array
    return out


# --------------------------------------------------------------------------------------------------------------- clicks


def _encode_mask(mask: np.ndarray, start: Sequence[int]) -> list[Any]:
    """[start, shape, text]: what is not 0 of a mask, a bit for each voxel."""
    part, first = crop_mask(mask, start)
    packed = zlib.compress(np.packbits(part).tobytes(), 1)
    return [list(first), list(part.shape), base64.b64encode(packed).decode("ascii")]


def _decode_mask(value: Any, most: int) -> tuple[np.ndarray, Box]:
    try:
        first, sides, text = value
        start, shape = numbers({"start": first}, "start", 3, int), numbers({"shape": sides}, "shape", 3, int)
        count = math.prod(shape)
        size = (count + 7) // 8
        if min(shape) < 0 or count > most:
            raise ValueError
        # Not a byte more than announced: a few can stand for gigabytes.
        packed = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
        if len(packed) != size:
            raise ValueError
    except (TypeError, ValueError, zlib.error) as e:
        raise ProtocolError("The message has no valid mask.") from e
    mask = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).reshape(shape)
    return mask, Box(start, tuple(a + n for a, n in zip(start, shape)))


def encode_prompts(prompts: Sequence[Prompt]) -> list[list[Any]]:
    """As JSON, also to keep them with a segment; UserError for what is no prompt."""
    checked = [check_prompt(p) for p in prompts]
    return [["mask", *_encode_mask(p[1], p[2])] if p[0] == "mask" else list(p) for p in checked]


def decode_prompts(items: Any, most: int = _MAX_MASK) -> list[Prompt]:
    """The inverse of encode_prompts(). most: voxels of all masks together; 350 kB of text can announce 2.2 GB of them."""
    if not isinstance(items, list):
        raise ProtocolError("The message has no valid 'prompts'.")
    out: list[Prompt] = []
    for item in items:
        if not isinstance(item, list) or not item:
            raise ProtocolError("The message has no valid 'prompts'.")
        kind, *rest = item
        if kind == "mask":
            mask, box = _decode_mask(rest, most)
            most -= mask.size
            out.append((kind, mask, box.start))
        elif kind == "point" and len(rest) == 4 and isinstance(rest[3], bool):
            out.append((kind, *numbers({"point": rest[:3]}, "point", 3), rest[3]))
        elif kind == "box":
            out.append((kind, *numbers({"box": rest}, "box", 6)))
        else:
            raise ProtocolError("The message has no valid 'prompts'.")
    return out


def encode_answer(answer: WorkerAnswer) -> dict[str, Any]:
    return {
        "box": _encode_box(answer.box),
        "mask": _encode_mask(answer.mask, answer.box.start) if answer.found else None,
        "text": answer.text,
        "zoom": answer.zoom,
        "measures": answer.measures,
        "seconds": {name: round(value, 6) for name, value in answer.seconds.items()},
        "warnings": list(answer.warnings),
        "engine": answer.engine,
    }


def decode_answer(message: dict[str, Any], image: Image) -> WorkerAnswer:
    """What a "click" holds, on the grid of `image`."""
    box, mask = _decode_box(message, "box"), np.zeros((0, 0, 0), np.uint8)
    if message.get("mask") is not None:
        mask, placed = _decode_mask(message["mask"], math.prod(image.shape))
        if placed != box or box & Box.whole(image.shape) != box or not mask.any():
            raise ProtocolError("The mask does not fit the volume.")
    elif not box.empty:
        raise ProtocolError("The mask is missing.")
    seconds, measures = get(message, "seconds", dict), message.get("measures")
    return WorkerAnswer(
        box=box,
        mask=mask,
        text=get(message, "text", str),
        zoom=float(get(message, "zoom", (int, float))),
        measures=None if measures is None else _decode_measures([measures])[0],  # type: ignore[index]
        seconds={name: float(get(seconds, name, (int, float))) for name in seconds},
        warnings=strings(message, "warnings"),
        engine=get(message, "engine", str),
    )


def _decode_label(item: Any) -> Label:
    if not isinstance(item, dict):
        raise ProtocolError("The result has no valid labels.")
    terminology = get(item, "terminology", dict)
    codes = {str(key): list(strings(terminology, key)) for key in terminology}
    return Label(get(item, "value", int), get(item, "name", str), numbers(item, "color", 3, int), codes)  # type: ignore[arg-type]


def _dictionaries(items: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ProtocolError(f"The result has no valid {what}.")
    return items


def _decode_places(items: Any) -> list[dict[str, Any]] | None:
    """uncertain_places()'s dictionaries; JSON has made lists of its points."""
    if items is None:
        return None
    out = [{**item, "point": numbers(item, "point", 3)} for item in _dictionaries(items, "places")]
    for item in out:
        for key in ("peak", "volume_ml", "score"):
            get(item, key, (int, float))
    return out


def _decode_measures(items: Any) -> list[dict[str, Any]] | None:
    """measure()'s dictionaries; JSON has made lists of its points."""
    if items is None:
        return None
    out = [dict(item) for item in _dictionaries(items, "measures")]
    for item in out:
        if item.get("center") is not None:
            item["center"] = numbers(item, "center", 3)
        for key in ("longest_points", "perpendicular_points"):
            if item.get(key) is not None:
                item[key] = [numbers({key: point}, key, 3) for point in get(item, key, list)]
    return out
