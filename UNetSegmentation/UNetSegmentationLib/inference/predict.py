"""The one path from an image to a prediction, for the panel, the command line, validation and the benchmarks.

    reorient -> resample to the card's spacing -> normalise -> tile -> engine -> blend -> average over TTA and models
    -> probabilities [+ uncertainty] -> resample back -> label -> postprocess

Probabilities live only in a band of planes that rolls through the volume, so memory is O(volume + one band x classes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import SimpleITK as sitk

from ..engines import Engine, choose_engine
from ..files import counted
from ..image import (
    IDENTITY,
    Box,
    Grid,
    Image,
    UserError,
    alike,
    blurred,
    check_geometry,
    content,
    length_unit,
    of_channels,
    reorient_for,
    resample_back,
    sample,
)
from ..intensity import check_finite, floor_of, is_air, normaliser, warnings_for
from ..model import Card, Label, ModelPackage, check_together, intensity_errors
from ..postprocess import clean, components, distance
from .augment import View, views
from .tiling import Tiling, blend_weights, compute_box, mirrored, rims, tile

Progress = Callable[[float, str], None]

# Resampled probabilities held at once while labelling. 64 MB keeps a 512x512x400 CT within a few planes of a band and
# costs no speed (the planes of a larger band would not fit the cache either).
_BAND_BYTES = 64 << 20

# An image that ends less than 15 of the model's pixels beside its target, along each axis, or in which none was found, is seen once more,
# mirrored only over two: the target and its mirror had been one thing, or none. Of both, at each voxel, what finds more. lung-nodule-2d, 18
# crops with 5, 7, 9 and 12 pixels about the nodule, Dice: mirrored as it was trained 0.24, 0.33, 0.63 and 0.85, over two pixels 0.85,
# 0.86, 0.78 and 0.73, of both 0.85, 0.85, 0.80 and 0.85. Farther from the edge, what it was trained with is better.
_MIRROR_PIXELS, MIRROR_DEPTH = 15, 2

# A model of a target in a box is not meant for images that are much larger; without a size of its own: the hippocampus' crops are 50 mm.
_CROP_MM = 80.0

# A picture without a pixel size that is smaller than this share of a patch is a crop. left-ventricle-2d's patch is 160; crops of 128, 136,
# 144, 152 and 160 pixels taken for whole slices give Dice 0.770, 0.830, 0.862, 0.883 and 0.892 instead of 0.891, 0.898, 0.896, 0.895 and
# 0.835, but whole slices of 144 and 160 taken for crops 0.446 and 0.713 instead of 0.904 and 0.900. Of 160, 137 are not black border.
_FIELD_SHARE = 0.85

# Of a patch, what the crops have that a model was trained on: the hippocampus' are 35 x 50 x 35 mm, its patch 48 x 56 x 40.
_CROP_SHARE = 7 / 8
# A file that ends closer has no more: where it is shorter than this share of a patch along two axes, its edge goes on as far as that, and
# zeros fill the rest. 19 hippocampi cropped closely gave Dice 0.661 and 0.775 with zeros only and give 0.889 and 0.877, with 4 voxels
# less on each side 0.848 and 0.853, and 0.897 and 0.881. None of 38 held-out crops is changed as it is: along one axis they may be short
# (an edge that went on along that one took 0.0006).
_CLOSE_SHARE = 0.78
_SLAB_SHARE = 1 / 3  # of a patch; what is thinner shows too little of a target
_CROP_VOXELS = 1 << 22  # what is larger is no crop, and 160 x 160 x 160 voxels take 2 to 3 s


class Cancelled(Exception):
    """The caller's `cancelled` said so; nothing was changed."""


@dataclass(frozen=True)
class Options:
    """How to run. None and "auto" follow the models' cards and this machine.

    roi: a box in the image's own index space (z, y, x); only it is computed and labelled. at: a point in LPS mm: the
    ROI is then the first card's roi_mm around it, and the component next to it is kept. intensity: a card-style
    entry that overrides the models' (a person's window). uncertainty, probabilities: also return those maps.
    """

    roi: Box | None = None
    at: tuple[float, float, float] | None = None
    intensity: dict[str, Any] | None = None
    tta: str | None = None
    overlap: float = 0.5
    batch: int = 4
    engine: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    uncertainty: bool = False
    probabilities: bool = False
    postprocess: bool = True


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a prediction gives, all on the input image's own grid.

    labels: (z, y, x) uint8 or uint16, 0 = background. uncertainty: predictive entropy of the averaged probabilities,
    float32, 0 (certain) to 1 (all labels equally likely). mutual_information: the part of it on which the TTA copies
    and models disagree (Houlsby et al. 2011), same scale; None with a single copy. probabilities: (k, z, y, x) float32,
    one channel for each output of the network (background first for softmax). Maps are 0 outside the ROI.
    roi: the box that was computed, in the image's index space (z, y, x). engines: what ran, for each model; tiles:
    network inputs computed or skipped as air, TTA copies counted. algorithm: DICOM's SegmentAlgorithmType.
    """

    labels: Image
    label_defs: tuple[Label, ...]
    model_name: str
    roi: Box
    uncertainty: Image | None = None
    mutual_information: Image | None = None
    probabilities: Image | None = None
    engines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    tiles: int = 0
    algorithm: str = "AUTOMATIC"


def predict(
    image: Image,
    models: Sequence[ModelPackage],
    options: Options = Options(),
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    engines: Sequence[Engine] | None = None,
) -> Prediction:
    """Segment an image with one model or the average of several.

    progress(fraction, text) is called between batches, and cancelled() asked; Cancelled is raised when it says yes.
    engines: ready ones for the models (a warm worker), else they are chosen by the options. Raises UserError for
    input that the models cannot take; nothing is ever half done.
    """
    began = time.perf_counter()
    image, roi, focus, notes = _begin(image, models, options)
    part = _shown(image, models, options, roi)
    if part.shape != image.shape:
        boxed = None if options.roi is None else (roi & part).relative_to(part)
        found = predict(image.crop(part), models, replace(options, roi=boxed), progress, cancelled, engines)
        whole = _placed(found, part, image, roi if models[0].card.activation == "softmax" else None)
        return replace(whole, roi=roi, warnings=notes, seconds=time.perf_counter() - began)
    canonical, orientation = reorient_for(image, models[0].card.acquired)
    target = orientation.canonical_box(roi, image.shape)
    engines = engines or [choose_engine(m, options.engine, options.device, options.precision, options.threads) for m in models]
    axes = {m.card.slice_axis for m in models if m.card.dimensions == 2}
    roll = axes.pop() if len(axes) == 1 else 0
    ticker = _Ticker(progress, cancelled)
    card = models[0].card
    for mirrors in ((0,), (0, MIRROR_DEPTH)):
        groups = [
            [
                _Stream(canonical, m.card, e, target, roll, options, ticker, n)
                for n in mirrors
                if not n or m.card.data.get("padding") == "reflect"
            ]
            for m, e in zip(models, engines)
        ]
        streams = [s for group in groups for s in group]
        ticker.total, ticker.done = sum(s.work for s in streams), 0
        result = _Result(canonical.shape, card, options, split=sum(len(group[0].views) for group in groups) > 1)
        finer = max(math.prod(s.box.shape) for s in streams) / math.prod(target.shape)
        for band in _bands(target, roll, card.outputs, finer):
            probabilities, inner = _take(groups[0], band)
            for group in groups[1:]:
                more, inner_more = _take(group, band)
                probabilities, inner = probabilities + more, inner + inner_more
            result.put(band, probabilities / len(groups), inner / len(groups))

        if options.postprocess:
            box = orientation.canonical_box(focus, image.shape) if focus else None
            values = [label.value for label in card.labels]
            clean(result.labels, values, card.postprocess, canonical.spacing, box, target, over_gaps=card.acquired)
        if not any(s.mirrors(result.labels) for s in streams):
            break

    def back(array: np.ndarray | None) -> Image | None:
        return None if array is None else image.like(np.ascontiguousarray(orientation.original(array)))

    labels = back(result.labels)
    assert labels is not None
    ticker.report(1.0, "done")
    return Prediction(
        labels=labels,
        label_defs=card.labels,
        model_name="+".join(f"{m.card.name}-{m.card.version}" for m in models),
        roi=roi,
        uncertainty=back(result.uncertainty),
        mutual_information=back(result.mutual_information),
        probabilities=back(result.probabilities),
        engines=tuple(e.describe() for e in engines),
        warnings=notes,
        seconds=time.perf_counter() - began,
        tiles=ticker.done,
    )


def foreseen(image: Image, models: Sequence[ModelPackage], options: Options = Options()) -> tuple[str, ...]:
    """What predict() will warn of, before anything is computed; raises its UserErrors for this input."""
    return _begin(image, models, options)[-1]


# --------------------------------------------------------------------------------------------------------------- checks


def _begin(image: Image, models: Sequence[ModelPackage], options: Options) -> tuple[Image, Box, Box | None, tuple[str, ...]]:
    """The image as the models take it, _region(), and what is to be said."""
    if models:
        image = of_channels(image, len(models[0].card.data["channels"]))
    _check_input(image, models, options)
    roi, focus = _region(image, models[0].card, options)
    notes = [note for m in models for note in warnings_for(options.intensity or m.card.intensity, image.channels)]
    notes += _too_much(image, models, options) + _too_little(image, models)
    return image, roi, focus, tuple(dict.fromkeys(notes))


def _check_input(image: Image, models: Sequence[ModelPackage], options: Options) -> None:
    name = str(image.source or "The image")
    if not models:
        raise UserError("No model was chosen; choose at least one.")
    if not 0 <= options.overlap < 0.95:
        raise UserError(f"The overlap must be from 0 to below 0.95, not {options.overlap:g}.")
    if options.batch < 1:
        raise UserError(f"The batch must be 1 or more, not {options.batch}.")
    for error in intensity_errors(options.intensity, "options.intensity") if options.intensity else ():
        raise UserError(f"The window is not valid: {error}; correct it.")
    check_geometry(image)
    check_together([m.card for m in models])
    for model in models:
        card = model.card
        if image.n_channels != len(card.data["channels"]):
            wanted = ", ".join(card.data["channels"])
            raise UserError(
                f"{name} has {image.n_channels} channels (colours, frames or files) but {card.name} needs "
                f"{len(card.data['channels'])} ({wanted}); choose a scalar volume for each."
            )
        if min(image.shape) < 2 and (card.dimensions == 3 or card.context):
            raise UserError(f"{name} has only {min(image.shape)} slice along one axis; {card.name} needs a volume.")
        if length_unit(image) == "px":
            check_pixel_size(name, card)
        across = (n for axis, n in enumerate(reorient_for(image, card.acquired)[0].shape) if axis != card.slice_axis)
        if card.dimensions == 2 and min(across) < 2:
            which = card.data.get("axis", "axial")
            raise UserError(
                f"{name} has only one row or column of voxels in the {which} slices that {card.name} segments; "
                "choose a volume, or a slice that lies so."
            )
        if card.data["task"] != "automatic":
            raise UserError(f"{card.name} is a {card.data['task']} model; it works from clicks, not on its own.")
    check_finite(image.channels, name)


def spacing_for(card: Card, canonical: Image) -> tuple[float | None, ...]:
    """(x, y, z) mm that an image is resampled to before the card's network sees it; None keeps its own. Where the card's spacing leaves
    it to the image, its pixels are made as large as in training: left-ventricle-2d, trained on 256 x 256 pixels of about 1.3 mm, had found
    0.389, 0.729 and 0.835 (Dice) of the same slices with 128, 160 and 512, and finds 0.896, 0.895 and 0.896 so. A picture without a size
    (also a stack of them, or their content) shows the whole field, unless it is much smaller than the patch and so a crop."""
    spacing, across = list(card.spacing), card.axis_order[1:]
    # DICOM without a pixel size may know its slices' thickness.
    sized = any(canonical.spacing[2 - a] != 1 for a in across)
    placed = sized or tuple(canonical.direction) != IDENTITY or any(v % 1 for v in canonical.origin)
    wanted, longest = card.data.get("pixel_mm"), max(canonical.shape[a] for a in across)
    if not placed:
        field = card.data.get("field_px")
        wanted = longest / field if field and longest >= _FIELD_SHARE * max(card.patch) else None
    for axis in across:
        spacing[2 - axis] = spacing[2 - axis] or wanted
    return tuple(spacing)


def check_pixel_size(name: str, card: Card) -> None:
    """Refuse a picture without a pixel size, which counts as 1 mm, for a model of such fine pixels: of 2.5 um it would be resampled to
    400 x 400 times as many, until the memory is full. A radiograph's are 0.1 to 0.2 mm, a CT's 0.3 and more; of a model of pictures
    without a size they are 1 or more, or the image's own."""
    finest = min((s for s in card.spacing if s is not None), default=1.0)
    if finest < 0.25:
        raise UserError(
            f"{name} has no pixel size, which {card.name} needs, as its own pixels are {finest:.3g} mm; save the picture as TIFF with its "
            "pixel size, or set the image's spacing."
        )


def _too_much(image: Image, models: Sequence[ModelPackage], options: Options) -> list[str]:
    """What is to be said of a whole scan for a model of one target."""
    if options.roi is not None or options.at is not None:
        return []
    sizes = {m.card.name: crop_mm(m.card) for m in models if m.card.of_target}
    longest = max(n * s for n, s in zip(image.shape[::-1], image.spacing))
    which = ", ".join(name for name, mm in sizes.items() if longest > mm)
    return [f"{which} is made for a box around one target, not for a whole scan; give a box or a point."] if which else []


def _too_little(image: Image, models: Sequence[ModelPackage]) -> list[str]:
    """What is to be said of a slab too thin for a 3D model of one target: 10 hippocampi on 9, 12 and 17 axial
    slices of 1 mm gave Dice 0.318 and 0.557, 0.607 and 0.716, and 0.860 and 0.829, on 17 coronal ones, of 56 in a patch, 0.671 and
    0.779."""
    notes = []
    for card in (m.card for m in models):
        notes += (tiny := too_small(image, card))
        if tiny or not card.of_target or card.dimensions < 3:
            continue
        canonical, _ = reorient_for(image, card.acquired)
        for n, own, wanted, pixels in zip(canonical.shape, canonical.spacing[::-1], spacing_for(card, canonical)[::-1], card.patch):
            if n * own / (wanted or own) < _SLAB_SHARE * pixels:
                slab = f"The image is only {n * own:.3g} mm ({counted(n, 'slice')}) thick"
                notes.append(f"{slab}, too thin for {card.name} to find its target well; give it a thicker part of the scan.")
    return notes


def too_small(image: Image, card: Card) -> list[str]:
    """What is to be said of an image that is not four of a model's pixels long, as a chest whose spacing is in metres, of 0.29 mm."""
    size = [n * s for n, s in zip(image.shape[::-1], image.spacing)]
    pixels = [s for s in (*card.spacing, card.data.get("pixel_mm")) if s is not None]
    if length_unit(image) == "px" or max(size) >= 4 * min(pixels, default=0.0):
        return []
    text = " x ".join(f"{mm:.2g}" for mm in size)
    return [f"The image is only {text} mm large; its spacing may be in metres: correct its header."]


def crop_mm(card: Card) -> float:
    """How long an image may be to be a box around one target."""
    return 1.5 * float(card.data["roi_mm"]) if card.data.get("roi_mm") else _CROP_MM


def _shown(image: Image, models: Sequence[ModelPackage], options: Options, roi: Box) -> Box:
    """The part of an image that all of the models are to be shown, by their cards' extent. Zeros about 8 crops of the hippocampus, 8
    voxels wide, had left Dice 0.10 and 0.65 of 0.90 and 0.87; a box in an image 20 mm larger on each side 0.81 and 0.86."""
    whole = part = Box.whole(image.shape)
    extents = {m.card.extent for m in models}
    if "image" in extents:
        return whole
    if extents == {"box"}:
        part = _crop(image, models[0].card, roi)
    part = content(image.channels, part, nearly=extents == {"box"})
    at = Box(*(tuple(math.floor(v + a) for v in image.point_to_index(options.at)[::-1]) for a in (0.5, 1.5))) if options.at else roi
    return whole if (roi & part).empty or (at & part).empty else part


def _crop(image: Image, card: Card, roi: Box) -> Box:
    """A ROI as a crop of the size that the model was trained on, or larger: of hippocampi in boxes that fit closely it found 0.73 and
    0.77 (Dice) of the 0.90 and 0.89 that it finds with what lies around them."""
    canonical, orientation = reorient_for(image, card.acquired)
    wanted = spacing_for(card, canonical)
    box = orientation.canonical_box(roi, image.shape)
    start, stop = list(box.start), list(box.stop)
    for axis, pixels in zip(card.axis_order, card.patch):
        own, n = canonical.spacing[2 - axis], canonical.shape[axis]
        context = 2 * card.context if axis == card.slice_axis else 0
        size = max(min(n, box.shape[axis] + context), min(n, math.ceil(_CROP_SHARE * pixels * (wanted[2 - axis] or own) / own)))
        start[axis] = min(max(0, box.start[axis] - (size - box.shape[axis]) // 2), n - size)
        stop[axis] = start[axis] + size
    return orientation.original_box(Box(tuple(start), tuple(stop)), image.shape)


def without_surround(image: Image, card: Card) -> Image:
    """An image as a card with "surround" is shown it: its surroundings of one value, the commonest on its faces, are the nearest other
    voxels; itself where they are less than a hundredth of it, or it is no crop. 38 held-out hippocampi of masked images, whose outer
    planes are not all of one value, so that content() keeps them: Dice 0.46 and 0.75 with zeros from 10 voxels beside it on, and 0.90 and
    0.89 so. Not where a background tells something, as about a model's own objects: such had 0.77 of 0.99."""
    if "surround" not in card.data:
        return image
    return image.like(np.stack([_without_surround(c) for c in image.channels]).reshape(image.array.shape))


def _without_surround(channel: np.ndarray) -> np.ndarray:
    if channel.size > _CROP_VOXELS or min(channel.shape) < 3:
        return channel
    face = np.ones(channel.shape, bool)
    face[1:-1, 1:-1, 1:-1] = False
    outside, sharp = _surround(channel, face, 0.0)
    # A mask that was interpolated, smoothed or is faintly noisy: 38 hippocampi at 0.9 mm gave Dice 0.484 and 0.741 and give 0.891 and
    # 0.872, smoothed 0.256 and 0.616, and 0.891 and 0.876. Dark tissue that was clipped at the 30th percentile ends as smoothly, but has
    # at most 26 % of the faces.
    if not sharp:
        more, sharp = _surround(channel, face, alike(channel))
        if more[face].mean() > 0.3:
            outside = more if sharp else distance(more, np.ones(3)) <= 2
    if not 0.01 < outside.mean() < 1:
        return channel
    nearest = sitk.DanielssonDistanceMapImageFilter()
    nearest.Execute(sitk.GetImageFromArray(np.where(outside, 0, np.arange(1, channel.size + 1).reshape(channel.shape)).astype(np.uint32)))
    return channel.flat[sitk.GetArrayFromImage(nearest.GetVoronoiMap()) - 1]


def _surround(channel: np.ndarray, face: np.ndarray, apart: float) -> tuple[np.ndarray, bool]:
    """Where a crop's commonest value on its faces goes on from these, and values as close to it; whether there is enough, and it ends
    sharply."""
    faces = channel[face].astype(np.float64)
    bins = np.round(faces / apart) if apart else faces
    values, counts = np.unique(bins, return_counts=True)
    value = float(np.median(faces[bins == values[counts.argmax()]]))
    same = np.abs(channel - value) <= apart
    # What is solid: clipped dark tissue that touches a face was taken with it (12 crops of 8 bits, from the 15th percentile on: 0.884 and
    # 0.863, where nothing replaced gives 0.901 and 0.882, and this 0.901 and 0.881).
    solid = sitk.BinaryMorphologicalOpening(sitk.GetImageFromArray(np.pad(same, 3, "edge").astype(np.uint8)), [2, 2, 2])
    labelled, _ = components(same & (sitk.GetArrayFromImage(solid)[3:-3, 3:-3, 3:-3] > 0))
    outside = np.isin(labelled, np.setdiff1d(labelled[face], 0))
    if not 0.01 < outside.mean() < 1:
        return outside, False
    away = distance(outside, np.ones(3))
    near, far = (channel[(away > n - 1) & (away <= n)] for n in (1, 4))
    return outside, not blurred(near, far, value)


def _placed(found: Prediction, part: Box, image: Image, background: Box | None) -> Prediction:
    """What was found in a part of the image, on its whole grid; background: where what lies beside that is it."""

    def put(values: Image | None) -> Image | None:
        if values is None:
            return None
        out = np.zeros((*values.array.shape[:-3], *image.shape), values.array.dtype)
        if background is not None and out.ndim == 4:
            out[0][background.slices] = 1
        out[part.trailing] = values.array
        return image.like(out)

    labels = put(found.labels)
    assert labels is not None
    return replace(
        found,
        labels=labels,
        uncertainty=put(found.uncertainty),
        mutual_information=put(found.mutual_information),
        probabilities=put(found.probabilities),
    )


def _region(image: Image, card: Card, options: Options) -> tuple[Box, Box | None]:
    """The box to compute, and the box whose centre is the target (None: no single target)."""
    whole = Box.whole(image.shape)
    box = options.roi
    if options.at is not None:
        if not np.all(np.isfinite(options.at)):
            raise UserError("The point must be three numbers in mm.")
        half = (card.data.get("roi_mm") or 60.0) / 2
        index = image.point_to_index(options.at)[::-1]
        if any(not -0.5 <= v <= n - 0.5 for v, n in zip(index, image.shape)):
            raise UserError(
                f"The point lies outside the image, at voxel ({', '.join(f'{v:.6g}' for v in index[::-1])}); choose a point inside."
            )
        around = Box(
            tuple(math.floor(v - half / s + 0.5) for v, s in zip(index, image.spacing[::-1])),
            tuple(math.floor(v + half / s + 0.5) + 1 for v, s in zip(index, image.spacing[::-1])),
        )
        clipped = (around if box is None else box) & whole
        if clipped.empty:
            raise UserError("The ROI lies outside the image; move it onto the image.")
        # 1e-4 voxel as in box_around_points(): a point on the ROI's face is inside.
        if any(not a - 0.5001 <= v <= b - 0.4999 for v, a, b in zip(index, clipped.start, clipped.stop)):
            raise UserError("The point lies outside the ROI; choose a point inside, or leave one of them out.")
        return clipped, around
    if box is None:
        return whole, None
    if len(box.start) != 3 or box.empty:
        raise UserError("The ROI is empty; give it a size along every axis.")
    if (box & whole).empty:
        raise UserError("The ROI lies outside the image; move it onto the image.")
    return box & whole, box


# -------------------------------------------------------------------------------------------------------------- running


class _Ticker:
    """Counts network calls; asks for cancellation and reports progress between them."""

    def __init__(self, progress: Progress | None, cancelled: Callable[[], bool] | None) -> None:
        self._progress, self._cancelled = progress, cancelled
        self.total, self.done, self._told = 1, 0, 0.0

    def check(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled

    def tick(self, n: int) -> None:
        self.done += n
        self.report(min(0.99, self.done / max(1, self.total)), "segmenting")
        self.check()

    def report(self, fraction: float, text: str) -> None:
        self._told = max(self._told, fraction)  # what is computed once more does not go back
        if self._progress is not None:
            self._progress(self._told, text)


def _bands(target: Box, roll: int, classes: int, finer: float) -> Iterator[Box]:
    """The target cut along the rolling axis into bands of about _BAND_BYTES of probabilities. finer: how many voxels of the models
    an image's voxel has."""
    plane = int(math.prod(target.shape) // target.shape[roll] * 4 * (classes + 1) * max(1.0, finer))
    depth = max(1, _BAND_BYTES // plane)
    for a in range(target.start[roll], target.stop[roll], depth):
        start, stop = list(target.start), list(target.stop)
        start[roll], stop[roll] = a, min(a + depth, target.stop[roll])
        yield Box(tuple(start), tuple(stop))


def _take(streams: Sequence[_Stream], band: Box) -> tuple[np.ndarray, np.ndarray]:
    """take() of one model that sees the image in several ways: at each voxel where the foreground is the likeliest."""
    (values, inner), *others = (s.take(band) for s in streams)
    first = 1 if streams[0].card.activation == "softmax" else 0
    for more, inner_more in others:
        ahead = more[first:].max(0) > values[first:].max(0)
        values, inner = np.where(ahead, more, values), np.where(ahead, inner_more, inner)
    return values, inner


class _Stream:
    """One model on one image. take(band) must be called with bands that advance along the rolling axis.

    Everything in here is in the model's frame: the slice axis of a 2D model comes first.
    """

    def __init__(
        self, image: Image, card: Card, engine: Engine, target: Box, roll: int, options: Options, ticker: _Ticker, mirror: int
    ) -> None:
        """mirror: over how many pixels from its edge an image is mirrored beyond it, where the card asks for that; 0: over all."""
        self.card, self.engine, self.ticker, self.options, self.mirror = card, engine, ticker, options, mirror
        self.order = card.axis_order
        self.roll = self.order.index(roll)
        self.intensity = options.intensity or card.intensity
        image = without_surround(image, card)
        self.raw = image.channels.transpose([0, *(a + 1 for a in self.order)])
        spacing, wanted = image.spacing[::-1], spacing_for(card, image)[::-1]
        frame = Image(self.raw, tuple(spacing[a] for a in self.order)[::-1])  # type: ignore[arg-type]
        self.grid = Grid.over(frame, tuple(wanted[a] for a in self.order)[::-1])
        self.normalise = normaliser(self.intensity, image.channels)
        need = self.grid.cover(self._framed(target))
        box = compute_box(need, self.grid.shape, card.patch, card.divisor, centred=bool(card.data.get("roi_mm")))
        self.tiling = _reachable(tile(box, card.patch, card.divisor, options.overlap), need)
        self.views = self._views(frame)
        self.work = math.prod(len(s) for s in self.tiling.starts) * len(self.views)
        self.box = need
        self.row = 0  # the next start along the rolling axis
        # Sums over planes [first, first + n) of the rolling axis: weighted probabilities, weighted entropy, weights.
        self.first = need.start[self.roll]
        shape = list(need.shape)
        shape[self.roll] = 0
        self.sums = np.zeros((card.outputs + 2, *shape), np.float32)

    def _framed(self, box: Box) -> Box:
        return Box(tuple(box.start[a] for a in self.order), tuple(box.stop[a] for a in self.order))

    def _views(self, frame: Image) -> list[View]:
        allowed = {"z": 0, "y": 1, "x": 2}
        axes = [self.order.index(allowed[n]) - 3 for n in self.card.data.get("flip_axes", ())]
        if self.card.dimensions == 2:
            axes = [a for a in axes if a != -3]  # across slices there is nothing to flip in a slice
        mm = [s * k for s, k in zip(frame.spacing[::-1], self.grid.scale)]
        tta = self.options.tta or self.card.data.get("tta", "none")
        return views(tta, sorted(axes), mm[1] / mm[2])

    def mirrors(self, labels: np.ndarray) -> bool:
        """Whether the network was shown its one target, of which these are the labels (z, y, x), or what should have been that, again in
        the mirror about the image."""
        if self.card.data.get("padding") != "reflect" or not self.card.of_target:
            return False
        short = [a for a in range(3) if self.grid.shape[a] < self.tiling.shape[a]]
        found = Box.around(labels)
        if found is None or not short:
            return bool(short)
        box, size = self._framed(found), self.raw.shape[1:]
        return all(min(box.start[a], size[a] - box.stop[a]) < _MIRROR_PIXELS * self.grid.scale[a] for a in short)

    def take(self, band: Box) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities (k, z, y, x) and the mean entropy of the single copies (z, y, x) in a canonical band."""
        target = self._framed(band)
        need = self.grid.cover(target)
        low, high = need.start[self.roll], need.stop[self.roll]
        ahead = [s for s in self.tiling.starts[self.roll][self.row :] if s < high]
        # Slices are independent rows of few tiles: several rows fill a batch.
        group = self.options.batch if self.tiling.shape[self.roll] == 1 else 1
        for i in range(0, len(ahead), group):
            self._compute_rows(ahead[i : i + group])
        self.row += len(ahead)
        if low > self.first:  # a view: copies for every band took 15 of 54 s with 60 labels
            self.sums = self.sums[(slice(None),) * (self.roll + 1) + (slice(low - self.first, None),)]
            self.first = low
        at = [slice(a - o, b - o) for a, b, o in zip(need.start, need.stop, self.box.start)]
        at[self.roll] = slice(low - self.first, high - self.first)
        part = self.sums[(slice(None), *at)]
        values = part[:-1] / part[-1:]
        values = resample_back(values, need, self.grid, target)
        values = values.transpose([0, *(int(a) + 1 for a in np.argsort(self.order))])
        return values[:-1], values[-1]

    def _compute_rows(self, rows: list[int]) -> None:
        """Run all tiles that start at these places of the rolling axis and add them to the sums."""
        shape = self.tiling.shape
        end = min(rows[-1] + shape[self.roll], self.box.stop[self.roll])
        grow = end - self.first - self.sums.shape[self.roll + 1]
        if grow > 0:
            pad = [(0, 0)] * 4
            pad[self.roll + 1] = (0, grow)
            self.sums = np.pad(self.sums, pad)
        starts = [list(s) for s in self.tiling.starts]
        starts[self.roll] = rows
        row = Box(tuple(s[0] for s in starts), tuple(s[-1] + n for s, n in zip(starts, shape)))
        k = self.card.context
        row = row.grown((k, 0, 0)) & Box.whole(self.grid.shape)
        # Overlapping tiles share the resampling.
        raw = sample(self.raw, self.grid, row, self.card.interpolation, floor_of(self.intensity))
        batch: list[np.ndarray] = []
        corners: list[tuple[int, ...]] = []
        for corner in product(*starts):
            box = Box(corner, tuple(a + n for a, n in zip(corner, shape)))
            inside = box.grown((k, 0, 0)) & Box.whole(self.grid.shape)
            values = raw[(slice(None), *inside.relative_to(row).slices)]
            if is_air(values, self.intensity):
                self._add_air(box)
                self.ticker.tick(len(self.views))
                continue
            batch.append(self._network_input(values, inside, box))
            corners.append(corner)
            if len(batch) >= self.options.batch:
                self._run(batch, corners)
                batch, corners = [], []
        if batch:
            self._run(batch, corners)

    def _network_input(self, values: np.ndarray, inside: Box, box: Box) -> np.ndarray:
        """Normalise, and pad beyond the image as the card says; context slices beyond it repeat the last one.
        values (c, z, y, x) on `inside` -> [C, (D,) H, W] on `box`."""
        values = self.normalise(values)
        if self.card.dimensions == 2:
            k = self.card.context
            planes = np.clip(np.arange(box.start[0] - k, box.start[0] + k + 1), inside.start[0], inside.stop[0] - 1)
            values = values[:, planes - inside.start[0]].reshape(-1, 1, *inside.shape[1:])
            inside = Box((box.start[0], *inside.start[1:]), (box.stop[0], *inside.stop[1:]))
        pad = [(0, 0), *((a - c, d - b) for a, b, c, d in zip(inside.start, inside.stop, box.start, box.stop))]
        if self.card.data.get("padding") == "reflect":
            for axis, (low, high) in enumerate(pad):
                if low or high:
                    values = values.take(mirrored(-low, values.shape[axis] + high, values.shape[axis], self.mirror), axis)
        elif any(map(any, pad)):
            patch, shape = self.card.patch, self.grid.shape
            if "surround" in self.card.data and sorted(n / p for n, p in zip(shape, patch))[1] < _CLOSE_SHARE:
                lack = (max(0, math.ceil(_CROP_SHARE * p) - n) for n, p in zip(shape, patch))
                edge = [(0, 0), *((min(n // 2, low), min(n - min(n // 2, low), high)) for n, (low, high) in zip(lack, pad[1:]))]
                values = np.pad(values, edge, "edge")
                pad = [(low - a, high - b) for (low, high), (a, b) in zip(pad, edge)]
            values = np.pad(values, pad)
        return values if self.card.dimensions == 3 else values[:, 0]

    def _run(self, batch: list[np.ndarray], corners: list[tuple[int, ...]]) -> None:
        stack = np.stack(batch)
        total: Any = None
        inner: Any = None
        weight: Any = None
        for view in self.views:
            self.ticker.check()
            logits = self.engine.run(np.ascontiguousarray(view.forward(stack)))
            if logits.shape != (len(stack), self.card.outputs, *stack.shape[2:]):
                raise UserError(f"{self.card.name} gave an output of {logits.shape}, not what its card says; export it again.")
            p = activate(logits, self.card.activation)
            if not math.isfinite(p.sum()):  # half precision ends at 65504; as labels it would be all or nothing
                raise UserError(f"{self.card.name} gave values that are no numbers; run it in fp32 or on the CPU, or get the model again.")
            p, w = view.backward(p)
            h = entropy(p, self.card.activation) if self.options.uncertainty else np.zeros(p[:, 0].shape, np.float32)
            if total is None:
                total, inner, weight = p, h, np.ones(p.shape[-2:], np.float32)
            else:
                w = np.ones(p.shape[-2:], np.float32) if w is None else w
                total, inner, weight = total + p * w, inner + h * w, weight + w
            self.ticker.tick(len(stack))
        if len(self.views) > 1:
            total, inner = total / weight, inner / weight
        for p, h, corner in zip(total, inner, corners):
            values = np.concatenate([p, h[None]])
            self._add(Box(corner, tuple(a + n for a, n in zip(corner, self.tiling.shape))), values.reshape(-1, *self.tiling.shape))

    def _add_air(self, box: Box) -> None:
        values = np.zeros((self.card.outputs + 1, *box.shape), np.float32)
        if self.card.activation == "softmax":
            values[0] = 1
        self._add(box, values)

    def _add(self, box: Box, values: np.ndarray) -> None:
        """values (k + 1, ...) of a tile into the sums, weighted; what lies outside the band's box is dropped."""
        held_start, held_stop = list(self.box.start), list(self.box.stop)
        held_start[self.roll] = self.first
        held_stop[self.roll] = self.first + self.sums.shape[self.roll + 1]
        held = Box(tuple(held_start), tuple(held_stop))
        inside = box & held
        if inside.empty:
            return
        source = (slice(None), *inside.relative_to(box).slices)
        into = self.sums[(slice(None), *inside.relative_to(held).slices)]
        weights = blend_weights(self.tiling.shape, rims(self.tiling, box.start))[source[1:]]
        for total, part in zip(into, values[source]):  # one after the other, in the cache: of 60 labels half the time
            total += part * weights
        into[-1] += weights


def _reachable(tiling: Tiling, need: Box) -> Tiling:
    """Without the tiles that lie wholly in the margin."""
    starts = tuple(
        tuple(s for s in axis if s < b and s + n > a) for axis, n, a, b in zip(tiling.starts, tiling.shape, need.start, need.stop)
    )
    return Tiling(tiling.shape, starts)


# -------------------------------------------------------------------------------------------------------- probabilities


def activate(logits: np.ndarray, activation: str) -> np.ndarray:
    """Logits [N, K, ...] to probabilities."""
    if activation == "sigmoid":
        return (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
    # In place: with 60 labels a batch of four patches of 96x96x96 voxels is 0.9 GB, and was held four times.
    e = logits - logits.max(1, keepdims=True)
    np.exp(e, out=e)
    e /= e.sum(1, keepdims=True)
    return e.astype(np.float32, copy=False)


def entropy(probabilities: np.ndarray, activation: str) -> np.ndarray:
    """[N, K, ...] to [N, ...]: 0 certain, 1 undecided. For sigmoid outputs the largest of the labels' entropies."""
    p = np.clip(probabilities, 1e-12, 1)
    if activation == "softmax":
        return (-(p * np.log(p)).sum(1) / math.log(p.shape[1])).astype(np.float32)
    q = np.clip(1 - probabilities, 1e-12, 1)
    return (-(p * np.log(p) + q * np.log(q)) / math.log(2)).max(1).astype(np.float32)


class _Result:
    """The full-size arrays, in the canonical view, and how a band of probabilities enters them."""

    def __init__(self, shape: tuple[int, ...], card: Card, options: Options, split: bool) -> None:
        values = [label.value for label in card.labels]
        dtype = np.uint8 if max(values) < 256 else np.uint16
        self.softmax = card.activation == "softmax"
        self.table = np.array([0, *values] if self.softmax else values, dtype)
        self.activation = card.activation
        self.labels = np.zeros(shape, dtype)
        self.uncertainty = np.zeros(shape, np.float32) if options.uncertainty else None
        self.mutual_information = np.zeros(shape, np.float32) if options.uncertainty and split else None
        self.probabilities = np.zeros((card.outputs, *shape), np.float32) if options.probabilities else None

    def put(self, band: Box, p: np.ndarray, inner: np.ndarray) -> None:
        best = self.table[p.argmax(0)]
        if not self.softmax:
            best[p.max(0) < 0.5] = 0
        self.labels[band.slices] = best
        if self.probabilities is not None:
            self.probabilities[(slice(None), *band.slices)] = p
        if self.uncertainty is not None:
            total = entropy(p[None], self.activation)[0]
            self.uncertainty[band.slices] = total
            if self.mutual_information is not None:
                self.mutual_information[band.slices] = np.maximum(total - inner, 0)
