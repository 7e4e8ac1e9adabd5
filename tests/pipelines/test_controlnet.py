"""ControlNets in text to image, against diffusers' StableDiffusionControlNetPipeline."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import MultiControlNetModel
from PIL import Image

import sdkit
from sdkit.errors import SdkitError
from sdkit.pipelines.controlnet import Control, controlled, in_region
from tests.helpers import tiny
from tests.helpers.networks import control_network, diffusers_pipeline

SIZE = 64
PROMPTS = ["a red apple", "a cat"]


@pytest.fixture(scope="module")
def model(sd: sdkit.StableDiffusion) -> sdkit.StableDiffusion:
    """A small model with Stable Diffusion's topology and random weights. Its text encoder is the embedded model's."""
    made = tiny.networks((16, 16, 16, 16), unet={"sample_size": 8, "cross_attention_dim": sd.text.width})
    schedule = sdkit.NoiseSchedule.from_config(tiny.scheduler().config)
    return sdkit.StableDiffusion(sdkit.VAE(made.vae.eval()), sd.text, sdkit.UNet(made.unet.eval()), schedule)


@pytest.fixture(scope="module")
def controls(model: sdkit.StableDiffusion) -> list[sdkit.ControlNet]:
    return [sdkit.ControlNet(control_network(model.unet.network, seed=seed)) for seed in (1, 2)]


def pictures(n: int, size: int = SIZE) -> list[Image.Image]:
    levels = np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in levels]


def theirs(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet], kind: str = "", **options: Any
) -> torch.Tensor:
    """Latents of diffusers' StableDiffusionControlNet(kind)Pipeline, with the noise of seeds 3 and 4."""
    import diffusers

    networks = [one.network for one in controls]
    plain = diffusers_pipeline(model, tiny.scheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, f"StableDiffusionControlNet{kind}Pipeline")(
            **{name: part for name, part in plain.components.items() if name != "image_encoder"},
            controlnet=networks[0] if len(networks) == 1 else MultiControlNetModel(networks),
            requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        latents: torch.Tensor = pipe(PROMPTS, generator=generator, output_type="latent", **options).images
    return latents


ONE: list[dict[str, Any]] = [
    {},
    {"controlnet_conditioning_scale": 0.4},
    {"controlnet_conditioning_scale": 1.5, "guidance_scale": 1.0},
    {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
    {"control_guidance_end": 0.3},
    {"guess_mode": True},
    {"guess_mode": True, "guidance_scale": 1.0, "controlnet_conditioning_scale": 0.7},
]


@pytest.mark.parametrize("options", ONE, ids=str)
def test_one_controlnet_equals_diffusers(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet], options: dict[str, Any]
) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, **options}
    expected = theirs(model, controls[:1], image=pictures(2), **options)
    common = {"seed": 3, "output_type": "latent", "height": SIZE, "width": SIZE}
    z = model(PROMPTS, controlnet=controls[0], control_image=pictures(2), **common, **options)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)
    without = model(PROMPTS, **common, num_inference_steps=4, guidance_scale=options["guidance_scale"])
    assert (z - without).abs().max() > 1e-2


TWO: list[dict[str, Any]] = [
    {"controlnet_conditioning_scale": [0.5, 1.0]},
    {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]},
    {"guess_mode": True, "controlnet_conditioning_scale": [1.0, 0.3]},
    {"guidance_scale": 1.0},
]


@pytest.mark.parametrize("options", TWO, ids=str)
def test_two_controlnets_equal_diffusers(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet], options: dict[str, Any]
) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, **options}
    first, second = pictures(2)
    # diffusers takes a list with both images for each prompt.
    nested = {"image": [[first, second]] * 2, **options}
    if "controlnet_conditioning_scale" not in options:
        nested["controlnet_conditioning_scale"] = [1.0, 1.0]
    expected = theirs(model, controls, **nested)
    z = model(PROMPTS, seed=3, controlnet=controls, control_image=[first, second], output_type="latent", **options)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)


def test_one_that_pools_is_always_in_guess_mode(model: sdkit.StableDiffusion) -> None:
    control = sdkit.ControlNet(control_network(model.unet.network, pools=True))
    expected = theirs(model, [control], image=pictures(2), num_inference_steps=3, guidance_scale=4.0)
    z = model(
        PROMPTS, seed=3, controlnet=control, control_image=pictures(2), num_inference_steps=3, guidance_scale=4.0,
        output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"control_guidance_end": 0.6}], ids=str)
def test_image_to_image_equals_diffusers(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet], options: dict[str, Any]
) -> None:
    start = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"num_inference_steps": 8, "strength": 0.5, "guidance_scale": 4.0, "image": start, **options}
    options["controlnet_conditioning_scale"] = 0.7
    expected = theirs(model, controls[:1], "Img2Img", control_image=pictures(2), **options)
    given = {"controlnet": controls[0], "control_image": pictures(2)}
    z = model(PROMPTS, seed=3, output_type="latent", **given, **options)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)


def test_inpainting_follows_it_inside_the_mask_alone(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet]
) -> None:
    image, mask = pictures(1)[0], Image.new("L", (SIZE, SIZE))
    mask.paste(255, (16, 16, 48, 48))
    options: dict[str, Any] = {"image": image, "mask_image": mask, "num_inference_steps": 3, "output_type": "np"}
    without = model("a", **options)
    for crop in (None, 4):
        drawn = model("a", controlnet=controls[0], control_image=pictures(2)[0], padding_mask_crop=crop, **options)
        outside = np.asarray(mask) == 0
        assert np.array_equal(drawn[0][outside], np.asarray(image)[outside])
        assert (drawn[0] != without[0])[~outside].mean() > 0.3


def test_region_of_a_control_image(controls: list[sdkit.ControlNet]) -> None:
    images = torch.rand(1, 3, 20, 30)
    (control,) = in_region([Control(network=controls[0], images=images)], (20, 30), (4, 5, 12, 25))
    assert torch.equal(control.images, images[:, :, 4:12, 5:25])


@pytest.mark.parametrize("guess_mode", [False, True])
def test_an_image_is_the_same_alone_and_in_a_batch(sd: sdkit.StableDiffusion, guess_mode: bool) -> None:
    images, model = pictures(3, 128), sd
    options: dict[str, Any] = {
        "controlnet": sdkit.ControlNet(control_network(sd.unet.network)), "guess_mode": guess_mode,
        "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent",
    }  # fmt: skip
    together = model(["a", "b", "c"], control_image=images, seed=5, num_images_per_prompt=2, **options)
    for i, (prompt, image) in enumerate(zip("abc", images, strict=True)):
        alone = model(prompt, control_image=image, seed=6 + 2 * i, **options)
        # In float32, few rows (of pooled text, or of the ControlNet in guess mode) round as their number decides.
        torch.testing.assert_close(together[2 * i + 1], alone[0], atol=1e-4, rtol=0)
    parts = model(["a", "b", "c"], control_image=images, seed=5, num_images_per_prompt=2, batch_size=2, **options)
    torch.testing.assert_close(parts, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "unet", "control"),
    [
        ({}, [2] * 4, [2] * 4),
        ({"guess_mode": True}, [2] * 4, [1] * 4),
        ({"guidance_scale": 1.0}, [1] * 4, [1] * 4),
        ({"control_guidance_start": 0.25, "control_guidance_end": 0.75}, [2] * 4, [2] * 2),
        ({"controlnet_conditioning_scale": 0.0}, [2] * 4, []),
    ],
    ids=str,
)
def test_evaluations_cost_what_they_should(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet], options: dict[str, Any], unet: list[int],
    control: list[int],
) -> None:  # fmt: skip
    rows: dict[str, list[int]] = {"unet": [], "control": []}

    def count(name: str) -> Callable[..., None]:
        return lambda _, inputs: rows[name].append(len(inputs[0]))

    with (
        model.unet.network.register_forward_pre_hook(count("unet")),
        controls[0].network.register_forward_pre_hook(count("control")),
    ):
        model("a", controlnet=controls[0], control_image=pictures(1), num_inference_steps=4, **options)
    assert rows == {"unet": unet, "control": control}


def test_size_is_that_of_the_control_image_and_any_size_serves(
    model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet]
) -> None:
    image = pictures(1)[0].resize((60, 44))
    options: dict[str, Any] = {"controlnet": controls[0], "num_inference_steps": 2}
    assert model("a", control_image=image, **options)[0].size == (60, 44)
    assert model("a", control_image=image, height=32, width=48, **options)[0].size == (48, 32)
    # The right and lower edges are repeated up to a multiple of 8.
    padded = Image.fromarray(np.pad(np.asarray(image), ((0, 4), (0, 4), (0, 0)), mode="edge"))
    z = [model("a", control_image=one, output_type="latent", **options) for one in (image, padded)]
    assert torch.equal(*z)


def test_timesteps_inside_a_step_belong_to_it(controls: list[sdkit.ControlNet]) -> None:
    """Of five steps, the ControlNet acts in the third; samplers such as DPM++ SDE also evaluate between two steps."""
    timesteps = [(999, 799), (799, 599), (599, 399), (399, 199), (199, -1)]
    seen = []

    def model(x_t: torch.Tensor, t: int, cond: sdkit.guidance.Conditioning) -> torch.Tensor:
        seen.append((t, cond.residuals is not None))
        return x_t

    control = Control(network=controls[0], images=torch.zeros(1, 3, 64, 64), start=0.4, end=0.6)
    call = controlled(model, [control], timesteps)
    cond = sdkit.guidance.Conditioning(torch.zeros(1, 4, controls[0].network.config.cross_attention_dim))
    for t in (999, 700, 599, 400, 399, 0):
        call(torch.zeros(1, 4, 8, 8), t, cond)
    assert seen == [(999, False), (700, False), (599, True), (400, True), (399, False), (0, False)]


CASES: list[tuple[dict[str, Any], str]] = [
    ({"control_image": None}, "a ControlNet needs an image to follow; give it as control_image"),
    ({"controlnet": "canny"}, "controlnet takes ControlNets, as from sdkit.ControlNet.from_pretrained"),
    ({"controlnet": []}, "controlnet takes ControlNets"),
    ({"controlnet": None}, "control_image belongs to a ControlNet; give one as controlnet"),
    ({"control_image": pictures(3)}, "3 control images cannot serve 2 prompts: give one, or one for each"),
    (
        {"control_image": [*pictures(1), pictures(1, 32)[0]]},
        "the control images differ in size: 32 x 32 and 64 x 64 pixels",
    ),
    ({"control_image": pictures(1, 4)}, "height must be a whole number from 8"),
    ({"controlnet_conditioning_scale": "much"}, "controlnet_conditioning_scale must be a number"),
    ({"controlnet_conditioning_scale": [1.0, 0.5]}, "2 of controlnet_conditioning_scale cannot serve 1"),
    ({"control_guidance_start": 0.6, "control_guidance_end": 0.5}, "control_guidance_start 0.6 must be below"),
    ({"control_guidance_end": 1.5}, "control_guidance_end must be a number from 0 to 1"),
    ({"control_guidance_start": [0.1, 0.2], "control_guidance_end": [0.5] * 3}, "2 of control_guidance_start"),
    ({"guess_mode": "yes"}, "guess_mode must be True or False"),
    ({"controlnet": 3}, "controlnet takes ControlNets"),
    ({"control_image": []}, "the list of images is empty"),
    ({"control_image": 3}, "type int is no image"),
    ({"control_image": "missing.png"}, "missing.png"),
    ({"control_image": torch.full((1, 3, 64, 64), float("nan"))}, "a tensor has values that are not finite"),
    ({"control_image": torch.full((1, 3, 64, 64), 200.0)}, "a tensor has values from"),
    ({"control_image": torch.zeros(1, 1, 64, 64)}, "a tensor of shape (1, 1, 64, 64) is no image"),
    ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale must be a number"),
    ({"control_guidance_start": -0.1}, "control_guidance_start must be a number from 0 to 1"),
    ({"control_guidance_start": 1.0}, "control_guidance_start 1 must be below control_guidance_end 1"),
]  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize(("change", "sentence"), CASES, ids=[sentence for _, sentence in CASES])
    def test_is_one_sentence(
        self, model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet], change: dict[str, Any], sentence: str
    ) -> None:
        given: dict[str, Any] = {"controlnet": controls[0], "control_image": pictures(2), **change}
        with pytest.raises(SdkitError, match=re.escape(sentence)) as caught:
            model(PROMPTS, num_inference_steps=1, **given)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "setting",
        [
            {"guess_mode": True},
            {"controlnet_conditioning_scale": 0.5},
            {"control_guidance_start": 0.1},
            {"control_guidance_end": (0.9,)},
        ],
        ids=str,
    )
    def test_settings_without_a_controlnet(self, model: sdkit.StableDiffusion, setting: dict[str, Any]) -> None:
        with pytest.raises(sdkit.ArgumentError, match=rf"^{next(iter(setting))} belongs to a ControlNet; "):
            model("a", **setting)

    def test_number_of_images_for_several(self, model: sdkit.StableDiffusion, controls: list[sdkit.ControlNet]) -> None:
        with pytest.raises(sdkit.ArgumentError, match=r"^1 of control_image cannot serve 2 ControlNets: give"):
            model("a", controlnet=controls, control_image=pictures(1)[0])

    def test_a_controlnet_of_another_model(self, sd: sdkit.StableDiffusion, controls: list[sdkit.ControlNet]) -> None:
        wide = sdkit.ControlNet(control_network(tiny.networks((16, 16, 16, 32)).unet))
        for control, what in ((controls[0], "block_out_channels"), (wide, "block_out_channels")):
            with pytest.raises(sdkit.ArgumentError, match=rf"^this ControlNet belongs to another model: its {what} is"):
                sd("a", controlnet=control, control_image=pictures(1))

    def test_a_controlnet_of_another_width_or_vae(self, model: sdkit.StableDiffusion) -> None:
        narrow = tiny.networks((16, 16, 16, 16), unet={"cross_attention_dim": 24}).unet
        for network, sentence in (
            (control_network(narrow), "its cross_attention_dim is 24, this model's"),
            (control_network(model.unet.network, levels=3), "its pixels for each latent is 4, this model's 8"),
        ):
            with pytest.raises(sdkit.ArgumentError, match=sentence):
                model("a", controlnet=sdkit.ControlNet(network), control_image=pictures(1))
