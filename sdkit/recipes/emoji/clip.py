"""`python -m sdkit.recipes.emoji.clip`: train a small CLIP on captioned emoji, and write it in float16."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageOps

from sdkit.atomic import whole_folder
from sdkit.cli.console import exit_code_of, say_path
from sdkit.cli.parser import Parser
from sdkit.data import open_examples
from sdkit.errors import SourceError, TrainingError
from sdkit.messages import quiet
from sdkit.progress import progress
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.clip_report import ANSWERS, told
from sdkit.recipes.emoji.settings import settings, shape, shape_file
from sdkit.recipes.half_clip import write_half
from sdkit.training import ClipConfig, train_clip
from sdkit.training.learned_tokenizer import learn_tokenizer

RUNS = {"clip-1": "plain", "clip-2": "captioned"}
"""Run of the CLIP -> its captioned set. With plain pictures first, it learns the names much sooner."""
TRAINED = "clip-2"
WORDS = "clip-tokenizer"
EXPORTED = "clip-fp16"
KEPT = 0.25  # share of the other attributes that stay in a caption of the name
ALONE = 0.6  # share of the other captions that say one attribute alone, of "a picture"
SHARES = {"place": 4, "style": 2, "background": 1, "size": 1}  # how often which, of those that a caption says


def train(data: Path, root: Path, *, validation_data: Path | None = None, max_steps: int | None = None) -> Path:
    """Train the CLIP in root/clip-1 and root/clip-2, and write it to root/clip-fp16, in float16.

    Existing runs are resumed. The images that it learns from are made in root/clip-data, unless they are there; see
    `restate`. Its tokenizer learns from the captions of the last set, which hold all words.

    Args:
        data: Folder with the captioned sets of `RUNS`, as the recipe makes them in runs/emoji/data.
        root: Folder of the results.
        validation_data: Other captioned images, for retrieval; None holds out 16 of a run's own, most of which the run
            sees with their other captions.
        max_steps: Steps of each run; None takes the recipe's.

    Returns:
        The folder of the CLIP, which `open_extractor("clip:FOLDER")` and transformers' `CLIPModel` load.

    Raises:
        SdkitError: The data cannot be used, or the folder cannot be written.
    """
    sets = {name: restate(data / name, root / "clip-data") for name in RUNS.values()}
    start: dict[str, Any] = {"init": shape_file("clip"), "tokenizer": _words(sets[RUNS[TRAINED]], root)}
    for run, name in RUNS.items():
        given = settings(run) | ({} if max_steps is None else {"max_steps": max_steps})
        train_clip(ClipConfig(**given, **start, data=sets[name], validation_data=validation_data, out_dir=root / run))
        start = {"model": root / run / "result"}
    return export(root / TRAINED / "result", root / EXPORTED)


def restate(data: Path, parent: Path) -> Path:
    """Write captioned images twice, each time with one of the captions of `restated`, as small as the CLIP's.

    Args:
        data: One of the captioned sets.
        parent: Folder in which to write them, under a name that tells the set, its images, and the rules.

    Returns:
        Their folder. If it is there already, it is left unchanged.

    Raises:
        DataError: The images cannot be read.
        TrainingError: The folder cannot be written.
    """
    examples, side = open_examples(data), shape("clip")["vision_config"]["image_size"]
    made_of = f"{examples.identity} {side} {KEPT} {ALONE} {SHARES}"
    out = parent / f"{data.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    if out.exists():
        return out
    with whole_folder(out, TrainingError) as folder:
        lines = []
        for i, caption in enumerate(progress(examples.captions, len(examples), f"clip-data/{data.name}")):
            # The filter of `Extractor.prepare`, so that the CLIP sees what it was trained on.
            small = ImageOps.fit(examples[i].load(), (side, side), Image.Resampling.BICUBIC)
            for n, said in enumerate(restated(caption, Random(f"{data.name} {i}"), alone=data.name == RUNS[TRAINED])):
                name = f"{i:05}-{n}.png"
                small.save(folder / name, compress_level=1)
                lines.append(json.dumps({"file_name": name, "text": said}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return out


def restated(caption: str, rng: Random, *, alone: bool) -> tuple[str, str]:
    """Return two captions for an image: one that says little but the name, and another one.

    In a batch, most full captions differ in background or size, and a CLIP that knows these alone finds nearly all
    images. Where a caption says one thing only, that is what has to be known. (Equal captions in a batch are no wrong
    answers for each other; see `contrastive`.)

    Args:
        caption: A caption of the recipe. One of two pictures, or of something else, is returned unchanged, twice.
        rng: Random numbers.
        alone: Whether the other one says all that the caption says, or one other attribute alone. Otherwise it also
            says little but the name.
    """
    said = told(caption)
    if said is None:
        return caption, caption
    first = _of_the_name(said, rng)
    return first, _of_another(said, rng) if alone else _of_the_name(said, rng)


def _of_the_name(said: Prompt, rng: Random) -> str:
    """Return a caption of the name, and of a few of the other attributes."""
    picture = said.pictures[0]
    left_out = {attribute: "" for attribute in ANSWERS if rng.random() >= KEPT}
    return replace(said, pictures=(replace(picture, name=rng.choice(picture.names)),), **left_out).text


def _of_another(said: Prompt, rng: Random) -> str:
    """Return a caption of all that one says, with the main name and the style before it, or of one attribute alone."""
    open_to_choice = [attribute for attribute in ANSWERS if getattr(said, attribute)]
    if not open_to_choice or rng.random() >= ALONE:
        return said.text
    [only] = rng.choices(open_to_choice, [SHARES[attribute] for attribute in open_to_choice])
    others = {attribute: "" for attribute in ANSWERS if attribute != only}
    return replace(said, pictures=(replace(said.pictures[0], name="picture"),), **others).text


def _words(data: Path, root: Path) -> Path:
    """Write a tokenizer that has learned from the captions of a data set, unless it is there, and return its folder.

    The folder is named after the data set: a tokenizer of other captions would lack words, or split them.
    """
    folder = root / f"{WORDS}-{data.name}"
    if not folder.exists():
        text = shape("clip")["text_config"]
        words = learn_tokenizer(open_examples(data).captions, text["vocab_size"], text["max_position_embeddings"])
        with whole_folder(folder, TrainingError) as made, quiet("transformers"):
            words.save_pretrained(made)
    return folder


def export(trained: Path, out: Path) -> Path:
    """Write a trained CLIP in float16, with its tokenizer and preprocessing.

    Raises:
        SourceError: There is no trained CLIP, or `out` holds something else.
        TrainingError: The folder cannot be written.
    """
    if not (trained / "config.json").is_file():
        raise SourceError(f"{trained} holds no CLIP; train it first.")
    if out.exists() and not (out / "preprocessor_config.json").is_file():
        raise SourceError(f"{out} is there already, with what is not of this recipe; move it, or name another --out.")
    with whole_folder(out, TrainingError) as folder:
        write_half(trained, folder)
    return out


def main() -> int:
    """Train and export, and return the exit code."""
    parser = Parser(prog="python -m sdkit.recipes.emoji.clip", description=__doc__)
    add = parser.add_argument
    made = Path("runs/emoji/data")
    add("--data", type=Path, default=made, metavar="FOLDER", help="the sets plain and captioned (default: %(default)s)")
    add("--validation-data", type=Path, metavar="FOLDER", help="captioned images that are not trained on")
    add("--out", "-o", type=Path, default=Path("runs/emoji"), metavar="FOLDER", help="results (default: %(default)s)")
    add("--max-steps", type=int, metavar="N", help="steps of each of the two runs (default: the recipe's)")
    args: argparse.Namespace = parser.parse_args()
    say_path(train(args.data, args.out, validation_data=args.validation_data, max_steps=args.max_steps))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
