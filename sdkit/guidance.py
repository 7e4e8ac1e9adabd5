"""Guidance: public names of `sdkit.diffusion.guidance`."""

from __future__ import annotations

from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.guidance import (
    APG,
    Model,
    apg,
    cfg,
    cfg_with_image,
    classifier,
    energy,
    guided,
    rescale,
)
from sdkit.diffusion.schedule import Predict

__all__ = [
    "APG",
    "Conditioning",
    "Model",
    "Predict",
    "apg",
    "cfg",
    "cfg_with_image",
    "classifier",
    "energy",
    "guided",
    "rescale",
]
