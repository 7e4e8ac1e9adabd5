"""Names of files, and regular files opened, read up to a limit, and hashed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO


def status(path: str | Path) -> os.stat_result:
    """The status of a file or folder, links followed. Raises `OSError`, also for a name that no file can have (with NUL
    in it)."""
    try:
        return Path(path).stat()
    except ValueError as error:
        raise _impossible(path) from error


def check_name(path: str | Path) -> None:
    """Raise `OSError` for a name that no file can have, whether there is one or not."""
    try:
        os.lstat(path)
    except ValueError as error:
        raise _impossible(path) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes. Raises `OSError`, also for a folder, and for a pipe or a device, which might never
    end."""
    mode = status(path).st_mode
    if stat.S_ISDIR(mode):
        os.scandir(path).close()  # raises where the permission is missing
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return Path(path).open("rb")


def read_regular(path: str | Path, largest: int) -> bytes:
    """All bytes of a regular file. Raises `OSError`, also for one of more than `largest` bytes."""
    with open_regular(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"it is larger than {largest // 2**20 or 1} MiB", str(path))
    return data


def sha256(path: Path) -> str:
    """Checksum of a regular file, in hexadecimal. Raises `OSError`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def resolved(path: str | Path) -> Path:
    """Follow the links in `path`. Raises `OSError`, also for a name that no file can have."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise _impossible(path) from error


def _impossible(path: str | Path) -> OSError:
    return FileNotFoundError(errno.ENOENT, "no file can have this name", str(path))


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ as the home folder; left as it is for ~somebody who has no account here, where Path's own fails."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def encodable(text: str) -> str:
    """`text` with "?" for what UTF-8 cannot hold: lone surrogates, which stand for undecodable bytes of file names."""
    return text.encode(errors="replace").decode()


def utf8_name(name: str) -> str:
    """A file name whose bytes are UTF-8, whatever the system's encoding: as other systems show it, and as safetensors
    can open it. U+FFFD stands for bytes that are something else."""
    return os.fsdecode(os.fsencode(name).decode(errors="replace").encode())
