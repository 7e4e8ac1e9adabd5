from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sdkit.errors import ImageError
from sdkit.evaluation.similarity import psnr, ssim

RNG = np.random.default_rng(0)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM by scikit-image of images (H, W, 3) in [0, 255]."""
    return structural_similarity(
        a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )


def noisy(image: np.ndarray, sigma: float) -> np.ndarray:
    return (image + RNG.normal(0, sigma, image.shape)).round().clip(0, 255).astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    """Convert (..., H, W, 3) in [0, 255] to (..., 3, H, W) in [-1, 1], float64."""
    return torch.from_numpy(np.moveaxis(image.astype(np.float64), -1, -3)) / 127.5 - 1


FLAT = np.full((40, 40, 3), 255, np.uint8)
RANDOM = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
CASES = [
    (FLAT, FLAT - 1),  # here float32 would be wrong by 1e-4
    (FLAT, FLAT * 0),
    (RANDOM, RANDOM[::-1]),
    (RANDOM, noisy(RANDOM, 5)),
    (RANDOM[:11, :11], noisy(RANDOM[:11, :11], 30)),
]


@pytest.mark.parametrize(("a", "b"), CASES)
def test_equal_to_scikit_image(a: np.ndarray, b: np.ndarray) -> None:
    expected = [peak_signal_noise_ratio(a, b), reference_ssim(a, b)]
    for x, y, tolerance in (
        (a, b, 1e-9),
        (Image.fromarray(a), Image.fromarray(b), 1e-9),
        (a, tensor(b), 1e-9),
        (tensor(a), tensor(b), 1e-9),
        (tensor(a).float(), tensor(b).float(), 1e-4),  # dB; the input itself is rounded
    ):
        assert psnr(x, y).tolist() == pytest.approx(expected[:1], abs=tolerance)
        assert ssim(x, y).tolist() == pytest.approx(expected[1:], abs=min(tolerance, 1e-6))


def test_photo(astronaut: Image.Image) -> None:
    a = np.asarray(astronaut)
    b = noisy(a, 10)
    assert psnr(astronaut, b).item() == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-9)
    assert ssim(astronaut, b).item() == pytest.approx(reference_ssim(a, b), abs=1e-9)


def test_floats_outside_of_the_range_are_not_clamped() -> None:
    a, b = tensor(RANDOM), tensor(RANDOM) * 1.5
    expected = peak_signal_noise_ratio(
        RANDOM.astype(float), (np.moveaxis(b.numpy(), 0, -1) + 1) * 127.5, data_range=255
    )
    assert psnr(a, b).item() == pytest.approx(expected, abs=1e-9)


def test_psnr_in_closed_form() -> None:
    # An error of one level everywhere has an MSE of 1. In floats, an error of d everywhere has an MSE of d^2 and a peak
    # of 2.
    assert psnr(FLAT, FLAT - 1).item() == pytest.approx(20 * math.log10(255), abs=1e-12)
    assert psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.25)).item() == pytest.approx(
        20 * math.log10(2 / 0.25), abs=1e-12
    )
    assert psnr(RANDOM, RANDOM).tolist() == [math.inf]
    assert psnr(FLAT, FLAT * 0).item() == 0


def test_one_value_per_image() -> None:
    a = np.stack([RANDOM, RANDOM[::-1], RANDOM[:, ::-1]])
    b = np.stack([a[0], noisy(a[1], 3), noisy(a[2], 30)])
    for metric in (psnr, ssim):
        alone = torch.cat([metric(x, y) for x, y in zip(a, b, strict=True)])
        for x, y in ((a, b), (list(a), list(b)), (tensor(a), tensor(b))):
            torch.testing.assert_close(metric(x, y), alone, rtol=0, atol=1e-9)
    # Pairs may have different sizes.
    assert ssim([RANDOM, FLAT], [RANDOM, FLAT]).tolist() == pytest.approx([1, 1])


@given(st.integers(0, 2**32 - 1), st.integers(11, 20), st.integers(11, 20))
def test_ssim_properties(seed: int, height: int, width: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-12)
    assert ssim(a, b).item() == pytest.approx(ssim(b, a).item(), abs=1e-12)
    assert ssim(a, b).item() == pytest.approx(reference_ssim(a, b), abs=1e-9)


def test_gradients() -> None:
    y = torch.rand(1, 3, 12, 13, dtype=torch.float64) * 2 - 1
    x = (y + 0.1 * torch.randn_like(y)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, y), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: psnr(x, y), (x,), fast_mode=True)
    x32 = x.detach().float().requires_grad_()
    ssim(x32, y.float()).sum().backward()
    assert x32.grad is not None
    assert x32.grad.dtype == torch.float32
    assert x32.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (FLAT[:10], FLAT[:10], "SSIM needs images of at least 11 x 11 pixels, not 40 x 10"),
        (FLAT, RANDOM, r"images of shapes \(1, 3, 40, 40\) and \(1, 3, 40, 50\) cannot be compared"),
        (
            torch.zeros(2, 3, 12, 12),
            torch.zeros(1, 3, 12, 12),
            r"images of shapes \(2, 3, 12, 12\) and \(1, 3, 12, 12\)",
        ),
        ([FLAT], [FLAT, FLAT], "1 images cannot be compared with 2"),
        (torch.zeros(1, 12, 12), torch.zeros(1, 12, 12), r"a tensor must be float \(B, 3, H, W\)"),
        (torch.zeros(3, 12, 12).int(), torch.zeros(3, 12, 12), r"a tensor must be float .* not torch\.int32"),
        (FLAT, torch.full((3, 40, 40), 200.0), r"outside \[-1, 1\]"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(a: object, b: object, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        ssim(a, b)  # type: ignore[arg-type]


def test_tiny_images_have_a_psnr() -> None:
    assert psnr(FLAT[:1, :1], FLAT[:1, :1] - 1).item() == pytest.approx(20 * math.log10(255), abs=1e-12)
