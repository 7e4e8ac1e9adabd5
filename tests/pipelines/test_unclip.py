"""unCLIP (DALL-E 2) against diffusers' pipelines on the same weights, its seeds, and users' mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline, UnCLIPScheduler
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.diffusion.embedding_noise import sinusoids
from sdkit.diffusion.guidance import guided
from sdkit.diffusion.samplers import ddpm
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.pipelines.unclip import UnCLIP
from tests.helpers import unclip as helper
from tests.helpers.sentences import one_sentence

PROMPTS = ["a red disc", "something blue and long"]


@pytest.fixture(scope="module")
def theirs() -> StableUnCLIPPipeline:
    pipe = helper.unclip()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(theirs: StableUnCLIPPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the model of diffusers, with an image encoder."""
    folder = tmp_path_factory.mktemp("unclip")
    theirs.save_pretrained(folder)
    helper.image_encoder().save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(folder, device="cpu")


def drawn(seeds: list[int], *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return the first numbers that each seed's generator draws, a tensor of all seeds for each shape."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.stack([torch.randn(shape, generator=generator) for generator in generators]) for shape in shapes]


D, LATENTS = helper.WIDTH, (4, 4, 4)


@pytest.fixture
def given_noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes diffusers noise embeddings with this noise."""

    def give(pipe: Any, noise: Tensor) -> None:
        plain = type(pipe).noise_image_embeddings
        monkeypatch.setattr(
            pipe, "noise_image_embeddings",
            lambda image_embeds, noise_level, generator: plain(pipe, image_embeds, noise_level, noise=noise),
        )  # fmt: skip

    return give


def levels(images: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image, float) for image in images])


@pytest.mark.parametrize("noise_level", [0, 300])
def test_text_to_image_equals_diffusers(
    noise_level: int, theirs: StableUnCLIPPipeline, ours: UnCLIP, given_noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings and latents to 1e-4, from the prior's noise to the image."""
    prior_noise, eps, x_T = drawn([5, 6], (D,), (D,), LATENTS)
    given_noise(theirs, eps)
    expected = theirs(
        PROMPTS, prior_latents=prior_noise, latents=x_T, noise_level=noise_level, prior_num_inference_steps=5,
        num_inference_steps=4, prior_guidance_scale=3.0, guidance_scale=4.0, output_type="latent",
    ).images  # fmt: skip
    found: list[Tensor] = []
    monkeypatch.setattr("sdkit.pipelines.unclip.decode", lambda vae, z, size: found.append(z))
    ours(
        PROMPTS, seed=5, noise_level=noise_level, prior_num_inference_steps=5, num_inference_steps=4,
        prior_guidance_scale=3.0, guidance_scale=4.0, prior_sampler="ddim",
    )  # fmt: skip
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_variations_equal_diffusers(folder: Path, ours: UnCLIP, given_noise: Any) -> None:
    parts = {name: part for name, part in helper.unclip().components.items() if not name.startswith("prior")}
    pipe = StableUnCLIPImg2ImgPipeline(**parts, image_encoder=helper.image_encoder(), feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    image = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    eps, x_T = drawn([9, 10], (D,), LATENTS)
    given_noise(pipe, eps)
    # Pixels as CLIP's preprocessing makes them: the shorter side resized to 32 by Pillow's bicubic filter, and cropped.
    square = np.asarray(image.resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32)), np.float32)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy(((square / 255 - mean) / std).transpose(2, 0, 1)).float()[None]
    expected = pipe(
        pixels.repeat(2, 1, 1, 1), ["", ""], latents=x_T, noise_level=100, num_inference_steps=4, guidance_scale=4.0,
        height=32, width=32, output_type="np",
    ).images  # fmt: skip
    found = ours.variations(image, 2, seed=9, noise_level=100, num_inference_steps=4, guidance_scale=4.0)
    assert np.abs(levels(found) - np.round(expected * 255)).max() <= 1
    assert np.abs(levels(found)[0] - levels(found)[1]).max() > 1


def test_the_prior_equals_karlo_s_loop(ours: UnCLIP) -> None:
    """UnCLIPScheduler clips x0 and draws noise in each step; it samples as our DDPM does. Its tables are in float32,
    where 1 - alphas_cumprod[0] has an error of a thousandth; it is given those of float64.
    """
    assert ours.prior is not None
    cond, uncond = (ours.prior.text.condition(texts) for texts in (["a red disc"], [""]))
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=0.8)
    scheduler.set_timesteps(6)
    steps = scheduler.timesteps.tolist()
    schedule = NoiseSchedule.from_config({**scheduler.config, "_class_name": "UnCLIPScheduler"})
    torch.testing.assert_close(scheduler.betas.double(), schedule.betas, atol=1e-6, rtol=1e-3)
    scheduler.betas, scheduler.alphas = schedule.betas, 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    generator = torch.Generator().manual_seed(3)
    x = x_T = torch.randn(1, D, generator=generator)
    with torch.no_grad():
        for t, t_prev in zip(steps, [*steps[1:], None], strict=True):
            two = [ours.prior.network(x, t, one) for one in (uncond, cond)]
            output = two[0] + 2 * (two[1] - two[0])
            x = scheduler.step(output, t, x, prev_timestep=t_prev, generator=generator).prev_sample.float()
        assert [t for t, _ in schedule.timesteps(6)] == steps
        generator = torch.Generator().manual_seed(3)
        torch.randn(D, generator=generator)
        predict = guided(ours.prior.network, schedule, cond, uncond, 2.0)
        *_, last = ddpm(predict, x_T, schedule, schedule.timesteps(6), generators=[generator], clip_x0=schedule.clip_x0)
    torch.testing.assert_close(last.x, x, atol=1e-4, rtol=1e-4)
    assert float(x.abs().max()) <= 0.8001


def test_sinusoids_are_diffusers_s() -> None:
    found = sinusoids(torch.tensor([0, 7, 999]), 16)
    expected = get_timestep_embedding(torch.tensor([0, 7, 999]), 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_image_depends_on_its_own_seed(ours: UnCLIP) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "prior_num_inference_steps": 3, "guidance_scale": 2.0}
    both = levels(ours(PROMPTS, seed=[4, 8], **options))
    alone = levels(ours(PROMPTS[1], seed=8, **options))
    assert np.abs(both[1] - alone[0]).max() <= 1
    assert np.abs(levels(ours(PROMPTS[1], seed=9, **options)) - alone).max() > 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.02), ("fp16", 0.003)])
def test_half_precision_is_close_to_float32(folder: Path, ours: UnCLIP, dtype: str, tolerance: float) -> None:
    """Embeddings within 2 % (bfloat16) or 0.3 % (float16) of their length, and images as close in levels of 255. The
    prior's statistics and both schedules are exactly those of float32.
    """
    half = UnCLIP.from_pretrained(folder, dtype=dtype, device="cpu")
    assert ours.prior is not None
    assert half.prior is not None
    assert half.image_encoder is not None
    networks = (half.sd.vae, half.sd.text, half.sd.unet, half.image_encoder, half.prior.network, half.prior.text)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {part.dtype for part in networks} == {wanted}
    assert torch.equal(half.prior.network.network.clip_mean, ours.prior.network.network.clip_mean)
    assert half.sd.schedule.alphas_cumprod.dtype == torch.float64
    exact, rounded = (results(model) for model in (ours, half))
    for one, other in zip(exact[:2], rounded[:2], strict=True):
        assert other.dtype == torch.float32
        assert 0 < float((one - other).norm() / one.norm()) < tolerance
    assert 0 < np.abs(exact[2] - rounded[2]).mean() < 255 * tolerance


def results(model: UnCLIP) -> tuple[Tensor, Tensor, np.ndarray[Any, Any]]:
    """Return embeddings of an image, embeddings that the prior draws, and images of prompts."""
    assert model.prior is not None
    image = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    sampled = model.prior.sample(PROMPTS, seeds, num_inference_steps=3)
    drawn = model(PROMPTS, seed=5, num_inference_steps=3, prior_num_inference_steps=3)
    return model.embed_images(image), sampled, levels(drawn)


def test_interpolation_goes_from_image_to_image_along_a_circle(ours: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = (Image.new("RGB", (40, 40), colour) for colour in ("red", "navy"))
    ends = ours.embed_images([first, last])
    options: dict[str, Any] = {"num_inference_steps": 2}
    path = levels(ours.interpolate(first, last, 3, seed=2, **options))
    for k, i in ((0, 0), (2, 1)):
        assert np.abs(path[k] - levels(ours.draw(ends[i : i + 1], seed=2, **options))[0]).max() <= 1
    found: list[Tensor] = []
    monkeypatch.setattr(ours, "draw", lambda embeddings, **_: found.append(embeddings) or [])
    ours.interpolate(first, last, 5)
    a, b = (end / end.norm() for end in ends)
    unit = torch.nn.functional.normalize(found[0], dim=1)
    angles = (unit @ a).clamp(-1, 1).acos()
    torch.testing.assert_close(angles, torch.linspace(0, 1, 5) * (a @ b).acos(), atol=2e-3, rtol=0)
    torch.testing.assert_close(unit[2], torch.nn.functional.normalize(a + b, dim=0), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[0].norm(dim=1)[2], ends.norm(dim=1).mean())


# Users' mistakes


def copied(folder: Path, out: Path, *without: str) -> Path:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*without))
    return out


def test_mistakes_in_a_folder(folder: Path, tmp_path: Path) -> None:
    def load(path: Path, **options: Any) -> Any:
        return lambda: UnCLIP.from_pretrained(path, device="cpu", **options)

    def edited(name: str, file: str, **changes: Any) -> Path:
        path = copied(folder, tmp_path / name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / name

    source = sdkit.SourceError
    cases: list[tuple[Any, type[sdkit.SdkitError], str]] = [
        (load(tmp_path / "nothing"), source, "does not exist"),
        (lambda: UnCLIP.from_pretrained("emoji"), source, "give a folder or a Hub id"),
        (load(copied(folder, tmp_path / "a", "image_normalizer")), source, "has no image_normalizer/config.json"),
        (load(copied(folder, tmp_path / "b", "image_noising_scheduler")), source, "has no image_noising_scheduler"),
        (load(copied(folder, tmp_path / "c", "prior_scheduler")), source, "has no prior_scheduler"),
        (load(copied(folder, tmp_path / "d", "prior_text_encoder")), source, "has no prior_text_encoder/config.json"),
        (load(folder, prior=tmp_path / "a" / "vae"), source, "has no prior/config.json"),
        (load(edited("e", "prior/config.json", _class_name="UNet2DModel")), source, "not a PriorTransformer"),
        (load(edited("f", "prior/config.json", num_layers=100000)), source, "has num_layers 100000"),
        (load(edited("g", "prior/config.json", embedding_dim=24)), source, "do not fit the config.json beside them"),
        (load(edited("h", "prior/config.json", num_embeddings=16)), source, "do not fit the config.json beside them"),
        (load(edited("k", "prior/config.json", num_embeddings=10**5)), source, "numbers beside its weights, sdkit"),
        (load(edited("l", "image_encoder/config.json", image_size=10**6, patch_size=1)), source, "numbers beside its"),
        (load(edited("m", "prior_text_encoder/config.json", architectures=7)), source, "holds a unknown network"),
        (load(edited("i", "image_normalizer/config.json", embedding_dim=8)), source, "do not fit the config.json"),
    ]  # fmt: skip
    (copied(folder, tmp_path / "j") / "prior" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    cases.append((load(tmp_path / "j"), source, "damaged"))
    for run, error, fragment in cases:
        one_sentence(run, error, fragment)


def test_mistakes_in_a_call(folder: Path, ours: UnCLIP) -> None:
    argument = sdkit.ArgumentError
    plain = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    bare = UnCLIP(ours.sd, ours.noise)
    image, embedding = Image.new("RGB", (40, 40)), torch.zeros(1, D)
    cases: list[tuple[Any, str]] = [
        (lambda: UnCLIP(plain, ours.noise), "this U-Net takes no embedding of an image; give a decoder of unCLIP"),
        (lambda: UnCLIP(ours.sd, replace(ours.noise, mean=torch.zeros(3))), "the parts belong to different models"),
        (lambda: ours.sd("a cat"), "this U-Net takes the embedding of an image as `label`"),
        (lambda: bare("a cat"), "this model has no prior, so it draws no texts"),
        (lambda: bare.variations(image), "this model has no image encoder"),
        (lambda: ours.variations([image, image]), "variations are of one image, not of 2"),
        (lambda: ours.variations(image, 0), "n must be a whole number of at least 1, not 0"),
        (lambda: ours.interpolate(image, [image, image]), "interpolation is between two single images"),
        (lambda: ours.interpolate(image, image, 1), "n must be a whole number of at least 2, not 1"),
        (lambda: ours.draw(embedding, noise_level=1000), "noise_level must be a whole number from 0 to 999, not 1000"),
        (lambda: ours.draw(embedding, prompt=["a", "b"]), "2 prompts do not serve 1 embeddings"),
        (lambda: ours.draw(torch.zeros(1, 3)), "embeddings must be (B, 16), not (1, 3)"),
        (lambda: ours.draw(torch.zeros(0, D)), "embeddings must be a tensor (B, D) of finite numbers"),
        (lambda: ours.draw(embedding.numpy()), "embeddings must be a tensor (B, D) of finite numbers"),
        (lambda: ours.draw(embedding * torch.nan), "embeddings must be a tensor (B, D) of finite numbers"),
        (lambda: ours.draw(embedding, seed=[1, 2]), "2 seeds cannot serve 1 images"),
        (lambda: ours(3), "prompt must be a string or a list"),
        (lambda: ours("a", prior_guidance_scale="big"), "the guidance scale must be a number"),
    ]  # fmt: skip
    for run, fragment in cases:
        one_sentence(run, argument, fragment)
