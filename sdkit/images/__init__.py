"""Images: reading, writing, conversion to and from tensors, and grids."""

from __future__ import annotations

from sdkit.images.conditions import canny, colour_blocks, grey, outlines
from sdkit.images.convert import OUTPUT_TYPES, Images, from_tensors, to_pil, to_tensors, to_uint8
from sdkit.images.grid import grid
from sdkit.images.image_file import FORMATS, READABLE, UNREADABLE, read, read_text, save
from sdkit.images.rgb import to_rgb

__all__ = [
    "FORMATS",
    "Images",
    "OUTPUT_TYPES",
    "READABLE",
    "UNREADABLE",
    "canny",
    "colour_blocks",
    "from_tensors",
    "grey",
    "grid",
    "outlines",
    "read",
    "read_text",
    "save",
    "to_pil",
    "to_rgb",
    "to_tensors",
    "to_uint8",
]
