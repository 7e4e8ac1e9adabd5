"""Similarity of two images: PSNR and SSIM.

Both take whatever `sdkit.images.to_tensors` takes. Two float tensors, (B, 3, H, W) or (3, H, W) in [-1, 1], are
compared without rounding or clamping, and the metric is differentiable. All other images are compared as 8-bit images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.errors import ImageError
from sdkit.images import Images, to_tensors, to_uint8

WINDOW, SIGMA = 11, 1.5
"""Width and standard deviation of SSIM's Gaussian window, in pixels."""


def psnr(a: Images, b: Images) -> Tensor:
    """Peak signal-to-noise ratio: 10 log10(255^2 / MSE), over pixels and channels.

    Args:
        a: Images.
        b: As many images, of the same sizes.

    Returns:
        Decibels (B,), infinite for equal images; float64, or float32 on Apple's GPU.

    Raises:
        ImageError: The numbers or sizes of the images differ.
    """
    return torch.cat([10 * torch.log10(255**2 / (x - y).square().mean(dim=(1, 2, 3))) for x, y in _pairs(a, b)])


def ssim(a: Images, b: Images) -> Tensor:
    """Mean structural similarity (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, eq. 13 and 17).

    The settings are the paper's: a Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, and only
    windows that lie inside the image. The mean is over pixels and channels. Equals scikit-image's
    `structural_similarity(..., channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)` of levels in [0, 255].

    Args:
        a: Images of at least 11 x 11 pixels.
        b: As many images, of the same sizes.

    Returns:
        Similarities (B,), at most 1; float64, or float32 on Apple's GPU.

    Raises:
        ImageError: The numbers or sizes of the images differ, or an image is smaller than the window.
    """
    # One image at a time: the ten float64 maps of a whole batch do not fit the CPU's cache, and take 4 times as long.
    return torch.cat([_ssim(x[None], y[None]) for xs, ys in _pairs(a, b) for x, y in zip(xs, ys, strict=True)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    if min(x.shape[-2:]) < WINDOW:
        height, width = x.shape[-2:]
        raise ImageError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, not {width} x {height}.")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y], dim=1)).chunk(5, dim=1)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H - 10, W - 10)
    channels = x.shape[1]
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.softmax(-(offsets**2) / (2 * SIGMA**2), dim=0).repeat(channels, 1)  # (C, 11)
    x = F.conv2d(x, kernel.view(channels, 1, WINDOW, 1), groups=channels)
    return F.conv2d(x, kernel.view(channels, 1, 1, WINDOW), groups=channels)


def _pairs(a: Images, b: Images) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of batches (B, 3, H, W) in [0, 255]: two float tensors make one pair, other images one pair each."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        pairs = [(_levels(a), _levels(b).to(a.device))]
    else:
        xs, ys = to_tensors(a), to_tensors(b)
        if len(xs) != len(ys):
            raise ImageError(f"{len(xs)} images cannot be compared with {len(ys)}; give as many on both sides.")
        pairs = [(_rounded(x), _rounded(y)) for x, y in zip(xs, ys, strict=True)]
    for x, y in pairs:
        if x.shape != y.shape:
            raise ImageError(
                f"images of shapes {tuple(x.shape)} and {tuple(y.shape)} cannot be compared; make them equal."
            )
    return pairs


def _levels(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ImageError(f"a tensor must be float (B, 3, H, W) in [-1, 1], not {x.dtype} {tuple(x.shape)}.")
    # Variances are small differences of large numbers: in bright flat areas, float32 would err by 1e-4.
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    x = x if x.ndim == 4 else x[None]
    return (x.to(exact) + 1) * 127.5


def _rounded(x: Tensor) -> Tensor:
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).double()  # (1, 3, H, W)
