"""What the U-Net's training begins with, beside the VAE: a tokenizer of the captions' own, an untrained text encoder
and the noise schedule, in diffusers layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sdkit.messages import no_warnings, quiet
from sdkit.recipes.emoji.settings import shape
from sdkit.training.checkpoint import whole_folder

VOCABULARY = 2048
LENGTH = 32  # tokens, with start and end
START, END = "<|startoftext|>", "<|endoftext|>"


def make_start(vae: Path, captions: Iterable[str], out: Path) -> None:
    """A pipeline without a U-Net in the folder `out`, around a VAE in diffusers layout."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with quiet("diffusers", "transformers"), no_warnings(), whole_folder(out) as folder:
        shutil.copytree(vae, folder / "vae")
        _tokenizer(captions).save_pretrained(folder / "tokenizer")
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


def _tokenizer(captions: Iterable[str]) -> Any:
    """CLIP's kind of byte-pair encoding (Radford et al. 2021) with merges learned from the captions. All bytes are in
    its vocabulary, within and at the end of words, so that any text can be encoded."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [START, END, *alphabet, *(f"{byte}</w>" for byte in alphabet)]
    learner = CLIPTokenizer().backend_tokenizer
    # All symbols as "special" ones: they have numbers then, by which ties between merges are broken the same each time.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - len(symbols)]
    vocabulary = {symbol: n for n, symbol in enumerate([*symbols, *map("".join, merges)])}
    return CLIPTokenizer(vocabulary, merges, model_max_length=LENGTH)
