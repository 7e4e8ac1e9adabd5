"""Players prepared for training: on their device, copied or sharded over the processes, with optimizer and EMA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW

from sdkit.engines.device import has_fused_adam
from sdkit.errors import ArgumentError
from sdkit.training.distributed import gather, is_sharded, reshard, sharded_copy
from sdkit.training.ema import EMA
from sdkit.training.muon import Muon, split
from sdkit.training.settings import LoopSettings
from sdkit.training.stage import Player


class PreparedPlayer:
    """A player with its optimizer, learning-rate schedule, and moving average.

    With FSDP its network is a sharded copy, and the stage's own network has the trained weights only inside
    `evaluation_mode`.

    Args:
        player: The player. Its trainable parameters become float32 in place.
        settings: Settings of the loop.
        accelerator: The run's Accelerator.

    Attributes:
        player: The player, with the network in training: the stage's own, or the sharded copy.
        network: That network as Accelerate wraps it; losses call this one.
        optimizer: The optimizer as Accelerate wraps it.
        parameters: The trainable parameters.
        ema: The moving average of the trainable parameters, or None.
        lr_factor: Function from the optimizer step, counted from the player's first, to a factor of the learning rate.
        stages_network: The stage's own network.
        device: Device of the network in training.
    """

    def __init__(self, player: Player, settings: LoopSettings, accelerator: Accelerator) -> None:
        for p in player.network.parameters():
            if p.requires_grad:
                p.data = p.data.float()  # in half precision a small update rounds to zero
        self.stages_network = player.network
        if is_sharded(accelerator):
            player = replace(player, network=sharded_copy(player.network, accelerator))
        self.player, self.device = player, accelerator.device
        optimizer = make_optimizer(player, settings, accelerator.device)
        self.network, self.optimizer = accelerator.prepare(player.network.train(), optimizer)
        self.parameters = [p for p in player.network.parameters() if p.requires_grad]
        self.ema = EMA(player.network, settings.ema_decay) if player.ema else None
        self.lr_factor = lr_factor_of(player, settings)

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Give the stage's network the averaged weights inside the context, and put it in evaluation mode."""
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
    active: PreparedPlayer, players: Sequence[PreparedPlayer], accelerator: Accelerator
) -> Iterator[None]:
    """Accumulate gradients of one player only inside the context.

    All other players are frozen, and processes do not exchange gradients for them.

    Args:
        active: The player in training.
        players: All players, the active one among them.
        accelerator: The Accelerator that prepared them.
    """
    with contextlib.ExitStack() as stack:
        for other in players:
            if is_sharded(accelerator):
                stack.callback(reshard, other.network)
            if other is not active:
                stack.enter_context(accelerator.no_sync(other.network))
                for p in other.parameters:
                    stack.callback(p.requires_grad_, True)
                    p.requires_grad_(False)
        yield


def make_optimizer(player: Player, settings: LoopSettings, device: torch.device) -> torch.optim.Optimizer:
    """Return an optimizer of the trainable parameters of `player`.

    Raises:
        ArgumentError: `use_8bit_adam` is set and bitsandbytes is not installed.
    """
    groups = parameter_groups(player)
    options: dict[str, Any] = {"lr": player.learning_rate, "betas": player.betas}
    if settings.optimizer == "muon":
        dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
        return Muon(split(groups, player.network), **options, dtype=dtype)
    if not settings.use_8bit_adam:
        return AdamW(groups, **options, fused=has_fused_adam(device))
    try:
        library = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ArgumentError("use_8bit_adam needs bitsandbytes; install it, or leave it off.") from error
    optimizer: torch.optim.Optimizer = library.AdamW8bit(groups, **options)
    return optimizer


def parameter_groups(player: Player) -> list[dict[str, Any]]:
    """Return the trainable parameters of `player` in groups, each with its weight decay; none is empty."""
    trained = [p for p in player.network.parameters() if p.requires_grad]
    decayed = [p for p in trained if player.decays_gains or p.ndim >= 2]
    others = [p for p in trained if not player.decays_gains and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": player.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_factor_of(player: Player, settings: LoopSettings) -> Callable[[int], float]:
    """Return a function from optimizer step, counted from the player's first, to the factor of its learning rate.

    Raises:
        ArgumentError: The schedule cannot begin at this learning rate.
    """
    from diffusers.optimization import get_scheduler

    # diffusers builds a schedule only for an optimizer. Only the schedule's function of the step is used here.
    placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=player.learning_rate)
    steps = max(1, settings.max_steps - player.starts_at)  # a player may start after the last step
    try:
        schedule = get_scheduler(
            settings.lr_scheduler, placeholder, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=steps
        )
    except ValueError as error:  # "polynomial" ends at 1e-7 and cannot begin below that
        raise ArgumentError(f"lr_scheduler {settings.lr_scheduler}: {error}; take another, or another rate.") from error
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
