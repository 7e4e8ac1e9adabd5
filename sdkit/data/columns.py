"""The image and caption columns of a data set: chosen by name and type, and read into examples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdkit.data.captioned_files import NAME, OFFSET, SIZE
from sdkit.data.captions import CAPTION_KEYS, caption_of
from sdkit.data.datasets_library import datasets_library
from sdkit.data.example import Example
from sdkit.errors import DataError
from sdkit.files import encodable
from sdkit.messages import clean

IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img")
"""Usual names of the column of images, the likeliest first."""


@dataclass(frozen=True)
class Columns:
    """The image and caption columns of a data set, which make an `Example` of each row.

    Attributes:
        source: Path or id of the data set, for messages.
        image: Name of the column of images.
        caption: Name of the column of captions, if there is one.
        default_caption: Caption of images that have none.
        folder: Folder that relative paths are relative to; None where all paths are absolute.
    """

    source: str
    image: str
    caption: str | None
    default_caption: str
    folder: Path | None

    def example(self, row: dict[str, Any], i: int) -> Example:
        """Return the example in row `i`."""
        cell = row[self.image] or {"bytes": None, "path": None}
        return Example(
            name=row.get(NAME) or example_name(cell["path"], i),
            caption=self.caption_of(row[self.caption], i) if self.caption else self.default_caption,
            path=self._whole(cell["path"]),
            data=cell["bytes"],
            offset=row.get(OFFSET),
            size=row.get(SIZE),
        )

    def caption_of(self, value: Any, i: int) -> str:
        """Return the caption in a cell of row `i`, or else the default. Raises DataError if it is not UTF-8 text."""
        try:
            return caption_of(value) or self.default_caption
        except ValueError as error:
            problem = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise DataError(
                f"the caption of row {i} in {clean(self.source)} cannot be used, for {problem}; correct the data."
            ) from error

    def _whole(self, path: str | None) -> str | None:
        """Return `folder`/`path` if that file exists, else `path` unchanged."""
        inside = str(self.folder / path) if self.folder and path and "://" not in path else None
        return inside if inside and os.path.isfile(inside) else path  # noqa: PTH113 - pathlib's raises for long names


def example_name(path: str | None, i: int) -> str:
    """Return the name of the example in row `i`: its image's path if it has one."""
    return encodable(path) if path else f"row {i}"


def choose_columns(
    features: Mapping[str, Any], source: str, image_column: str | None, caption_column: str | None
) -> tuple[str, str | None]:
    """Choose the column of images, and the column of captions if there is one.

    Args:
        features: The data set's columns and their types.
        source: Path or id of the data set, for messages.
        image_column: Name given by the user; None takes the likeliest column that holds images.
        caption_column: Name given by the user; None takes the first of `CAPTION_KEYS` that is a column.

    Raises:
        DataError: A given column is missing or holds something else, or no column holds images.
    """
    columns = clean(", ".join(features))
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in features:
            raise DataError(f"{option}: {clean(source)} has no column {clean(column)!r}; it has {columns}.")
    holding = [name for name, feature in features.items() if _holds_images(feature)]
    image = image_column or next((name for name in IMAGE_COLUMNS if name in holding), None) or next(iter(holding), None)
    if image is None or image not in holding:
        problem = "has no column of images" if image is None else f"has no images in its column {clean(image)!r}"
        raise DataError(f"{clean(source)} {problem}; its columns: {columns}.")
    # Images and audio are no captions. Reading such a column would decode it, and open any URL in it.
    decoded = [name for name, feature in features.items() if _is_decoded(feature)]
    if caption_column == image or caption_column in decoded:
        raise DataError(
            f"column {clean(caption_column)!r} of {clean(source)} holds images or the like; name another as "
            "caption_column."
        )
    likely = (name for name in CAPTION_KEYS if name in features and name not in decoded and name != image)
    return image, caption_column or next(likely, None)


def _holds_images(feature: Any) -> bool:
    """Return whether a column holds encoded images: the type Image, bytes, or a structure with a field `bytes`."""
    encoded = feature.get("bytes") if isinstance(feature, dict) else feature
    is_image = isinstance(feature, datasets_library().Image)
    return is_image or getattr(encoded, "dtype", "") in ("binary", "large_binary")


def _is_decoded(feature: Any) -> bool:
    """Return whether `datasets` would decode a column on reading: images or audio, whose paths may be URLs."""
    parts = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return hasattr(feature, "decode_example") or any(_is_decoded(part) for part in parts if part is not None)
