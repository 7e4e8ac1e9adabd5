"""The space of latents: statistics of each channel, and linear and spherical interpolation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdkit.errors import ArgumentError

PARALLEL = 1e-6
"""Sine of the angle between two vectors below which `slerp` treats them as parallel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Mean and variance of each channel of latents. Statistics of two sets add up to those of their union.

    Attributes:
        count: Values of each channel: images times positions.
        mean: (C,), float64, on the CPU.
        variance: (C,), the population's: divided by `count`.
    """

    count: int
    mean: Tensor
    variance: Tensor

    @property
    def std(self) -> Tensor:
        """The standard deviation of each channel, (C,)."""
        return self.variance.sqrt()

    @property
    def scale(self) -> float:
        """The factor that makes the standard deviation of all values together 1 (Rombach et al. 2022,
        https://arxiv.org/abs/2112.10752, appendix G); infinite for latents that are all equal."""
        # The variance of the union of the channels: within the channels, plus between them.
        variance = float(self.variance.mean() + self.mean.var(correction=0))
        return 1 / math.sqrt(variance) if variance > 0 else math.inf

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        if self.mean.shape != other.mean.shape:
            raise ArgumentError(
                f"statistics of {len(self.mean)} and of {len(other.mean)} channels do not add up; take one VAE's."
            )
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return Statistics(
            count=count,
            mean=self.mean + share * delta,
            variance=(1 - share) * self.variance + share * other.variance + share * (1 - share) * delta**2,
        )


def statistics(latents: Tensor | Iterable[Tensor]) -> Statistics:
    """Return mean and standard deviation of each channel of latents, and the scale that would make it 1.

    Args:
        latents: Latents (B, C, h, w) or (C, h, w); or an iterable of these, such as a generator, of which one is held
            at a time.

    Raises:
        ArgumentError: There are no latents, they are not finite, or they differ in their channels.

    Example:
        >>> import torch
        >>> from sdkit.latents import statistics
        >>> round(statistics(2 * torch.randn(8, 4, 16, 16)).scale, 1)
        0.5
    """
    total = None
    for z in [latents] if isinstance(latents, Tensor) else latents:
        found = _statistics(z)
        total = found if total is None else total + found
    if total is None:
        raise ArgumentError("there are no latents to take statistics of; give at least those of one image.")
    return total


def _statistics(z: Tensor) -> Statistics:
    if not isinstance(z, Tensor) or z.ndim not in (3, 4) or z.numel() == 0 or not z.is_floating_point():
        shape = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ArgumentError(f"latents must be a float tensor (B, C, h, w) or (C, h, w), not {shape}.")
    values = z.detach().cpu().double().movedim(-3, 0).flatten(1)  # (C, N)
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    if not bool(torch.isfinite(mean).all()):
        raise ArgumentError("latents must be finite numbers; these hold NaN or infinity.")
    return Statistics(count=values.shape[1], mean=mean, variance=variance)


def lerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Interpolate linearly: (1 - t) a + t b.

    The middle of two samples of unit noise has a norm that is smaller by sqrt(2), which a denoiser never saw: take
    `slerp` for noise, and `lerp` for embeddings.

    Args:
        a: (..., C, h, w), at t = 0.
        b: Shaped like `a`, at t = 1.
        t: A number, or a tensor that broadcasts with the dimensions in front of (C, h, w).

    Returns:
        Latents of the dtype of `a`: (C, h, w) of each t.
    """
    t = _position(a, b, t)
    exact = _exact(a)
    return ((1 - t) * a.to(exact) + t * b.to(exact)).to(a.dtype)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Interpolate along a great circle (Shoemake 1985, https://doi.org/10.1145/325334.325242; for latents White 2016,
    https://arxiv.org/abs/1609.04468): (sin((1 - t) w) a + sin(t w) b) / sin(w), where w is the angle between a and b.

    Each (C, h, w) is one vector. Between vectors of one norm the norm is constant. Where the angle leaves no circle to
    choose (parallel and opposite vectors, and zeros), this is `lerp`.

    Args:
        a: (..., C, h, w), at t = 0.
        b: Shaped like `a`, at t = 1.
        t: A number, or a tensor that broadcasts with the dimensions in front of (C, h, w).

    Returns:
        Latents of the dtype of `a`: (C, h, w) of each t.

    Example:
        >>> import torch
        >>> from sdkit.latents import slerp
        >>> a, b = torch.randn(2, 4, 16, 16)
        >>> slerp(a, b, torch.linspace(0, 1, 8)).shape
        torch.Size([8, 4, 16, 16])
    """
    t = _position(a, b, t)
    exact = _exact(a)
    start, end = a.to(exact), b.to(exact)
    unit_a, unit_b = _unit(start), _unit(end)
    # Kahan's formula: unlike the arc cosine of the dot product, it is exact for small angles and near pi.
    angle = 2 * torch.atan2(_norm(unit_a - unit_b), _norm(unit_a + unit_b))
    sine = angle.sin()
    straight = (sine < PARALLEL) | (_norm(start) == 0) | (_norm(end) == 0)
    sine = torch.where(straight, 1, sine)
    weight_a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    weight_b = torch.where(straight, t, (t * angle).sin() / sine)
    return (weight_a * start + weight_b * end).to(a.dtype)


def _position(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Check the arguments of an interpolation, and return t as a tensor (..., 1, 1, 1)."""
    if a.shape != b.shape or a.ndim < 3 or not a.is_floating_point() or not b.is_floating_point():
        raise ArgumentError(
            f"latents to interpolate must be two float tensors (..., C, h, w) of one shape, not {tuple(a.shape)} "
            f"and {tuple(b.shape)}."
        )
    position = torch.as_tensor(t, dtype=_exact(a), device=a.device)
    if not bool(torch.isfinite(position).all()):
        raise ArgumentError("t, the position between two latents, must be a finite number.")
    try:
        torch.broadcast_shapes(position.shape, a.shape[:-3])
    except RuntimeError as error:
        raise ArgumentError(
            f"t of shape {tuple(position.shape)} does not broadcast with {tuple(a.shape[:-3])}, the dimensions of the "
            "latents in front of (C, h, w)."
        ) from error
    return position[..., None, None, None]


def _exact(a: Tensor) -> torch.dtype:
    return torch.float32 if a.device.type == "mps" else torch.float64  # Apple's GPU has no float64


def _norm(x: Tensor) -> Tensor:
    """Return the norm of each (C, h, w) as (..., 1, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-3, -2, -1), keepdim=True)
    return norm


def _unit(x: Tensor) -> Tensor:
    return x / _norm(x).clamp_min(torch.finfo(x.dtype).tiny)
