"""Compositions: one picture, or two side by side, in some style, at some size and place, on a plain background.

A caption names each of these attributes or leaves it open, so that most captions have many right images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from sdkit.recipes.emoji.drawings import Drawings
from sdkit.recipes.emoji.pictures import BACKGROUNDS, SIZE, STYLES, Picture, resized, with_article

GRID, STRIDE = 8, 16
"""A picture in the middle begins at a multiple of GRID pixels, the side of a latent, and at other places multiples of
STRIDE pixels further, the side of the U-Net's cells after one downsampling. There it has the same latents, and the same
cells, shifted: the U-Net learns a shape once for all places."""
MARGIN = 8  # pixels between a picture and the edge of the image, before the grid
SIZES = {"small": 48, "large": 104}
"""Word for a size -> extent in pixels, of the longer side. Two sizes are few shapes to learn."""
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
"""Places that captions name, in words."""
BESIDE = 48  # extent of each of two pictures side by side

STYLE_NAMED, SIZE_NAMED, PLACE_NAMED, BACKGROUND_NAMED = 0.7, 0.4, 0.25, 0.7  # shares of captions
LARGE = 0.7  # share of large pictures, where captions leave size and place open
WHITE = 0.2  # share of white among backgrounds that are not named, besides its turn among all backgrounds
LONGEST = 3  # longest name, in words, of two pictures side by side

Companions = Mapping[str, Sequence[Picture]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A picture in a composition.

    Attributes:
        picture: The picture.
        extent: Pixels on its longer side.
        across: Horizontal position from 0 to 1, from the left end of its room to the right end.
        down: Vertical position from 0 to 1, from the top.
        mirrored: Whether it is mirrored, left to right.
    """

    picture: Picture
    extent: int
    across: float
    down: float
    mirrored: bool


@dataclass(frozen=True, kw_only=True)
class Composition:
    """An image to be drawn, and its caption.

    Attributes:
        parts: One picture, or two side by side, the left one first.
        style: Word for the style.
        background: Name of the background's colour.
        caption: The caption.
    """

    parts: tuple[Part, ...]
    style: str
    background: str
    caption: str

    def drawn(self, drawings: Drawings) -> Image.Image:
        """Return the image, RGB, `SIZE` x `SIZE`."""
        canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[self.background], 255))
        room = SIZE // len(self.parts)
        for n, part in enumerate(self.parts):
            picture = drawings.trimmed(part.picture.file, self.style)
            if part.mirrored:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            picture = resized(picture, part.extent)
            width, height = picture.size
            left = n * room + _begin(part.across, room, width)
            canvas.alpha_composite(picture, (left, _begin(part.down, SIZE, height)))
        return canvas.convert("RGB")


def _begin(position: float, room: int, extent: int) -> int:
    """Return where a picture begins in its room, in pixels, with its position from 0 to 1."""
    free = room - 2 * MARGIN - extent
    middle = GRID * round((MARGIN + free / 2) / GRID)
    return middle + STRIDE * math.floor((MARGIN + position * free - middle) / STRIDE + 0.5)


def described(
    names: Sequence[str], *, style: str = "", suffix: bool = False, size: str = "", place: str = "",
    background: str = "", article: bool = True,
) -> str:  # fmt: skip
    """Return a caption, such as "a small flat cat on the left of a blue background".

    Args:
        names: Names of one or two pictures.
        style: Word for the style, or "".
        suffix: Whether the style comes last (", flat style") instead of before each name.
        size: "small", "large", or "".
        place: A key of `PLACES`, or "".
        background: Name of the background's colour, or "".
        article: Whether the first name has its article.
    """
    adjectives = [word for word in (size, "" if suffix else style) if word]
    things = [" ".join([*adjectives, name]) for name in names]
    words = [" and ".join([with_article(things[0]) if article else things[0], *map(with_article, things[1:])])]
    words += [PLACES[place]] if place else []
    words += [f"{'of' if place else 'on'} {with_article(background)} background"] if background else []
    return " ".join(words) + (f", {style} style" if suffix and style else "")


def one(picture: Picture, style: str, rng: Random, backgrounds: Sequence[str] | None = None) -> Composition:
    """Return a random composition of one picture.

    Args:
        picture: The picture.
        style: Word for its style.
        rng: Random numbers.
        backgrounds: Backgrounds to choose from; None takes those on which training shows the picture.
    """
    size = rng.choice(("small", "large")) if rng.random() < SIZE_NAMED else ""
    place = rng.choice(tuple(PLACES)) if size != "large" and rng.random() < PLACE_NAMED else ""
    part = arranged(picture, size, place, rng)
    backgrounds = backgrounds or picture.backgrounds
    name = rng.choice(picture.names) if rng.random() < 0.5 else picture.name
    background, shared = _shared(style, backgrounds, rng)
    caption = described([name], size=size, place=place, **shared)
    return Composition(parts=(part,), style=style, background=background, caption=caption)


def plain(picture: Picture, style: str, rng: Random) -> Composition:
    """Return a large picture on a random background, in the middle, as far as the grid allows, with a full caption.

    With nothing left open, a network learns the names much sooner than from compositions of `one`.
    """
    part = Part(picture=picture, extent=SIZES["large"], across=0.5, down=0.5, mirrored=False)
    background = rng.choice(picture.backgrounds)
    caption = described([picture.name], style=style, size="large", background=background)
    return Composition(parts=(part,), style=style, background=background, caption=caption)


def arranged(picture: Picture, size: str, place: str, rng: Random) -> Part:
    """Return a picture at a random size and position, of those that a caption with this size and place allows.

    Args:
        picture: The picture.
        size: "small", "large", or "", which leaves the size open.
        place: A key of `PLACES`, or "", which leaves the place open.
        rng: Random numbers.
    """
    extent = _extent(size, place, rng)
    return Part(picture=picture, extent=extent, mirrored=_mirrored(picture, rng), **_position(place, rng))


def beside(picture: Picture, rng: Random) -> Part:
    """Return a picture of extent `BESIDE`, at a random height of its half of an image with two."""
    return Part(
        picture=picture, extent=BESIDE, across=rng.uniform(0.2, 0.8), down=rng.uniform(0.35, 0.65),
        mirrored=_mirrored(picture, rng),
    )  # fmt: skip


def two(pictures: Sequence[Picture], style: str, rng: Random) -> Composition:
    """Return a random composition of two pictures, the left one first, on a background on which training shows both."""
    parts = tuple(beside(picture, rng) for picture in pictures)
    backgrounds = [name for name in BACKGROUNDS if all(name in picture.backgrounds for picture in pictures)]
    background, shared = _shared(style, backgrounds, rng)
    caption = described([picture.name for picture in pictures], **shared)
    return Composition(parts=parts, style=style, background=background, caption=caption)


def may_be_beside(picture: Picture) -> bool:
    """Return whether a picture's name is short, and cannot be mistaken for two."""
    words = picture.name.split()
    return len(words) <= LONGEST and "and" not in words and "with" not in words


def _shared(style: str, backgrounds: Sequence[str], rng: Random) -> tuple[str, dict[str, Any]]:
    """Draw a background, and what a caption says of style and background.

    Returns:
        The name of the background, and arguments of `described`. A background that is not named is often white.
    """
    named = rng.random() < BACKGROUND_NAMED
    white = not named and rng.random() < WHITE and "white" in backgrounds
    background = "white" if white else rng.choice(backgrounds)
    return background, {
        "style": style if rng.random() < STYLE_NAMED else "",
        "suffix": rng.random() < 0.5,
        "background": background if named else "",
        "article": rng.random() < 0.75,
    }


def _extent(size: str, place: str, rng: Random) -> int:
    """Return the extent in pixels of a picture, if its caption names this size and this place. "" leaves it open."""
    at_a_place = "small" if place else ""  # large pictures have no room to be at a place
    return SIZES[size or at_a_place or ("large" if rng.random() < LARGE else "small")]


def _position(place: str, rng: Random) -> dict[str, float]:
    """Return `across` and `down` of a picture, if its caption names this place.

    "" leaves it open: the picture is near the middle in half of the images, and anywhere in the others.
    """
    middle = {"across": rng.uniform(0.4, 0.6), "down": rng.uniform(0.4, 0.6)}
    near = rng.uniform(0, 0.12)
    if place:
        axis = "across" if place in ("left", "right") else "down"
        return middle | {axis: near if place in ("left", "top") else 1 - near}
    return middle if rng.random() < 0.5 else {"across": rng.random(), "down": rng.random()}


def _mirrored(picture: Picture, rng: Random) -> bool:
    """Return whether to mirror a picture: half of the time, where that is natural."""
    return rng.random() < 0.5 and picture.mirrored != "no"


def all_pairs(pictures: Sequence[Picture]) -> list[tuple[Picture, str]]:
    """Return all pairs of picture and style that training shows."""
    return [(picture, style) for picture in pictures for style in picture.styles]


def companions(pictures: Sequence[Picture]) -> Companions:
    """Return for each style the pictures that training shows in it beside others."""
    short = [picture for picture in pictures if may_be_beside(picture)]
    return {style: [picture for picture in short if style in picture.styles] for style in STYLES}
