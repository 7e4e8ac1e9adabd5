"""Image to image: against diffusers' pipeline; and inversion."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sdkit
from sdkit import images
from sdkit.errors import SdkitError
from sdkit.pipelines.image_to_image import for_each_image, last_steps, read_images, resized
from tests.helpers.networks import diffusers_pipeline, sd_shaped

PROMPTS = ["a red apple on a blue background", "a cat"]
NEGATIVES = ["blue", ""]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def pixels(n: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Random smooth images (n, 3, H, W) in [-1, 1]."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(-1, 1)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def both(sd: sdkit.StableDiffusion, request: pytest.FixtureRequest) -> tuple[sdkit.StableDiffusion, Any]:
    """A small random model as sdkit's, and as diffusers' image-to-image pipeline."""
    ours, scheduler = sd_shaped(sd.text, prediction_type=request.param)
    return ours, diffusers_pipeline(ours, scheduler, "StableDiffusionImg2ImgPipeline")


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_latents_are_those_of_diffusers(both: tuple[sdkit.StableDiffusion, Any], strength: float, eta: float) -> None:
    ours, pipe = both
    common = {"negative_prompt": NEGATIVES, "num_inference_steps": 10, "guidance_scale": 5.0, "eta": eta}
    image = pixels(2, 64, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipe(
            PROMPTS, image=image, strength=strength, generator=seeds(3, 4), output_type="latent", **common
        ).images
    z = ours(PROMPTS, image=image, strength=strength, seed=3, output_type="latent", **common)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


def test_a_pil_image_gives_the_image_of_diffusers(both: tuple[sdkit.StableDiffusion, Any]) -> None:
    ours, pipe = both
    (image,) = images.to_pil(pixels(1))
    common = {"image": image, "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe("a cat", generator=seeds(7), **common).images
    assert np.abs(ours("a cat", seed=7, **common) - expected * 255).max() <= 1


@pytest.mark.parametrize(
    ("n", "strength", "kept"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.01, 1), (100, 0.29, 29), (30, 0.99, 30), (1, 0.3, 1), (7, 0.5, 4)],
)
def test_steps_that_are_kept(n: int, strength: float, kept: int) -> None:
    """diffusers keeps int(100 * 0.29) = 28 steps, and none of 10 at strength 0.01."""
    pairs = sdkit.NoiseSchedule.scaled_linear().timesteps(n)
    assert last_steps(pairs, strength) == pairs[-kept:]


def test_evaluations_are_those_of_the_steps_that_are_kept(sd: sdkit.StableDiffusion) -> None:
    image, sizes = pixels(1, 128, 128), list[int]()
    with sd.unet.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        sd(PROMPTS, image=image, strength=0.3, num_inference_steps=10)
        sd(PROMPTS, image=image, strength=0.3, num_inference_steps=10, guidance_scale=1)
    assert sizes == [4] * 3 + [2] * 3


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("dpm++2m", 0.0)])
def test_an_image_is_the_same_alone_and_in_a_batch(sd: sdkit.StableDiffusion, sampler: str, eta: float) -> None:
    pictures = pixels(2, 64, 80)
    common = {"strength": 0.6, "sampler": sampler, "eta": eta, "num_inference_steps": 5, "output_type": "latent"}
    batch = sd(PROMPTS, image=pictures, num_images_per_prompt=2, seed=5, **common)
    for i in range(4):
        alone = sd(PROMPTS[i // 2], image=pictures[i // 2], seed=5 + i, **common)
        torch.testing.assert_close(alone[0], batch[i], atol=1e-5, rtol=0)
    split = sd(PROMPTS, image=pictures, num_images_per_prompt=2, seed=5, batch_size=1, **common)
    torch.testing.assert_close(split, batch, atol=1e-5, rtol=0)


def test_at_zero_terminal_snr_full_strength_forgets_the_image(sd: sdkit.StableDiffusion) -> None:
    common = {"latents": torch.randn(1, 4, 16, 16), "strength": 1.0, "num_inference_steps": 3, "output_type": "latent"}
    first, second = (sd("a cat", image=pixels(1, 128, 128, seed), **common) for seed in (0, 1))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert (sd("a cat", image=pixels(1, 128, 128), **common | {"strength": 0.6}) - first).abs().max() > 0.1


def test_strength_is_08_unless_given(sd: sdkit.StableDiffusion) -> None:
    common = {"image": pixels(1), "num_inference_steps": 5, "output_type": "latent"}
    assert torch.equal(sd("a cat", **common), sd("a cat", strength=0.8, **common))


@pytest.mark.parametrize("size", [(64, 64), (50, 43), (8, 8)], ids=str)
def test_the_size_is_the_images_own_or_the_one_given(
    sd: sdkit.StableDiffusion, tmp_path: Path, size: tuple[int, int]
) -> None:
    common: dict[str, Any] = {"num_inference_steps": 2, "strength": 0.5}
    (image,) = images.to_pil(pixels(1, *size))
    image.save(tmp_path / "image.png")
    for given in (image, np.asarray(image), str(tmp_path / "image.png"), tmp_path / "image.png", pixels(1, *size)):
        (drawn,) = sd("a cat", image=given, **common)
        assert (drawn.height, drawn.width) == size
    (drawn,) = sd("a cat", image=image, height=24, width=40, **common)
    assert drawn.size == (40, 24)
    shrunk = image.resize((40, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(drawn), np.asarray(sd("a cat", image=shrunk, **common)[0]))


def test_helpers() -> None:
    x = pixels(2, 16, 24)
    assert resized(x, (16, 24)) is x
    assert torch.equal(for_each_image(x, 2, 2), x[[0, 0, 1, 1]])
    assert torch.equal(for_each_image(x[:1], 2, 2), x[[0, 0, 0, 0]])
    assert torch.equal(read_images([x[0], x[1:]], 2), x)


IMAGE = torch.zeros(1, 3, 16, 16)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"image": IMAGE, "strength": 0}, sdkit.ArgumentError, "strength must be above 0"),
    ({"image": IMAGE, "strength": 1.5}, sdkit.ArgumentError, "strength must be a number from 0 to 1, not 1.5"),
    ({"image": IMAGE, "strength": -0.1}, sdkit.ArgumentError, "strength must be a number from 0 to 1"),
    ({"image": IMAGE, "strength": float("nan")}, sdkit.ArgumentError, "strength must be a number from 0 to 1"),
    ({"image": IMAGE, "strength": "0.5"}, sdkit.ArgumentError, "strength must be a number from 0 to 1"),
    ({"strength": 0.5}, sdkit.ArgumentError, "strength belongs to an image to start from"),
    ({"image": "missing.png"}, sdkit.ImageError, "missing.png"),
    ({"image": 3}, sdkit.ImageError, "no image"),
    ({"image": []}, sdkit.ImageError, "empty"),
    ({"image": torch.zeros(1, 4, 16, 16)}, sdkit.ImageError, "shape (1, 4, 16, 16)"),
    ({"image": torch.full((3, 16, 16), 200.0)}, sdkit.ImageError, "outside [-1, 1]"),
    ({"image": torch.zeros(3, 16, 7)}, sdkit.ImageError, "its width must be a whole number from 8 to 16384, not 7"),
    ({"image": torch.zeros(2, 3, 16, 16)}, sdkit.ArgumentError, "2 images cannot serve 1 prompts"),
    (
        {"prompt": ["a", "b"], "image": [IMAGE, torch.zeros(3, 16, 24)]},
        sdkit.ArgumentError,
        "differ in size: 16 x 16 and 24 x 16 pixels",
    ),
    ({"image": IMAGE, "height": 7}, sdkit.ArgumentError, "height must be a whole number from 8"),
    ({"image": IMAGE, "height": 0}, sdkit.ArgumentError, "height must be a whole number from 8"),
    ({"image": IMAGE, "latents": torch.zeros(1, 4, 4, 4)}, sdkit.ArgumentError, "of shape (1, 4, 2, 2)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(sd: sdkit.StableDiffusion, case: int) -> None:
    arguments, kind, fragment = BAD[case]
    with pytest.raises(kind) as caught:
        sd(**{"prompt": "a", "num_inference_steps": 2, **arguments})
    message = str(caught.value)
    assert fragment in message
    assert "\n" not in message
    assert message.endswith(".")


class TestInversion:
    PROMPT = "a large 3d cat on a red background"

    def test_the_noise_draws_the_image_again(self, sd: sdkit.StableDiffusion) -> None:
        """As close to the VAE's own reconstruction as an image that was drawn from another seed never is."""
        options: dict[str, Any] = {"num_inference_steps": 15, "guidance_scale": 1.0}
        (image,) = sd(self.PROMPT, seed=1, guidance_scale=3)
        (expected,) = sd.vae.reconstruct(image)
        noise = sd.invert(image, self.PROMPT, **options)
        assert noise.shape == (1, 4, 16, 16)
        (again,) = sd(self.PROMPT, latents=noise, **options)
        (other,) = sd(self.PROMPT, seed=2, **options)
        assert decibels(again, expected) > max(36, decibels(other, expected) + 3)
        (plain,) = sd(self.PROMPT, latents=sd.invert(image, self.PROMPT, iterations=1, **options), **options)
        assert decibels(plain, expected) < decibels(again, expected)

    def test_evaluations_are_counted(self, sd: sdkit.StableDiffusion) -> None:
        sizes = list[int]()
        with sd.unet.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
            sd.invert(pixels(2), PROMPTS, num_inference_steps=3, iterations=2)
        assert sizes == [4] * 6

    def test_an_image_is_the_same_alone_and_in_a_batch(self, sd: sdkit.StableDiffusion) -> None:
        both = sd.invert(pixels(2), PROMPTS, num_inference_steps=2)
        for i in range(2):
            alone = sd.invert(pixels(2)[i], PROMPTS[i], num_inference_steps=2)
            torch.testing.assert_close(alone[0], both[i], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("options", "fragment"),
        [
            ({"sampler": "ddpm"}, "inversion is DDIM's"),
            ({"eta": 0.5}, "inversion is DDIM's"),
            ({"strength": 0.5}, "inversion is DDIM's"),
            ({"mask_blur": 2.0}, "inversion takes no mask"),
            ({"padding_mask_crop": 2}, "inversion takes no mask"),
            ({"iterations": 0}, "iterations must be a whole number of at least 1"),
            ({"iterations": 1.5}, "iterations must be a whole number"),
            ({"sampler": "dpm++2m"}, "inversion is DDIM's"),
            ({"guess_mode": True}, "guess_mode belongs to a ControlNet"),
            ({"num_inference_steps": 0}, "the number of steps must be a whole number from 1"),
            ({"guidance_scale": float("nan")}, "guidance scale must be a number"),
            ({"prompt": 3}, "prompt must be a string or a list of at least one string"),
            ({"prompt": ["a cat"] * 3, "image": pixels(2)}, "2 images cannot serve 3 prompts"),
            ({"image": torch.zeros(3, 7, 16)}, "its height must be a whole number from 8"),
            ({"image": "missing.png"}, "missing.png"),
            ({"image": None}, "type NoneType is no image"),
            ({"image": []}, "the list of images is empty"),
        ],
    )
    def test_bad_input(self, sd: sdkit.StableDiffusion, options: dict[str, Any], fragment: str) -> None:
        given: dict[str, Any] = {"image": pixels(1), "prompt": "a cat", "num_inference_steps": 1, **options}
        with pytest.raises(SdkitError, match=fragment) as caught:
            sd.invert(**given)
        assert "\n" not in str(caught.value)


def decibels(x: Image.Image, y: Image.Image) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(x).astype(float) - np.asarray(y)) ** 2)))
