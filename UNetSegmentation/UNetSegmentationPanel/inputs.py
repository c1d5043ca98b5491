"""What goes in: the volumes of a model's channels, the region, and the window that scan and network are seen through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ctk
import qt
import slicer
from slicer.i18n import tr as _

from .models import plainTip, presetText

MODEL_DEFAULT, CUSTOM = "", "custom"
VOLUME, ROI, POINTS = "vtkMRMLScalarVolumeNode", "vtkMRMLMarkupsROINode", "vtkMRMLMarkupsFiducialNode"


def referenceVolume(segmentation: Any) -> Any:
    """The volume on whose grid a segmentation lies; None where there is none, or no segmentation."""
    return None if segmentation is None else segmentation.GetNodeReference(segmentation.GetReferenceImageGeometryReferenceRole())


def resultVolume(segmentation: Any, table: Any) -> Any:
    """The volume that a result is of: that of its measures, None where it is gone, or else, as in older scenes, referenceVolume()."""
    role = "UNetSegmentation.Volume"  # mrml.VOLUME_ROLE
    known = table is not None and table.GetAttribute(role) is not None
    return table.GetNodeReference(role) if known else referenceVolume(segmentation)


# -------------------------------------------------------------------------------------------------------------- widgets


def fill(combo: Any, choices: Sequence[tuple[str, str]] | None, value: Any) -> None:
    """Show `value`, or the first, in a box with these (value, text); None: those that it has."""
    if choices is not None and list(choices) != [(combo.itemData(i), combo.itemText(i)) for i in range(combo.count)]:
        combo.clear()
        for data, text in choices:
            combo.addItem(text, data)
    combo.currentIndex = max(0, combo.findData(value)) if combo.count else -1


def showValue(spinBox: Any, value: float) -> None:
    """Only where the box, which has whole numbers, would show another one: what a person is typing would be lost."""
    if abs(spinBox.value - min(max(value, spinBox.minimum), spinBox.maximum)) > 0.5:
        spinBox.value = value


def prepareTable(table: Any, titles: Sequence[str], rows: int) -> None:
    table.clearSelection()  # of rows that had fewer columns
    table.clearSpans()
    table.setColumnCount(len(titles))
    table.setRowCount(rows)
    table.setHorizontalHeaderLabels(list(titles))
    table.horizontalHeader().setHighlightSections(False)
    table.verticalHeader().hide()
    table.verticalHeader().setDefaultSectionSize(table.fontMetrics().height() + 6)


def fitTable(table: Any, most: int, wide: int | None = None) -> None:
    """As high as its rows, `most` of them; the columns as wide as what they hold, and `wide` as wide as is left (None: as they are)."""
    header = table.horizontalHeader()
    for i in range(table.columnCount if wide is not None else 0):
        header.setSectionResizeMode(i, qt.QHeaderView.Stretch if i == wide else qt.QHeaderView.ResizeToContents)
    shown = min(table.rowCount, most) * table.verticalHeader().defaultSectionSize
    table.minimumHeight = table.maximumHeight = shown + header.sizeHint.height() + 2 * table.frameWidth + 2


# --------------------------------------------------------------------------------------------------------------- window


def offeredPresets(cards: Sequence[Any]) -> list[tuple[str, str]]:
    """(name, label) of what the window box offers for these models, the model's own first.

    A preset takes the place of the models' normalisation, so only the kind that all of them were trained with is there:
    windows in HU for models that see HU through a window, percentiles for those that see percentiles.
    """
    from UNetSegmentationLib.intensity import presets

    out = [(MODEL_DEFAULT, _("Model default"))]
    modes = {card.intensity["mode"] for card in cards}
    if len(modes) == 1:
        mode = modes.pop()
        for preset in presets().values():
            if preset.intensity()["mode"] == mode:
                out.append((preset.name, presetText(preset)))
        if mode == "window":
            out.append((CUSTOM, _("Custom")))
    return out


def chosenIntensity(preset: str, level: float, width: float) -> dict[str, Any] | None:
    """Options.intensity for a choice in the window box; None leaves each model its own."""
    from UNetSegmentationLib.intensity import presets

    if preset == CUSTOM:
        return {"mode": "window", "level": level, "width": width}
    return presets()[preset].intensity() if preset in presets() else None


def ownWindow(cards: Sequence[Any], preset: str) -> tuple[float, float] | None:
    """(level, width) in HU that a preset stands for with these models; None where there is no such pair."""
    entry = chosenIntensity(preset, 0, 1) if preset != CUSTOM else None
    entry = entry or (cards[0].intensity if cards and preset == MODEL_DEFAULT else {})
    return (entry["level"], entry["width"]) if entry.get("mode") == "window" else None


def showWindow(volumeNode: Any, cards: Sequence[Any], preset: str, level: float, width: float) -> None:
    """Show the volume through the chosen window: the model's own display window for "Model default", where it names one."""
    from UNetSegmentationLib.intensity import display_range, presets

    display = volumeNode.GetScalarVolumeDisplayNode() if volumeNode is not None else None
    if display is None or volumeNode.GetImageData() is None:
        return
    entry = chosenIntensity(preset, level, width)
    if entry is None:
        wanted = presets().get(cards[0].data.get("display", "")) if cards else None
        if wanted is None:
            return
        entry = wanted.intensity()
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(*display_range(entry, slicer.util.arrayFromVolume(volumeNode)[None]))


# ------------------------------------------------------------------------------------------------------------- channels


def likelyVolume() -> Any:
    """Of the volumes that the selector offers (none that is hidden, no labelmap, whose class derives from the volumes') the one that the
    views show, or else the first."""
    nodes = [n for n in slicer.util.getNodesByClass(VOLUME) if n.GetClassName() == VOLUME and not n.GetHideFromEditors()]
    shown = {view.GetBackgroundVolumeID() for view in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")}
    return next((n for n in nodes if n.GetID() in shown), nodes[0] if nodes else None)


def letShrink(selector: Any) -> None:
    """A long name of a scan must not make the panel wider than its place; and who scrolls the panel chooses no other scan."""
    # The selector's own sizeAdjustPolicy has the enum of another class, which PythonQt refuses with Qt 5 (commontk/CTK issue 791).
    combos = selector.findChildren(ctk.ctkComboBox)
    for combo in combos:
        combo.sizeAdjustPolicy = qt.QComboBox.AdjustToMinimumContentsLengthWithIcon
    leaveWheel(*combos)


def leaveWheel(*combos: Any) -> None:
    """The mouse wheel over these is for what they lie in: it would choose something else, unseen, while a person scrolls the panel."""
    for combo in combos:
        combo.scrollWheelEffect = ctk.ctkComboBox.NeverScroll


def chosenTwice(names: Sequence[str], nodes: Sequence[Any]) -> str:
    """The sentence of a volume that stands for two channels; "" where there is none."""
    for i, (name, node) in enumerate(zip(names, nodes)):
        if node in nodes[:i]:
            text = _("'{volume}' is chosen for both '{first}' and '{second}'; choose the scan of each.")
            return text.format(volume=node.GetName(), first=names[nodes.index(node)], second=name)
    return ""


class ChannelRows:
    """A node selector for each channel of the model after the first, under the volume's own, named as the card names it."""

    def __init__(self, ui: Any, changed: Callable[[], None]) -> None:
        self.ui, self._changed = ui, changed
        self._rows: list[tuple[Any, Any]] = []
        self._names: tuple[str, ...] = ()
        self._several: tuple[str, ...] = ()  # of the last model that had more than one
        self._updating = False

    def show(self, names: Sequence[str], nodes: Sequence[Any]) -> None:
        """names: of all channels; nodes: what is chosen for those after the first."""
        self._names = tuple(names)
        self._several = self._names if len(names) > 1 else self._several
        self.ui.volumeLabel.text = f"{names[0]}:" if len(names) > 1 else _("Volume:")
        while len(self._rows) < len(names) - 1:
            self._addRow()
        self._updating = True
        for i, (label, selector) in enumerate(self._rows):
            used = i + 1 < len(names)
            label.visible = selector.visible = used
            if used:
                label.text = f"{names[i + 1]}:"
                tip = _("The scan for the model's input '{name}', on the same grid as the first.").format(name=names[i + 1])
                selector.toolTip = plainTip(tip)
                selector.setCurrentNode(nodes[i] if i < len(nodes) else None)
        self._updating = False

    def carried(self, names: Sequence[str], nodes: Sequence[Any]) -> list[Any]:
        """For a model with these channels, the nodes after the first: of all (nodes), each stays with the name that it was chosen for."""
        if len(names) < 2 or not self._several:
            return list(nodes[1:])
        given = {name.lower(): node for name, node in zip(self._several, nodes)}
        return [given.get(name.lower()) for name in names[1:]]

    @property
    def nodes(self) -> list[Any]:
        """The chosen nodes after the first, None where none is."""
        return [selector.currentNode() for _label, selector in self._rows[: max(0, len(self._names) - 1)]]

    def _addRow(self) -> None:
        label, selector = qt.QLabel(), slicer.qMRMLNodeComboBox()
        label.setTextFormat(qt.Qt.PlainText)  # what a card says is no HTML
        selector.nodeTypes = [VOLUME]
        selector.showChildNodeTypes = False
        selector.addEnabled = selector.removeEnabled = False
        selector.noneEnabled = True
        selector.noneDisplay = _("Select a volume")
        letShrink(selector)
        selector.setMRMLScene(slicer.mrmlScene)
        selector.connect("currentNodeChanged(vtkMRMLNode*)", self._onNode)
        label.setBuddy(selector)
        row = 1 + len(self._rows)
        self.ui.inputLayout.insertRow(row, label, selector)
        before = self._rows[-1][1] if self._rows else self.ui.volumeSelector
        qt.QWidget.setTabOrder(before, selector)
        self._rows.append((label, selector))

    def _onNode(self, *_unused: Any) -> None:
        if not self._updating:
            self._changed()


def frames(volumeNode: Any) -> int:
    """How many frames the sequence has that steps this volume; 1 for a single volume."""
    # Asked first, so that a panel that opens on a single volume need not import the core.
    if volumeNode is None or volumeNode.GetScene().GetFirstNodeByClass("vtkMRMLSequenceBrowserNode") is None:
        return 1
    from UNetSegmentationLib import mrml

    found = mrml.sequence_frames(volumeNode)
    return found[1] if found else 1


# --------------------------------------------------------------------------------------------------------------- region


def startPlacing(className: str, name: str) -> Any:
    """A new markups node that the next clicks in a view place; returns it."""
    scene = slicer.mrmlScene
    node = scene.AddNewNodeByClass(className, scene.GenerateUniqueName(name))
    node.CreateDefaultDisplayNodes()
    selection = scene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
    interaction = scene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
    if selection is not None and interaction is not None:
        selection.SetReferenceActivePlaceNodeClassName(className)
        selection.SetActivePlaceNodeID(node.GetID())
        interaction.SwitchToSinglePlaceMode()
    return node


def regionProblem(region: Any) -> str:
    """Why nothing can be segmented in this region yet, as one sentence; "" where it is usable, or None is chosen."""
    if region is None:
        return ""
    if region.IsA(POINTS):
        if not region.GetNumberOfDefinedControlPoints():
            return _("Click on the target in a slice view to place the point '{name}'.").format(name=region.GetName())
        return ""
    size = [0.0, 0.0, 0.0]
    region.GetSizeWorld(size)
    if min(size) <= 0:
        return _("Draw the box '{name}': click on two opposite corners in a slice view.").format(name=region.GetName())
    return ""


def regionOptions(region: Any, volumeNode: Any) -> dict[str, Any]:
    """Options.roi of a box, or Options.at (LPS mm) of a point list's last point; UserError with regionProblem()."""
    from UNetSegmentationLib import UserError, mrml

    if region is None:
        return {}
    if problem := regionProblem(region):
        raise UserError(problem)
    if region.IsA(POINTS):
        point = [0.0, 0.0, 0.0]
        # Also one that follows the mouse while a person aims is a control point, and one that was unset.
        status = [region.GetNthControlPointPositionStatus(i) for i in range(region.GetNumberOfControlPoints())]
        placed = [i for i, s in enumerate(status) if s == region.PositionDefined]
        region.GetNthControlPointPositionWorld(placed[-1], point)
        return {"at": (-point[0], -point[1], point[2])}
    return {"roi": mrml.roi_box(region, volumeNode)}
