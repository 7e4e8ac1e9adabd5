"""Edits of pictures with the embedded model: image to image, inpainting, and inversion do what their users expect.

The pictures are of emoji that the model knows, in tests/embedded. An edited image shows the one that is
nearest in pixels (see tests/helpers/embedded.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

import sdkit
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import Part
from sdkit.recipes.emoji.figures import figure_of
from tests.helpers.embedded import TWELVE, composed, found, large

ON_BLUE = [Prompt((one,), one.styles[-1], "blue", "large") for one in TWELVE]
OPTIONS: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 1.5}


def outside(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask) == 0


def test_image_to_image_keeps_the_layout_as_strength_falls(sd: sdkit.StableDiffusion) -> None:
    """The layout is that of small pictures near a corner, and the prompt is empty."""
    parts = [
        Part(picture=one, extent=64, across=float(i % 2), down=float(i // 2), mirrored=False)
        for i, one in enumerate(TWELVE[:4])
    ]
    placed = [composed("flat", "blue", part) for part in parts]

    def coarse(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=float).ravel()

    kept = []
    for strength in (0.2, 0.4, 0.6, 1.0):
        made = sd([""] * 4, image=placed, strength=strength, **OPTIONS)
        kept.append(np.mean([np.corrcoef(coarse(a), coarse(b))[0, 1] for a, b in zip(made, placed, strict=True)]))
    assert kept[0] > 0.6
    assert all(more - less > 0.05 for more, less in pairwise(kept))
    assert kept[-1] < 0.25


def test_inpainting_replaces_an_object_and_keeps_every_other_pixel(sd: sdkit.StableDiffusion) -> None:
    before, new = [large(one) for one in ON_BLUE[:6]], ON_BLUE[3:9]
    mask = Image.new("L", (128, 128))
    mask.paste(255, (6, 6, 122, 122))
    made = sd([one.text for one in new], image=before, mask_image=mask, **OPTIONS)
    assert found(made, new) >= 5
    for one, other in zip(made, before, strict=True):
        assert np.array_equal(np.asarray(one)[outside(mask)], np.asarray(other)[outside(mask)])


def test_inpainting_replaces_one_of_two_objects(sd: sdkit.StableDiffusion) -> None:
    """The image is twice as wide as the model's own. Only the masked region is drawn, at the model's own size."""
    left, right, new = ON_BLUE[0], ON_BLUE[1], ON_BLUE[7]
    both = Image.new("RGB", (256, 128))
    both.paste(large(left), (0, 0))
    both.paste(large(right), (128, 0))
    mask = Image.new("L", both.size)
    mask.paste(255, (130, 2, 254, 126))
    (made,) = sd(new.text, image=both, mask_image=mask, padding_mask_crop=2, height=128, width=128, **OPTIONS)
    assert found([made.crop((128, 0, 256, 128))], [new]) == 1
    assert np.array_equal(np.asarray(made)[outside(mask)], np.asarray(both)[outside(mask)])


def test_inpainting_replaces_the_right_one_of_a_pair(sd: sdkit.StableDiffusion) -> None:
    """The prompt names both. The new one must be drawn beside the one that stays."""
    parts = [Part(picture=one, extent=48, across=0.5, down=0.5, mirrored=False) for one in TWELVE[:2]]
    before = composed("flat", "blue", *parts)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    asked = [Prompt((TWELVE[0], TWELVE[i]), "flat", "blue") for i in (3, 4, 7, 8)]
    made = sd([one.text for one in asked], image=[before] * 4, mask_image=mask, **OPTIONS)
    new = [Prompt(one.pictures[1:], "flat", "blue") for one in asked]
    assert found([image.crop((64, 0, 128, 128)) for image in made], new) >= 3


def test_inversion_and_a_changed_word_edit_the_picture(sd: sdkit.StableDiffusion) -> None:
    """The new prompt does not say where the object is. On average, it must move less than half as
    far as with other noise.
    """
    places = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    known, others = ([TWELVE[i] for i in some] for some in ((0, 1, 3, 7), (4, 6, 8, 0)))
    before = [
        composed("flat", "blue", Part(picture=one, extent=48, across=across, down=down, mirrored=False))
        for one, (across, down) in zip(known, places, strict=True)
    ]
    old, new = ([Prompt((one,), "flat", "blue", "small") for one in some] for some in (known, others))
    options = OPTIONS | {"guidance_scale": 1.0}
    noise = sd.invert(before, [one.text for one in old], **options)
    asked = [one.text for one in new]
    edited, drawn = sd(asked, latents=noise, **options), sd(asked, **options)

    def where(image: Image.Image) -> np.ndarray:
        figure = figure_of(image)
        assert figure
        left, top, right, bottom = figure.box
        return np.array([(left + right) / 2, (top + bottom) / 2])

    def moved(images: Sequence[Image.Image]) -> float:
        """Return the mean distance in pixels between what stands on each image now and before."""
        return float(np.mean([np.linalg.norm(where(a) - where(b)) for a, b in zip(images, before, strict=True)]))

    assert found(edited, new) >= 3
    assert moved(edited) < 0.5 * moved(drawn)
