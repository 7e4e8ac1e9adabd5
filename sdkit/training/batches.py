"""Which samples each step takes, and threads that load them ahead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from sdkit.prefetch import ahead
from sdkit.training.settings import LoopSettings
from sdkit.training.stage import Samples, Stage

LOADERS = min(16, max(2, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
"""Number of loading threads, and of batches loaded ahead."""


def samples_of(settings: LoopSettings, step: int, micro_batch: int, rank: int, world: int, size: int) -> Samples:
    """Return the samples (n, item) of one micro-batch of one process.

    Each optimizer step takes the next batch_size * gradient_accumulation_steps * world samples, however they are split;
    each epoch is a permutation of its own of the `size` examples. So the step alone says where in the data a run is.
    """
    first = ((step * settings.gradient_accumulation_steps + micro_batch) * world + rank) * settings.batch_size
    numbers = range(first, first + settings.batch_size)
    return [(n, int(_permutation(settings.seed, n // size, size)[n % size])) for n in numbers]


@lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def _permutation(seed: int, epoch: int, size: int) -> Any:
    return np.random.default_rng((seed, epoch)).permutation(size)


@contextlib.contextmanager
def loaded_ahead(
    stage: Stage, settings: LoopSettings, first_step: int, rank: int, world: int
) -> Iterator[Iterator[tuple[Samples, dict[str, Any]]]]:
    """Yield an iterator over this process's micro-batches from `first_step` to the last step, with their samples.
    Threads load the next ones meanwhile."""
    micro_batches = range(settings.gradient_accumulation_steps)
    micro = ((step, i) for step in range(first_step, settings.max_steps) for i in micro_batches)
    jobs = (samples_of(settings, step, i, rank, world, stage.size) for step, i in micro)
    pool = ThreadPoolExecutor(LOADERS)

    def load(samples: Samples) -> tuple[Samples, dict[str, Any]]:
        return samples, stage.batch(samples)

    try:
        yield ahead(pool, load, jobs, LOADERS)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
