"""`python -m sdkit.recipes.emoji.clip`: train a small CLIP on captioned emoji, and write it in float16."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdkit.atomic import whole_folder
from sdkit.cli.console import exit_code_of, say_path
from sdkit.cli.parser import Parser
from sdkit.errors import SourceError, TrainingError
from sdkit.recipes.emoji.settings import settings, shape_file
from sdkit.recipes.half_clip import write_half
from sdkit.training import ClipConfig, train_clip

RUN = "clip"
EXPORTED = "clip-fp16"


def train(data: Path, root: Path, *, validation_data: Path | None = None, max_steps: int | None = None) -> Path:
    """Train the CLIP in root/clip, and write it to root/clip-fp16, in float16. An existing run is resumed.

    Args:
        data: Captioned images, such as data/captioned-1 of the recipe.
        root: Folder of the results.
        validation_data: Other captioned images, for retrieval; None holds out 16 of `data`.
        max_steps: Steps of the training; None takes the recipe's.

    Returns:
        The folder of the CLIP, which `open_extractor("clip:FOLDER")` and transformers' `CLIPModel` load.

    Raises:
        SdkitError: The data cannot be used, or the folder cannot be written.
    """
    given = settings(RUN) | ({} if max_steps is None else {"max_steps": max_steps})
    run = train_clip(
        ClipConfig(
            **given, data=data, validation_data=validation_data, init=shape_file("clip"), out_dir=root / RUN,
            augment=("crop",),
        )
    )  # fmt: skip
    return export(run / "result", root / EXPORTED)


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
    captioned = Path("runs/emoji/data/captioned-1")
    add("--data", type=Path, default=captioned, metavar="FOLDER", help="captioned images (default: %(default)s)")
    add("--validation-data", type=Path, metavar="FOLDER", help="captioned images that are not trained on")
    add("--out", "-o", type=Path, default=Path("runs/emoji"), metavar="FOLDER", help="results (default: %(default)s)")
    add("--max-steps", type=int, metavar="N", help="steps of the training (default: the recipe's)")
    args: argparse.Namespace = parser.parse_args()
    say_path(train(args.data, args.out, validation_data=args.validation_data, max_steps=args.max_steps))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
