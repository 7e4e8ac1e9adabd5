"""The common parts of all samplers: types, clamping of x0, and noise that belongs to an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sdkit.arguments import number
from sdkit.diffusion.schedule import Prediction
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


def checked_eta(eta: float) -> float:
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
