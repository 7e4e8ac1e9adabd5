"""One image and its caption. The image is read only when it is needed."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

from PIL import Image

from sdkit import images
from sdkit.errors import ImageError
from sdkit.files import open_regular
from sdkit.messages import clean, first_line
from sdkit.stops import stop_in

ON_THE_HUB = re.compile(r"(?:(?:zip|tar|gzip)://[^:]*::)?hf://")
"""Matches the beginning of the URL of an image on the Hub: hf://, or zip://a.png::hf:// in an archive."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image, not yet read, and its caption.

    Attributes:
        name: The path of the image below the data set's folder, the path of its shard and its path therein, or its row;
            unique within a data set.
        caption: "" where the image has none.
        path: The file that holds the encoded image, or its URL on the Hub.
        data: The encoded image, if it is held in memory.
        offset: First byte of the encoded image in the file `path`, a tar shard; None if the image is the whole file.
        size: Number of bytes from `offset` on; None if the image is the whole file.
    """

    name: str
    caption: str
    path: str | None = field(default=None, repr=False)
    data: bytes | None = field(default=None, repr=False)
    offset: int | None = field(default=None, repr=False)
    size: int | None = field(default=None, repr=False)

    def load(self) -> Image.Image:
        """Read the image as `sdkit.images.read` does: 8-bit RGB, upright, opaque. Raises ImageError."""
        if self.data is not None:
            return _read(self.data, self.name)
        if self.path is None:
            raise ImageError(f"{self.name} holds no image; take it out of the data.")
        if self.offset is None and "://" not in self.path:
            return images.read(self.path)
        try:
            with self._open(self.path) as file:
                file.seek(self.offset or 0)
                data = file.read(-1 if self.size is None else self.size)
        except ImageError:
            raise
        except Exception as error:  # fsspec's remote file systems raise nearly anything
            raise stop_in(error) or ImageError(f"cannot read {clean(self.name)}: {first_line(error)}.") from error
        return _read(data, self.name)

    def _open(self, path: str) -> Any:
        """Open a local shard or a file on the Hub. Other URLs are refused, since a data set could name any server."""
        if self.offset is not None:
            return open_regular(path)
        if not ON_THE_HUB.match(path):
            raise ImageError(
                f"{clean(self.name)} lies at {clean(path)!r}, which is neither a file here nor on the Hub; store the "
                "images themselves."
            )
        if import_module("huggingface_hub.constants").HF_HUB_OFFLINE:
            raise ImageError(f"{clean(self.name)} lies on the Hub, and HF_HUB_OFFLINE forbids to fetch it.")
        return import_module("fsspec").open(path, "rb")


def _read(data: bytes, name: str) -> Image.Image:
    class Named(io.BytesIO):  # errors of `images.read` name the file by str(file)
        def __str__(self) -> str:
            return name

    return images.read(cast(Any, Named(data)))
