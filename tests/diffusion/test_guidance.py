from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.guidance import APG, apg, cfg, classifier, energy, guided, rescale
from sdkit.diffusion.samplers import SAMPLERS
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError
from tests.helpers import reference

KINDS = ("epsilon", "v_prediction", "sample")
SHAPE = (3, 4, 5, 6)  # (B, C, h, w)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


COND, UNCOND = Conditioning(normal(1, 3, 7, 4)), Conditioning(normal(2, 3, 7, 4))  # (B, L, D)


class Model:
    """A stand-in for the U-Net that records the batch size and the timestep of each call."""

    def __init__(self, learned_range: bool = False) -> None:
        self.batches: list[int] = []
        self.timesteps: list[int] = []
        self.learned_range = learned_range

    def __call__(self, x_t: torch.Tensor, t: Any, cond: Conditioning) -> torch.Tensor:
        assert len(x_t) == len(cond)
        self.batches.append(len(x_t))
        self.timesteps.append(int(torch.as_tensor(t).flatten()[0]))
        return self.output(x_t, self.timesteps[-1], cond)

    def output(self, x_t: torch.Tensor, t: int, cond: Conditioning) -> torch.Tensor:
        assert cond.text is not None
        c = cond.text.mean(dim=1)[:, :, None, None]  # (B, 4, 1, 1)
        output = torch.tanh(x_t * c) + 0.5 * torch.cos(c * (1 + t / 500))
        return torch.cat([output, torch.sin(x_t + c)], dim=1) if self.learned_range else output


# Closed forms


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(-2, 20), seed=st.integers(0, 2**31))
def test_cfg_equals_the_closed_form(scale: float, seed: int) -> None:
    uncond, cond = normal(seed, 2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(cfg(uncond, cond, scale), (1 - scale) * uncond + scale * cond, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cfg(uncond, cond, 1.0), cond, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cfg(uncond, cond, 0.0), uncond, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(phi=st.floats(0, 1), scale=st.floats(1, 20), seed=st.integers(0, 2**31))
def test_rescale_equals_diffusers(phi: float, scale: float, seed: int) -> None:
    uncond, cond = normal(seed, 2, *SHAPE, dtype=torch.float64)
    out = cfg(uncond, cond, scale)
    torch.testing.assert_close(rescale(out, cond, phi), rescale_noise_cfg(out, cond, phi), rtol=1e-12, atol=1e-12)


def test_rescale_restores_each_images_own_deviation() -> None:
    cond = normal(0, *SHAPE, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])[:, None, None, None]
    out = 3 * cond + 1
    restored = rescale(out, cond, 1.0)
    torch.testing.assert_close(restored.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert torch.equal(rescale(out, cond, 0.0), out)


# Adaptive projected guidance


@settings(deadline=None, max_examples=40)
@given(
    scale=st.floats(1, 15),
    eta=st.floats(0, 1),
    radius=st.sampled_from([0.0, 0.5, 5.0, 14.0, 1e3]),
    momentum=st.sampled_from([0.0, -0.5, -0.75, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_apg_equals_the_papers_algorithm(scale: float, eta: float, radius: float, momentum: float, seed: int) -> None:
    """Over three steps, each of which passes its running average to the next. diffusers' implementation
    must agree too.
    """
    chosen = APG(eta=eta, norm_threshold=radius, momentum=momentum)
    buffer = MomentumBuffer(momentum)
    average: torch.Tensor | None = None
    expected_average: Any = 0.0
    for i in range(3):
        uncond, cond = normal(seed + i, 2, *SHAPE, dtype=torch.float64)
        out, average = apg(uncond, cond, scale, chosen, average)
        expected, expected_average = reference.apg(
            uncond.numpy(), cond.numpy(), scale, eta, radius, momentum, expected_average
        )
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(average.numpy(), expected_average, rtol=1e-9, atol=1e-9)
        theirs = normalized_guidance(cond, uncond, scale - 1, buffer, eta, radius, use_original_formulation=True)
        torch.testing.assert_close(out, theirs, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1, 15), seed=st.integers(0, 2**31))
def test_apg_without_its_three_parts_is_cfg_on_x0(scale: float, seed: int) -> None:
    uncond, cond = normal(seed, 2, *SHAPE, dtype=torch.float64)
    out, average = apg(uncond, cond, scale, APG(eta=1.0))
    torch.testing.assert_close(out, cfg(uncond, cond, scale), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(average, cond - uncond)


def test_apg_drops_the_part_parallel_to_the_conditional_prediction() -> None:
    uncond, cond = normal(0, 2, *SHAPE, dtype=torch.float64)
    update = apg(uncond, cond, 4.0, APG(eta=0.0))[0] - cond
    np.testing.assert_allclose((update * cond).sum(dim=(1, 2, 3)).numpy(), 0, atol=1e-10)
    parallel = apg(uncond, 2 * uncond, 4.0, APG(eta=0.0))[0]
    torch.testing.assert_close(parallel, 2 * uncond)


def test_apg_bounds_the_norm_of_each_image() -> None:
    cond = normal(0, *SHAPE, dtype=torch.float64)
    step = torch.tensor([0.01, 1.0, 100.0])[:, None, None, None] * normal(1, *SHAPE, dtype=torch.float64)
    out, _ = apg(cond - step, cond, 2.0, APG(eta=1.0, norm_threshold=3.0))
    norms = (out - cond).flatten(1).norm(dim=1)
    assert norms[0] == pytest.approx(float(step[0].norm()))
    assert norms[1:].tolist() == pytest.approx([3.0, 3.0])


def test_apg_settings_are_frozen_and_by_keyword() -> None:
    assert dataclasses.asdict(APG()) == {"eta": 0.0, "norm_threshold": 0.0, "momentum": 0.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        APG().eta = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        APG(0.5)  # type: ignore[call-arg]


# Results of the predictor


def two_passes(
    schedule: NoiseSchedule, model: Model, x_t: torch.Tensor, t: int, scale: float, phi: float = 0.0
) -> Prediction:
    """Guide as in the literature: one pass for each condition, combined in the model's own parameterisation."""
    cond, uncond = (model.output(x_t, t, c) for c in (COND, UNCOND))
    output = uncond + scale * (cond - uncond)
    if phi:
        output = rescale_noise_cfg(output, cond, phi)
    return schedule.prediction(output, x_t, t)


def assert_same(a: Prediction, b: Prediction) -> None:
    torch.testing.assert_close(a.x0, b.x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.eps, b.eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_one_batched_pass_equals_two_passes(kind: Any, scale: float, phi: float) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    model = Model()
    predict = guided(model, schedule, COND, UNCOND, scale, phi=phi)
    for t in (900, 400, 3):
        x_t = normal(t, *SHAPE)
        assert_same(predict(x_t, t), two_passes(schedule, model, x_t, t, scale, phi))
    assert model.batches == [6, 6, 6]
    assert model.timesteps == [900, 400, 3]


def test_scale_is_7_5_unless_given() -> None:
    schedule = NoiseSchedule.scaled_linear()
    x_t = normal(0, *SHAPE)
    predict = guided(Model(), schedule, COND, UNCOND)
    assert_same(predict(x_t, 500), two_passes(schedule, Model(), x_t, 500, 7.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uncond", [None, UNCOND])
def test_scale_1_is_the_conditional_prediction(kind: Any, uncond: Conditioning | None) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    model = Model()
    x_t = normal(0, *SHAPE)
    got = guided(model, schedule, COND, uncond, 1.0, phi=0.7)(x_t, 300)
    assert_same(got, schedule.prediction(model.output(x_t, 300, COND), x_t, 300))
    assert model.batches == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_guided_apg_works_on_x0_and_carries_its_average(kind: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    model = Model()
    predict = guided(model, schedule, COND, UNCOND, 5.0, projected=APG(eta=0.3, norm_threshold=4.0, momentum=-0.5))
    average: Any = 0.0
    for t in (800, 500, 100):
        x_t = normal(t, *SHAPE)
        cond, uncond = (schedule.prediction(model.output(x_t, t, c), x_t, t).x0.numpy() for c in (COND, UNCOND))
        x0, average = reference.apg(uncond, cond, 5.0, 0.3, 4.0, -0.5, average)
        got = predict(x_t, t)
        a = float(schedule.alphas_cumprod[t])
        np.testing.assert_allclose(got.x0.numpy(), x0, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            got.eps.numpy(), (x_t.numpy() - math.sqrt(a) * x0) / math.sqrt(1 - a), rtol=1e-4, atol=2e-4
        )
    assert model.batches == [6, 6, 6]


def test_each_predictor_has_its_own_average() -> None:
    schedule = NoiseSchedule.scaled_linear()
    x_t = normal(0, *SHAPE)

    def make() -> Callable[[torch.Tensor, int], Prediction]:
        return guided(Model(), schedule, COND, UNCOND, 5.0, projected=APG(momentum=-0.5))

    first = make()
    once = first(x_t, 700).x0
    assert not torch.allclose(first(x_t, 700).x0, once)
    assert torch.equal(make()(x_t, 700).x0, once)


@pytest.mark.parametrize("projected", [None, APG(eta=0.0, norm_threshold=2.0)])
def test_learned_variance_is_the_conditional_models_own(projected: APG | None) -> None:
    """The learned variance interpolates between two log variances by a number in [-1, 1]. Guidance must not extrapolate
    it.
    """
    schedule = NoiseSchedule.scaled_linear(variance_type="learned_range")
    model = Model(learned_range=True)
    x_t = normal(0, *SHAPE)
    got = guided(model, schedule, COND, UNCOND, 7.5, projected=projected)(x_t, 500)
    whole = model.output(x_t, 500, COND)
    assert got.variance is not None
    torch.testing.assert_close(got.variance, whole[:, 4:])
    if projected is None:
        assert_same(got, two_passes(schedule, Model(), x_t, 500, 7.5))


def test_guidance_is_the_same_alone_and_in_a_batch() -> None:
    schedule = NoiseSchedule.scaled_linear()
    x_t = normal(0, *SHAPE)
    for options in ({}, {"phi": 0.7}, {"projected": APG(eta=0.5, norm_threshold=2.0, momentum=-0.5)}):
        whole = guided(Model(), schedule, COND, UNCOND, 6.0, **options)(x_t, 600)
        for i in range(3):
            one = slice(i, i + 1)
            alone = guided(Model(), schedule, COND[one], UNCOND[one], 6.0, **options)(x_t[one], 600)
            torch.testing.assert_close(alone.x0[0], whole.x0[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projected", [None, APG(eta=0.2, norm_threshold=3.0, momentum=-0.5)])
def test_guided_v_is_finite_at_zero_terminal_snr(projected: APG | None) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction").zero_terminal_snr()
    x_t = normal(0, *SHAPE)
    got = guided(Model(), schedule, COND, UNCOND, 7.5, projected=projected)(x_t, 999)
    assert torch.isfinite(got.x0).all()
    torch.testing.assert_close(got.eps, x_t)


@pytest.mark.parametrize("options", [{}, {"phi": 0.7}, {"projected": APG(eta=0.0, norm_threshold=2.0)}])
def test_guidance_between_equal_conditions_is_none(options: Any) -> None:
    """The prompt equals the negative prompt, so the update has norm 0. This must not divide by zero."""
    schedule = NoiseSchedule.scaled_linear()
    x_t = normal(0, *SHAPE)
    got = guided(Model(), schedule, COND, COND, 7.5, **options)(x_t, 400)
    assert_same(got, schedule.prediction(Model().output(x_t, 400, COND), x_t, 400))


def test_guidance_without_an_unconditional_embedding_is_refused() -> None:
    with pytest.raises(ArgumentError, match="unconditional"):
        guided(Model(), NoiseSchedule.scaled_linear(), COND, None, 7.5)


@pytest.mark.parametrize("interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_an_interval_that_cannot_be_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="interval"):
        guided(Model(), NoiseSchedule.scaled_linear(), COND, UNCOND, 7.5, interval=interval)


# Cost of the predictor


TWICE = ("heun", "dpm++sde")
"""Samplers that evaluate the model twice a step, except in the last one."""


@pytest.mark.parametrize("name", TWICE)
def test_two_evaluations_a_step(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    model = Model()
    predict = guided(model, schedule, COND, UNCOND, 7.5)
    assert len(list(SAMPLERS[name](predict, normal(0, *SHAPE), schedule, schedule.timesteps(11)))) == 11
    assert model.batches == [6] * 21


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {*TWICE}))
@pytest.mark.parametrize(("scale", "batch"), [(1.0, 3), (7.5, 6), (0.0, 6)])
def test_one_evaluation_a_step(name: str, scale: float, batch: int) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    model = Model()
    predict = guided(model, schedule, COND, UNCOND, scale)
    pairs = schedule.timesteps(11)
    assert len(list(SAMPLERS[name](predict, normal(0, *SHAPE), schedule, pairs))) == 11
    assert model.batches == [batch] * 11
    assert model.timesteps == [t for t, _ in pairs]


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {*TWICE}))
def test_an_interval_costs_two_batches_inside_and_one_outside(name: str) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction")
    model = Model()
    interval = (0.4, 5.0)
    predict = guided(model, schedule, COND, UNCOND, 7.5, interval=interval)
    pairs = schedule.timesteps(20)
    list(SAMPLERS[name](predict, normal(0, *SHAPE), schedule, pairs))
    alphas = np.cumprod(1 - reference.scaled_linear_betas(1000, 0.00085, 0.012))
    sigmas = [math.sqrt((1 - alphas[t]) / alphas[t]) for t, _ in pairs]
    inside = [interval[0] < sigma <= interval[1] for sigma in sigmas]
    assert model.batches == [6 if within else 3 for within in inside]
    assert 0 < sum(inside) < 20
    assert sum(model.batches) == 20 * 3 + sum(inside) * 3


def test_outside_the_interval_the_conditional_prediction_is_returned() -> None:
    schedule = NoiseSchedule.scaled_linear()
    x_t = normal(0, *SHAPE)
    predict = guided(Model(), schedule, COND, UNCOND, 7.5, interval=(0.4, 5.0), phi=0.7)
    assert_same(predict(x_t, 999), schedule.prediction(Model().output(x_t, 999, COND), x_t, 999))
    assert_same(predict(x_t, 500), two_passes(schedule, Model(), x_t, 500, 7.5, 0.7))
    assert_same(predict(x_t, 3), schedule.prediction(Model().output(x_t, 3, COND), x_t, 3))


@pytest.mark.parametrize(
    ("interval", "batch"),
    [((0.5, 1.0), 6), ((1.0, 2.0), 3), ((1.0, math.inf), 3), ((0.0, 0.99), 3), ((0.0, math.inf), 6), (None, 6)],
)
def test_the_interval_is_open_below_and_closed_above(interval: tuple[float, float] | None, batch: int) -> None:
    schedule = NoiseSchedule.from_betas([0.5, 0.5])
    model = Model()
    guided(model, schedule, COND, UNCOND, 7.5, interval=interval)(normal(0, *SHAPE), 0)  # here sigma is exactly 1
    assert model.batches == [batch]


@pytest.mark.parametrize(("high", "batch"), [(5.0, 3), (math.inf, 6)])
def test_the_interval_at_zero_terminal_snr(high: float, batch: int) -> None:
    """At zero terminal SNR sigma is infinite. It must be compared without a division by zero."""
    schedule = NoiseSchedule.scaled_linear(prediction_type="v_prediction").zero_terminal_snr()
    model = Model()
    predict = guided(model, schedule, COND, UNCOND, 7.5, interval=(0.3, high))
    assert torch.isfinite(predict(normal(0, *SHAPE), 999).x0).all()
    assert model.batches == [batch]


def test_nothing_to_divide_by_is_no_nan() -> None:
    zero = torch.zeros(1, 4, 2, 2)
    assert rescale(zero, zero, 0.7).isfinite().all()
    assert apg(zero, zero, 5.0, APG(norm_threshold=1.0))[0].isfinite().all()


# Classifier guidance on data from two Gaussians, for which scores and classifier are known in closed form

MEANS, STD, WEIGHTS = torch.tensor([-1.0, 0.6], dtype=torch.float64), 0.3, torch.tensor([0.3, 0.7], dtype=torch.float64)


def log_joint(x_t: torch.Tensor, a: float) -> torch.Tensor:
    """Return log p(x_t, y) for both classes as (B, 2). x_t is (B, 1, 1, 1): each image is one pixel."""
    variance = a * STD**2 + 1 - a
    return WEIGHTS.log() - (x_t.flatten(1) - math.sqrt(a) * MEANS) ** 2 / (2 * variance)


def posterior(x_t: torch.Tensor, a: float) -> torch.Tensor:
    """Return E[x0 | x_t, y] for both classes as (B, 2)."""
    gain = math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
    return MEANS + gain * (x_t.flatten(1) - math.sqrt(a) * MEANS)


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_perfect_classifier_makes_the_conditional_model(prediction_type: str, inference: bool) -> None:
    """By Bayes' rule, the unconditional score plus the classifier's gradient is the conditional score."""
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)

    def unconditional(x_t: torch.Tensor, t: int) -> Prediction:
        a = float(schedule.alphas_cumprod[t])
        x0 = (log_joint(x_t, a).softmax(1) * posterior(x_t, a)).sum(1).reshape(x_t.shape)
        return schedule.prediction(x0, x_t, t, "sample")

    def log_prob(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return log_joint(x_t, float(schedule.alphas_cumprod[t])).log_softmax(1)[:, 1]

    with torch.inference_mode(inference):
        x_t = normal(3, 50, 1, 1, 1, dtype=torch.float64)
        for t in (3, 200, 600, 999):
            expected = posterior(x_t, float(schedule.alphas_cumprod[t]))[:, 1].reshape(x_t.shape)
            predicted = classifier(unconditional, log_prob, schedule)(x_t, t)
            torch.testing.assert_close(predicted.x0, expected, rtol=0, atol=1e-9)
            plain = classifier(unconditional, log_prob, schedule, scale=0.0)(x_t, t)
            torch.testing.assert_close(plain.x0, unconditional(x_t, t).x0, rtol=0, atol=1e-9)


def test_a_classifier_has_nothing_to_say_of_pure_noise() -> None:
    schedule = NoiseSchedule.from_betas([0.1, 0.5, 1.0], prediction_type="v_prediction")
    x_t = normal(4, *SHAPE)

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        return schedule.prediction(torch.tanh(x_t), x_t, t)

    guided_by = classifier(predict, lambda x, t: pytest.fail("asked"), schedule)
    assert torch.equal(guided_by(x_t, 2).x0, predict(x_t, 2).x0)


def test_a_classifier_leaves_a_learned_variance_as_it_is() -> None:
    schedule = NoiseSchedule.linear()
    x_t = normal(5, *SHAPE)
    model = Model(learned_range=True)
    predict = guided(model, schedule, COND, scale=1)
    followed = classifier(predict, lambda x, t: -x.square().sum((1, 2, 3)), schedule, 2.0)(x_t, 500)
    plain = predict(x_t, 500)
    assert torch.equal(followed.variance, plain.variance)
    noise = math.sqrt(1 - float(schedule.alphas_cumprod[500]))
    torch.testing.assert_close(followed.eps, plain.eps + 2.0 * noise * 2 * x_t)


# Guidance by an energy of x0


@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("inference", [False, True])
def test_an_energy_that_is_linear_in_x0_shifts_the_mean_of_a_gaussian(prediction_type: str, inference: bool) -> None:
    """For x0 ~ N(0, s^2), p(x0) exp(-k x0) is the density of N(-k s^2, s^2), and E[exp(-k x0) | x_t] is exp(-k x0_hat)
    times a constant: guidance by E = k x0 is exact, and its predictor is that of the shifted Gaussian."""
    schedule = NoiseSchedule.scaled_linear(prediction_type=prediction_type)
    s2, k = 0.6**2, 3.0

    def mean_of(x_t: torch.Tensor, t: int, mean: float) -> torch.Tensor:
        a = float(schedule.alphas_cumprod[t])
        return mean + math.sqrt(a) * s2 / (a * s2 + 1 - a) * (x_t - math.sqrt(a) * mean)

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        return schedule.prediction(mean_of(x_t, t, 0.0), x_t, t, "sample")

    guided_by = energy(predict, lambda x0: k * x0.sum(dim=(1, 2, 3)), schedule)
    with torch.inference_mode(inference):
        x_t = normal(6, *SHAPE, dtype=torch.float64)
        for t in (3, 200, 600, 999):
            prediction = guided_by(x_t, t)
            torch.testing.assert_close(prediction.x0, mean_of(x_t, t, -k * s2), rtol=0, atol=1e-9)
            assert not prediction.x0.requires_grad


def test_the_gradient_of_an_energy_goes_through_the_network() -> None:
    """Central differences of E(x0(x_t)), for a network and an energy that are not linear."""
    schedule, t, h = NoiseSchedule.linear(), 400, 1e-5
    weight = normal(7, 4, 4, dtype=torch.float64)

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        return schedule.prediction(torch.tanh(torch.einsum("bchw,cd->bdhw", x_t, weight)), x_t, t)

    def wanted(x0: torch.Tensor) -> torch.Tensor:
        return (x0.square().mean(dim=(1, 2, 3)) - 0.3).square()

    x_t = normal(8, 2, 4, 2, 2, dtype=torch.float64)
    numeric = torch.zeros_like(x_t)
    for index in range(x_t[0].numel()):
        step = torch.zeros_like(x_t).flatten(1)
        step[:, index] = h
        step = step.reshape(x_t.shape)
        difference = (wanted(predict(x_t + step, t).x0) - wanted(predict(x_t - step, t).x0)) / (2 * h)
        numeric.view(2, -1)[:, index] = difference
    noise = math.sqrt(1 - float(schedule.alphas_cumprod[t]))
    found = (energy(predict, wanted, schedule, 2.0)(x_t, t).eps - predict(x_t, t).eps) / (2.0 * noise)
    torch.testing.assert_close(found, numeric, rtol=1e-5, atol=1e-8)


def test_an_energy_leaves_pure_noise_and_a_learned_variance_as_they_are() -> None:
    terminal = NoiseSchedule.from_betas([0.1, 0.5, 1.0], prediction_type="v_prediction")
    x_t = normal(9, *SHAPE)

    def predict(x_t: torch.Tensor, t: int) -> Prediction:
        return terminal.prediction(torch.tanh(x_t), x_t, t)

    assert torch.equal(energy(predict, lambda x0: pytest.fail("asked"), terminal)(x_t, 2).x0, predict(x_t, 2).x0)
    schedule = NoiseSchedule.linear()
    learned = guided(Model(learned_range=True), schedule, COND, scale=1)
    followed = energy(learned, lambda x0: x0.square().sum(dim=(1, 2, 3)), schedule)(x_t, 500)
    assert torch.equal(followed.variance, learned(x_t, 500).variance)


def test_an_energy_gives_a_number_for_each_image() -> None:
    schedule = NoiseSchedule.linear()
    predict = guided(Model(), schedule, COND, scale=1)
    with pytest.raises(ArgumentError, match=r"an energy returns \(3,\), a number for each image, not \(\)\."):
        energy(predict, lambda x0: x0.sum(), schedule)(normal(10, *SHAPE), 500)
    listed: Any = list
    with pytest.raises(ArgumentError, match=r"an energy returns \(3,\), a number for each image, not list\."):
        energy(predict, listed, schedule)(normal(10, *SHAPE), 500)
    with pytest.raises(ArgumentError, match=r"^the energy has no gradient: compute it from x0"):
        energy(predict, lambda x0: x0.detach().sum(dim=(1, 2, 3)), schedule)(normal(10, *SHAPE), 500)


@pytest.mark.parametrize("scale", [10**400, -(10**400), Fraction(10**400), float("nan"), True, "7.5"])
def test_a_scale_that_cannot_be_is_refused(scale: Any) -> None:
    with pytest.raises(ArgumentError, match=r"the guidance scale must be a number from -1e\+06 to 1e\+06, not"):
        guided(Model(), NoiseSchedule.scaled_linear(), COND, UNCOND, scale)
