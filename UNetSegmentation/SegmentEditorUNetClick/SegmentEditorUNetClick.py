"""A hidden module that registers the Segment Editor's effect "U-Net Click" when Slicer has started."""

from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import ScriptedLoadableModule, ScriptedLoadableModuleTest


class SegmentEditorUNetClick(ScriptedLoadableModule):
    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = "SegmentEditorUNetClick"
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = ["Segmentations", "UNetSegmentation"]
        self.parent.contributors = ["UNetSegmentation developers"]
        self.parent.hidden = True
        self.parent.helpText = _("This hidden module registers the Segment Editor effect U-Net Click.")
        self.parent.acknowledgementText = _("Models trained on LIDC-IDRI (CC BY 3.0).")
        slicer.app.connect("startupCompleted()", registerEditorEffect)


def registerEditorEffect() -> None:
    import qSlicerSegmentationsEditorEffectsPythonQt as effects

    effect = effects.qSlicerSegmentEditorScriptedEffect(None)
    source = Path(__file__).parent / "SegmentEditorUNetClickLib" / "SegmentEditorEffect.py"
    effect.setPythonSource(source.as_posix())
    effect.self().register()


class SegmentEditorUNetClickTest(ScriptedLoadableModuleTest):
    """An annotator's way in Slicer: choose the effect, click on the sample's nodule, undo."""

    NODULE_RAS = (21.7, 120.3, -612.5)  # the middle of the nodule of the first sample scan

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self, **_unused: Any) -> None:
        self.setUp()
        self.test_click()
        self.delayDisplay("Test passed")

    def test_click(self) -> None:
        from UNetSegmentationLib.measure import dice
        from UNetSegmentationLib.mrml import segment_mask

        from UNetSegmentation import UNetSegmentationTest, loadSample

        self.delayDisplay("Load the sample scan")
        nodes = loadSample()
        if not nodes:
            self.skipTest("the sample scans cannot be had here; see UNetSegmentationLib/sample.py")
        volume, truth = nodes
        segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        segmentation.CreateDefaultDisplayNodes()
        segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        segment = segmentation.GetSegmentation().AddEmptySegment("", "Nodule")

        self.delayDisplay("Open a Segment Editor")
        registerEditorEffect()  # where the test comes before the end of Slicer's start; a second one is refused
        widget = slicer.qMRMLSegmentEditorWidget()
        widget.setMRMLScene(slicer.mrmlScene)
        editor = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
        widget.setMRMLSegmentEditorNode(editor)
        widget.setSegmentationNode(segmentation)
        widget.setSourceVolumeNode(volume)
        widget.setCurrentSegmentID(segment)
        widget.show()
        try:
            widget.setActiveEffectByName("U-Net Click")
            scripted = widget.activeEffect()
            self.assertIsNotNone(scripted, "the effect is not registered")
            effect = scripted.self()

            self.delayDisplay("Click on the nodule")
            effect.click(self.NODULE_RAS)
            UNetSegmentationTest.wait(self, lambda: not effect.busy, 120, "the answer")
            found = segment_mask(segmentation, segment, volume)
            label = segment_mask(truth, truth.GetSegmentation().GetNthSegmentID(0), volume)
            self.delayDisplay(f"Dice {dice(found, label):.3f} {effect.message}")
            self.assertGreater(dice(found, label), 0.5)

            self.delayDisplay("Undo")
            widget.undo()
            self.assertFalse(segment_mask(segmentation, segment, volume).any())
        finally:
            widget.setActiveEffectByName("")
            widget.deleteLater()
