"""Taking back what was written: while it is written, and later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")

from mrml_scenes import (  # noqa: E402
    LUNG,
    NODULE,
    SHAPE,
    SURFACE,
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
    tag,
)
from UNetSegmentationLib.image import Box, UserError  # noqa: E402
from UNetSegmentationLib.model import Label  # noqa: E402
from UNetSegmentationLib.mrml import (  # noqa: E402
    Undo,
    complete,
    find_map,
    find_table,
    image_from_volume,
    remove_segment,
    segment_mask,
    write_clicked_steps,
    write_map_steps,
    write_measures,
    write_prediction,
    write_prediction_steps,
    write_scalar_map,
)

CYST = Label(3, "cyst", (0, 0, 255), {})


@pytest.fixture
def volume(scene: Any) -> Any:
    node = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, -1)))
    node.SetAndObserveTransformNodeID(add_transform(np.eye(4)).GetID())
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    hierarchy.CreateItem(hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study"), node)
    return node


def rich(scene: Any, volume: Any, labels: np.ndarray, surfaces: bool = True) -> Any:
    """A segmentation with results of an earlier run, one of them renamed, and a person's segments, layers shared."""
    labels = labels.copy()
    labels[8, 8, 8] = CYST.value
    node = write_prediction(predicted(volume, labels, (NODULE, LUNG, CYST)), volume)
    node.GetSegmentation().GetSegment(segments(node)["lung"]).SetName("lung, corrected")
    add_segment(node, "over", ball(SHAPE, (4, 5, 7), 3), volume)
    add_segment(node, "beside", ball(SHAPE, (8, 0, 0), 2), volume)
    display = node.GetDisplayNode()
    display.SetSegmentOpacity3D(segments(node)["cyst"], 0.4)
    display.SetSegmentOpacity2DFill(segments(node)["cyst"], 0.3)
    display.SetSegmentVisibility2DOutline(segments(node)["cyst"], False)
    display.SetSegmentVisibility(segments(node)["nodule"], False)
    display.SetSegmentOverrideColor(segments(node)["cyst"], 1, 0, 1)
    if surfaces:
        node.CreateClosedSurfaceRepresentation()
    return node


def empty(scene: Any, volume: Any) -> Any:
    return scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "empty")


def without_display(scene: Any, volume: Any) -> Any:
    node = empty(scene, volume)
    node.GetSegmentation().SetSourceRepresentationName(SURFACE)
    for i in range(node.GetNumberOfDisplayNodes()):
        scene.RemoveNode(node.GetNthDisplayNode(i))
    return node


# ----------------------------------------------------------------------------------------------------- while it is written


@pytest.mark.parametrize("start", ["new", "empty", "without display", "rich", "rich without surfaces"])
@pytest.mark.parametrize("replace", [True, False])
def test_closed_after_any_piece_the_scene_is_as_before(scene: Any, volume: Any, labels: np.ndarray, start: str, replace: bool) -> None:
    node = {
        "new": lambda: None,
        "empty": lambda: empty(scene, volume),
        "without display": lambda: without_display(scene, volume),
        "rich": lambda: rich(scene, volume, labels),
        "rich without surfaces": lambda: rich(scene, volume, labels, False),
    }[start]()
    prediction = predicted(volume, np.roll(labels, 1, 1))
    before = fingerprint(scene)
    for pieces in range(1000):
        steps = write_prediction_steps(prediction, volume, node, replace)
        try:
            for _ in range(pieces):
                next(steps)
        except StopIteration:
            break
        steps.close()
        assert fingerprint(scene) == before, pieces
    assert pieces > 3
    assert fingerprint(scene) != before


def test_a_failure_midway_leaves_the_scene_as_before(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node = rich(scene, volume, labels)
    before = fingerprint(scene)
    for target in (node, None):
        steps = write_prediction_steps(predicted(volume, np.roll(labels, 1, 1)), volume, target)
        with pytest.raises(RuntimeError, match="from outside"):
            while True:
                if fingerprint(scene) != before:
                    steps.throw(RuntimeError("from outside"))
                next(steps)
        assert fingerprint(scene) == before


def test_what_was_hardened_since_is_undone_where_it_is_now(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node, undo = rich(scene, volume, labels), Undo(scene)
    before = {name: read_back(node, name, volume) for name in segments(node)}
    colors = [node.GetSegmentation().GetNthSegment(i).GetColor() for i in range(len(before))]
    undo.begin(node)
    write_prediction(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    undo.commit([node])
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = rotation(40), (5, 6, 7)
    transform = add_transform(move)
    for each in (node, volume):
        each.SetAndObserveTransformNodeID(transform.GetID())
        each.HardenTransform()
    undo.undo()
    assert list(segments(node)) == list(before)
    for name, mask in before.items():
        assert np.array_equal(read_back(node, name, volume), mask), name
    assert [node.GetSegmentation().GetNthSegment(i).GetColor() for i in range(len(before))] == colors
    surface = node.GetSegmentation().GetSegment(segments(node)["nodule"]).GetRepresentation(SURFACE)
    where = np.argwhere(before["nodule"])
    x, y, z = image_from_volume(volume).index_to_point(where.mean(0)[::-1])
    assert np.allclose(np.reshape(surface.GetBounds(), (3, 2)).mean(1), (-x, -y, z), atol=0.5)
    assert_no_orphans(node)


def test_a_generator_that_is_dropped_is_closed(scene: Any, volume: Any, labels: np.ndarray) -> None:
    before = fingerprint(scene)
    steps = write_prediction_steps(predicted(volume, labels), volume)
    while fingerprint(scene) == before:
        next(steps)
    del steps
    assert fingerprint(scene) == before


@pytest.mark.parametrize("gone", ["volume", "segmentation", "scene"])
@pytest.mark.parametrize("pieces", [1, -1])
def test_a_node_that_goes_meanwhile_ends_the_writing(scene: Any, volume: Any, labels: np.ndarray, gone: str, pieces: int) -> None:
    node = rich(scene, volume, labels)
    prediction = predicted(volume, np.roll(labels, 1, 1))
    steps = write_prediction_steps(prediction, volume, node)
    before, changed = fingerprint(scene), False
    while not changed:  # up to the first change
        next(steps)
        changed = pieces == 1 or fingerprint(scene) != before
    if gone == "scene":
        scene.Clear(0)
    else:
        scene.RemoveNode(volume if gone == "volume" else node)
    with pytest.raises(UserError, match="was removed while its result was written; nothing was written"):
        list(steps)
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode", scene) or gone == "volume"
    if gone == "volume":
        assert list(segments(node)) == ["nodule", "lung, corrected", "cyst", "over", "beside"]


def test_what_a_person_draws_meanwhile_stays(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node = rich(scene, volume, labels, False)
    prediction = predicted(volume, np.roll(labels, 1, 1))
    steps = write_prediction_steps(prediction, volume, node)
    for _ in range(3):
        next(steps)
    drawn = ball(SHAPE, (1, 9, 11), 2) | ball(SHAPE, (8, 0, 0), 2)
    # Onto the layer that "beside" shares with the results that are about to be replaced.
    draw(node, segments(node)["beside"], drawn, volume, add=True)
    complete(steps)
    assert np.array_equal(read_back(node, "beside", volume), drawn)
    assert np.array_equal(read_back(node, "nodule", volume), np.roll(labels, 1, 1) == 1)
    assert_no_orphans(node)


def test_segments_that_are_edited_or_removed_at_any_moment(scene: Any, volume: Any, labels: np.ndarray) -> None:
    moved, drawn = np.roll(labels, 1, 1), ball(SHAPE, (1, 9, 11), 2)
    editor = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor.SetOverwriteMode(editor.OverwriteNone)
    editor.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedOutsideAllSegments)
    for act in (
        lambda node, ids: draw(node, ids["over"], drawn, volume, add=True),
        lambda node, ids: draw(node, ids["beside"], drawn, volume, add=True),
        lambda node, ids: node.GetSegmentation().RemoveSegment(ids["beside"]),
        lambda node, ids: node.GetSegmentation().RemoveSegment(ids["cyst"]),
        lambda node, ids: node.GetSegmentation().SeparateSegmentLabelmap(ids["beside"]),
    ):
        for pieces in range(1000):
            node = rich(scene, volume, labels, False)
            ids = segments(node)
            editor.SetAndObserveSegmentationNode(node)
            steps = write_prediction_steps(predicted(volume, moved, (NODULE, LUNG, CYST)), volume, node, True, editor)
            before = fingerprint(scene)
            try:
                for _ in range(pieces):
                    next(steps)
            except StopIteration:
                break
            if fingerprint(scene) != before:
                break
            act(node, ids)
            others = {name: read_back(node, name, volume) for name in ("over", "beside", "lung, corrected") if name in segments(node)}
            complete(steps)
            area = ~np.any(list(others.values()), axis=0)
            assert np.array_equal(read_back(node, "lung", volume), (moved == 2) & area)
            for name, mask in others.items():
                assert np.array_equal(read_back(node, name, volume), mask)
            assert_no_orphans(node)
            scene.RemoveNode(node)
        assert pieces > 5


def test_nodes_that_are_moved_meanwhile(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node = rich(scene, volume, labels, False)
    before = fingerprint(scene)
    steps = write_prediction_steps(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    next(steps)
    transform, move = volume.GetParentTransformNode(), np.eye(4)
    move[:3, 3] = (0, 0, 40)
    volume.SetAndObserveTransformNodeID(add_transform(move).GetID())
    with pytest.raises(UserError, match="lies elsewhere than volume 'CT', which was moved"):
        list(steps)
    scene.RemoveNode(volume.GetParentTransformNode())
    volume.SetAndObserveTransformNodeID(transform.GetID())
    assert fingerprint(scene) == before

    steps = write_prediction_steps(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    next(steps)
    node.SetAndObserveTransformNodeID(add_transform(move).GetID())
    complete(steps)
    assert np.array_equal(segment_mask(node, segments(node)["nodule"], volume), np.roll(labels, 1, 1) == 1)


# ------------------------------------------------------------------------------------------------------------------- later


@pytest.mark.parametrize("surfaces", [False, True])
@pytest.mark.parametrize("replace", [True, False])
def test_former_segments_come_back_exactly(scene: Any, volume: Any, labels: np.ndarray, surfaces: bool, replace: bool) -> None:
    node = rich(scene, volume, labels, surfaces)
    undo = Undo(scene)
    before = fingerprint(scene)
    undo.begin(node)
    # Without a cyst: with replace, that segment goes.
    write_prediction(predicted(volume, np.roll(labels, 1, 1), (NODULE, LUNG, CYST), "lung-2d-2.0.0"), volume, node, replace)
    undo.commit([node])
    assert ("cyst" in segments(node)) is not replace
    after = fingerprint(scene)
    assert after != before and undo.can_undo
    undo.undo()
    assert fingerprint(scene) == before
    assert not undo.can_undo
    undo.undo()  # nothing left: nothing happens
    assert fingerprint(scene) == before


@pytest.mark.parametrize("make", [None, empty, without_display])
def test_a_first_result_is_taken_back_with_all_that_came_with_it(scene: Any, volume: Any, labels: np.ndarray, make: Any) -> None:
    target = make and make(scene, volume)
    before = fingerprint(scene)
    undo = Undo(scene)
    undo.begin(target)
    prediction = predicted(volume, labels)
    node = write_prediction(prediction, volume, target)
    doubt = write_scalar_map(prediction.labels.like(np.ones(SHAPE, np.float32)), volume, "doubt", "uncertainty")
    table = write_measures([row("nodule")], node)
    undo.commit([node, doubt, table])
    undo.undo()
    assert fingerprint(scene) == before


def test_one_step_for_each_action_latest_first(scene: Any, volume: Any, labels: np.ndarray) -> None:
    undo, prints, node = Undo(scene), [], None
    for shift in range(4):
        prints.append(fingerprint(scene))
        undo.begin(node, [find_map(volume, "uncertainty"), node and find_table(node)])
        prediction = predicted(volume, np.roll(labels, shift, 1))
        node = write_prediction(prediction, volume, node)
        values = np.full(SHAPE, shift / 4, np.float32)
        doubt = write_scalar_map(prediction.labels.like(values), volume, "doubt", "uncertainty", Box((0, 0, 0), (3 + shift, 4, 5)))
        undo.commit([node, doubt, write_measures([row("nodule", 10 + shift)], node)])
    while undo.can_undo:
        undo.undo()
        assert fingerprint(scene) == prints.pop()
    assert not prints


def test_the_segment_editors_undo_takes_back_a_prediction_alone(
    scene: Any, volume: Any, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, other = (rich(scene, volume, labels) for _ in range(2))
    history = slicer.vtkSegmentationHistory()
    history.SetSegmentation(node.GetSegmentation())
    editor = SimpleNamespace(segmentationNode=lambda: node, saveStateForUndo=history.SaveState)
    monkeypatch.setattr(slicer.modules, "SegmentEditorWidget", SimpleNamespace(editor=editor), raising=False)
    mine = segments(node)["beside"]
    history.SaveState()
    draw(node, mine, ball(SHAPE, (3, 3, 3), 2), volume)
    drawn = segment_mask(node, mine, volume)
    write_prediction(predicted(volume, labels), volume, other)
    assert history.GetNumberOfStates() == 1  # that is of another segmentation
    names = set(segments(node))
    write_prediction(predicted(volume, labels), volume, node, replace=False)
    assert set(segments(node)) > names and history.GetNumberOfStates() == 2
    assert history.RestorePreviousState()
    assert set(segments(node)) == names and np.array_equal(segment_mask(node, mine, volume), drawn)


def test_the_segment_editors_undo_brings_a_removed_segment_back(
    scene: Any, volume: Any, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = rich(scene, volume, labels)
    history = slicer.vtkSegmentationHistory()
    history.SetSegmentation(node.GetSegmentation())
    editor = SimpleNamespace(segmentationNode=lambda: node, saveStateForUndo=history.SaveState)
    monkeypatch.setattr(slicer.modules, "SegmentEditorWidget", SimpleNamespace(editor=editor), raising=False)
    names = list(segments(node))
    remove_segment(node, segments(node)[names[0]])
    assert list(segments(node)) == names[1:] and history.RestorePreviousState() and sorted(segments(node)) == sorted(names)


@pytest.mark.parametrize("clicked", [False, True])
def test_the_segment_editors_undo_takes_back_a_stroke_on_what_was_written_last(
    scene: Any, volume: Any, monkeypatch: pytest.MonkeyPatch, clicked: bool
) -> None:
    """A saved state takes data that are older than the one before for the same, which written ones were, and those that came back."""
    node, undo = scene.AddNewNodeByClass("vtkMRMLSegmentationNode"), Undo(scene)
    history = slicer.vtkSegmentationHistory()
    history.SetSegmentation(node.GetSegmentation())
    editor = SimpleNamespace(segmentationNode=lambda: node, saveStateForUndo=history.SaveState)
    monkeypatch.setattr(slicer.modules, "SegmentEditorWidget", SimpleNamespace(editor=editor), raising=False)
    first, second = (ball(SHAPE, (4, 5, 6), radius) for radius in (2, 4))

    def write(mask: np.ndarray) -> None:
        undo.begin(node)
        if clicked:
            complete(write_clicked_steps(mask, (0, 0, 0), volume, node, next(iter(segments(node).values()), None)))
        else:
            write_prediction(predicted(volume, mask), volume, node)
        undo.commit()

    def drawn_and_taken_back() -> np.ndarray:
        mine = next(iter(segments(node).values()))
        history.SaveState()
        draw(node, mine, np.ones(SHAPE, np.uint8), volume)
        assert segment_mask(node, mine, volume).all() and history.RestorePreviousState()
        return segment_mask(node, mine, volume)

    write(first)
    write(second)
    assert np.array_equal(drawn_and_taken_back(), second)
    write(first)
    undo.undo()
    assert np.array_equal(drawn_and_taken_back(), second)


def test_steps_beyond_the_limit_are_forgotten(scene: Any, volume: Any, labels: np.ndarray) -> None:
    undo = Undo(scene, limit=2)
    node = write_prediction(predicted(volume, labels), volume)
    for shift in (1, 2, 3):
        undo.begin(node)
        write_prediction(predicted(volume, np.roll(labels, shift, 1)), volume, node)
        undo.commit()
    for shift in (2, 1):
        undo.undo()
        assert np.array_equal(read_back(node, "lung", volume), np.roll(labels, shift, 1) == 2)
    assert not undo.can_undo


@pytest.mark.parametrize("again", [True, False])
def test_steps_beyond_so_many_bytes_of_maps_are_forgotten_but_the_last(scene: Any, volume: Any, again: bool) -> None:
    image, size = image_from_volume(volume), 4 * int(np.prod(SHAPE))
    doubt = write_scalar_map(image.like(np.zeros(SHAPE, np.float32)), volume, "doubt", "uncertainty")
    for limit_bytes, kept in ((4 * size, 3), (2 * size + 4096, 2), (0, 1)):
        undo = Undo(scene, limit_bytes=limit_bytes)
        for run in (1, 2, 3):
            undo.begin(None, [doubt])
            if again:  # else the same voxels are in all steps and in the scene, and are no burden
                write_scalar_map(image.like(np.full(SHAPE, run / 4, np.float32)), volume, "doubt", "uncertainty")
            undo.commit([doubt])
        for run in (2, 1, 0)[: kept if again else 3]:
            assert undo.can_undo
            undo.undo()
            assert not again or image_from_volume(doubt).array.max() == run / 4
        assert not undo.can_undo  # and the panel's button is off
        write_scalar_map(image.like(np.zeros(SHAPE, np.float32)), volume, "doubt", "uncertainty")


@pytest.mark.parametrize("surfaces", [False, True])
def test_what_a_person_did_since_to_other_segments_stays(scene: Any, volume: Any, labels: np.ndarray, surfaces: bool) -> None:
    node = rich(scene, volume, labels, surfaces)
    former = {name: read_back(node, name, volume) for name in segments(node)}
    ids = segments(node)
    undo = Undo(scene)
    undo.begin(node)
    write_prediction(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    undo.commit([node])

    drawn = ball(SHAPE, (1, 9, 11), 2) | ball(SHAPE, (8, 0, 0), 2)
    for name in ("beside", "nodule"):
        draw(node, ids[name], drawn, volume)
    node.GetSegmentation().GetSegment(ids["over"]).SetName("over, renamed")
    node.GetSegmentation().GetSegment(ids["cyst"]).SetColor(1, 1, 0)
    far = ball(SHAPE, (0, 0, 12), 1)
    add_segment(node, "later", far, volume)  # comes into the layer of the new result
    node.GetSegmentation().RemoveSegment(ids["lung, corrected"])

    undo.undo()
    assert list(segments(node)) == ["nodule", "cyst", "over, renamed", "beside", "later"]
    assert np.array_equal(read_back(node, "nodule", volume), former["nodule"]), "what was drawn on the result goes with it"
    assert np.array_equal(read_back(node, "cyst", volume), former["cyst"])
    assert node.GetSegmentation().GetSegment(ids["cyst"]).GetColor() == (1, 1, 0)
    assert np.array_equal(read_back(node, "over, renamed", volume), former["over"])
    assert np.array_equal(read_back(node, "beside", volume), drawn)
    assert np.array_equal(read_back(node, "later", volume), far)
    assert_no_orphans(node)
    names = {i: [n for n in representations(node, i)] for i in segments(node).values()}
    assert len(set(map(tuple, names.values()))) == 1, names


def test_what_a_person_said_of_a_result_since_stays(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node, undo = rich(scene, volume, labels), Undo(scene)
    former, nodule = read_back(node, "nodule", volume), node.GetSegmentation().GetSegment(segments(node)["nodule"])
    undo.begin(node)
    write_prediction(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    undo.commit([node])
    nodule.SetName("RUL apex")
    nodule.SetColor(0, 0, 1)
    said = {"Segmentation.Status": "completed", "TerminologyEntry": "mine"}
    for key, value in said.items():
        nodule.SetTag(key, value)
    undo.undo()
    assert nodule.GetColor() == (0, 0, 1) and {key: tag(nodule, key) for key in said} == said
    assert np.array_equal(read_back(node, "RUL apex", volume), former)


def representations(node: Any, segment_id: str) -> list[str]:
    out: list[str] = []
    node.GetSegmentation().GetSegment(segment_id).GetContainedRepresentationNames(out)
    return out


@pytest.mark.parametrize("had", [False, True])
def test_surfaces_switched_on_or_off_since_are_as_they_are_now(scene: Any, volume: Any, labels: np.ndarray, had: bool) -> None:
    node = rich(scene, volume, labels, had)
    undo = Undo(scene)
    undo.begin(node)
    write_prediction(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    undo.commit()
    (node.RemoveClosedSurfaceRepresentation if had else node.CreateClosedSurfaceRepresentation)()
    undo.undo()
    for segment_id in segments(node).values():
        surface = node.GetSegmentation().GetSegment(segment_id).GetRepresentation(SURFACE)
        assert (surface is None) if had else surface.GetNumberOfPoints() > 0


def test_a_new_node_in_which_a_person_drew_stays_with_that(scene: Any, volume: Any, labels: np.ndarray) -> None:
    undo = Undo(scene)
    undo.begin()
    node = write_prediction(predicted(volume, labels), volume)
    undo.commit([node])
    mine = ball(SHAPE, (4, 5, 7), 3)
    add_segment(node, "mine", mine, volume)
    undo.undo()
    assert list(segments(node)) == ["mine"]
    assert np.array_equal(read_back(node, "mine", volume), mine)
    assert_no_orphans(node)


@pytest.mark.parametrize("gone", ["node", "scene"])
def test_steps_are_forgotten_with_their_nodes(scene: Any, volume: Any, labels: np.ndarray, gone: str) -> None:
    undo = Undo(scene)
    node = write_prediction(predicted(volume, labels), volume)
    undo.begin(node)
    write_prediction(predicted(volume, np.roll(labels, 1, 1)), volume, node)
    undo.commit([node])
    assert undo.can_undo
    scene.Clear(0) if gone == "scene" else scene.RemoveNode(node)
    assert not undo.can_undo
    undo.undo()
    other = add_volume(np.zeros(SHAPE, np.int16))
    undo.begin()
    again = write_prediction(predicted(other, labels), other)
    undo.commit([again])
    undo.undo()
    assert again.GetScene() is None


def test_a_further_undo_is_called_and_commit_needs_begin(scene: Any, volume: Any, labels: np.ndarray) -> None:
    undo, called = Undo(scene), []
    with pytest.raises(RuntimeError, match="without begin"):
        undo.commit()
    undo.begin()
    undo.commit([write_prediction(predicted(volume, labels), volume)], lambda: called.append(1))
    undo.undo()
    assert called == [1]


def test_a_map_that_was_closed_midway_changed_nothing(scene: Any, volume: Any) -> None:
    image = image_from_volume(volume).like(np.ones(SHAPE, np.float32))
    before = fingerprint(scene)
    steps = write_map_steps(image, volume, "uncertainty")
    next(steps)
    steps.close()
    assert fingerprint(scene) == before
    steps = write_map_steps(image, volume, "uncertainty")
    next(steps)
    scene.RemoveNode(volume)
    with pytest.raises(UserError, match="'CT' was removed"):
        next(steps)


def row(name: str, voxels: int = 10) -> dict[str, Any]:
    keys = ("longest_mm", "perpendicular_mm", "mean_hu", "std_hu", "min_hu", "max_hu")
    return {"name": name, "voxels": voxels, "volume_ml": voxels / 1000, **dict.fromkeys(keys, 1.5)}
