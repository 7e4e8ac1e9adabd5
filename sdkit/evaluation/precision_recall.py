"""Improved precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991).

Precision is the share of generated images that look like real ones; recall is the share of real images that the
generated ones can reach. A model of few modes has high precision and low recall.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdkit.arguments import whole_number
from sdkit.errors import ArgumentError
from sdkit.evaluation.moments import check_comparable, float64_blocks, mean_of

NEIGHBOURS = 3
"""k of the paper."""
ROWS = 1024
"""Rows and columns of the blocks in which distances are computed: 8 MiB each."""


class PrecisionRecall(NamedTuple):
    """Improved precision and recall, each a share in [0, 1].

    Attributes:
        precision: Share of generated vectors inside the manifold of the real ones.
        recall: Share of real vectors inside the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(generated: Tensor, real: Tensor, *, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Return improved precision and recall (eq. 1 and 2 of the paper).

    The manifold of a set is the union of the balls around its vectors that reach to their k-th nearest neighbours in
    the set. Distances are computed in float64, in blocks: beside the vectors, the memory is O(N + M).

    Args:
        generated: Vectors (N, D).
        real: Vectors (M, D).
        k: Number of neighbours.

    Raises:
        ArgumentError: k is below 1, a set has no k neighbours, the widths differ, or a feature is not finite.
    """
    whole_number("k", k, 1)
    if min(len(generated), len(real)) <= k:
        raise ArgumentError(
            f"precision and recall need more than {k} images in each set, not {len(generated)} and {len(real)}."
        )
    check_comparable(generated, real)
    centre = mean_of(real)  # distances from it are the same, and lose fewer digits
    return PrecisionRecall(
        _covered(generated, real, _radii(real, k, centre), centre),
        _covered(real, generated, _radii(generated, k, centre), centre),
    )


def _radii(vectors: Tensor, k: int, centre: Tensor) -> Tensor:
    """Return the squared distance of each vector to its k-th nearest neighbour (N,)."""
    radii = []
    for i, rows in enumerate(float64_blocks(vectors, ROWS)):
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64)
        for j, columns in enumerate(float64_blocks(vectors, ROWS)):
            squares = _squares(rows - centre, columns - centre)
            if i == j:
                squares.fill_diagonal_(torch.inf)  # no vector is its own neighbour
            nearest = torch.cat([nearest, squares], dim=1).topk(k, dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _covered(vectors: Tensor, centres: Tensor, radii: Tensor, centre: Tensor) -> float:
    """Return the share of vectors that lie in at least one of the balls."""
    covered = 0
    for rows in float64_blocks(vectors, ROWS):
        inside = torch.zeros(len(rows), dtype=torch.bool)
        for columns, squared in zip(float64_blocks(centres, ROWS), radii.split(ROWS), strict=True):
            inside |= (_squares(rows - centre, columns - centre) <= squared).any(dim=1)
        covered += int(inside.sum())
    return covered / len(vectors)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (N, M)."""
    products = a @ b.T
    squares: Tensor = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * products
    return squares.clamp_(min=0)
