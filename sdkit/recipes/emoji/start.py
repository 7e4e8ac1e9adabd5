"""Make the pipeline from which the U-Net's training starts.

It has the trained VAE, a tokenizer learned from the captions, an untrained text encoder, and the noise schedule, but no
U-Net. The schedule is Stable Diffusion's, but begins with a beta of 1e-6. Neighbouring latents of a small image tell
little of each other, so the same noise hides more of it (Hoogeboom et al. 2023, "simple diffusion", section 2.1): with
Stable Diffusion's 8.5e-4, the last fifth of the steps would decide all details. The last beta stays: with 0.003, the
first of ten steps would decide the background's colour, and half of the backgrounds would be gray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from sdkit.atomic import whole_folder
from sdkit.errors import TrainingError
from sdkit.messages import no_warnings, quiet
from sdkit.recipes.emoji.settings import shape
from sdkit.training.learned_tokenizer import learn_tokenizer

VOCABULARY = 2048
LENGTH = 25  # longest caption in tokens, start and end included

DEVIATIONS = {"token": 1.0, "position": 0.3}
"""Standard deviations of the initial embeddings. With transformers' 0.02 the layers drown what tells words apart."""


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
            encoder = CLIPTextModel(config)
            for name, value in encoder.named_parameters():
                for embedding, deviation in DEVIATIONS.items():
                    if f"{embedding}_embedding" in name:
                        torch.nn.init.normal_(value, std=deviation)
            encoder.save_pretrained(folder / "text_encoder")
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
