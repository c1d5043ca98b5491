"""live.jsonl: what a training is doing now, one JSON object a line, for a person's plots while it runs.

Every line is whole when it is there, and flushed at once. Fields that have no value yet are null.

    event               "start" | "step" | "validation" | "end"
    time                seconds since 1970
    step, epoch         optimizer steps done, and the epoch they are in
    start:              format (1), labels (names), steps (planned, or null), folder's files: curve.csv, tensorboard/
    step, validation:   loss (mean since the last line of its kind), learning_rate, seconds_per_step, seconds_left
    validation:         dice (mean), dice_per_class {label: Dice}, best {"dice", "step"}, pictures [paths in the folder]
    end:                reason "finished" (also early) | "stopped" (by a person) | "failed", message

The file stays below `limit` bytes: as it fills up, every second "step" line of the past goes. It is then replaced as a whole:
a reader that holds it open sees no more lines, and one that finds it shorter than before reads it again from its start.
A resumed run first drops the lines after the step that it goes on from. This file needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
LIMIT = 4 << 20

Line = dict[str, Any]


def read(path: str | Path) -> list[Line]:
    """The lines so far; a half line at the end, or a damaged one, is passed over. Empty where there is no file."""
    return list(_lines(Path(path)))


def _lines(path: Path) -> Iterator[Line]:
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return
    for part in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            line = json.loads(part)
            if isinstance(line, dict):
                yield line


class LiveFile:
    """The writer of live.jsonl. lines: what the file holds."""

    def __init__(self, path: str | Path, step: int = 0, limit: int = LIMIT) -> None:
        """step: go on after this one; later lines, which a killed run left behind, are dropped."""
        self.path, self.limit = Path(path), limit
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in _lines(self.path) if 0 < line.get("step", 0) <= step] if step else []
        self._rewrite()

    def write(self, event: str, **fields: Any) -> Line:
        line = {"event": event, "time": round(time.time(), 1), **{k: _finite(v) for k, v in fields.items()}}
        self.lines.append(line)
        data = _encoded(line)
        with contextlib.suppress(OSError):  # a full disk is the checkpoint's to tell: what is lost here are points of a plot
            if self._size + len(data) > self.limit:
                self._thin()
            else:
                with self.path.open("ab") as f:
                    f.write(data)
                self._size += len(data)
        return line

    def _thin(self) -> None:
        for event in ("step", "validation"):
            while sum(map(len, map(_encoded, self.lines))) > self.limit // 2 and sum(line["event"] == event for line in self.lines) > 2:
                past = [i for i, line in enumerate(self.lines) if line["event"] == event][:-1]
                drop = set(past[1::2])
                self.lines = [line for i, line in enumerate(self.lines) if i not in drop]
                if len(past) < 2:
                    break
        self._rewrite()

    def _rewrite(self) -> None:
        data = b"".join(map(_encoded, self.lines))
        part = self.path.with_name(self.path.name + ".part")
        part.write_bytes(data)
        for _ in range(20):  # on Windows a reader may hold the old file for a moment
            with contextlib.suppress(PermissionError):
                os.replace(part, self.path)
                break
            time.sleep(0.05)
        else:
            self.path.write_bytes(data)
            part.unlink(missing_ok=True)
        self._size = len(data)


def _encoded(line: Line) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value
