"""torch.compile: which modules of a network are compiled, and how code that needs hooks leaves the compiled path."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


def compile_modules(*modules: nn.Module) -> None:
    """Compile modules in place. The first call with each shape of input compiles, which is slow."""
    for module in modules:
        module.compile()


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
