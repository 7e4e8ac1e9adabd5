"""Teach the embedded model a new object from five pictures (DreamBooth), and measure what it learns and forgets.

    python benchmarks/dreambooth.py                        # about ten minutes on one CPU core
    python benchmarks/dreambooth.py --ways lora --steps 50 # a quick look

The object is a teapot that no emoji set has, on five backgrounds, in medium sizes; captions name it and its background.
It is then drawn on other backgrounds at several seeds, also small and large, as the prompt says. Controls: the model
before training, and training without class images. The folder --out gets the pictures and a sheet for each way of
training: the object, then the class "a teapot", then other prompts.

- object: share of drawings of the new object that are nearest to it, by LPIPS of the cut-out object, among it, eight
  teapots, and the other prompts' objects, which the model drew before training.
- background: share of them whose background is nearest to the named colour.
- smallest, largest: extents of the object in pixels.
- class, others: mean LPIPS of drawings of "a teapot", and of other prompts, before and after, with the same seeds;
  retrieved: share of the latter that are nearest to their own prompt's drawing before. `another seed` is what LPIPS
  says where only the seed differs.
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
from sdkit.recipes.emoji.compositions import described
from sdkit.recipes.emoji.pictures import BACKGROUNDS
from sdkit.training import UNetConfig, train_unet

SIDE, CROP, FINE = 128, 64, 4  # pixels of an image and of a cut-out object; oversampling of the teapot's drawing
INSTANCES = (("white", 72, (64, 64)), ("gray", 84, (60, 70)), ("orange", 64, (74, 56)), ("brown", 90, (66, 66)),
             ("yellow", 78, (52, 60)))  # fmt: skip
"""Background, extent, and centre of the object in each of the five pictures."""
NEW = (("blue", ""), ("pink", ""), ("black", ""), ("turquoise", "small"), ("purple", "large"))
"""Backgrounds on which the object is drawn, and the size that the prompt names, if any."""
OTHERS = (
    "a large 3d red apple on a yellow background", "a large 3d cat on a pink background",
    "a large 3d pizza on a black background", "a large 3d guitar on a green background",
    "a large flat dog on a white background", "a large flat panda on an orange background",
    "a large noto house on a yellow background", "a large noto sunflower on a blue background",
    "a large twemoji rocket on a purple background", "a large twemoji octopus on a brown background",
    "a small fish on the left of a red background", "a small strawberry at the top of a turquoise background",
)  # fmt: skip
"""Other prompts. They leave little open, so that drawings before and after differ by what training changed."""
SEEDS, CLASS_SEEDS, KNOWN_SEEDS = range(3), range(8), range(100, 108)
CLASS: dict[str, Any] = {"class_prompt": "a teapot"}
WAYS: dict[str, dict[str, Any]] = {
    "without class images": {},
    "whole": CLASS,
    "lora": CLASS | {"lora_rank": 16, "learning_rate": 2e-3},
    "text": CLASS | {"train_text_encoder": True},
}


def called(background: str, size: str = "") -> str:
    """Return the caption of the object on a background. `size` is "small", "large", or ""."""
    return described(["sks teapot"], size=size, background=background)


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
    def by(cls, sd: sdkit.StableDiffusion) -> Drawn:
        new = draw(sd, [called(*one) for one in NEW], SEEDS)
        return cls(new, draw(sd, ["a teapot"], CLASS_SEEDS), draw(sd, OTHERS, [11]))


def measured(lpips: LPIPS, drawn: Drawn, before: Drawn, teapots: Sequence[Image.Image]) -> dict[str, float]:
    """Return the shares and distances that the module describes.

    Args:
        lpips: The metric.
        drawn: Drawings of a model.
        before: Those of the model before training.
        teapots: Drawings of the class by the model before training, at other seeds.
    """
    truth = cut_out(on("white", 90, (64, 64))).image
    known = [truth, *(cut_out(image).image for image in (*teapots, *before.others))]
    new = [cut_out(image) for image in drawn.new]
    named = [background for background, _ in NEW for _ in SEEDS]
    colours = np.array([*BACKGROUNDS.values()])
    nearest = [[*BACKGROUNDS][int(np.abs(colours - one.background).sum(1).argmin())] for one in new]
    extents = [one.extent for one in new]
    of_class = distances(lpips, to_tensors(drawn.teapots), to_tensors(before.teapots)).diagonal()
    after, originals = to_tensors(drawn.others), to_tensors(before.others)
    between = distances(lpips, after, originals)
    return {
        "object": float((distances(lpips, [one.image for one in new], known).argmin(1) == 0).float().mean()),
        "background": float(np.mean([colour == name for colour, name in zip(nearest, named, strict=True)])),
        "smallest": min(extents),
        "largest": max(extents),
        "class": float(of_class.mean()),
        "others": float(between.diagonal().mean()),
        "retrieved": float((between.argmin(1) == torch.arange(len(after))).float().mean()),
    }


def train(folder: Path, way: str, steps: int, class_count: int) -> Path:
    """Train in one way, and return the result."""
    settings: dict[str, Any] = {
        "instance_data": folder / "instances", "learning_rate": 1e-4,
        "max_steps": steps, "batch_size": 4, "mixed_precision": "bf16", "ema_decay": 0.0, "lr_scheduler": "cosine",
        "validate_every": 10**6, "save_every": 10**6, "out_dir": folder / way.replace(" ", "-"),
    }  # fmt: skip
    if "class_prompt" in WAYS[way]:
        settings["class_count"] = class_count
    return train_unet(UNetConfig(**settings | WAYS[way])) / "result"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps (default: 250)")
    parser.add_argument("--class-count", type=int, default=100, help="class images to draw (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("dreambooth"), help="folder of runs and sheets")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / "instances").mkdir(parents=True)
    for i, (background, *place) in enumerate(INSTANCES):
        on(background, *place).save(args.out / "instances" / f"{i}.png")
        (args.out / "instances" / f"{i}.txt").write_text(called(background))
    lpips, sd = LPIPS.from_pretrained("alex"), sdkit.StableDiffusion.from_pretrained("emoji")
    before, teapots = Drawn.by(sd), draw(sd, ["a teapot"], KNOWN_SEEDS)
    another = distances(lpips, to_tensors(draw(sd, OTHERS, [12])), to_tensors(before.others)).diagonal().mean()
    print(f"another seed: LPIPS {float(another):.3f}")
    say("before training", measured(lpips, before, before, teapots), 0)
    sheet(before, args.out / "before.png")
    for way in args.ways:
        began = time.perf_counter()
        result = train(args.out, way, args.steps, args.class_count)
        seconds = time.perf_counter() - began
        trained = sdkit.StableDiffusion.from_pretrained("emoji" if "lora_rank" in WAYS[way] else result)
        if "lora_rank" in WAYS[way]:
            trained.load_lora(result)
        drawn = Drawn.by(trained)
        sheet(drawn, args.out / f"{way.replace(' ', '-')}.png")
        say(way, measured(lpips, drawn, before, teapots), seconds)


def sheet(drawn: Drawn, path: Path) -> None:
    """Save the drawings: the object's, the class, and the others."""
    sdkit.images.grid([*drawn.new, *drawn.teapots[:4], *drawn.others], columns=8).save(path)


def say(way: str, values: dict[str, float], seconds: float) -> None:
    print(f"{way:22}", *(f"{name} {value:.3g}" for name, value in values.items()), f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
