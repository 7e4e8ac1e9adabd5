"""A complete model with random, seeded weights that trains in a second, and images to train it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from tests.helpers.loaders import load_text

SIZE = 32  # pixels; latents are (4, 4, 4)


def model(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a model of 0.5 M parameters in diffusers layout. Its tokenizer is the embedded model's (32 tokens)."""
    torch.manual_seed(0)
    blocks = 4  # the VAE's factor is 8
    vae = AutoencoderKL(
        block_out_channels=(16,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=SIZE, scaling_factor=0.5,
    )  # fmt: skip
    _, tokenizer = load_text("emoji")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="float32",
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    for part, name in ((vae, "vae"), (unet, "unet"), (text, "text_encoder")):
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
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
