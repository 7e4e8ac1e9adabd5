"""Attention whose backward pass is fast on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainWhereSmall:
    """An attention processor of diffusers' for training: in bfloat16 on a CPU, the backward pass of PyTorch's fused
    attention takes twice as long as that of plain matrix products, where there are few tokens (all of a step of the
    embedded model's U-Net: 0.46 s against 0.39 s)."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self.fused, self.plain = AttnProcessor2_0(), AttnProcessor()

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer `attn` applied to (B, L, C)."""
        small = hidden_states.device.type == "cpu" and hidden_states.shape[1] <= 256
        process = self.plain if small and torch.is_autocast_enabled("cpu") else self.fused
        attended: Tensor = process(attn, hidden_states, *args, **kwargs)
        return attended
