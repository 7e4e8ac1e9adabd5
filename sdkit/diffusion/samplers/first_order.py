"""DDIM and DDPM."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sdkit.arguments import one_of
from sdkit.diffusion.samplers.common import Generators, Step, Timesteps, checked_eta, clip, noise_like
from sdkit.diffusion.schedule import VARIANCE_TYPES, NoiseSchedule, Predict, Prediction
from sdkit.errors import ArgumentError


def ddim_step(
    prediction: Prediction, alpha: float, alpha_prev: float, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Make a DDIM step (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16).

    Args:
        prediction: The model's prediction at t.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at t_prev.
        eta: Share of DDPM's noise: 0 is deterministic, 1 is DDPM.
        noise: Standard normal noise shaped like x0; None adds none.

    Returns:
        x_prev, shaped like x0.
    """
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
    """Make a DDPM step: draw x_prev from q(x_prev | x_t, x0) (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
    eq. 6-7).

    Args:
        x_t: (B, C, h, w), the sample at t.
        prediction: The model's prediction at t.
        alpha: alphas_cumprod at t.
        alpha_prev: alphas_cumprod at t_prev.
        variance_type: "fixed_small", the posterior's variance; "fixed_large", beta; or "learned_range", which
            interpolates between the two in log space by the model's output (Nichol & Dhariwal 2021,
            https://arxiv.org/abs/2102.09672, eq. 15).
        noise: Standard normal noise shaped like x_t; None returns the mean.

    Returns:
        x_prev, shaped like x_t.

    Raises:
        ArgumentError: The variance is "learned_range", and the model does not predict it.
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
    """Sample by DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502). The last step goes to the schedule's
    `final_alpha_cumprod`.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        generators: One for each image; None draws from torch's global generator. Only used where `eta` is above 0.
        eta: Share of DDPM's noise, from 0 (deterministic) to 1.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.

    Raises:
        ArgumentError: `eta` is out of range, or the number of generators is not B.

    Example:
        >>> import torch, sdkit
        >>> from sdkit.guidance import Conditioning, guided
        >>> from sdkit.samplers import ddim
        >>> sd = sdkit.StableDiffusion.from_pretrained("emoji")
        >>> cond, uncond = Conditioning(sd.text.encode(["a red apple", ""])).chunk(2)
        >>> predict = guided(sd.unet, sd.schedule, cond, uncond, scale=3.0)
        >>> with torch.inference_mode():
        ...     for step in ddim(predict, torch.randn(1, 4, 16, 16), sd.schedule, sd.schedule.timesteps(4)):
        ...         print(step.i, step.t)
        0 999
        1 749
        2 499
        3 249
        >>> sd.vae.decode(step.x)[0].save("apple.png")
    """
    eta = checked_eta(eta)
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
    """Sample by DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239, Algorithm 2). The last step adds no noise.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        generators: One for each image; None draws from torch's global generator.
        variance_type: "fixed_small", "fixed_large", or "learned_range"; None is the schedule's own. See `ddpm_step`.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.

    Raises:
        ArgumentError: `variance_type` is unknown or does not fit the model, or the number of generators is not B.
    """
    variance_type = variance_type or schedule.variance_type
    one_of("variance_type", variance_type, VARIANCE_TYPES)
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        noise = noise_like(x, generators) if t_prev >= 0 else None
        x = ddpm_step(x, prediction, alpha, alpha_prev, variance_type, noise)
        yield Step(i, t, x, prediction.x0)
