"""A small U-Net without text, and pictures of classes to train it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

SIDE = 8
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220)}


def unet_config(**changes: Any) -> dict[str, Any]:
    """Return the config of a `UNet2DModel` of 0.1 M parameters: two levels, with attention in one of them."""
    return {
        "_class_name": "UNet2DModel", "sample_size": SIDE, "in_channels": 3, "out_channels": 3,
        "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    } | changes  # fmt: skip


def network(**changes: Any) -> Any:
    """Build that network with random, seeded weights, in evaluation mode."""
    torch.manual_seed(0)
    return UNet2DModel.from_config(unet_config(**changes)).eval()


def init(folder: Path, *, timesteps: int | None = None, variance_type: str = "fixed_small", **changes: Any) -> Path:
    """Write the config of such a network into a folder.

    Args:
        folder: The folder.
        timesteps: Number of timesteps of a noise schedule beside it; None writes none.
        variance_type: The variance that it names.
        **changes: Settings of the network.
    """
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(unet_config(**changes)))
    if timesteps is not None:
        schedule = DDPMScheduler(num_train_timesteps=timesteps, beta_end=0.3, variance_type=variance_type)
        schedule.save_pretrained(folder / "scheduler")
    return folder


def pictures(folder: Path, n: int, *, in_folders: bool = False) -> Path:
    """Write n pictures of noisy colours, each with the name of its class: in a .txt, or that of its folder."""
    rng = np.random.default_rng(0)
    for i in range(n):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        home = folder / name if in_folders else folder
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / f"{i:03}.png")
        if not in_folders:
            (home / f"{i:03}.txt").write_text(name)
    return folder
