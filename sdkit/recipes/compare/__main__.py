"""`python -m sdkit.recipes.compare`: train the generative systems of the tutorials on the same digits, and compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdkit.cli.console import exit_code_of, say
from sdkit.cli.parser import Parser

EPILOG = """
Systems: GAN; VAE; VQ + PixelCNN; VQ + GPT; DDPM; improved DDPM; ADM, guided; LDM-KL; LDM-VQ; DALL-E; DALL-E 2.

Columns of the table:
  Fréchet      distance between features of the draws and of 300 held-out digits, with its 95 % interval (bootstrap);
               the features are the 32 of a small classifier that no system is trained with
  precision    share of the draws among held-out digits (Kynkäänniemi et al. 2019), in the same features
  recall       share of held-out digits that the draws reach
  nearest      distance to the nearest training digit in levels of 255; it rewards blur and copies
  right digit  of systems that read a class or a text: draws that the classifier reads as the wanted digit
  own caption  of systems that read text: draws whose caption a CLIP of its own finds among all twenty
  training     CPU time of all parts, shared ones included; weights and evaluations are those of a drawing
Controls stand above the systems: the mean image, held-out digits, training digits, and held-out digits through the
autoencoders.

A comparison that was stopped is resumed: what has been trained or drawn is kept. One core is used, so that times can be
compared.
"""


def main() -> int:
    """Run the comparison, print its table, and return the exit code."""
    args = _parser().parse_args()
    import torch

    from sdkit.recipes.compare.report import compare, table
    from sdkit.recipes.compare.systems import SYSTEMS

    torch.set_num_threads(1)
    rows = compare(
        args.out, args.systems or tuple(SYSTEMS), scale=args.scale, images=args.images,
        progress=lambda name: say(f"{name} ..."),
    )  # fmt: skip
    say(table(rows).rstrip("\n"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m sdkit.recipes.compare",
        description=__doc__,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--out", "-o", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="results (default: %(default)s)")
    add("--systems", nargs="+", metavar="NAME", help="systems, in quotes where a name has spaces (default: all)")
    add("--scale", type=float, default=1.0, metavar="X", help="share of the steps to take (default: %(default)s)")
    add("--images", type=int, default=300, metavar="N", help="images that each draws (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
