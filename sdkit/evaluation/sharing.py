"""The processes of an `accelerate launch`, which share the images of an evaluation."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch

from sdkit.engines.device import resolve_device

T = TypeVar("T")


class Share(NamedTuple):
    """This process among those of an evaluation.

    Attributes:
        rank: Number of this process.
        world: Number of processes.
        device: Device of this process.
    """

    rank: int
    world: int
    device: torch.device


def own_share(device: str | torch.device = "auto") -> Share:
    """Return this process's share. With several processes, "auto" gives each process a device of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Share(0, 1, resolve_device(device))
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # One process may have more, or slower, images than the others, which must not time out while they wait for it.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))
    return Share(state.process_index, state.num_processes, state.device if device == "auto" else resolve_device(device))


def gathered(value: T, world: int) -> list[T]:
    """Return the values of all processes, in the order of their ranks, on every process. Call this on every process."""
    if world == 1:
        return [value]
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values
