"""Fréchet distance between two sets of feature vectors, its value for infinitely many vectors, and its uncertainty.

With the features of the Inception network of Heusel et al. it is the FID; see `sdkit.evaluation.extractors`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sdkit.arguments import whole_number
from sdkit.errors import ArgumentError
from sdkit.evaluation.moments import Moments, check_comparable, check_finite_features, float64_blocks, mean_of

SIZES = 15
"""Number of subset sizes to which `frechet_at_infinity` fits its line; as in the paper."""
Z95 = 1.959964
"""Standard deviations of a normal distribution within which 95 % of it lies."""


def frechet_distance(a: Moments | Tensor, b: Moments | Tensor) -> float:
    """Return the Fréchet distance between the Gaussians with the moments of two sets (Heusel et al. 2017, eq. 6).

    https://arxiv.org/abs/1706.08500. It is biased upwards: for two sets of N vectors with isotropic features, by about
    D^2 / 2N times their variance, and more where N is below D; see `frechet_at_infinity`. Compare only distances of
    equal N.

    Args:
        a: One set: its moments, or its vectors (N, D). Where N is below D, vectors take much less time.
        b: The other set, of the same width.

    Returns:
        The distance, at least 0. (It is the square of the 2-Wasserstein distance.)

    Raises:
        ArgumentError: A set is empty, the widths differ, or a feature is not finite.
    """
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(a), _mean_and_root(b)
    check_comparable(mean_a, mean_b)
    return _distance(mean_a, root_a, mean_b, root_b)


def gaussian_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Return the Fréchet distance between two Gaussians (Dowson & Landau 1982, eq. 4).

    |m_a - m_b|^2 + Tr A + Tr B - 2 Tr (A^(1/2) B A^(1/2))^(1/2), for covariances of any rank.

    Args:
        mean_a: Mean (D,).
        covariance_a: Covariance A (D, D), symmetric.
        mean_b: Mean (D,).
        covariance_b: Covariance B (D, D), symmetric.

    Raises:
        ArgumentError: The widths differ, or a number is not finite.
    """
    check_comparable(mean_a, mean_b)
    return _distance(mean_a.double(), _root(covariance_a), mean_b.double(), _root(covariance_b))


def frechet_at_infinity(a: Tensor, b: Tensor, *, seed: int = 0) -> float:
    """Return the Fréchet distance extrapolated to infinitely many vectors (Chong & Forsyth 2020, section 4).

    https://arxiv.org/abs/1911.07023. The bias of the distance is nearly linear in 1/N. The distance is therefore
    measured on random subsets of 15 sizes, from half of the vectors to all of them, and the line through the distances,
    as a function of 1/N, gives its value at 1/N = 0. The paper's reference is so large that only N of `a` matters. Here
    both sets shrink in the same proportion, which removes the bias of both.

    Args:
        a: Vectors (N, D), at least 4.
        b: Vectors (M, D), at least 4.
        seed: Random seed of the subsets.

    Returns:
        The extrapolated distance. It scatters around the true one, and may be below 0 where that is small.

    Raises:
        ArgumentError: A set is too small.
    """
    if min(len(a), len(b)) < 4:
        raise ArgumentError(f"{min(len(a), len(b))} images are too few to extrapolate from; give at least 4.")
    generator = torch.Generator().manual_seed(seed)
    inverse, distances = list[float](), list[float]()
    for share in torch.linspace(0.5, 1, SIZES).tolist():
        subsets = [x[torch.randperm(len(x), generator=generator)[: round(share * len(x))]] for x in (a, b)]
        inverse.append(1 / share)
        distances.append(frechet_distance(*subsets))
    x, y = torch.tensor(inverse, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    deviations = x - x.mean()
    slope = (deviations * y).sum() / deviations.square().sum()
    return float(y.mean() - slope * x.mean())


def frechet_interval(
    vectors: Tensor, reference: Moments | Tensor, distance: float, *, resamples: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Return a 95 % interval of a Fréchet distance, from the bootstrap (Efron 1979) over the images of one set.

    A resample repeats images, which raises its distance. The interval therefore takes only the spread of the resampled
    distances, around the distance itself: distance -/+ 1.96 standard deviations.

    Args:
        vectors: Vectors (N, D) to resample, N at least 2.
        reference: Moments or vectors of the other set, which is left as it is.
        distance: The distance of all vectors.
        resamples: Number of resamples, at least 2.
        seed: Random seed of the resamples.

    Returns:
        Lower and upper bound; the lower one is at least 0.
    """
    whole_number("resamples", resamples, 2)
    generator = torch.Generator().manual_seed(seed)
    mean, root = _mean_and_root(reference)
    distances = []
    for _ in range(resamples):
        drawn = vectors[torch.randint(len(vectors), (len(vectors),), generator=generator)]
        distances.append(_distance(*_mean_and_root(drawn), mean, root))
    margin = Z95 * float(torch.tensor(distances, dtype=torch.float64).std())
    return max(0.0, distance - margin), distance + margin


def warn_if_few(count: int, width: int, name: str) -> None:
    """Warn if there are fewer vectors than features, so that their covariance is singular and the bias is large."""
    if count < width:
        warnings.warn(
            f"{count} images are fewer than the {width} features of {name}: the Fréchet distance is far too high; "
            "compare only distances of as many images, or extrapolated ones.",
            stacklevel=1,
        )


def _distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    """Return the distance from means and from roots (rank, D) of the covariances, root^T root.

    The eigenvalues of A^(1/2) B A^(1/2) are the squares of the singular values of root_a root_b^T. Taken from the
    product itself, they would lose half of their digits, and a singular covariance would add spurious ones.
    """
    trace = float(torch.linalg.svdvals(root_a @ root_b.T).sum())
    squares = float((mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum())
    return max(0.0, squares - 2 * trace)


def _mean_and_root(features: Moments | Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of a set, and R (rows, D) with R^T R = covariance.

    Of vectors, R is made without the covariance: from N below D vectors it has N rows.
    """
    if isinstance(features, Moments):
        return features.mean, _root(features.covariance)
    if not len(features):
        raise ArgumentError("there is no image to measure; give at least one.")
    check_finite_features(features)
    mean, width = mean_of(features), features.shape[1]
    root = torch.zeros(0, width, dtype=torch.float64)
    # The triangle of a block and of the triangle so far is that of all: the memory is O(D^2), however large N is.
    for block in float64_blocks(features, 2 * width):
        root = torch.cat([root, block - mean])
        if len(root) > width:
            root = torch.linalg.qr(root, mode="r").R
    return mean, root / max(len(features) - 1, 1) ** 0.5


def _root(covariance: Tensor) -> Tensor:
    """Return R (rank, D) with R^T R = covariance, from its symmetric eigen-decomposition."""
    check_finite_features(covariance)
    values, vectors = torch.linalg.eigh(covariance.double())
    noise = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    kept = values > noise  # smaller eigenvalues, negative ones among them, are rounding
    root: Tensor = values[kept].sqrt()[:, None] * vectors[:, kept].T
    return root
