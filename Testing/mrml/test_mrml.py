"""The MRML adapter on a real MRML scene, against SimpleITK and against Slicer's own readers and writers."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")

import vtk  # noqa: E402
from headless_slicer import SliceView  # noqa: E402
from mrml_scenes import (  # noqa: E402
    LPS,
    LUNG,
    NODULE,
    SHAPE,
    SURFACE,
    TISSUE,
    add_segment,
    add_transform,
    add_volume,
    assert_no_orphans,
    ball,
    draw,
    geometry,
    predicted,
    read_back,
    rotation,
    segments,
    snapshot,
    tag,
)
from slicer.util import vtkMatrixFromArray  # noqa: E402
from UNetSegmentationLib.image import Box, Image, UserError, from_sitk, length_unit, read_image  # noqa: E402
from UNetSegmentationLib.measure import measure  # noqa: E402
from UNetSegmentationLib.model import Label  # noqa: E402
from UNetSegmentationLib.mrml import (  # noqa: E402
    KEPT_TAG,
    MODEL_TAG,
    PRINT_ATTRIBUTE,
    Undo,
    carried,
    complete,
    exact_surface_steps,
    find_map,
    find_scan,
    find_table,
    image_from_volume,
    image_from_volumes,
    jump_slices,
    measure_steps,
    new_volume_steps,
    remeasure_steps,
    remove_nodes,
    roi_box,
    segment_mask,
    stretch_note,
    write_clicked_steps,
    write_map_steps,
    write_measures,
    write_prediction,
    write_prediction_steps,
    write_scalar_map,
)
from vtk.util.numpy_support import vtk_to_numpy  # noqa: E402

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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", ["deleted", "other voxels", "larger", "scene closed"])
def test_the_array_outlives_what_happens_to_the_node(scene: Any, channels: int, change: str) -> None:
    array = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3), np.uint8)
    array = array if channels == 3 else array[..., 0].astype(np.int16)
    volume = slicer.util.addVolumeFromArray(array, nodeClassName=f"vtkMRML{'Vector' if channels == 3 else 'Scalar'}VolumeNode")
    image = image_from_volume(volume)
    wanted = image.array.copy()
    if change == "deleted":
        scene.RemoveNode(volume)
    elif change == "scene closed":
        scene.Clear(0)
    elif change == "other voxels":
        slicer.util.updateVolumeFromArray(volume, np.zeros((20, 30, 40), np.float32))
    else:
        volume.GetImageData().SetDimensions(40, 30, 20)
        volume.GetImageData().AllocateScalars(vtk.VTK_SHORT, 1)
    del volume, array
    gc.collect()
    rubbish = [np.full(wanted.nbytes, i % 251, np.uint8) for i in range(500)]  # takes freed memory, if there is any
    assert np.array_equal(image.array, wanted) and rubbish


def test_several_volumes_are_channels(scene: Any) -> None:
    rng = np.random.default_rng(0)
    to_lps = geometry(rotation() * (1, 1, -1))
    arrays = [rng.integers(0, 99, SHAPE).astype(t) for t in (np.int16, np.uint8)]
    nodes = [add_volume(a, to_lps, n) for a, n in zip(arrays, ("T1", "T2"))]
    image = image_from_volumes(nodes)
    assert image.array.dtype == np.int16 and image.array.shape == (2, *SHAPE)
    assert all(np.array_equal(c, a) for c, a in zip(image.array, arrays))
    assert image.same_grid(image_from_volume(nodes[0]))
    rgb = slicer.util.addVolumeFromArray(rng.random((*SHAPE, 3)), LPS @ to_lps, "rgb", "vtkMRMLVectorVolumeNode")
    image = image_from_volumes([rgb, nodes[1]])
    assert image.array.dtype == np.float64 and image.n_channels == 4
    assert np.array_equal(image.array[:3], image_from_volume(rgb).array) and np.array_equal(image.array[3], arrays[1])
    assert np.shares_memory(image_from_volumes(nodes[:1]).array, slicer.util.arrayFromVolume(nodes[0]))

    nodes[1].SetAndObserveTransformNodeID(add_transform(np.eye(4)).GetID())
    assert image_from_volumes(nodes).n_channels == 2
    nodes[1].GetParentTransformNode().SetMatrixTransformToParent(vtkMatrixFromArray(np.diag([1, 1, -1, 1.0])))
    with pytest.raises(UserError, match="Volume 'T2' does not lie on the grid of 'T1'; resample"):
        image_from_volumes(nodes)
    with pytest.raises(UserError, match="No volume was chosen; choose"):
        image_from_volumes([])


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


@pytest.mark.parametrize("scale, said", [((1, 1, 1), ""), ((1, 1, 1.05), "+5.0 %"), ((1, 1, 0.8), "-20.0 %")])
def test_a_scan_that_its_transform_stretches_says_by_how_much(scene: Any, scale: tuple[float, ...], said: str) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    volume.SetAndObserveTransformNodeID(add_transform(np.diag([*scale, 1.0])).GetID())
    note = stretch_note(volume)
    assert f"stretches it by {said}:" in note if said else note == ""


def test_a_volume_without_voxels_is_refused(scene: Any) -> None:
    with pytest.raises(UserError, match="Volume 'empty' has no voxels; load a scan"):
        image_from_volume(scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty"))


# ----------------------------------------------------------------------------------------------------------------- ROI


def add_roi(center: Any, size: Any, degrees: float = 0.0, name: str = "R") -> Any:
    """Centre in RAS, turned about it."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", name)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(degrees), center
    node.SetAndObserveObjectToNodeMatrix(vtkMatrixFromArray(matrix))
    node.SetSize(*size)
    return node


def inside(roi: Any, volume: Any) -> np.ndarray:
    """The voxels whose centres Slicer says are in the ROI."""
    planes = vtk.vtkPlanes()
    roi.GetPlanesWorld(planes)
    image = image_from_volume(volume)
    out = [planes.EvaluateFunction((LPS @ [*image.index_to_point(i[::-1]), 1])[:3]) <= 0 for i in np.ndindex(image.shape)]
    return np.reshape(out, image.shape)


@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("turned", [0.0, 35.0])
@pytest.mark.parametrize("moved", [False, True])
def test_an_roi_is_the_box_of_voxels_around_it(scene: Any, flips: tuple[int, int, int], turned: float, moved: bool) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * flips))
    if moved:
        turn = np.eye(4)
        turn[:3, :3], turn[:3, 3] = rotation(40, (3, 1, 1)), (5, 6, 7)
        volume.SetAndObserveTransformNodeID(add_transform(turn).GetID())
    image = image_from_volume(volume)
    middle = (LPS @ [*image.index_to_point((5.7, 4.2, 3.9)), 1])[:3]
    roi = add_roi(middle, (3.1, 4.2, 7.3), turned)
    box = roi_box(roi, volume)
    covered = inside(roi, volume)
    tight = Box.around(covered)
    assert tight is not None and covered.sum() > 3
    assert box & tight == tight
    # A voxel counts when the ROI reaches into it, whether or not to its centre.
    corners = np.array(corners_of(roi)) @ LPS[:3, :3]
    index = np.array([image.point_to_index(c) for c in corners])[:, ::-1]
    assert np.all(np.array(box.start) - 0.5 <= index.min(0) + 1e-3) and np.all(index.max(0) <= np.array(box.stop) - 0.5 + 1e-3)
    assert np.all(np.array(box.start) + 0.5 >= index.min(0) - 1e-3) and np.all(index.max(0) >= np.array(box.stop) - 1.5 - 1e-3)

    # The same place, by the ROI's own transform.
    back = np.eye(4)
    back[:3, 3] = (20, 0, -5)
    roi.SetCenter(*(middle - back[:3, 3]))
    roi.SetAndObserveTransformNodeID(add_transform(back).GetID())
    assert roi_box(roi, volume) == box


def corners_of(roi: Any) -> list[Any]:
    """In world RAS."""
    matrix, half = slicer.util.arrayFromVTKMatrix(roi.GetObjectToWorldMatrix()), np.array(roi.GetSize()) / 2
    return [(matrix @ [*(np.array(s) * half), 1])[:3] for s in itertools.product((-1, 1), repeat=3)]


def test_an_roi_along_the_voxels_edges_is_exactly_those_voxels(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(np.eye(3), (2, 3, 4), (0, 0, 0)))
    # x from voxel 2 to 5, y 1 to 3, z 4 to 6, LPS.
    roi = add_roi((-(1.5 * 2 + 5.5 * 2) / 2, -(0.5 * 3 + 3.5 * 3) / 2, (3.5 * 4 + 6.5 * 4) / 2), (8, 9, 12))
    assert roi_box(roi, volume) == Box((4, 1, 2), (7, 4, 6))
    roi.SetSize(1000, 9, 12)
    assert roi_box(roi, volume) == Box((4, 1, 0), (7, 4, 13))
    roi.SetSize(1000, 1000, 1000)
    assert roi_box(roi, volume) == Box.whole(SHAPE)
    roi.SetSize(1e-6, 1e-6, 1e-6)
    assert roi_box(roi, volume).shape == (1, 1, 1)


def test_an_roi_outside_or_without_size_is_refused(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    with pytest.raises(UserError, match="ROI 'R' lies outside volume 'CT'; move it .* choose 'Whole volume'"):
        roi_box(add_roi((500, 0, 0), (10, 10, 10)), volume)
    with pytest.raises(UserError, match="ROI 'fresh' has no size; draw it"):
        roi_box(scene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "fresh"), volume)
    with pytest.raises(UserError, match="has no voxels"):
        roi_box(add_roi((0, 0, 0), (1, 1, 1)), scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "empty"))


def test_all_slice_views_jump_to_a_point(scene: Any) -> None:
    names = ("Red", "Yellow", "Green")
    nodes = [scene.AddNode(slicer.vtkMRMLSliceNode()) for _ in names]
    for node, name, orientation in zip(nodes, names, ("Axial", "Sagittal", "Coronal")):
        node.SetLayoutName(name)
        node.SetOrientation(orientation)
    jump_slices(scene, (10, 20, 30))
    for node in nodes:
        center = slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())[:3, 3]
        assert center == pytest.approx((-10, -20, 30))
        scene.RemoveNode(node)  # named by its layout, it would outlive the scene


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
    status = slicer.vtkSlicerSegmentationsModuleLogic
    assert {status.GetSegmentStatus(node.GetSegmentation().GetSegment(i)) for i in before.values()} == {status.InProgress}
    status.SetSegmentStatus(node.GetSegmentation().GetSegment(before["lung"]), status.Completed)
    node.GetSegmentation().GetSegment(before["lung"]).SetColor(1, 0, 0)
    nodule, entry = node.GetSegmentation().GetSegment(before["nodule"]), "TerminologyEntry"
    status.SetSegmentStatus(nodule, status.NotStarted)
    nodule.SetTag(KEPT_TAG, "0" * 32 + ":1")  # of a former answer: the training set would learn what this one does not say
    node.GetDisplayNode().SetSegmentOpacity(before["lung"], 0.3)

    moved = np.roll(labels, 2, 2)
    write_prediction(predicted(volume, moved, model="lung-2d-1.1.0"), volume, node)
    assert segments(node) == before
    lung = node.GetSegmentation().GetSegment(before["lung"])
    assert np.array_equal(read_back(node, "lung", volume), moved == LUNG.value)
    assert lung.GetColor() == (1, 0, 0) and status.GetSegmentStatus(lung) == status.Completed
    assert tag(lung, MODEL_TAG) == "lung-2d-1.1.0"
    assert status.GetSegmentStatus(nodule) == status.InProgress and not nodule.HasTag(KEPT_TAG)
    other = Label(1, "nodule", NODULE.color, {**TISSUE, "type": ["SCT", "4147007", "Mass"]})
    write_prediction(predicted(volume, labels, (other, LUNG)), volume, node)
    assert "^Mass~" in tag(nodule, entry)
    nodule.SetTag(entry, said := tag(nodule, entry).replace("4147007^Mass", "108369006^Neoplasm"))
    write_prediction(predicted(volume, moved), volume, node)
    assert tag(nodule, entry) == said
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


@pytest.mark.parametrize("older", [False, True])
def test_a_name_with_a_number_that_a_person_gave_is_his(scene: Any, labels: np.ndarray, tmp_path: Path, older: bool) -> None:
    volume, moved = add_volume(np.zeros(SHAPE, np.int16)), np.roll(labels, 1, 0)
    two = NODULE, Label(2, "ground | glass", (1, 2, 3), {})
    node = write_prediction(predicted(volume, labels, two), volume)
    nodule = node.GetSegmentation().GetSegment(segments(node)["nodule"])
    nodule.SetName("nodule 1")
    if older:
        nodule.RemoveTag(MODEL_TAG + ".Name")
    storage = slicer.vtkMRMLSegmentationStorageNode()
    storage.SetFileName(str(tmp_path / "s.seg.nrrd"))
    assert storage.WriteData(node) == 1
    loaded = slicer.modules.segmentations.logic().LoadSegmentationFromFile(str(tmp_path / "s.seg.nrrd"), True, "loaded")
    write_prediction(predicted(volume, moved, two), volume, loaded)
    assert list(segments(loaded)) == ["nodule 1", "ground | glass", *([] if older else ["nodule"])]
    assert np.array_equal(read_back(loaded, "nodule 1", volume), (moved if older else labels) == 1)


def test_only_the_same_models_segments_are_replaced(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels), volume)
    moved, written = np.roll(labels, 1, 0), {}
    for model in ("other-1.0.0", "other-2.0.0", "lung-2d-1.0.0+other-2.0.0", "other-2.1.0+lung-2d-1.0.0"):
        complete(write_prediction_steps(predicted(volume, moved, model=model), volume, node, segments=written))
        assert np.array_equal(read_back(node, "lung", volume), labels == 2)
    assert [n for n in segments(node) if "lung" in n] == ["lung", "lung 2", "lung 3"]
    assert {value: segment.GetName() for value, segment in written.items()} == {1: "nodule 3", 2: "lung 3"}


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


@pytest.mark.parametrize("handed", [1, -1])
def test_a_surface_is_the_one_that_slicer_makes(scene: Any, labels: np.ndarray, handed: int) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, handed)))
    node = write_prediction(predicted(volume, labels), volume)
    node.GetSegmentation().SetConversionParameter("Smoothing factor", "0.2")
    node.CreateClosedSurfaceRepresentation()
    for moved, names in ((np.roll(labels, 1, 0), ["nodule", "lung"]), (labels, ["nodule", "lung", "nodule 2", "lung 2"])):
        write_prediction(predicted(volume, moved), volume, node, replace=len(names) == 2)
        assert list(segments(node)) == names
    made = {name: points(node, name) for name in segments(node)}
    node.RemoveClosedSurfaceRepresentation()
    node.CreateClosedSurfaceRepresentation()
    for name, surface in made.items():
        assert surface.shape == points(node, name).shape and surface == pytest.approx(points(node, name), abs=1e-4)


def test_a_coarse_surface_to_look_at_becomes_slicers_own(scene: Any) -> None:
    """Segment Statistics, models, STL files and RT structures are made of it."""
    mass = np.zeros((4, 5, 70), np.uint8)
    mass[1:, :4, 2:], mass[2, 2, 30] = 1, 0
    volume = add_volume(np.zeros(mass.shape, np.int16), geometry(rotation()))
    node, segment_id = complete(write_clicked_steps(mass, (0, 0, 0), volume, name="mass"))
    edited = add_segment(node, "drawn", mass, volume)  # whose surface nobody asked for
    coarse, by_slicer = points(node, "mass"), points(node, "drawn")
    assert len(coarse) < 0.5 * len(by_slicer)
    undo = Undo(scene)
    undo.begin(node)
    complete(write_clicked_steps(mass[:, :, :60], (0, 0, 0), volume, node, segment_id))
    undo.commit([node])
    complete(exact_surface_steps(scene))
    assert len(points(node, "mass")) > 2 * len(coarse) and np.array_equal(points(node, "drawn"), by_slicer)
    undo.undo()
    assert np.array_equal(points(node, "mass"), coarse) and edited in segments(node).values()
    complete(exact_surface_steps(scene))
    assert np.array_equal(points(node, "mass"), by_slicer)
    assert not list(exact_surface_steps(scene))


def points(node: Any, name: str) -> np.ndarray:
    surface = node.GetSegmentation().GetSegment(segments(node)[name]).GetRepresentation(SURFACE)
    return vtk_to_numpy(surface.GetPoints().GetData()).copy()


def test_a_saved_segmentation_counts_as_changed(scene: Any, labels: np.ndarray, tmp_path: Path) -> None:
    """Otherwise Slicer would close the scene without asking."""
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels), volume)
    node.AddDefaultStorageNode()
    node.GetStorageNode().SetFileName(str(tmp_path / "result.seg.nrrd"))
    assert node.GetStorageNode().WriteData(node) == 1
    assert not node.GetModifiedSinceRead()
    write_prediction(predicted(volume, np.roll(labels, 1, 0)), volume, node)
    assert node.GetModifiedSinceRead()


def test_nothing_is_done_in_long_pieces(scene: Any) -> None:
    """Counted by the voxels that each piece could touch, as times depend on the machine; see _steps in mrml.py."""
    shape = (40, 256, 256)
    volume = add_volume(np.zeros(shape, np.int16))
    labels = np.zeros(shape, np.uint8)
    labels[5:35, 20:230, 20:230] = LUNG.value
    labels[10:20, 50:90, 50:90] = NODULE.value
    node = None
    for _ in range(2):
        steps = write_prediction_steps(predicted(volume, labels), volume, node)
        pieces = 0
        try:
            while True:
                next(steps)
                pieces += 1
        except StopIteration as end:
            node = end.value
        # One pass to see what there is, one to write it, and a piece for each segment.
        assert pieces >= 2 * labels.size / (1 << 20) + 2
    assert np.array_equal(segment_mask(node, segments(node)["lung"], volume), labels == 2)


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


def test_slicers_dicom_exporter_takes_each_segment_for_what_it_is(scene: Any, labels: np.ndarray) -> None:
    """It looks for scalars of this name, or takes the segment for empty, and for these tags, or says that a person drew it."""
    volume = add_volume(labels.astype(np.int16))
    node = write_prediction(predicted(volume, labels), volume)
    complete(write_clicked_steps(labels, (0, 0, 0), volume, node, name="Nodule"))
    add_segment(node, "drawn by the effect", labels, volume)
    held = node.GetSegmentation()
    for i in range(held.GetNumberOfSegments()):
        scalars = held.GetNthSegment(i).GetRepresentation("Binary labelmap").GetPointData().GetArray("ImageScalars")
        assert scalars is not None and scalars.GetValueRange() != (0, 0)
    tags = [tag(held.GetNthSegment(0), f"DICOM.SegmentAlgorithm{which}") for which in ("Type", "Name")]
    assert tags == ["AUTOMATIC", "lung-2d-1.0.0"]


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


def test_a_segmentation_of_surfaces_is_refused_but_can_be_read(scene: Any) -> None:
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


def test_a_map_is_written_anew_and_not_once_more(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation()))
    other = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation()), "other")
    image = image_from_volume(volume)
    values = [np.full(SHAPE, v, np.float32) for v in (0.2, 0.7)]
    first = complete(write_map_steps(image.like(values[0]), volume, "uncertainty"))
    assert first.GetName() == "CT uncertainty" and find_map(volume, "uncertainty") is first
    first.SetName("doubt")
    first.GetDisplayNode().SetThreshold(0.3, 1)
    assert find_map(volume, "probability") is None and find_map(other, "uncertainty") is None
    before, again = scene.GetNumberOfNodes(), complete(write_map_steps(image.like(values[1]), volume, "uncertainty"))
    assert again is first and scene.GetNumberOfNodes() == before
    assert image_from_volume(first).array[0, 0, 0] == np.float32(0.7)
    assert first.GetName() == "doubt" and first.GetDisplayNode().GetLowerThreshold() == 0.3
    maps = [first, *(write_scalar_map(image.like(values[0]), v, "m", k) for v, k in ((volume, "probability"), (other, "uncertainty")))]
    assert len({m.GetID() for m in maps}) == 3


@pytest.mark.parametrize("flips", [(1, 1, 1), (1, -1, -1)])
def test_a_map_of_a_box_lies_where_the_box_lies(scene: Any, flips: tuple[int, int, int]) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * flips))
    volume.SetAndObserveTransformNodeID(add_transform(np.diag([1, -1, 1, 1.0])).GetID())
    image = image_from_volume(volume)
    values = np.random.default_rng(0).random(SHAPE, np.float32)
    for box in (Box((1, 2, 3), (5, 6, 9)), Box((-3, 2, 3), (5, 60, 9)), Box((0, 0, 0), (1, 1, 1))):
        node = write_scalar_map(image.like(values), volume, "m", "uncertainty", box)
        written, part = image_from_volume(node), image.like(values).crop(box & Box.whole(SHAPE))
        assert np.array_equal(written.array, part.array)
        assert written.same_grid(part, 1e-6)
    with pytest.raises(ValueError, match="needs voxels"):
        write_scalar_map(image.like(values), volume, "m", "uncertainty", Box((50, 0, 0), (60, 1, 1)))


def test_a_loaded_scenes_map_and_table_are_found(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels), volume)
    write_scalar_map(image_from_volume(volume).like(np.ones(SHAPE, np.float32)), volume, "m", "uncertainty")
    table = write_measures(measure(predicted(volume, labels).labels, (NODULE, LUNG)), node)
    names = "UNetSegmentation.Volume", "UNetSegmentation.Measured"
    kept = [table.GetAttribute(name) for name in names]
    scene.SetSaveToXMLString(1)
    scene.Commit()
    xml = scene.GetSceneXMLString()
    scene.SetSaveToXMLString(0)
    scene.Clear(0)
    scene.SetLoadFromXMLString(1)
    scene.SetSceneXMLString(xml)
    scene.Import()
    scene.SetLoadFromXMLString(0)
    volume = slicer.util.getNode("CT")
    assert find_map(volume, "uncertainty") is slicer.util.getNode("m")
    assert find_table(slicer.util.getNode("CT segmentation")) is (table := slicer.util.getNode("CT segmentation measures"))
    assert [table.GetAttribute(name) for name in names] == kept and kept[1].count('"') == 4


def test_a_persons_copy_of_a_map_or_table_is_his(scene: Any, labels: np.ndarray) -> None:
    """Slicer gives what it clones or crops the attributes and references of the original."""
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node, image = write_prediction(predicted(volume, labels), volume), image_from_volume(volume)
    measures = complete(measure_steps(node, volume))
    ours = [write_scalar_map(image.like(np.ones(SHAPE, np.float32)), volume, "m", "uncertainty"), write_measures(measures, node)]
    copies = [scene.AddNewNodeByClass(each.GetClassName()) for each in ours]
    for each, copy in zip(ours, copies):
        copy.Copy(each)
    assert [find_map(volume, "uncertainty"), find_table(node)] == ours
    for each in ours:
        scene.RemoveNode(each)
    anew = [write_scalar_map(image.like(np.zeros(SHAPE, np.float32)), volume, "m", "uncertainty"), write_measures([], node)]
    assert not set(anew) & set(copies) and slicer.util.arrayFromVolume(copies[0]).min() == 1 and copies[1].GetNumberOfRows() == 2
    remove_nodes([node])
    assert anew[1].GetScene() is None and copies[1].GetScene() is scene


def test_a_map_of_unknown_kind_or_with_channels_is_a_programming_error(scene: Any) -> None:
    volume = add_volume(np.zeros(SHAPE, np.int16))
    image = image_from_volume(volume)
    with pytest.raises(ValueError, match="of kind 'doubt'"):
        write_scalar_map(image, volume, "u", "doubt")
    with pytest.raises(ValueError, match="a map is"):
        write_scalar_map(image.like(np.zeros((2, *SHAPE), np.float32)), volume, "p", "probability")


# -------------------------------------------------------------------------------------------------------------- tables


def test_measures_become_a_table_with_a_row_for_each_segment(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), geometry(np.eye(3)))
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study")
    hierarchy.CreateItem(study, volume)
    prediction = predicted(volume, labels)
    node = write_prediction(prediction, volume)
    absent = Label(9, "absent", (0, 0, 0), {})
    found = measure(prediction.labels, (NODULE, LUNG, absent), image_from_volume(volume))
    table = write_measures(found, node)
    assert [table.GetColumnName(i) for i in range(table.GetNumberOfColumns())] == [
        "Segment",
        "Volume [ml]",
        "Longest diameter [mm]",
        "Perpendicular diameter [mm]",
        "Mean",
        "SD",
        "Minimum",
        "Maximum",
        "Voxels",
    ]
    assert table.GetNumberOfRows() == 2
    assert [table.GetCellText(r, 0) for r in range(2)] == ["nodule", "lung"]
    assert table.GetTable().GetColumnByName("Volume [ml]").GetValue(1) == round(found[1]["volume_ml"], 3)
    assert table.GetTable().GetColumnByName("Mean").GetValue(0) == round(found[0]["mean_hu"], 1)
    assert table.GetTable().GetColumnByName("Voxels").GetValue(0) == found[0]["voxels"]
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(table)) == study

    units = slicer.vtkCodedEntry()
    units.SetValueSchemeMeaning("[hnsf'U]", "UCUM", "Hounsfield unit")
    volume.SetVoxelValueUnits(units)
    again = write_measures(measure(prediction.labels, (LUNG,)), node)
    assert again is table and table.GetNumberOfRows() == 1
    assert table.GetColumnName(4) == "Mean [HU]"
    assert np.isnan(table.GetTable().GetColumnByName("Mean [HU]").GetValue(0)), "measured without an image"
    assert write_measures([], node).GetNumberOfRows() == 0


def test_measures_are_of_the_volume_that_was_segmented(scene: Any, labels: np.ndarray) -> None:
    """Not of the one that the segmentation was begun on."""
    first, second = (add_volume(np.full(SHAPE, value, np.int16), name=f"{value}") for value in (1, 7))
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    node.SetReferenceImageGeometryParameterFromVolumeNode(first)
    add_segment(node, "mine", ball(SHAPE, (4, 5, 7), 2), first)
    write_prediction(predicted(second, labels, (LUNG,)), second, node)
    lung = segments(node)["lung"]
    table = write_measures(complete(measure_steps(node, second, [lung])), node, second)
    undo = Undo(scene)
    undo.begin(node, [table])
    write_measures([], node, first)
    undo.commit([node, table])
    undo.undo()
    sheared = np.eye(4)
    sheared[1, 2] = 0.3
    first.SetIJKToRASMatrix(vtkMatrixFromArray(sheared))  # could not be measured in
    draw(node, lung, np.uint8(labels == 2) * (np.arange(SHAPE[2]) < 7), second)
    complete(remeasure_steps(node))
    assert [table.GetCellText(0, column) for column in (0, 4)] == ["lung", "7"]
    assert int(table.GetCellText(0, 8)) == read_back(node, "lung", second).sum()
    remove_nodes([second])
    complete(remeasure_steps(node))  # nothing was changed
    draw(node, lung, np.uint8(labels == 2), first)
    with pytest.raises(UserError, match="their volume is not in the scene any more"):
        complete(remeasure_steps(node))
    assert table.GetCellText(0, 4) == "7"


@pytest.mark.parametrize("older", [False, True])
def test_only_what_the_table_is_of_is_measured_anew(scene: Any, labels: np.ndarray, older: bool) -> None:
    """Another model's segments were measured in another volume; what a person renames or empties stays a row's."""
    volume = add_volume(np.zeros(SHAPE, np.int16))
    node = write_prediction(predicted(volume, labels, (LUNG,), "lung-1.0.0"), volume)
    if not older:
        write_prediction(predicted(volume, labels, (NODULE,), "nodule-1.0.0"), volume, node)
    name = "lung" if older else "nodule"
    segment, value = segments(node)[name], 2 if older else 1
    table = write_measures(complete(measure_steps(node, volume, [segment])), node, volume)
    if older:
        for kept in ("UNetSegmentation.Volume", "UNetSegmentation.Measured"):
            table.SetAttribute(kept, None)
    for i, part in enumerate((2, 0, 3)):
        node.GetSegmentation().GetSegment(segment).SetName(f"{name} {i}")
        draw(node, segment, np.uint8(labels == value) * (np.arange(SHAPE[0]) < 2 + part)[:, None, None], volume)
        complete(remeasure_steps(node))
        rows = [(table.GetCellText(r, 0), int(table.GetCellText(r, 8))) for r in range(table.GetNumberOfRows())]
        assert rows == ([(f"{name} {i}", read_back(node, f"{name} {i}", volume).sum())] if part else [])


def test_a_picture_without_a_pixel_size_is_measured_in_pixels(scene: Any, labels: np.ndarray) -> None:
    volume = add_volume(np.arange(np.prod(SHAPE[1:]), dtype=np.int16).reshape(1, *SHAPE[1:]))
    prediction = predicted(volume, labels[4:5])
    found = measure(prediction.labels, (LUNG,), image_from_volume(volume))
    table = write_measures(found, write_prediction(prediction, volume))
    titles = [table.GetColumnName(i) for i in range(4)]
    assert titles == ["Segment", "Area [px]", "Longest diameter [px]", "Perpendicular diameter [px]"]
    assert float(table.GetCellText(0, 1)) == found[0]["voxels"]


def test_a_pictures_print_size_is_no_spacing_here_either(scene: Any, tmp_path: Path) -> None:
    """Slicer takes it for one: the model would see other pixels than those of unetseg and of its training."""
    path = tmp_path / "p.jpg"
    array = (200 * ball((1, 40, 60), (0, 15, 30), 9)).astype(np.uint8)
    pytest.importorskip("PIL.Image").fromarray(array[0]).save(path, dpi=(300, 300))
    spacing = sitk.ReadImage(str(path)).GetSpacing()  # slicer-core reads no pictures
    volume = add_volume(array, np.diag([*spacing, 1.0, 1.0]))
    storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(path))
    volume.SetAndObserveStorageNodeID(storage.GetID())
    own, image = image_from_volume(volume), image_from_volumes([volume])
    assert own.spacing[0] == pytest.approx(25.4 / 300, rel=1e-3)
    assert image.same_grid(read_image(path)) and np.shares_memory(image.array, own.array)
    prediction = predicted(volume, np.uint8(array > 100))
    prediction.labels = image.like(prediction.labels.array)
    node = write_prediction(prediction, volume)
    assert np.array_equal(read_back(node, "nodule", volume), array > 100)
    doubt = write_scalar_map(image.like(np.ones(image.shape, np.float32)), volume, "m", "uncertainty")
    assert image_from_volume(doubt).same_grid(own)
    measures = complete(measure_steps(node, volume))
    assert measures[0]["longest_mm"] == measure(prediction.labels, (NODULE,))[0]["longest_mm"] > 18
    assert write_measures(measures, node).GetColumnName(1) == "Area [px]"
    assert carried((30, 15, 0), image, own) == pytest.approx((30 * own.spacing[0], 15 * own.spacing[1], 0))
    assert carried((0.1, 0.2, 0.3), own, own) == (0.1, 0.2, 0.3)
    heard: list[str] = []
    tag = volume.AddObserver("ModifiedEvent", lambda caller, event: heard.append(event))
    assert image_from_volumes([volume]).same_grid(image) and not heard
    volume.SetAttribute(PRINT_ATTRIBUTE, None)
    heard.clear()
    assert image_from_volumes([volume]).same_grid(image) and not heard and volume.GetAttribute(PRINT_ATTRIBUTE)
    volume.RemoveObserver(tag)
    storage.SetFileName(str(tmp_path / "p.nrrd"))  # as it is saved with its scene
    saved = image_from_volumes([volume])
    assert saved.same_grid(image) and saved.source == Path("p.jpg")
    for broken in ("", "0.1", "a b p.jpg", "nan nan p.jpg", f"{spacing[0]}"):
        volume.SetAttribute(PRINT_ATTRIBUTE, broken)
        assert image_from_volumes([volume]).same_grid(own)
    storage.SetFileName(str(path))
    volume.SetSpacing(0.5, 0.5, 1)  # by a person who knows it
    assert image_from_volumes([volume]).spacing[0] == 0.5


def test_a_stack_of_pictures_has_no_mm_here_either(scene: Any) -> None:
    volume = add_volume(np.zeros((4, 6, 5), np.uint8))
    assert length_unit(image_from_volumes([volume])) == "mm"
    storage = scene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName("stack.TIF")
    volume.SetAndObserveStorageNodeID(storage.GetID())
    image = image_from_volumes([volume])
    assert length_unit(image) == "px" and image.same_grid(image_from_volume(volume))


@pytest.mark.parametrize("handed", [1, -1])
def test_segments_are_measured_as_they_are_now(scene: Any, labels: np.ndarray, handed: int) -> None:
    values = np.random.default_rng(0).normal(0, 100, SHAPE).astype(np.float32)
    volume = add_volume(values, geometry(rotation() * (1, 1, handed)))
    node = write_prediction(predicted(volume, labels), volume)
    hers = ball(SHAPE, (4, 5, 7), 3)
    draw(node, segments(node)["nodule"], hers, volume)
    node.GetSegmentation().AddEmptySegment("", "empty")
    found = complete(measure_steps(node, volume))
    want = measure(image_from_volume(volume).like(hers), (NODULE,), image_from_volume(volume))
    voxels = [("nodule", 1, hers.sum()), ("lung", 2, (labels == 2).sum()), ("empty", 3, 0)]
    assert [(m["name"], m["value"], m["voxels"]) for m in found] == voxels
    for key in ("volume_ml", "center", "longest_mm", "perpendicular_mm", "longest_points", "mean_hu", "std_hu", "min_hu", "max_hu"):
        np.testing.assert_allclose(found[0][key], want[0][key], rtol=1e-6, err_msg=key)
    assert complete(measure_steps(node, volume, [segments(node)["lung"]]))[0]["name"] == "lung"
    middle = labels[5:6]
    thin = add_volume(values[:1], geometry(rotation()[:, [0, 2, 1]]))  # its own plane is no axial one
    flat = write_prediction(predicted(thin, middle), thin)
    want = measure(predicted(thin, middle).labels, (LUNG,))[0]
    found = complete(measure_steps(flat, thin, [segments(flat)["lung"]]))[0]
    assert found["perpendicular_mm"] == pytest.approx(want["perpendicular_mm"], rel=1e-6)
    stack = add_volume(values, geometry(rotation()[:, [0, 2, 1]], (0.7, 0.7, 8)))  # so do thick slices
    thick = write_prediction(predicted(stack, labels), stack)
    want = measure(predicted(stack, labels).labels, (LUNG,))[0]
    found = complete(measure_steps(thick, stack, [segments(thick)["lung"]]))[0]
    assert found["longest_mm"] == pytest.approx(want["longest_mm"], rel=1e-6) and found["longest_mm"] < 8
    with pytest.raises(UserError, match="has no segment 'liver'"):
        complete(measure_steps(node, volume, ["liver"]))


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


def test_a_new_volume_comes_whole_or_not_at_all(scene: Any) -> None:
    grid = Image(np.random.default_rng(0).normal(0, 99, (4, 5, 6)).astype(np.int16), (0.5, 0.7, 2.0), (1.0, 2.0, 3.0))

    def fill(array: np.ndarray) -> Any:
        for z, plane in enumerate(grid.array):
            array[z] = plane
            yield

    count = sum(1 for _ in new_volume_steps(scene, "Scan", grid, fill, (-50.0, 50.0)))
    (node,) = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
    assert np.array_equal(slicer.util.arrayFromVolume(node), grid.array) and image_from_volume(node).same_grid(grid)
    assert node.GetDisplayNode().GetWindow() == 100 and not node.GetDisplayNode().GetAutoWindowLevel()
    remove_nodes([node])
    before = {n.GetID() for n in slicer.util.getNodesByClass("vtkMRMLNode")}
    for n in range(1, count + 1):
        steps = new_volume_steps(scene, "Scan", grid, fill)
        for _ in range(n):
            next(steps)
        steps.close()
        assert {n.GetID() for n in slicer.util.getNodesByClass("vtkMRMLNode")} == before


def test_of_several_scans_that_a_segmentation_fits_none_is_its_own(scene: Any) -> None:
    one, other = (add_volume(np.zeros((8, 9, 10), np.int16), name=n) for n in "ab")
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "S")
    mask = np.zeros((8, 9, 10), np.uint8)
    mask[3:5, 4:7, 6:9] = 1
    add_segment(node, "x", mask, one)
    assert find_scan(node) is None and find_scan(node, other) is one
    remove_nodes([other])
    write_scalar_map(image_from_volume(one).like(np.zeros((8, 9, 10), np.float32)), one, "map", "uncertainty")
    assert find_scan(node) is one  # a result is no scan
