"""Sizes of a segmented label: volume, diameters, intensity. Places where a prediction is uncertain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .image import Box, Image, reorient, slices_across
from .model import Label
from .postprocess import components, largest_steps, slabs
from .steps import Steps, complete


def rounded(value: float, digits: int) -> float:
    """To so many decimals, which are more than a scan's voxel can tell; what is smaller, such as volumes of cells in ml and MR whose
    values lie between 0 and 1, to two digits of its own."""
    own = 1 - math.floor(math.log10(abs(value))) if math.isfinite(value) and value else digits
    return round(value, max(digits, own)) + 0.0  # no -0


def measure(labels: Image, label_defs: Sequence[Label], image: Image | None = None) -> list[dict[str, Any]]:
    """A dictionary for each label, in the order of label_defs.

    labels: label map (z, y, x); image: where "mean_hu" and the like come from (its first channel, same grid).
    Keys: value, name, voxels, volume_mm3, volume_ml, center (LPS mm), longest_mm and perpendicular_mm (of the label's
    largest component, in the axial section where it is longest; axial = across the axis nearest to head-foot, but of slices_across()
    their own plane), longest_points and perpendicular_points (two LPS points each), mean_hu, std_hu, min_hu, max_hu (the
    image's own units). A label that is absent has 0 voxels and None for the rest.
    """
    return complete(measure_steps(labels, label_defs, image, across=slices_across(labels)))


def measure_steps(
    labels: Image, label_defs: Sequence[Label], image: Image | None = None, largest: int | None = None, across: int | None = None
) -> Steps[list[dict[str, Any]]]:
    """measure() in pieces, for a panel, also of a part of an image. A label whose box has more voxels than `largest` gets no
    diameters. across: in the sections across this axis, as for slices_across(), which a part of an image does not tell."""
    canonical, orientation = reorient(labels, across)
    values = orientation.canonical(image.channels)[0] if image is not None else None
    out = []
    for label in label_defs:
        out.append((yield from _one(canonical, label, values, largest)))
    return out


def _one(labels: Image, label: Label, values: np.ndarray | None, largest: int | None) -> Steps[dict[str, Any]]:
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
        # A thin lesion on a slant hangs together by its voxels' corners.
        mask, _ = yield from largest_steps(part == label.value, corners=True)
        out.update((yield from _diameters(labels, mask, box)))
    if values is not None:
        out.update((yield from _intensity(values[box.slices], part, label.value)))
    return out


def _intensity(values: np.ndarray, labels: np.ndarray, value: int) -> Steps[dict[str, float]]:
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


def _diameters(labels: Image, mask: np.ndarray, box: Box) -> Steps[dict[str, Any]]:
    sx, sy, _ = labels.spacing
    same = 1e-5 * min(sx, sy)  # two lengths that differ by the last bits, of them or of the spacing
    sections = []
    for z, plane in enumerate(mask):
        y = np.flatnonzero(plane.any(1))
        if len(y):
            rows = plane[y]
            first, last = rows.argmax(1), plane.shape[1] - 1 - rows[:, ::-1].argmax(1)
            sections.append((_reach(np.stack([np.r_[first, last] * sx, np.r_[y, y] * sy], 1), sx, sy), z, y, first, last))
        yield
    # The widest first: of a mass of 70 sections a few need their hull.
    found: list[tuple[float, float, tuple[np.ndarray, np.ndarray], int, np.ndarray]] = []
    longest = 0.0
    for reach, z, y, first, last in sorted(sections, key=lambda item: -item[0]):
        if reach < longest - same:
            break
        hull = _hull(_outline(y, first, last, sx, sy))
        distance = np.hypot(*(hull[:, None] - hull[None]).transpose(2, 0, 1))
        longest = max(longest, float(distance.max()))
        for i, j in np.argwhere(np.triu(distance, 1) > longest - same):
            found.append((float(distance[i, j]), *_perpendicular(hull, hull[i], hull[j]), z, hull[[i, j]]))
        yield
    # Of diameters of one length, which 78 of 779 LIDC nodules have, the one with the longest across it. The first in the hull's order
    # was not that one in 44, and another one in the mirrored mask.
    found = [f for f in found if f[0] > longest - same]
    chord = max(f[1] for f in found)
    _, _, across, z, along = min((f for f in found if f[1] > chord - same), key=lambda f: f[3])

    def point(p: np.ndarray) -> tuple[float, float, float]:
        return labels.index_to_point((p[0] / sx + box.start[2], p[1] / sy + box.start[1], z + box.start[0]))

    return {
        "longest_mm": longest,
        "perpendicular_mm": chord,
        "longest_points": [point(p) for p in along],
        "perpendicular_points": [point(p) for p in across],
    }


def _reach(points: np.ndarray, sx: float, sy: float) -> float:
    """No two of the pixels' edges, whose middles are half a pixel from the points (x, y), are farther apart: their width in the
    nearest of 32 directions is 0.2 % less at most."""
    angles = np.arange(32) * (np.pi / 32)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    width = np.ptp(points @ directions, axis=0) + np.abs(directions * [[sx], [sy]]).max(0)
    return float(width.max() / np.cos(np.pi / 64))


def _outline(y: np.ndarray, first: np.ndarray, last: np.ndarray, sx: float, sy: float) -> np.ndarray:
    """The middles of the pixels' edges in mm (x, y), as far as they carry the hull, of rows y from their first to their last pixel.
    Pixel centres would make a lesion one pixel too small, and corners a diagonal one 0.4 pixel too long."""
    left, right = _bulging(y, -first), _bulging(y, last)
    y, x = np.r_[y[left], y[right]], np.r_[first[left], last[right]]
    steps = ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
    return np.concatenate([np.stack([(x + dx) * sx, (y + dy) * sy], 1) for dx, dy in steps])


def _bulging(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Indices of the points (whole numbers, y rising) that lie to the right of every line between one above and one below."""
    keep = np.arange(len(y))
    while True:
        v, w = np.diff(y[keep]), np.diff(x[keep])
        out = w[:-1] * v[1:] > w[1:] * v[:-1]
        if out.all():
            return keep
        keep = keep[np.r_[True, out, True]]


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
    s, s0, c0 = along[:, None], np.roll(along, 1), np.roll(across, 1)  # at each vertex, of each edge
    met = (np.minimum(s0, along) - 1e-9 <= s) & (s <= np.maximum(s0, along) + 1e-9)
    level = np.abs(along - s0) < 1e-9
    cut = c0 + (across - c0) * (s - s0) / np.where(level, 1, along - s0)
    low = np.where(met, np.where(level, np.minimum(c0, across), cut), np.inf).min(1)
    high = np.where(met, np.where(level, np.maximum(c0, across), cut), -np.inf).max(1)
    at = int((high - low).argmax())
    return float(high[at] - low[at]), (a + along[at] * u + low[at] * v, a + along[at] * u + high[at] * v)


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
