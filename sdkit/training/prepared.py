"""A player prepared for training: on its device, split or copied over the processes, with optimizer and average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW

from sdkit.errors import ArgumentError
from sdkit.training.distributed import copy_to_split, gather, is_sharded, put_away
from sdkit.training.ema import EMA
from sdkit.training.settings import LoopSettings
from sdkit.training.stage import Player


class PreparedPlayer:
    """A player prepared for precision and processes, with its optimizer, learning-rate schedule, and moving average.

    With FSDP its network is a sharded copy of the stage's network.
    """

    def __init__(self, player: Player, settings: LoopSettings, accelerator: Accelerator) -> None:

        for p in player.network.parameters():
            if p.requires_grad:
                p.data = p.data.float()  # in half precision a small step rounds to nothing
        self.stages_network = player.network
        if is_sharded(accelerator):
            player = replace(player, network=copy_to_split(player.network, accelerator))
        self.player, self.device = player, accelerator.device
        optimizer = make_optimizer(player, settings, accelerator.device)
        self.network, self.optimizer = accelerator.prepare(player.network.train(), optimizer)
        self.parameters = [p for p in player.network.parameters() if p.requires_grad]
        self.ema = EMA(player.network, settings.ema_decay) if player.ema else None
        self.lr_factor = lr_factor_of(player, settings)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Put the averaged weights into the stage's network, and that in evaluation mode, inside the context."""

        network = self.stages_network
        with self.ema.swapped() if self.ema else contextlib.nullcontext():
            if network is not self.player.network:
                gather(self.player.network, network.to(self.device))
            network.eval()
            try:
                yield
            finally:
                network.train()
        if network is not self.player.network:
            network.to("cpu")  # between validations only the sharded copy needs GPU memory


@contextlib.contextmanager
def only_gradients_of(
    turn: PreparedPlayer, prepared: Sequence[PreparedPlayer], accelerator: Accelerator
) -> Iterator[None]:
    """Of `prepared` only `turn` gathers gradients inside; the others only pass them on, and reduce none."""
    with contextlib.ExitStack() as stack:
        for other in prepared:
            if is_sharded(accelerator):
                stack.callback(put_away, other.network)
            if other is not turn:
                stack.enter_context(accelerator.no_sync(other.network))
                for p in other.parameters:
                    stack.callback(p.requires_grad_, True)
                    p.requires_grad_(False)
        yield


def make_optimizer(player: Player, settings: LoopSettings, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters of `player`."""
    parameters = [p for p in player.network.parameters() if p.requires_grad]
    options: dict[str, Any] = {
        "lr": player.learning_rate, "betas": player.betas, "weight_decay": player.weight_decay
    }  # fmt: skip
    if not settings.use_8bit_adam:
        return AdamW(parameters, **options, fused=device.type in ("cpu", "cuda"))  # three times as fast
    try:
        library = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ArgumentError("use_8bit_adam needs bitsandbytes; install it, or leave it off.") from error
    optimizer: torch.optim.Optimizer = library.AdamW8bit(parameters, **options)
    return optimizer


def lr_factor_of(player: Player, settings: LoopSettings) -> Callable[[int], float]:
    """Return the factor of the learning rate by optimizer step of `player`, counted from its first."""
    from diffusers.optimization import get_scheduler

    any_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=player.learning_rate)
    steps = max(1, settings.max_steps - player.starts_at)  # a player that starts after the end takes none
    try:
        schedule = get_scheduler(
            settings.lr_scheduler, any_optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=steps
        )
    except ValueError as error:  # polynomial ends at 1e-7
        raise ArgumentError(f"lr_scheduler {settings.lr_scheduler}: {error}; take another, or another rate.") from error
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
