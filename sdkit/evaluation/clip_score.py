"""CLIP score (Hessel et al. 2021, https://arxiv.org/abs/2104.08718): how well images fit their prompts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdkit.errors import ArgumentError

WEIGHT = 2.5
"""Factor w of the paper, which stretches the usual cosines to about [0, 1]."""


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return the CLIP score as its paper defines it: 2.5 max(cos, 0) (eq. 1).

    Papers on generation report 100 cos instead, often under the same name: see `clip_cosine`.

    Args:
        images: CLIP's embeddings of images (B, D), of any length.
        texts: CLIP's embeddings of their prompts (B, D), from the same CLIP.

    Returns:
        Scores (B,), float64 in [0, 2.5].

    Raises:
        ArgumentError: The shapes differ.
    """
    return WEIGHT * _cosines(images, texts).clamp(min=0)


def clip_cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Return 100 cos of embeddings, which papers on text-to-image models report as "CLIP score".

    Args:
        images: CLIP's embeddings of images (B, D), of any length.
        texts: CLIP's embeddings of their prompts (B, D), from the same CLIP.

    Returns:
        Cosines (B,) times 100, float64 in [-100, 100].

    Raises:
        ArgumentError: The shapes differ.
    """
    return 100 * _cosines(images, texts)


def _cosines(images: Tensor, texts: Tensor) -> Tensor:
    if images.shape != texts.shape:
        raise ArgumentError(
            f"embeddings of images {tuple(images.shape)} and of prompts {tuple(texts.shape)} do not fit each other; "
            "give one prompt for each image, and embed both with one CLIP."
        )
    return F.cosine_similarity(images.double(), texts.double(), dim=1)
