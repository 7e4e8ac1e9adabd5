"""Conversion of PIL images of any mode and colour profile to 8-bit sRGB."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageOps, features
from PIL.PngImagePlugin import PngImageFile

from sdkit.errors import ArgumentError, ImageError
from sdkit.messages import system_message
from sdkit.stops import stop_in

BLOCK = 2**20
"""Number of pixels of a grey image that are converted at a time."""
LARGEST_PROFILE = 4 * 2**20
"""Size of the largest colour profile that is read, in bytes. Printers' profiles have one or two million."""
SAME = 2
"""Largest difference, in levels of 255, between sRGB and a profile that is treated as sRGB."""


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert a PIL image of any mode to 8-bit sRGB.

    The image is rotated as its EXIF says, its embedded colour profile is applied, and transparency is laid over
    `background`. 16-bit grey (modes "I;16" and "I") is scaled from [0, 65535]. Float (mode "F") is scaled from [0, 1]
    if no value is above 1, and otherwise from [0, 255]. A profile that cannot be read is ignored with a warning.

    Args:
        image: The image, of any mode.
        background: Colour behind transparent pixels: a name or a form like "#ff8800".

    Raises:
        ImageError: The image is empty, damaged, or has values outside its range.
        ArgumentError: `background` is no colour.
    """
    if not isinstance(image, Image.Image):
        raise ImageError(f"type {type(image).__name__} is no PIL image; sdkit.images.read opens a file.")
    depth = _stored_as(image)
    try:
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise nearly anything here too
        raise stop_in(error) or ImageError(f"the image cannot be decoded ({system_message(error)}).") from error
    if 0 in upright.size:
        raise ImageError(f"an image of {upright.width} x {upright.height} pixels is empty.")
    color = rgb_of(background)
    profile = upright.info.get("icc_profile")
    if upright.mode == "F" or upright.mode.startswith("I"):
        rgb = _in_srgb(_from_levels(upright), profile).convert("RGB")
        key = upright.info.get("transparency")
        return rgb if key is None else _laid_over(rgb, upright, key, color)
    try:
        if "transparency" in upright.info:
            upright.info["transparency"] = _keyrgb_of(upright.info["transparency"], depth)
        upright = _in_srgb(upright, profile)
        if upright.has_transparency_data:
            opaque = Image.new("RGBA", upright.size, color)
            opaque.alpha_composite(upright.convert("RGBA"))
            upright = opaque
        rgb = upright.convert("RGB")
    except ValueError as error:
        raise ImageError(f"an image of mode {upright.mode} cannot be converted to RGB; do so elsewhere.") from error
    rgb.info = {}  # profile, EXIF, and transparent colour no longer describe these pixels
    return rgb


def _blocks(image: Image.Image) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yield (first row, float64 (rows, W)) of a grey image in blocks; a whole image could take gigabytes."""
    rows = max(1, BLOCK // image.width)
    for top in range(0, image.height, rows):
        block = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.asarray(block, dtype=np.float64)


def _from_levels(image: Image.Image) -> Image.Image:
    """Convert an image of mode "F", "I", or "I;16" to mode "L"."""
    low, high = np.array([(levels.min(), levels.max()) for _, levels in _blocks(image)]).T
    least, most = float(low.min()), float(high.max())
    peak = 65535
    if image.mode == "F":
        peak = 255 if most > 1 else 1
    if not (least >= 0 and most <= peak):  # NaN fails every comparison
        raise ImageError(
            f"an image of mode {image.mode} has values from {least:g} to {most:g}; scale it to [0, {peak}] first."
        )
    scaled = np.empty((image.height, image.width), np.uint8)
    for top, levels in _blocks(image):
        scaled[top : top + len(levels)] = np.round(levels * (255 / peak))
    return Image.fromarray(scaled)


def _laid_over(rgb: Image.Image, grey: Image.Image, key: Any, color: tuple[int, int, int]) -> Image.Image:
    """Paint `color` over `rgb`, in place, where the 16-bit image `grey` has its transparent level `key`."""
    for top, levels in _blocks(grey):
        rgb.paste(color, (0, top), Image.fromarray(levels == key))
    return rgb


def _stored_as(image: Image.Image) -> str:
    """Return Pillow's name for the pixel format stored in a PNG that is not yet decoded; "" for other images."""
    tiles = image.tile if isinstance(image, PngImageFile) else []
    return str(tiles[0][3]) if tiles else ""


def _keyrgb_of(key: Any, depth: str) -> Any:
    """Convert a PNG's transparent colour to 8 bits. Pillow converts the pixels, but leaves this colour as stored."""
    if depth == "RGB;16B" and isinstance(key, tuple):
        return tuple(level >> 8 for level in key)
    scale = {"L;2": 85, "L;4": 17}.get(depth)
    return key * scale if scale and isinstance(key, int) else key


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of 8 bits per channel from the colours of `profile` to sRGB.

    Returns the image itself if the profile is missing or unusable, or is sRGB.
    """
    mode = {"L": "L", "LA": "L", "CMYK": "CMYK", "P": "RGB", "PA": "RGB", "RGB": "RGB", "RGBA": "RGB"}.get(image.mode)
    transform = _transform(bytes(profile), mode) if profile and mode else None
    if transform is None:
        return image
    converted = image.convert(transform.input_mode)
    colors = Image.new("RGB", image.size)
    transform.apply(converted, colors)
    if image.has_transparency_data:
        colors.putalpha(image.convert("RGBA").getchannel("A"))
    return colors


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """Build the transform from a profile to sRGB for images of this mode; None if there is nothing to convert."""
    if not features.check("littlecms2"):
        return None
    from PIL import ImageCms

    try:
        if len(profile) > LARGEST_PROFILE:
            raise ValueError("it is too large")
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip(), "")
        if space not in {"L": ("L", "RGB")}.get(mode, (mode,)):  # a grey image may have an RGB profile
            raise ValueError("it is of another kind of image")
        transform = ImageCms.buildTransform(
            opened, ImageCms.createProfile("sRGB"), space, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
    except Exception:  # noqa: BLE001 - on damaged profiles ImageCms raises several types
        message = "an image's colour profile cannot be read; its colours are taken for sRGB"
        warnings.warn(f"{message}, and may look pale.", stacklevel=2)
        return None
    return None if _is_srgb(transform, space) else transform


def _is_srgb(transform: Any, space: str) -> bool:
    """Return whether a transform to sRGB changes no colour by more than `SAME` levels."""
    if space == "CMYK":
        return False
    steps = np.arange(0, 256, 17, dtype=np.uint8)  # 16 levels per channel
    levels = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(-1, 1, 3)
    probe = Image.fromarray(levels if space == "RGB" else steps[:, None])
    after = np.asarray(transform.apply(probe)).astype(int)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"))).max() <= SAME)


def rgb_of(color: str) -> tuple[int, int, int]:
    """Return red, green, and blue in [0, 255] of a colour's name or hex code. Raises ArgumentError for others."""
    try:
        red, green, blue = ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ArgumentError(f"{color!r} is not a colour; use a name or a form like '#ff8800'.") from error
    return red, green, blue
