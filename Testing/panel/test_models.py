"""What the panel says of a model."""

from __future__ import annotations

from collections.abc import Callable
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
