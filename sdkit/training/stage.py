"""The two things that the loop trains: a `Stage` and its `Player`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Loss = Callable[[Mapping[str, nn.Module], dict[str, Any], int], tuple[Tensor, Mapping[str, float | Tensor]]]
"""loss(networks by player's name, batch, step) -> the loss, and its parts to log."""

Samples = list[tuple[int, int]]
"""(n, item): the n-th sample since the run began is example `item`."""


@dataclass(frozen=True)
class Player:
    """A network in training, with an optimizer and a loss of its own: a GAN has two.

    What is trained are the network's parameters that require gradients when training begins. `loss(networks, batch,
    step)` gives the loss, a mean over the batch, and its parts to be logged. It gets the networks of all players by
    name, as prepared for many processes, and may only call them (`networks["unet"](...)`), because the hooks that
    reduce gradients run on that call. (With FSDP they are copies: the stage's own networks have the trained weights in
    `validate` and `export` alone.) `batch` lives as long as the optimizer step: an earlier player can leave things in
    it.
    """

    name: str
    network: nn.Module
    loss: Loss
    _: KW_ONLY
    learning_rate: float
    starts_at: int = 0  # its first optimizer step; its learning-rate schedule counts from there
    ema: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


class Stage(Protocol):
    """What the loop trains: players, batches of samples, validation, and export."""

    @property
    def players(self) -> Sequence[Player]:
        """Players, trained in this order in each optimizer step. The first one's metrics have no prefix."""

    @property
    def size(self) -> int:
        """The number of training examples."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Fingerprints of the data and the model. A run refuses to resume if either differs; paths may change."""

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return the batch of samples (n, item). n counts samples since the run began, and noise may depend only on it
        and the seed; item is the index of the example. Called ahead, from other threads; the loop moves tensors to the
        device."""

    def names(self, samples: Samples) -> list[str]:
        """Return names of these samples for messages, such as their file names."""

    def validate(self, step: int) -> dict[str, float]:
        """Return metrics after `step` steps, the same on every process.

        Called on every process, with the averaged weights in the networks, in evaluation mode, and without gradients;
        a stage splits the work itself. May raise `Unfinished` (see `raise_if_stopped`), on every process.
        """

    def export(self, folder: Path) -> None:
        """Fill an empty folder with the result. Called on the main process, in the state that `validate` finds. May
        raise `Unfinished`."""
