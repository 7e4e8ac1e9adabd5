"""Helpers for files: check names; open, hash, and read regular files, up to a maximum size."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO


def status(path: str | Path) -> os.stat_result:
    """Return the status of a file or folder; links are followed.

    Raises:
        OSError: There is none, or no file can have the name (it holds NUL).
    """
    try:
        return Path(path).stat()
    except ValueError as error:
        raise _impossible(path) from error


def check_name(path: str | Path) -> None:
    """Raise OSError if no file can have this name. The file need not exist."""
    try:
        os.lstat(path)
    except ValueError as error:
        raise _impossible(path) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe, or a device; reading a pipe might never end.
    """
    mode = status(path).st_mode
    if stat.S_ISDIR(mode):
        os.scandir(path).close()  # raises PermissionError first if the folder cannot be read
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return Path(path).open("rb")


def read_regular(path: str | Path, largest: int) -> bytes:
    """Return all bytes of a regular file. Raises OSError, also if there are more than `largest` bytes."""
    with open_regular(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"it is larger than {largest // 2**20 or 1} MiB", str(path))
    return data


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a regular file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def resolved(path: str | Path) -> Path:
    """Return `path` with all links followed. Raises OSError, also for a name that no file can have."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise _impossible(path) from error


def _impossible(path: str | Path) -> OSError:
    return FileNotFoundError(errno.ENOENT, "no file can have this name", str(path))


def expanded(path: str | os.PathLike[str]) -> Path:
    """Replace a leading ~ by the home folder.

    If ~name stands for no user, the path is left unchanged; `Path.expanduser` would raise.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by "?".

    Python represents undecodable bytes of file names by lone surrogates.
    """
    return text.encode(errors="replace").decode()


def utf8_name(name: str) -> str:
    """Return a file name that is UTF-8 on disk whatever the system's encoding, with U+FFFD for undecodable bytes.

    Other systems then display the name correctly, and the safetensors library, which encodes as UTF-8, can open it.
    """
    return os.fsdecode(os.fsencode(name).decode(errors="replace").encode())
