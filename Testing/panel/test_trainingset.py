"""The section "Training set", clicked: what is corrected becomes a case, and whatever goes wrong is one sentence."""

from __future__ import annotations

import gc
import gzip
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from UNetSegmentationLib.dataset import INDEX, Dataset, FolderLock
from UNetSegmentationLib.image import Box, Image, read_image
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.output import write_segmentation
from workers import POSIX

EVIL = 'Ann, <img src="//host/share/x.png">'  # which Qt would read, on Windows with a login at that host
RUN_S = 60.0  # a worker on a machine that has other things to do
SHAPE, SPACING = (24, 40, 48), (0.8, 0.8, 1.25)  # (z, y, x) voxels, (x, y, z) mm
TISSUE = {"category": ["SCT", "49755003", "Morphologically Altered Structure"], "type": ["SCT", "27925004", "Nodule"]}
TOY = {
    "labels": [
        {"value": 1, "name": "lung nodule", "color": [230, 159, 0], "terminology": TISSUE},
        {"value": 2, "name": "vessel", "color": [1, 2, 3]},
    ]
}


@pytest.fixture
def hands(gui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., str]) -> Iterator[Any]:
    """The panel with the toy model installed, a scan of 0, 1 and 2 that it labels, and an empty folder chosen."""
    import slicer

    install(**TOY)
    gui.open()
    yield Hands(gui, slicer.modules.UNetSegmentationWidget, tmp_path / "Nodules")
    gui.close(slicer.modules.UNetSegmentationWidget)
    sys.modules["UNetSegmentationPanel"].shutdown()


def made_scan(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """0, but for a box of 1 and a bar of 2; the seed's own grain, which the network does not see."""
    array = np.random.default_rng(seed).uniform(-0.2, 0.2, shape).astype(np.float32)
    array[8:16, 10:20, 10:24] += 1
    array[4:6, 30:34, 5:40] += 2
    return array


class Hands:
    def __init__(self, gui: Any, widget: Any, folder: Path) -> None:
        self.gui, self.widget, self.section, self.ui = gui, widget, widget.trainingSet, widget.trainingSet.ui
        self.folder = folder
        gui.wait(lambda: widget._warm, RUN_S)
        self.section._late.setInterval(round(1000 * RUN_S))
        self.volume = self.scan()
        widget._parameters.models = ["toy-1.0.0"]
        folder.mkdir()
        self.section.root.collapsed = False
        self.choose(folder)

    def scan(self, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Any:
        import slicer

        node = slicer.util.addVolumeFromArray(made_scan(seed, shape), np.diag([*SPACING, 1.0]), f"Scan {seed}")
        self.widget._parameters.volume = node
        self.gui.process_events()
        return node

    def choose(self, folder: Path | str) -> None:
        self.gui.dialogs.answer(str(folder))
        self.gui.click(self.ui.setFolderButton)
        self.settle()

    def settle(self) -> None:
        self.gui.process_events()
        self.gui.wait(lambda: not self.section.busy and self.section._reading is None and not self.section._settle.active, RUN_S)
        self.gui.process_events()

    def apply(self) -> Any:
        """Let the model segment the scan; the segmentation."""
        self.widget.onApply()
        self.gui.wait(lambda: not self.widget.controller.running, RUN_S)
        assert self.widget.controller.phase == "done", self.widget.controller.text
        self.settle()
        return self.widget._parameters.output

    def correct(self, node: Any, name: str, change: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Change a segment as a person would in the Segment Editor; its new mask."""
        from mrml_scenes import draw, segments
        from UNetSegmentationLib.mrml import segment_mask

        mask = segment_mask(node, segments(node)[name], self.widget._parameters.volume)
        change(mask)
        draw(node, segments(node)[name], mask, self.widget._parameters.volume)
        self.settle()
        return mask

    def drawn(self, **masks: np.ndarray) -> Any:
        """A segmentation of the scan by hand."""
        import slicer
        from mrml_scenes import add_segment

        volume = self.widget._parameters.volume
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "By hand")
        node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        for name, mask in masks.items():
            add_segment(node, name, mask.astype(np.uint8), volume)
        self.ui.setSegmentationSelector.setCurrentNode(node)
        self.settle()
        return node

    def add(self, *answers: bool) -> str:
        """Press the button, answer what is asked; what is said then."""
        self.gui.dialogs.answer(*answers)
        self.gui.click(self.ui.setAddButton)
        self.settle()
        assert not self.gui.dialogs.answers
        return self.ui.setMessage.text

    @property
    def dataset(self) -> Dataset:
        return Dataset.open(self.folder)

    @property
    def only(self) -> Any:
        (entry,) = self.dataset.entries.values()
        return entry

    def state(self) -> Any:
        """All that lies in the folder."""
        return {p: p.read_bytes() for p in sorted(self.folder.rglob("*")) if p.is_file()}

    def whole(self) -> None:
        """No half case, no lock and no leftover of a writer that ended well."""
        found = self.dataset
        assert found.check() == [] and not list(self.folder.glob(".*"))


def box(*ends: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(*e) for e in ends)] = 1
    return mask


# --------------------------------------------------------------------------------------------------------------- adding


def test_a_correction_becomes_a_case_and_what_changed_is_said(hands: Hands) -> None:
    import slicer

    assert hands.ui.setStatusLabel.text.startswith("Empty") and hands.ui.setMessage.text == "Choose the corrected segmentation."
    assert not hands.ui.setAddButton.enabled
    node = hands.apply()
    assert hands.section.segmentation() is node and [(r.name, r.label) for r in hands.section.rows] == [
        ("lung nodule", "lung nodule"),
        ("vessel", "vessel"),
    ]

    def correct(mask: np.ndarray) -> None:
        mask[8] = 0  # 140 voxels away
        mask[16, 10:15, 10:20] = 1  # 50 new ones

    mask = hands.correct(node, "lung nodule", correct)
    said = hands.add()
    entry = hands.only
    assert said.splitlines() == [
        f"Added as {entry.name}.",
        "lung nodule: 50 voxels added (0.04 ml), 140 removed (0.112 ml); Dice with the model's 0.91.",
        "vessel: as the model had it.",
    ]
    image, label = read_image(entry.images[0]), read_image(entry.label).array
    assert np.array_equal(image.array, made_scan()) and image.spacing == pytest.approx(SPACING)
    assert np.array_equal(label == 1, mask > 0) and np.count_nonzero(label == 2) == 2 * 4 * 35
    assert np.count_nonzero(read_image(entry.model).array == 1) == 8 * 10 * 14  # as it was before the correction
    assert [(d.value, d.name, d.terminology) for d in hands.dataset.labels] == [(1, "lung nodule", TISSUE), (2, "vessel", {})]
    assert hands.dataset.channels == ("CT",) and hands.dataset.name == "Nodules" and entry.record["model_name"] == "toy-1.0.0"
    assert "by" not in entry.record and "date" not in entry.record
    assert hands.ui.setStatusLabel.text.splitlines() == [
        "1 case of 1 patient. Labels: lung nodule, vessel.",
        f"This scan is {entry.name}, version 1.",
    ]
    node.GetSegmentation().RemoveSegment(node.GetSegmentation().GetNthSegmentID(1))
    hands.settle()
    assert "vessel: 0 voxels added (0 ml), 280 removed" in hands.add()  # deleted as a whole
    assert np.count_nonzero(read_image(hands.only.model).array == 2) == 280
    hands.whole()
    assert not sys.modules["UNetSegmentationPanel"].dataWorker()._volumes  # no patient's voxels wait there
    clone = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    clone.Copy(hands.widget._parameters.volume)  # as Crop Volume does, and Data's Clone
    hands.widget._parameters.volume = clone
    hands.settle()
    assert "This scan" not in hands.ui.setStatusLabel.text


def test_a_segmentation_that_is_deleted_is_not_replaced_by_another_scans_and_is_kept_nowhere(hands: Hands) -> None:
    import slicer

    other = hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.scan(1)
    node = hands.drawn(thing=box((3, 6), (2, 6), (2, 6)))
    assert other is not node and hands.section.segmentation() is node
    known = weakref.ref(node)
    slicer.mrmlScene.RemoveNode(node)
    del node
    hands.settle()
    assert hands.section.segmentation() is None and hands.ui.setSegmentationSelector.currentNode() is None
    assert hands.ui.setMessage.text == "Choose the corrected segmentation."
    again = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    again.SetReferenceImageGeometryParameterFromVolumeNode(hands.widget._parameters.volume)
    hands.settle()
    assert hands.section.segmentation() is again
    gc.collect()
    assert known() is None  # nor are its voxels, of each scan of a work list


def test_the_same_scan_again_is_a_version_and_former_ones_come_back(hands: Hands) -> None:
    hands.ui.setNameEdit.text = "A. Reader"
    node = hands.apply()
    hands.add()
    hands.ui.setNamedCheckBox.checked = True
    hands.correct(node, "vessel", lambda mask: mask.fill(0))
    assert "Your name and today's date go with it" in hands.ui.setPrivacyLabel.text
    said = hands.add()
    name = hands.only.name
    assert said.splitlines()[0] == f"{name} was updated; this is its version 2." and "280 removed" in said
    assert hands.only.record["by"] == "A. Reader" and hands.only.record["date"]
    assert hands.only.images[0].parent != hands.only.label.parent  # the same image is not written twice

    hands.ui.setCasesSection.collapsed = False
    hands.ui.setCasesTable.selectRow(0)
    assert hands.ui.setVersionsButton.enabled and not hands.ui.setRestoreButton.enabled
    hands.gui.dialogs.answer("Version 1; lung nodule +0 -0; vessel +0 -0")
    hands.ui.setVersionsButton.click()
    hands.settle()
    assert hands.ui.setMessage.text == f"{name}: version 1 is the current one again."
    assert hands.only.version == 3 and np.count_nonzero(read_image(hands.only.label).array == 2) == 280
    hands.ui.setRemoveButton.click()
    hands.settle()
    assert not hands.dataset.entries and "Bring back" in hands.ui.setMessage.text and not hands.ui.setCasesTable.visible
    hands.gui.dialogs.answer(name)
    hands.ui.setRestoreButton.click()
    hands.settle()
    assert len(hands.dataset.versions(name)) == 3 and hands.ui.setCasesTable.rowCount == 1
    hands.whole()


def test_a_look_at_the_folder_does_not_cancel_what_changes_it(hands: Hands) -> None:
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    name = hands.only.name
    hands.ui.setCasesSection.collapsed = False
    hands.ui.setCasesTable.selectRow(0)
    with FolderLock(hands.folder):  # as of a colleague who writes just then
        hands.ui.setRemoveButton.click()
        hands.gui.process_events()
        hands.section.enter()  # the module was left and opened again
        hands.gui.process_events()
    hands.settle()
    assert not hands.dataset.entries and hands.ui.setMessage.text.startswith(f"{name} is no longer in the training set")


def test_who_and_when_are_remembered(hands: Hands) -> None:
    import qt

    hands.ui.setNamedCheckBox.checked = True
    hands.ui.setNameEdit.text = "A. Reader"
    hands.ui.setNameEdit.editingFinished.emit()
    assert qt.QSettings().value("UNetSegmentation/Annotator") == "A. Reader"
    again = hands.gui.open_another()
    assert again.trainingSet.ui.setNameEdit.text == "A. Reader" and again.trainingSet.ui.setNamedCheckBox.checked
    assert again.trainingSet.folder == str(hands.folder)
    again.cleanup()


def test_the_models_mask_is_found_after_the_scene_was_saved_and_opened(hands: Hands, tmp_path: Path) -> None:
    import slicer

    node = hands.apply()
    hands.correct(node, "lung nodule", lambda mask: mask[:10].fill(0))
    for each in (hands.volume, node):
        slicer.util.saveNode(each, str(tmp_path / f"{each.GetName()}{'.seg' if each is node else ''}.nrrd"))
    hands.gui.save_scene(tmp_path / "scene.mrml")
    hands.gui.load_scene(tmp_path / "scene.mrml")
    hands.settle()
    said = hands.add()
    assert "lung nodule: 0 voxels added (0 ml), 280 removed (0.224 ml)" in said, said
    shutil.rmtree(os.environ["UNETSEG_MASKS"])  # or another computer
    assert "The model's own mask is not known here" in hands.add()
    assert hands.only.version == 2 and hands.only.model is None


def test_clicked_nodules_have_the_models_label(hands: Hands, install: Callable[..., str]) -> None:
    toy = {**TOY, "name": "aclick", "task": "click", "spacing": [*SPACING], "patch": [16, 16, 16], "labels": TOY["labels"][:1]}
    install(**toy)
    hands.widget.enter()
    hands.widget._parameters.clickModel = "aclick-1.0.0"
    hands.gui.process_events()
    tool = hands.widget.nodules.tool
    tool.click((16 * 0.8, 14 * 0.8, 12 * 1.25))
    hands.gui.wait(lambda: not tool.busy, RUN_S)
    hands.settle()
    node = hands.widget._parameters.nodules
    assert [(r.name, r.label) for r in hands.section.rows] == [("lung nodule 1", "lung nodule")], tool.text
    removed = int(hands.correct(node, "lung nodule 1", lambda mask: mask[8:12].fill(0)).sum())
    said = hands.add()
    assert "removed" in said and "0 voxels added" in said, said
    assert hands.only.record["voxels_by_label"] == {"lung nodule": removed} and hands.only.record["model_name"] == "aclick-1.0.0"


def test_a_label_is_what_is_typed(hands: Hands) -> None:
    import qt
    from PySide6.QtTest import QTest

    hands.apply()
    hands.add()
    hands.scan(1)
    hands.drawn(scratch=box((8, 9), (1, 3), (1, 3)))
    combo = hands.ui.setSegmentsTable.cellWidget(0, 1)
    combo.lineEdit().setFocus()
    combo.lineEdit().selectAll()
    QTest.keyClicks(combo.lineEdit(), "lung")  # the set knows "lung nodule"
    assert combo.currentText == hands.section.rows[0].label == "lung"
    QTest.keyClick(combo.lineEdit(), qt.Qt.Key_Return)
    QTest.keyClicks(combo.lineEdit(), " cyst")
    assert combo.currentText == hands.section.rows[0].label == "lung cyst"
    assert [combo.itemText(i) for i in range(combo.count)] == ["lung nodule", "vessel"]


def test_segments_are_left_out_or_get_another_label(hands: Hands) -> None:
    masks = {"Segment_1": box((2, 6), (2, 6), (2, 6)), "Tumour 2": box((8, 12), (2, 6), (2, 6)), "scratch": box((1, 2), (1, 3), (1, 3))}
    hands.drawn(**masks)
    assert hands.ui.setMessage.text == "Say which label 'Segment_1' is, or leave it out."
    table = hands.ui.setSegmentsTable
    table.cellWidget(0, 1).setEditText("tumour")
    table.cellWidget(1, 1).setEditText("tumour")
    assert table.cellWidget(2, 1).currentText == "scratch" and table.cellWidget(2, 1).lineEdit().cursorPosition == 0
    import qt

    table.item(2, 0).setCheckState(qt.Qt.Unchecked)
    said = hands.add()
    assert "own mask is not known" in said
    assert [d.name for d in hands.dataset.labels] == ["tumour"] and hands.only.record["voxels_by_label"] == {"tumour": 128}
    # Where there is one label only, a new segment can be nothing else; a name with a number is matched to it.
    hands.scan(1)
    hands.drawn(**masks)
    assert [r.label for r in hands.section.rows] == ["tumour", "tumour", "scratch"]
    assert [table.cellWidget(i, 1).lineEdit().cursorPosition for i in range(3)] == [0, 0, 0]  # the label's beginning is in sight


def test_the_wheel_over_a_label_moves_the_panel_and_changes_no_label(hands: Hands) -> None:
    hands.apply()
    combo = hands.ui.setSegmentsTable.cellWidget(0, 1)
    assert combo.count == 2 and combo.currentText == "lung nodule"
    hands.gui.wheel(combo)
    assert combo.currentText == "lung nodule" and hands.section.rows[0].label == "lung nodule"


def test_a_renamed_segment_is_not_what_it_was_added_as(hands: Hands) -> None:
    from mrml_scenes import segments

    node = hands.drawn(Segment_1=box((2, 6), (2, 6), (2, 6)), scratch=box((8, 9), (1, 3), (1, 3)))
    hands.ui.setSegmentsTable.cellWidget(0, 1).setEditText("nodule")
    hands.ui.setSegmentsTable.cellWidget(1, 1).setEditText("scar")
    hands.add()
    hands.section._choices.clear()  # as in another session
    hands.section.update()
    assert [r.label for r in hands.section.rows] == ["nodule", "scar"]
    held = node.GetSegmentation()
    held.GetSegment(segments(node)["Segment_1"]).SetName("vessel")
    hands.settle()
    hands.ui.setSegmentsTable.cellWidget(1, 1).setEditText("nodule")
    assert [r.label for r in hands.section.rows] == ["vessel", "nodule"]
    held.GetSegment(segments(node)["scratch"]).SetName("scar")
    hands.settle()
    assert [r.label for r in hands.section.rows] == ["vessel", "scar"]


def test_a_segment_that_another_covers_does_not_vanish(hands: Hands) -> None:
    hands.drawn(nodule=box((4, 8), (4, 8), (4, 8)), lung=box((2, 20), (2, 30), (2, 30)))
    said = hands.add()
    assert said.startswith("'lung' covers most of 'nodule', which would be lost") and not (hands.folder / INDEX).exists(), said
    hands.drawn(lung=box((2, 20), (2, 30), (2, 30)), nodule=box((4, 8), (4, 8), (4, 8)))
    assert hands.add().startswith("Added as") and hands.only.record["voxels_by_label"]["nodule"] == 64


def test_a_segmentation_of_another_scan_is_not_cut_to_this_one(hands: Hands) -> None:
    wrong, fitting = hands.drawn(thing=box((2, 6), (2, 6), (30, 44))), hands.drawn(thing=box((2, 6), (2, 6), (20, 36)))
    volume = hands.scan(1, (*SHAPE[:2], 36))
    for moved in (0.0, 0.4):  # also on another lattice
        volume.SetOrigin(moved * SPACING[0], 0, 0)
        hands.ui.setSegmentationSelector.setCurrentNode(wrong)
        hands.settle()
        said = hands.add()
        assert said.startswith(f"'By hand' reaches {8 - moved:.1f} voxels beyond the volume; choose the segmentation of this"), said
        assert not (hands.folder / INDEX).exists()
    hands.ui.setSegmentationSelector.setCurrentNode(fitting)
    hands.settle()
    assert hands.add().startswith("Added as") and hands.only.record["voxels_by_label"] == {"thing": 4 * 4 * 16}


def test_a_scan_of_several_channels(hands: Hands, install: Callable[..., str]) -> None:
    install(name="two", channels=["T1", "T2"], **TOY)
    hands.widget.enter()
    settings = hands.widget._parameters
    settings.models = ["two-1.0.0"]
    first = hands.volume
    second = hands.scan(1)
    settings.volume = first
    hands.gui.process_events()
    settings.channels = [second]
    hands.apply()
    hands.add()
    assert hands.dataset.channels == ("T1", "T2") and np.array_equal(read_image(hands.only.images[1]).array, made_scan(1))
    settings.models = ["toy-1.0.0"]
    hands.settle()
    assert "the channels T1, T2" in hands.ui.setMessage.text and not hands.ui.setAddButton.enabled
    assert "channels T1, T2" in hands.section.problem()


def test_channels_go_in_by_name_whatever_their_order_in_the_model(
    hands: Hands, install: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {"two": ("T1", "T2"), "owt": ("t2", "T1"), "three": ("T1", "FLAIR", "T2"), "other": ("T1", "FLAIR"), "ab": ("A", "B")}
    for name, channels in packages.items():
        install(name=name, channels=list(channels), **TOY)
    hands.widget.enter()
    settings, section = hands.widget._parameters, hands.section

    def choose(model: str, *nodes: Any) -> tuple[Any, ...]:
        settings.models = [f"{model}-1.0.0"]
        settings.volume = nodes[0]
        hands.gui.process_events()
        settings.channels = list(nodes[1:])
        hands.settle()
        return section._volumes()

    t1, t2, flair = hands.volume, hands.scan(1), hands.scan(2)
    choose("two", t1, t2)
    hands.apply()
    hands.add()
    assert hands.dataset.channels == ("T1", "T2")
    t1, t2 = hands.scan(3), hands.scan(4)
    choose("owt", t2, t1)
    hands.ui.setPatientEdit.textEdited.emit("P7")
    hands.apply()
    said = hands.add()
    entry = hands.dataset.entries[said.splitlines()[0].removeprefix("Added as ").rstrip(".")]
    assert [np.array_equal(read_image(f).array, made_scan(seed)) for f, seed in zip(entry.images, (3, 4))] == [True, True]
    assert entry.patient == hands.dataset.patient("P7") and f"This scan is {entry.name}" in hands.ui.setStatusLabel.text
    assert choose("three", t1, flair, t2) == (t1, t2) and choose("ab", t1, t2) == (t1, t2)
    assert choose("other", t1, flair) == (t1, None)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    assert "the channels T1, T2" in section.problem()
    choose("two", t1, t1)
    assert section.problem() == "'Scan 3' is chosen for both 'T1' and 'T2'; choose the scan of each."
    # A work list's files are in the set's order, or their model's, whatever model is chosen; of as many others each is meant.
    for model, order in ("", (t2, t1)), ("owt-1.0.0", (t1, t2)), ("other-1.0.0", (t2, t1)), ("gone-1.0.0", (t2, t1)):
        choose("two", t2, t1)
        with monkeypatch.context() as patched:
            patched.setattr(hands.widget.workList, "case", SimpleNamespace(volumes=[t2, t1], model=model, segmentation=None))
            assert section._volumes() == order


# -------------------------------------------------------------------------------------------------------------- privacy


def test_of_the_patient_only_a_hash_is_written(hands: Hands) -> None:
    import slicer

    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    words = slicer.vtkMRMLSubjectHierarchyConstants
    patient = hierarchy.CreateSubjectItem(hierarchy.GetSceneItemID(), "Doe^Jane")
    hierarchy.SetItemUID(patient, words.GetDICOMUIDName(), "PID-4711")
    hierarchy.SetItemAttribute(patient, words.GetDICOMPatientIDAttributeName(), "PID-4711")
    hierarchy.SetItemAttribute(patient, words.GetDICOMPatientNameAttributeName(), "Doe^Jane")
    hierarchy.SetItemAttribute(patient, words.GetDICOMPatientBirthDateAttributeName(), "19700101")
    study = hierarchy.CreateStudyItem(patient, "Study 4712")
    for seed in (0, 1):
        volume = hands.volume if seed == 0 else hands.scan(seed)
        volume.SetName("Jane Doe CT")
        item = hierarchy.GetItemByDataNode(volume) or hierarchy.CreateItem(study, volume)
        hierarchy.SetItemParent(item, study)
        hierarchy.SetItemAttribute(item, words.GetDICOMSeriesModalityAttributeName(), "CT")
        hands.settle()
        hands.section.update()
        assert hands.ui.setPatientEdit.placeholderText == "from DICOM, kept as a hash"
        hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
        hands.add()
    entries = list(hands.dataset.entries.values())
    assert [e.patient for e in entries] == [hands.dataset.patient("PID-4711")] * 2 and entries[0].record["modality"] == "CT"
    content = b"".join(gzip.decompress(b) if p.suffix == ".gz" else b for p, b in hands.state().items())
    content += b"".join(str(p.relative_to(hands.folder)).encode() for p in hands.state())
    for secret in (b"4711", b"Doe", b"Jane", b"1970", b"4712"):
        assert secret not in content
    assert hands.ui.setStatusLabel.text.startswith("2 cases of 1 patient.")
    # Slicer takes the name for the ID where there is none.
    hierarchy.SetItemAttribute(patient, words.GetDICOMPatientIDAttributeName(), "")
    hierarchy.SetItemUID(patient, words.GetDICOMUIDName(), "Doe^Jane")
    from UNetSegmentationLib.mrml import dicom_of

    assert dicom_of(hands.volume) == ("", "CT")


def test_a_code_groups_scans_and_belongs_to_its_scan(hands: Hands) -> None:
    for seed in (0, 1):
        if seed:
            hands.scan(seed)
            assert hands.ui.setPatientEdit.text == ""
        hands.ui.setPatientEdit.text = "P7"
        hands.ui.setPatientEdit.textEdited.emit("P7")
        hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
        hands.add()
    assert {e.patient for e in hands.dataset.entries.values()} == {hands.dataset.patient("P7")}
    hands.widget._parameters.volume = hands.volume
    hands.settle()
    assert hands.ui.setPatientEdit.text == "P7"
    hands.section.addCurrent(patient="ANON")  # what a person says counts more than what the files of a study without names do
    hands.settle()
    assert {e.patient for e in hands.dataset.entries.values()} == {hands.dataset.patient("P7")}
    hands.section._patients.clear()
    for patient in (None, "ANON"):  # without the code: the case stays its patient's
        hands.section.addCurrent(patient=patient)
        hands.settle()
        assert {e.patient for e in hands.dataset.entries.values()} == {hands.dataset.patient("P7")}
    assert sorted(e.version for e in hands.dataset.entries.values()) == [1, 4] and not hands.gui.dialogs.texts("message")
    hands.ui.setPatientEdit.textEdited.emit("P8")
    hands.add()
    assert sorted(e.patient for e in hands.dataset.entries.values()) == sorted(map(hands.dataset.patient, ("P7", "P8")))


def test_what_was_typed_for_a_removed_scan_is_not_anothers_that_gets_its_id(hands: Hands, tmp_path: Path) -> None:
    import slicer

    hands.gui.close_scene()
    hands.scan(7)
    node = hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.gui.save_scene(tmp_path / "other.mrb")
    hands.gui.close_scene()
    scan = hands.scan(1)
    mine = hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    segment = mine.GetSegmentation().GetNthSegmentID(0)
    hands.section._choose(0, included=False)
    hands.ui.setPatientEdit.text = "P7"
    hands.ui.setPatientEdit.textEdited.emit("P7")
    ids = scan.GetID(), mine.GetID()
    assert (ids[1], segment) in hands.section._choices
    for each in (mine, scan):
        slicer.mrmlScene.RemoveNode(each)
    hands.settle()
    assert hands.ui.setPatientEdit.text == "" and hands.section._volume is None and not hands.section._choices
    slicer.util.loadScene(str(tmp_path / "other.mrb"), {"clear": False})
    hands.settle()
    volume = hands.widget._parameters.volume
    assert (volume.GetName(), volume.GetID(), node.GetID()) == ("Scan 7", *ids) and hands.ui.setPatientEdit.text == ""
    hands.add()
    assert hands.only.patient != hands.dataset.patient("P7")


def test_frames_of_a_sequence_without_a_patient_are_one_patients(hands: Hands) -> None:
    """Else some of them would be learnt from and others be held out."""
    import slicer

    scene, data = slicer.mrmlScene, []
    for seed in (10, 20):
        browser = scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
        frames = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "scans")
        for i in range(2):
            frame = slicer.util.addVolumeFromArray(made_scan(seed + i), np.diag([*SPACING, 1.0]), "frame")
            frames.SetDataNodeAtValue(frame, str(i))
            scene.RemoveNode(frame)
        browser.SetAndObserveMasterSequenceNodeID(frames.GetID())
        data.append((browser, browser.GetProxyNode(frames)))
    for browser, volume in data:
        hands.widget._parameters.volume = volume
        for i in range(2):
            browser.SetSelectedItemNumber(i)
            slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)
            hands.settle()
            hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
            said = hands.add()
            assert said.startswith("Added as"), said
    assert hands.ui.setStatusLabel.text.startswith("4 cases of 2 patients")


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_looks_wrong_is_asked_about_before_anything_is_written(hands: Hands) -> None:
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    before = hands.state()
    hands.scan(1)
    hands.drawn(thing=box((2, 3), (2, 3), (2, 4)))
    assert "only 2 voxels of thing, as an eraser leaves" in hands.add(False)
    assert hands.state() == before
    assert hands.gui.dialogs.texts("message")[-1].endswith("\n\nAdd it anyway?")
    assert hands.add(True).startswith("Added as")
    hands.scan(2)
    hands.drawn(thing=np.zeros(SHAPE, np.uint8))
    before = hands.state()
    assert "is empty; mark something" in hands.add(False) and hands.state() == before
    assert hands.add(True).startswith("Added as")
    hands.scan(3)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)), scar=box((8, 9), (2, 3), (2, 3)))
    before = hands.state()
    said = hands.add(True, False)  # the new label, but not its one voxel
    assert "1 voxel of scar" in said and hands.state() == before
    hands.add(True, True)
    assert [(d.value, d.name) for d in hands.dataset.labels] == [(1, "thing"), (2, "scar")] and len(hands.dataset.entries) == 4
    hands.whole()


def test_what_others_wrote_into_the_training_set_is_no_html(hands: Hands) -> None:
    from PySide6.QtGui import Qt

    hands.ui.setNamedCheckBox.checked = True
    hands.ui.setNameEdit.text = EVIL
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    hands.ui.setCasesSection.collapsed = False
    tip = hands.ui.setCasesTable.item(0, 0).toolTip()
    assert "Ann, " in tip and not (Qt.mightBeRichText(tip) and "<img" in tip)
    hands.scan(1)
    hands.drawn(**{EVIL: box((2, 3), (2, 3), (2, 4))})
    assert EVIL in hands.add(True, False) and EVIL in hands.gui.dialogs.texts("message")[-1]  # as it is, by the stand-in


def test_a_first_case_that_is_refused_leaves_no_training_set(hands: Hands) -> None:
    hands.drawn(thing=box((2, 3), (2, 3), (2, 4)))
    hands.add(False)
    assert not (hands.folder / INDEX).exists() and hands.ui.setStatusLabel.text.startswith("Empty")


def test_folders_that_cannot_be_used_are_a_sentence(hands: Hands, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / INDEX).write_text('{"name": "nnU-Net\'s"}')
    hands.choose(other)
    assert "is another program's" in hands.ui.setStatusLabel.text and not hands.ui.setAddButton.enabled
    (other / INDEX).write_text("{")
    hands.section.refresh()
    hands.settle()
    assert "is damaged" in hands.ui.setStatusLabel.text
    hands.choose(tmp_path / "gone")
    assert f"The folder {tmp_path / 'gone'} is not there" in hands.ui.setStatusLabel.text
    hands.gui.dialogs.answer("")
    hands.gui.click(hands.ui.setFolderButton)  # cancelled
    assert hands.section.folder == str(tmp_path / "gone")
    hands.choose(hands.folder)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.folder.rename(tmp_path / "away")  # the network goes between the look and the case
    assert "is not there; connect its drive or network folder" in hands.add()
    assert not hands.folder.exists() and not hands.ui.setAddButton.enabled
    (tmp_path / "away").rename(hands.folder)
    hands.section.addCurrent()  # as the work list does
    hands.settle()
    assert hands.add().startswith("Added as")


def test_nothing_is_added_before_the_labels_are_known(hands: Hands) -> None:
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    hands.scan(1)
    hands.drawn(thing_2=box((2, 6), (2, 6), (2, 6)))
    told: list[Any] = []
    hands.section.setFolder(str(hands.folder))
    hands.section.addCurrent(lambda *end: told.append(end))
    hands.settle()
    assert told == [(None, "The training set is being read; try again in a moment.")]
    assert hands.add().startswith("Added as") and [d.name for d in hands.dataset.labels] == ["thing"]


def test_what_another_person_adds_meanwhile_is_seen(hands: Hands) -> None:
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    rng = np.random.default_rng(5)
    hands.dataset.add(Image(rng.normal(size=SHAPE).astype(np.float32)), box((2, 6), (2, 6), (2, 6)))
    hands.scan(1)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    assert hands.ui.setStatusLabel.text.startswith("3 cases of 3 patients") and hands.ui.setCasesTable.rowCount == 3


# ---------------------------------------------------------------------------------------------------------- interrupted


def large(hands: Hands, shape: tuple[int, int, int] = (80, 160, 160)) -> Any:
    """A scan that takes half a second to write."""
    volume = hands.scan(9, shape)
    import slicer
    from mrml_scenes import add_segment

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Large")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    mask = np.zeros(shape, np.uint8)
    mask[20:60, 50:150, 50:150] = 1
    add_segment(node, "thing", mask, volume)
    hands.settle()
    return node


def writing(hands: Hands) -> None:
    """In the middle of writing a scan that takes seconds, so that it is not over before the test does what it wants to do."""
    large(hands, (160, 240, 240))
    hands.gui.click(hands.ui.setAddButton)
    hands.gui.wait(lambda: hands.ui.setMessage.text == "Writing the image …", RUN_S)


@POSIX
def test_a_writer_killed_in_mid_file_leaves_no_half_case(hands: Hands) -> None:
    panel = sys.modules["UNetSegmentationPanel"]
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    writing(hands)
    os.kill(panel.dataWorker().pid, signal.SIGKILL)
    hands.settle()
    said = hands.ui.setMessage.text
    assert "stopped by the system" in said and "whole cases only" in said and "\n" not in said
    assert len(hands.dataset.entries) == 1 and not [p for p in hands.dataset.check() if "belong to no case" not in p.what]
    assert hands.add().startswith("Added as") and len(hands.dataset.entries) == 2


def test_cancelled_while_it_is_written(hands: Hands) -> None:
    writing(hands)
    assert hands.ui.setAddButton.text == "Cancel" and not hands.ui.setFolderButton.enabled
    hands.gui.click(hands.ui.setAddButton)
    hands.settle()
    assert hands.ui.setMessage.text == "Cancelled; nothing was added."
    assert not (hands.folder / INDEX).exists() or not hands.dataset.entries
    hands.gui.click(hands.ui.setAddButton)
    hands.gui.click(hands.ui.setAddButton)  # before anything was sent
    hands.settle()
    assert hands.ui.setMessage.text == "Cancelled; nothing was added."


@pytest.mark.parametrize("late", [False, True])
def test_cancelled_in_its_last_moment_it_is_said_what_became_of_it(hands: Hands, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """late: the worker is still at it when it is killed."""
    module = sys.modules["UNetSegmentationPanel.worker"]
    monkeypatch.setattr(module, "CANCEL_S", 0.1 if late else RUN_S)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    hands.scan(1)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    with FolderLock(hands.folder):
        hands.gui.click(hands.ui.setAddButton)
        hands.gui.wait(lambda: hands.ui.setMessage.text == "Adding it to the training set …", RUN_S)
        hands.gui.click(hands.ui.setAddButton)
        if late:
            hands.settle()
    hands.settle()
    if late:
        assert hands.ui.setMessage.text.startswith("Cancelled while it was put into the training set") and len(hands.dataset.entries) == 1
    else:
        assert hands.ui.setMessage.text.startswith("Added as case-") and len(hands.dataset.entries) == 2
        assert hands.ui.setStatusLabel.text.startswith("2 cases")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits another process, as Linux can")
def test_a_full_disk_is_a_sentence_and_changes_nothing(hands: Hands) -> None:
    import resource

    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    before = hands.state()
    large(hands)
    pid = sys.modules["UNetSegmentationPanel"].dataWorker().pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    said = hands.add()
    assert "disk" in said and "\n" not in said, said
    assert hands.state() == before
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert hands.add().startswith("Added as")
    hands.whole()


def test_the_scene_is_closed_while_a_case_is_added(hands: Hands) -> None:
    writing(hands)
    hands.gui.close_scene()
    hands.settle()
    assert len(hands.dataset.entries) == 1  # what the worker has is whole
    hands.scan(1)
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    told: list[Any] = []
    hands.section.addCurrent(lambda *end: told.append(end))
    hands.gui.close_scene()
    hands.settle()
    assert told == [(None, "The scene was closed, so nothing was added.")] and len(hands.dataset.entries) == 1


@POSIX
def test_a_folder_that_does_not_answer_is_given_up(hands: Hands) -> None:
    panel, module = sys.modules["UNetSegmentationPanel"], sys.modules["UNetSegmentationPanel.trainingset"]
    hands.section._late.setInterval(300)
    os.kill(panel.dataWorker().pid, signal.SIGSTOP)  # as one that waits for a network drive
    hands.section.refresh()
    hands.settle()
    assert "does not answer" in hands.ui.setStatusLabel.text and module.ANSWER_S > 5
    hands.section._late.setInterval(round(1000 * RUN_S))
    hands.section.refresh()
    hands.settle()
    assert hands.ui.setStatusLabel.text.startswith("Empty")


@POSIX
def test_a_folder_that_does_not_answer_is_given_up_though_a_case_waits(hands: Hands) -> None:
    hands.drawn(thing=box((2, 6), (2, 6), (2, 6)))
    hands.add()
    hands.scan(1)
    hands.drawn(thing=box((3, 6), (2, 6), (2, 6)))
    hands.section._late.setInterval(2000)
    os.kill(sys.modules["UNetSegmentationPanel"].dataWorker().pid, signal.SIGSTOP)
    hands.section.refresh()
    hands.gui.wait(lambda: hands.section._late.active, RUN_S)
    assert hands.add().startswith("Added as") and hands.ui.setStatusLabel.text.startswith("2 cases")


@POSIX
def test_a_worker_that_starts_slowly_is_no_folder_that_is_silent(hands: Hands, tmp_path: Path) -> None:
    from UNetSegmentationLib.worker.client import find_python

    panel, slow = sys.modules["UNetSegmentationPanel"], tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 4\nexec "{find_python()}" "$@"\n')
    slow.chmod(0o755)
    panel.closeDataWorker()
    panel.dataWorker().renew(str(slow), dict(os.environ))
    hands.section._late.setInterval(3000)
    hands.section.refresh()
    hands.settle()
    assert hands.ui.setStatusLabel.text.startswith("Empty")


# ------------------------------------------------------------------------------------------------- for the other sections


def test_a_refusal_is_said_as_long_as_it_holds(hands: Hands) -> None:
    import slicer
    from mrml_scenes import add_segment

    told: list[tuple[str | None, str]] = []
    hands.section.addCurrent(lambda *end: told.append(end))
    hands.settle()
    assert told == [(None, "Choose the corrected segmentation.")] and hands.ui.setMessage.text == told[0][1]
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "By hand")
    node.SetReferenceImageGeometryParameterFromVolumeNode(hands.volume)
    add_segment(node, "thing", box((2, 6), (2, 6), (2, 6)), hands.volume)
    hands.settle()
    assert hands.section.segmentation() is node and not hands.ui.setMessage.text
    for _ in range(2):
        hands.section.addCurrent(lambda *end: told.append(end))
    assert hands.ui.setMessage.text == "Reading the segments …"
    hands.settle()
    assert told[1] == (None, "A case is still being added; wait for it.") and told[2] == (hands.only.name, hands.ui.setMessage.text)


def test_add_current_tells_its_end_once(hands: Hands, tmp_path: Path) -> None:
    told: list[tuple[str | None, str]] = []
    changes: list[int] = []
    hands.section.addListener(lambda: changes.append(1))

    def add(**how: Any) -> tuple[str | None, str]:
        told.clear()
        hands.section.addCurrent(lambda *end: told.append(end), **how)
        assert not told  # later, in any case
        hands.gui.wait(lambda: told, RUN_S)
        hands.settle()
        assert len(told) == 1
        return told[0]

    hands.section.root.collapsed = True
    assert add() == (None, "Choose the corrected segmentation.") and not hands.section.root.collapsed
    hands.section.root.collapsed = True
    import slicer
    from mrml_scenes import add_segment
    from UNetSegmentationLib.mrml import image_from_volume

    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "By hand")
    node.SetReferenceImageGeometryParameterFromVolumeNode(hands.volume)
    add_segment(node, "thing", box((2, 6), (2, 6), (2, 6)), hands.volume)
    image = image_from_volume(hands.volume)
    file = tmp_path / "ahead.seg.nrrd"
    prediction = Prediction(image.like(box((2, 6), (2, 6), (2, 8))), (Label(1, "thing", (1, 2, 3), {}),), "toy-1.0.0", Box.whole(SHAPE))
    write_segmentation(prediction, file)
    case, text = add(patient="PID-1", model_mask=file, model="toy-1.0.0")
    assert case == hands.only.name and "32 removed" in text and changes
    assert hands.only.patient == hands.dataset.patient("PID-1") and hands.only.record["model_name"] == "toy-1.0.0"
    assert hands.section.summary["count"] == 1
    # A question that is answered with no is an end too.
    hands.widget._parameters.volume = hands.scan(1)
    hands.drawn(thing=np.zeros(SHAPE, np.uint8))
    hands.gui.dialogs.answer(False)
    case, text = add()
    assert case is None and "is empty" in text
