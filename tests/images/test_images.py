from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import ExifTags, Image, ImageCms, ImageOps

from sdkit import images
from sdkit.errors import ArgumentError, ImageError, SdkitError
from sdkit.images import image_file, rgb
from tests.helpers.color_profiles import (
    ADOBE,
    BRADFORD,
    D50,
    D65,
    P3,
    SRGB,
    expected_srgb,
    icc,
    matrix_profile,
    s15,
    srgb_levels,
    to_xyz,
)

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # (H, W, 3)


def tensor(array: Any) -> torch.Tensor:
    """Convert (H, W, 3) uint8 to (3, H, W), in another way than the package does."""
    return torch.tensor((np.asarray(array, dtype=np.float64) / 127.5 - 1).transpose(2, 0, 1), dtype=torch.float32)


# to_rgb: modes


def test_eight_bit_modes_keep_their_pixels() -> None:
    grey = Image.fromarray(SMALL[..., 0])
    as_grey = np.repeat(SMALL[..., :1], 3, axis=2)
    assert np.array_equal(images.to_rgb(Image.fromarray(SMALL)), SMALL)
    assert np.array_equal(images.to_rgb(grey), as_grey)
    assert np.array_equal(images.to_rgb(grey.convert("LA")), as_grey)
    assert np.array_equal(images.to_rgb(Image.fromarray(SMALL).convert("RGBA")), SMALL)
    assert np.array_equal(images.to_rgb(Image.fromarray(SMALL).convert("RGBX")), SMALL)
    palette = Image.fromarray(SMALL).quantize(256)
    assert palette.mode == "P"
    assert np.array_equal(images.to_rgb(palette), SMALL)
    bits = Image.fromarray(SMALL[..., 0] > 127)
    assert bits.mode == "1"
    assert np.array_equal(images.to_rgb(bits), (as_grey > 127) * np.uint8(255))


@pytest.mark.parametrize(("mode", "tolerance"), [("CMYK", 0), ("YCbCr", 3), ("HSV", 7)])
def test_other_colour_spaces_are_converted(mode: str, tolerance: int) -> None:
    image = Image.fromarray(SMALL).convert(mode)
    difference = np.asarray(images.to_rgb(image)).astype(int) - SMALL
    assert abs(difference).max() <= tolerance


def test_a_mode_that_pillow_cannot_convert_is_one_sentence() -> None:
    with pytest.raises(ImageError, match=r"^an image of mode La cannot be converted to RGB"):
        images.to_rgb(Image.new("La", (2, 2)))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    levels = np.array([[0, 1, 128, 129], [32767, 32768, 65406, 65535]], dtype=np.uint16)
    if mode == "I":
        image = Image.fromarray(levels.astype(np.int32))
    else:
        image = Image.frombytes(mode, (4, 2), levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    assert np.array_equal(np.asarray(images.to_rgb(image))[..., 0], np.round(levels / 257))


def test_eight_bits_stored_in_sixteen_come_back_exactly() -> None:
    levels = np.arange(256, dtype=np.uint16)[None] * 257
    assert np.array_equal(np.asarray(images.to_rgb(Image.fromarray(levels)))[..., 1], levels // 257)


def test_float_grey_is_scaled_from_0_1_or_0_255() -> None:
    unit = np.array([[0, 0.25, 1]], dtype=np.float32)
    assert np.asarray(images.to_rgb(Image.fromarray(unit)))[0, :, 0].tolist() == [0, 64, 255]
    assert np.asarray(images.to_rgb(Image.fromarray(unit * 250)))[0, :, 0].tolist() == [0, 62, 250]


@pytest.mark.parametrize(
    "levels",
    [
        np.int32([[0, 65536]]),
        np.int32([[-1, 0]]),
        np.float32([[0, 256]]),
        np.float32([[-0.1, 1]]),
        np.float32([[np.nan]]),
    ],
)
def test_grey_outside_its_range_is_refused(levels: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"^an image of mode [IF] has values from .*; scale it to \[0, \d+\] first\.$"):
        images.to_rgb(Image.fromarray(levels))


@pytest.mark.parametrize(("background", "color"), [("white", (255, 255, 255)), ("#ff8000", (255, 128, 0))])
def test_transparency_is_laid_over_the_background(background: str, color: tuple[int, int, int]) -> None:
    alpha = np.array([[0, 51, 128, 255]], dtype=np.uint8)
    rgba = np.dstack([np.full((1, 4, 3), 40, np.uint8), alpha])
    expected = (40 * (alpha / 255)[..., None] + np.array(color) * (1 - alpha / 255)[..., None]).round()
    for image in (Image.fromarray(rgba), Image.fromarray(rgba).convert("LA"), Image.fromarray(rgba).convert("RGBa")):
        difference = np.asarray(images.to_rgb(image, background)) - expected
        assert abs(difference).max() <= (1 if image.mode != "RGBa" else 3)  # premultiplying loses levels


def test_palette_and_key_colour_transparency(tmp_path: Path) -> None:
    # Transparency can be one entry of the palette, given by a table of alphas or by its number, or one colour of RGB.
    indices = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    indices.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    for transparency in (bytes([255, 0, 255]), 1):
        indices.save(tmp_path / "p.png", transparency=transparency)
        with Image.open(tmp_path / "p.png") as image:
            assert image.mode == "P"
        assert np.asarray(images.read(tmp_path / "p.png"))[0, :, 0].tolist() == [10, 255, 30]
    Image.fromarray(np.uint8([[[10] * 3, [20] * 3]])).save(tmp_path / "rgb.png", transparency=(20, 20, 20))
    assert np.asarray(images.read(tmp_path / "rgb.png", "black"))[0, :, 0].tolist() == [10, 0]


def test_background_must_be_a_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1)).save(tmp_path / "a.png")
    for image in (Image.new("RGBA", (1, 1)), tmp_path / "a.png"):
        with pytest.raises(ArgumentError, match=r"^'whitish' is not a colour"):
            (images.read if isinstance(image, Path) else images.to_rgb)(image, "whitish")


# read


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    # Rotations (3, 6, 8) and mirror images as array operations, independent of Pillow's constants.
    shown = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation]
    stored = np.kron(np.uint8([[0, 80, 160], [255, 200, 40]]), np.ones((16, 16), np.uint8))[..., None].repeat(3, 2)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(stored).save(tmp_path / f"image{suffix}", exif=exif, **options)
    image = images.read(tmp_path / f"image{suffix}")
    assert image.mode == "RGB"
    difference = np.asarray(image).astype(int) - shown(stored)
    assert abs(difference).max() <= (8 if suffix == ".jpg" else 0)
    # The orientation is removed, so that the image is not rotated twice.
    assert np.array_equal(ImageOps.exif_transpose(image), image)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "L"), ("a.png", "LA"), ("a.png", "RGBA"), ("a.png", "P"), ("a.png", "1"), ("a.png", "I;16"),
        ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.gif", "P"), ("a.bmp", "RGB"), ("a.webp", "RGBA"), ("a.ppm", "RGB"),
        ("a.tif", "F"), ("a.tif", "I;16"), ("a.tif", "CMYK"), ("a.tif", "LAB"),
    ],
)  # fmt: skip
def test_reads_files_of_each_mode(tmp_path: Path, name: str, mode: str) -> None:
    white = {"F": 1.0, "I;16": 65535, "CMYK": (0, 0, 0, 0), "LAB": (255, 128, 128)}.get(mode)
    image = Image.new(mode, (4, 3), white) if white else Image.new("RGB", (4, 3), "white").convert(mode)
    image.save(tmp_path / name)
    result = images.read(str(tmp_path / name))
    assert (result.mode, result.size) == ("RGB", (4, 3))
    assert np.asarray(result).min() >= 254


def test_only_the_pixels_are_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "someone"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(SMALL).save(tmp_path / "a.png", exif=exif, icc_profile=profile, dpi=(72, 72))
    images.save(images.read(tmp_path / "a.png"), tmp_path / "b.png", {"prompt": "a"})
    with Image.open(tmp_path / "b.png") as image:
        assert image.info == {"prompt": "a"}


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(images.read(tmp_path / name), frames[0])


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_one_sentence(tmp_path: Path, kind: str) -> None:
    whole = encoded(kind)
    for length in (0, 1, 10, 30, len(whole) // 3, len(whole) * 9 // 10):
        path = tmp_path / f"cut-{length}.{kind.lower()}"
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=r"^[^\n]*cut-\d+[^\n]*\.$"):
            images.read(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_corrupted_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    whole = encoded(kind)
    path = tmp_path / "broken"
    for _ in range(150):
        bytes_ = np.frombuffer(whole, np.uint8).copy()
        hits = RNG.integers(0, min(len(whole), 300), 4)  # damage the start, because headers are the most fragile part
        bytes_[hits] = RNG.integers(0, 256, 4)
        path.write_bytes(bytes_.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ignore Pillow's warnings about odd metadata
            try:
                assert images.read(path).mode == "RGB"
            except ImageError as error:
                assert "broken" in str(error)  # noqa: PT017 - reading may also succeed
                assert "\n" not in str(error)  # noqa: PT017


def test_what_is_no_image_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("This is not a picture.")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, sentence in (
        ("text.png", r"text\.png is not an image, or of a format that is not read here\.$"),
        ("empty.png", r"empty\.png is not an image"),
        ("folder.png", r"^cannot read .*folder\.png: Is a directory\."),
        ("missing.png", r"^cannot read .*missing\.png: No such file or directory\."),
        ("n" * 300, r"^cannot read .*: File name too long\."),
        ("nul\0.png", r"^cannot read .*: embedded null byte\."),
    ):
        with pytest.raises(ImageError, match=sentence):
            images.read(tmp_path / name)


def test_decompression_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 10000)).save(path)  # 200 megapixels in a few kilobytes, which exceeds Pillow's own limit
    with pytest.raises(ImageError, match=r"bomb\.png has too many pixels \(over 178 million\); resize it first\.$"):
        images.read(path)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n", "PostScript"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x20ftypisom", "a video"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"<!DOCTYPE html>\n<html>", r"a web page \(HTML\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_what_is_in_a_file_of_another_kind_is_told(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ImageError, match=rf"x\.png is not an image that can be read here, but {kind}\.$"):
        images.read(tmp_path / "x.png")
    with pytest.raises(ImageError, match=rf" is not an image that can be read here, but {kind}\.$"):
        images.read(io.BytesIO(data))


def test_no_reader_runs_a_program_or_opens_another_file() -> None:
    """Some of Pillow's formats are unsafe: Ghostscript reads EPS; WMF, HDF5, GRIB, and BUFR are passed to other code;
    FPX, MIC, and IPTC open more files.
    """
    foreign = {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "FPX", "MIC", "IPTC", "FITS", "MPEG", "PSD", "PCD"}
    assert not foreign & set(image_file._formats("x.eps"))
    assert "TGA" not in image_file._formats("x.png")


@pytest.mark.parametrize("suffix", sorted(images.READABLE - {".mpo", ".pfm", ".apng", ".avifs"}))
def test_each_suffix_that_is_called_readable_is_read(tmp_path: Path, suffix: str) -> None:
    kind = next(kind for kind, suffixes in image_file.SUFFIXES.items() if suffix in suffixes)
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    stored = Image.fromarray(np.kron(SMALL[:2, :2], np.ones((16, 16, 1), np.uint8))).convert(mode)
    stored.save(tmp_path / f"a{suffix}", kind, **({"quality": 95} if kind in ("JPEG", "AVIF", "WEBP") else {}))
    again = np.asarray(images.read(tmp_path / f"a{suffix}")).astype(int)
    difference = np.abs(again - np.asarray(stored.convert("RGB")))
    assert difference.mean() <= (12 if kind in ("JPEG", "AVIF", "WEBP") else 0)


def test_several_pictures_of_a_camera_are_one_image(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert np.asarray(images.read(tmp_path / "a.jpg"))[0, 0].tolist() == [254, 0, 0]


def png_of(bits: int, kind: int, row: bytes, width: int, key: bytes = b"") -> io.BytesIO:
    """Write a PNG of one row in any depth and colour type, which Pillow cannot, with `key` as its tRNS chunk."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">2I5B", width, 1, bits, kind, 0, 0, 0))
    rest = (chunk(b"tRNS", key) if key else b"") + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + rest)


GREY, RGB, GREY_ALPHA = 0, 2, 4  # colour types of PNG
KEY = struct.pack(">3H", 1000, 2000, 3000)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png_of(16, GREY, struct.pack(">2H", 1000, 60000), 2, struct.pack(">H", 1000)), [[255] * 3, [233] * 3]),
        (png_of(16, GREY_ALPHA, struct.pack(">4H", 257 * 40, 0, 257 * 40, 65535), 2), [[255] * 3, [40] * 3]),
        (png_of(16, RGB, struct.pack(">6H", 1000, 2000, 3000, 257, 514, 771), 2, KEY), [[255] * 3, [1, 2, 3]]),
        (png_of(4, GREY, b"\x5a", 2, struct.pack(">H", 5)), [[255] * 3, [170] * 3]),
        (png_of(2, GREY, b"\x70", 2, struct.pack(">H", 1)), [[255] * 3, [255] * 3]),
        (png_of(1, GREY, b"\x40", 2, struct.pack(">H", 0)), [[255] * 3, [255] * 3]),
        (png_of(8, GREY, b"\x05\x06", 2, struct.pack(">H", 5)), [[255] * 3, [6] * 3]),
    ],
    ids=["grey 16", "grey and alpha 16", "RGB 16", "grey 4", "grey 2", "grey 1", "grey 8"],
)  # fmt: skip
def test_the_transparent_colour_is_white_in_every_depth(file: io.BytesIO, expected: list[list[int]]) -> None:
    assert np.asarray(images.read(file))[0].tolist() == expected


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_grey_is_scaled_block_by_block_as_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rgb, "BLOCK", 100)  # two rows of 40 columns at a time
    dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
    levels = (RNG.random((7, 40)) * (200 if mode == "F" else 65535)).astype(dtype)
    peak = 255 if mode == "F" else 65535
    expected = np.round(levels.astype(np.float64) * (255 / peak)).astype(np.uint8)
    assert np.array_equal(np.asarray(images.to_rgb(Image.fromarray(levels)))[..., 0], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_a_float_image_takes_no_gigabytes(tmp_path: Path) -> None:
    """The image is just below Pillow's limit of pixels. A copy in float64 would take 1.1 GB alone."""
    code = (
        "import resource, sys, PIL.Image; from sdkit import images\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "image, before = PIL.Image.new('F', (12000, 12000)), peak()\n"
        "images.to_rgb(image); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    # A copy, the grey image, and RGB with Pillow's four bytes a pixel take 1.3 GB.
    assert int(done.stdout) * 1024 < 1.6e9


# Colour profiles


@pytest.mark.parametrize(("primaries", "gamma"), [(P3, None), (ADOBE, 563 / 256)], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_other_colour_spaces_become_srgb(tmp_path: Path, primaries: Any, gamma: float | None, suffix: str) -> None:
    """Compare with the closed form: curve, matrix of the primaries, inverse curve."""
    levels = np.concatenate([RNG.integers(0, 256, (1, 500, 3), dtype=np.uint8), np.uint8([[(200, 60, 60)]])], axis=1)
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(levels).save(tmp_path / f"a{suffix}", icc_profile=matrix_profile(primaries, gamma), **options)
    converted = images.read(tmp_path / f"a{suffix}")
    # One level, and rounding.
    assert np.abs(np.asarray(converted) - expected_srgb(levels, primaries, gamma)).max() <= 1.5
    if primaries is P3:
        assert converted.getpixel((500, 0)) == (217, 42, 52)
    assert converted.info == {}


def test_a_profile_meets_transparency_palettes_and_orientation(tmp_path: Path) -> None:
    profile = matrix_profile(P3, None)
    rgba = Image.new("RGBA", (2, 1), (200, 60, 60, 255))
    rgba.putpixel((1, 0), (200, 60, 60, 0))
    rgba.save(tmp_path / "a.png", icc_profile=profile)
    assert np.asarray(images.read(tmp_path / "a.png")).tolist() == [[[217, 42, 52], [255] * 3]]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (3, 2), (200, 60, 60)).quantize(4).save(tmp_path / "p.png", icc_profile=profile, exif=exif)
    turned = images.read(tmp_path / "p.png")
    assert (turned.size, turned.getpixel((0, 0))) == ((2, 3), (217, 42, 52))


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_with_a_gamma_of_its_own(tmp_path: Path, mode: str) -> None:
    levels = np.arange(256, dtype=np.uint8)[None]
    profile = icc(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(1.8 * 256))})
    stored = (
        Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    )
    stored.save(tmp_path / "a.png", icc_profile=profile)
    expected = srgb_levels((levels / 255) ** (round(1.8 * 256) / 256))
    converted = np.asarray(images.read(tmp_path / "a.png"))
    # The curve is steep at its start, where Pillow's 8 bits are too few.
    assert np.abs(converted - expected[..., None])[:, 8:].max() <= 1.5
    assert np.ptp(converted, axis=2).max() == 0


def test_inks_of_a_printer(tmp_path: Path) -> None:
    """The profile's table holds the Lab value of each corner of CMYK, so the conversion of the corners
    must be exact.
    """
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)  # shape (16, 4): CMYK
    lab = np.stack(
        [100 - 30 * corners[:, :3].sum(1), 40 * corners[:, 1] - 20 * corners[:, 0], 40 * corners[:, 2] - 10], 1
    )
    lab = np.where(corners[:, 3:] == 1, [0, 0, 0], np.maximum(lab, [10, -99, -99]))
    lab[0] = (100, 0, 0)
    stored = np.round((lab + np.array([0, 128, 128])) * [652.8, 256, 256]).clip(0, 65280).astype(">u2")
    straight = np.array([0, 65535], ">u2").tobytes()
    table = b"mft2\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">2H", 2, 2)
    table += straight * 4 + stored.tobytes() + straight * 3
    levels = (corners * 255).astype(np.uint8)[None]
    Image.fromarray(levels, "CMYK").save(tmp_path / "a.tif", icc_profile=icc(b"CMYK", {b"A2B0": table}, b"Lab "))
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], 1)
    xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    to_d65 = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D65) / (BRADFORD @ D50)) @ BRADFORD
    expected = srgb_levels(xyz @ to_d65.T @ np.linalg.inv(to_xyz(SRGB)).T)
    assert np.abs(np.asarray(images.read(tmp_path / "a.tif"))[0] - expected).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_without_a_profile_or_with_that_of_srgb_nothing_changes(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    untagged = np.asarray(images.to_rgb(image))
    assert np.array_equal(untagged, image.convert("RGB"))
    if mode != "CMYK":
        for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), matrix_profile(SRGB, None)):
            image.save(tmp_path / "a.png", icc_profile=profile)
            assert np.array_equal(images.read(tmp_path / "a.png"), untagged)


@pytest.mark.parametrize("profile", [b"not a profile", matrix_profile(P3, None)[:300], icc(b"GRAY", {})])
def test_a_damaged_profile_is_ignored_and_told(tmp_path: Path, profile: bytes) -> None:
    rgb._transform.cache_clear()
    Image.fromarray(SMALL).save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match=r"^an image's colour profile cannot be read; its colours are taken for sRGB"):
        assert np.array_equal(images.read(tmp_path / "a.png"), SMALL)


def test_without_the_library_of_profiles_colours_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb._transform.cache_clear()
    monkeypatch.setattr("PIL.features.check", lambda name: name != "littlecms2")
    Image.fromarray(SMALL).save(tmp_path / "a.png", icc_profile=matrix_profile(P3, None))
    assert np.array_equal(images.read(tmp_path / "a.png"), SMALL)
    rgb._transform.cache_clear()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.timeout(20)
def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (images.read, images.read_text):
        with pytest.raises(ImageError, match=r"^cannot read .*pipe\.png: it is not a regular file\.$"):
            read(tmp_path / "pipe.png")


# to_tensors


def test_every_form_gives_the_same_tensor(tmp_path: Path) -> None:
    Image.fromarray(SMALL).save(tmp_path / "small.png")
    opaque = np.dstack([SMALL, np.full(SMALL.shape[:2], 255, np.uint8)])
    forms = [
        Image.fromarray(SMALL), SMALL, SMALL[None], opaque, opaque[None], str(tmp_path / "small.png"),
        tmp_path / "small.png", tensor(SMALL), tensor(SMALL)[None], tensor(SMALL).double(),
        np.asfortranarray(SMALL), SMALL[::-1][::-1],
    ]  # fmt: skip
    for form in forms:
        for images_ in (form, [form], (form,)):
            (result,) = images.to_tensors(images_)
            assert (result.dtype, result.shape) == (torch.float32, (3, 5, 7))
            torch.testing.assert_close(result, tensor(SMALL), rtol=0, atol=1e-7)
    assert len(images.to_tensors(forms)) == len(forms)


def test_grey_arrays_and_batches() -> None:
    grey = SMALL[..., 0]
    expected = tensor(np.repeat(grey[..., None], 3, axis=2))
    for form in (grey, grey[..., None], grey[None, ..., None]):
        torch.testing.assert_close(images.to_tensors(form), [expected], rtol=0, atol=1e-7)
    batch = RNG.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    torch.testing.assert_close(images.to_tensors(batch), [tensor(one) for one in batch], rtol=0, atol=1e-7)


def test_sizes_may_differ_and_order_is_kept() -> None:
    mixed = [Image.new("RGB", (4, 6), "white"), np.zeros((2, 3), np.uint8), torch.zeros(2, 3, 8, 8)]
    result = images.to_tensors(mixed)
    assert [tuple(x.shape) for x in result] == [(3, 6, 4), (3, 2, 3), (3, 8, 8), (3, 8, 8)]
    assert [x.mean().item() for x in result] == [1, -1, 0, 0]


def test_tensors_keep_gradient_and_may_leave_the_range_by_rounding() -> None:
    x = torch.full((3, 2, 2), 1.005, requires_grad=True)
    (result,) = images.to_tensors(x)
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.unique().tolist() == [1]
    assert images.to_tensors(x.detach().to(torch.bfloat16))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("images_", "sentence"),
    [
        ([], "the list of images is empty"),
        ([[]], "the list of images is empty"),
        (None, "type NoneType is no image"),
        (iter([SMALL]), "type list_iterator is no image"),
        (7, "type int is no image"),
        (b"png", "type bytes is no image"),
        (Image.new("RGB", (0, 4)), "an image of 0 x 4 pixels is empty"),
        (np.zeros((0, 4, 3), np.uint8), r"an array of shape \(0, 4, 3\) is no image"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"an array of shape \(0, 4, 4, 3\) is no image"),
        (np.zeros((4, 4, 2), np.uint8), r"an array of shape \(4, 4, 2\) is no image"),
        (np.zeros((3, 4, 5), np.uint8), r"an array of shape \(3, 4, 5\) is no image"),
        (np.zeros(4, np.uint8), r"an array of shape \(4,\) is no image"),
        (np.zeros((4, 4, 3), np.float32), r"an array of float32 has no certain range; give uint8"),
        (np.zeros((4, 4, 3), np.uint16), r"an array of uint16 has no certain range"),
        (np.zeros((4, 4), bool), r"an array of bool has no certain range"),
        (torch.zeros(4, 4), r"a tensor of shape \(4, 4\) is no image"),
        (torch.zeros(1, 4, 4), r"a tensor of shape \(1, 4, 4\) is no image; give \(3, H, W\)"),
        (torch.zeros(4, 4, 3), r"a tensor of shape \(4, 4, 3\) is no image"),
        (torch.zeros(2, 4, 8, 8), r"a tensor of shape \(2, 4, 8, 8\) is no image"),
        (torch.zeros(0, 3, 4, 4), r"a tensor of shape \(0, 3, 4, 4\) is no image"),
        (
            torch.zeros(3, 4, 4, dtype=torch.uint8),
            r"a tensor of torch.uint8 is not in \[-1, 1\]; convert .* x / 127.5 - 1",
        ),
        (torch.full((3, 4, 4), float("nan")), "not finite"),
        (torch.full((3, 4, 4), float("-inf")), "not finite"),
        (
            torch.linspace(0, 255, 48).view(3, 4, 4),
            r"values from 0 to 255, outside \[-1, 1\]; convert .* x / 127\.5 - 1",
        ),
        (torch.full((3, 4, 4), -1.02), r"values from -1.02 to -1.02, outside"),
        ([SMALL, torch.zeros(1, 4, 4)], r"a tensor of shape \(1, 4, 4\)"),
        ("", r"^'' is no name; give the path of an image file\.$"),
        ("https://example.org/a.png", r"^'https://example\.org/a\.png' is a URL; give the path of an image file\.$"),
    ],
)
def test_what_is_no_image_is_one_sentence(images_: Any, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence) as caught:
        images.to_tensors(images_)
    assert str(caught.value).endswith(".")


def test_lazily_opened_broken_image(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encoded("PNG")[:1000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ImageError, match="the image cannot be decoded"):
        images.to_tensors(image)


# Back to images

pictures = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.just(3)))


@given(pictures)
def test_round_trip_is_exact(batch: np.ndarray) -> None:
    x = torch.stack(images.to_tensors(batch))
    assert np.array_equal(images.to_uint8(x), batch)
    assert np.array_equal(np.stack([np.asarray(image) for image in images.to_pil(x)]), batch)
    assert np.array_equal(images.to_uint8(torch.stack(images.to_tensors(images.to_pil(x)))), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_levels_come_back_also_from_half_precision(dtype: torch.dtype) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    x = torch.stack(images.to_tensors(levels))
    assert np.array_equal(images.to_uint8(x.to(dtype)), levels)


def test_arithmetic_in_bfloat16_would_not() -> None:
    # Explains why `to_uint8` computes in float32. If this test fails, the docstring of `to_uint8` is out of date.
    levels = torch.arange(256)
    x = (levels / 127.5 - 1).to(torch.bfloat16)
    assert not torch.equal(((x + 1) * 127.5).round().long(), levels)


@given(st.floats(-4, 4, width=32))
def test_rounds_to_the_nearest_level_and_clamps(value: float) -> None:
    level = int(images.to_uint8(torch.full((3, 1, 1), value))[0, 0, 0, 0])
    assert abs(level - min(max((value + 1) * 127.5, 0), 255)) <= 0.5 + 1e-4


def test_forms_of_what_comes_out() -> None:
    x = torch.rand(2, 3, 4, 6, requires_grad=True) * 2 - 1
    assert images.to_uint8(x).shape == (2, 4, 6, 3)
    assert images.to_uint8(x[0]).shape == (1, 4, 6, 3)
    assert [image.size for image in images.to_pil(x)] == [(6, 4), (6, 4)]
    with pytest.raises(ImageError, match="NaN"):
        images.to_pil(torch.full((3, 2, 2), float("nan")))
    for bad in (torch.zeros(4, 4), torch.zeros(1, 4, 4), torch.zeros(3, 4, 4, dtype=torch.int32)):
        with pytest.raises(ImageError, match="is no image; give float"):
            images.to_uint8(bad)


def test_from_tensors() -> None:
    same, mixed = list(torch.rand(2, 3, 4, 6)), [torch.rand(3, 4, 6), torch.rand(3, 2, 2)]
    assert [image.size for image in images.from_tensors(mixed, "pil")] == [(6, 4), (2, 2)]
    assert np.array_equal(images.from_tensors(same, "np"), images.to_uint8(torch.stack(same)))
    assert torch.equal(images.from_tensors(same, "pt"), torch.stack(same))
    assert [array.shape for array in images.from_tensors(mixed, "np")] == [(4, 6, 3), (2, 2, 3)]
    assert [tuple(x.shape) for x in images.from_tensors(mixed, "pt")] == [(3, 4, 6), (3, 2, 2)]
    with pytest.raises(ArgumentError, match="output_type 'latent' is not one of 'pil', 'np', 'pt'"):
        images.from_tensors(same, "latent")


# save and read_text

TEXT = {"prompt": "a cat", "latin": "Ærøskøbing\nsecond line", "other": "猫 🐱 \u200d", "empty": ""}


def test_png_carries_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    images.save(Image.fromarray(SMALL), path, TEXT)
    assert images.read_text(path) == TEXT
    assert all(type(value) is str for value in images.read_text(path).values())
    assert np.array_equal(images.read(path), SMALL)
    data = path.read_bytes()
    assert data.count(b"iTXt") == 1  # used only where Latin-1 is not enough
    assert data.count(b"tEXt") == 3


@given(st.dictionaries(st.text("abcXYZ_-.", min_size=1, max_size=79), st.text(max_size=200), max_size=4))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: dict[str, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "text.png"
    images.save(Image.new("RGB", (1, 1)), path, text)
    assert images.read_text(path) == text


def test_undecodable_bytes_of_a_command_line_are_replaced(tmp_path: Path) -> None:
    images.save(Image.new("RGB", (1, 1)), tmp_path / "a.png", {"prompt": "caf\udce9"})
    assert images.read_text(tmp_path / "a.png") == {"prompt": "caf?"}


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.PNG"])
def test_formats(tmp_path: Path, name: str, astronaut: Image.Image) -> None:
    images.save(astronaut.convert("RGBA"), tmp_path / name, {"prompt": "a"})
    with Image.open(tmp_path / name) as image:
        assert image.format == {"a.jpg": "JPEG", "a.JPEG": "JPEG", "a.webp": "WEBP", "a.PNG": "PNG"}[name]
    difference = np.asarray(images.read(tmp_path / name)).astype(float) - np.asarray(astronaut)
    assert np.sqrt((difference**2).mean()) < 5  # levels
    assert images.read_text(tmp_path / name) == ({"prompt": "a"} if name == "a.PNG" else {})


def test_save_says_what_is_wrong(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    for name in ("a.tiff", "a", "a.png.txt", ".png"):
        with pytest.raises(ArgumentError, match=r"its suffix is not one of \.png, \.jpg, \.jpeg, \.webp\."):
            images.save(image, tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SdkitError, match=r"cannot write .*folder\.png: it is a folder"):
        images.save(image, tmp_path / "folder.png")
    with pytest.raises(ImageError, match=r"missing\.png"):
        images.read_text(tmp_path / "missing.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_save_overwrites_only_where_it_may(tmp_path: Path) -> None:
    images.save(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    with pytest.raises(FileExistsError):
        images.save(Image.new("RGB", (3, 3)), tmp_path / "a.png", overwrite=False)
    assert images.read(tmp_path / "a.png").size == (2, 2)
    images.save(Image.new("RGB", (3, 3)), tmp_path / "a.png")
    assert images.read(tmp_path / "a.png").size == (3, 3)


# grid

COLORS = ["red", "lime", "blue", "yellow", "cyan"]
SQUARES = [Image.new("RGB", (4, 4), color) for color in COLORS]


def corners(sheet: Image.Image, step: int, rows: int, columns: int) -> list[list[Any]]:
    return [[sheet.getpixel((step * column, step * row)) for column in range(columns)] for row in range(rows)]


def test_plain_grid_holds_the_pixels_and_nothing_else() -> None:
    sheet = images.grid(SQUARES, 2, background="black")
    assert sheet.size == (8, 12)
    rgb = [image.getpixel((0, 0)) for image in SQUARES]
    assert corners(sheet, 4, 3, 2) == [rgb[0:2], rgb[2:4], [rgb[4], (0, 0, 0)]]
    assert images.grid(SQUARES, 5).size == (20, 4)
    assert images.grid(SQUARES).size == (12, 8)
    assert images.grid(SQUARES[0]).size == (4, 4)


def test_padding_lies_between_cells() -> None:
    sheet = images.grid(SQUARES[:4], 2, padding=3, background="white")
    assert sheet.size == (11, 11)
    assert np.all(np.asarray(sheet)[4:7] == 255)
    assert np.all(np.asarray(sheet)[:, 4:7] == 255)


def test_different_sizes_are_centred() -> None:
    sheet = images.grid([Image.new("RGB", (8, 4)), Image.new("RGB", (2, 6))], 2)
    assert sheet.size == (16, 6)
    dark = np.asarray(sheet)[..., 0] == 0
    assert np.array_equal(np.argwhere(dark.any(1)).ravel(), range(6))
    assert dark[1:5, :8].all()
    assert dark[:, 11:13].all()
    assert dark.sum() == 8 * 4 + 2 * 6


def test_grid_takes_every_form_of_image() -> None:
    batch = RNG.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    expected = np.concatenate(batch, axis=1)
    for form in (batch, [Image.fromarray(one) for one in batch], torch.stack(images.to_tensors(batch)), list(batch)):
        assert np.array_equal(images.grid(form, 2), expected)


@pytest.mark.parametrize("background", ["white", "black", "#8080ff"])
@pytest.mark.parametrize("where", ["captions", "row_labels", "column_labels"])
@pytest.mark.parametrize("label", ["a cat", "gypsy", "word " * 200, "x" * 500, "", "a\nb"])
def test_labels_are_drawn_outside_of_the_pictures(background: str, where: str, label: str) -> None:
    pictures_ = [Image.new("RGB", (64, 64), "red")] * 4
    labels = {where: [label] * (4 if where == "captions" else 2)}
    sheet = np.asarray(images.grid(pictures_, 2, padding=4, background=background, **labels))
    plain = np.asarray(images.grid(pictures_, 2, padding=4, background=background))
    red = (sheet == (255, 0, 0)).all(axis=2)
    assert red.sum() == 4 * 64 * 64  # no label covers a picture
    assert sheet.size > plain.size
    ink = ~red & (sheet != Image.new("RGB", (1, 1), background).getpixel((0, 0))).any(axis=2)
    assert ink.any() == bool(label)
    for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
        assert not edge.any()  # no label is cut off at an edge
    if where != "row_labels":
        assert not ink[:, 68:72].any()  # no label runs into the next column
    assert max(sheet.shape) < 400  # a long label does not make the sheet larger


def test_labels_of_tiny_pictures() -> None:
    sheet = images.grid([Image.new("RGB", (1, 1))] * 4, 2, captions=["a label"] * 4, column_labels=["long " * 50] * 2)
    assert max(sheet.size) < 100


def test_column_labels_give_the_columns() -> None:
    labelled = images.grid(SQUARES[:4], column_labels=["a", "b", "c", "d"])
    assert labelled.width > 4 * labelled.height // 8  # one row
    assert np.array_equal(np.asarray(labelled)[-4:], images.grid(SQUARES[:4], 4))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"columns": 0}, "a grid needs at least 1 column and 0 pixels of padding, not 0 and 0"),
        ({"columns": 2, "padding": -1}, "not 2 and -1"),
        ({"columns": 2, "captions": ["a"]}, "a grid of 3 x 2 takes 5 captions, not 1"),
        ({"columns": 2, "row_labels": ["a"] * 2}, "a grid of 3 x 2 takes 3 row_labels, not 2"),
        ({"columns": 2, "column_labels": ["a"] * 3}, "a grid of 3 x 2 takes 2 column_labels, not 3"),
        ({"columns": 2, "background": "blurple"}, "'blurple' is not a colour"),
    ],
)
def test_grid_says_what_is_wrong(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        images.grid(SQUARES, **options)


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ImageError, match="empty"):
        images.grid([])


@pytest.mark.parametrize("place", ["PIL.ImageFile.ImageFile.load", "PIL.ImageOps.exif_transpose"])
def test_lack_of_memory_is_not_the_file_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError):
        images.read(tmp_path / "a.png")


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^cannot make .*a\.webp of 16400 x 8 pixels: "):
        images.save(Image.new("RGB", (16400, 8)), tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []
