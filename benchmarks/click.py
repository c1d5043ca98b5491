"""How long it takes from a click to the painted segment, against the bounds of 0.25 s (median) and 0.5 s (95 %, both of the clicks
that paint one), of 1.5 s for the first click after loading, and of 50 ms that the panel's event loop may be held up.

    .venv/bin/python benchmarks/click.py

A real chest CT of 512x512x300 voxels: that of UNETSEG_DATA's chest_ct, resampled along the body and padded. Clicks inside its
nodule and just beside it, each with up to two corrections placed in what is wrong, and clicks anywhere else in the body. For each
the parts in ms: "message" (to the worker and back), "crop", "network" and "paste" (ClickSession's, all its runs together), "measure"
(describe()), "other" (in the worker), and "write" (into a real MRML scene, where slicer-core is installed). First through the client
on pipes, then ("panel") through the panel's worker on QProcess with the write in pieces, in an event loop whose gaps are those of
a timer of 5 ms, next to those that it has while nothing is done, which are the machine's own (left out without PySide6).
"first_click": of a new worker that has the volume, with and without the warm-up that the panel makes while the person aims.
The exit code is 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from UNetSegmentationLib.image import Image, read_image, resample
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.model import ModelPackage, find_model
from UNetSegmentationLib.worker.client import WorkerClient
from UNetSegmentationLib.worker.protocol import WorkerAnswer
from worker import Panel, timed  # benchmarks/worker.py

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (300, 512, 512)
PARTS = ("message", "crop", "network", "paste", "measure", "other", "write", "all")
BUDGET_S = 0.01  # of each round of the event loop, as the panel's

Prompts = list[tuple[Any, ...]]
Write = Callable[[WorkerAnswer, int], Iterator[Any]]


def scan(path: Path, mask_path: Path) -> tuple[Image, np.ndarray]:
    """The CT and its nodule on a grid of SHAPE."""
    image, mask = read_image(path), read_image(mask_path)
    spacing = (None, None, image.shape[0] * image.spacing[2] / SHAPE[0])
    image, mask = resample(image, spacing), resample(mask, spacing, "nearest")
    missing = [n - m for n, m in zip(SHAPE, image.shape)]
    if min(missing) < 0 or missing[0]:
        raise SystemExit(f"{path} has {image.shape} voxels (z, y, x); it must fit into {SHAPE}.")
    ends = [(n // 2, n - n // 2) for n in missing]
    array = np.pad(np.clip(image.array, -1024, 3071).astype(np.int16), ends, constant_values=-1024)
    origin = image.index_to_point([-low for low, _ in ends[::-1]])
    return Image(array, image.spacing, origin, image.direction), np.pad(mask.array > 0, ends)


class Person:
    """Clicks as a person makes them: the prompts of one lesion after the other, longer by one each time."""

    def __init__(self, image: Image, truth: np.ndarray, seed: int = 0) -> None:
        self._image, self._truth, self._random = image, truth, np.random.default_rng(seed)
        self._inside = np.argwhere(truth)
        self._low, self._high = self._inside.min(0), self._inside.max(0)

    def point(self, at: np.ndarray, positive: bool) -> tuple[Any, ...]:
        return ("point", *self._image.index_to_point(at[::-1].astype(float)), positive)

    def first(self, kind: str) -> Prompts:
        if kind == "elsewhere":
            body = np.argwhere(self._image.array[::10, ::16, ::16] > -950) * (10, 16, 16)
            return [self.point(self._random.choice(body), True)]
        at = self._random.choice(self._inside)
        if kind == "beside":
            at = np.clip(at + self._random.integers(-3, 4, 3), self._low, self._high)
        return [self.point(at, True)]

    def correction(self, answer: WorkerAnswer) -> tuple[Any, ...]:
        """In what is wrong: of the nodule what is missing, or else what is too much."""
        mask = np.zeros(self._truth.shape, bool)
        mask[answer.box.slices] = answer.mask > 0
        near = tuple(slice(max(0, a - 12), b + 12) for a, b in zip(self._low, self._high))
        missing, surplus = self._truth & ~mask, mask & ~self._truth
        positive = bool(missing.sum() >= surplus[near].sum())
        wrong = np.argwhere(missing if positive else surplus)
        return self.point(self._random.choice(wrong if len(wrong) else self._inside), positive or not len(wrong))


class Scene:
    """The segments in a real MRML scene."""

    def __init__(self, image: Image) -> None:
        sys.path[:0] = [str(ROOT / "Testing" / "mrml")]
        import slicer
        from headless_slicer import Runtime
        from UNetSegmentationLib import mrml

        self.folder = Path(tempfile.mkdtemp(prefix="unetseg-click-"))
        runtime = Runtime(self.folder)
        slicer.mrmlScene, slicer.modules = runtime.scene, runtime.modules
        self._mrml, self._runtime = mrml, runtime
        to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.matrix
        self._volume = slicer.util.addVolumeFromArray(image.array, to_ras, "CT")
        self._node: Any = None
        self._segments: dict[int, str] = {}

    def write(self, answer: WorkerAnswer, lesion: int) -> Iterator[Any]:
        """One segment for each lesion, the last few of them in the scene."""
        node, segment = yield from self._mrml.write_clicked_steps(
            answer.mask, answer.box.start, self._volume, self._node, self._segments.get(lesion)
        )
        self._node, self._segments[lesion] = node, segment
        if len(self._segments) > 8:
            self._mrml.remove_segment(node, self._segments.pop(next(iter(self._segments))))


class ClickPanel(Panel):
    def click(self, image: Image, model: ModelPackage, options: Options, lesion: int, prompts: Prompts, write: Write | None) -> Any:
        """(answer, seconds until it came, until it was painted)."""
        began, ends, loop = time.perf_counter(), [], self.qt.QEventLoop()
        steps: list[Iterator[Any]] = []

        def end(value: Any) -> None:
            ends.extend([value, time.perf_counter() - began])
            if write is not None and isinstance(value, WorkerAnswer) and value.found:
                steps.append(write(value, lesion))
                self.qt.QTimer.singleShot(0, paint)
            else:
                loop.quit()

        def paint() -> None:
            until = time.perf_counter() + BUDGET_S
            for _ in steps[0]:
                if time.perf_counter() > until:
                    self.qt.QTimer.singleShot(0, paint)
                    return
            loop.quit()

        self.worker.click("CT", image, model, options, str(lesion), prompts, end, end)
        self._run("busy", loop)
        if not isinstance(ends[0], WorkerAnswer):
            raise SystemExit(str(ends[0]))
        return ends[0], ends[1], time.perf_counter() - began


def clicks(person: Person, count: int, ask: Callable[[int, Prompts], tuple[WorkerAnswer, float, float]]) -> list[dict[str, Any]]:
    """A row for each click. ask(lesion, prompts): the answer, the seconds until it came and until it was painted."""
    rows: list[dict[str, Any]] = []
    for lesion in range(1, count + 1):
        kind = ("inside", "beside", "inside", "elsewhere")[lesion % 4]
        prompts = person.first(kind)
        for number in range(1 if kind == "elsewhere" else 3):
            answer, came, painted = ask(lesion, prompts)
            part = {name: answer.seconds.get(name, 0.0) for name in ("crop", "network", "paste", "measure")}
            inside = answer.seconds["all"]
            part |= {"message": came - inside, "other": inside - sum(part.values()), "write": painted - came, "all": painted}
            name = kind if number == 0 else "correction"
            rows.append({"kind": name, "found": answer.found, "zoom": answer.zoom, **{k: 1000 * part[k] for k in PARTS}})
            if number < 2 and kind != "elsewhere":
                prompts = [*prompts, person.correction(answer)]
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and 95 % of each part, in ms."""
    values = {name: np.array([row[name] for row in rows]) for name in PARTS}
    return {
        "clicks": len(rows),
        "found": sum(row["found"] for row in rows),
        "zoomed": sum(row["zoom"] > 1 for row in rows),
        **{name: [round(float(np.median(v)), 1), round(float(np.percentile(v, 95)), 1)] for name, v in values.items()},
    }


def first_clicks(image: Image, model: ModelPackage, options: Options, prompts: Prompts) -> dict[str, float]:
    """Seconds, each of a new worker."""
    out = {}
    for warm in (True, False):
        with WorkerClient() as client:
            _, out["start"] = timed(client.start)
            volume, out["send_volume"] = timed(client.load_volume, image)
            if warm:
                _, out["warm_up"] = timed(client.click, volume, model, options)
            _, out["warm" if warm else "cold"] = timed(client.click, volume, model, options, "first", prompts, measures=True)
    return {name: round(value, 3) for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lung-nodule-click", help="a click package's name or file")
    parser.add_argument("--lesions", type=int, default=24, help="how many; a click each, and two corrections of most")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here, with a row for each click")
    arguments = parser.parse_args()
    folder = Path(os.environ.get("UNETSEG_DATA") or ROOT.parent / "shared" / "data") / "chest_ct"
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}; set UNETSEG_DATA.")
    image, truth = scan(folder / "LIDC-IDRI-0001_ct.nii.gz", folder / "LIDC-IDRI-0001_nodule.nii.gz")
    model, options = find_model(arguments.model), Options(engine=arguments.engine, device="cpu", threads=arguments.threads)
    scene = Scene(image) if importlib.util.find_spec("slicer") else None
    report: dict[str, Any] = {
        "model": f"{model.card.name} {model.card.version}",
        "shape": SHAPE,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "written": scene is not None,
        "milliseconds_are": "median, 95 %",
    }
    report["first_click_s"] = first_clicks(image, model, options, Person(image, truth, 1).first("inside"))
    rows: dict[str, list[dict[str, Any]]] = {}
    with WorkerClient() as client:
        volume = client.load_volume(image)
        client.click(volume, model, options)

        def ask(lesion: int, prompts: Prompts) -> tuple[WorkerAnswer, float, float]:
            began = time.perf_counter()
            answer = client.click(volume, model, options, str(lesion), prompts, measures=True)
            came = time.perf_counter() - began
            if scene is not None and answer.found:
                for _ in scene.write(answer, lesion):
                    pass
            report["engine"] = answer.engine
            return answer, came, time.perf_counter() - began

        rows["client"] = clicks(Person(image, truth), arguments.lesions, ask)
    panel = ClickPanel() if importlib.util.find_spec("PySide6") else None
    if panel is not None:
        write = None if scene is None else (lambda answer, lesion: scene.write(answer, 1000 + lesion))
        panel.click(image, model, options, 0, [], None)
        panel.gaps["busy"].clear()  # of sending the volume
        rows["panel"] = clicks(Person(image, truth), arguments.lesions, lambda n, p: panel.click(image, model, options, n, p, write))
        panel.idle(sum(row["all"] for row in rows["panel"]) / 2000)
        panel.worker.shutdown()
        report["event_loop_gap_ms"] = panel.gap_ms()
    for way, found in rows.items():
        kinds = dict.fromkeys(row["kind"] for row in found)
        parts = {"all": found, "painted": [row for row in found if row["found"]]}
        parts |= {kind: [row for row in found if row["kind"] == kind] for kind in kinds}
        report[way] = {name: summary(part) for name, part in parts.items() if part}
    text = json.dumps(report)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**report, "rows": rows}) + "\n", "utf-8")
    sys.stdout.flush()
    median, high = report["panel" if panel is not None else "client"]["painted"]["all"]
    slow = median > 250 or high > 500 or report["first_click_s"]["warm"] > 1.5
    slow = slow or (panel is not None and panel.held_up)
    if scene is not None:
        shutil.rmtree(scene.folder, ignore_errors=True)
    os._exit(slow)  # PySide6 and VTK abort at the interpreter's exit


if __name__ == "__main__":
    main()
