"""Text to image: the whole pipeline against diffusers', single images against batches, and the cost of each step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.diffusion.guidance import APG
from sdkit.diffusion.samplers import SAMPLERS, Step
from tests.helpers.networks import EMOJI, diffusers_pipeline, guided_network

PROMPTS = ["a red apple on a blue background", "a cat", "green tree", "rocket"]
NEGATIVES = ["blue", "", "a dog", "a red ball"]
SD_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def sd_like(sd: sdkit.StableDiffusion) -> Callable[[str], tuple[sdkit.StableDiffusion, Any]]:
    """Return a function that makes a small random model with SD 1.x's block types and schedule, as sdkit's and as
    diffusers', for a prediction type.
    """

    def make(prediction_type: str) -> tuple[sdkit.StableDiffusion, Any]:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            cross_attention_dim=sd.text.width,
            attention_head_dim=8,
            norm_num_groups=16,
        )
        vae = AutoencoderKL(
            block_out_channels=(16,) * 4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            norm_num_groups=8,
        )
        scheduler = DDIMScheduler(**SD_SCHEDULER, prediction_type=prediction_type)
        schedule = sdkit.NoiseSchedule.from_config(scheduler.config)
        ours = sdkit.StableDiffusion(sdkit.VAE(vae.eval()), sd.text, sdkit.UNet(unet.eval()), schedule)
        return ours, diffusers_pipeline(ours, scheduler)

    return make


def theirs(pipe: Any, **kwargs: Any) -> Tensor:
    latents: Tensor = pipe(output_type="latent", **kwargs).images
    return latents


class TestAgainstDiffusers:
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("scale", [1.0, 4.0, 7.5, 12.0])
    def test_ddim_leading(self, sd_like: Any, prediction_type: str, scale: float) -> None:
        ours, pipe = sd_like(prediction_type)
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        common = {"negative_prompt": NEGATIVES, "num_inference_steps": 10, "guidance_scale": scale}
        expected = theirs(pipe, prompt=PROMPTS, latents=latents.clone(), **common)
        z = ours(PROMPTS, latents=latents, output_type="latent", **common)
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("scale", [1.0, 5.0, 7.5])
    @pytest.mark.parametrize("spacing", ["leading", "trailing"])
    def test_embedded_model(self, sd: sdkit.StableDiffusion, scale: float, spacing: str) -> None:
        """v-prediction with zero terminal SNR. 10 steps divide 1,000, so that diffusers' previous timestep is right
        with trailing spacing too.
        """
        config = DDIMScheduler.from_pretrained(EMOJI, subfolder="scheduler").config
        pipe = diffusers_pipeline(sd, DDIMScheduler.from_config(config, timestep_spacing=spacing))
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        common = {"negative_prompt": ["blue", "dog"], "num_inference_steps": 10, "guidance_scale": scale}
        expected = theirs(pipe, prompt=PROMPTS[:2], latents=latents.clone(), **common)
        z = sd(PROMPTS[:2], latents=latents, spacing=spacing, output_type="latent", **common)
        torch.testing.assert_close(z, expected, atol=5e-4, rtol=0)

    def test_diffusers_loads_the_embedded_folder_and_runs_it_unchanged(self, sd: sdkit.StableDiffusion) -> None:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(EMOJI)
        pipe.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        common = {"prompt": "a cat", "latents": latents, "num_inference_steps": 2, "output_type": "latent"}
        common |= {"guidance_scale": sd.guidance_scale}  # diffusers does not know the model's own scale
        torch.testing.assert_close(sd(**common), pipe(**common).images, atol=1e-4, rtol=0)

    def test_rescaled_guidance_and_image(self, sd: sdkit.StableDiffusion) -> None:
        pipe = diffusers_pipeline(sd)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        common = {"prompt": PROMPTS[0], "num_inference_steps": 10, "guidance_scale": 7.5, "guidance_rescale": 0.7}
        expected = pipe(latents=latents.clone(), output_type="np", **common).images
        image = sd(latents=latents, output_type="np", **common)
        assert np.abs(image - expected * 255).max() <= 1


class TestGuidanceAsAnInput:
    """The U-Net of a latent consistency model takes the guidance scale as an input."""

    @pytest.fixture(scope="class")
    @classmethod
    def consistency(cls, sd: sdkit.StableDiffusion) -> sdkit.StableDiffusion:
        schedule = sdkit.NoiseSchedule.from_config({"_class_name": "DDIMScheduler", **SD_SCHEDULER})
        return sdkit.StableDiffusion(sd.vae, sd.text, sdkit.UNet(guided_network(sd.text.width)), schedule)

    @pytest.mark.parametrize("scale", [1.0, 1.5, 7.5, 8.5])
    def test_latents_are_those_of_diffusers_in_one_pass(self, consistency: sdkit.StableDiffusion, scale: float) -> None:
        pipe = diffusers_pipeline(consistency, DDIMScheduler(**SD_SCHEDULER))
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        common = {"num_inference_steps": 4, "guidance_scale": scale}
        expected = theirs(pipe, prompt=PROMPTS[:2], latents=latents.clone(), **common)
        z = consistency(PROMPTS[:2], latents=latents, output_type="latent", **common)
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
        assert count(consistency, lambda: consistency(PROMPTS[:2], output_type="latent", **common)) == [2] * 4

    def test_the_scale_matters(self, consistency: sdkit.StableDiffusion) -> None:
        low, high = (
            consistency("a cat", num_inference_steps=4, guidance_scale=scale, output_type="latent") for scale in (1, 8)
        )
        assert (low - high).abs().max() > 1e-3

    @pytest.mark.parametrize(
        "option",
        [
            {"negative_prompt": "blue"},
            {"guidance_interval": (0.5, 3.0)},
            {"guidance_rescale": 0.7},
            {"apg": APG()},
        ],
        ids=lambda option: next(iter(option)),
    )
    def test_options_of_guidance_are_refused(self, consistency: sdkit.StableDiffusion, option: dict[str, Any]) -> None:
        with pytest.raises(sdkit.ArgumentError, match=f"{next(iter(option))} has no meaning for it; leave it out"):
            consistency("a cat", num_inference_steps=1, **option)


class TestBatches:
    @pytest.mark.parametrize(
        ("sampler", "eta"),
        [*((name, 0.0) for name in ("ddim", "ddpm", "dpm++2m", "dpm++sde")), ("ddim", 0.7), ("tcd", 0.3)],
    )
    def test_an_image_is_the_same_alone_and_anywhere_in_a_batch(
        self, sd: sdkit.StableDiffusion, sampler: str, eta: float
    ) -> None:
        common = {"sampler": sampler, "eta": eta, "num_inference_steps": 5, "height": 64, "width": 64}
        batch = sd(PROMPTS, seed=[5, 6, 7, 8], output_type="latent", **common)
        turned = sd(PROMPTS[::-1], seed=[8, 7, 6, 5], output_type="latent", **common)
        torch.testing.assert_close(turned.flip(0), batch, atol=3e-5, rtol=0)
        for i, prompt in enumerate(PROMPTS):
            alone = sd(prompt, seed=5 + i, output_type="latent", **common)
            torch.testing.assert_close(alone[0], batch[i], atol=3e-5, rtol=0)
        pixels = sd(PROMPTS, seed=5, output_type="pt", **common)
        torch.testing.assert_close(sd(PROMPTS[2], seed=7, output_type="pt", **common)[0], pixels[2], atol=3e-5, rtol=0)

    def test_a_long_prompt_in_the_batch_does_not_change_the_others(self, sd: sdkit.StableDiffusion) -> None:
        long = "a red apple on a blue background, " * 8
        common = {"num_inference_steps": 5, "output_type": "latent"}
        batch = sd([long, "a cat", "a dog"], negative_prompt=["", "", long], **common)
        for i, (prompt, negative) in enumerate([(long, ""), ("a cat", ""), ("a dog", long)]):
            alone = sd(prompt, negative_prompt=negative, seed=i, **common)
            torch.testing.assert_close(alone[0], batch[i], atol=3e-5, rtol=0)

    def test_batch_size(self, sd: sdkit.StableDiffusion) -> None:
        common = {"num_inference_steps": 4, "output_type": "latent"}
        calls = count(sd, lambda: sd(PROMPTS, batch_size=3, **common))
        assert calls == [6] * 4 + [2] * 4
        torch.testing.assert_close(sd(PROMPTS, batch_size=3, **common), sd(PROMPTS, **common), atol=1e-5, rtol=0)

    def test_copies_and_seeds(self, sd: sdkit.StableDiffusion) -> None:
        common = {"num_inference_steps": 3, "output_type": "latent"}
        four = sd(["a cat", "a dog"], num_images_per_prompt=2, seed=10, **common)
        torch.testing.assert_close(four[1], sd("a cat", seed=11, **common)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(four[2], sd("a dog", seed=12, **common)[0], atol=1e-5, rtol=0)
        assert (four[0] - four[1]).abs().max() > 0.1
        given = sd("a cat", num_images_per_prompt=2, seed=[7, 7], **common)
        assert torch.equal(given[0], given[1])
        for seed in (torch.tensor(10), np.array(10), np.int64(10)):
            assert torch.equal(sd("a cat", num_images_per_prompt=2, seed=seed, **common), four[:2])


def count(sd: sdkit.StableDiffusion, run: Callable[[], object]) -> list[int]:
    """Return the batch sizes of the U-Net's passes during `run`."""
    sizes: list[int] = []
    with sd.unet.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        run()
    return sizes


def test_guidance_is_the_models_own_unless_told_otherwise(sd: sdkit.StableDiffusion) -> None:
    options = {"num_inference_steps": 3, "output_type": "latent"}
    assert torch.equal(sd(PROMPTS, **options), sd(PROMPTS, guidance_scale=sd.guidance_scale, **options))
    unguided = sdkit.StableDiffusion(sd.vae, sd.text, sd.unet, sd.schedule, guidance_scale=1)
    long = " ".join(["red"] * 40)  # more tokens than the prompts; without guidance this must not matter
    assert count(unguided, lambda: unguided(PROMPTS, long, num_inference_steps=2)) == [4] * 2
    plain, beside = (unguided(PROMPTS, text, num_inference_steps=2, output_type="latent") for text in ("", long))
    assert torch.equal(plain, beside)
    assert sdkit.StableDiffusion(sd.vae, sd.text, sd.unet, sd.schedule).guidance_scale == 7.5


class TestCost:
    def test_without_guidance_one_pass_of_the_batch_a_step(self, sd: sdkit.StableDiffusion) -> None:
        assert count(sd, lambda: sd(PROMPTS, guidance_scale=1, num_inference_steps=5)) == [4] * 5

    def test_with_guidance_one_pass_of_twice_the_batch(self, sd: sdkit.StableDiffusion) -> None:
        assert count(sd, lambda: sd(PROMPTS, num_inference_steps=5)) == [8] * 5

    def test_an_interval_costs_what_it_should(self, sd: sdkit.StableDiffusion) -> None:
        pairs = sd.schedule.timesteps(10)
        inside = [0.3 < sd.schedule.sigma(t) <= 5 for t, _ in pairs]
        assert 2 <= sum(inside) <= 8
        sizes = count(sd, lambda: sd("a cat", num_inference_steps=10, guidance_interval=(0.3, 5)))
        assert sizes == [2 if guided else 1 for guided in inside]

    def test_without_guidance_the_negative_prompt_is_not_even_encoded(self, sd: sdkit.StableDiffusion) -> None:
        seen: list[tuple[int, ...]] = []
        with sd.text.network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape))):
            sd(["a cat"] * 3, guidance_scale=1, num_inference_steps=1)
        assert seen == [(1, 25)]  # a prompt that occurs three times is encoded once


class TestSizes:
    @pytest.mark.parametrize("size", [(128, 128), (96, 160), (100, 75), (8, 8), (17, 200)], ids=str)
    def test_any_size(self, sd: sdkit.StableDiffusion, size: tuple[int, int]) -> None:
        (image,) = sd("a cat", height=size[0], width=size[1], num_inference_steps=2)
        assert image.size == (size[1], size[0])

    def test_default_is_the_models_own_and_latents_give_theirs(self, sd: sdkit.StableDiffusion) -> None:
        assert sd("a cat", num_inference_steps=1)[0].size == (128, 128)
        assert sd("a cat", latents=torch.randn(1, 4, 6, 9), num_inference_steps=1)[0].size == (72, 48)


class TestOutput:
    def test_types_agree(self, sd: sdkit.StableDiffusion) -> None:
        pil, array, pixels, z = (
            sd(PROMPTS[:2], num_inference_steps=2, height=60, output_type=kind)
            for kind in ("pil", "np", "pt", "latent")
        )
        assert [image.size for image in pil] == [(128, 60)] * 2
        assert np.array_equal(np.stack([np.asarray(image) for image in pil]), array)
        assert pixels.shape == (2, 3, 60, 128)
        assert z.shape == (2, 4, 8, 16)
        assert np.array_equal(sd.vae.decode(z, size=(60, 128), output_type="np"), array)
        weight = torch.ones(1, requires_grad=True)
        (z * weight).sum().backward()  # not an inference tensor, so autograd can use it

    def test_deterministic(self, sd: sdkit.StableDiffusion) -> None:
        common = {"sampler": "ddpm", "num_inference_steps": 5, "seed": 3}
        assert sd("a cat", **common)[0].tobytes() == sd("a cat", **common)[0].tobytes()

    def test_callback_sees_every_step(self, sd: sdkit.StableDiffusion) -> None:
        steps: list[Step] = []
        z = sd("a cat", num_inference_steps=4, callback=steps.append, output_type="latent")
        assert [step.i for step in steps] == [0, 1, 2, 3]
        assert [step.t for step in steps] == [t for t, _ in sd.schedule.timesteps(4)]
        assert torch.equal(steps[-1].x, z)
        assert steps[0].x0.shape == z.shape
        weight = torch.ones(1, requires_grad=True)
        (steps[0].x0 * steps[0].x * weight).sum().backward()  # not inference tensors

    def test_silent_when_not_a_terminal(self, sd: sdkit.StableDiffusion, capfd: pytest.CaptureFixture[str]) -> None:
        sd("a cat", num_inference_steps=2)
        assert capfd.readouterr() == ("", "")


def background(image: Image.Image) -> np.ndarray:
    """Mean colour of the four corners."""
    pixels = np.asarray(image).astype(float)
    return np.concatenate(
        [pixels[a, b].reshape(-1, 3) for a in (slice(8), slice(-8, None)) for b in (slice(8), slice(-8, None))]
    ).mean(0)


class TestWhatIsDrawn:
    """The embedded model draws the background in the prompt."""

    @pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("euler", "lcm", "tcd")])
    def test_samplers_agree_on_the_background(self, sd: sdkit.StableDiffusion, sampler: str) -> None:
        colours = {"blue": (2, 0), "red": (0, 2), "yellow": (0, 2)}
        prompts = [f"a large 3d cat on a {name} background" for name in colours]
        images = sd(prompts, guidance_scale=5, sampler=sampler, num_inference_steps=15)
        for image, (more, less) in zip(images, colours.values(), strict=True):
            assert background(image)[more] > background(image)[less] + 60

    def test_pure_noise_to_black_and_white(self, sd: sdkit.StableDiffusion) -> None:
        """Needs zero terminal SNR: a model that never saw pure noise in training reaches neither black nor white."""
        cats = [f"a large 3d cat on a {name} background" for name in ("black", "white")]
        black, white = sd(cats, guidance_scale=5)
        assert background(black).mean() < 50
        assert background(white).mean() > 225

    def test_options_reach_the_sampler(self, sd: sdkit.StableDiffusion) -> None:
        common = {"prompt": "a (cat:1.5) on a red background", "num_inference_steps": 5, "output_type": "latent"}
        common |= {"height": 64, "width": 64}
        plain = sd(**common)
        options: list[dict[str, Any]] = [
            {"eta": 1.0},
            {"spacing": "leading"},
            {"guidance_rescale": 0.7},
            {"guidance_interval": (0.5, 3.0)},
            {"apg": APG(norm_threshold=5.0, momentum=-0.5)},
            {"clip_skip": 1},
            {"weighting": True},
            {"negative_prompt": "red"},
            *({"sampler": name} for name in SAMPLERS if name not in ("ddim", "euler", "tcd")),  # equal here
            {"spacing": "karras"},
            {"guidance_scale": 7.5},
        ]
        for option in options:
            assert (sd(**common, **option) - plain).abs().max() > 1e-2, option

    def test_a_schedule_that_clips_has_it_done(self, sd: sdkit.StableDiffusion) -> None:
        clipping = sdkit.StableDiffusion(sd.vae, sd.text, sd.unet, replace(sd.schedule, clip_x0=0.5))
        for sampler in SAMPLERS:
            steps: list[Step] = []
            clipping("a cat", num_inference_steps=2, sampler=sampler, callback=steps.append)
            assert max(step.x0.abs().max() for step in steps) <= 0.5

    def test_bfloat16_is_within_45_db(self, sd: sdkit.StableDiffusion) -> None:
        """The prompts leave little open: with less said, rounding may lead to another picture."""
        fast = sdkit.StableDiffusion.from_pretrained("emoji", dtype="bf16", device="cpu")
        prompts = ["a large 3d red apple on a yellow background", "a large 3d cat on a red background"]
        exact, rounded = (model(prompts, guidance_scale=2, output_type="np") for model in (sd, fast))
        for a, b in zip(exact, rounded, strict=True):
            assert 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)) > 45


def test_parts_that_do_not_belong_together(sd: sdkit.StableDiffusion) -> None:
    unet = sdkit.UNet(UNet2DConditionModel(block_out_channels=(32,) * 4, norm_num_groups=8, cross_attention_dim=64))
    with pytest.raises(sdkit.ArgumentError, match=r"width 64.*width|width 64"):
        sdkit.StableDiffusion(sd.vae, sd.text, unet, sd.schedule)
    five = UNet2DConditionModel(block_out_channels=(32,) * 4, norm_num_groups=8, cross_attention_dim=192, in_channels=5)
    with pytest.raises(sdkit.ArgumentError, match="5 channels"):
        sdkit.StableDiffusion(sd.vae, sd.text, sdkit.UNet(five), sd.schedule)


def test_schedule_of_ones_own(sd: sdkit.StableDiffusion) -> None:
    """A model consists of four parts, and the schedule can be replaced."""
    leading = replace(sd.schedule, timestep_spacing="leading")
    other = sdkit.StableDiffusion(sd.vae, sd.text, sd.unet, leading)
    common = {"num_inference_steps": 3, "guidance_scale": 3, "output_type": "latent"}
    assert torch.equal(other("a cat", **common), sd("a cat", spacing="leading", **common))


def test_given_latents_and_the_steps_noise_are_not_the_same_numbers(sd: sdkit.StableDiffusion) -> None:
    """A seed's own noise, given as `latents`, must make that seed's image."""
    x_T = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    own, given = (
        sd("a red apple", seed=3, latents=latents, sampler="ddpm", num_inference_steps=2, output_type="latent")
        for latents in (None, x_T)
    )
    assert torch.equal(own, given)


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_numbers_that_are_not_finite(sd: sdkit.StableDiffusion, output_type: str) -> None:
    broken = copy.deepcopy(sd)
    broken.unet.network.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(sdkit.SdkitError, match=r"^the U-Net gave .* not finite; its weight conv_out.bias is not"):
        broken("a red apple", num_inference_steps=2, output_type=output_type)
    assert broken("a red apple", num_inference_steps=2, output_type="latent").isnan().any()


def test_the_cause_of_numbers_that_are_not_finite_is_told(sd: sdkit.StableDiffusion) -> None:
    with pytest.raises(sdkit.SdkitError, match=r"^the prompt's weights are so large"):
        sd(f"a (cat:{'9' * 60})", weighting=True, num_inference_steps=1)
    broken = copy.deepcopy(sd)
    next(broken.text.network.parameters()).data.fill_(float("nan"))
    with pytest.raises(sdkit.SdkitError, match=r"^the text encoder gave .* not finite; its weight .* is not: load"):
        broken("a cat", num_inference_steps=1)
    with pytest.raises(sdkit.ArgumentError, match=r"^latents must be finite floating-point numbers"):
        sd("a cat", latents=torch.full((1, 4, 16, 16), float("nan")), num_inference_steps=1)
    with pytest.raises(sdkit.ArgumentError, match=r"^latents must be of shape"):
        sd("a cat", latents=torch.zeros(2, 4, 16, 16), num_inference_steps=1)
