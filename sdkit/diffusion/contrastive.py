"""CLIP's contrastive loss (Radford et al. 2021, https://arxiv.org/abs/2103.00020, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(images: Tensor, texts: Tensor, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Return the symmetric cross-entropy of N pairs: each image is to find its text among all, and each text its image.

    Args:
        images: Embeddings (N, D), of any length.
        texts: Embeddings (N, D) of their texts, of any length.
        scale: Factor of the cosines: the inverse of the temperature.
        same: (N, N), True where two pairs have the same text. Such a pair is no wrong answer, and is left out of the
            sums over wrong answers (a masked false negative). None: all texts differ.

    Returns:
        The loss, a scalar. A guess at random has ln N.
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    if same is not None:
        own = torch.eye(len(images), dtype=torch.bool, device=same.device)
        logits = logits.masked_fill(same & ~own, -torch.inf)
    right = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def equal_rows(ids: Tensor) -> Tensor:
    """Return (N, N), True where two rows of token ids (N, L) are equal."""
    return (ids[:, None] == ids[None]).all(dim=2)
