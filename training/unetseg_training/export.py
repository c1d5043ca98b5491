"""From a trained network to a model package, with the parity of ONNX and PyTorch checked on real cases first.

Weights are rounded to float16 before export: the package halves, the Dice of both first models moves by less than
1e-3, and ONNX and PyTorch still run the very same numbers (in float32).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save
from UNetSegmentationLib.engines import make_engine
from UNetSegmentationLib.model import ModelPackage, write_package
from UNetSegmentationLib.networks import UNet

OPSET = 17  # runs in ONNX Runtime from 1.13, so also in 1.23, the last one for Slicer on macOS


def to_onnx(model: UNet, example: torch.Tensor) -> bytes:
    """The network with free batch and spatial sizes. example: [N, C, (D,) H, W]."""
    spatial = ["height", "width"] if example.ndim == 4 else ["depth", "height", "width"]
    axes = {0: "batch", **{i + 2: n for i, n in enumerate(spatial)}}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecation; the newer one fixes pooling sizes
        torch.onnx.export(
            model.eval(),
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


def export(model: UNet, card: dict[str, Any], path: Path, cases: Sequence[np.ndarray], tolerance: float = 1e-4) -> ModelPackage:
    """Write the package, unless ONNX and PyTorch differ by more than `tolerance` on a case (a network input, float32)."""
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    weights = save({k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    package = write_package(path, {**card, "network": model.config.to_json()}, to_onnx(model, torch.from_numpy(cases[0])), weights)
    engines = [make_engine(package, name, "cpu", "fp32", 0) for name in ("onnx", "torch")]
    worst = max(float(np.abs(engines[0].run(c) - engines[1].run(c)).max()) for c in cases)
    if worst > tolerance:
        path.unlink()
        raise SystemExit(f"ONNX and PyTorch differ by {worst:.2g}, more than {tolerance:g}; no package was written.")
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, ONNX and PyTorch differ by {worst:.1g} at most")
    return package
