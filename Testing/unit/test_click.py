"""ClickSession with a network that is a threshold at 0.5, so that what the session itself does can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from UNetSegmentationLib.image import Box, Grid, Image, UserError, sample
from UNetSegmentationLib.inference import click
from UNetSegmentationLib.inference.click import CLICK_SIGMA, DOUBTS, ZOOMS, ClickSession, prompt_channels
from UNetSegmentationLib.inference.predict import Cancelled, Options, predict
from UNetSegmentationLib.inference.second import SecondOpinion
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.nodule import describe
from UNetSegmentationLib.postprocess import components

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
    assert not s.mask.any() and s.measure()["voxels"] == 0 and s.prediction().algorithm == "SEMIAUTOMATIC"


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
    assert answer.zoom == 0.7 and np.array_equal(s.mask, array)


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


def test_a_negative_click_leaves_what_was_drawn(session):
    shape = (30, 60, 60)
    first, second = ball(shape, (15, 20, 20), 5, (1, 1, 1)), ball(shape, (15, 40, 40), 4, (1, 1, 1))
    s = session(first + second)
    s.set_mask(first + second)
    s.add_point(at(s, 15, 20, 25), positive=False)
    assert s.answer.found and not s.mask[15, 20, 25]
    assert dice(s.mask * (second > 0), second) > 0.7 and dice(s.mask * (first > 0), first) > 0.7  # on a grid of 2.25


def test_a_correction_that_the_network_ignores_is_followed_around_the_click(session):
    array = ball((30, 60, 60), (15, 20, 20), 5, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 15, 20, 20))
    s.add_point(at(s, 15, 20, 28))  # the network sees only background here
    # One voxel more than the ball, whose edge falls between the voxels of the patch that has moved.
    added = (s.mask > 0) & (ball(array.shape, (15, 20, 20), 6, (1, 1, 1)) == 0)
    assert added[15, 20, 28] and 0 < added.sum() < 300
    assert np.linalg.norm(np.argwhere(added) - (15, 20, 28), axis=1).max() < 3 * max(CLICK_SIGMA)
    s.add_point(at(s, 15, 20, 28), positive=False)
    assert not s.mask[15, 20, 28] and dice(s.mask, array) > 0.85
    s.add_point(at(s, 15.2, 20, 28))  # of two clicks on one voxel the later one holds
    assert s.mask[15, 20, 28]


@pytest.mark.parametrize("thick", [1.0, 2.0, 5.0, 10.0])
def test_a_later_click_is_followed_wherever_between_the_voxels_it_lies(session, thick):
    spacing, shape = (0.7, 0.7, thick), (12, 60, 60)
    array = ball(shape, (6, 30, 20), 6, spacing)
    s = session(array, spacing)
    s.add_point(at(s, 6, 30, 20))
    rng = np.random.default_rng(0)
    for _ in range(20):
        place = (6 + rng.uniform(-0.4, 0.4), 30 + rng.uniform(-8, 8), 32 + rng.uniform(-1, 1))
        answer = s.add_point(at(s, *place))
        assert answer.found and s.mask[tuple(np.floor(np.array(place) + 0.5).astype(int))] == 1
        s.undo()


def test_a_click_on_the_next_thick_slice_lies_on_the_patch(click_package):
    """Between two slices the patch's centre was rounded by half of one, and from near the click lay 4 nodes beyond the patch."""
    spacing = (0.7, 0.7, 8.0)
    s = ClickSession(Image(ball((8, 60, 60), (7, 30, 20), 3, spacing), spacing), click_package(patch=[24, 24, 24]))
    assert s.add_point(at(s, 7, 30, 20)).zoom == 0.5
    s.add_point(at(s, 6, 30, 27))
    assert s.mask[6, 30, 27] and s.mask[7, 30, 20]
    s.clear()
    s._engine = engine = Recording()
    s.add_box(at(s, 6, 28, 18), at(s, 7, 32, 22))
    box = next(b[0, 3].any((1, 2)) for b in engine.batches if b[0, 3].any())  # a click in its middle was tried before
    assert box.any() and not box[0] and not box[-1]


def test_a_box_that_is_drawn_loosely_does_as_a_click_in_its_middle(session):
    """As the trained model does, this one fills whatever box it gets."""
    lesion = ball((30, 60, 60), (15, 20, 20), 4, (1, 1, 1))
    other = ball((30, 60, 60), (15, 20, 29), 2, (1, 1, 1))
    s = session(lesion + other)
    s._engine = Recording(lambda batch: np.where(batch[:, 3].any((1, 2, 3), keepdims=True), batch[:, 3], batch[:, 0]))
    loose = ("box", *at(s, 9, 14, 14), *at(s, 21, 26, 26))
    assert s.add_box(loose[1:4], loose[4:]).text == click.LOOSE == s.prediction().warnings[0]
    assert np.array_equal(s.mask, lesion) and s.prompts == []
    s.add_point(at(s, 15, 20, 29))  # what was found stays
    assert np.array_equal(s.mask, lesion + other)
    s.undo()
    assert s.add_box(loose[1:4], loose[4:]).text == "" and s.mask.sum() > 4 * lesion.sum()  # the second one is meant
    s.replay([loose, ("point", *at(s, 15, 20, 29), True), ("mask", lesion.astype(np.uint8), (0, 0, 0))])
    s.undo()
    assert np.array_equal(s.mask, lesion + other)  # as one by one
    s.replay([loose, loose, ("mask", lesion.astype(np.uint8), (0, 0, 0))])
    s.undo()
    assert s.mask.sum() > 4 * lesion.sum()
    s.clear()
    s.add_box(at(s, 11, 16, 16), at(s, 19, 24, 24))  # fits
    assert lesion.sum() < s.mask.sum() and not s.mask[:10].any()
    s.clear()
    s.add_box(at(s, 4, 16, 16), at(s, 18, 44, 44))  # what lies in its middle is nothing
    assert s.mask.sum() > 4 * lesion.sum()
    s = session(ball((6, 60, 60), (3, 20, 20), 8, (1, 1, 15)), (1, 1, 15))
    image = s.image
    assert s.replay([click.box_prompt(image, Box((3, 11, 11), (4, 30, 30)))]).text == ""  # of one thick slice, and it fits


def test_of_clicks_beside_one_another_the_last_holds(session):
    array = ball((20, 40, 40), (10, 20, 20), 6, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 10, 20, 20))
    s.add_point(at(s, 10, 20, 27), positive=False)
    s.add_point(at(s, 10, 20, 28))
    assert s.mask[10, 20, 28] == 1 and s.mask[10, 20, 27] == 0  # and what is not part of it stays out
    s.undo()
    s.add_point(at(s, 10, 20, 24), positive=False)
    assert s.mask[10, 20, 24] == 0 and s.mask[10, 20, 20] == 1


def test_what_a_negative_click_takes_away_leaves_no_specks(session):
    array = ball((60, 120, 120), (30, 60, 60), 30, (1, 1, 1))
    s = session(np.float32(0.6) * array)
    s.add_point(at(s, 30, 60, 60))
    s.add_point(at(s, 30, 60, 84))
    assert s.add_point(at(s, 30, 60, 82), positive=False).zoom >= 2.25
    assert len(components(s.mask > 0, corners=True)[1]) == 2 and s.mask.sum() > 0.7 * array.sum()  # what is around it, and it
    assert not s.mask[30, 60, 82]


def test_a_positive_click_holds_against_an_earlier_negative_one_whatever_follows(session):
    s = session(np.float32(0.6) * ball((60, 120, 120), (30, 60, 60), 30, (1, 1, 1)))
    for x, y, positive in ((60, 60, True), (82, 60, False), (84, 60, True)):
        s.add_point(at(s, 30, y, x), positive)
    before = s.mask[29:32, 59:62, 83:86].sum()
    s.add_point(at(s, 30, 40, 60), positive=False)  # far from these
    assert before > 9 and s.mask[29:32, 59:62, 83:86].sum() == before and s.mask[30, 60, 84] and not s.mask[30, 60, 82]


@pytest.mark.parametrize(
    "value, pad, told", [(-1024, (0, 12, 12), True), (-3024, (6, 0, 0), True), (0, (6, 12, 0), True), (-850, (6, 12, 12), False)]
)
def test_what_pads_a_ct_is_no_part_of_it(click_package, value, pad, told):
    """As at the image's end its last voxels go on; a phantom's even lung is lung."""
    shape = (16, 30, 30)
    lung = np.random.default_rng(0).normal(-850, 20, shape).astype(np.float32)
    array = np.where(ball(shape, (8, 15, 15), 4, (1, 1, 1)) > 0, 30, lung).astype(np.float32)
    card = {"intensity": {"mode": "window", "level": -400, "width": 1000}, "spacing": [1.5, 1.5, 1.5]}
    whole = ClickSession(Image(np.pad(array, [(n, n) for n in pad], constant_values=value), (1, 1, 1)), click_package(**card))
    place = tuple(n + v for n, v in zip(pad, (8, 15, 15)))
    mask = whole.add_point(at(whole, *place)).mask
    assert mask.any() and (whole._scanned.shape == shape) == told
    inner = whole.mask[tuple(slice(n, n + m) for n, m in zip(pad, shape))]
    assert dice(inner, array == 30) > 0.8 and inner.sum() == whole.mask.sum()
    if told:
        whole.clear()
        assert not whole.add_point(at(whole, *(0 if n else v for n, v in zip(pad, place)))).found  # on what pads it


def test_a_click_on_the_images_far_face_is_on_its_last_voxel(session):
    s = session(ball((20, 40, 40), (10, 20, 38), 5, (3, 3, 3)), spacing=(3.0, 3.0, 3.0))
    s.add_point(at(s, 10, 20, 38))
    assert s.mask[10, 20, 39]
    s.add_point(at(s, 10, 20, 39.5), positive=False)
    assert not s.mask[10, 20, 39] and s.mask[10, 20, 38]


def test_clicks_too_far_apart_for_one_look_are_refused(session):
    array = ball((40, 60, 200), (20, 30, 20), 5, (1, 1, 1)) + ball((40, 60, 200), (20, 30, 180), 5, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 20, 30, 20))
    before = s.mask
    with pytest.raises(UserError, match="too far from the others for one lesion and was not taken; begin the next lesion for it"):
        s.add_point(at(s, 20, 30, 180))
    assert np.array_equal(s.mask, before) and len(s.prompts) == 1
    assert s.add_point(at(s, 20, 30, 80)).found  # as far apart as in the largest masses
    s.clear()
    for mask, place, positive in ((array[..., :100], (20, 30, 180), True), (np.ones(array.shape, np.uint8), (20, 30, 90), False)):
        s.set_mask(mask)
        before = s.mask
        with pytest.raises(UserError, match="This was not taken: .* too large for one lesion; erase what is no part of it, or begin"):
            s.add_point(at(s, *place), positive)
        with pytest.raises(UserError, match="too large for one lesion"):
            s.add_box(at(s, 10, 20, 150), at(s, 30, 40, 190))
        assert np.array_equal(s.mask, before) and before.any()


def test_a_box_larger_than_the_furthest_look_is_refused(session):
    s = session(np.zeros((40, 60, 200), np.float32))
    with pytest.raises(UserError, match="The box is too large for one lesion; draw it closer"):
        s.add_box(at(s, 0, 0, 0), at(s, 39, 59, 199))
    assert not s.answer.found and s.undo() is not None


def test_what_the_furthest_look_cuts_is_said_to_be_cut(session):
    s = session(np.ones((40, 60, 400), np.float32))
    assert not s.add_point(at(s, 20, 30, 200)).found
    assert s.add_point(at(s, 20, 30, 202)).text.startswith(click.BEYOND) and s.prediction().warnings[0] == click.BEYOND
    s.set_mask(ball((40, 60, 400), (20, 30, 200), 5, (1, 1, 1)))
    assert not s.prediction().warnings


def test_that_nothing_was_found_is_said_beside_what_is_missing(click_package):
    s = ClickSession(Image(np.full((30, 60, 60), -900, np.float32)), click_package(second_opinion="nowhere-1.0.0"), Recording())
    answer = s.add_point(at(s, 15, 30, 30))
    assert answer.text.startswith("Nothing was found here") and "nowhere-1.0.0" in answer.text


def test_a_network_that_gives_no_numbers_is_named(session):
    s = session(ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1)))
    s._engine = Recording(lambda batch: np.full_like(batch[:, 0], np.nan))
    with pytest.raises(UserError, match="gave values that are no numbers; run it in fp32 or on the CPU"):
        s.add_point(at(s, 15, 30, 30))
    assert not s.prompts


def test_what_was_drawn_on_one_thin_slice_is_seen_from_far_away(session):
    array = np.zeros((60, 200, 200), np.float32)
    s = session(array, (0.5, 0.5, 0.5))
    drawn = ball((1, 200, 200), (0, 100, 100), 26, (0.5, 0.5, 0.5)).astype(np.uint8)
    s.set_mask(drawn, (30, 0, 0))
    s._engine = Recording(lambda batch: batch[:, 4])  # keeps the former mask
    answer = s.add_point(at(s, 30, 160, 100), positive=False)
    assert answer.found and answer.zoom > 1 and dice(s.mask[30], drawn[0]) > 0.9


def test_a_header_in_metres_is_said_and_takes_no_memory(session):
    """The patch had 3.6 TiB of such voxels."""
    array = ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1))
    s = session(array, (0.001, 0.001, 0.001))
    s.set_mask(array)
    answer = s.add_point(at(s, 15, 30, 30))
    assert answer.found and "only 0.06 x 0.06 x 0.03 mm large; its spacing may be in metres" in answer.text


def test_a_coarse_patch_shows_the_former_mask_where_it_is(session):
    """Cut 1 voxel beside it, what was filtered there went on as far as the patch: values differed by 0.17."""
    drawn = np.zeros((160, 200, 200), np.uint8)
    drawn[70:82, 90:102, 95:110] = 1
    s = session(np.zeros(drawn.shape, np.float32))
    s.set_mask(drawn)
    grid = Grid((16, 24, 24), (20.0, 16.0, 16.0), (-74.0, -96.0, -96.0))
    got = s._sampled(s._history[-1][1], grid)
    values = sample(drawn[None].astype(np.float32), grid, Box.whole(grid.shape))[0]
    assert np.array_equal(got > 0, values >= values.max() / 2) and 0 < got.sum() < 20


@pytest.mark.parametrize("mode", [{"mode": "zscore"}, {"mode": "percentile", "low": 1, "high": 99}])
def test_a_voxel_that_is_no_number_is_said_wherever_it_lies(click_package, mode):
    array = ball((30, 40, 40), (15, 20, 20), 5, (1, 1, 1))
    array[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="^The image has 1 voxels that are NaN"):
        ClickSession(Image(array), click_package(intensity=mode), Recording()).add_point((20.0, 20.0, 15.0))
    array[0, 0, 0], array[15, 24, 26] = 0, np.nan
    with pytest.raises(UserError, match="^The image has 1 voxels that are NaN"):  # and not as many as it spread to
        ClickSession(Image(array, (0.7, 0.7, 0.7)), click_package(), Recording()).add_point((14.0, 14.0, 10.5))


def test_what_does_not_end_is_nothing_until_a_second_click_says_otherwise(session):
    s = session(np.ones((120, 200, 200), np.float32))
    answer = s.add_point(at(s, 60, 100, 100))
    assert not answer.found and "click a second time" in answer.text
    assert s.add_point(at(s, 60, 100, 110)).found


def test_a_mass_of_which_the_largest_patch_cuts_a_tip_ends_well_enough(session):
    array = ball((56, 100, 240), (28, 50, 60), 20, (1, 1, 1))
    array[24:33, 46:55, 60:200] = 1  # a vessel, nine voxels wide
    s = session(array)
    answer = s.add_point(at(s, 28, 50, 60))
    assert answer.found and answer.text == "" and answer.zoom == ZOOMS[-1]
    assert 0.9 < dice(s.mask[..., :100], array[..., :100]) and not s.mask[..., 120:].any()


def test_deep_in_soft_tissue_a_ct_model_looks_from_further_away_first(click_package):
    lung = np.full((120, 160, 160), -900, np.float32)
    lung[ball(lung.shape, (60, 80, 80), 20, (1, 1, 1)) > 0] = 40
    for place, wide in (((60, 80, 80), True), ((60, 80, 99), False)):
        engine = Recording()
        s = ClickSession(Image(lung, (1, 1, 1), (0, 0, 0)), click_package(intensity=CT_WINDOW), engine)
        answer = s.add_point(at(s, *place))
        assert dice(s.mask, lung > 0) > 0.85 and answer.zoom == ZOOMS[-1]
        seen = np.mean(engine.batches[0][0, 0] > 0.5)  # of soft tissue, in the first look
        assert seen < 0.8 and (len(engine.batches) <= 2) == wide


CT_WINDOW = {"mode": "window", "level": -200, "width": 1600}


def test_fat_is_no_lesion_until_a_second_click_says_otherwise(click_package):
    for hu, found in ((40, True), (-90, False)):
        values = np.full((60, 80, 80), -900, np.float32)
        lesion = ball(values.shape, (30, 40, 40), 6, (1, 1, 1)) > 0
        values[lesion] = hu
        s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording())
        answer = s.add_point(at(s, 30, 40, 40))
        assert answer.found == found and ("click a second time" in answer.text) != found
        assert s.add_point(at(s, 30, 40, 42)).found and dice(s.mask, lesion) > 0.8


def test_what_is_large_is_fat_from_a_smaller_share_on(click_package):
    for radius, found in ((8, True), (11, False)):  # 2.1 and 5.6 ml, of which fat 0.3
        values = np.full((60, 80, 80), -900, np.float32)
        lesion = ball(values.shape, (30, 40, 40), radius, (1, 1, 1)) > 0
        values[lesion] = np.where(np.random.default_rng(0).random(np.count_nonzero(lesion)) < 0.3, -90, 40)
        s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording())
        answer = s.add_point(at(s, 30, 40, 40))
        assert answer.found == found and ("is fat" in answer.text) != found


def test_what_is_large_and_dense_is_bone_or_contrast_medium(click_package):
    for radius, found in ((8, True), (11, False)):  # 2.1 ml, a calcified nodule, and 5.6 ml
        values = np.full((60, 80, 80), -900, np.float32)
        lesion = ball(values.shape, (30, 40, 40), radius, (1, 1, 1)) > 0
        values[lesion] = 400
        s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording())
        answer = s.add_point(at(s, 30, 40, 40))
        assert answer.found == found and ("contrast medium" in answer.text) != found
        assert s.add_point(at(s, 30, 40, 42)).found


def test_values_that_are_no_hu_are_said_to_be_the_reason(click_package):
    for offset, said in ((0, False), (1024, True)):
        values = np.full((60, 80, 80), -900, np.float32)
        values[ball(values.shape, (30, 40, 40), 11, (1, 1, 1)) > 0] = 40
        values = (values + offset).astype(np.float32 if not offset else np.uint16)
        s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording())
        for point in (at(s, 30, 40, 40), at(s, 30, 40, 42)):  # taken for contrast medium at first, then believed
            answer = s.add_point(point)
            assert ("do not look like HU" in answer.text) == said
            assert answer.text.startswith("Without HU") == (not answer.found)
            # What a panel knows a doubt by, which asks for a second click.
            assert answer.text.startswith(DOUBTS) == (not answer.found) == (said and point == at(s, 30, 40, 40))
        assert answer.found and answer.text.endswith("".join(s.warnings))
        report = describe(s.image, s.mask)
        assert (report["texture"] is None) == (report["size_class"] is None) == said


def test_skin_has_air_beside_it_and_no_lung(click_package):
    for air, found in ((-900, True), (-1000, False)):
        values = np.full((60, 80, 80), air, np.float32)
        values[:, :40] = 40
        lesion = ball(values.shape, (30, 40, 40), 5, (1, 1, 1)) > 0
        values[lesion] = 500
        s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording(lambda batch: np.where(batch[:, 0] > 0.8, 1.0, 0.0)))
        answer = s.add_point(at(s, 30, 40, 40))
        assert answer.found == found and ("lung around" in answer.text) != found


@pytest.fixture
def buried(click_package, monkeypatch):
    """buried(answer): a session whose first look is zoomed out, with soft tissue all around but for the far corners, its engine, and
    the lesion, which fits a patch."""
    monkeypatch.setattr(click, "lung_around", lambda *_: 1.0)
    values = np.full((120, 160, 160), -900, np.float32)
    values[40:80, 40:120, 40:120] = 0
    lesion = ball(values.shape, (60, 80, 80), 3, (1, 1, 1)) > 0
    values[lesion] = 500

    def make(answer):
        engine = Recording(answer)
        return ClickSession(Image(values, (1, 1, 1), (0, 0, 0)), click_package(intensity=CT_WINDOW), engine), engine, lesion

    return make


def test_what_turns_out_small_from_far_away_is_looked_at_again_from_near(buried):
    s, engine, lesion = buried(lambda batch: np.where(batch[:, 0] > 0.8, 1.0, 0.0))
    answer = s.add_point(at(s, 60, 80, 80))
    assert answer.zoom == ZOOMS[0] and np.array_equal(s.mask, lesion)
    assert len(engine.batches) == 2


def test_what_was_found_is_looked_at_again_from_as_near_as_shows_it_whole(click_package):
    for radius, zoom in ((3, 1.0), (2, 0.5)):
        array = ball((60, 80, 80), (30, 40, 40), radius, (1, 1, 1))
        engine = Recording()
        s = ClickSession(Image(array), click_package(), engine)
        answer = s.add_point(at(s, 30, 40, 42))
        assert answer.zoom == zoom and np.array_equal(s.mask, array)
    assert not engine.batches[-1][0, 4].any()  # what was found from further away tells a closer look nothing


def test_a_closer_look_that_finds_nothing_or_more_than_it_shows_is_not_followed(click_package):
    array = ball((60, 80, 80), (30, 40, 40), 2, (1, 1, 1))
    for closer in (0.0, 1.0):
        engine = Recording(lambda batch, flat=closer: batch[:, 0] if batch[:, 0].sum() < 50 else np.full_like(batch[:, 0], flat))
        s = ClickSession(Image(array), click_package(), engine)
        answer = s.add_point(at(s, 30, 40, 42))
        assert answer.zoom == 1 and np.array_equal(s.mask, array) and len(engine.batches) > 1


def test_a_correction_looks_from_nearer_at_what_was_found_from_far_away(buried):
    def answer(batch):
        """Finds nothing on a first look from near."""
        bright = batch[:, 0] > 0.8
        return np.where(bright & (batch[:, 4].any() or bright.sum() < 60), 1.0, 0.0)

    s, _, lesion = buried(answer)
    assert s.add_point(at(s, 60, 80, 80)).zoom > 1.4
    assert s.add_point(at(s, 60, 80, 82)).zoom == 1 and np.array_equal(s.mask, lesion)


@pytest.mark.parametrize("radius, whole", [(19, True), (13, False)])
def test_a_part_of_a_mass_grows_with_the_distance_and_the_mass_is_taken(click_package, make_package, radius, whole):
    """From near the network sees a lesion of its own in the mass's edge; from furthest away it sees all that is bright."""
    shape, far = (100, 150, 150), 3.4**3
    mass, part = ball(shape, (50, 75, 75), radius, (1, 1, 1)) > 0, ball(shape, (50, 75, 75 + radius - 4), 9, (1, 1, 1)) > 0
    values = np.where(part, 200, np.where(mass, 50, -900)).astype(np.float32)

    def answer(batch):
        bright = batch[:, 0] > 0.5
        return np.where(bright if bright.sum() < 1.1 * np.count_nonzero(mass | part) / far else batch[:, 0] > 0.7, 1.0, 0.0)

    engine = Recording(answer)
    second = slice_package(make_package, intensity=CT_WINDOW), Recording(lambda batch: np.where(batch[:, 0] > 0.7, 1.0, 0.0))
    s = ClickSession(Image(values, (1, 1, 1), (0, 0, 0)), click_package(intensity=CT_WINDOW), engine, second=second)
    found = s.add_point(at(s, 50, 75, 75 + radius - 4))
    assert found.text == "" and found.zoom == (ZOOMS[-1] if whole else 1.5)
    assert dice(s.mask, (mass | part) if whole else part) > 0.85
    assert engine.batches[-1][0, 1].any() and not engine.batches[-1][0, 4].any()


def test_what_has_no_lung_around_it_is_nothing_until_a_second_click_says_otherwise(click_package):
    lesion = ball((120, 160, 160), (60, 80, 80), 8, (1, 1, 1)) > 0
    for around, found in ((-900, True), (0, False)):
        values = np.where(lesion, 500, around).astype(np.float32)
        values[0] = -1000  # somewhere, as in every scan in HU
        engine = Recording(lambda batch: np.where(batch[:, 0] > 0.8, 1.0, 0.0))
        s = ClickSession(Image(values, (1, 1, 1), (0, 0, 0)), click_package(intensity=CT_WINDOW), engine)
        answer = s.add_point(at(s, 60, 80, 80))
        assert answer.found == found and ("lung around" in answer.text) != found
        assert s.add_point(at(s, 60, 80, 83)).found and s.answer.text == ""
        assert dice(s.mask, lesion) > 0.8


def test_what_has_little_lung_around_it_is_believed_where_two_looks_agree(click_package):
    values = np.full((60, 80, 80), -900, np.float32)
    values[:, :42] = 40  # the mediastinum; a first patch cuts the mass beside it, a second one finds 0.34 of lung around it
    values[ball(values.shape, (30, 41, 40), 8, (1, 1, 1)) > 0] = 500

    def steady(batch):
        return np.where(batch[:, 0] > 0.8, 1.0, 0.0)

    def swelling(batch):  # around the click, the larger the further away it is looked at from
        return batch[:, 1]

    for network, found in ((steady, True), (swelling, False)):
        s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording(network))
        answer = s.add_point(at(s, 30, 41, 40))
        assert answer.found == found and ("lung around" in answer.text) != found


def test_a_model_for_other_organs_asks_for_no_lung(click_package):
    lesion = ball((60, 80, 80), (30, 40, 40), 8, (1, 1, 1)) > 0
    image = Image(np.where(lesion, 500, 60).astype(np.float32), (1, 1, 1), (0, 0, 0))
    for surroundings, found in (("any", True), ("lung", False)):
        engine = Recording(lambda batch: np.where(batch[:, 0] > 0.8, 1.0, 0.0))
        s = ClickSession(image, click_package(intensity=CT_WINDOW, surroundings=surroundings), engine)
        assert s.add_point(at(s, 30, 40, 40)).found == found


def test_air_is_no_lesion(click_package):
    air = Image(np.full((60, 80, 80), -1000, np.float32), (1, 1, 1), (0, 0, 0))
    s = ClickSession(air, click_package(intensity=CT_WINDOW), Recording(lambda batch: batch[:, 1]))  # a ball at every click
    assert not s.add_point(at(s, 30, 40, 40)).found


def test_flipped_copies_are_averaged_where_the_card_asks_for_it(click_package):
    array = ball((30, 60, 60), (15, 20, 20), 5, (1, 1, 1))

    def lopsided(batch):  # sees half of what is there, on the side of the low columns
        half = batch[:, 0].copy()
        half[..., batch.shape[-1] // 2 :] *= 0.8
        return half

    for tta, copies in (("none", 1), ("flips", 2), ("flips", 4)):
        engine = Recording(lopsided)
        package = click_package(flip_axes=["x", "y"][: copies // 2], tta=tta)
        s = ClickSession(Image(array, (1, 1, 1), (0, 0, 0)), package, engine)
        s.add_point(at(s, 15, 20, 20))
        assert np.array_equal(s.mask, array)
        (batch,) = engine.batches
        assert len(batch) == copies
        assert copies == 1 or any(np.array_equal(np.flip(batch[0], -1), other) for other in batch[1:])
    plain = Recording()
    s = ClickSession(s.image, package, plain, Options(tta="none"))
    s.add_point(at(s, 15, 20, 20))
    assert len(plain.batches[0]) == 1


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


def listening(batch):
    """What the network sees depends on everything that it is told, so that another history gives another mask."""
    image, positive, negative, box, previous = (batch[:, i] for i in range(5))
    return image + 0.3 * positive - 0.3 * negative + 0.05 * box + 0.2 * previous


@pytest.fixture
def noisy(click_package):
    """A session on noise about two balls, and prompts of all kinds."""
    shape = (30, 60, 60)
    values = 0.6 * ball(shape, (15, 30, 26), 7, (1, 1, 1)) + 0.6 * ball(shape, (15, 30, 38), 5, (1, 1, 1))
    values += np.random.default_rng(2).normal(0, 0.15, shape)
    image, package = Image(values.astype(np.float32), (1.1, 0.9, 1.3), (7, -20, 300), OBLIQUE), click_package()
    engine = Recording(listening)

    def point(z, y, x, positive=True):
        return ("point", *image.index_to_point((x, y, z)), positive)

    brushed = np.zeros((10, 12, 12), np.uint8)
    brushed[2:8, 2:10, 3:9] = 1
    box = ("box", *image.index_to_point((18, 21, 8)), *image.index_to_point((46, 39, 22)))
    prompts = [
        point(15, 30, 26),
        point(15, 30, 32, False),
        box,
        ("mask", brushed, (10, 24, 30)),
        point(14, 31, 38),
        point(15, 36, 26, False),
    ]
    return ClickSession(image, package, engine), prompts, lambda: ClickSession(image, package, Recording(listening))


def one_by_one(session, prompts):
    for kind, *rest in prompts:
        if kind == "point":
            session.add_point(rest[:3], rest[3])
        elif kind == "box":
            session.add_box(rest[:3], rest[3:])
        else:
            session.set_mask(*rest)
    return session.mask


def test_the_last_bits_of_a_prompt_do_not_matter(noisy):
    masks = []
    for less in (0.0, 1e-12, -1e-12):
        s = noisy[2]()
        first, last = (np.array(s.image.index_to_point(i)) - less for i in ((18, 21, 8), (45, 38, 21)))
        s.add_box(first, last)
        masks.append(s.mask)
    assert masks[0].any() and all(np.array_equal(masks[0], m) for m in masks)


def test_replay_gives_what_the_prompts_give_one_by_one(noisy):
    session, prompts, new = noisy
    wanted = [one_by_one(new(), prompts[:n]) for n in range(len(prompts) + 1)]
    assert wanted[1].any() and all(not np.array_equal(a, b) for a, b in zip(wanted, wanted[1:]))
    for n in (6, 2, 0, 1, 3, 6, 5, 4):
        answer = session.replay(prompts[:n])
        assert np.array_equal(session.mask, wanted[n]) and answer.found == bool(n)
    other = [prompts[0], prompts[4], *prompts[2:4]]
    session.replay(other)
    assert np.array_equal(session.mask, one_by_one(new(), other))
    session.undo()
    assert np.array_equal(session.replay(other[:3]).mask, one_by_one(new(), other[:3])[session.answer.box.slices])


def test_replay_runs_the_network_only_for_what_is_new(noisy):
    session, prompts, _ = noisy
    session.replay(prompts)
    runs = len(session._engine.batches)
    session.replay([list(p) for p in prompts])  # equal prompts, other objects; the mask in a larger array
    larger = np.zeros(session.image.shape, np.uint8)
    larger[10:20, 24:36, 30:42] = prompts[3][1]
    session.replay([*prompts[:3], ("mask", larger, (0, 0, 0)), *prompts[4:]])
    session.replay(prompts[:5])
    assert len(session._engine.batches) == runs and session.seconds == {}
    session.replay([*prompts[:5], prompts[0]])
    assert len(session._engine.batches) > runs and set(session.seconds) == {"crop", "network", "paste"}


def test_what_a_mask_makes_needless_is_run_only_when_the_mask_is_undone(noisy):
    session, prompts, new = noisy
    session.replay(prompts[:4])
    assert len(session._engine.batches) == 0
    session.replay(prompts[:5])
    runs = len(session._engine.batches)
    assert runs > 0 and np.array_equal(session.mask, one_by_one(new(), prompts[:5]))
    session.undo(), session.undo()
    assert len(session._engine.batches) > runs and np.array_equal(session.mask, one_by_one(new(), prompts[:3]))
    twice = [*prompts, ("mask", prompts[3][1], (11, 22, 20)), prompts[0]]
    for n in (8, 5, 8, 7, 6, 3, 2):
        session.replay(twice[:n])
        assert np.array_equal(session.mask, one_by_one(new(), twice[:n])), n
    fresh = new()
    with pytest.raises(UserError, match="outside the image"):
        fresh.replay([*prompts[:2], ("point", 1e4, 0.0, 0.0, True), *prompts[2:]])
    assert np.array_equal(fresh.mask, one_by_one(new(), prompts[:2]))


def test_undo_goes_back_to_before_what_cannot_be_followed_and_a_mask_made_needless(session):
    s = session(ball((40, 60, 200), (20, 30, 20), 5, (1, 1, 1)))
    first, far = ("point", *at(s, 20, 30, 20), True), ("box", *at(s, 10, 20, 150), *at(s, 30, 40, 190))
    s.replay([first])
    before = s.mask
    with pytest.raises(UserError, match="too large for one lesion"):
        s.replay([first, far])
    s.replay([first, far, ("mask", np.ones((3, 3, 3), np.uint8), (20, 30, 100))])
    assert s.mask.sum() == 27
    s.undo()
    assert before.any() and np.array_equal(s.mask, before)


def test_a_prompt_that_cannot_be_followed_leaves_those_before_it(noisy):
    session, prompts, new = noisy
    outside = ("point", 1e4, 0.0, 0.0, True)
    with pytest.raises(UserError, match="outside the image"):
        session.replay([*prompts[:2], outside, prompts[4]])
    assert np.array_equal(session.mask, one_by_one(new(), prompts[:2]))
    asked = iter([False, True])
    with pytest.raises(Cancelled):
        session.replay(prompts[2:4], lambda: next(asked))
    assert np.array_equal(session.mask, one_by_one(new(), prompts[2:3]))
    before = session.mask
    bad = [("point", 1.0, 2.0, True), ("point", "a", 1.0, 2.0, True), ("box", 1.0, 2.0), ("line", 1.0), (), 3, None]
    bad += [("mask", np.zeros((2, 2)), (0, 0, 0)), ("mask", [[[1]]], (0, 0, 0)), ("mask", prompts[3][1], (0, 0)), ("mask", prompts[3][1])]
    for prompt in bad:
        with pytest.raises(UserError, match="A prompt must be"):
            session.replay([*prompts[2:3], prompt])
        assert np.array_equal(session.mask, before)


def test_another_lesion_shares_all_but_the_prompts(noisy):
    session, prompts, new = noisy
    session.replay(prompts[:2])
    other = session.another()
    assert not other.answer.found and other.prompts == [] and session.answer.found
    other.replay(prompts[4:5])
    assert np.array_equal(other.mask, one_by_one(new(), prompts[4:5]))
    assert np.array_equal(session.mask, one_by_one(new(), prompts[:2]))
    runs = len(session._engine.batches)
    other.warm()
    assert len(session._engine.batches) == runs + 1 and np.array_equal(other.mask, one_by_one(new(), prompts[4:5]))


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


def slice_package(make_package, **card):
    """An automatic 2D model whose answer is what its engine says of the slice."""
    return make_package(**{"name": "slices", "dimensions": 2, "spacing": [1, 1, None], "patch": [32, 32], "divisor": [8, 8], **card})


def seconded(click_package, make_package, image, answer=lambda batch: batch[:, 0], **card):
    first, second = Recording(), Recording(answer)
    package = click_package(second_opinion="slices-1.0.0")
    return ClickSession(image, package, first, second=(slice_package(make_package, **card), second)), second


def test_a_second_opinion_counts_where_it_finds_the_same(click_package, make_package, monkeypatch):
    shape, centre = (30, 60, 60), (15, 30, 30)
    ours, theirs = (ball(shape, centre, r, (1, 1, 1)) for r in (5, 6))
    image = Image(ours + 0.2 * (theirs - ours), (1, 1, 1), (0, 0, 0))
    # Our log-odds are -6 where only they find it, theirs there are 12 or what the clip leaves of it.
    s, second = seconded(click_package, make_package, image, lambda batch: (batch[:, 0] > 0.1).astype(np.float32))
    s.add_point(at(s, *centre))
    assert np.array_equal(s.mask, theirs) and second.batches
    assert s.prediction().engines == ("recording", "recording")
    # Of something else on the same place it says nothing, nor where it is too large.
    for what, limit in ((ball(shape, centre, 12, (1, 1, 1)), 40.0), (theirs, 9.0)):
        monkeypatch.setattr(click, "SECOND_MM", limit)
        image = Image(ours + 0.2 * (what - ours), (1, 1, 1), (0, 0, 0))
        s, _ = seconded(click_package, make_package, image, lambda batch: (batch[:, 0] > 0.1).astype(np.float32))
        s.add_point(at(s, *centre))
        assert np.array_equal(s.mask, ours)


def test_a_second_opinion_never_reaches_far(click_package, make_package):
    shape, centre = (30, 60, 60), (15, 30, 30)
    lesion = ball(shape, centre, 6, (1, 1, 1))
    vessel = np.zeros(shape, np.float32)
    vessel[15, 30, 36:] = 0.2
    image = Image(np.maximum(lesion, vessel), (1, 1, 1), (0, 0, 0))
    s, _ = seconded(click_package, make_package, image, lambda batch: (batch[:, 0] > 0.1).astype(np.float32))
    s.add_point(at(s, *centre))
    assert Box.around(s.mask).stop[2] <= 37 + 10 and s.mask[15, 30, 37:].any()


def test_what_a_second_opinion_says_does_not_depend_on_earlier_clicks(click_package, make_package):
    shape = (30, 80, 80)
    values = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32) + ball(shape, (15, 36, 36), 7, (1, 1, 1))
    image = Image(values, (1, 1, 1), (0, 0, 0))
    prompts = [("point", 36.0, 36.0, 15.0, True), ("point", 46.0, 36.0, 15.0, True), ("point", 36.0, 45.0, 15.0, False)]
    around = seconded(click_package, make_package, image)[0]
    around.replay(prompts)
    around.replay(prompts[:1])
    around.replay([prompts[0], prompts[2]])
    straight, second = seconded(click_package, make_package, image)
    straight.replay([prompts[0], prompts[2]])
    assert np.array_equal(around.mask, straight.mask)
    runs = len(second.batches)
    straight.undo()
    straight.replay([prompts[0], prompts[2]])
    assert len(second.batches) == runs  # what is known is not run again


def test_a_second_opinion_keeps_so_many_bytes(click_package, make_package, monkeypatch):
    image = Image(ball((30, 80, 80), (15, 36, 36), 7, (1, 1, 1)), (1, 1, 1), (0, 0, 0))
    masks = []
    for limit in (1 << 30, 50_000):
        monkeypatch.setattr("UNetSegmentationLib.inference.second._KEPT", limit)
        s, _ = seconded(click_package, make_package, image)
        s.add_point(at(s, 15, 36, 36))
        masks.append(s.mask)
        parts = [part.nbytes for part in s._second._known.values()]
        assert parts and (sum(parts) > 100_000) == (limit > 50_000) and sum(parts) < limit + max(parts)
    assert np.array_equal(*masks)


@pytest.mark.parametrize("spacing, asked", [((1, 1, 3), True), ((1, 1, 3.1), False), ((1.3, 1, 1), False), ((1, 1, 0.5), True)])
def test_a_second_opinion_is_asked_where_slices_are_as_it_knows_them(click_package, make_package, spacing, asked):
    shape = (30, 60, 60)
    image = Image(ball(shape, (15, 30, 30), 8, spacing), spacing, (0, 0, 0))
    s, second = seconded(click_package, make_package, image, context_slices=1)
    s.add_point(at(s, 15, 30, 30))
    assert s.mask.any() and {b.shape[1] for b in second.batches} == ({3} if asked else set())


def test_outside_of_what_was_scanned_there_is_no_second_opinion(click_package, make_package):
    values = ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1))
    values[:, :12] = np.nan  # beyond the click model's patch
    s, second = seconded(click_package, make_package, Image(values, (1, 1, 1), (0, 0, 0)))
    assert s.add_point(at(s, 15, 30, 30)).found and not second.batches


def test_without_its_second_opinion_a_model_says_so(click_package, make_package, monkeypatch):
    image = Image(ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1)), (1, 1, 1), (0, 0, 0))
    s = ClickSession(image, click_package(second_opinion="not-there-1.0.0"), Recording())
    answer = s.add_point(at(s, 15, 30, 30))
    assert answer.found and "no model 'not-there-1.0.0'" in answer.text and "less exact" in answer.text
    monkeypatch.setattr(click, "find_model", lambda name: click_package())
    with pytest.raises(UserError, match="is no model of axial slices with one label and fixed intensities"):
        click.second_opinion(click_package(second_opinion="toy-1.0.0").card)


def test_a_second_opinion_heeds_a_negative_click_before_the_first_positive_one(click_package, make_package):
    lesion, inner = (ball((30, 60, 60), (15, 30, x), r, (1, 1, 1)) for x, r in ((30, 6), (27, 4)))
    image = Image((0.45 * lesion + 0.1 * inner).astype(np.float32), (1, 1, 1), (0, 0, 0))
    s, second = seconded(click_package, make_package, image, lambda batch: (batch[:, 0] > 0.3).astype(np.float32))
    alone = ClickSession(image, click_package(), Recording())
    for each in (s, alone):
        each.add_point(at(s, 15, 30, 35), positive=False)
        each.add_point(at(s, 15, 30, 27))
    assert second.batches and s.mask.any() and not np.any(s.mask & ~alone.mask)


def test_a_second_opinion_that_cannot_run_is_done_without(click_package, make_package, monkeypatch):
    def fail(*_):
        raise UserError("no engine for it.")

    monkeypatch.setattr(click, "find_model", lambda name: slice_package(make_package))
    monkeypatch.setattr(click, "choose_engine", fail)
    image = Image(ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1)), (1, 1, 1), (0, 0, 0))
    answer = (s := ClickSession(image, click_package(second_opinion="slices-1.0.0"), Recording())).add_point(at(s, 15, 30, 30))
    assert answer.found and "no engine for it. Without it" in answer.text


def test_a_box_and_a_second_click_are_believed_where_one_click_is_not(click_package, session):
    values = np.full((60, 80, 80), -900, np.float32)
    lesion = ball(values.shape, (30, 40, 40), 6, (1, 1, 1)) > 0
    values[lesion] = -90  # fat
    s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording())
    assert "draw a box" in s.add_point(at(s, 30, 40, 40)).text
    assert s.add_box(at(s, 23, 33, 33), at(s, 37, 47, 47)).found and dice(s.mask, lesion) > 0.8
    s = session(np.zeros((30, 60, 60), np.float32))  # the network sees nothing at all
    assert not s.add_point(at(s, 15, 30, 30)).found
    assert s.add_point(at(s, 15, 30, 32)).found and s.mask[15, 30, 30] and s.mask[15, 30, 32]
    s.clear()
    assert not s.add_box(at(s, 12, 26, 26), at(s, 18, 34, 34)).found
    assert s.add_point(at(s, 15, 30, 30)).found and s.mask[15, 30, 30]


def test_what_was_not_clicked_on_stays_out_though_it_lies_within(session):
    shape, centre = (30, 60, 60), (15, 30, 30)
    inner, outer = ball(shape, centre, 1, (1, 1, 1)), ball(shape, centre, 5, (1, 1, 1)) - ball(shape, centre, 3, (1, 1, 1))
    s = session(inner + outer)
    s.add_point(at(s, 15, 30, 35))
    assert np.array_equal(s.mask, outer)
    s.add_point(at(s, 15, 30, 35), positive=False)
    assert not s.mask[15, 30, 35]  # of two on one voxel the later one


def test_a_negative_click_far_away_changes_nothing_and_outside_is_refused(session):
    array = ball((30, 60, 90), (15, 30, 20), 4, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 15, 30, 20))
    assert s.add_point(at(s, 15, 30, 80), positive=False).zoom == 1 and np.array_equal(s.mask, array)
    for outside in (-0.6, 29.6):
        with pytest.raises(UserError, match="outside the image"):
            s.add_point(at(s, outside, 30, 20))


def test_any_value_of_a_drawn_mask_marks_and_a_small_one_is_seen_from_near(session):
    s = session(np.zeros((20, 40, 40), np.float32))
    s._engine = Recording(lambda batch: batch[:, 4])
    s.set_mask(3 * ball((20, 40, 40), (10, 20, 20), 2, (1, 1, 1)))
    assert s.mask.max() == 1 and s.add_point(at(s, 10, 20, 20)).zoom == ZOOMS[0]


def test_in_a_box_a_closer_look_needs_no_lung(click_package):
    values = np.zeros((60, 80, 80), np.float32)
    values[0] = -1000
    lesion = ball(values.shape, (30, 40, 40), 5, (1, 1, 1)) > 0
    values[lesion] = 500
    s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording(lambda batch: np.where(batch[:, 0] > 0.8, 1.0, 0.0)))
    assert s.add_box(at(s, 20, 20, 20), at(s, 40, 60, 60)).zoom <= 1.5 and dice(s.mask, lesion) > 0.8


def test_a_mask_at_the_patchs_first_voxels_is_whole_where_the_image_ends_there(session):
    array = np.zeros((30, 60, 60), np.float32)
    array[:14, 26:34, 26:34] = 1
    s = session(array)
    assert s.add_point(at(s, 8, 30, 30)).zoom == 1 and np.array_equal(s.mask, array)


@pytest.mark.parametrize("kind", ["whole", "moved", "small", "elsewhere", "endless", "fat", "buried", "boxed"])
def test_what_a_part_hangs_together_with_is_taken_only_where_it_may_be_a_mass(click_package, monkeypatch, kind):
    """From near the network sees a lesion of its own, from the furthest look what it hangs together with."""
    shape = (100, 150, 170)
    part = ball(shape, (50, 75, 106), 6 if kind == "small" else 9, (1, 1, 1)) > 0
    mass = np.zeros(shape, bool)
    mass[35:66, slice(10, 141) if kind == "endless" else slice(50, 101), 54 if kind == "moved" else 70 : 101] = True
    if kind == "elsewhere":
        mass &= ball(shape, (50, 75, 106), 14, (1, 1, 1)) == 0
    values = np.where(part, 400, np.where(mass, -90 if kind == "fat" else 50, -900)).astype(np.float32)
    if kind == "buried":  # in what is no lung, but for the part
        values[..., :102][values[..., :102] == -900] = -480
    looks, run = [], ClickSession._run
    monkeypatch.setattr(ClickSession, "_run", lambda self, frame, *rest, **more: looks.append(frame[1]) or run(self, frame, *rest, **more))

    def answer(batch):
        far = (batch[:, 0] > 0.35) & ~((batch[:, 0] > 0.7) & (kind == "elsewhere"))
        return np.where(far if looks[-1] == ZOOMS[-1] else batch[:, 0] > 0.7, 1.0, 0.0)

    s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording(answer))
    s.add_box(at(s, 45, 68, 100), at(s, 55, 82, 112)) if kind == "boxed" else s.add_point(at(s, 50, 75, 106))
    assert dice(s.mask, (mass | part) if kind in ("whole", "moved") else part) > 0.8


def test_what_the_click_model_is_sure_of_does_not_silence_the_second_opinion(click_package, make_package):
    ours, theirs = (ball((30, 60, 60), (15, 30, 30), r, (1, 1, 1)) for r in (5, 6))
    image = Image(2 * ours - theirs, (1, 1, 1), (0, 0, 0))  # log-odds of -30 where only they find it
    s, _ = seconded(click_package, make_package, image, lambda batch: (batch[:, 0] != 0).astype(np.float32))
    s.add_point(at(s, 15, 30, 30))
    assert np.array_equal(s.mask, theirs)


@pytest.mark.parametrize("spacing, shape", [((0.7, 0.9, 0.5), (60, 120, 130)), ((0.8, 0.8, 0.25), (90, 100, 110))])
@pytest.mark.parametrize("context", [0, 1])
def test_a_second_opinion_lies_where_the_patch_asks_for_it(make_package, spacing, shape, context):
    """Log-odds that are linear in the place, of thin slices of which some are left out."""
    z, y, x = np.indices(shape, np.float32)
    image = Image((0.5 + 0.2 * (z / shape[0] + y / shape[1] - 2 * x / shape[2])).astype(np.float32), spacing)
    package, mm = slice_package(make_package, spacing=[0.8, 1.1, None], context_slices=context), np.array(spacing[::-1])
    second = SecondOpinion(package, Recording(lambda batch: batch[:, context]), image)
    for lead, size in ((0.45, 8.0), (0.6, 20.0)):
        middle = lead * np.array(shape)
        box = Box(*(tuple(int(v) for v in middle + way * size / 2 / mm) for way in (-1, 1)))
        grid = Grid((24, 40, 40), tuple(1.1 / mm), tuple(middle - np.array([12, 20, 20]) * 1.1 / mm))
        got = second.margins(box, grid)
        at = [s * np.arange(n) + o for n, s, o in zip(grid.shape, grid.scale, grid.offset)]
        sides = zip(at, box.start, box.stop, (3, 10, 10) / mm, shape)
        near = [(p >= a - m) & (p < b + m) & (p > 4) & (p < n - 11) for p, a, b, m, n in sides]
        inside = near[0][:, None, None] & near[1][:, None] & near[2]
        wanted = 4 * sum(w * p / n for w, p, n in zip((1, 1, -2), np.ix_(*at), shape))
        assert np.abs(got - wanted)[inside].max() < 0.005


def test_which_models_may_be_a_second_opinion_and_which_expect_lung(click_package, make_package, monkeypatch):
    two = [{"value": 1, "name": "a"}, {"value": 2, "name": "b"}]
    volume = {"dimensions": 3, "spacing": [1, 1, 1], "patch": [16, 32, 32], "divisor": [4, 8, 8]}
    for card in ({"axis": "coronal"}, volume, {"intensity": {"mode": "zscore"}}, {"channels": ["T1", "T2"]}, {"labels": two}):
        monkeypatch.setattr(click, "find_model", lambda name, card=card: slice_package(make_package, **card))
        with pytest.raises(UserError, match="is no model of axial slices with one label and fixed intensities"):
            click.second_opinion(click_package(second_opinion="slices-1.0.0").card)
    assert click.expects_lung(click_package(intensity=CT_WINDOW).card)
    assert not click.expects_lung(click_package(intensity={"mode": "window", "level": 40, "width": 400}).card)


def test_lung_around():
    mask = ball((9, 9, 9), (4, 4, 4), 2, (1, 1, 1)) > 0
    for inside, mm, share in ((0.0, 1.0, 1), (0.0, 5.0, 1), (-880.0, 1.0, 0)):  # also on a coarse grid; of lung itself none
        assert click.lung_around(np.where(mask, inside, -900.0), mask, np.full(3, mm)) == share


def test_the_mask_has_the_cards_value(click_package):
    array = ball((30, 60, 60), (15, 30, 30), 5, (1, 1, 1))
    s = ClickSession(Image(array), click_package(labels=[{"value": 3, "name": "thing"}]), Recording())
    s.add_point((30.0, 30.0, 15.0))
    assert np.array_equal(s.prediction().labels.array, 3 * array) and s.measure()["voxels"] == array.sum()


def test_a_click_after_an_undone_mask_sees_what_was_before_the_mask(noisy):
    session, prompts, new = noisy
    session.replay(prompts[:4])  # runs nothing, for the mask decides
    session.replay(wanted := [*prompts[:3], prompts[4]])
    assert np.array_equal(session.mask, one_by_one(new(), wanted))


def test_two_clicks_as_far_apart_as_one_look_shows_are_both_followed(session):
    s = session(np.zeros((40, 60, 120), np.float32))  # the network sees nothing at all
    s.add_point(at(s, 20, 30, 20))
    s.add_point(at(s, 20, 30, 94.7))  # whose voxel lies beyond the patch's last nodes
    assert s.mask[20, 30, 20] and s.mask[20, 30, 95]


def test_what_lies_between_the_images_voxels_alone_is_nothing(click_package):
    def speck(batch):
        out = np.zeros_like(batch[:, 0])
        out[:, 8, 12, 13] = 1
        return out

    s = ClickSession(Image(np.zeros((20, 40, 40), np.float32), (2, 2, 2)), click_package(), Recording(speck))
    assert s.add_point(at(s, 10, 20, 20)).text.startswith("Nothing was found here") and not s.mask.any()


def test_answers_that_share_no_voxel_do_not_agree():
    one, beside, across = (click.Answer(Box((0, 0, a), (1, 1, b)), np.ones((1, 1, b - a), np.uint8)) for a, b in ((0, 4), (6, 20), (3, 5)))
    assert click._agreement(one, beside) == click._agreement(beside, one) == 0 and click._agreement(one, across) == pytest.approx(2 / 6)


def test_a_mask_of_nothing_is_none_and_can_be_undone(session):
    array = ball((20, 40, 40), (10, 20, 20), 4, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 10, 20, 20))
    s.set_mask(np.zeros(array.shape, np.uint8))
    assert not s.answer.found and not s.mask.any() and s.measure()["voxels"] == 0
    assert s.undo().found and np.array_equal(s.mask, array)


def test_warming_runs_both_networks_and_stops_at_nothing(click_package, make_package):
    image = Image(np.ones((30, 60, 60), np.float32), (1, 1, 1), (0, 0, 0))
    s, second = seconded(click_package, make_package, image)
    s.warm()
    assert len(s._engine.batches) == 1 and second.batches and s.prompts == []
    s._engine = Recording(lambda batch: np.full_like(batch[:, 0], np.nan))
    s.warm()  # what is wrong, a click will say
    assert not s.answer.found


def test_a_box_that_reaches_beyond_the_image_ends_with_it(session):
    array = ball((20, 40, 40), (4, 20, 20), 5, (1, 1, 1))
    s = session(array)
    assert s.add_box(at(s, -6, 14, 14), at(s, 10, 26, 26)).found and np.array_equal(s.mask, array)
    with pytest.raises(UserError, match="flat or lies outside the image"):
        s.add_box(at(s, -9, 14, 14), at(s, -2, 26, 26))


def test_an_infinite_value_that_leaves_no_scale_is_said(click_package):
    array = ball((30, 40, 40), (15, 20, 20), 5, (1, 1, 1))
    array[0, 0, 0] = np.inf  # far from the click, and among the highest percent
    with pytest.raises(UserError, match="^The image has 1 voxels that are NaN or infinite"):
        ClickSession(Image(array), click_package(intensity={"mode": "percentile", "low": 1, "high": 99.9985}), Recording())


def test_a_second_opinion_is_shown_as_many_mm_as_it_was_trained_on(click_package, make_package):
    image = Image(1 + ball((30, 200, 200), (15, 100, 100), 4, (0.5, 0.5, 1)), (0.5, 0.5, 1.0), (0, 0, 0))
    first, second = Recording(lambda batch: batch[:, 0] - 1), Recording(lambda batch: batch[:, 0] - 1)
    package = slice_package(make_package, spacing=[1, 1, None])
    ClickSession(image, click_package(second_opinion="slices-1.0.0"), first, second=(package, second)).add_point((50.0, 50.0, 15.0))
    assert second.batches and all(batch.all() for batch in second.batches)  # no padding, for the image goes on


def test_a_negative_click_is_heeded_about_it_whatever_comes_after(session):
    array = ball((20, 40, 40), (10, 20, 20), 6, (1, 1, 1))
    s = session(array)
    s.add_point(at(s, 10, 20, 20))
    s.add_point(at(s, 10, 20, 25), positive=False)
    s.add_point(at(s, 10, 20, 16))
    assert not s.mask[10, 20, 25:].any() and s.mask[10, 20, 14:24].all()


def test_a_box_about_what_goes_on_beyond_the_furthest_look_is_cut_and_said_to_be(session):
    s = session(np.ones((40, 60, 400), np.float32))
    assert s.add_box(at(s, 10, 20, 190), at(s, 30, 40, 210)).text == click.BEYOND and s.mask.any()


@pytest.mark.parametrize("radius, zoom", [(3, ZOOMS[0]), (5, ZOOMS[-1])])  # seen whole from so near that the lung is not, or not
def test_a_closer_look_is_asked_for_lung_where_it_shows_what_lies_around(click_package, monkeypatch, radius, zoom):
    monkeypatch.setattr(click, "lung_around", lambda values, mask, spacing: float(spacing.min() > 1.6))
    values = np.full((120, 160, 160), -900, np.float32)
    values[40:80, 40:120, 40:120] = 0  # the first look is from further away
    values[ball(values.shape, (60, 80, 80), radius, (1, 1, 1)) > 0] = 500
    s = ClickSession(Image(values), click_package(intensity=CT_WINDOW), Recording(lambda batch: np.where(batch[:, 0] > 0.8, 1.0, 0.0)))
    assert s.add_point(at(s, 60, 80, 80)).zoom == zoom


def test_what_is_not_found_or_refused_is_looked_at_once_and_by_one_model(click_package, make_package):
    for hu, text in ((-900, "Nothing was found"), (-90, "What was found here is fat")):
        values = np.full((60, 80, 80), -900, np.float32)
        values[ball(values.shape, (30, 40, 40), 5, (1, 1, 1)) > 0] = hu
        first, second = Recording(), Recording()
        package = click_package(intensity=CT_WINDOW, second_opinion="slices-1.0.0")
        s = ClickSession(Image(values), package, first, second=(slice_package(make_package, intensity=CT_WINDOW), second))
        assert s.add_point(at(s, 30, 40, 40)).text.startswith(text) and len(first.batches) == 1 and not second.batches


def test_a_closer_look_has_its_second_opinion(click_package, make_package):
    ours, theirs = (ball((30, 60, 60), (15, 30, 30), r, (1, 1, 1)) for r in (2, 2.5))
    image = Image(ours + 0.2 * (theirs - ours), (1, 1, 1), (0, 0, 0))
    s, _ = seconded(click_package, make_package, image, lambda batch: (batch[:, 0] > 0.1).astype(np.float32))
    assert s.add_point(at(s, 15, 30, 30)).zoom == ZOOMS[0] and np.array_equal(s.mask, theirs)


@pytest.mark.parametrize("thick, radius, every", [(1, 8, 2), (1, 6, 1), (2, 10, 1), (0.5, 5, 2), (0.5, 8, 4)])
def test_of_thin_slices_and_long_lesions_some_slices_are_left_out(click_package, make_package, thick, radius, every):
    spacing, shape = (1, 1, thick), (int(60 / thick), 80, 80)
    image = Image(ball(shape, (shape[0] // 2, 40, 40), radius, spacing), spacing, (0, 0, 0))
    s, _ = seconded(click_package, make_package, image)
    s.add_point(at(s, shape[0] // 2, 40, 40))
    assert {k for k, _ in s._second._known} == {every}


def test_a_second_opinion_is_asked_of_pixels_and_of_a_depth_that_it_knows():
    for mm, slices, fits in ((1.25, 20, True), (1.26, 20, False), (1, 3, True), (1, 2, False)):  # slices of 0.6 mm
        assert SecondOpinion.fits(Image(np.zeros((slices, 8, 8), np.float32), (1, mm, 0.6))) == fits


def test_the_first_click_stays_inside_whatever_a_negative_one_makes_of_it(session):
    s = session(ball((20, 40, 40), (10, 20, 20), 4, (1, 1, 1)))
    s._engine = Recording(lambda batch: batch[:, 0] * (batch[:, 2].max() < 0.5))  # nothing more, once something is no part of it
    s.add_point(at(s, 10, 20, 20))
    s.add_point(at(s, 10, 20, 28), positive=False)
    assert s.mask[10, 20, 20] and not s.mask[10, 20, 28]


def test_a_model_is_taken_by_its_file(click_package):
    package = click_package(name="other")
    assert ClickSession(Image(np.zeros((20, 40, 40), np.float32)), str(package.path)).card.name == "other"
    with pytest.raises(UserError, match="scalar volume"):
        ClickSession(Image(np.zeros((2, 20, 40, 40), np.float32)), package.path)
