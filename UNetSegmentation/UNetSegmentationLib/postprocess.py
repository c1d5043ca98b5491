"""What happens to a label map after the network: components, holes, minimum size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk

from .image import Box
from .steps import Steps

_PIECE = 1 << 18  # voxels


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


def largest_steps(mask: np.ndarray, corners: bool = False) -> Steps[tuple[np.ndarray, int]]:
    """Of a (z, y, x) mask, not of no size: the component of most voxels, of several the first in the array, and their number; in
    pieces of some _PIECE voxels each. Where nothing is marked it is empty. corners: as for components()."""
    maps: list[tuple[slice, np.ndarray, int]] = []
    counts, links, n = [], [np.zeros((2, 0), np.int64)], 0
    for z in slabs(mask.shape, max(_PIECE, 4 * math.prod(mask.shape[1:]))):
        # With the last plane of the slab before, which tells by itself what hangs together across the border.
        labelled, sizes = components(mask[max(z.start - 1, 0) : z.stop], corners)
        if maps:
            sizes = sizes - voxel_counts(labelled[:1], len(sizes))
            _, before, first = maps[-1]
            shared = labelled[0] > 0
            pairs = np.stack([before[-1][shared] + np.int64(first), labelled[0][shared] + np.int64(n)])
            links.append(pairs[:, np.diff(pairs, prepend=-1).any(0)])
            labelled = labelled[1:]
        sizes[0] = 0
        maps.append((z, labelled, n))
        counts.append(sizes)
        n += len(sizes)
        yield
    root = _joined(n, np.concatenate(links, 1))
    total = np.zeros(n, np.int64)
    np.add.at(total, root, np.concatenate(counts))
    yield
    best = int(total.argmax())
    out, kept = np.zeros(mask.shape, bool), (root == best) & (total[best] > 0)
    for z, labelled, first in maps:
        out[z] = kept[first:][labelled]
        yield
    return out, int(total[best])


def _joined(n: int, links: np.ndarray) -> np.ndarray:
    """For each of n numbers the least of those that it hangs together with; links: (2, k), the pairs that do."""
    root = np.arange(n)
    while True:
        a, b = root[links]
        if (a == b).all():
            return root
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root != root[root]).any():
            root = root[root]


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
