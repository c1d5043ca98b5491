"""Slicer's application for the panel's tests: `gui = start(folder)`, once in a process that ends with os._exit.

The scene, its nodes and logics are Slicer's (slicer-core), the widgets Qt's (PySide6, off screen); what stands in for the
rest is in pythonqt.py, ctkwidgets.py, mrmlwidgets.py, parameters.py, scripted.py and application.py, and offers what Slicer offers.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
_gui: Gui | None = None


def start(folder: Path) -> Gui:
    """folder: an empty one, for settings and temporary files."""
    global _gui
    if _gui is not None:
        return _gui
    sys.path[:0] = [str(HERE), str(ROOT / "Testing" / "mrml")]
    import pythonqt  # before VTK: it sets PySide6 up
    import slicer
    import slicer.util
    import vtk
    from headless_slicer import Runtime

    folder.mkdir(parents=True, exist_ok=True)
    runtime = Runtime(folder / "slicer")
    slicer.mrmlScene = runtime.scene
    slicer.modules = runtime.modules
    logic = runtime.application_logic
    # Reading an .mrb goes through these.
    remote, data_io = slicer.vtkMRMLRemoteIOLogic(), slicer.vtkDataIOManagerLogic()
    for each in (remote, data_io):
        each.SetMRMLApplicationLogic(logic)
        each.SetMRMLScene(runtime.scene)
    remote.GetCacheManager().SetRemoteCacheDirectory(str(folder / "cache"))
    data_io.SetAndObserveDataIOManager(remote.GetDataIOManager())
    remote.AddDataIOToScene()

    import application
    import mrmlwidgets
    import parameters
    import scripted

    slicer.app = application.qSlicerApplication(folder, logic)
    slicer.app._layout = application.qSlicerLayoutManager(logic)
    Path(slicer.app.temporaryPath).mkdir()
    Path(slicer.app.slicerHome).mkdir()
    for cls in (application.qSlicerScriptedLoadableModule, application.qSlicerScriptedLoadableModuleWidget):
        setattr(slicer, cls.__name__, cls)
    slicer.qSlicerWidget = mrmlwidgets.qMRMLWidget
    mrmlwidgets.install()
    scripted.install()
    slicer.parameterNodeWrapper = sys.modules["slicer.parameterNodeWrapper"] = parameters
    sys.modules["SampleData"] = _sample_data()
    for kind in ("error", "warning", "info"):
        setattr(slicer.util, f"{kind}Display", _display(kind))
    slicer.util.delayDisplay = lambda message, autoCloseMsec=1000, parent=None, **kwargs: pythonqt.dialogs.show("delay", message)
    _gui = Gui(folder, runtime, remote, data_io)
    vtk.vtkObject.GlobalWarningDisplayOn()
    return _gui


def _display(kind: str) -> Callable[..., None]:
    from pythonqt import dialogs

    def display(text: str, windowTitle: str | None = None, parent: Any = None, standardButtons: Any = None, **kwargs: Any) -> None:
        dialogs.show(kind, text)

    return display


def _sample_data() -> ModuleType:
    """The Sample Data module's registry (Modules/Scripted/SampleData); `sources` is the stand-in's own."""
    module = ModuleType("SampleData")

    class SampleDataLogic:
        sources: list[dict[str, Any]] = []

        @staticmethod
        def registerCustomSampleDataSource(
            category: str = "Custom",
            sampleName: Any = None,
            uris: Any = None,
            fileNames: Any = None,
            nodeNames: Any = None,
            customDownloader: Any = None,
            thumbnailFileName: Any = None,
            loadFileType: Any = None,
            loadFiles: Any = None,
            loadFileProperties: Any = None,
            checksums: Any = None,
        ) -> None:
            SampleDataLogic.sources.append(dict(locals()))

    module.SampleDataLogic = SampleDataLogic  # type: ignore[attr-defined]
    return module


class Gui:
    """The test's hands: opens, closes, reloads modules, handles the scene, waits and photographs.

    errors: the tracebacks of exceptions that no one caught, which Slicer would print to its Python console: those of slots,
    timers and observers among them. A test with errors has failed; the fixture `gui` sees to it.
    """

    def __init__(self, folder: Path, *kept: Any) -> None:
        import pythonqt
        import scripted

        self.folder = folder
        self.kept = list(kept)  # alive as long as the application
        self.dialogs = pythonqt.dialogs
        self.pip = scripted.pip
        self.errors: list[str] = []
        self._excepthook, sys.excepthook = sys.excepthook, self._uncaught

    def _uncaught(self, kind: type[BaseException], value: BaseException, trace: Any) -> None:
        self.errors.append("".join(traceback.format_exception(kind, value, trace)))
        self._excepthook(kind, value, trace)

    def reset(self) -> None:
        """No module loaded, an empty scene, no settings, Slicer 5.12."""
        import qt
        import slicer

        modules = [m for m in vars(slicer.modules).values() if isinstance(m, slicer.qSlicerScriptedLoadableModule)]
        for module in modules:
            for each in [c for c in module._children if c.isEntered]:
                each.exit()
            slicer.app.moduleManager().moduleAboutToBeUnloaded.emit(module.name)
            for name in (module.name.lower(), f"{module.name}Widget", f"{module.name}Instance"):
                vars(slicer.modules).pop(name, None)
            sys.modules.pop(module.name, None)
        slicer.mrmlScene.Clear(0)
        for node in slicer.util.getNodesByClass("vtkMRMLScriptedModuleNode"):  # closing the scene leaves singletons
            slicer.mrmlScene.RemoveNode(node)
        for each in [c for m in modules for c in m._children]:
            each.deleteLater()
        for widget in slicer.app.topLevelWidgets():
            widget.hide()
        self.process_events()
        self.dialogs.clear()
        self.pip.clear()
        self.use_slicer("5.12")
        qt.QSettings().clear()
        sys.modules["SampleData"].SampleDataLogic.sources.clear()
        self.process_events()

    # --- modules

    def load(self, name: str = "UNetSegmentation", path: Path | None = None) -> Any:
        """Loads a module as Slicer's start does, if it is not loaded yet; startupCompleted() follows."""
        import application
        import slicer

        if not hasattr(slicer.modules, name.lower()):
            application.load_module(path or ROOT / name / f"{name}.py")
            slicer.app.startupCompleted.emit()
        return getattr(slicer.modules, name.lower())

    def open(self, name: str = "UNetSegmentation", path: Path | None = None) -> Any:
        """The Python widget of the module: set up, entered and shown."""
        representation = self.load(name, path).widgetRepresentation()
        representation.resize(420, 900)
        representation.show()
        if not representation.isEntered:
            representation.enter()
        self.process_events()
        return representation.self()

    def open_another(self, name: str = "UNetSegmentation") -> Any:
        """A second widget of the module, as slicer.util.getNewModuleWidget() makes one: set up, never entered."""
        import slicer

        widget = slicer.util.getNewModuleWidget(name)
        widget.parent.show()
        self.process_events()
        return widget

    def leave(self, widget: Any) -> None:
        """The user selects another module."""
        widget.parent.exit()
        widget.parent.hide()

    def close(self, widget: Any) -> None:
        """As when Slicer ends: exit(), cleanup(), and the widget is gone."""
        import slicer

        module, representation = widget.parent.module(), widget.parent
        if representation.isEntered:
            representation.exit()
        slicer.app.moduleManager().moduleAboutToBeUnloaded.emit(module.name)
        for each in module._children:
            each.hide()
            each.deleteLater()
        module._children, module._widget = [], None
        vars(slicer.modules).pop(f"{module.name}Widget", None)
        self.process_events()

    def reload(self, name: str = "UNetSegmentation") -> Any:
        """Developer mode's Reload."""
        import slicer

        slicer.util.reloadScriptedModule(name)
        self.process_events()
        return slicer.util.getModuleWidget(name)

    def use_slicer(self, version: str) -> None:
        """ "5.10" is without slicer.packaging, "5.12" with it."""
        import scripted
        import slicer

        slicer.app._version = tuple(int(v) for v in version.split("."))
        scripted.use_packaging(slicer.app._version >= (5, 12))

    # --- the scene

    def close_scene(self) -> None:
        import slicer

        slicer.mrmlScene.Clear(0)
        self.process_events()

    def save_scene(self, path: Path) -> None:
        import slicer

        if not slicer.util.saveScene(str(path)):
            raise AssertionError(f"the scene was not saved to {path}")

    def load_scene(self, path: Path) -> None:
        """Closes the scene and loads another, as File/Open does."""
        import slicer

        slicer.util.loadScene(str(path), {"clear": True})
        self.process_events()

    # --- time

    def process_events(self, how: int = 0) -> None:
        """how: QEventLoop's flags."""
        import qt
        import slicer

        slicer.app.processEvents(qt.QEventLoop.ProcessEventsFlag(how))
        slicer.app.sendPostedEvents(None, qt.QEvent.DeferredDelete)

    def wait(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Runs the event loop until the condition holds, and gives its value; AssertionError after `seconds`.

        It sleeps until there is an event, or for 20 ms, as the condition may hang on something else: to ask all the time took as
        much from the workers that most tests wait for as these need.
        """
        import qt

        end = time.monotonic() + seconds
        timer = qt.QTimer()
        timer.start(20)
        try:
            while not (held := condition()):
                if time.monotonic() > end:
                    raise AssertionError(f"did not come true within {seconds} s")
                self.process_events(qt.QEventLoop.WaitForMoreEvents)
        finally:
            timer.stop()
        return held

    @contextmanager
    def longest_block(self) -> Iterator[list[float]]:
        """Gives a list with the longest time, in seconds, that the event loop was kept from a timer of 1 ms meanwhile.

        Counted is what this process computed, not what the machine gave to others, so that a test may set a bound.
        """
        import qt

        longest, last = [0.0], [time.process_time()]
        timer = qt.QTimer()

        def tick() -> None:
            now = time.process_time()
            longest[0], last[0] = max(longest[0], now - last[0]), now

        timer.connect("timeout()", tick)
        timer.start(1)
        try:
            yield longest
        finally:
            tick()
            timer.stop()

    # --- mouse and keys

    def click(self, widget: Any, x: int | None = None, y: int | None = None) -> None:
        """A click of the left button into the widget's middle, or at its x, y; AssertionError where nobody could click."""
        import qt
        from PySide6.QtTest import QTest

        if not widget.isVisible():
            raise AssertionError(f"{widget.objectName} cannot be seen")
        at = widget.rect.center() if x is None or y is None else qt.QPoint(x, y)
        QTest.mouseClick(widget, qt.Qt.LeftButton, qt.Qt.NoModifier, at)
        self.process_events()

    def wheel(self, widget: Any, down: int = 1) -> None:
        """Turns of the mouse wheel over the widget."""
        from PySide6 import QtCore, QtGui, QtWidgets

        at, none, turn = QtCore.QPointF(5, 5), QtCore.QPoint(), QtCore.QPoint(0, -120 * down)
        buttons, keys = QtCore.Qt.MouseButton.NoButton, QtCore.Qt.KeyboardModifier.NoModifier
        phase = QtCore.Qt.ScrollPhase.NoScrollPhase
        event = QtGui.QWheelEvent(at, widget.mapToGlobal(at), none, turn, buttons, keys, phase, False)
        QtWidgets.QApplication.sendEvent(widget, event)
        self.process_events()

    def press(self, widget: Any, keys: str) -> None:
        """Keys such as "Ctrl+Return" or "Tab" with the focus on the widget, or text in single keys: "a"."""
        import qt
        from PySide6.QtTest import QTest

        window = widget.window()
        window.activateWindow()
        widget.setFocus()
        self.process_events()
        QTest.keySequence(widget, qt.QKeySequence(keys))
        self.process_events()

    # --- pictures

    def grab(self, widget: Any, path: Path | str, width: int | None = None, dark: bool = False) -> tuple[int, int]:
        """A PNG of the widget (Qt's or the module's) as high as its contents need, in Slicer's light or dark style.

        Its width and height: wider than asked for, if the contents need it; there Slicer would show a scroll bar.
        """
        import qt
        import slicer

        widget = getattr(widget, "parent", widget) if not isinstance(widget, qt.QWidget) else widget
        slicer.app.setPalette(_palette(dark))
        widget.show()
        width = width or widget.width
        widget.resize(width, max(widget.sizeHint.height() if hasattr(widget.sizeHint, "height") else 0, 10))
        self.process_events()
        layout = widget.layout()
        height = layout.totalHeightForWidth(width) if layout is not None and layout.hasHeightForWidth() else widget.minimumSizeHint.height()
        widget.resize(width, max(height, widget.minimumSizeHint.height()))
        self.process_events()
        picture = widget.grab()
        slicer.app.setPalette(_palette(False))
        if not picture.save(str(path)):
            raise AssertionError(f"no picture was written to {path}")
        return picture.width(), picture.height()


def _palette(dark: bool) -> Any:
    """The colours of Slicer's light and dark styles (qSlicerStyle: Fusion with these)."""
    import qt

    if not dark:
        return _light()
    window, base, text = qt.QColor(0x35, 0x35, 0x35), qt.QColor(0x2A, 0x2A, 0x2A), qt.QColor(0xF0, 0xF0, 0xF0)
    palette = qt.QPalette(window)
    roles = qt.QPalette
    for role, colour in (
        (roles.Window, window),
        (roles.Base, base),
        (roles.AlternateBase, window),
        (roles.Button, window),
        (roles.WindowText, text),
        (roles.Text, text),
        (roles.ButtonText, text),
        (roles.ToolTipBase, window),
        (roles.ToolTipText, text),
        (roles.PlaceholderText, qt.QColor(0xA0, 0xA0, 0xA0)),
        (roles.Highlight, qt.QColor(0x2A, 0x82, 0xDA)),
        (roles.HighlightedText, qt.QColor(0xFF, 0xFF, 0xFF)),
        (roles.Link, qt.QColor(0x5A, 0xB0, 0xFF)),
    ):
        palette.setColor(role, colour)
    for role in (roles.WindowText, roles.Text, roles.ButtonText):
        palette.setColor(roles.Disabled, role, qt.QColor(0x80, 0x80, 0x80))
    return palette


def _light() -> Any:
    import qt

    palette = qt.QPalette(qt.QColor(0xEF, 0xF0, 0xF1))
    palette.setColor(qt.QPalette.Base, qt.QColor(0xFF, 0xFF, 0xFF))
    return palette


def finish(status: int) -> None:
    """Ends the process without PySide6's and VTK's own end, which aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
