"""What happens to a label map after the network: components, holes, minimum size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk

from .image import Box


def slabs(shape: Sequence[int], voxels: int = 1 << 19) -> Iterator[slice]:
    """Slices along z of an array (z, y, x), of about so many voxels each and of one plane at least."""
    planes = max(1, voxels // max(1, shape[1] * shape[2]))
    return (slice(z, min(z + planes, shape[0])) for z in range(0, shape[0], planes))


def components(mask: np.ndarray, corners: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Components of a (z, y, x) mask: their map (0 = none) and voxel counts, [0] for the background. Voxels that share a
    face hang together, with `corners` also those that share an edge or a corner."""
    found = sitk.ConnectedComponent(sitk.GetImageFromArray(np.ascontiguousarray(mask, np.uint8)), corners)
    view = sitk.GetArrayViewFromImage(found)  # valid while `found` lives
    n = int(max(plane.max() for plane in view)) + 1
    # Plane by plane and in the smallest type: bincount and 32-bit maps of a 512x512x400 CT took 2 GB.
    labelled = view.astype(np.min_scalar_type(n))
    return labelled, voxel_counts(labelled, n)


def voxel_counts(labelled: np.ndarray, n: int, weights: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Voxels of each value 0 to n - 1 in (z, y, x); with weights (one array for each axis, whose product counts), their
    weighted sum. Plane by plane: np.bincount takes eight bytes a voxel."""
    total = np.zeros(n, np.int64 if weights is None else np.float64)
    plane_weights = None if weights is None else np.outer(weights[1], weights[2]).ravel()
    for z, plane in enumerate(labelled):
        if weights is None:
            total += np.bincount(plane.ravel(), minlength=n)
        else:
            total += np.bincount(plane.ravel(), plane_weights, n) * weights[0][z]
    return total


def clean(labels: np.ndarray, values: Sequence[int], rules: dict[str, Any], spacing: Sequence[float], focus: Box | None = None) -> None:
    """Apply a card's "postprocess" to a label map (z, y, x), in place, label by label.

    rules: "fill_holes" fills enclosed background (of a picture: in its plane); "min_volume_mm3" drops small components;
    "largest_component" keeps one: the largest, or with `focus` (a box around the target) the one at the box's centre,
    or else with most of its volume near it. spacing: (x, y, z) mm.
    """
    if not any(rules.get(k) for k in ("fill_holes", "min_volume_mm3", "largest_component")):
        return
    for value in values:
        box = Box.around(labels == value)
        if box is None:
            continue
        part = labels[box.slices]
        mask = part == value
        if rules.get("min_volume_mm3") or rules.get("largest_component"):
            labelled, counts = components(mask)
            counts[0] = 0
            keep = counts * float(np.prod(spacing)) >= rules.get("min_volume_mm3", 0)
            keep[0] = False
            if rules.get("largest_component") and keep.any():
                score = counts if focus is None else _central_mass(labelled, len(counts), focus.relative_to(box))
                keep &= np.arange(len(counts)) == np.argmax(np.where(keep, score, -1))
            kept = keep[labelled]
            part[mask & ~kept] = 0
            mask = kept
        if rules.get("fill_holes"):
            flat = [a for a, n in enumerate(labels.shape) if n == 1][:1]
            plane = sitk.GetImageFromArray(mask.squeeze(tuple(flat)).astype(np.uint8))
            filled = np.expand_dims(sitk.GetArrayFromImage(sitk.BinaryFillhole(plane)), flat)
            part[(filled > 0) & (part == 0)] = value


def _central_mass(labelled: np.ndarray, n: int, focus: Box) -> np.ndarray:
    """Voxels of each component weighted by a Gaussian at the focus' centre, sigma a quarter of its size along each axis;
    a component at the centre itself comes before all others."""
    weights = [
        np.exp(-0.5 * ((np.arange(size) - (low + high - 1) / 2) / max((high - low) / 4, 0.5)) ** 2)
        for size, low, high in zip(labelled.shape, focus.start, focus.stop)
    ]
    mass = voxel_counts(labelled, n, weights)
    mass[0] = 0
    middle = tuple(slice(max(0, (a + b - 1) // 2), max(0, (a + b) // 2 + 1)) for a, b in zip(focus.start, focus.stop))
    mass[np.unique(labelled[middle])] += mass.sum()
    return mass
