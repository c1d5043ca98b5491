"""What is wrong with annotated cases, before hours of training show it: each finding names the case and the cure."""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from UNetSegmentationLib.dataset import Dataset
from UNetSegmentationLib.files import UserError, atomic_path, counted, write_text
from UNetSegmentationLib.image import Box, length_unit
from UNetSegmentationLib.postprocess import components, voxel_counts

from .cases import IGNORE, Case, CaseSet, Mismatch, UnknownLabel, find_cases, mixed_pixel_sizes, numbered_instances

LEVELS = ("error", "warning", "note")
# Robust deviations (1.4826 MAD) from the cases' median beyond which a number is odd; for fewer cases nothing is said.
ODD, ENOUGH = 8.0, 8
# What counts as one deviation at least: of intensities this part of their usual range, of volumes a factor of 10 ** 0.1.
LEAST, LEAST_VOLUME = 0.08, 0.1
# An islet of at most so many voxels, beside a larger part of the same label, is what an eraser left.
SPECK = 3
# Intensities whose ranges differ by more between the cases are not on one scale (MR), and none is odd among them.
UNSCALED = 20.0
# A label is marked on separate slices only where no two of them, and these are so many, are neighbours, and all gaps are as wide, or one
# slice wider: of every fourth slice of hippocampi so in all of 24 cases, of 779 nodules in none.
SEPARATE = 3
CT = re.compile(r"\bct\b", re.IGNORECASE)  # in a channel's name
# With 1024 added, the 99.5 % of six CTs and of crops of more lay at 1410 to 1797; windows of 1000 HU that begin at 0 stay below.
OFFSET_ABOVE = 1100
OFFSET = "as if 1024 had been added to the HU; subtract the offset, or export it again with its rescale slope"
PICTURES = 12
_SHOWN = 5  # findings of one kind and level in the table


@dataclass(frozen=True)
class Finding:
    """case: "" where it is about all of them. level: "error" must be cured before training, "warning" looked at."""

    case: str
    kind: str
    level: str
    text: str
    cure: str

    def __str__(self) -> str:
        return f"{self.case + ': ' if self.case else ''}{self.text}; {self.cure}."


@dataclass
class Facts:
    """What is known of a case after it was read. numbers: of each channel and label, for the search for odd ones. islets: of each
    label, how many components are what an eraser left. separate: of labels marked on separate slices only, on how many of how many."""

    case: Case
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    digest: str
    moments: tuple[Any, ...]
    mask: str
    voxels: list[int]
    unsized: bool
    numbers: dict[str, float] = field(default_factory=dict)
    islets: dict[str, int] = field(default_factory=dict)
    separate: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Report:
    """findings: errors first. facts: of the cases that could be read."""

    case_set: CaseSet
    findings: list[Finding]
    facts: list[Facts]

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "error"]

    @property
    def bad(self) -> set[str]:
        """Names of the cases that cannot be trained on as they are."""
        return {f.case for f in self.errors if f.case}

    def data(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        facts = self.facts
        out: dict[str, Any] = {
            "source": str(self.case_set.source or ""),
            "layout": self.case_set.layout,
            "cases": len(self.case_set.cases),
            "annotated": len(self.case_set.annotated),
            "patients": len({c.patient for c in self.case_set.cases}),
            "channels": list(self.case_set.channels),
            "notes": list(self.case_set.notes),
            "errors": len(self.errors),
            "findings": [asdict(f) for f in self.findings],
        }
        out["labels"] = [
            {
                "value": label.value,
                "name": label.name,
                "cases": sum(f.voxels[label.value] > 0 for f in facts),
                "median_voxels": _median([f.voxels[label.value] for f in facts if f.voxels[label.value]]),
                "median_ml": _round(_median([f.voxels[label.value] * math.prod(f.spacing) / 1000 for f in facts if f.voxels[label.value]])),
            }
            for label in self.case_set.labels
        ]
        if facts:
            out["size"] = [
                [min(f.size[a] for f in facts), _median([f.size[a] for f in facts]), max(f.size[a] for f in facts)] for a in range(3)
            ]
            out["spacing"] = [[_round(v) for v in (min(s), _median(s), max(s))] for s in ([f.spacing[a] for f in facts] for a in range(3))]
        return out

    def json(self) -> str:
        return json.dumps(self.data(), indent=1, ensure_ascii=False)

    def table(self, width: int = 120) -> str:
        """The report as text of so many columns; of findings of one kind and level the first few are shown."""
        d = self.data()
        cases, patients = counted(d["cases"], "case"), counted(d["patients"], "patient")
        lines = [f"{cases} ({d['layout']}) of {patients}, channels {', '.join(d['channels'])}"]
        deep = any(f.size[2] > 1 for f in self.facts)
        unit = "voxels" if deep else "pixels"
        for label in d["labels"]:
            size = f", median {label['median_voxels']:g} {unit}" if label["cases"] else ""
            size += f" ({label['median_ml']:g} ml)" if size and deep else ""
            lines.append(f"  label {label['value']} {label['name']}: in {counted(label['cases'], 'case')}{size}")
        for key, of in (("size", unit), ("spacing", "mm")):
            if key in d:
                ranges = [f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, _, high in d[key]]
                lines.append(f"  {key} x, y, z: {'; '.join(ranges)} {of}")
        for text in d["notes"]:
            lines += textwrap.wrap(text, width, initial_indent="  note: ", subsequent_indent="        ")
        for (level, kind), group in groupby(self.findings, lambda f: (f.level, f.kind)):
            alike = list(group)
            for f in alike[: _SHOWN if len(alike) > _SHOWN + 1 else None]:
                lines += textwrap.wrap(f"{level:7} {kind:10} {f}", width, subsequent_indent=" " * 19, break_on_hyphens=False)
            if len(alike) > _SHOWN + 1:
                others = ", ".join(f.case or f.text for f in alike[_SHOWN:])
                lines += textwrap.wrap(
                    f"{'':18} and {len(alike) - _SHOWN} more: {others}", width, subsequent_indent=" " * 19, break_on_hyphens=False
                )
        counts = {level: sum(f.level == level for f in self.findings) for level in LEVELS}
        lines.append("nothing was found" if not self.findings else ", ".join(counted(n, level) for level, n in counts.items() if n))
        return "\n".join(lines)

    def worst(self) -> list[tuple[str, list[Finding]]]:
        """The cases with findings, those with errors first."""
        by_case: dict[str, list[Finding]] = defaultdict(list)
        for f in self.findings:
            if f.case:
                by_case[f.case].append(f)
        order = sorted(by_case, key=lambda c: (min(LEVELS.index(f.level) for f in by_case[c]), -len(by_case[c])))
        return [(c, by_case[c]) for c in order[:PICTURES]]

    def picture(self, path: str | Path) -> bool:
        """A PNG of the worst cases with their outlines; False, and nothing is written, where there is none."""
        worst = self.worst()
        if not worst:
            return False
        from matplotlib.figure import Figure

        from .report import fonts

        columns = min(4, len(worst))
        rows = math.ceil(len(worst) / columns)
        figure = Figure(figsize=(3.4 * columns, 4.0 * rows), dpi=110, facecolor="#0b0c0e")
        cases = {c.name: c for c in self.case_set.cases}
        for i, (name, findings) in enumerate(worst):
            axes = figure.add_subplot(rows, columns, i + 1, facecolor="black", xticks=[], yticks=[])
            _tile(axes, self.case_set, cases[name])
            title = f"{name}\n" + "\n".join(textwrap.wrap(f"{findings[0].kind}: {findings[0].text}", 46)[:4])
            axes.set_title(title, fontsize=7, color="#e8e8e8", parse_math=False, loc="left", family=fonts(title))
        figure.tight_layout()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", facecolor=figure.get_facecolor())
        return True


def _tile(axes: Any, case_set: CaseSet, case: Case) -> None:
    """The slice with most of the mask; where image and mask do not fit, the image's middle; else a line of text."""
    try:
        image = case_set.image(case)
        try:
            mask = case_set.load(case)[1]
            mask[mask == IGNORE] = 0
        except UserError:
            mask = np.zeros(image.shape, np.uint8)
    except UserError:
        axes.text(0.5, 0.5, "cannot be read", color="#9aa0a6", ha="center", transform=axes.transAxes)
        return
    axis = int(np.argmin(image.shape)) if min(image.shape) == 1 else 0  # a single slice may be coronal or sagittal
    mask = np.moveaxis(mask, axis, 0)
    z = int(mask.any(2).sum(1).argmax()) if mask.any() else len(mask) // 2
    values = np.nan_to_num(image.channels.take(z, axis + 1).astype(np.float32))
    values = np.moveaxis(values, 0, -1) if case_set.channels == ("red", "green", "blue") else values[0]
    low, high = np.percentile(values, (0.5, 99.5))
    pixels = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    dy, dx = np.delete(image.spacing[::-1], axis)
    axes.imshow(pixels, cmap="gray", aspect=dy / dx, origin="lower" if axis else "upper")
    axes.autoscale(False)
    rows, columns = (np.arange(-1, n + 1) for n in mask.shape[1:])
    for label in case_set.labels:
        if (mask[z] == label.value).any():
            color = tuple(c / 255 for c in label.color)
            axes.contour(columns, rows, np.pad(mask[z] == label.value, 1), levels=[0.5], colors=[color], linewidths=0.8)


# -------------------------------------------------------------------------------------------------------------- search


def check(case_set: CaseSet) -> Report:
    """Read every case and say what is wrong with it, with all of them, and with their splits."""
    findings: list[Finding] = []
    facts: list[Facts] = []
    for case in case_set.cases:
        try:
            facts.append(_facts(case_set, case, findings))
        except UserError as e:
            kind = {Mismatch: "geometry", UnknownLabel: "label"}.get(type(e), "unreadable")
            text, _, cure = str(e).removeprefix(f"Case {case.name}: ").rpartition("; ")
            findings.append(Finding(case.name, kind, "error", text or str(e), (cure or "export it again").rstrip(".")))
    told, _, cure = OFFSET.rpartition("; ")
    for name in case_set.channels:
        ranges = {f.case.name: (f.numbers[f"{name} lowest"], f.numbers[f"{name} highest"]) for f in facts}
        for case_name in offset_cases(name, ranges):
            text = f"its {name} has no value below 0 (0.5 % lie below {ranges[case_name][0]:.0f}), {told}"
            findings.append(Finding(case_name, "intensity", "warning", text, cure))
    findings += _of_all(case_set, facts)
    findings += _twins(facts) + _leaks(case_set) + _odd(case_set, facts)
    findings.sort(key=lambda f: (LEVELS.index(f.level), f.kind, f.case))
    return Report(case_set, findings, facts)


def _facts(case_set: CaseSet, case: Case, findings: list[Finding]) -> Facts:
    image, mask = case_set.load(case)
    values = np.ascontiguousarray(image.channels)
    numbers: dict[str, float] = {}
    islets: dict[str, int] = {}
    separate: dict[str, tuple[int, int]] = {}
    for name, channel in zip(case_set.channels, values):
        some = channel.ravel()[:: max(1, channel.size // 2_000_000)].astype(np.float64)
        if not np.isfinite(some).all():
            raise UserError("its image has voxels that are no numbers (NaN or infinite); repair it or leave it out.")
        for key, value in zip(("lowest", "median", "highest"), np.percentile(some, (0.5, 50, 99.5))):
            numbers[f"{name} {key}"] = float(value)
        if channel.min() == channel.max():
            findings.append(
                Finding(
                    case.name, "constant", "error", f"the image ({name}) is {channel.flat[0]:g} everywhere", "export it again or remove it"
                )
            )
    counts = voxel_counts(mask, IGNORE + 1)
    voxels = [int(n) for n in counts[: len(case_set.labels) + 1]]
    for label in case_set.labels:
        inside = mask == label.value if voxels[label.value] else None
        if inside is None:
            continue
        numbers[f"{label.name} inside"] = float(values[0][inside].mean())
        numbers[f"{label.name} volume"] = math.log10(voxels[label.value] * math.prod(image.spacing))
        box = Box.around(inside)
        assert box
        if counts[IGNORE]:  # what is judged in part only may end anywhere
            continue
        part = inside[box.slices]
        sizes = components(part, corners=True)[1][1:]
        if sizes.max() > 10 * SPECK and (specks := int((sizes <= SPECK).sum())):
            islets[label.name] = specks
        for axis in range(3):
            marked = np.flatnonzero(part.any(tuple({0, 1, 2} - {axis})))
            gaps = np.diff(marked)
            if len(marked) >= SEPARATE and gaps.min() > 1 and gaps.max() - gaps.min() <= 1:
                separate[label.name] = len(marked), int(marked[-1]) + 1
    if case.annotated and not any(voxels[1:]):
        findings.append(
            Finding(case.name, "empty", "warning", "its mask is empty", "mark something, or keep it if there is nothing to mark")
        )
    # Plane by plane: the squares of a whole CT in float64 take 630 MB.
    planes = values.reshape(-1, *values.shape[-2:])
    total, squares = (sum(float(power(p, dtype=np.float64).sum()) for p in planes) for power in (np.positive, np.square))
    if not math.isfinite(total):
        raise UserError("its image has voxels that are no numbers (NaN or infinite); repair it or leave it out.")
    moments = (tuple(sorted(values.shape)), f"{total:.9g}", f"{squares:.9g}", float(values.min()), float(values.max()))
    size: Any = image.shape[::-1]
    digests = []
    for array in (values, mask):
        digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
        digests.append(digest.hexdigest())
    return Facts(case, size, image.spacing, digests[0], moments, digests[1], voxels, length_unit(image) == "px", numbers, islets, separate)


def in_hu(low: float, high: float) -> bool:
    """Whether the 0.5 and 99.5 % of an image look like HU: air is at -1000 in nearly every CT; MR and pictures have nothing below 0."""
    return low < -300 and high - low > 500


def offset_cases(channel: str, ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """The cases whose CT looks as if 1024 had been added to its HU. ranges: the 0.5 and 99.5 % of the channel in each case; that it is
    CT is known by the channel's name, or by other cases, which look like HU."""
    if not CT.search(channel) and not any(in_hu(*ends) for ends in ranges.values()):
        return []
    return [case for case, (low, high) in ranges.items() if low >= 0 and high > OFFSET_ABOVE]


def _of_all(case_set: CaseSet, facts: Sequence[Facts]) -> list[Finding]:
    out = []
    known = [f for f in facts if f.case.annotated]
    patients = {f.case.patient for f in known}
    if not case_set.annotated:
        return [Finding("", "unmarked", "error", "no case has a mask", "annotate some")]
    if len(known) == 1 or len(patients) == 1:
        text = "there is one case only" if len(known) == 1 else f"all {len(known)} cases are of one patient"
        out.append(Finding("", "one case", "warning", text, "add cases of others: what is learned cannot be tested on anybody else"))
    if known and np.median([f.size for f in known], 0).min() >= 2:  # plan() then wants volumes
        cure = "replace it by its whole volume, or leave it out"
        out += [Finding(f.case.name, "slice", "warning", "it is a single slice among volumes", cure) for f in known if min(f.size) < 2]
    mixed = mixed_pixel_sizes([(f.case.name, f.unsized, f.spacing) for f in facts])
    sizes, pictures = [[n * math.prod(f.spacing) for n in f.voxels] for f in known], all(min(f.size) < 2 for f in known)
    instances = numbered_instances(case_set.labels, sizes, pictures)
    for kind, level, told in (("spacing", "error", mixed), ("instances", "warning", instances)):
        if told:
            text, _, cure = told.rpartition("; ")
            out.append(Finding("", kind, level, text, cure))
    for name, cases in early(case_set).items():
        text = f"added before the set had {name}, so trained as holding none of it ({counted(len(cases), 'case')}): {', '.join(cases)}"
        out.append(Finding("", "missing", "warning", text, "correct each again, or remove it"))
    bare = len(case_set.cases) - len(case_set.annotated)
    if bare:
        cure = "annotate them or leave them; they are not trained on"
        out.append(Finding("", "unmarked", "note", f"{counted(bare, 'case')} without a mask", cure))
    for label in case_set.labels:
        having = [f for f in known if f.voxels[label.value]]
        name = f"label {label.value} ({label.name})"
        if not having:
            some = "that can be read " * (len(known) < len(case_set.annotated))
            out.append(Finding("", "missing", "error", f"no case {some}has {name}", "annotate it, or take the label out"))
            continue
        separate = [f for f in having if label.name in f.separate]
        if 2 * len(separate) > len(having):  # one case may hold small lesions, far from each other
            marked, span = separate[0].separate[label.name]
            text = (
                f"{name} is marked on separate slices only in {len(separate)} of {counted(len(having), 'case')} (in "
                f"{separate[0].case.name} on {marked} of {span} between its first and last); the empty ones are trained as background"
            )
            out.append(Finding("", "gaps", "warning", text, "fill between slices in the Segment Editor, or label them ignore"))
        else:
            for f in having:
                if specks := f.islets.get(label.name):
                    text = f"{label.name} has {counted(specks, 'islet')} of at most {SPECK} voxels beside its main part"
                    out.append(Finding(f.case.name, "leftover", "warning", text, "erase what is left over, if it is not meant"))
        if len({f.case.patient for f in having}) == 1 < len(patients):
            text = f"only one patient has {name}, as in {having[0].case.name}"
            out.append(Finding("", "missing", "warning", text, "annotate it in more: it cannot be tested"))
        for split in sorted({f.case.split for f in known} - {""}):
            if not any(f.case.split == split for f in having):
                level = "error" if split == "train" else "warning"
                out.append(Finding("", "missing", level, f"no case in {split} has {name}", "split again, or annotate more"))
    return out


def early(case_set: CaseSet) -> dict[str, list[str]]:
    """{label: the cases of a training set that were added before it had that label}: nobody was asked whether they hold it. The index
    counts the voxels of each label that there was; a case with counts of one that is no longer there tells nothing, for it may have
    been renamed."""
    if case_set.layout != "unetseg" or case_set.source is None:
        return {}
    dataset = Dataset.open(case_set.source.parent if case_set.source.is_file() else case_set.source)
    names, here = {label.name for label in dataset.labels}, {c.name for c in case_set.cases}
    counts = {name: e.record.get("voxels_by_label", {}).keys() for name, e in dataset.entries.items() if name in here}
    kept = {label.key for label in case_set.labels}
    found = {d.name: [case for case, own in counts.items() if own and own <= names - {d.name}] for d in dataset.labels if d.key in kept}
    return {name: cases for name, cases in found.items() if cases}


def _twins(facts: Sequence[Facts]) -> list[Finding]:
    """The same voxels under two names, also turned or mirrored."""
    out = []
    same: dict[Any, list[Facts]] = defaultdict(list)
    for f in facts:
        same[f.moments].append(f)
    for group in same.values():
        for i, b in enumerate(group):
            a = next((a for a in group[:i] if a.digest == b.digest), group[0]) if i else None
            if a is None:
                continue
            if a.digest == b.digest:
                both = a.case.annotated and b.case.annotated
                differ = both and a.mask != b.mask
                marked = ", with another mask" if differ else ", with the same mask" if both else ""
                cure = "merge the masks, or keep the better one" if differ else "remove one of them"
                text = f"has the same voxels as {a.case.name}{marked}"
                out.append(Finding(b.case.name, "duplicate", "error" if differ else "warning", text, cure))
            else:
                text = f"may be {a.case.name} turned or mirrored (same shape, sum and range of values)"
                out.append(Finding(b.case.name, "duplicate", "warning", text, "remove one of them if it is"))
            in_a, in_b = (_split(f.case) for f in (a, b))
            if in_a != in_b:
                text = f"is in {in_b} and the same voxels are in {in_a} as {a.case.name}"
                out.append(Finding(b.case.name, "leak", "error", text, "keep it in one of the splits"))
            elif a.case.patient != b.case.patient:
                text = f"has the voxels of {a.case.name} but counts as another patient, so folds would leak"
                out.append(Finding(b.case.name, "leak", "error", text, "give both the same patient"))
    return out


def _split(case: Case) -> str:
    """What nobody has put elsewhere is trained on (nnU-Net's imagesTr): folds deal their validation out of it, and not the test."""
    return case.split or "train"


def _leaks(case_set: CaseSet) -> list[Finding]:
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for c in case_set.cases:
        splits[c.patient].setdefault(_split(c), c.name)
    return [
        Finding(
            list(where.values())[1],
            "leak",
            "error",
            f"its patient is in {' and '.join(where)} ({', '.join(where.values())})",
            "keep all cases of a patient in one split",
        )
        for where in splits.values()
        if len(where) > 1
    ]


def _odd(case_set: CaseSet, facts: Sequence[Facts]) -> list[Finding]:
    """Numbers far from the other cases'."""
    out: list[Finding] = []
    if len(facts) < ENOUGH:
        return out
    unscaled: set[str] = set()
    ranges: dict[str, list[float]] = {}
    for name in case_set.channels:
        ranges[name] = [f.numbers[f"{name} highest"] - f.numbers[f"{name} lowest"] for f in facts]
        low, high = np.percentile(ranges[name], (5, 95))
        if high > UNSCALED * max(low, 1e-12):
            unscaled.add(name)
            text = f"the intensities of {name} differ between cases by a factor of {high / max(low, 1e-12):.0f}"
            out.append(Finding("", "intensity", "note", text, "normalise each case by itself (z-score or percentiles)"))
    odd: dict[tuple[str, str], tuple[float, Finding]] = {}
    for key in sorted({k for f in facts for k in f.numbers}):
        name, _, what = key.rpartition(" ")
        first = case_set.channels[0] if what == "inside" else name
        if first in unscaled and what != "volume":
            continue
        least = LEAST_VOLUME if what == "volume" else LEAST * _median(ranges[first])
        for f, value, middle, far in _far([(f, f.numbers[key]) for f in facts if key in f.numbers], least):
            if what == "volume":
                text = f"{name} has {10**value / 1000:.3g} ml, the others {10**middle / 1000:.3g} ml (median)"
                out.append(Finding(f.case.name, "size", "warning", text, "look whether something is marked twice, or was forgotten"))
                continue
            if what == "inside":
                text = f"inside {name} the image is {value:.4g} on average, in the others {middle:.4g} ({far:.0f} deviations)"
                cure = "look whether the mask lies where it should"
                far = 0.0  # where the whole image is odd, that is what is said
            else:
                text = f"the {what} intensity of {name} is {value:.4g}, in the others {middle:.4g} ({far:.0f} deviations)"
                cure = "check its units (HU offset, slope) and what was scanned"
            where = f.case.name, first
            if where not in odd or far > odd[where][0]:
                odd[where] = far, Finding(f.case.name, "intensity", "warning", text, cure)
    out += [finding for _, finding in odd.values()]
    for axis, letter in enumerate("xyz"):
        for f, value, middle, _ in _far([(f, math.log(f.spacing[axis])) for f in facts], 0.01):
            ratio = math.exp(abs(value - middle))
            if ratio > 3:
                text = f"its spacing in {letter} is {math.exp(value):.3g} mm, the others' {math.exp(middle):.3g} mm (median)"
                out.append(Finding(f.case.name, "spacing", "warning", text, "check its header"))
    return out


def _far(values: Sequence[tuple[Facts, float]], least: float) -> list[tuple[Facts, float, float, float]]:
    """(facts, value, median, deviations) of those far from the median; least: the smallest deviation that counts as one."""
    if len(values) < ENOUGH:
        return []
    numbers = np.array([v for _, v in values])
    middle = float(np.median(numbers))
    spread = max(1.4826 * float(np.median(np.abs(numbers - middle))), least, 1e-9)
    far = np.abs(numbers - middle) / spread
    return [(f, v, middle, float(d)) for (f, v), d in zip(values, far) if d > ODD]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else 0.0


def _round(value: float) -> float:
    return float(f"{value:.4g}")


# ----------------------------------------------------------------------------------------------------------------- run


def run(
    path: str | Path,
    layout: str | None = None,
    *,
    json_file: str | Path | None = None,
    picture: str | Path | None = None,
    patient: str | None = None,
    only: Sequence[str] = (),
    foreground: bool = False,
    channels: Sequence[str] = (),
) -> int:
    """What `unetseg-train check` does: find the cases, print the table, write JSON and picture; the number of errors."""
    if picture and not str(picture).lower().endswith(".png"):
        raise UserError(f"{picture} would not be a PNG; end the picture's name in .png.")
    report = check(find_cases(path, layout, patient=patient, only=only, foreground=foreground, channels=channels))
    if str(json_file) == "-":
        print(report.json())
    else:
        if json_file:
            write_text(json_file, report.json())
        print(report.table())
    if picture:
        report.picture(picture)
    return len(report.errors)
