"""Names the kind of a file by its first bytes: a suffix is a name, which anyone may change."""

from __future__ import annotations

import zipfile
from pathlib import Path

BEGINNING = 512
"""Bytes that tell one kind from another."""
SAFETENSORS, PICKLE, EMPTY, UNKNOWN = "safetensors", "pickle", "empty", "unknown"
LONGEST_HEADER = 100_000_000
"""Bytes of the largest header that the safetensors library reads."""

# How a file of another kind begins -> how a message names it, and the remedy.
OTHERS = (
    (b"version https://git-lfs.", "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"),
    (b"GGUF", "a GGUF file, quantized for other programs", "give the model's .safetensors file"),
    (b"\x89HDF", "an HDF5 file, of Keras", "give the model's .safetensors file"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and give the file of weights in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and give the file of weights in it"),
    (b"Rar!", "a RAR archive", "unpack it, and give the file of weights in it"),
    (b"\x89PNG", "a picture (PNG)", "give the file of weights"),
    (b"\xff\xd8\xff", "a picture (JPEG)", "give the file of weights"),
    (b"RIFF", "a picture (WebP)", "give the file of weights"),
)
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
ARCHIVE = ("a zip archive, but no file of torch", "unpack it, and give the file of weights in it")
PAGE = ("a web page (HTML), not the weights", "the site may want a log-in: download the file itself with a browser")
TEXT = ("JSON text, not the weights", "give the file of weights beside it")


def kind_of(path: Path, beginning: bytes) -> str | tuple[str, str]:
    """The kind of the file that begins with `beginning`: one of those above, or another's name and the remedy."""
    if not beginning:
        return EMPTY
    # safetensors: the length of the header in 8 bytes, then the header, a JSON object.
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") <= LONGEST_HEADER:
        return SAFETENSORS
    for start, what, remedy in OTHERS:
        if beginning.startswith(start):
            return what, remedy
    if beginning.startswith(b"PK\x03\x04"):
        return _zipped(path)
    if beginning[0] == 0x80 and 2 <= (beginning[1:2] or b"\0")[0] <= 5:  # a pickle's opcode and its protocol
        return PICKLE
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(PAGES):
        return PAGE
    return TEXT if text.startswith((b"{", b"[")) else UNKNOWN


def _zipped(path: Path) -> str | tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch's files are FOLDER/data.pkl beside FOLDER/data/0, FOLDER/data/1, ...
            return PICKLE if any(name.endswith("/data.pkl") for name in archive.namelist()) else ARCHIVE
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return PICKLE  # cut, perhaps: torch says so
