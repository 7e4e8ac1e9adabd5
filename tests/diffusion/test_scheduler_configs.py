"""Scheduler configs as in Stable Diffusion repositories, with each key left out in turn.

They are compared with the scheduler that diffusers' StableDiffusionPipeline holds after construction, and with its
latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers.schedulers
import numpy as np
import pytest
import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

import sdkit
from sdkit.diffusion.schedule import SCHEDULERS
from sdkit.errors import SourceError
from tests.helpers.loaders import load_schedule
from tests.helpers.networks import diffusers_pipeline

# Heun and others warn with NumPy 2, and the pipeline warns when it corrects a config.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__ must:DeprecationWarning",
    "ignore:The configuration file of this:FutureWarning",
)  # fmt: skip

NOT_FOR_PIPELINES = {
    "RePaintScheduler": "inpaints pixels",
    "UnCLIPScheduler": "is of unCLIP's models",
    "DDIMInverseScheduler": "goes from images to noise",
    "DPMSolverMultistepInverseScheduler": "goes from images to noise",
}
SDE = "DPMSolverSDEScheduler"  # needs torchsde to be constructed
SHIPPED = [name for name in SCHEDULERS if name not in (*NOT_FOR_PIPELINES, SDE)]
STATED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
LEADING = STATED | {"timestep_spacing": "leading"}
CONFIGS = {
    "all stated": STATED,
    "leading": LEADING,
    **{
        f"without {key}": {name: value for name, value in STATED.items() if name != key}
        for key in ("clip_sample", "set_alpha_to_one", "timestep_spacing", "prediction_type", "beta_schedule")
    },
    "without betas": {name: value for name, value in STATED.items() if not name.startswith("beta_")},
    "without trained_betas": {name: value for name, value in STATED.items() if name != "trained_betas"},
    "trained_betas": STATED | {"trained_betas": [1e-4 + 1e-5 * i for i in range(1000)]},
    "without steps_offset": {name: value for name, value in LEADING.items() if name != "steps_offset"},
    "steps_offset 0": LEADING | {"steps_offset": 0},
    "offset, as in 2022": {name: value for name, value in LEADING.items() if name != "steps_offset"} | {"offset": 0},
    "clip_sample true": STATED | {"clip_sample": True},
}
STEPS = 3
X_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class RightDDIM(diffusers.schedulers.DDIMScheduler):
    """diffusers' DDIM, but with the previous timestep taken from its own list of timesteps.

    diffusers takes t - T // n, which differs with "linspace", and with "trailing" if n does not divide T (issues 9261
    and 11347).
    """

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        later = [int(t) for t in self.timesteps if t < timestep]
        gap = int(timestep) - (later[0] if later else -1)
        self.register_to_config(num_train_timesteps=gap * self.num_inference_steps)
        return super().step(model_output, timestep, sample, **kwargs)


@pytest.fixture(scope="module")
def parts(sd: sdkit.StableDiffusion) -> sdkit.StableDiffusion:
    """Make a model with the smallest U-Net that attends to the prompt. The schedule does not depend on its blocks."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=sd.text.width,
    )  # fmt: skip
    return sdkit.StableDiffusion(sd.vae, sd.text, sdkit.UNet(unet.eval()), sd.schedule)


def written(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """Write a scheduler config into a folder."""
    (folder / "scheduler").mkdir()
    text = json.dumps({"_class_name": name, **config})
    (folder / "scheduler" / "scheduler_config.json").write_text(text)
    return folder


def pipeline_of(parts: sdkit.StableDiffusion, folder: Path, name: str) -> Any:
    """Build diffusers' pipeline with the scheduler of the folder."""
    scheduler = getattr(diffusers.schedulers, name).from_pretrained(folder, subfolder="scheduler")
    return diffusers_pipeline(parts, scheduler)


def held(pipe: Any, cls: Any, **changes: Any) -> Any:
    """Make a scheduler of another class from the values of the pipeline's own, including those that are
    its defaults.
    """
    config = {key: value for key, value in pipe.scheduler.config.items() if key != "_use_default_values"}
    return cls.from_config(config | changes)


def ours(parts: sdkit.StableDiffusion, schedule: sdkit.NoiseSchedule, **kwargs: Any) -> Tensor:
    sd = sdkit.StableDiffusion(parts.vae, parts.text, parts.unet, schedule)
    z: Tensor = sd("a cat", latents=X_T, num_inference_steps=STEPS, guidance_scale=5, output_type="latent", **kwargs)
    return z


def theirs(parts: sdkit.StableDiffusion, scheduler: Any, **kwargs: Any) -> Tensor:
    pipe = diffusers_pipeline(parts, scheduler)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent", **kwargs}
    z: Tensor = pipe("a cat", latents=X_T.clone(), **options).images
    return z


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("case", CONFIGS)
def test_schedule_and_ddim_latents_are_those_of_diffusers(
    parts: sdkit.StableDiffusion, tmp_path: Path, name: str, case: str
) -> None:
    folder = written(tmp_path, name, CONFIGS[case])
    schedule = load_schedule(folder)
    pipe = pipeline_of(parts, folder, name)
    config = pipe.scheduler.config
    np.testing.assert_allclose(schedule.alphas_cumprod, pipe.scheduler.alphas_cumprod.double(), rtol=2e-5, atol=1e-6)
    assert schedule.prediction_type == config.prediction_type
    # The single-step solver has no such key; its timesteps have linspace spacing.
    assert schedule.timestep_spacing == config.get("timestep_spacing", "linspace")
    assert schedule.steps_offset == config.get("steps_offset", 1) == 1
    assert schedule.clip_x0 is None
    assert config.get("clip_sample", False) is False
    final = getattr(pipe.scheduler, "final_alpha_cumprod", None)
    if final is not None:  # the solvers of the other classes end without noise, and ignore set_alpha_to_one
        assert schedule.final_alpha_cumprod == pytest.approx(float(final), rel=1e-5)
    spacing = {"timestep_spacing": schedule.timestep_spacing}
    expected = theirs(parts, held(pipe, RightDDIM, **spacing))
    torch.testing.assert_close(ours(parts, schedule), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
@pytest.mark.parametrize("case", CONFIGS)
def test_ddpm_latents_are_those_of_diffusers(
    parts: sdkit.StableDiffusion, tmp_path: Path, name: str, case: str
) -> None:
    folder = written(tmp_path, name, CONFIGS[case])
    schedule = load_schedule(folder)
    pipe = pipeline_of(parts, folder, name)
    generator = torch.Generator().manual_seed(3)
    torch.randn(X_T.shape[1:], generator=generator)  # sdkit draws x_T first, even if it is given
    expected = theirs(parts, pipe.scheduler, generator=generator)
    torch.testing.assert_close(ours(parts, schedule, sampler="ddpm", seed=3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_dpm_solver_latents_are_those_of_diffusers(parts: sdkit.StableDiffusion, tmp_path: Path, case: str) -> None:
    """Both use our timesteps. Otherwise diffusers' solver takes n + 1 of them for "leading" and "linspace", and drops
    the last.
    """
    name = "DPMSolverMultistepScheduler"
    folder = written(tmp_path, name, CONFIGS[case])
    schedule = load_schedule(folder)
    pipe = pipeline_of(parts, folder, name)
    timesteps = [t for t, _ in schedule.timesteps(STEPS)]
    expected = theirs(parts, pipe.scheduler, timesteps=timesteps)
    torch.testing.assert_close(ours(parts, schedule, sampler="dpm++2m"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_zero_terminal_snr(parts: sdkit.StableDiffusion, tmp_path: Path, name: str) -> None:
    """PNDM, LMS, and others ignore the key, although it states how the model was trained. The schedule is DDIM's for
    all.
    """
    folder = written(tmp_path, name, STATED | {"rescale_betas_zero_snr": True})
    pipe = pipeline_of(parts, folder, name)
    schedule = load_schedule(folder)
    expected = theirs(parts, held(pipe, RightDDIM, rescale_betas_zero_snr=True))
    torch.testing.assert_close(ours(parts, schedule), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NOT_FOR_PIPELINES)
def test_tables_of_schedulers_for_other_pipelines(name: str) -> None:
    theirs = getattr(diffusers.schedulers, name)()
    schedule = sdkit.NoiseSchedule.from_config({"_class_name": name})
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-6)
    assert (schedule.clip_x0 is not None) == theirs.config.get("clip_sample", False)


def test_the_table_of_the_sde_solver() -> None:
    """The SDE solver's arguments have the same defaults as Heun's."""
    sde, heun = (sdkit.NoiseSchedule.from_config({"_class_name": name}) for name in (SDE, "HeunDiscreteScheduler"))
    assert torch.equal(sde.betas, heun.betas)
    assert sde.timestep_spacing == heun.timestep_spacing


@pytest.mark.parametrize(
    ("name", "beta_schedule"),
    [
        *(("DDPMScheduler", kind) for kind in ("sigmoid", "laplace", "squaredcos_cap_v2", "linear")),
        ("HeunDiscreteScheduler", "exp"),
    ],
)
@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_beta_schedules(name: str, beta_schedule: str, num_timesteps: int) -> None:
    config = {"beta_schedule": beta_schedule, "num_train_timesteps": num_timesteps}
    theirs = getattr(diffusers.schedulers, name)(**config)
    betas = sdkit.NoiseSchedule.from_config({"_class_name": name, **config}).betas
    np.testing.assert_allclose(betas, theirs.betas.double(), rtol=1e-5, atol=1e-7)


OTHERS = sorted(
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and isinstance(getattr(diffusers.schedulers, name), type) and name not in SCHEDULERS
)


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_with_tables_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(sdkit.SdkitError, match=f"^a schedule of {name} is not one of Stable Diffusion"):
        sdkit.NoiseSchedule.from_config({"_class_name": name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_flow_sigmas": True}, "flow matching"),
        ({"thresholding": True}, "dynamic thresholding"),
        ({"clip_sample": "no"}, "^clip_sample must be True or False, not 'no'"),
        ({"set_alpha_to_one": 1}, "^set_alpha_to_one must be True or False, not 1"),
        ({"rescale_betas_zero_snr": "true"}, "^rescale_betas_zero_snr must be True or False"),
        ({"beta_schedule": ["linear"]}, "^beta_schedule .* is not one of 'linear', 'scaled_linear'"),
        ({"num_train_timesteps": 10**12}, "^num_train_timesteps must be a whole number from 1 to 1000000"),
        ({"beta_start": "0.1"}, "^beta_start must be a number from 0 to 1"),
        ({"trained_betas": ["0.1"]}, "^trained_betas must be a number from 0 to 1"),
        ({"trained_betas": 0.1}, "^trained_betas must be a list of numbers"),
        ({"timestep_spacing": 3}, "^timestep_spacing 3 is not one of"),
        ({"_class_name": ["DDIMScheduler"]}, "^a schedule of .* cannot be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_another_type_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(sdkit.SdkitError, match=message):
        sdkit.NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", **STATED, **change})


def test_a_config_of_pixels_is_taken_as_it_is_and_null_as_left_out() -> None:
    nothing = dict.fromkeys(("clip_sample", "steps_offset", "prediction_type", "timestep_spacing", "beta_schedule"))
    schedule = sdkit.NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **nothing})
    assert (schedule.clip_x0, schedule.steps_offset, schedule.prediction_type) == (1.0, 0, "epsilon")
    latents = sdkit.NoiseSchedule.from_config({"_class_name": "DDPMScheduler"}, latents=True)
    assert (latents.clip_x0, latents.steps_offset) == (None, 1)


@pytest.mark.parametrize("name", SHIPPED)
def test_configs_as_diffusers_writes_them_are_read(tmp_path: Path, name: str) -> None:
    # Some configs have a lambda_min_clipped of -inf.
    getattr(diffusers.schedulers, name)().save_pretrained(tmp_path / "scheduler")
    theirs = getattr(diffusers.schedulers, name).from_pretrained(tmp_path, subfolder="scheduler")
    schedule = load_schedule(tmp_path)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["beta_start", "beta_end", "clip_sample_range"])
def test_values_that_are_not_finite_are_refused_where_they_are_read(tmp_path: Path, key: str) -> None:
    folder = written(tmp_path, "DDIMScheduler", STATED | {key: float("nan")})
    with pytest.raises(SourceError, match=f"has {key} nan"):
        load_schedule(folder)
