"""ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): a copy of the U-Net's encoder that reads an image,
such as its edges, and adds its outputs to the U-Net's skip connections."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.diffusion.conditioning import Conditioning, Residuals, check_condition
from sdkit.engines.attention import quicken_attention
from sdkit.engines.device import memory_format, resolve_place
from sdkit.errors import ArgumentError
from sdkit.loading.source import Source
from sdkit.networks.denoiser import UNet
from sdkit.networks.shared_timestep import embed_timestep_once, shared_timestep, timesteps_of
from sdkit.networks.text_lengths import of_equal_length
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from diffusers import ControlNetModel

ALIKE = ("block_out_channels", "layers_per_block", "cross_attention_dim")
"""Keys of the config in which a ControlNet and its U-Net must agree."""


class ControlNet(Wrapper):
    """A `ControlNetModel` that takes a `Conditioning` and an image.

    Args:
        network: The network.

    Attributes:
        network: The network.
        name: The source that it came from.
        channels: Channels of the latents (4).
        image_channels: Channels of the image that it reads (3).
        factor: Pixels of that image for each latent position, on each side (8).
        pools: Whether it reads the image as a whole, without places (`global_pool_conditions`); it is then always in
            guess mode.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.

    Example:
        >>> import sdkit, torch
        >>> from diffusers import ControlNetModel
        >>> sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
        >>> control = sdkit.ControlNet(ControlNetModel.from_unet(sd.unet.network))  # untrained: changes nothing
        >>> edges = sdkit.images.canny(sd("a cat", num_inference_steps=2)[0])
        >>> images = sd("a fox", controlnet=control, control_image=edges, num_inference_steps=2)
    """

    def __init__(self, network: ControlNetModel) -> None:
        """Wrap a network; `from_pretrained` loads one."""
        super().__init__(network)
        config: Any = network.config
        self.channels, self.image_channels = int(config.in_channels), int(config.conditioning_channels)
        self.factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
        self.pools = bool(config.global_pool_conditions)
        embed_timestep_once(network)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        variant: str | None = None,
        config: str | PathLike[str] | None = None,
    ) -> ControlNet:
        """Load a ControlNet.

        Args:
            source: A folder in diffusers layout, a Hub id ("lllyasviel/control_v11p_sd15_canny"), or a .safetensors or
                .pth file in the original layout, whose tensors are called control_model.*.
            dtype: As in `sdkit.VAE.from_pretrained`, as for the other arguments.
            device: A GPU or the CPU.
            revision: Branch, tag, or commit of a Hub repository.
            variant: Variant of a repository's weight files, such as "fp16".
            config: Folder or Hub id with controlnet/config.json, for a single file that the public configs do not fit.

        Raises:
            SourceError: The source is missing, unreadable, of another kind, or cannot be downloaded.
            ArgumentError: An argument is out of range.
        """
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config)
        return cls.from_source(opened, dtype=dtype, device=device)

    @classmethod
    def from_source(cls, source: Source, *, dtype: torch.dtype, device: torch.device) -> ControlNet:
        """Load a ControlNet from an opened `Source`."""
        controlnet = cls(source.controlnet(dtype))
        controlnet.name = source.name
        controlnet.eval().to(device=device, memory_format=memory_format(dtype))  # type: ignore[call-overload]
        quicken_attention(controlnet.network, dtype, device)
        return controlnet

    def try_out(self) -> None:
        """Read a small image of zeros."""
        config = self.network.config
        side = 2 ** len(config.block_out_channels)
        x_t = torch.zeros(1, self.channels, side, side, device=self.device, dtype=self.dtype)
        image = x_t.new_zeros(1, self.image_channels, side * self.factor, side * self.factor)
        self.network(x_t, 1, x_t.new_zeros(1, 4, config.cross_attention_dim), image, return_dict=False)

    def check_fits(self, unet: UNet, factor: int) -> None:
        """Raise ArgumentError unless the ControlNet was made for a U-Net like this one.

        Args:
            unet: The U-Net.
            factor: Pixels for each latent position, on each side, of the VAE.
        """
        own = {key: _plain(self.network.config[key]) for key in ALIKE}
        theirs = {key: _plain(unet.network.config[key]) for key in ALIKE}
        own |= {"latent channels": self.channels, "pixels for each latent": self.factor}
        theirs |= {"latent channels": unet.channels, "pixels for each latent": factor}
        if key := next((key for key in own if own[key] != theirs[key]), None):
            raise ArgumentError(
                f"this ControlNet belongs to another model: its {key} is {own[key]}, this model's {theirs[key]}; give "
                "one that was made for this model."
            )
        if self.image_channels != 3:
            raise ArgumentError(
                f"this ControlNet reads images of {self.image_channels} channels; sdkit gives it RGB images only."
            )

    @blames_network
    def forward(
        self,
        x_t: Tensor,
        t: int | Tensor,
        cond: Conditioning,
        image: Tensor,
        *,
        scale: float = 1.0,
        guess_mode: bool = False,
    ) -> Residuals:
        """Return what is added to the U-Net's skip connections and to its middle block.

        Args:
            x_t: Noised latents (B, 4, h, w).
            t: An integer or (B,).
            cond: The condition of B images. Only its text and the text's mask are used.
            image: (B, 3, factor * h, factor * w) in [0, 1].
            scale: Factor of the outputs.
            guess_mode: Weight the outputs from 0.1 at the finest level to 1 in the middle block, evenly in the
                logarithm, times `scale`: the ControlNet then guesses without a prompt.

        Raises:
            ArgumentError: `cond` is no `Conditioning`, or has no text.
        """
        check_condition(cond)
        if cond.text is None:
            raise ArgumentError("a ControlNet attends to text embeddings, and the condition has none.")
        x_t, image, text = (part.to(self.device, self.dtype) for part in (x_t, image, cond.text))
        with shared_timestep(isinstance(t, int)):
            t = timesteps_of(t, self.device)
            if cond.mask is None:
                return self._residuals(x_t, t, text, image, scale, guess_mode)
            return self._by_length(x_t, t, text, cond.mask.to(self.device), image, scale, guess_mode)

    def _residuals(
        self, x_t: Tensor, t: Tensor, text: Tensor, image: Tensor, scale: float, guess_mode: bool
    ) -> Residuals:
        down, mid = self.network(
            x_t, t, text, image, conditioning_scale=scale, guess_mode=guess_mode or self.pools, return_dict=False
        )
        return tuple(down), mid

    def _by_length(
        self, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor, image: Tensor, scale: float, guess_mode: bool
    ) -> Residuals:
        """Call the network once for each number of tokens: diffusers' has no mask for its cross-attention."""
        rows, parts = list[Tensor](), list[Residuals]()
        for some, tokens in of_equal_length(text, mask):
            parts.append(self._residuals(x_t[some], t.expand(len(x_t))[some], tokens, image[some], scale, guess_mode))
            rows.append(some)
        order = torch.cat(rows).argsort()
        downs = zip(*(down for down, _ in parts), strict=True)
        return tuple(torch.cat(down)[order] for down in downs), torch.cat([mid for _, mid in parts])[order]


def _plain(value: Any) -> Any:
    """Return a config's value in a form that compares equal: lists as tuples."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
