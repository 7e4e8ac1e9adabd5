"""Pairs of images and conditions: a further image for each example, in a column or in another data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from sdkit.arguments import one_of, path_or_name
from sdkit.data.captioned_files import NAME
from sdkit.data.example import Example
from sdkit.data.examples import Examples, Stream
from sdkit.data.sources import open_examples
from sdkit.errors import ArgumentError, DataError, ImageError
from sdkit.images import to_pil, to_tensors
from sdkit.loading.configs import CONDITIONS
from sdkit.messages import clean

PROPORTIONS = 0.02
"""Largest relative difference between the aspect ratios of an image and of its condition."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of a data set of images.

    Attributes:
        identity: Fingerprint of the conditions.
        images: The condition of each image, or the image that it is made of; None if that is the image itself.
        make: Makes a condition of an image that is cropped already; None takes the image as it is.
    """

    identity: str
    images: Sequence[Example] | None
    make: Callable[[Image.Image], Image.Image] | None = None

    def of(self, pixels: Tensor) -> Tensor:
        """Return the condition that is made of pixels (3, H, W) in [-1, 1], in the same range."""
        return pixels if self.make is None else to_tensors(self.make(to_pil(pixels)[0]))[0]

    def added_to(self, identity: str) -> str:
        """Return the fingerprint of images with these conditions, given that of the images."""
        return hashlib.sha256(f"{identity} {self.identity}".encode()).hexdigest()[:16]


class Rows(Sequence[Example]):
    """The rows of a data set, some of them if `rows` names them, which are read when they are used."""

    def __init__(self, examples: Examples, rows: Sequence[int] | None = None) -> None:
        self.examples, self.rows = examples, range(len(examples)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.examples[self.rows[i]]


def check_conditions(column: str | None, conditioning_data: str | os.PathLike[str] | None, kind: str | None) -> None:
    """Raise ArgumentError if conditions are of an unknown kind, or if two places or impossible ones are named."""
    if kind is not None:
        one_of("condition_kind", kind, CONDITIONS)
    for name, place in (("condition_column", column), ("conditioning_data", conditioning_data)):
        if place is not None:
            path_or_name(name, place)
    if column is not None and conditioning_data is not None:
        raise ArgumentError("condition_column and conditioning_data both name the conditions; leave one of them out.")


def kind_of_conditions(
    column: str | None, conditioning_data: str | os.PathLike[str] | None, kind: str | None
) -> str | None:
    """Return the kind of the conditions that are asked for, by default "latents"; None if there are none.

    Raises:
        ArgumentError: As in `check_conditions`, or a kind is given without a place.
    """
    check_conditions(column, conditioning_data, kind)
    if column is not None or conditioning_data is not None:
        return kind or "latents"
    if kind is not None:
        raise ArgumentError("condition_kind belongs to conditions; name them as condition_column.")
    return None


def open_conditions(
    examples: Examples | Stream,
    data: str | os.PathLike[str],
    *,
    column: str | None,
    conditioning_data: str | os.PathLike[str] | None,
    option: str = "condition_column",
    **opened_with: Any,
) -> Conditions:
    """Open the conditions of a data set.

    Args:
        examples: The images.
        data: The source that they were opened from.
        column: The column of the conditions, in parquet files and data sets of the Hub.
        conditioning_data: A data set of conditions, images of the same names as the examples, except for their
            suffixes; in place of `column`.
        option: The option that names the column, for messages.
        **opened_with: The keyword arguments of `open_examples` that the images were opened with.

    Raises:
        ArgumentError: The images are streamed, or have no columns.
        DataError: There is no such column, or an image has no condition.
    """
    if not isinstance(examples, Examples):
        raise ArgumentError("conditions are not read from a stream; leave streaming out.")
    if conditioning_data is not None:
        beside = open_examples(conditioning_data, split=opened_with.get("split", "train"))
        return Conditions(identity=beside.identity, images=of_same_names(examples.names, beside))
    if NAME in examples.dataset.column_names:
        raise ArgumentError(
            f"{option}: {clean(os.fspath(data))} holds files, which have no columns; name the folder of the "
            "conditions as conditioning_data."
        )
    try:
        found = open_examples(data, **opened_with | {"image_column": column})
        return Conditions(identity=found.identity, images=Rows(found))
    except DataError as error:
        raise DataError(f"{option}: {str(error).removeprefix('image_column: ')}") from error


def shaped_like(size: tuple[int, int], condition: Image.Image) -> Image.Image:
    """Return a condition at the size (width, height) of its image. Raise ImageError if their proportions differ."""
    width, height = size
    if abs(width * condition.height / (height * condition.width) - 1) > PROPORTIONS:
        raise ImageError(
            f"its condition has {condition.width} x {condition.height} pixels, the image {width} x {height}: they must "
            "have the same proportions."
        )
    return condition if condition.size == size else condition.resize(size, Image.Resampling.LANCZOS)


def of_same_names(names: Sequence[str], conditions: Examples) -> Rows:
    """Return the condition of each name, found by its name without suffix. Raise DataError if one is missing."""
    found: dict[str, int] = {}
    for i, name in enumerate(conditions.names):
        if found.setdefault(_stem(name), i) != i:
            raise DataError(
                f"{clean(conditions.source)} has two conditions called {clean(_stem(name))}; leave one of them."
            )
    if missing := [name for name in names if _stem(name) not in found]:
        raise DataError(
            f"{clean(conditions.source)} has no condition for {len(missing)} of {len(names)} images, such as "
            f"{clean(missing[0])}; give each image one of the same name."
        )
    return Rows(conditions, [found[_stem(name)] for name in names])


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122 - the name of an example is no path
