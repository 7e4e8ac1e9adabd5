"""The examples of a data set: `Examples` with random access, or a `Stream`.

Opening a data set reads no image. `Example.load` reads one, so a broken image raises only there.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from sdkit.data.captioned_files import NAME, SIZE
from sdkit.data.columns import Columns, example_name
from sdkit.data.datasets_library import raised_as_data_error
from sdkit.data.example import Example
from sdkit.messages import clean
from sdkit.processes import is_main_process


class Examples:
    """The examples of a data set, in an order that never changes.

    Attributes:
        dataset: The `datasets.Dataset` behind it; its column of images is not decoded.
        source: Path or id of the data set.
        unread: Files that may hold captions but are not read, where no image has a caption.
        unusual: Suffixes other than .txt of the files that captions were read from.
    """

    def __init__(
        self, dataset: Any, image: str, caption: str | None, source: str, *, default_caption: str = "",
        folder: Path | None = None, unread: Sequence[str] = (), unusual: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Wrap a data set whose images and captions are in these columns. Relative paths are resolved in `folder`."""
        self.dataset, self.source, self.unread, self.unusual = dataset, source, unread, unusual
        self._columns = Columns(source, image, caption, default_caption, folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no example {i} among {len(self)}.")
        return self._columns.example(self.dataset[i], i % len(self))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def names(self) -> list[str]:
        """The name of each example. No image is read."""
        if NAME in self.dataset.column_names:
            return list(self.dataset[NAME])
        return [example_name(path, i) for i, path in enumerate(self._field("path"))]

    @property
    def paths(self) -> list[str | None]:
        """The file of each image, or of its shard; None where a table holds the image itself. No image is read."""
        return self._field("path")

    @property
    def captions(self) -> list[str]:
        """The caption of each example."""
        return list(self._captions())

    def _captions(self) -> Iterator[str]:
        if self._columns.caption is None:
            return iter([self._columns.default_caption] * len(self))
        return (self._columns.caption_of(value, i) for i, value in enumerate(self.dataset[self._columns.caption]))

    def captioned(self, caption: str) -> Examples:
        """Return the same images, all with this caption."""
        columns = self._columns
        return Examples(self.dataset, columns.image, None, self.source, default_caption=caption, folder=columns.folder)

    @property
    def has_captions(self) -> bool:
        """Whether any example has a caption."""
        return any(self._captions())

    @property
    def identity(self) -> str:
        """Fingerprint of the data: SHA-256 over names, captions, and sizes of the encoded images, in order; 16 hex
        digits."""
        digest = hashlib.sha256()
        for example in zip(self.names, self.captions, self._sizes(), strict=True):
            digest.update("".join(f"{value}\0" for value in example).encode())
        return digest.hexdigest()[:16]

    def _sizes(self) -> Iterable[int | None]:
        """Return the size in bytes of each encoded image; None if its file is missing or its row holds only a path."""
        if NAME not in self.dataset.column_names:
            return self._field("bytes", "binary_length")
        sizes = zip(self.dataset[SIZE], self._field("path"), strict=True)
        return (_file_size(path) if size is None else size for size, path in sizes)

    def _field(self, name: str, function: str | None = None) -> list[Any]:
        """Return a field of the image column, or the result of a `pyarrow.compute` function on it; copy no image."""
        fields = [chunk.field(name) for chunk in self.dataset.data.column(self._columns.image).chunks]
        if function:
            fields = [getattr(import_module("pyarrow.compute"), function)(chunk) for chunk in fields]
        return [value for chunk in fields for value in chunk.to_pylist()]


class Stream(Iterable[Example]):
    """The examples of a data set that is read sequentially and never held in memory. It has no length and no index.

    Attributes:
        dataset: The `datasets.IterableDataset` behind it; its column of images is not decoded.
        source: Path or id of the data set.
        files: The local files that are streamed; empty for a data set on the Hub.
        unread, unusual: As in `Examples`; always empty.
    """

    unread: Sequence[str] = ()
    unusual: Sequence[str] = ()

    def __init__(
        self, dataset: Any, image: str, caption: str | None, source: str, files: Sequence[Path] = (), *,
        default_caption: str = "", folder: Path | None = None,
    ) -> None:  # fmt: skip
        """Wrap a stream whose images and captions are in these columns. Relative paths are resolved in `folder`."""
        self.dataset, self.source, self.files = dataset, source, files
        self._columns = Columns(source, image, caption, default_caption, folder)

    @property
    def has_captions(self) -> bool:
        """Whether any example may have a caption. Captions are not known before the stream is read."""
        return self._columns.caption is not None or bool(self._columns.default_caption)

    def __iter__(self) -> Iterator[Example]:
        rows = enumerate(self.dataset)
        while True:
            with raised_as_data_error(self.source):
                i, row = next(rows, (0, None))
            if row is None:
                return
            yield self._columns.example(row, i)

    @property
    def identity(self) -> str:
        """Fingerprint of the data: SHA-256 over source, split, columns, default caption, and the names and sizes of
        local files; 16 hex digits.

        It does not cover the contents of the files, which are unknown before the stream is read.
        """
        sizes = [(file.name, _file_size(str(file))) for file in self.files]
        names = (self.source, self.dataset.split, self._columns.image, self._columns.caption, *chain(*sizes))
        default = self._columns.default_caption
        names += (default,) if default else ()
        return hashlib.sha256("".join(f"{name}\0" for name in names).encode()).hexdigest()[:16]


def _file_size(path: str) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def warn_of_captions(examples: Examples | Stream) -> None:
    """Warn, in the main process, if no example has a caption, or if captions come from other files than .txt.

    A model that is trained without captions does not learn to follow prompts.
    """
    if not is_main_process():
        return
    source, unread, unusual = clean(examples.source), examples.unread, examples.unusual
    if not examples.has_captions:
        count = f"{len(examples)} images" if isinstance(examples, Examples) else "images"
        there = f" (there, but not read: {', '.join(map(clean, unread[:3]))})" if unread else ""
        problem = f"none of the {count} in {source} has a caption{there}; the empty prompt is taken for all."
        warnings.warn(problem, stacklevel=1)
    elif unusual:
        warnings.warn(f"captions in {source} are read from {' and '.join(unusual)} files.", stacklevel=1)
