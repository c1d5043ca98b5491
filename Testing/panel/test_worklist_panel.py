"""The section "Work list": a list is made, segmented in the background, corrected scan by scan, and shared."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import POSIX, stub

RUN_S = 120.0  # on a machine that has other things to do
SHAPE, SPACING = (24, 40, 48), (0.8, 0.9, 2.5)
# A tilted grid with a flipped axis: what is shown and added must be where it was.
DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
TOY = {
    "name": "toy",
    "labels": [{"value": 1, "name": "thing", "color": [10, 200, 30]}, {"value": 2, "name": "other", "color": [200, 10, 30]}],
}


def made(edge: float, x: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(shape), (12, 20, x))))
    return np.clip(0.5 + (6.0 - distance) / edge / 4, 0, 1).astype(np.float32)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    from UNetSegmentationLib.image import Image, write_image

    for i, edge in enumerate((0.2, 2.0, 1.0)):
        image = Image(made(edge, 18 + 4 * i), SPACING, (10.0, -20.0, 30.0), DIRECTION)
        write_image(image, tmp_path / "scans" / f"s{i}.nii.gz")
    return tmp_path / "scans"


class Hands:
    """The test's hands on the section."""

    def __init__(self, gui: Any, widget: Any) -> None:
        self.gui, self.widget, self.ui = gui, widget, None
        gui.wait(lambda: widget._warm, RUN_S)
        self.section = next(s for s in widget.sections if type(s).__name__ == "WorkListSection")
        self.ui = self.section.ui
        self.section.root.collapsed = False
        gui.process_events()

    @property
    def case(self) -> Any:
        return self.section.case

    def wait(self, condition: Callable[[], object]) -> None:
        self.gui.wait(lambda: condition() and not self.section.busy, RUN_S)

    def press(self, button: str) -> None:
        widget = getattr(self.ui, button)
        assert widget.enabled and widget.visible, f"{button}: {self.section.text or self.section.busy}"
        widget.click()
        self.gui.process_events()

    def choose(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.gui.dialogs.answer(str(folder))
        self.press("listFolderButton")
        self.gui.wait(lambda: self.section.list is not None or "no list in this folder" in self.ui.listStatusLabel.text, RUN_S)

    def add(self, folder: Path, n: int) -> None:
        self.gui.dialogs.answer(str(folder))
        self.press("addFolderButton")
        self.wait(lambda: self.section.list is not None and self.section.list["total"] == n)

    def segment(self) -> None:
        self.widget._parameters.models = ["toy-1.0.0"]
        self.gui.process_events()
        self.press("segmentButton")
        self.gui.wait(lambda: not self.section.segmenting, RUN_S)
        self.gui.wait(lambda: not self.section.list["unsegmented"], RUN_S)

    def next(self) -> str:
        former = self.case
        self.press("nextScanButton")
        self.wait(lambda: self.case is not former)
        return self.case.name

    def mask(self, name: str = "thing") -> np.ndarray:
        from UNetSegmentationLib import mrml

        held = self.case.segmentation.GetSegmentation()
        return mrml.segment_mask(self.case.segmentation, held.GetSegmentIdBySegmentName(name), self.case.volumes[0])

    def paint(self, z: int, name: str = "thing") -> None:
        """As a brush does: a block in one slice more."""
        import slicer

        held = self.case.segmentation.GetSegmentation()
        mask = self.mask(name)
        mask[z, 5:9, 5:9] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(
            mask, self.case.segmentation, held.GetSegmentIdBySegmentName(name), self.case.volumes[0]
        )


@pytest.fixture
def panel(gui: Any, monkeypatch: pytest.MonkeyPatch, install: Callable[..., str]) -> Callable[[], Hands]:
    install(**TOY)
    return lambda: Hands(gui, gui.open())


def volumes() -> set[str]:
    import slicer

    return {n.GetName() for kind in ("ScalarVolume", "Segmentation", "Table") for n in slicer.util.getNodesByClass(f"vtkMRML{kind}Node")}


def test_one_scan_is_not_told_of_as_several(panel, scans, tmp_path):
    hands = panel()
    for i in (1, 2):
        (scans / f"s{i}.nii.gz").unlink()
    hands.choose(tmp_path / "list")
    hands.add(scans, 1)
    assert hands.ui.listMessageLabel.text == "1 scan was added."
    scans.rename(tmp_path / "moved")
    hands.gui.dialogs.answer(str(tmp_path / "moved"))
    hands.press("addFolderButton")
    hands.wait(lambda: hands.ui.listMessageLabel.text == "0 scans were added. 1 scan was found again in another place.")


def test_scans_are_segmented_opened_where_it_helps_most_and_added(panel, gui, scans, tmp_path):
    """The whole way, with the training set's own section."""
    import slicer
    from UNetSegmentationLib.dataset import Dataset
    from UNetSegmentationLib.image import read_image
    from UNetSegmentationLib.worklist import WorkList

    hands = panel()
    assert not hands.ui.segmentButton.enabled and not hands.ui.nextScanButton.enabled
    hands.widget.trainingSet.setFolder(str(tmp_path / "set"))
    hands.choose(tmp_path / "set")
    hands.add(scans, 3)
    assert "0 of 3 scans done" in hands.ui.listStatusLabel.text and hands.ui.listMessageLabel.text == "3 scans were added."
    hands.segment()
    assert hands.next() == "s1"
    truth = read_image(scans / "s1.nii.gz")
    node, segmentation = hands.case.volumes[0], hands.case.segmentation
    assert np.array_equal(slicer.util.arrayFromVolume(node), truth.array)
    from UNetSegmentationLib import mrml

    assert mrml.image_from_volume(node).same_grid(truth)
    assert np.array_equal(hands.mask(), truth.array > 0.5)
    assert node.GetDisplayNode().GetAutoWindowLevel() == 0
    p = hands.widget._parameters
    assert p.volume is node and p.output is segmentation and p.nodules is segmentation
    red = slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode()
    assert red.GetBackgroundVolumeID() == node.GetID()
    held = segmentation.GetSegmentation()
    assert [held.GetNthSegment(i).GetName() for i in range(held.GetNumberOfSegments())] == ["thing", "other"]
    assert "toy-1.0.0 found one segment" in hands.ui.scanInfoLabel.text

    hands.paint(3)
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case is not None and hands.case.name != "s1")
    entry = next(iter(Dataset.open(tmp_path / "set").entries.values()))
    assert entry.changes["thing"]["added"] == 16 and entry.record["model_name"] == "toy-1.0.0"
    assert np.array_equal(read_image(entry.images[0]).array, truth.array)
    work = WorkList.open(tmp_path / "set")
    assert work.scan("s1").status == "done" and work.scan("s1").case == entry.name and work.scan(hands.case.name).status == "taken"
    assert "1 of 3 scans done" in hands.ui.listStatusLabel.text
    assert not any(name.startswith("s1") for name in volumes())  # what is done has left the scene
    assert not list(hands.section.desk.folder.glob("*.npy"))

    # Added by the training set's own button, the next scan is as well known and done, and it stays open.
    name = hands.case.name
    hands.paint(3)
    section = hands.widget.trainingSet
    section.root.collapsed = False
    gui.process_events()
    section.ui.setAddButton.click()
    gui.wait(lambda: not section.busy, RUN_S)
    (entry,) = [e for e in Dataset.open(tmp_path / "set").entries.values() if e.name != entry.name]
    assert entry.changes["thing"]["added"] == 16 and entry.record["model_name"] == "toy-1.0.0"
    hands.wait(lambda: work.refresh().scan(name).status == "done")
    assert work.scan(name).case == entry.name and hands.case.name == name
    hands.wait(lambda: f"'{name}' is marked as done." in hands.ui.listMessageLabel.text)
    assert hands.ui.listStatusLabel.text == "2 of 3 scans done."
    hands.press("nextScanButton")  # without a question: nothing would be lost
    hands.wait(lambda: hands.case is not None and hands.case.name != name)

    # Given back by somebody, it comes with the model's mask, which replaces the correction where the person says so.
    hands.press("skipScanButton")
    hands.wait(lambda: hands.case is None)
    work.back(name)
    hands.section._onRefresh()
    hands.wait(lambda: hands.ui.nextScanButton.enabled)
    assert hands.next() == name
    for answer, version in ((False, 1), (True, 2)):
        gui.dialogs.answer(answer)
        hands.press("doneScanButton")
        hands.wait(lambda: "would replace the correction" in hands.section.text or hands.case is None)
        assert "would replace the correction" in gui.dialogs.texts("message")[-1]
        assert Dataset.open(tmp_path / "set").entries[entry.name].version == version


class Set:
    """In the place of the training set's section: takes or refuses a case."""

    folder, summary, annotator = "", None, ""

    def __init__(self, hands: Hands) -> None:
        self.segmentation = lambda: hands.case.segmentation
        self.asked: list[dict[str, Any]] = []
        self.answer: tuple[str | None, str] = ("case-1", "")

    def addListener(self, listener: Any) -> None: ...

    def addCurrent(self, onDone: Any, **fields: Any) -> None:
        import qt

        self.asked.append(fields)
        qt.QTimer.singleShot(0, lambda: onDone(*self.answer))


@pytest.fixture
def in_the_desk(tmp_path, monkeypatch) -> Callable[[str], None]:
    """in_the_desk(code): what each desk runs first from then on."""

    def put(code: str) -> None:
        code = "import os, sys\nif 'desk' in sys.orig_argv:\n" + textwrap.indent(code, "    ")
        path = stub(tmp_path, "sitecustomize", code)["PYTHONPATH"]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([path, os.environ.get("PYTHONPATH", "")]))

    return put


@pytest.fixture
def opened(panel, scans, tmp_path) -> Callable[..., Hands]:
    """A list of three scans, none of them segmented, with a training set that takes all."""

    def open_(segment: bool = False) -> Hands:
        hands = panel()
        hands.widget.trainingSet = Set(hands)
        hands.choose(tmp_path / "list")
        hands.add(scans, 3)
        if segment:
            hands.segment()
        return hands

    return open_


def test_a_list_works_without_a_model_and_to_its_end(opened):
    hands = opened()
    assert hands.next() == "s0" and hands.ui.scanInfoLabel.text == "Not segmented in advance."
    assert hands.case.segmentation.GetSegmentation().GetNumberOfSegments() == 0
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case is not None and hands.case.name == "s1")
    assert hands.widget.trainingSet.asked[0]["model_mask"] is None and hands.widget.trainingSet.asked[0]["patient"] is None
    hands.press("skipScanButton")
    hands.wait(lambda: hands.case is not None and hands.case.name == "s2")
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case is None)
    assert hands.ui.listMessageLabel.text == "Nothing is left to do in this list."
    assert hands.ui.listStatusLabel.text == "2 of 3 scans done, 1 skipped." and not hands.ui.nextScanButton.enabled
    assert not hands.ui.doneScanButton.visible and not hands.ui.scanFrame.visible


def test_what_the_training_set_refuses_stays_open(opened):
    import slicer

    hands = opened(segment=True)
    name = hands.next()
    hands.widget.trainingSet.answer = None, "The mask is empty; mark something."
    hands.press("doneScanButton")
    hands.wait(lambda: hands.section.text)
    assert hands.case.name == name and hands.ui.listMessageLabel.text == "The mask is empty; mark something."
    fields = hands.widget.trainingSet.asked[0]
    assert fields["model_mask"].is_file() and fields["model"] == "toy-1.0.0"
    # Where the scan was moved, its file of the model's mask would be refused as another scan's.
    hands.case.volumes[0].SetAndObserveTransformNodeID(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode").GetID())
    hands.press("doneScanButton")
    hands.wait(lambda: len(hands.widget.trainingSet.asked) == 2)
    assert hands.widget.trainingSet.asked[1]["model_mask"] is None


def test_after_a_refusal_of_another_segmentation_corrections_are_asked_about_again(opened, monkeypatch):
    import slicer

    hands, asked = opened(segment=True), []
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_k: asked.append(text) or len(asked) == 1)
    name = hands.next()
    hands.paint(3)
    hands.widget.trainingSet.segmentation = lambda: None
    hands.widget.trainingSet.answer = None, "Say which label 'x' is."
    hands.press("doneScanButton")
    hands.wait(lambda: hands.section.text)
    assert len(asked) == 1 and hands.case.name == name
    hands.press("nextScanButton")
    assert len(asked) == 2 and hands.case.name == name and not hands.section.busy


def test_corrections_are_not_lost_without_asking(opened, monkeypatch):
    import slicer

    hands = opened(segment=True)
    asked: list[str] = []
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_k: asked.append(text) or False)
    first = hands.next()
    hands.press("skipScanButton")  # nothing was corrected: no question
    hands.wait(lambda: hands.case.name != first)
    name = hands.case.name
    assert not asked
    hands.paint(2)
    for button in ("nextScanButton", "skipScanButton"):
        hands.press(button)
    assert len(asked) == 2 and "would be lost" in asked[0] and hands.case.name == name
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_k: True)
    hands.press("nextScanButton")
    hands.wait(lambda: hands.case.name != name)
    assert hands.ui.nextScanButton.text == "Later, next"
    hands.press("nextScanButton")
    hands.wait(lambda: hands.case.name == name)  # it comes again, after the others


def test_what_is_corrected_while_a_case_is_added_stays_at_hand(opened, tmp_path):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened(segment=True)
    name, add = hands.next(), hands.widget.trainingSet.addCurrent

    def slowly(onDone: Any, **fields: Any) -> None:
        hands.paint(3)
        add(onDone, **fields)

    hands.widget.trainingSet.addCurrent = slowly
    hands.press("doneScanButton")
    hands.wait(lambda: hands.section.text)
    assert hands.case.name == name and "is not in the training set yet" in hands.ui.listMessageLabel.text
    assert WorkList.open(tmp_path / "list").scan(name).status == "done"
    hands.widget.trainingSet.addCurrent = add
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name != name)


def test_done_adds_the_scans_segmentation_whatever_the_segment_editor_shows(panel, gui, scans, tmp_path, monkeypatch):
    import slicer
    from mrml_scenes import add_segment
    from UNetSegmentationLib.dataset import Dataset

    hands, asked = panel(), []
    training = hands.widget.trainingSet
    training.setFolder(str(tmp_path / "set"))
    hands.choose(tmp_path / "set")
    hands.add(scans, 3)
    hands.segment()

    def measured() -> Any:
        """Another segmentation of the scan at hand, in the Segment Editor."""
        hands.press("editScanButton")
        scratch = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Scratch")
        scratch.SetReferenceImageGeometryParameterFromVolumeNode(hands.case.volumes[0])
        mask = np.zeros(SHAPE, np.uint8)
        mask[1:4, 1:4, 1:4] = 1
        add_segment(scratch, "thing", mask, hands.case.volumes[0])
        slicer.mrmlScene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode").SetAndObserveSegmentationNode(scratch)
        gui.process_events()
        return scratch

    monkeypatch.setattr(slicer.util, "selectModule", lambda _name: None)
    monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, **_k: asked.append(text) or len(asked) > 1)
    first = hands.next()
    measured()
    hands.paint(3)
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case is not None and hands.case.name != first)
    (entry,) = Dataset.open(tmp_path / "set").entries.values()
    assert entry.changes["thing"]["added"] == 16 and not asked

    # Where a person chose the other one, what was corrected is not lost without a question.
    second, scratch = hands.case.name, measured()
    training.root.collapsed = False
    training.ui.setSegmentationSelector.setCurrentNode(scratch)
    hands.paint(3)
    hands.press("doneScanButton")
    assert len(asked) == 1 and "would be lost" in asked[0] and hands.case.name == second and not hands.section.busy
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case is not None and hands.case.name != second)
    assert sorted(e.record["voxels_by_label"]["thing"] for e in Dataset.open(tmp_path / "set").entries.values())[0] == 27


def test_that_another_did_it_too_is_still_to_be_read_beside_the_next_scan(opened, tmp_path):
    from UNetSegmentationLib.worklist import Annotator, WorkList

    hands = opened()
    for button in ("doneScanButton", "skipScanButton"):
        name = hands.case.name if hands.case is not None else hands.next()
        WorkList.open(tmp_path / "list").done(name, Annotator("bert", "Bert"), "case-9")
        hands.press(button)
        hands.wait(lambda: hands.case is not None and hands.case.name != name)  # noqa: B023
        assert f"{name} was already done by Bert" in hands.ui.listMessageLabel.text.replace("\u200b", "")


def test_the_segment_editor_opens_on_the_scan(opened, monkeypatch):
    import slicer

    hands = opened(segment=True)
    hands.next()
    selected: list[str] = []
    monkeypatch.setattr(slicer.util, "selectModule", selected.append)
    hands.press("editScanButton")
    node = slicer.mrmlScene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode")
    assert selected == ["SegmentEditor"] and node.GetSegmentationNode() is hands.case.segmentation
    assert node.GetSourceVolumeNode() is hands.case.volumes[0]
    hands.press("editScanButton")
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentEditorNode")) == 1


def test_a_strip_that_went_with_slicers_window_ends_no_cleanup(gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import qt
    import shiboken6
    import slicer

    gui.open()
    from UNetSegmentationPanel.worklist import Strip

    windows = [qt.QMainWindow()]
    monkeypatch.setattr(slicer.util, "mainWindow", lambda: windows[0] if windows else None)
    strip = Strip([("Done", "", lambda: None)])
    strip.show("1, <img src='//host/x.png'>")
    assert strip._label.textFormat == qt.Qt.PlainText  # a scan's name is anybody's
    shiboken6.delete(windows.pop())
    strip.hide()
    assert not strip.shown


def test_the_strips_buttons_are_seen_on_a_laptop_whatever_the_scans_name(gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import qt
    import slicer

    gui.open()
    from UNetSegmentationPanel.worklist import Strip

    window, full, strip = (
        qt.QMainWindow(),
        qt.QToolBar(),
        Strip([(text, "", lambda: None) for text in ("Done, next", "Skip", "Later, next")]),
    )
    for _ in range(50):  # as Slicer's, which together are nearly as wide
        button = qt.QToolButton()
        button.setFixedSize(24, 24)
        full.addWidget(button)
    window.addToolBar(full)
    window.resize(1366, 700)
    window.show()
    monkeypatch.setattr(slicer.util, "mainWindow", lambda: window)
    for name in ("LUNG1-001", "x" * 250):
        strip.show(name)
        gui.process_events()
        assert all(b.visible for b in strip.buttons) and strip._label.visible
    strip.hide()


def test_in_the_segment_editor_a_strip_goes_on_to_the_next_scan(opened, gui, monkeypatch):
    import qt
    import slicer

    hands = opened(segment=True)
    window, opened_modules = qt.QMainWindow(), []

    def select(name: str) -> None:
        opened_modules.append(name)
        gui.leave(hands.widget) if name == "SegmentEditor" else hands.widget.parent.enter()

    monkeypatch.setattr(slicer.util, "mainWindow", lambda: window)
    monkeypatch.setattr(slicer.util, "selectModule", select)
    first, strip = hands.next(), hands.section.strip
    assert not strip.shown
    hands.press("editScanButton")
    assert strip.shown and [b.text for b in strip.buttons] == ["Done, next", "Skip", "Later, next"]
    strip.buttons[0].click()
    hands.wait(lambda: hands.case is not None and hands.case.name != first and len(opened_modules) == 3)
    assert opened_modules == ["SegmentEditor", "UNetSegmentation", "SegmentEditor"] and strip.shown
    assert slicer.mrmlScene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode").GetSegmentationNode() is hands.case.segmentation
    hands.widget.trainingSet.answer = None, "The mask is empty; mark something."
    strip.buttons[0].click()
    hands.wait(lambda: hands.section.text)
    assert opened_modules[-1] == "UNetSegmentation" and not strip.shown  # where the sentence is to be read
    gui.close(hands.widget)


def test_a_scan_that_was_added_is_done_and_may_be_corrected_further(opened, gui, tmp_path):
    from UNetSegmentationLib.worklist import Annotator, WorkList

    hands = opened(segment=True)
    name, work = hands.next(), WorkList.open(tmp_path / "list")
    own, other = hands.case.segmentation, object()
    section = hands.widget.trainingSet
    add = lambda: section.addCurrent(**hands.section.known(hands.case.volumes[0]))  # noqa: E731  as its button
    section.segmentation = lambda: other  # such as one that only measured something
    add()
    gui.process_events()
    section.answer, section.segmentation = (None, "The mask is empty; mark something."), lambda: own
    add()
    gui.process_events()
    hands.section._onRefresh()
    hands.wait(lambda: not hands.section.desk.waiting)
    assert work.refresh().scan(name).status == "taken"
    section.answer = "case-1", ""
    add()
    hands.wait(lambda: hands.case.over)
    assert (work.refresh().scan(name).status, work.scan(name).case) == ("done", "case-1") and hands.case.name == name
    taken = work.next(Annotator("bert", "Bert"))
    hands.section._onRefresh()
    hands.wait(lambda: hands.ui.listStatusLabel.text == "1 of 3 scans done, 1 with other annotators.")
    hands.paint(2)
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name != name)
    assert len(section.asked) == 4 and hands.case.name not in (name, taken.name)


def test_a_closed_scene_gives_the_scan_back(opened, gui, tmp_path):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened()
    name = hands.next()
    gui.close_scene()
    work = WorkList.open(tmp_path / "list")
    gui.wait(lambda: work.refresh().scan(name).status == "waiting", RUN_S)
    assert hands.case is None and f"'{name}' was given back" in hands.ui.listMessageLabel.text
    assert hands.next() == name
    import slicer

    slicer.mrmlScene.RemoveNode(hands.case.volumes[0])
    hands.press("doneScanButton")
    assert hands.case is None and "was removed from the scene" in hands.ui.listMessageLabel.text
    assert not hands.widget.trainingSet.asked


@POSIX
@pytest.mark.parametrize("button", ["nextScanButton", "skipScanButton", "doneScanButton"])
def test_a_scene_that_is_closed_gets_no_scan_that_was_still_being_read(opened, gui, tmp_path, button):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened()
    hands.next()
    os.kill(hands.section.desk.pid, signal.SIGSTOP)  # as one that reads for long
    hands.press(button)
    if button == "doneScanButton":
        gui.wait(lambda: "Marking" in hands.section.busy, RUN_S)
    gui.close_scene()
    assert hands.case is None and not hands.ui.nextScanButton.enabled  # until the desk has answered
    os.kill(hands.section.desk.pid, signal.SIGCONT)
    work = WorkList.open(tmp_path / "list")
    hands.wait(lambda: not hands.section.desk.waiting and not work.refresh().counts()["taken"])
    assert hands.case is None and not volumes() and not list(hands.section.desk.folder.glob("*.npy"))
    assert work.scan("s0").status == {"next": "waiting", "skip": "skipped", "done": "done"}[button[:4]]
    assert ("'s1' was given back" in hands.ui.listMessageLabel.text) == (button == "nextScanButton")
    assert hands.next() == "s1"


def test_a_scene_that_is_closed_while_a_scan_opens_gives_that_one_back(opened, gui, tmp_path, monkeypatch):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened()
    hands.next()
    monkeypatch.setattr(hands.section._pieces, "add", hands.section._pieces._queue.append)  # as a large one
    hands.press("doneScanButton")
    gui.wait(lambda: hands.section.busy.startswith("Opening"), RUN_S)
    gui.close_scene()
    work = WorkList.open(tmp_path / "list")
    hands.wait(lambda: not hands.section.desk.waiting and not work.refresh().counts()["taken"])
    assert hands.case is None and not volumes() and (work.scan("s0").status, work.scan("s1").status) == ("done", "waiting")
    assert hands.ui.listMessageLabel.text == "The scene was closed, so 's1' was given back to the list."


@POSIX
def test_what_fails_meanwhile_does_not_end_the_wait_for_the_next_scan(opened, gui, tmp_path, models_folder):
    hands = opened()
    hands.widget._parameters.models = ["toy-1.0.0"]
    gui.process_events()
    for file in models_folder.iterdir():
        file.write_bytes(b"damaged")
    section, pid, seen = hands.section, hands.section.desk.pid, []
    failed, section._onSegmentFailed = section._onSegmentFailed, lambda text: (failed(text), seen.append((section.busy, section._answer)))
    os.kill(pid, signal.SIGSTOP)
    hands.press("segmentButton")
    hands.press("nextScanButton")
    os.kill(pid, signal.SIGCONT)
    hands.wait(lambda: hands.case is not None)
    assert seen == [("Reading the next scan…", "awaited")]


def test_the_map_of_the_former_scan_goes_with_it(opened, gui):
    import slicer

    hands = opened(segment=True)
    name = hands.next()
    hands.widget.ui.uncertaintyCheckBox.click()
    gui.process_events()
    hands.widget.ui.applyButton.click()
    gui.wait(lambda: hands.widget.controller.phase == "done", RUN_S)
    hands.widget.ui.mapCheckBox.checked = True
    gui.process_events()
    red = slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode()
    assert red.GetForegroundVolumeID() and f"{name} uncertainty" in volumes()
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name != name)
    assert not red.GetForegroundVolumeID() and not any(n.startswith(name) for n in volumes())
    assert not hands.widget.controller.canUndo


def test_scans_that_are_added_meanwhile_are_segmented_by_the_same_model(opened, gui, tmp_path, scans, install):
    from UNetSegmentationLib.worklist import WorkList

    install(**{**TOY, "name": "toy2"})
    hands = opened()
    hands.widget._parameters.models = ["toy-1.0.0"]
    gui.process_events()
    hands.press("segmentButton")
    hands.section.desk.tell("pause")
    gui.wait(lambda: WorkList.open(tmp_path / "list").models == ("toy-1.0.0",), RUN_S)
    hands.widget._parameters.models = ["toy2-1.0.0"]  # for other work
    gui.process_events()
    (tmp_path / "more").mkdir()
    shutil.copy(scans / "s0.nii.gz", tmp_path / "more" / "m.nii.gz")
    section = hands.section
    section.segmenting = section._paused = True  # though the former three may be done
    section._watch.stop()
    hands.add(tmp_path / "more", 4)
    gui.wait(lambda: not section._paused, RUN_S)  # the new one runs, and the watch knows
    gui.wait(lambda: not section.segmenting and not section.list["unsegmented"], RUN_S)
    assert {s.model for s in WorkList.open(tmp_path / "list").scans.values()} == {"toy-1.0.0"}
    shutil.copy(scans / "s1.nii.gz", tmp_path / "more" / "n.nii.gz")
    section.segmenting, section._choice["models"] = True, ["gone"]
    hands.add(tmp_path / "more", 5)
    gui.wait(lambda: not section.segmenting and "There is no model package" in hands.ui.listMessageLabel.text, RUN_S)


def test_a_scan_that_another_annotator_has_is_not_offered(opened, gui, tmp_path):
    from UNetSegmentationLib.worklist import Annotator, WorkList

    hands = opened()
    work = WorkList.open(tmp_path / "list")
    assert work.next(Annotator("bert", "Bert")).name == "s0"
    hands.widget.trainingSet.annotator = "Anna"
    assert hands.next() == "s1" and work.refresh().scan("s1").by == "Anna"
    assert "1 with other annotators" in hands.ui.listStatusLabel.text and hands.ui.listStatusLabel.toolTip == "s0: Bert"
    hands.press("skipScanButton")
    hands.wait(lambda: hands.case.name == "s2")
    assert (work.refresh().scan("s1").status, work.scan("s1").by) == ("skipped", "Anna")
    work.done("s0", Annotator("bert"), "case-9")
    hands.section._onRefresh()
    hands.wait(lambda: "1 of 3 scans done" in hands.ui.listStatusLabel.text)


def test_a_case_that_is_in_the_training_set_is_done_though_the_scene_was_closed(opened, gui, tmp_path):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened()
    name, work = hands.next(), WorkList.open(tmp_path / "list")
    told: list[Any] = []
    hands.widget.trainingSet.addCurrent = lambda onDone, **_fields: told.append(onDone)
    hands.press("doneScanButton")
    gui.close_scene()
    told[0]("case-1", "Added as case-1.")
    gui.wait(lambda: work.refresh().scan(name).status == "done", RUN_S)
    hands.wait(lambda: "Added as case-1." in hands.ui.listMessageLabel.text)
    assert hands.case is None and work.counts()["taken"] == 0


def test_another_training_sets_list_gives_the_scan_of_the_former_back(panel, gui, tmp_path, scans):
    """As long as no folder was chosen for the list, it lies in the training set's."""
    from UNetSegmentationLib.worklist import WorkList

    works = [WorkList.gather(tmp_path / name, [scans])[0] for name in "ab"]
    hands = panel()
    hands.widget.trainingSet.setFolder(str(works[0].folder))
    hands.wait(lambda: hands.section.list is not None)
    name = hands.next()
    hands.section.segmenting = True
    hands.widget.trainingSet.setFolder(str(works[1].folder))
    hands.wait(lambda: hands.section.list is not None and hands.section.list["folder"] == str(works[1].folder))
    assert not hands.section.segmenting and works[0].refresh().scan(name).status == "taken"
    works[1].folder.rename(tmp_path / "away")
    hands.press("nextScanButton")
    hands.wait(lambda: hands.section.text)
    assert hands.case.name == name and works[0].refresh().scan(name).status == "taken"  # until there is another
    (tmp_path / "away").rename(works[1].folder)
    hands.next()
    hands.wait(lambda: [w.refresh().counts()["taken"] for w in works] == [0, 1])


@POSIX
def test_a_scan_is_of_the_list_that_was_asked(panel, gui, tmp_path, scans):
    from UNetSegmentationLib.worklist import WorkList

    works = [WorkList.gather(tmp_path / name, [scans])[0] for name in "ab"]
    hands = panel()
    section, trainingSet = hands.section, hands.widget.trainingSet
    trainingSet.setFolder(str(works[0].folder))
    hands.wait(lambda: section.list is not None and not section.desk.waiting and not trainingSet.busy)
    os.kill(section.desk.pid, signal.SIGSTOP)
    hands.press("nextScanButton")
    trainingSet.setFolder(str(works[1].folder))
    gui.process_events()
    os.kill(section.desk.pid, signal.SIGCONT)
    hands.wait(lambda: hands.case is not None)
    assert hands.case.folder == str(works[0].folder)
    hands.press("skipScanButton")
    hands.wait(lambda: hands.case.folder == str(works[1].folder))
    assert [w.refresh().scan("s0").status for w in works] == ["skipped", "taken"]


def test_a_folder_without_a_list_and_without_cases_is_not_looked_at_for_ever(panel, gui, tmp_path, scans):
    import qt
    from UNetSegmentationLib.worklist import WorkList

    hands = panel()
    section, asked = hands.widget.trainingSet, []

    def answered(action: str) -> None:
        asked.append(action)
        qt.QTimer.singleShot(0, section._tell)

    section._ask = answered
    (tmp_path / "set").mkdir()
    section.setFolder(str(tmp_path / "set"))
    hands.wait(lambda: "no list in this folder" in hands.ui.listStatusLabel.text)
    with pytest.raises(AssertionError):
        gui.wait(lambda: len(asked) > 5, 2)
    WorkList.gather(tmp_path / "set", [scans])  # by another
    hands.section.enter()
    hands.wait(lambda: hands.section.list is not None)


@POSIX
def test_a_list_whose_drive_hangs_is_told_and_left(panel, gui, tmp_path, scans):
    """A process that was stopped stands for one that waits for its drive."""
    from UNetSegmentationLib.worklist import WorkList

    for name in "ab":
        WorkList.gather(tmp_path / name, [scans])
    hands = panel()
    hands.choose(tmp_path / "a")
    os.kill(hands.section.desk.pid, signal.SIGSTOP)
    hands.section._late.setInterval(1)
    hands.section._open()
    gui.wait(lambda: "does not answer" in hands.ui.listMessageLabel.text, RUN_S)
    assert str(tmp_path / "a") in hands.ui.listMessageLabel.text
    hands.section._late.setInterval(round(1000 * RUN_S))
    hands.press("nextScanButton")
    assert hands.section.busy and not hands.ui.nextScanButton.enabled
    hands.choose(tmp_path / "b")
    assert hands.section.list["folder"] == str(tmp_path / "b") and not hands.ui.listMessageLabel.text
    assert hands.next() == "s0"


def test_a_result_that_was_lost_is_not_said_to_be_empty(opened, tmp_path):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened(segment=True)
    for scan in WorkList.open(tmp_path / "list").scans.values():
        scan.mask.unlink()
    hands.next()
    assert hands.ui.scanInfoLabel.text == "Not segmented in advance."
    hands.press("doneScanButton")
    gone = hands.widget.trainingSet.asked[0]
    assert gone["model_mask"] is None and gone["model"] == ""


@POSIX
def test_the_desk_may_be_killed_and_the_scan_stays_open(opened, gui, tmp_path):
    from UNetSegmentationLib.worklist import WorkList

    hands = opened()
    name = hands.next()
    os.kill(hands.section.desk.pid, signal.SIGKILL)
    gui.wait(lambda: not hands.section.desk.running, RUN_S)
    assert hands.case.name == name and hands.ui.listMessageLabel.text
    assert WorkList.open(tmp_path / "list").scan(name).status == "taken"
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name != name)
    assert WorkList.open(tmp_path / "list").scan(name).status == "done"


def test_the_desk_is_gone_before_pytorch_is_removed_and_comes_back(opened, gui, monkeypatch):
    import qt
    from UNetSegmentationPanel import installer

    hands, seen = opened(), []
    name, first = hands.next(), hands.section.desk.pid
    assert first is not None

    def remove(onDone, onError, onCancelled):
        seen.append(hands.section.desk.running)
        qt.QTimer.singleShot(0, lambda: onDone(None))

    monkeypatch.setattr(installer, "removeTorch", remove)
    hands.widget.torchRow._remove()
    gui.wait(lambda: not hands.widget.torchRow.working, RUN_S)
    assert seen == [False] and hands.case.name == name and not hands.ui.listMessageLabel.text
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name != name)
    assert hands.section.desk.pid != first
    hands.section._onRefresh()
    hands.widget.torchRow._remove()
    assert hands.ui.listMessageLabel.text == "PyTorch is being removed, so the work list was interrupted; go on when that is done."
    gui.wait(lambda: not hands.widget.torchRow.working, RUN_S)


def test_the_desk_sees_pytorch_that_came_meanwhile(opened, gui, monkeypatch):
    from UNetSegmentationPanel import installer

    hands = opened()
    name, first = hands.next(), hands.section.desk.pid
    monkeypatch.setattr(installer, "workerPython", lambda: (sys.executable, dict(os.environ)))
    hands.section.segmenting = True  # which is not interrupted
    hands.section._onRefresh()
    gui.wait(lambda: not hands.section.desk.waiting, RUN_S)
    assert hands.section.desk.pid == first
    hands.section.segmenting = False
    hands.section._onRefresh()
    gui.wait(lambda: not hands.section.desk.waiting, RUN_S)
    assert hands.section.desk.pid not in (None, first) and hands.case.name == name and not hands.ui.listMessageLabel.text
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name != name)


@POSIX
@pytest.mark.parametrize("another", [False, True])
def test_a_desk_that_was_killed_is_started_again_and_says_that_the_scan_is_taken(opened, gui, tmp_path, monkeypatch, in_the_desk, another):
    """another: a list that is looked into meanwhile, which starts a desk that knows nothing of the scan."""
    from UNetSegmentationLib.worklist import WorkList

    hands = opened()
    if another:

        def ended(text: str) -> None:
            hands.section._onDeskEnd(text)
            hands.section.desk.ask("status", lambda answer: None, lambda text: None, folder=str(tmp_path / "another"))

        hands.section.desk._onEnd = ended
    name = hands.next()
    monkeypatch.setattr(sys.modules["UNetSegmentationPanel.worklist"], "_REFRESH_MS", 10)
    # The desk's own signs of life, but every second.
    in_the_desk("import UNetSegmentationLib.worklist as w\nw.LEASE = 6.0\n")
    pid, before = hands.section.desk.pid, WorkList.open(tmp_path / "list").scan(name).until
    gui.leave(hands.widget)  # into the Segment Editor
    os.kill(pid, signal.SIGKILL)
    gui.wait(lambda: hands.section.desk.pid not in (None, pid), RUN_S)
    # A claim of 30 minutes becomes one of 6 s.
    gui.wait(lambda: WorkList.open(tmp_path / "list").scan(name).until < min(before, 7), RUN_S)
    assert WorkList.open(tmp_path / "list").scan(name).status == "taken" and hands.case.name == name


@POSIX
def test_a_scan_that_ends_the_desk_is_named_and_another_comes(opened, tmp_path, in_the_desk):
    from UNetSegmentationLib.worklist import WorkList

    in_the_desk(
        "import UNetSegmentationLib.worker.desk as d\nread = d.read_image\n"
        "d.read_image = lambda files, *a: os.kill(os.getpid(), 9) if 's0' in str(files) else read(files, *a)\n"
    )
    hands = opened()
    for _ in range(2):  # also after a restart of Slicer
        hands.press("nextScanButton")
        hands.wait(lambda: hands.section.text and not hands.section.desk.waiting)
        text = hands.ui.listMessageLabel.text
        assert "ended while it read 's0', so that was given back; press 'Next scan' for another." in text and "memory ran out." in text
        assert WorkList.open(tmp_path / "list").counts()["waiting"] == 3  # others may be able to read it
        passed, hands.section._passed = hands.section._passed, []
    hands.section._passed = passed
    assert hands.next() == "s1" and not hands.section.text


@POSIX
def test_a_scan_that_ends_the_desk_and_cannot_be_given_back_is_not_said_to_be(opened, tmp_path, in_the_desk):
    in_the_desk(
        "import UNetSegmentationLib.worker.desk as d\n"
        f"d.read_image = lambda *a: (os.rename({str(tmp_path / 'list')!r}, {str(tmp_path / 'away')!r}), os.kill(os.getpid(), 9))\n"
    )
    hands = opened()
    hands.press("nextScanButton")
    hands.wait(lambda: hands.section.text and not hands.section.desk.waiting)
    assert "is not there; connect its drive or network folder" in hands.ui.listMessageLabel.text
    assert "given back" not in hands.ui.listMessageLabel.text
    (tmp_path / "away").rename(tmp_path / "list")


def test_more_files_than_a_request_holds_are_a_sentence(opened):
    hands = opened()
    hands.section._add(["x" * 100] * 50_000)
    hands.wait(lambda: hands.section.text.startswith("These are too many files at once"))
    assert hands.next() == "s0"


def test_a_folder_that_is_gone_or_a_bad_scan_is_said(opened, scans, tmp_path):
    hands = opened()
    (scans / "s0.nii.gz").write_bytes(b"no image")
    assert hands.next() == "s1"
    assert "s0.nii.gz cannot be read as an image" in hands.ui.listMessageLabel.text
    assert "1 cannot be read or segmented" in hands.ui.listStatusLabel.text
    (tmp_path / "list").rename(tmp_path / "away")
    hands.press("doneScanButton")
    hands.wait(lambda: hands.section.text)
    assert "is not there; connect its drive or network folder" in hands.ui.listMessageLabel.text and hands.case.name == "s1"
    (tmp_path / "away").rename(tmp_path / "list")
    hands.press("doneScanButton")
    hands.wait(lambda: hands.case.name == "s2")


def test_segmenting_in_advance_waits_for_the_person_and_says_why_it_cannot(opened, gui, monkeypatch):
    hands = opened()
    hands.widget.modelList.select([])
    hands.press("segmentButton")
    assert "Choose a model above" in hands.ui.listMessageLabel.text and not hands.ui.segmentButton.checked
    hands.widget._parameters.models = ["lung-nodule-2d-1.2.1"]
    gui.process_events()
    hands.press("segmentButton")
    hands.wait(lambda: "made for a box around one target" in hands.ui.listMessageLabel.text)
    assert not hands.section.segmenting

    told: list[str] = []
    tell = hands.section.desk.tell
    monkeypatch.setattr(hands.section.desk, "tell", lambda op: (told.append(op), tell(op)))
    hands.widget._parameters.models = ["toy-1.0.0"]
    gui.process_events()
    hands.section.segmenting = True
    hands.section.busy = "as if a run went on"
    hands.section._onWatch()
    hands.section.busy = ""
    assert told == ["pause"] and hands.section._paused
    for _ in range(5):
        hands.section._onWatch()
    assert told == ["pause", "go"] and not hands.section._paused
    hands.section._halt()
    assert told[-1] == "halt" and not hands.section.segmenting


def test_opening_a_large_scan_does_not_hold_the_event_loop(panel, gui, tmp_path):
    from UNetSegmentationLib.image import Image, write_image

    hands = panel()
    hands.widget.trainingSet = Set(hands)
    write_image(Image((made(1.0, 24, (120, 256, 256)) * 1000).astype(np.int16)), tmp_path / "scans" / "big.nrrd")
    hands.choose(tmp_path / "list")
    hands.add(tmp_path / "scans", 1)
    with gui.longest_block() as blocks:
        assert hands.next() == "big"
    assert blocks[0] < 0.3  # s of computing in one turn, with room for a slow processor; 50 ms are asked
    assert hands.case.volumes[0].GetImageData().GetDimensions() == (256, 256, 120)


def test_the_list_is_found_again_after_a_restart(opened, gui, tmp_path, scans):
    hands = opened()
    name = hands.next()
    gui.close(hands.widget)
    again = Hands(gui, gui.open())
    again.wait(lambda: again.section.list is not None)
    assert again.section.list["total"] == 3 and again.section.folder == str(tmp_path / "list")
    assert again.section.list["counts"]["waiting"] == 3  # what was open was given back
    assert again.next() == name
