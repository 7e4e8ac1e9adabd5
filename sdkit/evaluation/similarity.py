"""Similarity of two images: PSNR and SSIM.

Both take what `sdkit.images.to_tensors` takes, and return one value per image: a float64 tensor (B,), float32
on Apple's GPU. Between two float tensors in [-1, 1], (B, 3, H, W) or (3, H, W), nothing is rounded or clamped and the
metric is differentiable; everything else is compared as 8-bit images. Both raise `ImageError` where the two sides
cannot be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.errors import ImageError
from sdkit.images import Images, to_tensors, to_uint8

WINDOW, SIGMA = 11, 1.5  # pixels


def psnr(a: Images, b: Images) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE) over pixels and channels; infinite for equal images."""
    return torch.cat([10 * torch.log10(255**2 / (x - y).square().mean(dim=(1, 2, 3))) for x, y in _pairs(a, b)])


def ssim(a: Images, b: Images) -> Tensor:
    """Mean structural similarity, at most 1 (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, eq. 13 and 17).

    As the paper has it: Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, windows inside the
    image only; the mean is over the three channels too. Equals scikit-image's `structural_similarity(...,
    channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)` in [0, 255].
    """
    # one image at a time: ten float64 maps of a whole batch fit no cache, and take four times as long
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
    """Pairs of batches (B, 3, H, W) in [0, 255]: one pair of two float tensors, else a pair of one for each image."""
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
    # float64, for variances are small differences of large numbers: float32 errs by 1e-4 in bright flat areas
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    x = x if x.ndim == 4 else x[None]
    return (x.to(exact) + 1) * 127.5


def _rounded(x: Tensor) -> Tensor:
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).double()  # (1, 3, H, W)
