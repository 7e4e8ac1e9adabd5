"""VQ-VAE-2: a VQ-VAE of two levels (Razavi et al. 2019, https://arxiv.org/abs/1906.00446), of diffusers' blocks.

The top codes, half as high and wide, hold the arrangement of an image, the bottom codes its details. A prior of the top
codes is one of images; a prior of the bottom codes has the top codes as its map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from sdkit.diffusion.losses import vq, without_gradient
from sdkit.errors import ArgumentError, SourceError
from sdkit.files import expanded
from sdkit.loading.configs import COUNT, SIZE, WHOLE, WHOLES, Check, read_config, read_json
from sdkit.loading.fingerprint import weights_fingerprint
from sdkit.loading.tensors import check_dtypes, check_finite, check_fit, guarded, open_tensors
from sdkit.messages import clean
from sdkit.networks.autoencoder_kinds import nearest_codes

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(("block_out_channels", "top_channels"), WHOLES),
    **dict.fromkeys(("latent_channels", "num_vq_embeddings", "norm_num_groups"), WHOLE),
    "layers_per_block": COUNT,
    "sample_size": SIZE,
}
"""Keys in the config of a VQ-VAE-2 -> their checks. Other keys are ignored."""


class TwoLevels(NamedTuple):
    """A reconstruction by both levels, as `VQVAE2.forward` returns it.

    Attributes:
        pixels: The reconstruction (B, 3, H, W).
        loss: Codebook and commitment losses of both levels, added up.
        top: Codes of the top level (B, h/2, w/2).
        bottom: Codes of the bottom level (B, h, w).
        z_top: Latents that were rounded to the top codes (B, C, h/2, w/2).
        z_bottom: Latents that were rounded to the bottom codes (B, C, h, w).
    """

    pixels: Tensor
    loss: Tensor
    top: Tensor
    bottom: Tensor
    z_top: Tensor
    z_bottom: Tensor


class VQVAE2(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A VQ-VAE of two levels. `save_pretrained` and `from_pretrained` are those of diffusers.

    Args:
        block_out_channels: Channels of the bottom level's networks; n of them make codes of 2^(n - 1) pixels.
        top_channels: Channels of the top level's networks, which halve the size once more.
        layers_per_block: Residual layers of each block.
        latent_channels: Channels of a code.
        num_vq_embeddings: Codes of each codebook.
        norm_num_groups: Groups of the group norms.
        sample_size: Height and width of the training images in pixels, of which the network itself makes no use.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        top_channels: tuple[int, int] = (128, 128),
        layers_per_block: int = 1,
        latent_channels: int = 32,
        num_vq_embeddings: int = 512,
        norm_num_groups: int = 32,
        sample_size: tuple[int, int] = (64, 64),  # noqa: ARG002 - kept in the config
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

    def forward(self, pixels: Tensor, *, train_codes: bool = True) -> TwoLevels:
        """Reconstruct pixels (B, 3, H, W) in [-1, 1] with gradients, for training.

        The reconstruction's gradient bypasses both roundings (van den Oord et al. 2017, section 3.2). Without
        `train_codes`, the loss has no gradient in the codes, which then learn in another way.

        Raises:
            ArgumentError: A side is no multiple of twice the factor.
        """
        top, bottom = self._levels(pixels, train_codes=train_codes)
        decoded = self._decoded(top.codes, bottom.codes)
        return TwoLevels(decoded, top.loss + bottom.loss, top.numbers, bottom.numbers, top.latents, bottom.latents)

    def _levels(self, pixels: Tensor, *, train_codes: bool = True) -> tuple[_Rounded, _Rounded]:
        """Return the rounded latents of both levels of pixels (B, 3, H, W)."""
        self.check_size((pixels.shape[2], pixels.shape[3]))
        below = self.bottom_encoder(pixels)
        top = _rounded(self.top_codes.weight, self.top_encoder(below), train_codes=train_codes)
        joined = self.joined(torch.cat([self.top_decoder(top.codes), below], dim=1))
        return top, _rounded(self.bottom_codes.weight, joined, train_codes=train_codes)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError unless height and width in pixels are multiples of those of a top code."""
        unit = 2 * self.factor
        if any(side % unit for side in size):
            raise ArgumentError(f"height and width must be multiples of {unit} pixels, not {size[0]} x {size[1]}.")

    def _decoded(self, q_top: Tensor, q_bottom: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(torch.cat([self.upsampled(q_top), q_bottom], dim=1))
        return pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of both levels, (B, h/2, w/2) and (B, h, w), of pixels (B, 3, H, W) in [-1, 1].

        Raises:
            ArgumentError: A side is no multiple of twice the factor.
        """
        top, bottom = self._levels(pixels)
        return top.numbers, bottom.numbers

    @torch.no_grad()
    def decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), clamped to [-1, 1], of codes (B, h/2, w/2) and (B, h, w)."""
        q_top, q_bottom = self.top_codes(top).movedim(-1, 1), self.bottom_codes(bottom).movedim(-1, 1)
        return self._decoded(q_top, q_bottom).clamp(-1, 1)


class Level(nn.Module):
    """One level of a frozen VQ-VAE-2, as the stage of priors reads an autoencoder.

    Args:
        network: The network.
        level: "top" or "bottom".

    Attributes:
        network: The network.
        scale: Scale of its latents, 1.
        shift: Shift of its latents, 0.
        factor: Pixels that one code of the level spans on each side.
        identity: Fingerprint of the network.
    """

    scale, shift = 1.0, 0.0

    def __init__(self, network: VQVAE2, level: str) -> None:
        super().__init__()
        self.network, self.level = network, level
        self.factor: int = network.factor * (2 if level == "top" else 1)
        self.identity = weights_fingerprint(network)

    @property
    def codebook(self) -> Tensor:
        """The codes (N, C) of the level."""
        codes: Tensor = self.network.get_parameter(f"{self.level}_codes.weight")
        return codes

    def codes(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (B, h, w) of the level, and those of the top level, of pixels (B, 3, H, W) in [-1, 1]."""
        with torch.autocast(pixels.device.type, enabled=False):  # rounding would give other codes
            top, bottom = self.network.to(pixels.device).encode(pixels.float())
        return top if self.level == "top" else bottom, top

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError unless height and width in pixels are multiples of those of a top code."""
        self.network.check_size(size)


def load_vqvae2(folder: str | PathLike[str]) -> VQVAE2:
    """Load a VQ-VAE-2, in eval mode, in float32, on the CPU.

    Args:
        folder: The result of `train_vqvae2`, or what `VQVAE2.save_pretrained` wrote.

    Raises:
        SourceError: The folder holds none, or a damaged one.
    """
    path = expanded(folder)
    found = read_json(path / CONFIG).get("_class_name")
    if found != VQVAE2.__name__:
        raise SourceError(f"{clean(path)!r} holds a {clean(found)}, not a VQVAE2; give the result of train vqvae2.")
    config, file = read_config(path / CONFIG, CHECKS), open_tensors(path / WEIGHTS)
    check_dtypes(file, file.shapes)
    label = f"the VQ-VAE-2 in {clean(path)!r}"
    # Before memory is taken: a damaged config may ask for any amount of it.
    blocks = (len(config.get("block_out_channels", "")) + 2) * config.get("layers_per_block", 1)
    if blocks > len(file.shapes):
        raise SourceError(f"{clean(path / CONFIG)!r} asks for {blocks:,} layers, more than its weights; correct it.")
    with guarded(label), torch.device("meta"):
        network: VQVAE2 = VQVAE2(**{key: config[key] for key in CHECKS if key in config})
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    check_fit(file.shapes, expected, f"the weights of {label} do not fit its config")
    with guarded(label):
        tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in file.read(expected).items()}
        network.load_state_dict(tensors, assign=True)
    check_finite(network, file, expected)
    network.eval()
    return network


class _Rounded(NamedTuple):
    """Latents of a level that were rounded to codes.

    Attributes:
        codes: The codes (B, C, h, w), with the gradient of the latents.
        numbers: Their numbers (B, h, w).
        loss: The codebook and commitment losses.
        latents: The latents (B, C, h, w).
    """

    codes: Tensor
    numbers: Tensor
    loss: Tensor
    latents: Tensor


def _rounded(codebook: Tensor, latents: Tensor, *, train_codes: bool) -> _Rounded:
    """Round latents (B, C, h, w) to the nearest of the codes (N, C)."""
    codes, numbers = nearest_codes(codebook, latents)
    loss = vq(latents, codes if train_codes else without_gradient(codes))
    return _Rounded(latents + (codes - latents).detach(), numbers, loss, latents)
