"""Augmentation: image and mask stay one, nothing is drawn from anywhere but the seed, and pictures show it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("pydantic")

from unetseg_training import config as c  # noqa: E402
from unetseg_training import transforms as t  # noqa: E402
from unetseg_training.prepare import Prepared  # noqa: E402
from unetseg_training.sampling import Patches, cut  # noqa: E402

PATCHES = {2: (48, 64), 3: (32, 40, 48)}


def configuration(dims=3, **changes):
    data = {"dimensions": dims, "patch": PATCHES[dims], "flip_axes": ["x", "y"], "intensity": {"mode": "window", "level": 0, "width": 1}}
    base = {"data": {"path": "-"}, "labels": [{"name": "a"}, {"name": "b"}], "channels": ["CT"], "network": {"channels": [4, 8]}}
    return c.parse({**base, "input": {**data, **changes.pop("input", {})}, **changes})


def prepared(values, labels, spacing=(1.0, 1.0, 1.0), low=-0.5, high=1.5):
    """A case in memory; values (z, y, x)."""
    counts = tuple(int((labels == k).sum()) for k in range(3))
    arrays = {"values": values[None].astype(np.float16), "labels": labels.astype(np.uint8)}
    arrays |= {f"places_{k}": np.argwhere(labels == k).astype(np.int32) for k in (1, 2)}
    ends = [np.array([v], np.float32) for v in (low, high)]
    return Prepared("made", "one", None, "-", labels.shape, spacing, *ends, counts, arrays)


def fiducials(shape=(60, 80, 90), dims=3):
    """Balls (2D: discs) of radius 4, 1 in the image where the mask has 1; between them -0.2 and 0."""
    grid = np.indices(shape).astype(float)
    labels = np.zeros(shape, np.uint8)
    steps = (1 if dims == 2 else 20, 20, 20)
    for centre in np.ndindex(*[max(1, n // s) for n, s in zip(shape, steps)]):
        at = [i * s + (0 if s == 1 else 10) for i, s in zip(centre, steps)]
        labels |= (sum((g - a) ** 2 for g, a, s in zip(grid, at, steps) if s > 1) <= 16).astype(np.uint8)
    return prepared(labels - 0.2 * (1 - labels.astype(float)), labels)


def spots(mask):
    """Centroids of the components of a mask that do not touch its border."""
    from UNetSegmentationLib.postprocess import components

    three = mask if mask.ndim == 3 else mask[None]
    labelled, counts = components(three)
    out = []
    for k in range(1, len(counts)):
        at = np.argwhere(labelled == k)[:, 3 - mask.ndim :]
        if counts[k] > 20 and (at.min(0) > 0).all() and (at.max(0) < np.array(mask.shape) - 1).all():
            out.append(at.mean(0))
    return np.array(out)


@pytest.mark.parametrize("dims", [2, 3])
def test_every_transform_keeps_image_and_mask_together(dims):
    config = configuration(dims)
    case = fiducials(dims=dims)
    moved = set()
    plain = None
    for name, kind in {**t.alone(config), "all": config}.items():
        steps, margin = t.make(kind, (1.0,) * dims)
        shifts = []
        for seed in range(4):
            steps.set_random_state(seed)
            out = steps(cut(case, (30, 40, 45), kind, margin))
            image, label = out["image"][0].numpy(), out["label"][0].numpy()
            assert image.shape == label.shape == config.input.patch and set(np.unique(label)) <= {0, 1}
            if plain is None:
                plain = label
            if (label != plain).any():
                moved.add(name)
            found = spots((image - image.min()) / (image.max() - image.min()) > 0.5)
            true = spots(label > 0.5)
            assert len(true) >= 2, name
            shifts += [min(found - at, key=np.linalg.norm) for at in true]
        # Of sampling at half the resolution a ball may be off by half a voxel; nothing may be off the same way everywhere.
        assert np.linalg.norm(shifts, axis=1).max() < 0.8 and np.abs(np.mean(shifts, 0)).max() < 0.15, (name, shifts)
    assert moved == {"warp", "elastic", "flips", "all"}


def test_two_things_at_the_strengths_asked_for():
    config = configuration()
    warp = t.Warp(config.augmentation, config.input.patch, (1.0, 1.0, 1.0))
    warp.set_random_state(0)
    turns, scales, fields = [], [], []
    while len(turns) < 100 or len(fields) < 12:
        warp.randomize()
        if warp.turns:
            turns.append(np.degrees(warp.turns))
            scales.append(warp.scale)
        if warp.noise is not None and len(fields) < 12:
            fields.append(warp._field(warp.noise))
    assert 12 < np.abs(turns).max() <= 15 and 0.9 <= min(scales) < 0.92 and 1.08 < max(scales) <= 1.1
    # alpha 34 and sigma 10 shift a pixel by 0.55 as a rule (Simard et al.), here as with MONAI's own 2D recipe.
    field = torch.stack(fields)
    assert t.elastic_deviation(34, 10) == pytest.approx(0.5537, abs=1e-3)
    assert field.std((0, 2, 3, 4)).tolist() == pytest.approx([0.5537] * 3, rel=0.25)
    # Smooth: neighbours hardly differ, and half a patch away nothing is left of it.
    near = (field[..., 1:] - field[..., :-1]).std() / field.std()
    assert near < 0.12


def test_thick_slices_are_turned_in_mm_not_in_voxels():
    """A ball in mm stays a ball; turned in voxels, it would be sheared."""
    spacing, shape = (4.0, 1.0, 1.0), (24, 96, 96)
    grid = [(g - (n - 1) / 2) * s for g, n, s in zip(np.indices(shape), shape, spacing)]
    labels = (sum(g**2 for g in grid) <= 20**2).astype(np.uint8)
    config = configuration(input={"patch": (16, 64, 64)}, augmentation={"rotation": 40, "warp_probability": 1, "elastic_probability": 0})
    warp, *_ = t.make(config, spacing)[0].transforms
    case = prepared(labels.astype(float), labels, spacing)
    margin = warp.margin()
    for seed in range(4):
        warp.set_random_state(seed)
        out = warp(cut(case, (12, 48, 48), config, margin))["label"][0].numpy()
        at = np.argwhere(out > 0) * spacing
        deviations = np.sqrt(np.linalg.eigvalsh(np.cov(at.T)))
        assert deviations.max() / deviations.min() < 1.12, seed


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_beyond_the_patch_is_read_and_not_black(dims):
    labels = np.zeros((80, 140, 150), np.uint8)
    labels[40, 70, 75] = 1
    case = prepared(np.ones(labels.shape), labels)
    config = configuration(dims, augmentation={"rotation": 15, "warp_probability": 1, "elastic_probability": 1})
    steps, margin = t.make(config, (1.0,) * dims)
    for seed in range(10):
        steps.set_random_state(seed)
        out = steps.transforms[0](cut(case, (40, 70, 75), config, margin))
        assert out["image"].min() > 0.99, seed


def test_the_window_is_clipped_after_it_was_moved():
    config = configuration(augmentation={"window_jitter": 0.2, "window_jitter_probability": 1})
    values = np.linspace(-3, 3, 32 * 40 * 48).reshape(32, 40, 48)
    case = prepared(values, np.ones((32, 40, 48), np.uint8), low=0.0, high=1.0)
    still, _ = t.make(config, (1, 1, 1), random=False)
    fixed = still(cut(case, (16, 20, 24), config, (0, 0, 0)))["image"]
    assert torch.allclose(fixed, torch.from_numpy(values).float().clip(0, 1), atol=1e-2)
    window = t.Window(0.2, 1.0)
    window.set_random_state(3)
    moved = window(cut(case, (16, 20, 24), config, (0, 0, 0)))["image"]
    assert (moved.min(), moved.max()) == (0, 1) and (moved - fixed).abs().max() > 0.02
    for modes, chance in ((("zscore",), 0), (("window",), 1)):
        intensity = {"mode": modes[0], **({"level": 0, "width": 1} if chance else {})}
        steps, _ = t.make(configuration(input={"intensity": intensity}, augmentation={"window_jitter_probability": 1}), (1, 1, 1))
        assert next(s for s in steps.transforms if isinstance(s, t.Window)).probability == chance  # CT alone


def test_patches_come_from_the_seed_and_the_number_alone():
    config = configuration(fit={"batch": 6, "foreground": 0.5})
    cases = [fiducials(), fiducials((40, 60, 70))]
    whole = Patches(cases, config, 5)
    whole.batch(0)
    x, y = whole.batch(3)
    assert x.shape == (6, 1, 32, 40, 48) and y.dtype == torch.int64 and y.shape == (6, 32, 40, 48)
    halves = [Patches(cases, config, 5, (rank, 2)).batch(3) for rank in (0, 1)]
    for rank, (xs, ys) in enumerate(halves):
        assert torch.equal(xs, x[rank::2]) and torch.equal(ys, y[rank::2])
    assert not torch.equal(Patches(cases, config, 6).batch(3)[0], x)


@pytest.mark.parametrize("batch, foreground, near", [(1, 0.5, 15), (1, 0.67, 20), (3, 0.5, 45), (10, 0.3, 90)])
def test_of_any_batch_the_part_asked_for_is_about_a_label(batch, foreground, near):
    config = configuration(fit={"batch": batch, "foreground": foreground})
    labels = np.zeros((64, 80, 96), np.uint8)
    labels[0, 0, 0] = 1
    source = Patches([prepared(labels, labels)], config, 0)
    centres = np.array([[source.draw(step, i)[1] for i in range(batch)] for step in range(30)])
    counts = (centres <= [8, 10, 12]).all(2).sum(1)  # within a quarter of the patch; by chance one in 400
    assert abs(counts.sum() - near) <= 1 and counts.max() - counts.min() <= 1 + (batch == 10)


def test_labels_are_drawn_alike_however_rare_and_replay_as_often_as_asked():
    config = configuration(fit={"batch": 10, "foreground": 1.0})
    rare = np.zeros((40, 50, 60), np.uint8)
    rare[:20], rare[20, 25, 30] = 1, 2
    common = np.where(np.indices(rare.shape)[0] < 20, 1, 0).astype(np.uint8)
    cases = [prepared(rare, rare), *[prepared(common, common) for _ in range(4)]]
    base = prepared(common, common)
    base.name = "base"
    source = Patches(cases, config, 0, replay=[base], share=0.25)
    drawn = [source.draw(step, i) for step in range(40) for i in range(10)]
    assert 0.18 < np.mean([case.name == "base" for case, *_ in drawn]) < 0.32
    own = [(case, at) for case, at, _ in drawn if case.name != "base"]
    assert 0.4 < np.mean([case is cases[0] for case, _ in own]) < 0.75  # its label is one of two, and it holds the other as well
    # Within a quarter of the patch of a voxel of the label.
    close = [np.abs(at - [20, 25, 30]) <= [8, 10, 12] for case, at in own if case is cases[0]]
    assert np.mean(np.all(close, 1)) > 0.6


def test_a_slice_comes_with_its_neighbours_and_the_last_ones_repeat():
    config = configuration(2, input={"context_slices": 1, "patch": (16, 16), "axis": "axial"})
    values = np.arange(5).reshape(5, 1, 1) * np.ones((5, 20, 20))
    case = prepared(values, np.zeros(values.shape, np.uint8), low=-9, high=9)
    for z, seen in ((0, [0, 0, 1]), (2, [1, 2, 3]), (4, [3, 4, 4])):
        assert cut(case, (z, 10, 10), config, (0, 0))["image"][:, 8, 8].tolist() == seen


@pytest.mark.parametrize("dims", [2, 3])
def test_beyond_the_edge_lies_what_predict_shows_there(dims):
    """The mirror, of one target over two pixels only, and its labels."""
    values = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    case = prepared(values, values % 3)
    values = values if dims == 3 else values[2]
    whole = [[4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1], [3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2], [2, 1, 0, 1, 2, 3, 4, 5, 6, 5, 4, 3]]
    close = [[0, 1, 2, 1, 0, 1, 2, 3, 4, 3, 2, 3], [1, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 4], [2, 1, 0, 1, 2, 3, 4, 5, 6, 5, 4, 5]]
    for model, at in (({}, whole), ({"extent": "box"}, close), ({"roi_mm": 5}, close)):
        config = configuration(dims, input={"patch": (8,) * dims, "padding": "reflect", "axis": "axial"}, model=model)
        made, wanted = cut(case, (2, 3, 4), config, (2,) * dims), values[np.ix_(*at[-dims:])]
        assert np.array_equal(made["image"][0], wanted) and np.array_equal(made["label"][0], wanted % 3)


@pytest.mark.parametrize("axis, flips", [("axial", [0, 1]), ("coronal", [1]), ("sagittal", [1])])
def test_flips_follow_the_plane(axis, flips):
    assert t.flip_axes(configuration(2, input={"axis": axis})) == flips  # of x and y
    assert t.flip_axes(configuration(3)) == [1, 2]


def test_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    shown = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, pixels, **how: shown.append((pixels, how)) or imshow(self, pixels, **how))
    t.draw(configuration(), fiducials(), tmp_path / "a.png", examples=2)
    assert len({(how["vmin"], how["vmax"]) for _, how in shown}) == 1  # or brightness would not show
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    labels = (np.arange(5) == 2).astype(np.uint8).reshape(5, 1, 1) * np.ones((5, 60, 70), np.uint8)
    values = np.arange(5).reshape(5, 1, 1) / 10 + labels * 0
    shown.clear()
    t.draw(configuration(2, input={"context_slices": 1}), prepared(values, labels), tmp_path / "a.png", examples=1)
    assert shown[0][0] == pytest.approx(0.2, abs=1e-3)  # the slice that is learnt, not its neighbour
