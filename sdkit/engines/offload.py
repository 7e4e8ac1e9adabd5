"""Offloading: networks stay in CPU memory, and move to the GPU only while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device, and back to the CPU when the context closes, even after an error."""
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next network's tensors rarely fit the cached blocks
