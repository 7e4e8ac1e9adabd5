"""Latent files: public names of `sdkit.data.latent_file`."""

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
