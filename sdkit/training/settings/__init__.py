"""Settings of each stage: everything that a run depends on, saved in its config.json.

Importing this package does not load PyTorch.
"""

from __future__ import annotations

from sdkit.training.settings.classifier import ClassifierConfig
from sdkit.training.settings.clip import ClipConfig
from sdkit.training.settings.controlnet import CONDITIONS, ControlNetConfig
from sdkit.training.settings.denoising import DenoisingSettings
from sdkit.training.settings.dreambooth import DreamBoothSettings
from sdkit.training.settings.embedding import TEMPLATES, EmbeddingConfig
from sdkit.training.settings.image_prior import ImagePriorConfig
from sdkit.training.settings.loop import LR_SCHEDULERS, LoopSettings
from sdkit.training.settings.metric import METRICS, Metric
from sdkit.training.settings.prior import LEVELS, PRIOR_CONDITIONS, PRIORS, PriorConfig
from sdkit.training.settings.stage import AUGMENTATIONS, StageSettings
from sdkit.training.settings.unet import CONDITION_KINDS, LOSSES, NOISE_SCHEDULES, TIMESTEPS, UNetConfig
from sdkit.training.settings.vae import LPIPS_VARIABLE, RECONSTRUCTIONS, REGULARIZERS, VAEConfig
from sdkit.training.settings.vqvae2 import VQVAE2Config

__all__ = [
    "AUGMENTATIONS",
    "CONDITIONS",
    "CONDITION_KINDS",
    "ClassifierConfig",
    "ClipConfig",
    "ControlNetConfig",
    "DenoisingSettings",
    "DreamBoothSettings",
    "EmbeddingConfig",
    "ImagePriorConfig",
    "LEVELS",
    "LOSSES",
    "LPIPS_VARIABLE",
    "LR_SCHEDULERS",
    "LoopSettings",
    "METRICS",
    "Metric",
    "NOISE_SCHEDULES",
    "PRIORS",
    "PRIOR_CONDITIONS",
    "PriorConfig",
    "RECONSTRUCTIONS",
    "REGULARIZERS",
    "StageSettings",
    "TEMPLATES",
    "TIMESTEPS",
    "UNetConfig",
    "VAEConfig",
    "VQVAE2Config",
]
