"""The command `unetseg-train`, from a dataset to a report, and one sentence with exit code 2 for bad input."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for name in ("typer", "rich", "monai", "pydantic", "lightning", "yaml"):
    pytest.importorskip(name)
import lightning  # noqa: E402
from test_train import ROOT, emptied, environment, write_cases  # noqa: E402
from unetseg_training import cli, metrics, watch  # noqa: E402
from unetseg_training import config as c  # noqa: E402
from unetseg_training.train import find, load_run  # noqa: E402
from UNetSegmentationLib import training  # noqa: E402
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image, write_image  # noqa: E402
from UNetSegmentationLib.model import Label, ModelPackage  # noqa: E402


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cases(folder, 4, 1)
    return folder


@pytest.fixture
def run(dataset, tmp_path):
    """A run's folder with a configuration that trains in a second."""
    config = c.parse(
        {
            "model": {"name": "balls"},
            "data": {"path": str(dataset), "folds": 2},
            "labels": [{"name": _label(dataset)}],
            "channels": _channels(dataset),
            "input": {"patch": [16, 16, 16], "spacing": [1, 1, 1]},
            "network": {"channels": [4, 8]},
            "fit": {"epochs": 2, "steps": 2, "batch": 2, "warmup": 1, "precision": "32", "accelerator": "cpu"},
        }
    )
    c.write(config, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def _label(folder):
    from unetseg_training.cases import find_cases

    return find_cases(folder).labels[0].name


def _channels(folder):
    from unetseg_training.cases import find_cases

    return list(find_cases(folder).channels)


def test_plan_writes_a_configuration_that_fit_takes(command, dataset, tmp_path):
    code, out, err = command("plan", dataset, "-o", tmp_path / "run", "--quick")
    assert code == 0, err
    assert "4 annotated cases" in out and f"next: unetseg-train fit {tmp_path / 'run'}" in out
    config = c.read(tmp_path / "run")
    assert config.data.path == str(dataset) and config.fit.epochs * config.fit.steps > 0
    code, _, err = command("plan", dataset, "-o", tmp_path / "run")
    assert code == 2 and "holds a plan already" in err and err.count("\n") == 1


def test_one_case_is_refused_before_it_is_planned_for(command, tmp_path, monkeypatch):
    write_cases(tmp_path / "data", 1, 1)
    monkeypatch.setattr("unetseg_training.plan.plan", lambda *a, **k: pytest.fail("it measures"))
    code, out, err = command("plan", tmp_path / "data", "-o", tmp_path / "run")
    assert code == 2 and "holds one annotated case only (case0); a model needs at least two" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows takes the home from elsewhere")
def test_a_run_in_the_persons_folder_lies_there(command, run, tmp_path, monkeypatch):
    """Shells expand ~ only at the beginning of a word, not in --output=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    data = c.read(run).data.path
    code, _, err = command("plan", data, "--output=~/run")
    assert code == 2 and f"{run} holds a plan already" in err
    code, _, err = command("fit", "~/run", "--fold", "7")
    assert "--fold must be 0 to 1" in err and not (tmp_path / "~").exists()
    package = ("finetune", data, "--from", "left-ventricle-2d", "--output=~/run")
    assert f"{run} holds a fine-tuning already" in command(*package)[2]
    code, _, err = command("report", "~/nothing")
    assert str(tmp_path / "nothing") in err


def test_a_channel_can_be_chosen(command, tmp_path):
    data = tmp_path / "data"
    write_cases(data, 2, 1)
    for file in list((data / "images").iterdir()):
        for i in range(2):
            shutil.copy(file, file.with_name(file.name.replace(".nii.gz", f"_000{i}.nii.gz")))
        file.unlink()
    chosen = ("--channel", "channel 1")
    code, out, err = command("check", data, *chosen)
    assert code == 0 and "channels channel 1\n" in out, err
    code, _, err = command("plan", data, "-o", tmp_path / "run", "--quick", *chosen)
    assert code == 0, err
    config = c.read(tmp_path / "run")
    assert config.channels == config.data.channels == ["channel 1"]
    assert [p.name for p in find(config).cases[0].images] == ["case0_0001.nii.gz"]
    write_cases(tmp_path / "other", 2, 1)  # one channel, of another name
    for place, name in ((data, "case0_0001.nii.gz"), (tmp_path / "other", "case0.nii.gz")):
        assert [p.name for p in cli._scored(tmp_path, config, str(place))[1][0].images] == [name]


def test_from_a_configuration_to_a_report(command, run):
    code, out, err = command("fit", run, "--fold", "all", "--quiet")
    assert code == 0, err
    assert out.count("on held-out cases, best in epoch") == 2 and "mean Dice of 2 trainings" in out
    for fold in (0, 1):
        folder = run / f"fold{fold}-seed0"
        assert json.loads((folder / "run.json").read_text("utf-8"))["finished"]
        assert {"best.safetensors", "last.ckpt", "report.html", "live.jsonl"} <= {p.name for p in folder.iterdir()}
    assert (run / "cache").is_dir()
    code, _, err = command("fit", run)
    assert code == 2 and "add --resume to go on with it, or --restart" in err
    code, out, err = command("fit", run, "--resume", "--quiet")
    assert code == 0 and out.count("on held-out cases") == 1, err
    code, out, err = command("evaluate", run / "fold0-seed0")
    assert code == 0 and (run / "fold0-seed0" / "metrics.json").is_file(), err
    code, out, err = command("pictures", run)
    assert code == 0 and (run / "augmentation.png").is_file(), err


def test_all_folds_are_those_that_there_are_and_can_be_trained(command, run, tmp_path):
    write_cases(tmp_path / "data", 3, 1)
    config = c.read(run)
    c.write(
        config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "data"), "folds": 5})}), run / "config.yaml"
    )
    code, out, err = command("fit", run, "--fold", "all", "--quiet")
    assert code == 0 and "mean Dice of 3 trainings" in out, err
    emptied(tmp_path / "data", "case1")
    code, out, err = command("fit", run, "--fold", "all", "--quiet", "--restart")
    assert code == 2 and "mean Dice of 2 trainings" in out
    assert "was not trained: The masks of all held-out cases (case1) are empty" in err and err.strip().count("\n") == 0


def test_what_cannot_be_trained_is_told_before_hours_of_the_others(command, run, monkeypatch):
    monkeypatch.setattr("unetseg_training.train.train", lambda *a, **k: pytest.fail("it trains"))
    (run / "fold1-seed0").mkdir()
    (run / "fold1-seed0" / "run.json").write_text("{}")
    code, _, err = command("fit", run, "--fold", "all", "--quiet")
    assert code == 2 and f"{run / 'fold1-seed0'} holds a training already; add --resume" in err
    shutil.rmtree(run / "fold1-seed0")
    config = c.read(run)
    c.write(config.model_copy(update={"data": config.data.model_copy(update={"folds": 7})}), run / "config.yaml")
    code, _, err = command("fit", run, "--fold", "0,5", "--quiet")
    assert code == 2 and "There is no fold 5" in err and "has the folds 0 to 3" in err


def test_a_training_that_ends_before_its_first_validation_says_so(command, run):
    config = c.read(run)
    c.write(config.model_copy(update={"fit": config.fit.model_copy(update={"validate_every": 2, "epochs": 1})}), run / "config.yaml")
    for again in ((), ("--resume",)):
        code, out, err = command("fit", run, "--quiet", *again)
        assert code == 0 and f"first validation, so its Dice is not known; see: unetseg-train evaluate {run}" in out, err
        assert "nan" not in out and '"dice": null' in (run / "fold0-seed0" / "run.json").read_text("utf-8")


def test_seeds_differ_and_restart_begins_anew(command, run):
    assert command("fit", run, "--seed", "0,1", "--quiet")[0] == 0
    first, second = ((run / f"fold0-seed{s}" / "best.safetensors").read_bytes() for s in (0, 1))
    assert first != second
    assert command("fit", run, "--restart", "--quiet")[0] == 0
    assert (run / "fold0-seed0" / "best.safetensors").read_bytes() == first


def test_a_restart_that_cannot_begin_costs_no_model(command, run, tmp_path):
    shutil.copytree(c.read(run).data.path, tmp_path / "data")
    config = c.read(run)
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "data")})})
    c.write(config, run / "config.yaml")
    folder = run / "fold0-seed0"
    assert command("fit", run, "--quiet")[0] == 0
    before = {p.name for p in folder.iterdir()}
    for fit, told in (({"strategy": "foo"}, "cannot train"), ({"devices": 3}, "3 devices cannot share evenly"), ({}, "case")):
        c.write(config.model_copy(update={"fit": config.fit.model_copy(update=fit)}), run / "config.yaml")
        if not fit:
            for mask in (tmp_path / "data" / "labels").iterdir():
                mask.write_bytes(b"no mask")
        code, _, err = command("fit", run, "--quiet", "--restart")
        assert code == 2 and told in err and {p.name for p in folder.iterdir()} >= before, err


def test_held_out_cases_that_are_gone_are_named(command, run, tmp_path):
    shutil.copytree(c.read(run).data.path, tmp_path / "data")
    config = c.read(run)
    c.write(config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "data")})}), run / "config.yaml")
    folder = run / "fold0-seed0"
    assert command("fit", run, "--quiet")[0] == 0
    gone, *_ = json.loads((folder / "run.json").read_text("utf-8"))["validation_cases"]
    for part in ("images", "labels"):
        (tmp_path / "data" / part / f"{gone}.nii.gz").unlink()
    code, _, err = command("evaluate", folder)
    assert code == 2 and f"1 of the 2 held-out cases of {folder} ({gone}) are no longer in {tmp_path / 'data'}; put them back" in err
    assert len(cli._scored(folder, load_run(folder)[0], None, some=True)[1]) == 1  # to compare two engines on


def test_a_folder_is_told_by_its_name_wherever_one_stands(command, run, monkeypatch):
    assert command("fit", run, "--quiet")[0] == 0
    monkeypatch.chdir(run / "fold0-seed0")
    assert command("evaluate", ".")[0] == 0
    facts = json.loads((run / "fold0-seed0" / "metrics.json").read_text("utf-8"))["summary"]
    assert facts["command"] == "unetseg-train evaluate fold0-seed0" and facts["held_out"].startswith("the held-out cases of fold0-seed0, ")


def test_cases_that_the_model_knows_are_told_on_its_card(command, run, dataset, tmp_path):
    """Those it was trained on, also where they lie in another folder or a mask was corrected since, and those that chose its epoch."""
    folder, own, other = run / "fold0-seed0", tmp_path / "own", tmp_path / "other"
    shutil.copytree(dataset, own)
    config = c.read(run)
    c.write(config.model_copy(update={"data": config.data.model_copy(update={"path": str(own)})}), run / "config.yaml")
    assert command("fit", run, "--quiet")[0] == 0
    learned, held = (json.loads((folder / "run.json").read_text("utf-8"))[k][0] for k in ("training_cases", "validation_cases"))
    shutil.copytree(own, other)
    for part in ("images", "labels"):
        (other / part / f"{learned}.nii.gz").rename(other / part / "new.nii.gz")
    shutil.copy(own / "labels" / f"{held}.nii.gz", own / "labels" / f"{learned}.nii.gz")

    def held_out(*words):
        code, _, err = command("evaluate", folder, *words)
        assert code == 0, err
        return json.loads((folder / "metrics.json").read_text("utf-8"))["summary"]["held_out"], err.strip()

    assert held_out() == ("the held-out cases of fold0-seed0, which chose its epoch as well", "")
    for data in (own, other):
        told, err = held_out("--data", data)
        assert told == f"{data.name}; 2 of its 4 cases were trained on" and "2 of 4 cases were trained on, so" in err
    write_cases(tmp_path / "fresh", 1, 1)
    image = read_image(tmp_path / "fresh" / "images" / "case0.nii.gz")
    write_image(image.like(image.array + 1), tmp_path / "fresh" / "images" / "case0.nii.gz")
    assert held_out("--data", tmp_path / "fresh") == ("fresh", "")


@pytest.mark.parametrize(
    "words, told",
    [
        ("fit RUN", "; go on with the same command and --resume"),
        (  # while it prepares, the former training is there still, and --resume would go on with that
            "fit RUN --restart",
            "; begin anew with the same command, or, where it had begun to train, go on with --resume instead of --restart",
        ),
        ("finetune DATA --from x -o RUN", "; go on with the same command and --resume"),
        ("finetune DATA --from x", "; go on with: unetseg-train resume JOB (unetseg-train jobs DATA names it)"),
        ("plan DATA", ""),
    ],
)
def test_what_was_stopped_says_how_it_goes_on(words, told):
    assert cli._go_on(words.split()) == told


def test_figures_of_other_weights_are_not_put_on_the_card(command, run, tmp_path):
    pytest.importorskip("onnx")
    folder = run / "fold0-seed0"
    assert command("fit", run, "--quiet")[0] == command("evaluate", folder)[0] == 0
    kept = (folder / "metrics.json").read_bytes()
    (folder / "finetune.json").write_text("{}")
    for restarted in (False, True):
        if restarted:
            config = c.read(run)
            c.write(config.model_copy(update={"fit": config.fit.model_copy(update={"learning_rate": 1e-2})}), run / "config.yaml")
            assert command("fit", run, "--quiet", "--restart")[0] == 0
            assert not [n for n in ("metrics.json", "metrics.csv", "finetune.json", "pictures/worst.json") if (folder / n).exists()]
            (folder / "metrics.json").write_bytes(kept)
        code, _, err = command("export", folder, "-o", tmp_path / str(restarted))
        assert code == 0 and ("of other weights than these" in err) == restarted, err
        (path,) = (tmp_path / str(restarted)).glob("*.unet.zip")
        assert bool(ModelPackage.read(path).card.data.get("metrics")) != restarted


def test_a_label_that_no_scored_case_marks_is_not_measured(command, run, monkeypatch):
    evaluate, ghost = metrics.evaluate, {"label": "Ghost", "state": "absent", "dice": 1.0}
    monkeypatch.setattr(metrics, "evaluate", lambda *words, **how: [x for r in evaluate(*words, **how) for x in (r, r | ghost)])
    assert command("fit", run, "--quiet")[0] == 0
    code, out, err = command("evaluate", run / "fold0-seed0")
    assert code == 0 and "In no case that was scored, so not measured: Ghost.\n" in out, err
    facts = json.loads((run / "fold0-seed0" / "metrics.json").read_text("utf-8"))["summary"]
    assert [facts["dice"]] == [own["dice"] for own in facts["labels"].values()]


def test_what_the_package_says_may_be_edited_after_the_training(command, run):
    folder = run / "fold0-seed0"
    assert command("fit", run, "--quiet")[0] == 0
    trained = (folder / "best.safetensors").read_bytes()
    done = json.loads((folder / "run.json").read_text("utf-8"))
    del done["config"]["model"]["task"]  # as of before there were models of clicks
    (folder / "run.json").write_text(json.dumps(done), "utf-8")
    for changes, scored in (({"title": "Balls"}, True), ({"postprocess": {"largest_component": True}}, False)):
        (folder / "metrics.json").write_text('{"summary": {"labels": {}}, "rows": []}')
        config = c.read(run)
        c.write(config.model_copy(update={"model": config.model.model_copy(update=changes)}), run / "config.yaml")
        code, _, err = command("fit", run, "--resume", "--quiet")
        assert code == 0 and load_run(folder)[0].model == c.read(run).model, err
        assert (folder / "metrics.json").exists() == scored  # figures of masks without the new step are not this package's
    assert (folder / "best.safetensors").read_bytes() == trained


def test_two_devices_from_the_command_line(run):
    text = (run / "config.yaml").read_text("utf-8")
    (run / "config.yaml").write_text(text.replace("devices: 1", "devices: 2"), "utf-8")
    words = [sys.executable, "-m", "unetseg_training.cli", "fit", run, "--quiet"]
    for more in ([], ["--restart"]):
        done = subprocess.run([*words, *more], env=environment(), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("on held-out cases") == 1
    record = json.loads((run / "fold0-seed0" / "run.json").read_text("utf-8"))
    assert record["finished"] and record["devices"] == 2


@pytest.mark.parametrize(
    "words, told",
    [
        (("plan", "nowhere", "-o", "x"), "nowhere"),
        (("fit", "nowhere"), "unetseg-train plan DATA -o nowhere"),
        (("jobs", "nowhere"), "nowhere does not exist; check the name"),
        (("fit", "{run}", "--fold", "7"), "--fold must be 0 to 1, or all, not '7'"),
        (("fit", "{run}", "--seed", "one"), "--seed must be whole numbers"),
        (("fit", "{run}", "--resume", "--restart"), "exclude each other"),
        (("evaluate", "{run}"), "holds no run; name the folder of a fold"),
        (("export", "{run}"), "holds no run"),
        (("fit", "{run}/config.yaml"), "config.yaml is a file; name the run's folder, "),
        (("report", "{run}/nothing"), ""),
        (("pictures", "{run}", "--case", "nobody"), "There is no case 'nobody'"),
        (("finetune", "{run}", "--from", "no-such-model", "-o", "x"), "There is no model 'no-such-model'"),
    ],
)
def test_bad_input_is_one_sentence(command, run, monkeypatch, tmp_path, words, told):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*(w.format(run=run) for w in words))
    assert code == 2 and err.startswith("unetseg-train: ") and told in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("lacks", [("onnx", "scipy"), None])
def test_what_is_not_installed_is_named_with_what_installs_it(command, monkeypatch, lacks):
    """In an environment that has the command line, as `make demo` makes it."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["train"]
    lacks = lacks or {re.split(r"[\[>]", need)[0] for need in needs} - {"unet-segmentation", "tensorboard"}
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name.replace("yaml", "pyyaml") in lacks else name)
    code, _, _ = command("fit", "RUN")
    named, cure = code.split(" not installed; ")
    assert {*lacks} <= {*named.removeprefix("unetseg-train: ").split(", ")}
    pinned = "torch==2.13.0 " if "torch" in lacks else ""
    assert cure == f'run, in a clone of the repository: {sys.executable} -m pip install {pinned}".[train]"'
    code, out, err = command("finetune", "--help")
    assert code == 0 and all(t in " ".join(out.split()) for t in ("without it, from scratch", "Default: quick; with -o, full")), err


def test_a_file_that_cannot_be_opened_is_one_sentence(command, tmp_path):
    (tmp_path / "reading.xml").mkdir()
    code, _, err = command("check", tmp_path)
    assert code == 2 and "reading.xml cannot be read or written (Is a directory)" in err and err.count("\n") == 1


def test_a_pytorch_that_windows_cannot_load_is_one_sentence(command, run, monkeypatch):
    text = 'The specified module could not be found. Error loading "cublas64_12.dll" or one of its dependencies.'

    def fails(*_unused, **_also):
        raise OSError(126, text)

    monkeypatch.setattr("unetseg_training.cli.fit_run", fails)
    code, _, err = command("fit", run, "--quiet")
    assert code == 2 and err == f"unetseg-train: PyTorch cannot be loaded ([Errno 126] {text}); close other programs or install it again\n"


@pytest.mark.parametrize(
    "fit, told",
    [
        ({"strategy": "nonsense"}, "cannot train with fit.accelerator cpu, fit.devices 1 and fit.strategy nonsense ("),
        ({"accelerator": "gpu", "devices": 99}, "cannot train with fit.accelerator gpu, fit.devices 99"),
    ],
)
def test_hardware_that_is_not_there_is_one_sentence(command, run, fit, told):
    config = c.read(run)
    c.write(config.model_copy(update={"fit": config.fit.model_copy(update=fit)}), run / "config.yaml")
    code, _, err = command("fit", run, "--quiet")
    assert code == 2 and told in err and err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "error, code, told",
    [
        (KeyboardInterrupt(), 130, "unetseg-train: stopped; go on with the same command and --resume\n"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            2,
            "The memory is full; make",
        ),
    ],
)
def test_a_stop_and_a_full_memory_are_one_sentence(command, run, monkeypatch, error, code, told):
    class Raises(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            raise error

    monkeypatch.setattr(watch, "callbacks", lambda *_, **__: [Raises()])
    before = signal.getsignal(signal.SIGINT)
    try:
        done, _, err = command("fit", run, "--quiet")
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert done == code and told in err and err.strip().count("\n") == 0


def test_folders_of_a_person_and_of_a_hidden_share(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(dataset, tmp_path / "share$" / "d$x")
    for place in ("~/share$/d$x", tmp_path / "share$" / "d$x"):
        run = tmp_path / f"run{len(str(place))}"
        code, _, err = command("plan", place, "-o", run, "--minutes", 0.1)
        assert code == 0, err
        assert len(find(c.read(run)).cases) == 4


def test_a_console_without_the_labels_letters(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / "labels.json").write_text('{"1": "肝"}', "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "unetseg_training.cli", "check", str(tmp_path / "d")],
        env={**environment(), "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0 and b"label 1 ?" in done.stdout, done.stderr


def test_another_dataset_is_read_as_the_runs_own(dataset, tmp_path):
    """With its labels made one, as those that were trained on."""
    write_cases(tmp_path / "other", 2, 2)
    config = c.parse({"data": {"path": str(dataset), "foreground": True}, "labels": [{"name": "ball"}], "channels": ["MR"]})
    case_set, cases = cli._scored(tmp_path, config, str(tmp_path / "other"))
    assert [label.name for label in case_set.labels] == ["ball"] and len(cases) == 2


def test_another_dataset_may_name_its_patients_in_its_own_way(dataset, tmp_path, capsys):
    write_cases(tmp_path / "other", 2, 1)
    for file in [*(tmp_path / "other").rglob("*.nii.gz")]:
        file.rename(file.with_name(file.name.replace("case", "scan")))
    data = {"path": str(dataset), "patient": r"case(\d)"}
    config = c.parse({"data": data, "labels": [{"name": _label(dataset)}], "channels": _channels(dataset)})
    assert [case.patient for case in cli._scored(tmp_path, config, str(dataset))[1]] == ["0", "1", "2", "3"] and not capsys.readouterr().err
    assert [case.patient for case in cli._scored(tmp_path, config, str(tmp_path / "other"))[1]] == ["scan0", "scan1"]
    assert f"data.patient fits the name of no case of {tmp_path / 'other'}; its patients are" in capsys.readouterr().err


def test_another_datasets_channels_come_in_the_runs_order(tmp_path):
    other = Dataset.create(tmp_path / "other", "x", [Label(1, "ball", (1, 2, 3), {})], ["T2", "t1"])
    voxels = np.zeros((2, 4, 8, 8), np.float32)
    voxels[0, 1:3, 2:5, 2:5] = voxels[1, 0] = 1
    other.add(Image(voxels), voxels[0].astype(np.uint8), name="a")
    config = c.parse({"data": {"path": str(other.folder)}, "labels": [{"name": "ball"}], "channels": ["T1", "T2"]})
    case_set, cases = cli._scored(tmp_path, config, str(other.folder))
    assert case_set.channels == ("t1", "T2") and np.array_equal(case_set.image(cases[0]).array, voxels[::-1])


def test_a_retraining_of_a_list_of_cases_lies_beside_it(command, tmp_path):
    write_cases(tmp_path / "set", 1, 1)
    cases = tmp_path / "set" / "one.json"
    cases.write_text(json.dumps({"training": [{"image": "images/case0.nii.gz", "label": "labels/case0.nii.gz"}]}))
    code, _, err = command("finetune", cases)
    assert code == 2 and "one.json has 1 annotated case to learn from" in err and not (tmp_path / "set" / "retrain").exists()
    job = training.create(cases)
    training.end(job.folder, "stopped", "Stopped.")
    cli._follow(job, True)
    out = command("jobs", cases)[1]
    assert f"look with: unetseg-train jobs {cases}\n" in out and f"{job.folder}\n    stopped" in out


def test_folds_and_seeds_are_parsed():
    assert cli.parse_folds("all", 3) == [0, 1, 2] and cli.parse_folds("split", 3) == [None] and cli.parse_folds("0,2", 3) == [0, 2]
    assert cli.parse_seeds("all") == [0, 1, 2, 3, 4] and cli.parse_seeds("3") == [3]
    assert cli.parse_folds("0,2,0", 3) == [0, 2] and cli.parse_seeds("1,1") == [1]  # each is trained once
    with pytest.raises(UserError):
        cli.parse_folds("-1", 3)


def test_the_installed_command_says_what_it_can():
    done = subprocess.run([sys.executable, "-m", "unetseg_training.cli", "--help"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("check", "plan", "fit", "evaluate", "report", "export", "finetune", "pictures"):
        assert name in done.stdout
