"""Conditions made from images, against scikit-image and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data
from skimage.feature import canny as their_canny

import sdkit
from sdkit import images
from sdkit.images.conditions import CONDITIONS
from sdkit.loading.single_file import ASSETS


def photo(size: tuple[int, int] = (256, 256)) -> Image.Image:
    return images.read(ASSETS / "photo.jpg").resize(size)


def disc(side: int = 64) -> Image.Image:
    y, x = np.mgrid[:side, :side]
    return Image.fromarray((255 * ((x - 30) ** 2 + (y - 34) ** 2 < 400)).astype(np.uint8))


@pytest.mark.parametrize("image", [photo(), photo((97, 61))], ids=["square", "oblong"])
@pytest.mark.parametrize(
    "options", [{}, {"sigma": 2.0}, {"low": 0.3, "high": 0.8}, {"sigma": 0.7, "low": 0.2, "high": 0.2}], ids=str
)
def test_canny_is_that_of_scikit_image(image: Image.Image, options: dict[str, float]) -> None:
    names = {"low": "low_threshold", "high": "high_threshold", "sigma": "sigma"}
    levels = np.asarray(image.convert("L")) / 255
    expected = their_canny(levels, **{names[name]: value for name, value in options.items()})
    found = np.asarray(images.canny(image, **options))
    assert found.shape == (*levels.shape, 3)
    assert set(np.unique(found)) == {0, 255}
    assert expected.sum() > 500
    # Where two magnitudes are equal up to rounding, a pixel may differ.
    assert ((found[..., 0] > 0) != expected).sum() <= 2


def test_canny_finds_a_circle_where_it_is() -> None:
    edges = np.asarray(images.canny(disc()))[..., 0] > 0
    y, x = np.nonzero(edges)
    assert abs(np.hypot(x - 30, y - 34) - 20).max() < 1.5
    assert len(np.unique(np.round(np.arctan2(y - 34, x - 30), 1))) > 60  # all around


def test_grey_is_the_luma() -> None:
    image = photo()
    levels = np.asarray(image, dtype=float) @ (0.299, 0.587, 0.114)
    found = np.asarray(images.grey(image), dtype=float)
    assert found.shape == (256, 256, 3)
    assert abs(found - levels[..., None]).max() <= 1


def test_outlines_are_where_neighbours_differ() -> None:
    regions = np.zeros((8, 9, 3), dtype=np.uint8)
    regions[2:5, 3:6] = (10, 200, 30)
    found = np.asarray(images.outlines(Image.fromarray(regions)))[..., 0] > 0
    expected = np.zeros((8, 9), dtype=bool)
    expected[2:5, 3:6] = True
    expected[3, 4] = False
    for i, j in [*((1, j) for j in (3, 4, 5)), *((5, j) for j in (3, 4, 5))]:
        expected[i, j] = True
    for i, j in [*((i, 2) for i in (2, 3, 4)), *((i, 6) for i in (2, 3, 4))]:
        expected[i, j] = True
    assert np.array_equal(found, expected)


def test_colour_blocks_are_means() -> None:
    found = np.asarray(images.colour_blocks(photo((50, 37)), 16))
    original = np.asarray(photo((50, 37)), dtype=float)
    assert found.shape == (37, 50, 3)
    for top in range(0, 37, 16):
        for left in range(0, 50, 16):
            block = found[top : top + 16, left : left + 16]
            assert (block == block[0, 0]).all()
            assert abs(block[0, 0] - original[top : top + 16, left : left + 16].mean((0, 1))).max() <= 0.5


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_mode_becomes_rgb_of_the_same_size(name: str, mode: str) -> None:
    source = Image.fromarray(data.camera()[::8, ::8])
    image = Image.fromarray(np.asarray(source).astype(np.uint16) * 257) if mode == "I;16" else source.convert(mode)
    made = CONDITIONS[name](image)
    assert (made.mode, made.size) == ("RGB", image.size)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: images.canny(disc(), low=0.5, high=0.2), "high 0.2 must be at least low 0.5"),
        (lambda: images.canny(disc(), sigma=-1), "sigma must be a number from 0 to 100"),
        (lambda: images.canny(disc(), low=float("nan")), "low must be a number of at least 0"),
        (lambda: images.colour_blocks(disc(), 0), "size must be a whole number of at least 1"),
    ],
)
def test_bad_input(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(sdkit.ArgumentError, match=f"^{sentence}"):
        call()


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_is_no_pil_image(name: str) -> None:
    for other in ("a.png", None, [disc()]):
        with pytest.raises(sdkit.ImageError, match=r"^type \w+ is no PIL image; sdkit\.images\.read opens a file\.$"):
            CONDITIONS[name](other)  # type: ignore[arg-type]
