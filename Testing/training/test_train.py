"""The cache and the training: exact after kill -9, the same on two devices, and nothing lost when something goes wrong."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import SimpleITK as sitk

torch = pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("pydantic")
L = pytest.importorskip("lightning")

from unetseg_training import config as c  # noqa: E402
from unetseg_training import live, metrics, watch  # noqa: E402
from unetseg_training import prepare as p  # noqa: E402
from unetseg_training import train as t  # noqa: E402
from unetseg_training.cases import IGNORE, Case, find_cases  # noqa: E402
from unetseg_training.check import check  # noqa: E402
from unetseg_training.report import overlay  # noqa: E402
from unetseg_training.sampling import Patches  # noqa: E402
from UNetSegmentationLib import files  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Box, Grid, Image, read_image, reorient, sample, write_image  # noqa: E402
from UNetSegmentationLib.intensity import normaliser  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# A turned image, so that cached cases must be reoriented as predict() does it.
TURNED = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def write_cases(folder, n=4, labels=2):
    """Noise, in which a bright ball is label 1 and a dark one label 2, in places of their own in each case."""
    rng = np.random.default_rng(1)
    for i in range(n):
        grid = np.indices((12, 14, 16))
        values = rng.normal(0, 0.3, grid.shape[1:]).astype(np.float32)
        mask = np.zeros(values.shape, np.uint8)
        for label, bright in ((1, 3), (2, -3))[:labels]:
            at = [6, 4 + 6 * (label - 1), rng.integers(4, 12)]
            ball = sum((g - a) ** 2 for g, a in zip(grid, at)) <= 9
            values[ball], mask[ball] = bright, label
        write_image(Image(values, (1.0, 1.0, 1.5), (0, 0, 0), TURNED), folder / "images" / f"case{i}.nii.gz")
        write_image(Image(mask, (1.0, 1.0, 1.5), (0, 0, 0), TURNED), folder / "labels" / f"case{i}.nii.gz")


def configuration(folder, **changes):
    names = [label.name for label in find_cases(folder).labels]
    fit = {"epochs": 3, "steps": 4, "batch": 2, "warmup": 2, "precision": "32", "validate_cases": 1, "accelerator": "cpu", "ema": 0.5}
    base = {
        "data": {"path": str(folder), "folds": 2},
        "labels": [{"name": n} for n in names],
        "channels": ["MR"],
        "input": {"patch": [16, 16, 16], "spacing": [1, 1, 1], "flip_axes": ["x"]},
        "network": {"channels": [4, 8], "deep_supervision": True},
        "fit": {**fit, **changes.pop("fit", {})},
    }
    return c.parse({**base, **changes})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("balls")
    write_cases(folder)
    return folder


@pytest.fixture
def config(dataset):
    return configuration(dataset)


def weights(folder):
    return torch.load(folder / t.CHECKPOINT, weights_only=True)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------------ cache


def test_a_cached_case_is_what_predict_computes(dataset, config, tmp_path):
    cases = find_cases(dataset)
    case = p.prepare(cases, config, tmp_path)[0]
    image, mask = (reorient(read_image(path))[0] for path in (cases.cases[0].images[0], cases.cases[0].label))
    grid = Grid.over(image, config.input.spacing)
    whole = Box.whole(grid.shape)
    values = normaliser(config.input.intensity, image.channels)(sample(image.channels, grid, whole))
    shares = sample(np.stack([mask.array == k for k in range(3)]).astype(np.float32), grid, whole)
    assert case.values.shape == values.shape and np.allclose(case.values, values, atol=2e-3)
    assert np.array_equal(case.labels, shares.argmax(0))
    assert case.spacing == pytest.approx([s * k for s, k in zip(image.spacing[::-1], grid.scale)])
    assert case.counts == tuple(int((case.labels == k).sum()) for k in range(3))
    assert all((case.labels[tuple(case.places(k).T)] == k).all() and len(case.places(k)) == case.counts[k] for k in (1, 2))


def test_a_run_of_an_earlier_version_keeps_its_figures(config, tmp_path):
    """Its record does not name what came later."""
    job, old = Mock(record={"config": json.loads(config.model_dump_json())}), json.loads(config.model_dump_json())
    del old["model"]["extent"]
    for said, kept in ((old, True), ({**old, "model": {**old["model"], "roi_mm": 50}}, False)):
        (tmp_path / "metrics.json").write_text("{}")
        t._describe(job, tmp_path, {"config": said})
        assert (tmp_path / "metrics.json").exists() == kept


def test_a_case_is_made_of_what_the_model_will_be_shown(config):
    rng = np.random.default_rng(0)
    image, mask = Image(rng.normal(100, 20, (12, 16, 16)).astype(np.float32)), np.zeros((12, 16, 16), np.uint8)
    mask[4:8, 4:8, 4:8] = 1
    padded, wide = replace(image, array=np.pad(image.array, 5)), np.pad(mask, 5)
    zscore = config.input.model_copy(update={"intensity": {"mode": "zscore"}})
    whole = config.model_copy(update={"input": zscore})
    shown = whole.model_copy(update={"model": config.model.model_copy(update={"extent": "content"})})
    alone, got = p.compute(image, mask, shown, "x"), p.compute(padded, wide, shown, "x")
    assert all(np.array_equal(got[k], alone[k]) for k in alone)
    assert p.compute(padded, wide, whole, "x")["values"].shape != alone["values"].shape and p.key(shown, "") != p.key(whole, "")
    box = shown.model_copy(update={"model": shown.model.model_copy(update={"extent": "box"})})
    noisy = padded.like(np.where(padded.array, padded.array, rng.normal(0, 0.1, padded.shape)).astype(np.float32))
    assert np.array_equal(p.compute(noisy, wide, box, "x")["values"], alone["values"]) and p.key(box, "") != p.key(shown, "")
    away = np.linalg.norm(np.indices(image.shape).T / np.array(image.shape), axis=-1).T > 1
    masked = image.like(np.where(away, 0, image.array))
    near = shown.model_copy(update={"model": shown.model.model_copy(update={"surround": "nearest"})})
    assert near.card()["surround"] == "nearest" and p.key(shown, "") != p.key(near, "")
    as_it_is, filled = (p.compute(masked, mask, config, "x")["values"] for config in (shown, near))
    assert (as_it_is == as_it_is.min()).mean() > 5 * (filled == filled.min()).mean()
    assert shown.card()["extent"] == "content" and "extent" not in whole.card()


def test_what_a_training_depends_on_is_not_changed_in_it(config, dataset, tmp_path):
    def go_on(epochs=2, **model):
        base = config.model_copy(update={"model": config.model.model_copy(update=model)})
        return t.train(replace_fit(base, epochs=3, minutes=1e-6 if epochs == 1 else None), tmp_path / "run", cache=tmp_path / "cache")

    go_on(1)
    record = json.loads((tmp_path / "run" / t.RUN).read_text("utf-8"))
    del record["config"]["model"]["extent"]  # of an earlier version
    (tmp_path / "run" / t.RUN).write_text(json.dumps(record), "utf-8")
    step = {"postprocess": {"largest_component": True}}
    for change in ({"task": "click"}, {"extent": "content"}, step):
        with pytest.raises(UserError, match=rf"trained with other settings \(model\.{next(iter(change))}\)"):
            go_on(**change)
    assert go_on(tta="flips").epoch >= 0
    go_on(**step)  # ended, it is what is done with its masks
    with pytest.raises(UserError, match=r"other settings \(model\.extent\)"):
        go_on(extent="box")


@pytest.mark.parametrize("spacing", [[1, 1, 1.5], [1.4, 1.3, 1.7]])
def test_a_case_is_made_in_parts(config, monkeypatch, spacing):
    rng = np.random.default_rng(0)
    image = Image(rng.normal(0, 1000, (64, 96, 96)).astype(np.int16), (1, 1, 1.5), (0, 0, 0), TURNED)
    mask = np.zeros(image.shape, np.uint8)
    mask[9:20, 9:20, 9:20] = rng.integers(0, 3, (11, 11, 11))
    mask[:, :3] = IGNORE
    window = {"mode": "window", "level": 0, "width": 2000}
    config = config.model_copy(update={"input": config.input.model_copy(update={"spacing": spacing, "intensity": window})})
    whole = p.compute(image, mask, config, "x")
    monkeypatch.setattr(p, "_PART", 1)
    tracemalloc.start()
    parts = p.compute(image, mask, config, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * image.array.nbytes  # of the whole at once 9 to 12 times
    assert np.allclose(parts.pop("values"), whole.pop("values"), atol=2e-3)
    assert parts.keys() == whole.keys() and all(np.array_equal(parts[k], whole[k]) for k in parts)


def test_the_label_ignore_is_neither_learnt_nor_scored(tmp_path):
    """nnU-Net's, where only some slices are annotated: unjudged voxels stay so in the cache and in a patch, and no patch is about one."""
    write_cases(tmp_path, 3)
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    (tmp_path / "labels").rename(tmp_path / "labelsTr")
    for i in range(3):
        (tmp_path / "imagesTr" / f"case{i}.nii.gz").rename(tmp_path / "imagesTr" / f"case{i}_0000.nii.gz")
        mask = read_image(file := tmp_path / "labelsTr" / f"case{i}.nii.gz")
        mask.array[:, ::2] = 3
        write_image(mask, file)
    labels = {"background": 0, "one": 1, "two": 2, "ignore": 3}
    about = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    config = configuration(tmp_path, fit={"steps": 2, "epochs": 1}, input={"patch": [16, 16, 16], "spacing": [1, 1, 1.5], "flip_axes": []})
    cases = find_cases(tmp_path)
    prepared = p.prepare(cases, config, tmp_path / "cache")
    assert all(0.4 < (c.labels == IGNORE).mean() < 0.6 and sum(c.counts) == (c.labels != IGNORE).sum() for c in prepared)
    source = Patches(prepared, config, 1)
    for step in range(20):
        case, centre, _ = source.draw(step, 1)
        assert case.labels[tuple(centre)] != IGNORE
    assert IGNORE in source.batch(0)[1]
    result = t.train(config, tmp_path / "run")
    report = check(cases)
    assert not report.errors and report.facts[0].voxels == list(prepared[0].counts)
    held = t.HeldOut(cases, cases.cases[:1], config)
    scores, truth = held.score(0, result.network), cases.load(cases.cases[0])[1]
    found = held.examples[0][3]
    found = np.where(truth == IGNORE, 0, found)
    assert scores["one"] == pytest.approx(2 * ((found == 1) & (truth == 1)).sum() / ((found == 1).sum() + (truth == 1).sum()))
    items = [(c.name, *cases.load(c)) for c in cases.cases[:1]]
    (one, _) = metrics.evaluate(held.package, items, labels=cases.labels, engine=t.LiveEngine(result.network))
    assert one["dice"] == pytest.approx(scores["one"])
    overlay(items[0][1], truth, held.examples[0][3])
    with pytest.raises(UserError, match="A click model learns from what is marked all over"):
        t.make_job(config.model_copy(update={"model": config.model.model_copy(update={"task": "click"})}), tmp_path / "cache", cases)


def test_the_cache_is_used_again_until_something_changes(tmp_path):
    write_cases(tmp_path / "data", 3)
    config, cache = configuration(tmp_path / "data"), tmp_path / "cache"
    told = []

    def ready(config=config):
        told.clear()
        found = p.prepare(find_cases(tmp_path / "data"), config, cache, progress=lambda done, of, name: told.append(name))
        return {f.name: (f.path, f.digest) for f in found}, told[:-1]

    first, made = ready()
    assert made == ["case0", "case1", "case2"] == sorted(first)
    assert ready() == (first, [])
    image = tmp_path / "data" / "images" / "case1.nii.gz"
    mask = tmp_path / "data" / "labels" / "case1.nii.gz"
    image.write_bytes((tmp_path / "data" / "images" / "case0.nii.gz").read_bytes())
    mask.write_bytes((tmp_path / "data" / "labels" / "case0.nii.gz").read_bytes())
    second, made = ready()
    assert made == ["case1"] and second["case1"][1] == first["case0"][1] != first["case1"][1]
    _, made = ready(configuration(tmp_path / "data", input={**config.input.model_dump(), "spacing": [2, 2, 2]}))
    assert len(made) == 3
    for damage in (lambda b: b[:-5], lambda b: b[:-5] + b"?????", lambda b: b"", lambda b: b"\xff" * 20):
        path = second["case2"][0]
        path.write_bytes(damage(path.read_bytes()))
        again, made = ready()
        assert made == ["case2"] and again == second
    old = cache / ".unetseg-half-written"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    ready()
    assert not old.exists()
    # What a header names is looked at as well as the header.
    mask = tmp_path / "data" / "labels" / "case0.nii.gz"
    turned = sitk.ReadImage(str(mask))
    for key in turned.GetMetaDataKeys():
        turned.EraseMetaData(key)
    mask.unlink()
    sitk.WriteImage(turned, str(mask.with_name("case0.mhd")))
    raw = mask.with_name("case0.raw")
    os.utime(raw, (time.time() - 9,) * 2)
    assert ready()[1] == ["case0"] and ready()[1] == []
    raw.write_bytes(raw.read_bytes()[::-1])
    assert ready()[1] == ["case0"]


def test_more_cases_than_a_process_may_open_files(dataset, config, tmp_path, monkeypatch):
    monkeypatch.setattr(p, "_recent", lru_cache(2)(p._recent.__wrapped__))
    cases = find_cases(dataset)
    before = len(os.listdir("/dev/fd"))
    found = p.prepare(cases, config, tmp_path)
    held = [(f.labels, f.places(1)) for f in found]
    del held[1:]
    assert all(f.values.size and f.labels.any() and len(f.places(2)) for f in found) and len(os.listdir("/dev/fd")) <= before + 3
    assert (held[0][0][tuple(held[0][1].T)] == 1).all()
    # Nor is a file that cannot be opened for this reason made anew as if it were damaged.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = p.key(config, found[0].digest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(UserError, match="Too many files are open; .*ulimit"):
            p._open(found[0].path, wanted, cases.cases[0], found[0].digest, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert p._open(found[0].path, wanted, cases.cases[0], found[0].digest, 2).counts == found[0].counts


def test_what_does_not_fit_is_named_with_its_cure(config):
    image = Image(np.zeros((4, 5, 6), np.float32))
    with pytest.raises(UserError, match=r"Case x: its mask has \(6, 5, 3\) voxels but its image \(6, 5, 4\); export"):
        p.compute(image, np.zeros((3, 5, 6), np.uint8), config, "x")
    with pytest.raises(UserError, match="Case x: its mask holds the value 3 but the configuration names 2 labels; correct"):
        p.compute(image, np.full((4, 5, 6), 3, np.uint8), config, "x")
    with pytest.raises(UserError, match=r"Case x has 2 channels but the configuration names 1 \(MR\)"):
        p.compute(Image(np.zeros((2, 4, 5, 6), np.float32)), np.zeros((4, 5, 6), np.uint8), config, "x")
    with pytest.raises(UserError, match="Case x has 120 voxels that are NaN"):
        p.compute(Image(np.full((4, 5, 6), np.nan, np.float32)), np.zeros((4, 5, 6), np.uint8), config, "x")


class FullDisk:
    """No file may become longer than `size` bytes: a disk that is full."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_full_disk_leaves_no_half_file(dataset, config, tmp_path):
    with FullDisk(4000), pytest.raises(UserError, match="cannot be written .*check the disk's space"):
        p.prepare(find_cases(dataset), config, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    t.train(replace_fit(config, epochs=1), tmp_path / "run" / "a", cache=tmp_path / "cache")
    before = (tmp_path / "run" / "a" / t.CHECKPOINT).read_bytes()
    longer = replace_fit(config, epochs=1, validate_cases=1)
    (tmp_path / "run" / "a" / t.RUN).unlink()

    class Fill(L.Callback):
        def on_train_epoch_start(self, *_):
            self.disk = FullDisk(len(before) // 2)
            self.disk.__enter__()

    fill = Fill()
    try:
        with pytest.raises(UserError, match="cannot be written"):
            t.train(longer, tmp_path / "run" / "b", cache=tmp_path / "cache", callbacks=[fill])
    finally:
        fill.disk.__exit__()
    assert not [f for f in (tmp_path / "run" / "b").iterdir() if f.name.startswith(".unetseg")]
    assert not (tmp_path / "run" / "b" / t.CHECKPOINT).exists()


def test_what_another_process_has_just_written_is_taken(dataset, config, tmp_path, monkeypatch):
    cases, disk = find_cases(dataset), FullDisk(4000)
    check, first = p._check_space, cases.cases[:1]

    def meanwhile(*_):
        monkeypatch.setattr(p, "_check_space", check)
        p.prepare(cases, config, tmp_path, first)
        disk.__enter__()

    monkeypatch.setattr(p, "_check_space", meanwhile)
    try:
        (found,) = p.prepare(cases, config, tmp_path, first)
    finally:
        disk.__exit__()
    assert found.labels.any() and not list(tmp_path.glob(".unetseg-*"))


def test_a_file_that_windows_holds_for_a_moment_is_replaced_then(tmp_path, busy_file):
    with files.atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new" and len(busy_file) == 3


def replace_fit(config, **changes):
    return config.model_copy(update={"fit": config.fit.model_copy(update=changes)})


# --------------------------------------------------------------------------------------------------------------- training


class Losses(L.Callback):
    def __init__(self):
        self.values, self.rates = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.values.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_it_learns_and_writes_what_reproduces_it(dataset, tmp_path):
    config = configuration(
        dataset, fit={"epochs": 10, "steps": 10, "batch": 4, "validate_every": 5, "learning_rate": 1e-2, "accumulate": 1}
    )
    seen = Losses()
    folder = tmp_path / "run" / "fold1-seed2"
    result = t.train(config, folder, fold=1, seed=2, callbacks=[seen])
    assert np.mean(seen.values[-10:]) < 0.6 * np.mean(seen.values[:10])
    assert result.dice > 0.5 and result.labels.keys() == {label.name for label in config.labels}
    assert max(seen.rates) == pytest.approx(1e-2) and seen.rates[-1] < 1e-4
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert run["finished"] and run["dice"] == result.dice and run["steps"] == 100 and run["epochs"] == 10 and run["resumed"] == 0
    assert run["seed"] == config.fit.seed + 2 and run["fold"] == 1 and {"torch", "lightning", "python"} <= run["versions"].keys()
    assert c.parse(run["config"]) == config and "git_revision" in run
    train = run["training_cases"]
    assert sorted(train + run["validation_cases"]) == ["case0", "case1", "case2", "case3"] and len(train) == 2
    digests = {case.name: find_cases(dataset).digest(case) for case in find_cases(dataset).cases}
    assert run["data"]["train"] == {name: digests[name] for name in train}
    again, network = t.load_run(folder)
    assert again == config and same(network.state_dict(), result.network.state_dict()) and not network.training
    # Once finished, it is not trained again.
    assert t.train(config, folder, fold=1, seed=2).dice == result.dice and weights(folder)
    # What was kept is the average of the weights at the best epoch, not the last network.
    final = weights(folder)
    assert not same({k[6:]: v for k, v in final.items() if k.startswith("model.")}, network.state_dict())


def test_killed_with_sigkill_it_ends_with_the_very_same_weights(dataset, config, tmp_path):
    config = replace_fit(config, epochs=4, steps=6, accumulate=2)
    c.write(config, tmp_path / "config.yaml")
    t.train(config, tmp_path / "whole" / "run", cache=tmp_path / "cache")
    code = f"""
import os, signal, sys, torch
torch.set_num_threads(1)
import lightning as L
from pathlib import Path
from unetseg_training import config, train
class Kill(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 15:  # in the middle of the third epoch
            os.kill(os.getpid(), signal.SIGKILL)
folder = Path({str(tmp_path)!r})
train.train(config.read(folder), folder / "killed" / "run", cache=folder / "cache", callbacks=[Kill()])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = tmp_path / "killed" / "run"
    assert not json.loads((folder / t.RUN).read_text("utf-8"))["finished"]
    assert torch.load(folder / t.CHECKPOINT, weights_only=True)["global_step"] == 12
    result = t.train(config, folder, cache=tmp_path / "cache")
    assert same(weights(folder), weights(tmp_path / "whole" / "run"))
    whole, killed = (torch.load(tmp_path / f / "run" / t.CHECKPOINT, weights_only=True) for f in ("whole", "killed"))
    for a, b in zip(whole["optimizer_states"][0]["state"].values(), killed["optimizer_states"][0]["state"].values()):
        assert same(a, b)
    assert whole["lr_schedulers"] == killed["lr_schedulers"]
    assert (folder / t.WEIGHTS).read_bytes() == (tmp_path / "whole" / "run" / t.WEIGHTS).read_bytes()
    assert json.loads((folder / t.RUN).read_text("utf-8"))["resumed"] == 1 and result.epoch >= 0
    # Another setting is another training: it does not go on as if it were this one.
    (folder / t.RUN).unlink()
    with pytest.raises(UserError, match=r"trained with other settings \(fit.learning_rate\)"):
        t.train(replace_fit(config, learning_rate=2e-3), folder, cache=tmp_path / "cache")
    (folder / t.CHECKPOINT).write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged .*delete it and train again"):
        t.train(config, folder, cache=tmp_path / "cache")


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


@pytest.mark.parametrize("zipped, told", [(True, "holds more than numbers and is not loaded"), (False, "no checkpoint of this program")])
def test_a_planted_checkpoint_runs_nothing(tmp_path, monkeypatch, zipped, told):
    monkeypatch.chdir(tmp_path)
    torch.save({"identity": "{}", "source": Planted()}, t.CHECKPOINT, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=told):
        t._load_checkpoint(tmp_path / t.CHECKPOINT)
    assert not (tmp_path / "planted").exists()


def test_an_installed_program_has_no_revision(tmp_path, monkeypatch):
    """Its environment may lie in a repository of its user's, whose revision says nothing of the program."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, *"-c user.name=x -c user.email=x@y commit -q --allow-empty -m x".split()], check=True)
    place = tmp_path / "venv" / "lib" / "python3" / "site-packages" / "unetseg_training" / "train.py"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(t, "__file__", str(place))
    assert t.git_revision() is None
    own = tmp_path / "training" / "unetseg_training" / "train.py"
    own.parent.mkdir(parents=True)
    monkeypatch.setattr(t, "__file__", str(own))
    assert len(t.git_revision()) == 40


def environment():
    paths = [str(ROOT / "UNetSegmentation"), str(ROOT / "training"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_two_gloo_processes_have_the_loss_of_one(dataset, config, tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs PyTorch with gloo")
    config = replace_fit(config, epochs=2, steps=3, batch=4)
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache": str(tmp_path / "cache")})})
    c.write(config, tmp_path / "config.yaml")
    alone = Losses()
    one = t.train(config, tmp_path / "one", callbacks=[alone])
    code = f"""
import json, os, torch
torch.set_num_threads(1)
import lightning as L
from pathlib import Path
from unetseg_training import config, train
values = []
class Keep(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        values.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))
folder = Path({str(tmp_path)!r})
result = train.train(config.read(folder), folder / "two", callbacks=[Keep()])
(folder / f"losses{{os.environ['RANK']}}.json").write_text(json.dumps([values, result.dice]))
"""
    (tmp_path / "child.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "child.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        values, dice = json.loads((tmp_path / f"losses{rank}.json").read_text())
        assert values == pytest.approx(alone.values, abs=2e-5) and dice == pytest.approx(one.dice, abs=0.02)
    assert json.loads((tmp_path / "two" / t.RUN).read_text("utf-8"))["devices"] == 2
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()))


def test_a_loss_that_is_no_number_names_step_and_cases(dataset, config, tmp_path):
    class Break(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == at:
                next(module.model.parameters()).data.fill_(float("nan"))

    for at, end in ((0, "train again"), (5, "train again: the last good epoch is kept")):
        told = rf"The loss is not a number at step {at + 1} \(cases case\d.*lower fit.learning_rate.*{end}\.$"
        with pytest.raises(UserError, match=told):
            t.train(config, tmp_path / "run", callbacks=[Break()])
    state = torch.load(tmp_path / "run" / t.CHECKPOINT, weights_only=True)
    assert state["global_step"] == 4 and all(torch.isfinite(v).all() for v in state["state_dict"].values())


def test_early_stopping_and_the_end_of_time(dataset, config, tmp_path, monkeypatch):
    monkeypatch.setattr(t.HeldOut, "score", lambda self, index, network: {"ball": 0.5})
    config = replace_fit(config, epochs=30, steps=1, patience=3)
    t.train(config, tmp_path / "a", cache=tmp_path / "cache")
    assert json.loads((tmp_path / "a" / t.RUN).read_text("utf-8"))["epochs"] == 4  # the best is the first
    t.train(replace_fit(config, minutes=1e-6), tmp_path / "b", cache=tmp_path / "cache")
    assert json.loads((tmp_path / "b" / t.RUN).read_text("utf-8"))["epochs"] == 1
    for minutes, epochs in ((1e-6, 1), (None, 4)):  # with more time it goes on
        t.train(replace_fit(config, minutes=minutes), tmp_path / "b", cache=tmp_path / "cache")
        assert json.loads((tmp_path / "b" / t.RUN).read_text("utf-8"))["epochs"] == epochs
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_killed_after_its_last_epoch_it_trains_no_further(dataset, config, tmp_path, monkeypatch):
    scores = iter([0.5] * 4 + [0.9] * 30)
    monkeypatch.setattr(t.HeldOut, "score", lambda self, index, network: {"ball": next(scores)})

    class Killed(L.Callback):
        def on_train_end(self, trainer, module):
            raise KeyboardInterrupt

    config = replace_fit(config, epochs=30, steps=1, patience=3)
    with pytest.raises(KeyboardInterrupt):
        t.train(config, tmp_path / "a", cache=tmp_path / "cache", callbacks=[Killed()])
    result = t.train(config, tmp_path / "a", cache=tmp_path / "cache")
    assert (result.dice, json.loads((tmp_path / "a" / t.RUN).read_text("utf-8"))["epochs"]) == (0.5, 4)


def test_weights_that_are_no_numbers_are_not_kept(dataset, config, tmp_path):
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer, module, *more):
            if trainer.global_step == 2 * config.fit.steps:  # after the last loss of the second epoch
                next(module.model.parameters()).data.fill_(float("nan"))

    with pytest.raises(UserError, match="weights are no numbers after epoch 2; .*the last good epoch is kept"):
        t.train(config, tmp_path / "a", cache=tmp_path / "cache", callbacks=[Spoil()])
    t.train(config, tmp_path / "a", cache=tmp_path / "cache")
    t.train(config, tmp_path / "b", cache=tmp_path / "cache")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def cases_of(*patients, split=""):
    return [Case(f"case{i}", patient, (Path("i"),), Path("m"), split=split) for i, patient in enumerate(patients)]


def test_datasets_that_cannot_be_learnt_from(dataset, config, tmp_path):
    with pytest.raises(UserError, match="holds no annotated cases; add"):
        t.held_out([], config, 0)
    with pytest.raises(UserError, match=r"one annotated case only \(case0\).*annotate another"):
        t.held_out(cases_of("a"), config, 0)
    with pytest.raises(UserError, match=r"All 2 cases of .* are of one patient \(a\)"):
        t.held_out(cases_of("a", "a"), config, 0)
    with pytest.raises(UserError, match="There is no fold 2; .* has the folds 0 to 1"):
        t.held_out(cases_of("a", "b", "c"), config, 2)
    with pytest.raises(UserError, match="does not say which cases are for validation"):
        t.held_out(cases_of("a", "b"), config, None)
    train, check = t.held_out(
        cases_of("a", "b", split="train") + cases_of("c", split="validation") + cases_of("d", split="test"), config, None
    )
    assert [x.patient for x in train + check] == ["a", "b", "c"]
    with pytest.raises(UserError, match="fit.batch is 3, which 2 devices"):
        t.train(replace_fit(config, batch=3, devices=2), tmp_path / "run", cache=tmp_path / "cache")
    shared = replace_fit(config, batch=4, devices=2)
    shared = shared.model_copy(update={"network": shared.network.model_copy(update={"norm": "batch"})})
    with pytest.raises(UserError, match="network.norm batch cannot be shared by 2 processes without GPUs; set it to instance"):
        t.train(shared, tmp_path / "run", cache=tmp_path / "cache")
    named = config.model_copy(update={"labels": [*config.labels, c.LabelEntry(name="spleen")]})
    with pytest.raises(UserError, match="now has the labels .* the configuration .*spleen"):
        t.train(named, tmp_path / "run")


def test_a_label_that_no_training_case_holds(tmp_path):
    write_cases(tmp_path / "data", 4)
    for i in range(4):  # label 2 in case 3 alone
        if i != 3:
            path = tmp_path / "data" / "labels" / f"case{i}.nii.gz"
            from UNetSegmentationLib.image import read_image

            mask = read_image(path)
            write_image(mask.like(np.where(mask.array == 2, 0, mask.array)), path)
    config = configuration(tmp_path / "data")
    of = t.held_out(find_cases(tmp_path / "data").annotated, config, 0)
    fold = 0 if "case3" in [x.name for x in of[1]] else 1
    with pytest.raises(UserError, match=rf"Label 2 \(.*\) is in none of the training cases of fold {fold} .*train another fold"):
        t.train(config, tmp_path / "run", fold=fold)


def emptied(folder, *names):
    for name in names:
        mask = read_image(path := folder / "labels" / f"{name}.nii.gz")
        write_image(mask.like(np.zeros_like(mask.array)), path)


def test_empty_masks_are_judged_before_the_training(tmp_path):
    write_cases(tmp_path / "data", 4, 1)
    config, cases = configuration(tmp_path / "data"), find_cases(tmp_path / "data")
    alone = [x.name for x in t.held_out(cases.annotated, config, 0)[1]]
    emptied(tmp_path / "data", *alone)
    held = [t.held_out(cases.annotated, config, fold, cases.marked)[1] for fold in (0, 1)]
    assert [sum(map(cases.marked, part)) for part in held] == [1, 1]
    for part in held:  # of which one is chosen
        validator = t.HeldOut(cases, sorted(part, key=cases.marked), config)
        validator.read()
        assert len(validator) == 1 and cases.marked(validator.cases[0])
    split = cases.subset(replace(x, split="validation" if x.name in alone else "train") for x in cases.cases)
    with pytest.raises(t.UnfitFold, match=rf"all held-out cases \({alone[0]}, {alone[1]}\) are empty, .*; mark something"):
        t.train(config, tmp_path / "run", split, fold=None)
    assert not (tmp_path / "run" / t.RUN).exists()


def test_test_cases_are_not_replayed(dataset, config, tmp_path):
    cases = find_cases(dataset)
    other = cases.subset(replace(x, split="test" if x.name == "case1" else "") for x in cases.cases)
    job = t.make_job(config, tmp_path, cases, replay=(other, 0.5))
    job.prepare()
    assert [x.name for x in job.record["data"]["base"]] == ["case0", "case2", "case3"]
    with pytest.raises(UserError, match="All annotated cases of .* are for testing"):
        t.make_job(config, tmp_path, cases, replay=(other.subset(other.cases[1:2]), 0.5))


class Rounds:
    """A source that depends on the network's answers, as the click model's does."""

    def __init__(self):
        self.memory = 0.0

    def batch(self, step):
        g = torch.Generator().manual_seed(step)
        x = torch.randn((2, 1, 8, 8), generator=g) + self.memory
        return x, (x[:, 0] > 0).long()

    def after(self, logits):
        self.memory = 0.9 * self.memory + float(logits.mean())

    def state(self):
        return {"memory": self.memory, "spare": torch.tensor([1, 2])}

    def restore(self, state):
        self.memory = state["memory"]


def test_another_source_and_loss_can_be_plugged_in_and_resumed(tmp_path):
    fit = c.Fit(epochs=4, steps=3, batch=2, precision="32", accelerator="cpu", warmup=1)

    def job():
        from torch.nn import functional

        made = t.Job(UNetConfig(2, 1, 2, (4, 8)), fit, lambda rank, devices: Rounds(), lambda: functional.cross_entropy)
        return made

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step == 8:
                raise InterruptedError

    result = t.run(job(), tmp_path / "whole")
    with pytest.raises(InterruptedError):
        t.run(job(), tmp_path / "stopped", callbacks=[Stop()])
    t.run(job(), tmp_path / "stopped")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert torch.load(tmp_path / "whole" / t.CHECKPOINT, weights_only=True)["source"]["memory"] != 0
    assert np.isnan(result.dice) and result.epoch == 3


def test_fine_tuning_starts_from_weights_and_keeps_what_is_frozen(dataset, config, tmp_path):
    first = t.train(replace_fit(config, epochs=1), tmp_path / "a", cache=tmp_path / "cache")
    start = first.network.state_dict()

    def freeze(network):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith("encoder"))

    second = t.train(replace_fit(config, epochs=2), tmp_path / "b", cache=tmp_path / "cache", start=start, freeze=freeze)
    after = second.network.state_dict()
    for name, value in start.items():
        assert torch.allclose(value, after[name], atol=1e-6) == name.startswith("encoder"), name
    with pytest.raises(UserError, match="All layers are frozen"):
        t.train(config, tmp_path / "c", cache=tmp_path / "cache", freeze=lambda network: network.requires_grad_(False))


def test_the_schedule_warms_up_and_falls_as_a_cosine():
    fit = c.Fit(epochs=10, steps=10, warmup=10, learning_rate=1e-3, final_rate=1e-6)
    rates = [fit.learning_rate * t.rate(fit, s) for s in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) * 1e-4) and rates[-1] == pytest.approx(1e-6)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:])) and rates[54] == pytest.approx(5e-4, rel=0.05)


def test_auto_precision_and_devices(monkeypatch):
    assert t.precision_here(c.Fit(precision="bf16")) == "bf16" and t.precision_here(c.Fit(accelerator="cpu")) in ("32", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert t._topology(c.Fit()) == (4, 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "6")
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert t._topology(c.Fit()) == (2, 3)


def test_a_benchmarks_row_is_of_the_data_that_are_asked_for(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_training", ROOT / "benchmarks" / "training.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    ran = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words: ran.append(words[-1]) or subprocess.CompletedProcess(words, 0))

    def ask(*words):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["training.py", *words, "--minutes", "3", "--work", str(tmp_path)])
        bench.main()
        return list(ran), capsys.readouterr().out

    summary = {"labels": {"a": {"dice": {"mean": 0.5, "low": None}}}}
    row = {"row": "ours", "summary": summary, "gpu_bytes": 1, "steps": 1, "train_seconds": 1, "prepare_seconds": 1, "parameters": 1}
    row["command"] = "benchmarks/training.py $UNETSEG_DATA/one --minutes 3 --row ours"
    (tmp_path / "ours.json").write_text(json.dumps(row))
    again, out = ask("some/one")
    assert again == list(bench.ROWS[1:]) and "| ours | 0.500 |" in out
    for words in (("some/two",), ("some/one", "--names", "left,right")):
        again, out = ask(*words)
        assert again == list(bench.ROWS) and "No row was run yet" in out


def test_the_trainer_does_what_the_configuration_says(config, dataset, tmp_path):
    fit = {"accumulate": 3, "clip": 2.5, "patience": 30, "validate_every": 5, "weight_decay": 0.25, "betas": (0.8, 0.9)}
    job = t.make_job(replace_fit(config, **fit), tmp_path / "cache")
    trainer = t._trainer(job, tmp_path, [])
    assert trainer.accumulate_grad_batches == 3 and trainer.gradient_clip_val == 2.5
    assert trainer.early_stopping_callbacks[0].patience == 6  # it counts validations
    (group,) = t.Training(job).configure_optimizers()["optimizer"].param_groups
    assert group["weight_decay"] == 0.25 and group["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_gpus_of_windows_have_no_nccl(config, dataset, tmp_path, monkeypatch, strategy):
    job, made = t.make_job(replace_fit(config, devices=2, strategy=strategy), tmp_path / "cache"), []
    monkeypatch.setattr(t.L, "Trainer", lambda **options: made.append(options["strategy"]))
    t._trainer(job, tmp_path, [])
    monkeypatch.setattr(sys, "platform", "win32")
    t._trainer(job, tmp_path, [])
    assert made[0] == "ddp" and made[1]._get_process_group_backend() == "gloo"


def test_every_batch_is_drawn_once_whatever_is_accumulated(config, dataset, tmp_path, monkeypatch):
    drawn, batch = [], Patches.batch
    monkeypatch.setattr(Patches, "batch", lambda self, step: drawn.append(step) or batch(self, step))
    t.train(replace_fit(config, epochs=2, steps=3, accumulate=2), tmp_path / "run", cache=tmp_path / "cache")
    assert drawn == list(range(12))


def test_the_members_of_an_ensemble_see_other_patches(config, dataset, tmp_path):
    one, other = (t.make_job(config, tmp_path / "cache", seed=seed).source(0, 1).batch(0)[0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_replayed_cases_are_drawn(config, dataset, tmp_path):
    cases = find_cases(dataset)
    batches = [
        t.make_job(config, tmp_path / "cache", replay=(cases.subset(cases.cases[:1]), share)).source(0, 1).batch(0)[0]
        for share in (0.0, 1.0)
    ]
    assert not torch.equal(*batches)


def test_a_picture_of_a_microscope_is_augmented(config, dataset, tmp_path):
    """Its pixels of 0.0002 mm were rounded to 0, and a patch's proportions divided by that."""
    source = t.make_job(config, tmp_path / "cache").source(0, 1)
    wanted = source.batch(0)[0]
    for case in source.pools[0]:
        case.spacing = tuple(s * 2e-4 for s in case.spacing)
    source._made.clear()
    assert torch.allclose(source.batch(0)[0], wanted, atol=1e-3)


def test_what_no_memory_holds_is_said(config, dataset, tmp_path, monkeypatch):
    for spacing, error in (((1e-7, 1.0, 1.0), MemoryError()), ((1e-7,) * 3, ValueError("array is too big"))):
        monkeypatch.setattr(t, "prepare", Mock(side_effect=error))
        tiny = config.model_copy(update={"input": config.input.model_copy(update={"spacing": spacing})})
        with pytest.raises(UserError, match="input.spacing of 1e-07 x .* mm is larger than the memory; make it coarser"):
            t.make_job(tiny, tmp_path / "cache").prepare()


def test_the_average_follows_a_short_training(config, dataset, tmp_path):
    """Of 4 steps, of which an average over a thousand would see nothing."""
    result = t.train(replace_fit(config, epochs=1, steps=4, ema=0.999), tmp_path / "run", cache=tmp_path / "cache")
    average = {k: v for k, v in result.network.state_dict().items()}
    now = {k.removeprefix("model."): v for k, v in weights(tmp_path / "run").items() if k.startswith("model.")}
    first = t.Training(t.make_job(config, tmp_path / "cache")).model.state_dict()

    def away(a):
        return sum(float((a[k] - first[k]).square().sum()) for k in first if first[k].is_floating_point()) ** 0.5

    assert away(average) > 0.3 * away(now)


def test_the_precision_is_the_devices(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        found |= {(a, capability[0]): t.precision_here(replace_fit(config, precision="auto", accelerator=a).fit) for a in ("auto", "cpu")}
    assert found["auto", 7] == "16" and found["auto", 8] == "bf16" and found["cpu", 7] == found["cpu", 8] != "16"
    assert t.precision_here(replace_fit(config, precision="16", accelerator="auto").fit) == "16"


@pytest.mark.parametrize(("fast", "precision"), [(False, "32"), (True, "bf16")])
def test_16_bits_are_on_a_cpu_what_auto_is_and_that_is_said(config, tmp_path, monkeypatch, capsys, fast, precision):
    """Lightning takes bf16, also where that is emulated, and says it in its own words only."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    t.run(t.make_job(replace_fit(config, precision="16", epochs=1, steps=1), tmp_path / "cache"), tmp_path / "run")
    run = json.loads((tmp_path / "run" / t.RUN).read_text("utf-8"))
    assert run["precision"].startswith(precision) and run["note"] == f"fit.precision 16 is for a GPU, so this CPU trains with {precision}."
    assert capsys.readouterr().err.count(run["note"]) == 1


def apple(monkeypatch, convolve):
    """Apple's GPU, by the CPU: convolve(own, x, weights, bias) is its 3D convolution."""
    module_to, tensor_to = torch.nn.Module.to, torch.Tensor.to

    def to(self, *where, **how):
        if where != ("mps",):
            return module_to(self, *where, **how)
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer._conv_forward = partial(convolve, layer._conv_forward)
        return self

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where, **how: x if where == ("mps",) else tensor_to(x, *where, **how))


def lacks(own, x, weights, bias):
    raise NotImplementedError("Conv3D is only supported on MPS for macOS 13.2\nand more")


@pytest.mark.parametrize(
    ("convolve", "words"),
    [
        (lambda own, x, w, b: own(x, w, b), ""),
        (lambda own, x, w, b: own(x, w * 1.001, b), ""),  # rounding
        (lambda own, x, w, b: own(x, w.flip(0), b), "gives wrong values"),
        (lambda own, x, w, b: own(x, 2 * w.detach() - w, b), "gives wrong values"),  # and right ones, but wrong gradients
        (lambda own, x, w, b: own(x, w, b) * float("nan"), "gives wrong values"),
        (lacks, r"cannot train this network \(Conv3D is only supported on MPS for macOS 13.2\)"),
    ],
    ids=["right", "rounded", "values", "gradients", "nan", "lacks"],
)
def test_a_network_is_not_trained_on_apples_gpu_where_that_computes_nonsense(config, tmp_path, monkeypatch, capsys, convolve, words):
    """PyTorch's issue 197114: the training itself told a Dice of 0.9 of weights that were worth nothing anywhere else."""
    apple(monkeypatch, convolve)
    made = [t.make_job(replace_fit(config, accelerator=a), tmp_path / "cache") for a in ("auto", "mps", "gpu", "cpu")]
    if not words:
        state = torch.get_rng_state()
        assert [t._accelerator(job) for job in made] == ["auto", "mps", "gpu", "cpu"]
        assert torch.equal(state, torch.get_rng_state())  # the same training as without the look
    else:
        said = f"PyTorch {re.escape(torch.__version__)} {words} on this computer's mps"
        for job in made[1:3]:
            with pytest.raises(UserError, match=f"{said}; train on the CPU"):
                t.run(job, tmp_path / "run")
        t.run(made[0], tmp_path / "run")
        run = json.loads((tmp_path / "run" / t.RUN).read_text("utf-8"))
        assert run["device"] == "cpu" and run["finished"] and re.fullmatch(f"{said}, so the CPU trains.", run["note"])
        assert run["note"] in capsys.readouterr().err
        assert t._accelerator(made[3]) == "cpu"


def test_what_is_in_no_part_is_trained_on(config):
    parts = {"a": "", "b": "train", "c": "validation", "d": "test"}
    cases = [Case(name, name, (), Path(name), split=split) for name, split in parts.items()]
    assert [[c.name for c in part] for part in t.held_out(cases, config, None)] == [["a", "b"], ["c"]]


def test_minutes_are_minutes(config, tmp_path):
    keeper = t.Keeper(tmp_path, replace_fit(config, minutes=2).fit)
    late = []
    for keeper.seconds in (119.0, 121.0):
        late.append(keeper.late())
    assert late == [False, True]


def test_time_asleep_is_none_of_training(config, tmp_path, monkeypatch):
    """On Windows time.monotonic() goes on meanwhile."""
    ticks = [5_000_000_000]

    def tell(pointer):
        pointer._obj.value = ticks[0]
        return 1

    monkeypatch.setattr(t.sys, "platform", "win32")
    monkeypatch.setattr(t.ctypes, "windll", SimpleNamespace(kernel32=SimpleNamespace(QueryUnbiasedInterruptTime=tell)), raising=False)
    keeper, module = t.Keeper(tmp_path, replace_fit(config, minutes=13.5).fit), Mock()
    keeper.on_train_epoch_start(Mock(), module)
    for _ in range(3):
        ticks[0] += 40 * 10_000_000
        keeper.on_train_batch_end(Mock(is_last_batch=True), module)
    assert keeper.seconds == 120


def test_of_several_processes_one_says_when_time_is_up(config, tmp_path, monkeypatch):
    """By their own clocks one had stopped, and the others waited for it without end."""
    keeper, module = t.Keeper(tmp_path, replace_fit(config, minutes=1).fit), Mock()
    module.model.parameters.return_value, module.average.state_dict.return_value = [], {}
    module.last_scores = {}
    module.job.network.to_json.return_value = {}
    for own, first in ((0, True), (1000, False)):
        trainer = Mock(current_epoch=0, should_stop=False, check_val_every_n_epoch=2, is_last_batch=True, is_global_zero=False)
        trainer.strategy.broadcast.return_value = first
        keeper.seconds, keeper._since = own, time.monotonic()
        keeper.on_train_batch_end(trainer, module)
        keeper.on_train_epoch_end(trainer, module)
        assert keeper.late() != first and trainer.should_stop == first and (trainer.check_val_every_n_epoch == 1) == first


def test_a_network_in_training_is_scored_as_it_will_be_used():
    """Batch norm and dropout compute otherwise while they learn, and would learn from the held-out case."""
    network = t.build(UNetConfig(dimensions=3, in_channels=1, out_channels=2, channels=(4, 8), norm="batch")).train()
    batch = np.random.default_rng(0).normal(5, 3, (1, 1, 8, 8, 8)).astype(np.float32)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = t.LiveEngine(network).run(batch)
    assert network.training and same(before, network.state_dict())
    assert np.allclose(found, network.eval()(torch.from_numpy(batch)).detach().numpy(), atol=1e-5)


def test_a_label_of_replayed_cases_alone_can_be_trained(config, dataset, tmp_path):
    cases = find_cases(dataset)
    train, _ = t.held_out(cases.cases, config, 0)
    load = type(cases).load
    own = type("Own", (type(cases),), {"load": lambda self, c: (load(self, c)[0], np.minimum(load(self, c)[1], 1))})(**vars(cases))
    with pytest.raises(UserError, match="Label 2 .* is in none of"):
        t.make_job(config, tmp_path / "a", own).prepare()
    t.make_job(config, tmp_path / "b", own, replay=(cases, 0.5)).prepare()


def test_one_whose_time_was_up_goes_on_with_more_of_it(config, dataset, tmp_path):
    for minutes, epochs in ((1e-6, 1), (1e-6, 1), (60, 3)):
        t.train(replace_fit(config, minutes=minutes), tmp_path / "run", cache=tmp_path / "cache")
        assert json.loads((tmp_path / "run" / t.RUN).read_text("utf-8"))["epochs"] == epochs


@pytest.mark.parametrize("third", [0.4, 0.9])
def test_the_epoch_in_which_time_is_up_is_validated(config, tmp_path, monkeypatch, third):
    """16 of 48 steps had been thrown away, or a run had ended without any Dice. Going on, the extra validation has changed nothing."""
    dice, scored = {3: third, 2: 0.5, 4: 0.5, 6: 0.5, 8: 0.5}, []
    monkeypatch.setattr(t.HeldOut, "score", lambda self, index, network: scored.append(now.current_epoch + 1) or {"ball": dice[scored[-1]]})
    clock, now = [0.0], None
    monkeypatch.setattr(t, "awake", lambda: clock[0])

    class Clock(L.Callback):
        def on_train_start(self, trainer, module):
            nonlocal now
            now = trainer

        def on_train_batch_end(self, *args):
            clock[0] += 60 / config.fit.steps

    config = replace_fit(config, epochs=20, validate_every=2, patience=4)

    def go(folder, minutes):
        scored.clear()
        watched = watch.callbacks(tmp_path / folder, config, bar=False, tensorboard=False)
        result = t.train(replace_fit(config, minutes=minutes), tmp_path / folder, cache=tmp_path / "cache", callbacks=[*watched, Clock()])
        return result, json.loads((tmp_path / folder / t.RUN).read_text("utf-8"))["epochs"], live.read(tmp_path / folder / "live.jsonl")[-1]

    result, epochs, end = go("late", 2.5)
    assert epochs == 3 and scored == [2, 3] and end["message"] == "after 3 of 20 epochs, as its time (fit.minutes) was up"
    state = weights(tmp_path / "late")
    latest = {k.removeprefix("average."): v for k, v in state.items() if k.startswith("average.")}
    best = max(0.5, third)
    assert result.dice == pytest.approx(best) and result.epoch == (2 if third > 0.5 else 1)
    assert same(latest, result.network.state_dict()) == (third > 0.5)
    whole, epochs, end = go("whole", None)
    assert epochs == 6 and scored == [2, 4, 6] and end["message"] == "after 6 of 20 epochs, by early stopping"
    result, epochs, _ = go("late", None)
    assert epochs == 6 and scored == [4, 6] and same(weights(tmp_path / "late"), weights(tmp_path / "whole"))
    assert result.dice == pytest.approx(best) and (third > 0.5 or same(result.network.state_dict(), whole.network.state_dict()))
