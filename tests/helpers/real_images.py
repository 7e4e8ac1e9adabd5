"""Sets of real pictures: squares cut out of the photographs that come with scikit-image."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from sdkit import images

PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "ihc.png",
    "hubble_deep_field.jpg",
)  # fmt: skip
SIDE = 96  # pixels


@cache
def _photo(name: str) -> Image.Image:
    return images.read(Path(skimage.data.__file__).parent / name)  # without the colour profile that some have


def crops(n: int, seed: int, photos: int = len(PHOTOS)) -> list[Image.Image]:
    """Cut n squares of 96 pixels at random places, from the first `photos` photographs in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        photo = _photo(PHOTOS[i % photos])
        left, top = rng.integers(0, (photo.width - SIDE, photo.height - SIDE))
        found.append(photo.crop((left, top, left + SIDE, top + SIDE)))
    return found


def save_all(pictures: list[Image.Image], folder: Path) -> Path:
    """Write images as PNGs, numbered in their order."""
    folder.mkdir(parents=True)
    for i, image in enumerate(pictures):
        image.save(folder / f"{i:04}.png")
    return folder
