"""From a volume node to segments, map, table and back, with a bundled model on real data. The module's logic, which does the
same, needs Slicer's Qt classes and is tested in ../panel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from UNetSegmentationLib.image import read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.measure import measure, uncertain_places
from UNetSegmentationLib.model import find_model

pytest.importorskip("slicer", reason="slicer-core is not installed")


def test_a_volume_becomes_segments_that_are_the_prediction(scene: Any, data: Any) -> None:
    import slicer
    from mrml_scenes import fingerprint, segments
    from UNetSegmentationLib import mrml

    path = data / "msd_hippocampus" / "images" / "hippocampus_003.nii.gz"
    volume = slicer.modules.volumes.logic().AddArchetypeVolume(str(path), "hippocampus", 0)
    before = fingerprint(scene)
    undo = mrml.Undo(scene)
    undo.begin()
    image, model = mrml.image_from_volume(volume), find_model("hippocampus-3d")
    prediction = predict(image, [model], Options(uncertainty=True))
    assert prediction.uncertainty is not None
    node = mrml.write_prediction(prediction, volume)
    doubt = mrml.write_scalar_map(prediction.uncertainty, volume, "doubt", "uncertainty", prediction.roi)
    table = mrml.write_measures(measure(prediction.labels, prediction.label_defs, image), node)
    undo.commit([node, doubt, table])

    assert node.GetSegmentation().GetNumberOfSegments() == 2
    for label in model.card.labels:
        mask = mrml.segment_mask(node, segments(node)[label.name], volume)
        assert np.array_equal(mask > 0, prediction.labels.array == label.value)
    # The same patient read by SimpleITK, which keeps the file's axes, gives the same volumes.
    other = predict(read_image(path), [model]).labels.array
    assert np.array_equal(np.bincount(other.ravel()), np.bincount(prediction.labels.array.ravel()))
    assert table.GetNumberOfRows() == 2
    written = mrml.image_from_volume(doubt)
    for place in uncertain_places(prediction.uncertainty, limit=5):
        x, y, z = (round(i) for i in written.point_to_index(place["point"]))
        assert written.array[z, y, x] == pytest.approx(place["peak"])

    # Again: the same nodes.
    known = scene.GetNumberOfNodes()
    assert mrml.write_prediction(prediction, volume, node) is node
    assert mrml.write_scalar_map(prediction.uncertainty, volume, "doubt", "uncertainty", prediction.roi) is doubt
    assert scene.GetNumberOfNodes() == known
    undo.undo()
    assert fingerprint(scene) == before


def test_options_are_those_of_predict() -> None:
    assert {"roi", "at", "tta", "uncertainty", "engine"} <= set(Options.__dataclass_fields__)
