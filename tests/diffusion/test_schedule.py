from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import sdkit
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError, SdkitError
from tests.helpers import reference
from tests.helpers.loaders import load_schedule

KINDS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
ASSETS = Path(sdkit.__file__).parent / "assets"

# As published in the scheduler folders of the three model families
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = SD15 | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
EMOJI = json.loads((ASSETS / "emoji" / "scheduler" / "scheduler_config.json").read_text())


def config_of(scheduler: Any) -> dict[str, Any]:
    """Return the config that diffusers writes to scheduler_config.json."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return config


def broadcast(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


# Tables


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (NoiseSchedule.linear(), reference.linear_betas(1000, 1e-4, 0.02)),
        (NoiseSchedule.linear(50, 1e-3, 0.3), reference.linear_betas(50, 1e-3, 0.3)),
        (NoiseSchedule.scaled_linear(), reference.scaled_linear_betas(1000, 0.00085, 0.012)),
        (NoiseSchedule.scaled_linear(200, 0.002, 0.1), reference.scaled_linear_betas(200, 0.002, 0.1)),
        (NoiseSchedule.cosine(), reference.cosine_betas(1000)),
        (NoiseSchedule.cosine(64, s=0.02, max_beta=0.9), reference.cosine_betas(64, 0.02, 0.9)),
        (NoiseSchedule.from_betas([0.1, 0.2, 0.5]), np.array([0.1, 0.2, 0.5])),
        (NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)), np.array([0.1, 0.2, 0.5])),
    ],
)
def test_tables_equal_the_closed_forms_in_float64(schedule: NoiseSchedule, betas: reference.Array) -> None:
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.num_timesteps == len(betas)
    np.testing.assert_allclose(schedule.betas.numpy(), betas, rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-12)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_from_config_tables_equal_diffusers(scheduler_class: Any, beta_schedule: str, zero_snr: bool) -> None:
    theirs = scheduler_class(
        beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    )
    ours = NoiseSchedule.from_config(config_of(theirs))
    assert ours.alphas_cumprod.dtype == torch.float64
    # diffusers' tables are in float32: a cumulative product of 1,000 factors, and with zero SNR a difference of square
    # roots.
    np.testing.assert_allclose(
        ours.alphas_cumprod.numpy(), theirs.alphas_cumprod.double().numpy(), rtol=2e-5, atol=1e-6
    )
    if not zero_snr:
        np.testing.assert_allclose(ours.betas.numpy(), theirs.betas.double().numpy(), rtol=1e-5, atol=2e-7)


def test_from_config_takes_trained_betas_and_number_of_timesteps() -> None:
    betas = [0.01, 0.02, 0.04, 0.3]
    ours = NoiseSchedule.from_config(config_of(DDIMScheduler(num_train_timesteps=4, trained_betas=betas)))
    np.testing.assert_allclose(ours.betas.numpy(), betas, rtol=1e-12)
    assert NoiseSchedule.from_config(config_of(DDIMScheduler(num_train_timesteps=77))).num_timesteps == 77


@pytest.mark.parametrize(
    ("config", "prediction_type"), [(SD15, "epsilon"), (SD21, "v_prediction"), (SD15 | {"steps_offset": 0}, "epsilon")]
)
def test_from_config_of_stable_diffusion(config: dict[str, Any], prediction_type: str) -> None:
    schedule = NoiseSchedule.from_config(config)
    alphas = np.cumprod(1 - reference.scaled_linear_betas(1000, 0.00085, 0.012))
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), alphas, rtol=1e-12)
    assert schedule.final_alpha_cumprod == pytest.approx(alphas[0], rel=1e-12)
    assert schedule.prediction_type == prediction_type
    assert schedule.timestep_spacing == "leading"
    assert schedule.steps_offset == config["steps_offset"]
    assert schedule.clip_x0 is None


def test_from_config_of_the_embedded_model() -> None:
    schedule = NoiseSchedule.from_config(EMOJI)
    alphas = reference.zero_terminal_snr(reference.scaled_linear_betas(1000, 1e-6, 0.012))
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), alphas, rtol=1e-9, atol=1e-15)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.final_alpha_cumprod == 1
    assert (schedule.prediction_type, schedule.timestep_spacing) == ("v_prediction", "trailing")
    assert schedule.clip_x0 is None


def test_from_pretrained_reads_the_embedded_model() -> None:
    ours, expected = load_schedule("emoji"), NoiseSchedule.from_config(EMOJI)
    for field in dataclasses.fields(NoiseSchedule):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_from_config_reads_variance_and_clipping(variance_type: str) -> None:
    config = config_of(DDPMScheduler(variance_type=variance_type, clip_sample=True, clip_sample_range=1.5))
    schedule = NoiseSchedule.from_config(config)
    assert (schedule.variance_type, schedule.clip_x0, schedule.final_alpha_cumprod) == (variance_type, 1.5, 1.0)


@pytest.mark.parametrize(
    "change",
    [{"beta_schedule": "spiral"}, {"prediction_type": "flow"}, {"timestep_spacing": "random"}],
    ids=lambda change: next(iter(change)),
)
def test_from_config_refuses_what_it_does_not_know(change: dict[str, str]) -> None:
    with pytest.raises(SdkitError, match=next(iter(change.values()))):
        NoiseSchedule.from_config(SD15 | change)


def test_schedule_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseSchedule.linear().steps_offset = 1  # type: ignore[misc]


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
def test_zero_terminal_snr_equals_algorithm_1(make: Any) -> None:
    schedule = make(prediction_type="v_prediction", steps_offset=1)
    rescaled = schedule.zero_terminal_snr()
    expected = reference.zero_terminal_snr(schedule.betas.numpy())
    np.testing.assert_allclose(rescaled.alphas_cumprod.numpy(), expected, rtol=1e-9, atol=1e-15)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.snr(999) == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(float(schedule.alphas_cumprod[0]), rel=1e-12)
    assert torch.isfinite(rescaled.betas).all()
    assert (rescaled.prediction_type, rescaled.steps_offset) == ("v_prediction", 1)


def test_zero_terminal_snr_of_a_rescaled_schedule_changes_nothing() -> None:
    once = NoiseSchedule.scaled_linear().zero_terminal_snr()
    torch.testing.assert_close(once.zero_terminal_snr().alphas_cumprod, once.alphas_cumprod, rtol=1e-12, atol=1e-16)


def test_zero_terminal_snr_with_set_alpha_to_one_false_still_ends_at_the_first_alpha() -> None:
    schedule = NoiseSchedule.from_config(SD15 | {"rescale_betas_zero_snr": True})
    assert schedule.final_alpha_cumprod == pytest.approx(float(schedule.alphas_cumprod[0]), rel=1e-12)


def test_alpha_cumprod_after_the_last_timestep() -> None:
    schedule = NoiseSchedule.from_config(SD15)
    assert schedule.alpha_cumprod(17) == float(schedule.alphas_cumprod[17])
    assert schedule.alpha_cumprod(-1) == float(schedule.alphas_cumprod[0])
    assert schedule.alpha_cumprod(-1, final=1.0) == 1.0
    assert NoiseSchedule.linear().alpha_cumprod(-1) == 1.0


# Timesteps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("num_timesteps", [50, 1000])
def test_timesteps_of_every_n_equal_diffusers(num_timesteps: int, spacing: Any, offset: int) -> None:
    theirs = DDIMScheduler(num_train_timesteps=num_timesteps, timestep_spacing=spacing, steps_offset=offset)
    ours = NoiseSchedule.linear(num_timesteps=num_timesteps, steps_offset=offset, timestep_spacing=spacing)
    for n in range(1, num_timesteps + 1):
        theirs.set_timesteps(n)
        expected = theirs.timesteps.tolist()
        if (n, spacing) == (1, "linspace"):
            expected = [num_timesteps - 1]  # diffusers has [0], from which nothing can be sampled
        if (n, spacing, offset) == (num_timesteps, "leading", 1):
            expected = [t - 1 for t in expected]  # diffusers starts at T, outside the table
        if spacing == "trailing" and len(expected) == n + 1:
            # For 62 of the n <= 1000, np.arange(T, 0, -T / n) ends in a rounding error above 0, which is one step too
            # many.
            assert expected.pop() == -1
        assert [t for t, _ in ours.timesteps(n)] == expected


def test_trailing_has_n_steps_where_diffusers_has_one_more() -> None:
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert len(theirs.timesteps) == 62
    assert len(NoiseSchedule.linear().timesteps(61, "trailing")) == 61


@pytest.mark.parametrize("num_timesteps", [1, 2, 50, 77, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_timestep_pairs_of_every_n(num_timesteps: int, spacing: str, offset: int) -> None:
    schedule = (
        NoiseSchedule.linear(num_timesteps=num_timesteps, steps_offset=offset)
        if num_timesteps > 1
        else (NoiseSchedule.from_betas([0.5], steps_offset=offset))
    )
    for n in range(1, num_timesteps + 1):
        assert_pairs(schedule.timesteps(n, spacing), n, num_timesteps, spacing)


def assert_pairs(pairs: list[tuple[int, int]], n: int, num_timesteps: int, spacing: str) -> None:
    now, then = [t for t, _ in pairs], [t_prev for _, t_prev in pairs]
    assert len(pairs) == n
    assert all(type(t) is int for pair in pairs for t in pair)
    assert now[0] <= num_timesteps - 1
    assert now[-1] >= 0
    assert then == [*now[1:], -1]
    assert all(t > t_prev for t, t_prev in pairs)
    if spacing in ("trailing", "linspace"):
        assert now[0] == num_timesteps - 1


@settings(deadline=None, max_examples=50)
@given(data=st.data(), num_timesteps=st.integers(2, 5000), offset=st.integers(0, 2), spacing=st.sampled_from(SPACINGS))
def test_timestep_pairs(data: st.DataObject, num_timesteps: int, offset: int, spacing: str) -> None:
    n = data.draw(st.integers(1, num_timesteps))
    schedule = NoiseSchedule.linear(num_timesteps=num_timesteps, steps_offset=offset)
    assert_pairs(schedule.timesteps(n, spacing), n, num_timesteps, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_default_to_the_schedules_own_spacing(spacing: Any) -> None:
    schedule = NoiseSchedule.linear(timestep_spacing=spacing)
    assert schedule.timesteps(7) == schedule.timesteps(7, spacing)


@pytest.mark.parametrize(("n", "spacing"), [(0, None), (-3, None), (1001, None), (1001, "trailing"), (10, "sideways")])
def test_timesteps_refuse_what_cannot_be(n: int, spacing: str | None) -> None:
    with pytest.raises(ArgumentError, match=str(spacing) if spacing == "sideways" else str(n)):
        NoiseSchedule.linear().timesteps(n, spacing)  # type: ignore[arg-type]


@pytest.mark.parametrize("betas", [[], [0.1, 1.5], [-0.1], [[0.1], [0.2]], [float("nan")]])
def test_betas_that_cannot_be_are_refused(betas: Any) -> None:
    with pytest.raises(ArgumentError, match="betas"):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([3, 1000]), torch.tensor([-1, 3]), torch.tensor([0.5, 3.0])])
def test_timesteps_outside_the_table_are_refused(t: Any) -> None:
    x = torch.zeros(2, 4, 2, 2)
    schedule = NoiseSchedule.linear()
    for call in (schedule.add_noise, schedule.velocity, schedule.prediction):
        with pytest.raises(ArgumentError, match="timesteps"):
            call(x, x, t)


def test_unknown_kind_is_refused() -> None:
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ArgumentError, match="score"):
        NoiseSchedule.linear().prediction(x, x, 3, "score")


# Adding noise


@pytest.mark.parametrize("t", [0, 500, 999, [0, 500, 999]])
def test_add_noise_and_velocity_equal_the_closed_form(t: int | list[int]) -> None:
    schedule = NoiseSchedule.scaled_linear()
    steps = t if isinstance(t, int) else torch.tensor(t)
    x0, eps = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = broadcast(np.cumprod(1 - reference.scaled_linear_betas(1000, 0.00085, 0.012))[t])
    torch.testing.assert_close(
        schedule.add_noise(x0, eps, steps), a.sqrt() * x0 + (1 - a).sqrt() * eps, rtol=1e-11, atol=1e-12
    )
    torch.testing.assert_close(
        schedule.velocity(x0, eps, steps), a.sqrt() * eps - (1 - a).sqrt() * x0, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("t", [torch.tensor([0, 1, 999]), torch.tensor([250, 700, 3])])
def test_add_noise_and_velocity_equal_diffusers(t: torch.Tensor) -> None:
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = NoiseSchedule.scaled_linear()
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.velocity(x0, eps, t), theirs.get_velocity(x0, eps, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0, torch.tensor([0, 0])])
def test_bfloat16_noise_at_the_first_timestep(t: Any) -> None:
    schedule = NoiseSchedule.scaled_linear()
    naive = 1 - schedule.alphas_cumprod.bfloat16()[0]
    assert naive == 0  # this is the failure that `add_noise` avoids
    x0, eps = torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16), torch.ones(2, 4, 8, 8, dtype=torch.bfloat16)
    noised, v = schedule.add_noise(x0, eps, t), schedule.velocity(eps, x0, t)
    assert noised.dtype == v.dtype == torch.bfloat16
    torch.testing.assert_close(noised.double(), torch.full((2, 4, 8, 8), 0.00085**0.5).double(), rtol=2**-8, atol=0)
    torch.testing.assert_close(-v.double(), noised.double(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noising_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.ones(2, 1, 2, 2, dtype=dtype)
    assert NoiseSchedule.linear().add_noise(x, x, 3).dtype == dtype
    assert NoiseSchedule.linear().velocity(x, x, torch.tensor([3, 4])).dtype == dtype


def test_snr_equals_the_closed_form() -> None:
    schedule = NoiseSchedule.linear()
    a = np.cumprod(1 - reference.linear_betas(1000, 1e-4, 0.02))
    t = torch.tensor([0, 10, 999])
    torch.testing.assert_close(schedule.snr(t), torch.from_numpy(a / (1 - a))[t], rtol=1e-9, atol=0)
    assert float(schedule.snr(10)) == pytest.approx(a[10] / (1 - a[10]), rel=1e-9)


def test_sigma_equals_the_closed_form() -> None:
    schedule = NoiseSchedule.linear()
    a = np.cumprod(1 - reference.linear_betas(1000, 1e-4, 0.02))
    assert schedule.sigma(10) == pytest.approx(np.sqrt((1 - a[10]) / a[10]), rel=1e-9)
    assert schedule.zero_terminal_snr().sigma(999) == float("inf")


# Predictions

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "zero_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    t=st.one_of(st.integers(0, 990), st.lists(st.integers(0, 990), min_size=3, max_size=3)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_of_eps_x0_and_v(name: str, t: int | list[int], kind: Any, dtype: torch.dtype, seed: int) -> None:
    schedule = SCHEDULES[name]
    x0, eps = torch.randn(2, 3, 4, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    steps = t if isinstance(t, int) else torch.tensor(t)
    x_t = schedule.add_noise(x0, eps, steps)
    output = {"epsilon": eps, "sample": x0, "v_prediction": schedule.velocity(x0, eps, steps)}[kind]
    prediction = schedule.prediction(output, x_t, steps, kind)
    # x0 from eps divides rounding errors by sqrt(a), and eps from x0 by sqrt(1 - a).
    a = schedule.alphas_cumprod[steps]
    tolerance = 16 * torch.finfo(dtype).eps / float(torch.minimum(a, 1 - a).min()) ** 0.5
    assert prediction.x0.dtype == prediction.eps.dtype == dtype
    assert prediction.variance is None
    torch.testing.assert_close(prediction.x0, x0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(prediction.eps, eps, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=30)
@given(t=st.lists(st.integers(0, 999), min_size=2, max_size=2), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_prediction_equals_the_reference_for_any_output(t: list[int], kind: Any, seed: int) -> None:
    output, x_t = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = NoiseSchedule.scaled_linear(prediction_type=kind).prediction(output, x_t, torch.tensor(t))
    a = np.cumprod(1 - reference.scaled_linear_betas(1000, 0.00085, 0.012))
    for i in range(2):
        x0, eps = reference.from_output(kind, output[i].numpy(), x_t[i].numpy(), float(a[t[i]]))
        np.testing.assert_allclose(got.x0[i].numpy(), x0, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(got.eps[i].numpy(), eps, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("short", "long"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_prediction_kinds_have_short_names(short: Any, long: Any) -> None:
    output, x_t = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule.linear(prediction_type="v_prediction")
    for a, b in zip(schedule.prediction(output, x_t, 9, short), schedule.prediction(output, x_t, 9, long), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("t", [999, torch.tensor([999, 999])])
def test_v_is_exact_at_zero_terminal_snr(t: Any) -> None:
    """Here x_t = eps and v = -x0, so no precision is lost, and nothing is divided."""
    schedule = SCHEDULES["zero_snr"]
    x0, eps = torch.randn(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x_t = schedule.add_noise(x0, eps, t)
    prediction = schedule.prediction(schedule.velocity(x0, eps, t), x_t, t, "v_prediction")
    assert torch.equal(x_t, eps)
    assert torch.equal(prediction.x0, x0)
    assert torch.equal(prediction.eps, eps)
    from_x0 = schedule.prediction(x0, x_t, t, "sample")
    assert torch.equal(from_x0.x0, x0)
    assert torch.equal(from_x0.eps, eps)


@pytest.mark.parametrize("t", [999, torch.tensor([999, 999]), torch.tensor([3, 999])])
def test_eps_at_zero_terminal_snr_is_refused(t: Any) -> None:
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ArgumentError):
        SCHEDULES["zero_snr"].prediction(x, x, t, "epsilon")
    assert torch.isfinite(SCHEDULES["zero_snr"].prediction(x, x, 998, "epsilon").x0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_learned_range_output_is_split(kind: Any) -> None:
    schedule = NoiseSchedule.linear(prediction_type=kind, variance_type="learned_range")
    x_t, output, raw = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = schedule.prediction(torch.cat([output, raw], dim=1), x_t, torch.tensor([5, 800]))
    plain = schedule.prediction(output, x_t, torch.tensor([5, 800]))
    assert Prediction._fields == ("x0", "eps", "variance")
    assert torch.equal(whole.x0, plain.x0)
    assert torch.equal(whole.eps, plain.eps)
    assert plain.variance is None
    assert whole.variance is not None
    assert torch.equal(whole.variance, raw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [300, torch.tensor([5, 800])])
def test_prediction_of_a_half_precision_output_has_the_samples_precision(kind: Any, t: Any) -> None:
    """Samplers take differences of predictions, which must not be computed in bfloat16 if the sample is float32."""
    schedule = NoiseSchedule.linear()
    x_t, output = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    got = schedule.prediction(output.bfloat16(), x_t, t, kind)
    expected = schedule.prediction(output.bfloat16().float(), x_t, t, kind)
    assert got.x0.dtype == got.eps.dtype == torch.float32
    torch.testing.assert_close(got.x0, expected.x0, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.eps, expected.eps, rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Heun with NumPy 2
@pytest.mark.parametrize(
    ("name", "spacing", "set_alpha_to_one", "clip_x0"),
    [
        ("DDIMScheduler", "leading", True, 1.0),
        ("DDPMScheduler", "leading", True, 1.0),
        ("PNDMScheduler", "leading", False, None),
        ("EulerDiscreteScheduler", "linspace", True, None),
        ("DPMSolverMultistepScheduler", "linspace", True, None),
        ("HeunDiscreteScheduler", "linspace", True, None),
    ],
)
def test_from_config_fills_in_that_schedulers_own_defaults(
    name: str, spacing: str, set_alpha_to_one: bool, clip_x0: float | None
) -> None:
    import diffusers.schedulers

    schedule = NoiseSchedule.from_config({"_class_name": name})
    theirs = getattr(diffusers.schedulers, name)()
    assert (schedule.timestep_spacing, schedule.set_alpha_to_one, schedule.clip_x0) == (
        spacing,
        set_alpha_to_one,
        clip_x0,
    )
    assert theirs.config.timestep_spacing == spacing
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), atol=2e-5, rtol=0)


def test_from_config_without_a_class_clips_nothing_and_zero_snr_is_trailing() -> None:
    assert NoiseSchedule.from_config({}).clip_x0 is None
    assert NoiseSchedule.from_config({"rescale_betas_zero_snr": True}).timestep_spacing == "trailing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_for_a_number_as_for_a_tensor(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.scaled_linear()
    x0, eps = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(schedule.add_noise(x0, eps, 5), schedule.add_noise(x0, eps, torch.tensor([5, 5])))
    assert torch.equal(schedule.velocity(x0, eps, 5), schedule.velocity(x0.float(), eps.float(), 5).to(dtype))
    assert schedule.prediction(eps, x0, 5, "v").x0.dtype == torch.float32


def test_a_schedule_keeps_its_betas_to_itself() -> None:
    betas = torch.full((4,), 0.1, dtype=torch.float64)
    schedule = NoiseSchedule.from_betas(betas)
    betas.zero_()
    assert (schedule.betas == 0.1).all()


@pytest.mark.parametrize("cls", [LCMScheduler, TCDScheduler])
def test_the_defaults_of_consistency_models(cls: Any) -> None:
    ours = NoiseSchedule.from_config({"_class_name": cls.__name__}).alphas_cumprod
    torch.testing.assert_close(ours.float(), cls().alphas_cumprod, rtol=1e-5, atol=0)


@pytest.mark.parametrize("betas", [[1e-20, 0.1, 0.2], [0.1, 0.0, 0.2], [0.1, 1e-20, 0.2], [0.1, 0.2, 0.0]])
def test_betas_that_vanish_are_refused(betas: list[float]) -> None:
    # Solvers would divide by the length of a step between two timesteps of one noise level.
    with pytest.raises(ArgumentError, match="betas must be above 0"):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize("kind", ["epsilon", "eps", "v_prediction", "v", "sample", "x0"])
def test_target_is_the_closed_form_and_the_inverse_of_prediction(kind: str) -> None:
    schedule = NoiseSchedule.scaled_linear(prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=generator)
    t = torch.tensor([0, 400, 999])
    a = schedule.alphas_cumprod[t][:, None, None, None]
    wanted = {"e": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}.get(kind[0], x0)
    target = schedule.target(x0, eps, t)
    torch.testing.assert_close(target, wanted, rtol=1e-12, atol=1e-12)
    found = schedule.prediction(target, schedule.add_noise(x0, eps, t), t)
    torch.testing.assert_close(found.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.eps, eps, rtol=1e-9, atol=1e-9)
