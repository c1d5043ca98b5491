"""What the panel says of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    "card, made_for",
    [({}, "whole volumes"), ({"extent": "box"}, "a box around one target"), ({"roi_mm": 50}, "a box of about 50 mm around one target")],
)
def test_a_card_says_what_its_model_is_made_for(gui: Any, make_package: Callable[..., Any], card: dict[str, Any], made_for: str) -> None:
    from UNetSegmentationPanel import models

    package = make_package(**card)
    assert f">{made_for}<" in models.cardHtml(models.Model(package.path, True, package.card))


def test_an_import_leaves_another_models_file_of_its_name(gui: Any, make_package: Callable[..., Any], models_folder: Path) -> None:
    from UNetSegmentationPanel import models

    models_folder.mkdir()
    other, asked = models_folder / "mine-1.0.0.unet.zip", []
    shutil.copy(make_package(name="other").path, other)
    mine = make_package(name="mine").path
    for _ in range(2):
        model = models.importPackage(mine, lambda name: not asked.append(name))
        assert model is not None and model.path.name == "mine-1.0.0-2.unet.zip"
    assert asked == ["mine-1.0.0"]  # the second time
    assert {m.name: m.path for m in models.installedModels() if m.imported} == {"mine-1.0.0": model.path, "other-1.0.0": other}
