"""The moving average of a network's weights, which samples better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sdkit.errors import TrainingError

COUNT = "num_updates"


class EMA:
    """An exponential moving average, in float32, of the parameters of `network` that are trainable when it is made, and
    on the device where they are then.

    Update n (from 0) keeps min(decay, (1 + n) / (10 + n)) of the average: a short memory at first, so that the initial
    weights are soon forgotten. Buffers are not averaged.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    def update(self) -> None:
        """Update the average; call it once after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = [p.detach().float() for p in self._parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self._average.values()), parameters, None)
        self.num_updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averaged weights into the network inside the context; its own return bit-identical afterwards."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, and the number of updates: tensors only, not copied."""
        return {**self._average, COUNT: torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the average from `state`. Raises TrainingError for the EMA of another network."""
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
