"""DPM-Solver++ and UniPC: solvers of higher order in lambda, half the log-SNR, that hold x0 and not eps constant.

Each builds a better x0 from two predictions, and then makes a known step with it: DPM-Solver++ a step of DDIM, its SDE
variants a step of DDPM.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from functools import partial

from torch import Tensor

from sdkit.diffusion.samplers.common import Generators, Step, Timesteps, clip, noise_like
from sdkit.diffusion.samplers.first_order import ddpm_step
from sdkit.diffusion.schedule import NoiseSchedule, Predict, Prediction


def dpmpp_2m_step(
    x_t: Tensor,
    x0: Tensor,
    alpha: float,
    alpha_prev: float,
    previous_x0: Tensor | None = None,
    alpha_before: float | None = None,
) -> Tensor:
    """Make a step of DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2).

    The step is second order with `previous_x0`, and first order (DDIM) without. It is also first order if it ends at
    the clean sample, or if the previous step began at pure noise: half the log-SNR is infinite there.

    Args:
        x_t: (B, C, h, w), the sample at t.
        x0: The model's prediction of the clean sample at t.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at t_prev.
        previous_x0: The previous step's prediction of the clean sample.
        alpha_before: alphas_cumprod at the timestep at which the previous step began.

    Returns:
        x_prev, shaped like x_t.
    """
    h = half_log_snr(alpha_prev) - half_log_snr(alpha)
    x0 = extrapolated(x0, alpha, alpha_prev, previous_x0, alpha_before)
    return math.sqrt((1 - alpha_prev) / (1 - alpha)) * x_t - math.sqrt(alpha_prev) * math.expm1(-h) * x0


def extrapolated(
    x0: Tensor, alpha: float, alpha_prev: float, previous_x0: Tensor | None, alpha_before: float | None
) -> Tensor:
    """Return x0 at the middle of the step from `alpha` to `alpha_prev`, on the line through it and the previous step's
    x0. The arguments are those of `dpmpp_2m_step`, which says when x0 is returned unchanged."""
    if previous_x0 is None or alpha_before is None or alpha_prev == 1:
        return x0
    h = half_log_snr(alpha_prev) - half_log_snr(alpha)
    h_before = half_log_snr(alpha) - half_log_snr(alpha_before)
    return x0 + h / (2 * h_before) * (x0 - previous_x0)


def half_log_snr(alpha: float) -> float:
    """Return DPM-Solver's lambda at a = `alpha`: log(sqrt(a) / sqrt(1 - a)), half the log-SNR."""
    if alpha in (0.0, 1.0):
        return math.inf if alpha else -math.inf
    return 0.5 * math.log(alpha / (1 - alpha))


def dpmpp_2m(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095): second order and deterministic,
    good from about 15 steps.

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
    x, previous_x0, alpha_before = x_T, None, None
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        x0 = clip(predict(x, t), x, alpha, clip_x0).x0
        x = dpmpp_2m_step(x, x0, alpha, alpha_prev, previous_x0, alpha_before)
        previous_x0, alpha_before = x0, alpha
        yield Step(i, t, x, x0)


def dpmpp_2m_sde(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by SDE-DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, section 5, midpoint rule): as
    `dpmpp_2m`, but with fresh noise in each step, which corrects earlier errors.

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
    x, previous_x0, alpha_before = x_T, None, None
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        middle = prediction._replace(x0=extrapolated(prediction.x0, alpha, alpha_prev, previous_x0, alpha_before))
        noise = noise_like(x, generators) if t_prev >= 0 else None
        x = ddpm_step(x, middle, alpha, alpha_prev, noise=noise)  # constant x0 makes the SDE's step one of DDPM
        previous_x0, alpha_before = prediction.x0, alpha
        yield Step(i, t, x, prediction.x0)


def dpmpp_sde(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by the SDE variant of DPM-Solver++(2S) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 1,
    with noise as in Crowson's k-diffusion, `sample_dpmpp_sde`). Each step evaluates the model twice: at t and halfway.

    A step is first order, with one evaluation, if it ends at the clean sample, if it begins at pure noise, or if there
    is no timestep inside it.

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
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        middle = _middle(schedule, t, t_prev)
        if middle is None:
            noise = noise_like(x, generators) if t_prev >= 0 else None
            x = ddpm_step(x, prediction, alpha, alpha_prev, noise=noise)
        else:
            alpha_middle, first, second = (
                schedule.alpha_cumprod(middle),
                noise_like(x, generators),
                noise_like(x, generators),
            )
            halfway = ddpm_step(x, prediction, alpha, alpha_middle, noise=first)
            x0_middle = clip(predict(halfway, middle), halfway, alpha_middle, clip_x0).x0
            sigmas = schedule.sigma(t), schedule.sigma(middle), schedule.sigma(t_prev)
            x = dpmpp_sde_step(
                x, prediction.x0, x0_middle, alpha, alpha_middle, alpha_prev, noise=brownian(first, second, *sigmas)
            )
        yield Step(i, t, x, prediction.x0)


def dpmpp_sde_step(
    x_t: Tensor,
    x0: Tensor,
    x0_middle: Tensor,
    alpha: float,
    alpha_middle: float,
    alpha_prev: float,
    noise: Tensor | None = None,
) -> Tensor:
    """Make the second half of a step of `dpmpp_sde`: the whole step, with x0 from both predictions.

    Args:
        x_t: (B, C, h, w), the sample at t.
        x0: The model's prediction of the clean sample at t.
        x0_middle: Its prediction halfway.
        alpha: alphas_cumprod at t.
        alpha_middle: alphas_cumprod at the timestep between.
        alpha_prev: alphas_cumprod at t_prev.
        noise: Standard normal noise shaped like x_t; None returns the mean.

    Returns:
        x_prev, shaped like x_t.
    """
    r = (half_log_snr(alpha_middle) - half_log_snr(alpha)) / (half_log_snr(alpha_prev) - half_log_snr(alpha))
    x0 = x0 + (x0_middle - x0) / (2 * r)
    return ddpm_step(x_t, Prediction(x0, x0), alpha, alpha_prev, noise=noise)  # ddpm_step does not read eps


def brownian(first: Tensor, second: Tensor, sigma: float, sigma_middle: float, sigma_prev: float) -> Tensor:
    """Return the standard normal noise of a whole step whose two parts have noise `first` and `second`, if all three
    are increments of one Brownian motion in sigma."""
    share = (sigma - sigma_middle) / (sigma - sigma_prev)
    return math.sqrt(share) * first + math.sqrt(1 - share) * second


def _middle(schedule: NoiseSchedule, t: int, t_prev: int) -> int | None:
    """Return the timestep between t and t_prev at which lambda is in the middle, or None where there is none."""
    inside = range(t_prev + 1, t)
    if t_prev < 0 or not inside or schedule.alpha_cumprod(t) == 0:
        return None
    ends = (half_log_snr(schedule.alpha_cumprod(end)) for end in (t, t_prev))
    middle = sum(ends) / 2
    place = bisect_left(inside, -middle, key=lambda between: -half_log_snr(schedule.alpha_cumprod(between)))
    return inside[min(place, len(inside) - 1)]


def unipc(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, https://arxiv.org/abs/2302.04867, UniPC-2,
    bh2): the predictor is a step of `dpmpp_2m`; once the model has been evaluated at its end, the corrector `unic_step`
    repeats the step with that prediction, at no further cost.

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
    x, previous_x0, alpha_before, correct = x_T, None, None, None
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        x0 = clip(predict(x, t), x, alpha, clip_x0).x0
        if correct is not None:
            x = correct(x0)
        correct = partial(unic_step, x, x0, alpha, alpha_prev, previous_x0, alpha_before)
        x = dpmpp_2m_step(x, x0, alpha, alpha_prev, previous_x0, alpha_before)
        previous_x0, alpha_before = x0, alpha
        yield Step(i, t, x, x0)


def unic_step(
    x_t: Tensor,
    x0: Tensor,
    alpha: float,
    alpha_prev: float,
    previous_x0: Tensor | None,
    alpha_before: float | None,
    x0_prev: Tensor,
) -> Tensor:
    """Correct a step of `dpmpp_2m_step` by the prediction at its end (Zhao et al. 2023,
    https://arxiv.org/abs/2302.04867, eq. 3 and 9).

    Args:
        x_t: As in `dpmpp_2m_step`, like the next five.
        x0: The model's prediction of the clean sample at t.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at t_prev.
        previous_x0: The previous step's prediction; None makes the corrector one order lower.
        alpha_before: alphas_cumprod at the timestep at which the previous step began.
        x0_prev: The model's prediction at t_prev, at the sample that the step gave.

    Returns:
        x_prev, shaped like x_t. A step from pure noise, infinitely long in lambda, is not corrected.
    """
    if alpha == 0:
        return dpmpp_2m_step(x_t, x0, alpha, alpha_prev)
    h = half_log_snr(alpha_prev) - half_log_snr(alpha)
    one = math.expm1(-h)
    two = one / -h - 1  # moments of exp over the step
    change = (x0_prev - x0) / 2
    if previous_x0 is not None and alpha_before is not None and alpha_before > 0:
        r = (half_log_snr(alpha_before) - half_log_snr(alpha)) / h
        # Weights of the two differences, such that a prediction that is quadratic in lambda is integrated exactly.
        b_1, b_2 = two / one, 2 * (two / -h - 0.5) / one
        rho = (b_1 - b_2) / (1 - r)
        change = rho * (previous_x0 - x0) / r + (b_1 - rho) * (x0_prev - x0)
    return math.sqrt((1 - alpha_prev) / (1 - alpha)) * x_t - math.sqrt(alpha_prev) * one * (x0 + change)
