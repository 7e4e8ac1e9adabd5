"""Networks that wait in the CPU's memory, and are on the GPU only while they work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device, and back to the CPU when the context closes, whatever happens inside."""
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or the next network finds its room taken by free blocks of other sizes
