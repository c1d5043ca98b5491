"""A nodule's report against made nodules of known size, and against what readers said of real ones."""

from __future__ import annotations

import csv
import json
import math
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
from UNetSegmentationLib import measure as measuring
from UNetSegmentationLib import postprocess
from UNetSegmentationLib.image import Box, Image, UserError, read_image
from UNetSegmentationLib.measure import measure
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.nodule import COLUMNS, NOTE, csv_text, describe, describe_steps, follow_up, match, row, size_class

TILTED = tuple(float(v) for v in (np.array([[0.98, -0.199, 0], [0.199, 0.98, 0], [0, 0, 1]]) @ np.diag([1, 1, -1])).ravel())
OBLIQUE = (0.0, -0.1961, 0.9806, -0.9806, 0.0384, 0.0077, -0.1961, -0.9806, -0.1961)  # its x axis runs down, its z to the left
GRIDS = [
    ((0.7, 0.7, 1.25), (1.0, 0, 0, 0, 1, 0, 0, 0, 1)),
    ((0.6, 0.6, 5.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1)),
    ((0.8, 0.7, 1.0), TILTED),
    ((1.0, 0.7, 0.7), tuple(float(v) for v in np.linalg.qr(np.reshape(OBLIQUE, (3, 3)))[0].ravel())),
]


def lung(spacing, direction, half_mm=22.0) -> Image:
    """-850 HU around the patient's origin, with noise."""
    shape = tuple(2 * math.ceil(half_mm / s) + 1 for s in spacing[::-1])
    array = np.random.default_rng(0).normal(-850, 20, shape).astype(np.float32)
    image = Image(array, spacing, (0.0, 0.0, 0.0), direction)
    centre = image.index_to_point([(n - 1) / 2 for n in shape[::-1]])
    return Image(array, spacing, tuple(-c for c in centre), direction)


def distance(image: Image, axes=(1.0, 1.0, 1.0), turn=0.0, at=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Of every voxel from `at` in LPS mm, where the unit along the axes (turned about S) is `axes` mm."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij")).reshape(3, -1)[::-1]
    points = image.matrix[:3, :3] @ index + image.matrix[:3, 3:] - np.array(at)[:, None]
    about = np.array([[math.cos(turn), math.sin(turn), 0], [-math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    return np.sqrt((((about @ points) / np.array(axes)[:, None]) ** 2).sum(0)).reshape(image.shape)


def put(image: Image, diameter: float, hu: float, **where) -> np.ndarray:
    """A ball with an edge as a scanner blurs it; returns its mask."""
    away = distance(image, **where) - diameter / 2
    image.array[...] += (hu - image.array) / (1 + np.exp(np.clip(away / 0.35, -50, 50)))
    return (away <= 0).astype(np.uint8)


def test_a_lesion_elsewhere_has_neither_texture_nor_size_class():
    image = lung(*GRIDS[0])
    mask = put(image, 12.0, 30)
    nodule, other = describe(image, mask), describe(image, mask, lung=False)
    assert {key for key in nodule if nodule[key] != other[key]} == {
        *("texture", "solid_mean_mm", "solid_volume_mm3", "dense_mean_mm", "size_class")
    }
    assert row(other)[5:7] == ["-", "-"] and row(other)[-1] == "-" and row(other)[1:5] == row(nodule)[1:5]


@pytest.mark.parametrize(("spacing", "direction"), GRIDS)
@pytest.mark.parametrize("diameter", [5.0, 8.0, 20.0])
def test_a_balls_sizes(spacing, direction, diameter):
    image = lung(spacing, direction)
    mask = put(image, diameter, 30)
    found = describe(image, mask)
    voxel = sorted(spacing)[1]
    assert abs(found["mean_mm"] - diameter) <= voxel and abs(found["longest_mm"] - diameter) <= 1.5 * voxel
    mean, longest, perpendicular = (Decimal(cell) for cell in row(found)[2:5])  # as by hand from what the table shows
    assert mean == ((longest + perpendicular) / 2).quantize(Decimal("0.1"), ROUND_HALF_UP)
    assert found["mean_mm"] == float(mean) and abs(float(longest) - found["longest_mm"]) < 0.0501
    assert found["volume_mm3"] == pytest.approx(math.pi / 6 * diameter**3, rel=0.6 if spacing[2] > diameter / 2 else 0.12)
    assert found["center"] == pytest.approx((0, 0, 0), abs=0.3)
    assert (found["texture"], found["solid_mean_mm"], found["side"]) == ("solid", found["mean_mm"], "")
    assert diameter == 8 or found["size_class"] == {5.0: "2", 20.0: "4B"}[diameter]
    expected = measure(image.like(mask), [Label(1, "n", (0, 0, 0), {})], image)[0]
    for key in set(expected) & set(found):
        assert np.allclose(found[key], expected[key], atol=1e-4), key


@pytest.mark.parametrize(("spacing", "direction"), GRIDS[:3])
def test_an_ellipsoids_axes_lie_in_the_axial_section(spacing, direction):
    image = lung(spacing, direction)
    mask = put(image, 1.0, 30, axes=(18.0, 10.0, 26.0), turn=0.5)
    found = describe(image, mask)
    assert found["longest_mm"] == pytest.approx(18, abs=0.9) and found["perpendicular_mm"] == pytest.approx(10, abs=0.9)
    assert found["mean_mm"] == pytest.approx(14, abs=0.6) and found["size_class"] == "4A"  # not the 26 mm along the body
    a, b = (np.array(p) for p in found["longest_points"])
    assert np.linalg.norm(a - b) == pytest.approx(found["longest_mm"]) and abs((a - b)[2]) < 1e-6


@pytest.mark.parametrize(("spacing", "direction"), GRIDS)
def test_texture_and_the_solid_part(spacing, direction):
    image = lung(spacing, direction)
    mask = put(image, 18, -620)
    glass = describe(image, mask)
    assert (glass["texture"], glass["solid_mean_mm"], glass["solid_volume_mm3"], glass["size_class"]) == ("ground-glass", 0.0, 0.0, "2")
    put(image, 7.0, 20, at=(3.0, 2.0, 0.0))
    part = describe(image, mask)
    assert part["texture"] == "part-solid" and part["mean_mm"] == glass["mean_mm"]
    assert part["solid_mean_mm"] == pytest.approx(7, abs=1.0)
    assert part["solid_volume_mm3"] == pytest.approx(math.pi / 6 * 343, rel=0.35)
    put(image, 18, 30)
    assert describe(image, mask)["texture"] == "solid"


def test_a_small_solid_part_in_a_large_glass_is_seen_and_a_vessel_is_not():
    image = lung((0.7, 0.7, 1.0), GRIDS[0][1])
    mask = put(image, 32, -600)
    put(image, 1.0, 0, axes=(1.8, 1.8, 40.0), at=(9.0, 0.0, 0.0))
    vessel = describe(image, mask)
    assert vessel["texture"] == "ground-glass" and vessel["size_class"] == "3"  # of 30 mm or more
    put(image, 5.0, 0, at=(-9.0, 3.0, 0.0))
    part = describe(image, mask)
    assert part["texture"] == "part-solid" and part["size_class"] == "3" and 4 < part["solid_mean_mm"] < 6


def test_a_nodule_on_the_wall_and_one_of_chalk():
    image = lung((0.7, 0.7, 1.25), GRIDS[0][1])
    image.array[:, :, 40:] = 50
    centre = image.index_to_point((37, 31, 18))
    mask = put(image, 9, 30, at=centre)
    mask[:, :, 40:] = 0
    found = describe(image, mask)
    assert found["texture"] == "solid" and found["note"] == NOTE and found["longest_mm"] == pytest.approx(9, abs=0.8)
    image.array[mask > 0] = 600
    chalk = describe(image, mask)
    assert chalk["texture"] == "solid" and chalk["note"].startswith(NOTE) and "calcium" in chalk["note"]
    low = np.argwhere(mask).min(0)
    cut = describe(image.crop(Box((int(low[0]) + 2, 0, 0), image.shape)), mask[low[0] + 2 :])
    assert cut["note"].startswith(NOTE) and "edge of the scan" in cut["note"] and "calcium" in cut["note"]
    table = csv_text([row(chalk), row(cut)], notes=[chalk["note"], cut["note"]]).splitlines()
    assert "calcium" in table[1] and "edge" not in table[1] and "edge of the scan" in table[2]


@pytest.mark.parametrize("voxels", [[(5, 5, 5)], [(5, 5, 5), (5, 5, 6)], [(5, 5, 5), (6, 6, 6), (7, 7, 7)]])
@pytest.mark.parametrize("hu", [-700, 50])
def test_a_nodule_of_few_voxels(voxels, hu):
    image = Image(np.full((12, 12, 12), -850, np.int16), (0.7, 0.7, 2.5), (1.0, 2.0, 3.0), TILTED)
    mask = np.zeros(image.shape, np.uint8)
    for at in voxels:
        mask[at] = 1
        image.array[at] = hu
    found = describe(image, mask)
    assert found["voxels"] == len(voxels) and found["mean_mm"] >= 0.7 and found["size_class"] == "2"
    assert found["texture"] == ("solid" if hu > 0 else "ground-glass")
    json.dumps(found, allow_nan=False)


def test_the_mask_may_be_a_part_or_empty_and_must_fit():
    image = lung((0.8, 0.7, 1.0), TILTED)
    mask = put(image, 8, 30)
    whole = describe(image, mask)
    box = Box.around(mask)
    assert describe(image, mask[box.slices], box.start) == whole
    grown = box.grown((3, 3, 3))
    assert describe(image, mask[grown.slices] > 0, grown.start) == whole
    assert describe(Image(image.channels, image.spacing, image.origin, image.direction), mask) == whole
    for empty in (np.zeros(image.shape, np.uint8), np.zeros((0, 0, 0), np.uint8)):
        nothing = describe(image, empty)
        assert nothing["voxels"] == 0 and set(nothing) == set(whole) and nothing["note"] == NOTE
        assert all(nothing[k] is None for k in whole if k not in ("voxels", "volume_mm3", "volume_ml", "note"))
        assert row(nothing) == ["-", "0", *["-"] * 7]
    for start in ((-1, 0, 0), (1, 0, 0)):
        with pytest.raises(UserError, match="does not fit the image"):
            describe(image, mask, start)


def test_one_section_is_enough():
    image = Image(np.full((1, 40, 40), -850, np.int16), (0.8, 0.8, 3.0))
    mask = (np.hypot(*(g - 20 for g in np.indices((40, 40)))) <= 5).astype(np.uint8)[None]
    image.array[mask > 0] = 20
    found = describe(image, mask)
    assert found["mean_mm"] == pytest.approx(8.4, abs=0.8) and found["texture"] == "solid"


@pytest.mark.parametrize("slices", [1, 3])
def test_thick_slices_are_measured_in_their_own_plane(slices):
    away = np.hypot(*(g - 32 for g in np.indices((64, 64))))
    mask = np.repeat((away <= 15).astype(np.uint8)[None], slices, 0)
    values = np.repeat(np.select([away <= 6, away <= 15], [40, -600], -850).astype(np.int16)[None], slices, 0)
    axial = Image(values, (0.7, 0.7, 5.0))
    coronal = Image(values, (0.7, 0.7, 5.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 0, 1, 0, -1, 0))
    keys = ("longest_mm", "perpendicular_mm", "mean_mm", "texture", "solid_mean_mm", "size_class")
    expected, found = ([describe(image, mask)[key] for key in keys] for image in (axial, coronal))
    assert found[2:] == expected[2:] and found[:2] == pytest.approx(expected[:2]) and found[3] == "part-solid" and found[2] > 20
    turned = describe(
        Image(values.transpose(1, 0, 2), (0.7, 5.0, 0.7), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, -1)), mask.transpose(1, 0, 2)
    )
    assert turned["note"] == describe(coronal, mask)["note"] and [turned[key] for key in keys][2:] == found[2:]
    across, along = describe(axial, mask), describe(coronal, mask)
    assert "axial" not in across["note"] and "own slices, which are not axial" in along["note"]
    along["mean_mm"], along["dense_mean_mm"] = 30.0, 15.0
    for pair in ((across, along), (along, across)):
        change = follow_up(*pair, 90)
        assert change["growth"] == "stable" and change["mean_change_mm"] is None and change["solid_change_mm"] is None
        assert change["text"].endswith(". Mean diameter not compared: measured in different planes.")
    assert follow_up(along, along, 90)["mean_change_mm"] == 0 and follow_up(across, across, 90)["mean_change_mm"] == 0


def mass(kind: str) -> tuple[Image, np.ndarray]:
    """90 mm across, as a CT has it; its box has 1.5 million voxels."""
    grid = np.ogrid[-46:47, -66:67, -66:67]
    away = np.sqrt(sum((g * s) ** 2 for g, s in zip(grid, (1.0, 0.7, 0.7))))
    array = np.random.default_rng(3).normal(0, 40, away.shape)
    array += np.select([away > 45, away < {"solid": 45, "part-solid": 16, "ground-glass": 0}[kind]], [-850, 30], -620)
    return Image(array.astype(np.int16), (0.7, 0.7, 1.0)), away <= 45


# As they were when all was done in one piece, with every pixel's edges in the hulls.
FIGURES = {
    "solid": (779055, 381736.95, 90.68985610309456, 90.68985610309457, 90.7, 90.7, 381736.95, "4B"),
    "part-solid": (779055, 381736.95, 90.68985610309456, 90.68985610309457, 90.7, 32.6, 17110.31, "4B"),
    "ground-glass": (779055, 381736.95, 90.68985610309456, 90.68985610309457, 90.7, 0.0, 0.0, "3"),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_a_mass_is_described_in_small_pieces(kind, monkeypatch):
    image, mask = mass(kind)
    work = {"components": 0, "hulls": 0, "points": 0}
    components, hull = postprocess.components, measuring._hull

    def looked(part: np.ndarray, corners: bool = False) -> tuple[np.ndarray, np.ndarray]:
        work["components"] += part.size
        return components(part, corners)

    def wrapped(points: np.ndarray) -> np.ndarray:
        work["hulls"] += 1
        work["points"] += len(points)
        return hull(points)

    monkeypatch.setattr(postprocess, "components", looked)
    monkeypatch.setattr(measuring, "_hull", wrapped)
    steps, pieces, whole = describe_steps(image, mask), [], dict.fromkeys(work, 0)
    while True:
        work.update(dict.fromkeys(work, 0))
        try:
            next(steps)
        except StopIteration as end:
            found = end.value
            break
        pieces.append(dict(work))
        whole = {key: whole[key] + work[key] for key in whole}
    assert len(pieces) > 91  # one for each section, and more
    assert max(piece["components"] for piece in pieces) < mask.size / 5 and max(piece["hulls"] for piece in pieces) == 1
    # Of 91 sections few can be the widest, and of a section's 1000 ends of rows few lie on its hull.
    assert whole["hulls"] <= 8 and whole["points"] <= 400 * whole["hulls"]
    keys = ("voxels", "volume_mm3", "longest_mm", "perpendicular_mm", "mean_mm", "solid_mean_mm", "solid_volume_mm3", "size_class")
    assert found["texture"] == kind
    assert [pytest.approx(v) if isinstance(v, float) else v for v in FIGURES[kind]] == [found[key] for key in keys]
    monkeypatch.undo()
    assert describe(image, mask) == found


# ---------------------------------------------------------------------------------------------------------------- side


def body(middle_mm=0.0, width=340.0, field=420.0, spacing=(2.0, 2.0, 5.0)) -> Image:
    """A trunk with two lungs on a table, its middle so far to the left of the image's."""
    shape = (5, round(field / 2), round(field / 2))
    image = Image(np.full(shape, -1000, np.int16), spacing, (-field / 2, -field / 2, -10.0))
    y, x = (s * (np.arange(n) - (n - 1) / 2) for s, n in zip(spacing[1::-1], shape[1:]))
    x = x[None] - middle_mm
    trunk = (x / (width / 2)) ** 2 + (y[:, None] / (width / 3)) ** 2 <= 1
    lungs = ((np.abs(x) - width / 5) / (width / 7)) ** 2 + (y[:, None] / (width / 4.5)) ** 2 <= 1
    image.array[:, trunk] = 40
    image.array[:, lungs] = -850
    image.array[:, -12:-9] = 100  # the table
    return image


def side_at(image: Image, x: float, **kwargs) -> str:
    index = [round(v) for v in image.point_to_index((x, 0.0, 0.0))][::-1]
    mask = np.ones((1, 3, 3), np.uint8)
    return describe(image, mask, [index[0], index[1] - 1, index[2] - 1])["side"]


@pytest.mark.parametrize("middle", [0.0, 30.0, -30.0])
def test_the_side_is_of_the_body_not_of_the_image(middle):
    image = body(middle)
    assert side_at(image, middle + 70) == "left" and side_at(image, middle - 70) == "right"
    assert side_at(image, middle + 14) == "left" and side_at(image, middle - 14) == "right"
    assert side_at(image, middle) == ""


@pytest.mark.parametrize("flips", [(1, 1), (-1, 1), (-1, -1)])
def test_the_side_does_not_depend_on_the_images_direction(flips):
    image = body(20.0)
    sx, sy = flips
    turned = Image(
        np.ascontiguousarray(image.array[:, ::sy, ::sx].transpose(2, 1, 0)),  # its x axis runs up, its z across the body
        (image.spacing[2], image.spacing[1], image.spacing[0]),
        image.index_to_point((0 if sx > 0 else image.shape[2] - 1, 0 if sy > 0 else image.shape[1] - 1, 0)),
        (0.0, 0.0, float(sx), 0.0, float(sy), 0.0, 1.0, 0.0, 0.0),
    )
    for x, side in ((20 + 60.0, "left"), (20 - 60.0, "right")):
        index = [round(v) for v in turned.point_to_index((x, 0.0, 0.0))][::-1]
        mask = np.ones((3, 3, 1), np.uint8)
        assert describe(turned, mask, [index[0] - 1, index[1] - 1, index[2]])["side"] == side


def test_voxels_that_are_no_number_leave_a_report():
    image = body(10.0)
    image = image.like(image.array.astype(np.float32))
    image.array[-1, -1] = np.nan
    index = [round(v) for v in image.point_to_index((80.0, 0.0, 0.0))][::-1]
    mask, start = np.ones((2, 3, 3), np.uint8), [index[0], index[1] - 1, index[2] - 1]
    assert describe(image, mask, start)["texture"]  # far away
    image.array[tuple(start)] = np.nan
    assert row(describe(image, mask, start))[COLUMNS.index("Mean HU")] == "nan"


def test_where_values_are_no_hu_there_is_no_side():
    image = body(10.0)
    assert side_at(image, 80) == "left" and side_at(image.like((image.array + 1000).clip(0)), 80) == ""  # as MR, which is body all over


def test_where_values_are_no_hu_there_is_neither_texture_nor_size_class():
    image = lung(*GRIDS[0])
    mask = put(image, 12.0, 30)
    found = describe(image.like(image.array + 1024), mask)
    assert not any(found[k] for k in ("texture", "size_class", "solid_mean_mm")) and found["mean_mm"] > 11


@pytest.mark.parametrize("width", [340, 400, 440])
@pytest.mark.parametrize("left", [False, True])
def test_a_body_cut_on_one_side_gives_no_wrong_side(width, left):
    image, named = body(width=width, field=width + 60), 0
    for keep in (260, 300, 330):
        n, stop = image.shape[2], (30 + keep) // 2
        crop = image.crop(Box((0, 0, n - stop), image.shape) if left else Box((0, 0, 0), (5, n, stop)))
        for x in (-80, -60, -40, -20, 20, 40, 60, 80):
            if (x if not left else -x) < keep - width / 2 - 4:
                side = side_at(crop, x)
                named += bool(side)
                assert side in ("", "left" if x > 0 else "right"), (keep, x)
    assert named > 4


def test_the_side_where_the_field_of_view_cuts_the_body():
    cut = body(0.0, width=400, field=360)
    assert side_at(cut, 70) == "left" and side_at(cut, -70) == "right"
    one_lung = cut.crop(Box((0, 20, 95), (5, 160, 175)))
    assert side_at(one_lung, 70) == ""  # where is the midline?
    assert side_at(body(10.0, width=120, field=200), 50) == "left"  # a small child, whole


@pytest.mark.parametrize(("axis", "known"), [(0, True), (1, False), (2, False)])
def test_an_oblique_section_has_no_midline(axis, known):
    image, mask = body(), np.ones((1, 3, 3), np.uint8)
    for degrees in (10, 30):
        turn, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = math.cos(math.radians(degrees))
        turn[j, i] = math.sin(math.radians(degrees))
        turn[i, j] = -turn[j, i]
        turned = Image(image.array, image.spacing, image.origin, tuple(turn.ravel()))
        assert describe(turned, mask, (2, 104, 139))["side"] == ("left" if known or degrees == 10 else "")


# ------------------------------------------------------------------------------------------------- classes and two studies


@pytest.mark.parametrize(
    ("texture", "mean", "solid", "expected"),
    [
        ("solid", 5.9, 5.9, "2"),
        ("solid", 6.0, 6.0, "3"),
        ("solid", 7.9, 7.9, "3"),
        ("solid", 8.0, 8.0, "4A"),
        ("solid", 14.9, 14.9, "4A"),
        ("solid", 15.0, 15.0, "4B"),
        ("part-solid", 5.9, 4.0, "2"),
        ("part-solid", 6.0, 5.9, "3"),
        ("part-solid", 30.0, 5.9, "3"),
        ("part-solid", 12.0, 6.0, "4A"),
        ("part-solid", 12.0, 8.0, "4B"),
        ("ground-glass", 29.9, 0.0, "2"),
        ("ground-glass", 30.0, 0.0, "3"),
    ],
)
def test_size_classes_are_those_of_lung_rads_2022(texture, mean, solid, expected):
    assert size_class(mean, texture, solid) == expected


def nodule(volume=300.0, mean=8.3, center=(0.0, 0.0, 0.0), side="left", note=NOTE, texture="solid", solid=None):
    solid = mean if texture == "solid" else solid
    sizes = {"volume_mm3": volume, "mean_mm": mean, "solid_mean_mm": solid, "dense_mean_mm": solid}
    return {"voxels": 100, "center": center, "side": side, "note": note, "texture": texture, **sizes}


def test_a_follow_up_gives_the_doubling_time_and_names_its_thresholds():
    double = follow_up(nodule(), nodule(600.0, 10.4), 200)
    assert double["doubling_days"] == pytest.approx(200) and double["volume_change_percent"] == pytest.approx(100)
    assert double["growth"] == "growth" and double["mean_change_mm"] == 2.1 and double["note"] == NOTE
    assert "doubling in 200 days" in double["text"] and "BTS 2015" in double["text"] and "less than 400" in double["text"]
    assert "(Fleischner 2017: a change, 2 mm or more; Lung-RADS v2022: growth" in double["text"]
    slow = follow_up(nodule(), nodule(390.0, 9.1), 365)
    assert slow["growth"] == "growth" and slow["doubling_days"] == pytest.approx(365 * math.log(2) / math.log(1.3))
    assert "more than 600" in slow["text"] and slow["text"].endswith("Mean diameter +0.8 mm.")
    same = follow_up(nodule(), nodule(330.0, 8.6), 365)
    assert same["growth"] == "stable" and same["doubling_days"] > 2000 and "no significant change" in same["text"]
    less = follow_up(nodule(), nodule(200.0, 7.1), 90)
    assert less["growth"] == "smaller" and less["doubling_days"] is None and less["text"].startswith("Volume -33 % in 90 days")
    assert "400 to 600" in follow_up(nodule(), nodule(450.0, 9.5), 300)["text"]
    for days in (0, -3, float("nan")):
        with pytest.raises(UserError, match="later than the first"):
            follow_up(nodule(), nodule(), days)
    with pytest.raises(UserError, match="in both studies"):
        follow_up(nodule(), {"voxels": 0}, 30)


def test_a_follow_up_does_not_contradict_its_own_figures():
    for voxels in range(4, 400, 4):  # 5 for 4, of voxels whose products are not exact
        for size in (0.7 * 0.7 * 1.25, 0.6 * 0.6, 0.5 * 0.5 * 0.75):
            assert follow_up(nodule(voxels * size), nodule(voxels // 4 * 5 * size), 100)["growth"] == "growth"
    assert follow_up(nodule(), nodule(300 * 1.246), 365)["growth"] == "growth"  # "+25 %"
    assert follow_up(nodule(), nodule(300 * 1.244), 365)["text"].startswith("Volume +24 % in 365 days: no significant change")
    assert "doubling in 400 days" in (text := follow_up(nodule(), nodule(300 * 2 ** (200 / 399.6)), 200)["text"]) and "400 to 600" in text
    assert "doubling in 600 days" in (text := follow_up(nodule(), nodule(300 * 2 ** (500 / 600.4)), 500)["text"]) and "400 to 600" in text
    same = follow_up(nodule(), nodule(300.0 * (1 + 1e-12), 8.299999), 365)
    assert same["doubling_days"] is None and "-0" not in follow_up(nodule(), nodule(299.7, 8.27), 365)["text"]


def test_a_follow_up_says_where_a_scan_cuts_the_nodule():
    image = lung((0.7, 0.7, 1.25), GRIDS[0][1])
    mask = put(image, 9, 30)
    whole, low = describe(image, mask), int(np.argwhere(mask).min(0)[0]) + 2
    cut = describe(image.crop(Box((low, 0, 0), image.shape)), mask[low:])
    assert follow_up(whole, whole, 90)["note"] == NOTE
    for pair in ((cut, whole), (whole, cut)):
        assert "its true change is not known" in follow_up(*pair, 90)["note"]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("axis", range(3))
def test_a_cut_at_every_face_is_seen(axis, end):
    image = lung(*GRIDS[0])
    mask = put(image, 12.0, 30)
    at, start, stop = np.argwhere(mask)[:, axis], [0, 0, 0], list(image.shape)
    (stop if end else start)[axis] = int(at.max()) - 1 if end else int(at.min()) + 2
    box = Box(tuple(start), tuple(stop))
    assert "edge of the scan" in describe(image.crop(box), mask[box.slices])["note"]


@pytest.mark.parametrize(("days", "said"), [(366, True), (367, False)])
def test_lung_rads_growth_is_that_of_12_months(days, said):
    assert ("Lung-RADS" in follow_up(nodule(), nodule(600.0, 9.9), days)["text"]) == said


@pytest.mark.parametrize(
    ("before", "after", "days", "growth", "said"),
    [
        (("part-solid", 3.1), ("part-solid", 8.2), 180, "growth", "Solid part +5.1 mm (Lung-RADS v2022: growth, more than 1.5 mm within"),
        (("part-solid", 3.1), ("part-solid", 8.2), 400, "growth", "Solid part +5.1 mm (growth, more than 1.5 mm)."),
        (("part-solid", 3.1), ("part-solid", 4.6), 180, "stable", "no significant change (BTS 2015: less than 25 %). Mean diameter +0.2"),
        (("ground-glass", 0.0), ("part-solid", 3.2), 400, "growth", "Solid part +3.2 mm (Lung-RADS v2022: new)."),
        (("ground-glass", 0.0), ("ground-glass", 0.0), 180, "stable", "Mean diameter +0.2 mm."),
        (("part-solid", 3.1), ("solid", None), 180, "growth", "Solid part +5.4 mm (Lung"),
        (("part-solid", 3.1), ("ground-glass", 0.0), 180, "stable", "Solid part -3.1 mm."),
        (("solid", None), ("part-solid", 3.1), 180, "stable", "Mean diameter +0.2 mm."),
    ],
)
def test_a_solid_part_grows_by_itself(before, after, days, growth, said):
    found = follow_up(nodule(texture=before[0], solid=before[1]), nodule(330.0, 8.5, texture=after[0], solid=after[1]), days)
    assert found["growth"] == growth and said in found["text"] and ("no significant" in found["text"]) == (growth == "stable")
    smaller = follow_up(nodule(texture=before[0], solid=before[1]), nodule(150.0, 8.5, texture=after[0], solid=after[1]), days)
    assert smaller["growth"] == ("growth" if growth == "growth" else "smaller")


@pytest.mark.parametrize(
    ("size", "cores", "textures", "said"),
    [
        (18, (3.4, 4.4), ("ground-glass", "part-solid"), "Solid part +1."),
        (14, (8.0, 8.8), ("part-solid", "solid"), "Solid part +0."),
        (18, (3.4, 9.0), ("ground-glass", "part-solid"), "(Lung-RADS v2022: new)"),
    ],
)
def test_another_texture_alone_is_no_growth(size, cores, textures, said):
    image, studies = lung((0.6, 0.6, 0.6), GRIDS[0][1]), []
    for core in cores:
        mask = put(image, size, -620)
        put(image, core, 20)
        studies.append(describe(image, mask))
    found = follow_up(*studies, 180)
    assert tuple(study["texture"] for study in studies) == textures and said in found["text"]
    assert found["growth"] == ("growth" if "new" in said else "stable")


@pytest.mark.parametrize("volume", [150.0, 310.0, 600.0])
def test_no_guideline_of_the_lung_is_quoted_for_a_lesion_elsewhere(volume):
    for textures in ((None, None), (None, "solid"), ("solid", None)):
        before, after = nodule(texture=textures[0]), nodule(volume, 12.0, texture=textures[1])
        found = follow_up(before, after, 200)
        assert found["growth"] is None and found["solid_change_mm"] is None and found["volume_change_percent"]
        assert found["text"].endswith(". Mean diameter +3.7 mm.") and not any(c in found["text"] for c in "(:")
    assert ("doubling in 200 days" in found["text"]) == (volume == 600)


def test_lone_nodules_far_apart_across_the_body_are_two():
    for place, same in (((60.0, 40.0, 900.0), True), ((60.0, 80.0, -100.0), False), ((165.0, -80.0, -100.0), False)):
        pairs = match([nodule(center=(60.0, -50.0, -100.0))], [nodule(center=place)])
        assert pairs == ([(0, 0)] if same else [(0, None), (None, 0)])


def test_nodules_of_two_studies_are_matched():
    places = [(50.0, 0.0, -100.0), (-60.0, 20.0, -150.0), (40.0, 60.0, -220.0)]
    before = [nodule(center=p) for p in places]
    near = [nodule(center=tuple(v + 4 for v in p)) for p in places]
    assert match(before, near[::-1]) == [(0, 2), (1, 1), (2, 0)]
    assert match(before, near[1:]) == [(0, None), (1, 0), (2, 1)]
    assert match(before[:1], near) == [(0, 0), (None, 1), (None, 2)]
    far = [nodule(center=(p[0] + 5, p[1] - 30, p[2] + 400)) for p in places]  # another table position
    assert match(before, [far[2], nodule(center=(0.0, 0.0, 500.0)), far[0]]) == [(0, 2), (1, None), (2, 0), (None, 1)]
    assert match(before[:1], far[:1]) == [(0, 0)]
    assert match(before[:1], [nodule(center=far[0]["center"], side="right")]) == [(0, None), (None, 0)]
    assert match(before[:2], far[2:]) == [(0, None), (1, None), (None, 0)]
    # One stayed, one vanished, a new one came: no shift of the table takes a right nodule to the left lung.
    right, left, new = (nodule(center=(x, 0.0, 0.0), side=s) for x, s in ((-60.0, "right"), (60.0, "left"), (180.0, "left")))
    assert match([right, left], [left, new]) == [(0, None), (1, 0), (None, 1)]
    beside = [nodule(center=(x, 0.0, 0.0), side=s) for x, s in ((6.0, "left"), (-6.0, "right"))]  # of the midline
    assert match(beside[:1], beside[1:]) == [(0, 0)]
    assert match([], near) == [(None, 0), (None, 1), (None, 2)] and match(before, []) == [(0, None), (1, None), (2, None)]
    assert match([{"voxels": 0}], near[:1]) == [(0, None), (None, 0)]


def test_chance_pairs_do_not_outvote_a_nodule_that_stayed():
    """Two new nodules lie by chance as far and in the same direction from two that vanished."""
    stayed, vanished = (50.0, 0.0, -100.0), [(40.0, 60.0, 20.0), (90.0, -50.0, 80.0)]
    new = [tuple(np.add(p, (30, -60, 50)) + (0, 0, 12 * i)) for i, p in enumerate(vanished)]
    before = [nodule(center=p) for p in (stayed, *vanished)]
    after = [nodule(center=p) for p in (tuple(np.add(stayed, 1.5)), *new)]
    assert match(before, after) == [(0, 0), (1, None), (2, None), (None, 1), (None, 2)]
    assert match(before[1:], after[1:]) == [(0, 0), (1, 1)]  # without it nothing speaks against the table having moved


def test_many_nodules_are_matched_with_few_shifts_tried(monkeypatch):
    rng = np.random.default_rng(0)
    places = rng.uniform(-150, 150, (40, 3))
    before = [nodule(center=tuple(p), side="") for p in places]
    moved = [*places[2:] + (0, -40, 300) + rng.normal(0, 3, (38, 3)), *rng.uniform(900, 999, (2, 3))]
    norm, tried = np.linalg.norm, []
    monkeypatch.setattr(np.linalg, "norm", lambda *args, **kwargs: tried.append(1) or norm(*args, **kwargs))
    pairs = match(before, [nodule(center=tuple(p), side="") for p in moved])
    assert pairs == [(0, None), (1, None), *((i + 2, i) for i in range(38)), (None, 38), (None, 39)]
    assert len(tried) < 400  # of 1600 shifts


def test_a_row_and_its_csv():
    image = lung((0.7, 0.7, 1.25), GRIDS[0][1])
    mask = put(image, 18, -620)
    put(image, 7.0, 20)
    found = describe(image, mask)
    cells = row(found)
    assert len(cells) == len(COLUMNS) and cells[0] == "-" and cells[5] == "part-solid"
    assert (
        cells[1] == f"{found['volume_mm3']:.0f}" and cells[2] == f"{found['mean_mm']:.1f}" and cells[6] == f"{found['solid_mean_mm']:.1f}"
    )
    assert cells[8] == found["size_class"] and row({**found, "side": "left"})[0] == "left"
    assert row({**found, "mean_hu": -0.3})[7] == "0" and row({**found, "mean_hu": -0.6})[7] == "-1"
    text = csv_text([["a, b", *cells], ["c", *cells]], ["Nodule", *COLUMNS])
    heading, *lines = csv.reader(text.splitlines())
    assert heading == ["Nodule", *COLUMNS, "Note"] and lines[0] == ["a, b", *cells, NOTE] and len(lines) == 2
    assert csv_text([["=1+1", "-0.5", "-"]], ("a", "b", "c")).splitlines()[1].startswith("'=1+1,-0.5,-,")
    assert csv_text([]).splitlines() == [",".join([*COLUMNS, "Note"])]


# ---------------------------------------------------------------------------------------------------------------- real


def test_real_nodules_agree_with_their_readers(data):
    """Every sixth of LIDC's 779: texture 1 and 2 are ground-glass to their readers, 3 part-solid, 4 and 5 solid; of all 779 87 %
    agree. diameter_mm of the index is the diameter of a ball of about that volume, the readers' masks being generous."""
    folder = data / "lidc_nodules"
    names = ["ground-glass", "part-solid", "solid"]
    table, off, chalk = np.zeros((3, 3), int), [], np.zeros((2, 2), int)
    with open(folder / "index.csv", newline="") as file:
        for item in list(csv.DictReader(file))[::6]:
            image, mask = (read_image(folder / kind / item["file"]) for kind in ("images", "masks"))
            found = describe(image, mask.array)
            table[{"1": 0, "2": 0, "3": 1}.get(item["texture"], 2), names.index(found["texture"])] += 1
            off.append(found["mean_mm"] - float(item["diameter_mm"]))
            chalk[int(item["calcification"] != "6"), int("calcium" in found["note"])] += 1
            assert found["volume_mm3"] == pytest.approx(float(item["mask_mm3"]), rel=0.01)
            assert found["perpendicular_mm"] <= found["longest_mm"] + 1e-6 and found["side"] == ""
    assert table.trace() / table.sum() > 0.8 and table[0, 0] / table[0].sum() > 0.7 and table[2, 2] / table[2].sum() > 0.8
    assert 0 < np.median(off) < 3
    assert chalk[0, 1] <= 0.03 * chalk[0].sum() and chalk[1, 1] > 0.5 * chalk[1].sum()


def test_a_real_nodule_in_a_whole_chest(data):
    image = read_image(data / "chest_ct" / "LIDC-IDRI-0001_ct.nii.gz")
    mask = read_image(data / "chest_ct" / "LIDC-IDRI-0001_nodule.nii.gz")
    found = describe(image, mask.array > 0)
    assert (found["side"], found["texture"], found["size_class"]) == ("left", "solid", "4B") and 20 < found["mean_mm"] < 40


def test_a_real_tumour_beside_the_labelled_lungs(data):
    image = read_image(data / "chest_ct" / "LUNG1-001_ct.nii.gz")
    labels = read_image(data / "chest_ct" / "LUNG1-001_lungL1_lungR2_cord3_gtv4.nii.gz").array
    for value, side in ((1, "left"), (2, "right")):
        assert describe(image, labels == value)["side"] == side
    found = describe(image, labels == 4)
    near = {v: np.abs(np.argwhere(labels[:, ::4, ::4] == v).mean(0) - np.argwhere(labels[:, ::4, ::4] == 4).mean(0))[2] for v in (1, 2)}
    assert found["side"] == ("left" if near[1] < near[2] else "right") and found["size_class"] == "4B"


@pytest.mark.parametrize(("solid", "texture"), [(3.4, "part-solid"), (0.0, "ground-glass")])
def test_a_small_solid_part_of_a_small_nodule_counts(solid, texture):
    image = lung((0.7, 0.7, 1.0), GRIDS[0][1])
    mask = put(image, 8.0, -600)
    if solid:
        put(image, solid, 40)
    assert describe(image, mask)["texture"] == texture


def test_a_grain_of_chalk_is_not_most_of_it():
    image = lung((0.7, 0.7, 1.25), GRIDS[0][1])
    mask = put(image, 12.0, 30)
    put(image, 5.0, 3000)
    found = describe(image, mask)
    assert found["note"] == NOTE and row(found)[6] == "-"  # all of a solid nodule is its solid part


def test_a_body_cut_on_one_side_has_no_midline():
    image = body()
    for box, places in ((Box((0, 0, 0), (5, 210, 100)), (-70, -120)), (Box((0, 0, 110), (5, 210, 210)), (70, 120))):
        assert [side_at(image.crop(box), x) for x in places] == ["", ""]


def test_a_follow_up_says_what_shrinks_and_nothing_of_exactly_1_5_mm():
    assert "Fleischner 2017: a change" in follow_up(nodule(), nodule(150.0, 6.3), 90)["text"]
    assert "Lung-RADS" not in follow_up(nodule(), nodule(450.0, 9.8), 90)["text"]


def test_no_shift_takes_a_nodule_to_the_other_lung():
    right, left, near, new = (nodule(center=(x, 0.0, 0.0), side="left" if x > 0 else "right") for x in (-60.0, 60.0, 64.0, 184.0))
    assert match([right, left], [near, new]) == [(0, None), (1, 0), (None, 1)]


def test_exactly_a_quarter_less_is_smaller():
    assert follow_up(nodule(400.0), nodule(300.0, 7.5), 90)["growth"] == "smaller"
    assert follow_up(nodule(400.0), nodule(305.0, 7.5), 90)["growth"] == "stable"
    assert follow_up(nodule(), nodule(450.0, 9.8), 366)["doubling_days"] == pytest.approx(366 * math.log(2) / math.log(1.5))


def test_two_nodules_have_no_partner_in_common():
    before, after = ([nodule(center=(x, 0.0, 0.0)) for x in xs] for xs in ((0.0, 3.0), (1.0,)))
    assert match(before, after) == [(0, 0), (1, None)] and match(after, before) == [(0, 0), (None, 1)]


def test_a_follow_up_says_what_shrank_and_compares_nothing_with_nothing():
    assert ": smaller (by 25 % or more)" in (text := follow_up(nodule(), nodule(200.0, 7.1), 90)["text"]) and "significant" not in text
    glass = nodule(texture="ground-glass", solid=0.0)
    assert follow_up(glass, glass, 90)["solid_change_mm"] is None and "Solid part" not in follow_up(glass, glass, 90)["text"]
    assert "growth (BTS 2015: 25 % or more)" in follow_up(nodule(400.0), nodule(500.0), 90)["text"]  # of exactly that
    part, same = (nodule(texture="part-solid", solid=mm) for mm in (3.1, 3.08))
    assert "Solid part +0.0 mm" in follow_up(part, same, 90)["text"]
    with pytest.raises(UserError, match="in both studies"):
        follow_up({"voxels": 0}, nodule(), 30)
