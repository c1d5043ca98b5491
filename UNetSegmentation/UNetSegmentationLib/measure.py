"""Sizes of a segmented label: volume, axial diameters, intensity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .image import Box, Image, reorient
from .model import Label
from .postprocess import components


def measure(labels: Image, label_defs: Sequence[Label], image: Image | None = None) -> list[dict[str, Any]]:
    """A dictionary for each label, in the order of label_defs.

    labels: label map (z, y, x); image: where "mean_hu" and the like come from (its first channel, same grid).
    Keys: value, name, voxels, volume_mm3, volume_ml, center (LPS mm), longest_mm and perpendicular_mm (of the label's
    largest component, in the axial section where it is longest; axial = across the axis nearest to head-foot), longest_points and
    perpendicular_points (two LPS points each), mean_hu, std_hu, min_hu, max_hu (the image's own units). A label that is
    absent has 0 voxels and None for the rest.
    """
    canonical, orientation = reorient(labels)
    values = orientation.canonical(image.channels)[0] if image is not None else None
    return [_one(canonical, label, values) for label in label_defs]


def _one(labels: Image, label: Label, values: np.ndarray | None) -> dict[str, Any]:
    voxel = float(np.prod(labels.spacing))
    out: dict[str, Any] = {"value": label.value, "name": label.name, "voxels": 0, "volume_mm3": 0.0, "volume_ml": 0.0}
    keys = ("center", "longest_mm", "perpendicular_mm", "longest_points", "perpendicular_points")
    out.update(dict.fromkeys((*keys, "mean_hu", "std_hu", "min_hu", "max_hu")))
    mask = labels.array == label.value
    box = Box.around(mask)
    if box is None:
        return out
    mask = mask[box.slices]
    profiles = [mask.sum(axis=tuple(b for b in range(3) if b != a)) for a in range(3)]
    count = int(profiles[0].sum())
    center = np.array([np.average(np.arange(len(p)), weights=p) for p in profiles]) + box.start
    out.update(voxels=count, volume_mm3=count * voxel, volume_ml=count * voxel / 1000, center=labels.index_to_point(center[::-1].tolist()))
    labelled, counts = components(mask, corners=True)  # a thin lesion on a slant hangs together by its voxels' corners
    out.update(_diameters(labels, mask if len(counts) < 3 else labelled == 1 + counts[1:].argmax(), box))
    if values is not None:
        inside = values[box.slices][mask]
        out.update(mean_hu=float(inside.mean(dtype=np.float64)), std_hu=float(inside.std(dtype=np.float64)))
        out.update(min_hu=float(inside.min()), max_hu=float(inside.max()))
    return out


def _diameters(labels: Image, mask: np.ndarray, box: Box) -> dict[str, Any]:
    sx, sy, _ = labels.spacing
    best: tuple[float, int, np.ndarray, int, int] | None = None
    for z, plane in enumerate(mask):
        if not plane.any():
            continue
        hull = _hull(_outline(plane, sx, sy))
        distance = np.hypot(*(hull[:, None] - hull[None]).transpose(2, 0, 1))
        at = int(distance.argmax())
        if best is None or distance.flat[at] > best[0] + 1e-9:
            best = float(distance.flat[at]), z, hull, *divmod(at, len(hull))
    assert best is not None
    longest, z, hull, i, j = best
    chord, ends = _perpendicular(hull, hull[i], hull[j])

    def point(p: np.ndarray) -> tuple[float, float, float]:
        return labels.index_to_point((p[0] / sx + box.start[2], p[1] / sy + box.start[1], z + box.start[0]))

    return {
        "longest_mm": longest,
        "perpendicular_mm": chord,
        "longest_points": [point(hull[i]), point(hull[j])],
        "perpendicular_points": [point(e) for e in ends],
    }


def _outline(plane: np.ndarray, sx: float, sy: float) -> np.ndarray:
    """The middles of the pixels' edges in mm (x, y). Pixel centres would make a lesion one pixel too small, and
    corners a diagonal one 0.4 pixel too long."""
    y, x = np.nonzero(plane)
    ends = np.r_[np.flatnonzero(np.diff(y)), len(y) - 1]
    keep = np.unique(np.r_[0, ends, ends[:-1] + 1])  # the first and last pixel of each row carry the hull
    y, x = y[keep], x[keep]
    steps = ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
    return np.concatenate([np.stack([(x + dx) * sx, (y + dy) * sy], 1) for dx, dy in steps])


def _hull(points: np.ndarray) -> np.ndarray:
    """Convex hull, counter-clockwise (Andrew's monotone chain)."""
    ordered = sorted(set(map(tuple, points.tolist())))

    def chain(items: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        out: list[tuple[float, ...]] = []
        for p in items:
            while len(out) > 1 and ((out[-1][0] - out[-2][0]) * (p[1] - out[-2][1]) - (out[-1][1] - out[-2][1]) * (p[0] - out[-2][0]) <= 0):
                out.pop()
            out.append(p)
        return out

    return np.array(chain(ordered)[:-1] + chain(ordered[::-1])[:-1])


def _perpendicular(hull: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """The longest chord of the hull across the line a-b. Its length along a-b is concave, with its peak at a vertex."""
    u = (b - a) / np.hypot(*(b - a))
    v = np.array([-u[1], u[0]])
    along, across = (hull - a) @ u, (hull - a) @ v
    best, at, low, high = -1.0, 0.0, 0.0, 0.0
    for s in along:
        hits = []
        for k in range(len(hull)):
            s0, s1 = along[k - 1], along[k]
            if min(s0, s1) - 1e-9 <= s <= max(s0, s1) + 1e-9:
                if abs(s1 - s0) < 1e-9:
                    hits += [across[k - 1], across[k]]
                else:
                    hits.append(across[k - 1] + (across[k] - across[k - 1]) * (s - s0) / (s1 - s0))
        if max(hits) - min(hits) > best:
            best, at, low, high = max(hits) - min(hits), s, min(hits), max(hits)
    return float(best), (a + at * u + low * v, a + at * u + high * v)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two masks; 1 when both are empty."""
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2 * int(np.count_nonzero(np.logical_and(a, b))) / total if total else 1.0
