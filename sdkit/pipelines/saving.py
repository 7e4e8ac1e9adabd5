"""Writing a model as a folder in diffusers layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sdkit.atomic import new_folder, whole_folder
from sdkit.errors import SourceError
from sdkit.loading.configs import GUIDANCE, LOW_RES
from sdkit.loading.lora_file import LoRA
from sdkit.loading.parts import LOW_RES_SCHEDULER
from sdkit.loading.single_file import ASSETS
from sdkit.loading.source import USUAL_GUIDANCE, Source, condition_of
from sdkit.loading.tensors import is_finite
from sdkit.messages import clean, no_warnings, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.networks.lora import Active, MergedLoRAs


def save_pipeline(
    folder: Path,
    *,
    vae: VAE,
    text_encoder: Any,
    tokenizer: Any,
    unet: Any,
    scheduler: Mapping[str, Any],
    guidance_scale: float,
    low_res_scheduler: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in diffusers layout into an empty folder.

    Args:
        folder: The folder.
        vae: The VAE.
        text_encoder: The text encoder's network.
        tokenizer: Its tokenizer.
        unet: The U-Net's network.
        scheduler: The noise schedule, as in scheduler_config.json.
        guidance_scale: The guidance scale that suits the model.
        low_res_scheduler: For an upsampler: the schedule by which its small image is noised; None is DDPM's.
    """
    with quiet("diffusers", "transformers"), no_warnings():
        import diffusers

        scheduler_class = getattr(diffusers, scheduler.get("_class_name") or "DDIMScheduler")
        edits = condition_of(unet.config) == "latents"
        kind = diffusers.StableDiffusionInstructPix2PixPipeline if edits else diffusers.StableDiffusionPipeline
        pipeline = kind(
            vae=vae.network if vae.kind.makes_latents else None,
            text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler_class.from_config(scheduler),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        if guidance_scale != USUAL_GUIDANCE:
            pipeline.register_to_config(**{GUIDANCE: guidance_scale})
        pipeline.save_pretrained(folder)
        if condition_of(unet.config) == LOW_RES:
            noising = diffusers.DDPMScheduler.from_config(low_res_scheduler or {})
            noising.save_pretrained(folder / LOW_RES_SCHEDULER.folder)
    if not vae.kind.makes_latents:
        _save_pixels(folder)


def save_without_text(
    folder: Path, *, vae: VAE, unet: Any, scheduler: Mapping[str, Any], guidance_scale: float
) -> None:
    """Write a model whose U-Net is a `UNet2DModel` into an empty folder, in the layout of diffusers' `DDPMPipeline`,
    with the VAE beside it, which that pipeline does not read.

    Args:
        folder: The folder.
        vae: The VAE, or the pixel identity.
        unet: The U-Net's network.
        scheduler: The noise schedule, as in scheduler_config.json.
        guidance_scale: The guidance scale that suits the model.
    """
    with quiet("diffusers", "transformers"), no_warnings():
        import diffusers

        scheduler_class = getattr(diffusers, scheduler.get("_class_name") or "DDPMScheduler")
        pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler_class.from_config(scheduler))
        pipeline.register_to_config(**{GUIDANCE: guidance_scale})
        pipeline.save_pretrained(folder)
        if vae.kind.makes_latents:
            vae.network.save_pretrained(folder / "vae")
    if not vae.kind.makes_latents:
        _save_pixels(folder)


def _save_pixels(folder: Path) -> None:
    """Write the config of the pixel identity, which diffusers does not know, and `Source` reads."""
    (folder / "vae").mkdir()
    shutil.copy(ASSETS / "pixels" / "config.json", folder / "vae")


def _check_finite(networks: Iterable[torch.nn.Module], dtype: torch.dtype) -> None:
    """Raise SourceError if a weight overflowed in the dtype to be written."""
    for network in networks:
        for name, weight in network.named_parameters():
            if not is_finite(weight):
                kind = str(dtype).removeprefix("torch.")
                raise SourceError(f"{clean(name)} would be infinite in {kind}; give a smaller scale, or dtype 'fp32'.")


def merge_into_model(
    model: str | os.PathLike[str],
    loras: Iterable[tuple[LoRA, float]],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model whose weights include LoRAs, as a folder in diffusers layout.

    Args:
        model: Source of the model; see `StableDiffusion.from_pretrained`.
        loras: LoRAs and their scales. Their updates are added up in float32.
        folder: The folder to write. It must be absent or empty.
        dtype: Dtype of the written weights.

    Returns:
        The folder.

    Raises:
        ArgumentError: The folder holds something.
        SourceError: The model cannot be read, a LoRA was made for another model, or a weight would overflow.
        SdkitError: The folder cannot be written.
    """
    out = new_folder(folder)
    source = Source.open(model)
    unet, (text_encoder, tokenizer) = source.denoiser(inpainting=True, conditioned=True), source.text_encoder()
    active = {str(i): Active(lora, scale) for i, (lora, scale) in enumerate(loras)}
    MergedLoRAs().set(active, unet, text_encoder)
    vae = VAE(source.autoencoder())
    with quiet("diffusers", "transformers"), no_warnings():
        for network in (unet, text_encoder, vae.network):
            network.to(dtype)
    _check_finite((unet, text_encoder), dtype)
    with whole_folder(out) as temporary:
        save_pipeline(
            temporary, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
            scheduler=source.scheduler_config(), guidance_scale=source.guidance_scale,
            low_res_scheduler=source.low_res_config() if condition_of(unet.config) == LOW_RES else None,
        )  # fmt: skip
    return out
