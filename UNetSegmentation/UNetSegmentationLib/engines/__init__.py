"""What runs a network: ONNX Runtime, OpenVINO or PyTorch behind one Protocol."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np

from ..files import OUT_OF_MEMORY, UserError
from ..model import ModelPackage

ENGINES = ("onnx", "openvino", "torch")
DEVICES = ("auto", "cpu", "gpu")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


class Engine(Protocol):
    """A network ready to run."""

    def run(self, batch: np.ndarray) -> np.ndarray:
        """float32 [N, C, (D,) H, W] to float32 logits [N, K, (D,) H, W]."""
        ...

    def describe(self) -> str:
        """What really runs, and what was asked for if that is something else."""
        ...


def in_pieces(run: Callable[[np.ndarray], np.ndarray], batch: np.ndarray, size: int | None) -> np.ndarray:
    """Run a batch of any length where the network was exported for `size` inputs at once, as PyTorch's exporter does unless
    it is told otherwise (None: for any number); a last piece that is too short is filled up with zeros."""
    if size in (None, len(batch)):
        return run(batch)
    out = []
    for i in range(0, len(batch), size):
        piece = batch[i : i + size]
        filled = np.concatenate([piece, np.zeros((size - len(piece), *batch.shape[1:]), batch.dtype)])
        out.append(run(filled)[: len(piece)])
    return np.concatenate(out)


_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}


def installed(engine: str) -> bool:
    """Whether the engine's library is there, without importing it; the folder that a removal left behind has no file to load."""
    try:
        spec = importlib.util.find_spec(_PACKAGES[engine])
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def make_engine(package: ModelPackage, engine: str, device: str, precision: str, threads: int) -> Engine:
    """One engine by name; UserError when it is not installed or cannot run the model."""
    name = _PACKAGES[engine]
    if not installed(engine):
        raise UserError(f"The engine {engine} needs the Python package {name}, which is not installed; install it or use another engine.")
    try:
        if engine == "onnx":
            from .onnx import OnnxEngine

            return OnnxEngine(package, device, precision, threads)
        if engine == "openvino":
            from .openvino import OpenVINOEngine

            return OpenVINOEngine(package, device, precision, threads)
        from .torch import TorchEngine

        return TorchEngine(package, device, precision, threads)
    except (ImportError, OSError) as e:  # a library that it needs is missing, which PyTorch on Windows tells by an OSError
        more = ", and on Windows the Microsoft Visual C++ Redistributable" if os.name == "nt" else ""
        reason = (str(e).splitlines() or [""])[0][:200]
        if OUT_OF_MEMORY.search(str(e)):
            raise UserError(f"The package {name} cannot be loaded ({reason}); close other programs and try again.") from e
        raise UserError(f"The package {name} cannot be loaded ({reason}); install it again{more}.") from e


def choose_engine(package: ModelPackage, engine: str = "auto", device: str = "auto", precision: str = "auto", threads: int = 0) -> Engine:
    """The engine asked for, or with "auto" the first that works here: ONNX Runtime with a GPU provider, then PyTorch
    with a GPU, OpenVINO on the CPU where installed, ONNX Runtime on the CPU, PyTorch on the CPU.

    threads: 0 leaves it to the engine (all cores), as do more than there are. Raises UserError when nothing can run the model.
    """
    if not threads >= 0:
        raise UserError(f"The threads must be 0 (all cores) or more, not {threads}.")
    # With a thousand on two cores ONNX Runtime did not end in two minutes, with 100000 PyTorch's process died.
    threads = int(threads) if threads <= (os.cpu_count() or 1) else 0
    for value, allowed, name in ((engine, ("auto", *ENGINES), "engine"), (device, DEVICES, "device"), (precision, PRECISIONS, "precision")):
        if value not in allowed:
            raise UserError(f"There is no {name} {value!r}; choose one of {', '.join(allowed)}.")
    if engine != "auto":
        return make_engine(package, engine, device, precision, threads)
    tries: list[tuple[str, str]] = []
    if device != "cpu":
        tries += [(name, "gpu") for name in ("onnx", "torch") if installed(name) and _has_gpu(name, package)]
    tries += [(name, "cpu") for name in ("openvino", "onnx", "torch") if installed(name)]
    if not tries:
        raise UserError("Nothing here can run a network; install onnxruntime (in Slicer: press Apply once; else: pip install onnxruntime).")
    notes: list[str] = []
    failed: dict[str, str] = {}
    if device == "gpu" and tries[0][1] == "cpu":
        notes.append("no usable GPU was found")
    for name, where in tries:
        try:
            made = make_engine(package, name, where, precision, threads)
        except UserError as e:
            failed[name] = str(e)
            notes.append(str(e))
            continue
        if where == "gpu" and getattr(made, "fell_back", False):  # its libraries (CUDA, cuDNN) are missing, say
            notes.append("ONNX Runtime's GPU provider cannot be used; see which CUDA and cuDNN, or which driver, its version needs")
            continue
        return _Noted(made, notes) if notes else made  # type: ignore[return-value]
    # Every package has an ONNX network: why that does not load says more than that there are no weights for PyTorch.
    raise UserError(failed.get("onnx") or notes[-1])


def _has_gpu(engine: str, package: ModelPackage) -> bool:
    with suppress(ImportError, OSError):  # make_engine() says it
        if engine == "onnx":
            from .onnx import gpu_providers

            return bool(gpu_providers(package.card.dimensions))
        if _torch_knows_no_gpu():
            return False
        from .torch import gpu_device

        return gpu_device() is not None
    return False


def _torch_knows_no_gpu() -> bool:
    """Whether PyTorch's version names a build for the CPU alone; to import it for that answer takes 2.5 s in every new process."""
    with suppress(PackageNotFoundError):
        return version("torch").endswith("+cpu")
    return False


class _Noted:
    """An engine that was not the first choice, and says so."""

    def __init__(self, engine: Engine, notes: list[str]) -> None:
        self._engine, self._notes = engine, notes
        self.run = engine.run

    def describe(self) -> str:
        return f"{self._engine.describe()} ({'; '.join(self._notes)})"
