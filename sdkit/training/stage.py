"""The interface between the training loop and what it trains: a `Stage` and its `Player`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Loss = Callable[[Mapping[str, nn.Module], dict[str, Any], int], tuple[Tensor, Mapping[str, float | Tensor]]]
"""Signature: loss(networks by player name, batch, optimizer step) -> (the loss, its parts to log by name)."""

AfterUpdate = Callable[[Mapping[str, nn.Module], Sequence[dict[str, Any]], int], Mapping[str, float]]
"""Signature: after_update(networks by player name, this process's micro-batches, optimizer step) -> metrics to log."""

Samples = list[tuple[int, int]]
"""(n, item): the n-th sample since the run began is example `item`."""


@dataclass(frozen=True)
class Player:
    """A network in training, with an optimizer and a loss of its own. A GAN has two players.

    `loss(networks, batch, step)` returns the loss, a mean over the batch, and its parts to log. `networks` holds the
    networks of all players by name, as prepared for several processes. A loss may only call them
    (`networks["unet"](...)`), because the hooks that reduce gradients run on that call. With FSDP, they are sharded
    copies: the stage's own networks have the trained weights only during `validate` and `export`. In an optimizer step
    all players get the same batch object, so that a player can store values in it for the players after it.

    Attributes:
        name: Name of the player in metrics, checkpoints, and `networks`.
        network: The network. Its parameters that require gradients when training begins are trained.
        loss: The loss.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        starts_at: First optimizer step of this player. Its learning-rate schedule counts from there.
        ema: Whether a moving average of the weights is kept, validated, and exported.
        betas: Betas of AdamW.
        weight_decay: Weight decay of AdamW.
        decays_gains: Whether gains and biases, which are the parameters of fewer than two dimensions, decay as well.
        after_update: A function that is called on every process after each update of the weights, without gradients.
            It may change the weights further, on every process in the same way. None for most players.
    """

    name: str
    network: nn.Module
    loss: Loss
    _: KW_ONLY
    learning_rate: float
    starts_at: int = 0
    ema: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    decays_gains: bool = True
    after_update: AfterUpdate | None = None


class Stage(Protocol):
    """Interface of the stages that the loop trains: players, batches of samples, validation, and export."""

    @property
    def players(self) -> Sequence[Player]:
        """Players, trained in this order in each optimizer step. Metrics of the first one have no prefix."""

    @property
    def size(self) -> int:
        """Number of training examples."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Fingerprints of the data and the model. A run refuses to resume if either differs; paths may change."""

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return the batch of these samples. It is called ahead of time, from other threads.

        Args:
            samples: Pairs (n, item). n counts samples since the run began, and all randomness may depend only on n and
                the seed. item is the index of the example.

        Returns:
            Tensors and other values by name. The loop moves the tensors to the device.
        """

    def names(self, samples: Samples) -> list[str]:
        """Return names of these samples for messages, such as file names."""

    def validate(self, step: int) -> dict[str, float]:
        """Return metrics after `step` steps, the same on every process.

        The loop calls this on every process, with averaged weights in the stage's networks, in evaluation mode, and
        without gradients. A stage splits the work over the processes itself (see `split_over_processes`).

        Raises:
            Unfinished: A process was asked to stop (see `raise_if_stopped`). It is raised on every process.
        """

    def export(self, folder: Path) -> None:
        """Write the result into an empty folder.

        The loop calls this on the main process, with the networks in the same state as for `validate`.

        Raises:
            Unfinished: The process was asked to stop.
        """
