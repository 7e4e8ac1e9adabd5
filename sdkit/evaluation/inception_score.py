"""Inception score (Salimans et al. 2016, https://arxiv.org/abs/1606.03498): classes that are clear and diverse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sdkit.errors import ArgumentError


class InceptionScore:
    """Inception score of images whose logits are added batch by batch: exp E[KL(p(y|x) || p(y))].

    It is taken over all images at once. The paper's mean over ten splits is lower, since p(y) is estimated from a tenth
    of the images (Barratt & Sharma 2018, https://arxiv.org/abs/1801.01973, section 4.1.2). It ignores the reference.

    Attributes:
        count: Number of images.
        probabilities: Sum of p(y|x) over the images (K,), float64.
        negative_entropy: Sum of p(y|x) log p(y|x) over images and classes.
    """

    def __init__(self, classes: int) -> None:
        """Start without images; `classes` is K."""
        self.count = 0
        self.probabilities = torch.zeros(classes, dtype=torch.float64)
        self.negative_entropy = 0.0

    @classmethod
    def merged(cls, parts: Iterable[InceptionScore]) -> InceptionScore:
        """Return the score of the union of disjoint sets of images."""
        first, *others = parts
        whole = cls(len(first.probabilities))
        for part in (first, *others):
            whole.count += part.count
            whole.probabilities += part.probabilities
            whole.negative_entropy += part.negative_entropy
        return whole

    def add(self, logits: Tensor) -> None:
        """Add images by their logits (B, K)."""
        logs = logits.cpu().double().log_softmax(dim=1)
        self.count += len(logs)
        self.probabilities += logs.exp().sum(dim=0)
        self.negative_entropy += float((logs.exp() * logs).sum())

    def value(self) -> float:
        """Return the score, from 1 (all images alike, or of no clear class) to K (each class clear and as frequent).

        Raises:
            ArgumentError: There is no image.
        """
        if not self.count:
            raise ArgumentError("there is no image to measure; give at least one.")
        mean = self.probabilities / self.count
        divergence = self.negative_entropy / self.count - float(torch.special.xlogy(mean, mean).sum())
        return float(torch.tensor(divergence, dtype=torch.float64).exp())
