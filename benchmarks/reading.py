"""Compare the time that reading takes with another checkout: a whole model (folder and single file), and many images.

    git worktree add ../before some-commit
    python benchmarks/reading.py --against ../before      # about five minutes on two CPU cores

Each measurement runs in its own process. The two checkouts take turns, and the result is the median of the ratios
within turns. The model has SD 1.5's shape and random weights in float16; the images are PNGs of 64 x 64 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("folder", "file", "images", "data")

LOAD = "import sdkit; sd = sdkit.StableDiffusion.from_pretrained(root / {name!r}, dtype='fp32', device='cpu')"
WORK = {
    "folder": LOAD.format(name="sd15"),
    "file": LOAD.format(name="sd15.safetensors"),
    "images": "from sdkit import images; [images.read(path) for path in sorted((root / 'images').glob('*.png'))]",
    "data": "from sdkit.data import open_examples; found = open_examples(root / 'images'); found.identity",
}
CHILD = """
import sys, time
from pathlib import Path
import diffusers, transformers, datasets
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
import sdkit; sdkit.StableDiffusion, sdkit.VAE  # load their modules, whatever their paths in this checkout
root = Path(sys.argv[1])
begin = time.perf_counter()
{work}
print(time.perf_counter() - begin)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two checkouts in the time that reading takes.")
    parser.add_argument("--against", type=Path, required=True, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="number of turns of each part (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="number of images (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="keep the model and the images there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = args.scratch or Path(scratch)
        make(root, args.images)
        for part in args.parts:
            seconds(part, root, ROOT)  # not counted: it loads the files into the system's cache
            turns = [(seconds(part, root, ROOT), seconds(part, root, args.against)) for _ in range(args.repeats)]
            here, there = (median(side) for side in zip(*turns, strict=True))
            ratios = sorted(a / b for a, b in turns)
            print(
                f"{part}: {here:.2f} s here, {there:.2f} s there, ratio {median(ratios):.3f} "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f})",
                flush=True,
            )


def seconds(part: str, root: Path, checkout: Path) -> float:
    """Return the seconds that one new process took, without imports."""
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD.format(work=WORK[part]), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=checkout)
    return float(done.stdout.split()[-1])


def make(root: Path, n: int) -> None:
    """Write a model of random weights, as a folder and as one file, and images with captions, unless they exist."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import save_file

    sys.path.insert(0, str(ROOT))
    from sdkit.loading.parts import PARTS
    from sdkit.loading.single_file import ASSETS, empty
    from tests.helpers import original_layout

    if not (root / "sd15.safetensors").is_file():
        original = {}
        for part, name in (("vae", "vae"), ("unet", "unet"), ("text", "text_encoder")):
            network = empty(PARTS[part], json.loads((ASSETS / "sd1" / name / "config.json").read_text())).half()
            network.save_pretrained(root / "sd15" / name)
            state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
            original |= {
                "vae": original_layout.vae,
                "unet": lambda tensors: original_layout.unet(tensors, layers_per_block=2),
                "text": original_layout.clip,
            }[part](state)
        save_file({key: value.clone().contiguous() for key, value in original.items()}, root / "sd15.safetensors")
        for name in ("scheduler", "tokenizer"):
            (root / "sd15" / name).mkdir()
            for file in (ASSETS / "sd1" / name).iterdir():
                (root / "sd15" / name / file.name).write_bytes(file.read_bytes())
        for file in ("vocab.json", "merges.txt"):
            (root / "sd15" / "tokenizer" / file).write_bytes((ASSETS / "clip_tokenizer" / file).read_bytes())
        (root / "sd15" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    folder = root / "images"
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(len(list(folder.glob("*.png"))), n):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i:05}.png")
        (folder / f"{i:05}.txt").write_text(f"picture {i}")


if __name__ == "__main__":
    main()
