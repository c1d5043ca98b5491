"""Click models: a patch of an image and the person's prompts in, the one lesion that they mean out.

    Cutter, Sampler, Rounds, loss   simulated prompts and what is learnt from them, also for lung_nodule_click
    Lesions                         the samples of any dataset's cases: a click model's Source is Rounds(Lesions(...))
    HeldOut, play, evaluate         lesions that are held out, clicked at through ClickSession, the deployed path

Prompts are simulated as a person places them (Sakinis et al. 2019, arXiv:1903.08205; Isensee et al. 2025,
arXiv:2503.08373): a first click anywhere in the lesion, near its edge or just outside, sometimes a box; then, on the
network's own answer, one click after another in the largest error. A sample stays in the batch for several such
rounds, so that a round costs no forward pass of its own.

In a dataset every connected component of a label is a lesion.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional
from UNetSegmentationLib.engines import Engine, choose_engine
from UNetSegmentationLib.files import UserError, counted
from UNetSegmentationLib.image import Box, Image
from UNetSegmentationLib.inference.click import (
    LUNG_SHARE,
    SOFT_SHARE,
    SOFT_TISSUE_HU,
    ZOOMS,
    ClickSession,
    fitting,
    lung_around,
    prompt_channels,
    second_opinion,
)
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import Card, Label, ModelPackage
from UNetSegmentationLib.networks import UNet
from UNetSegmentationLib.postprocess import components, distance

from . import metrics, train
from .cases import evenly

if TYPE_CHECKING:
    from .cases import Case, CaseSet
    from .config import Config
    from .prepare import Prepared

# A model is judged after this many clicks; the Dice after CLICKS stands beside it.
JUDGED, CLICKS = 1, 3
MOST = 20  # lesions of a case that it is judged on
# Smaller components are crumbs of an annotation rather than lesions: a ball of 2.7 mm.
LEAST_MM3 = 10.0
# Of the samples, clicks on nothing; where they may lie, mm from every annotation.
NOTHING, AWAY_MM = 0.15, 8.0
# Of a dataset's lesions, so many must have lung around them for the model to go on refusing what has none.
IN_LUNG = 0.95
NO_LESION = f"The held-out cases hold no lesion of {LEAST_MM3:g} mm³ or more to be clicked on; annotate some, or hold out others."


@dataclass(frozen=True)
class Look:
    """What a network sees. spacing: mm (x, y, z); patch: voxels (z, y, x). A value v of a scan reaches it as
    clip((v - offset) / scale, low, high); on v lie noise and calibration, as HU or what is as fine."""

    spacing: tuple[float, float, float]
    patch: tuple[int, int, int]
    offset: float
    scale: float
    low: float = 0
    high: float = 1

    @classmethod
    def of(cls, config: Config) -> Look:
        data = config.input
        mode = data.intensity["mode"]
        offset, scale, low, high = 0.0, 600.0, -math.inf, math.inf  # of zscore, whose 1 is about the contrast of a CT
        if mode == "window":
            offset, scale, low, high = data.intensity["level"] - data.intensity["width"] / 2, data.intensity["width"], 0, 1
        elif mode == "percentile":
            scale, low, high = 1600.0, 0, 1
        elif mode == "ct-foreground":
            offset, scale = data.intensity["mean"], data.intensity["std"]
            low, high = ((data.intensity[end] - offset) / scale for end in ("low", "high"))
        return cls(data.spacing, data.patch, offset, scale, low, high)  # type: ignore[arg-type]

    @cached_property
    def voxel(self) -> np.ndarray:
        """mm (z, y, x)."""
        return np.array(self.spacing[::-1])

    @cached_property
    def mm(self) -> np.ndarray:
        """The patch's voxels in mm from its middle: (3, z, y, x)."""
        axes = ((np.arange(n) - m) * v for n, m, v in zip(self.patch, self.middle, self.voxel))
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)

    @property
    def middle(self) -> tuple[float, ...]:
        """The voxel (z, y, x) that a session puts on a voxel of the scan."""
        return tuple(float(n // 2) for n in self.patch)

    def normalised(self, values: np.ndarray) -> np.ndarray:
        return np.clip((values - self.offset) / self.scale, self.low, self.high).astype(np.float32)


@dataclass
class Scan:
    """values: HU (z, y, x) float32; mask: of the lesion, or None; spacing: mm (z, y, x); depth: mm inside the mask; share: the
    lesion's of each voxel (0..1), where the mask was resampled."""

    values: np.ndarray
    mask: np.ndarray | None
    spacing: np.ndarray
    depth: np.ndarray | None = None
    share: np.ndarray | None = None


AnyScan = TypeVar("AnyScan", bound=Scan)


def _near(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """A Scan's depth, -inf from some 4 mm outside: all that first clicks need, where most of a scan is far away."""
    box = Box.of(mask).grown([math.ceil(4 / s) for s in spacing]) & Box.whole(mask.shape)
    out = np.full(mask.shape, -np.inf, np.float32)
    out[box.slices] = -distance(mask[box.slices], spacing)
    return out


def diameter(mask: np.ndarray, spacing: np.ndarray) -> float:
    """mm, of a ball of the mask's volume."""
    return float((6 / math.pi * mask.sum() * spacing.prod()) ** (1 / 3))


# ---------------------------------------------------------------------------------------------------------- one sample


@dataclass
class Sample:
    """What the network sees of one lesion, on the patch (z, y, x): image normalised, label (the lesion's share of each voxel,
    0..1), known (the loss's weight).

    With labels of 0 and 1 only, the edge would be lost: 54 LIDC masks that went to the model's grid and back as such agree with
    themselves at a Dice of 0.934, as shares at 0.968."""

    image: np.ndarray
    label: np.ndarray
    known: np.ndarray
    positive: list[tuple[float, ...]]
    negative: list[tuple[float, ...]]
    box: tuple[tuple[float, ...], tuple[float, ...]] | None
    previous: np.ndarray | None
    rounds: int

    def channels(self) -> np.ndarray:
        prompts = prompt_channels(self.image.shape, self.positive, self.negative, self.box, self.previous)
        return np.concatenate([self.image[None], prompts])


def turned(rng: np.random.Generator, tilt: float) -> np.ndarray:
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

    def __init__(self, look: Look, centre: np.ndarray, zoom: float, turn: np.ndarray, bend: np.ndarray) -> None:
        self.look, self.centre, self.zoom, self.turn, self.bend = look, centre, zoom, turn, bend

    @classmethod
    def of_session(cls, look: Look, centre: np.ndarray, zoom: float = 1.0, mirrored: bool = False) -> Cutter:
        """On the voxels that a ClickSession gives the model; mirrored: with the slices in the opposite order."""
        return cls(look, np.floor(centre + 0.5), zoom, np.diag([-1.0 if mirrored else 1.0, 1, 1]), np.zeros((3, 1, 1, 1), np.float32))

    def _indices(self, spacing: np.ndarray) -> np.ndarray:
        """Of the patch's voxels in the scan: (3, z, y, x) float32."""
        turn = (self.turn * self.zoom / spacing[:, None]).astype(np.float32)
        bend = self.bend / spacing[:, None, None, None].astype(np.float32)
        straight = (turn @ self.look.mm.reshape(3, -1)).reshape(3, *self.look.patch)
        return straight + bend + self.centre[:, None, None, None].astype(np.float32)

    def __call__(self, scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and mask (0..1) on the patch, and whether the scan covers each voxel. Where the patch is coarser than the
        scan, the values go through a low-pass as in sample(); the mask does not, or small lesions would shrink."""
        inside = scan.mask if scan.share is None else scan.share
        arrays = [scan.values] if inside is None else [scan.values, inside]
        index = self._indices(scan.spacing)
        size = np.array(arrays[0].shape)
        first, last = index.reshape(3, -1).min(1), index.reshape(3, -1).max(1)
        known = np.ones(self.look.patch, bool)
        for at, n, a, b in zip(index, size, first, last):
            if a < -0.5:
                known &= at >= -0.5
            if b > n - 0.5:
                known &= at <= n - 0.5
        low = np.clip(np.floor(first).astype(int) - 6, 0, size - 1)
        high = np.clip(np.ceil(last).astype(int) + 7, low + 1, size)
        part = tuple(slice(a, b) for a, b in zip(low, high))
        scale = self.look.voxel * self.zoom / scan.spacing
        sigma = [0.5 * math.sqrt(s * s - 1) if s > 1.2 else 0.0 for s in scale]
        planes = [a[part].astype(np.float32) for a in arrays]
        planes[0] = blurred(planes[0], sigma)
        shift, per = (v.astype(np.float32)[:, None, None, None] for v in (low - 0.5, 2 / (high - low)))
        grid = torch.from_numpy(np.ascontiguousarray(np.moveaxis((index - shift) * per - 1, 0, -1)[..., ::-1]))
        x = functional.grid_sample(
            torch.from_numpy(np.stack(planes))[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
        )
        values, *mask = x[0].numpy()
        return values, mask[0] if mask else np.zeros(self.look.patch, np.float32), known


def blurred(values: np.ndarray, sigma: list[float]) -> np.ndarray:
    if not any(sigma):
        return values
    out = sitk.DiscreteGaussian(sitk.GetImageFromArray(values), [max(g * g, 1e-9) for g in sigma[::-1]], 32, 0.01, False)
    return sitk.GetArrayFromImage(out)


def coarser(array: np.ndarray, k: Sequence[int]) -> np.ndarray:
    """The means of blocks of k (z, y, x) voxels."""
    if max(k) == 1:
        return array.astype(np.float32)
    n = [size // each for size, each in zip(array.shape, k)]
    whole = array[tuple(slice(0, size * each) for size, each in zip(n, k))]
    return whole.reshape(n[0], k[0], n[1], k[1], n[2], k[2]).mean((1, 3, 5), dtype=np.float32)


def thick(scan: AnyScan, rng: np.random.Generator, chance: float) -> AnyScan:
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
    depth = None if mask is None else _near(mask, spacing)
    share = None if scan.share is None else mean(scan.share)
    return replace(scan, values=mean(scan.values), mask=mask, depth=depth, spacing=spacing, share=share)


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
    """How samples are changed. thick: how often slices are averaged; zoom: factors of size, and 1 over them; tilt: degrees;
    bend: mm at most; calibration: HU; noise: how often. native: how often a lesion is neither turned nor bent, but seen as a
    session sees it; only its two ends may change places, for masks have their habits in plane (LIDC's
    lie 0.2 pixels to the left of what is seen)."""

    thick: float = 0.1
    zoom: float = 1.2
    tilt: float = 10
    bend: float = 0.5
    calibration: float = 20
    noise: float = 0.3
    native: float = 0.5


class Sampler:
    """Makes samples, by fresh()."""

    def __init__(self, look: Look, mix: Mix) -> None:
        self.look, self.mix = look, mix

    def begin(self, step: int) -> None:
        """What follows is for this step of the training."""

    def fresh(self, rng: np.random.Generator) -> Sample:
        raise NotImplementedError

    def clicked(
        self,
        scan: Scan,
        zoom: float,
        rng: np.random.Generator,
        native: bool = False,
        beyond: bool = False,
        implant: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
    ) -> Sample | None:
        """The scan's lesion with its first prompt; None where nothing of it is left. native: see Mix. beyond: it may go on where
        the scan has ended. implant(values, label, known) may put it elsewhere, and gives what these are there."""
        voxel, patch = self.look.voxel, np.array(self.look.patch)
        anchor = _anchor(scan, rng)
        jitter = rng.uniform(-5, 5, 3) * (0.6, 1, 1) * (rng.random() < 0.5)
        if native:
            mirrored = rng.random() < 0.5
            steps = voxel * zoom / scan.spacing * ([-1 if mirrored else 1, 1, 1])
            if rng.random() < 0.6:  # about the lesion, as soon as it was found
                assert scan.mask is not None
                box = Box.of(scan.mask)
                jitter = ((np.array(box.start) + box.stop - 1) / 2 - anchor) / steps
            jitter = np.rint(jitter)
            cutter = Cutter.of_session(self.look, anchor + jitter * steps, zoom, mirrored)
        else:
            turn, bend = turned(rng, self.mix.tilt), self.bend(rng, zoom)
            cutter = Cutter(self.look, anchor + (turn @ (jitter * voxel * zoom)) / scan.spacing, zoom, turn, bend)
        values, label, known = cutter(scan)
        if not beyond:
            label = label * known
        if implant is not None and (label >= 0.5).any():
            values, label, known = implant(values, label, known)
        inside = label >= 0.5
        if not inside.any():
            return None
        click = np.clip(np.rint(self.look.middle - jitter), 0, patch - 1).astype(int)
        # Thick slices and the bend can carry the anchor out of the label by more than a person would miss it.
        spots = np.argwhere(inside)
        nearest = spots[((spots - click) * voxel).__pow__(2).sum(1).argmin()]
        if ((nearest - click) * voxel * zoom).__pow__(2).sum() > 4:
            click = nearest
        return self.prompted(values, label, known, click, rng)

    def prompted(self, values: np.ndarray, label: np.ndarray, known: np.ndarray, click: np.ndarray, rng: np.random.Generator) -> Sample:
        """With a first click at a voxel, sometimes a box beside it or instead, sometimes a mask that was brushed before."""
        inside = label >= 0.5
        sample = Sample(self._scanner(values, rng), label, known, [tuple(float(v) for v in click)], [], None, None, 0)
        if rng.random() < 0.15:
            box = Box.of(inside)
            grow = rng.uniform(-1, 2.5, 6)
            first = tuple(float(a - g) for a, g in zip(box.start, grow[:3]))
            sample.box = first, tuple(float(b - 1 + g) for b, g in zip(box.stop, grow[3:]))
            if rng.random() < 0.5:
                sample.positive.clear()
        if rng.random() < 0.05:  # a mask that a person brushed before the first click
            shift = distance(inside, self.look.voxel)
            sample.previous = (shift <= rng.uniform(-1.5, 2.5)).astype(np.float32)
        sample.rounds = int(rng.choice([1, 2, 3, 4, 6], p=[0.35, 0.2, 0.2, 0.1, 0.15]))
        return sample

    def silent(self, values: np.ndarray, known: np.ndarray, rng: np.random.Generator) -> Sample:
        """A click in the middle of a patch where nothing is to be marked."""
        label = np.zeros(self.look.patch, np.float32)
        return Sample(self._scanner(values, rng), label, known, [self.look.middle], [], None, None, int(rng.integers(1, 3)))

    def bend(self, rng: np.random.Generator, zoom: float) -> np.ndarray:
        """mm (3, z, y, x) by which a patch is bent."""
        return self.smooth(rng, self.mix.bend, (3, 3, 4, 4), zoom)

    def smooth(self, rng: np.random.Generator, most: float, cells: tuple[int, int, int, int], scale: float = 1.0) -> np.ndarray:
        """Noise (channels, z, y, x) on the patch, of a standard deviation up to `most` times scale, interpolated from `cells`."""
        coarse = torch.from_numpy(rng.normal(0, rng.uniform(0, most) * scale, (1, *cells)).astype(np.float32))
        return functional.interpolate(coarse, size=self.look.patch, mode="trilinear", align_corners=True)[0].numpy()

    def _scanner(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Calibration, noise and kernel of another scanner; then the model's normalisation."""
        values = values * (1 + rng.uniform(-1, 1) * self.mix.calibration / 600) + rng.uniform(-1, 1) * self.mix.calibration
        if rng.random() < self.mix.noise / 2:
            values = blurred(values.astype(np.float32), [0.0, *[rng.uniform(0.3, 0.8)] * 2])
        if rng.random() < self.mix.noise:
            noise = rng.normal(0, rng.uniform(5, 60), self.look.patch)
            if rng.random() < 0.5:  # grainy, as a soft kernel makes it
                noise = blurred(noise.astype(np.float32), [0.0, 0.8, 0.8]) * 2
            values = values + noise
        return self.look.normalised(values)


def deep_in_tissue(values: np.ndarray, zoom: float) -> bool:
    """Whether a patch (HU) may lie in a mass of the lung as well as in an organ; the session then looks from further away."""
    return bool((values > SOFT_TISSUE_HU).mean() > SOFT_SHARE and zoom < 2)


def correction(
    predicted: np.ndarray, label: np.ndarray, known: np.ndarray | bool, rng: np.random.Generator | None, spacing: np.ndarray
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
    box = Box.of(error)
    depth = distance(np.pad(error[box.slices], 1), spacing)[1:-1, 1:-1, 1:-1]
    return tuple(float(v) + a for v, a in zip(np.unravel_index(depth.argmin(), depth.shape), box.start)), positive


class Rounds:
    """A Source: each sample stays for its rounds, and gets a correction on the network's answer after each."""

    def __init__(self, sampler: Sampler, count: int, seed: int) -> None:
        self.sampler, self.count, self.seed = sampler, count, seed
        self.samples: list[Sample] = []
        self.step = 0

    def names(self, step: int) -> list[str]:
        return [f"of step {step}"]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.step = step
        self.sampler.begin(step)
        if not self.samples:
            rng = np.random.default_rng((self.seed, step, 0))
            self.samples = [self.sampler.fresh(rng) for _ in range(self.count)]
        x = np.stack([s.channels() for s in self.samples])
        y = np.stack([np.stack([s.label, s.known]) for s in self.samples])
        return torch.from_numpy(x), torch.from_numpy(y)

    def after(self, logits: Tensor) -> None:
        rng = np.random.default_rng((self.seed, self.step, 1))
        for i, (sample, answer) in enumerate(zip(self.samples, logits)):
            predicted = (answer[1] > answer[0]).cpu().numpy()
            sample.rounds -= 1
            again = sample.rounds > 0
            next_ = correction(predicted, sample.label >= 0.5, sample.known, rng, self.sampler.look.voxel) if again else None
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


# ----------------------------------------------------------------------------------------------------------- any dataset


def lesions(labels: np.ndarray, spacing: Sequence[float]) -> Iterator[tuple[int, Box, np.ndarray]]:
    """The lesions of a label map (z, y, x), label by label: its value, a box about the lesion, and its mask (bool) in there.
    Voxels that share an edge or a corner hang together; what is smaller than LEAST_MM3 is left out. spacing: mm."""
    for value in range(1, int(labels.max(initial=0)) + 1):
        box = Box.around(labels == value)
        if box is None:
            continue
        labelled, counts = components(labels[box.slices] == value, corners=True)
        for i in range(1, len(counts)):
            if counts[i] * math.prod(spacing) >= LEAST_MM3:
                inside = Box.of(labelled == i)
                yield value, inside.shifted(box.start), labelled[inside.slices] == i


def share_in_lung(image: Image, labels: np.ndarray) -> tuple[int, int]:
    """Of a CT's lesions, how many have lung around them as ClickSession asks for, and how many there are."""
    found = [0, 0]
    spacing = np.array(image.spacing[::-1])
    for _value, box, mask in lesions(labels, image.spacing):
        around = box.grown([math.ceil(6 / s) for s in spacing]) & Box.whole(labels.shape)
        inside = np.zeros(around.shape, bool)
        inside[box.relative_to(around).slices] = mask
        found[0] += lung_around(image.channels[0][around.slices], inside, spacing) >= LUNG_SHARE
        found[1] += 1
    return found[0], found[1]


@dataclass
class _Lesion:
    """In the index space of its case. box: a voxel larger than the lesion; share: uint8 (z, y, x) in there, of each voxel the part
    that is the lesion: 128 to 255 in its mask."""

    case: Prepared
    box: Box
    share: np.ndarray

    @classmethod
    def of(cls, case: Prepared, box: Box, mask: np.ndarray) -> _Lesion:
        wide = box.grown((1, 1, 1)) & Box.whole(case.shape)
        inside = np.zeros(wide.shape, bool)
        inside[box.relative_to(wide).slices] = mask
        around = sitk.GetArrayFromImage(sitk.BinaryDilate(sitk.GetImageFromArray(inside.astype(np.uint8)), (1, 1, 1), sitk.sitkBox)) > 0
        share = np.where(around & (case.labels[wide.slices] == 0), np.minimum(case.shares[wide.slices], 127), 0)
        share[inside] = np.maximum(case.shares[wide.slices][inside], 128)
        return cls(case, wide, share.astype(np.uint8))


def _region(case: Prepared, box: Box, look: Look, zoom: float) -> tuple[Scan, Box]:
    """What patches of this zoom about a box's voxels may see of a case, and its box there. At half the resolution where the
    patch is twice as coarse: to blur millions of voxels for each would take half of the training's time."""
    spacing = np.array(case.spacing)
    # The patch's corner, the jitter and the bend.
    reach = zoom * (np.linalg.norm(look.voxel * look.patch) / 2 + 10)
    box = box.grown([math.ceil(reach / s) for s in spacing]) & Box.whole(case.shape)
    values = case.values[0][box.slices].astype(np.float32)
    k = [2 if s * 2 <= v * zoom and n > 1 else 1 for s, v, n in zip(spacing, look.voxel, values.shape)]
    values = coarser(values, k) * look.scale + look.offset
    return Scan(values, None, spacing * k), box


class Lesions(Sampler):
    """Samples of a dataset: a label, then a case that has it, then a lesion, so that what is rare is seen as often; and clicks on
    nothing, lest the model forgets to say so. in_lung: what a session does where a lesion should have lung around it."""

    def __init__(self, cases: Sequence[Prepared], look: Look, in_lung: bool) -> None:
        super().__init__(look, Mix())
        self.in_lung = in_lung
        self.by_label: list[list[list[_Lesion]]] = []
        self.nowhere: list[tuple[Prepared, np.ndarray]] = []
        found: dict[int, dict[str, list[_Lesion]]] = {}
        for case in cases:
            boxes = []
            for value, box, mask in lesions(case.labels, case.spacing):
                found.setdefault(value, {}).setdefault(case.name, []).append(_Lesion.of(case, box, mask))
                boxes.append(box)
            places = _places(case, boxes, look)
            if len(places):
                self.nowhere.append((case, places))
        self.by_label = [list(found[value].values()) for value in sorted(found)]
        if not self.by_label:
            raise UserError(
                f"The training cases hold no lesion of {LEAST_MM3:g} mm³ or more, so there is nothing to be clicked on; annotate some."
            )

    def fresh(self, rng: np.random.Generator) -> Sample:
        if rng.random() < NOTHING and self.nowhere:
            return self._nothing(rng)
        cases = self.by_label[rng.integers(len(self.by_label))]
        group = cases[rng.integers(len(cases))]
        lesion = group[rng.integers(len(group))]
        spacing, look = np.array(lesion.case.spacing), self.look
        native = rng.random() < self.mix.native
        zoom = 1.0 if native else math.exp(rng.uniform(-1, 1) * math.log(self.mix.zoom))
        size = diameter(lesion.share >= 128, spacing)
        if not native and rng.random() < 0.15:  # as small or as large as others may be
            zoom = float(np.clip(size / (rng.uniform(0.3, 2.3) * (look.voxel * look.patch).min()), 0.2, 1.3))
        else:  # from as near as a session looks at it, or from as far away as on the way there
            closest = fitting((np.array(lesion.box.shape) - 2) * spacing / look.voxel, look.patch, ZOOMS[0])
            zoom *= closest if rng.random() < 0.5 else rng.choice([z for z in ZOOMS if 1 <= z <= max(1, closest)])
        scan, box = _region(lesion.case, lesion.box, look, zoom)
        share = np.zeros(box.shape, np.float32)
        share[lesion.box.relative_to(box).slices] = lesion.share / np.float32(255)
        share = coarser(share, np.rint(scan.spacing / spacing).astype(int).tolist())
        mask = share >= 0.5
        if not mask.any():
            return self.fresh(rng)
        scan = replace(scan, mask=mask, depth=_near(mask, scan.spacing), share=share)
        return self.clicked(thick(scan, rng, self.mix.thick), zoom, rng, native) or self.fresh(rng)

    def _nothing(self, rng: np.random.Generator) -> Sample:
        """A click away from every lesion; lesions that the patch shows have no weight."""
        zoom = math.exp(rng.uniform(math.log(ZOOMS[0]), math.log(ZOOMS[-1])))
        case, places = self.nowhere[rng.integers(len(self.nowhere))]
        place = places[rng.integers(len(places))]
        scan, box = _region(case, Box(tuple(place), tuple(place + 1)), self.look, zoom)
        k = np.rint(scan.spacing / case.spacing).astype(int)
        scan.mask = coarser(case.labels[box.slices] > 0, k.tolist()) > 0
        centre = (place - box.start - (k - 1) / 2) / k
        values, lesion, known = Cutter(self.look, centre, zoom, turned(rng, self.mix.tilt), self.bend(rng, zoom))(scan)
        known &= lesion < 0.01
        if self.in_lung and deep_in_tissue(values, zoom):
            return self.fresh(rng)
        return self.silent(values, known, rng)


def _places(case: Prepared, boxes: Sequence[Box], look: Look) -> np.ndarray:
    """Voxels (n, 3) at AWAY_MM or more from every lesion, of each brightness as many: of air outside the body a scan has most,
    and nobody clicks there."""
    rng = np.random.default_rng(0)
    spots = np.stack([rng.integers(n, size=30_000) for n in case.shape], 1)
    free = case.labels[tuple(spots.T)] == 0
    for box in boxes:
        box = box.grown([math.ceil(AWAY_MM / s) for s in case.spacing])
        free &= ((spots < box.start) | (spots >= box.stop)).any(1)
    spots = spots[free]
    if not len(spots):
        return spots
    values = np.clip(case.values[0][tuple(spots.T)].astype(np.float32), look.low, look.high)
    low, high = np.percentile(values, (0.5, 99.5))
    level = np.clip((values - low) / max(high - low, 1e-6) * 8, 0, 7).astype(int)
    return np.concatenate([spots[level == k][:64] for k in range(8)])


def source(cases: Sequence[Prepared], config: Config, count: int, seed: int) -> Rounds:
    """The Source of a dataset's prepared cases, with `count` samples in a batch."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the arrays are small
    return Rounds(Lesions(cases, Look.of(config), config.model.surroundings == "lung"), count, seed)


# ------------------------------------------------------------------------------------------------------- the deployed path


class Turn(NamedTuple):
    """After a click: what was found and what is true, bool (z, y, x) in a box of the image that holds both; the seconds that
    the click took, None where nothing was left to correct."""

    found: np.ndarray
    true: np.ndarray
    box: Box
    seconds: float | None

    @property
    def dice(self) -> float:
        return dice(self.found, self.true)


def second_engine(card: Card) -> tuple[ModelPackage, Engine] | None:
    """A card's second opinion for many sessions, each of which would else load its own (0.1 to 0.3 s)."""
    with suppress(UserError):  # the sessions say why they do without
        other = second_opinion(card)
        return (other, choose_engine(other)) if other is not None else None
    return None


def play(session: ClickSession, truth: np.ndarray, first: Sequence[int], count: int = CLICKS) -> Iterator[Turn]:
    """A lesion from its first click, a voxel (z, y, x), on; each next one lies deepest in the largest connected error, as a
    person would place it. truth: (z, y, x) on the image's grid, not 0 in the lesion."""
    session.clear()
    lesion = Box.of(truth)
    spacing = np.array(session.image.spacing[::-1])
    click: tuple[Sequence[int], bool] | None = (first, True)
    for _ in range(count):
        seconds = None
        if click is not None:
            began = time.perf_counter()
            session.add_point(session.image.index_to_point(click[0][::-1]), click[1])
            seconds = time.perf_counter() - began
        answer = session.answer
        box = (lesion | answer.box if answer.found else lesion).grown((1, 1, 1)) & Box.whole(truth.shape)
        true, found = truth[box.slices] > 0, np.zeros(box.shape, bool)
        if answer.found:
            found[answer.box.relative_to(box).slices] = answer.mask > 0
        yield Turn(found, true, box, seconds)
        next_ = correction(found, true, True, None, spacing)
        click = None if next_ is None else (tuple(int(i) + s for i, s in zip(next_[0], box.start)), next_[1])


def first_click(truth: np.ndarray, name: str) -> tuple[int, ...]:
    """A voxel (z, y, x) anywhere in the lesion, by its name the same each time."""
    box = Box.of(truth)
    spots = np.argwhere(truth[box.slices])
    spot = spots[np.random.default_rng(zlib.crc32(name.encode())).integers(len(spots))]
    return tuple(int(v) + a for v, a in zip(spot, box.start))


def by_lesion(item: metrics.Item) -> Iterator[metrics.Item]:
    """An item for each lesion of a case (MOST, evenly chosen, of very many), whose truth holds that one alone; of several their
    names are numbered."""
    found = list(lesions(item.truth, item.image.spacing))
    for number in range(1, len(found) + 1, math.ceil(len(found) / MOST) or 1):
        value, box, mask = found[number - 1]
        truth = np.zeros(item.truth.shape, np.uint8)
        truth[box.slices] = mask * np.uint8(value)
        yield item._replace(name=item.name if len(found) == 1 else f"{item.name}, lesion {number}", truth=truth)


def has_lesion(case_set: CaseSet, case: Case) -> bool:
    image, truth = case_set.load(case)
    return next(lesions(truth, image.spacing), None) is not None


def score(session: ClickSession, item: metrics.Item, labels: Sequence[Label]) -> tuple[metrics.Row, np.ndarray]:
    """The row of a lesion of by_lesion(), and its mask (z, y, x): metrics.score()'s figures after JUDGED clicks, and the Dice
    after CLICKS. There is no specificity: it would tell of the box only."""
    turns = list(play(session, item.truth, first_click(item.truth, item.name)))
    turn = turns[JUDGED - 1]
    value = int(item.truth[turn.box.slices].max())
    label = replace(next(label for label in labels if label.value == value), value=1)
    pair = (turn.found.astype(np.uint8), turn.true.astype(np.uint8))
    (figures,) = metrics.score(*pair, item.image.spacing, [label]).values()
    seconds = [t.seconds for t in turns if t.seconds is not None]
    mask = np.zeros(item.truth.shape, np.uint8)
    mask[turn.box.slices] = turn.found
    row = {"case": item.name, "patient": item.patient or item.name, "label": label.name, **figures, "specificity": None}
    return row | {f"dice_{CLICKS}_clicks": turns[-1].dice, "seconds": round(float(np.mean(seconds)), 3)}, mask


def evaluate(
    package: ModelPackage,
    items: Iterable[metrics.Item],
    labels: Sequence[Label],
    engine: Engine | None = None,
    seen: metrics.Seen | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[metrics.Row]:
    """A row for every lesion of the cases, as metrics.evaluate() has them for automatic models; seen is shown each lesion alone."""
    rows: list[metrics.Row] = []
    second = second_engine(package.card)
    for count, item in enumerate(items):
        if progress:
            progress(count, item.name)
        session = ClickSession(item.image, package, engine, second=second)
        for lesion in by_lesion(item):
            row, mask = score(session, lesion, labels)
            rows.append(row)
            if seen:
                found = Prediction(item.image.like(mask), package.card.labels, package.card.name, Box.whole(mask.shape))
                seen(lesion._replace(truth=(lesion.truth > 0).astype(np.uint8)), found, [row])
    if not rows:
        raise UserError(NO_LESION)
    return rows


def drive(package: ModelPackage, engine: Engine, image: Image, truth: np.ndarray) -> None:
    """A case's first lesions through the deployed path, CLICKS clicks each; of one without a lesion its middle."""
    session = ClickSession(image, package, engine)
    session.add_point(image.index_to_point([(n - 1) / 2 for n in image.shape[::-1]]))
    for lesion, _ in zip(by_lesion(metrics.Item("", image, truth)), range(3)):
        list(play(session, lesion.truth, first_click(lesion.truth, lesion.name)))


class HeldOut(train.HeldOut):
    """The lesions of held-out cases, PER_CASE of each at most, through ClickSession: the Dice after JUDGED clicks
    and after CLICKS. Of a CT only what a session may look at is kept."""

    PER_CASE, AROUND_MM = 4, 70.0

    def __init__(self, case_set: CaseSet, cases: Sequence[Case], config: Config) -> None:
        super().__init__(case_set, cases, config)
        self.parts: list[list[metrics.Item]] = []

    def read(self) -> None:
        """Others where those chosen hold no lesion; UnfitFold where none does."""
        if self.parts:
            return
        parts = self._parts()
        if not any(parts):
            holding = [c for c in self.all if has_lesion(self.case_set, c)]
            if not holding:
                raise train.UnfitFold(NO_LESION)
            self.cases = evenly(holding, len(self.cases))
            parts = self._parts()
        self.parts = parts

    def _parts(self) -> list[list[metrics.Item]]:
        return [list(self._cut(item)) for item in metrics.case_items(self.case_set, self.cases)]

    def _cut(self, item: metrics.Item) -> Iterator[metrics.Item]:
        found = list(by_lesion(item))
        whole = Box.whole(item.truth.shape)
        for lesion in found[:: math.ceil(len(found) / self.PER_CASE) or 1]:
            box = Box.of(lesion.truth)
            if self.config.input.intensity["mode"] in ("zscore", "percentile"):  # these need the whole image
                box = whole
            box = box.grown([math.ceil(self.AROUND_MM / s) for s in item.image.spacing[::-1]]) & whole
            part = item.image.crop(box)
            yield lesion._replace(image=part.like(part.array.copy()), truth=lesion.truth[box.slices].copy())

    @cached_property
    def second(self) -> tuple[ModelPackage, Engine] | None:
        return second_engine(self.package.card)

    def score(self, index: int, network: UNet) -> dict[str, float]:
        self.read()
        rows = []
        for lesion in self.parts[index]:
            session = ClickSession(lesion.image, self.package, train.LiveEngine(network), second=self.second)
            turns = list(play(session, lesion.truth, first_click(lesion.truth, lesion.name)))
            rows.append([turns[n - 1].dice for n in (JUDGED, CLICKS)])
            self.examples = [e for e in self.examples if e[0] != lesion.name]
            if len(self.examples) < 4:
                found = np.zeros(lesion.truth.shape, np.uint8)
                found[turns[JUDGED - 1].box.slices] = turns[JUDGED - 1].found
                self.examples.append((lesion.name, lesion.image, (lesion.truth > 0).astype(np.uint8), found))
        means = np.mean(rows, 0) if rows else [math.nan] * 2
        return {counted(n, "click"): float(mean) for n, mean in zip((JUDGED, CLICKS), means)}
