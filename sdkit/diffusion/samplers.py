"""Samplers: from noise x_T to a sample. Each method has a pure step function and a generator that loops over it.

All loops have one signature, `sampler(predict, x_T, schedule, timesteps, *, generators=None, **options)`. They yield a
`Step` after each step, so that progress bars, previews, and early stopping belong to the caller. `predict(x_t, t)`
returns a `Prediction`: samplers never see the model's parameterisation. `timesteps` are pairs from
`schedule.timesteps(n)`. `generators` holds one CPU generator for each image, the source of all of that image's noise.

In the step functions, `alpha` is alphas_cumprod at t, and `alpha_prev` at t_prev (the papers' alpha-bar).
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
"""Pairs (t, t_prev), from most noise to least, as from `NoiseSchedule.timesteps`."""
Generators = Sequence[torch.Generator]
"""One CPU generator for each image of a batch."""
Sampler: TypeAlias = "Callable[..., Iterator[Step]]"
"""A sampling loop, such as `ddim`."""


class Step(NamedTuple):
    """One finished step of a sampler.

    Attributes:
        i: Index of the step, from 0.
        t: Timestep at which the step began.
        x: (B, C, h, w), the sample after the step, at the next, less noisy timestep.
        x0: (B, C, h, w), the model's prediction of the clean sample at t.
    """

    i: int
    t: int
    x: Tensor
    x0: Tensor


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
    if previous_x0 is not None and alpha_before is not None and alpha_prev < 1:
        h_before = half_log_snr(alpha) - half_log_snr(alpha_before)
        x0 = x0 + h / (2 * h_before) * (x0 - previous_x0)
    return math.sqrt((1 - alpha_prev) / (1 - alpha)) * x_t - math.sqrt(alpha_prev) * math.expm1(-h) * x0


def half_log_snr(alpha: float) -> float:
    """Return DPM-Solver's lambda at a = `alpha`: log(sqrt(a) / sqrt(1 - a)), half the log-SNR."""
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


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, "dpm++2m": dpmpp_2m}


def sampler_by_name(name: str, *, eta: float = 0.0) -> Sampler:
    """Return the sampler called `name`, with `eta` bound to it.

    Args:
        name: "ddim", "ddpm", or "dpm++2m".
        eta: Share of DDPM's noise, in [0, 1]; DDIM's alone can be above 0.

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
    """Return `eta`. Raise ArgumentError where it is not in [0, 1]."""
    return number("eta", eta, 0, 1)


def clip(prediction: Prediction, x_t: Tensor, alpha: float, bound: float | None) -> Prediction:
    """Clamp a prediction's x0 to [-bound, bound], and set eps to the noise that then gives x_t.

    Args:
        prediction: The model's prediction at t.
        x_t: (B, C, h, w), the sample at t.
        alpha: alphas_cumprod at t.
        bound: None returns the prediction unchanged.
    """
    if bound is None:
        return prediction
    x0 = prediction.x0.clamp(-bound, bound)
    return prediction._replace(x0=x0, eps=(x_t - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha))


def noise_like(x: Tensor, generators: Generators | None) -> Tensor:
    """Draw standard normal noise shaped like x (B, ...). Image i's noise comes from `generators[i]` alone, so that it
    does not depend on the rest of the batch. Without generators, it comes from torch's global generator.

    Raises:
        ArgumentError: The number of generators is not B.
    """
    if generators is None:
        return torch.randn_like(x)
    if len(generators) != len(x):
        raise ArgumentError(f"{len(generators)} generators cannot serve a batch of {len(x)}: give one for each image.")
    noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
    if x.device.type != "cuda":
        return noise.to(x)
    return noise.to(x.dtype).pin_memory().to(x.device, non_blocking=True)  # any other copy synchronises with the GPU
