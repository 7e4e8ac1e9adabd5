"""Pictures drawn by the embedded model: what a prompt names is right, and what it leaves open varies from seed to seed.

Twelve of its pictures, in four styles, are in tests/embedded. A drawn image counts as the one that is nearest in pixels
(see tests/helpers/embedded.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

import sdkit
from sdkit.recipes.emoji.asked import SIZED, Prompt
from sdkit.recipes.emoji.evaluation import arrangement, variety
from sdkit.recipes.emoji.figures import background_of
from sdkit.recipes.emoji.gallery import halves, of_each
from sdkit.recipes.emoji.pictures import STYLES
from tests.helpers.embedded import TWELVE, found, in_style, off, pixels

ON_BLUE = [Prompt((one,), one.styles[0], "blue", "large") for one in TWELVE]
SIX = ON_BLUE[:6]
UNSEEN = [Prompt((one,), one.held_out_style, one.backgrounds[0], "large") for one in TWELVE if one.held_out_style]


def draw(sd: sdkit.StableDiffusion, asked: Sequence[Prompt], **changes: object) -> list[Image.Image]:
    """Draw an image of each prompt, with seeds 0, 1, 2, ..."""
    settings = {"num_inference_steps": 10, "seed": range(len(asked)), "batch_size": 12}
    made: list[Image.Image] = sd([prompt.text for prompt in asked], **settings | changes)
    return made


@pytest.fixture(scope="module")
def drawn(sd: sdkit.StableDiffusion) -> list[Image.Image]:
    """Draw the twelve on blue, with DDIM in 10 steps."""
    return draw(sd, ON_BLUE)


def test_there_are_twelve() -> None:
    assert len(TWELVE) == 12
    assert {one.held_out for one in TWELVE} >= {"blue", "black", "pink", "red", "gray"}
    assert {one.held_out_style for one in TWELVE} == {"", *STYLES}


def test_it_draws_what_is_asked_for(drawn: list[Image.Image]) -> None:
    assert found(drawn, ON_BLUE) >= 11
    assert [background_of(image) for image in drawn] == ["blue"] * 12


def test_backgrounds_that_it_has_never_seen(sd: sdkit.StableDiffusion) -> None:
    asked = [Prompt((one,), one.styles[-1], one.held_out, "large") for one in TWELVE]
    made = draw(sd, asked)
    assert found(made, asked) >= 11
    assert [background_of(image) for image in made] == [one.held_out for one in TWELVE]


def test_styles(sd: sdkit.StableDiffusion) -> None:
    asked = [Prompt((one,), style, "white", "large") for one in TWELVE for style in one.styles]
    made = draw(sd, asked)
    assert found(made, asked) >= 0.85 * len(asked)
    assert in_style(made, asked) >= 0.6 * len(asked)


def test_styles_in_which_it_has_never_seen_a_picture(sd: sdkit.StableDiffusion) -> None:
    """The thing must be right more often than not."""
    assert found(draw(sd, UNSEEN), UNSEEN) > len(UNSEEN) / 2


def test_sizes_and_places(sd: sdkit.StableDiffusion) -> None:
    asked = [Prompt((one,), "flat", "yellow", *SIZED[i % len(SIZED)]) for i, one in enumerate(TWELVE * 2)]
    measured = arrangement(asked, draw(sd, asked))
    assert measured["size"] == 1
    assert measured["background"] == 1
    assert measured["place"] is not None
    assert measured["place"] > 0.9


def test_two_side_by_side(sd: sdkit.StableDiffusion) -> None:
    asked = [Prompt((TWELVE[i], TWELVE[i + 6]), "twemoji", "yellow") for i in range(6)]
    of_halves = [half for image in draw(sd, asked) for half in halves(image)]
    assert found(of_halves, [one for both in of_each(asked) for one in both]) >= 9


def test_what_is_left_open_varies(sd: sdkit.StableDiffusion) -> None:
    """From eight seeds. The more a prompt says, the less the images differ."""
    said = ("a ghost", "a ghost on a pink background", "a large flat ghost on a pink background")
    deviations = [variety([sd([one] * 8, num_inference_steps=10, batch_size=8)]) for one in said]
    assert deviations[2] < deviations[1] < deviations[0]
    assert deviations[0] > 20
    assert deviations[2] < deviations[0] / 2


def test_guidance_raises_fidelity(sd: sdkit.StableDiffusion) -> None:
    """At scale 0 the prompt is ignored. The larger the scale, the nearer the images must be to the prompt."""
    made = [draw(sd, ON_BLUE, guidance_scale=scale) for scale in (0.0, 0.5, 1.0)]
    far = [off(images, ON_BLUE) for images in made]
    assert far == sorted(far, reverse=True)
    assert found(made[0], ON_BLUE) <= 4
    assert found(made[2], ON_BLUE) >= 10


def test_guidance_lowers_variety(sd: sdkit.StableDiffusion) -> None:
    deviations = [
        variety([sd([f"a {one.name}"] * 8, guidance_scale=scale, num_inference_steps=8) for one in TWELVE[:2]])
        for scale in (1.0, 7.5)
    ]
    assert deviations[1] < deviations[0]


def test_a_negative_prompt_keeps_away_what_it_names(sd: sdkit.StableDiffusion) -> None:
    """Of the backgrounds that the prompt leaves open, the one in the negative prompt must become rare."""
    options = {"guidance_scale": 5.0, "num_inference_steps": 10, "num_images_per_prompt": 16, "batch_size": 16}
    any_of_them, not_white = (sd("a mushroom", negative, **options) for negative in ("", "a white background"))
    white = [sum(background_of(image) == "white" for image in images) for images in (any_of_them, not_white)]
    assert white[0] >= 3
    assert white[1] <= white[0] / 3
    assert np.mean([pixels(image) for image in not_white]) < np.mean([pixels(image) for image in any_of_them]) - 0.05


def test_steps_go_from_coarse_to_fine(sd: sdkit.StableDiffusion, drawn: list[Image.Image]) -> None:
    """Fewer steps must be farther from the result of many steps, and one step alone must be blurred."""
    exact = draw(sd, SIX, num_inference_steps=40)
    errors, sharp = [], []
    for steps in (20, 10, 4, 1):
        made = drawn[:6] if steps == 10 else draw(sd, SIX, num_inference_steps=steps)
        errors.append(np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(made, exact, strict=True)]))
        sharp.append(np.mean([np.abs(np.diff(pixels(image), axis=1)).mean() for image in made]))
    assert errors == sorted(errors)
    assert sharp[-1] < 0.9 * sharp[0]


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 40), ("dpm++2m", 10)])
def test_samplers_agree_on_what_is_drawn(sd: sdkit.StableDiffusion, sampler: str, steps: int) -> None:
    made = draw(sd, SIX, sampler=sampler, num_inference_steps=steps)
    assert found(made, SIX) >= 5


def test_seeds_show_the_same_object(sd: sdkit.StableDiffusion) -> None:
    others = draw(sd, SIX, seed=range(100, 106))
    assert found(others, SIX) == 6
