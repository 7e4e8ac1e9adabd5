"""`python -m sdkit.recipes.emoji.clip`: train a small CLIP on captioned emoji, and write it in float16."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

from PIL import Image, ImageOps

from sdkit.atomic import whole_folder
from sdkit.cli.console import exit_code_of, say_path
from sdkit.cli.parser import Parser
from sdkit.data import open_examples
from sdkit.errors import SourceError, TrainingError
from sdkit.progress import progress
from sdkit.recipes.emoji.clip_report import ANSWERS, told
from sdkit.recipes.emoji.settings import settings, shape, shape_file
from sdkit.recipes.half_clip import write_half
from sdkit.training import ClipConfig, train_clip

RUN = "clip"
RESTATED = "clip-data"
EXPORTED = "clip-fp16"
KEPT = 0.25  # share of the other attributes that stay in a caption of the name
ALONE = 0.6  # share of the second captions that say one attribute alone, of "a picture"
SHARES = {"place": 4, "style": 2, "background": 1, "size": 1}  # how often which, of those that a caption says


def train(data: Path, root: Path, *, validation_data: Path | None = None, max_steps: int | None = None) -> Path:
    """Train the CLIP in root/clip, and write it to root/clip-fp16, in float16. An existing run is resumed.

    The images in root/clip-data, which it learns from, are made first if they are not there; see `restate`.

    Args:
        data: Captioned images, such as data/captioned of the recipe.
        root: Folder of the results.
        validation_data: Other captioned images, for retrieval; None holds out 16 of `data`.
        max_steps: Steps of the training; None takes the recipe's.

    Returns:
        The folder of the CLIP, which `open_extractor("clip:FOLDER")` and transformers' `CLIPModel` load.

    Raises:
        SdkitError: The data cannot be used, or the folder cannot be written.
    """
    given = settings(RUN) | ({} if max_steps is None else {"max_steps": max_steps})
    if not (root / RESTATED).exists():
        restate(data, root / RESTATED)
    run = train_clip(
        ClipConfig(
            **given, data=root / RESTATED, validation_data=validation_data, init=shape_file("clip"), out_dir=root / RUN
        )
    )
    return export(run / "result", root / EXPORTED)


def restate(data: Path, out: Path) -> None:
    """Write captioned images twice, each time with one of the captions of `two_captions`, as small as the CLIP's.

    Raises:
        DataError: The images cannot be read.
        TrainingError: The folder cannot be written.
    """
    examples, side = open_examples(data), shape("clip")["vision_config"]["image_size"]
    with whole_folder(out, TrainingError) as folder:
        lines = []
        for i, caption in enumerate(progress(examples.captions, len(examples), RESTATED)):
            # The filter of `Extractor.prepare`, so that the CLIP sees what it was trained on.
            small = ImageOps.fit(examples[i].load(), (side, side), Image.Resampling.BICUBIC)
            for n, said in enumerate(two_captions(caption, Random(f"{RESTATED} {i}"))):
                name = f"{i:05}-{n}.png"
                small.save(folder / name, compress_level=1)
                lines.append(json.dumps({"file_name": name, "text": said}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def two_captions(caption: str, rng: Random) -> tuple[str, str]:
    """Return a caption that says little but the name, and the caption itself, or one other attribute alone.

    In a batch, most full captions differ in background or size, and a CLIP that knows these alone finds nearly all
    images. Where a caption says one thing only, that is what has to be known. (Equal captions in a batch are no wrong
    answers for each other; see `contrastive`.)

    Args:
        caption: A caption of the recipe. One of two pictures, or of something else, is returned unchanged, twice.
        rng: Random numbers.
    """
    said = told(caption)
    if said is None:
        return caption, caption
    picture = said.pictures[0]
    left_out = {attribute: "" for attribute in ANSWERS if rng.random() >= KEPT}
    named = replace(said, pictures=(replace(picture, name=rng.choice(picture.names)),), **left_out)
    open_to_choice = [attribute for attribute in ANSWERS if getattr(said, attribute)]
    if not open_to_choice or rng.random() >= ALONE:
        return named.text, caption
    [only] = rng.choices(open_to_choice, [SHARES[attribute] for attribute in open_to_choice])
    others = {attribute: "" for attribute in ANSWERS if attribute != only}
    return named.text, replace(said, pictures=(replace(picture, name="picture"),), **others).text


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
    captioned = Path("runs/emoji/data/captioned")
    add("--data", type=Path, default=captioned, metavar="FOLDER", help="captioned images (default: %(default)s)")
    add("--validation-data", type=Path, metavar="FOLDER", help="captioned images that are not trained on")
    add("--out", "-o", type=Path, default=Path("runs/emoji"), metavar="FOLDER", help="results (default: %(default)s)")
    add("--max-steps", type=int, metavar="N", help="steps of the training (default: the recipe's)")
    args: argparse.Namespace = parser.parse_args()
    say_path(train(args.data, args.out, validation_data=args.validation_data, max_steps=args.max_steps))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
