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
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, overload

from PIL import Image

from sdkit import images
from sdkit.data.captioned_files import NAME, OFFSET, SIZE, folder_rows
from sdkit.data.captions import CAPTION_KEYS, caption_of
from sdkit.data.metadata import NAMES
from sdkit.data.tar_shards import tar_rows
from sdkit.errors import ArgumentError, DataError, ImageError, SdkitError
from sdkit.file_search import find_files
from sdkit.files import encodable, expanded, open_regular
from sdkit.messages import clean, first_line, listed, quiet, reason
from sdkit.processes import is_main_process
from sdkit.stops import stop_in

IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img")
ON_THE_HUB = re.compile(r"(?:(?:zip|tar|gzip)://[^:]*::)?hf://")
"""Matches the beginning of an address in a stream of a data set on the Hub."""


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
        except ImageError:
            raise
        except Exception as error:  # of a file system on the web: nearly anything
            raise stop_in(error) or ImageError(f"cannot read {clean(self.name)}: {first_line(error)}.") from error
        return _read(data, self.name)

    def _open(self, path: str) -> Any:
        """A file here, or where a stream of the Hub says that it is: no other address that the data chose is opened."""
        if self.offset is not None:
            return open_regular(path)
        if not ON_THE_HUB.match(path):
            raise ImageError(
                f"{clean(self.name)} lies at {clean(path)!r}, which is neither a file here nor on the Hub; store the "
                "images themselves."
            )
        if import_module("huggingface_hub.constants").HF_HUB_OFFLINE:
            raise ImageError(f"{clean(self.name)} lies on the Hub, and HF_HUB_OFFLINE forbids to fetch it.")
        return import_module("fsspec").open(path, "rb")


def _read(data: bytes, name: str) -> Image.Image:
    class Named(io.BytesIO):  # a file without a path, which `images.read` can name in its errors
        def __str__(self) -> str:
            return name

    return images.read(cast(Any, Named(data)))


class Examples:
    """The examples of a data set, in an order that never changes."""

    def __init__(
        self, dataset: Any, image: str, caption: str | None, source: str, *, default_caption: str = "",
        folder: Path | None = None, unread: Sequence[str] = (), unusual: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`dataset` is a `datasets.Dataset` whose column `image` is not decoded. Paths in it are relative to `folder`.
        `unread`: files that may hold captions, where no image has one. `unusual`: suffixes of other files than .txt
        that captions were read from."""
        self.dataset, self.source, self.unread, self.unusual = dataset, source, unread, unusual
        self._columns = _Columns(source, image, caption, default_caption, folder)

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
        """Every example's name; no image is read for it."""
        if NAME in self.dataset.column_names:
            return list(self.dataset[NAME])
        return [_name(path, i) for i, path in enumerate(self._field("path"))]

    @property
    def captions(self) -> list[str]:
        """Every example's caption."""
        return list(self._captions())

    def _captions(self) -> Iterator[str]:
        if self._columns.caption is None:
            return iter([self._columns.default_caption] * len(self))
        return (self._columns.caption_of(value, i) for i, value in enumerate(self.dataset[self._columns.caption]))

    @property
    def has_captions(self) -> bool:
        """Whether any example has one."""
        return any(self._captions())

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
        fields = [chunk.field(name) for chunk in self.dataset.data.column(self._columns.image).chunks]
        if function:
            fields = [getattr(import_module("pyarrow.compute"), function)(one) for one in fields]
        return [value for one in fields for value in one.to_pylist()]


class Stream(Iterable[Example]):
    """The examples of a data set that is read from one end to the other and never held: no length, no index."""

    unread: Sequence[str] = ()
    unusual: Sequence[str] = ()

    def __init__(
        self, dataset: Any, image: str, caption: str | None, source: str, files: Sequence[Path] = (), *,
        default_caption: str = "", folder: Path | None = None,
    ) -> None:  # fmt: skip
        """`dataset` is a `datasets.IterableDataset` whose column `image` is not decoded, and reads `files`, if not the
        Hub. Paths in it are relative to `folder`."""
        self.dataset, self.source, self.files = dataset, source, files
        self._columns = _Columns(source, image, caption, default_caption, folder)

    @property
    def has_captions(self) -> bool:
        """Whether any example may have one: more is not known before the stream is read."""
        return self._columns.caption is not None or bool(self._columns.default_caption)

    def __iter__(self) -> Iterator[Example]:
        rows = enumerate(self.dataset)
        while True:
            with _raised_as_data_error(self.source):
                i, row = next(rows, (0, None))
            if row is None:
                return
            yield self._columns.example(row, i)

    @property
    def identity(self) -> str:
        """SHA-256 over the names of source, split and columns, and names and sizes of files here: what is in them is
        not known before they are read."""
        sizes = [(file.name, _file_size(str(file))) for file in self.files]
        names = (self.source, self.dataset.split, self._columns.image, self._columns.caption, *chain(*sizes))
        default = self._columns.default_caption
        names += (default,) if default else ()
        return hashlib.sha256("".join(f"{name}\0" for name in names).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Columns:
    """The columns by which a row of a data set becomes an example."""

    source: str
    image: str
    caption: str | None
    default_caption: str
    folder: Path | None
    """Folder that relative paths are relative to; None where all are absolute."""

    def example(self, row: dict[str, Any], i: int) -> Example:
        """The example in row `i`."""
        cell = row[self.image] or {"bytes": None, "path": None}
        return Example(
            name=row.get(NAME) or _name(cell["path"], i),
            caption=self.caption_of(row[self.caption], i) if self.caption else self.default_caption,
            path=self._whole(cell["path"]),
            data=cell["bytes"],
            offset=row.get(OFFSET),
            size=row.get(SIZE),
        )

    def caption_of(self, value: Any, i: int) -> str:
        """The caption in row `i`. Raises `DataError` for what was decoded wrongly."""
        try:
            return caption_of(value) or self.default_caption
        except ValueError as error:
            problem = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise DataError(
                f"the caption of row {i} in {clean(self.source)} cannot be used, for {problem}; correct the data."
            ) from error

    def _whole(self, path: str | None) -> str | None:
        inside = str(self.folder / path) if self.folder and path and "://" not in path else None
        return inside if inside and os.path.isfile(inside) else path  # noqa: PTH113 - pathlib's raises for long names


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
    streaming: Literal[False] = ..., class_folders: bool = ..., default_caption: str = ...,
) -> Examples: ...  # fmt: skip
@overload
def open_examples(
    data: str | os.PathLike[str], *, split: str = ..., image_column: str | None = ..., caption_column: str | None = ...,
    streaming: bool, class_folders: bool = ..., default_caption: str = ...,
) -> Examples | Stream: ...  # fmt: skip
def open_examples(
    data: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    class_folders: bool = False,
    default_caption: str = "",
) -> Examples | Stream:
    """Open a data set. Raises `DataError` where there is none, or nothing in it.

    data:            a folder of images, at any depth; webdataset shards (.tar); parquet files; a folder of either; or a
                     data set's id on the Hub ("org/name", or "org/name:config").
    split:           of a data set on the Hub; files are one split.
    image_column:    of parquet files and data sets of the Hub; None finds it.
    caption_column:  there, or the key in metadata or .json files; None finds `text`, `caption`, or the like.
    streaming:       read a data set of the Hub, or parquet files, as they come instead of copying them to a disk first;
                     the result is a `Stream`. Of images in folders and shards nothing is copied either way.
    class_folders:   read names of folders as sd-scripts does: each image in "10_zork dog" counts ten times (and may be
                     both learnt from and held out), and has the caption "zork dog" if it has no other.
    default_caption: of all images that have none.

    The caption of a.png in a folder is the first of these that is not empty: its line in a metadata.jsonl, .csv, or
    .parquet (`file_name`, and `text` or `caption`) in its folder or above; a.txt; a.caption; a.png.txt; a.png.caption;
    a.json; a.png.json. Where no file has a name, the one that differs in case, Unicode normalization, or separator is
    taken. In shards it is KEY.txt, .caption, or .json, in this order. With `caption_column`, .json goes before .txt.
    Links to folders are followed once.
    """
    if not isinstance(data, (str, os.PathLike)) or not os.fspath(data):
        raise ArgumentError(f"data must be the path of a data set or its id on the Hub, not {data!r}.")
    if not isinstance(default_caption, str):
        raise ArgumentError(f"default_caption must be text, not {default_caption!r}.")
    source, default_caption = os.fspath(data), default_caption.strip()
    path = expanded(source)
    here = _exists(path)
    kind, files = _kind(path) if here else ("data sets of the Hub", [])
    if class_folders and kind != FOLDER:
        raise ArgumentError(f"class_folders= has no meaning for {kind}; leave it out.")
    columns: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "default_caption": default_caption,
    }
    if not here:
        return _from_hub(source, split, streaming, **columns)
    root = path if path.is_dir() else path.parent
    if kind == "parquet":
        for file in files:
            _check_regular(file)
        names = [glob.escape(str(file)) for file in files]  # which the library takes for patterns
        options: dict[str, Any] = {"path": "parquet", "data_files": names, "batch_size": 100}
        dataset = _load(source, streaming, **options)
        return _in_columns(dataset, source, streaming, files, folder=root.absolute(), **columns)
    if image_column is not None:
        raise ArgumentError(f"image_column= has no meaning for {kind}; leave it out.")
    unread, unusual = list[str](), list[str]()
    if kind == FOLDER:
        rows, unread, unusual = folder_rows(files, root, caption_column, class_folders)
    else:
        rows, pictures = tar_rows(files, root, caption_column)
        _warn_passed_over(pictures)
    if not rows:
        raise DataError(f"there is no image in {clean(source)}; name other data.")
    found: dict[str, Any] = {"default_caption": default_caption, "unread": unread, "unusual": unusual}
    return Examples(_table(rows), "image", "caption", source, **found)


def warn_of_captions(examples: Examples | Stream) -> None:
    """Warn, in the main process, where no example has a caption (what is trained on them learns no words), or where the
    captions lie in files that are not the usual ones."""
    if not is_main_process():
        return
    source, unread, unusual = clean(examples.source), examples.unread, examples.unusual
    if not examples.has_captions:
        count = f"{len(examples)} images" if isinstance(examples, Examples) else "images"
        shown = f" (there, but not read: {', '.join(map(clean, unread[:3]))})" if unread else ""
        told = f"none of the {count} in {source} has a caption{shown}; the empty prompt is taken for all."
        warnings.warn(told, stacklevel=1)
    elif unusual:
        warnings.warn(f"captions in {source} are read from {' and '.join(unusual)} files.", stacklevel=1)


def _warn_passed_over(names: Sequence[str]) -> None:
    if names:
        warnings.warn(f"{len(names)} files are passed over, which cannot be read: {listed(names)}.", stacklevel=1)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises for overlong names


def _check_regular(file: Path) -> None:
    try:
        open_regular(file).close()
    except OSError as error:
        raise DataError(f"cannot read {clean(file)}: {reason(error)}.") from error


FOLDER = "a folder of images"


def check_source(data: str | os.PathLike[str]) -> None:
    """Raise `DataError` for what cannot be a data set, going by its name alone."""
    source = os.fspath(data)
    parts = source.partition(":")[0].split("/")
    hub = len(parts) == 2 and all(parts) and parts[0][0] not in ".~" and "://" not in source
    if not hub and not _exists(expanded(source)):
        raise DataError(
            f"{clean(source)!r} is neither a path that exists nor the id of a data set on the Hub (org/name)."
        )


def _kind(path: Path) -> tuple[str, list[Path]]:
    """What a path holds, and its files."""
    suffixes = {FOLDER: images.READABLE, "parquet": {".parquet"}, "tar shards": {".tar"}}
    if not path.is_dir() and path.suffix.lower() not in (".parquet", ".tar"):
        raise DataError(
            f"{clean(path)} is no data set; name a folder of images, .parquet or .tar files, or one of the latter."
        )
    every = frozenset[str]().union(*suffixes.values())
    try:
        files = find_files([path], every, images.UNREADABLE)
    except SdkitError as error:
        if isinstance(error.__cause__, OSError):
            raise DataError(str(error)) from error
        there = re.search(r" \(but .*?\)", str(error))
        where = f"{clean(path)}{there[0] if there else ''}"
        raise DataError(f"there is no image, .parquet or .tar file in {where}; name other data.") from error
    if closed := [file for file in files if file.suffix.lower() not in every]:
        raise DataError(f"cannot read {clean(closed[0])}; change its permissions, or take it out of the data.")
    kinds = {kind: [file for file in files if file.suffix.lower() in known] for kind, known in suffixes.items()}
    if kinds[FOLDER]:  # those with metadata of the images are no data of their own
        kinds["parquet"] = [file for file in kinds["parquet"] if file.name not in NAMES]
    present = {kind: found for kind, found in kinds.items() if found}
    if len(present) > 1:
        counts = " and ".join(f"{len(found)} {found[0].suffix}" for found in present.values())
        raise DataError(
            f"{clean(path)} holds data of several kinds ({counts} files and the like); name a folder of one kind."
        )
    return next(iter(present.items()))


def _table(rows: list[dict[str, Any]]) -> Any:
    """A data set of the `datasets` library that holds where each image lies."""
    datasets = _datasets()
    features = {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    features |= {NAME: datasets.Value("string"), OFFSET: datasets.Value("int64"), SIZE: datasets.Value("int64")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _from_hub(source: str, split: str, streaming: bool, **columns: Any) -> Examples | Stream:
    check_source(source)
    name, _, config = source.partition(":")
    dataset = _load(source, streaming, split, path=name, **({"name": config} if config else {}))
    return _in_columns(dataset, source, streaming, **columns)


def _load(source: str, streaming: bool, split: str = "train", **options: Any) -> Any:
    datasets = _datasets()
    with _raised_as_data_error(source), quiet("datasets"):
        return datasets.load_dataset(split=split, streaming=streaming, **options)


def _in_columns(
    dataset: Any,
    source: str,
    streaming: bool,
    files: Sequence[Path] = (),
    *,
    image_column: str | None,
    caption_column: str | None,
    default_caption: str,
    folder: Path | None = None,
) -> Examples | Stream:
    """The examples in the columns of these names, or of the likeliest ones."""
    datasets = _datasets()
    if dataset.features is None:  # a stream that says nothing of its columns before it is read
        with _raised_as_data_error(source):
            dataset = dataset._resolve_features()
    features: dict[str, Any] = dict(dataset.features)
    listed = clean(", ".join(features))
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in features:
            raise DataError(f"{option}: {clean(source)} has no column {clean(column)!r}; it has {listed}.")
    holding = [name for name, feature in features.items() if _holds_images(feature, datasets)]
    image = image_column or next((name for name in IMAGE_COLUMNS if name in holding), None) or next(iter(holding), None)
    if image is None or image not in holding:
        what = "has no column of images" if image is None else f"has no images in its column {clean(image)!r}"
        raise DataError(f"{clean(source)} {what}; its columns: {listed}.")
    decoded = [name for name, feature in features.items() if _is_decoded(feature)]  # images, sounds: no captions
    if caption_column == image or caption_column in decoded:
        raise DataError(
            f"column {clean(caption_column)!r} of {clean(source)} holds images or the like; name another as "
            "caption_column."
        )
    likely = (name for name in CAPTION_KEYS if name in features and name not in decoded and name != image)
    caption = caption_column or next(likely, None)
    with quiet("datasets"), _raised_as_data_error(source):
        dataset = dataset.select_columns([image, caption] if caption else [image])
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    if streaming:
        return Stream(dataset, image, caption, source, files, default_caption=default_caption, folder=folder)
    return Examples(dataset, image, caption, source, default_caption=default_caption, folder=folder)


def _holds_images(feature: Any, datasets: Any) -> bool:
    """Whether a column holds encoded images: of the type Image, bytes, or fields of which one is `bytes`."""
    encoded = feature.get("bytes") if isinstance(feature, dict) else feature
    return isinstance(feature, datasets.Image) or getattr(encoded, "dtype", "") in ("binary", "large_binary")


def _is_decoded(feature: Any) -> bool:
    """Whether the library would open the content of a column: an image or a sound, which may be an address."""
    parts = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return hasattr(feature, "decode_example") or any(_is_decoded(part) for part in parts if part is not None)


def _datasets() -> Any:
    """The library; it takes over a second to import."""
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError("reading data sets needs the datasets library; install 'sdkit[train]'.") from error


@contextlib.contextmanager
def _raised_as_data_error(source: str) -> Iterator[None]:
    """Raise whatever the library raises as a `DataError` of one sentence."""
    try:
        yield
    except Exception as error:  # its builders raise nearly anything
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        problem = re.split(r"\n|[.!?] (?=[A-Z])", str(cause).strip())[0].rstrip(".!") or type(cause).__name__
        problem = f"cannot open the data set {clean(source)!r}: {clean(problem)}"
        raise stop_in(error) or DataError(f"{problem}; check the name and the files.") from error
