"""Sequences: a segmentation for every frame, on Slicer's own sequence and browser nodes."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")

import vtk  # noqa: E402
from mrml_scenes import (  # noqa: E402
    LUNG,
    NODULE,
    SHAPE,
    SURFACE,
    add_segment,
    add_transform,
    add_volume,
    ball,
    draw,
    fingerprint,
    geometry,
    predicted,
    read_back,
    rotation,
    segments,
    snapshot,
)
from UNetSegmentationLib.image import UserError  # noqa: E402
from UNetSegmentationLib.measure import measure  # noqa: E402
from UNetSegmentationLib.mrml import (  # noqa: E402
    SequenceOutput,
    Undo,
    complete,
    image_from_volume,
    remeasure_steps,
    segment_mask,
    sequence_frames,
    write_measures,
    write_prediction,
)

FRAMES = 3


@pytest.fixture
def volume(scene: Any) -> Any:
    """The volume that a browser steps through three frames, at the second of them, under a transform."""
    sequence = scene.AddNewNodeByClass("vtkMRMLSequenceNode", "4D CT")
    sequence.SetIndexName("time")
    sequence.SetIndexUnit("s")
    frame = add_volume(np.zeros(SHAPE, np.int16), geometry(rotation() * (1, 1, -1)), "frame")
    for i in range(FRAMES):
        slicer.util.updateVolumeFromArray(frame, np.full(SHAPE, i, np.int16))
        sequence.SetDataNodeAtValue(frame, f"{i * 0.5}")
    scene.RemoveNode(frame)
    browser = scene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "Browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    browser.SetSelectedItemNumber(1)
    node = browser.GetProxyNode(sequence)
    node.SetAndObserveTransformNodeID(add_transform(np.eye(4)).GetID())
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    hierarchy.CreateItem(hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study"), node)
    return node


def run(volume: Any, labels: np.ndarray, node: Any = None, replace: bool = True, editor: Any = None) -> SequenceOutput:
    """All frames written; the labels of frame i lie i voxels to the right."""
    output = SequenceOutput(volume, node, replace, editor)
    for frame in range(output.frames):
        output.show(frame)
        assert image_from_volume(volume).array[0, 0, 0] == frame
        complete(output.write_steps(frame, predicted(volume, np.roll(labels, frame, 2))))
    return output


def mask_of(node: Any, name: str, volume: Any) -> np.ndarray:
    """As read_back(), which leaves a display node in the scene."""
    return segment_mask(node, segments(node)[name], volume)


def without_playback(xml: str) -> str:
    """Slicer's browser node keeps the playback settings of sequences that have left it."""
    return re.sub(r'\s*SynchronizationPropertiesMap[1-9]="[^"]*"\s*', " ", xml)


def each(browser: Any) -> Any:
    for frame in range(FRAMES):
        browser.SetSelectedItemNumber(frame)
        yield frame


def test_a_volume_knows_its_frames(scene: Any, volume: Any) -> None:
    browser, count = sequence_frames(volume) or (None, 0)
    assert browser.GetName() == "Browser" and count == FRAMES
    alone = add_volume(np.zeros(SHAPE, np.int16), name="alone")
    assert sequence_frames(alone) is None
    with pytest.raises(UserError, match="Volume 'alone' is not part of a sequence; apply"):
        SequenceOutput(alone)


def test_every_frame_has_its_own_segments(scene: Any, volume: Any, labels: np.ndarray) -> None:
    before = snapshot(scene)
    browser, _count = sequence_frames(volume)
    browser.SetPlaybackActive(True)  # would go on to another frame while one is read
    output = run(volume, labels)
    assert snapshot(scene) == before, "nothing is in the scene until finish()"
    node = output.finish()
    assert output.browser is browser and not browser.GetPlaybackActive()
    assert browser.GetSelectedItemNumber() == 1, "the frame that was shown at first"
    for frame in each(browser):
        assert image_from_volume(volume).array[0, 0, 0] == frame
        assert list(segments(node)) == ["nodule", "lung"]
        for label in (NODULE, LUNG):
            assert np.array_equal(read_back(node, label.name, volume), np.roll(labels, frame, 2) == label.value)
        segment = node.GetSegmentation().GetSegment(segments(node)["nodule"])
        assert segment.GetColor() == pytest.approx([c / 255 for c in NODULE.color])
        assert node.GetSegmentation().GetConversionParameter("Reference image geometry")
    sequence = browser.GetSequenceNode(node)
    assert sequence.GetNumberOfDataNodes() == FRAMES
    assert (sequence.GetIndexName(), sequence.GetIndexUnit()) == ("time", "s")
    assert node.GetParentTransformNode() is volume.GetParentTransformNode()
    assert node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole()) is volume
    assert node.GetDisplayNode() is not None
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) == hierarchy.GetItemParent(hierarchy.GetItemByDataNode(volume))
    # One proxy, and not another for every frame.
    assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode", scene)) == 1


def test_corrections_stay_with_their_frame(scene: Any, volume: Any, labels: np.ndarray) -> None:
    output = run(volume, labels)
    node = output.finish()
    drawn = ball(SHAPE, (2, 2, 2), 2)
    output.browser.SetSelectedItemNumber(0)
    draw(node, segments(node)["nodule"], drawn, volume)
    add_segment(node, "mine", drawn, volume)
    output.browser.SetSelectedItemNumber(2)
    assert np.array_equal(read_back(node, "nodule", volume), np.roll(labels, 2, 2) == 1) and "mine" not in segments(node)
    output.browser.SetSelectedItemNumber(0)
    assert np.array_equal(read_back(node, "nodule", volume), drawn)
    assert np.array_equal(read_back(node, "mine", volume), drawn)


def test_the_measures_of_all_frames_outlive_their_browser(scene: Any, volume: Any, labels: np.ndarray) -> None:
    output = run(volume, labels)
    node = output.finish()
    rows = [{**m, "name": f"{m['name']}, frame 1"} for m in measure(predicted(volume, labels).labels, (NODULE, LUNG))]
    table = write_measures(rows, node, volume)
    scene.RemoveNode(output.browser)
    complete(remeasure_steps(node))
    assert [table.GetCellText(i, 0) for i in range(table.GetNumberOfRows())] == ["nodule, frame 1", "lung, frame 1"]


@pytest.mark.parametrize("replace", [True, False])
def test_a_second_run_writes_into_the_same_sequence(scene: Any, volume: Any, labels: np.ndarray, replace: bool) -> None:
    first = run(volume, labels)
    node = first.finish()
    mine = ball(SHAPE, (4, 5, 7), 3)
    for _ in each(first.browser):
        add_segment(node, "mine", mine, volume)
    first.browser.SetSelectedItemNumber(2)
    before, nodes = fingerprint(scene), scene.GetNumberOfNodes()

    moved = np.roll(labels, 1, 1)
    undo = Undo(scene)
    second = run(volume, moved, node, replace)
    second.show()
    assert fingerprint(scene) == before
    undo.begin(node)
    assert second.finish() is node
    undo.commit([node], second.revert)
    assert scene.GetNumberOfNodes() == nodes
    for frame in each(first.browser):
        assert np.array_equal(mask_of(node, "nodule" if replace else "nodule 2", volume), np.roll(moved, frame, 2) == 1)
        assert np.array_equal(mask_of(node, "mine", volume), mine)
        assert list(segments(node)) == ["nodule", "lung", "mine", *([] if replace else ["nodule 2", "lung 2"])]

    undo.undo()
    first.browser.SetSelectedItemNumber(2)
    assert fingerprint(scene) == before
    for frame in each(first.browser):
        assert np.array_equal(read_back(node, "nodule", volume), np.roll(labels, frame, 2) == 1)
        assert np.array_equal(read_back(node, "mine", volume), mine)


def test_the_editors_limits_hold_in_every_frame(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node = run(volume, labels).finish()
    browser, _ = sequence_frames(volume) or (None, 0)
    for frame in each(browser):
        add_segment(node, "mine", ball(SHAPE, (4, 5, 5 + frame), 2), volume)
    editor = scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    editor.SetAndObserveSegmentationNode(node)
    editor.SetOverwriteMode(editor.OverwriteAllSegments)
    run(volume, np.roll(labels, 1, 1), node, editor=editor).finish()
    for frame in each(browser):
        expected = (np.roll(labels, (1, frame), (1, 2)) == 2) & (ball(SHAPE, (4, 5, 5 + frame), 2) == 0)
        assert np.array_equal(read_back(node, "lung", volume), expected)


def test_undo_takes_the_sequence_away(scene: Any, volume: Any, labels: np.ndarray) -> None:
    before = fingerprint(scene)
    undo = Undo(scene)
    output = run(volume, labels)
    undo.begin()
    node = output.finish()
    undo.commit([node], output.revert)
    undo.undo()
    after = fingerprint(scene)
    after["nodes"] = without_playback(after["nodes"])
    assert after == before | {"nodes": without_playback(before["nodes"])}
    assert node.GetScene() is None and not undo.can_undo


@pytest.mark.parametrize("again", [False, True])
def test_undo_leaves_what_a_person_drew_meanwhile(scene: Any, volume: Any, labels: np.ndarray, again: bool) -> None:
    node, undo = run(volume, labels).finish() if again else None, Undo(scene)
    browser, mine = sequence_frames(volume)[0], ball(SHAPE, (4, 5, 7), 3)  # type: ignore[index]
    for _ in each(browser) if again else ():
        add_segment(node, "kept", mine, volume)
    browser.SetSelectedItemNumber(1)
    output = run(volume, np.roll(labels, 1, 1), node)
    undo.begin(node)
    node = output.finish()
    undo.commit([node], output.revert)
    for frame in (0, 2):  # not in the one that is shown at first
        browser.SetSelectedItemNumber(frame)
        add_segment(node, "mine", mine, volume)
        if again:
            draw(node, segments(node)["kept"], np.roll(mine, 1, 0), volume)
    browser.SetSelectedItemNumber(1)
    undo.undo()
    for frame in each(browser):
        names = (["nodule", "lung", "kept"] if again else []) + ["mine"] * (frame != 1)
        assert list(segments(node)) == names and node.GetScene() is scene
        if frame != 1:
            assert np.array_equal(mask_of(node, "mine", volume), mine)
        if again:
            assert np.array_equal(mask_of(node, "kept", volume), np.roll(mine, frame != 1, 0))
            assert np.array_equal(mask_of(node, "nodule", volume), np.roll(labels, frame, 2) == 1)


@pytest.mark.parametrize("kept", [True, False])
def test_undo_reaches_the_frame_that_was_written_though_another_is_shown(scene: Any, volume: Any, labels: np.ndarray, kept: bool) -> None:
    node, undo = run(volume, labels).finish(), Undo(scene)
    browser = sequence_frames(volume)[0]  # type: ignore[index]
    if not kept:  # another's sequence, of whose frames the node shows copies
        browser.SetSaveChanges(browser.GetSequenceNode(node), False)
        node.SetAndObserveSegmentation(slicer.vtkSegmentation())
    browser.SetSelectedItemNumber(0)
    undo.begin(node)
    write_prediction(predicted(volume, np.roll(labels, 3, 1)), volume, node)
    undo.commit([node])
    browser.SetSelectedItemNumber(2 if kept else 0)
    undo.undo()
    browser.SetSelectedItemNumber(0)
    assert np.array_equal(mask_of(node, "nodule", volume), labels == 1)


@pytest.mark.parametrize("drawn", [True, False])
def test_runs_of_all_frames_are_undone_one_after_the_other(scene: Any, volume: Any, labels: np.ndarray, drawn: bool) -> None:
    node, undo, browser = None, Undo(scene), sequence_frames(volume)[0]  # type: ignore[index]
    mine = ball(SHAPE, (4, 5, 7), 3)
    for shift in range(3):
        output = run(volume, np.roll(labels, shift, 1), node)
        undo.begin(node)
        node = output.finish()
        undo.commit([node], output.revert)
        for _ in each(browser) if drawn and not shift else ():
            add_segment(node, "mine", mine, volume)
    for shift in (1, 0):
        browser.SetSelectedItemNumber(shift)
        undo.undo()
        for frame in each(browser):
            assert np.array_equal(mask_of(node, "nodule", volume), np.roll(labels, (shift, frame), (1, 2)) == 1)
    undo.undo()
    assert (node.GetScene() is scene) == drawn
    for _ in each(browser) if drawn else ():
        assert list(segments(node)) == ["mine"] and np.array_equal(mask_of(node, "mine", volume), mine)


def test_undo_moves_what_was_hardened_meanwhile_once(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node, undo, browser = run(volume, labels).finish(), Undo(scene), sequence_frames(volume)[0]  # type: ignore[index]
    browser.SetSelectedItemNumber(2)

    def place() -> float:
        world = vtk.vtkMatrix4x4()
        node.GetSegmentation().GetSegment(segments(node)["nodule"]).GetRepresentation("Binary labelmap").GetImageToWorldMatrix(world)
        return float(world.GetElement(0, 3))

    output = run(volume, np.roll(labels, 3, 2), node)
    undo.begin(node)
    undo.commit([output.finish()], output.revert)
    before, move = place(), np.eye(4)
    move[0, 3] = 50
    node.SetAndObserveTransformNodeID(add_transform(move).GetID())
    node.HardenTransform()
    undo.undo()
    assert place() == pytest.approx(before + 50)


def test_frames_that_were_not_written_keep_what_they_had(scene: Any, volume: Any, labels: np.ndarray) -> None:
    output = SequenceOutput(volume)
    complete(output.write_steps(1, predicted(volume, labels)))
    node = output.finish()
    for frame in each(output.browser):
        assert list(segments(node)) == (["nodule", "lung"] if frame == 1 else [])
    again = SequenceOutput(volume, node)
    complete(again.write_steps(2, predicted(volume, labels)))
    again.finish()
    for frame in each(output.browser):
        assert list(segments(node)) == (["nodule", "lung"] if frame else [])


def test_a_segmentation_of_another_kind_is_refused(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node = write_prediction(predicted(volume, labels), volume)
    with pytest.raises(UserError, match="'4D CT segmentation' does not follow the volume's frames; choose"):
        SequenceOutput(volume, node)


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_ends_early_or_fails_leaves_all_as_it_was(scene: Any, volume: Any, labels: np.ndarray, again: bool) -> None:
    node = run(volume, labels).finish() if again else None
    if node is not None:
        for _ in each(sequence_frames(volume)[0]):  # type: ignore[index]
            node.CreateClosedSurfaceRepresentation()
    before = fingerprint(scene)
    output = SequenceOutput(volume, node)
    output.show(0)
    steps = output.write_steps(0, predicted(volume, np.roll(labels, 1, 1)))
    next(steps)
    steps.close()
    output.show()
    assert fingerprint(scene) == before

    output = run(volume, np.roll(labels, 1, 1), node)
    output.show()
    assert fingerprint(scene) == before
    output._results[FRAMES - 1] = "no segmentation"
    with pytest.raises(TypeError):
        output.finish()
    after = fingerprint(scene)
    after["nodes"] = without_playback(after["nodes"])
    assert after == before | {"nodes": without_playback(before["nodes"])}


def test_segments_that_share_a_layer_outlive_the_runs(scene: Any, volume: Any, labels: np.ndarray) -> None:
    """Slicer erases a segment from the layer that it shares when a vtkSegmentation with it ends, as a copy of a frame's does."""
    node, undo = run(volume, labels).finish(), Undo(scene, 1)
    browser = sequence_frames(volume)[0]  # type: ignore[index]
    mine = {name: ball(SHAPE, place, 1) for name, place in {"a": (4, 1, 2), "b": (4, 1, 10)}.items()}

    def check() -> None:
        gc.collect()
        for frame in each(browser):
            for name, mask in {"nodule": np.roll(labels, frame, 2) == 1, **mine}.items():
                assert np.array_equal(mask_of(node, name, volume), mask), name

    for _ in each(browser):
        for name, mask in mine.items():
            add_segment(node, name, mask, volume)
    assert node.GetSegmentation().GetNumberOfLayers() == 1
    steps = SequenceOutput(volume, node).write_steps(2, predicted(volume, labels))
    next(steps)
    steps.close()  # cancelled in a frame, then after all of them
    del steps
    check()
    run(volume, labels, node)
    check()
    for _ in range(2):  # of which the first is forgotten
        output = run(volume, labels, node)
        undo.begin(node)
        undo.commit([output.finish()], output.revert)
        del output
        check()
    undo.undo()
    check()


@pytest.mark.parametrize("browser", [True, False])
def test_a_sequence_that_is_removed_meanwhile_is_named(scene: Any, volume: Any, labels: np.ndarray, browser: bool) -> None:
    output = run(volume, labels)
    node = output.browser if browser else output.browser.GetMasterSequenceNode()
    scene.RemoveNode(node)
    for act in (output.finish, lambda: complete(output.write_steps(1, predicted(volume, labels)))):
        with pytest.raises(UserError, match=f"'{node.GetName()}' was removed"):
            act()


def test_surfaces_follow_in_every_frame(scene: Any, volume: Any, labels: np.ndarray) -> None:
    node = run(volume, labels).finish()
    browser, _ = sequence_frames(volume) or (None, 0)
    for _ in each(browser):
        node.CreateClosedSurfaceRepresentation()
    run(volume, np.roll(labels, 1, 1), node).finish()
    for _ in each(browser):
        for segment_id in segments(node).values():
            surface = node.GetSegmentation().GetSegment(segment_id).GetRepresentation(SURFACE)
            assert surface.GetNumberOfPoints() > 0


def test_saved_frames_are_the_same_again(runtime: Any, scene: Any, volume: Any, labels: np.ndarray, tmp_path: Path) -> None:
    node = run(volume, labels).finish()
    sequence = sequence_frames(volume)[0].GetSequenceNode(node)  # type: ignore[index]
    # Reading a bundle goes through these, which Slicer has.
    remote, data_io = slicer.vtkMRMLRemoteIOLogic(), slicer.vtkDataIOManagerLogic()
    for logic in (remote, data_io):
        logic.SetMRMLApplicationLogic(runtime.application_logic)
        logic.SetMRMLScene(scene)
    remote.GetCacheManager().SetRemoteCacheDirectory(str(tmp_path / "cache"))
    data_io.SetAndObserveDataIOManager(remote.GetDataIOManager())
    remote.AddDataIOToScene()

    storage = scene.AddNewNodeByClass("vtkMRMLSequenceStorageNode")
    storage.SetFileName(str(tmp_path / "frames.seq.mrb"))
    loaded = scene.AddNewNodeByClass("vtkMRMLSequenceNode")
    try:
        assert storage.WriteData(sequence) == 1
        assert storage.ReadData(loaded) == 1
    finally:
        remote.RemoveDataIOFromScene()
    assert loaded.GetNumberOfDataNodes() == FRAMES
    for frame in range(FRAMES):
        data = loaded.GetNthDataNode(frame)
        data.SetAndObserveTransformNodeID(None)
        for label in (NODULE, LUNG):
            mask = segment_mask(data, segments(data)[label.name], volume)
            assert np.array_equal(mask, np.roll(labels, frame, 2) == label.value)
