"""The pictures, with their names, styles, and backgrounds, and images of them on plain backgrounds."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from sdkit.errors import DataError
from sdkit.messages import reason

TABLE = Path(__file__).parent / "pictures.tsv"
SIZE = 128  # side of an image in pixels
SIDE = 112  # side of the picture on an image, in pixels

BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
    "red": (214, 48, 49),
    "orange": (245, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 160, 80),
    "turquoise": (40, 180, 180),
    "blue": (50, 110, 220),
    "purple": (130, 70, 190),
    "pink": (245, 150, 190),
    "brown": (130, 85, 50),
}
"""sRGB colours that captions name."""

STYLES = ("3d", "flat", "noto", "twemoji")
"""Words for the styles in which every picture is drawn: Fluent 3D, Fluent flat, Noto, and Twemoji."""

AN = r"(?!ewe|one|ufo|unicorn)[aeiou]|hour|x-ray"
"""Pattern that matches the beginning of names that take "an"."""
SINGULAR = {
    "abacus", "bus", "cactus", "hibiscus", "hippopotamus", "lotus", "minibus", "octopus", "rhinoceros", "trolleybus",
    "tyrannosaurus",
}  # fmt: skip
"""Singular words that end in -s."""


@dataclass(frozen=True)
class Picture:
    """One emoji that captions can name: a row of pictures.tsv.

    Attributes:
        file: Name of its file in the npm package, without .webp: its code points.
        name: Its name.
        other_name: A second, shorter name, or "".
        held_out: Background on which no training image shows it.
        held_out_style: Style in which no training image shows it, or "". A tenth of all pairs of picture and style
            are held out, equally many in each style.
        mirrored: "no" if its mirror image would be wrong, because of letters, digits, or a side that matters; or "".
    """

    file: str
    name: str
    other_name: str
    held_out: str
    held_out_style: str = ""
    mirrored: str = ""

    @property
    def names(self) -> list[str]:
        """The name, and the other name if there is one."""
        return [self.name, *([self.other_name] if self.other_name else [])]

    @property
    def backgrounds(self) -> list[str]:
        """Names of the backgrounds on which training shows it."""
        return [name for name in BACKGROUNDS if name != self.held_out]

    @property
    def styles(self) -> list[str]:
        """Words for the styles in which training shows it."""
        return [style for style in STYLES if style != self.held_out_style]


@cache
def pictures() -> tuple[Picture, ...]:
    """Return all pictures that captions can name, in the order of pictures.tsv."""
    rows = csv.reader(TABLE.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    next(rows)
    return tuple(Picture(*row) for row in rows)


@cache
def held_out() -> dict[str, str]:
    """Return a dict from the file of each picture to its held-out background."""
    return {picture.file: picture.held_out for picture in pictures()}


def with_article(name: str) -> str:
    """Return a name with its article: "an apple", but "grapes" unchanged."""
    head = re.split(r" (?:with|holding|showing|over|and) ", name)[0]  # "face" of "face with horns"
    if head.endswith("s") and not head.endswith("ss") and head.split()[-1] not in SINGULAR:
        return name
    return f"{'an' if re.match(AN, name) else 'a'} {name}"


def used(folder: Path) -> list[str]:
    """Return the emoji on which the VAE is trained, which are also the candidates for retrieval.

    Flags of countries and regions, keycaps, and skin tones are left out.

    Args:
        folder: assets/ of the unpacked npm package.

    Returns:
        Names of files without .webp.

    Raises:
        DataError: The folder is not assets/ of the package.
    """
    try:
        stems = sorted(path.stem for path in folder.glob("*.webp") if _is_used(path.stem))
    except ValueError:  # a file's name is not made of code points
        stems = []
    if not stems:
        raise DataError(f"{folder} is not assets/ of the unpacked npm package: .webp files with numbers for names.")
    return stems


def _is_used(stem: str) -> bool:
    """Return whether a file's code points include no skin tone, regional indicator, keycap, or tag."""
    points = [int(point, 16) for part in stem.split("-") for point in part.split("_") if point]
    tones, letters, keycap, tags = range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200), [0x20E3], range(0xE0000, 0xE0100)
    return not any(point in left_out for point in points for left_out in (tones, letters, keycap, tags))


def read(folder: Path, file: str) -> Image.Image:
    """Return a picture of the npm package: RGBA, 256 x 256.

    Args:
        folder: assets/ of the unpacked npm package.
        file: Name of the file without .webp.

    Raises:
        DataError: There is no such picture, or it is damaged.
    """
    path = folder / f"{file}.webp"
    try:
        with Image.open(path) as image:
            return image.convert("RGBA")
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); is {folder} the package's assets/?") from error


def resized(picture: Image.Image, extent: int) -> Image.Image:
    """Return a picture with `extent` pixels on its longer side, in its proportions."""
    scale = extent / max(picture.size)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    # Pillow weights colours by alpha when it resizes RGBA, so the picture gets no dark rim.
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def composed(
    picture: Image.Image,
    colour: tuple[int, int, int],
    *,
    size: int = SIZE,
    side: int = SIDE,
    corner: tuple[int, int] | None = None,
) -> Image.Image:
    """Return an image (RGB) of a picture on a plain background.

    Args:
        picture: The picture, RGBA.
        colour: Colour of the background, sRGB.
        size: Pixels on a side of the image.
        side: Pixels on a side of the picture.
        corner: Upper left corner (x, y) of the picture, which may lie outside; None centres the picture.
    """
    canvas = Image.new("RGBA", (size, size), (*colour, 255))
    # Pillow weights colours by alpha when it resizes RGBA, so the picture gets no dark rim.
    layer = Image.new("RGBA", (size, size))
    layer.paste(picture.resize((side, side), Image.Resampling.LANCZOS), corner or ((size - side) // 2,) * 2)
    return Image.alpha_composite(canvas, layer).convert("RGB")
