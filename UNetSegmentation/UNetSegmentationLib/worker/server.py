"""The worker's side: volumes, verified models, warm engines and click sessions stay; all work is the main thread's.

One thread reads the requests, so that a cancel, a ping or the client's end is seen while a network runs.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import platform
import queue
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .. import __version__, kept
from ..dataset import INDEX, Dataset, Objection, completed, read_mask, same_names, translated
from ..engines import Engine, choose_engine
from ..files import OUT_OF_MEMORY, UserError
from ..image import Image
from ..inference.click import ClickSession, expects_lung, second_opinion
from ..inference.predict import Cancelled, Options, Progress, predict
from ..measure import measure, uncertain_places
from ..model import Label, ModelPackage
from ..nodule import describe
from .protocol import (
    FOLDER_PREFIX,
    LOCK,
    PROTOCOL,
    Case,
    Lines,
    ProtocolError,
    WorkerAnswer,
    abandoned,
    decode_case,
    decode_image,
    decode_options,
    decode_part,
    decode_prompts,
    dumps,
    encode_answer,
    encode_prediction,
    get,
    loads,
    remove_files,
    remove_folder,
    strings,
)

_WARM = 8  # models and engines kept; an ensemble of five folds and a few others
_SESSIONS = 8  # lesions kept; another one's prompts are run again when they come
_PROGRESS_S = 0.05
_WATCH_S = 0.5
_GOING_S = 1.0
_MAX_TRACEBACK = 8000
_NO_MEMORY = "There was not enough memory; close other programs and try again (a smaller ROI or model needs less)."

Stamp = tuple[str, int, int]


def private_folder(name: str | Path) -> Path:
    """ValueError where it is not a folder of this user's alone that a client made."""
    folder = Path(name)
    status = folder.lstat()
    ours = os.name == "nt" or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    if not (stat.S_ISDIR(status.st_mode) and folder.name.startswith(FOLDER_PREFIX) and ours):
        raise ValueError(f"{folder} is not a private folder of a client")
    return folder


def _remove_abandoned(place: Path) -> None:
    """What stayed behind where a client and its worker ended at once, as in a power cut: patients' voxels, perhaps."""
    for lock in place.glob(f"{FOLDER_PREFIX}*{LOCK}"):
        folder = lock.with_suffix("")
        with suppress(ValueError, OSError):
            if abandoned(folder) and (not os.path.lexists(folder) or private_folder(folder)):
                remove_folder(folder)


class Program:
    """A client's child: it reads from its pipe, writes to it, and goes when it is closed."""

    def __init__(self, source: int, sink: int, folder: Path, parent: int) -> None:
        self._source, self._sink, self._folder = source, sink, folder
        self._parent_gone = _watch_parent(parent)
        self._writing = threading.Lock()
        threading.Thread(target=_remove_abandoned, args=(folder.parent,), daemon=True).start()

    @classmethod
    def serve(cls, source: int, sink: int, arguments: Sequence[str]) -> int:
        """Serve the client on the other end of two file descriptors until it goes; arguments: its folder and process id."""
        try:
            folder, parent = private_folder(arguments[0]), int(arguments[1])
        except (IndexError, ValueError, OSError) as e:
            print(f"This program is started by its client, with a folder and a process id: {e}", file=sys.stderr)
            return 2
        faulthandler.enable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a shared terminal is the client's to answer
        cls(source, sink, folder, parent).run()
        return 0

    def run(self) -> None:
        raise NotImplementedError

    def _write(self, data: bytes) -> None:
        with self._writing:
            try:
                while data:
                    data = data[os.write(self._sink, data) :]
            except OSError:
                self._leave()

    def _leave(self) -> None:
        """The client closed its pipe. Its folder is deleted if it is gone; one that lives may go on with another worker.

        Not sys.exit: the main thread may be in a network for minutes.
        """
        until = time.monotonic() + _GOING_S  # a process that is killed closes its files a moment before it is gone
        while not (gone := self._parent_gone()) and time.monotonic() < until:
            time.sleep(0.005)
        if gone:
            remove_folder(self._folder)
        os._exit(0)


class Server(Program):
    def __init__(self, source: int, sink: int, folder: Path, parent: int) -> None:
        super().__init__(source, sink, folder, parent)
        self._launcher = os.getppid()  # the client, or what stands between it and this process
        self._queue: queue.SimpleQueue[tuple[int, str, dict[str, Any]]] = queue.SimpleQueue()
        self._state = threading.Lock()  # of the two sets
        self._pending: set[int] = set()
        self._cancelled: set[int] = set()
        self._greeted = False
        self._volumes: dict[int, Image] = {}
        self._unread: dict[int, dict[str, Any]] = {}  # by volume, the request that failed
        self._packages: dict[Stamp, ModelPackage] = {}
        self._engines: dict[tuple[Stamp, str, str, str, int], Engine] = {}
        self._engines_made = 0
        self._sessions: dict[tuple[int, Engine, str], ClickSession] = {}  # volume, engine, lesion; the last is the one used last

    def run(self) -> None:
        for target in (self._read, self._watch):
            threading.Thread(target=target, daemon=True).start()
        hello = {"event": "hello", "protocol": PROTOCOL, "core": __version__, "python": platform.python_version(), "pid": os.getpid()}
        self._write(b"\n" + dumps(hello))  # the line break ends whatever was printed before
        while True:
            self._answer(*self._queue.get())

    # ------------------------------------------------------------------------------------------------- reader's thread

    def _watch(self) -> None:
        """A client killed while a process of its own holds the pipe open sends no end of file, nor does a launcher."""
        while not self._parent_gone() and os.getppid() == self._launcher:
            time.sleep(_WATCH_S)
        self._leave()

    def _read(self) -> None:
        lines = Lines()
        while True:
            try:
                data = os.read(self._source, 1 << 16)
            except OSError:
                data = b""
            if not data:
                self._leave()
            for line in lines.feed(data):
                request: dict[str, Any] = {}
                try:
                    request = loads(line)
                    self._receive(request)
                except Exception as e:
                    number = request.get("id")
                    self._write(dumps({"id": number if type(number) is int else None, **_failure(e)}))

    def _receive(self, request: dict[str, Any]) -> None:
        op = get(request, "op", str)
        if op == "hello":
            spoken = get(request, "protocol", int)
            self._greeted = spoken == PROTOCOL
            if not self._greeted:
                raise UserError(f"The worker speaks protocol {PROTOCOL} and its client {spoken}; reinstall UNetSegmentation in both.")
            return
        if op == "shutdown":
            os._exit(0)
        if not self._greeted:
            raise UserError("The client did not say which protocol it speaks; reinstall UNetSegmentation.")
        number = get(request, "id", int)
        if op == "cancel":
            with self._state:
                self._cancelled |= {get(request, "target", int)} & self._pending
        elif op == "ping":
            held: dict[str, Any] = {"volumes": sorted(self._volumes), "models": len(self._packages), "engines": len(self._engines)}
            held |= {"engines_made": self._engines_made, "sessions": len(self._sessions)}
            self._write(dumps({"event": "done", "id": number, **held}))
        elif op in self._OPS:
            with self._state:
                if number in self._pending:
                    raise ProtocolError(f"The id {number} is already in use.")
                self._pending.add(number)
            self._queue.put((number, op, request))
        else:
            raise ProtocolError(f"There is no request {op[:40]!r}.")

    # --------------------------------------------------------------------------------------------------- main thread

    def _answer(self, number: int, op: str, request: dict[str, Any]) -> None:
        try:
            answer = self._OPS[op](self, number, request)
        except Cancelled:
            answer = {"event": "cancelled"}
        except Exception as e:
            answer = _failure(e)
        if answer["event"] in ("error", "cancelled"):
            remove_files(self._folder, f"result-{number}-*")
        if answer.get("kind") == "memory":
            self._sessions.clear()
            self._engines.clear()
            self._packages.clear()
            gc.collect()
        with self._state:
            self._pending.discard(number)
            self._cancelled.discard(number)
        try:
            line = dumps({"id": number, **answer})
        except UserError:
            error = UserError("The result holds numbers that are not finite, as some of the volume's voxels must be; replace those (NaN).")
            line = dumps({"id": number, **_failure(error)})
        self._write(line)

    def _load_volume(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        self._unload_volume(number, request)  # also where it cannot be read: it no longer lies where it was
        volume = request["volume"]
        self._unread[volume] = request
        self._volumes[volume] = decode_image(request, self._folder)
        del self._unread[volume]
        return {"event": "done"}

    def _unload_volume(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        volume = get(request, "volume", int)
        self._drop_sessions(volume)
        self._volumes.pop(volume, None)
        self._unread.pop(volume, None)
        return {"event": "done"}

    def _image(self, request: dict[str, Any]) -> tuple[int, Image]:
        volume = get(request, "volume", int)
        if volume in self._unread:  # nobody may have waited for that error, and meanwhile there may be memory
            self._load_volume(0, self._unread[volume])
        if volume not in self._volumes:
            raise UserError("The worker does not have this volume; choose it again.")
        return volume, self._volumes[volume]

    def _predict(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        _, image = self._image(request)
        options = decode_options(get(request, "options", dict))
        names, wants_measures, keep = strings(request, "models"), get(request, "measures", bool), get(request, "keep", bool)
        progress, check = self._teller(number), self._checker(number)
        progress(0.0, "loading the model")
        models, engines = [], []
        for name in names:
            check()
            model, engine = self._warm(name, options, max(_WARM, len(names)))
            models.append(model)
            engines.append(engine)
        prediction = predict(image, models, options, progress, lambda: number in self._cancelled, engines)
        check()
        measures = places = None
        if wants_measures:
            progress(1.0, "measuring")
            measures = measure(prediction.labels, prediction.label_defs, image)
            check()
        if prediction.uncertainty is not None:
            places = uncertain_places(prediction.uncertainty)
            check()
        key = ""
        if keep:
            key = _keep(prediction.labels.array, (0, 0, 0), image, prediction.label_defs)
            prediction = replace(prediction, mutual_information=None)  # 4 bytes a voxel that no panel shows
        return {"event": "result", **encode_prediction(prediction, self._folder, number, measures, places, key)}

    def _click(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        volume, image = self._image(request)
        options = decode_options(get(request, "options", dict))
        name, lesion = get(request, "model", str), get(request, "lesion", str)
        wants_measures, keep = get(request, "measures", bool), get(request, "keep", bool)
        prompts, check = decode_prompts(request.get("prompts")), self._checker(number)
        check()
        model, engine = self._warm(name, options, _WARM)
        check()
        session, fresh = self._session(volume, image, lesion, model, engine, options)
        loaded = time.perf_counter()
        answer = session.replay(prompts, lambda: number in self._cancelled)
        if fresh and not prompts:
            session.warm()
        check()
        done = time.perf_counter()
        measures = describe(image, answer.mask, answer.box.start, expects_lung(model.card)) if wants_measures else None
        if keep and answer.found:
            _keep(answer.mask, answer.box.start, image, model.card.labels[:1], kept.mask_digest(answer.mask, answer.box.start))
        seconds = {"load": loaded - began, **session.seconds, "measure": time.perf_counter() - done, "all": time.perf_counter() - began}
        told = WorkerAnswer(answer.box, answer.mask, answer.text, answer.zoom, measures, seconds, session.warnings, engine.describe())
        return {"event": "click", **encode_answer(told)}

    def _session(
        self, volume: int, image: Image, lesion: str, model: ModelPackage, engine: Engine, options: Options
    ) -> tuple[ClickSession, bool]:
        """The lesion's own session, or a new one that shares all it can with another lesion's; and whether there was none."""
        for key in [k for k in self._sessions if k[1] not in self._engines.values()]:
            del self._sessions[key]  # of an engine that was given up
        key = volume, engine, lesion
        session = self._sessions.pop(key, None)
        sibling = session or next((s for k, s in self._sessions.items() if k[:2] == key[:2]), None)
        if session is None:
            session = self._new_session(image, model, engine, options) if sibling is None else sibling.another()
        self._sessions[key] = session
        while len(self._sessions) > _SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        return session, sibling is None

    def _new_session(self, image: Image, model: ModelPackage, engine: Engine, options: Options) -> ClickSession:
        second = None
        with suppress(UserError):  # the session says it
            other = second_opinion(model.card)
            second = self._warm(str(other.path), options, _WARM) if other is not None else None
        return ClickSession(image, model, engine, second=second)

    def _drop_sessions(self, volume: int) -> None:
        for key in [k for k in self._sessions if k[0] == volume]:
            del self._sessions[key]

    def _add_case(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        _, image = self._image(request)
        case, check = decode_case(get(request, "case", dict)), self._checker(number)
        mask = decode_part(get(request, "mask", dict), self._folder, image.shape)
        check()
        folder = Path(case.folder)
        dataset, new = _open_dataset(folder, case)
        try:
            labels = completed(case.labels, dataset.labels)
            own = _own_mask(case, image, labels)
            check()
            entry = dataset.add(
                image,
                mask,
                patient=case.patient,
                labels=labels,
                model_mask=own,
                model=case.model,
                by=case.by,
                dated=case.dated,
                allow=case.allow,
                modality=case.modality,
                progress=self._teller(number),
                check=check,
            )
        except BaseException:
            if new:
                dataset.discard()
            raise
        told = {"case": entry.name, "version": entry.version, "record": entry.record, "own": own is not None}
        return {"event": "done", **told, "summary": dataset.summary()}

    def _dataset(self, number: int, request: dict[str, Any]) -> dict[str, Any]:
        folder, action = Path(get(request, "folder", str)), get(request, "action", str)
        if action == "show" and not (folder / INDEX).exists() and _reachable(folder):
            return {"event": "done", "summary": None}
        dataset = Dataset.open(folder)
        if action == "remove":
            dataset.remove(get(request, "case", str))
        elif action == "restore":
            version = request.get("version")
            dataset.restore(get(request, "case", str), None if version is None else get(request, "version", int))
        elif action != "show":
            raise ProtocolError(f"Nothing is known to do with a dataset by the name of {action[:40]!r}.")
        return {"event": "done", "summary": dataset.summary()}

    # What the main thread does: each takes the request's id and message, and returns the answer or raises.
    _OPS: ClassVar[dict[str, Callable[[Server, int, dict[str, Any]], dict[str, Any]]]] = {
        "load_volume": _load_volume,
        "unload_volume": _unload_volume,
        "predict": _predict,
        "click": _click,
        "add_case": _add_case,
        "dataset": _dataset,
    }

    def _teller(self, number: int) -> Progress:
        """Sends a request's progress, but the same words not more often than anybody can see."""
        last, said = float("-inf"), ""

        def progress(fraction: float, text: str) -> None:
            nonlocal last, said
            if text != said or time.monotonic() - last >= _PROGRESS_S or fraction >= 1:
                last, said = time.monotonic(), text
                self._write(dumps({"event": "progress", "id": number, "fraction": fraction, "text": text}))

        return progress

    def _checker(self, number: int) -> Callable[[], None]:
        def check() -> None:
            if number in self._cancelled:
                raise Cancelled

        return check

    def _warm(self, name: str, options: Options, keep: int) -> tuple[ModelPackage, Engine]:
        """A verified model and its engine, made only when the file or the choice of engine is new."""
        path = Path(name)
        try:
            status = path.stat()
        except OSError:
            raise UserError(f"There is no model package {path}; check the name.") from None
        stamp = (name, status.st_mtime_ns, status.st_size)
        if stamp not in self._packages:
            for old in [s for s in self._packages if s[0] == name]:
                del self._packages[old]
            for key in [k for k in self._engines if k[0][0] == name]:
                del self._engines[key]
            self._packages[stamp] = ModelPackage.read(path)
        package = self._packages[stamp] = self._packages.pop(stamp)  # the last in a dict is the one used last
        choice = (stamp, options.engine, options.device, options.precision, options.threads)
        if choice not in self._engines:
            self._engines[choice] = choose_engine(package, options.engine, options.device, options.precision, options.threads)
            self._engines_made += 1
        engine = self._engines[choice] = self._engines.pop(choice)
        while len(self._packages) > keep:
            del self._packages[next(iter(self._packages))]
        while len(self._engines) > keep:
            del self._engines[next(iter(self._engines))]
        return package, engine


def _keep(labels: np.ndarray, start: Sequence[int], image: Image, names: Sequence[Label], key: str = "") -> str:
    """An answer is worth more than that it can be kept."""
    try:
        return kept.keep(labels, start, image, names, key)
    except UserError as e:
        print(e, file=sys.stderr, flush=True)
        return ""


def _reachable(folder: Path) -> bool:
    if not folder.is_dir():
        raise UserError(f"The folder {folder} is not there; connect its drive or network folder, or choose another.")
    return True


def _open_dataset(folder: Path, case: Case) -> tuple[Dataset, bool]:
    """The case's dataset, made where there is none; and whether it was made."""
    if case.create is None or (folder / INDEX).exists():
        return Dataset.open(folder), False
    _reachable(folder)
    name, channels = case.create
    labels: list[Label] = []
    for label in (*case.offered, *case.labels):
        if label.key not in (d.key for d in labels):
            labels.append(replace(label, value=len(labels) + 1))
    return Dataset.create(folder, name, labels, channels), True


def _own_mask(case: Case, image: Image, labels: Sequence[Label]) -> np.ndarray | None:
    """The model's own mask in the values of `labels`, as far as it is known."""
    if case.own_file and not Path(case.own_file).exists():
        return None  # segmented again meanwhile
    if case.own_file:
        try:
            array, theirs = read_mask(case.own_file, image)
        except UserError:  # the scan was moved since, or the file is damaged: that is no reason to lose the correction
            return None
        return translated(array, same_names(theirs, labels))
    out, known = np.zeros(image.shape, np.uint8), False
    for key, pairs in case.own:
        found = kept.find(key, image)
        if found is None:
            return None  # a part of it would tell of changes that nobody made
        array, box, theirs = found
        # What a person deleted as a whole has no segment any more that says what it was.
        part, values = out[box.slices], translated(array, same_names(theirs, labels) | dict(pairs))
        part[values > 0] = values[values > 0]
        known = True
    return out if known else None


def _failure(error: Exception) -> dict[str, Any]:
    """What a person should read; what a programmer should read goes to stderr, bounded."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain and len(chain) < 10:
        chain.append(before)
    if any(isinstance(e, MemoryError) or OUT_OF_MEMORY.search(str(e)) for e in chain):
        text = str(error) if isinstance(error, UserError) and type(chain[-1]).__module__.startswith("torch") else _NO_MEMORY
        return {"event": "error", "kind": "memory", "error": text}
    expected = isinstance(error, (UserError, ProtocolError))
    if not expected or isinstance(error.__cause__, ImportError):
        print("".join(traceback.format_exception(error))[-_MAX_TRACEBACK:], file=sys.stderr, flush=True)
    text = str(error)
    if not expected:
        text = f"Something unexpected went wrong ({type(error).__name__}: {text[:200]}); please report it with the log."
    told = {"event": "error", "kind": "user" if isinstance(error, UserError) else "internal", "error": text}
    return told | ({"objection": error.kind} if isinstance(error, Objection) else {})


def _watch_parent(pid: int) -> Callable[[], bool]:
    """A function that says whether the client's process is gone."""
    if sys.platform == "win32":
        import ctypes

        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = ctypes.c_void_p
        kernel.WaitForSingleObject.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        handle = kernel.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE; an open handle keeps the id from being used again
        return lambda: not handle or kernel.WaitForSingleObject(handle, 0) == 0
    first = os.getppid()
    state = Path(f"/proc/{pid}/stat")

    def gone() -> bool:
        if first == pid and os.getppid() != pid:  # also true of a client that nobody has waited for yet
            return True
        try:
            os.kill(pid, 0)
            if first != pid and state.exists():  # behind a launcher only Linux tells of such a client
                return state.read_bytes().rpartition(b")")[2].split()[0] == b"Z"
        except ProcessLookupError:
            return True
        except (OSError, IndexError):
            pass
        return False

    return gone
