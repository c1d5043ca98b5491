"""The invariants of the one path: geometry, tiling, ROI, test-time augmentation, ensembles, uncertainty, cancel."""

import itertools
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from UNetSegmentationLib.image import Box, Image, UserError, from_sitk, read_image, reorient_for, resample, to_sitk
from UNetSegmentationLib.inference.augment import View, views
from UNetSegmentationLib.inference.predict import (
    Cancelled,
    Options,
    _Stream,
    activate,
    entropy,
    foreseen,
    predict,
    spacing_for,
    without_surround,
)
from UNetSegmentationLib.inference.tiling import compute_box, tile
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import Card, find_model

RNG = np.random.default_rng(5)


class FakeEngine:
    """A network given as a Python function of the batch; counts what it is asked for."""

    def __init__(self, function):
        self.function, self.shapes = function, []

    def run(self, batch):
        self.shapes.append(batch.shape)
        return np.ascontiguousarray(self.function(batch), np.float32)

    def describe(self):
        return "fake"


def logit(p):
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))


def box_mean(batch):
    """A 3x3(x3) mean with zero padding: a symmetric network whose receptive field reaches one voxel."""
    x = batch[:, :1]
    for axis in range(2, x.ndim):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (1, 1)
        p = np.pad(x, pad)
        n = x.shape[axis]
        x = sum(np.take(p, range(k, k + n), axis) for k in range(3)) / 3
    return logit(0.2 + 0.6 * x)


def noise(shape):
    return RNG.uniform(0.05, 0.95, shape).astype(np.float32)


def nodule_phantom(rows=60, columns=54):
    """A chest-like CT: body, lung, a slanted vessel and an ellipsoid nodule, 0.8 x 0.7 x 2.0 mm."""
    z, y, x = np.indices((14, rows, columns), dtype=np.float32)
    hu = np.full(z.shape, -850, np.float32)
    hu[(y > rows - 10) | (x < 5)] = 40
    hu[(np.abs(y - 12 - 0.3 * x) < 2) & (np.abs(z - 4) < 1)] = 20
    hu[((z - 7) / 3) ** 2 + ((y - 32) / 8) ** 2 + ((x - 29) / 7) ** 2 < 1] = 30
    grain = sitk.GetImageFromArray(np.random.default_rng(1).normal(0, 80, hu.shape).astype(np.float32))
    hu = sitk.GetArrayFromImage(sitk.DiscreteGaussian(sitk.GetImageFromArray(hu) + grain, [1.5, 1.5, 0.5]))
    return Image(hu.astype(np.int16), (0.8, 0.7, 2.0), (-120.0, 30.0, -400.0))


def turned(image, order, signs):
    """The same patient stored with other axis orders and signs."""
    # Array axis k of the result is axis order[k] of the original, reversed where signs[k] is -1.
    array = image.array.transpose(order)[tuple(slice(None, None, s) for s in signs)]
    d = np.reshape(image.direction, (3, 3))
    columns, spacing, corner = [None] * 3, [0.0] * 3, [0] * 3
    for k in range(3):
        old, new = 2 - order[k], 2 - k
        columns[new] = signs[k] * d[:, old]
        spacing[new] = image.spacing[old]
        if signs[k] < 0:
            corner[old] = image.shape[order[k]] - 1
    direction = tuple(np.stack(columns, 1).ravel())
    return Image(np.ascontiguousarray(array), tuple(spacing), image.index_to_point(corner), direction)


def in_place_of(mask, image):
    """A mask sampled on another image's grid, by nearest neighbour in physical space."""
    return sitk.GetArrayFromImage(sitk.Resample(to_sitk(mask), to_sitk(image), sitk.Transform(), sitk.sitkNearestNeighbor))


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("name", ["lung-nodule-2d", "hippocampus-3d"])
def test_same_mask_in_all_48_orientations(name, request):
    if name == "lung-nodule-2d":
        image = nodule_phantom()
    else:
        image = read_image(request.getfixturevalue("data") / "msd_hippocampus" / "images" / "hippocampus_003.nii.gz")
        image = image.crop(Box((4, 4, 4), (32, 44, 30)))
    model = find_model(name)
    base = predict(image, [model], Options(tta="none"))
    assert np.count_nonzero(base.labels.array) > 200
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            other = turned(image, order, signs)
            got = predict(other, [model], Options(tta="none"))
            assert got.labels.same_grid(other)
            differ = np.count_nonzero(in_place_of(got.labels, image) != base.labels.array)
            assert differ <= 0.001 * image.array.size, (order, signs, differ)


def test_oblique_header_and_oblique_resampling_keep_the_mask_in_place():
    image, model = nodule_phantom(90, 84), find_model("lung-nodule-2d")
    base = predict(image, [model])
    turn = sitk.Euler3DTransform()
    turn.SetRotation(0.1, -0.07, 0.15)
    direction = tuple(np.reshape(turn.GetMatrix(), (3, 3)).ravel())
    tilted = replace(image, direction=direction)
    assert np.array_equal(predict(tilted, [model]).labels.array, base.labels.array)

    grid = sitk.Image(110, 110, 15, sitk.sitkInt16)
    grid.SetSpacing((0.7, 0.7, 2.0))
    grid.SetDirection(tuple(np.reshape(sitk.VersorTransform((0, 0, 1), 0.12).GetMatrix(), (3, 3)).ravel()))
    middle = image.index_to_point((36.0, 40.0, 7.0))
    half = np.array(grid.TransformContinuousIndexToPhysicalPoint((54.5, 54.5, 7.0)))
    grid.SetOrigin(tuple(np.array(middle) - half))
    resampled = from_sitk(sitk.Resample(to_sitk(image), grid, sitk.Transform(), sitk.sitkLinear, -850))
    back = in_place_of(predict(resampled, [model], Options(at=middle)).labels, image)
    here = predict(image, [model], Options(at=middle)).labels.array
    assert np.count_nonzero(back != here) <= 0.001 * image.array.size
    assert dice(back, here) > 0.94


def test_slices_along_each_axis(make_package):
    """A model that marks one row of a slice marks the plane that the card's axis says."""

    def first_rows(batch):
        out = np.full((len(batch), 2, *batch.shape[2:]), 0, np.float32)
        out[:, 1] = -9
        out[:, 1, 2] = 9
        return out

    image = Image(noise((10, 12, 14)))
    cases = (("axial", [12, 14], np.s_[:, 2, :]), ("coronal", [10, 14], np.s_[2, :, :]), ("sagittal", [10, 12], np.s_[2, :, :]))
    for axis, patch, index in cases:
        model = make_package(dimensions=2, axis=axis, patch=patch, divisor=[1, 1])
        got = predict(image, [model], Options(overlap=0), engines=[FakeEngine(first_rows)]).labels.array
        want = np.zeros_like(got)
        want[index] = 1
        assert np.array_equal(got, want), axis


def test_context_slices_are_neighbours_and_repeat_at_the_ends(make_package):
    z = np.broadcast_to(np.linspace(0.1, 0.9, 9, dtype=np.float32)[:, None, None], (9, 8, 8))
    seen = []

    def record(batch):
        seen.extend(batch[:, :, 0, 0].tolist())
        return logit(batch[:, 1:2])

    model = make_package(kind="identity", dimensions=2, context_slices=1, patch=[8, 8], divisor=[8, 8], activation="sigmoid")
    predict(Image(np.ascontiguousarray(z)), [model], engines=[FakeEngine(record)])
    values = z[:, 0, 0]
    want = [[values[max(i - 1, 0)], values[i], values[min(i + 1, 8)]] for i in range(9)]
    np.testing.assert_allclose(seen, want, atol=1e-6)


def test_two_dimensional_picture(make_package):
    model = make_package(dimensions=2, patch=[32, 32], divisor=[8, 8])
    picture = Image(noise((1, 45, 70)))
    got = predict(picture, [model]).labels.array
    assert np.array_equal(got, (picture.array > 0.5).astype(np.uint8))
    # Stored so that the slice is a coronal one, of which an axial model would see single rows.
    for across in (Image(picture.array[0][:, None]), Image(picture.array, direction=(1, 0, 0, 0, 0, 1, 0, -1, 0))):
        with pytest.raises(UserError, match="only one row or column of voxels in the axial slices that toy segments"):
            predict(across, [model])


def test_a_picture_without_a_pixel_size_is_not_seen_by_a_model_of_micrometres(make_package):
    picture = Image(noise((1, 45, 70)))
    made = {"dimensions": 2, "patch": [32, 32], "divisor": [8, 8]}
    model = make_package(**made, spacing=[0.0025, 0.0025, None])
    with pytest.raises(UserError, match=r"has no pixel size, which toy needs, as its own pixels are 0.0025 mm; save the picture as TIFF"):
        predict(picture, [model])
    assert predict(replace(picture, spacing=(0.0025, 0.0025, 1.0)), [model]).labels.array.any()
    for spacing in (None, 0.5, 2.3):  # of pictures without one, also made coarser, and of slices that somebody saved as PNG
        assert predict(picture, [make_package(**made, spacing=[spacing, spacing, None])]).labels.array.any()


# -------------------------------------------------------------------------------------------------------------- tiling


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    "card",
    [
        {"dimensions": 3, "patch": [8, 16, 12], "divisor": [4, 8, 4]},
        {"dimensions": 3, "patch": [64, 64, 64], "divisor": [8, 8, 8]},
        {"dimensions": 2, "patch": [16, 16], "divisor": [8, 8], "context_slices": 2},
        {"dimensions": 2, "patch": [16, 8], "divisor": [4, 4], "axis": "sagittal"},
    ],
)
def test_identity_network_returns_the_input(make_package, card, overlap):
    image = Image(noise((21, 37, 30)))
    model = make_package(kind="identity", activation="sigmoid", **card)
    got = predict(image, [model], Options(overlap=overlap, probabilities=True))
    np.testing.assert_allclose(got.probabilities.array[0], image.array, atol=1e-5)


def test_patch_of_the_whole_image_is_the_network_itself_and_smaller_patches_agree(make_package):
    image = Image(noise((24, 32, 40)))
    model = make_package(kind="identity", activation="sigmoid", patch=[24, 32, 40], divisor=[8, 8, 8])
    direct = activate(box_mean(image.array[None, None]), "sigmoid")[0]
    options = Options(probabilities=True)
    whole = predict(image, [model], options, engines=[FakeEngine(box_mean)])
    assert whole.tiles == 1
    np.testing.assert_allclose(whole.probabilities.array, direct, atol=1e-6)
    small = make_package(kind="identity", activation="sigmoid", patch=[16, 16, 16], divisor=[8, 8, 8])
    parts = predict(image, [small], options, engines=[FakeEngine(box_mean)])
    assert parts.tiles > 1
    np.testing.assert_allclose(parts.probabilities.array, direct, atol=1e-5)


@pytest.mark.parametrize("margin, seen", [(8, True), (14, True), (16, False)])
@pytest.mark.parametrize("mirrored", [True, False])
def test_near_the_end_of_the_image_what_either_way_finds_is_found(make_package, margin, seen, mirrored):
    n = 8 + 2 * margin
    array = np.zeros((2, n, n), np.float32)
    array[:, margin : margin + 8, margin : margin + 8] = np.where(np.arange(8) < 4, 1.0, 0.5)

    def halves(batch):  # one half always, the other where the whole image is, or is not, in the mirror
        whole = (batch > 0.75).sum((1, 2, 3), keepdims=True) > 40
        p = np.where((batch > 0.75) | ((batch > 0.25) & (whole == mirrored)), 0.9, 0.1)
        return logit(np.concatenate([1 - p, p], 1))

    card = dict(dimensions=2, patch=[72, 72], spacing=[None] * 3, padding="reflect", roi_mm=20)
    got = predict(Image(array), [make_package(**card)], engines=[FakeEngine(halves)]).labels.array
    assert np.array_equal(got, array > 0.25 if seen or mirrored else array > 0.75)


@pytest.mark.parametrize("slices", [1, 3])
def test_acquired_slices_are_seen_as_they_were_taken(make_package, slices):
    def rows_only(batch):  # sees which way a slice lies
        out = np.zeros((len(batch), 1, *batch.shape[2:]), np.float32)
        out[:, 0, :5] = batch[:, 0, :5]
        return out

    values = noise((slices, 20, 26))
    model = make_package(kind="identity", activation="sigmoid", dimensions=2, axis="acquired", patch=[32, 32], divisor=[8, 8])
    short_axis = (0.66, 0.35, 0.6646, 0.75, -0.31, -0.5843, 0.0, -0.88, 0.4671)
    got = [
        predict(Image(values, (1.4, 1.4, 10.0), (0, 0, 0), direction), [model], engines=[FakeEngine(rows_only)])
        for direction in ((1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, -1, 0), _orthogonal(short_axis))
    ]
    assert got[0].labels.array.any() and all(p.tiles == slices and np.array_equal(p.labels.array, got[0].labels.array) for p in got)
    # As tools that turn the axes to the body's store them.
    for direction in ((1, 0, 0, 0, 0, 1, 0, -1, 0), (0, 0, 1, 1, 0, 0, 0, -1, 0), _orthogonal(short_axis)):
        for axes in ("LPS", "RAS", "SAR"):
            taken = Image(values, (1.4, 1.4, 10.0 if axes == "RAS" else 2.0), (0, 0, 0), direction)
            stored = from_sitk(sitk.DICOMOrient(to_sitk(taken), axes))
            shown = reorient_for(stored, True)[0].array
            assert np.array_equal(shown, values) or np.array_equal(shown, values[::-1])
            assert predict(stored, [model], engines=[FakeEngine(rows_only)]).labels.array.sum() == got[0].labels.array.sum()
    other = make_package(kind="identity", activation="sigmoid", dimensions=2, axis="axial", patch=[32, 32], divisor=[8, 8])
    with pytest.raises(UserError, match="do not look at the same slices"):
        predict(Image(values), [model, other])


def _orthogonal(direction):
    u, _, v = np.linalg.svd(np.reshape(direction, (3, 3)))
    return tuple((u @ v).ravel().tolist())


def test_bands_of_any_depth_give_the_same(make_package, monkeypatch):
    image = Image(noise((30, 22, 26)), (0.9, 0.8, 1.7))
    model = make_package(kind="identity", activation="sigmoid", spacing=[1.1, 1.0, 1.2], patch=[8, 16, 16])
    options = Options(probabilities=True, uncertainty=True)
    once = predict(image, [model], options)
    monkeypatch.setattr("UNetSegmentationLib.inference.predict._BAND_BYTES", 1)
    plane_by_plane = predict(image, [model], options)
    np.testing.assert_allclose(plane_by_plane.probabilities.array, once.probabilities.array, atol=1e-6)
    np.testing.assert_allclose(plane_by_plane.uncertainty.array, once.uncertainty.array, atol=1e-5)


def test_what_bands_share_is_copied_only_where_it_grows(make_package, monkeypatch):
    held, take = [], _Stream.take
    monkeypatch.setattr(_Stream, "take", lambda self, band: (take(self, band), held.append(self.sums))[0])
    monkeypatch.setattr("UNetSegmentationLib.inference.predict._BAND_BYTES", 1)
    predict(Image(noise((30, 16, 16))), [make_package(spacing=[1, 1, 1], patch=[16, 16, 16])], Options())
    assert len(held) == 30 and sum(not np.shares_memory(a, b) for a, b in itertools.pairwise(held)) <= 3
    assert held[-1].shape[1] == 1


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 64, 65, 100])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_tiles_cover_everything_on_the_divisors_grid(size, overlap):
    tiling = tile(Box((8, 0, 0), (8 + size, 5, 5)), (32, 8, 8), (8, 8, 8), overlap)
    starts, n = tiling.starts[0], tiling.shape[0]
    assert all(s % 8 == 0 for s in starts) and n == 32
    assert starts[0] == 8 if size > 32 else len(starts) == 1 and abs(starts[0] + 16 - (8 + size / 2)) <= 8
    assert starts[0] <= 8 and starts[-1] + n >= 8 + size
    assert all(b - a <= max(8, math.ceil(n * (1 - overlap))) for a, b in zip(starts, starts[1:]))


def test_compute_box_has_a_margin_inside_the_lattice():
    box = compute_box(Box((10, 20, 3), (20, 30, 9)), (64, 64, 10), (32, 32, 8), (16, 16, 8))
    assert box == Box((0, 0, 0), (28, 38, 10))


# ----------------------------------------------------------------------------------------------------------------- ROI


def test_roi_gives_what_the_whole_image_gives(make_package):
    image = Image(noise((26, 60, 58)), (0.8, 0.9, 1.5))
    model = make_package(kind="identity", activation="sigmoid", spacing=[1.0, 1.0, 1.5], patch=[16, 16, 16], divisor=[8, 8, 8])
    roi = Box((9, 20, 17), (17, 41, 40))
    options = Options(probabilities=True)
    whole = predict(image, [model], options, engines=[FakeEngine(box_mean)])
    part = predict(image, [model], replace(options, roi=roi), engines=[FakeEngine(box_mean)])
    inside = (slice(None), *roi.slices)
    np.testing.assert_allclose(part.probabilities.array[inside], whole.probabilities.array[inside], atol=1e-5)
    outside = part.probabilities.array.copy()
    outside[inside] = 0
    assert not outside.any() and not np.delete(part.labels.array, range(9, 17), 0).any()
    assert part.roi == roi and part.tiles < whole.tiles


def test_of_a_large_image_only_the_roi_is_cleaned(make_package):
    image, roi = Image(np.zeros((64, 128, 128), np.int16)), Box((20, 50, 50), (28, 66, 66))
    image.array[22:26, 54:60, 54:60] = 1
    model = make_package(kind="identity", activation="sigmoid", spacing=[1, 1, 1], patch=[8, 16, 16], postprocess={"fill_holes": True})
    tracemalloc.start()
    part = predict(image, [model], Options(roi=roi), engines=[FakeEngine(lambda batch: batch[:, :1] - 0.5)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(part.labels.array, image.array) and peak < 1.5 * part.labels.array.nbytes


def test_real_model_in_a_roi_agrees_with_the_whole_slice_inside_its_valid_zone():
    image, model = nodule_phantom(), find_model("lung-nodule-2d")
    whole = predict(image, [model], Options(probabilities=True, postprocess=False))
    roi = Box((3, 20, 14), (12, 48, 46))
    part = predict(image, [model], Options(roi=roi, probabilities=True, postprocess=False))
    inside = (slice(None), *roi.slices)
    np.testing.assert_allclose(part.probabilities.array[inside], whole.probabilities.array[inside], atol=0.02)


def test_statistics_come_from_the_whole_image(make_package):
    image = Image((noise((16, 16, 16)) * 1000).astype(np.float32))
    model = make_package(intensity={"mode": "percentile", "low": 0, "high": 100})
    roi = Box((4, 4, 4), (8, 8, 8))
    assert np.array_equal(
        predict(image, [model], Options(roi=roi)).labels.array[roi.slices], predict(image, [model]).labels.array[roi.slices]
    )


def test_air_is_not_computed(make_package):
    hu = np.full((16, 64, 64), -1000, np.int16)
    hu[:, :16, :16] = 100
    model = make_package(intensity={"mode": "window", "level": -300, "width": 1400}, patch=[16, 16, 16], divisor=[8, 8, 8])
    engine = FakeEngine(lambda b: np.concatenate([np.zeros_like(b), 50 * (b - 0.5)], 1))
    got = predict(Image(hu), [model], Options(overlap=0, batch=1), engines=[engine])
    assert len(engine.shapes) == 1 and got.tiles == 16
    assert np.array_equal(got.labels.array > 0, hu > 0)


def test_point_keeps_the_component_next_to_it(make_package):
    hu = np.full((20, 60, 60), -800, np.int16)
    hu[8:12, 10:20, 10:20] = 50
    hu[4:16, 30:55, 30:55] = 50
    model = make_package(intensity={"mode": "window", "level": -300, "width": 1400}, roi_mm=50, postprocess={"largest_component": True})
    got = predict(Image(hu), [model], Options(at=(14.0, 14.0, 9.0))).labels.array
    assert got[9, 14, 14] == 1 and not got[:, 30:, 30:].any()
    asked = (
        (1, Options(), 0),
        (2, Options(), 1),
        (2, Options(at=(28.0, 28.0, 18.0)), 0),
        (2, Options(roi=Box((0, 0, 0), (20, 30, 30))), 0),
    )
    for mm, options, said in asked:  # 60 mm is what is left of a scan that was cropped around a target
        notes = predict(Image(hu, (mm, mm, mm)), [model], options).warnings
        assert len(notes) == said and all("made for a box around one target, not for a whole scan" in note for note in notes)


# ----------------------------------------------------------------------------------------- test-time augmentation etc.


def test_flips_of_a_symmetric_network_change_nothing(make_package):
    image = Image(noise((18, 30, 26)))
    model = make_package(kind="identity", activation="sigmoid", flip_axes=["x", "y", "z"], patch=[16, 16, 16])
    plain = predict(image, [model], Options(probabilities=True), engines=[FakeEngine(box_mean)])
    engine = FakeEngine(box_mean)
    flipped = predict(image, [model], Options(probabilities=True, tta="flips", uncertainty=True), engines=[engine])
    assert flipped.tiles == 8 * plain.tiles
    np.testing.assert_allclose(flipped.probabilities.array, plain.probabilities.array, atol=1e-6)
    assert flipped.mutual_information.array.max() < 1e-5


def test_rotations_of_a_pointwise_network_change_a_smooth_image_little(make_package):
    z, y, x = np.indices((4, 48, 48), dtype=np.float32)
    image = Image((0.5 + 0.3 * np.sin(x / 9) * np.cos(y / 8)).astype(np.float32))
    model = make_package(kind="identity", activation="sigmoid", dimensions=2, patch=[48, 48], divisor=[8, 8], flip_axes=["x", "y"])
    plain = predict(image, [model], Options(probabilities=True)).probabilities.array
    for tta, n in (("rotations", 3), ("full", 12)):
        got = predict(image, [model], Options(probabilities=True, tta=tta))
        assert got.tiles == 4 * n
        np.testing.assert_allclose(got.probabilities.array, plain, atol=6e-3)


@pytest.mark.parametrize("aspect", [1.0, 1.6])
def test_a_rotated_view_comes_back_to_its_place(aspect):
    y, x = np.indices((40, 50), dtype=np.float32)
    blob = np.exp(-(((y - 16) * aspect / 9) ** 2) - ((x - 28) / 9) ** 2)[None, None].astype(np.float32)
    view = View((-1,), 10.0, aspect)
    turned_blob = view.forward(blob)
    assert np.abs(turned_blob - blob).max() > 0.3
    back, weight = view.backward(turned_blob)
    np.testing.assert_allclose(back * weight, blob * weight, atol=0.03)
    assert 0.7 < weight.mean() < 1


def test_views_follow_the_card():
    assert len(views("none", [-1, -2], 1)) == 1 and len(views("flips", [-1], 1)) == 2
    assert len(views("full", [-1, -2, -3], 1)) == 24
    with pytest.raises(UserError, match="test-time augmentation"):
        views("mirror", [], 1)


def test_ensemble_is_the_mean_of_the_probabilities_and_disagreement_shows(make_package):
    image = Image(noise((12, 20, 20)))
    first = make_package(kind="identity", activation="sigmoid")
    second = make_package(kind="identity", activation="sigmoid", dimensions=2, axis="sagittal", patch=[16, 16], divisor=[8, 8])
    up, down = FakeEngine(lambda b: np.full_like(b[:, :1], 2.0)), FakeEngine(lambda b: np.full_like(b[:, :1], -2.0))
    got = predict(image, [first, second], Options(probabilities=True, uncertainty=True), engines=[up, down])
    np.testing.assert_allclose(got.probabilities.array, 0.5, atol=1e-6)
    np.testing.assert_allclose(got.uncertainty.array, 1.0, atol=1e-5)
    p = activate(np.full((1, 1, 1), 2.0), "sigmoid")
    np.testing.assert_allclose(got.mutual_information.array, 1 - entropy(p, "sigmoid")[0, 0], atol=1e-4)
    assert got.model_name == "toy-1.0.0+toy-1.0.0"


def test_uncertainty_is_entropy(make_package):
    image = Image(np.full((8, 8, 8), 0.5, np.float32))
    model = make_package()
    got = predict(image, [model], Options(uncertainty=True))
    np.testing.assert_allclose(got.uncertainty.array, 1.0, atol=1e-5)
    assert got.mutual_information is None
    sure = predict(Image(np.full((8, 8, 8), 0.9, np.float32)), [model], Options(uncertainty=True))
    assert sure.uncertainty.array.max() < 1e-3


def test_entropy_of_many_classes_is_normalised():
    p = np.array([[0.25, 1, 0.5], [0.25, 0, 0.5], [0.25, 0, 0], [0.25, 0, 0]], np.float32)[None]
    np.testing.assert_allclose(entropy(p, "softmax")[0], [1, 0, 0.5], atol=1e-6)


def test_probabilities_of_many_labels_are_held_once():
    logits = RNG.normal(0, 3, (2, 64, 16, 16, 16)).astype(np.float32)
    before = logits.copy()
    tracemalloc.start()
    p = activate(logits, "softmax")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * logits.nbytes and np.array_equal(logits, before)
    e = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(p, e / e.sum(1, keepdims=True), atol=1e-6)


def test_label_values_and_sigmoid_threshold(make_package):
    labels = [{"value": 7, "name": "a"}, {"value": 300, "name": "b"}]
    model = make_package(kind="identity", activation="sigmoid", labels=labels)

    def two(batch):
        return np.concatenate([logit(batch), logit(1 - batch * 0.9 - 0.2)], 1)

    values = np.array([0.1, 0.35, 0.6, 0.9], np.float32)
    image = Image(np.broadcast_to(values, (8, 8, 4)).copy())
    got = predict(image, [model], engines=[FakeEngine(two)]).labels.array
    assert got.dtype == np.uint16
    assert got[0, 0].tolist() == [300, 0, 7, 7]


# ------------------------------------------------------------------------------------------------- progress and cancel


def test_progress_rises_to_one_and_cancel_stops_between_batches(make_package):
    image = Image(noise((32, 32, 32)))
    model = make_package()
    seen = []
    predict(image, [model], progress=lambda f, _: seen.append(f))
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) > 5
    engine = FakeEngine(lambda b: np.concatenate([b, b], 1))
    with pytest.raises(Cancelled):
        predict(image, [model], Options(batch=1), cancelled=lambda: len(engine.shapes) >= 3, engines=[engine])
    assert len(engine.shapes) == 3


def test_the_input_is_left_alone(make_package):
    array = (noise((16, 16, 16)) * 100).astype(np.int16)
    before = array.copy()
    array.setflags(write=False)
    predict(Image(array), [make_package(intensity={"mode": "zscore"})], Options(tta="full", uncertainty=True))
    assert np.array_equal(array, before)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("image", "options", "sentence"),
    [
        (Image(np.zeros((3, 8, 8, 8), np.float32)), Options(), "3 channels"),
        (Image(np.full((8, 8, 8), np.nan, np.float32)), Options(), "512 voxels that are NaN"),
        (Image(np.zeros((1, 8, 8), np.float32)), Options(), "only 1 slice"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(roi=Box((9, 0, 0), (12, 8, 8))), "outside the image"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(roi=Box((2, 2, 2), (2, 8, 8))), "ROI is empty"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(at=(99.0, 0.0, 0.0)), "point lies outside"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(at=(1.0, math.nan, 1.0)), "three numbers in mm"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(roi=Box((0, 0), (8, 8))), "ROI is empty"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(at=(1.0, 1.0, 1.0), roi=Box((9, 0, 0), (12, 8, 8))), "ROI lies outside the image"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(at=(6.6, 1.0, 1.0), roi=Box((0, 0, 0), (8, 8, 7))), "point lies outside the ROI"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(overlap=1.0), "overlap"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(batch=0), "batch must be 1 or more"),
        (Image(np.zeros((8, 8, 8), np.float32)), Options(intensity={"mode": "window", "level": 40}), "intensity lacks width"),
        (Image(np.zeros((8, 8, 8), np.float32), (0.0, 1.0, 1.0)), Options(), "cannot be right"),
    ],
)
def test_bad_input_is_one_sentence(make_package, image, options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        predict(image, [make_package()], options)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_network_that_gives_no_numbers_marks_nothing_and_says_so(make_package, activation):
    model = make_package(activation=activation)

    def overflow(batch):
        return np.full((len(batch), model.card.outputs, *batch.shape[2:]), np.nan, np.float32)

    with pytest.raises(UserError, match="values that are no numbers"):
        predict(Image(noise((16, 16, 16))), [model], engines=[FakeEngine(overflow)])


def test_an_ensemble_warns_for_each_of_its_models(make_package):
    image = Image(noise((16, 16, 16)))
    plain, ct = make_package(), make_package(intensity={"mode": "window", "level": -300, "width": 1400})
    assert predict(image, [plain]).warnings == ()
    (note,) = predict(image, [plain, ct, ct]).warnings
    assert "do not look like HU" in note
    (note,) = predict(image, [plain], Options(intensity=ct.card.intensity)).warnings
    assert "do not look like HU" in note and predict(image, [ct], Options(intensity={"mode": "none"})).warnings == ()


def test_models_that_do_not_belong_together_are_refused(make_package):
    image = Image(noise((16, 16, 16)))
    other = make_package(labels=[{"value": 1, "name": "another"}])
    with pytest.raises(UserError, match="same labels"):
        predict(image, [make_package(), other])
    with pytest.raises(UserError, match="click model"):
        predict(image, [make_package(task="click")])
    two, same, turned_round = (make_package(channels=names) for names in (["T1", "FLAIR"], ["t1", "Flair"], ["FLAIR", "T1"]))
    image = Image(noise((2, 16, 16, 16)))
    assert predict(image, [two, same]).labels.array.any()
    with pytest.raises(UserError, match="toy takes T1, FLAIR and toy FLAIR, T1; .* in one order"):
        predict(image, [two, turned_round])


def test_an_output_of_another_size_is_refused(make_package):
    with pytest.raises(UserError, match="not what its card says"):
        predict(Image(noise((16, 16, 16))), [make_package()], engines=[FakeEngine(lambda b: b[:, :, :-1])])


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_what_lies_beyond_an_image_is_as_the_card_says(make_package, padding):
    seen, array = [], noise((1, 10, 12))
    engine = FakeEngine(lambda b: seen.append(b.copy()) or np.concatenate([0 * b, b], 1))
    predict(Image(array), [make_package(dimensions=2, patch=[16, 16], spacing=[None] * 3, padding=padding)], engines=[engine])
    wanted = np.pad(array[0], ((0, 6), (0, 4)), mode="reflect" if padding == "reflect" else "constant")
    assert np.allclose(seen[0][0, 0], wanted)


@pytest.mark.parametrize(
    ("pixels", "placed", "wanted"),
    [
        (64, {"spacing": (0.7, 0.65, 8.0)}, 1.3),
        (64, {"origin": (0.5, 0.0, 0.0)}, 1.3),  # of 1 mm, in a place
        (24, {"spacing": (0.7, 0.65, 8.0)}, 1.3),
        (64, {}, 2.0),  # a picture
        (64, {"spacing": (1.0, 1.0, 8.0)}, 2.0),  # DICOM without a pixel size knows how thick its slice is
        (64, {"origin": (3.0, 8.0, 0.0)}, 2.0),  # what is not black of one
        (32, {}, 1.0),
        (28, {}, 0.875),
        (26, {}, None),  # a crop of one
    ],
)
def test_pixels_are_made_as_large_as_in_training(make_package, pixels, placed, wanted):
    card = make_package(dimensions=2, patch=[32, 32], spacing=[None] * 3, pixel_mm=1.3, field_px=32).card
    image = Image(noise((2, pixels // 2, pixels)), **placed)
    assert spacing_for(card, image) == (wanted, wanted, None)
    assert spacing_for(Card({**card.data, "spacing": [0.9, 0.9, 2.0]}), image) == (0.9, 0.9, 2.0)
    assert spacing_for(make_package(dimensions=2, patch=[32, 32], spacing=[None] * 3).card, image) == (None, None, None)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.65, 0.65, 8.0)])
def test_slices_of_another_matrix_are_seen_with_the_pixels_of_the_training(make_package, spacing):
    """left-ventricle-2d had found 0.39 (Dice) of 128 x 128 pixels instead of 0.90."""
    array = np.zeros((2, 104, 104), np.float32)
    array[:, 20:84, 20:84] = noise((2, 64, 64))
    card = dict(dimensions=2, patch=[32, 32], spacing=[None] * 3, extent="content")
    plain, sized = (predict(Image(array, spacing), [make_package(**card, **more)]) for more in ({}, {"pixel_mm": 1.3, "field_px": 32}))
    assert (plain.tiles, sized.tiles) == (18, 2) and sized.labels.same_grid(plain.labels)
    assert sized.labels.array[:, 20:84, 20:84].any() and not sized.labels.array[:, :20].any()


@pytest.mark.parametrize("margin", [5, 16])
def test_a_target_near_the_end_of_the_image_is_not_shown_twice(make_package, margin):
    """The mirror about the image would put a second nodule beside it."""
    n, seen = 8 + 2 * margin, []
    array = np.zeros((3, n, n), np.float32)
    array[1, margin : margin + 8, margin : margin + 8] = 1
    card = dict(dimensions=2, patch=[48, 48], spacing=[None] * 3, padding="reflect", postprocess={"largest_component": True})
    engine = FakeEngine(lambda b: seen.append(b[:, 0].copy()) or logit(np.concatenate([1 - b, b], 1)))
    for roi_mm in (None, 20):
        seen.clear()
        told = []
        package = make_package(**card, roi_mm=roi_mm)
        got = predict(Image(array), [package], Options(uncertainty=True), lambda f, _, told=told: told.append(f), engines=[engine])
        assert told == sorted(told) and told[-1] == 1
        assert np.array_equal(got.labels.array, array)
        copies = math.ceil(seen[-1].sum() / 64)
        assert (copies > 1, len(seen)) == ((roi_mm is None, 1 + 2 * (roi_mm is not None)) if margin == 5 else (False, 1))


def test_what_others_pad_around_an_image_is_not_shown_to_a_model_of_its_content(make_package):
    values = noise((9, 20, 16))
    padded = np.pad(np.pad(values, ((0, 0), (3, 2), (0, 0))), ((2, 2), (4, 4), (5, 5)), constant_values=-3024)
    inside = Box((2, 7, 5), (11, 27, 21))
    zscore = {"mode": "zscore"}
    model = make_package("identity", activation="sigmoid", intensity=zscore, extent="content")
    alone = predict(Image(values), [model], Options(probabilities=True, uncertainty=True))
    got = predict(Image(padded, origin=(-5.0, -7.0, -2.0)), [model], Options(probabilities=True, uncertainty=True))
    for name in ("labels", "probabilities", "uncertainty"):
        whole, part = getattr(got, name).array, getattr(alone, name).array
        assert np.array_equal(whole[inside.trailing], part) and part.any()
        whole[inside.trailing] = 0
        assert not whole.any()
    assert got.roi == Box.whole(padded.shape) and got.labels.origin == (-5.0, -7.0, -2.0)
    softmax = make_package(intensity=zscore, extent="content")
    assert np.allclose(predict(Image(padded), [softmax], Options(probabilities=True)).probabilities.array.sum(0), 1)
    for options in (Options(roi=Box((0, 0, 0), (2, 9, 9))), Options(at=(1.0, 1.0, 1.0))):  # there is nothing but padding
        assert predict(Image(padded), [model], options).labels.array.shape == padded.shape
    plain = make_package("identity", activation="sigmoid", intensity=zscore)
    for models in ([plain], [model, plain]):
        assert not np.array_equal(predict(Image(padded), models).labels.array[inside.slices], alone.labels.array)


def test_a_model_of_crops_sees_an_roi_as_one(make_package):
    values, box = noise((30, 40, 40)), Box((8, 10, 12), (24, 28, 28))
    values[:8] += 5
    model = make_package("identity", activation="sigmoid", intensity={"mode": "zscore"}, extent="box", patch=[16, 16, 16])
    cut = predict(Image(values).crop(box), [model]).labels.array
    got = predict(Image(values), [model], Options(roi=box))
    assert np.array_equal(got.labels.array[box.slices], cut) and cut.any() and got.roi == box and not got.warnings
    assert np.count_nonzero(got.labels.array) == np.count_nonzero(cut)
    tight = Box((14, 17, 18), (16, 20, 22))  # of which the model sees a crop of at least seven eighths of its patch
    crop = Box((8, 12, 13), (22, 26, 27))
    wanted = predict(Image(values).crop(crop), [model]).labels.array[tight.relative_to(crop).slices]
    assert np.array_equal(predict(Image(values), [model], Options(roi=tight)).labels.array[tight.slices], wanted)
    point = Image(values).index_to_point((19, 19, 14))
    assert np.array_equal(predict(Image(values), [model], Options(roi=box, at=point)).labels.array, got.labels.array)
    face = Image(values).index_to_point([v - 0.5 for v in box.start[::-1]])
    assert predict(Image(values), [model], Options(roi=box, at=face)).roi == box
    assert not predict(Image(values), [model]).warnings
    assert "not for a whole scan; give a box" in predict(Image(values, (3.0, 3.0, 3.0)), [model]).warnings[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_of_crops_that_sees_neighbouring_slices_has_them(make_package, depth):
    values, box = noise((12, 30, 30)), Box((5, 4, 4), (5 + depth, 20, 20))
    seen = []
    engine = FakeEngine(lambda b: seen.append(b.copy()) or np.concatenate([0 * b[:, :1], b[:, :1]], 1))
    model = make_package(dimensions=2, context_slices=2, patch=[16, 16], spacing=[None] * 3, extent="box")
    predict(Image(values), [model], Options(roi=box, batch=1), engines=[engine])
    assert len(seen) == depth and all(np.array_equal(s[0], values[3 + k : 8 + k, 4:20, 4:20]) for k, s in enumerate(seen))


def test_a_box_about_one_target_is_one_patch(make_package):
    """With a margin about it, four, and the target in the middle of none."""
    card = dict(dimensions=2, patch=[32, 32], spacing=[None] * 3, roi_mm=20)
    engine = FakeEngine(lambda b: np.concatenate([0 * b, b], 1))
    point = Options(at=(40.0, 40.0, 1.0), batch=1)
    assert predict(Image(noise((3, 80, 80))), [make_package(**card)], point, engines=[engine]).tiles == 3 == len(engine.shapes)
    assert predict(Image(noise((3, 80, 80))), [make_package(**{**card, "roi_mm": None})], point, engines=[engine]).tiles > 3
    assert compute_box(Box((0, 8, 8), (3, 30, 60)), (3, 80, 80), (1, 32, 32), (1, 8, 8), centred=True) == Box((0, 8, 0), (3, 30, 68))


@pytest.mark.parametrize("spacing", [1.0, 0.7])
def test_padding_far_below_air_does_not_darken_what_lies_beside_it(make_package, spacing):
    hu = np.full((12, 16, 16), 40, np.int16)
    low, air = (np.pad(hu, 4, constant_values=v) for v in (-3024, -1024))
    seen = []
    engine = FakeEngine(lambda b: seen.append(b.copy()) or np.concatenate([0 * b, b], 1))
    model = make_package(intensity={"mode": "window", "level": -300, "width": 1400}, spacing=[spacing] * 3)
    for array in (low, air):
        predict(Image(array), [model], engines=[engine])
    half = len(seen) // 2
    assert all(np.array_equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_air_is_no_label_of_a_sigmoid_model(make_package):
    hu = np.full((16, 32, 32), -1000, np.int16)
    hu[:, :16, :16] = 100
    model = make_package(activation="sigmoid", intensity={"mode": "window", "level": -300, "width": 1400})
    got = predict(Image(hu), [model], Options(overlap=0), engines=[FakeEngine(lambda b: 50 * (b - 0.5))])
    assert np.array_equal(got.labels.array > 0, hu > 0)


def test_near_the_edge_the_target_is_the_middle_of_the_whole_box(make_package):
    hu = np.full((20, 60, 60), -800, np.int16)
    hu[8:12, 28:32, 5:9] = hu[8:12, 28:32, 13:19] = 50
    model = make_package(intensity={"mode": "window", "level": -300, "width": 1400}, roi_mm=50, postprocess={"largest_component": True})
    for options in (Options(at=(2.0, 30.0, 10.0)), Options(roi=Box((0, 5, -23), (20, 55, 28)))):
        got = predict(Image(hu), [model], options).labels.array
        assert got[9, 29, 6] and not got[:, :, 10:].any()
    assert predict(Image(hu), [model], Options(at=(30.0, 30.0, 10.0))).roi == Box((0, 5, 5), (20, 56, 56))


def test_views_know_the_pixels_aspect_and_flip_no_channels(make_package, monkeypatch):
    seen = []
    module = "UNetSegmentationLib.inference.predict.views"
    monkeypatch.setattr(module, lambda tta, axes, aspect: seen.append((axes, aspect)) or views(tta, axes, aspect))
    for spacing in ([None] * 3, [1.0, None, None]):
        predict(Image(noise((3, 20, 40)), (0.5, 1.0, 2.0)), [make_package(dimensions=2, spacing=spacing, flip_axes=["x", "z"])])
    assert seen == [([-1], 2.0), ([-1], 1.0)]


def test_entropy_of_several_labels_is_the_largest():
    assert entropy(np.array([[0.5, 0.999]]), "sigmoid") == pytest.approx([1.0])


def test_no_model_and_models_of_different_activations_are_refused(make_package):
    image = Image(noise((16, 16, 16)))
    with pytest.raises(UserError, match="No model was chosen"):
        predict(image, [])
    with pytest.raises(UserError, match="different activations"):
        predict(image, [make_package("identity", activation=a) for a in ("softmax", "sigmoid")])


def test_a_model_whose_images_end_in_zeros_looks_once(make_package):
    """Only what is mirrored beyond the image's edge may be seen once more, mirrored otherwise."""
    engine = FakeEngine(lambda batch: np.concatenate([0 * batch, batch - 0.5], 1))
    predict(Image(noise((12, 12, 12))), [make_package(roi_mm=50)], engines=[engine])
    assert len(engine.shapes) == 1


def test_a_target_in_an_image_larger_than_the_patch_is_looked_at_once(make_package):
    array = np.zeros((1, 64, 64), np.float32)
    array[0, 2:10, 2:10] = 1  # near the end of the image, which is no end of a patch's
    engine = FakeEngine(lambda b: logit(np.concatenate([1 - b, b], 1)))
    card = dict(dimensions=2, patch=[48, 48], spacing=[None] * 3, padding="reflect", roi_mm=20)
    got = predict(Image(array), [make_package(**card)], Options(batch=1), engines=[engine])
    assert np.array_equal(got.labels.array, array) and len(engine.shapes) == got.tiles
    empty = predict(Image(0 * array[:, :12, :12]), [make_package(**card)], Options(batch=1), engines=[engine])
    assert not empty.labels.array.any() and len(engine.shapes) == got.tiles + 3  # where nothing was found, once more in both ways


@pytest.mark.parametrize("extent", ["box", "content"])
def test_what_a_point_or_an_roi_shows_is_as_the_card_says(make_package, extent):
    values = noise((30, 40, 40))
    values[:8] += 5
    model = make_package("identity", activation="sigmoid", intensity={"mode": "zscore"}, extent=extent, roi_mm=10)
    found = predict(image := Image(values), [model], Options(at=(19.0, 19.0, 14.0)))
    by_box, whole = (predict(image, [model], options).labels.array[found.roi.slices] for options in (Options(roi=found.roi), Options()))
    assert np.array_equal(found.labels.array[found.roi.slices], by_box) and np.array_equal(by_box, whole) == (extent == "content")


@pytest.mark.parametrize("filled", [True, False])
def test_what_is_masked_out_of_a_crop_goes_on_as_what_lies_beside_it(make_package, filled):
    rng = np.random.default_rng(0)
    array = rng.normal(10, 1, (16, 16, 16)).astype(np.float32)
    array[:, :, :8] += 20
    away = np.linalg.norm(np.indices(array.shape) - 7.5, axis=0)[()] > 9
    masked = np.where(away, 0, array)
    seen = []
    engine = FakeEngine(lambda batch: seen.append(batch) or np.concatenate([0 * batch, batch], 1))
    card = dict(intensity={"mode": "zscore"}, extent="box", patch=[16] * 3) | ({"surround": "nearest"} if filled else {})
    predict(Image(masked), [make_package(**card)], engines=[engine])
    shown, one = seen[0][0, 0], seen[0][0, 0][masked == 0]
    assert (np.ptp(one) > 0) == filled
    if filled:  # the bright half is beside what was masked out of it
        assert np.median(shown[..., :6][away[..., :6]]) > 0 > np.median(shown[..., 10:][away[..., 10:]])
        dark = np.maximum(array, 10)  # clipped tissue is as common on the faces, and no surroundings
        predict(Image(dark), [make_package(**card)], engines=[engine])
        assert (seen[1] == seen[1].min()).mean() == (dark == 10).mean()


def smoothed(array):
    return sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(array.astype(np.float32)), 0.7))


@pytest.mark.parametrize("spoiled", ["smoothed", "noise", "clipped"])
def test_a_mask_that_was_smoothed_or_is_noisy_goes_on_as_tissue_and_smooth_tissue_is_none(make_package, spoiled):
    rng = np.random.default_rng(0)
    array = rng.normal(100, 5, (24, 24, 24)).astype(np.float32)
    masked = np.where(np.linalg.norm(np.indices(array.shape) - 11.5, axis=0) > 10, 0, array)
    field = smoothed(smoothed(smoothed(rng.normal(0, 1, array.shape))))
    image = {
        "smoothed": smoothed(masked),
        "noise": np.where(masked, masked, rng.uniform(0, 1e-3, array.shape)).astype(np.float32),
        "clipped": np.maximum(field, np.percentile(field, 25)),
    }[spoiled]
    shown = without_surround(Image(image), make_package(extent="box", surround="nearest").card).array
    if spoiled == "clipped":
        assert (image[shown != image] == image.min()).all()
    else:
        assert image.min() < 1 and shown.min() > 60


@pytest.mark.parametrize("spoiled", ["interpolated", "noise"])
def test_zeros_about_a_crop_that_were_interpolated_or_are_noisy_are_not_shown(make_package, spoiled):
    rng = np.random.default_rng(0)
    array = np.pad(rng.normal(100, 10, (24, 28, 32)), 6).astype(np.float32)
    noisy = np.where(array, array, rng.normal(0, 0.2, array.shape)).astype(np.float32)
    image = resample(Image(array), (0.9, 0.9, 0.9), "bspline") if spoiled == "interpolated" else Image(noisy)
    one = FakeEngine(lambda batch: np.concatenate([0 * batch, 0 * batch + 1], 1))  # labels all that it is shown
    by_box, by_content = (Box.of(predict(image, [make_package(extent=e)], engines=[one]).labels.array) for e in ("box", "content"))
    assert by_content == Box.whole(image.shape)
    if spoiled == "noise":
        assert by_box == Box.of(array)
    else:
        room = np.array([by_box.start, np.subtract(image.shape, by_box.stop)]) * 0.9
        assert (room >= 6).all() and (room <= 9).all()


def test_a_round_mask_keeps_its_ends(make_package):
    array = np.random.default_rng(0).normal(100, 5, (24, 24, 24)).astype(np.float32)
    array[np.linalg.norm(np.indices(array.shape) - 11.5, axis=0) > 9] = 0
    one = FakeEngine(lambda batch: np.concatenate([0 * batch, 0 * batch + 1], 1))
    assert Box.of(predict(Image(array), [make_package(extent="box")], engines=[one]).labels.array) == Box.of(array)


@pytest.mark.parametrize("slices, spacing, card, said", [(9, 1, {}, 1), (17, 1, {}, 0), (4, 5, {}, 0), (9, 1, {"extent": "image"}, 0)])
def test_a_slab_too_thin_for_a_model_of_one_target_is_said(make_package, slices, spacing, card, said):
    model = make_package(**{"extent": "box", "patch": [48, 48, 48], "spacing": [1.0] * 3} | card)
    notes = foreseen(Image(noise((slices, 40, 40)), (1.0, 1.0, float(spacing))), [model])
    assert [("9 mm (9 slices) thick" in note) for note in notes] == [True] * said


@pytest.mark.parametrize("extent", ["image", "box"])
def test_a_header_in_metres_is_said(make_package, extent):
    image = Image(noise((40, 40, 40)), (0.001, 0.001, 0.003))
    card = {"extent": extent, "patch": [48, 48, 48]}
    (note,) = foreseen(image, [make_package(**card, spacing=[1.0] * 3)])
    assert note == "The image is only 0.04 x 0.04 x 0.12 mm large; its spacing may be in metres: correct its header."
    assert not foreseen(image, [make_package(**card, spacing=[0.001] * 3)])  # a microscope's
    slices = make_package(dimensions=2, patch=[32, 32], spacing=[None] * 3, pixel_mm=1.3)  # as large as the model's pixels are made
    assert foreseen(image, [slices]) == (note,)
    assert not foreseen(Image(noise((1, 5, 5))), [slices])  # a picture without a size


@pytest.mark.parametrize(
    "card, shape, n", [({"surround": "nearest"}, (10, 16, 10), 14), ({}, (10, 16, 10), 10), ({"surround": "nearest"}, (10, 16, 16), 10)]
)
def test_a_crop_that_ends_close_goes_on_for_a_part_of_the_patch(make_package, card, shape, n):
    seen = []
    engine = FakeEngine(lambda batch: seen.append(batch) or np.concatenate([0 * batch, batch], 1))
    got = predict(Image(noise(shape)), [make_package(**card, extent="box", patch=[16] * 3)], engines=[engine])
    assert got.labels.shape == shape and (seen[0][0, 0] != 0).any((1, 2)).sum() == n
