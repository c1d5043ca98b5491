"""From a trained network to a model package, with the parity of ONNX and PyTorch checked on real cases first.

Weights are rounded to float16 before export: the package halves, the Dice of both first models moves by less than
1e-3, and ONNX and PyTorch still run the very same numbers (in float32).
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save
from torch import nn
from UNetSegmentationLib.engines import Engine, make_engine
from UNetSegmentationLib.model import ModelPackage, write_package
from UNetSegmentationLib.networks import UNet

OPSET = 17  # runs in ONNX Runtime from 1.13, so also in 1.23, the last one for Slicer on macOS


class _StableInstanceNorm(nn.Module):
    """Instance norm whose means are taken axis by axis. ONNX Runtime sums a channel's 147,000 voxels one after the other
    in float32: hippocampus-3d's logits were off by 8e-4; summed by axes they are off by 5e-6, in the same time."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.bias: Any = norm.bias
        self.eps: Any = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        x = x - _mean(x)
        return x * (self.weight.view(shape) / torch.sqrt(_mean(x * x) + self.eps)) + self.bias.view(shape)


def _mean(x: torch.Tensor) -> torch.Tensor:
    for axis in range(x.ndim - 1, 1, -1):
        x = x.mean(axis, keepdim=True)
    return x


def _with_stable_norms(model: UNet) -> UNet:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
                setattr(parent, name, _StableInstanceNorm(child))
    return model


def to_onnx(model: UNet, example: torch.Tensor) -> bytes:
    """The network with free batch and spatial sizes. example: [N, C, (D,) H, W]."""
    spatial = ["height", "width"] if example.ndim == 4 else ["depth", "height", "width"]
    axes = {0: "batch", **{i + 2: n for i, n in enumerate(spatial)}}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecation; the newer one fixes pooling sizes
        torch.onnx.export(
            _with_stable_norms(model).eval(),
            (example,),
            buffer,  # type: ignore[arg-type]
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": axes, "logits": axes},
            opset_version=OPSET,
            # Batch norms stay apart (ONNX Runtime fuses them when it loads): fused weights are no longer float16 numbers,
            # which compress to half.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
    data = buffer.getvalue()
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return data


class _Compared:
    """Runs the first engine, and keeps the largest difference to the second."""

    def __init__(self, first: Engine, second: Engine) -> None:
        self.first, self.second, self.worst = first, second, 0.0

    def run(self, batch: np.ndarray) -> np.ndarray:
        logits = self.first.run(batch)
        self.worst = max(self.worst, float(np.abs(logits - self.second.run(batch)).max()))
        return logits

    def describe(self) -> str:
        return f"{self.first.describe()} against {self.second.describe()}"


def export(
    model: UNet, card: dict[str, Any], path: Path, drive: Callable[[ModelPackage, Engine], object], tolerance: float = 1e-4
) -> ModelPackage:
    """Write the package, unless ONNX and PyTorch differ by more than `tolerance` in a logit while drive(package, engine)
    runs it on real cases through the deployed path."""
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    weights = save({k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    config = model.config
    example = torch.zeros(1, config.in_channels, *(2 * d for d in config.divisor))
    package = write_package(path, {**card, "network": config.to_json()}, to_onnx(model, example), weights)
    pair = _Compared(make_engine(package, "onnx", "cpu", "fp32", 0), make_engine(package, "torch", "cpu", "fp32", 0))
    drive(package, pair)
    if pair.worst > tolerance:
        path.unlink()
        raise SystemExit(f"ONNX and PyTorch differ by {pair.worst:.2g}, more than {tolerance:g}; no package was written.")
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, ONNX and PyTorch differ by {pair.worst:.1g} at most")
    return package
