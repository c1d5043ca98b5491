"""The Segment Editor effect "U-Net Click": real clicks in slice views, real masks, Slicer's own editing and undo."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from UNetSegmentationLib.inference.click import ClickSession
from UNetSegmentationLib.measure import dice

TOO_LARGE = (
    "This was not taken: what is marked and clicked on would be too large for one lesion; "
    "erase what is no part of it, or begin the next one."
)
ANSWER_S = 60.0  # on a machine that has other things to do
NAME = "U-Net Click"
MODULE = Path(__file__).resolve().parents[2] / "UNetSegmentation" / "SegmentEditorUNetClick" / "SegmentEditorUNetClick.py"
SHAPE = (14, 36, 40)
# Blocks that the toy network tells from nothing: two that touch nothing, and one in two halves.
A, B, C = ((4, 8), (6, 14), (6, 16)), ((4, 9), (20, 30), (6, 16)), ((5, 9), (8, 26), (24, 34))
IN_A, IN_B, IN_C, ALSO_IN_C, NOWHERE = (6, 10, 10), (6, 25, 10), (7, 12, 28), (7, 22, 28), (12, 3, 37)


@pytest.fixture
def toy(models_folder: Path, make_package: Callable[..., Any]) -> Any:
    """A click model whose network is a threshold at 0.5, among the imported ones."""
    tissue = {"category": ["SCT", "49755003", "Morphologically Altered Structure"], "type": ["SCT", "27925004", "Nodule"]}
    labels = [{"value": 1, "name": "thing", "terminology": tissue}]
    package = make_package(task="click", spacing=[1, 1, 1], patch=[16, 48, 48], name="toy-click", labels=labels)
    models_folder.mkdir(exist_ok=True)
    shutil.copy(package.path, models_folder)
    return package


@pytest.fixture
def editor(gui: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Editor]]:
    """editor(volume) opens a Segment Editor on it, with an empty segmentation and the effect active."""
    from standins import effects

    sys.modules.pop("SegmentEditorUNetClickLib", None)
    effects.install()
    gui.load("SegmentEditorUNetClick", MODULE)
    opened: list[Editor] = []

    def make(volume: Any, model: str | None = "toy-click-1.0.0", **options: Any) -> Editor:
        opened.append(Editor(gui, volume, model, **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def blocks() -> np.ndarray:
    array = np.zeros(SHAPE, np.int16)
    for block in (A, B, C):
        array[tuple(slice(*ends) for ends in block)] = 1
    return array


def place(kind: str) -> np.ndarray:
    """4x4, index (x, y, z) to LPS."""
    from mrml_scenes import geometry, rotation

    turn = rotation() * (1, 1, -1 if kind == "left-handed" else 1) if kind != "straight" else np.eye(3)
    return geometry(turn, (1.0, 1.0, 1.0))


def scan(kind: str = "oblique", array: np.ndarray | None = None) -> Any:
    from mrml_scenes import add_volume

    node = add_volume(blocks() if array is None else array, place(kind))
    node.CreateDefaultDisplayNodes()
    return node


class Editor:
    """The test's hands on one Segment Editor widget."""

    def __init__(self, gui: Any, volume: Any, model: str | None, segment: bool = True, active: bool = True) -> None:
        import slicer

        self.gui, self.volume = gui, volume
        self.widget = slicer.qMRMLSegmentEditorWidget()
        self.widget.setMRMLScene(slicer.mrmlScene)
        self.node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        self.widget.setMRMLSegmentEditorNode(self.node)
        self.segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        self.segmentation.CreateDefaultDisplayNodes()
        if volume is not None:
            self.segmentation.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
            self.segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        self.widget.setSegmentationNode(self.segmentation)
        self.widget.setSourceVolumeNode(volume)
        if segment:
            self.widget.setCurrentSegmentID(self.segmentation.GetSegmentation().AddEmptySegment("", "mine"))
        if model:
            self.node.SetAttribute(f"{NAME}.Model", model)
        self.scripted = self.widget.effectByName(NAME)
        self.effect = self.scripted.self()
        self.slice = slicer.app.layoutManager().sliceWidget("Red")
        if active:
            self.widget.setActiveEffectByName(NAME)
            self.wait()

    def wait(self) -> None:
        self.gui.wait(lambda: not self.effect.busy, ANSWER_S)
        self.gui.process_events()

    def close(self) -> None:
        if self.widget is not None:
            self.widget._delete()
            self.widget = None
            self.gui.process_events()

    @property
    def segment(self) -> str:
        return self.widget.currentSegmentID()

    @property
    def message(self) -> str:
        assert self.effect.message == self.effect.messageLabel.text
        return self.effect.message

    @property
    def saved(self) -> int:
        return self.widget._saved

    def ras(self, index: Sequence[float]) -> tuple[float, ...]:
        """The world's point of a voxel (z, y, x)."""
        from UNetSegmentationLib.mrml import image_from_volume

        x, y, z = image_from_volume(self.volume).index_to_point(index[::-1])
        return -x, -y, z

    def xy(self, index: Sequence[float], view: Any = None) -> tuple[int, int]:
        """Where the voxel is in the view, which is moved there."""
        import vtk

        node, ras = (view or self.slice).mrmlSliceNode(), self.ras(index)
        node.JumpSliceByCentering(*ras)
        back = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(node.GetXYToRAS(), back)
        x, y = back.MultiplyPoint((*ras, 1.0))[:2]
        return round(x), round(y)

    def event(self, name: str, xy: Sequence[int], control: bool = False, shift: bool = False, alt: bool = False, key: str = "") -> bool:
        """What the view's interactor tells; whether Slicer's own interaction gets it, too."""
        interactor, seen = self.slice.sliceView().interactor(), []
        tag = interactor.AddObserver(name, lambda *_: seen.append(1), 0.0)
        interactor.SetEventInformation(*xy, int(control), int(shift), key[:1] or "\0", 0, key or None)
        interactor.SetAltKey(int(alt))
        interactor.InvokeEvent(name)
        interactor.RemoveObserver(tag)
        return bool(seen)

    def press(self, key: str, **modifiers: bool) -> bool:
        passed = self.event("KeyPressEvent", (0, 0), key=key, **modifiers)
        self.wait()
        return passed

    def click(self, index: Sequence[float], wait: bool = True, **modifiers: bool) -> tuple[float, ...]:
        """A click on a voxel (z, y, x), in the Red view; the point of the world, LPS mm, that the mouse was at."""
        xy = self.xy(index)
        point = self.slice.mrmlSliceNode().GetXYToRAS().MultiplyPoint((*xy, 0.0, 1.0))
        self.event("LeftButtonPressEvent", xy, **modifiers)
        self.event("LeftButtonReleaseEvent", xy, **modifiers)
        if wait:
            self.wait()
        return -point[0], -point[1], point[2]

    def mask(self, segment: str | None = None) -> np.ndarray:
        from UNetSegmentationLib.mrml import segment_mask

        return segment_mask(self.segmentation, segment or self.segment, self.volume)

    def names(self) -> list[str]:
        held = self.segmentation.GetSegmentation()
        return [held.GetNthSegment(i).GetName() for i in range(held.GetNumberOfSegments())]

    def draw(self, mask: np.ndarray, segment: str | None = None, mode: str = "ModificationModeSet") -> None:
        """What a brush does, to the selected segment or to another."""
        from UNetSegmentationLib.mrml import _grid_in, oriented_labelmap

        logic = self.widget._logic
        self.widget.saveStateForUndo()
        labelmap = oriented_labelmap(mask.astype(np.uint8), (0, 0, 0), _grid_in(self.segmentation, self.volume))
        logic.ModifySegmentByLabelmap(self.segmentation, segment or self.segment, labelmap, getattr(logic, mode), True, True)
        self.gui.process_events()

    def session(self, package: Any) -> ClickSession:
        from UNetSegmentationLib.mrml import image_from_volume

        return ClickSession(image_from_volume(self.volume), package)

    def dots(self, view: Any = None) -> dict[str, list[tuple[float, float]]]:
        """Colour -> where discs are in the view."""
        out = {}
        renderer = type(self.scripted).renderer(view or self.slice)
        for i in range(renderer.GetViewProps().GetNumberOfItems()):
            actor = renderer.GetViewProps().GetItemAsObject(i)
            data = actor.GetMapper().GetInputAlgorithm().GetInput()
            color = actor.GetProperty().GetColor()
            points = [data.GetPoint(j)[:2] for j in range(data.GetNumberOfPoints())]
            out["green" if color[1] > color[0] else "red"] = points
        return out


def filled(*boxes: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.zeros(SHAPE, np.uint8)
    for box in boxes:
        out[tuple(slice(*ends) for ends in box)] = 1
    return out


# -------------------------------------------------------------------------------------------------------- registration


def test_it_is_registered_when_slicer_has_started(gui: Any, toy: Any) -> None:
    import qt
    import slicer
    from standins import effects

    effects.install()
    sys.modules.pop("SegmentEditorUNetClickLib", None)
    module = gui.load("SegmentEditorUNetClick", MODULE)
    assert module.hidden and "Segmentations" in module.dependencies
    factory = sys.modules["qSlicerSegmentationsEditorEffectsPythonQt"].qSlicerSegmentEditorEffectFactory
    assert [e.name for e in factory._registered] == [NAME]
    slicer.app.startupCompleted.emit()
    sys.modules["SegmentEditorUNetClick"].registerEditorEffect()  # a reload of the module
    (effect,) = factory._registered
    assert not effect.perSegment and not effect.requireSegments and effect.title == NAME
    assert not effect.icon().isNull() and effect.icon().pixmap(32, 32).toImage().pixelColor(16, 14).alpha() > 0
    text = effect.helpText()
    assert "diagnosis" in text and "Ctrl" in text and "<b>N</b>" in text
    clone = effect.clone()
    assert clone is not effect and clone.name == NAME and clone.self() is not effect.self()
    assert isinstance(clone.createCursor(slicer.app.layoutManager().sliceWidget("Red")), qt.QCursor)


def test_nothing_of_the_core_is_imported_before_it_is_chosen(editor: Callable[..., Editor]) -> None:
    known = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("UNetSegmentationPanel")}
    try:
        editor(scan(), active=False)
        assert not [name for name in sys.modules if name.startswith("UNetSegmentationPanel")]
    finally:
        sys.modules.update(known)


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", ["straight", "oblique", "left-handed"])
@pytest.mark.parametrize("moved", [False, True])
def test_the_same_clicks_give_the_same_mask_as_in_python(editor: Callable[..., Editor], toy: Any, kind: str, moved: bool) -> None:
    from mrml_scenes import add_transform, rotation

    volume = scan(kind)
    if moved:
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotation(-40, (3, 1, -1)), (20, -5, 11)
        volume.SetAndObserveTransformNodeID(add_transform(matrix).GetID())
    e = editor(volume)
    session, masks = e.session(toy), []
    for index, positive in ((IN_C, True), (ALSO_IN_C, False), (IN_A, True)):
        point = e.click(index, control=not positive)
        session.add_point(point, positive)
        masks.append(e.mask())
        assert np.array_equal(masks[-1], session.mask), index
        assert e.message == ""
    assert masks[0][IN_C] and not masks[1][ALSO_IN_C] and masks[1].any() and masks[2][IN_A]
    assert e.saved == 3
    for mask in (masks[1], masks[0], np.zeros(SHAPE, np.uint8)):
        e.widget.undo()
        assert np.array_equal(e.mask(), mask)
    e.widget.redo()
    assert np.array_equal(e.mask(), masks[0])
    session.undo()
    session.undo()
    session.add_point(e.click(IN_B))
    assert np.array_equal(e.mask(), session.mask) and e.mask()[IN_B] and e.mask()[IN_C]


def test_a_segmentation_on_another_lattice_gets_the_nearest_voxels(editor: Callable[..., Editor], toy: Any) -> None:
    from mrml_scenes import add_transform

    e = editor(scan("straight"))
    shift = np.eye(4)
    shift[:3, 3] = 0.3, 0.2, -0.4
    e.volume.SetAndObserveTransformNodeID(add_transform(shift).GetID())  # and the segmentation stays where it was
    session = e.session(toy)
    session.add_point(e.click(IN_A))
    assert dice(e.mask(), session.mask) > 0.99
    session.add_point(e.click(IN_B))
    assert dice(e.mask(), filled(A, B)) > 0.99
    session.add_point(e.click((6, 25, 7), control=True), False)
    assert dice(e.mask(), session.mask) > 0.99


def test_the_bundled_model_on_a_real_scan(editor: Callable[..., Editor], data: Path) -> None:
    """A node of the scan itself, 5 cm about the nodule: reading all of it is not what is tested."""
    import slicer
    from UNetSegmentationLib.image import Box, read_image, write_image
    from UNetSegmentationLib.inference.click import MODEL

    folder = data / "chest_ct"
    if not (folder / "LIDC-IDRI-0001_ct.nii.gz").exists():
        pytest.skip("needs LIDC-IDRI-0001 of the data folder's chest_ct")
    truth = read_image(folder / "LIDC-IDRI-0001_nodule.nii.gz")
    found = Box.around(truth.array)
    assert found is not None
    box = found.grown((12, 50, 50)) & Box.whole(truth.shape)
    path = Path(os.environ["UNETSEG_MODELS"]).parent / "part.nrrd"
    write_image(read_image(folder / "LIDC-IDRI-0001_ct.nii.gz").crop(box), path)
    volume, inside = slicer.util.loadVolume(str(path)), truth.array[box.slices] > 0
    if not np.array_equal(slicer.util.arrayFromVolume(volume), read_image(path).array):
        inside = inside[::-1]  # Slicer's loader turns left-handed volumes
    at = [int(i) for i in np.round(np.argwhere(inside).mean(0))]
    e = editor(volume, model=None)
    assert e.scripted.parameter("Model") == "default"
    session = e.session(MODEL)
    session.add_point(e.click(at))
    assert np.array_equal(e.mask(), session.mask) and dice(e.mask(), inside) > 0.85
    session.add_point(e.click((at[0], at[1], at[2] + 30), control=True), False)
    assert np.array_equal(e.mask(), session.mask)
    assert e.segmentation.GetSegmentation().GetSegment(e.segment).HasTag("UNetSegmentation.Prompts")


@pytest.mark.parametrize("versions", [["0.4.0"], ["0.9.0", "0.10.0"]], ids=str)
def test_the_default_is_the_newest_as_everywhere(editor: Callable[..., Editor], models_folder: Path, versions: Sequence[str]) -> None:
    from UNetSegmentationLib.inference.click import MODEL
    from UNetSegmentationLib.model import find_model, write_package

    bundled = find_model(MODEL)
    for version in versions:
        write_package(models_folder / f"{MODEL}-{version}.unet.zip", {**bundled.card.data, "version": version}, bundled.onnx)
    chosen = editor(scan(), model=None).effect._model()
    assert chosen.path == find_model(MODEL).path and chosen.card.version == (bundled.card.version, "0.10.0")[len(versions) - 1]


# ------------------------------------------------------------------------------------------------------------- masking


def others(e: Editor) -> tuple[str, str]:
    """Two more segments, one of them hidden, over parts of the blocks A and C."""
    held = e.segmentation.GetSegmentation()
    shown, hidden = held.AddEmptySegment("", "shown"), held.AddEmptySegment("", "hidden")
    e.draw(filled(((3, 7), (4, 11), (4, 20)), ((5, 9), (8, 20), (24, 29))), shown)
    e.draw(filled(((6, 9), (11, 14), (10, 20)), ((5, 9), (14, 26), (30, 36))), hidden)
    e.segmentation.GetDisplayNode().SetSegmentVisibility(hidden, False)
    return shown, hidden


# Testing/mrml/test_editing.py has every combination.
@pytest.mark.parametrize(
    ("mask_mode", "overwrite", "by_range"),
    [
        (0, "OverwriteNone", True),
        (3, "OverwriteAllSegments", False),
        (4, "OverwriteVisibleSegments", False),
        (5, "OverwriteAllSegments", False),
    ],
)
def test_the_editors_masking_is_slicers(editor: Callable[..., Editor], toy: Any, mask_mode: int, overwrite: str, by_range: bool) -> None:
    import slicer
    from UNetSegmentationLib.mrml import _grid_in, oriented_labelmap, segment_mask

    array = blocks()
    array[:, :, 26:] *= 3  # still one lesion for the network
    e = editor(scan("left-handed", array))
    shown, hidden = others(e)
    e.draw(filled(((5, 8), (20, 26), (20, 30))))  # what the segment had before, partly where it may not be edited
    e.node.SetOverwriteMode(getattr(e.node, overwrite))
    e.node.SetMaskMode(mask_mode)
    e.node.SetMaskSegmentID(hidden)
    if by_range:
        e.node.SetSourceVolumeIntensityMask(True)
        e.node.SetSourceVolumeIntensityMaskRange(1, 2)  # VTK cuts fractions off where voxels are whole numbers
    e.gui.process_events()

    # What Slicer itself makes of the same answer.
    twin = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    twin.Copy(e.segmentation)
    twin.GetSegmentation().DeepCopy(e.segmentation.GetSegmentation())
    twin.CreateDefaultDisplayNodes()
    twin.GetDisplayNode().SetSegmentVisibility(hidden, False)
    corrected = e.mask()
    session = e.session(toy)
    session.set_mask(corrected)
    point = e.click(IN_C)
    session.add_point(point)
    logic = slicer.vtkSlicerSegmentEditorLogic()
    logic.SetMRMLScene(slicer.mrmlScene)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    node.Copy(e.node)
    node.SetAndObserveSegmentationNode(twin)
    logic.SetSegmentEditorNode(node)
    labelmap = oriented_labelmap(session.mask, (0, 0, 0), _grid_in(twin, e.volume))
    logic.ModifySegmentByLabelmap(twin, e.segment, labelmap, logic.ModificationModeSet, True, False)

    assert e.message == "" and not np.array_equal(e.mask(), corrected)
    for segment in (e.segment, shown, hidden):
        assert np.array_equal(e.mask(segment), segment_mask(twin, segment, e.volume)), segment
    assert (e.node.GetMaskMode(), e.node.GetSourceVolumeIntensityMask()) == (mask_mode, by_range)


def test_when_masking_leaves_nothing_a_sentence_says_so(editor: Callable[..., Editor]) -> None:
    import slicer

    e = editor(scan())
    others(e)
    e.node.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedInsideAllSegments)
    saved = e.saved
    e.click(IN_B)
    assert "masking" in e.message and e.message.endswith(".") and e.saved == saved and not e.mask().any()
    e.node.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere)
    e.click(IN_B)
    assert np.array_equal(e.mask(), filled(B)) and e.message == ""


# ------------------------------------------------------------------------------------------- brush, undo, and on again


def test_correct_by_brush_then_click_on(editor: Callable[..., Editor], toy: Any) -> None:
    e = editor(scan())
    session = e.session(toy)
    first = e.click(IN_A)
    session.add_point(first)
    e.draw(filled(((2, 4), (6, 14), (6, 16))), mode="ModificationModeAdd")
    painted = e.mask()
    assert painted.sum() > filled(A).sum()
    session.set_mask(painted)
    session.add_point(e.click(IN_B))
    assert np.array_equal(e.mask(), session.mask)
    # and on, from what was answered
    session.add_point(e.click(IN_C))
    assert np.array_equal(e.mask(), session.mask)
    e.widget.undo()
    e.widget.undo()
    assert np.array_equal(e.mask(), painted)
    e.widget.undo()
    plain = e.session(toy)
    plain.add_point(first)
    plain.add_point(e.click(IN_C))
    assert np.array_equal(e.mask(), plain.mask)


def test_a_predicted_segment_that_was_clicked_at_is_not_replaced(editor: Callable[..., Editor]) -> None:
    from UNetSegmentationLib.mrml import MODEL_TAG

    e = editor(scan())
    segment = e.segmentation.GetSegmentation().GetSegment(e.segment)
    segment.SetTag(MODEL_TAG, "lung-2d-1.0.0")
    e.click(IN_A)
    assert e.mask().any() and not segment.HasTag(MODEL_TAG)
    e.widget.undo()
    assert e.segmentation.GetSegmentation().GetSegment(e.segment).HasTag(MODEL_TAG)


def test_a_mask_too_large_to_look_at_stays_as_it_is(editor: Callable[..., Editor]) -> None:
    array = np.zeros((14, 36, 240), np.int16)
    array[4:8, 6:14, 6:16] = 1
    e = editor(scan(array=array))
    wide = np.zeros(array.shape, np.uint8)
    wide[4:8, 6:14, :230] = 1
    e.draw(wide)
    for positive in (True, False):
        e.click(IN_A if positive else (6, 10, 100), control=not positive)
        assert e.message == TOO_LARGE and np.array_equal(e.mask(), wide)
    assert e.effect.messageLabel.textFormat == e.effect.messageLabel.textFormat.PlainText  # a scan's name is no HTML


def test_what_speaks_against_an_answer_is_said(editor: Callable[..., Editor]) -> None:
    """Here: that the furthest look, of 163 voxels, cuts it, which its segment keeps for the panel's table."""
    from UNetSegmentationLib.inference.click import BEYOND
    from UNetSegmentationLib.mrml import CUT_TAG, segment_part_steps, segment_tag, size_text
    from UNetSegmentationLib.steps import complete

    array = np.zeros((14, 36, 240), np.int16)
    array[2:12, 4:32] = 1
    e = editor(scan(array=array))
    for _ in range(2):  # the first one is doubted
        e.click((6, 18, 120))
    assert e.mask().any() and e.message == BEYOND
    segment = e.segmentation.GetSegmentation().GetSegment(e.segment)
    mask, _ = complete(segment_part_steps(e.segmentation, e.segment, e.volume))
    assert segment_tag(segment, CUT_TAG) == size_text(mask)
    e.effect.startAgain()
    e.wait()
    assert e.message == segment_tag(segment, CUT_TAG) == ""


def test_clicks_that_the_brush_contradicts_are_forgotten(editor: Callable[..., Editor]) -> None:
    e = editor(scan())
    e.click(IN_A)
    e.click(IN_B)
    e.draw(filled(A), mode="ModificationModeRemove")
    e.click(IN_C)
    kinds = [(p[0], *p[4:5]) if p[0] == "point" else p[0] for p in e.effect._controller.answered]
    assert kinds == [("point", True), "mask", ("point", True)]
    assert not (e.mask() & filled(A)).any()


def test_a_segment_that_was_emptied_starts_anew(editor: Callable[..., Editor], toy: Any) -> None:
    e = editor(scan())
    e.click(IN_A)
    e.draw(np.ones(SHAPE), mode="ModificationModeRemove")
    session = e.session(toy)
    session.add_point(e.click(IN_B))
    assert np.array_equal(e.mask(), session.mask) and len(e.effect._controller.answered) == 1


def test_a_segment_that_another_one_overwrote_is_gone_on_with_as_it_is(editor: Callable[..., Editor], toy: Any) -> None:
    e = editor(scan())
    mine = e.segment
    e.click(IN_C)
    e.press("n")
    assert e.segment != mine
    e.draw(filled(((5, 9), (8, 14), (24, 34))))
    from UNetSegmentationLib.mrml import _grid_in, oriented_labelmap

    logic = e.widget._logic
    part = oriented_labelmap(filled(((5, 9), (8, 14), (24, 34))), (0, 0, 0), _grid_in(e.segmentation, e.volume))
    logic.ModifySegmentByLabelmap(e.segmentation, e.segment, part, logic.ModificationModeAdd, True, False)
    e.widget.setCurrentSegmentID(mine)
    left = e.mask()
    assert 0 < left.sum() < filled(C).sum()
    session = e.session(toy)
    session.set_mask(left)
    e.node.SetOverwriteMode(e.node.OverwriteNone)
    session.add_point(e.click(ALSO_IN_C))
    assert np.array_equal(e.mask(), session.mask)


def test_what_changes_the_segment_meanwhile_is_not_overwritten(editor: Callable[..., Editor]) -> None:
    e = editor(scan())
    e.click(IN_A)
    e.click(IN_B, wait=False)
    e.widget.undo()
    e.wait()
    assert "changed meanwhile" in e.message and not e.mask().any() and e.saved == 1
    e.click(IN_B)
    assert np.array_equal(e.mask(), filled(B))


def test_quick_clicks_all_count(editor: Callable[..., Editor], toy: Any) -> None:
    e = editor(scan())
    session = e.session(toy)
    for index in (IN_A, IN_B, IN_C):
        session.add_point(e.click(index, wait=False))
    e.wait()
    assert np.array_equal(e.mask(), session.mask) and np.array_equal(e.mask(), filled(A, B, C)) and 1 <= e.saved <= 3


def test_two_lesions_quickly_one_after_the_other(editor: Callable[..., Editor]) -> None:
    e = editor(scan(), segment=False)
    e.click(IN_A, wait=False)
    e.wait()
    first = e.segment
    e.click(ALSO_IN_C, wait=False)
    e.event("KeyPressEvent", (0, 0), key="n")
    e.click(IN_B, wait=False)
    e.wait()
    assert e.names() == ["thing 1", "thing 2"] and e.segment != first
    assert np.array_equal(e.mask(first), filled(A, C)) and np.array_equal(e.mask(), filled(B))


def test_a_click_that_waits_for_its_turn_goes_where_it_was_aimed(
    editor: Callable[..., Editor], models_folder: Path, make_package: Any
) -> None:
    from UNetSegmentationLib.mrml import CLICK_MODEL_TAG, segment_tag

    other = make_package(task="click", spacing=[1, 1, 1], patch=[16, 48, 48], name="other-click", version="2.1.0")
    shutil.copy(other.path, models_folder)
    e = editor(scan(), active=False)
    first, held = e.segment, e.segmentation.GetSegmentation()
    e.widget.setActiveEffectByName(NAME)
    e.click(IN_A, wait=False)  # while it is getting ready
    second = held.AddEmptySegment("", "another")
    e.widget.setCurrentSegmentID(second)
    e.click(IN_B, wait=False)
    e.wait()
    assert e.message == "" and np.array_equal(e.mask(first), filled(A)) and np.array_equal(e.mask(second), filled(B))
    e.click(IN_C, wait=False)
    e.gui.wait(lambda: e.effect._controller.busy)
    e.effect.modelCombo.setCurrentIndex(e.effect.modelCombo.findData("other-click-2.1.0"))
    e.wait()
    assert e.mask()[IN_C] and segment_tag(held.GetSegment(second), CLICK_MODEL_TAG) == "toy-click-1.0.0"  # who answered
    e.click(IN_A, wait=False)
    e.gui.wait(lambda: e.effect._controller.busy)
    e.effect.modelCombo.setCurrentIndex(e.effect.modelCombo.findData("toy-click-1.0.0"))
    e.click(IN_B, wait=False)  # waits for the other model's answer
    e.wait()
    assert e.message == "" and np.array_equal(e.mask(), filled(A, B, C))
    e.widget.setCurrentSegmentID(first)
    e.click(ALSO_IN_C, wait=False)
    e.gui.wait(lambda: e.effect._controller.busy)
    e.widget.setCurrentSegmentID(second)
    e.scripted.setParameter("Model", "gone-3.0.0")
    e.effect.startAgain()  # of this one: the other's answer is not lost
    e.widget.setCurrentSegmentID(first)
    e.wait()
    assert e.message == "" and np.array_equal(e.mask(first), filled(C))  # A was overwritten
    assert not e.mask(second).any() and segment_tag(held.GetSegment(second), CLICK_MODEL_TAG) == ""


@pytest.mark.parametrize("kind", ["oblique", "left-handed"])
def test_a_saved_scene_is_gone_on_with(editor: Callable[..., Editor], toy: Any, tmp_path: Path, kind: str) -> None:
    import slicer

    e = editor(scan(kind))
    first = e.click(IN_A)
    e.scripted.setParameter("Positive", 0)
    path = tmp_path / "scene.mrb"
    e.gui.save_scene(path)
    e.close()
    e.gui.load_scene(path)
    node = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentEditorNode")
    assert node.GetAttribute(f"{NAME}.Positive") == "0" and node.GetAttribute(f"{NAME}.Model") == "toy-click-1.0.0"
    again = editor(slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode"), active=False)
    slicer.mrmlScene.RemoveNode(again.segmentation)
    again.segmentation = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    again.widget.setSegmentationNode(again.segmentation)
    again.widget.setCurrentSegmentID(again.segmentation.GetSegmentation().GetNthSegmentID(0))
    again.widget.setActiveEffectByName(NAME)
    again.wait()
    again.gui.wait(lambda: again.dots().get("green") is not None)
    session = again.session(toy)
    session.add_point(first)
    assert np.array_equal(again.mask(), session.mask)
    if kind == "left-handed":  # Slicer's loader flips such volumes, so the mask is known by its place alone
        session.set_mask(again.mask())
    session.add_point(again.click(IN_B if kind == "oblique" else (SHAPE[0] - 1 - IN_B[0], *IN_B[1:])))
    assert np.array_equal(again.mask(), session.mask)
    assert again.mask().sum() == filled(A, B).sum()


def test_a_scene_that_was_saved_without_the_effect_is_clicked_into(
    editor: Callable[..., Editor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node of the module Segment Editor stays, but has then the attributes that were saved, and no others."""
    import slicer

    monkeypatch.setattr("UNetSegmentationLib.inference.click.MODEL", "toy-click")
    e = editor(scan(), active=False)
    e.node.SetSingletonTag("SegmentEditor")
    for name in ("Positive", "Model"):
        e.node.RemoveAttribute(f"{NAME}.{name}")
    e.gui.save_scene(tmp_path / "scene.mrb")
    e.gui.load_scene(tmp_path / "scene.mrb")
    assert e.widget.mrmlSegmentEditorNode() is e.node and e.node.GetAttribute(f"{NAME}.Model") is None
    e.volume = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    e.segmentation = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    e.widget.setSegmentationNode(e.segmentation)
    e.widget.setSourceVolumeNode(e.volume)
    e.widget.setActiveEffectByName(NAME)
    e.wait()
    assert e.effect.positiveButton.checked
    e.click(IN_A)
    assert e.message == "" and np.array_equal(e.mask(), filled(A))


@pytest.mark.parametrize("kind", ["oblique", "left-handed"])
def test_a_scan_that_was_hardened_is_gone_on_with(editor: Callable[..., Editor], toy: Any, kind: str) -> None:
    from mrml_scenes import add_transform, rotation
    from UNetSegmentationLib.mrml import PROMPTS_TAG, prompts_from_text, segment_tag

    e = editor(scan(kind))
    e.click(IN_A)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(-15, (3, 1, -1)), (20, -5, 11)
    for node in (e.volume, e.segmentation):
        node.SetAndObserveTransformNodeID(add_transform(matrix).GetID())
        node.HardenTransform()
    e.wait()
    xy = e.xy(IN_A)
    e.gui.process_events()
    assert np.allclose(e.dots()["green"], [xy], atol=2)
    e.click(IN_B)
    segment = e.segmentation.GetSegmentation().GetSegment(e.segment)
    assert segment_tag(segment, "DICOM.SegmentAlgorithmType") == "SEMIAUTOMATIC"
    prompts = prompts_from_text(segment_tag(segment, PROMPTS_TAG), e.volume)
    session = e.session(toy)
    session.replay(prompts)
    assert e.message == "" and [p[0] for p in prompts] == ["point"] * 2
    assert np.array_equal(e.mask(), session.mask) and dice(e.mask(), filled(A, B)) > 0.95


# ------------------------------------------------------------------------------------------------- segments and options


def test_without_a_segment_the_first_click_makes_one(editor: Callable[..., Editor]) -> None:
    from mrml_scenes import tag

    e = editor(scan(), segment=False)
    e.click(IN_A)
    assert e.names() == ["thing 1"] and np.array_equal(e.mask(), filled(A)) and e.saved == 1
    assert "^Nodule~" in tag(e.segmentation.GetSegmentation().GetSegment(e.segment), "TerminologyEntry")
    e.click(IN_B)
    assert e.names() == ["thing 1"] and np.array_equal(e.mask(), filled(A, B))
    e.press("n")
    assert e.names() == ["thing 1", "thing 2"] and not e.mask().any() and "next lesion" in e.message
    e.click(IN_C)
    assert np.array_equal(e.mask(), filled(C)) and e.message == ""
    for _ in range(4):
        e.widget.undo()
    assert e.names() == []
    e.click(IN_C)
    assert e.names() == ["thing 1"] and np.array_equal(e.mask(), filled(C))


def test_start_again_empties_the_segment_in_one_step(editor: Callable[..., Editor], monkeypatch: pytest.MonkeyPatch) -> None:
    from UNetSegmentationLib import mrml
    from UNetSegmentationLib.mrml import PROMPTS_TAG, segment_tag

    kept, part = [], mrml.segment_part_steps

    def looked(node: Any, segment: str, of: Any) -> Any:
        if not e.mask().any():
            kept.append(node.GetSegmentation().GetSegment(segment).HasTag(PROMPTS_TAG))
        return part(node, segment, of)

    def made() -> list[str]:
        segment = e.segmentation.GetSegmentation().GetSegment(e.segment)
        return [segment_tag(segment, f"DICOM.SegmentAlgorithm{which}") for which in ("Type", "Name")]

    e = editor(scan())
    e.click(IN_A)
    e.click(IN_B)
    saved = e.saved
    with monkeypatch.context() as patched:
        patched.setattr(mrml, "segment_part_steps", looked)
        e.effect.clearButton.click()
        e.wait()
    assert kept and not any(kept)  # no emptied segment has clicks, not even while it is looked at in pieces
    assert not e.mask().any() and e.saved == saved + 1 and not any(e.dots().values())
    assert not any(made())  # or what is brushed into it would be exported as a network's
    e.click(IN_C)
    assert np.array_equal(e.mask(), filled(C)) and all(made())
    e.widget.undo()
    e.widget.undo()
    assert np.array_equal(e.mask(), filled(A, B)) and all(made())
    e.node.SetSourceVolumeIntensityMask(True)
    e.node.SetSourceVolumeIntensityMaskRange(-9, -8)  # nothing may be edited
    e.effect.startAgain()
    e.wait()
    assert e.mask().any() and all(made())


def test_buttons_keys_and_mouse(editor: Callable[..., Editor]) -> None:
    e = editor(scan())
    xy = e.xy(IN_A)
    # What Slicer's slice views have for themselves stays theirs.
    for modifiers in ({"shift": True}, {"control": True}, {"control": True, "alt": True}, {"alt": True}, {"control": True, "shift": True}):
        assert e.event("LeftButtonPressEvent", xy, **modifiers)
        assert e.event("LeftButtonReleaseEvent", (xy[0] + 20, xy[1]), **modifiers)
    for name in ("MouseMoveEvent", "RightButtonPressEvent", "MiddleButtonPressEvent", "MouseWheelForwardEvent", "EnterEvent"):
        assert e.event(name, xy)
    for key in "bfgrtvVzyqwi123":
        assert e.press(key)
    assert e.press("x", control=True) and e.press("n", alt=True)
    assert not e.mask().any() and e.saved == 0 and not e.effect.busy
    # What the effect takes.
    assert not e.event("LeftButtonDoubleClickEvent", xy)
    assert not e.press("x")
    assert e.effect.negativeButton.checked and e.scripted.integerParameter("Positive") == 0
    e.click(IN_A)
    assert "click on the lesion first" in e.message and not e.mask().any()
    e.effect.positiveButton.click()
    assert e.scripted.integerParameter("Positive") == 1
    assert not e.event("LeftButtonPressEvent", xy) and not e.event("LeftButtonReleaseEvent", xy)
    e.wait()
    assert np.array_equal(e.mask(), filled(A)) and e.message == ""


def test_a_click_into_a_view_of_another_study_is_refused(editor: Callable[..., Editor]) -> None:
    e, other = editor(scan()), scan()
    other.SetName("Last year's")
    view = e.slice.mrmlSliceCompositeNode()
    view.SetBackgroundVolumeID(other.GetID())
    e.click(IN_A)
    assert e.message.startswith("This view shows 'Last year's' and not ") and not e.mask().any() and e.saved == 0
    view.SetForegroundVolumeID(e.volume.GetID())  # as where the two are compared
    e.click(IN_A)
    assert np.array_equal(e.mask(), filled(A)) and e.message == ""


def test_on_a_screen_of_high_resolution_a_hand_is_as_still_and_a_dot_as_large(editor: Callable[..., Editor]) -> None:
    e = editor(scan())
    view, xy = e.slice.sliceView(), e.xy(IN_A)
    window = view.renderWindow()

    def diameter() -> float:
        actor = window.GetRenderers().GetFirstRenderer().GetViewProps().GetItemAsObject(0)
        return actor.GetMapper().GetInputAlgorithm().GetInputConnection(1, 0).GetProducer().GetScale()

    def ctrl_click(moved: int) -> bool:
        e.event("LeftButtonPressEvent", xy, control=True)
        e.event("LeftButtonReleaseEvent", (xy[0] + moved, xy[1]), control=True)
        e.wait()
        told, _ = "click on the lesion first" in e.message, e.effect._say("")
        return told

    window.SetDPI(144)  # as Slicer's views have it where a pixel of Qt's is two of the screen's
    try:
        view.interactor().SetInteractorStyle(None)  # VTK's own would grab what follows a press
        view.interactor().SetRenderWindow(window)
        assert ctrl_click(6) and not ctrl_click(7)
        e.click(IN_A)
        assert diameter() == 20
    finally:
        view.interactor().SetRenderWindow(None)
        window.SetDPI(72)
    e.widget._onLayoutChanged()
    e.gui.wait(lambda: e.dots().get("green"))
    assert diameter() == 10


def test_another_model_is_chosen_and_a_missing_one_named(
    editor: Callable[..., Editor], models_folder: Path, make_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_package(task="click", spacing=[2, 2, 2], patch=[16, 32, 32], name="other-click", version="2.1.0")
    shutil.copy(other.path, models_folder)
    e = editor(scan())
    combo = e.effect.modelCombo
    assert combo.visible is not None and [combo.itemData(i) for i in range(combo.count)][0] == "default"
    was = combo.currentIndex
    e.gui.wheel(combo, -1 if was else 1)
    assert combo.currentIndex == was  # the wheel is the editor's
    combo.setCurrentIndex(combo.findData("other-click-2.1.0"))
    e.wait()
    assert e.node.GetAttribute(f"{NAME}.Model") == "other-click-2.1.0"
    session = e.session(other)
    session.add_point(e.click(IN_C))
    assert np.array_equal(e.mask(), session.mask)
    e.scripted.setParameter("Model", "gone-3.0.0")
    e.click(IN_A)
    assert "gone-3.0.0 is not installed" in e.message and np.array_equal(e.mask(), session.mask)
    assert combo.currentIndex == -1 and not combo.isHidden()
    monkeypatch.setattr("UNetSegmentationLib.inference.click.MODEL", "toy-click")
    combo.setCurrentIndex(0)
    e.click(IN_A)
    assert e.message == "" and e.node.GetAttribute(f"{NAME}.Model") == "default"
    e.scripted.setParameter("Model", "other-click-1.9.0")
    assert combo.currentIndex == combo.findData("other-click-2.1.0")  # which is taken for it
    was = e.node.StartModify()
    for name, value in (("Positive", "0"), ("Model", "toy-click-1.0.0")):  # a scene brings both
        e.node.SetAttribute(f"{NAME}.{name}", value)
    e.node.EndModify(was)
    assert e.node.GetAttribute(f"{NAME}.Model") == combo.itemData(combo.currentIndex) == "toy-click-1.0.0"
    assert e.effect.negativeButton.checked and not e.effect.positiveButton.checked


def test_what_is_imported_or_removed_while_slicer_runs_is_heeded(
    editor: Callable[..., Editor], toy: Any, models_folder: Path, make_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from UNetSegmentationLib.model import find_model
    from UNetSegmentationPanel import models

    monkeypatch.setattr("UNetSegmentationLib.inference.click.MODEL", "toy-click")
    other = make_package(task="click", spacing=[1, 1, 1], patch=[16, 48, 48], name="toy-click", version="1.1.0")
    e = editor(scan())
    combo = e.effect.modelCombo

    def listed() -> list[str]:
        return [name for name in map(combo.itemData, range(combo.count)) if name.startswith("toy")]

    def again() -> None:
        e.widget.setActiveEffectByName("")
        e.widget.setActiveEffectByName(NAME)
        e.wait()

    shutil.copy(other.path, models_folder)
    again()
    assert listed() == ["toy-click-1.0.0", "toy-click-1.1.0"] and e.effect._model().name == "toy-click-1.0.0"  # what was chosen stays
    combo.setCurrentIndex(0)
    e.wait()
    assert e.effect._model().path == find_model("toy-click").path == models_folder / other.path.name
    with monkeypatch.context() as patched:
        patched.setattr(models, "installedModels", lambda *_: pytest.fail("no package was changed"))
        again()
    combo.setCurrentIndex(combo.findData("toy-click-1.1.0"))
    e.click(IN_A)
    assert e.message == "" and np.array_equal(e.mask(), filled(A))
    for package in (toy, other):
        (models_folder / package.path.name).unlink()
    e.click(IN_B)
    assert e.message == "toy-click-1.1.0 is not installed here; import it or choose another model."
    assert not listed() and combo.currentIndex == -1 and np.array_equal(e.mask(), filled(A))


def test_an_effect_that_is_left_while_it_gets_ready_is_ready_the_next_time(editor: Callable[..., Editor]) -> None:
    e = editor(scan(), active=False)
    steps = e.effect._loadSteps()
    while e.effect._controller is None:
        next(steps)
    steps.close()  # as deactivate() does
    e.widget.setActiveEffectByName(NAME)
    e.wait()
    e.click(IN_A)
    assert e.message == "" and np.array_equal(e.mask(), filled(A))


def test_without_volume_or_segmentation_a_sentence_says_what_to_do(editor: Callable[..., Editor]) -> None:
    import slicer

    e = editor(None, segment=False)
    assert "source volume" in e.message
    e.volume = scan()
    e.click(IN_A)
    assert "source volume" in e.message
    e.widget.setSourceVolumeNode(e.volume)
    e.wait()
    e.click(IN_A)
    assert e.message == "" and np.array_equal(e.mask(), filled(A))
    slicer.mrmlScene.RemoveNode(e.segmentation)
    e.gui.process_events()
    e.click(IN_A)
    assert "segmentation" in e.message and not e.effect.busy


def test_where_nothing_is_a_sentence_says_so_and_nothing_changes(editor: Callable[..., Editor]) -> None:
    from UNetSegmentationLib.inference.click import DOUBTS
    from UNetSegmentationLib.worker.client import ending

    e = editor(scan())
    e.click(NOWHERE)
    assert "Nothing was found here" in e.message and "box" not in e.message and e.saved == 0 and not e.mask().any()
    for doubt in DOUBTS:
        e.effect.onError(doubt)
        assert e.message.startswith(doubt.split(",")[0]) and "click a second time" in e.message and "box" not in e.message
    e.effect.onError(str(ending(-11, "python", "", True)))  # neither is chosen here
    assert "click in the module U-Net Segmentation, by another engine" in e.message
    e.click(IN_A)
    assert e.message == ""
    e.effect.click(e.ras((6, 10, 200)))
    e.wait()
    assert "outside the image" in e.message and np.array_equal(e.mask(), filled(A)) and e.saved == 1
    e.click(IN_B)
    assert np.array_equal(e.mask(), filled(A, B))
    controller = e.effect._controller
    controller._reject([("point", 0.0, 0.0, 0.0, True)], DOUBTS[0])
    assert controller.doubted and "click a second time at the same place, or paint" in e.message
    e.effect.startAgain()
    e.wait()
    assert not controller.doubted and not e.mask().any()


def test_a_hidden_segment_is_asked_about(editor: Callable[..., Editor]) -> None:
    e = editor(scan())
    display = e.segmentation.GetDisplayNode()
    display.SetSegmentVisibility(e.segment, False)
    e.gui.dialogs.answer(False)
    e.click(IN_A)
    assert not e.mask().any() and not display.GetSegmentVisibility(e.segment)
    e.gui.dialogs.answer(True)
    e.click(IN_A)
    assert np.array_equal(e.mask(), filled(A)) and display.GetSegmentVisibility(e.segment)


def test_a_new_segment_is_seen_where_the_segmentation_was_hidden(editor: Callable[..., Editor]) -> None:
    e = editor(scan(), segment=False)
    display = e.segmentation.GetDisplayNode()
    display.SetVisibility(False)
    e.click(IN_A)
    assert np.array_equal(e.mask(), filled(A)) and display.GetVisibility() and display.GetSegmentVisibility(e.segment)


# -------------------------------------------------------------------------------------------------- what else may happen


@pytest.mark.parametrize("what", ["deactivated", "scene", "volume", "segmentation", "closed"])
def test_what_goes_while_a_click_is_on_its_way(editor: Callable[..., Editor], what: str) -> None:
    import qt
    import slicer

    e = editor(scan())
    held = e.segmentation.GetSegmentation()
    e.click(IN_A, wait=False)
    e.gui.wait(lambda: e.effect._controller.busy)
    assert e.effect.messageLabel.text == "Looking …"
    # Slicer's dialogs put back those of all the application, also one that is over by then.
    assert qt.QApplication.overrideCursor() is None
    if what == "deactivated":
        e.widget.setActiveEffectByName("")
    elif what == "scene":
        e.gui.close_scene()
    elif what == "closed":
        e.close()
    else:
        slicer.mrmlScene.RemoveNode(getattr(e, what))
    e.gui.wait(lambda: not e.effect.busy, ANSWER_S)
    e.gui.process_events()
    assert what == "closed" or e.effect.messageLabel.text != "Looking …"
    for i in range(held.GetNumberOfSegments()):
        assert held.GetNthSegment(i).GetRepresentation("Binary labelmap").IsEmpty()
    if what == "deactivated":
        assert not e.dots()
        e.widget.setActiveEffectByName(NAME)
        e.wait()
        e.click(IN_A)
        assert np.array_equal(e.mask(), filled(A))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_a_patient_who_is_gone_stays_nowhere(editor: Callable[..., Editor], left: bool, closed: bool) -> None:
    """Here the panel was never opened."""
    import slicer
    from UNetSegmentationPanel import panelWorker

    e = editor(scan())
    e.click(IN_A)
    e.effect.nextLesion()
    e.wait()
    effect, folder = e.effect, panelWorker()._session.folder
    known = [weakref.ref(node) for node in (e.volume, e.volume.GetImageData(), e.segmentation)]
    assert list(folder.glob("volume-*")) and effect._prompts and e.message
    if left:
        e.widget.setActiveEffectByName("")
    if closed:
        e.gui.close_scene()
        e.gui.wait(lambda: not list(folder.glob("volume-*")), ANSWER_S)
        assert not (effect._prompts or effect._digests or effect._lesions or e.message)
    else:
        slicer.mrmlScene.RemoveNode(e.volume)
        slicer.mrmlScene.RemoveNode(e.segmentation)
        e.gui.process_events()
    e.volume = e.segmentation = e.widget._source = None  # Slicer's widget holds no more than a weak pointer
    gc.collect()
    assert [ref() for ref in known] == [None] * 3


def test_of_a_closed_scene_is_heard_once_and_last(editor: Callable[..., Editor], monkeypatch: pytest.MonkeyPatch) -> None:
    import UNetSegmentationPanel

    told: list[Any] = []
    editor(scan()).click(IN_A)
    UNetSegmentationPanel.closeWorker()  # as where PyTorch is installed
    later = editor(scan())
    later.click(IN_B)
    UNetSegmentationPanel.dataWorker()
    controller = later.effect._controller
    monkeypatch.setattr(UNetSegmentationPanel, "forgetScene", lambda: told.append(controller.volumeNode))
    assert controller.volumeNode is later.volume
    later.gui.close_scene()
    assert told == [None]  # once, and when all have ended their clicks


def test_dots_come_back_after_the_effect_was_left_while_a_click_waited(editor: Callable[..., Editor]) -> None:
    e = editor(scan("straight"))
    e.click(IN_C)
    mine = e.segment
    e.click(ALSO_IN_C, wait=False)
    e.effect.nextLesion()
    e.click(IN_A, wait=False)  # of another lesion, so it waits, and with it the dots
    e.gui.wait(lambda: len(e.effect._tasks) > 1)
    e.widget.setActiveEffectByName("")
    e.widget.setCurrentSegmentID(mine)
    e.xy(IN_C)
    e.widget.setActiveEffectByName(NAME)
    e.gui.wait(lambda: e.dots().get("green"))


def test_dots_show_the_clicks_of_the_selected_segment_on_their_slice(editor: Callable[..., Editor]) -> None:
    e = editor(scan("straight"))
    e.click(IN_C)
    e.click((7, 24, 30), control=True)
    dots = e.dots()
    at = e.xy(IN_C)
    e.gui.process_events()
    dots = e.dots()
    assert len(dots["green"]) == len(dots["red"]) == 1
    assert np.abs(np.subtract(dots["green"][0], at)).max() < 2
    e.slice.mrmlSliceNode().JumpSliceByCentering(*e.ras((10, 10, 10)))
    assert not any(e.dots().values())
    e.xy(IN_C)
    e.widget.undo()
    e.gui.wait(lambda: not e.dots()["red"])
    assert len(e.dots()["green"]) == 1
    e.widget.redo()
    e.gui.wait(lambda: e.dots()["red"])
    mine = e.segment
    e.press("n")
    e.gui.wait(lambda: not any(e.dots().values()))
    e.widget.setCurrentSegmentID(mine)
    e.gui.wait(lambda: e.dots()["green"] and e.dots()["red"])
    e.widget._onLayoutChanged()
    e.gui.wait(lambda: e.dots().get("green"))
    e.widget.setActiveEffectByName("")
    assert not e.dots()


def test_another_frame_of_a_sequence_shows_its_own_dots(editor: Callable[..., Editor]) -> None:
    """Slicer's browser lets the node hold each frame's vtkSegmentation."""
    import slicer

    e, frame = editor(scan("straight")), slicer.vtkMRMLSegmentationNode()
    e.click(IN_C)
    first = slicer.vtkMRMLSegmentationNode()
    first.CopyContent(e.segmentation, False)
    frame.SetAndObserveSegmentation(slicer.vtkSegmentation())
    e.segmentation.CopyContent(frame, False)
    e.gui.wait(lambda: not any(e.dots().values()))
    e.segmentation.CopyContent(first, False)
    e.gui.wait(lambda: e.dots()["green"])
    e.segmentation.GetSegmentation().GetSegment(e.segment).RemoveTag("UNetSegmentation.Prompts")
    e.gui.wait(lambda: not any(e.dots().values()))


@pytest.mark.parametrize("bent", ["volume", "segmentation"])
def test_no_dots_where_nobody_knows_where_they_are(editor: Callable[..., Editor], bent: str) -> None:
    import slicer
    import vtk

    e = editor(scan("straight"))
    e.click(IN_C)
    transform, spline = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode"), vtk.vtkThinPlateSplineTransform()
    points = vtk.vtkPoints()
    for place in ((0, 0, 0), (50, 0, 0), (0, 50, 0), (0, 0, 50)):
        points.InsertNextPoint(place)
    spline.SetSourceLandmarks(points)
    spline.SetTargetLandmarks(points)
    spline.SetBasisToR()
    transform.SetAndObserveTransformToParent(spline)
    getattr(e, bent).SetAndObserveTransformNodeID(transform.GetID())
    e.gui.wait(lambda: not any(e.dots().values()))
    assert e.message == ""
    getattr(e, bent).SetAndObserveTransformNodeID(None)
    e.gui.wait(lambda: len(e.dots()["green"]) == 1)


def test_lesions_are_told_from_each_other_and_a_removed_ones_name_is_not_given_again(editor: Callable[..., Editor]) -> None:
    from UNetSegmentationPanel.nodules import COLORS

    e = editor(scan(), segment=False)
    for index in (IN_A, IN_B):
        e.click(index)
        e.press("n")
    held = e.segmentation.GetSegmentation()
    colors = [tuple(round(255 * c) for c in held.GetNthSegment(i).GetColor()) for i in range(3)]
    assert e.names() == ["thing 1", "thing 2", "thing 3"] and colors == list(COLORS[:3])
    held.RemoveSegment(held.GetNthSegmentID(0))
    e.press("n")
    assert e.names() == ["thing 2", "thing 3", "thing 4"]


def test_no_dots_where_the_segmentation_is_not_shown(editor: Callable[..., Editor]) -> None:
    import slicer

    e = editor(scan("straight"), active=False)
    green = slicer.app.layoutManager().sliceWidget("Green")
    e.segmentation.GetDisplayNode().AddViewNodeID(e.slice.mrmlSliceNode().GetID())
    e.widget.setActiveEffectByName(NAME)
    e.wait()
    e.xy(IN_C, green)
    e.click(IN_C)
    assert e.dots()["green"] and not any(e.dots(green).values())  # there they would not move with the slice


def test_two_editors_do_not_hear_each_other(editor: Callable[..., Editor]) -> None:
    first, second = editor(scan("straight")), editor(scan("oblique"))
    for e, _block, index in ((first, A, IN_A), (second, B, IN_B)):
        e.effect.click(e.ras(index))
    first.wait()
    second.wait()
    assert np.array_equal(first.mask(), filled(A)) and np.array_equal(second.mask(), filled(B))


def test_the_panels_module_is_reloaded(editor: Callable[..., Editor], gui: Any) -> None:
    gui.open()
    e = editor(scan())
    e.click(IN_A)
    gui.reload()
    e.click(IN_B)
    assert np.array_equal(e.mask(), filled(A, B))


def test_the_editor_leaves_nothing_behind(editor: Callable[..., Editor], caplog: pytest.LogCaptureFixture) -> None:
    e = editor(scan())
    e.click(IN_A)
    effect, controller = e.effect, e.effect._controller
    e.close()
    assert not caplog.records
    assert controller.owner is None and not controller._listeners and effect._controller is None
    assert not effect.Observations and not effect._scene.Observations and not e.dots()


def test_the_self_test_passes_here_too(gui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import slicer
    from standins import effects
    from UNetSegmentationLib import sample

    if "UNETSEG_SAMPLE" not in os.environ and not all((sample.sample_folder() / name).is_file() for name, _ in sample.FILES.values()):
        pytest.skip("needs the sample scans: set UNETSEG_SAMPLE")
    sys.modules.pop("SegmentEditorUNetClickLib", None)
    effects.install()
    gui.load()
    gui.load("SegmentEditorUNetClick", MODULE)
    from SegmentEditorUNetClick import SegmentEditorUNetClickTest

    SegmentEditorUNetClickTest().runTest()
    assert gui.dialogs.texts("delay")[-1] == "Test passed"
    slicer.SegmentEditorUNetClickLib.cleanup()  # Slicer's widget does that when it is deleted, the stand-in's deleteLater() does not


def test_the_stand_ins_take_only_what_slicer_takes(editor: Callable[..., Editor]) -> None:
    import qt

    e = editor(scan(), active=False)
    with pytest.raises(AttributeError):
        e.scripted.modifySegment  # noqa: B018
    with pytest.raises(AttributeError):
        e.scripted.color = 1
    with pytest.raises(KeyError, match="cannot be found"):
        e.scripted.parameter("Unknown")
    with pytest.raises(TypeError):
        e.scripted.setParameter("Positive", True)
    with pytest.raises(TypeError):
        e.scripted.addOptionsWidget("text")
    with pytest.raises(TypeError):
        e.scripted.addActor2D(e.slice, None)
    with pytest.raises(RuntimeError):
        e.scripted.modifySegmentByLabelmap(e.segmentation, "none", None, 0)
    assert e.scripted.setPythonSource.__doc__ and isinstance(e.scripted.optionsLayout(), qt.QFormLayout)


def test_a_late_first_answer_does_not_change_the_chosen_segment(editor: Any, toy: Any) -> None:
    e = editor(scan(), segment=False)
    e.click(IN_A, wait=False)
    e.event("KeyPressEvent", (0, 0), key="n")
    e.click(IN_B, wait=False)
    e.wait()
    chosen = e.segment
    assert e.mask(chosen)[IN_B] and not e.mask(chosen)[IN_A]
    e.click(IN_C)
    assert e.segment == chosen and e.mask()[IN_B] and e.mask()[IN_C] and not e.mask()[IN_A]


def test_a_segment_that_is_chosen_while_the_first_answer_is_awaited_stays_chosen(editor: Any, toy: Any) -> None:
    e = editor(scan(), segment=False)
    e.click(IN_A, wait=False)
    e.gui.wait(lambda: e.effect._controller.busy)
    added = e.segmentation.GetSegmentation().AddEmptySegment("", "by hand")
    e.widget.setCurrentSegmentID(added)
    e.wait()
    assert e.segment == added


def test_another_source_volume_keeps_what_was_outlined_in_place(editor: Any, toy: Any) -> None:
    """Of the same size, its grid 9 mm further on, and the same blocks at the same places of the patient."""
    from mrml_scenes import add_volume

    e = editor(scan("straight"))
    e.click(IN_A)
    first, moved = e.volume, np.zeros(SHAPE, np.int16)
    moved[:, : SHAPE[1] - 9] = blocks()[:, 9:]
    grid = place("straight").copy()
    grid[1, 3] += 9
    e.volume = add_volume(moved, grid)
    e.volume.CreateDefaultDisplayNodes()
    e.widget.setSourceVolumeNode(e.volume)
    e.wait()
    e.click((IN_B[0], IN_B[1] - 9, IN_B[2]))
    e.volume = first
    assert e.mask()[IN_A] and e.mask()[IN_B] and e.mask().sum() == filled(A).sum() + filled(B).sum()


def test_a_segment_finer_than_the_scan_is_emptied_between_its_voxels_too(editor: Any, toy: Any) -> None:
    import slicer
    from UNetSegmentationLib.mrml import _grid_in, oriented_labelmap
    from vtk.util.numpy_support import vtk_to_numpy

    e = editor(scan("straight"))
    held = e.segmentation.GetSegmentation()
    grid = _grid_in(e.segmentation, e.volume)
    fine = grid.copy()
    fine[:3, :3] /= 2
    fine[:3, 3] = (grid @ [-0.25, -0.25, -0.25, 1])[:3]
    whole = oriented_labelmap(np.zeros([2 * n for n in SHAPE], np.uint8), (0, 0, 0), fine)
    held.SetConversionParameter("Reference image geometry", slicer.vtkSegmentationConverter.SerializeImageGeometry(whole))
    z, y, x = np.indices([2 * n for n in SHAPE])
    brushed = ((z - 12) ** 2 + (y - 20) ** 2 + (x - 20) ** 2 <= 9.3**2).astype(np.uint8)
    e.widget.saveStateForUndo()
    logic = e.widget._logic
    logic.ModifySegmentByLabelmap(
        e.segmentation, e.segment, oriented_labelmap(brushed, (0, 0, 0), fine), logic.ModificationModeSet, True, True
    )
    e.gui.process_events()

    def count() -> int:
        part = held.GetSegment(e.segment)
        voxels = vtk_to_numpy(part.GetRepresentation("Binary labelmap").GetPointData().GetScalars())
        return int(np.count_nonzero(voxels == part.GetLabelValue()))

    assert count() == brushed.sum()
    e.effect.startAgain()
    e.wait()
    assert count() == 0
    e.click(IN_A)
    assert count() == 8 * filled(A).sum()


def test_a_lesion_between_the_voxels_of_a_coarser_segmentation_is_said(editor: Any) -> None:
    import slicer
    from UNetSegmentationLib.mrml import _grid_in, oriented_labelmap

    array = blocks()
    array[11:13, 31:33, 19:21] = 1
    e = editor(scan("straight", array))
    coarse = np.diag([4, 4, 4, 1.0])
    coarse[:3, 3] = 1.5
    whole = oriented_labelmap(np.zeros([-(-n // 4) for n in SHAPE], np.uint8), (0, 0, 0), _grid_in(e.segmentation, e.volume) @ coarse)
    text = slicer.vtkSegmentationConverter.SerializeImageGeometry(whole)
    e.segmentation.GetSegmentation().SetConversionParameter("Reference image geometry", text)
    e.click((11, 31, 19))
    assert "too coarse for this lesion" in e.message and e.saved == 0 and not e.mask().any()
    e.click(IN_A)
    assert e.message == "" and e.mask().any()
