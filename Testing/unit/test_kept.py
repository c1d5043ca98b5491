"""The model's own masks that are kept: found again voxel for voxel on the same grid, and nowhere else."""

import os
import time

import numpy as np
import pytest
from UNetSegmentationLib import kept
from UNetSegmentationLib.image import Image
from UNetSegmentationLib.model import Label
from workers import oblique_image

NAMES = (Label(1, "organ", (1, 2, 3), {"type": ["SCT", "39607008", "Lung"]}), Label(300, "vessel", (4, 5, 6), {}))


@pytest.fixture
def image() -> Image:
    return oblique_image()


def labels(image: Image) -> np.ndarray:
    out = np.zeros(image.shape, np.uint16)
    out[2:5, 3:9, 4:8] = 1
    out[3, 4, 5] = 300
    return out


def test_what_is_kept_is_found_again(image):
    array = labels(image)
    key = kept.keep(array, (0, 0, 0), image, NAMES)
    values, box, names = kept.find(key, image)
    assert names == NAMES and values.dtype == np.uint16 and box.start == (2, 3, 4) and np.array_equal(values, array[box.slices])
    part = (array[2:5, 3:9, 4:8] > 0).astype(np.uint8)
    digest = kept.mask_digest(part, (2, 3, 4))
    assert digest == kept.mask_digest(array, (0, 0, 0))  # whatever lies around it
    assert kept.keep(part, (2, 3, 4), image, NAMES[:1], digest) == digest
    assert np.array_equal(kept.find(digest, image)[0], part)
    assert kept.keep(np.zeros(image.shape, np.uint8), (0, 0, 0), image, NAMES) == ""
    # What is written names nobody: geometry, box, labels.
    content = b"".join(p.read_bytes() for p in kept.folder().iterdir())
    assert str(image.source).encode() not in content


def test_nothing_is_found_elsewhere_or_of_damaged_files(image):
    key = kept.keep(labels(image), (0, 0, 0), image, NAMES)
    path = kept.folder() / f"{key}.mask"
    moved = Image(image.array, image.spacing, tuple(v + 5 for v in image.origin), image.direction)
    assert kept.find(key, moved) is None
    content = path.read_bytes()
    head = content.index(b"\n")
    for spoilt in (
        b"",
        b"{}\n",
        content[:-4],
        content[: head + 1],
        content.replace(b'"uint16"', b'"object"'),
        content.replace(b"[[2, 3, 4]", b"[[-2, 3, 4]"),
        content.replace(b"[[2, 3, 4]", b"[[2, 3]"),
        content[: head + 1] + b"not zlib",
    ):
        path.write_bytes(spoilt)
        assert kept.find(key, image) is None, spoilt[:80]
    for wrong in ("", "../" + key, key[:-1], "0" * 32):
        assert kept.find(wrong, image) is None


def test_the_oldest_go(image, monkeypatch):
    monkeypatch.setattr(kept, "FILES", 3)
    monkeypatch.setattr(kept, "_EVERY", 1)
    keys = []
    for i in range(5):
        array = np.zeros(image.shape, np.uint8)
        array[i, 1, 1] = 1
        keys.append(kept.keep(array, (0, 0, 0), image, NAMES))
        os.utime(kept.folder() / f"{keys[-1]}.mask", (time.time() - 100 + i,) * 2)
    assert [kept.find(key, image) is not None for key in keys] == [False, False, True, True, True]
