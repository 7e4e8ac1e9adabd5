"""Examples for a classifier: images, or posteriors from a latent cache, each with the number of its class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sdkit.data.examples import Examples
from sdkit.data.labels import Labels, folder_labels, labels_by_name, read_labels
from sdkit.data.latent_cache.reading import LatentCache
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform
from sdkit.errors import ArgumentError
from sdkit.networks.autoencoder import Autoencoder
from sdkit.training.settings import ClassifierConfig
from sdkit.training.stages.examples import (
    Row,
    check_opened_with_nothing,
    split_cache,
    verify_if_small,
    wanted_of_cache,
)
from sdkit.training.stages.images import TrainingImages, is_cache, split, training_transform

Numbering = Callable[[Labels], Labels]
"""Gives the classes of the data the numbers of a model."""


class LabelledExamples(Protocol):
    """Interface of the providers of labelled examples.

    Attributes:
        labels: The classes, and the class of each example.
        scale: Scale of the latents.
        shift: Shift of the latents.
        shape: Height and width of the latents.
        train: Indices of the training examples.
        held_out: Indices of the held-out examples.
        identity: Fingerprint of the data and the classes.
        skipped: Name of each unusable image found so far -> the reason.
    """

    labels: Labels
    scale: float
    shift: float
    shape: tuple[int, int]
    train: npt.NDArray[np.int64]
    held_out: list[int]
    identity: str
    skipped: dict[str, str]

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, augmented for `epoch`: the image as in `Row`, and `label`, a scalar."""

    def validation(self, i: int) -> Row:
        """Return held-out example i."""

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""


class LabelledImages:
    """Labelled examples from images. For the attributes see `LabelledExamples`.

    Args:
        examples: The images.
        labels: Their classes.
        transform: The transform of training images.
        vae: The VAE of the run.
        seed: Random seed of the augmentations.
    """

    def __init__(
        self, examples: Examples, labels: Labels, transform: Transform, vae: Autoencoder, *, seed: int = 0
    ) -> None:
        self.images = TrainingImages(examples, transform, seed)
        self.validation_images = TrainingImages(examples, Transform(size=transform.size), seed=0)
        self.skipped = self.validation_images.skipped = self.images.skipped
        self.labels, self.scale, self.shift = labels, vae.scale, vae.shift
        self.shape = (transform.size[0] // vae.factor, transform.size[1] // vae.factor)
        self.train, self.held_out = split(len(examples))
        self.identity = _identity(examples.identity, labels)
        self._number = dict(zip(examples.names, labels.numbers, strict=True))

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, or the next usable one, augmented for `epoch`."""
        pixels, example = self.images.load(self.train, item, epoch)
        return {"pixels": pixels, "label": torch.tensor(self._number[example.name])}

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        pixels, example = self.validation_images.load_held_out(self.held_out, i)
        return {"pixels": pixels, "label": torch.tensor(self._number[example.name])}

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""
        return self.images.examples[int(self.train[item])].name


class LabelledLatents:
    """Labelled examples from a latent cache. For the attributes see `LabelledExamples`.

    Args:
        cache: The cache.
        labels: The class of each image of the cache.
    """

    def __init__(self, cache: LatentCache, labels: Labels) -> None:
        made = cache.manifest.settings
        self.cache, self.labels = cache, labels
        self.scale, self.shift = made.scale, made.shift
        self.shape = (made.size[0] // made.factor, made.size[1] // made.factor)
        self.train, self.held_out = split_cache(cache)
        self.identity = _identity(cache.manifest.identity, labels)
        self.skipped = {image.name: image.reason for image in cache.manifest.skipped}
        self._copies = made.augmentations

    def load(self, item: int, epoch: int) -> Row:  # noqa: ARG002 - a cache's augmentations are examples of their own
        """Return training example `item`."""
        return self._example(int(self.train[item]))

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        return self._example(self.held_out[i])

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""
        return self.cache.name(int(self.train[item]))

    def _example(self, index: int) -> Row:
        item, label = self.cache[index], self.labels.numbers[index // self._copies]
        return {"mean": item["mean"], "logvar": item["logvar"], "label": torch.tensor(label)}


def open_labelled(
    config: ClassifierConfig, vae: Autoencoder, own_size: Callable[[], tuple[int, int]], numbering: Numbering
) -> LabelledExamples:
    """Open the data of a run: a latent cache, or images.

    Args:
        config: Settings of the run.
        vae: The VAE of the run.
        own_size: Returns the height and width that the model was made for, the default size of images.
        numbering: Gives the classes their numbers.

    Raises:
        SdkitError: The data cannot be opened, have no classes, or do not fit the settings or the VAE.
    """
    if is_cache(config.data):
        return _cached(config, vae, numbering)
    if config.label_data is not None:
        raise ArgumentError("label_data names the classes of a latent cache, and data holds images; leave it out.")
    size: Any = config.size or own_size()
    vae.check_size(size)
    given = config.opened_with()
    examples = open_examples(config.data, **given)
    labels = numbering(read_labels(examples, config.data, column=config.label_column, **given))
    return LabelledImages(examples, labels, training_transform(size, config.augment), vae, seed=config.seed)


def _cached(config: ClassifierConfig, vae: Autoencoder, numbering: Numbering) -> LabelledLatents:
    """Open a latent cache, which does not hold classes: these are names of folders, or read from `label_data`."""
    check_opened_with_nothing(config.opened_with())
    cache = LatentCache(config.data)
    made = cache.manifest.settings
    transform = wanted_of_cache(cache, config.size, config.augment)
    cache.check_model(vae=vae.identity, scale=vae.scale, shift=vae.shift, factor=vae.factor, transform=transform)
    verify_if_small(cache)
    names = [cache.name(i) for i in range(0, len(cache), made.augmentations)]
    if config.label_data is None:
        if config.label_column is not None:
            raise ArgumentError(
                "a latent cache holds no columns: name the images that it was made of as label_data, too."
            )
        return LabelledLatents(cache, numbering(folder_labels(names, str(cache.path))))
    examples = open_examples(config.label_data)
    labels = read_labels(examples, config.label_data, column=config.label_column)
    found = labels_by_name(names, labels, examples.names, str(config.label_data))
    return LabelledLatents(cache, numbering(found))


def _identity(data: str, labels: Labels) -> str:
    """Return the fingerprint of data with classes, given that of the data."""
    return hashlib.sha256(f"{data} {labels.identity}".encode()).hexdigest()[:16]
