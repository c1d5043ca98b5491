"""Sizes of a segmented label: volume, axial diameters, intensity. Places where a prediction is uncertain."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from .image import Box, Image, reorient
from .model import Label
from .postprocess import components, slabs


def measure(labels: Image, label_defs: Sequence[Label], image: Image | None = None) -> list[dict[str, Any]]:
    """A dictionary for each label, in the order of label_defs.

    labels: label map (z, y, x); image: where "mean_hu" and the like come from (its first channel, same grid).
    Keys: value, name, voxels, volume_mm3, volume_ml, center (LPS mm), longest_mm and perpendicular_mm (of the label's
    largest component, in the axial section where it is longest; axial = across the axis nearest to head-foot), longest_points and
    perpendicular_points (two LPS points each), mean_hu, std_hu, min_hu, max_hu (the image's own units). A label that is
    absent has 0 voxels and None for the rest.
    """
    steps = measure_steps(labels, label_defs, image)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def measure_steps(
    labels: Image, label_defs: Sequence[Label], image: Image | None = None, largest: int | None = None
) -> Generator[None, None, list[dict[str, Any]]]:
    """measure() in pieces, for a panel. Finding the components of a label is one piece, 20 to 50 ns for each voxel of its
    box; a label whose box has more voxels than `largest` gets no diameters."""
    canonical, orientation = reorient(labels)
    values = orientation.canonical(image.channels)[0] if image is not None else None
    out = []
    for label in label_defs:
        out.append((yield from _one(canonical, label, values, largest)))
    return out


def _one(labels: Image, label: Label, values: np.ndarray | None, largest: int | None) -> Generator[None, None, dict[str, Any]]:
    voxel = float(np.prod(labels.spacing))
    out: dict[str, Any] = {"value": label.value, "name": label.name, "voxels": 0, "volume_mm3": 0.0, "volume_ml": 0.0}
    keys = ("center", "longest_mm", "perpendicular_mm", "longest_points", "perpendicular_points")
    out.update(dict.fromkeys((*keys, "mean_hu", "std_hu", "min_hu", "max_hu")))
    profiles = [np.zeros(n, np.int64) for n in labels.shape]
    for z in slabs(labels.shape):
        mask = labels.array[z] == label.value
        if mask.any():
            rows = mask.sum(0, np.int64)
            profiles[0][z] = [np.count_nonzero(plane) for plane in mask]
            profiles[1] += rows.sum(1)
            profiles[2] += rows.sum(0)
        yield
    count = int(profiles[0].sum())
    if not count:
        return out
    ends = [np.flatnonzero(p)[[0, -1]] for p in profiles]
    box = Box(tuple(int(e[0]) for e in ends), tuple(int(e[1]) + 1 for e in ends))
    center = [np.average(np.arange(len(p)), weights=p) for p in profiles]
    out.update(voxels=count, volume_mm3=count * voxel, volume_ml=count * voxel / 1000, center=labels.index_to_point(center[::-1]))
    part = labels.array[box.slices]
    if largest is None or part.size <= largest:
        mask = part == label.value
        labelled, counts = components(mask, corners=True)  # a thin lesion on a slant hangs together by its voxels' corners
        yield
        out.update((yield from _diameters(labels, mask if len(counts) < 3 else labelled == 1 + counts[1:].argmax(), box)))
    if values is not None:
        out.update((yield from _intensity(values[box.slices], part, label.value)))
    return out


def _intensity(values: np.ndarray, labels: np.ndarray, value: int) -> Generator[None, None, dict[str, float]]:
    """Twice over the voxels, since sums of squares would lose the digits of a small deviation from a large mean."""
    count, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for z in slabs(values.shape):
        inside = values[z][labels[z] == value]
        if len(inside):
            count, total = count + len(inside), total + float(inside.sum(dtype=np.float64))
            low, high = min(low, float(inside.min())), max(high, float(inside.max()))
        yield
    mean = total / count
    for z in slabs(values.shape):
        squares += float(np.square(np.subtract(values[z][labels[z] == value], mean, dtype=np.float64)).sum())
        yield
    return {"mean_hu": mean, "std_hu": float(np.sqrt(squares / count)), "min_hu": low, "max_hu": high}


def _diameters(labels: Image, mask: np.ndarray, box: Box) -> Generator[None, None, dict[str, Any]]:
    sx, sy, _ = labels.spacing
    best: tuple[float, int, np.ndarray, int, int] | None = None
    outlines = []
    for z, plane in enumerate(mask):
        if plane.any():
            outline = _outline(plane, sx, sy)
            outlines.append((_reach(outline), z, outline))
            yield
    # The widest first: of a mass of 70 sections five need their hull.
    for reach, z, outline in sorted(outlines, key=lambda item: -item[0]):
        if best is not None and reach < best[0] - 1e-9:
            break
        hull = _hull(outline)
        distance = np.hypot(*(hull[:, None] - hull[None]).transpose(2, 0, 1))
        at = int(distance.argmax())
        length = float(distance.flat[at])
        if best is None or length > best[0] + 1e-9 or (length > best[0] - 1e-9 and z < best[1]):
            best = length, z, hull, *divmod(at, len(hull))
        yield
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


def _reach(points: np.ndarray) -> float:
    """No two of the points (x, y) are farther apart: their width in the nearest of eight directions is 2 % less at most."""
    angles = np.arange(8) * (np.pi / 8)
    along = points @ np.stack([np.cos(angles), np.sin(angles)])
    return float(np.ptp(along, axis=0).max() / np.cos(np.pi / 16))


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


def uncertain_places(uncertainty: Image, threshold: float = 0.5, limit: int = 50) -> list[dict[str, Any]]:
    """Where a person should look: the connected regions with an uncertainty of `threshold` or more, the worst first.

    uncertainty: (z, y, x), 0..1; NaN counts as certain. Keys: point (LPS mm of the most uncertain voxel, of several the
    first in the array), peak, volume_ml, score (the uncertainty summed over the region, in ml). Sorted by score, at most
    `limit`. Voxels that share an edge or a corner hang together. Takes some 8 bytes for each voxel of the box
    around all (25 where the map is noise).
    """
    values = uncertainty.array
    rows, planes = np.zeros(values.shape[1:], bool), np.zeros(values.shape[0], bool)
    for slab in slabs(values.shape):
        high = values[slab] >= threshold
        rows |= high.any(0)
        planes[slab] = high.any((1, 2))
    inside = Box.around(rows)
    if inside is None:
        return []
    hit = np.flatnonzero(planes)
    box = Box((int(hit[0]), *inside.start), (int(hit[-1]) + 1, *inside.stop))
    values = values[box.slices]
    labelled, counts = components(values >= threshold, corners=True)
    sums, peaks = np.zeros(len(counts)), np.full(len(counts), -np.inf, values.dtype)
    for regions, plane in zip(labelled, values):
        at = regions > 0
        found = regions[at]
        sums += np.bincount(found, plane[at], len(counts))
        np.maximum.at(peaks, found, plane[at])
    chosen = 1 + np.argsort(-sums[1:], kind="stable")[:limit]
    first: dict[int, tuple[int, int, int]] = {}
    wanted = np.zeros(len(counts), bool)
    wanted[chosen] = True
    for z, (regions, plane) in enumerate(zip(labelled, values)):
        y, x = np.nonzero(wanted[regions] & (plane == peaks[regions]))
        for region, at_index in zip(*np.unique(regions[y, x], return_index=True)):
            first[int(region)] = (int(x[at_index]) + box.start[2], int(y[at_index]) + box.start[1], z + box.start[0])
            wanted[region] = False
    ml = float(np.prod(uncertainty.spacing)) / 1000
    return [
        {
            "point": uncertainty.index_to_point(first[region]),
            "peak": float(peaks[region]),
            "volume_ml": int(counts[region]) * ml,
            "score": float(sums[region]) * ml,
        }
        for region in map(int, chosen)
    ]


def worst_place(truth: Image, found: Sequence[Image]) -> tuple[float, float, float] | None:
    """Where a person looks at errors: the middle of the voxels that differ from the truth in one of the label maps, in the axial
    slice that has most of them; where none differs, of the truth. LPS mm; None where nothing is marked.
    """
    canonical, orientation = reorient(truth)
    wrong = np.zeros(canonical.shape, np.uint8)
    for image in found:
        wrong += orientation.canonical(image.array) != canonical.array
    marked = wrong if wrong.any() else canonical.array
    counts = np.count_nonzero(marked, axis=(1, 2))
    if not counts.any():
        return None
    z = int(counts.argmax())
    y, x = (float(v) for v in np.argwhere(marked[z]).mean(0))
    return canonical.index_to_point((x, y, z))
