"""`python -m sdkit.recipes.vqgan`: one VQ autoencoder of grey emoji, and four decoders of its codes, each trained with
a different loss: squared error, with LPIPS, with a discriminator, and with both, which makes it a VQGAN.

They show what each term of VQGAN's loss does (Esser et al. 2021, eqs. 4 to 7). Notebook 10 reads the shipped ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from sdkit.arguments import number
from sdkit.atomic import whole_folder
from sdkit.cli.console import exit_code_of, say_path
from sdkit.cli.parser import Parser
from sdkit.errors import SourceError, TrainingError
from sdkit.messages import first_line, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.recipes.compare.draws import slug
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed
from sdkit.recipes.emoji.small import SIDE, small_pictures
from sdkit.strict_json import read_object, require
from sdkit.training import VAEConfig, train_vae
from sdkit.training.run_folder import read_metrics

SHIPPED = Path(__file__).parents[1] / "assets" / "vqgan"
"""The four autoencoders of one whole run, and their validation curves."""
HELD_OUT = 194  # emoji, a fifth
TERMS: dict[str, dict[str, float]] = {
    "L2": {"lpips_weight": 0.0},
    "L2 + LPIPS": {"lpips_weight": 0.5},
    "L2 + GAN": {"lpips_weight": 0.0, "disc_weight": 1.0},
    "L2 + LPIPS + GAN": {"lpips_weight": 0.5, "disc_weight": 1.0},
}
"""Name of each decoder -> the settings of its loss. All else is the same."""
SHAPE = {
    "_class_name": "VQModel",
    "sample_size": SIDE,
    "block_out_channels": [16, 32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": False,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "num_vq_embeddings": 512,
}
"""Config of the network: an image is 4 x 4 codes of nine bits each, one for 8 x 8 pixels."""
SETTINGS: dict[str, Any] = {
    "regularizer": "vq",
    "lpips": "alex",
    "batch_size": 16,
    "augment": ("flip",),
    "ema_decay": 0.0,
    "lr_scheduler": "cosine",
    "validate_every": 200,
    "save_every": 200,
}
"""Settings that all runs share."""
FIRST: dict[str, Any] = {"max_steps": 2000, "learning_rate": 3e-3, "lpips_weight": 0.0}
"""Settings of the first run, from random weights: encoder, codebook, and decoder learn by squared error."""
DECODER: dict[str, Any] = {"max_steps": 3000, "learning_rate": 2e-4}
"""Settings of the four runs that fine-tune its decoder. Encoder and codebook are frozen, so that all decode the same
codes."""
CURVES = "curves.json"


def emoji() -> tuple[list[Image.Image], list[Image.Image]]:
    """Return the emoji in the style 3d, grey on white, 32 x 32 pixels: those to train on, and those held out."""
    pictures = [
        composed(picture, BACKGROUNDS["white"], size=SIDE, side=SIDE).convert("L")
        for (_, style), picture in small_pictures().items()
        if style == "3d"
    ]
    Random(0).shuffle(pictures)
    return pictures[HELD_OUT:], pictures[:HELD_OUT]


def train(out: Path, *, scale: float = 1.0, mixed_precision: str = "no") -> Path:
    """Train the autoencoder and the four decoders, and write all in float16. Runs that are there are resumed.

    Args:
        out: Folder of the data, the runs, and the result.
        scale: Share of the steps to take, such as 0.1 for a quick trial.
        mixed_precision: "no"; "bf16", which is faster on processors and GPUs that support it natively; or "fp16", for
            GPUs.

    Returns:
        out/result, which `decoders` and `curves` read.

    Raises:
        ArgumentError: An argument is out of range.
        SourceError: out/result holds something else, or the result of a run is damaged.
        TrainingError: The folder cannot be written, or holds runs with other settings.
    """
    scale = number("scale", scale, 1e-4, 1)
    result = out / "result"
    if result.exists() and not (result / CURVES).is_file():
        raise SourceError(f"{result} exists already, and is no result of this recipe; name another --out.")
    sets = dict(zip(("training", "held-out"), emoji(), strict=True))
    shape = json.dumps(SHAPE)
    made_of = b"".join(image.tobytes() for images in sets.values() for image in images) + shape.encode()
    data = out / f"data-{hashlib.sha256(made_of).hexdigest()[:8]}"

    def config(folder: Path, settings: dict[str, Any], **start: Any) -> VAEConfig:
        return VAEConfig(
            **SETTINGS | settings | start | {"max_steps": max(1, round(settings["max_steps"] * scale))},
            data=data / "training", validation_data=data / "held-out", mixed_precision=mixed_precision, out_dir=folder,
        )  # fmt: skip

    first = config(out / "first", FIRST, init=data / "shape.json")  # checks the arguments before anything is written
    if not data.exists():
        with whole_folder(data, TrainingError) as folder:
            (folder / "shape.json").write_text(shape, encoding="utf-8")
            for name, images in sets.items():
                (folder / name).mkdir()
                for i, image in enumerate(images):
                    image.save(folder / name / f"{i:03}.png")
    begun = train_vae(first) / "result"
    runs = {name: train_vae(config(out / slug(name), DECODER | terms, model=begun)) for name, terms in TERMS.items()}
    return _export(runs, result)


def _export(runs: dict[str, Path], out: Path) -> Path:
    """Write the trained autoencoders in float16, and the curves of their validation."""
    networks = {name: VAE.from_pretrained(run / "result", dtype="fp32").network for name, run in runs.items()}
    rows = {
        name: [
            {"step": line["step"], "psnr": line["validation/psnr"], "lpips": line["validation/lpips"]}
            for line in read_metrics(run / "metrics.jsonl")
            if "validation/lpips" in line
        ]
        for name, run in runs.items()
    }
    with whole_folder(out, TrainingError) as folder, quiet("diffusers"):
        for name, network in networks.items():
            network.register_to_config(_name_or_path="")  # otherwise diffusers saves the local path
            network.half().save_pretrained(folder / slug(name))
        (folder / CURVES).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return out


def decoders(folder: Path = SHIPPED) -> dict[str, VAE]:
    """Load the four autoencoders, which differ in their decoders only.

    Args:
        folder: A result of `train`; by default, the shipped one.

    Returns:
        Name -> autoencoder, float32, in the order of `TERMS`.

    Raises:
        SourceError: One of them is missing or damaged.
    """
    return {name: VAE.from_pretrained(folder / slug(name), dtype="fp32") for name in TERMS}


def curves(folder: Path = SHIPPED) -> dict[str, list[dict[str, float]]]:
    """Return the validation curves: name -> step, PSNR (dB), and LPIPS of 64 held-out emoji, in the order of steps.

    Raises:
        SourceError: The file is missing or damaged.
    """
    try:
        found = read_object(folder / CURVES)
        require(found, dict.fromkeys(TERMS, list))
        for row in (row for name in TERMS for row in found[name]):
            require(row if isinstance(row, dict) else {}, {"step": int, "psnr": float, "lpips": float})
    except (OSError, ValueError) as error:
        raise SourceError(f"{str(folder / CURVES)!r} is missing or damaged ({first_line(error)}).") from error
    return found


def main() -> int:
    """Train all, and return the exit code."""
    parser = Parser(prog="python -m sdkit.recipes.vqgan", description=__doc__)
    add = parser.add_argument
    add("--out", "-o", type=Path, default=Path("runs/vqgan"), metavar="FOLDER", help="results (default: %(default)s)")
    add("--scale", type=float, default=1.0, metavar="X", help="share of the steps to take (default: %(default)s)")
    add("--mixed-precision", default="no", metavar="WHICH", help="no, bf16, or fp16 (default: %(default)s)")
    args: argparse.Namespace = parser.parse_args()
    say_path(train(args.out, scale=args.scale, mixed_precision=args.mixed_precision))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
