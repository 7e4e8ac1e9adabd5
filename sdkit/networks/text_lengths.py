"""Texts of unequal length in a batch, where diffusers has no mask for the padding.

A ControlNet is called once for each length. A U-Net with `addition_embed_type: "text"`, which adds the pooled text to
the timestep, has a mask for its cross-attention alone; here it gets one for the pooling, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_thread = threading.local()


def of_equal_length(text: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the texts of each length without their padding.

    Args:
        text: Embeddings (B, L, D).
        mask: (B, L), True for tokens and False for padding.

    Yields:
        Indices (n,) of the texts with a length l, and their embeddings (n, l, D).
    """
    lengths = mask.sum(1)
    for length in lengths.unique().tolist():
        (rows,) = (lengths == length).nonzero(as_tuple=True)
        yield rows, text[rows][mask[rows]].view(len(rows), length, text.shape[2])


def pool_without_padding(pooling: torch.nn.Module) -> None:
    """Make a `TextTimeEmbedding` of diffusers leave out the padding that `padded` tells."""
    # Outside of compiled graphs, which would keep the mask that they saw first.
    pooling.register_forward_hook(torch.compiler.disable(_without_padding))


@contextmanager
def padded(mask: Tensor | None) -> Iterator[None]:
    """Tell the networks that are called in the block, in this thread, the mask (B, L) of their text, if it has one."""
    before = getattr(_thread, "mask", None)
    _thread.mask = mask
    try:
        yield
    finally:
        _thread.mask = before


def _without_padding(pooling: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    """Forward hook: pool again, once for each number of tokens."""
    mask = getattr(_thread, "mask", None)
    if mask is None:
        return None
    pooled = torch.empty_like(output)
    for rows, tokens in of_equal_length(inputs[0], mask):
        pooled = pooled.index_copy(0, rows, pooling.forward(tokens))
    return pooled
