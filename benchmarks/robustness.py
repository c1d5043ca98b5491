"""Dice of held-out cases as other sites may deliver them: padded, cropped more or less, with hot voxels, turned, coarser.

    .venv/bin/python benchmarks/robustness.py

prints one table in Markdown; each row is a mean over the same cases as its model's first row, but for crops of which
some would lack a part of their target. The data is found through UNETSEG_DATA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from unetseg_training.release import cases
from UNetSegmentationLib.engines import choose_engine
from UNetSegmentationLib.image import Box, Image, from_sitk, resample, to_sitk
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import find_model
from UNetSegmentationLib.postprocess import distance

# What it is, the image with its true geometry, a ROI, and the image as the model gets it, where that is another.
Changed = Iterator[tuple[Any, ...]]

PIXEL_MM = 1.3  # of the ventricles' slices, whose pictures do not carry it


def padded(image: Image, width: tuple[int, int, int], **how: object) -> tuple[Image, Box]:
    """The image with more around it, and where it lies in that."""
    array = np.pad(image.array, [(n, n) for n in width], **how)  # type: ignore[call-overload]
    origin = image.index_to_point([-n for n in width[::-1]])
    return replace(image, array=array, origin=origin), Box.whole(image.shape).shifted(width)


def hot(image: Image, n: int, factor: float) -> Image:
    values = image.array.astype(np.float32)
    values.flat[np.random.default_rng(0).choice(values.size, n, replace=False)] = factor * values.max()
    return image.like(values)


def noisy(image: Image, share: float) -> Image:
    """The image with noise for zeros; share: of its 99th percentile that is one standard deviation."""
    a = image.array
    deviation = share * np.percentile(a[a != 0], 99)
    return image.like(np.where(a, a, np.random.default_rng(0).normal(0, deviation, a.shape)).astype(np.float32))


def tilted(image: Image) -> Image:
    """On a grid turned about the image's middle, 6 voxels larger on each side."""
    source, spacing = to_sitk(image.like(image.array.astype(np.float32))), np.array(image.spacing)
    turn = np.radians(10)
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    direction, size = np.reshape(image.direction, (3, 3)) @ rotation, np.array(source.GetSize()) + 12
    middle = image.index_to_point([(n - 1) / 2 for n in source.GetSize()])
    grid = sitk.Image([int(n) for n in size], sitk.sitkFloat32)
    grid.SetSpacing(image.spacing)
    grid.SetDirection(direction.ravel().tolist())
    grid.SetOrigin((middle - direction @ ((size - 1) / 2 * spacing)).tolist())
    return from_sitk(sitk.Resample(source, grid, sitk.Transform(), sitk.sitkBSpline, 0.0))


def hippocampus(image: Image, truth: np.ndarray, roi: Box) -> Changed:
    yield "as it is", image, None
    yield "zeros around it, 8 voxels", padded(image, (8, 8, 8))[0], None
    yield (
        "-3024 around it, 10 voxels",
        padded(replace(image, array=image.array.astype(np.float32)), (10, 10, 10), constant_values=-3024)[0],
        None,
    )
    yield "a ROI in what is 20 mm larger on each side (mirrored)", *padded(image, (20, 20, 20), mode="reflect")
    close = Box.of(truth)
    yield "a ROI that fits closely", image, close
    yield "the file ends with the hippocampus", image.crop(close), None
    yield "4 voxels less on each side", image.crop(Box.whole(image.shape).grown((-4, -4, -4)) | close), None
    masked = image.like(np.where(distance(truth > 0, np.ones(3)) <= 10, image.array, 0).astype(np.float32))
    yield "zeros from 10 voxels beside it on", masked, None
    yield "so, then 0.9 mm voxels", resample(masked, (0.9, 0.9, 0.9)), None
    yield "so, then smoothed (Gaussian, 0.7 voxels)", from_sitk(sitk.SmoothingRecursiveGaussian(to_sitk(masked), 0.7)), None
    zeros = padded(image.like(image.array.astype(np.float32)), (8, 8, 8))[0]
    yield "zeros around it, 8 voxels, then 0.9 mm voxels (B-spline)", resample(zeros, (0.9, 0.9, 0.9), "bspline"), None
    yield "noise of 0.3 % around it, 8 voxels", noisy(zeros, 0.003), None
    yield "turned by 10 degrees, zeros in the corners", tilted(image), None
    yield "five voxels of ten times the maximum", hot(image, 5, 10), None
    yield "axes turned (PIR)", from_sitk(sitk.DICOMOrient(to_sitk(image), "PIR")), None
    yield "values times 1000", image.like(image.array.astype(np.float32) * 1000), None
    yield "1.5 mm voxels", resample(image, (1.5, 1.5, 1.5)), None


def ventricle(image: Image, truth: np.ndarray, roi: Box) -> Changed:
    yield "as it is", image, None
    yield "zeros around it, 128 pixels", padded(image, (0, 128, 128))[0], None
    yield "255 around it, 128 pixels", padded(image, (0, 128, 128), constant_values=255)[0], None
    yield "five pixels of twenty times the maximum", hot(image, 5, 20), None
    for n in (128, 160, 192, 320, 512):
        other = resample(image, (max(image.shape) / n, max(image.shape) / n, None))
        mm = PIXEL_MM * max(image.shape) / n
        yield f"{n} pixels across, of known size", other, None, Image(other.array, (mm, mm, 8.0))
        yield f"{n} pixels across, a picture", other, None, Image(other.array)
    heart, middle = Box.of(truth), np.argwhere(truth).mean(0).round().astype(int)
    for n in (140, 128, 96, 64):
        box = Box((0, *(middle[1:] - n // 2).tolist()), (1, *(middle[1:] + n // 2).tolist()))
        if (heart & box) == heart:
            yield f"cropped to {n} pixels about the heart", image.crop(box & Box.whole(truth.shape)), None


def nodule(image: Image, truth: np.ndarray, roi: Box) -> Changed:
    yield "a ROI in a crop with more around it", image, roi
    for n in (2, 4, 6, 8, 10, 12, 16):
        yield f"cropped {n} pixels beside the nodule", image.crop(Box.of(truth).grown((1, n, n)) & Box.whole(truth.shape)), None


def main() -> None:
    print("| model | cases | delivered | mean Dice |\n|---|---|---|---|")
    for name, changed, step in (("hippocampus-3d", hippocampus, 1), ("left-ventricle-2d", ventricle, 1), ("lung-nodule-2d", nodule, 9)):
        package = find_model(name)
        engine = choose_engine(package, "onnx", "cpu")
        labels = package.card.labels
        found: dict[str, list[list[float]]] = {}
        crops = [case for case in cases(name) if case[0] == "crop"][step // 2 :: step]
        for _, _, image, truth, roi in crops:
            for what, other, box, *seen in changed(image, truth, roi):
                result = predict(seen[0] if seen else other, [package], Options(roi=box), engines=[engine])
                got = to_sitk(other.like(result.labels.array))
                back = sitk.GetArrayFromImage(sitk.Resample(got, to_sitk(image), sitk.Transform(), sitk.sitkNearestNeighbor))
                found.setdefault(what, []).append([dice(back == d.value, truth == d.value) for d in labels])
        for what, rows in found.items():
            print(f"| `{name}` | {len(rows)} | {what} | {' and '.join(f'{v:.3f}' for v in np.mean(rows, 0))} |", flush=True)


if __name__ == "__main__":
    main()
