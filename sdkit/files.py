"""Files: written atomically, opened only where they are regular, and found in folders."""

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
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from sdkit.errors import SdkitError
from sdkit.messages import clean, first_line, listed

TEMPORARY = ".sdkit-"  # prefix of the names of files being written; `find_files` skips them
OWNER = re.compile(r"\.sdkit-(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{16}(?:\..*)?", re.DOTALL)
"""A whole temporary name; its groups are the host and the process that it belongs to, of which older versions wrote
neither."""
DAY = 24 * 60 * 60
LONGEST_SUFFIX = 64  # bytes of a suffix that a temporary name keeps; longer ones name no format


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
        target = _resolved(path)  # replace the file that a link points to, not the link
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


def _resolved(path: str | Path) -> Path:
    """Follow the links in `path`. Raises `OSError`, also for a name that no file can have."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise _impossible(path) from error


def _impossible(path: str | Path) -> OSError:
    return FileNotFoundError(errno.ENOENT, "no file can have this name", str(path))


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


def sha256(path: Path) -> str:
    """Checksum of a regular file, in hexadecimal. Raises `OSError`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """The system's or a library's message, as the end of a sentence."""
    return str(getattr(error, "strerror", None) or first_line(error)).lower()


def find_files(paths: Iterable[str | Path], suffixes: Collection[str], unreadable: Collection[str] = ()) -> list[Path]:
    """Files as given, whatever their suffix, and files under given folders whose suffix (lower case) is in `suffixes`.

    The order is that of `paths`, sorted within a folder. Hidden files and folders inside are skipped, repetitions too;
    a link to a folder is followed where nothing else leads there. What lies in a folder and cannot be read (a dangling
    link, a pipe, a folder without permission) is among the files, so that whoever reads them says so. Files with a
    suffix in `unreadable` are passed over with one warning. Raises `SdkitError` for a path that does not exist or
    cannot be read, and where nothing is found.
    """
    names = list(paths)
    if not all(str(name) for name in names):
        raise SdkitError("an empty name is no file or folder; check the names.")
    given = [Path(name) for name in names]
    found, others = list[Path](), list[str]()
    for path in given:
        inside, rest = _expand(path, suffixes)
        found += inside
        others += rest
    if not found:
        where = ", ".join(clean(path) for path in given) or "an empty list of paths"
        instead = f" (but {_counted(others)})" if others else ""
        wanted = f"{'/'.join(sorted(suffixes))} file" if len(suffixes) <= 4 else "file of a kind that is read here"
        raise SdkitError(f"found no {wanted} in {where}{instead}; name one, or another folder.")
    if passed_over := [path for path in others if _suffix(path) in unreadable]:
        kinds = f"{_counted(passed_over)} {'are' if len(passed_over) > 1 else 'is'}"
        warnings.warn(f"{kinds} passed over, which cannot be read: {listed(passed_over)}.", stacklevel=1)
    return list(dict.fromkeys(found))


def _expand(path: Path, suffixes: Collection[str]) -> tuple[list[Path], list[str]]:
    """A file, or the files in a folder with one of these suffixes; and the other files there."""
    try:
        mode = status(path).st_mode
        if not stat.S_ISDIR(mode):
            if not stat.S_ISREG(mode):  # opening a pipe or a device might never end
                raise SdkitError(f"{clean(path)} is neither a regular file nor a folder; name one.")
            return [path], []
        unreadable: list[OSError] = []
        inside, others = list[Path](), list[str]()
        for folder, names in walk(path, unreadable.append):
            wanted = {name for name in names if _suffix(name) in suffixes}
            inside += [Path(folder, name) for name in wanted]
            others += [f"{folder}{os.sep}{name}" for name in names if name not in wanted]
        if unreadable and not inside:
            raise unreadable[0]
    except OSError as error:
        where = path if error.filename is None else error.filename
        raise SdkitError(f"cannot read {clean(where)}: {reason(error)}; check the name.") from error
    return sorted([*inside, *(Path(error.filename) for error in unreadable)]), sorted(others)


def walk(top: Path, onerror: Callable[[OSError], object] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Each folder in `top` and its files, but for hidden ones; each real folder once, however many links lead there."""
    above = os.path.realpath(top)
    seen = set[str]()
    waiting = [str(top)]
    while waiting:
        links = list[str]()
        for folder, folders, files in os.walk(waiting.pop(0), onerror=onerror):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]  # noqa: PTH114, PTH118
            yield folder, [name for name in files if not name.startswith(".")]
        # `os.walk` does not follow links. One to a folder above would bring in files that are not of this data.
        waiting += [link for link in links if not Path(above).is_relative_to(os.path.realpath(link))]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - pathlib's takes thrice as long


def _counted(files: Sequence[str]) -> str:
    """How many files of which suffix, for example "3 .heic and 1 .txt"; the most frequent first."""
    counts = sorted(Counter(map(_suffix, files)).items(), key=lambda item: (-item[1], item[0]))[:3]
    kinds = [f"{count} {clean(suffix)} file{'s' if count > 1 else ''}" for suffix, count in counts if suffix]
    return " and ".join(kinds) or f"{len(files)} other file{'s' if len(files) > 1 else ''}"


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
