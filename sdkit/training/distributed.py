"""Many processes: work split over them, and networks sharded over them (FSDP, version 2, as Accelerate sets it up)."""

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


def make_accelerator(settings: LoopSettings, out_dir: Path) -> Accelerator:
    """Make the Accelerator with the precision and trackers of `settings`, not of Accelerate's own configuration:
    config.json alone says how a run trains."""
    for name in settings.report_to:
        one_of("report_to", name, LOGGER_TYPE_TO_CLASS)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":  # it steps the optimizer in the backward pass
        raise ArgumentError("DeepSpeed does not work here; launch with FSDP (fsdp_version: 2), which shares as much.")
    # Without this reset, a second run in this process could not have another precision, nor FSDP again.
    again = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
    AcceleratorState._reset_state(reset_partial_state=again)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=")  # of a missing tracker, which is an error below
            accelerator = Accelerator(
                mixed_precision=settings.mixed_precision,
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop accumulates itself
                log_with=list(settings.report_to) or None,
                project_dir=out_dir / "trackers",
            )
    except ValueError as error:  # fp16 without a GPU, a tracker that does not exist
        raise ArgumentError(str(error)) from error
    if len(accelerator.log_with) < len(set(settings.report_to)):
        missing = [name for name in settings.report_to if name not in map(str, accelerator.log_with)]
        raise ArgumentError(f"report_to names {missing[0]!r}, which is not installed; install it, or leave it out.")
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would use float32
        raise ArgumentError("mixed_precision 'fp16' needs a GPU; use 'bf16' or 'no'.")
    # Checked on torch 2.13: more than half of a U-Net's parameters get a gradient of 0 there, in silence.
    if accelerator.device.type == "cpu" and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        AcceleratorState._reset_state()  # it would be the next Accelerator's, too
        raise ArgumentError("torch.compile loses gradients on a CPU; leave Accelerate's dynamo_backend off.")
    if accelerator.distributed_type == DistributedType.FSDP:
        set_up_fsdp(accelerator)
        if settings.use_8bit_adam:
            raise ArgumentError("use_8bit_adam does not work with FSDP; leave it off.")
    return accelerator


def on_main(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """Call `do` on the main process, and return its result, or raise its `SdkitError`, on every process."""
    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = do()
        except SdkitError as error:
            said[1] = error
    result, failure = broadcast_object_list(said)
    if failure:
        raise failure
    return result  # type: ignore[no-any-return]


def split_over_processes(n: int, do: Callable[[int], T]) -> list[T]:
    """Return `do`(i) for each i below n, each computed on one process and gathered on all. Raises `Unfinished` on every
    process if one was asked to stop before its share was done."""
    state, mine = PartialState(), list[tuple[int, T]]()
    with contextlib.suppress(Unfinished):  # the other processes wait for what there is
        for i in range(state.process_index, n, state.num_processes):
            raise_if_stopped()
            mine.append((i, do(i)))
    done: list[tuple[int, T]] = gather_object(mine)
    if len(done) < n:
        raise Unfinished
    return [one for _, one in sorted(done, key=lambda numbered: numbered[0])]


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether `accelerator` shards the networks that it prepares."""
    return bool(getattr(accelerator, "is_fsdp2", False))  # which Accelerate has since 1.6


def set_up_fsdp(accelerator: Accelerator) -> None:
    """Adapt Accelerate's FSDP plugin, and raise ArgumentError for options that do not work here."""
    plugin = accelerator.state.fsdp_plugin
    if not is_sharded(accelerator):
        raise ArgumentError("FSDP works in version 2 alone; set fsdp_version: 2.")
    if plugin.min_num_params is not None or plugin.transformer_cls_names_to_wrap:
        raise ArgumentError(
            "FSDP splits networks by the blocks that they name themselves; set fsdp_auto_wrap_policy: "
            "TRANSFORMER_BASED_WRAP, and leave fsdp_transformer_layer_cls_to_wrap out."
        )
    if plugin.activation_checkpointing:  # parameters would have other names
        raise ArgumentError("fsdp_activation_checkpointing does not work here; leave it off.")
    disable_fsdp_ram_efficient_loading()  # else what a stage loads from here on would be empty on most processes
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None  # but autocast, as without FSDP


def _is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered from its shards if it is sharded; then every process has to call."""
    return tensor.full_tensor() if _is_split(tensor) else tensor


def split_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor`, sharded like `other` if that is sharded; then every process has to call, and the main process's
    values are used."""
    if not _is_split(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)


@torch.no_grad()
def copy_to_split(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return a copy of `network` for Accelerate to shard, with the main process's weights on every process."""
    accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)  # autocast, in the copy too
    copy = deepcopy(network).to(accelerator.device)
    for p in copy.parameters():
        p.data = p.data.contiguous()
    broadcast([*(p.data for p in copy.parameters()), *copy.buffers()])
    # The blocks that are gathered one at a time. Accelerate would look for them in the outermost module alone, and
    # keep those of the first player.
    known = {name for module in copy.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    present = known & {type(module).__name__ for module in copy.modules()}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(present)
    return copy


@torch.no_grad()
def gather(split: nn.Module, network: nn.Module) -> None:
    """Copy weights and buffers from the sharded copy back into `network`; every process has to call."""
    broadcast([*split.buffers()])
    own, parts = ((*n.parameters(), *n.buffers()) for n in (network, split))
    for tensor, part in zip(own, parts, strict=True):
        tensor.copy_(full_tensor(part))


def put_away(split: nn.Module) -> None:
    """Free the weights gathered by a forward pass; they would otherwise go stale after the optimizer's step."""
    from torch.distributed.fsdp import FSDPModule

    for module in split.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
