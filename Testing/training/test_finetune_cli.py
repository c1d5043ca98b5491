"""`unetseg-train finetune` and `export` from the command line: other labels, channels and spacing, replay, another task."""

import hashlib
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for name in ("typer", "rich", "monai", "pydantic", "lightning", "yaml", "onnx"):
    pytest.importorskip(name)
from test_train import write_cases  # noqa: E402
from unetseg_training import export, finetune  # noqa: E402
from unetseg_training.cases import find_cases  # noqa: E402
from unetseg_training.config import parse  # noqa: E402
from unetseg_training.plan import plan  # noqa: E402
from unetseg_training.train import train  # noqa: E402
from UNetSegmentationLib import training  # noqa: E402
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.engines.torch import load_network  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image  # noqa: E402
from UNetSegmentationLib.inference.predict import Options, predict  # noqa: E402
from UNetSegmentationLib.model import Label, ModelPackage, find_model  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402

BRIGHT, DARK = Label(1, "Bright", (230, 159, 0), {}), Label(2, "Dark", (86, 180, 233), {})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A package of a small network for Bright and Dark in MR, whose weights are random."""
    config = UNetConfig(dimensions=3, in_channels=1, out_channels=3, channels=(4, 8))
    torch.manual_seed(0)
    card = {
        "format": 1, "name": "balls", "version": "1.0.0", "task": "automatic", "dimensions": 3, "channels": ["MR"],
        "labels": [{"value": v.value, "name": v.name} for v in (BRIGHT, DARK)], "spacing": [1.0, 1.0, 1.0], "patch": [16, 16, 16],
        "divisor": [2, 2, 2], "intensity": {"mode": "zscore"}, "activation": "softmax", "licence": "CC0", "network": config.to_json(),
        "training_data": ["made"],
    }  # fmt: skip
    rng = np.random.default_rng(0)
    items = [("a", Image(rng.normal(size=(12, 14, 16)).astype(np.float32)))]
    return export.export_run(build(config).eval(), card, tmp_path_factory.mktemp("base"), items, quiet=True).path


def balls(folder, n, labels, channels, spacing=(1.0, 1.0, 1.5), split=("validation", "train", "train")):
    """A dataset folder: write_cases' balls, of which `labels` are annotated, in so many channels."""
    write_cases(folder / "plain", n)
    dataset = Dataset.create(folder / "data", "balls", labels, channels)
    for i in range(n):
        image, mask = (read_image(folder / "plain" / part / f"case{i}.nii.gz") for part in ("images", "labels"))
        values = np.stack([image.array * (-1) ** c for c in range(len(channels))]) if len(channels) > 1 else image.array
        truth = np.zeros_like(mask.array)
        for label in labels:
            truth[mask.array == (1 if label.name == "Bright" else 2)] = label.value
        dataset.add(Image(values, spacing), truth, name=f"case{i}", patient=str(i), split=split[i])
    return dataset.folder


def test_finetune_then_export(command, base, tmp_path):
    """Other labels, one more channel, other spacing; the encoder frozen; the base's cases replayed are told from the new ones."""
    data = balls(tmp_path / "new", 3, [Label(1, "Dark", DARK.color, {})], ["MR"], (1.0, 1.0, 3.0))
    old = balls(tmp_path / "old", 2, [BRIGHT, DARK], ["MR"])
    run = tmp_path / "run"
    words = ("finetune", data, "--from", base, "-o", run, "--quick", "--minutes", 0.01, "--fold", "split")
    code, out, err = command(*words, "--freeze", "encoder", "--replay", old, "--share", 0.5)
    assert code == 0, err
    assert "From balls 1.0.0:" in out and "no longer given: Bright" in out
    assert "It still knows what it knew." in out or "It has forgotten" in out
    assert "It was trained on these very cases" in out
    leaf = run / "split-seed0"
    record = json.loads((leaf / "run.json").read_text("utf-8"))
    assert record["finished"] and len(record["data"]["base"]) == 2 and record["validation_cases"] == ["case0"]
    facts = json.loads((leaf / "finetune.json").read_text("utf-8"))
    assert facts["frozen"] == ["encoder"] and facts["base"]["cases"] == 2 and facts["base"]["labels"] == ["Dark"]
    assert (leaf / "report.html").is_file()

    code, _, err = command(*words)
    assert code == 2 and "add --resume to go on with it" in err and "--overwrite" not in err
    for changed in (("--freeze", "ups"), ("--freeze", "encoder", "--share", 0.1)):
        code, _, err = command(*words, "--share", 0.5, "--replay", old, *changed, "--resume")
        assert code == 2 and f"trained with other settings ({changed[-2].strip('-')})" in err and "--restart" not in err
    code, _, err = command(*words, "--freeze", "encoder", "--resume")
    assert code == 2 and "; give --replay, --share and --freeze as before, or start anew in another folder" in err
    code, _, err = command("fit", run, "--fold", "split", "--resume")
    assert code == 2 and "is a fine-tuning; go on with it by unetseg-train finetune DATA --from MODEL" in err
    code, out, err = command(*words, "--freeze", "encoder", "--replay", old, "--share", 0.5, "--resume")
    # On a busy machine the time is up before the first validation.
    assert code == 0 and ("ended before its first validation" if record["dice"] is None else "on held-out cases") in out, err

    weights = (leaf / "best.safetensors").rename(tmp_path / "weights")
    code, _, err = command("evaluate", leaf)
    assert code == 2 and f"train it first: unetseg-train finetune DATA --from MODEL -o {run} --resume" in err
    weights.rename(leaf / "best.safetensors")
    code, out, err = command("export", leaf, "-o", tmp_path / "models")
    assert code == 0 and "run evaluate first" in err, err
    (path,) = (tmp_path / "models").glob("*.unet.zip")
    package, parent = ModelPackage.read(path), ModelPackage.read(base)
    card = package.card.data
    assert [label.name for label in package.card.labels] == ["Dark"] and card["spacing"] == [1.0, 1.0, 1.0]
    assert card["lineage"]["parent"]["sha256"] == hashlib.sha256(base.read_bytes()).hexdigest() and card["licence"] == "CC0"
    assert card["training_data"] == ["made", "data: 3 cases of 3 patients, less those held out"]
    assert package.card.origin.startswith("Fine-tuned from balls 1.0.0 with 2 cases of data")
    assert card["lineage"]["parity"]["cases"] == 1
    told = path.with_name(path.name.removesuffix(".unet.zip") + ".md").read_text("utf-8")
    assert told.startswith("# ") and "- 2 cases of the base's own replayed" in told
    before, after = (load_network(p).state_dict() for p in (parent, package))
    assert all(torch.allclose(after[k], v, atol=1e-3) for k, v in before.items() if k.startswith("encoder."))
    image = read_image(data / sorted(p.relative_to(data) for p in data.glob("cases/case0/*/image_0000.nii.gz"))[0])
    for engine in ("onnx", "torch"):
        assert predict(image, [package], Options(engine=engine)).labels.array.shape == image.shape


def test_masks_without_names_go_on_as_the_bases_labels(command, base, tmp_path):
    """Also those that are replayed; the classifier is kept, and the package gives the base's labels."""
    for name in ("new", "old"):
        write_cases(tmp_path / name, 3)
    words = ("finetune", tmp_path / "new", "--from", base, "-o", tmp_path / "run", "--quick", "--minutes", 0.01)
    code, out, err = command(*words, "--replay", tmp_path / "old")
    assert code == 0, err
    assert "new label" not in out and "no longer given" not in out
    assert "taken as balls's, 1 for Bright, 2 for Dark" in (tmp_path / "run" / "plan.md").read_text("utf-8")
    leaf = tmp_path / "run" / "fold0-seed0"
    assert json.loads((leaf / "finetune.json").read_text("utf-8"))["base"]["labels"] == ["Bright", "Dark"]
    assert command("evaluate", leaf)[0] == command("export", leaf, "-o", tmp_path / "models")[0] == 0
    (path,) = (tmp_path / "models").glob("*.unet.zip")
    parent = ModelPackage.read(base).card.labels
    assert [(v.value, v.name, v.color) for v in ModelPackage.read(path).card.labels] == [(v.value, v.name, v.color) for v in parent]


def test_a_plan_with_a_base_says_how_to_fine_tune(command, base, tmp_path):
    data = balls(tmp_path / "new", 3, [BRIGHT, DARK], ["MR"])
    code, out, err = command("plan", data, "-o", tmp_path / "run", "--quick", "--base", base)
    assert code == 0 and out.splitlines()[-1] == f"next: unetseg-train finetune {data} --from {base} -o {tmp_path / 'run'} --resume", err


def test_labels_can_be_learnt_as_one(command, base, tmp_path):
    data = balls(tmp_path / "new", 3, [BRIGHT, DARK], ["MR"])
    code, _, err = command("finetune", data, "--from", base, "-o", tmp_path / "run", "--quick", "--foreground", "--freeze", "head")
    assert code == 2 and "no layer 'head' to freeze" in err, err
    assert "foreground: true" in (tmp_path / "run" / "config.yaml").read_text("utf-8")


def test_test_cases_of_the_base_show_what_was_forgotten(command, base, tmp_path):
    data = balls(tmp_path / "new", 3, [BRIGHT], ["MR"])
    old = balls(tmp_path / "old", 3, [BRIGHT], ["MR"], split=("validation", "train", "test"))
    words = ("--from", base, "-o", tmp_path / "run", "--quick", "--minutes", 0.01, "--fold", "split", "--replay", old)
    code, out, err = command("finetune", data, *words)
    assert code == 0 and "these very cases" not in out, err
    leaf = tmp_path / "run" / "split-seed0"
    assert list(json.loads((leaf / "run.json").read_text("utf-8"))["data"]["base"]) == ["case0", "case1"]
    assert json.loads((leaf / "finetune.json").read_text("utf-8"))["base"]["cases"] == 1


def test_a_second_channel_and_a_third_label(command, base, tmp_path):
    data = balls(tmp_path / "new", 3, [BRIGHT, Label(2, "Ball", (0, 0, 0), {})], ["MR", "PET"])
    code, out, err = command("finetune", data, "--from", base, "-o", tmp_path / "run", "--quick", "--minutes", 0.01, "--fold", "split")
    assert code == 0, err
    assert "new label Ball, kept Bright" in out and "the channel PET starts without influence" in out
    old = balls(tmp_path / "old", 2, [BRIGHT], ["MR"])
    code, _, err = command("finetune", data, "--from", base, "-o", tmp_path / "other", "--quick", "--replay", old)
    assert code == 2 and "not annotated with Ball" in err


def test_a_fine_tuning_goes_on_with_its_own_dataset(command, base, tmp_path, monkeypatch):
    data, other = (balls(tmp_path / name, 2, [BRIGHT], ["MR"]) for name in ("new", "other"))
    words = ("--from", base, "-o", tmp_path / "run", "--resume", "--freeze", "head")  # which ends it before the training
    assert command("plan", data, "-o", tmp_path / "run", "--quick", "--base", base)[0] == 0
    code, _, err = command("finetune", other, *words)
    assert code == 2 and f"is a fine-tuning on {data}; name that dataset" in err
    monkeypatch.chdir(tmp_path)
    for name in (data.relative_to(tmp_path), next(data.glob("*.json"))):  # the folder, and its index file
        code, _, err = command("finetune", name, *words)
        assert code == 2 and "no layer 'head' to freeze" in err, err


@pytest.mark.parametrize(
    "words, told",
    [
        (("--from", "no-such-model", "-o", "{tmp}/x"), "There is no model 'no-such-model'"),
        (("-o", "{tmp}/x"), "needs a model to start from"),
        (("--from", "{base}", "-o", "{tmp}/x", "--fold", "all"), "one fold with one seed at a time"),
        (("--from", "{base}", "--replay", "{data}"), "go with -o RUN"),
        (("--from", "{base}", "--fold", "1"), "go with -o RUN"),
        (("--from", "{base}", "--foreground"), "go with -o RUN"),
        (("--from", "{base}", "--share", "0.5"), "--share goes with --replay"),
        (("--from", "{base}", "-o", "{tmp}/x", "--device", "cpu"), "do not go with -o RUN"),
        (("--from", "{base}", "-o", "{tmp}/x", "--quick", "--freeze", "head"), "no layer 'head' to freeze"),
    ],
)
def test_bad_input_is_a_sentence(command, base, tmp_path, words, told):
    data = balls(tmp_path / "new", 2, [BRIGHT], ["MR"])
    code, _, err = command("finetune", data, *(w.format(tmp=tmp_path, base=base, data=data) for w in words))
    assert code == 2 and told in err and err.strip().count("\n") <= 1


def test_a_retraining_whose_cases_cannot_be_read_leaves_nothing(command, base, tmp_path):
    scans = balls(tmp_path, 2, [BRIGHT], ["MR"]).parent / "plain" / "images"
    before = sorted(scans.rglob("*"))
    code, out, err = command("finetune", scans, "--from", base)
    told = err.removeprefix("unetseg-train: ").strip()
    assert code == 2 and "annotated cases" in told and told not in out and sorted(scans.rglob("*")) == before
    other = training.create(scans).folder
    training.end(other, "stopped", "Stopped.")
    assert command("finetune", scans, "--from", base)[0] == 2 and [job.folder for job in training.jobs(scans)] == [other]


# -------------------------------------------------------------------------------------------------- another task: the heart


@pytest.fixture
def hearts(data):
    return find_cases(data / "sunnybrook")


def planned(cases, name):
    package = find_model(name)
    base = package.card, UNetConfig.from_json(package.card.data["network"])
    return package, plan(cases.subset(cases.cases[:6]), "hearts", quick=True, measure=False, base=base).config


def test_a_3d_model_cannot_go_on_with_single_slices(hearts):
    with pytest.raises(UserError, match="single slices and hippocampus-3d is a 3D model; start from a 2D model, or train a new one"):
        planned(hearts, "hippocampus-3d")


def test_from_lung_nodules_in_ct_to_left_ventricles_in_mr(hearts, tmp_path):
    """A 2D model that sees neighbouring slices in HU goes on with single MR pictures."""
    package, config = planned(hearts, "lung-nodule-2d")
    assert config.input.context_slices == 0 and config.input.axis == "acquired" and config.input.intensity["mode"] == "zscore"
    start = finetune.start_of(package, config)
    assert "single slices, so its filters for the others are added up" in start.sentence
    old = load_network(package)
    per = package.card.inputs
    one = torch.randn(1, 1, 32, 32)
    new = build(start.network)
    new.load_state_dict(start.state)
    first = "encoder.0.first.0.weight"
    assert torch.allclose(start.state[first][:, 0], old.state_dict()[first].sum(1))
    with torch.no_grad():
        alike = [net.encoder[0](x) for net, x in ((old, one.expand(1, per, 32, 32)), (new.eval(), one))]
    assert torch.allclose(*alike, atol=1e-4)

    few = {"epochs": 1, "steps": 2, "batch": 2, "validate_cases": 1, "validate_every": 1, "precision": "32", "accelerator": "cpu"}
    settings = config.model_dump(mode="json")
    settings["fit"] |= few
    settings["data"] |= {"path": str(hearts.source), "folds": 2}
    result = train(parse(settings), tmp_path / "run", hearts.subset(hearts.cases[:30:8]), start=start.state, cache=tmp_path / "cache")
    assert 0 <= result.dice <= 1
