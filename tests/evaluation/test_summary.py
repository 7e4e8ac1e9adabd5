from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from sdkit.evaluation import summary as module
from sdkit.evaluation.moments import Moments
from sdkit.evaluation.summary import Sample, Summary, hashed, in_first_half

NUMBERS = torch.arange(1000)
VECTORS = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))


def test_a_sample_does_not_depend_on_how_the_images_are_split() -> None:
    whole = Sample(5, 64)
    whole.add(NUMBERS, VECTORS)
    parts = [Sample(5, 64) for _ in range(3)]
    for i in range(0, 1000, 10):
        parts[i // 10 % 3].add(NUMBERS[i : i + 10], VECTORS[i : i + 10])
    merged = Sample.merged(parts)
    for expected, found in zip(whole.tensors(), merged.tensors(), strict=True):
        assert torch.equal(expected, found)
    numbers, vectors = whole.tensors()
    assert len(numbers) == 64
    assert torch.equal(numbers, numbers.sort().values)
    assert torch.equal(vectors, VECTORS[numbers])
    assert 300 < numbers.double().mean() < 700  # spread over the whole data, not its beginning


def test_a_sample_holds_few_vectors_however_many_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MORE", 32)
    sample = Sample(5, 64)
    for i in range(0, 1000, 8):
        sample.add(NUMBERS[i : i + 8], VECTORS[i : i + 8])
        assert len(sample._vectors) == 64 + 32
    few = Sample(5, 64)
    few.add(NUMBERS[:7], VECTORS[:7])
    assert torch.equal(few.tensors()[1], VECTORS[:7])


def test_a_sample_travels_without_the_room_for_more() -> None:
    sample = Sample(5, 5000)
    sample.add(NUMBERS[500:], VECTORS[500:])
    sample.add(NUMBERS[:500], VECTORS[:500])
    sent = pickle.dumps(sample)
    assert len(sent) < 1.2 * 1000 * (5 * 4 + 8)
    for expected, found in zip((NUMBERS, VECTORS), pickle.loads(sent).tensors(), strict=True):
        assert torch.equal(expected, found)


def test_halves_are_equally_large_random_and_apart() -> None:
    first = in_first_half(NUMBERS)
    assert int(first.sum()) == 500
    assert (first[0::2] ^ first[1::2]).all()  # one of each pair
    assert 200 < int(first[0::2].sum()) < 300  # and not always the first one
    assert len(np.unique(hashed(NUMBERS))) == 1000


def test_a_summary_of_parts_is_that_of_all() -> None:
    pixels = torch.randint(0, 256, (1000, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    logits = VECTORS.repeat(1, 2)
    whole = Summary(5, 4)
    whole.add(NUMBERS, VECTORS, logits, pixels)
    parts = [Summary(5, 4) for _ in range(2)]
    for i in range(0, 1000, 100):
        rows = slice(i, i + 100)
        parts[i // 100 % 2].add(NUMBERS[rows], VECTORS[rows], logits[rows], pixels[rows])
    merged = Summary.merged(parts)
    assert merged.count == whole.count == 1000
    assert torch.equal(merged.mean_image(), pixels.double().mean(dim=0).round().to(torch.uint8))
    expected = Moments.of(VECTORS)
    for summary in (whole, merged):
        features = summary.whole()
        torch.testing.assert_close(features.moments.mean, expected.mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(features.moments.covariance, expected.covariance, rtol=0, atol=1e-13)
        assert torch.equal(features.vectors, VECTORS)
        assert features.classes is not None
        halves = [summary.half(0), summary.half(1)]
        assert [half.count for half in halves] == [500, 500]
        for half in halves:
            torch.testing.assert_close(half.moments.mean, half.vectors.double().mean(dim=0), rtol=0, atol=1e-14)
