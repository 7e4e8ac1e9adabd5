"""The Inception score and the CLIP score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from sdkit.errors import ArgumentError
from sdkit.evaluation.clip_score import clip_cosine, clip_score
from sdkit.evaluation.inception_score import InceptionScore
from tests.helpers.sentences import one_sentence


def test_inception_score_equals_scipys_relative_entropies() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 20)) * 3
    p = softmax(logits, axis=1)
    expected = np.exp(np.mean([entropy(row, p.mean(0)) for row in p]))
    whole = InceptionScore(20)
    whole.add(torch.from_numpy(logits))
    parts = [InceptionScore(20) for _ in range(3)]
    for i, part in enumerate(parts):
        for row in logits[i::3]:
            part.add(torch.from_numpy(row[None]))
    for score in (whole, InceptionScore.merged(parts)):
        assert score.count == 50
        assert score.value() == pytest.approx(expected, rel=1e-12)


def test_inception_score_at_its_bounds() -> None:
    best, blurred, alike = InceptionScore(8), InceptionScore(8), InceptionScore(8)
    best.add(1e4 * torch.eye(8))  # each class once, without doubt; probabilities underflow to 0
    blurred.add(torch.zeros(5, 8))
    alike.add(torch.tensor([[3.0, 1, 0, 0, 0, 0, 0, 0]]).expand(5, -1))
    assert best.value() == pytest.approx(8)
    assert blurred.value() == pytest.approx(1)
    assert alike.value() == pytest.approx(1)
    one_sentence(lambda: InceptionScore(8).value(), ArgumentError, "there is no image to measure")


def test_clip_score_in_closed_form() -> None:
    images = torch.tensor([[3.0, 0], [1, 1], [0, 2], [-1, 0]])
    texts = torch.tensor([[5.0, 0], [2, 0], [1, 0], [1, 0]])
    half = 2**-0.5
    assert clip_score(images, texts).tolist() == pytest.approx([2.5, 2.5 * half, 0, 0])
    assert clip_cosine(images, texts).tolist() == pytest.approx([100, 100 * half, 0, -100])
    assert clip_score(images.half(), texts).dtype == torch.float64
    one_sentence(lambda: clip_score(images, texts[:2]), ArgumentError, "(4, 2)", "(2, 2)", "do not fit each other")
