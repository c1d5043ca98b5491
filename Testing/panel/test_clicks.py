"""The section "Click a nodule", clicked: in the slice views, on a made scan, with a network that is a threshold."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from workers import POSIX

RUN_S = 60.0  # a click on a machine that has other things to do
SHAPE, SPACING = (48, 96, 96), (0.8, 0.8, 1.25)  # (z, y, x) voxels, (x, y, z) mm
BALLS = {"left": ((24, 48, 30), 7.0), "right": ((20, 40, 70), 4.5)}  # index (z, y, x), radius in mm
PROMPTS_TAG = "UNetSegmentation.Prompts"


def made_scan() -> np.ndarray:
    """Lung with two solid balls, the second one on a vessel."""
    rng = np.random.default_rng(5)
    array = rng.normal(-850, 25, SHAPE)
    grid = np.indices(SHAPE)
    for at, radius in BALLS.values():
        mm = sum(((g - c) * s) ** 2 for g, c, s in zip(grid, at, SPACING[::-1]))
        array = np.where(mm <= radius**2, rng.normal(30, 15, SHAPE), array)
    vessel = ((grid[0] - 20) * SPACING[2]) ** 2 + ((grid[1] - 40) * SPACING[1]) ** 2 <= 1.5**2
    return np.where(vessel & (grid[2] > 70), 40, array).astype(np.int16)


def truth(name: str) -> np.ndarray:
    at, radius = BALLS[name]
    return sum(((g - c) * s) ** 2 for g, c, s in zip(np.indices(SHAPE), at, SPACING[::-1])) <= radius**2


def scan(name: str = "CT") -> Any:
    import slicer

    node = slicer.util.addVolumeFromArray(made_scan(), np.diag([*SPACING, 1.0]), name)
    node.CreateDefaultDisplayNodes()
    return node


TISSUE = {"category": ["SCT", "49755003", "Morphologically Altered Structure"], "type": ["SCT", "27925004", "Nodule"]}
TOY = {
    "name": "aclick",
    "task": "click",
    "spacing": [*SPACING],
    "patch": [32, 48, 48],
    "intensity": {"mode": "window", "level": -400, "width": 1000},
    "labels": [{"value": 1, "name": "lung nodule", "color": [230, 159, 0], "terminology": TISSUE}],
}


@pytest.fixture
def panel(gui: Any, monkeypatch: pytest.MonkeyPatch, install: Callable[..., str]) -> Callable[[], Hands]:
    """panel() opens the module on an empty scene, with the toy model for clicks chosen."""
    install(**TOY)

    def open_() -> Hands:
        hands = Hands(gui, gui.open())
        hands.settings.clickModel = "aclick-1.0.0"
        return hands

    return open_


class Hands:
    """The test's hands on one widget of the module, and on the slice views."""

    def __init__(self, gui: Any, widget: Any) -> None:
        self.gui, self.widget, self.ui = gui, widget, widget.ui
        gui.wait(lambda: widget._warm, RUN_S)

    @property
    def settings(self) -> Any:
        return self.widget._parameters

    @property
    def tool(self) -> Any:
        return self.widget.nodules.tool

    @property
    def node(self) -> Any:
        return self.settings.nodules

    def ras(self, index: tuple[float, ...]) -> tuple[float, ...]:
        """World RAS mm of an index (z, y, x) of the scan."""
        import vtk

        matrix, world = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
        self.settings.volume.GetIJKToRASMatrix(matrix)
        parent = self.settings.volume.GetParentTransformNode()
        if parent is not None:
            parent.GetMatrixTransformToWorld(world)
        return tuple(world.MultiplyPoint(matrix.MultiplyPoint([*index[::-1], 1.0]))[:3])

    def click(self, index: tuple[float, ...], ctrl: bool = False, view: str = "Red", wait: bool = True) -> None:
        """A click of the left button at an index (z, y, x), in a slice view that shows it."""
        import slicer
        import vtk

        widget, ras = slicer.app.layoutManager().sliceWidget(view), self.ras(index)
        node, interactor = widget.mrmlSliceNode(), widget.sliceView().interactor()
        node.JumpSliceByCentering(*ras)
        to_xy = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(node.GetXYToRAS(), to_xy)
        x, y = (round(v) for v in to_xy.MultiplyPoint([*ras, 1.0])[:2])
        for event in ("LeftButtonPressEvent", "LeftButtonReleaseEvent"):
            interactor.SetEventInformation(x, y, int(ctrl), 0)
            interactor.InvokeEvent(event)
        if wait:
            self.settle()

    def settle(self) -> None:
        self.gui.process_events()
        self.gui.wait(lambda: not self.tool.busy, RUN_S)
        lists = (self.widget.nodules.now, self.widget.nodules.earlier)
        self.gui.wait(lambda: not any(each._timer.active or each._pieces.busy for each in lists), RUN_S)
        self.gui.process_events()

    def mask(self, name: str, node: Any = None) -> np.ndarray:
        from UNetSegmentationLib.mrml import segment_mask

        return segment_mask(node or self.node, self.segments(node)[name], self.settings.volume)

    def segments(self, node: Any = None) -> dict[str, str]:
        from mrml_scenes import segments

        return segments(node or self.node)

    def tag(self, name: str, tag: str = PROMPTS_TAG) -> str:
        from UNetSegmentationLib.mrml import segment_tag

        return segment_tag(self.node.GetSegmentation().GetSegment(self.segments()[name]), tag)

    def table(self) -> list[list[str]]:
        table = self.ui.noduleTable
        return [[table.item(i, j).text() for j in range(table.columnCount)] for i in range(table.rowCount)]

    @contextmanager
    def unanswered(self) -> Iterator[None]:
        """The worker holds its breath, so that a click is on its way as long as this lasts."""
        from UNetSegmentationPanel import panelWorker

        pid = panelWorker().pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def arm(self) -> None:
        self.gui.click(self.ui.clickButton)
        assert self.tool.armed
        self.settle()


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * np.count_nonzero((a > 0) & (b > 0)) / (np.count_nonzero(a) + np.count_nonzero(b)))


def dots(positive: bool) -> list[tuple[float, ...]]:
    import slicer

    wanted = "Clicks" if positive else "Clicks, not part of it"
    for node in slicer.util.getNodesByClass("vtkMRMLMarkupsFiducialNode"):
        if node.GetAttribute("UNetSegmentation.Dots") == wanted:
            return [tuple(node.GetNthControlPointPositionWorld(i)) for i in range(node.GetNumberOfControlPoints())]
    return []


def test_a_click_makes_a_nodule(panel: Any) -> None:
    import slicer

    p = panel()
    assert not p.ui.clickButton.enabled and p.ui.clickMessage.text == "Choose a volume."
    p.settings.volume = scan()
    p.gui.process_events()
    assert p.ui.clickButton.enabled and not p.ui.noduleTable.visible and p.node is None
    p.arm()
    assert p.ui.clickMessage.text == "Click on the nodule in a slice view."
    assert slicer.app.layoutManager().sliceWidget("Green").sliceView().cursor_of_the_test is not None
    p.click(BALLS["left"][0])

    assert list(p.segments()) == ["Nodule 1"] and p.tool.segment == p.segments()["Nodule 1"]
    assert dice(p.mask("Nodule 1"), truth("left")) > 0.9
    segment = p.node.GetSegmentation().GetNthSegment(0)
    assert segment.GetRepresentation("Closed surface").GetNumberOfPoints() > 100
    assert "Nodule" in p.tag("Nodule 1", "TerminologyEntry")
    assert p.tag("Nodule 1", "UNetSegmentation.ClickModel") == p.tag("Nodule 1", "DICOM.SegmentAlgorithmName") == "aclick-1.0.0"
    assert p.tag("Nodule 1", "DICOM.SegmentAlgorithmType") == "SEMIAUTOMATIC"
    assert p.node.GetNodeReference(p.node.GetReferenceImageGeometryReferenceRole()) is p.settings.volume
    assert np.allclose(dots(True), [p.ras(BALLS["left"][0])], atol=0.8) and not dots(False)
    (row,) = p.table()
    assert row[0] == "Nodule 1" and float(row[2]) == pytest.approx(4 / 3 * np.pi * 7**3, rel=0.1)
    assert p.ui.noduleTable.currentRow() == 0 and p.ui.noduleNote.visible and p.ui.noduleNote.text == "By size only; not a diagnosis."
    p.gui.click(p.ui.clickButton)
    assert not p.tool.armed and slicer.app.layoutManager().sliceWidget("Green").sliceView().cursor_of_the_test is None
    p.click(BALLS["right"][0])
    assert list(p.segments()) == ["Nodule 1"]


def test_a_stack_of_pictures_is_clicked_in_pixels(panel: Any, tmp_path: Path) -> None:
    """As everything else sees it: of what was kept on the grid of its print's mm the training set would find nothing."""
    import slicer
    from UNetSegmentationLib import kept, mrml

    path = tmp_path / "stack.tif"
    pytest.importorskip("PIL.Image").fromarray(np.zeros(SHAPE[1:], np.uint8)).save(path, dpi=(300, 300))
    p = panel()
    sys.modules["UNetSegmentationPanel"].closeWorker()  # one that another test started keeps masks elsewhere
    volume = p.settings.volume = scan()
    volume.SetSpacing(25.4 / 300, 25.4 / 300, 1.0)
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(path))
    volume.SetAndObserveStorageNodeID(storage.GetID())
    p.gui.process_events()
    p.arm()
    p.click(BALLS["left"][0])
    assert dice(p.mask("Nodule 1"), truth("left")) > 0.7
    held = kept.find(p.tag("Nodule 1", mrml.DIGEST_TAG), mrml.image_from_volumes([volume]))
    assert held is not None and np.array_equal(held[0], p.mask("Nodule 1")[held[1].slices])
    titles = [p.ui.noduleTable.horizontalHeaderItem(j).text().replace("\n", " ") for j in range(2, 6)]
    assert titles == ["Volume (voxels)", "Mean (px)", "Longest (px)", "Perpendicular (px)"]
    assert int(p.table()[0][2]) == p.mask("Nodule 1").sum() and 14 < float(p.table()[0][4]) < 20

    def near() -> bool:
        (row,) = p.widget.nodules.now.rows
        x, y, z = row.measures["center"]
        return bool(np.allclose((-x, -y, z), p.ras(BALLS["left"][0]), atol=(0.1, 0.1, 1.0)))

    assert near()  # as the worker says, and then as the panel itself does
    p.widget.nodules.now._known.clear()
    p.widget.nodules.now.rows[0].label = None
    p.widget.nodules.now.rows[0].digest = ""
    p.widget.nodules.now._measure()
    p.settle()
    assert near() and int(p.table()[0][2]) == p.mask("Nodule 1").sum()


def test_another_module_finds_no_coarse_surface(panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not of an answer that comes after the panel was left."""
    from UNetSegmentationLib import mrml

    monkeypatch.setattr(mrml, "_SURFACE_VOXELS", 8)
    p = begun(panel, "left")
    held = p.node.GetSegmentation()

    def surfaces() -> list[int]:
        return [held.GetNthSegment(i).GetRepresentation("Closed surface").GetNumberOfPoints() for i in range(held.GetNumberOfSegments())]

    assert surfaces()[0] < 200
    p.gui.click(p.ui.nextNoduleButton)
    with p.unanswered():
        p.click(BALLS["right"][0], wait=False)
        p.gui.wait(lambda: not p.tool._pieces.busy, RUN_S)
        p.widget.exit()
        p.gui.wait(lambda: surfaces()[0] > 500, RUN_S)
    p.gui.wait(lambda: len(surfaces()) == 2 and not p.tool.busy, RUN_S)
    assert min(surfaces()) > 200


def begun(panel: Any, *names: str) -> Any:
    """A panel with a scan and these nodules clicked."""
    p = panel()
    p.settings.volume = scan()
    p.gui.process_events()
    p.arm()
    for i, name in enumerate(names):
        if i:
            p.gui.click(p.ui.nextNoduleButton)
        p.click(BALLS[name][0])
    return p


def everything(node: Any) -> Any:
    from mrml_scenes import segments_print

    held = node.GetSegmentation()
    prompts = [node.GetSegmentation().GetNthSegment(i).HasTag(PROMPTS_TAG) for i in range(held.GetNumberOfSegments())]
    return segments_print(held), prompts


VESSEL = (20, 40, 80)  # of the nodule on the right


def test_a_model_for_another_organ_makes_its_own_lesions(panel: Any, install: Callable[..., str]) -> None:
    label = {"value": 1, "name": "Liver lesion"}
    install(**{**TOY, "name": "bclick", "labels": [label], "surroundings": "any"})
    p = panel()
    p.settings.clickModel = "bclick-1.0.0"
    p.settings.volume = scan()
    p.gui.process_events()
    p.arm()
    p.click(BALLS["left"][0])
    (row,) = p.table()
    assert list(p.segments()) == ["Liver lesion 1"] and row[0] == "Liver lesion 1" and float(row[2]) > 1000
    assert row[6:8] == ["-", "-"] and row[9] == "-"  # neither texture nor size class


def test_clicks_refine_and_undo_brings_back_exactly_what_was(panel: Any) -> None:
    import slicer

    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "A reader's")
    p = begun(panel, "right")
    assert p.node.GetName() == "CT nodules" and p.tag("Nodule 1", "Segmentation.Status") == "inprogress"
    said = p.tag("Nodule 1", "TerminologyEntry").replace("27925004^Nodule", "4147007^Mass")
    p.node.GetSegmentation().GetNthSegment(0).SetTag("TerminologyEntry", said)
    states = [(everything(p.node), p.tag("Nodule 1"))]
    p.click(VESSEL, ctrl=True, view="Green")
    assert not p.mask("Nodule 1")[VESSEL] and len(dots(False)) == 1
    states.append((everything(p.node), p.tag("Nodule 1")))
    p.gui.click(p.ui.negativeButton)
    assert p.ui.negativeButton.checked
    p.click((20, 40, 84))
    assert len(dots(False)) == 2 and p.tag("Nodule 1").count("false") == 2 and len(p.segments()) == 1
    assert p.tag("Nodule 1", "TerminologyEntry") == said
    for state in reversed(states):
        p.gui.click(p.ui.undoClickButton)
        assert (everything(p.node), p.tag("Nodule 1")) == state
    p.settle()
    assert not dots(False) and len(dots(True)) == 1
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert p.node is None and not p.ui.noduleTable.visible and not dots(True) and not p.ui.undoClickButton.enabled
    assert not p.ui.negativeButton.checked and not slicer.util.getNodesByClass("vtkMRMLTableNode")
    p.click(BALLS["right"][0])
    assert list(p.segments()) == ["Nodule 1"]


def test_the_next_nodule_leaves_the_others_alone(panel: Any) -> None:
    p = begun(panel, "left", "right")
    assert list(p.segments()) == ["Nodule 1", "Nodule 2"] and dice(p.mask("Nodule 2"), truth("right")) > 0.8
    before = p.mask("Nodule 1")
    colors = {p.node.GetSegmentation().GetNthSegment(i).GetColor() for i in range(2)}
    assert len(colors) == 2
    # Over the first one: they overlap, and it keeps every voxel.
    p.gui.click(p.ui.nextNoduleButton)
    p.click((24, 48, 32))
    assert len(p.segments()) == 3 and (p.mask("Nodule 3") & before).any()
    assert np.array_equal(p.mask("Nodule 1"), before)
    assert [row[0] for row in p.table()] == ["Nodule 1", "Nodule 2", "Nodule 3"] and len(dots(True)) == 3
    p.node.GetSegmentation().SetSegmentIndex(p.segments()["Nodule 1"], 2)
    p.settle()
    assert [row[0] for row in p.table()] == ["Nodule 2", "Nodule 3", "Nodule 1"]
    # The last click is taken back where it was made, and the next one is made where it is to be.
    former, p.settings.nodules = p.node, None
    p.gui.process_events()
    p.click(BALLS["left"][0])
    mine, p.settings.nodules = p.node, former
    p.gui.process_events()
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert mine.GetScene() is None and p.node is former and len(p.segments()) == 3 and not p.tool.segment
    p.settings.nodules = None
    p.gui.process_events()
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert sorted(p.segments(former)) == ["Nodule 1", "Nodule 2"] and not p.tool.segment
    p.click(BALLS["right"][0])
    assert p.node is not former and list(p.segments()) == ["Nodule 1"] and len(p.segments(former)) == 2


def test_nothing_found_is_a_sentence_and_changes_nothing(panel: Any) -> None:
    import slicer

    p = begun(panel, "left")
    state, points = everything(p.node), dots(True)
    p.gui.click(p.ui.nextNoduleButton)
    p.click((2, 4, 90))
    assert p.ui.clickMessage.text.startswith("Nothing was found here")
    assert everything(p.node) == state and dots(True) == points
    p.click((2, 4, 90), ctrl=True)
    assert p.ui.clickMessage.text == "Click on the nodule first, then on what is not part of it."
    p.click((500, 48, 30))
    assert "outside the image" in p.ui.clickMessage.text and list(p.segments()) == ["Nodule 1"]
    # Two studies side by side: what is clicked at in the other one is not looked for in this one.
    composite = slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode()
    composite.SetBackgroundVolumeID(scan("Last year's").GetID())
    p.click(BALLS["right"][0])
    assert p.ui.clickMessage.text.startswith("This view shows 'Last year's' and not 'CT'") and everything(p.node) == state
    composite.SetForegroundVolumeID(p.settings.volume.GetID())
    p.click(BALLS["right"][0])
    assert list(p.segments()) == ["Nodule 1", "Nodule 2"] and p.ui.clickMessage.text.startswith("Nodule 2: click on")


def prompts_of(p: Any, name: str) -> list[Any]:
    from UNetSegmentationLib.mrml import prompts_from_text

    return prompts_from_text(p.tag(name), p.settings.volume)


def by_python(p: Any, prompts: list[Any]) -> np.ndarray:
    from UNetSegmentationLib import Options
    from UNetSegmentationLib.inference.click import ClickSession
    from UNetSegmentationLib.mrml import image_from_volume

    session = ClickSession(image_from_volume(p.settings.volume), p.tool.model.path, options=Options(threads=1))
    session.replay(prompts)
    return session.mask


@pytest.mark.parametrize("quick", [False, True])
def test_a_second_click_on_what_was_doubted_is_believed(panel: Any, quick: bool) -> None:
    import slicer

    p = panel()
    node = p.settings.volume = scan()
    array = made_scan()
    array[truth("left")] = -90  # fat
    slicer.util.updateVolumeFromArray(node, array)
    p.gui.process_events()
    p.arm()
    at = BALLS["left"][0]
    p.click(at, wait=not quick)
    if not quick:
        assert "is fat" in p.tool.text and p.node is None
    p.click((at[0], at[1] + 3, at[2]))
    assert p.tool.text == "" and dice(p.mask("Nodule 1"), truth("left")) > 0.9
    assert len(p.tool._controller.prompts) == 2
    p.tool.undo()
    p.settle()
    assert p.node is None and not p.tool._controller.prompts


def fat(*names: str) -> Any:
    """The scan, with fat for these balls."""
    import slicer

    array = made_scan()
    for name in names:
        array[truth(name)] = -90
    node = scan()
    slicer.util.updateVolumeFromArray(node, array)
    return node


def test_two_doubted_clicks_on_different_things_are_no_nodule(panel: Any) -> None:
    p = panel()
    p.settings.volume = fat(*BALLS)
    p.gui.process_events()
    p.arm()
    assert not p.ui.nextNoduleButton.enabled
    for name in BALLS:
        p.click(BALLS[name][0])
        assert "is fat" in p.ui.clickMessage.text and p.node is None and p.ui.nextNoduleButton.enabled
    p.gui.click(p.ui.nextNoduleButton)
    assert not p.ui.nextNoduleButton.enabled and p.ui.clickMessage.text == "Click on the nodule in a slice view."
    for found in (False, True):  # what was doubted before is another nodule's
        p.click(BALLS["right"][0])
        assert (p.node is not None) == found


def test_what_was_doubted_before_a_nodule_is_forgotten(panel: Any) -> None:
    p = panel()
    p.settings.volume = fat("left")
    p.gui.process_events()
    p.arm()
    for index in (BALLS["left"][0], BALLS["right"][0]):
        p.click(index)
    assert list(p.segments()) == ["Nodule 1"] and not p.tool.text
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    p.click((24, 51, 30))
    assert "is fat" in p.tool.text and p.node is None


def test_undo_of_a_doubted_click_leaves_the_other_nodules(panel: Any) -> None:
    p = panel()
    p.settings.volume = fat("left")
    p.gui.process_events()
    p.arm()
    p.click(BALLS["right"][0])
    p.gui.click(p.ui.nextNoduleButton)
    state = everything(p.node)
    p.click(BALLS["left"][0])
    assert "is fat" in p.ui.clickMessage.text and "click a second time at the same place" in p.ui.clickMessage.text
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert everything(p.node) == state and not p.tool.doubted and p.ui.clickMessage.text == "Click on the nodule in a slice view."
    p.click((24, 51, 30))  # what was doubted is forgotten
    assert "is fat" in p.ui.clickMessage.text and everything(p.node) == state
    p.click((24, 51, 30))  # the very same place
    assert sorted(p.segments()) == ["Nodule 1", "Nodule 2"]


def test_the_panel_gives_what_python_gives_also_under_a_transform(panel: Any) -> None:
    from mrml_scenes import add_transform, rotation

    p = panel()
    p.settings.volume = volume = scan()
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(20), (30, -12, 7)
    volume.SetAndObserveTransformNodeID(add_transform(matrix).GetID())
    p.arm()
    p.click(BALLS["right"][0])
    p.click(VESSEL, ctrl=True)
    assert p.node.GetParentTransformNode() is volume.GetParentTransformNode()
    points = [(True, BALLS["right"][0]), (False, VESSEL)]
    prompts = prompts_of(p, "Nodule 1")
    for (kind, *point, positive), (wanted, at) in zip(prompts, points, strict=True):
        r, a, s = p.ras(at)
        # The views' pixels are no voxels; a quarter of one is near enough.
        assert kind == "point" and positive is wanted and np.allclose(point, (-r, -a, s), atol=0.8)
    assert np.array_equal(p.mask("Nodule 1"), by_python(p, prompts))
    assert dice(p.mask("Nodule 1"), truth("right")) > 0.8


def paint(p: Any, name: str, mask: np.ndarray) -> None:
    """As the Segment Editor does it: voxels into the segment's labelmap."""
    from mrml_scenes import draw

    draw(p.node, p.segments()[name], mask.astype(np.uint8), p.settings.volume)


def test_a_corrected_mask_is_what_the_next_click_goes_on_from(panel: Any) -> None:
    p = begun(panel, "right")
    mine = corrected()
    paint(p, "Nodule 1", mine)
    p.settle()
    p.click(VESSEL, ctrl=True)
    prompts = prompts_of(p, "Nodule 1")
    assert [prompt[0] for prompt in prompts] == ["point", "mask", "point"]
    kept = np.zeros(SHAPE, np.uint8)
    start, shape = prompts[1][2], prompts[1][1].shape
    kept[tuple(slice(a, a + n) for a, n in zip(start, shape))] = prompts[1][1]
    assert np.array_equal(kept, mine)
    assert np.array_equal(p.mask("Nodule 1"), by_python(p, prompts))
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), mine)


def test_an_emptied_nodule_is_clicked_as_a_new_one(panel: Any) -> None:
    p = panel()
    p.settings.volume = fat("left")
    p.gui.process_events()
    p.arm()
    at = BALLS["left"][0]
    for _ in range(2):
        p.click(at)
    full = p.mask("Nodule 1")
    paint(p, "Nodule 1", 0 * full)
    p.settle()
    p.click(at, ctrl=True)
    assert p.tool.text == "Click on the nodule first, then on what is not part of it."
    p.click(at)
    assert "is fat" in p.tool.text
    p.click(at)
    assert p.tool.text == "" and list(p.segments()) == ["Nodule 1"] and np.array_equal(p.mask("Nodule 1"), full)
    assert [prompt[0] for prompt in prompts_of(p, "Nodule 1")] == ["point", "point"]


def test_the_segment_editors_undo_and_the_panels_take_back_one_action_each(panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicer
    from standins import effects

    effects.install()
    p = begun(panel, "left")
    editor = slicer.qMRMLSegmentEditorWidget()
    editor.setMRMLScene(slicer.mrmlScene)
    editor.setMRMLSegmentEditorNode(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode"))
    editor.setSegmentationNode(p.node)
    monkeypatch.setattr(slicer.modules, "SegmentEditorWidget", SimpleNamespace(editor=editor), raising=False)
    clicked, brushed = p.mask("Nodule 1"), corrected()

    def there() -> list[tuple[str, int]]:
        p.settle()
        return [(name, int(p.mask(name).sum())) for name in sorted(p.segments())]

    editor.saveStateForUndo()
    paint(p, "Nodule 1", brushed)
    one = there()
    p.gui.click(p.ui.nextNoduleButton)
    p.click(BALLS["right"][0])
    two = there()
    assert len(two) == 2 and two[:1] == one and np.array_equal(p.mask("Nodule 1"), brushed)
    editor.undo()
    assert there() == one
    editor.redo()
    assert there() == two
    p.gui.click(p.ui.undoClickButton)
    assert there() == one
    editor.undo()  # what the panel took back
    assert there() == two
    editor.undo()
    editor.undo()
    assert there() == [("Nodule 1", int(clicked.sum()))] and np.array_equal(p.mask("Nodule 1"), clicked)
    p.click(BALLS["right"][0])
    assert there() == [("Nodule 1", int(clicked.sum())), two[1]]
    editor._delete()


def test_undo_is_of_the_frame_that_is_shown(panel: Any) -> None:
    import slicer

    scene, scans, drawn = slicer.mrmlScene, *(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", name) for name in ("4D", "drawn"))
    frame = scan("frame")
    for value in "01":
        scans.SetDataNodeAtValue(frame, value)
        drawn.SetDataNodeAtValue(slicer.vtkMRMLSegmentationNode(), value)
    scene.RemoveNode(frame)
    browser = scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode")
    browser.SetAndObserveMasterSequenceNodeID(scans.GetID())
    browser.AddSynchronizedSequenceNode(drawn)
    browser.SetSaveChanges(drawn, True)
    p = panel()
    p.settings.volume, p.settings.nodules = (browser.GetProxyNode(of) for of in (scans, drawn))
    p.node.CreateDefaultDisplayNodes()
    p.gui.process_events()
    p.arm()
    p.click(BALLS["left"][0])
    assert p.ui.undoClickButton.enabled
    browser.SetSelectedItemNumber(1)
    p.settle()
    assert not p.ui.undoClickButton.enabled
    p.tool.undo()
    browser.SetSelectedItemNumber(0)
    p.settle()
    assert list(p.segments()) == ["Nodule 1"] and p.ui.undoClickButton.enabled
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert not p.segments()


def test_a_mask_too_large_to_look_at_stays_as_it_is(panel: Any, install: Callable[..., str]) -> None:
    install(**{**TOY, "patch": [32, 16, 16]})  # which sees 44 mm at most
    p = begun(panel, "right")
    wide = np.zeros(SHAPE, np.uint8)
    wide[18:22, 38:42, :90] = 1
    paint(p, "Nodule 1", wide)
    p.settle()
    for at, ctrl in ((BALLS["right"][0], False), ((20, 40, 20), True)):
        p.click(at, ctrl=ctrl)
        assert p.ui.clickMessage.text.startswith("This was not taken: what is marked") and np.array_equal(p.mask("Nodule 1"), wide)


def test_what_the_furthest_look_cuts_is_said_to_be_cut_wherever_its_size_is(
    panel: Any, install: Callable[..., str], tmp_path: Path
) -> None:
    import slicer
    from UNetSegmentationLib.inference.click import BEYOND
    from UNetSegmentationLib.mrml import CUT_TAG, size_text

    install(**{**TOY, "patch": [32, 16, 16]})  # which sees 44 mm at most
    p, array = panel(), np.full(SHAPE, -850, np.int16)
    array[12:36, 34:62] = 30
    p.settings.volume = scan()
    slicer.util.updateVolumeFromArray(p.settings.volume, array)
    p.gui.process_events()
    p.arm()
    for _ in range(2):  # the first one is doubted
        p.click((24, 48, 48))
    assert p.tool.text == BEYOND and p.ui.noduleNote.text.count(BEYOND) == exported(p, tmp_path)[0][-1].count(BEYOND) == 1
    mask = p.mask("Nodule 1").copy()
    mask[tuple(np.argwhere(mask).mean(0).astype(int))] = 0  # which makes its size no truer, nor does a crop of the scan
    paint(p, "Nodule 1", mask)
    p.settle()
    assert p.ui.noduleNote.text.count(BEYOND) == exported(p, tmp_path)[0][-1].count(BEYOND) == 1
    volume, first = p.settings.volume, p.ras((4, 0, 0))
    slicer.util.updateVolumeFromArray(volume, array[4:].copy())
    volume.SetOrigin(first)
    p.gui.process_events()
    p.settle()
    assert p.ui.noduleNote.text.count(BEYOND) == exported(p, tmp_path)[0][-1].count(BEYOND) == 1
    paint(p, "Nodule 1", truth("left")[4:])  # whose size is true
    p.settle()
    assert BEYOND not in p.ui.noduleNote.text + exported(p, tmp_path)[0][-1]
    old = truth("left")[4:]
    _before, earlier = last_year(p, Old=old)
    size = size_text(old[np.ix_(*(np.unique(i) for i in old.nonzero()))])
    earlier.GetSegmentation().GetNthSegment(0).SetTag(CUT_TAG, size)
    p.settle()
    assert f"Earlier: {BEYOND}" in exported(p, tmp_path)[0][-1]


@pytest.mark.parametrize("suffix", [".mrb", ".seg.nrrd"])
def test_a_saved_nodule_is_refined_later(panel: Any, tmp_path: Path, suffix: str) -> None:
    import slicer

    p = begun(panel, "left", "right")
    p.click(VESSEL, ctrl=True)
    before, text = p.mask("Nodule 2"), p.tag("Nodule 2")
    first = p.mask("Nodule 1")
    if suffix == ".mrb":
        p.gui.save_scene(tmp_path / "scene.mrb")
        p.gui.load_scene(tmp_path / "scene.mrb")
        assert not [
            n for n in slicer.util.getNodesByClass("vtkMRMLMarkupsFiducialNode") if n.GetName() not in ("Clicks", "Clicks, not part of it")
        ]
    else:
        path = tmp_path / "nodules.seg.nrrd"
        assert slicer.util.saveNode(p.node, str(path))
        p.gui.close_scene()
        volume = scan()
        node = slicer.util.loadSegmentation(str(path))
        p.settings.volume, p.settings.nodules = volume, node
    p.gui.wait(lambda: p.node is not None, RUN_S)
    p.settle()
    assert list(p.segments()) == ["Nodule 1", "Nodule 2"] and p.tag("Nodule 2") == text
    assert np.array_equal(p.mask("Nodule 2"), before)
    assert len(dots(True)) == 2 and len(dots(False)) == 1 and len(p.table()) == 2

    p.ui.noduleTable.setCurrentCell(1, 0)
    p.arm()
    p.click((20, 40, 84), ctrl=True)
    prompts = prompts_of(p, "Nodule 2")
    assert [(k, v[-1]) for k, *v in prompts] == [("point", True), ("point", False), ("point", False)]  # no mask: it is as it was left
    assert np.array_equal(p.mask("Nodule 2"), by_python(p, prompts)) and np.array_equal(p.mask("Nodule 1"), first)
    for _ in range(2):  # beyond what was clicked in this session
        p.gui.click(p.ui.undoClickButton)
        p.settle()
    assert np.array_equal(p.mask("Nodule 2"), by_python(p, prompts[:1])) and np.array_equal(p.mask("Nodule 1"), first)


def test_a_box_is_a_prompt_too(panel: Any) -> None:
    import slicer

    p = begun(panel)
    p.gui.click(p.ui.clickBoxButton)
    interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
    assert interaction.GetCurrentInteractionMode() == interaction.Place
    p.click(BALLS["right"][0])  # belongs to the box
    assert p.node is None
    (roi,) = slicer.util.getNodesByClass("vtkMRMLMarkupsROINode")
    roi.SetCenterWorld(p.ras(BALLS["left"][0]))
    roi.SetSizeWorld([20, 20, 20])
    interaction.SwitchToViewTransformMode()
    p.gui.wait(lambda: p.node is not None, RUN_S)
    p.settle()
    assert prompts_of(p, "Nodule 1")[0][0] == "box" and dice(p.mask("Nodule 1"), truth("left")) > 0.8
    p.gui.wait(lambda: not slicer.util.getNodesByClass("vtkMRMLMarkupsROINode"), RUN_S)


@pytest.mark.parametrize("k", [0, 24])
def test_a_box_within_one_slice_is_a_box(panel: Any, k: int) -> None:
    import slicer

    p = panel()
    p.settings.volume = node = scan()
    slicer.util.arrayFromVolume(node)[:] = np.roll(made_scan(), k - BALLS["left"][0][0], 0)
    slicer.util.arrayFromVolumeModified(node)
    p.gui.process_events()
    p.arm()
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    roi.SetCenterWorld(p.ras((k, *BALLS["left"][0][1:])))
    roi.SetSizeWorld([20, 20, 0.8 * SPACING[2]])
    p.tool.box(roi)
    p.settle()
    assert p.tool.text == "" and dice(p.mask("Nodule 1")[k], truth("left")[BALLS["left"][0][0]]) > 0.9
    assert np.array_equal(p.mask("Nodule 1"), by_python(p, prompts_of(p, "Nodule 1")))


def test_a_box_in_a_turned_scan_is_the_command_lines_and_one_too_large_changes_nothing(panel: Any, install: Callable[..., str]) -> None:
    import slicer
    from UNetSegmentationLib.cli import parse_roi
    from UNetSegmentationLib.inference.click import box_prompt
    from UNetSegmentationLib.mrml import image_from_volume

    install(**{**TOY, "patch": [32, 16, 16]})  # which sees 44 mm at most
    p = panel()
    p.settings.volume = node = scan()
    c = np.sqrt(0.5)
    node.SetIJKToRASDirections(c, -c, 0, c, c, 0, 0, 0, 1)
    p.gui.process_events()
    p.arm()
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    r, a, s = p.ras(BALLS["left"][0])
    roi.SetCenterWorld((r, a, s))
    roi.SetSizeWorld([20, 20, 20])
    p.tool.box(roi)
    p.settle()
    image = image_from_volume(node)
    same = box_prompt(image, parse_roi(f"{r - 10},{r + 10},{a - 10},{a + 10},{s - 10},{s + 10}", image))
    (prompt,) = prompts_of(p, "Nodule 1")
    assert prompt[0] == "box" and np.allclose(prompt[1:], same[1:]) and dice(p.mask("Nodule 1"), truth("left")) > 0.8
    state = everything(p.node)
    roi.SetSizeWorld([70, 70, 20])
    p.tool.box(roi)
    p.settle()
    assert p.tool.text == "The box is too large for one lesion; draw it closer around the lesion."
    assert everything(p.node) == state and len(p.tool._controller.prompts) == 1


def test_a_key_arms_and_escape_disarms(panel: Any) -> None:
    p = panel()
    p.settings.volume = scan()
    p.gui.process_events()
    p.gui.press(p.widget.root, "Ctrl+Shift+K")
    assert p.tool.armed and p.ui.clickButton.checked
    p.gui.press(p.widget.root, "Esc")
    assert not p.tool.armed and not p.ui.clickButton.checked
    p.arm()
    p.gui.leave(p.widget)
    assert not p.tool.armed


def test_drags_and_shift_stay_slicers(panel: Any) -> None:
    import slicer
    import vtk

    p = begun(panel)
    heard: list[str] = []
    interactor = slicer.app.layoutManager().sliceWidget("Red").sliceView().interactor()
    tags = [interactor.AddObserver(e, lambda c, e: heard.append(e)) for e in ("LeftButtonPressEvent", "LeftButtonReleaseEvent")]
    for shift, ctrl, alt, to in ((0, 0, 1, 100), (1, 0, 0, 100), (0, 1, 0, 140)):
        interactor.SetAltKey(alt)
        interactor.SetEventInformation(100, 100, ctrl, shift)
        interactor.InvokeEvent("LeftButtonPressEvent")
        interactor.SetEventInformation(to, 100, ctrl, shift)
        interactor.InvokeEvent("LeftButtonReleaseEvent")
    assert len(heard) == 6 and p.node is None and not p.tool.busy
    window = vtk.vtkRenderWindow()
    window.SetDPI(144)  # as Slicer's views have it where a pixel of Qt's is two of the screen's
    interactor.SetInteractorStyle(None)
    interactor.SetRenderWindow(window)
    try:
        for to, busy in ((107, False), (106, True)):
            interactor.SetEventInformation(100, 100, 0, 0)
            interactor.InvokeEvent("LeftButtonPressEvent")
            interactor.SetEventInformation(to, 100, 0, 0)
            interactor.InvokeEvent("LeftButtonReleaseEvent")
            assert len(heard) == 6 and p.tool.busy == busy
    finally:
        interactor.SetRenderWindow(None)
    p.settle()
    for tag in tags:
        interactor.RemoveObserver(tag)


def test_a_tool_of_slicers_keeps_its_clicks(panel: Any) -> None:
    import slicer

    p = begun(panel)
    interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
    for mode in (interaction.AdjustWindowLevel, interaction.Place):
        interaction.SetCurrentInteractionMode(mode)
        p.click(BALLS["left"][0])
        assert p.node is None
    for mode in (interaction.ViewTransform, interaction.Select, interaction.User):  # in which no tool takes them
        interaction.SetCurrentInteractionMode(mode)
        p.click(BALLS["left"][0])
        assert list(p.segments()) == ["Nodule 1"]
        p.tool.undo()
        p.settle()
    p.tool.disarm()
    interaction.SetCurrentInteractionMode(interaction.Place)  # left on, as Slicer's persistent placing is
    p.gui.click(p.ui.clickButton)
    assert interaction.GetCurrentInteractionMode() == interaction.ViewTransform


def test_the_press_says_whose_a_click_is_and_what_it_means(panel: Any) -> None:
    """The key is let go before the button now and then."""
    import slicer
    from UNetSegmentationPanel.nodules import ViewClicks

    interactor = slicer.app.layoutManager().sliceWidget("Red").sliceView().interactor()
    heard: list[str] = []
    tags = [interactor.AddObserver(e, lambda c, e: heard.append(e)) for e in ("LeftButtonPressEvent", "LeftButtonReleaseEvent")]
    got: list[bool] = []
    views = ViewClicks(lambda ras, positive, composite: got.append(positive))
    views.start()
    try:
        for pressed, released, slicers, meant in (
            ((0, 1), (0, 0), 2, []),  # ctrl, shift: Slicer drags from the press on
            ((1, 0), (0, 0), 2, [False]),
            ((0, 0), (1, 0), 0, [True]),
            ((0, 0), (0, 1), 0, [True]),
        ):
            for event, (ctrl, shift) in (("LeftButtonPressEvent", pressed), ("LeftButtonReleaseEvent", released)):
                interactor.SetEventInformation(100, 100, ctrl, shift)
                interactor.InvokeEvent(event)
            assert (len(heard), got) == (slicers, meant)
            heard.clear(), got.clear()
    finally:
        views.stop()
        for tag in tags:
            interactor.RemoveObserver(tag)


def test_a_hidden_nodule_is_shown_when_it_changes(panel: Any) -> None:
    p = begun(panel, "left")
    display, segment = p.node.GetDisplayNode(), p.tool.segment
    for hide in (lambda: display.SetSegmentVisibility(segment, False), lambda: display.SetVisibility(False)):
        hide()
        p.click((24, 48, 33))
        assert display.GetVisibility() and display.GetSegmentVisibility(segment)


# ---------------------------------------------------------------------------------------------------------------- table


def corrected() -> np.ndarray:
    mine = truth("right")
    mine[:, :, :66] = False
    return mine


def reopened(p: Any, path: Path) -> Any:
    p.gui.save_scene(path)
    p.gui.load_scene(path)
    p.gui.wait(lambda: p.node is not None, RUN_S)
    p.settle()
    p.ui.noduleTable.setCurrentCell(0, 0)
    p.settle()
    return p


def test_undo_asks_before_it_drops_what_was_corrected_since(panel: Any, tmp_path: Path) -> None:
    p = begun(panel, "right")
    first = p.mask("Nodule 1")
    p.click(VESSEL, ctrl=True)
    paint(p, "Nodule 1", corrected())
    p.settle()
    for again in (False, True):
        if again:
            reopened(p, tmp_path / "scene.mrb")
        p.gui.dialogs.answer(False)
        p.gui.click(p.ui.undoClickButton)
        p.settle()
        assert "corrected elsewhere" in p.gui.dialogs.texts("message")[-1]
        assert np.array_equal(p.mask("Nodule 1"), corrected()) and len(prompts_of(p, "Nodule 1")) == 2
    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), first) and len(prompts_of(p, "Nodule 1")) == 1


def test_a_nodule_is_clicked_on_after_another_module_was_open(panel: Any) -> None:
    p = begun(panel, "right")
    p.widget.exit()
    p.settle()
    p.widget.enter()
    p.settle()
    assert p.tool.segment == p.segments()["Nodule 1"]
    p.arm()
    with p.unanswered():
        p.click(VESSEL, ctrl=True, wait=False)
        p.gui.wait(lambda: not p.tool._pieces.busy, RUN_S)
        p.widget.exit()
        p.gui.process_events()
        p.widget.enter()
        p.gui.process_events()
    p.settle()
    assert p.tool.text == "" and list(p.segments()) == ["Nodule 1"] and not p.mask("Nodule 1")[VESSEL]


@pytest.mark.parametrize("then", ["click", "undo"])
def test_what_was_clicked_in_the_segment_editor_is_gone_on_from(panel: Any, then: str) -> None:
    from UNetSegmentationLib import mrml

    p = begun(panel, "right")
    more = prompts_of(p, "Nodule 1")
    more += [("point", -r, -a, s, False) for r, a, s in map(p.ras, (VESSEL, (20, 40, 84)))]
    mask, segment = by_python(p, more), p.node.GetSegmentation().GetSegment(p.segments()["Nodule 1"])
    paint(p, "Nodule 1", mask)
    segment.SetTag(PROMPTS_TAG, mrml.prompts_text(more, p.settings.volume))
    segment.SetTag(mrml.DIGEST_TAG, mrml.mask_digest(mask, (0, 0, 0)))
    p.settle()
    assert len(dots(False)) == 2
    if then == "click":
        p.click((20, 41, 70))
        prompts = prompts_of(p, "Nodule 1")
        assert [(k, v[-1]) for k, *v in prompts] == [("point", True), ("point", False), ("point", False), ("point", True)]
        assert np.array_equal(p.mask("Nodule 1"), by_python(p, prompts))
    else:
        p.gui.dialogs.answer(False)
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), mask) and len(dots(False)) == 2
    p.gui.dialogs.answer(True)
    if then == "click":
        p.click(BALLS["right"][0])
        assert len(prompts_of(p, "Nodule 1")) == 4
    else:
        p.gui.click(p.ui.undoClickButton)
        p.settle()
        assert p.node is None
        assert all("corrected elsewhere" in text for text in p.gui.dialogs.texts("message"))


def test_after_undo_the_model_that_is_chosen_now_is_asked(panel: Any, install: Callable[..., str]) -> None:
    install(**{**TOY, "name": "bclick"})
    p = begun(panel, "right")
    p.click(VESSEL, ctrl=True)
    p.settings.clickModel = "bclick-1.0.0"
    p.gui.process_events()
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    p.click((20, 40, 84), ctrl=True)
    assert list(p.segments()) == ["Nodule 1"] and p.tag("Nodule 1", "UNetSegmentation.ClickModel") == "bclick-1.0.0"


def test_undo_in_a_reopened_scene_comes_back_to_a_corrected_mask(panel: Any, tmp_path: Path) -> None:
    p = begun(panel, "right")
    first = p.mask("Nodule 1")
    paint(p, "Nodule 1", corrected())
    p.settle()
    p.click(VESSEL, ctrl=True)
    reopened(p, tmp_path / "scene.mrb")
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), corrected()) and [q[0] for q in prompts_of(p, "Nodule 1")] == ["point", "mask"]
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), first)


def test_a_prompt_that_fails_leaves_the_corrected_mask_to_the_next_one(panel: Any) -> None:
    import slicer

    p = begun(panel, "right")
    paint(p, "Nodule 1", corrected())
    p.settle()
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    roi.SetXYZ(5000, 5000, 5000)
    roi.SetRadiusXYZ(5, 5, 5)
    p.tool.box(roi)
    p.settle()
    assert "lies outside volume" in p.tool.text and [q[0] for q in p.tool._controller.prompts] == ["point"]
    p.click(VESSEL, ctrl=True)
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), corrected())


def test_a_nodule_that_was_moved_with_its_scan_can_be_clicked_on(panel: Any) -> None:
    from mrml_scenes import add_transform

    p = begun(panel, "right")
    move = np.eye(4)
    move[:3, 3] = 25, 10, 5
    transform = add_transform(move)
    for node in (p.settings.volume, p.node):
        node.SetAndObserveTransformNodeID(transform.GetID())
    p.settle()
    assert np.allclose(dots(True), [p.ras(BALLS["right"][0])], atol=0.8)
    p.click(VESSEL, ctrl=True)
    assert p.tool.text == "" and len(dots(False)) == 1
    assert np.array_equal(p.mask("Nodule 1"), by_python(p, prompts_of(p, "Nodule 1")))
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.allclose(dots(True), [p.ras(BALLS["right"][0])], atol=0.8) and not dots(False)


def harden(p: Any, degrees: float = 30) -> None:
    """Turn the scan and its nodules, and make that their own place."""
    from mrml_scenes import add_transform, rotation

    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation(degrees), (25, 10, 5)
    transform = add_transform(move)
    for node in (p.settings.volume, p.node):
        node.SetAndObserveTransformNodeID(transform.GetID())
    p.settle()
    for node in (p.settings.volume, p.node):
        node.HardenTransform()
    p.settle()


@pytest.mark.parametrize("where", ["here", "reopened", "reopened, of an earlier version"])
def test_a_nodule_whose_scan_was_hardened_can_be_clicked_on(panel: Any, tmp_path: Path, where: str) -> None:
    from UNetSegmentationPanel import panelWorker

    p = begun(panel, "right")
    first, folder = p.mask("Nodule 1"), panelWorker()._session.folder
    sent = set(folder.glob("volume-*"))
    if where == "reopened, of an earlier version":  # which kept mm alone
        p.node.GetSegmentation().GetNthSegment(0).SetTag(PROMPTS_TAG, json.dumps(json.loads(p.tag("Nodule 1"))[1:]))
    else:
        harden(p)
    rows = p.table()
    if where != "here":
        reopened(p, tmp_path / "scene.mrb")
        assert p.tool.segment
    assert np.array_equal(p.mask("Nodule 1"), first) and p.table() == rows
    assert np.allclose(dots(True), [p.ras(BALLS["right"][0])], atol=0.8)
    p.tool.arm()
    p.click(VESSEL, ctrl=True)
    prompts = prompts_of(p, "Nodule 1")
    assert p.tool.text == "" and [(k, v[-1]) for k, *v in prompts] == [("point", True), ("point", False)]
    assert np.allclose(dots(False), [p.ras(VESSEL)], atol=0.8)
    second = p.mask("Nodule 1")
    assert np.array_equal(second, by_python(p, prompts)) and not second[VESSEL] and first[VESSEL]
    if where == "here":
        assert set(folder.glob("volume-*")) == sent  # not again, only their place
        harden(p, -70)
        assert np.array_equal(p.mask("Nodule 1"), second)
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert np.array_equal(p.mask("Nodule 1"), first)
    assert np.allclose(dots(True), [p.ras(BALLS["right"][0])], atol=0.8) and not dots(False)
    p.click(VESSEL, ctrl=True)
    assert dice(p.mask("Nodule 1"), second) > 0.99 and len(prompts_of(p, "Nodule 1")) == 2


def test_undo_in_a_reopened_scene_whose_scan_was_moved_since(panel: Any, tmp_path: Path) -> None:
    p = begun(panel, "right")
    first = p.mask("Nodule 1")
    p.click(VESSEL, ctrl=True)
    reopened(p, tmp_path / "scene.mrb")
    harden(p)
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert p.tool.text == "" and dice(p.mask("Nodule 1"), first) > 0.98 and len(prompts_of(p, "Nodule 1")) == 1


def warp() -> Any:
    """A transform that is not linear, in the scene."""
    import slicer
    import vtk

    node, spline = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode"), vtk.vtkThinPlateSplineTransform()
    here, there = vtk.vtkPoints(), vtk.vtkPoints()
    for place in ((0, 0, 0), (50, 0, 0), (0, 50, 0), (0, 0, 50), (20, 20, 20)):
        here.InsertNextPoint(place)
        there.InsertNextPoint(*(v + 3 * (place[0] == 20) for v in place))
    spline.SetSourceLandmarks(here)
    spline.SetTargetLandmarks(there)
    spline.SetBasisToR()
    node.SetAndObserveTransformToParent(spline)
    return node


def test_a_scan_that_gets_bent_while_a_click_runs(panel: Any) -> None:
    p = begun(panel, "right")
    before = p.mask("Nodule 1")
    bent = warp()
    with p.unanswered():
        p.click(VESSEL, ctrl=True, wait=False)
        for _ in range(20):
            p.gui.process_events()
        p.settings.volume.SetAndObserveTransformNodeID(bent.GetID())
    p.gui.wait(lambda: not p.tool.busy, RUN_S)
    assert "changed meanwhile" in p.tool.text
    p.gui.click(p.ui.nextNoduleButton)
    volume, p.settings.volume = p.settings.volume, scan("another")
    p.settle()
    p.settings.volume = volume  # the panel goes on, but has no place for the dots
    p.settle()
    assert p.node is not None and not dots(True)
    p.settings.volume.SetAndObserveTransformNodeID(None)
    p.settle()
    assert p.table() and dots(True) and np.array_equal(p.mask("Nodule 1"), before)


@POSIX
def test_a_click_after_an_undo_that_was_cancelled_can_be_undone(panel: Any, tmp_path: Path) -> None:
    p = begun(panel, "left", "right")
    p.click(VESSEL, ctrl=True)
    reopened(p, tmp_path / "scene.mrb")
    p.ui.noduleTable.setCurrentCell(1, 0)
    p.arm()
    with p.unanswered():
        for busy in (True, False):
            p.gui.click(p.ui.undoClickButton)
            p.gui.process_events()
            assert p.tool.busy == busy
    p.settle()
    assert len(prompts_of(p, "Nodule 2")) == 2
    p.ui.noduleTable.setCurrentCell(0, 0)
    paint(p, "Nodule 1", truth("left") & (np.indices(SHAPE)[0] < 24))
    p.settle()
    state = everything(p.node), p.tag("Nodule 1")
    p.click((24, 48, 33))
    assert p.tag("Nodule 1") != state[1]
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert (everything(p.node), p.tag("Nodule 1")) == state


def test_a_nodule_whose_prompts_cannot_be_read_is_gone_on_from(panel: Callable[[], Hands], monkeypatch: pytest.MonkeyPatch) -> None:
    from UNetSegmentationLib import mrml

    p = begun(panel, "right")
    painted = truth("right") | truth("left")
    painted[20:22, 42:46, 30:70] = True
    paint(p, "Nodule 1", painted)
    p.settle()
    p.click((24, 48, 34))
    before = p.mask("Nodule 1")
    p.gui.click(p.ui.nextNoduleButton)
    p.settle()

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(mrml, "decode_prompts", full)
    p.tool.select(p.segments()["Nodule 1"])
    p.settle()
    p.click((20, 40, 72))
    assert p.mask("Nodule 1").sum() > 0.8 * before.sum()  # of the click alone it would be a third


def test_undo_is_of_the_nodule_that_is_chosen(panel: Any) -> None:
    import slicer

    p = begun(panel, "right", "left")

    def choose(row: int) -> None:
        p.ui.noduleTable.setCurrentCell(row, 0)
        p.settle()

    def undo() -> tuple[list[str], bool]:
        p.gui.click(p.ui.undoClickButton)
        p.settle()
        return sorted(p.segments()), np.array_equal(p.mask("Nodule 2"), two)

    first = p.mask("Nodule 1")
    choose(0)
    p.click(VESSEL, ctrl=True)
    choose(1)
    p.click((24, 48, 33))
    two = p.mask("Nodule 2")
    choose(0)
    assert "whose row is chosen" in p.ui.undoClickButton.toolTip
    assert undo() == (["Nodule 1", "Nodule 2"], True) and np.array_equal(p.mask("Nodule 1"), first)
    assert len(prompts_of(p, "Nodule 2")) == 2 and len(dots(True)) == 3
    assert undo() == (["Nodule 2"], True) and not p.tool.segment and p.ui.undoClickButton.enabled
    # None is chosen: the last click of all. What is gone has no clicks to be taken back.
    p.click(BALLS["right"][0])
    p.node.GetSegmentation().RemoveSegment(p.tool.segment)
    p.settle()
    undo()
    p.ui.noduleTable.setCurrentCell([row[0] for row in p.table()].index("Nodule 2"), 0)
    p.settle()
    undo()
    assert len(prompts_of(p, "Nodule 2")) == 1
    p.gui.click(p.ui.undoClickButton)
    p.settle()
    assert p.node is None and not slicer.util.getNodesByClass("vtkMRMLTableNode")  # whichever was first


@POSIX
def test_a_worker_that_hangs_at_a_click_is_ended_by_undo(panel: Any) -> None:
    from UNetSegmentationPanel import panelWorker

    p = begun(panel, "right")
    pid = panelWorker().pid
    os.kill(pid, signal.SIGSTOP)
    p.click(VESSEL, ctrl=True, wait=False)
    for _ in range(20):
        p.gui.process_events()
    p.gui.click(p.ui.undoClickButton)
    p.click(VESSEL, ctrl=True)
    assert panelWorker().pid != pid and len(prompts_of(p, "Nodule 1")) == 2


def test_a_closed_scene_leaves_no_voxels_with_the_worker(panel: Any) -> None:
    from UNetSegmentationPanel import panelWorker

    p = begun(panel, "right")
    folder = panelWorker()._session.folder
    assert list(folder.glob("volume-*"))
    p.gui.close_scene()
    p.gui.wait(lambda: not list(folder.glob("volume-*")), RUN_S)


def test_the_table_follows_edits_and_leads_to_the_nodule(panel: Any, tmp_path: Path) -> None:
    import qt
    import slicer

    p = begun(panel, "left", "right")
    one, two = p.table()
    half = truth("left")
    half[:24] = False
    paint(p, "Nodule 1", half)
    p.settle()
    assert float(p.table()[0][2]) < 0.7 * float(one[2]) and p.table()[1] == two

    p.ui.noduleTable.setCurrentCell(1, 0)
    p.ui.noduleTable.setCurrentCell(0, 0)
    center = slicer.app.layoutManager().sliceWidget("Green").mrmlSliceNode().GetSliceToRAS()
    assert np.allclose([center.GetElement(i, 3) for i in range(3)], p.ras((26, 48, 30)), atol=2)
    assert p.tool.segment == p.segments()["Nodule 1"]

    p.gui.click(p.ui.copyNodulesButton)
    lines = qt.QApplication.clipboard().text().splitlines()
    assert lines[0].split("\t")[:2] == ["Nodule", "Side"] and lines[-1] == "By size only; not a diagnosis."
    p.gui.dialogs.answer(str(tmp_path / "nodules.csv"))
    p.gui.click(p.ui.exportNodulesButton)
    with open(tmp_path / "nodules.csv", encoding="utf-8-sig", newline="") as f:
        titles, *rows = csv.reader(f)
    assert titles[-1] == "Note" and [r[0] for r in rows] == ["Nodule 1", "Nodule 2"] and rows[0][-1] == "By size only; not a diagnosis."
    from UNetSegmentationLib.mrml import NODULES_ROLE, find_table

    node = find_table(p.node, NODULES_ROLE)
    assert [node.GetCellText(i, 0) for i in range(node.GetNumberOfRows())] == ["Nodule 1", "Nodule 2"]

    cut = truth("right")
    cut[:20, 40, 70] = True
    paint(p, "Nodule 2", cut)
    p.settle()
    assert p.ui.noduleNote.text == "By size only; not a diagnosis."
    p.ui.noduleTable.setCurrentCell(1, 0)
    assert "Nodule 2: It reaches the edge of the scan" in p.ui.noduleNote.text
    p.gui.click(p.ui.copyNodulesButton)
    assert qt.QApplication.clipboard().text().splitlines()[-2].startswith("Nodule 2: It reaches the edge")
    p.ui.noduleTable.setCurrentCell(0, 0)

    p.node.GetSegmentation().GetSegment(p.segments()["Nodule 1"]).SetName("The large one")
    p.settle()
    assert p.table()[0][0] == "The large one" and p.ui.clickMessage.text.startswith("The large one: click on what is missing")
    p.node.GetSegmentation().RemoveSegment(p.segments()["The large one"])
    p.settle()
    assert [row[0] for row in p.table()] == ["Nodule 2"] and node.GetNumberOfRows() == 1 and not p.tool.segment
    assert not p.ui.nextNoduleButton.enabled and p.ui.clickMessage.text == "Click on the nodule in a slice view."


def test_what_a_stroke_left_is_measured_in_pieces(panel: Any) -> None:
    p = begun(panel, "left")
    half = truth("left")
    half[:24] = False
    paint(p, "Nodule 1", half)
    pieces = sum(1 for _ in p.widget.nodules.now._steps())
    assert pieces > 2 * np.count_nonzero(half.any((1, 2)))
    (row,) = p.widget.nodules.now.rows
    assert row.measures["voxels"] == np.count_nonzero(half)
    p.settle()


def dated(volume: Any, date: str) -> None:
    """Put a volume into a study of a date, as the DICOM module does."""
    import slicer

    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    words = slicer.vtkMRMLSubjectHierarchyConstants
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), date)
    hierarchy.SetItemAttribute(study, words.GetDICOMStudyDateAttributeName(), date)
    hierarchy.CreateItem(study, volume)


def exported(p: Any, folder: Path) -> list[list[str]]:
    """The rows of the table's CSV."""
    p.gui.dialogs.answer(str(folder / "nodules.csv"))
    p.gui.click(p.ui.exportNodulesButton)
    with open(folder / "nodules.csv", encoding="utf-8-sig", newline="") as f:
        return list(csv.reader(f))[1:]


def test_follow_up(panel: Any, tmp_path: Path) -> None:
    import qt
    import slicer
    from mrml_scenes import add_segment

    p = begun(panel, "left")
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Last year")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(p.settings.volume)
    small = p.mask("Nodule 1").copy()
    small[small.nonzero()[0].max() - 3 :] = 0
    add_segment(earlier, "L1", small, p.settings.volume)
    add_segment(earlier, "Gone", truth("right").astype(np.uint8), p.settings.volume)
    p.settings.earlier = earlier
    p.settle()
    now, then = np.count_nonzero(p.mask("Nodule 1")), np.count_nonzero(small)
    assert p.table()[0][-4:] == ["L1", f"{100 * (now / then - 1):+.0f}", "days?", "growth"]
    assert p.ui.goneLabel.text == "Not matched in this study: Gone."
    p.ui.daysSpinBox.value = 90
    p.settle()
    assert p.settings.days == 90
    assert p.table()[0][-2] == f"{90 * np.log(2) / np.log(now / then):.0f}"
    assert "BTS 2015" in p.ui.noduleTable.item(0, 0).toolTip()
    p.ui.daysSpinBox.value = 900
    p.settle()
    sentence = p.ui.noduleTable.item(0, 0).toolTip()
    assert "in 900 days" in sentence
    # What leaves the panel has neither tooltips nor the line under the table.
    rows = exported(p, tmp_path)
    assert [row[-1] for row in rows] == [f"By size only; not a diagnosis. {said}" for said in (sentence, "Not matched in this study.")]
    assert rows[0][:-1] == p.table()[0] and rows[1][:-1] == ["-"] * 10 + ["Gone", "-", "-", "not matched"]
    p.gui.click(p.ui.copyNodulesButton)
    lines = qt.QApplication.clipboard().text().splitlines()
    assert [line.split("\t") for line in lines[1:3]] == [row[:-1] for row in rows] and lines[3] == f"Nodule 1: {sentence}"

    p.ui.daysSpinBox.value = 0  # as the studies are dated, once they are
    p.settle()
    assert p.table()[0][-2] == "days?" and p.ui.daysSpinBox.value == 0
    before = slicer.vtkSlicerVolumesLogic.CloneVolume(slicer.mrmlScene, p.settings.volume, "Before")
    for volume, date in ((before, "20240131"), (p.settings.volume, "20240301")):
        dated(volume, date)
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(before)
    p.settings.earlier = None
    p.settings.earlier = earlier
    p.settle()
    assert p.ui.daysSpinBox.value == 30 and p.settings.days == 0
    assert p.table()[0][-2] == f"{30 * np.log(2) / np.log(now / then):.0f}"
    dated(before, "20240401")
    p.settings.earlier = None
    p.settings.earlier = earlier
    p.settle()
    assert p.table()[0][-2] == "days?" and "the other way round" in p.ui.goneLabel.text
    assert exported(p, tmp_path)[0][-1].endswith(p.ui.goneLabel.text.removesuffix(" Not matched in this study: Gone."))
    p.settings.earlier = None
    p.settle()
    assert len(p.table()[0]) == 10


def test_days_that_were_typed_are_those_to_one_earlier_study(panel: Any) -> None:
    import slicer
    from mrml_scenes import add_segment

    p = begun(panel, "left")
    studies = [slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name) for name in ("2023", "2024")]
    for node in studies:
        node.SetReferenceImageGeometryParameterFromVolumeNode(p.settings.volume)
        add_segment(node, "L1", truth("left").astype(np.uint8), p.settings.volume)
    p.settings.earlier = studies[0]
    p.settle()
    p.ui.daysSpinBox.value = 460
    p.settle()
    p.settings.earlier = studies[1]
    p.settle()
    assert p.settings.days == 0 and p.ui.daysSpinBox.value == 0
    p.ui.daysSpinBox.value = 91
    p.settings.earlier = None
    p.settle()
    p.settings.earlier = studies[1]  # the same again
    p.settle()
    assert p.settings.days == 91
    p.settings.earlier = None
    p.settings.earlier = studies[0]
    p.settle()
    assert p.settings.days == 0


def test_days_that_are_being_typed_stay_when_the_scene_changes(panel: Any) -> None:
    import qt
    import slicer
    from mrml_scenes import add_segment
    from PySide6.QtTest import QTest

    p = begun(panel, "left")
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "2024")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(p.settings.volume)
    add_segment(earlier, "L1", truth("left").astype(np.uint8), p.settings.volume)
    p.settings.earlier = earlier
    p.settle()
    days = p.ui.daysSpinBox
    days.setFocus()
    days.selectAll()
    QTest.keyClicks(days, "9")
    slicer.mrmlScene.RemoveNode(scan("Another patient's"))
    p.settle()
    QTest.keyClicks(days, "1")
    QTest.keyClick(days, qt.Qt.Key_Return)
    assert p.settings.days == 91


def test_days_typed_before_the_earlier_study_is_chosen_stay(panel: Any) -> None:
    import slicer
    from mrml_scenes import add_segment

    p = begun(panel, "left")

    def study(name: str) -> Any:
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        node.SetReferenceImageGeometryParameterFromVolumeNode(p.settings.volume)
        add_segment(node, "L1", truth("left").astype(np.uint8), p.settings.volume)
        return node

    p.settings.earlier = study("A's")
    p.settle()
    p.ui.daysSpinBox.value = 400
    p.settle()
    p.settings.volume = scan("Another patient's")  # whose study of before is none of the former patient's
    p.settle()
    p.click(BALLS["left"][0])
    p.ui.daysSpinBox.value = 90
    p.settle()
    p.settings.earlier = study("B's")
    p.settle()
    assert p.settings.days == 90 and p.ui.daysSpinBox.value == 90


def test_what_a_model_had_is_known_after_a_click_at_its_segment(panel: Any) -> None:
    from UNetSegmentationLib import mrml

    p = begun(panel, "right")
    part = p.node.GetSegmentation().GetNthSegment(0)
    for tag in (mrml.PROMPTS_TAG, mrml.DIGEST_TAG, mrml.CLICK_MODEL_TAG):
        part.RemoveTag(tag)
    # As Apply writes it.
    for tag, value in ((mrml.MODEL_TAG, "lung-1.0.0"), (mrml.KEPT_MODEL_TAG, "lung-1.0.0"), (mrml.KEPT_TAG, "0" * 32 + ":1")):
        part.SetTag(tag, value)
    p.settle()
    p.click(BALLS["right"][0])
    assert not part.HasTag(mrml.MODEL_TAG) and part.HasTag(mrml.CLICK_MODEL_TAG)
    section = p.widget.trainingSet
    section._readRows()
    assert [(row.model, row.kept) for row in section.rows] == [("lung-1.0.0", ("0" * 32, 1))]


def test_a_scan_that_its_transform_stretches_says_so_and_one_that_cannot_be_measured_has_no_figures(panel: Any, tmp_path: Path) -> None:
    import slicer
    import vtk

    p = begun(panel, "left")
    figures = p.table()[0]
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "Registration")
    for node in (p.settings.volume, p.settings.nodules):
        node.SetAndObserveTransformNodeID(transform.GetID())
    p.settle()
    assert p.table()[0] == figures and "stretches" not in exported(p, tmp_path)[0][-1]
    larger = vtk.vtkMatrix4x4()
    larger.SetElement(2, 2, 1.1)
    transform.SetMatrixTransformToParent(larger)
    p.settle()
    assert "stretches it by +10.0 %" in p.ui.noduleNote.text and "stretches it by +10.0 %" in exported(p, tmp_path)[0][-1]
    assert float(p.table()[0][2]) == pytest.approx(1.1 * float(figures[2]), rel=0.02)

    bent = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLBSplineTransformNode", "Bent")
    grid = vtk.vtkThinPlateSplineTransform()
    bent.SetAndObserveTransformToParent(grid)
    for node in (p.settings.volume, p.settings.nodules):
        node.SetAndObserveTransformNodeID(bent.GetID())
    p.settle()
    assert set(p.table()[0][1:]) == {"-"} and "non-linear" in p.ui.goneLabel.text
    for node in (p.settings.volume, p.settings.nodules):
        node.SetAndObserveTransformNodeID(None)
    p.settle()
    assert p.table()[0] == figures and not p.ui.goneLabel.text


def test_another_scan_has_no_earlier_study_until_it_is_chosen_for_it(panel: Any) -> None:
    import slicer
    from mrml_scenes import add_segment

    p = begun(panel, "left")
    mine, another = p.settings.volume, scan("Another patient's")
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Last year")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(mine)
    add_segment(earlier, "L1", truth("left").astype(np.uint8), mine)
    p.settings.earlier, p.settings.days = earlier, 90
    p.settle()
    p.settings.volume = another
    p.settle()
    assert p.settings.earlier is None and p.settings.days == 0 and p.ui.daysSpinBox.value == 0
    p.click(BALLS["left"][0])
    assert len(p.table()[0]) == 10
    p.settings.volume = mine  # and there is its own again
    p.settle()
    assert p.settings.earlier is earlier and p.settings.days == 90 and p.table()[0][-4] == "L1"
    p.settings.volume = another
    p.gui.process_events()
    slicer.mrmlScene.RemoveNode(earlier)
    p.settings.volume = mine
    p.settle()
    assert p.settings.earlier is None and len(p.table()[0]) == 10


def later() -> Any:
    """A study on another grid, in which the ball on the left lies elsewhere."""
    import slicer

    node = scan("Later")
    slicer.util.updateVolumeFromArray(node, np.roll(made_scan(), 8, 2))
    node.SetOrigin(5.3, 3, 2)
    return node


def test_nodules_of_another_scan_are_neither_clicked_nor_measured_there(panel: Any, tmp_path: Path) -> None:
    import slicer

    p = begun(panel, "left")
    first, node, row = p.settings.volume, p.node, p.table()[0]
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    p.settings.volume = later()
    p.settle()
    assert slicer.util.saveNode(node, str(tmp_path / "nodules.seg.nrrd"))
    for read in (False, True):  # which has no reference volume
        p.settings.nodules = node = slicer.util.loadSegmentation(str(tmp_path / "nodules.seg.nrrd")) if read else node
        p.settle()
        assert p.table() == [row]
        state = everything(node)
        for click in (
            lambda: p.click(BALLS["left"][0]),
            lambda: p.tool.box(roi),
            lambda: p.ui.noduleTable.setCurrentCell(0, 0),
        ):
            p.tool._say("")
            click()
            assert "belongs to 'CT' and not to 'Later'; choose 'CT' as" in p.ui.clickMessage.text
            assert not p.tool.segment and not p.tool.busy and everything(node) == state
    slicer.mrmlScene.RemoveNode(first)
    p.settle()
    p.click(BALLS["right"][0])  # of whom they are, nobody knows any more
    assert len(p.segments()) == 2


def test_clicks_of_a_segment_that_is_copied_to_the_next_study_stay_where_it_lies(panel: Any) -> None:
    import slicer

    p = begun(panel, "left")
    at, node = p.ras(BALLS["left"][0]), scan("Next")
    slicer.util.updateVolumeFromArray(node, np.roll(made_scan(), (-15, -4), (0, 2)))
    node.SetOrigin(4 * SPACING[0], 0, 15 * SPACING[2])  # the same patient, the table elsewhere
    copy = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "copy")
    copy.CreateDefaultDisplayNodes()
    copy.SetReferenceImageGeometryParameterFromVolumeNode(node)
    copy.GetSegmentation().CopySegmentFromSegmentation(p.node.GetSegmentation(), p.segments()["Nodule 1"])
    p.settings.volume, p.settings.nodules = node, copy
    p.settle()
    assert np.allclose(dots(True), [at], atol=0.8)
    node.SetOrigin(50, 60, 70)  # now they lie beside it, where nothing can be run
    p.tool.showDots()
    assert len(dots(True)) == 0


def test_nodules_are_clicked_on_in_a_copy_of_their_scan(panel: Any) -> None:
    p = begun(panel, "left")
    node = p.node
    p.settings.volume = scan("Filtered")
    p.settings.nodules = node
    p.settle()
    p.click(BALLS["right"][0])
    assert p.node is node and sorted(p.segments()) == ["Nodule 1", "Nodule 2"] and dice(p.mask("Nodule 2"), truth("right")) > 0.8


def test_nodules_that_were_made_of_a_labelmap_are_the_scans(panel: Any) -> None:
    import slicer

    p = begun(panel, "left")
    node, rows = p.node, p.table()
    labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "Labels")
    slicer.util.updateVolumeFromArray(labels, truth("left").astype(np.uint8))
    labels.SetSpacing(SPACING)
    node.SetReferenceImageGeometryParameterFromVolumeNode(labels)
    for chosen in (None, node):
        p.settings.nodules = chosen
        p.settle()
    assert p.table() == rows
    p.ui.noduleTable.setCurrentCell(0, 0)
    p.click((24, 48, 33))
    assert len(prompts_of(p, "Nodule 1")) == 2
    for volume in (later(), p.settings.volume):
        p.settings.volume = volume
        p.settle()
    assert p.node is node


def test_of_two_segmentations_of_one_scan_the_chosen_one_is_come_back_to(panel: Any) -> None:
    p = begun(panel, "left")
    one, mine = p.node, p.settings.volume
    p.settings.nodules = None
    p.gui.process_events()
    p.click(BALLS["right"][0])
    for node in (one, p.node):
        p.settings.nodules = node
        p.settle()
        p.settings.volume = scan("Another patient's")
        p.settle()
        assert p.node is None
        p.settings.volume = mine
        p.settle()
        assert p.node is node


def test_a_follow_up_says_where_only_the_days_changed(panel: Any) -> None:
    import slicer
    from mrml_scenes import add_segment

    p = begun(panel, "left")
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Last year")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(p.settings.volume)
    large = truth("left") | np.roll(truth("left"), 8, 2)
    large[:, :, 0] = True  # the edge of that scan
    add_segment(earlier, "L1", large.astype(np.uint8), p.settings.volume)
    p.settings.earlier = earlier
    for days in (90, 180):
        p.ui.daysSpinBox.value = days
        p.settle()
        assert p.table()[0][-2:] == ["-", "smaller"] and f"in {days} days" in p.ui.noduleTable.item(0, 0).toolTip()
    p.ui.noduleTable.setCurrentCell(0, 0)
    assert "Nodule 1: In one of the studies it reaches the edge" in p.ui.noduleNote.text


def test_nothing_is_new_where_the_earlier_study_was_not_measured(panel: Any, tmp_path: Path) -> None:
    import slicer
    from mrml_scenes import add_segment
    from UNetSegmentationLib.mrml import NODULES_ROLE, find_table

    p = begun(panel, "left")
    then = scan("CT of last year")
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Last year")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(then)
    add_segment(earlier, "L1", truth("left").astype(np.uint8), then)
    assert slicer.util.saveNode(earlier, str(tmp_path / "Last year.seg.nrrd"))
    slicer.mrmlScene.RemoveNode(earlier)
    earlier = slicer.util.loadSegmentation(str(tmp_path / "Last year.seg.nrrd"))
    assert earlier.GetNodeReference(earlier.GetReferenceImageGeometryReferenceRole()) is None
    p.settings.earlier = earlier
    assert p.table()[0][-4:] == ["-"] * 4  # not yet
    p.settle()
    assert p.table()[0][-4] == "L1" and p.ui.goneLabel.text == ""
    slicer.mrmlScene.RemoveNode(then)
    p.settle()
    assert p.table()[0][-4:] == ["-"] * 4
    assert p.ui.goneLabel.text.startswith("The scan of Last year is not in the scene, or one of several there, so its nodules are")

    p.settings.earlier = None
    p.settle()
    table, row = find_table(p.node, NODULES_ROLE), p.table()[0]
    slicer.mrmlScene.RemoveNode(p.settings.volume)
    p.settle()
    assert not p.table() and [table.GetCellText(0, i) for i in range(table.GetNumberOfColumns())] == row


def last_year(p: Any, **masks: np.ndarray) -> tuple[Any, Any]:
    """Another scan and its segmentation, chosen as the earlier study."""
    import slicer
    from mrml_scenes import add_segment

    before = slicer.vtkSlicerVolumesLogic.CloneVolume(slicer.mrmlScene, p.settings.volume, "Before")
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Last year")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(before)
    for name, mask in masks.items():
        add_segment(earlier, name, mask.astype(np.uint8), before)
    p.settings.earlier = earlier
    p.settle()
    return before, earlier


@pytest.mark.parametrize("how", [".mrb", ".mrml", "added"])
def test_what_was_chosen_for_each_scan_comes_back_with_the_scene(panel: Any, tmp_path: Path, how: str) -> None:
    import slicer
    from UNetSegmentationLib.mrml import NODULES_ROLE, find_table

    p = begun(panel, "left")
    volume, chosen, path = p.settings.volume, p.node, tmp_path / ("scene" + (how if how != "added" else ".mrb"))
    p.settings.nodules = None
    p.gui.process_events()
    p.click(BALLS["right"][0])  # into a second one
    p.settings.nodules = chosen
    small = truth("left")
    small[25:] = False
    last_year(p, L1=small)
    p.ui.daysSpinBox.value = 90
    p.settle()
    storable = [n for kind in ("vtkMRMLScalarVolumeNode", "vtkMRMLSegmentationNode") for n in slicer.util.getNodesByClass(kind)]
    assert all(slicer.util.saveNode(n, str(tmp_path / f"{n.GetID()}.{'seg.' * n.IsA('vtkMRMLSegmentationNode')}nrrd")) for n in storable)
    p.ui.daysSpinBox.value = 123
    p.settle()
    assert not volume.GetModifiedSinceRead()  # or Save would write the scan again
    table = p.table()
    volume.SetAttribute("UNetSegmentation.Days", None)  # as another frame of a sequence does, whose content it takes
    p.settings.volume = scan("Another patient's")
    p.settle()
    assert p.settings.earlier is None and p.settings.days == 0 and p.node is None
    slicer.util.saveNode(p.settings.volume, str(tmp_path / "another.nrrd"))
    p.gui.save_scene(path)
    if how == "added":
        p.gui.close_scene()
        p.settings.volume = scan("Mine")  # with the ID of the one that comes
    slicer.util.loadScene(str(path), {"clear": how != "added"})
    p.settle()
    p.settings.volume = slicer.util.getNode("CT")
    p.settle()
    assert [n.GetName() for n in (p.node, p.settings.earlier)] == ["CT nodules", "Last year"] and p.settings.days == 123
    assert p.table() == table and find_table(p.node, NODULES_ROLE).GetNumberOfColumns() == len(table[0]) == 14


@pytest.mark.parametrize("study", ["this", "the earlier one"])
def test_a_scan_that_was_moved_without_its_segments_is_said(panel: Any, tmp_path: Path, study: str) -> None:
    """A registration moves the scan alone."""
    from mrml_scenes import add_transform

    p = begun(panel, "left", "right")
    before, earlier = last_year(p, L=truth("left"), R=truth("right"))
    matched = p.table()
    assert [row[-4] for row in matched] == ["L", "R"] and not p.ui.goneLabel.text
    moved, node = (p.settings.volume, p.node) if study == "this" else (before, earlier)
    for shift in (12, 30, 80):  # in part onto other voxels, one of them out of the scan, both of them
        matrix = np.eye(4)
        matrix[2, 3] = shift
        transform = add_transform(matrix)
        moved.SetAndObserveTransformNodeID(transform.GetID())
        p.settle()
        said = f"{node.GetName()} does not lie where it did in its scan; put both under"
        assert p.ui.goneLabel.visible and p.ui.goneLabel.text.startswith(said)
        assert all(row[-1] != "new" for row in p.table()) and all(said in row[-1] for row in exported(p, tmp_path)[:2])
    assert ("Not measured in the earlier study: L, R." in p.ui.goneLabel.text) == (study != "this")
    assert ("lies outside its scan" in p.ui.noduleTable.item(0, 0).toolTip()) == (study == "this")
    node.SetAndObserveTransformNodeID(transform.GetID())
    p.settle()
    assert not p.ui.goneLabel.text and [row[-4:-1] for row in p.table()] == [row[-4:-1] for row in matched]


@pytest.mark.parametrize("hardened", ["scan", "segments"])
def test_what_is_hardened_alone_lies_where_it_did(panel: Any, hardened: str) -> None:
    from mrml_scenes import add_transform

    p = begun(panel, "left", "right")
    rows, matrix = p.table(), np.eye(4)
    matrix[:3, 3] = 3.3, 5.1, 30.7
    transform, both = add_transform(matrix), (p.settings.volume, p.node)
    for node in both:
        node.SetAndObserveTransformNodeID(transform.GetID())
    both[hardened == "segments"].HardenTransform()
    p.settle()
    assert not p.ui.goneLabel.text and p.table() == rows
    both[hardened == "scan"].SetAndObserveTransformNodeID(None)
    p.settle()
    assert p.ui.goneLabel.text.startswith("CT nodules does not lie where it did in its scan; put both")


def test_an_organ_beside_the_nodules_makes_none_new_or_old(panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from UNetSegmentationPanel import nodules

    p = begun(panel, "left", "right")
    monkeypatch.setattr(nodules, "LARGEST_VOXELS", 60000)
    lungs = np.zeros(SHAPE)
    lungs[2:46, 4:92, 4:44] = lungs[2:46, 4:92, 52:92] = 1
    last_year(p, L=truth("left"), Lungs=lungs)
    assert [(row[-4], row[-1]) for row in p.table()] == [("L", "stable"), ("-", "new")] and not p.ui.goneLabel.text


def test_a_nodule_that_could_not_be_measured_is_named_and_makes_none_new(
    panel: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from UNetSegmentationPanel import nodules

    p = begun(panel, "left", "right")
    stray = truth("left")
    stray[1, 1, 1] = True  # of a brush
    monkeypatch.setattr(nodules, "LARGEST_VOXELS", 20000)
    _before, earlier = last_year(p, L=stray, R=truth("right"), Empty=np.zeros(SHAPE))
    assert [row[-4] for row in p.table()] == ["-", "R"] and p.table()[0][-1] == "-"
    assert p.ui.goneLabel.text == "Not measured in the earlier study: L." and p.ui.goneLabel.text in exported(p, tmp_path)[0][-1]
    earlier.GetSegmentation().RemoveSegment(p.segments(earlier)["L"])
    p.settle()
    assert p.table()[0][-1] == "new" and not p.ui.goneLabel.text
    paint(p, "Nodule 1", stray)
    p.settle()
    assert set(p.table()[0][1:]) == {"-"} and "too far apart" in p.ui.noduleTable.item(0, 0).toolTip()
    assert exported(p, tmp_path)[0][-1].count("too far apart") == 1
    p.ui.noduleTable.setCurrentCell(1, 0)
    p.ui.noduleTable.setCurrentCell(0, 0)
    assert "too far apart" in p.ui.noduleNote.text


def test_a_follow_up_elsewhere_quotes_no_guideline_of_the_lung(panel: Any, install: Callable[..., str]) -> None:
    label = {"value": 1, "name": "Liver lesion"}
    install(**{**TOY, "name": "bclick", "labels": [label], "surroundings": "any"})
    p = panel()
    p.settings.clickModel, p.settings.volume = "bclick-1.0.0", scan()
    p.gui.process_events()
    p.arm()
    p.click(BALLS["left"][0])
    small = p.mask("Liver lesion 1")
    small[small.nonzero()[0].max() - 4 :] = 0
    last_year(p, L=small)
    p.ui.daysSpinBox.value = 90
    p.settle()
    assert p.table()[0][-4] == "L" and int(p.table()[0][-3]) > 25 and p.table()[0][-1] == "-"
    tip = p.ui.noduleTable.item(0, 0).toolTip()
    assert "in 90 days, doubling in" in tip and not any(word in tip for word in ("BTS", "Fleischner", "RADS", "growth"))


def test_nodules_are_measured_again_where_another_scan_or_place_lies_beneath(panel: Any) -> None:
    import slicer
    import vtk

    p = begun(panel, "left")
    row, center = p.table()[0], p.widget.nodules.now.rows[0].measures["center"]
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    matrix = vtk.vtkMatrix4x4()
    matrix.SetElement(1, 3, 20 * SPACING[1])
    transform.SetMatrixTransformToParent(matrix)
    moved = np.add(center, (0, -20 * SPACING[1], 0))
    p.settings.volume.SetAndObserveTransformNodeID(transform.GetID())
    p.settle()
    assert p.table()[0][8] != row[8]  # what lies under it now
    p.node.SetAndObserveTransformNodeID(transform.GetID())
    p.settle()
    assert p.table()[0] == row and np.allclose(p.widget.nodules.now.rows[0].measures["center"], moved)
    # Another scan in the same node, as by a sequence's next frame: first its voxels, then its grid.
    slicer.util.updateVolumeFromArray(p.settings.volume, np.full(SHAPE, -570, np.int16))
    p.settle()
    assert p.table()[0][6:10] == ["ground-glass", "-", "-570", "2"] and p.table()[0][2:6] == row[2:6]
    p.settings.volume.SetSpacing(1.6, 1.6, 1.25)
    p.settle()
    assert p.table()[0][2:6] != row[2:6]


# ------------------------------------------------------------------------------------------------------- in between


@POSIX
@pytest.mark.parametrize("what", ["scene", "volume", "other volume", "module", "segment", "segmentation", "voxels", "brush"])
def test_what_happens_while_a_click_runs_breaks_nothing(panel: Any, what: str) -> None:
    import slicer

    p = begun(panel, "left")
    gui, volume = p.gui, p.settings.volume
    with p.unanswered():
        p.click((24, 48, 33), wait=False)
        gui.wait(lambda: p.tool._controller.busy, RUN_S)
        if what == "scene":
            gui.close_scene()
        elif what == "volume":
            slicer.mrmlScene.RemoveNode(volume)
        elif what == "other volume":
            p.settings.volume = scan("Another")
        elif what == "module":
            p = Hands(gui, gui.reload())
        elif what == "segment":
            p.node.GetSegmentation().RemoveSegment(p.segments()["Nodule 1"])
        elif what == "segmentation":
            slicer.mrmlScene.RemoveNode(p.node)
        elif what == "brush":
            paint(p, "Nodule 1", corrected())
        else:
            slicer.util.arrayFromVolume(volume)[0, 0, 0] = -900
            slicer.util.arrayFromVolumeModified(volume)
        gui.process_events()
    p.settle()
    known = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    counts = [n.GetSegmentation().GetNumberOfSegments() for n in known]
    assert counts == {"scene": [], "segmentation": [], "segment": [0]}.get(what, [1])
    assert all(p.tag("Nodule 1").count("true") == 1 for _ in range(what in ("module", "voxels", "brush")))
    if what in ("voxels", "brush"):
        assert "was changed meanwhile" in p.ui.clickMessage.text
    if what == "brush":
        assert np.array_equal(p.mask("Nodule 1"), corrected()) and len(dots(True)) == 1
        p.click((20, 40, 71))
        assert [prompt[0] for prompt in prompts_of(p, "Nodule 1")] == ["mask", "point"]
    if what in ("segment", "segmentation", "other volume"):
        assert "removed meanwhile, so nothing was written" in p.ui.clickMessage.text
    # And on it goes.
    if what in ("scene", "volume"):
        p.settings.volume = scan()
    gui.process_events()
    if not p.tool.armed:
        p.arm()
    if p.tool.segment:
        gui.click(p.ui.nextNoduleButton)
    p.click(BALLS["right"][0])
    assert dice(p.mask(list(p.segments())[-1]), truth("right")) > 0.8


@POSIX
def test_a_scan_that_moves_while_it_is_made_ready_for_clicks_is_no_news(panel: Any) -> None:
    from mrml_scenes import add_transform

    p = begun(panel, "left")
    p.tool.disarm()
    p.settings.volume = scan("second")
    p.settle()
    controller = p.tool._controller
    with p.unanswered():
        p.gui.click(p.ui.clickButton)
        p.gui.wait(lambda: controller._asked is not None, RUN_S)
        moved = np.eye(4)
        moved[0, 3] = 5
        p.settings.volume.SetAndObserveTransformNodeID(add_transform(moved).GetID())
    p.gui.wait(lambda: controller._asked is None, RUN_S)
    assert p.ui.clickMessage.text == "Click on the nodule in a slice view."
    p.click(BALLS["left"][0])
    assert dice(p.mask("Nodule 1"), truth("left")) > 0.8


@POSIX
def test_a_row_that_is_chosen_while_a_click_runs_is_refused(panel: Any) -> None:
    p = begun(panel, "left", "right")
    one, two = (p.segments()[name] for name in ("Nodule 1", "Nodule 2"))
    with p.unanswered():
        p.click(VESSEL, ctrl=True, wait=False)
        p.gui.wait(lambda: not p.tool._pieces.busy, RUN_S)
        assert not p.ui.nextNoduleButton.enabled
        p.ui.noduleTable.setCurrentCell(0, 0)
        p.gui.process_events()
        assert "not answered yet" in p.ui.clickMessage.text and p.tool.segment == two
        assert {item.row() for item in p.ui.noduleTable.selectedItems()} == {1}
    p.settle()
    assert len(prompts_of(p, "Nodule 2")) == 2 and p.ui.clickMessage.text.startswith("Nodule 2: click on")
    p.ui.noduleTable.setCurrentCell(0, 0)
    assert p.tool.segment == one


@POSIX
def test_a_worker_that_dies_is_a_sentence_and_the_next_click_works(panel: Any) -> None:
    from UNetSegmentationPanel import panelWorker

    p = begun(panel, "left")
    state = everything(p.node)
    with p.unanswered():
        p.click((24, 48, 33), wait=False)
        p.gui.wait(lambda: p.tool._controller.busy, RUN_S)
        os.kill(panelWorker().pid, signal.SIGKILL)
    p.settle()
    assert "worker was stopped" in p.ui.clickMessage.text and everything(p.node) == state and len(dots(True)) == 1
    p.click((24, 48, 33))
    assert p.tag("Nodule 1").count("true") == 2


def test_quick_clicks_all_count(panel: Any) -> None:
    p = begun(panel, "right")
    for x in (80, 84, 88):
        p.click((20, 40, x), ctrl=True, wait=False)
    p.settle()
    assert p.tag("Nodule 1").count("false") == 3 and len(dots(False)) == 3
    assert np.array_equal(p.mask("Nodule 1"), by_python(p, prompts_of(p, "Nodule 1")))


def test_the_model_that_comes_with_the_module(panel: Any) -> None:
    p = panel()
    p.settings.clickModel, p.settings.volume = "", scan()
    p.gui.process_events()
    tip = p.ui.clickModelCombo.toolTip
    assert all(text in tip for text in ("Not a diagnosis", "after one click", "one target that is clicked on", "LIDC-IDRI"))
    assert p.ui.clickModelCombo.visible and p.tool.model.card.name == "lung-nodule-click"
    p.arm()
    p.click(BALLS["left"][0])
    assert dice(p.mask("Nodule 1"), truth("left")) > 0.7
    assert p.tag("Nodule 1", "UNetSegmentation.ClickModel").startswith("lung-nodule-click-")


def test_the_default_is_the_newest_as_everywhere(panel: Any, models_folder: Path) -> None:
    from UNetSegmentationLib.inference.click import MODEL
    from UNetSegmentationLib.model import find_model, write_package

    bundled = find_model(MODEL)
    for version in ("0.9.0", "0.10.0"):
        write_package(models_folder / f"{MODEL}-{version}.unet.zip", {**bundled.card.data, "version": version}, bundled.onnx)
    p = panel()
    for chosen, version in (("", "0.10.0"), ("gone-1.0.0", "0.10.0"), (bundled.path.name.removesuffix(".unet.zip"), bundled.card.version)):
        p.settings.clickModel, p.settings.volume = chosen, scan()
        p.gui.process_events()
        assert (p.tool.model.card.name, p.tool.model.card.version) == (MODEL, version)
    assert find_model(MODEL).card.version == "0.10.0"


def leftovers() -> list[str]:
    import slicer

    nodes = (slicer.mrmlScene.GetNthNode(i) for i in range(slicer.mrmlScene.GetNumberOfNodes()))
    kinds = ("vtkMRMLSegmentationNode", "vtkMRMLMarkupsNode", "vtkMRMLTableNode")
    return [n.GetName() for n in nodes if any(n.IsA(kind) for kind in kinds)]


def test_a_view_that_is_removed_while_clicks_are_awaited_keeps_no_other(panel: Any) -> None:
    import slicer

    p = panel()
    p.settings.volume = scan()
    p.gui.process_events()
    manager = slicer.app.layoutManager()
    before, node = manager.layout, manager.layoutLogic().GetLayoutNode()
    node.AddLayoutDescription(999, '<layout><item><view class="vtkMRMLSliceNode" singletontag="Mine"></view></item></layout>')
    manager.setLayout(999)
    manager.setLayout(before)
    p.arm()
    mine = manager.sliceWidget("Mine")
    assert mine.sliceView().cursor_of_the_test is not None
    slicer.mrmlScene.RemoveNode(mine.mrmlSliceNode())  # as another module does with its own
    p.gui.click(p.ui.clickButton)
    p.arm()
    p.click(BALLS["left"][0])
    assert list(p.segments()) == ["Nodule 1"]
    p.gui.click(p.ui.clickButton)
    views = [manager.sliceWidget(name).sliceView() for name in manager.sliceViewNames()]
    assert len(views) == 3 and all(view.cursor_of_the_test is None for view in views)
    heard: list[str] = []
    for interactor in [view.interactor() for view in views]:
        tag = interactor.AddObserver("LeftButtonPressEvent", lambda c, e: heard.append(e))
        interactor.InvokeEvent("LeftButtonPressEvent")
        interactor.RemoveObserver(tag)
    assert len(heard) == 3


def test_closing_the_panel_leaves_the_segments_alone(panel: Any) -> None:
    import slicer

    p = begun(panel, "left")
    node = p.node
    p.gui.close(p.widget)
    assert leftovers() == [node.GetName(), f"{node.GetName()} table"]
    interactor, heard = slicer.app.layoutManager().sliceWidget("Red").sliceView().interactor(), []
    tag = interactor.AddObserver("LeftButtonPressEvent", lambda c, e: heard.append(e))
    interactor.InvokeEvent("LeftButtonPressEvent")
    interactor.RemoveObserver(tag)
    assert heard
    assert sys.modules["UNetSegmentationPanel"].clickController().owner is None


def test_a_nodule_that_reaches_beyond_a_cropped_scan_is_left_as_it_is(panel: Any) -> None:
    """Written on the crop it would lose what lies beside it, and one wholly beside it would be taken for an emptied one."""
    import slicer

    p = begun(panel, "left")
    node, segment, whole = p.node, p.segments()["Nodule 1"], p.mask("Nodule 1")
    for first in (32, 44):
        matrix = np.diag([*SPACING, 1.0])
        matrix[0, 3] = first * SPACING[0]
        crop = slicer.util.addVolumeFromArray(made_scan()[:, :, first:], matrix, f"crop {first}")
        crop.CreateDefaultDisplayNodes()
        node.SetReferenceImageGeometryParameterFromVolumeNode(crop)
        p.settings.volume, p.settings.nodules = crop, node
        p.gui.process_events()
        slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode().SetBackgroundVolumeID(crop.GetID())
        p.settle()
        p.tool.select(segment)
        z, y, x = BALLS["left" if first == 32 else "right"][0]
        p.click((z, y, max(x, 36) - first))
        assert "reaches beyond 'crop" in p.tool.text
    node.SetReferenceImageGeometryParameterFromVolumeNode(slicer.mrmlScene.GetFirstNodeByName("CT"))
    from UNetSegmentationLib.mrml import segment_mask

    assert np.array_equal(segment_mask(node, segment, slicer.mrmlScene.GetFirstNodeByName("CT")), whole)
