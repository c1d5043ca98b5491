"""Augmentation of whole batches in torch: one affine or elastic resampling for image and labels, then intensities.

Ranges follow the field's recipe (rotation, scaling, elastic deformation as in Ronneberger et al. 2015; noise, blur,
contrast and gamma as in nnU-Net, Isensee et al. 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def spatial(
    x: Tensor,
    y: Tensor,
    size: tuple[int, ...],
    generator: torch.Generator,
    rotation: float,
    scale: tuple[float, float],
    elastic: float = 0.0,
    flips: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Rotate (degrees; 3D: about each axis), scale, bend and flip image and labels alike, and crop the centre to `size`.

    x: [N, C, (D,) H, W]; y: integer labels [N, (D,) H, W], resampled by nearest neighbour; elastic: standard deviation
    of the control points' shift, in voxels; flips: spatial axes (0 = the first) to flip at random.
    """
    n, dims = len(x), x.ndim - 2

    def uniform(low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=generator)

    matrix = torch.eye(dims).repeat(n, 1, 1)
    for a, b in [(0, 1)] if dims == 2 else [(0, 1), (0, 2), (1, 2)]:
        angle = uniform(-rotation, rotation) * math.pi / 180
        turn = torch.eye(dims).repeat(n, 1, 1)
        turn[:, a, a] = turn[:, b, b] = angle.cos()
        turn[:, a, b], turn[:, b, a] = -angle.sin(), angle.sin()
        matrix = matrix @ turn
    matrix = matrix / torch.exp(uniform(math.log(scale[0]), math.log(scale[1]))).reshape(n, 1, 1)
    for axis in flips:
        sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
        matrix[:, :, dims - 1 - axis] *= sign[:, None]  # grids are (x, y, z), arrays (z, y, x)
    # Rotate in voxels, not in the unit cube, or an oblong patch would shear.
    extent = torch.tensor(x.shape[:1:-1], dtype=torch.float32)
    out = torch.tensor(size[::-1], dtype=torch.float32)
    theta = matrix * out.reshape(1, 1, -1) / extent.reshape(1, -1, 1)
    grid = functional.affine_grid(torch.cat([theta, torch.zeros(n, dims, 1)], 2), [n, 1, *size], align_corners=False)
    if elastic:
        coarse = torch.randn((n, dims, *(4,) * dims), generator=generator) * elastic
        bend = functional.interpolate(coarse, size=size, mode="bilinear" if dims == 2 else "trilinear", align_corners=True)
        grid = grid + bend.movedim(1, -1) * 2 / extent
    x = functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    labels = functional.grid_sample(y[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return x, labels[:, 0].long()


def intensity(x: Tensor, generator: torch.Generator, noise: float, shift: float, gain: float) -> Tensor:
    """Gaussian noise, shift, gain and blur, each with its own strength per sample, in normalised units."""
    shape = (len(x), *(1,) * (x.ndim - 1))

    def chance(p: float) -> Tensor:
        return (torch.rand(shape, generator=generator) < p).float()

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    blurred = x
    for axis in range(x.ndim - 2):
        weight = uniform(0, 0.25) * chance(0.3)
        rolled = blurred.roll(1, x.ndim - 1 - axis) + blurred.roll(-1, x.ndim - 1 - axis)
        blurred = blurred * (1 - 2 * weight) + rolled * weight
    x = blurred * (1 + uniform(-gain, gain) * chance(0.5)) + uniform(-shift, shift) * chance(0.5)
    return x + torch.randn(x.shape, generator=generator) * uniform(0, noise) * chance(0.5)
