"""What the wrappers of pretrained networks share."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


class Wrapper(nn.Module):
    """Holds one pretrained network, as `network`, all of whose weights are on one device and in one dtype."""

    network: Any

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.parameters()).device


def fingerprint(network: nn.Module, scale: float, shift: float) -> str:
    """Identity of the side of a VAE that makes latents: SHA-256 over its encoder's weights, scale and shift; 16
    hexadecimal digits.

    The decoder is left out, because latents stay valid when it alone is fine-tuned (as in Stability's ft-mse VAE). Of
    each tensor at most 4,096 evenly spaced values count, so that it takes milliseconds; training moves them all.
    """
    digest = hashlib.sha256(f"{scale:.6g} {shift:.6g}".encode())
    for name, weight in sorted(network.state_dict().items()):
        if name.removeprefix("_orig_mod.").startswith(("encoder.", "quant_conv.")):  # torch.compile puts that before
            flat = weight.detach().flatten()
            values = flat[:: max(1, -(-len(flat) // 4096))].float().cpu().contiguous()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
