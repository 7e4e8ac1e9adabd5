"""The pictures in all styles, read from the unpacked npm packages: images for one style, vector graphics for three."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sdkit.errors import DataError
from sdkit.messages import reason
from sdkit.recipes.emoji.pictures import read

PIXELS = 256  # side of a picture
VECTORS = {"flat": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji"}
"""Style -> its package, without the prefix @iconify-json/."""


@dataclass(frozen=True)
class Drawings:
    """The pictures in all styles.

    Attributes:
        solid: assets/ of the package @lobehub/fluent-emoji-3d, for the style "3d".
        vectors: Folder with a folder for each package in `VECTORS`.
    """

    solid: Path
    vectors: Path

    def read(self, file: str, style: str) -> Image.Image:
        """Return a picture in a style: RGBA, 256 x 256.

        Args:
            file: The picture's code points, as in pictures.tsv.
            style: Word for the style.

        Raises:
            DataError: The packages lack the picture or are damaged, or resvg-py is not installed.
        """
        return _read(self.solid, file) if style == "3d" else _rendered(self.vectors / VECTORS[style], file)

    def trimmed(self, file: str, style: str) -> Image.Image:
        """Return a picture, as `read` does, without its empty edges."""
        picture = self.read(file, style)
        return picture.crop(picture.getbbox())

    @property
    def files(self) -> list[Path]:
        """Files of the packages with vector graphics. Raises DataError if one is missing."""
        files = [self.vectors / package / name for package in VECTORS.values() for name in ("icons.json", "chars.json")]
        if missing := [file for file in files if not file.is_file()]:
            raise DataError(f"{missing[0]} is not there; give the folder of the npm packages @iconify-json.")
        return files


@lru_cache(maxsize=512)
def _read(folder: Path, file: str) -> Image.Image:
    return read(folder, file)


@lru_cache(maxsize=1024)
def _rendered(package: Path, file: str) -> Image.Image:
    """Return a picture of an iconify package, rendered."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise DataError("vector graphics are rendered by resvg-py: pip install 'sdkit[recipes]'.") from error
    try:
        icon = _icon(package, file)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {icon["width"]} {icon["height"]}" width="{PIXELS}" height="{PIXELS}">{icon["body"]}</svg>'
        )
        with Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg, skip_system_fonts=True)))) as image:
            return image.convert("RGBA")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{package} has no picture {file} that can be drawn ({reason(error)}).") from error


def _icon(package: Path, file: str) -> dict[str, Any]:
    """Return `body`, `width`, and `height` of a picture. Raises KeyError if there is none."""
    icons, characters = _json(package / "icons.json"), _json(package / "chars.json")
    name = characters.get(file) or characters[file.replace("-fe0f", "").replace("_", "-")]
    size = {side: icons.get(side, 16) for side in ("width", "height")}  # 16 is iconify's own default
    icon: dict[str, Any] = size | icons["icons"][name]
    return icon


@cache
def _json(path: Path) -> dict[str, Any]:
    """Return the content of a package's file. Raises DataError if it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); is the package unpacked there?") from error
    return content
