"""Images in a folder or in tar shards, with their captions: found and listed, but not read."""

from __future__ import annotations

import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdkit.errors import DataError
from sdkit.files import encodable, reason
from sdkit.images import READABLE

BLOCK = 512  # bytes of zeros with which a tar file ends, at least
METADATA = "metadata.jsonl"
NAME, OFFSET, SIZE = "sdkit.name", "sdkit.offset", "sdkit.size"
"""Columns of rows beside `image` and `caption`; offset and size are those of an image in a tar shard."""
CAPTION_KEYS = ("text", "caption", "captions", "prompt", "txt", "json")
"""Names under which a caption is looked for where none is given, the first that is there."""


def caption_of(value: Any, key: str | None = None) -> str:
    """The caption in whatever a caption column holds: text, a list of texts (the first), fields (one of them)."""
    if isinstance(value, Mapping):
        keys = CAPTION_KEYS if key is None else (key,)
        value = next((value[key] for key in keys if value.get(key) is not None), None)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None else encodable(str(value)).strip()


def folder_rows(files: Iterable[Path], root: Path, caption_column: str | None) -> list[dict[str, Any]]:
    """One row for each image file below `root`, and for each that a metadata.jsonl names, sorted by path.

    A caption is that of the metadata.jsonl in the image's folder or above it, else the text in NAME.txt beside it.
    """
    stated = _read_metadata(root, caption_column)
    texts = _Texts()
    rows = []
    place = _Places()
    paths = {place(path): path for path in [*stated, *files]}  # one for each file, however it is written
    captions = {place(path): caption for path, caption in stated.items()}
    for key, path in sorted(paths.items(), key=lambda item: item[1]):
        caption = captions.get(key)
        beside = path.with_suffix(".txt")
        if not caption and beside.is_file():
            caption = texts.read(beside)
        rows.append(_row(_relative(path, root), path, caption or ""))
    texts.check()
    return rows


class _Places:
    """Where files lie, whatever links and ".." lead there; a link to a file is a file of its own."""

    def __init__(self) -> None:
        self.folders: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        if path.parent not in self.folders:
            self.folders[path.parent] = path.parent.resolve()
        return self.folders[path.parent] / path.name


def _row(name: str, path: Path, caption: str, offset: int | None = None, size: int | None = None) -> dict[str, Any]:
    return {
        "image": {"bytes": None, "path": encodable(str(path))},
        "caption": caption,
        NAME: name,
        OFFSET: offset,
        SIZE: size,
    }


def _relative(path: Path, root: Path) -> str:
    return encodable(Path(os.path.relpath(path, root)).as_posix())


def _read_metadata(root: Path, caption_column: str | None) -> dict[Path, str]:
    """Image file -> caption, of every metadata.jsonl in or below `root`."""
    captions: dict[Path, str] = {}
    keys: set[str] = set()
    place, seen = _Places(), set[Path]()
    files = [path for path in sorted(root.rglob(METADATA)) if not _hidden(path, root)]
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            fields = _fields(line, where)
            path = Path(os.path.normpath(file.parent / fields.pop("file_name")))
            if place(path) in seen:
                raise DataError(f"{where}: {path.name} has a caption already; leave one line for each image.")
            seen.add(place(path))
            keys |= fields.keys()
            captions[path] = caption_of(fields, caption_column)
    if caption_column is not None and caption_column not in keys:
        have = ", ".join(map(repr, sorted(keys))) or "none"
        raise DataError(f"no line of a {METADATA} in {root} has {caption_column!r}; the keys there: {have}.")
    return captions


def _hidden(path: Path, root: Path) -> bool:
    return any(part[0] == "." for part in path.relative_to(root).parts)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problem = reason(error) if isinstance(error, OSError) else "it is not utf-8 text"
        raise DataError(f"cannot read {file}: {problem}.") from error


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: this is not JSON ({error}); write one object a line.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str) or not fields["file_name"]:
        raise DataError(f'{where}: there is no file name; write {{"file_name": "a.jpg", "text": "what it shows"}}.')
    return fields


def tar_rows(shards: Iterable[Path], root: Path, caption_column: str | None) -> list[dict[str, Any]]:
    """One row for each image in webdataset shards, in their order: KEY.jpg with the caption in KEY.txt or KEY.json.

    The shards are only indexed; nothing is unpacked. An image of a key has its .txt as caption, else its .json's field.
    """
    rows: list[dict[str, Any]] = []
    texts = _Texts()
    keys: set[str] = set()
    for shard in shards:
        name = _relative(shard, root)
        images: dict[str, list[tarfile.TarInfo]] = defaultdict(list)  # of each key, in order
        captions: dict[str, str] = {}
        for member, data in _members(shard):
            path = PurePosixPath(member.name)
            key = str(path.parent / path.name.partition(".")[0])
            where = f"{name}/{member.name}"
            if data is None:
                images[key].append(member)
            elif path.suffix.lower() == ".txt" and caption_column in (None, "txt"):
                captions[key] = texts.decode(where, data)
            elif path.suffix.lower() == ".json":
                fields = texts.parse(where, data)
                keys |= fields.keys()
                captions.setdefault(key, caption_of(fields, caption_column))
        rows += [
            _row(encodable(f"{name}/{image.name}"), shard, captions.get(key, ""), image.offset_data, image.size)
            for key, found in images.items()
            for image in found
        ]
    texts.check()
    if caption_column not in (None, "txt", *keys):
        raise DataError(f"no .json in the shards of {root} has {caption_column!r}; the keys there: {sorted(keys)}.")
    return rows


def _members(shard: Path) -> Iterable[tuple[tarfile.TarInfo, bytes | None]]:
    """The images of a shard (None for what is in them), and the .txt and .json files with what is in them."""
    try:
        with shard.open("rb") as end:  # tarfile takes a shard that was cut short between two members for whole
            end.seek(max(0, shard.stat().st_size - BLOCK))
            if end.read().strip(b"\0"):
                raise tarfile.ReadError("it is cut short")
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.name.startswith("."):
                    continue
                if path.suffix.lower() in READABLE:
                    yield member, None
                elif path.suffix.lower() in (".txt", ".json"):
                    file = archive.extractfile(member)
                    yield member, file.read() if file else b""
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{shard} is not a whole tar file ({error}); fetch it again, or take it out of the data."
        ) from error


class _Texts:
    """Decodes caption files, and remembers those that it cannot, so that one sentence can name them all."""

    def __init__(self) -> None:
        self.bad: list[str] = []

    def read(self, path: Path) -> str:
        try:
            return self.decode(str(path), path.read_bytes())
        except OSError:
            self.bad.append(str(path))
            return ""

    def decode(self, name: str, data: bytes) -> str:
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            self.bad.append(name)
            return ""

    def parse(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(data)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            self.bad.append(name)
            return {}
        return fields

    def check(self) -> None:
        if self.bad:
            more = f" and {len(self.bad) - 3} more" if len(self.bad) > 3 else ""
            raise DataError(
                f"the caption in {', '.join(self.bad[:3])}{more} cannot be read; save it as UTF-8 text "
                "(.json: one object of fields) that you may read."
            )
