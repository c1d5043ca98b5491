"""The bundled models' trainings: folds, what their networks are shown, exact resumption of the clicks' rounds, figures, export."""

import csv
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("lightning", reason="Lightning is not installed")
from unetseg_training import lidc, lung_nodule_2d, lung_nodule_click, release, train  # noqa: E402
from unetseg_training.config import Fit, read  # noqa: E402
from unetseg_training.export import export  # noqa: E402
from unetseg_training.prepare import prepare  # noqa: E402
from UNetSegmentationLib.engines.torch import load_network  # noqa: E402
from UNetSegmentationLib.image import Box, Image, UserError  # noqa: E402
from UNetSegmentationLib.inference.predict import Options, predict  # noqa: E402
from UNetSegmentationLib.model import RESOURCES, check_card, find_model  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402


def test_no_patient_is_in_two_folds_and_all_cases_have_one(data):
    crops, cubes, fold = lidc.nodules()
    assert {c.patient for c in crops.annotated} | {c.patient for c in cubes.annotated} == set(fold)
    held_out = [c for s in (crops, cubes) for c in lidc.part(s, True)]
    kept = {c.patient for s in (crops, cubes) for c in lidc.part(s, False)}
    assert len(held_out) == 162 + 23 and not kept & {c.patient for c in held_out}
    every = [c.name for k in range(5) for s in (crops, cubes) for c in lidc.part(s, True, k)]
    assert len(every) == len(set(every)) == len(crops.annotated) + len(cubes.annotated)
    for k in range(5):
        made = lung_nodule_2d.job(read(lung_nodule_2d.CONFIG), data, fold=k)
        assert {fold[c.patient] for c, _ in made.validator.cases} == {k} and made.identity == {"fold": k}
        assert k not in {fold.get(c.patient) for c in lung_nodule_2d.scans(k).cases}


@pytest.mark.parametrize("name", release.NAMES)
def test_every_recipe_is_a_valid_card_of_its_network(name):
    card = release.card_of(name)
    made = "0" * 64
    assert check_card({**card, "files": {"model.onnx": {"sha256": made, "size": 1}}}).name == name
    network = build(UNetConfig.from_json(card["network"])).eval()
    x = torch.zeros(1, network.config.in_channels, *card["patch"])
    assert network(x).shape == (1, 2 if name != "hippocampus-3d" else 3, *card["patch"])


def test_a_boxs_twice_is_about_the_same_centre():
    assert lung_nodule_2d.twice(Box((4, 10, 10), (8, 15, 14)), (10, 40, 40)) == Box((2, 7, 8), (10, 18, 16))


def test_the_2d_sampler_shows_the_network_what_its_card_says(data, tmp_path):
    config = read(lung_nodule_2d.CONFIG)
    some = [prepare(s, config, tmp_path, lidc.part(s, False)[:3]) for s in lidc.nodules()[:2]]
    source = lung_nodule_2d.Slices(*some, some[1], config)
    x, y = source.batch(5)
    assert x.shape == (16, 7, 96, 96) and y.shape == (16, 1, 96, 96)
    assert y.min() == 0 and y.max() == 1 and ((y > 0.1) & (y < 0.9)).any() and -0.5 <= x.min() and x.max() <= 1.5
    assert torch.equal(x, source.batch(5)[0]) and not torch.equal(x, source.batch(6)[0])
    halves = [lung_nodule_2d.Slices(*some, some[1], config, (rank, 2)).batch(5)[0] for rank in (0, 1)]
    assert torch.equal(x[0::2], halves[0]) and torch.equal(x[1::2], halves[1])


def test_a_small_nodule_counts_like_a_large_one_and_none_may_be_found_where_none_is():
    share = torch.zeros(3, 1, 32, 32)
    share[0, 0, 2:5, 2:5], share[1, 0, 4:28, 4:28] = 1, 1
    found = {"right": share, "small one missed": share.clone(), "large one missed": share.clone(), "one where none is": share.clone()}
    found["small one missed"][0] = found["large one missed"][1] = 0
    found["one where none is"][2] = share[1]
    costs = {k: float(lung_nodule_2d.loss(torch.cat([10 - 20 * v, 20 * v - 10], 1), share)) for k, v in found.items()}
    # Cross-entropy, the batch's Dice and the patches' own, of which the small one's is a third and not 9 / 585.
    assert costs["right"] < 1e-3 and costs["small one missed"] == pytest.approx(20 * 9 / 3072 + (9 / 1161 + 9 / 19 / 3) / 2, abs=1e-4)
    assert costs["large one missed"] > costs["one where none is"] > 20 * 576 / 3072 + 0.3


def test_thick_slices_in_real_lung_are_the_lesions_where_half_of_them_is(monkeypatch):
    sampler = lung_nodule_click.Sampler([], [], [], late=0)
    monkeypatch.setattr(sampler, "mix", lung_nodule_click.replace(sampler.mix, slabs=1.0))
    values, label = (np.zeros(lung_nodule_click.PATCH, np.float32) for _ in range(2))
    label[5:17] = 1  # 15 mm of 1.25 mm
    values += 800 * label - 800
    known = np.ones(values.shape, bool)
    known[20:] = False
    lengths = set()
    for seed in range(30):
        seen, found, sure = sampler._slabs(values, label, known, 1.0, np.random.default_rng(seed))
        assert seen.shape == found.shape == values.shape and seen.dtype == np.float32 and sure.dtype == bool
        assert np.allclose(seen, seen[:, :1, :1]) and -800.001 <= seen.min() and seen.max() <= 0.001
        # A line between slices: where both are the lesion's, or neither, nothing is left or added.
        inside = found[:, 0, 0] >= 0.5
        assert inside[7:15].all() and not inside[:3].any() and not inside[19:].any()
        assert not sure[20:].any() and sure[:15].all()
        lengths.add(int(inside.sum()))
    assert len(lengths) > 1 and abs(np.mean(list(lengths)) - 12) <= 2 and max(lengths) <= 16
    untouched = sampler._slabs(values, label, known, 3.4, np.random.default_rng(1))
    assert all(a is b for a, b in zip(untouched, (values, label, known)))  # of voxels of 4.25 mm one is a slice


def test_the_clicks_rounds_go_on_after_a_kill_as_if_nothing_had_been(data, tmp_path, monkeypatch):
    """Rounds depend on the network's answers: their samples are part of the checkpoint."""
    small = UNetConfig(dimensions=3, in_channels=5, out_channels=2, channels=(4, 8), strides=((2, 2, 2),), norm="instance")
    monkeypatch.setattr(lung_nodule_click, "CONFIG", small)
    cubes = [lung_nodule_click.load(c) for c in lidc.part(lidc.nodules()[1], False)[:3]]
    fit = Fit(epochs=2, steps=3, batch=2, warmup=1, validate_every=2, precision="32", accelerator="cpu")

    class Broken(Exception):
        pass

    def made(dies: int | None) -> train.Job:
        job = lung_nodule_click.job(fit)
        job.validator = None

        def source(rank: int, devices: int) -> lung_nodule_click.Rounds:
            sampler = lung_nodule_click.Sampler(cubes, cubes, [], late=4)
            sampler._nothing = sampler._implanted = None  # no whole scans here
            rounds = lung_nodule_click.Rounds(sampler, 2, 1)
            batch = rounds.batch

            def counted(step: int):
                if step == dies:
                    raise Broken
                return batch(step)

            rounds.batch = counted
            return rounds

        job.source = source
        return job

    monkeypatch.setattr(lung_nodule_click, "EARLY", lung_nodule_click.replace(lung_nodule_click.EARLY, crops=0, cubes=1))
    monkeypatch.setattr(lung_nodule_click, "LATE", lung_nodule_click.replace(lung_nodule_click.LATE, crops=0, cubes=1))
    whole = train.run(made(None), tmp_path / "whole").network
    with pytest.raises(Broken):
        train.run(made(4), tmp_path / "killed")
    resumed = train.run(made(None), tmp_path / "killed").network
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_export_runs_at_any_size_and_equals_pytorch(tmp_path, monkeypatch, norm):
    torch.manual_seed(0)
    model = build(UNetConfig(dimensions=2, in_channels=7, channels=(4, 8, 8), norm=norm)).eval()
    rng = np.random.default_rng(0)
    images = [Image(rng.integers(-1000, 400, (3, h, 60)).astype(np.int16)) for h in (50, 130)]
    card = {**release.card_of("lung-nodule-2d"), "divisor": [4, 4], "patch": [64, 48]}

    def drive(package, engine):
        for image in images:
            predict(image, [package], Options(tta="none"), engines=[engine])

    package = export(model, card, tmp_path / "x.unet.zip", drive)
    assert predict(images[1], [package], Options(tta="none")).labels.shape == (3, 130, 60)
    monkeypatch.setattr("unetseg_training.export.TOLERANCE", 0)
    with pytest.raises(UserError, match="differ by"):
        export(model, card, tmp_path / "y.unet.zip", drive)
    assert not (tmp_path / "y.unet.zip").exists()


def test_the_mean_with_the_start_is_that_of_every_weight():
    start = find_model("hippocampus-3d")
    old, config = load_network(start).state_dict(), UNetConfig.from_json(start.card.data["network"])
    torch.manual_seed(0)
    model = build(config)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    card = release.card_of("hippocampus-3d")
    for key, value in release.averaged(model, card, start).state_dict().items():
        assert torch.allclose(value, (own[key] + old[key]) / 2) and not torch.allclose(value, old[key])
    with pytest.raises(UserError, match="another network"):
        release.averaged(build(replace(config, channels=(8, 16, 32, 48))), card, start)
    for other, told in (
        ({"labels": card["labels"][::-1]}, "do not give the same labels"),
        ({"spacing": [1, 1, 1.5]}, r"was trained with another spacing \(\[1.0, 1.0, 1.0\]\) than the run \(\[1, 1, 1.5\]\)"),
        ({"pixel_mm": 1.3}, "another pixel_mm"),
        ({"intensity": {"mode": "none"}}, "another intensity"),
    ):
        with pytest.raises(UserError, match=told):
            release.averaged(model, {**card, **other}, start)


@pytest.mark.parametrize("name", release.NAMES[:3])
def test_a_recipes_card_can_be_averaged_with_its_package(name):
    start = find_model(name)
    release.averaged(load_network(start), release.card_of(name), start)


def test_a_run_that_knows_whom_it_would_be_scored_on_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("UNETSEG_DATA", str(data))
    monkeypatch.setattr("sys.argv", ["release", "hippocampus-3d", str(tmp_path)])
    (tmp_path / "curve.csv").write_text("step,loss\n1,1\n")
    ((_, case_set, held_out),) = release.held_out("hippocampus-3d")
    others = [c.name for c in case_set.annotated if c not in held_out]
    for trained, fold, told in (
        ([*others, held_out[3].name], 0, rf"trained on patients .* of fold 0 of 5 \({held_out[3].name}\)"),
        (others, 2, "held out fold 2 and would be scored on fold 0; train fold 0"),
        (others, None, "held out the dataset's own part"),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"fold": fold, "data": {"train": dict.fromkeys(trained, "")}}))
        with pytest.raises(UserError, match=told):
            release.main()
    with pytest.raises(UserError, match="would be scored on fold 3"):
        release.score_fold("hippocampus-3d", tmp_path, 3, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"fold": 0, "data": {"train": dict.fromkeys(others, "")}}))
    release.check_run("hippocampus-3d", tmp_path)


def test_the_figures_of_a_fold_take_the_place_of_its_former_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "load_weights", lambda run, network: build(network))
    for fold, dice in ((3, 0.5), (1, 0.8), (3, 0.7)):
        row = {"set": "crop", "case": f"c{fold}", "seconds": 1.0, "Lung nodule": dice}
        monkeypatch.setattr(release, "score", lambda package, engine, number, row=row: [row])
        release.score_fold("lung-nodule-2d", tmp_path, fold, tmp_path)
    text = (tmp_path / "lung-nodule-2d" / "folds.csv").read_text().split()
    assert text == ["fold,set,case,Lung", "nodule", "1,crop,c1,0.8", "3,crop,c3,0.7"]


def test_a_run_without_its_curve_replaces_nothing_and_one_released_elsewhere_no_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["release", "lung-nodule-2d", str(tmp_path), "--output", str(tmp_path / "models")])
    monkeypatch.setattr(release, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(release, "load_weights", lambda run, network: build(network))
    monkeypatch.setattr(release, "export", lambda model, card, path, drive: find_model("lung-nodule-2d"))
    monkeypatch.setattr(release, "score", lambda package: [{"set": "crop", "case": "c", "Lung nodule": 0.8}])
    with pytest.raises(FileNotFoundError, match="curve.csv"):
        release.main()
    assert not list(tmp_path.iterdir())
    release.write_rows(tmp_path / "a.csv", [{"a": 1}])
    with pytest.raises(ValueError, match="fields not in"):
        release.write_rows(tmp_path / "a.csv", [{"a": 2}, {"b": 3}])
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"] and (tmp_path / "a.csv").read_text().split() == ["a", "1"]
    (tmp_path / "curve.csv").write_text("step,loss,dice crops\n1,0.5,0.8\n")
    release.main()
    card = find_model("lung-nodule-2d").card
    figures = {f"{card.name}/{name}" for name in ("held_out.csv", "metrics.json", "curve.csv", "curve.png")}
    made = {p.relative_to(tmp_path / "models").as_posix() for p in (tmp_path / "models").rglob("*") if p.is_file()}
    assert made == {f"{card.name}-{card.version}.unet.zip", *figures} and not (tmp_path / "results").exists()


def test_bundled_figures_are_those_of_the_results():
    for path in sorted((RESOURCES / "models").glob("*.unet.zip")):
        card = find_model(path).card
        metrics = json.loads((release.RESULTS / card.name / "metrics.json").read_text("utf-8"))
        assert card.data["metrics"] == metrics


def test_bundled_models_reach_their_figures_on_a_few_held_out_cases(data, monkeypatch):
    """The whole held-out fold is scored by unetseg_training.release; here, that the shipped file is that model."""
    monkeypatch.setenv("UNETSEG_DATA", str(data))
    for name in (n for n in release.NAMES if n != "lung-nodule-click"):
        package = find_model(name)
        with open(release.RESULTS / name / "held_out.csv", newline="", encoding="utf-8") as f:
            rows = {(r["set"], r["case"].removesuffix(".nii.gz")): r for r in csv.DictReader(f)}
        seen = 0
        for kind, case, image, truth, roi in islice(release.cases(name), 0, 10, 3):  # the others are not even read
            labels = predict(image, [package], Options(roi=roi)).labels.array
            for label in package.card.labels:
                got = release.dice(labels == label.value, truth == label.value)
                assert got == pytest.approx(float(rows[kind, case][label.name]), abs=0.01)
                seen += 1
        assert seen >= 4
