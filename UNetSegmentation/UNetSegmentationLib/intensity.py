"""Window/level presets and the normalisations that a model's card can name.

A card's "intensity" is {"mode": ..., parameters}; statistics are always taken from the whole image, so that a ROI sees
the same values as the whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .files import UserError

_HIGHEST_LOW = -50  # a CT has air or fat in it, which are lower
# Below air and its noise lies what scanners put outside the field of view (-1100, -2000, -3024), in HU or not.
_PADDING_HU = -1100
# Padding of -3024 counts as air before it is interpolated: what it makes of the voxels beside it was taken for the body's outside,
# where a nodule's next slice is padding (8 first clicks: Dice 0.21, with this 0.70, as with padding by air).
LEAST_HU = -1024
# Above every lung parenchyma's floor of about -950 HU lies tissue; a tile with nothing above this holds only air.
AIR_HU = -900


@dataclass(frozen=True)
class WindowPreset:
    """A display and model window: centre (level) and width in HU, or percentiles of the image for MR."""

    name: str
    label: str
    modality: str
    level: float | None = None
    width: float | None = None
    percentiles: tuple[float, float] | None = None

    def intensity(self) -> dict[str, Any]:
        """The same as a card's "intensity" entry."""
        if self.percentiles:
            return {"mode": "percentile", "low": self.percentiles[0], "high": self.percentiles[1]}
        return {"mode": "window", "level": self.level, "width": self.width}


@lru_cache(maxsize=1)
def presets() -> dict[str, WindowPreset]:
    """The presets of resources/window_presets.json by name."""
    data = json.loads((Path(__file__).parent / "resources" / "window_presets.json").read_text("utf-8"))
    out = {}
    for item in data["presets"]:
        item["percentiles"] = tuple(item["percentiles"]) if "percentiles" in item else None
        out[item["name"]] = WindowPreset(**item)
    return out


def parse_window(text: str) -> dict[str, Any]:
    """A preset's name, or "level,width" in HU, as a card's "intensity" entry."""
    if text in presets():
        return presets()[text].intensity()
    try:
        level, width = (float(v) for v in text.split(","))
    except ValueError:
        raise UserError(f"Window {text!r} is neither a preset ({', '.join(presets())}) nor LEVEL,WIDTH in HU.") from None
    if not (abs(level) <= 1e30 and 1e-30 <= width <= 1e30):  # what float32 can still divide by, as in the cards' schema
        raise UserError(f"The window must have a level and a width above 0, of at most 1e30 each, not {text!r}.")
    return {"mode": "window", "level": level, "width": width}


def floor_of(intensity: dict[str, Any]) -> float:
    """What lower values count as before they are interpolated; see image.sample()."""
    return LEAST_HU if expects_hu(intensity) else -np.inf


def expects_hu(intensity: dict[str, Any]) -> bool:
    return intensity["mode"] in ("window", "ct-foreground")


@dataclass(frozen=True)
class Normaliser:
    """value -> (clip(value, low, high) - shift) / scale, a set for each channel."""

    low: np.ndarray
    high: np.ndarray
    shift: np.ndarray
    scale: np.ndarray

    def __call__(self, channels: np.ndarray) -> np.ndarray:
        """(c, z, y, x) in the image's units to float32."""
        shape = (-1, 1, 1, 1)
        out = np.clip(channels, self.low.reshape(shape), self.high.reshape(shape), dtype=np.float32)
        out -= self.shift.reshape(shape)
        out /= self.scale.reshape(shape)
        return out


def normaliser(intensity: dict[str, Any], channels: np.ndarray) -> Normaliser:
    """The normalisation of one image.

    intensity, by "mode":
      "none";
      "window": level, width in HU -> [0, 1] (the CT of the field, clip [-1000, 400], is level -300, width 1400);
      "zscore": mean and standard deviation of the image; with "nonzero": true, of its voxels other than 0; with "robust": true,
      what lies further outside its middle 98 % than these are wide is clipped before;
      "percentile": low, high (percent) of the image -> [0, 1];
      "ct-foreground": low, high (HU), mean, std measured on the training set's foreground (nnU-Net's CT scheme,
      Isensee et al. 2021).
    channels: the whole image (c, z, y, x). Statistics come from at most about a million voxels a channel, evenly spaced.
    """
    mode = intensity["mode"]
    n = len(channels)

    def constant(low: float, high: float, shift: float, scale: float) -> Normaliser:
        return Normaliser(*(np.full(n, v, np.float32) for v in (low, high, shift, scale)))

    if mode == "none":
        return constant(-np.inf, np.inf, 0, 1)
    if mode == "window":
        low = intensity["level"] - intensity["width"] / 2
        return constant(low, low + intensity["width"], low, intensity["width"])
    if mode == "ct-foreground":
        return constant(intensity["low"], intensity["high"], intensity["mean"], intensity["std"])
    rows = []
    for channel in channels:
        values = _thin(channel)
        if mode == "zscore":
            if intensity.get("nonzero") and np.any(values):
                values = values[values != 0]
            low, high = -np.inf, np.inf
            if intensity.get("robust"):
                # Of 8 hippocampi three hot voxels of 50 times the highest value had left Dice 0.32 of 0.88.
                low, high = (float(v) for v in np.percentile(values, [1, 99]))
                low, high = (2 * low - high, 2 * high - low) if high > low else (-np.inf, np.inf)
                values = values.clip(low, high)
            rows.append((low, high, values.mean(dtype=np.float64), values.std(dtype=np.float64)))
        elif mode == "percentile":
            low, high = np.percentile(values, [intensity["low"], intensity["high"]])
            rows.append((low, high, low, high - low))
        else:
            raise UserError(f"The model asks for the unknown intensity mode {mode!r}; a newer version of UNetSegmentation may know it.")
    low_, high_, shift, scale = (np.array(v, np.float32) for v in zip(*rows))
    # A constant channel carries nothing: it becomes 0 instead of a division by zero.
    return Normaliser(low_, high_, shift, np.where(scale <= 1e-12, 1, scale).astype(np.float32))


def _thin(channel: np.ndarray) -> np.ndarray:
    """About a million voxels at even steps along every axis: the statistics of a 100-million-voxel CT in milliseconds."""
    step = max(1, int(np.ceil((channel.size / 1e6) ** (1 / 3))))
    thin = channel[tuple(slice(None, None, step if n > step else 1) for n in channel.shape)]
    # NumPy takes percentiles in the values' own type: of -100 and 100 in int8 the middle is 128, and booleans have no difference.
    return thin if thin.dtype.kind == "f" else thin.astype(np.float64)


def is_air(raw: np.ndarray, intensity: dict[str, Any]) -> bool:
    """Whether a tile (c, ...) in the image's own units holds nothing to segment, so that it need not be computed."""
    if expects_hu(intensity):
        return bool(raw.max() < AIR_HU)
    return intensity["mode"] in ("zscore", "percentile") and not raw.any()


def warnings_for(intensity: dict[str, Any], channels: np.ndarray) -> list[str]:
    """What a person should know before trusting the result."""
    if not expects_hu(intensity):
        return []
    values = _thin(channels)
    seen = values[values > _PADDING_HU]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (float(values.min()), float(values.max()))
    # Padding is one value, or two; of CTs in HU at most 0.02 % is others as low, of those that were shifted or scaled 40 to 77 %.
    below = np.sort(np.unique(values[values <= _PADDING_HU], return_counts=True)[1])
    if shifted := below[:-2].sum() > 0.05 * values.size:
        low = float(values.min())
    if low >= _HIGHEST_LOW or high - low < 300 or shifted:
        return [
            f"The values do not look like HU (they run from {low:g} to {high:g}); this model was trained on CT in HU, "
            "so choose the original CT or rescale it."
        ]
    return []


def has_hu(channels: np.ndarray) -> bool:
    """Whether some values are as low as air's or fat's in HU, and those of MR, or of CT stored from 0 on, are not."""
    values = _thin(channels)
    return bool(((values < _HIGHEST_LOW) & (values > _PADDING_HU)).any())  # also beside NaN


def check_finite(channels: np.ndarray, name: str) -> None:
    """NaN or Inf anywhere is refused: one such voxel would spread over a whole patch."""
    if channels.dtype.kind != "f":
        return
    bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for channel in channels for plane in channel)
    if bad:
        raise UserError(f"{name} has {bad} voxels that are NaN or infinite; replace them (for CT by -1024 HU) and try again.")


def display_range(intensity: dict[str, Any], channels: np.ndarray) -> tuple[float, float]:
    """The lower and upper value to show an image with, from the model's intensity entry."""
    if intensity["mode"] == "window":
        return intensity["level"] - intensity["width"] / 2, intensity["level"] + intensity["width"] / 2
    ends = [intensity["low"], intensity["high"]] if intensity["mode"] == "percentile" else [0.5, 99.5]
    values: Sequence[float] = np.percentile(_thin(channels[0]), ends)
    return float(values[0]), max(float(values[1]), float(values[0]) + 1e-6)
