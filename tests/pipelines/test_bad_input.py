"""Users' mistakes in Python, each reported in one sentence.

The table of the command line is in cli/test_cli.py, that of sources in loading/test_source.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdkit
from sdkit.diffusion.guidance import APG
from sdkit.networks.autoencoder import VAE
from tests.helpers.loaders import load_schedule

IMAGE = Image.new("RGB", (16, 16))
NAN = float("nan")

FROM_PRETRAINED: list[tuple[dict[str, Any], str]] = [
    ({"source": "no/such/folder/here"}, "does not exist"),
    ({"source": "./missing"}, "does not exist"),
    ({"source": "missing.safetensors"}, "does not exist"),
    ({"source": "somebody/some-model"}, "somebody/some-model"),
    ({"source": ""}, "does not exist"),
    ({"source": 3}, "source"),
    ({"source": "emoji", "dtype": "int8"}, "dtype 'int8' is not one of"),
    ({"source": "emoji", "dtype": torch.int64}, "is not one of"),
    ({"source": "emoji", "device": "gpu"}, "device 'gpu' cannot be used"),
    ({"source": "emoji", "revision": "main"}, "revision"),
]

ENCODE: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "list of images is empty"),
    (None, {}, "no image"),
    (3, {}, "no image"),
    ("missing.png", {}, "missing.png"),
    ([IMAGE, Path("missing.png")], {}, "missing.png"),
    (np.zeros((4, 4, 3)), {}, "float64"),
    (np.zeros((4, 4, 2), np.uint8), {}, "shape (4, 4, 2)"),
    (np.zeros((0, 4, 3), np.uint8), {}, "shape (0, 4, 3)"),
    (torch.zeros(1, 4, 8, 8), {}, "shape (1, 4, 8, 8)"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), {}, "[0, 255]"),
    (torch.full((3, 8, 8), NAN), {}, "not finite"),
    (torch.full((3, 8, 8), 255.0), {}, "outside [-1, 1]"),
    (torch.zeros(0, 3, 8, 8), {}, "shape (0, 3, 8, 8)"),
    (Image.new("RGB", (0, 5)), {}, "empty"),
    (IMAGE, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    (IMAGE, {"batch_size": 1.5}, "batch_size must be a whole number of at least 1"),
    (IMAGE, {"tile": 5}, "must be a whole number of at least 128"),
    (IMAGE, {"tile": -256}, "must be a whole number of at least 128"),
    (IMAGE, {"seed": -1}, "seed must be a whole number from 0"),
    (IMAGE, {"seed": "a"}, "seed must be a whole number from 0"),
    (IMAGE, {"generator": []}, "0 generators cannot serve 1"),
    (IMAGE, {"generator": "abc"}, "must be a torch.Generator"),
    (IMAGE, {"generator": torch.Generator(), "seed": 1}, "give one of the two"),
]

Z = torch.zeros(1, 4, 2, 2)
DECODE: list[tuple[Any, dict[str, Any], str]] = [
    (torch.zeros(1, 3, 2, 2), {}, "(4, h, w), not (3, 2, 2)"),
    (torch.zeros(2, 2), {}, "(4, h, w), not (2,)"),
    (torch.tensor(1.0), {}, "(4, h, w), not ()"),
    (torch.zeros(0, 4, 2, 2), {}, "at least one"),
    (torch.zeros(1, 4, 0, 2), {}, "not (4, 0, 2)"),
    ([], {}, "at least one"),
    ("z.safetensors", {}, "must be a tensor"),
    ([np.zeros((4, 2, 2))], {}, "not ndarray"),
    (torch.zeros(1, 4, 2, 2, dtype=torch.int64), {}, "floating-point"),
    (Z + NAN, {}, "finite"),
    (Z + float("inf"), {}, "finite"),
    (Z, {"output_type": "jpeg"}, "output_type 'jpeg' is not one of"),
    (Z, {"size": (17, 16)}, "within the decoded image"),
    (Z, {"size": (0, 16)}, "within the decoded image"),
    (Z, {"size": [(8, 8), (8, 8)]}, "within the decoded image"),
    (Z, {"size": 8}, "size must be (height"),
    (Z, {"size": []}, "within the decoded image"),
    (Z, {"size": {}}, "within the decoded image"),
    (Z, {"size": [(15.5, 16)]}, "within the decoded image"),
    (Z, {"batch_size": -1}, "batch_size must be a whole number of at least 1"),
]

CALL: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "at least one string"),
    ({"prompt": None}, "at least one string"),
    ({"prompt": 3}, "at least one string"),
    ({"prompt": ["a", 3]}, "at least one string"),
    ({"prompt": "a", "negative_prompt": ["a", "b"]}, "2 negative prompts cannot serve 1 prompts"),
    ({"prompt": "a", "negative_prompt": 3}, "at least one string"),
    ({"prompt": "a", "height": 7}, "must be a whole number from 8 to 16384"),
    ({"prompt": "a", "width": -64}, "must be a whole number from 8 to 16384"),
    ({"prompt": "a", "height": 0}, "must be a whole number from 8 to 16384"),
    ({"prompt": "a", "height": 64.5}, "must be a whole number from 8 to 16384"),
    ({"prompt": "a", "num_inference_steps": 0}, "from 1 to 1000, not 0"),
    ({"prompt": "a", "num_inference_steps": 1001}, "from 1 to 1000, not 1001"),
    ({"prompt": "a", "num_inference_steps": 2.5}, "from 1 to 1000, not 2.5"),
    ({"prompt": "a", "num_inference_steps": "30"}, "from 1 to 1000, not '30'"),
    ({"prompt": "a", "guidance_scale": NAN}, "guidance scale must be a number from"),
    ({"prompt": "a", "guidance_scale": float("inf")}, "guidance scale must be a number from"),
    ({"prompt": "a", "guidance_scale": "7"}, "guidance scale must be a number from"),
    ({"prompt": "a", "guidance_rescale": 2.0}, "rescale"),
    ({"prompt": "a", "guidance_rescale": NAN}, "rescale"),
    ({"prompt": "a", "guidance_rescale": 0.7, "apg": APG()}, "either rescaled or projected"),
    ({"prompt": "a", "guidance_interval": (5, 1)}, "0 <= low < high"),
    ({"prompt": "a", "guidance_interval": (1,)}, "0 <= low < high"),
    ({"prompt": "a", "guidance_interval": 5}, "0 <= low < high"),
    ({"prompt": "a", "guidance_interval": ("a", "b")}, "0 <= low < high"),
    ({"prompt": "a", "guidance_scale": 1e30}, "guidance scale must be a number from"),
    ({"prompt": "a", "apg": 0.5}, "sdkit.guidance.APG"),
    ({"prompt": "a", "spacing": ""}, "spacing '' is not one of"),
    ({"prompt": "a", "height": 0, "latents": torch.zeros(1, 4, 2, 2)}, "must be a whole number from 8 to 16384"),
    ({"prompt": "a", "guidance_interval": (NAN, 1)}, "0 <= low < high"),
    ({"prompt": "a", "sampler": "plms"}, "sampler 'plms' is not one of 'ddim', 'ddpm', 'euler', 'euler_a'"),
    ({"prompt": "a", "sampler": ["ddim"]}, "is not one of"),
    ({"prompt": "a", "spacing": "even"}, "spacing 'even' is not one of"),
    ({"prompt": "a", "eta": 1.5}, "eta must be a number from 0 to 1"),
    ({"prompt": "a", "eta": NAN}, "eta must be a number from 0 to 1"),
    ({"prompt": "a", "eta": 0.5, "sampler": "ddpm"}, "eta belongs to sampler 'ddim'"),
    ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
    ({"prompt": "a", "seed": 2**63}, "seed must be a whole number from 0"),
    ({"prompt": "a", "seed": 1.5}, "seed must be a whole number from 0"),
    ({"prompt": "a", "seed": None}, "seed must be a whole number from 0"),
    ({"prompt": "a", "seed": [1, 2]}, "2 seeds cannot serve 1 images"),
    ({"prompt": "a", "seed": torch.tensor(1.5)}, "seed must be a whole number from 0"),
    ({"prompt": "a", "seed": np.array(-1)}, "seed must be a whole number from 0"),
    ({"prompt": "a", "callback": 3}, "callback must be a function of a Step, not 3"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be"),
    ({"prompt": "a", "num_images_per_prompt": 1.5}, "num_images_per_prompt must be"),
    ({"prompt": "a", "latents": torch.zeros(2, 4, 16, 16)}, "of shape (1, 4, 16, 16)"),
    ({"prompt": "a", "latents": torch.zeros(4, 16, 16)}, "latents must be a tensor (N, 4, h, w)"),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 16, 16) + NAN}, "finite"),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 8), "height": 128}, "of shape (1, 4, 16, 8)"),
    ({"prompt": "a", "latents": "noise"}, "latents must be"),
    ({"prompt": "a", "output_type": "gif"}, "output_type 'gif' is not one of"),
    ({"prompt": "a", "clip_skip": 4}, "clip_skip must be a whole number from 0 to 3"),
    ({"prompt": "a", "clip_skip": -1}, "clip_skip must be a whole number from 0 to 3"),
    ({"prompt": "a", "batch_size": 0}, "batch_size must be a whole number of at least 1"),
]


def one_sentence(run: Callable[[], object], fragment: str) -> None:
    with pytest.raises(sdkit.SdkitError) as caught:
        run()
    message = str(caught.value)
    assert fragment in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("part", [sdkit.StableDiffusion, sdkit.VAE, sdkit.TextEncoder, sdkit.UNet])
@pytest.mark.parametrize(("arguments", "fragment"), FROM_PRETRAINED, ids=str)
def test_from_pretrained(part: Any, arguments: dict[str, Any], fragment: str) -> None:
    one_sentence(lambda: part.from_pretrained(**arguments), fragment)


@pytest.mark.parametrize(("arguments", "fragment"), [case for case in FROM_PRETRAINED if len(case[0]) == 1], ids=str)
def test_schedule_from_pretrained(arguments: dict[str, Any], fragment: str) -> None:
    one_sentence(lambda: load_schedule(**arguments), fragment)


@pytest.mark.parametrize("case", range(len(ENCODE)))
def test_encode(sd: sdkit.StableDiffusion, case: int) -> None:
    images, options, fragment = ENCODE[case]
    one_sentence(lambda: sd.vae.encode(images, **options), fragment)


@pytest.mark.parametrize("case", range(len(DECODE)))
def test_decode(sd: sdkit.StableDiffusion, case: int) -> None:
    z, options, fragment = DECODE[case]
    one_sentence(lambda: sd.vae.decode(z, **options), fragment)


@pytest.mark.parametrize("case", range(len(CALL)))
def test_call(sd: sdkit.StableDiffusion, case: int) -> None:
    arguments, fragment = CALL[case]
    one_sentence(lambda: sd(**{"num_inference_steps": 2, **arguments}), fragment)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: sdkit.NoiseSchedule.from_betas([]), "betas must be"),
        (lambda: sdkit.NoiseSchedule.from_betas([0.1, 1.5]), "betas must be"),
        (lambda: sdkit.NoiseSchedule.from_betas([NAN]), "betas must be"),
        (lambda: sdkit.NoiseSchedule.from_betas([0.0, 0.1]), "betas must be above 0"),
        (lambda: sdkit.NoiseSchedule.from_betas([0.1, 1.0, 0.1]), "only the last may be 1"),
        (lambda: sdkit.NoiseSchedule.linear(-5), "num_timesteps must be"),
        (lambda: sdkit.NoiseSchedule.linear(steps_offset=-5), "steps_offset must be"),
        (lambda: sdkit.NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}), "FlowMatch"),
        (lambda: sdkit.NoiseSchedule.linear(prediction_type="noise"), "prediction_type 'noise' is not one of"),
        (lambda: sdkit.NoiseSchedule.linear(variance_type="learned"), "variance_type 'learned' is not one of"),
        (
            lambda: sdkit.NoiseSchedule.from_config({"beta_schedule": "quadratic"}),
            "beta_schedule 'quadratic' is not one of",
        ),
        (lambda: sdkit.NoiseSchedule.from_config({"thresholding": True}), "dynamic thresholding"),
        (lambda: sdkit.NoiseSchedule.linear().snr(1000), "from 0 to 999"),
        (lambda: sdkit.NoiseSchedule.linear().add_noise(torch.zeros(1), torch.zeros(1), -1), "from 0 to 999"),
        (lambda: APG(norm_threshold=-1), "norm_threshold"),
        (lambda: APG(momentum=NAN), "momentum"),
    ],
)
def test_schedule_and_settings(make: Callable[[], object], fragment: str) -> None:
    one_sentence(make, fragment)


def test_a_vae_of_another_kind_of_network(sd: sdkit.StableDiffusion) -> None:
    one_sentence(lambda: VAE(sd.unet.network), "not a VAE")
