from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from sdkit.errors import ArgumentError
from sdkit.evaluation.frechet import (
    frechet_at_infinity,
    frechet_distance,
    frechet_interval,
    gaussian_distance,
    warn_if_few,
)
from sdkit.evaluation.moments import Moments
from tests.helpers.sentences import one_sentence

Array = NDArray[np.float64]


def vectors(n: int, width: int, seed: int, spread: float = 1.0) -> Array:
    """Draw correlated vectors (n, width) with decaying variances and a large mean."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.exp(-np.arange(width) / width * 3)
    return rng.normal(size=(n, width)) @ mixing.T * spread + 100 + seed


def of(x: Array) -> Moments:
    return Moments.of(torch.from_numpy(x))


def by_sqrtm(a: Array, b: Array) -> float:
    """The textbook formula, with scipy's square root of the unsymmetric product."""
    root = np.real(scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)))
    means = a.mean(0) - b.mean(0)
    return float(means @ means + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * np.trace(root))


def by_nuclear_norm(a: Array, b: Array) -> float:
    """Another formula, which needs no covariance: the trace is the nuclear norm of the two sets' inner products."""
    x, y = a - a.mean(0), b - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    trace = np.linalg.svd(x @ y.T, compute_uv=False).sum() / math.sqrt(n * m)
    means = a.mean(0) - b.mean(0)
    return float(means @ means + (x**2).sum() / n + (y**2).sum() / m - 2 * trace)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 400, 24), (200, 100, 64)])
def test_full_rank_equals_scipys_sqrtm(n: int, m: int, width: int) -> None:
    a, b = vectors(n, width, 0), vectors(m, width, 1, spread=1.3)
    assert frechet_distance(of(a), of(b)) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(of(a), of(b)) == pytest.approx(by_nuclear_norm(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(20, 30, 128), (3, 300, 64), (1, 40, 16), (2, 2, 50)])
def test_singular_covariances_lose_no_digits(n: int, m: int, width: int) -> None:
    a, b = vectors(n, width, 0), vectors(m, width, 1)
    expected = by_nuclear_norm(a, b) if n > 1 else float(((a[0] - b.mean(0)) ** 2).sum() + np.trace(np.cov(b.T)))
    assert frechet_distance(of(a), of(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(of(b), of(a)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), of(b)) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_distance_zero() -> None:
    for n in (5, 200):
        a = of(vectors(n, 64, 0))
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10 * float(a.covariance.trace()))


def test_closed_form_of_gaussians() -> None:
    # With covariances that share their eigenvectors, the distance is the sum over axes of squared differences of
    # means and of standard deviations. A standard deviation may be 0.
    rng = np.random.default_rng(0)
    axes = torch.from_numpy(np.linalg.qr(rng.normal(size=(12, 12)))[0])
    s, t = torch.from_numpy(rng.uniform(0, 3, (2, 12)))
    s[3] = t[3] = t[5] = 0
    m = torch.from_numpy(rng.normal(size=(2, 12)))
    expected = float((m[0] - m[1]).square().sum() + (s - t).square().sum())
    got = gaussian_distance(m[0], axes @ torch.diag(s**2) @ axes.T, m[1], axes @ torch.diag(t**2) @ axes.T)
    assert got == pytest.approx(expected, rel=1e-12)
    # For two dimensions, Tr (AB)^(1/2) = sqrt(Tr AB + 2 sqrt(det AB)), whatever the eigenvectors.
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    trace = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float((a @ b).det())))
    zero = torch.zeros(2)
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(float((a + b).trace()) - 2 * trace, rel=1e-12)


def test_moments_equal_numpys_however_they_are_collected() -> None:
    x = vectors(503, 20, 0) + 1e6  # naive sums of squares would lose twelve digits here
    whole = of(x)
    batches = Moments(20)
    for i in range(0, 503, 32):
        batches.add(torch.from_numpy(x[i : i + 32]))
    batches.add(torch.zeros(0, 20))
    merged = Moments.merged([of(x[i::3]) for i in range(3)] + [Moments(20)])
    for moments in (whole, batches, merged):
        assert moments.count == 503
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-8, atol=1e-9)
    other = of(vectors(300, 20, 1) + 1e6)
    distances = [frechet_distance(moments, other) for moments in (whole, batches, merged)]
    assert distances == pytest.approx([distances[0]] * 3, rel=1e-9)


def test_extrapolation_removes_the_bias() -> None:
    # Both sets are Gaussian, so that the true distance is known: D (0.1^2 + 0.5^2).
    width, n, true = 32, 400, 32 * (0.1**2 + 0.5**2)
    plain, extrapolated = list[float](), list[float]()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
        b = 1.5 * b + 0.1
        plain.append(frechet_distance(Moments.of(a), Moments.of(b)) - true)
        extrapolated.append(frechet_at_infinity(a, b) - true)
    assert min(plain) > 1  # the bias is large
    assert abs(np.mean(extrapolated)) < 0.15 * np.mean(plain)
    assert frechet_at_infinity(a, b, seed=3) == frechet_at_infinity(a, b, seed=3)


def test_extrapolation_is_the_intercept_of_the_line() -> None:
    # A set that is repeated has the same moments, up to N / (N - 1), whatever share of it is drawn; the distance of two
    # constant sets does not depend on N at all, so that the line is flat.
    a, b = torch.zeros(40, 6), torch.full((40, 6), 0.5)
    assert frechet_at_infinity(a, b) == pytest.approx(6 * 0.25, abs=1e-12)


def test_the_interval_covers_the_spread_of_new_samples() -> None:
    # The standard deviation of the distance over new samples is what the bootstrap estimates from one sample.
    width, n = 8, 300
    reference = Moments.of(torch.randn(20_000, width, generator=torch.Generator().manual_seed(99)).double())
    samples = [torch.randn(n, width, generator=torch.Generator().manual_seed(s)).double() + 0.5 for s in range(60)]
    distances = [frechet_distance(Moments.of(sample), reference) for sample in samples]
    low, high = frechet_interval(samples[0], reference, distances[0], resamples=60)
    assert low < distances[0] < high
    assert (high - low) / 2 / 1.959964 == pytest.approx(np.std(distances), rel=0.35)


def test_bad_input_is_one_sentence() -> None:
    a = of(vectors(10, 4, 0))
    one_sentence(lambda: frechet_distance(a, Moments(4)), ArgumentError, "there is no image to measure")
    one_sentence(lambda: frechet_distance(a, torch.zeros(0, 4)), ArgumentError, "there is no image to measure")
    one_sentence(lambda: frechet_distance(a, of(vectors(10, 5, 0))), ArgumentError, "features of 4 and 5 numbers")
    one_sentence(lambda: frechet_at_infinity(torch.zeros(3, 2), torch.zeros(9, 2)), ArgumentError, "3 images are too")
    one_sentence(lambda: frechet_interval(torch.zeros(9, 2), a, 0.0, resamples=1), ArgumentError, "resamples")
    damaged = vectors(10, 4, 0)
    damaged[3, 1] = math.nan
    for b in (torch.from_numpy(damaged), of(damaged)):
        one_sentence(lambda b=b: frechet_distance(a, b), ArgumentError, "features must be finite numbers")


def test_the_bias_of_isotropic_features_is_as_stated() -> None:
    width, n = 30, 3000
    found = [frechet_distance(*torch.randn(2, n, width, generator=torch.Generator().manual_seed(s))) for s in range(4)]
    # The second-order expansion: D (D + 1) / 2N of the covariances, and 2D / N of the means.
    assert np.mean(found) == pytest.approx(width * (width + 1) / (2 * n) + 2 * width / n, rel=0.1)


def test_fewer_images_than_features_warn() -> None:
    with pytest.warns(UserWarning, match="10 images are fewer than the 64 features of alex: the Fréchet distance"):
        warn_if_few(10, 64, "alex")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few(64, 64, "alex")
