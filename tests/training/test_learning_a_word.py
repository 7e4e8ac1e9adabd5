"""Textual inversion teaches the embedded model a new object's colours and outline from five pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import sdkit
from sdkit.images import to_tensors
from sdkit.networks.lpips import LPIPS
from sdkit.recipes.emoji.compositions import described
from sdkit.recipes.emoji.pictures import BACKGROUNDS
from sdkit.training import EmbeddingConfig, train_embedding

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SEEN = ("white", "red", "blue", "yellow", "gray")
UNSEEN = tuple(name for name in BACKGROUNDS if name not in SEEN)
SEEDS = (1, 2)
TOKEN, INIT = "<zork>", "robot"


def zork(side: int) -> Image.Image:
    """Draw an object that is none of the model's: a green pot with yellow stripes, two eyes, and a purple lid."""
    n = 8
    image = Image.new("RGBA", (112 * n, 112 * n), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)

    def at(*numbers: int) -> list[int]:
        return [number * n for number in numbers]

    draw.rounded_rectangle(at(18, 40, 94, 106), radius=18 * n, fill=(60, 170, 70))
    for y in (58, 76, 92):
        draw.rectangle(at(18, y, 94, y + 6), fill=(245, 200, 40))
    draw.pieslice(at(14, 8, 98, 78), 180, 360, fill=(140, 60, 190))
    draw.ellipse(at(48, 0, 64, 16), fill=(230, 60, 60))
    for x in (36, 64):
        draw.ellipse(at(x, 56, x + 16, 72), fill=(255, 255, 255))
        draw.ellipse(at(x + 5, 61, x + 12, 68), fill=(20, 20, 20))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def on(background: str) -> Image.Image:
    """Draw the object on a background, at the size and place of the model's large pictures."""
    canvas = Image.new("RGBA", (128, 128), (*BACKGROUNDS[background], 255))
    canvas.alpha_composite(zork(110), (10, 16))  # 104 pixels high, from (24, 16)
    return canvas.convert("RGB")


def called(name: str, background: str) -> str:
    """Return a caption of an object as `on` draws it."""
    return described([name], style="flat", size="large", background=background)


def drawn(sd: sdkit.StableDiffusion, name: str) -> list[Image.Image]:
    """Draw a name on each unseen background, once for each seed."""
    return [image for seed in SEEDS for image in sd([called(name, b) for b in UNSEEN], seed=[seed] * len(UNSEEN))]


def distances(images: list[Image.Image], lpips: LPIPS) -> list[float]:
    """Return the LPIPS of each image from the object on its background."""
    with torch.no_grad():
        made, right = (torch.stack(to_tensors(some)) for some in (images, [on(b) for b in UNSEEN] * len(SEEDS)))
        return [float(lpips(a[None], b[None])) for a, b in zip(made, right, strict=True)]


def background_errors(images: list[Image.Image]) -> list[float]:
    """Return how far the colour of each image's upper edge is from that of its background, of 255."""
    wanted = [BACKGROUNDS[b] for b in UNSEEN] * len(SEEDS)
    return [float(np.abs(np.asarray(a)[:6].mean((0, 1)) - w).max()) for a, w in zip(images, wanted, strict=True)]


def test_five_pictures_teach_an_object_on_other_backgrounds(tmp_path: Path) -> None:
    """Draw the object on seven backgrounds that no picture showed. The word that learning began with is the control,
    and other prompts must draw bit-identically as before.

    Vectors alone teach the embedded model the object's colours and outline, at any background, size, and seed, but
    neither its eyes nor its stripes.
    """
    torch.set_num_threads(1)
    (tmp_path / "five").mkdir()
    for background in SEEN:
        on(background).save(tmp_path / "five" / f"{background}.png")
        (tmp_path / "five" / f"{background}.txt").write_text(called(TOKEN, background))
    data = sdkit.data.cache("emoji", tmp_path / "five", tmp_path / "cache", dtype="fp32", device="cpu")
    run = train_embedding(
        EmbeddingConfig(
            data=data, out_dir=tmp_path / "run", token=TOKEN, init_token=INIT, vectors=4, learning_rate=0.02,
            max_steps=300, batch_size=5, lr_scheduler="cosine", mixed_precision="bf16", validate_every=150,
        )
    )  # fmt: skip
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    others = ["a robot on a red background", "a cat"]
    before = sd(others, num_inference_steps=4, output_type="pt")
    control = drawn(sd, INIT)
    sd.load_embedding(run / "result")
    found = drawn(sd, TOKEN)
    assert torch.equal(sd(others, num_inference_steps=4, output_type="pt"), before)
    right = [on(b) for b in UNSEEN]
    sdkit.images.grid([*right, *found, *control], columns=len(UNSEEN)).save(tmp_path / "zorks.png")
    for height, width in ((128, 192), (96, 96), (160, 160)):
        sd(called(TOKEN, "green"), seed=1, height=height, width=width)[0].save(tmp_path / f"{height}x{width}.png")
    lpips = LPIPS.from_pretrained("alex")
    ours, theirs = (distances(images, lpips) for images in (found, control))
    errors = background_errors(found)
    assert np.mean(ours) < 0.75 * np.mean(theirs)
    assert all(a < b for a, b in zip(ours, theirs, strict=True))
    assert max(errors) < 25
