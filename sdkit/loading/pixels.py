"""The pixel identity: the source "pixels", an autoencoder that changes nothing."""

from __future__ import annotations

from torch import Tensor, nn

CLASS = "PixelIdentity"
"""The class that its config names, in sdkit/assets/pixels and in the folder vae/ of an exported model of pixels. There
are no weights beside it."""


class PixelIdentity(nn.Module):
    """An autoencoder's network that changes nothing: latents are pixels.

    `sdkit.VAE(PixelIdentity())` has factor 1, scale 1, and 3 channels. With it pixel-space diffusion is latent
    diffusion.
    """

    def encode(self, x: Tensor) -> Tensor:
        """Return `x` (B, 3, H, W)."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """Return `z` (B, 3, H, W)."""
        return z
