"""The one reader of JSON: whatever is in a file, the caller gets JSON of the kind asked for, or one exception.

The `ValueError`s of this module are predicates ("is not valid JSON ..."), to be put behind the name of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdkit.files import read_regular
from sdkit.messages import first_line

LARGEST = 64 * 2**20
"""Bytes of the largest JSON file that is read; those of models, caches, and runs are far smaller."""


def parse(data: bytes | str) -> Any:
    """The value that a JSON text holds, NaN and Infinity among them. Raises `ValueError` for anything else."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("is not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({first_line(error)})") from error


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The object that a JSON text holds. Raises `ValueError` for anything else."""
    found = parse(data)
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` for other content, `OSError` for what is no readable regular file
    of at most `largest` bytes."""
    return parse_object(read_regular(path, largest))


def require(fields: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise `ValueError` where one of the fields named in `kinds` is missing or of another type.

    True and False count as bool alone, a whole number as a float, too.
    """
    for name, kind in kinds.items():
        if name not in fields:
            raise ValueError(f"has no {name!r}")
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if float in allowed:
            allowed += (int,)
        if not isinstance(fields[name], allowed) or (isinstance(fields[name], bool) and bool not in allowed):
            raise ValueError(f"has a {name!r} of another type")
