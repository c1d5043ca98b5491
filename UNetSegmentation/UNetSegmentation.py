"""The Slicer module. Until its panel is built it is hidden, and serves the Python console and scripts by its logic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModule, ScriptedLoadableModuleLogic


class UNetSegmentation(ScriptedLoadableModule):
    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("U-Net Segmentation")
        self.parent.categories = ["Segmentation"]
        self.parent.contributors = ["UNetSegmentation developers"]
        self.parent.helpText = _("Segments volumes with U-Nets, without PyTorch and without a server. Not for diagnosis.")
        self.parent.acknowledgementText = _(
            "Models trained on LIDC-IDRI (CC BY 3.0) and the Medical Segmentation Decathlon (CC BY-SA 4.0)."
        )
        self.parent.hidden = True


class UNetSegmentationLogic(ScriptedLoadableModuleLogic):
    def process(
        self,
        volumeNode: Any,
        model: str | Sequence[str] = "lung-nodule-2d",
        segmentationNode: Any = None,
        replace: bool = True,
        progress: Callable[[float, str], None] | None = None,
        **options: Any,
    ) -> Any:
        """Segment a volume node and return the segmentation node.

        model: a name, a .unet.zip file, or several to average. segmentationNode: where to write (None: a new node);
        replace: take the place of this model's former segments there. options: fields of
        UNetSegmentationLib.inference.predict.Options, in the image's index space and LPS mm, e.g. at=(x, y, z),
        tta="flips", uncertainty=True (adds a scalar volume). Runs in the calling thread. Raises
        UNetSegmentationLib.UserError with one sentence for the person; the scene is then as before.

        >>> import UNetSegmentation
        >>> node = UNetSegmentation.UNetSegmentationLogic().process(getNode("CT"), at=(-22, -120, -611))
        """
        from UNetSegmentationLib import Options, find_model, mrml, predict

        packages = [find_model(name) for name in ([model] if isinstance(model, str) else model)]
        image = mrml.image_from_volume(volumeNode)
        prediction = predict(image, packages, Options(**options), progress)
        node = mrml.write_prediction(prediction, volumeNode, segmentationNode, replace)
        if prediction.uncertainty is not None:
            mrml.write_scalar_map(prediction.uncertainty, volumeNode, f"{volumeNode.GetName()} uncertainty", "uncertainty")
        return node
