"""Shortcuts that open a source for one of its parts only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.loading.source import Description, Source

TOKENIZER = Path(__file__).parent / "tokenizer"
"""A CLIP tokenizer of 2,048 tokens, learned from names of emoji, for captions of 32 tokens"""


def load_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def load_vae(name: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return Source.open(name, **options).autoencoder(dtype)


def load_unet(name: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return Source.open(name, **options).denoiser(dtype)


def load_text(name: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    return Source.open(name, **options).text_encoder(dtype)


def load_scheduler_config(name: Any, **options: Any) -> dict[str, Any]:
    return Source.open(name, **options).scheduler_config()


def load_schedule(source: Any, **options: Any) -> NoiseSchedule:
    return Source.open(source, **options).schedule()


def load_guidance_scale(name: Any, **options: Any) -> float:
    return Source.open(name, **options).guidance_scale


def describe(name: Any, **options: Any) -> Description:
    return Source.open(name, **options).describe()
