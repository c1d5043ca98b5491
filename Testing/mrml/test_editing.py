"""How a segment becomes a mask in the Segment Editor: against what Slicer's own editor makes of the same mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")

from mrml_scenes import add_segment, add_transform, add_volume, ball, geometry, rotation, segments  # noqa: E402
from UNetSegmentationLib.image import UserError  # noqa: E402
from UNetSegmentationLib.mrml import (  # noqa: E402
    _grid_in,
    agreeing,
    complete,
    edit_steps,
    image_from_volume,
    mask_digest,
    oriented_labelmap,
    segment_mask,
    segment_part_steps,
)

SHAPE = (12, 16, 18)
MODES = slicer.vtkMRMLSegmentationNode
BEFORE, WANTED = ball(SHAPE, (5, 7, 6), 4), ball(SHAPE, (6, 8, 10), 4)
SHOWN, HIDDEN = ball(SHAPE, (5, 4, 10), 3), ball(SHAPE, (7, 11, 9), 3)


class Editor:
    """The Segment Editor's logic at work on one segmentation of a volume."""

    def __init__(self, runtime: Any, volume: Any, overlapping: bool = False) -> None:
        scene = runtime.scene
        self.volume = volume
        self.node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        self.node.CreateDefaultDisplayNodes()
        self.node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
        self.node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        for name, mask in (("shown", SHOWN), ("hidden", HIDDEN & ~SHOWN), ("mine", BEFORE if overlapping else BEFORE & ~SHOWN & ~HIDDEN)):
            add_segment(self.node, name, mask & 1, volume)
        self.ids = segments(self.node)
        self.node.GetDisplayNode().SetSegmentVisibility(self.ids["hidden"], False)
        self.settings = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        self.settings.SetAndObserveSegmentationNode(self.node)
        self.settings.SetAndObserveSourceVolumeNode(volume)
        self.settings.SetSelectedSegmentID(self.ids["mine"])
        self.settings.SetMaskSegmentID(self.ids["hidden"])
        self.logic = slicer.vtkSlicerSegmentEditorLogic()
        self.logic.SetMRMLApplicationLogic(runtime.application_logic)
        self.logic.SetMRMLScene(scene)
        self.logic.SetSegmentEditorNode(self.settings)

    def masks(self) -> dict[str, np.ndarray]:
        return {name: segment_mask(self.node, i, self.volume) for name, i in self.ids.items()}

    def modify(self, labelmap: Any, mode: int) -> None:
        self.logic.ModifySegmentByLabelmap(self.node, self.ids["mine"], labelmap, mode, True, False)

    def edit(self, mask: np.ndarray | None) -> Any:
        """As the effect does it: what was masked already goes through an editor without masking."""
        edit = complete(edit_steps(mask, (0, 0, 0), self.volume, self.node, self.ids["mine"], self.settings))
        mode, by_range = self.settings.GetMaskMode(), self.settings.GetSourceVolumeIntensityMask()
        self.settings.SetMaskMode(MODES.EditAllowedEverywhere)
        self.settings.SetSourceVolumeIntensityMask(False)
        for labelmap, how in ((edit.removed, self.logic.ModificationModeRemove), (edit.added, self.logic.ModificationModeAdd)):
            if labelmap is not None:
                self.modify(labelmap, how)
        self.settings.SetMaskMode(mode)
        self.settings.SetSourceVolumeIntensityMask(by_range)
        return edit


@pytest.fixture
def volume(scene: Any) -> Any:
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    node = add_volume(values, geometry(rotation() * (1, 1, -1)))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(-30, (1, 0, 2)), (3, 4, 5)
    node.SetAndObserveTransformNodeID(add_transform(matrix).GetID())
    return node


@pytest.mark.parametrize("by_range", [False, True])
@pytest.mark.parametrize("overwrite", ["OverwriteAllSegments", "OverwriteVisibleSegments", "OverwriteNone"])
@pytest.mark.parametrize("mode", range(6))
def test_masking_and_overwriting_are_slicers(runtime: Any, volume: Any, mode: int, overwrite: str, by_range: bool) -> None:
    slicers, ours = Editor(runtime, volume), Editor(runtime, volume)
    for editor in (slicers, ours):
        editor.settings.SetMaskMode(mode)
        editor.settings.SetOverwriteMode(getattr(editor.settings, overwrite))
        editor.settings.SetSourceVolumeIntensityMask(by_range)
        editor.settings.SetSourceVolumeIntensityMaskRange(1000, 2200)
    before = slicers.masks()
    slicers.modify(oriented_labelmap(WANTED, (0, 0, 0), _grid_in(slicers.node, volume)), slicers.logic.ModificationModeSet)
    edit, want = ours.edit(WANTED), slicers.masks()
    assert not np.array_equal(want["mine"], before["mine"])
    for name, mask in ours.masks().items():
        assert np.array_equal(mask, want[name]), name
    assert edit.digest == mask_digest(want["mine"], (0, 0, 0))


@pytest.mark.parametrize("mode", [MODES.EditAllowedOutsideAllSegments, MODES.EditAllowedInsideSingleSegment])
def test_where_it_may_not_be_edited_nothing_changes_of_any_segment(runtime: Any, volume: Any, mode: int) -> None:
    """Slicer's own setting of a segment erases the others under what that keeps outside the editable area."""
    slicers, ours = Editor(runtime, volume, overlapping=True), Editor(runtime, volume, overlapping=True)
    for editor in (slicers, ours):
        editor.settings.SetMaskMode(mode)
        editor.settings.SetOverwriteMode(editor.settings.OverwriteAllSegments)
    before = ours.masks()
    slicers.modify(oriented_labelmap(WANTED, (0, 0, 0), _grid_in(slicers.node, volume)), slicers.logic.ModificationModeSet)
    ours.edit(WANTED)
    want = slicers.masks()
    for name, mask in ours.masks().items():
        differs = mask != want[name]
        assert np.array_equal(mask[differs], before[name][differs]) and before["mine"][differs].all()
        assert name != "mine" or not differs.any()


def test_what_masking_leaves_nothing_of_is_refused(runtime: Any, volume: Any) -> None:
    editor = Editor(runtime, volume)
    editor.settings.SetSourceVolumeIntensityMask(True)
    editor.settings.SetSourceVolumeIntensityMaskRange(-20, -10)
    before = editor.masks()
    with pytest.raises(UserError, match="masking; switch its editable intensity range off, or click elsewhere.$"):
        editor.edit(WANTED)
    assert editor.edit(None).removed is None  # and emptying changes nothing
    assert all(np.array_equal(mask, before[name]) for name, mask in editor.masks().items())


def test_none_empties_and_an_empty_segment_stays_empty(runtime: Any, volume: Any) -> None:
    editor = Editor(runtime, volume)
    before = editor.masks()
    edit = editor.edit(None)
    assert edit.added is None and edit.digest == mask_digest(np.zeros((0, 0, 0), np.uint8), (0, 0, 0))
    after = editor.masks()
    assert not after["mine"].any() and np.array_equal(after["shown"], before["shown"])
    edit = editor.edit(None)
    assert edit.added is None and edit.removed is None


def test_another_lattice_takes_the_nearest_voxels(runtime: Any, volume: Any) -> None:
    editor = Editor(runtime, volume)
    moved = np.eye(4)
    moved[:3, 3] = 0.2, -0.3, 0.4
    volume.SetAndObserveTransformNodeID(add_transform(moved).GetID())  # and the segmentation stays where it was
    assert editor.edit(WANTED).digest is None
    mask = segment_mask(editor.node, editor.ids["mine"], volume)
    assert 2 * (mask & WANTED).sum() / (mask.sum() + WANTED.sum()) > 0.5
    part, start = complete(segment_part_steps(editor.node, editor.ids["mine"], volume))
    assert part.sum() == mask.sum() and len(start) == 3


def test_a_segmentation_without_geometry_gets_the_volumes(runtime: Any, volume: Any) -> None:
    node = runtime.scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
    settings = runtime.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    edit = complete(edit_steps(WANTED, (0, 0, 0), volume, node, None, settings))
    assert node.GetSegmentation().GetConversionParameter("Reference image geometry")
    assert edit.removed is None and edit.digest == mask_digest(WANTED, (0, 0, 0))


def test_points_that_a_corrected_mask_agrees_with(runtime: Any, volume: Any) -> None:
    image = image_from_volume(volume)

    def point(z: int, y: int, x: int, positive: bool) -> tuple[Any, ...]:
        return ("point", *image.index_to_point((x, y, z)), positive)

    mask, start = np.ones((2, 3, 4), np.uint8), (5, 6, 7)
    good = [point(5, 6, 7, True), point(6, 8, 10, True), point(4, 6, 7, False), point(6, 8, 11, False)]
    bad = [point(5, 6, 6, True), point(0, 0, 0, True), point(6, 7, 8, False), ("mask", mask, start), ("box", *range(6))]
    assert agreeing([*good, *bad], mask, start, volume) == good
