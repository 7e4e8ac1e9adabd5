"""The progress bar of every long loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterator[T]:
    """Yield from `iterable` with a progress bar on stderr; without a bar if stderr is not a terminal."""
    yield from tqdm(iterable, total=total, desc=description or None, disable=None, leave=False)
