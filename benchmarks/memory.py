"""Peak memory of segmenting a large CT, against the bound of 3 x the float32 volume + 1 GB.

    .venv/bin/python benchmarks/memory.py

A 512x512x400 int16 CT (0.7 x 0.7 x 0.8 mm, noise in a body-like cylinder) is written to a temporary NRRD and segmented by
the command line in a process of its own. The model sees another organ than it was made for: only memory matters here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[1]


def make_ct(path: Path, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    y, x = np.ogrid[: shape[1], : shape[2]]
    body = (((y - shape[1] / 2) / (shape[1] * 0.35)) ** 2 + ((x - shape[2] / 2) / (shape[2] * 0.42)) ** 2) < 1
    volume = np.full(shape, -1000, np.int16)
    for plane in volume:
        plane[body] = rng.normal(0, 80, int(body.sum())).astype(np.int16)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((0.7, 0.7, 0.8))
    sitk.WriteImage(image, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hippocampus-3d")
    parser.add_argument("--slices", type=int, default=400)
    options = parser.parse_args()
    shape = (options.slices, 512, 512)
    with tempfile.TemporaryDirectory() as folder:
        ct, out = Path(folder, "ct.nrrd"), Path(folder, "out.seg.nrrd")
        make_ct(ct, shape)
        words = ["segment", str(ct), "--model", options.model, "-o", str(out), "--overlap", "0", "--tta", "none", "-q"]
        began = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "UNetSegmentationLib", *words], cwd=ROOT / "UNetSegmentation")
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    volume = 4 * shape[0] * shape[1] * shape[2]
    bound = 3 * volume + 1e9
    gigabytes = {"peak_gb": peak, "float32_volume_gb": volume, "bound_gb": bound}
    report = {"model": options.model, "shape": shape, **{name: round(size / 1e9, 2) for name, size in gigabytes.items()}}
    print(json.dumps({**report, "peak_to_bound": round(peak / bound, 2), "seconds": round(seconds)}))
    sys.exit(status != 0 or peak > bound)


if __name__ == "__main__":
    main()
