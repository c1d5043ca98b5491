"""How good a model is, per case and class, measured on what predict() gives: the deployed path.

Dice, Hausdorff distance and surface Dice are MONAI's, the ROC curve is TorchMetrics'; distances are in mm by the image's
own spacing. What each figure means, and what it is where a mask is empty:

    figure               meaning                                              both empty   one of them empty
    dice                 2 |P & T| / (|P| + |T|)                              1            0
    hausdorff_mm         the farthest that one surface strays from the other  None         None: no distance
    hausdorff95_mm       the larger of both directions' 95th percentiles      None         None: no distance
    surface_dice         share of both surfaces within tolerance_mm           None         0
    sensitivity          share of the truth that was found                    None         0, or None without truth
    specificity          share of the image's other voxels left alone         1            as computed
    precision            share of what was found that is right                None         0, or None if nothing was found
    auc                  area under the ROC curve of the voxels' probability  None         None without truth
    volume_error_ml      volume found minus true volume                       0            as computed
    volume_error_percent the same in percent of the true volume               None         -100, or None without truth
    dice_3_clicks        of a click model, whose others are after one click   -            0

tolerance_mm is 1 mm, but at most 5 voxels of the finest axis: within 1 mm any mask of a cell 0.02 mm wide would be right.
None counts in no mean; how often a class was missed, or found where there is none, stands beside the means, so that no
mean gets better by it. Of a class that some cases hold and others do not, summary() also has the Dice of those that do
(dice_where_present): by the others' 1 a model that finds nothing has 0.5 on a set of which every second case is empty.
Voxels whose truth is cases.IGNORE are left out of everything.
Specificity and AUC depend on how much background the image shows: compare them on the same images.
A picture of one slice is measured in its plane.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics import (
    compute_confusion_matrix_metric,
    compute_dice,
    compute_surface_dice,
    get_confusion_matrix,
)
from monai.metrics.utils import get_edge_surface_distance
from torchmetrics.functional.classification import binary_roc
from UNetSegmentationLib.engines import Engine
from UNetSegmentationLib.files import UserError, atomic_path, write_text
from UNetSegmentationLib.image import Box, Image
from UNetSegmentationLib.inference.predict import Options, Prediction, predict
from UNetSegmentationLib.model import Label, ModelPackage
from UNetSegmentationLib.nodule import cell

from .cases import IGNORE

SEED = 20261122
DRAWS = 2000
WHERE_PRESENT = "dice_where_present"
PRESENT = ("found", "missed")  # states of a label that the truth holds
FIGURES = (
    "dice", WHERE_PRESENT, "hausdorff_mm", "hausdorff95_mm", "surface_dice", "sensitivity", "specificity", "precision", "auc",
    "volume_error_ml", "volume_error_percent", "dice_3_clicks",
)  # fmt: skip
HIGHER_IS_BETTER = {"dice", WHERE_PRESENT, "dice_3_clicks", "surface_dice", "sensitivity", "specificity", "precision", "auc"}
# The rates of wrong alarms at which ROC curves are kept and averaged: dense near 0, where segmentation happens.
FPR = tuple((np.linspace(0, 1, 51) ** 4).round(9).tolist())
TOLERANCE_MM, TOLERANCE_VOXELS = 1.0, 5
# Sorting more probabilities than this takes gigabytes; a whole CT then has no AUC.
ROC_VOXELS = 1 << 25

Row = dict[str, Any]


class Item(NamedTuple):
    """A case to score. truth: label map (z, y, x) on the image's grid. patient groups cases that belong together."""

    name: str
    image: Image
    truth: np.ndarray
    patient: str = ""


Seen = Callable[[Item, Prediction, list[Row]], None]


# ----------------------------------------------------------------------------------------------------------- one case


def score(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    labels: Sequence[Label],
    probability: np.ndarray | None = None,
    tolerance_mm: float | None = None,
    surfaces: bool = True,
) -> dict[str, Row]:
    """The figures of every label of one case, by the label's name.

    prediction, truth: label maps (z, y, x); spacing: (x, y, z) mm; probability: (k, z, y, x), one channel a label, for AUC
    and "roc" (the true positive rate at each of FPR). surfaces: False leaves the distances out, which take most of the time.
    """
    if prediction.shape != truth.shape:
        raise UserError(f"The prediction has {prediction.shape} voxels and the truth {truth.shape}; compare masks of one grid.")
    if tolerance_mm is None:
        tolerance_mm = min(TOLERANCE_MM, TOLERANCE_VOXELS * min(spacing))
    if not 0 <= tolerance_mm < math.inf:
        raise UserError(f"The tolerance of the surface Dice must be a length in mm, not {tolerance_mm:g}.")
    out = {}
    judged = (truth != IGNORE) | any(label.value == IGNORE for label in labels)
    total = int(np.count_nonzero(judged))
    for i, label in enumerate(labels):
        found, true = (prediction == label.value) & judged, truth == label.value
        row = _overlap(found, true, total, math.prod(spacing) / 1000)
        row |= _surfaces(found, true, spacing, tolerance_mm) if surfaces else {}
        row["auc"], row["roc"] = _roc(probability[i], true, judged) if probability is not None else (None, None)
        out[label.name] = row
    return out


def _overlap(found: np.ndarray, true: np.ndarray, total: int, voxel_ml: float) -> Row:
    """total: voxels of the image that are judged."""
    box = Box.around(found | true)
    n_found, n_true = int(np.count_nonzero(found)), int(np.count_nonzero(true))
    state = {(True, True): "found", (False, True): "missed", (True, False): "false", (False, False): "absent"}[n_found > 0, n_true > 0]
    row: Row = {"state": state, "volume_ml": n_found * voxel_ml, "truth_ml": n_true * voxel_ml}
    row["volume_error_ml"] = (n_found - n_true) * voxel_ml
    row["volume_error_percent"] = 100 * (n_found - n_true) / n_true if n_true else None
    if box is None:
        return row | {"dice": 1.0, "sensitivity": None, "specificity": 1.0, "precision": None}
    pair = [torch.from_numpy(m[box.slices].astype(np.uint8))[None, None] for m in (found, true)]
    counts = get_confusion_matrix(pair[0], pair[1]).double()  # tp, fp, tn, fn inside the box
    counts[..., 2] += total - math.prod(box.shape)

    def rate(name: str, of: int) -> float | None:
        return float(compute_confusion_matrix_metric(name, counts)) if of else None

    row["dice"] = float(compute_dice(pair[0], pair[1], ignore_empty=False))
    row["sensitivity"], row["specificity"] = rate("sensitivity", n_true), rate("specificity", total - n_true)
    return row | {"precision": rate("precision", n_found)}


def _surfaces(found: np.ndarray, true: np.ndarray, spacing: Sequence[float], tolerance_mm: float) -> Row:
    if not (found.any() and true.any()):
        share = 0.0 if found.any() or true.any() else None
        return {"hausdorff_mm": None, "hausdorff95_mm": None, "surface_dice": share, "tolerance_mm": tolerance_mm}
    box = Box.of(found | true)
    mm = list(spacing[::-1])
    thin = [a for a in range(3) if found.shape[a] == 1][:1]  # one slice has an outline, and no surface
    pair = [torch.from_numpy(np.ascontiguousarray(m[box.slices].squeeze(tuple(thin))))[None, None].float() for m in (found, true)]
    mm = [s for a, s in enumerate(mm) if a not in thin]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of what it does itself
        # Both of compute_hausdorff_distance(), which would look for the surfaces for each anew.
        _, ways, _ = get_edge_surface_distance(*(m[0, 0] for m in pair), spacing=mm, symmetric=True)
        return {
            "hausdorff_mm": max(float(way.max()) for way in ways),
            "hausdorff95_mm": max(float(way.quantile(0.95)) for way in ways),
            "surface_dice": float(compute_surface_dice(*pair, [tolerance_mm], True, spacing=mm, use_subvoxels=True)),
            "tolerance_mm": tolerance_mm,
        }


def _roc(probability: np.ndarray, true: np.ndarray, judged: np.ndarray) -> tuple[float | None, list[float] | None]:
    """The area under the curve, and the true positive rate at each of FPR."""
    if not judged.all():
        probability, true = probability[judged], true[judged]
    if true.all() or not true.any() or true.size > ROC_VOXELS:
        return None, None
    p = torch.from_numpy(np.clip(probability, 0, 1).ravel())
    fpr, tpr, _ = (v.double().numpy() for v in binary_roc(p, torch.from_numpy(true.ravel()).long(), validate_args=False))
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    return area, np.interp(FPR, fpr, tpr).round(5).tolist()


# ----------------------------------------------------------------------------------------------------------- many cases


def case_items(case_set: Any, cases: Iterable[Any] | None = None) -> Iterator[Item]:
    """The cases of a cases.CaseSet, read one after the other; by default all that are annotated."""
    for case in cases if cases is not None else case_set.annotated:
        image, truth = case_set.load(case)
        yield Item(case.name, image, truth, case.patient)


def evaluate(
    package: ModelPackage,
    cases: Iterable[Item | tuple[Any, ...]],
    options: Options = Options(),
    labels: Sequence[Label] | None = None,
    surfaces: bool = True,
    auc: bool = True,
    engine: Engine | None = None,
    seen: Seen | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[Row]:
    """A row for every case and class, through predict(). See score() for the figures.

    labels: what the values of the truth mean, matched to the model's by name (default: the model's own). engine: runs the
    package, e.g. train.LiveEngine of a network that is not exported yet. seen(item, prediction, rows) is shown every case,
    e.g. report.Worst. Raises UserError that names the case.
    """
    card = package.card
    if card.data["task"] != "automatic":
        raise UserError(f"{card.name} is a {card.data['task']} model; score it by simulated clicks, not as an automatic one.")
    values = _values(card.labels, labels)
    rows: list[Row] = []
    for count, given in enumerate(cases):
        item = Item(*given)
        item = item._replace(truth=item.truth.astype(np.uint16, copy=False))  # some formats keep labels as floats
        if progress:
            progress(count, item.name)
        wanted = auc and item.truth.size <= ROC_VOXELS
        how = Options(**{**vars(options), "probabilities": wanted or options.probabilities})
        try:
            prediction = predict(item.image, [package], how, engines=[engine] if engine else None)
            truth = item.truth
            if values is not None:
                truth = values[np.minimum(item.truth, len(values) - 1)]
                if len(values) <= IGNORE + 1:
                    truth[item.truth == IGNORE] = IGNORE
            probability = prediction.probabilities.channels[-len(card.labels) :] if wanted and prediction.probabilities else None
            figures = score(prediction.labels.array, truth, item.image.spacing, card.labels, probability, surfaces=surfaces)
        except UserError as e:
            raise UserError(f"{item.name}: {e}") from e
        head = {"case": item.name, "patient": item.patient or item.name}
        fresh = [{**head, "label": name, **row, "seconds": round(prediction.seconds, 3)} for name, row in figures.items()]
        rows += fresh
        if seen:
            seen(item._replace(truth=truth), prediction, fresh)
    if not rows:
        raise UserError("There is no case with a mask to score; name cases that were held out of the training.")
    return rows


def _values(own: Sequence[Label], labels: Sequence[Label] | None) -> np.ndarray | None:
    """From values of the truth to the model's; None where they are the same. A last entry of 0 takes unknown values."""
    if labels is None:
        return None
    known = {label.key: label.value for label in own}
    missing = [label.name for label in own if label.key not in {other.key for other in labels}]
    if missing:
        raise UserError(f"The cases have no label {', '.join(missing)}, which the model gives; rename the label or score other cases.")
    table = np.zeros(max(label.value for label in labels) + 2, np.uint16)
    for label in labels:
        table[label.value] = known.get(label.key, 0)
    return table


# ------------------------------------------------------------------------------------------------------------ intervals


def interval(values: Sequence[float], groups: Sequence[str] | None = None, seed: int = SEED) -> tuple[float, float] | None:
    """The 95 % bootstrap interval (percentiles) of the mean; None with fewer than two groups.

    groups: e.g. the patient of each value. Whole groups are drawn, since two scans of one patient are no two patients.
    """
    if len(values) == 0:
        return None
    names, at = np.unique(np.asarray(groups if groups is not None else range(len(values))), return_inverse=True)
    if len(names) < 2:
        return None
    sums, counts = np.bincount(at, np.asarray(values, np.float64)), np.bincount(at)
    drawn = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _figure(rows: Sequence[Row], key: str) -> dict[str, Any] | None:
    kept = [r for r in rows if r.get(key) is not None]
    if not kept:
        return None
    values = [float(r[key]) for r in kept]
    bounds = interval(values, [r["patient"] for r in kept])
    worst = float(np.percentile(values, 10) if key in HIGHER_IS_BETTER else np.percentile(np.abs(values), 90))
    out = {"mean": float(np.mean(values)), "low": bounds and bounds[0], "high": bounds and bounds[1]}
    out |= {"median": float(np.median(values)), "worst_tenth": worst}
    places = decimals(key, values, 5, 5)
    return {k: v if v is None else round(v, places) for k, v in out.items()} | {"cases": len(values)}


def decimals(key: str, values: Iterable[float | None], least: int, digits: int = 2) -> int:
    """Of a figure in mm or mL, those that show so many digits of the largest value: of a cell's outline, 0.0008 mm off, two show none."""
    top = max((abs(v) for v in values if v is not None), default=0.0) if key.endswith(("_mm", "_ml")) else 0.0
    return max(least, digits - 1 - math.floor(math.log10(top))) if top else least


def summary(rows: Sequence[Row], **facts: Any) -> dict[str, Any]:
    """Means with 95 % intervals, by class and over the classes. facts: also kept, e.g. held_out, command.

    {"dice": {"mean", "low", "high", "median", "worst_tenth", "cases"}, "labels": {name: {figure: the same, "present",
    "missed", "false"}}, "roc": {name: mean true positive rates at "fpr"}, "cases", "patients", "seed", "draws",
    "tolerance_mm" (the largest, where cases of finer voxels have less), ...facts}.
    The Dice over the classes is the mean of each case's mean; worst_tenth of errors with a sign is of their size;
    dice_where_present is there only where some cases hold none of the label.
    """
    names = list(dict.fromkeys(r["label"] for r in rows))
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    whole = [{"patient": rs[0]["patient"], "dice": float(np.mean([r["dice"] for r in rs]))} for rs in cases.values()]
    out: dict[str, Any] = {"dice": _figure(whole, "dice"), "labels": {}, "roc": {}}
    for name in names:
        own = [r for r in rows if r["label"] == name]
        states = [r.get("state", "found") for r in own]
        figures = {key: _figure(own, key) for key in FIGURES}
        held = [r for r, state in zip(own, states) if state in PRESENT]
        if len(held) < len(own):
            figures[WHERE_PRESENT] = _figure(held, "dice")
        counts = {"present": len(held), "missed": states.count("missed"), "false": states.count("false")}
        out["labels"][name] = {k: v for k, v in figures.items() if v is not None} | counts
        curves = [r["roc"] for r in own if r.get("roc")]
        if curves:
            out["roc"][name] = np.mean(curves, 0).round(5).tolist()
    out |= {"cases": len(cases), "patients": len({r["patient"] for r in rows}), "seed": SEED, "draws": DRAWS}
    if within := [r["tolerance_mm"] for r in rows if r.get("tolerance_mm") is not None]:
        out["tolerance_mm"] = float(f"{max(within):.3g}")
    return out | ({"fpr": list(FPR)} if out["roc"] else {}) | facts


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows of the labels that the truth of some case holds, or all where none does: of another label a model that finds nothing
    had a Dice of 1.000, on its card and in its mean."""
    seen = {r["label"] for r in rows if r["state"] in PRESENT}
    return [r for r in rows if r["label"] in seen] or list(rows)


def difference(before: Sequence[Row], after: Sequence[Row], key: str = "dice") -> dict[str, Any]:
    """The mean change of a figure from one model to another on the same cases, with its interval: {"mean", "low", "high", ...}."""
    old = {(r["case"], r["label"]): r.get(key) for r in before}
    pairs = [(r, old.get((r["case"], r["label"]))) for r in after]
    rows = [{"patient": r["patient"], "change": r[key] - o} for r, o in pairs if o is not None and r.get(key) is not None]
    out = _figure(rows, "change")
    if out is None:
        raise UserError("The two models share no case and label to compare on; score both on the same cases.")
    del out["worst_tenth"]
    return out


def text(value: Any, digits: int = 3) -> str:
    """A figure with its interval as a person reads it: "0.873 (0.851 to 0.894)"."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        bounds = "" if value.get("low") is None else f" ({value['low']:.{digits}f} to {value['high']:.{digits}f})"
        return f"{value['mean']:.{digits}f}{bounds}"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(facts: dict[str, Any]) -> str:
    """A summary() as plain text, a line a class."""
    columns = [k for k in FIGURES if any(k in own for own in facts["labels"].values())]
    lines = [["label", *columns, "missed", "false"]]
    labels = facts["labels"].values()
    digits = {k: decimals(k, (own[k]["mean"] for own in labels if k in own), 2 + (k in HIGHER_IS_BETTER)) for k in columns}
    for name, own in facts["labels"].items():
        lines.append([name, *(text(own.get(k), digits[k]) for k in columns), f"{own['missed']}/{own['present']}", str(own["false"])])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------------------- files


def write(folder: str | Path, rows: Sequence[Row], facts: dict[str, Any], name: str = "metrics") -> None:
    """<name>.csv (a line for each case and class) and <name>.json ({"summary", "rows"}); each whole or not there. A table that is open in
    a spreadsheet, which on Windows holds it, is left and said: the other file has the same."""
    folder = Path(folder)
    flat = [{k: _rounded(v) for k, v in row.items() if k != "roc"} for row in rows]
    text = json.dumps({"summary": facts, "rows": flat}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / f"{name}.json", text + "\n")
    keys = list(dict.fromkeys(k for row in flat for k in row))
    try:
        with atomic_path(folder / f"{name}.csv") as path, path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, keys)
            writer.writeheader()
            writer.writerows({k: cell(v) if isinstance(v, str) else v for k, v in row.items()} for row in flat)
    except UserError as e:
        if not isinstance(e.__cause__, PermissionError):
            raise
        print(f"{e} {name}.json has the same figures.", file=sys.stderr)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
