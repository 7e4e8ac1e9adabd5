"""Images: read, written, converted to and from tensors, and laid out in grids."""

from __future__ import annotations

from sdkit.images.convert import (
    FORMATS,
    OUTPUT_TYPES,
    READABLE,
    UNREADABLE,
    Images,
    from_tensors,
    read,
    read_text,
    save,
    to_pil,
    to_rgb,
    to_tensors,
    to_uint8,
)
from sdkit.images.grid import grid

__all__ = [
    "FORMATS",
    "Images",
    "OUTPUT_TYPES",
    "READABLE",
    "UNREADABLE",
    "from_tensors",
    "grid",
    "read",
    "read_text",
    "save",
    "to_pil",
    "to_rgb",
    "to_tensors",
    "to_uint8",
]
