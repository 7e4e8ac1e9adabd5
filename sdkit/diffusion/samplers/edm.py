"""Euler, Euler ancestral, and Heun: solvers of dx/dsigma = eps in x / sqrt(alpha), EDM's coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from sdkit.diffusion.samplers.common import Generators, Step, Timesteps, clip
from sdkit.diffusion.samplers.first_order import ddim_step, ddpm
from sdkit.diffusion.schedule import NoiseSchedule, Predict, Prediction


def euler(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by Euler's method (Karras et al. 2022, https://arxiv.org/abs/2206.00364, Algorithm 1 without correction).

    A step in sigma at constant eps is a step of DDIM without noise. Only the end differs from `ddim`: the last step
    goes to the clean sample, whatever the schedule's `final_alpha_cumprod`.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        generators: Ignored: the steps add no noise.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.
    """
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        x = ddim_step(prediction, alpha, alpha_prev)
        yield Step(i, t, x, prediction.x0)


def euler_ancestral(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by Euler steps to a lower noise level than the next one, each followed by noise that raises it to the next
    (Crowson's k-diffusion, `sample_euler_ancestral`).

    That is DDPM with the posterior's variance, whatever the schedule's own `variance_type`.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        generators: One for each image; None draws from torch's global generator.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.
    """
    yield from ddpm(
        predict, x_T, schedule, timesteps, generators=generators, variance_type="fixed_small", clip_x0=clip_x0
    )


def heun(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by Heun's method (Karras et al. 2022, https://arxiv.org/abs/2206.00364, Algorithm 1): second order, with
    two evaluations of the model in each step except the last.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        generators: Ignored: the steps add no noise.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.
    """
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        x = ddim_step(prediction, alpha, alpha_prev)
        if t_prev >= 0:
            x = heun_step(prediction, clip(predict(x, t_prev), x, alpha_prev, clip_x0), alpha, alpha_prev)
        yield Step(i, t, x, prediction.x0)


def heun_step(prediction: Prediction, prediction_prev: Prediction, alpha: float, alpha_prev: float) -> Tensor:
    """Correct an Euler step by the prediction at its end (Karras et al. 2022, https://arxiv.org/abs/2206.00364,
    Algorithm 1, line 8).

    Args:
        prediction: The model's prediction at t.
        prediction_prev: Its prediction at t_prev, at the sample that `ddim_step` gave.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at t_prev, below 1.

    Returns:
        x_prev, shaped like x0. An Euler step from pure noise, where sigma is infinite, is not corrected.
    """
    if alpha == 0:
        return ddim_step(prediction, alpha, alpha_prev)
    sigma, sigma_prev = math.sqrt((1 - alpha) / alpha), math.sqrt((1 - alpha_prev) / alpha_prev)
    slope = (prediction.eps + prediction_prev.eps) / 2
    return math.sqrt(alpha_prev) * (prediction.x0 + sigma * prediction.eps + (sigma_prev - sigma) * slope)
