"""Make the pipeline from which the U-Net's training starts.

From scratch it has the trained VAE, a tokenizer learned from the captions, an untrained text encoder, and the noise
schedule, but no U-Net. From another model it has that model's tokenizer, text encoder, and U-Net.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from sdkit.atomic import whole_folder
from sdkit.errors import TrainingError
from sdkit.loading.source import Source
from sdkit.messages import no_warnings, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.pipelines.saving import save_pipeline
from sdkit.recipes.emoji.settings import shape
from sdkit.training.learned_tokenizer import learn_tokenizer

VOCABULARY = 2048
LENGTH = 32  # longest caption in tokens, start and end included


def make_start(vae: Path, captions: Iterable[str], out: Path) -> None:
    """Write a pipeline without a U-Net, in diffusers layout.

    Args:
        vae: Folder of the VAE in diffusers layout.
        captions: Captions from which the tokenizer learns.
        out: Folder to write.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with quiet("diffusers", "transformers"), no_warnings(), whole_folder(out, TrainingError) as folder:
        shutil.copytree(vae, folder / "vae")
        learn_tokenizer(captions, VOCABULARY, LENGTH).save_pretrained(folder / "tokenizer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = CLIPTextConfig(**shape("text_encoder"), vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
            CLIPTextModel(config).save_pretrained(folder / "text_encoder")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(shape("scheduler"), indent=2))
        index = {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def take_start(vae: Path, model: str, out: Path) -> None:
    """Write the pipeline of another model with the trained VAE in place of its own.

    Args:
        vae: Folder of the VAE in diffusers layout. Its latents should resemble those of the model's own VAE.
        model: Source of the model; see `StableDiffusion.from_pretrained`.
        out: Folder to write.
    """
    source = Source.open(model)
    text_encoder, tokenizer = source.text_encoder()
    with whole_folder(out, TrainingError) as folder:
        save_pipeline(
            folder, vae=VAE.from_pretrained(vae, dtype="fp32"), text_encoder=text_encoder, tokenizer=tokenizer,
            unet=source.denoiser(), scheduler=shape("scheduler"), guidance_scale=source.guidance_scale,
        )  # fmt: skip
