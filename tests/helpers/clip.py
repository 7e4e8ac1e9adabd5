"""A tiny CLIP and a tiny DINOv2 in the layout of transformers; the CLIP can be trained in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from sdkit.evaluation.extractors import Extractor, open_extractor
from tests.helpers.loaders import load_tokenizer

SIDE = 32  # pixels


def save_clip(folder: Path, projection: int = 24) -> Path:
    """Write a CLIP with random, seeded weights. Its tokenizer is that of the tests.

    Args:
        folder: The folder.
        projection: Width of the embeddings. That of the text encoder's states is 32, which the prior of DALL-E 2 needs.
    """
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = CLIPConfig(
        text_config=shape | words,
        vision_config=shape | {"image_size": SIDE, "patch_size": 8},
        projection_dim=projection,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_config(path: Path) -> Path:
    """Write the config of a CLIP to train from scratch."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {"vocab_size": 530, "max_position_embeddings": 20}
    vision = shape | {"image_size": SIDE, "patch_size": 8}
    config = {"model_type": "clip", "projection_dim": 12, "text_config": text, "vision_config": vision}
    path.write_text(json.dumps(config))
    return path


def save_dinov2(folder: Path) -> Path:
    """Write a DINOv2 with random, seeded weights."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def train_clip(folder: Path, images: Sequence[Image.Image], texts: Sequence[str], steps: int = 120) -> Extractor:
    """Train the CLIP in a folder on pairs of images and texts with CLIP's contrastive loss, save it, and load it."""
    extractor = open_extractor(f"clip:{folder}", device="cpu")
    network = extractor.network.requires_grad_(True).train()
    pixels = torch.stack([extractor.prepare(image) for image in images]).float() / 127.5 - 1
    tokens = extractor.text.tokenizer(list(texts), padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    labels = torch.arange(len(texts))
    for _ in range(steps):
        logits = network(pixel_values=pixels, **tokens).logits_per_image
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval().save_pretrained(folder)
    return open_extractor(f"clip:{folder}", device="cpu")
