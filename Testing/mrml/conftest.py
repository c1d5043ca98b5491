"""Starts slicer-core's MRML once, and gives each test an empty scene."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("slicer", reason="slicer-core is not installed")
    from headless_slicer import Runtime

    return Runtime(tmp_path_factory.mktemp("slicer"))


@pytest.fixture
def scene(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty MRML scene, also as slicer.mrmlScene for slicer.util."""
    import slicer

    monkeypatch.setattr(slicer, "mrmlScene", runtime.scene, raising=False)
    monkeypatch.setattr(slicer, "modules", runtime.modules, raising=False)
    yield runtime.scene
    runtime.scene.Clear(0)


@pytest.fixture
def labels() -> np.ndarray:
    """A lung with a nodule in it, on the grid that add_volume() makes of SHAPE."""
    from mrml_scenes import LUNG, NODULE, SHAPE

    out = np.zeros(SHAPE, np.uint8)
    out[2:7, 3:9, 4:11] = LUNG.value
    out[3:5, 4:7, 6:9] = NODULE.value
    return out
