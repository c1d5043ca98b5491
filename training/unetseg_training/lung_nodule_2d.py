"""lung-nodule-2d: one slice and its neighbours in, the nodule of the middle slice out.

    python -m unetseg_training.lung_nodule_2d runs/lung-nodule-2d [--from PACKAGE | --from RUN]

The LIDC crops are tight in z, so they hardly show what a slice without the nodule looks like; those slices come from
the LIDC cubes and from the lungs of whole chest CT. Thick slices (to 5 mm) are made from thin ones by averaging.

Labels are shares of pixels, and part of the samples is seen as a scan is: neither turned nor mirrored. Of 41 held-out
crops the Dice of version 1.0.0 (trained on labels of 0 and 1, mirrored and turned) rose from 0.830 to 0.836 when its answers were
moved by 0.4 pixels to the left and 0.3 up, where the LIDC's masks lie. Version 1.1.0
saw one neighbour on each side: its held-out Dice of 0.836 (not mirrored) would be 0.848 but for the slices at the nodule's ends that
only one of answer and mask has, and slices are as thin as 0.5 mm, so that 1.2.1 sees three.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from UNetSegmentationLib.image import Box, read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import find_model
from UNetSegmentationLib.networks import UNet

from . import finetune, transforms
from .cases import Case, CaseSet
from .config import Config, read
from .lidc import HELD_OUT, data_folder, nodules, part
from .losses import cross_entropy, overlap_loss
from .prepare import Prepared, prepare
from .train import Job, LiveEngine, live_package, load_weights, run
from .transforms import IMAGE, LABEL
from .watch import Watch

CONFIG = Path(__file__).resolve().parents[1] / "models" / "lung-nodule-2d.yaml"
# Of sixteen patches, ten show crops, four cubes and two whole scans; how often slices are averaged to thicker ones.
CROPS, CUBES, THICK = 10, 4, 0.3
# How often an image ends earlier, above and below, than the case does.
ENDS = 0.4
# How often a patch is seen as it is in a scan.
NATIVE = 0.7
# Pixels in each patch's own Dice, where 79 are a nodule of 6 mm: no nodule and none found is 1, and not 0 / 0.
SMOOTH = 10.0


def scans(fold: int = HELD_OUT) -> CaseSet:
    """Whole chest CT, for what is not a nodule: one with its nodule's mask (not where its patient is held out), one without a nodule."""
    folder = data_folder()
    one = Case(
        "LIDC-IDRI-0001",
        "LIDC-IDRI-0001",
        (folder / "chest_ct/LIDC-IDRI-0001_ct.nii.gz",),
        folder / "chest_ct/LIDC-IDRI-0001_nodule.nii.gz",
    )
    other = Case("3DCT_lung", "elastix", (folder / "elastix_lung/3DCT_lung.mha",), None)
    kept = tuple(case for case in (one, other) if nodules()[2].get(case.patient) != fold)
    return CaseSet(kept, nodules()[0].labels, ("CT",), "pairs", nodules()[0].values)


class Slices:
    """A Source of 2.5D patches."""

    def __init__(self, crops: list[Prepared], cubes: list[Prepared], scans: list[Prepared], config: Config, part: tuple[int, int] = (0, 1)):
        self.crops, self.cubes, self.scans, self.config, self.part = crops, cubes, scans, config, part
        self.steps, margin = transforms.make(config, config.input.spacing[1::-1], shares=True)  # type: ignore[arg-type]
        upright = config.augmentation.model_copy(update={"warp_probability": 0.0, "elastic_probability": 0.0})
        still = config.model_copy(update={"augmentation": upright, "input": config.input.model_copy(update={"flip_axes": []})})
        self.native, _ = transforms.make(still, config.input.spacing[1::-1], shares=True)  # type: ignore[arg-type]
        self.half = config.input.patch[0] // 2 + margin[0]
        # Where in a whole scan's slice a patch may be centred: in the lung, whose values lie between air's and water's.
        self.near = []
        for case in scans:
            coarse = case.values[0, :, ::4, ::4].astype(np.float32)
            self.near.append([np.argwhere(plane) * 4 for plane in (coarse > 0.05) & (coarse < 0.35)])

    def names(self, step: int) -> list[str]:
        return [f"of step {step}"]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        made = [self._sample(step, i) for i in range(self.part[0], self.config.fit.batch, self.part[1])]
        images, labels = zip(*made)
        return torch.stack(images), torch.stack(labels)

    def _sample(self, step: int, i: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.config.fit.seed, step, i))
        kind, centre = rng.integers(16), None
        if kind < CROPS:
            case = self.crops[rng.integers(len(self.crops))]
            z = int(rng.integers(case.shape[0]))
        elif kind < CROPS + CUBES:
            case = self.cubes[rng.integers(len(self.cubes))]
            inside = np.flatnonzero(case.labels.any((1, 2)))
            z = int(rng.integers(max(0, inside[0] - 8), min(case.shape[0] - 1, inside[-1] + 8) + 1))
        else:
            n = int(rng.integers(len(self.scans)))
            case = self.scans[n]
            z = int(rng.integers(case.shape[0]))
            spots = self.near[n][z]
            centre = spots[rng.integers(len(spots))] if len(spots) else None
        native = rng.random() < NATIVE
        x, y = self._cut(case, z, centre, rng, 0.1 if native else THICK)
        steps = self.native if native else self.steps
        steps.set_random_state(int(rng.integers(2**31)))
        ends = torch.tensor([case.low[0], case.high[0]]).reshape(2, 1, 1, 1).expand(2, len(x), 1, 1)
        out = steps({IMAGE: torch.from_numpy(x), LABEL: torch.from_numpy(y), "low": ends[0], "high": ends[1]})
        return out[IMAGE], out[LABEL]

    def _cut(
        self, case: Prepared, z: int, centre: np.ndarray | None, rng: np.random.Generator, thicker: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Planes (2 * context + 1, y, x) and shares (1, y, x) about a slice, with the margin that the warp needs."""
        depth, h, w = case.shape
        context, half = self.config.input.context_slices, self.half
        thick = 1
        if rng.random() < thicker:
            thick = int(rng.integers(1, max(1, min(round(5 / case.spacing[0]), depth // 2)) + 1))
        slab = np.arange(thick) - thick // 2
        # Crops end with the nodule. An image that ends anywhere keeps the network from telling the one by the other.
        first, last = 0, depth - 1
        if rng.random() < ENDS:
            first, last = int(rng.integers(0, z + 1)), int(rng.integers(z, depth))
        planes = [
            case.values[0, np.clip(z + k * thick + slab, first, last)].mean(0, dtype=np.float32) for k in range(-context, context + 1)
        ]
        label = case.shares[np.clip(z + slab, first, last)].mean(0, dtype=np.float32) / 255
        stack = np.stack([*planes, label])
        row, column = (centre if centre is not None else np.array([h // 2, w // 2])) + rng.integers(-12, 13, 2)
        rows, columns = (np.arange(at - half, at + half) for at in (int(np.clip(row, 0, h)), int(np.clip(column, 0, w))))
        if centre is not None or rng.random() < 0.7:
            # As predict() pads: reflected once (more would repeat the nodule), then the edge goes on.
            return _split(stack[:, _reflected(rows, h)[:, None], _reflected(columns, w)])
        stack = stack[:, np.clip(rows, 0, h - 1)[:, None], np.clip(columns, 0, w - 1)]
        return _split(stack * (((rows >= 0) & (rows < h))[:, None] & (columns >= 0) & (columns < w)))


def _reflected(index: np.ndarray, n: int) -> np.ndarray:
    return np.clip(np.where(index < 0, -index, np.where(index > n - 1, 2 * (n - 1) - index, index)), 0, n - 1)


def _split(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(stack[:-1]), np.ascontiguousarray(stack[-1:])


def loss(logits: Tensor, share: Tensor) -> Tensor:
    """Cross-entropy and Dice of logits (n, 2, y, x) against the nodule's share of each pixel (n, 1, y, x), 0..1. The Dice is
    the mean of the batch's and of its patches' own, in which a small nodule counts as much as a large one."""
    logits, truth = logits.float(), torch.cat([1 - share, share], 1)
    return cross_entropy(logits, truth) + (overlap_loss(logits, truth) + overlap_loss(logits, truth, smooth=SMOOTH, each=True)) / 2


def twice(box: Box, shape: tuple[int, ...]) -> Box:
    """A box of twice the size about the same centre, inside the image."""
    return box.grown([(n + 1) // 2 for n in box.shape]) & Box.whole(shape)


def region(case: Case, truth: np.ndarray, cube: bool) -> Box:
    """What the model is given of a held-out case: a whole crop, of a cube a box of twice the nodule's size."""
    whole = Box.whole(truth.shape)
    box = Box.around(truth)
    return twice(box, truth.shape) if cube and box else whole


class HeldOut:
    """Every third held-out crop and every second cube, through predict()."""

    def __init__(self, config: Config, fold: int) -> None:
        self.package = live_package(config.card())
        crops, cubes = (part(s, True, fold) for s in nodules()[:2])
        self.cases = [(c, False) for c in crops[::3]] + [(c, True) for c in cubes[::2]]

    def __len__(self) -> int:
        return len(self.cases)

    def name(self, index: int) -> str:
        return self.cases[index][0].name

    def score(self, index: int, network: UNet) -> dict[str, float]:
        case, cube = self.cases[index]
        assert case.label is not None
        truth = read_image(case.label).array > 0
        options = Options(tta="none", roi=region(case, truth, cube))
        found = predict(read_image(case.images[0]), [self.package], options, engines=[LiveEngine(network)]).labels.array
        return {"cubes" if cube else "crops": dice(found, truth)}


def job(config: Config, cache: Path, start: dict[str, Tensor] | None = None, fold: int = HELD_OUT) -> Job:
    kept: dict[str, list[Prepared]] = {}

    def load() -> None:
        if not kept:
            for name, case_set, cases in (
                ("crops", nodules()[0], part(nodules()[0], False, fold)),
                ("cubes", nodules()[1], part(nodules()[1], False, fold)),
                ("scans", scans(fold), list(scans(fold).cases)),
            ):
                kept[name] = prepare(case_set, config, cache, cases)

    def source(rank: int, devices: int) -> Slices:
        load()
        return Slices(kept["crops"], kept["cubes"], kept["scans"], config, (rank, devices))

    record: dict[str, Any] = {"config": config.model_dump(mode="json"), "fold": fold, "data": kept}
    held_out = HeldOut(config, fold)
    identity = {"fold": fold}
    return Job(config.unet(), config.fit, source, lambda: loss, held_out, load, start, None, config.fit.seed, identity, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="base", help="a package, or the folder of a run, to go on from")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--fold", type=int, default=HELD_OUT, choices=range(5), help="held out; the bundled model's is %(default)s")
    options = parser.parse_args()
    config = read(CONFIG)
    changed = {name: value for name in ("epochs", "learning_rate") if (value := getattr(options, name)) is not None}
    config = config.model_copy(update={"fit": config.fit.model_copy(update=changed)})
    start = None
    if options.base and Path(options.base).is_dir():
        start = load_weights(Path(options.base), config.unet()).state_dict()
    elif options.base:
        start = finetune.start_from(find_model(options.base), config.unet()).state
    made = job(config, options.folder.parent / "cache", start, options.fold)
    made.record["base"] = options.base
    run(made, options.folder, callbacks=[Watch(options.folder, ["crops", "cubes"])])


if __name__ == "__main__":
    main()
