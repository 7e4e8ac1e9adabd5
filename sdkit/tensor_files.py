"""Safetensors files: equal content gives bit-identical files, and reading a damaged file raises.

The message of each `ValueError` is a predicate ("is not a whole safetensors file ..."); the caller puts the file's
name before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdkit.file_kind import BEGINNING, SAFETENSORS, kind_of
from sdkit.files import open_regular, read_regular
from sdkit.messages import first_line
from sdkit.strict_json import parse_object

METADATA = "__metadata__"


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file with sorted metadata.

    The safetensors library writes metadata in random order, so files of equal content would differ in their checksums.
    """
    data = safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[METADATA] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors must begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]


def read(path: Path, largest: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, whatever its suffix.

    Raises:
        ValueError: The file is damaged or of another kind.
        OSError: It cannot be read, is not a regular file, or is larger than `largest` bytes.
    """
    data = read_regular(path, largest)
    try:
        tensors = safetensors.torch.load(data)
        metadata = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")]).get(METADATA) or {}
        return tensors, {key: str(value) for key, value in metadata.items()}
    except MemoryError:
        raise
    except Exception as error:  # damaged files make torch and safetensors raise many types
        raise _unreadable(data[:BEGINNING], error) from error


def open_mapped(path: Path) -> Any:
    """Open a file with safetensors' `safe_open`, which maps it into memory. Raises as `read` does."""
    with open_regular(path) as file:
        beginning = file.read(BEGINNING)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _unreadable(beginning, error) from error


def _unreadable(beginning: bytes, error: Exception) -> ValueError:
    kind = kind_of(beginning)
    if kind in (None, SAFETENSORS):
        return ValueError(f"is not a whole safetensors file ({first_line(error)})")
    return ValueError(f"is {kind}, not a safetensors file")
