"""Latent files, as `sdkit.latents`: see `sdkit.data.latent_file`."""

from __future__ import annotations

from sdkit.data.latent_file import (
    Latent,
    check_vae,
    load,
    save,
)

__all__ = [
    "Latent",
    "check_vae",
    "load",
    "save",
]
