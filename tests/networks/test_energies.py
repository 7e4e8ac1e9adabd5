"""Energies: against NumPy and CLIP's scores, by finite differences, and under guidance of the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError, ImageError
from sdkit.evaluation.extractors import open_extractor
from sdkit.guidance import Energy, guided, image_energy, style_energy, text_energy
from sdkit.guidance import energy as guided_by
from sdkit.networks.clip import CLIP
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.steps import denoise
from tests.helpers import clip as tiny_clip
from tests.helpers.sentences import one_sentence

SIDE = 32


def picture(seed: int, side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def images(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def same(x: Tensor) -> Tensor:
    """Turn x0 into pixels, where x0 is pixels."""
    return x


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> CLIP:
    return CLIP.from_pretrained(clip_folder, device="cpu")


@pytest.fixture(scope="module")
def alex() -> LPIPS:
    return LPIPS.from_pretrained("alex")


def test_text_is_one_minus_the_cosine_of_clip(clip_folder: Path, clip: CLIP) -> None:
    """The extractor of CLIP scores reads 8-bit images of CLIP's own side, which nothing resizes."""
    extractor = open_extractor(f"clip:{clip_folder}", device="cpu")
    drawn = [picture(1), picture(2)]
    texts = ["a red apple", "a blue cat"]
    found = text_energy(clip, texts, same)(torch.stack(sdkit.images.to_tensors(drawn)))
    cosines = torch.cosine_similarity(extractor(drawn), extractor.embed_texts(texts))
    found = found.detach()
    torch.testing.assert_close(found, 1 - cosines, atol=1e-5, rtol=0)
    assert abs(float(found[0] - found[1])) > 1e-3


def test_style_is_equations_4_and_5_of_gatys(alex: LPIPS) -> None:
    """E_l = sum_ij (G_ij - A_ij)^2 / (4 N^2 M^2) with G = F F^T, in NumPy, for a reference of the same size."""
    drawn, reference = images(2), picture(3)
    found = style_energy(reference, same, lpips=alex)(drawn)
    theirs = alex.activations(sdkit.images.to_tensors(reference)[0][None])
    for i in range(2):
        losses = []
        for h, a in zip(alex.activations(drawn[i : i + 1]), theirs, strict=True):
            f, g = (x[0].flatten(1).double().numpy() for x in (h, a))
            (n, m) = f.shape
            losses.append(((f @ f.T - g @ g.T) ** 2).sum() / (4 * n**2 * m**2))
        assert float(found[i]) == pytest.approx(np.mean(losses), rel=1e-4)
    itself = style_energy(reference, same, lpips=alex)(torch.stack(sdkit.images.to_tensors(reference)))
    assert float(itself) < 1e-9
    larger = style_energy(picture(3, 96), same, lpips=alex)(drawn)
    assert larger.shape == (2,)


def test_a_reference_is_the_squared_error_or_lpips(alex: LPIPS) -> None:
    drawn, both = images(2), [picture(4), picture(5)]
    wanted = torch.stack(sdkit.images.to_tensors(both))
    torch.testing.assert_close(image_energy(both, same)(drawn), (drawn - wanted).square().flatten(1).mean(1))
    torch.testing.assert_close(
        image_energy(both[0], same, lpips=alex)(drawn), alex(drawn, wanted[:1].expand(2, -1, -1, -1))
    )


@pytest.mark.parametrize("kind", ["text", "style", "lpips", "squares"])
def test_gradients_are_finite_differences(kind: str, clip_folder: Path) -> None:
    """Central differences along four random directions of each of two images."""
    lpips = LPIPS.from_pretrained("alex").double()
    energies: dict[str, Callable[[], Energy]] = {
        "text": lambda: text_energy(
            CLIP.from_pretrained(clip_folder, device="cpu").double(), ["a cat", "a red apple"], same
        ),
        "style": lambda: style_energy(picture(6), same, lpips=lpips),
        "lpips": lambda: image_energy(picture(6), same, lpips=lpips),
        "squares": lambda: image_energy(picture(6), same),
    }  # fmt: skip
    energy, h = energies[kind](), 1e-3 if kind == "text" else 1e-6  # embeddings of CLIP are float32
    x = images(2, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(4):
            d = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            numeric = (energy(x + h * d) - energy(x - h * d)) / (2 * h)
            torch.testing.assert_close(
                (gradient * d).sum((1, 2, 3)), numeric, rtol=1e-4, atol=3e-5 if kind == "text" else 1e-7
            )
    assert float(gradient.abs().max()) > 1e-6


def test_energies_fall_under_guidance_of_the_embedded_model(clip: CLIP, alex: LPIPS) -> None:
    """In one step, a small scale must lower the energy of a text or a style, and its opposite raise it. Over a whole
    drawing from the same noise, the final image must be much nearer to the reference than without guidance."""
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    sd.unet.requires_grad_(False)
    sd.vae.requires_grad_(False)
    (reference,) = sd("a star", seed=9, num_inference_steps=6, height=64, width=64)
    cond, uncond = (Conditioning(one) for one in sd.text.encode(["a red apple", ""]).split(1))
    plain = guided(sd.unet, sd.schedule, cond, uncond, scale=1.0)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    squares = image_energy(reference, sd.vae.pixels)
    energies = {
        "text": text_energy(clip, "a blue cat", sd.vae.pixels),
        "style": style_energy(reference, sd.vae.pixels, lpips=alex),
    }
    for name, one in energies.items():
        found = []
        for scale in (0.0, STEP[name], -STEP[name]):
            with torch.no_grad():
                found.append(float(one(guided_by(plain, one, sd.schedule, scale)(x_T, 874).x0)))
        assert found[1] < found[0] < found[2], (name, found)
    drawn = []
    for scale in (0.0, 3.0):
        with torch.no_grad():
            predict = guided_by(plain, squares, sd.schedule, scale)
            z = denoise(predict, x_T, sd.schedule, sd.schedule.timesteps(8))
            drawn.append(float(squares(z)))
    assert drawn[1] < 0.3 * drawn[0]


STEP = {"text": 30.0, "style": 0.03}
"""Scales that are small enough for one step to be nearly linear."""


def test_bad_input(clip: CLIP, alex: LPIPS) -> None:
    x = images(3)
    for run, kind, fragment in (
        (lambda: text_energy(clip, [], same), ArgumentError, "prompts"),
        (lambda: text_energy(clip, ["a", "b"], same)(x), ArgumentError, "2 prompts cannot serve 3 images"),
        (
            lambda: style_energy([picture(1)] * 2, same, lpips=alex),
            ArgumentError,
            "a style is that of one image, not of",
        ),
        (lambda: style_energy(picture(1, 8), same, lpips=alex), ImageError, "LPIPS needs images"),
        (lambda: image_energy(picture(1, 16), same)(x), ArgumentError, "the reference must have 32 x 32 pixels"),
        (lambda: image_energy([picture(1)] * 2, same)(x), ArgumentError, "2 references cannot serve 3 images"),
    ):
        one_sentence(run, kind, fragment)
