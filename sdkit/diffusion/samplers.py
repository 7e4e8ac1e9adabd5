"""Samplers: from noise x_T to a sample, one pure step function and one generator loop for each method.

Every loop has one signature, `sampler(predict, x_T, schedule, timesteps, *, generators=None, **options)`, and yields a
`Step` after each step, so that progress bars, previews and early stopping belong to the caller. `predict(x_t, t)`
returns a `Prediction`: samplers never see what the model was trained to output. `timesteps` are pairs from
`schedule.timesteps(n)`. `generators` holds one CPU generator for each image of the batch, from which all of that
image's noise comes; without it noise comes from torch's global generator.

In the steps, `alpha` is alphas_cumprod at t and `alpha_prev` at t_prev (the papers' alpha-bar).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sdkit.arguments import number, one_of
from sdkit.diffusion.schedule import VARIANCE_TYPES, NoiseSchedule, Predict, Prediction
from sdkit.errors import ArgumentError

Timesteps = Sequence[tuple[int, int]]
Generators = Sequence[torch.Generator]
Sampler: TypeAlias = "Callable[..., Iterator[Step]]"
"""A sampling loop, such as `ddim`."""


class Step(NamedTuple):
    """One finished step of a sampler.

    Attributes:
        i: Counts from 0.
        t: The timestep left behind.
        x: The sample at the next, less noisy timestep, (B, C, h, w).
        x0: What the model took the clean sample to be at t, (B, C, h, w).
    """

    i: int
    t: int
    x: Tensor
    x0: Tensor


def ddim_step(
    prediction: Prediction, alpha: float, alpha_prev: float, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """x_prev by DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16). eta = 0 is deterministic, eta
    = 1 is DDPM."""
    sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) if eta else 0.0
    direction = math.sqrt(max(1 - alpha_prev - sigma**2, 0.0))
    x_prev = math.sqrt(alpha_prev) * prediction.x0 + direction * prediction.eps
    return x_prev if noise is None else x_prev + sigma * noise


def ddpm_step(
    x_t: Tensor,
    prediction: Prediction,
    alpha: float,
    alpha_prev: float,
    variance_type: str = "fixed_small",
    noise: Tensor | None = None,
) -> Tensor:
    """x_prev drawn from q(x_prev | x_t, x0) (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 6-7); its mean where
    `noise` is None.

    The variance is the posterior's ("fixed_small"), beta ("fixed_large"), or between the two in log space by the
    model's own output ("learned_range"; Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15).
    """
    beta = 1 - alpha / alpha_prev
    mean = (
        math.sqrt(alpha_prev) * beta / (1 - alpha) * prediction.x0
        + math.sqrt(alpha / alpha_prev) * (1 - alpha_prev) / (1 - alpha) * x_t
    )
    if noise is None:
        return mean
    posterior = (1 - alpha_prev) / (1 - alpha) * beta
    if variance_type == "fixed_small":
        return mean + math.sqrt(posterior) * noise
    if variance_type == "fixed_large":
        return mean + math.sqrt(beta) * noise
    if prediction.variance is None:
        raise ArgumentError(
            "variance_type 'learned_range' needs a model that predicts its variance (twice the output channels)."
        )
    share = (prediction.variance + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(max(posterior, 1e-20))
    return mean + torch.exp(log_variance / 2) * noise


def dpmpp_2m_step(
    x_t: Tensor,
    x0: Tensor,
    alpha: float,
    alpha_prev: float,
    previous_x0: Tensor | None = None,
    alpha_before: float | None = None,
) -> Tensor:
    """x_prev by DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2).

    `previous_x0`, predicted at `alpha_before` one step earlier, makes the step second order. First order (DDIM) where
    it is absent, and where a step touches pure noise or the clean sample, at which half the log-SNR is infinite.
    """
    h = half_log_snr(alpha_prev) - half_log_snr(alpha)
    if previous_x0 is not None and alpha_before is not None and alpha_prev < 1:
        h_before = half_log_snr(alpha) - half_log_snr(alpha_before)
        x0 = x0 + h / (2 * h_before) * (x0 - previous_x0)
    return math.sqrt((1 - alpha_prev) / (1 - alpha)) * x_t - math.sqrt(alpha_prev) * math.expm1(-h) * x0


def half_log_snr(alpha: float) -> float:
    """The lambda of DPM-Solver: log(sqrt(a) / sqrt(1 - a))."""
    if alpha in (0.0, 1.0):
        return math.inf if alpha else -math.inf
    return 0.5 * math.log(alpha / (1 - alpha))


def ddim(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    eta: float = 0.0,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """DDIM, with `eta` in [0, 1] times DDPM's noise. Ends at the schedule's `final_alpha_cumprod`."""
    eta = _checked_eta(eta)
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        noise = noise_like(x, generators) if eta > 0 else None
        x = ddim_step(prediction, alpha, alpha_prev, eta, noise)
        yield Step(i, t, x, prediction.x0)


def ddpm(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    variance_type: str | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, Algorithm 2); no noise in the last step. `variance_type` None is the
    schedule's own."""
    variance_type = variance_type or schedule.variance_type
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        noise = noise_like(x, generators) if t_prev >= 0 else None
        x = ddpm_step(x, prediction, alpha, alpha_prev, variance_type, noise)
        yield Step(i, t, x, prediction.x0)


def dpmpp_2m(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M): deterministic (`generators` are not drawn from), second order; good from about 15 steps."""
    x, previous_x0, alpha_before = x_T, None, None
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        x0 = clip(predict(x, t), x, alpha, clip_x0).x0
        x = dpmpp_2m_step(x, x0, alpha, alpha_prev, previous_x0, alpha_before)
        previous_x0, alpha_before = x0, alpha
        yield Step(i, t, x, x0)


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, "dpm++2m": dpmpp_2m}


def sampler_by_name(name: str, *, eta: float = 0.0) -> Sampler:
    """Return the sampler of a name, with `eta` bound.

    Args:
        name: "ddim", "ddpm", or "dpm++2m".
        eta: For DDIM alone, its share of DDPM's noise, in [0, 1].

    Raises:
        ArgumentError: The name is unknown, or the sampler takes no `eta`.
    """
    one_of("sampler", name, SAMPLERS)
    eta = _checked_eta(eta)
    if name == "ddim":
        return partial(ddim, eta=eta)
    if eta:
        raise ArgumentError(f"eta belongs to sampler 'ddim'; '{name}' has none.")
    return SAMPLERS[name]


def _checked_eta(eta: float) -> float:
    return number("eta", eta, 0, 1)


def clip(prediction: Prediction, x_t: Tensor, alpha: float, bound: float | None) -> Prediction:
    """x0 clamped to [-bound, bound] and the eps that then explains x_t; unchanged where `bound` is None."""
    if bound is None:
        return prediction
    x0 = prediction.x0.clamp(-bound, bound)
    return prediction._replace(x0=x0, eps=(x_t - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha))


def noise_like(x: Tensor, generators: Generators | None) -> Tensor:
    """Standard normal noise shaped like x (B, ...); image i's from `generators[i]`, whatever else is in the batch."""
    if generators is None:
        return torch.randn_like(x)
    if len(generators) != len(x):
        raise ArgumentError(f"{len(generators)} generators cannot serve a batch of {len(x)}: give one for each image.")
    return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(x)
