"""Kinds of files, recognised by their first bytes. A suffix proves nothing: anyone may rename a file."""

from __future__ import annotations

BEGINNING = 512
"""Number of leading bytes that `kind_of` needs."""
LONGEST_HEADER = 100_000_000
"""Size of the largest header that the safetensors library reads, in bytes."""
SAFETENSORS, PICKLE, ZIP = "a safetensors file", "a pickle", "a zip archive"
LFS, PAGE, JSON = "a Git LFS pointer", "a web page (HTML)", "JSON text"
PNG, JPEG, GIF, WEBP, AVIF = "a PNG image", "a JPEG image", "a GIF image", "a WebP image or another RIFF file", "AVIF"

STARTS = (
    (b"version https://git-lfs.", LFS),
    (b"PK\x03\x04", ZIP),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"GGUF", "a GGUF file, quantized for other programs"),
    (b"\x89HDF", "an HDF5 file, of Keras"),
    (b"PAR1", "a parquet file"),
    (b"\x89PNG", PNG),
    (b"\xff\xd8\xff", JPEG),
    (b"GIF8", GIF),
    (b"RIFF", WEBP),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"II*\0\x10\0\0\0CR", "a camera's raw file"),
    (b"%!", "PostScript"),
    (b"%PDF", "a PDF document"),
)
TEXTS = (
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    *((start, PAGE) for start in (b"<!doctype", b"<html", b"<head", b"<body")),
    (b"{", JSON),
    (b"[", JSON),
)
BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": AVIF}
"""Brand of an ISO media file (bytes 8 to 11) -> the kind of file."""


def kind_of(beginning: bytes) -> str | None:
    """Return the kind of a file from its first bytes, worded to fit into a sentence; None if it is unknown."""
    # A safetensors file begins with 8 bytes for the header's length. The header is a JSON object.
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") <= LONGEST_HEADER:
        return SAFETENSORS
    if kind := next((kind for start, kind in STARTS if beginning.startswith(start)), None):
        return kind
    if beginning[4:8] == b"ftyp":
        return BRANDS.get(beginning[8:12], "a video")
    # A pickle begins with the opcode PROTO (0x80), its version, and another opcode. There is no opcode 0: with a 0 in
    # third place, these bytes are the header's length in a safetensors file.
    if beginning[:1] == b"\x80" and beginning[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and any(beginning[2:3]):
        return PICKLE
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for start, kind in TEXTS if text.startswith(start)), None)
