from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from sdkit.errors import ArgumentError
from sdkit.evaluation import precision_recall as module
from sdkit.evaluation.precision_recall import precision_recall
from tests.helpers.sentences import one_sentence


def covered_by_sklearn(vectors: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of vectors inside a ball, with neighbours found by a tree and distances by plain differences."""
    distances, _ = NearestNeighbors(n_neighbors=k + 1, algorithm="kd_tree").fit(centres).kneighbors(centres)
    radii = distances[:, -1]  # the nearest neighbour of each centre is itself
    return float(np.mean([(np.linalg.norm(centres - vector, axis=1) <= radii).any() for vector in vectors]))


@pytest.mark.parametrize("rows", [7, 1024])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_equal_to_sklearns_neighbours(monkeypatch: pytest.MonkeyPatch, rows: int, k: int) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    rng = np.random.default_rng(k)
    generated, real = rng.normal(size=(80, 4)) * 0.7 + 100.4, rng.normal(size=(60, 4)) + 100
    found = precision_recall(torch.from_numpy(generated), torch.from_numpy(real), k=k)
    assert found.precision == covered_by_sklearn(generated, real, k)
    assert found.recall == covered_by_sklearn(real, generated, k)
    assert 0 < found.recall < found.precision <= 1  # the generated vectors spread less


def test_known_shapes() -> None:
    line = torch.arange(20.0)[:, None]
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(line + 1000, line) == (0, 0)
    # All copies of one real vector: perfect precision; with a radius of 0, they reach that vector only.
    assert precision_recall(line[5].expand(9, 1), line) == (1, 1 / 20)
    # Half of the modes: the generated ones reach three beyond the last.
    assert precision_recall(line[:10], line) == (1, 13 / 20)


def test_bad_input_is_one_sentence() -> None:
    x = torch.zeros(9, 2)
    one_sentence(lambda: precision_recall(x[:3], x), ArgumentError, "more than 3 images in each set, not 3 and 9")
    one_sentence(lambda: precision_recall(x, x, k=0), ArgumentError, "k must be a whole number")
    one_sentence(lambda: precision_recall(x, torch.zeros(9, 3)), ArgumentError, "features of 2 and 3 numbers")
    one_sentence(lambda: precision_recall(x, x + torch.inf), ArgumentError, "features must be finite numbers")
