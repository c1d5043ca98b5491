"""Turn a finished run into the bundled package: export, score on the held-out fold through predict(), write the card.

    python -m unetseg_training.release lung-nodule-2d runs/lung-nodule-2d
    python -m unetseg_training.release hippocampus-3d runs/hippocampus-3d
    python -m unetseg_training.release lung-nodule-click runs/lung-nodule-click

The package goes to the core's resources/models; the curve and the score of every held-out case to training/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from UNetSegmentationLib.engines import Engine
from UNetSegmentationLib.image import Box, Image, read_image
from UNetSegmentationLib.inference.click import ClickSession
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import RESOURCES, SUFFIX, ModelPackage, write_package
from UNetSegmentationLib.networks import UNetConfig, build

from . import hippocampus_3d, lung_nodule_2d, lung_nodule_click, score_click
from .data import Source, fold_of, hippocampi, lidc_crops, lidc_cubes
from .export import export

RESULTS = Path(__file__).resolve().parents[1] / "results"

LUNG_CARD: dict[str, Any] = {
    "format": 1,
    "name": "lung-nodule-2d",
    "version": "1.0.0",
    "title": "Lung nodule in a box, slice by slice",
    "description": "2.5D U-Net (one slice and its two neighbours) for one lung nodule of 3 to 32 mm in a box of about twice its "
    "size on chest CT. Not for whole scans: it would also mark vessels. Not a diagnosis.",
    "task": "automatic",
    "dimensions": 2,
    "axis": "axial",
    "context_slices": lung_nodule_2d.CONTEXT,
    "channels": ["CT"],
    "spacing": list(lung_nodule_2d.SPACING),
    "patch": [lung_nodule_2d.PATCH] * 2,
    "divisor": [16, 16],
    "padding": "reflect",
    "intensity": lung_nodule_2d.INTENSITY,
    "display": "lung",
    "labels": [
        {
            "value": 1,
            "name": "Lung nodule",
            "color": [230, 159, 0],
            "terminology": {
                "category": ["SCT", "49755003", "Morphologically Altered Structure"],
                "type": ["SCT", "27925004", "Nodule"],
                "region": ["SCT", "39607008", "Lung"],
            },
        }
    ],
    "activation": "softmax",
    "flip_axes": ["x", "y"],
    "tta": "flips",
    "roi_mm": 50,
    "postprocess": {"largest_component": True, "fill_holes": True},
    "licence": "Apache-2.0. Trained on LIDC-IDRI (CC BY 3.0, Armato et al. 2011, The Cancer Imaging Archive).",
    "training_data": [
        "LIDC-IDRI, 617 nodules (crops, consensus of at least 2 radiologists), four of five folds, CC BY 3.0",
        "LIDC-IDRI, 87 nodules (1 mm cubes, one radiologist), four of five folds, CC BY 3.0",
        "LIDC-IDRI-0001, whole scan, CC BY 3.0",
        "elastix 3DCT_lung, Apache-2.0 (background only)",
    ],
}

HIPPOCAMPUS_CARD: dict[str, Any] = {
    "format": 1,
    "name": "hippocampus-3d",
    "version": "1.0.0",
    "title": "Anterior and posterior hippocampus",
    "description": "3D U-Net for T1 MR cropped around one hippocampus (about 35 x 50 x 35 mm). Not a diagnosis.",
    "task": "automatic",
    "dimensions": 3,
    "channels": ["T1 MR"],
    "spacing": list(hippocampus_3d.SPACING),
    "patch": list(hippocampus_3d.PATCH),
    "divisor": [8, 8, 8],
    "intensity": hippocampus_3d.INTENSITY,
    "display": "mr-percentile",
    "labels": [
        {
            "value": value,
            "name": f"{word} hippocampus",
            "color": color,
            "terminology": {
                "category": ["SCT", "123037004", "Anatomical Structure"],
                "type": ["SCT", "5366008", "Hippocampus"],
                "type_modifier": ["SCT", code, word],
            },
        }
        for value, word, code, color in ((1, "Anterior", "255549009", [86, 180, 233]), (2, "Posterior", "255551008", [230, 159, 0]))
    ],
    "activation": "softmax",
    "flip_axes": ["x"],
    "tta": "flips",
    "roi_mm": None,
    "postprocess": {"largest_component": True},
    "licence": "CC BY-SA 4.0, as its data. Trained on the Medical Segmentation Decathlon, Task04 (Antonelli et al. 2022).",
    "training_data": ["Medical Segmentation Decathlon Task04 Hippocampus, 151 crops, four of five folds, CC BY-SA 4.0"],
}

CLICK_CARD: dict[str, Any] = {
    **{k: LUNG_CARD[k] for k in ("format", "channels", "display", "labels", "activation", "licence")},
    "name": "lung-nodule-click",
    "version": "0.2.0",
    "title": "Lung nodule or mass, by clicks",
    "description": "3D U-Net that outlines the one lung nodule or mass that is clicked on (3 to 80 mm, slices to 5 mm) in chest CT. "
    "More clicks correct it. Not a diagnosis.",
    "task": "click",
    "dimensions": 3,
    "spacing": list(lung_nodule_click.SPACING),
    "patch": list(lung_nodule_click.PATCH),
    "divisor": [4, 8, 8],
    "intensity": {"mode": "window", "level": lung_nodule_click.LEVEL, "width": lung_nodule_click.WIDTH},
    "training_data": [
        "LIDC-IDRI, 616 nodules (crops, consensus of at least 2 radiologists), four of five folds, CC BY 3.0",
        "LIDC-IDRI, 86 nodules (1 mm cubes, one radiologist), four of five folds, CC BY 3.0",
        "LIDC-IDRI-0001 (lung without its nodule), CC BY 3.0",
        "elastix 3DCT_lung, Apache-2.0 (background only)",
    ],
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lung-nodule-2d": (lung_nodule_2d, LUNG_CARD),
    "hippocampus-3d": (hippocampus_3d, HIPPOCAMPUS_CARD),
    "lung-nodule-click": (lung_nodule_click, CLICK_CARD),
}


def twice(box: Box, shape: tuple[int, ...]) -> Box:
    """A box of twice the size about the same centre, inside the image."""
    return box.grown([(n + 1) // 2 for n in box.shape]) & Box.whole(shape)


def _cases(name: str) -> Iterator[tuple[str, Source, bool]]:
    """(set, case, whether the model gets a box of twice the target's size) of the held-out fold."""
    if name == "hippocampus-3d":
        fold = fold_of([s.patient for s in hippocampi()])
        yield from (("crop", s, False) for s in hippocampi() if fold[s.patient] == hippocampus_3d.HELD_OUT)
    else:
        fold = lung_nodule_2d.sources()[3]
        for kind, sources in (("crop", lidc_crops()), ("cube", lidc_cubes())):
            yield from ((kind, s, kind == "cube") for s in sources if fold[s.patient] == lung_nodule_2d.HELD_OUT)


def drive(package: ModelPackage, engine: Engine) -> None:
    """Five real cases through the deployed path."""
    if package.card.data["task"] == "click":
        for source in lidc_cubes()[:5]:
            image, truth = _read(source)
            score_click.play(ClickSession(image, package, engine), truth.array > 0, tuple(np.argwhere(truth.array)[0]), 3)
    else:
        for _, source, _ in list(_cases(package.card.name))[:5]:
            predict(read_image(source.image), [package], Options(tta="none"), engines=[engine])


def _read(source: Source) -> tuple[Image, Image]:
    assert source.mask is not None
    return read_image(source.image), read_image(source.mask)


def score(package: ModelPackage, name: str, tta: str | None = None) -> list[dict[str, Any]]:
    """Dice of every held-out case and label, through the deployed path."""
    if package.card.data["task"] == "click":
        return list(score_click.held_out(package))
    rows = []
    for kind, source, boxed in _cases(name):
        image, truth = _read(source)
        box = Box.around(truth.array > 0)
        assert box is not None
        roi = twice(box, image.shape) if boxed else Box.whole(image.shape)
        prediction = predict(image, [package], Options(roi=roi, tta=tta, engine="onnx", device="cpu"))
        row: dict[str, Any] = {"set": kind, "case": source.image.name, "seconds": round(prediction.seconds, 3)}
        for label in package.card.labels:
            row[label.name] = round(dice(prediction.labels.array == label.value, truth.array == label.value), 4)
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]], labels: list[str], command: str) -> dict[str, Any]:
    """The card's "metrics"."""
    held_out = "fold 0 of 5, split by patient, not trained on"
    if "dice_1" in rows[0]:
        groups = dict(score_click.table(rows))
        whole = groups["all crops"]
        return {"dice": {labels[0]: whole["dice_1"]}, "cases": whole["cases"], "held_out": held_out, "command": command, "clicks": groups}
    main = [r for r in rows if r["set"] == "crop"]
    out: dict[str, Any] = {
        "dice": {n: round(float(np.mean([r[n] for r in main])), 4) for n in labels},
        "dice_10th_percentile": {n: round(float(np.percentile([r[n] for r in main], 10)), 4) for n in labels},
        "cases": len(main),
        "held_out": held_out,
        "command": command,
    }
    cubes = [r for r in rows if r["set"] == "cube"]
    if cubes:
        out["dice_in_box_of_twice_the_size"] = {n: round(float(np.mean([r[n] for r in cubes])), 4) for n in labels}
        out["cases_in_box"] = len(cubes)
    return out


def plot(curve: list[dict[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure((7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [r["step"] for r in curve]
    left.plot(steps, [r["loss"] for r in curve], color="black")
    left.set(xlabel="step", ylabel="training loss")
    for key in (k for k in curve[0] if k not in ("step", "loss", "seconds_per_step")):
        right.plot(steps, [r[key] for r in curve], label=key.replace("_", " "))
    right.set(xlabel="step", ylabel="Dice on held-out patches", ylim=(0.4, 1))
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("run", type=Path, help="the folder that the training wrote")
    parser.add_argument("--output", type=Path, default=RESOURCES / "models")
    options = parser.parse_args()
    module, card = MODELS[options.name]
    config: UNetConfig = module.CONFIG
    model = build(config)
    model.load_state_dict(torch.load(options.run / "checkpoint.pt", weights_only=True)["average"])
    model.eval()

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        draft = export(model, card, Path(folder) / f"draft{SUFFIX}", drive)
        rows = score(draft, options.name)
        labels = [label.name for label in draft.card.labels]
        metrics = summary(rows, labels, f"python -m unetseg_training.release {options.name} runs/{options.name}")
        final = {**{k: v for k, v in draft.card.data.items() if k != "files"}, "metrics": metrics}
        options.output.mkdir(parents=True, exist_ok=True)
        target = options.output / f"{card['name']}-{card['version']}{SUFFIX}"
        write_package(target, final, draft.onnx, draft.safetensors)
    results = RESULTS / options.name
    results.mkdir(parents=True, exist_ok=True)
    with open(results / "held_out.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (options.run / "curve.jsonl").read_text("utf-8")
    (results / "curve.jsonl").write_text(text, "utf-8")
    plot([json.loads(line) for line in text.splitlines()], results / "curve.png")
    (results / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    print(json.dumps(metrics, indent=2))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; scored in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
