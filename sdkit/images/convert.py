"""Images read, written, and converted between files, PIL images, uint8 arrays, and float tensors.

There are three representations:

- PIL image of any mode. `to_rgb` makes it 8-bit RGB, upright, and opaque.
- uint8 array (H, W), (H, W, 1|3|4), or (B, H, W, 1|3|4), in [0, 255].
- float tensor (3, H, W) or (B, 3, H, W), in [-1, 1], as the networks take it: x = uint8 / 127.5 - 1.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from sdkit.arguments import one_of
from sdkit.atomic import atomic_write
from sdkit.errors import ArgumentError, ImageError
from sdkit.file_kind import AVIF, BEGINNING, GIF, JPEG, PNG, WEBP, kind_of
from sdkit.files import encodable
from sdkit.messages import clean, first_line
from sdkit.stops import stop_in

OneImage: TypeAlias = "Image.Image | npt.NDArray[Any] | Tensor | str | Path"
Images: TypeAlias = "OneImage | Sequence[OneImage]"

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
"""Suffixes of pictures that cannot be read. A search through a folder warns of them."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffix -> format that `save` writes."""
OUTPUT_TYPES = ("pil", "np", "pt")
BLOCK = 2**20
"""Pixels of a grey image that are converted at a time."""
LARGEST_PROFILE = 4 * 2**20
"""Bytes of the largest colour profile that is read. Printers' profiles have one or two million."""
SAME = 2
"""Levels, of 255, by which a profile that stands for sRGB may differ from it."""
TOLERANCE = 1e-2
"""How far a tensor may exceed [-1, 1], by rounding in half precision or by resampling."""


def read(path: str | Path | BinaryIO, background: str = "white") -> Image.Image:
    """Read an image file as 8-bit RGB, upright, and opaque (see `to_rgb`).

    Args:
        path: an image file, or an opened one; of an animation, the first frame is read.
        background: colour behind transparent pixels: a name or a form like "#ff8800".

    Raises:
        ImageError: if the file is missing, damaged, or no image; the message names it.
        ArgumentError: if `background` is no colour.
    """
    with _opened(path) as image:
        return to_rgb(image, background)


@contextlib.contextmanager
def _opened(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image file, whatever its suffix, and raise every problem as `ImageError`. No other code opens images."""
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
        raise stop_in(error) or ImageError(f"cannot read {clean(path)}: {_reason(error)}.") from error


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
    """Say what a file is that is no image, as the end of a sentence."""
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


def _reason(error: Exception) -> str:
    return clean(error.strerror) if isinstance(error, OSError) and error.strerror else first_line(error)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert a PIL image of any mode to 8-bit sRGB.

    The image is rotated as its EXIF says, its embedded colour profile is applied, and transparency is laid over
    `background`. 16-bit grey (modes "I;16" and "I") is scaled from [0, 65535]. Float (mode "F") is scaled from [0, 1]
    if no value is above 1, and otherwise from [0, 255]. A profile that cannot be read is ignored with a warning.

    Args:
        image: the image, of any mode.
        background: colour behind transparent pixels: a name or a form like "#ff8800".

    Raises:
        ImageError: if the image is empty, damaged, or has values outside its range.
        ArgumentError: if `background` is no colour.
    """
    depth = _stored_as(image)
    try:
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise nearly anything here too
        raise stop_in(error) or ImageError(f"the image cannot be decoded ({_reason(error)}).") from error
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
    """Yield (first row, float64 (rows, W)) of a grey image in blocks; in one piece it could take gigabytes."""
    rows = max(1, BLOCK // image.width)
    for top in range(0, image.height, rows):
        block = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.asarray(block, dtype=np.float64)


def _from_levels(image: Image.Image) -> Image.Image:
    """Convert an image of mode "F", "I", or "I;16" to mode "L"."""
    low, high = np.array([(levels.min(), levels.max()) for _, levels in _blocks(image)]).T
    least, most = float(low.min()), float(high.max())
    peak = 65535 if image.mode != "F" else 255 if most > 1 else 1
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
    """Tell whether a transform to sRGB changes no colour by more than `SAME` levels."""
    if space == "CMYK":
        return False
    steps = np.arange(0, 256, 17, dtype=np.uint8)  # 16 levels per channel
    levels = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(-1, 1, 3)
    probe = Image.fromarray(levels if space == "RGB" else steps[:, None])
    after = np.asarray(transform.apply(probe)).astype(int)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"))).max() <= SAME)


def rgb_of(color: str) -> tuple[int, int, int]:
    """Return red, green, and blue in [0, 255] of a colour's name or hex code. Raises `ArgumentError` for others."""
    try:
        red, green, blue = ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ArgumentError(f"{color!r} is not a colour; use a name or a form like '#ff8800'.") from error
    return red, green, blue


def to_tensors(images: Images) -> list[Tensor]:
    """Convert anything that holds images to float32 tensors (3, H, W) in [-1, 1], one per image.

    Args:
        images: a PIL image, array, tensor, path, or a list of these; sizes may differ. Paths are read, and transparency
            is laid over white. Tensors keep their device and their gradient, and may exceed [-1, 1] by 1e-2.

    Raises:
        ImageError: if something is no image, or has another range of values.
    """
    return [_to_tensor(image) if isinstance(image, Image.Image) else image for image in flat(images)]


def _to_tensor(rgb: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)  # (3, H, W)
    return levels.contiguous().float() / 127.5 - 1


def flat(images: Images) -> list[Image.Image | Tensor]:
    """Return one entry per image: a tensor stays a tensor, float32 (3, H, W); all else becomes an RGB image."""
    if isinstance(images, Image.Image):
        return [to_rgb(images)]
    if isinstance(images, (str, Path)):
        return [read(images)]
    if isinstance(images, np.ndarray):
        return [*_from_array(images)]
    if isinstance(images, Tensor):
        return [*_checked(images)]
    if not isinstance(images, (list, tuple)):
        raise ImageError(f"type {type(images).__name__} is no image; give PIL images, arrays, tensors or paths.")
    if not images:
        raise ImageError("the list of images is empty; give at least one.")
    return [image for item in images for image in flat(item)]


def _from_array(array: npt.NDArray[Any]) -> list[Image.Image]:
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype} has no certain range; give uint8 in [0, 255], "
            "or a float tensor (B, 3, H, W) in [-1, 1]."
        )
    batch = array[None, ..., None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape:
        raise ImageError(f"an array of shape {array.shape} is no image; give (H, W), (H, W, 1|3|4), (B, H, W, 1|3|4).")
    return [to_rgb(Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one)) for one in batch]


def _checked(x: Tensor) -> Tensor:  # -> (B, 3, H, W)
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or batch.shape[1] != 3 or 0 in batch.shape:
        raise ImageError(f"a tensor of shape {tuple(x.shape)} is no image; give (3, H, W) or (B, 3, H, W), RGB.")
    if not x.is_floating_point():
        raise ImageError(f"a tensor of {x.dtype} is not in [-1, 1]; convert values in [0, 255] by x / 127.5 - 1.")
    low, high = (float(bound) for bound in torch.aminmax(batch.detach().float()))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ImageError("a tensor has values that are not finite; an image's are in [-1, 1].")
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise ImageError(
            f"a tensor has values from {low:.4g} to {high:.4g}, outside [-1, 1]; "
            "convert values in [0, 255] by x / 127.5 - 1, in [0, 1] by x * 2 - 1, and clamp what is slightly outside."
        )
    return batch.float()


def to_uint8(x: Tensor) -> npt.NDArray[np.uint8]:
    """Convert a float tensor to 8-bit levels, rounded and clamped.

    This inverts `to_tensors` exactly for all 256 levels, even if the tensor was stored as float16 or bfloat16 in
    between. In [-1, 1], bfloat16 errs by at most 1/512, which is a quarter of the step between two levels. The
    arithmetic here is float32; in bfloat16 it would change levels.

    Args:
        x: float tensor (B, 3, H, W) or (3, H, W) in [-1, 1].

    Returns:
        uint8 array (B, H, W, 3).

    Raises:
        ImageError: if the tensor has another shape or dtype, or holds NaN.
    """
    if not x.is_floating_point() or x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ImageError(f"a tensor {tuple(x.shape)} of {x.dtype} is no image; give float (B, 3, H, W) in [-1, 1].")
    batch = x.detach().float() if x.ndim == 4 else x.detach().float()[None]
    if torch.isnan(batch).any():
        raise ImageError("a tensor has values that are not numbers (NaN), which no pixel can show.")
    levels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(x: Tensor) -> list[Image.Image]:
    """Convert a float tensor (B, 3, H, W) or (3, H, W) in [-1, 1] to RGB images; see `to_uint8`."""
    return [Image.fromarray(levels) for levels in to_uint8(x)]


def from_tensors(images: Sequence[Tensor], output_type: str) -> Any:
    """Convert tensors (3, H, W) in [-1, 1] to the type of output that a user asked for.

    Returns:
        "pil": a list of RGB images. "np": a uint8 array (B, H, W, 3). "pt": a tensor (B, 3, H, W). If sizes differ,
        "np" and "pt" are lists of (H, W, 3) and (3, H, W).

    Raises:
        ArgumentError: for another `output_type`.
    """
    one_of("output_type", output_type, OUTPUT_TYPES)
    same_size = len({image.shape for image in images}) == 1
    if output_type == "pt":
        return torch.stack(list(images)) if same_size else list(images)
    levels = [to_uint8(image)[0] for image in images]
    if output_type == "np":
        return np.stack(levels) if same_size else levels
    return [Image.fromarray(one) for one in levels]


def save(
    image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None, *, overwrite: bool = True
) -> None:
    """Write an image as RGB, atomically.

    Args:
        image: the image, of any mode; see `to_rgb`.
        path: the file; its suffix is the format: .png, .jpg, .jpeg, or .webp.
        text: text chunks of a PNG, with keys of 1 to 79 Latin letters. Ignored for other formats.
        overwrite: replace an existing file.

    Raises:
        ArgumentError: if the suffix is another.
        ImageError: if the format cannot hold an image of this size.
        FileExistsError: if `overwrite` is false and the file exists.
        SdkitError: if the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ArgumentError(f"cannot write {path}: its suffix is not one of {', '.join(FORMATS)}.")
    options: dict[str, Any] = {"quality": 95}
    if suffix == ".png":
        options = {"pnginfo": PngInfo()}
        for key, value in (text or {}).items():
            options["pnginfo"].add_text(key, encodable(value))  # Pillow writes UTF-8 (iTXt) if Latin-1 is not enough
    encoded = io.BytesIO()  # encode in memory first: later errors can only be the disk's
    rgb = to_rgb(image)
    try:
        rgb.save(encoded, FORMATS[suffix], **options)
    except (ValueError, OSError) as error:  # e.g. a side of over 16,383 pixels in WebP
        raise ImageError(f"cannot make {path} of {rgb.width} x {rgb.height} pixels: {_reason(error)}.") from error
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def read_text(path: str | Path) -> dict[str, str]:
    """Return the text chunks of a PNG; empty for other formats. Raises `ImageError` if the image is damaged."""
    with _opened(path) as image:
        image.load()
        return {key: str(value) for key, value in image.text.items()} if isinstance(image, PngImageFile) else {}
