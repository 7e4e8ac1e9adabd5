"""The memory that metrics take beside the float32 vectors does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdkit.evaluation import frechet, kernel_distance, moments, precision_recall
from sdkit.evaluation.summary import Sample

N, WIDTH, ROWS = 3000, 40, 64
METRICS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "frechet_distance": frechet.frechet_distance,
    "frechet_at_infinity": frechet.frechet_at_infinity,
    "frechet_interval": lambda a, b: frechet.frechet_interval(a, b, 1.0, resamples=2),
    "kid": kernel_distance.kid,
    "cmmd": kernel_distance.cmmd,
    "precision_recall": precision_recall.precision_recall,
}


class Largest(TorchDispatchMode):
    """Watches the operations of torch, and notes the size of the largest float64 tensor that they return."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for one in tree_leaves(results):
            if isinstance(one, Tensor) and one.dtype == torch.float64:
                self.numbers = max(self.numbers, one.numel())
        return results


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_makes_a_float64_copy_of_all_vectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS", ROWS)
    monkeypatch.setattr(precision_recall, "ROWS", ROWS)
    monkeypatch.setattr(kernel_distance, "BLOCK", ROWS)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, WIDTH, generator=generator) for _ in range(2))
    with Largest() as largest:
        METRICS[name](a, b)
    assert 0 < largest.numbers <= max(3 * WIDTH * WIDTH, ROWS * (ROWS + precision_recall.NEIGHBOURS))


def test_a_sample_is_not_copied_each_time_it_is_asked_for() -> None:
    sample = Sample(3, 100)
    for i in range(0, 40, 10):
        sample.add(torch.arange(i, i + 10), torch.randn(10, 3))
    first, second = sample.tensors(), sample.tensors()
    assert first[1].data_ptr() == second[1].data_ptr()
