"""Models of clicks on any dataset: what their network is shown, how they are judged, and a retraining from its base to the verdict."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for name in ("monai", "pydantic", "lightning", "yaml"):
    pytest.importorskip(name)

from safetensors.torch import save  # noqa: E402
from test_retrain import At, finished, same, weights  # noqa: E402
from unetseg_training import clicks, finetune, live, metrics, retrain  # noqa: E402
from unetseg_training import config as c  # noqa: E402
from unetseg_training.cases import find_cases  # noqa: E402
from unetseg_training.plan import plan  # noqa: E402
from unetseg_training.prepare import prepare  # noqa: E402
from UNetSegmentationLib import training  # noqa: E402
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.engines import choose_engine  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image  # noqa: E402
from UNetSegmentationLib.inference import click  # noqa: E402
from UNetSegmentationLib.inference.click import ClickSession  # noqa: E402
from UNetSegmentationLib.measure import dice  # noqa: E402
from UNetSegmentationLib.model import Label, ModelPackage, find_model, write_package  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402
from workers import make_card, make_onnx  # noqa: E402

NODULE = Label(1, "Nodule", (230, 159, 0), {})
CYST, METASTASIS = Label(1, "Cyst", (0, 0, 230), {}), Label(2, "Metastasis", (0, 230, 0), {})
WINDOW = {"mode": "window", "level": -200, "width": 1600}
LUNG, LIVER = -850, 60
SPACING = (1.0, 1.0, 1.5)  # of the scans; the models have 1 mm all around
BALLS = (((8, 10, 10), 4.0), ((13, 26, 24), 5.0))  # centre (z, y, x) in voxels, radius in mm


def scan(values, around=LUNG, shape=(20, 34, 36), seed=0):
    """A CT of noisy balls, and its label map: the first ball is label 1, the second the last label. values: their HU."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    array, mask = rng.normal(around, 15, shape).astype(np.float32), np.zeros(shape, np.uint8)
    for label, (value, (centre, radius)) in enumerate(zip(values, BALLS), 1):
        centre = np.add(centre, rng.integers(-1, 2, 3))
        ball = sum(((g - a) * s) ** 2 for g, a, s in zip(grid, centre, SPACING[::-1])) <= radius**2
        array[ball], mask[ball] = value + rng.normal(0, 15, int(ball.sum())), label
    return Image(array, SPACING), mask


def filled(folder, labels, values, around, count=5):
    made = Dataset.create(folder, folder.name, labels, ["CT"])
    (made.folder / "salt").write_text("5" * 64 + "\n")  # who is held out depends on it
    for i in range(count):
        image, mask = scan(values, around, seed=i)
        made.add(image, np.minimum(mask, len(labels)), name=f"case{i}", patient=f"P{i}")
    return made.folder


@pytest.fixture
def nodules(tmp_path):
    """Two nodules in each of five scans."""
    return filled(tmp_path / "nodules", [NODULE], (40, 40), LUNG)


@pytest.fixture
def livers(tmp_path):
    return filled(tmp_path / "livers", [CYST, METASTASIS], (-60, 200), LIVER)


@pytest.fixture
def base(tmp_path):
    """A package with random weights to train on, whose ONNX finds what is above -200 HU at a click."""
    torch.manual_seed(0)
    network = UNetConfig(dimensions=3, in_channels=5, out_channels=2, channels=(6, 12))
    card = make_card(
        name="nodule-click",
        task="click",
        spacing=[1.0, 1.0, 1.0],
        patch=[16, 16, 16],
        intensity=WINDOW,
        labels=[{"value": 1, "name": "Nodule"}],
        network=network.to_json(),
        description="Finds nodules.",
        display="lung",
    )
    path = tmp_path / "base" / "nodule-click-1.0.0.unet.zip"
    return write_package(path, card, make_onnx("threshold", card), save(build(network).state_dict()))


def settings(dataset, labels=(NODULE,), **fit):
    """A plan that trains in a second or two."""
    return c.parse(
        {
            "model": {"name": "nodule-click", "version": "1.1.0", "task": "click", "surroundings": "lung"},
            "data": {"path": str(dataset), "folds": 2},
            "labels": [{"name": label.name} for label in labels],
            "channels": ["CT"],
            "input": {"patch": [16, 16, 16], "spacing": [1, 1, 1], "intensity": WINDOW},
            "network": {"channels": [6, 12]},
            "fit": {"epochs": 3, "steps": 4, "batch": 4, "warmup": 2, "precision": "32", "accelerator": "cpu", "ema": 0.5, **fit},
        }
    )


def created(dataset, base, **fit):
    job = training.create(dataset, base)
    c.write(settings(dataset, **fit), job.folder / "config.yaml")
    return job


def sampler(dataset, tmp_path, labels=(NODULE,), in_lung=True):
    config = settings(dataset, labels)
    return clicks.Lesions(prepare(find_cases(dataset), config, tmp_path / "cache"), clicks.Look.of(config), in_lung)


# --------------------------------------------------------------------------------------------------------------- samples


def test_a_component_is_a_lesion_and_a_crumb_is_none():
    image, mask = scan((40, 40))
    mask[18:, 30:, 2] = 2
    found = list(clicks.lesions(np.minimum(mask, 2), image.spacing))
    assert [value for value, _, _ in found] == [1, 2, 2]
    for value, box, inside in found:
        assert (mask[box.slices][inside] == value).all()
    mask[1, 1, 1] = 3
    assert len(list(clicks.lesions(mask, image.spacing))) == 3 and len(list(clicks.lesions(mask, (3.0, 3.0, 3.0)))) == 4


def test_samples_show_one_lesion_with_a_click_on_it_or_nothing(livers, tmp_path):
    source = sampler(livers, tmp_path, (CYST, METASTASIS), in_lung=False)
    rng = np.random.default_rng(1)
    samples = [source.fresh(rng) for _ in range(150)]
    marked = [s for s in samples if s.label.any()]
    assert 5 < len(samples) - len(marked) < 45
    kinds = set()
    for s in marked:
        lesion = s.label >= 0.5
        assert len(s.positive) + (s.box is not None) >= 1 and lesion[s.known].any()
        inside = (s.image * 1600 - 1000)[lesion & s.known]
        kinds.add("cyst" if np.median(inside) < 60 else "metastasis")
        assert len(clicks.components(lesion, corners=True)[1]) == 2  # never both of a scan
        if s.positive and s.box is None:
            spots = np.argwhere(lesion)
            assert np.linalg.norm(spots - s.positive[0], axis=1).min() < 4
    assert kinds == {"cyst", "metastasis"}
    again = [source.fresh(r) for r in [np.random.default_rng(1)] for _ in range(5)]
    assert all(np.array_equal(a.channels(), b.channels()) for a, b in zip(samples, again))


def test_clicks_on_nothing_keep_away_from_every_lesion_and_are_on_all_kinds_of_tissue(tmp_path):
    folder = filled(tmp_path / "set", [NODULE], (40, 40), LUNG, 1)
    image, mask = scan((40, 40), shape=(40, 60, 60))
    image.array[:, 50:] = 60  # a wall
    Dataset.open(folder).add(image, np.minimum(mask, 1), name="large", patient="Q")
    source = sampler(folder, tmp_path)
    case, places = next(n for n in source.nowhere if n[0].name == "large")
    assert case.labels[tuple(places.T)].max() == 0
    inside = np.argwhere(np.asarray(case.labels))
    nearest = min(np.linalg.norm((inside - place) * case.spacing, axis=1).min() for place in places)
    assert nearest >= clicks.AWAY_MM
    wall = np.mean(case.values[0][tuple(places.T)] > 0.5)
    assert 0.2 < wall < 0.8  # of the scan it is a sixth
    rng = np.random.default_rng(0)
    for _ in range(30):
        sample = source._nothing(rng)
        if not sample.label.any():
            assert sample.known.any() and sample.positive == [source.look.middle]


def test_what_is_larger_than_a_patch_is_also_shown_from_further_away(tmp_path):
    made = Dataset.create(tmp_path / "set", "set", [NODULE], ["CT"])
    grid = np.indices((60, 60, 60))
    ball = sum((g - 30) ** 2 for g in grid) <= 15**2
    made.add(Image(np.where(ball, 40, LUNG).astype(np.float32)), ball.astype(np.uint8), patient="P")
    source = sampler(made.folder, tmp_path)
    rng = np.random.default_rng(0)
    shares = [s.label[s.known].mean() for s in (source.fresh(rng) for _ in range(80)) if s.label.any()]
    assert max(shares) > 0.6 and min(shares) < 0.25  # cut off by the patch, and whole


# ----------------------------------------------------------------------------------------------------------- judging


def test_a_lesion_is_played_by_the_clicks_of_a_person(make_package):
    image, mask = scan((40, 40))
    package = make_package(task="click", spacing=[1, 1, 1], patch=[16, 24, 24], intensity=WINDOW)
    session = ClickSession(image, package)
    items = list(clicks.by_lesion(metrics.Item("case", image, mask, "P")))
    assert [i.name for i in items] == ["case, lesion 1", "case, lesion 2"]
    turns = list(clicks.play(session, items[1].truth, clicks.first_click(items[1].truth, "x"), 4))
    assert len(turns) == 4 and turns[0].dice > 0.85 and turns[0].true.sum() == (mask == 2).sum()
    assert turns[-1].dice == dice(session.mask, mask == 2)
    labels = [NODULE, CYST.__class__(2, "Other", (0, 0, 0), {})]
    row, found = clicks.score(session, items[1], labels)
    assert row["label"] == "Other" and row["patient"] == "P" and row["dice"] == dice(found, mask == 2) and row["specificity"] is None
    assert row["hausdorff95_mm"] < 3 and row["dice_3_clicks"] >= row["dice"] - 0.1
    rows = clicks.evaluate(package, [metrics.Item("case", image, mask, "P"), metrics.Item("empty", image, mask * 0, "Q")], labels)
    assert [r["case"] for r in rows] == [i.name for i in items]
    facts = metrics.summary(rows)
    assert set(facts["labels"]) == {"Nodule", "Other"} and facts["labels"]["Nodule"]["dice_3_clicks"]["cases"] == 1
    with pytest.raises(UserError, match="hold no lesion of 10 mm³"):
        clicks.evaluate(package, [metrics.Item("empty", image, mask * 0, "Q")], labels)


def test_validation_clicks_at_held_out_lesions_as_the_whole_scan_would(nodules):
    config = settings(nodules)
    cases = find_cases(nodules)
    held = clicks.HeldOut(cases, cases.cases[:2], config)
    network = build(config.unet()).eval()
    scores = held.score(1, network)
    assert set(scores) == {"1 click", "3 clicks"} and len(held.examples) == 2
    whole = clicks.evaluate(held.package, list(metrics.case_items(cases, cases.cases[1:2])), [NODULE], clicks_engine(network))
    assert scores["1 click"] == pytest.approx(np.mean([r["dice"] for r in whole]))
    image, mask = scan((40, 40), seed=7)
    Dataset.open(nodules).add(image, mask * 0, name="empty", patient="C", allow=("empty",))
    cases = find_cases(nodules)
    empty = [case for case in cases.cases if case.name == "empty"]
    with pytest.raises(UserError, match="hold no lesion"):
        clicks.HeldOut(cases, empty, config).read()
    # Where the few that are read hold none, others do.
    held = clicks.HeldOut(cases, [*empty, *cases.cases[:2]], settings(nodules, validate_cases=1))
    held.read()
    assert held.cases == [cases.cases[0]] and len(held.parts) == 1 and held.parts[0]


def test_many_lesions_share_one_second_opinion(nodules, monkeypatch):
    cases, made = find_cases(nodules), []
    flat, second = settings(nodules).model_dump(mode="json"), find_model("lung-nodule-2d").card

    def choose(package, *how):
        made.append(package.card.name)
        return choose_engine(package, *how)

    for module in (clicks, click):
        monkeypatch.setattr(module, "choose_engine", choose)
    for version, times in ((second.version, ["lung-nodule-2d"]), ("0.0.1", [])):
        config = c.parse({**flat, "model": {**flat["model"], "second_opinion": f"lung-nodule-2d-{version}"}})
        held, network = clicks.HeldOut(cases, cases.cases[:2], config), build(settings(nodules).unet()).eval()
        scores = [held.score(i, network) for i in (0, 1)]  # two lesions each
        assert made == times and np.isfinite([list(s.values()) for s in scores]).all()
        items = list(metrics.case_items(cases, cases.cases[:2]))
        rows = clicks.evaluate(held.package, items, [NODULE], clicks_engine(network))
        assert made == times * 2 and np.mean([r["dice"] for r in rows]) == pytest.approx(np.mean([s["1 click"] for s in scores]))
        made.clear()


def test_models_are_compared_on_held_out_cases_that_hold_a_lesion(nodules):
    made = Dataset.open(nodules)
    for i in range(3):  # in one a crumb, which nobody clicks on
        image, mask = scan((40, 40), seed=9 + i)
        mask[:] = 0
        mask[3, 3, 3:7] = i == 0
        made.add(image, mask, name=f"empty{i}", patient=f"E{i}", split="test", allow=("empty",))
    made._commit(lambda data: data["cases"]["case3"].update(split="validation"))
    cases = find_cases(nodules)
    assert [c.name for c in retrain._held_out(cases, True, True)] == ["case3"]
    assert [c.name for c in retrain._held_out(cases, True)] == ["empty0", "empty1", "empty2"]  # a model of no clicks finds a crumb


def clicks_engine(network):
    from unetseg_training.train import LiveEngine

    return LiveEngine(network)


# ---------------------------------------------------------------------------------------------------------------- planning


def test_the_plan_keeps_the_rule_of_the_lung_only_where_the_lesions_lie_in_it(nodules, livers, base, tmp_path):
    network = base.card, UNetConfig.from_json(base.card.data["network"])
    for folder, wanted in ((nodules, "lung"), (livers, "any")):
        made = plan(find_cases(folder), folder, quick=True, measure=False, base=network)
        made.write(tmp_path / "run")
        assert c.read(tmp_path / "run") == made.config
        card = made.config.card()
        assert card["task"] == "click" and card["surroundings"] == wanted and card["intensity"] == WINDOW
        assert made.config.unet().in_channels == 5 and made.config.unet().out_channels == 2 and made.config.fit.batch == 8
        assert "of the 10 lesions have lung around them" in (tmp_path / "run" / "plan.md").read_text("utf-8")
    (label,) = card["labels"]
    assert label["name"] == "Cyst or Metastasis" and label["value"] == 1
    start = finetune.start_from(base, made.config.unet(), [label["name"]], ["CT"], made.config.input.spacing, WINDOW)
    assert not start.new and not start.partly
    assert "what is clicked on is Cyst or Metastasis and no longer Nodule" in start.sentence


def test_more_nodules_make_a_new_version_of_the_same_model(nodules, base):
    job = training.create(nodules, base)
    cases, facts = retrain._cases(job.folder, job)
    network = base.card, UNetConfig.from_json(base.card.data["network"])
    data = plan(cases, nodules, measure=False, base=network).config.model_dump(mode="json")
    named = retrain._named(job, base, cases, facts, data)
    assert named["name"] == "nodule-click" and named["version"] == "1.1.0" and named["task"] == "click" and named["surroundings"] == "lung"
    assert named["description"] == "Finds nodules." and named["display"] == "lung"


def test_a_click_model_sees_one_image(tmp_path, base):
    made = Dataset.create(tmp_path / "two", "two", [NODULE], ["CT", "PET"])
    image, mask = scan((40, 40))
    made.add(image.like(np.stack([image.array] * 2)), np.minimum(mask, 1), patient="P")
    network = base.card, UNetConfig.from_json(base.card.data["network"])
    with pytest.raises(UserError, match=r"nodule-click is clicked on in one image, and each case has 2 \(CT, PET\)"):
        plan(find_cases(made.folder), made.folder, measure=False, base=network)
    flat = {**settings(tmp_path).model_dump(mode="json"), "channels": ["CT", "PET"]}
    with pytest.raises(UserError, match="3D, sees one image"):
        c.parse(flat)


# --------------------------------------------------------------------------------------------------------------- the whole


def test_from_nodules_to_lesions_of_the_liver_by_the_command(livers, base, models_folder, command):
    code, out, err = command("finetune", livers, "--from", base.path, "--quick", "--minutes", "0.1", "--device", "cpu")
    assert code == 0, err
    (job,) = training.jobs(livers)
    assert job.state == "finished" and job.name == "livers" and job.package.name == "livers-0.1.0.unet.zip"
    result = job.result
    assert "held-out lesions of 1 patient, after one click" in result["sentence"] and job.text == result["sentence"]
    assert result["cases"] == 2 and result["task"] == "click" and set(result["labels"]) == {"Cyst", "Metastasis"}
    figures = result["labels"]["Cyst"]
    assert set(figures) == {"dice", "hausdorff95_mm", "volume_error_percent", "dice_3_clicks", "present", "missed", "false"}
    # The base marks everything that is not lung, so it finds nothing that ends.
    assert figures["dice"]["before"]["mean"] == 0 and 0 <= figures["dice"]["after"]["mean"] <= 1
    worst = result["worst"][0]
    assert worst["case"].startswith("case") and ", lesion " in worst["case"]
    masks = {key: read_image(job.folder / file).array for key, file in worst["files"].items() if key != "image"}
    assert set(np.unique(masks["truth"])) == {0, 1} and set(masks) == {"truth", "before", "after"}
    package = ModelPackage.read(job.package)
    card = package.card.data
    assert card["task"] == "click" and card["surroundings"] == "any" and not card.get("description")
    assert [label.name for label in package.card.labels] == ["Cyst or Metastasis"] and "display" not in card
    assert card["lineage"]["parent"]["name"] == "nodule-click" and card["lineage"]["parity"]["largest_difference"] < 1e-4
    assert set(card["metrics"]["dice"]) == {"Cyst", "Metastasis"} and "after one click" in card["metrics"]["held_out"]
    validations = [line for line in live.read(job.live) if line["event"] == "validation"]
    assert set(validations[-1]["dice_per_class"]) == {"1 click", "3 clicks"}
    assert (job.folder / "report.html").is_file()
    # It runs, and neither takes its base's place.
    image, mask = scan((-60, 200), LIVER)
    ClickSession(image, package).add_point(image.index_to_point((10, 10, 8)))
    assert command("promote", job.folder, "use", "--worse")[0] == 0
    assert [p.name for p in models_folder.glob("*.zip")] == ["livers-0.1.0.unet.zip"] and not (models_folder / "former").exists()


def test_it_learns_and_says_nothing_where_there_is_nothing(nodules, base):
    job = finished(created(nodules, base, epochs=2, steps=80, learning_rate=1e-2, validate_every=2, ema=0.9))
    assert job.state == "finished", job.text
    after = job.result["mean"]["dice"]["after"]
    assert after["mean"] > 0.6, job.text
    package = ModelPackage.read(job.package)
    image, _ = scan((40, 40), seed=9)
    session = ClickSession(image, package)
    assert session.add_point(image.index_to_point((10, 10, 8))).found
    session.clear()
    assert not session.add_point(image.index_to_point((30, 6, 4))).found
    assert json.loads((job.folder / "metrics.json").read_text("utf-8"))["summary"]["labels"]["Nodule"]["dice_3_clicks"]


def test_stopped_it_keeps_the_best_and_goes_on_exactly(nodules, base, monkeypatch):
    whole = finished(created(nodules, base))
    assert whole.state == "finished", whole.text
    with monkeypatch.context() as m:
        At(m, 10, lambda told: (told.folder / "stop").touch())  # in the third epoch
        job = finished(created(nodules, base))
    assert job.state == "stopped" and job.package.is_file() and job.resumable
    job = finished(training.resume(job, launch=False))
    assert job.state == "finished" and same(weights(job), weights(whole))


def test_a_run_of_plan_and_fit_and_its_other_commands(nodules, base, tmp_path, command):
    run = tmp_path / "run"
    c.write(settings(nodules, epochs=1), run / "config.yaml")
    code, out, err = command("finetune", nodules, "--from", base.path, "-o", run, "--resume")
    assert code == 0, err
    leaf = run / "fold0-seed0"
    assert "1 click" in out and (leaf / "report.html").is_file()
    code, out, err = command("evaluate", leaf)
    assert code == 0 and "dice_3_clicks" in out and (leaf / "pictures" / "worst.json").is_file(), err
    code, out, err = command("export", leaf, "--base", base.path)
    assert code == 0 and ModelPackage.read(leaf / "nodule-click-1.1.0.unet.zip").card.data["task"] == "click", err
    code, out, err = command("finetune", nodules, "--from", base.path, "-o", run, "--resume", "--replay", nodules)
    assert code == 2 and "without its base's cases" in err


def test_without_lesions_to_compare_on_it_says_so(nodules, base):
    cases = find_cases(nodules)
    image, mask = scan((40, 40))
    cases.load = lambda case: (image, mask * 0)
    with pytest.raises(UserError, match="hold no lesion"):
        retrain.compare(base, base, cases, cases.cases)


def test_a_few_lesions_outside_do_not_end_the_rule_of_the_lung_nor_a_few_inside_make_it(base):
    from test_plan import cases, of
    from unetseg_training.plan import fingerprint

    case_set, network = cases(labels=("Nodule",), channels=("CT",), low=-1000.0), UNetConfig.from_json(base.card.data["network"])
    found = fingerprint(case_set)
    kept = []
    for found.in_lung in ((0, 0), (10, 20), (18, 20), (19, 20), (20, 20)):
        kept.append(of(case_set, found=found, base=(base.card, network)).config.model.surroundings == "lung")
    assert kept == [False, False, False, True, True]


def test_a_click_on_nothing_teaches_nothing_of_the_lesions_that_it_shows(nodules, tmp_path):
    source, rng = sampler(nodules, tmp_path, in_lung=False), np.random.default_rng(0)
    samples = [source._nothing(rng) for _ in range(30)]
    bright = [s.image > 0.5 for s in samples]  # of a nodule 0.65, of the lung 0.1
    assert sum(b.any() for b in bright) > 5 and not any((b & s.known).any() for b, s in zip(bright, samples))


def test_lesions_hang_together_by_their_corners():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[1:4, 1:4, 1:4] = labels[4:7, 4:7, 4:7] = 1
    assert len(list(clicks.lesions(labels, (1.0, 1.0, 1.0)))) == 1


def test_averaged_slices_are_as_thick_as_they_say():
    rng = np.random.default_rng(0)
    mask = np.zeros((12, 6, 6), bool)
    mask[2:10, 1:5, 1:5] = True
    made = clicks.thick(clicks.Scan(mask.astype(np.float32), mask, np.array([1.0, 0.7, 0.7])), rng, 1.0)
    k = len(mask) // len(made.values)
    assert k > 1 and made.spacing.tolist() == [k, 0.7, 0.7]


@pytest.mark.parametrize("intensity", [{"mode": "zscore"}, {"mode": "percentile", "low": 1, "high": 99}])
def test_what_is_normalised_by_the_whole_image_is_kept_whole(tmp_path, intensity):
    made = Dataset.create(tmp_path / "set", "set", [NODULE], ["MR"])
    image, mask = scan((40, 0), shape=(20, 34, 180))
    made.add(image, (mask == 1).astype(np.uint8), name="one", patient="P")
    flat = settings(made.folder).model_dump(mode="json")
    config = c.parse({**flat, "channels": ["MR"], "input": {**flat["input"], "intensity": intensity}})
    cases = find_cases(made.folder)
    held = clicks.HeldOut(cases, cases.cases, config)
    held.read()
    assert held.parts[0][0].image.shape == image.shape


def test_two_devices_click_at_other_samples(nodules, tmp_path):
    from unetseg_training import train

    job = train.make_job(settings(nodules), tmp_path / "cache")
    one, other = (job.source(rank, 2).batch(0)[0] for rank in (0, 1))
    assert one.shape[0] == 2 and not torch.equal(one, other)


def test_a_correction_keeps_away_from_what_nobody_has_judged():
    label, known = np.zeros((3, 9, 9), bool), np.ones((3, 9, 9), bool)
    predicted = label.copy()
    predicted[:, 1:4, 1:4], known[:, 1:4, 1:4] = True, False
    assert clicks.correction(predicted, label, known, None, np.ones(3)) is None


def test_nothing_is_learnt_where_nothing_is_known():
    logits = torch.zeros(1, 2, 2, 2, 2)
    target = torch.zeros(1, 2, 2, 2, 2)
    target[:, 1, 0] = 1
    before = clicks.loss(logits, target)
    logits[:, 1, 1] = 9
    assert torch.equal(before, clicks.loss(logits, target))
