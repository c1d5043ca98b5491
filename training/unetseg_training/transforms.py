"""Augmentation of patches with MONAI, image and mask alike, in 2D and 3D.

Rotation, scaling and elastic deformation are one resampling (MONAI's Resample), so that a patch is interpolated once.
MONAI's Rand3DElastic smooths noise with a Gaussian of sigma 10 at every voxel: 750 ms for 48 x 64 x 48 on one core. Here
the noise lies on a lattice of sigma / 2, is smoothed there and interpolated: a few milliseconds for the same field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.data import set_track_meta
from monai.networks.layers import GaussianFilter
from monai.transforms import (
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    Resample,
    create_grid,
    create_rotate,
    create_scale,
)
from torch import Tensor
from torch.nn import functional
from UNetSegmentationLib.files import atomic_path
from UNetSegmentationLib.model import SLICE_AXIS

from .config import Augmentation, Config

if TYPE_CHECKING:
    from .prepare import Prepared

IMAGE, LABEL = "image", "label"
_KEYS = (IMAGE, LABEL)


def elastic_deviation(alpha: float, sigma: float) -> float:
    """The standard deviation, in voxels, of the displacement that "alpha, sigma" gives in 2D: uniform noise of [-1, 1]
    at each pixel, smoothed by a Gaussian, times alpha (Simard et al. 2003): 0.55 for 34 and 10. Smoothing in 3D would
    leave a sixth of that, so the number of 2D holds for both here."""
    return alpha / math.sqrt(3) / (2 * sigma * math.sqrt(math.pi))


class Warp(MapTransform, Randomizable):
    """Rotate, scale and bend about the patch's centre, and cut it to `size`; linear for the image, nearest for the mask,
    unless the mask is of shares (0..1).

    In mm: `spacing` (of the array's spatial axes) keeps thick slices from being sheared. What is not in the input is 0;
    give it `margin()` voxels more on each side.
    """

    def __init__(self, settings: Augmentation, size: Sequence[int], spacing: Sequence[float], shares: bool = False) -> None:
        MapTransform.__init__(self, _KEYS)
        self.settings, self.size = settings, tuple(size)
        finest = min(spacing)
        self.ratio = [s / finest for s in spacing]
        self.resample = {IMAGE: Resample("bilinear", "zeros"), LABEL: Resample("bilinear" if shares else "nearest", "zeros")}
        self.grid = torch.as_tensor(create_grid(self.size, dtype=np.float32, backend="torch"))

    def margin(self) -> tuple[int, ...]:
        """Voxels beyond the patch on each side that the strongest warp can reach."""
        s, dims = self.settings, len(self.size)
        half = [n * r / 2 for n, r in zip(self.size, self.ratio)]
        turn = math.radians(min(90.0, s.rotation)) if s.warp_probability else 0.0
        grow = 1 / s.scaling[0] if s.warp_probability else 1.0
        bend = 3 * elastic_deviation(s.elastic_alpha, s.elastic_sigma) if s.elastic_probability else 0.0
        out = []
        for axis in range(dims):
            others = [h for a, h in enumerate(half) if a != axis]
            reach = (half[axis] + math.sin(turn) * (math.hypot(*others) if dims == 3 else others[0])) * max(1.0, grow) + bend
            out.append(max(0, math.ceil(reach / self.ratio[axis] - self.size[axis] / 2)) + 1)
        return tuple(out)

    def randomize(self, data: Any = None) -> None:
        s, dims = self.settings, len(self.size)
        self.turns: list[float] | None = None
        self.noise: Tensor | None = None
        if self.R.random() < s.warp_probability:
            angles = self.R.uniform(-s.rotation, s.rotation, 1 if dims == 2 else 3)
            self.turns = [math.radians(a) for a in angles]
            self.scale = math.exp(self.R.uniform(math.log(s.scaling[0]), math.log(s.scaling[1])))
        if self.R.random() < s.elastic_probability and s.elastic_alpha:
            # A lattice of half a sigma, and two sigma more on each side for the smoothing.
            self.step = [max(1.0, s.elastic_sigma / 2 / r) for r in self.ratio]
            shape = [math.ceil(n / d) + 1 + 8 for n, d in zip(self.size, self.step)]
            self.noise = torch.from_numpy(self.R.uniform(-1, 1, (dims, *shape)).astype(np.float32))

    def _field(self, noise: Tensor) -> Tensor:
        """Displacements (axis, ...) in voxels at each voxel of the patch."""
        s, dims = self.settings, len(self.size)
        sigmas = [s.elastic_sigma / r / d for r, d in zip(self.ratio, self.step)]
        smooth = GaussianFilter(dims, sigmas, truncated=3.0)(noise[None])[0]
        loss = math.prod(math.sqrt(2 * sigma * math.sqrt(math.pi)) for sigma in sigmas)
        strength = elastic_deviation(s.elastic_alpha, s.elastic_sigma) * math.sqrt(3) * loss
        # The lattice points about the patch: voxel i lies at lattice index i / step + 4.
        parts = [torch.arange(n) / d + 4 for n, d in zip(self.size, self.step)]
        where = [2 * p / (n - 1) - 1 for p, n in zip(parts, smooth.shape[1:])]
        at = torch.stack(torch.meshgrid(*where, indexing="ij")[::-1], -1)[None]
        field = functional.grid_sample(smooth[None], at, align_corners=True)[0] * strength
        return field / torch.tensor(self.ratio).reshape(-1, *(1,) * dims)

    def __call__(self, data: Any) -> dict[str, Tensor]:
        self.randomize()
        out = dict(data)
        if self.turns is None and self.noise is None:
            for name in self.keys:
                out[name] = _centre(out[name], self.size)
            return out
        grid = self.grid.clone()  # (axes and 1, ...), voxels from the centre
        if self.noise is not None:
            grid[:-1] += self._field(self.noise)
        if self.turns is not None:
            dims = len(self.size)
            stretch = np.diag([*self.ratio, 1.0])
            matrix = np.asarray(create_rotate(dims, self.turns)) @ np.asarray(create_scale(dims, [1 / self.scale] * dims))
            matrix = np.linalg.inv(stretch) @ matrix @ stretch
            grid = torch.tensordot(torch.as_tensor(matrix, dtype=torch.float32), grid, 1)
        for name in self.keys:
            out[name] = torch.as_tensor(self.resample[name](out[name].float(), grid)).to(out[name].dtype)
        return out


def _centre(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of the spatial axes. Of an odd rest the first voxel stays, as Resample's centre is between."""
    at = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(x.shape[1:], size))
    return x[(slice(None), *at)]


class Window(MapTransform, Randomizable):
    """Clip to the normalisation's window, which is moved and widened at random (CT: another scanner, another kernel)."""

    def __init__(self, jitter: float, probability: float) -> None:
        MapTransform.__init__(self, (IMAGE,))
        self.jitter, self.probability = jitter, probability

    def __call__(self, data: Any) -> dict[str, Any]:
        x, low, high = data[IMAGE], data["low"], data["high"]
        if self.R.random() < self.probability:
            shift, widen = self.R.uniform(-self.jitter, self.jitter, 2)
            width = high - low
            middle = (high + low) / 2
            known = torch.isfinite(width)
            moved = (x - middle - shift * width) / (1 + widen) + middle
            x = torch.where(known & (x != 0), moved, x)  # 0 is what lies beyond the image
        return {**data, IMAGE: torch.minimum(torch.maximum(x, low), high)}


def make(config: Config, spacing: Sequence[float], random: bool = True, shares: bool = False) -> tuple[Compose, tuple[int, ...]]:
    """The transforms of a configuration for patches of one spacing (mm along the patch's axes), and how many voxels more
    on each side they need. They take and give {"image": (c, ...) float32, "label": (1, ...) float32 classes (or shares of one
    class), "low", "high": (c, 1, ...) the window's ends}. set_random_state(seed) fixes what is drawn next."""
    set_track_meta(False)  # plain tensors: MONAI's metadata cost more than most of these transforms
    settings, patch = config.augmentation, config.input.patch
    if not (random and settings.enabled):
        return Compose([Window(0, 0)]), (0,) * len(patch)
    warp = Warp(settings, patch, spacing, shares)
    steps: list[Callable[[Any], Any]] = [warp]
    steps += [RandFlipd(_KEYS, 0.5, axis) for axis in flip_axes(config)]
    ct = config.input.intensity["mode"] in ("window", "ct-foreground")
    s = settings
    linear = "bilinear" if len(patch) == 2 else "trilinear"
    steps += [
        Window(s.window_jitter, s.window_jitter_probability if ct else 0),
        RandGaussianNoised(IMAGE, s.noise_probability, 0.0, s.noise),
        RandGaussianSmoothd(IMAGE, *[s.blur] * 3, prob=s.blur_probability),  # type: ignore[arg-type]
        RandScaleIntensityd(IMAGE, s.brightness, s.brightness_probability),
        RandScaleIntensityFixedMeand(IMAGE, prob=s.contrast_probability, factors=s.contrast, preserve_range=True),
        # Not "nearest", which MONAI has by default: it shifts the image against its mask by up to a voxel.
        RandSimulateLowResolutiond(IMAGE, s.low_resolution_probability, "nearest-exact", linear, zoom_range=s.low_resolution),
        RandAdjustContrastd(IMAGE, s.gamma_probability, s.gamma, retain_stats=True),
    ]
    return Compose(steps), warp.margin()


def flip_axes(config: Config) -> list[int]:
    """The patch's axes that may be mirrored."""
    axes = {"z": 0, "y": 1, "x": 2}
    if config.input.dimensions == 3:
        return sorted(axes[a] for a in config.input.flip_axes)
    first = SLICE_AXIS[config.input.axis]
    order = [first, *(a for a in range(3) if a != first)]
    return sorted(order.index(axes[a]) - 1 for a in config.input.flip_axes if axes[a] != first)


# ------------------------------------------------------------------------------------------------------------- pictures


def alone(config: Config) -> dict[str, Config]:
    """The configuration with one kind of change at a time, each at its full probability, for pictures and tests."""
    chances = {n.removesuffix("_probability"): n for n in Augmentation.model_fields if n.endswith("_probability")}
    none = dict.fromkeys(chances.values(), 0.0)
    still = config.model_copy(update={"input": config.input.model_copy(update={"flip_axes": []})})

    def changed(base: Config, **values: Any) -> Config:
        return base.model_copy(update={"augmentation": base.augmentation.model_copy(update={**none, "enabled": True, **values})})

    out = {"as it is": changed(still)}
    out |= {name.replace("_", " "): changed(still, **{chance: 1.0}) for name, chance in chances.items()}
    if config.input.flip_axes:
        out["flips"] = changed(config)
    return out


def draw(config: Config, case: Prepared, path: Path, examples: int = 4) -> None:
    """A picture of what each change does to one case: a row for each, the mask's outline on top; the last row is all. One window for
    all: scaled each by itself, brighter ones would look like the others."""
    from matplotlib.figure import Figure

    from .report import window_of
    from .sampling import cut

    window: tuple[float, float] | None = None
    kinds = {**alone(config), "all": config}
    figure = Figure((1.8 * examples, 1.8 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), examples, squeeze=False)
    spots = next((case.places(k) for k in range(1, len(config.labels) + 1) if len(case.places(k))), None)
    centre = np.array(case.shape) // 2 if spots is None else spots[len(spots) // 2]
    for (name, kind), row in zip(kinds.items(), axes):
        steps, margin = make(kind, case.spacing[-config.input.dimensions :])
        for i, ax in enumerate(row):
            steps.set_random_state(i)
            out = steps(cut(case, centre, kind, margin))
            image, label = out[IMAGE][config.input.context_slices].numpy(), out[LABEL][0].numpy()
            if image.ndim == 3:
                areas = (label > 0).sum((1, 2))
                image, label = image[areas.argmax()], label[areas.argmax()]
            window = window or window_of(None, image)
            ax.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
            for value in range(1, len(config.labels) + 1):
                if (label == value).any():
                    ax.contour(label == value, [0.5], colors=[f"C{value}"], linewidths=0.8)
            ax.set_axis_off()
            if i == 0:
                ax.set_title(name, fontsize=8, loc="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
