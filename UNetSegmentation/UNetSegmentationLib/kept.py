"""The model's own masks, kept on this computer until a person has corrected them: what changed is part of a training case.

One small file an answer, without a name of anybody: FOLDER/KEY.mask, a line of JSON (grid, box, labels) and the zlib-packed
values of the box. A segment's tag says the key, so that the mask is found again after its scene was saved and opened; where
the file is gone, or on another computer, the case is added without it. The oldest files go when there are too many.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from .files import atomic_path, user_path
from .image import Box, Image, crop_mask
from .model import Label, user_data_folder

FILES, BYTES = 2000, 1 << 30  # that are kept at most
_EVERY = 50  # so many new files between two looks for too many, which take 0.1 s
SUFFIX = ".mask"
_KEY = re.compile(r"[0-9a-f]{32}")
_MAX_HEAD, _MAX_VOXELS = 1 << 20, 1 << 32
_new = 0


def folder() -> Path:
    """$UNETSEG_MASKS overrides the user's data folder."""
    return user_path(os.environ.get("UNETSEG_MASKS") or user_data_folder() / "masks").absolute()


def mask_digest(mask: np.ndarray, start: Sequence[int]) -> str:
    """The same for the same voxels, whatever box of zeros is around them. start: of the mask's first voxel, (z, y, x)."""
    part, first = crop_mask(mask, start)
    return hashlib.sha256(repr((first if part.size else (0, 0, 0), part.shape)).encode() + np.packbits(part).tobytes()).hexdigest()[:32]


def keep(labels: np.ndarray, start: Sequence[int], image: Image, names: Sequence[Label], key: str = "") -> str:
    """Keep label values (z, y, x) whose first voxel is `start` of the image's grid; returns the key ("" for an empty mask).

    key: default: made of the values. UserError where the folder cannot be written.
    """
    inside = Box.around(labels)
    if inside is None:
        return ""
    part = np.ascontiguousarray(labels[inside.slices], np.uint8 if labels.max() < 256 else np.uint16)
    box = inside.shifted(start)
    head = {
        "shape": list(image.shape),
        **image.geometry,
        "box": [[int(v) for v in box.start], [int(v) for v in box.stop]],
        "dtype": part.dtype.name,
        "labels": [label.to_json() for label in names],
    }
    key = key or hashlib.sha256(json.dumps(head).encode() + part.tobytes()).hexdigest()[:32]
    place = folder() / (key + SUFFIX)
    with atomic_path(place) as temporary:
        temporary.write_bytes(json.dumps(head).encode("ascii") + b"\n" + zlib.compress(part.tobytes(), 1))
    global _new
    if _new % _EVERY == 0:
        _tidy(place)
    _new += 1
    return key


def find(key: str, image: Image) -> tuple[np.ndarray, Box, tuple[Label, ...]] | None:
    """(values of a box, the box in the image's grid, what they mean), None where it is not here or of another grid."""
    if not _KEY.fullmatch(key):
        return None
    try:
        with open(folder() / (key + SUFFIX), "rb") as file:
            head = json.loads(file.readline(_MAX_HEAD))
            box = Box(tuple(map(int, head["box"][0])), tuple(map(int, head["box"][1])))
            dtype = np.dtype({"uint8": np.uint8, "uint16": np.uint16}[head["dtype"]])
            size = math.prod(box.shape) * dtype.itemsize
            if len(box.start) != 3 or box.empty or size > _MAX_VOXELS or box & Box.whole(image.shape) != box:
                return None
            unpacker = zlib.decompressobj()
            packed = unpacker.decompress(file.read(), size + 1)  # a few bytes can stand for gigabytes
        spacing, origin, direction = (tuple(map(float, head[k])) for k in ("spacing", "origin", "direction"))
        grid = Image(np.broadcast_to(np.uint8(0), tuple(head["shape"])), spacing, origin, direction)  # type: ignore[arg-type]
        if len(packed) != size or not unpacker.eof or not image.same_grid(grid):
            return None
        labels = tuple(map(Label.from_json, head["labels"]))
        return np.frombuffer(packed, dtype).reshape(box.shape), box, labels
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, zlib.error):
        return None


def _tidy(newest: Path) -> None:
    """The oldest go; `newest` stays."""
    try:
        found = [(e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(newest.parent) if e.name.endswith(SUFFIX)]
    except OSError:
        return
    left, size = len(found), sum(f[1] for f in found)
    for _, n, path in sorted(found):
        if (left <= FILES and size <= BYTES) or Path(path) == newest:
            break
        with suppress(OSError):
            os.unlink(path)
        left, size = left - 1, size - n
