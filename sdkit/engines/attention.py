"""Attention for CPUs with bfloat16 in hardware but no AMX, where PyTorch's own is as slow in it as in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCORES = 2**21
"""Attention scores computed at a time: 4 MB, which stay in a processor's cache."""


def quicken_attention(network: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Give a diffusers network `attention` where that is the faster; it takes half of a bfloat16 step of SD's U-Net."""
    slow = dtype == torch.bfloat16 and device.type == "cpu" and not torch.cpu._is_amx_tile_supported()
    if slow and hasattr(network, "set_attn_processor"):
        from diffusers.models.attention_processor import AttnProcessor2_0

        network.set_attn_processor(InPieces(AttnProcessor2_0()))


class InPieces:
    """An attention processor of diffusers'. `usual` does what this cannot: gradients, masks, compiled code."""

    def __init__(self, usual: Any) -> None:
        self.usual = usual

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer `attn` applied to (B, L, C), or (B, C, h, w) in a VAE."""
        if torch.is_grad_enabled() or attention_mask is not None or torch.compiler.is_compiling():
            output: Tensor = self.usual(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return output
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (attn.head_to_batch_dim(y).contiguous() for y in projected)  # (B * heads, L, C / heads)
        x = attn.to_out[0](attn.batch_to_head_dim(attention(q, k, v)))
        if hidden_states.ndim == 4:
            x = x.transpose(1, 2).reshape(hidden_states.shape)
        attended: Tensor = (x + hidden_states if attn.residual_connection else x) / attn.rescale_output_factor
        return attended


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (N, L, d), (N, M, d) and (N, M, d), a few million scores at a time."""
    (n, rows, d), columns = q.shape, k.shape[1]
    q, k = q * d**-0.5, k.transpose(1, 2)
    output = torch.empty_like(q)
    heads, height = max(1, SCORES // (rows * columns)), max(1, min(rows, SCORES // columns))
    for i in range(0, n, heads):
        for j in range(0, rows, height):
            scores = torch.bmm(q[i : i + heads, j : j + height], k[i : i + heads])  # (heads, height, M)
            torch.bmm(scores.softmax(dim=-1), v[i : i + heads], out=output[i : i + heads, j : j + height])
    return output
