"""Find what stands on a plain background: where it is, how large it is, and the same cut out and enlarged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdkit.recipes.emoji.compositions import MARGIN, SIZES
from sdkit.recipes.emoji.pictures import BACKGROUNDS

FRAME = 4  # width in pixels of the edge that gives the colour of the background
DIFFERENCE = 48  # distance in sRGB, of values from 0 to 255, from which a pixel is not background
SPECKS = 2  # pixels in a row or column from which it belongs to the figure
AROUND = 1.08  # side of the square that is cut out, for each pixel of the figure's longer side
ALIGNED = 96  # side in pixels of an aligned image
EDGE = 0.3  # share of the room within which a figure is at an edge; it is in the middle between EDGE and 1 - EDGE


@dataclass(frozen=True)
class Figure:
    """An object on a plain background.

    Attributes:
        box: Left, top, right, and bottom in pixels.
        room: Width and height of the image in pixels.
    """

    box: tuple[int, int, int, int]
    room: tuple[int, int]

    @property
    def extent(self) -> int:
        """Pixels on the longer side."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)

    @property
    def size(self) -> str:
        """Word for the size that is nearest, as in `SIZES`."""
        return min(SIZES, key=lambda word: abs(SIZES[word] - self.extent))

    @property
    def place(self) -> str:
        """Word for the place, as in `compositions.PLACES`; "" for the middle, for corners, and for what has no room."""
        left, top, right, bottom = self.box
        across, down = (
            (start - MARGIN) / free if (free := side - 2 * MARGIN - (end - start)) > 0 else 0.5
            for start, end, side in ((left, right, self.room[0]), (top, bottom, self.room[1]))
        )
        near = {"left": across, "right": 1 - across, "top": down, "bottom": 1 - down}
        at_edge = [word for word, distance in near.items() if distance < EDGE]
        return at_edge[0] if len(at_edge) == 1 else ""


def background_of(image: Image.Image) -> str:
    """Return the name of the colour that is nearest, in sRGB, to the median of the image's edge."""
    colour = _edge(_pixels(image))
    return min(BACKGROUNDS, key=lambda name: math.dist(colour, BACKGROUNDS[name]))


def figure_of(image: Image.Image) -> Figure | None:
    """Return what stands on the image's background, or None if nothing differs from it."""
    pixels = _pixels(image)
    differs = np.linalg.norm(pixels - _edge(pixels), axis=2) > DIFFERENCE
    columns, rows = (np.flatnonzero(differs.sum(axis) >= SPECKS) for axis in (0, 1))
    if not (len(columns) and len(rows)):
        return None
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Figure(box, image.size)


def aligned(image: Image.Image) -> Image.Image:
    """Return the figure in the middle of an image of its background, `ALIGNED` pixels wide, at a fixed size.

    An image without a figure is resized as a whole.
    """
    figure = figure_of(image)
    if figure is None:
        return image.resize((ALIGNED, ALIGNED), Image.Resampling.LANCZOS)
    left, top, right, bottom = figure.box
    side = math.ceil(AROUND * figure.extent)
    corner = ((left + right - side) // 2, (top + bottom - side) // 2)
    colour = tuple(round(value) for value in _edge(_pixels(image)))
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, (-corner[0], -corner[1]))  # the image may end before the square does
    return canvas.resize((ALIGNED, ALIGNED), Image.Resampling.LANCZOS)


def _pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _edge(pixels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the median colour (3,) of the image's edge."""
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    colour: np.ndarray[tuple[int], np.dtype[np.float64]] = np.median(pixels[~inner], axis=0)
    return colour
