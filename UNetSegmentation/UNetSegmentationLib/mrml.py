"""MRML nodes <-> Image: volumes to arrays with their place in the patient, predictions to segments, maps and tables.

An Image of a node lies in world space: IJKToRAS and the linear parent transforms are multiplied into its geometry, so
that a click's world RAS, turned into LPS, is a point of the Image. What is written goes by voxel index, in the
volume's own coordinates under the volume's own transform, so nothing is resampled.

Functions named ..._steps are generators that work in pieces, for a timer that keeps the application alive between
them; complete() runs one to its end. Closed or failing midway, they leave the scene as it was.
On 512x512x300 and one idle core a piece takes 2 to 7 ms. What VTK does not let one cut: a segment's surface (70 ms for
70 voxels across), where the segmentation shows surfaces, and the release of a whole CT's former map (16 ms).

Labelmaps and images that exist are never written into: nodes get new ones. So what there was can be kept, and put back,
without a copy of its voxels.
"""

from __future__ import annotations

import json
import re
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import reduce
from itertools import chain, count, product
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import slicer
import vtk
from slicer.util import arrayFromVTKMatrix, vtkMatrixFromArray
from vtk.util.numpy_support import get_vtk_array_type, numpy_to_vtk, vtk_to_numpy

from . import measure
from .dataset import reach, translated
from .image import PICTURE_SUFFIXES, Box, Image, UserError, check_geometry, length_unit, print_spacing, slices_across
from .inference.click import Prompt
from .kept import mask_digest as mask_digest
from .model import Label
from .output import algorithm_tags as algorithm_tags
from .postprocess import slabs
from .steps import Steps
from .steps import complete as complete
from .worker.protocol import ProtocolError, decode_prompts, encode_prompts, numbers

if TYPE_CHECKING:
    from .inference.predict import Prediction

MODEL_TAG = "UNetSegmentation.Model"
# Of a segment that was clicked at: its prompts, mask_digest() of it as the answer left it, and the model that was asked. Not
# MODEL_TAG, whose segments the next prediction may replace.
PROMPTS_TAG = "UNetSegmentation.Prompts"
DIGEST_TAG = PROMPTS_TAG + ".Digest"
# size_text() of a mask that goes on beyond what was looked at: of one of another size it says nothing.
CUT_TAG = PROMPTS_TAG + ".Cut"
CLICK_MODEL_TAG = "UNetSegmentation.ClickModel"
# Of a predicted segment: under which key the answer is kept (see kept.py) and its value there, as KEY:VALUE. A clicked one's key
# is its digest.
KEPT_TAG = "UNetSegmentation.Kept"
KEPT_MODEL_TAG = "UNetSegmentation.KeptModel"  # whose mask that is: MODEL_TAG goes with the first click
# Of a predicted segment: the terminology that its model gave it.
_SAID_TAG = MODEL_TAG + ".Terminology"
_NAME_TAG = MODEL_TAG + ".Name"  # that it was written under: one that a person renamed is no model's to replace
MAP_ATTRIBUTE = "UNetSegmentation.Map"
DOTS_ATTRIBUTE = "UNetSegmentation.Dots"
# Of a volume that was read from a picture: its print's spacing (x, y) and the picture's name, see as_read().
PRINT_ATTRIBUTE = "UNetSegmentation.Print"
# Node references: from a map or a segmentation's measures to their volume, whose name the measures have as an attribute of this name,
# for when it is gone; and from a table to its segmentation.
VOLUME_ROLE = "UNetSegmentation.Volume"
SEGMENTATION_ROLE = "UNetSegmentation.Segmentation"
NODULES_ROLE = "UNetSegmentation.Nodules"
# Of measures: the IDs of the segments that they are of, as JSON, as a person renames and empties segments.
_MEASURED_ATTRIBUTE = "UNetSegmentation.Measured"
# From a map or table to itself. Slicer gives a copy of it, as a person's clone or crop, its attributes and references.
_SELF_ROLE = "UNetSegmentation.Self"
# Below this, a map shows the scan beneath it.
MAP_THRESHOLD = 0.05
# RGB at 0, at the middle and at 1.
MAP_COLORS = {
    "uncertainty": ((1.0, 1.0, 0.4), (1.0, 0.6, 0.0), (0.8, 0.0, 0.0)),
    "probability": ((0.27, 0.0, 0.33), (0.13, 0.57, 0.55), (0.99, 0.91, 0.14)),
}
_DOTS = {True: ("Clicks", (0.1, 0.85, 0.25)), False: ("Clicks, not part of it", (0.95, 0.15, 0.15))}
_DOT_PERCENT = 1.2  # of the view
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_LABELMAP = slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName()
_SURFACE = slicer.vtkSegmentationConverter.GetClosedSurfaceRepresentationName()
_GEOMETRY = slicer.vtkSegmentationConverter.GetReferenceImageGeometryParameterName()
_COLORS = "UNetSegmentation."  # the singleton tag of a map's colours: this and its kind
# Slicer's name of a labelmap's scalars: its DICOM SEG exporter takes a segment whose scalars have another one for empty.
_SCALARS = "ImageScalars"
# The only component of the scalars that predictions are written as bears this name; it tells Undo what a prediction wrote.
_WRITTEN = "UNetSegmentation"
# A surface whose field data have an array of this name is a coarse one; Slicer's own, also of the same segment, have none.
_COARSE = "UNetSegmentation.Coarse"
# A larger box is an organ's, whose diameters would take seconds.
_LARGEST_MEASURED = 2 << 20
_SURFACE_VOXELS = 56


class _Changed(UserError):
    """A segment was edited or removed between two pieces, so what was read of it no longer holds."""

    def __init__(self) -> None:
        super().__init__("A segment was changed meanwhile; try again.")


# ------------------------------------------------------------------------------------------------------------- volumes


def image_from_volume(volume_node: Any) -> Image:
    """The voxels of a volume node and where they lie in the world.

    The array is (z, y, x) = (k, j, i), or (c, z, y, x) for a vector volume (RGB, multi-volume), of the node's own type:
    a view of the node's memory, not a copy, which stays valid when the node gets other voxels or is deleted. Geometry:
    LPS mm, with the node's linear parent transforms multiplied in; left-handed nodes keep their handedness.
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


def as_read(image: Image, volume_node: Any) -> Image:
    """A volume's image, in pixels where it is a picture whose print's size Slicer takes for mm: as read_image() reads the file, models are
    trained and unetseg measures. Of 708 pixels that a model of 1.35 mm pixels finds, it found none at 300 dpi. The node remembers what it
    was, which the .nrrd that it may be saved as does not tell."""
    storage = volume_node.GetStorageNode()
    file = Path((storage.GetFullNameFromFileName() or "") if storage is not None else "")
    own, known = print_spacing(file), volume_node.GetAttribute(PRINT_ATTRIBUTE) or ""
    if own is None:
        with suppress(ValueError):
            x, y, name = known.split(" ", 2)
            own, file = (float(x), float(y)), Path(name)
    if own and np.allclose(image.spacing[:2], own, rtol=1e-3):
        if known != (now := f"{own[0]} {own[1]} {file.name}"):
            silent = volume_node.GetDisableModifiedEvent()
            volume_node.SetDisableModifiedEvent(True)  # or what is only looked at would be measured again
            volume_node.SetAttribute(PRINT_ATTRIBUTE, now)
            volume_node.SetDisableModifiedEvent(silent)
        return Image(image.array, source=file)
    return replace(image, source=file) if file.name.lower().endswith(PICTURE_SUFFIXES) else image


def carried(point: Sequence[float], image: Image, to: Image) -> tuple[float, ...]:
    """A point (LPS mm) of an image, in the same voxel of what is as_read() of it, or the other way round."""
    same = np.array_equal(image.matrix, to.matrix)  # to the last bit, by which halves of voxels are rounded
    return tuple(point) if same else to.index_to_point(image.point_to_index(point))


def carried_prompts(prompts: Iterable[Prompt], image: Image, to: Image) -> list[Prompt]:
    """Prompts with their points carried(); a mask lies on the voxels, which are the same."""

    def moved(kind: str, *values: Any) -> Prompt:
        if kind == "mask":
            return kind, *values
        return kind, *carried(values[:3], image, to), *(carried(values[3:], image, to) if kind == "box" else values[3:])

    return [moved(*prompt) for prompt in prompts]


def carried_measures(found: dict[str, Any], image: Image, to: Image) -> dict[str, Any]:
    """What describe() says, with its points carried()."""

    def moved(key: str, value: Any) -> Any:
        if value is not None and key.endswith("_points"):
            return [carried(point, image, to) for point in value]
        return carried(value, image, to) if value is not None and key == "center" else value

    return {key: moved(key, value) for key, value in found.items()}


def stretch_note(volume_node: Any) -> str:
    """Of a scan whose parent transforms make it larger or smaller along an axis, as a registration of two studies may: what is to be
    known of sizes in the world; "" where these are the scan's own."""
    scale = np.linalg.svd(_to_world(volume_node)[:3, :3], compute_uv=False)
    most = float(scale[np.abs(scale - 1).argmax()])
    if abs(most - 1) < 1e-3:
        return ""
    return f" Its scan's transform stretches it by {100 * (most - 1):+.1f} %: these are not its own sizes."


def image_from_volumes(volume_nodes: Sequence[Any]) -> Image:
    """Several volume nodes as the channels of one image, in their order, as_read(); one node alone is not copied.

    Several are copied, to the narrowest type that holds them all. Raises UserError where one is refused by
    image_from_volume() or lies on another grid than the first.
    """
    return complete(image_steps(volume_nodes))


def image_steps(volume_nodes: Sequence[Any]) -> Steps[Image]:
    """image_from_volumes() in pieces."""
    if not volume_nodes:
        raise UserError("No volume was chosen; choose one.")
    images = [as_read(image_from_volume(node), node) for node in volume_nodes]
    first = images[0]
    if len(images) == 1:
        return first
    for node, image in zip(volume_nodes[1:], images[1:]):
        if not image.same_grid(first):
            raise UserError(
                f"Volume '{node.GetName()}' does not lie on the grid of '{volume_nodes[0].GetName()}'; "
                "resample one to the other (Resample Scalar/Vector/DWI Volume)."
            )
    out = np.empty((sum(i.n_channels for i in images), *first.shape), np.result_type(*(i.array.dtype for i in images)))
    for to, channel in zip(out, chain.from_iterable(i.channels for i in images)):
        for z in slabs(first.shape):
            to[z] = channel[z]
            yield
    return first.like(out)


def dicom_of(volume_node: Any) -> tuple[str, str]:
    """(PatientID, modality) of a volume that came from DICOM, as the subject hierarchy knows them; "" where it does not."""
    hierarchy, item = _item_of(volume_node)
    if not item:
        return "", ""
    words = slicer.vtkMRMLSubjectHierarchyConstants
    modality = hierarchy.GetItemAttribute(item, words.GetDICOMSeriesModalityAttributeName())
    person = hierarchy.GetItemAncestorAtLevel(item, words.GetDICOMLevelPatient())
    if not person:
        return "", modality
    identity = hierarchy.GetItemAttribute(person, words.GetDICOMPatientIDAttributeName())  # public collections name patients so too
    if not identity:
        identity = hierarchy.GetItemUID(person, words.GetDICOMUIDName())
        if identity == hierarchy.GetItemAttribute(person, words.GetDICOMPatientNameAttributeName()):
            identity = ""  # old scenes hold the name where there is no ID
    return identity.strip(), modality


def days_between(earlier: Any, later: Any) -> int | None:
    """Days from one volume's DICOM study to another's, as the subject hierarchy dates them; None where it does not."""
    dates = []
    words = slicer.vtkMRMLSubjectHierarchyConstants
    for volume in (earlier, later):
        hierarchy, item = _item_of(volume)
        study = hierarchy.GetItemAncestorAtLevel(item, words.GetDICOMLevelStudy()) if item else 0
        text = hierarchy.GetItemAttribute(study, words.GetDICOMStudyDateAttributeName()) if study else ""
        try:
            dates.append(datetime.strptime(text.replace(".", ""), "%Y%m%d"))  # 2026.11.28 until DICOM of 1993
        except ValueError:
            return None
    return (dates[1] - dates[0]).days


def roi_box(roi_node: Any, volume_node: Any) -> Box:
    """The voxels (z, y, x) of a volume that a markups ROI covers: the smallest box of indices around it, inside the volume.

    The ROI may be turned and both may be under linear transforms. Raises UserError for an ROI that has no size or lies
    outside the volume, for a non-linear transform, and for a volume that image_from_volume() refuses.
    """
    image = image_from_volume(volume_node)
    name, size = roi_node.GetName(), roi_node.GetSize()
    if not all(0 < s < np.inf for s in size):
        raise UserError(f"ROI '{name}' has no size; draw it in the slice views, or choose another one.")
    to_lps = _LPS @ _to_world(roi_node) @ arrayFromVTKMatrix(roi_node.GetObjectToNodeMatrix())
    corners = [_floats((to_lps @ [*corner, 1])[:3]) for corner in product(*((-s / 2, s / 2) for s in size))]
    box = image.box_around_points(corners) & Box.whole(image.shape)
    if box.empty:
        raise UserError(f"ROI '{name}' lies outside volume '{volume_node.GetName()}'; move it onto the volume, or choose 'Whole volume'.")
    return box


def jump_slices(scene: Any, point_lps: Sequence[float]) -> None:
    """Centre all slice views of the scene on a point of the world, LPS mm."""
    x, y, z = point_lps
    for node in _nodes(scene, "vtkMRMLSliceNode"):
        node.JumpSliceByCentering(-x, -y, z)


# ---------------------------------------------------------------------------------------------------------------- maps


def find_map(volume_node: Any, kind: str) -> Any:
    """The map of a kind that write_map_steps() made for this volume, or None."""
    for node in _nodes(volume_node.GetScene(), "vtkMRMLScalarVolumeNode"):
        if node.GetAttribute(MAP_ATTRIBUTE) == kind and _refers(node, VOLUME_ROLE, volume_node):
            return node
    return None


def write_scalar_map(image: Image, volume_node: Any, name: str, kind: str, box: Box | None = None) -> Any:
    """write_map_steps() at once; `name` is for a new node."""
    return complete(write_map_steps(image, volume_node, kind, box, name))


def write_map_steps(image: Image, volume_node: Any, kind: str, box: Box | None = None, name: str | None = None) -> Steps[Any]:
    """Write a scalar volume with values 0..1 that lies over `volume_node`, in pieces; return it.

    image: (z, y, x) on the volume's grid; stored as float32, clipped to 0..1. kind: "uncertainty" or "probability",
    each with one colour table shared by all its maps. box: the voxels (z, y, x) to store, where the others hold nothing
    (an ROI). The volume's earlier map of this kind gets the new values and keeps its name and display; a new one shows
    0..1, is transparent below MAP_THRESHOLD, and has the volume's parent transform and subject hierarchy folder.
    Raises UserError where the image does not lie on the volume's grid; ValueError for another kind or for channels.
    """
    if kind not in MAP_COLORS or image.array.ndim != 3:
        raise ValueError(f"a map is (z, y, x) of kind {' or '.join(MAP_COLORS)}, not {image.array.shape} of kind {kind!r}")
    _check_grid(image, volume_node)
    check = _still_there(volume_node)
    box = Box.whole(image.shape) if box is None else box & Box.whole(image.shape)
    if box.empty:
        raise ValueError("a map needs voxels")
    data = vtk.vtkImageData()
    data.SetDimensions(box.shape[::-1])
    values = _allocated(data, np.float32)
    part = image.array[box.slices]
    for z in slabs(box.shape):
        np.clip(part[z], 0, 1, out=values[z], casting="unsafe")
        yield
    check()

    # From here in one piece, as it only hands over what is ready.
    scene = volume_node.GetScene()
    node, colors = find_map(volume_node, kind), _colors(scene)
    created = node is None
    if created:
        node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name or f"{volume_node.GetName()} {kind}")
    try:
        if created:
            node.SetAttribute(MAP_ATTRIBUTE, kind)
            node.SetNodeReferenceID(VOLUME_ROLE, volume_node.GetID())
            node.SetNodeReferenceID(_SELF_ROLE, node.GetID())
        if node.GetDisplayNode() is None:
            # Before the voxels come: with them, the automatic window would be computed first (1.1 s on a CT).
            node.CreateDefaultDisplayNodes()
            display = node.GetDisplayNode()
            display.SetAndObserveColorNodeID(_color_node(scene, kind).GetID())
            display.AutoWindowLevelOff()
            display.SetWindowLevelMinMax(0, 1)
            display.AutoThresholdOff()
            display.SetThreshold(MAP_THRESHOLD, 1)
            display.ApplyThresholdOn()
        shift = np.eye(4)
        shift[:3, 3] = box.start[::-1]
        node.SetIJKToRASMatrix(vtkMatrixFromArray(_ijk_to_ras(volume_node) @ shift))
        node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
        node.SetAndObserveImageData(data)
        if created:
            _place_beside(node, volume_node)
    except BaseException:
        if created:
            _remove_node(node)
            _remove_new_colors(scene, colors)
        raise
    return node


def new_volume_steps(
    scene: Any,
    name: str,
    grid: Image,
    fill: Callable[[np.ndarray], Steps[None]],
    window: tuple[float, float] | None = None,
    add: Callable[[str, str], Any] | None = None,
) -> Steps[Any]:
    """A new scalar volume, in pieces. grid: its size, type and place (LPS mm; its voxels do not matter); fill(array) writes the voxels
    (z, y, x) in pieces of its own; window: the lowest and highest value shown, else Slicer's choice, which takes a second on a
    CT. add(class, name) puts the new node into the scene. Nothing is there before all voxels are."""
    data = vtk.vtkImageData()
    data.SetDimensions(grid.shape[::-1])
    yield from fill(_allocated(data, grid.array.dtype))
    node = (add or scene.AddNewNodeByClass)("vtkMRMLScalarVolumeNode", scene.GenerateUniqueName(name))
    try:
        yield  # whoever shows the new node in a list takes his time
        node.CreateDefaultDisplayNodes()  # before the voxels come: the automatic window would be computed first
        display = node.GetDisplayNode()
        if window is not None:
            display.AutoWindowLevelOff()
            display.SetWindowLevelMinMax(*window)
        node.SetIJKToRASMatrix(vtkMatrixFromArray(_LPS @ grid.matrix))
        yield
        node.SetAndObserveImageData(data)
        yield
    except BaseException:
        remove_nodes([node])
        raise
    return node


# ------------------------------------------------------------------------------------------------------------ segments


def editor_node(scene: Any) -> Any:
    """The settings of the Segment Editor module (mask, overwrite mode), or None before it was first opened."""
    return scene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode")


def write_prediction(
    prediction: Prediction, volume_node: Any, segmentation_node: Any = None, replace: bool = True, editor: Any = None
) -> Any:
    """write_prediction_steps() at once."""
    return complete(write_prediction_steps(prediction, volume_node, segmentation_node, replace, editor))


def write_prediction_steps(
    prediction: Prediction,
    volume_node: Any,
    segmentation_node: Any = None,
    replace: bool = True,
    editor: Any = None,
    segments: dict[int, Any] | None = None,
) -> Steps[Any]:
    """Write each label that the prediction holds as a segment, in pieces, and return the segmentation node.

    prediction.labels lies on the grid of image_from_volume(volume_node), or of as_read(). Without `segmentation_node` a new one is
    made. A node without segments gets the volume's parent transform, and the volume as source volume and reference
    geometry; a node with segments keeps its own, and the new segments are placed under its transform.
    replace: a segment of the label's name that an earlier prediction of this model, in any version, wrote gets the new voxels
    but keeps its ID, its name, its colour, its terminology and how it is displayed; one whose label is no longer found is
    removed. Segments that a person made or renamed, and those of other models, are never touched: where the name is taken, a
    number is added to it. False: all segments are added.
    No voxel of another segment changes, overlapping or not. Derived representations (closed surface) that the node
    has are updated; none are created.
    editor: a vtkMRMLSegmentEditorNode whose masking holds. Outside its editable area and intensity range nothing is
    written, and what is replaced keeps its voxels there. Voxels of the other segments that its overwrite mode names
    (all, or the visible ones) are left to them alone; with "allow overlap", and without `editor`, segments may overlap.
    segments: is given the segment of each label, by the label's value.

    Nothing in the scene changes before the last pieces: the node's creation, then one segment a piece. A segment that is
    edited meanwhile is read again. Raises UserError, with the scene as it was, where the labels do not lie on the
    volume's grid, the segmentation cannot take them (another source representation, a non-linear transform), the
    editor's limits leave nothing, or a node is removed from the scene meanwhile.
    """
    _check_grid(prediction.labels, volume_node)
    check_accepts(segmentation_node)
    check = _still_there(volume_node, segmentation_node)
    segmentation = segmentation_node.GetSegmentation() if segmentation_node is not None else None
    plan = yield from _plan_steps(prediction, volume_node, segmentation_node, segmentation, replace, editor)
    check()
    _check_grid(prediction.labels, volume_node)

    fresh = segmentation is None or not segmentation.GetNumberOfSegments()
    with _written_into(segmentation_node, volume_node, "segmentation") as node:
        new = [data for item in plan.written for data in (item.labelmap, *item.derived.values())]
        _dress(node, volume_node if fresh else None, [*new, *plan.relaid.values()])
        check = _still_there(volume_node, node)
        for _ in _carry_out(plan, node.GetSegmentation(), prediction, segments):
            yield
            check()
    return node


@contextmanager
def _written_into(segmentation_node: Any, volume_node: Any, what: str) -> Iterator[Any]:
    """The segmentation, or a new one beside the volume; where the block fails it is as it was before, or gone."""
    state = None if segmentation_node is None else _State(segmentation_node)
    scene, node = volume_node.GetScene(), segmentation_node
    try:
        if node is None:
            node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", scene.GenerateUniqueName(f"{volume_node.GetName()} {what}"))
            _place_beside(node, volume_node)
        yield node
    except BaseException:
        if state is not None:
            state.mark()
            state.restore()
        elif node is not None:
            _remove_node(node)
        raise


def add_empty_segments(segmentation_node: Any, labels: Sequence[Label]) -> None:
    """A segment without voxels for each label whose name the segmentation does not have, so that it can be painted."""
    segmentation = segmentation_node.GetSegmentation()
    names = {segmentation.GetSegment(i).GetName() for i in _ids(segmentation)}
    for label in labels:
        if label.name not in names:
            new = segmentation.AddEmptySegment("", label.name, [c / 255 for c in label.color])
            if label.terminology_entry():
                segment = segmentation.GetSegment(new)
                segment.SetTag(segment.GetTerminologyEntryTagName(), label.terminology_entry())


def remove_nodes(nodes: Iterable[Any]) -> None:
    """Remove nodes that are (still) in a scene, with their display and storage nodes; of a segmentation also its tables."""
    for node in nodes:
        if node is not None and node.GetScene() is not None:
            if node.IsA("vtkMRMLSegmentationNode"):
                for role in (SEGMENTATION_ROLE, NODULES_ROLE):
                    while (table := find_table(node, role)) is not None:
                        _remove_node(table)
            _remove_node(node)


def segment_mask(segmentation_node: Any, segment_id: str, volume_node: Any) -> np.ndarray:
    """A segment on the volume's voxel grid: a new uint8 array (z, y, x) of 0 and 1.

    A segment that lies on another grid or under another transform is resampled (nearest neighbour); one that has no
    binary labelmap is converted on the volume's grid, and the node is not changed.
    Raises UserError for an unknown segment, a volume that image_from_volume refuses, or a non-linear transform.
    """
    shape = image_from_volume(volume_node).shape
    _check_has(segmentation_node, segment_id)
    matrix = _grid_in(segmentation_node, volume_node)
    steps = _held_steps(segmentation_node.GetSegmentation(), [segment_id], Box.whole(shape), matrix)
    return complete(steps).view(np.uint8)


def measure_steps(
    segmentation_node: Any, volume_node: Any, segment_ids: Sequence[str] | None = None, segmentation: Any = None
) -> Steps[list[dict[str, Any]]]:
    """measure() of segments as they are now (all, or those named), in pieces; intensities are the volume's, and sizes as_read().

    For results that the Segment Editor's masking limited or a person corrected. `value` counts from 1. Segments of the size
    of an organ get no diameters, which would take seconds. segmentation: a vtkSegmentation that the node is to hold, instead of its
    own. Raises UserError as segment_mask() does.
    """
    image = as_read(image_from_volume(volume_node), volume_node)
    segmentation = segmentation or segmentation_node.GetSegmentation()
    out = []
    for value, segment_id in enumerate(_ids(segmentation) if segment_ids is None else segment_ids, 1):
        _check_has(segmentation_node, segment_id, segmentation)
        matrix = _grid_in(segmentation_node, volume_node)
        mask = yield from _held_steps(segmentation, [segment_id], Box.whole(image.shape), matrix)
        _, box = yield from _survey_steps(mask.view(np.uint8))
        box = box or Box((0, 0, 0), (1, 1, 1))
        part, label = image.crop(box), Label(1, segmentation.GetSegment(segment_id).GetName(), (0, 0, 0), {})
        values = part.like(mask[box.slices].view(np.uint8))
        (found,) = yield from measure.measure_steps(values, [label], part, _LARGEST_MEASURED, slices_across(image))
        out.append({**found, "value": value})
    return out


# ------------------------------------------------------------------------------------------------- segments by clicking


def prompts_text(prompts: Sequence[Prompt], volume_node: Any) -> str:
    """Prompts (in LPS mm of the world) as the text of PROMPTS_TAG: in the volume's own coordinates and, before them, its grid
    then and a print of its voxels, so that a linear transform that volume and segmentation get later does no harm, hardened or
    not. UserError for what is no prompt or for a non-linear transform."""
    own = encode_prompts(_moved(prompts, np.linalg.inv(_to_world(volume_node))))
    return json.dumps([["grid", *_grid_of(volume_node), _print_of(volume_node)], *own], separators=(",", ":"))


def prompts_from_text(text: str, volume_node: Any) -> list[Prompt]:
    """The inverse of prompts_text(), where the volume is now; an empty list for a text that is none, or one with a mask or a click that
    has no place on the volume's voxels, as on a crop."""
    now, then = _grid_of(volume_node), None
    try:
        items = json.loads(text) if text else []
        if isinstance(items, list) and items and isinstance(items[0], list) and items[0][:1] == ["grid"]:  # the first scenes have none
            grid = items.pop(0)[1:]
            then = numbers({"grid": grid}, "grid", 19 + (len(grid) > 19))  # the first scenes have no print of the voxels
        # A scene is anybody's, and all its segments' are read. Of a small volume: 400 voxels across, as it may be a crop.
        prompts = decode_prompts(items, max(2 * int(np.prod(now[16:])), 1 << 26))
    except (ValueError, RecursionError, MemoryError, ProtocolError):
        return []
    if not prompts:
        return []
    matrix = _to_world(volume_node)
    if then is not None and now and not np.allclose(now, then[:19], rtol=0, atol=1e-6):
        here, there = (np.reshape(grid[:16], (4, 4)) for grid in (now, then))
        same = now[16:] == then[16:19] and then[19:] in ((), (_print_of(volume_node),))
        # A crop is no move, nor is it one that Slicer's loader mirrors the voxels of left-handed files; nor is another scan of this size,
        # which a segment was copied to.
        if same and np.linalg.det(here) * np.linalg.det(there) > 0:
            matrix = matrix @ here @ np.linalg.inv(there)
        else:
            index = np.linalg.inv(here)
            prompts = _regridded(prompts, index @ there, volume_node.GetImageData().GetDimensions()[::-1])
            places = [index @ _LPS @ (*p[1:4], 1) for p in prompts if p[0] == "point"]
            if any((at[:3] < -0.5).any() or (at[:3] > np.array(now[16:]) - 0.5).any() for at in places):
                return []
    return _moved(prompts, matrix)


def _regridded(prompts: Sequence[Prompt], matrix: np.ndarray, shape: Sequence[int]) -> list[Prompt]:
    """Masks among the prompts on a crop's or a mirrored grid of this shape; none of the prompts where a mask has no place there, as
    without it they are another lesion. matrix: 4x4 from index (x, y, z) to index."""
    signs, by, out = np.sign(np.diag(matrix)[:3]), matrix[:3, 3], []
    same = np.allclose(matrix[:3, :3], np.diag(signs), atol=1e-4) and np.allclose(by, np.round(by), atol=0.05)
    for prompt in prompts:
        if prompt[0] == "mask":
            mask, start = prompt[1:]
            ends = [signs * end[::-1] + by for end in np.add(start, [(0, 0, 0), np.subtract(mask.shape, 1)])]
            first = [int(v) for v in np.round(np.minimum(*ends))[::-1]]
            box = Box.whole(mask.shape).shifted(first)
            inside = box & Box.whole(shape)
            mask = mask[tuple(slice(None, None, int(s)) for s in signs[::-1])] if same and not inside.empty else mask[:0]
            mask = mask[inside.relative_to(box).slices]
            if not mask.any():
                return []
            prompt = ("mask", np.ascontiguousarray(mask), inside.start)
        out.append(prompt)
    return out


def _grid_of(volume_node: Any) -> tuple[float, ...]:
    """4x4 from index (x, y, z) to the volume's own RAS, row by row, and its size; empty without voxels."""
    data = volume_node.GetImageData()
    return () if data is None else (*_floats(_ijk_to_ras(volume_node).ravel()), *data.GetDimensions())


def _print_of(volume_node: Any) -> int:
    """Another one for another scan, or other values: of 4096 of its voxels, whatever their type, which takes 0.2 ms of 512x512x300."""
    data = volume_node.GetImageData()
    scalars = data.GetPointData().GetScalars() if data is not None else None
    values = np.zeros(0) if scalars is None else vtk_to_numpy(scalars).ravel()
    # An odd step: one of 32 rows would see nothing but a scan's first column, which is air.
    return zlib.crc32(values[:: values.size >> 12 | 1].astype(np.float64).tobytes())


def _moved(prompts: Sequence[Prompt], matrix: np.ndarray) -> list[Prompt]:
    """matrix: 4x4, RAS to RAS."""
    if np.array_equal(matrix, np.eye(4)):
        return [tuple(p) for p in prompts]  # to the last bit
    matrix = _LPS @ matrix @ _LPS
    out: list[Prompt] = []
    for kind, *values in prompts:
        if kind != "mask":
            points = np.reshape(values[: len(values) // 3 * 3], (-1, 3))
            moved = points @ matrix[:3, :3].T + matrix[:3, 3]
            values = [*_floats(moved.ravel()), *values[len(values) // 3 * 3 :]]
        out.append((kind, *values))
    return out


def place_of(volume_node: Any) -> Any:
    """Equal as long as the volume's voxels lie where they lie; None without voxels or under a non-linear transform."""
    try:
        image = image_from_volume(volume_node)
    except UserError:
        return None
    return image.spacing, image.origin, image.direction


def place_in(segmentation_node: Any, volume_node: Any) -> Any:
    """Equal as long as the volume's voxels lie at the same place of the segmentation; UserError under a non-linear transform."""
    return _floats(_grid_in(segmentation_node, volume_node).ravel())


def is_astray(segmentation_node: Any, volume_node: Any) -> bool:
    """Whether the volume's voxels lie elsewhere in the segmentation than when its geometry was taken from them, as where one of the two
    was moved alone. Of a geometry of another size, as a finer or a cropped one, nobody knows."""
    text, taken = segmentation_node.GetSegmentation().GetConversionParameter(_GEOMETRY), slicer.vtkOrientedImageData()
    if not (text and slicer.vtkSegmentationConverter.DeserializeImageGeometry(text, taken, False)):
        return False
    shape, grid = image_from_volume(volume_node).shape, _grid_in(segmentation_node, volume_node)
    return taken.GetDimensions()[::-1] == shape and _extent_box(taken, grid) != Box.whole(shape)


def segment_part_steps(segmentation_node: Any, segment_id: str, volume_node: Any) -> Steps[tuple[np.ndarray, tuple[int, ...]]]:
    """segment_mask() without the zeros around it, in pieces: mask and the index (z, y, x) of its first voxel.

    An empty segment gives an empty mask at (0, 0, 0). Raises UserError as segment_mask() does, and when it is edited meanwhile.
    """
    shape = image_from_volume(volume_node).shape
    _check_has(segmentation_node, segment_id)
    segmentation, grid = segmentation_node.GetSegmentation(), _grid_in(segmentation_node, volume_node)
    labelmap = segmentation.GetSegment(segment_id).GetRepresentation(_LABELMAP)
    extent = None if labelmap is None else _extent_box(labelmap, grid)
    box = Box.whole(shape) if extent is None else extent & Box.whole(shape)
    empty = np.zeros((0, 0, 0), np.uint8), (0, 0, 0)
    if box.empty:
        return empty
    mask = (yield from _held_steps(segmentation, [segment_id], box, grid)).view(np.uint8)
    _, inside = yield from _survey_steps(mask)
    return empty if inside is None else (mask[inside.slices].copy(), inside.shifted(box.start).start)


def merged_steps(segmentation_node: Any, values: Sequence[tuple[str, int]], volume_node: Any) -> Steps[tuple[np.ndarray, tuple[int, ...]]]:
    """Segments as one label map without the zeros around it, in pieces: uint8 (z, y, x) and the index of its first voxel.

    values: (segment ID, 1 to 255), of which several may be the same; where segments overlap the later one wins. Raises as
    segment_part_steps() does.
    """
    parts = []
    for segment_id, value in values:
        mask, start = yield from segment_part_steps(segmentation_node, segment_id, volume_node)
        if mask.size:
            parts.append((mask, Box.whole(mask.shape).shifted(start), value))
    if not parts:
        return np.zeros((0, 0, 0), np.uint8), (0, 0, 0)
    around = reduce(or_, (box for _, box, _ in parts))
    whole = np.zeros(around.shape, np.uint8)
    for mask, box, value in parts:
        place = whole[box.relative_to(around).slices]
        for z in slabs(mask.shape):
            place[z][mask[z] > 0] = value
            yield
    return whole, around.start


def beyond_steps(segmentation_node: Any, segment_ids: Iterable[str], volume_node: Any) -> Steps[float]:
    """In pieces: how many voxels the segments' labelmaps reach beyond a volume, which merged_steps() leaves out. Looks at the voxels
    only where a labelmap is larger than the volume or on another lattice."""
    shape, grid = image_from_volume(volume_node).shape, _grid_in(segmentation_node, volume_node)
    segmentation, far = segmentation_node.GetSegmentation(), 0.0
    for labelmap, owners in _layers(segmentation, segment_ids).items():
        extent, matrix = _extent_box(labelmap, grid), vtk.vtkMatrix4x4()
        if extent is not None and (extent.empty or extent & Box.whole(shape) == extent):
            continue
        labelmap.GetImageToWorldMatrix(matrix)
        turn = np.linalg.inv(grid) @ arrayFromVTKMatrix(matrix)
        numbers, unchanged = {_segment(segmentation, i).GetLabelValue(): 1 for i in owners}, _unchanged(labelmap)
        for z in slabs(_voxels(labelmap).shape):
            unchanged()
            first = np.eye(4)
            first[:3, 3] = np.array(labelmap.GetExtent()[::2]) + (0, 0, z.start)
            far = max(far, reach(translated(_voxels(labelmap)[z], numbers, np.uint8), turn @ first, shape))
            yield
    return far


def segment_tag(segment: Any, name: str) -> str:
    """The value of a segment's tag; "" where it has none."""
    value = vtk.reference("")
    return str(value) if segment.GetTag(name, value) else ""


def _reference_volume(segmentation_node: Any) -> Any:
    """The volume on whose grid a segmentation lies, or None."""
    return segmentation_node.GetNodeReference(segmentation_node.GetReferenceImageGeometryReferenceRole())


def find_nodules(volume_node: Any) -> Any:
    """The last segmentation that nodules of this volume were clicked into, or None."""
    for node in reversed(_nodes(volume_node.GetScene(), "vtkMRMLSegmentationNode")):
        segmentation = node.GetSegmentation()
        clicked = any(segmentation.GetNthSegment(i).HasTag(PROMPTS_TAG) for i in range(segmentation.GetNumberOfSegments()))
        if clicked and _reference_volume(node) is volume_node:
            return node
    return None


def find_scan(segmentation_node: Any, other_than: Any = None) -> Any:
    """The one scan, but this other one, whose voxels are those of a segmentation's labelmaps; None where there is none, or more.

    A segmentation that was read from a file does not know its scan.
    """
    labelmaps, found = list(_layers(segmentation_node.GetSegmentation())), []
    for volume in _nodes(segmentation_node.GetScene(), "vtkMRMLScalarVolumeNode"):
        derived = volume.IsA("vtkMRMLLabelMapVolumeNode") or volume.GetAttribute(MAP_ATTRIBUTE)
        if volume is other_than or derived or volume.GetImageData() is None:
            continue
        try:
            whole, grid = Box.whole(image_from_volume(volume).shape), _grid_in(segmentation_node, volume)
        except UserError:
            continue
        boxes = [_extent_box(labelmap, grid) for labelmap in labelmaps]
        if any(box and not box.empty for box in boxes) and all(box is not None and box & whole == box for box in boxes):
            found.append(volume)
    return found[0] if len(found) == 1 else None


def show_dots(scene: Any, positive: bool, points: Sequence[Sequence[float]]) -> None:
    """The clicks of one kind, and no others, as small locked dots at these points of the world (RAS mm).

    They are not saved with the scene: the segments hold the prompts.
    """
    node = _dots(scene, positive)
    if not points:
        remove_nodes([node])
        return
    if node is None:
        name, color = _DOTS[positive]
        node = slicer.vtkMRMLMarkupsFiducialNode()
        node.SetName(name)
        node.SetAttribute(DOTS_ATTRIBUTE, name)
        node.SetSaveWithScene(False)
        node.SetHideFromEditors(True)
        node.SetLocked(True)
        # Slicer chooses each new list as the one to place points in, also a hidden one: a person's would be among ours, and lost.
        selection = scene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
        chosen = None if selection is None else (selection.GetActivePlaceNodeID(), selection.GetActivePlaceNodeClassName())
        node = scene.AddNode(node)
        if chosen is not None:
            selection.SetReferenceActivePlaceNodeClassName(chosen[1])
            selection.SetReferenceActivePlaceNodeID(chosen[0])
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetSaveWithScene(False)
        display.SetColor(*color)
        display.SetSelectedColor(*color)
        display.SetUseGlyphScale(True)
        display.SetGlyphScale(_DOT_PERCENT)
        display.SetPointLabelsVisibility(False)
        display.SetPropertiesLabelVisibility(False)
    now = [tuple(node.GetNthControlPointPositionWorld(i)) for i in range(node.GetNumberOfControlPoints())]
    if now != [tuple(map(float, p)) for p in points]:
        with slicer.util.NodeModify(node):
            node.RemoveAllControlPoints()
            for point in points:
                node.AddControlPointWorld(vtk.vtkVector3d(point), "")


def remove_dots(scene: Any) -> None:
    remove_nodes(_dots(scene, positive) for positive in _DOTS)


def _dots(scene: Any, positive: bool) -> Any:
    nodes = _nodes(scene, "vtkMRMLMarkupsFiducialNode")
    return next((n for n in nodes if n.GetAttribute(DOTS_ATTRIBUTE) == _DOTS[positive][0]), None)


def write_clicked_steps(
    mask: np.ndarray,
    start: Sequence[int],
    volume_node: Any,
    segmentation_node: Any = None,
    segment_id: str | None = None,
    *,
    name: str = "Nodule",
    color: Sequence[int] = (255, 255, 0),
    tags: dict[str, str] | None = None,
) -> Steps[tuple[Any, str]]:
    """Give one segment these voxels and no others, in pieces; the segmentation node and the segment's ID.

    mask: (z, y, x) of 0 and 1, not empty, whose first voxel is the volume's voxel `start`. segmentation_node None: a new one,
    which shows surfaces. segment_id None: a new segment of this name, or this name and a number, and colour (0..255).
    No voxel of another segment changes, overlapping or not; surfaces that the node has are updated, coarse ones for what is large. tags:
    set with the voxels. The scene changes in the last piece, all at once. UserError as write_prediction_steps(), or where the segment
    is gone.
    """
    check_accepts(segmentation_node)
    check = _still_there(volume_node, segmentation_node)
    while True:
        segmentation = segmentation_node.GetSegmentation() if segmentation_node is not None else None
        fresh = segmentation is None or not segmentation.GetNumberOfSegments()
        grid = _ijk_to_ras(volume_node) if fresh else _grid_in(segmentation_node, volume_node)
        names = [_SURFACE] if segmentation is None else [n for n in _representations(segmentation) if n != _LABELMAP]
        labelmap = oriented_labelmap(mask.astype(np.uint8), start, grid)
        labelmap.GetPointData().GetScalars().SetComponentName(0, _WRITTEN)
        yield
        coarse = _coarser(mask, start, grid) if names == [_SURFACE] else (mask, start, grid)
        yield
        derived = _derive(segmentation or slicer.vtkSegmentation(), *coarse, names) if names else {}
        if coarse[0] is not mask and _SURFACE in derived:
            mark = vtk.vtkIntArray()
            mark.SetName(_COARSE)
            derived[_SURFACE].GetFieldData().AddArray(mark)
        yield
        try:
            relaid = yield from _leave_steps(segmentation, segment_id)
        except _Changed:
            check()
            if segmentation is None or segmentation.GetSegment(segment_id) is None:
                raise UserError("The segment was removed meanwhile, so nothing was written.") from None
            continue
        check()
        if segmentation is None or fresh != bool(segmentation.GetNumberOfSegments()):
            break

    with _written_into(segmentation_node, volume_node, "nodules") as node:
        _dress(node, volume_node if fresh else None, [labelmap, *derived.values(), *relaid.values()])
        segmentation = node.GetSegmentation()
        for other, copy in relaid.items():
            segmentation.GetSegment(other).AddRepresentation(_LABELMAP, copy)
        segment = _new_segment(segmentation, name, color) if segment_id is None else segmentation.GetSegment(segment_id)
        for key in (MODEL_TAG, CUT_TAG):
            segment.RemoveTag(key)
        for key, value in (tags or {}).items():
            segment.SetTag(key, value)
        _begun(segment)
        segment.SetLabelValue(1)
        segment.AddRepresentation(_LABELMAP, labelmap)
        for key, data in derived.items():
            segment.AddRepresentation(key, data)
        if segment_id is None:
            segmentation.AddSegment(segment)
            segment_id = segmentation.GetSegmentIdBySegment(segment)
    return node, segment_id


def _begun(segment: Any) -> None:
    """As the Segment Editor does: else the list of segments has it as not started. What a person said stays."""
    if segment_tag(segment, "Segmentation.Status") in ("", "notstarted"):
        segment.SetTag("Segmentation.Status", "inprogress")


def _coarser(mask: np.ndarray, start: Sequence[int], grid: np.ndarray) -> tuple[np.ndarray, Sequence[int], np.ndarray]:
    """A mask of at most _SURFACE_VOXELS across, and its place, for a surface to look at: that of a larger one would hold the
    event loop for 70 ms and more. A voxel of it is where at least half of its block is."""
    step = -(-max(mask.shape) // _SURFACE_VOXELS)
    if step == 1:
        return mask, start, grid
    shape = [-(-n // step) for n in mask.shape]
    padded = np.zeros([n * step for n in shape], np.uint8)
    padded[tuple(slice(0, n) for n in mask.shape)] = mask
    blocks = padded.reshape([v for n in shape for v in (n, step)]).sum((1, 3, 5), dtype=np.uint16)
    place = np.diag([step, step, step, 1.0])
    place[:3, 3] = np.array(start[::-1]) + (step - 1) / 2
    return (2 * blocks >= step**3).astype(np.uint8), (0, 0, 0), grid @ place


def exact_surface_steps(scene: Any) -> Steps[None]:
    """Slicer's own surfaces in place of the coarse ones, for what measures, prints or exports them: those of a lobulated mass of
    7 cm are up to 3 mm apart, and an eighth of its area. A segment a piece, which takes 0.1 to 0.3 s."""
    for node in _nodes(scene, "vtkMRMLSegmentationNode"):
        segmentation = node.GetSegmentation()
        for segment_id in _ids(segmentation):
            segment = segmentation.GetSegment(segment_id)
            surface = segment.GetRepresentation(_SURFACE) if segment is not None else None
            if surface is not None and surface.GetFieldData().HasArray(_COARSE):
                yield
                _derive_anew(segmentation, segment, [_SURFACE])


def _leave_steps(segmentation: Any, segment_id: str | None) -> Steps[dict[str, Any]]:
    """ID -> labelmap of those who share a layer with a segment, without its voxels: what is taken out of a layer must not be
    left in it without an owner."""
    if segment_id is None:
        return {}
    labelmap = _segment(segmentation, segment_id).GetRepresentation(_LABELMAP)
    staying = _layers(segmentation).get(labelmap, set()) - {segment_id}
    if not staying:
        return {}
    copy = yield from _only_steps(labelmap, {_segment(segmentation, i).GetLabelValue() for i in staying})
    if _layers(segmentation).get(labelmap, set()) - {segment_id} != staying:
        raise _Changed
    return dict.fromkeys(staying, copy)


def remove_segment(segmentation_node: Any, segment_id: str) -> None:
    """Remove a segment; those that share its layer keep their voxels."""
    _save_for_editor(segmentation_node)
    segmentation = segmentation_node.GetSegmentation()
    for other, copy in complete(_leave_steps(segmentation, segment_id)).items():
        segmentation.GetSegment(other).AddRepresentation(_LABELMAP, copy)
    _take_out(segmentation, segment_id)


def _take_out(segmentation: Any, segment_id: str) -> None:
    # With a labelmap of its own there is nothing that removing it could erase from the others'.
    segmentation.GetSegment(segment_id).AddRepresentation(_LABELMAP, slicer.vtkOrientedImageData())
    segmentation.RemoveSegment(segment_id)


# ---------------------------------------------------------------------------------------------------- the Segment Editor


@dataclass(frozen=True)
class Edit:
    """What the Segment Editor has to take out of a segment and then to put into it: labelmaps of 0 and 1 on the
    segmentation's lattice, None where there is nothing. digest: mask_digest() of the segment then; None: not known before,
    as it lies on another lattice than the volume."""

    removed: Any
    added: Any
    digest: str | None


def edit_steps(
    mask: np.ndarray | None, start: Sequence[int], volume_node: Any, segmentation_node: Any, segment_id: str | None, editor: Any
) -> Steps[Edit]:
    """How a segment becomes this mask wherever the editor's masking lets it be edited, in pieces; changes no voxel.

    mask: (z, y, x) of 0 and 1 whose first voxel is the volume's voxel `start`; None empties the segment.
    segment_id None: a segment that is yet to be made. editor: a vtkMRMLSegmentEditorNode, whose editable area and intensity
    range count here, box by box, as Slicer's own mask takes 2 s on a CT. What happens to other segments is its overwrite mode's
    affair when the voxels are added. Sets the reference geometry of a segmentation that has none.
    UserError where the masking leaves nothing of the mask, or the segmentation's coarser voxels do, and as segment_mask() raises it.
    """
    segmentation, grid = segmentation_node.GetSegmentation(), _grid_in(segmentation_node, volume_node)
    nothing = np.zeros((0, 0, 0), np.uint8)
    mask = nothing if mask is None else mask
    held: np.ndarray = nothing
    first: tuple[int, ...] = (0, 0, 0)
    if segment_id is not None:
        held, first = yield from segment_part_steps(segmentation_node, segment_id, volume_node)
    parts = [(part, Box.whole(part.shape).shifted(a)) for part, a in ((mask, start), (held, first))]
    boxes = [box for _, box in parts if not box.empty]
    if not boxes:
        return Edit(None, None, mask_digest(held, first))
    box = reduce(or_, boxes)
    labelmap = segmentation.GetSegment(segment_id).GetRepresentation(_LABELMAP) if segment_id else None
    # Of a finer lattice the scan's voxels show one voxel in eight: what lies between them goes, too, where the mask is not.
    finer = labelmap is not None and _extent_box(labelmap, grid) is None
    if finer:
        box = box.grown((1, 1, 1)) & Box.whole(image_from_volume(volume_node).shape)
    added, removed = (np.zeros(box.shape, np.uint8) for _ in range(2))
    for array, (part, of) in zip((added, removed), parts):
        if not of.empty:
            array[of.relative_to(box).slices] = part > 0
    after = removed.copy()
    limits = _Limits(editor, volume_node, segmentation_node, segmentation, {segment_id} if segment_id else set(), grid)
    limits.taken = None
    barred = (yield from limits.steps(box)) if limits.masked else None
    some = left = False
    for z in slabs(box.shape):
        some |= bool(added[z].any())
        removed[z] = (added[z] ^ 1) & (removed[z] | finer)
        if barred is not None:
            for array in (added, removed):
                array[z][barred[z] > 0] = 0
        left |= bool(added[z].any())
        after[z] = after[z] & (removed[z] ^ 1) | added[z]
        yield
    if some and not left:
        raise limits.nothing_left("click elsewhere")
    lattice = _lattice(segmentation_node, volume_node)
    edits = [_on_lattice(array, box.start, grid, lattice) for array in (removed, added)]
    if left and edits[1][0] is not None and not _voxels(edits[1][0]).any():
        raise UserError(
            "The segmentation's voxels are too coarse for this lesion; set its geometry to that of the scan (Segmentation geometry)."
        )
    same = all(edit is None or exact for edit, exact in edits)
    return Edit(edits[0][0], edits[1][0], mask_digest(after, box.start) if same else None)


def agreeing(prompts: Sequence[Prompt], mask: np.ndarray, start: Sequence[int], volume_node: Any) -> list[Prompt]:
    """The points among the prompts that a mask corrected by hand agrees with: positive ones inside it, negative ones outside.

    mask: (z, y, x) of 0 and 1 whose first voxel is the volume's voxel `start`.
    """
    image, out = image_from_volume(volume_node), []
    for prompt in prompts:
        if prompt[0] == "point":
            at = [int(np.floor(i + 0.5)) - a for i, a in zip(image.point_to_index(prompt[1:4])[::-1], start)]
            inside = all(0 <= i < n for i, n in zip(at, mask.shape)) and bool(mask[tuple(at)])
            if inside == prompt[4]:
                out.append(prompt)
    return out


def _lattice(segmentation_node: Any, volume_node: Any) -> np.ndarray:
    """4x4 of the lattice that a segmentation is edited on, index (x, y, z) to its coordinates; the volume's where it has none."""
    segmentation = segmentation_node.GetSegmentation()
    if not segmentation.GetConversionParameter(_GEOMETRY):
        segmentation_node.SetReferenceImageGeometryParameterFromVolumeNode(volume_node)
    image, matrix = slicer.vtkOrientedImageData(), vtk.vtkMatrix4x4()
    slicer.vtkSegmentationConverter.DeserializeImageGeometry(segmentation.GetConversionParameter(_GEOMETRY), image, False)
    image.GetImageToWorldMatrix(matrix)
    return arrayFromVTKMatrix(matrix)


def _on_lattice(mask: np.ndarray, start: Sequence[int], grid: np.ndarray, lattice: np.ndarray) -> tuple[Any, bool]:
    """The voxels of a mask that are not 0 as a labelmap on a lattice, None where there are none, and whether they are the same
    ones: on another lattice than the mask's the nearest are taken."""
    inside = Box.around(mask)
    if inside is None:
        return None, True
    part = np.ascontiguousarray(mask[inside.slices])
    labelmap = oriented_labelmap(part, inside.shifted(start).start, grid)
    box = _extent_box(labelmap, lattice)
    if box is not None:
        return oriented_labelmap(part, box.start, lattice), True
    extent = labelmap.GetExtent()
    corners = np.array([(*c, 1) for c in product(*((a - 0.5, b + 0.5) for a, b in zip(extent[::2], extent[1::2])))])
    there = (np.linalg.inv(lattice) @ grid @ corners.T)[2::-1]
    low, high = np.floor(there.min(1)).astype(int), np.ceil(there.max(1)).astype(int)
    out = slicer.vtkOrientedImageData()
    slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage(
        labelmap, _oriented(tuple(high - low + 1), tuple(low), lattice), out
    )
    return out, False


# ------------------------------------------------------------------------------------------- segments: the plan, the act


def oriented_labelmap(mask: np.ndarray, start: Sequence[int], ijk_to_ras: np.ndarray) -> Any:
    """A vtkOrientedImageData of one box of a grid.

    mask: (z, y, x), uint8 or uint16, copied. start: index (z, y, x) of its first voxel in the grid. ijk_to_ras: 4x4 of
    the grid, in the coordinates of the segmentation node.
    """
    out = _oriented(mask.shape, start, ijk_to_ras)
    scalars = numpy_to_vtk(np.ascontiguousarray(mask).ravel(), deep=True)
    scalars.SetName(_SCALARS)
    out.GetPointData().SetScalars(scalars)
    return out


@dataclass
class _Written:
    """A label to become a segment: a new one, or a former one of our own (its ID). derived: name -> data."""

    label: Label
    earlier: str | None
    value: int
    labelmap: Any
    derived: dict[str, Any]


@dataclass
class _Plan:
    """relaid: ID -> the labelmap that a segment moves to, with the same voxels; removed: IDs."""

    written: list[_Written] = field(default_factory=list)
    relaid: dict[str, Any] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


def _plan_steps(prediction: Prediction, volume_node: Any, node: Any, segmentation: Any, replace: bool, editor: Any) -> Steps[_Plan]:
    """What is to be done to a vtkSegmentation that `node` holds, or will hold (None: to new ones). Changes nothing."""

    def look() -> tuple[bool, list[list[float]], list[str], list[Any]]:
        fresh = segmentation is None or not segmentation.GetNumberOfSegments()
        grid = _ijk_to_ras(volume_node) if fresh else _grid_in(node, volume_node)
        names = [] if fresh else [n for n in _representations(segmentation) if n != _LABELMAP]
        layers = [] if fresh else [(i, *label_of(segmentation.GetSegment(i))) for i in _ids(segmentation)]
        return fresh, grid.tolist(), names, layers

    while True:
        fresh, matrix, names, _ = before = look()
        earlier = {} if fresh or not replace else _earlier_segments(segmentation, prediction)
        try:
            plan = yield from _draft_steps(prediction, volume_node, node, segmentation, earlier, editor, np.array(matrix), names)
        except _Changed:
            continue
        if before == look():
            return plan


def _draft_steps(
    prediction: Prediction,
    volume_node: Any,
    node: Any,
    segmentation: Any,
    earlier: dict[int, str],
    editor: Any,
    grid: np.ndarray,
    names: list[str],
) -> Steps[_Plan]:
    plan, ours = _Plan(), set(earlier.values())
    limits = None if editor is None else _Limits(editor, volume_node, node, segmentation, ours, grid)
    for layer in (yield from _layer_steps(prediction, segmentation, earlier, limits, grid)):
        boxes = (yield from _label_box_steps(layer.array)) if names else {}
        for value, label in layer.labels.items():
            derived = {}
            if names:
                # A filter of VTK, which cannot be cut: 0.07 s for a segment of 70 voxels across, 0.5 s for a lung.
                box = boxes[value]
                derived = _derive(segmentation, layer.array[box.slices] == value, box.shifted(layer.start).start, grid, names)
                yield
            plan.written.append(_Written(label, earlier.get(label.value), value, layer.labelmap, derived))
    found = {w.label.value for w in plan.written}
    plan.written.sort(key=lambda w: prediction.label_defs.index(w.label))
    plan.removed = [i for value, i in earlier.items() if value not in found]
    # What Slicer itself does to take segments out of a layer is to write into it, and to resample it for another lattice.
    for labelmap, owners in _layers(segmentation).items() if earlier else ():
        staying = owners - ours
        if staying and staying != owners:
            copy = yield from _only_steps(labelmap, {_segment(segmentation, i).GetLabelValue() for i in staying})
            plan.relaid.update(dict.fromkeys(staying, copy))
    return plan


def _carry_out(plan: _Plan, segmentation: Any, prediction: Prediction, segments: dict[int, Any] | None) -> Iterator[None]:
    """Change the segmentation; one segment between two yields."""
    kept = getattr(prediction, "kept", "")  # of a worker's
    for segment_id, labelmap in plan.relaid.items():
        segmentation.GetSegment(segment_id).AddRepresentation(_LABELMAP, labelmap)
    for segment_id in plan.removed:
        if segmentation.GetSegment(segment_id) is not None:
            _take_out(segmentation, segment_id)
        yield
    for item in plan.written:
        if item.earlier is not None:
            segment = segmentation.GetSegment(item.earlier)
            if segment is None:
                raise UserError(f"Segment '{item.label.name}' was removed while its result was written; apply again.")
        else:
            segment = _new_segment(segmentation, item.label.name, item.label.color)
        tags = {MODEL_TAG: prediction.model_name, _NAME_TAG: _name_text(segment)}
        for key, value in {**tags, **algorithm_tags(prediction.model_name, prediction.algorithm)}.items():
            segment.SetTag(key, value)
        if kept:
            segment.SetTag(KEPT_TAG, f"{kept}:{item.label.value}")
            segment.SetTag(KEPT_MODEL_TAG, prediction.model_name)
        else:
            segment.RemoveTag(KEPT_TAG)
            segment.RemoveTag(KEPT_MODEL_TAG)
        for key in (PROMPTS_TAG, DIGEST_TAG, CUT_TAG, CLICK_MODEL_TAG):
            segment.RemoveTag(key)
        entry, said = segment.GetTerminologyEntryTagName(), item.label.terminology_entry()
        # What a person says it is stays.
        if said and segment_tag(segment, entry) in (segment_tag(s, t) for s, t in ((slicer.vtkSegment(), entry), (segment, _SAID_TAG))):
            segment.SetTag(entry, said)
            segment.SetTag(_SAID_TAG, said)
        _begun(segment)
        segment.SetLabelValue(item.value)
        segment.AddRepresentation(_LABELMAP, item.labelmap)
        for name in set(_representations(segment)) - {_LABELMAP, *item.derived}:
            segment.RemoveRepresentation(name)
        for name, data in item.derived.items():
            segment.AddRepresentation(name, data)
        if item.earlier is None:
            segmentation.AddSegment(segment)
        if segments is not None:
            segments[item.label.value] = segment
        yield


class _Layer:
    """A labelmap to be: `array`, its voxels (z, y, x) in a box of a grid, not yet set, and which value is which label."""

    def __init__(self, box: Box, labels: dict[int, Label], grid: np.ndarray) -> None:
        self.start, self.labels = box.start, labels
        self.labelmap = _oriented(box.shape, box.start, grid)
        self.array = _allocated(self.labelmap, np.uint8 if max(labels) < 256 else np.uint16)
        self.labelmap.GetPointData().GetScalars().SetComponentName(0, _WRITTEN)


def _layer_steps(
    prediction: Prediction, segmentation: Any, earlier: dict[int, str], limits: _Limits | None, grid: np.ndarray
) -> Steps[list[_Layer]]:
    """The labels that occur, in one layer with the values 1, 2, ...: a layer for each of a hundred would make saving slow."""
    values, defs = prediction.labels.array, prediction.label_defs
    counts, box = yield from _survey_steps(values)
    found = [label for label in defs if label.value < len(counts) and counts[label.value]]
    kept = [label for label in defs if label.value in earlier] if limits is not None and limits.masked else []
    boxes = [box] if box is not None and found else []
    for label in kept:
        extent = _extent_box(_segment(segmentation, earlier[label.value]).GetRepresentation(_LABELMAP), grid)
        boxes.append(Box.whole(values.shape) if extent is None else extent & Box.whole(values.shape))
    boxes = [box for box in boxes if not box.empty]
    if not boxes:
        return []
    box = reduce(or_, boxes)
    layer = _Layer(box, dict(enumerate(found + [label for label in kept if label not in found], 1)), grid)
    table = np.zeros(len(counts), layer.array.dtype)
    table[[label.value for label in found]] = range(1, len(found) + 1)
    crop = values[box.slices]
    for z in slabs(box.shape):
        np.take(table, crop[z], out=layer.array[z])
        yield
    if limits is None or not limits.any:
        return [layer]
    numbers = {earlier[label.value]: n for n, label in layer.labels.items() if label in kept}
    return (yield from _limited_steps(layer, limits, segmentation, numbers, box, grid))


def _limited_steps(
    layer: _Layer, limits: _Limits, segmentation: Any, kept: dict[str, int], box: Box, grid: np.ndarray
) -> Steps[list[_Layer]]:
    """Keep a layer to the editor's limits, and add what former segments hold outside its area. kept: their IDs and new
    values; those that overlap others there come into a layer of their own."""
    barred = yield from limits.steps(box)
    before = left = 0
    for z in slabs(box.shape):
        before += int(np.count_nonzero(layer.array[z]))
        layer.array[z][barred[z] > 0] = 0
        left += int(np.count_nonzero(layer.array[z]))
        yield
    if before and not left:
        raise limits.nothing_left("move the ROI")
    layers = [layer]
    for owners in _layers(segmentation, kept).values():
        mine = {i: kept[i] for i in owners}
        held = yield from _mapped_steps(segmentation, mine, box, grid, layer.array.dtype)
        clash = False
        for z in slabs(box.shape):
            held[z][barred[z] != _OUTSIDE] = 0
            clash |= bool(layer.array[z][held[z] > 0].any())
            yield
        own = _Layer(box, layer.labels, grid) if clash else None
        for z in slabs(box.shape):
            if own is None:
                layer.array[z] += held[z]
            else:
                moved = translated(layer.array[z], {n: n for n in mine.values()}, held.dtype)
                own.array[z] = held[z] + moved
                layer.array[z] -= moved
            yield
        if own is not None:
            layers.append(own)
    for one in layers:
        counts, _ = yield from _survey_steps(one.array)
        one.labels = {n: label for n, label in one.labels.items() if n < len(counts) and counts[n]}
    return [one for one in layers if one.labels]


_OUTSIDE, _TAKEN = 1, 2


class _Limits:
    """Where a Segment Editor node lets segments be written. The mask's segments are those of the segmentation that the
    editor shows (the one that is written into where it shows none); those that are to be replaced are no mask for themselves.
    What is to lie inside segments may overlap them."""

    def __init__(self, editor: Any, volume_node: Any, node: Any, segmentation: Any, own: set[str], grid: np.ndarray) -> None:
        modes, mode = slicer.vtkMRMLSegmentationNode, editor.GetMaskMode()
        self.inside = mode in (modes.EditAllowedInsideAllSegments, modes.EditAllowedInsideVisibleSegments)
        self.area: tuple[Any, list[str], np.ndarray] | None = None
        if mode != modes.EditAllowedEverywhere:
            mask_node = editor.GetSegmentationNode() or node
            masks = None if mask_node is None else segmentation if mask_node is node else mask_node.GetSegmentation()
            ids = [] if masks is None else _ids(masks)
            if mode in (modes.EditAllowedInsideVisibleSegments, modes.EditAllowedOutsideVisibleSegments):
                ids = _visible(mask_node, ids)
            if mode == modes.EditAllowedInsideSingleSegment:
                self.inside = True
                ids = [i for i in ids if i == editor.GetMaskSegmentID()]
                if not ids:
                    raise UserError("The Segment Editor's editable area is a segment that is not there; choose another area.")
            elif not self.inside and mask_node is node:
                ids = [i for i in ids if i not in own]
            if ids or self.inside:
                self.area = (masks, ids, grid if mask_node is node else _grid_in(mask_node, volume_node))
        self.values, self.range = None, (0.0, 0.0)
        if editor.GetSourceVolumeIntensityMask():
            source = editor.GetSourceVolumeNode() or volume_node
            image = image_from_volume(source)
            if not image.same_grid(image_from_volume(volume_node)):
                raise UserError(
                    f"The Segment Editor's editable intensity range is of volume '{source.GetName()}', which does not lie on the "
                    f"grid of '{volume_node.GetName()}'; choose that as its source volume, or switch the range off."
                )
            self.values, self.range = image.channels[0], editor.GetSourceVolumeIntensityMaskRange()
        overwrite = editor.GetOverwriteMode()
        around = self.area[1] if self.area is not None and self.inside and self.area[0] is segmentation else ()
        others = [] if segmentation is None else [i for i in _ids(segmentation) if i not in own and i not in around]
        if overwrite == editor.OverwriteVisibleSegments:
            others = _visible(node, others)
        elif overwrite == editor.OverwriteNone:
            others = []
        self.taken = (segmentation, others, grid) if others else None

    @property
    def masked(self) -> bool:
        return self.area is not None or self.values is not None

    @property
    def any(self) -> bool:
        return self.masked or self.taken is not None

    def nothing_left(self, otherwise: str) -> UserError:
        """For a result that they leave nothing of. otherwise: what helps, too."""
        ways = {
            "set its editable area to everywhere": self.area,
            "switch its editable intensity range off": self.values,
            "set its overwrite mode to allow overlap": self.taken,
        }
        advice = " and ".join(way for way, limit in ways.items() if limit is not None)
        return UserError(f"Nothing of the result is left by the Segment Editor's masking; {advice}, or {otherwise}.")

    def steps(self, box: Box) -> Steps[np.ndarray]:
        """uint8 (z, y, x) of the box: _OUTSIDE where nothing may be edited, _TAKEN where others' voxels are, else 0."""
        out = np.zeros(box.shape, np.uint8)
        if self.taken is not None:
            held = yield from _held_steps(self.taken[0], self.taken[1], box, self.taken[2])
            for z in slabs(box.shape):
                out[z][held[z]] = _TAKEN
                yield
        if self.area is not None:
            held = yield from _held_steps(self.area[0], self.area[1], box, self.area[2])
            for z in slabs(box.shape):
                out[z][held[z] != self.inside] = _OUTSIDE
                yield
        if self.values is not None:
            part, (low, high) = self.values[box.slices], self.range
            for z in slabs(box.shape):
                out[z][(part[z] < low) | (part[z] > high)] = _OUTSIDE
                yield
        return out


def _survey_steps(values: np.ndarray) -> Steps[tuple[np.ndarray, Box | None]]:
    """Voxels of each value of a labelmap (z, y, x), but for 0 in empty planes, and the box of what is not 0. One pass."""
    counts = np.zeros(1, np.int64)
    rows = np.zeros(values.shape[1:], values.dtype)
    planes = np.zeros(values.shape[0], bool)
    for slab in slabs(values.shape):
        for z, plane in enumerate(values[slab], slab.start):
            if not plane.any():
                continue
            planes[z] = True
            rows |= plane
            found = np.bincount(plane.ravel(), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        yield
    inside = Box.around(rows)
    if inside is None:
        return counts, None
    hit = np.flatnonzero(planes)
    return counts, Box((int(hit[0]), *inside.start), (int(hit[-1]) + 1, *inside.stop))


def _label_box_steps(layer: np.ndarray) -> Steps[dict[int, Box]]:
    """The bounding box of each value in (z, y, x)."""
    top = 0
    for slab in slabs(layer.shape):
        top = max(top, int(layer[slab].max()))
        yield
    hits = [np.zeros((top + 1, n), bool) for n in layer.shape]
    for slab in slabs(layer.shape, 1 << 18):
        where = layer[slab].nonzero()
        values = layer[slab][where]
        for axis, (hit, index) in enumerate(zip(hits, where)):
            hit[values, index + (slab.start if axis == 0 else 0)] = True
        yield
    out = {}
    for value in np.flatnonzero(hits[0].any(1)):
        ends = [np.flatnonzero(hit[value])[[0, -1]] for hit in hits]
        out[int(value)] = Box(tuple(int(e[0]) for e in ends), tuple(int(e[1]) + 1 for e in ends))
    return out


def _held_steps(segmentation: Any, ids: Sequence[str], box: Box, grid: np.ndarray) -> Steps[np.ndarray]:
    """bool (z, y, x) of a box of a grid: the voxels that any of the segments holds. grid: 4x4, index (x, y, z) to the
    segmentation's coordinates. A segment on another lattice is resampled (nearest neighbour)."""
    out = yield from _mapped_steps(segmentation, dict.fromkeys(ids, 1), box, grid, np.uint8)
    return out.view(bool)


def _mapped_steps(segmentation: Any, numbers: dict[str, int], box: Box, grid: np.ndarray, dtype: Any) -> Steps[np.ndarray]:
    """The numbers (1 ...) of segments on a box of a grid, where two overlap either; see _held_steps()."""
    out = np.zeros(box.shape, dtype)
    if not numbers:
        return out
    segmentation = _with_labelmaps(segmentation, numbers, box, grid)
    for labelmap, owners in _layers(segmentation, numbers).items():
        if labelmap.IsEmpty():
            continue
        pairs = {_segment(segmentation, i).GetLabelValue(): numbers[i] for i in owners}
        unchanged, extent = _unchanged(labelmap), _extent_box(labelmap, grid)
        if extent is None:
            for z in slabs(box.shape):
                unchanged()
                part = slicer.vtkOrientedImageData()
                reference = _oriented(out[z].shape, (box.start[0] + z.start, *box.start[1:]), grid)
                slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage(labelmap, reference, part)
                np.maximum(out[z], translated(_voxels(part).reshape(out[z].shape), pairs, dtype), out=out[z])
                yield
            continue
        common = extent & box
        if common.empty:
            continue
        to, of = out[common.relative_to(box).slices], common.relative_to(extent).slices
        for z in slabs(common.shape):
            unchanged()
            part = _voxels(labelmap)[of][z]
            # Of one of 30 nodules in the one layer that a file of theirs has, nearly everywhere nothing is.
            if len(pairs) > 1 or (part == next(iter(pairs))).any():
                np.maximum(to[z], translated(part, pairs, dtype), out=to[z])
            yield
    return out


def _with_labelmaps(segmentation: Any, ids: Iterable[str], box: Box, grid: np.ndarray) -> Any:
    """The segmentation itself, or a copy of some of its segments as labelmaps on a box of a grid where it has none."""
    if segmentation.ContainsRepresentation(_LABELMAP) or segmentation.GetSourceRepresentationName() == _LABELMAP:
        return segmentation
    converter = slicer.vtkSegmentationConverter
    copy = slicer.vtkSegmentation()
    copy.SetSourceRepresentationName(segmentation.GetSourceRepresentationName())
    for segment_id in ids:
        copy.CopySegmentFromSegmentation(segmentation, segment_id)
    copy.SetConversionParameter(_GEOMETRY, converter.SerializeImageGeometry(_oriented(box.shape, box.start, grid)))
    if not copy.CreateRepresentation(_LABELMAP):
        raise UserError("These segments cannot be turned into voxels; create their binary labelmaps in the Segmentations module.")
    return copy


def _only_steps(labelmap: Any, values: set[int]) -> Steps[Any]:
    """A copy of a labelmap with only these values."""
    out = slicer.vtkOrientedImageData()
    out.SetExtent(labelmap.GetExtent())
    matrix = vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(matrix)
    out.SetGeometryFromImageToWorldMatrix(matrix)
    if labelmap.IsEmpty():
        return out
    unchanged, dtype = _unchanged(labelmap), _voxels(labelmap).dtype
    array = _allocated(out, dtype)
    for z in slabs(array.shape):
        unchanged()
        array[z] = translated(_voxels(labelmap)[z], {v: v for v in values}, dtype)
        yield
    return out


def _derive(segmentation: Any, mask: np.ndarray, start: Sequence[int], grid: np.ndarray, names: Iterable[str]) -> dict[str, Any]:
    """What Slicer makes of a segment's voxels (its closed surface, ...). mask: their box, as the whole layer takes ten times
    as long."""
    one = slicer.vtkSegmentation()
    one.SetSourceRepresentationName(_LABELMAP)
    one.CopyConversionParameters(segmentation)
    segment = slicer.vtkSegment()
    segment.AddRepresentation(_LABELMAP, oriented_labelmap(mask.astype(np.uint8), start, grid))
    one.AddSegment(segment, "one")
    return {name: segment.GetRepresentation(name) for name in names if one.CreateRepresentation(name)}


def _derive_anew(segmentation: Any, segment: Any, names: Iterable[str]) -> None:
    """Give a segment these representations of the voxels that it has now."""
    labelmap = segment.GetRepresentation(_LABELMAP)
    if not names or labelmap is None or labelmap.IsEmpty():
        return
    mask, matrix = _voxels(labelmap) == segment.GetLabelValue(), vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(matrix)
    box = Box.around(mask)
    if box is not None:
        start = box.shifted(labelmap.GetExtent()[::2][::-1]).start
        for name, data in _derive(segmentation, mask[box.slices], start, arrayFromVTKMatrix(matrix), names).items():
            segment.AddRepresentation(name, data)


# ---------------------------------------------------------------------------------------------------------------- undo

_VISIBILITIES = ("Visibility", "Visibility3D", "Visibility2DFill", "Visibility2DOutline")
_DISPLAY = (*_VISIBILITIES, "Opacity3D", "Opacity2DFill", "Opacity2DOutline", "Pickable")


@dataclass
class _After:
    labelmap: Any
    time: int
    written: bool
    given: dict[tuple[str, ...], Any]


class _State:
    """The segments of a node before an action. restore() puts those back that the action changed; others keep what they are.

    created: the action made the node, so there were none.
    """

    def __init__(self, node: Any, created: bool = False) -> None:
        self.node, self.created, self.holder = node, created, _holder(node)
        self.former = {} if created else {i: _segment_copy(self.segmentation.GetSegment(i)) for i in _ids(self.segmentation)}
        displays = [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]
        self.display = {i: [(d, _display_of(d, i)) for d in displays if d is not None] for i in self.former}
        self.had_display = node.GetDisplayNode() is not None
        self.transform = node.GetTransformNodeID()
        self.source = self.segmentation.GetSourceRepresentationName()
        self.reference = node.GetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole())
        self.geometry = self.segmentation.GetConversionParameter(_GEOMETRY)
        self.mark()

    @property
    def segmentation(self) -> Any:
        return self.holder.GetSegmentation()

    def mark(self) -> None:
        """Now is after the action."""
        self.lattice = self._lattice()
        self.after = {}
        for segment_id in _ids(self.segmentation):
            segment = self.segmentation.GetSegment(segment_id)
            labelmap = segment.GetRepresentation(_LABELMAP)
            scalars = labelmap.GetPointData().GetScalars() if labelmap is not None else None
            written = scalars is not None and scalars.GetComponentName(0) == _WRITTEN
            self.after[segment_id] = _After(labelmap, labelmap.GetMTime() if labelmap is not None else 0, written, _given(segment))

    def restore(self) -> None:
        segmentation = self.segmentation
        now = set(_ids(segmentation))
        drop = {i for i, a in self.after.items() if i in now and i not in self.former and a.written}
        again = {i for i in self.former if self._is_to_restore(i, now)}
        self._follow(again)
        self._move_out(drop | again & now)
        for segment_id in drop:
            segmentation.RemoveSegment(segment_id)
        layers = self._former_layers(again)
        staying = set(_ids(segmentation)) - again
        # All segments of a segmentation have the same representations, and a surface may have come or gone meanwhile.
        names = _representations(segmentation) if staying else None
        for segment_id in again:
            self._put_back(segment_id, layers[segment_id], names)
        there = _ids(segmentation)
        order = [i for i in self.former if i in there] + [i for i in there if i not in self.former]
        if order != there:
            segmentation.ReorderSegments(order)
        if not self.created and not self.former and not there:
            self._put_settings_back()

    def _is_to_restore(self, segment_id: str, now: set[str]) -> bool:
        if segment_id not in self.after:
            return segment_id not in now
        after = self.after[segment_id]
        if segment_id not in now or after.labelmap is self.former[segment_id].GetRepresentation(_LABELMAP):
            return False
        # One that only moved to another layer keeps what a person has since drawn in it.
        same = self.segmentation.GetSegment(segment_id).GetRepresentation(_LABELMAP) is after.labelmap
        return after.written or (same and after.labelmap.GetMTime() == after.time)

    def _lattice(self) -> tuple[str, list[str]]:
        """Reference volume's ID; 4x4 and extent of the reference geometry, "" where it has none."""
        role = self.node.GetReferenceImageGeometryReferenceRole()
        return self.node.GetNodeReferenceID(role) or "", self.segmentation.GetConversionParameter(_GEOMETRY).split(";")

    def _follow(self, ids: set[str]) -> None:
        """Move former segments by what was hardened since. Slicer has moved those that were there, and the reference geometry, which
        tells by what: as long as it is the same volume's and of the same extent, nothing else changes it."""
        (volume, then), (same, now) = self.lattice, self._lattice()
        if not ids or volume != same or then[:16] == now[:16] or then[16:] != now[16:]:
            return
        here, there = (np.reshape(np.array(words[:16], float), (4, 4)) for words in (now, then))
        transform, former = vtk.vtkTransform(), slicer.vtkSegmentation()
        transform.SetMatrix(vtkMatrixFromArray(here @ np.linalg.inv(there)))
        former.SetSourceRepresentationName(_LABELMAP)
        for segment_id in ids:
            former.AddSegment(self.former[segment_id], segment_id)
        former.ApplyLinearTransform(transform)
        former.CopyConversionParameters(self.segmentation)
        for name in _representations(former):
            if name != _LABELMAP:
                former.CreateRepresentation(name, True)

    def _move_out(self, ids: set[str]) -> None:
        """Out of the layers that they share with others, whom a person added since and who stay."""
        for owners in _layers(self.segmentation).values():
            if owners - ids:
                for segment_id in sorted(owners & ids):
                    self.segmentation.SeparateSegmentLabelmap(segment_id)

    def _former_layers(self, again: set[str]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        layers: dict[Any, set[str]] = {}
        for segment_id, segment in self.former.items():
            layers.setdefault(segment.GetRepresentation(_LABELMAP), set()).add(segment_id)
        for labelmap, owners in layers.items():
            back = owners & again
            there = [self.segmentation.GetSegment(i) for i in owners - again]
            # Voxels of those who do not come back into it must not be left in the layer without an owner.
            if back and not all(s is not None and s.GetRepresentation(_LABELMAP) is labelmap for s in there):
                labelmap = complete(_only_steps(labelmap, {self.former[i].GetLabelValue() for i in back}))
            out.update(dict.fromkeys(back, labelmap))
        return out

    def _put_back(self, segment_id: str, labelmap: Any, names: list[str] | None) -> None:
        former = self.former[segment_id]
        segment = self.segmentation.GetSegment(segment_id)
        if segment_id in self.after and not self.after[segment_id].written:
            segment.AddRepresentation(_LABELMAP, labelmap)
            return
        lost = segment is None
        if lost:
            segment = slicer.vtkSegment()
        marked = {} if lost or segment_id not in self.after else self.after[segment_id].given
        since = {k: v for k, v in _given(segment).items() if v != marked.get(k, v)}
        _copy_metadata(former, segment)
        for (method, *key), value in since.items():
            getattr(segment, method)(*key, value)
        representations = {n: former.GetRepresentation(n) for n in _representations(former)}
        representations[_LABELMAP] = labelmap
        for name in _representations(segment):
            if name not in representations:
                segment.RemoveRepresentation(name)
        for name, data in representations.items():
            if names is None or name in names:
                segment.AddRepresentation(name, data)
            else:
                segment.RemoveRepresentation(name)
        _derive_anew(self.segmentation, segment, set(names or ()) - set(representations))
        if lost:
            self.segmentation.AddSegment(segment, segment_id)
            for display, values in self.display[segment_id]:
                _set_display(display, segment_id, values)

    def _put_settings_back(self) -> None:
        node = self.node
        self.segmentation.SetSourceRepresentationName(self.source)
        self.segmentation.SetConversionParameter(_GEOMETRY, self.geometry)
        node.SetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole(), self.reference)
        node.SetAndObserveTransformNodeID(self.transform)
        if not self.had_display and node.GetScene() is not None:
            for display in [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]:
                node.GetScene().RemoveNode(display)


def _holder(node: Any) -> Any:
    """Of a sequence's segmentation the frame's data node that has the same segments: it keeps them when another frame is shown, and
    those that a later run puts in their place."""
    found = sequence_frames(node)
    sequence = found[0].GetSequenceNode(node) if found else None
    frames = map(sequence.GetNthDataNode, range(sequence.GetNumberOfDataNodes())) if sequence else ()
    return next((data for data in frames if data.GetSegmentation() is node.GetSegmentation()), node)


@dataclass
class _Action:
    states: list[_State]
    rewritten: list[tuple[Any, Any, tuple[str | None, str | None]]]  # node, its copy, the IDs of its transform and its volume
    colors: list[Any]
    created: list[Any] = field(default_factory=list)
    revert: Callable[[], None] | None = None
    told: Callable[[], None] | None = None


class Undo:
    """Takes back what this module wrote, one step for each action of a person.

    >>> undo.begin(segmentation_node, [find_map(volume_node, "uncertainty")])  # when the result is there to be written
    >>> node = write_prediction(prediction, volume_node, segmentation_node)
    >>> undo.commit([node])  # nodes that were there before may be among them
    >>> undo.undo()

    Former segments come back exactly: IDs, order, names, colours, tags, voxels, surfaces, display. What a person did
    meanwhile to segments that the action had not written stays, and so do a name, a colour, a terminology and a status that he gave
    any. A step is forgotten when its nodes have left the scene, and beyond so many steps or bytes of maps; the last one never: each
    run of a 512x512x300 CT keeps another 300 MB of uncertainty.
    """

    def __init__(self, scene: Any, limit: int = 5, limit_bytes: int = 512 << 20) -> None:
        self.scene, self._limit, self._limit_bytes = scene, limit, limit_bytes
        self._actions: list[_Action] = []
        self._open: _Action | None = None

    def begin(self, segmentation_node: Any = None, rewritten: Iterable[Any] = ()) -> None:
        """Before an action. rewritten: maps and tables that it may write anew; None among them is skipped."""
        copies = []
        for node in rewritten:
            if node is not None:
                copy = type(node)()
                copy.CopyContent(node, False)
                transform = node.GetTransformNodeID() if node.IsA("vtkMRMLTransformableNode") else None
                copies.append((node, copy, (transform, node.GetNodeReferenceID(VOLUME_ROLE))))
        self._open = _Action([] if segmentation_node is None else [_State(segmentation_node)], copies, _colors(self.scene))

    def commit(
        self, created_nodes: Iterable[Any] = (), revert: Callable[[], None] | None = None, told: Callable[[], None] | None = None
    ) -> None:
        """After the action: the nodes that it made, what takes its segments back instead of this (SequenceOutput.revert), and who is
        told when they are."""
        action, self._open = self._open, None
        if action is None:
            raise RuntimeError("commit() without begin()")
        for state in action.states:
            state.mark()
        known = [s.node for s in action.states] + [node for node, _, _ in action.rewritten]
        for node in created_nodes:
            if node is None or any(node is k for k in known):
                continue
            if node.IsA("vtkMRMLSegmentationNode"):
                action.states.append(_State(node, created=True))
            else:
                action.created.append(node)
        action.revert, action.told = revert, told
        self._actions = [*self._actions, action][-self._limit :]
        while len(self._actions) > 1 and self._held() > self._limit_bytes:
            del self._actions[0]

    def undo(self) -> None:
        """Take the last action back."""
        if not self.can_undo:
            return
        action = self._actions.pop()
        if action.told is not None:
            action.told()
        if action.revert is not None:
            action.revert()
        for state in action.states:
            if self._has(state.node):
                if action.revert is None:  # which took the frame that was shown back too
                    former = state.former.values()
                    _save_for_editor(state.node, [s.GetRepresentation(name) for s in former for name in _representations(s)])
                    state.restore()
                # In a sequence it shows other frames too, and what a person drew there.
                if state.created and not state.segmentation.GetNumberOfSegments() and sequence_frames(state.node) is None:
                    remove_nodes([state.node])
        for node, copy, (transform, volume) in action.rewritten:
            if self._has(node):
                node.CopyContent(copy, False)
                node.SetNodeReferenceID(VOLUME_ROLE, volume)
                if node.IsA("vtkMRMLTransformableNode"):
                    node.SetAndObserveTransformNodeID(transform)
        for node in action.created:
            if self._has(node):
                _remove_node(node)
        _remove_new_colors(self.scene, action.colors)

    @property
    def can_undo(self) -> bool:
        self._actions = [a for a in self._actions if self._is_alive(a)]
        return bool(self._actions)

    def _held(self) -> int:
        """Bytes of the voxels of maps that only the steps still have."""
        maps = [(node, copy) for a in self._actions for node, copy, _ in a.rewritten if copy.IsA("vtkMRMLVolumeNode")]
        held = {id(data): data for _, copy in maps if (data := copy.GetImageData()) is not None}
        for node, _ in maps:
            held.pop(id(node.GetImageData()), None)
        return sum(data.GetActualMemorySize() << 10 for data in held.values())

    def _has(self, node: Any) -> bool:
        return node.GetScene() is self.scene and self.scene.GetNodeByID(node.GetID()) is node

    def _is_alive(self, action: _Action) -> bool:
        nodes = [s.node for s in action.states] + [node for node, _, _ in action.rewritten] + action.created
        return any(map(self._has, nodes))


# ----------------------------------------------------------------------------------------------------------- sequences


def sequence_frames(volume_node: Any) -> tuple[Any, int] | None:
    """The browser node that steps this volume through a sequence, and how many frames it has; None for a single volume."""
    for browser in _nodes(volume_node.GetScene(), "vtkMRMLSequenceBrowserNode"):
        if browser.GetSequenceNode(volume_node) is not None:
            return browser, browser.GetNumberOfItems()
    return None


class SequenceOutput:
    """The segmentations of a sequence's frames. They are kept here until finish() puts them into the scene, all at once.

    >>> output = SequenceOutput(volume_node)
    >>> for frame in range(output.frames):
    ...     output.show(frame)
    ...     prediction = predict(image_from_volume(volume_node), models)
    ...     complete(output.write_steps(frame, prediction))
    >>> undo.begin(segmentation_node)
    >>> node = output.finish()
    >>> undo.commit([node], output.revert)

    The node shows the segments of the frame that the browser has selected; what a person corrects there is kept with the
    frame. segmentation_node: None for a new sequence of segmentations, or the node that such a one in the same browser
    shows; replace, editor (and segments): as for write_prediction_steps(), on each frame's own segments. Frames that were not
    written keep what they had.
    Raises UserError for a volume that is in no sequence, or a segmentation that does not belong to its browser.
    """

    def __init__(self, volume_node: Any, segmentation_node: Any = None, replace: bool = True, editor: Any = None) -> None:
        found = sequence_frames(volume_node)
        if found is None:
            raise UserError(f"Volume '{volume_node.GetName()}' is not part of a sequence; apply to it alone.")
        self.browser, self.frames = found
        self._check = _still_there(volume_node, self.browser, self.browser.GetMasterSequenceNode(), segmentation_node)
        self.volume, self.node, self.replace, self.editor = volume_node, segmentation_node, replace, editor
        self._sequence: Any = None if segmentation_node is None else self.browser.GetSequenceNode(segmentation_node)
        if segmentation_node is not None and self._sequence is None:
            raise UserError(f"Segmentation '{segmentation_node.GetName()}' does not follow the volume's frames; choose a new one.")
        check_accepts(segmentation_node)
        self._selected = self.browser.GetSelectedItemNumber()
        self._results: dict[int, Any] = {}  # until they are in the scene
        weakref.finalize(self, _let_go, self._results).atexit = False
        self._states: list[_State] = []
        self._created: list[Any] = []

    def show(self, frame: int | None = None) -> None:
        """Make the volume node hold a frame (None: the one that was shown at first)."""
        self.browser.SetPlaybackActive(False)
        self.browser.SetSelectedItemNumber(self._selected if frame is None else frame)

    def write_steps(self, frame: int, prediction: Prediction, segments: dict[int, Any] | None = None) -> Steps[None]:
        """Make a frame's segments, in pieces. The scene does not change."""
        self._check()
        _check_grid(prediction.labels, self.volume)
        self._results[frame] = segmentation = self._copy_of(frame)
        try:
            fresh = not segmentation.GetNumberOfSegments()
            plan = yield from _plan_steps(prediction, self.volume, self.node, segmentation, self.replace, self.editor)
            if fresh:
                shape = prediction.labels.shape
                geometry = _oriented(shape, (0, 0, 0), _ijk_to_ras(self.volume))
                segmentation.SetConversionParameter(_GEOMETRY, slicer.vtkSegmentationConverter.SerializeImageGeometry(geometry))
            yield from _carry_out(plan, segmentation, prediction, segments)
        except BaseException:
            _let_go({frame: self._results.pop(frame)})
            raise

    def measure_steps(self, frame: int, segments: dict[int, Any]) -> Steps[list[dict[str, Any]]]:
        """measure_steps() of what write_steps() made in the frame that is shown."""
        made = self._results[frame]
        return measure_steps(self.node, self.volume, [made.GetSegmentIdBySegment(s) for s in segments.values()], made)

    def finish(self) -> Any:
        """Put the frames' segments into the scene, and show the frame that was shown at first; the segmentation node."""
        self._check()
        scene, former = self.volume.GetScene(), {}
        try:
            new = self._sequence is None
            if new:
                self._add_nodes(scene)
            master = self.browser.GetMasterSequenceNode()
            for frame in range(self.frames) if new else sorted(self._results):
                value = master.GetNthIndexValue(frame)
                data = self._sequence.GetDataNodeAtValue(value)
                if data is None:
                    data = self._sequence.SetDataNodeAtValue(slicer.vtkMRMLSegmentationNode(), value)
                self._states.append(state := _State(data))
                was = state.segmentation
                data.SetAndObserveSegmentation(self._results.pop(frame, None) or slicer.vtkSegmentation())
                former[frame] = was
                state.mark()
            if new:
                modified = self.browser.StartModify()
                self.browser.AddSynchronizedSequenceNode(self._sequence)
                # So that corrections are kept, and frames change without a copy of their voxels.
                self.browser.SetSaveChanges(self._sequence, True)
                self.browser.AddProxyNode(self.node, self._sequence, False)
                self.browser.EndModify(modified)
            self.show()
            self.browser.Modified()
        except BaseException:
            self.revert()
            raise
        finally:
            _let_go(former)
        return self.node

    def revert(self) -> None:
        """Take finish() back. As with Undo, what a person did meanwhile to segments that were not written stays in its frame."""
        for state in self._states:
            state.restore()
        if self._created and not any(state.segmentation.GetNumberOfSegments() for state in self._states):
            for node in self._created:
                _remove_node(node)
            self.node = self._sequence = None
        elif self.browser.GetScene() is not None:
            self.browser.Modified()
        self._states, self._created = [], []

    def _add_nodes(self, scene: Any) -> None:
        master = self.browser.GetMasterSequenceNode()
        name = scene.GenerateUniqueName(f"{master.GetName()} segmentation")
        self._sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", name)
        self._created.append(self._sequence)
        self._sequence.SetIndexName(master.GetIndexName())
        self._sequence.SetIndexUnit(master.GetIndexUnit())
        self._sequence.SetIndexType(master.GetIndexType())
        self.node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        self._created.append(self.node)
        self.node.SetAndObserveTransformNodeID(self.volume.GetTransformNodeID())
        self.node.SetReferenceImageGeometryParameterFromVolumeNode(self.volume)
        self.node.CreateDefaultDisplayNodes()
        _place_beside(self.node, self.volume)

    def _copy_of(self, frame: int) -> Any:
        """A frame's former segments, with the same labelmaps, in a vtkSegmentation of their own."""
        out = slicer.vtkSegmentation()
        out.SetSourceRepresentationName(_LABELMAP)
        value = self.browser.GetMasterSequenceNode().GetNthIndexValue(frame)
        data = None if self._sequence is None else self._sequence.GetDataNodeAtValue(value)
        former = data.GetSegmentation() if data is not None else None
        if former is not None:
            out.CopyConversionParameters(former)
            for segment_id in _ids(former):
                out.AddSegment(_segment_copy(former.GetSegment(segment_id)), segment_id)
        return out


def _let_go(segmentations: dict[int, Any]) -> None:
    """Of vtkSegmentations whose segments share labelmaps with others in the scene: the end of one removes its segments, and Slicer
    erases a segment that is removed from a labelmap that it shares with another."""
    for segmentation in segmentations.values():
        for segment_id in _ids(segmentation):
            segmentation.GetSegment(segment_id).AddRepresentation(_LABELMAP, slicer.vtkOrientedImageData())


# -------------------------------------------------------------------------------------------------------------- tables


def find_table(segmentation_node: Any, role: str = SEGMENTATION_ROLE) -> Any:
    """The table that write_measures() (or, with NODULES_ROLE, write_rows()) made for this segmentation, or None."""
    for node in _nodes(segmentation_node.GetScene(), "vtkMRMLTableNode"):
        if _refers(node, role, segmentation_node):
            return node
    return None


def _show_table(table: Any, segmentation_node: Any, role: str, name: str) -> Any:
    """Let the segmentation's own table node, which is made on first use, show a vtkTable."""
    node = find_table(segmentation_node, role)
    if node is None:
        scene = segmentation_node.GetScene()
        node = scene.AddNewNodeByClass("vtkMRMLTableNode", scene.GenerateUniqueName(f"{segmentation_node.GetName()} {name}"))
        _place_beside(node, segmentation_node)
    node.SetNodeReferenceID(role, segmentation_node.GetID())
    node.SetNodeReferenceID(_SELF_ROLE, node.GetID())
    _title_columns(node)
    node.SetAndObserveTable(table)
    return node


def write_measures(measures: Iterable[dict[str, Any]], segmentation_node: Any, volume_node: Any = None) -> Any:
    """A segmentation's table node, made on first use and placed beside it, with a row for each label that measure() found and
    the units in the columns' titles; return it. volume_node: that was measured in, which the table refers to; default: the one on whose
    grid the segmentation lies.

    Mean, SD and the like are in HU where the volume says so, else in its own units. Rounded to 0.001 ml and 0.1 mm or HU.
    """
    volume = volume_node or _reference_volume(segmentation_node)
    unit = _intensity_unit(volume)
    image = None if volume is None or volume.GetImageData() is None else as_read(image_from_volume(volume), volume)
    length = "mm" if image is None else length_unit(image)
    size = ("Volume [ml]", "volume_ml", 3)
    if image is not None and length == "px":
        size = ("Area [px]" if image.shape[0] == 1 else "Volume [voxels]", "volume_mm3", 0)
    columns = (
        ("Segment", vtk.vtkStringArray, "name", None),
        (size[0], vtk.vtkDoubleArray, *size[1:]),
        (f"Longest diameter [{length}]", vtk.vtkDoubleArray, "longest_mm", 1),
        (f"Perpendicular diameter [{length}]", vtk.vtkDoubleArray, "perpendicular_mm", 1),
        (f"Mean{unit}", vtk.vtkDoubleArray, "mean_hu", 1),
        (f"SD{unit}", vtk.vtkDoubleArray, "std_hu", 1),
        (f"Minimum{unit}", vtk.vtkDoubleArray, "min_hu", 1),
        (f"Maximum{unit}", vtk.vtkDoubleArray, "max_hu", 1),
        ("Voxels", vtk.vtkLongLongArray, "voxels", None),
    )
    rows = [m for m in measures if m["voxels"]]
    table = vtk.vtkTable()
    for title, kind, key, digits in columns:
        column = kind()
        column.SetName(title)
        for row in rows:
            value = float("nan") if row[key] is None else row[key]
            column.InsertNextValue(value if digits is None else measure.rounded(value, digits))
        table.AddColumn(column)
    node = _show_table(table, segmentation_node, SEGMENTATION_ROLE, "measures")
    node.SetNodeReferenceID(VOLUME_ROLE, volume.GetID() if volume is not None else None)
    node.SetAttribute(VOLUME_ROLE, volume.GetName() if volume is not None else None)
    names, held = {row["name"] for row in rows}, segmentation_node.GetSegmentation()
    node.SetAttribute(_MEASURED_ATTRIBUTE, json.dumps([i for i in _ids(held) if held.GetSegment(i).GetName() in names]))
    return node


def remeasure_steps(segmentation_node: Any) -> Steps[None]:
    """Write the table of a segmentation anew where a model's segments were changed since: a person corrects first and copies then.
    In pieces; UserError as measure_steps(), or where the volume is gone. Tables of several frames stay."""
    table = find_table(segmentation_node)
    if table is None or sequence_frames(segmentation_node) is not None:
        return
    segments = {i: segmentation_node.GetSegmentation().GetSegment(i) for i in _ids(segmentation_node.GetSegmentation())}
    rows = [(table.GetCellText(i, 0), int(table.GetCellText(i, 8))) for i in range(table.GetNumberOfRows())]
    named = {name for name, _ in rows}
    kept = table.GetAttribute(_MEASURED_ATTRIBUTE)
    if kept == "[]":  # of all frames of a sequence that is none any more, or nothing was found
        return
    if kept is None:  # an older scene's: one that was improved by clicks is no model's any more, and still a row
        own = [i for i, s in segments.items() if s.GetName() in named or (segment_tag(s, MODEL_TAG) and not segment_tag(s, PROMPTS_TAG))]
    else:
        own = [i for i in segments if json.dumps(i) in kept]
    # By their voxels: times of modification are those of an undo or of reading a scene too.
    if sorted(rows) == sorted((segments[i].GetName(), n) for i in own if (n := _count(segments[i]))):
        return
    known = table.GetAttribute(VOLUME_ROLE) is not None  # in older scenes it is the reference volume
    volume = table.GetNodeReference(VOLUME_ROLE) if known else _reference_volume(segmentation_node)
    if volume is None:
        raise UserError(
            "The measures are of the segments as they were, as their volume is not in the scene any more; "
            "measure those that were corrected since with Segment Statistics."
        )
    measures = yield from measure_steps(segmentation_node, volume, own)
    for m in measures:  # an organ, which measure_steps() leaves without diameters, keeps its own where it is as it was
        if m["longest_mm"] is None and (m["name"], m["voxels"]) in rows:
            row = rows.index((m["name"], m["voxels"]))
            m["longest_mm"], m["perpendicular_mm"] = (table.GetTable().GetValue(row, column).ToDouble() for column in (2, 3))
    if sorted(rows) != sorted((m["name"], m["voxels"]) for m in measures if m["voxels"]):
        write_measures(measures, segmentation_node, volume).SetAttribute(_MEASURED_ATTRIBUTE, kept or json.dumps(own))


def _count(segment: Any) -> int:
    """The voxels of a segment's labelmap; of a surface alone 0."""
    labelmap = segment.GetRepresentation(_LABELMAP)
    if labelmap is None or labelmap.GetPointData().GetScalars() is None:
        return 0
    return int(np.count_nonzero(_voxels(labelmap) == segment.GetLabelValue()))


def write_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], segmentation_node: Any) -> Any:
    """A table node of texts for a segmentation's nodules, made on first use and placed beside it; return it."""
    table = vtk.vtkTable()
    for i, title in enumerate(columns):
        column = vtk.vtkStringArray()
        column.SetName(title)
        for row in rows:
            column.InsertNextValue(row[i])
        table.AddColumn(column)
    return _show_table(table, segmentation_node, NODULES_ROLE, "table")


def _title_columns(table_node: Any) -> None:
    # The former name is all that 5.10 has; later ones warn that it is deprecated.
    titled = getattr(table_node, "SetUseColumnTitleAsColumnHeader", None) or table_node.SetUseColumnNameAsColumnHeader
    titled(True)


def _intensity_unit(volume: Any) -> str:
    units = volume.GetVoxelValueUnits() if volume is not None and volume.IsA("vtkMRMLScalarVolumeNode") else None
    # UCUM's code for Hounsfield units, which Slicer's DICOM reader sets on CT.
    return " [HU]" if units is not None and units.GetCodeValue() == "[hnsf'U]" else ""


# ------------------------------------------------------------------------------------------------------------- helpers


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _nodes(scene: Any, class_name: str) -> list[Any]:
    return list(slicer.util.getNodesByClass(class_name, scene)) if scene is not None else []


def _refers(node: Any, role: str, to: Any) -> bool:
    """Whether a map or table is this node's, and no copy."""
    return node.GetNodeReference(role) is to and node.GetNodeReference(_SELF_ROLE) is node


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


def _grid_in(node: Any, volume_node: Any) -> np.ndarray:
    """4x4 from the volume's array index (x, y, z) to the coordinates of a node, by both nodes' transforms."""
    return np.linalg.inv(_to_world(node)) @ _to_world(volume_node) @ _ijk_to_ras(volume_node)


def _allocated(image_data: Any, dtype: Any) -> np.ndarray:
    """The array (z, y, x) of an image data's new voxels, not yet set."""
    image_data.AllocateScalars(get_vtk_array_type(np.dtype(dtype)), 1)
    return _voxels(image_data)


def _voxels(image_data: Any) -> np.ndarray:
    """(z, y, x), a view."""
    return vtk_to_numpy(image_data.GetPointData().GetScalars()).reshape(image_data.GetDimensions()[::-1])


def _oriented(shape: Sequence[int], start: Sequence[int], ijk_to_ras: np.ndarray) -> Any:
    """A vtkOrientedImageData without voxels: size and first index (z, y, x) in a grid."""
    out = slicer.vtkOrientedImageData()
    out.SetExtent([int(v) for a, n in zip(start[::-1], shape[::-1], strict=True) for v in (a, a + n - 1)])
    out.SetGeometryFromImageToWorldMatrix(vtkMatrixFromArray(ijk_to_ras))
    return out


def _extent_box(labelmap: Any, grid: np.ndarray) -> Box | None:
    """The box (z, y, x) of a grid that a labelmap fills; None where its voxels are not the grid's."""
    if labelmap is None or labelmap.IsEmpty():
        return Box((0, 0, 0), (0, 0, 0))
    matrix = vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(matrix)
    extent = labelmap.GetExtent()
    corners = np.array([(*c, 1) for c in product(extent[:2], extent[2:4], extent[4:])], float)
    there = (np.linalg.inv(grid) @ arrayFromVTKMatrix(matrix) @ corners.T).T[:, :3]
    shift = np.round(there[0] - corners[0, :3])
    if np.abs(there - corners[:, :3] - shift).max() > 0.05:
        return None
    return Box(tuple(extent[::2][::-1]), tuple(v + 1 for v in extent[1::2][::-1])).shifted([int(v) for v in shift[::-1]])


def _check_grid(image: Image, volume_node: Any) -> None:
    volume = image_from_volume(volume_node)
    name = volume_node.GetName()
    if image.shape != volume.shape:
        have, want = (" x ".join(map(str, i.shape[::-1])) for i in (image, volume))
        raise UserError(f"The result has {have} voxels but volume '{name}' has {want}; run the model on this volume.")
    # The loader flips left-handed files: the same shape alone would let a mask in that lies upside down.
    if not any(map(image.same_grid, (volume, as_read(volume, volume_node)))):
        raise UserError(f"The result lies elsewhere than volume '{name}', which was moved or replaced; run the model again.")


def check_accepts(segmentation_node: Any) -> None:
    """UserError for a segmentation that no prediction can be written into."""
    if segmentation_node is None or not segmentation_node.GetSegmentation().GetNumberOfSegments():
        return
    _to_world(segmentation_node)
    source = segmentation_node.GetSegmentation().GetSourceRepresentationName()
    if source != _LABELMAP:
        raise UserError(
            f"Segmentation '{segmentation_node.GetName()}' keeps its segments as {source.lower()}; choose another one, "
            "or make the binary labelmap its source representation in the Segmentations module."
        )


def _check_has(segmentation_node: Any, segment_id: str, segmentation: Any = None) -> None:
    if (segmentation or segmentation_node.GetSegmentation()).GetSegment(segment_id) is None:
        raise UserError(f"Segmentation '{segmentation_node.GetName()}' has no segment '{segment_id}'; choose one that it has.")


def _still_there(*nodes: Any) -> Callable[[], None]:
    """A function that raises UserError once one of the nodes has left its scene."""
    homes = [(node, node.GetScene(), node.GetName()) for node in nodes if node is not None]

    def check() -> None:
        for node, scene, name in homes:
            if scene is None or node.GetScene() is not scene:
                raise UserError(f"'{name}' was removed while its result was written; nothing was written.")

    return check


def _ids(segmentation: Any) -> list[str]:
    return list(segmentation.GetSegmentIDs())


def _visible(segmentation_node: Any, ids: list[str]) -> list[str]:
    display = segmentation_node.GetDisplayNode() if segmentation_node is not None else None
    return ids if display is None else [i for i in ids if display.GetSegmentVisibility(i)]


def _representations(holder: Any) -> list[str]:
    """The names of what a segment, or a segmentation, is represented by."""
    names: list[str] = []
    holder.GetContainedRepresentationNames(names)
    return names


def _segment(segmentation: Any, segment_id: str) -> Any:
    segment = segmentation.GetSegment(segment_id)
    if segment is None:
        raise _Changed
    return segment


def _unchanged(labelmap: Any) -> Callable[[], None]:
    """A function that raises _Changed once the labelmap has other voxels. An array of them from before may be gone then."""
    time = labelmap.GetMTime()

    def check() -> None:
        if labelmap.GetMTime() != time:
            raise _Changed

    return check


def label_of(segment: Any) -> tuple[Any, int, int]:
    """A segment's labelmap, when that was changed last, and its value there."""
    labelmap = segment.GetRepresentation(_LABELMAP)
    return labelmap, labelmap.GetMTime() if labelmap is not None else 0, segment.GetLabelValue()


def _layers(segmentation: Any, ids: Iterable[str] | None = None) -> dict[Any, set[str]]:
    """Labelmap -> IDs of the segments in it (all, or of those named)."""
    out: dict[Any, set[str]] = {}
    for segment_id in _ids(segmentation) if ids is None else ids:
        labelmap = _segment(segmentation, segment_id).GetRepresentation(_LABELMAP)
        if labelmap is not None:
            out.setdefault(labelmap, set()).add(segment_id)
    return out


def _earlier_segments(segmentation: Any, prediction: Prediction) -> dict[int, str]:
    """Label value -> ID of the segment that an earlier prediction of this model wrote for it, by the name that it was given: the label's,
    or that and a number."""
    labels, models = prediction.label_defs, _unversioned(prediction.model_name)
    tagged = [(i, s) for i in _ids(segmentation) if (s := segmentation.GetSegment(i)).HasTag(MODEL_TAG)]
    same = [(i, s) for i, s in tagged if _unversioned(segment_tag(s, MODEL_TAG)) == models]
    names = {i: s.GetName() for i, s in same if segment_tag(s, _NAME_TAG) in ("", _name_text(s))}  # older scenes have no such tag
    out: dict[int, str] = {}
    for suffix in ("", r" \d+"):
        for label in labels:
            match = next((i for i in names if re.fullmatch(re.escape(label.name) + suffix, names[i])), None)
            if match and label.value not in out:
                out[label.value] = match
                del names[match]
    return out


def _name_text(segment: Any) -> str:
    """A segment's name as the text of a tag, which a | would end in a .seg.nrrd."""
    return segment.GetName().replace("|", "/")


def _unversioned(model_name: str) -> set[str]:
    """The names in a Prediction.model_name (<name>-<version>, several joined by "+"), so that an update replaces what it updates."""
    return {each.rpartition("-")[0] or each for each in model_name.split("+")}


def size_text(mask: np.ndarray) -> str:
    """How many voxels a mask without zeros around it is across, as a tag's text: a crop of its scan does not change it, nor does what a
    brush does within it."""
    return "x".join(map(str, mask.shape))


def _free_name(segmentation: Any, name: str) -> str:
    taken = {segmentation.GetSegment(i).GetName() for i in _ids(segmentation)}
    return next(n for n in chain([name], (f"{name} {i}" for i in count(2))) if n not in taken)


def _new_segment(segmentation: Any, name: str, color: Sequence[int]) -> Any:
    """Not in the segmentation yet. color: 0 to 255."""
    segment = slicer.vtkSegment()
    segment.SetName(_free_name(segmentation, name))
    segment.SetColor(*(c / 255 for c in color))
    segment.SetNameAutoGenerated(False)
    segment.SetColorAutoGenerated(False)
    return segment


def _segment_copy(segment: Any) -> Any:
    """Another vtkSegment with the same properties and, not copied, the same voxels."""
    out = slicer.vtkSegment()
    _copy_metadata(segment, out)
    for name in _representations(segment):
        out.AddRepresentation(name, segment.GetRepresentation(name))
    return out


def _copy_metadata(source: Any, to: Any) -> None:
    to.DeepCopyMetadata(source)
    to.SetNameAutoGenerated(source.GetNameAutoGenerated())
    to.SetColorAutoGenerated(source.GetColorAutoGenerated())
    to.SetLabelValue(source.GetLabelValue())


def _given(segment: Any) -> dict[tuple[str, ...], Any]:
    """What a person may say of a segment, by the method that says it and its first arguments."""
    tags = (segment.GetTerminologyEntryTagName(), "Segmentation.Status")
    return {("SetName",): segment.GetName(), ("SetColor",): segment.GetColor(), **{("SetTag", t): segment_tag(segment, t) for t in tags}}


def _display_of(display: Any, segment_id: str) -> dict[str, Any]:
    color = display.GetSegmentOverrideColor(segment_id)
    out = {key: getattr(display, f"GetSegment{key}")(segment_id) for key in _DISPLAY}
    return {**out, "OverrideColor": tuple(color[i] for i in range(3))}


def _set_display(display: Any, segment_id: str, values: dict[str, Any]) -> None:
    for key in _DISPLAY:
        getattr(display, f"SetSegment{key}")(segment_id, values[key])
    if min(values["OverrideColor"]) >= 0:
        display.SetSegmentOverrideColor(segment_id, *values["OverrideColor"])


def _color_node(scene: Any, kind: str) -> Any:
    """The scene's colour table for maps of one kind, made on first use and saved with the scene."""
    tag = _COLORS + kind
    node = scene.GetSingletonNode(tag, "vtkMRMLColorTableNode")
    if node is None:
        node = slicer.vtkMRMLColorTableNode()
        node.SetTypeToUser()
        node.SetName(f"UNet {kind}")
        node.SetSingletonTag(tag)
        node = scene.AddNode(node)
    rgb, last = np.array(MAP_COLORS[kind]), [0.0] * 4
    # A scene that was saved without its colour files brings a table back without its colours.
    if node.GetNumberOfColors() != 256 or not (node.GetColor(255, last) and np.allclose(last[:3], rgb[2], atol=0.01)):
        node.SetNumberOfColors(256)
        for i in range(256):
            color = (float(np.interp(i / 255, (0, 0.5, 1), rgb[:, c])) for c in range(3))
            node.SetColor(i, f"{i / 255:.2f}", *color, 1.0)
    return node


def _save_for_editor(segmentation_node: Any, coming: Iterable[Any] = ()) -> None:
    """Before its segments change: the Segment Editor's Undo restores all segments as they were last saved, so all that was written since
    would go with a person's last stroke. Its module, if it was ever opened, has this widget; asking it for one would make it.

    coming: what they change to. Data older than a saved state are what that has a copy of, says vtkSegmentation::CopySegment."""
    editor = getattr(getattr(slicer.modules, "SegmentEditorWidget", None), "editor", None)
    if editor is None or editor.segmentationNode() is not segmentation_node:
        return
    editor.saveStateForUndo()
    segmentation = segmentation_node.GetSegmentation()
    there = [s.GetRepresentation(name) for s in map(segmentation.GetSegment, _ids(segmentation)) for name in _representations(s)]
    for data in coming:
        if not any(data is other for other in there):  # whose surface would go
            data.Modified()


def _dress(segmentation_node: Any, volume_node: Any, coming: Iterable[Any]) -> None:
    """Before segments are written: the Segment Editor's state, a display, and for a segmentation without segments the transform and the
    geometry of its volume (None: it keeps its own). coming: see _save_for_editor()."""
    _save_for_editor(segmentation_node, coming)
    if segmentation_node.GetDisplayNode() is None:
        segmentation_node.CreateDefaultDisplayNodes()
    if volume_node is not None:
        segmentation_node.SetAndObserveTransformNodeID(volume_node.GetTransformNodeID())
        segmentation_node.SetReferenceImageGeometryParameterFromVolumeNode(volume_node)
        segmentation_node.GetSegmentation().SetSourceRepresentationName(_LABELMAP)


def _item_of(node: Any) -> tuple[Any, int]:
    """The subject hierarchy and a node's item there; 0 where it has none, or was just removed from its scene."""
    scene = node.GetScene()
    hierarchy = scene.GetFirstNodeByClass("vtkMRMLSubjectHierarchyNode") if scene is not None else None
    return hierarchy, hierarchy.GetItemByDataNode(node) if hierarchy is not None else 0


def _place_beside(node: Any, other: Any) -> None:
    """Into the other node's folder of the subject hierarchy, where it has one."""
    hierarchy, item = _item_of(other)
    if not item:
        return
    parent = hierarchy.GetItemParent(item)
    own = hierarchy.GetItemByDataNode(node)
    if own:
        hierarchy.SetItemParent(own, parent)
    else:
        hierarchy.CreateItem(parent, node)


def _remove_node(node: Any) -> None:
    """Remove a node with what came into the scene with it: its display and storage nodes."""
    scene = node.GetScene()
    if scene is None:
        return
    if node.IsA("vtkMRMLSequenceNode"):
        for browser in _nodes(scene, "vtkMRMLSequenceBrowserNode"):
            if browser.IsSynchronizedSequenceNodeID(node.GetID(), True):
                browser.RemoveSynchronizedSequenceNode(node.GetID())
    parts = [node.GetNthStorageNode(i) for i in range(node.GetNumberOfStorageNodes())]
    if node.IsA("vtkMRMLDisplayableNode"):
        parts += [node.GetNthDisplayNode(i) for i in range(node.GetNumberOfDisplayNodes())]
    hierarchy, item = _item_of(node)
    if item:
        hierarchy.RemoveItem(item, False)
    for each in (node, *parts):
        if each is not None and each.GetScene() is scene:
            scene.RemoveNode(each)


def _colors(scene: Any) -> list[Any]:
    """The colour tables of maps that the scene has."""
    nodes = (scene.GetSingletonNode(_COLORS + kind, "vtkMRMLColorTableNode") for kind in MAP_COLORS)
    return [node for node in nodes if node is not None]


def _remove_new_colors(scene: Any, former: list[Any]) -> None:
    """Those that were not there before and that no display uses."""
    for node in _colors(scene):
        if not any(node is f for f in former) and not any(d.GetColorNode() is node for d in _nodes(scene, "vtkMRMLDisplayNode")):
            scene.RemoveNode(node)
