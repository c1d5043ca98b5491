"""A second opinion: what an automatic model, slice by slice, makes of the place that a click model looks at."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..engines import Engine
from ..image import Box, Grid, Image, sample
from ..model import Card, ModelPackage
from .predict import Options, predict

# mm along and across the slices (z, y, x) around what was found, as far as the answers may differ.
_MARGIN = (5.0, 10.0, 10.0)
# A patch's middle lies on a multiple of so many voxels and so many slices are run at once: a mask that changes a little finds what is
# known already, and what is known never depends on the clicks before.
_STEP, _SLICES = 16, 4
# A patch's size is a multiple of so many pixels, and it shows at least so many beyond the margin.
_PATCH, _BESIDE = 32, 8
# Of slices thinner than half of this some are left out, and twice as many of what is so long: they take time, and of thin ones the few
# that the model sees on each side show too little. Every second slice of all of 12 held-out cubes of 1 mm, most of them shorter, would
# give a first click's Dice of 0.667, all of them 0.710.
_SLICE_MM, _LONG_MM = 1.25, 15.0
_PIXEL_MM, _THICK_MM = 1.25, 3.0
_KEPT = 64 << 20  # bytes: 256 parts were 38 MB, and 515 MB of pixels of 0.15 mm


class SecondOpinion:
    """package: an automatic model of axial slices and one label; engine: its own; image: canonical, (z, y, x)."""

    def __init__(self, package: ModelPackage, engine: Engine, image: Image) -> None:
        self._package, self.engine, self._image = package, engine, image
        self._every = max(1, int(_SLICE_MM / image.spacing[2] + 1e-6))
        self._pixel = [wanted or own for wanted, own in zip(package.card.spacing[1::-1], image.spacing[1::-1])]
        self._known: dict[tuple[int, Box], np.ndarray] = {}

    @staticmethod
    def fits(image: Image) -> bool:
        """Whether the (canonical) image has slices such as these models see. Of thicker ones there are made and one real: LIDC cubes
        averaged to 5 mm gain 0.013, the sample lung1 loses 0.04."""
        x, y, z = image.spacing
        return max(x, y) <= _PIXEL_MM and z <= _THICK_MM and len(image.channels[0]) * z > _SLICE_MM

    def warm(self) -> None:
        """Run once, so that nothing is left to load."""
        middle = [n // 2 for n in self._image.shape]
        self._part(self._every, 0, self._place(Box(tuple(middle), tuple(n + 1 for n in middle))))

    def margins(self, box: Box, grid: Grid) -> np.ndarray:
        """Log-odds of the label on a patch `grid` over the image; NaN further than some mm from `box` (z, y, x), in which a lesion
        was found."""
        mm = self._image.spacing[::-1]
        twice = box.shape[0] * mm[0] >= _LONG_MM and self._every * mm[0] <= _SLICE_MM
        k = self._every * (1 + twice)
        near = box.grown([math.ceil(margin / s) for margin, s in zip(_MARGIN, mm)]) & Box.whole(self._image.shape)
        place, first = self._place(near), near.start[0] // k // _SLICES * _SLICES
        known = np.concatenate([self._part(k, z, place) for z in range(first, -(-near.stop[0] // k), _SLICES)])
        scale = (grid.scale[0] / k, *grid.scale[1:])
        within = (grid.offset[0] / k - first, *(o - a for o, a in zip(grid.offset[1:], place.start[1:])))
        out = sample(known[None], Grid(grid.shape, scale, within), Box.whole(grid.shape))[0]
        for axis, (a, b) in enumerate(zip(near.start, near.stop)):
            at = grid.scale[axis] * np.arange(grid.shape[axis]) + grid.offset[axis]
            np.moveaxis(out, axis, 0)[(at < a - 0.5) | (at > b - 0.5)] = np.nan
        return out

    def _place(self, near: Box) -> Box:
        """The patch in all slices that shows `near`."""
        mm = self._image.spacing[1::-1]
        need = max((n + _STEP) * s / p for n, s, p in zip(near.shape[1:], mm, self._pixel)) + 2 * _BESIDE
        patch = self._patch(need)
        middle = [((a + b) // 2 + _STEP // 2) // _STEP * _STEP for a, b in zip(near.start[1:], near.stop[1:])]
        half = [int(patch * p / s) // 2 for s, p in zip(mm, self._pixel)]
        ends = [(c - h, c + h) for c, h in zip(middle, half)]
        whole = Box.whole(self._image.shape)
        return Box((0, *(a for a, _ in ends)), (whole.stop[0], *(b for _, b in ends))) & whole

    def _patch(self, pixels: float) -> int:
        """The size of a patch for so many pixels; never less than the model was trained with, which costs it more than time."""
        return max(*self._package.card.patch[1:], math.ceil(pixels / _PATCH) * _PATCH)

    def _part(self, k: int, z: int, place: Box) -> np.ndarray:
        """Log-odds in four of every k-th slice, from the z-th on, of a patch."""
        key = k, replace(place, start=(z, *place.start[1:]))
        if key not in self._known:
            if sum(part.nbytes for part in self._known.values()) >= _KEPT:
                self._known.clear()
            x, y, mm = self._image.spacing
            image = Image(self._image.array[..., ::k, :, :], (x, y, mm * k))
            stop = min(z + _SLICES, image.shape[0])
            self._known[key] = self._run(image, Box((z, *place.start[1:]), (stop, *place.stop[1:])))
        return self._known[key]

    def _run(self, image: Image, target: Box) -> np.ndarray:
        card = self._package.card
        part = target.grown((card.context, 0, 0)) & Box.whole(image.shape)
        if not np.isfinite(image.array[part.trailing]).all():  # outside of what was scanned
            return np.full(target.shape, np.nan, np.float32)
        size = max(n * s / p for n, s, p in zip(part.shape[1:], image.spacing[1::-1], self._pixel))
        # One patch, whose rim is not the image's: nothing of what predict() does for boxes and files about one target.
        package = replace(self._package, card=Card({**card.data, "patch": [self._patch(size)] * 2, "roi_mm": None}))
        options = Options(roi=target.relative_to(part), tta="none", batch=_SLICES, probabilities=True, postprocess=False)
        found = predict(image.crop(part), [package], options, engines=[self.engine]).probabilities
        assert found is not None
        p = np.clip(found.channels[1][options.roi.slices], 1e-5, 1 - 1e-5)  # type: ignore[union-attr]
        return np.log(p / (1 - p))
