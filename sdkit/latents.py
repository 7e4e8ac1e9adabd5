"""Latents: public names for latent files, statistics, interpolation, and previews."""

from __future__ import annotations

from sdkit.data.latent_file import (
    Latent,
    check_vae,
    load,
    save,
)
from sdkit.diffusion.latent_space import Statistics, lerp, slerp, statistics
from sdkit.networks.preview import RGBMap, fit_rgb_map, previewer, rgb_map_of

__all__ = [
    "Latent",
    "RGBMap",
    "Statistics",
    "check_vae",
    "fit_rgb_map",
    "lerp",
    "load",
    "previewer",
    "rgb_map_of",
    "save",
    "slerp",
    "statistics",
]
