"""Choice of each step's samples, their random generators, and threads that load batches ahead of time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import recursively_apply

from sdkit.data.transform import draw
from sdkit.engines.device import pinned
from sdkit.prefetch import ahead
from sdkit.training.settings import LoopSettings
from sdkit.training.stage import Samples, Stage

LOADERS = min(16, max(2, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
"""Number of loading threads, and of batches loaded ahead of time."""
NOISE = 2**32 - 1  # passed to `draw` as the number of an augmentation; no image has this many


def samples_of(settings: LoopSettings, step: int, micro_batch: int, rank: int, world: int, size: int) -> Samples:
    """Return the samples (n, item) of one micro-batch of one process.

    Each optimizer step takes the next batch_size * gradient_accumulation_steps * world samples, however they are split.
    Each epoch visits the examples in a random order of its own, which depends only on the seed and the epoch. A run can
    therefore resume from the step number alone, without the state of a data loader.

    Args:
        settings: Settings of the loop.
        step: Optimizer step, from 0.
        micro_batch: Index of the micro-batch in its step.
        rank: Index of the process.
        world: Number of processes.
        size: Number of training examples.
    """
    first = ((step * settings.gradient_accumulation_steps + micro_batch) * world + rank) * settings.batch_size
    numbers = range(first, first + settings.batch_size)
    return [(n, item_of(settings.seed, n, size)) for n in numbers]


def item_of(seed: int, n: int, size: int) -> int:
    """Return the example of the n-th sample of a run: each epoch visits all `size` in a random order of its own."""
    return int(_permutation(seed, n // size, size)[n % size])


def noise_of(seed: int, n: int) -> torch.Generator:
    """Return the generator of all random numbers of the n-th sample of a run, except those of its augmentation.

    It depends only on the arguments: batch sizes and the number of processes do not matter.
    """
    return draw(seed, n, NOISE)


@lru_cache(maxsize=4)  # a batch can span two epochs, each of the data and of the images of a class
def _permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(size)


@contextlib.contextmanager
def loaded_ahead(
    stage: Stage, settings: LoopSettings, first_step: int, rank: int, world: int, device: torch.device
) -> Iterator[Iterator[tuple[Samples, dict[str, Any]]]]:
    """Yield an iterator over this process's micro-batches, with their samples, from `first_step` to the last step.

    Threads load the next micro-batches in the background. For a CUDA GPU their tensors are in pinned memory, so that
    the loop can copy them to `device` asynchronously.
    """
    micro_batches = range(settings.gradient_accumulation_steps)
    micro = ((step, i) for step in range(first_step, settings.max_steps) for i in micro_batches)
    jobs = (samples_of(settings, step, i, rank, world, stage.size) for step, i in micro)
    pool = ThreadPoolExecutor(LOADERS)

    def load(samples: Samples) -> tuple[Samples, dict[str, Any]]:
        batch: dict[str, Any] = recursively_apply(pinned, stage.batch(samples), device)
        return samples, batch

    try:
        yield ahead(pool, load, jobs, LOADERS)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
