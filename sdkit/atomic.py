"""Atomic writes: a file appears whole under its name, or not at all; what killed processes left is removed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from sdkit.errors import SdkitError
from sdkit.files import resolved
from sdkit.messages import reason

TEMPORARY = ".sdkit-"
"""Prefix of the names of files being written; `find_files` skips hidden files."""
OWNER = re.compile(r"\.sdkit-(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{16}(?:\..*)?", re.DOTALL)
"""Matches a whole temporary name. Its groups are the writing host and process; older versions wrote neither."""
DAY = 24 * 60 * 60
LONGEST_SUFFIX = 64
"""Bytes of a suffix that a temporary name keeps; longer ones name no format."""


@contextlib.contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` for the body to write; it becomes `path` when the body ends well.

    Whoever reads `path` sees the old file or the whole new one, also after a power cut. Whatever ends the body early
    (Ctrl-C too) removes the temporary file and leaves `path` as it was. Missing parent folders are made.
    An `OSError`, from here or from the body, is raised as a `SdkitError`; but with `overwrite=False` there is a
    `FileExistsError` where `path` is taken, be it by another process in the last moment.
    """
    temporary = None
    try:
        target = resolved(path)  # replace the file that a link points to, not the link
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if target.exists() and not target.is_file():
            raise SdkitError(f"cannot write {path}: it is {'a folder' if target.is_dir() else 'not a regular file'}.")
        with contextlib.suppress(FileExistsError):  # where it is no folder, the writing below says so
            target.parent.mkdir(parents=True)
        remove_abandoned(target.parent)
        temporary = beside(target, target.suffix)  # which tells writers the format
        yield temporary
        sync(temporary)
        (Path.replace if overwrite else _claim)(temporary, target)
        sync(target.parent)
    except OSError as error:
        if not overwrite and isinstance(error, FileExistsError):
            raise
        raise SdkitError(f"cannot write {path}: {reason(error)}.") from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _claim(temporary: Path, target: Path) -> None:
    """Rename, or raise `FileExistsError` where `target` exists: of two processes that try, one succeeds."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system (FAT, some network shares): an empty file reserves the name
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            temporary.replace(target)
        except BaseException:
            target.unlink()
            raise


def beside(path: Path, suffix: str = "") -> Path:
    """A temporary name beside `path`, of this process alone."""
    kept = suffix if len(os.fsencode(suffix)) <= LONGEST_SUFFIX else ""
    return path.parent / f"{TEMPORARY}{_host()}-{os.getpid()}-{secrets.token_hex(8)}{kept}"


@functools.cache
def _host() -> str:
    """Eight hexadecimal digits for the system that gives the process numbers: a container has its own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path: "pid:[4026531836]"
    except OSError:
        processes = ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode(errors="replace")).hexdigest()[:8]


def sync(path: Path) -> None:
    """Make what is in a file, or the names in a folder where the system can, outlast a power cut."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # Windows and some network shares cannot; the files in it are whole by now
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove all temporary files in `folder`, which the caller must have locked: no living process writes there."""
    for left in folder.glob(f"{TEMPORARY}*"):
        _remove(left)


@functools.cache
def remove_abandoned(folder: Path) -> None:
    """Remove, once in a process, the temporary files of killed processes in `folder`; others may be writing there.

    A temporary file goes if its process is known to be gone, or, where that cannot be known (it ran on another
    computer), if nobody has written to it for a day.
    """
    with contextlib.suppress(OSError):  # a folder that may be written to, but not listed
        with os.scandir(folder) as inside:
            names = [entry.name for entry in inside if entry.name.startswith(TEMPORARY)]
        for name in names:
            if _is_abandoned(folder / name):
                _remove(folder / name)


def _is_abandoned(path: Path) -> bool:
    owner = OWNER.fullmatch(path.name)
    if not owner:
        return False
    if owner[1] == _host() and os.name == "posix":  # elsewhere, to ask for a process may end it
        try:
            os.kill(int(owner[2]), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # it lives, but belongs to somebody else
            pass
        return False
    try:
        return time.time() - path.lstat().st_mtime > DAY
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
