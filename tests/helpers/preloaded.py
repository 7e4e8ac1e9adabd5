"""Imports the libraries once for all processes that are forked; see `forks`."""

from __future__ import annotations

import gc

import accelerate.tracking  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
from diffusers import (  # noqa: F401
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from sdkit.training.stages import drawing
from tests.data import cache_job, kill_job  # noqa: F401
from tests.helpers import VALIDATION_STEPS, forks, runs, sharded, tiny, toy  # noqa: F401

drawing.VALIDATION_STEPS = VALIDATION_STEPS
gc.freeze()  # children's garbage collection skips the libraries' objects, which saves a third of their time
