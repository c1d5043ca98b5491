"""ClickSession with a network that is a threshold at 0.5, so that what the session itself does can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from UNetSegmentationLib.image import Box, Image, UserError
from UNetSegmentationLib.inference.click import CLICK_SIGMA, ClickSession, prompt_channels
from UNetSegmentationLib.inference.predict import predict

OBLIQUE = tuple(float(v) for v in np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0].ravel())


def ball(shape, centre, radius_mm, spacing):
    """1 inside a ball; centre (z, y, x) voxels, spacing (x, y, z) mm."""
    grid = np.indices(shape).reshape(3, -1).T
    away = ((grid - centre) * spacing[::-1]) ** 2
    return (away.sum(1) <= radius_mm**2).reshape(shape).astype(np.float32)


class Recording:
    """A threshold engine that keeps what it was given; answer(batch) may give the image channel to threshold instead."""

    def __init__(self, answer=lambda batch: batch[:, 0]):
        self.batches, self.answer = [], answer

    def run(self, batch):
        self.batches.append(batch)
        margin = 20 * (self.answer(batch) - 0.5)
        return np.stack([0 * margin, margin], 1).astype(np.float32)

    def describe(self):
        return "recording"


@pytest.fixture
def click_package(make_package):
    return lambda **card: make_package(**{"task": "click", "spacing": [1, 1, 1], "patch": [16, 24, 24], **card})


@pytest.fixture
def session(click_package):
    def make(array, spacing=(1.0, 1.0, 1.0), direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1), origin=(7.0, -20.0, 300.0), **options):
        return ClickSession(Image(array, spacing, origin, direction), click_package(), **options)

    return make


def at(session, *index):
    """The LPS point of a voxel (z, y, x)."""
    return session.image.index_to_point(index[::-1])


def test_one_click_gives_exactly_what_it_touches(session):
    shape = (30, 60, 60)
    first, second = ball(shape, (15, 20, 20), 4, (1, 1, 1)), ball(shape, (15, 20, 30), 3, (1, 1, 1))
    s = session(first + second)
    answer = s.add_point(at(s, 15, 21, 19))
    assert answer.found and answer.text == ""
    assert np.array_equal(s.mask, first)
    assert Box.around(first) == answer.box and answer.mask.dtype == np.uint8
    s.add_point(at(s, 15, 20, 30))
    assert np.array_equal(s.mask, first + second)


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_any_direction_gives_the_same_mask_in_space(session, axes, flip):
    direction = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(zip(axes, flip)):
        direction[axis, column] = sign
    shape = (26, 40, 50)
    array = ball(shape, (12, 18, 30), 5, (1, 1, 1))
    s = session(array, direction=tuple(direction.ravel()))
    s.add_point(at(s, 12, 18, 31))
    assert np.array_equal(s.mask, array)


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.7, 0.7, 5.0), (2.0, 2.0, 1.0)])
def test_other_spacings_are_resampled_and_come_back(session, spacing):
    shape = tuple(int(50 / s) for s in spacing[::-1])
    centre = np.array(shape) // 2
    array = ball(shape, centre, 5.2, spacing)
    s = session(array, spacing, direction=OBLIQUE)
    s.add_point(at(s, *centre))
    both = (s.mask * array).sum()
    assert 2 * both / (s.mask.sum() + array.sum()) > 0.9


def test_a_click_just_beside_is_forgiven_and_one_far_away_finds_nothing(session):
    array = ball((30, 50, 50), (15, 25, 25), 3, (1, 1, 1))
    s = session(array)
    assert s.add_point(at(s, 15, 25, 30)).found
    s.clear()
    answer = s.add_point(at(s, 15, 25, 35))
    assert not answer.found and "Nothing was found" in answer.text and answer.text.endswith(".")
    assert not s.mask.any() and s.measure()["voxels"] == 0


def test_the_patch_moves_and_zooms_out_until_the_mass_fits(session):
    array = ball((60, 90, 90), (30, 45, 45), 22, (1, 1, 1))
    s = session(array)
    answer = s.add_point(at(s, 30, 45, 60))
    assert answer.zoom > 1.4
    assert 2 * (s.mask * array).sum() / (s.mask.sum() + array.sum()) > 0.93
    s.clear()
    small = ball((60, 90, 90), (30, 45, 45), 6, (1, 1, 1))
    s = session(small)
    answer = s.add_point(at(s, 30, 45, 50))
    assert answer.zoom == 1 and np.array_equal(s.mask, small)


def test_a_mask_at_the_edge_of_the_image_does_not_zoom(session):
    array = np.zeros((20, 30, 30), np.float32)
    array[:6, :8, :8] = 1
    s = session(array)
    answer = s.add_point(at(s, 0, 0, 0))
    assert answer.zoom == 1 and np.array_equal(s.mask, array)


def test_a_negative_click_never_stays_inside(session):
    array = np.zeros((20, 40, 40), np.float32)
    array[8:12, 18:22, 8:34] = 1
    s = session(array)
    s.add_point(at(s, 10, 20, 12))
    before = s.mask
    assert before[10, 20, 22] == 1
    s.add_point(at(s, 10, 20, 22), positive=False)
    after = s.mask
    assert after[10, 20, 22] == 0 and after[10, 20, 12] == 1
    assert not after[:, :, 24:].any()  # cut off from what the positive click touches
    assert np.array_equal(s.undo().mask, before[s.answer.box.slices]) and np.array_equal(s.mask, before)


def test_undo_goes_back_step_by_step_and_stops_at_the_beginning(session):
    array = ball((20, 40, 40), (10, 20, 12), 4, (1, 1, 1)) + ball((20, 40, 40), (10, 20, 28), 4, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 10, 20, 12))
    one = s.mask
    s.add_point(at(s, 10, 20, 28))
    assert s.prompts == [(at(s, 10, 20, 12), True), (at(s, 10, 20, 28), True)]
    s.undo()
    assert np.array_equal(s.mask, one) and len(s.prompts) == 1
    assert not s.undo().found and not s.undo().found and s.prompts == []


def test_the_network_is_told_the_prompts_and_the_former_mask(click_package):
    array = ball((30, 60, 60), (15, 30, 30), 3, (1, 1, 1))
    engine = Recording()
    s = ClickSession(Image(array), click_package(), engine)
    s.add_point((30.0, 30.0, 15.0))
    s.add_point((36.0, 30.0, 15.0), positive=False)
    first, last = engine.batches[0][0], engine.batches[-1][0]
    assert first.shape == (5, 16, 24, 24)
    assert first[1].max() > 0.97 and not first[2:].any()
    assert np.unravel_index(first[1].argmax(), first[1].shape) in {(z, y, x) for z in (7, 8) for y in (11, 12) for x in (11, 12)}
    assert last[2].max() > 0.9 and not last[3].any() and set(np.unique(last[4])) == {0.0, 1.0}
    assert last[4].sum() == array.sum()


def test_a_box_alone_takes_the_largest_component_in_it(session):
    shape = (30, 60, 60)
    inside, outside = ball(shape, (15, 20, 20), 4, (1, 1, 1)), ball(shape, (15, 20, 34), 6, (1, 1, 1))
    s = session(inside + outside)
    answer = s.add_box(at(s, 11, 15, 15), at(s, 18, 25, 25))
    assert answer.found and np.array_equal(s.mask, inside)
    with pytest.raises(UserError, match="flat"):
        s.add_box(at(s, 10, 15, 15), at(s, 10, 25, 25))
    assert np.array_equal(s.mask, inside)


def test_a_corrected_mask_is_the_starting_point_and_can_be_undone(click_package):
    array = ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1))
    engine = Recording(lambda batch: batch[:, 4])  # answers with the former mask
    s = ClickSession(Image(array, direction=(-1.0, 0, 0, 0, -1, 0, 0, 0, 1)), click_package(), engine)
    brushed = ball((30, 60, 60), (15, 30, 34), 4, (1, 1, 1)).astype(np.uint8)
    s.set_mask(brushed)
    assert np.array_equal(s.mask, brushed)
    s.add_point(at(s, 15, 30, 34))
    assert np.array_equal(s.mask, brushed)
    s.undo(), s.undo()
    assert not s.mask.any()
    s.set_mask(brushed[10:, 20:40], (10, 20, 0))
    assert np.array_equal(s.mask[10:, 20:40], brushed[10:, 20:40])
    with pytest.raises(UserError, match="does not fit"):
        s.set_mask(brushed, (1, 0, 0))


def test_the_same_clicks_give_the_same_mask(session):
    rng = np.random.default_rng(1)
    array = (ball((30, 60, 60), (15, 30, 30), 8, (1, 1, 1)) + rng.normal(0, 0.2, (30, 60, 60))).astype(np.float32)
    masks = []
    for _ in range(2):
        s = session(array)
        s.add_point(at(s, 15, 30, 30))
        s.add_point(at(s, 15, 30, 36), positive=False)
        masks.append(s.mask)
    assert masks[0].any() and np.array_equal(*masks)


def test_what_cannot_be_clicked_on_is_a_sentence_and_changes_nothing(session, click_package, make_package):
    array = ball((20, 30, 30), (10, 15, 15), 4, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 10, 15, 15))
    for bad, sentence in (((0.0, 0.0, float("nan")), "three numbers"), (at(s, 50, 15, 15), "outside the image")):
        with pytest.raises(UserError, match=sentence):
            s.add_point(bad)
    assert np.array_equal(s.mask, array) and len(s.prompts) == 1
    with pytest.raises(UserError, match="does not work from clicks"):
        ClickSession(Image(array), make_package())
    with pytest.raises(UserError, match="scalar volume"):
        ClickSession(Image(array[:1]), click_package())
    with pytest.raises(UserError, match="click model"):
        predict(Image(array), [click_package()])


def test_measures_are_those_of_the_mask(session):
    array = ball((30, 50, 50), (15, 25, 25), 5, (1, 1, 1)) * 40
    s = session(np.where(array > 0, 1.0, 0.0).astype(np.float32), (0.8, 0.8, 1.0))
    s.add_point(at(s, 15, 25, 25))
    found = s.measure()
    assert found["voxels"] == s.mask.sum() and found["mean_hu"] == 1.0
    assert found["volume_mm3"] == pytest.approx(s.mask.sum() * 0.64)


def test_prompt_channels_are_gaussians_boxes_and_the_mask():
    out = prompt_channels((10, 20, 20), [(5, 10, 10)], [(5, 10, 10.5), (-3, 0, 0)], ((2, 3, 4), (5, 30, 8)), np.ones((10, 20, 20)))
    assert out.dtype == np.float32 and out[0, 5, 10, 10] == 1
    assert out[0, 5, 10, 10 + 3] == pytest.approx(np.exp(-0.5 * (3 / CLICK_SIGMA[2]) ** 2), rel=1e-5)
    assert out[1, 5, 10, 10] == pytest.approx(out[1, 5, 10, 11])
    assert np.array_equal(np.argwhere(out[2])[[0, -1]], [[2, 3, 4], [5, 19, 8]]) and out[3].all()
