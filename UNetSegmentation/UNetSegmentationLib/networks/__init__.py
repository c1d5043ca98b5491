"""The U-Nets, in PyTorch. Only engines/torch.py and the training companion import this package."""

from .unet import PRESETS, UNet, UNetConfig, build

__all__ = ["PRESETS", "UNet", "UNetConfig", "build"]
