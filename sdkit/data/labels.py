"""Classes of images: from the names of their folders, or from a column."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from sdkit.arguments import path_or_name
from sdkit.data.captioned_files import NAME, OFFSET, Places, matched
from sdkit.data.captions import caption_of
from sdkit.data.examples import Examples, Stream
from sdkit.data.metadata import NAMES, read_metadata
from sdkit.data.sources import open_examples
from sdkit.errors import ArgumentError, DataError
from sdkit.file_search import walk
from sdkit.files import expanded
from sdkit.messages import clean, listed
from sdkit.networks.class_list import ClassList, plain


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """The classes of a data set, and the class of each of its examples.

    Attributes:
        classes: Names of the classes in the order of their numbers.
        numbers: The number of each example's class (N,), int64.
    """

    classes: tuple[str, ...]
    numbers: npt.NDArray[np.int64]

    @property
    def identity(self) -> str:
        """SHA-256 over the classes and the numbers; 16 hex digits."""
        names = "".join(f"{name}\0" for name in self.classes)
        return hashlib.sha256(names.encode() + self.numbers.tobytes()).hexdigest()[:16]

    def numbered_as(self, classes: Sequence[str], whose: str) -> Labels:
        """Return the same labels with the numbers that a model gives to the classes.

        Args:
            classes: The model's classes in the order of their numbers. They may be more than those of the data.
            whose: The model, for messages.

        Raises:
            DataError: The model does not know a class of the data.
        """
        known = ClassList(tuple(classes))
        places = [known.number(name) for name in self.classes]
        if unknown := [name for name, place in zip(self.classes, places, strict=True) if place is None]:
            raise DataError(
                f"{whose} knows no class {listed(unknown)}; leave these images out, or train a model from scratch."
            )
        return Labels(classes=known.names, numbers=np.array(places, np.int64)[self.numbers])


def read_labels(
    examples: Examples | Stream, data: str | os.PathLike[str], *, column: str | None = None, **opened_with: Any
) -> Labels:
    """Read the class of each example. Images are not read.

    Without a column, the class of an image is the name of the folder that it lies in: "cat" for animals/cat/1.png. A
    column is a key of metadata.jsonl (or .csv, or .parquet) for a folder of images, a field of the .json files in tar
    shards, or a column of parquet files and data sets of the Hub; the classes of a `ClassLabel` have its names.

    Classes are numbered as in `ClassList.of`.

    Args:
        examples: The examples.
        data: The source that they were opened from.
        column: The column of the classes; None takes names of folders.
        **opened_with: The keyword arguments of `open_examples` that the examples were opened with.

    Raises:
        ArgumentError: The examples are streamed.
        DataError: There is no such column, an example has no class, or all have the same.
    """
    if not isinstance(examples, Examples):
        raise ArgumentError("classes are not read from a stream; leave streaming out.")
    if column is None:
        return folder_labels(examples.names, os.fspath(data))
    path_or_name("label_column", column)
    in_folder = NAME in examples.dataset.column_names and not _has_shards(examples)
    values = _in_metadata(examples, data, column) if in_folder else _in_column(data, column, opened_with)
    return labels_of(values, examples.names, os.fspath(data))


def folder_labels(names: Sequence[str], source: str) -> Labels:
    """Return the classes that examples have by the folders in their names, such as "cat" for "animals/cat/1.png".

    Args:
        names: Names of the examples, as those of `Examples` or of a latent cache.
        source: Name of the data, for messages.

    Raises:
        DataError: An image lies in no folder, or all lie in the same.
    """
    parents = [PurePosixPath(name).parent.name for name in names]
    if missing := [name for name, parent in zip(names, parents, strict=True) if not parent or parent.endswith(".tar")]:
        raise DataError(
            f"{len(missing)} of {len(names)} images in {clean(source)} lie in no folder, such as {clean(missing[0])}, "
            "and have no class; put the images of each class into a folder of its own, or name the column of the "
            "classes as label_column."
        )
    return labels_of(parents, names, source)


def labels_by_name(names: Sequence[str], labels: Labels, of: Sequence[str], source: str) -> Labels:
    """Return the labels of some examples, given those of the data set that they come from, such as for a latent cache.

    Args:
        names: Names of the examples.
        labels: Labels of a data set.
        of: Names of the examples in that data set.
        source: Name of that data set, for messages.

    Raises:
        DataError: The data set has no example of one of the names.
    """
    number = dict(zip(of, labels.numbers, strict=True))
    if missing := [name for name in names if name not in number]:
        raise DataError(
            f"{clean(source)} has no image called {clean(missing[0])} ({len(missing)} of {len(names)} are missing), so "
            "its class is unknown; name the data that the cache was made of."
        )
    return Labels(classes=labels.classes, numbers=np.array([number[name] for name in names], np.int64))


def labels_of(values: Sequence[str], names: Sequence[str], source: str) -> Labels:
    """Number classes that are given as texts.

    Args:
        values: The class of each example; "" where it has none.
        names: Names of the examples, for messages.
        source: Name of the data, for messages.

    Raises:
        DataError: An example has no class, or all have the same.
    """
    if missing := [name for name, value in zip(names, values, strict=True) if not plain(value)]:
        raise DataError(
            f"{len(missing)} of {len(names)} images in {clean(source)} have no class, such as {clean(missing[0])}; "
            "give each image one, or leave these out."
        )
    classes = ClassList.of(values)
    if len(classes.names) == 1:
        raise DataError(f"all images in {clean(source)} are of the class {clean(values[0])!r}; give at least two.")
    return Labels(classes=classes.names, numbers=np.array([classes.number(value) for value in values], np.int64))


def _has_shards(examples: Examples) -> bool:
    """Return whether the examples lie in tar shards."""
    return any(offset is not None for offset in examples.dataset[:1][OFFSET])


def _in_metadata(examples: Examples, data: str | os.PathLike[str], column: str) -> list[str]:
    """Return the class of each image of a folder, which its line in a metadata file states."""
    root = expanded(data)
    rows, keys = read_metadata({str(Path(folder)): names for folder, names in walk(root)}, column)
    if column not in keys:
        have = listed(sorted(keys)) if keys else "none"
        raise DataError(
            f"label_column: no line of a {NAMES[0]} in {root} has {clean(column)!r}; the keys there: {have}."
        )
    place = Places()
    paths = [Path(path or "") for path in examples.paths]
    stated = matched(rows, {place(path): path for path in paths}, place)
    return [stated.get(place(path), "") for path in paths]


def _in_column(data: str | os.PathLike[str], column: str, opened_with: dict[str, Any]) -> list[str]:
    """Return the class of each example, from a column of a table or a field of the .json files in tar shards."""
    try:
        opened = open_examples(data, **opened_with | {"caption_column": column, "default_caption": ""})
    except DataError as error:
        raise DataError(f"label_column: {str(error).removeprefix('caption_column: ')}") from error
    if NAME in opened.dataset.column_names:
        return list(opened.captions)
    names = getattr(opened.dataset.features[column], "names", None)
    return [_text(value, names, i) for i, value in enumerate(opened.dataset[column])]


def _text(value: Any, names: Sequence[str] | None, i: int) -> str:
    """Return the class in a cell as text; "" if there is none. `names` are a `ClassLabel`'s, whose -1 is none."""
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else ""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return caption_of(value)
    except ValueError as error:
        raise DataError(f"label_column: the class in row {i} cannot be used, for {error}; correct the data.") from error
