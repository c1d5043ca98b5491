"""The core of UNetSegmentation: from an image to segments, in Slicer and anywhere else.

>>> from UNetSegmentationLib import find_model, predict, read_image
>>> prediction = predict(read_image("ct.nii.gz"), [find_model("lung-nodule-2d")])

Names are imported on first use, so that importing the package costs nothing.
"""

import os
from importlib import import_module
from typing import Any

# ONNX Runtime's official builds, of 1.32 on every system, otherwise report each run to their maker and keep an id of this computer.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_EXPORTS = {
    "UserError": "files",
    "Image": "image",
    "Box": "image",
    "read_image": "image",
    "write_image": "image",
    "ModelPackage": "model",
    "find_model": "model",
    "ClickSession": "inference.click",
    "describe": "nodule",
    "predict": "inference.predict",
    "Options": "inference.predict",
    "Prediction": "inference.predict",
    "Cancelled": "inference.predict",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
