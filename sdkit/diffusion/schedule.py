"""The noise schedule of a diffusion model: x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) eps.

Notation follows DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239): t counts from 0 (least noise) to T - 1 (most),
and t = -1 is the clean end of the chain. Tables are float64, and results are cast to a model's dtype last: in bfloat16,
1 - alphas_cumprod[0] would round to zero.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdkit.arguments import PREDICTIONS, flag, number, one_of, whole_number
from sdkit.errors import ArgumentError
from sdkit.messages import clean

SPACINGS = ("leading", "trailing", "linspace")
"""Spacings of timesteps that a model's config can name."""
ALL_SPACINGS = (*SPACINGS, "karras", "exponential", "lcm")
"""Spacings that `NoiseSchedule.timesteps` takes."""
RHO = 7.0
"""Karras et al. 2022's rho: steps get shorter as the noise gets less."""
HIGHEST_SIGMA = 2.0**12
"""Noise level at which spacings in sigma begin for zero-terminal-SNR schedules, whose own is infinite."""
DISTILLED_STEPS = 50
"""Steps of the solver from which LCM and TCD models are distilled."""
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
LONGEST_CHAIN = 1_000_000
"""Largest number of timesteps that a config may state; models have 1,000. A larger table could exhaust memory."""
BOUNDS = {
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "trained_betas": (0, 1),
    "clip_sample_range": (1e-12, 1e12),
}
"""Field of a scheduler's config -> its smallest and largest allowed value. For a list, they bound each item."""


@dataclass(frozen=True, kw_only=True)
class SchedulerDefaults:
    """Defaults of one of diffusers' scheduler classes, for the keys that a config leaves out.

    Attributes:
        timestep_spacing: See `NoiseSchedule`.
        clip_sample: Whether x0 is clamped in sampling.
        set_alpha_to_one: See `NoiseSchedule`.
        beta_start: The first beta.
        beta_end: The last beta.
        beta_schedule: Name of the curve from `beta_start` to `beta_end`, such as "linear".
    """

    timestep_spacing: str = "leading"
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"


_DDPM = SchedulerDefaults(clip_sample=True)
_LINSPACE = SchedulerDefaults(timestep_spacing="linspace")
_K_DIFFUSION = SchedulerDefaults(timestep_spacing="linspace", beta_start=0.00085, beta_end=0.012)
_CONSISTENCY = SchedulerDefaults(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULERS = {
    **dict.fromkeys(("DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"), _DDPM),
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler", "RePaintScheduler"), _DDPM),
    "PNDMScheduler": SchedulerDefaults(set_alpha_to_one=False),
    "UnCLIPScheduler": SchedulerDefaults(
        timestep_spacing="linspace", clip_sample=True, beta_schedule="squaredcos_cap_v2"
    ),
    **dict.fromkeys(("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"), _LINSPACE),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"), _LINSPACE),
    **dict.fromkeys(("DPMSolverSinglestepScheduler", "DEISMultistepScheduler"), _LINSPACE),
    **dict.fromkeys(("UniPCMultistepScheduler", "SASolverScheduler"), _LINSPACE),
    **dict.fromkeys(("HeunDiscreteScheduler", "DPMSolverSDEScheduler"), _K_DIFFUSION),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _K_DIFFUSION),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), _CONSISTENCY),
}
"""Scheduler class of diffusers -> its defaults, for the classes that use DDPM's forward process. Others (flow matching,
EDM, score SDEs, IPNDM, CogVideoX, Würstchen, masked tokens) have tables of their own and are refused."""


class Prediction(NamedTuple):
    """A model's prediction at (x_t, t), independent of its parameterisation. Each tensor is shaped like x_t.

    Attributes:
        x0: The clean sample.
        eps: The noise, with x_t = sqrt(a) x0 + sqrt(1 - a) eps.
        variance: Position of the log-variance between its two bounds, in [-1, 1], from a model of variance type
            "learned_range" (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15); None from others.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


Predict = Callable[[Tensor, int], Prediction]
"""A predictor: predict(x_t, t) -> Prediction, with x_t (B, C, h, w) and an integer t."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """A noise schedule's tables, and the parameterisation that its model was trained in.

    `sd.schedule` is that of a loaded model. Make others with `linear`, `scaled_linear`, `cosine`, `from_betas`, or
    `from_config`; all but the last take the fields below as keywords.

    Example:
        >>> import sdkit
        >>> schedule = sdkit.NoiseSchedule.scaled_linear(prediction_type="v_prediction")
        >>> schedule.timesteps(4, "trailing")
        [(999, 749), (749, 499), (499, 249), (249, -1)]

    Attributes:
        betas: (T,) float64, the variance added by each step of the forward process.
        prediction_type: The model's parameterisation: "epsilon", "v_prediction", or "sample" (x0).
        timestep_spacing: Default spacing of `timesteps`.
        steps_offset: Number added to each timestep of "leading" spacing; 1 in Stable Diffusion.
        set_alpha_to_one: Whether DDIM's last step goes to alphas_cumprod = 1. Otherwise it goes to alphas_cumprod[0],
            as in Stable Diffusion.
        variance_type: Variance of DDPM's reverse step: "fixed_small", "fixed_large", or "learned_range".
        clip_x0: Bound to which samplers clamp x0, for pixel-space models; None for latents. The pipeline passes it on.
        alphas_cumprod: (T,) float64, the share of x0's variance left at each t; computed from the betas.
    """

    betas: Tensor
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    variance_type: str = "fixed_small"
    clip_x0: float | None = None
    alphas_cumprod: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or betas.numel() == 0 or not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ArgumentError("betas must be a list of at least one number, each in [0, 1].")
        one_of("prediction_type", self.prediction_type, PREDICTIONS)
        one_of("timestep_spacing", self.timestep_spacing, SPACINGS)
        one_of("variance_type", self.variance_type, VARIANCE_TYPES)
        # Two timesteps of equal alphas_cumprod are one noise level: solvers would divide by a step of length 0.
        if bool((1 - betas == 1).any()) or bool((torch.cumprod(1 - betas[:-1], dim=0) == 0).any()):
            raise ArgumentError("betas must be above 0, and only the last may be 1.")
        whole_number("steps_offset", self.steps_offset, 0)
        object.__setattr__(self, "betas", betas.clone())
        object.__setattr__(self, "prediction_type", PREDICTIONS[self.prediction_type])
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1 - betas, dim=0))

    @classmethod
    def from_betas(cls, betas: Tensor | list[float], **fields: Any) -> NoiseSchedule:
        """Make a schedule from betas, (T,) numbers in [0, 1]. `fields` sets other fields of the class."""
        return cls(betas=torch.as_tensor(betas, dtype=torch.float64), **fields)

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, **fields: Any
    ) -> NoiseSchedule:
        """Make a schedule of evenly spaced betas, as in DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
        section 4)."""
        return cls(betas=_linspace(beta_start, beta_end, num_timesteps), **fields)

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, **fields: Any
    ) -> NoiseSchedule:
        """Make a schedule in which the square roots of the betas are evenly spaced, as in latent diffusion (Rombach et
        al. 2022, https://arxiv.org/abs/2112.10752). The defaults are Stable Diffusion's."""
        roots = _linspace(beta_start**0.5, beta_end**0.5, num_timesteps)
        return cls(betas=roots**2, **fields)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999, **fields: Any
    ) -> NoiseSchedule:
        """Make a schedule in which alphas_cumprod follows a squared cosine (Nichol & Dhariwal 2021,
        https://arxiv.org/abs/2102.09672, eq. 17)."""

        def squared_cosine(u: Tensor) -> Tensor:
            return torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2

        return cls(betas=_betas_along(squared_cosine, num_timesteps, max_beta), **fields)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, latents: bool = False) -> NoiseSchedule:
        """Make a schedule from the contents of a diffusers `scheduler_config.json`.

        Absent keys take the defaults of the scheduler class that the config names. There is one exception: the spacing
        of a zero-terminal-SNR schedule is then "trailing". Such a model is trained to start from pure noise, which
        "leading" spacing never does.

        Args:
            config: The parsed JSON.
            latents: Whether the model denoises latents, as Stable Diffusion does. If true, x0 is
                never clipped, since latents exceed [-1, 1], and `steps_offset` is 1, whatever the config says; many
                configs lack these keys, and diffusers' `StableDiffusionPipeline` corrects them in the same way. If
                false, for pixel-space models, both are as in the config.

        Raises:
            ArgumentError: A value is out of range, or the scheduler does not use DDPM's forward process.
        """
        config = completed(config)
        if flag("thresholding", config.get("thresholding", False)):
            raise ArgumentError("this model's scheduler asks for dynamic thresholding, which sdkit does not offer.")
        if flag("use_flow_sigmas", config.get("use_flow_sigmas", False)):
            raise ArgumentError("this model's scheduler asks for flow matching (use_flow_sigmas), not for a diffusion.")
        clip = flag("clip_sample", config["clip_sample"]) and not latents
        schedule = cls(
            betas=_betas_from_config(config),
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=config["timestep_spacing"],
            steps_offset=1 if latents else config.get("steps_offset", 0),
            set_alpha_to_one=flag("set_alpha_to_one", config["set_alpha_to_one"]),
            variance_type=str(config.get("variance_type", "fixed_small")).removesuffix("_log"),
            clip_x0=_clip(config) if clip else None,
        )
        zero_snr = flag("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr", False))
        return schedule.zero_terminal_snr() if zero_snr else schedule

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule rescaled to zero terminal SNR, so that x_{T-1} is pure noise (Lin et al. 2023,
        https://arxiv.org/abs/2305.08891, Algorithm 1)."""
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
        """alphas_cumprod at the end of DDIM's last step."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def alpha_cumprod(self, t: int, final: float | None = None) -> float:
        """Return alphas_cumprod[t]. At t = -1 return `final`, or `final_alpha_cumprod` if that is None."""
        if t == -1:
            return self.final_alpha_cumprod if final is None else final
        return self._values[self._checked_number(t)]

    def sigma(self, t: int) -> float:
        """Return the noise level sqrt((1 - a) / a) at t, in units of the data: EDM's sigma (Karras et al. 2022,
        https://arxiv.org/abs/2206.00364). It is infinite where a = 0."""
        a = self.alpha_cumprod(t)
        return math.sqrt((1 - a) / a) if a > 0 else math.inf

    def snr(self, t: int | Tensor) -> Tensor:
        """Return the signal-to-noise ratio a / (1 - a) at t, an integer or (B,), in float64."""
        a = self.alphas_cumprod[self._checked(t)]
        return a / (1 - a)

    def timesteps(self, n: int, spacing: str | None = None) -> list[tuple[int, int]]:
        """Return the timesteps of a sampler with `n` steps.

        Args:
            n: Number of steps, from 1 to T.
            spacing: Spacing of the timesteps; None is the schedule's own.
                In t (Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2): "leading" is Stable Diffusion's and
                never reaches T - 1. "trailing" starts at T - 1, as zero-terminal-SNR models need. "linspace" includes
                both ends.
                In sigma, from T - 1 to 0, each rounded to the nearest timestep: "karras" (Karras et al. 2022,
                https://arxiv.org/abs/2206.00364, eq. 5, rho = 7), and "exponential", even in log sigma.
                "lcm" takes every 50/n-th of the 50 timesteps on which LCM and TCD models are distilled (Luo et al.
                2023, https://arxiv.org/abs/2310.04378, section 4.3); n is 50 at most.

        Returns:
            Pairs (t, t_prev), from most noise to least. The last t_prev is -1.

        Raises:
            ArgumentError: `n` is out of range, or the spacing is unknown.
        """
        T, spacing = self.num_timesteps, self.timestep_spacing if spacing is None else spacing
        n, spacing = check_steps(n, T), check_spacing(spacing)
        if spacing == "leading":
            stride = T // n
            offset = min(self.steps_offset, T - 1 - stride * (n - 1))
            t = np.arange(n, dtype=np.float64)[::-1] * stride + offset
        elif spacing == "trailing":
            t = np.round(np.arange(T, 0, -T / n))[:n] - 1
        elif spacing == "linspace":
            t = np.round(np.linspace(0, T - 1, n))[::-1] if n > 1 else np.array([T - 1.0])
        elif spacing == "lcm":
            distilled = min(DISTILLED_STEPS, T)
            whole_number("the number of steps of spacing 'lcm'", n, 1, distilled)
            t = np.arange(distilled, 0, -1.0)[np.arange(n) * distilled // n] * (T // distilled) - 1
        else:
            t = self._spaced_in_sigma(n, RHO if spacing == "karras" else math.inf)
        ts = [int(value) for value in t]
        return list(zip(ts, [*ts[1:], -1], strict=True))

    def _spaced_in_sigma(self, n: int, rho: float) -> np.ndarray[Any, np.dtype[Any]]:
        """Return n falling timesteps at which sigma^(1 / rho), or log sigma where rho is infinite, is as evenly spaced
        as whole timesteps allow."""
        alphas = self.alphas_cumprod.numpy()
        sigmas = np.sqrt((1 - alphas) / np.maximum(alphas, 1 / (1 + HIGHEST_SIGMA**2)))
        level = np.log(sigmas) if math.isinf(rho) else sigmas ** (1 / rho)
        wanted = np.linspace(level[-1], level[0], n)
        t = np.round(np.interp(wanted, level, np.arange(self.num_timesteps)))
        # Where the wanted levels lie closer than timesteps do, rounding repeats a timestep. Repeats move up.
        rising = np.maximum.accumulate(t[::-1] - np.arange(n)) + np.arange(n)
        return np.minimum(rising, self.num_timesteps - n + np.arange(n))[::-1]

    def add_noise(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Return x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 4).

        Args:
            x0: (B, ...), the clean sample.
            eps: Standard normal noise, shaped like x0.
            t: An integer or (B,).

        Returns:
            x_t, shaped like x0 and in its dtype.
        """
        a, s = self._signal_noise(t, x0)
        return (a * x0 + s * eps).to(x0.dtype)

    def velocity(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Return v = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512,
        appendix D). Arguments, shape, and dtype are as in `add_noise`."""
        a, s = self._signal_noise(t, x0)
        return (a * eps - s * x0).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Return the training target at x_t = `add_noise(x0, eps, t)`.

        Args:
            x0: (B, C, ...), the clean sample.
            eps: The noise, shaped like x0.
            t: An integer or (B,).

        Returns:
            eps, v, or x0, by the schedule's `prediction_type`. `prediction` is the inverse.
        """
        kind = PREDICTIONS[self.prediction_type]
        if kind == "epsilon":
            return eps
        return x0 if kind == "sample" else self.velocity(x0, eps, t)

    def prediction(self, output: Tensor, x_t: Tensor, t: int | Tensor, kind: str | None = None) -> Prediction:
        """Convert a model's output to x0 and eps; the inverse of `target`.

        Args:
            output: Shaped like x_t, or with 2C channels, where the second half is the learned variance.
            x_t: (B, C, ...), the sample at t.
            t: An integer or (B,).
            kind: Parameterisation of `output`: "epsilon", "v_prediction", or "sample"; None is the schedule's
                `prediction_type`.

        Raises:
            ArgumentError: `kind` is unknown; or `output` is eps and alphas_cumprod[t] is 0, where eps does not
                determine x0.
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
        if self._is_pure_noise(t, a.dtype):
            raise ArgumentError(
                "at zero terminal SNR an eps model says nothing of x0: use a v or x0 model, or 'leading' spacing."
            )
        return Prediction((x_t - s * output) / a, output, variance)

    @cached_property
    def _values(self) -> list[float]:
        """`alphas_cumprod` as Python floats. Samplers scale tensors on a GPU by them without a copy or a
        synchronisation."""
        values: list[float] = self.alphas_cumprod.tolist()
        return values

    def _checked_number(self, t: int) -> int:
        """Return `t`. Raise ArgumentError where it is out of range, since negative indices would wrap around."""
        try:
            index = operator.index(t)
        except TypeError:
            index = -1
        if not 0 <= index < self.num_timesteps:
            raise self._out_of_range(t)
        return index

    def _checked(self, t: int | Tensor) -> Tensor:
        """Return `t` as an index into the tables, on the CPU. Raise ArgumentError where it is out of range."""
        index = torch.as_tensor(t, device="cpu")
        if index.is_floating_point() or bool((index < 0).any()) or bool((index >= self.num_timesteps).any()):
            raise self._out_of_range(t)
        return index

    def _out_of_range(self, t: object) -> ArgumentError:
        """Return the error for timesteps that the tables do not have."""
        return ArgumentError(f"timesteps are whole numbers from 0 to {self.num_timesteps - 1}, not {t!r}.")

    def _signal_noise(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(a_t) and sqrt(1 - a_t), in float32 or wider, shaped to broadcast over (B, ...)."""
        # Shape (1, ..., 1), not 0-d: 0-d tensors take no part in type promotion, and half precision would stay.
        dtype = torch.promote_types(like.dtype, torch.float32)
        if isinstance(t, int):
            # Fill on the device: a copy from the CPU would synchronise with a GPU in every step.
            a = self._values[self._checked_number(t)]
            ones = (1,) * like.ndim
            signal, noise = (like.new_full(ones, math.sqrt(value), dtype=dtype) for value in (a, 1 - a))
            return signal, noise
        shape = (-1,) + (1,) * (like.ndim - 1)
        alphas = self.alphas_cumprod[self._checked(t)]
        signal, noise = (value.sqrt().reshape(shape).to(like.device, dtype) for value in (alphas, 1 - alphas))
        return signal, noise

    def _is_pure_noise(self, t: int | Tensor, dtype: torch.dtype) -> bool:
        """Return whether sqrt(a_t) is 0 in `dtype` for any t. Computed on the CPU: no GPU synchronisation."""
        if isinstance(t, int):
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal number
            return math.sqrt(self._values[self._checked_number(t)]) <= smallest / 2  # rounds to 0
        return bool((self.alphas_cumprod[self._checked(t)].sqrt().to(dtype) == 0).any())


def check_steps(n: int, most: int | None = None) -> int:
    """Return a number of sampling steps. Raise ArgumentError unless it is from 1 to `most`."""
    return whole_number("the number of steps", n, 1, most)


def check_spacing(spacing: str) -> str:
    """Return the name of a spacing of timesteps. Raise ArgumentError for an unknown one."""
    return one_of("spacing", spacing, ALL_SPACINGS)


def _linspace(start: float, end: float, n: int) -> Tensor:
    """Return `n` evenly spaced numbers, both ends included, in float64."""
    return torch.linspace(start, end, whole_number("num_timesteps", n, 1), dtype=torch.float64)


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with absent and null keys set to the defaults of the scheduler class that it names."""
    stated = {key: value for key, value in config.items() if value is not None}
    name = stated.get("_class_name", "")
    if not isinstance(name, str) or (name and name not in SCHEDULERS):
        raise ArgumentError(
            f"a schedule of {clean(name)} is not one of Stable Diffusion 1.x / 2.x, and cannot be used."
        )
    defaults = asdict(SCHEDULERS.get(name, SchedulerDefaults()))
    if stated.get("rescale_betas_zero_snr"):
        defaults["timestep_spacing"] = "trailing"
    return defaults | stated


def _betas_from_config(config: Mapping[str, Any]) -> Tensor:
    """Return the betas (T,), float64, of a config that `completed` returned."""
    if "trained_betas" in config:
        return torch.tensor(_numbers("trained_betas", config["trained_betas"]), dtype=torch.float64)
    T = whole_number("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, LONGEST_CHAIN)
    start, end = (number(key, config[key], *BOUNDS[key]) for key in ("beta_start", "beta_end"))
    kinds: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: _linspace(start, end, T),
        "scaled_linear": lambda: _linspace(start**0.5, end**0.5, T) ** 2,
        "squaredcos_cap_v2": lambda: NoiseSchedule.cosine(T).betas,
        "sigmoid": lambda: torch.sigmoid(_linspace(-6, 6, T)) * (end - start) + start,
        "exp": lambda: _betas_along(lambda u: torch.exp(-12 * u), T),
        "laplace": lambda: _betas_along(_laplace, T),
    }
    return kinds[one_of("beta_schedule", config["beta_schedule"], kinds)]()


def _clip(config: Mapping[str, Any]) -> float:
    return number("clip_sample_range", config.get("clip_sample_range", 1.0), *BOUNDS["clip_sample_range"])


def _numbers(name: str, values: Any) -> list[float]:
    """Return `values`, a list of numbers from 0 to 1. Raise ArgumentError for anything else."""
    if not isinstance(values, (list, tuple)):
        raise ArgumentError(f"{name} must be a list of numbers from 0 to 1.")
    return [number(name, value, *BOUNDS[name]) for value in values]


def _betas_along(alpha_cumprod: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float = 0.999) -> Tensor:
    """Return betas (T,), at most `max_beta`, whose alphas_cumprod is proportional to a function of u = (t + 1) / T."""
    f = alpha_cumprod(_linspace(0, 1, num_timesteps + 1))
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def _laplace(u: Tensor) -> Tensor:
    """Return the alphas_cumprod at u for which the log-SNR follows a Laplace distribution (Hang & Gu 2024,
    https://arxiv.org/abs/2407.03297, table 1), with diffusers' scale of 0.5 and square root."""
    side = torch.where(u <= 0.5, 1.0, -1.0)
    log_snr = -0.5 * side * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
    return torch.sigmoid(log_snr).sqrt()
