"""Images of a data set for the stages: training and held-out examples, and their pixels."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

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

MOST_HELD_OUT, OF = 16, 20  # one image of 20, and not more than 16
TRIES = 100  # images that cannot be used, one after another


def split(n: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Return the indices of the training images and of the validation images, of n images in all.

    Validation images are spread evenly and held out. With fewer than 20 images none is held out: validation images
    are trained on as well.
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
    """Return a fingerprint of the weights and the noise schedule."""
    parts = [weights_fingerprint(network) for network in networks]
    return hashlib.sha256(json.dumps([parts, schedule], sort_keys=True).encode()).hexdigest()[:16]


def training_transform(size: tuple[int, int], augment: Collection[str]) -> Transform:
    """The transform of the training images: `augment` may name "crop" (a random one) and "flip"."""
    return Transform(size=size, crop="random" if "crop" in augment else "center", flip="flip" in augment)


class TrainingImages:
    """The images of a data set as pixels. One that cannot be used is replaced by the next, and remembered."""

    def __init__(self, examples: Examples, transform: Transform, seed: int) -> None:
        self.examples, self.transform, self.seed = examples, transform, seed
        self.skipped: dict[str, str] = {}  # by name, why

    def load(self, indices: Sequence[int] | npt.NDArray[np.int64], i: int, augmentation: int) -> tuple[Tensor, Example]:
        """Pixels (3, H, W) and example of indices[i], or of the first one after it that can be used."""
        tried: dict[int, str] = {}
        for j in range(min(TRIES, len(indices))):
            index = int(indices[(i + j) % len(indices)])
            example = self.examples[index]
            try:
                return self.transform(example.load(), draw(self.seed, index, augmentation)), example
            except ImageError as error:
                tried[index] = f"{example.name}: {str(error).rstrip('.')}"
                self._skip(example.name, str(error))
        raise DataError(
            f"{len(tried)} images in a row in {self.examples.source} cannot be used, the first: "
            f"{tried[int(indices[i])]}; look at the data with sdkit data check."
        )

    def load_held_out(self, held_out: Sequence[int], i: int) -> tuple[Tensor, Example]:
        """Pixels and example of held_out[i], or of the next one of them that can be used; of any image where none of
        them can."""
        return self.load(np.concatenate([held_out[i:], held_out[:i], np.arange(len(self.examples))]), 0, 0)

    def _skip(self, name: str, reason: str) -> None:
        if self.skipped.setdefault(name, reason) is reason:  # several threads may find it at once
            warnings.warn(f"{name} is skipped: {reason}", stacklevel=3)


def report_skipped(skipped: dict[str, str], path: Path) -> None:
    """Write to `path` which images were skipped by any process and why, also in earlier parts of the run. To be called
    on every process."""
    everywhere = dict(gather_object(list(skipped.items())))
    if everywhere and PartialState().is_main_process:
        before: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
            before = {name: why for name, why in read_object(path).items() if isinstance(why, str)}
        everywhere = {encodable(name): encodable(why) for name, why in everywhere.items()}
        if before | everywhere != before:
            with atomic_write(path) as temporary:
                text = json.dumps(before | everywhere, indent=1, ensure_ascii=False) + "\n"
                temporary.write_text(text, encoding="utf-8")
