"""One parameterised U-Net for 2D and 3D.

Sources: Ronneberger et al., "U-Net", MICCAI 2015 (arXiv:1505.04597); Çiçek et al., "3D U-Net", MICCAI 2016
(arXiv:1606.06650); Isensee et al., "nnU-Net", Nature Methods 2021 (instance norm, leaky ReLU, anisotropic strides,
deep supervision); He et al., "Identity mappings", ECCV 2016 (residual blocks).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """What a model card stores under "network", so that the weights can be loaded without any code.

    channels: feature maps of each level, finest first; len(channels) - 1 down-samplings.
    strides: one tuple per down-sampling, in array order ((z,) y, x); 1 keeps an axis (thick slices). Default 2 everywhere.
    kernels: one tuple per level, in array order. Default 3 everywhere.
    norm: "none" | "batch" | "instance"; activation: "relu" | "leaky_relu".
    down: "maxpool" (the paper's) or "conv" (strided convolution).
    padding: "same", or "valid" as in the paper (the output is smaller than the input: 572 -> 388 for ronneberger2015).
    """

    dimensions: int = 2
    in_channels: int = 1
    out_channels: int = 2
    channels: tuple[int, ...] = (32, 64, 128, 256)
    strides: tuple[tuple[int, ...], ...] = ()
    kernels: tuple[tuple[int, ...], ...] = ()
    norm: str = "instance"
    activation: str = "leaky_relu"
    residual: bool = False
    down: str = "maxpool"
    padding: str = "same"
    deep_supervision: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.dimensions not in (2, 3):
            raise ValueError(f"dimensions must be 2 or 3, not {self.dimensions}")
        n = len(self.channels)
        set_ = object.__setattr__
        set_(self, "channels", tuple(self.channels))
        set_(self, "strides", tuple(tuple(s) for s in self.strides) or ((2,) * self.dimensions,) * (n - 1))
        set_(self, "kernels", tuple(tuple(k) for k in self.kernels) or ((3,) * self.dimensions,) * n)
        if len(self.strides) != n - 1 or len(self.kernels) != n:
            raise ValueError(f"{n} levels need {n - 1} strides and {n} kernels, not {len(self.strides)} and {len(self.kernels)}")
        if any(len(t) != self.dimensions for t in self.strides + self.kernels):
            raise ValueError(f"strides and kernels must have {self.dimensions} numbers each")
        for name, allowed in (
            ("norm", ("none", "batch", "instance")),
            ("activation", ("relu", "leaky_relu")),
            ("down", ("maxpool", "conv")),
            ("padding", ("same", "valid")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.padding == "valid" and self.residual:
            raise ValueError("residual blocks need padding 'same'")

    @property
    def divisor(self) -> tuple[int, ...]:
        """The input's size must be a multiple of this along each axis, in array order."""
        return tuple(map(math.prod, zip((1,) * self.dimensions, *self.strides)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> UNetConfig:
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown network settings: {', '.join(sorted(unknown))}")
        return cls(**data)


PRESETS = {
    "ronneberger2015": UNetConfig(
        dimensions=2, in_channels=1, out_channels=2, channels=(64, 128, 256, 512, 1024), norm="none", activation="relu"
    ),
}


def build(preset_or_config: str | UNetConfig | dict[str, Any], **changes: Any) -> UNet:
    """A U-Net from a preset's name, a config, or a card's "network" entry; `changes` override single settings."""
    if isinstance(preset_or_config, str):
        config = PRESETS[preset_or_config]
    elif isinstance(preset_or_config, dict):
        config = UNetConfig.from_json(preset_or_config)
    else:
        config = preset_or_config
    return UNet(replace(config, **changes))


def _conv(config: UNetConfig, n_in: int, n_out: int, kernel: Any, stride: Any = 1) -> nn.Module:
    padding: Any = tuple(k // 2 for k in kernel) if config.padding == "same" else 0
    layer = nn.Conv2d if config.dimensions == 2 else nn.Conv3d
    # A bias before a norm layer has no effect; without a norm it is needed.
    return layer(n_in, n_out, kernel, stride, padding, bias=config.norm == "none")


def _norm_act(config: UNetConfig, n: int, act: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if config.norm == "batch":
        layers.append((nn.BatchNorm2d if config.dimensions == 2 else nn.BatchNorm3d)(n))
    elif config.norm == "instance":
        layers.append((nn.InstanceNorm2d if config.dimensions == 2 else nn.InstanceNorm3d)(n, affine=True))
    if act:
        layers.append(nn.ReLU() if config.activation == "relu" else nn.LeakyReLU(0.01))
    return layers


class _Block(nn.Module):
    """Two convolutions, each with its norm and activation; with `residual`, the input is added before the last one."""

    def __init__(self, config: UNetConfig, n_in: int, n_out: int, kernel: Any, stride: Any = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(config, n_in, n_out, kernel, stride), *_norm_act(config, n_out))
        self.second = nn.Sequential(_conv(config, n_out, n_out, kernel), *_norm_act(config, n_out, act=not config.residual))
        self.shortcut: nn.Module | None = None
        if config.residual:
            changes = n_in != n_out or stride not in (1, (1,) * config.dimensions)
            layer = nn.Conv2d if config.dimensions == 2 else nn.Conv3d
            self.shortcut = layer(n_in, n_out, 1, stride, bias=False) if changes else nn.Identity()
            self.act = nn.ReLU() if config.activation == "relu" else nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y if self.shortcut is None else self.act(y + self.shortcut(x))


def _crop_like(skip: Tensor, x: Tensor) -> Tensor:
    """The centre of `skip` at x's size: the paper's "copy and crop", needed with padding "valid" only."""
    for axis in range(2, x.ndim):
        extra = skip.shape[axis] - x.shape[axis]
        skip = skip.narrow(axis, extra // 2, x.shape[axis])
    return skip


class _Again:
    """While a checkpointed block is computed again for its gradients, once or more: its batch norms have averaged this batch in already."""

    def __init__(self, block: nn.Module) -> None:
        self.momenta = {m: m.momentum for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    def __enter__(self) -> None:
        for norm in self.momenta:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, momentum in self.momenta.items():
            norm.momentum = momentum


class UNet(nn.Module):
    """U-Net. Input [N, C, (D,) H, W], logits [N, K, (D,) H, W].

    In training mode with deep supervision, forward returns a list of logits, finest first, each at its level's size.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        three = config.dimensions == 3
        pool: Any = nn.MaxPool3d if three else nn.MaxPool2d
        up: Any = nn.ConvTranspose3d if three else nn.ConvTranspose2d
        head: Any = nn.Conv3d if three else nn.Conv2d
        c, k, s = config.channels, config.kernels, config.strides
        self.encoder, self.pools = nn.ModuleList(), nn.ModuleList()
        for level, n in enumerate(c):
            strided = level > 0 and config.down == "conv"
            if level > 0:
                self.pools.append(nn.Identity() if strided else pool(s[level - 1]))
            n_in = c[level - 1] if level else config.in_channels
            self.encoder.append(_Block(config, n_in, n, k[level], s[level - 1] if strided else 1))
        levels = range(len(c) - 2, -1, -1)
        self.ups = nn.ModuleList(up(c[i + 1], c[i], s[i], s[i]) for i in levels)
        self.decoder = nn.ModuleList(_Block(config, 2 * c[i], c[i], k[i]) for i in levels)
        heads = levels if config.deep_supervision else [0]
        self.heads = nn.ModuleDict({str(i): head(c[i], config.out_channels, 1) for i in heads})

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.config.checkpointing and self.training and x.requires_grad:
            return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _Again(block)))  # type: ignore[return-value]
        return block(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            if level:
                skips.append(x)
                x = self.pools[level - 1](x)
            x = self._run(block, x)
        outputs: list[Tensor] = []
        for step, (up, block) in enumerate(zip(self.ups, self.decoder)):
            level = len(skips) - 1 - step
            x = up(x)
            skip = skips[level] if self.config.padding == "same" else _crop_like(skips[level], x)
            x = self._run(block, torch.cat([skip, x], 1))
            if str(level) in self.heads and (level == 0 or self.training):
                outputs.insert(0, self.heads[str(level)](x))
        return outputs if self.config.deep_supervision and self.training else outputs[0]


def deep_supervision_targets(target: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """Integer label maps [N, (D,) H, W] at the size of each output, by nearest neighbour."""
    wide = target[:, None].float()
    return [functional.interpolate(wide, size=o.shape[2:], mode="nearest")[:, 0].long() for o in outputs]
