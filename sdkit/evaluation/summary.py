"""The summary of a set of images: bounded, however many there are, and however they are split over processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdkit.evaluation.extractors import Extractor
from sdkit.evaluation.inception_score import InceptionScore
from sdkit.evaluation.moments import Moments

KEPT = 10_000
"""Vectors that are kept for metrics of pairs of images; the moments cover all images."""
MORE = 1024
"""Vectors above these that are added before the superfluous ones are dropped, all at a time."""


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
        self._numbers = [torch.zeros(0, dtype=torch.int64)]
        self._vectors = [torch.zeros(0, width)]
        self._held = 0

    @classmethod
    def merged(cls, parts: Sequence[Sample]) -> Sample:
        """Return the sample of the union of disjoint sets."""
        whole = cls(parts[0]._vectors[0].shape[1], parts[0].size)
        for part in parts:
            whole.add(*part.tensors())
        return whole

    def add(self, numbers: Tensor, vectors: Tensor) -> None:
        """Add vectors (B, D) and their numbers (B,), int64."""
        self._numbers.append(numbers.cpu())
        self._vectors.append(vectors.detach().float().cpu())
        self._held += len(numbers)
        if self._held > self.size + MORE:
            self._prune()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the sampled numbers (n,), in increasing order, and their vectors (n, D), float32."""
        self._prune()
        return self._numbers[0], self._vectors[0]

    def _prune(self) -> None:
        """Hold the sample as a single tensor of numbers, in increasing order, and one of vectors."""
        if len(self._numbers) == 1:
            return
        numbers, vectors = torch.cat(self._numbers), torch.cat(self._vectors)
        kept = torch.from_numpy(np.argsort(hashed(numbers), kind="stable")[: self.size])
        kept = kept[numbers[kept].argsort()]
        self._numbers, self._vectors, self._held = [numbers[kept]], [vectors[kept]], len(kept)


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
