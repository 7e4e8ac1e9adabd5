"""Exponential moving average of a network's weights. Images sampled with it are usually better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sdkit.errors import TrainingError

COUNT = "num_updates"


class EMA:
    """Exponential moving average, in float32, of a network's trainable parameters.

    Update n, counted from 0, multiplies the old average by d = min(decay, (1 + n) / (10 + n)), and adds
    (1 - d) times the new weights. d is small at first, so that the initial weights are soon forgotten. Buffers are not
    averaged.

    Args:
        network: The network. Parameters that require gradients at this moment are averaged, on their present device.
        decay: Largest factor of the old average in an update, from 0 to 1.

    Attributes:
        decay: Largest factor of the old average in an update.
        num_updates: Number of updates so far.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    def update(self) -> None:
        """Update the average. Call this once after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = [p.detach().float() for p in self._parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self._average.values()), parameters, None)
        self.num_updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the network the averaged weights inside the context. Its own weights return bit-identical afterwards."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, and the number of updates, all as tensors that are not copied."""
        return {**self._average, COUNT: torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the average from a `state_dict`.

        Raises:
            TrainingError: The state belongs to another network.
        """
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        if shapes != {name: value.shape for name, value in state.items()}:
            raise TrainingError("the saved moving average is of other parameters than those in training; start anew.")
        for name, average in self._average.items():
            average.copy_(state[name])
        self.num_updates = int(state[COUNT])

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
