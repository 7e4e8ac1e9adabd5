"""A single-file checkpoint with its VAE in another file: `vae=` of `StableDiffusion.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sdkit
from sdkit.errors import ArgumentError, SourceError
from tests.helpers import original_layout as original
from tests.helpers import tiny

PLACE = {"dtype": "fp32", "device": "cpu"}


def drawn(sd: sdkit.StableDiffusion) -> Tensor:
    images: Tensor = sd("a red disc", num_inference_steps=2, output_type="pt")
    return images


def test_a_checkpoint_without_a_vae_takes_one_of_each_kind(tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "model")
    whole = sdkit.StableDiffusion.from_pretrained(folder, **PLACE)
    vae = original.vae(whole.vae.network.state_dict())
    bare = original.unet(whole.unet.network.state_dict(), 1) | original.clip(whole.text.network.state_dict())
    files = {"bare": bare, "full": bare | vae, "vae": {key.removeprefix("first_stage_model."): vae[key] for key in vae}}
    for name, tensors in files.items():
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors"
        )
    torch.save(vae, tmp_path / "vae.ckpt")
    expected = drawn(whole)
    source = tmp_path / "bare.safetensors"
    with pytest.raises(SourceError, match=r"not a VAE; give .*, or a VAE beside it \(vae=, --vae\)\.$"):
        sdkit.StableDiffusion.from_pretrained(source, config=folder, **PLACE)
    for kind in ("full.safetensors", "vae.safetensors", "vae.ckpt", "model", "model/vae"):
        sd = sdkit.StableDiffusion.from_pretrained(source, vae=tmp_path / kind, config=folder, **PLACE)
        torch.testing.assert_close(drawn(sd), expected, atol=1e-6, rtol=0)
        assert sd.vae.identity == whole.vae.identity


def test_a_vae_of_other_latents_is_told(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(32,), latent_channels=8).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="takes 4 channels, this VAE's latents have 8"):
        sdkit.StableDiffusion.from_pretrained("emoji", vae=tmp_path, **PLACE)
