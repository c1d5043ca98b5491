"""The Segment Editor's masking and overwrite settings, against Slicer's own mask."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")

from mrml_scenes import (  # noqa: E402
    LUNG,
    NODULE,
    SHAPE,
    add_segment,
    add_transform,
    add_volume,
    assert_no_orphans,
    ball,
    draw,
    fingerprint,
    geometry,
    predicted,
    read_back,
    rotation,
    segments,
)
from UNetSegmentationLib.image import UserError  # noqa: E402
from UNetSegmentationLib.mrml import editor_node, segment_mask, write_prediction, write_prediction_steps  # noqa: E402
from vtk.util.numpy_support import vtk_to_numpy  # noqa: E402

MODES = slicer.vtkMRMLSegmentationNode
INSIDE_ONE = MODES.EditAllowedInsideSingleSegment
ALL_MODES = [
    MODES.EditAllowedEverywhere,
    MODES.EditAllowedInsideAllSegments,
    MODES.EditAllowedInsideVisibleSegments,
    MODES.EditAllowedOutsideAllSegments,
    MODES.EditAllowedOutsideVisibleSegments,
    INSIDE_ONE,
]
SHOWN, HIDDEN = ball(SHAPE, (4, 5, 9), 2), ball(SHAPE, (4, 5, 4), 2)


@pytest.fixture
def volume(scene: Any) -> Any:
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    node = add_volume(values, geometry(rotation() * (1, 1, -1)))
    node.SetAndObserveTransformNodeID(add_transform(np.eye(4)).GetID())
    return node


@pytest.fixture
def target(scene: Any, volume: Any) -> Any:
    """A segmentation with two segments of a person, one of them hidden."""
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    node.CreateDefaultDisplayNodes()
    node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    add_segment(node, "shown", SHOWN, volume)
    hidden = add_segment(node, "hidden", HIDDEN, volume)
    node.GetDisplayNode().SetSegmentVisibility(hidden, False)
    return node


@pytest.fixture
def editor(scene: Any, target: Any) -> Any:
    """As the Segment Editor module keeps it; here with overlap allowed, so that only the mask counts."""
    node = slicer.vtkMRMLSegmentEditorNode()
    node.SetSingletonTag("SegmentEditor")
    node = scene.AddNode(node)
    node.SetAndObserveSegmentationNode(target)
    node.SetOverwriteMode(node.OverwriteNone)
    assert editor_node(scene) is node
    return node


def slicers_mask(editor: Any, volume: Any, edited: str = "") -> np.ndarray:
    """Where Slicer would let the edited segment be edited."""
    node = editor.GetSegmentationNode()
    reference = slicer.vtkSlicerSegmentationsModuleLogic.CreateOrientedImageDataFromVolumeNode(volume, node.GetParentTransformNode())
    mask = slicer.vtkOrientedImageData()
    args = [mask, editor.GetMaskMode(), reference, edited, editor.GetMaskSegmentID() or ""]
    assert node.GenerateEditMask(*args)
    return vtk_to_numpy(mask.GetPointData().GetScalars()).reshape(SHAPE) == 0


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("other_grid", [False, True])
def test_the_editable_area_is_slicers(
    scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray, mode: int, other_grid: bool
) -> None:
    if other_grid:  # the person's segments lie on another lattice than the volume
        for name in ("shown", "hidden"):
            target.GetSegmentation().RemoveSegment(segments(target)[name])
        finer = add_volume(np.zeros((11, 9, 17), np.int16), geometry(rotation() * (1, 1, -1), (0.6, 1.3, 1.9)), "finer")
        finer.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
        add_segment(target, "shown", ball((11, 9, 17), (6, 4, 10), 4), finer)
        target.GetDisplayNode().SetSegmentVisibility(add_segment(target, "hidden", ball((11, 9, 17), (2, 4, 5), 3), finer), False)
    editor.SetMaskMode(mode)
    editor.SetMaskSegmentID(segments(target)["hidden"])
    allowed = slicers_mask(editor, volume)
    others = {name: segment_mask(target, i, volume) for name, i in segments(target).items()}
    prediction = predicted(volume, np.where(labels > 0, labels, 2).astype(np.uint8))
    assert mode == MODES.EditAllowedEverywhere or 0 < allowed.sum() < allowed.size

    write_prediction(prediction, volume, target, editor=editor)
    for label in (NODULE, LUNG):
        expected = (prediction.labels.array == label.value) & allowed
        if expected.any():
            assert np.array_equal(segment_mask(target, segments(target)[label.name], volume), expected)
        else:
            assert label.name not in segments(target)
    for name, mask in others.items():
        assert np.array_equal(segment_mask(target, segments(target)[name], volume), mask)
    assert_no_orphans(target)


def test_the_editors_segmentation_masks_another_one(scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray) -> None:
    move = np.eye(4)
    move[:3, 3] = (0.7, 0, 0)
    target.SetAndObserveTransformNodeID(add_transform(move).GetID())
    editor.SetMaskMode(INSIDE_ONE)
    editor.SetMaskSegmentID(segments(target)["shown"])
    area = segment_mask(target, segments(target)["shown"], volume)
    assert 0 < area.sum() != SHOWN.sum() or not np.array_equal(area, SHOWN)
    node = write_prediction(predicted(volume, labels), volume, editor=editor)
    assert np.array_equal(read_back(node, "lung", volume), (labels == 2) & (area > 0))


@pytest.mark.parametrize("other_volume", [False, True])
def test_the_editable_intensity_range(scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray, other_volume: bool) -> None:
    source = volume
    if other_volume:
        source = add_volume(np.roll(slicer.util.arrayFromVolume(volume), 100), geometry(rotation() * (1, 1, -1)), "PET")
    editor.SetAndObserveSourceVolumeNode(source if other_volume else None)
    editor.SetSourceVolumeIntensityMask(True)
    editor.SetSourceVolumeIntensityMaskRange(300, 650)
    editor.SetMaskMode(MODES.EditAllowedOutsideAllSegments)
    values = slicer.util.arrayFromVolume(source)
    allowed = slicers_mask(editor, volume) & (values >= 300) & (values <= 650)
    write_prediction(predicted(volume, labels), volume, target, editor=editor)
    assert np.array_equal(read_back(target, "lung", volume), (labels == 2) & allowed)


@pytest.mark.parametrize("mode", ["OverwriteAllSegments", "OverwriteVisibleSegments", "OverwriteNone"])
def test_other_segments_keep_their_voxels_and_whose_they_are_alone(
    scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray, mode: str
) -> None:
    editor.SetOverwriteMode(getattr(editor, mode))
    taken = {
        "OverwriteAllSegments": (SHOWN | HIDDEN) > 0,
        "OverwriteVisibleSegments": SHOWN > 0,
        "OverwriteNone": np.zeros(SHAPE, bool),
    }[mode]
    for moved in (labels, np.roll(labels, 1, 2)):  # the second replaces the first, which is no obstacle to itself
        write_prediction(predicted(volume, moved), volume, target, editor=editor)
        for label in (NODULE, LUNG):
            assert np.array_equal(read_back(target, label.name, volume), (moved == label.value) & ~taken)
        assert np.array_equal(read_back(target, "shown", volume), SHOWN)
        assert np.array_equal(read_back(target, "hidden", volume), HIDDEN)
    write_prediction(predicted(volume, labels), volume, target, replace=False, editor=editor)
    first = (np.roll(labels, 1, 2) > 0) & ~taken if mode != "OverwriteNone" else np.zeros(SHAPE, bool)
    assert np.array_equal(read_back(target, "lung 2", volume), (labels == 2) & ~taken & ~first)
    assert np.array_equal(read_back(target, "lung", volume), (np.roll(labels, 1, 2) == 2) & ~taken)


def test_inside_a_segment_means_over_it(scene: Any, volume: Any, target: Any, editor: Any) -> None:
    """With the editor's default, overwrite all, the result would otherwise be left nothing inside the segment."""
    editor.SetOverwriteMode(editor.OverwriteAllSegments)
    editor.SetMaskMode(INSIDE_ONE)
    editor.SetMaskSegmentID(segments(target)["shown"])
    write_prediction(predicted(volume, np.ones(SHAPE, np.uint8)), volume, target, editor=editor)
    assert np.array_equal(read_back(target, "nodule", volume), SHOWN & ~HIDDEN & 1)
    assert np.array_equal(read_back(target, "shown", volume), SHOWN)


@pytest.mark.parametrize("found", [True, False])
def test_what_is_replaced_keeps_its_voxels_outside_the_area(
    scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray, found: bool
) -> None:
    write_prediction(predicted(volume, labels), volume, target)
    before = segments(target)
    editor.SetMaskMode(MODES.EditAllowedOutsideVisibleSegments)
    moved = np.roll(labels, 1, 2) * found
    # Outside "visible": the results themselves are visible, but no mask for themselves.
    area = SHOWN == 0
    write_prediction(predicted(volume, moved), volume, target, editor=editor)
    for label in (NODULE, LUNG):
        expected = (moved == label.value) & area | (labels == label.value) & ~area
        assert np.array_equal(read_back(target, label.name, volume), expected)
    assert segments(target) == before
    assert_no_orphans(target)
    assert np.array_equal(read_back(target, "shown", volume), SHOWN)


def test_former_results_that_overlap_stay_so_outside_the_area(
    scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray
) -> None:
    write_prediction(predicted(volume, labels), volume, target)
    wide = ball(SHAPE, (4, 5, 7), 4)
    draw(target, segments(target)["nodule"], wide, volume)
    assert (read_back(target, "nodule", volume) & read_back(target, "lung", volume)).any()
    editor.SetMaskMode(INSIDE_ONE)
    editor.SetMaskSegmentID(segments(target)["hidden"])
    moved = np.roll(labels, -2, 2)
    write_prediction(predicted(volume, moved), volume, target, editor=editor)
    for label, former in ((NODULE, wide), (LUNG, labels == 2)):
        expected = np.where(HIDDEN > 0, moved == label.value, former)
        assert np.array_equal(read_back(target, label.name, volume), expected)
    assert_no_orphans(target)


def test_limits_that_leave_nothing_change_nothing(scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray) -> None:
    write_prediction(predicted(volume, labels), volume, target)

    def refused(text: str, node: Any = target, **changes: Any) -> None:
        defaults = {"MaskMode": 0, "OverwriteMode": editor.OverwriteNone, "SourceVolumeIntensityMask": False, "MaskSegmentID": None}
        for key, value in (defaults | changes).items():
            getattr(editor, f"Set{key}")(value)
        before = fingerprint(scene)
        with pytest.raises(UserError, match=text):
            write_prediction(predicted(volume, labels), volume, node, editor=editor)
        assert fingerprint(scene) == before

    refused("is a segment that is not there; choose another", MaskMode=INSIDE_ONE, MaskSegmentID="gone")
    editor.SetSourceVolumeIntensityMaskRange(1e6, 2e6)
    nothing, off = "^Nothing of the result is left by the Segment Editor's masking; ", "switch its editable intensity range off"
    overlap, area = "set its overwrite mode to allow overlap", "set its editable area to everywhere"
    alone = f"{nothing}{off}, or move the ROI.$"
    refused(alone, SourceVolumeIntensityMask=True)
    refused(alone, None, SourceVolumeIntensityMask=True)
    refused(f"{nothing}{off} and {overlap}, or", OverwriteMode=editor.OverwriteAllSegments, SourceVolumeIntensityMask=True)
    editor.SetAndObserveSourceVolumeNode(add_volume(np.zeros((3, 4, 5), np.int16), name="other"))
    refused("of volume 'other', which does not lie on the grid of 'CT'; choose", SourceVolumeIntensityMask=True)
    editor.SetAndObserveSegmentationNode(None)
    refused(f"{nothing}{area}, or", None, MaskMode=MODES.EditAllowedInsideAllSegments)


@pytest.mark.parametrize("mode", ALL_MODES[1:])
def test_closed_after_any_piece_the_scene_is_as_before(
    scene: Any, volume: Any, target: Any, editor: Any, labels: np.ndarray, mode: int
) -> None:
    write_prediction(predicted(volume, labels), volume, target)
    target.CreateClosedSurfaceRepresentation()
    editor.SetMaskMode(mode)
    editor.SetMaskSegmentID(segments(target)["hidden"])
    before = fingerprint(scene)
    for pieces in itertools.count():
        steps = write_prediction_steps(predicted(volume, np.roll(labels, 1, 2)), volume, target, editor=editor)
        try:
            for _ in range(pieces):
                next(steps)
        except StopIteration:
            break
        steps.close()
        assert fingerprint(scene) == before, pieces
