"""The worker process for the panel and the effect, over QProcess: nothing here waits, and nothing long runs in one go.

Long work is a generator that gets a few milliseconds of each round of the event loop; Qt's signals only note what happened
and wake it. The protocol itself is Session's, of UNetSegmentationLib.worker.client.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qt
from UNetSegmentationLib.files import process_mark
from UNetSegmentationLib.image import Image, UserError
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.model import ModelPackage
from UNetSegmentationLib.worker.client import (
    CANCEL_S,
    LOG_BYTES,
    START_S,
    Event,
    Session,
    WorkerError,
    cannot_start,
    child_environment,
    command,
    ending,
    find_python,
    new_folder,
    working_folder,
)
from UNetSegmentationLib.worker.protocol import WorkerPrediction, remove_folder

if TYPE_CHECKING:
    import numpy as np
    from UNetSegmentationLib.worker.protocol import Case, WorkerAnswer

KEPT_VOLUMES = 2
BUDGET_S = 0.01  # of each round of the event loop
_WAIT = object()  # what a job's steps yield when only an event of the worker can bring them on


class PanelWorker:
    """One worker process, started when it is needed, which keeps volumes and models.

    python: the interpreter that runs it (default: Slicer's). environment: its variables (default: Slicer's for Slicer's
    Python, for another those that Slicer itself was started with). Python callbacks, called from the event loop, instead
    of Qt signals; one that raises is logged and changes nothing.
    """

    def __init__(self, python: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._python, self._environment = python, environment
        self._session: Session | None = None
        self._process: ChildProcess | None = None
        self._volumes: dict[Hashable, int] = {}  # the last is the one used last
        self._job: _Job | None = None
        self._waiting: list[_Job] = []
        self._events: deque[Event] = deque()
        self._began = 0.0  # when the process was started
        self._awake = self._working = self._closed = self._stale = False

    @property
    def state(self) -> str:
        """ "stopped", "starting", "busy" (with a predict(), a click(), a case or a dataset) or "ready"."""
        if self._job is not None:
            return "busy"
        if self._process is None or self._session is None:
            return "stopped"
        return "starting" if self._session.hello is None else "ready"

    @property
    def log(self) -> str:
        """The last of what the worker and its libraries wrote on stderr."""
        return self._process.log if self._process is not None else ""

    @property
    def pid(self) -> int | None:
        """The worker's process id, once it has told it."""
        return self._session.pid if self._session is not None and self._process is not None else None

    @property
    def python(self) -> str | None:
        return self._python

    def renew(self, python: str | None, environment: Mapping[str, str] | None) -> None:
        """What the next job runs with, in another process where that is something else; one that is on its way is not disturbed."""
        if (python, environment) != (self._python, self._environment):
            self._python, self._environment, self._stale = python, environment, True

    def start(self) -> None:
        """Start the worker where there is none, ahead of the first predict(), which also tells what is wrong if it cannot."""
        if self._process is None and not self._closed:
            try:
                self._launch()
            except UserError as e:
                logging.info("The worker was not started ahead: %s", e)

    def predict(
        self,
        volumeKey: Hashable,
        image: Image | Callable[[], Image],
        models: Sequence[ModelPackage | str | Path],
        options: Options,
        measures: bool,
        onProgress: Callable[[float, str], Any],
        onResult: Callable[[WorkerPrediction], Any],
        onError: Callable[[WorkerError], Any],
        onCancelled: Callable[[], Any],
    ) -> None:
        """predict() of the core, in the worker. Returns at once; exactly one of the last three callbacks is called, later.

        volumeKey: the same key, the same voxels: they are sent once. Of two volumes the worker keeps the voxels.
        image: the volume where it lies now, or what gives it. models: packages or their files.
        UserError while another one runs.
        """
        job = self._new(volumeKey, onProgress, onResult, onError, onCancelled)
        if self._prediction is not None:
            raise UserError("The worker is busy; wait for the running segmentation or cancel it.")
        job.steps = self._steps(job, image, models, options, measures)
        self._take(job)

    def click(
        self,
        volumeKey: Hashable,
        image: Image | Callable[[], Image],
        model: ModelPackage | str | Path,
        options: Options,
        lesion: str,
        prompts: Sequence[tuple[Any, ...]],
        onAnswer: Callable[[WorkerAnswer], Any],
        onError: Callable[[WorkerError], Any],
        measures: bool = True,
    ) -> None:
        """The mask of one lesion for all its prompts, in order: see Session.click(). Returns at once.

        volumeKey, image: as for predict(). lesion: names what is clicked at, so that the worker need compute only what a
        prompt adds; no prompts: load the model and be ready. Exactly one callback follows, unless a newer click of the
        lesion takes the place of one that still waits, or forgetClicks() does: then none. While another click or a
        predict() runs it waits for its turn.
        """
        closed = WorkerError("The worker was closed; click again.", "worker")
        job = self._new(volumeKey, _ignore, onAnswer, onError, lambda: onError(closed))
        self._drop(lesion)
        job.lesion = lesion
        job.steps = self._clickSteps(job, image, model, options, tuple(prompts), measures)
        self._take(job)

    def addCase(
        self,
        volumeKey: Hashable,
        image: Image | Callable[[], Image],
        mask: np.ndarray,
        start: Sequence[int],
        case: Case,
        onProgress: Callable[[float, str], Any],
        onResult: Callable[[dict[str, Any]], Any],
        onError: Callable[[WorkerError], Any],
        onCancelled: Callable[[], Any],
    ) -> Any:
        """Add a corrected mask to a dataset folder: see Session.add_case(). Returns at once, with what cancel() takes; the same
        callbacks as for predict(), onResult() with what Session.dataset_result() holds."""
        job = self._new(volumeKey, onProgress, onResult, onError, onCancelled, data=True)
        job.steps = self._caseSteps(job, image, mask, start, case)
        self._take(job)
        return job

    def dataset(
        self,
        folder: str,
        action: str,
        onResult: Callable[[dict[str, Any]], Any],
        onError: Callable[[WorkerError], Any],
        onCancelled: Callable[[], Any] = lambda: None,
        case: str = "",
        version: int | None = None,
        onSent: Callable[[], Any] = lambda: None,
    ) -> Any:
        """Show or change a dataset folder: see Session.dataset(). Returns at once, with what cancel() takes. onSent: called when a
        worker that has started is asked, from where on only the folder can keep it waiting."""
        job = self._new(None, _ignore, onResult, onError, onCancelled, data=True)
        job.steps = self._datasetSteps(job, folder, action, case, version, onSent)
        self._take(job)
        return job

    def forgetClicks(self, lesion: str) -> None:
        """Nobody wants the answers of this lesion any more: what waits is dropped, and of what runs nothing is told."""
        self._drop(lesion)
        job = self._job
        if job is not None and job.lesion == lesion:
            job.onResult = job.onError = _ignore
            job.onCancelled = _ignore
            if job.outcome is not None:
                job.outcome = _ignore, ()

    def giveUpClicks(self, lesion: str) -> None:
        """forgetClicks(), by a person who does not want to wait: the worker is told to stop, and is killed after CANCEL_S."""
        self.forgetClicks(lesion)
        job = self._job
        if job is not None and job.lesion == lesion and not job.asked and job.computing and job.outcome is None:
            job.asked = True
            self._stop(job)

    def _stop(self, job: _Job) -> None:
        assert self._process is not None and self._session is not None
        self._process.write(self._session.request("cancel", target=job.number)[1])
        qt.QTimer.singleShot(round(1000 * CANCEL_S), lambda: self._enough(job))

    def cancel(self, job: Any = None) -> None:
        """End the running predict(), or what addCase() or dataset() began: onCancelled() is called as soon as the worker has
        stopped, or was killed after CANCEL_S. What was done in a dataset folder by then is a result all the same."""
        job = self._prediction if job is None else job
        if job is None or job.asked or (job is not self._job and job not in self._waiting):
            return
        job.asked = True
        if job is not self._job:
            self._waiting.remove(job)
            job.steps.close()
            qt.QTimer.singleShot(0, lambda: _call(job.onCancelled))
            return
        if job.computing and job.outcome is None and self._process is not None and self._session is not None:
            self._stop(job)
        elif not (job.data and job.answer is not None):  # what is done in a dataset folder stays done
            self._settle(job, job.onCancelled)

    def forgetVolume(self, volumeKey: Hashable) -> None:
        """The volume is gone or has changed: its voxels are deleted, after the running predict() if that uses them."""
        if self._job is not None and self._job.key == volumeKey:
            self._job.forget = True
        elif volumeKey in self._volumes:
            self._unload(volumeKey)

    def forgetVolumes(self) -> None:
        """The scene is closed: no patient's voxels stay here."""
        for key in {*self._volumes, *([self._job.key] if self._job is not None else [])}:
            self.forgetVolume(key)

    def shutdown(self) -> None:
        """End the worker, delete its folder and take no more work; a running predict() is cancelled. At most a second."""
        self._closed = True
        for job in filter(None, [self._job, *self._waiting]):
            job.asked = True
            if job is not self._job or not self._working:
                job.steps.close()
            self._settle(job, job.onCancelled)
        process = self._process
        if process is not None:
            self._kill()
            process.wait(1.0)
        if self._session is not None:
            remove_folder(self._session.folder)

    # -------------------------------------------------------------------------------------------------------------- job

    @property
    def _prediction(self) -> _Job | None:
        """The predict() that runs or waits for a click."""
        return next((job for job in [self._job, *self._waiting] if job is not None and job.lesion is None and not job.data), None)

    def _new(self, *of: Any, data: bool = False) -> _Job:
        """of: as of _Job."""
        if self._closed:
            raise UserError("The worker was closed; open the module again.")
        job = _Job(*of)
        job.data = data
        return job

    def _take(self, job: _Job) -> None:
        if self._job is None:
            self._job = job
        else:
            self._waiting.append(job)
        self._wake()

    def _drop(self, lesion: str) -> None:
        for job in [job for job in self._waiting if job.lesion == lesion]:
            self._waiting.remove(job)
            job.steps.close()

    def _steps(
        self,
        job: _Job,
        image: Image | Callable[[], Image],
        models: Sequence[ModelPackage | str | Path],
        options: Options,
        measures: bool,
    ) -> Generator[Any, None, WorkerPrediction]:
        volume = yield from self._readySteps(job, image)
        assert self._session is not None
        answer = yield from self._askSteps(job, *self._session.predict(volume, models, options, measures, keep=True))
        job.note = 1.0, "reading the result"
        yield
        return (yield from self._session.result(answer))

    def _clickSteps(
        self,
        job: _Job,
        image: Image | Callable[[], Image],
        model: ModelPackage | str | Path,
        options: Options,
        prompts: tuple[tuple[Any, ...], ...],
        measures: bool,
    ) -> Generator[Any, None, WorkerAnswer]:
        volume = yield from self._readySteps(job, image)
        assert self._session is not None and job.lesion is not None
        asked = self._session.click(volume, model, options, job.lesion, prompts, measures, keep=True)
        return self._session.click_result((yield from self._askSteps(job, *asked)))

    def _caseSteps(
        self, job: _Job, image: Image | Callable[[], Image], mask: np.ndarray, start: Sequence[int], case: Case
    ) -> Generator[Any, None, dict[str, Any]]:
        volume = yield from self._readySteps(job, image)
        assert self._session is not None
        asked = yield from self._session.add_case(volume, mask, start, case)
        return self._session.dataset_result((yield from self._askSteps(job, *asked)))

    def _datasetSteps(
        self, job: _Job, folder: str, action: str, case: str, version: int | None, onSent: Callable[[], Any]
    ) -> Generator[Any, None, dict[str, Any]]:
        self._launch()
        yield from self._greetedSteps(job)
        _call(onSent)
        assert self._session is not None
        asked = self._session.dataset(folder, action, case, version)
        return self._session.dataset_result((yield from self._askSteps(job, *asked)))

    def _askSteps(self, job: _Job, number: int, line: bytes) -> Generator[Any, None, Event]:
        """Send the job's request and wait for its answer."""
        assert self._process is not None
        job.number = number
        self._process.write(line)
        while job.answer is None:
            yield _WAIT
        return job.answer

    def _readySteps(self, job: _Job, image: Image | Callable[[], Image]) -> Generator[Any, None, int]:
        """A worker that runs and the number of the job's volume in it."""
        self._launch()
        assert self._session is not None
        volume = self._volumes.get(job.key)
        if volume is None:
            job.note = 0.0, "sending the volume"
            yield
            while len(self._volumes) >= KEPT_VOLUMES:
                self._unload(next(iter(self._volumes)))
            volume = yield from self._session.add_volume(image() if callable(image) else image)
        else:
            request = self._session.place_volume(volume, image() if callable(image) else image)
            if request is not None and self._process is not None:
                self._process.write(request[1])
            del self._volumes[job.key]
        self._volumes[job.key] = volume
        yield from self._greetedSteps(job)
        return volume

    def _greetedSteps(self, job: _Job) -> Generator[Any, None, None]:
        assert self._session is not None
        if self._session.hello is None:
            job.note = 0.0, "starting the worker"
            yield
            self._wakeIn(START_S + 1)  # Qt rounds 20 s and more to whole seconds: of nine timers three came up to 0.33 s early
        while self._session.hello is None:
            if time.monotonic() > self._began + START_S:
                self._kill()
                raise WorkerError(f"The worker did not start within {START_S:.0f} seconds; try again.", "worker")
            yield _WAIT

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            qt.QTimer.singleShot(0, self._tick)

    def _wakeIn(self, seconds: float) -> None:
        known = weakref.ref(self)  # a timer of minutes is not to keep a worker that was shut down

        def wake() -> None:
            worker = known()
            if worker is not None:
                worker._wake()

        qt.QTimer.singleShot(round(1000 * seconds), wake)

    def _tick(self) -> None:
        self._awake = False
        job = self._job
        if job is None:
            return
        if self._working:  # the image's callable lets the event loop run
            self._wake()
            return
        if job.outcome is None:
            self._advance(job)
        note, job.note = job.note, None
        if job.outcome is not None:
            self._finish(job)
        elif note is not None and not job.asked:
            _call(job.onProgress, *note)

    def _advance(self, job: _Job) -> None:
        """A few milliseconds of the job's work."""
        self._working = True
        until = time.monotonic() + BUDGET_S
        try:
            while job.outcome is None and job.note is None and time.monotonic() < until:
                if next(job.steps) is _WAIT:
                    return
            self._wake()
        except StopIteration as e:
            self._settle(job, job.onResult, e.value)
        except BaseException as e:
            if job.computing or (job.answer is not None and isinstance(e, WorkerError)):
                self._kill()
            self._settle(job, job.onError, _error(e))
        finally:
            self._working = False

    def _settle(self, job: _Job, callback: Callable[..., Any], *arguments: Any) -> None:
        """The job is over; the callback follows in the next round of the event loop. The first outcome counts, but for
        a cancel of a result that nobody has seen."""
        if job.outcome is None or (callback is job.onCancelled and job.outcome[0] is job.onResult):
            job.outcome = callback, arguments
        self._wake()

    def _finish(self, job: _Job) -> None:
        assert job.outcome is not None
        self._job = None
        job.steps.close()
        if self._session is not None and job.number is not None:
            self._session.forget(job.number)
        if job.forget and job.key in self._volumes:
            self._unload(job.key)
        if self._waiting:
            self._job = self._waiting.pop(0)
            self._wake()
        callback, arguments = job.outcome
        _call(callback, *arguments)

    def _enough(self, job: _Job) -> None:
        """A worker that was asked to cancel had its time; its successor is warm when it is needed."""
        if self._job is job and job.outcome is None and job.answer is None:
            self._kill()
            self._settle(job, job.onCancelled)
            self.start()

    def _unload(self, volumeKey: Hashable) -> None:
        assert self._session is not None
        request = self._session.remove_volume(self._volumes.pop(volumeKey))
        if request is not None and self._process is not None:
            self._process.write(request[1])

    # ---------------------------------------------------------------------------------------------------------- process

    def _launch(self) -> None:
        """Start the process where there is none, or one of another Python. UserError where the folder or the Python is missing."""
        if self._stale:
            self._stale = False
            self._kill()
        if self._session is None or not self._session.folder.is_dir():
            self._kill()
            self._volumes.clear()
            self._session = Session(new_folder())
        if self._process is not None:
            return
        python = self._python or find_python()
        self._events.clear()
        hello = self._session.connect()
        environment = child_environment(python, variablesFor(python) if self._environment is None else self._environment)
        self._began = time.monotonic()
        arguments = command(python, self._session.folder, background=True)
        self._process = ChildProcess(arguments, environment, self._heard, self._ended)
        self._process.write(hello)

    def _heard(self, data: bytes) -> None:
        assert self._session is not None
        self._events.extend(self._session.feed(data))
        while self._events:  # a callback may let the event loop run, and more come in
            self._judge(self._events.popleft())

    def _judge(self, event: Event) -> None:
        """What an answer of the worker means for the job."""
        job = self._job
        if event.kind == "starting" or event.kind == "hello":
            if self._process is not None:
                self._process.workerPid = event.data["pid"]
            self._wake()
        elif event.kind == "fatal":
            self._kill()
            if job is None:
                logging.warning("%s", event.error())
            else:
                self._fail(job, event.error())
        elif job is None or event.id != job.number or job.answer is not None:
            return  # of an unloaded volume
        elif event.kind == "progress":
            if not job.asked or job.data:  # how far it came counts where it changes a folder
                _call(job.onProgress, float(event.data["fraction"]), event.data["text"])
        elif event.kind == "cancelled" or (job.asked and event.kind != "done"):
            self._settle(job, job.onCancelled)
        elif event.kind == "error":
            self._settle(job, job.onError, event.error())
        else:
            job.answer = event
            self._wake()

    def _ended(self, code: int | None, reason: str) -> None:
        """The process ended by itself, or (code None) could not be started."""
        process, self._process = self._process, None
        job = self._job
        if job is not None and job.answer is None and process is not None:
            assert self._session is not None
            if code is None:
                error = cannot_start(process.program, reason)
            else:
                error = ending(code, process.program, process.log, self._session.hello is not None, process.launched)
            self._fail(job, error)

    def _fail(self, job: _Job, error: WorkerError) -> None:
        """The worker is gone, which is what a person who has cancelled wanted."""
        if job.asked:
            self._settle(job, job.onCancelled)
        else:
            self._settle(job, job.onError, error)

    def _kill(self) -> None:
        process, self._process = self._process, None
        self._events.clear()
        if process is not None:
            process.kill()


class _Job:
    """A predict() on its way, a click() at a lesion, or (data) work on a dataset folder."""

    def __init__(
        self,
        key: Hashable,
        onProgress: Callable[[float, str], Any],
        onResult: Callable[[Any], Any],
        onError: Callable[[WorkerError], Any],
        onCancelled: Callable[[], Any],
    ) -> None:
        self.key = key
        self.onProgress, self.onResult, self.onError, self.onCancelled = onProgress, onResult, onError, onCancelled
        self.steps: Generator[Any, None, Any]
        self.lesion: str | None = None
        self.number: int | None = None  # of its request
        self.answer: Event | None = None
        self.note: tuple[float, str] | None = None  # progress to be told
        self.outcome: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.asked = self.forget = self.data = False

    @property
    def computing(self) -> bool:
        """The worker has the request and has not answered yet."""
        return self.number is not None and self.answer is None


# PythonQt deletes a QProcess with its Python object, which may neither happen while the process runs (it would wait) nor
# within one of its signals.
_living: set[ChildProcess] = set()


def waitForKilled() -> None:
    """Slicer quits: what was killed is to be over before Python's end."""
    for process in [p for p in _living if p.killed]:
        process.wait(1.0)


class ChildProcess:
    """A process, started at once in the core's folder. onOutput(data) and onEnd(code, reason) are called from the event loop
    until kill(); code: negative for a signal, None where the process could not be started.

    workerPid: set by its owner when a launcher such as PythonSlicer stands between and its child has told its id.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        onOutput: Callable[[bytes], None],
        onEnd: Callable[[int | None, str], None],
    ) -> None:
        self.program = arguments[0]
        self._workerPid: int | None = None
        self._workerMark: str | None = None
        self._log = b""
        self._on: tuple[Callable[..., None], ...] | None = (onOutput, onEnd)
        self._process = process = qt.QProcess()
        process.setWorkingDirectory(str(working_folder()))
        variables = qt.QProcessEnvironment.systemEnvironment()
        for name in set(os.environ) - set(environment):
            variables.remove(name)
        for name, value in environment.items():
            if os.environ.get(name) != value:
                variables.insert(name, value)
        process.setProcessEnvironment(variables)
        self._slots = {
            "readyReadStandardOutput()": self._readOutput,
            "readyReadStandardError()": self._readLog,
            "finished(int,QProcess::ExitStatus)": self._finished,
            "errorOccurred(QProcess::ProcessError)": self._failed,
        }
        for name, slot in self._slots.items():
            process.connect(name, slot)
        _living.add(self)
        process.start(self.program, list(arguments[1:]))
        self._pid = process.processId()

    @property
    def workerPid(self) -> int | None:
        return self._workerPid

    @workerPid.setter
    def workerPid(self, pid: int | None) -> None:
        if pid != self._workerPid:  # it is told twice, and macOS starts a process to know the mark
            self._workerPid, self._workerMark = pid, process_mark(pid or 0)

    @property
    def launched(self) -> bool:
        """A launcher, such as PythonSlicer, stands between: this process is not the worker."""
        return self.workerPid is not None and self.workerPid != self._pid

    @property
    def log(self) -> str:
        """The last of what it and its libraries wrote on stderr."""
        return self._log.decode("utf-8", "replace")

    @property
    def killed(self) -> bool:
        return self._on is None

    def write(self, data: bytes) -> None:
        if self._process.state() != qt.QProcess.NotRunning:
            self._process.write(data)

    def kill(self) -> None:
        """End the process, and the worker behind a launcher; nothing more is heard of it."""
        self._on = None
        self._killWorker()
        self._process.kill()

    def wait(self, seconds: float) -> None:
        self._process.waitForFinished(round(1000 * seconds))
        if self.killed and self._process.state() == qt.QProcess.NotRunning:
            self._over(None, "")

    def _killWorker(self) -> None:
        # Not another process, which has its id since it ended: Windows gives one again at once.
        pid, mark = self._workerPid, self._workerMark
        if pid is not None and self.launched and mark is not None and process_mark(pid) == mark:
            with suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows: TerminateProcess

    def _readOutput(self) -> None:
        data = self._process.readAllStandardOutput().data()
        if data and self._on is not None:
            self._on[0](bytes(data))

    def _readLog(self) -> None:
        data = self._process.readAllStandardError().data()
        if data:  # of nothing PythonQt's is no bytes
            self._log = (self._log + bytes(data))[-LOG_BYTES:]

    def _finished(self) -> None:
        self._readLog()
        self._readOutput()
        crashed = self._process.exitStatus() == qt.QProcess.CrashExit
        code = self._process.exitCode()
        if self.launched and (crashed or os.name == "nt"):
            self._killWorker()  # where the launcher did not wait for its end
        self._end(-code if crashed and os.name != "nt" else code, "")

    def _failed(self, error: int) -> None:
        if error == qt.QProcess.FailedToStart:
            self._end(None, self._process.errorString())

    def _end(self, code: int | None, reason: str) -> None:
        # Never within start(), which Windows would have it, nor within a signal.
        qt.QTimer.singleShot(0, lambda: self._over(code, reason))

    def _over(self, code: int | None, reason: str) -> None:
        if self not in _living:
            return
        _living.discard(self)
        # When Slicer quits no event loop comes back to this, and PythonQt's end, after Python's, would call what is still connected.
        for name, slot in self._slots.items():
            self._process.disconnect(name, slot)
        self._slots.clear()
        self._process.deleteLater()
        on, self._on = self._on, None
        if on is not None:
            on[1](code, reason)


def _ignore(*_unused: Any) -> None:
    pass


def _call(callback: Callable[..., Any], *arguments: Any) -> None:
    try:
        callback(*arguments)
    except Exception:
        logging.exception("A callback of the worker failed.")


def _error(error: BaseException) -> WorkerError:
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, UserError):
        return WorkerError(str(error), "user")
    if isinstance(error, MemoryError):
        return WorkerError("There was not enough memory; close other programs and try again (a smaller ROI needs less).", "memory")
    logging.error("The worker's client failed.", exc_info=error)
    text = f"Something unexpected went wrong ({type(error).__name__}: {str(error)[:200]}); please report it with the log."
    return WorkerError(text, "internal")


def variablesFor(python: str) -> Mapping[str, str]:
    """Slicer's variables for Slicer's Python; its libraries and paths are wrong for another."""
    slicer: Any = sys.modules.get("slicer")
    own = python == sys.executable or Path(python).stem == "PythonSlicer"
    return os.environ if own or not hasattr(slicer, "app") else slicer.util.startupEnvironment()
