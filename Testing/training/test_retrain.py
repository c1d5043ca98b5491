"""A retraining from its base to the verdict: through the detached process and the command, killed, stopped, out of disk, not a number."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for name in ("monai", "pydantic", "lightning", "yaml"):
    pytest.importorskip(name)

from safetensors.torch import save  # noqa: E402
from test_train import same  # noqa: E402
from unetseg_training import cli, live, report, retrain, watch  # noqa: E402
from unetseg_training import config as c  # noqa: E402
from unetseg_training.cases import Case, find_cases  # noqa: E402
from unetseg_training.train import CHECKPOINT, WEIGHTS, Keeper  # noqa: E402
from UNetSegmentationLib import training  # noqa: E402
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image, write_image  # noqa: E402
from UNetSegmentationLib.model import Label, ModelPackage, find_model, write_package  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402
from UNetSegmentationLib.training import Options  # noqa: E402
from workers import make_card, make_onnx  # noqa: E402

LABELS = [Label(1, "Bright", (230, 0, 0), {}), Label(2, "Dark", (0, 0, 230), {})]
SETTINGS = {"epochs": 4, "steps": 4, "batch": 2, "warmup": 2, "precision": "32", "accelerator": "cpu", "ema": 0.5, "learning_rate": 3e-3}


def add_cases(dataset, count, values=(3.0, -3.0), first=0):
    """Noise with a ball of each label, in places of their own; values: of the voxels in the labels."""
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        grid = np.indices((12, 14, 16))
        array, mask = rng.normal(0, 0.2, grid.shape[1:]).astype(np.float32), np.zeros(grid.shape[1:], np.uint8)
        for label, value in enumerate(values, 1):
            at = [6, 4 + 6 * (label - 1), int(rng.integers(4, 12))]
            ball = sum((g - a) ** 2 for g, a in zip(grid, at)) <= 9
            array[ball], mask[ball] = value, label
        dataset.add(Image(array, (1.0, 1.0, 1.5)), mask, name=f"case{i}", patient=f"P{i}", allow={"empty"} if not values else ())


@pytest.fixture
def dataset(tmp_path):
    made = Dataset.create(tmp_path / "balls", "balls", LABELS, ["MR"])
    (made.folder / "salt").write_text("5" * 64 + "\n")  # who is held out depends on it, and through() is of one such set
    add_cases(made, 6)
    return made.folder


@pytest.fixture
def base(tmp_path):
    """A package with random weights to train on, whose ONNX finds what has the value of its label: 1 or 2."""
    torch.manual_seed(0)
    network = UNetConfig(dimensions=3, in_channels=1, out_channels=3, channels=(4, 8))
    labels = [{"value": label.value, "name": label.name} for label in LABELS]
    card = make_card(
        channels=["MR"],
        labels=labels,
        spacing=[1.0, 1.0, 1.0],
        intensity={"mode": "none"},
        network=network.to_json(),
        licence="CC0",
        description="Finds balls.",
        training_data=["other balls"],
        postprocess={"fill_holes": True},
    )
    path = tmp_path / "base" / "toy-1.0.0.unet.zip"
    return write_package(path, card, make_onnx("threshold", card), save(build(network).state_dict()))


def created(dataset, base, **fit):
    """A job with a plan that trains in a second."""
    job = training.create(dataset, base, Options())
    settings = {
        "model": {"name": "toy", "version": "1.1.0"},
        "data": {"path": str(dataset), "folds": 2},
        "labels": [{"name": label.name} for label in LABELS],
        "channels": ["MR"],
        "input": {"patch": [16, 16, 16], "spacing": [1, 1, 1], "intensity": {"mode": "none"}},
        "network": {"channels": [4, 8]},
        "fit": {**SETTINGS, **fit},
    }
    c.write(c.parse(settings), job.folder / "config.yaml")
    return job


def finished(job, say=None):
    """Do it in this process, without the report and the pictures of its progress: they take longer than such a training, and the
    tests of the command look at them."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "write", lambda folder: folder)
        m.setattr(watch.Watch, "_draw", lambda *words: None)
        assert training.claim(job.folder)
        retrain.run(job.folder, say)
    return training.read(job.folder)


def weights(job):
    return torch.load(job.folder / CHECKPOINT, weights_only=True)["state_dict"]


_through = []  # one training serves all that are compared with it


def through(dataset, base):
    """The weights of a training that nothing happened to."""
    if not _through:
        job = finished(created(dataset, base))
        assert job.state == "finished", job.text
        _through.append(weights(job))
    return _through[0]


def until(folder, good, seconds=300):
    end = time.monotonic() + seconds
    while not good(job := training.read(folder)):
        assert time.monotonic() < end, job
        time.sleep(0.05)
    return job


# ------------------------------------------------------------------------------------------------------------- the whole


def test_the_command_makes_a_package_with_before_and_after(dataset, base, models_folder, command):
    code, out, err = command("finetune", dataset, "--from", base.path, "--quick", "--minutes", "0.02", "--device", "cpu")
    assert code == 0, err
    (job,) = training.jobs(dataset)
    assert job.state == "finished" and job.base == "toy-1.0.0" and job.estimate > 0 and job.text in out
    assert "From toy 1.0.0: " in out and "Finds balls." not in out
    # Nobody's values are 1 or 2, so the base finds next to nothing.
    result = job.result
    assert job.verdict == result["verdict"] and result["sentence"] == job.text
    assert result["mean"]["dice"]["before"]["mean"] < 0.2 and 0 <= result["mean"]["dice"]["after"]["mean"] <= 1
    figures = result["labels"]["Bright"]
    assert set(figures) == {"dice", "hausdorff95_mm", "volume_error_percent", "present", "missed", "false"}
    assert set(figures["dice"]) == {"before", "after", "change"} and figures["present"] == figures["dice"]["after"]["cases"]
    assert set(figures["dice"]["after"]) == {"mean", "low", "high", "cases"} and result["parent"] == "toy-1.0.0"
    worst = result["worst"][0]
    pictures = {key: read_image(job.folder / file) for key, file in worst["files"].items()}
    assert set(pictures) == {"image", "truth", "before", "after"} and len({p.shape for p in pictures.values()}) == 1
    assert set(np.unique(pictures["truth"].array)) == {0, 1, 2} and worst["dice_before"] < 0.2
    # The held-out cases are in the dataset, for this retraining and all later ones.
    splits = {e.name: e.split for e in Dataset.open(dataset).entries.values()}
    held = {r["case"] for r in result["rows"]}
    assert held == {n for n, s in splits.items() if s == "validation"} and set(splits.values()) == {"train", "validation"}
    # The package's own words.
    package = ModelPackage.read(job.package)
    card = package.card.data
    assert job.package.name == "toy-1.1.0.unet.zip" and card["description"] == "Finds balls." and card["licence"] == "CC0"
    assert card["postprocess"] == {"fill_holes": True} and card["training_data"][0] == "other balls"
    lineage = card["lineage"]
    assert lineage["parent"]["name"] == "toy" and lineage["parent"]["version"] == "1.0.0" and len(lineage["parent"]["sha256"]) == 64
    assert lineage["dataset"]["name"] == "balls" and lineage["dataset"]["revision"] == Dataset.open(dataset).revision
    assert lineage["cases"] == 6 - len(held) and lineage["parity"]["largest_difference"] < 1e-4
    assert package.card.origin.startswith(f"Fine-tuned from toy 1.0.0 with {6 - len(held)} cases of balls (revision ")
    assert abs(card["metrics"]["dice"]["Bright"] - figures["dice"]["after"]["mean"]) < 1e-3
    events = [line["event"] for line in live.read(job.live)]
    assert events[0] == "start" and events[-1] == "end"
    assert (job.folder / "report.html").is_file() and not list(job.folder.glob("draft*"))
    # The other commands.
    assert str(job.folder) in command("jobs", dataset)[1] and command("stop", job.folder)[0] == 2
    assert command("resume", job.folder)[0] == 2
    training.update(job.folder, verdict="worse")
    code, _, err = command("promote", job.folder, "use")
    assert code == 2 and "worse than toy-1.0.0; keep both" in err
    assert command("promote", job.folder, "use", "--worse")[0] == 0 and (models_folder / "toy-1.1.0.unet.zip").is_file()
    assert f"finished, used: {job.text}" in command("jobs", dataset)[1]


def test_the_detached_process_is_killed_and_goes_on_exactly(dataset, base, monkeypatch):
    whole = finished(created(dataset, base, epochs=24, patience=24))
    assert whole.state == "finished", whole.text
    job = created(dataset, base, epochs=24, patience=24)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here, or sums differ in their last bits
    training._go(job.folder, sys.executable)
    job = until(job.folder, lambda j: not j.running or (j.state == "training" and training.goes_on(j.folder)))
    os.kill(job.pid, signal.SIGKILL)
    job = until(job.folder, lambda j: not j.running)
    assert job.state == "lost" and job.resumable and not (job.folder / "result.json").exists()
    # What is added, or corrected, meanwhile is for the next retraining.
    set_ = Dataset.open(dataset)
    add_cases(set_, 1, first=9)
    entry = set_.entries["case0"]
    set_.add(read_image(entry.images[0]), np.where(read_image(entry.label).array == 1, 1, 0), name="case0", labels=LABELS)
    job = finished(training.resume(job, launch=False))
    assert job.state == "finished", job.text
    assert same(weights(job), weights(whole)) and (job.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()
    assert {r["case"] for r in job.result["rows"]} == {r["case"] for r in whole.result["rows"]}
    record = json.loads((job.folder / "run.json").read_text("utf-8"))
    assert record["resumed"] == 1 and record["finished"]


# ----------------------------------------------------------------------------------------------------------- stop, trouble


class At:
    """Does something before a step of the training."""

    def __init__(self, monkeypatch, step, act):
        before = retrain.Steer.on_train_batch_end

        def hook(steer, trainer, *args):
            if trainer.global_step == step:
                act(steer.told)
            steer.told._looked = 0.0  # look at each step
            before(steer, trainer, *args)

        monkeypatch.setattr(retrain.Steer, "on_train_batch_end", hook)


def test_stopped_it_keeps_the_best_and_can_go_on_exactly(dataset, base, monkeypatch):
    with monkeypatch.context() as m:
        At(m, 10, lambda told: (told.folder / "stop").touch())  # in the third epoch
        job = finished(created(dataset, base))
    assert job.state == "stopped" and job.package.is_file() and job.result["stopped"] and job.resumable
    assert not (job.folder / "stop").exists() and live.read(job.live)[-1]["reason"] == "stopped"
    early = weights(job)
    job = finished(training.resume(job, launch=False))
    assert job.state == "finished" and same(weights(job), through(dataset, base)) and not same(early, weights(job))
    with monkeypatch.context() as m:
        At(m, 2, lambda told: (told.folder / "stop").touch())
        job = finished(created(dataset, base))
    assert job.state == "stopped" and job.package is None and "before an epoch was finished" in job.text and job.resumable


def test_the_end_of_the_system_is_no_stop_and_it_can_go_on_exactly(dataset, base, monkeypatch):
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def ended(told):  # as Lightning's handler does; a real signal ended the whole test process where a handler was there before
        raise SIGTERMException

    with monkeypatch.context() as m:
        At(m, 10, ended)  # in the third epoch
        job = finished(created(dataset, base))
    assert job.state == "lost" and job.text.startswith("The system asked it to end") and job.resumable
    assert job.kept and job.package is None and not list(job.folder.glob("toy-*"))
    job = finished(training.resume(job, launch=False))
    assert job.state == "finished" and same(weights(job), through(dataset, base))


def test_stop_in_the_last_moment_is_no_end_without_a_model(dataset, base, monkeypatch):
    """The panel shows a state that is some seconds old."""
    export = retrain.export_run

    def stopped(*words, **more):
        (job.folder / "stop").touch()
        return export(*words, **more)

    monkeypatch.setattr(retrain, "export_run", stopped)
    job = created(dataset, base, epochs=1)
    job = finished(job)
    assert job.state == "finished" and job.package.is_file() and not (job.folder / "stop").exists(), job.text


def test_a_loss_that_is_no_number_fails_and_the_best_can_be_kept(dataset, base, monkeypatch):
    from unetseg_training import losses

    made = losses.make

    def broken(*args):
        loss, calls = made(*args), []
        return lambda output, target: loss(output, target) * (calls.append(1) or (float("nan") if len(calls) > 6 else 1.0))

    with monkeypatch.context() as m:
        m.setattr(losses, "make", broken)
        job = finished(created(dataset, base))
    assert job.state == "failed" and job.text.startswith("The loss is not a number at step 7 (cases case") and job.kept and not job.package
    job = finished(training.resume(job, finish=True, launch=False))
    assert job.state == "stopped" and job.package.is_file() and job.verdict


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(dataset, base, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        At(m, 6, lambda told: m.setattr(os, "fsync", full))  # with which a checkpoint is brought to the disk
        job = finished(created(dataset, base))
    assert job.state == "failed" and "check the disk's space" in job.text and "is kept: resume it then" in job.text
    assert not list(job.folder.glob(".unetseg-*"))
    job = finished(training.resume(job, launch=False))
    assert job.state == "finished" and same(weights(job), through(dataset, base))


def test_a_disk_that_is_full_before_the_first_checkpoint_promises_nothing(dataset, base, monkeypatch):
    """The best weights, which are written before it, are there, but nothing goes on from them."""
    brought = os.fsync

    def full(handle):
        if (made.folder / WEIGHTS).is_file():
            raise OSError(errno.ENOSPC, "No space left on device")
        brought(handle)

    made = created(dataset, base)
    with monkeypatch.context() as m:
        At(m, 2, lambda told: m.setattr(os, "fsync", full))
        job = finished(made)
    assert (job.folder / WEIGHTS).is_file() and not (job.folder / CHECKPOINT).exists()
    assert job.state == "failed" and job.text.endswith("No whole epoch is kept: resume it then, and it begins anew.")


@pytest.mark.parametrize("count, told", [(1, "has 1 annotated case to learn from"), (3, "has cases of one patient only (3)")])
def test_too_few_cases_are_told(tmp_path, count, told):
    for i in range(count):
        values = np.random.default_rng(i).normal(size=(8, 8, 8)).astype(np.float32)
        name = f"LIDC-IDRI-0001_{i}.nii.gz"
        write_image(Image(values), tmp_path / "set" / "images" / name)
        write_image(Image((values > 1).astype(np.uint8)), tmp_path / "set" / "labels" / name)
    job = finished(training.create(tmp_path / "set"))
    assert job.state == "failed" and told in job.text and job.text.endswith("add more.")


# ---------------------------------------------------------------------------------------------------------- held out, plan


def test_who_is_held_out_stays_held_out_as_the_dataset_grows(dataset):
    job = training.create(dataset)
    first, facts = retrain._cases(job.folder, job)
    held = {x.name for x in first.cases if x.split == "validation"}
    assert held and facts["name"] == "balls" and retrain._cases(job.folder, job)[0].cases == first.cases
    training.end(job.folder, "finished", "")
    made = Dataset.open(dataset)
    add_cases(made, 9, first=6)
    later = training.create(dataset)
    more = retrain._cases(later.folder, later)[0]
    assert held < {x.name for x in more.cases if x.split == "validation"} and len(more.cases) == 15
    assert len(retrain._held_out(more, True)) == 3
    # Test cases, where there are any, are what both models are scored on, and nobody learns from them.
    names = {x.name for x in made.refresh().entries.values() if x.split == "train"}
    made._commit(lambda data: [data["cases"][n].update(split="test") for n in sorted(names)[:4]])
    training.end(later.folder, "finished", "")
    last = training.create(dataset)
    assert {x.split for x in retrain._held_out(retrain._cases(last.folder, last)[0], True)} == {"test"}


def case(patient, split="", name=None):
    return Case(name or patient, patient, (), None, split=split)


def test_who_is_held_out_of_another_programs_dataset_stays_so_as_it_grows():
    for seed in range(40):
        people = [f"P{seed}-{i}" for i in range(30)]
        learnt: set[str] = set()
        for n in range(2, 31, 4):
            now = {c.patient for c in retrain._dealt([case(p) for p in people[:n]]) if c.split == "validation"}
            assert 1 <= len(now) < n
            # Nobody whom a former model learnt from is held out later, but of two or three patients.
            assert n <= 6 or not now & learnt
            learnt = set(people[:n]) - now
    whole = retrain._dealt([case(f"P{i}") for i in range(500)])
    assert 0.15 < np.mean([c.split == "validation" for c in whole]) < 0.25


def test_a_marked_patient_is_held_out_where_those_held_out_have_empty_masks():
    cases = [case("a", "train"), case("b", "train"), case("c", "train"), case("d", "validation"), case("e", "validation")]

    def parts(marked):
        swapped = retrain._with_marks(cases, SimpleNamespace(marked=lambda c: c.patient in marked))
        return {c.patient for c in swapped if c.split == "validation"}

    assert parts("abe") == {"d", "e"} and parts("bc") == {"b", "e"} and parts("c") == {"d", "e"}


def test_models_are_compared_on_held_out_cases_that_mark_something():
    """On empty masks any model that finds nothing has a Dice of 1."""
    cases = [*(case(f"t{i:02d}", "test") for i in range(25)), case("v", "validation"), case("w", "validation")]

    def chosen(*marked):
        loaded = SimpleNamespace(cases=cases, load=lambda c: (None, np.array([c.name in marked])))
        return [c.name for c in retrain._held_out(loaded, True)]

    assert len(chosen("t00")) == 20 and chosen("t04", "t09") == ["t04", "t09"] and chosen("w") == ["v", "w"]


def test_what_is_trained_becomes_a_model_without_the_training_cases(dataset):
    job = training.create(dataset)
    cases = retrain._cases(job.folder, job)[0].cases
    one = next(c for c in cases if c.split == "train")
    with pytest.raises(UserError, match="A training of this dataset runs"):
        Dataset.open(dataset).remove(one.name, erase=True)
    training.update(job.folder, state="stopped")
    Dataset.open(dataset).remove(one.name, erase=True)
    with pytest.raises(UserError, match="is no longer there, so this retraining cannot go on; bring it back, or start anew"):
        retrain._thawed(job.folder, job)
    with pytest.raises(UserError, match=r"or make a model of what is trained \(resume --finish\)"):
        retrain._thawed(job.folder, replace(job, kept=True))
    assert retrain._thawed(job.folder, job, finish=True)[0].cases == cases
    Dataset.open(dataset).remove(next(c for c in cases if c.split == "validation").name, erase=True)
    with pytest.raises(UserError, match="is no longer there"):
        retrain._thawed(job.folder, job, finish=True)


def test_a_model_of_other_labels_or_channels_gets_a_name_that_no_other_has(tmp_path, base, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(base.path, models / "my best.unet.zip")  # the card says what it is called
    monkeypatch.setenv("UNETSEG_MODELS", str(models))
    monkeypatch.setattr(training, "update", lambda folder, **changes: None)
    parent, options = ModelPackage.read(models / "my best.unet.zip"), Options()
    ring = [Label(1, "Ring", (1, 2, 3), {})]
    for number, (labels, channels, start, want) in enumerate(
        (
            (ring, ["MR"], parent, ("toy-2", "0.1.0")),
            (ring, ["MR"], None, ("toy-2", "0.1.0")),
            (LABELS, ["T1", "T2"], parent, ("toy-2", "0.1.0")),
            (LABELS, ["CT"], parent, ("toy", "1.1.0")),
        )
    ):
        made = Dataset.create(tmp_path / f"set{number}", "toy", labels, channels)
        for i in range(2):
            values = np.random.default_rng(i).normal(size=(len(channels), 8, 8, 8)).astype(np.float32)
            made.add(Image(values[0] if len(channels) == 1 else values), (values[0] > 1).astype(np.uint8), patient=f"P{i}")
        job = SimpleNamespace(name="toy", options=options, folder=tmp_path)
        data = {"model": {"training_data": ["x"]}, "input": {}}
        found = retrain._named(job, start, find_cases(made.folder), {"name": "toy"}, data)
        assert (found["name"], found["version"]) == want


def test_several_channels_are_the_same_in_the_same_order():
    """They are given to a model by their places."""
    from unetseg_training.plan import same_task
    from UNetSegmentationLib.model import Card

    card = Card(make_card(channels=["T1", "T2"], labels=[{"value": 1, "name": "Ring"}]))
    orders = (("t1", "T2"), ("T2", "T1"), ("T1", "PET"), ("T1",))
    cases = [SimpleNamespace(labels=[Label(1, "ring", (1, 2, 3), {})], channels=names) for names in orders]
    assert [same_task(card, each) for each in cases] == [True, False, False, False]


def test_a_new_version_takes_its_bases_channels_in_that_ones_order(tmp_path, make_package):
    base = make_package(channels=["T1", "T2"], labels=[{"value": 1, "name": "Bright"}])
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[2:4] = 1
    made = Dataset.create(tmp_path / "set", "set", LABELS, ["T2", "T1"])  # no case marks Dark, so the cases are found once more
    for i in range(3):
        made.add(Image(np.stack([mask * 2.0, mask * (1 + i / 10)]).astype(np.float32)), mask, patient=f"P{i}")
    job = training.create(made.folder)
    cases = retrain._cases(job.folder, job, base)[0]
    assert cases.channels == ("T1", "T2") and [label.name for label in cases.labels] == ["Bright"]
    assert all(cases.load(one)[0].array[1].max() == 2 for one in cases.cases)
    # Of one file none can be moved.
    (tmp_path / "nn" / "imagesTr").mkdir(parents=True)
    facts = {"modality": {"0": "T2", "1": "T1"}, "labels": {"0": "background", "1": "Bright"}, "training": []}
    for i in range(2):
        write_image(Image(np.stack([mask * 2.0, mask * 1.0]).astype(np.float32)), tmp_path / "nn" / "imagesTr" / f"c{i}.nii.gz")
        write_image(Image(mask), tmp_path / "nn" / "labelsTr" / f"c{i}.nii.gz")
        facts["training"].append({"image": f"./imagesTr/c{i}.nii.gz", "label": f"./labelsTr/c{i}.nii.gz"})
    (tmp_path / "nn" / "dataset.json").write_text(json.dumps(facts), "utf-8")
    job = training.create(tmp_path / "nn")
    cases = retrain._cases(job.folder, job, base)[0]
    assert cases.channels == ("T2", "T1") and cases.load(cases.cases[0])[0].array[0].max() == 2


def test_a_value_of_a_new_version_means_what_it_did(tmp_path, base):
    """Its base's values are 2 and 5, and its outputs in the order of the names."""
    card = base.card.data
    labels = [{"value": 5, "name": "Bright"}, {"value": 2, "name": "dark"}]
    base = write_package(tmp_path / "other" / "toy-1.0.0.unet.zip", {**card, "labels": labels}, base.onnx, base.safetensors)
    made = Dataset.create(tmp_path / "set", "set", [replace(LABELS[1], value=1), replace(LABELS[0], value=2)], ["MR"])
    add_cases(made, 4)
    job = finished(training.create(made.folder, base, Options(minutes=0.02, device="cpu")))
    assert job.state == "finished", job.text
    package = ModelPackage.read(job.package)
    assert [(label.value, label.name) for label in package.card.labels] == [(5, "Bright"), (2, "Dark")] and package.card.version == "1.1.0"
    files = job.result["worst"][0]["files"]
    image, truth, after = (read_image(job.folder / files[key]).array for key in ("image", "truth", "after"))
    assert set(np.unique(truth)) == {0, 2, 5} >= set(np.unique(after)) and image[truth == 2].min() > 1 and image[truth == 5].max() < -1


def test_masks_without_names_are_of_its_bases_labels(tmp_path, base):
    image, mask = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    mask = np.digitize(mask, (0, 1)).astype(np.uint8)
    for i in range(3):
        write_image(Image(image + i), tmp_path / "set" / "images" / f"c{i}.nii.gz")
        write_image(Image(mask), tmp_path / "set" / "labels" / f"c{i}.nii.gz")
    job = training.create(tmp_path / "set")
    for _ in range(2):  # and as they were frozen
        cases, facts = retrain._cases(job.folder, job, base)
        assert "taken as toy's, 1 for Bright, 2 for Dark" in facts["named"][0]
        assert [label.name for label in cases.labels] == ["Bright", "Dark"]
    assert set(np.unique(cases.load(cases.cases[0])[1])) == {0, 1, 2}


def test_a_new_version_gives_its_bases_labels_the_order_they_had(tmp_path, base):
    made = Dataset.create(tmp_path / "set", "set", [replace(LABELS[1], value=1), replace(LABELS[0], value=2)], ["MR"])
    add_cases(made, 2)
    job = training.create(made.folder, base)
    cases = retrain._cases(job.folder, job, base)[0]
    assert [(label.value, label.name) for label in cases.labels] == [(1, "Bright"), (2, "Dark")]
    image, mask = cases.load(cases.cases[0])
    assert image.array[mask == 2].min() > 1 and image.array[mask == 1].max() < -1  # add_cases() made them the other way round


def test_named_masks_keep_the_order_in_which_they_lie_on_others(tmp_path, base):
    import SimpleITK as sitk

    outer = np.pad(np.ones((4, 4, 4), np.uint8), 2)
    inner = np.pad(np.ones((2, 2, 2), np.uint8), 3)
    for part in ("images", "labels"):
        (tmp_path / "set" / part).mkdir(parents=True)
    for i in range(3):
        write_image(Image(np.full((8, 8, 8), i, np.float32)), tmp_path / "set" / "images" / f"c{i}.nii.gz")
        segments = sitk.GetImageFromArray(np.stack([outer, inner], -1), isVector=True)
        for layer, name in enumerate(("Dark", "Bright")):  # as base's labels, the other way round
            for field, value in {"ID": name, "Name": name, "LabelValue": "1", "Layer": str(layer), "Color": "1 0 0"}.items():
                segments.SetMetaData(f"Segment{layer}_{field}", value)
        sitk.WriteImage(segments, str(tmp_path / "set" / "labels" / f"c{i}.seg.nrrd"))
    job = training.create(tmp_path / "set", base)
    cases = retrain._cases(job.folder, job, base)[0]
    assert [label.name for label in cases.labels] == ["Dark", "Bright"]
    assert np.array_equal(cases.load(cases.cases[0])[1], outer + inner)


def test_a_label_that_was_renamed_in_the_index_is_learnt(dataset):
    index = dataset / "dataset.json"
    data = json.loads(index.read_text("utf-8"))
    data["segments"][0]["name"] = "Tumour"
    index.write_text(json.dumps(data), "utf-8")
    job = training.create(dataset)
    cases, facts = retrain._cases(job.folder, job)
    assert [label.name for label in cases.labels] == ["Tumour", "Dark"] and not facts["unmarked"]


def test_a_dataset_of_another_program_is_held_out_by_patient(tmp_path):
    for i in range(6):
        values = np.random.default_rng(i).normal(size=(8, 8, 8)).astype(np.float32)
        write_image(Image(values), tmp_path / "set" / "images" / f"case{i}.nii.gz")
        write_image(Image((values > 1).astype(np.uint8)), tmp_path / "set" / "labels" / f"case{i}.nii.gz")
    job = training.create(tmp_path / "set")
    made, facts = retrain._cases(job.folder, job)
    assert {x.split for x in made.cases} == {"train", "validation"} and facts["revision"] is None
    assert made.cases == retrain._cases(job.folder, job)[0].cases and made.load(made.cases[0])[1].any()


@pytest.mark.parametrize("more, name, told", [([], "toy", ""), (["Ring"], "set", " New, so compared with nothing: Ring.")])
def test_a_label_that_no_case_marks_is_left_out_and_told(tmp_path, base, more, name, told):
    """A first case brings all labels of its model, of which a person may correct some only."""
    ghost, found = Label(1, "Ghost", (1, 2, 3), {}), [Label(2, "Bright", (230, 0, 0), {}), Label(3, "Dark", (0, 0, 230), {})]
    found += [Label(4, label, (0, 9, 0), {}) for label in more]  # which the base does not know
    made = Dataset.create(tmp_path / "set", "set", [ghost, *found], ["MR"])
    for i in range(4):
        values = np.random.default_rng(i).normal(0, 0.2, (12, 14, 16)).astype(np.float32)
        mask = np.zeros(values.shape, np.uint8)
        mask[3:7, 3:7, 3:7], mask[3:7, 8:12, 8:12], mask[8:10, 3:7, 3:7] = 2, 3, 4 if more else 0
        made.add(Image(values), mask, patient=f"P{i}")
    job = finished(training.create(made.folder, base, Options(minutes=0.02, device="cpu")))
    assert job.state == "finished", job.text
    assert [label.name for label in ModelPackage.read(job.package).card.labels] == ["Bright", "Dark", *more] and job.name == name
    note = "Marked in no case that was learnt from, so the new model does not know it: Ghost."
    assert job.result["note"].endswith(note + told)
    assert np.array_equal(np.unique(read_image(next((job.folder / "check").glob("*_truth.nii.gz"))).array), range(3 + len(more)))


def test_what_was_not_measured_and_a_gpu_that_was_not_used_are_told(tmp_path, base, monkeypatch):
    """On the card and in the mean a label that no held-out case marks had a Dice of 1.000."""
    monkeypatch.setattr("unetseg_training.train.mps_fault", lambda network: "PyTorch 9 gives wrong values on this computer's mps")
    made = Dataset.create(tmp_path / "set", "set", LABELS, ["MR"])
    add_cases(made, 3)
    add_cases(made, 2, values=(3.0,), first=3)
    made._commit(lambda data: [c.update(split="validation" if n > "case2" else "train") for n, c in data["cases"].items()] and None)
    job = finished(created(made.folder, base, epochs=1))
    assert job.state == "finished", job.text
    result, card = job.result, ModelPackage.read(job.package).card.data
    assert list(result["labels"]) == list(card["metrics"]["dice"]) == ["Bright"]
    assert result["mean"]["dice"] == result["labels"]["Bright"]["dice"]
    assert result["note"].endswith("computer's mps, so the CPU trains. In no held-out case, so not measured: Dark.")
    assert {(w["case"], w["dice_after"]) for w in result["worst"]} == {(r["case"], r["dice_after"]) for r in result["rows"]}


def test_cases_from_before_a_label_are_told_and_not_scored_for_it(tmp_path, base):
    """Both models had a Dice of 0 there, for what nobody had looked for."""
    made = Dataset.create(tmp_path / "set", "set", LABELS[:1], ["MR"])
    for i in range(6):
        values, mask = np.random.default_rng(i).normal(0, 0.2, (12, 14, 16)).astype(np.float32), np.zeros((12, 14, 16), np.uint8)
        mask[3:7, 3:7, 3:7], mask[3:7, 8:12, 8:12] = 1, 2 if i > 2 else 0
        made.add(Image(values + mask), mask, labels=LABELS if i > 2 else LABELS[:1], name=f"case{i}", patient=f"P{i}", allow=["label"])
    parts = ["train", "validation", "test", "train", "test", "test"]
    made._commit(lambda data: [c.update(split=part) for c, part in zip(data["cases"].values(), parts)] and None)
    said = []
    job = finished(created(made.folder, base, epochs=1), said.append)
    assert job.state == "finished", job.text
    note = "Added before the set had Dark, so trained as holding none of it, and not measured for it: 3 cases; "
    note += "correct each again, or remove it."
    assert note in job.result["note"] and note in said[: said.index("Checking the new model on held-out cases")]
    rows = {(r["case"], r["label"]) for r in job.result["rows"]}
    assert rows == {("case2", "Bright"), *((c, label) for c in ("case4", "case5") for label in ("Bright", "Dark"))}
    dark = job.result["labels"]["Dark"]["dice"]
    assert dark["before"]["cases"] == dark["after"]["cases"] == 2
    card = ModelPackage.read(job.package).card.data
    assert abs(card["metrics"]["dice"]["Dark"] - dark["after"]["mean"]) < 1e-3 and "early" not in card["lineage"]["dataset"]


def test_a_case_that_tells_nothing_of_any_label_is_not_among_the_worst(tmp_path, make_package):
    good, bad, cases = compared(tmp_path, make_package, [1.0, 1.0, 1.0])
    found = retrain.compare(bad, good, cases, cases.cases, tmp_path / "check", unjudged={"bright": ["case0"], "DARK": ["case0", "case1"]})
    assert {w["case"] for w in found["worst"]} == {"case1", "case2"} and found["cases"] == 2
    assert [(r["case"], r["label"]) for r in found["rows"]] == [("case1", "Bright"), ("case2", "Bright"), ("case2", "Dark")]


def test_a_device_that_is_not_there_is_told(dataset, base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = training.create(dataset, base, Options(device="gpu"))
    assert finished(job).text.startswith("There is no GPU here that PyTorch can use")


# --------------------------------------------------------------------------------------------------------------- verdict


def compared(tmp_path, make_package, shifts):
    """Two pointwise models on cases whose labels have the values 1 and 2, moved by these for the second model's cases."""
    made = Dataset.create(tmp_path / "set", "set", LABELS, ["CT"])
    for i, value in enumerate(shifts):
        add_cases(made, 1, values=(value, 2.0), first=i)
    labels = [{"value": 1, "name": "Bright"}, {"value": 2, "name": "Dark"}]
    swapped = [{"value": 1, "name": "dark"}, {"value": 2, "name": "bright"}]
    return make_package(labels=labels), make_package(labels=swapped), find_cases(tmp_path / "set")


def test_worse_better_and_the_same_are_told_apart(tmp_path, make_package):
    good, bad, cases = compared(tmp_path, make_package, [1.0, 1.0, 1.0, 1.0, 1.0])
    worse = retrain.compare(good, bad, cases, cases.cases)
    assert worse["verdict"] == "worse" and worse["sentence"].startswith("Worse: mean Dice 0.9") and "Bright fell by" in worse["sentence"]
    better = retrain.compare(bad, good, cases, cases.cases)
    assert better["verdict"] == "better" and "on 5 held-out cases of 5 patients (change +" in better["sentence"]
    equal = retrain.compare(good, good, cases, cases.cases)
    assert equal["verdict"] == "same" and equal["mean"]["dice"]["change"]["mean"] == 0 and "No worse" in equal["sentence"]
    # A few cases prove nothing, though all of them rise; but a fall is told all the same.
    for few in (1, 4):
        found = retrain.compare(bad, good, cases, cases.cases[:few])
        assert found["verdict"] == "same" and found["sentence"].startswith("Probably better, but so few cases could show it by chance")
    assert retrain.compare(good, bad, cases, cases.cases[:1])["verdict"] == "worse"


def test_a_model_that_finds_less_is_worse_however_many_cases_are_empty(tmp_path, make_package):
    """Both masks empty are a Dice of 1: one that finds nothing had "Better: mean Dice 0.288 before and 0.700 after" on 14 empty of 20."""
    made = Dataset.create(tmp_path / "set", "set", LABELS[:1], ["CT"])
    add_cases(made, 2, values=(1.0,))
    add_cases(made, 14, values=(), first=2)
    finds, blind = (make_package(labels=[{"value": 1, "name": n}, {"value": 2, "name": m}]) for n, m in (("Bright", "x"), ("x", "Bright")))
    cases = find_cases(made.folder)
    found = retrain.compare(finds, blind, cases, cases.cases)
    own = found["labels"]["Bright"]
    assert found["mean"]["dice"]["change"]["low"] > 0 and found["verdict"] == "worse"
    assert "before (missed 0 of 2) and 0.000 after (missed 2 of 2). Keep the former model" in found["sentence"]
    assert own["missed"] == {"before": 0, "after": 2} and own["false"] == {"before": 14, "after": 0} and own["present"] == 2
    assert own["dice_where_present"]["after"] == {"mean": 0, "low": 0, "high": 0, "cases": 2} and own["hausdorff95_mm"]["after"] is None
    marked = retrain.compare(finds, blind, cases, cases.cases[:2])
    assert "dice_where_present" not in {**marked["mean"], **marked["labels"]["Bright"]}


def test_labels_are_matched_by_name_and_worst_cases_kept(tmp_path, make_package):
    good, bad, cases = compared(tmp_path, make_package, [1.0, 5.0, 1.0, 1.0, 1.0])
    found = retrain.compare(bad, good, cases, cases.cases, tmp_path / "job" / "check")
    assert [w["case"] for w in found["worst"]][0] == "case1" and len(found["worst"]) == retrain.WORST
    files = found["worst"][1]["files"]
    before, truth = (read_image(tmp_path / "job" / files[k]).array for k in ("before", "truth"))
    # What bad calls its 1, dark, is the cases' 2: it has both labels the wrong way round.
    assert set(np.unique(before)) == {0, 1, 2} and (before[truth == 1] == 2).mean() > 0.9


def test_channels_are_matched_by_name_as_the_training_did(tmp_path, make_package):
    made = Dataset.create(tmp_path / "set", "set", LABELS, ["T2", "T1"])
    mask = np.zeros((12, 14, 16), np.uint8)
    mask[3:6], mask[7:10] = 1, 2
    for i in range(5):
        noise = np.random.default_rng(i).normal(0, 0.1, mask.shape)
        made.add(Image(np.stack([mask, noise]).astype(np.float32)), mask, name=f"c{i}", patient=f"P{i}")
    labels = [{"value": 1, "name": "Bright"}, {"value": 2, "name": "Dark"}]
    base, new = (make_package(channels=names, labels=labels) for names in (["T1", "T2"], ["T2", "T1"]))  # both look at the second
    cases = find_cases(tmp_path / "set")
    found = retrain.compare(base, new, cases, cases.cases)
    assert found["verdict"] == "worse" and found["mean"]["dice"]["before"]["mean"] == 1
    found = retrain.compare(make_package(channels=["T1", "CT"], labels=labels), new, cases, cases.cases)
    assert found["verdict"] == "" and "takes other channels (T1, CT)" in found["sentence"]
    # Two that have one name are two all the same.
    new, cases = make_package(channels=["MR", "MR"], labels=labels), replace(cases, channels=("MR", "MR"))
    assert retrain.compare(new, new, cases, cases.cases)["mean"]["dice"]["change"]["mean"] == 0


def test_without_a_common_label_or_channel_there_is_nothing_to_compare(tmp_path, make_package):
    good, _, cases = compared(tmp_path, make_package, [1.0, 1.0])
    other = make_package(labels=[{"value": 1, "name": "Tumour"}])
    two = make_package(channels=["CT", "PET"], labels=good.card.data["labels"])
    for base, why in ((other, "gives none of these labels"), (two, "cannot run")):
        found = retrain.compare(base, good, cases, cases.cases)
        assert found["verdict"] == "" and why in found["sentence"] and found["mean"]["dice"]["before"] is None
    partly = make_package(labels=[{"value": 1, "name": "Tumour"}, {"value": 2, "name": "Dark"}])
    found = retrain.compare(partly, good, cases, cases.cases)
    assert found["labels"]["Dark"]["dice"]["change"]["mean"] == 0 and found["labels"]["Bright"]["dice"]["before"] is None


def test_a_label_more_makes_no_model_worse(tmp_path, make_package):
    """The base knows Dark only; the new model has that as before, and misses all of Bright."""
    good, _, cases = compared(tmp_path, make_package, [9.0] * 5)
    dark = make_package(labels=[{"value": 1, "name": "other"}, {"value": 2, "name": "Dark"}])
    found = retrain.compare(dark, good, cases, cases.cases, tmp_path / "job" / "check")
    both = found["labels"]["Dark"]["dice"]
    assert found["verdict"] == "same" and found["mean"]["dice"] == both and found["labels"]["Bright"]["dice"]["after"]["mean"] < 0.1
    assert all(w["dice_before"] == w["dice_after"] for w in found["worst"])


def test_large_boxes_are_cut():
    image = Image(np.zeros((300, 40, 40), np.float32), (1.0, 1.0, 1.0), (5.0, 6.0, 7.0))
    mask = np.zeros(image.shape, np.uint8)
    mask[10:290, 20, 20] = 1
    cut = retrain._cut(image, {"truth": mask})
    assert cut["truth"].shape == (200, 40, 40) and cut["image"].origin == (5.0, 6.0, 7.0 + 50)
    assert retrain._cut(image, {"truth": mask * 0})["image"].shape == (41, 40, 40)
    # Between what is marked and what was found elsewhere there is nothing.
    truth, found = np.zeros_like(mask), np.zeros_like(mask)
    truth[20:30, 20, 20], found[280:290, 20, 20] = 1, 1
    cut = retrain._cut(image, {"truth": truth, "after": found})
    assert cut["truth"].shape == (200, 40, 40) and cut["truth"].array.sum() == 10 and not cut["after"].array.any()
    assert retrain._cut(image, {"truth": truth * 0, "before": found, "after": truth})["before"].array.sum() == 10


def test_worst_cases_are_written_where_windows_leaves_those_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(retrain.shutil, "rmtree", lambda folder, ignore_errors: None)  # another program holds one
    for _ in range(2):
        worst = [({"case": "c"}, {"image": Image(np.ones((2, 3, 4), np.uint8))})]
        (entry,) = retrain._written(tmp_path / "check", worst)
    assert read_image(tmp_path / entry["files"]["image"]).shape == (2, 3, 4)


def test_a_device_and_the_minutes_that_were_asked_for_are_planned_with(dataset, base, monkeypatch):
    machines, make_plan = [], retrain.make_plan

    def planned(*words, machine, **more):
        machines.append(machine)
        return make_plan(*words, machine=machine, measure=False, **more)

    monkeypatch.setattr(retrain, "make_plan", planned)
    monkeypatch.setattr(retrain.Machine, "here", lambda: retrain.Machine(4, 16 << 30, "a GPU", 80 << 30))
    job = training.create(dataset, base, Options(device="cpu", minutes=2))
    cases, facts = retrain._cases(job.folder, job, base)
    told = retrain._Told(job.folder, None)
    fit = retrain._configured(job.folder, job, base, cases, facts, told).fit
    assert training.read(job.folder).after == round(told.after, 1) and told.after != retrain._Told(job.folder, None).after
    assert not machines[0].gpu and fit.accelerator == "cpu" and fit.minutes == 2.7
    job = replace(job, options=Options(device="gpu"))  # gone on with elsewhere, where there is one
    assert retrain._configured(job.folder, job, base, cases, facts, retrain._Told(job.folder, None)).fit.accelerator == "gpu"


def test_who_goes_on_with_a_job_knows_what_its_checks_take(dataset, base, monkeypatch):
    job, seen, tell = created(dataset, base, epochs=1), [], retrain._Told.__call__
    training.update(job.folder, after=300.0)  # as planned before it was killed

    def told(self, text="", now=False, **changes):
        seen.append((text, changes.get("seconds_left")))
        tell(self, text or None, now, **changes)

    monkeypatch.setattr(retrain._Told, "__call__", told)
    assert finished(job).state == "finished"
    assert ("Checking the new model on held-out cases", 300.0) in seen
    assert all(left >= 300 for text, left in seen if text.startswith("Training, "))
    assert all(0 <= left <= 300 for text, left in seen if text.startswith("Scoring the models"))


def test_the_time_left_goes_down_during_the_check(dataset, monkeypatch):
    job, now = training.create(dataset), [0.0]
    monkeypatch.setattr(retrain, "time", SimpleNamespace(monotonic=lambda: now[0]))
    told = retrain._Told(job.folder, None)
    told.after = 300.0
    progress = told.progress("Scoring", 0.88, 0.99, last=True)
    for now[0], done, left in ((2, 0, 298), (40, 0, 260), (100, 1, 300), (150, 1, 250), (180, 2, 180), (500, 2, 0)):
        progress(done, 4, "a case, of several lesions")
        assert training.read(job.folder).seconds_left == left
    told.progress("Reading", 0.0, 0.03)(1, 2, "")  # before the training, which then takes most of the time
    assert training.read(job.folder).seconds_left == 0


def test_the_time_left_of_a_training_that_goes_on_is_without_what_was_spent(dataset, base, monkeypatch):
    job, now = created(dataset, base, minutes=10), [0.0]
    monkeypatch.setattr(retrain, "time", SimpleNamespace(monotonic=lambda: now[0]))
    told, config = retrain._Told(job.folder, None), c.read(job.folder)
    told.after = 0.0
    keeper = Keeper(job.folder, config.fit)
    keeper.seconds = 480.0  # of 600, in the checkpoint
    trainer = SimpleNamespace(callbacks=[keeper], global_step=100, estimated_stepping_batches=10000, current_epoch=9)
    steer = retrain.Steer(told, config)
    steer.on_train_start(trainer, None)
    now[0], trainer.global_step = 60.0, 110
    steer.on_train_batch_end(trainer, None, None, None, 0)
    job = training.read(job.folder)
    assert job.seconds_left == 60 and job.fraction == pytest.approx(0.06 + 0.79 * 0.9)


def test_what_its_base_did_not_mirror_is_not_mirrored(dataset, base, monkeypatch):
    """A plan without a base would, along all axes: nothing in the labels' names speaks of sides."""
    monkeypatch.setattr(retrain, "make_plan", partial(retrain.make_plan, measure=False))
    job = training.create(dataset, base)
    cases, facts = retrain._cases(job.folder, job, base)
    assert retrain._configured(job.folder, job, base, cases, facts, retrain._Told(job.folder, None)).input.flip_axes == []


def test_a_label_of_the_base_alone_takes_no_place_of_another(tmp_path, make_package):
    """The cases call New what the base calls Bright, and Bright is their 2, as Other is the base's."""
    made = Dataset.create(tmp_path / "set", "set", [Label(1, "New", (0, 0, 230), {}), Label(2, "Bright", (230, 0, 0), {})], ["CT"])
    add_cases(made, 2, values=(9.0, 1.0))
    base = make_package(labels=[{"value": 1, "name": "Bright"}, {"value": 2, "name": "Other"}])
    new = make_package(labels=[{"value": 1, "name": "New"}, {"value": 2, "name": "Bright"}])
    cases = find_cases(tmp_path / "set")
    found = retrain.compare(base, new, cases, cases.cases)
    assert found["labels"]["Bright"]["dice"]["before"]["mean"] > 0.9


def test_the_four_worst_cases_are_kept(tmp_path, make_package):
    good, _, cases = compared(tmp_path, make_package, [1.0] * 4 + [5.0, 6.0])  # the last two are the worst
    found = retrain.compare(None, good, cases, cases.cases, tmp_path / "job" / "check")
    assert {"case4", "case5"} < {w["case"] for w in found["worst"]} and len(found["worst"]) == retrain.WORST


def test_a_base_that_fails_midway_is_compared_with_nothing(tmp_path, make_package, monkeypatch):
    good, bad, cases = compared(tmp_path, make_package, [1.0, 1.0])
    evaluate = retrain.metrics.evaluate

    def fails(package, items, **how):
        if package is bad and items[0].name == "case1":
            raise UserError("no memory")
        return evaluate(package, items, **how)

    monkeypatch.setattr(retrain.metrics, "evaluate", fails)
    found = retrain.compare(bad, good, cases, cases.cases)
    assert found["verdict"] == "" and "cannot run on these cases (no memory)" in found["sentence"]
    assert found["mean"]["dice"]["before"] is None and all(r["dice_before"] is None for r in found["rows"])


def test_volume_errors_count_without_their_sign():
    rows = [{"case": n, "label": "a", "patient": n, "volume_error_percent": v} for n, v in (("x", 50.0), ("y", -50.0))]
    found = retrain._figures({"before": [], "after": rows}, "volume_error_percent", ["a"])
    assert found["after"]["mean"] == 50 and found["before"] is None


def test_a_label_that_fell_by_less_than_1_percent_makes_no_model_worse():
    def change(mean, low, high):
        return {"before": {"mean": 0.8}, "after": {"mean": 0.8 + mean}, "change": {"mean": mean, "low": low, "high": high, "cases": 9}}

    def judged(label, mean=(0.0, -0.01, 0.01), patients=9, own=(), **more):
        labels = {"a": {"dice": change(*label), **dict(own)}}
        facts = {"cases": 9, "patients": patients, "labels": labels, "mean": {"dice": change(*mean), **more}}
        return retrain.verdict(facts)[0]

    assert judged((-0.008, -0.009, -0.007)) == "same" and judged((-0.012, -0.013, -0.011)) == "worse"
    assert judged((-0.05, -0.2, 0.1)) == "same"  # which chance explains
    up = (0.02, 0.01, 0.03)
    assert judged(up, up, 5) == "better" and judged(up, up, 4) == "same" and judged(up, (0.02, 0.0, 0.04)) == "same"
    for fall, told in ((-0.008, "better"), (-0.012, "worse")):  # where the label is, of a set of which some cases hold none
        counts = {"present": 4, "missed": {"before": 0, "after": 0}, "dice_where_present": change(fall, -0.1, 0.1)}
        assert judged(up, up, 9, **counts) == told
    for high, told in ((0.1, "better"), (-0.01, "worse")):  # of one label among many
        assert judged(up, up, 9, {"dice_where_present": change(-0.05, -0.2, high)}) == told


def test_a_label_that_only_held_out_cases_mark_is_left_out(tmp_path):
    made = Dataset.create(tmp_path / "set", "set", LABELS, ["MR"])
    add_cases(made, 3, values=(3.0,))
    add_cases(made, 1, first=3)
    made._commit(lambda data: [c.update(split="validation" if n == "case3" else "train") for n, c in data["cases"].items()] and None)
    job = training.create(made.folder)
    cases, facts = retrain._cases(job.folder, job)
    assert [label.name for label in cases.labels] == ["Bright"] and facts["unmarked"] == ["Dark"]


@pytest.mark.parametrize("alone", [False, True])
def test_so_it_is_in_the_datasets_of_other_programs(tmp_path, alone):
    """Where no retraining began: who is held out is fixed, and the training refuses a label that no case shows it."""
    names = [f"case{i}" for i in range(8)]
    held = {c.name for c in retrain._dealt([case(name) for name in names]) if c.split == "validation"}
    for name in names:
        mask = np.zeros((8, 8, 8), np.uint8)
        mask[1:3], mask[5:7] = not (alone and name in held), 2 * (name in held)
        if alone and name == min({*names} - held):  # it will be held out, as no other marks what is left
            mask[3:5] = 3
        write_image(Image(mask.astype(np.float32)), tmp_path / "set" / "images" / f"{name}.nii.gz")
        write_image(Image(mask), tmp_path / "set" / "labels" / f"{name}.nii.gz")
    job = training.create(tmp_path / "set")
    made, facts = retrain._cases(job.folder, job)
    assert [label.name for label in made.labels] == ["label 1"] and facts["unmarked"] == ["label 2", "label 3"][: 1 + alone]
    assert any(made.marked(c) for c in made.cases if c.split == "validation")
    (tmp_path / "click").mkdir()  # which makes one of all labels
    made, facts = retrain._cases(tmp_path / "click", job, find_model("lung-nodule-click"))
    assert len(made.labels) == 2 + alone and "unmarked" not in facts


def test_stopped_before_it_began_it_can_be_resumed(dataset, base, command, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(training, "claim", interrupted)
        code, _, err = command("finetune", dataset, "--from", base.path, "--minutes", "0.02")
    (job,) = training.jobs(dataset)
    assert code == 130 and "unetseg-train resume JOB" in err and job.state == "stopped" and job.resumable


def test_a_job_elsewhere_is_found_by_its_folder(dataset, base, command, tmp_path):
    job = training.create(dataset, base, Options(), tmp_path / "job")
    training.end(job.folder, "stopped", "Stopped.")
    assert str(job.folder) in command("jobs", job.folder)[1] and str(job.folder) not in command("jobs", dataset)[1]
    cli._follow(job, True)
    inside = training.create(dataset, base, Options())
    cli._follow(inside, True)
    out = command("jobs", inside.folder)[1]
    assert f"look with: unetseg-train jobs {job.folder}\n" in out and f"look with: unetseg-train jobs {dataset}\n" in out


def test_a_dataset_named_from_within_has_its_name(dataset, monkeypatch):
    monkeypatch.chdir(dataset / "cases")
    assert training.create("..", None, Options()).name == "balls"
