"""Samplers: public names of `sdkit.diffusion.samplers`."""

from __future__ import annotations

from sdkit.diffusion.samplers import (
    SAMPLERS,
    Generators,
    Sampler,
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
    sampler_by_name,
)

__all__ = [
    "Generators",
    "SAMPLERS",
    "Sampler",
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
    "sampler_by_name",
]
