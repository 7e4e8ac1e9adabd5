"""torch.compile: which modules of a network are compiled, and how code that needs hooks leaves the compiled path."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def compile_modules(*modules: nn.Module, device: torch.device) -> None:
    """Compile modules in place for a device. The first call with each shape of input compiles, which is slow."""
    for module in modules:
        module.compile(**compile_options(device))


def compile_options(device: torch.device) -> dict[str, Any]:
    """Return the options of torch.compile for inference on a device.

    A CUDA GPU gets kernels for fixed shapes, each the fastest of several that are timed while compiling: images are
    mostly drawn in one size, and kernels that serve several sizes are slower. CUDA graphs are left out. They overwrite
    their outputs in the next call, and a sampler may keep those of earlier steps. Other devices get PyTorch's defaults.

    Whole networks are compiled. Compiling only their repeated blocks, as diffusers' `compile_repeated_blocks` does, is
    quicker, but those of a U-Net are its transformer blocks, and its group norms and activations would stay unfused.
    """
    return {"dynamic": False, "mode": "max-autotune-no-cudagraphs"} if device.type == "cuda" else {}


def eager() -> AbstractContextManager[object]:
    """Run compiled modules without compilation while the context is open: compiled code ignores hooks that are
    registered after it was compiled."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def is_compiling() -> bool:
    """Return whether torch.compile is tracing this call. Code that reads a tensor's values must not be traced."""
    return torch.compiler.is_compiling()


def original_name(name: str) -> str:
    """Return the name of a parameter without the prefix that torch.compile adds to a compiled module's names."""
    return name.removeprefix("_orig_mod.")
