from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.preprocessing import normalize

from sdkit.errors import ArgumentError
from sdkit.evaluation import kernel_distance
from sdkit.evaluation.kernel_distance import cmmd, kid
from tests.helpers.sentences import one_sentence

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(70, 12)), RNG.normal(size=(55, 12)) * 1.2 + 0.3


def kid_by_sklearn(a: Array, b: Array) -> float:
    """Eq. 3 of Gretton et al. 2012 from whole kernel matrices: sklearn's default gamma is 1 / D, its degree 3."""
    aa, bb, ab = (polynomial_kernel(x, y, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    off_a, off_b = aa[~np.eye(len(a), dtype=bool)], bb[~np.eye(len(b), dtype=bool)]
    return float(off_a.mean() + off_b.mean() - 2 * ab.mean())


def cmmd_by_sklearn(a: Array, b: Array) -> float:
    """The paper's published code: normalised embeddings, sigma 10, means that include the diagonal, times 1000."""
    a, b = normalize(a), normalize(b)
    aa, bb, ab = (rbf_kernel(x, y, gamma=1 / (2 * 10**2)) for x, y in ((a, a), (b, b), (a, b)))
    return float(1000 * (aa.mean() + bb.mean() - 2 * ab.mean()))


@pytest.mark.parametrize("block", [16, 1024])
def test_equal_to_whole_kernel_matrices_of_sklearn(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(kernel_distance, "BLOCK", block)
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    assert kid(a, b) == pytest.approx(kid_by_sklearn(A, B), rel=1e-10)
    assert cmmd(a, b) == pytest.approx(cmmd_by_sklearn(A, B), rel=1e-9)
    assert kid(a, b) == pytest.approx(kid(b, a), rel=1e-12)
    assert kid(a.float(), b.float()) == pytest.approx(kid_by_sklearn(A, B), rel=1e-5)


def test_kid_is_unbiased_and_cmmd_of_equal_sets_is_zero() -> None:
    # Small sets of one distribution: the mean of many estimates is 0 within its standard error; the biased estimate
    # would be far above.
    estimates = [kid(*torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(s))) for s in range(400)]
    error = float(np.std(estimates)) / math.sqrt(len(estimates))
    assert abs(float(np.mean(estimates))) < 3 * error
    assert min(estimates) < 0
    a = torch.from_numpy(A)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-10)
    assert cmmd(a, 7 * a) == pytest.approx(0, abs=1e-10)  # only directions count


def test_closed_forms() -> None:
    # Copies of two unit vectors at a right angle: |x - y|^2 = 2.
    x, y = torch.eye(4)[:1].expand(9, -1), torch.eye(4)[1:2].expand(9, -1)
    assert kid(x, y) == pytest.approx(2 * (1 / 4 + 1) ** 3 - 2 * 1, rel=1e-12)
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-10)


def test_bad_input_is_one_sentence() -> None:
    one_sentence(lambda: kid(torch.zeros(1, 3), torch.zeros(5, 3)), ArgumentError, "at least 2 images", "not 1 and 5")
    one_sentence(lambda: cmmd(torch.zeros(0, 3), torch.zeros(5, 3)), ArgumentError, "at least 1 images")
    one_sentence(lambda: kid(torch.zeros(4, 3), torch.zeros(5, 2)), ArgumentError, "features of 3 and 2 numbers")
    damaged = torch.full((5, 3), math.nan)  # not a perfect CMMD of 0
    for metric in (kid, cmmd):
        one_sentence(lambda metric=metric: metric(torch.zeros(4, 3), damaged), ArgumentError, "must be finite numbers")
