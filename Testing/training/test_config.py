"""config.yaml: what it may hold, that it survives writing and reading, and one clear sentence for what is wrong."""

import re

import pytest

pytest.importorskip("pydantic")
yaml = pytest.importorskip("yaml")
pytest.importorskip("torch")

from unetseg_training import config as c  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.model import check_card  # noqa: E402

BASE = {"data": {"path": "somewhere"}, "labels": [{"name": "nodule"}], "channels": ["CT"]}


def test_what_is_written_is_read_back_and_explains_itself(tmp_path):
    config = c.parse({**BASE, "fit": {"learning_rate": "1e-3", "minutes": 5}, "input": {"spacing": [None, 1, 2.5]}})
    c.write(config, tmp_path / "config.yaml", {"input.patch": "it holds every image whole", "labels": "found in the masks"})
    text = (tmp_path / "config.yaml").read_text("utf-8")
    assert c.read(tmp_path) == c.read(tmp_path / "config.yaml") == config
    assert "# Why: it holds every image whole\n  patch: [64, 64, 64]" in text and "# Why: found in the masks\nlabels:" in text
    assert config.fit.learning_rate == 1e-3 and (config.fit.betas, config.fit.weight_decay, config.fit.patience) == ((0.9, 0.999), 1e-4, 15)
    for section, field in c.Config.model_fields.items():  # every section and every setting says what it is
        model = field.annotation
        assert section + ":" in text
        for name, setting in getattr(model, "model_fields", {}).items():
            assert setting.description or name.endswith("_probability"), (section, name)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"fit": {"bach": 3}}, "no setting 'fit.bach'; did you mean 'batch'"),
        ({"fit": {"batch": 0}}, "fit.batch is 0: .* greater than or equal to 1"),
        ({"fit": {"batch": "many"}}, "fit.batch is 'many': .* integer"),
        ({"fit": {"learning_rate": float("nan")}}, "fit.learning_rate is nan"),
        ({"fit": {"learning_rate": 1e-7}}, r"final_rate \(1e-06\) must not be above"),
        ({"loss": {"kind": "dic"}}, "loss.kind is 'dic': .*'dice_ce'"),
        ({"loss": {"class_weights": [1.0]}}, "loss.class_weights needs 2 numbers"),
        ({"loss": {"class_weights": "median"}}, "loss.class_weights is 'median': .*median-frequency"),
        ({"input": {"patch": [63, 64, 64]}}, r"multiples of the network's down-sampling \[8, 8, 8\]"),
        ({"input": {"patch": [64, 64]}}, "input.patch needs 3 numbers for 3D, not 2"),
        ({"input": {"context_slices": 1}}, "belong to 2D"),
        ({"input": {"field_px": 256}}, "belong to 2D"),
        ({"input": {"spacing": [1, 2, "x"]}}, "input.spacing.2 is 'x'"),
        ({"input": {"intensity": {"mode": "window"}}}, "input.intensity lacks level, width"),
        ({"network": {"strides": [[2, 2]]}}, "4 levels need 3 strides"),
        ({"augmentation": {"scaling": [1.1, 0.9]}}, "the smaller first"),
        ({"labels": [{"nam": "x"}]}, "did you mean 'name'"),
        ({"labels": [{"name": "x"}, {"name": "X "}]}, "two labels share one name"),
        ({"labels": [{"name": "x\ny"}]}, "does not match"),
        ({"labels": [{"name": "x", "terminology": {"category": ["SCT", "1", "a"]}}]}, "lacks 'type'"),
        ({"data": {}}, "'data.path' is missing"),
        ({"model": {"postprocess": {"largest": True}}}, "model.postprocess .*'largest'"),
        ({"model": {"postprocess": {"min_volume_mm3": "1e3"}}}, "model.postprocess.min_volume_mm3 must be number"),
        ({"network": {"channels": [16]}}, r"network.channels is \[16\]: .* at least 2"),
        ({"network": {"kernels": [[3, 3, 2]] * 4}}, "network.kernels.0.2: a kernel's size is an odd number above 0, not 2"),
        ({"network": {"kernels": [[0, 3, 3]] * 4}}, "network.kernels.0.0: .* not 0"),
        ({"network": {"strides": [[0, 2, 2]] * 3}}, "network.strides.0.0 is 0: .* greater than or equal to 1"),
        ({"input": {"spacing": [1e-8, 1, 1]}}, "input.spacing.0 is 1e-08"),
        ({"fit": {"precision": 64}}, "fit.precision is .64.: .*'32'"),
        ({"fit": {"betas": [0.9, 1.0]}}, "fit.betas.1 is 1.0: .* less than 1"),
    ],
)
def test_one_sentence_for_what_is_wrong(change, words):
    with pytest.raises(UserError, match=words) as e:
        c.parse({**BASE, **change})
    assert "\n" not in str(e.value) and str(e.value).startswith("config.yaml: ")


def test_files_that_are_no_configuration(tmp_path):
    for run in (tmp_path, tmp_path / "runn"):
        with pytest.raises(UserError, match=f"; unetseg-train plan DATA -o {re.escape(str(run))} makes it\\."):
            c.read(run)
    path = tmp_path / "config.yaml"
    for text, words in (
        ("a: [1, 2\nb: 3\n", r"not valid YAML \(line 2: expected"),
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("fit:\n  batch: 2\nfit:\n  seed: 3\n", r"not valid YAML \(line 3: fit is there for the second time\); correct it"),
        ("fit: !!int x\n", "is not valid YAML; correct it"),
        ("[" * 3000, "is not valid YAML; correct it"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            c.read(path)


def test_a_configuration_as_editors_save_it(tmp_path):
    text = c.to_yaml(c.parse({**BASE, "model": {**BASE.get("model", {}), "title": "Läsion"}}))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "config.yaml").write_text(text, encoding)
        assert c.read(tmp_path).model.title == "Läsion"
    (tmp_path / "config.yaml").write_text(text, "cp1252")
    with pytest.raises(UserError, match="config.yaml is not in UTF-8; save it as UTF-8"):
        c.read(tmp_path)


def test_a_title_may_be_a_date_or_look_like_one(tmp_path):
    for title in ("2026-11-23", "2026-13-45"):
        c.write(c.parse(BASE), tmp_path / "config.yaml")
        text = (tmp_path / "config.yaml").read_text("utf-8")
        (tmp_path / "config.yaml").write_text(text.replace("title: ''", f"title: {title}"), "utf-8")
        assert c.read(tmp_path).model.title == title


def test_the_card_is_valid_and_describes_the_network():
    for changes in (
        {},
        {"input": {"dimensions": 2, "patch": [64, 64], "axis": "coronal", "context_slices": 1, "flip_axes": ["x"]}},
        {"labels": [{"name": "a", "color": [1, 2, 3]}, {"name": "b"}], "network": {"channels": [8, 16], "deep_supervision": True}},
    ):
        config = c.parse({**BASE, **changes})
        card = check_card({**config.card(), "files": {"model.onnx": {"sha256": "0" * 64, "size": 1}}})
        unet = config.unet()
        assert (card.inputs, card.outputs) == (unet.in_channels, unet.out_channels)
        assert [label.value for label in card.labels] == list(range(1, len(card.labels) + 1))
        assert type(unet).from_json(card.data["network"]) == unet


@pytest.mark.parametrize("number", [16, 32])
def test_a_precision_may_be_a_number(number):
    assert c.parse({**BASE, "fit": {"precision": number}}).fit.precision == str(number)


SETTINGS = {  # all there are, and none as it would be without
    "input": {
        "dimensions": 2, "axis": "coronal", "context_slices": 1, "spacing": [None, 3.0, None], "pixel_mm": 0.7, "field_px": 218,
        "patch": [32, 64], "intensity": {"mode": "window", "level": 40, "width": 400}, "padding": "reflect", "flip_axes": ["x"],
    },
    "model": {
        "name": "nodules", "version": "1.2.3", "title": "Nodules", "description": "Finds nodules.", "licence": "CC0",
        "training_data": ["some scans"], "task": "click", "surroundings": "lung", "second_opinion": "lung-nodule-2d-1.0.0",
        "tta": "flips", "surround": "nearest", "extent": "box", "roi_mm": 50.0, "display": "CT lung", "postprocess": {"fill_holes": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("section", SETTINGS)
def test_each_setting_is_on_the_card(section):
    """Else the package would run otherwise than it was trained."""
    given = SETTINGS[section]
    config = c.parse({**BASE, "input": {"spacing": [1, 1, 1]}, section: given})
    card = check_card({**config.card(), "files": {"model.onnx": {"sha256": "0" * 64, "size": 1}}}).data
    plain = c.parse(BASE).model_dump(mode="json")[section]
    assert given.keys() == plain.keys() and not [name for name in given if given[name] == plain[name]]
    assert {name: card.get(name) for name in given} == given
