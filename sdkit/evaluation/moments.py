"""Mean and covariance of feature vectors, collected batch by batch in float64 and merged across processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sdkit.errors import ArgumentError

ROWS = 1024
"""Vectors that are converted to float64 at a time."""


def check_comparable(a: Tensor, b: Tensor) -> None:
    """Check that features of two sets can be compared.

    Args:
        a: Vectors (N, D), or their mean (D,).
        b: Vectors (M, D), or their mean (D,).

    Raises:
        ArgumentError: The widths differ, or a number is not finite.
    """
    if a.shape[-1] != b.shape[-1]:
        raise ArgumentError(
            f"features of {a.shape[-1]} and {b.shape[-1]} numbers cannot be compared; extract both with one network."
        )
    for features in (a, b):
        check_finite_features(features)


def check_finite_features(features: Tensor) -> None:
    """Raise ArgumentError if a feature is NaN or infinite: the maximum of 0 and NaN would be a perfect distance."""
    if not bool(torch.isfinite(features).all()):
        raise ArgumentError("features must be finite numbers; these hold NaN or infinity.")


def float64_blocks(vectors: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield vectors (N, D) on the CPU in float64, at most `rows` at a time, so that no whole copy is held."""
    for block in vectors.detach().split(rows):
        yield block.cpu().double()


def mean_of(vectors: Tensor) -> Tensor:
    """Return the mean (D,) of vectors (N, D), in float64."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for block in float64_blocks(vectors, ROWS):
        total += block.sum(dim=0)
    return total / len(vectors)


class Moments:
    """Mean and scatter of vectors, updated batch by batch (Chan et al. 1979, eq. 2.1).

    Deviations are taken from the running mean, so that large means cost no digits. Everything is float64 on the CPU:
    the memory is 8 D^2 bytes, however many vectors are added.

    Attributes:
        count: Number of vectors.
        mean: Their mean (D,).
        scatter: Sum of the outer products of their deviations from the mean (D, D).
    """

    def __init__(self, width: int) -> None:
        """Start without vectors; `width` is D."""
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, vectors: Tensor) -> Moments:
        """Return the moments of vectors (N, D)."""
        moments = cls(vectors.shape[1])
        moments.add(vectors)
        return moments

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """Return the moments of the union of disjoint sets. They equal the moments of all vectors up to rounding."""
        first, *others = parts
        whole = cls(len(first.mean))
        for part in (first, *others):
            whole.scatter += part.scatter
            whole._merge_means(part.count, part.mean)
        return whole

    @property
    def width(self) -> int:
        """D, the number of features in a vector."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D): the scatter over N - 1; zero for a single vector.

        Raises:
            ArgumentError: There is no vector.
        """
        if not self.count:
            raise ArgumentError("there is no image to measure; give at least one.")
        return self.scatter / max(self.count - 1, 1)

    def add(self, vectors: Tensor) -> None:
        """Add vectors (B, D) of any floating-point type, on any device."""
        batch = vectors.detach().cpu().to(torch.float64, copy=True)
        if len(batch):
            mean = batch.mean(dim=0)
            batch -= mean
            self.scatter.addmm_(batch.T, batch)
            self._merge_means(len(batch), mean)

    def _merge_means(self, count: int, mean: Tensor) -> None:
        """Merge the count and the mean of other vectors, whose own scatter has been added already.

        The scatter changes in place: temporary D x D matrices, many per second, would fragment the heap.
        """
        total = self.count + count
        if total == 0:
            return
        shift = mean - self.mean
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
