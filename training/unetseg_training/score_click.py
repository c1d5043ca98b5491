"""How good a click model is with a person's clicks: held-out nodules, and whole scans.

    python -m unetseg_training.score_click [PACKAGE] [--limit N]

The first click is a random voxel of the nodule, each next one lies deepest in the largest connected error, positive or
negative, as a person would place it. Boxes fit, or are drawn more or less loosely. Everything runs through ClickSession, the deployed path.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from UNetSegmentationLib.image import Box, Image, read_image
from UNetSegmentationLib.inference.click import MODEL, ClickSession, box_prompt
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import ModelPackage, find_model

from . import clicks
from .cases import Case
from .lidc import data_folder, nodules, part, textures
from .lung_nodule_click import load

CLICKS = 5


def play(session: ClickSession, truth: np.ndarray, first: tuple[int, ...], count: int = CLICKS) -> tuple[list[float], list[float]]:
    """Dice after each click, and the seconds that each took."""
    turns = list(clicks.play(session, truth, first, count))
    return [turn.dice for turn in turns], [turn.seconds for turn in turns if turn.seconds is not None]


def _sessions(package: ModelPackage, limit: int | None) -> Iterator[tuple[str, Case, ClickSession, np.ndarray]]:
    """Of each held-out nodule its set, its case, a session of one engine for all, and the truth (z, y, x)."""
    engine: Any = None
    for kind, case_set in zip(("crop", "cube"), nodules()[:2]):
        for case in part(case_set, True)[:limit]:
            assert case.label is not None
            image, truth = read_image(case.images[0]), read_image(case.label).array > 0
            session = ClickSession(image, package, engine, options=Options(engine="onnx", device="cpu"))
            engine = session._engine
            yield kind, case, session, truth


def held_out(package: ModelPackage, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """A row for each held-out nodule: Dice after 1 to CLICKS clicks, the worst of two further first clicks, and what kind it is."""
    rng = np.random.default_rng(20261122)
    for kind, case, session, truth in _sessions(package, limit):
        file = case.images[0].name
        inside = np.argwhere(truth)
        firsts = [tuple(int(v) for v in inside[rng.integers(len(inside))]) for _ in range(3)]
        scores, seconds = play(session, truth, firsts[0])
        others = [play(session, truth, first, 1)[0][0] for first in firsts[1:]]
        scan = load(case)
        yield {
            "set": kind,
            "case": file,
            "diameter_mm": round(scan.diameter, 1),
            "texture": textures().get(file, ""),
            "attached": int(not scan.isolated),
            **{f"dice_{n + 1}": round(s, 4) for n, s in enumerate(scores)},
            "first_click_worst_of_3": round(min(scores[0], *others), 4),
            "seconds": round(float(np.median(seconds)), 3),
        }


BOXES = (1.0, 1.25, 1.5, 2.0, 2.5)  # times the nodule's size in each direction


def boxed(package: ModelPackage, limit: int | None = None) -> Iterator[tuple[str, list[float]]]:
    """For each held-out nodule its set and the Dice of a box of each size of BOXES, up to an eighth of the nodule's size aside; NaN where
    the box does not lie in the image, as crops end close to their nodule."""
    rng = np.random.default_rng(20261130)
    for kind, _, session, truth in _sessions(package, limit):
        lesion = Box.of(truth)
        size, middle = np.array(lesion.shape), (np.array(lesion.start) + lesion.stop) / 2
        scores = []
        for times in BOXES:
            low = np.rint(middle + rng.uniform(-0.125, 0.125, 3) * size - times * size / 2).astype(int)
            box = Box(tuple(low), tuple(low + np.rint(times * size).astype(int)))
            scores.append(math.nan)
            if times == 1 or box & Box.whole(truth.shape) == box:
                session.replay([box_prompt(session.image, box)])
                scores[-1] = dice(session.mask, truth)
        yield kind, scores


def whole_scans() -> Iterator[tuple[str, Image, np.ndarray]]:
    """Scans that no click model was trained on, each with one lesion's truth (the second opinion knows LIDC-IDRI-0001's nodule). The
    pyradiomics sample where it is on this machine."""
    folder = data_folder() / "chest_ct"
    yield "LIDC-IDRI-0001", read_image(folder / "LIDC-IDRI-0001_ct.nii.gz"), read_image(folder / "LIDC-IDRI-0001_nodule.nii.gz").array > 0
    tumour = read_image(folder / "LUNG1-001_lungL1_lungR2_cord3_gtv4.nii.gz").array == 4
    yield "LUNG1-001", read_image(folder / "LUNG1-001_ct.nii.gz"), tumour
    folder = data_folder() / "lung_gtv_dicom_rtstruct"
    yield "pat_3", read_image(folder / "pat_3"), read_image(folder / "pat_3_gtv_expected.nii.gz").array > 0
    sample = Path("demo/sample")
    for name in ("lung1", "lung2"):
        if (sample / f"{name}_image.nrrd").exists():
            yield f"sample {name}", read_image(sample / f"{name}_image.nrrd"), read_image(sample / f"{name}_label.nrrd").array > 0


# Where nothing is to be found, by HU (from, below), and how many places of each are tried.
NOWHERE = {"lung": (-1000.0, -700.0), "soft tissue": (0.0, 90.0), "bone": (250.0, 2000.0), "fat": (-130.0, -60.0)}
PLACES = 40
FIRSTS = 16  # random first clicks in a lesion of a whole scan: a mass gives very different ones


def nowhere(image: Image, truth: np.ndarray, package: ModelPackage) -> Iterator[tuple[str, list[float]]]:
    """What a click more than 30 mm from the lesion gives, on each kind of tissue, and on the image's outermost voxels: ml.

    Other nodules that the scan may have are in it, so a few ml now and then are no fault."""
    session = ClickSession(image, package, options=Options(engine="onnx", device="cpu"))
    rng = np.random.default_rng(3)
    spacing = np.array(image.spacing[::-1])
    centre, voxel = np.argwhere(truth).mean(0), float(spacing.prod()) / 1000

    def volumes(spots: np.ndarray) -> list[float]:
        spots = spots[(np.abs((spots - centre) * spacing) > 30).any(1)]
        out = []
        for spot in spots[rng.choice(len(spots), min(PLACES, len(spots)), replace=False)]:
            session.clear()
            session.add_point(image.index_to_point(spot[::-1]))
            out.append(float(session.answer.mask.sum()) * voxel)
        return out

    coarse = image.channels[0][::2, ::4, ::4]
    for name, (low, high) in NOWHERE.items():
        yield name, volumes(np.argwhere((coarse >= low) & (coarse < high)) * (2, 4, 4))
    faces = np.ones(image.shape, bool)
    faces[1:-1, 1:-1, 1:-1] = False
    yield "the edge", volumes(np.argwhere(faces))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    out: dict[str, float] = {"cases": len(rows)}
    for n in (1, 3, 5):
        out[f"dice_{n}"] = round(float(np.mean([r[f"dice_{n}"] for r in rows])), 4)
    out["dice_3_10th_percentile"] = round(float(np.percentile([r["dice_3"] for r in rows], 10)), 4)
    out["found"] = round(float(np.mean([r["first_click_worst_of_3"] > 0.3 for r in rows])), 4)
    return out


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Summaries of all, and by diameter, texture and attachment."""
    crops = [r for r in rows if r["set"] == "crop"]
    parts = {"all crops": crops, "all cubes": [r for r in rows if r["set"] == "cube"]}
    for low, high in ((0, 6), (6, 10), (10, 20), (20, 40)):
        parts[f"{low}-{high} mm"] = [r for r in crops if low <= r["diameter_mm"] < high]
    for name, values in (("ground glass", ("1", "2")), ("part-solid", ("3",)), ("solid", ("4", "5"))):
        parts[name] = [r for r in crops if r["texture"] in values]
    for name, flag in (("free", 0), ("attached", 1)):
        parts[name] = [r for r in crops if r["attached"] == flag]
    return {name: summary(part) for name, part in parts.items() if part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", default=MODEL)
    parser.add_argument("--limit", type=int, help="only so many of each set")
    options = parser.parse_args()
    package = find_model(options.package)
    rows = list(held_out(package, options.limit))
    for name, figures in table(rows).items():
        print(f"{name:14}", figures)
    print("median seconds a click:", np.median([r["seconds"] for r in rows]))
    drawn = list(boxed(package, options.limit))
    for kind in ("crop", "cube"):
        for times, dices in zip(BOXES, np.array([scores for of, scores in drawn if of == kind]).T):
            known = dices[np.isfinite(dices)]
            if known.size:
                print(f"{kind}s, a box of {times} times the size: {known.mean():.3f} of {known.size}")
    for name, image, truth in whole_scans():
        session = ClickSession(image, package, options=Options(engine="onnx", device="cpu"))
        inside = np.argwhere(truth)
        rng = np.random.default_rng(1)
        middle = inside[((inside - inside.mean(0)) ** 2).sum(1).argmin()]
        scores, seconds = play(session, truth, tuple(int(v) for v in middle))
        print(f"{name}: Dice after 1 to {CLICKS} clicks, first click in the middle:")
        print("   ", " ".join(f"{s:.3f}" for s in scores), f" {max(seconds):.2f} s at most")
        firsts = inside[rng.integers(len(inside), size=FIRSTS)]
        after = np.array([play(session, truth, tuple(int(v) for v in first), 2)[0] for first in firsts])
        for n, dices in enumerate(after.T, 1):
            quartiles = " ".join(f"{q:.3f}" for q in np.percentile(dices, (25, 50, 75)))
            missed = np.count_nonzero(dices < 0.3)
            print(f"    click {n} of {FIRSTS} places in it: mean {dices.mean():.3f}, quartiles {quartiles}, {missed} below 0.3")
        for tissue, ml in nowhere(image, truth, package):
            print(f"    a click on {tissue}: found {np.count_nonzero(ml)} of {len(ml)}, at most {max(ml):.1f} ml")


if __name__ == "__main__":
    main()
