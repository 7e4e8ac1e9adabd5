"""Networks split over the processes: fully sharded data parallelism (FSDP, version 2) as Accelerate sets it up."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, TypeGuard

import torch
from accelerate.utils import broadcast, disable_fsdp_ram_efficient_loading
from torch import Tensor, nn

from sdkit.errors import ArgumentError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.tensor import DTensor  # slow to import


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether `accelerator` splits what it prepares."""
    return bool(getattr(accelerator, "is_fsdp2", False))  # which Accelerate has since 1.6


def set_up_fsdp(accelerator: Accelerator) -> None:
    """Take from Accelerate's configuration what suits, and raise ArgumentError for what does not."""
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


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, or all of it where each process holds a part; then every process has to ask."""
    return tensor.full_tensor() if _is_split(tensor) else tensor


def split_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, split over the processes where `other` is; then every process has to call, and that of the main process
    counts."""
    if not _is_split(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)


@torch.no_grad()
def copy_to_split(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy of `network` for Accelerate to split, the same on every process, as data parallelism would make it."""
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
    """Give `network` the weights and buffers of the copy of it that is split; every process has to call."""
    broadcast([*split.buffers()])
    own, parts = ((*n.parameters(), *n.buffers()) for n in (network, split))
    for tensor, part in zip(own, parts, strict=True):
        tensor.copy_(whole(part))


def put_away(split: nn.Module) -> None:
    """Free the weights that a forward pass has gathered, which would else outlive the optimizer's step."""
    from torch.distributed.fsdp import FSDPModule

    for module in split.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
