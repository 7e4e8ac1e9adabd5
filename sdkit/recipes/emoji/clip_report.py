"""`python -m sdkit.recipes.emoji.clip_report`: measure what a CLIP knows of captioned emoji that it was not shown."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.cli.console import exit_code_of, say
from sdkit.cli.parser import Parser
from sdkit.data.sources import open_examples
from sdkit.errors import DataError
from sdkit.evaluation.extractors import Extractor, open_extractor
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import PLACES, SIZES
from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, Picture, pictures

AT_MOST = 400  # images for each attribute
ANSWERS: Mapping[str, tuple[str, ...]] = {
    "style": STYLES,
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
"""Attribute of a caption, other than its name -> what a caption may say of it."""


@cache
def _named() -> dict[str, Picture]:
    """Return a dict from each name to its picture."""
    return {name: picture for picture in pictures() for name in picture.names}


def told(caption: str) -> Prompt | None:
    """Return what a caption of `described` says; None if it names two things, or none of the recipe's."""
    rest, found = caption, {}
    if match := re.fullmatch(rf"(.+), ({'|'.join(STYLES)}) style", rest):
        rest, found["style"] = match.groups()
    if match := re.fullmatch(rf"(.+) (on|of) an? ({'|'.join(BACKGROUNDS)}) background", rest):
        rest, found["background"] = match[1], match[3]
    for place, words in PLACES.items():
        if rest.endswith(f" {words}"):
            rest, found["place"] = rest.removesuffix(f" {words}"), place
    rest = re.sub(r"^an? ", "", rest)
    for key in ("size", "style"):
        first, _, others = rest.partition(" ")
        if rest not in _named() and first in ANSWERS[key] and others:
            rest, found[key] = others, first
    return Prompt((_named()[rest],), **found) if rest in _named() else None


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often the right answer is found.

    Attributes:
        right: Share of images whose own answer is the nearest text.
        right5: Share of images whose own answer is among the five nearest.
        shuffled: As `right`, for the answers of other images, as a control.
        chance: Share that guessing finds.
        images: Number of images.
    """

    right: float
    right5: float
    shuffled: float
    chance: float
    images: int


def shares(clip: Extractor, embedded: Tensor, captions: Sequence[Prompt]) -> dict[str, Share]:
    """Return how often a CLIP knows the name, within the named style, and the other attributes that captions name.

    Names are counted apart for pairs of name and style that training shows, and for held-out pairs. For each attribute,
    an image is compared with captions that differ in it alone.

    Args:
        clip: The CLIP.
        embedded: Its embeddings of N images (N, D).
        captions: What their captions say.
    """
    found, units = {}, F.normalize(embedded, dim=1)
    named = {s: _units(clip, [Prompt((picture,), s).text for picture in pictures()]) for s in STYLES}
    for row, held_out in {"name, of pairs in training": False, "name, of held-out pairs": True}.items():
        styled = [i for i, one in enumerate(captions) if one.style and _is_held_out(one) == held_out][:AT_MOST]
        if styled:
            scores = torch.stack([named[captions[i].style] @ units[i] for i in styled])
            found[row] = _share(scores, [pictures().index(captions[i].pictures[0]) for i in styled])
    for attribute, answers in ANSWERS.items():
        asked = [i for i, one in enumerate(captions) if getattr(one, attribute)][:AT_MOST]
        if not asked:
            continue
        texts = [_saying(captions[i], attribute, answer) for i in asked for answer in answers]
        embeddings = _units(clip, texts).unflatten(0, (len(asked), len(answers)))
        scores = torch.einsum("nad,nd->na", embeddings, units[asked])
        found[attribute] = _share(scores, [answers.index(getattr(captions[i], attribute)) for i in asked])
    return found


def _is_held_out(caption: Prompt) -> bool:
    """Return whether no training image shows the picture in the style that a caption names."""
    return caption.style == caption.pictures[0].held_out_style


def _saying(caption: Prompt, attribute: str, answer: str) -> str:
    """Return a caption with another answer for one attribute."""
    change: dict[str, Any] = {attribute: answer}
    return replace(caption, **change).text


def _units(clip: Extractor, texts: Sequence[str]) -> Tensor:
    return F.normalize(clip.embed_texts(texts), dim=1)


def _share(scores: Tensor, right: Sequence[int]) -> Share:
    """Return the shares of scores (N, answers), of which `right` are the right ones."""
    order = scores.argsort(dim=1, descending=True)
    hits = order == torch.tensor(right)[:, None]
    others = torch.tensor(Random(0).sample(right, len(right)))
    return Share(
        right=float(hits[:, 0].double().mean()),
        right5=float(hits[:, :5].any(1).double().mean()),
        shuffled=float((order[:, 0] == others).double().mean()),
        chance=1 / scores.shape[1],
        images=len(scores),
    )


def measure(source: str, data: Path) -> dict[str, Share]:
    """Measure a CLIP on a folder of captioned images.

    Args:
        source: The CLIP: a folder, such as clip-fp16 of the recipe, or a Hub id.
        data: Captioned images of the recipe, such as data/held_out. Those of two things are left out.

    Raises:
        DataError: No image has a caption of the recipe.
        SdkitError: The CLIP or the images cannot be read.
    """
    examples = open_examples(data)
    known = [(i, found) for i, caption in enumerate(examples.captions) if (found := told(caption)) is not None]
    if not known:
        raise DataError(f"no image in {data} has a caption of one emoji; give images of the recipe.")
    clip = open_extractor(f"clip:{source}", device="cpu")
    embedded = clip([examples[i].load() for i, _ in known])
    return shares(clip, embedded, [found for _, found in known])


def table(found: Mapping[str, Share]) -> str:
    """Return the shares as a table of Markdown."""
    percent: Callable[[float], str] = "{:.1%}".format
    rows = [
        f"| {name} | {one.images} | {percent(one.right)} | {percent(one.right5)} | {percent(one.shuffled)} | "
        f"{percent(one.chance)} |"
        for name, one in found.items()
    ]
    head = "| what the caption says | images | right | in the first five | of another caption | chance |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def main() -> int:
    """Measure, print the table, and return the exit code."""
    parser = Parser(prog="python -m sdkit.recipes.emoji.clip_report", description=__doc__)
    parser.add_argument("--clip", required=True, metavar="SOURCE", help="the CLIP, such as runs/emoji/clip-fp16")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="captioned images, not trained on")
    args: argparse.Namespace = parser.parse_args()
    say(table(measure(args.clip, args.data)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
