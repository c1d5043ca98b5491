"""The dataset folder: annotated cases to train from, added one by one by several people, on a network folder too.

    dataset.json     the index: labels, channels, cases with all their versions, hashes, splits. Also what MONAI reads as a
                     datalist, and nnU-Net as a dataset of its own where the label values are 1, 2, ...
    salt             with which patients' identities are hashed; whoever has it and an identity can find its cases
    cases/NAME/X/    the files of one version of a case: image_0000.nii.gz (one for each channel), label.nii.gz, model.nii.gz

A version's files are written under a name of their own and never change; a case is there once the index names it, and the
index is replaced as a whole under a lock. So a killed writer or a full disk leaves at most files that nobody names, which
clean() removes. Anonymous by construction: of an image only voxels, geometry and modality are written.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk

from .files import (
    RUNNING,
    UserError,
    atomic_path,
    check_text,
    counted,
    is_alive,
    is_inner,
    is_this_computer,
    is_within,
    move_file,
    process_mark,
    this_computer,
    time_of,
    user_path,
)
from .image import (
    Image,
    check_geometry,
    exif_turn,
    from_picture,
    information,
    is_dicom,
    is_grey,
    is_placed,
    of_channels,
    on_print,
    print_spacing,
    read_image,
    to_sitk,
    write_image,
)
from .model import DEFAULT_COLORS, Label, label_key
from .postprocess import slabs, voxel_counts
from .steps import Steps

T = TypeVar("T")

INDEX, SALT, LOCK, CASES = "dataset.json", "salt", ".lock", "cases"
TRAININGS = "retrain"  # training.FOLDER
FORMAT = "unetseg-dataset"
SPLITS = ("train", "validation", "test")
EXPORTS = ("nnunet", "monai", "itksnap")
# What add() refuses unless it is allowed by name: an empty mask, a few voxels of a label, another image or patient under a case's
# name, a label that the dataset does not have (it is then added to it), the model's mask as it was in a correction's place.
OBJECTIONS = ("empty", "leftover", "image", "label", "patient", "uncorrected")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)|.*\.$", re.IGNORECASE)  # a dataset made on Linux is opened on Windows, too
# A label with fewer voxels is what an eraser left, unless the person says that it is meant.
LEFTOVER = 4
# So many voxels beyond an image are rounding: what is nearest to one of its voxels lies up to half a voxel away.
BEYOND = 0.51
# Seconds after which a lock is nobody's (it is held for one write of the index), or, if its process is gone from this
# computer, is so at once (but for one of another container with the same name); and how long to wait for one.
STALE, DEAD, PATIENCE = 60.0, 2.0, 90.0
MODALITY = "0008|0060"  # DICOM's tag
# Seconds after which files that no index names are rubbish and not another's case in the making.
RUBBISH = 24 * 3600.0


class Objection(UserError):
    """What add() refuses, but would do where its `kind`, one of OBJECTIONS, is allowed."""

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


# --------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Segment:
    """One segment of a .seg.nrrd: the voxels of `layer` with `value`."""

    label: Label
    layer: int
    value: int


def read_segments(path: str | Path, voxels: bool = True) -> tuple[Image, list[Segment]]:
    """The layers of a Slicer segmentation as channels, and its segments in their order; voxels False: a grid of zeros."""
    path = Path(path)
    check_text(path)
    try:
        reader = information(path)
    except UserError as e:
        raise UserError(f"{path} cannot be read as a segmentation; save it again from Slicer.") from e
    header = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys() if key.startswith("Segment")}
    found = []
    for i in range(sum(bool(re.fullmatch(r"Segment\d+_ID", key)) for key in header)):
        fields = {k: header.get(f"Segment{i}_{k}", "") for k in ("ID", "Name", "Color", "LabelValue", "Layer", "Tags")}
        color = [round(255 * float(c)) for c in fields["Color"].split()] or DEFAULT_COLORS[i % len(DEFAULT_COLORS)]
        entry = re.search(r"TerminologyEntry:([^|]*)", fields["Tags"])
        label = Label(i + 1, fields["Name"] or fields["ID"], tuple(color), read_terminology(entry[1] if entry else ""))  # type: ignore[arg-type]
        found.append(Segment(label, int(fields["Layer"] or 0), int(fields["LabelValue"] or 1)))
    if not found:
        raise UserError(f"{path} names no segments; save the segmentation again from Slicer as .seg.nrrd.")
    return (read_image(path) if voxels else Image(np.zeros((1, 1, 1), np.uint8))), found


class Mismatch(UserError):
    """A mask that does not lie on its image."""


def segment_masks(path: str | Path, image: Image) -> Iterator[tuple[Label, np.ndarray]]:
    """The segments of a .seg.nrrd as masks on the image's grid (Slicer crops the file to what is marked)."""
    grid, segments = read_segments(path)
    layers = [grid.like(layer) for layer in grid.channels]
    own = print_spacing(Path(image.source)) if image.source else None
    if own and np.allclose(own, grid.spacing[:2], rtol=1e-3):  # drawn in Slicer, which takes the print's size for the picture's
        image = replace(image, spacing=(*own, image.spacing[2]))
    if not image.same_grid(grid):
        _check_inside(image, grid, Path(path).name)
        reference = to_sitk(image.like(np.empty(image.shape, np.uint8)))
        nearest = (sitk.Resample(to_sitk(one), reference, sitk.Transform(), sitk.sitkNearestNeighbor) for one in layers)
        layers = [image.like(sitk.GetArrayFromImage(one)) for one in nearest]
    for segment in segments:
        yield segment.label, layers[segment.layer].array == segment.value


def _check_inside(image: Image, grid: Image, name: str) -> None:
    """Resampling would make background of what is marked beside the image, where the segmentation is of another scan."""
    far = reach(np.logical_or.reduce(grid.channels, 0), np.linalg.inv(image.matrix) @ grid.matrix, image.shape)
    if far > BEYOND:
        raise Mismatch(f"{name} reaches {far:.1f} voxels beyond its image; give the segmentation of this image, or crop it to the image.")


def reach(mask: np.ndarray, turn: np.ndarray, shape: Sequence[int]) -> float:
    """How many voxels what is marked (z, y, x) reaches beyond an image of this shape. turn: 4x4, index (x, y, z) to the image's."""
    z, y = np.nonzero(np.logical_or.reduce(mask, 2))
    rows = mask[z, y] != 0
    ends = np.hstack([(x, y, z) for x in (rows.argmax(1), rows.shape[1] - 1 - rows[:, ::-1].argmax(1))])
    at = turn[:3, :3] @ ends + turn[:3, 3:]
    return float(np.maximum(-at, at - np.array(shape[::-1])[:, None] + 1).max(initial=0))


def read_mask(path: str | Path, image: Image) -> tuple[np.ndarray, tuple[Label, ...]]:
    """(label map (z, y, x) on the image's grid, its labels; none where the file does not name them).

    Where segments overlap, the later one wins. Raises UserError where the mask does not fit the image, or most of a segment would
    be lost.
    """
    path = Path(path)
    if path.name.lower().endswith(".seg.nrrd"):
        labels, sizes, out = [], [], np.zeros(image.shape, np.uint16)
        for label, inside in segment_masks(path, image):
            out[inside] = label.value
            labels.append(label)
            sizes.append(np.count_nonzero(inside))
        for label, size, left in zip(labels, sizes, voxel_counts(out, len(labels) + 1)[1:]):
            if 2 * left < size:
                cure = "move it to the end of the list, or leave the other out"
                raise UserError(f"Later segments cover most of '{label.name}' in {path}, which would be lost; {cure}.")
        return out, tuple(labels)
    mask = read_image(path)
    channels = mask.channels
    if len(channels) > 1 and not is_grey(channels):
        raise UserError(f"{path} holds {len(channels)} channels; save one label map.")
    _check_fit(image, mask, str(path))
    return channels[0], ()


def completed(labels: Sequence[Label], known: Sequence[Label]) -> tuple[Label, ...]:
    """The labels of a corrected mask, and those of `known`, the dataset's, that it lacks, with values after theirs (255 at most): a
    person may have deleted their segments, which the model's mask holds."""
    have, most = {label.key for label in labels}, max((label.value for label in labels), default=0)
    lacking = [label for label in known if label.key not in have]
    return (*labels, *(replace(label, value=most + i) for i, label in enumerate(lacking[: 255 - most], 1)))


def read_model_mask(
    path: str | Path, image: Image, labels: Sequence[Label], known: Sequence[Label]
) -> tuple[tuple[Label, ...], np.ndarray]:
    """(a corrected mask's labels, completed(); label map (z, y, x) of the model's mask in their values, matched by name).

    labels: none where the corrected mask's values are those of `known`, the dataset's.
    """
    array, theirs = read_mask(path, image)
    if not theirs:
        return tuple(labels), array
    mine = completed(labels, known) if labels else ()
    return mine, translated(array, same_names(theirs, mine or known))


def same_names(theirs: Sequence[Label], mine: Sequence[Label]) -> dict[int, int]:
    """The values of labels of ours by those of theirs that have the same name."""
    values = {label.key: label.value for label in mine}
    return {label.value: values[label.key] for label in theirs if label.key in values}


def translated(array: np.ndarray, table: Mapping[int, int], dtype: Any = np.uint8) -> np.ndarray:
    """A label map (z, y, x) in other values; 0 and those that the table does not name become 0."""
    table = {value: to for value, to in table.items() if value > 0}
    lookup = np.zeros(max(table, default=0) + 2, dtype)
    lookup[list(table)] = list(table.values())
    out = np.empty(array.shape, dtype)
    for z in slabs(array.shape):  # numpy makes 8 bytes of each voxel
        lookup.take(array[z], out=out[z], mode="clip")  # what lies below or beyond is 0
    return out


def check_turn(image: Image, mask: Image) -> None:
    """Refuse a picture's mask that may have been drawn on it turned: browsers and labelling tools follow EXIF's mark, ITK does
    not, and the size does not tell of half a turn or a square which of both the mask is of."""
    turn = exif_turn(Path(image.source)) if image.source and from_picture(mask) else 1
    z, y, x = image.shape
    if 1 < turn < 9 and mask.shape == ((z, x, y) if turn > 4 else (z, y, x)):
        raise Mismatch(
            f"{Path(str(image.source)).name} is marked as turned (EXIF orientation {turn}), which some programs apply and others do not; "
            "save it upright without the mark, and its mask to match."
        )


def _check_fit(image: Image, mask: Image, name: str) -> None:
    check_turn(image, mask)
    if mask.shape != image.shape:
        raise UserError(
            f"{name} has {' x '.join(map(str, mask.shape[::-1]))} voxels and its image {' x '.join(map(str, image.shape[::-1]))}; "
            "give the mask of this image, or resample it."
        )
    plain = False
    if image.shape[0] == 1 and image.dicom_files == ():
        # A picture, or its mask, may lack its geometry, and a file of two dimensions does not know at which z it lies.
        plain = not (is_placed(image) and is_placed(mask)) or _is_flat(image) != _is_flat(mask)
    if not plain and not any(i.same_grid(mask, 0.1 * min(image.spacing)) for i in (image, on_print(image))):
        raise UserError(f"{name} does not lie where its image lies (spacing, origin or direction differ); resample it to the image.")


def _is_flat(image: Image) -> bool:
    """Whether the image was read from a file of two dimensions."""
    with suppress(UserError):  # which may be gone
        return image.source is not None and not image.dicom_files and information(Path(image.source)).GetDimension() < 3
    return False


def covered_steps(below: np.ndarray, top: np.ndarray) -> Steps[tuple[int, int] | None]:
    """In pieces: a label most of whose voxels another has taken, and which one; None where there is none. below, top: uint8
    (z, y, x) of the same segments, where they overlap the earlier and the later one."""
    both = np.zeros(1 << 16, np.int64)  # voxels by what lies below and what on top
    for z in slabs(top.shape):
        both += np.bincount((below[z].astype(np.uint16) << 8 | top[z]).ravel(), minlength=1 << 16)
        yield
    table = both.reshape(256, 256)
    lost = np.flatnonzero(2 * table.sum(0) < table.sum(1))
    return (int(lost[0]), int(table[lost[0]].argmax())) if lost.size else None


def changes(before: np.ndarray, after: np.ndarray, labels: Sequence[Label], voxel_ml: float) -> dict[str, dict[str, Any]]:
    """By label what a person changed: voxels added and removed, the same in ml, and the Dice of the two masks."""
    out = {}
    for label in labels:
        a, b = before == label.value, after == label.value
        both, n, m = (int(np.count_nonzero(x)) for x in (a & b, a, b))
        if n or m:
            out[label.name] = {
                "added": m - both,
                "removed": n - both,
                "kept": both,
                "added_ml": round((m - both) * voxel_ml, 4),
                "removed_ml": round((n - both) * voxel_ml, 4),
                "dice": round(2 * both / (n + m), 4),
            }
    return out


def match_label(name: str, terminology: Mapping[str, Sequence[str]], labels: Sequence[Label]) -> Label | None:
    """Which of these labels a segment is: by its name, else by its codes, else by its name without a number after it."""

    def codes(of: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        return {key: tuple(code[:2]) for key, code in of.items()}  # without their meaning, which is translated

    names = {label.key: label for label in labels}
    wanted = label_key(name)
    if wanted in names:
        return names[wanted]
    # "Tissue" is what Slicer calls a new segment, whatever it is of.
    plain = codes(terminology).get("type", ("", "85756007"))[1] == "85756007"
    same = [] if plain else [label for label in labels if codes(label.terminology) == codes(terminology)]
    return same[0] if len(same) == 1 else names.get(base_name(wanted))


def plain_name(name: str) -> str:
    """A name's key, by which a training tells labels apart: the same for GTV-1 and gtv 1; in any script, and CD3+ is not CD3."""
    return re.sub(r"[\s_.\-]+", " ", name.casefold()).strip() or name


def distinct(names: Iterable[str], where: object) -> None:
    """Refuse two names in one place that are the same label to a training; other files may spell a name otherwise."""
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(plain_name(name), name)) != name:
            raise UserError(f"{where} has the labels {other!r} and {name!r}, which are too alike; rename one of them.")


def base_name(name: str) -> str:
    """Without the number that tells one of several segments of a kind from the others: Nodule 2, Tumour_1."""
    return re.sub(r"[\s_]+\d+$", "", name.strip())


def read_terminology(entry: str) -> dict[str, list[str]]:
    """The inverse of Label.terminology_entry()."""
    parts = entry.split("~")
    keys = ("", "category", "type", "type_modifier", "", "region", "region_modifier")
    codes = {key: part.split("^") for key, part in zip(keys, parts) if key}
    return {key: code for key, code in codes.items() if len(code) == 3 and all(code)}


# ---------------------------------------------------------------------------------------------------------------- lock


class LockLost(Exception):
    """Another writer took this lock for a dead one's."""


class FolderLock:
    """A lock file that any file system knows: made only if it is not there, with its owner, and taken over when stale."""

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self.path = folder / name
        self.token = secrets.token_hex(8)

    def __enter__(self) -> FolderLock:
        content = json.dumps({"host": this_computer(), "name": socket.gethostname(), "pid": os.getpid(), "token": self.token})
        began = time.monotonic()
        pause = 0.02
        while True:
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                pass
            except PermissionError:
                # Windows says so of a file that is being removed, too.
                if os.name != "nt" or (time.monotonic() - began > 2 and not self.path.exists()):
                    raise
            else:
                try:
                    with os.fdopen(handle, "w") as f:
                        f.write(content)
                except OSError:  # a full disk: nobody is to wait for a lock that is no one's
                    self.path.unlink(missing_ok=True)
                    raise
                return self
            owner, age = self._owner()
            if owner is not None and (age > STALE or (age > DEAD and process_is_gone(owner))):
                self._bury(owner)
                continue
            if time.monotonic() - began > PATIENCE:
                where = owner and (owner.get("name") or owner.get("host"))  # of an earlier version
                who = f"process {owner.get('pid')} on {where}" if owner and owner.get("pid") else "another program"
                raise UserError(
                    f"The folder {self.path.parent} is being written to by {who}; try again in a minute, "
                    f"or delete {self.path} if that program is gone."
                )
            time.sleep(pause)
            pause = min(0.3, pause * 1.5)

    def __exit__(self, *error: Any) -> None:
        for _ in range(20):
            try:
                if self.mine():
                    self.path.unlink(missing_ok=True)
                return
            except OSError:  # Windows, while another looks whose it is; what stays is stale in a minute
                time.sleep(0.05)

    def mine(self) -> bool:
        """Without the lock's age: Windows may still be removing the file that the last look at the folder's clock made."""
        try:
            return json.loads(self.path.read_text("utf-8")).get("token") == self.token
        except (FileNotFoundError, ValueError, AttributeError):
            return False

    def _owner(self) -> tuple[dict[str, Any] | None, float]:
        """(owner, age in s); no owner where there is no lock (any more)."""
        try:
            age = time_of(self.path.parent, self.token) - self.path.stat().st_mtime
            text = self.path.read_text("utf-8")
        except (FileNotFoundError, PermissionError):
            return None, 0.0
        try:
            owner = json.loads(text)
        except ValueError:
            owner = None  # killed, or not yet done, between making and filling it
        return (owner if isinstance(owner, dict) else {"token": text}), age

    def _bury(self, owner: dict[str, Any]) -> None:
        """Remove this very owner's lock. Renaming is atomic, so of two who try only one gets it; a fresh lock taken by mistake
        is put back, and its owner asks mine() before it changes anything."""
        grave = self.path.with_name(f".grave-{self.token}")
        try:
            os.rename(self.path, grave)
        except OSError:
            return
        try:
            text = grave.read_text("utf-8")
            try:
                taken = json.loads(text).get("token")
            except (ValueError, AttributeError):
                taken = text
            if taken != owner.get("token"):
                with open(self.path, "x", encoding="utf-8") as f:
                    f.write(text)
        except FileExistsError:
            pass
        finally:
            with suppress(OSError):  # Windows, while another looks it over; clean() removes it later
                grave.unlink(missing_ok=True)


class Unchanged(Exception):
    """What a commit()'s change raises where it finds that there is nothing to do."""


def commit(
    folder: Path,
    lock: str,
    what: str,
    read: Callable[[Path], dict[str, Any]],
    change: Callable[[dict[str, Any]], T],
    write: Callable[[Path, dict[str, Any], FolderLock], None],
) -> tuple[dict[str, Any], T]:
    """Read a shared folder's index, change it, replace it; all under the lock. The index then, and what `change` returned (None
    where that raised Unchanged). What else `change` raises leaves it as it was. what: the folder is, for the sentence."""
    for attempt in range(5):
        with FolderLock(folder, lock) as held:
            data = read(folder)
            try:
                out = change(data)
            except Unchanged:
                return data, None  # type: ignore[return-value]
            data["revision"] += 1
            try:
                write(folder, data, held)
            except LockLost:
                continue
            except UserError as e:  # on Windows and its shares while another reads it
                if attempt == 4 or not isinstance(e.__cause__, PermissionError):
                    raise
                time.sleep(0.2)
                continue
            return data, out
    raise UserError(f"The {what} {folder} is changed by others all the time; try again.")


def process_is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether a lock's owner was a process of this computer that is gone."""
    pid = owner.get("pid")
    if not is_this_computer(owner.get("host")) or not isinstance(pid, int) or pid <= 0:
        return False
    if os.name == "nt":  # where os.kill(pid, 0) would end the process
        return process_mark(pid) is None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


# ------------------------------------------------------------------------------------------------------------- dataset


@dataclass(frozen=True)
class Entry:
    """A case's current version. images: a file for each channel; label, model: the corrected mask and the model's own.

    patient: the salted hash; split: "train", "validation", "test" or ""; record: the version as it stands in the index.
    """

    name: str
    patient: str
    split: str
    version: int
    images: tuple[Path, ...]
    label: Path
    model: Path | None
    record: dict[str, Any]

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        return self.record.get("changes") or {}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a dataset. case: "" for the folder itself."""

    case: str
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.case + ': ' if self.case else ''}{self.what}; {self.cure}."


class Dataset:
    """A dataset folder. Every read sees the index as it is now; every change is one atomic replacement of it."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder = folder
        self._data = data

    # ------------------------------------------------------------------------------------------------- make and open

    @classmethod
    def create(cls, folder: str | Path, name: str, labels: Sequence[Label], channels: Sequence[str]) -> Dataset:
        """A new, empty dataset; the folder may exist and hold other things, but no dataset. labels: without the background."""
        folder = user_path(folder)
        if (folder / INDEX).exists():
            raise UserError(f"{folder} already holds a {INDEX}; choose another folder, or open it.")
        values = [label.value for label in labels]
        if not labels or not channels or not name.strip():
            raise UserError("A dataset needs a name, at least one label and at least one channel; give them.")
        names = ["background", *(label.key for label in labels)]
        if len(set(values)) < len(values) or len(set(names)) < len(names) or not all(0 < v < 256 for v in values) or "" in names:
            raise UserError("A dataset's labels need names of their own and values of their own from 1 to 255; correct them.")
        distinct((label.name for label in labels), "The dataset")
        data = {
            "format": FORMAT,
            "format_version": 1,
            "name": name.strip(),
            "revision": 0,
            "channels": list(channels),
            "segments": [replace(label, name=label.name.strip()).to_json() for label in labels],
            "cases": {},
        }
        with reached(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FolderLock(folder):
                if (folder / INDEX).exists():
                    raise UserError(f"{folder} was made by another person just now; open it.")
                if not (folder / SALT).exists():
                    with atomic_path(folder / SALT) as p:
                        p.write_text(secrets.token_hex(32) + "\n", "ascii")
                        flush(p)
                _write_index(folder, data)
        return cls.open(folder)

    def discard(self) -> None:
        """Undo create(), as long as nobody has added a case."""
        with reached(self.folder), FolderLock(self.folder):
            if not any(_read_index(self.folder).get(key) for key in ("cases", "removed")):
                (self.folder / INDEX).unlink()
                (self.folder / SALT).unlink(missing_ok=True)

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        folder = user_path(folder)
        return cls(folder, _read_index(folder))

    def refresh(self) -> Dataset:
        """Take in what others have added."""
        self._data = _read_index(self.folder)
        return self

    @property
    def name(self) -> str:
        return self._data["name"]

    @property
    def revision(self) -> int:
        return self._data["revision"]

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self._data["channels"])

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(map(Label.from_json, self._data["segments"]))

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: self._entry(name, case) for name, case in self._data["cases"].items()}

    def _entry(self, name: str, case: dict[str, Any], version: int | None = None) -> Entry:
        record = next(v for v in reversed(case["versions"]) if version in (None, v["version"]))
        images, label = tuple(self.folder / f for f in record["images"]), self.folder / record["label"]
        model = self.folder / record["model"] if record.get("model") else None
        return Entry(name, case["patient"], case.get("split", ""), record["version"], images, label, model, record)

    def versions(self, name: str) -> list[Entry]:
        """All versions of a case, the oldest first."""
        case = self._case(self._data, name)
        return [self._entry(name, case, v["version"]) for v in case["versions"]]

    def summary(self, size: int = 1 << 20) -> dict[str, Any]:
        """What a person wants to see of it, as JSON: the newest cases with their versions, without files, and of those that were
        removed. size: about so many characters of each, since the worker sends it as one line, of four times as many at most."""
        keys = ("version", "by", "date", "changes", "restored", "model_name")

        def told(name: str, case: dict[str, Any]) -> dict[str, Any]:
            last = case["versions"][-1]
            return {
                "name": name,
                "patient": case["patient"],
                "split": case.get("split", ""),
                "modality": last.get("modality", ""),
                "voxels": last.get("voxels_by_label", {}),
                "versions": [{key: v[key] for key in keys if v.get(key)} for v in case["versions"]],
            }

        def newest(cases: dict[str, Any]) -> list[dict[str, Any]]:
            out: list[dict[str, Any]] = []
            left = size
            for name, case in reversed(cases.items()):
                out.append(told(name, case))
                left -= len(json.dumps(out[-1]))
                if left < 0:
                    break
            return out[::-1]

        cases, removed = self._data["cases"], self._data.get("removed", {})
        slices = [min(case["versions"][-1]["geometry"]["size"]) for case in cases.values()]
        return {
            "folder": str(self.folder),
            "name": self.name,
            "revision": self.revision,
            "channels": list(self.channels),
            "labels": [label.to_json() for label in self.labels],
            "flat": bool(slices) and statistics.median(slices) < 2,  # single slices, not volumes
            "count": len(cases),
            "patients": len({case["patient"] for case in cases.values()}),
            "cases": newest(cases),
            "removed": newest(removed),
        }

    def _case(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        if name not in data["cases"]:
            raise UserError(f"The dataset {self.folder} has no case {name}; it has {', '.join(data['cases']) or 'none'}.")
        return data["cases"][name]

    def _hash(self, *what: str) -> str:
        """A keyed hash with the folder's salt."""
        with reached(self.folder):
            try:
                salt = (self.folder / SALT).read_text("ascii").strip()
            except (FileNotFoundError, UnicodeDecodeError):
                salt = ""
        if len(salt) < 32:
            raise UserError(f"{self.folder / SALT} is missing or damaged, and patients could not be grouped; bring it back from a copy.")
        return hmac.new(salt.encode(), "\0".join(what).encode(), hashlib.sha256).hexdigest()

    def patient(self, identity: str) -> str:
        """The key under which a patient's cases are grouped; from it nobody without the salt gets to the identity."""
        return "p-" + self._hash("patient", identity.strip())[:12]

    # --------------------------------------------------------------------------------------------------------- change

    def add(
        self,
        image: Image,
        mask: Image | np.ndarray,
        *,
        name: str | None = None,
        patient: str | None = None,
        labels: Sequence[Label] | None = None,
        model_mask: Image | np.ndarray | None = None,
        model: str = "",
        by: str = "",
        dated: bool = False,
        split: str | None = None,
        allow: Collection[str] = (),
        modality: str | None = None,
        progress: Callable[[float, str], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Entry:
        """Add a case, or a new version of it; former versions stay. Nothing is changed unless all is written and read back.

        mask: label values (z, y, x) on the image's grid, the dataset's or, where `labels` says what they are, those of its
        labels, which are then matched by name. name: made from the voxels where it is not given, so that the same scan is
        the same case. patient: any identity (PatientID); only its salted hash is kept; default: that of the case, else the DICOM files'
        PatientID, else the case is a patient of its own. by, dated: who and when, only if wished. allow: of OBJECTIONS, which are
        refused otherwise; "label": a label of `labels` that the dataset does not have is added to it. modality: default: the DICOM
        files'. check() is called between the files and may raise, which leaves nothing. Raises UserError, or its Objection.
        """
        if unknown := set(allow) - set(OBJECTIONS):
            raise UserError(f"{sorted(unknown)[0]} is nothing that can be allowed; choose of {', '.join(OBJECTIONS)}.")
        if name is not None and not NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a case; use up to 64 letters, digits, dots, dashes, underscores (no patient's name).")
        if split not in (None, "", *SPLITS):
            raise UserError(f"{split} is no split; choose one of {', '.join(SPLITS)}.")
        self.refresh()
        tell, stop = progress or (lambda fraction, text: None), check or (lambda: None)
        tell(0.0, "checking the case")
        if image.n_channels > 2 and is_grey(image.channels):  # of others, channels of their own cannot be told from a transparency
            image = of_channels(image, len(self.channels))
        channels = self._check_image(image)
        more = self._new_labels(mask, labels) if "label" in allow else ()
        corrected = self._check_mask(image, mask, labels, "The mask", allow, more)
        allowed = set(OBJECTIONS) - {"label"}
        own = None if model_mask is None else self._check_mask(image, model_mask, labels, "The model's mask", allowed, more)
        stop()
        voxels, mirrored = hashlib.sha256(), np.linalg.det(image.matrix[:3, :3]) < 0
        for channel in channels:
            voxels.update(f"{channel.dtype.str} {channel.shape}".encode())
            # As Slicer loads them: it turns the slices of a left-handed file round, and the work list and commands do not.
            for plane in channel[::-1] if mirrored else channel:
                voxels.update(plane)
        digest = voxels.hexdigest()
        key = name or "case-" + self._hash("voxels", digest)[:10]
        identity = patient if patient is not None else dicom_tag(image, "0010|0020")
        person = self.patient(identity) if identity.strip() else self._nobody(digest)
        self._check_twin(self._data, key, digest, allow)
        self._check_patient(self._data, key, person, patient is not None, allow)
        found = corrected if own is not None and np.array_equal(own, corrected) else None
        self._check_correction(self._data, key, digest, found, allow)
        record: dict[str, Any] = {
            "version": 0,
            "voxels": digest,
            "modality": dicom_tag(image, MODALITY) if modality is None else modality,
            "geometry": {"size": list(image.shape[::-1]), **image.geometry},
            "voxels_by_label": {d.name: int(np.count_nonzero(corrected == d.value)) for d in (*self.labels, *more)},
            "model_name": model,
            "changes": changes(own, corrected, (*self.labels, *more), math.prod(image.spacing) / 1000) if own is not None else None,
        }
        if by:
            record["by"] = by
        if dated:
            record["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        place = PurePosixPath(CASES, key, secrets.token_hex(6))

        def enter(data: dict[str, Any]) -> Entry:
            self._check_correction(data, key, digest, found, allow)
            return self._enter(data, key, record, person, patient is not None, split, allow, more)

        with reached(self.folder):
            try:
                self._write_files(image, channels, corrected, own, place, record, key, tell, stop)
                stop()
                tell(1.0, "adding it to the index")
                return self._commit(enter)
            except BaseException:
                if not self._is_named(str(place)):
                    shutil.rmtree(self.folder / place, ignore_errors=True)
                    with suppress(OSError):  # another version may be there
                        (self.folder / place).parent.rmdir()
                raise

    def _is_named(self, place: str) -> bool:
        """Whether the index names a version's folder; so as long as it cannot be read, for clean() removes what is not named."""
        try:
            data = _read_index(self.folder)
        except UserError:
            return (self.folder / INDEX).exists()
        cases = (*data["cases"].values(), *data.get("removed", {}).values())
        return any(f.startswith(f"{place}/") for case in cases for version in case["versions"] for f in version["files"])

    def _check_image(self, image: Image) -> list[np.ndarray]:
        """The channels as contiguous arrays of a type that NIfTI has."""
        check_geometry(image)
        if image.n_channels != len(self.channels):
            raise UserError(
                f"The image has {image.n_channels} channels and the dataset {len(self.channels)} ({', '.join(self.channels)}); give those."
            )
        out = []
        for array in image.channels:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError("The image has voxels that are no numbers (NaN or infinite); repair or leave it out.")
            array = storable(array)
            if array.min() == array.max():
                raise UserError("The image is the same everywhere, so there is nothing to learn from it; give the scan itself.")
            out.append(np.ascontiguousarray(array))
        return out

    def _new_labels(self, mask: Image | np.ndarray, labels: Sequence[Label] | None) -> tuple[Label, ...]:
        """Those of `labels` that the mask holds and the dataset does not, with values that are free in it."""
        held = set(map_values(mask.array if isinstance(mask, Image) else np.asarray(mask)))
        mine = self.labels
        out: list[Label] = []
        for label in labels or ():
            if label.value in held and label.key not in (d.key for d in (*mine, *out)):
                free = next((v for v in range(1, 256) if v not in (d.value for d in (*mine, *out))), 0)
                if not free or label.key in ("", "background"):
                    raise UserError(f"The dataset cannot take a label {label.name!r}; rename it, or leave it out.")
                out.append(Label(free, label.name.strip(), label.color, label.terminology))
        if out:
            distinct((label.name for label in (*mine, *out)), "The dataset")
        return tuple(out)

    def _check_mask(
        self,
        image: Image,
        mask: Image | np.ndarray,
        labels: Sequence[Label] | None,
        what: str,
        allow: Collection[str],
        more: Sequence[Label] = (),
    ) -> np.ndarray:
        """The mask in the dataset's values, uint8. more: labels that the dataset is about to get."""
        if isinstance(mask, Image):
            _check_fit(image, mask, what)
        array = mask.array if isinstance(mask, Image) else np.asarray(mask)
        if array.shape != image.shape:
            raise UserError(f"{what} has {array.shape[::-1]} voxels and the image {image.shape[::-1]}; give the mask of this image.")
        if array.dtype.kind == "f":
            whole = np.rint(array)
            if not np.array_equal(whole, array):
                raise UserError(f"{what} holds numbers that are not whole; give label values, not probabilities.")
            array = whole.astype(np.int64)
        found = map_values(array)
        mine = (*self.labels, *more)
        table = {label.value: label.value for label in self.labels} if labels is None else same_names(labels, mine)
        theirs = {label.value: label.name for label in labels or ()}
        if found == [255] and len(mine) == len(table) == 1 and 255 not in {**table, **theirs}:
            table = {255: next(iter(table.values()))}  # a mask of 0 and 255
        for value in found:
            if value not in table:
                known = ", ".join(f"{d.value} {d.name}" for d in self.labels)
                text = (
                    f"{what} holds the label {theirs.get(value, value)}, which the dataset does not have (it has {known}); "
                    "remove or rename it, or add the label to the dataset."
                )
                raise Objection(text, "label") if value in theirs else UserError(text)
        out = np.zeros(array.shape, np.uint8)
        for value in found:
            out[array == value] = table[value]
        if not found and "empty" not in allow:
            raise Objection(f"{what} is empty; mark something, or allow an empty mask if the scan has nothing to mark.", "empty")
        if "leftover" not in allow:
            for label in (*self.labels, *more):
                n = int(np.count_nonzero(out == label.value))
                if 0 < n < LEFTOVER:
                    few = f"{counted(n, 'voxel')} of {label.name}, as an eraser leaves"
                    raise Objection(f"{what} has only {few}; remove them, or allow leftovers.", "leftover")
        return out

    def _check_twin(self, data: dict[str, Any], key: str, digest: str, allow: Collection[str]) -> None:
        for name, case in data["cases"].items():
            if name != key and case["versions"][-1]["voxels"] == digest:
                raise UserError(f"This image is already there as {name}; add it under that name to update it, or remove {name} first.")
        former = data["cases"].get(key) or data.get("removed", {}).get(key)
        if former and former["versions"][-1]["voxels"] != digest and "image" not in allow:
            which = key if key in data["cases"] else f"{key}, which was removed,"
            raise Objection(f"The case {which} has another image; choose another name, or allow its image to be replaced.", "image")
        if key not in data["cases"]:
            if RESERVED.match(key):
                raise UserError(f"{key!r} cannot name a case: Windows makes no folder of that name; choose another.")
            self._check_name(data, key, "choose another, or update that one")

    def _check_name(self, data: dict[str, Any], key: str, cure: str) -> None:
        """Refuse a new case whose name differs from another's in case alone: an export there would write one patient's voxels over the
        other's."""
        if other := next((name for name in data["cases"] if name.casefold() == key.casefold()), ""):
            raise UserError(f"There is a case {other} already, the same name to Windows and macOS; {cure}.")

    def _check_patient(self, data: dict[str, Any], key: str, person: str, named: bool, allow: Collection[str]) -> None:
        case = data["cases"].get(key) or data.get("removed", {}).get(key)
        if named and case and case["patient"] != person and not self._is_nobodys(case) and "patient" not in allow:
            cure = "leave the patient out to keep that, or allow the patient to be replaced"
            raise Objection(f"The case {key} is there as another patient's; {cure}.", "patient")

    def _check_correction(self, data: dict[str, Any], key: str, digest: str, found: np.ndarray | None, allow: Collection[str]) -> None:
        """found: the model's mask, where it is added as it was."""
        if found is None or key not in data["cases"] or "uncorrected" in allow:
            return
        entry = self._entry(key, data["cases"][key])
        untouched = entry.record.get("changes") is not None and not any(c["added"] or c["removed"] for c in entry.changes.values())
        if untouched or entry.record["voxels"] != digest:
            return
        try:
            held = read_image(entry.label).array
        except UserError:  # it is lost already
            return
        if not np.array_equal(held, found):
            text = f"The mask is as the model made it and would replace the correction that {key} holds (version {entry.version}); "
            raise Objection(text + "correct it, or allow an uncorrected mask.", "uncorrected")

    def _nobody(self, digest: str) -> str:
        """The patient of an image of whom nothing is known."""
        return "p-" + self._hash("voxels", digest)[:12]

    def _is_nobodys(self, case: dict[str, Any]) -> bool:
        return case["patient"] in {self._nobody(digest) for digest in {v["voxels"] for v in case["versions"]}}

    def _write_files(
        self,
        image: Image,
        channels: list[np.ndarray],
        corrected: np.ndarray,
        own: np.ndarray | None,
        place: PurePosixPath,
        record: dict[str, Any],
        key: str,
        tell: Callable[[float, str], None],
        stop: Callable[[], None],
    ) -> None:
        """Write a version's files and read them back; the same image is not written twice."""
        record["files"] = {}
        former = self._data["cases"].get(key, {}).get("versions", [])
        twin = next((v for v in reversed(former) if v["voxels"] == record["voxels"] and v["geometry"] == record["geometry"]), None)
        todo = [("label", f"{place}/label.nii.gz", corrected)]
        if own is not None:
            todo.append(("model", f"{place}/model.nii.gz", own))
        if twin and all((self.folder / f).is_file() for f in twin["images"]):
            record["images"] = list(twin["images"])
            record["files"] |= {f: twin["files"][f] for f in twin["images"]}
        else:
            record["images"] = [f"{place}/image_{i:04d}.nii.gz" for i in range(len(channels))]
            todo += [("", name, channel) for name, channel in zip(record["images"], channels)]
        for done, (role, name, array) in enumerate(todo):
            stop()
            tell((done + 0.1) / len(todo), "writing the mask" if role else "writing the image")
            if role:
                record[role] = name
            path = self.folder / name
            if not (self.folder / INDEX).is_file():  # a drive that is gone may leave its empty folder, which would take the image
                raise UserError(f"The dataset {self.folder} is no longer there; connect its drive or network folder, and try again.")
            grid = Image(array, image.spacing, image.origin, image.direction)
            try:  # ITK does not always notice a full disk
                write_image(grid, path)
                flush(path)
                back = read_image(path)
                whole = np.array_equal(back.array, array) and back.same_grid(grid, 0.01 * min(image.spacing))
            except UserError as e:
                if isinstance(e.__cause__, OSError):
                    raise e.__cause__ from None
                whole = False
            if not whole:
                raise UserError(f"{self.folder} did not take the case whole; check the disk's space and state, and add the case again.")
            record["files"][name] = _sha256(path)

    def _enter(
        self,
        data: dict[str, Any],
        key: str,
        record: dict[str, Any],
        person: str,
        named: bool,
        split: str | None,
        allow: Collection[str],
        more: Sequence[Label],
    ) -> Entry:
        """Put a version into the index, which another may have changed since it was checked."""
        self._check_twin(data, key, record["voxels"], allow)
        self._check_patient(data, key, person, named, allow)
        for label in more:
            if any(d["value"] == label.value or plain_name(d["name"]) == plain_name(label.name) for d in data["segments"]):
                raise UserError(f"Another person added a label just now; add the case {key} again.")
            data["segments"].append(label.to_json())
        there = data["cases"].get(key)
        # One that was removed goes on with its history, and stays in its split.
        case = there or data.get("removed", {}).pop(key, None) or {"patient": person, "split": "", "versions": []}
        _keep_patient(case)
        if there is None:
            data["cases"][key] = case
            if case["patient"] != person and case["versions"] and case["versions"][-1]["voxels"] != record["voxels"]:
                case |= {"patient": person, "split": ""}  # another scan in its place, by default another patient's
        if named or self._is_nobodys(case):
            case["patient"] = person
        kin = _kin(data, key)
        if split is not None:
            if kin and kin != {split}:
                raise UserError(f"Another case of this patient is in {kin.pop()}; put both into the same split.")
            case["split"] = split
        elif kin:
            case["split"] = kin.pop()
        if not all((self.folder / f).is_file() for f in record["files"]):
            raise UserError(f"The case {key} was erased by another person just now; add it again if it is to stay.")
        record["version"] = max((v["version"] for v in case["versions"]), default=0) + 1
        case["versions"].append(record)
        return self._entry(key, case)

    def remove(self, name: str, erase: bool = False) -> None:
        """Take a case out. Its files and record stay for restore(), unless erase: then no version of it is left, nor any image of it in
        the trainings of this folder."""

        def take(data: dict[str, Any]) -> set[Path]:
            if erase and name in data.get("removed", {}):
                data["cases"].setdefault(name, {"versions": []})["versions"] += data["removed"].pop(name)["versions"]
            case = self._case(data, name)
            del data["cases"][name]
            if erase:
                places = {(self.folder / f).parent for version in case["versions"] for f in version["files"]}
                if linked := sorted(str(place) for place in places if not is_within(place, self.folder)):
                    raise UserError(f"{linked[0]} lies behind a link, so nothing was erased; remove the link, or put the files there.")
                return places
            data.setdefault("removed", {})[name] = case
            return set()

        with reached(self.folder):
            if erase and any(map(_trains, (self.folder / TRAININGS).glob("*/job.json"))):
                raise UserError("A training of this dataset runs and holds its cases; stop it first, then erase.")
            places = self._commit(take)
            for place in places:
                shutil.rmtree(place, ignore_errors=True)  # one may be lost, or held by a program: the others are to go all the same
            held = _forget(self.folder / TRAININGS, name, {*self._data["cases"], *self._data.get("removed", {})}) if erase else []
            if left := sorted(str(place) for place in (*held, *places) if place.exists()):
                text = f"{name} is no longer in the dataset, but {', '.join(left)} could not be erased; close the programs that use it and "
                raise UserError(text + "delete it" + ", or run unetseg dataset check --clean a day later" * (not held) + ".")

    def restore(self, name: str, version: int | None = None) -> Entry:
        """Bring a removed case back, or make a former version the current one (as a new version: history only grows). An image that
        another patient's had replaced comes back as its own patient's."""

        def back(data: dict[str, Any]) -> Entry:
            if name in data.get("removed", {}) and name not in data["cases"]:
                self._check_name(data, name, f"remove that one before {name} is restored, or add this scan under another name")
                data["cases"][name] = data["removed"].pop(name)
            case = self._case(data, name)
            if version is not None:
                found = next((v for v in case["versions"] if v["version"] == version), None)
                if not found:
                    raise UserError(f"{name} has no version {version}; it has 1 to {case['versions'][-1]['version']}.")
                _keep_patient(case)
                same = next(v for v in reversed(case["versions"]) if v["voxels"] == found["voxels"])
                if same.get("patient", case["patient"]) != case["patient"]:  # another's image; of earlier versions that is not known
                    case |= {"patient": same["patient"], "split": ""}
                case["versions"].append({**found, "version": case["versions"][-1]["version"] + 1, "restored": version})
            if kin := _kin(data, name):  # dealt while it was away
                case["split"] = kin.pop()
            self._check_twin(data, name, case["versions"][-1]["voxels"], ("image",))
            return self._entry(name, case)

        with reached(self.folder):
            return self._commit(back)

    def split(self, fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0, again: bool = False) -> dict[str, list[str]]:
        """Deal the patients into train, validation and test; returns the cases of each.

        Patients that are dealt already stay where they are, so that what was held out stays held out, unless `again`.
        The same patients and seed give the same split.
        """
        if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise UserError("A split needs three fractions, for train, validation and test, that sum to 1, such as 0.7,0.15,0.15.")

        def deal(data: dict[str, Any]) -> dict[str, list[str]]:
            cases = data["cases"]
            if again:
                for case in cases.values():
                    case["split"] = ""
            people: dict[str, list[str]] = {}
            for name, case in cases.items():
                people.setdefault(case["patient"], []).append(name)
            wanted = [s for s, f in zip(SPLITS, fractions) if f]
            if len(people) < len(wanted):
                raise UserError(
                    f"There are too few patients ({len(people)}) for {len(wanted)} parts; add cases, or set a part to 0 (cross-validate)."
                )
            count = Counter({s: 0 for s in SPLITS})
            order = sorted(people, key=lambda p: hashlib.sha256(f"{seed} {p}".encode()).hexdigest())
            dealt = {p: next((cases[n]["split"] for n in people[p] if cases[n]["split"]), "") for p in order}
            for p in order:
                if dealt[p]:
                    count[dealt[p]] += len(people[p])
            new = [p for p in order if not dealt[p]]
            share = {s: f * len(cases) for s, f in zip(SPLITS, fractions)}
            for i, p in enumerate(new):
                # The last ones go where there is nobody yet: small sets would round a part away.
                empty = [s for s in wanted if not count[s]]
                part = empty[0] if empty and len(new) - i <= len(empty) else max(wanted, key=lambda s: share[s] - count[s])
                dealt[p] = part
                count[part] += len(people[p])
            for p, part in dealt.items():
                for n in people[p]:
                    cases[n]["split"] = part
            return {s: [n for n, c in cases.items() if c["split"] == s] for s in SPLITS}

        with reached(self.folder):
            return self._commit(deal)

    def _commit(self, change: Callable[[dict[str, Any]], T]) -> T:
        self._data, out = commit(self.folder, LOCK, "dataset", _read_index, change, _write_index)
        return out

    # ---------------------------------------------------------------------------------------------------------- check

    def check(self, hashes: bool = True) -> list[Problem]:
        """What is wrong with the folder itself: missing or changed files, files nobody names, patients in two splits."""
        self.refresh()
        out = []
        if not (self.folder / SALT).is_file():
            out.append(Problem("", f"{SALT} is missing, so that no patient can be grouped with earlier cases", "bring it back from a copy"))
        splits: dict[str, set[str]] = {}
        for name, case in self._data["cases"].items():
            splits.setdefault(case["patient"], set()).add(case.get("split", ""))
            for version in case["versions"]:
                for file, digest in version["files"].items():
                    path = self.folder / file
                    if not path.is_file():
                        out.append(Problem(name, f"{file} of version {version['version']} is missing", "restore it, or remove the case"))
                    elif hashes and _sha256(path) != digest:
                        out.append(Problem(name, f"{file} was changed since it was added", "restore it, or add the case again"))
        out += [
            Problem("", f"patient {p} is in {' and '.join(sorted(filter(None, s)))}", "split again")
            for p, s in splits.items()
            if len(s - {""}) > 1
        ]
        if orphans := self._orphans(RUBBISH):
            what = f"{len(orphans)} files or folders belong to no case (a writer was stopped)"
            out.append(Problem("", what, "unetseg dataset check --clean removes them"))
        return out

    def _orphans(self, age: float) -> list[Path]:
        """What no index names and is older than `age` seconds."""
        cases = [*self._data["cases"].values(), *self._data.get("removed", {}).values()]
        # By the name of a version's folder, which is like no other: where case means nothing, P1 and p1 share theirs.
        named = {PurePosixPath(f).parent.name for case in cases for version in case["versions"] for f in version["files"]}
        found = [p for p in self.folder.glob(f"{CASES}/*/*") if p.name not in named]
        for pattern in (".unetseg-*", ".clock-*", ".grave-*"):
            found += self.folder.glob(pattern)
        now = time.time()
        return sorted(p for p in found if is_within(p, self.folder) and now - p.lstat().st_mtime >= age)

    def clean(self, age: float = RUBBISH) -> list[Path]:
        """Remove what killed writers left, if it is older than `age` seconds: what is younger may be a case in the making."""
        self.refresh()
        with reached(self.folder):
            gone = self._orphans(age)
            for path in gone:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for empty in self.folder.glob(f"{CASES}/*"):
                if is_within(empty, self.folder) and empty.is_dir() and not any(empty.iterdir()):
                    empty.rmdir()
        return gone

    # --------------------------------------------------------------------------------------------------------- export

    def export(self, target: str | Path, kind: str) -> Path:
        """Copy the current cases for another program; all or nothing. Returns the folder, which must be new or empty.

        "nnunet": a raw dataset (below `target` unless that is named DatasetNNN_name), with splits_final.json and patients.csv;
        "monai": images/, labels/, datalist.json; "itksnap": images/, labels/, labels.txt (label descriptions), patients.csv.
        """
        if kind not in EXPORTS:
            raise UserError(f"{kind} is no known export; choose one of {', '.join(EXPORTS)}.")
        self.refresh()
        if not self._data["cases"]:
            raise UserError(f"The dataset {self.folder} is empty; add cases first.")
        known: dict[str, str] = {}
        for name in self._data["cases"]:  # of a set that an earlier version wrote
            if (other := known.setdefault(name.casefold(), name)) != name:
                text = f"The cases {other} and {name} have the same name to Windows and macOS, where one would take the other's place; "
                raise UserError(text + "remove one of them and add its scan under another name.")
        target = user_path(target)
        if kind == "nnunet" and not re.fullmatch(r"Dataset\d{3}_.+", target.name):
            taken = {p.name[7:10] for p in target.glob("Dataset[0-9][0-9][0-9]_*")}
            number = next(f"{n:03d}" for n in range(501, 1000) if f"{n:03d}" not in taken)
            target = target / f"Dataset{number}_{re.sub(r'[^A-Za-z0-9]+', '_', self.name).strip('_') or 'unetseg'}"
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{target} is not empty; choose a new folder for the export.")
        with reached(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            making = target.parent / f".unetseg-{secrets.token_hex(4)}-{target.name}"
            making.mkdir()
            try:
                {"nnunet": self._export_nnunet, "monai": self._export_monai, "itksnap": self._export_itksnap}[kind](making)
                if target.is_dir():
                    target.rmdir()
                move_file(making, target)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
        return target

    def _export_files(self, entry: Entry, images: Path, pattern: str, labels: Path, consecutive: bool) -> None:
        """Copy the channels to pattern.format(channel) in `images`, and the label map into `labels`."""
        for folder in (images, labels):
            folder.mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(entry.images):
            shutil.copyfile(file, images / pattern.format(i))
        label = labels / f"{entry.name}.nii.gz"
        table = self._consecutive()
        if consecutive and any(a != b for a, b in table.items()):
            mask = read_image(entry.label)
            write_image(mask.like(translated(mask.array, table)), label)
        else:
            shutil.copyfile(entry.label, label)

    def _write_patients(self, to: Path) -> None:
        """patients.csv, by which a training keeps the cases of a person together; neither format has a place for it."""
        with (to / "patients.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("case", "patient"), *((entry.name, entry.patient) for entry in self.entries.values())])

    def _consecutive(self) -> dict[int, int]:
        """The label values -> 1, 2, ..., which nnU-Net asks for."""
        return {v: i for i, v in enumerate(sorted(label.value for label in self.labels), 1)}

    def _export_nnunet(self, to: Path) -> None:
        entries = self.entries
        for entry in entries.values():
            part = "Ts" if entry.split == "test" else "Tr"
            self._export_files(entry, to / f"images{part}", entry.name + "_{:04d}.nii.gz", to / f"labels{part}", True)
        training = [e.name for e in entries.values() if e.split != "test"]
        if not training:
            raise UserError("All cases are in test, so there is nothing to train on; split the dataset again.")
        table = self._consecutive()
        data = {
            "name": self.name,
            "channel_names": {str(i): c for i, c in enumerate(self.channels)},
            "labels": {"background": 0, **{d.name: table[d.value] for d in sorted(self.labels, key=lambda d: d.value)}},
            "numTraining": len(training),
            "file_ending": ".nii.gz",
        }
        _write_json(to / "dataset.json", data)
        self._write_patients(to)
        held = [e.name for e in entries.values() if e.split == "validation"]
        if held:  # nnU-Net looks for it in nnUNet_preprocessed/DatasetNNN_name
            _write_json(to / "splits_final.json", [{"train": [n for n in training if n not in held], "val": held}])

    def _export_monai(self, to: Path) -> None:
        parts: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
        several = len(self.channels) > 1
        for entry in self.entries.values():
            pattern = entry.name + ("_{:04d}.nii.gz" if several else ".nii.gz")
            self._export_files(entry, to / "images", pattern, to / "labels", False)
            images = [f"images/{pattern.format(i)}" for i in range(len(self.channels))]
            item = {"image": images if several else images[0], "label": f"labels/{entry.name}.nii.gz", "patient": entry.patient}
            parts["training" if entry.split in ("", "train") else entry.split].append(item)
        head = {
            "name": self.name,
            "modality": {str(i): c for i, c in enumerate(self.channels)},
            "labels": {"0": "background", **{str(d.value): d.name for d in self.labels}},
            "numTraining": len(parts["training"]),
            "numTest": len(parts["test"]),
        }
        _write_json(to / "datalist.json", head | parts)

    def _export_itksnap(self, to: Path) -> None:
        several = len(self.channels) > 1
        for entry in self.entries.values():
            pattern = entry.name + ("_{:04d}.nii.gz" if several else ".nii.gz")
            self._export_files(entry, to / "images", pattern, to / "labels", False)
        (to / "labels.txt").write_text(label_descriptions(self.labels), "utf-8")
        self._write_patients(to)


def label_descriptions(labels: Sequence[Label]) -> str:
    """ITK-SNAP's label description file: index, colour, opacity, visible in slices and in 3D, name."""
    lines = [
        "# ITK-SnAP Label Description File",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for d in labels:
        r, g, b = d.color
        name = d.name.replace('"', "'")
        lines.append(f'{d.value:5d} {r:5d}{g:5d}{b:5d}        1  1  1    "{name}"')
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------------------------- index


def _keep_patient(case: dict[str, Any]) -> None:
    """Note whose image the current version is, before another is: it may be restored."""
    for version in case["versions"][-1:]:
        version["patient"] = case["patient"]


def _kin(data: dict[str, Any], name: str) -> set[str]:
    """The splits that other cases of a case's patient are in."""
    cases = data["cases"]
    return {c["split"] for n, c in cases.items() if n != name and c["patient"] == cases[name]["patient"] and c.get("split")}


def _views(data: dict[str, Any]) -> dict[str, Any]:
    """The index's cases as MONAI and nnU-Net look for them."""
    current = {name: (case, case["versions"][-1]) for name, case in data["cases"].items()}
    parts: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": []}
    for case, version in current.values():
        images = version["images"]
        item = {"image": images if len(images) > 1 else images[0], "label": version["label"], "patient": case["patient"]}
        parts["training" if case.get("split", "") in ("", "train") else case["split"]].append(item)
    values = sorted(d["value"] for d in data["segments"])
    out: dict[str, Any] = {**parts, "file_ending": ".nii.gz", "numTraining": sum(c.get("split") != "test" for c, _ in current.values())}
    out["channel_names"] = {str(i): c for i, c in enumerate(data["channels"])}
    if values == list(range(1, len(values) + 1)):
        out["labels"] = {"background": 0, **{d["name"]: d["value"] for d in sorted(data["segments"], key=lambda d: d["value"])}}
        out["dataset"] = {n: {"images": v["images"], "label": v["label"]} for n, (c, v) in current.items() if c.get("split") != "test"}
    return out


_VIEWS = ("training", "validation", "test", "file_ending", "numTraining", "channel_names", "labels", "dataset")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False), "utf-8")


def _write_index(folder: Path, data: dict[str, Any], lock: FolderLock | None = None) -> None:
    with atomic_path(folder / INDEX) as temporary:
        _write_json(temporary, {k: v for k, v in data.items() if k not in _VIEWS} | _views(data))
        flush(temporary)
        if json.loads(temporary.read_text("utf-8"))["revision"] != data["revision"]:
            raise OSError("the index was not written whole")
        if lock is not None and not lock.mine():
            raise LockLost


def read_shared(folder: Path, name: str, form: str, what: str, make: str, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A JSON file in a shared folder that others replace as a whole. form: its "format"; what: the folder is, and how to `make`
    one, for the sentences; check(data): whatever of ValueError, KeyError and the like it raises means a damaged file."""
    path = folder / name
    with reached(folder):
        if not folder.is_dir():
            raise UserError(f"The {what} {folder} is not there; connect its drive or network folder, or check the name.")
        for attempt in range(4):
            try:
                text = path.read_text("utf-8")
                break
            except FileNotFoundError as e:
                raise UserError(f"{folder} is no {what} (it has no {name}); choose a {what}'s folder or {make} one.") from e
            except UnicodeDecodeError as e:
                raise UserError(f"{path} is damaged; bring it back from a copy.") from e
            except OSError:  # it is being replaced: Windows and network folders say so
                if attempt == 3:
                    raise
                time.sleep(0.1)
    try:
        data = json.loads(text)
        if data.get("format") != form:
            raise UserError(f"{path} is another program's; choose the folder of a UNetSegmentation {what}, or {make} one.")
        if data["format_version"] > 1:
            raise UserError(f"{path} was written by a newer version of UNetSegmentation; update this one.")
        check(data)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{path} is damaged ({e}); bring it back from a copy.") from e
    return data


def _read_index(folder: Path) -> dict[str, Any]:
    return read_shared(folder, INDEX, FORMAT, "dataset", "add a first case to make", _check_index)


def _check_index(data: dict[str, Any]) -> None:
    """As far as the rest relies on it; a folder may come from anybody."""
    data["name"], data["revision"] + 1, list(data["channels"])
    for label in data["segments"]:
        label["value"] + 1, label["name"].strip()
    for name, case in [*data["cases"].items(), *data.get("removed", {}).items()]:
        if not NAME.fullmatch(name):
            raise ValueError(f"the case {name!r}")
        case["patient"] + case.get("split", "")
        for version in case["versions"]:
            for file in [*version["images"], version["label"], *([version["model"]] if version.get("model") else []), *version["files"]]:
                parts = PurePosixPath(file).parts
                if parts[0] != CASES or len(parts) != 4 or not is_inner(file):
                    raise ValueError(f"the file {file!r}")
            version["version"] + 1, version["voxels"].strip(), min(version["geometry"]["size"]) + 1, version.get("patient", "") + ""
        case["versions"][-1]


# ------------------------------------------------------------------------------------------------------------- helpers


def _trains(path: Path) -> bool:
    """Whether the process of a job.json is there, as training.read() has it: it draws pictures of its cases from maps that it holds."""
    try:
        job = json.loads(path.read_text("utf-8"))
        return job["state"] in RUNNING and is_alive(path.with_name("alive"), job)
    except (OSError, ValueError, KeyError, TypeError):  # no job
        return False


def _forget(trainings: Path, case: str, others: Collection[str]) -> list[Path]:
    """Remove what a dataset's trainings hold of a case's image: its prepared voxels, the compared masks and the pictures,
    with the reports that show these, which can be written again. others: names of cases that stay, should one be called as a lesion
    of this one. Returns what could not be removed."""
    lesion = rf"({re.escape(case)}(?:__lesion_\d+)?)"  # unetseg_training.cases.file_name() of "NAME, lesion 2"
    files = re.compile(
        rf"cache/(?:{re.escape(case)}-[0-9a-f]{{16}}\.safetensors|\.unetseg-.*)"  # or what a killed run was writing, of whatever case
        rf"|[^/]+/check/{lesion}_(?:image|truth|before|after)\.nii\.gz"
        rf"|[^/]+/pictures/(?:example|worst)-{lesion}\.png"
    )
    shown = re.compile(rf'alt="{re.escape(case)}(?:(?:, |__)lesion[ _]\d+)?: '.encode())  # by report.html.jinja
    left = []
    for path in [p for pattern in ("cache/*", "*/check/*", "*/pictures/*", "*/report.html") for p in trainings.glob(pattern)]:
        try:
            found = files.fullmatch(path.relative_to(trainings).as_posix())
            if (found and not {*found.groups()} & {*others}) or (path.suffix == ".html" and shown.search(path.read_bytes())):
                if is_within(path, trainings):
                    path.unlink(missing_ok=True)
                else:
                    left.append(path)
        except OSError:
            left.append(path)
    return left


@contextmanager
def reached(folder: Path) -> Iterator[None]:
    """Failures of the disk or the network become one sentence."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"The folder {folder} cannot be read or written ({e.strerror or e}); check the connection, the disk's space and your rights. "
            "What was there before is unchanged."
        ) from e


def map_values(array: np.ndarray) -> list[int]:
    """The values of a label map but 0, in order; np.unique would sort all its voxels."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > 1 << 16:
        return [int(v) for v in np.unique(array) if v]
    return [int(v) for v in np.flatnonzero(voxel_counts(array, high + 1)) if v]


def storable(array: np.ndarray) -> np.ndarray:
    """The same numbers in a type that NIfTI, and a volume node, takes: a scan is the same by whichever way it comes."""
    if array.dtype.name in ("uint8", "int16", "uint16", "int32", "float32"):
        return array
    if array.dtype.itemsize == 1:
        return array.astype(np.uint8 if array.dtype.kind == "b" else np.int16)
    whole = array.dtype.kind in "iu" and (array.size == 0 or (array.min() >= -(2**31) and array.max() < 2**31))
    return array.astype(np.int32 if whole else np.float32)


def flush(path: Path) -> None:
    """On the disk, not only in its cache: the index must not name what a power cut takes away."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def _sha256(path: Path) -> str:
    out = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            out.update(block)
    return out.hexdigest()


def modality(image: Image) -> str:
    """CT, MR, ... of an image that was read from DICOM files; "" of others."""
    return dicom_tag(image, MODALITY)


def dicom_tag(image: Image, key: str) -> str:
    """A tag of the image's first DICOM file; "" where there is none."""
    file = image.dicom_files[0] if image.dicom_files else image.source
    if not file or not is_dicom(Path(file)):  # other files may carry tags on, but are not what Slicer knows the patient by
        return ""
    try:
        reader = information(file)
    except UserError:
        return ""
    # ITK hands bytes on that are no UTF-8; as what most such files are they are the ID that Slicer's DICOM database has.
    raw = reader.GetMetaData(key).encode("utf-8", "surrogateescape") if reader.HasMetaDataKey(key) else b""
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip()
