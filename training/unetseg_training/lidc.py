"""The LIDC's nodules as the two nodule models use them: crops, tight in z, and cubes with their surroundings.

Both are dealt out to the same folds by patient. The data are found through UNETSEG_DATA, or in shared/data beside the
project.
"""

from __future__ import annotations

import csv
import os
from functools import cache
from pathlib import Path

from UNetSegmentationLib.files import UserError

from .cases import Case, CaseSet, find_cases, folds

HELD_OUT = 0  # the fold that the cards' figures come from


def data_folder() -> Path:
    folder = Path(os.environ.get("UNETSEG_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not folder.is_dir():
        raise UserError(f"The training data are not at {folder}; set UNETSEG_DATA to their folder.")
    return folder


@cache
def nodules() -> tuple[CaseSet, CaseSet, dict[str, int]]:
    """Crops, cubes, and the fold of each patient (the cubes show patients of the crops)."""
    crops, cubes = (find_cases(data_folder() / name, "pairs") for name in ("lidc_nodules", "lidc_nodule_cubes"))
    cases = [*crops.annotated, *cubes.annotated]
    return crops, cubes, {c.patient: fold for c, fold in zip(cases, folds(cases, 5))}


def part(case_set: CaseSet, held_out: bool, fold: int = HELD_OUT) -> list[Case]:
    """The cases of the fold that is held out, or those of the others."""
    of = nodules()[2]
    return [c for c in case_set.annotated if (of[c.patient] == fold) == held_out]


@cache
def textures() -> dict[str, str]:
    """Of each crop's file, by the radiologists: "1" and "2" ground glass, "3" part-solid, "4" and "5" solid."""
    with open(data_folder() / "lidc_nodules" / "index.csv", newline="", encoding="utf-8") as f:
        return {row["file"]: row["texture"] for row in csv.DictReader(f)}
