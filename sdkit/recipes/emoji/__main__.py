"""`python -m sdkit.recipes.emoji`: make the embedded model from its raw material, and evaluate models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdkit.cli.console import exit_code_of, say, say_path
from sdkit.cli.parser import Parser

STEPS = ("prepare", "vae", "latents", "unet", "decoder", "export", "evaluate")
EPILOG = """
steps, in this order:
  prepare   make tiles, captioned images, and held-out images from the pictures and the photographs
  vae       train the VAE: vae-1 from scratch, vae-2 on tiles of captioned images, vae-3 and vae-4 with LPIPS
  latents   make a tokenizer, an untrained text encoder, and the latent cache
  unet      train the U-Net and the text encoder: unet-1
  decoder   train only the VAE's decoder, for sharper images: vae-5
  export    assemble model/, in float16
  evaluate  measure the model, or those of --models; evaluation/ also keeps the results of earlier calls
A training or a latent cache that was stopped is resumed. If the data has changed, remove its folder first.
The raw material:
  npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar -xf lobehub-fluent-emoji-3d-*.tgz  (--drawn package/assets)
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
    from sdkit.recipes.emoji.prepare import prepare
    from sdkit.recipes.emoji.report import evaluate

    root = args.out
    if step == "prepare":
        prepare(args.drawn, args.photographs, root / "data")
        say_path(root / "data")
    elif step == "evaluate":
        models = args.models or [root / "model"]
        say(evaluate(models, args.drawn, root / "evaluation", prompts=args.prompts, sweeps=args.sweeps))
    else:
        functions = {
            "vae": training.train_the_vae,
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
    add("--drawn", type=Path, default=Path("package/assets"), metavar="FOLDER", help="the npm package's assets/")
    add("--photographs", type=Path, default=Path("photographs"), metavar="FOLDER", help="the unpacked photographs")
    add("--models", nargs="+", metavar="SOURCE", help="models to evaluate side by side (default: OUT/model)")
    add("--prompts", type=int, default=320, metavar="N", help="prompts to evaluate with (default: %(default)s)")
    add("--no-sweeps", dest="sweeps", action="store_false", help="evaluate at one guidance scale and number of steps")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
