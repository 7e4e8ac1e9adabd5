"""Images and captions in webdataset's tar shards: listed, but not unpacked."""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from sdkit.data.captioned_files import relative, row
from sdkit.data.captions import BESIDE, LONGEST, Texts
from sdkit.errors import DataError
from sdkit.files import encodable, open_regular
from sdkit.images import READABLE, UNREADABLE
from sdkit.messages import clean, first_line, reason

BLOCK = 512
"""Bytes of a block; a tar file ends with at least one block of zeros."""
KNOWN = READABLE | UNREADABLE | {*BESIDE}
"""Suffixes of images and caption files. Other members are ignored."""
LONGEST_HEADER = 2**20
"""Largest size in bytes of a header, which holds the name and attributes of one member."""


def tar_rows(shards: Iterable[Path], root: Path, caption_column: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """List the images in webdataset shards with their captions.

    The caption of a.b.jpg is the first of these that is not empty: a.b.txt, a.b.caption, or a field of a.b.json; then
    a.b.jpg.txt and so on; then a.txt and so on, since webdataset groups files by their names up to the first dot.

    Args:
        shards: The tar files.
        root: Folder that names in the rows are relative to.
        caption_column: Field of .json files with the caption, or the suffix without its dot; None tries the usual ones.

    Returns:
        A row for each image, in the order of the shards, and the names of images in formats that cannot be read.

    Raises:
        DataError: A shard or a caption cannot be read, or no caption has the key `caption_column`.
    """
    rows: list[dict[str, Any]] = []
    passed_over: list[str] = []
    texts = Texts(caption_column)
    for shard in shards:
        name = relative(shard, root)
        pictures: dict[str, list[_Member]] = defaultdict(list)  # webdataset's key -> images with it
        captions: list[tuple[PurePosixPath, str]] = []
        for member in _members(shard):
            if member.suffix in READABLE:
                pictures[_key(member.path)].append(member)
            elif member.suffix in UNREADABLE:
                passed_over.append(f"{name}/{member.name}")
            elif member.suffix == ".json" or caption_column in (None, member.suffix[1:]):
                captions.append((member.path, texts.decode(f"{name}/{member.name}", member.data)))
        found = [picture for group in pictures.values() for picture in group]
        caption_by_name = _captions_of([picture.path for picture in found], captions)
        rows += [
            row(encodable(f"{name}/{one.name}"), shard, caption_by_name[str(one.path)], one.offset, one.size)
            for one in found
        ]
    texts.check()
    if caption_column not in (None, "txt", "caption", *texts.keys):
        have = ", ".join(map(repr, map(clean, sorted(texts.keys)))) or "none"
        raise DataError(f"no .json in the shards of {root} has {caption_column!r}; the keys there: {have}.")
    return rows, passed_over


def _key(path: PurePosixPath) -> str:
    """Return the key by which webdataset groups files: the path up to the first dot of the name."""
    return str(path.parent / path.name.partition(".")[0])


def _captions_of(pictures: Sequence[PurePosixPath], captions: Sequence[tuple[PurePosixPath, str]]) -> dict[str, str]:
    """Return an image's path in the shard -> its caption, or "" if it has none."""
    exact: dict[str, dict[str, str]] = defaultdict(dict)  # name without the last suffix -> suffix -> caption
    for path, caption in captions:
        exact[str(path.with_suffix(""))][path.suffix.lower()] = caption
    taken = {name for path in pictures for name in (str(path.with_suffix("")), str(path))}
    grouped: dict[str, dict[str, str]] = defaultdict(dict)
    for path, caption in captions:
        if str(path.with_suffix("")) not in taken:
            grouped[_key(path)].setdefault(path.suffix.lower(), caption)
    found = {}
    for path in pictures:
        places = (exact.get(str(path.with_suffix(""))), exact.get(str(path)), grouped.get(_key(path)))
        candidates = (place.get(suffix) for place in places if place for suffix in BESIDE)
        found[str(path)] = next((caption for caption in candidates if caption), "")
    return found


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A file in a shard.

    Attributes:
        name: Path in the shard.
        offset: Its first byte in the shard.
        size: Number of bytes.
        data: Its content if it may hold a caption.
    """

    name: str
    offset: int
    size: int
    data: bytes = b""

    @property
    def path(self) -> PurePosixPath:
        """The name as a path."""
        return PurePosixPath(self.name)

    @property
    def suffix(self) -> str:
        """The suffix of the name, in lower case."""
        return self.path.suffix.lower()


class _Headers:
    """Wraps a tar file for `tarfile`, which reads only headers from it, and limits the size of each read.

    A damaged header may make `tarfile` ask for gigabytes, or for a negative number of bytes: the whole file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError("a header is damaged")
        return self._file.read(size)


def _members(shard: Path) -> Iterator[_Member]:
    """Yield images, and caption files with their content. Raises DataError if the shard is damaged."""
    try:
        with open_regular(shard) as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(max(0, length - BLOCK))
            if file.read().strip(b"\0"):  # tarfile does not notice truncation between two members
                raise tarfile.ReadError("it is cut short")
            file.seek(0)
            yield from _listed(shard, file, length)
    except (DataError, MemoryError):
        raise
    except OSError as error:
        raise DataError(f"cannot read {clean(shard)}: {reason(error)}.") from error
    except Exception as error:  # tarfile raises ten types of exceptions for damaged headers
        raise DataError(
            f"{clean(shard)} is not a whole tar file ({first_line(error)}); fetch it again, or take it out of the data."
        ) from error


def _listed(shard: Path, file: BinaryIO, length: int) -> Iterator[_Member]:
    """Yield the members with a suffix in `KNOWN` of a shard of `length` bytes. Raises ReadError if it is damaged."""
    headers: Any = _Headers(file)
    end = 0
    with tarfile.open(fileobj=headers, mode="r:") as archive:
        remembered: list[tarfile.TarInfo] = archive.members  # type: ignore[attr-defined]
        while member := archive.next():
            remembered.clear()  # tarfile would keep all members in memory, maybe millions
            if member.size < 0 or member.offset < end or (member.isreg() and member.offset_data > length):
                raise tarfile.ReadError("a header is damaged")
            end = member.offset_data
            path = PurePosixPath(member.name)
            suffix = path.suffix.lower()
            if not member.isfile() or path.name.startswith(".") or suffix not in KNOWN:
                continue
            where = f"{clean(shard)}/{clean(member.name)}"
            if member.issparse():
                raise DataError(
                    f"{where} is stored as a sparse file, which is not read; make the shard without --sparse."
                )
            if member.offset_data + member.size > length:
                raise tarfile.ReadError("it is cut short")
            data = b""
            if suffix in BESIDE:
                if member.size > LONGEST:
                    raise DataError(f"{where} is larger than 1 MiB, too large for a caption; take it out of the data.")
                file.seek(member.offset_data)
                data = file.read(member.size)
            yield _Member(name=member.name, offset=member.offset_data, size=member.size, data=data)
        file.seek(archive.offset)
        if file.read(BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end, which is zeros
            raise tarfile.ReadError("a header is damaged")
