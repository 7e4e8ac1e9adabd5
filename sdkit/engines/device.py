"""Device and dtype of a network: the meaning of "auto" on this machine, and what depends on the kind of device.

Only this module calls torch.cuda. Its functions accept every device, so that callers need not ask for the kind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdkit.errors import ArgumentError

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def resolve_place(dtype: str | torch.dtype, device: str | torch.device) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device of a network, with "auto" resolved by `resolve_dtype` and `resolve_device`."""
    resolved = resolve_device(device)
    return resolve_dtype(dtype, resolved), resolved


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device. "auto" is a CUDA GPU, else Apple's (MPS), else the CPU. Raise ArgumentError if unusable."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [name for name, there in available.items() if there]
    if device == "auto":
        return torch.device(present[0])
    try:
        resolved = torch.device(device)
        torch.ones(1, device=resolved).item()  # read a value: the device "meta" allocates, but has none
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        choices = " or ".join(map(repr, present))
        raise ArgumentError(f"device {device!r} cannot be used on this machine; use 'auto', {choices}.") from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return a dtype. "auto" is bfloat16 if the hardware supports it (CPUs: AVX512-BF16 or AMX), else float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ArgumentError(f"dtype {dtype!r} is not one of 'auto', 'fp32', 'bf16', 'fp16'.")
    return resolved


def has_native_bf16(device: torch.device) -> bool:
    """Return whether the hardware has bfloat16 arithmetic; elsewhere PyTorch emulates it, slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """Return the memory layout: channels_last in half precision, which is twice as fast; contiguous in float32, to be
    bit-identical to diffusers."""
    return torch.contiguous_format if dtype == torch.float32 else torch.channels_last


def has_fused_adam(device: torch.device) -> bool:
    """Return whether to use PyTorch's fused AdamW on a device, which is three times as fast as its default."""
    return device.type in ("cpu", "cuda")


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor from which a copy to a device can be asynchronous.

    For a CUDA GPU this is a copy in pinned memory: `pinned(x, device).to(device, non_blocking=True)` returns at once,
    while the GPU computes. For other devices it is the tensor itself.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def release_memory(device: torch.device) -> None:
    """Free the unused memory blocks that PyTorch caches on a CUDA GPU; a no-op on other devices."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_rng_state(device: torch.device) -> Tensor | None:
    """Return the state of a CUDA GPU's random generator; None for other devices, whose generator is the CPU's."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_rng_state(state: Tensor, device: torch.device) -> None:
    """Set a CUDA GPU's random generator to a state from `device_rng_state`; a no-op on other devices."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)


def reset_device_peak(device: torch.device) -> None:
    """Start a new measurement of `device_peak` on a CUDA GPU."""
    torch.cuda.reset_peak_memory_stats(device)


def device_peak(device: torch.device) -> int:
    """Return the largest memory in bytes that tensors took on a CUDA GPU since the last reset."""
    return torch.cuda.max_memory_allocated(device)
