"""What tests share: toy networks that are formulas, or endless; waiting; and Pythons that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from UNetSegmentationLib.files import process_mark
from UNetSegmentationLib.image import Image
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.model import ModelPackage, write_package

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 60.0  # of what happens at once, on a machine that has other things to do
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and shell scripts")
QUICK = Options(engine="onnx", device="cpu", threads=1)


def python(code: str, **how: Any) -> subprocess.Popen[str]:
    """Another process that runs this code, with what the tests import."""
    paths = os.pathsep.join(str(ROOT / p) for p in ("UNetSegmentation", "Testing", "Testing/unit"))
    how = {"env": {**os.environ, "PYTHONPATH": paths}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **how)


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE:g} s in vain for: {what}"
        time.sleep(0.02)


def at_work(pid: int, seconds: float = 1.0) -> Callable[[], bool]:
    """Whether a process that was sent into an endless network has reached it: it has computed for so long since, whatever the machine
    gave the others meanwhile."""

    def used() -> float:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists():
            return time.monotonic()  # of this system's processes nothing is known
        user, system = stat.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    began = used()
    return lambda: used() - began > seconds


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is not alive."""
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return bool(process_mark(pid))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def oblique_image() -> Image:
    """Two bright blocks (1 and 2) and specks, on an oblique left-handed grid."""
    rng = np.random.default_rng(3)
    array = np.zeros((12, 40, 44), np.int16)
    array[3:8, 10:22, 8:30] = 1
    array[5:9, 24:36, 12:20] = 2
    array += rng.integers(0, 2, array.shape, dtype=np.int16) * (rng.random(array.shape) < 0.02)
    angle = 0.2
    direction = (np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, -1)
    return Image(array, (0.7, 0.8, 2.5), (-31.5, 12.25, 100.125), tuple(float(v) for v in direction))


def make_card(**changes: Any) -> dict[str, Any]:
    """A valid card but for "files", which write_package fills in; a change to ... drops the entry."""
    dimensions = changes.get("dimensions", 3)
    card: dict[str, Any] = {
        "format": 1,
        "name": "toy",
        "version": "1.0.0",
        "task": "automatic",
        "dimensions": 3,
        "channels": ["CT"],
        "spacing": [1 if changes.get("task") == "click" else None] * 3,
        "patch": [16] * dimensions,
        "divisor": [4] * dimensions,
        "intensity": {"mode": "none"},
        "labels": [{"value": 1, "name": "thing"}],
        "activation": "softmax",
        "licence": "Apache-2.0",
    }
    return {key: value for key, value in {**card, **changes}.items() if value is not ...}


def make_onnx(kind: str, card: dict[str, Any]) -> bytes:
    """A pointwise network of the card's shape that looks at the middle one of its image channels, x.

    "threshold": softmax gives the label i (1, 2, ...) nearest to x, 0 below 0.5; "identity": sigmoid gives x.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    images = len(card["channels"]) * (2 * card.get("context_slices", 0) + 1)
    inputs = images + (4 if card["task"] == "click" else 0)
    n = len(card["labels"])
    axes = ["D", "H", "W"][3 - card["dimensions"] :]
    constants = {"middle": np.array([images // 2])}
    nodes = [helper.make_node("Gather", ["image", "middle"], ["x"], axis=1)]
    if kind == "threshold":
        # i * x - i * i / 2 is the largest for the i nearest to x.
        classes = np.arange(0 if card["activation"] == "softmax" else 1, n + 1, dtype=np.float32).reshape(1, -1, *[1] * len(axes))
        constants |= {"slope": 50 * classes, "offset": -25 * classes**2}
        nodes += [helper.make_node("Mul", ["x", "slope"], ["s"]), helper.make_node("Add", ["s", "offset"], ["logits"])]
    elif kind == "identity":
        constants |= {"low": np.float32(1e-6), "high": np.float32(1 - 1e-6), "one": np.float32(1)}
        nodes += [
            helper.make_node("Clip", ["x", "low", "high"], ["p"]),
            helper.make_node("Sub", ["one", "p"], ["q"]),
            helper.make_node("Log", ["p"], ["log_p"]),
            helper.make_node("Log", ["q"], ["log_q"]),
            helper.make_node("Sub", ["log_p", "log_q"], ["l"]),
            helper.make_node("Concat", ["l"] * n, ["logits"], axis=1),
        ]
    else:
        raise ValueError(f"no toy network {kind!r}")
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", inputs, *axes])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", n + (card["activation"] == "softmax"), *axes])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnx_package(folder: Path, nodes: list[Any], constants: dict[str, Any], name: str, **card: Any) -> ModelPackage:
    """A package of one channel in 3D whose nodes lead from "image" (a click model's: and four of prompts) to "logits" (two)."""
    from onnx import TensorProto, helper, numpy_helper

    axes = ["N", 5 if card.get("task") == "click" else 1, "D", "H", "W"]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2, "D", "H", "W"])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return write_package(folder / f"{name}-1.0.0.unet.zip", make_card(name=name, **card), model.SerializeToString())


def slow_package(folder: Path, n: int = 1 << 50, **card: Any) -> ModelPackage:
    """A network that goes round a loop n times in each of its calls: for ever, if not told. card: its changes."""
    from onnx import TensorProto, helper

    shape = ["N", 1, "D", "H", "W"]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Sin", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    nodes = [
        helper.make_node("Gather", ["image", "first"], ["one"], axis=1),
        helper.make_node("Loop", ["n", "yes", "one"], ["looped"], body=body),
        helper.make_node("Concat", ["looped", "one"], ["logits"], axis=1),
    ]
    return onnx_package(folder, nodes, {"n": np.int64(n), "yes": np.bool_(True), "first": np.array([0])}, f"slow{n}", **card)


def greedy_package(folder: Path) -> ModelPackage:
    """A network that wants 128 TiB of floats: more than any process can address."""
    from onnx import helper

    nodes = [
        helper.make_node("Expand", ["image", "huge"], ["much"]),
        helper.make_node("ReduceSum", ["much", "first"], ["x"]),
        helper.make_node("Concat", ["x", "x"], ["logits"], axis=1),
    ]
    nodes[1].attribute.append(helper.make_attribute("keepdims", 0))
    return onnx_package(folder, nodes, {"huge": np.array([1 << 33, 1, 1, 1, 1, 1]), "first": np.array([0])}, "huge")


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return str(path)


def stub(folder: Path, name: str, text: str) -> dict[str, str]:
    """The environment of a worker that finds another module first."""
    folder = folder / "stubs"
    folder.mkdir()
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return {**os.environ, "PYTHONPATH": str(folder)}


MISSING_DLL = "raise ImportError('DLL load failed while importing onnxruntime_pybind11_state: The specified module could not be found.')"
NOISE = """
    import os, sys, threading, time
    print('{"event": "no message", "id": 1}')
    print("no line break", end="", flush=True)
    if "UNetSegmentationLib.worker" in sys.orig_argv:
        def noise():
            while "UNetSegmentationLib.worker.server" not in sys.modules:
                time.sleep(0.001)
            while True:
                os.write(1, b'{"event": "done", "id": 2}\\nnoise')
                print("noise")
                time.sleep(0.001)
        threading.Thread(target=noise, daemon=True).start()
"""
