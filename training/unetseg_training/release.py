"""Turn a finished run into the bundled package: export, score on the held-out fold through predict(), write the card.

    python -m unetseg_training.release hippocampus-3d runs/hippocampus-3d/fold0-seed0
    python -m unetseg_training.release lung-nodule-click runs/lung-nodule-click
    python -m unetseg_training.release lung-nodule-click                              the bundled weights, scored again
    python -m unetseg_training.release NAME RUN --average NAME-VERSION                the mean of the run's weights and its start's
    python -m unetseg_training.release NAME RUN --fold K                              the figures of another fold's run; no package

The package goes to the core's resources/models; the curve and the score of every held-out case to training/results; with
--output FOLDER all to FOLDER, the latter in a folder of the model's name.
A model that is trained anew gets the next major version: what a user retrains from it counts the minor one up
(training.next_version), and theirs must not meet ours under one name.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from UNetSegmentationLib.engines import Engine
from UNetSegmentationLib.engines.torch import load_network
from UNetSegmentationLib.files import UserError, atomic_path, user_path, write_text
from UNetSegmentationLib.image import Box, Image
from UNetSegmentationLib.inference.click import ClickSession
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import RESOURCES, SUFFIX, Card, ModelPackage, check_together, find_model, write_package
from UNetSegmentationLib.networks import UNet, UNetConfig

from . import lung_nodule_2d, lung_nodule_click, score_click
from .cases import Case, CaseSet
from .config import read
from .export import export
from .lidc import nodules, part
from .report import label_text
from .train import LiveEngine, find, live_package, load_weights, read_run
from .train import held_out as held_out_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
RECIPES = Path(__file__).resolve().parents[1] / "models"
FOLD = 0

CLICK_CARD: dict[str, Any] = {
    **{k: v for k, v in read(lung_nodule_2d.CONFIG).card().items() if k in ("format", "channels", "labels", "activation", "licence")},
    "display": "lung",
    "surroundings": "lung",
    "second_opinion": "lung-nodule-2d-1.2.1",
    "name": "lung-nodule-click",
    "version": "0.6.0",
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
        "made masses of 25 to 90 mm in these two lungs",
    ],
}
NAMES = ("hippocampus-3d", "left-ventricle-2d", "lung-nodule-2d", "lung-nodule-click")


def card_of(name: str) -> dict[str, Any]:
    """A model's card, without figures and files."""
    if name != "lung-nodule-click":
        return read(RECIPES / f"{name}.yaml").card()
    return {**CLICK_CARD, "network": lung_nodule_click.CONFIG.to_json()}


def held_out(name: str, fold: int = FOLD) -> list[tuple[str, CaseSet, list[Case]]]:
    """(set, all of its cases, those of the held-out fold)."""
    if name.startswith("lung-nodule"):
        return [(kind, case_set, part(case_set, True, fold)) for kind, case_set in zip(("crop", "cube"), nodules()[:2])]
    config = read(RECIPES / f"{name}.yaml")
    case_set = find(config)
    return [("crop", case_set, held_out_of(case_set.annotated, config, fold)[1])]


def cases(name: str, fold: int = FOLD) -> Iterator[tuple[str, str, Image, np.ndarray, Box]]:
    """(set, case, image, label map, what the model is given of it) of the held-out fold."""
    for kind, case_set, own in held_out(name, fold):
        for case in own:
            image, truth = case_set.load(case)
            yield kind, case.name, image, truth, lung_nodule_2d.region(case, truth, kind == "cube")


def check_run(name: str, run: Path, fold: int = FOLD) -> None:
    """UserError for a run whose run.json tells that it held out another fold, or was trained on patients of this one."""
    record = read_run(run)
    if record.get("fold", fold) != fold:
        its = "the dataset's own part" if record["fold"] is None else f"fold {record['fold']}"
        raise UserError(f"{run} held out {its} and would be scored on fold {fold}; train fold {fold}, or name its own fold with --fold.")
    if trained := {case for cases_ in record.get("data", {}).values() for case in cases_}:
        for _, case_set, own in held_out(name, fold):
            patients = {case.patient for case in own}
            if known := [c.name for c in case_set.annotated if c.patient in patients and c.name in trained]:
                raise UserError(
                    f"{run} was trained on patients that it would be scored on, those of fold {fold} of 5 ({known[0]}); train with the "
                    f"folds of the recipe {name}.yaml, fold {fold}."
                )


def drive(package: ModelPackage, engine: Engine) -> None:
    """Five real cases through the deployed path."""
    if package.card.data["task"] == "click":
        for case in part(nodules()[1], True)[:5]:
            image, truth = nodules()[1].load(case)
            score_click.play(ClickSession(image, package, engine), truth > 0, tuple(int(v) for v in np.argwhere(truth)[0]), 3)
    else:
        for _, (_, _, image, _, _) in zip(range(5), cases(package.card.name)):
            predict(image, [package], Options(tta="none"), engines=[engine])


def score(package: ModelPackage, engine: Engine | None = None, fold: int = FOLD) -> list[dict[str, Any]]:
    """Dice of every held-out case and label, through the deployed path."""
    if package.card.data["task"] == "click":
        return list(score_click.held_out(package))
    rows = []
    for kind, name, image, truth, roi in cases(package.card.name, fold):
        options = Options(roi=roi, engine="onnx", device="cpu")
        prediction = predict(image, [package], options, engines=[engine] if engine else None)
        row: dict[str, Any] = {"set": kind, "case": name, "seconds": round(prediction.seconds, 3)}
        for label in package.card.labels:
            row[label.name] = round(dice(prediction.labels.array == label.value, truth == label.value), 4)
        rows.append(row)
    return rows


def averaged(model: UNet, card: dict[str, Any], start: ModelPackage) -> UNet:
    """A model (card: its own) with the mean of its weights and of those that it went on from (Wortsman et al., Robust fine-tuning of
    zero-shot models, CVPR 2022): a fine-tuning's last steps move a held-out Dice by chance about as much as by what was learnt. UserError
    for a start that gives other labels, or sees images otherwise."""
    check_together([live_package(card).card, start.card])
    for key in ("spacing", "pixel_mm", "intensity"):
        if card.get(key) != start.card.data.get(key):
            raise UserError(
                f"{start.path.name} was trained with another {key} ({start.card.data.get(key)}) than the run ({card.get(key)}); name the "
                "package that the run went on from."
            )
    old, own = load_network(start).state_dict(), model.state_dict()
    if {key: value.shape for key, value in old.items()} != {key: value.shape for key, value in own.items()}:
        raise UserError(f"{start.path.name} has another network than the run; name the package that the run went on from.")
    model.load_state_dict({key: (value + old[key]) / 2 for key, value in own.items()})
    return model


def summary(rows: list[dict[str, Any]], labels: list[str], command: str) -> dict[str, Any]:
    """The card's "metrics"."""
    fold = "fold 0 of 5, split by patient, not trained on"
    if "dice_1" in rows[0]:
        groups = dict(score_click.table(rows))
        whole = groups["all crops"]
        return {"dice": {labels[0]: whole["dice_1"]}, "cases": whole["cases"], "held_out": fold, "command": command, "clicks": groups}
    main = [r for r in rows if r["set"] == "crop"]
    out: dict[str, Any] = {
        "dice": {n: round(float(np.mean([r[n] for r in main])), 4) for n in labels},
        "dice_10th_percentile": {n: round(float(np.percentile([r[n] for r in main], 10)), 4) for n in labels},
        "cases": len(main),
        "held_out": fold,
        "command": command,
    }
    cubes = [r for r in rows if r["set"] == "cube"]
    if cubes:
        out["dice_in_box_of_twice_the_size"] = {n: round(float(np.mean([r[n] for r in cubes])), 4) for n in labels}
        out["cases_in_box"] = len(cubes)
    return out


def score_fold(name: str, run: Path, fold: int, results: Path) -> None:
    """The rows of a fold's run take their place in results/name/folds.csv beside the other folds'."""
    check_run(name, run, fold)
    package = live_package(card_of(name))
    rows = score(package, LiveEngine(load_weights(run, UNetConfig.from_json(package.card.data["network"]))), fold)
    path = results / name / "folds.csv"
    before = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as f:
            before = [row for row in csv.DictReader(f) if int(row["fold"]) != fold]
    own = [{"fold": fold, **{k: v for k, v in row.items() if k != "seconds"}} for row in rows]
    every = sorted([*before, *own], key=lambda row: int(row["fold"]))
    write_rows(path, every)
    for label in package.card.labels:
        for kind in ("crop", "cube"):
            of = [(int(r["fold"]), float(r[label.name])) for r in every if r["set"] == kind]
            folds = {k: f"{np.mean([d for f, d in of if f == k]):.4f}" for k in sorted({f for f, _ in of})}
            if of:
                dice_ = [d for _, d in of]
                print(f"{label.name}, {kind}s: mean {np.mean(dice_):.4f}, 10th percentile {np.percentile(dice_, 10):.4f}", folds)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(curve: list[dict[str, str]], path: Path) -> None:
    """curve: the lines of curve.csv."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [int(r["step"]) for r in curve]
    left.plot(steps, [float(r["loss"]) for r in curve], color="black")
    left.set(xlabel="step", ylabel="training loss")
    for key in (k for k in curve[0] if k.startswith("dice ")):
        right.plot(steps, [float(r[key]) for r in curve], label=label_text(key.removeprefix("dice ")))
    right.set(xlabel="step", ylabel="Dice on held-out cases", ylim=(0.4, 1))
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("run", type=Path, nargs="?", help="the folder that the training wrote; without it the bundled weights are scored")
    parser.add_argument("--average", metavar="PACKAGE", help="what the run went on from: the mean of its weights and the run's")
    parser.add_argument("--fold", type=int, choices=range(5), help="which the run held out, where it is not the bundled model's")
    parser.add_argument(
        "--output", type=user_path, help="a folder for the package and, under NAME, its figures; default: they replace the bundled ones"
    )
    options = parser.parse_args()
    results = options.output or RESULTS
    if options.fold is not None:
        if not options.run or options.average or options.name == "lung-nodule-click":
            parser.error("--fold goes with a run of another model than lung-nodule-click, and not with --average")
        return score_fold(options.name, options.run, options.fold, results)
    card = card_of(options.name)
    average = f"--average {options.average}" if options.average else ""
    command = " ".join(map(str, filter(None, ("python -m unetseg_training.release", options.name, options.run, average))))

    if options.run:  # before anything is replaced
        with open(options.run / "curve.csv", newline="", encoding="utf-8") as f:
            curve = list(csv.DictReader(f))
        check_run(options.name, options.run)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.run:
            model = load_weights(options.run, UNetConfig.from_json(card["network"]))
            if options.average:
                model = averaged(model, card, find_model(options.average))
            draft = export(model, card, Path(folder) / f"draft{SUFFIX}", drive)
        else:
            draft = find_model(options.name)
            draft = replace(draft, card=Card({**draft.card.data, **card}))
        rows = score(draft)
        metrics = summary(rows, [label.name for label in draft.card.labels], command)
        final = {**{k: v for k, v in draft.card.data.items() if k != "files"}, **card, "metrics": metrics}
        target = (options.output or RESOURCES / "models") / f"{card['name']}-{card['version']}{SUFFIX}"
        write_package(target, final, draft.onnx, draft.safetensors)
    results /= options.name
    write_rows(results / "held_out.csv", rows)
    if options.run:
        shutil.copyfile(options.run / "curve.csv", results / "curve.csv")
        plot(curve, results / "curve.png")
    write_text(results / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; scored in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
