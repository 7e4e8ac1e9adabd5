"""Prompts of the evaluation, each with a real image that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from sdkit.recipes.emoji.compositions import PLACES, Composition, arranged, beside, companions, described, one
from sdkit.recipes.emoji.pictures import STYLES, Picture, pictures

SHOWN_ON = ("white", "black", "blue", "yellow")  # backgrounds on which retrieval is measured
SIZED = (("large", ""), *((size, place) for size in ("small", "") for place in ("", *PLACES) if size or place))
"""Pairs of size and place that captions name."""


@dataclass(frozen=True)
class Prompt:
    """A prompt for one picture, or for two side by side.

    Attributes:
        pictures: The picture, or the left and the right one.
        style: Word for the style, or "", which leaves it open.
        background: Name of the background's colour, or "".
        size: "small", "large", or "".
        place: A key of `PLACES`, or "".
    """

    pictures: tuple[Picture, ...]
    style: str = ""
    background: str = ""
    size: str = ""
    place: str = ""

    @property
    def text(self) -> str:
        """The prompt in words, like a training caption."""
        return described(
            [one.name for one in self.pictures], style=self.style, size=self.size, place=self.place,
            background=self.background,
        )  # fmt: skip

    def composition(self, seed: int = 0) -> Composition:
        """Return an image that the prompt describes. The seed decides what the prompt leaves open."""
        rng = Random(f"{seed} {self.text}")
        alone = len(self.pictures) == 1
        parts = [
            arranged(picture, self.size, self.place, rng) if alone else beside(picture, rng)
            for picture in self.pictures
        ]
        return Composition(
            parts=tuple(parts),
            style=self.style or rng.choice(self.pictures[0].styles),
            background=self.background or rng.choice(self.pictures[0].backgrounds),
            caption=self.text,
        )


def named(n: int) -> list[Prompt]:
    """Return n prompts of pairs of picture and style from training, on the backgrounds in `SHOWN_ON`."""
    return [_on_shown(picture, picture.styles[i % len(picture.styles)], i) for i, picture in enumerate(_spread(n))]


def held_out_pairs(n: int) -> list[Prompt]:
    """Return n prompts (fewer if there are not as many) of pairs of picture and style that no training image shows."""
    pairs = [picture for picture in pictures() if picture.held_out_style]
    chosen = [pairs[i * len(pairs) // n] for i in range(n)] if n < len(pairs) else pairs
    return [_on_shown(picture, picture.held_out_style, i) for i, picture in enumerate(chosen)]


def placed(n: int) -> list[Prompt]:
    """Return n prompts with a size, a place, or both, on the background that was held out for each picture."""
    return [
        Prompt((picture,), STYLES[i % 4] if i % 3 else "", picture.held_out, *SIZED[i % len(SIZED)])
        for i, picture in enumerate(_spread(n))
    ]


def pairs_beside(n: int) -> list[Prompt]:
    """Return n prompts of two pictures side by side, in one style, on the backgrounds in `SHOWN_ON`."""
    rng, beside_in = Random("two"), companions(pictures())
    asked = []
    for i in range(n):
        style = STYLES[i % len(STYLES)]
        both = tuple(rng.sample(list(beside_in[style]), 2))
        asked.append(Prompt(both, style, _shown([picture.held_out for picture in both], i)))
    return asked


def open_prompts(n: int, *, background: bool) -> list[Prompt]:
    """Return n prompts that leave style, size, and place open, and the background too unless `background`."""
    return [
        Prompt((picture,), background=_shown([picture.held_out], i) if background else "")
        for i, picture in enumerate(_spread(n))
    ]


def sampled(n: int, name: str) -> list[Composition]:
    """Return n random compositions of one picture each, as training shows them, that training does not show.

    Args:
        n: Number of compositions.
        name: Different names give different compositions.
    """
    rng = Random(f"evaluation {name}")
    chosen = _spread(n)
    return [one(picture, rng.choice(picture.styles), rng) for picture in chosen]


def _spread(n: int) -> list[Picture]:
    """Return n pictures in random order, spread evenly over pictures.tsv."""
    every = pictures()
    chosen = [every[i * len(every) // n] for i in range(n)]
    Random(n).shuffle(chosen)
    return chosen


def _on_shown(picture: Picture, style: str, i: int) -> Prompt:
    return Prompt((picture,), style, _shown([picture.held_out], i))


def _shown(held_out: Sequence[str], i: int) -> str:
    """Return the i-th background of `SHOWN_ON`, without those that are held out."""
    backgrounds = [name for name in SHOWN_ON if name not in held_out]
    return backgrounds[i % len(backgrounds)]
