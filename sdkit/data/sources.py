"""Data sets opened from any source: a folder of images, tar shards, parquet files, or the Hub."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from sdkit import images
from sdkit.data.captioned_files import NAME, OFFSET, SIZE, folder_rows
from sdkit.data.columns import choose_columns
from sdkit.data.datasets_library import datasets_library, load, raised_as_data_error
from sdkit.data.examples import Examples, Stream
from sdkit.data.metadata import NAMES
from sdkit.data.tar_shards import tar_rows
from sdkit.errors import ArgumentError, DataError, SdkitError
from sdkit.file_search import NoFilesFoundError, find_files
from sdkit.files import expanded, open_regular
from sdkit.messages import clean, listed, quiet, reason

FOLDER, PARQUET, SHARDS, HUB = "a folder of images", "parquet", "tar shards", "data sets of the Hub"
"""Kinds of sources, as messages name them."""
SUFFIXES = {FOLDER: images.READABLE, PARQUET: {".parquet"}, SHARDS: {".tar"}}
"""Kind of a local source -> suffixes of its files."""


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
    """Open a data set of images and captions.

    In a folder, the caption of a.png is the first of these that is not empty: its line in a metadata.jsonl, .csv, or
    .parquet (`file_name`, and `text` or `caption`) in its folder or above; a.txt; a.caption; a.png.txt; a.png.caption;
    a.json; a.png.json. With `caption_column`, both .json files come before a.txt. If no file has exactly the expected
    name, case, Unicode normalization, and / or \\ may differ. Links to folders are followed; no folder is read twice.

    In tar shards, the caption of KEY.png is KEY.txt, KEY.caption, or KEY.json, in this order. With `caption_column`,
    only .json files, and files with a suffix of that name, are read.

    Args:
        data: A folder of images, at any depth; webdataset shards (.tar); parquet files; a folder of either; or the id
            of a data set on the Hub ("org/name", or "org/name:config").
        split: Split of a data set on the Hub. Ignored for local files, which are one split.
        image_column: Column of images in parquet files and Hub data sets. None finds it.
        caption_column: Column of captions there, or the key in metadata and .json files. None finds `text`, `caption`,
            or the like.
        streaming: Read parquet files or a Hub data set on the fly instead of copying them to disk first. The result is
            a `Stream`. Ignored for folders and shards, which are never copied.
        class_folders: Read names of folders as sd-scripts does. Each image in "10_zork dog" counts ten times (and may
            be both trained on and held out), and has the caption "zork dog" if it has no other.
        default_caption: Caption of all images that have none.

    Raises:
        ArgumentError: An option does not apply to this kind of source.
        DataError: There is no such data set, or no image in it.
    """
    if not isinstance(data, (str, os.PathLike)) or not os.fspath(data):
        raise ArgumentError(f"data must be the path of a data set or its id on the Hub, not {data!r}.")
    if not isinstance(default_caption, str):
        raise ArgumentError(f"default_caption must be text, not {default_caption!r}.")
    source, default_caption = os.fspath(data), default_caption.strip()
    path = expanded(source)
    kind, files = _kind_and_files(path) if _exists(path) else (HUB, [])
    if class_folders and kind != FOLDER:
        raise ArgumentError(f"class_folders= has no meaning for {kind}; leave it out.")
    columns: dict[str, Any] = {
        "image_column": image_column,
        "caption_column": caption_column,
        "default_caption": default_caption,
    }
    if kind == HUB:
        return _open_hub(source, split, streaming, **columns)
    root = path if path.is_dir() else path.parent
    if kind == PARQUET:
        return _open_parquet(source, files, root, streaming, **columns)
    if image_column is not None:
        raise ArgumentError(f"image_column= has no meaning for {kind}; leave it out.")
    unread, unusual = list[str](), list[str]()
    if kind == FOLDER:
        rows, unread, unusual = folder_rows(files, root, caption_column, class_folders)
    else:
        rows, unreadable = tar_rows(files, root, caption_column)
        _warn_passed_over(unreadable)
    if not rows:
        raise DataError(f"there is no image in {clean(source)}; name other data.")
    found: dict[str, Any] = {"default_caption": default_caption, "unread": unread, "unusual": unusual}
    return Examples(_table(rows), "image", "caption", source, **found)


def check_source(data: str | os.PathLike[str]) -> None:
    """Raise DataError if `data` is neither an existing path nor formed like an id on the Hub. Opens nothing."""
    source = os.fspath(data)
    parts = source.partition(":")[0].split("/")
    hub = len(parts) == 2 and all(parts) and parts[0][0] not in ".~" and "://" not in source
    if not hub and not _exists(expanded(source)):
        raise DataError(
            f"{clean(source)!r} is neither a path that exists nor the id of a data set on the Hub (org/name)."
        )


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises for overlong names


def _kind_and_files(path: Path) -> tuple[str, list[Path]]:
    """Return the kind of a local source, and its files."""
    if not path.is_dir() and path.suffix.lower() not in (".parquet", ".tar"):
        raise DataError(
            f"{clean(path)} is no data set; name a folder of images, .parquet or .tar files, or one of the latter."
        )
    every = frozenset[str]().union(*SUFFIXES.values())
    try:
        files = find_files([path], every, images.UNREADABLE)
    except NoFilesFoundError as error:
        raise DataError(
            f"there is no image, .parquet or .tar file in {clean(path)}{error.others}; name other data."
        ) from error
    except SdkitError as error:
        raise DataError(str(error)) from error
    # `find_files` also returns folders that it could not list, which have none of the suffixes.
    if closed := [file for file in files if file.suffix.lower() not in every]:
        raise DataError(f"cannot read {clean(closed[0])}; change its permissions, or take it out of the data.")
    kinds = {kind: [file for file in files if file.suffix.lower() in known] for kind, known in SUFFIXES.items()}
    if kinds[FOLDER]:  # a metadata.parquet beside images holds their captions, not a data set
        kinds[PARQUET] = [file for file in kinds[PARQUET] if file.name not in NAMES]
    present = {kind: found for kind, found in kinds.items() if found}
    if len(present) > 1:
        counts = " and ".join(f"{len(found)} {found[0].suffix}" for found in present.values())
        raise DataError(
            f"{clean(path)} holds data of several kinds ({counts} files and the like); name a folder of one kind."
        )
    return next(iter(present.items()))


def _warn_passed_over(names: Sequence[str]) -> None:
    if names:
        warnings.warn(f"{len(names)} files are passed over, which cannot be read: {listed(names)}.", stacklevel=1)


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return a `datasets.Dataset` of the rows, which name the files of images but do not hold their content."""
    datasets = datasets_library()
    features = {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    features |= {NAME: datasets.Value("string"), OFFSET: datasets.Value("int64"), SIZE: datasets.Value("int64")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _open_hub(source: str, split: str, streaming: bool, **columns: Any) -> Examples | Stream:
    check_source(source)
    name, _, config = source.partition(":")
    dataset = load(source, streaming, split, path=name, **({"name": config} if config else {}))
    return _in_columns(dataset, source, streaming, **columns)


def _open_parquet(source: str, files: Sequence[Path], root: Path, streaming: bool, **columns: Any) -> Examples | Stream:
    for file in files:
        _check_regular(file)
    names = [glob.escape(str(file)) for file in files]  # `datasets` expands glob patterns
    dataset = load(source, streaming, path="parquet", data_files=names, batch_size=100)
    return _in_columns(dataset, source, streaming, files, folder=root.absolute(), **columns)


def _check_regular(file: Path) -> None:
    try:
        open_regular(file).close()
    except OSError as error:
        raise DataError(f"cannot read {clean(file)}: {reason(error)}.") from error


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
    """Return the examples in the given columns of a data set. For a column that is None, choose the likeliest."""
    if dataset.features is None:  # some streams know their columns only after a row is read
        with raised_as_data_error(source):
            dataset = dataset._resolve_features()
    image, caption = choose_columns(dict(dataset.features), source, image_column, caption_column)
    with quiet("datasets"), raised_as_data_error(source):
        dataset = dataset.select_columns([image, caption] if caption else [image])
        dataset = dataset.cast_column(image, datasets_library().Image(decode=False))
    if streaming:
        return Stream(dataset, image, caption, source, files, default_caption=default_caption, folder=folder)
    return Examples(dataset, image, caption, source, default_caption=default_caption, folder=folder)
