"""From the nodes that were chosen to segments in the scene, without holding Slicer's event loop.

What computes is the worker's process; what has to happen here, writing into the scene, is cut into pieces that a timer
drives. Python threads would not help: while it waits, the event loop keeps them from running.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import qt
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from . import inputs, results

_BUDGET_S = 0.01  # of work in one turn of the event loop; with the longest single piece it stays below 50 ms
_REPORT_S = 0.1  # more often nobody reads a progress bar
_WAIT = object()  # what the steps yield when only the worker can bring them on


@dataclass(frozen=True)
class Outcome:
    """What a run left in the scene. record: see results.record()."""

    segmentation: Any = None
    table: Any = None
    uncertainty: Any = None
    record: str = ""


@dataclass(frozen=True)
class Request:
    """What one Apply shall do. volumes: nodes, one a channel; region: a markups node or None; options: fields of the
    core's Options but for roi and at; segmentation: where to write, or None for a new one; allFrames: of the sequence;
    former: the outcome that the scene has now, whose table is used again."""

    volumes: tuple[Any, ...]
    region: Any
    models: tuple[Path, ...]
    options: dict[str, Any]
    segmentation: Any = None
    replace: bool = True
    allFrames: bool = False
    former: Outcome = Outcome()


class RunController(VTKObservationMixin):
    """The one run that can be going on, for all panels of the application.

    worker(): gives the PanelWorker; ensure(): whether what the network needs is installed, after asking where it is not.
    phase: "idle", "running", "done", "failed" or "cancelled"; text: what it is doing, or one sentence on how it ended.
    Listeners are called from the event loop after every change.
    """

    def __init__(self, worker: Callable[[], Any], ensure: Callable[[], bool]) -> None:
        super().__init__()
        self._worker, self._ensure = worker, ensure
        self._listeners: list[Callable[[], None]] = []
        self.phase, self.text, self.fraction = "idle", "", 0.0
        self.outcome = Outcome()
        self._request: Request | None = None
        self._steps: Generator[Any, None, Outcome] | None = None
        self._stepping = False
        self._reported = 0.0
        self._pace: tuple[float, float] | None = None  # when computing began, and at which fraction
        self._part = 0.0, 1.0  # where the frame that is computed begins, and its share
        self._undo: Any = None
        self._timer = qt.QTimer()
        self._timer.setInterval(1)
        self._timer.connect("timeout()", self._tick)

    # ---------------------------------------------------------------------------------------------------------- outside

    def addListener(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def removeListener(self, listener: Callable[[], None]) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    @property
    def running(self) -> bool:
        return self.phase == "running"

    @property
    def secondsLeft(self) -> float | None:
        """An estimate from what is done; None as long as it would be a guess."""
        if not self.running or self._pace is None:
            return None
        began, at = self._pace
        spent, done = time.monotonic() - began, self.fraction - at
        return spent * (1 - self.fraction) / done if spent > 0.5 and done > 0.02 else None

    def start(self, request: Request) -> None:
        """Begin; returns at once. A second start while one runs does nothing."""
        if self.running:
            return
        self._request, self._pace, self._part = request, None, (0.0, 1.0)
        scene = request.volumes[0].GetScene()
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self._onNodeAboutToBeRemoved)
        self.addObserver(scene, scene.StartCloseEvent, self._onSceneStartClose)
        self._say("running", _("Preparing"), 0.0)
        qt.QTimer.singleShot(0, lambda: self._begin(request))  # the button is drawn as Cancel first

    def cancel(self, text: str = "") -> None:
        """Stop, with the scene as it was before. The worker is told to, and is killed where it does not listen."""
        if self.running:
            self._end("cancelled", text or _("Cancelled. The scene is as it was before."))

    def forgetScene(self) -> None:
        """The scene is closed; its voxels are not held on to."""
        text = _("The scene was closed during the run, so nothing was written.")
        if self.running:
            self.cancel(text)
        elif self.text != text:  # its own observer has called this already
            self.clear()  # it may name that scene's patient
        self._undo, self.outcome = None, Outcome()

    @property
    def canUndo(self) -> bool:
        return not self.running and self._undo is not None and self._undo.can_undo

    def undo(self) -> Outcome | None:
        """Take back the last run, in one step; returns what the scene has now, None where there was nothing to take back."""
        if not self.canUndo:
            return None
        self._undo.undo()  # leaves the former outcome in self.outcome
        self._say("idle", _("The last Apply was taken back."))
        return self.outcome

    def clear(self) -> None:
        """What was said about the last run is no longer so."""
        if not self.running and (self.text or self.phase != "idle"):
            self._say("idle", "")

    # --------------------------------------------------------------------------------------------------------- machinery

    def _say(self, phase: str, text: str, fraction: float | None = None) -> None:
        self.phase, self.text = phase, text
        if fraction is not None:
            self.fraction = fraction
        for listener in list(self._listeners):
            try:
                listener()
            except Exception:  # a panel that is broken or gone must not stop the run
                logging.exception("A listener of the run failed.")

    def _progress(self, fraction: float, text: str) -> None:
        fraction = self._part[0] + self._part[1] * fraction
        if self._pace is None and fraction > 0:
            self._pace = time.monotonic(), fraction
        text, fraction = _worded(text), max(self.fraction, fraction)
        if text != self.text or time.monotonic() > self._reported + _REPORT_S:
            self._reported = time.monotonic()
            self._say("running", text, fraction)

    def _begin(self, request: Request) -> None:
        """Ask for what must be installed, which may let the event loop run for minutes, and go on."""
        if self._request is not request:
            return
        try:
            ready, failure = self._ensure(), None
        except Exception as e:
            ready, failure = False, e
        if self._request is not request:
            return  # cancelled meanwhile, or the scene was closed
        if failure is not None:
            self._end("failed", sentence(failure))
        elif not ready:
            self._end("cancelled", _("Nothing was installed, so nothing was segmented."))
        else:
            self._steps = self._run(request)
            self._timer.start()

    def _tick(self) -> None:
        """A few milliseconds of the run."""
        steps, until = self._steps, time.monotonic() + _BUDGET_S
        if steps is None or self._stepping:
            self._timer.stop()
            return
        self._stepping = True
        try:
            while self._steps is steps and time.monotonic() < until:
                if next(steps) is _WAIT:
                    self._timer.stop()
                    break
        except StopIteration as e:
            self.outcome = e.value
            self._end("done", "")
        except _Declined as e:
            self._end("cancelled", str(e))
        except Exception as e:
            self._end("failed", sentence(e))
        finally:
            self._stepping = False
            if self._steps is not steps:
                self._close(steps)  # an end that came from within the step

    def _end(self, phase: str, text: str) -> None:
        self._timer.stop()
        self.removeObservers()
        steps, self._steps, self._request = self._steps, None, None
        if steps is not None and not self._stepping:
            self._close(steps)
        self._say(phase, text, 0.0)

    def _close(self, steps: Generator[Any, None, Outcome]) -> None:
        """Puts the scene back where the steps had not come to their end."""
        try:
            steps.close()
        except Exception:
            logging.exception("The scene could not be put back.")

    def _onSceneStartClose(self, caller: Any, event: Any) -> None:
        self.forgetScene()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAboutToBeRemoved(self, caller: Any, event: Any, node: Any) -> None:
        request = self._request
        if request is None or not self.running or node is None:
            return
        if node in request.volumes or node is request.segmentation:
            text = _("'{name}' was removed from the scene during the run, so nothing was written; choose another one and apply again.")
            self._end("failed", text.format(name=node.GetName()))

    # ------------------------------------------------------------------------------------------------------------- steps

    def _run(self, request: Request) -> Generator[Any, None, Outcome]:
        from UNetSegmentationLib import mrml

        mrml.check_accepts(request.segmentation)  # before all is computed
        worker = self._worker()
        while worker.state == "busy":  # a cancelled run has not quite ended
            yield
        if request.allFrames:
            return (yield from self._runFrames(worker, request))
        prediction = yield from self._predict(worker, request)
        self._say("running", _("Writing the segments"), max(self.fraction, 0.97))
        return (yield from self._write(prediction, request))

    def _runFrames(self, worker: Any, request: Request) -> Generator[Any, None, Outcome]:
        """Every frame of the sequence; the scene changes only when all are done."""
        from UNetSegmentationLib import UserError, mrml

        volume, scene, region = request.volumes[0], request.volumes[0].GetScene(), request.region
        editor = _segmentEditor(scene, request.segmentation)
        output = mrml.SequenceOutput(volume, request.segmentation, request.replace, editor)
        for other in request.volumes[1:]:
            if inputs.frames(other) > 1 and output.browser.GetSequenceNode(other) is None:
                text = _(
                    "'{other}' is of another sequence browser, so it would stay on one frame while '{volume}' is stepped through all; "
                    "add its sequence to the browser of '{volume}' (module Sequences), or segment frame by frame."
                )
                raise UserError(text.format(other=other.GetName(), volume=volume.GetName()))
        predictions: list[Any] = []
        measures: list[dict[str, Any]] = []
        try:
            for frame in range(output.frames):
                self._part = frame / output.frames, 1 / output.frames
                output.show(frame)
                place = inputs.regionOptions(region, volume)  # of each frame, as a browser may move the box too
                yield
                prediction = yield from self._predict(worker, request)
                segments: dict[int, Any] = {}
                yield from output.write_steps(frame, prediction, segments)
                predictions.append(prediction)
                found = _named(prediction.measures or (), segments)
                if editor is not None and found:  # see _write()
                    found = yield from output.measure_steps(frame, segments)
                for m in found:
                    measures.append({**m, "name": _("{name}, frame {i}").format(name=m["name"], i=frame + 1)})
                if inputs.regionOptions(region, volume) != place:
                    text = _("'{name}' was changed during the run, so nothing was written; apply again.")
                    raise UserError(text.format(name=region.GetName()))
            target = request.segmentation
            self._history(scene).begin(target, [mrml.find_table(target) if target is not None else None])
            segmentation = output.finish()
        finally:
            output.show()
        return self._commit(segmentation, measures, None, _combined(predictions), request, [segmentation], output.revert)

    def _predict(self, worker: Any, request: Request) -> Generator[Any, None, Any]:
        """The prediction, from the worker; closing this generator cancels it there."""
        from UNetSegmentationLib import Options, UserError, mrml

        volumes = request.volumes
        options = Options(**request.options, **inputs.regionOptions(request.region, volumes[0]))
        key = volumeKey(volumes)
        yield
        image, own = (yield from mrml.image_steps(volumes)), mrml.image_from_volume(volumes[0])
        if options.at is not None:
            options = replace(options, at=mrml.carried(options.at, own, image))
        answers: list[tuple[str, Any]] = []
        open_ = True

        def answer(kind: str, value: Any = None) -> None:
            answers.append((kind, value))
            if open_:
                self._timer.start()

        def progress(fraction: float, text: str) -> None:
            if open_:
                self._progress(0.97 * fraction, text)

        worker.predict(
            key[0],
            image,
            request.models,
            options,
            measures=True,
            onProgress=progress,
            onResult=lambda value: answer("result", value),
            onError=lambda error: answer("error", error),
            onCancelled=lambda: answer("cancelled"),
        )
        try:
            while not answers:
                yield _WAIT
        finally:
            open_ = False
            if not answers:
                worker.cancel()
        kind, value = answers[0]
        if kind == "error":
            raise value
        if kind == "cancelled":
            raise _Declined(_("Cancelled. The scene is as it was before."))
        if volumeKey(volumes) != key:
            text = _("'{name}' was changed during the run, so nothing was written; apply again.")
            raise UserError(text.format(name=volumes[0].GetName()))
        if value.places:
            at = [own.index_to_point(image.point_to_index(p["point"])) for p in value.places]
            texts = [mrml.prompts_text([("point", *point, True)], volumes[0]) for point in at]
            value = replace(value, places=[{**p, "point": x, "prompt": text} for p, x, text in zip(value.places, at, texts)])
        return value

    def _write(self, prediction: Any, request: Request) -> Generator[Any, None, Outcome]:
        """Segments, map and table; all of it or, when this generator is closed or fails, nothing."""
        from UNetSegmentationLib import mrml

        volume, target = request.volumes[0], request.segmentation
        scene, undo = volume.GetScene(), self._history(volume.GetScene())
        former = mrml.find_map(volume, "uncertainty"), mrml.find_table(target) if target is not None else None
        undo.begin(target, former)
        written: list[Any] = []
        try:
            editor = _segmentEditor(scene, target)
            segments: dict[int, Any] = {}
            written.append((yield from mrml.write_prediction_steps(prediction, volume, target, request.replace, editor, segments)))
            uncertainty = None
            if prediction.uncertainty is not None:
                uncertainty = yield from mrml.write_map_steps(prediction.uncertainty, volume, "uncertainty", prediction.roi)
                written.append(None if uncertainty is former[0] else uncertainty)
            yield
            measures = _named(prediction.measures or (), segments)
            if editor is not None and measures:
                # The worker measured what the network found; masking may have left less of it.
                own = [written[0].GetSegmentation().GetSegmentIdBySegment(s) for s in segments.values()]
                measures = yield from mrml.measure_steps(written[0], volume, [i for i in own if i])  # a person may have removed one
            return self._commit(written[0], measures, uncertainty, prediction, request, written)
        except BaseException:
            if written:
                undo.commit(written)
                undo.undo()
            raise

    def _commit(
        self,
        segmentation: Any,
        measures: list[dict[str, Any]],
        uncertainty: Any,
        prediction: Any,
        request: Request,
        written: list[Any],
        revert: Callable[[], None] | None = None,
    ) -> Outcome:
        """The table, and the step for undo."""
        from UNetSegmentationLib import mrml

        known = mrml.find_table(segmentation)
        table = mrml.write_measures(measures, segmentation, request.volumes[0])
        written.append(None if table is known else table)

        def back() -> None:
            self.outcome = request.former

        self._history(None).commit(written, revert, back)
        return Outcome(segmentation, table, uncertainty, results.record(prediction, measures))

    def _history(self, scene: Any) -> Any:
        from UNetSegmentationLib import mrml

        if scene is not None and (self._undo is None or self._undo.scene is not scene):
            self._undo = mrml.Undo(scene)
        return self._undo


class _Declined(Exception):
    """The person, or the scene, wants no run after all; the message says so."""


def _named(measures: Sequence[dict[str, Any]], segments: dict[int, Any]) -> list[dict[str, Any]]:
    """Measures with the names of the segments that their labels (by value) became: "nodule 2" where a person has a "nodule"."""
    return [{**m, "name": segments[m["value"]].GetName()} if m["value"] in segments else m for m in measures]


def _combined(predictions: Sequence[Any]) -> Any:
    """What results.record() needs of the predictions of many frames."""
    first = predictions[0]
    warnings = tuple(dict.fromkeys(w for p in predictions for w in p.warnings))
    return replace(first, warnings=warnings, seconds=sum(p.seconds for p in predictions), uncertainty=None, places=None)


def volumeKey(volumes: Sequence[Any]) -> Any:
    """A pair: what changes with the voxels of the volumes, for a PanelWorker, and what with their place."""
    from UNetSegmentationLib import mrml

    images = [mrml.image_from_volume(node) for node in volumes]
    voxels = tuple((node.GetID(), node.GetImageData().GetMTime()) for node in volumes)
    return voxels, tuple((image.spacing, image.origin, image.direction) for image in images)


def _segmentEditor(scene: Any, segmentation: Any) -> Any:
    """The Segment Editor's node, whose masking counts, where it is at work on this segmentation."""
    from UNetSegmentationLib import mrml

    editor = mrml.editor_node(scene)
    return editor if segmentation is not None and editor is not None and editor.GetSegmentationNode() is segmentation else None


def sentence(error: BaseException) -> str:
    from UNetSegmentationLib import UserError

    if isinstance(error, UserError):
        return str(error)
    logging.error("The segmentation failed.", exc_info=error)
    text = _("Something unexpected went wrong ({reason}); please report it with the log (View, Error Log).")
    return text.format(reason=f"{type(error).__name__}: {str(error)[:200]}")


def _worded(text: str) -> str:
    """What the worker says it is doing, in the person's language."""
    known = {
        "sending the volume": _("Sending the volume"),
        "starting the worker": _("Starting the worker"),
        "loading the model": _("Loading the model"),
        "segmenting": _("Segmenting"),
        "reading the result": _("Reading the result"),
        "done": _("Reading the result"),
    }
    return known.get(text, text)


# -------------------------------------------------------------------------------------------------------------- choices


def engineChoices() -> list[tuple[str, str]]:
    """(value, text) of the engines that are installed, "auto" first."""
    from UNetSegmentationLib.engines import installed

    names = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
    there = [value for value in names if installed(value) or (value == "torch" and _ownTorch())]
    return [("auto", _("Automatic")), *((value, names[value]) for value in there)]


def deviceChoices() -> list[tuple[str, str]]:
    """(value, text) of the devices; a GPU only where something installed could use one."""
    out = [("auto", _("Automatic")), ("cpu", _("CPU"))]
    return [*out, ("gpu", _("GPU"))] if _mayUseGpu() else out


def _mayUseGpu() -> bool:
    from UNetSegmentationLib.engines import installed

    if _ownTorch() not in ("", "CPU") or installed("torch") or (sys.platform == "darwin" and installed("onnx")):
        return True
    for name in ("onnxruntime-gpu", "onnxruntime-directml"):
        try:
            metadata.version(name)
            return True
        except metadata.PackageNotFoundError:
            pass
    return False


def _ownTorch() -> str:
    """The device of PyTorch's own environment; "" where there is none."""
    from UNetSegmentationLib.environment import own_environment

    own = own_environment()
    return own.device or "CPU" if own.status == "ready" else ""
