"""Training an upsampler: a U-Net that reads the image itself, small and noisy, beside x_t (Ho et al. 2022,
https://arxiv.org/abs/2106.15282, section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdkit.data.transform import draw
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError, CacheError
from sdkit.files import expanded
from sdkit.loading.configs import LOW_RES, UPSCALE
from sdkit.loading.source import condition_of
from sdkit.networks.autoencoder import VAE
from sdkit.networks.concatenation import map_of, noised_low_res, widen
from sdkit.pipelines.upsampling import USUAL_LEVEL
from sdkit.training.settings import UNetConfig
from sdkit.training.stage import Samples
from sdkit.training.stages.images import is_cache

AUGMENTATION = 2**32 - 3  # passed to `draw` as the number of an augmentation; no image has this many


def prepare_upsampler(network: Any, config: UNetConfig, kind: str | None) -> None:
    """Widen a U-Net to read a small image beside x_t, if it does not yet.

    Args:
        network: The U-Net; it changes in place.
        config: Settings of the run.
        kind: Kind of the conditions in the data; None if they have none.

    Raises:
        ArgumentError: The U-Net takes no text, is of another kind or another factor, or a LoRA is trained, which cannot
            train the new channels.
        CacheError: A latent cache does not hold the small images.
    """
    own, factor = condition_of(network.config), config.upscale_factor
    if config.instance_data is not None:
        raise ArgumentError("DreamBooth takes no conditions, and an upsampler reads one: give a text-to-image model.")
    if kind is not None and not is_cache(config.data):
        raise ArgumentError("an upsampler's condition is made of the image itself; leave condition_column out.")
    if is_cache(config.data) and kind != "map":
        raise CacheError(
            f"the cache {expanded(config.data)} does not hold the small images that an upsampler reads: make one with "
            "sdkit cache --condition-kind map, and the images themselves as --conditioning-data; or train from images."
        )
    if config.condition_dropout != type(config).condition_dropout:
        raise ArgumentError(
            "condition_dropout is not for an upsampler, whose small image is noised instead; leave it out."
        )
    if own == LOW_RES:
        stated = network.config.get(UPSCALE)
        if factor is not None and stated is not None and factor != stated:
            raise ArgumentError(f"this upsampler enlarges {stated} times, not {factor}; leave upscale_factor out.")
        return
    if not getattr(network.config, "cross_attention_dim", None):
        raise ArgumentError(
            "an upsampler reads captions, and a UNet2DModel none: give a UNet2DConditionModel, as model or as init."
        )
    if network.config.out_channels == 2 * network.config.in_channels:
        raise ArgumentError(
            "an upsampler predicts no variance of its own; give a U-Net with as many out_channels as in_channels, and "
            "loss simple."
        )
    if own is not None or network.config.in_channels != network.config.out_channels:
        raise ArgumentError(
            "upscale_factor makes an upsampler of a U-Net that reads x_t alone, and this one reads more: give a "
            "text-to-image model."
        )
    if config.lora_rank is not None:
        raise ArgumentError(
            "a LoRA cannot train the new input channels of an upsampler: leave lora_rank out, or give an upsampler."
        )
    widen(network, LOW_RES, upscale_factor=factor)


class Upsampling:
    """The conditions of an upsampler in training.

    Args:
        config: Settings of the run.
        vae: The VAE of the run.
        factor: How many times larger the images are than those that the U-Net reads.
        schedule: The noise schedule of the small images.
        shape: Height and width of the latents.

    Raises:
        ArgumentError: The factor does not fit the VAE, the size, or the noise schedule.
        CacheError: A latent cache does not hold the small images.
    """

    def __init__(
        self, config: UNetConfig, vae: VAE, factor: int, schedule: NoiseSchedule, shape: tuple[int, int],
    ) -> None:  # fmt: skip
        self.config, self.factor, self.schedule, self.shape = config, factor, schedule, shape
        if factor % vae.factor:
            raise ArgumentError(
                f"upscale_factor {factor} must be a multiple of {vae.factor}, this VAE's pixels for each latent: the "
                "small image must not be larger than the latents; give another, or another vae."
            )
        size = tuple(side * vae.factor for side in shape)
        if any(side % factor for side in size):
            raise ArgumentError(
                f"size {size[0]} x {size[1]} must divide by upscale_factor, {factor}; change one of them."
            )
        if config.noise_augmentation >= schedule.num_timesteps:
            raise ArgumentError(
                f"noise_augmentation must be below {schedule.num_timesteps}, the noise levels of the small image."
            )
        if is_cache(config.data) and factor != vae.factor:
            raise CacheError(
                f"the cache {expanded(config.data)} cannot hold images {factor} times smaller, for its latents are "
                f"{vae.factor} times smaller: train from images."
            )

    def low(self, row: Mapping[str, Any]) -> Tensor:
        """Return the small image of an example or of a batch, (..., 3, h', w') in [-1, 1]."""
        if "pixels" not in row:
            return row["concat"]  # type: ignore[no-any-return]
        pixels: Tensor = row["pixels"]
        return map_of(pixels, self.factor) if pixels.ndim == 4 else map_of(pixels[None], self.factor)[0]

    def added(self, batch: dict[str, Any], samples: Samples) -> dict[str, Any]:
        """Return a training batch with what the U-Net reads beside x_t, and its noise level (B,).

        The level is uniform, and depends only on the number of the sample and the seed, as the noise does.
        """
        generators = [draw(self.config.seed, n, AUGMENTATION) for n, _ in samples]
        levels = [torch.randint(self.config.noise_augmentation + 1, (), generator=one) for one in generators]
        return self._noised(batch, torch.stack(levels), generators)

    def held_out(self, batch: dict[str, Any], i: int) -> dict[str, Any]:
        """Return a batch of held-out example i with what the U-Net reads at the usual noise level, the same in every
        run."""
        n = len(batch["posterior_eps"])
        level = torch.full((n,), min(USUAL_LEVEL, self.config.noise_augmentation))
        return self._noised(batch, level, [draw(0, i * n + j, AUGMENTATION) for j in range(n)])

    def _noised(self, batch: dict[str, Any], level: Tensor, generators: list[torch.Generator]) -> dict[str, Any]:
        low = self.low(batch)
        level = level.to(low.device)
        eps = torch.stack([torch.randn(low.shape[1:], generator=one) for one in generators]).to(low)
        return batch | {"concat": noised_low_res(low, level, eps, self.schedule, self.shape), "label": level}
