"""Samplers, as `sdkit.samplers`: see `sdkit.diffusion.samplers`."""

from __future__ import annotations

from sdkit.diffusion.samplers import (
    SAMPLERS,
    Generators,
    Step,
    Timesteps,
    clip,
    ddim,
    ddim_step,
    ddpm,
    ddpm_step,
    dpmpp_2m,
    dpmpp_2m_step,
    half_log_snr,
    noise_like,
)

__all__ = [
    "Generators",
    "SAMPLERS",
    "Step",
    "Timesteps",
    "clip",
    "ddim",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "dpmpp_2m",
    "dpmpp_2m_step",
    "half_log_snr",
    "noise_like",
]
