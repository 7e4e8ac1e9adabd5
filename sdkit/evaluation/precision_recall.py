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
from sdkit.evaluation.moments import check_comparable

NEIGHBOURS = 3
"""k of the paper."""
ROWS = 1024
"""Rows of distances that are held at a time."""


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
    the set. Distances are computed in float64, in rows: the memory is O(N + M).

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
    centre = real.double().mean(dim=0)  # distances are the same, and lose fewer digits
    x, y = generated.double() - centre, real.double() - centre
    return PrecisionRecall(_covered(x, y, _radii(y, k)), _covered(y, x, _radii(x, k)))


def _radii(vectors: Tensor, k: int) -> Tensor:
    """Return the squared distance of each vector to its k-th nearest neighbour (N,)."""
    radii = []
    for start in range(0, len(vectors), ROWS):
        squares = _squares(vectors[start : start + ROWS], vectors)
        squares.diagonal(start).fill_(torch.inf)  # no vector is its own neighbour
        radii.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _covered(vectors: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of vectors that lie in at least one of the balls."""
    inside = [(_squares(rows, centres) <= radii).any(dim=1) for rows in vectors.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (N, M)."""
    products = a @ b.T
    squares: Tensor = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * products
    return squares.clamp_(min=0)
