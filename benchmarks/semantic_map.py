"""Teach the embedded model to paint a semantic map, and measure whether it does.

A map has one colour where the object is to be, and the colour of the background elsewhere. The training images show
twelve emoji, each at random places, in random sizes, and on random colours; captions name the emoji and their style,
nothing else. Drawings of new maps are compared with their own maps, with others' maps, and with drawings by the
untrained model, which reads no map:

    .venv/bin/python benchmarks/semantic_map.py --out /tmp/map --steps 300
"""

from __future__ import annotations

import argparse
import colorsys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

import sdkit
from sdkit.data import cache
from sdkit.recipes.emoji.pictures import SIZE, pictures
from sdkit.training import UNetConfig, train_unet

EMOJI = Path(__file__).parents[1] / "tests" / "embedded" / "3d"
OBJECT = (255, 0, 255)  # the map's colour of an object
UNSEEN = ("a 3d guitar", "a 3d pizza", "a 3d soccer ball", "a 3d house")  # objects that are not in the training images
DRAWN = 24  # drawings of seen objects that are measured


def background(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return a random colour, not near that of an object in maps."""
    hue, saturation, value = rng.uniform(0, 0.75), rng.uniform(0.3, 1), rng.uniform(0.3, 1)
    red, green, blue = (round(255 * level) for level in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def composed(emoji: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return an emoji at a random place on a random colour, and the map of it."""
    side = int(rng.integers(48, 113))
    place = tuple(int(one) for one in rng.integers(0, SIZE - side + 1, 2))
    colour = background(rng)
    image, semantic = Image.new("RGB", (SIZE, SIZE), colour), Image.new("RGB", (SIZE, SIZE), colour)
    small = emoji.resize((side, side), Image.Resampling.LANCZOS)
    image.paste(small, place, small)
    semantic.paste(OBJECT, place, small.getchannel("A").point(lambda level: 255 * (level > 127)))
    return image, semantic


def ellipse(rng: np.random.Generator) -> Image.Image:
    """Return a map whose object is an ellipse."""
    semantic = Image.new("RGB", (SIZE, SIZE), background(rng))
    side = int(rng.integers(64, 105))
    left, top = (int(one) for one in rng.integers(0, SIZE - side + 1, 2))
    ImageDraw.Draw(semantic).ellipse((left, top, left + side, top + side), fill=OBJECT)
    return semantic


def scores(drawn: list[Image.Image], maps: list[Image.Image]) -> tuple[float, float]:
    """Return the mean IoU of drawn objects with those of maps, and the mean error of the background in 8-bit levels."""
    ious, errors = [], []
    for image, semantic in zip(drawn, maps, strict=True):
        levels, wanted = (np.asarray(one).astype(int) for one in (image, semantic))
        region = (wanted == OBJECT).all(2)
        border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
        own = np.median(border, axis=0)
        painted: npt.NDArray[np.bool_] = np.abs(levels - own).max(2) > 32
        ious.append((painted & region).sum() / max(1, (painted | region).sum()))
        errors.append(np.abs(own - wanted[~region][0]).mean())
    return float(np.mean(ious)), float(np.mean(errors))


def main() -> None:
    """Train, draw, print the measurements, and write a sheet of maps and drawings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the run and the sheet")
    parser.add_argument("--steps", type=int, default=300, help="Training steps")
    parser.add_argument("--copies", type=int, default=25, help="Training images of each emoji")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    names = {one.file: one.name for one in pictures()}
    emoji = {f"a 3d {names[path.stem]}": Image.open(path).convert("RGBA") for path in sorted(EMOJI.glob("*.webp"))}
    for folder in ("images", "maps"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    for i, (caption, picture) in enumerate(pair for _ in range(args.copies) for pair in emoji.items()):
        for folder, image in zip(("images", "maps"), composed(picture, rng), strict=True):
            image.save(args.out / folder / f"{i:04}.png")
        (args.out / "images" / f"{i:04}.txt").write_text(caption)
    began = time.perf_counter()
    cached = cache(
        "emoji", args.out / "images", args.out / "cache", conditioning_data=args.out / "maps", condition_kind="map",
        embeddings=True,
    )  # fmt: skip
    run = train_unet(
        UNetConfig(
            data=cached, out_dir=args.out / "run", max_steps=args.steps, batch_size=16, learning_rate=2e-3,
            optimizer="muon", lr_scheduler="cosine", timestep_sampling="logit_normal", logit_mean=1.0, ema_decay=0.0,
            mixed_precision="bf16", save_every=args.steps, validate_every=args.steps,
        )
    )  # fmt: skip
    print(f"{args.steps} steps in {time.perf_counter() - began:.0f} s", flush=True)
    plain = sdkit.StableDiffusion.from_pretrained("emoji")
    model = sdkit.StableDiffusion.from_pretrained(run / "result")
    seen = [
        (caption, composed(picture, rng)[1])
        for _ in range(-(-DRAWN // len(emoji)))
        for caption, picture in emoji.items()
    ]
    new = [(caption, ellipse(rng)) for caption in UNSEEN]
    options: dict[str, Any] = {"num_inference_steps": 20, "seed": 100}
    rows: list[Image.Image] = []
    for what, group in (("seen objects", seen[:DRAWN]), ("unseen objects", new)):
        prompts, maps = [caption for caption, _ in group], [semantic for _, semantic in group]
        without = plain(prompts, **options)
        print(f"{what}: no map: IoU {{:.2f}}, background {{:.0f}}".format(*scores(without, maps)))
        for scale in (1.0, 2.0):
            drawn = model(prompts, condition=maps, image_guidance_scale=scale, **options)
            print(f"{what}: its map, image_guidance_scale {scale:g}: ", end="")
            print("IoU {:.2f}, background {:.0f}; ".format(*scores(drawn, maps)), end="")
            print(
                "another's map: IoU {:.2f}, background {:.0f}".format(*scores(drawn, [*maps[1:], maps[0]])), flush=True
            )
        rows += [*maps[:8], *drawn[:8], *without[:8]]
    sdkit.images.grid(rows[:24], columns=8).save(args.out / "seen.png")
    sdkit.images.grid(rows[24:], columns=len(UNSEEN)).save(args.out / "unseen.png")


if __name__ == "__main__":
    main()
