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
# Of slices thinner than half of this some are left out: they take time, and the few that the model sees on each side show too little.
# Not of thicker ones: with every second slice of 12 held-out cubes of 1 mm a first click's Dice was 0.667, with all 0.710.
_SLICE_MM = 1.25
_PIXEL_MM, _THICK_MM = 1.25, 3.0
_KEPT = 256  # parts of about 150 KB


class SecondOpinion:
    """package: an automatic model of axial slices and one label; engine: its own; image: canonical, (z, y, x)."""

    def __init__(self, package: ModelPackage, engine: Engine, image: Image) -> None:
        self._package, self.engine = package, engine
        x, y, z = image.spacing
        self._every = max(1, int(_SLICE_MM / z + 1e-6))
        self._image = Image(image.array[..., :: self._every, :, :], (x, y, z * self._every))
        self._pixel = [wanted or own for wanted, own in zip(package.card.spacing[1::-1], (y, x))]
        self._known: dict[Box, np.ndarray] = {}

    @staticmethod
    def fits(image: Image) -> bool:
        """Whether the (canonical) image has slices such as these models see. Of thicker ones there are made and one real: LIDC cubes
        averaged to 5 mm gain 0.013, the sample lung1 loses 0.04."""
        x, y, z = image.spacing
        return max(x, y) <= _PIXEL_MM and z <= _THICK_MM and len(image.channels[0]) * z > _SLICE_MM

    def warm(self) -> None:
        """Run once, so that nothing is left to load."""
        middle = [n // 2 for n in self._image.shape]
        self._part(0, self._place(Box(tuple(middle), tuple(n + 1 for n in middle))))

    def margins(self, box: Box, grid: Grid) -> np.ndarray:
        """Log-odds of the label on a patch `grid` over the image; NaN further than some mm from `box` (z, y, x), in which a lesion
        was found."""
        k = self._every
        own = Box((box.start[0] // k, *box.start[1:]), (-(-box.stop[0] // k), *box.stop[1:]))
        near = own.grown([math.ceil(mm / s) for mm, s in zip(_MARGIN, self._image.spacing[::-1])]) & Box.whole(self._image.shape)
        place, first = self._place(near), near.start[0] // _SLICES * _SLICES
        known = np.concatenate([self._part(z, place) for z in range(first, near.stop[0], _SLICES)])
        scale = (grid.scale[0] / k, *grid.scale[1:])
        offset = (grid.offset[0] / k, *grid.offset[1:])
        within = tuple(o - a for o, a in zip(offset, (first, *place.start[1:])))
        out = sample(known[None], Grid(grid.shape, scale, within), Box.whole(grid.shape))[0]
        for axis, (a, b) in enumerate(zip(near.start, near.stop)):
            at = scale[axis] * np.arange(grid.shape[axis]) + offset[axis]
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

    def _part(self, z: int, place: Box) -> np.ndarray:
        """Log-odds in slices z, z + 1, ... of a patch."""
        target = replace(place, start=(z, *place.start[1:]), stop=(min(z + _SLICES, place.stop[0]), *place.stop[1:]))
        if target not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[target] = self._run(target)
        return self._known[target]

    def _run(self, target: Box) -> np.ndarray:
        card = self._package.card
        part = target.grown((card.context, 0, 0)) & Box.whole(self._image.shape)
        if not np.isfinite(self._image.array[part.trailing]).all():  # outside of what was scanned
            return np.full(target.shape, np.nan, np.float32)
        size = max(n * s / p for n, s, p in zip(part.shape[1:], self._image.spacing[1::-1], self._pixel))
        package = replace(self._package, card=Card({**card.data, "patch": [self._patch(size)] * 2}))
        options = Options(roi=target.relative_to(part), tta="none", batch=_SLICES, probabilities=True, postprocess=False)
        found = predict(self._image.crop(part), [package], options, engines=[self.engine]).probabilities
        assert found is not None
        p = np.clip(found.channels[1][options.roi.slices], 1e-5, 1 - 1e-5)  # type: ignore[union-attr]
        return np.log(p / (1 - p))
