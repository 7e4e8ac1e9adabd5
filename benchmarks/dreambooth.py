"""Teach the embedded model a new object from five pictures (DreamBooth), and measure what it learns and forgets.

    python benchmarks/dreambooth.py                        # about ten minutes on one CPU core
    python benchmarks/dreambooth.py --ways lora --steps 50 # a quick look

The object is a teapot that no emoji set has, on five backgrounds, in medium sizes. It is then drawn on other
backgrounds, small, and large, at several seeds. Controls: the model before training, and training without class images.
The folder --out gets the pictures and a sheet for each way of training: rows of the object's prompts, then the class
"a teapot", then other prompts.

- object: share of drawings of the new object that are nearest to it, by LPIPS of the cut-out object, among it, sixteen
  teapots, and the other prompts' objects, which the model drew before training.
- background: share of them whose background is nearest to the named colour; size: share whose extent is as named.
- class: share of drawings of "a teapot" that became the new object.
- others: mean LPIPS of drawings of other prompts before and after, from the same seeds; retrieved: share of those that
  are nearest to their own prompt's drawing before. `another seed` is what LPIPS says where only the seed differs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import sdkit
from sdkit.images import to_tensors
from sdkit.networks.lpips import LPIPS
from sdkit.recipes.emoji.pictures import BACKGROUNDS
from sdkit.training import UNetConfig, train_unet

SIDE, CROP, FINE = 128, 64, 4  # pixels of an image and of a cut-out object; oversampling of the teapot's drawing
INSTANCES = (("white", 72, (64, 64)), ("gray", 84, (60, 70)), ("orange", 64, (74, 56)), ("green", 90, (66, 66)),
             ("yellow", 78, (52, 60)))  # fmt: skip
"""Background, extent, and centre of the object in each of the five pictures."""
NAMED = {
    "a sks teapot on a blue background": ("blue", None),
    "a sks teapot on a pink background": ("pink", None),
    "a sks teapot on a black background": ("black", None),
    "a small sks teapot on a turquoise background": ("turquoise", (28, 56)),
    "a large sks teapot on a purple background": ("purple", (96, 128)),
}
"""Prompts of the object -> background, and smallest and largest extent in pixels where the prompt names it."""
OTHERS = (
    *("a red apple", "a cat on a pink background", "a pizza on a black background", "a rocket", "a panda", "a guitar"),
    *("a flat dog on a blue background", "a small fish", "a large strawberry", "a house on a yellow background"),
    *("a robot", "a 3d sunflower", "a bird", "a cup with straw", "a ghost on an orange background", "an octopus"),
)
SEEDS, CLASS_SEEDS = range(4), range(8)
CLASS: dict[str, Any] = {"class_prompt": "a teapot", "class_count": 48}
WAYS: dict[str, dict[str, Any]] = {
    "without class images": {},
    "whole": CLASS,
    "lora": CLASS | {"lora_rank": 16, "learning_rate": 2e-3},
    "text": CLASS | {"train_text_encoder": True},
}


def teapot(extent: int) -> Image.Image:
    """Draw the new object: a magenta teapot with a blue lid, a green handle, and yellow dots. `extent` is its width."""
    side = extent * FINE
    image = Image.new("RGBA", (100 * FINE, 80 * FINE))
    draw = ImageDraw.Draw(image)

    def at(*points: float) -> list[float]:
        return [FINE * one for one in points]

    draw.arc(at(66, 24, 98, 64), -110, 110, fill=(30, 150, 60), width=7 * FINE)
    draw.polygon(at(30, 62, 2, 30, 12, 24, 40, 46), fill=(170, 20, 100))
    draw.ellipse(at(18, 22, 82, 78), fill=(215, 35, 130))
    draw.pieslice(at(30, 12, 70, 44), 180, 360, fill=(40, 80, 210))
    draw.ellipse(at(44, 2, 56, 15), fill=(250, 190, 30))
    for x, y in ((34, 48), (50, 60), (66, 48)):
        draw.ellipse(at(x - 5, y - 5, x + 5, y + 5), fill=(250, 215, 60))
    return image.resize((side // FINE, side * 4 // 5 // FINE), Image.Resampling.LANCZOS)


def on(background: str, extent: int, centre: tuple[int, int]) -> Image.Image:
    """Return the object on a plain background."""
    image, one = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background]), teapot(extent)
    image.paste(one, (centre[0] - one.width // 2, centre[1] - one.height // 2), one)
    return image


class CutOut(NamedTuple):
    """The object in a drawing, cut out.

    Attributes:
        image: The object on white, (3, 64, 64) in [-1, 1].
        background: Median colour of the border.
        extent: Longer side of the object in pixels; 0 if there is none.
    """

    image: torch.Tensor
    background: np.ndarray
    extent: int


def cut_out(image: Image.Image) -> CutOut:
    """Find the object on a plain background by its distance from the border's median colour."""
    pixels = np.asarray(image.convert("RGB")).astype(float)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    background = np.median(border, axis=0)
    mask = np.abs(pixels - background).max(-1) > 36
    rows, columns = (np.flatnonzero(mask.mean(axis) > 0.02) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return CutOut(torch.ones(3, CROP, CROP), background, 0)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    square = Image.new("RGB", (side, side), "white")
    own = Image.fromarray(np.where(mask[..., None], pixels, 255).astype(np.uint8)).crop((left, top, right, bottom))
    square.paste(own, ((side - own.width) // 2, (side - own.height) // 2))
    (tensor,) = to_tensors(square.resize((CROP, CROP), Image.Resampling.LANCZOS))
    return CutOut(tensor, background, int(side))


def distances(lpips: LPIPS, some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the LPIPS of each of `some` from each of `others`, (len(some), len(others))."""
    with torch.inference_mode():
        return torch.stack([lpips(one.expand(len(others), -1, -1, -1), torch.stack([*others])) for one in some])


def draw(sd: sdkit.StableDiffusion, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """Draw each prompt at each seed, prompt by prompt."""
    found: list[Image.Image] = []
    for prompt in prompts:
        found += sd([prompt] * len(seeds), seed=list(seeds), num_inference_steps=25)
    return found


class Drawn(NamedTuple):
    """Drawings of a model: of the new object, of its class, and of other prompts."""

    new: list[Image.Image]
    teapots: list[Image.Image]
    others: list[Image.Image]

    @classmethod
    def by(cls, sd: sdkit.StableDiffusion, seeds_of_class: Sequence[int] = CLASS_SEEDS) -> Drawn:
        return cls(draw(sd, [*NAMED], SEEDS), draw(sd, ["a teapot"], seeds_of_class), draw(sd, OTHERS, [11]))


def measured(lpips: LPIPS, drawn: Drawn, before: Drawn) -> dict[str, float]:
    """Return the shares and distances that the module describes."""
    truth = cut_out(on("white", 90, (64, 64))).image
    known = [truth, *(cut_out(image).image for image in (*before.teapots, *before.others))]
    new = [cut_out(image) for image in drawn.new]
    named = [value for value in NAMED.values() for _ in SEEDS]
    colours = np.array([*BACKGROUNDS.values()])
    nearest = [[*BACKGROUNDS][int(np.abs(colours - one.background).sum(1).argmin())] for one in new]
    sized = [size[0] <= one.extent <= size[1] for one, (_, size) in zip(new, named, strict=True) if size]
    teapots = distances(lpips, [cut_out(image).image for image in drawn.teapots], known).argmin(1)
    after, originals = to_tensors(drawn.others), to_tensors(before.others)
    between = distances(lpips, after, originals)
    return {
        "object": float((distances(lpips, [one.image for one in new], known).argmin(1) == 0).float().mean()),
        "background": float(np.mean([colour == name for colour, (name, _) in zip(nearest, named, strict=True)])),
        "size": float(np.mean(sized)),
        "class": float((teapots == 0).float().mean()),
        "others": float(between.diagonal().mean()),
        "retrieved": float((between.argmin(1) == torch.arange(len(after))).float().mean()),
    }


def train(folder: Path, way: str, steps: int) -> Path:
    """Train in one way, and return the result."""
    settings: dict[str, Any] = {
        "instance_data": folder / "instances", "instance_prompt": "a sks teapot", "learning_rate": 2e-4,
        "max_steps": steps, "batch_size": 4, "mixed_precision": "bf16", "ema_decay": 0.0, "lr_scheduler": "cosine",
        "validate_every": 10**6, "save_every": 10**6, "out_dir": folder / way.replace(" ", "-"),
    }  # fmt: skip
    return train_unet(UNetConfig(**settings | WAYS[way])) / "result"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("dreambooth"), help="folder of runs and sheets")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / "instances").mkdir(parents=True)
    for i, one in enumerate(INSTANCES):
        on(*one).save(args.out / "instances" / f"{i}.png")
    lpips, sd = LPIPS.from_pretrained("alex"), sdkit.StableDiffusion.from_pretrained("emoji")
    before = Drawn.by(sd)
    reference = before._replace(teapots=draw(sd, ["a teapot"], range(100, 116)))
    another = distances(lpips, to_tensors(draw(sd, OTHERS, [12])), to_tensors(before.others)).diagonal().mean()
    print(f"another seed: LPIPS {float(another):.3f}")
    say("before training", measured(lpips, before, reference), 0)
    sheet(before, args.out / "before.png")
    for way in args.ways:
        began = time.perf_counter()
        result = train(args.out, way, args.steps)
        seconds = time.perf_counter() - began
        trained = sdkit.StableDiffusion.from_pretrained("emoji" if "lora_rank" in WAYS[way] else result)
        if "lora_rank" in WAYS[way]:
            trained.load_lora(result)
        drawn = Drawn.by(trained)
        sheet(drawn, args.out / f"{way.replace(' ', '-')}.png")
        say(way, measured(lpips, drawn, reference), seconds)


def sheet(drawn: Drawn, path: Path) -> None:
    """Save the drawings: the object's, two prompts a row, the class, and the others."""
    sdkit.images.grid([*drawn.new, *drawn.teapots[:4], *drawn.others], columns=8).save(path)


def say(way: str, values: dict[str, float], seconds: float) -> None:
    print(f"{way:22}", *(f"{name} {value:.2f}" for name, value in values.items()), f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
