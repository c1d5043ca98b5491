"""From a dataset and this machine to a configuration, with the reason for each choice.

    plan(case_set, path, quick=True).write(run_folder)   # config.yaml, plan.md

Rules after nnU-Net's fingerprint (Isensee et al. 2021), with this machine's speed instead of a fixed GPU: spacing is the
cases' median, a patch is as large as the budget of voxels allows, levels halve an axis while 4 voxels remain.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from UNetSegmentationLib.files import UserError, counted, user_path, write_text
from UNetSegmentationLib.image import Box, Image, length_unit, reorient, slices_across
from UNetSegmentationLib.inference.click import expects_lung
from UNetSegmentationLib.inference.predict import check_pixel_size, crop_mm, spacing_for
from UNetSegmentationLib.intensity import check_finite
from UNetSegmentationLib.model import SLICE_AXIS, Card, Label
from UNetSegmentationLib.networks import UNetConfig, build
from UNetSegmentationLib.postprocess import components, voxel_counts
from UNetSegmentationLib.training import misfit, slug

from . import config as config_file
from .cases import IGNORE, UNNAMED, CaseSet, evenly, frequencies, mixed_pixel_sizes, numbered_instances
from .check import CT, OFFSET, in_hu, offset_cases
from .clicks import IN_LUNG, share_in_lung
from .config import Config, Fit
from .train import mps_fault, precision_here

READ_AT_MOST = 150  # cases of a fingerprint; medians of more say the same
PARTED = 8  # cases, and the smallest labels of each, whose objects are told apart
FEW_SLICES = 8  # fewer are seen one by one
# Bytes of activations and gradients for each voxel and feature map, summed over the levels: measured (3D and 2D, CPU).
_BYTES = {"bf16": 40, "16": 40, "32": 80}
_SAMPLE_SECONDS = 0.02  # a click model's sample takes to be made and corrected
_BASE_BYTES = 600 << 20  # PyTorch, Lightning and MONAI themselves


@dataclass(frozen=True)
class Machine:
    """cores; memory and gpu_memory in bytes; gpu: its name, "" for none."""

    cores: int
    memory: int
    gpu: str = ""
    gpu_memory: int = 0

    @classmethod
    def here(cls) -> Machine:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = _memory()
        if torch.cuda.is_available():
            return cls(cores, memory, torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1])
        if torch.backends.mps.is_available():
            return cls(cores, memory, "Apple GPU", memory // 2)
        return cls(cores, memory)

    def __str__(self) -> str:
        text = f"{self.cores} cores, {self.memory / 2**30:.0f} GB of memory"
        return text + (f", {self.gpu} with {self.gpu_memory / 2**30:.0f} GB" if self.gpu else ", no GPU")


def _memory() -> int:
    """Bytes of memory of this machine, or of the container that we run in."""
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its own size, then bytes of memory
        ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(status)
        return status[1] or 8 << 30
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30  # what a laptop has at least
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text()))
    return total


@dataclass
class Fingerprint:
    """What the cases are like. Per case, in canonical order (z, y, x): shape, spacing (mm), voxels of each class.

    intensity: of label voxels over all cases, first channel: low (0.5 %), high (99.5 %), mean, std; zeros: share of voxels
    that are exactly 0; hu: whether the values look like HU; offset: cases that look as if 1024 had been added to theirs; read: cases
    looked at, of `cases`. in_lung: of the labels' connected components, how many have lung around them, and how many there are; None
    where that was not asked for. single: names of the cases that are one slice. pixels: of each case its name, whether it is a picture
    without a pixel size, and its spacing (x, y, z).
    acquired: of single or thick slices, shapes and spacings as they were taken; mixed: they lie nearest
    to other planes of the body from case to case. objects: of some cases, of each label, what part of its voxels its typical object has
    (of few slices: in one of them); 0 where it has none, or was not looked at. centres: of each label, (z, y, x) from 0 to 1 across the
    image; NaN where it has none.
    """

    cases: int
    patients: int
    read: int
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    spacings: list[tuple[float, float, float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    intensity: dict[str, float] = field(default_factory=dict)
    zeros: float = 0.0
    hu: bool = False
    offset: list[str] = field(default_factory=list)
    in_lung: tuple[int, int] | None = None
    single: list[str] = field(default_factory=list)
    pixels: list[tuple[str, bool, Any]] = field(default_factory=list)
    acquired: list[tuple[Any, Any]] = field(default_factory=list)
    mixed: bool = False
    objects: list[list[float]] = field(default_factory=list)
    centres: list[np.ndarray] = field(default_factory=list)

    @property
    def median_spacing(self) -> tuple[float, ...]:
        return tuple(float(v) for v in np.median(self.spacings, 0))


def fingerprint(case_set: CaseSet, progress: Callable[[int, int, str], None] | None = None, in_lung: bool = False) -> Fingerprint:
    """Read the cases (evenly chosen ones, of very many) and measure them. in_lung: also what lies around the labels."""
    cases = [c for c in case_set.annotated if c.split != "test"]
    if not cases:
        raise UserError("The dataset holds no annotated cases; add images with their masks, or check the folder's name.")
    chosen = evenly(cases, READ_AT_MOST)
    out = Fingerprint(len(cases), len({c.patient for c in cases}), len(chosen))
    inside: list[np.ndarray] = []
    ranges: dict[str, tuple[float, float]] = {}
    zeros = []
    taken: list[tuple[Any, Any]] = []
    planes: Counter[int] = Counter()  # short-axis slices of the heart lie nearest to another one in every patient
    rng = np.random.default_rng(0)
    n = len(case_set.labels)
    parted = {case.name for case in evenly(chosen, PARTED)}
    for i, case in enumerate(chosen):
        if progress:
            progress(i, len(chosen), case.name)
        image, mask = case_set.load(case)
        check_finite(image.channels, f"Case {case.name}")
        canonical, orientation = reorient(image)
        truth = orientation.canonical(mask)
        judged = truth != IGNORE
        out.shapes.append(canonical.shape)
        out.single += [case.name] * (min(canonical.shape) < 2)
        out.pixels.append((case.name, length_unit(image) == "px", image.spacing))
        out.spacings.append(tuple(float(s) for s in canonical.spacing[::-1]))  # type: ignore[arg-type]
        if (across := slices_across(image)) is not None:
            planes[orientation.axes.index(across)] += 1
            stack, _ = reorient(image, across)
            taken.append((stack.shape, tuple(float(s) for s in stack.spacing[::-1])))
        out.counts.append(voxel_counts(truth, IGNORE + 1)[: n + 1].tolist())
        if case.name in parted:
            out.objects.append(_objects(truth, out.counts[-1][1:]))
        out.centres.append(_centres(truth, n))
        values = canonical.channels[0]
        if in_lung:
            inside_lung, count = share_in_lung(canonical, truth * judged)
            out.in_lung = tuple(np.add(out.in_lung or (0, 0), (inside_lung, count)).tolist())
        label = values[(truth > 0) & judged].ravel()
        if len(label):
            inside.append(rng.choice(label, min(len(label), 20000), replace=False).astype(np.float64))
        thin = values.flat[:: max(1, values.size // 200000)]
        low, high = np.percentile(thin, (0.5, 99.5))
        ranges[case.name] = float(low), float(high)
        zeros.append(float((thin == 0).mean()))
    if len(taken) == len(chosen):
        # Of stacks one in ten may be odd: the others make a better volume.
        most = 1.0 if len(out.single) == len(chosen) else 0.9
        out.acquired, out.mixed = taken, max(planes.values()) < most * len(chosen)
    if not inside:
        raise UserError("All masks of the dataset are empty, so there is nothing to learn; check that they are the annotated ones.")
    every = np.concatenate(inside)
    low, high = np.percentile(every, [0.5, 99.5])
    clipped = np.clip(every, low, high)
    out.intensity = {"low": float(low), "high": float(high), "mean": float(clipped.mean()), "std": float(clipped.std())}
    out.zeros = float(np.median(zeros))
    out.hu = in_hu(*np.median([*ranges.values()], 0).tolist())
    out.offset = offset_cases(case_set.channels[0], ranges)
    return out


def _objects(truth: np.ndarray, counts: Sequence[int]) -> list[float]:
    """For Fingerprint.objects. Half of a label's voxels lie in components as large as its typical object, or larger: of the components
    of vessels in fundus pictures the median has 8 pixels of 65,000, and half of 1,400 nuclei the median's size."""
    out = [0.0] * len(counts)
    flat = int(np.argmin(truth.shape))
    for value in sorted((v for v, n in enumerate(counts, 1) if n), key=lambda v: counts[v - 1])[:PARTED]:
        mask = truth == value
        mask = mask[Box.of(mask).slices]
        slices = np.split(mask, mask.shape[flat], flat) if truth.shape[flat] < FEW_SLICES else [mask]
        sizes = np.sort(np.concatenate([components(m, corners=True)[1][1:] for m in slices]))
        out[value - 1] = float(sizes[np.searchsorted(sizes.cumsum(), sizes.sum() / 2)] / sizes.sum())
    return out


def _centres(truth: np.ndarray, n: int) -> np.ndarray:
    """For Fingerprint.centres, (n, 3): of a hundred voxels along each axis at most, so that a CT takes no second."""
    thin = truth[tuple(slice(None, None, math.ceil(m / 100)) for m in truth.shape)]
    where = [(np.arange(m) + 0.5) / m for m in thin.shape]
    counts = voxel_counts(thin, IGNORE + 1)[1 : n + 1]
    sums = [
        voxel_counts(thin, IGNORE + 1, [where[b] if b == a else np.ones(m) for b, m in enumerate(thin.shape)])[1 : n + 1] for a in range(3)
    ]
    return np.stack(sums, 1) / np.where(counts, counts, np.nan)[:, None]


# ------------------------------------------------------------------------------------------------------------------ plan


@dataclass
class Plan:
    config: Config
    reasons: dict[str, str]
    fingerprint: Fingerprint
    machine: Machine
    notes: tuple[str, ...] = ()
    seconds: float = 0.0  # that the training takes, and predict() of one case
    case_seconds: float = 0.0

    def write(self, folder: str | Path) -> None:
        """config.yaml with the reasons as comments, and plan.md to read."""
        folder = Path(folder)
        config_file.write(self.config, folder / "config.yaml", self.reasons)
        write_text(folder / "plan.md", self.markdown())

    def markdown(self) -> str:
        f, c = self.fingerprint, self.config
        names = ["background", *(label.name for label in c.labels)]
        low, high = np.min(f.shapes, 0)[::-1], np.max(f.shapes, 0)[::-1]
        lines = [
            f"# Plan of {c.model.name}",
            "",
            f"{counted(f.cases, 'annotated case')} of {counted(f.patients, 'patient')} in `{c.data.path}`"
            + (f" ({f.read} of them looked at)" if f.read < f.cases else "")
            + f"; this machine has {self.machine}. Change `config.yaml`, not this file.",
            "",
            "## The data",
            "",
            f"- size: {' x '.join(map(str, low))} to {' x '.join(map(str, high))} voxels (x, y, z)",
            f"- spacing: median {' x '.join(f'{s:.3g}' for s in f.median_spacing[::-1])} mm",
            "- inside the labels the values run from {low:.4g} to {high:.4g} (mean {mean:.4g}, standard deviation {std:.4g})".format(
                **f.intensity
            ),
            *(f"- {note}" for note in self.notes),
            "",
            "| class | part of the voxels | in cases |",
            "|---|---|---|",
        ]
        table = np.array(f.counts)
        for k, (name, share) in enumerate(zip(names, frequencies(f.counts))):
            lines.append(f"| {name} | {100 * share:.3g} % | {int((table[:, k] > 0).sum())} of {f.read} |")
        lines += ["", "## What was chosen, and why", "", "| setting | value | why |", "|---|---|---|"]
        data = c.model_dump(mode="json")
        for name, why in self.reasons.items():
            section, _, setting = name.partition(".")
            value = data[section][setting] if setting else data[section]
            lines.append(f"| {name} | `{config_file._flow(value)}` | {why} |")
        return "\n".join(lines) + "\n"


def own_name(path: str | Path) -> str:
    """A folder's own name, which "." and ".." are not."""
    return os.path.basename(os.path.abspath(user_path(path)))


# Words in a label's name that a mirror would make wrong.
_SIDES = {
    "x": r"\b(left|right|l|r|lt|rt)\b",
    "y": r"\b(anterior|posterior|ventral|dorsal)\b",
    "z": r"\b(superior|inferior|upper|lower|cranial|caudal)\b",
}


def plan(
    case_set: CaseSet,
    path: str | Path,
    *,
    quick: bool = False,
    minutes: float | None = None,
    machine: Machine | None = None,
    measure: bool = True,
    data: dict[str, Any] | None = None,
    found: Fingerprint | None = None,
    base: tuple[Card, UNetConfig] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Choose a configuration for a dataset on a machine (this one).

    minutes: of training; else 3 hours on a CPU, 1 on a GPU, and 6 minutes with `quick`. measure: time a step of the network
    here (a few seconds), else estimate it. data: further entries of the section "data". base: card and network to fine-tune
    from, whose input and levels then hold.
    """
    machine = machine or Machine.here()
    again = partial(plan, case_set, path, quick=quick, minutes=minutes, measure=measure, data=data, base=base)
    if base is not None and (problem := misfit(base[0], None)):
        raise UserError(problem)
    clicked = base[0] if base is not None and base[0].data["task"] == "click" else None
    if clicked and len(case_set.channels) != 1:
        raise UserError(
            f"{clicked.name} is clicked on in one image, and each case has {len(case_set.channels)} "
            f"({', '.join(case_set.channels)}); make a dataset of one of them."
        )
    found = f = found or fingerprint(case_set, progress, in_lung=clicked is not None and expects_lung(clicked))
    if mixed := mixed_pixel_sizes(f.pixels):
        raise UserError(f"{mixed}.")
    if base is not None and (bare := next((name for name, unsized, _ in f.pixels if unsized), None)):
        check_pixel_size(f"Case {bare}", base[0])
    as_taken = bool(f.acquired) and (f.mixed if base is None else base[0].acquired)
    if as_taken:
        f = replace(f, shapes=[shape for shape, _ in f.acquired], spacings=[spacing for _, spacing in f.acquired])
    why: dict[str, str] = {}
    gpu = bool(machine.gpu)
    minutes = minutes or (6 if quick else 60 if gpu else 180)
    where = "a GPU" if gpu else f"{machine.cores} CPU cores"

    # Dimensions, and the frame (slice axis first in 2D).
    sizes = np.median(f.shapes, 0)
    # A volume's patches would be cut across the slices of some cases and along those of others.
    dims = 3 if sizes.min() >= FEW_SLICES and not as_taken else 2
    flat = 0 if as_taken else int(np.argmin(sizes))
    picture = bool(sizes.min() < 2)
    if base is not None:
        dims = base[0].dimensions
        if dims == 3 and picture:
            raise UserError(
                f"The images are single slices and {base[0].name} is a 3D model; start from a 2D model, or train a new one (no base)."
            )
        flat = base[0].slice_axis if dims == 2 and not picture else flat
    # Pictures do not say how they lie in the body.
    acquired = as_taken or (picture and flat == 0) or (base is not None and base[0].acquired)
    axis = "acquired" if acquired else list(SLICE_AXIS)[flat]
    order = [0, 1, 2] if dims == 3 else [flat, *(a for a in range(3) if a != flat)]
    context = 0 if dims == 3 or picture else 1
    why["input.dimensions"] = (
        f"the median image has {sizes.min():.0f} slices along its shortest axis, enough for a volume"
        if dims == 3
        else "the images are single slices"
        if picture
        else "the thick slices lie otherwise in the body from case to case, so each is seen as it was taken, with its neighbours"
        if as_taken
        else f"the median image has {sizes.min():.0f} slices only, too few to halve; each slice sees its neighbours"
    )

    # Spacing, (z, y, x) here.
    spacing = list(f.median_spacing)
    coarse = int(np.argmax(spacing))
    others = [s for a, s in enumerate(spacing) if a != coarse]
    text = "the cases' median"
    if dims == 3 and spacing[coarse] > 3 * max(others):
        spacing[coarse] = max(float(np.percentile([s[coarse] for s in f.spacings], 10)), max(others))
        text = "the cases' median; across the thick slices the 10th percentile, so that thin ones are not blurred"
    axes = order if dims == 3 else order[1:]
    physical = [float(np.median([n[a] * s[a] for n, s in zip(f.shapes, f.spacings)])) for a in range(3)]

    # The largest size of patch, in voxels, that a step may have.
    if dims == 3:
        budget = 160_000 if quick else 220_000 if not gpu else 2_100_000 if machine.gpu_memory > 20 << 30 else 1_000_000
        reach = 12 if quick else 40 if not gpu else 100
    else:
        budget = 192**2 if quick else 256**2 if not gpu else 512**2
        reach = 4 if quick else 8 if not gpu else 16
    median = math.prod(physical[a] / spacing[a] for a in axes)
    hints = list(case_set.notes)
    if f.offset:
        some = f"{', '.join(f.offset[:5])}{', …' * (len(f.offset) > 5)}"
        hints.append(f"The CT of {counted(len(f.offset), 'case')} ({some}) has no value below 0, {OFFSET}.")
    if median > reach * budget:
        # As coarse as the budget asks, but never so coarse that the smallest label is thinner than 6 voxels, nor its typical object
        # than 6 (quick: 4).
        factor = (median / (reach * budget)) ** (1 / len(axes))
        whole_mm, object_mm = _smallest(f)
        thin = min(whole_mm / 6, object_mm / 4) if quick else object_mm / 6
        wanted = [max(s, min(s * factor, thin)) for s in spacing]
        if any(wanted[a] > 1.01 * spacing[a] for a in axes):
            spacing = [wanted[a] if a in axes else spacing[a] for a in range(3)]
            median = math.prod(physical[a] / spacing[a] for a in axes)
            text += f", made coarser for {where}: the median image then has {median / 1e6:.1f} million voxels"
        if any(max(s, thin) * 1.25 < s * factor for s in (f.median_spacing[a] for a in axes)):
            hints.append(
                f"Its smallest objects are {object_mm:.3g} mm large, so the images are seen finer than usual on {where} and take longer "
                "to learn; give it more minutes."
            )
    same = dims == 2 and picture and len(set(f.spacings)) == 1 and spacing == list(f.median_spacing)  # not made coarser
    spacing = [float(f"{s:.3g}") for s in spacing]
    chosen: list[float | None] = [None if same or (dims == 2 and a == flat) else spacing[a] for a in (2, 1, 0)]
    why["input.spacing"] = "all pictures have the same" if same else text

    # Patch and network.
    shapes = np.array([[n[a] * s[a] / spacing[a] for a in axes] for n, s in zip(f.shapes, f.spacings)])
    large = np.percentile(shapes, 95, 0)
    raw = np.array([max(4.0, v) for v in large])
    whole = math.prod(raw) <= 1.3 * budget
    if not whole:
        raw = _shrunk(raw, [spacing[a] for a in axes], budget)
    top = 4 if quick else 6 if gpu else 5
    strides, kernels = _levels(raw, [spacing[a] for a in axes], top)
    if not strides and base is None:
        raise UserError(
            f"The images have {' x '.join(f'{v:.0f}' for v in large[::-1])} voxels, and a network needs at least 8 along one of the axes "
            "with the finest spacing; use larger images."
        )
    divisor = [math.prod(s[i] for s in strides) for i in range(dims)]
    patch = [max(d, (math.ceil(v / d - 0.01) if whole else round(v / d)) * d) for v, d in zip(raw, divisor)]
    why["input.patch"] = "it holds nearly every image whole" if whole else f"as large as a step on {where} allows (about {budget:,} voxels)"
    maps, cap = (32, 320) if gpu and not quick else (16, 96 if quick else 128)
    channels = [min(cap, maps * 2**i) for i in range(len(strides) + 1)]
    # Of hippocampi, after 300 s on one core: a Dice of 0.698 as before; 0.735 with half the maps at full size, 0.781 also with three
    # times the rate, 0.810 also with one patch a step.
    bold = quick and dims == 3 and not gpu
    if bold:
        channels[0] //= 2
    why["network.channels"] = (
        f"{len(channels)} levels, until about 4 voxels are left of an axis; {channels[0]} feature maps at full size for {where}"
        + (", where a step takes most of its time: with twice as many it took 1.6 times as long" if bold else "")
    )
    uneven = any(len(set(s)) > 1 for s in strides)
    if uneven:
        why["network.strides"] = "an axis of thick slices is not halved until the others are as coarse"
    supervise = not quick and len(channels) >= 4
    if supervise:
        why["network.deep_supervision"] = "coarse levels learn sooner, for a few percent of time"

    old: dict[str, Any] = {}
    pixels: dict[str, Any] = {}
    if base is not None:
        card, unet = base
        if unet.padding != "same":
            raise UserError(f"{card.name} has a network without padding, which cannot be fine-tuned here; choose another model.")
        old, text = unet.to_json(), f"that of {card.name}, which it is fine-tuned from"
        context, chosen = 0 if picture else card.context, list(card.spacing)
        patch, divisor = list(card.patch[3 - dims :]), list(unet.divisor)
        channels, strides, kernels = list(unet.channels), [list(v) for v in unet.strides], [list(v) for v in unet.kernels]
        supervise = unet.deep_supervision
        why |= dict.fromkeys(("input.dimensions", "input.spacing", "input.patch", "network.channels"), text)
        why.pop("network.strides", None)
        why.pop("network.deep_supervision", None)
        # Of something else the pixels may be of any size: of microscopy in pixels of 1.3 mm nothing would be left.
        pixels = {k: card.data.get(k) if same_labels(card, case_set) else None for k in ("pixel_mm", "field_px")}
        wanted_of = [
            spacing_for(Card({**card.data, **pixels}), Image(np.broadcast_to(np.uint8(0), n), v[::-1]))
            for n, v in zip(f.shapes, f.spacings)
        ]
        seen = np.array([[w[2 - a] or v[a] for a in axes] for w, v in zip(wanted_of, f.spacings)])
        shapes = np.array([[n[a] * v[a] for a in axes] for n, v in zip(f.shapes, f.spacings)]) / seen
        kept = np.median(seen, 0)
        size = np.median(shapes, 0)
        if sorted(size)[-2] < 8:  # of a volume the slices may be few
            raise UserError(
                f"With the spacing of {card.name} ({' x '.join(f'{k:.3g}' for k in kept[::-1])} mm) the median image has "
                f"{' x '.join(f'{max(1, v):.0f}' for v in size[::-1])} voxels, and a network needs at least 8 along two axes; check the "
                "images' spacing, start from a model of finer images, or train a new one (no base)."
            )

    if (dims == 3 or context) and f.single:
        raise UserError(
            f"Single slices are among the volumes ({', '.join(f.single[:5])}{', …' * (len(f.single) > 5)}); replace each by its whole "
            "volume, or leave it out."
        )

    # Intensity.
    names: list[str] = list(case_set.channels)
    ct = len(names) == 1 and (CT.search(names[0]) is not None or f.hu) and f.intensity["low"] < f.intensity["high"]
    intensity: dict[str, Any]
    if ct:
        intensity = {"mode": "ct-foreground", **{k: float(f"{v:.5g}") for k, v in f.intensity.items()}}
        intensity["std"] = max(intensity["std"], 1.0)
        why["input.intensity"] = "CT in HU: clipped to what the labels hold (0.5 to 99.5 %), then scaled by their mean and deviation"
    elif f.zeros > 0.3:
        intensity = {"mode": "zscore", "nonzero": True}
        why["input.intensity"] = f"each image by its own mean and deviation, without its empty background ({100 * f.zeros:.0f} % zeros)"
    else:
        intensity = {"mode": "zscore"}
        why["input.intensity"] = "each image by its own mean and standard deviation: its units mean nothing by themselves"

    if base is not None and (ct or f.hu or base[0].intensity["mode"] not in ("window", "ct-foreground")):
        intensity, why["input.intensity"] = dict(base[0].intensity), text

    # Mirrors.
    label_names = [label.name for label in case_set.labels]
    if told := numbered_instances(case_set.labels, np.array(f.counts) * np.prod(f.spacings, 1)[:, None], picture):
        hints.append(f"{told[0].upper()}{told[1:]}.")
    words_of = (re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", n) for n in label_names)  # LeftLung, KidneyR
    spoken = " ".join(re.sub(r"[_\W]+", " ", n.lower()) for n in words_of)
    barred = [a for a, words in _SIDES.items() if re.search(words, spoken)]
    where_wrong = f"the labels' names would be wrong along {', '.join(barred)}"
    named = set(barred)
    if sided := _sided(f) if not told and all(UNNAMED.fullmatch(name) for name in label_names) else {}:
        barred = sorted(sided)
        where_wrong = " and ".join(
            f"{label_names[i]} and {label_names[k]}, alike in size, lie in one order along {a} as sides do"
            for a, (i, k) in sorted(sided.items())
        )
    # Mirrors are of the slices' own axes, of which only x is mostly the body's: brains of coronal slices in an upper and a lower half, also
    # turned upside down, had a Dice of 0.453 after 5 epochs, else 1.000.
    if axis == "acquired" and (f.mixed and barred or named - {"x"}):
        barred, where_wrong = list("xyz"), "the labels' names would be wrong along an axis of the body, which may be any of a slice's own"
    former = base[0] if base is not None and same_task(base[0], case_set) else None
    if former is not None:
        barred = sorted(set("xyz") - set(former.data.get("flip_axes", ())))
    usable = {2 - a for a in axes}  # 0: x
    flips = [a for i, a in enumerate("xyz") if i in usable and a not in barred]
    why["input.flip_axes"] = (
        text if former is not None else "a mirrored image is as good an example" + (f", but {where_wrong}" if barred else "")
    )

    # Steps.
    precision = precision_here(Fit(accelerator="auto" if gpu else "cpu"))
    voxels = math.prod(patch)
    per_patch = _activation_bytes(patch, channels, strides, precision)
    room = max(0.0, 0.7 * (machine.gpu_memory if gpu else machine.memory) - _BASE_BYTES)
    few = 1 if bold and base is None else 2 if dims == 3 else 4
    wanted_batch = 8 if clicked else few if quick else 8 if dims == 3 else 12
    batch = max(1, min(wanted_batch, int(room // per_patch)))
    checkpointing = room < per_patch
    accumulate = math.ceil(wanted_batch / batch)
    why["fit.batch"] = (
        "as many lesions, each in another round of its clicks"
        if clicked
        else "small: many quick steps learn more in ten minutes than few large ones"
        if quick
        else f"the field's 8 to 16; a patch takes about {per_patch / 2**30:.2g} GB"
        + (f", so {accumulate} batches make a step" if accumulate > 1 else "")
    )
    if checkpointing:
        why["network.checkpointing"] = f"a patch would take {per_patch / 2**30:.1f} GB, more than there is"
    net: dict[str, Any] = {k: old[k] for k in ("norm", "activation", "residual", "down") if k in old}
    net |= {"channels": channels, "strides": strides, "kernels": kernels, "deep_supervision": supervise, "checkpointing": checkpointing}
    n_in, n_out = (5, 2) if clicked else (len(names) * (2 * context + 1), len(label_names) + 1)
    if gpu and (fault := mps_fault(UNetConfig(dims, n_in, n_out, **net))):  # the training would take the CPU
        made = again(machine=replace(machine, gpu="", gpu_memory=0), found=found)
        return replace(made, notes=(*made.notes, f"{fault}, so this is for the CPU."))
    second = None
    if measure:
        second = _measured(net, dims, n_in, n_out, patch, batch, precision, gpu)
        how = "measured here"
    if not second:
        second, how = _estimated(patch, channels, strides, kernels, n_in, batch, machine), "estimated"
    second = (second + batch * voxels * 2e-7 / (1 if not gpu else max(1, machine.cores - 1))) * accumulate  # with the patches' making
    if clicked:
        second += batch * _SAMPLE_SECONDS * accumulate
    tiles = (
        24
        if clicked
        else math.prod(max(1.0, math.ceil(2 * v / p - 1)) for v, p in zip(np.median(shapes, 0), patch)) * (1 if dims == 3 else sizes[flat])
    )
    one_case = 0.2 + second / accumulate / batch / 3 * tiles
    held = max(1, round(f.cases / min(5, max(2, f.patients))))
    checks = min(held, 6 if quick else 20)
    most = 50_000 if gpu else 25_000
    total = int(min(most, max(100, 60 * minutes / second)))
    epochs = 12 if quick else 100
    steps = max(1, total // epochs)
    every = int(min(5, max(1, math.ceil(checks * one_case / (0.2 * steps * second)))))
    while epochs % every:  # or the last epochs would train for nothing: only a validated one is kept
        every -= 1
    # Where all these cases take longer (of whole chests 20 to 35 minutes of a training of 6), fewer, then more rarely.
    afford = 0.3 * steps * second / one_case  # cases in an epoch
    checks = max(1, min(checks, int(every * afford)))
    if every * afford < 1:
        every = next((n for n in range(every, 26) if epochs % n == 0 and n * afford >= 1), epochs)
    if epochs * afford < 1:
        hints.append(
            f"To predict one whole case takes {_span(one_case)}, so that the training is checked once, on one, at its end; give it more "
            "minutes."
        )
    spent = checks * one_case / every
    steps = max(5 if quick else 1, int(steps * max(0.5, steps * second / (steps * second + spent))))
    total = epochs * steps
    why["fit.steps"] = (
        f"{total} steps of {second:.2g} s ({how}) and {counted(epochs // every, 'validation')} of about {checks * one_case:.0f} s fill "
        f"{_span(total * second + spent * epochs)}"
    )
    if every > 1:
        why["fit.validate_every"] = f"so that validation takes {100 * spent / (steps * second + spent):.0f} % of the time"
    why["fit.validate_cases"] = f"of {held} held-out cases a fold; unetseg-train evaluate scores all of them"
    shares = frequencies(f.counts)[1:]
    rare = min((v for v in shares if v > 0), default=1.0)
    foreground = 0.67 if rare < 1e-3 else 0.5
    rarest = label_names[int(np.argmin([v or 2 for v in shares]))]
    why["fit.foreground"] = (
        "every patch is about a click" if clicked else f"the rarest label ({rarest}) has {100 * rare:.2g} % of the voxels"
    )
    fit: dict[str, Any] = {
        "epochs": epochs,
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "foreground": foreground,
        "warmup": max(5, min(200, total // 20)),
        "ema": float(f"{min(0.999, max(0.9, 1 - 20 / total)):.4g}"),
        "validate_every": every,
        "validate_cases": checks,
        "patience": max(15, 3 * every),  # else one bad validation would be the end
        "minutes": float(f"{1.35 * minutes:.3g}") if quick else None,
    }
    if quick:
        fit["learning_rate"], why["fit.learning_rate"] = 3e-3, "higher than usual, as the training is to be short"
    if base is not None:
        fit["learning_rate"], why["fit.learning_rate"] = 3e-4, "lower than from scratch, so that what is known is changed and not lost"
    why["fit.ema"] = "an average over about the last twentieth of the training"
    if quick:
        why["fit.minutes"] = "the end in any case, should this machine be busier than when it was measured"
    folder = own_name(path)
    name = slug(folder)
    settings: dict[str, Any] = {
        "model": {
            "name": name,
            "title": name.replace("-", " "),
            "training_data": [f"{folder}: {counted(f.cases, 'case')} of {counted(f.patients, 'patient')}, less those held out"],
        },
        "data": {"path": str(user_path(path).absolute()), "layout": case_set.layout, **(data or {})},
        "labels": [_label(label, base[0] if base else None) for label in case_set.labels],
        "channels": names,
        "input": {
            "dimensions": dims,
            "axis": "axial" if dims == 3 else axis,
            "context_slices": context,
            "spacing": chosen,
            **pixels,
            "patch": patch,
            "intensity": intensity,
            "padding": base[0].data.get("padding", "zero") if base else "zero",
            "flip_axes": flips,
        },
        "network": net,
        "fit": fit,
    }
    if base is not None:
        model = settings["model"]
        model |= inherited(base[0], case_set, model["training_data"])
        if model.get("extent") == "box" and (longest := max(physical)) > crop_mm(base[0]):
            model["extent"] = "content"
            model.pop("surround", None)
            why["model.extent"] = f"the median image is {longest:.0f} mm long, no box around one target as those of {base[0].name}"
    if clicked:
        inside, count = f.in_lung or (0, 0)
        lung = count > 0 and inside >= IN_LUNG * count
        settings["model"] |= {"task": "click", "surroundings": "lung" if lung else "any"}
        why["model.task"] = text
        why["model.surroundings"] = f"{inside} of the {count} lesions have lung around them" if f.in_lung else text
    settings["data"]["folds"] = settings["data"].get("folds") or max(2, min(5, f.patients))
    seconds = total * second + spent * epochs
    return Plan(config_file.parse(settings, "the plan"), why, f, machine, tuple(hints), seconds, one_case)


def same_labels(card: Card, case_set: CaseSet) -> bool:
    return {label.key for label in card.labels} == {label.key for label in case_set.labels}


def same_task(card: Card, case_set: CaseSet) -> bool:
    """Whether a model of these cases could take that one's place: it takes the same images in the same order, by which they are given to
    it, and gives the same labels. A single one's name does not count."""
    own, have = ([name.casefold() for name in names] for names in (card.data["channels"], case_set.channels))
    return same_labels(card, case_set) and (own == have or len(own) == len(have) == 1)


def inherited(card: Card, case_set: CaseSet, learned: list[str]) -> dict[str, Any]:
    """What a model that goes on from another says as that one does: its licence, what it was trained on besides, and, where its
    labels are the same, what it is for and how it is used."""
    out = {"licence": card.data["licence"], "training_data": [*card.data.get("training_data", ()), *learned]}
    kept = (
        ("description", "tta", "extent", "surround", "roi_mm", "display", "postprocess", "second_opinion")
        if same_labels(card, case_set)
        else ()
    )
    return out | {k: card.data[k] for k in kept if k in card.data}


def _label(label: Label, base: Card | None) -> dict[str, Any]:
    """With its base's colour and codes where it has no codes of its own: file names and most tables of labels know neither."""
    of = label if label.terminology or base is None else next((own for own in base.labels if own.key == label.key), label)
    return {"name": label.name, "color": list(of.color) if of.color else None, "terminology": of.terminology or None}


def _span(seconds: float) -> str:
    return f"about {counted(max(1, round(seconds / 60)), 'minute')}" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def _sizes(f: Fingerprint) -> np.ma.MaskedArray:
    """mm3 of each label in each case, (cases, labels); masked where there is none."""
    return np.ma.masked_equal(np.array(f.counts, float)[:, 1:] * np.prod(f.spacings, 1)[:, None], 0)


def _smallest(f: Fingerprint) -> tuple[float, float]:
    """The diameters in mm of the ball (of few slices: the circle in them) of the smallest label's median size, and of the smallest
    typical object's."""
    shape = np.median(f.shapes, 0)
    flat, sizes = int(shape.argmin()), _sizes(f)
    if few := bool(shape[flat] < FEW_SLICES):
        sizes /= np.array(f.spacings)[:, flat, None]
    whole = np.ma.median(sizes, 0)
    part = np.ma.median(np.ma.masked_equal(f.objects or np.ones_like(f.counts)[:1, 1:], 0), 0)
    both = whole.min(), (whole * np.ma.filled(part, 1)).min()
    return tuple(2 * math.sqrt(v / math.pi) if few else 2 * (3 * v / (4 * math.pi)) ** (1 / 3) for v in both)  # type: ignore[return-value]


def _sided(f: Fingerprint) -> dict[str, tuple[int, int]]:
    """The axes along which two labels alike in size (one less than twice the other) lie in one order, more than a tenth of the image
    apart, in nine of ten cases and five at least; and these labels. A mirror makes one of the other: of unnamed lungs the Dice was 0.70
    after as many steps as gave 0.95 without mirrors along x."""
    sizes, centres = np.ma.median(_sizes(f), 0), np.array(f.centres)
    out: dict[str, tuple[int, int]] = {}
    for i, k in combinations(range(len(sizes) if f.centres else 0), 2):
        apart = centres[:, k] - centres[:, i]
        apart = apart[np.isfinite(apart[:, 0])]
        if len(apart) >= 5 and 0.5 < sizes[i] / sizes[k] < 2:
            share = np.maximum((apart > 0.1).mean(0), (apart < -0.1).mean(0))
            out = {a: (i, k) for a, s in zip("zyx", share) if s >= 0.9} | out
    return out


def _shrunk(shape: np.ndarray, spacing: Sequence[float], budget: float) -> np.ndarray:
    """The shape made smaller until it has `budget` voxels: the longest edges in mm first, so that a patch tends to a cube."""
    size = shape.astype(float).copy()
    while math.prod(size) > budget:
        mm = size * spacing
        size[int(np.argmax(np.where(size > 8, mm, 0)))] *= 0.95
        if (size <= 8).all():
            break
    return size


def _levels(size: np.ndarray, spacing: Sequence[float], most: int) -> tuple[list[list[int]], list[list[int]]]:
    """Strides and kernels: an axis is halved while 4 voxels would remain and it is not far coarser than the finest."""
    now, mm = np.array(size, float), np.array(spacing, float)
    strides: list[list[int]] = []
    kernels: list[list[int]] = []
    while True:
        fine = mm <= 2 * mm.min() * 1.001
        kernels.append([3 if f and n >= 3 else 1 for f, n in zip(fine, now)])
        stride = [2 if f and n >= 8 else 1 for f, n in zip(fine, now)]
        if len(strides) + 1 >= most or max(stride) == 1:
            return strides, kernels
        strides.append(stride)
        now, mm = now / stride, mm * stride


def _pyramid(patch: Sequence[int], channels: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """(voxels, feature maps) of each level."""
    out, voxels = [], float(math.prod(patch))
    for level, n in enumerate(channels):
        out.append((voxels, n))
        if level < len(strides):
            voxels /= math.prod(strides[level])
    return out


def _activation_bytes(patch: Sequence[int], channels: Sequence[int], strides: Sequence[Sequence[int]], precision: str) -> float:
    return _BYTES[precision] * sum(v * n for v, n in _pyramid(patch, channels, strides))


def _estimated(patch: Sequence[int], channels: Sequence[int], strides: Any, kernels: Any, n_in: int, batch: int, machine: Machine) -> float:
    """Seconds of a step from its arithmetic: forward and twice that backward, two convolutions down and two up a level."""
    flops, before = 0.0, n_in
    for (voxels, n), kernel in zip(_pyramid(patch, channels, strides), kernels):
        flops += 2 * voxels * math.prod(kernel) * (before * n + n * n + 3 * n * n)
        before = n
    return 3 * flops * batch / (20e12 if machine.gpu else machine.cores * 2.5e10)


def _measured(
    net: dict[str, Any], dims: int, n_in: int, n_out: int, patch: Sequence[int], batch: int, precision: str, gpu: bool
) -> float | None:
    """Seconds of a step of this network on this machine: the fastest of up to three after one to warm up; None where the
    memory does not do. On a CPU what the step itself used of it, so that a busy machine plans as an idle one."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "mps") if gpu else "cpu")
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)

    def wait() -> None:
        if gpu:
            getattr(torch, device.type).synchronize()

    try:
        with torch.random.fork_rng():
            model = build(UNetConfig(dims, n_in, n_out, **net)).to(device)
            optimizer = torch.optim.AdamW(model.parameters())
            x = torch.zeros(batch, n_in, *patch, device=device)
        times: list[float] = []
        begun = time.perf_counter()
        for _ in range(4):
            began, used = time.perf_counter(), time.process_time()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                out = model(x)
            first = out[0] if isinstance(out, list) else out
            first.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            wait()
            wall, cpu = time.perf_counter() - began, (time.process_time() - used) / torch.get_num_threads()
            times.append(wall if gpu else min(wall, 1.1 * cpu))
            if time.perf_counter() - begun > 20 and len(times) > 1:
                break
        return min(times[1:])
    except (RuntimeError, MemoryError):
        return None
