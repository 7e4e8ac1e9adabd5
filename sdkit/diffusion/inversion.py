"""DDIM inversion: from a clean sample to the noise that DDIM turns into it (Song et al. 2021,
https://arxiv.org/abs/2010.02502, section 4.3).

One step back asks for the x_t of which `ddim_step` makes the given x_prev. The model's prediction at x_t is needed, and
x_t is not known: a fixed-point iteration finds it (Pan et al. 2023, https://arxiv.org/abs/2309.04907, eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from sdkit.arguments import whole_number
from sdkit.diffusion.samplers import Generators, Step, Timesteps, clip
from sdkit.diffusion.schedule import NoiseSchedule, Predict, Prediction

ITERATIONS = 5
"""Evaluations of the model for each step; a single one is the plain inversion of Song et al."""


def inverse_step(prediction: Prediction, x_prev: Tensor, alpha: float, alpha_prev: float) -> Tensor:
    """Return x_t, given x_prev and a prediction at t: the inverse of `ddim_step` with eta 0.

    If the prediction is the model's at the x_t that is returned, `ddim_step` makes x_prev of it. At high noise x_t
    follows from the predicted x0, which then depends little on x_t; at low noise from the predicted eps.

    Args:
        prediction: The model's prediction at t, of an estimate of x_t.
        x_prev: (B, C, h, w), the sample at t_prev, after the step.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at t_prev.

    Returns:
        x_t, shaped like x_prev.
    """
    x0, eps = prediction.x0, prediction.eps
    if alpha < 0.5 and alpha_prev < 1:
        eps = (x_prev - math.sqrt(alpha_prev) * x0) / math.sqrt(1 - alpha_prev)
    else:
        x0 = (x_prev - math.sqrt(1 - alpha_prev) * eps) / math.sqrt(alpha_prev)
    return math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps


def ddim_inversion(
    predict: Predict,
    z: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
    iterations: int = ITERATIONS,
) -> Iterator[Step]:
    """Go from a clean sample to noise, from which `ddim` with the same predictor and timesteps comes back.

    The signature is that of a sampler.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        z: (B, C, h, w), the clean sample.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev) as `ddim` takes them, from most noise to least. They are passed through backwards.
        generators: Ignored: nothing is drawn.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.
        iterations: Evaluations of the model for each step, from 1.

    Yields:
        A `Step` after each step; `x` is the sample at its t.

    Raises:
        ArgumentError: `iterations` is no whole number from 1.
    """
    iterations = whole_number("iterations", iterations, 1)
    x = z
    for i, (t, t_prev) in enumerate(reversed(timesteps)):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
        x_prev = x
        for _ in range(iterations):
            prediction = clip(predict(x, t), x, alpha, clip_x0)
            x = inverse_step(prediction, x_prev, alpha, alpha_prev)
        yield Step(i, t, x, prediction.x0)
