"""`python -m sdkit.recipes.emoji`: make the embedded model from its raw material, and evaluate models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sdkit.cli.console import exit_code_of, say, say_path
from sdkit.cli.parser import Parser

STEPS = ("tiles", "vae", "captioned", "latents", "unet", "decoder", "export", "evaluate")
EPILOG = """
steps, in this order:
  tiles      make tiles and held-out images, for the VAE, from the pictures and the photographs
  vae        train the VAE: vae-1 from scratch, vae-2 on tiles of captioned images, vae-3 to vae-5 with LPIPS
  captioned  make captioned images from the pictures: plain/, large and in the middle, and captioned/, of all kinds
  latents    make a tokenizer, an untrained text encoder, and the latent caches
  unet       train the U-Net and the text encoder: unet-1 and unet-2 on plain/, unet-3 to unet-6 on captioned/
  decoder    train only the VAE's decoder, for sharper images: vae-6
  export     assemble model/, in float16
  evaluate   measure the model, or those of --models; evaluation/ also keeps the results of earlier calls
A training or a latent cache that was stopped is resumed. If the data has changed, remove its folder first.
With --from, another model's VAE takes the place of vae-1 to vae-5, and needs no training but that of `decoder`.
The raw material:
  npm install --ignore-scripts --no-save @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6 \\
    @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5
  pip install 'sdkit[recipes]'  (resvg-py, which renders the last three)
  apt-get download mate-backgrounds plasma-workspace-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
  for deb in *.deb; do dpkg -x $deb photographs; done                               (--photographs photographs)
The environment variable SDKIT_LPIPS names the weights of LPIPS with VGG.
"""


def main() -> int:
    """Run one step or all of them, and return the exit code."""
    args = _parser().parse_args()
    for step in STEPS if args.step == "all" else (args.step,):
        _run(step, args)
    return 0


def _run(step: str, args: argparse.Namespace) -> None:
    """Run one step."""
    from sdkit.recipes.emoji import training
    from sdkit.recipes.emoji.drawings import Drawings
    from sdkit.recipes.emoji.prepare import TILES, prepare_captioned, prepare_tiles
    from sdkit.recipes.emoji.report import evaluate

    root, drawings = args.out, Drawings(args.drawn, args.vectors)
    if step == "tiles":
        names = {training.FINE} if args.model else TILES.keys()
        prepare_tiles(drawings, args.photographs, root / "data", names)
        say_path(root / "data")
    elif step == "captioned":
        prepare_captioned(drawings, root / "data")
        say_path(root / "data")
    elif step == "evaluate":
        models = args.models or [root / "model"]
        say(
            evaluate(
                models, drawings, root / "evaluation", prompts=args.prompts, images=args.images, sweeps=args.sweeps
            )
        )
    else:
        functions: dict[str, Callable[[Path], object]] = {
            "vae": partial(training.take_the_vae, model=args.model) if args.model else training.train_the_vae,
            "latents": training.make_latents,
            "unet": training.train_the_unet,
            "decoder": training.train_the_decoder,
            "export": training.export,
        }
        functions[step](root)
        say_path(root)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sdkit.recipes.emoji",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("step", choices=("all", *STEPS), help="the step to run, or all of them")
    add("--out", "-o", type=Path, default=Path("runs/emoji"), metavar="FOLDER", help="results (default: %(default)s)")
    solid, vectors = Path("node_modules/@lobehub/fluent-emoji-3d/assets"), Path("node_modules/@iconify-json")
    add("--drawn", type=Path, default=solid, metavar="FOLDER", help="3D pictures (default: %(default)s)")
    add("--vectors", type=Path, default=vectors, metavar="FOLDER", help="vector graphics (default: %(default)s)")
    add("--photographs", type=Path, default=Path("photographs"), metavar="FOLDER", help="the unpacked photographs")
    add("--from", dest="model", metavar="SOURCE", help="a model whose VAE to take, such as emoji (default: train one)")
    add("--models", nargs="+", metavar="SOURCE", help="models to evaluate side by side (default: OUT/model)")
    add("--prompts", type=int, default=320, metavar="N", help="prompts of each kind (default: %(default)s)")
    add("--images", type=int, default=1000, metavar="N", help="images of the distribution (default: %(default)s)")
    add("--no-sweeps", dest="sweeps", action="store_false", help="measure at one guidance scale and number of steps")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
