"""Images with captions, from a folder, tar shards, parquet files or any data set of the `datasets` library.

Opening lists what there is; an image is read when its example is asked to `load`, so that a broken one concerns nobody
before, and only itself then.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, overload

from PIL import Image

from sdkit import images
from sdkit.data.captioned_files import CAPTION_KEYS, NAME, OFFSET, SIZE, caption_of, folder_rows, tar_rows
from sdkit.errors import ArgumentError, DataError, ImageError, SdkitError
from sdkit.files import encodable, expanded, find
from sdkit.messages import stop_in

IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image, not yet read, and its caption ("" where it has none)."""

    name: str
    """Tells it apart for people: the path in its folder, the member of its shard, its row."""
    caption: str
    path: str | None = field(default=None, repr=False)
    data: bytes | None = field(default=None, repr=False)
    """The encoded image, where it is no file of its own."""
    offset: int | None = field(default=None, repr=False)
    """Where the encoded image begins in the file `path`, and its length; None where it is the whole file."""
    size: int | None = field(default=None, repr=False)

    def load(self) -> Image.Image:
        """The image as `sdkit.images.read` reads it: 8-bit RGB, upright, opaque. Raises `ImageError`."""
        if self.data is not None:
            return _read(self.data, self.name)
        if self.path is None:
            raise ImageError(f"{self.name} holds no image; take it out of the data.")
        if self.offset is None and "://" not in self.path:
            return images.read(self.path)
        try:
            with self._open(self.path) as file:
                file.seek(self.offset or 0)
                data = file.read(-1 if self.size is None else self.size)
        except Exception as error:  # of a file system on the web: nearly anything
            told = f"cannot read {self.name}: {str(error).rstrip('.') or type(error).__name__}."
            raise stop_in(error) or ImageError(told) from error
        return _read(data, self.name)

    @staticmethod
    def _open(path: str) -> Any:
        """A file here, or where a stream of the Hub says that it is (hf://...)."""
        return import_module("fsspec").open(path, "rb") if "://" in path else Path(path).open("rb")


def _read(data: bytes, name: str) -> Image.Image:
    class Named(io.BytesIO):  # a file without a path, which `images.read` can name in its errors
        def __str__(self) -> str:
            return name

    return images.read(cast(Any, Named(data)))


class Examples:
    """The examples of a data set, in an order that never changes."""

    def __init__(self, dataset: Any, image: str, caption: str | None, source: str) -> None:
        """`dataset` is a `datasets.Dataset` whose column `image` is not decoded."""
        self.dataset, self.source = dataset, source
        self._image, self._caption = image, caption

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no example {i} among {len(self)}.")
        return _example(self.dataset[i], i % len(self), self._image, self._caption)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def names(self) -> list[str]:
        """Every example's name; no image is read for it."""
        if NAME in self.dataset.column_names:
            return list(self.dataset[NAME])
        return [_name(path, i) for i, path in enumerate(self._field("path"))]

    @property
    def captions(self) -> list[str]:
        """Every example's caption."""
        if self._caption is None:
            return [""] * len(self)
        return [caption_of(value) for value in self.dataset[self._caption]]

    @property
    def identity(self) -> str:
        """SHA-256 over names, captions and the sizes of the encoded images, in their order; 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for one in zip(self.names, self.captions, self._sizes(), strict=True):
            digest.update("".join(f"{value}\0" for value in one).encode())
        return digest.hexdigest()[:16]

    def _sizes(self) -> Iterable[int | None]:
        """Bytes of every encoded image; None where it is missing."""
        if NAME not in self.dataset.column_names:
            return self._field("bytes", "binary_length")
        sizes = zip(self.dataset[SIZE], self._field("path"), strict=True)
        return (_file_size(path) if size is None else size for size, path in sizes)

    def _field(self, name: str, function: str | None = None) -> list[Any]:
        """A field of the column of images, or a function of pyarrow.compute of it: no image is copied for it."""
        fields = [chunk.field(name) for chunk in self.dataset.data.column(self._image).chunks]
        if function:
            fields = [getattr(import_module("pyarrow.compute"), function)(one) for one in fields]
        return [value for one in fields for value in one.to_pylist()]


class Stream(Iterable[Example]):
    """The examples of a data set that is read from one end to the other and never held: no length, no index."""

    def __init__(self, dataset: Any, image: str, caption: str | None, source: str, files: Sequence[Path] = ()) -> None:
        """`dataset` is a `datasets.IterableDataset` whose column `image` is not decoded, and reads `files`, if not the
        Hub."""
        self.dataset, self.source, self.files = dataset, source, files
        self._image, self._caption = image, caption

    def __iter__(self) -> Iterator[Example]:
        rows = enumerate(self.dataset)
        while True:
            with _told(self.source):
                i, row = next(rows, (0, None))
            if row is None:
                return
            yield _example(row, i, self._image, self._caption)

    @property
    def identity(self) -> str:
        """SHA-256 over the names of source, split and columns, and names and sizes of files here: what is in them is
        not known before they are read."""
        sizes = [(file.name, _file_size(str(file))) for file in self.files]
        names = (self.source, self.dataset.split, self._image, self._caption, *chain(*sizes))
        return hashlib.sha256("".join(f"{name}\0" for name in names).encode()).hexdigest()[:16]


def _example(row: dict[str, Any], i: int, image: str, caption: str | None) -> Example:
    cell = row[image] or {"bytes": None, "path": None}
    return Example(
        name=row.get(NAME) or _name(cell["path"], i),
        caption=caption_of(row[caption]) if caption else "",
        path=cell["path"],
        data=cell["bytes"],
        offset=row.get(OFFSET),
        size=row.get(SIZE),
    )


def _file_size(path: str) -> int | None:
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def _name(path: str | None, i: int) -> str:
    return encodable(path) if path else f"row {i}"


@overload
def open_examples(
    data: str | os.PathLike[str], *, split: str = ..., image_column: str | None = ..., caption_column: str | None = ...,
    streaming: Literal[False] = ...,
) -> Examples: ...  # fmt: skip
@overload
def open_examples(
    data: str | os.PathLike[str], *, split: str = ..., image_column: str | None = ..., caption_column: str | None = ...,
    streaming: bool,
) -> Examples | Stream: ...  # fmt: skip
def open_examples(
    data: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Examples | Stream:
    """Open a data set. Raises `DataError` where there is none, or nothing in it.

    data:           a folder of images, at any depth, with captions in metadata.jsonl (`file_name`, and `text` or
                    `caption`), in NAME.txt beside each image, or none; webdataset shards (.tar: KEY.jpg, KEY.txt or
                    KEY.json); parquet files; a folder of either; or a data set's id on the Hub ("org/name", or
                    "org/name:config").
    split:          of a data set on the Hub; files are one split.
    image_column:   of parquet files and data sets of the Hub; None finds it.
    caption_column: there, or the key in metadata.jsonl or .json; None finds `text`, `caption` or the like.
    streaming:      read a data set of the Hub, or parquet files, as they come instead of copying them to a disk first;
                    the result is a `Stream`. Of images in folders and shards nothing is copied either way.
    """
    if not isinstance(data, (str, os.PathLike)) or not os.fspath(data):
        raise ArgumentError(f"data must be the path of a data set or its id on the Hub, not {data!r}.")
    source = os.fspath(data)
    path = expanded(source)
    if not os.path.exists(path):  # noqa: PTH110 - pathlib's raises for overlong names
        return _from_hub(source, split, image_column, caption_column, streaming)
    kind, files = _kind(path)
    if kind == "parquet":
        names = [glob.escape(str(file)) for file in files]  # which the library takes for patterns
        options: dict[str, Any] = {"path": "parquet", "data_files": names, "batch_size": 100}
        return _columns(_load(source, streaming, **options), source, image_column, caption_column, streaming, files)
    if image_column is not None:
        raise ArgumentError(f"image_column= has no meaning for {kind}; leave it out.")
    root = path if path.is_dir() else path.parent
    rows = (tar_rows if kind == "tar shards" else folder_rows)(files, root, caption_column)
    if not rows:
        raise DataError(f"there is no image in {source}; name other data.")
    return Examples(_table(rows), "image", "caption", source)


def check_source(data: str | os.PathLike[str]) -> None:
    """Raise `DataError` for what cannot be a data set, going by its name alone."""
    source = os.fspath(data)
    parts = source.partition(":")[0].split("/")
    hub = len(parts) == 2 and all(parts) and parts[0][0] not in ".~" and "://" not in source
    if not hub and not os.path.exists(expanded(source)):  # noqa: PTH110
        raise DataError(f"{source!r} is neither a path that exists nor the id of a data set on the Hub (org/name).")


def _kind(path: Path) -> tuple[str, list[Path]]:
    """What a path holds, and its files."""
    suffixes = {"a folder of images": images.READABLE, "parquet": {".parquet"}, "tar shards": {".tar"}}
    if not path.is_dir() and path.suffix.lower() not in (".parquet", ".tar"):
        raise DataError(
            f"{path} is no data set; name a folder of images, .parquet or .tar files, or one of the latter."
        )
    every = frozenset[str]().union(*suffixes.values())
    try:
        files = find([path], every)
    except SdkitError as error:
        if isinstance(error.__cause__, OSError):
            raise DataError(str(error)) from error
        raise DataError(f"there is no image, .parquet or .tar file in {path}; name other data.") from error
    if closed := [file for file in files if file.suffix.lower() not in every]:
        raise DataError(f"cannot read {closed[0]}; change its permissions, or take it out of the data.")
    kinds = {kind: [file for file in files if file.suffix.lower() in known] for kind, known in suffixes.items()}
    present = {kind: found for kind, found in kinds.items() if found}
    if len(present) > 1:
        counts = " and ".join(f"{len(found)} {found[0].suffix}" for found in present.values())
        raise DataError(f"{path} holds data of several kinds ({counts} files and the like); name a folder of one kind.")
    return next(iter(present.items()))


def _table(rows: list[dict[str, Any]]) -> Any:
    """A data set of the `datasets` library that holds where each image lies."""
    datasets = _datasets()
    features = {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    features |= {NAME: datasets.Value("string"), OFFSET: datasets.Value("int64"), SIZE: datasets.Value("int64")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _from_hub(
    source: str, split: str, image_column: str | None, caption_column: str | None, streaming: bool
) -> Examples | Stream:
    check_source(source)
    name, _, config = source.partition(":")
    dataset = _load(source, streaming, split, path=name, **({"name": config} if config else {}))
    return _columns(dataset, source, image_column, caption_column, streaming)


def _load(source: str, streaming: bool, split: str = "train", **options: Any) -> Any:
    datasets = _datasets()
    with _told(source), _quiet(datasets):
        return datasets.load_dataset(split=split, streaming=streaming, **options)


def _columns(
    dataset: Any,
    source: str,
    image_column: str | None,
    caption_column: str | None,
    streaming: bool,
    files: Sequence[Path] = (),
) -> Examples | Stream:
    """The examples in the columns of these names, or of the likeliest ones."""
    datasets = _datasets()
    if dataset.features is None:  # a stream that says nothing of its columns before it is read
        with _told(source):
            dataset = dataset._resolve_features()
    features: dict[str, Any] = dict(dataset.features)
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in features:
            raise DataError(f"{option}: {source} has no column {column!r}; it has {', '.join(features)}.")
    holding = [name for name, feature in features.items() if _holds_images(feature, datasets)]
    image = image_column or next((name for name in IMAGE_COLUMNS if name in holding), None) or next(iter(holding), None)
    if image is None or image not in holding:
        what = "has no column of images" if image is None else f"has no images in its column {image!r}"
        raise DataError(f"{source} {what}; its columns: {', '.join(features)}.")
    if caption_column == image:
        raise DataError(f"column {image!r} of {source} holds images; name another as caption_column.")
    caption = caption_column or next((name for name in CAPTION_KEYS if name in features), None)
    dataset = dataset.select_columns([image, caption] if caption else [image])
    with _quiet(datasets):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    return Stream(dataset, image, caption, source, files) if streaming else Examples(dataset, image, caption, source)


def _holds_images(feature: Any, datasets: Any) -> bool:
    """Whether a column holds encoded images: of the type Image, bytes, or fields of which one is `bytes`."""
    fields = isinstance(feature, dict) and "bytes" in feature
    return isinstance(feature, datasets.Image) or fields or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _datasets() -> Any:
    """The library; it takes over a second to import."""
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError("reading data sets needs the datasets library; install 'sdkit[train]'.") from error


@contextlib.contextmanager
def _told(source: str) -> Iterator[None]:
    """Raise whatever the library raises as a `DataError` of one sentence."""
    try:
        yield
    except Exception as error:  # its builders raise nearly anything
        if stop := stop_in(error):
            raise stop from error
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = re.split(r"\n|[.!?] (?=[A-Z])", str(cause).strip())[0].rstrip(".!") or type(cause).__name__
        told = f"cannot open the data set {source!r}: {reason}; check the name and the files."
        raise DataError(told) from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep the library's bars off what is no terminal, and its log of errors that are raised as well."""
    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if shown and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
