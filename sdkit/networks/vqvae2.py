"""VQ-VAE-2: a VQ-VAE of two levels (Razavi et al. 2019, https://arxiv.org/abs/1906.00446), of diffusers' blocks.

The top codes, half as high and wide, hold the arrangement of an image, the bottom codes its details. A prior of the top
codes is one of images; a prior of the bottom codes has the top codes as its map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from sdkit.diffusion.losses import vq
from sdkit.errors import ArgumentError
from sdkit.networks.autoencoder_kinds import nearest_codes


class TwoLevels(NamedTuple):
    """A reconstruction by both levels, as `VQVAE2.forward` returns it.

    Attributes:
        pixels: The reconstruction (B, 3, H, W).
        loss: Codebook and commitment losses of both levels, added up.
        top: Codes of the top level (B, h/2, w/2).
        bottom: Codes of the bottom level (B, h, w).
    """

    pixels: Tensor
    loss: Tensor
    top: Tensor
    bottom: Tensor


class VQVAE2(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A VQ-VAE of two levels. `save_pretrained` and `from_pretrained` are those of diffusers.

    Args:
        block_out_channels: Channels of the bottom level's networks; n of them make codes of 2^(n - 1) pixels.
        top_channels: Channels of the top level's networks, which halve the size once more.
        layers_per_block: Residual layers of each block.
        latent_channels: Channels of a code.
        num_vq_embeddings: Codes of each codebook.
        norm_num_groups: Groups of the group norms.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        top_channels: tuple[int, int] = (128, 128),
        layers_per_block: int = 1,
        latent_channels: int = 32,
        num_vq_embeddings: int = 512,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {
            "layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups, "mid_block_add_attention": False
        }  # fmt: skip
        width = latent_channels
        self.factor = 2 ** (len(block_out_channels) - 1)

        def encoder(channels: int, blocks: Sequence[int]) -> Any:
            return Encoder(
                channels, width, down_block_types=("DownEncoderBlock2D",) * len(blocks), block_out_channels=blocks,
                double_z=False, **common,
            )  # fmt: skip

        def decoder(channels: int, out: int, blocks: Sequence[int]) -> Any:
            return Decoder(
                channels, out, up_block_types=("UpDecoderBlock2D",) * len(blocks), block_out_channels=blocks, **common
            )

        self.bottom_encoder, self.top_encoder = encoder(3, block_out_channels), encoder(width, top_channels)
        self.top_decoder = decoder(width, width, top_channels)
        self.joined = nn.Conv2d(2 * width, width, 1)
        self.upsampled = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.decoder = decoder(2 * width, 3, block_out_channels)
        self.top_codes, self.bottom_codes = (nn.Embedding(num_vq_embeddings, width) for _ in range(2))
        for table in (self.top_codes, self.bottom_codes):  # as in diffusers' VectorQuantizer
            nn.init.uniform_(table.weight, -1 / num_vq_embeddings, 1 / num_vq_embeddings)

    def forward(self, pixels: Tensor) -> TwoLevels:
        """Reconstruct pixels (B, 3, H, W) in [-1, 1] with gradients, for training.

        The reconstruction's gradient bypasses both roundings (van den Oord et al. 2017, section 3.2).

        Raises:
            ArgumentError: A side is no multiple of twice the factor.
        """
        unit = 2 * self.factor
        if pixels.shape[2] % unit or pixels.shape[3] % unit:
            size = f"{pixels.shape[2]} x {pixels.shape[3]}"
            raise ArgumentError(f"height and width must be multiples of {unit} pixels, not {size}.")
        below = self.bottom_encoder(pixels)
        q_top, top, top_loss = _rounded(self.top_codes.weight, self.top_encoder(below))
        z_bottom = self.joined(torch.cat([self.top_decoder(q_top), below], dim=1))
        q_bottom, bottom, bottom_loss = _rounded(self.bottom_codes.weight, z_bottom)
        return TwoLevels(self._decoded(q_top, q_bottom), top_loss + bottom_loss, top, bottom)

    def _decoded(self, q_top: Tensor, q_bottom: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(torch.cat([self.upsampled(q_top), q_bottom], dim=1))
        return pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of both levels, (B, h/2, w/2) and (B, h, w), of pixels (B, 3, H, W) in [-1, 1]."""
        found = self(pixels)
        return found.top, found.bottom

    @torch.no_grad()
    def decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), clamped to [-1, 1], of codes (B, h/2, w/2) and (B, h, w)."""
        q_top, q_bottom = self.top_codes(top).movedim(-1, 1), self.bottom_codes(bottom).movedim(-1, 1)
        return self._decoded(q_top, q_bottom).clamp(-1, 1)


def _rounded(codebook: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes with the gradient of the latents (B, C, h, w), their numbers (B, h, w), and the codebook loss."""
    codes, numbers = nearest_codes(codebook, latents)
    return latents + (codes - latents).detach(), numbers, vq(latents, codes)
