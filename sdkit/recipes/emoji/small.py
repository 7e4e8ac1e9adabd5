"""All pictures in all styles at 32 x 32 pixels, in one file of the package: data to learn from in minutes.

`python -m sdkit.recipes.emoji.small --drawn FOLDER --vectors FOLDER` writes that file from the npm packages.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

from PIL import Image

from sdkit.atomic import atomic_write
from sdkit.cli.console import exit_code_of, say_path
from sdkit.cli.parser import Parser
from sdkit.errors import DataError
from sdkit.messages import reason
from sdkit.recipes.emoji.drawings import Drawings
from sdkit.recipes.emoji.pictures import STYLES, pictures, resized

FILE = Path(__file__).parents[2] / "assets" / "emoji32" / "pictures.webp"
SIDE = 32  # pixels
COLUMNS = 64  # pictures in a row of the sheet


@cache
def small_pictures() -> dict[tuple[str, str], Image.Image]:
    """Return the pictures at 32 x 32 pixels.

    Returns:
        (name, style) -> the picture, RGBA, of 30 pixels on its longer side, centred. Each name in pictures.tsv comes
        in each of the `STYLES`, in that order. Paste it on a background with `composed(picture, colour, size=32,
        side=32)`. All calls share the pictures: copy one before you change it.

    Raises:
        DataError: The package's file is missing, damaged, or of other pictures.
    """
    try:
        with Image.open(FILE) as image:
            sheet = image.convert("RGBA")
    except OSError as error:
        raise DataError(f"{str(FILE)!r} is missing or damaged ({reason(error)}); install sdkit again.") from error
    if sheet.size != _sheet_size():
        raise DataError(f"{str(FILE)!r} holds other pictures than pictures.tsv lists; install sdkit again.")
    return {
        (picture.name, style): sheet.crop(_box(len(STYLES) * i + j))
        for i, picture in enumerate(pictures())
        for j, style in enumerate(STYLES)
    }


def _box(index: int) -> tuple[int, int, int, int]:
    """Return the place on the sheet, as (left, top, right, bottom), of the picture with this index."""
    left, top = index % COLUMNS * SIDE, index // COLUMNS * SIDE
    return left, top, left + SIDE, top + SIDE


def _sheet_size() -> tuple[int, int]:
    """Return the sheet's width and height in pixels."""
    return COLUMNS * SIDE, -(-len(pictures()) * len(STYLES) // COLUMNS) * SIDE


def sheet(drawings: Drawings) -> Image.Image:
    """Return all pictures in all styles on one sheet, RGBA, in the order of `small_pictures`.

    Raises:
        DataError: The packages lack a picture or are damaged, or resvg-py is not installed.
    """
    whole = Image.new("RGBA", _sheet_size())
    for i, picture in enumerate(pictures()):
        for j, style in enumerate(STYLES):
            whole.paste(_shrunk(drawings.trimmed(picture.file, style)), _box(len(STYLES) * i + j)[:2])
    return whole


def _shrunk(picture: Image.Image) -> Image.Image:
    """Return a picture centred on 32 x 32 transparent pixels, with 30 pixels on its longer side."""
    shrunk = resized(picture, SIDE - 2)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(shrunk, ((SIDE - shrunk.width) // 2, (SIDE - shrunk.height) // 2))
    return canvas


def main() -> int:
    """Write the file, and return the exit code."""
    parser = Parser(prog="python -m sdkit.recipes.emoji.small", description=__doc__)
    parser.add_argument("--drawn", type=Path, required=True, metavar="FOLDER", help="assets/ of fluent-emoji-3d")
    parser.add_argument("--vectors", type=Path, required=True, metavar="FOLDER", help="packages of @iconify-json")
    parser.add_argument("--out", "-o", type=Path, default=FILE, metavar="FILE", help="default: the package's own file")
    args: argparse.Namespace = parser.parse_args()
    image = sheet(Drawings(args.drawn, args.vectors))
    with atomic_write(args.out) as path:
        image.save(path, format="webp", quality=90, method=6, alpha_quality=100)
    say_path(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
