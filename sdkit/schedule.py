"""The noise schedule of a diffusion model: x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) eps.

Notation follows DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239): t counts from 0 (least noise) to T - 1 (most),
and t = -1 stands for the clean end of the chain. Tables are float64 and are cast last: in bfloat16 1 -
alphas_cumprod[0] would round to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdkit.arguments import PREDICTIONS, one_of, whole
from sdkit.errors import ArgumentError
from sdkit.fields import documented

SPACINGS = ("leading", "trailing", "linspace")
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler")
LINSPACE = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler"),
)
"""diffusers' schedulers for models such as Stable Diffusion, by their default spacing."""
LATENT_DEFAULTS = (
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DPMSolverSDEScheduler", "LCMScheduler", "TCDScheduler"),
)
"""Those whose default betas are latent diffusion's."""
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


@documented
class Prediction(NamedTuple):
    """What a model believes at (x_t, t), whatever it was trained to output. Each is shaped like x_t."""

    x0: Tensor
    """the clean sample"""
    eps: Tensor
    """the noise: x_t = sqrt(a) x0 + sqrt(1 - a) eps"""
    variance: Tensor | None = None
    """learned-range models only: where in [-1, 1] the log-variance lies between its two bounds (Nichol & Dhariwal 2021,
    eq. 15)"""


Predict = Callable[[Tensor, int], Prediction]
"""A model at one timestep: predict(x_t, t), with x_t (B, C, h, w)."""


@documented
@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """Tables of one noise schedule and what its model was trained to predict.

    Make one with `from_pretrained`, `linear`, `scaled_linear`, `cosine` or `from_betas`; each takes the fields below as
    keywords.
    """

    betas: Tensor
    """(T,) float64: the variance added by each step of the forward process"""
    prediction_type: str = "epsilon"
    """what the model outputs: "epsilon", "v_prediction" or "sample" (x0)"""
    timestep_spacing: str = "leading"
    """default spacing of `timesteps`"""
    steps_offset: int = 0
    """added to each timestep of "leading" spacing (1 in Stable Diffusion)"""
    set_alpha_to_one: bool = True
    """whether DDIM's last step goes to alphas_cumprod = 1, or to alphas_cumprod[0] (Stable Diffusion)"""
    variance_type: str = "fixed_small"
    """variance of DDPM's reverse step: "fixed_small", "fixed_large" or "learned_range" """
    clip_x0: float | None = None
    """the bound to hand to a sampler as its `clip_x0` (models of pixels), None for latents; the pipeline does so"""
    alphas_cumprod: Tensor = field(init=False, repr=False)
    """(T,) float64: the share of x0's variance left at each t"""

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or betas.numel() == 0 or not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ArgumentError("betas must be a list of at least one number, each in [0, 1].")
        one_of("prediction_type", self.prediction_type, PREDICTIONS)
        one_of("timestep_spacing", self.timestep_spacing, SPACINGS)
        one_of("variance_type", self.variance_type, VARIANCE_TYPES)
        if 1 - betas[0] == 1 or bool((torch.cumprod(1 - betas[:-1], dim=0) == 0).any()):
            raise ArgumentError("betas must begin above 0, and only the last may be 1.")
        whole("steps_offset", self.steps_offset, 0)
        object.__setattr__(self, "betas", betas.clone())
        object.__setattr__(self, "prediction_type", PREDICTIONS[self.prediction_type])
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1 - betas, dim=0))

    @classmethod
    def from_betas(cls, betas: Tensor | list[float], **fields: Any) -> NoiseSchedule:
        """A schedule from its betas, (T,) values in [0, 1]."""
        return cls(betas=torch.as_tensor(betas, dtype=torch.float64), **fields)

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, **fields: Any
    ) -> NoiseSchedule:
        """Betas evenly spaced, as in DDPM (Ho et al. 2020, section 4)."""
        return cls(betas=_linspace(beta_start, beta_end, num_timesteps), **fields)

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, **fields: Any
    ) -> NoiseSchedule:
        """Square roots of the betas evenly spaced, as in latent diffusion (Rombach et al. 2022); the defaults are
        Stable Diffusion's."""
        roots = _linspace(beta_start**0.5, beta_end**0.5, num_timesteps)
        return cls(betas=roots**2, **fields)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999, **fields: Any
    ) -> NoiseSchedule:
        """alphas_cumprod along a squared cosine (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17)."""
        u = _linspace(0, 1, num_timesteps + 1)
        f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return cls(betas=(1 - f[1:] / f[:-1]).clamp(max=max_beta), **fields)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        revision: str | None = None,
        config: str | PathLike[str] | None = None,
        prediction_type: str | None = None,
    ) -> NoiseSchedule:
        """The schedule that a model was trained with; for `source` see `sdkit.StableDiffusion.from_pretrained`."""
        from sdkit.models.source import load_scheduler_config

        found = load_scheduler_config(source, revision=revision, config=config, prediction_type=prediction_type)
        return cls.from_config(found)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """A schedule from the contents of a diffusers `scheduler_config.json`.

        Absent keys have that scheduler's own defaults, but a zero-terminal-SNR schedule is "trailing" unless it says
        otherwise: "leading" never starts from pure noise, for which such models are made.
        """
        name = config.get("_class_name", "")
        if name and name not in (*LEADING, *LINSPACE):
            raise ArgumentError(f"a schedule of {name} is not one of Stable Diffusion 1.x / 2.x, and cannot be used.")
        if config.get("thresholding"):
            raise ArgumentError("this model's scheduler asks for dynamic thresholding, which sdkit does not offer.")
        variance_type = str(config.get("variance_type") or "fixed_small").removesuffix("_log")
        zero_snr = bool(config.get("rescale_betas_zero_snr", False))
        clip = config.get("clip_sample", name in ("DDIMScheduler", "DDPMScheduler"))
        spacing = "trailing" if zero_snr else "linspace" if name in LINSPACE else "leading"
        schedule = cls(
            betas=_betas_from_config(config),
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get("timestep_spacing", spacing),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=config.get("set_alpha_to_one", name != "PNDMScheduler"),
            variance_type=variance_type,
            clip_x0=float(config.get("clip_sample_range", 1.0)) if clip else None,
        )
        return schedule.zero_terminal_snr() if zero_snr else schedule

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The same schedule, shifted and stretched so that x_{T-1} is pure noise (Lin et al. 2023,
        https://arxiv.org/abs/2305.08891, Alg. 1)."""
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_cumprod = root**2
        alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
        return replace(self, betas=1 - alphas)

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of the forward process."""
        return len(self.betas)

    @property
    def final_alpha_cumprod(self) -> float:
        """What DDIM's last step goes to."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def alpha_cumprod(self, t: int, final: float | None = None) -> float:
        """alphas_cumprod[t]; at t = -1 `final`, or `final_alpha_cumprod` where that is None."""
        if t == -1:
            return self.final_alpha_cumprod if final is None else final
        return float(self.alphas_cumprod[self._checked(t)])

    def sigma(self, t: int) -> float:
        """Noise level sqrt((1 - a) / a) of t, in units of the data (EDM's sigma; Karras et al. 2022); infinite where a
        = 0."""
        a = self.alpha_cumprod(t)
        return math.sqrt((1 - a) / a) if a > 0 else math.inf

    def snr(self, t: int | Tensor) -> Tensor:
        """Signal-to-noise ratio a / (1 - a) of t, an integer or (B,); float64."""
        a = self.alphas_cumprod[self._checked(t)]
        return a / (1 - a)

    def timesteps(self, n: int, spacing: str | None = None) -> list[tuple[int, int]]:
        """The `n` steps of a sampler as pairs (t, t_prev), from most noise to least; the last t_prev is -1.

        Spacings are those of Lin et al. 2023, table 2: "leading" (Stable Diffusion's, never reaches T - 1), "trailing"
        (starts at T - 1: the one for zero-terminal-SNR models), "linspace" (both ends).
        """
        T, spacing = self.num_timesteps, self.timestep_spacing if spacing is None else spacing
        n = whole("the number of steps", n, 1, T)
        one_of("spacing", spacing, SPACINGS)
        if spacing == "leading":
            stride = T // n
            offset = min(self.steps_offset, T - 1 - stride * (n - 1))
            t = np.arange(n, dtype=np.float64)[::-1] * stride + offset
        elif spacing == "trailing":
            t = np.round(np.arange(T, 0, -T / n))[:n] - 1
        else:
            t = np.round(np.linspace(0, T - 1, n))[::-1] if n > 1 else np.array([T - 1.0])
        ts = [int(value) for value in t]
        return list(zip(ts, [*ts[1:], -1], strict=True))

    def add_noise(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps (Ho et al. 2020, eq. 4); `t` is an integer or (B,). In x0's dtype."""
        a, s = self._signal_noise(t, x0)
        return (a * x0 + s * eps).to(x0.dtype)

    def velocity(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """v = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, appendix D). In
        x0's dtype."""
        a, s = self._signal_noise(t, x0)
        return (a * eps - s * x0).to(x0.dtype)

    def prediction(self, output: Tensor, x_t: Tensor, t: int | Tensor, kind: str | None = None) -> Prediction:
        """x0 and eps from a model's output, which is an eps, a v or an x0 by `kind` (the schedule's `prediction_type`
        where None).

        `output` is shaped like x_t (B, C, ...), or has 2C channels, of which the second half is the learned variance.
        Raises ArgumentError for eps where alphas_cumprod[t] is 0: x_t then holds nothing of x0 (use a v or x0 model).
        """
        kind = kind or self.prediction_type
        one_of("kind", kind, PREDICTIONS)
        variance = None
        if x_t.ndim > 1 and output.shape[1] == 2 * x_t.shape[1]:
            output, variance = output.chunk(2, dim=1)
        a, s = self._signal_noise(t, x_t)
        output = output.to(a.dtype)
        if PREDICTIONS[kind] == "v_prediction":
            return Prediction(a * x_t - s * output, a * output + s * x_t, variance)
        if PREDICTIONS[kind] == "sample":
            return Prediction(output, (x_t - a * output) / s, variance)
        if bool((a == 0).any()):
            raise ArgumentError(
                "at zero terminal SNR an eps model says nothing of x0: use a v or x0 model, or 'leading' spacing."
            )
        return Prediction((x_t - s * output) / a, output, variance)

    def _checked(self, t: int | Tensor) -> Tensor:
        """`t` as an index into the tables; indices out of range would otherwise wrap around."""
        index = torch.as_tensor(t, device="cpu")
        if index.is_floating_point() or bool((index < 0).any()) or bool((index >= self.num_timesteps).any()):
            raise ArgumentError(f"timesteps are whole numbers from 0 to {self.num_timesteps - 1}, not {t!r}.")
        return index

    def _signal_noise(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), of float32 or wider, shaped to broadcast over (B, ...)."""
        a = self.alphas_cumprod[self._checked(t)]
        shape = (-1,) + (1,) * (like.ndim - 1)  # a scalar would not widen half precision
        dtype = torch.promote_types(like.dtype, torch.float32)
        return a.sqrt().reshape(shape).to(like.device, dtype), (1 - a).sqrt().reshape(shape).to(like.device, dtype)


def _linspace(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, whole("num_timesteps", n, 1), dtype=torch.float64)


def _betas_from_config(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    T = config.get("num_train_timesteps", 1000)
    start, end = (0.00085, 0.012) if config.get("_class_name") in LATENT_DEFAULTS else (1e-4, 0.02)
    span = {"beta_start": config.get("beta_start", start), "beta_end": config.get("beta_end", end)}
    consistency = config.get("_class_name") in ("LCMScheduler", "TCDScheduler")
    kind = config.get("beta_schedule", "scaled_linear" if consistency else "linear")
    if kind == "linear":
        return NoiseSchedule.linear(T, **span).betas
    if kind == "scaled_linear":
        return NoiseSchedule.scaled_linear(T, **span).betas
    if kind == "squaredcos_cap_v2":
        return NoiseSchedule.cosine(T).betas
    raise ArgumentError(f"beta_schedule {kind!r} is not one of 'linear', 'scaled_linear', 'squaredcos_cap_v2'.")
