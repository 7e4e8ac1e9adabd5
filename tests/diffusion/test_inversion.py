"""DDIM inversion: exact for a linear model, and the inverse of the sampler where it converges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdkit.diffusion.inversion import ddim_inversion, inverse_step
from sdkit.diffusion.samplers import ddim, ddim_step
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.49, 0.5, 0.9])
@pytest.mark.parametrize("alpha_prev", [0.92, 0.9991])
def test_a_step_and_its_inverse(alpha: float, alpha_prev: float) -> None:
    """With the prediction held, `ddim_step` of the inverse step is x_prev."""
    x0, eps, x_prev = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    x_t = inverse_step(Prediction(x0, eps, None), x_prev, alpha, alpha_prev)
    # What the model would have predicted at x_t: the half that the step is solved for follows from the other half.
    if alpha < 0.5:
        eps = (x_t - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha)
    else:
        x0 = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    torch.testing.assert_close(ddim_step(Prediction(x0, eps, None), alpha, alpha_prev), x_prev)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("to_one", [False, True])
def test_a_gaussians_noise_is_found(zero_snr: bool, to_one: bool) -> None:
    """For data from N(0, s^2), the best eps is known in closed form; the inversion must return DDIM's own x_T."""
    schedule = NoiseSchedule.scaled_linear(set_alpha_to_one=to_one)
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    deviation = 0.7

    def predict(x_t: Tensor, t: int) -> Prediction:
        a = schedule.alpha_cumprod(t)
        total = a * deviation**2 + 1 - a
        x0 = math.sqrt(a) * deviation**2 / total * x_t
        return Prediction(x0, math.sqrt(1 - a) / total * x_t, None)

    x_T = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = schedule.timesteps(20, "trailing")
    *_, last = ddim(predict, x_T, schedule, pairs)
    errors = []
    for iterations in (1, 5, 20):
        steps = list(ddim_inversion(predict, last.x, schedule, pairs, iterations=iterations))
        assert [step.t for step in steps] == [t for t, _ in reversed(pairs)]
        errors.append(float((steps[-1].x - x_T).abs().max()))
    if zero_snr:  # x0 does not depend on x_T: DDIM's first step forgets nothing, since eps is x_T
        assert errors[2] < 1e-4
    assert errors[2] < 1e-4 < errors[0]
    assert errors[2] <= errors[1] < errors[0]


def test_iterations_are_checked() -> None:
    schedule = NoiseSchedule.scaled_linear()
    with pytest.raises(ArgumentError, match="iterations must be a whole number of at least 1"):
        list(ddim_inversion(lambda x, t: Prediction(x, x, None), torch.zeros(1), schedule, [(1, -1)], iterations=0))
