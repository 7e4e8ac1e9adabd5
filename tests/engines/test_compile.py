"""What torch.compile is asked for on each kind of device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sdkit.engines.compile import compile_modules, compile_options, eager


def test_a_gpu_gets_tuned_kernels_for_fixed_shapes_without_cuda_graphs() -> None:
    options = compile_options(torch.device("cuda", 0))
    assert options["dynamic"] is False
    mode = torch._inductor.list_mode_options(options["mode"])  # raises for a mode that PyTorch does not have
    assert mode["max_autotune"]
    assert not mode.get("triton.cudagraphs")


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices_get_pytorchs_defaults(device: str) -> None:
    assert compile_options(torch.device(device)) == {}


def test_modules_are_compiled_with_the_options_of_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    gpu = torch.device("cuda", 1)
    compile_modules(nn.Linear(1, 1), nn.Tanh(), device=gpu)
    compile_modules(nn.Tanh(), device=torch.device("cpu"))
    assert asked == [compile_options(gpu), compile_options(gpu), {}]


def test_eager_leaves_the_compiled_path() -> None:
    traced = []

    class Traced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                traced.append(1)
            return x + 1

    module = Traced()
    module.compile(backend="eager")
    with eager():
        assert module(torch.zeros(2)).tolist() == [1, 1]
    assert not traced
    assert module(torch.zeros(2)).tolist() == [1, 1]
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@torch.no_grad()
def test_the_options_of_a_gpu_compile_and_give_the_same_numbers() -> None:
    """Compiled for the CPU, which PyTorch allows with the same options. A second size compiles anew."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
    inputs = [torch.randn(2, 8, side, side) for side in (8, 12)]
    expected = [network(x) for x in inputs]
    compile_modules(network, device=torch.device("cuda"))
    for x, y in zip(inputs, expected, strict=True):
        torch.testing.assert_close(network(x), y, atol=1e-5, rtol=0)
    torch.compiler.reset()
