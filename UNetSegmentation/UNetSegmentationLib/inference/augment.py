"""Test-time augmentation: the network sees flipped and rotated copies of a tile, and their probabilities are averaged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..image import UserError

TTA = ("none", "flips", "rotations", "full")
ROTATION_DEGREES = 10.0


@dataclass(frozen=True)
class View:
    """One copy of a tile: flipped along the spatial `axes` (negative array axes), then rotated by `degrees` in the
    plane of the last two axes, whose spacings have the ratio `aspect` (rows to columns)."""

    axes: tuple[int, ...] = ()
    degrees: float = 0.0
    aspect: float = 1.0

    def forward(self, batch: np.ndarray) -> np.ndarray:
        out = np.flip(batch, self.axes) if self.axes else batch
        return _rotate(out, self.degrees, self.aspect)[0] if self.degrees else out

    def backward(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The copy's output in the tile's own place, and the weight (rows, columns) of what the rotation kept in view."""
        weight = None
        if self.degrees:
            batch, weight = _rotate(batch, -self.degrees, self.aspect)
        if not self.axes:
            return batch, weight
        if weight is not None:
            weight = np.flip(weight, tuple(a for a in self.axes if a >= -2))
        return np.flip(batch, self.axes), weight


def views(tta: str, flip_axes: Sequence[int], aspect: float) -> list[View]:
    """The copies of a TTA setting; the first is the tile itself. flip_axes: negative array axes of the batch."""
    if tta not in TTA:
        raise UserError(f"There is no test-time augmentation {tta!r}; choose one of {', '.join(TTA)}.")
    flips: list[tuple[int, ...]] = [()]
    if tta in ("flips", "full"):
        flips = [c for n in range(len(flip_axes) + 1) for c in itertools.combinations(flip_axes, n)]
    turns = (0.0, ROTATION_DEGREES, -ROTATION_DEGREES) if tta in ("rotations", "full") else (0.0,)
    return [View(f, t, aspect) for t in turns for f in flips]


@lru_cache(maxsize=16)
def _turn(rows: int, columns: int, degrees: float, aspect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bilinear gather of a rotation about the centre: indices [4, n], weights [4, n], and whether each lies inside."""
    angle = math.radians(degrees)
    y, x = np.meshgrid(np.arange(rows) - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2, indexing="ij")
    u = math.cos(angle) * x - math.sin(angle) * aspect * y + (columns - 1) / 2
    v = math.sin(angle) / aspect * x + math.cos(angle) * y + (rows - 1) / 2
    inside = (u >= 0) & (u <= columns - 1) & (v >= 0) & (v <= rows - 1)
    u, v = np.clip(u, 0, columns - 1), np.clip(v, 0, rows - 1)
    u0, v0 = np.minimum(u.astype(int), max(columns - 2, 0)), np.minimum(v.astype(int), max(rows - 2, 0))
    u1, v1 = np.minimum(u0 + 1, columns - 1), np.minimum(v0 + 1, rows - 1)
    a, b = u - u0, v - v0
    index = np.stack([v0 * columns + u0, v0 * columns + u1, v1 * columns + u0, v1 * columns + u1]).reshape(4, -1)
    weight = np.stack([(1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b]).reshape(4, -1).astype(np.float32)
    return index, weight, inside.astype(np.float32)


def _rotate(batch: np.ndarray, degrees: float, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = batch.shape[-2:]
    index, weight, inside = _turn(rows, columns, degrees, aspect)
    flat = batch.reshape(*batch.shape[:-2], -1)
    out = sum(flat[..., index[k]] * weight[k] for k in range(4))
    return np.asarray(out, np.float32).reshape(batch.shape), inside
