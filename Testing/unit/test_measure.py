"""Volumes and diameters against shapes of known size, and the clean-up of label maps."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from UNetSegmentationLib import postprocess
from UNetSegmentationLib.image import Box, Image, reorient
from UNetSegmentationLib.measure import dice, measure, measure_steps, rounded, uncertain_places, worst_place
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.postprocess import clean, components, largest_steps
from UNetSegmentationLib.steps import complete

THING = Label(1, "thing", (255, 0, 0), {})
ORIENTATIONS = [(o, s) for o in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)]


def ellipsoid(axes, spacing, degrees=0.0, direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1), origin=(-70.0, 35.5, 900.0)) -> Image:
    """Half axes in mm (x, y, z), turned in plane; not centred on a voxel."""
    half = max(axes) + 3
    shape = [math.ceil(2 * half / s) for s in spacing[::-1]]
    z, y, x = (i * s - half + 0.31 * s for i, s in zip(np.indices(shape), spacing[::-1], strict=True))
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    u, v = c * x + s * y, -s * x + c * y
    inside = (u / axes[0]) ** 2 + (v / axes[1]) ** 2 + (z / axes[2]) ** 2 <= 1
    return Image(inside.astype(np.uint8), spacing, origin, direction)


def one(labels: Image, image: Image | None = None) -> dict:
    (out,) = measure(labels, [THING], image)
    return out


def mask(shape, *boxes) -> np.ndarray:
    out = np.zeros(shape, np.uint8)
    for box in boxes:
        out[box] = 1
    return out


# -------------------------------------------------------------------------------------------------------------- measure


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.25), (0.5, 0.9, 2.0), (1.0, 0.6, 0.8)])
@pytest.mark.parametrize(
    ("axes", "degrees"), [((12, 12, 12), 0), ((17, 8, 11), 0), ((8, 17, 11), 0), ((17, 8, 11), 30), ((17, 8, 11), -72)]
)
def test_volume_and_diameters_of_an_ellipsoid(axes, degrees, spacing):
    out = one(ellipsoid(axes, spacing, degrees))
    assert out["volume_mm3"] == pytest.approx(4 / 3 * math.pi * np.prod(axes), rel=0.02)
    assert out["volume_ml"] == pytest.approx(out["volume_mm3"] / 1000) and out["volume_mm3"] == pytest.approx(
        out["voxels"] * np.prod(spacing)
    )
    voxel = max(spacing[:2])
    assert out["longest_mm"] == pytest.approx(2 * max(axes[:2]), abs=voxel)
    assert out["perpendicular_mm"] == pytest.approx(2 * min(axes[:2]), abs=voxel)


def test_the_longest_diameter_follows_the_ellipse():
    out = one(ellipsoid((17, 6, 11), (0.7, 0.7, 1.25), 30))
    a, b = np.array(out["longest_points"])
    assert math.degrees(math.atan2(*(b - a)[[1, 0]])) % 180 == pytest.approx(30, abs=3)


@pytest.mark.parametrize("size", [1e-5, 6e-4, 1.0])
def test_diameters_of_images_of_any_scale(size):
    (y, x), labels = np.indices((60, 60)), mask((1, 60, 60))
    labels[0] = ((x - 30) / 25) ** 2 + ((y - 30) / 8) ** 2 <= 1
    out = one(Image(labels, (size, size, size)))
    assert out["longest_mm"] / size == pytest.approx(51, abs=1) and out["perpendicular_mm"] / size == pytest.approx(17, abs=1)
    assert np.linalg.norm(np.subtract(*out["longest_points"])) == pytest.approx(out["longest_mm"])


def test_a_mirrored_or_turned_lesion_has_the_same_diameters():
    """Of diameters of one length, which small masks often have, it is that with the longest across."""
    rng, (y, x) = np.random.default_rng(0), np.indices((16, 16))
    for _ in range(60):
        middle, half = rng.uniform(5, 10, (3, 2, 1, 1)), rng.uniform(1, 5, (3, 2, 1, 1))
        blob = mask((3, 16, 16))
        blob[1] = (((np.stack([y, x]) - middle) / half) ** 2).sum(1).min(0) <= 1
        views = (blob, blob[:, ::-1], blob[:, :, ::-1], blob.transpose(0, 2, 1))
        sizes = [one(Image(np.ascontiguousarray(v), (0.7, 0.7, 1.0))) for v in views]
        for key in ("longest_mm", "perpendicular_mm"):
            assert np.ptp([size[key] for size in sizes]) < 1e-3


def test_thick_slices_are_measured_in_their_own_plane():
    """Short-axis slices of the heart are no axial ones; what is one slice thick in a volume is still measured across the body."""
    y, x = np.indices((1, 40, 50))[1:]
    disc = ((y - 20) ** 2 + (x - 24) ** 2 <= 12**2).astype(np.uint8)
    tilted, _ = np.linalg.qr(np.array([[0.785, -0.067, 0.1], [0.575, 0.6, 0.2], [-0.387, 0.8, 0.3]]))
    want = one(Image(disc, (1.4, 1.4, 8.0)))
    for direction in ((1.0, 0, 0, 0, 0, 1.0, 0, -1.0, 0), tuple(tilted.ravel())):
        for array in (disc, np.repeat(disc, 8, 0)):
            found = one(Image(array, (1.4, 1.4, 8.0), (10.0, 20.0, 30.0), direction))
            # Tools that turn the axes to the body's store the same slices along y.
            turned = np.reshape(direction, (3, 3))[:, [0, 2, 1]].ravel()
            stored = one(Image(array.transpose(1, 0, 2), (1.4, 8.0, 1.4), (10.0, 20.0, 30.0), tuple(turned)))
            for key in ("longest_mm", "perpendicular_mm"):
                assert found[key] == pytest.approx(want[key], rel=1e-6) and found[key] > 33
                assert stored[key] == pytest.approx(want[key], rel=1e-6)
    coronal = Image(np.pad(disc, ((1, 1), (0, 0), (0, 0))), (1.4, 1.4, 4.0), direction=(1.0, 0, 0, 0, 0, 1.0, 0, -1.0, 0))
    assert one(coronal)["perpendicular_mm"] == pytest.approx(4.0)


@pytest.mark.parametrize("tilt", [0.0, 20.0])
@pytest.mark.parametrize("degrees", [0, 30, 75])
def test_the_end_points_lie_on_the_section_at_right_angles_and_a_length_apart(degrees, tilt):
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    labels = ellipsoid((17, 8, 11), (0.5, 0.9, 2.0), degrees, (1, 0, 0, 0, c, -s, 0, s, c))
    out = one(labels)
    ends = [np.array(out[key]) for key in ("longest_points", "perpendicular_points")]
    along, across = (b - a for a, b in ends)
    assert np.linalg.norm(along) == pytest.approx(out["longest_mm"]) and np.linalg.norm(across) == pytest.approx(out["perpendicular_mm"])
    assert abs(along @ across) < 1e-6 * np.linalg.norm(along) * np.linalg.norm(across)
    index = np.array([labels.point_to_index(p) for pair in ends for p in pair])
    (k,) = set(np.round(index[:, 2], 6))
    assert k == round(k)
    plane = labels.array[round(k)]
    rows, columns = np.nonzero(plane)
    for x, y, _ in index:
        assert np.hypot(columns - x, rows - y).min() <= 1
    # The two cross within the lesion.
    t = np.linalg.solve(np.stack([along, -across, np.cross(along, across)], 1), ends[1][0] - ends[0][0])
    assert 0 <= t[0] <= 1 and 0 <= t[1] <= 1 and abs(t[2]) < 1e-9


def test_center_is_the_centroid_in_lps():
    labels = ellipsoid((9, 7, 5), (0.7, 0.7, 1.25))
    z, y, x = (a.mean() for a in np.nonzero(labels.array))
    np.testing.assert_allclose(one(labels)["center"], labels.index_to_point((x, y, z)))


def test_a_single_voxel_has_its_own_size():
    labels = Image(mask((5, 6, 7), np.s_[2, 3, 4]), (0.7, 0.9, 2.0), (10, 20, 30))
    out = one(labels)
    assert out["voxels"] == 1 and out["volume_mm3"] == pytest.approx(0.7 * 0.9 * 2)
    assert out["longest_mm"] == pytest.approx(0.9) and out["perpendicular_mm"] == pytest.approx(0.7)
    assert out["center"] == pytest.approx(labels.index_to_point((4, 3, 2)))


@pytest.mark.parametrize(
    ("box", "longest", "perpendicular"), [(np.s_[2, 3, 1:6], 3.5, 0.9), (np.s_[2, 1:5, 4], 3.6, 0.7), (np.s_[1:4, 3, 4], 0.9, 0.7)]
)
def test_a_single_row(box, longest, perpendicular):
    out = one(Image(mask((5, 6, 7), box), (0.7, 0.9, 2.0)))
    assert out["longest_mm"] == pytest.approx(longest) and out["perpendicular_mm"] == pytest.approx(perpendicular)


def test_a_rectangle_has_the_length_of_the_line_between_its_edges_middles_at_least():
    out = one(Image(mask((3, 30, 40), np.s_[1, 5:25, 10:20])))
    assert 20 <= out["longest_mm"] <= math.hypot(20, 10) and 9 <= out["perpendicular_mm"] <= math.hypot(20, 10)


def test_a_diagonal_staircase():
    stairs = np.eye(12, dtype=np.uint8) + np.eye(12, k=1, dtype=np.uint8)
    out = one(Image(stairs[None]))
    assert out["longest_mm"] == pytest.approx(12 * math.sqrt(2), abs=1) and out["perpendicular_mm"] < 2.2


@pytest.mark.parametrize("seed", range(6))
def test_the_diameters_of_a_ragged_lesion_are_those_of_all_its_pixels_edges(seed):
    rng = np.random.default_rng(seed)
    sx, sy = rng.choice([0.5, 0.7, 1.1], 2)
    box = [np.s_[k % 3, a : a + 3, b : b + 4] for k, (a, b) in enumerate(rng.integers(0, 6, (7, 2)))]
    labels = Image(mask((3, 9, 10), np.s_[:, 4, 5], *box), (sx, sy, 2.0))
    out = one(labels)
    half = np.array([(0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)]) * (sx, sy)
    sections = [(np.argwhere(plane)[:, None, ::-1] * (sx, sy) + half).reshape(-1, 2) for plane in labels.array]
    assert out["longest_mm"] == pytest.approx(max(np.hypot(*(p[:, None] - p).T).max() for p in sections))
    z = round(labels.point_to_index(out["longest_points"][0])[2])
    a, b = (np.array(p)[:2] for p in out["longest_points"])
    u = (b - a) / np.hypot(*(b - a))
    along, across = (sections[z] - a) @ u, (sections[z] - a) @ [-u[1], u[0]]
    left, right, ends = along[:, None], along[None], []
    for s in along:  # of all lines between two points, those that cross here
        with np.errstate(invalid="ignore", divide="ignore"):
            cut = across[:, None] + (across[None] - across[:, None]) * (s - left) / (right - left)
        cut = cut[(np.minimum(left, right) <= s) & (s <= np.maximum(left, right)) & (np.abs(left - right) > 1e-9)]
        ends.append(np.ptp([*cut, *across[np.abs(along - s) < 1e-9]]))
    assert out["perpendicular_mm"] == pytest.approx(max(ends))


def test_two_components_count_both_and_the_larger_gives_the_diameters():
    labels = Image(mask((9, 60, 60), np.s_[2:4, 5:10, 5:10], np.s_[5:8, 40:46, 30:50]))
    out = one(labels)
    assert out["voxels"] == 2 * 25 + 3 * 120
    assert 20 <= out["longest_mm"] <= 21 and out["perpendicular_mm"] == pytest.approx(6, abs=1)
    assert all(labels.point_to_index(p)[1] > 30 for p in out["longest_points"])


def test_an_absent_label_has_no_sizes():
    out = one(Image(np.zeros((4, 4, 4), np.uint8)), Image(np.zeros((4, 4, 4))))
    assert (out["voxels"], out["volume_mm3"], out["volume_ml"]) == (0, 0, 0)
    absent = {k: v for k, v in out.items() if k not in ("value", "name", "voxels", "volume_mm3", "volume_ml")}
    assert len(absent) == 9 and set(absent.values()) == {None}


def test_labels_are_measured_in_the_order_asked_and_by_their_own_values():
    array = np.zeros((4, 8, 8), np.uint16)
    array[1, 2:4, 2:4] = 300
    array[2, 5, 5] = 7
    defs = [Label(300, "b", (0, 0, 0), {}), Label(5, "none", (0, 0, 0), {}), Label(7, "a", (0, 0, 0), {})]
    assert [(m["name"], m["value"], m["voxels"]) for m in measure(Image(array), defs)] == [("b", 300, 4), ("none", 5, 0), ("a", 7, 1)]


def test_intensities_are_the_first_channels():
    values = np.random.default_rng(0).normal(40, 10, (2, 5, 6, 7)).astype(np.float32)
    labels = Image(mask((5, 6, 7), np.s_[1:4, 2:5, 2:6]))
    inside = values[0][labels.array > 0].astype(np.float64)
    out = one(labels, Image(values))
    got = [out[k] for k in ("mean_hu", "std_hu", "min_hu", "max_hu")]
    np.testing.assert_allclose(got, [inside.mean(), inside.std(), inside.min(), inside.max()], rtol=1e-6)
    assert one(labels)["mean_hu"] is None


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_measures_are_the_same_in_all_48_orientations(order, signs):
    labels = ellipsoid((9, 5, 7), (0.7, 0.9, 1.5), 30)
    labels.array[2:4, 2:5, 2:4] = 1
    values = np.random.default_rng(0).normal(0, 1, labels.shape)
    want = one(labels, labels.like(values))
    columns = np.eye(3)[:, list(order)] * signs
    spacing = tuple(labels.spacing[a] for a in order)

    def stored(array):
        """The array whose index axes run along these columns."""
        return array.transpose([2 - order[2 - k] for k in range(3)])[tuple(slice(None, None, signs[2 - k]) for k in range(3))]

    turned = Image(np.ascontiguousarray(stored(labels.array)), spacing, (0, 0, 0), tuple(columns.ravel()))
    corner = np.array(labels.origin) - reorient(turned)[0].origin
    turned = Image(turned.array, spacing, tuple(corner), turned.direction)
    assert np.array_equal(reorient(turned)[0].array, labels.array)
    got = one(turned, turned.like(np.ascontiguousarray(stored(values))))
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, str):
            assert got[key] == value
        else:
            np.testing.assert_allclose(got[key], value, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (12.3456, 3, 12.346),
        (0.0456, 3, 0.046),
        (2.345e-7, 3, 2.3e-7),
        (-0.0461, 1, -0.046),
        (-1e-9, 3, -1e-9),
        (0.0, 3, 0.0),
        (-123.44, 1, -123.4),
    ],
)
def test_what_is_smaller_than_a_scans_voxel_keeps_two_digits(value, digits, expected):
    assert rounded(value, digits) == expected and math.isnan(rounded(math.nan, digits))


def test_dice():
    a, b = mask((4, 4, 4), np.s_[0:2]), mask((4, 4, 4), np.s_[1:4])
    assert dice(a, b) == pytest.approx(2 * 16 / 80) and dice(b, a) == dice(a, b)
    assert dice(a, a) == 1 and dice(a, 0 * a) == 0 and dice(0 * a, 0 * a) == 1
    assert dice(a > 0, b * 7) == dice(a, b)


# ----------------------------------------------------------------------------------------------------------- clean-up


def cleaned(labels, rules, values=(1,), spacing=(1.0, 1.0, 1.0), focus=None, within=None, over_gaps=False):
    out = labels.copy()
    clean(out, values, rules, spacing, focus, within, over_gaps)
    return out


SMALL, LARGE, RIM = np.s_[8:10, 18:22, 18:22], np.s_[2:5, 5:11, 2:8], np.s_[1:19, 0:3, 0:40]
SCENE = mask((20, 40, 40), SMALL, LARGE, RIM)


def test_components_are_face_connected():
    diagonal = mask((3, 3, 3), np.s_[0, 0, 0], np.s_[1, 1, 1], np.s_[1, 1, 2])
    labelled, counts = components(diagonal)
    assert counts.tolist() == [24, 1, 2] and labelled[1, 1, 1] == labelled[1, 1, 2] != labelled[0, 0, 0]
    assert components(np.zeros((2, 2, 2)))[1].tolist() == [8]


COMB = mask((14, 7, 9), np.s_[:, 1, ::2], np.s_[:, 5, 1::2], np.s_[13, 1], np.s_[0, 5])  # one joined in its last plane, one in its first
TWINS = mask((14, 7, 9), np.s_[9:12, 4:6, 1:3], np.s_[2:5, 1:3, 5:7], np.s_[13, 0, 0])
SLANT = mask((14, 7, 9), *(np.s_[k, k // 2, k // 2 + k % 2] for k in range(14)))


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("piece", [1, 7 * 9 * 5, 1 << 18])
def test_the_largest_component_found_in_pieces_is_that_of_the_whole(corners, piece, monkeypatch):
    monkeypatch.setattr(postprocess, "_PIECE", piece)
    noise = [np.random.default_rng(i).random((14, 7, 9)) < share for i, share in enumerate((0.02, 0.2, 0.3, 0.35, 0.6, 0.95))]
    for scene in (COMB, TWINS, SLANT, np.ones((1, 1, 1)), np.ones((14, 7, 9)), *noise):
        labelled, counts = components(scene, corners)
        best = 1 + counts[1:].argmax()
        found, voxels = complete(largest_steps(scene > 0, corners))
        assert voxels == counts[best] and np.array_equal(found, labelled == best)
    found, voxels = complete(largest_steps(np.zeros((14, 7, 9), bool), corners))
    assert voxels == 0 and found.dtype == bool and not found.any()


def test_no_rules_change_nothing():
    for rules in ({}, {"fill_holes": False, "min_volume_mm3": 0, "largest_component": False}):
        assert np.array_equal(cleaned(SCENE, rules), SCENE)


def test_the_largest_component_stays():
    scene = mask((20, 40, 40), SMALL, LARGE)
    assert np.array_equal(cleaned(scene, {"largest_component": True}), mask((20, 40, 40), LARGE))


def test_slices_above_one_another_hang_together_over_a_blank_one():
    low, high, beside = np.s_[1:4, 5:15, 5:15], np.s_[5:9, 5:15, 5:15], np.s_[4:5, 25:30, 25:30]
    scene, rules = mask((20, 40, 40), low, high, beside), {"largest_component": True}
    assert np.array_equal(cleaned(scene, rules), mask((20, 40, 40), high))
    assert np.array_equal(cleaned(scene, rules, over_gaps=True), mask((20, 40, 40), low, high))
    apart = mask((20, 40, 40), low, np.s_[6:10, 5:15, 5:15])
    assert np.array_equal(cleaned(apart, rules, over_gaps=True), mask((20, 40, 40), np.s_[6:10, 5:15, 5:15]))
    assert np.array_equal(cleaned(scene, {"min_volume_mm3": 26}, over_gaps=True), mask((20, 40, 40), low, high))  # of 25 voxels alone
    other = 2 * mask((20, 40, 40), np.s_[3:4, 20:35, 20:35])  # right below what is dropped
    assert np.array_equal(cleaned(scene + other, rules, over_gaps=True), mask((20, 40, 40), low, high) + other)


def test_with_a_focus_the_central_component_stays_though_a_larger_one_lies_at_the_rim():
    scene = mask((20, 40, 40), SMALL, RIM)
    focus = Box((0, 0, 0), (20, 40, 40))
    assert np.array_equal(cleaned(scene, {"largest_component": True}), mask((20, 40, 40), RIM))
    assert np.array_equal(cleaned(scene, {"largest_component": True}, focus=focus), mask((20, 40, 40), SMALL))


def test_away_from_every_component_the_one_with_most_mass_near_the_focus_stays():
    near, far = np.s_[8:10, 24:28, 18:22], np.s_[2:5, 2:10, 2:10]
    out = cleaned(mask((20, 40, 40), near, far), {"largest_component": True}, focus=Box((0, 0, 0), (20, 40, 40)))
    assert np.array_equal(out, mask((20, 40, 40), near))


def test_the_focus_may_reach_beyond_the_image():
    scene = mask((20, 40, 40), np.s_[0:2, 0:4, 0:4], np.s_[3:12, 10:24, 10:24])
    focus = Box((-10, -10, -10), (10, 10, 10))
    assert np.array_equal(cleaned(scene, {"largest_component": True}, focus=focus), mask((20, 40, 40), np.s_[0:2, 0:4, 0:4]))


def test_a_far_focus_still_keeps_one_component():
    scene = mask((20, 40, 40), SMALL, np.s_[15:17, 30:33, 30:33])
    out = cleaned(scene, {"largest_component": True}, focus=Box((0, 0, 0), (1, 1, 1)))
    assert components(out)[1].shape == (2,)


@pytest.mark.parametrize("focus", [None, Box((0, 0, 0), (14, 7, 9)), Box((-3, 1, 2), (9, 6, 8)), Box((30, 30, 30), (31, 31, 31))])
@pytest.mark.parametrize("least", [0, 3])
@pytest.mark.parametrize("largest", [False, True])
def test_labels_cleaned_in_pieces_are_as_those_cleaned_at_once(focus, least, largest, monkeypatch):
    rules = {"fill_holes": True, "min_volume_mm3": least, "largest_component": largest}
    rng = np.random.default_rng(0)
    scenes = [(rng.random((14, 7, 9)) < share) * rng.integers(1, 3, (14, 7, 9), np.uint8) for share in (0.2, 0.35, 0.6, 0.95)]
    for scene in (COMB, TWINS, SLANT, *scenes):
        monkeypatch.setattr(postprocess, "_PIECE", 1 << 18)
        wanted = cleaned(scene, rules, (1, 2), focus=focus)
        monkeypatch.setattr(postprocess, "_PIECE", 1)
        assert np.array_equal(cleaned(scene, rules, (1, 2), focus=focus), wanted)
        around = np.pad(scene, ((2, 9), (3, 3), (4, 1)))
        within = Box((2, 3, 4), (16, 10, 13))
        out = cleaned(around, rules, (1, 2), focus=focus and focus.shifted(within.start), within=within)
        assert np.array_equal(out[within.slices], wanted) and np.count_nonzero(out) == np.count_nonzero(wanted)


def test_a_box_in_a_large_scan_is_cleaned_alone():
    labels = np.zeros((64, 128, 128), np.uint8)
    labels[30:34, 60:66, 60:66] = 1
    within = Box((20, 50, 50), (40, 80, 80))
    tracemalloc.start()
    clean(labels, [1], {"fill_holes": True, "largest_component": True}, (1, 1, 1), within, within)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.count_nonzero(labels) == 4 * 6 * 6 and peak < labels.nbytes / 4


def test_small_components_go_by_their_volume_in_mm3():
    scene = mask((20, 40, 40), SMALL, LARGE)  # 32 and 108 voxels
    assert np.array_equal(cleaned(scene, {"min_volume_mm3": 32}), scene)
    assert np.array_equal(cleaned(scene, {"min_volume_mm3": 33}), mask((20, 40, 40), LARGE))
    assert np.array_equal(cleaned(scene, {"min_volume_mm3": 33}, spacing=(0.5, 2.0, 1.1)), scene)
    assert not cleaned(scene, {"min_volume_mm3": 109}).any()
    assert not cleaned(scene, {"min_volume_mm3": 109, "largest_component": True}).any()


def test_enclosed_holes_are_filled_and_open_ones_stay():
    scene = mask((9, 12, 12), np.s_[1:8, 1:11, 1:11])
    scene[3:5, 4:7, 4:7] = 0
    solid = mask((9, 12, 12), np.s_[1:8, 1:11, 1:11])
    assert np.array_equal(cleaned(scene, {"fill_holes": True}), solid)
    scene[:5, 5, 5] = 0
    assert np.array_equal(cleaned(scene, {"fill_holes": True}), scene)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_holes_of_a_picture_are_filled_in_its_plane(axis):
    ring = mask((10, 10), np.s_[1:9, 1:9])
    ring[3:6, 3:6] = 0
    filled = cleaned(np.expand_dims(ring, axis), {"fill_holes": True})
    assert np.array_equal(filled.squeeze(axis), mask((10, 10), np.s_[1:9, 1:9]))


def test_a_ring_in_one_slice_of_a_volume_stays_open():
    ring = mask((5, 10, 10), np.s_[2, 1:9, 1:9])
    ring[2, 3:6, 3:6] = 0
    assert np.array_equal(cleaned(ring, {"fill_holes": True}), ring)


def test_a_hole_that_another_label_fills_stays_that_labels():
    scene = mask((9, 12, 12), np.s_[1:8, 1:11, 1:11])
    scene[3:6, 4:7, 4:7] = 2
    scene[4, 5, 5] = 0
    want = scene.copy()
    want[4, 5, 5] = 1
    assert np.array_equal(cleaned(scene, {"fill_holes": True}, (1,)), want)


def test_other_labels_are_left_alone():
    scene = SCENE.astype(np.uint16)
    scene[15:17, 30:32, 30:32] = 300
    scene[12, 35, 35] = 300
    out = cleaned(scene, {"largest_component": True, "fill_holes": True, "min_volume_mm3": 5})
    assert np.array_equal(out == 300, scene == 300)
    assert np.array_equal(out == 1, mask((20, 40, 40), RIM) == 1)  # what was dropped is not filled again
    out = cleaned(scene, {"largest_component": True}, (1, 300))
    assert np.count_nonzero(out == 300) == 8 and np.array_equal(out == 1, mask((20, 40, 40), RIM) == 1)


def test_an_empty_map_stays_empty():
    assert not cleaned(np.zeros((4, 5, 6), np.uint8), {"largest_component": True, "fill_holes": True, "min_volume_mm3": 3}).any()


# ------------------------------------------------------------------------------------------------------ uncertain places


def doubt(shape, *peaks, spacing=(0.7, 0.9, 2.0), direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1)) -> Image:
    """Uncertainty 0.1 with boxes of some value, and a most uncertain voxel in each."""
    out = np.full(shape, 0.1, np.float32)
    for box, value, at, peak in peaks:
        out[box] = value
        out[at] = peak
    return Image(out, spacing, (-70.0, 35.5, 900.0), direction)


def test_the_worst_place_comes_first_and_is_its_most_uncertain_voxel():
    small, large = np.s_[2:4, 2:4, 2:4], np.s_[8:12, 10:15, 10:16]
    image = doubt((16, 20, 24), (small, 0.9, (3, 2, 3), 1.0), (large, 0.6, (10, 12, 11), 0.7))
    first, second = uncertain_places(image)
    voxel = 0.7 * 0.9 * 2 / 1000
    assert first["point"] == pytest.approx(image.index_to_point((11, 12, 10)))
    assert (first["peak"], first["volume_ml"]) == (pytest.approx(0.7), pytest.approx(120 * voxel))
    assert first["score"] == pytest.approx((119 * 0.6 + 0.7) * voxel, rel=1e-5)
    assert second["point"] == pytest.approx(image.index_to_point((3, 2, 3))) and second["peak"] == 1
    assert all(type(v) is float for p in (first, second) for k, v in p.items() if k != "point")


def test_places_below_the_threshold_are_none():
    image = doubt((6, 7, 8), (np.s_[1:3, 1:3, 1:3], 0.4, (1, 1, 1), 0.49))
    assert uncertain_places(image) == []
    assert uncertain_places(image.like(np.full(image.shape, np.nan, np.float32))) == []
    (at_it,) = uncertain_places(image, 0.49)
    assert at_it["volume_ml"] == pytest.approx(0.7 * 0.9 * 2 / 1000)
    assert uncertain_places(image, 0.4)[0]["volume_ml"] == pytest.approx(8 * 0.7 * 0.9 * 2 / 1000)


def test_the_number_of_places_is_limited_to_the_worst():
    array = np.zeros((3, 40, 40), np.float32)
    array[1, ::4, ::4] = np.linspace(0.6, 1, 100).reshape(10, 10)
    places = uncertain_places(Image(array), limit=7)
    assert [p["peak"] for p in places] == pytest.approx(np.sort(array.ravel())[::-1][:7])
    assert len(uncertain_places(Image(array))) == 50 and uncertain_places(Image(array), limit=0) == []


def test_equal_places_come_in_the_order_of_the_array_and_always_the_same():
    array = np.zeros((3, 12, 12), np.float32)
    array[1, 1::4, 1::4] = 1
    array[1, 1, 2] = 0.5  # of two equal voxels in a region the first one counts
    array[1, 1, 2] = 1
    image = Image(array)
    places = uncertain_places(image)
    index = [image.point_to_index(p["point"])[:2] for p in places]
    assert index[0] == (1, 1), "two voxels, so first; and the first of them"
    assert index[1:] == [(x, y) for y in (1, 5, 9) for x in (1, 5, 9)][1:]
    assert places == uncertain_places(image)


def test_voxels_that_touch_at_a_corner_are_one_place():
    array = np.zeros((4, 4, 4), np.float32)
    array[0, 0, 0] = array[1, 1, 1] = 0.8
    (place,) = uncertain_places(Image(array))
    assert place["volume_ml"] == pytest.approx(0.002)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::7])
def test_places_lie_where_the_image_lies(order, signs):
    columns = np.eye(3)[:, list(order)] * signs
    array = np.zeros((5, 6, 7), np.float32)
    array[1, 2, 3] = 0.9
    image = Image(array[:, :, ::-1], (0.7, 0.9, 1.5), (3, 4, 5), tuple(columns.ravel()))
    (place,) = uncertain_places(image)
    assert image.point_to_index(place["point"]) == pytest.approx((3, 2, 1))


# ---------------------------------------------------------------------------------------------------------------- pieces


def test_measuring_in_pieces_gives_the_same_and_may_leave_large_ones_without_diameters():
    labels = ellipsoid((17, 8, 11), (0.7, 0.7, 1.25), 30)
    image = labels.like(np.random.default_rng(0).normal(1000, 1, labels.shape))
    steps = measure_steps(labels, [THING], image, largest=labels.array.size)
    pieces = 0
    try:
        while True:
            next(steps)
            pieces += 1
    except StopIteration as end:
        assert end.value == measure(labels, [THING], image)
    assert pieces >= 15  # at least one for each section

    steps = measure_steps(labels, [THING], image, largest=1000)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        (small,) = end.value
    full = one(labels, image)
    assert small["longest_mm"] is None and small["perpendicular_points"] is None
    assert all(small[k] == full[k] for k in ("voxels", "volume_ml", "center", "mean_hu", "std_hu", "min_hu", "max_hu"))


def test_intensities_of_many_voxels_are_exact():
    """More than one slab, and a small deviation from a large mean."""
    values = (30000 + np.random.default_rng(0).normal(0, 0.5, (6, 700, 700))).astype(np.float32)
    labels = np.ones(values.shape, np.uint8)
    labels[:, :5] = 0
    out = one(Image(labels), Image(values))
    inside = values[:, 5:].astype(np.float64)
    assert out["mean_hu"] == pytest.approx(inside.mean(), rel=1e-12)
    assert out["std_hu"] == pytest.approx(inside.std(), rel=1e-9)
    assert (out["min_hu"], out["max_hu"]) == (inside.min(), inside.max())


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("order, signs", [ORIENTATIONS[0], ORIENTATIONS[13], ORIENTATIONS[-1]])
def test_the_worst_place_is_in_the_axial_slice_with_most_wrong_voxels(order, signs):
    truth = np.zeros((9, 10, 11), np.uint8)
    truth[2:7, 2:7, 2:7] = 1
    found = truth.copy()
    found[3, 2, 2] = 0  # one voxel here, six there, of another label too
    found[5, 7, 4:7], found[5, 6, 4:7] = 2, 2
    images = [Image(a, (0.7, 0.8, 2.5), (10.0, -20.0, 30.0)) for a in (truth, found)]
    wanted = images[0].index_to_point((5, 6.5, 5))
    turned = [to_orientation(image, order, signs) for image in images]
    assert worst_place(turned[0], [turned[0], turned[1]]) == pytest.approx(wanted)
    assert worst_place(turned[0], [turned[0]]) == pytest.approx(images[0].index_to_point((4, 4, 2)))
    assert worst_place(turned[0].like(0 * turned[0].array), []) is None


def to_orientation(image: Image, order, signs) -> Image:
    """The same voxels in the same places, stored along other axes: order and signs of (x, y, z)."""
    import SimpleITK as sitk
    from UNetSegmentationLib.image import from_sitk, to_sitk

    axes = sitk.PermuteAxes(to_sitk(image), list(order))
    return from_sitk(sitk.Flip(axes, [s < 0 for s in signs]))


def test_every_section_that_may_be_the_widest_is_looked_at_and_no_other_one_taken():
    labels = mask((2, 12, 12), np.s_[1, 0, :8])
    labels[0, range(6), range(6)] = 1
    assert one(Image(labels))["longest_mm"] == pytest.approx(8)  # and not the slanted one's 7.8
    labels, (y, x) = mask((2, 60, 110)), np.indices((60, 110))
    labels[0] = np.hypot((x - 49.5) / 49.6, (y - 30) / 20) <= 1
    labels[1, np.arange(100) // 20 + 30, range(100)] = 1
    out = one(Image(labels))  # 100.08 against 100.02 mm
    assert out["perpendicular_mm"] < 8 and all(p[2] == 1 for p in out["longest_points"] + out["perpendicular_points"])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("near, far", [(3, 8), (7, 2)])
def test_of_two_the_one_nearer_to_the_middle_of_the_focus_stays(axis, near, far):
    one, other = (mask((11, 11, 11), tuple(at if a == axis else 5 for a in range(3))) for at in (near, far))
    assert np.array_equal(cleaned(one + other, {"largest_component": True}, focus=Box((0, 0, 0), (11, 11, 11))), one)
