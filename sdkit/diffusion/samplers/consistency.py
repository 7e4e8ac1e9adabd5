"""LCM and TCD: samplers of consistency models, which are distilled to jump from any x_t to a sample in a few steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from sdkit.diffusion.samplers.common import Generators, Step, Timesteps, checked_eta, clip, noise_like
from sdkit.diffusion.schedule import NoiseSchedule, Predict, Prediction

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Constants of LCM's boundary condition, with which its models are distilled."""


def lcm(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by multistep consistency (Luo et al. 2023, https://arxiv.org/abs/2310.04378, Algorithm 3): jump to the
    clean sample, add noise, and jump again. Latent consistency models and LoRAs need 4 to 8 steps.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n, "lcm")`.
        generators: One for each image; None draws from torch's global generator.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.
    """
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        alpha, alpha_prev = schedule.alpha_cumprod(t), schedule.alpha_cumprod(t_prev, final=1.0)
        prediction = clip(predict(x, t), x, alpha, clip_x0)
        x = lcm_step(x, prediction, t, alpha_prev, noise_like(x, generators) if t_prev >= 0 else None)
        yield Step(i, t, x, prediction.x0)


def lcm_step(x_t: Tensor, prediction: Prediction, t: int, alpha_prev: float, noise: Tensor | None = None) -> Tensor:
    """Make a step of `lcm` (Luo et al. 2023, https://arxiv.org/abs/2310.04378, eq. 9, and Algorithm 3).

    Args:
        x_t: (B, C, h, w), the sample at t.
        prediction: The model's prediction at t.
        t: The timestep.
        alpha_prev: alphas_cumprod at t_prev.
        noise: Standard normal noise shaped like x_t; None returns the clean sample, times sqrt(alpha_prev).

    Returns:
        x_prev, shaped like x_t.
    """
    scaled = TIMESTEP_SCALING * t
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    x0 = skip * x_t + scaled / math.sqrt(scaled**2 + SIGMA_DATA**2) * prediction.x0
    x_prev = math.sqrt(alpha_prev) * x0
    return x_prev if noise is None else x_prev + math.sqrt(1 - alpha_prev) * noise


def tcd(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    generators: Generators | None = None,
    eta: float = 0.0,
    clip_x0: float | None = None,
) -> Iterator[Step]:
    """Sample by trajectory consistency (Zheng et al. 2024, https://arxiv.org/abs/2402.19159, Algorithm 4): jump to a
    timestep below t_prev, and add the noise that leads back to it.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w), standard normal noise.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n, "lcm")`.
        generators: One for each image; None draws from torch's global generator. Only used where `eta` is above 0.
        eta: The paper's gamma: 0 jumps to t_prev itself, without noise; 1 jumps to t = 0. The authors take 0.3.
        clip_x0: Clamp each predicted x0 to [-clip_x0, clip_x0]; None does not.

    Yields:
        A `Step` after each step.

    Raises:
        ArgumentError: `eta` is out of range, or the number of generators is not B.
    """
    eta = checked_eta(eta)
    x = x_T
    for i, (t, t_prev) in enumerate(timesteps):
        prediction = clip(predict(x, t), x, schedule.alpha_cumprod(t), clip_x0)
        alpha_prev = schedule.alpha_cumprod(t_prev)
        if t_prev >= 0 and eta > 0:
            alpha_s = schedule.alpha_cumprod(math.floor(round((1 - eta) * t_prev, 9)))  # 0.1 * 10 is 0.99...
            x = tcd_step(prediction, alpha_s, alpha_prev, noise_like(x, generators))
        else:
            x = tcd_step(prediction, alpha_prev, alpha_prev)
        yield Step(i, t, x, prediction.x0)


def tcd_step(prediction: Prediction, alpha_s: float, alpha_prev: float, noise: Tensor | None = None) -> Tensor:
    """Make a step of `tcd` (Zheng et al. 2024, https://arxiv.org/abs/2402.19159, section 4.3).

    Args:
        prediction: The model's prediction at t.
        alpha_s: alphas_cumprod at the timestep s <= t_prev that is jumped to.
        alpha_prev: alphas_cumprod at t_prev.
        noise: Standard normal noise shaped like x0, which leads from s to t_prev; None, where s is t_prev.

    Returns:
        x_prev, shaped like x0.
    """
    x_s = math.sqrt(alpha_s) * prediction.x0 + math.sqrt(1 - alpha_s) * prediction.eps
    if noise is None:
        return x_s
    return math.sqrt(alpha_prev / alpha_s) * x_s + math.sqrt(1 - alpha_prev / alpha_s) * noise
