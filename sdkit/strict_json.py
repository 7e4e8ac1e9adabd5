"""JSON read strictly: the caller gets the kind of value it asked for, or a `ValueError`.

The message of each `ValueError` is a predicate ("is not valid JSON ..."); the caller puts the file's name before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdkit.files import read_regular
from sdkit.messages import first_line

LARGEST = 64 * 2**20
"""Size of the largest JSON file that is read, in bytes. Those of models, caches, and runs are far smaller."""


def parse(data: bytes | str) -> Any:
    """Return the value of a JSON text; NaN and Infinity are allowed. Raises ValueError for anything else."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("is not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({first_line(error)})") from error


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Return the object in a JSON text. Raises ValueError for anything else."""
    found = parse(data)
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found


def read_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: The file holds anything else.
        OSError: It cannot be read, is not a regular file, or is larger than `largest` bytes.
    """
    return parse_object(read_regular(path, largest))


def require(fields: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise ValueError if a field named in `kinds` is missing or has another type.

    An int is accepted as a float. A bool is not accepted as a number.
    """
    for name, kind in kinds.items():
        if name not in fields:
            raise ValueError(f"has no {name!r}")
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if float in allowed:
            allowed += (int,)
        if not isinstance(fields[name], allowed) or (isinstance(fields[name], bool) and bool not in allowed):
            raise ValueError(f"has a {name!r} of another type")
