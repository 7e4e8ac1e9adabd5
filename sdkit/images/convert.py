"""Images in and out: files, PIL images, uint8 arrays, float tensors; grids of them.

Three representations:

- PIL image, of any mode; `to_rgb` makes it 8-bit RGB, upright and opaque;
- uint8 array (H, W), (H, W, 1|3|4) or (B, H, W, 1|3|4), in [0, 255];
- float tensor (3, H, W) or (B, 3, H, W), in [-1, 1]: what the networks work in. x = uint8 / 127.5 - 1.
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
"""Pillow's names of the formats that are read, and their suffixes. Pillow decodes all of them itself: of its other
readers, one starts an interpreter (EPS), and some open further files or are stubs for other programs."""
_OPTIONAL = {"JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif", "PNG": "zlib"}
_READ = tuple(kind for kind in SUFFIXES if kind not in _OPTIONAL or features.check(_OPTIONAL[kind]))
READABLE = frozenset(suffix for kind in _READ for suffix in SUFFIXES[kind])
"""Suffixes, in lower case, of what the installed Pillow reads."""
_KNOWN = """heic heif hif jxl jxr wdp cr2 cr3 crw nef nrw arw dng orf rw2 raf pef srw svg svgz eps ps ai pdf psd psb xcf
    kra exr hdr dds icns wmf emf mp4 m4v mov avi mkv webm"""
UNREADABLE = frozenset(f".{name}" for name in _KNOWN.split()).union(*SUFFIXES.values()) - READABLE
"""Suffixes of pictures that are not read: a search through a folder names them in a warning."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # that `save` writes
OUTPUT_TYPES = ("pil", "np", "pt")
BLOCK = 2**20  # pixels of a float image that are scaled at a time
LARGEST_PROFILE = 4 * 2**20  # bytes; those of printers take one or two million
SAME = 2  # levels by which a profile that stands for sRGB may differ from it
TOLERANCE = 1e-2  # by which a tensor may leave [-1, 1]: rounding of half precision and of resampling


def read(path: str | Path | BinaryIO, background: str = "white") -> Image.Image:
    """Read an image file (an animation's first frame) as `to_rgb` makes it. Raises `ImageError`, naming the file."""
    with _opened(path) as image:
        return to_rgb(image, background)


@contextlib.contextmanager
def _opened(path: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """The one place where an image file is opened: as one of the formats that are read, whatever its name says."""
    try:
        mode = Path(path).stat().st_mode if isinstance(path, (str, Path)) else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe might never end
            raise ImageError("it is not a regular file.")
        with Image.open(path, formats=_formats(str(path))) as image:
            yield image
    except (ArgumentError, MemoryError):
        raise  # the background's fault, or the machine's; not the file's
    except ImageError as error:
        raise ImageError(f"cannot read {clean(path)}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{clean(path)} is not an image{_instead(path)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) * (2 if isinstance(error, Image.DecompressionBombError) else 1)
        raise ImageError(
            f"{clean(path)} has too many pixels (over {limit // 10**6} million); resize it first."
        ) from error
    except Exception as error:  # on broken files Pillow's readers raise nearly anything
        raise stop_in(error) or ImageError(f"cannot read {clean(path)}: {_reason(error)}.") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _READ if kind in Image.OPEN)


def _formats(name: str) -> tuple[str, ...]:
    """The formats that a file of this name may have. TGA files have no signature, and nearly anything could be one: for
    them alone the suffix decides."""
    return tuple(kind for kind in _known_formats() if kind != "TGA" or name.lower().endswith(SUFFIXES["TGA"]))


def _instead(path: str | Path | BinaryIO) -> str:
    """The end of a sentence that says what a file is which is no image."""
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
    """A PIL image of any mode as 8-bit RGB in the colour space sRGB: rotated as its EXIF says, its embedded colour
    profile applied, transparency laid over `background`.

    Grey of 16 bits (modes "I;16" and "I") is scaled from [0, 65535]; float (mode "F") from [0, 1] where no value is
    above 1, else from [0, 255]. A profile that cannot be read is ignored with a warning. Raises `ImageError` for an
    image that is empty, broken or outside its range.
    """
    depth = _stored_as(image)
    try:
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # as in `_opened`
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
    rgb.info = {}  # the profile, the EXIF and the transparent colour were those of the file's pixels
    return rgb


def _blocks(image: Image.Image) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """(first row, float64 (rows, W)) of a grey image, a few rows at a time: all at once would take gigabytes."""
    rows = max(1, BLOCK // image.width)
    for top in range(0, image.height, rows):
        block = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.asarray(block, dtype=np.float64)


def _from_levels(image: Image.Image) -> Image.Image:
    """An image of mode "F", "I" or "I;16" in mode "L"."""
    low, high = np.array([(levels.min(), levels.max()) for _, levels in _blocks(image)]).T
    least, most = float(low.min()), float(high.max())
    peak = 65535 if image.mode != "F" else 255 if most > 1 else 1
    if not (least >= 0 and most <= peak):  # false for NaN too
        raise ImageError(
            f"an image of mode {image.mode} has values from {least:g} to {most:g}; scale it to [0, {peak}] first."
        )
    scaled = np.empty((image.height, image.width), np.uint8)
    for top, levels in _blocks(image):
        scaled[top : top + len(levels)] = np.round(levels * (255 / peak))
    return Image.fromarray(scaled)


def _laid_over(rgb: Image.Image, grey: Image.Image, key: Any, color: tuple[int, int, int]) -> Image.Image:
    """`rgb` with `color` where `grey`, of 16 bits, has the level `key`, which a PNG calls transparent."""
    for top, levels in _blocks(grey):
        rgb.paste(color, (0, top), Image.fromarray(levels == key))
    return rgb


def _stored_as(image: Image.Image) -> str:
    """Pillow's name of how a PNG that is not yet decoded stores its pixels; "" for any other image."""
    tiles = image.tile if isinstance(image, PngImageFile) else []
    return str(tiles[0][3]) if tiles else ""


def _keyrgb_of(key: Any, depth: str) -> Any:
    """A PNG's transparent colour in 8 bits: Pillow converts the pixels, and leaves the colour in the file's depth."""
    if depth == "RGB;16B" and isinstance(key, tuple):
        return tuple(level >> 8 for level in key)
    scale = {"L;2": 85, "L;4": 17}.get(depth)
    return key * scale if scale and isinstance(key, int) else key


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of 8 bits a channel whose colours `profile` describes, in sRGB; the same one where they are in sRGB
    already, or nothing is known of them."""
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
    """From the colours of a profile to sRGB, for images of this mode; None where there is nothing to convert."""
    if not features.check("littlecms2"):
        return None
    from PIL import ImageCms

    try:
        if len(profile) > LARGEST_PROFILE:
            raise ValueError("it is too large")
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(opened.profile.xcolor_space.strip(), "")
        if space not in {"L": ("L", "RGB")}.get(mode, (mode,)):  # grey may come with a profile of colours
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
    """Whether a transform to sRGB leaves colours as they are."""
    if space == "CMYK":
        return False
    steps = np.arange(0, 256, 17, dtype=np.uint8)  # 16 levels a channel
    levels = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(-1, 1, 3)
    probe = Image.fromarray(levels if space == "RGB" else steps[:, None])
    after = np.asarray(transform.apply(probe)).astype(int)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"))).max() <= SAME)


def rgb_of(color: str) -> tuple[int, int, int]:
    """Red, green, and blue, each in [0, 255], of a colour's name or hex code. Raises `ArgumentError` for others."""
    try:
        red, green, blue = ImageColor.getrgb(color)[:3]
    except ValueError as error:
        raise ArgumentError(f"{color!r} is not a colour; use a name or a form like '#ff8800'.") from error
    return red, green, blue


def to_tensors(images: Images) -> list[Tensor]:
    """Anything that holds images, or a list of such things, as float32 tensors (3, H, W) in [-1, 1], one per image.

    Sizes may differ. Paths are read; transparency is laid over white. Tensors keep their device and their gradient; one
    out of range by less than 1e-2 is taken as it is. Raises `ImageError` for what is no image or is of doubtful range.
    """
    return [_to_tensor(image) if isinstance(image, Image.Image) else image for image in flat(images)]


def _to_tensor(rgb: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)  # (3, H, W)
    return levels.contiguous().float() / 127.5 - 1


def flat(images: Images) -> list[Image.Image | Tensor]:
    """One entry per image: RGB where it was 8-bit, a float32 tensor (3, H, W) where it was a tensor."""
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
    """Float tensor (B, 3, H, W) or (3, H, W) in [-1, 1] -> uint8 array (B, H, W, 3), clamped and rounded.

    Inverts `to_tensors` exactly for all 256 levels. It still does where the tensor was stored as float16 or bfloat16 in
    between, since the arithmetic here is float32: in [-1, 1] bfloat16 errs by at most 1/512, a quarter of the step from
    one level to the next. (Arithmetic in bfloat16 would change levels.) Raises `ImageError` for NaN.
    """
    if not x.is_floating_point() or x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ImageError(f"a tensor {tuple(x.shape)} of {x.dtype} is no image; give float (B, 3, H, W) in [-1, 1].")
    batch = x.detach().float() if x.ndim == 4 else x.detach().float()[None]
    if torch.isnan(batch).any():
        raise ImageError("a tensor has values that are not numbers (NaN), which no pixel can show.")
    levels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(x: Tensor) -> list[Image.Image]:
    """Float tensor (B, 3, H, W) or (3, H, W) in [-1, 1] -> RGB images; as `to_uint8`."""
    return [Image.fromarray(levels) for levels in to_uint8(x)]


def from_tensors(images: Sequence[Tensor], output_type: str) -> Any:
    """Tensors (3, H, W) in [-1, 1] as "pil": a list of RGB images; "np": uint8 (B, H, W, 3); "pt": (B, 3, H, W).

    Where sizes differ, "np" and "pt" are lists of (H, W, 3) and (3, H, W). Raises `ArgumentError` for another type.
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
    """Write an image as RGB, whole or not at all, in the format of the path's suffix: .png, .jpg, .jpeg or .webp.

    `text` goes into a PNG's text chunks (keys of 1 to 79 Latin letters); the other formats have no place for it and go
    without. Raises `ArgumentError` for another suffix, `SdkitError` where the file cannot be written, and with
    `overwrite=False` `FileExistsError` where there is one.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ArgumentError(f"cannot write {path}: its suffix is not one of {', '.join(FORMATS)}.")
    options: dict[str, Any] = {"quality": 95}
    if suffix == ".png":
        options = {"pnginfo": PngInfo()}
        for key, value in (text or {}).items():
            options["pnginfo"].add_text(key, encodable(value))  # UTF-8 (iTXt) where Latin-1 does not hold it
    encoded = io.BytesIO()  # so that an error below is one of the disk
    rgb = to_rgb(image)
    try:
        rgb.save(encoded, FORMATS[suffix], **options)
    except (ValueError, OSError) as error:  # a side of more than 16,383 pixels in WebP, say
        raise ImageError(f"cannot make {path} of {rgb.width} x {rgb.height} pixels: {_reason(error)}.") from error
    with atomic_write(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def read_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG; empty for another format. Raises `ImageError` for what is not a whole image."""
    with _opened(path) as image:
        image.load()
        return {key: str(value) for key, value in image.text.items()} if isinstance(image, PngImageFile) else {}
