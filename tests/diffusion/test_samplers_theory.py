"""Samplers on data from N(MEAN, STD^2), for which the exact eps, v, and x0 predictions are known.

The predictions are affine in x_t, and so is each step. A sampler's mean and variance therefore follow exactly from a
few runs, without statistics. A scalar is an image of shape (1, 1, 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from sdkit.diffusion.samplers import (
    ddim,
    ddpm,
    dpm_solver,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    first_order,
    heun,
    unipc,
)
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from tests.helpers import reference

MEAN, STD = 0.7, 0.4
SAMPLERS: dict[str, Callable[..., Any]] = {
    "ddim": ddim,
    "ddim eta 1": lambda *args, **kwargs: ddim(*args, eta=1.0, **kwargs),
    "ddpm": ddpm,
    "ddpm fixed_large": lambda *args, **kwargs: ddpm(*args, variance_type="fixed_large", **kwargs),
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "dpm++2m_sde": dpmpp_2m_sde,
    "dpm++sde": dpmpp_sde,
    "unipc": unipc,
}
ORDERS = {"heun": 2, "dpm++2m": 2, "unipc": 3, "dpm++2m_sde": 2, "dpm++sde": 2}
"""Order of convergence; that of the others is 1."""
Pairs = list[tuple[int, int]]


def exact(schedule: NoiseSchedule, mean: float = MEAN, std: float = STD) -> Callable[[torch.Tensor, int], Prediction]:
    """Make the perfect model of this data, with outputs in the schedule's own parameterisation."""

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        a, x = float(schedule.alphas_cumprod[t]), x_t.numpy()
        x0, eps = reference.gaussian_x0(x, a, mean, std), reference.gaussian_eps(x, a, mean, std)
        output = torch.from_numpy(reference.to_output(schedule.prediction_type, x0, eps, a))
        return schedule.prediction(output.to(x_t.dtype), x_t, t)

    return predict


def column(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)  # (B, 1, 1, 1)


def last(steps: Any) -> torch.Tensor:
    return list(steps)[-1].x.flatten()  # (B,)


# Order of convergence to the probability-flow ODE


def dense(num_timesteps: int = 20_000, low: float = -3.0, high: float = 3.0) -> NoiseSchedule:
    """Make a schedule in which lambda, half the log-SNR, falls evenly from `high` at t = 0 to `low` at T - 1."""
    a = 1 / (1 + np.exp(-2 * np.linspace(high, low, num_timesteps)))
    return NoiseSchedule.from_betas(torch.from_numpy(1 - a / np.concatenate([[1.0], a[:-1]])))


def strided(num_timesteps: int, n: int) -> Pairs:
    """Return n even strides from T - 1 to 0. They avoid both ends of the process, where lambda is infinite."""
    t = np.linspace(num_timesteps - 1, 0, n + 1).round().astype(int).tolist()
    return list(itertools.pairwise(t))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm++2m", 2), ("unipc", 3)])
def test_error_falls_at_the_methods_order(name: str, order: int) -> None:
    schedule = dense()
    x_T = np.array([-2.0, -1.0, 0.5, 2.0])
    a = schedule.alphas_cumprod
    expected = reference.gaussian_flow(x_T, float(a[-1]), float(a[0]), MEAN, STD)
    counts = [20, 40, 80, 160, 320]
    errors = []
    for n in counts:
        x = last(SAMPLERS[name](exact(schedule), column(x_T), schedule, strided(20_000, n)))
        errors.append(np.abs(x.numpy() - expected).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)
    assert errors[-1] < {1: 5e-3, 2: 5e-5, 3: 5e-7}[order]


# Mean and variance


def moments(name: str, schedule: NoiseSchedule, pairs: Pairs, mean: float, variance: float) -> tuple[float, float]:
    """Compute the exact mean and variance of the samples if x_T ~ N(mean, variance).

    A sampler maps x_T and the noises z_k of its steps to A x_T + b + sum of c_k z_k. One run of a batch gives all of
    these: its first image has x_T = 0, its second x_T = 1, and each other one has x_T = 0 and a single z_k = 1.
    """
    drawn = 0

    def one_at_a_time(x: torch.Tensor, _: object) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return torch.zeros_like(x).index_fill_(0, torch.tensor(1 + drawn), 1.0)

    x_T = torch.zeros(2 + 2 * len(pairs), dtype=torch.float64)  # no sampler draws more than two noises a step
    x_T[1] = 1.0
    with patch.object(first_order, "noise_like", one_at_a_time), patch.object(dpm_solver, "noise_like", one_at_a_time):
        b, b_plus_a, *b_plus_c = last(SAMPLERS[name](exact(schedule), column(x_T), schedule, pairs)).tolist()
    noise = sum((with_noise - b) ** 2 for with_noise in b_plus_c[:drawn])
    return b + (b_plus_a - b) * mean, (b_plus_a - b) ** 2 * variance + noise


def marginal(a: float) -> tuple[float, float]:
    """Mean and variance of q(x_t)."""
    return math.sqrt(a) * MEAN, a * STD**2 + 1 - a


@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_is_exact_and_variance_converges_at_the_methods_order(name: str) -> None:
    """Sampling starts from q(x_t) at one end of the dense schedule and must reach q(x_t) at the other."""
    schedule = dense()
    begin, end = (marginal(float(schedule.alphas_cumprod[t])) for t in (-1, 0))
    counts = [20, 40, 80, 160, 320]
    errors = []
    for n in counts:
        mean, variance = moments(name, schedule, strided(20_000, n), *begin)
        assert mean == pytest.approx(end[0], abs=1e-9)
        errors.append(abs(variance / end[1] - 1))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(ORDERS.get(name, 1), abs=0.2)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_mean_and_variance_of_the_data_are_reached_on_stable_diffusions_schedule(name: str, kind: Any) -> None:
    """Sampling runs all the way from q(x_T) to x0. Most of the remaining error is in the last step, which goes to an
    infinite log-SNR.
    """
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    errors = []
    for n in (10, 50, 200, *([] if name == "dpm++sde" else [1000])):  # its 1000 steps have no timesteps inside
        pairs = schedule.timesteps(n, "trailing")
        mean, variance = moments(name, schedule, pairs, *marginal(float(schedule.alphas_cumprod[-1])))
        assert mean == pytest.approx(MEAN, abs=1e-9)
        errors.append(abs(variance / STD**2 - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.04
    assert errors[1] < 0.25


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawn_samples_have_the_right_mean_and_variance(name: str) -> None:
    """Moments of 2^16 scalars from 16 generators must be within four standard errors of the sampler's exact moments."""
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    pairs = schedule.timesteps(60, "trailing")
    generators = [torch.Generator().manual_seed(i) for i in range(16)]
    x_T = torch.stack([torch.randn(4, 32, 32, generator=generator) for generator in generators])
    x = last(SAMPLERS[name](exact(schedule), x_T, schedule, pairs, generators=generators)).double()
    mean, variance = moments(name, schedule, pairs, 0.0, 1.0)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / x.numel()))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / x.numel()))
    assert float(((x - mean) ** 3).mean()) / variance**1.5 == pytest.approx(0, abs=4 * math.sqrt(6 / x.numel()))
    assert mean == pytest.approx(MEAN, abs=0.03)
    assert math.sqrt(variance) == pytest.approx(STD, rel=0.12)


# Zero terminal SNR: x_T has no information about the data, so their mean must come from the first step (Lin et al.
# 2023)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 5, 30, 1000])
def test_zero_terminal_snr_v_models_reach_the_mean_from_pure_noise(name: str, n: int) -> None:
    schedule = NoiseSchedule.scaled_linear(
        prediction_type="v_prediction", timestep_spacing="trailing"
    ).zero_terminal_snr()
    mean, variance = moments(name, schedule, schedule.timesteps(n), 0.0, 1.0)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert variance >= 0
    if n == 1000:
        assert variance == pytest.approx(STD**2, rel=0.03)
    if n == 1:
        assert variance == pytest.approx(0, abs=1e-12)  # one step gives E[x0 | pure noise], which is the mean itself


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_zero_terminal_snr_loops_stay_finite(name: str, dtype: torch.dtype, n: int) -> None:
    """Float32 must be finite too, although alphas near 0 and 1 cancel. The brightness of drawn images must be the
    data's.
    """
    schedule = NoiseSchedule.scaled_linear(
        prediction_type="v_prediction", timestep_spacing="trailing"
    ).zero_terminal_snr()
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    x_T = torch.stack([torch.randn(4, 64, 64, generator=generator) for generator in generators]).to(dtype)
    x_T = (x_T - x_T.mean()) / x_T.std()
    pairs = schedule.timesteps(n)
    for step in SAMPLERS[name](exact(schedule), x_T, schedule, pairs, generators=generators):
        assert torch.isfinite(step.x).all()
        assert torch.isfinite(step.x0).all()
        assert step.x.dtype == dtype
    assert float(step.x.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(x_T.numel()))


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_the_classic_failure_is_seen(name: str) -> None:
    """Pure noise at a leading timestep of the plain schedule misses a bright mean. Zero terminal SNR with trailing
    spacing reaches it.
    """

    def mean_of(schedule: NoiseSchedule) -> float:
        predict = exact(schedule, mean=3.0, std=1.0)
        return float(last(SAMPLERS[name](predict, column([0.0]), schedule, schedule.timesteps(10))))

    old = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    new = NoiseSchedule.scaled_linear(prediction_type="v_prediction", timestep_spacing="trailing").zero_terminal_snr()
    assert abs(mean_of(old) - 3.0) > 0.1
    assert abs(mean_of(new) - 3.0) < 1e-9
