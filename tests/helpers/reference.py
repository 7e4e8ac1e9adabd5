"""Float64 reference implementations in NumPy, written from the papers' formulas. They share no code with sdkit.

`a` is a value of alphas_cumprod (alpha-bar in DDPM, alpha in DDIM, alpha^2 in DPM-Solver++). `a_prev` is its value at
the timestep that is stepped to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear_betas(n: int, start: float, end: float) -> Array:
    """Evenly spaced betas of Ho et al. 2020 (arXiv 2006.11239), section 4."""
    return np.array([start + (end - start) * i / (n - 1) for i in range(n)])


def scaled_linear_betas(n: int, start: float, end: float) -> Array:
    """Betas with evenly spaced square roots, as in the code of latent diffusion (Rombach et al. 2022)."""
    return linear_betas(n, math.sqrt(start), math.sqrt(end)) ** 2


def cosine_betas(n: int, s: float = 0.008, max_beta: float = 0.999) -> Array:
    """Betas of the cosine schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""

    def f(t: float) -> float:
        return math.cos((t / n + s) / (1 + s) * math.pi / 2) ** 2

    return np.array([min(1 - f(i + 1) / f(i), max_beta) for i in range(n)])


def zero_terminal_snr(betas: Array) -> Array:
    """Return alphas_cumprod rescaled by Lin et al. 2023 (arXiv 2305.08891), Algorithm 1."""
    root = np.sqrt(np.cumprod(1 - betas))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def to_output(kind: str, x0: Array, eps: Array, a: float) -> Array:
    """Return the model output for x0 and eps. v as in Salimans & Ho 2022 (arXiv 2202.00512), appendix D."""
    return {"epsilon": eps, "sample": x0, "v_prediction": math.sqrt(a) * eps - math.sqrt(1 - a) * x0}[kind]


def from_output(kind: str, output: Array, x_t: Array, a: float) -> tuple[Array, Array]:
    """Solve x_t = sqrt(a) x0 + sqrt(1 - a) eps for (x0, eps), given a model's output of kind eps, x0, or v."""
    if kind == "epsilon":
        return (x_t - math.sqrt(1 - a) * output) / math.sqrt(a), output
    if kind == "sample":
        return output, (x_t - math.sqrt(a) * output) / math.sqrt(1 - a)
    return math.sqrt(a) * x_t - math.sqrt(1 - a) * output, math.sqrt(1 - a) * x_t + math.sqrt(a) * output


def ddim_step(x0: Array, eps: Array, a: float, a_prev: float, eta: float, noise: Array) -> Array:
    """Step of Song et al. 2021 (arXiv 2010.02502), eq. 12 with sigma of eq. 16."""
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
    return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma**2) * eps + sigma * noise


def ddpm_mean(x0: Array, x_t: Array, a: float, a_prev: float) -> Array:
    """Mean of q(x_prev | x_t, x0), Ho et al. 2020, eq. 7, where beta_t is 1 - a / a_prev."""
    alpha_t = a / a_prev
    return math.sqrt(a_prev) * (1 - alpha_t) / (1 - a) * x0 + math.sqrt(alpha_t) * (1 - a_prev) / (1 - a) * x_t


def ddpm_variance(kind: str, a: float, a_prev: float, raw: Array | float = 0.0) -> Array | float:
    """Variance of a DDPM step: the two fixed ones of Ho et al. 2020, section 3.2, or the learned one of Nichol &
    Dhariwal 2021, eq. 15, for a model output `raw` in [-1, 1].
    """
    beta = 1 - a / a_prev
    beta_tilde = (1 - a_prev) / (1 - a) * beta
    if kind == "learned_range":
        v = (np.asarray(raw) + 1) / 2
        return np.exp(v * math.log(beta) + (1 - v) * math.log(beta_tilde))
    return {"fixed_small": beta_tilde, "fixed_large": beta}[kind]


def dpmpp_2m(x0_of: Callable[[Array, int], Array], x: Array, a: Sequence[float]) -> list[Array]:
    """Run Lu et al. 2022 (arXiv 2211.01095), Algorithm 2, over alphas_cumprod a[0] < ... < a[M] and return its M
    samples.

    If the last a[M] is 1 (sigma = 0, lambda = inf), the last step is the first-order update. Its limit is the data
    prediction. If a[0] is 0, lambda is -inf there: the first step is the limit of the first-order update, and so is the
    second (r -> inf).
    """
    alpha, sigma = np.sqrt(np.array(a)), np.sqrt(1 - np.array(a))
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    samples: list[Array] = []
    before = x
    for i in range(1, len(a)):
        now = x0_of(x, i - 1)
        h = lam[i] - lam[i - 1]
        d = now
        if i > 1 and sigma[i] > 0:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * np.expm1(-h) * d
        samples.append(x)
        before = now
    return samples


def dpmpp_sde(
    x0_of: Callable[[Array, int], Array], x: Array, ts: tuple[int, int, int], alphas: Array, z: Sequence[Array]
) -> Array:
    """Step of k-diffusion's `sample_dpmpp_sde` with eta = 1, in its own coordinates, x / sqrt(a) at noise level sigma.

    `ts` are the timesteps of start, middle, and end. `z` is the noise of its Brownian motion in both halves.
    """
    sigma, sigma_s, sigma_next = (math.sqrt((1 - alphas[t]) / alphas[t]) for t in ts)

    def ancestral(start: float, end: float) -> tuple[float, float]:
        up = math.sqrt(end**2 * (start**2 - end**2) / start**2)
        return math.sqrt(end**2 - up**2), up

    y = x / math.sqrt(alphas[ts[0]])
    r = (math.log(sigma) - math.log(sigma_s)) / (math.log(sigma) - math.log(sigma_next))
    denoised = x0_of(x, ts[0])
    down, up = ancestral(sigma, sigma_s)
    y_2 = down / sigma * y - math.expm1(math.log(down) - math.log(sigma)) * denoised + up * z[0]
    denoised_2 = x0_of(y_2 * math.sqrt(alphas[ts[1]]), ts[1])
    down, up = ancestral(sigma, sigma_next)
    mixed = (1 - 1 / (2 * r)) * denoised + 1 / (2 * r) * denoised_2
    path = math.sqrt(sigma - sigma_s) * z[0] + math.sqrt(sigma_s - sigma_next) * z[1]
    whole = path / math.sqrt(sigma - sigma_next)
    y = down / sigma * y - math.expm1(math.log(down) - math.log(sigma)) * mixed + up * whole
    return y * math.sqrt(alphas[ts[2]])


def gaussian_x0(x_t: Array, a: float, mean: float, std: float) -> Array:
    """E[x0 | x_t] for x0 ~ N(mean, std^2): the exact data prediction (linear regression of x0 on x_t)."""
    return mean + math.sqrt(a) * std**2 / (a * std**2 + 1 - a) * (x_t - math.sqrt(a) * mean)


def gaussian_eps(x_t: Array, a: float, mean: float, std: float) -> Array:
    """E[eps | x_t] for x0 ~ N(mean, std^2). It equals -sqrt(1 - a) times the score."""
    return math.sqrt(1 - a) / (a * std**2 + 1 - a) * (x_t - math.sqrt(a) * mean)


def gaussian_flow(x_start: Array, a_start: float, a: float, mean: float, std: float) -> Array:
    """Solution of the probability-flow ODE, which preserves quantiles (Song et al. 2021, arXiv 2011.13456, eq. 13)."""
    ratio = math.sqrt((a * std**2 + 1 - a) / (a_start * std**2 + 1 - a_start))
    return math.sqrt(a) * mean + ratio * (x_start - math.sqrt(a_start) * mean)


def apg(
    uncond: Array, cond: Array, scale: float, eta: float, radius: float, momentum: float, average: Array | float
) -> tuple[Array, Array]:
    """Guide each image by Sadat et al. 2024 (arXiv 2410.02416), Algorithm 1. `radius=0` does not limit the norm."""
    delta = cond - uncond + momentum * average
    guided = np.empty_like(cond)
    for i in range(len(cond)):
        d, c = delta[i].ravel(), cond[i].ravel()
        norm = math.sqrt(float(d @ d))
        if 0 < radius < norm:
            d = d * (radius / norm)
        parallel = (d @ c) / (c @ c) * c
        guided[i] = cond[i] + (scale - 1) * (d - parallel + eta * parallel).reshape(cond[i].shape)
    return guided, delta
