"""Training: functions such as `train_unet`, each of which takes its settings as one value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdkit.lazy import attributes

if TYPE_CHECKING:
    from sdkit.training.settings import (
        ClassifierConfig,
        ClipConfig,
        ControlNetConfig,
        EmbeddingConfig,
        ImagePriorConfig,
        PriorConfig,
        UNetConfig,
        VAEConfig,
        VQVAE2Config,
    )
    from sdkit.training.signals import TrainingStopped
    from sdkit.training.stages.classifier import train_classifier
    from sdkit.training.stages.clip import train_clip
    from sdkit.training.stages.controlnet import train_controlnet
    from sdkit.training.stages.embedding import train_embedding
    from sdkit.training.stages.image_prior import train_image_prior
    from sdkit.training.stages.prior import train_prior
    from sdkit.training.stages.unet import train_unet
    from sdkit.training.stages.vae import train_vae
    from sdkit.training.stages.vqvae2 import train_vqvae2

__all__ = [
    "ClassifierConfig",
    "ClipConfig",
    "ControlNetConfig",
    "EmbeddingConfig",
    "ImagePriorConfig",
    "PriorConfig",
    "TrainingStopped",
    "UNetConfig",
    "VAEConfig",
    "train_classifier",
    "train_clip",
    "VQVAE2Config",
    "train_controlnet",
    "train_embedding",
    "train_image_prior",
    "train_prior",
    "train_unet",
    "train_vae",
    "train_vqvae2",
]

_HOMES = {
    "ClassifierConfig": "sdkit.training.settings",
    "ClipConfig": "sdkit.training.settings",
    "ControlNetConfig": "sdkit.training.settings",
    "EmbeddingConfig": "sdkit.training.settings",
    "ImagePriorConfig": "sdkit.training.settings",
    "PriorConfig": "sdkit.training.settings",
    "TrainingStopped": "sdkit.training.signals",
    "UNetConfig": "sdkit.training.settings",
    "VAEConfig": "sdkit.training.settings",
    "train_classifier": "sdkit.training.stages.classifier",
    "train_clip": "sdkit.training.stages.clip",
    "VQVAE2Config": "sdkit.training.settings",
    "train_controlnet": "sdkit.training.stages.controlnet",
    "train_embedding": "sdkit.training.stages.embedding",
    "train_image_prior": "sdkit.training.stages.image_prior",
    "train_prior": "sdkit.training.stages.prior",
    "train_unet": "sdkit.training.stages.unet",
    "train_vae": "sdkit.training.stages.vae",
    "train_vqvae2": "sdkit.training.stages.vqvae2",
}

if not TYPE_CHECKING:  # hidden from type checkers, so that they use the imports above and find a misspelt name
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
