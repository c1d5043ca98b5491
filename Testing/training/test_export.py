"""The package that a training ends in: parity first, names that a person reads, lineage, and the card in Markdown."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from unetseg_training import export as exporting  # noqa: E402
from unetseg_training import metrics  # noqa: E402
from unetseg_training.export import card_path, compact, export, export_run, lineage, markdown  # noqa: E402
from UNetSegmentationLib.engines.torch import load_network  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image  # noqa: E402
from UNetSegmentationLib.inference.predict import Options, predict  # noqa: E402
from UNetSegmentationLib.model import ModelPackage, find_model  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402
from workers import make_card  # noqa: E402

CONFIG = UNetConfig(dimensions=3, channels=(4, 8, 8), strides=((1, 2, 2), (2, 2, 2)))


@pytest.fixture
def card():
    return make_card(patch=[8, 16, 16], divisor=[2, 4, 4], training_data=["12 scans | of *ours*"], limits="Not tried in children.")


def network(seed=0, **changes):
    torch.manual_seed(seed)
    model = build(CONFIG, **changes).eval()
    # A trained network repeats no weights; the exporter shares those that a fresh one does.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return model


def items(count=2):
    rng = np.random.default_rng(0)
    return [(f"case {i}", Image(rng.normal(size=(6 + i, 20, 25)).astype(np.float32))) for i in range(count)]


def test_a_package_with_its_lineage_and_its_card_beside_it(tmp_path, card):
    parent = find_model("hippocampus-3d")
    run = {"seed": 5, "fold": 0, "git_revision": "abc", "versions": {"torch": "2"}, "data": {"train": {"b": "2", "a": "1"}}}
    origin = lineage(run, parent, command="unetseg-train export RUN")
    facts = {
        "labels": {"thing": {"dice": {"mean": 0.9, "low": 0.85, "high": 0.94, "median": 0.9, "cases": 9}, "missed": 1, "false": 0}},
        "cases": 9, "patients": 9, "held_out": "fold 0 of 5", "fpr": [0, 1], "seed": 1, "draws": 2000,
    }  # fmt: skip
    package = export_run(network(), card, tmp_path / "models", items(), origin, facts, quiet=True)
    assert package.path == tmp_path / "models" / "toy-1.0.0.unet.zip"
    read = ModelPackage.read(package.path).card.data
    digest = hashlib.sha256(parent.path.read_bytes()).hexdigest()
    assert read["lineage"]["parent"] == {"name": "hippocampus-3d", "version": parent.card.version, "sha256": digest}
    assert read["lineage"]["cases"] == 2 and package.card.origin.startswith(f"Fine-tuned from hippocampus-3d {parent.card.version} with 2 ")
    again = lineage({"data": {"train": {"a": "1", "b": "2"}}})
    assert read["lineage"]["dataset"] == again["dataset"] != lineage({"data": {"train": {"a": "1"}}})["dataset"]
    replaying = lineage({"data": {"train": {"a": "1"}, "validation": {"b": "2"}, "base": {"c": "3", "d": "4", "e": "5"}}})
    assert (replaying["cases"], replaying["replayed"]) == (1, 3)
    parity = read["lineage"]["parity"]
    assert parity["cases"] == 2 and 0 < parity["largest_difference"] <= 1e-4
    assert read["metrics"]["dice"] == {"thing": 0.9} and "fpr" not in json.dumps(read["metrics"])
    text = card_path(package).read_text("utf-8")
    assert card_path(package).name == "toy-1.0.0.md" and text == markdown(package)
    for part in (
        "## Intended use", "## Data and licence", "## Measured", "## Limits", "## Lineage",
        "| thing | 0.900 (0.850 to 0.940) |", "9 patients (fold 0 of 5)", "1 missed, 0 false", "Not tried in children.",
        "intervals are wide", r"12 scans \| of \*ours\*", "Fine-tuned from hippocampus-3d ", "on 2 cases",
        read["files"]["model.onnx"]["sha256"],
    ):  # fmt: skip
        assert part in text, part
    one = {**facts, "labels": {"thing": {"dice": {"mean": 0.9, "low": None, "high": None, "cases": 1}, "missed": 0, "false": 0}}}
    package.card.data["metrics"] = {**one, "cases": 1, "patients": 1}
    assert "On 1 case of 1 patient (fold 0 of 5), through the deployed path.\n" in markdown(package)


def test_no_case_is_named_in_a_package(tmp_path, card):
    """Cases are called by their patients in many a folder, and a package is for everybody."""
    patient = "SCHMIDT_EVA_19610704"
    run = {"data": {"train": {patient: "1"}}, "config": {"data": {"path": f"/home/{patient}/hippocampi"}}}
    facts = metrics.summary([{"case": patient, "patient": patient, "label": "thing", "dice": 0.9}])
    package = export_run(network(), card, tmp_path, [(patient, items()[0][1])], lineage(run), facts, quiet=True)
    with zipfile.ZipFile(package.path) as z:
        files = [z.read(name) for name in z.namelist()]
    for content in (*files, card_path(package).read_bytes()):
        assert not any(word.encode() in content for word in (patient, str(tmp_path), str(Path(exporting.__file__).parent)))


def test_a_name_that_is_no_packages_is_no_folder_either(tmp_path, card):
    with pytest.raises(UserError, match=r"mine.zip would be no package; end its name in .unet.zip"):
        export_run(network(), card, tmp_path / "mine.zip", items(), quiet=True)
    assert not list(tmp_path.iterdir())


def test_what_differs_is_not_written_and_nothing_is_lost(tmp_path, card, monkeypatch):
    path = tmp_path / "toy.unet.zip"
    path.write_bytes(b"the former package")
    good = exporting.to_onnx

    def other(model, example):
        with torch.no_grad():
            model.heads["0"].bias += 0.01
        return good(model, example)

    monkeypatch.setattr(exporting, "to_onnx", other)
    with pytest.raises(UserError, match=r"differ by 0\.01 in a logit.*no package was written"):
        export_run(network(), card, path, items(), quiet=True)
    assert path.read_bytes() == b"the former package" and list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_none_are_no_parity(tmp_path, card):
    def drive(package, engine):
        engine.second.run = lambda batch: np.full_like(engine.first.run(batch), np.nan)
        engine.run(np.zeros((1, 1, 8, 16, 16), np.float32))

    with pytest.raises(UserError, match="differ by inf"):
        export(network(), card, tmp_path / "toy.unet.zip", drive)
    with pytest.raises(UserError, match="No case was run"):
        export_run(network(), card, tmp_path, [], quiet=True)
    diverged = network()
    diverged.heads["0"].bias.data[0] = float("nan")
    with pytest.raises(UserError, match=r"heads\.0\.bias holds numbers that are not finite"):
        export_run(diverged, card, tmp_path, items(), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_float16_are_kept(tmp_path, card):
    model = network(norm="batch")
    model.encoder[0].first[1].running_var.fill_(1e6)
    package = export_run(model, card, tmp_path, items(1), quiet=True)
    assert load_network(package).encoder[0].first[1].running_var[0] == 1e6


def test_netron_shows_layers_shapes_and_facts(tmp_path, card):
    package = export_run(network(), card, tmp_path, items(1), quiet=True)
    model = onnx.load_from_string(package.onnx)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and not any("/" in name for name in names)
    assert {"encoder.0.first.0.Conv", "encoder.2.second.2.LeakyRelu", "ups.0.ConvTranspose", "heads.0.Conv"} <= set(names)
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert f"{node.name.removesuffix('.Conv')}.weight" in node.input
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 1, "depth", "height", "width"] and model.graph.input[0].name == "image"
    facts = {p.key: p.value for p in model.metadata_props}
    assert model.graph.name == "toy" and facts["labels"] == "1 thing" and facts["licence"] == "Apache-2.0"


def test_the_same_network_gives_the_same_bytes(tmp_path, card):
    one, two = (export_run(network(), card, tmp_path / n, items(1), quiet=True) for n in "ab")
    assert one.path.read_bytes() == two.path.read_bytes()
    assert predict(items(1)[0][1], [one], Options(engine="torch")).labels.array.shape == (6, 20, 25)


def test_deep_supervision_is_no_part_of_what_runs(tmp_path, card):
    package = export_run(network(deep_supervision=True), card, tmp_path, items(1), quiet=True)
    model = onnx.load_from_string(package.onnx)
    assert [o.name for o in model.graph.output] == ["logits"] and not any(i.name.startswith("heads.1") for i in model.graph.initializer)
    assert load_network(package).config.deep_supervision  # to fine-tune from


def test_the_bundled_models_have_cards_that_can_be_read():
    for name in ("hippocampus-3d", "lung-nodule-2d", "lung-nodule-click"):
        text = markdown(find_model(name))
        assert "| label | Dice |" in text and "Not for diagnosis" in text and "None" not in text
        assert all(word in text for word in (f"-m {find_model(name).path.name}", "--at R,A,S", "-o MASK.nii.gz"))
        assert ("not for whole images" in text) == (name != "lung-nodule-click")


def test_a_bundled_model_equals_pytorch_on_a_real_case(data, tmp_path):
    package = find_model("hippocampus-3d")
    path = sorted((data / "msd_hippocampus" / "images").iterdir())[0]
    kept = {k: v for k, v in package.card.data.items() if k not in ("files", "metrics")}
    again = export_run(load_network(package), kept, tmp_path, [(path.name, read_image(path))], quiet=True)
    assert again.safetensors == package.safetensors
    assert again.card.data["lineage"]["parity"]["largest_difference"] < 1e-4


def test_a_summary_is_cut_down_for_the_card():
    facts = {
        "labels": {"a": {"dice": {"mean": 0.5, "low": None, "high": None, "median": 1, "cases": 1}, "missed": 0, "false": 0, "auc": {}}},
        "cases": 1,
    }
    assert compact(facts) == {
        "dice": {"a": 0.5},
        "labels": {"a": {"dice": {"mean": 0.5, "low": None, "high": None, "cases": 1}, "missed": 0, "false": 0}},
        "cases": 1,
    }
