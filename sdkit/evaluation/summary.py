"""The summary of a set of images: bounded, however many there are, and however they are split over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdkit.evaluation.extractors import Extractor
from sdkit.evaluation.inception_score import InceptionScore
from sdkit.evaluation.moments import Moments

KEPT = 10_000
"""Vectors that are kept for metrics of pairs of images; the moments cover all images."""
MORE = 1024
"""Vectors beyond these for which there is room before the superfluous ones are dropped."""


@dataclass(frozen=True)
class Features:
    """The features of a set of images that metrics take.

    Attributes:
        count: Number of images.
        moments: Moments of the features of all of them.
        vectors: Features of a random sample of at most 10,000 (n, D).
        classes: Their Inception score, if the network has classes.
    """

    count: int
    moments: Moments
    vectors: Tensor
    classes: InceptionScore | None

    @property
    def exact(self) -> Moments | Tensor:
        """The argument for the Fréchet distance: all vectors if there are no more, or else the moments."""
        return self.vectors if len(self.vectors) == self.count else self.moments


class Summary:
    """Features of a set of images: the moments of all, and the vectors of at most 10,000.

    It depends only on the images and their numbers. Parts from several processes merge into the summary that one
    process would make, up to rounding of the moments.

    Attributes:
        width: D, the number of features.
        halves: Moments of two random halves of the images.
        vectors: A random sample of the vectors.
        classes: The Inception score, if the network has classes.
        pixels: Sum of the prepared images (3, side, side), float64.
    """

    def __init__(self, width: int, side: int) -> None:
        """Start without images."""
        self.width = width
        self.halves = (Moments(width), Moments(width))
        self.vectors = Sample(width, KEPT)
        self.classes: InceptionScore | None = None
        self.pixels = torch.zeros(3, side, side, dtype=torch.float64)

    @classmethod
    def of_copies(cls, image: Tensor, count: int, extractor: Extractor) -> Summary:
        """Return the summary of a set of `count` copies of one prepared image (3, side, side).

        Its vectors are at most 10,000, too.
        """
        summary = cls(extractor.width, extractor.side)
        features, logits = extractor.outputs(image[None])
        copies = min(count, KEPT)
        summary.add(torch.arange(copies), features.expand(copies, -1), None)
        if logits is not None:
            summary.classes = InceptionScore(logits.shape[1])
            summary.classes.add(logits)
        return summary

    @classmethod
    def merged(cls, parts: Sequence[Summary]) -> Summary:
        """Return the summary of all images, from the summaries of disjoint sets of them."""
        if len(parts) == 1:
            return parts[0]  # no copy of its vectors
        whole = cls(parts[0].width, parts[0].pixels.shape[-1])
        first, second = (Moments.merged(part.halves[i] for part in parts) for i in range(2))
        whole.halves = (first, second)
        whole.vectors = Sample.merged([part.vectors for part in parts])
        scores = [part.classes for part in parts if part.classes]
        whole.classes = InceptionScore.merged(scores) if scores else None
        whole.pixels = torch.stack([part.pixels for part in parts]).sum(dim=0)
        return whole

    @property
    def count(self) -> int:
        """Number of images."""
        return self.halves[0].count + self.halves[1].count

    def add(self, numbers: Tensor, vectors: Tensor, logits: Tensor | None, pixels: Tensor | None = None) -> None:
        """Add images.

        Args:
            numbers: Their numbers in the data (B,), int64, each of which is added once.
            vectors: Their features (B, D).
            logits: Their logits (B, K), if the network has classes.
            pixels: The prepared images (B, 3, side, side), if their mean is wanted.
        """
        first = in_first_half(numbers)
        self.halves[0].add(vectors[first])
        self.halves[1].add(vectors[~first])
        self.vectors.add(numbers, vectors)
        if logits is not None:
            self.classes = self.classes or InceptionScore(logits.shape[1])
            self.classes.add(logits)
        if pixels is not None:
            self.pixels += pixels.double().sum(dim=0)

    def mean_image(self) -> Tensor:
        """Return the mean of the prepared images, rounded to uint8 (3, side, side)."""
        return (self.pixels / self.count).round().to(torch.uint8)

    def whole(self) -> Features:
        """Return what metrics take of all images."""
        return Features(self.count, Moments.merged(self.halves), self.vectors.tensors()[1], self.classes)

    def half(self, i: int) -> Features:
        """Return what metrics take of a half of the images, 0 or 1. The Inception score is that of all images."""
        numbers, vectors = self.vectors.tensors()
        chosen = in_first_half(numbers) == (i == 0)
        return Features(self.halves[i].count, self.halves[i], vectors[chosen], self.classes)


class Sample:
    """A uniform random sample of vectors with numbers: those whose hashed numbers are the smallest.

    Which vectors belong to it depends only on their numbers, so that samples of parts merge exactly.

    Attributes:
        size: Largest number of vectors.
    """

    def __init__(self, width: int, size: int) -> None:
        """Start without vectors of `width` features."""
        self.size = size
        # The system hands out the pages of this block as they are filled. A small tensor for each batch would lie
        # between the large ones that come and go, and may fragment the heap.
        self._numbers = torch.empty(size + MORE, dtype=torch.int64)
        self._vectors = torch.empty(size + MORE, width)
        self._held, self._in_order = 0, True

    @classmethod
    def of(cls, size: int, *parts: tuple[Tensor, Tensor]) -> Sample:
        """Return the sample of disjoint sets, each given by its numbers (B,) and its vectors (B, D)."""
        whole = cls(parts[0][1].shape[1], size)
        for numbers, vectors in parts:
            whole.add(numbers, vectors)
        return whole

    @classmethod
    def merged(cls, parts: Sequence[Sample]) -> Sample:
        """Return the sample of the union of disjoint sets."""
        return cls.of(parts[0].size, *(part.tensors() for part in parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is filled of the block; other processes get it so."""
        numbers, vectors = self.tensors()
        return Sample.of, (self.size, (numbers.clone(), vectors.clone()))

    def add(self, numbers: Tensor, vectors: Tensor) -> None:
        """Add vectors (B, D) and their numbers (B,), int64."""
        for some, theirs in zip(numbers.split(MORE), vectors.detach().split(MORE), strict=True):
            if self._held + len(some) > len(self._numbers):
                self._prune()
            end = self._held + len(some)
            self._numbers[self._held : end], self._vectors[self._held : end] = some, theirs
            self._held, self._in_order = end, False

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the sampled numbers (n,), in increasing order, and their vectors (n, D), float32."""
        if not self._in_order:
            self._prune()
        return self._numbers[: self._held], self._vectors[: self._held]

    def _prune(self) -> None:
        """Keep the sample, in the order of the numbers."""
        numbers = self._numbers[: self._held]
        kept = torch.from_numpy(np.argsort(hashed(numbers), kind="stable")[: self.size])
        kept = kept[numbers[kept].argsort()]
        self._held, self._in_order = len(kept), True
        self._numbers[: self._held], self._vectors[: self._held] = numbers[kept], self._vectors[kept]


def in_first_half(numbers: Tensor) -> Tensor:
    """Return which images belong to the first half of their set (B,), bool.

    Of images 2i and 2i + 1, a hash of i chooses one. The halves are then equally large, and neither takes, say, the
    first picture of every pair in the data.
    """
    coins = torch.from_numpy((hashed(numbers // 2) & np.uint64(1)).astype(np.int64))
    return (numbers.cpu() + coins) % 2 == 0


def hashed(numbers: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """Return a pseudo-random uint64 for each number (SplitMix64, Steele et al. 2014)."""
    x = numbers.cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] = x ^ (x >> np.uint64(31))
    return mixed
