"""The Segment Editor for scripted effects: `effects.install()` after slicergui.start().

Names, arguments and return types after Slicer 5.10 and 5.12, Modules/Loadable/Segmentations: EditorEffects/
qSlicerSegmentEditorAbstractEffect.h, qSlicerSegmentEditorScriptedEffect.h, qSlicerSegmentEditorEffectFactory.h,
EditorEffects/Python/SegmentEditorEffects, Widgets/qMRMLSegmentEditorWidget.h; Libs/MRML/Widgets/qMRMLSliceWidget.h and
qMRMLSliceView.h. What is written, masked, undone and redone goes through Slicer's own vtkSlicerSegmentEditorLogic, events come
from VTK's interactors, and what Slicer reports as an error raises here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import application
import mrmlwidgets
import qt
import slicer
import vtk
from PySide6.QtCore import QObject
from PySide6.QtWidgets import QFormLayout, QFrame, QLayout, QWidget
from pythonqt import dialogs, standin

MODES = ("ModificationModeSet", "ModificationModeAdd", "ModificationModeRemove", "ModificationModeRemoveAll")
# Of the methods that Slicer calls; an effect may leave out those that it does not need.
CALLED = """icon helpText clone activate deactivate setupOptionsFrame createCursor processInteractionEvents processViewNodeEvents
setMRMLDefaults referenceGeometryChanged sourceVolumeNodeChanged masterVolumeNodeChanged layoutChanged interactionNodeModified
updateGUIFromMRML updateMRMLFromGUI cleanup""".split()
EVENTS = """LeftButtonPressEvent LeftButtonReleaseEvent LeftButtonDoubleClickEvent RightButtonPressEvent RightButtonReleaseEvent
MiddleButtonPressEvent MiddleButtonReleaseEvent MouseMoveEvent MouseWheelForwardEvent MouseWheelBackwardEvent KeyPressEvent
KeyReleaseEvent EnterEvent LeaveEvent""".split()


class qSlicerSegmentEditorAbstractEffect(QObject):
    ModificationModeSet, ModificationModeAdd, ModificationModeRemove, ModificationModeRemoveAll = range(4)
    NotConfirmed, ConfirmedWithoutDialog, ConfirmedWithDialog = range(3)


@standin
class qSlicerSegmentEditorScriptedEffect(qSlicerSegmentEditorAbstractEffect):
    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._self: Any = None
        self._values = {
            "name": "UnnamedScriptedEffect",
            "title": "",
            "perSegment": True,
            "requireSegments": True,
            "showEffectCursorInSliceView": True,
            "showEffectCursorInThreeDView": False,
        }
        self._node: Any = None
        self._active = False
        self._editor: Any = None  # the widget that it belongs to
        self._confirmed: Any = None
        self._frame = QFrame()
        QFormLayout(self._frame)
        self._frame.hide()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and "_destroyed" in self.__dict__:
            raise ValueError(f"Trying to call '{name}' on a destroyed {type(self).__name__} object")
        return super().__getattribute__(name)

    # --- the Python side

    def setPythonSource(self, newPythonSource: str) -> bool:
        """The file becomes the module of its folder's name, alone: not a package."""
        path = Path(newPythonSource)
        if "\\" in newPythonSource or path.suffix != ".py" or not path.is_file():
            raise ValueError(f"no Python source: {newPythonSource!r}")
        name = path.parent.name
        module = sys.modules.setdefault(name, ModuleType(name))
        class_name = path.stem if path.stem.endswith("Effect") else path.stem + "Effect"
        if not hasattr(module, class_name):
            module.__file__ = str(path)
            exec(compile(path.read_text("utf-8"), str(path), "exec"), vars(module))
        self._self = getattr(module, class_name)(self)
        setattr(slicer, name, self._self)
        return True

    def self(self) -> Any:
        return self._self

    def _call(self, method: str, *arguments: Any) -> Any:
        assert method in CALLED
        function = getattr(self._self, method, None)
        return None if function is None else function(*arguments)

    def clone(self) -> Any:
        found = self._call("clone")
        if not isinstance(found, qSlicerSegmentEditorAbstractEffect):
            raise TypeError("clone: Invalid cloned effect object returned from python!")
        return found

    def icon(self) -> Any:
        return self._call("icon")

    def helpText(self) -> str:
        text = self._call("helpText")
        if not isinstance(text, str):
            raise TypeError("Function 'helpText' is expected to return a string!")
        return text

    def activate(self) -> None:
        self._frame.setVisible(True)
        self._active = True
        self.updateGUIFromMRML()
        self._call("activate")

    def deactivate(self) -> None:
        self._frame.setVisible(False)
        self._active = False
        self._call("deactivate")

    def active(self) -> bool:
        return self._active

    def updateGUIFromMRML(self) -> None:
        if self._active:
            self._call("updateGUIFromMRML")

    def updateMRMLFromGUI(self) -> None:
        self._call("updateMRMLFromGUI")

    def createCursor(self, viewWidget: Any) -> Any:
        cursor = self._call("createCursor", viewWidget)
        if not isinstance(cursor, qt.QCursor):
            raise TypeError("createCursor must return a QCursor")
        return cursor

    def cleanup(self) -> None:
        self._call("cleanup")

    # --- nodes and parameters

    def parameterSetNode(self) -> Any:
        return self._node

    def setParameterSetNode(self, node: Any) -> None:
        self._node = node

    def scene(self) -> Any:
        return None if self._node is None else self._node.GetScene()

    def _attribute(self, name: str) -> str:
        return f"{self.name}.{name}"

    def parameterDefined(self, name: str) -> bool:
        return bool(self._node is not None and self._node.GetAttribute(self._attribute(name)))

    def parameter(self, name: str) -> str:
        if self._node is None:
            return ""
        value = self._node.GetAttribute(self._attribute(name))
        if value is None:
            raise KeyError(f"Parameter named {name} cannot be found for effect {self.name}")
        return str(value)

    def integerParameter(self, name: str) -> int:
        return int(self.parameter(name)) if self._node is not None else 0

    def setParameter(self, name: str, value: Any) -> None:
        if self._node is None:
            raise RuntimeError(f"Invalid segment editor parameter set node set to effect {self.name}")
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise TypeError(f"setParameter takes a string, an int or a double, not {value!r}")
        text, key = str(value), self._attribute(name)
        known = self._node.GetAttribute(key)
        if known == text or (known is None and not text):
            return
        was = self._node.GetDisableModifiedEvent()
        self._node.SetDisableModifiedEvent(1)
        self._node.SetAttribute(key, text)
        self._node.SetDisableModifiedEvent(was)
        self._node.InvokeCustomModifiedEvent(self._node.EffectParameterModified)

    def setParameterDefault(self, name: str, value: Any) -> None:
        if not self.parameterDefined(name):
            self.setParameter(name, value)

    # --- the options

    def optionsFrame(self) -> Any:
        return self._frame

    def optionsLayout(self) -> Any:
        return self._frame.layout()

    def addOptionsWidget(self, newOptionsWidget: Any) -> None:
        if not isinstance(newOptionsWidget, (QWidget, QLayout)):
            raise TypeError("addOptionsWidget takes a widget or a layout")
        self._frame.layout().addRow(newOptionsWidget)

    def addLabeledOptionsWidget(self, label: str, newOptionsWidget: Any) -> Any:
        if not isinstance(newOptionsWidget, (QWidget, QLayout)):
            raise TypeError("addLabeledOptionsWidget takes a widget or a layout")
        widget = qt.QLabel(label)
        self._frame.layout().addRow(widget, newOptionsWidget)
        return widget

    # --- editing

    def saveStateForUndo(self) -> None:
        self._editor.saveStateForUndo()

    def modifySegmentByLabelmap(
        self, segmentationNode: Any, segmentID: str, modifierLabelmap: Any, modificationMode: int, *more: Any
    ) -> None:
        extent = [list(m) for m in more if not isinstance(m, bool)]
        bypass = next((m for m in more if isinstance(m, bool)), False)
        if segmentationNode.GetSegmentation().GetSegment(segmentID) is None or modifierLabelmap is None or modificationMode not in range(4):
            raise RuntimeError("Invalid segmentation, segment or modifier labelmap")
        logic = self._editor._logic
        kind = getattr(logic, MODES[modificationMode])
        logic.ModifySegmentByLabelmap(segmentationNode, segmentID, modifierLabelmap, kind, *extent, self.perSegment, bypass)

    def confirmCurrentSegmentVisible(self) -> int:
        """Asks by a message box: True shows the segment, None leaves it hidden, False cancels."""
        node = self._node.GetSegmentationNode() if self._node is not None else None
        segment_id = self._node.GetSelectedSegmentID() if node is not None else None
        if not segment_id:
            return self.ConfirmedWithoutDialog
        segment = node.GetSegmentation().GetSegment(segment_id)
        if self._confirmed is segment:
            return self.ConfirmedWithoutDialog
        display = node.GetDisplayNode()
        if display is not None and display.GetVisibility() and display.GetSegmentVisibility(segment_id):
            return self.ConfirmedWithoutDialog
        answer = dialogs.ask("message", "The currently selected segment is hidden. Would you like to make it visible?")
        if answer is False:
            return self.NotConfirmed
        if answer:
            display.SetVisibility(True)
            display.SetSegmentVisibility(segment_id, True)
        else:
            self._confirmed = segment
        return self.ConfirmedWithDialog

    # --- views

    @staticmethod
    def renderWindow(viewWidget: Any) -> Any:
        return viewWidget.sliceView().renderWindow()

    @staticmethod
    def renderer(viewWidget: Any) -> Any:
        return viewWidget.sliceView().renderWindow().GetRenderers().GetItemAsObject(0)

    @staticmethod
    def viewNode(viewWidget: Any) -> Any:
        return viewWidget.sliceLogic().GetSliceNode()

    def segmentationDisplayableInView(self, viewNode: Any) -> bool:
        return bool(self._editor._logic.IsSegmentationDisplayableInView(viewNode))

    @staticmethod
    def sliceSpacing(sliceWidget: Any) -> float:
        return slicer.vtkSlicerSegmentEditorLogic.GetSliceSpacing(sliceWidget.mrmlSliceNode(), sliceWidget.sliceLogic())

    @staticmethod
    def scheduleRender(viewWidget: Any) -> None:
        viewWidget.sliceView().scheduleRender()

    def addActor2D(self, viewWidget: Any, actor: Any) -> None:
        _is(actor, vtk.vtkActor2D)
        self.renderer(viewWidget).AddViewProp(actor)
        self.scheduleRender(viewWidget)

    def removeActor2D(self, viewWidget: Any, actor: Any) -> None:
        _is(actor, vtk.vtkActor2D)
        self.renderer(viewWidget).RemoveViewProp(actor)
        self.scheduleRender(viewWidget)


def _property(name: str) -> property:
    def put(self: Any, value: Any) -> None:
        if not isinstance(value, type(self._values[name])):
            raise TypeError(f"{name} does not accept {value!r}")
        self._values[name] = value

    return property(lambda self: self._values[name], put)


for _name in ("name", "title", "perSegment", "requireSegments", "showEffectCursorInSliceView", "showEffectCursorInThreeDView"):
    setattr(qSlicerSegmentEditorScriptedEffect, _name, _property(_name))


def _is(thing: Any, kind: type) -> None:
    if not isinstance(thing, kind):
        raise TypeError(f"{thing!r} is no {kind.__name__}")


@standin
class qSlicerSegmentEditorEffectFactory(QObject):
    _registered: list[Any] = []

    def instance(self) -> Any:
        return self

    def registerEffect(self, effectToRegister: Any) -> bool:
        if any(e.name == effectToRegister.name for e in self._registered):
            return False
        self._registered.append(effectToRegister)
        return True


class AbstractScriptedSegmentEditorEffect:
    """Python/SegmentEditorEffects/AbstractScriptedSegmentEditorEffect.py, but for what calls 32-bit vectors."""

    def __init__(self, scriptedEffect: Any) -> None:
        self.scriptedEffect = scriptedEffect

    def register(self) -> None:
        qSlicerSegmentEditorEffectFactory().instance().registerEffect(self.scriptedEffect)


def _render_window(view: Any) -> Any:
    """Of a view that nobody looks at: its renderer keeps the actors."""
    if "_window" not in view.__dict__:
        view._window = vtk.vtkRenderWindow()
        view._window.AddRenderer(vtk.vtkRenderer())
    return view._window


def _schedule_render(view: Any) -> None:
    view.renders_of_the_test = getattr(view, "renders_of_the_test", 0) + 1


@standin
class qMRMLSegmentEditorWidget(mrmlwidgets.qMRMLWidget):
    """Of the widget what drives effects; its own tables and buttons are not there."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._logic = slicer.vtkSlicerSegmentEditorLogic()
        self._logic.SetMRMLApplicationLogic(slicer.app.applicationLogic())
        self._node: Any = None
        self._source: Any = None
        self._active: Any = None
        self._updating = self._selected = False
        self._tags: list[tuple[Any, int]] = []
        self._views: list[tuple[Any, int]] = []
        self._effects = [e.clone() for e in qSlicerSegmentEditorEffectFactory._registered]
        self._saved = 0  # states for undo
        qt.QVBoxLayout(self)
        for effect in self._effects:
            effect._editor = self
            self.layout().addWidget(effect.optionsFrame())
            effect._call("setupOptionsFrame")

    def setMRMLScene(self, scene: Any) -> None:
        super().setMRMLScene(scene)
        self._logic.SetMRMLScene(scene)
        self._tags.append((scene, scene.AddObserver(scene.EndCloseEvent, lambda *_: self._onSceneEndClose())))

    def mrmlSegmentEditorNode(self) -> Any:
        return self._node

    def setMRMLSegmentEditorNode(self, newSegmentEditorNode: Any) -> None:
        if newSegmentEditorNode is self._node:
            return
        self._unobserve(self._node)
        self._node = node = newSegmentEditorNode
        self._logic.SetSegmentEditorNode(node)
        if node is None:
            return  # the active effect stays active until there is another node
        self._initializeParameterSetNode()
        for event in (vtk.vtkCommand.ModifiedEvent, node.EffectParameterModified):
            self._tags.append((node, node.AddObserver(event, lambda *_: self._update())))
        self._update()

    def _initializeParameterSetNode(self) -> None:
        for effect in self._effects:
            effect.setParameterSetNode(self._node)
            effect._call("setMRMLDefaults")

    def _onSceneEndClose(self) -> None:
        """Of a node that is no singleton nobody holds more than a weak pointer."""
        if self._node is not None and self._node.GetScene() is not None:
            self._initializeParameterSetNode()
            self._update()
            return
        self.setMRMLSegmentEditorNode(None)
        for effect in self._effects:
            effect.setParameterSetNode(None)

    def setSegmentationNode(self, node: Any) -> None:
        self._logic.SetSegmentationNode(node)
        self._update()

    def setSourceVolumeNode(self, node: Any) -> None:
        self._logic.SetSourceVolumeNode(node)
        self._update()

    def segmentationNode(self) -> Any:
        return self._logic.GetSegmentationNode()

    def setCurrentSegmentID(self, segmentID: str) -> None:
        self._logic.SetCurrentSegmentID(segmentID)

    def currentSegmentID(self) -> str:
        return self._logic.GetCurrentSegmentID()

    def effectByName(self, name: str) -> Any:
        return next((e for e in self._effects if e.name == name), None)

    def activeEffect(self) -> Any:
        return self._active

    def setActiveEffect(self, effect: Any) -> None:
        if self._node is not None:
            self._node.SetActiveEffectName(effect.name if effect is not None else "")

    def setActiveEffectByName(self, effectName: str) -> None:
        self.setActiveEffect(self.effectByName(effectName))

    def undo(self) -> None:
        self._logic.Undo()
        self._update()

    def redo(self) -> None:
        self._logic.Redo()

    def saveStateForUndo(self) -> None:
        self._saved += 1
        if not self._logic.SaveStateForUndo():
            raise RuntimeError("the state was not saved")

    def _update(self) -> None:
        if self._node is None or self._updating:
            return
        self._updating = True
        try:
            source = self._node.GetSourceVolumeNode()
            if source is not self._source:
                self._source = source
                for effect in self._effects:
                    effect._call("sourceVolumeNodeChanged")
            held = self._node.GetSegmentationNode()
            segment = self._node.GetSelectedSegmentID()
            selected = held is not None and bool(segment) and held.GetSegmentation().GetSegment(segment) is not None
            if self._selected and not selected and self._active is not None and self._active.perSegment:
                self._node.SetActiveEffectName("")
            self._selected = selected
            wanted = self.effectByName(self._node.GetActiveEffectName() or "")
            if wanted is not self._active:
                former, self._active = self._active, wanted
                if former is not None:
                    former.deactivate()
                self._removeViewObservations()
                if wanted is not None:
                    self._setupViewObservations()
                    wanted.activate()
            if self._active is not None:
                self._active.updateGUIFromMRML()
        finally:
            self._updating = False

    def _onLayoutChanged(self) -> None:
        if self._active is not None:
            self._setupViewObservations()
        for effect in self._effects:
            effect._call("layoutChanged")

    def _setupViewObservations(self) -> None:
        self._removeViewObservations()
        manager = slicer.app.layoutManager()
        for widget in (manager.sliceWidget(name) for name in manager.sliceViewNames()):
            interactor, node = widget.sliceView().interactor(), widget.mrmlSliceNode()
            if not self._logic.IsSegmentationDisplayableInView(node):
                continue
            for event in EVENTS:
                self._observe(interactor, event, widget)
            tag = node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda node, _e, w=widget: self._viewEvent(node, w))
            self._views.append((node, tag))

    def _observe(self, interactor: Any, event: str, widget: Any) -> None:
        identifier, tags = getattr(vtk.vtkCommand, event), []

        def process(caller: Any, _event: Any) -> None:
            if self._active is None or self._node is None or self.mrmlScene().IsClosing():
                return
            abort = self._active._call("processInteractionEvents", caller, identifier, widget)
            if not isinstance(abort, bool):
                raise TypeError("function 'processInteractionEvents' is expected to return a boolean")
            if abort:
                interactor.GetCommand(tags[0]).SetAbortFlag(1)

        tags.append(interactor.AddObserver(event, process, 1.0))
        self._views.append((interactor, tags[0]))

    def _viewEvent(self, node: Any, widget: Any) -> None:
        if self._active is not None:
            self._active._call("processViewNodeEvents", node, vtk.vtkCommand.ModifiedEvent, widget)

    def _removeViewObservations(self) -> None:
        for of, tag in self._views:
            of.RemoveObserver(tag)
        self._views = []

    def _unobserve(self, node: Any) -> None:
        for of, tag in [t for t in self._tags if t[0] is node]:
            of.RemoveObserver(tag)
        self._tags = [t for t in self._tags if t[0] is not node]

    def _delete(self) -> None:
        """What its destructor does."""
        self._removeViewObservations()
        for effect in self._effects:
            effect.cleanup()
            effect._destroyed = True
        for of, tag in self._tags:
            of.RemoveObserver(tag)
        self.deleteLater()


def install() -> None:
    """Fresh: no effect is registered."""
    qSlicerSegmentEditorEffectFactory._registered = []
    bridge = ModuleType("qSlicerSegmentationsEditorEffectsPythonQt")
    for cls in (qSlicerSegmentEditorScriptedEffect, qSlicerSegmentEditorEffectFactory):
        setattr(bridge, cls.__name__, cls)
    effects = ModuleType("SegmentEditorEffects")
    effects.AbstractScriptedSegmentEditorEffect = AbstractScriptedSegmentEditorEffect  # type: ignore[attr-defined]
    for module in (bridge, effects):
        sys.modules[module.__name__] = module
    slicer.qSlicerSegmentEditorAbstractEffect = qSlicerSegmentEditorAbstractEffect
    slicer.qMRMLSegmentEditorWidget = qMRMLSegmentEditorWidget
    view: Any = application.qMRMLSliceView
    view.renderWindow, view.scheduleRender = _render_window, _schedule_render
    application.qMRMLSliceWidget.className = lambda self: "qMRMLSliceWidget"  # type: ignore[attr-defined]
