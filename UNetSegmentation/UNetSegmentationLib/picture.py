"""A result as one PNG that a radiologist can read: three planes through the lesion and a measured close-up.

Radiological convention: patient right on the screen's left, anterior up in axial, superior up in coronal and sagittal,
anterior on the left of sagittal. Panels are drawn in mm from the first voxel of the canonical (LPS) image, so that their
aspect is the true one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from .files import UserError, atomic_path
from .image import Box, Image, is_placed, length_unit, reorient, slices_across
from .model import Label
from .postprocess import voxel_counts

if TYPE_CHECKING:
    from .inference.predict import Prediction

Window = tuple[float, float]

PIXELS, DPI = 1600, 200
INK, FAINT, GROUND = "#e8e8e8", "#9aa0a6", "#0b0c0e"
LONGEST, PERPENDICULAR, CROSSHAIR = "#ffe14d", "#5ce1ff", "#8fb3d9"
MAX_ROWS = 6


@dataclass(frozen=True)
class _Plane:
    """axis: the array axis (z, y, x) that is cut; rows, columns: those along the screen; up: row 0 at the bottom."""

    name: str
    axis: int
    rows: int
    columns: int
    up: bool


AXIAL = _Plane("Axial", 0, 1, 2, False)
CORONAL = _Plane("Coronal", 1, 0, 2, True)
SAGITTAL = _Plane("Sagittal", 2, 0, 1, True)
PLANES = (AXIAL, CORONAL, SAGITTAL)


@dataclass(frozen=True)
class _Target:
    """What the panels are centred on. at: array index (z, y, x); size: the component's extent (z, y, x) in mm."""

    label: Label | None
    at: tuple[int, int, int]
    size: tuple[float, float, float]


def save_picture(
    image: Image,
    prediction: Prediction,
    path: str | Path,
    window: Window,
    measures: Sequence[dict[str, Any]] | None = None,
    title: str = "",
    unit: str = "",
) -> None:
    """Write a PNG of about 1600 x 1600 pixels: axial, coronal and sagittal through the largest component, and a close-up
    of the section that was measured (see slices_across()).

    window: (low, high) in the image's own units, whose name is `unit` ("HU" for CT). measures: a dictionary a label with
    value, volume_mm3, longest_mm, perpendicular_mm, longest_points, perpendicular_points (two LPS points in mm each) and
    mean_hu; any may be missing or None. An image of one slice gets a single panel. Raises UserError; what stood at `path`
    is then untouched.
    """
    if not str(path).lower().endswith(".png"):
        raise UserError(f"{path} would not be a PNG; end the picture's name in .png.")
    if prediction.labels.shape != image.shape:
        raise ValueError(f"labels {prediction.labels.shape} are not on the image's grid {image.shape}")
    try:
        import matplotlib  # noqa: F401
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("Pictures need Matplotlib; run: pip install matplotlib") from e
    figure = Figure(figsize=(PIXELS / DPI, PIXELS / DPI), dpi=DPI, facecolor=GROUND)
    FigureCanvasAgg(figure)
    _Sheet(figure, image, prediction, window, list(measures or ()), unit).draw(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=GROUND)


class _Sheet:
    """One picture in the making."""

    def __init__(
        self, figure: Any, image: Image, prediction: Prediction, window: Window, measures: list[dict[str, Any]], unit: str
    ) -> None:
        self.figure = figure
        self.image, orientation = reorient(image)
        self.labels = orientation.canonical(prediction.labels.array)
        across = slices_across(image)
        self.sections = AXIAL if across is None else PLANES[2 - orientation.axes.index(across)]  # where measure() has measured
        self.spacing = self.image.spacing[::-1]
        self.window = (float(window[0]), max(float(window[1]), float(window[0]) + 1e-6))
        self.unit = unit
        self.model_name = prediction.model_name
        self.measures = {m["value"]: m for m in measures if m.get("value") is not None}
        self.placed, self.length = is_placed(image), length_unit(image)
        self.counts = counts = voxel_counts(self.labels, int(self.labels.max(initial=0)) + 1)
        self.defs = [d for d in prediction.label_defs if d.value < len(counts) and counts[d.value]]
        self.lut = np.zeros((len(counts), 4), np.float32)
        for label in self.defs:
            self.lut[label.value] = (*(c / 255 for c in label.color), 1.0)
        self.target = self._find_target()

    # ---------------------------------------------------------------------------------------------------- what to show

    def _find_target(self) -> _Target:
        shape = self.labels.shape
        known = np.zeros(len(self.counts), bool)
        known[[d.value for d in self.defs]] = True
        box = Box.around(known[self.labels])
        if box is None:
            z, y, x = ((n - 1) // 2 for n in shape)
            return _Target(None, (z, y, x), (0.0, 0.0, 0.0))
        part = np.ascontiguousarray(np.where(known[self.labels[box.slices]], self.labels[box.slices], 0))
        mask = sitk.GetImageFromArray((part > 0).astype(np.uint8))
        components = sitk.GetArrayFromImage(sitk.ScalarConnectedComponent(sitk.GetImageFromArray(part), mask, 0, True))
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        component = components == int(sizes.argmax())
        inner = Box.of(component)
        component = component[inner.slices]
        label = next(d for d in self.defs if d.value == part[inner.slices][component][0])
        at = _middle(component, self.spacing)
        z, y, x = (int(a + b + c) for a, b, c in zip(at, inner.start, box.start))
        depth, height, width = (n * s for n, s in zip(component.shape, self.spacing))
        return _Target(label, (z, y, x), (depth, height, width))

    def _points(self, measure: dict[str, Any], key: str, plane: _Plane, index: int | None = None) -> np.ndarray | None:
        """The end points of a diameter as (2, 3) array indices (z, y, x), where both lie in one slice of a plane: this one."""
        points = measure.get(key)
        if points is None or len(points) != 2:
            return None
        out = np.array([self.image.point_to_index(p)[::-1] for p in points])
        index = round(out[:, plane.axis].mean()) if index is None else index
        return out if np.abs(out[:, plane.axis] - index).max() <= 0.51 else None

    # --------------------------------------------------------------------------------------------------------- drawing

    def draw(self, title: str) -> None:
        rows = self._table()
        bottom, top = 0.052 + 0.024 * len(rows), 0.955
        self._text(self.figure, 0.012, 0.977, _shorten(title, 76), size=10, va="center", weight="bold")
        if not self._rgb:
            self._text(self.figure, 0.988, 0.977, self._window_text(), size=9, ha="right", va="center")
        single = [p for p in PLANES if self.labels.shape[p.axis] == 1]
        if single:
            self._plane(single[0], self._axes(0.01, bottom, 0.98, top - bottom), closed=True)
        else:
            width, height = 0.4875, (top - bottom - 0.005) / 2
            places = ((0.01, bottom + height + 0.005), (0.5025, bottom + height + 0.005), (0.01, bottom), (0.5025, bottom))
            panels = [self._axes(x, y, width, height) for x, y in places]
            for plane, axes in zip(PLANES, panels):
                self._plane(plane, axes)
            self._close_up(panels[3])
        self._rows(rows, bottom)
        self._text(self.figure, 0.012, 0.014, "Not for diagnosis", size=7, color=FAINT, va="center")
        self._text(self.figure, 0.988, 0.014, _shorten(self.model_name, 60), size=7, color=FAINT, ha="right", va="center")

    @property
    def _rgb(self) -> bool:
        return not self.placed and self.image.n_channels in (3, 4) and self.image.array.dtype == np.uint8

    def _axes(self, x: float, y: float, width: float, height: float) -> Any:
        axes = self.figure.add_axes((x, y, width, height), facecolor="black", xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#2a2d31", linewidth=0.8)
        return axes

    def _plane(self, plane: _Plane, axes: Any, closed: bool = False) -> None:
        """The whole slice through the target; closed: the only panel of a one-slice image."""
        at = self.target.at
        rows, columns = (self.labels.shape[a] * self.spacing[a] for a in (plane.rows, plane.columns))
        middle = ((columns - self.spacing[plane.columns]) / 2, (rows - self.spacing[plane.rows]) / 2)
        self._frame(axes, plane, middle, columns, rows)
        self._slice(axes, plane, at[plane.axis])
        if not closed:
            self._crosshair(axes, plane)
        elif self.target.label:
            self._callipers(axes, plane, at[plane.axis])
        self._legend(axes, plane, at[plane.axis], plane.name)

    def _close_up(self, axes: Any) -> None:
        if self.target.label is None:
            self._text(axes, 0.5, 0.5, "Nothing was found", size=12, color=FAINT, ha="center", va="center")
            return
        plane = self.sections
        across = [plane.rows, plane.columns]
        index, (y, x) = self.target.at[plane.axis], (self.target.at[a] for a in across)
        lesion = max(self.target.size[a] for a in across)
        points = self._points(self.measures.get(self.target.label.value, {}), "longest_points", plane)
        if points is not None and 0 <= round(points[:, plane.axis].mean()) < self.labels.shape[plane.axis]:
            index = round(points[:, plane.axis].mean())
            y, x = points[:, across].mean(0)
            lesion = float(np.hypot(*((points[1] - points[0]) * self.spacing)[across]))
        edge = min(max(40.0, 3 * lesion), max(self.labels.shape[a] * self.spacing[a] for a in across))
        self._frame(axes, plane, (x * self.spacing[plane.columns], y * self.spacing[plane.rows]), edge, edge)
        # Lighter than in the other panels: here the lesion's own texture matters.
        self._slice(axes, plane, index, fill=0.1, line=1.3)
        self._callipers(axes, plane, index)
        self._legend(axes, plane, index, f"Close-up, {plane.name.lower()}")

    def _frame(self, axes: Any, plane: _Plane, middle: tuple[float, float], width: float, height: float) -> None:
        """Limits in mm that show at least width x height around the middle (x, y) at the true aspect, moved so that no
        more black than needed is seen."""
        box = axes.get_position()
        scale = max(width / box.width, height / box.height) * 1.02
        half_x, half_y = scale * box.width / 2, scale * box.height / 2
        left, right, bottom, top = self._extent(plane)
        x = _within(middle[0], left + half_x, right - half_x)
        y = _within(middle[1], top + half_y, bottom - half_y)
        axes.set_xlim(x - half_x, x + half_x)
        axes.set_ylim((y - half_y, y + half_y) if plane.up else (y + half_y, y - half_y))

    def _extent(self, plane: _Plane, box: Box | None = None) -> tuple[float, float, float, float]:
        """imshow's extent of a slice, or of its part `box` (rows, columns)."""
        whole = box or Box.whole((self.labels.shape[plane.rows], self.labels.shape[plane.columns]))
        (top, left), (bottom, right) = whole.start, whole.stop
        dy, dx = self.spacing[plane.rows], self.spacing[plane.columns]
        return (left - 0.5) * dx, (right - 0.5) * dx, (bottom - 0.5) * dy, (top - 0.5) * dy

    def _imshow(self, axes: Any, pixels: np.ndarray, extent: tuple[float, ...], **how: Any) -> None:
        x, y = axes.get_xlim(), axes.get_ylim()
        axes.imshow(pixels, extent=extent, origin="upper", aspect="auto", **how)
        axes.set(xlim=x, ylim=y)

    def _slice(self, axes: Any, plane: _Plane, index: int, fill: float = 0.18, line: float = 0.9) -> None:
        """The image, and the labels' outlines and fill; fill: its opacity."""
        extent = self._extent(plane)
        if self._rgb:
            pixels = np.moveaxis(self.image.array[:3].take(index, plane.axis + 1), 0, -1)
        else:
            pixels = np.nan_to_num(self.image.channels[0].take(index, plane.axis).astype(np.float32))
        size = axes.get_window_extent()
        shrunk = pixels.shape[1] / (extent[1] - extent[0]) * abs(np.diff(axes.get_xlim())[0]) > size.width
        how = {} if self._rgb else {"cmap": "gray", "vmin": self.window[0], "vmax": self.window[1]}
        self._imshow(axes, pixels, extent, interpolation="hanning" if shrunk else "bilinear", **how)
        labels = self.labels.take(index, plane.axis)
        box = Box.around(labels)
        if box is None:
            return
        part = labels[box.slices]
        self._imshow(axes, self.lut[part], self._extent(plane, box), alpha=fill, interpolation="nearest")
        dy, dx = self.spacing[plane.rows], self.spacing[plane.columns]
        ys, xs = (np.arange(a - 1, b + 1) * d for a, b, d in zip(box.start, box.stop, (dy, dx)))
        padded = np.pad(part, 1)
        for label in self.defs:
            mask = padded == label.value
            if mask.any():
                color = tuple(c / 255 for c in label.color)
                axes.contour(xs, ys, mask, levels=[0.5], colors=[color], linewidths=line)

    def _crosshair(self, axes: Any, plane: _Plane) -> None:
        """Faint lines where the other two planes cut, open around the lesion."""
        x, y = (self.target.at[a] * self.spacing[a] for a in (plane.columns, plane.rows))
        left, right, bottom, top = self._extent(plane)
        span = abs(np.diff(axes.get_xlim())[0])
        gap_x, gap_y = (min(self.target.size[a] / 2 + 0.03 * span, 0.12 * span) for a in (plane.columns, plane.rows))
        how = {"color": CROSSHAIR, "alpha": 0.55, "linewidth": 0.6}
        axes.plot([left, max(left, x - gap_x)], [y, y], **how)
        axes.plot([min(right, x + gap_x), right], [y, y], **how)
        axes.plot([x, x], [top, max(top, y - gap_y)], **how)
        axes.plot([x, x], [min(bottom, y + gap_y), bottom], **how)

    def _callipers(self, axes: Any, plane: _Plane, index: int) -> None:
        """The two diameters of the target's label, where they lie in this slice."""
        measure = self.measures.get(self.target.label.value, {}) if self.target.label else {}
        for key, color in (("longest", LONGEST), ("perpendicular", PERPENDICULAR)):
            points = self._points(measure, f"{key}_points", plane, index)
            if points is None:
                continue
            mm = points * self.spacing
            (x0, y0), (x1, y1) = mm[:, [plane.columns, plane.rows]]
            length = math.hypot(x1 - x0, y1 - y0)
            if length == 0:
                continue
            u, v = (x1 - x0) / length, (y1 - y0) / length
            cap = 0.012 * abs(np.diff(axes.get_xlim())[0])
            xs = [x0 - v * cap, x0 + v * cap, x0, x1, x1 - v * cap, x1 + v * cap]
            ys = [y0 + u * cap, y0 - u * cap, y0, y1, y1 + u * cap, y1 - u * cap]
            axes.plot(xs, ys, color=color, linewidth=1.1, path_effects=_halo(2.2))
            # The longer way out: to the screen's right for the longest, up for its perpendicular.
            first = (x0 > x1) if key == "longest" else (y0 < y1) != plane.up
            x, y, sign = (x0, y0, -1) if first else (x1, y1, 1)
            size = measure.get(f"{key}_mm") or length
            at = axes.transAxes.inverted().transform(axes.transData.transform((x + sign * u * 3 * cap, y + sign * v * 3 * cap)))
            ha = "center" if abs(u) < 0.5 else "left" if sign * u > 0 else "right"
            va = "center" if abs(v) < 0.5 else "bottom" if (sign * v > 0) == plane.up else "top"
            x, y = np.clip(at, 0.1, 0.9)
            self._text(axes, x, y, f"{size:.1f} {self.length}", size=9, color=color, ha=ha, va=va)

    def _legend(self, axes: Any, plane: _Plane, index: int, name: str) -> None:
        if self.placed:
            self._marks(axes, plane)
            self._caption(axes, plane, index, name)
        self._scale_bar(axes)

    def _marks(self, axes: Any, plane: _Plane) -> None:
        d = np.reshape(self.image.direction, (3, 3))
        right, down = d[:, 2 - plane.columns], d[:, 2 - plane.rows] * (-1 if plane.up else 1)
        for x, y, vector in ((0.985, 0.5, right), (0.015, 0.5, -right), (0.5, 0.02, down), (0.5, 0.98, -down)):
            ha = "center" if x == 0.5 else "right" if x > 0.5 else "left"
            va = "center" if y == 0.5 else "top" if y > 0.5 else "bottom"
            self._text(axes, x, y, _letters(vector), size=10, color=LONGEST, ha=ha, va=va, weight="bold")

    def _caption(self, axes: Any, plane: _Plane, index: int, name: str) -> None:
        self._text(axes, 0.02, 0.975, name, size=9, va="top", weight="bold")
        where = f"slice {index + 1} of {self.labels.shape[plane.axis]}"
        normal = np.reshape(self.image.direction, (3, 3))[:, 2 - plane.axis]
        if abs(normal).max() > 0.9999:
            mm = float(self.image.index_to_point([index if a == plane.axis else 0 for a in (2, 1, 0)])[2 - plane.axis])
            where = f"{_letters(normal if mm >= 0 else -normal)} {abs(mm):.1f} mm, {where}"
        else:
            where = f"oblique, {where}"
        self._text(axes, 0.02, 0.925, where, size=8, va="top")

    def _scale_bar(self, axes: Any) -> None:
        low, high = axes.get_xlim()
        width = abs(high - low)
        length = max((m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5) if m * 10.0**e <= 0.27 * width), default=width)
        how = {"color": INK, "linewidth": 2, "transform": axes.transAxes, "path_effects": _halo(3.4)}
        axes.plot([0.03, 0.03 + length / width], [0.035, 0.035], **how)
        self._text(axes, 0.03, 0.05, f"{length:g} {self.length}", size=8, va="bottom")

    # ------------------------------------------------------------------------------------------------------------ text

    def _window_text(self) -> str:
        low, high = self.window
        return f"W {_number(high - low)}  L {_number((high + low) / 2)} {self.unit}".rstrip()

    def _table(self) -> list[tuple[str, ...]]:
        """Rows of (color, name, volume, diameters, mean); the first is the heading. Long lists keep the largest labels."""
        if not self.defs:
            return [("", "Nothing was found", "", "", "")]
        shown = self.defs
        if len(shown) > MAX_ROWS:
            shown = sorted(shown, key=lambda d: -self.counts[d.value])[: MAX_ROWS - 1]
        measured = any(d.value in self.measures for d in shown)
        mean = f"mean {self.unit}".rstrip()
        size = "volume" if self.length == "mm" else "area" if 1 in self.labels.shape else "voxels"
        rows: list[tuple[str, ...]] = []
        if measured:
            rows.append(("", "", size, "longest × perpendicular", mean))
        for label in shown:
            m = self.measures.get(label.value, {})
            color = "#" + "".join(f"{c:02x}" for c in label.color)
            across = [f"{m[k]:.1f}" for k in ("longest_mm", "perpendicular_mm") if m.get(k) is not None]
            size = f"{' × '.join(across)} {self.length}" if across else ""
            average = _number(m["mean_hu"]) if m.get("mean_hu") is not None else ""
            rows.append((color, _shorten(label.name, 40), self._volume(m.get("volume_mm3")), size, average))
        if len(shown) < len(self.defs):
            rows.append(("", f"and {len(self.defs) - len(shown)} smaller ones", "", "", ""))
        return rows

    def _volume(self, mm3: float | None) -> str:
        if mm3 is None:
            return ""
        if self.length == "px":
            return f"{mm3:.0f}" + " px" * (1 in self.labels.shape)
        return f"{mm3:.0f} mm³" if mm3 < 1000 else f"{mm3 / 1000:.1f} mL"

    def _rows(self, rows: list[tuple[str, ...]], bottom: float) -> None:
        from matplotlib.patches import Rectangle

        for i, (color, name, *numbers) in enumerate(rows):
            y = bottom - 0.022 - 0.024 * i
            heading = not name
            if color:
                square = Rectangle((0.014, y - 0.006), 0.012, 0.012, color=color, transform=self.figure.transFigure)
                self.figure.add_artist(square)
            self._text(self.figure, 0.034 if color else 0.014, y, name, size=9, va="center")
            for x, text in zip((0.52, 0.78, 0.986), numbers):
                how = {"size": 7.5, "color": FAINT} if heading else {"size": 9}
                self._text(self.figure, x, y, text, ha="right", va="center", **how)

    def _text(self, on: Any, x: float, y: float, text: str, size: float, color: str = INK, **how: Any) -> None:
        if on is not self.figure:
            how |= {"transform": on.transAxes, "path_effects": _halo(1.8)}
        on.text(x, y, text, fontsize=size, color=color, family="DejaVu Sans", parse_math=False, **how)


def _middle(component: np.ndarray, spacing: Sequence[float]) -> tuple[int, int, int]:
    """The voxel of a (z, y, x) mask nearest to its centroid in mm, in the mask's section nearest to the centroid."""
    center = [float(np.average(np.arange(n), weights=component.sum(axis=tuple(b for b in range(3) if b != a))))
              for a, n in enumerate(component.shape)]  # fmt: skip
    filled = np.flatnonzero(component.any(axis=(1, 2)))
    z = int(filled[np.abs(filled - center[0]).argmin()])
    rows, columns = np.nonzero(component[z])
    nearest = np.hypot((rows - center[1]) * spacing[1], (columns - center[2]) * spacing[2]).argmin()
    return z, int(rows[nearest]), int(columns[nearest])


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high) if low <= high else (low + high) / 2


def _letters(vector: np.ndarray) -> str:
    """Where an LPS vector points: the main letter first, others beyond 15 degrees after it."""
    order = np.argsort(-np.abs(vector))
    return "".join(("RL", "AP", "IS")[a][int(vector[a] > 0)] for a in order if abs(vector[a]) > math.sin(math.radians(15)))


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _halo(width: float) -> list[Any]:
    """A black rim, so that lines and letters are read on bone as well as on air."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="black")]
