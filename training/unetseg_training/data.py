"""Cases as arrays on the model's grid, through the same reading, reorienting, resampling and normalising as predict()."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from UNetSegmentationLib.image import Box, Grid, read_image, reorient, sample
from UNetSegmentationLib.intensity import normaliser


def data_folder() -> Path:
    """$UNETSEG_DATA, or shared/data beside the project."""
    folder = Path(os.environ.get("UNETSEG_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not folder.is_dir():
        raise SystemExit(f"The training data are not at {folder}; set UNETSEG_DATA to their folder.")
    return folder


@dataclass(frozen=True)
class Source:
    """Where a case lies. patient groups the cases that must not be split."""

    image: Path
    mask: Path | None
    patient: str


@dataclass
class Case:
    """values (c, z, y, x) float16, normalised; labels (z, y, x) uint8; spacing (x, y, z) mm of this grid."""

    source: Source
    values: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


def load(source: Source, spacing: tuple[float | None, ...], intensity: dict[str, Any], labels: int) -> Case:
    """Read a case onto the grid of `spacing`; each label is resampled linearly on its own and the largest wins."""
    image, _ = reorient(read_image(source.image))
    grid = Grid.over(image, spacing)
    whole = Box.whole(grid.shape)
    values = normaliser(intensity, image.channels)(sample(image.channels, grid, whole))
    if source.mask:
        mask, _ = reorient(read_image(source.mask))
        if mask.shape != image.shape:
            raise SystemExit(f"{source.mask} does not fit {source.image}: {mask.shape} against {image.shape} voxels.")
        one_hot = np.stack([mask.array == k for k in range(labels + 1)])
        target = sample(one_hot.astype(np.float32), grid, whole).argmax(0).astype(np.uint8)
    else:
        target = np.zeros(grid.shape, np.uint8)
    at = tuple(s * k for s, k in zip(image.spacing, grid.scale[::-1]))
    return Case(source, values.astype(np.float16), target, at)  # type: ignore[arg-type]


def lidc_crops() -> list[Source]:
    folder = data_folder() / "lidc_nodules"
    with open(folder / "index.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    return [Source(folder / "images" / r["file"], folder / "masks" / r["file"], r["patient"]) for r in rows]


def lidc_cubes() -> list[Source]:
    folder = data_folder() / "lidc_nodule_cubes"
    return [Source(p, folder / "masks" / p.name, p.name.rsplit("_", 1)[0]) for p in sorted((folder / "images").iterdir())]


def hippocampi() -> list[Source]:
    folder = data_folder() / "msd_hippocampus"
    return [Source(p, folder / "labels" / p.name, p.name.split(".")[0]) for p in sorted((folder / "images").iterdir())]


def fold_of(patients: list[str], folds: int = 5, seed: int = 20261122) -> dict[str, int]:
    """The fold of each patient: a fixed shuffle of the sorted names, dealt out in turn."""
    names = sorted(set(patients))
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[i]: rank % folds for rank, i in enumerate(order)}
