"""The weights of samples in the denoising objective, and logit-normal timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import sdkit
from sdkit.errors import ArgumentError
from sdkit.training.stages.denoising import DenoisingObjective

T = [10, 500, 900]
ERRORS = torch.tensor([1.0, 2.0, 3.0])  # of each sample, the same in all of its values
SETTINGS: list[dict[str, Any]] = [{}, {"snr_gamma": 5.0}]


def loss(weights: Tensor | None, **settings: Any) -> tuple[Tensor, dict[str, float | Tensor]]:
    objective = DenoisingObjective(sdkit.NoiseSchedule.scaled_linear(), **settings)
    target = torch.zeros(3, 4, 2, 2)
    return objective.loss(target + ERRORS[:, None, None, None], target, T, weights)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_weights_of_one_change_nothing(settings: dict[str, Any]) -> None:
    (weighted, parts), (plain, _) = loss(torch.ones(3), **settings), loss(None, **settings)
    assert torch.equal(weighted, plain)
    assert parts["mse"] == pytest.approx(14 / 3)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_weights_multiply_those_of_min_snr(settings: dict[str, Any]) -> None:
    """The expectation is written out sample by sample, with section 3.4 of Hang et al. 2023 for eps."""
    weights = [1.0, 0.25, 0.0]
    snr = [float(a / (1 - a)) for a in sdkit.NoiseSchedule.scaled_linear().alphas_cumprod[T]]
    min_snr = [min(one, 5) / one if settings else 1.0 for one in snr]
    expected = sum(w * m * float(e) ** 2 for w, m, e in zip(weights, min_snr, ERRORS, strict=True)) / 3
    found, parts = loss(torch.tensor(weights), **settings)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert parts["mse"] == pytest.approx(14 / 3)


def test_a_weight_belongs_to_each_sample() -> None:
    with pytest.raises(ArgumentError, match=r"weight must be \(B, \.\.\.\)"):
        loss(torch.ones(1, 3))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.2), (-1.0, 0.3)])
def test_logit_normal_timesteps_have_their_distribution(mean: float, std: float) -> None:
    """P(t < aT) is Phi((logit(a) - mean) / std); 20,000 draws, with a standard error of at most 0.0036."""
    objective = DenoisingObjective(sdkit.NoiseSchedule.scaled_linear(), logit_normal=(mean, std))
    generator = torch.Generator().manual_seed(0)
    drawn = np.array([objective.timestep(generator) for _ in range(20_000)])
    assert drawn.dtype.kind == "i"
    for a in (0.05, 0.2, 0.5, 0.8, 0.95):
        expected = norm.cdf((np.log(a / (1 - a)) - mean) / std)
        assert (drawn < 1000 * a).mean() == pytest.approx(expected, abs=0.015), a


def test_logit_normal_timesteps_stay_on_the_schedule() -> None:
    objective = DenoisingObjective(sdkit.NoiseSchedule.scaled_linear(), logit_normal=(5.0, 5.0))
    generator = torch.Generator().manual_seed(0)
    drawn = {objective.timestep(generator) for _ in range(3000)}
    assert min(drawn) >= 0
    assert max(drawn) == 999
