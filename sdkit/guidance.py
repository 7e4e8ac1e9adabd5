"""Guidance: public names of `sdkit.diffusion.guidance`, and energies of `sdkit.networks.energies`."""

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
from sdkit.networks.energies import Energy, image_energy, style_energy, text_energy

__all__ = [
    "APG",
    "Conditioning",
    "Energy",
    "Model",
    "Predict",
    "apg",
    "cfg",
    "cfg_with_image",
    "classifier",
    "energy",
    "guided",
    "image_energy",
    "rescale",
    "style_energy",
    "text_energy",
]
