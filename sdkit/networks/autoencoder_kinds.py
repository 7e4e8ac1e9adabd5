"""The kinds of autoencoder networks: how each one encodes, decodes, and reports its posterior.

`sdkit.VAE` uses all of them through the same methods. Only `kind_of` looks at a network's class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.loading.pixels import PixelIdentity as PixelIdentity

LOWEST_LOGVAR = -30.0
"""Lower bound at which diffusers clamps log-variances. A posterior that is nowhere above it is a point: its mean."""
DISTANCES_AT_ONCE = 2**25
"""Distances between latents and codes that are held in memory at a time: 128 MiB in float32."""


class Kind:
    """Base class of the kinds. A kind is a view of a network; it has no weights of its own.

    Attributes:
        network: The network, a module of diffusers or a `PixelIdentity`.
        regularizers: The regularizers that a network of this kind can be trained with, named as in `VAEConfig`; none if
            it cannot be trained.
        makes_latents: Whether it leaves the space of pixels.
        normalizes: Whether a `VQModel` in training normalises latents to length 1, like its codes. Other uses need not
            do so: among codes of length 1, the nearest is the same for a latent of any length.
    """

    regularizers: tuple[str, ...] = ()
    makes_latents = True
    normalizes = False

    def __init__(self, network: Any) -> None:
        self.network = network

    @property
    def scale(self) -> float:
        """Factor from raw to scaled latents."""
        return float(self.network.config.scaling_factor)

    @property
    def shift(self) -> float:
        """Number that is subtracted from raw latents before they are scaled."""
        return float(self.network.config.get("shift_factor") or 0.0)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.network.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels that one latent position spans on each side."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    @property
    def codebook(self) -> Tensor | None:
        """The codes (N, C) of a `VQModel`; None for other kinds."""
        return None

    @property
    def encoder_parts(self) -> list[nn.Module]:
        """The modules that stay frozen while the decoder alone is trained."""
        return [part for part in (self.network.encoder, self.network.quant_conv) if part is not None]

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The modules that torch.compile compiles."""
        return [self.network.encoder, self.network.decoder]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, C, h, w), float32, of pixels (B, 3, H, W)."""
        raise NotImplementedError

    def is_point(self, logvar: Tensor) -> bool:
        """Return whether a posterior with this log-variance is a point: sampling it draws no noise."""
        return True

    def remove_noise(self) -> None:
        """Change the weights so that the posterior is a point for every image."""

    def decode(self, raw: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), float32, of raw latents (B, C, h, w)."""
        decoded: Tensor = self.network.decode(raw).sample
        return decoded.float()

    def reconstruct(
        self, mean: Tensor, logvar: Tensor, eps: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decode a posterior with gradient, for training; `dtype` is the network's.

        Returns:
            Pixels (B, 3, H, W), float32, decoded from the posterior's sample by standard normal noise `eps`, or from
            its mean if `eps` is None; and the codes that a `VQModel` decoded, with their numbers, or None and None.
        """
        return self.decode(sampled(mean, logvar, eps).to(dtype)), None, None


class KL(Kind):
    """An `AutoencoderKL`: its posterior is a Gaussian (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114)."""

    regularizers = ("kl", "none")

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance (B, C, h, w), float32, of pixels (B, 3, H, W)."""
        distribution = self.network.encode(x).latent_dist
        return distribution.mean.float(), distribution.logvar.float()

    def is_point(self, logvar: Tensor) -> bool:
        """Return whether no value of the log-variance is above the bound at which diffusers clamps it."""
        return bool((logvar <= LOWEST_LOGVAR).all())

    @torch.no_grad()
    def remove_noise(self) -> None:
        """Make the encoder's last layer output a constant log-variance, far below the bound of diffusers' clamp."""
        layer = self.network.encoder.conv_out if self.network.quant_conv is None else self.network.quant_conv
        half = layer.out_channels // 2
        layer.weight[half:] = 0
        # diffusers clamps the output to LOWEST_LOGVAR. The margin keeps weight decay from lifting it above that.
        layer.bias[half:] = 2000 * LOWEST_LOGVAR


class Tiny(Kind):
    """An `AutoencoderTiny` (TAESD): small, fast, and without a posterior."""

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents (B, C, h, w), float32, and the log-variance of a point."""
        return _point(self.network.encode(x).latents)


class VQ(Tiny):
    """A `VQModel` (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937): each latent position is rounded to the
    nearest code of a codebook before it is decoded."""

    regularizers = ("vq",)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.network.config.vq_embed_dim or super().channels)

    @property
    def codebook(self) -> Tensor | None:
        """The codes (N, C)."""
        codes: Tensor = self.network.quantize.embedding.weight
        return codes

    @property
    def encoder_parts(self) -> list[nn.Module]:
        """The modules that stay frozen while the decoder alone is trained; the codebook is one of them."""
        return [*super().encoder_parts, self.network.quantize]

    def decode(self, raw: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), float32, of codes (B, C, h, w), which are not rounded again."""
        # A decoder with spatial norms is conditioned on the codes.
        condition = raw if self.network.config.norm_type == "spatial" else None
        decoded: Tensor = self.network.decoder(self.network.post_quant_conv(raw), condition)
        return decoded.float()

    def reconstruct(
        self, mean: Tensor, logvar: Tensor, eps: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decode the nearest codes. The decoder's gradient bypasses the rounding and reaches `mean` (section 3.2)."""
        latents, codebook = mean, self.codebook
        assert codebook is not None
        if self.normalizes:  # moving averages of weights shorten the codes
            latents, codebook = F.normalize(latents, dim=1), F.normalize(codebook, dim=1)
        codes, numbers = nearest_codes(codebook, latents)
        straight = latents + (codes - latents).detach()
        return self.decode(straight.to(dtype)), codes, numbers


class Pixels(Kind):
    """A `PixelIdentity`: latents are pixels."""

    scale, shift, channels, factor = 1.0, 0.0, 3, 1
    makes_latents = False

    @property
    def encoder_parts(self) -> list[nn.Module]:
        """An empty list: there is nothing to train."""
        return []

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """An empty list: there is nothing to compile."""
        return []

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels, float32, and the log-variance of a point."""
        return _point(self.network.encode(x))

    def decode(self, raw: Tensor) -> Tensor:
        """Return `raw` (B, 3, H, W), float32."""
        decoded: Tensor = self.network.decode(raw)
        return decoded.float()


KINDS = {"VQModel": VQ, "AutoencoderTiny": Tiny, "PixelIdentity": Pixels}


def kind_of(network: Any) -> Kind | None:
    """Return the kind of an autoencoder network; None if the network is no autoencoder.

    Classes of diffusers that are not listed in `KINDS` count as `KL` if their config has a scaling factor.
    """
    kind = KINDS.get(type(network).__name__, KL)
    return kind(network) if kind is Pixels or "scaling_factor" in getattr(network, "config", ()) else None


def nearest_codes(codebook: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Round raw latents to codes.

    Args:
        codebook: (N, C).
        raw: (B, C, h, w).

    Returns:
        The nearest codes (B, C, h, w), float32, and their indices (B, h, w).
    """
    codebook = codebook.float()
    positions = raw.detach().to(codebook).movedim(1, -1)  # (B, h, w, C)
    rows = positions.flatten(0, -2).split(max(1, DISTANCES_AT_ONCE // len(codebook)))
    indices = torch.cat([torch.cdist(some, codebook.detach()).argmin(1) for some in rows])
    indices = indices.reshape(positions.shape[:-1])
    return codebook[indices].movedim(-1, 1), indices


def sampled(mean: Tensor, logvar: Tensor, eps: Tensor | None) -> Tensor:
    """Return mean + std * eps, a sample of the Gaussian; or its mean if `eps` is None."""
    return mean if eps is None else mean + torch.exp(logvar / 2) * eps


def _point(latents: Tensor) -> tuple[Tensor, Tensor]:
    return latents.float(), torch.full_like(latents, LOWEST_LOGVAR, dtype=torch.float32)
