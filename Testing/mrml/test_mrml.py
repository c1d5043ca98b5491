"""The MRML adapter on a real MRML scene, against SimpleITK and against Slicer's own readers and writers."""

from __future__ import annotations

import itertools
import os
import sys
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")

import vtk  # noqa: E402
from headless_slicer import SliceView  # noqa: E402
from slicer.util import arrayFromSegmentBinaryLabelmap, vtkMatrixFromArray  # noqa: E402
from UNetSegmentationLib.image import Box, Image, UserError, from_sitk  # noqa: E402
from UNetSegmentationLib.model import Label  # noqa: E402
from UNetSegmentationLib.mrml import (  # noqa: E402
    MODEL_TAG,
    image_from_volume,
    oriented_labelmap,
    segment_mask,
    write_prediction,
    write_scalar_map,
)
from vtk.util.numpy_support import vtk_to_numpy  # noqa: E402

SHAPE = (9, 11, 13)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SURFACE = "Closed surface"
TISSUE = {"category": ["SCT", "49755003", "Morphologically Altered Structure"], "type": ["SCT", "27925004", "Nodule"]}
NODULE = Label(1, "nodule", (230, 159, 0), TISSUE)
LUNG = Label(2, "lung", (86, 180, 233), {})


def rotation(degrees: float = 25.0, axis: tuple[float, float, float] = (1, 2, 3)) -> np.ndarray:
    transform = vtk.vtkTransform()
    transform.RotateWXYZ(degrees, *axis)
    return np.reshape(transform.GetMatrix().GetData(), (4, 4))[:3, :3]


def geometry(direction: np.ndarray, spacing: tuple[float, ...] = (0.7, 1.1, 2.3), origin: tuple[float, ...] = (12, -34, 56)) -> np.ndarray:
    """4x4 from index (x, y, z) to LPS."""
    matrix = np.eye(4)
    matrix[:3, :3] = direction * spacing
    matrix[:3, 3] = origin
    return matrix


def add_volume(array: np.ndarray, to_lps: np.ndarray | None = None, name: str = "CT") -> Any:
    return slicer.util.addVolumeFromArray(array, LPS @ (np.eye(4) if to_lps is None else to_lps), name)


def add_transform(matrix: np.ndarray) -> Any:
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "Move")
    node.SetMatrixTransformToParent(vtkMatrixFromArray(matrix))
    return node


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return ((grid**2).sum(0) <= radius**2).astype(np.uint8)


def predicted(volume: Any, labels: np.ndarray, defs: tuple[Label, ...] = (NODULE, LUNG), model: str = "lung-2d-1.0.0") -> Any:
    image = image_from_volume(volume)
    return SimpleNamespace(labels=image.like(labels), label_defs=defs, model_name=model, uncertainty=None, probabilities=None)


def segments(node: Any) -> dict[str, str]:
    """Name -> ID."""
    segmentation = node.GetSegmentation()
    ids = [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]
    return {segmentation.GetSegment(i).GetName(): i for i in ids}


def read_back(node: Any, name: str, volume: Any) -> np.ndarray:
    """A segment's voxels through Slicer's own function."""
    return arrayFromSegmentBinaryLabelmap(node, segments(node)[name], volume).copy()


def add_segment(node: Any, name: str, mask: np.ndarray, volume: Any) -> str:
    """As the Segment Editor does: an empty segment on the shared layer, then its voxels."""
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    segment_id = node.GetSegmentation().AddEmptySegment("", name)
    labelmap = oriented_labelmap(mask, (0, 0, 0), slicer.util.arrayFromVTKMatrix(matrix))
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    assert logic.SetBinaryLabelmapToSegment(labelmap, node, segment_id, logic.MODE_REPLACE)
    return segment_id


def tag(segment: Any, name: str) -> str:
    value = vtk.reference("")
    return str(value) if segment.GetTag(name, value) else ""


def assert_no_orphans(node: Any) -> None:
    """No layer holds voxels that belong to no segment."""
    segmentation = node.GetSegmentation()
    for i in range(segmentation.GetNumberOfLayers()):
        owners = {segmentation.GetSegment(s).GetLabelValue() for s in segmentation.GetSegmentIDsForLayer(i)}
        scalars = segmentation.GetLayerDataObject(i).GetPointData().GetScalars()
        assert set(np.unique(vtk_to_numpy(scalars))) <= owners | {0}


def snapshot(scene: Any) -> tuple[int, list[int]]:
    """The number of nodes, and the number of segments of each segmentation."""
    nodes = slicer.util.getNodesByClass("vtkMRMLSegmentationNode", scene)
    return scene.GetNumberOfNodes(), [n.GetSegmentation().GetNumberOfSegments() for n in nodes]


@pytest.fixture
def labels() -> np.ndarray:
    out = np.zeros(SHAPE, np.uint8)
    out[2:7, 3:9, 4:11] = LUNG.value
    out[3:5, 4:7, 6:9] = NODULE.value
    return out


# ------------------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("oblique", [False, True])
def test_geometry_is_simpleitks_for_every_axis_order_and_sign(scene: Any, oblique: bool) -> None:
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        direction = np.eye(3)[:, order] * signs
        if oblique:
            direction = rotation() @ direction
        to_lps = geometry(direction)
        reference = sitk.GetImageFromArray(array)
        reference.SetSpacing((0.7, 1.1, 2.3))
        reference.SetOrigin((12, -34, 56))
        reference.SetDirection(direction.ravel())

        image = image_from_volume(add_volume(array, to_lps))

        assert np.array_equal(image.array, array)
        assert image.same_grid(from_sitk(reference), 1e-6)
        for index in [(0, 0, 0), (12, 3, 8), (5, 10, 0)]:
            assert image.index_to_point(index) == pytest.approx(reference.TransformIndexToPhysicalPoint(index), abs=1e-9)
            assert image.point_to_index(reference.TransformIndexToPhysicalPoint(index)) == pytest.approx(index, abs=1e-9)


@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".mha"])
@pytest.mark.parametrize("handed", ["right", "left"])
def test_a_loaded_file_has_simpleitks_values_at_the_same_points(scene: Any, tmp_path: Path, suffix: str, handed: str) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, SHAPE, np.int16)
    file = sitk.GetImageFromArray(array)
    file.SetSpacing((0.7, 1.1, 2.3))
    file.SetOrigin((12, -34, 56))
    file.SetDirection((rotation() * (1, 1, 1 if handed == "right" else -1)).ravel())
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(file, str(path))
    reference = sitk.ReadImage(str(path))

    image = image_from_volume(slicer.modules.volumes.logic().AddArchetypeVolume(str(path), "scan", 0))

    for z, y, x in np.ndindex(SHAPE):
        index = image.point_to_index(reference.TransformIndexToPhysicalPoint((x, y, z)))
        nearest = tuple(round(v) for v in index)
        assert index == pytest.approx(nearest, abs=1e-3)
        assert image.array[nearest[::-1]] == reference[x, y, z]
    # The trap that this test is about: the loader turns left-handed files over.
    assert np.array_equal(image.array, array[::-1] if handed == "left" else array)


def test_the_array_is_a_view_of_the_node(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.float32))
    image = image_from_volume(volume)
    slicer.util.arrayFromVolume(volume)[1, 2, 3] = 7
    assert image.array[1, 2, 3] == 7
    assert image.array.dtype == np.float32


def test_channels_of_a_vector_volume_come_first(scene: Any) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), np.uint8)
    volume = slicer.util.addVolumeFromArray(rgb, nodeClassName="vtkMRMLVectorVolumeNode")
    image = image_from_volume(volume)
    assert image.array.shape == (3, *SHAPE)
    assert np.array_equal(image.array[2], rgb[..., 2])


def test_linear_transforms_are_multiplied_in(scene: Any) -> None:
    to_lps = geometry(rotation())
    volume = add_volume(np.zeros(SHAPE, np.int16), to_lps)
    inner, outer = np.eye(4), np.eye(4)
    inner[:3, :3], inner[:3, 3] = rotation(40, (3, 1, 1)), (5, 6, 7)
    outer[:3, 3] = (-50, 20, 10)
    child, parent = add_transform(inner), add_transform(outer)
    child.SetAndObserveTransformNodeID(parent.GetID())
    volume.SetAndObserveTransformNodeID(child.GetID())

    index = (3, 4, 5)
    world = outer @ inner @ LPS @ to_lps @ [*index, 1]
    assert image_from_volume(volume).index_to_point(index) == pytest.approx((LPS @ world)[:3], abs=1e-9)


def test_an_extent_that_does_not_start_at_zero_shifts_the_place(scene: Any) -> None:
    whole = add_volume(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), geometry(rotation()))
    clip = vtk.vtkImageClip()
    clip.SetInputData(whole.GetImageData())
    clip.SetOutputWholeExtent(3, 8, 2, 9, 1, 6)
    clip.ClipDataOn()
    clip.Update()
    part = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "part")
    part.CopyOrientation(whole)
    part.SetAndObserveImageData(clip.GetOutput())
    expected = image_from_volume(whole).crop(Box((1, 2, 3), (7, 10, 9)))

    image = image_from_volume(part)
    assert np.array_equal(image.array, expected.array)
    assert image.same_grid(expected, 1e-6)
    mask = ball(image.shape, (3, 3, 3), 2)
    node = write_prediction(predicted(part, mask), part)
    assert segment_mask(node, segments(node)["nodule"], whole).nonzero()[0].min() == 1 + mask.nonzero()[0].min()


def test_non_linear_transforms_are_refused(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    prediction = predicted(volume, labels)
    bend = scene.AddNewNodeByClass("vtkMRMLTransformNode", "Bend")
    spline = vtk.vtkThinPlateSplineTransform()
    for points, shift in ((vtk.vtkPoints(), 0), (vtk.vtkPoints(), 3)):
        for p in itertools.product((0, 10), repeat=3):
            points.InsertNextPoint(p[0] + shift * (p == (0, 0, 0)), *p[1:])
        (spline.SetTargetLandmarks if shift else spline.SetSourceLandmarks)(points)
    bend.SetAndObserveTransformToParent(spline)
    node = write_prediction(prediction, volume)
    volume.SetAndObserveTransformNodeID(bend.GetID())
    before = snapshot(scene)

    for call in (
        lambda: image_from_volume(volume),
        lambda: write_prediction(prediction, volume),
        lambda: write_scalar_map(prediction.labels, volume, "u", "uncertainty"),
    ):
        with pytest.raises(UserError, match="'CT' is under the non-linear transform 'Bend'; harden"):
            call()
    assert snapshot(scene) == before

    volume.SetAndObserveTransformNodeID(None)
    node.SetAndObserveTransformNodeID(bend.GetID())
    for call in (lambda: write_prediction(prediction, volume, node), lambda: segment_mask(node, segments(node)["lung"], volume)):
        with pytest.raises(UserError, match="'CT segmentation' is under the non-linear transform"):
            call()


def test_shear_is_refused_whether_in_the_volume_or_in_its_transform(scene: Any) -> None:
    tilt = np.eye(4)
    tilt[1, 2] = 0.3
    with pytest.raises(UserError, match=r"not at right angles \(gantry tilt or shear\); harden"):
        image_from_volume(add_volume(np.zeros(SHAPE, np.int16), tilt))
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation()))
    volume.SetAndObserveTransformNodeID(add_transform(np.diag([2.0, 1, 1, 1])).GetID())
    with pytest.raises(UserError, match="not at right angles, because of its transform; harden"):
        image_from_volume(volume)


def test_uneven_scale_along_the_axes_is_only_another_spacing(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    volume.SetAndObserveTransformNodeID(add_transform(np.diag([2.0, 1, 3, 1])).GetID())
    assert image_from_volume(volume).spacing == pytest.approx((2, 1, 3))


def test_a_volume_without_voxels_is_refused(scene: Any) -> None:
    with pytest.raises(UserError, match="Volume 'empty' has no voxels; load a scan"):
        image_from_volume(scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty"))


# ------------------------------------------------------------------------------------------------------------ segments


@pytest.mark.parametrize("handed", [1, -1])
def test_a_prediction_becomes_segments_voxel_by_voxel(scene: Any, labels: np.ndarray, handed: int) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, handed)))
    node = write_prediction(predicted(volume, labels), volume)

    assert list(segments(node)) == ["nodule", "lung"]
    for label in (NODULE, LUNG):
        segment = node.GetSegmentation().GetSegment(segments(node)[label.name])
        expected = labels == label.value
        assert np.array_equal(read_back(node, label.name, volume), expected)
        mask = segment_mask(node, segments(node)[label.name], volume)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, expected)
        assert segment.GetColor() == pytest.approx([c / 255 for c in label.color])
        assert tag(segment, MODEL_TAG) == "lung-2d-1.0.0"
        assert not segment.GetNameAutoGenerated() and not segment.GetColorAutoGenerated()
    nodule = node.GetSegmentation().GetSegment(segments(node)["nodule"])
    assert tag(nodule, "TerminologyEntry") == NODULE.terminology_entry()
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is volume
    assert node.GetSegmentation().GetConversionParameter("Reference image geometry")
    assert node.GetDisplayNode() is not None
    assert node.GetName() == "CT segmentation"


def test_only_labels_that_occur_become_segments(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    assert list(segments(write_prediction(predicted(volume, labels * (labels == 2)), volume))) == ["lung"]
    assert segments(write_prediction(predicted(volume, np.zeros(SHAPE, np.uint8)), volume)) == {}
    assert segments(write_prediction(predicted(volume, labels, ()), volume)) == {}


def test_many_labels_share_one_layer(scene: Any) -> None:
    values = np.arange(1, 301, dtype=np.uint16) * 7
    array = np.zeros((10, 10, 10), np.uint16)
    array.ravel()[100:400] = values
    volume = add_volume(np.zeros(array.shape, np.int16))
    defs = tuple(Label(int(v), f"L{v}", (1, 2, 3), {}) for v in values)
    node = write_prediction(predicted(volume, array, defs), volume)
    assert len(segments(node)) == 300
    assert node.GetSegmentation().GetNumberOfLayers() == 1
    for value in (values[0], values[254], values[255], values[299]):
        assert np.array_equal(segment_mask(node, segments(node)[f"L{value}"], volume), array == value)


@pytest.mark.parametrize("handed", [1, -1])
@pytest.mark.parametrize("replace", [True, False])
def test_no_other_segment_loses_a_voxel(scene: Any, labels: np.ndarray, handed: int, replace: bool) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, handed)))
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    others = {
        "overlapping": ball(SHAPE, (4, 5, 7), 3),
        "beside": ball(SHAPE, (8, 0, 0), 2),
        "inside": ball(SHAPE, (4, 5, 7), 1),
        "around": np.ones(SHAPE, np.uint8),
    }
    for name, mask in others.items():
        add_segment(node, name, mask, volume)

    for moved in (labels, np.roll(labels, 2, 2), np.roll(labels, -1, 0)):
        assert write_prediction(predicted(volume, moved), volume, node, replace) is node
        for name, mask in others.items():
            assert np.array_equal(read_back(node, name, volume), mask), name
        assert_no_orphans(node)
        last = "nodule" if replace else list(segments(node))[-2]
        assert np.array_equal(read_back(node, last, volume), moved == NODULE.value)
    names = ["nodule", "lung"] if replace else ["nodule", "lung", "nodule 2", "lung 2", "nodule 3", "lung 3"]
    assert list(segments(node)) == [*others, *names]
    if not replace:
        assert np.array_equal(read_back(node, "lung", volume), labels == LUNG.value)
        assert np.array_equal(read_back(node, "lung 2", volume), np.roll(labels, 2, 2) == LUNG.value)


def test_segments_of_another_grid_keep_their_voxels(scene: Any, labels: np.ndarray) -> None:
    """MODE_REPLACE on a shared layer would resample them to the new grid."""
    first = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation()))
    node = write_prediction(predicted(first, labels), first)
    over, beside = ball(SHAPE, (4, 5, 7), 3), ball(SHAPE, (8, 0, 0), 2)
    own = {add_segment(node, "over", over, first): over, add_segment(node, "beside", beside, first): beside}
    assert node.GetSegmentation().GetNumberOfLayers() == 2  # "beside" shares the prediction's
    second = add_volume(np.zeros((6, 7, 8), np.int16), geometry(rotation(70), (1.3, 0.9, 1.7)), "MR")
    mask = ball((6, 7, 8), (3, 3, 4), 2)

    write_prediction(predicted(second, mask), second, node, replace=False)
    assert np.array_equal(read_back(node, "nodule", first), labels == 1)
    assert np.array_equal(read_back(node, "lung", first), labels == 2)
    assert all(np.array_equal(segment_mask(node, i, first), m) for i, m in own.items())
    assert np.array_equal(read_back(node, "nodule 2", second), mask)

    write_prediction(predicted(second, mask), second, node)  # now onto segments that lie on the first grid
    assert np.array_equal(read_back(node, "nodule", second), mask)
    assert "lung" not in segments(node)
    assert_no_orphans(node)
    assert all(np.array_equal(segment_mask(node, i, first), m) for i, m in own.items())
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is first


def test_replacing_keeps_the_segment_and_what_a_person_changed_on_it(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels), volume)
    before = segments(node)
    node.GetSegmentation().GetSegment(before["lung"]).SetColor(1, 0, 0)
    node.GetDisplayNode().SetSegmentOpacity(before["lung"], 0.3)

    moved = np.roll(labels, 2, 2)
    write_prediction(predicted(volume, moved, model="lung-2d-1.1.0"), volume, node)
    assert segments(node) == before
    lung = node.GetSegmentation().GetSegment(before["lung"])
    assert np.array_equal(read_back(node, "lung", volume), moved == LUNG.value)
    assert lung.GetColor() == (1, 0, 0)
    assert tag(lung, MODEL_TAG) == "lung-2d-1.1.0"
    assert node.GetDisplayNode().GetSegmentOpacity2DFill(before["lung"]) == pytest.approx(0.3)
    assert node.GetSegmentation().GetNumberOfLayers() == 1

    write_prediction(predicted(volume, labels * (labels == 1)), volume, node)
    assert list(segments(node)) == ["nodule"]


def test_a_persons_segments_are_never_replaced(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    hers = ball(SHAPE, (4, 5, 7), 3)
    add_segment(node, "nodule", hers, volume)
    for _ in range(2):
        write_prediction(predicted(volume, labels), volume, node)
        assert list(segments(node)) == ["nodule", "nodule 2", "lung"]
        assert np.array_equal(read_back(node, "nodule", volume), hers)
        assert np.array_equal(read_back(node, "nodule 2", volume), labels == 1)
    node.GetSegmentation().GetSegment(segments(node)["lung"]).SetName("right lung, corrected")
    write_prediction(predicted(volume, np.roll(labels, 1, 0)), volume, node)
    assert np.array_equal(read_back(node, "right lung, corrected", volume), labels == 2)
    assert np.array_equal(read_back(node, "lung", volume), np.roll(labels, 1, 0) == 2)


def test_labels_of_one_name_stay_apart(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    twice = (NODULE, Label(2, "nodule", (1, 2, 3), {}), Label(3, "nodule 7", (1, 2, 3), {}))
    labels[8, 8, 8] = 3
    node = write_prediction(predicted(volume, labels * (labels == 3), twice), volume)
    for moved in (labels, np.roll(labels, 2, 2), labels):
        write_prediction(predicted(volume, moved, twice), volume, node)
        assert list(segments(node)) == ["nodule 7", "nodule", "nodule 2"]
        for value, name in ((3, "nodule 7"), (1, "nodule"), (2, "nodule 2")):
            assert np.array_equal(read_back(node, name, volume), moved == value)


def test_surfaces_that_exist_follow_and_none_is_lost(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels * (labels == 1)), volume)
    assert not node.GetSegmentation().ContainsRepresentation(SURFACE)
    other = add_segment(node, "other", ball(SHAPE, (4, 5, 7), 3), volume)
    node.CreateClosedSurfaceRepresentation()

    def surface(segment_id: str) -> Any:
        return node.GetSegmentation().GetSegment(segment_id).GetRepresentation(SURFACE)

    kept, before = surface(other), surface(segments(node)["nodule"]).GetBounds()
    write_prediction(predicted(volume, np.roll(labels, 2, 0)), volume, node)
    assert surface(other) is kept
    after = surface(segments(node)["nodule"]).GetBounds()
    assert after[4:] == pytest.approx((before[4] + 2, before[5] + 2), abs=0.1)
    assert surface(segments(node)["lung"]).GetNumberOfPoints() > 0

    beside = add_segment(node, "beside", ball(SHAPE, (8, 0, 0), 2), volume)
    assert len(node.GetSegmentation().GetSegmentIDsForLayer(0)) == 3  # it shares the layer of nodule and lung
    points = surface(beside).GetNumberOfPoints()
    write_prediction(predicted(volume, labels), volume, node)
    assert surface(other) is kept
    assert surface(beside).GetNumberOfPoints() == points > 0
    assert surface(segments(node)["nodule"]).GetBounds() == pytest.approx(before, abs=0.1)
    write_prediction(predicted(volume, np.zeros(SHAPE, np.uint8)), volume, node)
    assert list(segments(node)) == ["other", "beside"]
    assert surface(other) is kept
    assert surface(beside).GetNumberOfPoints() == points


def test_seg_nrrd_keeps_voxels_names_colours_and_terminology(scene: Any, labels: np.ndarray, tmp_path: Path) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, -1)))
    node = write_prediction(predicted(volume, labels), volume)
    overlapping = ball(SHAPE, (4, 5, 7), 3)
    add_segment(node, "overlapping", overlapping, volume)
    path = tmp_path / "result.seg.nrrd"
    storage = slicer.vtkMRMLSegmentationStorageNode()
    storage.SetFileName(str(path))
    assert storage.WriteData(node) == 1

    loaded = slicer.modules.segmentations.logic().LoadSegmentationFromFile(str(path), True, "loaded")
    assert list(segments(loaded)) == ["nodule", "lung", "overlapping"]
    for label in (NODULE, LUNG):
        segment = loaded.GetSegmentation().GetSegment(segments(loaded)[label.name])
        assert np.array_equal(segment_mask(loaded, segments(loaded)[label.name], volume), labels == label.value)
        assert segment.GetColor() == pytest.approx([c / 255 for c in label.color], abs=1e-4)
        assert tag(segment, MODEL_TAG) == "lung-2d-1.0.0"
    nodule = loaded.GetSegmentation().GetSegment(segments(loaded)["nodule"])
    assert tag(nodule, "TerminologyEntry") == NODULE.terminology_entry()
    assert np.array_equal(read_back(loaded, "overlapping", volume), overlapping)
    # A result that was saved and loaded is still ours to replace.
    write_prediction(predicted(volume, np.roll(labels, 1, 0)), volume, loaded)
    assert np.array_equal(read_back(loaded, "lung", volume), np.roll(labels, 1, 0) == 2)
    assert list(segments(loaded)) == ["nodule", "lung", "overlapping"]


def test_segments_lie_where_the_transformed_volume_lies(scene: Any, labels: np.ndarray) -> None:
    to_lps = geometry(rotation() * (1, 1, -1))
    volume = add_volume(np.zeros(SHAPE, np.int16), to_lps)
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation(40, (3, 1, 1)), (5, 6, 7)
    transform = add_transform(move)
    volume.SetAndObserveTransformNodeID(transform.GetID())
    in_world = add_volume(np.zeros(SHAPE, np.int16), LPS @ move @ LPS @ to_lps, "hardened")

    node = write_prediction(predicted(volume, labels), volume)
    assert node.GetParentTransformNode() is transform
    assert np.array_equal(read_back(node, "nodule", in_world), labels == 1)
    assert np.array_equal(segment_mask(node, segments(node)["nodule"], in_world), labels == 1)

    # A segmentation with segments of its own keeps its own transform.
    fixed = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "fixed")
    add_segment(fixed, "own", ball(SHAPE, (4, 5, 7), 3), in_world)
    write_prediction(predicted(volume, labels), volume, fixed)
    assert fixed.GetParentTransformNode() is None
    assert np.array_equal(read_back(fixed, "nodule", in_world), labels == 1)
    assert np.array_equal(read_back(fixed, "own", in_world), ball(SHAPE, (4, 5, 7), 3))


def test_a_result_of_another_grid_changes_nothing(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(np.eye(3)))
    node = write_prediction(predicted(volume, labels), volume)
    smaller = add_volume(np.zeros((9, 11, 12), np.int16), geometry(np.eye(3)), "smaller")
    upside_down = add_volume(np.zeros(SHAPE, np.int16), geometry(np.diag([1, 1, -1]), origin=(12, -34, 56 + 8 * 2.3)), "flipped")
    mask = read_back(node, "lung", volume)
    before = snapshot(scene)
    for target in (None, node):
        with pytest.raises(UserError, match="The result has 12 x 11 x 9 voxels but volume 'CT' has 13 x 11 x 9; run the model"):
            write_prediction(predicted(smaller, labels[:, :, :12]), volume, target)
        with pytest.raises(UserError, match="The result lies elsewhere than volume 'CT', which was moved or replaced; run"):
            write_prediction(predicted(upside_down, labels), volume, target)
    with pytest.raises(UserError, match="voxels but volume 'CT'"):
        write_scalar_map(Image(np.zeros((1, 2, 3), np.float32)), volume, "u", "uncertainty")
    assert snapshot(scene) == before
    assert np.array_equal(read_back(node, "lung", volume), mask)


def test_a_segmentation_of_surfaces_is_refused_but_can_be_read(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros((40, 40, 40), np.int16))
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "contours")
    node.GetSegmentation().SetSourceRepresentationName(SURFACE)
    sphere = vtk.vtkSphereSource()
    sphere.SetRadius(12)
    sphere.SetCenter(-20, -20, 20)
    sphere.SetThetaResolution(60)
    sphere.SetPhiResolution(60)
    sphere.Update()
    segment_id = node.AddSegmentFromClosedSurfaceRepresentation(sphere.GetOutput(), "ball")
    before = snapshot(scene)
    prediction = predicted(volume, ball((40, 40, 40), (20, 20, 20), 9))
    with pytest.raises(UserError, match="'contours' keeps its segments as closed surface; choose another"):
        write_prediction(prediction, volume, node)
    assert snapshot(scene) == before

    mask = segment_mask(node, segment_id, volume)
    assert not node.GetSegmentation().ContainsRepresentation("Binary labelmap")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    assert node.CreateBinaryLabelmapRepresentation()
    assert mask.sum() == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.03)
    assert np.array_equal(mask, read_back(node, "ball", volume))


def test_segment_mask_of_empty_and_unknown_segments_and_of_other_grids(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels), volume)
    empty = node.GetSegmentation().AddEmptySegment("", "empty")
    assert segment_mask(node, empty, volume).sum() == 0
    alone = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "alone")
    assert segment_mask(alone, alone.GetSegmentation().AddEmptySegment("", "empty"), volume).shape == SHAPE
    with pytest.raises(UserError, match="has no segment 'liver'; choose one"):
        segment_mask(node, "liver", volume)
    half = add_volume(np.zeros((9, 11, 26), np.int16), geometry(np.eye(3), (0.5, 1, 1), (-0.25, 0, 0)), "finer")
    assert np.array_equal(segment_mask(node, segments(node)["lung"], half), np.repeat(labels == 2, 2, axis=2))


def test_results_lie_beside_the_volume_in_the_subject_hierarchy(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study")
    hierarchy.CreateItem(study, volume)
    prediction = predicted(volume, labels)
    node = write_prediction(prediction, volume)
    uncertainty = write_scalar_map(prediction.labels.like(np.zeros(SHAPE, np.float32)), volume, "u", "uncertainty")
    for item in (node, uncertainty):
        assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(item)) == study


# ---------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("kind", ["uncertainty", "probability"])
def test_a_map_lies_over_its_volume(scene: Any, kind: str) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, -1)))
    volume.SetAndObserveTransformNodeID(add_transform(np.eye(4)).GetID())
    values = np.random.default_rng(0).random(SHAPE, np.float32)
    values[0, 0, :2] = 0, 1.0000001
    image = image_from_volume(volume)

    first = write_scalar_map(image.like(values), volume, f"CT {kind}", kind)
    second = write_scalar_map(image.like(values), volume, f"CT {kind}", kind)

    written = image_from_volume(first)
    assert written.array.dtype == np.float32
    assert np.array_equal(written.array, values.clip(0, 1))
    assert written.same_grid(image, 1e-6)
    assert first.GetName() == f"CT {kind}"
    assert first.GetParentTransformNode() is volume.GetParentTransformNode()
    display = first.GetDisplayNode()
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax(), display.GetAutoWindowLevel()) == (0, 1, 0)
    assert (display.GetLowerThreshold(), display.GetUpperThreshold()) == (0.05, 1)
    assert display.GetApplyThreshold()
    assert not display.GetAutoThreshold()
    colors = display.GetColorNode()
    assert colors is second.GetDisplayNode().GetColorNode()
    assert colors.GetNumberOfColors() == 256
    assert scene.GetSingletonNode(f"UNetSegmentation.{kind}", "vtkMRMLColorTableNode") is colors


def test_a_map_of_unknown_kind_or_with_channels_is_a_programming_error(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    image = image_from_volume(volume)
    with pytest.raises(ValueError, match="of kind 'doubt'"):
        write_scalar_map(image, volume, "u", "doubt")
    with pytest.raises(ValueError, match="a map is"):
        write_scalar_map(image.like(np.zeros((2, *SHAPE), np.float32)), volume, "p", "probability")


# ------------------------------------------------------------------------------------------------------------ pictures


def needs_opengl() -> None:
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and find_library("EGL") is None:
        pytest.skip("libEGL is missing (Debian: apt-get install libegl1)")


def write_png(picture: np.ndarray, path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(picture), isVector=True), str(path))


def test_a_slice_view_shows_segments_and_uncertainty(runtime: Any, scene: Any, tmp_path: Path) -> None:
    needs_opengl()
    shape = (20, 64, 64)
    body = 1000 * ball(shape, (10, 32, 32), 26).astype(np.int16)
    body[ball(shape, (10, 32, 20), 6) > 0] = 200
    scan = (body - 1000 + np.random.default_rng(0).integers(-30, 30, shape)).astype(np.int16)
    volume = add_volume(scan, geometry(np.eye(3), (1.5, 1.5, 3), (-48, -48, -30)))
    volume.CreateDefaultDisplayNodes()
    volume.GetDisplayNode().AutoWindowLevelOff()
    volume.GetDisplayNode().SetWindowLevelMinMax(-1000, 300)
    image = image_from_volume(volume)

    def place(x: float, y: float) -> tuple[float, float, float]:
        right, anterior, superior = (LPS @ [*image.index_to_point((x, y, 10)), 1])[:3]
        return float(right), float(anterior), float(superior)

    view = SliceView(runtime, "Red", "Axial", (400, 400))
    view.show(volume)
    view.node.JumpSlice(*place(32, 32))
    right, left, middle = place(20, 32), place(44, 32), place(32, 32)

    def grey(picture: np.ndarray, ras: tuple[float, float, float]) -> bool:
        return int(np.ptp(view.pixel(picture, ras).astype(int))) <= 2

    plain = view.picture()
    assert grey(plain, right) and grey(plain, left)
    node = write_prediction(predicted(volume, ball(shape, (10, 32, 20), 6)), volume)
    filled = view.picture()
    red, green, blue = view.pixel(filled, right).astype(int)
    assert red > green > blue and red - blue > 50  # the nodule's orange over the scan
    assert grey(filled, left)
    write_prediction(predicted(volume, ball(shape, (10, 32, 44), 6)), volume, node)
    moved = view.picture()
    assert grey(moved, right) and not grey(moved, left)

    doubt = np.zeros(shape, np.float32)
    doubt[:, 20:44, 29:32] = 1
    doubt[:, 20:44, 32:36] = 0.4
    view.show(volume, write_scalar_map(image.like(doubt), volume, "doubt", "uncertainty"))
    mapped = view.picture()
    assert grey(mapped, right), "where the uncertainty is 0 the scan must show"
    assert np.abs(view.pixel(mapped, right).astype(int) - view.pixel(plain, right)).max() <= 2
    assert view.pixel(mapped, place(30, 32)) == pytest.approx((204, 0, 0), abs=8)
    assert not grey(mapped, middle)
    path = tmp_path / "views.png"
    write_png(np.concatenate([plain, filled, moved, mapped], axis=1), path)
    assert path.stat().st_size > 10_000
