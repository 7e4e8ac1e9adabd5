"""Statistics of latents and their interpolation, compared with NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdkit.errors import ArgumentError
from sdkit.latents import lerp, slerp, statistics
from tests.helpers.sentences import one_sentence


def latents(*shape: int, seed: int = 0) -> Tensor:
    """Draw latents whose channels have different means and deviations."""
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    channels = torch.arange(shape[-3], dtype=torch.float32)[:, None, None]
    return z * (1 + channels) + 10 * channels


def test_statistics_equal_numpy_s() -> None:
    z = latents(5, 4, 6, 7)
    found = statistics(z)
    values = z.double().numpy()
    assert np.allclose(found.mean.numpy(), values.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(found.std.numpy(), values.std((0, 2, 3)), rtol=1e-12)
    assert found.scale == pytest.approx(1 / values.std(), rel=1e-12)
    assert (values * found.scale).std() == pytest.approx(1, rel=1e-12)
    assert found.count == 5 * 6 * 7


def test_statistics_of_a_stream_equal_those_of_all() -> None:
    """Batches of any sizes, also a single image without a batch dimension, in any order of merging."""
    z = latents(9, 4, 6, 7)
    whole = statistics(z)
    streamed = statistics(part for part in (z[:4], z[4], z[5:]))
    merged = statistics(z[5:]) + statistics(z[:5])
    for found in (streamed, merged):
        assert found.count == whole.count
        assert torch.allclose(found.mean, whole.mean, rtol=1e-13)
        assert torch.allclose(found.variance, whole.variance, rtol=1e-12)
        assert found.scale == pytest.approx(whole.scale, rel=1e-12)


def test_statistics_do_not_cancel() -> None:
    """A mean of a million and a deviation of 1: sums of squares in float32 would lose every digit."""
    z = latents(8, 2, 16, 16).double() + 1e6
    found = statistics(z[i] for i in range(8))
    assert np.allclose(found.std.numpy(), z.numpy().std((0, 2, 3)), rtol=1e-8)


def test_equal_latents_have_an_infinite_scale() -> None:
    assert statistics(torch.ones(1, 4, 2, 2)).scale == math.inf


def numpy_slerp(a: Tensor, b: Tensor, t: float) -> Any:
    """Shoemake's formula for two vectors, with the arc cosine."""
    p, q = a.double().numpy().ravel(), b.double().numpy().ravel()
    angle = np.arccos(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
    return ((np.sin((1 - t) * angle) * p + np.sin(t * angle) * q) / np.sin(angle)).reshape(a.shape)


@pytest.mark.parametrize("t", [-0.25, 0.0, 0.3, 0.5, 1.0])
def test_slerp_equals_the_formula(t: float) -> None:
    a, b = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    assert np.allclose(slerp(a, b, t).numpy(), numpy_slerp(a, b, t), rtol=1e-5, atol=1e-6)


def test_slerp_of_a_batch_and_of_several_positions() -> None:
    """Each image is a vector of its own; t broadcasts with the batch."""
    a, b = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    one_each = slerp(a, b, torch.tensor([0.1, 0.5, 0.9]))
    path = slerp(a, b, torch.tensor([0.1, 0.5])[:, None])
    assert one_each.shape == (3, 4, 5, 6)
    assert path.shape == (2, 3, 4, 5, 6)
    for i, t in enumerate((0.1, 0.5, 0.9)):
        assert torch.allclose(one_each[i], slerp(a[i], b[i], t), atol=1e-6)
        assert torch.allclose(path[0, i], slerp(a[i], b[i], 0.1), atol=1e-6)
    assert slerp(a[0], b[0], torch.linspace(0, 1, 7)).shape == (7, 4, 5, 6)


def test_slerp_keeps_the_norm_of_noise_and_lerp_does_not() -> None:
    a, b = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    b = b * a.norm() / b.norm()
    path = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.allclose(path.flatten(1).norm(dim=1), a.norm().expand(5), rtol=1e-6)
    assert lerp(a, b, 0.5).std() == pytest.approx(2**-0.5, abs=0.02)


@pytest.mark.parametrize("interpolate", [lerp, slerp])
def test_ends_are_the_latents_themselves(interpolate: Callable[..., Tensor]) -> None:
    a, b = latents(2, 4, 5, 6).half()
    assert torch.equal(interpolate(a, b, 0), a)
    assert torch.equal(interpolate(a, b, 1), b)
    assert interpolate(a, b, 0.5).dtype == torch.float16


@pytest.mark.parametrize(
    ("b", "middle"),
    [
        (lambda a: a, lambda a: a),
        (lambda a: 3 * a, lambda a: 2 * a),  # parallel
        (lambda a: -a, lambda a: 0 * a),  # opposite: no great circle is the shortest
        (lambda a: 0 * a, lambda a: a / 2),
        (lambda a: a * (1 + 1e-7), lambda a: a),
    ],
    ids=["equal", "parallel", "opposite", "zero", "nearly equal"],
)
def test_slerp_where_the_angle_has_no_sine(b: Callable[[Tensor], Tensor], middle: Callable[[Tensor], Tensor]) -> None:
    a = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.allclose(slerp(a, b(a), 0.5), middle(a), rtol=1e-6, atol=1e-12)


def test_slerp_of_nearly_parallel_vectors_is_exact() -> None:
    """At 1e-5 rad the arc cosine of a float32 dot product is 0 or 3e-4; the middle is known: the normalized sum."""
    a = torch.zeros(4, 2, 2, dtype=torch.float64)
    a[0, 0, 0] = 1
    b = a.clone()
    b[1, 0, 0] = 1e-5
    b /= b.norm()
    expected = (a + b) / (a + b).norm()
    assert torch.allclose(slerp(a, b, 0.5), expected, rtol=1e-12, atol=1e-17)


def test_gradient_reaches_both_ends() -> None:
    a, b = (torch.randn(4, 2, 2, requires_grad=True) for _ in range(2))
    slerp(a, b, 0.3).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert bool(torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all())


Z = torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: statistics([]), "no latents to take statistics of"),
        (lambda: statistics(Z.int()), "must be a float tensor (B, C, h, w)"),
        (lambda: statistics(Z[0, 0]), "must be a float tensor (B, C, h, w)"),
        (lambda: statistics(Z[:0]), "must be a float tensor (B, C, h, w)"),
        (lambda: statistics(["z"]), "must be a float tensor (B, C, h, w)"),
        (lambda: statistics(Z + math.nan), "must be finite numbers"),
        (lambda: statistics([Z, Z[:, :3]]), "of 4 and of 3 channels do not add up"),
        (lambda: slerp(Z, Z[:1], 0.5), "two float tensors (..., C, h, w) of one shape"),
        (lambda: lerp(Z.int(), Z.int(), 0.5), "two float tensors (..., C, h, w) of one shape"),
        (lambda: slerp(Z, Z, math.nan), "t, the position between two latents, must be a finite number"),
        (lambda: lerp(Z, Z, torch.tensor([0.1, 0.2, 0.3])), "t of shape (3,) does not broadcast with (2,)"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], object], fragment: str) -> None:
    one_sentence(call, ArgumentError, fragment)
