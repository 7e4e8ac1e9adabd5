"""A diffusers pipeline on sdkit's networks, and a small U-Net that takes the guidance scale as an input."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

import sdkit
from sdkit.loading.single_file import ASSETS

EMOJI = ASSETS / "emoji"


def diffusers_pipeline(sd: sdkit.StableDiffusion, scheduler: Any = None, kind: str = "StableDiffusionPipeline") -> Any:
    """Build diffusers' own pipeline on the same networks, as a reference. `kind` is the name of its class."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

    if scheduler is None:
        scheduler = diffusers.DDIMScheduler.from_pretrained(EMOJI, subfolder="scheduler")
    pipe = getattr(diffusers, kind)(
        vae=sd.vae.network,
        text_encoder=sd.text.network,
        tokenizer=sd.text.tokenizer,
        unet=sd.unet.network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_shaped(
    text: sdkit.TextEncoder, in_channels: int = 4, prediction_type: str = "epsilon"
) -> tuple[sdkit.StableDiffusion, Any]:
    """Build a small random model with SD 1.x's block types and schedule; return it with diffusers' scheduler.

    Args:
        text: The text encoder.
        in_channels: Channels of the U-Net's input: 4, or 9 for an inpainting model.
        prediction_type: What the U-Net predicts.
    """
    from diffusers import AutoencoderKL, DDIMScheduler

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, block_out_channels=(32, 64, 64, 64),
        layers_per_block=1, cross_attention_dim=text.width, attention_head_dim=8, norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16,) * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    schedule = sdkit.NoiseSchedule.from_config(scheduler.config)
    return sdkit.StableDiffusion(sdkit.VAE(vae.eval()), text, sdkit.UNet(unet.eval()), schedule), scheduler


def guided_network(cross_attention_dim: int = 8) -> UNet2DConditionModel:
    """Build a small U-Net that takes the guidance scale as an input, as distilled (LCM) models do."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim, time_cond_proj_dim=16,
    ).eval()  # fmt: skip


def control_network(unet: UNet2DConditionModel, *, seed: int = 0, levels: int = 4, pools: bool = False) -> Any:
    """Build a ControlNet for a U-Net, as diffusers does, whose zero convolutions have random weights.

    Args:
        unet: The U-Net.
        seed: Seed of the weights.
        levels: Number of levels of its image encoder; it reads 2^(levels - 1) pixels for each latent.
        pools: Whether it reads the image as a whole, as the one for shuffled images does.
    """
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 24)[:levels])
    network.register_to_config(global_pool_conditions=pools)
    heads = (network.controlnet_down_blocks, network.controlnet_mid_block, network.controlnet_cond_embedding.conv_out)
    for p in (p for head in heads for p in head.parameters()):
        torch.nn.init.normal_(p, std=0.1)
    return network.eval()
