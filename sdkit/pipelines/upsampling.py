"""Upsamplers in the pipeline: they read a small image with Gaussian noise beside x_t (Ho et al. 2022,
https://arxiv.org/abs/2106.15282, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkit.arguments import whole_number
from sdkit.diffusion.samplers import Generators
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError
from sdkit.loading.configs import LOW_RES
from sdkit.networks.concatenation import noised_low_res
from sdkit.pipelines.image_to_image import resized

if TYPE_CHECKING:
    from sdkit.networks.denoiser import UNet

USUAL_LEVEL = 20
"""Noise level of a call that gives none, as in diffusers."""


def check_noise_level(noise_level: int | None, unet: UNet, schedule: NoiseSchedule) -> int | None:
    """Return the noise level at which an upsampler reads its image; None for other models.

    Raises:
        ArgumentError: The level is none of the schedule's timesteps, or the model is no upsampler.
    """
    if unet.condition != LOW_RES:
        if noise_level is not None:
            raise ArgumentError("noise_level belongs to an upsampler, and this model is none; leave it out.")
        return None
    if noise_level is None:
        return min(USUAL_LEVEL, schedule.num_timesteps - 1)
    return whole_number("noise_level", noise_level, 0, schedule.num_timesteps - 1)


def told_small(
    images: Tensor,
    size: tuple[int, int],
    factor: int,
    generators: Generators,
    level: int,
    schedule: NoiseSchedule,
    shape: tuple[int, int],
) -> Tensor:
    """Return the channels that an upsampler reads beside x_t.

    As in diffusers, an image's generator first draws this noise, then x_T.

    Args:
        images: Small images (N, 3, H', W') in [-1, 1]. They are resized to `size` / `factor` if they have another size.
        size: Height and width of the drawing in pixels.
        factor: How many times larger the drawing is than the small image.
        generators: One CPU generator for each image.
        level: Noise level, a timestep of `schedule`.
        schedule: The schedule of the small images' noise.
        shape: Height and width of x_t.

    Returns:
        (N, 3, h, w), on the CPU.

    Raises:
        ArgumentError: `size` does not divide by `factor`.
    """
    if any(side % factor for side in size):
        raise ArgumentError(
            f"this upsampler draws images whose sides divide by {factor}, not {size[1]} x {size[0]}; leave height and "
            "width out, or give others."
        )
    low = resized(images, (size[0] // factor, size[1] // factor))
    eps = torch.stack([torch.randn(low.shape[1:], generator=generator) for generator in generators])
    return noised_low_res(low, torch.full((len(low),), level), eps, schedule, shape)
