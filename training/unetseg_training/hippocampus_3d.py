"""hippocampus-3d: anterior (1) and posterior (2) hippocampus in T1 MR, the whole crop at once.

python -m unetseg_training.hippocampus_3d runs/hippocampus-3d
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from UNetSegmentationLib.networks import UNet, UNetConfig

from . import augment
from .data import Case, fold_of, hippocampi, load
from .fit import Schedule, fit

SPACING = (1.0, 1.0, 1.0)
INTENSITY = {"mode": "zscore"}
CONFIG = UNetConfig(dimensions=3, in_channels=1, out_channels=3, channels=(16, 32, 64, 96))
PATCH = (48, 64, 48)
HELD_OUT = 0


class Sampler:
    def __init__(self, cases: list[Case], batch: int, seed: int) -> None:
        self.cases, self.batch, self.seed = cases, batch, seed

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((self.seed, step))
        x = np.zeros((self.batch, 1, *PATCH), np.float32)
        y = np.zeros((self.batch, *PATCH), np.float32)
        for i in range(self.batch):
            case = self.cases[rng.integers(len(self.cases))]
            # Anywhere in the patch: predict() puts a small image at the start and pads behind it.
            at = [int(rng.integers(p - n + 1)) for p, n in zip(PATCH, case.labels.shape)]
            place = tuple(slice(a, a + n) for a, n in zip(at, case.labels.shape))
            x[i, 0][place], y[i][place] = case.values[0], case.labels
        g = torch.Generator().manual_seed(int(rng.integers(2**62)))
        xs, ys = augment.spatial(torch.from_numpy(x), torch.from_numpy(y), PATCH, g, 12, (0.88, 1.14), 1.5, (2,))
        return augment.intensity(xs, g, 0.25, 0.2, 0.2), ys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    sources = hippocampi()
    fold = fold_of([s.patient for s in sources])
    cases = [load(s, SPACING, INTENSITY, 2) for s in sources]
    train = [c for c in cases if fold[c.source.patient] != HELD_OUT]
    held_out = [c for c in cases if fold[c.source.patient] == HELD_OUT]
    print(len(train), "cases to train on;", len(held_out), "held out")

    def validate(model: UNet) -> dict[str, float]:
        scores = []
        with torch.no_grad():
            for case in held_out[::4]:
                x = torch.zeros(1, 1, *PATCH)
                inside = tuple(slice(0, n) for n in case.labels.shape)
                x[0, 0][inside] = torch.from_numpy(case.values[0].astype(np.float32))
                p = model(x).argmax(1)[0].numpy()[inside]  # type: ignore[union-attr]
                scores.append([2 * ((p == k) & (case.labels == k)).sum() / ((p == k).sum() + (case.labels == k).sum()) for k in (1, 2)])
        a, b = np.mean(scores, 0)
        return {"anterior": round(float(a), 4), "posterior": round(float(b), 4)}

    fit(CONFIG, Schedule(steps=options.steps), Sampler(train, options.batch, Schedule.seed), options.folder, validate)


if __name__ == "__main__":
    main()
