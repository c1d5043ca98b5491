"""lung-nodule-2d: one slice and its neighbours in, the nodule of the middle slice out.

    python -m unetseg_training.lung_nodule_2d runs/lung-nodule-2d

The LIDC crops are tight in z, so they hardly show what a slice without the nodule looks like; those slices come from
the LIDC cubes and from the lungs of whole chest CT. Thick slices (to 5 mm) are made from thin ones by averaging.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from UNetSegmentationLib.networks import UNet, UNetConfig

from . import augment
from .data import Case, Source, data_folder, fold_of, lidc_crops, lidc_cubes, load
from .fit import Schedule, fit

SPACING = (0.7, 0.7, None)
INTENSITY = {"mode": "window", "level": -300, "width": 1400}
CONTEXT = 1
# Batch norm: with instance norm the result would depend on how much of the slice the network sees at once.
CONFIG = UNetConfig(dimensions=2, in_channels=2 * CONTEXT + 1, out_channels=2, channels=(24, 48, 96, 192, 192), norm="batch")
PATCH, WIDE = 80, 112  # voxels: the network's patch, and what is cut out before rotation and scaling
PHASE_2 = 4000  # from this step on, milder augmentation and mostly crops: what the first phase blurred gets sharp again
HELD_OUT = 0  # the fold that the card's figures come from


def sources() -> tuple[list[Source], list[Source], list[Source], dict[str, int]]:
    """Crops, cubes, whole scans, and the fold of each patient (the cubes show patients of the crops)."""
    crops, cubes = lidc_crops(), lidc_cubes()
    folder = data_folder()
    scans = [
        Source(folder / "chest_ct/LIDC-IDRI-0001_ct.nii.gz", folder / "chest_ct/LIDC-IDRI-0001_nodule.nii.gz", "LIDC-IDRI-0001"),
        Source(folder / "elastix_lung/3DCT_lung.mha", None, "elastix"),
    ]
    return crops, cubes, scans, fold_of([s.patient for s in crops + cubes])


class Sampler:
    """Draws 2.5D patches: of eight, five (later six) from the crops, two (one) from the cubes and one from whole scans."""

    def __init__(self, crops: list[Case], cubes: list[Case], scans: list[Case], batch: int, seed: int) -> None:
        self.crops, self.cubes, self.scans = crops, cubes, scans
        self.batch, self.seed = batch, seed
        # Where in a whole scan a patch may be centred: soft tissue within or beside lung.
        self.places = []
        for case in scans:
            coarse = case.values[0, :, ::4, ::4].astype(np.float32)
            lung = (coarse > 0.05) & (coarse < 0.35)
            near = [np.argwhere(plane) * 4 for plane in lung]
            self.places.append(near)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng((self.seed, step))
        x = np.zeros((self.batch, 2 * CONTEXT + 1, WIDE, WIDE), np.float32)
        y = np.zeros((self.batch, WIDE, WIDE), np.float32)
        for i in range(self.batch):
            x[i], y[i] = self._one(rng, i, step < PHASE_2)
        g = torch.Generator().manual_seed(int(rng.integers(2**62)))
        scale, bend = ((0.7, 1.4), 1.0) if step < PHASE_2 else ((0.85, 1.2), 0.5)
        xs, ys = augment.spatial(torch.from_numpy(x), torch.from_numpy(y), (PATCH, PATCH), g, 180, scale, bend, (0, 1))
        return augment.intensity(xs, g, 0.04, 0.04, 0.1), ys

    def _one(self, rng: np.random.Generator, i: int, early: bool) -> tuple[np.ndarray, np.ndarray]:
        kind = i % 8
        if kind < (5 if early else 6):
            case = self.crops[rng.integers(len(self.crops))]
            z, centre = int(rng.integers(case.labels.shape[0])), None
        elif kind < 7:
            case = self.cubes[rng.integers(len(self.cubes))]
            inside = np.flatnonzero(case.labels.any((1, 2)))
            low, high = max(0, inside[0] - 8), min(len(case.labels) - 1, inside[-1] + 8)
            z, centre = int(rng.integers(low, high + 1)), None
        else:
            n = int(rng.integers(len(self.scans)))
            case = self.scans[n]
            z = int(rng.integers(case.labels.shape[0]))
            spots = self.places[n][z]
            centre = spots[rng.integers(len(spots))] if len(spots) else None
        return self._patch(case, z, centre, rng, 0.5 if early else 0.25)

    def _patch(
        self, case: Case, z: int, centre: np.ndarray | None, rng: np.random.Generator, thicken: float
    ) -> tuple[np.ndarray, np.ndarray]:
        depth = case.labels.shape[0]
        thick = 1
        if rng.random() < thicken:
            thick = int(rng.integers(1, max(1, min(round(5 / case.spacing[2]), depth // 2)) + 1))
        planes = []
        for k in range(-CONTEXT, CONTEXT + 1):
            at = np.clip(z + k * thick + np.arange(thick) - thick // 2, 0, depth - 1)
            planes.append(case.values[0, at].mean(0, dtype=np.float32))
        at = np.clip(z + np.arange(thick) - thick // 2, 0, depth - 1)
        label = (case.labels[at].mean(0) >= 0.5).astype(np.float32)
        if rng.random() < 0.1:
            planes = [planes[CONTEXT]] * len(planes)
        stack = np.stack([*planes, label])
        h, w = label.shape
        shift = rng.integers(-10, 11, 2)
        cy, cx = (centre if centre is not None else (h // 2, w // 2)) + shift
        mode = "reflect" if centre is not None or rng.random() < 0.7 else "constant"
        pad = WIDE // 2 + 12
        if mode == "reflect":
            # More than one reflection would repeat the nodule; edges go on instead.
            once = [min(pad, n - 1) for n in (h, w)]
            stack = np.pad(stack, ((0, 0), (once[0], once[0]), (once[1], once[1])), mode="reflect")
            rest = [pad - o for o in once]
            stack = np.pad(stack, ((0, 0), (rest[0], rest[0]), (rest[1], rest[1])), mode="edge")
        else:
            stack = np.pad(stack, ((0, 0), (pad, pad), (pad, pad)))
        top, left = int(np.clip(cy, 0, h)) + pad - WIDE // 2, int(np.clip(cx, 0, w)) + pad - WIDE // 2
        stack = stack[:, top : top + WIDE, left : left + WIDE]
        return stack[:-1], stack[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--batch", type=int, default=24)
    options = parser.parse_args()
    crops, cubes, scans, fold = sources()

    def keep(items: list[Source], held_out: bool) -> list[Case]:
        return [load(s, SPACING, INTENSITY, 1) for s in items if (fold.get(s.patient) == HELD_OUT) == held_out]

    train = Sampler(keep(crops, False), keep(cubes, False), keep(scans, False), options.batch, Schedule.seed)
    check = Sampler(keep(crops, True), keep(cubes, True), train.scans, 64, 1)
    fixed = [check(i) for i in range(4)]
    print(len(train.crops), "crops,", len(train.cubes), "cubes to train on;", len(check.crops), "and", len(check.cubes), "held out")

    def validate(model: UNet) -> dict[str, float]:
        hit = total = 0.0
        with torch.no_grad():
            for x, y in fixed:
                p = model(x).argmax(1)  # type: ignore[union-attr]
                hit += 2.0 * float(((p == 1) & (y == 1)).sum())
                total += float((p == 1).sum() + (y == 1).sum())
        return {"patch_dice": round(hit / total, 4)}

    fit(CONFIG, Schedule(steps=options.steps, restart_at=PHASE_2), train, options.folder, validate)


if __name__ == "__main__":
    main()
