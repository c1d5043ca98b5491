"""`slicer.app`, its managers, and the scripted modules in `slicer.modules`.

Names after Slicer 5.12: Base/QTCore/qSlicerCoreApplication.h, Base/QTGUI/qSlicerApplication.h,
qSlicerScriptedLoadableModule.h, qSlicerScriptedLoadableModuleWidget.h, Libs/MRML/Widgets/qMRMLLayoutManager.h. There is
no main window to find, but the layout manager, which Slicer has with such a window only (not with --no-main-window).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import mrmlwidgets
import qt
import slicer
import vtk
from ctkwidgets import value
from PySide6.QtCore import Property, QObject, Signal
from PySide6.QtGui import QIcon
from PySide6.QtWidgets import QApplication
from pythonqt import standin
from vtk.util.misc import calldata_type


@standin
class qSlicerModuleManager(QObject):
    moduleLoaded = Signal(str)
    moduleAboutToBeUnloaded = Signal(str)
    moduleUnloaded = Signal(str)
    signals_ = {
        "moduleLoaded(QString)": "moduleLoaded",
        "moduleAboutToBeUnloaded(QString)": "moduleAboutToBeUnloaded",
        "moduleUnloaded(QString)": "moduleUnloaded",
    }

    def module(self, name: str) -> Any:
        return getattr(slicer.modules, name.lower(), None)


class qSlicerCoreIOManager:
    """loadNodes() and saveNodes() for scenes, volumes and segmentations, as slicer.util calls them."""

    def fileType(self, path: str) -> str:
        for endings, kind in (((".mrml", ".mrb"), "SceneFile"), ((".seg.nrrd",), "SegmentationFile")):
            if str(path).lower().endswith(endings):
                return kind
        return "VolumeFile"

    def loadNodes(self, fileType: str, properties: dict[str, Any], loaded: Any = None, messages: Any = None) -> bool:
        path = str(properties["fileName"])
        name = properties.get("name") or Path(path).name.split(".")[0]
        if not os.path.exists(path):
            return False
        if fileType == "SceneFile":
            clear = bool(properties.get("clear", True))
            if path.endswith(".mrb"):
                return bool(slicer.mrmlScene.ReadFromMRB(path, clear))
            slicer.mrmlScene.SetURL(path)
            return bool(slicer.mrmlScene.Connect() if clear else slicer.mrmlScene.Import())
        if fileType == "SegmentationFile":
            node = slicer.modules.segmentations.logic().LoadSegmentationFromFile(path, True, name)
        elif fileType == "VolumeFile":
            node = slicer.modules.volumes.logic().AddArchetypeVolume(path, name, 8 + bool(properties.get("labelmap")))
        else:
            raise NotImplementedError(f"the stand-in cannot load a {fileType}")
        if node is None:
            return False
        if loaded is not None:
            loaded.AddItem(node)
        return True

    def saveNodes(self, fileType: str, properties: dict[str, Any], messages: Any = None) -> bool:
        path = str(properties["fileName"])
        if fileType == "SceneFile":
            if path.endswith(".mrb"):
                return bool(slicer.mrmlScene.WriteToMRB(path))
            slicer.mrmlScene.SetURL(path)
            return bool(slicer.mrmlScene.Commit(path))
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        if node.GetStorageNode() is None:
            node.AddDefaultStorageNode(path)
        node.GetStorageNode().SetFileName(path)
        return bool(node.GetStorageNode().WriteData(node))

    def fileWriterFileType(self, node: Any) -> str:
        return "NodeFile"


class qMRMLSliceView:
    """Libs/MRML/Widgets/qMRMLSliceView.h and ctkVTKAbstractView.h, without a picture: VTK's interactor, which a test lets invoke
    the events of the mouse, and the cursor."""

    def __init__(self) -> None:
        self._interactor = vtk.vtkRenderWindowInteractor()
        self.cursor_of_the_test: Any = None

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and "_destroyed" in self.__dict__:
            raise ValueError(f"Trying to call '{name}' on a destroyed {type(self).__name__} object")
        return super().__getattribute__(name)

    def interactor(self) -> Any:
        return self._interactor

    def setViewCursor(self, cursor: Any) -> None:
        if not isinstance(cursor, qt.QCursor):
            raise ValueError("called with wrong argument types")
        self.cursor_of_the_test = cursor

    def unsetViewCursor(self) -> None:
        self.cursor_of_the_test = None


class qMRMLSliceWidget:
    """The logic, the nodes and the view of a slice, without its picture."""

    def __init__(self, logic: Any) -> None:
        self._logic, self._view = logic, qMRMLSliceView()

    def sliceView(self) -> Any:
        return self._view

    def sliceLogic(self) -> Any:
        return self._logic

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def mrmlSliceCompositeNode(self) -> Any:
        return self._logic.GetSliceCompositeNode()

    def fitSliceToBackground(self) -> None:
        self._logic.FitSliceToBackground()


@standin
class qSlicerLayoutManager(QObject):
    layoutChanged = Signal(int)
    signals_ = {"layoutChanged(int)": "layoutChanged"}

    def __init__(self, application_logic: Any) -> None:
        super().__init__()
        self._logic = slicer.vtkMRMLLayoutLogic()
        self._logic.SetMRMLScene(slicer.mrmlScene)  # makes the nodes of the views
        self._logic.GetLayoutNode().SetViewArrangement(slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView)
        self._application_logic, self._slices = application_logic, {}
        self._observers = mrmlwidgets._Observers(self)
        self._observers.add(self._logic.GetLayoutNode(), self._layout_modified, vtk.vtkCommand.ModifiedEvent)
        self._observers.add(slicer.mrmlScene, self._batch_ended, slicer.vtkMRMLScene.EndBatchProcessEvent)
        self._observers.add(slicer.mrmlScene, self._node_removed, slicer.vtkMRMLScene.NodeRemovedEvent)
        for name in ("Red", "Green", "Yellow"):
            self._make_slice(slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLSliceNode"))

    def _make_slices(self) -> None:
        """A widget for each slice node that the layout has; they stay when another layout is shown."""
        nodes = self._logic.GetViewNodes()
        for i in range(nodes.GetNumberOfItems()):
            node = nodes.GetItemAsObject(i)
            if node.IsA("vtkMRMLSliceNode"):
                self._make_slice(node)

    def _make_slice(self, node: Any) -> None:
        if node.GetLayoutName() in self._slices:
            return
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(self._application_logic)
        self._application_logic.GetSliceLogics().AddItem(logic)
        logic.SetMRMLScene(slicer.mrmlScene)
        logic.SetSliceNode(node)  # the layout's, as qMRMLSliceWidget does
        logic.ResizeSliceNode(256, 256)
        self._slices[node.GetLayoutName()] = qMRMLSliceWidget(logic)

    def _layout_modified(self, node: Any, event: str) -> None:
        # Whatever of the node has changed, be it a view that fills all or the description of a layout that is not on.
        if not slicer.mrmlScene.IsBatchProcessing():
            self._make_slices()
            self.layoutChanged.emit(node.GetViewArrangement())

    @calldata_type(vtk.VTK_OBJECT)
    def _node_removed(self, scene: Any, event: str, node: Any) -> None:
        """With a view's node goes its widget."""
        for name in [name for name, widget in self._slices.items() if widget.mrmlSliceNode() is node]:
            self._slices.pop(name).sliceView()._destroyed = True

    def _batch_ended(self, scene: Any, event: str) -> None:
        self._layout_modified(self._logic.GetLayoutNode(), event)

    def _set_layout(self, layout: int) -> None:
        node = self._logic.GetLayoutNode()
        if int(layout) == node.GetViewArrangement():
            return
        node.RemoveAllMaximizedViewNodes()  # which the node does not, told of another layout by itself
        node.SetViewArrangement(int(layout) if node.IsLayoutDescription(int(layout)) else node.SlicerLayoutConventionalView)

    layout = Property(int, lambda self: self._logic.GetLayoutNode().GetViewArrangement(), _set_layout)
    threeDViewCount = Property(int, lambda self: 0)

    def setLayout(self, newLayout: int) -> None:
        self.layout = newLayout

    def layoutLogic(self) -> Any:
        return self._logic

    def mrmlScene(self) -> Any:
        return slicer.mrmlScene

    def sliceViewNames(self) -> tuple[str, ...]:
        return tuple(self._slices)

    def sliceWidget(self, name: str) -> Any:
        return self._slices.get(name)

    def mrmlSliceLogics(self) -> Any:
        return slicer.app.applicationLogic().GetSliceLogics()

    def resetSliceViews(self) -> None:
        for widget in self._slices.values():
            widget.fitSliceToBackground()

    def resetThreeDViews(self) -> None:
        pass


@standin
class qSlicerApplication(QApplication):
    startupCompleted = Signal()
    mrmlSceneChanged = Signal(object)
    signals_ = {"startupCompleted()": "startupCompleted", "mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChanged"}

    def __init__(self, folder: Path, application_logic: Any) -> None:
        super().__init__(["Slicer"])
        self._logic, self._layout, self._io = application_logic, None, qSlicerCoreIOManager()
        self._modules = qSlicerModuleManager()
        self._folder, self._version = folder, (5, 12)
        self.setStyle("Fusion")
        self.applicationName = "Slicer"
        self.organizationName = "stand-in"
        qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
        qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, str(folder / "settings"))
        self._settings = qt.QSettings()

    temporaryPath = Property(str, lambda self: str(self._folder / "temporary"))
    slicerHome = Property(str, lambda self: str(self._folder / "home"))
    slicerUserSettingsFilePath = Property(str, lambda self: self._settings.fileName())
    extensionsInstallPath = Property(str, lambda self: str(self._folder / "extensions"))
    majorVersion = Property(int, lambda self: self._version[0])
    minorVersion = Property(int, lambda self: self._version[1])
    revision = Property(str, lambda self: "00000")

    def applicationLogic(self) -> Any:
        return self._logic

    def mrmlScene(self) -> Any:
        return slicer.mrmlScene

    def layoutManager(self) -> Any:
        return self._layout

    def moduleManager(self) -> Any:
        return self._modules

    def coreIOManager(self) -> Any:
        return self._io

    def ioManager(self) -> Any:
        return self._io

    def settings(self) -> Any:
        return self._settings

    def userSettings(self) -> Any:
        return self._settings

    def testingEnabled(self) -> bool:
        return False

    def startupEnvironment(self) -> Any:
        return qt.QProcessEnvironment.systemEnvironment()

    def pauseRender(self) -> None:
        pass

    def resumeRender(self) -> None:
        pass


@standin
class qSlicerScriptedLoadableModule(QObject):
    title = value(str, "title", "")
    categories = value("QStringList", "categories", ())
    dependencies = value("QStringList", "dependencies", ())
    contributors = value("QStringList", "contributors", ())
    helpText = value(str, "helpText", "")
    acknowledgementText = value(str, "acknowledgementText", "")
    hidden = value(bool, "hidden", False)
    widgetRepresentationCreationEnabled = value(bool, "creation", True)
    path = Property(str, lambda self: self._path)

    def __init__(self, name: str, path: str) -> None:
        super().__init__()
        self.name = name
        self._path, self._widget, self._icon, self._children = path, None, QIcon(), []

    icon = Property(QIcon, lambda self: self._icon, lambda self, icon: setattr(self, "_icon", icon))

    def widgetRepresentation(self) -> Any:
        if self._widget is None:
            self._widget = self.createNewWidgetRepresentation()
        return self._widget

    def createNewWidgetRepresentation(self) -> Any:
        widget = qSlicerScriptedLoadableModuleWidget(self)
        self._children.append(widget)
        return widget

    def logic(self) -> Any:
        return None


@standin
class qSlicerScriptedLoadableModuleWidget(mrmlwidgets.qMRMLWidget):
    """The QWidget whose layout the Python widget fills."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._module = module
        self._python: Any = None
        self._entered = False
        self.setLayout(qt.QVBoxLayout())
        self.setMRMLScene(slicer.mrmlScene)
        self._make()

    def _make(self) -> None:
        name = self._module.name
        self._python = getattr(sys.modules[name], f"{name}Widget")(self)
        setattr(slicer.modules, f"{name}Widget", self._python)
        self._python.setup()

    def self(self) -> Any:
        return self._python

    def module(self) -> Any:
        return self._module

    isEntered = Property(bool, lambda self: self._entered)

    def reload(self) -> None:
        self._make()

    def enter(self) -> None:
        self._entered = True
        if hasattr(self._python, "enter"):
            self._python.enter()

    def exit(self) -> None:
        self._entered = False
        if hasattr(self._python, "exit"):
            self._python.exit()


def load_module(path: Path) -> Any:
    """As Slicer's factory does it: runs the file as a module of its name and makes the class of that name."""
    name = path.stem
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    module = qSlicerScriptedLoadableModule(name, str(path))
    setattr(slicer.modules, name.lower(), module)
    instance = getattr(sys.modules[name], name)(module)
    setattr(slicer.modules, f"{name}Instance", instance)
    if hasattr(instance, "setup"):
        instance.setup()
    slicer.app.moduleManager().moduleLoaded.emit(name)
    return module
