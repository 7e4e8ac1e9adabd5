"""Edits of pictures with the embedded model: image to image, inpainting, and inversion do what their users expect.

The pictures are twelve of those that the model was trained on, in tests/embedded. An edited image shows the one that is
nearest in pixels on the same background.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sdkit
from sdkit.recipes.emoji.pictures import BACKGROUNDS, caption, composed, pictures, read

HERE = Path(__file__).parents[1] / "embedded"
TWELVE = [one for one in pictures() if (HERE / f"{one.file}.webp").is_file()]
BLUE = BACKGROUNDS["blue"]
ON_BLUE = [caption(one.name, "blue") for one in TWELVE]
OPTIONS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 1.0}


def originals(colour: tuple[int, int, int]) -> list[Image.Image]:
    """Return the twelve pictures on a background."""
    return [composed(read(HERE, one.file), colour) for one in TWELVE]


def nearest(images: Sequence[Image.Image], colour: tuple[int, int, int]) -> list[int]:
    """Return for each image the number of the nearest of the twelve pictures on a background."""
    candidates = [pixels(one) for one in originals(colour)]
    return [int(np.argmin([np.square(pixels(image) - one).mean() for one in candidates])) for image in images]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def test_image_to_image_keeps_the_layout_as_strength_falls(sd: sdkit.StableDiffusion) -> None:
    """The layout is that of small pictures in a corner. The prompt is empty: the model knows its captions by heart, and
    a caption alone says where the object belongs, at any strength.
    """
    corners = ((4, 4), (60, 4), (4, 60), (60, 60))
    placed = [
        composed(read(HERE, one.file), BLUE, side=64, corner=corner)
        for one, corner in zip(TWELVE, corners, strict=False)
    ]

    def coarse(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=float).ravel()

    kept = []
    for strength in (0.2, 0.4, 0.6, 1.0):
        made = sd([""] * 4, image=placed, strength=strength, **OPTIONS)
        kept.append(np.mean([np.corrcoef(coarse(a), coarse(b))[0, 1] for a, b in zip(made, placed, strict=True)]))
    assert kept[0] > 0.6
    assert all(more - less > 0.1 for more, less in pairwise(kept))
    assert kept[-1] < 0.25


def test_inpainting_replaces_an_object_and_keeps_every_other_pixel(sd: sdkit.StableDiffusion) -> None:
    before, new = originals(BLUE)[:6], range(3, 9)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (6, 6, 122, 122))
    made = sd([ON_BLUE[i] for i in new], image=before, mask_image=mask, **OPTIONS)
    assert nearest(made, BLUE) == [*new]
    outside = np.asarray(mask) == 0
    for one, other in zip(made, before, strict=True):
        assert np.array_equal(np.asarray(one)[outside], np.asarray(other)[outside])


def test_inpainting_replaces_one_of_two_objects(sd: sdkit.StableDiffusion) -> None:
    """The model has never seen two objects. Only the masked region is drawn, at the model's own size."""
    left, right, *_ = originals(BLUE)
    both = Image.new("RGB", (256, 128))
    both.paste(left, (0, 0))
    both.paste(right, (128, 0))
    mask = Image.new("L", both.size)
    mask.paste(255, (130, 2, 254, 126))
    (made,) = sd(ON_BLUE[7], image=both, mask_image=mask, padding_mask_crop=2, height=128, width=128, **OPTIONS)
    assert nearest([made.crop((128, 0, 256, 128))], BLUE) == [7]
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(made)[outside], np.asarray(both)[outside])


def test_inversion_and_a_changed_word_edit_the_picture(sd: sdkit.StableDiffusion) -> None:
    """The background has a colour that no caption names. It must stay; from other noise it would be another one."""
    colour = (90, 190, 150)
    before, new = originals(colour)[:4], [5, 6, 7, 8]
    noise = sd.invert(before, [f"a {one.name}" for one in TWELVE[:4]], **OPTIONS)
    asked = [f"a {TWELVE[i].name}" for i in new]
    edited, drawn = sd(asked, latents=noise, **OPTIONS), sd(asked, **OPTIONS)
    assert nearest(edited, colour) == new
    rim = np.ones((128, 128), dtype=bool)
    rim[8:-8, 8:-8] = False

    def moved(images: Sequence[Image.Image]) -> list[float]:
        """Return the root mean square change of the rim of each image."""
        pairs = zip(images, before, strict=True)
        return [float(np.sqrt(np.square(pixels(a)[rim] - pixels(b)[rim]).mean())) for a, b in pairs]

    assert max(moved(edited)) < 0.15
    assert min(moved(drawn)) > 0.3
