"""Pictures drawn by the embedded model: the right object on the right background, with each sampler, and better with
guidance; and edits of pictures, by image to image, inpainting, and inversion.

Twelve of its training pictures are in tests/embedded. A drawn image counts as the one that is nearest in pixels on the
same background.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdkit
from sdkit.recipes.emoji.evaluation import Prompt, background_of
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed, pictures, read

HERE = Path(__file__).parents[1] / "embedded"
TWELVE = [one for one in pictures() if (HERE / f"{one.file}.webp").is_file()]
ON_BLUE = [Prompt(one, "blue") for one in TWELVE]
HELD_OUT = [Prompt(one, one.held_out) for one in TWELVE]


def draw(sd: sdkit.StableDiffusion, asked: Sequence[Prompt], **changes: object) -> list[Image.Image]:
    """Draw an image of each prompt, with seeds 0, 1, 2, ..."""
    settings = {"guidance_scale": 5.0, "num_inference_steps": 20, "seed": range(len(asked)), "batch_size": 12}
    made: list[Image.Image] = sd([prompt.text for prompt in asked], **settings | changes)
    return made


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def originals(colour: tuple[int, int, int]) -> list[Image.Image]:
    """Return the twelve pictures on a background."""
    return [composed(read(HERE, one.file), colour) for one in TWELVE]


def distances(image: Image.Image, colour: tuple[int, int, int]) -> list[float]:
    """Return the root mean square difference, from 0 to 1, to each of the twelve pictures on a background."""
    return [float(np.sqrt(np.square(pixels(image) - pixels(one)).mean())) for one in originals(colour)]


def found(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> int:
    """Count the images that are nearest to the picture in their prompt."""
    right = 0
    for image, prompt in zip(images, asked, strict=True):
        to_each = distances(image, BACKGROUNDS[prompt.background])
        right += to_each[TWELVE.index(prompt.picture)] == min(to_each)
    return right


def off(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> float:
    """Return the mean distance to the pictures in the prompts."""
    pairs = zip(images, asked, strict=True)
    return float(np.mean([distances(image, BACKGROUNDS[p.background])[TWELVE.index(p.picture)] for image, p in pairs]))


@pytest.fixture(scope="module")
def drawn(sd: sdkit.StableDiffusion) -> list[Image.Image]:
    """Draw the twelve on blue, with DDIM at guidance scale 5."""
    return draw(sd, ON_BLUE)


def test_there_are_twelve() -> None:
    assert len(TWELVE) == 12
    assert {one.held_out for one in TWELVE} >= {"blue", "black", "pink", "red", "gray"}


def test_it_draws_what_is_asked_for(drawn: list[Image.Image]) -> None:
    assert found(drawn, ON_BLUE) == 12
    assert [background_of(image) for image in drawn] == ["blue"] * 12


def test_pairs_that_it_has_never_seen(sd: sdkit.StableDiffusion) -> None:
    made = draw(sd, HELD_OUT)
    assert found(made, HELD_OUT) >= 11
    assert sum(background_of(image) == p.background for image, p in zip(made, HELD_OUT, strict=True)) >= 11


def test_guidance_raises_fidelity(sd: sdkit.StableDiffusion) -> None:
    """At scale 0 the prompt is ignored. The larger the scale, the nearer the images must be to the prompt."""
    made = [draw(sd, ON_BLUE, guidance_scale=scale) for scale in (0.0, 0.5, 1.0)]
    far = [off(images, ON_BLUE) for images in made]
    assert far[0] > 2 * far[1] > 4 * far[2]
    assert found(made[0], ON_BLUE) <= 4
    assert found(made[1], ON_BLUE) == found(made[2], ON_BLUE) == 12


def test_a_negative_prompt_keeps_away_what_it_names(sd: sdkit.StableDiffusion) -> None:
    """With an empty prompt, the background must not be the one in the negative prompt."""
    options = {"guidance_scale": 3.0, "num_inference_steps": 20, "num_images_per_prompt": 12, "batch_size": 12}
    any_of_them, not_white = (sd("", negative, **options) for negative in ("", "a ghost on a white background"))
    assert 1 <= sum(background_of(image) == "white" for image in any_of_them) <= 8
    assert "white" not in [background_of(image) for image in not_white]
    assert np.mean([pixels(image) for image in not_white]) < np.mean([pixels(image) for image in any_of_them]) - 0.2


def test_a_negative_prompt_turns_the_colour_to_the_opposite(sd: sdkit.StableDiffusion) -> None:
    """The prompt is "a circle"; no caption gives its colour."""
    options = {"guidance_scale": 5.0, "num_inference_steps": 20}
    made = (sd("a circle", negative, **options)[0] for negative in ("", "a red circle", "a blue circle"))
    middles = [pixels(image)[48:80, 48:80].mean((0, 1)) for image in made]
    plain, not_red, not_blue = (float(red - blue) for red, _, blue in middles)
    assert not_red < plain - 0.3
    assert not_blue > plain + 0.3


def test_fewer_steps_degrade_gracefully(sd: sdkit.StableDiffusion) -> None:
    """Fewer steps must be farther from the result of many steps. Ten are still enough to recognise the object."""
    exact = draw(sd, ON_BLUE, num_inference_steps=40)
    errors = []
    for steps in (20, 10, 4):
        made = draw(sd, ON_BLUE, num_inference_steps=steps)
        errors.append(np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(made, exact, strict=True)]))
        assert found(made, ON_BLUE) >= {20: 12, 10: 12, 4: 6}[steps]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 40), ("dpm++2m", 20)])
def test_samplers_agree_on_what_is_drawn(sd: sdkit.StableDiffusion, sampler: str, steps: int) -> None:
    made = draw(sd, ON_BLUE, sampler=sampler, num_inference_steps=steps)
    assert found(made, ON_BLUE) == 12


def test_seeds_differ(sd: sdkit.StableDiffusion, drawn: list[Image.Image]) -> None:
    """Images of other seeds must differ, but show the same objects."""
    others = draw(sd, ON_BLUE, seed=range(100, 112))
    assert found(others, ON_BLUE) == 12
    for one, other in zip(drawn, others, strict=True):
        assert np.abs(pixels(one) - pixels(other)).mean() > 0.002


def test_image_to_image_keeps_the_layout_as_strength_falls(sd: sdkit.StableDiffusion) -> None:
    """The layout is that of small pictures in a corner. The prompt is empty: the model knows its captions by heart, and
    a caption alone says where the object belongs, at any strength.
    """
    corners = ((4, 4), (60, 4), (4, 60), (60, 60))
    placed = [
        composed(read(HERE, one.file), BACKGROUNDS["blue"], side=64, corner=corner)
        for one, corner in zip(TWELVE, corners, strict=False)
    ]

    def coarse(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=float).ravel()

    kept = []
    for strength in (0.2, 0.4, 0.6, 1.0):
        options = {"strength": strength, "num_inference_steps": 10, "guidance_scale": 1.0, "seed": range(4)}
        made = sd([""] * 4, image=placed, **options)
        kept.append(np.mean([np.corrcoef(coarse(a), coarse(b))[0, 1] for a, b in zip(made, placed, strict=True)]))
    assert kept[0] > 0.6
    assert all(more - less > 0.1 for more, less in pairwise(kept))
    assert kept[-1] < 0.25


def test_inpainting_replaces_an_object_and_keeps_every_other_pixel(sd: sdkit.StableDiffusion) -> None:
    before, asked = originals(BACKGROUNDS["blue"])[:6], ON_BLUE[3:9]
    mask = Image.new("L", (128, 128))
    mask.paste(255, (6, 6, 122, 122))
    made = draw(sd, asked, image=before, mask_image=mask, num_inference_steps=10, guidance_scale=1.0)
    assert found(made, asked) == 6
    outside = np.asarray(mask) == 0
    for one, other in zip(made, before, strict=True):
        assert np.array_equal(np.asarray(one)[outside], np.asarray(other)[outside])


def test_inpainting_replaces_one_of_two_objects(sd: sdkit.StableDiffusion) -> None:
    """The model has never seen two objects. Only the masked region is drawn, at the model's own size."""
    left, right, *_ = originals(BACKGROUNDS["blue"])
    both = Image.new("RGB", (256, 128))
    both.paste(left, (0, 0))
    both.paste(right, (128, 0))
    mask = Image.new("L", both.size)
    mask.paste(255, (130, 2, 254, 126))
    options = {"padding_mask_crop": 2, "height": 128, "width": 128, "num_inference_steps": 10, "guidance_scale": 1.0}
    (made,) = draw(sd, ON_BLUE[7:8], image=both, mask_image=mask, **options)
    assert found([made.crop((128, 0, 256, 128))], ON_BLUE[7:8]) == 1
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(made)[outside], np.asarray(both)[outside])


def test_inversion_and_a_changed_word_edit_the_picture(sd: sdkit.StableDiffusion) -> None:
    """The background has a colour that no caption names. It must stay; from other noise it would be another one."""
    colour = (90, 190, 150)
    before, new = originals(colour)[:4], [5, 6, 7, 8]
    options = {"num_inference_steps": 10, "guidance_scale": 1.0}
    noise = sd.invert(before, [f"a {one.name}" for one in TWELVE[:4]], **options)
    asked = [f"a {TWELVE[i].name}" for i in new]
    edited, drawn = sd(asked, latents=noise, **options), sd(asked, **options)
    to_each = [distances(image, colour) for image in edited]
    assert [row.index(min(row)) for row in to_each] == new
    rim = np.ones((128, 128), dtype=bool)
    rim[8:-8, 8:-8] = False

    def moved(images: Sequence[Image.Image]) -> list[float]:
        """Return the root mean square change of the rim of each image."""
        pairs = zip(images, before, strict=True)
        return [float(np.sqrt(np.square(pixels(a)[rim] - pixels(b)[rim]).mean())) for a, b in pairs]

    assert max(moved(edited)) < 0.15
    assert min(moved(drawn)) > 0.3
