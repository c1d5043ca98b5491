"""Prompted segmentation: clicks and a box in, one lesion's mask out.

>>> session = ClickSession(read_image("ct.nii.gz"))
>>> session.add_point((-62.1, -14.0, -120.5))                  # LPS mm, on the nodule
>>> session.add_point((-55.0, -14.0, -120.5), positive=False)  # this vessel is not part of it
>>> session.mask, session.measure()
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engines import Engine, choose_engine
from ..image import Box, Grid, Image, UserError, check_geometry, content, crop_mask, reorient, resample_back, sample, slices_across
from ..intensity import check_finite, floor_of, normaliser, warnings_for
from ..measure import measure_steps
from ..model import Card, ModelPackage, find_model
from ..postprocess import components, distance
from ..steps import complete
from .augment import views
from .predict import Cancelled, Options, Prediction, too_small
from .second import SecondOpinion

MODEL = "lung-nodule-click"
# Standard deviation of a click's Gaussian, in voxels (z, y, x) of the model's grid.
CLICK_SIGMA = (1.6, 2.8, 2.8)
# How much coarser than the model's the grid gets for what is larger than a patch, and finer for what is small.
ZOOMS = (0.5, 0.7, 1.0, 1.5, 2.25, 3.4)
# A click beside a small nodule still means it: this many voxels of the model's grid (2 mm) are forgiven.
_REACH = 3
# A patch with more than this share of voxels above this HU shows neither lung nor a nodule's edge.
SOFT_TISSUE_HU, SOFT_SHARE = -300.0, 0.8
# Of what lies 1 to 4 mm around a lesion, this share must be below -500 HU. Of 185 held-out LIDC nodules 0.46 refuses a first click in
# two and 0.42 in one; of a mass of 45 mm at the mediastinum a click in the middle gives 0.83 and 0.90. Of 300 clicks on bone, fat and
# soft tissue, in lung and on the edge, far from lesions, 0.40 gives a mask at four more than 0.46, the largest of 2.4 ml, and a part
# of a mass of 67 mm instead of it.
LUNG_HU, LUNG_SHARE, AIR_HU = -500.0, 0.42, -850.0
# A mass at the hilum has less. Where two looks find the same, with this Dice, each needs this share only: of ten clicks in a mass of
# 35 mm (shares 0.36 to 0.41, Dice of two looks 0.84 to 0.92) six were refused; of 160 clicks on nothing in five scans three agree so
# (0.83 to 0.87), which are fat or dense. Of what is larger than a mass of 38 mm it is not believed: two looks gave the same 77 ml of
# back muscle (0.34 and 0.36) and 66 ml about a bone, and of 16 first clicks in each of four lesions none is worse so, and one better.
TWICE_DICE, TWICE_SHARE, TWICE_ML = 0.8, 0.3, 30.0
# Skin has air beside it too. Of what is below LUNG_HU around 779 LIDC nodules at most 0.36 is below -970 HU, but for one nodule's
# 0.46; around what clicks on the fat below the skin gave 0.4 to 0.8.
OUTSIDE_HU, OUTSIDE_SHARE = -970.0, 0.4
# Of 779 LIDC nodules none has more than 0.31 of its voxels in fat's range of HU, where their edges lie too; of the 83 from 4 ml on
# none more than 0.21. The chest wall that two clicks on its fat gave, 20 and 32 ml, had 0.33 and more.
FAT_HU, FAT_SHARE, LARGE_ML, LARGE_FAT_SHARE = (-150.0, -30.0), 0.4, 4.0, 0.25
# Of these 83 none has more than 0.21 above 250 HU; the heart, full of contrast medium, which a click on it gave, had 0.51.
DENSE_HU, LARGE_DENSE_SHARE = 250.0, 0.3
_BORDER_VOXELS = 6
# What the largest patch cuts with more than this share of the mask's own size (voxels to 2/3) goes on. A tip of a mass of 156 ml, found
# with a Dice of 0.86, had 0.06; what leaked from another place in it into the mediastinum 0.5.
ENDLESS_SHARE = 0.1
# What is a part of a mass gets larger the further away one looks. Of 78 clicks that gave 2 ml or more of a lesion, in LIDC cubes and
# two masses, the furthest look gave at most 2.3 times as much with it in it; of six that gave a part of a mass of 67 mm, 5 to 60 times.
# Of 30 first clicks anywhere in that mass 26 find it so, 22 without; of 375 on nothing none is changed.
PART_ML, GROWN, WITHIN = 2.0, 4.0, 0.9
# A second opinion's share of the log-odds, of a first click's and of a correction's, of which it knows nothing. It counts where it finds
# the same within 2 voxels of the mask, with this Dice, and that is no larger than this: its time grows with it. 162 held-out LIDC crops,
# after 1, 3 and 5 clicks: Dice 0.846, 0.869 and 0.880, without it 0.827, 0.862 and 0.875; 23 cubes 0.709, 0.759 and 0.778, without it
# 0.702, 0.749 and 0.772. To 40 mm it would be 0.001 more, and twice the time. With a Dice of 0.5 a nodule of 6 mm lost 0.25.
SECOND_SHARES, SECOND_DICE, SECOND_MM = (0.6, 0.3), 0.6, 30.0
# The model knows boxes that fit and fills larger ones: of 23 held-out cubes such of 1, 1.25, 1.5, 2 and 2.5 times the nodule's size, up to
# an eighth of it aside, gave a Dice of 0.725, 0.764, 0.720, 0.598 and 0.393. So what a click in the middle finds is taken where so much of
# it lies in the box, with less than this share of its volume and at least this one of each side: 0.693, 0.737, 0.709, 0.705 and 0.722; of
# 162 crops, which end close to their nodule, boxes that fit gave 0.844 and give 0.836 (score_click): it is taken in five of them and in two
# of the cubes, where the click alone finds little. From 0.4 of each side on it would be 0.708, 0.755, 0.709, 0.666 and 0.413.
LOOSE_WITHIN, LOOSE_SHARE, LOOSE_LEAST = 0.95, 0.35, 0.2
_NOTHING = "Nothing was found here; click inside the lesion, or draw a box around it."
_NO_LUNG = "No lesion with lung around it was found here; if it is one, click a second time on it, or draw a box around it."
_FAT = "What was found here is fat; if it is a lesion, click a second time on it, or draw a box around it."
_ENDLESS = "Nothing that ends was found here; if it is a lesion, click a second time on it, or draw a box around it."
_DENSE = "What was found here is bone or full of contrast medium; if it is a lesion, click a second time on it, or draw a box around it."
_NO_HU = "Without HU what was found here may be anything; if it is a lesion, click a second time on it, or draw a box around it."
# Of a first click, whose text begins so; the same click and a second one are believed.
DOUBTS = (_NO_LUNG, _FAT, _DENSE, _ENDLESS, _NO_HU)
LOOSE = "The box is much larger than what a click in its middle finds, which was taken; give the box once more if all of it is meant."
BEYOND = "It is larger than what can be looked at and was cut there: its size is not true; click on what is no part of it."

Index = Sequence[float]
Point = tuple[float, float, float]
# ("point", x, y, z, positive) | ("box", x0, y0, z0, x1, y1, z1), both in LPS mm | ("mask", array (z, y, x), start (z, y, x))
Prompt = Sequence[Any]


def prompt_channels(
    shape: Sequence[int],
    positive: Sequence[Index],
    negative: Sequence[Index],
    box: tuple[Index, Index] | None,
    previous: np.ndarray | None,
) -> np.ndarray:
    """What a click model gets beside the image: float32 (4, z, y, x) of positive clicks, negative clicks, box, previous mask.

    Points are (z, y, x) indices of the patch, whole or not, and may lie outside it. box: its first and last corner.
    previous: (z, y, x), 0..1. A click is a Gaussian of CLICK_SIGMA; of several the largest value counts.
    """
    out = np.zeros((4, *shape), np.float32)
    for channel, points in zip(out, (positive, negative)):
        for point in points:
            falls = [np.exp(-0.5 * ((np.arange(n) - p) / s) ** 2).astype(np.float32) for n, p, s in zip(shape, point, CLICK_SIGMA)]
            np.maximum(channel, falls[0][:, None, None] * falls[1][:, None] * falls[2], out=channel)
    if box is not None:
        inside = tuple(slice(max(0, round(a)), max(0, round(b) + 1)) for a, b in zip(*box))
        out[2][inside] = 1
    if previous is not None:
        out[3] = previous
    return out


@dataclass(frozen=True)
class Answer:
    """The mask after a prompt: mask (z, y, x) uint8 of 0 and 1 in `box` of the image's index space (both empty where
    nothing was found); text: a sentence for the person, why nothing was found or what speaks against it, or "". zoom: how
    much coarser than the model's grid it ran; where that was finer, later clicks do not undercut it."""

    box: Box
    mask: np.ndarray
    text: str = ""
    zoom: float = 1.0

    @property
    def found(self) -> bool:
        return not self.box.empty


_EMPTY = Answer(Box((0, 0, 0), (0, 0, 0)), np.zeros((0, 0, 0), np.uint8))
_LATER = replace(_EMPTY)  # stands for an answer that a mask which follows makes needless


@dataclass(frozen=True)
class _Prompts:
    """Indices (z, y, x) of the canonical image."""

    points: tuple[tuple[Point, bool], ...] = ()  # in order, and whether positive
    box: tuple[Point, Point] | None = None
    loose: tuple[Point, Point] | None = None  # a box that was drawn loosely: its middle stands for a click
    made: tuple[tuple[Any, ...], ...] = ()  # all of them in order, as _comparable() has them

    @property
    def positive(self) -> tuple[Point, ...]:
        middle = [_middle(self.loose)] if self.loose is not None else []
        return (*middle, *(p for p, positive in self.points if positive))

    @property
    def negative(self) -> tuple[Point, ...]:
        return tuple(p for p, positive in self.points if not positive)


def check_prompt(prompt: Prompt) -> Prompt:
    """The prompt, of plain numbers; UserError for what is none."""
    try:
        if prompt[0] == "point":
            _, x, y, z, positive = prompt
            return "point", float(x), float(y), float(z), bool(positive)
        if prompt[0] == "box":
            _, *ends = prompt
            if len(ends) == 6:
                return "box", *(float(v) for v in ends)
        if prompt[0] == "mask":
            _, mask, start = prompt
            z, y, x = (int(v) for v in start)
            if np.ndim(mask) == 3 and mask.dtype.kind in "biuf":
                return "mask", mask, (z, y, x)
    except (TypeError, ValueError, LookupError, AttributeError):
        pass
    raise UserError("A prompt must be a point or a box in mm, or a mask of three dimensions.")


def _comparable(prompt: Prompt) -> tuple[Any, ...]:
    """Equal for prompts that do the same; a mask by its content, so that no session holds every mask that was ever sent."""
    if prompt[0] != "mask":
        return tuple(prompt)
    part, start = crop_mask(prompt[1], prompt[2])
    return "mask", start, part.shape, hashlib.sha256(np.packbits(part).tobytes()).digest()


class ClickSession:
    """One image, one lesion at a time.

    image: a CT in HU, any spacing and direction. model: a click package, its name or file. engine: a ready one of that
    model, else options chooses; second: what the card names as its second opinion, ready as well. The same prompts give
    the same mask. Raises UserError for an image or a model that cannot be clicked on. seconds: where the time since the
    last replay() went.
    """

    def __init__(
        self,
        image: Image,
        model: ModelPackage | str | Path | None = None,
        engine: Engine | None = None,
        options: Options = Options(),
        second: tuple[ModelPackage, Engine] | None = None,
    ) -> None:
        check_geometry(image)
        package = model if isinstance(model, ModelPackage) else find_model(str(model or MODEL))
        card = package.card
        if card.data["task"] != "click":
            raise UserError(f"{card.name} does not work from clicks; choose a click model, such as {MODEL}.")
        if image.n_channels != len(card.data["channels"]) or min(image.shape) < 2:
            raise UserError(
                f"{image.source or 'The image'} is no scalar volume of several slices, which {card.name} needs; choose a CT scan."
            )
        self.image, self.card = image, card
        self.warnings = tuple(warnings_for(card.intensity, image.channels))
        self._no_hu = bool(self.warnings)
        self.warnings += tuple(too_small(image, card))
        self._canonical, self._orientation = reorient(image)
        self._scanned = _scanned(self._canonical.channels)
        choice = options.engine, options.device, options.precision, options.threads
        self._engine = engine or choose_engine(package, *choice)
        self._second: SecondOpinion | None = None
        if SecondOpinion.fits(self._canonical):
            try:
                other = None if second else second_opinion(card)
                second = (other, choose_engine(other, *choice)) if other is not None else second
            except UserError as e:
                self.warnings += (f"{e} Without it the outlines of {card.name} are less exact.",)
            if second is not None:
                self._second = SecondOpinion(*second, self._canonical)
        self._normalise = normaliser(card.intensity, self._canonical.channels)
        if not (np.isfinite(self._normalise.shift).all() and np.isfinite(self._normalise.scale).all()):
            check_finite(image.channels, str(image.source or "The image"))
        flips = sorted("zyx".index(a) - 3 for a in card.data.get("flip_axes", ()))
        self._views = views("none" if (options.tta or card.data.get("tta", "none")) == "none" else "flips", flips, 1.0)
        self._history: list[tuple[_Prompts, Answer]] = [(_Prompts(), _EMPTY)]  # answers in the canonical index space
        self._noting = False  # replay() is at prompts before a mask
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def another(self) -> ClickSession:
        """A session for another lesion of the same image, which shares all but the prompts: it costs nothing to make."""
        out = copy.copy(self)
        out._history, out.seconds = [(_Prompts(), _EMPTY)], {}
        return out

    def warm(self) -> None:
        """Run once at the image's middle, so that the first click has nothing left to load."""
        middle = tuple((n - 1) / 2 for n in self._canonical.shape)
        prompts = _Prompts(((middle, True),))  # type: ignore[arg-type]
        try:
            self._run(self._frame(prompts, _EMPTY), prompts, _EMPTY)
            if self._second is not None:
                self._second.warm()
        except UserError:
            pass  # of this place in the image; a click elsewhere may do

    # ---------------------------------------------------------------------------------------------------------- prompts

    def add_point(self, point: Point, positive: bool = True) -> Answer:
        """A click in LPS mm on what is (or, not positive, is not) part of the lesion. Of two on one voxel the later one holds."""
        prompts, answer = self._history[-1]
        index = self._index(point)
        prompts = _noted(prompts, ("point", *point, positive))
        if positive:
            others = (p for p in prompts.points if p[1] or _voxel(p[0]) != _voxel(index))
            prompts = replace(prompts, points=(*others, (index, True)))
            apart = np.ptp(prompts.positive, axis=0) / self._spacing(ZOOMS[-1])
            if (apart > np.array(self.card.data["patch"]) - 2).any():  # the furthest look would show neither
                raise UserError("This click is too far from the others for one lesion and was not taken; begin the next lesion for it.")
        else:
            prompts = replace(prompts, points=(*prompts.points, (index, False)))
        return self._ask(prompts, answer)

    def add_box(self, corner: Point, opposite: Point) -> Answer:
        """Two opposite corners in LPS mm of a box that fits closely around the lesion, along the image's axes; it takes the place of an
        earlier box. A first one that was drawn loosely does as a click in its middle would."""
        ends = np.array([self._index(corner, clip=True), self._index(opposite, clip=True)])
        if not (np.ptp(ends, axis=0) > 0).all():
            raise UserError("The box is flat or lies outside the image; draw it around the lesion.")
        if (np.ptp(ends, axis=0) / self._spacing(ZOOMS[-1]) > np.array(self.card.data["patch"]) + 2).any():
            raise UserError("The box is too large for one lesion; draw it closer around the lesion.")
        prompts, answer = self._history[-1]
        prompts = _noted(prompts, ("box", *corner, *opposite))
        first, last = (tuple(float(v) for v in e) for e in (ends.min(0), ends.max(0)))
        return self._ask(replace(prompts, box=(first, last), loose=None), answer)  # type: ignore[arg-type]

    def set_mask(self, mask: np.ndarray, start: Sequence[int] = (0, 0, 0)) -> None:
        """Go on from a mask that a person corrected: (z, y, x) of 0 and 1 whose first voxel is the image's voxel `start`."""
        placed = Box(tuple(start), tuple(a + n for a, n in zip(start, mask.shape)))
        if placed & Box.whole(self.image.shape) != placed:
            raise UserError("The mask does not fit the image; take one of the same scan.")
        inside = Box.around(mask)
        # A box said where something is to be found, and here it is.
        prompts = replace(_noted(self._history[-1][0], ("mask", mask, start)), box=None, loose=None)
        if inside is None:
            self._history.append((prompts, _EMPTY))
            return
        part = self._orientation.canonical((mask[inside.slices] > 0).astype(np.uint8))
        box = self._orientation.canonical_box(inside.shifted(start), self.image.shape)
        self._history.append((prompts, Answer(box, part, zoom=ZOOMS[0])))

    def replay(self, prompts: Sequence[Prompt], cancelled: Callable[[], bool] | None = None) -> Answer:
        """Bring the session to exactly these prompts, in their order, whatever it had: what both begin with is kept, the rest
        undone and run anew. The mask is that of the same prompts made one by one. cancelled: asked before each prompt.

        Raises UserError for a prompt that cannot be followed, and Cancelled; the session is then at the prompts before it.
        """
        prompts = [check_prompt(p) for p in prompts]
        made = self._history[-1][0].made
        common = 0
        while common < min(len(prompts), len(made)) and _comparable(prompts[common]) == made[common]:
            common += 1
        del self._history[common + 1 :]
        self.seconds = {}
        masks = [i for i, p in enumerate(prompts) if p[0] == "mask"]
        try:
            for i, (kind, *values) in enumerate(prompts[common:], common):
                if cancelled is not None and cancelled():
                    raise Cancelled
                self._noting = bool(masks) and i < masks[-1]
                if kind == "point":
                    self.add_point(tuple(values[:3]), values[3])  # type: ignore[arg-type]
                elif kind == "box":
                    self.add_box(tuple(values[:3]), tuple(values[3:]))  # type: ignore[arg-type]
                else:
                    self.set_mask(*values)
        finally:
            self._noting = False
        return self.answer

    def _catch_up(self) -> None:
        """Run the last prompts where they were only noted, since what made that needless has gone."""
        noted = []
        while self._history[-1][1] is _LATER:
            noted.append(self._history.pop()[0])
        for prompts in reversed(noted):
            before, answer = self._history[-1]
            if before.loose is not None and before.loose == prompts.box and prompts.made[-1][0] != "box":
                prompts = replace(prompts, box=None, loose=before.loose)
            self._ask(prompts, answer)

    def undo(self) -> Answer:
        """Back to before the last prompt or set_mask(); at the beginning, nothing."""
        if len(self._history) > 1:
            self._history.pop()
        with suppress(UserError):  # what a mask made needless may hold a prompt that cannot be followed: back to before that
            self._catch_up()
        return self.answer

    def clear(self) -> None:
        """The next lesion: no prompts, no mask, nothing to undo."""
        del self._history[1:]

    # ---------------------------------------------------------------------------------------------------------- results

    @property
    def answer(self) -> Answer:
        self._catch_up()
        answer = self._history[-1][1]
        if not answer.found:
            return answer
        box = self._orientation.original_box(answer.box, self.image.shape)
        return replace(answer, box=box, mask=np.ascontiguousarray(self._orientation.original(answer.mask)))

    @property
    def mask(self) -> np.ndarray:
        """uint8 (z, y, x) of 0 and 1 on the image's grid."""
        out, answer = np.zeros(self.image.shape, np.uint8), self.answer
        out[answer.box.slices] = answer.mask
        return out

    @property
    def prompts(self) -> list[tuple[Point, bool]]:
        """The clicks so far: LPS mm, and whether positive."""
        return [(self._canonical.index_to_point(point[::-1]), positive) for point, positive in self._history[-1][0].points]

    def prediction(self) -> Prediction:
        """The mask as what predict() gives."""
        card = self.card
        labels = self.image.like(self.mask * np.uint8(card.labels[0].value))
        name = f"{card.name}-{card.version}"
        engines = tuple(e.describe() for e in (self._engine, *([self._second.engine] if self._second is not None else [])))
        answer = self.answer
        warnings = (*(text for text in (BEYOND, LOOSE) if answer.text.startswith(text)), *self.warnings)
        return Prediction(labels, card.labels, name, answer.box, engines=engines, warnings=warnings, algorithm="SEMIAUTOMATIC")

    def measure(self) -> dict[str, Any]:
        """measure() of the mask; 0 voxels where there is none."""
        answer = self.answer
        box = answer.box if answer.found else Box((0, 0, 0), (1, 1, 1))
        part = self.image.crop(box)
        labels = part.like((answer.mask if answer.found else np.zeros((1, 1, 1), np.uint8)) * np.uint8(self.card.labels[0].value))
        return complete(measure_steps(labels, self.card.labels[:1], part, across=slices_across(self.image)))[0]

    # ---------------------------------------------------------------------------------------------------------- running

    def _index(self, point: Point, clip: bool = False) -> Point:
        if not all(math.isfinite(v) for v in point):
            raise UserError("The point must be three numbers in mm.")
        # In mm a voxel's middle is it but for the last bits, and halfway between two of them is where a patch goes to the one or to the
        # other: 1e-12 mm less, as after a transform there and back, gave lung1's nodule another mask (Dice 0.994) after three clicks.
        x, y, z = (round(v, 6) for v in self._canonical.point_to_index(point))
        index = z, y, x
        if not clip and any(not -0.5 <= v <= n - 0.5 for v, n in zip(index, self._canonical.shape)):
            raise UserError("The point lies outside the image; click inside it.")
        # The image's far face is no voxel's, as _voxel() has it.
        low, beyond = (0.0, 1.0) if clip else (-0.5, 0.500001)
        return tuple(min(max(v, low), n - beyond) for v, n in zip(index, self._canonical.shape))  # type: ignore[return-value]

    def _ask(self, prompts: _Prompts, before: Answer) -> Answer:
        if self._noting:
            self._history.append((prompts, _LATER))
            return _LATER
        if before is _LATER:
            self._catch_up()
            before = self._history[-1][1]
        if before.found:
            ends = [*prompts.positive, *(prompts.box or ()), before.box.start, [stop - 1 for stop in before.box.stop]]
            reach = np.ptp(ends, axis=0) / self._spacing(ZOOMS[-1])  # voxels of the furthest look
            # That look would show a part. What it gave itself may end a little beyond it.
            if (reach > np.array(self.card.data["patch"]) + 2).any():
                raise UserError(
                    "This was not taken: what is marked and clicked on would be too large for one lesion; erase what is no part of it, "
                    "or begin the next one."
                )
        if prompts.box is not None and not prompts.points and not before.found:
            inside = self._in_loose(prompts.box)
            if inside is not None:
                text = " ".join(filter(None, (LOOSE, inside.text)))
                self._history.append((replace(prompts, box=None, loose=prompts.box), replace(inside, text=text)))
                return self.answer
        first = not before.found and prompts.box is None
        in_lung = first and expects_lung(self.card)
        frame = self._frame(prompts, before)
        if in_lung:
            frame = frame[0], self._open(*frame)
        # What is found and refused, the first click's network alone decides; the second opinion outlines it, see _closer().
        answer, border, lung = self._run(frame, prompts, before, in_lung, before.found)
        needed = LUNG_SHARE
        for _ in range(2 * len(ZOOMS)):
            wider = self._wider(frame, answer, border)
            if wider is None and answer.found and lung < needed:
                # A part of a mass, or of an organ: what is around it will tell.
                wider = next(((frame[0], z) for z in ZOOMS if z > frame[1]), None)
            if wider is None:
                break
            frame, seen, beside = wider, answer, lung
            answer, border, lung = self._run(frame, prompts, before, in_lung, before.found)
            twice = beside >= TWICE_SHARE and self._ml(answer) <= TWICE_ML and _agreement(seen, answer) >= TWICE_DICE
            needed = TWICE_SHARE if twice else LUNG_SHARE
        likely = lung >= needed
        if in_lung and likely and not border:
            answer = self._all_of(answer, prompts)
        text = "" if answer.found else _NOTHING
        other = self._other_tissue(answer) if in_lung and answer.found else ""
        endless = border > ENDLESS_SHARE
        if first and answer.found and len(prompts.positive) < 2 and (endless or not likely or other):
            # Of values that are no HU these doubts say little: what they call bone may be any tissue.
            answer, text = replace(_EMPTY), _NO_HU if self._no_hu else _ENDLESS if endless else other or _NO_LUNG
        elif endless and answer.found:
            text = BEYOND
        elif not before.found and answer.found and not border:
            answer = self._closer(frame, prompts, answer, needed if in_lung else 0.0)
        self._history.append((prompts, replace(answer, text=" ".join([*([text] if text else []), *self.warnings]))))
        return self.answer

    def _in_loose(self, box: tuple[Point, Point]) -> Answer | None:
        """What a click in a box's middle finds, where that shows the box to be drawn loosely."""
        session = self.another()
        session.seconds = self.seconds
        session._ask(_Prompts(((_middle(box), True),)), _EMPTY)
        answer = session._history[-1][1]
        low, high = box
        drawn = Box(tuple(math.ceil(v) for v in low), tuple(math.floor(v) + 1 for v in high))  # of one slice it goes from edge to edge
        inside = answer.box & drawn
        if not answer.found or inside.empty or answer.text.startswith(BEYOND):
            return None
        within = np.count_nonzero(answer.mask[inside.relative_to(answer.box).slices]) / np.count_nonzero(answer.mask)
        shares = np.array(inside.shape) / drawn.shape
        return answer if within > LOOSE_WITHIN and shares.prod() < LOOSE_SHARE and shares.min() >= LOOSE_LEAST else None

    def _all_of(self, answer: Answer, prompts: _Prompts) -> Answer:
        """The mass that what was found is a part of, as the furthest look shows it; what was found where it is all."""
        found = np.count_nonzero(answer.mask)
        if answer.zoom == ZOOMS[-1] or self._ml(answer) < PART_ML:
            return answer
        look = (np.array(answer.box.start) + answer.box.stop - 1) / 2, ZOOMS[-1]
        for _ in range(2):
            whole, border, lung = self._run(look, prompts, _EMPTY, True)
            if np.count_nonzero(whole.mask) < GROWN * found or _shared(whole, answer) < WITHIN * found:
                return answer
            again = self._wider(look, whole, border)
            if again is None:
                break
            look = again
        return whole if border <= ENDLESS_SHARE and lung >= LUNG_SHARE and not self._other_tissue(whole) else answer

    def _closer(self, frame: tuple[np.ndarray, float], prompts: _Prompts, answer: Answer, needed: float) -> Answer:
        """What was found in `frame`, from as close as shows it whole, and by the second opinion; needed: the share of lung around it.

        162 held-out LIDC nodules, one click: Dice 0.803 as first found, 0.821 so; of those below 6 mm 0.766 and 0.813."""
        low, high = np.array(answer.box.start, float), np.array(answer.box.stop) - 1.0
        closest = fitting((high - low) / self._spacing(1.0), self.card.data["patch"], ZOOMS[0])
        for zoom in (z for z in ZOOMS if closest <= z < frame[1]):
            # What is around it was seen from further away.
            closer, cut, lung = self._run(((low + high) / 2, zoom), prompts, _EMPTY, needed > 0 and zoom >= 1, seconded=True)
            if not cut:
                if closer.found and lung >= needed:
                    return closer
                break
        if self._second is not None and answer.zoom == frame[1]:
            again, cut, _ = self._run(frame, prompts, _EMPTY, seconded=True)
            return again if again.found and not cut else answer
        return answer

    def _other_tissue(self, answer: Answer) -> str:
        """The sentence of what no nodule consists of; "" where it may be one."""
        inside = self._canonical.channels[0][answer.box.slices][answer.mask > 0]
        large = self._ml(answer) >= LARGE_ML
        if np.mean((inside > FAT_HU[0]) & (inside < FAT_HU[1])) > (LARGE_FAT_SHARE if large else FAT_SHARE):
            return _FAT
        return _DENSE if large and np.mean(inside > DENSE_HU) > LARGE_DENSE_SHARE else ""

    def _ml(self, answer: Answer) -> float:
        return np.count_nonzero(answer.mask) * math.prod(self._canonical.spacing) / 1000

    def _spacing(self, zoom: float) -> np.ndarray:
        return np.array(self.card.data["spacing"][::-1], float) * zoom / self._canonical.spacing[::-1]

    def _frame(self, prompts: _Prompts, before: Answer) -> tuple[np.ndarray, float]:
        """The patch's centre (canonical index) and zoom: about everything that is known of the lesion."""
        points = [np.array(p) for p in prompts.positive]
        if prompts.box is not None:
            points += [np.array(p) for p in prompts.box]
        if before.found:
            points += [np.array(before.box.start), np.array(before.box.stop) - 1]
        points = points or [np.array(p) for p in prompts.negative]
        low, high = np.min(points, 0), np.max(points, 0)
        # A lesion that was found from further away fits a patch of the model's grid now and then: of 50 lesions of five whole scans and
        # 45 LIDC cubes, five clicks each, such corrections gave up to 0.11 more and 0.01 less, and a positive click no longer leaked
        # from 3.7 to 21 ml.
        least = ZOOMS[0] if not before.found and prompts.box is not None else min(before.zoom, 1.0)
        return (low + high) / 2, fitting((high - low) / self._spacing(1.0), self.card.data["patch"], least)

    def _open(self, centre: np.ndarray, zoom: float) -> float:
        """The closest look of at least `zoom` that shows something other than soft tissue. A patch of nothing else may lie
        in a mass or in the heart, and the model was taught to tell only from further away."""
        for zoom in (z for z in ZOOMS if z >= zoom):
            half = np.array(self.card.data["patch"]) / 2 * self._spacing(zoom)
            low, high = (np.clip(np.round(centre + way * half).astype(int), self._scanned.start, self._scanned.stop) for way in (-1, 1))
            part = self._canonical.channels[0][tuple(slice(a, max(a + 1, b), max(1, (b - a) // 20)) for a, b in zip(low, high))]
            if np.mean(part > SOFT_TISSUE_HU) <= SOFT_SHARE:
                break
        return zoom

    def _wider(self, frame: tuple[np.ndarray, float], answer: Answer, border: float) -> tuple[np.ndarray, float] | None:
        """Where to look again when the mask touches the patch's border."""
        centre, zoom = frame
        if not border:
            return None
        middle = (np.array(answer.box.start) + answer.box.stop - 1) / 2
        extent = np.array(answer.box.shape) / self._spacing(zoom)
        moved = np.abs(middle - centre) / self._spacing(zoom)
        if (extent <= 0.8 * np.array(self.card.data["patch"])).all() and moved.max() >= 2:
            return middle, zoom
        larger = [z for z in ZOOMS if z > zoom]
        return (middle, larger[0]) if larger else None

    def _run(
        self, frame: tuple[np.ndarray, float], prompts: _Prompts, before: Answer, in_lung: bool = False, seconded: bool = False
    ) -> tuple[Answer, float, float]:
        """The network once: the mask, how much of it touches a border beyond which the image goes on (see _contact), and, where it
        should be in the lung, lung_around() it (else 1)."""
        self._since = time.perf_counter()
        centre, zoom = frame
        size = tuple(self.card.data["patch"])
        scale = self._spacing(zoom)
        # On a voxel of the image: at the model's own spacing nothing is interpolated.
        voxel = np.floor(centre + 0.5)
        offset = voxel - np.array(size) // 2 * scale
        if ends := [*prompts.positive, *(prompts.box or ())]:
            # Half a slice of 10 mm is 8 nodes of 0.625 mm, more than the 4 that fitting() leaves: a click would lie beyond the patch.
            beyond = (np.min(ends, 0) < offset) | (np.max(ends, 0) > offset + (np.array(size) - 1) * scale)
            offset = np.where(beyond & (scale < 1), offset + np.round((centre - voxel) / scale) * scale, offset)
        grid = Grid(size, tuple(scale), tuple(offset))
        whole = Box.whole(size)
        if self._of_patch(whole, grid).empty:
            return replace(_EMPTY, zoom=zoom), 0.0, 0.0
        start, scanned = self._scanned.start, self._canonical.channels[self._scanned.trailing]
        on_scanned = replace(grid, offset=tuple(o - a for o, a in zip(grid.offset, start)))
        values = sample(scanned, on_scanned, whole, floor=floor_of(self.card.intensity))
        if not np.isfinite(values).all():
            check_finite(self._canonical.channels, str(self.image.source or "The image"))

        def on_patch(points: Sequence[Index]) -> list[tuple[float, ...]]:
            return [tuple((np.array(p) - grid.offset) / grid.scale) for p in points]

        positive, negative = on_patch(prompts.positive), on_patch(prompts.negative)
        box = tuple(on_patch(prompts.box)) if prompts.box is not None else None
        previous = self._sampled(before, grid)
        channels = prompt_channels(size, positive, negative, box, previous)  # type: ignore[arg-type]
        batch = np.concatenate([self._normalise(values), channels])[None]
        self._lap("crop")
        logits = self._engine.run(np.concatenate([view.forward(batch) for view in self._views]))
        margins = np.clip(logits[:, 1] - logits[:, 0], -60, 60)
        if np.isnan(margins).any():  # half precision that overflows, or weights that are no numbers
            raise UserError(f"{self.card.name} gave values that are no numbers; run it in fp32 or on the CPU, or get the model again.")
        margin = np.mean([view.backward(m)[0] for view, m in zip(self._views, margins)], 0)
        corrects = before.found or box is not None or len(positive) > 1
        # What a person drew is meant as well as what was clicked on.
        touched = positive, box, previous if any(p[0] == "mask" for p in prompts.made) else None
        if seconded and self._second is not None:
            averaged = self._averaged(margin, grid, _touched(margin > 0, *touched), SECOND_SHARES[corrects])
            # It knows nothing of what was said not to be part of the lesion and must not bring that back: a Dice of 0.001 and 0.002 less
            # after 3 and 5 simulated clicks, but of what a person erased and then clicked on a tenth to a fifth more came back.
            margin = np.minimum(averaged, margin) if negative else averaged
        self._lap("network")
        # Of those that lie close together the last holds.
        for point, wanted in prompts.points:
            if not wanted:
                _heed(margin, on_patch([point]), -1.0)
            elif corrects:
                _heed(margin, on_patch([point]), 1.0)
                _heed_between(margin, *on_patch([_voxel(point)]))
        probability = 1 / (1 + np.exp(-margin))

        mask = probability > 0.5
        kept = _touched(mask, *touched)
        inside = Box.around(kept)
        if inside is None:
            return replace(_EMPTY, zoom=zoom), 0.0, 0.0
        # What was dropped must not bleed back in, while what is just below 0.5 places the edge between the voxels.
        probability[mask & ~kept] = 0
        target = self._of_patch(inside.grown((1, 1, 1)) & whole, grid)
        native = resample_back(probability[None], whole, grid, target)[0] > 0.5
        for part in (True, False):
            for i, (point, wanted) in enumerate(prompts.points):
                at = tuple(p - a for p, a in zip(_voxel(point), target.start))
                if wanted != part or (wanted and not corrects) or not all(0 <= v < n for v, n in zip(at, target.shape)):
                    continue
                # What a later negative click took away about an earlier positive one does not stay as specks.
                undone = part and not all(later for _, later in prompts.points[i:])
                if undone and not native[tuple(slice(max(0, v - 1), v + 2) for v in at)].any():
                    continue
                native[at] = part
        found = Box.around(native)
        if found is None:
            return replace(_EMPTY, zoom=zoom), 0.0, 0.0
        answer = Answer(found.shifted(target.start), native[found.slices].astype(np.uint8), zoom=zoom)
        border = self._contact(kept, grid)
        lung = lung_around(values[0], kept, np.array(self.card.data["spacing"][::-1]) * zoom) if in_lung else 1.0
        self._lap("paste")
        return answer, border, lung

    def _of_patch(self, box: Box, grid: Grid) -> Box:
        """The image's voxels in a part of a patch."""
        low = [math.floor(a * s + o) for a, s, o in zip(box.start, grid.scale, grid.offset)]
        high = [math.ceil((b - 1) * s + o) + 1 for b, s, o in zip(box.stop, grid.scale, grid.offset)]
        return Box(tuple(low), tuple(high)) & self._scanned

    def _averaged(self, margin: np.ndarray, grid: Grid, kept: np.ndarray, share: float) -> np.ndarray:
        """The mean of the patch's log-odds and of the second opinion's where that agrees on what is kept, as they are elsewhere."""
        assert self._second is not None
        inside = Box.around(kept)
        if inside is None:
            return margin
        if max(n * s * mm for n, s, mm in zip(inside.shape, grid.scale, self._canonical.spacing[::-1])) > SECOND_MM:
            return margin
        around = self._of_patch(inside, grid)
        if around.empty:  # beyond the image's edge
            return margin
        other = self._second.margins(around, grid)
        found = (other > 0) & (distance(kept, np.ones(3)) <= 2)
        if 2 * np.count_nonzero(found & kept) < SECOND_DICE * (np.count_nonzero(found) + np.count_nonzero(kept)):
            return margin
        return np.where(np.isnan(other), margin, (1 - share) * np.clip(margin, -12, 12) + share * other)

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _sampled(self, answer: Answer, grid: Grid) -> np.ndarray | None:
        """The former mask on the patch."""
        last = [(n - 1) * s + o for n, s, o in zip(grid.shape, grid.scale, grid.offset)]
        region = Box(tuple(math.floor(o) - 2 for o in grid.offset), tuple(math.ceil(v) + 3 for v in last))
        inside = answer.box & region
        if inside.empty:
            return None
        # Of spacings in metres the patch is 62 TiB large. What sample() filters reaches 32 voxels; with 128, patches of usual scans are
        # whole, of which what is cut rounds otherwise: of 48 masks one was another with 1.
        region &= inside.grown((128, 128, 128))
        canvas = np.zeros(region.shape, np.float32)
        canvas[inside.relative_to(region).slices] = answer.mask[inside.relative_to(answer.box).slices]
        shifted = replace(grid, offset=tuple(o - a for o, a in zip(grid.offset, region.start)))
        values = sample(canvas[None], shifted, Box.whole(grid.shape))[0]
        # What was drawn on one thin slice never is half of a coarser grid's voxel.
        return (values >= max(1e-3, min(0.5, float(values.max()) / 2))).astype(np.float32)

    def _contact(self, kept: np.ndarray, grid: Grid) -> float:
        """The mask's voxels on those faces of the patch beyond which the image goes on, by its volume to 2/3; 0 for a few."""
        voxels = 0
        for axis in range(3):
            for end, n in ((0, self._scanned.start[axis] - 0.5), (grid.shape[axis] - 1, self._scanned.stop[axis] - 0.5)):
                at = end * grid.scale[axis] + grid.offset[axis]
                more = at - grid.scale[axis] > n if end == 0 else at + grid.scale[axis] < n
                cut = int(np.count_nonzero(kept.take(end, axis))) if more else 0
                voxels += cut if cut >= _BORDER_VOXELS else 0
        return voxels / float(np.count_nonzero(kept)) ** (2 / 3)


def fitting(extent: Sequence[float], patch: Sequence[int], least: float) -> float:
    """The smallest of ZOOMS, from `least` on, with which a patch shows what is `extent` voxels of the model's grid large."""
    # 4 voxels on each side, for the mask to grow and the network to see where the lesion ends.
    room = np.array(patch) - 8
    return next((z for z in ZOOMS if z >= least and (np.array(extent) / z <= room).all()), ZOOMS[-1])


def _scanned(channels: np.ndarray) -> Box:
    """A CT (c, z, y, x) without the planes of one value that pad it. 16 crops have a Dice of 0.859 and so padded with -1024 or -3024, with
    ten slices of 0 above and below 0.840 (as lung or tissue of the image: 0.822, 0.755 and 0.455). A phantom's even lung is what is
    around a lesion, and without any lung there is no telling."""
    whole = Box.whole(channels.shape[1:])
    box = content(channels, whole)
    corners = channels[0][np.ix_(*((0, n - 1) for n in whole.shape))]
    kept = [np.array([a == 0, b == n]) for a, b, n in zip(box.start, box.stop, whole.shape)]
    lost = corners[~(kept[0][:, None, None] & kept[1][:, None] & kept[2])]
    even = ((lost > OUTSIDE_HU) & (lost < LUNG_HU)).any()
    return whole if even or channels[0][box.slices].min() >= LUNG_HU else box


def _noted(prompts: _Prompts, prompt: Prompt) -> _Prompts:
    return replace(prompts, made=(*prompts.made, _comparable(check_prompt(prompt))))


def _middle(box: tuple[Point, Point]) -> Point:
    return tuple((a + b) / 2 for a, b in zip(*box))  # type: ignore[return-value]


def _voxel(point: Index) -> tuple[int, ...]:
    return tuple(math.floor(p + 0.5) for p in point)


def box_prompt(image: Image, voxels: Box) -> Prompt:
    """The prompt of a box of the image's voxels, as far as it lies inside; UserError where it does not."""
    voxels &= Box.whole(image.shape)
    if voxels.empty:
        raise UserError("The box lies outside the image; draw it around the lesion.")
    # From the middle of the first voxel to that of the last one; of a single one, such as a thick slice, from edge to edge.
    out = [0.5 * (n == 1) for n in voxels.shape]
    ends = ([a - d for a, d in zip(voxels.start, out)], [b - 1 + d for b, d in zip(voxels.stop, out)])
    return "box", *itertools.chain.from_iterable(image.index_to_point(end[::-1]) for end in ends)


def second_opinion(card: Card) -> ModelPackage | None:
    """The model that a click model's answers are averaged with, where its card names one; UserError where that cannot be used."""
    name = card.data.get("second_opinion")
    if name is None:
        return None
    package = find_model(name)
    of = package.card
    fits = of.dimensions == 2 and not of.slice_axis
    # It sees parts of the image only, which have another mean.
    fits = fits and len(of.data["channels"]) == 1 and of.outputs == 2 and of.intensity["mode"] not in ("zscore", "percentile")
    if not fits:
        raise UserError(f"{name}, the second opinion of {card.name}, is no model of axial slices with one label and fixed intensities.")
    return package


def expects_lung(card: Card) -> bool:
    """Whether a model's first click must find something with lung around it: as the card says, and of a card from before it
    could, whether the model's window tells lung from soft tissue."""
    if "surroundings" in card.data:
        return bool(card.data["surroundings"] == "lung")
    window = card.intensity
    return window["mode"] == "window" and abs(SOFT_TISSUE_HU - window["level"]) < window["width"] / 2


def lung_around(values: np.ndarray, mask: np.ndarray, spacing: np.ndarray) -> float:
    """How much of what lies around `mask` is lung, by HU values (z, y, x); 0 of what is air itself, and where it is mostly the
    air outside a patient. From LUNG_SHARE on it is a lesion of the lung. spacing: mm (z, y, x)."""
    if values[mask].mean() < AIR_HU:
        return 0.0
    away = distance(mask, spacing)
    around = values[(away > 1) & (away <= max(4.0, 2.2 * float(spacing.min())))]
    lung, outside = (np.count_nonzero(around < hu) for hu in (LUNG_HU, OUTSIDE_HU))
    return lung / around.size if around.size and outside <= OUTSIDE_SHARE * lung else 0.0


def _shared(one: Answer, other: Answer) -> int:
    """The voxels of both answers."""
    both = one.box & other.box
    if both.empty:
        return 0
    return int(np.count_nonzero(one.mask[both.relative_to(one.box).slices] & other.mask[both.relative_to(other.box).slices]))


def _agreement(one: Answer, other: Answer) -> float:
    """Dice of two answers, not both empty."""
    return 2 * _shared(one, other) / (np.count_nonzero(one.mask) + np.count_nonzero(other.mask))


def _touched(mask: np.ndarray, positive: Sequence[Index], box: tuple[Index, ...] | None, drawn: np.ndarray | None = None) -> np.ndarray:
    """The components that a positive click touches, or lies just beside, and those of what was drawn; without clicks, the largest
    in the box."""
    labelled, counts = components(mask, corners=True)
    keep = np.zeros(len(counts), bool)
    if drawn is not None:
        keep[np.unique(labelled[drawn > 0])] = True
    for point in positive:
        around = tuple(slice(max(0, round(p) - _REACH), max(0, round(p) + _REACH + 1)) for p in point)
        values = labelled[around]
        if values.any():
            place = np.argwhere(values) + [a.start for a in around]
            nearest = place[((place - np.array(point)) ** 2).sum(1).argmin()]
            keep[labelled[tuple(nearest)]] = True
    if not positive and box is not None:
        inside = tuple(slice(max(0, round(a)), max(0, round(b) + 1)) for a, b in zip(*box))
        share = np.bincount(labelled[inside].ravel(), minlength=len(counts))
        share[0] = 0
        keep[share.argmax()] = share.any()
    keep[0] = False
    return keep[labelled]


def _heed(margin: np.ndarray, points: Sequence[Index], wanted: float) -> None:
    """A correction that the network would not follow is followed nevertheless: the log-odds are raised (or, for a negative
    click, lowered) to `wanted` at the click, and around it as much less as the click's own Gaussian falls."""
    for point in points:
        at = _voxel(point)
        if not all(0 <= i < n for i, n in zip(at, margin.shape)):
            continue
        lacking = wanted - float(margin[at])
        if lacking * wanted > 0:
            margin += lacking * prompt_channels(margin.shape, [point], [], None, None)[0]


def _heed_between(margin: np.ndarray, point: Index) -> None:
    """The scan's own voxel lies between nodes of the patch, of which the nearest follows the click: where what is interpolated stays
    outside (of 23 second clicks between the voxels of two scans 11 did), all nodes about it follow."""
    nodes, inside = [], 0.0
    for node in itertools.product(*((math.floor(v), math.floor(v) + 1) for v in point)):
        weight = math.prod(1 - abs(n - v) for n, v in zip(node, point))
        if weight > 1e-6 and all(0 <= i < n for i, n in zip(node, margin.shape)):
            nodes.append(node)
            inside += weight / (1 + math.exp(-float(margin[node])))
    if inside <= 0.5:
        _heed(margin, nodes, 0.1)
