"""Image files: reading, and atomic writing."""

from __future__ import annotations

import contextlib
import functools
import io
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngImageFile, PngInfo

from sdkit.atomic import atomic_write
from sdkit.errors import ArgumentError, ImageError
from sdkit.file_kind import AVIF, BEGINNING, GIF, JPEG, PNG, WEBP, kind_of
from sdkit.files import encodable
from sdkit.images.rgb import to_rgb
from sdkit.messages import clean, system_message
from sdkit.stops import stop_in

SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "ICO": (".ico",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
"""Pillow's name of each format that is read -> its suffixes.

Pillow decodes all of these itself. Its other readers are left out: one starts an interpreter (EPS), and some open
further files or are stubs for other programs."""
_OPTIONAL = {"JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif", "PNG": "zlib"}
"""Formats that a build of Pillow may lack -> the feature that they need."""
_READ = tuple(kind for kind in SUFFIXES if kind not in _OPTIONAL or features.check(_OPTIONAL[kind]))
READABLE = frozenset(suffix for kind in _READ for suffix in SUFFIXES[kind])
"""Suffixes, in lower case, of the files that the installed Pillow can read."""
_KNOWN = """heic heif hif jxl jxr wdp cr2 cr3 crw nef nrw arw dng orf rw2 raf pef srw svg svgz eps ps ai pdf psd psb xcf
    kra exr hdr dds icns wmf emf mp4 m4v mov avi mkv webm"""
UNREADABLE = frozenset(f".{name}" for name in _KNOWN.split()).union(*SUFFIXES.values()) - READABLE
"""Suffixes of image, video, and document files that sdkit cannot read. A folder search warns of such files."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix -> format that `save` writes."""


def read(path: str | Path | BinaryIO, background: str = "white") -> Image.Image:
    """Read an image file as 8-bit RGB, upright, and opaque (see `to_rgb`).

    Args:
        path: An image file, or an opened one; of an animation, the first frame is read.
        background: Colour behind transparent pixels: a name or a form like "#ff8800".

    Raises:
        ImageError: The file is missing, damaged, or no image; the message names it.
        ArgumentError: `background` is no colour.
    """
    with _opened(path) as image:
        return to_rgb(image, background)


@contextlib.contextmanager
def _opened(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image file, whatever its suffix. Faults of the file raise `ImageError`. No other code opens images."""
    if isinstance(path, str) and (not path or "://" in path):
        raise ImageError(f"{clean(repr(path))} is {'a URL' if path else 'no name'}; give the path of an image file.")
    try:
        mode = Path(path).stat().st_mode if isinstance(path, (str, Path)) else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe might never end
            raise ImageError("it is not a regular file.")
        with Image.open(path, formats=_formats(str(path))) as image:
            yield image
    except (ArgumentError, MemoryError):
        raise  # not the file's fault: a bad background colour, or too little memory
    except ImageError as error:
        raise ImageError(f"cannot read {clean(path)}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{clean(path)} is not an image{_instead(path)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) * (2 if isinstance(error, Image.DecompressionBombError) else 1)
        raise ImageError(
            f"{clean(path)} has too many pixels (over {limit // 10**6} million); resize it first."
        ) from error
    except Exception as error:  # Pillow's readers raise nearly anything for damaged files
        raise stop_in(error) or ImageError(f"cannot read {clean(path)}: {system_message(error)}.") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _READ if kind in Image.OPEN)


def _formats(name: str) -> tuple[str, ...]:
    """Return the formats to try for a file of this name.

    TGA is tried only for its own suffixes: it has no signature, so nearly any file could be one.
    """
    return tuple(kind for kind in _known_formats() if kind != "TGA" or name.lower().endswith(SUFFIXES["TGA"]))


def _instead(path: str | Path | BinaryIO) -> str:
    """Return the end of a sentence that says what the file is, given that it is no image."""
    head = b""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(path, (str, Path)):
            with Path(path).open("rb") as file:
                head = file.read(BEGINNING)
        else:
            path.seek(0)
            head = path.read(BEGINNING)
    kind = kind_of(head)
    if kind in (PNG, JPEG, GIF, WEBP) or (kind == AVIF and AVIF in _known_formats()):
        return f": it begins as {kind} does, but is damaged"
    return f" that can be read here, but {kind}" if kind else ", or of a format that is not read here"


def save(
    image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None, *, overwrite: bool = True
) -> None:
    """Write an image as RGB, atomically.

    Args:
        image: The image, of any mode; see `to_rgb`.
        path: The file; its suffix is the format: .png, .jpg, .jpeg, or .webp.
        text: Text chunks of a PNG, with keys of 1 to 79 Latin letters. Ignored for other formats.
        overwrite: Replace an existing file.

    Raises:
        ArgumentError: The suffix is unknown.
        ImageError: The format cannot hold an image of this size.
        FileExistsError: `overwrite` is false and the file exists.
        SdkitError: The file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ArgumentError(f"cannot write {path}: its suffix is not one of {', '.join(FORMATS)}.")
    options: dict[str, Any] = {"quality": 95}
    if suffix == ".png":
        options = {"pnginfo": PngInfo()}
        for key, value in (text or {}).items():
            options["pnginfo"].add_text(key, encodable(value))  # Pillow writes UTF-8 (iTXt) if Latin-1 is not enough
    encoded = io.BytesIO()  # encode in memory first: any later error comes from the disk
    rgb = to_rgb(image)
    try:
        rgb.save(encoded, FORMATS[suffix], **options)
    except (ValueError, OSError) as error:  # e.g. a side of over 16,383 pixels in WebP
        raise ImageError(
            f"cannot make {path} of {rgb.width} x {rgb.height} pixels: {system_message(error)}."
        ) from error
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def read_text(path: str | Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty for other formats. Raises ImageError if the image is damaged."""
    with _opened(path) as image:
        image.load()
        return {key: str(value) for key, value in image.text.items()} if isinstance(image, PngImageFile) else {}
