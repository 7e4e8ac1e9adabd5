"""sdkit: encode and decode images, generate images from prompts, and fine-tune Stable Diffusion 1.x and 2.x.

    images = vae.decode(vae.encode("photo.jpg"))                # vae = sdkit.VAE.from_pretrained("emoji")
    images = sd("a red apple on a blue background", seed=1)     # sd = sdkit.StableDiffusion.from_pretrained("emoji")
    run = sdkit.training.train_unet(sdkit.training.UNetConfig(data="photos", out_dir="run", lora_rank=16))

Importing the package loads no heavy library: a module is imported when one of its names is first used (PEP 562).
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
    from sdkit import data, evaluation, guidance, images, latents, metrics, samplers, training
    from sdkit.data.latent_file import Latent
    from sdkit.diffusion.samplers import Step
    from sdkit.diffusion.schedule import NoiseSchedule, Prediction
    from sdkit.networks.autoencoder import VAE
    from sdkit.networks.classifier import Classifier
    from sdkit.networks.controlnet import ControlNet
    from sdkit.networks.denoiser import UNet
    from sdkit.networks.text_encoder import TextEncoder
    from sdkit.pipelines.cascade import Cascade
    from sdkit.pipelines.text_to_image import StableDiffusion
    from sdkit.pipelines.tokens import TokenPipeline
    from sdkit.pipelines.unclip import UnCLIP

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CacheError",
    "Cascade",
    "Classifier",
    "ControlNet",
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
    "TokenPipeline",
    "TrainingError",
    "UNet",
    "UnCLIP",
    "VAE",
    "__version__",
    "data",
    "evaluation",
    "guidance",
    "images",
    "latents",
    "metrics",
    "samplers",
    "training",
]

_MODULES = ("data", "evaluation", "guidance", "images", "latents", "metrics", "samplers", "training")
_HOMES = {
    **{name: f"sdkit.{name}" for name in _MODULES},
    "Cascade": "sdkit.pipelines.cascade",
    "Classifier": "sdkit.networks.classifier",
    "ControlNet": "sdkit.networks.controlnet",
    "Latent": "sdkit.data.latent_file",
    "NoiseSchedule": "sdkit.diffusion.schedule",
    "Prediction": "sdkit.diffusion.schedule",
    "StableDiffusion": "sdkit.pipelines.text_to_image",
    "Step": "sdkit.diffusion.samplers",
    "TextEncoder": "sdkit.networks.text_encoder",
    "TokenPipeline": "sdkit.pipelines.tokens",
    "UNet": "sdkit.networks.denoiser",
    "UnCLIP": "sdkit.pipelines.unclip",
    "VAE": "sdkit.networks.autoencoder",
}

if not TYPE_CHECKING:  # a type checker that sees a `__getattr__` accepts any name, misspelt ones too
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
