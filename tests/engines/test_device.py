from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _foreach_utils

import sdkit
from sdkit.engines import device as module
from sdkit.engines.device import has_fused_adam, pinned, resolve_device, resolve_dtype
from sdkit.errors import ArgumentError

PACKAGE = Path(sdkit.__file__).parent
PER_DEVICE = ("accelerator", "backends", "cpu", "cuda", "mps", "xpu")
"""Parts of torch that ask a kind of device, or change it."""

PRESENT = [
    name
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True))
    if there
]


def test_auto_takes_the_fastest_that_is_there() -> None:
    assert resolve_device("auto") == torch.device(PRESENT[0])
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "cuda:99", "tpu", "", "cpu\n", None, 3.5])
def test_devices_that_cannot_compute_are_refused(device: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve_device(device)
    choices = " or ".join(repr(name) for name in PRESENT)
    assert str(caught.value) == f"device {device!r} cannot be used on this machine; use 'auto', {choices}."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_not_advised_where_there_is_none() -> None:
    with pytest.raises(ArgumentError, match=r"^device 'cuda' cannot be used on this machine; ") as caught:
        resolve_device("cuda")
    assert "'cuda'" not in str(caught.value).partition(";")[2]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16), (torch.float16, torch.float16)],
)
def test_dtypes(dtype: Any, expected: torch.dtype) -> None:
    assert resolve_dtype(dtype, torch.device("cpu")) == expected


@pytest.mark.parametrize("dtype", ["fp8", "", torch.int8, torch.float64, None, ["fp32"]])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ArgumentError, match=r"is not one of 'auto', 'fp32', 'bf16', 'fp16'\.$"):
        resolve_dtype(dtype, torch.device("cpu"))


# Calls that depend on the kind of device


def per_device_names(source: str) -> Iterator[str]:
    """Yield each use of a part of torch in `PER_DEVICE`, and each call of `x.cuda()`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield from (f"torch.{name}" for name in PER_DEVICE if name == node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield ".cuda()"
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name for name in names if name.startswith(tuple(f"torch.{part}" for part in PER_DEVICE)))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (f"torch.{alias.name}" for alias in node.names if alias.name in PER_DEVICE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            yield from (f"torch.{name}" for name in PER_DEVICE if str(node.module).split(".")[1] == name)


def test_only_engines_ask_for_the_kind_of_device() -> None:
    names = {path: set(per_device_names(path.read_text())) for path in PACKAGE.rglob("*.py")}
    outside = {str(path): found for path, found in names.items() if found and path.parent != PACKAGE / "engines"}
    assert outside == {}
    assert [path.name for path, found in names.items() if "torch.cuda" in found] == ["device.py"]


@pytest.mark.parametrize(
    "source",
    ["import torch.cuda", "from torch import cuda", "from torch.cuda import empty_cache", "torch.cuda.synchronize()",
     "network.cuda()", "torch.backends.mps.is_available()"],
)  # fmt: skip
def test_the_search_finds_every_spelling(source: str) -> None:
    assert list(per_device_names(source))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "meta"])
def test_fused_adam_is_used_only_where_pytorch_has_it(kind: str) -> None:
    """PyTorch raises where it has no fused kernels."""
    if has_fused_adam(torch.device(kind)):
        assert kind in _foreach_utils._get_fused_kernels_supported_devices()


def test_only_a_gpu_gets_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3)
    copy = x.clone()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: copy)
    for kind in ("cpu", "mps", "meta"):
        assert pinned(x, torch.device(kind)) is x
    assert pinned(x, torch.device("cuda", 1)) is copy
    on_a_device = x.to("meta")  # only tensors on the CPU can be pinned
    assert pinned(on_a_device, torch.device("cuda")) is on_a_device


def test_random_generator_and_cached_memory_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's functions for CUDA are replaced by a generator on the CPU, and called for CUDA alone."""
    generator, emptied = torch.Generator().manual_seed(3), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generator.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generator.set_state(state))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    state = module.device_rng_state(gpu)
    assert state is not None
    assert module.device_rng_state(cpu) is None
    first = torch.rand(3, generator=generator)
    module.set_device_rng_state(state, cpu)
    assert not torch.equal(torch.rand(3, generator=generator), first)
    module.set_device_rng_state(state, gpu)
    assert torch.equal(torch.rand(3, generator=generator), first)
    module.release_memory(cpu)
    assert not emptied
    module.release_memory(gpu)
    assert emptied
