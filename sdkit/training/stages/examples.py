"""What the U-Net learns from, example by example: posteriors and captions out of a latent cache, or images."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from sdkit.data.examples import open_examples, warn_of_captions
from sdkit.data.latent_cache import manifest
from sdkit.data.latent_cache.reading import Item, LatentCache, Prompt
from sdkit.data.transform import Transform
from sdkit.errors import ArgumentError
from sdkit.networks.autoencoder import VAE
from sdkit.networks.text_encoder import TextEncoder
from sdkit.processes import is_main_process
from sdkit.training.settings import UNetConfig
from sdkit.training.stages.images import TrainingImages, is_cache, split, training_transform

Example = dict[str, Tensor]
"""Its caption as `ids` (k, 77) and perhaps `embeddings` (77k, D); its image as raw `mean` and `logvar` (4, h, w), or as
`pixels` (3, H, W)."""


VERIFIED = 8 * 2**30
"""Bytes of a cache up to which training reads it all at first, and compares checksums; `sdkit cache` always does."""


class CachedLatents:
    """Out of a latent cache, which must have been made by the same networks."""

    def __init__(self, config: UNetConfig, vae: VAE, text: TextEncoder) -> None:
        self.cache = LatentCache(config.data)
        made = self.cache.manifest.settings
        # What the run does not ask for is as in the cache.
        size: Any = config.size or made.size
        transform = Transform(
            size=size,
            crop="random" if "crop" in config.augment else made.crop,
            flip="flip" in config.augment or made.flip,
        )
        self.cache.check_model(
            vae=vae.identity, scale=vae.scale, shift=vae.shift, factor=vae.factor,
            tokenizer=manifest.tokenizer_identity(text),
            text=None if config.train_text_encoder else manifest.text_identity(text), transform=transform,
        )  # fmt: skip
        self._embedded = made.embeddings and not config.train_text_encoder
        self.scale, self.shift = made.scale, made.shift
        self.shape = (made.size[0] // made.factor, made.size[1] // made.factor)
        train, held_out = split(self.cache.manifest.images)
        copies = made.augmentations
        self.train = (train[:, None] * copies + np.arange(copies)).ravel()
        self.held_out = [image * copies for image in held_out]
        self.empty = self._caption(self.cache.empty)
        self.identity = self.cache.manifest.identity
        if is_main_process() and sum(one.bytes for one in self.cache.manifest.files) <= VERIFIED:
            self.cache.verify()
        self.skipped = {one.name: one.reason for one in self.cache.manifest.skipped}

    def load(self, item: int, epoch: int) -> Example:  # noqa: ARG002 - augmentations are examples of their own
        """Example `item` of those to learn from."""
        return self._example(int(self.train[item]))

    def validation(self, i: int) -> Example:
        """Held-out example i."""
        return self._example(self.held_out[i])

    def name(self, item: int) -> str:
        """What to call example `item`."""
        return self.cache[int(self.train[item])]["name"]

    def _example(self, index: int) -> Example:
        item = self.cache[index]
        return {"mean": item["mean"], "logvar": item["logvar"], **self._caption(item)}

    def _caption(self, of: Item | Prompt) -> Example:
        embeddings = of["embeddings"] if self._embedded else None
        return {"ids": of["ids"]} | ({} if embeddings is None else {"embeddings": embeddings})


class ImageLatents:
    """Straight from images: the VAE has to encode them at each step, but each epoch has crops and flips of its own."""

    def __init__(self, config: UNetConfig, vae: VAE, text: TextEncoder, own_size: tuple[int, int]) -> None:
        size: Any = config.size or own_size
        vae.check_size(size)
        examples = open_examples(config.data, **config.opened_with())
        warn_of_captions(examples)
        self.images = TrainingImages(examples, training_transform(size, config.augment), config.seed)
        self.identity = self.images.examples.identity
        self.validation_images = TrainingImages(self.images.examples, Transform(size=size), seed=0)
        self.scale, self.shift = vae.scale, vae.shift
        self.shape = (size[0] // vae.factor, size[1] // vae.factor)
        self.train, self.held_out = split(len(self.images.examples))
        self._text = text
        self.empty = {"ids": self._ids("")}
        self.skipped = self.images.skipped = self.validation_images.skipped

    def load(self, item: int, epoch: int) -> Example:
        """Example `item` of those to learn from, or the next one that can be used, as epoch `epoch` sees it."""
        pixels, example = self.images.load(self.train, item, epoch)
        return {"pixels": pixels, "ids": self._ids(example.caption)}

    def validation(self, i: int) -> Example:
        """Held-out example i."""
        pixels, example = self.validation_images.load_held_out(self.held_out, i)
        return {"pixels": pixels, "ids": self._ids(example.caption)}

    def name(self, item: int) -> str:
        """What to call example `item`."""
        return self.images.examples[int(self.train[item])].name

    def _ids(self, caption: str) -> Tensor:
        ids: Tensor = self._text.tokenize(caption)[0][0]
        return ids


def open_latents(
    config: UNetConfig, vae: VAE, text: TextEncoder, own_size: tuple[int, int]
) -> CachedLatents | ImageLatents:
    """What `config.data` is: a folder with a cache's manifest, or else images, by default of the model's `own_size`."""
    if is_cache(config.data):
        defaults = {field.name: field.default for field in fields(config)}
        if given := [name for name, value in config.opened_with().items() if value != defaults[name]]:
            raise ArgumentError(f"{given[0]}= has no meaning for a latent cache; give it to sdkit cache instead.")
        return CachedLatents(config, vae, text)
    return ImageLatents(config, vae, text, own_size)
