"""Peak memory of a piece of work: of a GPU, or of this process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from sdkit.engines.device import device_peak, reset_device_peak

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement with `peak_memory`. Outside of Linux, only that of a CUDA GPU can be started anew."""
    if device.type == "cuda":
        reset_device_peak(device)
        return
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # resets the high-water mark of resident memory; see proc(5)


def peak_memory(device: torch.device) -> int | None:
    """Return the largest memory in bytes since the last reset; None where the system does not tell.

    For a CUDA GPU this is the memory that tensors took there. Elsewhere it is the resident memory of the whole
    process, with Python and the libraries.
    """
    if device.type == "cuda":
        return device_peak(device)
    with contextlib.suppress(OSError):
        lines = STATUS.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    with contextlib.suppress(ImportError):  # Windows lacks `resource`
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None
