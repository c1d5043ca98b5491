"""Work in pieces: an event loop takes one at a time, and is never kept waiting for all."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def complete(steps: Steps[T]) -> T:
    """Run the pieces of a ..._steps function one after the other; what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
