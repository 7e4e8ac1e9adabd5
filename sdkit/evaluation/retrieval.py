"""Retrieval: how often an image finds its text among others, and a text its image (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.errors import ArgumentError

TOPS = (1, 5)


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Return the shares of images whose text is among the 1 or 5 nearest, and of texts likewise.

    Images with the same caption share one text: an image is right if it finds its caption, a text if it finds any image
    of it. A wrong answer that is as near as the right one counts as nearer, so that a network that embeds everything
    alike finds nothing.

    Args:
        images: Embeddings (N, D), of any length.
        texts: Embeddings (N, D) of their captions.
        captions: The captions, by which texts are told apart.

    Returns:
        `image_to_text_top1`, `image_to_text_top5`, `text_to_image_top1`, and `text_to_image_top5`; and, as
        `..._chance`, what a random order would find.

    Raises:
        ArgumentError: The numbers differ.
    """
    if not len(images) == len(texts) == len(captions) or len(images) == 0:
        raise ArgumentError(
            f"{len(images)} images, {len(texts)} texts, and {len(captions)} captions are no pairs; give one of each."
        )
    first = {caption: i for i, caption in reversed([*enumerate(captions)])}
    distinct = [*first]
    right = torch.tensor([[caption == text for text in distinct] for caption in captions])  # (N, M)
    nearness = F.normalize(images.double(), dim=1) @ F.normalize(texts[[*first.values()]].double(), dim=1).T
    metrics = dict[str, float]()
    for name, scores, answers in (("image_to_text", nearness, right), ("text_to_image", nearness.T, right.T)):
        best = scores.masked_fill(~answers, -torch.inf).amax(1, keepdim=True)
        ahead = (~(scores < best) & ~answers).sum(1)  # NaN, which compares false, finds nothing
        for k in TOPS:
            metrics[f"{name}_top{k}"] = float((ahead < k).double().mean())
            metrics[f"{name}_top{k}_chance"] = float(_chance(answers.sum(1), answers.shape[1], k).mean())
    return metrics


def _chance(answers: Tensor, n: int, k: int) -> Tensor:
    """Return the probability that k of n candidates in a random order include one of `answers` right ones."""
    misses = torch.ones(len(answers), dtype=torch.float64)
    for i in range(min(k, n)):
        misses = misses * (n - answers - i).clamp(min=0) / (n - i)
    return 1 - misses
