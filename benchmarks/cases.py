"""How long predict() takes for a case, with the engine made beforehand, as in the worker and where many cases are segmented.

    .venv/bin/python benchmarks/cases.py "$UNETSEG_DATA/msd_hippocampus/images" [--model NAME] [--limit 60]

Every engine that is installed runs the same cases. "making the engine" is what the first case of a process waits for besides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from UNetSegmentationLib.engines import ENGINES, installed, make_engine
from UNetSegmentationLib.image import read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import find_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--model", default="hippocampus-3d", help="a package's name or file")
    parser.add_argument("--limit", type=int, default=60, help="only so many cases")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    model = find_model(arguments.model)
    images = [read_image(path) for path in sorted(arguments.images.glob("*.nii.gz"))[: arguments.limit]]
    if not images:
        raise SystemExit(f"There are no .nii.gz images in {arguments.images}; name a folder that has some.")
    report: dict[str, Any] = {"model": f"{model.card.name} {model.card.version}", "cases": len(images), "cores": os.cpu_count()}
    for name in filter(installed, ENGINES):
        began = time.perf_counter()
        engine = make_engine(model, name, "cpu", "fp32", arguments.threads)
        made = time.perf_counter() - began
        seconds = [predict(image, [model], Options(), engines=[engine]).seconds for image in images]
        report[name] = {
            "engine": engine.describe(),
            "making the engine": round(made, 3),
            "first": round(seconds[0], 3),
            "mean": round(statistics.mean(seconds), 3),
            "largest": round(max(seconds), 3),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
