"""Fingerprints of networks, by which caches, latent files, and runs recognise the weights they were made with."""

from __future__ import annotations

import hashlib

from torch import nn

from sdkit.engines.compile import original_name

SAMPLED = 4096
"""At most this many values of each tensor are hashed, evenly spaced. This is fast, and training changes all values."""


def fingerprint(network: nn.Module, scale: float, shift: float) -> str:
    """Return the fingerprint of an autoencoder's encoder side: its encoder, `quant_conv`, scale, and shift.

    The decoder is left out: latents stay valid if only the decoder is fine-tuned (as in Stability's ft-mse VAE).

    Args:
        network: The autoencoder, in float32; other precisions would round it to another fingerprint.
        scale: Factor from raw to scaled latents.
        shift: Number that is subtracted from raw latents.

    Returns:
        SHA-256 over the encoder's weights, scale, and shift: its first 16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{scale:.6g} {shift:.6g}".encode())
    for name, weight in sorted(network.state_dict().items()):
        if original_name(name).startswith(("encoder.", "quant_conv.")):
            flat = weight.detach().flatten()
            values = flat[:: max(1, -(-len(flat) // SAMPLED))].float().cpu().contiguous()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(network: nn.Module) -> str:
    """Return the fingerprint of all weights of a network, which must be in float32."""
    return fingerprint(nn.ModuleDict({"encoder": network}), scale=1.0, shift=0.0)  # `fingerprint` hashes encoder.*
