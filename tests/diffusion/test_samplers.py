from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sdkit.diffusion.samplers import (
    SAMPLERS,
    Step,
    ddim,
    ddim_step,
    ddpm,
    ddpm_step,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_step,
    dpmpp_sde,
    dpmpp_sde_step,
    euler,
    euler_ancestral,
    heun,
    heun_step,
    lcm,
    lcm_step,
    sampler_by_name,
    tcd,
    tcd_step,
    unic_step,
    unipc,
)
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError
from tests.helpers import reference

KINDS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = reference.scaled_linear_betas(1000, 0.00085, 0.012)
ALPHAS = np.cumprod(1 - BETAS)
SHAPE = (2, 4, 6, 6)


def network(x: torch.Tensor, t: int) -> torch.Tensor:
    """A stand-in for the U-Net. It is bounded, non-linear in x, mixes neighbouring pixels, and depends on t."""
    return 0.3 * torch.tanh(x.roll(1, dims=-1)) + 0.2 * torch.sin(x + t / 150) + 0.3 * math.cos(t / 100)


def learned_network(x: torch.Tensor, t: int) -> torch.Tensor:
    """Append to `network`'s output as many channels in [-1, 1] for the variance."""
    return torch.cat([network(x, t), torch.sin(3 * x + t)], dim=1)


def predictor(schedule: NoiseSchedule, net: Any = network, kind: Any = None) -> Callable[..., Prediction]:
    return lambda x_t, t: schedule.prediction(net(x_t, t), x_t, t, kind)


def start(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def generators(first: int = 100, count: int = SHAPE[0]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def noises(shape: tuple[int, ...] = SHAPE, first: int = 100) -> Iterator[torch.Tensor]:
    """Yield the noise of each step: a float32 randn(C, h, w) for each image, from the image's own generator."""
    own = generators(first, shape[0])
    while True:
        yield torch.stack([torch.randn(shape[1:], generator=generator) for generator in own])


# diffusers' tables are in float32, in which 1 - alphas_cumprod loses up to 4 of 7 digits. This causes differences of up
# to 3e-5 here. With the same tables in float64, only the differences of the steps themselves remain.
TABLES = {"float32": 3e-5, "float64": 1e-5}


def set_up(scheduler: Any, n: int, tables: str) -> None:
    scheduler.set_timesteps(n)
    if tables == "float32":
        return
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(BETAS), dim=0)
    if not getattr(scheduler.config, "set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


def from_diffusers(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(json.loads(scheduler.to_json_string()))


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Check that the difference is at most `tolerance` times the largest magnitude of `theirs` (at least 1)."""
    ours, theirs = np.asarray(ours.tolist()), np.asarray(theirs.tolist())
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert error <= tolerance, f"relative error {error:.2e}"


# Parity with diffusers in each step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 13, 100])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("tables", TABLES)
def test_ddim_equals_diffusers(kind: str, eta: float, n: int, to_one: bool, offset: int, tables: str) -> None:
    theirs = DDIMScheduler(
        **SCALED_LINEAR, prediction_type=kind, set_alpha_to_one=to_one, steps_offset=offset, clip_sample=False
    )
    set_up(theirs, n, tables)
    schedule = from_diffusers(theirs)
    x = start()
    steps = ddim(predictor(schedule), x, schedule, schedule.timesteps(n), generators=generators(), eta=eta)
    for step, t, noise in zip(steps, theirs.timesteps.tolist(), noises(), strict=False):
        output = theirs.step(network(x, t), t, x, eta=eta, variance_noise=noise if eta else None)
        x = output.prev_sample
        assert step.t == t
        assert_close(step.x, x, TABLES[tables])
        assert_close(step.x0, output.pred_original_sample, TABLES[tables])
    assert step.i == n - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_clipped_ddim_equals_diffusers(kind: str, eta: float) -> None:
    theirs = DDIMScheduler(**SCALED_LINEAR, prediction_type=kind, clip_sample=True, clip_sample_range=0.6)
    theirs.set_timesteps(20)
    schedule = from_diffusers(theirs)
    x = start()
    steps = list(
        ddim(predictor(schedule), x, schedule, schedule.timesteps(20), generators=generators(), eta=eta, clip_x0=0.6)
    )
    clipped = 0
    for step, noise in zip(steps, noises(), strict=False):
        output = theirs.step(
            network(x, step.t),
            step.t,
            x,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=noise if eta else None,
        )
        x = output.prev_sample
        clipped += int((output.pred_original_sample.abs() == 0.6).sum())
        assert_close(step.x, x)
        assert_close(step.x0, output.pred_original_sample)
    assert clipped > 0 or kind == "sample"  # the stand-in's own output stays within 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("n", [1, 13, 100])
@pytest.mark.parametrize(("offset", "clip"), [(0, False), (0, True), (1, False)])
@pytest.mark.parametrize("tables", TABLES)
def test_ddpm_equals_diffusers(kind: str, variance_type: str, n: int, offset: int, clip: bool, tables: str) -> None:
    """With an offset of 1, diffusers adds noise in its last step (t = 1), because it only tests t > 0. Ho et al. 2020,
    Algorithm 2, adds none in the last step. With fixed_small that noise is 1e-10 and does not matter; with the other
    variances the last step is not compared.
    """
    theirs = DDPMScheduler(
        **SCALED_LINEAR, prediction_type=kind, variance_type=variance_type, steps_offset=offset, clip_sample=clip
    )
    set_up(theirs, n, tables)
    schedule = from_diffusers(theirs)
    net = learned_network if variance_type == "learned_range" else network
    own = generators()
    x = start()
    for step in ddpm(
        predictor(schedule, net),
        x,
        schedule,
        schedule.timesteps(n),
        generators=generators(),
        clip_x0=1.0 if clip else None,
    ):
        output = theirs.step(net(x, step.t), step.t, x, generator=own)
        x = output.prev_sample
        assert_close(step.x0, output.pred_original_sample, TABLES[tables])
        if not (offset == 1 and step.i == n - 1 and variance_type != "fixed_small"):
            assert_close(step.x, x, TABLES[tables])
    assert step.i == n - 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 20, 60])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpmpp_2m_equals_diffusers(kind: str, n: int, spacing: Any) -> None:
    theirs = DPMSolverMultistepScheduler(
        **SCALED_LINEAR,
        prediction_type=kind,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    pairs = schedule.timesteps(n, spacing)
    theirs.set_timesteps(timesteps=[t for t, _ in pairs])
    x = start()
    for step in dpmpp_2m(predictor(schedule), x, schedule, pairs):
        x = theirs.step(network(x, step.t), step.t, x).prev_sample
        assert_close(step.x, x)
    assert step.i == n - 1


def pairs_of(scheduler: Any) -> list[tuple[int, int]]:
    """Return the pairs of a diffusers scheduler, without repeated timesteps (Heun's)."""
    ts = list(dict.fromkeys(int(t) for t in scheduler.timesteps.tolist()))
    return list(zip(ts, [*ts[1:], -1], strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("n", [1, 2, 7, 20, 60])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # diffusers' linspace has fractional timesteps
@pytest.mark.parametrize(
    ("ours", "cls", "kind"),
    [
        *((euler, EulerDiscreteScheduler, kind) for kind in KINDS),
        *((heun, HeunDiscreteScheduler, kind) for kind in KINDS),
        (euler_ancestral, EulerAncestralDiscreteScheduler, "epsilon"),  # it has no x0-prediction
        (euler_ancestral, EulerAncestralDiscreteScheduler, "v_prediction"),
    ],
)
def test_samplers_in_sigma_equal_diffusers(ours: Any, cls: Any, kind: str, n: int, spacing: Any) -> None:
    """diffusers samples x / sqrt(alpha). Its first sample is ours if both are given the same x_T at the first sigma."""
    theirs = cls(**SCALED_LINEAR, prediction_type=kind, timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(n)
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    noise = {"generator": generators()} if cls is EulerAncestralDiscreteScheduler else {}
    pairs = pairs_of(theirs)
    steps = list(ours(predictor(schedule), start(), schedule, pairs, generators=generators()))
    x, i = start() / math.sqrt(schedule.alpha_cumprod(pairs[0][0])), -1
    for t in theirs.timesteps:
        output = network(theirs.scale_model_input(x, t), int(t))
        x = theirs.step(output, t, x, **noise).prev_sample
        if getattr(theirs, "state_in_first_order", True) or i == n - 2:  # Heun's last step is of first order
            i += 1
            assert_close(steps[i].x, x * math.sqrt(schedule.alpha_cumprod(pairs[i][1], final=1.0)), 3e-5)
    assert i == n - 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 20, 60])
def test_dpmpp_2m_sde_equals_diffusers(kind: str, n: int) -> None:
    theirs = DPMSolverMultistepScheduler(
        **SCALED_LINEAR, prediction_type=kind, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
    )
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    pairs = schedule.timesteps(n, "trailing")
    theirs.set_timesteps(timesteps=[t for t, _ in pairs])
    x = start()
    steps = dpmpp_2m_sde(predictor(schedule), x, schedule, pairs, generators=generators())
    for step, noise in zip(steps, noises(), strict=False):
        x = theirs.step(network(x, step.t), step.t, x, variance_noise=noise).prev_sample
        assert_close(step.x, x, 3e-5)
    assert step.i == n - 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 60])
def test_unipc_equals_diffusers(kind: str, n: int) -> None:
    theirs = UniPCMultistepScheduler(**SCALED_LINEAR, prediction_type=kind)
    theirs.set_timesteps(n)
    schedule, x = NoiseSchedule.scaled_linear(prediction_type=kind), start()
    for step in unipc(predictor(schedule), x, schedule, pairs_of(theirs)):
        x = theirs.step(network(x, step.t), step.t, x).prev_sample
        assert_close(step.x, x, 3e-5)
    assert step.i == n - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
def test_lcm_equals_diffusers(kind: str, n: int) -> None:
    theirs = LCMScheduler(**SCALED_LINEAR, prediction_type=kind, clip_sample=False)
    theirs.set_timesteps(n)
    schedule, own, x = NoiseSchedule.scaled_linear(prediction_type=kind), generators(), start()
    pairs = schedule.timesteps(n, "lcm")
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    for step in lcm(predictor(schedule), x, schedule, pairs, generators=generators()):
        x = theirs.step(network(x, step.t), step.t, x, generator=own).prev_sample
        assert_close(step.x, x, 3e-5)
    assert step.i == n - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_equals_diffusers(kind: str, n: int, eta: float) -> None:
    """diffusers ends at alphas_cumprod[0], as we do on Stable Diffusion's schedule (`set_alpha_to_one` false)."""
    theirs = TCDScheduler(**SCALED_LINEAR, prediction_type=kind, clip_sample=False)
    theirs.set_timesteps(n)
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind, set_alpha_to_one=False)
    own, x, pairs = generators(), start(), schedule.timesteps(n, "lcm")
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    for step in tcd(predictor(schedule), x, schedule, pairs, generators=generators(), eta=eta):
        x = theirs.step(network(x, step.t), step.t, x, eta=eta, generator=own).prev_sample
        assert_close(step.x, x, 3e-5)
    assert step.i == n - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpmpp_sde_equals_k_diffusion(kind: str, n: int, spacing: Any) -> None:
    """The middle of a step may be any timestep between its ends; it must be nearest half-way, or beside that."""
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    pairs, asked = schedule.timesteps(n, spacing), []

    def predict(x: torch.Tensor, t: int) -> Prediction:
        asked.append(t)
        return schedule.prediction(network(x, t), x, t)

    steps = list(dpmpp_sde(predict, start(dtype=torch.float64), schedule, pairs, generators=generators()))
    middles = [t for t in asked if t not in dict(pairs)]
    assert len(middles) == n - 1  # the last step goes to the clean sample at once
    lam = 0.5 * np.log(ALPHAS / (1 - ALPHAS))
    for (t, t_prev), middle in zip(pairs, middles, strict=False):
        wanted = np.interp((lam[t] + lam[t_prev]) / 2, lam[::-1], np.arange(1000)[::-1])
        assert t_prev < middle < t
        assert abs(middle - wanted) <= 1
    draws = noises()

    def x0_of(x: np.ndarray, t: int) -> np.ndarray:
        return reference.from_output(kind, network(torch.from_numpy(x), t).numpy(), x, ALPHAS[t])[0]

    x = start(dtype=torch.float64).numpy()
    for step, (t, t_prev), middle in zip(steps, pairs, [*middles, None], strict=True):
        if middle is None:
            x = x0_of(x, t)
        else:
            z = [next(draws).double().numpy() for _ in range(2)]
            x = reference.dpmpp_sde(x0_of, x, (t, middle, t_prev), ALPHAS, z)
        assert_close(step.x, x, 1e-9)


# Equality with the papers' formulas in float64, for every spacing


def reference_run(
    name: str, kind: str, pairs: list[tuple[int, int]], final: float = 1.0, eta: float = 0.0, variance: str = ""
) -> list[np.ndarray]:
    """Return the samples of each step by the formulas of tests/helpers/reference.py, for the same network and noise."""
    net = learned_network if variance == "learned_range" else network
    x = start(dtype=torch.float64).numpy()

    def predict(x: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        output = net(torch.from_numpy(x), t).numpy()
        return *reference.from_output(kind, output[:, :4], x, ALPHAS[t]), output[:, 4:]

    if name == "dpm++2m":
        alphas = [*(ALPHAS[t] for t, _ in pairs), 1.0]
        return reference.dpmpp_2m(lambda x, i: predict(x, pairs[i][0])[0], x, alphas)
    samples = []
    for (t, t_prev), noise in zip(pairs, noises(), strict=False):
        x0, eps, raw = predict(x, t)
        a, a_prev = ALPHAS[t], ALPHAS[t_prev] if t_prev >= 0 else final
        z = noise.double().numpy()
        if name == "ddim":
            x = reference.ddim_step(x0, eps, a, a_prev, eta, z)
        else:
            x = reference.ddpm_mean(x0, x, a, a_prev)
            if t_prev >= 0:
                x = x + np.sqrt(reference.ddpm_variance(variance, a, a_prev, raw)) * z
        samples.append(x)
    return samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_the_paper(kind: Any, spacing: Any, eta: float, to_one: bool) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=to_one)
    pairs = schedule.timesteps(23)
    steps = ddim(predictor(schedule), start(dtype=torch.float64), schedule, pairs, generators=generators(), eta=eta)
    expected = reference_run("ddim", kind, pairs, final=1.0 if to_one else ALPHAS[0], eta=eta)
    for step, x in zip(steps, expected, strict=True):
        assert_close(step.x, x, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_equals_the_paper(kind: Any, spacing: Any, variance_type: Any) -> None:
    """The last step must go to alpha 1 even if the schedule's own last alpha, meant for DDIM, is not 1."""
    schedule = NoiseSchedule.scaled_linear(
        prediction_type=kind,
        timestep_spacing=spacing,
        variance_type=variance_type,
        set_alpha_to_one=False,
    )
    net = learned_network if variance_type == "learned_range" else network
    pairs = schedule.timesteps(23)
    steps = ddpm(predictor(schedule, net), start(dtype=torch.float64), schedule, pairs, generators=generators())
    for step, x in zip(steps, reference_run("ddpm", kind, pairs, variance=variance_type), strict=True):
        assert_close(step.x, x, 1e-9)


def test_ddpm_variance_type_can_be_chosen() -> None:
    schedule = NoiseSchedule.scaled_linear(variance_type="fixed_small")
    pairs = schedule.timesteps(9)
    steps = ddpm(
        predictor(schedule),
        start(dtype=torch.float64),
        schedule,
        pairs,
        generators=generators(),
        variance_type="fixed_large",
    )
    for step, x in zip(steps, reference_run("ddpm", "epsilon", pairs, variance="fixed_large"), strict=True):
        assert_close(step.x, x, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 23])
def test_dpmpp_2m_equals_the_paper(kind: Any, spacing: Any, n: int) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=False)
    pairs = schedule.timesteps(n)
    steps = dpmpp_2m(predictor(schedule), start(dtype=torch.float64), schedule, pairs)
    for step, x in zip(steps, reference_run("dpm++2m", kind, pairs), strict=True):
        assert_close(step.x, x, 1e-9)


ALPHA_PAIRS = st.tuples(st.floats(1e-4, 0.9999), st.floats(1e-4, 0.9999)).filter(lambda a: abs(a[0] - a[1]) > 1e-4)


@settings(deadline=None, max_examples=60)
@given(alphas=ALPHA_PAIRS, eta=st.floats(0, 1), raw=st.floats(-1, 1), seed=st.integers(0, 2**31))
def test_single_steps_equal_the_papers(alphas: tuple[float, float], eta: float, raw: float, seed: int) -> None:
    a, a_prev = sorted(alphas)
    x, eps, z, y = torch.randn(4, 2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    prediction = Prediction(x0, eps, torch.full_like(x, raw))
    n = {"x": x.numpy(), "x0": x0.numpy(), "eps": eps.numpy(), "z": z.numpy(), "y": y.numpy()}
    got = ddim_step(prediction, a, a_prev, eta=eta, noise=z)
    assert_close(got, reference.ddim_step(n["x0"], n["eps"], a, a_prev, eta, n["z"]), 1e-9)
    mean = reference.ddpm_mean(n["x0"], n["x"], a, a_prev)
    assert_close(ddpm_step(x, prediction, a, a_prev, noise=None), mean, 1e-9)
    for kind in ("fixed_small", "fixed_large", "learned_range"):
        std = np.sqrt(reference.ddpm_variance(kind, a, a_prev, raw))
        assert_close(ddpm_step(x, prediction, a, a_prev, variance_type=kind, noise=z), mean + std * n["z"], 1e-9)
    before = a / 2
    first = reference.dpmpp_2m(lambda *_: n["x0"], n["x"], [a, a_prev])[-1]
    assert_close(dpmpp_2m_step(x, x0, a, a_prev), first, 1e-9)
    # Test the second step of Algorithm 2 alone, with a start from which the first step reaches x.
    a0, a1 = math.sqrt(a), math.sqrt(1 - a)
    begin = (n["x"] - (a0 - a1 / math.sqrt(1 - before) * math.sqrt(before)) * n["y"]) * math.sqrt(1 - before) / a1
    second = reference.dpmpp_2m(lambda _, i: (n["y"], n["x0"])[i], begin, [before, a, a_prev])[-1]
    got = dpmpp_2m_step(x, x0, a, a_prev, previous_x0=y, alpha_before=before)
    assert_close(got, second, 1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9999])
def test_a_step_to_alpha_1_gives_the_predicted_x0(alpha: float) -> None:
    x, x0 = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(x0, (x - math.sqrt(alpha) * x0) / math.sqrt(1 - alpha))
    assert_close(ddim_step(prediction, alpha, 1.0), x0, 1e-12)
    assert_close(ddpm_step(x, prediction, alpha, 1.0), x0, 1e-12)
    assert_close(dpmpp_2m_step(x, x0, alpha, 1.0), x0, 1e-12)
    assert_close(tcd_step(prediction, 1.0, 1.0), x0, 1e-12)
    assert_close(lcm_step(x, prediction, 10_000, 1.0), x0, 1e-8)


def test_correctors_leave_a_step_from_pure_noise_alone() -> None:
    """Both would have to average over an infinite range of noise levels."""
    x, x0, later = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = Prediction(x0, x), Prediction(later, x)
    assert torch.equal(heun_step(first, second, 0.0, 0.3), ddim_step(first, 0.0, 0.3))
    assert torch.equal(unic_step(x, x0, 0.0, 0.3, None, None, x0_prev=later), dpmpp_2m_step(x, x0, 0.0, 0.3))


def test_second_order_steps_of_constant_predictions_are_first_order_ones() -> None:
    x, x0 = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(x0, (x - math.sqrt(0.2) * x0) / math.sqrt(0.8))
    expected = ddim_step(prediction, 0.2, 0.6)
    assert_close(heun_step(prediction, prediction, 0.2, 0.6), expected, 1e-12)
    assert_close(unic_step(x, x0, 0.2, 0.6, x0, 0.1, x0_prev=x0), expected, 1e-12)
    assert_close(dpmpp_sde_step(x, x0, x0, 0.2, 0.4, 0.6), ddpm_step(x, prediction, 0.2, 0.6), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddim_with_eta_1_equals_ddpm(kind: Any, spacing: Any, dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=True)
    pairs = schedule.timesteps(31)
    x_T = start(dtype=dtype)
    a = ddim(predictor(schedule), x_T, schedule, pairs, generators=generators(), eta=1.0)
    b = ddpm(predictor(schedule), x_T, schedule, pairs, generators=generators(), variance_type="fixed_small")
    for one, other in zip(a, b, strict=True):
        assert_close(one.x, other.x, 1e-5 if dtype == torch.float32 else 1e-9)


# The loops

LOOPS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddim": ddim,
    "ddim eta 0.6": lambda *args, **kwargs: ddim(*args, eta=0.6, **kwargs),
    "ddim eta 1": lambda *args, **kwargs: ddim(*args, eta=1.0, **kwargs),
    "ddpm": ddpm,
    "ddpm fixed_large": lambda *args, **kwargs: ddpm(*args, variance_type="fixed_large", **kwargs),
    "euler": euler,
    "euler_a": euler_ancestral,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "dpm++2m_sde": dpmpp_2m_sde,
    "dpm++sde": dpmpp_sde,
    "unipc": unipc,
    "lcm": lcm,
    "tcd": tcd,
    "tcd eta 0.3": lambda *args, **kwargs: tcd(*args, eta=0.3, **kwargs),
}
RANDOM = ("ddim eta 0.6", "ddim eta 1", "ddpm", "ddpm fixed_large", "euler_a", "dpm++2m_sde", "dpm++sde", "lcm")
RANDOM += ("tcd eta 0.3",)
QUIET = ("ddim", "euler", "heun", "dpm++2m", "unipc", "tcd")
TWICE = ("heun", "dpm++sde")
"""Samplers with two evaluations a step."""
MULTISTEP = ("dpm++2m", "dpm++2m_sde", "unipc")
"""Samplers whose steps use the step before."""


def test_samplers_have_names() -> None:
    assert set(SAMPLERS) == set(LOOPS) - {"ddim eta 0.6", "ddim eta 1", "ddpm fixed_large", "tcd eta 0.3"}
    assert all(SAMPLERS[name] is LOOPS[name] for name in SAMPLERS)
    assert set(LOOPS) == {*RANDOM, *QUIET}


@pytest.mark.parametrize("name", SAMPLERS)
def test_eta_belongs_to_the_samplers_that_take_it(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear()

    def run(sampler: Callable[..., Iterator[Step]], **options: float) -> torch.Tensor:
        pairs = schedule.timesteps(3)
        return list(sampler(predictor(schedule), start(), schedule, pairs, generators=generators(), **options))[-1].x

    assert torch.equal(run(sampler_by_name(name)), run(LOOPS[name]))
    if name in ("ddim", "tcd"):
        assert torch.equal(run(sampler_by_name(name, eta=1.0)), run(LOOPS[name], eta=1.0))
    else:
        message = f"eta belongs to sampler 'ddim' or 'tcd'; '{name}' has none"
        with pytest.raises(ArgumentError, match=re.escape(message)):
            sampler_by_name(name, eta=0.5)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_lazy_and_yield_steps(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    pairs = schedule.timesteps(6)
    calls: list[tuple[torch.Tensor, int, Prediction]] = []

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        calls.append((x_t.clone(), t, schedule.prediction(network(x_t, t), x_t, t)))
        return calls[-1][2]

    x_T = start()
    steps = LOOPS[name](predict, x_T, schedule, pairs, generators=generators())
    assert iter(steps) is steps
    assert not calls
    x = x_T
    for i, (t, _) in enumerate(pairs):
        step = next(steps)
        assert Step._fields == ("i", "t", "x", "x0")
        assert (step.i, step.t) == (i, t)
        first = 2 * i if name in TWICE else i
        assert len(calls) == (first + 2 if name in TWICE and i < 5 else first + 1)
        assert torch.equal(calls[first][0], x)
        assert calls[first][1] == t
        assert torch.equal(step.x0, calls[first][2].x0)
        assert step.x.shape == x_T.shape
        assert step.x.dtype == x_T.dtype
        x = step.x
    with pytest.raises(StopIteration):
        next(steps)
    assert len(calls) == (11 if name in TWICE else 6)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_leave_their_inputs_alone(name: str) -> None:
    """A loop must not change x_T, a sample that it has yielded, or a prediction."""
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        prediction = schedule.prediction(network(x_t, t), x_t, t)
        seen.extend((tensor, tensor.clone()) for tensor in prediction if tensor is not None)
        return prediction

    x_T = start()
    seen.append((x_T, x_T.clone()))
    for step in LOOPS[name](predict, x_T, schedule, schedule.timesteps(5), generators=generators()):
        seen.extend([(step.x, step.x.clone()), (step.x0, step.x0.clone())])
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)


@pytest.mark.parametrize("name", LOOPS)
def test_clip_bounds_every_x0(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    run = LOOPS[name]
    pairs = schedule.timesteps(8)
    free = list(run(predictor(schedule), start(), schedule, pairs, generators=generators()))
    clipped = list(run(predictor(schedule), start(), schedule, pairs, generators=generators(), clip_x0=0.5))
    assert max(float(step.x0.abs().max()) for step in free) > 1
    assert max(float(step.x0.abs().max()) for step in clipped) == 0.5
    assert torch.equal(clipped[0].x0, free[0].x0.clamp(-0.5, 0.5))
    if name != "lcm":  # it mixes a little of x_t into x0
        assert_close(clipped[-1].x, clipped[-1].x0, 1e-6)  # the last step goes to alpha 1 and returns x0


@pytest.mark.parametrize("name", LOOPS)
def test_an_image_is_the_same_alone_in_a_batch_and_elsewhere_in_it(name: str) -> None:
    """The tolerance is for the network only: its float32 output may depend on the batch."""
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    pairs = schedule.timesteps(12, "trailing")
    batch = start((4, *SHAPE[1:]))

    def run(order: list[int]) -> torch.Tensor:
        own = [torch.Generator().manual_seed(100 + i) for i in order]
        for step in LOOPS[name](predictor(schedule), batch[order], schedule, pairs, generators=own):
            x = step.x
        return x

    whole = run([0, 1, 2, 3])
    assert not torch.allclose(whole[0], whole[1], atol=0.1)
    for i in range(4):
        torch.testing.assert_close(run([i])[0], whole[i], rtol=0, atol=1e-6)
    torch.testing.assert_close(run([2, 0, 3, 1]), whole[[2, 0, 3, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RANDOM)
def test_generators_decide_the_noise(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")

    def run(first: int) -> torch.Tensor:
        own = generators(first)
        return list(LOOPS[name](predictor(schedule), start(), schedule, schedule.timesteps(5), generators=own))[-1].x

    before = torch.get_rng_state()
    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(50), atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", RANDOM)
def test_without_generators_the_global_one_is_used(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return list(LOOPS[name](predictor(schedule), start(), schedule, schedule.timesteps(5)))[-1].x

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-2)


@pytest.mark.parametrize("name", QUIET)
def test_deterministic_samplers_draw_nothing(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    own = generators()
    states = [torch.get_rng_state(), *(generator.get_state() for generator in own)]
    list(LOOPS[name](predictor(schedule), start(), schedule, schedule.timesteps(5), generators=own))
    list(LOOPS[name](predictor(schedule), start(), schedule, schedule.timesteps(5)))
    after = [torch.get_rng_state(), *(generator.get_state() for generator in own)]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_generators_of_another_number_are_refused(count: int) -> None:
    schedule = NoiseSchedule.scaled_linear()
    steps = ddpm(predictor(schedule), start(), schedule, schedule.timesteps(3), generators=generators(count=count))
    with pytest.raises(ArgumentError, match=f"{count} generators"):
        list(steps)


def test_learned_range_of_a_model_without_it_is_refused() -> None:
    schedule = NoiseSchedule.scaled_linear()
    steps = ddpm(predictor(schedule), start(), schedule, schedule.timesteps(3), variance_type="learned_range")
    with pytest.raises(ArgumentError, match="learned_range"):
        list(steps)


@pytest.mark.parametrize(("sampler", "option"), [(ddim, "order"), (ddpm, "eta"), (dpmpp_2m, "eta"), (lcm, "eta")])
def test_unknown_options_are_refused(sampler: Callable[..., Any], option: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    with pytest.raises(TypeError, match=option):
        list(sampler(predictor(schedule), start(), schedule, schedule.timesteps(2), **{option: 1}))


@pytest.mark.parametrize("name", LOOPS)
def test_loops_run_any_list_of_pairs(name: str) -> None:
    """A list may end at t_prev = 0 instead of -1. Two runs in a row equal one, except for a sampler that uses the step
    before.
    """
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    pairs = [(900, 600), (600, 300), (300, 50), (50, 0)]
    own = generators()
    whole = list(LOOPS[name](predictor(schedule), start(), schedule, pairs, generators=generators()))
    head = list(LOOPS[name](predictor(schedule), start(), schedule, pairs[:2], generators=own))
    assert torch.equal(head[-1].x, whole[1].x)
    if name not in MULTISTEP:
        tail = list(LOOPS[name](predictor(schedule), head[-1].x, schedule, pairs[2:], generators=own))
        assert torch.equal(tail[-1].x, whole[-1].x)
