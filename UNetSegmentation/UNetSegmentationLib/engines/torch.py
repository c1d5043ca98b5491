"""PyTorch, where it is installed: the network is built from the card and filled from safetensors, never unpickled."""

from __future__ import annotations

import numpy as np
import torch

from ..image import UserError
from ..model import ModelPackage
from ..networks import build


def gpu_device() -> str | None:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None


def load_network(package: ModelPackage) -> torch.nn.Module:
    """The package's network in evaluation mode, in float32 on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if package.safetensors is None or "network" not in package.card.data:
        raise UserError(f"{package.path.name} holds no PyTorch weights; use the engine onnx.")
    try:
        model = build(package.card.data["network"])
        model.load_state_dict({k: v.float() for k, v in load(package.safetensors).items()})
    except (ValueError, RuntimeError, TypeError, SafetensorError) as e:
        raise UserError(f"The weights of {package.path.name} do not fit the network of its card ({str(e).splitlines()[0]}).") from e
    return model.eval()


class TorchEngine:
    """precision "auto" is float32 on the CPU and float16 autocast on CUDA."""

    def __init__(self, package: ModelPackage, device: str = "auto", precision: str = "auto", threads: int = 0) -> None:
        gpu = gpu_device() if device != "cpu" else None
        self._device = torch.device(gpu or "cpu")
        if threads:
            torch.set_num_threads(threads)
        if precision == "auto":
            precision = "fp16" if gpu == "cuda" else "fp32"
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        layout = torch.channels_last if package.card.dimensions == 2 else torch.channels_last_3d
        self._model = load_network(package).to(self._device).to(memory_format=layout)  # type: ignore[call-overload]
        note = " (a GPU was asked for, none is usable)" if device == "gpu" and not gpu else ""
        self._text = f"PyTorch {torch.__version__}, {self._device.type}, {precision}{note}"

    def run(self, batch: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(batch, np.float32)).to(self._device)
        try:
            with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
                return self._model(x).float().cpu().numpy()
        except torch.OutOfMemoryError as e:
            raise UserError("The GPU's memory is full; close other programs, choose a smaller ROI, or use the CPU.") from e

    def describe(self) -> str:
        return self._text
