"""Conditions by concatenation, against diffusers' StableDiffusionInstructPix2PixPipeline."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import sdkit
from sdkit.cli import main
from sdkit.diffusion.guidance import APG
from sdkit.loading.source import Source
from sdkit.networks.concatenation import map_of, widen
from sdkit.pipelines.concatenation import told
from tests.helpers import original_layout, tiny
from tests.helpers.networks import control_network, diffusers_pipeline, guided_network, sd_shaped

SIZE = 64
PROMPTS = ["make it red", "a cat"]


@pytest.fixture(scope="module")
def edits(sd: sdkit.StableDiffusion) -> tuple[sdkit.StableDiffusion, Any]:
    """An 8-channel model with random weights, and diffusers' pipeline of the same networks."""
    ours, scheduler = sd_shaped(sd.text, 8)
    return ours, diffusers_pipeline(ours, scheduler, "StableDiffusionInstructPix2PixPipeline")


@pytest.fixture(scope="module")
def maps(sd: sdkit.StableDiffusion) -> sdkit.StableDiffusion:
    """A model that reads colours beside x_t, with random weights."""
    plain, _ = sd_shaped(sd.text)
    torch.manual_seed(1)
    network = copy.deepcopy(plain.unet.network)
    widen(network, "map")
    torch.nn.init.normal_(network.conv_in.weight, std=0.1)
    return sdkit.StableDiffusion(plain.vae, plain.text, sdkit.UNet(network), plain.schedule)


def pictures(n: int, width: int = SIZE, height: int = SIZE) -> list[Image.Image]:
    levels = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in levels]


def theirs(pipe: Any, images: list[Image.Image], **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = [torch.Generator().manual_seed(seed) for seed in range(3, 3 + len(images))]
        latents: Tensor = pipe(PROMPTS, image=images, generator=generator, output_type="latent", **options).images
    return latents


SCALES: list[dict[str, Any]] = [
    {"guidance_scale": 7.5, "image_guidance_scale": 1.5},
    {"guidance_scale": 3.0, "image_guidance_scale": 4.0, "negative_prompt": ["bad", "ugly"]},
    {"guidance_scale": 5.0, "image_guidance_scale": 1.0},
    {"guidance_scale": 1.0, "image_guidance_scale": 1.0},
]


@pytest.mark.parametrize("options", SCALES, ids=str)
def test_latents_are_those_of_diffusers(edits: tuple[sdkit.StableDiffusion, Any], options: dict[str, Any]) -> None:
    ours, pipe = edits
    expected = theirs(pipe, pictures(2), num_inference_steps=5, **options)
    z = ours(PROMPTS, condition=pictures(2), seed=3, num_inference_steps=5, output_type="latent", **options)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    other = ours(PROMPTS, condition=pictures(3)[:2], seed=3, num_inference_steps=5, output_type="latent", **options)
    assert (z - other).abs().max() > 1e-2


def test_an_image_that_is_resized_is_that_of_diffusers(edits: tuple[sdkit.StableDiffusion, Any]) -> None:
    ours, pipe = edits
    small = pictures(2, 24, 40)
    expected = theirs(pipe, [one.resize((64, 72), Image.Resampling.LANCZOS) for one in small], num_inference_steps=2)
    options = {"image_guidance_scale": 1.5, "guidance_scale": 7.5, "num_inference_steps": 2}
    z = ours(PROMPTS, condition=small, width=64, height=72, seed=3, output_type="latent", **options)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


def test_image_scale_alone_is_equation_3(edits: tuple[sdkit.StableDiffusion, Any]) -> None:
    """diffusers turns guidance off at guidance_scale 1; the paper does not. One step is compared with the formula."""
    ours, _ = edits
    steps: list[sdkit.Step] = []
    options: dict[str, Any] = {"num_inference_steps": 1, "seed": 3, "output_type": "latent", "guidance_scale": 1.0}
    ours("a cat", condition=pictures(1), image_guidance_scale=2.0, callback=steps.append, **options)
    x_T = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))[None]
    t = ours.schedule.timesteps(1)[0][0]
    latent = ours.vae.moments(pictures(1))[0]
    text = ours.text.encode(["a cat", ""])
    with torch.no_grad():
        both, image, neither = (
            ours.unet.network(torch.cat([x_T, beside], dim=1), t, encoder_hidden_states=row[None]).sample
            for row, beside in ((text[0], latent), (text[1], latent), (text[1], torch.zeros_like(latent)))
        )
    eps = neither + 2 * (image - neither) + (both - image)
    a = ours.schedule.alpha_cumprod(t)
    x0 = (x_T - (1 - a) ** 0.5 * eps) / a**0.5
    torch.testing.assert_close(steps[0].x0, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_scale": 3.0}, 2),
        ({"guidance_scale": 3.0, "image_guidance_scale": 1.5}, 3),
        ({"guidance_scale": 1.0, "image_guidance_scale": 1.5}, 3),  # equation 3 needs all three
        ({"guidance_scale": 3.0, "image_guidance_scale": 1.5, "guidance_interval": (0.0, 1e-6)}, 1),
    ],
    ids=str,
)
def test_evaluations(maps: sdkit.StableDiffusion, options: dict[str, Any], rows: int) -> None:
    sizes = list[int]()
    with maps.unet.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        maps(PROMPTS, condition=pictures(1), num_inference_steps=3, output_type="latent", **options)
    assert sizes == [2 * rows] * 3


@pytest.mark.parametrize("kind", ["latents", "map"])
def test_a_widened_model_draws_as_before(sd: sdkit.StableDiffusion, kind: str) -> None:
    """Its new weights are zero, so that no condition changes anything."""
    plain, _ = sd_shaped(sd.text)
    network = copy.deepcopy(plain.unet.network)
    widen(network, kind)
    assert network.config.in_channels == {"latents": 8, "map": 7}[kind]
    wide = sdkit.StableDiffusion(plain.vae, plain.text, sdkit.UNet(network), plain.schedule)
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    before = plain(PROMPTS, **options, height=SIZE, width=SIZE)
    after = wide(PROMPTS, condition=pictures(2), **options)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    more = wide(PROMPTS, condition=pictures(2), image_guidance_scale=3.0, **options)
    torch.testing.assert_close(more, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["latents", "map"])
def test_an_image_is_the_same_alone_and_in_a_batch(
    edits: tuple[sdkit.StableDiffusion, Any], maps: sdkit.StableDiffusion, kind: str
) -> None:
    model = edits[0] if kind == "latents" else maps
    options: dict[str, Any] = {
        "num_inference_steps": 3, "eta": 0.5, "output_type": "latent", "guidance_scale": 1.5,
        "image_guidance_scale": 1.2,
    }  # fmt: skip
    batch = model(PROMPTS, condition=pictures(2), num_images_per_prompt=2, seed=5, **options)
    for i in range(4):
        alone = model(PROMPTS[i // 2], condition=pictures(2)[i // 2], seed=5 + i, **options)
        torch.testing.assert_close(alone[0], batch[i], atol=3e-5, rtol=0)
    shared = model(PROMPTS, condition=pictures(1), seed=5, **options)
    apart = model(PROMPTS, condition=pictures(1) * 2, seed=5, **options)
    assert torch.equal(shared, apart)


def test_a_map_is_the_mean_of_each_block(maps: sdkit.StableDiffusion) -> None:
    pixels = torch.rand(2, 3, 21, 16) * 2 - 1
    padded = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, 3, -1)], dim=2)
    expected = padded.unflatten(3, (2, 8)).unflatten(2, (3, 8)).mean((3, 5))
    torch.testing.assert_close(map_of(pixels, 8), expected)
    torch.testing.assert_close(told(pixels, "map", maps.vae, (21, 16)), expected)


def test_goes_with_an_image_and_a_mask(maps: sdkit.StableDiffusion) -> None:
    """The condition of an enlarged region is that region of the condition."""
    (image, condition), mask = pictures(2), Image.new("L", (SIZE, SIZE))
    mask.paste(255, (16, 16, 48, 48))
    options: dict[str, Any] = {"image": image, "num_inference_steps": 2, "output_type": "np"}
    for more in ({}, {"mask_image": mask}, {"mask_image": mask, "padding_mask_crop": 4}):
        drawn = maps("a", condition=condition, **options, **more)
        assert not np.array_equal(drawn, maps("a", condition=image, **options, **more))
        outside = np.asarray(mask) == 0
        if more:
            assert np.array_equal(drawn[0][outside], np.asarray(image)[outside])
    beside = Image.new("RGB", (SIZE, SIZE))
    beside.paste(condition.crop((12, 12, 52, 52)), (12, 12))  # all else is outside of the region
    assert np.array_equal(drawn, maps("a", condition=beside, **options, **more))


def test_the_size_is_that_of_the_condition(maps: sdkit.StableDiffusion) -> None:
    (drawn,) = maps("a", condition=pictures(1, 40, 72), num_inference_steps=1)
    assert drawn.size == (40, 72)


# Files


def saved(model: sdkit.StableDiffusion, folder: Path, kind: str) -> Path:
    diffusers_pipeline(model, tiny.scheduler(), kind).save_pretrained(folder)
    return folder


def test_folders_are_read_as_diffusers_writes_them(
    edits: tuple[sdkit.StableDiffusion, Any], maps: sdkit.StableDiffusion, tmp_path: Path
) -> None:
    folder = saved(edits[0], tmp_path / "edits", "StableDiffusionInstructPix2PixPipeline")
    unet = sdkit.UNet.from_pretrained(folder, dtype="fp32", device="cpu")
    assert (unet.condition, unet.inpaints, unet.input_channels) == ("latents", False, 8)
    model = sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    expected = edits[0]("a", condition=pictures(1), image_guidance_scale=2.0, **options)
    torch.testing.assert_close(model("a", condition=pictures(1), image_guidance_scale=2.0, **options), expected)
    folder = saved(maps, tmp_path / "maps", "StableDiffusionPipeline")  # keeps the kind of the condition
    again = sdkit.UNet.from_pretrained(folder, dtype="fp32", device="cpu")
    assert (again.condition, again.input_channels) == ("map", 7)


def test_single_files_in_the_original_layout(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    """As InstructPix2Pix was published. The public configs fit no tiny network, so that a config is given."""
    networks = tiny.networks(
        (8, 8, 8, 8), vae={"layers_per_block": 2}, unet={"block_out_channels": (8, 16, 16, 16), "in_channels": 8}
    )
    networks.save(tmp_path / "configs")
    tensors = original_layout.unet(networks.unet.state_dict(), layers_per_block=2)
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "edit.safetensors")
    unet = sdkit.UNet.from_pretrained(tmp_path / "edit.safetensors", config=tmp_path / "configs", dtype="fp32")
    assert unet.condition == "latents"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"in_channels": 7}, r"looks like an upscaler \(7 input channels\); give a text-to-image model"),
        ({"in_channels": 6, "_condition": "low_res"}, r"has 6 input channels, and 7 with the condition that its conf"),
        (
            {"in_channels": 8, "_condition": "map"},
            r"has 8 input channels, and 7 with the condition that its config nam",
        ),
        (
            {"in_channels": 9, "_condition": "latents"},
            r"has 9 input channels, and 8 with the condition that its config",
        ),
        ({"in_channels": 8, "_condition": "depth"}, r"has _condition 'depth', not latents or map or low_res or nu"),
    ],
    ids=str,
)
def test_other_inputs_are_refused(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    network = tiny.networks((8, 8), unet={**tiny.TWO_LEVELS, **{k: v for k, v in config.items() if k[0] != "_"}}).unet
    network.register_to_config(**config)
    network.save_pretrained(tmp_path)
    with pytest.raises(sdkit.SourceError, match=sentence):
        Source.open(tmp_path).denoiser(conditioned=True)


# Bad input


def bad(model: sdkit.StableDiffusion, sentence: str, **options: Any) -> None:
    with pytest.raises(sdkit.SdkitError, match=f"^{re.escape(sentence)}") as caught:
        model(PROMPTS, num_inference_steps=1, output_type="latent", **options)
    assert "\n" not in str(caught.value)


def test_bad_input(sd: sdkit.StableDiffusion, edits: tuple[sdkit.StableDiffusion, Any]) -> None:
    model, one = edits[0], pictures(1)
    plain, _ = sd_shaped(sd.text)
    nine, _ = sd_shaped(sd.text, 9)
    scale: dict[str, Any] = {"image_guidance_scale": 2.0}
    bad(plain, "this model's U-Net takes no image beside the noise: leave condition out", condition=one)
    bad(plain, "image_guidance_scale belongs to a condition; give one as condition", **scale)
    bad(model, "image_guidance_scale belongs to a condition; give one as condition", **scale)
    bad(model, "this model draws from an image: give one as condition, or take a text-to-image model")
    bad(model, "3 conditions cannot serve 2 prompts: give one, or one for each", condition=pictures(3))
    bad(model, "the conditions differ in size: 32 x 64 and 64 x 64 pixels", condition=[*one, *pictures(1, 32)])
    bad(model, "image_guidance_scale must be a number from 0", condition=one, image_guidance_scale=-0.5)
    bad(model, "image_guidance_scale must be a number from 0", condition=one, image_guidance_scale=float("nan"))
    bad(model, "image_guidance_scale must be a number from 0", condition=one, image_guidance_scale="2")
    bad(model, "projected guidance (APG) has one scale", condition=one, apg=APG(), **scale)
    bad(model, "height must be a whole number from 8", condition=one, height=4)
    bad(model, "the list of images is empty; give at least one", condition=[])
    with pytest.raises(sdkit.ImageError, match=r"missing\.png"):
        model("a", condition="missing.png")
    masked = {"image": one, "mask_image": torch.ones(SIZE, SIZE)}
    bad(nine, "this model's U-Net takes an image and a mask: leave condition out", condition=one, **masked)
    control = sdkit.ControlNet(control_network(plain.unet.network))
    both = {"controlnet": control, "control_image": one}
    bad(model, "a ControlNet cannot act on a model that takes a condition", condition=one, **both)
    distilled = sdkit.StableDiffusion(sd.vae, sd.text, sdkit.UNet(guided_network(sd.text.width)), sd.schedule)
    widen(distilled.unet.network, "map")
    distilled = sdkit.StableDiffusion(sd.vae, sd.text, sdkit.UNet(distilled.unet.network), sd.schedule)
    bad(distilled, "this model's U-Net takes the guidance scale as an input", condition=one, **scale)
    with pytest.raises(sdkit.ArgumentError, match=r"^inversion takes no condition: leave"):
        model.invert(one[0])
    with pytest.raises(sdkit.ArgumentError, match=r"^this U-Net takes 4 channels beside x_t; the condition's `concat`"):
        model.unet(torch.zeros(1, 4, 8, 8), 1, sdkit.guidance.Conditioning(sd.text.encode("a")))


# The command line


def test_command_line(
    edits: tuple[sdkit.StableDiffusion, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(edits[0], tmp_path / "model", "StableDiffusionInstructPix2PixPipeline")
    (picture,) = pictures(1, 48, 64)
    picture.save(tmp_path / "in.png")
    given = ["generate", "make it red", "--model", folder, "--condition", tmp_path / "in.png", "--steps", 2]
    given += ["--scale", 1, "--image-guidance-scale", 1.5, "--dtype", "fp32"]
    assert main([str(one) for one in [*given, "--out", tmp_path / "a.png"]]) == 0
    first = sdkit.images.read(tmp_path / "a.png")
    (expected,) = edits[0](
        "make it red", condition=picture, num_inference_steps=2, guidance_scale=1.0, image_guidance_scale=1.5
    )
    assert first.size == (48, 64)
    assert np.abs(np.asarray(first, float) - np.asarray(expected, float)).max() <= 1
    text = sdkit.images.read_text(tmp_path / "a.png")
    assert text["condition"] == str(tmp_path / "in.png")
    assert text["image_guidance_scale"] == "1.5"
    assert "Image CFG scale: 1.5" in text["parameters"]
    again = ["generate", "--from", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    assert main(again) == 0
    assert np.array_equal(np.asarray(sdkit.images.read(tmp_path / "b.png")), np.asarray(first))
    pictures(2, 48, 64)[1].save(tmp_path / "in.png")
    capsys.readouterr()
    assert main(again) == 2
    assert "in.png has changed since it was drawn from; restore it" in capsys.readouterr().err
    assert main([*again, "--condition", str(tmp_path / "in.png")]) == 0
    assert main([*again, "--condition", str(tmp_path / "none.png")]) == 2
    assert main(["generate", "a", "--image-guidance-scale", "2", "--out", str(tmp_path / "c.png")]) == 2
    assert "image_guidance_scale belongs to a condition; give one as condition" in capsys.readouterr().err
    assert main(["generate", "--from", str(tmp_path / "a.png"), "--model", "emoji", "--steps", "1", "--out",
                 str(tmp_path / "c.png")]) == 0  # another model needs no condition  # fmt: skip
    assert "image_guidance_scale" not in sdkit.images.read_text(tmp_path / "c.png")
