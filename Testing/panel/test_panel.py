"""The panel, clicked: every control does what it says, and nothing that a person does in between breaks it."""

from __future__ import annotations

import codecs
import csv
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from UNetSegmentationLib.model import SUFFIX
from workers import alive, slow_package

RUN_S = 60.0  # a run on a machine that has other things to do
SECTIONS = ("inputSection", "modelSection", "runSection", "resultSection")
HU = {"mode": "window", "level": 0, "width": 4}  # the toy network sees 0..1 of it
TWO = [{"value": 1, "name": "one"}, {"value": 2, "name": "two"}]


# ------------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture
def panel(gui: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Panel]:
    """panel() opens the module, with its models read."""
    return lambda: Panel(gui, gui.open())


class Panel:
    """The test's hands on one widget of the module."""

    def __init__(self, gui: Any, widget: Any) -> None:
        self.gui, self.widget, self.ui, self.controller = gui, widget, widget.ui, widget.controller
        gui.wait(lambda: widget._warm, RUN_S)

    @property
    def settings(self) -> Any:
        return self.widget._parameters

    def choose(self, *names: str) -> None:
        """Select these models, and no others, as clicks in the list do."""
        for i, model in enumerate(self.widget.modelList.models):
            self.ui.modelList.item(i).setSelected(model.name in names)
        self.gui.process_events()

    def pick(self, combo: Any, value: str) -> None:
        index = combo.findData(value)
        assert index >= 0, f"{value!r} is not offered"
        combo.setCurrentIndex(index)
        self.gui.process_events()

    def offered(self, combo: Any) -> list[str]:
        return [combo.itemData(i) for i in range(combo.count)]

    def apply(self) -> None:
        assert self.ui.applyButton.enabled, self.ui.applyButton.toolTip
        self.ui.applyButton.click()
        assert self.controller.running

    def finish(self, phase: str = "done") -> None:
        self.gui.wait(lambda: not self.controller.running, RUN_S)
        self.gui.process_events()
        assert self.controller.phase == phase, self.controller.text

    def run(self) -> None:
        self.apply()
        self.finish()


def volume(array: np.ndarray | None = None, name: str = "CT") -> Any:
    import slicer

    if array is None:
        array = np.zeros((12, 20, 24), np.int16)
        array[3:8, 5:15, 6:18] = 1
        array[4:6, 12:18, 2:5] = 2
    node = slicer.util.addVolumeFromArray(array, name=name)
    node.CreateDefaultDisplayNodes()
    return node


def box(center: tuple[float, ...] = (12, 10, 6), size: tuple[float, ...] = (10, 10, 6)) -> Any:
    import slicer

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Box")
    node.SetCenterWorld(center)
    node.SetSizeWorld(size)
    return node


def masks(segmentation: Any, reference: Any) -> dict[str, np.ndarray]:
    """Name -> voxels of each segment."""
    from UNetSegmentationLib.mrml import segment_mask

    held = segmentation.GetSegmentation()
    ids = [held.GetNthSegmentID(i) for i in range(held.GetNumberOfSegments())]
    return {held.GetSegment(i).GetName(): segment_mask(segmentation, i, reference) for i in ids}


def scene_state() -> list[tuple[str, str, int]]:
    """What a cancelled run must leave as it was: every node, and how many segments each segmentation has."""
    import slicer

    nodes = [slicer.mrmlScene.GetNthNode(i) for i in range(slicer.mrmlScene.GetNumberOfNodes())]
    return [
        (n.GetID(), n.GetName(), n.GetSegmentation().GetNumberOfSegments() if n.IsA("vtkMRMLSegmentationNode") else 0)
        for n in nodes
        if not n.IsA("vtkMRMLScriptedModuleNode")
    ]


def count(kind: str) -> int:
    import slicer

    return slicer.mrmlScene.GetNumberOfNodesByClass(kind)


# -------------------------------------------------------------------------------------------------------------- opening


def test_an_empty_panel_says_what_to_do(panel: Any) -> None:
    p = panel()
    assert [getattr(p.ui, name).visible for name in SECTIONS] == [True, True, True, False]
    tops = [getattr(p.ui, name).y for name in SECTIONS[:3]]
    assert tops == sorted(tops)
    assert not p.ui.applyButton.enabled and p.ui.applyButton.toolTip == "Choose a volume."
    assert not p.ui.progressBar.visible and not p.ui.messageFrame.visible and not p.ui.undoButton.enabled
    assert not p.ui.presetCombo.visible and not p.ui.levelSpinBox.visible and not p.ui.allFramesCheckBox.visible
    assert not p.ui.replaceCheckBox.visible and not p.ui.detailsBrowser.visible
    assert p.ui.noduleSelector.noneDisplay in p.ui.noduleSelector.toolTip
    # Where its text is two lines; a size policy that is set after the word wrap would take it away.
    assert p.ui.noduleNote.hasHeightForWidth()
    assert "torch" not in sys.modules and "onnxruntime" not in sys.modules


def test_the_module_says_what_it_is(gui: Any) -> None:
    import SampleData

    module = gui.load()
    assert module.title == "U-Net Segmentation" and list(module.categories) == ["Segmentation"] and not module.hidden
    assert "not for diagnosis" in module.helpText and "CC BY" in module.acknowledgementText
    sources = SampleData.SampleDataLogic.sources
    assert {s["sampleName"] for s in sources} == {"UNetLungCT1", "UNetLungCT2"}
    assert all(callable(s["customDownloader"]) and Path(s["thumbnailFileName"]).is_file() for s in sources)


def test_every_control_has_a_tooltip_and_its_place_in_the_tab_order(panel: Any, install: Any) -> None:
    import qt

    p = panel()
    p.ui.advancedSection.collapsed = False
    shown = [w for w in vars(p.ui).values() if isinstance(w, qt.QWidget) and w.focusPolicy != qt.Qt.NoFocus]
    controls = [w for w in shown if "Section" not in w.name and "qt_" not in w.name and not isinstance(w, qt.QLabel)]
    assert len(controls) > 25 and not [w.name for w in controls if not w.toolTip]

    order, at = [], p.ui.volumeSelector
    for _ in range(400):
        order.append(at.name)
        at = at.nextInFocusChain()
        if at is p.ui.volumeSelector:
            break
    wanted = ["volumeSelector", "regionSelector", "drawBoxButton", "placePointButton", "presetCombo", "levelSpinBox", "widthSpinBox"]
    wanted += ["modelList", "detailsButton", "importButton", "folderButton", "outputSelector", "uncertaintyCheckBox", "ttaCombo"]
    wanted += ["deviceCombo", "engineCombo", "torchButton", "applyButton", "undoButton", "segmentsTable", "copyButton", "nextPlaceButton"]
    assert [name for name in order if name in wanted] == wanted


def test_it_fits_into_380_pixels(panel: Any, install: Any) -> None:
    long = install(title="A model with a title that no panel could ever hold in one line " * 3, labels=TWO, intensity=HU)
    volume(name="A volume whose name is as long as those that scanners make of a protocol and a kernel")
    p = panel()
    p.choose(long)
    p.run()
    p.ui.advancedSection.collapsed = p.ui.detailsButton.checked = False
    p.ui.advancedSection.collapsed = False
    p.gui.process_events()
    assert p.ui.resultSection.visible
    assert p.widget.root.minimumSizeHint.width() <= 380


# --------------------------------------------------------------------------------------------------------------- models


def test_models_are_listed_with_what_a_person_needs(panel: Any, install: Any, models_folder: Path) -> None:
    models_folder.mkdir()
    (models_folder / f"broken-1.0.0{SUFFIX}").write_bytes(b"no package")
    install(name="clicks", task="click")
    p = panel()
    texts = [p.ui.modelList.item(i).text() for i in range(p.ui.modelList.count)]
    lung = next(t for t in texts if t.startswith("Lung nodule in a box"))
    assert "Lung nodule" in lung and "Dice 0.85" in lung and "MB" in lung and "Apache-2.0" in lung and "2.5D" in lung
    assert not any("clicks" in t for t in texts)
    (i,) = [i for i, t in enumerate(texts) if t.startswith("broken")]
    assert "damaged" in p.ui.modelList.item(i).toolTip()
    p.choose("broken-1.0.0")
    assert p.settings.models == [] and p.ui.removeButton.enabled


def test_details_show_the_card_and_run_nothing_of_it(panel: Any, install: Any) -> None:
    words = {"description": "<script>alert(1)</script>", "licence": "<b>mine</b>. And more", "limits": "Fails on children."}
    evil = install(title="<img src=x>Toy", **words)
    p = panel()
    p.choose(evil)
    p.ui.detailsButton.click()
    assert p.ui.detailsBrowser.visible
    text = p.ui.detailsBrowser.toPlainText()
    assert "<img src=x>Toy" in text and "<script>alert(1)</script>" in text and "<b>mine</b>. And more" in text
    assert "Fails on children" in text
    assert "<b>mine</b>" in p.ui.modelList.item(p.ui.modelList.count - 1).text()
    p.choose("lung-nodule-2d-1.2.1")
    text = p.ui.detailsBrowser.toPlainText()
    assert "LIDC-IDRI" in text and "50 mm" in text and "162 cases" in text
    p.ui.detailsButton.click()
    assert not p.ui.detailsBrowser.visible


def test_import_choose_and_remove(panel: Any, make_package: Any, models_folder: Path, tmp_path: Path) -> None:
    package = make_package(name="mine", title="My model").path
    p = panel()
    assert not p.ui.removeButton.visible
    p.gui.dialogs.answer("")
    p.ui.importButton.click()
    assert not models_folder.exists()

    p.gui.dialogs.answer(str(package))
    p.ui.importButton.click()
    assert (models_folder / package.name).read_bytes() == package.read_bytes()
    assert p.settings.models == ["mine-1.0.0"] and p.ui.removeButton.visible and p.ui.removeButton.enabled
    shown = p.ui.modelList
    assert shown.viewport().rect.contains(shown.visualItemRect(shown.selectedItems()[0]))  # below three others

    for path, message in ((tmp_path / "away", "mine-1.0.0 is not installed here"), (models_folder / package.name, "")):
        next(f for f in (tmp_path / "away", models_folder / package.name) if f.exists()).rename(path)
        p.gui.leave(p.widget)
        p.gui.open()
        assert message in p.ui.modelMessage.text and bool(message) == p.ui.modelMessage.visible

    bad = tmp_path / "bad.unet.zip"
    bad.write_bytes(package.read_bytes()[:-60])
    p.gui.dialogs.answer(str(bad))
    p.ui.importButton.click()
    assert "damaged" in p.ui.modelMessage.text and p.ui.modelMessage.visible
    assert [f.name for f in models_folder.iterdir()] == [package.name]

    other = make_package(name="mine", title="Another").path
    p.gui.dialogs.answer(str(other), "No")
    p.ui.importButton.click()
    assert (models_folder / package.name).read_bytes() == package.read_bytes()
    p.gui.dialogs.answer(str(other), "Yes")
    p.ui.importButton.click()
    assert (models_folder / package.name).read_bytes() == other.read_bytes()

    p.gui.dialogs.answer("No")
    p.ui.removeButton.click()
    assert (models_folder / package.name).exists()
    p.gui.dialogs.answer("Yes")
    p.ui.removeButton.click()
    assert not (models_folder / package.name).exists() and p.settings.models == [] and not p.ui.removeButton.visible

    p.choose("lung-nodule-2d-1.2.1")
    assert not p.ui.removeButton.enabled
    p.ui.folderButton.click()
    assert str(models_folder) in p.gui.dialogs.texts("url")[0]
    models_folder.rmdir()
    models_folder.write_bytes(b"")
    p.ui.folderButton.click()
    assert "cannot be made" in p.ui.modelMessage.text and len(p.gui.dialogs.texts("url")) == 1
    assert not p.gui.dialogs.texts("error")


def test_an_import_keeps_what_the_scene_names(panel: Any, install: Any, make_package: Any, gui: Any, tmp_path: Path) -> None:
    toy = install()
    p = panel()
    p.settings.models = ["mine-1.0.0", toy, "other-1.0.0"]
    gui.process_events()
    (tmp_path / "bad.unet.zip").write_bytes(b"x")
    clicks = make_package(name="clicks", task="click").path
    for path, said in ((tmp_path / "bad.unet.zip", "damaged"), (clicks, "clicks-1.0.0 is imported")):
        gui.dialogs.answer(str(path))
        p.ui.importButton.click()
        assert said in p.ui.modelMessage.text and p.settings.models == ["mine-1.0.0", toy, "other-1.0.0"]
    gui.dialogs.answer(str(make_package(name="mine", version="1.1.0").path))
    p.ui.importButton.click()
    assert sorted(old_models(p)) == ["mine-1.1.0", toy] and "other-1.0.0 is not installed" in p.ui.modelMessage.text
    gui.dialogs.answer("Yes")
    p.ui.removeButton.click()
    assert p.settings.models == ["other-1.0.0"] and "other-1.0.0 is not installed" in p.ui.modelMessage.text
    gui.dialogs.answer(str(make_package(name="another").path))
    p.ui.importButton.click()
    assert p.settings.models == ["another-1.0.0"]
    two, one = install(name="two", channels=["T1", "T2"]), install(name="one", channels=["T2", "T1"])
    p.widget.modelList.read()
    p.settings.models = ["gone-1.0.0", two]
    p.settings.volume = volume(name="T1")
    p.settings.channels = [volume(name="T2")]
    p.ui.modelList.item([m.name for m in p.widget.modelList.models].index(one)).setSelected(True)
    assert sorted(p.settings.models) == sorted([one, two]) == sorted(old_models(p))


def test_one_bad_card_never_breaks_the_list(
    panel: Any, install: Any, make_package: Any, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import math
    import zipfile

    from UNetSegmentationLib import model
    from UNetSegmentationPanel import models

    good = install(name="good")
    with zipfile.ZipFile(make_package(name="bad").path) as z, zipfile.ZipFile(models_folder / f"bad-1.0.0{SUFFIX}", "w") as out:
        card = {**json.loads(z.read("model.json")), "metrics": {"dice": {"<b>thing": 10**401}}}
        out.writestr("model.json", json.dumps(card))
        out.writestr("model.onnx", z.read("model.onnx"))
    for words in ("too large", "OverflowError"):  # by the check, and without it
        found = {m.name: m for m in models.installedModels()}
        assert found[good].card is not None and found["bad-1.0.0"].card is None and words in found["bad-1.0.0"].error
        monkeypatch.setattr(model, "_MAX_NUMBER", math.inf)
    p = panel()
    p.choose(good)
    assert p.settings.models == [good]
    gone = models.Model(models_folder / "gone.unet.zip", True)
    assert gone.megabytes == 0.0


def test_what_a_card_says_is_shown_as_it_is(panel: Any, install: Any, models_folder: Path) -> None:
    import qt

    evil = install(channels=["<img src='//host/x'>", "<i>b</i>"])
    (models_folder / f"<u>bad-1.0.0{SUFFIX}").write_bytes(b"no package")
    p = panel()
    volume()
    p.choose(evil)
    ((label, selector),) = p.widget.channelRows._rows
    assert p.ui.volumeLabel.text.startswith("<img") and label.text == "<i>b</i>:"
    assert p.ui.volumeLabel.textFormat == label.textFormat == qt.Qt.PlainText
    assert "&lt;i&gt;b" in selector.toolTip and "<i>" not in selector.toolTip
    tips = [p.ui.modelList.item(i).toolTip() for i in range(p.ui.modelList.count)]
    assert not any("<u>" in tip for tip in tips) and any("&lt;u&gt;bad" in tip for tip in tips)


def test_no_dialog_takes_a_name_for_html() -> None:
    """Slicer's leave the text's format to Qt, which reads any path that an <img> names."""
    import ast

    import UNetSegmentationPanel

    folder = Path(UNetSegmentationPanel.__file__).parent
    files = [folder.parent / "UNetSegmentation.py", *folder.glob("*.py")]
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    shown = [call for call in calls if any(re.search(r"slicer\.util\.\w+Display$", ast.unparse(f)) for f in (call.func, *call.args[:1]))]
    assert len(shown) > 11
    assert not [
        ast.unparse(c) for c in shown if ("textFormat", "qt.Qt.PlainText") not in [(k.arg, ast.unparse(k.value)) for k in c.keywords]
    ]


def test_a_missing_version_is_stood_in_for_by_the_newest(panel: Any, install: Any) -> None:
    from UNetSegmentationPanel import models

    for version in ("1.2.0", "1.10.0", "1.9.0"):
        install(version=version)
    p = panel()
    found, missing = models.resolve(["toy-1.0.0", "toy-1.9.0", "none-1.0.0"], p.widget.modelList.models)
    assert [m.name for m in found] == ["toy-1.10.0", "toy-1.9.0"] and missing == ["none-1.0.0"]


def test_a_model_is_called_as_its_card_says(panel: Any, install: Any, models_folder: Path) -> None:
    from UNetSegmentationPanel import models

    file = models_folder / f"{install()}{SUFFIX}"
    file.rename(models_folder / f"my best{SUFFIX}")
    p = panel()
    p.choose("toy-1.0.0")
    assert p.settings.models == ["toy-1.0.0"]
    found, missing = models.resolve(["toy-1.0.0", "my best"], p.widget.modelList.models)  # the second as scenes had it before
    assert [m.name for m in found] == ["toy-1.0.0"] and missing == []
    assert models.resolve(["lung-nodule-2d-clinic"], found + p.widget.modelList.models) == ([], ["lung-nodule-2d-clinic"])
    other = Path(shutil.copy(models_folder / f"my best{SUFFIX}", models_folder.parent / f"other{SUFFIX}"))
    asked: list[str] = []
    assert models.importPackage(other, lambda name: bool(asked.append(name))) is None and asked == ["toy-1.0.0"]
    twin = shutil.copy(other, models_folder)
    (model,) = [m for m in models.installedModels() if m.path == Path(twin)]
    assert model.card is None and "holds toy-1.0.0 too, as my best.unet.zip does" in model.error
    assert models.importPackage(twin, lambda name: False).path == Path(twin)
    Path(twin).unlink()
    imported = models.importPackage(other, lambda name: True).path
    assert imported.name == "toy-1.0.0.unet.zip"
    letters = imported.with_name("Toy-1.0.0.unet.zip")
    letters.symlink_to(imported)  # one file, as both names are on a Mac
    assert models.importPackage(other, lambda name: True).path == imported and letters.is_symlink()
    assert not (models_folder / f"my best{SUFFIX}").exists()


def test_an_imported_model_of_clicks_is_there_at_once(panel: Any, make_package: Any) -> None:
    package = make_package(name="clicks", task="click").path
    p = panel()
    volume()
    p.choose("lung-nodule-2d-1.2.1")
    p.gui.dialogs.answer(str(package))
    p.ui.importButton.click()
    assert "clicks-1.0.0 is imported" in p.ui.modelMessage.text and p.ui.modelMessage.visible
    assert "clicks-1.0.0" in p.offered(p.ui.clickModelCombo) and p.settings.models == ["lung-nodule-2d-1.2.1"]
    p.choose("hippocampus-3d-1.2.3")
    assert not p.ui.modelMessage.visible


def test_versions_of_one_title_can_be_told_apart(panel: Any, install: Any) -> None:
    for version in ("1.0.0", "1.1.0"):
        install(version=version, title="Heart", metrics={"cases": 1})
        install(version=version, title="Heart", name="clicks", task="click")
    p = panel()
    volume()
    p.gui.process_events()
    texts = [p.ui.modelList.item(i).text().split("\n")[0] for i in range(p.ui.modelList.count)]
    clicks = [p.ui.clickModelCombo.itemText(i) for i in range(p.ui.clickModelCombo.count)]
    for shown in (texts, clicks):
        assert [t for t in shown if t.startswith("Heart")] == ["Heart (1.0.0)", "Heart (1.1.0)"]
    p.choose("toy-1.0.0")
    p.ui.detailsButton.click()
    assert "on 1 case" in p.ui.detailsBrowser.toPlainText() and "on 1 cases" not in p.ui.detailsBrowser.toPlainText()


def test_a_long_name_leaves_the_panel_as_narrow_as_it_is(panel: Any, install: Any) -> None:
    from UNetSegmentationPanel.models import breakable

    name, toy = "_".join(["thorax"] * 10), install()
    p = panel()
    p.settings.volume = volume(name=name)
    p.choose(toy)
    p.run()
    p.settings.volume = volume()
    p.gui.process_events()
    assert name in p.ui.summaryLabel.text.replace("\u200b", "") and p.ui.summaryLabel.minimumSizeHint.width() < 200
    path = rf"C:\data\{'s' * 40}.nrrd /data/{'s' * 40}_1.nrrd"
    assert breakable(path, copied=True) == path != breakable(path) and breakable(path).replace("\u200b", "") == path
    assert breakable(f"The scan '{'s' * 40}_1.2'.", copied=True) == f"The scan '{'s' * 40}_\u200b1.\u200b2'."


def test_models_that_cannot_be_averaged_say_why(panel: Any, install: Any) -> None:
    one, two = install(name="one"), install(name="two", labels=TWO)
    flair, sigmoid = install(name="flair", channels=["T1", "FLAIR"]), install(name="sig", activation="sigmoid")
    turned = install(name="other", channels=["FLAIR", "T1"])
    p = panel()
    volume()
    p.choose(one)
    assert p.ui.applyButton.enabled and not p.ui.modelMessage.visible
    for other, words in ((two, "same labels"), (flair, "must take the same"), (sigmoid, "different activations")):
        p.choose(one, other)
        assert words in p.ui.modelMessage.text and p.ui.modelMessage.visible
        assert not p.ui.applyButton.enabled and words in p.ui.applyButton.toolTip
    p.choose(flair, turned)
    assert "flair takes T1, FLAIR and other FLAIR, T1" in p.ui.modelMessage.text


def test_an_ensemble_is_averaged(panel: Any, install: Any) -> None:
    a, b = install(name="a"), install(name="b")
    p = panel()
    node = volume()
    p.choose(a, b)
    assert "2 models are averaged" in p.ui.modelMessage.text
    p.run()
    assert p.ui.summaryLabel.text.startswith("a-1.0.0 + b-1.0.0 on ")
    assert np.array_equal(masks(p.settings.output, node)["thing"], np.asarray(array_of(node) > 0))


def array_of(node: Any) -> np.ndarray:
    import slicer

    return slicer.util.arrayFromVolume(node)


# --------------------------------------------------------------------------------------------------------------- window


def window_of(node: Any) -> tuple[float, float]:
    display = node.GetScalarVolumeDisplayNode()
    return display.GetLevel(), display.GetWindow()


def test_presets_are_offered_for_the_models_they_fit(panel: Any, install: Any) -> None:
    none = install(name="none")
    p = panel()
    volume()
    p.choose(none)
    assert not p.ui.presetCombo.visible
    p.choose("lung-nodule-2d-1.2.1")
    assert p.ui.presetCombo.visible and p.offered(p.ui.presetCombo)[0] == ""
    assert {"lung", "bone", "custom"} <= set(p.offered(p.ui.presetCombo))
    assert "mr-percentile" not in p.offered(p.ui.presetCombo)
    assert (p.ui.levelSpinBox.value, p.ui.widthSpinBox.value) == (-300, 1400)
    p.pick(p.ui.presetCombo, "bone")
    p.choose("hippocampus-3d-1.2.3")  # z-score: any window would be wrong
    assert not p.ui.presetCombo.visible and not p.ui.levelSpinBox.visible and p.settings.preset == ""


def test_a_preset_is_seen_by_person_and_model(panel: Any, install: Any) -> None:
    toy = install(intensity=HU)
    p = panel()
    node = volume()
    before = window_of(node)
    p.choose(toy)
    assert window_of(node) == before  # looking changes nothing
    p.pick(p.ui.presetCombo, "bone")
    assert window_of(node) == (400, 1800) and (p.ui.levelSpinBox.value, p.ui.widthSpinBox.value) == (400, 1800)
    p.ui.levelSpinBox.setValue(0.0)
    p.ui.widthSpinBox.setValue(2.0)
    assert p.settings.preset == "custom" and p.ui.presetCombo.currentIndex == p.ui.presetCombo.findData("custom")
    assert window_of(node) == (0, 2) and (p.settings.level, p.settings.width) == (0, 2)
    p.run()  # the window -1..1: 1 and 2 become 1, 0 becomes 0.5, which is the background's
    assert np.array_equal(masks(p.settings.output, node)["thing"], array_of(node) > 0)
    p.pick(p.ui.presetCombo, "")
    assert (p.ui.levelSpinBox.value, p.ui.widthSpinBox.value) == (0, 4) and p.settings.preset == ""
    p.run()  # the window -2..2: 1 becomes 0.75, 0 becomes 0.5
    assert np.array_equal(masks(p.settings.output, node)["thing"], array_of(node) > 0)
    p.ui.levelSpinBox.setValue(3.0)
    p.run()  # 1..5: only 2 becomes 0.25 and nothing is above 0.5
    assert "Nothing was found" in p.ui.summaryLabel.text


def test_model_default_shows_the_models_own_display_window(panel: Any) -> None:
    p = panel()
    node = volume()
    p.choose("lung-nodule-2d-1.2.1")
    p.pick(p.ui.presetCombo, "bone")
    p.pick(p.ui.presetCombo, "")
    assert window_of(node) == (-600, 1500)  # the card's "display": lung


# --------------------------------------------------------------------------------------------------------------- region


def test_a_model_for_one_target_asks_for_it(panel: Any, install: Any) -> None:
    import slicer

    toy = install(roi_mm=8)
    for kind in ("vtkMRMLSelectionNode", "vtkMRMLInteractionNode"):  # the application's, which keep the scene's closing
        made = slicer.mrmlScene.CreateNodeByClass(kind)
        made.UnRegister(None)
        made.SetSingletonTag("Singleton")
        slicer.mrmlScene.AddNode(made)
    p = panel()
    node = volume()
    p.choose(toy)
    assert not p.ui.applyButton.enabled and "about 8 mm" in p.ui.applyButton.toolTip
    p.ui.drawBoxButton.click()
    assert p.settings.region.IsA("vtkMRMLMarkupsROINode") and "opposite corner" in p.ui.applyButton.toolTip
    interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
    assert interaction.GetCurrentInteractionMode() == interaction.Place
    p.settings.region.SetCenterWorld((12, 10, 6))
    p.settings.region.SetSizeWorld((4, 4, 4))
    p.gui.process_events()
    assert p.ui.applyButton.enabled, p.ui.applyButton.toolTip
    p.run()
    found = masks(p.settings.output, node)["thing"]
    assert found[4:8, 8:12, 10:14].all() and 0 < found.sum() <= 5**3

    p.settings.output = None
    p.ui.placePointButton.click()
    assert p.settings.region.IsA("vtkMRMLMarkupsFiducialNode") and "slice view" in p.ui.applyButton.toolTip
    p.settings.region.AddControlPoint((3, 15, 5))
    p.gui.process_events()
    p.run()
    found = masks(p.settings.output, node)["thing"]
    assert found[4, 15, 3] and not found[4, 10, 15]


def test_a_box_outside_the_volume_is_one_sentence(panel: Any, install: Any) -> None:
    toy = install()
    p = panel()
    volume()
    p.choose(toy)
    p.settings.region = box(center=(500, 0, 0))
    state = scene_state()
    p.apply()
    p.finish("failed")
    assert "lies outside" in p.ui.messageLabel.text and p.ui.messageFrame.visible and p.ui.tryAgainButton.visible
    assert p.ui.messageIcon.pixmap.toImage() == p.ui.warningIcon.pixmap.toImage()
    assert scene_state() == state and not p.gui.dialogs.shown
    p.settings.region = None
    p.gui.process_events()
    p.ui.tryAgainButton.click()
    p.finish()
    assert not p.ui.messageFrame.visible


def test_a_removed_box_is_not_replaced_by_another(panel: Any, gui: Any) -> None:
    import slicer

    p = panel()
    volume()
    p.settings.region, _other = box(), box()
    gui.process_events()
    slicer.mrmlScene.RemoveNode(p.settings.region)
    gui.process_events()
    assert p.settings.region is None and p.ui.regionSelector.currentNode() is None


# -------------------------------------------------------------------------------------------------------------- channels


def test_several_channels_have_a_selector_each(panel: Any, install: Any, tmp_path: Path) -> None:
    toy = install(channels=["T1", "FLAIR"], labels=TWO)
    p = panel()
    first = volume()
    second = volume(np.asarray(array_of(first) * 0 + 2, np.int16), "second")
    p.choose(toy)
    assert p.ui.volumeLabel.text == "T1:" and "FLAIR" in p.ui.applyButton.toolTip and not p.ui.applyButton.enabled
    ((label, selector),) = p.widget.channelRows._rows
    assert label.visible and label.text == "FLAIR:" and "FLAIR" in selector.toolTip
    selector.setCurrentNode(second)
    p.gui.process_events()
    assert list(p.settings.channels) == [second]
    p.run()
    assert masks(p.settings.output, first)["two"].all()  # the toy looks at the last channel
    p.settings.output = None
    p.settings.volume = second
    p.gui.process_events()
    assert "Choose a volume for 'FLAIR'" in p.ui.applyButton.toolTip  # that one was for another first scan
    selector.setCurrentNode(second)
    p.gui.process_events()
    assert "'second' is chosen for both 'T1' and 'FLAIR'" in p.ui.applyButton.toolTip and not p.ui.applyButton.enabled
    selector.setCurrentNode(first)
    p.run()
    assert masks(p.settings.output, first)["two"].sum() == (array_of(first) == 2).sum()
    p.gui.save_scene(tmp_path / "scene.mrb")
    p.gui.load_scene(tmp_path / "scene.mrb")  # its nodes come into the selectors when it is all there
    assert selector.currentNode().GetName() == "CT" and p.settings.volume.GetName() == "second" and p.ui.applyButton.enabled
    p.choose("hippocampus-3d-1.2.3")
    assert p.ui.volumeLabel.text == "Volume:" and not selector.visible


def test_a_channel_stays_with_its_patient_and_its_name(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy, swapped, more = (install(name="-".join(c).lower(), channels=c) for c in (["T1", "T2"], ["T2", "T1"], ["T1", "C", "t2"]))
    p = panel()
    first, second, other = (volume(name=name) for name in ("A-T1", "A-T2", "B-T1"))
    p.choose(toy)
    p.ui.volumeSelector.setCurrentNode(first)
    p.settings.channels = [second]
    gui.process_events()
    assert p.ui.applyButton.enabled
    p.choose(swapped)
    assert "'A-T1' is chosen for both 'T2' and 'T1'" in p.ui.applyButton.toolTip
    p.choose(toy)
    p.settings.channels = [second]
    p.choose(more)
    assert list(p.settings.channels) == [None, second] and "Choose a volume for 'C'" in p.ui.applyButton.toolTip
    p.choose(toy)
    assert list(p.settings.channels) == [second] and p.ui.applyButton.enabled
    p.ui.volumeSelector.setCurrentNode(other)
    gui.process_events()
    assert "Choose a volume for 'T2'" in p.ui.applyButton.toolTip and not p.ui.applyButton.enabled
    p.settings.channels = [second]
    slicer.mrmlScene.RemoveNode(other)
    gui.process_events()
    assert not [node for node in p.settings.channels if node]


def test_a_channel_that_is_removed_is_not_replaced_by_another_scan(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy = install(channels=["T1", "FLAIR", "T2"], labels=TWO)
    first, flair, t2, _other = (volume(name=name) for name in ("T1", "FLAIR", "T2", "CT"))
    p = panel()
    p.choose(toy)
    p.settings.channels = [flair, t2]
    gui.process_events()
    assert p.ui.applyButton.enabled
    for node in (flair, t2):
        slicer.mrmlScene.RemoveNode(node)
    gui.process_events()
    assert list(p.settings.channels) == [None, None] and [s.currentNode() for _l, s in p.widget.channelRows._rows] == [None, None]
    assert "FLAIR" in p.ui.applyButton.toolTip and not p.ui.applyButton.enabled


def test_who_scrolls_the_panel_changes_nothing(panel: Any, install: Any, gui: Any) -> None:
    """The wheel over a box is the panel's: it would turn what the network sees, and how a nodule grew, unseen."""
    import qt

    toy = install(intensity=HU, channels=["T1", "FLAIR"])
    install(name="clicks", task="click")
    first, second = volume(name="T1"), volume(name="FLAIR")
    p = panel()
    p.choose(toy)
    p.settings.channels = [second]
    p.ui.daysSpinBox.value = 90
    ((_label, channel),) = p.widget.channelRows._rows
    selectors = [getattr(p.ui, f"{name}Selector") for name in ("volume", "region", "nodule", "earlier", "output")] + [channel]
    combos = [getattr(p.ui, f"{name}Combo") for name in ("preset", "clickModel", "tta", "device", "engine")]
    combos += [combo for selector in selectors for combo in selector.findChildren(qt.QComboBox)]
    numbers = [p.ui.levelSpinBox, p.ui.widthSpinBox, p.ui.daysSpinBox]
    assert len(combos) == 11 and sum(combo.count > 1 for combo in combos) >= 7
    before = [combo.currentIndex for combo in combos], [box.value for box in numbers]
    for box in combos + numbers:
        for down in (1, -1):
            gui.wheel(box, down)
            assert ([combo.currentIndex for combo in combos], [box.value for box in numbers]) == before, box.objectName
    assert p.settings.volume is first and list(p.settings.channels) == [second] and (p.settings.preset, p.settings.days) == ("", 90)


def test_a_labelmap_is_no_scan(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy = install(channels=["T1", "FLAIR"])
    label = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "label")
    slicer.util.updateVolumeFromArray(label, np.ones((4, 4, 4), np.uint8))
    p = panel()
    assert p.settings.volume is None and p.ui.applyButton.toolTip == "Choose a volume."
    hidden, ct = volume(name="hidden"), volume()
    hidden.SetHideFromEditors(True)
    gui.leave(p.widget)
    gui.open()
    assert p.settings.volume is ct and p.ui.volumeSelector.currentNode() is ct
    p.choose(toy)
    ((_label, selector),) = p.widget.channelRows._rows
    selector.setCurrentNode(label)
    assert selector.currentNode() is None


# ------------------------------------------------------------------------------------------------------------------ run


def test_what_is_copied_is_of_the_segments_as_they_were_corrected(panel: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import qt
    import slicer
    from UNetSegmentationLib import mrml

    def copied() -> list[list[str]]:
        p.ui.copyButton.click()
        return [line.split("\t") for line in qt.QApplication.clipboard().text().splitlines()]

    toy = install(labels=TWO)
    p = panel()
    node = volume()
    p.choose(toy)
    p.run()
    rows, two, held = copied(), masks(p.settings.output, node)["two"], p.settings.output.GetSegmentation()
    half = two.copy()
    half[..., ::2] = False
    shown = p.settings.resultTable.GetTable()
    for mask, same in ((two, True), (half, False), (two, False)):
        slicer.util.updateSegmentBinaryLabelmapFromArray(np.uint8(mask), p.settings.output, held.GetSegmentIdBySegmentName("two"), node)
        now = copied()
        assert int(now[2][-1]) == mask.sum() and now[1] == rows[1] and (p.settings.resultTable.GetTable() is shown) == same
        shown = p.settings.resultTable.GetTable()
    assert now == rows
    monkeypatch.setattr(mrml, "_LARGEST_MEASURED", 1)  # as organs, which keep what they had
    one = held.GetSegment(held.GetSegmentIdBySegmentName("one"))
    one.RemoveTag(mrml.MODEL_TAG)  # improved by clicks
    one.SetTag(mrml.PROMPTS_TAG, "[]")
    slicer.util.updateSegmentBinaryLabelmapFromArray(np.uint8(half), p.settings.output, held.GetSegmentIdBySegmentName("two"), node)
    now = copied()
    assert now[1] == rows[1] and int(now[2][-1]) == half.sum() and now[2][2] == "nan"
    monkeypatch.setattr(qt.QLocale, "system", lambda: qt.QLocale("de_DE"))  # where 5.7 is a date
    assert copied()[1:] == [[now[1][0], *(cell.replace(".", ",") for cell in now[1][1:])], [cell.replace(".", ",") for cell in now[2]]]
    held.RemoveSegment(held.GetSegmentIdBySegmentName("one"))
    assert [row[0] for row in copied()] == ["Segment", "two"]


def test_apply_writes_segments_measures_and_map_and_undo_takes_them_back(panel: Any, install: Any, tmp_path: Path) -> None:
    import qt
    import slicer

    toy = install(labels=TWO)
    p = panel()
    node = volume()
    p.choose(toy)
    state = scene_state()
    p.ui.uncertaintyCheckBox.click()
    p.pick(p.ui.engineCombo, "onnx")
    p.pick(p.ui.ttaCombo, "none")
    p.run()

    found = masks(p.settings.output, node)
    assert {k: int(v.sum()) for k, v in found.items()} == {"one": (array_of(node) == 1).sum(), "two": (array_of(node) == 2).sum()}
    assert p.ui.resultSection.visible and "ONNX Runtime" in p.ui.summaryLabel.text and "Not for diagnosis" in p.ui.summaryLabel.text
    assert p.ui.segmentsTable.segmentationNode() is p.settings.output
    assert p.ui.show3DButton.segmentationNode() is p.settings.output
    assert p.ui.outputSelector.currentNode() is p.settings.output and p.ui.replaceCheckBox.visible

    p.ui.copyButton.click()
    rows = [line.split("\t") for line in qt.QApplication.clipboard().text().splitlines()]
    assert rows[0][:2] == ["Segment", "Volume [ml]"] and [r[0] for r in rows[1:]] == ["one", "two"]
    path = tmp_path / "measures.csv"
    p.gui.dialogs.answer(str(tmp_path / "measures"))  # as it is typed; not every system's dialog adds the suffix
    p.ui.exportButton.click()
    with open(path, encoding="utf-8-sig", newline="") as f:
        assert list(csv.reader(f)) == rows
    assert path.read_bytes().startswith(codecs.BOM_UTF8)  # by which spreadsheets know UTF-8
    path.write_text("mine")
    p.gui.dialogs.answer(str(tmp_path / "measures"), False)
    p.ui.exportButton.click()
    assert path.read_text() == "mine" and p.gui.dialogs.texts("message") == ["measures.csv is there already. Replace it?"]
    (tmp_path / "folder.csv").mkdir()
    p.gui.dialogs.answer(str(tmp_path / "folder.csv"))
    p.ui.exportButton.click()
    assert "cannot be written" in p.gui.dialogs.texts("error")[0]

    p.ui.measuresTable.selectRow(1)
    p.settings.tta = "none"  # any setting
    p.gui.process_events()
    assert {index.row() for index in p.ui.measuresTable.selectedIndexes()} == {1}

    assert p.ui.uncertainWidget.visible and p.settings.resultUncertainty is not None
    composite = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    composite.SetForegroundVolumeID(node.GetID())
    composite.SetForegroundOpacity(0.25)
    p.ui.mapCheckBox.click()
    assert composite.GetForegroundVolumeID() == p.settings.resultUncertainty.GetID() and composite.GetForegroundOpacity() > 0
    p.ui.mapCheckBox.click()
    assert composite.GetForegroundVolumeID() == node.GetID() and composite.GetForegroundOpacity() == 0.25
    p.ui.mapCheckBox.click()

    assert p.ui.undoButton.enabled
    p.ui.undoButton.click()
    p.gui.process_events()
    assert composite.GetForegroundVolumeID() == node.GetID() and composite.GetForegroundOpacity() == 0.25
    slicer.mrmlScene.RemoveNode(composite)
    left = [s for s in scene_state() if not s[1].startswith("UNetSegmentation")]  # the map's colour table stays
    assert left == state and not p.ui.resultSection.visible and not p.ui.undoButton.enabled
    assert "taken back" in p.ui.messageLabel.text and not p.ui.tryAgainButton.visible


def test_undo_leaves_a_map_to_the_views_that_showed_it(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy = install("threshold", intensity=HU)
    p = panel()
    p.settings.volume, pet = volume(), volume(name="PET")
    gui.process_events()
    p.choose(toy)
    p.ui.uncertaintyCheckBox.click()
    p.run()
    p.run()
    first, second = (slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode") for _ in range(2))
    p.ui.mapCheckBox.click()
    first.SetForegroundOpacity(0.2)
    second.SetForegroundVolumeID(pet.GetID())
    second.SetForegroundOpacity(0.5)
    p.ui.undoButton.click()
    gui.process_events()
    shown = [(view.GetForegroundVolumeID(), view.GetForegroundOpacity()) for view in (first, second)]
    assert shown == [(p.settings.resultUncertainty.GetID(), 0.2), (pet.GetID(), 0.5)]


def test_a_map_of_a_closed_scene_leaves_nothing_to_the_next_one(panel: Any, gui: Any) -> None:
    import slicer
    from UNetSegmentationPanel import results

    panel()
    for shown in (True, False):
        views = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
        before, map_ = volume(), volume(name="map")
        for view in views:
            view.SetForegroundVolumeID((before if shown else map_).GetID())
        results.showMap(map_, shown)
        if shown:
            gui.close_scene()
    assert views and not any(view.GetForegroundVolumeID() for view in views)


def test_undo_is_one_step_for_each_apply(panel: Any, install: Any) -> None:
    toy = install(labels=TWO)
    p = panel()
    node = volume()
    p.choose(toy)
    p.run()
    first, summary = masks(p.settings.output, node), p.ui.summaryLabel.text
    array_of(node)[:] = 2
    node.GetImageData().GetPointData().GetScalars().Modified()
    p.run()
    assert list(masks(p.settings.output, node)) == ["two"] and p.settings.resultTable.GetTable().GetNumberOfRows() == 1
    assert count("vtkMRMLSegmentationNode") == 1 and count("vtkMRMLTableNode") == 1
    p.ui.undoButton.click()
    again = masks(p.settings.output, node)
    assert list(again) == list(first) and all(np.array_equal(again[k], first[k]) for k in first)
    assert p.settings.resultTable.GetTable().GetNumberOfRows() == 2 and p.ui.summaryLabel.text == summary
    p.ui.undoButton.click()
    assert count("vtkMRMLSegmentationNode") == 0 and not p.ui.undoButton.enabled

    p.ui.uncertaintyCheckBox.click()
    p.run()
    p.run()
    composite = node.GetScene().AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    p.ui.mapCheckBox.click()
    p.ui.undoButton.click()
    assert composite.GetForegroundVolumeID() == p.settings.resultUncertainty.GetID()  # the first run's, shown as it was
    node.GetScene().RemoveNode(p.settings.resultUncertainty)  # by hand; a node that goes has no scene any more
    p.gui.process_events()
    assert p.ui.resultSection.visible and not p.ui.mapCheckBox.visible and p.controller.canUndo


def test_a_map_that_is_shown_gives_way_to_the_next_result(panel: Any, install: Any, gui: Any) -> None:
    toy = install()
    p = panel()
    view = volume().GetScene().AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    p.choose(toy)
    p.ui.uncertaintyCheckBox.click()
    p.run()
    p.ui.mapCheckBox.click()
    p.ui.volumeSelector.setCurrentNode(volume(name="MR"))
    gui.process_events()
    p.run()
    assert view.GetForegroundVolumeID() == p.settings.resultUncertainty.GetID() and p.ui.mapCheckBox.checked
    p.ui.uncertaintyCheckBox.click()
    p.run()
    assert view.GetForegroundVolumeID() is None and not p.ui.mapCheckBox.visible


def test_add_keeps_the_earlier_segments(panel: Any, install: Any) -> None:
    toy = install()
    p = panel()
    node = volume()
    p.choose(toy)
    p.run()
    p.ui.replaceCheckBox.click()
    p.run()
    assert len(masks(p.settings.output, node)) == 2 and count("vtkMRMLSegmentationNode") == 1
    p.ui.replaceCheckBox.click()
    p.ui.outputSelector.setCurrentNode(None)
    p.run()
    assert count("vtkMRMLSegmentationNode") == 2


def test_measures_are_of_what_masking_left(panel: Any, install: Any) -> None:
    import slicer
    from UNetSegmentationLib import mrml

    toy = install()
    p = panel()
    node = volume()
    p.choose(toy)
    p.run()
    first = p.settings.resultTable.GetTable().GetColumnByName("Voxels").GetValue(0)
    segmentation = p.settings.output
    found = mrml.segment_mask(segmentation, segmentation.GetSegmentation().GetNthSegmentID(0), node)
    drawn = np.zeros_like(found)
    drawn[tuple(np.argwhere(found)[0])] = 1
    mine = slicer.vtkSegment()
    mine.SetName("mine")
    matrix = np.diag([1.0, 1.0, 1.0, 1.0])
    mine.AddRepresentation("Binary labelmap", mrml.oriented_labelmap(drawn, (0, 0, 0), matrix))
    segmentation.GetSegmentation().AddSegment(mine)
    editor = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor.SetSingletonTag("SegmentEditor")
    editor.SetAndObserveSegmentationNode(segmentation)
    p.run()
    table = p.settings.resultTable.GetTable()
    left = mrml.segment_mask(segmentation, segmentation.GetSegmentation().GetNthSegmentID(0), node)
    assert table.GetNumberOfRows() == 1 and table.GetColumnByName("Voxels").GetValue(0) == left.sum() == first - 1


def test_measures_bear_the_names_of_the_segments(panel: Any, install: Any) -> None:
    import slicer

    toy = install()
    p = panel()
    node = volume()
    p.choose(toy)
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(node)
    hers = segmentation.GetSegmentation().AddEmptySegment("", "thing")
    slicer.util.updateSegmentBinaryLabelmapFromArray(np.uint8(array_of(node) == 2), segmentation, hers, node)
    p.ui.outputSelector.setCurrentNode(segmentation)
    for replace, name in ((True, "thing 2"), (True, "thing 2"), (False, "thing 3")):
        p.settings.replace = replace
        p.run()
        table = p.settings.resultTable.GetTable()
        rows = [(table.GetValue(r, 0).ToString(), table.GetColumnByName("Voxels").GetValue(r)) for r in range(table.GetNumberOfRows())]
        assert rows == [(name, masks(segmentation, node)[name].sum())]


def test_a_result_is_of_the_volume_that_was_segmented(panel: Any, install: Any, gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import qt
    import slicer

    toy = install()
    p = panel()
    second = volume(name="T2")
    first = volume(array_of(second) * 7, "T1")
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(first)
    held = segmentation.GetSegmentation()
    slicer.util.updateSegmentBinaryLabelmapFromArray(np.uint8(array_of(second) == 2), segmentation, held.AddEmptySegment(""), first)
    p.settings.volume = second
    p.ui.outputSelector.setCurrentNode(segmentation)
    p.choose(toy)
    p.run()
    assert "not the volume chosen" not in p.ui.summaryLabel.text and p.settings.output is segmentation
    half = masks(segmentation, second)["thing"] * (np.arange(24) > 10)
    slicer.util.updateSegmentBinaryLabelmapFromArray(np.uint8(half), segmentation, held.GetSegmentIdBySegmentName("thing"), second)
    p.ui.copyButton.click()
    row = qt.QApplication.clipboard().text().splitlines()[1].split("\t")
    assert [float(row[i]) for i in (4, 8)] == [1, half.sum()]  # T2's mean
    p.settings.volume = first
    gui.process_events()
    assert p.ui.summaryLabel.text.startswith("Of 'T2', which is not the volume chosen above.\n")
    said: list[str] = []
    monkeypatch.setattr(slicer.util, "showStatusMessage", lambda text, *of: said.append(text))
    slicer.mrmlScene.RemoveNode(second)
    gui.process_events()
    less = np.uint8(half * (np.arange(24) > 11))
    slicer.util.updateSegmentBinaryLabelmapFromArray(less, segmentation, held.GetSegmentIdBySegmentName("thing"), first)
    p.ui.copyButton.click()  # not in T1, which the segmentation was begun on
    assert "not the volume chosen" not in p.ui.summaryLabel.text
    assert qt.QApplication.clipboard().text().splitlines()[1].split("\t") == row
    assert len(said) == 1 and "their volume is not in the scene any more" in said[0]


def test_uncertain_places_are_visited(panel: Any, install: Any) -> None:
    import slicer

    toy = install("identity", activation="sigmoid", intensity={"mode": "none"})
    array = np.full((12, 20, 24), 0.001, np.float32)
    array[2:4, 3:5, 3:5] = 0.5
    array[8:12, 12:18, 12:20] = 0.45
    p = panel()
    volume(array)
    view = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceNode")
    p.choose(toy)
    p.run()
    assert not p.ui.uncertainWidget.visible
    p.ui.uncertaintyCheckBox.click()
    p.pick(p.ui.ttaCombo, "none")
    p.run()
    assert p.ui.uncertainWidget.visible and p.ui.placeLabel.text == "2 to check"
    seen = []
    for expected in ("1 of 2", "2 of 2", "1 of 2"):
        p.ui.nextPlaceButton.click()
        assert p.ui.placeLabel.text == expected
        seen.append([round(view.GetSliceToRAS().GetElement(i, 3)) for i in range(3)])
    assert seen[0] == seen[2] and 12 <= seen[0][0] < 20 and 3 <= seen[1][0] < 5
    p.ui.uncertaintyCheckBox.click()  # any setting: the walk goes on where it was
    p.gui.process_events()
    assert p.ui.placeLabel.text == "1 of 2"
    moved = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    moved.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(np.array([[1, 0, 0, 100], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])))
    p.settings.volume.SetAndObserveTransformNodeID(moved.GetID())
    data = json.loads(p.settings.record)
    for place in data["places"] * 2:  # of an older scene: where they were
        p.ui.nextPlaceButton.click()
        assert round(view.GetSliceToRAS().GetElement(0, 3)) in (seen[0][0] + 100, seen[1][0] + 100)
        place.pop("prompt", None)
    p.settings.volume.SetAndObserveTransformNodeID(None)
    slicer.util.updateVolumeFromArray(p.settings.volume, array[1:, 2:, 3:].copy())  # a crop is no move
    p.settings.volume.SetOrigin(3, 2, 1)
    for place in seen[1:]:
        p.ui.nextPlaceButton.click()
        assert [round(view.GetSliceToRAS().GetElement(i, 3)) for i in range(3)] == place
    p.settings.record = json.dumps(data)
    p.gui.process_events()
    p.ui.nextPlaceButton.click()
    assert round(view.GetSliceToRAS().GetElement(0, 3)) == seen[0][0]


def test_warnings_are_shown(panel: Any, install: Any) -> None:
    toy = install(intensity=HU)
    p = panel()
    volume()
    p.choose(toy)
    p.run()
    assert p.ui.warningFrame.visible and "do not look like HU" in p.ui.warningLabel.text and p.ui.warningIcon.pixmap.width() > 0


def test_a_volume_that_gets_its_voxels_after_it_was_chosen(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy = install()
    p = panel()
    p.choose(toy)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Filled later")  # as a module does that computes it
    p.settings.volume = node
    gui.process_events()
    assert not p.ui.applyButton.enabled and "has no voxels" in p.ui.applyButton.toolTip
    slicer.util.updateVolumeFromArray(node, np.ones((4, 20, 20), np.int16))
    p.settings.region = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    gui.process_events()
    p.settings.region = None
    p.run()
    p.settings.earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    gui.process_events()
    # A scene that is closed from another module leaves no patient's voxels in the panel.
    nodes = node, p.settings.output, p.settings.earlier, *slicer.util.getNodesByClass("vtkMRMLMarkupsROINode")
    known = [weakref.ref(n) for n in nodes]
    del nodes
    gui.leave(p.widget)
    del node
    gui.close_scene()
    gc.collect()
    assert [ref() for ref in known] == [None] * 4


def test_progress_tells_how_long_it_takes(panel: Any, install: Any, gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = panel()
    volume(np.zeros((8, 20, 20), np.int16))
    p.choose(install())
    p.widget.modelList.read()
    p.choose("toy-1.0.0")
    p.apply()
    gui.process_events()
    assert p.ui.progressBar.visible and p.ui.progressLabel.visible and p.ui.applyButton.text == "Cancel"
    c = p.controller
    with monkeypatch.context() as m:
        m.setattr("UNetSegmentationPanel.run.time", types.SimpleNamespace(monotonic=lambda: 1000.0))
        c._pace = 990.0, 0.0
        c.fraction = 0.25
        assert c.secondsLeft == pytest.approx(30)
        p.widget._updateRun()
        assert "about 30 s left" in p.ui.progressLabel.text and p.ui.progressBar.value == 25
        c._pace = 900.0, 0.0
        p.widget._updateRun()
        assert "about 5 min left" in p.ui.progressLabel.text
    p.finish()
    assert not p.ui.progressBar.visible and p.ui.applyButton.text == "Apply"


def test_a_file_is_offered_under_a_name_that_every_system_takes_where_the_last_one_was_saved(
    panel: Any, install: Any, tmp_path: Path
) -> None:
    import slicer

    toy, starts = install(), []
    p = panel()
    p.settings.volume = volume(name="3: CHEST 1.25/0.8")
    p.choose(toy)
    p.run()
    former = slicer.mrmlScene.GetRootDirectory()
    slicer.mrmlScene.SetRootDirectory(str(tmp_path))
    try:
        for chosen in ("", tmp_path / "mine" / "m.csv", ""):
            p.gui.dialogs.answer(lambda start, chosen=chosen: starts.append(Path(start)) or chosen)
            (tmp_path / "mine").mkdir(exist_ok=True)
            p.ui.exportButton.click()
    finally:
        slicer.mrmlScene.SetRootDirectory(former)
    assert [s.parent for s in starts] == [tmp_path, tmp_path, tmp_path / "mine"]
    assert all(s.name.startswith("3_ CHEST 1.25_0.8") and s.name.endswith(".csv") for s in starts)


def test_the_event_loop_is_never_held_for_long(panel: Any, install: Any, gui: Any) -> None:
    import qt

    toy = install(labels=TWO, patch=[32, 32, 32])
    p = panel()
    rng = np.random.default_rng(0)
    volume((rng.random((120, 256, 256)) < 0.02).astype(np.int16))
    p.choose(toy)
    p.ui.uncertaintyCheckBox.click()
    p.pick(p.ui.ttaCombo, "none")
    beats = [time.process_time()]
    timer = qt.QTimer()
    timer.setInterval(5)
    timer.connect("timeout()", lambda: beats.append(time.process_time()))
    timer.start()
    p.apply()
    while p.controller.running:
        qt.QApplication.processEvents(qt.QEventLoop.WaitForMoreEvents)  # and leaves the processor to the worker meanwhile
    timer.stop()
    p.finish()
    gaps = np.diff(beats) * 1000
    print(f"event loop: {len(gaps)} beats, 99th percentile {np.percentile(gaps, 99):.0f} ms, longest {gaps.max():.0f} ms")
    # Of what this process computes, with room for a slow processor; what the machine gives to others does not count.
    assert len(gaps) > 50 and np.percentile(gaps, 99) < 50 and gaps.max() < 500


# ------------------------------------------------------------------------------------------- what a person does meanwhile


@pytest.fixture
def endless(install: Any, models_folder: Path) -> str:
    """A model that never comes to an end."""
    models_folder.mkdir(exist_ok=True)
    return slow_package(models_folder).path.name.removesuffix(SUFFIX)


@pytest.fixture
def going(panel: Any, endless: str, gui: Any) -> Panel:
    """A panel whose run is in the middle of the network."""
    p = panel()
    volume()
    p.choose(endless)
    p.apply()
    gui.wait(lambda: p.controller.text == "Segmenting" or p.controller.text == "Loading the model", RUN_S)
    time.sleep(0.2)
    return p


def usable_again(p: Panel, model: str = "toy-1.0.0") -> None:
    """The next Apply works."""
    p.choose(model)
    p.run()


def test_cancel_leaves_no_trace_and_the_panel_usable(going: Panel, install: Any) -> None:
    install()
    going.widget.modelList.read()
    state = scene_state()
    pid = going.controller._worker().pid
    going.ui.applyButton.click()
    assert alive(pid)  # nobody has waited for the worker's end
    assert not going.controller.running and going.ui.applyButton.text == "Apply" and going.ui.applyButton.enabled
    assert "Cancelled" in going.ui.messageLabel.text and going.ui.tryAgainButton.visible
    assert scene_state() == state
    usable_again(going)
    assert not going.gui.dialogs.shown


def test_apply_twice_is_apply_and_cancel_and_ctrl_return_is_only_apply(going: Panel) -> None:
    going.widget.onApply()
    assert going.controller.running
    going.widget.onApplyOrCancel()
    assert going.controller.phase == "cancelled"


def test_shortcuts(panel: Any, install: Any, endless: str, gui: Any) -> None:
    import qt
    from PySide6.QtTest import QTest

    p = panel()
    volume()
    p.choose(endless)
    p.widget.parent.activateWindow()
    p.ui.modelList.setFocus()
    gui.process_events()
    QTest.keyClick(p.ui.modelList, qt.Qt.Key_Return, qt.Qt.ControlModifier)
    assert p.controller.running
    QTest.keyClick(p.ui.modelList, qt.Qt.Key_Escape)
    assert p.controller.phase == "cancelled"
    assert {s.key.toString() for s in p.widget._shortcuts} == {"Ctrl+Return", "Ctrl+Enter", "Esc"}  # Ctrl+Z is Slicer's


def test_what_is_being_typed_stays_and_is_what_a_shortcut_runs_with(panel: Any, install: Any, gui: Any) -> None:
    import qt
    import slicer
    from PySide6.QtTest import QTest

    toy = install(intensity=HU)
    p = panel()
    node, other = volume(), volume(name="other")
    p.settings.volume = node
    p.choose(toy)
    p.settings.preset, p.settings.level, p.settings.width = "custom", 3, 4.5  # which the box, of whole numbers, cannot show
    p.widget.parent.activateWindow()
    box = p.ui.widthSpinBox
    box.setFocus()
    box.selectAll()
    QTest.keyClicks(box, "2")  # from 2 to 4 HU nothing of the scan is bright
    slicer.mrmlScene.RemoveNode(other)
    gui.process_events()
    assert box.cleanText == "2" and p.settings.width == 4.5
    QTest.keyClick(box, qt.Qt.Key_Return, qt.Qt.ControlModifier)
    p.finish()
    assert (p.settings.preset, p.settings.level, p.settings.width) == ("custom", 3, 2)
    assert not masks(p.settings.output, node)


def test_the_volume_is_removed_meanwhile(going: Panel, gui: Any) -> None:
    import slicer

    slicer.mrmlScene.RemoveNode(going.settings.volume)
    gui.process_events()
    assert going.controller.phase == "failed" and "'CT' was removed" in going.ui.messageLabel.text
    assert count("vtkMRMLSegmentationNode") == 0 and not going.ui.applyButton.enabled and not going.ui.tryAgainButton.visible


def test_the_segmentation_is_removed_meanwhile(panel: Any, endless: str, install: Any, gui: Any) -> None:
    import slicer

    toy = install()
    p = panel()
    volume()
    p.choose(toy)
    p.run()
    p.choose(endless)
    p.apply()
    for _ in range(5):
        gui.process_events()
    slicer.mrmlScene.RemoveNode(p.settings.output)
    gui.process_events()
    assert p.controller.phase == "failed" and "was removed" in p.ui.messageLabel.text and p.settings.output is None
    usable_again(p)


@pytest.mark.parametrize("how", ["surfaces", "non-linear"])
def test_an_output_that_takes_no_result_is_refused_before_all_is_computed(panel: Any, endless: str, how: str) -> None:
    import slicer
    from UNetSegmentationLib import UserError

    from UNetSegmentation import UNetSegmentationLogic

    p = panel()
    node = volume()
    output = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "contours")
    output.GetSegmentation().AddEmptySegment("", "lesion")
    if how == "surfaces":
        output.GetSegmentation().SetSourceRepresentationName("Closed surface")
    else:
        output.SetAndObserveTransformNodeID(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLGridTransformNode").GetID())
    p.choose(endless)
    p.ui.outputSelector.setCurrentNode(output)
    p.apply()
    p.finish("failed")
    said: list[str] = []
    with pytest.raises(UserError) as e:
        UNetSegmentationLogic().process(node, endless, output, worker=True, cancelled=lambda: said.append("computed") or True)
    assert "contours" in str(e.value) and p.controller.text == str(e.value) and not said


def test_the_volume_changes_meanwhile(panel: Any, install: Any, gui: Any) -> None:
    toy = install()
    p = panel()
    node = volume(np.zeros((40, 60, 60), np.int16))
    p.choose(toy)
    p.apply()
    gui.wait(lambda: p.controller._worker().state == "busy", RUN_S)
    node.GetImageData().GetPointData().GetScalars().Modified()
    p.finish("failed")
    assert "was changed during the run" in p.ui.messageLabel.text and count("vtkMRMLSegmentationNode") == 0
    p.ui.tryAgainButton.click()
    p.finish()


def test_the_scene_is_closed_meanwhile(going: Panel, install: Any, gui: Any) -> None:
    gui.close_scene()
    assert going.controller.phase == "cancelled" and "scene was closed" in going.ui.messageLabel.text
    assert going.settings is not None and going.settings.volume is None and count("vtkMRMLSegmentationNode") == 0
    install()
    going.widget.modelList.read()
    volume()
    usable_again(going)


def test_the_module_is_reloaded_meanwhile(going: Panel, install: Any, gui: Any) -> None:
    install()
    old, state = going.widget, scene_state()
    new = Panel(gui, gui.reload())
    assert new.widget is not old and new.controller is going.controller and not new.controller.running
    assert scene_state() == state
    assert new.settings.models == old_models(new)
    gui.close_scene()
    assert new.settings is not None and new.ui.applyButton.toolTip == "Choose a volume."
    volume()
    usable_again(new)


def old_models(p: Panel) -> list[str]:
    return [m.name for m in p.widget.modelList.selected]


def test_the_worker_is_killed_meanwhile(going: Panel, install: Any, gui: Any) -> None:
    install()
    going.widget.modelList.read()
    state, pid = scene_state(), going.controller._worker().pid
    os.kill(pid, signal.SIGKILL)
    going.finish("failed")
    assert "worker" in going.ui.messageLabel.text and going.ui.messageLabel.text.endswith(".")
    assert going.ui.tryAgainButton.visible and scene_state() == state and not gui.dialogs.shown
    going.choose("toy-1.0.0")
    going.ui.tryAgainButton.click()
    going.finish()


def test_a_run_goes_on_while_another_module_is_open(panel: Any, install: Any, gui: Any) -> None:
    toy = install()
    p = panel()
    node = volume()
    p.choose(toy)
    p.apply()
    gui.leave(p.widget)
    assert p.settings is None
    gui.wait(lambda: not p.controller.running, RUN_S)
    assert p.controller.phase == "done" and count("vtkMRMLSegmentationNode") == 1
    gui.open()
    assert p.ui.resultSection.visible and np.array_equal(masks(p.settings.output, node)["thing"], array_of(node) > 0)


def test_two_panels_show_the_same_run(panel: Any, install: Any, endless: str, gui: Any) -> None:
    install()
    one = panel()
    volume()
    two = Panel(gui, gui.open_another())
    two.widget.enter()
    one.choose(endless)
    assert old_models(two) == [endless]
    one.apply()
    gui.process_events()
    assert two.ui.applyButton.text == "Cancel" and two.ui.progressBar.visible
    two.ui.applyButton.click()
    assert not one.controller.running and one.ui.applyButton.text == "Apply" and "Cancelled" in one.ui.messageLabel.text
    usable_again(two)
    assert one.ui.resultSection.visible and one.ui.summaryLabel.text == two.ui.summaryLabel.text
    two.widget.cleanup()
    usable_again(one)


def test_no_process_is_left_when_slicer_ends(going: Panel, gui: Any) -> None:
    import slicer

    pid = going.controller._worker().pid
    gui.close(going.widget)
    assert not going.controller.running
    slicer.app.aboutToQuit.emit()
    gui.wait(lambda: not alive(pid))


def test_what_nobody_expected_is_one_sentence_with_the_log(panel: Any, install: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from UNetSegmentationLib import mrml

    toy = install()
    p = panel()
    volume()
    p.choose(toy)
    state = scene_state()

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no idea")

    monkeypatch.setattr(mrml, "write_measures", broken)
    p.apply()
    p.finish("failed")
    assert "RuntimeError: no idea" in p.ui.messageLabel.text and "log" in p.ui.messageLabel.text and "Traceback" in caplog.text
    assert scene_state() == state and not p.controller.canUndo
    monkeypatch.undo()


def test_declining_the_installation_is_no_error(panel: Any, install: Any, monkeypatch: pytest.MonkeyPatch, gui: Any) -> None:
    import UNetSegmentationPanel.installer as installer

    toy = install()
    p = panel()
    volume()
    p.choose(toy)
    monkeypatch.setattr(installer, "ensureRequirements", lambda *a, **k: False)
    p.apply()
    p.finish("cancelled")
    assert "Nothing was installed" in p.ui.messageLabel.text and p.ui.tryAgainButton.visible

    def closes(*a: Any, **k: Any) -> bool:
        gui.close_scene()  # while its dialog is open
        return True

    monkeypatch.setattr(installer, "ensureRequirements", closes)
    p.apply()
    p.finish("cancelled")
    assert "scene was closed" in p.ui.messageLabel.text


# ------------------------------------------------------------------------------------------------------------- sequences


def sequence(frames: int = 3) -> Any:
    """A volume that a sequence browser steps through; frame i has i + 1 bright slices."""
    import slicer

    scene = slicer.mrmlScene
    browser = scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
    data = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "scans")
    for i in range(frames):
        array = np.zeros((8, 20, 20), np.int16)
        array[: i + 1, 5:10, 5:10] = 1
        frame = volume(array, "frame")
        data.SetDataNodeAtValue(frame, str(i))
        scene.RemoveNode(frame)
    browser.SetAndObserveMasterSequenceNodeID(data.GetID())
    slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)
    return browser, browser.GetProxyNode(data)


def test_all_frames_of_a_sequence(panel: Any, install: Any, gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicer

    toy = install(intensity=HU)
    p = panel()
    browser, node = sequence()
    slicer.util.arrayFromVolume(browser.GetMasterSequenceNode().GetNthDataNode(0))[-1] = -1000  # air: that frame alone looks like HU
    p.settings.volume = node
    p.choose(toy)
    assert p.ui.allFramesCheckBox.visible
    p.ui.uncertaintyCheckBox.click()
    p.ui.allFramesCheckBox.click()
    assert not p.ui.uncertaintyCheckBox.enabled  # there is no map of all frames
    browser.SetSelectedItemNumber(1)
    p.ui.inputSection.collapsed = True  # the box cannot be seen any more, and is checked nevertheless
    p.run()
    assert browser.GetSelectedItemNumber() == 1
    assert p.ui.warningFrame.visible and "do not look like HU" in p.ui.warningLabel.text
    for i in range(3):
        browser.SetSelectedItemNumber(i)
        slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)
        assert masks(p.settings.output, node)["thing"].sum() == 25 * (i + 1)
    table = p.settings.resultTable.GetTable()
    assert [table.GetValue(r, 0).ToString() for r in range(3)] == [f"thing, frame {i}" for i in (1, 2, 3)]
    said: list[str] = []
    monkeypatch.setattr(slicer.util, "showStatusMessage", lambda text, *of: said.append(text))
    p.ui.copyButton.click()
    gui.dialogs.answer("")
    p.ui.exportButton.click()
    assert len(said) == 2 and all("as Apply left them" in text for text in said)
    p.ui.undoButton.click()
    gui.process_events()
    assert count("vtkMRMLSegmentationNode") == 0 and count("vtkMRMLSequenceNode") == 1


def test_all_frames_need_one_browser_for_all_channels(panel: Any, install: Any) -> None:
    import slicer

    toy = install(channels=["T1", "FLAIR"])
    p = panel()
    (browser, first), (own, second) = sequence(), sequence()
    second.SetName("cine FLAIR")
    p.settings.volume, p.settings.channels, p.settings.allFrames = first, [second], True
    p.choose(toy)
    p.apply()
    p.finish("failed")
    assert "'cine FLAIR' is of another sequence browser" in p.controller.text and not count("vtkMRMLSegmentationNode")
    frames = own.GetSequenceNode(second)
    slicer.mrmlScene.RemoveNode(own)
    browser.AddSynchronizedSequenceNode(frames)
    browser.AddProxyNode(second, frames, False)
    p.run()
    for i in range(3):
        browser.SetSelectedItemNumber(i)
        assert masks(p.settings.output, first)["thing"].sum() == 25 * (i + 1)  # the toy looks at the last channel
    p.settings.output, p.settings.channels = None, [volume(array_of(second) * 0 + 1, "single")]
    p.run()  # one scan for all frames


@pytest.mark.parametrize("browsed", [False, True])
def test_the_box_of_all_frames_is_one_but_where_the_browser_moves_it(panel: Any, install: Any, browsed: bool) -> None:
    import slicer

    toy = install()
    p = panel()
    browser, node = sequence()
    p.settings.volume, p.settings.allFrames, p.settings.region = node, True, box((7, 7, 0), (6, 6, 4))
    p.choose(toy)
    if browsed:
        boxes = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "boxes")
        for i in range(3):
            p.settings.region.SetSizeWorld((6, 6, 1 + 2 * i))
            boxes.SetDataNodeAtValue(p.settings.region, str(i))
        browser.AddSynchronizedSequenceNode(boxes)
        browser.AddProxyNode(p.settings.region, boxes, False)
    else:
        p.controller.addListener(lambda: p.settings.region.SetSizeWorld((3, 3, 3)) if p.controller.fraction > 0.34 else None)
    p.apply()
    p.finish("done" if browsed else "failed")
    if not browsed:
        assert "'Box' was changed during the run" in p.controller.text and not count("vtkMRMLSegmentationNode")
        return
    for i in range(3):
        browser.SetSelectedItemNumber(i)
        assert masks(p.settings.output, node)["thing"].sum() == 25 * (i + 1)


def test_measures_of_all_frames_are_of_what_the_masking_left_and_undo_keeps_tables_and_drawings(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy = install()
    p = panel()
    browser, node = sequence()
    p.settings.volume = node
    p.choose(toy)
    p.ui.allFramesCheckBox.click()

    def show(i: int) -> None:
        browser.SetSelectedItemNumber(i)
        slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)

    def draw(name: str, rows: slice) -> None:
        mask = np.zeros((8, 20, 20), np.uint8)
        mask[:, rows, 5:10] = 1
        held = p.settings.output.GetSegmentation()
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask, p.settings.output, held.AddEmptySegment("", name), node)

    def voxels(table: Any) -> list[int]:
        return [table.GetTable().GetColumnByName("Voxels").GetValue(r) for r in range(table.GetTable().GetNumberOfRows())]

    p.run()
    first, table = p.settings.output, p.settings.resultTable
    for i in range(3):
        show(i)
        draw("mine", slice(5, 7))
    p.settings.output = None
    p.run()  # another's: the outcome now is not of the first one
    p.settings.output = first
    editor = slicer.mrmlScene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode")  # of an earlier test
    if editor is None:
        editor = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        editor.SetSingletonTag("SegmentEditor")
    editor.SetAndObserveSegmentationNode(first)
    editor.SetOverwriteMode(editor.OverwriteAllSegments)
    p.run()
    assert p.settings.output is first and voxels(table) == [15, 30, 45]
    show(0)
    draw("since", slice(12, 14))
    p.ui.undoButton.click()
    gui.process_events()
    assert voxels(table) == [25, 50, 75]
    show(0)
    assert {n: int(m.sum()) for n, m in masks(first, node).items()} == {"thing": 25, "mine": 80, "since": 80}


# ---------------------------------------------------------------------------------------------------------------- scenes


def test_a_saved_scene_brings_the_settings_and_the_result_back(panel: Any, install: Any, gui: Any, tmp_path: Path) -> None:
    toy = install(intensity={**HU, "level": 0})
    p = panel()
    volume()
    p.choose(toy)
    p.settings.region = box()
    p.ui.uncertaintyCheckBox.click()
    p.pick(p.ui.ttaCombo, "flips")
    p.pick(p.ui.deviceCombo, "cpu")
    p.pick(p.ui.engineCombo, "onnx")
    p.ui.levelSpinBox.setValue(0.0)
    p.ui.widthSpinBox.setValue(3.0)
    p.run()
    summary, places = p.ui.summaryLabel.text, p.ui.placeLabel.text
    path = tmp_path / "scene.mrb"
    gui.save_scene(path)
    gui.close_scene()
    assert p.settings.models == [] and not p.ui.resultSection.visible and p.settings.preset == ""
    gui.load_scene(path)
    assert p.settings.volume.GetName() == "CT" and p.settings.region.GetName() == "Box"
    assert old_models(p) == [toy] and p.ui.uncertaintyCheckBox.checked and p.ui.applyButton.enabled, p.ui.applyButton.toolTip
    values = [p.offered(c)[c.currentIndex] for c in (p.ui.ttaCombo, p.ui.deviceCombo, p.ui.engineCombo, p.ui.presetCombo)]
    assert values == ["flips", "cpu", "onnx", "custom"] and (p.ui.levelSpinBox.value, p.ui.widthSpinBox.value) == (0, 3)
    assert p.ui.resultSection.visible and p.ui.summaryLabel.text == summary and p.ui.placeLabel.text == places
    assert p.ui.measuresTable.mrmlTableNode() is p.settings.resultTable and p.settings.resultUncertainty is not None
    assert not p.controller.canUndo
    p.run()


def test_a_scene_of_another_computer(panel: Any, install: Any, gui: Any) -> None:
    install(name="other", version="2.0.0")
    p = panel()
    volume()
    p.settings.models = ["gone-1.0.0"]
    p.settings.engine = "no such engine"
    p.settings.record = "{nonsense"
    gui.process_events()
    assert "gone-1.0.0 is not installed here" in p.ui.modelMessage.text and not p.ui.applyButton.enabled
    assert p.settings.engine == "auto"
    p.settings.models = ["other-1.0.0"]  # another version of it is here
    gui.process_events()
    assert old_models(p) == ["other-2.0.0"] and p.ui.applyButton.enabled


def test_the_volume_that_the_views_show_is_chosen_first(panel: Any, gui: Any) -> None:
    import slicer
    from UNetSegmentationPanel import inputs

    earlier, today = volume(name="Earlier"), volume(name="Today")
    assert inputs.likelyVolume() is earlier
    slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode().SetBackgroundVolumeID(today.GetID())
    assert panel().settings.volume is today


def test_the_days_to_an_earlier_study_go_with_it(panel: Any, gui: Any) -> None:
    import slicer

    p = panel()
    for away in (False, True):
        first, second = volume(name="CT"), volume(name="MR")
        p.settings.volume = first
        p.settings.earlier = before = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "2024")
        p.settings.days = 90
        p.settings.volume = second
        assert p.settings.earlier is None and p.settings.days == 0
        if away:
            gui.leave(p.widget)
        slicer.mrmlScene.RemoveNode(before)
        if away:
            gui.open()
        p.settings.volume = first
        assert p.settings.earlier is None and p.settings.days == 0


def test_another_volume_gets_another_segmentation(panel: Any, install: Any, gui: Any) -> None:
    toy = install()
    p = panel()
    volume()
    p.choose(toy)
    p.run()
    p.ui.volumeSelector.setCurrentNode(volume(name="MR"))
    gui.process_events()
    assert p.settings.output is None
    p.run()
    assert p.settings.output.GetName() == "MR segmentation" and count("vtkMRMLSegmentationNode") == 2


def test_a_result_is_the_next_output_only_of_its_own_volume(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    toy = install()
    p = panel()
    volume()
    p.choose(toy)
    p.apply()
    p.ui.volumeSelector.setCurrentNode(mr := volume(name="MR"))
    p.finish()
    assert p.settings.resultSegmentation.GetName() == "CT segmentation" and p.settings.output is None
    assert p.ui.summaryLabel.text.startswith("Of 'CT', which is not the volume chosen above.\n")
    mine = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    p.ui.outputSelector.setCurrentNode(mine)
    p.run()
    p.ui.undoButton.click()
    gui.process_events()
    assert p.settings.volume is mr and p.settings.output is mine and p.settings.resultSegmentation.GetName() == "CT segmentation"


@pytest.mark.parametrize("away", [False, True])
def test_the_segmentation_of_a_removed_volume_is_not_the_next_ones_output(panel: Any, install: Any, gui: Any, away: bool) -> None:
    import slicer

    toy = install()
    p = panel()
    ct, mr = volume(), volume(name="MR")
    p.choose(toy)
    p.run()
    if away:
        gui.leave(p.widget)
    slicer.mrmlScene.RemoveNode(ct)
    gui.process_events()
    if away:
        gui.open()
    p.ui.volumeSelector.setCurrentNode(mr)
    gui.process_events()
    assert p.settings.volume is mr and p.settings.output is None


def test_a_failure_is_not_told_of_the_next_scan(panel: Any, install: Any, gui: Any) -> None:
    toy = install()
    p = panel()
    for leave in (lambda: p.ui.volumeSelector.setCurrentNode(volume(name="next")), gui.close_scene):
        p.settings.volume = volume(name="DOE^JOHN")
        p.choose(toy)
        p.settings.region = box(center=(500, 0, 0))
        p.apply()
        p.finish("failed")
        assert "DOE^JOHN" in p.ui.messageLabel.text
        leave()
        gui.process_events()
        assert not p.ui.messageFrame.visible and not p.controller.text


# ------------------------------------------------------------------------------------------------------------------ logic


def test_logic_needs_no_panel(gui: Any, install: Any, make_package: Any) -> None:
    gui.load()
    from UNetSegmentationLib import UserError

    from UNetSegmentation import UNetSegmentationLogic

    install()
    logic, node, said = UNetSegmentationLogic(), volume(), []
    out = logic.process(node, "toy", progress=lambda fraction, text: said.append(fraction))
    assert np.array_equal(masks(out, node)["thing"], array_of(node) > 0) and said[-1] == 1.0
    inside = logic.process(node, "toy", roiNode=box(size=(4, 4, 4)), worker=True, uncertainty=True)
    assert 0 < masks(inside, node)["thing"].sum() <= 125
    two = make_package(channels=["a", "b"], name="two").path
    for model in (two, str(two), [two]):
        assert masks(logic.process([node, node], model), node)["thing"].any()
    assert logic.process(node, "toy", out) is out
    flat = box(size=(0, 0, 0))
    state = scene_state()
    with pytest.raises(UserError, match="no model 'nothing'"):
        logic.process(node, "nothing")
    with pytest.raises(UserError, match="Draw the box 'Box"):
        logic.process(node, "toy", roiNode=flat)
    assert scene_state() == state


def test_the_logic_writes_into_no_scan_that_was_changed_or_removed_meanwhile(gui: Any, install: Any) -> None:
    import slicer

    gui.load()
    from UNetSegmentationLib import UserError

    from UNetSegmentation import UNetSegmentationLogic

    install()
    logic, (browser, node), alone = UNetSegmentationLogic(), sequence(), volume()
    for scan, change in (
        (node, lambda *_: browser.SetSelectedItemNumber(2)),
        (alone, lambda *_: alone.GetScene() and slicer.mrmlScene.RemoveNode(alone)),
        (node, lambda *_: slicer.mrmlScene.Clear(0)),
    ):
        with pytest.raises(UserError, match=f"'{scan.GetName()}' was changed or removed during the run"):
            logic.process(scan, "toy", progress=change)
        assert not count("vtkMRMLSegmentationNode")


def test_the_logic_computes_where_the_panels_worker_does(gui: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gui.load()
    from UNetSegmentationLib import engines
    from UNetSegmentationLib.worker.client import WorkerClient
    from UNetSegmentationPanel import installer

    from UNetSegmentation import UNetSegmentationLogic

    install()
    logic, node, own, started, make = UNetSegmentationLogic(), volume(), (sys.executable, dict(os.environ)), [], WorkerClient.__init__
    monkeypatch.setattr(installer, "workerPython", lambda: own)  # PyTorch's own folder is there
    monkeypatch.setattr(WorkerClient, "__init__", lambda self, *given: (started.append(given), make(self, *given))[1])
    logic.process(node, "toy")
    logic.process(node, "toy", worker=True)
    assert started == [own]
    logic.process(node, "toy", device="gpu")  # which that folder's PyTorch may have, and Slicer's Python not
    assert started == [own] * 2
    monkeypatch.setattr(engines, "installed", lambda engine: False)  # and Slicer's Python has no engine
    out = logic.process(node, "toy")
    assert started == [own] * 3 and masks(out, node)["thing"].any()


def test_a_map_that_cannot_be_written_leaves_the_scene_to_the_logic_as_it_was(
    gui: Any, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gui.load()
    from UNetSegmentationLib import mrml

    from UNetSegmentation import UNetSegmentationLogic

    install()
    logic, node, allocated = UNetSegmentationLogic(), volume(), mrml._allocated

    def too_large(data: Any, kind: Any) -> Any:
        if kind is np.float32:
            raise MemoryError
        return allocated(data, kind)

    out = logic.process(node, "toy")
    state, before = scene_state(), masks(out, node)["thing"]
    array_of(node)[4:6] = 0
    monkeypatch.setattr(mrml, "_allocated", too_large)
    for target in (None, out):
        with pytest.raises(MemoryError):
            logic.process(node, "toy", target, uncertainty=True)
        assert scene_state() == state and np.array_equal(masks(out, node)["thing"], before)


def test_only_a_point_that_was_placed_is_a_target(gui: Any) -> None:
    import slicer

    gui.load()
    from UNetSegmentationLib import UserError
    from UNetSegmentationPanel.inputs import regionOptions

    points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Target")
    for i, status in enumerate((points.PositionPreview, points.PositionUndefined, points.PositionDefined, points.PositionPreview)):
        points.AddControlPointWorld(1.0 + i, 2.0, 3.0)
        points.SetNthControlPointPositionWorld(i, 1.0 + i, 2.0, 3.0, status)
        if i < 2:
            with pytest.raises(UserError, match="Click on the target"):
                regionOptions(points, None)
    assert regionOptions(points, None) == {"at": (-3.0, -2.0, 3.0)}


def test_who_connects_the_widgets_gets_the_tag_of_his_observer(panel: Any, gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p, tags = panel(), []
    kind = type(p.settings)
    connect = kind.connectParametersToGui

    def keeps(self: Any, widgets: Any) -> Any:
        tags.append(self.AddObserver("ModifiedEvent", lambda *_: None))
        return connect(self, widgets)

    monkeypatch.setattr(kind, "connectParametersToGui", keeps)
    gui.leave(p.widget)
    gui.open()
    assert tags[0] in p.widget._guiObservers


def test_what_happens_while_another_module_is_open_changes_no_setting(panel: Any, install: Any, gui: Any) -> None:
    import slicer

    install()
    p = panel()
    node, other = volume(name="one"), volume(name="two")
    p.settings.volume = node
    settings = p.settings
    for _ in range(3):
        gui.leave(p.widget)
        gui.open()
    assert p.settings is settings  # no wrapper is left behind for each time
    observers = len(p.widget._guiObservers)
    gui.leave(p.widget)
    p.ui.volumeSelector.setCurrentNode(other)
    assert settings.volume is node and observers == 1
    gui.open()
    assert p.ui.volumeSelector.currentNode() is node
    p.ui.volumeSelector.setCurrentNode(other)
    gui.process_events()
    assert settings.volume is other
    slicer.mrmlScene.RemoveNode(other)


def test_the_self_test_passes_here_too(gui: Any) -> None:
    from UNetSegmentationLib import sample

    if "UNETSEG_SAMPLE" not in os.environ and not all((sample.sample_folder() / name).is_file() for name, _ in sample.FILES.values()):
        pytest.skip("needs the sample scans: set UNETSEG_SAMPLE")
    shown = gui.open()
    from UNetSegmentation import UNetSegmentationTest

    UNetSegmentationTest().runTest()
    assert gui.dialogs.texts("delay")[-1] == "Test passed"
    assert not sys.modules["UNetSegmentation"].loadSample()[1].GetDisplayNode().GetVisibility()  # the reader's answer is not given away
    assert gui.reload() is not shown and shown._closed  # which it says of the panel that is seen


# --------------------------------------------------------------------------------------------------------------- the sample


def test_the_download_of_the_sample_is_told_while_it_lasts(panel: Callable[[], Panel], monkeypatch: pytest.MonkeyPatch) -> None:
    import qt
    from UNetSegmentationLib import UserError, sample

    gui, seen = panel().gui, []

    def fetch(progress: Callable[[float, str], object]) -> dict[str, Path]:
        qt.QTimer.singleShot(0, lambda: seen.append("painted"))
        progress(0.0, "Downloading the sample scans (34 MB) ...")
        assert seen == ["painted"]
        raise UserError("The index cannot be reached; try again.")

    monkeypatch.setattr(sample, "fetch_sample", fetch)
    assert sys.modules["UNetSegmentation"].loadSample() == []
    assert gui.dialogs.texts("error") == ["The index cannot be reached; try again."]
