"""lung-nodule-click: a patch of CT and the person's prompts in, the nodule that they mean out.

    python -m unetseg_training.lung_nodule_click runs/lung-nodule-click [--from PACKAGE]

Prompts are simulated as a person places them (Sakinis et al. 2019, arXiv:1903.08205; Isensee et al. 2025,
arXiv:2503.08373): a first click anywhere in the nodule, near its edge or just outside, sometimes a box; then, on the
network's own answer, one click after another in the largest error. A sample stays in the batch for one to five such
rounds, so that a round costs no forward pass of its own.

The LIDC crops are tight in z: what lies beyond them is not known and has no weight, or is filled with real lung, into
which the nodule is implanted. The LIDC cubes have full context. Nodules are also enlarged to the size of masses.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional
from UNetSegmentationLib.image import Box, read_image, reorient
from UNetSegmentationLib.inference.click import SOFT_SHARE, SOFT_TISSUE_HU, prompt_channels
from UNetSegmentationLib.model import find_model
from UNetSegmentationLib.networks import UNet, UNetConfig
from UNetSegmentationLib.postprocess import components

from . import finetune
from .cases import Case
from .config import Fit
from .lidc import data_folder, nodules, part
from .train import Job, LiveEngine, run
from .watch import Watch

SPACING = (0.8, 0.8, 1.25)
PATCH = (24, 40, 40)
LEVEL, WIDTH = -200.0, 1600.0
CONFIG = UNetConfig(
    dimensions=3,
    in_channels=5,
    out_channels=2,
    # As slow as 16-32-64-128 and 0.57 of the time of 24-48-96-128: the finest level takes most of it.
    channels=(16, 32, 96, 160),
    strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    # The patch always has this size, so its statistics are well defined. Batch norm over six patches of different rounds
    # had reached a Dice of 0.53 after 800 steps, and 0.41 with its running averages.
    norm="instance",
)
# After this part of the steps, milder augmentation and more crops: what the first phase blurred gets sharp again. Until then a
# click in the middle of 162 held-out crops had given a Dice of 0.81, 0.85 in the largest slice, as much too much as too little.
EARLY_PART = 0.74
# Their whole scans are used to judge the finished model, so nothing of them is trained on.
JUDGED = ("LIDC-IDRI-0001",)
_VOXEL = np.array(SPACING[::-1])
# The patch's voxels in mm from its middle: (3, z, y, x).
_MM = np.stack(np.meshgrid(*((np.arange(n) - (n - 1) / 2) * v for n, v in zip(PATCH, _VOXEL)), indexing="ij")).astype(np.float32)


@dataclass
class Scan:
    """values: HU (z, y, x) float32; mask: of the nodule, or None; spacing: mm (z, y, x); depth: mm inside the mask. Of a whole
    scan, places are where a nodule may be put and tissue where there is none, both indices (z, y, x)."""

    values: np.ndarray
    mask: np.ndarray | None
    spacing: np.ndarray
    depth: np.ndarray | None = None
    diameter: float = 0.0
    isolated: bool = False
    places: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), int))
    tissue: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), int))


def distance(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Signed distance in mm from the mask's edge, negative inside."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(s) for s in spacing[::-1]])
    return sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(image, False, False, True))


def load(case: Case) -> Scan:
    image, _ = reorient(read_image(case.images[0]))
    values, spacing = image.array.astype(np.float32), np.array(image.spacing[::-1])
    if case.label is None:
        return Scan(values, None, spacing)
    mask = reorient(read_image(case.label))[0].array > 0
    outside = distance(mask, spacing)
    shell = (outside > 2) & (outside < 4)
    isolated = bool(shell.any()) and float(values[shell].mean()) < -650
    diameter = (6 / math.pi * mask.sum() * spacing.prod()) ** (1 / 3)
    return Scan(values, mask, spacing, -outside, float(diameter), isolated)


def backgrounds() -> list[Scan]:
    """Whole scans, each followed by itself at half the resolution; a nodule that we know in them stays their mask, so that
    nothing is learned from it."""
    folder = data_folder()
    pairs = [("chest_ct/LIDC-IDRI-0001_ct.nii.gz", "chest_ct/LIDC-IDRI-0001_nodule.nii.gz"), ("elastix_lung/3DCT_lung.mha", None)]
    out = []
    for name, nodule in pairs:
        scan = load(Case(name, "", (folder / name,), folder / nodule if nodule else None))
        coarse = scan.values[::2, ::4, ::4]
        places, tissue = (np.argwhere(where) * (2, 4, 4) for where in ((coarse > -960) & (coarse < -600), coarse > -300))
        if scan.mask is not None:
            centre = np.argwhere(scan.mask).mean(0)
            places, tissue = (p[(np.abs((p - centre) * scan.spacing) > 20).any(1)] for p in (places, tissue))
        fine = replace(scan, depth=None, places=places, tissue=tissue)
        out += [fine, _halved(fine)]
    return out


def _halved(scan: Scan) -> Scan:
    """In plane; blurring the full scan anew for each patch that is zoomed out took half of the time of all samples."""
    rows, columns = (n // 2 * 2 for n in scan.values.shape[1:])

    def half(array: np.ndarray) -> np.ndarray:
        return array[:, :rows, :columns].reshape(-1, rows // 2, 2, columns // 2, 2).mean((2, 4), dtype=np.float32)

    mask = None if scan.mask is None else half(scan.mask) > 0
    places, tissue = (p // (1, 2, 2) for p in (scan.places, scan.tissue))
    return replace(scan, values=half(scan.values), mask=mask, spacing=scan.spacing * (1, 2, 2), places=places, tissue=tissue)


# ---------------------------------------------------------------------------------------------------------- one sample


@dataclass
class Sample:
    """What the network sees of one nodule, on the patch (z, y, x): image normalised, label, known (the loss's weight)."""

    image: np.ndarray
    label: np.ndarray
    known: np.ndarray
    positive: list[tuple[float, ...]]
    negative: list[tuple[float, ...]]
    box: tuple[tuple[float, ...], tuple[float, ...]] | None
    previous: np.ndarray | None
    rounds: int

    def channels(self) -> np.ndarray:
        return np.concatenate([self.image[None], prompt_channels(PATCH, self.positive, self.negative, self.box, self.previous)])


def _turn(rng: np.random.Generator, tilt: float) -> np.ndarray:
    """A rotation (z, y, x) by any angle about z and up to `tilt` degrees about the others, with mirrored axes."""
    out = np.diag(rng.choice([-1.0, 1.0], 3))
    for a, b, top in ((1, 2, 180.0), (0, 1, tilt), (0, 2, tilt)):
        angle = math.radians(rng.uniform(-top, top))
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        out = out @ turn
    return out


class Cutter:
    """Cuts patches out of a scan: rotated, zoomed and bent about `centre` (an index of the scan)."""

    def __init__(self, centre: np.ndarray, zoom: float, turn: np.ndarray, bend: np.ndarray) -> None:
        self.centre, self.zoom, self.turn, self.bend = centre, zoom, turn, bend

    def _indices(self, spacing: np.ndarray) -> np.ndarray:
        """Of the patch's voxels in the scan: (3, z, y, x) float32."""
        turn = (self.turn * self.zoom / spacing[:, None]).astype(np.float32)
        bend = self.bend / spacing[:, None, None, None].astype(np.float32)
        return (turn @ _MM.reshape(3, -1)).reshape(3, *PATCH) + bend + self.centre[:, None, None, None].astype(np.float32)

    def __call__(self, scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and mask (0..1) on the patch, and whether the scan covers each voxel. Where the patch is coarser than the
        scan, the values go through a low-pass as in sample(); the mask does not, or small nodules would shrink."""
        arrays = [scan.values] if scan.mask is None else [scan.values, scan.mask]
        index = self._indices(scan.spacing)
        size = np.array(arrays[0].shape)
        first, last = index.reshape(3, -1).min(1), index.reshape(3, -1).max(1)
        known = np.ones(PATCH, bool)
        for at, n, a, b in zip(index, size, first, last):
            if a < -0.5:
                known &= at >= -0.5
            if b > n - 0.5:
                known &= at <= n - 0.5
        low = np.clip(np.floor(first).astype(int) - 6, 0, size - 1)
        high = np.clip(np.ceil(last).astype(int) + 7, low + 1, size)
        part = tuple(slice(a, b) for a, b in zip(low, high))
        scale = _VOXEL * self.zoom / scan.spacing
        sigma = [0.5 * math.sqrt(s * s - 1) if s > 1.2 else 0.0 for s in scale]
        planes = [a[part].astype(np.float32) for a in arrays]
        planes[0] = _blurred(planes[0], sigma)
        shift, per = (v.astype(np.float32)[:, None, None, None] for v in (low - 0.5, 2 / (high - low)))
        grid = torch.from_numpy(np.ascontiguousarray(np.moveaxis((index - shift) * per - 1, 0, -1)[..., ::-1]))
        x = functional.grid_sample(
            torch.from_numpy(np.stack(planes))[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
        )
        values, *mask = x[0].numpy()
        return values, mask[0] if mask else np.zeros(PATCH, np.float32), known


def _blurred(values: np.ndarray, sigma: list[float]) -> np.ndarray:
    if not any(sigma):
        return values
    blurred = sitk.DiscreteGaussian(sitk.GetImageFromArray(values), [max(g * g, 1e-9) for g in sigma[::-1]], 32, 0.01, False)
    return sitk.GetArrayFromImage(blurred)


def _thick(scan: Scan, rng: np.random.Generator, chance: float) -> Scan:
    """Neighbouring slices averaged to slices of up to 5 mm."""
    most = min(int(5 / scan.spacing[0]), len(scan.values) // 2)
    if most < 2 or rng.random() >= chance:
        return scan
    k = int(rng.integers(2, most + 1))
    start = int(rng.integers(len(scan.values) % k + 1))
    n = (len(scan.values) - start) // k

    def mean(array: np.ndarray) -> np.ndarray:
        return array[start : start + n * k].reshape(n, k, *array.shape[1:]).mean(1, dtype=np.float32)

    mask = None if scan.mask is None else mean(scan.mask) >= 0.5
    if mask is not None and not mask.any():
        return scan
    spacing = scan.spacing * (k, 1, 1)
    depth = None if mask is None else -distance(mask, spacing)
    return replace(scan, values=mean(scan.values), mask=mask, depth=depth, spacing=spacing)


def _anchor(scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Where a person might click first: anywhere inside, in the middle, near the edge, or just outside."""
    assert scan.mask is not None and scan.depth is not None
    depth, kind = scan.depth, rng.random()
    if kind < 0.45:
        where = scan.mask
    elif kind < 0.7:
        where = depth >= 0.6 * depth.max()
    elif kind < 0.92:
        where = scan.mask & (depth <= 1.2)
    else:
        where = (depth < 0) & (depth > -1.5)
    spots = np.argwhere(where if where.any() else scan.mask)
    return spots[rng.integers(len(spots))].astype(float)


@dataclass(frozen=True)
class Mix:
    """What a phase's samples are. crops, cubes: their parts, the rest are clicks on nothing; implants: of the free-lying crops;
    thick: how often slices are averaged (crops, cubes); zoom: factors of size, and 1 over them; tilt: degrees; bend: mm at
    most; calibration: HU; noise: how often."""

    crops: float
    cubes: float
    implants: float
    thick: tuple[float, float]
    zoom: float
    tilt: float
    bend: float
    calibration: float
    noise: float


EARLY = Mix(0.6, 0.24, 0.5, (0.15, 0.3), 1.25, 12, 1.0, 30, 0.5)
LATE = Mix(0.66, 0.2, 0.4, (0.1, 0.2), 1.1, 5, 0.3, 12, 0.3)


class Sampler:
    """Crops (some of the free-lying ones implanted), cubes, and clicks on nothing.

    With half as many clicks on nothing (and few of them on organs), after 2800 steps nearly every click on bone or the heart
    was still taken for a mass."""

    def __init__(self, crops: list[Scan], cubes: list[Scan], backgrounds: list[Scan]) -> None:
        self.crops, self.cubes, self.backgrounds = crops, cubes, backgrounds
        self.mix = EARLY

    def fresh(self, rng: np.random.Generator) -> Sample:
        mix, kind = self.mix, rng.random()
        if kind > mix.crops + mix.cubes:
            return self._nothing(rng)
        crop = kind < mix.crops
        group = self.crops if crop else self.cubes
        scan = group[rng.integers(len(group))]
        implant = crop and scan.isolated and rng.random() < mix.implants
        scan = _thick(scan, rng, mix.thick[0 if crop else 1])
        zoom = lung_zoom = math.exp(rng.uniform(-1, 1) * math.log(mix.zoom))
        size = rng.random()
        if size < 0.15 and not implant:  # up to a mass that fills the patch
            zoom = float(np.clip(scan.diameter / rng.uniform(10, 70), 0.2, 1.3))
        elif size < 0.35 and implant:  # a mass in a patch that is zoomed out
            zoom, lung_zoom = float(np.clip(scan.diameter / rng.uniform(6, 24), 0.2, 1.3)), rng.uniform(1.3, 3.4)
        anchor = _anchor(scan, rng)
        turn, bend = _turn(rng, mix.tilt), self._bend(rng, zoom)
        jitter = rng.uniform(-5, 5, 3) * (0.6, 1, 1) * (rng.random() < 0.5)
        centre = anchor + (turn @ (jitter * _VOXEL * zoom)) / scan.spacing
        values, inside, known = Cutter(centre, zoom, turn, bend)(scan)
        label = inside >= 0.5
        if not crop or implant:
            label &= known
        if not label.any():
            return self.fresh(rng)
        if implant:
            values, known = self._implanted(values, label, known, lung_zoom, rng)
        start = (np.array(PATCH) - 1) / 2 - jitter
        click = np.clip(np.rint(start), 0, np.array(PATCH) - 1).astype(int)
        # Thick slices and the bend can carry the anchor out of the label by more than a person would miss it.
        spots = np.argwhere(label)
        nearest = spots[((spots - click) * _VOXEL).__pow__(2).sum(1).argmin()]
        if ((nearest - click) * _VOXEL * zoom).__pow__(2).sum() > 4:
            click = nearest
        sample = Sample(self._scanner(values, rng), label, known, [tuple(float(v) for v in click)], [], None, None, 0)
        if rng.random() < 0.15:
            box = Box.around(label)
            assert box is not None
            grow = rng.uniform(-1, 2.5, 6)
            first = tuple(float(a - g) for a, g in zip(box.start, grow[:3]))
            sample.box = first, tuple(float(b - 1 + g) for b, g in zip(box.stop, grow[3:]))
            if rng.random() < 0.5:
                sample.positive.clear()
        if rng.random() < 0.05:  # a mask that a person brushed before the first click
            shift = distance(label, _VOXEL)
            sample.previous = (shift <= rng.uniform(-1.5, 2.5)).astype(np.float32)
        sample.rounds = int(rng.choice([1, 2, 3, 4, 6], p=[0.35, 0.2, 0.2, 0.1, 0.15]))
        return sample

    def _bend(self, rng: np.random.Generator, zoom: float) -> np.ndarray:
        coarse = torch.from_numpy(rng.normal(0, rng.uniform(0, self.mix.bend) * zoom, (1, 3, 3, 4, 4)).astype(np.float32))
        return functional.interpolate(coarse, size=PATCH, mode="trilinear", align_corners=True)[0].numpy()

    def _place(self, rng: np.random.Generator, zoom: float, tissue: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Values about a place in a whole scan, and what is known there."""
        first = 2 * rng.integers(len(self.backgrounds) // 2)
        scan = self.backgrounds[first + (self.backgrounds[first + 1].spacing[2] < 1.2 * zoom * _VOXEL[2])]
        places = scan.tissue if tissue else scan.places
        place = places[rng.integers(len(places))]
        values, nodule, inside = Cutter(place.astype(float), zoom, _turn(rng, 30), self._bend(rng, zoom))(scan)
        return values, inside & (nodule < 0.01)

    def _implanted(
        self, values: np.ndarray, label: np.ndarray, known: np.ndarray, zoom: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """In real lung; a nodule keeps 1 mm of what surrounded it, and fades out over 3 more (more where zoomed out)."""
        lung, there = self._place(rng, zoom)
        away = distance(label, _VOXEL * max(1.0, zoom / 2))
        weight = np.clip(1 - (away - 1.0) / 3.0, 0, 1) * known
        return values * weight + lung * (1 - weight), there | (weight == 1)

    def _nothing(self, rng: np.random.Generator) -> Sample:
        """A click on a vessel, the wall, bone, airway or plain lung: nothing is to be marked."""
        zoom = math.exp(rng.uniform(math.log(0.7), math.log(3.4)))
        if rng.random() < 0.75:
            values, known = self._place(rng, zoom, tissue=rng.random() < 0.8)
        else:
            scan = self.cubes[rng.integers(len(self.cubes))]
            assert scan.depth is not None
            spots = np.argwhere((scan.depth < -4) & (scan.values > -600 if rng.random() < 0.7 else True))
            if not len(spots):
                return self.fresh(rng)
            cutter = Cutter(spots[rng.integers(len(spots))].astype(float), 1.0, _turn(rng, 12), self._bend(rng, 1.0))
            values, nodule, known = cutter(scan)
            known &= nodule < 0.01
        if (values > SOFT_TISSUE_HU).mean() > SOFT_SHARE and zoom < 2:
            # Deep in a mass a close look shows no more than this; the session then looks from further away.
            return self.fresh(rng)
        middle = tuple((n - 1) / 2 for n in PATCH)
        return Sample(self._scanner(values, rng), np.zeros(PATCH, bool), known, [middle], [], None, None, int(rng.integers(1, 3)))

    def _scanner(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Calibration, noise and kernel of another scanner; then the model's window."""
        values = values * (1 + rng.uniform(-1, 1) * self.mix.calibration / 600) + rng.uniform(-1, 1) * self.mix.calibration
        if rng.random() < self.mix.noise / 2:
            values = _blurred(values.astype(np.float32), [0.0, *[rng.uniform(0.3, 0.8)] * 2])
        if rng.random() < self.mix.noise:
            noise = rng.normal(0, rng.uniform(5, 60), PATCH)
            if rng.random() < 0.5:  # grainy, as a soft kernel makes it
                noise = _blurred(noise.astype(np.float32), [0.0, 0.8, 0.8]) * 2
            values = values + noise
        return np.clip((values - (LEVEL - WIDTH / 2)) / WIDTH, 0, 1).astype(np.float32)


def correction(
    predicted: np.ndarray, label: np.ndarray, known: np.ndarray | bool, rng: np.random.Generator | None, spacing: np.ndarray = _VOXEL
) -> tuple[tuple[float, ...], bool] | None:
    """The next click of a person who sees the answer, and whether it is positive: in the largest connected error, at its
    deepest voxel (or, with rng, sometimes anywhere in it). None where there is no error. spacing: mm (z, y, x)."""
    best: tuple[int, np.ndarray, bool] | None = None
    for wrong, positive in ((label & ~predicted & known, True), (predicted & ~label & known, False)):
        labelled, counts = components(wrong)
        counts[0] = 0
        if counts.any() and (best is None or counts.max() > best[0]):
            best = int(counts.max()), labelled == counts.argmax(), positive
    if best is None:
        return None
    _, error, positive = best
    if rng is not None and rng.random() < 0.3:
        spots = np.argwhere(error)
        return tuple(float(v) for v in spots[rng.integers(len(spots))]), positive
    box = Box.around(error)
    assert box is not None
    depth = distance(np.pad(error[box.slices], 1), spacing)[1:-1, 1:-1, 1:-1]
    return tuple(float(v) + a for v, a in zip(np.unravel_index(depth.argmin(), depth.shape), box.start)), positive


class Rounds:
    """A Source: each sample stays for its rounds, and gets a correction on the network's answer after each. From the step
    `late` on its fresh samples are those of the second phase."""

    def __init__(self, sampler: Sampler, count: int, seed: int, late: int) -> None:
        self.sampler, self.count, self.seed, self.late = sampler, count, seed, late
        self.samples: list[Sample] = []
        self.step = 0

    def names(self, step: int) -> list[str]:
        return [f"of step {step}"]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.step = step
        self.sampler.mix = EARLY if step < self.late else LATE
        if not self.samples:
            rng = np.random.default_rng((self.seed, step, 0))
            self.samples = [self.sampler.fresh(rng) for _ in range(self.count)]
        x = np.stack([s.channels() for s in self.samples])
        y = np.stack([np.stack([s.label, s.known]) for s in self.samples])
        return torch.from_numpy(x), torch.from_numpy(y)

    def after(self, logits: Tensor) -> None:
        rng = np.random.default_rng((self.seed, self.step, 1))
        for i, (sample, answer) in enumerate(zip(self.samples, logits)):
            predicted = (answer[1] > answer[0]).numpy()
            sample.rounds -= 1
            next_ = correction(predicted, sample.label, sample.known, rng) if sample.rounds > 0 else None
            if next_ is None:
                self.samples[i] = self.sampler.fresh(rng)
                continue
            point, positive = next_
            (sample.positive if positive else sample.negative).append(point)
            sample.previous = predicted.astype(np.float32)

    def state(self) -> list[dict[str, Any]]:
        return [{k: torch.from_numpy(np.asarray(v)) if isinstance(v, np.ndarray) else v for k, v in vars(s).items()} for s in self.samples]

    def restore(self, state: list[dict[str, Any]]) -> None:
        arrays = [{k: v.numpy() if isinstance(v, Tensor) else v for k, v in s.items()} for s in state]
        self.samples = [Sample(**a) for a in arrays]  # type: ignore[arg-type]


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice of each sample, where the truth is known."""
    label, known = target[:, 0].float(), target[:, 1].float()
    margin = logits[:, 1] - logits[:, 0]
    ce = (functional.binary_cross_entropy_with_logits(margin, label, reduction="none") * known).sum() / known.sum()
    p, axes = torch.sigmoid(margin) * known, (1, 2, 3)
    overlap, total = (p * label).sum(axes), (p + label * known).sum(axes)
    return ce + (1 - (2 * overlap + 1) / (total + 1)).mean()


class HeldOut:
    """Every third held-out crop and every second cube: Dice after one, two and three clicks, on the network's own patch."""

    def __init__(self) -> None:
        held = part(nodules()[0], True)[::3] + part(nodules()[1], True)[::2]
        held = [c for c in held if c.patient not in JUDGED]
        self.names = [c.name for c in held]
        self.cases = held
        self.scans: list[Scan] = []

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def score(self, index: int, network: UNet) -> dict[str, float]:
        if not self.scans:
            self.scans = [load(case) for case in self.cases]
        sample, scores = patch(self.scans[index], np.random.default_rng((7, index))), []
        engine = LiveEngine(network)
        for _ in range(3):
            answer = engine.run(sample.channels()[None])[0]
            predicted = answer[1] > answer[0]
            a, b = predicted & sample.known, sample.label & sample.known
            scores.append(2 * int((a & b).sum()) / max(1, int(a.sum()) + int(b.sum())))
            if next_ := correction(predicted, sample.label, sample.known, None):
                (sample.positive if next_[1] else sample.negative).append(next_[0])
            sample.previous = predicted.astype(np.float32)
        return {f"{n} click{'s' * (n > 1)}": score for n, score in enumerate(scores, 1)}


def patch(scan: Scan, rng: np.random.Generator) -> Sample:
    """A held-out nodule as it is, with a first click at a place inside."""
    assert scan.mask is not None
    spots = np.argwhere(scan.mask)
    zoom = max(1.0, scan.diameter / 24)
    cutter = Cutter(spots[rng.integers(len(spots))].astype(float), zoom, np.eye(3), np.zeros((3, 1, 1, 1), np.float32))
    values, inside, known = cutter(scan)
    image = np.clip((values - (LEVEL - WIDTH / 2)) / WIDTH, 0, 1).astype(np.float32)
    middle = tuple((n - 1) / 2 for n in PATCH)
    return Sample(image, inside >= 0.5, known, [middle], [], None, None, 3)


def job(fit: Fit, start: dict[str, Tensor] | None = None) -> Job:
    """A training of Rounds; one that goes on from weights has the late phase's samples from the first step on."""
    late = 0 if start is not None else round(EARLY_PART * fit.epochs * fit.steps)

    def source(rank: int, devices: int) -> Rounds:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the arrays are small
        crops, cubes = ([load(c) for c in part(s, False) if c.patient not in JUDGED] for s in nodules()[:2])
        return Rounds(Sampler(crops, cubes, backgrounds()), fit.batch // devices, fit.seed + rank, late)

    return Job(CONFIG, fit, source, lambda: loss, HeldOut(), start=start, seed=fit.seed, record={"fit": fit.model_dump(mode="json")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="base", help="a package to go on from")
    parser.add_argument("--epochs", type=int, default=50, help="of 200 steps")
    options = parser.parse_args()
    start = finetune.start_from(find_model(options.base)).state if options.base else None
    rate = 6e-4 if start else 2e-3
    fit = Fit(epochs=options.epochs, steps=200, batch=8, learning_rate=rate, final_rate=1e-5, warmup=300, ema=0.999, patience=10**6)
    run(job(fit, start), options.folder, callbacks=[Watch(options.folder, [])])


if __name__ == "__main__":
    main()
