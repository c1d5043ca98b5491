"""The patches of a step: which case, where in it, and what is changed at random, all from (seed, step, number in the batch).

So a resumed training, one with other worker processes, and one on several devices see the very same patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from UNetSegmentationLib.image import Box
from UNetSegmentationLib.inference.predict import MIRROR_DEPTH
from UNetSegmentationLib.inference.tiling import mirrored

from . import transforms
from .cases import IGNORE
from .config import Config
from .prepare import Prepared
from .transforms import IMAGE, LABEL


class Source(Protocol):
    """Where batches come from. One with after(logits) is told the network's answer before it is asked for the next batch;
    state() is saved with the checkpoint and given to restore(): only tensors, numbers, texts, lists and dictionaries."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs [N, C, ...] float32, and what the loss takes: by default classes [N, ...] int64."""
        ...

    def names(self, step: int) -> list[str]:
        """The cases of that batch, for a sentence."""
        ...


def cut(case: Prepared, centre: Sequence[int] | np.ndarray, config: Config, margin: Sequence[int]) -> dict[str, Any]:
    """The patch about a voxel of a case, and `margin` voxels more on each side. A patch keeps inside the image where it can, and holds
    the whole of a smaller image. Beyond that is 0, or its mirror as predict() shows it."""
    patch, model = config.input.patch, config.model
    flat = config.input.dimensions == 2
    shape = case.shape[-len(patch) :]
    starts = []
    for at, p, n in zip(centre[-len(patch) :], patch, shape):
        low, high = sorted((0, n - p))
        starts.append(min(max(int(at) - p // 2, low), high))
    box = Box(tuple(s - m for s, m in zip(starts, margin)), tuple(s + p + m for s, p, m in zip(starts, patch, margin)))
    inside = box & Box.whole(shape)
    place: Any = inside.relative_to(box).slices
    there: Any = inside.slices
    if config.input.padding == "reflect":
        # Of one target only what is close, as predict() does where that would be shown twice: lung-nodule-2d, of 0.857 (Dice), had after
        # 500 steps on 14 crops 0.853, with the whole mirror after 140 steps 0.811; with zeros 0.833.
        depth = MIRROR_DEPTH if model.roi_mm or model.extent == "box" else 0
        place, there = (), np.ix_(*(mirrored(a, b, n, depth) for a, b, n in zip(box.start, box.stop, shape)))
    k = config.input.context_slices if flat else 0
    image = np.zeros((len(case.values) * (2 * k + 1), *box.shape), np.float32)
    label = np.zeros((1, *box.shape), np.float32)
    if flat:
        planes = np.clip(np.arange(centre[0] - k, centre[0] + k + 1), 0, case.shape[0] - 1)
        values = np.stack([case.values[(slice(None), z, *there)] for z in planes], 1)
        image[(slice(None), *place)] = values.reshape(-1, *values.shape[2:])
        label[(0, *place)] = case.labels[(int(centre[0]), *there)]
    else:
        image[(slice(None), *place)] = case.values[(slice(None), *there)]
        label[(0, *place)] = case.labels[there]
    ends = [np.repeat(v, 2 * k + 1).reshape(-1, *(1,) * len(patch)) for v in (case.low, case.high)]
    return {
        IMAGE: torch.from_numpy(image),
        LABEL: torch.from_numpy(label),
        "low": torch.from_numpy(ends[0]),
        "high": torch.from_numpy(ends[1]),
    }


class Patches:
    """A Source of random patches. Of each batch the first are centred on a label, fit.foreground of all over the steps: first the
    label is drawn, then a case that holds it, then the voxel, so that a rare label is seen as often as a common one.

    replay: other cases, drawn instead with the probability `share`. part: (rank, devices): this device's of the batch.
    """

    def __init__(
        self,
        cases: Sequence[Prepared],
        config: Config,
        seed: int,
        part: tuple[int, int] = (0, 1),
        replay: Sequence[Prepared] = (),
        share: float = 0,
    ) -> None:
        self.config, self.seed, self.part, self.share = config, seed, part, share if replay else 0.0
        self.pools = [list(cases), list(replay)]
        self.holding = [
            {k: found for k in range(1, len(config.labels) + 1) if (found := [c for c in pool if c.counts[k]])} for pool in self.pools
        ]
        self._made: dict[tuple[float, ...], tuple[Any, tuple[int, ...]]] = {}

    def _numbers(self) -> range:
        return range(self.part[0], self.config.fit.batch, self.part[1])

    def draw(self, step: int, number: int) -> tuple[Prepared, np.ndarray, np.random.Generator]:
        """Case, centre voxel, and what is left of the sample's random numbers."""
        rng = np.random.default_rng((self.seed, step, number))
        pool = int(rng.random() < self.share)
        holding = self.holding[pool]
        # Summed over the steps: rounded in each, half of a batch of 1 would be none (Dice of balls in volumes: 0.886, now 0.977).
        share = self.config.fit.batch * self.config.fit.foreground
        if number < math.floor((step + 1) * share) - math.floor(step * share) and holding:
            label = list(holding)[rng.integers(len(holding))]
            case = holding[label][rng.integers(len(holding[label]))]
            places = case.places(label)
            # A label's voxel, and anywhere within a quarter of the patch of it.
            spread = [0] * (3 - len(self.config.input.patch)) + [p // 4 for p in self.config.input.patch]
            near = [int(rng.integers(-s, s + 1)) for s in spread]
            centre = np.clip(places[rng.integers(len(places))] + near, 0, np.array(case.shape) - 1)
        else:
            case = self.pools[pool][rng.integers(len(self.pools[pool]))]
            for _ in range(100):  # where nobody has judged there is nothing to learn
                centre = np.array([rng.integers(n) for n in case.shape])
                if case.labels[tuple(centre)] != IGNORE:
                    break
        return case, centre, rng

    def sample(self, step: int, number: int) -> tuple[Tensor, Tensor]:
        case, centre, rng = self.draw(step, number)
        # Microscopy's pixels of 0.0002 mm would be 0 in hundredths.
        own = map(float, case.spacing[-self.config.input.dimensions :])
        spacing = tuple(round(s, 2) if s >= 0.05 else float(f"{s:.3g}") for s in own)
        if spacing not in self._made:
            self._made[spacing] = transforms.make(self.config, spacing)
        steps, margin = self._made[spacing]
        steps.set_random_state(int(rng.integers(2**31)))
        out = steps(cut(case, centre, self.config, margin))
        return out[IMAGE], out[LABEL][0].long()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self.sample(step, i) for i in self._numbers()))
        return torch.stack(images), torch.stack(labels)

    def names(self, step: int) -> list[str]:
        return sorted({self.draw(step, i)[0].name for i in self._numbers()})
