"""Distributed training: splitting work over processes, and sharding networks with Accelerate's FSDP (version 2)."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import (
    DynamoBackend,
    GradientAccumulationPlugin,
    broadcast,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    gather_object,
)
from torch import Tensor, nn

from sdkit.arguments import one_of
from sdkit.errors import ArgumentError, SdkitError
from sdkit.training.settings import LoopSettings
from sdkit.training.signals import Unfinished, raise_if_stopped

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # slow to import

T = TypeVar("T")


def unwrapped(network: nn.Module) -> nn.Module:
    """Return a network in training without the wrapper of several processes (DistributedDataParallel)."""
    inner: nn.Module = getattr(network, "module", network)
    return inner


def make_accelerator(settings: LoopSettings, out_dir: Path) -> Accelerator:
    """Make the Accelerator of a run.

    Precision and trackers come from `settings`, not from Accelerate's own configuration, so that a run's config.json
    describes all of its training.

    Args:
        settings: Settings of the loop.
        out_dir: The run folder. Trackers write into its trackers/.

    Raises:
        ArgumentError: A tracker is not installed, or the device or Accelerate's configuration cannot train as asked.
    """
    for name in settings.report_to:
        one_of("report_to", name, LOGGER_TYPE_TO_CLASS)
    # DeepSpeed steps the optimizer inside the backward pass, before the loop has seen the gradients.
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ArgumentError("DeepSpeed does not work here; launch with FSDP (fsdp_version: 2), which shares as much.")
    # Without this reset, a second run in this process could neither change the precision nor use FSDP again.
    had_fsdp = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
    AcceleratorState._reset_state(reset_partial_state=had_fsdp)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=")  # a tracker that is not installed is an error below
            accelerator = Accelerator(
                mixed_precision=settings.mixed_precision,
                # The loop accumulates gradients itself.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                log_with=list(settings.report_to) or None,
                project_dir=out_dir / "trackers",
            )
    except ValueError as error:  # for example fp16 without a GPU
        raise ArgumentError(str(error)) from error
    if len(accelerator.log_with) < len(set(settings.report_to)):
        missing = [name for name in settings.report_to if name not in map(str, accelerator.log_with)]
        raise ArgumentError(f"report_to names {missing[0]!r}, which is not installed; install it, or leave it out.")
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would use float32 silently
        raise ArgumentError("mixed_precision 'fp16' needs a GPU; use 'bf16' or 'no'.")
    # Observed with torch 2.13: compiled on a CPU, more than half of a U-Net's parameters silently get zero gradients.
    if accelerator.device.type == "cpu" and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        AcceleratorState._reset_state()  # the next Accelerator would otherwise inherit the setting
        raise ArgumentError("torch.compile loses gradients on a CPU; leave Accelerate's dynamo_backend off.")
    if accelerator.distributed_type == DistributedType.FSDP:
        set_up_fsdp(accelerator)
        if settings.use_8bit_adam:
            raise ArgumentError("use_8bit_adam does not work with FSDP; leave it off.")
        if settings.optimizer == "muon":
            raise ArgumentError("optimizer muon needs whole matrices, which FSDP splits; take adamw.")
    return accelerator


def on_main(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """Call `do` on the main process. Return its result, or raise its SdkitError, on every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = do()
        except SdkitError as error:
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure:
        raise failure
    return result  # type: ignore[no-any-return]


def split_over_processes(n: int, do: Callable[[int], T]) -> list[T]:
    """Compute `do(i)` for each i below n, each on one process, and return all results in order on every process.

    Raises:
        Unfinished: A process was asked to stop before its share was done. It is raised on every process.
    """
    state, own_results = PartialState(), list[tuple[int, T]]()
    with contextlib.suppress(Unfinished):  # a stopped process must still take part in the gathering below
        for i in range(state.process_index, n, state.num_processes):
            raise_if_stopped()
            own_results.append((i, do(i)))
    results: list[tuple[int, T]] = gather_object(own_results)
    if len(results) < n:
        raise Unfinished
    return [result for _, result in sorted(results, key=lambda numbered: numbered[0])]


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether `accelerator` shards the networks that it prepares."""
    return bool(getattr(accelerator, "is_fsdp2", False))  # Accelerate before 1.6 has no such attribute


def set_up_fsdp(accelerator: Accelerator) -> None:
    """Adapt Accelerate's FSDP plugin to the loop.

    Raises:
        ArgumentError: An option of the plugin does not work with the loop.
    """
    plugin = accelerator.state.fsdp_plugin
    if not is_sharded(accelerator):
        raise ArgumentError("FSDP works in version 2 alone; set fsdp_version: 2.")
    if plugin.min_num_params is not None or plugin.transformer_cls_names_to_wrap:
        raise ArgumentError(
            "FSDP splits networks by the blocks that they name themselves; set fsdp_auto_wrap_policy: "
            "TRANSFORMER_BASED_WRAP, and leave fsdp_transformer_layer_cls_to_wrap out."
        )
    if plugin.activation_checkpointing:  # it renames parameters, and checkpoints use their names
        raise ArgumentError("fsdp_activation_checkpointing does not work here; leave it off.")
    # With RAM-efficient loading, networks loaded from here on would have no weights except on the main process.
    disable_fsdp_ram_efficient_loading()
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None  # mixed precision is autocast, as without FSDP


def _is_sharded_tensor(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered from its shards if it is sharded. Call this on every process."""
    return tensor.full_tensor() if _is_sharded_tensor(tensor) else tensor


def sharded_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor` sharded like `other`, or unchanged if `other` is not sharded.

    Call this on every process. The main process's values are used.
    """
    if not _is_sharded_tensor(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)


@torch.no_grad()
def sharded_copy(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return a copy of `network` for Accelerate to shard, with the main process's weights on every process."""
    # This only wraps the network's `forward` in autocast, for validation and for the copy below.
    accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
    copy = deepcopy(network).to(accelerator.device)
    for p in copy.parameters():
        p.data = p.data.contiguous()
    broadcast([*(p.data for p in copy.parameters()), *copy.buffers()])
    # Name the classes of the blocks whose weights FSDP gathers one block at a time. Accelerate would look for the names
    # only in the outermost module, and would use the first player's names for all players.
    known = {name for module in copy.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    present = known & {type(module).__name__ for module in copy.modules()}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(present)
    return copy


@torch.no_grad()
def gather(sharded: nn.Module, network: nn.Module) -> None:
    """Copy weights and buffers from a sharded copy back into `network`. Call this on every process."""
    broadcast([*sharded.buffers()])
    targets, sources = ((*n.parameters(), *n.buffers()) for n in (network, sharded))
    for target, source in zip(targets, sources, strict=True):
        target.copy_(full_tensor(source))


def reshard(sharded: nn.Module) -> None:
    """Free the weights that a forward pass gathered: the optimizer updates the shards, and would leave them stale."""
    from torch.distributed.fsdp import FSDPModule

    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
