"""Examples for a ControlNet: images with captions, and a condition for each, cropped and mirrored like its image."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdkit.data.captioned_files import NAME
from sdkit.data.example import Example
from sdkit.data.examples import Examples
from sdkit.data.pairs import Conditions, Rows, of_same_names, open_conditions, shaped_like
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform, draw
from sdkit.errors import ArgumentError, DataError
from sdkit.images.conditions import CONDITIONS
from sdkit.messages import clean
from sdkit.networks.autoencoder import Autoencoder
from sdkit.networks.text_encoder import TextEncoder
from sdkit.training.settings import ControlNetConfig
from sdkit.training.stages.examples import CachedLatents, ImageLatents, Row, check_opened_with_nothing
from sdkit.training.stages.images import TrainingImages, first_usable, is_cache, training_transform


class TrainingPairs(TrainingImages):
    """Images and their conditions as pixels (6, H, W): the image's three channels, then the condition's.

    Args:
        examples: The images.
        transform: Applied to the image and to its condition, with the same crop and the same flip.
        seed: Seed of the augmentations.
        conditions: Their conditions.
    """

    def __init__(self, examples: Examples, transform: Transform, seed: int, conditions: Conditions) -> None:
        super().__init__(examples, transform, seed)
        self.conditions = conditions

    def pixels(self, example: Example, index: int, augmentation: int) -> Tensor:
        """Return an image and its condition as pixels (6, H, W) in [-1, 1]."""
        image = example.load()
        pixels = self.transform(image, draw(self.seed, index, augmentation))
        if self.conditions.images is None:
            return torch.cat([pixels, self.conditions.of(pixels)])
        condition = shaped_like(image.size, self.conditions.images[index].load())
        cropped = self.transform(condition, draw(self.seed, index, augmentation))
        return torch.cat([pixels, self.conditions.of(cropped)])


class PairedExamples(ImageLatents):
    """Examples with a condition each. For the attributes see `DenoisingExamples`.

    Args:
        examples: Images with captions.
        conditions: Their conditions.
        tensors: Returns the tensors by which a row tells its condition, given that as pixels (3, H, W) in [-1, 1].
        transform: The transform of training images.
        vae: The VAE of the run.
        text: The text encoder of the run.
        seed: Random seed of the augmentations.
    """

    def __init__(
        self,
        examples: Examples,
        conditions: Conditions,
        tensors: Callable[[Tensor], Row],
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
        self.identity = conditions.added_to(self.identity)
        self._tensors = tensors

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, or the next usable one, augmented for `epoch`."""
        return self._divided(super().load(item, epoch))

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        return self._divided(super().validation(i))

    def _divided(self, row: Row) -> Row:
        image, condition = row["pixels"].split(3)
        return row | {"pixels": image} | self._tensors(condition)


class CachedControlExamples(CachedLatents):
    """Examples from a latent cache, with a `condition` (3, H, W) in [0, 1] each, which is read and cropped anew like
    the cached image. For the attributes see `DenoisingExamples`.

    Args:
        data: The cache.
        conditioning_data: The conditions, or images that they are made of: of the same names as those in the cache,
            except for their suffixes; or a column of the data set that the cache was made of.
        column: That column, or one of another data set.
        make: Name in `CONDITIONS` of the function that makes conditions; None takes the images as they are.
        vae: The VAE of the run.
        text: The text encoder of the run.
        size: As in `CachedLatents`.
        augment: As in `CachedLatents`.

    Raises:
        SdkitError: The cache does not fit the networks or the settings, or an image has no condition.
    """

    def __init__(
        self,
        data: str | PathLike[str],
        conditioning_data: str | PathLike[str],
        column: str,
        make: str | None,
        vae: Autoencoder,
        text: TextEncoder,
        *,
        size: int | tuple[int, int] | None,
        augment: Sequence[str],
    ) -> None:
        super().__init__(data, vae, text, size=size, augment=augment)
        made = self.cache.manifest.settings
        first = range(0, len(self.cache), made.augmentations)
        names, rows = [self.cache.name(i) for i in first], [self.cache.index(i) for i in first]
        self._transform, self._seed = Transform(size=made.size, crop=made.crop, flip=made.flip), made.seed
        self._conditions = _made_of(_beside(conditioning_data, column, names, rows), make)
        self.identity = self._conditions.added_to(self.identity)

    def load(self, item: int, epoch: int) -> Row:  # noqa: ARG002 - as in `CachedLatents`
        """Return training example `item`, or the next one whose condition is usable."""
        return self._first_usable(self.train, item)

    def validation(self, i: int) -> Row:
        """Return held-out example i, or another one whose condition is usable."""
        return self._first_usable([*self.held_out[i:], *self.held_out[:i], *range(len(self.cache))], 0)

    def _first_usable(self, indices: Sequence[int] | npt.NDArray[np.int64], i: int) -> Row:
        return first_usable(
            indices, i, self._with_condition, name=self.cache.name, skipped=self.skipped, source=str(self.cache.path)
        )

    def _with_condition(self, index: int) -> Row:
        """Return an item of the cache with its condition. Raise ImageError if that is unusable."""
        item, images = self.cache[index], self._conditions.images
        assert images is not None  # a cache holds no images of which conditions could be made
        image = images[index // self.cache.manifest.settings.augmentations].load()
        if item["size"] is not None:
            height, width = item["size"]
            image = shaped_like((width, height), image)
        pixels = self._transform(image, draw(self._seed, item["index"], item["augmentation"]))
        return self._example(index) | control_tensors(self._conditions.of(pixels))


def control_tensors(pixels: Tensor) -> Row:
    """Return `condition` (3, H, W) in [0, 1], as a ControlNet reads it, of pixels in [-1, 1]."""
    return {"condition": (pixels + 1) / 2}


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
) -> PairedExamples | CachedControlExamples:
    """Open images with captions, or a latent cache of them, and their conditions.

    Args:
        data: A latent cache, or any source that `open_examples` takes.
        vae: The VAE of the run.
        text: The text encoder of the run.
        condition: Name in `CONDITIONS` of the function that makes the conditions, of the images in `conditioning_data`
            if that is given; None reads them.
        conditioning_data: Images of the same names as those in `data`, except for their suffixes. None reads them from
            a column of `data`.
        conditioning_image_column: That column. For a latent cache, a column of `conditioning_data`.
        size: Size of the images in pixels; None takes that of the cache, or `own_size`.
        own_size: Height and width that the model was made for.
        augment: Augmentations, as in `training_transform`.
        seed: Random seed of the augmentations of images.
        **opened_with: Keyword arguments of `open_examples`. A latent cache takes none but defaults.

    Raises:
        ArgumentError: Nothing says where conditions are, or an argument has no meaning for a latent cache.
        DataError: The data cannot be opened, or an image has no condition.
    """
    if is_cache(data):
        if conditioning_data is None:
            raise ArgumentError(
                "a latent cache holds no images, which a ControlNet reads as conditions: name them as "
                "conditioning_data, or those that they are made of (with condition, one of "
                f"{', '.join(CONDITIONS)}); of a table, also the column, as conditioning_image_column."
            )
        check_opened_with_nothing(opened_with)
        return CachedControlExamples(
            data, conditioning_data, conditioning_image_column, condition, vae, text, size=size, augment=augment
        )
    height_width: Any = size or own_size
    vae.check_size(height_width)
    examples = open_examples(data, **opened_with)
    if conditioning_data is None and condition is not None:
        conditions = Conditions(identity=condition, images=None, make=CONDITIONS[condition])
    elif conditioning_data is None and NAME in examples.dataset.column_names:  # files, which have no columns
        raise ArgumentError(
            f"{clean(os.fspath(data))} holds images without conditions: name the folder of the conditions "
            f"(conditioning_data), or let them be made (condition, one of {', '.join(CONDITIONS)})."
        )
    elif conditioning_data is None:
        conditions = open_conditions(
            examples, data, column=conditioning_image_column, conditioning_data=None,
            option="conditioning_image_column", **opened_with,
        )  # fmt: skip
    else:
        split, names = opened_with.get("split", "train"), examples.names
        found = _beside(conditioning_data, conditioning_image_column, names, range(len(names)), split)
        conditions = _made_of(found, condition)
    return PairedExamples(
        examples, conditions, control_tensors, training_transform(height_width, augment), vae, text, seed=seed
    )


def _beside(
    data: str | PathLike[str], column: str, names: Sequence[str], rows: Sequence[int], split: str = "train"
) -> Conditions:
    """Return the images beside others.

    Args:
        data: The data set of the images.
        column: The column of the images in it, if it is a table. A table without a column of the default name may have
            another one.
        names: Names of the others.
        rows: Rows of the others in their own data set.
        split: As in `open_examples`.
    """
    default = column == ControlNetConfig.conditioning_image_column
    plain = open_examples(data, split=split)
    if NAME in plain.dataset.column_names:
        if not default:
            raise ArgumentError(
                f"conditioning_image_column: {clean(os.fspath(data))} holds files, which have no columns; leave it out."
            )
        return Conditions(identity=plain.identity, images=of_same_names(names, plain))
    try:
        found = open_examples(data, split=split, image_column=column)
    except DataError as error:
        if not default:
            raise DataError(f"conditioning_image_column: {str(error).removeprefix('image_column: ')}") from error
        found = plain
    held = plain.names
    same = max(rows, default=0) < len(held) and [held[row] for row in rows] == [*names]
    return Conditions(identity=found.identity, images=Rows(found, rows) if same else of_same_names(names, found))


def _made_of(images: Conditions, make: str | None) -> Conditions:
    """Return the conditions that a function of `CONDITIONS` makes of images; None takes these as they are."""
    if make is None:
        return images
    return replace(images, identity=f"{make} of {images.identity}", make=CONDITIONS[make])
