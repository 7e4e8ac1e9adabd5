"""LoRA in training: its layers are added to networks as the settings say, and written as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sdkit.errors import ArgumentError
from sdkit.loading.lora_file import FILENAME, save_lora
from sdkit.messages import clean
from sdkit.networks.lora import add_lora, lora_layers, lora_tensors
from sdkit.training.settings import UNetConfig


def add_lora_layers(networks: Mapping[str, nn.Module], config: UNetConfig, rank: int, dtype: torch.dtype) -> None:
    """Freeze networks, and add trainable LoRA layers to them.

    Args:
        networks: The networks by the names that messages give them, such as "U-Net".
        config: The settings of the LoRA.
        rank: Its rank.
        dtype: Dtype of the frozen weights, which can be in half precision, since autocast casts them anyway.

    Raises:
        ArgumentError: No layer has the name of a target, a network has no target, or the rank is too high.
    """
    for target in config.lora_targets:
        if not any(lora_layers(network, [target]) for network in networks.values()):
            raise ArgumentError(
                f"lora_targets names {clean(target)!r}, and no layer that is trained has this name; give attention, "
                "feed_forward, convolutions, or the end of a layer's name, such as attn2.to_k."
            )
    for name, network in networks.items():
        layers = lora_layers(network, config.lora_targets).values()
        if not layers:
            raise ArgumentError(
                f"lora_targets names no layer of the {name}; add one, such as attention, or leave the {name} out."
            )
        widest = max(min(layer.weight.flatten(1).shape) for layer in layers)
        if rank > widest:
            raise ArgumentError(
                f"lora_rank {rank} is above the width of the layers that it is added to, {widest}, where LoRA saves "
                "nothing; give a smaller one."
            )
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        add_lora(
            network, rank, alpha=config.lora_alpha, dropout=config.lora_dropout, rslora=config.lora_rank_stabilized,
            targets=config.lora_targets,
        )  # fmt: skip


def export_lora(folder: Path, config: UNetConfig, unet: nn.Module, text: nn.Module | None) -> None:
    """Write the trained LoRA as pytorch_lora_weights.safetensors into a folder.

    Args:
        folder: The folder.
        config: The settings of the LoRA.
        unet: The U-Net's network.
        text: The text encoder's network; None if it was not trained.
    """
    tensors = lora_tensors(unet, text)
    save_lora(tensors, folder / FILENAME, alpha=config.lora_alpha, rslora=config.lora_rank_stabilized)
