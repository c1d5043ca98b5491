"""Clicked segments in the scene: written and taken back alone, with prompts that survive files, and dots that are seen."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("slicer", reason="slicer-core is not installed")

from mrml_scenes import (
    LPS,
    SHAPE,
    SURFACE,
    add_segment,
    add_transform,
    add_volume,
    assert_no_orphans,
    ball,
    fingerprint,
    geometry,
    predicted,
    read_back,
    rotation,
    segments,
    tag,
)
from UNetSegmentationLib import UserError, mrml
from UNetSegmentationLib.image import Box
from UNetSegmentationLib.mrml import complete, write_clicked_steps, write_prediction

GRIDS = {"plain": np.eye(3), "oblique": rotation(), "left-handed": rotation() @ np.diag([1, 1, -1])}
MASK, START = np.ones((2, 3, 2), np.uint8), (4, 5, 6)
PROMPTS = [
    ("point", 1.5, -2.25, 1 / 3, True),
    ("box", -1.0, -2.0, -3.0, 4.0, 5.0, 6.0),
    ("mask", np.array([[[0, 1], [1, 1]]], np.uint8), (3, 4, 5)),
    ("point", -7.0, 8.0, 9.0, False),
]


def full(mask: np.ndarray = MASK, start: tuple[int, ...] = START) -> np.ndarray:
    out = np.zeros(SHAPE, np.uint8)
    out[tuple(slice(a, a + n) for a, n in zip(start, mask.shape))] = mask
    return out


def volume(grid: str = "oblique") -> Any:
    return add_volume(np.full(SHAPE, -800, np.int16), geometry(GRIDS[grid]))


def same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        a[0] == b[0] and all(np.array_equal(v, w) for v, w in zip(a[1:], b[1:], strict=True)) for a, b in zip(some, others)
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_a_new_nodule(scene: Any, grid: str) -> None:
    node = volume(grid)
    out, segment = complete(write_clicked_steps(MASK, START, node, name="Nodule 1", color=(255, 0, 51), tags={"a": "b"}))
    assert np.array_equal(read_back(out, "Nodule 1", node), full())
    held = out.GetSegmentation().GetSegment(segment)
    assert held.GetColor() == (1.0, 0.0, 0.2) and tag(held, "a") == "b"
    assert held.GetRepresentation(SURFACE).GetNumberOfPoints() > 0
    mask, start = complete(mrml.segment_part_steps(out, segment, node))
    assert np.array_equal(mask, MASK) and start == START
    assert mrml.find_nodules(node) is None
    held.SetTag(mrml.PROMPTS_TAG, "[]")
    assert mrml.find_nodules(node) is out


@pytest.mark.parametrize("moved", [False, True])
def test_a_nodule_that_shares_its_layer_is_written_alone(scene: Any, moved: bool) -> None:
    node = volume()
    if moved:
        node.SetAndObserveTransformNodeID(add_transform(LPS @ geometry(rotation(10), (1, 1, 1))).GetID())
    out, segment = complete(write_clicked_steps(MASK, START, node, name="Nodule 1"))
    others = {"far": ball(SHAPE, (2, 2, 2), 1.5), "near": full(start=(6, 8, 8))}
    for name, mask in others.items():
        add_segment(out, name, mask, node)
    out.GetSegmentation().CollapseBinaryLabelmaps(False)
    assert out.GetSegmentation().GetNumberOfLayers() == 1
    larger = np.ones((4, 5, 5), np.uint8)  # over "near", which keeps what it has
    again, same_id = complete(write_clicked_steps(larger, (4, 5, 5), node, out, segment, tags={"new": "yes"}))
    assert again is out and same_id == segment and tag(out.GetSegmentation().GetSegment(segment), "new") == "yes"
    assert np.array_equal(read_back(out, "Nodule 1", node), full(larger, (4, 5, 5)))
    for name, mask in others.items():
        assert np.array_equal(read_back(out, name, node), mask)
    assert_no_orphans(out)
    mrml.remove_segment(out, segment)
    assert list(segments(out)) == list(others)
    for name, mask in others.items():
        assert np.array_equal(read_back(out, name, node), mask)
    assert_no_orphans(out)


def test_the_surface_of_a_mass_lies_where_its_voxels_do(scene: Any) -> None:
    shape, size = (70, 130, 125), 118
    node = add_volume(np.zeros(shape, np.int16), geometry(GRIDS["oblique"], (0.7, 0.6, 1.1)))
    mask = ball((60, size, size), (29.5, 58.5, 58.5), 29.0)
    out, segment = complete(write_clicked_steps(mask, (5, 6, 4), node))
    surface = out.GetSegmentation().GetSegment(segment).GetRepresentation(SURFACE)
    points = np.array([surface.GetPoint(i) for i in range(surface.GetNumberOfPoints())])
    centre = LPS @ geometry(GRIDS["oblique"], (0.7, 0.6, 1.1)) @ (4 + 58.5, 6 + 58.5, 5 + 29.5, 1)
    assert np.allclose((points.max(0) + points.min(0)) / 2, centre[:3], atol=0.4)
    across = np.linalg.norm((points - centre[:3]) @ (LPS[:3, :3] @ GRIDS["oblique"]) / (0.7, 0.6, 1.1), axis=1)
    assert 27 < across.min() and across.max() < 31 and 1000 < len(points) < 20000


def test_undo_takes_each_click_back_exactly(scene: Any) -> None:
    node = volume()
    before, steps, seen, out, segment = None, [], [], None, None
    for mask in (MASK, np.ones((3, 3, 3), np.uint8), np.ones((1, 2, 2), np.uint8)):
        undo = mrml.Undo(scene, 1)
        seen.append(fingerprint(scene))
        undo.begin(out)
        out, segment = complete(write_clicked_steps(mask, START, node, out, segment, tags={mrml.PROMPTS_TAG: f"[{len(steps)}]"}))
        undo.commit([out])
        steps.append(undo)
    for undo, before in zip(reversed(steps), reversed(seen)):
        undo.undo()
        assert fingerprint(scene) == before


def test_a_predicted_segment_that_was_clicked_at_is_not_replaced(scene: Any) -> None:
    node, labels = volume(), ball(SHAPE, (4, 5, 7), 3)
    out = write_prediction(predicted(node, labels), node)
    segment, undo = out.GetSegmentation().GetSegment(segments(out)["nodule"]), mrml.Undo(scene)
    undo.begin(out)
    complete(write_clicked_steps(MASK, START, node, out, segments(out)["nodule"], tags={mrml.PROMPTS_TAG: "[]"}))
    undo.commit([out])
    write_prediction(predicted(node, labels), node, out)
    assert list(segments(out)) == ["nodule", "nodule 2"] and np.array_equal(read_back(out, "nodule", node), full())
    undo.undo()
    assert segment.HasTag(mrml.MODEL_TAG) and not segment.HasTag(mrml.PROMPTS_TAG)
    # The first versions left both.
    for key in (mrml.PROMPTS_TAG, mrml.DIGEST_TAG, mrml.CLICK_MODEL_TAG):
        segment.SetTag(key, "[]")
    write_prediction(predicted(node, full()), node, out)
    assert np.array_equal(read_back(out, "nodule", node), full())
    assert not any(segment.HasTag(key) for key in (mrml.PROMPTS_TAG, mrml.DIGEST_TAG, mrml.CLICK_MODEL_TAG))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shared", [False, True])
def test_undo_puts_a_mask_back_where_its_scan_was_hardened(scene: Any, grid: str, shared: bool) -> None:
    node = volume(grid)
    masks, steps, out, segment = [MASK, np.ones((3, 3, 3), np.uint8), np.ones((1, 2, 2), np.uint8)], [], None, None
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation(40) * 1.1, (5, 6, 7)
    for mask in masks:
        undo = mrml.Undo(scene, 1)
        undo.begin(out)
        out, segment = complete(write_clicked_steps(mask, START, node, out, segment, name="Nodule 1"))
        undo.commit([out])
        steps.append(undo)
        if shared and len(steps) == 1:
            add_segment(out, "other", ball(SHAPE, (2, 2, 2), 1.5), node)
            out.GetSegmentation().CollapseBinaryLabelmaps(False)
    for undo, mask in zip(reversed(steps[1:]), reversed(masks[:2])):
        for each in (node, out):
            each.SetAndObserveTransformNodeID(add_transform(move).GetID())
            each.HardenTransform()
        undo.undo()
        assert np.array_equal(read_back(out, "Nodule 1", node), full(mask))
        mask_again, start = complete(mrml.segment_part_steps(out, segment, node))
        assert start == START and np.array_equal(mask_again, mask)
        surface = out.GetSegmentation().GetSegment(segment).GetRepresentation(SURFACE)
        middle = mrml.image_from_volume(node).index_to_point([a + (n - 1) / 2 for a, n in zip(START, mask.shape)][::-1])
        assert np.allclose(np.reshape(surface.GetBounds(), (3, 2)).mean(1), np.array(middle) * (-1, -1, 1), atol=0.3)
        if shared:
            assert np.array_equal(read_back(out, "other", node), ball(SHAPE, (2, 2, 2), 1.5))
    steps[0].undo()
    assert list(segments(out)) == ["other"] if shared else out.GetScene() is None


def test_a_segment_removed_meanwhile_or_a_wrong_place_changes_nothing(scene: Any) -> None:
    node = volume()
    out, segment = complete(write_clicked_steps(MASK, START, node))
    add_segment(out, "other", ball(SHAPE, (2, 2, 2), 1.5), node)
    state = fingerprint(scene)
    closed = write_clicked_steps(MASK, (1, 1, 1), node, out, segment)
    next(closed)
    closed.close()
    assert fingerprint(scene) == state
    steps = write_clicked_steps(MASK, (1, 1, 1), node, out, segment)
    next(steps)
    out.GetSegmentation().RemoveSegment(segment)
    with pytest.raises(UserError, match="removed"):
        complete(steps)
    steps = write_clicked_steps(MASK, (1, 1, 1), node, out)
    next(steps)
    scene.RemoveNode(out)
    with pytest.raises(UserError, match="was removed while"):
        complete(steps)


def test_prompts_as_text(scene: Any) -> None:
    node = volume()
    text = mrml.prompts_text(PROMPTS, node)
    assert "|" not in text and "\n" not in text  # Slicer's file has tags as name:value|name:value|
    assert same(mrml.prompts_from_text(text, node), PROMPTS)
    # Where the volume goes, there go its prompts.
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation(40), (5, 6, 7)
    node.SetAndObserveTransformNodeID(add_transform(move).GetID())
    moved = mrml.prompts_from_text(text, node)
    r, a, s, _ = move @ (-1.5, 2.25, 1 / 3, 1)
    assert np.allclose(moved[0][1:4], (-r, -a, s)) and moved[0][4] is True and same(moved[2:3], PROMPTS[2:3])
    assert np.allclose(mrml.prompts_from_text(mrml.prompts_text(moved, node), node)[3][1:4], moved[3][1:4])
    for bad in ("", "no JSON", "{}", '[["point", 1]]', '[["mask", [0,0,0], [9,9,9], "AAAA"]]', "[[]]", "[" * 5000):
        assert mrml.prompts_from_text(bad, node) == []
    with pytest.raises(UserError):
        mrml.prompts_text([("circle", 1)], node)


def test_no_text_in_a_scene_takes_the_memory(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = volume()
    packed = base64.b64encode(zlib.compress(bytes(400**3 // 8), 9)).decode()
    one = [["point", 0, 0, 0, True], ["mask", [0, 0, 0], [400] * 3, packed]]  # as of a large scan, of which this is a crop
    assert len(mrml.prompts_from_text(json.dumps(one), node)) == 2
    assert mrml.prompts_from_text(json.dumps([*one, one[1]]), node) == []
    monkeypatch.setattr(np, "unpackbits", lambda *_a, **_k: (_ for _ in ()).throw(MemoryError))
    assert mrml.prompts_from_text(json.dumps(one), node) == []


@pytest.mark.parametrize("grid", GRIDS)
def test_prompts_stay_with_the_voxels_of_a_scan_that_is_moved_and_hardened(scene: Any, grid: str) -> None:
    node = volume(grid)
    text, was = mrml.prompts_text(PROMPTS, node), mrml.image_from_volume(node)
    earlier = json.loads(text)
    del earlier[0][-1]  # the print of the voxels
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation(40) * 1.1, (5, 6, 7)
    for hardened in (False, True, False):
        node.SetAndObserveTransformNodeID(add_transform(move).GetID())
        if hardened:
            node.HardenTransform()
        now, moved = mrml.image_from_volume(node), mrml.prompts_from_text(text, node)
        assert same(mrml.prompts_from_text(json.dumps(earlier), node), moved)
        for there, prompt in zip(moved, PROMPTS):
            for i in () if prompt[0] == "mask" else range(1, 7 if prompt[0] == "box" else 4, 3):
                assert np.allclose(now.point_to_index(there[i : i + 3]), was.point_to_index(prompt[i : i + 3]))
        assert same(moved[2:3], PROMPTS[2:3])


def test_prompts_of_earlier_versions_and_on_another_grid_are_known_by_their_place(scene: Any) -> None:
    """The first versions kept them in mm alone. Slicer's loader mirrors left-handed files, and a crop has other indices."""
    node, grid = volume("left-handed"), geometry(GRIDS["left-handed"])
    at = [("point", *(grid @ (*index, 1))[:3], index[0] == 4) for index in ((4, 4, 2), (5, 3, 2), (6, 4, 3))]
    prompts = [at[0], *PROMPTS[1:3], at[1]]
    text = mrml.prompts_text(prompts, node)
    old = json.dumps(json.loads(text)[1:])
    mirror = grid @ np.diag([1, 1, -1, 1]) + np.zeros((4, 4))
    mirror[:, 3] = grid @ (0, 0, SHAPE[0] - 1, 1)
    assert same(mrml.prompts_from_text(old, node), prompts)
    # A mask has its place among the voxels: a crop's, of which only a part may be left, and mirrored ones.
    start, part = (8 - 3, 4, 5), PROMPTS[2][1][..., :1]
    assert same(
        mrml.prompts_from_text(text, add_volume(np.zeros(SHAPE, np.int16), mirror)),
        [*prompts[:2], ("mask", PROMPTS[2][1], start), at[1]],
    )
    for shape, first, mask in (
        ((8, 9, 9), (1, 2, 4), ("mask", PROMPTS[2][1], (2, 2, 1))),
        ((5, 6, 6), (2, 3, 0), ("mask", part, (1, 1, 5))),
    ):
        crop = grid.copy()
        crop[:, 3] = crop @ (*first[::-1], 1)
        assert same(mrml.prompts_from_text(text, add_volume(np.zeros(shape, np.int16), crop)), [*prompts[:2], mask, at[1]])
    # Of a click beside the crop nothing can be run.
    assert mrml.prompts_from_text(mrml.prompts_text([at[0], at[2]], node), add_volume(np.zeros(shape, np.int16), crop)) == []
    for shape, spacing in (((3, 6, 7), (0.7, 1.1, 2.3)), ((18, 11, 13), (0.7, 1.1, 1.15))):  # left out, resampled
        other = add_volume(np.zeros(shape, np.int16), geometry(GRIDS["left-handed"], spacing))
        assert mrml.prompts_from_text(text, other) == []
        assert same(mrml.prompts_from_text(mrml.prompts_text(prompts[:2], node), other), prompts[:2])
    move = np.eye(4)
    move[:3, 3] = 5, 6, 7
    node.SetAndObserveTransformNodeID(add_transform(move).GetID())
    assert np.allclose(mrml.prompts_from_text(old, node)[0][1:4], np.add(at[0][1:4], (-5, -6, 7)))
    assert mrml.prompts_from_text(text.replace("[", "[null,", 2), node) == []


def test_prompts_survive_a_file(scene: Any, tmp_path: Path) -> None:
    import slicer

    node = volume()
    text = mrml.prompts_text(PROMPTS, node)
    tags = {mrml.PROMPTS_TAG: text, mrml.DIGEST_TAG: mrml.mask_digest(MASK, START)}
    out, _ = complete(write_clicked_steps(MASK, START, node, name="Nodule 1", tags=tags))
    add_segment(out, "other", ball(SHAPE, (2, 2, 2), 1.5), node)
    path = tmp_path / "nodules.seg.nrrd"
    out.AddDefaultStorageNode(str(path))
    assert out.GetStorageNode().WriteData(out)
    scene.RemoveNode(out)
    back = slicer.modules.segmentations.logic().LoadSegmentationFromFile(str(path), True, "back")
    held = back.GetSegmentation().GetSegment(segments(back)["Nodule 1"])
    assert tag(held, mrml.PROMPTS_TAG) == text
    mask, start = complete(mrml.segment_part_steps(back, segments(back)["Nodule 1"], node))
    assert mrml.mask_digest(mask, start) == tag(held, mrml.DIGEST_TAG)


def test_the_digest_is_of_the_voxels_alone() -> None:
    first = mrml.mask_digest(MASK, START)
    assert first == mrml.mask_digest(full(), (0, 0, 0)) == mrml.mask_digest(MASK * 7, START)
    assert first != mrml.mask_digest(MASK, (4, 5, 7)) and first != mrml.mask_digest(MASK[:1], START)
    assert mrml.mask_digest(np.zeros((2, 2, 2)), START) == mrml.mask_digest(np.zeros((1, 1, 1)), START)


def test_segments_are_astray_once_their_scan_or_they_were_moved_alone(scene: Any) -> None:
    import slicer

    def begun(*, scan: Any = None, own: Any = None) -> tuple[Any, Any]:
        node, on = scene.AddNewNodeByClass("vtkMRMLSegmentationNode"), volume()
        for each, transform in ((on, scan), (node, own)):
            each.SetAndObserveTransformNodeID(transform and transform.GetID())
        node.SetReferenceImageGeometryParameterFromVolumeNode(on)
        add_segment(node, "A", full(), on)
        assert not mrml.is_astray(node, on)
        return on, node

    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(40), (25, 10, 5)
    turn = add_transform(matrix)
    for hardened in (0, 1):  # the scan alone, the segments alone
        pair = begun(scan=turn, own=turn)
        pair[hardened].HardenTransform()
        assert not mrml.is_astray(pair[1], pair[0])
        pair[hardened].SetAndObserveTransformNodeID(turn.GetID())
        assert mrml.is_astray(pair[1], pair[0])
    on, node = begun(scan=turn)
    on.HardenTransform()
    assert not mrml.is_astray(node, on)

    on, node = begun()
    step = np.eye(4)
    step[:3, 3] = 2 * mrml._ijk_to_ras(on)[:3, 0]  # whole voxels, as a crop's
    for moved in (on, node):
        moved.SetAndObserveTransformNodeID(add_transform(step).GetID())
        assert mrml.is_astray(node, on) == (moved is on)
    on.SetAndObserveTransformNodeID(None)
    assert mrml.is_astray(node, on)
    crop = np.zeros(tuple(n - 2 for n in SHAPE))
    fine = mrml._ijk_to_ras(on) @ np.diag([0.5, 0.5, 0.5, 1])
    for shape, grid in ((crop.shape, mrml._ijk_to_ras(on) @ step), (tuple(2 * n for n in SHAPE), fine)):
        taken = slicer.vtkSegmentationConverter.SerializeImageGeometry(mrml._oriented(shape, (0, 0, 0), grid))
        node.GetSegmentation().SetConversionParameter(mrml._GEOMETRY, taken)
        assert not mrml.is_astray(node, on)
    node.GetSegmentation().SetConversionParameter(mrml._GEOMETRY, "")
    assert not mrml.is_astray(node, on)


def test_rows_are_a_table_of_texts(scene: Any) -> None:
    node = volume()
    out, _ = complete(write_clicked_steps(MASK, START, node))
    table = mrml.write_rows(["Nodule", "Mean (mm)"], [["Nodule 1", "5.4"], ["Nodule 2", "-"]], out)
    assert mrml.write_rows(["Nodule"], [["Nodule 2"]], out) is table and mrml.find_table(out, mrml.NODULES_ROLE) is table
    assert table.GetNumberOfRows() == 1 and table.GetCellText(0, 0) == "Nodule 2"
    assert mrml.find_table(out) is None  # that of the measures of an automatic run is another one


def test_dots_are_seen_small_and_cannot_be_moved(scene: Any, runtime: Any) -> None:
    """Through Slicer's own displayable manager of markups."""
    import slicer
    from headless_slicer import SliceView

    factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
    factory.SetMRMLApplicationLogic(runtime.application_logic)
    if not factory.IsDisplayableManagerRegistered("vtkMRMLMarkupsDisplayableManager"):
        factory.RegisterDisplayableManager("vtkMRMLMarkupsDisplayableManager")
    node = add_volume(np.full((20, 40, 40), -800, np.int16), np.diag([-1, -1, 1, 1.0]))
    view = SliceView(runtime, "Dots", "Axial", (200, 200))
    view.show(node)
    view.node.JumpSliceByCentering(20, 20, 10)
    before = view.picture()
    points = {True: (14.0, 20.0, 10.0), False: (26.0, 20.0, 10.0)}
    mine, selection = scene.AddNewNodeByClass("vtkMRMLMarkupsLineNode"), scene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
    runtime.modules.markups.logic().SetActiveList(mine)
    for positive, point in points.items():
        mrml.show_dots(scene, positive, [point])
    # What a person places next is his own.
    assert (selection.GetActivePlaceNodeID(), selection.GetActivePlaceNodeClassName()) == (mine.GetID(), mine.GetClassName())
    scene.RemoveNode(mine)
    after = view.picture()
    green, red = (view.pixel(after, points[p]).astype(int) for p in (True, False))
    assert green[1] > 2 * green[0] and red[0] > 2 * red[1]
    changed = np.count_nonzero((before != after).any(2))
    assert 8 < changed < 0.01 * before.shape[0] * before.shape[1] * 2
    for dots in slicer.util.getNodesByClass("vtkMRMLMarkupsFiducialNode", scene):
        assert dots.GetLocked() and not dots.GetSaveWithScene() and dots.GetHideFromEditors()
    mrml.show_dots(scene, True, [])
    mrml.remove_dots(scene)
    assert not slicer.util.getNodesByClass("vtkMRMLMarkupsNode", scene)


@pytest.mark.parametrize("grid", GRIDS)
def test_segments_as_one_label_map(scene: Any, grid: str) -> None:
    import slicer

    node, segmentation = volume(grid), slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(node)
    masks = [full(), full(np.ones((3, 2, 4), np.uint8), (5, 6, 7)), np.zeros(SHAPE, np.uint8)]
    values = [(add_segment(segmentation, f"s{i}", mask, node), value) for i, (mask, value) in enumerate(zip(masks, (7, 2, 3)))]
    merged, start = complete(mrml.merged_steps(segmentation, values, node))
    assert start == START and np.array_equal(full(merged, start), np.where(masks[1], 2, 7 * masks[0]))
    assert complete(mrml.merged_steps(segmentation, values[2:], node))[0].size == 0


def test_what_dicom_says_of_a_volume(scene: Any) -> None:
    import slicer

    node = volume()
    assert mrml.dicom_of(node) == ("", "")
    hierarchy, words = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene), slicer.vtkMRMLSubjectHierarchyConstants
    patient = hierarchy.CreateSubjectItem(hierarchy.GetSceneItemID(), "Doe^Jane")
    item = hierarchy.CreateItem(hierarchy.CreateStudyItem(patient, "Study"), node)
    hierarchy.SetItemUID(patient, words.GetDICOMUIDName(), "4711 ")
    hierarchy.SetItemAttribute(item, words.GetDICOMSeriesModalityAttributeName(), "MR")
    assert mrml.dicom_of(node) == ("4711", "MR")
    hierarchy.SetItemAttribute(patient, words.GetDICOMPatientNameAttributeName(), "4711 ")  # Slicer takes it where there is no ID
    assert mrml.dicom_of(node) == ("", "MR")
    hierarchy.SetItemAttribute(patient, words.GetDICOMPatientIDAttributeName(), "4711 ")  # in public collections both are the same
    assert mrml.dicom_of(node) == ("4711", "MR")


def test_the_days_between_two_studies_are_those_of_their_dates(scene: Any) -> None:
    import slicer

    one, other = volume(), volume()
    assert mrml.days_between(one, other) is None
    hierarchy, words = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene), slicer.vtkMRMLSubjectHierarchyConstants
    studies = [hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), name) for name in ("Then", "Now")]
    for node, study in zip((one, other), studies):
        hierarchy.CreateItem(study, node)
    for then, now, days in (("20240131", "20240301", 30), ("2024.03.01", "20240131", -30), ("20240131", "", None), ("2024", "2024", None)):
        for study, date in zip(studies, (then, now)):
            hierarchy.SetItemAttribute(study, words.GetDICOMStudyDateAttributeName(), date)
        assert mrml.days_between(one, other) == days


def test_of_one_layer_only_the_planes_with_wanted_segments_are_read_and_all_of_those(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = volume()
    masks = {"low": ball(SHAPE, (2, 4, 5), 1), "high": ball(SHAPE, (7, 6, 8), 1), "other": ball(SHAPE, (5, 3, 3), 1)}
    out, _ = complete(write_clicked_steps(masks["low"], (0, 0, 0), node, name="low"))
    for name in ("high", "other"):
        add_segment(out, name, masks[name], node)
    out.GetSegmentation().CollapseBinaryLabelmaps(False)
    monkeypatch.setattr(mrml, "slabs", lambda shape, *_: [slice(z, z + 1) for z in range(shape[0])])
    ids = segments(out)
    for names in (["low"], ["high"], ["low", "high"], ["high", "other"]):
        held = complete(mrml._held_steps(out.GetSegmentation(), [ids[n] for n in names], Box.whole(SHAPE), mrml._grid_in(out, node)))
        assert np.array_equal(held, sum(masks[n] for n in names) > 0)
