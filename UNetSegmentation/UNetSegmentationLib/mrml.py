"""MRML nodes <-> Image: volumes to arrays with their place in the patient, predictions to segments and maps.

An Image of a node lies in world space: IJKToRAS and the linear parent transforms are multiplied into its geometry, so
that a click's world RAS, turned into LPS, is a point of the Image. What is written goes by voxel index, in the
volume's own coordinates under the volume's own transform, so nothing is resampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
import slicer
import vtk
from slicer.util import arrayFromVTKMatrix, vtkMatrixFromArray
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from .image import Box, Image, UserError, check_geometry
from .model import Label
from .output import present

if TYPE_CHECKING:
    from .inference.predict import Prediction

MODEL_TAG = "UNetSegmentation.Model"
MAP_ATTRIBUTE = "UNetSegmentation.Map"
# Below this, a map shows the scan beneath it.
MAP_THRESHOLD = 0.05
# RGB at 0, at the middle and at 1.
MAP_COLORS = {
    "uncertainty": ((1.0, 1.0, 0.4), (1.0, 0.6, 0.0), (0.8, 0.0, 0.0)),
    "probability": ((0.27, 0.0, 0.33), (0.13, 0.57, 0.55), (0.99, 0.91, 0.14)),
}
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LABELMAP = slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName()


# ------------------------------------------------------------------------------------------------------------- volumes


def image_from_volume(volume_node: Any) -> Image:
    """The voxels of a volume node and where they lie in the world.

    The array is (z, y, x) = (k, j, i), or (c, z, y, x) for a vector volume (RGB, multi-volume), of the node's own type:
    a view of the node's memory, not a copy. Geometry: LPS mm, with the node's linear parent transforms multiplied in;
    left-handed nodes keep their handedness.
    Raises UserError for a node without voxels, under a non-linear transform, or with axes that are not at right angles.
    """
    name = volume_node.GetName()
    data = volume_node.GetImageData()
    scalars = data.GetPointData().GetScalars() if data is not None else None
    if scalars is None or not scalars.GetNumberOfTuples():
        raise UserError(f"Volume '{name}' has no voxels; load a scan into it or choose another volume.")
    array = vtk_to_numpy(scalars).reshape(*data.GetDimensions()[::-1], -1)
    array = array[..., 0] if array.shape[-1] == 1 else np.moveaxis(array, -1, 0)

    to_lps = _LPS @ _to_world(volume_node) @ _ijk_to_ras(volume_node)
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    direction = to_lps[:3, :3] / np.maximum(spacing, 1e-12)
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        cause = ", because of its transform" if volume_node.GetParentTransformNode() else " (gantry tilt or shear)"
        raise UserError(
            f"Volume '{name}' has axes that are not at right angles{cause}; harden its transform, if any, "
            "and resample it to a regular grid (Resample Scalar/Vector/DWI Volume) first."
        )
    image = Image(array, _floats(spacing), _floats(to_lps[:3, 3]), _floats(direction.ravel()))  # type: ignore[arg-type]
    check_geometry(image)
    return image


def write_scalar_map(image: Image, volume_node: Any, name: str, kind: str) -> Any:
    """Add a scalar volume with values 0..1 that lies over `volume_node`, and return it.

    image: (z, y, x) on the volume's grid; stored as float32, clipped to 0..1. kind: "uncertainty" or "probability",
    each with one colour table shared by all its maps. Window 0..1; below MAP_THRESHOLD the map is transparent. It has
    the volume's IJKToRAS, parent transform and subject hierarchy folder.
    Raises UserError where the image does not lie on the volume's grid; ValueError for another kind or for channels.
    """
    if kind not in MAP_COLORS or image.array.ndim != 3:
        raise ValueError(f"a map is (z, y, x) of kind {' or '.join(MAP_COLORS)}, not {image.array.shape} of kind {kind!r}")
    _check_grid(image, volume_node)

    node = volume_node.GetScene().AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    node.SetAttribute(MAP_ATTRIBUTE, kind)
    node.SetIJKToRASMatrix(vtkMatrixFromArray(_ijk_to_ras(volume_node)))
    node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
    node.SetAndObserveImageData(_image_data(np.clip(image.array, 0, 1).astype(np.float32, copy=False)))
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.SetAndObserveColorNodeID(_color_node(volume_node.GetScene(), kind).GetID())
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(0, 1)
    display.AutoThresholdOff()
    display.SetThreshold(MAP_THRESHOLD, 1)
    display.ApplyThresholdOn()
    _place_beside(node, volume_node)
    return node


# ------------------------------------------------------------------------------------------------------------ segments


def write_prediction(prediction: Prediction, volume_node: Any, segmentation_node: Any = None, replace: bool = True) -> Any:
    """Write each label that the prediction holds as a segment, and return the segmentation node.

    prediction.labels lies on the grid of image_from_volume(volume_node). Without `segmentation_node` a new one is
    made. A node without segments gets the volume's parent transform, and the volume as source volume and reference
    geometry; a node with segments keeps its own, and the new segments are placed under its transform.
    replace: a segment of the label's name that an earlier prediction wrote gets the new voxels but keeps its ID, its
    name, its colour and how it is displayed; one whose label is no longer found is removed. Segments that a person
    made or renamed are never touched: where the name is taken, a number is added to it. False: all segments are added.
    No voxel of another segment changes, overlapping or not. Derived representations (closed surface) that the node
    has are updated; none are created.
    Raises UserError, before anything is changed, where the labels do not lie on the volume's grid or the segmentation
    cannot take them (another source representation, a non-linear transform).
    """
    _check_grid(prediction.labels, volume_node)
    _check_accepts(segmentation_node)
    # Relative to the segmentation, so that a node that keeps its own transform shows the mask at the same world place.
    fresh = segmentation_node is None or not segmentation_node.GetSegmentation().GetNumberOfSegments()
    to_node = np.eye(4) if fresh else np.linalg.inv(_to_world(segmentation_node)) @ _to_world(volume_node)
    occurring, layer, box = _label_layer(prediction)

    if segmentation_node is None:
        scene = volume_node.GetScene()
        name = scene.GenerateUniqueName(f"{volume_node.GetName()} segmentation")
        segmentation_node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        _place_beside(segmentation_node, volume_node)
    if segmentation_node.GetDisplayNode() is None:
        segmentation_node.CreateDefaultDisplayNodes()
    if fresh:
        segmentation_node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
        segmentation_node.SetReferenceImageGeometryParameterFromVolumeNode(volume_node)
        segmentation_node.GetSegmentation().SetSourceRepresentationName(_LABELMAP)

    segmentation = segmentation_node.GetSegmentation()
    earlier = _earlier_segments(segmentation, prediction.label_defs) if replace else {}
    _empty(segmentation, set(earlier.values()))
    for label in prediction.label_defs:
        if label not in occurring and label.value in earlier:
            segmentation.RemoveSegment(earlier[label.value])
    # One layer for all labels, and for them alone: MODE_REPLACE on a layer shared with segments of another lattice
    # resamples those (voxels are lost), and a layer for each of a hundred labels makes saving and loading slow.
    matrix = to_node @ _ijk_to_ras(volume_node)
    shared = oriented_labelmap(layer, box.start, matrix) if occurring else None
    boxes = _label_boxes(layer) if earlier and occurring else {}
    for value, label in enumerate(occurring, 1):
        if label.value in earlier:
            # Through Slicer's logic, so that this segment's surface follows and the others' surfaces are kept.
            mask = (layer[boxes[value].slices] == value).astype(np.uint8)
            labelmap = oriented_labelmap(mask, boxes[value].shifted(box.start).start, matrix)
            logic = slicer.vtkSlicerSegmentationsModuleLogic
            logic.SetBinaryLabelmapToSegment(labelmap, segmentation_node, earlier[label.value], logic.MODE_REPLACE)
            segment = segmentation.GetSegment(earlier[label.value])
        else:
            segment = slicer.vtkSegment()
            segment.SetName(_free_name(segmentation, label.name))
            segment.SetColor(*(c / 255 for c in label.color))
            segment.SetNameAutoGenerated(False)
            segment.SetColorAutoGenerated(False)
        segment.SetTag(MODEL_TAG, prediction.model_name)
        if label.terminology_entry():
            segment.SetTag(segment.GetTerminologyEntryTagName(), label.terminology_entry())
        segment.SetLabelValue(value)
        segment.AddRepresentation(_LABELMAP, shared)
        if label.value not in earlier:
            segmentation.AddSegment(segment)
    return segmentation_node


def segment_mask(segmentation_node: Any, segment_id: str, volume_node: Any) -> np.ndarray:
    """A segment on the volume's voxel grid: a new uint8 array (z, y, x) of 0 and 1.

    A segment that lies on another grid or under another transform is resampled (nearest neighbour); one that has no
    binary labelmap is converted on the volume's grid, and the node is not changed.
    Raises UserError for an unknown segment, a volume that image_from_volume refuses, or a non-linear transform.
    """
    shape = image_from_volume(volume_node).shape
    segmentation = segmentation_node.GetSegmentation()
    if segmentation.GetSegment(segment_id) is None:
        raise UserError(f"Segmentation '{segmentation_node.GetName()}' has no segment '{segment_id}'; choose one that it has.")
    to_node = np.linalg.inv(_to_world(segmentation_node)) @ _to_world(volume_node)
    grid = _oriented(shape, (0, 0, 0), to_node @ _ijk_to_ras(volume_node))
    labelmap = slicer.vtkOrientedImageData()
    if segmentation.ContainsRepresentation(_LABELMAP):
        segmentation_node.GetBinaryLabelmapRepresentation(segment_id, labelmap)
    else:
        converter = slicer.vtkSegmentationConverter
        one = slicer.vtkSegmentation()
        one.SetSourceRepresentationName(segmentation.GetSourceRepresentationName())
        one.CopySegmentFromSegmentation(segmentation, segment_id)
        one.SetConversionParameter(converter.GetReferenceImageGeometryParameterName(), converter.SerializeImageGeometry(grid))
        if not one.CreateRepresentation(_LABELMAP):
            raise UserError(f"Segment '{segment_id}' cannot be turned into voxels; create its binary labelmap in Segmentations.")
        labelmap = one.GetSegment(segment_id).GetRepresentation(_LABELMAP)
    if labelmap.IsEmpty():
        return np.zeros(shape, np.uint8)
    out = slicer.vtkOrientedImageData()
    slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage(labelmap, grid, out)
    return (vtk_to_numpy(out.GetPointData().GetScalars()).reshape(shape) > 0).view(np.uint8)


def oriented_labelmap(mask: np.ndarray, start: Sequence[int], ijk_to_ras: np.ndarray) -> Any:
    """A vtkOrientedImageData of one box of a grid.

    mask: (z, y, x), uint8 or uint16, copied. start: index (z, y, x) of its first voxel in the grid. ijk_to_ras: 4x4 of
    the grid, in the coordinates of the segmentation node.
    """
    out = _oriented(mask.shape, start, ijk_to_ras)
    out.GetPointData().SetScalars(_vtk_array(mask))
    return out


# ------------------------------------------------------------------------------------------------------------- helpers


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _to_world(node: Any) -> np.ndarray:
    """4x4 of a node's parent transforms, RAS to world RAS; UserError where they are not linear."""
    parent = node.GetParentTransformNode()
    matrix = vtk.vtkMatrix4x4()
    if parent is not None and not (parent.IsTransformToWorldLinear() and parent.GetMatrixTransformToWorld(matrix)):
        raise UserError(
            f"'{node.GetName()}' is under the non-linear transform '{parent.GetName()}'; "
            "harden the transform, or move the node out of it, and try again."
        )
    return arrayFromVTKMatrix(matrix)


def _ijk_to_ras(volume_node: Any) -> np.ndarray:
    """4x4 from array index (x, y, z) to the node's RAS, without its parent transforms."""
    matrix = vtk.vtkMatrix4x4()
    volume_node.GetIJKToRASMatrix(matrix)
    # IJK counts from the image data's extent, which need not start at 0 (the output of a VTK crop).
    shift = np.eye(4)
    shift[:3, 3] = volume_node.GetImageData().GetExtent()[::2]
    return arrayFromVTKMatrix(matrix) @ shift


def _vtk_array(array: np.ndarray) -> Any:
    return numpy_to_vtk(np.ascontiguousarray(array).ravel(), deep=True)


def _image_data(array: np.ndarray) -> Any:
    out = vtk.vtkImageData()
    out.SetDimensions(array.shape[::-1])
    out.GetPointData().SetScalars(_vtk_array(array))
    return out


def _oriented(shape: Sequence[int], start: Sequence[int], ijk_to_ras: np.ndarray) -> Any:
    """A vtkOrientedImageData without voxels: size and first index (z, y, x) in a grid."""
    out = slicer.vtkOrientedImageData()
    out.SetExtent([int(v) for a, n in zip(start[::-1], shape[::-1], strict=True) for v in (a, a + n - 1)])
    out.SetGeometryFromImageToWorldMatrix(vtkMatrixFromArray(ijk_to_ras))
    return out


def _check_grid(image: Image, volume_node: Any) -> None:
    volume = image_from_volume(volume_node)
    name = volume_node.GetName()
    if image.shape != volume.shape:
        have, want = (" x ".join(map(str, i.shape[::-1])) for i in (image, volume))
        raise UserError(f"The result has {have} voxels but volume '{name}' has {want}; run the model on this volume.")
    # The loader flips left-handed files: the same shape alone would let a mask in that lies upside down.
    if not image.same_grid(volume):
        raise UserError(f"The result lies elsewhere than volume '{name}', which was moved or replaced; run the model again.")


def _check_accepts(segmentation_node: Any) -> None:
    if segmentation_node is None or not segmentation_node.GetSegmentation().GetNumberOfSegments():
        return
    source = segmentation_node.GetSegmentation().GetSourceRepresentationName()
    if source != _LABELMAP:
        raise UserError(
            f"Segmentation '{segmentation_node.GetName()}' keeps its segments as {source.lower()}; choose another one, "
            "or make the binary labelmap its source representation in the Segmentations module."
        )


def _label_layer(prediction: Prediction) -> tuple[list[Label], np.ndarray, Box]:
    """The labels that occur; the box that holds them, their voxels 1, 2, ... in that order; and the box's place."""
    values = prediction.labels.array
    box = Box.around(values)
    if box is None:
        return [], values[:0], Box((0, 0, 0), (0, 0, 0))
    crop = values[box.slices]
    found = list(present(crop, prediction.label_defs))
    table = np.zeros(int(crop.max()) + 1, np.uint8 if len(found) < 256 else np.uint16)
    table[[label.value for label in found]] = range(1, len(found) + 1)
    return found, table[crop], box


def _label_boxes(layer: np.ndarray) -> dict[int, Box]:
    """The bounding box of each value in (z, y, x)."""
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.ComputePerimeterOff()
    shapes.Execute(sitk.GetImageFromArray(layer))
    boxes = {value: shapes.GetBoundingBox(value)[::-1] for value in shapes.GetLabels()}
    return {value: Box(b[3:], tuple(a + n for a, n in zip(b[3:], b[:3], strict=True))) for value, b in boxes.items()}


def _earlier_segments(segmentation: Any, labels: Sequence[Label]) -> dict[int, str]:
    """Label value -> ID of the segment that an earlier prediction wrote for it: by name, or by name and number."""
    ids = [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]
    names = {i: segmentation.GetSegment(i).GetName() for i in ids if segmentation.GetSegment(i).HasTag(MODEL_TAG)}
    out: dict[int, str] = {}
    for suffix in ("", r" \d+"):
        for label in labels:
            match = next((i for i in names if re.fullmatch(re.escape(label.name) + suffix, names[i])), None)
            if match and label.value not in out:
                out[label.value] = match
                del names[match]
    return out


def _empty(segmentation: Any, ids: set[str]) -> None:
    """Empty segments, each with a layer of its own; the others keep their voxels and surfaces."""
    for layer in [set(segmentation.GetSegmentIDsForLayer(i)) for i in range(segmentation.GetNumberOfLayers())]:
        # Each separation reads the whole layer (0.4 s on a CT), so the smaller group moves out.
        smaller = min(layer & ids, layer - ids, key=len)
        for segment_id in sorted(smaller):
            segmentation.SeparateSegmentLabelmap(segment_id)
    for segment_id in ids:
        segmentation.GetSegment(segment_id).AddRepresentation(_LABELMAP, slicer.vtkOrientedImageData())


def _free_name(segmentation: Any, name: str) -> str:
    taken = {segmentation.GetNthSegment(i).GetName() for i in range(segmentation.GetNumberOfSegments())}
    return next(n for n in chain([name], (f"{name} {i}" for i in count(2))) if n not in taken)


def _color_node(scene: Any, kind: str) -> Any:
    """The scene's colour table for maps of one kind, made on first use and saved with the scene."""
    tag = f"UNetSegmentation.{kind}"
    node = scene.GetSingletonNode(tag, "vtkMRMLColorTableNode")
    if node is None:
        node = slicer.vtkMRMLColorTableNode()
        node.SetTypeToUser()
        node.SetName(f"UNet {kind}")
        node.SetSingletonTag(tag)
        node = scene.AddNode(node)
    if node.GetNumberOfColors() != 256:
        node.SetNumberOfColors(256)
        rgb = np.array(MAP_COLORS[kind])
        for i in range(256):
            color = (float(np.interp(i / 255, (0, 0.5, 1), rgb[:, c])) for c in range(3))
            node.SetColor(i, f"{i / 255:.2f}", *color, 1.0)
    return node


def _place_beside(node: Any, volume_node: Any) -> None:
    """Into the volume's folder of the subject hierarchy, where the volume has one."""
    hierarchy = node.GetScene().GetFirstNodeByClass("vtkMRMLSubjectHierarchyNode")
    item = hierarchy.GetItemByDataNode(volume_node) if hierarchy is not None else 0
    if not item:
        return
    parent = hierarchy.GetItemParent(item)
    own = hierarchy.GetItemByDataNode(node)
    if own:
        hierarchy.SetItemParent(own, parent)
    else:
        hierarchy.CreateItem(parent, node)
