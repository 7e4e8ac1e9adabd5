"""Training a U-Net that reads a condition beside x_t (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section
3.3; Brooks et al. 2023, https://arxiv.org/abs/2211.09800): its examples, its wider input, and dropped conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdkit.data.latent_cache.manifest import Manifest
from sdkit.data.pairs import kind_of_conditions, open_conditions
from sdkit.data.sources import open_examples
from sdkit.errors import ArgumentError, CacheError
from sdkit.files import expanded
from sdkit.loading.configs import LOW_RES
from sdkit.loading.source import condition_of
from sdkit.networks.autoencoder import VAE, Autoencoder, latents_of
from sdkit.networks.concatenation import map_of, widen
from sdkit.networks.text_encoder import TextEncoder
from sdkit.training.batches import noise_of
from sdkit.training.settings import UNetConfig
from sdkit.training.stage import Samples
from sdkit.training.stages.conditions import PairedExamples
from sdkit.training.stages.examples import CachedLatents, DenoisingExamples, Row, open_provider
from sdkit.training.stages.images import is_cache, training_transform
from sdkit.training.stages.upsampling import prepare_upsampler


def prepare_input(network: Any, config: UNetConfig) -> None:
    """Widen a U-Net if the data of its run hold conditions and it does not read any yet.

    Args:
        network: The U-Net; it changes in place.
        config: Settings of the run.

    Raises:
        ArgumentError: The U-Net needs a condition and the data have none, it reads another kind, or a LoRA is trained,
            which cannot train the new channels.
    """
    own, kind = condition_of(network.config), _kind_in(config)
    if own == LOW_RES or config.upscale_factor is not None:
        prepare_upsampler(network, config, kind)
        return
    if config.noise_augmentation != type(config).noise_augmentation:
        raise ArgumentError("noise_augmentation belongs to an upsampler; give upscale_factor, or leave it out.")
    if config.instance_data is not None and own is not None:
        raise ArgumentError("DreamBooth takes no conditions, and this model needs one: give a text-to-image model.")
    if kind is None:
        if own is not None:
            raise ArgumentError(
                "this model draws from an image: name the images as condition_column or conditioning_data, or give a "
                "text-to-image model."
            )
        if config.condition_dropout != type(config).condition_dropout:
            raise ArgumentError(
                "condition_dropout belongs to conditions, and there are none: name them as condition_column or "
                "conditioning_data, or leave it out."
            )
        return
    stated = config.condition_kind if not is_cache(config.data) else kind
    if own is not None:
        if stated not in (None, own):
            raise ArgumentError(f"this model reads {own} beside x_t, the conditions of this run are {stated}.")
        return
    if config.lora_rank is not None:
        raise ArgumentError(
            "a LoRA cannot train the new input channels of a condition: leave lora_rank out, or give a model that was "
            "trained with conditions."
        )
    if network.config.in_channels != network.config.out_channels:  # refused by the stage, with a better message
        return
    widen(network, kind)


def _kind_in(config: UNetConfig) -> str | None:
    """Return the kind of the conditions in the data of a run, "latents" or "map"; None if they have none."""
    if config.instance_data is not None:
        return None
    if not is_cache(config.data):
        return kind_of_conditions(config.condition_column, config.conditioning_data, config.condition_kind)
    for name in ("condition_column", "conditioning_data"):
        if getattr(config, name) is not None:
            raise ArgumentError(f"{name}= has no meaning for a latent cache; give it to sdkit cache instead.")
    kind = Manifest.read(expanded(config.data)).settings.condition or None
    if config.condition_kind not in (None, kind):
        raise CacheError(
            f"the cache {expanded(config.data)} holds {f'conditions of the kind {kind}' if kind else 'no conditions'}, "
            f"not {config.condition_kind}; make another with sdkit cache --condition-column."
        )
    return kind


def open_conditioned(
    config: UNetConfig, kind: str, vae: Autoencoder, text: TextEncoder, own_size: tuple[int, int]
) -> DenoisingExamples:
    """Open the data of a run with conditions; for the arguments see `open_provider`. Each row has `concat`, or
    `concat_pixels` (3, H, W) of which the VAE is to make it."""
    if is_cache(config.data) or kind == LOW_RES:
        return open_provider(
            config.data, vae, text, size=config.size, own_size=own_size, augment=config.augment, seed=config.seed,
            trains_text=config.train_text_encoder, cached=CachedConditions, **config.opened_with(),
        )  # fmt: skip
    size: Any = config.size or own_size
    vae.check_size(size)
    examples = open_examples(config.data, **config.opened_with())
    conditions = open_conditions(
        examples, config.data, column=config.condition_column, conditioning_data=config.conditioning_data,
        **config.opened_with(),
    )  # fmt: skip

    def tensors(pixels: Tensor) -> Row:
        return {"concat": map_of(pixels[None], vae.factor)[0]} if kind == "map" else {"concat_pixels": pixels}

    return PairedExamples(
        examples, conditions, tensors, training_transform(size, config.augment), vae, text, seed=config.seed
    )


class CachedConditions(CachedLatents):
    """Examples from a latent cache that holds conditions: rows have `concat` (C', h, w), too."""

    def _example(self, index: int) -> Row:
        concat = self.cache[index]["concat"]
        assert concat is not None  # `prepare_input` found conditions in the manifest
        return super()._example(index) | {"concat": concat}


class DroppedConditions:
    """The conditions of a run, of which some are dropped in training, and none in validation.

    Args:
        config: Settings of the run.
    """

    def __init__(self, config: UNetConfig) -> None:
        self.config = config

    def added(self, batch: dict[str, Any], samples: Samples) -> dict[str, Any]:
        """Return a training batch with `told`."""
        return batch | {"told": told(samples, self.config)}

    def held_out(self, batch: dict[str, Any], i: int) -> dict[str, Any]:  # noqa: ARG002 - the same for each image
        """Return a batch of held-out image i, which has its condition."""
        return batch


def told(samples: Samples, config: UNetConfig) -> Tensor:
    """Return (B,) 1 for each sample with its condition, and 0 where zeros take its place.

    As for InstructPix2Pix (Brooks et al. 2023, section 3.2.1), dropped conditions and dropped captions overlap by half:
    with 10 % of each, 5 % of the samples lack the caption alone, 5 % the condition alone, and 5 % both.
    """
    captions, conditions = config.caption_dropout, config.condition_dropout
    low = min(captions - min(captions, conditions) / 2, 1 - conditions)  # overlaps by more where there is no room
    shares = [float(torch.rand((), generator=noise_of(config.seed, n))) for n, _ in samples]  # as `denoising_batch`
    return torch.tensor([0.0 if low <= share < low + conditions else 1.0 for share in shares])


def condition_image(row: Row, kind: str, vae: VAE, device: torch.device) -> Tensor:
    """Return the condition of an example as the pipeline takes it, (3, H, W) in [-1, 1].

    A cache does not hold its pixels: latents are decoded, and a map is enlarged.
    """
    if "concat_pixels" in row:
        return row["concat_pixels"]
    concat = row["concat"][None]
    if kind == "map":
        factor = vae.factor
        return concat.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)[0]
    z = latents_of(concat.to(device), concat.to(device), None, vae.scale, vae.shift)
    return vae.to(device).decode(z, output_type="pt")[0].cpu()
