"""Where the patches lie, and how they are blended.

A "frame" is the array with a 2D model's slice axis first, so that a slice is a patch of depth 1; a lattice is the
frame on the model's spacing (image.Grid).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..image import Box


@dataclass(frozen=True)
class Tiling:
    """Equal tiles on a lattice. shape: of one tile; starts: of the tiles along each axis. A tile may reach beyond the
    lattice, where it is padded."""

    shape: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    @cached_property
    def rim(self) -> tuple[int, ...]:
        """Along each axis an eighth of a tile, or half of the overlap if that is less. Once: of each of 10800 slices it took as long as
        all else that is done to it but the network."""
        steps = (max((b - a for a, b in zip(s, s[1:])), default=n) for n, s in zip(self.shape, self.starts))
        return tuple(min(n // 8, max(0, n - step) // 2) for n, step in zip(self.shape, steps))


def tile(box: Box, patch: Sequence[int], divisor: Sequence[int], overlap: float) -> Tiling:
    """Cover `box` with patches that overlap by at least `overlap` (0 to below 1) of their size.

    All starts are multiples of `divisor`, if box.start is: a U-Net's poolings then see the same grid in a ROI as in the
    whole image. Along an axis where the box is smaller than the patch there is one tile about it: a network is shown
    the patch that it was trained on, never less.
    """
    starts: list[tuple[int, ...]] = []
    for a, b, p, d in zip(box.start, box.stop, patch, divisor):
        n = b - a
        step = max(d, int(p * (1 - overlap)) // d * d)
        if n <= p:
            starts.append((a - (p - n) // 2 // d * d,))
        else:
            last = math.ceil((n - p) / d) * d
            starts.append(tuple(a + min(i * step, last) for i in range(math.ceil(last / step) + 1)))
    return Tiling(tuple(patch), tuple(starts))


def compute_box(need: Box, lattice_shape: Sequence[int], patch: Sequence[int], divisor: Sequence[int], centred: bool = False) -> Box:
    """`need` and a margin of a quarter patch, so that a ROI's rim sees its surroundings, aligned to the divisor. centred: without that
    margin along an axis where `need` fits into a patch, so that a box about one target has that in the middle of one: three nodules in
    50 mm boxes of a whole CT lay at the corners of four patches, none of which found any. (Larger boxes keep it: at their rims and seams
    nodules were lost.)"""
    margin = [0 if centred and b - a <= p else p // 4 for p, a, b in zip(patch, need.start, need.stop)]
    wide = need.grown(margin) & Box.whole(lattice_shape)
    return Box(tuple(a // d * d for a, d in zip(wide.start, divisor)), wide.stop)


@lru_cache(maxsize=64)
def blend_weights(shape: tuple[int, ...], rims: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Weights of a tile: Gaussian, sigma an eighth of its size (Isensee et al. 2021), and 0 in the rims (voxels at the
    low and high end of each axis), where a neighbouring tile covers the place and this one saw padding instead of it."""
    out = np.ones(shape, np.float32)
    for axis, (n, (low, high)) in enumerate(zip(shape, rims)):
        g = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / max(n / 8, 0.5)) ** 2).astype(np.float32)
        g[:low] = 0
        g[n - high :] = 0
        out *= g.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return out


def rims(tiling: Tiling, corner: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The rims of the tile at `corner`: tiling.rim on each side that has a neighbour."""
    return tuple((w if at > s[0] else 0, w if at < s[-1] else 0) for w, s, at in zip(tiling.rim, tiling.starts, corner))


def mirrored(start: int, stop: int, n: int, depth: int = 0) -> np.ndarray:
    """Which of n pixels stand at start to stop - 1: beyond an edge those next to it, back and forth over `depth` (0: over all)."""
    at = np.arange(start, stop)
    depth = max(1, min(depth or n, n - 1))
    away = np.maximum(-at, at - n + 1)
    back = np.minimum(depth - np.abs(away % (2 * depth) - depth), n - 1)
    return np.where(at < 0, back, np.where(at >= n, n - 1 - back, at))
