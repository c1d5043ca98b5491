"""What the panel says of a model, and how one is imported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workers import make_card, make_onnx


@pytest.mark.parametrize(
    "card, made_for",
    [({}, "whole volumes"), ({"extent": "box"}, "a box around one target"), ({"roi_mm": 50}, "a box of about 50 mm around one target")],
)
def test_a_card_says_what_its_model_is_made_for(gui: Any, make_package: Callable[..., Any], card: dict[str, Any], made_for: str) -> None:
    from UNetSegmentationPanel import models

    package = make_package(**card)
    assert f">{made_for}<" in models.cardHtml(models.Model(package.path, True, package.card))


def test_an_import_leaves_another_models_file_of_its_name(gui: Any, make_package: Callable[..., Any], models_folder: Path) -> None:
    from UNetSegmentationPanel import models

    models_folder.mkdir()
    other, asked = models_folder / "mine-1.0.0.unet.zip", []
    shutil.copy(make_package(name="other").path, other)
    mine = make_package(name="mine").path
    for _ in range(2):
        model = models.importPackage(mine, lambda name: not asked.append(name))
        assert model is not None and model.path.name == "mine-1.0.0-2.unet.zip"
    assert asked == ["mine-1.0.0"]  # the second time
    assert {m.name: m.path for m in models.installedModels() if m.imported} == {"mine-1.0.0": model.path, "other-1.0.0": other}


def test_a_bare_network_is_imported_by_three_answers(
    gui: Any,
    models_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numpy as np
    import qt
    from UNetSegmentationLib import Image, Options, find_model, predict

    network = tmp_path / "My net.onnx"
    network.write_bytes(make_onnx("threshold", make_card(dimensions=2, labels=[{"value": 1, "name": "a"}, {"value": 2, "name": "b"}])))
    widget = gui.open()
    ui, tried = widget.ui, []

    parts = [(qt.QLineEdit, "labels"), (qt.QComboBox, "intensity"), (qt.QLineEdit, "spacing"), (qt.QComboBox, "axis"), (qt.QLabel, "note")]

    def fill(dialog: Any, labels: str) -> None:
        find = {name: dialog.findChild(kind, name) for kind, name in parts}
        ok = next(b for b in dialog.findChildren(qt.QPushButton) if b.text.endswith("OK"))
        tried.append(find["note"].text)
        assert dialog.windowTitle == "Import My net.onnx" and ok.enabled == bool(find["labels"].text)
        find["labels"].text = labels
        assert ok.enabled == (find["intensity"].currentIndex >= 0)
        find["intensity"].currentIndex = find["intensity"].findData("zscore")
        find["spacing"].text, find["axis"].currentIndex = "1,1", find["axis"].findData("coronal")
        assert ok.enabled
        ok.click()

    def choose(parent: Any, title: str, folder: str, filters: str) -> str:
        assert "*.onnx" in filters and "*.unet.zip" in filters
        return str(network)

    monkeypatch.setattr(qt.QFileDialog, "getOpenFileName", choose)
    gui.dialogs.answer(lambda dialog: dialog.reject())
    ui.importButton.click()
    assert not models_folder.exists() and not ui.modelMessage.visible

    gui.dialogs.answer(lambda dialog: fill(dialog, "one"), lambda dialog: fill(dialog, "one, two"))
    ui.importButton.click()
    assert tried[0] == "" and "finds 2 labels beside the background" in tried[1]
    (file,) = models_folder.iterdir()
    assert file.name == "my-net-1.0.0.unet.zip" and widget._parameters.models == ["my-net-1.0.0"]
    card = find_model("my-net").card
    assert card.spacing == (1, None, 1) and card.data["axis"] == "coronal" and card.intensity == {"mode": "zscore"}

    array = np.zeros((6, 20, 24), np.float32)
    array[2:5, 5:9, 6:12] = 100
    found = predict(Image(array), [find_model("my-net")], Options(engine="onnx")).labels
    assert (array > 0).astype(int).tolist() == (found.array > 0).astype(int).tolist()

    before = file.read_bytes()
    gui.dialogs.answer(lambda dialog: fill(dialog, "three, four"), "No")
    ui.importButton.click()
    assert "my-net-1.0.0 is installed already" in gui.dialogs.texts("message")[-1] and file.read_bytes() == before
    network.write_bytes(b"no network")
    for said in ("not an ONNX file", "cannot be read"):
        ui.importButton.click()
        assert said in ui.modelMessage.text and ui.modelMessage.visible
        network.unlink(missing_ok=True)
    assert list(models_folder.iterdir()) == [file]


def test_a_3d_network_is_asked_for_no_axis(gui: Any, tmp_path: Path) -> None:
    import qt
    from UNetSegmentationPanel import models

    def answer(dialog: Any) -> None:
        assert dialog.findChild(qt.QComboBox, "axis") is None
        dialog.findChild(qt.QLineEdit, "labels").text = "Lung"
        dialog.findChild(qt.QComboBox, "intensity").currentIndex = 1
        dialog.accept()

    gui.dialogs.answer(answer)
    card = models.askCard(tmp_path / "net.onnx", make_onnx("threshold", make_card()))
    assert card is not None and "axis" not in card and card["spacing"] == [None] * 3
    assert card["intensity"] == {"mode": "window", "level": -600, "width": 1500}
