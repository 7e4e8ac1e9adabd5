"""Atomic writes: a reader sees the old file or the whole new one. Leftovers of killed processes are removed."""

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

from sdkit.errors import ArgumentError, SdkitError
from sdkit.files import expanded, resolved
from sdkit.messages import reason

TEMPORARY = ".sdkit-"
"""Prefix of the names of files being written; `find_files` skips hidden files."""
OWNER = re.compile(r"\.sdkit-(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{16}(?:\..*)?", re.DOTALL)
"""Pattern of a temporary file's name. The groups are the writer's host and process; older versions wrote neither."""
DAY = 24 * 60 * 60
LONGEST_SUFFIX = 64
"""Longest suffix, in bytes, that a temporary name keeps. No format that sdkit writes has a longer one."""


def new_folder(path: str | os.PathLike[str]) -> Path:
    """Return a folder to be written, which must be absent or empty. Raises ArgumentError otherwise."""
    folder = expanded(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ArgumentError(f"{folder} exists already; name another folder.")
    return folder


@contextlib.contextmanager
def atomic_write(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` for the body to write, and rename it to `path` when the body ends.

    A reader of `path` sees the old file or the whole new one, even after a power cut. If the body raises (Ctrl-C
    included), the temporary file is removed and `path` stays as it was. Missing parent folders are made.

    Args:
        path: The file to write. If it is a link, the file that it points to is replaced.
        overwrite: Replace an existing file.

    Raises:
        FileExistsError: `overwrite` is false and `path` exists, even if another process made it just now.
        SdkitError: Any other `OSError` occurred, in this function or in the body.
    """
    temporary = None
    try:
        target = resolved(path)  # follow links: the rename must not replace a link itself
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if target.exists() and not target.is_file():
            raise SdkitError(f"cannot write {path}: it is {'a folder' if target.is_dir() else 'not a regular file'}.")
        with contextlib.suppress(FileExistsError):  # the parent exists; if it is a file, the write below raises
            target.parent.mkdir(parents=True)
        remove_abandoned(target.parent)
        temporary = beside(target, target.suffix)  # keep the suffix: some writers choose the format by it
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


@contextlib.contextmanager
def whole_folder(path: Path, failure: type[SdkitError] = SdkitError) -> Iterator[Path]:
    """Yield a temporary folder beside `path` for the body to fill, and rename it to `path` if the body succeeds.

    Even after a power cut, `path` is the old folder, the complete new one, or missing, but never incomplete. If the
    body raises, the temporary folder is removed.

    Args:
        path: The folder to write.
        failure: The error to raise.

    Raises:
        failure: The folder cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    temporary = beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():  # safetensors makes files that only their owner can read
                inside.chmod(temporary.stat().st_mode & 0o666)
            sync(inside)
        sync(temporary)
        old = path.rename(beside(path)) if path.exists() else None  # a rename cannot replace a folder that has files
        temporary.rename(path)
        sync(path.parent)
        if old:
            shutil.rmtree(old, ignore_errors=True)  # what is left has a temporary name
    except (OSError, SafetensorError, SdkitError) as error:
        # An SdkitError from the body would name the temporary folder, which is gone by now; its cause is reported.
        cause = error.__cause__ if isinstance(error, SdkitError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        raise failure(
            f"cannot write {path}: {reason(cause)}; what was there before is untouched, so make room and run again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _claim(temporary: Path, target: Path) -> None:
    """Rename without overwriting. Raises FileExistsError if `target` exists; of two processes, one succeeds."""
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
    """Return an unused temporary path in the folder of `path`. Its name includes this host and process."""
    ending = suffix if len(os.fsencode(suffix)) <= LONGEST_SUFFIX else ""
    return path.parent / f"{TEMPORARY}{_host()}-{os.getpid()}-{secrets.token_hex(8)}{ending}"


@functools.cache
def _host() -> str:
    """Return eight hex digits that identify this PID namespace: the host, or the container on it."""
    try:
        processes = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - returns no path, but "pid:[4026531836]"
    except OSError:
        processes = ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode(errors="replace")).hexdigest()[:8]


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk (fsync), so that it survives a power cut."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # Windows and some network shares cannot sync a folder
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove all temporary files in `folder`. The caller must hold its lock, so that no process is writing there."""
    for left in folder.glob(f"{TEMPORARY}*"):
        _remove(left)


@functools.cache
def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed processes in `folder`, where other processes may be writing.

    A temporary file is removed if its process no longer exists. If the process ran on another host, the file is removed
    once nobody has written to it for a day. Each process searches a folder only once.
    """
    with contextlib.suppress(OSError):  # a folder may be writable, but not readable
        with os.scandir(folder) as inside:
            names = [entry.name for entry in inside if entry.name.startswith(TEMPORARY)]
        for name in names:
            if _is_abandoned(folder / name):
                _remove(folder / name)


def _is_abandoned(path: Path) -> bool:
    owner = OWNER.fullmatch(path.name)
    if not owner:
        return False
    if owner[1] == _host() and os.name == "posix":  # on Windows, os.kill(pid, 0) ends the process
        try:
            os.kill(int(owner[2]), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # the process exists, but belongs to another user
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
