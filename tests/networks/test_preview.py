"""Previews of latents: the linear map to RGB, its fit, the maps that ship, and tiny decoders."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.errors import ArgumentError
from sdkit.latents import RGBMap, fit_rgb_map, previewer, rgb_map_of
from sdkit.networks import preview
from sdkit.networks.autoencoder_kinds import PixelIdentity
from sdkit.samplers import Step
from tests.helpers.sentences import one_sentence

MAP = RGBMap(weight=((0.3, 0.1, -0.2), (0.0, 0.25, 0.1), (-0.1, 0.1, 0.1)), bias=(0.1, -0.2, 0.05))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(scale: float, channels: int = 4) -> sdkit.VAE:
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=channels, scaling_factor=scale,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return sdkit.VAE(network, name="some").eval()


def tiny(channels: int = 4) -> sdkit.VAE:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    return sdkit.VAE(AutoencoderTiny(latent_channels=channels, **widths), name="tiny").eval()


def step(x0: Tensor) -> Step:
    return Step(0, 999, torch.full_like(x0, math.nan), x0)


def test_map_equals_numpy_s() -> None:
    z = noise(2, 3, 4, 5)
    expected = np.moveaxis(z.numpy(), 1, -1) @ np.array(MAP.weight) + np.array(MAP.bias)
    assert np.allclose(MAP(z).movedim(1, -1).numpy(), expected.clip(-1, 1), atol=1e-6)
    assert MAP(z.half()).dtype == torch.float32


def test_fit_finds_the_map_that_made_the_images() -> None:
    """The images are the map of the latents, each pixel repeated over a square: averaging it gives the pixel back."""
    z = noise(4, 3, 4, 5) * 0.5
    images = MAP(z)
    assert float(images.abs().max()) < 1  # nothing was clamped
    large = images.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    found = fit_rgb_map((z[i : i + 2], large[i : i + 2]) for i in (0, 2))
    assert np.allclose(found.weight, MAP.weight, atol=1e-6)
    assert np.allclose(found.bias, MAP.bias, atol=1e-6)
    assert found.r2 == pytest.approx(1, abs=1e-9)


def test_fit_and_its_r2_equal_numpy_s_least_squares() -> None:
    z, images = noise(6, 4, 3, 3), noise(6, 3, 3, 3, seed=1).clamp(-1, 1)
    found = fit_rgb_map((z[i], images[i]) for i in ([0, 1], [2], [3, 4, 5]))
    inputs = np.moveaxis(z.double().numpy(), 1, -1).reshape(-1, 4)
    inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    targets = np.moveaxis(images.double().numpy(), 1, -1).reshape(-1, 3)
    solution, residuals, _, _ = np.linalg.lstsq(inputs, targets, rcond=None)
    assert np.allclose([*found.weight, found.bias], solution, atol=1e-9)
    assert found.r2 == pytest.approx(1 - residuals.sum() / ((targets - targets.mean(0)) ** 2).sum(), abs=1e-9)


def test_fit_of_channels_that_repeat_each_other_is_finite() -> None:
    z = noise(3, 1, 4, 4).expand(-1, 2, -1, -1)
    images = (z[:, :1] / 4).clamp(-1, 1).expand(-1, 3, -1, -1)
    found = fit_rgb_map([(z, images)])
    assert np.isfinite(found.weight).all()
    assert torch.allclose(found(z), images, atol=0.1)


def test_r2_of_equal_images_is_unknown() -> None:
    assert fit_rgb_map([(noise(1, 4, 2, 2), torch.zeros(1, 3, 16, 16))]).r2 is None


class TestMapsThatShip:
    def test_each_vae_has_its_own(self, sd: sdkit.StableDiffusion) -> None:
        assert rgb_map_of(sd.vae) is preview.EMOJI
        assert rgb_map_of(kl(0.18215)) is preview.SD1
        assert rgb_map_of(sdkit.VAE(PixelIdentity(), name="pixels")) is preview.PIXELS

    def test_of_the_embedded_model_fits_its_pictures(self, sd: sdkit.StableDiffusion) -> None:
        """Its squared error is less than twice that of the best linear map for these very pictures. SD's map is a
        control.
        """
        prompts = [
            "a 3d red apple on a yellow background", "a flat panda on a green background",
            "a noto rocket on a white background", "a twemoji cat on a blue background",
        ]  # fmt: skip
        z = sd(prompts, num_inference_steps=10, output_type="latent")
        images = sd.vae.decode(z, output_type="pt")
        small = torch.nn.functional.avg_pool2d(images, 8)
        best = fit_rgb_map([(z, images)])
        errors = [float((one(z) - small).square().mean()) for one in (best, preview.EMOJI, preview.SD1)]
        assert errors[0] <= errors[1] < 2 * errors[0]
        assert errors[2] > 5 * errors[1]

    def test_pixels_are_their_own_preview(self) -> None:
        x = noise(1, 3, 5, 4).clamp(-1, 1)
        assert torch.equal(preview.PIXELS(x), x)


class TestPreviewer:
    def test_shows_x0_at_the_image_s_size(self) -> None:
        z = torch.zeros(1, 4, 3, 2)
        z[:, 0] = 2.0
        image = previewer(kl(0.18215))(step(z))
        expected = np.round((2 * np.array(preview.SD1.weight[0]) + 1) * 127.5)
        assert image.size == (16, 24)
        assert np.array_equal(np.asarray(image)[12, 8], expected)

    def test_a_batch_is_a_grid(self) -> None:
        image = previewer(kl(0.18215))(step(noise(4, 4, 2, 2)))
        assert image.size == (32, 32)

    def test_a_map_of_one_s_own(self) -> None:
        own = RGBMap(weight=((0.0, 0.0, 0.0),) * 4, bias=(1.0, -1.0, 0.0))
        assert previewer(kl(0.5), own)(step(noise(1, 4, 1, 1))).getpixel((0, 0)) == (255, 0, 128)

    def test_tiny_autoencoder_decodes(self) -> None:
        small = tiny()
        z = noise(2, 4, 2, 2)
        left, right = small.decode(z)
        sheet = previewer(kl(0.18215), small)(step(z))
        assert sheet.size == (32, 16)
        assert np.array_equal(np.asarray(sheet), np.hstack([np.asarray(left), np.asarray(right)]))

    def test_as_the_callback_of_a_pipeline(self, sd: sdkit.StableDiffusion) -> None:
        """The last prediction of the clean image is the image; each preview is closer to it than the first."""
        show = previewer(sd.vae)
        seen: list[Image.Image] = []
        (image,) = sd(
            "a red apple on a blue background", num_inference_steps=8, callback=lambda step: seen.append(show(step))
        )
        errors = [float(sdkit.metrics.psnr(one, image)) for one in seen]
        assert len(errors) == 8
        assert errors[-1] > errors[0] + 1
        assert errors[-1] > 18


VAE4 = kl(0.5)
Z = torch.zeros(2, 4, 2, 2)


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: previewer(VAE4), "no preview ships for the VAE of 'some'"),
        (lambda: previewer(kl(0.18215, channels=8)), "no preview ships"),
        (lambda: previewer(VAE4, tiny(channels=8)), "decodes latents of 8 channels and 8 pixels a side"),
        (lambda: MAP(Z), "takes latents (B, 3, h, w), not (2, 4, 2, 2)"),
        (lambda: MAP(Z[0, :3]), "takes latents (B, 3, h, w)"),
        (lambda: fit_rgb_map([]), "no pairs of latents and images"),
        (
            lambda: fit_rgb_map([(Z, torch.zeros(3, 3, 16, 16))]),
            "3 image(s) need latents (3, C, h, w), not (2",
        ),
        (lambda: fit_rgb_map([(Z[0], torch.zeros(1, 3, 16, 16))]), "1 image(s) need latents"),
        (lambda: fit_rgb_map([(Z / 0, torch.zeros(2, 3, 16, 16))]), "must be finite numbers"),
        (
            lambda: fit_rgb_map([(Z, torch.zeros(2, 3, 16, 16)), (Z[:, :3], torch.zeros(2, 3, 16, 16))]),
            "differ in their channels",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: Any, fragment: str) -> None:
    one_sentence(call, ArgumentError, fragment)
