"""Measure draws: distances from held-out digits, precision and recall, and whether they show what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdkit.evaluation.frechet import frechet_distance, frechet_interval
from sdkit.evaluation.precision_recall import precision_recall
from sdkit.recipes.compare import draws
from sdkit.recipes.compare.data import Captioned, Digits, Images, digits, levels, word_of
from sdkit.recipes.compare.draws import HELD_OUT, REFERENCE, TRAINING, Cost
from sdkit.recipes.compare.judging import Judges, load_judges

RESAMPLES = 50  # of the bootstrap
DRAWS, JUDGES = "draws", "judges"
"""Subfolders of a comparison."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        cost: Name of the system or control, and what it costs.
        frechet: Fréchet distance between the classifier's features of the draws and of the held-out reference.
        margin: Half of the distance's 95 % interval, from the bootstrap over the draws.
        precision: Share of draws among the reference, in [0, 1].
        recall: Share of the reference that the draws reach.
        nearest: Distance to the nearest training digit: root mean square, in levels of 255, averaged over draws.
        accuracy: Share of draws that show the wanted digit; None of a system that reads none.
        retrieval: Share of draws whose caption is the nearest of twenty; None of a system that reads no text.
    """

    cost: Cost
    frechet: float
    margin: float
    precision: float
    recall: float
    nearest: float
    accuracy: float | None
    retrieval: float | None


def measured(folder: Path, data: Digits | None = None) -> list[Row]:
    """Measure all draws of a comparison and the controls.

    Args:
        folder: Folder of the comparison, with draws and judges; the one that comes with sdkit is `SHIPPED`.
        data: The digits; None loads them.

    Returns:
        Rows of the controls, and then of the systems.

    Raises:
        SourceError: The judges are missing or damaged, or draws that are there are damaged.
    """
    data = digits() if data is None else data
    judges = load_judges(folder / JUDGES)
    systems = draws.every(folder / DRAWS)
    count = max([cost.images for cost, _ in systems], default=len(data.reference))
    return [measure(cost, pictures, data, judges) for cost, pictures in [*controls(data, count), *systems]]


def measure(cost: Cost, pictures: Images, data: Digits, judges: Judges) -> Row:
    """Measure the draws of a system, or the pictures of a control.

    Args:
        cost: What they are; `captions_of` names the set whose captions they show.
        pictures: The pictures, in the order of the captions.
        data: The digits.
        judges: The judges.
    """
    pictures = draws.grey(pictures)
    found, real = judges.features(pictures), judges.features(draws.grey(data.reference.pictures))
    distance = frechet_distance(found, real)
    near = precision_recall(found, real)
    wanted = _wanted(cost, data)[: len(pictures)]
    return Row(
        cost=cost,
        frechet=distance,
        margin=frechet_interval(found, real, distance, resamples=RESAMPLES)[1] - distance,
        precision=near.precision,
        recall=near.recall,
        nearest=nearest_distance(levels(pictures), levels(data.training.pictures)),
        accuracy=judges.accuracy(pictures, [word_of(text) for text in wanted.captions]) if cost.asked else None,
        retrieval=judges.retrieval(pictures, wanted.captions) if cost.asked == "text" else None,
    )


def nearest_distance(pictures: Tensor, training: Tensor) -> float:
    """Return the distance of pictures (N, D) to the nearest of others (M, D): root mean square, averaged over N."""
    nearest = torch.cdist(pictures.double(), training.double()).min(1).values
    return float((nearest / pictures.shape[1] ** 0.5).mean())


def controls(data: Digits, count: int) -> list[tuple[Cost, list[Image.Image]]]:
    """Return the controls: the mean image, real digits, and training digits, `count` of each."""
    mean = Image.fromarray(np.mean([np.asarray(one) for one in data.training.pictures], axis=0).round().astype("uint8"))
    return [
        (Cost(name="mean image", images=count, order=-10), draws.grey([mean] * count)),
        (
            Cost(name="held-out digits", images=count, order=-9, asked="text", captions_of=HELD_OUT),
            draws.grey(data.held_out.pictures[:count]),
        ),
        (
            Cost(name="training digits", images=count, order=-8, asked="text", captions_of=TRAINING),
            draws.grey(data.training.pictures[:count]),
        ),
    ]


def _wanted(cost: Cost, data: Digits) -> Captioned:
    sets: dict[str, Captioned] = {REFERENCE: data.reference, HELD_OUT: data.held_out, TRAINING: data.training}
    return sets[cost.captions_of]


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    """Return rows by the name of their system."""
    return {row.cost.name: row for row in rows}
