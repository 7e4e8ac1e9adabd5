"""Training and held-out images of a data set, as the stages read them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from sdkit.atomic import atomic_write
from sdkit.data.example import Example
from sdkit.data.examples import Examples
from sdkit.data.latent_cache import manifest
from sdkit.data.latent_cache.shard_file import shard_file
from sdkit.data.transform import Transform, draw
from sdkit.errors import DataError, ImageError
from sdkit.files import encodable, expanded
from sdkit.loading.fingerprint import weights_fingerprint
from sdkit.strict_json import read_object

T = TypeVar("T")

MOST_HELD_OUT, OF = 16, 20  # one image in 20 is held out, but at most 16 in all
TRIES = 100  # unusable images in a row before the run ends with an error


def split(n: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Split n images into training and validation images.

    Validation images are spread evenly, and held out. With fewer than 20 images none is held out: the validation images
    are trained on, too.

    Returns:
        Indices of the training images, and indices of the validation images.
    """
    count = min(MOST_HELD_OUT, n // OF) or min(MOST_HELD_OUT, n)
    validation = [(2 * i + 1) * n // (2 * count) for i in range(count)]
    everything = np.arange(n)
    return (everything if n < OF else np.setdiff1d(everything, validation)), validation


def is_cache(data: str | os.PathLike[str]) -> bool:
    """Return whether `data` is a folder with a latent cache, complete or not."""
    folder = expanded(data)
    try:
        return read_object(folder / manifest.MANIFEST_FILE, manifest.LARGEST).get("format") == manifest.FORMAT
    except (OSError, ValueError):
        return os.path.isfile(folder / shard_file(0))  # noqa: PTH113 - pathlib's raises for overlong names


def identity_of(*networks: nn.Module, schedule: Any = None) -> str:
    """Return a fingerprint of the networks' weights and of the noise schedule's config."""
    parts = [weights_fingerprint(network) for network in networks]
    return hashlib.sha256(json.dumps([parts, schedule], sort_keys=True).encode()).hexdigest()[:16]


def training_transform(size: tuple[int, int], augment: Collection[str]) -> Transform:
    """Return the transform of training images. `augment` may name "crop" (at random places) and "flip"."""
    return Transform(size=size, crop="random" if "crop" in augment else "center", flip="flip" in augment)


class TrainingImages:
    """The images of a data set as pixels. An unusable image is replaced by the next one, and recorded.

    Attributes:
        examples: The data set.
        transform: Applied to each image.
        seed: Seed of the augmentations.
        skipped: Name of each unusable image -> the reason.
    """

    def __init__(self, examples: Examples, transform: Transform, seed: int) -> None:
        self.examples, self.transform, self.seed = examples, transform, seed
        self.skipped: dict[str, str] = {}

    def load(self, indices: Sequence[int] | npt.NDArray[np.int64], i: int, augmentation: int) -> tuple[Tensor, Example]:
        """Load the image indices[i], or the first usable one after it.

        Args:
            indices: Indices of examples.
            i: Position in `indices`.
            augmentation: Number of the augmentation of this image; in training, the epoch.

        Returns:
            Pixels (3, H, W) in [-1, 1], and the example.

        Raises:
            DataError: 100 images in a row, or all, are unusable.
        """

        def load(index: int) -> tuple[Tensor, Example]:
            example = self.examples[index]
            return self.pixels(example, index, augmentation), example

        return first_usable(
            indices, i, load, name=lambda index: self.examples[index].name, skipped=self.skipped,
            source=self.examples.source,
        )  # fmt: skip

    def pixels(self, example: Example, index: int, augmentation: int) -> Tensor:
        """Return the pixels of one example. Raise ImageError if it is unusable."""
        return self.transform(example.load(), draw(self.seed, index, augmentation))

    def load_held_out(self, held_out: Sequence[int], i: int) -> tuple[Tensor, Example]:
        """Load held_out[i], or the next usable held-out image; if there is none, the first usable image of the data."""
        return self.load(np.concatenate([held_out[i:], held_out[:i], np.arange(len(self.examples))]), 0, 0)


def first_usable(
    indices: Sequence[int] | npt.NDArray[np.int64],
    i: int,
    load: Callable[[int], T],
    *,
    name: Callable[[int], str],
    skipped: dict[str, str],
    source: str,
) -> T:
    """Load the example indices[i], or the first usable one after it. Unusable images are recorded.

    Args:
        indices: Indices of examples.
        i: Position in `indices`.
        load: Loads the example of an index, and raises ImageError if its image is unusable.
        name: Returns the name of an index.
        skipped: Name of each unusable image -> the reason; those found are added.
        source: Name of the data, for messages.

    Returns:
        What `load` returned.

    Raises:
        DataError: 100 images in a row, or all, are unusable.
    """
    tried: dict[int, str] = {}
    for j in range(min(TRIES, len(indices))):
        index = int(indices[(i + j) % len(indices)])
        try:
            return load(index)
        except ImageError as error:
            reason = str(error)
            tried[index] = f"{name(index)}: {reason.rstrip('.')}"
            if skipped.setdefault(name(index), reason) is reason:  # of several threads, only one warns
                warnings.warn(f"{name(index)} is skipped: {reason}", stacklevel=3)
    raise DataError(
        f"{len(tried)} images in a row in {source} cannot be used, the first: {tried[int(indices[i])]}; look at the "
        "data with sdkit data check."
    )


def report_skipped(skipped: dict[str, str], path: Path) -> None:
    """Add the images that any process has skipped, and the reasons, to the JSON file `path`.

    Entries of the run before it was resumed are kept. Call this on every process.
    """
    everywhere = dict(gather_object(list(skipped.items())))
    if everywhere and PartialState().is_main_process:
        before: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):  # the file is missing or damaged
            before = {name: why for name, why in read_object(path).items() if isinstance(why, str)}
        everywhere = {encodable(name): encodable(why) for name, why in everywhere.items()}
        if before | everywhere != before:
            with atomic_write(path) as temporary:
                text = json.dumps(before | everywhere, indent=1, ensure_ascii=False) + "\n"
                temporary.write_text(text, encoding="utf-8")
