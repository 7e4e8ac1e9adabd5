"""Examples for a ControlNet: images with captions, and a condition for each, cropped and mirrored like its image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdkit.data.captioned_files import NAME
from sdkit.data.example import Example
from sdkit.data.examples import Examples
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform, draw
from sdkit.errors import ArgumentError, DataError, ImageError
from sdkit.images import to_pil, to_tensors
from sdkit.images.conditions import CONDITIONS
from sdkit.messages import clean
from sdkit.networks.autoencoder import Autoencoder
from sdkit.networks.text_encoder import TextEncoder
from sdkit.training.stages.examples import ImageLatents, Row
from sdkit.training.stages.images import TrainingImages, is_cache, training_transform

PROPORTIONS = 0.02
"""Largest relative difference between the aspect ratios of an image and of its condition."""


class TrainingPairs(TrainingImages):
    """Images and their conditions as pixels (6, H, W): the image's three channels, then the condition's.

    Args:
        examples: The images.
        transform: Applied to the image and to its condition, with the same crop and the same flip.
        seed: Seed of the augmentations.
        conditions: The condition of each example; or a function that makes it of the image, after the crop.
    """

    def __init__(
        self,
        examples: Examples,
        transform: Transform,
        seed: int,
        conditions: Sequence[Example] | Callable[[Image.Image], Image.Image],
    ) -> None:
        super().__init__(examples, transform, seed)
        self.conditions = conditions

    def pixels(self, example: Example, index: int, augmentation: int) -> Tensor:
        """Return an image and its condition as pixels (6, H, W) in [-1, 1]."""
        image = example.load()
        pixels = self.transform(image, draw(self.seed, index, augmentation))
        if not isinstance(self.conditions, Sequence):
            (made,) = to_tensors(self.conditions(to_pil(pixels)[0]))
            return torch.cat([pixels, made])
        condition = self.conditions[index].load()
        if abs(image.width * condition.height / (image.height * condition.width) - 1) > PROPORTIONS:
            raise ImageError(
                f"its condition has {condition.width} x {condition.height} pixels, the image {image.width} x "
                f"{image.height}: they must have the same proportions."
            )
        if condition.size != image.size:
            condition = condition.resize(image.size, Image.Resampling.LANCZOS)
        return torch.cat([pixels, self.transform(condition, draw(self.seed, index, augmentation))])


class ControlExamples(ImageLatents):
    """Examples with a `condition` (3, H, W) in [0, 1] each. For the attributes see `DenoisingExamples`.

    Args:
        examples: Images with captions.
        conditions: As in `TrainingPairs`.
        condition_identity: Fingerprint of the conditions.
        transform: The transform of training images.
        vae: The VAE of the run.
        text: The text encoder of the run.
        seed: Random seed of the augmentations.
    """

    def __init__(
        self,
        examples: Examples,
        conditions: Sequence[Example] | Callable[[Image.Image], Image.Image],
        condition_identity: str,
        transform: Transform,
        vae: Autoencoder,
        text: TextEncoder,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(examples, transform, vae, text, seed=seed)
        self.images = TrainingPairs(examples, transform, seed, conditions)
        self.validation_images = TrainingPairs(examples, Transform(size=transform.size), 0, conditions)
        self.skipped = self.validation_images.skipped = self.images.skipped
        self.identity = hashlib.sha256(f"{self.identity} {condition_identity}".encode()).hexdigest()[:16]

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, or the next usable one, augmented for `epoch`."""
        return _divided(super().load(item, epoch))

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        return _divided(super().validation(i))


def _divided(row: Row) -> Row:
    image, condition = row["pixels"].split(3)
    return row | {"pixels": image, "condition": (condition + 1) / 2}


def open_control_examples(
    data: str | PathLike[str],
    vae: Autoencoder,
    text: TextEncoder,
    *,
    condition: str | None,
    conditioning_data: str | PathLike[str] | None,
    conditioning_image_column: str,
    size: int | tuple[int, int] | None,
    own_size: tuple[int, int],
    augment: Sequence[str],
    seed: int,
    **opened_with: Any,
) -> ControlExamples:
    """Open images with captions and their conditions.

    Args:
        data: Any source that `open_examples` takes.
        vae: The VAE of the run.
        text: The text encoder of the run.
        condition: Name in `CONDITIONS` of the function that makes the conditions; None reads them.
        conditioning_data: Images of the same names as those in `data`, except for their suffixes. None reads them from
            a column of `data`.
        conditioning_image_column: That column.
        size: Size of the images in pixels; None takes `own_size`.
        own_size: Height and width that the model was made for.
        augment: Augmentations, as in `training_transform`.
        seed: Random seed of the augmentations.
        **opened_with: Keyword arguments of `open_examples`.

    Raises:
        ArgumentError: The data are a latent cache, or have no columns and nothing else says where conditions are.
        DataError: The data cannot be opened, or an image has no condition.
    """
    if is_cache(data):
        raise ArgumentError("a latent cache holds no conditions; train a ControlNet on the images themselves.")
    height_width: Any = size or own_size
    vae.check_size(height_width)
    examples = open_examples(data, **opened_with)
    conditions: Sequence[Example] | Callable[[Image.Image], Image.Image]
    if condition is not None:
        conditions, identity = CONDITIONS[condition], condition
    elif conditioning_data is not None:
        beside = open_examples(conditioning_data, split=opened_with.get("split", "train"))
        conditions, identity = _of_same_names(examples, beside), beside.identity
    elif NAME in examples.dataset.column_names:  # files, which have no columns
        raise ArgumentError(
            f"{clean(os.fspath(data))} holds images without conditions: name the folder of the conditions "
            f"(conditioning_data), or let them be made (condition, one of {', '.join(CONDITIONS)})."
        )
    else:
        try:
            column = open_examples(data, **opened_with | {"image_column": conditioning_image_column})
        except DataError as error:
            raise DataError(f"conditioning_image_column: {str(error).removeprefix('image_column: ')}") from error
        conditions, identity = _Rows(column), column.identity
    transform = training_transform(height_width, augment)
    return ControlExamples(examples, conditions, identity, transform, vae, text, seed=seed)


class _Rows(Sequence[Example]):
    """The rows of a data set, some of them if `rows` names them, which are read when they are used."""

    def __init__(self, examples: Examples, rows: Sequence[int] | None = None) -> None:
        self.examples, self.rows = examples, range(len(examples)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.examples[self.rows[i]]


def _of_same_names(examples: Examples, conditions: Examples) -> Sequence[Example]:
    """Return the condition of each example, found by its name without suffix. Raise DataError if one is missing."""
    found: dict[str, int] = {}
    for i, name in enumerate(conditions.names):
        if found.setdefault(_stem(name), i) != i:
            raise DataError(
                f"{clean(conditions.source)} has two conditions called {clean(_stem(name))}; leave one of them."
            )
    names = [_stem(name) for name in examples.names]
    if missing := [name for name, stem in zip(examples.names, names, strict=True) if stem not in found]:
        raise DataError(
            f"{clean(conditions.source)} has no condition for {len(missing)} of {len(names)} images, such as "
            f"{clean(missing[0])}; give each image one of the same name."
        )
    return _Rows(conditions, [found[name] for name in names])


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 - the name of an example is no path
