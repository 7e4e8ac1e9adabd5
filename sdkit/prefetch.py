"""Prefetching: threads compute results before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(pool: ThreadPoolExecutor, run: Callable[[T], U], items: Iterable[T], n: int) -> Iterator[U]:
    """Yield `run(item)` for each item in order, and compute up to `n` items ahead of the caller.

    After an error, calls that have not begun are cancelled, and the running ones are waited for.
    """
    waiting: deque[Future[U]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) > n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])
