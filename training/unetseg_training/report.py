"""report.html: one file that tells how a training went and how good the model is; no network, no other file.

write(folder)        from what stands in a run's folder: live.jsonl, run.json, metrics.json, finetune.json, plan.md
Worst(folder)        shown every case while it is scored, keeps pictures of the worst ones
overlay(...)         truth and prediction as outlines on three planes, as PNG
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from UNetSegmentationLib.files import UserError, atomic_path, write_text
from UNetSegmentationLib.image import IDENTITY, Box, Image, reorient
from UNetSegmentationLib.picture import AXIAL, GROUND, INK, PLANES

from . import live
from .cases import IGNORE, file_name

if TYPE_CHECKING:
    from UNetSegmentationLib.inference.predict import Prediction

    from .metrics import Item, Row

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Green and magenta are told apart on grey, and by the colour-blind.
TRUTH, FOUND = "#4ade80", "#ff5fd2"
# Okabe and Ito's, in the order that reads best on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
NAMED = 10  # curves in a legend: with 15 it is taller than its figure
HEADINGS = {
    "dice": "Dice", "dice_where_present": "Dice where present", "dice_3_clicks": "Dice, 3 clicks",
    "hausdorff95_mm": "HD 95 % (mm)", "hausdorff_mm": "HD (mm)", "surface_dice": "Surface Dice",
    "sensitivity": "Sensitivity", "specificity": "Specificity", "precision": "Precision", "auc": "AUC",
    "volume_ml": "Volume (mL)", "truth_ml": "True volume (mL)", "volume_error_percent": "Volume error (%)",
}  # fmt: skip
DIGITS = {"hausdorff95_mm": 1, "hausdorff_mm": 1, "volume_error_percent": 1, "specificity": 4, "auc": 4}


@cache
def fonts(text: str) -> list[str]:
    """The font families to write a text with in a picture: Matplotlib's own, and of those installed what it lacks the letters of."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    names = ["DejaVu Sans"]
    own = FT2Font(findfont(names[0]))
    missing = {c for c in text if not c.isspace() and not own.get_char_index(ord(c))}
    for entry in fontManager.ttflist if missing else ():
        if entry.name.startswith("Last Resort"):  # has a box for every letter
            continue
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # removed since they were listed
            continue
        if found := {c for c in missing if font.get_char_index(ord(c))}:
            names.append(entry.name)
            missing -= found
    return names


def label_text(name: str) -> str:
    """A label's name in a figure: "$" would begin a formula, and a "_" at its front keep it out of legends. Not parse_math=False,
    as a logarithmic axis writes its numbers as formulas."""
    return (" " * name.startswith("_") + (name if len(name) < 25 else name[:24] + "…")).replace("$", r"\$")


def dataset_hash(digests: dict[str, str]) -> str:
    """One SHA-256 for a set of cases: of the names and digests, whatever their order."""
    return hashlib.sha256("".join(f"{n}\0{d}\n" for n, d in sorted(digests.items())).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- pictures


def window_of(intensity: dict[str, Any] | None, values: np.ndarray) -> tuple[float, float]:
    """(low, high) to show an image with: its card's window, else the 0.5th and 99.5th percentiles."""
    mode = (intensity or {}).get("mode")
    if intensity and mode == "window":
        return intensity["level"] - intensity["width"] / 2, intensity["level"] + intensity["width"] / 2
    if intensity and mode == "ct-foreground":
        return intensity["low"], intensity["high"]
    sparse = values[np.isfinite(values)][:: max(1, values.size // 200_000)]
    low, high = np.percentile(sparse, (0.5, 99.5)) if sparse.size else (0.0, 1.0)
    return float(low), max(float(high), float(low) + 1e-6)


def overlay(
    image: Image, truth: np.ndarray, prediction: np.ndarray, intensity: dict[str, Any] | None = None, title: str = "", note: str = ""
) -> bytes:
    """A PNG of about 1400 x 400 pixels: axial, coronal and sagittal through the structure, and the slice where truth and
    prediction differ most; truth outlined in green, prediction in magenta.

    truth, prediction: label maps (z, y, x) on the image's grid, the truth IGNORE where nobody has judged. Radiological
    convention, letters on the edges; scale in mm. A picture of one slice gets one panel.
    """
    from matplotlib.figure import Figure

    canonical, orientation = reorient(image)
    maps = [orientation.canonical(m) for m in (truth, prediction)]
    judged = maps[0] != IGNORE
    maps[0] = maps[0] * judged
    planes = [p for p in PLANES if canonical.shape[p.axis] == 1][:1] or list(PLANES)
    placed = image.shape[0] > 1 or image.origin != (0.0, 0.0, 0.0) or tuple(image.direction) != IDENTITY
    at = _target(maps, canonical.spacing[::-1])
    shots: list[tuple[Any, tuple[int, ...], str]] = [(p, at, p.name if placed else "") for p in planes]
    if len(planes) == 3:
        shots.append(_worst_shot((maps[0] != maps[1]) & judged, at))
    width = 3.5 * len(shots) if len(shots) > 1 else 5.0
    height = width / len(shots) + 0.32
    figure = Figure((width, height), dpi=100, facecolor=GROUND)
    window = window_of(intensity, canonical.channels[0])
    edge = _edge(maps, canonical)
    for i, (plane, where, name) in enumerate(shots):
        axes = figure.add_axes((i / len(shots), 0, 1 / len(shots) - 0.003, 1 - 0.32 / height), facecolor="black")
        _panel(axes, plane, canonical, maps, where, edge, window, name, placed)
    how: dict[str, Any] = {"y": 1 - 0.16 / height, "va": "center", "fontsize": 9, "parse_math": False, "family": fonts(title + note)}
    figure.text(0.005, s=title, color=INK, weight="bold", **how)
    figure.text(0.995, s="prediction", color=FOUND, ha="right", **how)
    figure.text(0.995 - 0.8 / width, s="truth", color=TRUTH, ha="right", **how)
    figure.text(0.995 - 1.4 / width, s=note, color=INK, ha="right", **how)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=GROUND)
    return out.getvalue()


def _worst_shot(differs: np.ndarray, at: tuple[int, int, int]) -> tuple[Any, tuple[int, ...], str]:
    """The slice with most wrong voxels: an axial one, or coronal or sagittal where the axial one is on show already."""
    for plane in PLANES:
        counts = differs.sum(tuple(a for a in range(3) if a != plane.axis))
        worst = int(counts.argmax())
        if counts[worst] and worst != at[plane.axis]:
            where = np.argwhere(differs.take(worst, plane.axis)).mean(0).astype(int).tolist()
            where.insert(plane.axis, worst)
            return plane, tuple(where), f"Largest difference, {plane.name.lower()}"
    return AXIAL, at, "Axial"


def _target(maps: Sequence[np.ndarray], spacing: Sequence[float]) -> tuple[int, int, int]:
    """The voxel of the truth, or else of the prediction, that lies nearest to its middle; without either, the image's middle."""
    for mask in maps:
        if mask.any():
            box = Box.of(mask)
            part = mask[box.slices] > 0  # the indices of an organ's voxels would take gigabytes
            far = np.zeros((1, 1, 1), np.float32)
            for axis, mm in enumerate(spacing):
                others = tuple(a for a in range(3) if a != axis)
                at = np.arange(part.shape[axis])
                away = ((at - np.average(at, weights=part.sum(others))) * mm) ** 2
                far = far + np.expand_dims(away.astype(np.float32), others)
            far[~part] = np.inf
            z, y, x = (int(i) + a for i, a in zip(np.unravel_index(far.argmin(), far.shape), box.start))
            return z, y, x
    z, y, x = (n // 2 for n in maps[0].shape)
    return z, y, x


def _edge(maps: Sequence[np.ndarray], image: Image) -> float:
    """The edge in mm of what every panel shows: 1.6 times the structures, at least 40 mm (of a picture: half of it), no more
    than the image."""
    sizes = [n * s for n, s in zip(image.shape, image.spacing[::-1])]
    box = Box.around((maps[0] > 0) | (maps[1] > 0))
    if box is None:
        return max(sizes)
    least = 40.0 if image.shape[0] > 1 else max(sizes) / 2
    return min(max(least, 1.6 * max(n * s for n, s in zip(box.shape, image.spacing[::-1]))), max(sizes))


def _panel(
    axes: Any, plane: Any, image: Image, maps: Sequence[np.ndarray], at: Sequence[int], edge: float, window: Any, name: str, placed: bool
) -> None:
    from matplotlib.patheffects import withStroke

    mm = image.spacing[::-1]
    dy, dx = mm[plane.rows], mm[plane.columns]
    index = at[plane.axis]
    channels = image.channels
    rgb = not placed and len(channels) in (3, 4) and channels.dtype == np.uint8
    pixels = np.moveaxis(channels[:3].take(index, plane.axis + 1), 0, -1) if rgb else channels[0].take(index, plane.axis)
    rows, columns = pixels.shape[:2]
    extent = (-0.5 * dx, (columns - 0.5) * dx, (rows - 0.5) * dy, -0.5 * dy)
    how: dict[str, Any] = {} if rgb else {"cmap": "gray", "vmin": window[0], "vmax": window[1]}
    axes.imshow(pixels, extent=extent, interpolation="bilinear", aspect="auto", **how)
    for mask, color in zip(maps, (TRUTH, FOUND)):
        cut = mask.take(index, plane.axis)
        for value in np.unique(cut[cut > 0]):
            xs, ys = np.arange(-1, columns + 1) * dx, np.arange(-1, rows + 1) * dy
            axes.contour(xs, ys, np.pad(cut == value, 1), levels=[0.5], colors=[color], linewidths=1.1)

    def span(centre: float, low: float, high: float) -> tuple[float, float]:
        """About the centre, moved so that no more black than needed is seen."""
        middle = (low + high) / 2 if edge >= high - low else min(max(centre, low + edge / 2), high - edge / 2)
        return middle - edge / 2, middle + edge / 2

    axes.set_xlim(*span(at[plane.columns] * dx, extent[0], extent[1]))
    low, high = span(at[plane.rows] * dy, extent[3], extent[2])
    axes.set_ylim((low, high) if plane.up else (high, low))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color="#2a2d31", linewidth=0.8)
    text: dict[str, Any] = {
        "transform": axes.transAxes,
        "path_effects": [withStroke(linewidth=1.8, foreground="black")],
        "parse_math": False,
    }
    if placed:
        # Canonical images run to the patient's left, posterior and superior.
        left, right = ("R", "L") if plane.columns == 2 else ("A", "P")
        top, bottom = ("S", "I") if plane.up else ("A", "P")
        for x, y, letter in ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.975, top), (0.5, 0.025, bottom)):
            axes.text(x, y, letter, color="#ffe14d", fontsize=8, ha="center", va="center", weight="bold", **text)
        axes.text(0.015, 0.985, f"{name}\nslice {index + 1} of {image.shape[plane.axis]}", color=INK, fontsize=7.5, va="top", **text)
    length = max((m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5) if m * 10.0**e <= 0.3 * edge), default=edge)
    axes.plot([0.04, 0.04 + length / edge], [0.04, 0.04], color=INK, linewidth=2, transform=axes.transAxes)
    axes.text(0.04, 0.055, f"{length:g} {'mm' if placed or image.spacing[:2] != (1.0, 1.0) else 'px'}", color=INK, fontsize=7.5, **text)


class Worst:
    """evaluate(..., seen=Worst(folder, card.intensity)) keeps pictures of the cases with the lowest Dice in folder/pictures.

    Only a case that is among the worst so far is drawn, so that thousands of cases cost a few dozen pictures.
    """

    def __init__(self, folder: str | Path, intensity: dict[str, Any] | None = None, keep: int = 6) -> None:
        self.folder, self.intensity, self.keep = Path(folder) / "pictures", intensity, keep
        self.cases: list[tuple[float, str, Path]] = []

    def __call__(self, item: Item, prediction: Prediction, rows: list[Row]) -> None:
        if not self.cases:  # only now: those of the last time are the report's until there are others
            for old in self.folder.glob("worst-*.png"):
                with suppress(OSError):  # Windows, while a viewer shows it
                    old.unlink()
        dice = float(np.mean([r["dice"] for r in rows]))
        if len(self.cases) >= self.keep and dice >= self.cases[-1][0]:
            return
        note = ", ".join(f"{r['label']} {r['dice']:.2f}" for r in rows[:4]) + (" …" if len(rows) > 4 else "")
        png = overlay(item.image, item.truth, prediction.labels.array, self.intensity, item.name, f"Dice: {note}")
        path = self.folder / f"worst-{file_name(item.name)}.png"
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(png)
        except UserError as e:
            if isinstance(e.__cause__, PermissionError):
                return  # the former picture of this case is what is shown, and is no picture of this result
            raise
        self.cases = sorted([*self.cases, (dice, item.name, path)])
        for _, _, dropped in self.cases[self.keep :]:
            with suppress(OSError):
                dropped.unlink(missing_ok=True)
        self.cases = self.cases[: self.keep]
        listed = [{"case": name, "dice": round(d, 4), "file": p.name} for d, name, p in self.cases]
        write_text(self.folder / "worst.json", json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------------------------- figures


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _svg(figure: Any) -> str:
    """As a data URL; the same figure gives the same text."""
    from matplotlib import rc_context

    out = io.BytesIO()
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "unetseg", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _png(folder: Path, name: Any) -> str | None:
    """As a data URL; None for what is no PNG in this very folder: a shared run may name any file that whoever reports it can read."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or not (folder / name).is_file():
        return None
    content = (folder / name).read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode() if content.startswith(b"\x89PNG\r\n\x1a\n") else None


def _curves(lines: list[live.Line]) -> str | None:
    steps = [line for line in lines if line["event"] == "step" and line.get("loss") is not None]
    checks = [line for line in lines if line["event"] == "validation"]
    if not checks and len(steps) < 2:
        return None
    figure = _figure(12, 3.4)
    left, right = figure.subplots(1, 2)
    for rows, how in ((steps, {"color": "#b8bec6", "linewidth": 0.8}), (checks, {"color": "black", "linewidth": 1.6, "marker": "."})):
        pairs = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
        if pairs:
            left.plot(*zip(*pairs), **how)
    left.set(xlabel="step", ylabel="training loss")
    rates = [(r["step"], r["learning_rate"]) for r in steps or checks if r.get("learning_rate")]
    if len(rates) > 1:
        other = left.twinx()
        other.plot(*zip(*rates), color=COLORS[1], linewidth=0.9, linestyle=":")
        other.set_yscale("log")
        other.set_ylabel("learning rate (dotted)", color=COLORS[1])
    names = list(dict.fromkeys(n for r in checks for n, dice in r.get("dice_per_class", {}).items() if dice is not None))
    for i, name in enumerate(names if len(names) > 1 else []):
        pairs = [(r["step"], r["dice_per_class"][name]) for r in checks if r.get("dice_per_class", {}).get(name) is not None]
        text = label_text(name) if i < NAMED else f"and {len(names) - NAMED} more" if i == NAMED else None
        right.plot(*zip(*pairs), color=COLORS[i % len(COLORS)], linewidth=1, label=text)
    pairs = [(r["step"], r["dice"]) for r in checks if r.get("dice") is not None]
    if pairs:
        right.plot(*zip(*pairs), color="black", linewidth=1.8, label="mean" if len(names) > 1 else label_text((names or ["Dice"])[0]))
        best = max(pairs, key=lambda p: p[1])
        right.plot(*best, "o", color="black", markersize=5)
        right.annotate(f"{best[1]:.3f}", best, textcoords="offset points", xytext=(0, -12), ha="center", fontsize=8)
        right.legend(fontsize=8, loc="lower right", framealpha=0.8, edgecolor="none")
    right.set(xlabel="step", ylabel="Dice in validation", ylim=(None, 1))
    return _svg(figure)


def _quality(rows: list[Row], facts: dict[str, Any]) -> str | None:
    """Every case's Dice with the mean's interval; mean ROC curves; volumes as Bland and Altman plot them."""
    names = list(facts["labels"])[: len(COLORS)]
    roc = {n: c for n, c in facts.get("roc", {}).items() if n in names}
    figure = _figure(13.5 if roc else 9.5, 3.4)
    panels = figure.subplots(1, 3 if roc else 2)
    strip, agreement = panels[0], panels[-1]
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        own = [r for r in rows if r["label"] == name]
        color = COLORS[i]
        dice = [r["dice"] for r in own]
        strip.plot(i + rng.uniform(-0.18, 0.18, len(dice)), dice, ".", color=color, alpha=0.55, markersize=5)
        mean = facts["labels"][name]["dice"]
        if mean["low"] is not None:
            strip.plot([i + 0.3] * 2, [mean["low"], mean["high"]], color="black", linewidth=1.6)
        strip.plot(i + 0.3, mean["mean"], "D", color="black", markersize=4)
        pairs = [((r["volume_ml"] + r["truth_ml"]) / 2, r["volume_error_ml"]) for r in own if r["state"] != "absent"]
        if pairs:
            agreement.plot(*zip(*pairs), ".", color=color, alpha=0.6, label=label_text(name))
        if len(pairs) > 2:
            errors = np.array([p[1] for p in pairs])
            for k, style in ((0, "-"), (-1.96, ":"), (1.96, ":")):
                agreement.axhline(errors.mean() + k * errors.std(ddof=1), color=color, linewidth=0.8, linestyle=style)
    strip.set(ylabel="Dice of each case", xlim=(-0.5, len(names) - 0.3), ylim=(min([0.5, *(r["dice"] for r in rows)]) - 0.02, 1.01))
    strip.set_xticks(range(len(names)), [label_text(n) for n in names], rotation=0 if len(names) < 3 else 25)
    if roc:
        for name, curve in roc.items():
            area = facts["labels"][name].get("auc")
            text = label_text(name) + (f", AUC {area['mean']:.4f}" if area else "")
            panels[1].plot(facts["fpr"], curve, color=COLORS[names.index(name)], label=text)
        panels[1].set(xlabel="false positive rate (voxels of the image)", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
        panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    agreement.axhline(0, color="#9aa0a6", linewidth=0.6)
    agreement.set(xlabel="mean of found and true volume (mL)", ylabel="found minus true (mL)")
    if len(names) > 1:
        agreement.legend(fontsize=8, framealpha=0.8, edgecolor="none")
    return _svg(figure)


# --------------------------------------------------------------------------------------------------------------- report


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); delete it, or let it be written again.") from e


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) lines."""
    if isinstance(value, dict) and value:
        return [line for k, v in value.items() for line in _flat(v, f"{name}.{k}" if name else str(k))]
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [line for i, v in enumerate(value) for line in _flat(v, f"{name}[{i}]")]
    return [(name, ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value))]


def _cell(value: Any, digits: int = 3) -> dict[str, Any]:
    """What is shown, and what is sorted by: nothing comes last."""
    if isinstance(value, float) and math.isfinite(value):
        return {"text": f"{value:.{digits}f}", "sort": f"{value:.9g}", "number": True}
    return {"text": "–" if value is None else str(value), "sort": "" if value is None else str(value), "number": value is None}


def write(folder: str | Path) -> Path:
    """Write folder/report.html from what the folder holds, and return its path. UserError where there is nothing to report."""
    import jinja2

    from . import metrics
    from .train import WEIGHTS, weights_hash

    folder = Path(folder)
    lines, run, scored = live.read(folder / "live.jsonl"), _json(folder / "run.json") or {}, _json(folder / "metrics.json")
    if not lines and not scored:
        raise UserError(f"{folder} holds neither live.jsonl nor metrics.json; name the folder of a training run.")
    own = scored and scored["summary"].get("weights")  # a retraining says none: it scores the weights as it reports them
    stale = bool(own) and (folder / WEIGHTS).is_file() and own != weights_hash(folder)
    scored = None if stale else scored
    facts, rows = (scored["summary"], scored["rows"]) if scored else ({"labels": {}}, [])
    columns = [k for k in HEADINGS if any(r.get(k) is not None for r in rows)]
    digits = {k: metrics.decimals(k, (r.get(k) for r in rows), DIGITS.get(k, 3)) for k in columns}
    pictures = folder / "pictures"
    listed = _json(pictures / "worst.json") or [] if scored else []
    plan = folder / "plan.md" if (folder / "plan.md").is_file() else folder.parent / "plan.md"
    config = run.get("config", {})
    # Thousands of digests are for a program, which finds them in run.json.
    data = {
        part: f"{len(cases)} cases, SHA-256 {dataset_hash(cases)}"
        for part, cases in (run.get("data") or {}).items()
        if isinstance(cases, dict)
    }
    last = {line["event"]: line for line in lines}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        name=", ".join(filter(None, (config.get("model", {}).get("name"), folder.resolve().name))),
        made=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        facts=facts,
        stale=stale,
        figure=metrics.text,
        summary_columns=[(k, HEADINGS[k], digits.get(k, 3)) for k in HEADINGS if any(k in own for own in facts["labels"].values())],
        columns=[("case", "Case"), ("label", "Label"), *((k, HEADINGS[k]) for k in columns), ("state", "State")],
        rows=[
            [_cell(r.get(k), digits.get(k, 3)) for k in ("case", "label", *columns, "state")] for r in sorted(rows, key=lambda r: r["dice"])
        ],
        curves=_curves(lines),
        quality=_quality(rows, facts) if rows else None,
        shown=len(COLORS),
        worst=[(w["case"], png) for w in listed if (png := _png(pictures, w["file"]))],
        examples=[
            (p.stem.removeprefix("example-"), png) for p in sorted(pictures.glob("example-*.png")) if (png := _png(pictures, p.name))
        ],
        finetune=_json(folder / "finetune.json"),
        last=last.get("validation"),
        end=lines[-1] if lines and lines[-1]["event"] == "end" else None,  # else it went on since
        plan=plan.read_text("utf-8") if plan.is_file() and not plan.is_symlink() else "",
        settings=_flat(config),
        environment=_flat({k: v for k, v in run.items() if k != "config"} | ({"data": data} if data else {})),
        truth=TRUTH,
        found=FOUND,
    )
    write_text(folder / "report.html", html)
    return folder / "report.html"
