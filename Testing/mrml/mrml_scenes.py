"""Scenes for the tests of the MRML adapter: volumes, transforms, segments by hand, predictions without a network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import slicer
import vtk
from slicer.util import arrayFromSegmentBinaryLabelmap, arrayFromVTKMatrix, vtkMatrixFromArray
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.mrml import image_from_volume, oriented_labelmap
from vtk.util.numpy_support import vtk_to_numpy

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
    return SimpleNamespace(
        labels=image.like(labels), label_defs=defs, model_name=model, uncertainty=None, probabilities=None, algorithm="AUTOMATIC"
    )


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
    segment_id = node.GetSegmentation().AddEmptySegment("", name)
    draw(node, segment_id, mask, volume)
    return segment_id


def draw(node: Any, segment_id: str, mask: np.ndarray, volume: Any, add: bool = False) -> None:
    """Give a segment these voxels, or these too, as the Segment Editor does."""
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    labelmap = oriented_labelmap(mask, (0, 0, 0), arrayFromVTKMatrix(matrix))
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    assert logic.SetBinaryLabelmapToSegment(labelmap, node, segment_id, logic.MODE_MERGE_MASK if add else logic.MODE_REPLACE)


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


def fingerprint(scene: Any) -> dict[str, Any]:
    """All that a scene holds, to compare: what a scene file says of every node, and the voxels, surfaces and cells."""
    scene.SetSaveToXMLString(1)
    scene.Commit()
    out: dict[str, Any] = {"nodes": scene.GetSceneXMLString()}
    scene.SetSaveToXMLString(0)
    for node in slicer.util.getNodesByClass("vtkMRMLSegmentationNode", scene):
        out[node.GetID()] = segments_print(node.GetSegmentation())
    for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode", scene):
        out[node.GetID()] = slicer.util.arrayFromVolume(node).tobytes() if node.GetImageData() else None
    for node in slicer.util.getNodesByClass("vtkMRMLTableNode", scene):
        cells = range(node.GetNumberOfRows()), range(node.GetNumberOfColumns())
        out[node.GetID()] = [[node.GetCellText(r, c) for c in cells[1]] for r in cells[0]]
    return out


def segments_print(segmentation: Any) -> list[Any]:
    """What the segments of a vtkSegmentation are, layers and surfaces included."""
    out: list[Any] = [segmentation.GetSourceRepresentationName(), segmentation.SerializeAllConversionParameters()]
    for i in range(segmentation.GetNumberOfSegments()):
        segment_id, segment = segmentation.GetNthSegmentID(i), segmentation.GetNthSegment(i)
        labelmap, surface = (segment.GetRepresentation(name) for name in ("Binary labelmap", SURFACE))
        tags = {name: tag(segment, name) for name in ("TerminologyEntry", "UNetSegmentation.Model", "Segmentation.Status")}
        points = None if surface is None else vtk_to_numpy(surface.GetPoints().GetData()).tobytes() if surface.GetPoints() else b""
        voxels = vtk_to_numpy(labelmap.GetPointData().GetScalars()).tobytes() if labelmap.GetPointData().GetScalars() else b""
        place = labelmap.GetExtent(), labelmap.GetOrigin(), labelmap.GetSpacing()
        flags = segment.GetNameAutoGenerated(), segment.GetColorAutoGenerated()
        layer = segmentation.GetLayerIndex(segment_id)
        out.append((segment_id, segment.GetName(), segment.GetColor(), segment.GetLabelValue(), flags, tags, layer, place, voxels, points))
    return out
