"""Codebook usage: the share of codes that occur, and their perplexity."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_use(numbers: Tensor, size: int) -> tuple[float, float]:
    """Return the share of codes that occur, and the perplexity of their frequencies.

    The perplexity is the exponential of the entropy in nats; it is `size` where all codes are equally frequent.

    Args:
        numbers: Indices of the chosen codes, of any shape.
        size: Number of codes in the codebook.

    Returns:
        The share of codes that occur, in [0, 1], and the perplexity, in [1, size].
    """
    return use_of_counts(torch.bincount(numbers.flatten().cpu(), minlength=size))


def use_of_counts(counts: Tensor) -> tuple[float, float]:
    """Return the share of codes that occur, and the perplexity of their frequencies, as `codebook_use` does.

    Args:
        counts: How often each code was chosen (N,), as numbers or as shares.
    """
    counts = counts.cpu().double()
    shares = counts[counts > 0] / counts.sum()
    return float((counts > 0).double().mean()), float(torch.exp(-(shares * shares.log()).sum()))
