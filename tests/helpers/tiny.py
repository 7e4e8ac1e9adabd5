"""A complete model with random, seeded weights that trains in a second, and images to train it on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel, VQModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from tests.helpers.loaders import load_tokenizer

Config = dict[str, Any]
SIZE = 32  # pixels; latents are (4, 4, 4)


TWO_LEVELS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""Settings of a U-Net with two levels, in place of Stable Diffusion's four"""

CLASSIFIER: dict[str, Any] = {
    "_class_name": "EncoderUNet",
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
"""Config of a classifier of noisy images with two levels, as for `init`"""


class Networks(NamedTuple):
    """Networks that fit together."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text: CLIPTextModel

    def save(self, folder: Path) -> None:
        """Write the networks into a folder in diffusers layout."""
        for part, name in ((self.vae, "vae"), (self.unet, "unet"), (self.text, "text_encoder")):
            part.save_pretrained(folder / name)


def networks(
    channels: Sequence[int], *, vae: Config | None = None, unet: Config | None = None, text: Config | None = None
) -> Networks:
    """Build a VAE, a U-Net, and a text encoder with few channels and random, seeded weights.

    Args:
        channels: Channels of the VAE, one number for each level, and of the U-Net, unless `unet` has its own.
        vae: Further settings of the VAE.
        unet: Further settings of the U-Net. The default is Stable Diffusion's topology.
        text: Further settings of the text encoder. Its width is the width of the U-Net's condition.
    """
    torch.manual_seed(0)
    common: Config = {"block_out_channels": tuple(channels), "norm_num_groups": 4}
    blocks: Config = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    vae_network = AutoencoderKL(**common | blocks | (vae or {}))
    heads = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_network = CLIPTextModel(CLIPTextConfig(**heads | (text or {})))
    attention = {"cross_attention_dim": text_network.config.hidden_size, "attention_head_dim": 4}
    return Networks(vae_network, UNet2DConditionModel(**common | attention | (unet or {})), text_network)


def scheduler(**changes: Any) -> DDIMScheduler:
    """Build diffusers' DDIM scheduler with Stable Diffusion's settings, and these changes."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, **changes,
    )  # fmt: skip


def model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a model of 0.5 M parameters in diffusers layout. Its tokenizer is that of the tests (32 tokens)."""
    tokenizer = load_tokenizer()
    networks(
        (16, 16, 16, 16),
        vae={"sample_size": SIZE, "scaling_factor": 0.5},
        unet={"sample_size": SIZE // 8, "block_out_channels": (16, 32), **TWO_LEVELS},
        text={
            "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": 1, "dtype": "float32",
        },
    ).save(folder)  # fmt: skip
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler(prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    return folder


LOW = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""The schedule of the small images' noise of `upsampler`"""


def upsampler(folder: Path) -> Path:
    """Write an upsampler in the layout of stable-diffusion-x4-upscaler: a VAE of factor 4 and scale 0.08333, a U-Net of
    seven input channels with noise levels as class labels, and a second schedule."""
    tokenizer = load_tokenizer()
    networks(
        (16, 16, 16), vae={"sample_size": 64, "scaling_factor": 0.08333},
        unet={"sample_size": 16, "block_out_channels": (16, 32), "in_channels": 7, "num_class_embeds": 1000,
              **TWO_LEVELS},
        text={"vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
              "pad_token_id": 1, "dtype": "float32"},
    ).save(folder)  # fmt: skip
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    DDPMScheduler(**LOW).save_pretrained(folder / "low_res_scheduler")
    return folder


def vq_model(folder: Path, codes: int = 16) -> Path:
    """Write a VQ model with random, seeded weights, whose codes are latents of discs. SIZE pixels are 8 x 8 codes."""
    torch.manual_seed(0)
    levels = 3
    network = VQModel(
        num_vq_embeddings=codes, block_out_channels=(16,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=4, sample_size=SIZE,
        mid_block_add_attention=False,
    ).eval()  # fmt: skip
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    discs = [torch.where((x - dx) ** 2 + y**2 < 0.2, colour, torch.tensor(0.9)) for dx in (-0.3, 0.3) for colour in
             torch.tensor([-0.8, 0.0])]  # fmt: skip
    pixels = torch.stack([torch.stack([disc, disc.flip(1), disc.T]) for disc in discs])
    with torch.no_grad():
        latents = network.encode(pixels).latents.movedim(1, -1).flatten(0, 2)
        network.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:codes]])
    network.save_pretrained(folder)
    return folder


def photos(folder: Path, n: int, size: int = SIZE) -> Path:
    """Write n images of coloured discs, with captions in .txt files."""
    folder.mkdir(parents=True)
    colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (235, 205, 40)}
    y, x = np.mgrid[0:size, 0:size] / size
    rng = np.random.default_rng(0)
    for i in range(n):
        name, colour = list(colours.items())[i % len(colours)]
        cx, cy, r = *rng.uniform(0.35, 0.65, 2), rng.uniform(0.15, 0.3)
        pixels = np.where(((x - cx) ** 2 + (y - cy) ** 2 < r**2)[..., None], colour, 245).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"a {name} disc")
    return folder
