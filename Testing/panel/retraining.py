"""Trainings made by hand: the files that UNetSegmentationLib.training and unetseg_training write, in any state."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LABELS = (
    {"value": 1, "name": "Anterior", "color": [230, 159, 0]},
    {"value": 2, "name": "Posterior", "color": [86, 180, 233]},
)
SHAPE, SPACING = (24, 48, 40), (0.8, 0.8, 1.2)  # (z, y, x) voxels, (x, y, z) mm
CASE = "case-07"


def make_job(dataset: Path, place: str = "20260102-030405-toy", title: str = "toy", **fields: Any) -> Path:
    """A job's folder; by default of a training that this very process runs."""
    from UNetSegmentationLib.training import process_mark

    folder = dataset / "retrain" / place
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format": 1,
        "state": "training",
        "text": "Training",
        "name": title,
        "base": "toy-1.0.0",
        "dataset": "",
        "package": None,
        "options": {"quick": True, "device": "auto", "minutes": None, "name": ""},
        "started": 1767320645.0,
        "launched": time.time(),
        "pid": os.getpid(),
        "mark": process_mark(os.getpid()),
        "host": socket.gethostname(),
        "fraction": 0.35,
        "seconds_left": 250.0,
        "estimate": 540.0,
        "dice": 0.871,
    }
    (folder / "job.json").write_text(json.dumps(data | fields), "utf-8")
    return folder


def change(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "job.json").read_text("utf-8"))
    (folder / "part").write_text(json.dumps(data | fields), "utf-8")
    os.replace(folder / "part", folder / "job.json")


def curve(
    steps: int = 400, every: int = 2, check: int = 40, total: int = 600, labels: Sequence[str] = ("Anterior", "Posterior")
) -> list[dict]:
    """The lines of a training that goes well."""
    rng = np.random.default_rng(3)
    lines: list[dict[str, Any]] = [
        {"event": "start", "time": 0.0, "step": 0, "epoch": 0, "format": 1, "labels": list(labels), "steps": total}
    ]
    best: dict[str, Any] | None = None
    for step in range(every, steps + 1, every):
        loss = float(0.25 + 0.9 * np.exp(-step / 90) + 0.06 * rng.normal())
        lines.append({"event": "step", "time": float(step), "step": step, "epoch": step // check, "loss": loss, "seconds_left": 30.0})
        if step % check == 0:
            dice = {name: float(0.9 - 0.05 * i - 0.5 * np.exp(-step / 110) + 0.01 * rng.normal()) for i, name in enumerate(labels)}
            mean = float(np.mean(list(dice.values())))
            if best is None or mean > best["dice"]:
                best = {"dice": round(mean, 5), "step": step}
            fields = {"loss": 0.25 + 0.9 * float(np.exp(-step / 90)), "dice": mean, "dice_per_class": dice, "best": best}
            lines.append({"event": "validation", "time": float(step), "step": step, "epoch": step // check, **fields, "pictures": []})
    return lines


def write_lines(path: Path, lines: Sequence[dict[str, Any]], mode: str = "w") -> None:
    with open(path, mode, encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def figure(mean: float, half: float, cases: int = 6) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "median": mean, "cases": cases}


def _figures(dice: tuple[float, float], far: tuple[float, float], volume: tuple[float, float], sure: bool) -> dict[str, Any]:
    out = {}
    for key, (before, after), half in (("dice", dice, 0.02), ("hausdorff95_mm", far, 0.31), ("volume_error_percent", volume, 3.2)):
        change = after - before
        out[key] = {
            "before": figure(before, half),
            "after": figure(after, half),
            "change": figure(change, abs(change) / 2 if sure else half),
        }
    return out


def make_result(folder: Path, package: Path, verdict: str = "better", worst: bool = True, sure: bool = True) -> None:
    """result.json with the package and a worst case's masks."""
    import shutil

    sign = -1 if verdict == "worse" else 1
    sentences = {
        "better": "Better: Dice 0.812 before, 0.871 after on 6 held-out cases.",
        "same": "No worse: Dice 0.868 before, 0.871 after on 6 held-out cases; the difference may be chance.",
        "worse": "Worse: Dice 0.871 before, 0.812 after on 6 held-out cases.",
    }
    shutil.copyfile(package, folder / package.name)
    labels = {
        "Anterior": _figures((0.84, 0.84 + sign * 0.05), (1.62, 1.62 - sign * 0.4), (-6.3, 1.2), sure),
        "Posterior": _figures((0.79, 0.79 + sign * 0.06), (2.05, 2.05 - sign * 0.7), (8.4, 2.9), sure),
    }
    cases = [make_case(folder / "check", CASE, LABELS)] if worst else []
    data = {
        "format": 1,
        "verdict": verdict,
        "sentence": sentences[verdict],
        "package": package.name,
        "parent": "toy-1.0.0",
        "cases": 6,
        "patients": 5,
        "labels": labels,
        "mean": {"dice": _figures((0.812, 0.812 + sign * 0.059), (1, 1), (1, 1), sure)["dice"]},
        "worst": cases,
    }
    (folder / "result.json").write_text(json.dumps(data), "utf-8")
    change(folder, state="finished", package=package.name, verdict=verdict, fraction=1.0, seconds_left=None)


def _ellipsoid(at: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    grid = np.indices(SHAPE)
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, at, radii)) <= 1


def make_case(folder: Path, name: str, labels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The files of a worst case: an image and three masks; the masks before are too small and shifted."""
    from UNetSegmentationLib.image import Image, write_image

    rng = np.random.default_rng(1)
    true = np.zeros(SHAPE, np.uint8)
    true[_ellipsoid((12, 18, 20), (7, 8, 9))] = 1
    true[_ellipsoid((12, 32, 20), (6, 7, 8))] = 2
    before, after = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    before[_ellipsoid((11, 21, 17), (6, 6, 7))] = 1
    before[_ellipsoid((12, 35, 23), (5, 6, 6))] = 2
    after[_ellipsoid((12, 18.5, 20.5), (7, 8, 9))] = 1
    after[_ellipsoid((12, 32.5, 20), (6, 7, 8))] = 2
    array = (rng.normal(60, 12, SHAPE) + 60 * (true > 0) + 15 * (true == 2)).astype(np.int16)
    matrix = np.diag([-1.0, -1.0, 1.0]).ravel()
    files = {}
    folder.mkdir(exist_ok=True)
    for key, values in (("image", array), ("truth", true), ("before", before), ("after", after)):
        image = Image(values, SPACING, (12.0, 34.0, -20.0), tuple(matrix))
        write_image(image, folder / f"{name}_{key}.nii.gz")
        files[key] = f"{folder.name}/{name}_{key}.nii.gz"
    return {"case": name, "dice_before": 0.612, "dice_after": 0.951, "files": files}


def make_picture(path: Path, hue: int = 90) -> None:
    """A PNG of 700 x 200 pixels, as a training draws its examples: brighter to the right, darker to the top."""
    y, x = np.mgrid[:200, :700]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(np.stack([x * 255 // 700, np.full_like(x, hue), (199 - y) * 255 // 200], -1).astype(np.uint8), path)


def make_pictures(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Two examples, which the last validation names."""
    names = [f"pictures/example-{i}.png" for i in range(2)]
    for i, name in enumerate(names):
        make_picture(folder / name, 60 + 120 * i)
    next(line for line in reversed(lines) if line["event"] == "validation")["pictures"] = names


def use_folder(folder: Path) -> None:
    """As chosen in an earlier session; before the module is opened."""
    import qt

    qt.QSettings().setValue("UNetSegmentation/TrainingSet", str(folder))


def save_picture(picture: np.ndarray, path: Path) -> None:
    import vtk
    from vtk.util.numpy_support import numpy_to_vtk

    height, width, _ = picture.shape
    image = vtk.vtkImageData()
    image.SetDimensions(width, height, 1)
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(picture[::-1]).reshape(-1, 3), deep=True))
    writer = vtk.vtkPNGWriter()
    writer.SetFileName(str(path))
    writer.SetInputData(image)
    writer.Write()


def beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    gap = np.full((pictures[0].shape[0], 6, 3), 255, np.uint8)
    return np.concatenate([pictures[0], gap, *pictures[1:]], 1)
