"""Conditions by concatenation: further input channels of a U-Net, and what it reads in them (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.loading.configs import CONDITION
from sdkit.loading.source import condition_channels, latent_channels
from sdkit.networks.autoencoder import Autoencoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def widen(network: UNet2DConditionModel, condition: str) -> None:
    """Give a U-Net input channels for a condition, in place (Brooks et al. 2023, https://arxiv.org/abs/2211.09800,
    section 3.2).

    The new weights of the first convolution are zero: the U-Net computes what it did before, whatever the condition.
    The config names the condition, which diffusers ignores, and the new number of channels, which diffusers reads.

    Args:
        network: A U-Net whose input is x_t alone.
        condition: "latents" or "map"; see `sdkit.UNet`.
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
