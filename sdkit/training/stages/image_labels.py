"""The decoder of DALL-E 2 (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, section 2.1): a U-Net that reads the
CLIP embedding of each training image, noised, as its class label."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.data.transform import draw
from sdkit.errors import ArgumentError, DataError
from sdkit.loading.unclip_folder import UnCLIPFolder
from sdkit.networks.clip import ImageEncoder
from sdkit.training.batches import noise_of
from sdkit.training.settings import UNetConfig
from sdkit.training.stage import Samples
from sdkit.training.stages.images import identity_of, is_cache

LABEL = 2**32 - 3  # passed to `draw` as the number of an augmentation; no image has this many
COPIED = (
    *("image_encoder", "image_normalizer", "image_noising_scheduler", "feature_extractor"),
    *("prior", "prior_text_encoder", "prior_tokenizer", "prior_scheduler"),
)
"""Folders of a decoder's result beside those of Stable Diffusion, as far as its image_encoder has them."""


class ImageLabels:
    """Labels of training images: their embeddings, noised by a random amount, or zeros where they are dropped.

    An image is embedded as it is trained on, cropped and resized, and then resized to the encoder's side: a decoder of
    images much smaller than that learns from embeddings of blurred ones.

    Args:
        config: Settings of the run. `config.image_encoder` is a folder with the image encoder, and the statistics and
            the noise schedule of its embeddings.
        source: That folder.

    Attributes:
        identity: Fingerprint of the image encoder, and of the statistics and the noise of its embeddings.
        width: Width of the labels.

    Raises:
        SdkitError: The folder lacks a part, or the data are a latent cache.
    """

    def __init__(self, config: UNetConfig, source: str | os.PathLike[str]) -> None:
        if is_cache(config.data):
            raise DataError(
                f"{os.fspath(config.data)!r} is a latent cache, and image_encoder embeds images; give those it was "
                "made of."
            )
        self.config, self.folder = config, UnCLIPFolder(source)
        self.encoder, self.noise = ImageEncoder(self.folder.network("image_encoder")), self.folder.noise()
        self.width = 2 * self.noise.width
        if self.encoder.width != self.noise.width:
            raise ArgumentError(
                f"image_encoder {os.fspath(source)!r} makes embeddings of width {self.encoder.width}, and its "
                f"statistics are of width {self.noise.width}: they belong to different models."
            )
        digest = hashlib.sha256(identity_of(self.encoder.network).encode())
        for values in (self.noise.mean, self.noise.std, self.noise.schedule.alphas_cumprod):
            digest.update(values.numpy().tobytes())
        self.identity = digest.hexdigest()[:16]

    def add_to(self, network: Any) -> None:
        """Give a U-Net an input for the labels, unless it has one. It begins at zero, so that the U-Net is unchanged.

        Raises:
            ArgumentError: The U-Net takes labels of another kind.
        """
        settings = network.config
        if not hasattr(settings, "cross_attention_dim"):
            raise ArgumentError(
                "image_encoder needs a U-Net that attends to text, a UNet2DConditionModel; give one, or leave it out."
            )
        kind, width = settings.class_embed_type, settings.projection_class_embeddings_input_dim
        if kind == "projection" and width == self.width:
            return
        if kind is not None or settings.num_class_embeds is not None:
            raise ArgumentError(
                f"this U-Net takes labels of kind {kind or 'classes'} and width {width}, not embeddings and noise "
                f"levels of width {self.width}; give the image_encoder that it was made for, or a plain U-Net."
            )
        from diffusers.models.embeddings import TimestepEmbedding

        wide = network.time_embedding.linear_2.out_features
        network.class_embedding = TimestepEmbedding(self.width, wide)
        for p in network.class_embedding.linear_2.parameters():
            torch.nn.init.zeros_(p)
        network.register_to_config(class_embed_type="projection", projection_class_embeddings_input_dim=self.width)

    def drawn(self, samples: Samples) -> dict[str, Tensor]:
        """Return the noise level (B,) and the noise (B, D) of samples (n, item), and `kept` (B,), 0 where the embedding
        is dropped. All depend only on n and the seed."""
        levels, eps, kept = [], [], []
        for n, _ in samples:
            generator = draw(self.config.seed, n, LABEL)
            kept.append(float(torch.rand((), generator=generator)) >= self.config.embedding_dropout)
            levels.append(int(torch.randint(self.noise.schedule.num_timesteps, (), generator=generator)))
            eps.append(torch.randn(self.noise.width, generator=generator))
        return {
            "label_level": torch.tensor(levels), "label_eps": torch.stack(eps), "label_kept": torch.tensor(kept).float()
        }  # fmt: skip

    def added(self, batch: dict[str, Any], samples: Samples) -> dict[str, Any]:
        """Return a training batch with what `drawn` returns."""
        return batch | self.drawn(samples)

    def held_out(self, batch: dict[str, Any], i: int) -> dict[str, Any]:
        """Return a batch of held-out image i with the same: at noise level 0, and never dropped."""
        n, eps = len(batch["posterior_eps"]), torch.randn(self.noise.width, generator=noise_of(0, i))
        return batch | {
            "label_level": torch.zeros(n, dtype=torch.int64),
            "label_eps": eps.expand(n, -1),
            "label_kept": torch.ones(n),
        }

    @torch.no_grad()
    def label(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the labels (B, 2D) of a batch with `pixels`, and what `drawn` returns."""
        pixels = batch["pixels"]
        side = self.encoder.side
        resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        embeddings = self.encoder.to(pixels.device)(resized)
        label = self.noise.label(embeddings, batch["label_level"], batch["label_eps"])
        kept: Tensor = batch["label_kept"].to(label)
        return label * kept[:, None]

    def export(self, folder: Path) -> None:
        """Copy the parts beside Stable Diffusion's into a folder, and name them in its model_index.json."""
        self.folder.copy(COPIED, folder)
