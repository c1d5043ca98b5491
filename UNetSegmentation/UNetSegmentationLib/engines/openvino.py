"""OpenVINO: often the fastest on Intel CPUs. Used where it is installed."""

from __future__ import annotations

import sys

import numpy as np

from ..image import UserError
from ..model import ModelPackage
from . import in_pieces


class OpenVINOEngine:
    """device: "cpu", or "gpu" for an Intel GPU; precision "fp32" or "auto" keeps float32 arithmetic."""

    def __init__(self, package: ModelPackage, device: str = "cpu", precision: str = "auto", threads: int = 0) -> None:
        # Without this package, which pip brings along, OpenVINO reports nothing to its maker and keeps no id of this computer.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        # float32 unless asked otherwise: on CPUs with bf16 the default would differ from ONNX Runtime by 1e-2.
        kind = {"bf16": "bf16", "fp16": "f16"}.get(precision, "f32")
        settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": kind}
        try:
            core = openvino.Core()
            # Where there are several, they are GPU.0, GPU.1, ..., and "GPU" is the first.
            target = "GPU" if device == "gpu" and any(d.split(".")[0] == "GPU" for d in core.available_devices) else "CPU"
            if threads and target == "CPU":
                settings["INFERENCE_NUM_THREADS"] = threads
            self._model = core.compile_model(core.read_model(package.onnx), target, settings)
        except (RuntimeError, AttributeError) as e:  # a damaged installation has no plugins, or no Core
            raise UserError(f"OpenVINO cannot load {package.path.name} ({_reason(e)}); use another engine.") from e
        axis = self._model.input(0).partial_shape[0]
        self._batch = axis.get_length() if axis.is_static else None
        note = " (a GPU was asked for, none is usable)" if device == "gpu" and target == "CPU" else ""
        used = self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name()  # not every CPU has what was asked for
        if used != kind:
            used += f" ({kind} was asked for)"
        self._text = f"OpenVINO {openvino.__version__.split('-')[0]}, {target}, {used}{note}"

    def run(self, batch: np.ndarray) -> np.ndarray:
        try:
            return in_pieces(self._run, np.ascontiguousarray(batch, np.float32), self._batch)
        except RuntimeError as e:
            raise UserError(f"OpenVINO failed while it ran the network ({_reason(e)}); try a smaller ROI or another engine.") from e

    def _run(self, batch: np.ndarray) -> np.ndarray:
        out = np.array(self._model(batch)[0], np.float32)
        if not out.size:  # without an exception, and the next batch that fits is run again
            raise UserError("The memory is full; close other programs and try again (a smaller ROI needs less).")
        return out

    def describe(self) -> str:
        return self._text


def _reason(error: Exception) -> str:
    """What comes below the lines that name places in OpenVINO's source."""
    lines = str(error).splitlines()
    return next((line for line in lines if line and not line.startswith(("Exception from", "Check "))), type(error).__name__)[:200]
