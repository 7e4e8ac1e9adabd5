"""Resizing and cropping of images to the size that a network trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdkit.arguments import LONGEST_SIDE, one_of, whole_number
from sdkit.errors import ArgumentError, ImageError
from sdkit.images import to_tensors

CROPS = ("center", "random")
MAX_ENLARGEMENT = 8
"""Largest factor by which an image may be enlarged; a smaller image is skipped."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Resizes an image to just cover the crop (Lanczos, antialiased, aspect ratio kept), crops it, and may mirror it.

    Attributes:
        size: (height, width) of the crop in pixels; one number means a square.
        crop: "center", or "random": anywhere, with equal probability.
        flip: Mirror left and right with probability 1/2.
    """

    size: tuple[int, int]
    crop: str = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sides(self.size))
        one_of("crop", self.crop, CROPS)

    @property
    def random(self) -> bool:
        """Whether the result depends on the generator."""
        return self.crop == "random" or self.flip

    def enlargement(self, width: int, height: int) -> float:
        """Return the factor by which an image of this size is resized; above 1 it is enlarged."""
        return max(self.size[0] / height, self.size[1] / width)

    def too_small(self, width: int, height: int) -> bool:
        """Return whether an image of this size would be enlarged more than `MAX_ENLARGEMENT` times."""
        return self.enlargement(width, height) > MAX_ENLARGEMENT

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Transform an image.

        Args:
            image: An RGB image.
            generator: Three numbers are drawn from it, whatever the settings: top, left, and flip.

        Returns:
            Pixels (3, height, width), float32 in [-1, 1].

        Raises:
            ImageError: The image is too small.
        """
        (height, width), factor = self.size, self.enlargement(*image.size)
        if self.too_small(*image.size):
            raise ImageError(
                f"{image.width} x {image.height} pixels are too few for a crop of {width} x {height}: they would be "
                f"enlarged more than {MAX_ENLARGEMENT} times."
            )
        resized_size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        resized = image if image.size == resized_size else image.resize(resized_size, Image.Resampling.LANCZOS)
        down, right, side = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        room_below, room_beside = resized.height - height, resized.width - width
        if self.crop == "center":
            top, left = room_below // 2, room_beside // 2
        else:
            top, left = int(down * (room_below + 1)), int(right * (room_beside + 1))
        cropped = resized.crop((left, top, left + width, top + height))
        if self.flip and side < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensors(cropped)[0]


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or as two. Raises ArgumentError for other values."""
    pair: Any = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(pair) != 2:
        raise ArgumentError(f"size must be one number of pixels, or (height, width), not {size!r}.")
    height, width = (whole_number("size", side, 8, LONGEST_SIDE) for side in pair)
    return height, width


def draw(seed: int, index: int, augmentation: int) -> torch.Generator:
    """Return the random generator for one augmentation of one image.

    It is seeded from the arguments alone. An image is therefore cropped and mirrored in the same way by the cache and
    by training on image files, and for any number of processes.

    Args:
        seed: Seed of the cache or run.
        index: Index of the image in its data set.
        augmentation: Number of the augmentation.
    """
    state = np.random.SeedSequence([seed, index, augmentation]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
