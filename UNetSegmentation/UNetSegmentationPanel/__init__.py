"""What the panel does, apart from the widget class that Slicer wants: it knows Qt and MRML, the core knows neither Qt nor it.

The panel opens at once, and onnxruntime need not be there yet: so of these files those that the module needs to open
import nothing of the core at file scope. warmUp() does, a little later.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

STILL_PIXELS = 3  # of Qt's: so far a hand that clicks is still

_worker: Any = None
_dataWorker: Any = None
_controller: Any = None
_clicks: Any = None
_closing: Any = None  # the observer of a scene that is closed


def panelWorker() -> Any:
    """The one worker of the application, for the panel and the effect; its process starts when it is first needed."""
    global _worker
    if _worker is None:
        _heedClose()
        from .installer import workerPython
        from .worker import PanelWorker

        _worker = PanelWorker(*workerPython())
    return _worker


def closeWorker() -> None:
    """End the worker; the next run starts another, with the Python and the packages that there are then."""
    global _worker
    if _worker is not None:
        _worker.shutdown()
        _worker = None


def dataWorker() -> Any:
    """Another worker, which writes and reads training sets: a click or a run never waits for a slow disk or network folder."""
    global _dataWorker
    if _dataWorker is None:
        _heedClose()
        from .worker import PanelWorker

        _dataWorker = PanelWorker()
    return _dataWorker


def closeDataWorker() -> None:
    global _dataWorker
    if _dataWorker is not None:
        _dataWorker.shutdown()
        _dataWorker = None


def runController() -> Any:
    """The one run that can be going on in the application."""
    global _controller
    if _controller is None:
        _heedClose()
        from .run import RunController

        _controller = RunController(panelWorker, _ensureRequirements)
    return _controller


def clickController() -> Any:
    """The one lesion that is clicked at in the panel."""
    global _clicks
    if _clicks is None:
        _clicks = newClickController()
    return _clicks


def newClickController() -> Any:
    """Another one, which clicks at a lesion of its own with the same worker: each Segment Editor has one."""
    from .clicks import ClickController

    return ClickController(panelWorker, _ensureRequirements)


def pixelRatio(window: Any) -> float:
    """How many pixels of a view's vtkRenderWindow, in which VTK tells positions, are one of Qt's: 2 on most screens of high
    resolution."""
    return max(1.0, window.GetDPI() / 72) if window is not None else 1.0  # 72 is VTK's for all others


def isStill(pressed: Sequence[int], at: Sequence[int], interactor: Any) -> bool:
    """Whether a button was let go where it was pressed, as far as a hand that clicks is still; else the mouse was dragged."""
    return max(abs(a - b) for a, b in zip(pressed, at)) <= STILL_PIXELS * pixelRatio(interactor.GetRenderWindow())


def otherShown(view: Any, volume: Any) -> Any:
    """The volume that a slice view (its composite node) shows where it shows some and not this one, else None: with two studies side
    by side a click there is meant for the other one."""
    import slicer

    ids = [view.GetBackgroundVolumeID(), view.GetForegroundVolumeID()]
    shown = [node for node in map(slicer.mrmlScene.GetNodeByID, filter(None, ids)) if node is not None]
    return shown[0] if shown and volume not in shown else None


def _heedClose() -> None:
    """Once in the application, as the effect alone, without the panel, sends voxels to the worker too."""
    global _closing
    if _closing is None:
        import slicer

        scene = slicer.mrmlScene
        # After those who let go of their nodes and end what they have asked for.
        _closing = scene.AddObserver(scene.StartCloseEvent, lambda *_: forgetScene(), -1.0)


def forgetScene() -> None:
    """The scene is closed: nothing of its patients stays in memory or in the workers' folders."""
    if _controller is not None:
        _controller.forgetScene()
    for worker in (_worker, _dataWorker):
        if worker is not None:
            worker.forgetVolumes()


def _ensureRequirements() -> bool:
    from .installer import ensureRequirements

    return ensureRequirements()


def shutdown() -> None:
    """The application quits: no process and no file of ours is left."""
    global _controller, _clicks
    if _controller is not None:
        _controller.cancel()
        _controller = None
    if _clicks is not None:
        _clicks.end()
        _clicks = None
    closeWorker()
    closeDataWorker()
    if f"{__name__}.installer" in sys.modules:
        sys.modules[f"{__name__}.installer"].shutdown()
    if f"{__name__}.worker" in sys.modules:
        sys.modules[f"{__name__}.worker"].waitForKilled()


def warmUp() -> Iterator[None]:
    """What the core needs, imported piece by piece while nothing else goes on, so that no run has to wait for it."""
    for name in (
        "numpy",
        "SimpleITK",
        "UNetSegmentationLib.model",
        "UNetSegmentationLib.mrml",
        f"{__name__}.worker",
        f"{__name__}.installer",
    ):
        importlib.import_module(name)
        yield
