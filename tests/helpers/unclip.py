"""A tiny unCLIP (DALL-E 2) in the layout of diffusers' StableUnCLIPPipeline, with random, seeded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, PriorTransformer, StableUnCLIPPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.helpers import tiny
from tests.helpers.loaders import load_tokenizer

WIDTH, LENGTH, SIDE = 16, 32, 32
HEADS = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PRIOR = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": WIDTH, "num_embeddings": LENGTH
}  # fmt: skip


def save_prior_config(path: Path, **changes: Any) -> Path:
    """Write the config of a prior to train from scratch."""
    path.write_text(json.dumps({"_class_name": "PriorTransformer"} | PRIOR | changes))
    return path


def unclip(**prior_scheduler: Any) -> StableUnCLIPPipeline:
    """Build a model. Its tokenizers are that of the tests (32 tokens).

    Args:
        **prior_scheduler: Settings of the prior's DDIM scheduler.
    """
    tokenizer = load_tokenizer()
    special = {
        "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    parts = tiny.networks(
        (16, 16, 16, 16),
        vae={"sample_size": tiny.SIZE, "scaling_factor": 0.5},
        unet={
            "sample_size": tiny.SIZE // 8, "block_out_channels": (16, 32), **tiny.TWO_LEVELS,
            "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH,
        },
        text={**special, "dtype": "float32"},
    )  # fmt: skip
    prior, normalizer = PriorTransformer(**PRIOR), StableUnCLIPImageNormalizer(WIDTH)
    for mean, std in ((prior.clip_mean, prior.clip_std), (normalizer.mean, normalizer.std)):
        mean.data.normal_()
        std.data.uniform_(0.5, 2)
    for name in ("positional_embedding", "prd_embedding"):
        getattr(prior, name).data.normal_()
    return StableUnCLIPPipeline(
        prior_tokenizer=tokenizer,
        prior_text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**HEADS, **special, projection_dim=WIDTH)).eval(),
        prior=prior.eval(),
        prior_scheduler=DDIMScheduler(
            **{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False}
            | prior_scheduler
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer, text_encoder=parts.text.eval(), unet=parts.unet.eval(), scheduler=tiny.scheduler(),
        vae=parts.vae.eval(),
    )  # fmt: skip


def image_encoder() -> CLIPVisionModelWithProjection:
    """Build an image encoder for the model above."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(**HEADS, image_size=SIDE, patch_size=8, projection_dim=WIDTH)
    return CLIPVisionModelWithProjection(config).eval()
