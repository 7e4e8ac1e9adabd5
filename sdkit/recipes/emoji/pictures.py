"""The pictures, their names and the backgrounds: what a caption says, and what the image of it is."""

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
SIZE = 128  # of an image, pixels
SIDE = 112  # of the picture on it

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
"""Colours that captions name, sRGB. White is the one that a caption need not name."""

AN = r"(?!ewe|one|ufo|unicorn)[aeiou]|hour|x-ray"
"""How a name begins that "an" stands before."""
SINGULAR = {
    "abacus", "bus", "cactus", "hibiscus", "hippopotamus", "lotus", "minibus", "octopus", "rhinoceros", "trolleybus",
    "tyrannosaurus",
}  # fmt: skip
"""Words in -s that are one thing."""


@dataclass(frozen=True)
class Picture:
    """One emoji that captions can name, as pictures.tsv has it."""

    file: str
    """Its file in the npm package, without .webp: the code points."""
    name: str
    other_name: str
    """A second, shorter name, or nothing."""
    held_out: str
    """The background that no training image shows it on."""

    @property
    def names(self) -> list[str]:
        """One name or two."""
        return [self.name, *([self.other_name] if self.other_name else [])]


@cache
def pictures() -> tuple[Picture, ...]:
    """All that the model learns by name, in the order of the table."""
    rows = csv.reader(TABLE.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    next(rows)
    return tuple(Picture(*row) for row in rows)


@cache
def held_out() -> dict[str, str]:
    """File -> the background that it is not seen on in training."""
    return {one.file: one.held_out for one in pictures()}


def with_article(name: str) -> str:
    """ "an apple", but "grapes" as it is."""
    head = re.split(r" (?:with|holding|showing|over|and) ", name)[0]  # "face" of "face with horns"
    if head.endswith("s") and not head.endswith("ss") and head.split()[-1] not in SINGULAR:
        return name
    return f"{'an' if re.match(AN, name) else 'a'} {name}"


def caption(name: str, background: str, article: bool = True) -> str:
    """For example "a red apple on a blue background"."""
    return f"{with_article(name) if article else name} on {with_article(background)} background"


def used(folder: Path) -> list[str]:
    """Files, without .webp, of the npm package's folder: what the VAE learns from, and images are looked up among. All
    but flags of countries and regions, keycaps and skin tones. Raises `DataError` where there are none."""
    try:
        stems = sorted(path.stem for path in folder.glob("*.webp") if _is_used(path.stem))
    except ValueError:  # a name that is no numbers
        stems = []
    if not stems:
        raise DataError(f"{folder} is not assets/ of the unpacked npm package: .webp files with numbers for names.")
    return stems


def _is_used(stem: str) -> bool:
    points = [int(point, 16) for part in stem.split("-") for point in part.split("_") if point]
    tones, letters, keycap, tags = range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200), [0x20E3], range(0xE0000, 0xE0100)
    return not any(point in some for point in points for some in (tones, letters, keycap, tags))


def read(folder: Path, file: str) -> Image.Image:
    """A picture of the npm package's folder of .webp files, RGBA, 256 x 256. Raises `DataError` where there is none."""
    path = folder / f"{file}.webp"
    try:
        with Image.open(path) as image:
            return image.convert("RGBA")
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); is {folder} the package's assets/?") from error


def composed(
    picture: Image.Image,
    colour: tuple[int, int, int],
    *,
    size: int = SIZE,
    side: int = SIDE,
    corner: tuple[int, int] | None = None,
) -> Image.Image:
    """The picture, `side` pixels wide, on a plain background of `size` x `size`: with its upper left at `corner`
    (x, y), else in the middle."""
    canvas = Image.new("RGBA", (size, size), (*colour, 255))
    # Pillow resizes RGBA with its colours weighted by alpha, so no dark rim comes in.
    layer = Image.new("RGBA", (size, size))
    layer.paste(picture.resize((side, side), Image.Resampling.LANCZOS), corner or ((size - side) // 2,) * 2)
    return Image.alpha_composite(canvas, layer).convert("RGB")
