"""Kernel distances between two sets of feature vectors: KID and CMMD, both squared maximum mean discrepancies.

Neither assumes that features are Gaussian. They are computed in float64, in blocks: neither an N x M matrix nor a
float64 copy of the vectors is held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.errors import ArgumentError
from sdkit.evaluation.moments import check_comparable

BLOCK = 1024
"""Rows and columns of the blocks in which kernels are computed: 8 MiB each."""
SIGMA = 10.0
"""Bandwidth of CMMD's Gaussian kernel."""
CMMD_SCALE = 1000.0
"""Factor of CMMD, by which its values are easy to read."""


def kid(a: Tensor, b: Tensor) -> float:
    """Return the kernel Inception distance (Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4).

    It is the unbiased estimate of MMD^2 (Gretton et al. 2012, eq. 3) with the kernel (x . y / D + 1)^3. Its expectation
    does not depend on the number of images. The paper averages it over subsets; over all images at once, as here, the
    expectation is the same, and the variance is lower.

    Args:
        a: Vectors (N, D), N at least 2.
        b: Vectors (M, D), M at least 2.

    Returns:
        The distance, about 0 for sets of equal distribution, where it may be negative.

    Raises:
        ArgumentError: A set is too small, the widths differ, or a feature is not finite.
    """
    _check(a, b, least=2)
    width = a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / width + 1) ** 3

    n, m = len(a), len(b)
    within_a = (_sum(kernel, a, a) - _diagonal(kernel, a)) / (n * (n - 1))
    within_b = (_sum(kernel, b, b) - _diagonal(kernel, b)) / (m * (m - 1))
    return within_a + within_b - 2 * _sum(kernel, a, b) / (n * m)


def cmmd(a: Tensor, b: Tensor) -> float:
    """Return CMMD (Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603, section 5), for embeddings of CLIP.

    It is 1000 times MMD^2 of the normalised embeddings with the Gaussian kernel exp(-|x - y|^2 / (2 * 10^2)). As in the
    paper's code, the mean over a set includes its diagonal; for small sets this biases the distance upwards.

    Args:
        a: Embeddings (N, D), of any length.
        b: Embeddings (M, D), of any length.

    Returns:
        The distance, at least 0.

    Raises:
        ArgumentError: A set is empty, the widths differ, or a feature is not finite.
    """
    _check(a, b, least=1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        cosines = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T
        squares = (2 - 2 * cosines).clamp(min=0)
        # All values are near 1. Without the 1, which cancels, no digits are lost.
        return torch.expm1(-squares / (2 * SIGMA**2))

    n, m = len(a), len(b)
    within = _sum(kernel, a, a) / n**2 + _sum(kernel, b, b) / m**2
    return max(0.0, CMMD_SCALE * (within - 2 * _sum(kernel, a, b) / (n * m)))


def _sum(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """Return the sum of the kernel over all pairs."""
    return sum(float(kernel(x, y).sum()) for x in a.split(BLOCK) for y in b.split(BLOCK))


def _diagonal(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor) -> float:
    """Return the sum of the kernel of each vector with itself."""
    return sum(float(kernel(x, x).diagonal().sum()) for x in a.split(BLOCK))


def _check(a: Tensor, b: Tensor, least: int) -> None:
    if min(len(a), len(b)) < least:
        raise ArgumentError(f"a kernel distance needs at least {least} images in each set, not {len(a)} and {len(b)}.")
    check_comparable(a, b)
