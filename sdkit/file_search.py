"""Search for files in folders."""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from sdkit.errors import SdkitError
from sdkit.files import status
from sdkit.messages import clean, listed, reason


class NoFilesFoundError(SdkitError):
    """There is no file of the wanted kind.

    Attributes:
        others: Other files that were found instead, as part of a sentence: " (but 2 .heic files)"; "" if none.
    """

    def __init__(self, message: str, others: str) -> None:
        super().__init__(message)
        self.others = others


def find_files(paths: Iterable[str | Path], suffixes: Collection[str], unreadable: Collection[str] = ()) -> list[Path]:
    """Find the given files, and all files under the given folders that have one of the suffixes.

    Files that are given by name are returned whatever their suffix. Hidden files and folders are skipped. Links to
    folders are followed; a folder that is reached more than once is searched once. Entries that cannot be read (a
    dangling link, a pipe, a folder without permission) are returned too, so that opening them reports the problem.

    Args:
        paths: Files and folders.
        suffixes: Wanted suffixes, in lower case.
        unreadable: Suffixes of files that are left out with one warning.

    Returns:
        The files without repetition: in the order of `paths`, and sorted within each folder.

    Raises:
        NoFilesFoundError: Nothing is found.
        SdkitError: A path does not exist, cannot be read, or is neither a file nor a folder.
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
        raise NoFilesFoundError(f"found no {wanted} in {where}{instead}; name one, or another folder.", instead)
    if passed_over := [path for path in others if _suffix(path) in unreadable]:
        kinds = f"{_counted(passed_over)} {'are' if len(passed_over) > 1 else 'is'}"
        warnings.warn(f"{kinds} passed over, which cannot be read: {listed(passed_over)}.", stacklevel=1)
    return list(dict.fromkeys(found))


def _expand(path: Path, suffixes: Collection[str]) -> tuple[list[Path], list[str]]:
    """Return `path` itself or, for a folder, its files with one of the suffixes; and the folder's other files."""
    try:
        mode = status(path).st_mode
        if not stat.S_ISDIR(mode):
            if not stat.S_ISREG(mode):  # reading a pipe or a device might never end
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
    """Yield `top` and each folder below it with the names of its files; hidden files and folders are skipped.

    Links to folders are followed. Each real folder comes once, however many links lead to it. `onerror` is called with
    the error of each folder that cannot be listed.
    """
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
        # `os.walk` does not follow links, so linked folders are walked afterwards. A link to `top` or to a folder above
        # it is left out: it would bring in files from outside.
        waiting += [link for link in links if not Path(above).is_relative_to(os.path.realpath(link))]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - pathlib takes three times as long


def _counted(files: Sequence[str]) -> str:
    """Count files by suffix, and list the three most frequent: "3 .heic files and 1 .txt file"."""
    counts = sorted(Counter(map(_suffix, files)).items(), key=lambda item: (-item[1], item[0]))[:3]
    kinds = [f"{count} {clean(suffix)} file{'s' if count > 1 else ''}" for suffix, count in counts if suffix]
    return " and ".join(kinds) or f"{len(files)} other file{'s' if len(files) > 1 else ''}"
