"""Fixtures for all tests: the folder of real data, and toy model packages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from UNetSegmentationLib import files
from UNetSegmentationLib.model import CARD, ONNX, SAFETENSORS, SUFFIX, ModelPackage, write_package
from workers import make_card, make_onnx

ROOT = Path(__file__).resolve().parents[1]
# The files that take longest, as a worker takes a file at a time: none of these shall begin last, when the other workers have nothing
# left. Those that compute and those that wait for child processes in turns.
LONG = (
    "test_panel",
    "test_correct_retrain",
    "test_worker",
    "test_click_models",
    "test_clicks",
    "test_train",
    "test_panel_worker",
    "test_retrain",
    "test_environment",
    "test_bundled",
    "test_installer",
    "test_train_cli",
    "test_effect",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One more than there are cores: many tests wait for a child process or for time to pass."""
    return (yield) + 1


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real images; see its README."""
    folder = Path(os.environ.get("UNETSEG_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("needs the data folder: set UNETSEG_DATA")
    return folder


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Imported models of this test alone, kept masks and PyTorch: the user's own folders are never touched."""
    folder = tmp_path / "models"
    monkeypatch.setenv("UNETSEG_MODELS", str(folder))
    monkeypatch.setenv("UNETSEG_MASKS", str(tmp_path / "masks"))
    monkeypatch.setenv("UNETSEG_ENVIRONMENT", str(tmp_path / "torch"))
    return folder


@pytest.fixture
def busy_file(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As on Windows, where another program may be looking a new file over: it can be moved at the third try. The targets."""
    replace, tries = Path.replace, []

    def held(self: Path, target: Path) -> Path:
        tries.append(target)
        if len(tries) < 3:
            raise PermissionError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "name": "nt"}))
    return tries


@pytest.fixture
def make_package(tmp_path: Path) -> Callable[..., ModelPackage]:
    """make_package(kind="threshold" | "identity", **card_changes) writes and reads a package in a folder of its own."""
    count = 0

    def make(kind: str = "threshold", **changes: Any) -> ModelPackage:
        nonlocal count
        count += 1
        card = make_card(**changes)
        path = tmp_path / "packages" / str(count) / f"{card['name']}-{card['version']}.unet.zip"
        return write_package(path, card, make_onnx(kind, card))

    return make


@pytest.fixture
def install(models_folder: Path, make_package: Callable[..., ModelPackage]) -> Callable[..., str]:
    """install(**card changes) puts a toy model into the folder of imported ones; returns <name>-<version>."""

    def put(kind: str = "threshold", **changes: Any) -> str:
        path = make_package(kind, **changes).path
        models_folder.mkdir(exist_ok=True)
        shutil.copy(path, models_folder)
        return path.name.removesuffix(SUFFIX)

    return put


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """pack(entries) writes a zip of exactly these entries; pack(onnx=..., ...) a package whose card fits its files.

    Nothing is verified, so that tests can write what must be refused.
    """
    folder = tmp_path / "pack"
    folder.mkdir()

    def write(
        entries: list[tuple[str, bytes]] | None = None,
        *,
        extra: Sequence[tuple[str, bytes]] = (),
        method: int = zipfile.ZIP_DEFLATED,
        change_card: Callable[[dict[str, Any]], object] = lambda card: None,
        onnx: bytes | None = None,
        safetensors: bytes | None = None,
    ) -> Path:
        path = folder / "toy-1.0.0.unet.zip"
        if entries is None:
            card = make_card()
            named = {ONNX: make_onnx("threshold", card) if onnx is None else onnx}
            if safetensors is not None:
                named[SAFETENSORS] = safetensors
            card["files"] = {n: {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b)} for n, b in named.items()}
            change_card(card)
            entries = [(CARD, json.dumps(card).encode()), *named.items(), *extra]
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as z:
            warnings.simplefilter("ignore", UserWarning)  # zipfile's, about a name that is there twice
            for name, content in entries:
                z.writestr(name, content)
        return path

    return write
