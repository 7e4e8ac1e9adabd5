"""Samplers: from noise x_T to a sample. Each method has a pure step function and a generator that loops over it.

All loops have one signature, `sampler(predict, x_T, schedule, timesteps, *, generators=None, **options)`. They yield a
`Step` after each step, so that progress bars, previews, and early stopping belong to the caller. `predict(x_t, t)`
returns a `Prediction`: samplers never see the model's parameterisation. `timesteps` are pairs from
`schedule.timesteps(n)`. `generators` holds one CPU generator for each image, the source of all of that image's noise.

In the step functions, `alpha` is alphas_cumprod at t, and `alpha_prev` at t_prev (the papers' alpha-bar).
"""

from __future__ import annotations

from functools import partial

from sdkit.arguments import one_of
from sdkit.diffusion.samplers.common import (
    Generators,
    Sampler,
    Step,
    Timesteps,
    checked_eta,
    clip,
    noise_like,
)
from sdkit.diffusion.samplers.consistency import lcm, lcm_step, tcd, tcd_step
from sdkit.diffusion.samplers.dpm_solver import (
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_step,
    dpmpp_sde,
    dpmpp_sde_step,
    half_log_snr,
    unic_step,
    unipc,
)
from sdkit.diffusion.samplers.edm import euler, euler_ancestral, heun, heun_step
from sdkit.diffusion.samplers.first_order import ddim, ddim_step, ddpm, ddpm_step
from sdkit.errors import ArgumentError

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
    "default_spacing",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2m_step",
    "dpmpp_sde",
    "dpmpp_sde_step",
    "euler",
    "euler_ancestral",
    "half_log_snr",
    "heun",
    "heun_step",
    "lcm",
    "lcm_step",
    "noise_like",
    "sampler_by_name",
    "tcd",
    "tcd_step",
    "unic_step",
    "unipc",
]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "dpm++2m_sde": dpmpp_2m_sde,
    "dpm++sde": dpmpp_sde,
    "unipc": unipc,
    "lcm": lcm,
    "tcd": tcd,
}
WITH_ETA = ("ddim", "tcd")
"""Samplers that take `eta`, the share of fresh noise."""


def sampler_by_name(name: str, *, eta: float = 0.0) -> Sampler:
    """Return the sampler called `name`, with `eta` bound to it.

    Args:
        name: A key of `SAMPLERS`.
        eta: Share of fresh noise, in [0, 1], of "ddim" and "tcd"; that of other samplers is fixed.

    Raises:
        ArgumentError: The name is unknown, or the sampler takes no `eta`.
    """
    one_of("sampler", name, SAMPLERS)
    eta = checked_eta(eta)
    if name in WITH_ETA:
        return partial(SAMPLERS[name], eta=eta)
    if eta:
        raise ArgumentError(f"eta belongs to sampler 'ddim' or 'tcd'; '{name}' has none.")
    return SAMPLERS[name]


def default_spacing(name: str) -> str | None:
    """Return the spacing of timesteps that sampler `name` needs, or None where the schedule's own serves."""
    return "lcm" if name in ("lcm", "tcd") else None
