"""Upsamplers and cascades: against diffusers' `StableDiffusionUpscalePipeline`, seeds, sizes, and bad input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError
from sdkit.loading.source import Source
from sdkit.networks.concatenation import noised_low_res, widen
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.upsampler(tmp_path_factory.mktemp("x4"))


@pytest.fixture(scope="module")
def ours(folder: Path) -> sdkit.StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: sdkit.StableDiffusion) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionUpscalePipeline(
            vae=ours.vae.network, text_encoder=ours.text.network, tokenizer=ours.text.tokenizer,
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            low_res_scheduler=DDPMScheduler.from_pretrained(folder / "low_res_scheduler"),
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small(n: int = 1) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("level", [0, 20, 350])
def test_latents_are_those_of_diffusers(ours: sdkit.StableDiffusion, theirs: Any, scale: float, level: int) -> None:
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(9))
    common: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": scale, "noise_level": level}
    found = ours("a red disc", "a cat", condition=small(), latents=noise, seed=3, output_type="latent", **common)
    generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(
            "a red disc", negative_prompt="a cat", image=small(), latents=noise, generator=generator,
            output_type="latent", **common,
        ).images  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_noise_comes_first_from_the_seed_and_levels_matter(ours: sdkit.StableDiffusion) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, 16, 24, generator=generator)
    x_T = torch.randn(1, 4, 16, 24, generator=generator)
    drawn = ours("a", condition=small(), seed=5, **options)
    torch.testing.assert_close(drawn, ours("a", condition=small(), seed=5, latents=x_T, **options))
    assert torch.equal(drawn, ours("a", condition=small(), seed=5, noise_level=20, **options))
    assert not torch.allclose(drawn, ours("a", condition=small(), seed=5, noise_level=300, **options))
    both = ours(["a", "b"], condition=small(2), seed=[8, 5], **options)
    alone = ours("b", condition=small(2)[1:], seed=5, **options)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_images_are_larger_by_the_factor(ours: sdkit.StableDiffusion) -> None:
    assert ours.upscale_factor == 4
    (image,) = ours("a", condition=small(), num_inference_steps=1)
    assert image.size == (96, 64)
    (image,) = ours("a", condition=small(), num_inference_steps=1, height=32, width=32)
    assert image.size == (32, 32)


def test_what_is_read_is_the_noised_image_enlarged() -> None:
    """x_s = sqrt(a) x + sqrt(1 - a) eps, then bilinear interpolation with pixel centres, in NumPy."""
    schedule = NoiseSchedule.linear()
    generator = torch.Generator().manual_seed(0)
    low, eps = torch.randn(2, 3, 2, 2, generator=generator), torch.randn(2, 3, 2, 2, generator=generator)
    levels = torch.tensor([10, 500])
    a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[levels.numpy()].reshape(2, 1, 1, 1)
    noised = np.sqrt(a) * low.numpy() + np.sqrt(1 - a) * eps.numpy()
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # centres of 4 pixels among those of 2
    expected = np.einsum("yi,bcij,xj->bcyx", weights, noised, weights)
    np.testing.assert_allclose(noised_low_res(low, levels, eps, schedule, (4, 4)), expected, atol=1e-5)
    np.testing.assert_allclose(noised_low_res(low, levels, eps, schedule, (2, 2)), noised, atol=1e-6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> sdkit.StableDiffusion:
    folder = tiny.model(tmp_path_factory.mktemp("base"))
    return sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")


def test_a_widened_network_computes_what_it_did(base: sdkit.StableDiffusion) -> None:
    network = tiny.networks((16, 16), unet={"block_out_channels": (16, 32), **tiny.TWO_LEVELS}).unet
    x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        before = network(x_t, 7, text).sample
        widen(network, "low_res", upscale_factor=16)
        unet = sdkit.UNet(network)
        cond = sdkit.guidance.Conditioning(text, concat=torch.randn(2, 3, 8, 8), label=torch.tensor([0, 400]))
        torch.testing.assert_close(unet(x_t, 7, cond), before)
    assert (unet.condition, unet.channels, unet.input_channels, unet.upscale_factor) == ("low_res", 4, 7, 16)


class TestCascade:
    OPTIONS: Any = ({"height": 16, "width": 16}, {"noise_level": 5})

    def test_is_the_models_one_after_another(self, base: sdkit.StableDiffusion, ours: sdkit.StableDiffusion) -> None:
        """Each upsampler starts from a seed that is drawn from the image's own."""
        cascade = sdkit.Cascade([base, ours])
        common: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
        drawn = cascade("a cat", seed=4, num_images_per_prompt=2, options=self.OPTIONS, **common)
        assert drawn.shape == (2, 3, 64, 64)
        first = base(["a cat"] * 2, seed=[4, 5], height=16, width=16, **common)
        seeds = [int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed))) for seed in (4, 5)]
        second = ours(["a cat"] * 2, seed=seeds, condition=first, noise_level=5, **common)
        assert torch.equal(drawn, second)
        alone: Tensor = cascade("a cat", seed=5, options=self.OPTIONS, **common)
        torch.testing.assert_close(drawn[1:], alone, atol=1e-4, rtol=1e-4)

    def test_three_models(self, base: sdkit.StableDiffusion, ours: sdkit.StableDiffusion) -> None:
        options = [{"height": 8, "width": 8}, {}, {}]
        (image,) = sdkit.Cascade([base, ours, ours])("a", "b", options=options, num_inference_steps=1)
        assert image.size == (128, 128)

    def test_bad_input(self, base: sdkit.StableDiffusion, ours: sdkit.StableDiffusion) -> None:
        cascade = sdkit.Cascade([base, ours])
        for run, fragment in (
            (lambda: sdkit.Cascade([base]), "a cascade has a base model and at least one upsampler; give both"),
            (lambda: sdkit.Cascade([]), "a cascade has a base model and at least one upsampler; give both"),
            (lambda: sdkit.Cascade([ours, ours]), "the first model of a cascade draws from the prompt alone"),
            (lambda: sdkit.Cascade([base, ours, base]), "model 3 of the cascade is no upsampler"),
            (lambda: cascade("a", options=[{}]), "1 options cannot serve 2 stages: give one mapping for each"),
            (lambda: sdkit.Cascade([base, "up"]), "the models of a cascade are sdkit.StableDiffusion, not str"),  # type: ignore[list-item]
            (lambda: cascade("a", options=[{}, {"seed": 3}]), "seed is the same for all stages, or made by the"),
            (lambda: cascade("a", seed=[1, 2]), "2 seeds cannot serve 1 images"),
            (lambda: cascade("a", output_type="latent"), "output_type 'latent' is not one of"),
            (lambda: cascade("a", noise_level=3), "noise_level belongs to an upsampler, and this model is none"),
        ):
            one_sentence(run, ArgumentError, fragment)


def test_bad_input_of_an_upsampler(base: sdkit.StableDiffusion, ours: sdkit.StableDiffusion, folder: Path) -> None:
    for run, fragment in (
        (lambda: ours("a"), "this model draws from an image: give one as condition"),
        (lambda: ours("a", condition=small(), noise_level=1000), "noise_level must be a whole number from 0 to 999"),
        (lambda: ours("a", condition=small(), noise_level=-1), "noise_level must be a whole number from 0 to 999"),
        (lambda: ours("a", condition=small(), height=66), "draws images whose sides divide by 4, not 96 x 66"),
        (lambda: base("a", noise_level=3), "noise_level belongs to an upsampler, and this model is none"),
        (lambda: ours.unet(torch.zeros(1, 4, 8, 8), 1, sdkit.guidance.Conditioning(
            torch.zeros(1, 4, 16), concat=torch.zeros(1, 3, 8, 8))), "takes the noise level of the image to enlarge"),
    ):  # fmt: skip
        one_sentence(run, ArgumentError, fragment)
    one_sentence(lambda: Source.open(folder).denoiser(), sdkit.SourceError, "looks like an upscaler (7 input channels)")
