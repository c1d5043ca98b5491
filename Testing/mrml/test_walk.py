"""From a volume node to segments with a bundled model, through the module's logic, on real MRML nodes."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
from UNetSegmentationLib.image import UserError, read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import find_model

pytest.importorskip("slicer", reason="slicer-core is not installed")


@pytest.fixture
def logic(scene: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """UNetSegmentationLogic. The two base classes and tr() stand in for Slicer's Base/Python/slicer/ScriptedLoadableModule.py
    and i18n.py, which the wheel lacks; they hold nothing that process() uses."""
    base = types.ModuleType("slicer.ScriptedLoadableModule")
    base.ScriptedLoadableModule = base.ScriptedLoadableModuleLogic = type("Base", (), {"__init__": lambda self, parent=None: None})  # type: ignore[attr-defined]
    i18n = types.ModuleType("slicer.i18n")
    i18n.tr = lambda text: text  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slicer.ScriptedLoadableModule", base)
    monkeypatch.setitem(sys.modules, "slicer.i18n", i18n)
    sys.modules.pop("UNetSegmentation", None)
    import UNetSegmentation

    yield UNetSegmentation.UNetSegmentationLogic()
    sys.modules.pop("UNetSegmentation", None)


def load(path: Any) -> Any:
    """A volume node through Slicer's own reader."""
    import slicer

    return slicer.modules.volumes.logic().AddArchetypeVolume(str(path), "hippocampus", 0)


def test_a_volume_becomes_segments_that_are_the_prediction(scene: Any, logic: Any, data: Any) -> None:
    from UNetSegmentationLib import mrml

    path = data / "msd_hippocampus" / "images" / "hippocampus_003.nii.gz"
    volume = load(path)
    node = logic.process(volume, "hippocampus-3d", uncertainty=True)
    segmentation = node.GetSegmentation()
    assert segmentation.GetNumberOfSegments() == 2
    image = mrml.image_from_volume(volume)
    want = predict(image, [find_model("hippocampus-3d")]).labels.array
    for label in find_model("hippocampus-3d").card.labels:
        segment = segmentation.GetSegmentIdBySegmentName(label.name)
        assert np.array_equal(mrml.segment_mask(node, segment, volume) > 0, want == label.value)
    # The same patient read by SimpleITK, which keeps the file's axes, gives the same volumes.
    other = predict(read_image(path), [find_model("hippocampus-3d")]).labels.array
    assert np.array_equal(np.bincount(other.ravel()), np.bincount(want.ravel()))
    maps = [n for n in scene.GetNodesByClass("vtkMRMLScalarVolumeNode") if n.GetName() == "hippocampus uncertainty"]
    assert len(maps) == 1


def test_running_again_replaces_and_bad_input_changes_nothing(scene: Any, logic: Any, data: Any) -> None:
    volume = load(data / "msd_hippocampus" / "images" / "hippocampus_003.nii.gz")
    node = logic.process(volume, "hippocampus-3d", tta="none")
    before = scene.GetNumberOfNodes()
    assert logic.process(volume, "hippocampus-3d", node, tta="none") is node
    assert node.GetSegmentation().GetNumberOfSegments() == 2 and scene.GetNumberOfNodes() == before
    with pytest.raises(UserError, match="point lies outside"):
        logic.process(volume, "hippocampus-3d", at=(1e4, 0.0, 0.0))
    with pytest.raises(UserError, match="no model"):
        logic.process(volume, "liver")
    assert scene.GetNumberOfNodes() == before and node.GetSegmentation().GetNumberOfSegments() == 2


def test_options_are_those_of_predict() -> None:
    assert {"roi", "at", "tta", "uncertainty", "engine"} <= set(Options.__dataclass_fields__)
