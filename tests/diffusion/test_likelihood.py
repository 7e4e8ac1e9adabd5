"""The variational bound against a derivation in NumPy and SciPy, and against closed forms for Gaussian data, for which
the exact denoiser is known.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sdkit.diffusion.likelihood import posterior, prior_term, reverse_log_variance, step_term, variational_loss
from sdkit.diffusion.losses import discretized_gaussian_nll, normal_kl
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError

LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)
KINDS = ["epsilon", "v_prediction", "sample"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_kl_of_two_gaussians_equals_torch_distributions() -> None:
    mean, logvar, other, other_logvar = (randn(2, 3, 4, seed=i) for i in range(4))
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(other, (other_logvar / 2).exp()))
    torch.testing.assert_close(normal_kl(mean, logvar, other, other_logvar), expected, rtol=1e-10, atol=1e-12)


class TestDiscretizedGaussian:
    @pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.1), (0.97, 0.02), (-1.4, 0.5), (0.003, 1e-3), (0.2, 30.0)])
    def test_equals_scipy_and_the_levels_sum_to_1(self, mean: float, scale: float) -> None:
        nll = discretized_gaussian_nll(
            LEVELS, torch.full_like(LEVELS, mean), torch.full_like(LEVELS, math.log(scale))
        ).numpy()
        assert np.exp(-nll).sum() == pytest.approx(1, abs=1e-9)
        low, high = ((LEVELS.numpy() + side - mean) / scale for side in (-1 / 255, 1 / 255))
        low[0], high[-1] = -np.inf, np.inf
        # In the upper tail, SciPy's difference of masses is exact for the mirrored interval alone.
        mass = np.where(low > 0, norm.sf(low) - norm.sf(high), norm.cdf(high) - norm.cdf(low))
        seen = mass > 1e-250
        assert seen.sum() > 5
        np.testing.assert_allclose(nll[seen], -np.log(mass[seen]), rtol=1e-9, atol=1e-9)

    def test_far_from_its_mean_a_level_has_a_finite_gradient(self) -> None:
        mean = torch.tensor([-3.0, 0.5, 1.0]).requires_grad_()
        log_scale = torch.tensor([-9.0, -9.0, -9.0]).requires_grad_()
        nll = discretized_gaussian_nll(torch.tensor([1.0, -0.5, -1.0]), mean, log_scale)
        nll.sum().backward()
        assert nll.isfinite().all()
        assert nll.min() > 1e6
        gradients = torch.stack([mean.grad, log_scale.grad])  # type: ignore[list-item]
        assert gradients.isfinite().all()
        assert (gradients != 0).all()

    def test_its_gradient_equals_finite_differences(self) -> None:
        x = LEVELS[[0, 1, 100, 254, 255]]
        mean, log_scale = (0.5 * randn(5)).requires_grad_(), (randn(5, seed=1) - 1).requires_grad_()
        assert torch.autograd.gradcheck(lambda m, s: discretized_gaussian_nll(x, m, s), (mean, log_scale))


def by_hand(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: int, eps: Tensor, variance: Tensor | None
) -> np.ndarray:  # type: ignore[type-arg]
    """Derive L_t of each image in NumPy, from the betas alone, with the paper's sums written out."""
    betas = schedule.betas.numpy()
    alphas = np.cumprod(1 - betas)
    x, y, e = x0.numpy(), x_t.numpy(), eps.numpy()
    predicted = (y - np.sqrt(1 - alphas[t]) * e) / np.sqrt(alphas[t])
    before = alphas[t - 1] if t else 1.0

    def mean_of(clean: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        # The product of N(x_t; sqrt(1 - beta) x_{t-1}, beta) and N(x_{t-1}; sqrt(before) x0, 1 - before), by x_{t-1}.
        if t == 0:
            return clean
        precision = (1 - betas[t]) / betas[t] + 1 / (1 - before)
        pull = np.sqrt(1 - betas[t]) / betas[t] * y + np.sqrt(before) / (1 - before) * clean
        return np.asarray(pull / precision)

    def variance_of(k: int) -> float:
        return float(1 / ((1 - betas[k]) / betas[k] + 1 / (1 - alphas[k - 1])))

    true = variance_of(t or 1)
    ours = {"fixed_small": true, "fixed_large": betas[t] if t else true, "learned_range": None}[schedule.variance_type]
    if ours is None:
        assert variance is not None
        share = (variance.numpy() + 1) / 2
        ours = betas[t] ** share * true ** (1 - share)
    difference = mean_of(x) - mean_of(predicted)
    if t:
        nats = 0.5 * (np.log(ours / true) + true / ours - 1 + difference**2 / ours)
    else:
        deviation = np.sqrt(ours)
        high = np.where(x > 0.999, 1.0, norm.cdf((x + 1 / 255 - predicted) / deviation))
        low = np.where(x < -0.999, 0.0, norm.cdf((x - 1 / 255 - predicted) / deviation))
        nats = -np.log(high - low)
    return np.asarray(nats.reshape(len(x), -1).mean(1) / np.log(2))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_term_equals_numpy(kind: str, variance_type: str) -> None:
    schedule = NoiseSchedule.cosine(20, prediction_type=kind, variance_type=variance_type)
    x0 = LEVELS[torch.randint(256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(1))]
    x0[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    t = torch.tensor([0, 1, 7, 19])
    noise, off, position = randn(4, 3, 5, 5), 0.03 * randn(4, 3, 5, 5, seed=2), randn(4, 3, 5, 5, seed=3).tanh()
    x_t = schedule.add_noise(x0, noise, t)
    eps = noise + off
    clean = (x_t - (1 - schedule.alphas_cumprod[t]).sqrt()[:, None, None, None] * eps) / schedule.alphas_cumprod[
        t
    ].sqrt()[:, None, None, None]
    output = schedule.target(clean, eps, t)
    learned = variance_type == "learned_range"
    prediction = schedule.prediction(torch.cat([output, position], 1) if learned else output, x_t, t)
    found = step_term(schedule, x0, x_t, t, prediction).numpy()
    for i in range(4):
        one = slice(i, i + 1)
        expected = by_hand(schedule, x0[one], x_t[one], int(t[i]), eps[one], position[one])
        np.testing.assert_allclose(found[one], expected, rtol=1e-6)


def test_little_noise_keeps_its_digits_in_float32() -> None:
    """Early alphas of a long chain are near 1: in float32, 1 - a has few digits left."""
    schedule, t = NoiseSchedule.cosine(4000), torch.arange(12)
    x0, x_t = randn(12, 3, 5, 5).float(), randn(12, 3, 5, 5, seed=1).float()
    exact = posterior(schedule, x0.double(), x_t.double(), t)
    for found, expected in zip(posterior(schedule, x0, x_t, t), exact, strict=True):
        assert (found.dtype, expected.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=3e-7)
    zero, small = torch.zeros(1), torch.tensor([1e-3])
    nats = normal_kl(zero, small, zero, zero)
    torch.testing.assert_close(nats.double(), (small.double().exp() - 1 - small.double()) / 2, rtol=1e-4, atol=0)


def test_the_prior_term_equals_torch_distributions() -> None:
    schedule, x0 = NoiseSchedule.linear(10), randn(3, 1, 4, 4)
    a = float(schedule.alphas_cumprod[-1])
    last = Normal(math.sqrt(a) * x0, math.sqrt(1 - a))
    expected = kl_divergence(last, Normal(torch.zeros_like(x0), 1.0)).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_term(schedule, x0), expected)


class TestGaussianData:
    """x0 ~ N(m, s^2) in each dimension: the exact denoiser is E[x0 | x_t], and every marginal is a Gaussian."""

    m, s = 0.2, 0.4

    def denoised(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Tensor:
        a = schedule.alphas_cumprod[t][:, None]
        return self.m + a.sqrt() * self.s**2 / (a * self.s**2 + 1 - a) * (x_t - a.sqrt() * self.m)

    def test_the_exact_denoisers_terms_are_the_closed_form(self) -> None:
        """By the exact denoiser, E|x0 - E[x0 | x_t]|^2 = s^2 (1 - a) / (a s^2 + 1 - a): so much, times the square of
        x0's coefficient in the posterior's mean, over twice the variance, is the term of fixed_small."""
        schedule = NoiseSchedule.linear(50, variance_type="fixed_small")
        x0, noise = self.m + self.s * randn(200_000, 1), randn(200_000, 1, seed=1)
        for t in (1, 5, 25, 49):
            a, before = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[t - 1])
            beta = float(schedule.betas[t])
            missing = self.s**2 * (1 - a) / (a * self.s**2 + 1 - a)
            coefficient = math.sqrt(before) * beta / (1 - a)
            variance = (1 - before) / (1 - a) * beta
            expected = coefficient**2 * missing / (2 * variance) / math.log(2)
            times = torch.full((len(x0),), t)
            x_t = schedule.add_noise(x0, noise, times)
            clean = self.denoised(schedule, x_t, times)
            found = float(step_term(schedule, x0, x_t, times, Prediction(clean, clean)).mean())
            assert found == pytest.approx(expected, rel=0.01)

    def test_the_bound_is_the_entropy_where_the_variance_is_right(self) -> None:
        """With the exact mean and variance of p(x_{t-1} | x_t), the bound is tight: its mean is the data's entropy.
        With the fixed variances it is above."""
        schedule = NoiseSchedule.linear(30, beta_end=0.5, variance_type="learned_range")
        n = 100_000
        x0 = self.m + self.s * randn(n, 1)
        bound = {"learned": prior_term(schedule, x0).mean()} | {
            kind: prior_term(schedule, x0).mean() for kind in ("fixed_small", "fixed_large")
        }
        for t in range(30):
            times = torch.full((n,), t)
            x_t = schedule.add_noise(x0, randn(n, 1, seed=t + 1), times)
            clean = self.denoised(schedule, x_t, times)
            a = float(schedule.alphas_cumprod[t])
            before, beta = float(schedule.alphas_cumprod[t - 1]) if t else 1.0, float(schedule.betas[t])
            # Var[x_{t-1} | x_t] = the posterior's variance + coefficient^2 Var[x0 | x_t].
            coefficient = math.sqrt(before) * beta / (1 - a)
            exact = (1 - before) / (1 - a) * beta + coefficient**2 * self.s**2 * (1 - a) / (a * self.s**2 + 1 - a)
            low, high = (float(x) for x in (reverse_log_variance(fixed("fixed_small", schedule), times[:1], x0[:1]),
                                            schedule.betas[t].log()))  # fmt: skip
            position = torch.full_like(x0, 2 * (math.log(exact) - low) / (high - low) - 1)
            for kind in bound:
                own = schedule if kind == "learned" else fixed(kind, schedule)
                term = step_term(own, x0, x_t, times, Prediction(clean, clean, position), pixels=False)
                bound[kind] += term.mean()
        entropy = 0.5 * math.log2(2 * math.pi * math.e * self.s**2)
        assert float(bound["learned"]) == pytest.approx(entropy, abs=0.01)
        assert bound["fixed_small"] > entropy + 0.05
        assert bound["fixed_large"] > entropy + 0.05


def fixed(kind: str, schedule: NoiseSchedule) -> NoiseSchedule:
    return NoiseSchedule.from_betas(schedule.betas, variance_type=kind)


class TestTheLoss:
    def test_the_hybrids_gradient_reaches_the_variance_alone(self) -> None:
        schedule = NoiseSchedule.linear(10, variance_type="learned_range")
        x0, noise, t = randn(3, 2, 4, 4).clamp(-1, 1), randn(3, 2, 4, 4, seed=1), torch.tensor([0, 4, 9])
        x_t = schedule.add_noise(x0, noise, t)
        for moves_mean in (False, True):
            output = randn(3, 4, 4, 4, seed=2).requires_grad_()
            loss = variational_loss(schedule, x0, x_t, t, output, pixels=True, moves_mean=moves_mean)
            (gradient,) = torch.autograd.grad(loss.sum(), output)
            mean, variance = gradient.chunk(2, dim=1)
            assert (variance.abs().sum((1, 2, 3)) > 0).all()
            assert bool((mean != 0).any()) == moves_mean

    def test_the_gradient_equals_finite_differences(self) -> None:
        schedule = NoiseSchedule.linear(10, variance_type="learned_range")
        x0, noise, t = randn(2, 1, 2, 2).clamp(-1, 1), randn(2, 1, 2, 2, seed=1), torch.tensor([0, 4])
        x_t, output = schedule.add_noise(x0, noise, t), randn(2, 2, 2, 2, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda y: variational_loss(schedule, x0, x_t, t, y, pixels=True, moves_mean=True), (output,)
        )

    def test_a_variance_that_no_model_predicted_is_refused(self) -> None:
        schedule = NoiseSchedule.linear(10, variance_type="learned_range")
        with pytest.raises(ArgumentError, match="learned_range"):
            reverse_log_variance(schedule, torch.tensor([1]), randn(1, 2))

    def test_half_precision_is_computed_in_float32(self) -> None:
        schedule = NoiseSchedule.linear(1000, variance_type="learned_range")
        x0, t = torch.zeros(1, 1, 2, 2), torch.tensor([0])
        x_t = schedule.add_noise(x0, torch.ones_like(x0), t)
        loss = variational_loss(schedule, x0, x_t, t, torch.zeros(1, 2, 2, 2).bfloat16(), pixels=True, moves_mean=False)
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())


def test_the_posteriors_mean_is_x0_at_the_last_step() -> None:
    schedule, x0, x_t = NoiseSchedule.linear(10), randn(2, 3), randn(2, 3, seed=1)
    mean, log_variance = posterior(schedule, x0, x_t, torch.tensor([0, 0]))
    torch.testing.assert_close(mean, x0)
    assert float(log_variance[0]) == float(posterior(schedule, x0, x_t, torch.tensor([1, 1]))[1][0])
