"""The noise schedule that a run trains with, and the scheduler that it exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sdkit
from sdkit.training import UNetConfig
from sdkit.training.stages.unet import UNetStage
from tests.helpers import tiny
from tests.helpers.loaders import load_schedule

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this:FutureWarning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a model and photos."""
    folder = tmp_path_factory.mktemp("scheduler")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 4)
    return folder


def stage_of(parts: Path, out: Path, scheduler: dict[str, Any], **settings: Any) -> UNetStage:
    (parts / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return UNetStage(UNetConfig(model=str(parts / "model"), data=str(parts / "photos"), out_dir=str(out), **settings))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DDIMParallelScheduler"])
def test_latents_are_neither_clipped_in_training_nor_by_what_is_exported(
    parts: Path, tmp_path: Path, name: str
) -> None:
    stage = stage_of(parts, tmp_path / "run", {"_class_name": name, "beta_schedule": "scaled_linear"})
    stage.export(tmp_path / "result")
    written = json.loads((tmp_path / "result" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["_class_name"], written["steps_offset"]) == (name, 1)
    assert not written.get("clip_sample")
    exported = load_schedule(tmp_path / "result")
    for schedule in (stage.schedule, exported):
        assert (schedule.clip_x0, schedule.steps_offset) == (None, 1)
    assert torch.equal(exported.betas, stage.schedule.betas)
    assert exported.timestep_spacing == stage.schedule.timestep_spacing


@pytest.mark.parametrize("name", ["LCMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
def test_another_scheduler_has_the_table_and_the_spacing_of_the_model(parts: Path, tmp_path: Path, name: str) -> None:
    """x0-prediction is exported as DDIM, which has other defaults than the model's scheduler. They must not change the
    table or the spacing.
    """
    before = sdkit.NoiseSchedule.from_config({"_class_name": name}, latents=True)
    stage = stage_of(parts, tmp_path / "run", {"_class_name": name}, prediction_type="sample")
    stage.export(tmp_path / "result")
    written = json.loads((tmp_path / "result" / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDIMScheduler"
    for schedule in (stage.schedule, load_schedule(tmp_path / "result")):
        assert schedule.prediction_type == "sample"
        assert torch.equal(schedule.betas, before.betas)
        for field in ("timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_x0"):
            assert getattr(schedule, field) == getattr(before, field)


def test_a_unet_that_takes_the_guidance_scale_is_not_trained(parts: Path, tmp_path: Path) -> None:
    folder = tiny.model(tmp_path / "model")
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder / "unet") | {"time_cond_proj_dim": 8}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    settings = UNetConfig(model=str(folder), data=str(parts / "photos"), out_dir=str(tmp_path / "run"))
    with pytest.raises(sdkit.ArgumentError, match=r"takes the guidance scale as an input .* cannot be trained"):
        UNetStage(settings)
