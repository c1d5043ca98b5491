"""A training and what came of it in Slicer's views: curves, pictures of examples, and masks before and after side by side.

No widget is known here. None of the nodes is saved with a scene: they are made again from the training's files.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import slicer
import vtk
from slicer.i18n import tr as _

ATTRIBUTE = "UNetSegmentation.Training"  # of our nodes; its value says what for
CURVES, COMPARISON = 7161, 7162  # numbers of layouts, beyond Slicer's own
LOSS, DICE, EXAMPLES, BEFORE, AFTER = "UNetLoss", "UNetDice", "UNetExamples", "UNetBefore", "UNetAfter"
_LOSS, _LOSS_MEAN, _MEAN, _BEST = (0.70, 0.78, 0.88), (0.12, 0.35, 0.65), (0.1, 0.1, 0.1), (0.84, 0.10, 0.11)
# Seen apart by the colour-blind too (Okabe and Ito).
_LABELS = ((0.90, 0.62, 0.0), (0.34, 0.71, 0.91), (0.0, 0.62, 0.45), (0.80, 0.47, 0.65), (0.0, 0.45, 0.70), (0.84, 0.37, 0.0))
TRUTH = (0.1, 1.0, 0.2)
_GAP = 4  # pixels between two pictures
_GROUP = 71  # the two views scroll and zoom together, and no others with them

Line = dict[str, Any]
Steps = Generator[None, None, Any]


# -------------------------------------------------------------------------------------------------------------- curves


class Curves:
    """The charts of loss and Dice of one training, in the scene."""

    def __init__(self, scene: Any) -> None:
        self.scene = scene
        remove(scene, "curves")
        self.labels: list[str] = []
        self._best: tuple[float, float] | None = None
        self.loss_chart = self._chart(_("Loss"), _("Loss"))
        self.dice_chart = self._chart(_("Dice on held-out cases"), _("Dice"))
        self._steps = self._table(_("Loss by step"), ["step", "loss"])
        self._checks = self._table(_("Dice by step"), ["step", "loss", "dice"])
        self._top = self._table(_("Best Dice"), ["step", "dice"])
        self._series(self.loss_chart, _("Loss"), self._steps, "loss", _LOSS, 1)
        self._series(self.loss_chart, _("Mean"), self._checks, "loss", _LOSS_MEAN, 2, marker=True)
        self._series(self.dice_chart, _("Mean"), self._checks, "dice", _MEAN, 3, marker=True)
        self._peak = self._series(self.dice_chart, _("Best"), self._top, "dice", _BEST, 0, marker=True)

    @property
    def alive(self) -> bool:
        """Whether the nodes are still in the scene."""
        return all(n.GetScene() is self.scene for n in (self.loss_chart, self.dice_chart, self._steps, self._checks))

    def show(self, lines: Sequence[Line], anew: bool = False) -> None:
        """Append what these lines of live.jsonl hold; anew: in place of what was there."""
        if anew:
            self._best = None
            for node in (self._steps, self._checks, self._top):
                node.GetTable().SetNumberOfRows(0)
        touched = [self._steps, self._checks, self._top] if anew else []
        for line in lines:
            event, step = line.get("event"), _number(line.get("step"))
            if step is None:
                continue
            if event == "step" and _number(line.get("loss")) is not None:
                _append(self._steps, {"step": step, "loss": line["loss"]})
                touched.append(self._steps)
            elif event == "validation":
                each = line.get("dice_per_class") if isinstance(line.get("dice_per_class"), dict) else {}
                self._name([str(name) for name in each])
                values = {f"dice {name}": value for name, value in each.items()}
                _append(self._checks, {"step": step, "loss": line.get("loss"), "dice": line.get("dice"), **values})
                touched.append(self._checks)
                best = line.get("best") if isinstance(line.get("best"), dict) else {}
                self._mark(_number(best.get("step")), _number(best.get("dice")))
        for node in dict.fromkeys(touched):
            node.GetTable().Modified()
        if self._checks in touched:
            self._leave_room()

    @property
    def best(self) -> tuple[float, float] | None:
        """(step, Dice) of the best so far."""
        return self._best

    def _mark(self, step: float | None, dice: float | None) -> None:
        if step is None or dice is None or (step, dice) == self._best:
            return
        self._best = step, dice
        self._top.GetTable().SetNumberOfRows(0)
        _append(self._top, {"step": step, "dice": dice})
        self._top.GetTable().Modified()
        self._peak.SetName(_("Best: {dice:.3f}").format(dice=dice))

    def _leave_room(self) -> None:
        """Above the curves, for the legend, which Slicer draws in the upper right corner, where the latest Dice is."""
        columns = [
            self._checks.GetTable().GetColumnByName(n) for n in ("dice", *(f"dice {label}" for label in self.labels[: len(_LABELS)]))
        ]
        values = [c.GetValue(i) for c in columns for i in range(c.GetNumberOfTuples()) if c.GetValue(i) == c.GetValue(i)]
        if values:
            low, high = math.floor(20 * min(values)) / 20, max(values)
            self.dice_chart.SetYAxisRangeAuto(False)
            self.dice_chart.SetYAxisRange(low, high + 0.45 * max(high - low, 0.05))

    def _name(self, names: Sequence[str]) -> None:
        """A curve for each label; of a single one the mean is that."""
        for name in names:
            if name not in self.labels:
                self.labels.append(name)
                column = vtk.vtkDoubleArray()
                column.SetName(f"dice {name}")
                for _row in range(self._checks.GetNumberOfRows()):
                    column.InsertNextValue(float("nan"))
                self._checks.GetTable().AddColumn(column)
        if len(self.labels) < 2:
            return
        shown = {self.dice_chart.GetNthPlotSeriesNode(i).GetYColumnName() for i in range(self.dice_chart.GetNumberOfPlotSeriesNodes())}
        for i, name in enumerate(self.labels[: len(_LABELS)]):  # of more, nobody could tell the colours apart
            if f"dice {name}" not in shown:
                self._series(self.dice_chart, name, self._checks, f"dice {name}", _LABELS[i], 2, marker=True)

    def _own(self, kind: str, name: str, hidden: bool = False) -> Any:
        return _own(self.scene, kind, name, "curves", hidden)

    def _chart(self, title: str, axis: str) -> Any:
        chart = self._own("vtkMRMLPlotChartNode", title)
        chart.SetTitle(title)
        chart.SetXAxisTitle(_("Step"))
        chart.SetYAxisTitle(axis)
        chart.SetTitleFontSize(16)
        for node in (chart.SetAxisTitleFontSize, chart.SetAxisLabelFontSize, chart.SetLegendFontSize):
            node(12)
        return chart

    def _table(self, name: str, columns: Sequence[str]) -> Any:
        # Not hidden, each would be data to Slicer that it asks to save before it closes, and then does not save.
        node, table = self._own("vtkMRMLTableNode", name, hidden=True), vtk.vtkTable()
        for title in columns:
            column = vtk.vtkDoubleArray()
            column.SetName(title)
            table.AddColumn(column)
        node.SetAndObserveTable(table)
        return node

    def _series(self, chart: Any, name: str, table: Any, column: str, color: Sequence[float], width: float, marker: bool = False) -> Any:
        node = self._own("vtkMRMLPlotSeriesNode", name)
        node.SetPlotType(node.PlotTypeScatter)
        node.SetXColumnName("step")
        node.SetYColumnName(column)
        node.SetLineStyle(node.LineStyleSolid if width else node.LineStyleNone)
        node.SetLineWidth(width or 1)
        node.SetMarkerStyle(node.MarkerStyleCircle if marker else node.MarkerStyleNone)
        node.SetMarkerSize(11 if not width else 6)
        node.SetColor(*color)
        node.SetAndObserveTableNodeID(table.GetID())
        chart.AddAndObservePlotSeriesNodeID(node.GetID())
        return node


def _append(node: Any, values: Mapping[str, Any]) -> None:
    """A row. The first is there twice until the second comes: VTK complains of a line with one point, each time it draws it."""
    table = node.GetTable()
    rows, columns = table.GetNumberOfRows(), [table.GetColumn(i) for i in range(table.GetNumberOfColumns())]
    alone = rows == 2 and all(c.GetValue(0) == c.GetValue(1) or c.GetValue(0) != c.GetValue(0) for c in columns)
    for column in columns:
        value = _number(values.get(column.GetName()))
        for _again in range(1 if rows else 2):
            if alone:
                column.SetValue(1, float("nan") if value is None else value)
            else:
                column.InsertNextValue(float("nan") if value is None else value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# ------------------------------------------------------------------------------------------------------------- pictures


def picture_steps(scene: Any, paths: Sequence[Path]) -> Steps:
    """The PNG files below each other in one volume node, a file a piece; the node, or None where none can be read."""
    pictures = []
    for path in paths:
        if path.is_file():
            reader = vtk.vtkPNGReader()
            reader.SetFileName(str(path))
            reader.Update()
            if reader.GetNumberOfScalarComponents() >= 3 and reader.GetOutput().GetNumberOfPoints() > 1:
                rgb = vtk.vtkImageExtractComponents()  # without opacity
                rgb.SetInputConnection(reader.GetOutputPort())
                rgb.SetComponents(0, 1, 2)
                rgb.Update()
                pictures.append(rgb.GetOutput())
        yield
    if not pictures:
        return None
    width = max(p.GetDimensions()[0] for p in pictures)
    stack = vtk.vtkImageAppend()
    stack.SetAppendAxis(1)
    for picture in reversed(pictures):  # VTK counts from below
        padded = vtk.vtkImageConstantPad()
        padded.SetInputData(picture)
        padded.SetOutputWholeExtent(0, width - 1, -_GAP, picture.GetDimensions()[1] - 1, 0, 0)
        padded.Update()
        stack.AddInputData(padded.GetOutput())
    stack.Update()
    image = vtk.vtkImageData()
    image.DeepCopy(stack.GetOutput())
    image.SetExtent([v - image.GetExtent()[axis] for axis in (0, 2, 4) for v in image.GetExtent()[axis : axis + 2]])
    image.SetOrigin(0, 0, 0)
    node = next((n for n in ours(scene, "pictures") if n.IsA("vtkMRMLVectorVolumeNode")), None)
    if node is None:
        node = _own(scene, "vtkMRMLVectorVolumeNode", _("Examples of the training"), "pictures", hidden=True)
        node.SetIJKToRASDirections(-1, 0, 0, 0, 1, 0, 0, 0, 1)  # upright in an axial view
        node.SetSpacing(0.1, 0.1, 1)
    node.SetAndObserveImageData(image)
    if node.GetDisplayNode() is None:
        node.CreateDefaultDisplayNodes()
        _unsaved(node.GetDisplayNode(), "pictures")
    node.GetDisplayNode().SetAutoWindowLevel(False)
    node.GetDisplayNode().SetWindowLevelMinMax(0, 255)
    return node


# ----------------------------------------------------------------------------------------------------- before and after


class Comparison:
    """One case with the masks of two models: `before` in the left view, `after` in the right, the truth's outline in both."""

    def __init__(self, scene: Any) -> None:
        self.scene = scene
        self.volume: Any = None
        self.masks: dict[str, Any] = {}
        self._point: tuple[float, ...] | None = None  # LPS mm

    def steps(self, name: str, found: Mapping[str, Any], folder: Path, labels: Sequence[Any]) -> Steps:
        """Show a case in pieces. found: the desk's answer to "compare", whose arrays lie in `folder` and are removed; labels: of
        the masks' values. What was shown before is gone, also where this fails."""
        from UNetSegmentationLib import Box, Prediction, mrml
        from UNetSegmentationLib.worker.desk import received_grid, received_mask
        from UNetSegmentationLib.worker.protocol import fill_array

        self.clear()
        channel, grid = found["image"], received_grid(found["image"])
        try:
            self.volume = yield from mrml.new_volume_steps(
                self.scene,
                name,
                grid,
                lambda array: fill_array(folder, channel["file"], array),
                tuple(channel["window"]),
                lambda kind, own: _own(self.scene, kind, own, "comparison", hidden=True),
            )
            _unsaved(self.volume.GetDisplayNode(), "comparison")
            yield
            views = {"before": (BEFORE,), "after": (AFTER,), "truth": (BEFORE, AFTER)}  # what comes last is drawn on top
            titles = {"truth": _("{name}, corrected"), "before": _("{name}, before"), "after": _("{name}, after")}
            for key, where in views.items():
                if key not in found["masks"]:
                    continue
                mask = grid.like(received_mask(folder, found["masks"][key], grid))
                drawn = Prediction(mask, tuple(labels), "", Box.whole(grid.shape))
                node = _own(self.scene, "vtkMRMLSegmentationNode", titles[key].format(name=name), "comparison", hidden=True)
                yield from mrml.write_prediction_steps(drawn, self.volume, node)
                self.masks[key] = node
                self._dress(node, key, [self.scene.GetSingletonNode(view, "vtkMRMLSliceNode") for view in where])
                yield
            self._point = found["point"]
        except BaseException:
            self.clear()
            raise
        finally:
            discard(found, folder)

    def _dress(self, node: Any, key: str, views: Sequence[Any]) -> None:
        display = node.GetDisplayNode()
        _unsaved(display, "comparison")
        display.SetViewNodeIDs([view.GetID() for view in views if view is not None])
        display.SetVisibility3D(False)
        truth = key == "truth"
        display.SetVisibility2DFill(not truth)
        display.SetVisibility2DOutline(True)
        display.SetOpacity2DFill(0.2)  # what lies below is to be seen
        display.SetSliceIntersectionThickness(2)
        if truth:
            held = node.GetSegmentation()
            for i in range(held.GetNumberOfSegments()):
                display.SetSegmentOverrideColor(held.GetNthSegmentID(i), *TRUTH)

    def jump(self) -> None:
        """Both views to the axial slice with most wrong voxels, and its middle."""
        if self._point is None:
            return
        x, y, z = self._point
        for view in (BEFORE, AFTER):
            node = self.scene.GetSingletonNode(view, "vtkMRMLSliceNode")
            if node is not None:
                node.JumpSliceByOffsetting(-x, -y, z)

    def clear(self) -> None:
        """Nothing of it is left in the scene."""
        self.volume, self.masks, self._point = None, {}, None
        remove(self.scene, "comparison")


def discard(found: Mapping[str, Any], folder: Path) -> None:
    """The arrays of an answer to "compare"."""
    from UNetSegmentationLib.worker.protocol import remove_files

    for name in (found["image"]["file"], *found["masks"].values()):
        remove_files(folder, name)


# ------------------------------------------------------------------------------------------------------------- layouts


def _view(kind: str, name: str, label: str, color: str, group: int = 0) -> str:
    orientation = '<property name="orientation" action="default">Axial</property>' if kind == "vtkMRMLSliceNode" else ""
    return (
        f'<item><view class="{kind}" singletontag="{name}">{orientation}'
        f'<property name="viewlabel" action="default">{label}</property><property name="viewcolor" action="default">{color}</property>'
        f'<property name="viewgroup" action="default">{group}</property></view></item>'
    )


def descriptions() -> dict[int, str]:
    """The two layouts as Slicer's XML."""
    plot, cut = "vtkMRMLPlotViewNode", "vtkMRMLSliceNode"
    plots = _view(plot, DICE, _("Dice"), "#2ca02c") + _view(plot, LOSS, _("Loss"), "#1f77b4")
    examples = _view(cut, EXAMPLES, _("Examples"), "#8c8c8c", _GROUP + 1)
    pair = _view(cut, BEFORE, _("Before"), "#d95f02", _GROUP) + _view(cut, AFTER, _("After"), "#1b9e77", _GROUP)
    return {
        CURVES: f'<layout type="horizontal" split="true"><item><layout type="vertical" split="true">{plots}</layout></item>'
        f"{examples}</layout>",
        COMPARISON: f'<layout type="horizontal" split="true">{pair}</layout>',
    }


class Layouts:
    """Our layouts in Slicer's views, and the way back."""

    def __init__(self) -> None:
        self._former: int | None = None

    @property
    def _node(self) -> Any:
        manager = slicer.app.layoutManager()
        return manager.layoutLogic().GetLayoutNode() if manager is not None else None  # none: Slicer without a window

    @property
    def shown(self) -> int | None:
        """CURVES, COMPARISON, or None where another layout is on."""
        node = self._node
        now = node.GetViewArrangement() if node is not None else None
        return now if now in (CURVES, COMPARISON) else None

    def show(self, number: int) -> bool:
        """Whether it is on now."""
        node = self._node
        if node is None:
            return False
        if self.shown is None:
            self._former = node.GetViewArrangement()
        if self.shown != number:
            if not node.IsLayoutDescription(number):
                node.AddLayoutDescription(number, descriptions()[number])
            # Unlike the node, the manager lets go of a view that somebody has made fill all.
            slicer.app.layoutManager().setLayout(number)
        for view in (LOSS, DICE, EXAMPLES, BEFORE, AFTER):
            for kind in ("vtkMRMLPlotViewNode", "vtkMRMLSliceNode", "vtkMRMLSliceCompositeNode"):
                own = slicer.mrmlScene.GetSingletonNode(view, kind)
                if own is not None:
                    own.SetSaveWithScene(False)
        return True

    def leave(self) -> None:
        """Back to the layout before, where ours is on."""
        if self.shown is not None:
            former = self._former if self._former not in (None, CURVES, COMPARISON) else slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView
            slicer.app.layoutManager().setLayout(former)
        self._former = None


def show_charts(curves: Curves) -> None:
    """The charts in the plot views of the layout CURVES."""
    for name, chart in ((LOSS, curves.loss_chart), (DICE, curves.dice_chart)):
        view = curves.scene.GetSingletonNode(name, "vtkMRMLPlotViewNode")
        if view is not None and view.GetPlotChartNodeID() != chart.GetID():
            view.SetDoPropagatePlotChartSelection(False)  # a chart of another module goes elsewhere
            view.SetPlotChartNodeID(chart.GetID())


def show_volume(node: Any, names: Sequence[str], linked: bool = False, fit: bool = True) -> None:
    """A volume, and nothing else, in these slice views."""
    manager = slicer.app.layoutManager()
    for name in names:
        widget = manager.sliceWidget(name) if manager is not None else None
        if widget is None:
            continue
        composite = widget.mrmlSliceCompositeNode()
        composite.SetLinkedControl(False)  # while it is set up
        composite.SetBackgroundVolumeID(node.GetID())
        composite.SetForegroundVolumeID(None)
        composite.SetLabelVolumeID(None)
        if fit:
            widget.fitSliceToBackground()
        composite.SetLinkedControl(linked)


# --------------------------------------------------------------------------------------------------------------- nodes


def ours(scene: Any, what: str) -> list[Any]:
    """Our nodes for "curves", "pictures" or "comparison"."""
    nodes = (scene.GetNthNode(i) for i in range(scene.GetNumberOfNodes()))
    return [n for n in nodes if n.GetAttribute(ATTRIBUTE) == what]


def remove(scene: Any, what: str) -> None:
    for node in ours(scene, what):
        if node.GetScene() is scene:
            scene.RemoveNode(node)


def _own(scene: Any, kind: str, name: str, what: str, hidden: bool = False) -> Any:
    """A new node. hidden: from the lists of nodes, of which some choose what comes."""
    node = scene.CreateNodeByClass(kind)
    node.UnRegister(None)
    node.SetName(name)
    node.SetHideFromEditors(hidden)
    return scene.AddNode(_unsaved(node, what))


def _unsaved(node: Any, what: str) -> Any:
    node.SetAttribute(ATTRIBUTE, what)
    node.SetSaveWithScene(False)
    return node
