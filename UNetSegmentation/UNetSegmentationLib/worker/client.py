"""The client's side: Session, which has no pipes and so also serves a QProcess, and WorkerClient on subprocess.

>>> with WorkerClient() as worker:
...     volume = worker.load_volume(read_image("ct.nii.gz"))
...     prediction = worker.predict(volume, ["lung-nodule-2d-1.2.1.unet.zip"])
...     answer = worker.click(volume, "lung-nodule-click-0.6.0.unet.zip", prompts=[("point", -62.1, -14.0, -120.5, True)])
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..files import child_options, escape_arguments, user_path
from ..image import Image, UserError
from ..inference.click import Prompt
from ..inference.predict import Cancelled, Options, Progress
from ..model import ModelPackage
from ..steps import Steps, complete
from .protocol import (
    FOLDER_PREFIX,
    KINDS,
    MAX_LINE,
    PROTOCOL,
    Case,
    Lines,
    ProtocolError,
    WorkerAnswer,
    WorkerPrediction,
    decode_answer,
    decode_prediction,
    dumps,
    encode_case,
    encode_geometry,
    encode_image,
    encode_options,
    encode_part,
    encode_prompts,
    get,
    hold_folder,
    loads,
    remove_files,
    remove_folder,
)

CANCEL_S = 0.3  # how long a worker that was asked to cancel may take before it is killed
START_S = 120.0  # a cold disk and a virus scanner can take most of a minute over the first import of numpy
LOG_BYTES = 64 << 10  # of what the worker writes on stderr, the last are kept
_POLL_S = 0.03

_EVENTS = ("starting", "hello", "progress", "done", "result", "click", "cancelled", "error")
_T = TypeVar("_T")
_NT_NO_MEMORY = (0xC0000017, 0xC000012D)  # STATUS_NO_MEMORY, STATUS_COMMITMENT_LIMIT


class WorkerError(UserError):
    """What went wrong in the worker, as one sentence. kind: "user", "memory", "internal" or "worker" (it died or cannot start);
    objection: of dataset.OBJECTIONS, where a case would be added if that were allowed, or ""."""

    def __init__(self, text: str, kind: str, objection: str = "") -> None:
        super().__init__(text)
        self.kind, self.objection = kind, objection


@dataclass(frozen=True)
class Event:
    """One message of the worker. kind: "starting", "hello", "progress", "done", "result", "click", "cancelled", "error", or
    "fatal": the worker must be killed. id: of the request that it answers; data: the message."""

    kind: str
    id: int | None
    data: dict[str, Any]

    @property
    def final(self) -> bool:
        return self.kind not in ("starting", "hello", "progress")

    def error(self) -> WorkerError:
        kind = self.data.get("kind")
        return WorkerError(str(self.data.get("error", "")), kind if kind in KINDS else "worker", str(self.data.get("objection", "")))


def find_python() -> str:
    """This Python, or Slicer's where this process is Slicer, whose sys.executable need not be a Python."""
    if "python" in Path(sys.executable or "").stem.lower():
        return sys.executable
    found = shutil.which("PythonSlicer")
    if found is None:
        raise UserError("Slicer's Python (PythonSlicer) was not found; install Slicer again, or choose another Python.")
    return found


def new_folder() -> Path:
    """A private folder for the arrays of a session."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    except OSError as e:
        raise UserError(f"The temporary folder cannot be written ({e.strerror or e}); free some disk space or choose another.") from e
    hold_folder(folder)
    return folder


def command(python: str, folder: Path, background: bool = False) -> list[str]:
    """How the worker is started, by a process that lives as long as it should. background: with a lower priority."""
    return [python, "-m", f"{__package__}", *escape_arguments([str(folder)]), str(os.getpid()), *(["background"] if background else [])]


def working_folder() -> Path:
    """Where UNetSegmentationLib lies, for the worker's path and current folder."""
    return Path(__file__).resolve().parents[2]


def child_environment(python: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of the worker; another Python does not get this one's home and paths."""
    out = dict(os.environ if environment is None else environment)
    if sys.platform == "win32":  # where their case means nothing: "Path" beside os.environ's "PATH" would be another
        out = {name.upper(): value for name, value in out.items()}
    for name in ("UNETSEG_ENVIRONMENT", "UNETSEG_MASKS", "UNETSEG_MODELS"):
        if out.get(name):  # the child's current folder is another
            out[name] = str(user_path(out[name]).absolute())
    out["PYTHONIOENCODING"] = "utf-8"  # as it is read; Windows' code page would garble what a sentence quotes
    paths = [str(working_folder())]
    if python == sys.executable:
        paths += filter(None, [out.get("PYTHONPATH")])
    else:
        out.pop("PYTHONHOME", None)
    out["PYTHONPATH"] = os.pathsep.join(paths)
    return out


def cannot_start(python: str, reason: str) -> WorkerError:
    return WorkerError(f"The worker cannot be started with the Python at {python} ({reason}); choose another Python.", "worker")


def ending(code: int, python: str, log: str, greeted: bool, launched: bool = False) -> WorkerError:
    """The sentence for a worker that ended by itself.

    code: its exit code (negative: a signal). log: the end of its stderr. greeted: it said hello. launched: the code is that
    of a launcher such as PythonSlicer, which hides how the worker itself ended.
    """
    if code < -255:
        code += 1 << 32  # Qt gives those of Windows as signed numbers
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    if not greeted and not number:
        reason = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), f"exit code {code}")[:200]
        return WorkerError(f"The Python at {python} cannot run the worker ({reason}); choose another Python.", "worker")
    # A crash would have left the words of faulthandler, which are others on Windows.
    crashed = "Fatal Python error" in log or "Windows fatal exception" in log
    if code in _NT_NO_MEMORY or (launched and code == 1 and not crashed):
        number = 9
    if number == 9:
        text = "The worker was stopped by the system, probably because memory ran out"
        return WorkerError(f"{text}; close other programs and try again (a smaller ROI needs less).", "memory")
    what = f"crashed (signal {number})" if number else f"ended unexpectedly (exit code {code})"  # above 2**31 on Windows: a crash
    return WorkerError(f"The worker {what}; try again, and if it happens again choose another engine or device.", "worker")


class Session:
    """All of the client but the process: numbers the requests, frames and checks the answers, remembers the volumes.

    connect() for every new worker, feed() with what it writes on stdout, and the bytes of the others go to its stdin.
    counts: how many requests of each kind were made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hello: dict[str, Any] | None = None
        self.pid: int | None = None  # the worker's own, which is not that of its launcher
        self.counts: Counter[str] = Counter()
        self._lines = Lines()
        self._volumes: dict[int, tuple[dict[str, Any], Image]] = {}
        self._known: set[int] = set()  # volumes that this worker has
        self._images: dict[int, Image] = {}  # by request, to place its result
        self._masks: dict[int, int] = {}  # by request, the number of its file
        self._last = 0

    def connect(self) -> bytes:
        """A new worker knows nothing yet; returns what to send it first."""
        self.hello = self.pid = None
        self._lines = Lines()
        self._known.clear()
        self._images.clear()
        self._masks.clear()
        remove_files(self.folder, "result-*")
        remove_files(self.folder, "mask-*")
        return dumps({"op": "hello", "protocol": PROTOCOL})

    def feed(self, data: bytes) -> list[Event]:
        out = []
        for line in self._lines.feed(data):
            try:
                event = self._event(loads(line))
            except ProtocolError as e:
                if self.hello is None:
                    continue  # something printed before the worker took hold of its stdout
                text = f"The worker answered something unintelligible ({e}); try again, or reinstall UNetSegmentation."
                event = Event("fatal", None, {"error": text})
            out.append(event)
        return out

    def _event(self, message: dict[str, Any]) -> Event:
        kind, number = get(message, "event", str), message.get("id")
        if kind not in _EVENTS or not (number is None or type(number) is int):
            raise ProtocolError(f"there is no answer {kind[:40]!r}")
        if kind in ("starting", "hello"):
            pid = get(message, "pid", int)
            if pid < 2:  # to kill 0 or -1 would end much more than a worker
                raise ProtocolError("it has no process id")
            self.pid = pid
        if kind == "hello":
            spoken = get(message, "protocol", int)
            if spoken != PROTOCOL:
                text = f"The worker speaks protocol {spoken} and its client {PROTOCOL}; reinstall UNetSegmentation in both."
                return Event("fatal", None, {"error": text, "kind": "user"})
            self.hello = message
        elif kind == "progress":
            get(message, "fraction", (int, float)), get(message, "text", str)
        elif kind == "error":
            get(message, "error", str)
            if number is None:  # of no request: it does not understand us, or cannot start
                return Event("fatal", None, message)
        return Event(kind, number, message)

    def request(self, op: str, **fields: Any) -> tuple[int, bytes]:
        """The request's id and the line to send."""
        line = dumps({"op": op, "id": self._last + 1, **fields})
        self._last += 1
        self.counts[op] += 1
        return self._last, line

    def add_volume(self, image: Image) -> Steps[int]:
        """Write the volume into the folder; a worker gets to know it by load() or with its first predict()."""
        self._last += 1
        volume = self._last
        self._volumes[volume] = (yield from encode_image(image, self.folder, volume)), _grid(image)
        return volume

    def place_volume(self, volume: int, image: Image) -> tuple[int, bytes] | None:
        """The volume lies where `image` does, whose voxels are its own; returns what to send, None if nothing."""
        message, _ = self._volumes[volume]
        if not (self.folder / message["file"]).exists():  # macOS clears temporary folders of what was not read for three days
            complete(encode_image(image, self.folder, volume))
        placed = {**message, "geometry": encode_geometry(image)}
        if placed == message:
            return None
        self._volumes[volume] = placed, _grid(image)
        return self.load(volume) if volume in self._known else None

    def load(self, volume: int) -> tuple[int, bytes]:
        self._known.add(volume)
        return self.request("load_volume", **self._volumes[volume][0])

    def remove_volume(self, volume: int) -> tuple[int, bytes] | None:
        """Delete the volume; returns what to send, None if the worker does not have it."""
        if self._volumes.pop(volume, None) is None:
            return None
        remove_files(self.folder, f"volume-{volume}.npy")
        if volume not in self._known:
            return None
        self._known.discard(volume)
        return self.request("unload_volume", volume=volume)

    def predict(
        self,
        volume: int,
        models: Sequence[ModelPackage | str | Path],
        options: Options = Options(),
        measures: bool = False,
        keep: bool = False,
    ) -> tuple[int, bytes]:
        """models: packages or their files. keep: for a later case, see kept.py. A worker that does not have the volume yet is
        told of it first."""
        paths = [_file(m) for m in models]
        return self._about(volume, "predict", models=paths, options=encode_options(options), measures=measures, keep=keep)

    def click(
        self,
        volume: int,
        model: ModelPackage | str | Path,
        options: Options = Options(),
        lesion: str = "",
        prompts: Sequence[Prompt] = (),
        measures: bool = False,
        keep: bool = False,
    ) -> tuple[int, bytes]:
        """All of a lesion's prompts in their order (see ClickSession.replay); with none, what the first click will need is
        loaded. lesion: any name, of what the worker keeps from one call to the next. UserError for what is no prompt."""
        made = encode_prompts(prompts)
        options = replace(options, roi=None, at=None, intensity=None)
        asked = {"model": _file(model), "options": encode_options(options), "lesion": lesion, "prompts": made}
        return self._about(volume, "click", **asked, measures=measures, keep=keep)

    def add_case(self, volume: int, mask: np.ndarray, start: Sequence[int], case: Case) -> Steps[tuple[int, bytes]]:
        """mask: label values (z, y, x), uint8, whose first voxel is `start` of the volume's grid; 0 around it."""
        self._last += 1
        mine = self._last
        part = yield from encode_part(mask, start, self.folder, mine)
        number, line = self._about(volume, "add_case", mask=part, case=encode_case(case))
        self._masks[number] = mine
        return number, line

    def dataset(self, folder: str | Path, action: str = "show", case: str = "", version: int | None = None) -> tuple[int, bytes]:
        """action: "show", "remove" a case, or "restore" a removed case or a former version of one."""
        return self.request("dataset", folder=str(folder), action=action, case=case, version=version)

    def dataset_result(self, event: Event) -> dict[str, Any]:
        """What the answer to add_case() or dataset() holds: "summary", see Dataset.summary(), None where there is no dataset
        yet; of a new case "case", "version", "record", "own". WorkerError where it is not valid."""
        try:
            if event.data.get("summary") is not None:
                summary = get(event.data, "summary", dict)
                get(summary, "cases", list), get(summary, "count", int), get(summary, "labels", list)
            if "case" in event.data:
                get(event.data, "case", str), get(event.data, "version", int), get(event.data, "record", dict)
        except ProtocolError as e:
            raise WorkerError(f"The worker's answer is not valid ({e}); try again, or reinstall UNetSegmentation.", "worker") from e
        return event.data

    def _about(self, volume: int, op: str, **fields: Any) -> tuple[int, bytes]:
        if volume not in self._volumes:
            raise UserError("This volume was not loaded, or was unloaded; load it again.")
        fields = {"volume": volume, **fields}
        if len(dumps(fields)) > MAX_LINE - 1000:  # refused before the volume is announced
            raise UserError("The mask is too ragged to be sent; smooth it, or correct a smaller one.")
        if volume not in self._known and not (self.folder / self._volumes[volume][0]["file"]).exists():  # see place_volume()
            raise UserError("The system has tidied away the temporary copy of this volume; load it again.")
        before = b"" if volume in self._known else self.load(volume)[1]
        number, line = self.request(op, **fields)
        self._images[number] = self._volumes[volume][1]
        return number, before + line

    def result(self, event: Event) -> Steps[WorkerPrediction]:
        """What a "result" holds; its files are deleted. WorkerError where it is not valid: the worker should be killed."""
        image = self._images.get(event.id) if event.id is not None else None
        try:
            if image is None:
                raise ProtocolError("it is the result of no request")
            return (yield from decode_prediction(event.data, self.folder, image))
        except ProtocolError as e:
            raise WorkerError(f"The worker's result is not valid ({e}); try again, or reinstall UNetSegmentation.", "worker") from e

    def click_result(self, event: Event) -> WorkerAnswer:
        """What a "click" holds. WorkerError where it is not valid: the worker should be killed."""
        image = self._images.pop(event.id, None) if event.id is not None else None
        try:
            if image is None:
                raise ProtocolError("it is the result of no request")
            return decode_answer(event.data, image)
        except ProtocolError as e:
            raise WorkerError(f"The worker's result is not valid ({e}); try again, or reinstall UNetSegmentation.", "worker") from e

    def forget(self, request: int) -> None:
        """The request is over: whatever it left behind is deleted."""
        self._images.pop(request, None)
        remove_files(self.folder, f"result-{request}-*")
        if request in self._masks:
            remove_files(self.folder, f"mask-{self._masks.pop(request)}.npy")


def _grid(image: Image) -> Image:
    """Without the caller's voxels."""
    return replace(image, array=np.broadcast_to(np.uint8(0), image.shape))


def _file(model: ModelPackage | str | Path) -> str:
    return os.path.abspath(model.path if isinstance(model, ModelPackage) else user_path(model))


class WorkerClient:
    """A worker process, started with the first call that needs it and again after it died or was killed.

    python: the interpreter that runs it (default: find_python()). environment: its variables (default: this process's).
    Every failure is a WorkerError with one sentence, and the next call works again. One call at a time, none from
    within progress() or cancelled(); cancel() may come from anywhere.
    """

    def __init__(self, python: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._python, self._environment = python or find_python(), environment
        self.folder = new_folder()
        self.session = Session(self.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._events: deque[Event] = deque()
        self._log = b""
        self._calls = threading.RLock()
        self._running: threading.Thread | None = None
        self._stop, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        self._answered = self._closed = False

    @property
    def pid(self) -> int | None:
        """The worker's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def log(self) -> str:
        """The last of what the worker and its libraries wrote on stderr."""
        return self._log.decode("utf-8", "replace")

    # ------------------------------------------------------------------------------------------------------------ calls

    def start(self) -> dict[str, Any]:
        """Start the worker where there is none; returns its hello (protocol, core, python, pid)."""
        with self._calls:
            return self._start()

    def load_volume(self, image: Image) -> int:
        """Give the worker a volume, once for any number of predictions; returns its id."""
        with self._calls:
            self._start()
            volume = complete(self.session.add_volume(image))
            try:
                self._call(*self.session.load(volume))
            except BaseException:
                self.session.remove_volume(volume)
                raise
            return volume

    def unload_volume(self, volume: int) -> None:
        with self._calls:
            request = self.session.remove_volume(volume)
            if request is not None and self.pid is not None:
                self._call(*request)

    def ping(self) -> dict[str, Any]:
        """What the worker holds: volumes, models, engines, engines_made."""
        with self._calls:
            self._start()
            return self._call(*self.session.request("ping")).data

    def predict(
        self,
        volume: int,
        models: Sequence[ModelPackage | str | Path],
        options: Options = Options(),
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        measures: bool = False,
    ) -> WorkerPrediction:
        """predict() of the core, in the worker: the same result, on the grid of the loaded image, and the same errors.

        measures: also measure() the result there. Raises Cancelled after cancel(), or when cancelled() says so.
        """
        return self._ask(
            lambda: self.session.predict(volume, models, options, measures),
            lambda answer: complete(self.session.result(answer)),
            progress,
            cancelled,
        )

    def click(
        self,
        volume: int,
        model: ModelPackage | str | Path,
        options: Options = Options(),
        lesion: str = "",
        prompts: Sequence[Prompt] = (),
        measures: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> WorkerAnswer:
        """A lesion's mask from all of its prompts in their order, as ClickSession.replay() gives it, and with the same errors.

        No prompts: an empty answer, and the first click has nothing left to load. lesion: any name; the worker keeps the
        sessions of the last few. measures: also describe() the nodule. Raises Cancelled as predict() does.
        """
        return self._ask(
            lambda: self.session.click(volume, model, options, lesion, prompts, measures), self.session.click_result, None, cancelled
        )

    def add_case(
        self,
        volume: int,
        mask: np.ndarray,
        case: Case,
        start: Sequence[int] = (0, 0, 0),
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Add a corrected mask, label values (z, y, x) in uint8 from `start` of the volume's grid, to a dataset folder: what
        Session.dataset_result() holds. Raises as predict() does; of a refusal that may be allowed, `objection` says which."""
        return self._ask(
            lambda: complete(self.session.add_case(volume, mask, start, case)), self.session.dataset_result, progress, cancelled
        )

    def dataset(self, folder: str | Path, action: str = "show", case: str = "", version: int | None = None) -> dict[str, Any]:
        """Show or change a dataset folder; see Session.dataset()."""
        return self._ask(lambda: self.session.dataset(folder, action, case, version), self.session.dataset_result, None, None)

    def _ask(
        self,
        make: Callable[[], tuple[int, bytes]],
        read: Callable[[Event], _T],
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> _T:
        """A request that may take long, and what its answer holds."""
        with self._calls:
            self._stop.clear()
            self._idle.clear()
            self._running = threading.current_thread()
            try:
                self._start(cancelled)
                number, line = make()
                try:
                    answer = self._call(number, line, progress, cancelled)
                    try:
                        return read(answer)
                    except WorkerError:
                        self._kill()
                        raise
                finally:
                    self.session.forget(number)
            finally:
                self._running = None
                self._idle.set()

    def cancel(self) -> None:
        """End the running predict() or click(), which raises Cancelled: ask, wait CANCEL_S at most, then kill the worker."""
        running = self._running
        self._stop.set()
        if running is not None and running is not threading.current_thread():
            self._idle.wait(2 * CANCEL_S + 1)

    def close(self) -> None:
        """End the worker and delete the temporary folder."""
        with self._calls:
            self._closed = True
            if self._process is not None:
                with suppress(OSError, ValueError, subprocess.TimeoutExpired):
                    self._process.stdin.write(dumps({"op": "shutdown"}))  # type: ignore[union-attr]
                    self._process.wait(1)
                self._kill()
            remove_folder(self.folder)

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------------- process

    def _start(self, cancelled: Callable[[], bool] | None = None) -> dict[str, Any]:
        if self._closed:
            raise WorkerError("The worker was closed; open a new one.", "worker")
        if self._process is not None and self._process.poll() is not None:
            self._kill()
        if self._process is None:
            pipe = subprocess.PIPE
            try:
                self._process = subprocess.Popen(
                    command(self._python, self.folder),
                    stdin=pipe,
                    stdout=pipe,
                    stderr=pipe,
                    bufsize=0,
                    cwd=working_folder(),
                    env=child_environment(self._python, self._environment),
                    **child_options(apart=True),  # so that the whole tree can be killed
                )
            except OSError as e:
                raise cannot_start(self._python, e.strerror or str(e)) from e
            self._log = b""
            self._chunks = queue.SimpleQueue()
            self._events.clear()
            threading.Thread(target=_pump, args=(self._process.stdout, self._chunks.put), daemon=True).start()
            self._logger = threading.Thread(target=_pump, args=(self._process.stderr, self._note), daemon=True)
            self._logger.start()
            self._call(None, self.session.connect(), None, cancelled)
        assert self.session.hello is not None
        return self.session.hello

    def _note(self, data: bytes) -> None:
        self._log = (self._log + data)[-LOG_BYTES:]

    def _write(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError):  # it died: the end of its stdout follows whatever it still had to say
            while data:
                data = data[self._process.stdin.write(data) or 0 :]

    def _died(self) -> None:
        """The worker's pipe is closed: raise the sentence that says why."""
        process = self._process
        assert process is not None
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        code = process.poll()
        launched = self.session.pid not in (None, process.pid)
        self._kill()
        self._logger.join(1)
        code = -signal.SIGTERM if code is None else code
        raise ending(code, self._python, self.log, self.session.hello is not None, launched)

    def _kill(self) -> None:
        """End the process and all that it started; the next call starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            try:
                if sys.platform == "win32":
                    subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, **child_options())
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            except OSError:
                process.kill()
            process.wait()
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()  # the other two are closed by the threads that read them
        remove_files(self.folder, "result-*")

    def _call(
        self, number: int | None, data: bytes, progress: Progress | None = None, cancelled: Callable[[], bool] | None = None
    ) -> Event:
        """Send a request and return its answer; number None waits for the hello. Leaves no worker behind that is still
        busy with it: whatever interrupts the wait, a progress() that raises included, kills it."""
        try:
            return self._converse(number, data, progress, cancelled)
        except BaseException:
            if self._process is not None and not self._answered:
                self._kill()
            raise

    def _converse(self, number: int | None, data: bytes, progress: Progress | None, cancelled: Callable[[], bool] | None) -> Event:
        self._answered = False
        deadline = time.monotonic() + START_S if number is None else None
        asked: float | None = None
        self._write(data)
        while True:
            try:
                event = self._next(_POLL_S)
            except WorkerError as e:
                raise (e if asked is None else Cancelled()) from None
            now = time.monotonic()
            if event is not None and event.kind == "fatal":
                self._kill()
                raise event.error()
            if event is not None and (event.kind == "hello" if number is None else event.id == number and event.final):
                self._answered = True
                if event.kind == "cancelled" or (asked is not None and event.kind != "done"):  # what is done stays done
                    raise Cancelled
                if event.kind == "error":
                    raise event.error()
                return event
            if event is not None and event.kind == "progress" and event.id == number and progress is not None and asked is None:
                progress(float(event.data["fraction"]), event.data["text"])
            if asked is None and self._running is not None and (self._stop.is_set() or (cancelled is not None and cancelled())):
                asked = now
                if number is None:
                    raise Cancelled
                self._write(self.session.request("cancel", target=number)[1])
            if asked is not None and now - asked > CANCEL_S:
                raise Cancelled
            if deadline is not None and now > deadline:
                self._kill()
                raise WorkerError(f"The worker did not start within {START_S:.0f} seconds; try again.", "worker")

    def _next(self, timeout: float) -> Event | None:
        if not self._events:
            try:
                data = self._chunks.get(timeout=timeout)
            except queue.Empty:
                return None
            if not data:
                self._died()
            self._events.extend(self.session.feed(data))
        return self._events.popleft() if self._events else None


def _pump(pipe: Any, put: Callable[[bytes], None]) -> None:
    """Everything that comes out of a pipe; b"" at its end."""
    with pipe:
        while True:
            try:
                data = os.read(pipe.fileno(), 1 << 16)
            except (OSError, ValueError):
                data = b""
            put(data)
            if not data:
                return
