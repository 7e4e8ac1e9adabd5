from __future__ import annotations

from typing import Any

import pytest
import torch

from sdkit.engines.device import resolve_device, resolve_dtype
from sdkit.errors import ArgumentError

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
