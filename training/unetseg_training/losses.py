"""Losses of logits [N, K, ...] against class maps [N, ...], in float32.

Dice and Tversky are taken over the whole batch, over all devices: a label that is absent from one patch is then no
division by almost nothing, and two devices get the loss of one (MONAI's take a device's own part; on one device they
are equal, which a test checks). The focal and the Hausdorff distance loss are MONAI's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from UNetSegmentationLib.networks.unet import deep_supervision_targets

from .cases import IGNORE, frequencies
from .config import Loss

LossOf = Callable[[Tensor, Tensor], Tensor]


def median_frequency_weights(counts: Sequence[Sequence[int]]) -> list[float]:
    """One weight for each class: the median of the classes' frequencies() over its own (Eigen and Fergus 2015). A class that no case
    holds weighs 0."""
    frequency = frequencies(counts)
    median = float(np.median([f for f in frequency if f > 0]))
    return [median / f if f > 0 else 0.0 for f in frequency]


def _summed(x: Tensor) -> Tensor:
    """The sum over all devices; its gradient is that of the whole batch once Lightning has averaged over them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(x)  # type: ignore[no-any-return]
    return x


def overlap_loss(
    logits: Tensor, truth: Tensor, false_positive: float = 0.5, false_negative: float = 0.5, smooth: float = 1.0, each: bool = False
) -> Tensor:
    """1 - Tversky index (Salehi et al. 2017), mean over the labels without the background; with the default weights 1 - Dice.
    truth: one-hot, like the logits. Voxels are counted over the whole batch; each: in every patch by itself, and the mean taken."""
    p = logits.softmax(1)[:, 1:]
    t = truth[:, 1:]
    axes = tuple(range(2, logits.ndim)) if each else (0, *range(2, logits.ndim))
    sums = torch.stack([(p * t).sum(axes), (p * (1 - t)).sum(axes), ((1 - p) * t).sum(axes)])
    hit, fp, fn = sums if each else _summed(sums)
    return 1 - ((hit + smooth / 2) / (hit + false_positive * fp + false_negative * fn + smooth / 2)).mean()


def cross_entropy(logits: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over all voxels of weight times cross-entropy. (torch's divides by the weights in the batch, which differ from
    device to device, and is not deterministic on CUDA.)"""
    log_p = logits.log_softmax(1)
    if weights is not None:
        log_p = log_p * weights.to(logits.device).reshape(1, -1, *(1,) * (logits.ndim - 2))
    return -(log_p * truth).sum(1).mean()


def make(settings: Loss, classes: int, counts: Sequence[Sequence[int]] = (), ignores: bool = False) -> LossOf:
    """The loss of a configuration. counts: voxels of each class in each training case, for median-frequency weights.
    ignores: whether the classes may be IGNORE, of voxels that do not count.

    It takes the network's output, a list of them with deep supervision: level i then counts 1 / 2^i (Isensee et al. 2021).
    """
    weights: Tensor | None = None
    if settings.class_weights == "median-frequency":
        weights = torch.tensor(median_frequency_weights(counts), dtype=torch.float32)
    elif settings.class_weights != "none":
        weights = torch.tensor(settings.class_weights, dtype=torch.float32)
    if settings.kind in ("focal", "boundary"):
        from monai.losses import FocalLoss, HausdorffDTLoss

        focal = FocalLoss(include_background=True, gamma=settings.focal_gamma, use_softmax=True, reduction="none")
        distance = HausdorffDTLoss(include_background=False, softmax=True)

    def one(logits: Tensor, target: Tensor) -> Tensor:
        share: Tensor | float = 1.0
        if ignores:
            # As if these were background, and the network certain of it: no loss, no gradient, no part of an overlap.
            known = target != IGNORE
            certain = 100.0 * (torch.arange(classes, device=logits.device) == 0).reshape(1, -1, *(1,) * (logits.ndim - 2))
            logits, target = torch.where(known[:, None], logits, certain), torch.where(known, target, 0)
            # Means are over all voxels; of those that count, over all devices, is this part.
            part = _summed(torch.stack([known.float().mean(), torch.ones((), device=logits.device)]))
            share = (part[0] / part[1]).clamp(min=1e-6)
        truth = functional.one_hot(target, classes).movedim(-1, 1).to(logits.dtype)
        if settings.kind == "ce":
            return cross_entropy(logits, truth, weights) / share
        if settings.kind == "dice":
            return overlap_loss(logits, truth)
        if settings.kind == "tversky":
            return overlap_loss(logits, truth, *settings.tversky)
        if settings.kind == "focal":
            value = focal(logits, truth)
            if weights is not None:
                value = value * weights.to(value.device).reshape(1, -1, *(1,) * (value.ndim - 2))
            return value.sum(1).mean() / share
        both = cross_entropy(logits, truth, weights) / share + overlap_loss(logits, truth)
        if settings.kind == "boundary":
            return both + settings.boundary_weight * distance(logits, truth)
        return both

    def loss(output: Tensor | list[Tensor], target: Tensor) -> Tensor:
        if isinstance(output, Tensor):
            return one(output.float(), target)
        scales = [0.5**i for i in range(len(output))]
        parts = [s * one(o.float(), t) for s, o, t in zip(scales, output, deep_supervision_targets(target, output))]
        return torch.stack(parts).sum() / sum(scales)

    return loss
