"""Captions: the files and fields that hold them, and the text in these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdkit import strict_json
from sdkit.errors import DataError
from sdkit.files import encodable, read_regular
from sdkit.messages import listed

CAPTION_KEYS = ("text", "caption", "captions", "prompt", "txt", "json")
"""Names under which a caption is looked for where none is given, the first that is there."""
LONGEST = 2**20
"""Bytes of the longest caption file, and of the longest line of metadata."""
BESIDE = (".txt", ".caption", ".json")
"""Suffixes of caption files, in the order in which they are taken."""


def caption_of(value: Any, key: str | None = None) -> str:
    """The caption in whatever a caption column holds: text, a number, a list (its first), fields (one of them).

    Nothing, true or false, and numbers that are not finite (as pandas writes what is missing) are no caption: "".
    Raises `ValueError` for NUL characters and for bytes that are not UTF-8: the text was decoded wrongly, then.
    """
    keys = CAPTION_KEYS if key is None else (key,)
    while isinstance(value, (Mapping, list, tuple)):
        if isinstance(value, Mapping):
            value = next((value[name] for name in keys if value.get(name) is not None), None)
            keys = CAPTION_KEYS
        else:
            value = value[0] if value else None
    if value is None or isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = value.decode("utf-8-sig") if isinstance(value, bytes) else encodable(str(value))
    if "\0" in text:
        raise ValueError("it holds NUL characters, as UTF-16 read as UTF-8 does")
    return text.strip()


class Texts:
    """Decodes caption files, and remembers those that it cannot, so that one sentence can name them all."""

    def __init__(self, key: str | None = None) -> None:
        """`key`: the field of .json files that is the caption."""
        self.key = key
        self.keys: set[str] = set()
        """Names of all fields in .json files."""
        self.bad: list[str] = []

    def read(self, path: Path) -> str:
        """The caption in a file."""
        try:
            return self.decode(str(path), read_regular(path, LONGEST))
        except OSError:
            self.bad.append(str(path))
            return ""

    def decode(self, name: str, data: bytes) -> str:
        """The caption in the bytes of a file of this name: UTF-8 text, or with the suffix .json an object."""
        try:
            if not name.lower().endswith(".json"):
                return caption_of(data)
            fields = strict_json.parse_object(data)
            self.keys |= fields.keys()
            return caption_of(fields, self.key)
        except ValueError:
            self.bad.append(name)
            return ""

    def check(self) -> None:
        """Raise `DataError` where a file could not be decoded."""
        if self.bad:
            raise DataError(
                f"the caption in {listed(self.bad)} cannot be read; save it as UTF-8 text "
                "(.json: one object of fields) of at most 1 MiB that you may read."
            )
