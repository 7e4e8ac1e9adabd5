"""Twelve emoji in four styles, from tests/embedded, and which of them an image shows.

What stands on the image's background is cut out and enlarged, so that size and place have no influence, and compared
in pixels with each picture and its mirror image on the same background.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import Composition, Part
from sdkit.recipes.emoji.drawings import Drawings
from sdkit.recipes.emoji.figures import aligned
from sdkit.recipes.emoji.pictures import STYLES, pictures, read

HERE = Path(__file__).parents[1] / "embedded"
TWELVE = [one for one in pictures() if (HERE / "3d" / f"{one.file}.webp").is_file()]


class Twelve(Drawings):
    """The twelve pictures in four styles."""

    def __init__(self) -> None:
        super().__init__(HERE / "3d", HERE)

    def read(self, file: str, style: str) -> Image.Image:
        return read(HERE / style, file)


def composed(style: str, background: str, *parts: Part) -> Image.Image:
    """Return an image of one or two of the twelve on a background."""
    return Composition(parts=parts, style=style, background=background, caption="").drawn(Twelve())


def large(prompt: Prompt) -> Image.Image:
    """Return the picture in a prompt, large and in the middle of its background, as training shows it."""
    part = Part(picture=prompt.pictures[0], extent=104, across=0.5, down=0.5, mirrored=False)
    return composed(prompt.style, prompt.background, part)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def distances(image: Image.Image, background: str) -> np.ndarray:
    """Return the root mean square difference, from 0 to 1, to each picture in each style (4, 12)."""
    cut = aligned(image)
    both = np.stack([pixels(cut), pixels(ImageOps.mirror(cut))])
    differences = both[:, None, None] - references(background)
    nearer: np.ndarray = np.sqrt(np.square(differences).mean((-3, -2, -1))).min(0)
    return nearer


@functools.cache
def references(background: str) -> np.ndarray:
    """Return the pixels of each picture in each style (4, 12, height, width, 3) on a background."""
    return np.stack(
        [
            [pixels(aligned(large(Prompt((one,), style=style, background=background)))) for one in TWELVE]
            for style in STYLES
        ]
    )


def found(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> int:
    """Count the images that are nearest, of the twelve in the named style, to the picture in their prompt."""
    return sum(
        int(distances(image, prompt.background)[STYLES.index(prompt.style)].argmin())
        == TWELVE.index(prompt.pictures[0])
        for image, prompt in zip(images, asked, strict=True)
    )


def in_style(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> int:
    """Count the images that are nearest, of the four of the picture in their prompt, to the one in the named style."""
    return sum(
        STYLES[int(distances(image, prompt.background)[:, TWELVE.index(prompt.pictures[0])].argmin())] == prompt.style
        for image, prompt in zip(images, asked, strict=True)
    )


def off(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> float:
    """Return the mean distance to the pictures in the prompts."""
    return float(
        np.mean(
            [
                distances(image, prompt.background)[STYLES.index(prompt.style), TWELVE.index(prompt.pictures[0])]
                for image, prompt in zip(images, asked, strict=True)
            ]
        )
    )
