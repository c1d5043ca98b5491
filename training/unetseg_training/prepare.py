"""Cases as the network's grid needs them, on disk: made once, found again by the hash of all that went into them.

A file holds what predict() computes up to the normalisation, by the same functions; only the clipping to the window is
left to the sampler, so that augmentation can move the window. Arrays are in the network's frame: (slice axis, ...) first
for 2D, else (z, y, x).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save
from UNetSegmentationLib.files import UserError, atomic_path, counted, write_text
from UNetSegmentationLib.image import Box, Grid, Image, content, reorient_for, sample
from UNetSegmentationLib.inference.predict import spacing_for, without_surround
from UNetSegmentationLib.intensity import LEAST_HU, check_finite, expects_hu, floor_of, normaliser
from UNetSegmentationLib.model import SLICE_AXIS, Card
from UNetSegmentationLib.postprocess import slabs, voxel_counts

from .cases import IGNORE, file_name, files
from .config import Config

if TYPE_CHECKING:
    from .cases import Case, CaseSet

FORMAT = 1  # raise it when a cached file would come out differently, by more than rounding: _PART moved 0.007 % of values, by 0.001
_PART = 1 << 22  # voxels sampled at once: of a whole CT of 512x512x500 it took nine times its size
PLACES = 4096  # voxels of each label that patches may be centred on, kept for each case
OPEN = 64  # cases whose files stay open: macOS allows a process 256 files
_TYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "I32": np.int32}


@dataclass
class Prepared:
    """A cached case; its arrays are mapped from the file when used, in whatever process that is, and stay valid while held.

    values (c, a, b, c) float16, normalised but not clipped; labels (a, b, c) uint8, or IGNORE; spacing: mm along the array's axes;
    low, high (c,): the window's ends in normalised units; counts: voxels of each class (0: background). Of a click model, and
    of a single label, also shares (a, b, c) uint8: of each voxel the part that is labelled, 255 for all of it.
    """

    name: str
    patient: str
    path: Path
    digest: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    low: np.ndarray
    high: np.ndarray
    counts: tuple[int, ...]
    _arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def _array(self, name: str) -> np.ndarray:
        try:
            return (self._arrays or _recent(self.path))[name]
        except (OSError, ValueError) as e:
            raise UserError(f"The pre-processed case {self.path} cannot be read ({e}); start again, which makes it anew.") from e

    @property
    def values(self) -> np.ndarray:
        return self._array("values")

    @property
    def labels(self) -> np.ndarray:
        return self._array("labels")

    @property
    def shares(self) -> np.ndarray:
        return self._array("shares")

    def places(self, label: int) -> np.ndarray:
        """Up to PLACES voxels (n, 3) of a label, the same each time."""
        return self._array(f"places_{label}")


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file as read-only maps, and its metadata; ValueError where it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if 8 + length > size:
            raise ValueError("cut short")
        header = json.loads(f.read(length))
    metadata = header.pop("__metadata__", {})
    if max((entry["data_offsets"][1] for entry in header.values()), default=0) != size - 8 - length:
        raise ValueError("cut short")
    content = np.asarray(np.memmap(path, np.uint8, "r"))[8 + length :]
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        array = content[slice(*entry["data_offsets"])].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = array if array.flags.aligned else array.copy()
    return arrays, metadata


@lru_cache(OPEN)
def _recent(path: Path) -> dict[str, np.ndarray]:
    return _mapped(path)[0]


def _settings(config: Config) -> dict[str, Any]:
    """What of the configuration goes into a cached file."""
    data = config.input
    return {
        "format": FORMAT,
        "dimensions": data.dimensions,
        "axis": data.axis,
        "spacing": data.spacing,
        "intensity": data.intensity,
        "labels": len(config.labels),
        "channels": len(config.channels),
        **({k: v for k in ("pixel_mm", "field_px", "patch") if (v := getattr(data, k))} if data.pixel_mm or data.field_px else {}),
        **({"shares": True} if _has_shares(config) else {}),
        **({"across": True} if data.axis == "acquired" else {}),
        **({"content": config.model.extent} if config.model.extent != "image" else {}),
        **({"surround": 2} if config.model.surround else {}),  # 1: only what is exactly of one value
        **({"floor": LEAST_HU} if expects_hu(data.intensity) else {}),
    }


def _has_shares(config: Config) -> bool:
    return config.model.task == "click" or len(config.labels) == 1


def key(config: Config, digest: str, order: Sequence[str] = ()) -> str:
    text = json.dumps([_settings(config), digest, *order], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def compute(image: Image, mask: np.ndarray, config: Config, name: str) -> dict[str, np.ndarray]:
    """The arrays of a cached file. image: as read; mask (z, y, x): label values 1..n, or IGNORE, on the image's grid."""
    if mask.shape != image.shape:
        raise UserError(
            f"Case {name}: its mask has {mask.shape[::-1]} voxels but its image {image.shape[::-1]}; "
            "export the mask on the image's grid, or leave the case out."
        )
    if image.n_channels != len(config.channels):
        raise UserError(
            f"Case {name} has {image.n_channels} channels but the configuration names {len(config.channels)} "
            f"({', '.join(config.channels)}); add or remove images of the case, or plan again."
        )
    check_finite(image.channels, f"Case {name}")
    n = len(config.labels)
    if (top := int(mask.max(initial=0, where=mask != IGNORE))) > n:
        raise UserError(
            f"Case {name}: its mask holds the value {top} but the configuration names {counted(n, 'label')}; "
            "correct the mask, or plan again with that label."
        )
    if config.model.extent != "image":  # as predict() shows it
        part = content(image.channels, Box.whole(image.shape), nearly=config.model.extent == "box")
        image, mask = image.crop(part), mask[part.slices]
    image = without_surround(image, card := Card(config.card()))
    canonical, orientation = reorient_for(image, config.input.axis == "acquired")
    truth = orientation.canonical(mask)
    first = SLICE_AXIS[config.input.axis] if config.input.dimensions == 2 else 0
    order = [first, *(a for a in range(3) if a != first)]
    channels = canonical.channels.transpose([0, *(a + 1 for a in order)])
    truth = truth.transpose(order)
    spacing, wanted = canonical.spacing[::-1], spacing_for(card, canonical)[::-1]
    frame = Image(channels, tuple(spacing[a] for a in order)[::-1])  # type: ignore[arg-type]
    grid = Grid.over(frame, tuple(wanted[a] for a in order)[::-1])
    parts = [Box((z.start, 0, 0), (z.stop, *grid.shape[1:])) for z in slabs(grid.shape, _PART)]
    norm = normaliser(config.input.intensity, image.channels)
    column = (-1, 1, 1, 1)
    values = np.empty((len(channels), *grid.shape), np.float16)
    for part in parts:
        some = sample(channels, grid, part, floor=floor_of(config.input.intensity))
        values[part.trailing] = np.clip((some - norm.shift.reshape(column)) / norm.scale.reshape(column), -6e4, 6e4)
    if grid.is_identity:
        labels = np.ascontiguousarray(truth, np.uint8)
    else:
        # Each label is interpolated on its own and the largest wins: no stairs, no labels between two others.
        best, labels = np.full(grid.shape, -1.0, np.float32), np.zeros(grid.shape, np.uint8)
        for value in np.unique(truth):
            marked = (truth == value)[None]
            for part in parts:
                at, share = part.slices, sample(marked, grid, part)[0]
                labels[at][share > best[at]] = value
                np.maximum(best[at], share, out=best[at])
    out = {
        "values": values,
        "labels": labels,
        "window": np.stack([(norm.low - norm.shift) / norm.scale, (norm.high - norm.shift) / norm.scale]).astype(np.float32),
        "spacing": np.array([s * k for s, k in zip(frame.spacing[::-1], grid.scale)], np.float32),
        "counts": voxel_counts(labels, IGNORE + 1)[: n + 1].astype(np.int32),
    }
    if _has_shares(config):
        marked, shares = ((truth > 0) & (truth != IGNORE))[None], np.empty(grid.shape, np.uint8)
        for part in parts:
            shares[part.slices] = np.rint(255 * np.clip(sample(marked, grid, part)[0], 0, 1))
        out["shares"] = shares
    rng = np.random.default_rng(0)
    for k in range(1, n + 1):
        spots = np.flatnonzero(labels == k)
        if len(spots) > PLACES:
            spots = spots[np.sort(rng.choice(len(spots), PLACES, replace=False))]
        out[f"places_{k}"] = np.stack(np.unravel_index(spots, labels.shape), 1).astype(np.int32)
    return {name: np.ascontiguousarray(array) for name, array in out.items()}  # safetensors writes other orders wrongly


def _digest(arrays: dict[str, np.ndarray]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        content.update(np.ascontiguousarray(arrays[name]).data if arrays[name].size else b"")
    return content.hexdigest()


def _open(path: Path, wanted: str, case: Case, digest: str, labels: int) -> Prepared | None:
    """A cached case, if the file is there, whole and what it should be."""
    try:
        arrays, metadata = _mapped(path)
        if metadata.get("key") != wanted or metadata.get("content") != _digest(arrays) or f"places_{labels}" not in arrays:
            return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        if getattr(e, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise UserError("Too many files are open; close other programs, or raise the limit (ulimit -n 4096).") from e
        return None
    a, b, c = arrays["labels"].shape
    window = np.array(arrays["window"])
    spacing = tuple(float(s) for s in arrays["spacing"])
    counts = tuple(int(n) for n in arrays["counts"])
    return Prepared(case.name, case.patient, path, digest, (a, b, c), spacing, window[0], window[1], counts)  # type: ignore[arg-type]


def prepare(
    case_set: CaseSet,
    config: Config,
    folder: Path,
    cases: Sequence[Case] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Prepared]:
    """Every case (or those given) from the cache in `folder`, computed where it is missing, damaged, or anything that
    goes into it has changed. Several processes may do this at once; one that is killed leaves no half file."""
    todo = list(case_set.cases if cases is None else cases)
    if not todo:
        raise UserError(f"{config.data.path} holds no annotated cases; add images with their masks, or check the folder's name.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"The cache folder {folder} cannot be made ({e.strerror}); set data.cache to a folder with space.") from e
    _sweep(folder)
    _recent.cache_clear()  # a damaged file may be replaced, which Windows refuses while it is open
    hashes = _Hashes(folder / "hashes.json")
    out: list[Prepared] = []
    made = 0
    for i, case in enumerate(todo):
        digest = hashes.of(case_set, case)
        wanted = key(config, digest, case_set.order(case))
        path = folder / f"{file_name(case.name)}-{wanted[:16]}.safetensors"
        found = _open(path, wanted, case, digest, len(config.labels))
        if found is None:
            if progress:
                progress(i, len(todo), case.name)
            image, mask = case_set.load(case)
            arrays = compute(image, mask, config, case.name)
            _check_space(folder, arrays, len(todo) - i)
            content = save(arrays, {"key": wanted, "content": _digest(arrays), "case": case.name})
            try:
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
            except UserError:  # another process may have made the same and hold it open, which Windows does not let us replace
                if _open(path, wanted, case, digest, len(config.labels)) is None:
                    raise
            found = _open(path, wanted, case, digest, len(config.labels))
            made += 1
            if found is None:
                raise UserError(f"{path} could not be read back after it was written; the disk may be failing, choose another data.cache.")
        out.append(found)
        if made % 20 == 0:
            hashes.save()
    hashes.save()
    if progress:
        progress(len(todo), len(todo), f"{made} pre-processed, {len(todo) - made} from the cache")
    return out


def _check_space(folder: Path, arrays: dict[str, np.ndarray], left: int) -> None:
    """Before the disk is full: whether the cases that are left, each as large as this one, would fit."""
    need = sum(a.nbytes for a in arrays.values())
    free = shutil.disk_usage(folder).free
    if free < 1.1 * need:
        raise UserError(
            f"The disk of {folder} has {free / 1e9:.1f} GB left, and the {left} cases still to be pre-processed need about "
            f"{need * left / 1e9:.1f} GB; free some, or set data.cache to another disk. What is done is kept."
        )


def _sweep(folder: Path) -> None:
    """Remove what killed runs left of files they were writing; an hour old, lest another process still writes."""
    for path in folder.glob(".unetseg-*"):
        try:
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
        except OSError:
            pass  # another process was faster


class _Hashes:
    """CaseSet.digest() of each case, remembered as long as its files keep their size and time of change."""

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, False
        try:
            self.known: dict[str, list[Any]] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            self.known = {}

    def of(self, case_set: CaseSet, case: Case) -> str:
        stamp = self._stamp(case_set, case)
        if stamp is not None and (entry := self.known.get(case.name)) and entry[0] == stamp:
            return str(entry[1])
        digest = case_set.digest(case)
        # The file may have been changed in the instant in which it was read; its time then says so, from a second on.
        if stamp is not None and stamp == self._stamp(case_set, case) and time.time() - max(s[2] for s in stamp) / 1e9 > 2:
            self.known[case.name], self.changed = [stamp, digest], True
        return digest

    @staticmethod
    def _stamp(case_set: CaseSet, case: Case) -> list[list[Any]] | None:
        """[name, bytes, ns] of each file, after how they are read; None where a folder (DICOM) hides the files."""
        how = case_set.how(case)
        out: list[list[Any]] = [[how, 0, 0]]
        for path in (*case.images, *([case.label] if case.label else [])):
            if path.is_dir():
                return None
            try:
                out += [[str(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns] for file in files(path)]
            except OSError:
                return None
        return out

    def save(self) -> None:
        if self.changed:
            write_text(self.path, json.dumps(self.known))
            self.changed = False
