"""ONNX Runtime: the engine that needs nothing but a 20 MB wheel. onnxruntime is imported here and nowhere else."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import onnxruntime as ort

from ..image import UserError
from ..model import ModelPackage
from . import in_pieces

ort.disable_telemetry_events()  # on Windows, whose build does not look for the variable of our __init__

# TensorRT is left out of the automatic choice: it compiles for minutes at the first run of every input shape.
_GPU_PROVIDERS = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", "CoreMLExecutionProvider")


def gpu_providers(dimensions: int) -> list[str]:
    """Those of this build that can run a network of 2 or 3 dimensions. CoreML, which every macOS build has, takes no 3D
    convolution or pooling (ONNX Runtime's list of its operators): what it takes of such a network are dozens of scraps between
    what stays on the CPU."""
    available = ort.get_available_providers()
    return [p for p in _GPU_PROVIDERS if p in available and (dimensions == 2 or p != "CoreMLExecutionProvider")]


class OnnxEngine:
    """device: "cpu", or "gpu"/"auto" for a GPU provider with the CPU behind it. It runs in the network's own precision,
    whatever is asked for. fell_back: a GPU was asked for, and the CPU runs."""

    def __init__(self, package: ModelPackage, device: str = "cpu", precision: str = "auto", threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        wanted = gpu_providers(package.card.dimensions) if device != "cpu" else []
        if "CUDAExecutionProvider" in wanted and hasattr(ort, "preload_dlls"):  # from 1.21 on
            # The CUDA and cuDNN that came with PyTorch or from NVIDIA's wheels, which no search path leads to.
            with redirect_stdout(StringIO()):  # where it prints what it did not find
                ort.preload_dlls()
        try:
            self._session = ort.InferenceSession(package.onnx, options, providers=[*wanted, "CPUExecutionProvider"])
        except Exception as e:  # ORT raises its own types, none of them public
            cure = "use the CPU, or update onnxruntime" if wanted else "update onnxruntime"
            cure = "close other programs" if "bad_alloc" in str(e) else cure
            raise UserError(f"ONNX Runtime {ort.__version__} cannot load {package.path.name} ({_first_line(e)}); {cure}.") from e
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        rank = package.card.dimensions + 2
        if len(inputs) != 1 or len(outputs) < 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != rank:
            raise UserError(f"{package.path.name} does not take one float32 tensor of {rank} axes, as its card says; export it again.")
        channels = inputs[0].shape[1]
        if isinstance(channels, int) and channels != package.card.inputs:
            raise UserError(f"{package.path.name} takes {channels} channels but its card says {package.card.inputs}; export it again.")
        self._batch = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
        self._input, self._output = inputs[0].name, outputs[0].name
        self._asked = precision if precision in ("fp16", "bf16") else ""
        self._provider = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        self.fell_back = device == "gpu" and self._provider == "CPU"

    def run(self, batch: np.ndarray) -> np.ndarray:
        try:
            return in_pieces(self._run, np.ascontiguousarray(batch, np.float32), self._batch)
        except Exception as e:
            cure = "another engine" if self._provider == "CPU" else "the CPU"
            raise UserError(f"ONNX Runtime failed while it ran the network ({_first_line(e)}); try a smaller ROI or {cure}.") from e

    def _run(self, batch: np.ndarray) -> np.ndarray:
        return self._session.run([self._output], {self._input: batch})[0]

    def describe(self) -> str:
        text = f"ONNX Runtime {ort.__version__}, {self._provider}"
        text += f" (fp32, {self._asked} was asked for)" if self._asked else ""
        return text + (" (a GPU was asked for, none is usable)" if self.fell_back else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
