"""Captions in metadata.jsonl, .csv, or .parquet, one such file per folder, as for the ImageFolder of `datasets`."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from sdkit import strict_json
from sdkit.arguments import possible_name
from sdkit.data.captions import CAPTION_KEYS, LONGEST, caption_of
from sdkit.errors import DataError
from sdkit.files import open_regular
from sdkit.messages import clean, first_line, reason

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of metadata files; if a folder has several, the first is read."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The line of one image in a metadata file.

    Attributes:
        where: The file and the line, for messages.
        folder: Folder of the metadata file.
        file_name: The image's path as written in the line: relative to `folder`, or absolute.
        caption: "" if the line has none.
    """

    where: str
    folder: Path
    file_name: str
    caption: str


def read_metadata(folders: Mapping[str, Sequence[str]], caption_column: str | None) -> tuple[list[Row], set[str]]:
    """Read all metadata files in these folders.

    If `caption_column` is None, no line has one of `CAPTION_KEYS`, and only one other key has text, captions are taken
    from that key, with a warning.

    Args:
        folders: Path of a folder -> names of its files.
        caption_column: Key of the caption; None tries `CAPTION_KEYS`.

    Returns:
        The rows of all files, and all keys in them except `file_name`.

    Raises:
        DataError: A file or a line cannot be read, or names no possible file.
    """
    rows: list[Row] = []
    keys: dict[str, bool] = {}  # key -> whether any row has text in it
    texts: list[dict[str, Any]] = []  # of each row, the fields that are text; for `_with_only_text`
    for file in _files(folders):
        for number, fields in _lines(file):
            where = f"{clean(file)}, line {number}"
            name = _checked(fields.pop("file_name", None), where)
            try:
                caption = caption_of(fields, caption_column)
            except ValueError as error:
                raise DataError(f"{where}: the caption cannot be used, for {error}.") from error
            rows.append(Row(where=where, folder=file.parent, file_name=name, caption=caption))
            text = {key: value for key, value in fields.items() if isinstance(value, str) and value.strip()}
            keys |= dict.fromkeys(fields.keys() - keys.keys(), False) | dict.fromkeys(text, True)
            if caption_column is None and not keys.keys() & set(CAPTION_KEYS):
                texts.append(text)
    if caption_column is None and rows and not keys.keys() & set(CAPTION_KEYS):
        rows = _with_only_text(rows, texts, keys)
    return rows, set(keys)


def _with_only_text(rows: list[Row], texts: list[dict[str, Any]], keys: Mapping[str, bool]) -> list[Row]:
    """Take the captions from the only key that has text; if there are several such keys, warn and change nothing."""
    candidates = [key for key, has_text in keys.items() if has_text]
    where = rows[0].where.rpartition(",")[0]
    if len(candidates) != 1:
        if candidates:
            named = ", ".join(map(repr, map(clean, sorted(candidates)[:5])))
            warnings.warn(
                f"none of the keys in {where} ({named}) is taken for a caption; name one as caption_column.",
                stacklevel=2,
            )
        return rows
    warnings.warn(
        f"the captions are taken from {clean(candidates[0])!r}, the only text in {where}; name it as caption_column.",
        stacklevel=2,
    )
    return [
        Row(where=row.where, folder=row.folder, file_name=row.file_name, caption=caption_of(text, candidates[0]))
        for row, text in zip(rows, texts, strict=True)
    ]


def _files(folders: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    """Yield the metadata file to read in each folder, and warn of others in the same folder, which are ignored."""
    for folder, names in sorted(folders.items()):
        present = [name for name in NAMES if name in names]
        yield from (Path(folder, name) for name in present[:1])
        for other in present[1:]:
            both = f"{clean(Path(folder, other))} is passed over, for there is a {present[0]} beside it"
            warnings.warn(f"{both}; leave one of them.", stacklevel=2)


def _checked(name: Any, where: str) -> str:
    """Check the name of an image in metadata. Raises DataError if no file can have it."""
    if not isinstance(name, str) or not name:
        raise DataError(f'{where}: there is no file name; write {{"file_name": "a.jpg", "text": "what it shows"}}.')
    if not possible_name(name) or name.replace("\\", "/").rpartition("/")[2] in ("", ".", ".."):
        raise DataError(f"{where}: {clean(name).encode(errors='replace').decode()!r} is no name of a file; correct it.")
    return name


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, fields) of each line. Raises DataError if the file is damaged or not what its suffix says."""
    read = {".jsonl": _json_lines, ".csv": _csv_lines, ".parquet": _parquet_rows}[file.suffix]
    try:
        with open_regular(file) as opened:
            yield from read(opened, file)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {clean(file)}: {reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {clean(file)}: it is not utf-8 text.") from error
    except Exception as error:  # pyarrow raises nearly anything for damaged files
        raise DataError(f"cannot read {clean(file)}: {first_line(error)}.") from error


def _json_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
        where = f"{clean(path)}, line {number}"
        if len(line) > LONGEST:
            raise DataError(f"{where}: it is longer than 1 MiB; write one object a line.")
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            fields = strict_json.parse(text)
        except ValueError as error:
            raise DataError(f"{where}: this {error}; write one object a line.") from error
        yield number, fields if isinstance(fields, dict) else {}


def _csv_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        for fields in reader:
            yield reader.line_num, {key: value for key, value in fields.items() if isinstance(key, str)}
    except csv.Error as error:
        raise DataError(f"{clean(path)}, line {reader.line_num}: this is not CSV ({error}).") from error
    finally:
        text.detach()  # otherwise the wrapper would close the file, which the caller closes


def _parquet_rows(file: BinaryIO, _: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    batches = import_module("pyarrow.parquet").ParquetFile(file).iter_batches(1000)
    yield from enumerate((fields for batch in batches for fields in batch.to_pylist()), start=1)
