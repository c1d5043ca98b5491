"""The work list's program behind a panel: it reads and changes the list, reads the scan that comes next, or the case that is
compared, and segments the others in advance. A slow disk, a network folder and a network that runs for minutes hold nothing else up.

    python -m UNetSegmentationLib.worker FOLDER PARENT_PID desk

JSON lines on stdin and stdout, arrays as .npy files in the client's private folder, as protocol.py has them.
requests   {"id", "op"} and: open {folder}, add {folder, sources}, status {folder}, next {folder, leave, passed}, done {folder, scan,
           case}, skip {folder, scan}, back {folder, scan}; segment {folder, models, options}; compare {files}; pause, go, halt, bye
           without an answer
answers    {"event": "done", "id", "list": summary()} with what the request asks for, or {"event": "error", "id", "error"}
unasked    {"event": "starting", "pid"}, {"event": "hello", "pid"}; {"event": "reading", "scan"} before each scan that "next" reads;
           {"event": "segmenting", "fraction"}, {"event": "changed", "scan", "list"} after each scan, {"event": "rest", "error"} when
           there is no more to segment ("" or why it stopped)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..dataset import completed, dicom_tag, modality, read_mask, storable
from ..engines import choose_engine
from ..files import UserError
from ..image import Image, SeveralSeries, read_image
from ..inference.predict import Cancelled, Options
from ..measure import worst_place
from ..model import ModelPackage
from ..steps import complete
from ..worklist import LEASE, Annotator, Scan, WorkList, left_alone
from .protocol import Lines, ProtocolError, decode_options, dumps, encode_image, get, load_array, loads, save_array, strings
from .server import Program, _failure

_TOLD_S = 0.2
_MOST_NAMES = 12
_MOST_AWAY = 20  # scans that cannot be read here, before the person is told instead of looking further


class Desk(Program):
    def __init__(self, source: int, sink: int, folder: Path, parent: int) -> None:
        super().__init__(source, sink, folder, parent)
        self._me = Annotator.here(pid=parent)  # whose scans are free again when Slicer is gone
        self._segmenter: _Segmenter | None = None
        self._arrays = 0
        self._lists: set[str] = set()  # that were asked for: of any a scan may be taken, also since before a crash of this process

    def run(self) -> None:
        threading.Thread(target=self._keep, daemon=True).start()
        self.tell({"event": "hello", "pid": os.getpid()})
        lines = Lines()
        while data := os.read(self._source, 1 << 16):
            for line in lines.feed(data):
                self._answer(line)
        self._leave()

    def tell(self, message: dict[str, Any]) -> None:
        self._write(b"\n" + dumps(message))

    def _keep(self) -> None:
        """Signs of life for what is taken, and the end with the client's."""
        renewed = time.monotonic()
        while not self._parent_gone():
            time.sleep(0.5)
            if time.monotonic() - renewed > LEASE / 6:
                renewed = time.monotonic()
                for folder in list(self._lists):
                    with suppress(UserError):  # the network folder may come back in time
                        WorkList.open(folder).renew(self._me)
        self._leave()

    def _answer(self, line: bytes | None) -> None:
        number: int | None = None
        try:
            request = loads(line)
            number = request.get("id") if type(request.get("id")) is int else None
            op = get(request, "op", str)
            if op in self._OPS:
                answer = self._OPS[op](self, request)
            elif op in ("pause", "go", "halt"):
                if self._segmenter is not None:
                    getattr(self._segmenter, op)()
                return
            elif op == "bye":
                self._leave()
            else:
                raise ProtocolError(f"There is no request {op[:40]!r}.")
            self.tell({"id": number, **answer})
        except Exception as e:
            self.tell({"id": number, **_failure(e)})

    def _list(self, request: dict[str, Any]) -> WorkList:
        work = WorkList.open(get(request, "folder", str))
        self._lists.add(str(work.folder))
        return work

    def _annotator(self, request: dict[str, Any]) -> Annotator:
        return replace(self._me, name=str(request.get("by") or "").strip())

    def _done(self, work: WorkList, **more: Any) -> dict[str, Any]:
        return {"event": "done", "list": summary(work), **more}

    # --------------------------------------------------------------------------------------------------------- requests

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        folder = get(request, "folder", str)
        if not Path(folder).is_dir():
            raise UserError(f"The folder {folder} is not there; connect its drive or network folder, or choose another.")
        return self._done(self._list(request)) if WorkList.there(folder) else {"event": "done", "list": None}

    def _add(self, request: dict[str, Any]) -> dict[str, Any]:
        folder, sources = get(request, "folder", str), strings(request, "sources")
        work, added = WorkList.gather(folder, sources)
        return self._done(work, added=len(added), moved=len(work.moved), leftOut=len(work.left_out), notes=work.left_out[:1])

    def _next(self, request: dict[str, Any]) -> dict[str, Any]:
        work, leave, passed = self._list(request), get(request, "leave", str), strings(request, "passed")
        notes: list[str] = []
        away: dict[str, str] = {}  # scans that others may be able to read, and why
        tried = 0
        me = self._annotator(request)

        def take() -> Scan | None:  # `leave` stays taken until another is there, and comes again where there is none
            return work.next(me, "", [*passed, leave, *away]) or work.next(me, leave, [*passed, *away])

        def back(name: str) -> None:
            if name != leave:
                work.back(name, me)

        while (scan := take()) is not None:
            if scan.name in away or tried > _MOST_AWAY:
                back(scan.name)
                raise UserError(next(iter(away.values())))
            image = None
            self.tell({"event": "reading", "scan": scan.name})  # which may end this process
            try:
                image = read_image(scan.files, scan.series)
                packed = self._packed(work, scan, image)
            except SeveralSeries as e:
                work.split(scan.name, list(e.series))
            except Exception as e:
                why = left_alone(scan, e, image is not None)
                if not why and image is None and isinstance(e, UserError):
                    work.fail(scan.name, str(e))
                    notes.append(str(e))
                    continue
                back(scan.name)
                if not why:
                    raise
                tried += 1
                gone = scan.away  # with all that lie in it
                away |= {n: why for n, s in work.scans.items() if gone is not None and any(f.is_relative_to(gone) for f in s.listed)}
                away[scan.name] = why
            else:
                if leave in work.scans and scan.name != leave:
                    work.back(leave, me)
                return self._done(work, scan=packed, notes=[*notes, *list(away.values())[:1]])
        return self._done(work, scan=None, notes=notes)

    def _packed(self, work: WorkList, scan: Scan, image: Image) -> dict[str, Any]:
        """A scan's voxels, channel by channel, what was found in it, and what a panel must know to show and to add it."""
        found = mask = None
        if scan.mask is not None:
            with suppress(UserError):  # lost or cut short: the scan alone can be corrected too
                found = read_mask(scan.mask, image)
        channels = [self._channel(image, channel) for channel in image.channels]
        if found is not None and found[0].any():
            mask = self._mask(found[0])
        labels = completed(found[1] if found is not None else (), work.labels(scan.model))
        return {
            "name": scan.name,
            "channels": channels,
            "mask": mask,
            "labels": [label.to_json() for label in labels],
            "maskFile": str(scan.mask) if scan.mask is not None and found is not None else "",
            "model": scan.model,
            "value": (scan.scores or {}).get("value"),
            "patient": dicom_tag(image, "0010|0020"),
            "modality": modality(image),
        }

    def _channel(self, image: Image, channel: np.ndarray) -> dict[str, Any]:
        array = storable(channel)
        self._arrays += 1
        sent = complete(encode_image(image.like(array), self._folder, self._arrays))
        step = tuple(slice(None, None, max(1, n // 64)) for n in array.shape)
        some = array[step][np.isfinite(array[step])]
        low, high = np.percentile(some, (0.5, 99.5)) if some.size else (0.0, 1.0)
        return {**sent, "dtype": array.dtype.name, "shape": array.shape, "window": [float(low), float(max(high, low + 1e-6))]}

    def _mask(self, array: np.ndarray) -> str:
        self._arrays += 1
        return complete(save_array(self._folder, f"volume-{self._arrays}.npy", array))

    def _compare(self, request: dict[str, Any]) -> dict[str, Any]:
        """An image, those label maps on its grid that mark anything, and where they differ from the truth most."""
        files = get(request, "files", dict)
        image = read_image(get(files, "image", str))
        masks = {key: read_image(get(files, key, str)) for key in ("truth", "before", "after") if key in files}
        for key, mask in masks.items():
            if not mask.same_grid(image.like(image.channels[0])):
                raise UserError(f"{files[key]} does not lie on the grid of its image, so it cannot be shown; look at another case.")
        point = worst_place(masks["truth"], [mask for key, mask in masks.items() if key != "truth"])
        marked = {key: self._mask(mask.array) for key, mask in masks.items() if mask.array.any()}
        return {"event": "done", "image": self._channel(image, image.channels[0]), "masks": marked, "point": point}

    def _finish(self, request: dict[str, Any]) -> dict[str, Any]:
        work = self._list(request)
        note = work.done(get(request, "scan", str), self._annotator(request), get(request, "case", str))
        return self._done(work, notes=[note] if note else [])

    def _skip(self, request: dict[str, Any]) -> dict[str, Any]:
        work = self._list(request)
        note = work.skip(get(request, "scan", str), self._annotator(request))
        return self._done(work, notes=[note] if note else [])

    def _back(self, request: dict[str, Any]) -> dict[str, Any]:
        work = self._list(request)
        work.back(get(request, "scan", str), self._annotator(request))
        return self._done(work)

    def _segment(self, request: dict[str, Any]) -> dict[str, Any]:
        work, names = self._list(request), strings(request, "models")
        options = decode_options(get(request, "options", dict))
        if not names:
            raise UserError("No model was chosen; choose the one that is to segment in advance.")
        models = [ModelPackage.read(name) for name in names]
        todo = work.choose_models(models)
        former = self._segmenter
        if former is not None:
            former.halt()
        self._segmenter = _Segmenter(self, work.folder, models, options, former)
        return self._done(work, todo=todo)

    _OPS: ClassVar[dict[str, Callable[[Desk, dict[str, Any]], dict[str, Any]]]] = {
        "open": _open,
        "status": _open,
        "add": _add,
        "next": _next,
        "done": _finish,
        "skip": _skip,
        "back": _back,
        "segment": _segment,
        "compare": _compare,
    }


class _Segmenter:
    """The thread that segments in advance, one scan after the other; it waits while it is in the way, and at first for the end of
    the former one, which holds a scan until it has read it or is through with a tile."""

    def __init__(
        self, desk: Desk, folder: Path, models: Sequence[ModelPackage], options: Options, former: _Segmenter | None = None
    ) -> None:
        self._desk, self._folder, self._models, self._options, self._former = desk, folder, models, options, former
        self._free, self._halted = threading.Event(), False
        self._free.set()
        self._told = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pause(self) -> None:
        self._free.clear()

    def go(self) -> None:
        self._free.set()

    def halt(self) -> None:
        self._halted = True
        self._free.set()

    def _cancelled(self) -> bool:
        self._free.wait()
        return self._halted

    def _run(self) -> None:
        former, self._former = self._former, None
        if former is not None:
            former._thread.join()
        error, name = "", ""

        def progress(fraction: float, _text: str) -> None:
            if time.monotonic() - self._told > _TOLD_S:
                self._told = time.monotonic()
                self._desk.tell({"event": "segmenting", "fraction": fraction})

        try:
            o = self._options
            engines = [choose_engine(m, o.engine, o.device, o.precision, o.threads) for m in self._models]
            me = Annotator.here(pid=os.getpid())
            work = WorkList.open(self._folder)
            while not self._cancelled():
                scan = work.segment(self._models, me, o, progress, self._cancelled, engines)
                if scan is None:
                    break
                name = scan.name
                self._desk.tell({"event": "changed", "scan": name, "list": summary(work)})
            if work.away:
                many = f"{len(work.away)} scans were left alone. " if len(work.away) > 1 else ""
                error = many + next(iter(work.away.values()))
        except Cancelled:
            pass
        except Exception as e:
            error = _failure(e)["error"]
        if not self._halted:
            self._desk.tell({"event": "rest", "error": error})


def summary(work: WorkList) -> dict[str, Any]:
    """What a panel shows of a list."""
    scans = work.scans
    return {
        "folder": str(work.folder),
        "total": len(scans),
        "counts": work.counts(scans),
        "models": list(work.models),
        "unsegmented": work.unsegmented,
        "taken": [{"name": s.name, "by": s.by} for s in scans.values() if s.status == "taken"][:_MOST_NAMES],
        "failed": [{"name": s.name, "error": s.error} for s in scans.values() if s.status == "failed"][:_MOST_NAMES],
    }


def received_grid(channel: dict[str, Any]) -> Image:
    """The client's side: size, type and place of a channel of an answer to "next", without its voxels."""
    geometry, shape = channel["geometry"], tuple(channel["shape"])
    zeros = np.broadcast_to(np.zeros((), channel["dtype"]), shape)
    return Image(zeros, tuple(geometry["spacing"]), tuple(geometry["origin"]), tuple(geometry["direction"]))  # type: ignore[arg-type]


def received_mask(folder: Path, name: str | None, grid: Image) -> np.ndarray:
    """The client's side: what was found in the scan, zeros where that is nothing."""
    return load_array(folder, name) if name else np.zeros(grid.shape, np.uint8)
