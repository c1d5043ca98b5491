"""Where the patches lie, and how they are blended.

A "frame" is the array with a 2D model's slice axis first, so that a slice is a patch of depth 1; a lattice is the
frame on the model's spacing (image.Grid).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..image import Box


@dataclass(frozen=True)
class Tiling:
    """Equal tiles on a lattice. shape: of one tile; starts: of the tiles along each axis. A tile may reach beyond the
    lattice, where it is padded."""

    shape: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]


def tile(box: Box, patch: Sequence[int], divisor: Sequence[int], overlap: float) -> Tiling:
    """Cover `box` with patches that overlap by at least `overlap` (0 to below 1) of their size.

    All starts are multiples of `divisor`, if box.start is: a U-Net's poolings then see the same grid in a ROI as in the
    whole image. Along an axis where the box is smaller than the patch there is one tile, as small as the divisor allows.
    """
    shape, starts = [], []
    for a, b, p, d in zip(box.start, box.stop, patch, divisor):
        n = b - a
        size = min(p, math.ceil(n / d) * d)
        step = max(d, int(size * (1 - overlap)) // d * d)
        last = math.ceil((n - size) / d) * d
        shape.append(size)
        starts.append(tuple(a + min(i * step, last) for i in range(math.ceil(last / step) + 1)))
    return Tiling(tuple(shape), tuple(starts))


def compute_box(need: Box, lattice_shape: Sequence[int], patch: Sequence[int], divisor: Sequence[int]) -> Box:
    """`need` and a margin of a quarter patch, so that a ROI's rim sees its surroundings, aligned to the divisor."""
    margin = [p // 4 if p > 1 else 0 for p in patch]
    wide = need.grown(margin) & Box.whole(lattice_shape)
    return Box(tuple(a // d * d for a, d in zip(wide.start, divisor)), wide.stop)


@lru_cache(maxsize=8)
def blend_weights(shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian weights of a tile, sigma an eighth of its size (Isensee et al. 2021), never below 1e-3 of the peak so
    that a voxel seen by one tile only keeps its value to float32 precision."""
    out = np.ones(shape, np.float32)
    for axis, n in enumerate(shape):
        if n > 1:
            g = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2).astype(np.float32)
            out *= g.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return np.maximum(out, 1e-3)
