"""Captions in text files, and in the fields of JSON and tables."""

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
"""Keys and columns that may hold a caption, the likeliest first; used if the user names none."""
LONGEST = 2**20
"""Largest size in bytes of a caption file, and of a line in metadata.jsonl."""
BESIDE = (".txt", ".caption", ".json")
"""Suffixes of caption files beside an image, in order of preference."""


def caption_of(value: Any, key: str | None = None) -> str:
    """Return the caption in a value of a caption column.

    Args:
        value: Text, bytes, a number, a list (its first item counts), or fields by name (see `key`). None, booleans, and
            numbers that are not finite (pandas writes missing values so) are no caption.
        key: The field that holds the caption. None tries `CAPTION_KEYS`.

    Returns:
        The caption without leading and trailing whitespace; "" if there is none.

    Raises:
        ValueError: The text was decoded wrongly: it holds NUL characters, or bytes that are not UTF-8.
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
    """Reads caption files, and collects those that cannot be read, so that one error can name them all.

    Attributes:
        key: Field of .json files that holds the caption; None tries `CAPTION_KEYS`.
        keys: Names of all fields seen in .json files.
        bad: Names of the files that cannot be read.
    """

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.keys: set[str] = set()
        self.bad: list[str] = []

    def read(self, path: Path) -> str:
        """Return the caption in a file. If it cannot be read, return "", and add the file to `bad`."""
        try:
            return self.decode(str(path), read_regular(path, LONGEST))
        except OSError:
            self.bad.append(str(path))
            return ""

    def decode(self, name: str, data: bytes) -> str:
        """Decode the content of a caption file: a JSON object if `name` ends in .json, else UTF-8 text.

        Return "" if it is invalid, and add the file to `bad`.
        """
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
        """Raise DataError if any file could not be read."""
        if self.bad:
            raise DataError(
                f"the caption in {listed(self.bad)} cannot be read; save it as UTF-8 text "
                "(.json: one object of fields) of at most 1 MiB that you may read."
            )
