"""Pictures drawn by the embedded model: the right object on the right background, with each sampler, and better with
guidance.

Twelve of its training pictures are in tests/embedded. A drawn image counts as the one that is nearest in pixels on the
same background.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdkit
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.figures import background_of
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed, pictures, read

HERE = Path(__file__).parents[1] / "embedded"
TWELVE = [one for one in pictures() if (HERE / f"{one.file}.webp").is_file()]
ON_BLUE = [Prompt((one,), background="blue") for one in TWELVE]
SIX = ON_BLUE[:6]
HELD_OUT = [Prompt((one,), background=one.held_out) for one in TWELVE]


def draw(sd: sdkit.StableDiffusion, asked: Sequence[Prompt], **changes: object) -> list[Image.Image]:
    """Draw an image of each prompt, with seeds 0, 1, 2, ..."""
    settings = {"guidance_scale": 5.0, "num_inference_steps": 10, "seed": range(len(asked)), "batch_size": 12}
    made: list[Image.Image] = sd([prompt.text for prompt in asked], **settings | changes)
    return made


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def distances(image: Image.Image, background: str) -> list[float]:
    """Return the root mean square difference, from 0 to 1, to each of the twelve pictures on a background."""
    return [float(np.sqrt(np.square(pixels(image) - original).mean())) for original in originals(background)]


@functools.cache
def originals(background: str) -> list[np.ndarray]:
    """Return the pixels of the twelve pictures on a background."""
    return [pixels(composed(read(HERE, one.file), BACKGROUNDS[background])) for one in TWELVE]


def found(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> int:
    """Count the images that are nearest to the picture in their prompt."""
    right = 0
    for image, prompt in zip(images, asked, strict=True):
        to_each = distances(image, prompt.background)
        right += to_each[TWELVE.index(prompt.pictures[0])] == min(to_each)
    return right


def off(images: Sequence[Image.Image], asked: Sequence[Prompt]) -> float:
    """Return the mean distance to the pictures in the prompts."""
    pairs = zip(images, asked, strict=True)
    return float(np.mean([distances(image, p.background)[TWELVE.index(p.pictures[0])] for image, p in pairs]))


@pytest.fixture(scope="module")
def drawn(sd: sdkit.StableDiffusion) -> list[Image.Image]:
    """Draw the twelve on blue, with DDIM at guidance scale 5 in 10 steps."""
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
    options = {"guidance_scale": 3.0, "num_inference_steps": 10, "num_images_per_prompt": 12, "batch_size": 12}
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


def test_fewer_steps_degrade_gracefully(sd: sdkit.StableDiffusion, drawn: list[Image.Image]) -> None:
    """Fewer steps must be farther from the result of many steps. Ten are still enough to recognise the object."""
    exact = draw(sd, SIX, num_inference_steps=40)
    errors = []
    for steps in (20, 10, 4):
        made = drawn[:6] if steps == 10 else draw(sd, SIX, num_inference_steps=steps)
        errors.append(np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(made, exact, strict=True)]))
        assert found(made, SIX) >= {20: 6, 10: 6, 4: 3}[steps]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 40), ("dpm++2m", 10)])
def test_samplers_agree_on_what_is_drawn(sd: sdkit.StableDiffusion, sampler: str, steps: int) -> None:
    made = draw(sd, SIX, sampler=sampler, num_inference_steps=steps)
    assert found(made, SIX) == 6


def test_seeds_differ(sd: sdkit.StableDiffusion, drawn: list[Image.Image]) -> None:
    """Images of other seeds must differ, but show the same objects."""
    others = draw(sd, SIX, seed=range(100, 106))
    assert found(others, SIX) == 6
    for one, other in zip(drawn[:6], others, strict=True):
        assert np.abs(pixels(one) - pixels(other)).mean() > 0.002
