"""Annotated cases out of any layout that people keep them in: one CaseSet, whose load() gives image and label map.

Layouts (find_cases knows them by what a folder holds): "unetseg" (UNetSegmentationLib.dataset), "nnunet" (raw), "msd"
(dataset.json of the Medical Segmentation Decathlon), "monai" (datalist), "bids", "luna16" (.mhd + annotations.csv),
"lidc" (DICOM + the LIDC's XML contours), "dicom" (DICOM + RTSTRUCT or SEG), "pairs" (images/ + labels/, or both in one folder).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from UNetSegmentationLib.dataset import INDEX, Dataset, Mismatch, check_turn, distinct, map_values, plain_name, read_segments, segment_masks
from UNetSegmentationLib.files import UserError, user_path
from UNetSegmentationLib.image import (
    NO_SCAN,
    PICTURE_SUFFIXES,
    Image,
    is_grey,
    of_channels,
    on_print,
    print_spacing,
    read_image,
)
from UNetSegmentationLib.model import DEFAULT_COLORS, Label
from UNetSegmentationLib.postprocess import voxel_counts

JPEG = (".jpg", ".jpeg")
SUFFIXES = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", *PICTURE_SUFFIXES)
IMAGE_FOLDERS = ("imagesTr", "images", "image", "imgs", "img", "scans", "volumes")
LABEL_FOLDERS = ("labelsTr", "labels", "label", "masks", "mask", "segmentations", "segs", "seg")
# In one folder with the images, a mask is its image's name with one of these in place of one of those.
IMAGE_WORDS = ("", "_image", "_img", "_ct", "_mr", "_scan", "-image")
MASK_WORDS = ("_label", "_labels", "_mask", "_seg", "_segmentation", "_gt", "-label", "-mask", "-seg", "-segmentation", "_1stHO")
MASK_WORDS_PATTERN = re.compile(r".*[._-](labels?|masks?|seg|segmentation|gt|\dndho|\dstho)$", re.IGNORECASE)
# What a label is called whose name nobody wrote down.
UNNAMED = re.compile(r"label \d+|foreground")
# How far a mask's corners may lie from the image's, in voxels: headers written by other programs round.
TOLERANCE = 0.1
# A picture's mask with more values than these, which nobody has named, has soft edges or is a photograph.
GREYS = 32
# What load() gives where nobody has judged (nnU-Net's label "ignore"): neither trained on nor scored.
IGNORE = 255
# A map of label values is asked of at most so many files; check() reads all.
SCANNED = 200
SPLITS = {"training": "train", "train": "train", "validation": "validation", "val": "validation", "test": "test", "testing": "test"}
# What begins, or ends, many public names: the rest of the name is another scan or lesion of the same person.
PATIENTS = (
    r"(sub-[A-Za-z0-9]+)",
    r"(LIDC-IDRI-\d{4})",
    r"(LUNG1-\d{3})",
    r"(TCGA-\w{2}-\w{4})",
    r"(.+?)-IM-\d{4}-\d{4}",
)


T = TypeVar("T")


class UnknownLabel(UserError):
    """A mask with a label that the others do not know."""


class UnfitPattern(UserError):
    """A pattern of patients that fits no case's name."""


@dataclass(frozen=True)
class Case:
    """One case. images: a file or DICOM folder for each channel (a 4D or colour file holds several); label: the mask's file.

    reader: how the label map is made, a key of READERS. split: "train", "validation", "test" or "" (not decided).
    series: the UID, where a DICOM folder holds several; extra: what the reader needs besides (spheres of
    LUNA16, names of the structures that were made one label).
    """

    name: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None
    reader: str = "map"
    split: str = ""
    series: str = ""
    extra: tuple[Any, ...] = ()

    @property
    def annotated(self) -> bool:
        return self.label is not None or self.reader == "spheres"


@dataclass
class CaseSet:
    """Cases of one task. labels: values 1, 2, ... in order, as load() gives them; values: what the files hold -> those.

    A value of the files that maps to 0 is known and left out; one that maps to -1 is what load() gives as IGNORE.
    rest: what a value that values lacks is; None: an error.
    notes: what was assumed, a sentence each.
    """

    cases: tuple[Case, ...]
    labels: tuple[Label, ...]
    channels: tuple[str, ...]
    layout: str
    values: dict[int, int]
    notes: tuple[str, ...] = ()
    rest: int | None = None
    source: Path | None = None

    @property
    def annotated(self) -> tuple[Case, ...]:
        return tuple(c for c in self.cases if c.annotated)

    @property
    def ignores(self) -> bool:
        return -1 in self.values.values()

    def subset(self, cases: Iterable[Case]) -> CaseSet:
        return replace(self, cases=tuple(cases))

    def image(self, case: Case) -> Image:
        """The image alone, (z, y, x) or (c, z, y, x)."""
        with _named(case):
            image = read_image(case.images if len(case.images) > 1 else case.images[0], case.series or None)
            image = of_channels(image, len(self.channels))
            if image.n_channels != len(self.channels):
                raise UserError(
                    f"the image has {image.n_channels} channels, the others {len(self.channels)} ({', '.join(self.channels)}); "
                    "complete or remove it."
                )
            return image

    def load(self, case: Case) -> tuple[Image, np.ndarray]:
        """(image, label map uint8 (z, y, x) on its grid: 0, 1, 2, ..., or IGNORE). UserError names the case and the cure; without a
        mask all is 0."""
        image = self.image(case)
        with _named(case):
            if not case.annotated:
                return image, np.zeros(image.shape, np.uint8)
            try:
                return image, READERS[case.reader](self, case, image)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as e:
                if case.reader == "map" or case.label is None:
                    raise
                raise UserError(f"its annotation {case.label.name} is not as its format asks ({e}); export it again.") from e

    def marked(self, case: Case) -> bool:
        """Whether its mask holds any label."""
        mask = self.load(case)[1]
        return bool(((mask > 0) & (mask != IGNORE)).any())

    def digest(self, case: Case) -> str:
        """SHA-256 over the bytes of the case's files and how they are read: another digest, another case."""
        out = hashlib.sha256(self.how(case).encode())
        try:
            for path in (*case.images, *((case.label,) if case.label else ())):
                for file in files(path):
                    with open(file, "rb") as f:
                        while block := f.read(1 << 20):
                            out.update(block)
        except OSError as e:
            raise UserError(
                f"Case {case.name}: {e.filename} cannot be read ({e.strerror or e}); put it back, or take the case out of the dataset."
            ) from e
        return out.hexdigest()

    def how(self, case: Case) -> str:
        """How its files are read, beside what they hold."""
        rest: tuple[Any, ...] = () if self.rest is None else (self.rest,)
        rest += ("without its print's size",) * any(map(print_spacing, case.images))  # which versions before 2026-12 read as mm
        return repr((case.reader, case.series, case.extra, sorted(self.values.items()), *rest))

    def order(self, case: Case) -> tuple[str, ...]:
        """The labels' names, by whose order its mask is numbered where it holds named structures. Not part of digest(), by which a run
        knows its cases again: a run has its labels in its configuration."""
        return tuple(plain_name(label.name) for label in self.labels) if case.reader in NAMED and not case.extra else ()

    def number(self, name: str) -> int:
        """The value of a label by its name, whatever its case and punctuation; 0 if it is left out."""
        return next((label.value for label in self.labels if plain_name(label.name) == plain_name(name)), 0)


def files(path: Path) -> list[Path]:
    """The files of an image: all of a DICOM folder, and beside a header (.mhd, .nhdr) those that it names."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))  # the Finder writes .DS_Store
    if not path.name.lower().endswith((".mhd", ".nhdr")):
        return [path]
    found = re.search(r"^(?:ElementDataFile *=|data ?file:) *(.*?) *$(.*)", path.read_text("utf-8", "replace"), re.M | re.S | re.I)
    named, rest = found.groups() if found else ("LOCAL", "")
    if named == "LOCAL":
        return [path]
    if named.split()[:1] == ["LIST"]:
        names = rest.split("\n")
    elif numbered := re.fullmatch(r"(.*)(%\d*d)(\S*) (\d+) (\d+)(?: (\d+))?(?: \d+)?", named):
        before, number, after, first, last, step = numbered.groups()
        names = [f"{before}{number % i}{after}" for i in range(int(first), int(last) + 1, int(step or 1))]
    else:
        names = [named]
    return [path, *(path.parent / name.strip() for name in names if name.strip())]


def file_name(case: str) -> str:
    """A case's name as part of a file's name."""
    return re.sub(r"[^\w.-]", "_", case)[:80] or "case"


def evenly(cases: Sequence[Case], limit: int) -> list[Case]:
    """`limit` of the cases at most, evenly chosen."""
    step = max(1.0, len(cases) / max(1, limit))
    return [cases[int(i * step)] for i in range(min(limit, len(cases)))]


def folds(cases: Sequence[Case], k: int, seed: int = 20261122, marked: Callable[[Case], bool] | None = None) -> list[int]:
    """The fold of each case, the same for all of a patient: a fixed shuffle of the sorted patients, dealt out in turn.

    marked: whether a case's mask holds anything. A fold where none does could not be scored: a patient of it then changes places with
    a marked one of the fold that has most. All others stay where they are.
    """
    patients = sorted({c.patient for c in cases})
    if not 2 <= k <= len(patients):
        raise UserError(f"{len(patients)} patients cannot be dealt into {k} folds; choose 2 to {len(patients)}, or add cases.")
    order = np.random.default_rng(seed).permutation(len(patients))
    parts = [[patients[i] for i in order[f::k]] for f in range(k)]
    if marked is not None:
        known: dict[str, bool] = {}

        def has(patient: str) -> bool:  # asked as rarely as can be: each answer reads a case
            if patient not in known:
                known[patient] = any(marked(c) for c in cases if c.patient == patient)
            return known[patient]

        for bare in [part for part in parts if not any(map(has, part))]:
            most = max(parts, key=lambda part: sum(map(has, part)))
            if sum(map(has, most)) > 1:
                i = next(i for i, patient in enumerate(most) if has(patient))
                most[i], bare[0] = bare[0], most[i]
    fold = {patient: f for f, part in enumerate(parts) for patient in part}
    return [fold[c.patient] for c in cases]


def frequencies(counts: Sequence[Sequence[int]]) -> list[float]:
    """Of each class, its part of the voxels of the cases that hold it. counts: voxels of each class in each case."""
    table = np.array(counts, np.float64)
    totals = table.sum(1)
    return [float(c.sum() / totals[c > 0].sum()) if c.any() else 0.0 for c in table.T]


def find_cases(
    path: str | Path,
    layout: str | None = None,
    *,
    patient: str | None = None,
    only: Sequence[str] = (),
    foreground: bool = False,
    channels: Sequence[str] = (),
) -> CaseSet:
    """The cases of a folder (or of a datalist's or dataset.json's file) in whatever layout it has.

    patient: a pattern whose first group, found in a case's name, is its patient; UnfitPattern where none has it. only: names of the
    labels to keep. foreground: all labels become one. channels: names of those to read, in this order. Raises UserError where nothing
    fits.
    """
    path = user_path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give the folder with the images and masks.")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"{layout} is no known layout; choose one of {', '.join(LAYOUTS)}.")
    found = None
    for name, reads in LAYOUTS.items():
        if layout in (None, name) and (found := reads(path)):
            found.layout, found.source = name, path
            break
    if not found or not found.cases:
        what = (
            f"in the layout {layout}"
            if layout
            else "(images/ with labels/, nnU-Net, MSD, MONAI, BIDS, LUNA16, LIDC, DICOM with RTSTRUCT or SEG)"
        )
        raise UserError(f"{path} holds no annotated cases {what}; give the folder that holds both the images and their masks.")
    if not found.labels:
        raise UserError(f"{path} names no label but the background; name those that the masks hold.")
    distinct((label.name for label in found.labels), path)
    twice = [name for name, n in Counter(c.name for c in found.cases).items() if n > 1]
    if twice:
        raise UserError(f"{path} has two cases named {twice[0]}; rename one of them.")
    if patient is not None:
        found = _by_pattern(found, patient)
    if channels:
        found = _keep_channels(found, channels)
    if only:
        found = _keep_only(found, only)
    _check_jpegs(found, foreground)
    if not foreground:
        _check_greys(found)
        if len(found.labels) >= IGNORE:
            raise UserError(
                f"The masks hold {len(found.labels)} values, which are instances and not labels; use --foreground to make them one label."
            )
    else:
        kept = tuple(plain_name(label.name) for label in found.labels)
        one = Label(1, found.labels[0].name if len(found.labels) == 1 else "foreground", DEFAULT_COLORS[0], {})
        found = replace(found, labels=(one,), values={v: min(k, 1) for v, k in found.values.items()})
        # Numbered instances: other masks than those that were looked at have other numbers.
        found.rest = None if only or not all(UNNAMED.fullmatch(name) for name in kept) else 1
        found.cases = tuple(replace(c, extra=kept) if c.reader in NAMED else c for c in found.cases)
    return found


# ------------------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _named(case: Case) -> Iterator[None]:
    """Puts the case's name before a UserError raised inside."""
    try:
        yield
    except UserError as e:
        same = type(e) if type(e) in (Mismatch, UnknownLabel) else UserError
        raise same(f"Case {case.name}: {e}") from e


def stem(path: Path) -> str:
    """The file's name without the suffix of an image."""
    name = path.name
    if path.is_dir():
        return name
    found = next((s for s in SUFFIXES if name.lower().endswith(s)), None)
    return name[: -len(found)] if found else path.stem


def _is_picture(path: Path) -> bool:
    return path.name.lower().endswith(PICTURE_SUFFIXES)


def _by_pattern(cases: CaseSet, pattern: str) -> CaseSet:
    """The cases with the patients that the pattern finds in their names, and a note of how many it fits. The others keep theirs: with
    their names for it, scans of one patient that the layout knows would come into several folds."""
    try:
        known = re.compile(pattern)
    except re.error as e:
        raise UserError(f"{pattern!r} is no regular expression ({e}); give one whose first group is the patient.") from e
    matches = [(c, known.search(c.name)) for c in cases.cases]
    patients = [(c, m and m[min(1, known.groups)]) for c, m in matches]
    rest = [c.name for c, patient in patients if patient is None]
    if len(rest) == len(patients):
        raise UnfitPattern(
            f"The pattern {pattern!r} fits the name of no case, as {rest[0]}; correct --patient (data.patient), or leave it out."
        )
    note = f"The pattern {pattern!r} decides the patient of {len(patients) - len(rest)} of {len(patients)} cases"
    note += f"; the others, as {rest[0]}, keep theirs." if rest else "."
    kept = tuple(c if patient is None else replace(c, patient=patient) for c, patient in patients)
    return replace(cases, cases=kept, notes=(*cases.notes, note))


def _labels(names: Iterable[str]) -> tuple[Label, ...]:
    """Labels 1, 2, ... of these names."""
    return tuple(Label(i, name, DEFAULT_COLORS[(i - 1) % len(DEFAULT_COLORS)], {}) for i, name in enumerate(names, 1))


def _check_greys(cases: CaseSet) -> None:
    """Refuse pictures' masks with soft edges: many greys, or, where they are few (a mask made half as large has 64, 128 and 192), none
    that fills 3 x 3 pixels anywhere, and most of them beside white (of retinal vessels made 2 to 4 times as small 55 to 87 %), where
    dots and thin lines of classes are not. A single grey may be a class."""
    few = len(cases.labels) <= GREYS
    if (few and (len(cases.labels) < 3 or 255 not in cases.values)) or not all(UNNAMED.fullmatch(label.name) for label in cases.labels):
        return
    pictures = [c.label for c in cases.annotated if c.label and _is_picture(c.label)]
    found = _some(pictures, SCANNED, lambda path: (path, *_greys(path)))
    soft = few and not any(flat for _, _, flat, _ in found) and sum(most for *_, most in found) >= 0
    if path_n := next(((path, n) for path, n, *_ in found if n > (3 if soft else GREYS)), None):
        path, n = path_n
        raise UserError(
            f"{path} has {n} grey values; save it as 0 and 255, or use --foreground to take all but 0 as one label, or, if they are "
            "classes, name them in labels.json."
        )


def _greys(path: Path) -> tuple[int, bool, int]:
    """How many values a mask has, whether one between 0 and 255 fills 3 x 3 pixels, and how many more of their pixels touch white than
    do not."""
    array = _mask_map(path).array[0]
    middle = array[1:-1, 1:-1]
    rows, columns = middle.shape
    grey = (middle > 0) & (middle < 255)
    flat, beside = grey.copy(), np.zeros_like(grey)
    for y, x in np.ndindex(3, 3):
        part = array[y : y + rows, x : x + columns]
        flat &= part == middle
        beside |= part == 255
    return len({0, *map_values(array)}), bool(flat.any()), int(2 * beside[grey].sum() - grey.sum())


def _check_jpegs(cases: CaseSet, foreground: bool) -> None:
    """Refuse JPEGs of several labels, of which black and white alone are read; where all become one label, only if one would be black.
    The same grey in over 10 % of the files: of dots that are blurred as widely as they are large 24 % look so, by any grey."""
    masks = [c.label for c in cases.annotated if c.label and c.label.name.lower().endswith(JPEG)]
    found = _some(masks, SCANNED, lambda path: (path, _second_grey(path)))
    seen = [grey for _, grey in found if 0 < grey < (128 if foreground else 256)]
    several = max(([path for path, grey in found if grey and abs(grey - one) <= 8] for one in seen), key=len, default=[])
    if len(several) > 0.1 * len(found):
        raise UserError(f"Masks are JPEGs of several greys (as {several[0]}), which JPEG blurs; save them as PNG.")


def _second_grey(path: Path) -> int:
    """The darker one of the two greys that a JPEG's flat parts have most, 0 where they have one. Of pixels whose neighbours have their
    grey too: at the edges of a label JPEG has all of them. A soft edge has all as well, so that the second one must be a peak."""
    array = read_image(path).channels[0, 0].astype(np.int16)
    down, right = (np.abs(np.diff(array, axis=axis)) <= 8 for axis in (0, 1))
    flat = down[:-1, 1:-1] & down[1:, 1:-1] & right[1:-1, :-1] & right[1:-1, 1:]
    counts = np.bincount(array[1:-1, 1:-1][flat], minlength=256)
    near = np.convolve(counts, np.ones(17, int))[8:-8]
    beside = np.pad(near, 25)
    first = 40 + int(counts[40:].argmax())
    others = np.abs(np.arange(256) - first) > 40
    others[:40] = False
    second = int((near * others * (counts > 0)).argmax())
    peak = near[second] > max(20, 2 * beside[second], 2 * beside[second + 50])
    return min(first, second) if peak and counts[others].sum() > 0.01 * counts[40:].sum() else 0


def numbered_instances(labels: Sequence[Label], sizes: Sequence[Sequence[float]], pictures: bool = False) -> str:
    """What is wrong and what to do where masks seem to hold numbered instances, and no classes. sizes: of each case the mm3 of 0, 1, 2,
    ... They have no names, are not as many in each case, and differ in size by chance: between HeLa cells' numbers the variance of the
    log sizes was 2.4 times that within them (1.0 where cells are not tracked), less each case's mean 2.8. Sizes as they are looked so in
    98 of 100 simulated sets of muscles or lumbar vertebrae too, as bodies differ (in voxels in 94 of teeth or ribs), and less the mean
    alone in 100 of spines of which crops hold a part. In pictures also where a third of eight labels or more are in one case only, and
    those of a case much alike: cells that were tracked keep their sizes, whose logs have a deviation of 0.3 in a case."""
    present = [sum(n > 0 for n in own[1:]) for own in sizes]
    if len(labels) < 5 or len(set(present)) < 2 or not all(UNNAMED.fullmatch(label.name) for label in labels):
        return ""
    logs = np.ma.log(np.array(sizes)[:, 1:])  # masks what is not there
    n, k = logs.count(), np.count_nonzero(logs.count(0))
    tracked = pictures and len(labels) >= 8 and 3 * np.count_nonzero(logs.count(0) == 1) >= k and logs.std(1).mean() < 0.6
    for own in (logs, logs - logs.mean(1, keepdims=True)) if not tracked else ():
        within = ((own - own.mean(0)) ** 2).sum()
        between = ((own - own.mean()) ** 2).sum() - within
        if between * (n - k) > 5 * within * max(1, k - 1):
            return ""
    return (
        f"the {len(labels)} labels have no names, and differ in number and size from case to case as numbered instances do; name them "
        "in labels.json if they are classes, or learn instances as one label with --foreground"
    )


def mixed_pixel_sizes(found: Sequence[tuple[str, bool, Sequence[float]]]) -> str:
    """What is wrong and what to do where some pictures have a pixel size and others have none, and count as 1 mm. found: of each case its
    name, whether it has none, and its spacing (x, y, z) in mm."""
    bare = [name for name, unsized, _ in found if unsized]
    sizes = [min(spacing[:2]) for _, unsized, spacing in found if not unsized]
    if not bare or not sizes or 0.5 <= np.median(sizes) <= 2:  # of slices of 0.9 mm and their PNGs a network makes little
        return ""
    return (
        f"{len(bare)} of {len(found)} images have no pixel size ({', '.join(bare[:3])}{', ...' * (len(bare) > 3)}) and count as 1 mm, that "
        f"of the others is {np.median(sizes):.3g} mm; save all as TIFF with their pixel size, or all without one"
    )


def _numbered(names: dict[int, str]) -> tuple[tuple[Label, ...], dict[int, int]]:
    """Labels for the values of files, and those values' numbers."""
    order = sorted(v for v in names if v)
    return _labels(names[v] for v in order), {v: i for i, v in enumerate(order, 1)}


def _keep_only(cases: CaseSet, only: Sequence[str]) -> CaseSet:
    kept = []
    for name in only:
        number = cases.number(name)
        if not number:
            raise UserError(f"There is no label {name}; the cases have {', '.join(label.name for label in cases.labels)}.")
        if number not in kept:
            kept.append(number)
    new = {old: i for i, old in enumerate(kept, 1)}
    labels = tuple(replace(cases.labels[old - 1], value=i) for old, i in new.items())
    return replace(cases, labels=labels, values={v: new.get(k, min(k, 0)) for v, k in cases.values.items()})


def channel_places(own: Sequence[str], wanted: Sequence[str], key: Callable[[str], str] = str.casefold) -> list[int | None]:
    """Where each of the wanted channels is among one's own; None where it is not. Of two with one name each is found once."""
    left: list[str | None] = [key(name) for name in own]
    out: list[int | None] = []
    for name in map(key, wanted):
        out.append(left.index(name) if name in left else None)
        if out[-1] is not None:
            left[out[-1]] = None
    return out


def with_names(cases: CaseSet, names: Sequence[str]) -> CaseSet:
    """The cases with these names for their labels, in this order, where the dataset names none and there are as many."""
    if len(names) != len(cases.labels) or not all(UNNAMED.fullmatch(label.name) for label in cases.labels):
        return cases
    return replace(cases, labels=tuple(replace(label, name=name) for label, name in zip(cases.labels, names)))


def ordered_channels(cases: CaseSet, wanted: Sequence[str]) -> CaseSet:
    """The cases with their channels in this order where they have these and no others; as they are where they have others.

    Raises UserError for channels in another order that lie in one file."""
    if len(wanted) != len(cases.channels) or None in channel_places(cases.channels, wanted):
        return cases
    return _keep_channels(cases, wanted, str.casefold)


def _keep_channels(cases: CaseSet, channels: Sequence[str], key: Callable[[str], str] = plain_name) -> CaseSet:
    places = channel_places(cases.channels, channels, key)
    if None in places:
        raise UserError(f"There is no channel {channels[places.index(None)]}; the cases have {', '.join(cases.channels)}.")
    at = [i for i in places if i is not None]
    together = next((c for c in cases.cases if len(c.images) != len(cases.channels)), None)
    if together and at != list(range(len(cases.channels))):
        raise UserError(f"Case {together.name} holds its channels in one file, so none can be left out or moved; save each in its own.")
    kept = cases.cases if together else tuple(replace(c, images=tuple(c.images[i] for i in at)) for c in cases.cases)
    return replace(cases, cases=kept, channels=tuple(cases.channels[i] for i in at))


def _patients(cases: list[Case], notes: list[str]) -> list[Case]:
    """Patients by the known patterns of names, and by left and right of one person; one that a list gave stays."""
    names = {c.name for c in cases}
    out = []
    for case in cases:
        patient = next((m[1] for p in PATIENTS if (m := re.match(p, case.name))), None)
        side = re.fullmatch(r"(.*?)[_-]?(L|R|left|right)", case.name)
        other = {"L": "R", "R": "L", "left": "right", "right": "left"}
        if patient is None and side and case.name[: -len(side[2])] + other[side[2]] in names:
            patient = side[1]
        out.append(replace(case, patient=patient or case.name) if case.patient == case.name else case)
    named = [new.patient for old, new in zip(cases, out) if old.patient == old.name]
    if len(set(named)) < len(named):
        notes.append(f"{len(set(named))} patients were recognised in the names of {len(named)} cases.")
    return out


def _left_out(what: str, names: Sequence[str], notes: list[str]) -> None:
    """A note of what is not trained on, if there is any."""
    if names:
        notes.append(f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) and are left out.")


def _present(cases: list[Case], notes: list[str]) -> list[Case]:
    """Without those that have neither a mask nor an image: a list names a challenge's test images, which few people download."""
    gone = {c for c in cases if not c.annotated and not all(p.exists() for p in c.images)}
    _left_out("images without a mask are not on the disk", sorted(c.name for c in gone), notes)
    return [c for c in cases if c not in gone]


def _table_of_patients(folder: Path, cases: list[Case], notes: list[str]) -> list[Case] | None:
    """Patients from a table beside the images: index.csv, patients.csv or cases.csv with the columns file or case, and patient."""
    for table in (folder / name for name in ("index.csv", "patients.csv", "cases.csv")):
        rows = _rows(table) if table.is_file() else []
        key = next((k for k in ("file", "case", "name") if rows and k in rows[0]), None)
        if rows and not (key and "patient" in rows[0]):
            if key and table.name == "patients.csv":
                raise UserError(
                    f'{table} lacks a column "patient"; name its column so, lest folds mix patients, or put the table elsewhere '
                    "if it is not of the cases."
                )
            notes.append(f'{table} lacks a column "case" (or "file") or a column "patient", and is not read.')
        elif key:
            named = [(r[key].replace("\\", "/").rpartition("/")[2], r["patient"]) for r in rows]
            known = {stem(Path(name)): patient for name, patient in named if patient}
            known |= {name: patient for name, patient in named if patient}  # p1.v2 is no file p1 of the suffix v2
            out = []
            for case in cases:
                names = (case.name, *(stem(p) for p in (*case.images, case.label) if p))
                patient = next((known[n] for n in names if n in known), None)
                if patient is None and (case.split == "test" or case.label is None):  # is in no fold
                    patient = case.patient
                elif patient is None:
                    raise UserError(f"{table} names no patient of {case.name}; give each case its line, lest folds mix patients.")
                out.append(replace(case, patient=patient))
            return out
    return None


def _read_text(path: Path, code_page: str = "") -> str:
    """A text as people save it: Windows' programs write UTF-8 with a mark, UTF-16 ("Unicode text" of Excel) or the country's code page,
    which nothing tells: Wątroba in Polish became W¹troba. code_page: taken for any, as in a table of patients, who need but be distinct."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); check your rights and the disk.") from e
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        if not code_page:
            raise UserError(f"{path} is not in UTF-8, so that its names cannot be read; save it as UTF-8.") from e
        return data.decode(code_page, "replace")


def _rows(table: Path) -> list[dict[str, str]]:
    """The rows of a table as people save it: in many countries with semicolons, its heads in any case, and empty lines at its end."""
    text = _read_text(table, "cp1252")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    cells = ([cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    heads, *rows = [row for row in cells if any(row)] or [[]]
    heads = [head.casefold() for head in heads]
    return [dict.fromkeys(heads, "") | dict(zip(heads, row)) for row in rows]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(_read_text(path))
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}); correct it.") from e
    return data if isinstance(data, dict) else None


def _label_names(folder: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Names by value, of labels.json ({"1": name} or {name: 1}), else of a look-up table, ITK-SNAP's labels.txt."""
    if (folder / "labels.json").is_file():
        return _by_value(_read_json(folder / "labels.json") or {}), {}
    if (folder / "labels.txt").is_file():
        lines = re.findall(r'^\s*(\d+)\s.*"(.*)"\s*$', _read_text(folder / "labels.txt"), re.MULTILINE)
        return {}, {int(v): n for v, n in lines if int(v)}
    return {}, {}


def _by_value(names: dict[str, Any]) -> dict[int, str]:
    """{"1": name} or {name: 1}, without the background."""
    pairs = [(k, v) if str(k).isdigit() else (v, k) for k, v in names.items()]
    return {int(v): str(n) for v, n in pairs if str(v).isdigit() and int(v)}


def _mask_map(path: Path) -> Image:
    """A label map as it stands in its file: one channel of whole numbers."""
    mask = read_image(path)
    channels = mask.channels
    picture = _is_picture(path)
    if picture and len(channels) in (2, 4):  # the last is its transparency; in a volume it would be one class of several
        channels = channels[:-1]
    if len(channels) == 3 and picture and (numbers := _palette_numbers(path)) is not None:
        channels = numbers[None, None]
    if len(channels) == 3 and is_grey(channels):
        channels = channels[:1]
    if len(channels) == 3 and picture:
        raise UserError(f"{path} is a coloured picture; save its mask as one grey channel, a value for each label.")
    if len(channels) > 1:
        raise UserError(f"{path} holds {len(channels)} channels; save one label map.")
    array = channels[0]
    if path.name.lower().endswith(JPEG):  # lossy: what was 0 and 255 is near them
        array = np.where(array > 127, 255, 0).astype(np.uint8)
    if array.dtype.kind == "f":
        whole = np.rint(array)
        if not np.isfinite(array).all() or np.abs(array - whole).max(initial=0) > 1e-3:
            raise UserError(f"{path} holds numbers that are not whole; it is no label map (probabilities?). Save the labels.")
        array = whole.astype(np.int32)
    if array.min(initial=0) < 0:
        raise UserError(f"{path} holds the negative value {array.min()}; it is no label map (an image?). Give the masks.")
    return mask.like(array)


def _palette_numbers(path: Path) -> np.ndarray | None:
    """The numbers (y, x) of a picture with a palette, as PASCAL VOC's and many labelling tools' masks: the colours are for the eye.

    None where the whole palette is grey: such a mask is meant by its greys, which may stand in any order. What is used of the palette
    does not count, lest a mask of the white class alone is 255 and one with the red class too is 1 and 2.
    """
    from PIL import Image as Picture

    with Picture.open(path) as picture:
        if picture.mode != "P":
            return None
        palette = np.reshape(picture.getpalette("RGB") or [], (-1, 3))
        return np.array(picture) if (palette != palette[:, :1]).any() else None


def _found_values(path: Path) -> Image:
    """The values of a mask, as an image of them: masks themselves would fill the memory."""
    return Image(np.array([[[0, *map_values(_mask_map(path).array)]]]))


def _some(paths: Sequence[Path], n: int, read: Callable[[Path], T]) -> list[T]:
    """At most n of the files, spread over all. One that cannot be read is its case's affair, unless none can."""
    out, error = [], None
    for i in np.unique(np.linspace(0, len(paths) - 1, min(len(paths), n)).astype(int)):
        try:
            out.append(read(paths[i]))
        except UserError as e:
            error = e
    if error and not out:
        raise error
    return out


def _named_values(
    paths: Sequence[Path], names: dict[int, str], table: dict[int, str], notes: list[str]
) -> tuple[tuple[Label, ...], dict[int, int]]:
    """Labels and values of plain maps. names: those that the dataset says it has; table: names of any program's values (FreeSurfer's
    has 1300), of which only those count that occur: then all masks are looked at."""
    each = [set(mask.array.ravel().tolist()) - {0} for mask in _some(paths, len(paths) if table else SCANNED, _found_values)]
    values = set[int]().union(*each)
    here = {v: n for v, n in table.items() if v in values}
    names = here | names
    _left_out("names of the table of labels occur in no mask", [n for v, n in table.items() if v not in here], notes)
    if not values and not names:
        raise UserError(f"All masks are empty ({paths[0]} and the others); give the masks that mark something.")
    if len(values) == 1 and not names:
        value = next(iter(values))
        if value != 1:
            notes.append(f"The masks hold 0 and {value}; {value} is taken as label 1.")
        return _labels(["foreground"]), {value: 1}
    if 255 in values and not names and all(len(own) < 2 for own in each):
        notes.append(f"Some masks hold 0 and 255, others 0 and {', '.join(map(str, sorted(values - {255})))}; all are taken as one label.")
        return _labels(["foreground"]), dict.fromkeys(sorted(values), 1)
    labels, numbers = _numbered({v: names.get(v, f"label {v}") for v in values | set(names)})
    if any(v != k for v, k in numbers.items()):
        notes.append("The masks' values " + ", ".join(map(str, numbers)) + f" are numbered 1 to {len(numbers)}.")
    return labels, numbers


def _picture_channels(cases: Sequence[Case], notes: list[str]) -> tuple[str, ...]:
    """The channels of single-file images, by some of them."""

    def seen(path: Path) -> tuple[int, bool, bool]:  # and not the images, of which six CTs are 1 to 4 GB
        image = read_image(path)
        hu = image.array.dtype.kind == "i" and bool(-3100 <= image.array.min() < -200)
        return image.n_channels, not is_grey(image.channels), hu

    found = _some([c.images[0] for c in cases], 6, seen)
    n = found[0][0]
    if _is_picture(cases[0].images[0]) and n in (2, 3, 4):
        colour = n > 2 and any(coloured for _, coloured, _ in found)
        if not colour:
            notes.append("The pictures are grey, stored in colour; one channel is read.")
        return ("red", "green", "blue") if colour else ("image",)
    if n > 1:
        return tuple(f"channel {i}" for i in range(n))
    if all(hu for _, _, hu in found):
        notes.append("The images are taken as CT in HU, by their values.")
        return ("CT",)
    return ("image",)


def _scans(folder: Path) -> list[Path]:
    """Image files, and subfolders that hold a DICOM series each. Jupyter leaves .ipynb_checkpoints, a Synology @eaDir, macOS __MACOSX."""
    places = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "@", "__")))
    return _files(folder) + sorted(p for p in places if any(q.is_file() for q in p.iterdir()))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))


def _inside(base: Path, name: Any) -> Path:
    """A path out of a JSON file, relative to it."""
    if not isinstance(name, str):
        raise UserError(f"{base} names {name!r} where a file is wanted; correct the list.")
    path = user_path(name.replace("\\", "/"))  # a list that was written on Windows
    return path if path.is_absolute() else base / path


# ------------------------------------------------------------------------------------------------------------- readers


def _fitting(image: Image, mask: Image, path: Path) -> np.ndarray:
    """The mask's array if it lies on the image's grid."""
    check_turn(image, mask)
    if mask.shape != image.shape:
        raise Mismatch(
            f"its mask {path.name} has {' x '.join(map(str, mask.shape[::-1]))} voxels and its image "
            f"{' x '.join(map(str, image.shape[::-1]))}; resample the mask to the image, or give the right one."
        )
    tolerance = TOLERANCE * min(image.spacing)
    if not _is_picture(path) and not any(i.same_grid(mask, tolerance) for i in (image, on_print(image))):
        corners = ((0, 0, 0), tuple(n - 1 for n in image.shape[::-1]))
        far = max(math.dist(image.index_to_point(c), mask.index_to_point(c)) for c in corners)
        raise Mismatch(
            f"its mask {path.name} lies up to {far:.2f} mm beside its image (another spacing, origin or direction); "
            "resample it to the image, or copy the image's header if only the header is wrong."
        )
    return mask.array


def _read_map(cases: CaseSet, case: Case, image: Image) -> np.ndarray:
    assert case.label
    array = _fitting(image, _mask_map(case.label), case.label)
    known = {0: 0, **cases.values}
    there = map_values(array)
    bad = [v for v in there if v not in known]
    if cases.rest is not None:
        known.update(dict.fromkeys(bad, cases.rest))
    elif bad:
        listing = ", ".join(f"{v} {cases.labels[k - 1].name}" for v, k in cases.values.items() if k > 0)
        raise UnknownLabel(
            f"its mask {case.label.name} holds the unknown label {bad[0]} (known: {listing}); correct the mask or name the label."
        )
    if all(v == known[v] for v in there):
        return array.astype(np.uint8)
    out = np.zeros(array.shape, np.uint8)
    for value in there:
        if known[value]:
            out[array == value] = known[value] if known[value] > 0 else IGNORE
    return out


def _number(cases: CaseSet, case: Case, name: str) -> int:
    """The value of a named mask; the case's extra are the names that were made one label."""
    return int(plain_name(name) in case.extra) if case.extra else cases.number(name)


def _painted(cases: CaseSet, case: Case, image: Image, named: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """Named masks as one map; where several claim a voxel the later label wins: a tumour over its organ. A label that a larger one
    takes most of, or that is gone, is refused; a GTV may take any part of its CTV."""
    n = len(cases.labels) + 1
    out, sizes, taken = np.zeros(image.shape, np.uint8), np.zeros(n, int), np.zeros((n, n), int)
    for name, mask in named:
        if number := _number(cases, case, name):
            low, high = np.minimum(number, range(n)), np.maximum(number, range(n))
            shared = sum(np.bincount(before[now], minlength=n) for before, now in zip(out, mask))
            taken[low, high] = np.maximum(taken[low, high], shared)  # where a file has a name twice, it may be twice the same
            sizes[number] = max(sizes[number], np.count_nonzero(mask))
            np.maximum(out, np.where(mask, np.uint8(number), np.uint8(0)), out=out)
    lost = (2 * (taken * (sizes > sizes[:, None])).sum(1) > sizes) | ((voxel_counts(out, n) == 0) & (sizes > 0))
    lost[0] = False
    if lost.any() and not case.extra:
        raise UserError(
            f"later labels cover most of {' and of '.join(cases.labels[i - 1].name for i in np.flatnonzero(lost))}, which would be lost; "
            "name the labels to keep with --only, those that lie on others last."
        )
    return out


def _read_segments(cases: CaseSet, case: Case, image: Image) -> np.ndarray:
    """A .seg.nrrd, whose grid Slicer crops to what is marked."""
    assert case.label
    return _painted(cases, case, image, ((label.name, mask) for label, mask in segment_masks(case.label, image)))


def fill(polygons: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels (y, x) whose centres lie inside the closed polygons ((n, 2) of x, y in pixels); what lies in two is outside."""
    height, width = shape
    crossings = np.zeros((height, width + 1), np.int64)
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0)):
            if y0 > y1:
                x0, y0, x1, y1 = x1, y1, x0, y0
            rows = np.arange(max(0, math.ceil(y0)), min(height, math.ceil(y1)))
            if len(rows):
                at = x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
                np.add.at(crossings, (rows, np.clip(np.ceil(at), 0, width).astype(int)), 1)
    return (np.cumsum(crossings, 1)[:, :width] % 2).astype(bool)


def _check_gaps(mask: np.ndarray, name: str, file: Path) -> None:
    """Refuse what was drawn on a series of thicker slices, which would teach that there is nothing between; scattered single-slice
    lesions do not lie over one another."""
    marked = np.flatnonzero(mask.any((1, 2)))
    gap = int(np.diff(marked).min()) if len(marked) > 2 else 1
    if gap > 1 and any((mask[a] & mask[b]).any() for a, b in pairwise(marked) if b - a == gap):
        raise UserError(
            f"{name} in {file.name} is marked on one slice in {gap} only; give the series that it was drawn on, or interpolate it between."
        )


def _read_contours(cases: CaseSet, case: Case, image: Image) -> np.ndarray:
    """An RTSTRUCT: the voxels whose centres lie inside a contour of their slice."""
    assert case.label
    file = case.label
    dataset = _dicom(file)
    names = {r.ROINumber: str(r.ROIName) for r in dataset.StructureSetROISequence}
    inverse = np.linalg.inv(image.matrix)

    def masks() -> Iterator[tuple[str, np.ndarray]]:
        for roi in dataset.get("ROIContourSequence", ()):
            name = names.get(roi.ReferencedROINumber, "")
            if not _number(cases, case, name):
                continue
            slices: dict[int, list[np.ndarray]] = defaultdict(list)
            for contour in roi.get("ContourSequence", ()):
                kind = contour.ContourGeometricType.replace("_", "")
                if not kind.startswith("CLOSEDPLANAR"):  # also CLOSEDPLANAR_XOR
                    continue
                points = np.array(contour.ContourData, float).reshape(-1, 3) @ inverse[:3, :3].T + inverse[:3, 3]
                z = points[:, 2]
                k = int(np.rint(z.mean()))
                if np.ptp(z) > 0.5 or abs(z.mean() - k) > 0.3:  # those of thinner slices would meet in one, and cancel each other
                    raise UserError(f"the contours of {name} in {file.name} do not lie in its scan's slices; resample the scan to them.")
                if not 0 <= k < image.shape[0]:
                    raise UserError(f"a contour of {name} in {file.name} lies outside its scan; export both together again.")
                # One that stands twice would cancel itself, which is meant by an XOR only.
                if kind.endswith("XOR") or not any(np.array_equal(p, points[:, :2]) for p in slices[k]):
                    slices[k].append(points[:, :2])
            mask = np.zeros(image.shape, bool)
            for k, polygons in slices.items():
                mask[k] = fill(polygons, image.shape[1:])
            _check_gaps(mask, name, file)
            yield name, mask

    return _painted(cases, case, image, masks())


def _read_dicom_seg(cases: CaseSet, case: Case, image: Image) -> np.ndarray:
    """A DICOM SEG on its scan's grid, frame by frame by position."""
    assert case.label
    dataset = _dicom(case.label)
    names = {s.SegmentNumber: str(s.SegmentLabel) for s in dataset.SegmentSequence}
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    limit = 0.5 * float(dataset.get("MaximumFractionalValue", 1)) if dataset.SegmentationType == "FRACTIONAL" else 0.5
    shared = dataset.SharedFunctionalGroupsSequence[0]

    def entry(group: Any, sequence: str) -> Any:
        return (group if sequence in group else shared)[sequence][0]

    masks: dict[str, np.ndarray] = {}
    axes = np.reshape(image.direction, (3, 3)).T
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence):
        orientation = np.array(entry(group, "PlaneOrientationSequence").ImageOrientationPatient, float).reshape(2, 3)
        spacing = [float(v) for v in entry(group, "PixelMeasuresSequence").PixelSpacing][::-1]
        at = np.array(image.point_to_index([float(v) for v in entry(group, "PlanePositionSequence").ImagePositionPatient]))
        x, y, z = np.rint(at).astype(int)
        whole = np.abs(at - (x, y, z)).max() < 0.1 and np.allclose(spacing, image.spacing[:2], rtol=1e-3)
        if not (whole and np.allclose(orientation, axes[:2], atol=1e-3)):
            raise UserError(f"{case.label} does not lie on the grid of its scan; convert it to a label map on that grid.")
        h, w = frame.shape
        if x < 0 or y < 0 or not 0 <= z < image.shape[0] or y + h > image.shape[1] or x + w > image.shape[2]:
            raise UserError(f"{case.label} reaches outside its scan; export scan and segmentation together again.")
        if dataset.SegmentationType == "LABELMAP":
            parts = [(number, frame == number) for number in map_values(frame)]
        else:
            parts = [(entry(group, "SegmentIdentificationSequence").ReferencedSegmentNumber, frame > limit)]
        for number, part in parts:
            masks.setdefault(names[number], np.zeros(image.shape, bool))[z, y : y + h, x : x + w] |= part
    for name in (name for name in masks if _number(cases, case, name)):
        _check_gaps(masks[name], name, case.label)
    return _painted(cases, case, image, masks.items())


def _read_spheres(cases: CaseSet, case: Case, image: Image) -> np.ndarray:
    """LUNA16: a ball of the annotated diameter about each point (LPS mm); the challenge has no outlines."""
    out = np.zeros(image.shape, np.uint8)
    for ball in case.extra:
        x, y, z, diameter = ball
        half = diameter / 2 / np.array(image.spacing)
        at = np.array(image.point_to_index((x, y, z)))
        low, high = np.floor(at - half).astype(int), np.ceil(at + half).astype(int) + 1
        low, high = np.maximum(low, 0), np.minimum(high, image.shape[::-1])
        if (low >= high).any():
            raise UserError(f"an annotation at {x:g}, {y:g}, {z:g} lies outside the scan; check the annotations' coordinates.")
        k, j, i = np.meshgrid(*(np.arange(a, b) for a, b in zip(low[::-1], high[::-1])), indexing="ij")
        away = (np.stack((i, j, k), -1) - at) * image.spacing
        part = out[low[2] : high[2], low[1] : high[1], low[0] : high[0]]
        part[(away**2).sum(-1) <= (diameter / 2) ** 2] = 1
    return out


def _read_lidc(cases: CaseSet, case: Case, image: Image) -> np.ndarray:
    """LIDC's XML: voxels that at least two readers (or the only one) count to a nodule of 3 mm or more.

    A contour runs through the first pixels outside the nodule, so they are left out; those of an excluded part are left out with it,
    as pylidc has it (a ring of 2 to 12 with a hole of 5 to 9 is 56 pixels, and not 72).
    """
    assert case.label
    sessions = _lidc_sessions(case.label)
    votes = np.zeros(image.shape, np.uint8)
    for nodules in sessions:
        mine = np.zeros(image.shape, bool)
        for contours in nodules:
            part: dict[int, np.ndarray] = {}
            for z, inclusion, polygon in sorted(contours, key=lambda c: not c[1]):
                k = round(image.point_to_index((*image.origin[:2], z))[2])
                if not 0 <= k < image.shape[0] or polygon.min() < 0 or (polygon.max(0) >= image.shape[:0:-1]).any():
                    raise UserError(f"a contour of {case.label.name} at z = {z:g} mm lies outside the scan; give the series it names.")
                inside = fill([polygon], image.shape[1:])
                inside[polygon[:, 1], polygon[:, 0]] = not inclusion
                before = part.setdefault(k, np.zeros(image.shape[1:], bool))
                part[k] = before | inside if inclusion else before & ~inside
            for k, inside in part.items():
                mine[k] |= inside
        votes += mine
    return (votes >= min(2, len(sessions))).astype(np.uint8)


def _lidc_sessions(path: Path) -> list[list[list[tuple[float, bool, np.ndarray]]]]:
    """For each reader and nodule the contours: z in mm, whether inside counts, (n, 2) pixels x, y."""
    out = []
    for session in _iter(_xml(path), "readingSession"):
        nodules = []
        for nodule in _iter(session, "unblindedReadNodule"):
            contours = []
            for roi in _iter(nodule, "roi"):
                points = [(int(_text(e, "xCoord")), int(_text(e, "yCoord"))) for e in _iter(roi, "edgeMap")]
                if len(points) > 2:  # fewer mark a nodule below 3 mm, which has no outline
                    contours.append((float(_text(roi, "imageZposition")), _text(roi, "inclusion").upper() == "TRUE", np.array(points)))
            if contours:
                nodules.append(contours)
        out.append(nodules)
    return out


def _xml(path: Path) -> Any:
    from xml.etree import ElementTree

    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as e:
        raise UserError(f"{path} is not XML ({e}); get it again.") from e


def _iter(element: Any, name: str) -> Iterator[Any]:
    return (e for e in element.iter() if e.tag.rpartition("}")[2] == name)


def _text(element: Any, name: str) -> str:
    found = next(_iter(element, name), None)
    return (found.text or "").strip() if found is not None else ""


READERS: dict[str, Callable[[CaseSet, Case, Image], np.ndarray]] = {
    "map": _read_map,
    "segments": _read_segments,
    "contours": _read_contours,
    "dicom-seg": _read_dicom_seg,
    "spheres": _read_spheres,
    "lidc": _read_lidc,
}
NAMED = ("segments", "contours", "dicom-seg")


# ------------------------------------------------------------------------------------------------------------- layouts


def _find_unetseg(path: Path) -> CaseSet | None:
    folder = path.parent if path.name == INDEX else path
    if not (folder / INDEX).is_file() or not str((_read_json(folder / INDEX) or {}).get("format", "")).startswith("unetseg"):
        return None
    dataset = Dataset.open(folder)
    labels, values = _numbered({label.value: label.name for label in dataset.labels})
    labels = tuple(replace(theirs, value=ours.value) for ours, theirs in zip(labels, sorted(dataset.labels, key=lambda d: d.value)))
    cases = tuple(Case(e.name, e.patient, e.images, e.label, split=e.split) for e in dataset.entries.values())
    if not cases:
        raise UserError(f"The dataset {folder} is empty; add annotated cases first (unetseg dataset add).")
    return CaseSet(cases, labels, dataset.channels, "", values)


def _find_nnunet(path: Path) -> CaseSet | None:
    folder = path.parent if path.name == INDEX else path
    data = _read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    if not data or "channel_names" not in data or not isinstance(data.get("labels"), dict):
        return None
    try:
        return _nnunet(folder, data)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{folder / INDEX} is not as nnU-Net asks ({e}); "
            'write "channel_names": {"0": "CT"} and "labels": {"background": 0, "organ": 1}.'
        ) from e


def _nnunet(folder: Path, data: dict[str, Any]) -> CaseSet:
    notes: list[str] = []
    channels = tuple(str(v) for _, v in sorted(data["channel_names"].items(), key=lambda item: int(item[0])))
    names: dict[int, str] = {}
    ignored: list[int] = []
    for name, value in data["labels"].items():
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if name == "ignore":
            ignored.append(int(value))
            notes.append("Voxels with the label ignore are neither trained on nor scored.")
        elif isinstance(value, list):
            notes.append(f"The region {name} is of several values; each value is a label of its own.")
            names |= {int(v): names.get(int(v), f"label {v}") for v in value if int(v)}
        elif int(value):
            names[int(value)] = name
    labels, values = _numbered(names)
    values |= dict.fromkeys(ignored, -1)
    cases: list[Case] = []
    ending = str(data.get("file_ending", ".nii.gz"))
    if isinstance(data.get("dataset"), dict):
        for name, item in data["dataset"].items():
            cases.append(Case(name, name, tuple(_inside(folder, i) for i in item["images"]), _inside(folder, item["label"])))
    else:
        for part, split in (("Tr", ""), ("Ts", "test")):
            found = sorted((folder / f"images{part}").glob(f"[!.]*_[0-9][0-9][0-9][0-9]{ending}"))  # macOS leaves ._x beside x
            groups: dict[str, list[Path]] = defaultdict(list)
            for file in found:
                groups[file.name[: -len(ending) - 5]].append(file)
            for name, files in groups.items():
                if len(files) != len(channels) and not (len(files) == 1 and _is_picture(files[0])):  # a colour picture is one file
                    raise UserError(f"Case {name}: {folder} has {len(files)} of its {len(channels)} channels; complete or remove it.")
                mask = folder / f"labels{part}" / f"{name}{ending}"
                if not mask.is_file() and part == "Tr":
                    raise UserError(f"Case {name}: {mask} is missing; add its mask or remove the case.")
                cases.append(Case(name, name, tuple(files), mask if mask.is_file() else None, split=split))
        used = {f for c in cases for f in (*c.images, c.label)}
        for what, part in (("images are not named *_0000" + ending, "images"), ("masks have no image of their own", "labels")):
            folders = [p for p in (folder / f"{part}Tr", folder / f"{part}Ts") if p.is_dir()]
            _left_out(what, [f.name for p in folders for f in _files(p) if f not in used], notes)
    here = sum(not c.split for c in cases)
    if (told := data.get("numTraining")) not in (None, here):
        notes.append(f'"numTraining" in {INDEX} is {told}, and {here} training cases are here.')
    if not cases:
        raise UserError(f'{folder / "imagesTr"} holds no *_0000{ending}; add the images, or correct "file_ending" in {INDEX}.')
    if (beside := cases[0].images[0].parent / f"{cases[0].name}.json").is_file():
        notes.append(
            f"The spacing in {beside.name} and its like is not read, a voxel counts as 1 mm; for sizes in mm convert to NIfTI or MHA."
        )
    cases = _table_of_patients(folder, cases, notes) or _patients(cases, notes)
    return CaseSet(tuple(_split(folder, cases, notes)), labels, channels, "", values, tuple(notes))


def _split(folder: Path, cases: list[Case], notes: list[str]) -> list[Case]:
    """Train and validation as splits_final.json has them, if it is one split of all and no list of folds, as nnU-Net's own five are."""
    file = folder / "splits_final.json"
    if not file.exists():
        return cases
    try:
        (fold,) = json.loads(_read_text(file))
        split = {**dict.fromkeys(fold["train"], "train"), **dict.fromkeys(fold["val"], "validation")}
        if Counter([*fold["train"], *fold["val"]]) != Counter(c.name for c in cases if c.split != "test"):
            raise ValueError
    except (UserError, ValueError, KeyError, TypeError):
        notes.append(f"{file.name} is not one split of these cases, and not taken over: patients are dealt into folds anew (data.folds).")
        return cases
    return [replace(c, split=split.get(c.name, c.split)) for c in cases]


def _find_msd(path: Path) -> CaseSet | None:
    """dataset.json with "training": [{"image", "label"}], as MSD's, whose "labels" are {"1": name}."""
    folder = path.parent if path.name == INDEX else path
    data = _read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    if not data or not isinstance(data.get("training"), list) or not isinstance(data.get("labels"), dict):
        return None
    notes: list[str] = []
    cases = _datalist(folder, data)
    if not cases:
        return None
    labels, values = _numbered(_by_value(data["labels"]))
    channels = _channels_of(cases, notes, data.get("modality", {"0": "image"}))
    # In nnU-Net's first format the list says case.nii.gz and the files are case_0000.nii.gz.
    spread = [replace(c, images=_spread(c.images[0], len(channels))) if len(c.images) == 1 else c for c in cases]
    return CaseSet(tuple(_patients(_present(spread, notes), notes)), labels, channels, "", values, tuple(notes))


def _spread(image: Path, n: int) -> tuple[Path, ...]:
    ending = image.name[len(stem(image)) :]
    files = tuple(image.with_name(f"{stem(image)}_{i:04d}{ending}") for i in range(n))
    return files if not image.exists() and all(f.exists() for f in files) else (image,)


def _datalist(base: Path, data: dict[str, Any]) -> list[Case]:
    parts = [(key, split) for key, split in SPLITS.items() if isinstance(data.get(key), list)]
    several = len({split for key, split in parts if any(isinstance(i, dict) and i.get("label") for i in data[key])}) > 1
    cases = []
    for key, split in parts:
        for item in data[key]:
            item = {"image": item} if isinstance(item, str) else item
            if not isinstance(item, dict) or "image" not in item:
                raise UserError(f'{base}: an entry of "{key}" has no "image"; correct the list.')
            images = item["image"] if isinstance(item["image"], list) else [item["image"]]
            paths = tuple(_inside(base, i) for i in images)
            label = item.get("label")
            if isinstance(label, list) and len(label) == 1:
                label = label[0]
            if isinstance(label, list):
                raise UserError(f"{base}: {paths[0].name} has several label files; merge them into one map.")
            name = re.sub(r"_0000$", "", stem(paths[0])) if len(paths) > 1 else stem(paths[0])
            decided = split if several or split == "test" or not label else ""
            mask = _inside(base, label) if label else None
            reader = "segments" if mask and mask.name.lower().endswith(".seg.nrrd") else "map"
            patient = name if item.get("patient") in (None, "") else str(item["patient"])
            cases.append(Case(name, patient, paths, mask, reader, decided))
    names = Counter(c.name for c in cases)
    for i, c in enumerate(cases):
        if names[c.name] > 1:  # in a folder for each case the files have the same names, which are nobody's
            name = f"{c.images[0].parent.name}-{c.name}"
            cases[i] = replace(c, name=name, patient=name if c.patient == c.name else c.patient)
    return cases


def _find_monai(path: Path) -> CaseSet | None:
    if path.is_file():
        files = [path] if path.suffix == ".json" else []
    else:
        files = sorted(path.glob("[!.]*.json"))
    lists = []
    for file in files:
        try:
            data = _read_json(file)
        except UserError as e:
            # Scans have sidecars in any encoding, which are no lists; what has "training" was to be one.
            if path.is_file() or isinstance(e.__cause__, OSError) or b'"training"' in file.read_bytes():
                raise
            continue
        if data and any(isinstance(data.get(key), list) and data[key] for key in SPLITS):
            cases = _datalist(file.parent, data)
            if any(c.annotated for c in cases):
                lists.append((file, data, cases))
    if len(lists) > 1:
        raise UserError(f"{path} holds {len(lists)} lists of cases ({', '.join(file.name for file, _, _ in lists)}); give the file of one.")
    for file, data, cases in lists:
        notes: list[str] = []
        if any("fold" in item for key in SPLITS for item in data.get(key) or () if isinstance(item, dict)):
            notes.append(f"The folds in {file.name} are not taken over: patients are dealt into folds anew (data.folds, data.fold_seed).")
        cases = _patients(_present(cases, notes), notes)
        masks = [c.label for c in cases if c.label]
        for mask in masks:
            if not mask.exists():
                raise UserError(f"{file} names {mask}, which does not exist; the list's paths must be relative to its folder.")
        names = data.get("labels")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):  # by place, with the background or without
            names = dict(enumerate(names, int(plain_name("".join(names[:1])) != "background")))
        known = _by_value(names) if isinstance(names, dict) else {}
        labels, values = _labels_of(cases, *((known, {}) if known else _label_names(file.parent)), notes)
        channels = _channels_of(cases, notes, data.get("modality") or data.get("channel_names"))
        return CaseSet(tuple(cases), labels, channels, "", values, tuple(notes))
    return None


def _labels_of(
    cases: Sequence[Case], names: dict[int, str], table: dict[int, str], notes: list[str]
) -> tuple[tuple[Label, ...], dict[int, int]]:
    """Labels of maps and .seg.nrrd alike; the latter are known by their segments' names."""
    segments = [c.label for c in cases if c.label and c.reader == "segments"]
    if not segments:
        return _named_values([c.label for c in cases if c.label], names, table, notes)
    found: dict[str, Label] = {}
    for file, read in _some(segments, len(segments), lambda file: (file, read_segments(file, voxels=False)[1])):
        named = [segment.label for segment in read]
        distinct((label.name for label in named), file)
        for label in named:
            found.setdefault(plain_name(label.name), label)
    if any(c.reader == "map" and c.label for c in cases):
        raise UserError(f"{segments[0]} is a Slicer segmentation and other masks are plain maps; save all in one of the two kinds.")
    return tuple(replace(label, value=i) for i, label in enumerate(found.values(), 1)), {}


def _channels_of(cases: Sequence[Case], notes: list[str], named: Any = None) -> tuple[str, ...]:
    if isinstance(named, dict) and named:
        return tuple(str(v) for _, v in sorted(named.items(), key=lambda item: (len(item[0]), item[0])))  # 10 after 9
    if len(cases[0].images) > 1:
        return tuple(f"channel {i}" for i in range(len(cases[0].images)))
    return _picture_channels(cases, notes)


def _find_luna16(path: Path) -> CaseSet | None:
    table = path if path.name == "annotations.csv" else path / "annotations.csv"
    if not table.is_file():
        return None
    rows = _rows(table)
    columns = ("seriesuid", "coordx", "coordy", "coordz", "diameter_mm")
    if not rows or any(c not in rows[0] for c in columns):
        return None
    balls: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for row in rows:
        try:
            balls[row["seriesuid"]].append(tuple(float(row[c]) for c in columns[1:]))
        except ValueError as e:
            raise UserError(f"{table}, {','.join(row.values())}: not a number ({e}); correct it.") from e
    # Without what macOS keeps beside files on a USB stick, and the masks of lungs, which have the scans' names.
    scans = [f for f in sorted(table.parent.rglob("*.mhd")) if f.name[:2] != "._" and "seg-lungs-LUNA16" not in f.parts]
    cases = [Case(uid, uid, (f,), None, "spheres", extra=tuple(balls[uid])) for f in scans if (uid := stem(f)) in balls]
    if not cases:
        raise UserError(f"{table} names no .mhd file that lies in {table.parent}; put the scans (subset0, ...) beside it.")
    notes = ["LUNA16 has points and diameters, no outlines: each nodule is a ball; train a detector or a first model, and refine."]
    missing = len(balls) - len(cases)
    if missing:
        notes.append(f"{missing} annotated scans are not here.")
    _left_out("scans have no annotation", [stem(f) for f in scans if stem(f) not in balls], notes)
    return CaseSet(tuple(cases), _labels(["nodule"]), ("CT",), "", {1: 1}, tuple(notes))


BIDS = re.compile(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?_(.*?_)?([A-Za-z0-9]+)$")


def _entity(mask: Path) -> str:
    """The structure that a BIDS mask names (label-lesion); a map of several names none."""
    found = re.search(r"_label-([A-Za-z0-9]+)", mask.name)
    return found[1] if found else ""


def _find_bids(path: Path) -> CaseSet | None:
    """sub-*/[ses-*/]*/sub-*_<contrast>.nii.gz with sub-*_..._dseg (or label-..._mask) there or under derivatives/."""
    if path.is_file() or not any(p.is_dir() for p in path.glob("sub-*")):
        return None
    images: dict[tuple[str, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    masks: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in sorted(path.rglob("sub-*")):
        found = BIDS.fullmatch(stem(file)) if file.is_file() and file.name.lower().endswith(SUFFIXES) else None
        if not found:
            continue
        key = found[1], found[2] or ""
        if found[4] in ("dseg", "mask", "roi") or (found[4] == "seg" and _entity(file)):  # the last as the Spinal Cord Toolbox has it
            masks[key].append(file)
        elif "derivatives" not in file.relative_to(path).parts and found[4] != "probseg":
            images[key][found[4]].append(file)
    usable = [key for key in images if masks[key]]
    if not usable:
        return None
    common = Counter(entity for key in usable for entity in {_entity(p) for p in masks[key]})

    def rank(mask: Path) -> tuple[Any, ...]:
        """Maps of all before masks of one structure, those before unnamed ones (the brain's); of structures what most subjects have, and
        of two that all have not the brain."""
        entity, whole = _entity(mask), "_dseg" in mask.name
        return not whole, "desc-" in mask.name, whole == bool(entity), -common[entity], entity == "brain", entity, str(mask)

    for key in usable:
        masks[key].sort(key=rank)
    kinds = sorted({_entity(masks[key][0]) for key in usable} - {""})
    if len(kinds) > 1:
        raise UserError(f"The masks in {path} are of {' and '.join(kinds)}; keep one kind, or merge them into a _dseg for each subject.")
    for key in usable:  # a mask in anat/ is of what lies in anat/, and not of func/ or dwi/
        kind = masks[key][0].parent.name
        alike = {contrast: kept for contrast, runs in images[key].items() if (kept := [p for p in runs if p.parent.name == kind])}
        images[key] = alike or images[key]
    contrasts = sorted(set.intersection(*(set(images[key]) for key in usable)))
    if not contrasts:
        raise UserError(f"{path}: no contrast is there for every annotated subject; complete the images or give a subset.")
    cases, told = [], []
    for key in usable:
        several = masks[key]
        if len(several) > 1:
            told.append(f"{'_'.join(filter(None, key))} has {len(several)} masks; {several[0].name} is used.")
        chosen = []
        for contrast in contrasts:
            runs = images[key][contrast]
            # The run, space or acquisition that the mask names too.
            chosen.append(max(runs, key=lambda p: len(set(stem(p).split("_")) & set(stem(several[0]).split("_")))))
            if len(runs) > 1:
                told.append(f"{'_'.join(filter(None, key))} has {len(runs)} images {contrast}; {chosen[-1].name} is used.")
        cases.append(Case("_".join(filter(None, key)), key[0], tuple(chosen), several[0]))
    notes = told[:3] + ([f"{len(told) - 3} more are like that."] if len(told) > 3 else [])
    _left_out("subjects or sessions have no mask", ["_".join(filter(None, key)) for key in images if not masks[key]], notes)
    _left_out("masks have no image of their own", [p.name for key in masks if key not in images for p in masks[key]], notes)
    if len(contrasts) > 1:
        notes.append(f"The contrasts {', '.join(contrasts)} are the channels; others, or fewer, are chosen with --channel.")
    table: dict[int, str] = {}
    for file in sorted(path.rglob("*dseg.tsv")):
        table |= {int(r["index"]): r["name"] for r in _rows(file) if r.get("index", "").isdigit() and int(r["index"]) and r.get("name")}
    labels, values = _named_values([c.label for c in cases if c.label], {}, table, notes)
    return CaseSet(tuple(cases), labels, tuple(contrasts), "", values, tuple(notes))


def _find_pairs(path: Path) -> CaseSet | None:
    if path.is_file():
        return None
    notes: list[str] = []
    folders = {p.name.lower(): p for p in path.iterdir() if p.is_dir()}
    image_folder = next((folders[n.lower()] for n in IMAGE_FOLDERS if n.lower() in folders), None)
    label_folder = next((folders[n.lower()] for n in LABEL_FOLDERS if n.lower() in folders), None)
    cases: list[Case] = []
    if image_folder and label_folder:
        masks = _files(label_folder)
        images = _by_channel(_scans(image_folder), masks)
        for mask in masks:
            name = next((n for n in _stripped(stem(mask), MASK_WORDS) if n in images), None)
            if name is None:
                raise UserError(f"{mask} has no image of its name in {image_folder}; give both the same name.")
            cases.append(_pair(name, images[name], mask))
    else:
        files = _files(path)
        masks = [f for f in files if f.name.lower().endswith(".seg.nrrd") or MASK_WORDS_PATTERN.match(stem(f))]
        images = _by_channel([f for f in files if f not in masks], masks)
        for mask in masks:
            for name in _stripped(stem(mask), MASK_WORDS):
                spelled = (name + word for w in IMAGE_WORDS for word in (w, w.upper(), w.title()))
                found = next((n for n in spelled if n in images), None)
                if found and name not in {c.name for c in cases}:
                    cases.append(_pair(name, images[found], mask))
                    break
    if not cases:
        return None
    used = {f for c in cases for f in (*c.images, c.label)}
    bare = sorted(name for name, group in images.items() if used.isdisjoint(group))
    _left_out("images have no mask", bare, notes)
    _left_out("masks have no image of their own", [m.name for m in masks if m not in used], notes)
    cases = _table_of_patients(path, cases, notes) or _patients(cases, notes)
    labels, values = _labels_of(cases, *_label_names(path), notes)
    return CaseSet(tuple(cases), labels, _channels_of(cases, notes), "", values, tuple(notes))


def _pair(name: str, images: tuple[Path, ...], mask: Path) -> Case:
    return Case(name, name, images, mask, "segments" if mask.name.lower().endswith(".seg.nrrd") else "map")


def _stripped(name: str, words: Sequence[str]) -> list[str]:
    """The name, and without each of the words at its end."""
    return [name, *(name[: -len(w)] for w in sorted(words, key=len, reverse=True) if name.lower().endswith(w.lower()))]


def _by_channel(files: Sequence[Path], masks: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Files by their name; name_0000, name_0001, ... are the channels of one image, if all are so named and no mask is."""
    numbered = {stem(f) for f in files}.intersection(n for m in masks for n in _stripped(stem(m), MASK_WORDS))
    if files and not numbered and all(re.search(r"_\d{4}$", stem(f)) for f in files) and any(stem(f).endswith("_0000") for f in files):
        grouped: dict[str, list[Path]] = defaultdict(list)
        for f in files:
            grouped[stem(f)[:-5]].append(f)
        if len({len(g) for g in grouped.values()}) == 1:
            return {name: tuple(sorted(group)) for name, group in grouped.items()}
    out: dict[str, tuple[Path, ...]] = {}
    for f in files:
        if stem(f) in out:
            raise UserError(f"{f} and {out[stem(f)][0].name} have the same name; remove one of them.")
        out[stem(f)] = (f,)
    return out


def _dicom(file: Path, **how: Any) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(file, **how)
    except Exception as e:  # an RTSTRUCT that was cut anywhere gave OSError and struct.error, other damage gives others
        raise UserError(f"{file} is cut short or damaged ({e}); export it again, or take it out of the folder.") from e


def _headers(path: Path) -> list[tuple[Path, Any]]:
    """The DICOM headers below a folder, without their pixels."""
    other = (*SUFFIXES, ".json", ".csv", ".xml", ".txt")
    tags = ["Modality", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID", "SOPInstanceUID"]
    out = []
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.lower().endswith(other)):
        with open(file, "rb") as f:
            f.seek(128)
            if f.read(4) != b"DICM":
                continue
        out.append((file, _dicom(file, stop_before_pixels=True, specific_tags=tags)))
    return out


def _series(path: Path) -> tuple[dict[str, tuple[Path, Any]], list[tuple[Path, Any]]]:
    """Image series (UID -> folder, header) and the files that annotate them. Of copies the fullest is a series' folder; what no folder
    holds whole is left to read_image(), which refuses what lies in several."""
    headers: dict[str, Any] = {}
    places: dict[str, dict[Path, set[str]]] = defaultdict(lambda: defaultdict(set))
    annotations = []
    for file, header in _headers(path):
        if header.get("Modality") in ("RTSTRUCT", "SEG"):
            annotations.append((file, header))
        elif header.get("Modality") not in (*NO_SCAN, None):
            uid = str(header.get("SeriesInstanceUID") or file.parent)
            headers.setdefault(uid, header)
            places[uid][file.parent].add(str(header.get("SOPInstanceUID") or file))
    series = {}
    for uid, folders in places.items():
        fullest = max(folders, key=lambda folder: len(folders[folder]))
        whole = all(there <= folders[fullest] for there in folders.values())
        series[uid] = (fullest if whole else Path(os.path.commonpath(folders)), headers[uid])
    return series, annotations


def _of_person(header: Any) -> str:
    """A patient's key that is not the PatientID itself."""
    identity = str(header.get("PatientID") or header.get("StudyInstanceUID") or header.get("SeriesInstanceUID", ""))
    return "p-" + hashlib.sha256(identity.encode()).hexdigest()[:12]


def _dicom_name(path: Path, folder: Path, uid: str, taken: set[str]) -> str:
    name = "-".join(folder.relative_to(path).parts) or path.name
    if name in taken:
        name += "-" + hashlib.sha256(uid.encode()).hexdigest()[:6]
    taken.add(name)
    return name


def _find_dicom(path: Path) -> CaseSet | None:
    if path.is_file() or find_spec("pydicom") is None:
        return None
    series, annotations = _series(path)
    if not annotations:
        return None
    names: dict[str, str] = {}
    undrawn: dict[str, str] = {}
    cases, taken, modalities = [], set[str](), []
    for file, header in annotations:
        full = _dicom(file, stop_before_pixels=True)
        uid = _referenced(full, series)
        if uid is None:
            raise UserError(f"{file} belongs to no image series in {path}; put its scan beside it.")
        folder, scan = series[uid]
        if header.Modality == "RTSTRUCT":
            outlined = set(_outlined(full))  # a plan's template names many more
            every = [(str(r.ROIName), r.get("ROINumber") in outlined) for r in full.get("StructureSetROISequence", ())]
            found = [name for name, drawn in every if drawn]
            undrawn |= {plain_name(name): name for name, drawn in every if not drawn}
        else:
            found = [str(s.SegmentLabel) for s in full.get("SegmentSequence", ()) if s.SegmentNumber]  # 0: a label map's background
        distinct(found, file)
        for name in found:
            names.setdefault(plain_name(name), name)
        reader = "contours" if header.Modality == "RTSTRUCT" else "dicom-seg"
        cases.append(
            Case(_dicom_name(path, folder, str(full.SOPInstanceUID), taken), _of_person(scan), (folder,), file, reader, series=uid)
        )
        modalities.append(str(scan.Modality))
    if len(set(modalities)) > 1:
        raise UserError(f"{path} holds scans of several modalities ({', '.join(sorted(set(modalities)))}); give them apart.")
    if not names:
        raise UserError(f"The RTSTRUCT or SEG in {path} name no structure; export them again.")
    bare = len(series) - len({c.series for c in cases})
    notes = [f"{bare} image series have no RTSTRUCT or SEG and are left out."] if bare else []
    _left_out("structures are outlined in no case", [name for key, name in undrawn.items() if key not in names], notes)
    return CaseSet(tuple(cases), _labels(names.values()), (modalities[0],), "", {}, tuple(notes))


def _outlined(dataset: Any) -> Iterator[Any]:
    """The numbers of an RTSTRUCT's structures that have an area, and are no points."""
    for roi in dataset.get("ROIContourSequence", ()):
        if any(str(c.get("ContourGeometricType", "CLOSED")).startswith("CLOSED") for c in roi.get("ContourSequence") or ()):
            yield roi.get("ReferencedROINumber")


def _referenced(dataset: Any, series: dict[str, tuple[Path, Any]]) -> str | None:
    """The series that an RTSTRUCT or SEG was drawn on: the named one, else the only one in its frame of reference."""
    named = [str(s.SeriesInstanceUID) for s in dataset.get("ReferencedSeriesSequence", ())]
    frames = [str(dataset.get("FrameOfReferenceUID", ""))]
    for reference in dataset.get("ReferencedFrameOfReferenceSequence", ()):
        frames.append(str(reference.get("FrameOfReferenceUID", "")))
        for study in reference.get("RTReferencedStudySequence", ()):
            named += [str(s.SeriesInstanceUID) for s in study.get("RTReferencedSeriesSequence", ())]
    for uid in named:
        if uid in series:
            return uid
    same = [uid for uid, (_, header) in series.items() if str(header.get("FrameOfReferenceUID", "?")) in frames]
    return same[0] if len(same) == 1 else None


def _find_lidc(path: Path) -> CaseSet | None:
    if path.is_file():
        return None
    files = []
    for p in sorted(path.rglob("*.xml")):
        with open(p, "rb") as f:
            if b"LidcReadMessage" in f.read(4096):
                files.append(p)
    if not files:
        return None
    series, _ = _series(path)
    cases, taken, copies = [], set[str](), set[bytes]()
    absent, twice = 0, list[str]()
    for file in files:
        uid = _text(_xml(file), "SeriesInstanceUid")
        if uid not in series:
            absent += 1
        elif (content := hashlib.sha256(file.read_bytes()).digest()) in copies:
            twice.append(file.name)
        else:
            copies.add(content)
            folder, header = series[uid]
            cases.append(Case(_dicom_name(path, folder, uid, taken), _of_person(header), (folder,), file, "lidc", series=uid))
    if not cases:
        raise UserError(f"{files[0]} names a series that is not below {path}; put the scans' DICOM folders there.")
    notes = ["A voxel is nodule where at least two readers agree (or the only one)."]
    if absent:
        notes.append(f"{absent} XML files name series that are not here.")
    _left_out("XML files are copies of another", twice, notes)
    return CaseSet(tuple(cases), _labels(["nodule"]), ("CT",), "", {1: 1}, tuple(notes))


LAYOUTS: dict[str, Callable[[Path], CaseSet | None]] = {
    "unetseg": _find_unetseg,
    "nnunet": _find_nnunet,
    "msd": _find_msd,
    "luna16": _find_luna16,
    "bids": _find_bids,
    "monai": _find_monai,
    "pairs": _find_pairs,
    "lidc": _find_lidc,
    "dicom": _find_dicom,
}
