"""The likelihood of images under a diffusion model of pixels, as bits per dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.arguments import seeded, whole_number
from sdkit.diffusion.likelihood import prior_term, step_term
from sdkit.diffusion.samplers.common import noise_like
from sdkit.diffusion.schedule import NoiseSchedule, Predict
from sdkit.errors import ArgumentError


def bits_per_dimension(
    predict: Predict,
    x0: Tensor,
    schedule: NoiseSchedule,
    *,
    timesteps: int | None = None,
    seed: int = 0,
    clip_x0: float | None = 1.0,
) -> Tensor:
    """Return the variational bound on -log2 p(x0), in bits per dimension (Nichol & Dhariwal 2021,
    https://arxiv.org/abs/2102.09672, section 2.2). Smaller is better; 8 is what storing the pixels costs.

    The bound holds for the model's steps over all T timesteps, with the variance that the schedule names: it says
    nothing of a sampler of fewer steps.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided` with a scale of 1.
        x0: (B, 3, H, W), images in [-1, 1] of 256 levels, on the predictor's device.
        schedule: The model's noise schedule.
        timesteps: Number N of evaluations of the network. None is T, the full sum. A smaller N evaluates t = 0, and one
            timestep drawn from each of N - 1 equal strata of the others: an unbiased estimate of the sum.
        seed: Seed of the timesteps; the noise of image i has the seed `seed` + i.
        clip_x0: Bound to which the predicted x0 are clamped, as samplers do; None does not clamp.

    Returns:
        (B,) float64, on the CPU.

    Raises:
        ArgumentError: `timesteps` or the images are out of range.

    Example:
        >>> import torch, sdkit
        >>> from sdkit.metrics import bits_per_dimension
        >>> schedule = sdkit.NoiseSchedule.linear()
        >>> grey = torch.zeros(1, 3, 4, 4) + 1 / 255
        >>> def denoise(x_t, t):  # a model that knows this picture alone
        ...     return schedule.prediction(grey, x_t, t, "sample")
        >>> bool(bits_per_dimension(denoise, grey, schedule, timesteps=50) < 2)
        True
    """
    _check(x0)
    generators = seeded(seed, len(x0))
    total = prior_term(schedule, x0).cpu().double()
    for t, weight in _weighted(schedule.num_timesteps, timesteps, seed):
        x_t = schedule.add_noise(x0, noise_like(x0, generators), t)
        prediction = predict(x_t, t)
        if clip_x0 is not None:
            prediction = prediction._replace(x0=prediction.x0.clamp(-clip_x0, clip_x0))
        total += weight * step_term(schedule, x0, x_t, torch.full((len(x0),), t), prediction).cpu().double()
    return total


def _weighted(T: int, n: int | None, seed: int) -> list[tuple[int, float]]:
    """Return the timesteps to evaluate, and the weight of each in the sum over all T."""
    if n is None or whole_number("timesteps", n, min(T, 2), T) == T:
        return [(t, 1.0) for t in range(T)]
    width = (T - 1) / (n - 1)
    places = torch.rand(n - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = [min(T - 1, 1 + int((i + place) * width)) for i, place in enumerate(places.tolist())]
    return [(0, 1.0), *((t, width) for t in drawn)]


def _check(x0: Tensor) -> None:
    """Raise ArgumentError unless these are images in [-1, 1]."""
    if not isinstance(x0, Tensor) or x0.ndim != 4 or not x0.is_floating_point():
        raise ArgumentError("images for bits_per_dimension are a tensor (B, 3, H, W) of numbers in [-1, 1].")
    if not bool((x0.abs() <= 1).all()):
        raise ArgumentError("images for bits_per_dimension must be in [-1, 1]; latents have no bits per dimension.")
