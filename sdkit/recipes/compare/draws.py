"""Draws of a system: its images as one lossless picture, with what they cost as JSON beside it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdkit import images
from sdkit.atomic import atomic_write
from sdkit.errors import ImageError, SourceError
from sdkit.recipes.compare.data import HELD_OUT as MOST
from sdkit.recipes.compare.data import SIDE, Images
from sdkit.strict_json import read_object, require

COLUMNS = 20
REFERENCE, HELD_OUT, TRAINING = "reference", "held_out", "training"
"""Names of the three sets of digits."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of a system, and the part of a caption that it reads.

    Attributes:
        name: Name of the system, or of a control.
        images: Number of images.
        order: Place in the table.
        asked: What the system reads of a caption: "" (nothing), "class", or "text".
        captions_of: The set whose captions were asked for: a field of `Digits`.
        training: CPU time of the training, in seconds; None for a control.
        weights: Number of weights that take part in a drawing.
        evaluations: Evaluations of a network for each image.
        seconds: CPU time of an image, in seconds.
    """

    name: str
    images: int
    order: int
    asked: str = ""
    captions_of: str = REFERENCE
    training: float | None = None
    weights: int | None = None
    evaluations: int | None = None
    seconds: float | None = None


def slug(name: str) -> str:
    """Return the name of a system's files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def grey(pictures: Images) -> list[Image.Image]:
    """Return pictures in grey, as they are saved and measured."""
    return [one.convert("L") for one in pictures]


def save(folder: Path, cost: Cost, pictures: Images) -> None:
    """Save draws as NAME.png and then NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.zeros((rows * SIDE, COLUMNS * SIDE), np.uint8)
    for i, picture in enumerate(grey(pictures)):
        sheet[_place(i)] = np.asarray(picture)
    with atomic_write(folder / f"{slug(cost.name)}.png") as path:
        Image.fromarray(sheet).save(path, "PNG", optimize=True)
    with atomic_write(folder / f"{slug(cost.name)}.json") as path:
        path.write_text(json.dumps(asdict(cost), indent=1) + "\n", encoding="utf-8")


def load(folder: Path, name: str) -> tuple[Cost, list[Image.Image]] | None:
    """Return the draws of a system, or None if there are none.

    Raises:
        SourceError: They are damaged.
    """
    file = folder / f"{slug(name)}.json"
    if not file.exists():
        return None
    try:
        cost = _cost(read_object(file))
        sheet = np.asarray(images.read(file.with_suffix(".png")).convert("L"))
        return cost, _cut(sheet, cost.images)
    except (OSError, ValueError, ImageError) as error:
        raise SourceError(
            f"the draws in {str(file)!r} are damaged; delete the file, and they are made again."
        ) from error


def every(folder: Path) -> list[tuple[Cost, list[Image.Image]]]:
    """Return all draws in a folder, in the order of the table."""
    loaded = [load(folder, path.stem) for path in sorted(folder.glob("*.json"))]
    return sorted([one for one in loaded if one is not None], key=lambda one: one[0].order)


def _cost(content: dict[str, Any]) -> Cost:
    """Return what a JSON file states. Raise ValueError if a value is impossible."""
    texts, counts, measured = ("name", "asked", "captions_of"), ("weights", "evaluations"), ("training", "seconds")
    require(content, dict.fromkeys(texts, str) | {"images": int, "order": int})
    require(content, dict.fromkeys(counts, (int, type(None))) | dict.fromkeys(measured, (float, type(None))))
    cost = Cost(**{field.name: content[field.name] for field in fields(Cost)})
    if cost.asked not in ("", "class", "text") or cost.captions_of not in (REFERENCE, HELD_OUT, TRAINING):
        raise ValueError("asks for captions of no known kind")
    if not 1 <= cost.images <= MOST:
        raise ValueError("has an impossible number of images")
    return cost


def _cut(sheet: np.ndarray[Any, np.dtype[np.uint8]], count: int) -> list[Image.Image]:
    """Return the first pictures of a sheet."""
    pictures = [sheet[_place(i)] for i in range(count)]
    if any(one.shape != (SIDE, SIDE) for one in pictures):
        raise ValueError("the sheet is too small")
    return [Image.fromarray(one) for one in pictures]


def _place(i: int) -> tuple[slice, slice]:
    """Return the rows and columns of pixels that picture i takes on the sheet."""
    top, left = i // COLUMNS * SIDE, i % COLUMNS * SIDE
    return slice(top, top + SIDE), slice(left, left + SIDE)
