"""What the worker costs over calling predict() directly, against the bound of 5 % or 50 ms on a whole volume, and how long
it holds up the panel's event loop, against the bound of 50 ms.

    .venv/bin/python benchmarks/worker.py

A 128x256x256 int16 volume and a small convolutional network of random weights (or --model), with the uncertainty, whose
map is the largest thing that travels. Directly, through the client on pipes ("client") and through the panel's on QProcess
("panel", with PySide6 in the place of Slicer's Qt; left out without it) alternate, and the medians are compared. The gaps
are those of a timer of 5 ms, next to those that it has while nothing is done, which are the machine's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from UNetSegmentationLib.engines import choose_engine
from UNetSegmentationLib.image import Image
from UNetSegmentationLib.inference.predict import Options, Prediction, predict
from UNetSegmentationLib.measure import uncertain_places
from UNetSegmentationLib.model import ModelPackage, find_model
from UNetSegmentationLib.worker.client import WorkerClient
from UNetSegmentationLib.worker.protocol import WorkerPrediction

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (128, 256, 256)
T = TypeVar("T")


def small_network(folder: Path) -> ModelPackage:
    sys.path.insert(0, str(ROOT / "Testing"))
    from onnx import helper
    from workers import onnx_package

    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(0, 0.2, (8, 1, 3, 3, 3)), "b": rng.normal(0, 0.5, (2, 8, 1, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["x"], pads=[1] * 6),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "b"], ["logits"]),
    ]
    constants = {name: values.astype(np.float32) for name, values in weights.items()}
    return onnx_package(folder, nodes, constants, "small", patch=[64] * 3, intensity={"mode": "zscore"})


def timed(act: Callable[..., T], *arguments: Any, **how: Any) -> tuple[T, float]:
    """What it returns, and the seconds that it took."""
    began = time.perf_counter()
    return act(*arguments, **how), time.perf_counter() - began


class Panel:
    """The panel's worker, and the gaps between the beats of a timer while its event loop runs."""

    def __init__(self) -> None:
        sys.path[:0] = [str(ROOT / "Testing" / "panel" / "standins"), str(ROOT / "UNetSegmentation")]
        import pythonqt  # noqa: F401  # makes the module qt
        import qt

        self.qt, self.application = qt, qt.QApplication.instance() or qt.QApplication([])
        from UNetSegmentationPanel.worker import PanelWorker

        self.worker = PanelWorker(sys.executable)
        self.gaps: dict[str, list[float]] = {"idle": [], "busy": []}

    def predict(self, image: Image, models: list[ModelPackage], options: Options) -> WorkerPrediction:
        ends: list[Any] = []

        def end(value: Any = None) -> None:
            ends.append(value)
            loop.quit()

        loop = self.qt.QEventLoop()
        self.worker.predict(1, image, models, options, False, lambda fraction, text: None, end, end, end)
        self._run("busy", loop)
        if not isinstance(ends[0], WorkerPrediction):
            raise SystemExit(str(ends[0]))
        return ends[0]

    def idle(self, seconds: float) -> None:
        loop = self.qt.QEventLoop()
        self.qt.QTimer.singleShot(round(1000 * seconds), loop.quit)
        self._run("idle", loop)

    def _run(self, what: str, loop: Any) -> None:
        beats = [time.perf_counter()]
        timer = self.qt.QTimer()
        timer.setInterval(5)
        timer.connect("timeout()", lambda: beats.append(time.perf_counter()))
        timer.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # PythonQt's name of exec() is PySide6's old one
            loop.exec_()
        timer.stop()
        self.gaps[what] += [1000 * (b - a) for a, b in zip(beats, [*beats[1:], time.perf_counter()])]

    def gap_ms(self) -> dict[str, dict[str, float]]:
        return {what: {"median": round(statistics.median(v), 1), "max": round(max(v), 1)} for what, v in self.gaps.items()}

    @property
    def held_up(self) -> bool:
        """For longer than the bound, where the machine itself does not."""
        return max(self.gaps["busy"]) > 50 > max(self.gaps["idle"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a package's name or file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    image = Image(rng.normal(0, 200, SHAPE).astype(np.int16), (0.8, 0.8, 1.5))
    options = Options(threads=arguments.threads, overlap=arguments.overlap, uncertainty=True, tta="none", device="cpu", engine="onnx")
    panel = Panel() if importlib.util.find_spec("PySide6") else None
    with tempfile.TemporaryDirectory() as folder, WorkerClient() as client:
        model = find_model(arguments.model) if arguments.model else small_network(Path(folder))
        _, start = timed(client.start)
        volume, load = timed(client.load_volume, image)
        engines = [choose_engine(model, options.engine, options.device, options.precision, options.threads)]

        def direct() -> Prediction:
            prediction = predict(image, [model], options, engines=engines)
            uncertain_places(prediction.uncertainty)  # type: ignore[arg-type]  # the worker does it too
            return prediction

        ways: dict[str, Callable[[], Prediction]] = {"direct": direct, "client": lambda: client.predict(volume, [model], options)}
        if panel is not None:
            ways["panel"] = lambda: panel.predict(image, [model], options)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        results = [way().labels.array for way in ways.values()]  # makes the engines, sends the volume
        same = all(np.array_equal(results[0], other) for other in results[1:])
        for _ in range(arguments.runs):
            for name, way in ways.items():
                seconds[name].append(timed(way)[1])
            if panel is not None:
                panel.idle(seconds["panel"][-1])
        if panel is not None:
            panel.worker.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    over = {name: medians[name] - medians["direct"] for name in medians if name != "direct"}
    report: dict[str, Any] = {
        "model": model.card.name,
        "shape": SHAPE,
        "seconds": {name: round(v, 3) for name, v in medians.items()},
        "overhead_ms": {name: round(1000 * v, 1) for name, v in over.items()},
        "overhead_percent": {name: round(100 * v / medians["direct"], 2) for name, v in over.items()},
        "runs_s": {name: [round(v, 3) for v in values] for name, values in seconds.items()},
        "start_s": round(start, 3),
        "load_volume_s": round(load, 3),
        "same_labels": same,
    }
    if panel is not None:
        report["event_loop_gap_ms"] = panel.gap_ms()
        report["largest_gap_busy_over_idle"] = round(max(panel.gaps["busy"]) / max(panel.gaps["idle"]), 2)
    print(json.dumps(report))
    sys.stdout.flush()
    slow = any(v > 0.05 * medians["direct"] and v > 0.05 for v in over.values())
    os._exit(not same or slow or (panel is not None and panel.held_up))


if __name__ == "__main__":
    main()
