"""Work done in threads before its results are wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(pool: ThreadPoolExecutor, run: Callable[[T], U], items: Iterable[T], n: int) -> Iterator[U]:
    """`run(item)` of each item, in order, up to `n` items ahead of the caller. After an error none runs on."""
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
