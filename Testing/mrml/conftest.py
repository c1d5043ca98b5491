"""Starts slicer-core's MRML once, and gives each test an empty scene."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
