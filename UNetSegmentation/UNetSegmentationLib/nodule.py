"""A lung nodule as a radiologist reports it: size, texture, side, size class; its change between two studies.

Sizes follow Lung-RADS v2022 (American College of Radiology; Christensen et al., Chest 2024;165:738-753) and the Fleischner
Society (Bankier et al., Radiology 2017;285:584-600; MacMahon et al., Radiology 2017;284:228-243); growth the British Thoracic
Society (Callister et al., Thorax 2015;70 Suppl 2:ii1-ii54). They say nothing about what a nodule is.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from .image import Box, Image, Orientation, UserError, length_unit, reorient, slices_across
from .intensity import has_hu
from .measure import measure_steps
from .model import Label
from .postprocess import components, largest_steps
from .steps import Steps, complete

NOTE = "By size only; not a diagnosis."
COLUMNS = ("Side", "Volume (mm³)", "Mean (mm)", "Longest (mm)", "Perpendicular (mm)", "Texture", "Solid part (mm)", "Mean HU", "Size class")
# Above this lies solid tissue: -300 (Scholten et al., Eur Radiol 2015;25:488-496) and -250 HU tell part-solid from ground-glass
# nodules as readers do, and at -250 the solid part's volume is that of readers
# (Zheng et al., Zhongguo Fei Ai Za Zhi 2017;20(5), DOI 10.3779/j.issn.1009-3419.2017.05.07, who tried -500 to -130).
SOLID_HU = -250
# Of the core of a solid nodule at least so much is solid, and of a ground-glass nodule's less than so much. The core leaves the
# edge out, which is half air. Chosen on LIDC's 779 nodules by the readers' own texture: 90 % of the solid (4 and 5), 82 % of the
# ground-glass (1 and 2) and 44 % of the few part-solid ones (3), on which readers themselves disagree.
_SOLID_SHARE, _GLASS_SHARE = 0.4, 0.15
_SOLID_PART_MM = 4.0  # a solid part like a ball of this diameter makes any nodule part-solid; vessels inside are thinner
_CALCIUM_HU = 200
_CALCIUM = f" Most of it is as dense as calcium (over {_CALCIUM_HU} HU): look at the pattern, which size does not tell."
_PLANE = " Measured in the scan's own slices, which are not axial."
_CUT = " It reaches the edge of the scan, beyond which it may go on: its true size is not known."
_CHANGE_CUT = " In one of the studies it reaches the edge of the scan: its true change is not known."
_BODY_HU = -500
_NO_SIDE_MM = 5.0  # so near the midline neither side is certain
_WIDEST_MM = 450.0  # a body that the field of view cuts on one side goes on there to this width at most
# Of 300 places in the lungs of the sample lung1, resampled on axes turned about front-back or head-foot, 0 and 1 got the other side
# at 10 degrees, 3 and 5 at 20, 14 and 9 at 30. About left-right it is 2 at 40.
_NO_SIDE_DEGREES = 15.0
_GROWN_MM = 1.5  # in mean diameter, Lung-RADS v2022
# Of two lone nodules farther apart across the body the later one is new: the table moves along it freely, across it hardly. Our bound.
_ACROSS_MM = 100.0
_KEYS = (
    *("center", "longest_mm", "perpendicular_mm", "mean_mm", "longest_points", "perpendicular_points", "mean_hu", "std_hu", "min_hu"),
    *("max_hu", "texture", "solid_mean_mm", "solid_volume_mm3", "dense_mean_mm", "side", "size_class"),
)
_LABEL = Label(1, "nodule", (0, 0, 0), {})


def describe(image: Image, mask: np.ndarray, start: Sequence[int] = (0, 0, 0), lung: bool = True) -> dict[str, Any]:
    """What to report of one nodule, ready for JSON; lung False: of a lesion elsewhere, which has neither texture nor size class.

    image: a CT in HU, whole, of any direction (its first channel). mask: (z, y, x), not 0 inside, whose first voxel is the
    image's voxel `start`. UserError where it does not fit. Of values that are no HU it has neither, too.

    Keys: those of measure() (voxels, volume_mm3, volume_ml, center, longest_mm, perpendicular_mm and their points, mean_hu, ...);
    mean_mm: the mean of the longest diameter of the axial section where it is longest and of the longest one across it there, both
    to 0.1 mm and so the mean (Lung-RADS: "measure both the long and short axis to one decimal point in mm, and report mean nodule
    diameter to one decimal point", halves upwards here; Fleischner: both axes on the same section; both also allow other planes,
    which is done for slices_across() alone, in their own); texture: "solid", "part-solid" or "ground-glass"; solid_mean_mm and
    solid_volume_mm3: the same of the largest connected part above SOLID_HU (of a solid nodule the whole, of a ground-glass one 0);
    dense_mean_mm: of that part whatever the texture; side: "left", "right", or "" where the body's midline is not known or too near;
    size_class: size_class(); note: NOTE, and what else a reader must know of these figures.
    An empty mask has 0 voxels and None for the rest.
    """
    return complete(describe_steps(image, mask, start, lung))


def describe_steps(image: Image, mask: np.ndarray, start: Sequence[int] = (0, 0, 0), lung: bool = True) -> Steps[dict[str, Any]]:
    """describe() in pieces, for a panel; the mask must not change meanwhile."""
    inside = Box.around(mask)
    placed = Box(tuple(start), tuple(int(a) + n for a, n in zip(start, mask.shape)))
    if placed & Box.whole(image.shape) != placed:
        raise UserError("The mask does not fit the image; take one of the same scan.")
    out: dict[str, Any] = {"voxels": 0, "volume_mm3": 0.0, "volume_ml": 0.0, **dict.fromkeys(_KEYS), "note": NOTE}
    if inside is None:
        return out
    placed = inside.shifted(start)
    part = image.crop(placed)
    if any(a == 0 or b == n for a, b, n in zip(placed.start, placed.stop, image.shape)):
        out["note"] += _CUT
    labels, across = part.like((mask[inside.slices] > 0).astype(np.uint8)), slices_across(image)
    if across is not None and Orientation.of(image.direction).axes[2] != across:
        out["note"] += _PLANE
    yield
    sizes = yield from _sizes_steps(labels, part, across)
    out.update({key: value for key, value in sizes.items() if key in out})
    out["side"] = _side(image, out["center"])
    if not (lung and length_unit(image) == "mm" and has_hu(image.channels)):
        return out
    yield
    canonical, orientation = reorient(part, across)
    values, shape = canonical.channels[0], orientation.canonical(labels.array) > 0
    core = values[(yield from _core_steps(shape))]
    yield
    share = float(np.mean(core > SOLID_HU))
    solid, count = yield from largest_steps(shape & (values > SOLID_HU))
    volume, out["dense_mean_mm"] = float(count * np.prod(part.spacing)), 0.0
    if count:
        dense = part.like(np.ascontiguousarray(orientation.original(solid)).view(np.uint8))
        out["dense_mean_mm"] = (yield from _sizes_steps(dense, across=across))["mean_mm"]
    if share >= _SOLID_SHARE:
        out.update(texture="solid", solid_mean_mm=out["mean_mm"], solid_volume_mm3=out["volume_mm3"])
    elif share < _GLASS_SHARE and (6 * volume / math.pi) ** (1 / 3) < _SOLID_PART_MM:
        out.update(texture="ground-glass", solid_mean_mm=0.0, solid_volume_mm3=0.0)
    else:
        out.update(texture="part-solid", solid_mean_mm=out["dense_mean_mm"], solid_volume_mm3=volume)
    out["size_class"] = size_class(out["mean_mm"], out["texture"], out["solid_mean_mm"])
    if np.median(core) > _CALCIUM_HU:
        out["note"] += _CALCIUM
    return out


def size_class(mean_mm: float, texture: str, solid_mean_mm: float) -> str:
    """The Lung-RADS v2022 category that size and texture alone give a nodule at the first scan: "2", "3", "4A" or "4B".

    Growth, being new, shape (juxtapleural, calcified, fat, cysts, airways) and signs that would make it another category
    are not looked at.
    """
    if texture == "ground-glass":
        return "2" if mean_mm < 30 else "3"
    if mean_mm < 6:
        return "2"
    if texture == "part-solid":
        return "3" if solid_mean_mm < 6 else "4A" if solid_mean_mm < 8 else "4B"
    return "3" if mean_mm < 8 else "4A" if mean_mm < 15 else "4B"


def _sizes_steps(labels: Image, image: Image | None = None, across: int | None = None) -> Steps[dict[str, Any]]:
    (out,) = yield from measure_steps(labels, [_LABEL], image, across=across)
    out["mean_mm"] = _half_up((_half_up(out["longest_mm"], 1) + _half_up(out["perpendicular_mm"], 1)) / 2, 1)
    return out


def _half_up(value: float, digits: int) -> float:
    """To so many decimals; halves, also those that the last bits made a little less, upwards. What a table shows is then what the
    size class follows from: round() makes 14.9 of 14.95, and 8.0 as well as 7.9 of longest and perpendicular diameters that are
    both shown as 10.4 and 5.5."""
    return value if not math.isfinite(value) else math.floor(value * 10**digits + 0.5 + 1e-9) / 10**digits


def _core_steps(mask: np.ndarray) -> Steps[np.ndarray]:
    """The inner half or so of the larger sections of a mask (z, y, x; z across the sections), never empty.

    The first and last section of a ball, and the rim of all, are partly air whatever the spacing.
    """
    area = np.count_nonzero(mask, (1, 2))
    framed = np.pad(mask & (area >= area.max() / 2)[:, None, None], ((0, 0), (1, 1), (1, 1)))
    core = framed[:, 1:-1, 1:-1]
    whole = np.count_nonzero(core)
    while True:
        inner = core & framed[:, :-2, 1:-1] & framed[:, 2:, 1:-1] & framed[:, 1:-1, :-2] & framed[:, 1:-1, 2:]
        count = np.count_nonzero(inner)
        yield
        if count < max(1, 0.3 * whole):
            return core
        core[...] = inner
        if count <= 0.6 * whole:
            return core


def _side(image: Image, center: Sequence[float]) -> str:
    """On which side of the body's midline a point (LPS mm) lies, in its axial section.

    The midline is the middle of the body's outline (median over the rows where it is wide). It is known where the section shows
    the outline's both sides, or 250 mm of a body that the field of view cuts; of a body cut on one side alone it lies between there
    and where it would be of the widest one. In a crop of one lung it is not known, nor where the section is oblique.
    """
    canonical, _ = reorient(image)
    if canonical.direction[0] < math.cos(math.radians(_NO_SIDE_DEGREES)):
        return ""
    x, _, z = canonical.point_to_index(center)
    plane = canonical.channels[0][min(max(round(z), 0), canonical.shape[0] - 1)]
    if not (plane <= _BODY_HU).any():  # as in MR, where all of the picture would be the body
        return ""
    steps = [max(1, round(1.5 / s)) for s in canonical.spacing[1::-1]]
    labelled, counts = components((plane[:: steps[0], :: steps[1]] > _BODY_HU)[None])
    if len(counts) < 2:
        return ""
    body = labelled[0] == 1 + counts[1:].argmax()
    rows = body[body.any(1)]
    first, last = rows.argmax(1), rows.shape[1] - 1 - rows[:, ::-1].argmax(1)
    width = (int(last.max()) - int(first.min()) + 1) * steps[1] * canonical.spacing[0]
    low, high = first.min() == 0, last.max() == rows.shape[1] - 1
    if width < (250 if low or high else 100):
        return ""
    doubt = max(0.0, _WIDEST_MM - width) / 2 if low != high else 0.0
    wide = last - first >= 0.5 * (last - first).max()
    away = (x - float(np.median((first + last)[wide] / 2)) * steps[1]) * canonical.spacing[0]
    return "" if -_NO_SIDE_MM - doubt * low < away < _NO_SIDE_MM + doubt * high else "left" if away > 0 else "right"


# ----------------------------------------------------------------------------------------------------------- two studies


def follow_up(before: dict[str, Any], after: dict[str, Any], days: float) -> dict[str, Any]:
    """The change of a nodule between two describe(), `days` apart.

    Keys: days, volume_change_percent (whole), mean_change_mm (to 0.1 mm; None where the slices of one alone were not
    axial), solid_change_mm (the same of dense_mean_mm; None, too, of a nodule that was solid, or has no solid part in both studies),
    doubling_days (of the volume: days * ln 2 / ln(after / before), the exponential growth of Schwartz, Cancer 1961;14:1272-1294;
    None where it did not grow by 1 %), growth ("growth", "stable" or "smaller": a change of volume of 25 % or more is one, BTS 2015;
    less is within the error of measuring. "growth", too, where the solid part is more than 1.5 mm larger, which Lung-RADS looks at
    by itself. None where either has no texture, since the guidelines are of the lung), text (sentences with the thresholds, which
    the figures in them are held against), note: NOTE, and whether a scan's edge cuts it.
    UserError where there is nothing to compare.
    """
    if not (math.isfinite(days) and days > 0):
        raise UserError("The second study must be later than the first; choose them in the order of their dates.")
    if not (before["voxels"] and after["voxels"]):
        raise UserError("The nodule must be outlined in both studies to be compared; click on it in the other one.")
    ratio = after["volume_mm3"] / before["volume_mm3"]
    # Of 5 voxels after 4 the last bit of the volumes would say less than 25 %. "or": without a sign at zero.
    percent, mean = round(100 * (ratio - 1)), None
    if one_plane := (_PLANE in before["note"]) == (_PLANE in after["note"]):
        mean = round(after["mean_mm"] - before["mean_mm"], 1) or 0.0
    doubling = days * math.log(2) / math.log(ratio) if percent > 0 else None
    lung, year = bool(before["texture"] and after["texture"]), days <= 366
    within = f"Lung-RADS v2022: growth, more than {_GROWN_MM} mm within 12 months"
    solid, new, grew = None, False, False
    if lung and one_plane and before["texture"] != "solid" and (before["solid_mean_mm"] or after["solid_mean_mm"]):
        # By solid_mean_mm, which another texture moves from 0 or to the whole, 7 and 11 of LIDC's 100 nodules that are not solid grew
        # by 15 and 30 HU more alone; so 1 and 3 do.
        solid = round(after["dense_mean_mm"] - before["dense_mean_mm"], 1) or 0.0
        grew = solid > _GROWN_MM
        new = not before["solid_mean_mm"]
    text, said = f"Volume {percent:+.0f} % in {days:.0f} days", []
    if percent >= 25:
        assert doubling is not None
        speed = "less than 400" if round(doubling) < 400 else "400 to 600" if round(doubling) <= 600 else "more than 600"
        text += f", doubling in {doubling:.0f} days"
        text += f": growth (BTS 2015: 25 % or more), with a doubling time of {speed} days" if lung else ""
    elif lung and percent > -25:
        text += f": {'little' if grew else 'no significant'} change (BTS 2015: less than 25 %)"
    elif lung:
        text += ": smaller (by 25 % or more)"
    if mean is None:
        text += ". Mean diameter not compared: measured in different planes"
    else:
        if lung and abs(mean) >= 2:
            said.append("Fleischner 2017: a change, 2 mm or more")
        if lung and mean > _GROWN_MM and year:
            said.append(within)
        text += f". Mean diameter {mean:+.1f} mm" + (f" ({'; '.join(said)})" if said else "")
    if solid is not None:
        how = "Lung-RADS v2022: new" if new else within if year else f"growth, more than {_GROWN_MM} mm"
        text += f". Solid part {solid:+.1f} mm" + (f" ({how})" if grew else "")
    return {
        "days": days,
        "volume_change_percent": percent,
        "mean_change_mm": mean,
        "solid_change_mm": solid,
        "doubling_days": doubling,
        "growth": None if not lung else "growth" if grew or percent >= 25 else "smaller" if percent <= -25 else "stable",
        "text": f"{text}.",
        "note": NOTE + (_CHANGE_CUT if any(_CUT in nodule["note"] for nodule in (before, after)) else ""),
    }


def match(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], limit_mm: float = 20.0) -> list[tuple[int | None, int | None]]:
    """Which nodule of one study is which of another: pairs of indices, in the order of `before`; None where it has no partner.

    Nodules are the same when their centers are at most limit_mm apart, the nearest first. Where a shift between the two scans'
    coordinates (the table stands elsewhere each time) gives two or more nodules a partner of no other side, and more of them and
    closer ones than none does, it is that shift. A nodule that is alone in each study is the same unless it lies on the other side, or
    more than 100 mm away across the body.
    """
    old = [i for i, n in enumerate(before) if n["voxels"]]
    new = [j for j, n in enumerate(after) if n["voxels"]]
    olds, news = (np.array([n["center"] for n in group if n["voxels"]], float).reshape(-1, 3) for group in (before, after))
    across = np.array([[{before[i]["side"], after[j]["side"]} == {"left", "right"} for j in new] for i in old], bool)
    across = across.reshape(len(old), len(new))

    def pairs(shift: np.ndarray, more_than: int = -1) -> dict[int, int]:
        apart = np.linalg.norm(olds[:, None] + shift - news, axis=2)
        near = apart <= limit_mm
        if shift.any():  # by the midline a side may change from scan to scan, but no table goes from lung to lung
            near &= ~across
        out: dict[int, int] = {}
        if min(near.any(0).sum(), near.any(1).sum()) > more_than:
            for _, i, j in sorted((float(apart[a, b]), old[a], new[b]) for a, b in np.argwhere(near)):
                if i not in out and j not in out.values():
                    out[i] = j
        return out

    def closeness(found: dict[int, int], shift: np.ndarray) -> float:
        """Partners that lie on one another count 1, those limit_mm apart 0; the one that a shift was made of counts nothing."""
        apart = [np.linalg.norm(olds[old.index(i)] + shift - news[new.index(j)]) for i, j in found.items()]
        return sum(1 - (float(d) / limit_mm) ** 2 for d in apart) - bool(shift.any())

    best = pairs(np.zeros(3))
    close = closeness(best, np.zeros(3))
    # A shift brings those together whose own shifts lie around it. Counting these first, 100 nodules in each study take 1.1 s;
    # with all shifts tried they took 49 s.
    shifts = (news - olds[:, None]).reshape(-1, 3)
    shifts = shifts[np.argsort(np.linalg.norm(shifts, axis=1), kind="stable")]
    cells = np.floor(shifts / limit_mm).astype(int)
    n = int(np.ptp(cells, axis=0).max()) + 3 if len(cells) else 1
    codes = cells @ (n * n, n, 1)
    held, counts = np.unique(codes, return_counts=True)
    around = np.zeros(len(codes), int)
    for step in product((-1, 0, 1), repeat=3):
        wanted = codes + np.dot(step, (n * n, n, 1))
        at = np.searchsorted(held, wanted).clip(max=len(held) - 1)
        around += np.where(held[at] == wanted, counts[at], 0)
    for shift, most in zip(shifts, around):
        least = max(1, len(best))
        if least < min(len(old), len(new), most):
            found = pairs(shift, least)
            # One pair more by chance is not worth those that did not move: of 30 nodules before, of which 8 stayed, beside 10 new ones a
            # shift took a true pair apart in 13.5 % of cases, and 1 % with their closeness.
            if len(found) > least and (near := closeness(found, shift)) > close:
                best, close = found, near
    if len(old) == len(new) == 1 and not across.any() and math.dist(olds[0, :2], news[0, :2]) <= _ACROSS_MM:
        best = {old[0]: new[0]}
    return [*((i, best.get(i)) for i in range(len(before))), *((None, j) for j in range(len(after)) if j not in best.values())]


# ----------------------------------------------------------------------------------------------------------------- table


def row(nodule: dict[str, Any]) -> list[str]:
    """A describe() as texts, a cell for each of COLUMNS; "-" where there is nothing."""

    def number(key: str, digits: int) -> str:
        return "-" if nodule.get(key) is None else f"{_half_up(nodule[key], digits):.{digits}f}"

    solid = "-" if nodule.get("texture") != "part-solid" else number("solid_mean_mm", 1)
    return [
        nodule.get("side") or "-",
        number("volume_mm3", 0),
        *(number(key, 1) for key in ("mean_mm", "longest_mm", "perpendicular_mm")),
        nodule.get("texture") or "-",
        solid,
        number("mean_hu", 0),
        nodule.get("size_class") or "-",
    ]


def cell(text: str) -> str:
    """For a spreadsheet, which would run a name that begins like a formula."""
    try:
        float(text)
    except ValueError:
        return "'" + text if len(text) > 1 and text[0] in "=+-@" else text
    return text


def csv_text(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS, notes: Sequence[str] = ()) -> str:
    """Rows (row(), or with other columns before it) as CSV with a heading; each ends in its note, which is not to get lost: that
    of notes, else NOTE."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns, "Note"])
    writer.writerows([*map(cell, cells), note] for cells, note in zip(rows, notes or [NOTE] * len(rows)))
    return out.getvalue()
