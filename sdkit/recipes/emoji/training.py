"""The trainings, in order: each is a call of `train_vae`, `cache` or `train_unet`, and goes on where it was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sdkit.data import cache, open_examples
from sdkit.recipes.emoji.pictures import SIZE
from sdkit.recipes.emoji.settings import settings, shape_file
from sdkit.recipes.emoji.start import make_start
from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae


def train_the_vae(root: Path) -> None:
    """root/vae-1, from nothing on small tiles; root/vae-2, on large ones; and root/vae-3, on what the U-Net
    will draw, mostly, with LPIPS."""
    _train_vae(root, "vae-1", "tiles", init=shape_file("vae"))
    _train_vae(root, "vae-2", "large_tiles", model=root / "vae-1" / "result")
    _train_vae(root, "vae-3", "fine_tiles", model=root / "vae-2" / "result")


def _train_vae(root: Path, run: str, tiles: str, **begins: Any) -> None:
    """root/RUN, from a model or from nothing (init)."""
    data = root / "data"
    common: dict[str, Any] = {"data": data / tiles, "validation_data": data / "held_out", "out_dir": root / run}
    train_vae(VAEConfig(**settings(run), **common, **begins))


def make_latents(root: Path) -> None:
    """root/start, a pipeline around the VAE that lacks a U-Net, and root/latents, the captioned images as latents."""
    data, start = root / "data" / "captioned", root / "start"
    if not start.exists():
        captions = (example.caption for example in open_examples(data))
        make_start(root / "vae-3" / "result", captions, start)
    cache(start, data, root / "latents", size=SIZE)


def train_the_unet(root: Path) -> None:
    """root/unet-1, from nothing and together with the text encoder, and root/unet-2, at half the learning rate, above
    which training has its accidents, and from there down to 0."""
    data: dict[str, Any] = {"data": root / "latents", "size": SIZE, "train_text_encoder": True}
    train_unet(
        UNetConfig(
            **settings("unet-1"), **data, model=root / "start", init=shape_file("unet"),
            out_dir=root / "unet-1",
        )
    )  # fmt: skip
    train_unet(UNetConfig(**settings("unet-2"), **data, model=root / "unet-1" / "result", out_dir=root / "unet-2"))


def train_the_decoder(root: Path) -> None:
    """root/vae-4: the decoder alone, so that latents keep their meaning."""
    _train_vae(root, "vae-4", "fine_tiles", model=root / "vae-3" / "result")


def export(root: Path) -> Path:
    """root/model: the U-Net and the text encoder of root/unet-2 with the VAE of root/vae-4, in float16."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    model, partial = root / "model", root / "model.unfinished"
    shutil.rmtree(partial, ignore_errors=True)
    vae = AutoencoderKL.from_pretrained(root / "vae-4" / "result")
    pipeline = StableDiffusionPipeline.from_pretrained(root / "unet-2" / "result", vae=vae, safety_checker=None)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(partial)
    config = partial / "text_encoder" / "config.json"  # from which transformers would take the dtype to compute in
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    shutil.rmtree(model, ignore_errors=True)
    partial.rename(model)
    return model
