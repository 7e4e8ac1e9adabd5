"""Conditions by concatenation: further input channels of a U-Net, and what it reads in them (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.loading.configs import CONDITION, LOW_RES, UPSCALE
from sdkit.loading.source import condition_channels, latent_channels
from sdkit.networks.autoencoder import Autoencoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def widen(network: UNet2DConditionModel, condition: str, *, upscale_factor: int | None = None) -> None:
    """Give a U-Net input channels for a condition, in place (Brooks et al. 2023, https://arxiv.org/abs/2211.09800,
    section 3.2).

    The new weights of the first convolution are zero: the U-Net computes what it did before, whatever the condition.
    An upsampler also gets an embedding of the noise level, whose output is zero at first, too. The config names the
    condition, which diffusers ignores, and the new number of channels, which diffusers reads.

    Args:
        network: A U-Net whose input is x_t alone.
        condition: "latents", "map", or "low_res"; see `sdkit.UNet`.
        upscale_factor: How many times larger an upsampler's images are than those that it reads.
    """
    old: Any = network.conv_in
    more = condition_channels(condition, latent_channels(network.config))
    new: Any = type(old)(
        old.in_channels + more, old.out_channels, old.kernel_size, padding=old.padding, device=old.weight.device,
        dtype=old.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    network.conv_in = new.requires_grad_(old.weight.requires_grad).train(network.training)
    network.register_to_config(in_channels=new.in_channels, **{CONDITION: condition})
    if condition == LOW_RES:
        network.class_embedding = _level_embedding(network)
        network.register_to_config(class_embed_type="timestep", **{UPSCALE: upscale_factor})


def _level_embedding(network: UNet2DConditionModel) -> Any:
    """Return an embedding of noise levels like that of timesteps, whose output is zero."""
    from diffusers.models.embeddings import TimestepEmbedding

    like: Any = network.time_embedding
    made = TimestepEmbedding(like.linear_1.in_features, like.linear_2.out_features)
    torch.nn.init.zeros_(made.linear_2.weight)
    torch.nn.init.zeros_(made.linear_2.bias)
    return made.to(like.linear_1.weight)


def noised_low_res(low: Tensor, level: Tensor, eps: Tensor, schedule: NoiseSchedule, size: tuple[int, int]) -> Tensor:
    """Return what an upsampler reads beside x_t: the small image with Gaussian noise (Ho et al. 2022,
    https://arxiv.org/abs/2106.15282, section 4), enlarged to the size of x_t.

    Args:
        low: Small images (B, 3, h', w') in [-1, 1].
        level: Their noise levels, timesteps of `schedule`: (B,) or a number.
        eps: Standard normal noise, shaped like `low`.
        schedule: The noise schedule of the small image.
        size: Height and width of x_t. Where it is that of `low`, as in Stable Diffusion's upscaler, nothing is
            enlarged.

    Returns:
        (B, 3, height, width).
    """
    noised = schedule.add_noise(low, eps, level)
    if tuple(low.shape[2:]) == size:
        return noised
    return F.interpolate(noised, size, mode="bilinear", align_corners=False)


def channels_of(images: Sequence[Tensor], condition: str, vae: Autoencoder, *, batch_size: int | None = None) -> Tensor:
    """Return the channels that a U-Net reads beside x_t.

    Args:
        images: N conditions (3, H, W) in [-1, 1], of one size.
        condition: "latents" or "map"; see `sdkit.UNet`.
        vae: The VAE.
        batch_size: Images that the VAE encodes together; None chooses it by their size.

    Returns:
        (N, C', ceil(H / factor), ceil(W / factor)), on the CPU. Latents are the posterior's mean, and not scaled, as in
        InstructPix2Pix.
    """
    if condition == "map":
        return map_of(torch.stack([*images]), vae.factor)
    mean: Tensor = vae.moments([*images], batch_size=batch_size)[0]
    return mean


def map_of(pixels: Tensor, factor: int) -> Tensor:
    """Return the mean colour of the pixels that each latent stands for.

    Args:
        pixels: (B, 3, H, W). The right and lower edges are repeated up to a multiple of `factor`, as for the VAE.
        factor: Pixels for each latent position, on each side.

    Returns:
        (B, 3, ceil(H / factor), ceil(W / factor)).
    """
    below, beside = (-side % factor for side in pixels.shape[2:])
    return F.avg_pool2d(F.pad(pixels, (0, beside, 0, below), mode="replicate"), factor)
