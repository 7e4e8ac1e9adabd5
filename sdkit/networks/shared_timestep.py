"""One time embedding for a batch of images that share a timestep.

The time embedding's matrix products have one row for each image, and with so few rows rounding depends on their number.
With a single row, image i is bit-identical whether it is drawn alone or in a batch. A U-Net that adds the pooled text
(`addition_embed_type: "text"`) still has a row for each image there: in float32, its images may differ by rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdkit.engines.compile import is_compiling

_thread = threading.local()


def embed_timestep_once(network: Any) -> None:
    """Make a network of diffusers embed a timestep once if the whole batch shares it."""
    network.time_embedding.register_forward_pre_hook(_first_row)


def timesteps_of(t: int | Tensor, device: torch.device) -> Tensor:
    """Return timesteps on a device: a number as (1,), (B,) unchanged.

    A number is filled in on the device: diffusers would copy it from the CPU, which synchronises with a GPU.
    """
    return t.to(device) if isinstance(t, Tensor) else torch.full((1,), t, device=device)


@contextmanager
def shared_timestep(shared: bool) -> Iterator[None]:
    """Tell the networks that are called in the block, in this thread, whether their batch shares its timestep."""
    _thread.shares_t = shared
    try:
        yield
    finally:
        _thread.shares_t = False  # reset for code that calls the network directly


def _first_row(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Pre-hook of the time embedding: keep the first row if all rows are equal."""
    if is_compiling():
        return None
    rows, shared = inputs[0], getattr(_thread, "shares_t", False)
    if not shared and rows.device.type == "cpu":
        # The network was called directly. Compare timesteps on the CPU only; on a GPU this would synchronise.
        shared = bool((rows == rows[:1]).all())
    return (rows[:1], *inputs[1:]) if shared else None
