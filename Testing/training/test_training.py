"""The training scripts: splits, augmentation, exact resumption, export."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
from unetseg_training import augment, hippocampus_3d, lung_nodule_2d, release  # noqa: E402
from unetseg_training.data import Source, fold_of, hippocampi, lidc_crops, load  # noqa: E402
from unetseg_training.export import export  # noqa: E402
from unetseg_training.fit import Schedule, dice_ce, fit  # noqa: E402
from UNetSegmentationLib.image import Image, UserError, read_image, write_image  # noqa: E402
from UNetSegmentationLib.inference.predict import Options, predict  # noqa: E402
from UNetSegmentationLib.model import RESOURCES, find_model  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402

CONFIG = UNetConfig(dimensions=2, channels=(4, 8), norm="batch")


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.rand((4, 1, 16, 16), generator=g)
    return x, (x[:, 0] > 0.5).long()


def test_a_killed_run_goes_on_exactly_as_if_it_had_not_been_killed(tmp_path):
    schedule = Schedule(steps=6, warmup=1, save_every=3)
    whole = fit(CONFIG, schedule, batch, tmp_path / "whole")

    def dies(step):
        if step == 4:
            raise KeyboardInterrupt
        return batch(step)

    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, schedule, dies, tmp_path / "killed")
    resumed = fit(CONFIG, schedule, batch, tmp_path / "killed")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "curve.jsonl").read_text().splitlines()]
    assert steps == [3, 6]


def test_training_learns(tmp_path):
    fit(CONFIG, Schedule(steps=60, warmup=5, save_every=30, learning_rate=1e-2), batch, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("size", [(40, 48), (24, 28, 32)])
def test_augmentation_keeps_image_and_labels_aligned(size):
    index = np.indices(size)
    ball = (sum(((a - n / 2) / (n / 5)) ** 2 for a, n in zip(index, size)) < 1).astype(np.float32)
    x = torch.from_numpy(np.stack([np.roll(ball, k, -1) for k in (-3, 0, 4)]))[:, None]
    flips = tuple(range(len(size)))
    generator = torch.Generator().manual_seed(0)
    moved, labels = augment.spatial(x, x[:, 0], size, generator, 25, (0.8, 1.2), 2.0, flips)
    assert (labels.float() - x[:, 0]).abs().sum() > 50
    for image, label in zip(moved[:, 0], labels):
        overlap = 2 * ((image > 0.5) & (label == 1)).sum() / ((image > 0.5).sum() + (label == 1).sum())
        assert overlap > 0.95
    brighter = augment.intensity(moved, generator, 0.05, 0.05, 0.1)
    assert brighter.shape == moved.shape and torch.isfinite(brighter).all()


def test_a_flip_without_rotation_is_exact():
    x = torch.rand(8, 1, 6, 10)
    moved, _ = augment.spatial(x, torch.zeros(8, 6, 10), (6, 10), torch.Generator().manual_seed(1), 0, (1, 1), 0, (1,))
    for a, b in zip(x, moved):
        assert torch.allclose(a, b, atol=1e-5) or torch.allclose(a.flip(-1), b, atol=1e-5)


def test_folds_are_fixed_and_split_by_patient():
    patients = [f"P{i:03d}" for i in range(50)]
    fold = fold_of(patients * 2)
    assert fold == fold_of(list(reversed(patients)))
    assert sorted(np.bincount(list(fold.values()))) == [10] * 5


def test_no_patient_is_in_two_folds_and_all_cases_have_one(data):
    crops, cubes, _, fold = lung_nodule_2d.sources()
    assert {s.patient for s in crops} | {s.patient for s in cubes} == set(fold)
    held_out = {s.patient for kind, s, _ in release._cases("lung-nodule-2d")}
    assert held_out == {p for p, f in fold.items() if f == lung_nodule_2d.HELD_OUT}


def test_loss_is_low_for_the_truth_and_high_for_its_opposite():
    target = torch.randint(0, 3, (2, 8, 8))
    right = torch.nn.functional.one_hot(target, 3).movedim(-1, 1) * 20.0
    assert dice_ce(right, target) < 0.05 < 5 < dice_ce(right.roll(1, 1), target)


def test_loading_goes_through_the_cores_geometry(tmp_path):
    values = np.zeros((10, 20, 30), np.int16)
    values[2:5, 3:9, 4:20] = 400
    direction = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
    image = Image(values, (1.0, 1.0, 2.0), direction=direction)
    write_image(image, tmp_path / "i.nrrd")
    write_image(image.like((values > 0).astype(np.uint8)), tmp_path / "m.nrrd")
    case = load(Source(tmp_path / "i.nrrd", tmp_path / "m.nrrd", "p"), (0.5, 0.5, None), {"mode": "window", "level": 0, "width": 800}, 1)
    assert case.values.shape == (1, 10, 40, 60) and case.spacing == (0.5, 0.5, 2.0)
    assert np.array_equal(case.labels > 0, case.values[0] > 0.75)
    assert case.labels[3, -8, -12] == 1 and case.labels[3, 8, 12] == 0  # turned to LPS


def test_samplers_show_the_network_what_its_card_says(data):
    cases = [load(s, lung_nodule_2d.SPACING, lung_nodule_2d.INTENSITY, 1) for s in lidc_crops()[:3]]
    x, y = lung_nodule_2d.Sampler(cases, cases, cases, 8, 0)(0)
    assert x.shape == (8, 3, lung_nodule_2d.PATCH, lung_nodule_2d.PATCH) and y.shape == (8, *x.shape[2:])
    assert set(y.unique().tolist()) <= {0, 1} and y.any()
    again, _ = lung_nodule_2d.Sampler(cases, cases, cases, 8, 0)(0)
    assert torch.equal(x, again)
    brains = [load(s, hippocampus_3d.SPACING, hippocampus_3d.INTENSITY, 2) for s in hippocampi()[:2]]
    x, y = hippocampus_3d.Sampler(brains, 2, 0)(0)
    assert x.shape == (2, 1, *hippocampus_3d.PATCH) and set(y.unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_export_runs_at_any_size_and_equals_pytorch(tmp_path, norm):
    torch.manual_seed(0)
    model = build(UNetConfig(dimensions=2, in_channels=3, channels=(4, 8, 8), norm=norm)).eval()
    rng = np.random.default_rng(0)
    images = [Image(rng.integers(-1000, 400, (3, h, 60)).astype(np.int16)) for h in (50, 130)]
    card = {**release.LUNG_CARD, "divisor": [4, 4], "patch": [64, 48]}

    def drive(package, engine):
        for image in images:
            predict(image, [package], Options(tta="none"), engines=[engine])

    package = export(model, card, tmp_path / "x.unet.zip", drive)
    assert predict(images[1], [package], Options(tta="none")).labels.shape == (3, 130, 60)
    with pytest.raises(UserError, match="differ by"):
        export(model, card, tmp_path / "y.unet.zip", drive, tolerance=0)
    assert not (tmp_path / "y.unet.zip").exists()


def test_bundled_figures_are_those_of_the_results():
    for path in sorted((RESOURCES / "models").glob("*.unet.zip")):
        card = find_model(path).card
        metrics = json.loads((release.RESULTS / card.name / "metrics.json").read_text("utf-8"))
        assert card.data["metrics"] == metrics


def test_bundled_models_reach_their_figures_on_a_few_held_out_cases(data):
    """The whole held-out fold is scored by unetseg_training.release; here, that the shipped file is that model."""
    import csv

    for name in ("lung-nodule-2d", "hippocampus-3d"):
        package = find_model(name)
        with open(release.RESULTS / name / "held_out.csv", newline="", encoding="utf-8") as f:
            rows = {(r["set"], r["case"]): r for r in csv.DictReader(f)}
        for kind, source, boxed in list(release._cases(name))[:12:3]:
            truth = read_image(source.mask)
            box = release.Box.around(truth.array > 0)
            roi = release.twice(box, truth.shape) if boxed else release.Box.whole(truth.shape)
            labels = predict(read_image(source.image), [package], Options(roi=roi)).labels.array
            for label in package.card.labels:
                got = release.dice(labels == label.value, truth.array == label.value)
                assert got == pytest.approx(float(rows[kind, source.image.name][label.name]), abs=0.01)
