"""sdkit: encode and decode images, make them from text, and fine-tune, with Stable Diffusion 1.x / 2.x.

    images = vae.decode(vae.encode("photo.jpg"))                # vae = sdkit.VAE.from_pretrained("emoji")
    images = sd("a red apple on a blue background", seed=1)     # sd = sdkit.StableDiffusion.from_pretrained("emoji")
    run = sdkit.training.train_unet(sdkit.training.UNetConfig(data="photos", out_dir="run", lora_rank=16))

Importing the package loads no heavy library: each room is imported when one of its names is first used (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdkit.errors import (
    ArgumentError,
    CacheError,
    DataError,
    ImageError,
    LatentError,
    SdkitError,
    SourceError,
    TrainingError,
)
from sdkit.lazy import attributes

if TYPE_CHECKING:
    from sdkit import data, guidance, images, latents, metrics, samplers, training
    from sdkit.latents import Latent
    from sdkit.models.text import TextEncoder
    from sdkit.models.unet import UNet
    from sdkit.models.vae import VAE
    from sdkit.pipeline import StableDiffusion
    from sdkit.samplers import Step
    from sdkit.schedule import NoiseSchedule, Prediction

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CacheError",
    "DataError",
    "ImageError",
    "Latent",
    "LatentError",
    "NoiseSchedule",
    "Prediction",
    "SdkitError",
    "SourceError",
    "StableDiffusion",
    "Step",
    "TextEncoder",
    "TrainingError",
    "UNet",
    "VAE",
    "__version__",
    "data",
    "guidance",
    "images",
    "latents",
    "metrics",
    "samplers",
    "training",
]

_MODULES = ("data", "guidance", "images", "latents", "metrics", "samplers", "training")
_HOMES = {
    **{name: f"sdkit.{name}" for name in _MODULES},
    "Latent": "sdkit.latents",
    "NoiseSchedule": "sdkit.schedule",
    "Prediction": "sdkit.schedule",
    "StableDiffusion": "sdkit.pipeline",
    "Step": "sdkit.samplers",
    "TextEncoder": "sdkit.models.text",
    "UNet": "sdkit.models.unet",
    "VAE": "sdkit.models.vae",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and so finds a misspelt name
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
