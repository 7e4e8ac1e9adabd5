"""Offloading: networks stay in CPU memory, and move to the GPU only while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sdkit.engines.device import release_memory


@contextmanager
def on_device(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device, and back to the CPU when the context closes, even after an error."""
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")
        release_memory(device)  # the next network's tensors rarely fit the cached blocks
