"""The base class of wrappers around pretrained networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sdkit.errors import SdkitError, SourceError
from sdkit.messages import first_line

P = ParamSpec("P")
T = TypeVar("T")
W = TypeVar("W", bound="Wrapper")
DEVICE_ERROR: type[Exception] = getattr(torch, "AcceleratorError", MemoryError)  # new in torch 2.8


def blames_network(method: Callable[Concatenate[W, P], T]) -> Callable[Concatenate[W, P], T]:
    """Turn an exception of a Wrapper's method into a SourceError if the network fails on a valid input, too.

    Some wrong values of a config (activation, groups, heads) break a network only when it runs.
    """

    @functools.wraps(method)
    def call(self: W, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.blame(error)
            raise

    return call


class Wrapper(nn.Module):
    """The base class of `VAE`, `UNet`, and `TextEncoder`: one pretrained network, on one device and in one dtype.

    Move the wrapper, not its network: `.to()`, `.half()`, `.cuda()`, and Accelerate all go through `_apply`, which
    keeps `device` and `dtype` up to date.

    Attributes:
        network: The network, a module of diffusers or transformers.
        name: The source that it came from; "" if it was made in Python.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.
    """

    network: Any
    name: str
    device: torch.device
    dtype: torch.dtype

    def __init__(self, network: nn.Module, *, name: str = "") -> None:
        super().__init__()
        self.network = network
        self.name = name
        weight = next(network.parameters(), torch.empty(0))  # a pixel identity has no weights
        self.device, self.dtype = weight.device, weight.dtype
        self._trial = False

    def _apply(self: W, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W:
        nn.Module._apply(self, fn, recurse)
        # `fn` moves and converts weights. Without weights, a probe shows which device and dtype it moves them to.
        weight = next(self.network.parameters(), None)
        probe = fn(torch.zeros(1, device=self.device, dtype=self.dtype)) if weight is None else weight
        self.device, self.dtype = probe.device, probe.dtype
        return self

    def try_out(self) -> None:
        """Run the network on an input that is valid for every network of its kind."""
        raise NotImplementedError

    def blame(self, error: Exception) -> None:
        """Raise SourceError if the network caused `error`; return if the input of the call may have."""
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)
        # After a device error every call fails, so that a trial would wrongly blame the network.
        if self._trial or exhausted or isinstance(error, (SdkitError, DEVICE_ERROR)):
            return
        self._trial = True
        try:
            with torch.no_grad():
                self.try_out()
        except Exception as fault:  # noqa: BLE001 (a library may raise anything for a wrong value)
            whose = f"the config of {self.name!r}" if self.name else f"the config of this {type(self).__name__}"
            raise SourceError(
                f"{whose} makes a network that cannot run: {first_line(fault)}; correct it, or give another source."
            ) from error
        finally:
            self._trial = False
