"""PyTorch, where it is installed: the network is built from the card and filled from safetensors, never unpickled."""

from __future__ import annotations

import numpy as np
import torch

from ..files import OUT_OF_MEMORY, UserError
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
        with torch.device("meta"):  # has shapes only: a card may claim a network that no memory holds
            model = build(package.card.data["network"])
        kinds = {k: v.dtype for k, v in model.state_dict().items()}  # copied: load() gives views of bytes
        state = {k: v.to(kinds.get(k, v.dtype), copy=True) for k, v in load(package.safetensors).items()}
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError, TypeError, OverflowError, SafetensorError) as e:
        raise UserError(f"The weights of {package.path.name} do not fit the network of its card ({str(e).splitlines()[0]}).") from e
    return model.eval()


def same_values(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a device computed what the CPU did, but for rounding; values that are not numbers are others."""
    # On MPS, PyTorch before 2.9 lacks 3D layers, and its 3D convolution gave wrong values without a word (its issues
    # 141471 and 197114). Half precision changes the logits of the bundled models by 0.009 of their mean at most.
    return bool(np.abs(found - expected).mean() <= 0.1 * np.abs(expected).mean())


class TorchEngine:
    """precision "auto" is float32 on the CPU and float16 autocast on CUDA. Raises UserError where a GPU cannot run the
    network, or gives other values than the CPU."""

    def __init__(self, package: ModelPackage, device: str = "auto", precision: str = "auto", threads: int = 0) -> None:
        gpu = gpu_device() if device != "cpu" else None
        self._device = torch.device(gpu or "cpu")
        if threads:
            torch.set_num_threads(threads)
        if precision == "auto":
            precision = "fp16" if gpu == "cuda" else "fp32"
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        layout = torch.channels_last if package.card.dimensions == 2 else torch.channels_last_3d
        model = load_network(package)
        note = " (a GPU was asked for, none is usable)" if device == "gpu" and not gpu else ""
        self._text = f"PyTorch {torch.__version__}, {self._device.type}, {precision}{note}"
        # The smallest input with more than one voxel at the deepest level, where the instance norm needs them.
        shape = (min(p, 2 * d) for p, d in zip(package.card.data["patch"], package.card.data["divisor"]))
        probe = np.random.default_rng(0).random((1, package.card.inputs, *shape), np.float32)
        try:
            with torch.inference_mode():
                expected = model(torch.from_numpy(probe)).numpy() if gpu else None
            self._model = model.to(self._device).to(memory_format=layout)  # type: ignore[call-overload]
        except (RuntimeError, ValueError) as e:
            raise self._failure(e) from e
        if expected is not None and not same_values(self.run(probe), expected):
            raise UserError(f"PyTorch {torch.__version__} gives wrong values on this computer's {self._device.type}; use the CPU.")

    def run(self, batch: np.ndarray) -> np.ndarray:
        try:
            x = torch.from_numpy(np.ascontiguousarray(batch, np.float32)).to(self._device)
            with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
                return self._model(x).float().cpu().numpy()
        except (RuntimeError, ValueError) as e:
            raise self._failure(e) from e

    def _failure(self, error: Exception) -> UserError:
        if not OUT_OF_MEMORY.search(str(error)):
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            return UserError(f"PyTorch failed while it ran the network on {self._device.type} ({reason}); use another device or engine.")
        if self._device.type == "cpu":
            return UserError("The memory is full; close other programs and try again (a smaller ROI needs less).")
        return UserError("The GPU's memory is full; close other programs, or use the CPU (a smaller ROI needs less).")

    def describe(self) -> str:
        return self._text
