"""Digits with captions, such as "a thick seven": scikit-learn's handwritten digits, enlarged to 16 x 16 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdkit.atomic import whole_folder
from sdkit.errors import SourceError, TrainingError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thick", "thin")
CAPTIONS = tuple(f"a {stroke} {word}" for word in WORDS for stroke in STROKES)
UNSEEN = ("a thick four", "a thin eight")
"""Captions that are left out of every training with text, to see whether words combine."""
SIDE = 16
HELD_OUT = 300
"""Digits of each of the two held-out sets."""
CLASSES, CAPTIONED, EVERYTHING = "classes", "captioned", "everything"
"""Folders of the training images: in folders of their classes; with captions, but without those of `UNSEEN`; and with
all captions, for the judge."""
Images = Sequence[Image.Image]


@dataclass(frozen=True)
class Captioned:
    """Pictures with what they show.

    Attributes:
        pictures: RGB pictures of 16 x 16 pixels.
        labels: The digit that each shows.
        captions: Its caption.
    """

    pictures: list[Image.Image]
    labels: list[int]
    captions: list[str]

    def __getitem__(self, part: slice) -> Captioned:
        return Captioned(self.pictures[part], self.labels[part], self.captions[part])

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class Digits:
    """The digits in a fixed random order, cut into three.

    Attributes:
        training: 1,197 digits, the only ones that systems are trained on.
        reference: 300 held-out digits, from which distances are measured.
        held_out: 300 other held-out digits, as good as a perfect model's draws.
    """

    training: Captioned
    reference: Captioned
    held_out: Captioned


def digits() -> Digits:
    """Return the digits.

    Thick ones have more ink than the median of their class.

    Raises:
        SourceError: scikit-learn, which comes with the digits, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SourceError(
            "the digits come with scikit-learn, which is not installed; run pip install scikit-learn."
        ) from error
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64), levels from 0 to 16
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, labels = pixels[order] * 255 / 16, labels[order]
    ink = pixels.mean(1)
    medians = np.array([np.median(ink[labels == k]) for k in range(len(WORDS))])
    thick = ink > medians[labels]
    everything = Captioned(
        [enlarged(one) for one in pixels.reshape(-1, 8, 8)],
        [int(label) for label in labels],
        [f"a {STROKES[0] if t else STROKES[1]} {WORDS[label]}" for t, label in zip(thick, labels, strict=True)],
    )
    first, second = len(everything) - 2 * HELD_OUT, len(everything) - HELD_OUT
    return Digits(everything[:first], everything[first:second], everything[second:])


def enlarged(levels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Image.Image:
    """Return levels (8, 8) from 0 to 255 as an RGB picture of 16 x 16 pixels."""
    return Image.fromarray(levels.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def write(training: Captioned, folder: Path) -> None:
    """Write the training images, in each of the three ways, unless the folder exists.

    Raises:
        TrainingError: The folder cannot be written.
    """
    if folder.exists():
        return
    with whole_folder(folder, TrainingError) as made:
        for home in (*(f"{CLASSES}/{word}" for word in WORDS), CAPTIONED, EVERYTHING):
            (made / home).mkdir(parents=True)
        for i, (picture, label, caption) in enumerate(
            zip(training.pictures, training.labels, training.captions, strict=True)
        ):
            picture.save(made / CLASSES / WORDS[label] / f"{i:04}.png")
            for home in (EVERYTHING,) if caption in UNSEEN else (EVERYTHING, CAPTIONED):
                picture.save(made / home / f"{i:04}.png")
                (made / home / f"{i:04}.txt").write_text(caption, encoding="utf-8")


def levels(pictures: Images) -> Tensor:
    """Return pictures as grey levels (N, 256) from 0 to 255, float32."""
    return torch.stack([torch.tensor(np.asarray(one.convert("L"), np.float32)).flatten() for one in pictures])


def word_of(caption: str) -> int:
    """Return the digit that a caption names."""
    return WORDS.index(caption.split()[-1])
