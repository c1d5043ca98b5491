"""The qMRML widgets that the panel uses, on the real MRML scene; they go into `slicer`.

Names, arguments and defaults after Slicer 5.12: Libs/MRML/Widgets/qMRMLNodeComboBox.h,
qMRMLTableView.h, qMRMLWidget.h, Modules/Loadable/Segmentations/Widgets/qMRMLSegmentsTableView.h and
qMRMLSegmentationShow3DButton.h. What is a plain C++ method there, no slot and not Q_INVOKABLE, Python cannot call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qt
import slicer
import vtk
from ctkwidgets import ctkComboBox, ctkMenuButton, foreign, value
from PySide6.QtCore import Property, QItemSelection, Signal
from PySide6.QtGui import QColor, QStandardItem, QStandardItemModel
from PySide6.QtWidgets import QTableView, QWidget
from pythonqt import dialogs, standin, standins
from vtk.util.misc import calldata_type


def _is_none_or(node: Any, kind: Any) -> None:
    """PythonQt refuses an object of another class."""
    if node is not None and not isinstance(node, kind):
        raise ValueError(f"called with wrong argument types: {type(node).__name__} is no {kind.__name__}")


class _Observers:
    """Observers that end with the widget that they serve."""

    def __init__(self, widget: Any) -> None:
        self.tags: list[tuple[Any, int]] = []
        widget.destroyed.connect(self.clear)

    def clear(self, *_: Any) -> None:
        self.drop(lambda subject: True)

    def drop(self, which: Callable[[Any], bool]) -> None:
        for observed, tag in self.tags:
            if which(observed):
                observed.RemoveObserver(tag)
        self.tags = [entry for entry in self.tags if not which(entry[0])]

    def add(self, subject: Any, method: Any, *events: Any, priority: float = 0.0) -> None:
        if subject is not None:
            self.tags += [(subject, subject.AddObserver(event, method, priority)) for event in events]


@standin
class qMRMLWidget(QWidget):
    """qMRMLWidget.h: hands its scene to whatever is connected to mrmlSceneChanged."""

    mrmlSceneChanged = Signal(object)
    signals_ = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChanged"}

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene = None

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        _is_none_or(scene, slicer.vtkMRMLScene)
        if scene is not self._scene:
            self._scene = scene
            self.mrmlSceneChanged.emit(scene)


@standin
class qMRMLNodeComboBox(QWidget):
    """qMRMLNodeComboBox.h. Without "None" the first node that comes is selected, and the last one after the current is gone."""

    currentNodeChanged = Signal(object)
    _valid = Signal(bool)
    currentNodeIDChanged = Signal(str)
    nodeActivated = Signal(object)
    nodeAdded = Signal(object)
    nodeAddedByUser = Signal(object)
    nodeAddedByUserAction = Signal(object)
    nodeAboutToBeRemoved = Signal(object)
    nodeAboutToBeEdited = Signal(object)
    currentNodeRenamed = Signal(str)
    signals_ = {
        "currentNodeChanged(vtkMRMLNode*)": "currentNodeChanged",
        "currentNodeChanged(bool)": "_valid",
        "currentNodeIDChanged(QString)": "currentNodeIDChanged",
        "nodeActivated(vtkMRMLNode*)": "nodeActivated",
        "nodeAdded(vtkMRMLNode*)": "nodeAdded",
        "nodeAddedByUser(vtkMRMLNode*)": "nodeAddedByUser",
        "nodeAddedByUserAction(vtkMRMLNode*)": "nodeAddedByUserAction",
        "nodeAboutToBeRemoved(vtkMRMLNode*)": "nodeAboutToBeRemoved",
        "nodeAboutToBeEdited(vtkMRMLNode*)": "nodeAboutToBeEdited",
        "currentNodeRenamed(QString)": "currentNodeRenamed",
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._ids: list[str] = []
        self._current = ""
        self._requested = ""
        self._labels: dict[str, str] = {}
        self._attributes: list[tuple[str, str, Any]] = []
        self._actions: list[Any] = []
        self._observers, self._watched = _Observers(self), _Observers(self)
        self._combo = ctkComboBox(self)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        self.setSizePolicy(qt.QSizePolicy(qt.QSizePolicy.Preferred, qt.QSizePolicy.Fixed))
        self.setFocusProxy(self._combo)
        self._combo.activated.connect(self._activate)
        self.setEnabled(False)

    nodeTypes = value("QStringList", "nodeTypes", (), "_types_changed")
    showHidden = value(bool, "showHidden", False, "_fill")
    showChildNodeTypes = value(bool, "showChildNodeTypes", True, "_fill")
    hideChildNodeTypes = value("QStringList", "hideChildNodeTypes", (), "_fill")
    baseName = value(str, "baseName", "")
    noneEnabled = value(bool, "noneEnabled", False, "_fill")
    addEnabled = value(bool, "addEnabled", True, "_fill")
    removeEnabled = value(bool, "removeEnabled", True, "_fill")
    editEnabled = value(bool, "editEnabled", False, "_fill")
    renameEnabled = value(bool, "renameEnabled", False, "_fill")
    interactionNodeSingletonTag = value(str, "interactionNodeSingletonTag", "Singleton")
    selectNodeUponCreation = value(bool, "selectNodeUponCreation", True)
    noneDisplay = value(str, "noneDisplay", "None", "_fill")

    sizeAdjustPolicy = foreign("sizeAdjustPolicy", "QComboBox::SizeAdjustPolicy")

    # the list

    def _offers(self, node: Any) -> bool:
        if node.GetHideFromEditors() and not self.showHidden:
            return False
        for kind in self.nodeTypes:
            if not (node.IsA(kind) if self.showChildNodeTypes else node.GetClassName() == kind):
                continue
            if any(node.IsA(h) for h in self.hideChildNodeTypes):
                continue
            if all(node.GetAttribute(n) is not None and v in (None, node.GetAttribute(n)) for k, n, v in self._attributes if k == kind):
                return True
        return False

    def _nodes(self) -> list[Any]:
        if self._scene is None:
            return []
        nodes = [self._scene.GetNthNode(i) for i in range(self._scene.GetNumberOfNodes())]
        return [n for n in nodes if self._offers(n)]

    def _extra(self) -> list[tuple[str, Any]]:
        one = self.nodeTypeLabel(self.nodeTypes[0]) if len(self.nodeTypes) == 1 else "node"
        extra: list[tuple[str, Any]] = []
        if self.renameEnabled:
            extra.append((f"Rename current {one}", self.renameCurrentNode))
        if self.editEnabled:
            extra.append((f"Edit current {one}", self.editCurrentNode))
        if self.addEnabled:
            extra += [(f"Create new {self.nodeTypeLabel(k)}", lambda k=k: self._create(k)) for k in self.nodeTypes]
        if self.removeEnabled:
            extra.append((f"Delete current {one}", self.removeCurrentNode))
        return extra + [(a.text, a.trigger) for a in self._actions]

    def _create(self, kind: str) -> None:
        node = self.addNode(kind)
        if node is not None:
            self.setCurrentNode(node)
            self.nodeAddedByUserAction.emit(node)

    def _fill(self, leaving: Any = None) -> None:
        """Writes the list anew, without the node `leaving`, and selects what Qt and Slicer select after that."""
        before, old = self._ids, self._current
        self._ids = [n.GetID() for n in self._nodes() if n is not leaving]
        extra = self._extra() if self._scene is not None else []
        self._combo.clear()
        if self._scene is not None:
            if self.noneEnabled:
                self._combo.addItem(self.noneDisplay)
            for node_id in self._ids:
                self._combo.addItem(self._scene.GetNodeByID(node_id).GetName() or "")
            if extra:
                self._combo.insertSeparator(self._combo.count)
                for text, action in extra:
                    self._combo.addItem(text, action)
        self._combo.setPlaceholderText(f"Select a {self.nodeTypeLabel(self.nodeTypes[0])}" if self.nodeTypes else "")
        self._select(self._successor(before, old, bool(extra)))

    def _successor(self, before: list[str], old: str, extra: bool) -> str:
        if old in self._ids or not self._ids:
            return old if old in self._ids else ""
        if old in before:  # it left: the row moves up, but Qt lets go of the very first row
            row = before.index(old)
            first = row == 0 and not self.noneEnabled
            return "" if first else self._ids[min(row, len(self._ids) - 1)]
        # Qt selects the first row that comes, where there is no other, neither "None" nor "Create new ..."
        return self._ids[0] if not before and not extra and not self.noneEnabled else ""

    def _row(self, node_id: str) -> int:
        none = int(bool(self.noneEnabled))
        return self._ids.index(node_id) + none if node_id in self._ids else 0 if none and self._scene is not None else -1

    def _select(self, node_id: str) -> None:
        self._combo.setCurrentIndex(self._row(node_id))
        if node_id != self._current:
            self._current = node_id
            self._tell()

    def _tell(self) -> None:
        node = self.currentNode()
        self.currentNodeChanged.emit(node)
        self._valid.emit(node is not None)
        self.currentNodeIDChanged.emit(self._current)

    def _activate(self, row: int) -> None:
        action = self._combo.itemData(row)
        if action is not None:
            self._combo.setCurrentIndex(self._row(self._current))
            action()
            return
        index = row - bool(self.noneEnabled)
        self._select(self._ids[index] if 0 <= index < len(self._ids) else "")
        self.nodeActivated.emit(self.currentNode())

    # the scene; qMRMLSceneModel.cxx: nodes of an import come when it ends, those of a closing scene go when it has closed

    @calldata_type(vtk.VTK_OBJECT)
    def _added(self, scene: Any, event: str, node: Any) -> None:
        if not scene.IsImporting():
            self._watch(node)
            if self._offers(node):
                self._fill()
                self.nodeAdded.emit(node)

    @calldata_type(vtk.VTK_OBJECT)
    def _leaves(self, scene: Any, event: str, node: Any) -> None:
        if not scene.IsClosing() and node.GetID() in self._ids:
            self.nodeAboutToBeRemoved.emit(node)
            self._fill(leaving=node)

    def _renewed(self, scene: Any, event: str) -> None:
        self._watch()
        self._fill()

    def _watch(self, added: Any = None) -> None:
        """Observes every node of the types, as a hidden one may become visible; but for what was added the others as before: to look
        at the whole scene for each of its nodes took an eighth of the panel's tests."""
        self._watched.drop(lambda node: added is None or node is added or node.GetScene() is None)
        nodes = [added]
        if added is None:
            nodes = [] if self._scene is None else [self._scene.GetNthNode(i) for i in range(self._scene.GetNumberOfNodes())]
        for node in nodes:
            if any(node.IsA(k) for k in self.nodeTypes):
                self._watched.add(node, self._modified, vtk.vtkCommand.ModifiedEvent)

    def _modified(self, node: Any, event: str) -> None:
        if node.GetScene() is None:
            return
        if (node.GetID() in self._ids) != self._offers(node):
            self._fill()
        elif node.GetID() in self._ids:
            row, name = self._row(node.GetID()), node.GetName() or ""
            if self._combo.itemText(row) != name:
                self._combo.setItemText(row, name)
                if node.GetID() == self._current:  # the signals hang on the combo box's text
                    self._tell()

    def _types_changed(self) -> None:
        self._watch()
        self._fill()

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        _is_none_or(scene, slicer.vtkMRMLScene)
        if scene is self._scene:
            return
        self._scene = scene
        s = slicer.vtkMRMLScene
        self._observers.clear()
        self._observers.add(scene, self._added, s.NodeAddedEvent, priority=10.0)
        self._observers.add(scene, self._leaves, s.NodeAboutToBeRemovedEvent, priority=-10.0)
        self._observers.add(scene, self._renewed, s.EndImportEvent, s.EndCloseEvent)
        self._watch()
        requested, self._requested = self._requested, ""
        if requested and scene is not None and scene.GetNodeByID(requested):
            self._current, self._ids = "", [n.GetID() for n in self._nodes()]
            self._fill()
            self.setCurrentNodeID(requested)
        else:
            self._fill()
        self.setEnabled(scene is not None)

    # what scripts call

    def nodeCount(self) -> int:
        return len(self._ids)

    def nodeFromIndex(self, index: int) -> Any:
        return self._scene.GetNodeByID(self._ids[index]) if 0 <= index < len(self._ids) else None

    def currentNode(self) -> Any:
        return self._scene.GetNodeByID(self._current) if self._scene is not None and self._current else None

    def setCurrentNode(self, node: Any) -> None:
        _is_none_or(node, slicer.vtkMRMLNode)
        self.setCurrentNodeID(node.GetID() if node is not None else "")

    def setCurrentNodeID(self, nodeID: str) -> None:
        if self._scene is None:
            self._requested = nodeID or ""
        self._select(nodeID if nodeID in self._ids else "")

    currentNodeID = Property(str, lambda self: self._current, lambda self, v: self.setCurrentNodeID(v))

    def addAttribute(self, nodeType: str, attributeName: str, attributeValue: Any = None) -> None:
        self._attributes.append((nodeType, attributeName, attributeValue))
        self._fill()

    def nodeTypeLabel(self, nodeType: str) -> str:
        shown = self._scene.GetTypeDisplayNameByClassName(nodeType) if self._scene is not None else ""
        return self._labels.get(nodeType) or shown or "node"

    def addNode(self, nodeType: str | None = None) -> Any:
        kind = nodeType or (self.nodeTypes[0] if self.nodeTypes else None)
        if kind not in self.nodeTypes:
            return None
        name = self.baseName or self.nodeTypeLabel(kind)
        node = self._scene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetName(self._scene.GetUniqueNameByString(name))
        for k, attribute, attributeValue in self._attributes:
            if k == kind:
                node.SetAttribute(attribute, attributeValue)
        node = self._scene.AddNode(node)
        if self.selectNodeUponCreation:
            self.setCurrentNode(node)
        self.nodeAddedByUser.emit(node)
        return node

    def removeCurrentNode(self) -> None:
        self._scene.RemoveNode(self.currentNode())

    def editCurrentNode(self) -> None:
        self.nodeAboutToBeEdited.emit(self.currentNode())

    def renameCurrentNode(self) -> None:
        node = self.currentNode()
        name = dialogs.ask("input", "New name:") if node is not None else ""
        if name:
            node.SetName(name)
            self.currentNodeRenamed.emit(name)


@standin
class qMRMLSegmentsTableView(qMRMLWidget):
    """qMRMLSegmentsTableView.h. Columns: visibility, colour, opacity, name, layer, status."""

    selectionChanged = Signal(QItemSelection, QItemSelection)
    segmentAboutToBeModified = Signal(str)
    signals_ = {
        "selectionChanged(QItemSelection,QItemSelection)": "selectionChanged",
        "segmentAboutToBeModified(QString)": "segmentAboutToBeModified",
    }
    _columns = ("visibility", "color", "opacity", "name", "layer", "status")

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._hide: list[str] = []
        self._observers = _Observers(self)
        self._table = QTableView(self)
        layout = qt.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._table)
        self._model = QStandardItemModel(0, len(self._columns), self)
        self._table.setModel(self._model)
        self._table.verticalHeader().hide()
        self._table.setSelectionBehavior(qt.QAbstractItemView.SelectRows)
        self._table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
        self._table.selectionModel().selectionChanged.connect(self.selectionChanged)
        self._table.clicked.connect(self._clicked)
        self._fill()

    selectionMode = Property(int, lambda self: int(self._table.selectionMode), lambda self, v: self.setSelectionMode(v))
    headerVisible = value(bool, "headerVisible", True, "_fill")
    visibilityColumnVisible = value(bool, "visibilityColumnVisible", True, "_fill")
    colorColumnVisible = value(bool, "colorColumnVisible", True, "_fill")
    opacityColumnVisible = value(bool, "opacityColumnVisible", True, "_fill")
    statusColumnVisible = value(bool, "statusColumnVisible", True, "_fill")
    layerColumnVisible = value(bool, "layerColumnVisible", False, "_fill")
    readOnly = value(bool, "readOnly", False)
    filterBarVisible = value(bool, "filterBarVisible", False)
    textFilter = value(str, "textFilter", "", "_fill")
    jumpToSelectedSegmentEnabled = value(bool, "jump", False)
    useTerminologySelector = value(bool, "useTerminologySelector", True)
    terminologySelectorOptionVisible = value(bool, "terminologyOption", False)
    segmentCount = Property(int, lambda self: len(self._segment_ids()))

    def _segment_ids(self) -> list[str]:
        if self._node is None:
            return []
        segmentation = self._node.GetSegmentation()
        return [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]

    def _fill(self, *_: Any) -> None:
        if "_model" not in self.__dict__:
            return
        selected = self.selectedSegmentIDs()
        self._model.setRowCount(0)
        self._model.setHorizontalHeaderLabels(["", "", "Opacity", "Name", "Layer", ""])
        segmentation = self._node.GetSegmentation() if self._node is not None else None
        display = self._node.GetDisplayNode() if self._node is not None else None
        for segment_id in self.displayedSegmentIDs():
            segment = segmentation.GetSegment(segment_id)
            seen = display is None or display.GetSegmentVisibility(segment_id)
            row = [QStandardItem(t) for t in ("\u25c9" if seen else "\u25cb", "", "1.00", segment.GetName(), "", "")]
            if display is not None:
                row[2].setText(f"{display.GetSegmentOpacity3D(segment_id):.2f}")
            row[1].setBackground(QColor.fromRgbF(*segment.GetColor()))
            row[3].setData(segment_id, qt.Qt.UserRole)
            row[4].setText(str(segmentation.GetLayerIndex(segment_id)))
            row[5].setText("\u2022\u270e\u2714\u2691"[slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatus(segment)])
            self._model.appendRow(row)
        for index, name in enumerate(self._columns):
            self._table.setColumnHidden(index, name != "name" and not getattr(self, f"{name}ColumnVisible"))
        header = self._table.horizontalHeader()
        header.setVisible(self.headerVisible)
        header.setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        header.setSectionResizeMode(3, qt.QHeaderView.Stretch)
        self.setSelectedSegmentIDs(selected)

    def _clicked(self, index: Any) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if index.column() == 0 and display is not None and not self.readOnly:
            segment_id = self.segmentIDForRow(index.row())
            display.SetSegmentVisibility(segment_id, not display.GetSegmentVisibility(segment_id))

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        _is_none_or(node, slicer.vtkMRMLSegmentationNode)
        self._node = node
        self._observers.clear()
        self._observers.add(node, self._fill, vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLDisplayableNode.DisplayModifiedEvent)
        if node is not None:
            s = slicer.vtkSegmentation
            self._observers.add(node.GetSegmentation(), self._fill, s.SegmentAdded, s.SegmentRemoved, s.SegmentModified)
        self._fill()

    def setMRMLScene(self, scene: Any) -> None:
        super().setMRMLScene(scene)

    def tableWidget(self) -> Any:
        return self._table

    def selectedSegmentIDs(self) -> tuple[str, ...]:
        return tuple(self.segmentIDForRow(i.row()) for i in self._table.selectionModel().selectedRows())

    def setSelectedSegmentIDs(self, segmentIDs: Any) -> None:
        selection = self._table.selectionModel()
        flags = qt.QItemSelectionModel.Select | qt.QItemSelectionModel.Rows
        wanted = [r for r in (self.rowForSegmentID(i) for i in segmentIDs) if r >= 0]
        if [i.row() for i in selection.selectedRows()] != wanted:
            selection.clearSelection()
            for row in wanted:
                selection.select(self._model.index(row, 0), flags)

    def clearSelection(self) -> None:
        self._table.clearSelection()

    def displayedSegmentIDs(self) -> tuple[str, ...]:
        ids = [i for i in self._segment_ids() if i not in self._hide]
        wanted = self.textFilter.lower()
        return tuple(i for i in ids if wanted in self._node.GetSegmentation().GetSegment(i).GetName().lower())

    def rowForSegmentID(self, segmentID: str) -> int:
        rows = [r for r in range(self._model.rowCount()) if self.segmentIDForRow(r) == segmentID]
        return rows[0] if rows else -1

    def segmentIDForRow(self, row: int) -> str:
        return self._model.item(row, 3).data(qt.Qt.UserRole)

    def setSelectionMode(self, mode: int) -> None:
        self._table.setSelectionMode(qt.QAbstractItemView.SelectionMode(int(mode)))

    def setOpacityColumnVisible(self, visible: bool) -> None:
        self.opacityColumnVisible = visible

    def setStatusColumnVisible(self, visible: bool) -> None:
        self.statusColumnVisible = visible

    def setReadOnly(self, readOnly: bool) -> None:
        self.readOnly = readOnly


@standin
class qMRMLSegmentationShow3DButton(ctkMenuButton):
    """qMRMLSegmentationShow3DButton.h: makes or removes the closed surface representation."""

    locked = value(bool, "locked", False, "_update")

    def __init__(self, parent: Any = None) -> None:
        super().__init__("Show 3D", parent)
        self._observers = _Observers(self)
        self._node: Any = None
        self.setCheckable(True)
        self.toggled.connect(self._toggled)
        self._update()

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        _is_none_or(node, slicer.vtkMRMLSegmentationNode)
        self._node = node
        self._observers.clear()
        self._observers.add(node, self._update, vtk.vtkCommand.ModifiedEvent, slicer.vtkMRMLDisplayableNode.DisplayModifiedEvent)
        self._update()

    def setLocked(self, locked: bool) -> None:
        self.locked = locked

    def _update(self, *_: Any) -> None:
        node = self.__dict__.get("_node")
        self.setEnabled(node is not None and not self.locked)
        self.blockSignals(True)
        name = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
        self.setChecked(node is not None and node.GetSegmentation().ContainsRepresentation(name))
        self.blockSignals(False)

    def _toggled(self, on: bool) -> None:
        if self._node is None:
            return
        if on:
            self._node.CreateClosedSurfaceRepresentation()
        else:
            self._node.RemoveClosedSurfaceRepresentation()


@standin
class qMRMLTableView(QTableView):
    """qMRMLTableView.h, for looking: edits are not written to the node."""

    mrmlSceneChanged = Signal(object)
    signals_ = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChanged"}

    transposed = value(bool, "transposed", False, "_fill")

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._table_node: Any = None
        self._view_node: Any = None
        self._observers = _Observers(self)
        self._model = QStandardItemModel(self)
        self.setModel(self._model)

    # These two are of the node.

    def _row_locked(self) -> bool:
        return self._table_node is not None and bool(self._table_node.GetUseColumnTitleAsColumnHeader())

    def setFirstRowLocked(self, locked: bool) -> None:
        if self._table_node is not None:
            self._table_node.SetUseColumnTitleAsColumnHeader(locked)

    def _column_locked(self) -> bool:
        return self._table_node is not None and bool(self._table_node.GetUseFirstColumnAsRowHeader())

    def setFirstColumnLocked(self, locked: bool) -> None:
        if self._table_node is not None:
            self._table_node.SetUseFirstColumnAsRowHeader(locked)

    firstRowLocked = Property(bool, _row_locked, setFirstRowLocked)
    firstColumnLocked = Property(bool, _column_locked, setFirstColumnLocked)

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        self._scene = scene
        self.mrmlSceneChanged.emit(scene)

    def mrmlTableNode(self) -> Any:
        return self._table_node

    def setMRMLTableNode(self, node: Any) -> None:
        _is_none_or(node, slicer.vtkMRMLTableNode)
        self._table_node = node
        self._observers.clear()
        self._observers.add(node, self._fill, vtk.vtkCommand.ModifiedEvent)
        self._fill()

    def _fill(self, *_: Any) -> None:
        self._model.clear()
        table = self._table_node.GetTable() if self._table_node is not None else None
        if table is None:
            return
        columns = [table.GetColumn(c) for c in range(table.GetNumberOfColumns())]
        lines = [[c.GetVariantValue(r).ToString() for c in columns] for r in range(table.GetNumberOfRows())]
        titles = [self._table_node.GetColumnTitle(c.GetName()) or c.GetName() for c in columns]
        if not self.firstRowLocked:
            lines.insert(0, titles)
            titles = [chr(65 + i) for i in range(len(columns))]
        labels = [str(i + 1) for i in range(len(lines))]
        if self.firstColumnLocked:
            labels, lines, titles = [line[0] for line in lines], [line[1:] for line in lines], titles[1:]
        if self.transposed:
            labels, titles, lines = titles, labels, [list(line) for line in zip(*lines)]
        for line in lines:
            self._model.appendRow([QStandardItem(t) for t in line])
        self._model.setHorizontalHeaderLabels(titles)
        self._model.setVerticalHeaderLabels(labels)

    def setTransposed(self, transposed: bool) -> None:
        self.transposed = transposed

    def copySelection(self) -> None:
        rows: dict[int, list[str]] = {}
        for index in sorted(self.selectedIndexes(), key=lambda i: (i.row(), i.column())):
            rows.setdefault(index.row(), []).append(index.data())
        qt.QApplication.clipboard().setText("\n".join("\t".join(r) for r in rows.values()))


def install() -> None:
    for name, cls in standins.items():
        if name.startswith("qMRML"):
            setattr(slicer, name, cls)
