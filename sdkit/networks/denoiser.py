"""The denoising U-Net of Stable Diffusion. Its output is in the model's own parameterisation: eps, v, or x0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.diffusion.conditioning import Conditioning, check_condition
from sdkit.engines.attention import quicken_attention
from sdkit.engines.compile import compile_modules, eager
from sdkit.engines.device import memory_format, resolve_place
from sdkit.errors import ArgumentError
from sdkit.loading.configs import LOW_RES, UPSCALE
from sdkit.loading.source import Source, condition_of, latent_channels
from sdkit.networks.shared_timestep import embed_timestep_once, shared_timestep, timesteps_of
from sdkit.networks.text_lengths import padded, pool_without_padding
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class UNet(Wrapper):
    """A `UNet2DConditionModel` that takes a `Conditioning`. Its output has the dtype of its input.

    A `UNet2DModel` serves, too: it takes no text, but class labels, or nothing.

    Args:
        network: The network.

    Attributes:
        network: The network.
        name: The source that it came from.
        channels: Channels of the latents that it denoises (4).
        input_channels: Channels of its input: those of the latents, and those of `Conditioning.concat`.
        width: D, the width of the text embeddings it attends to; 0 if it takes no text.
        takes_labels: Whether it takes class labels in place of text.
        sample_size: Side of the latents it was trained on.
        condition: Kind of the condition that it takes beside x_t: "latents" of an image (the posterior's mean, not
            scaled), "map", an image's colours in [-1, 1] at the size of the latents, or "low_res", an image to enlarge
            (see `noised_low_res`), with `Conditioning.label` its noise level; None if it takes none.
        upscale_factor: For "low_res": how many times larger its images are than those that it reads; None is the
            factor of the VAE.
        inpaints: Whether it was trained to paint into images: its input is then x_t, a mask (one channel), and the
            latents of the image without the masked part.
        guided: Whether it takes the guidance scale as an input and needs no second pass, as latent consistency models
            do.
        run: An engine that computes in the network's place, with its arguments and its result; None is the network.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.
    """

    def __init__(self, network: UNet2DConditionModel) -> None:
        """Wrap a network; `from_pretrained` loads one."""
        super().__init__(network)
        config: Any = network.config
        self.channels, self.input_channels = latent_channels(config), int(config.in_channels)
        self.width = _one(getattr(config, "cross_attention_dim", 0))
        self.takes_labels = not self.width and getattr(network, "class_embedding", None) is not None
        self.sample_size = _one(config.sample_size or 64)
        self.condition = condition_of(config)
        self.upscale_factor: int | None = config.get(UPSCALE)
        self.inpaints = self.condition is None and self.input_channels == 2 * self.channels + 1
        self.guided = getattr(config, "time_cond_proj_dim", None) is not None
        self.run: Callable[..., Any] | None = None
        embed_timestep_once(network)
        if config.get("addition_embed_type") == "text":
            pool_without_padding(network.add_embedding)
        if self.takes_labels and config.class_embed_type == "timestep":
            network.class_embedding.register_forward_pre_hook(_as_weights)  # diffusers leaves sinusoids in float32

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
        compile: bool = False,
    ) -> UNet:
        """Load a U-Net. Arguments and errors are those of `sdkit.VAE.from_pretrained`."""
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config)
        return cls.from_source(opened, dtype=dtype, device=device, compile=compile)

    @classmethod
    def from_source(cls, source: Source, *, dtype: torch.dtype, device: torch.device, compile: bool = False) -> UNet:
        """Load a U-Net from an opened `Source`."""
        unet = cls(source.denoiser(dtype, inpainting=True, conditioned=True))
        unet.name = source.name
        # On a CPU, channels_last slows the group norms of small feature maps by more than it speeds up convolutions.
        small = device.type == "cpu" and unet.sample_size < 32
        layout = torch.contiguous_format if small else memory_format(dtype)
        unet.eval().to(device=device, memory_format=layout)  # type: ignore[call-overload]
        quicken_attention(unet.network, dtype, device)
        if compile:
            compile_modules(unet.network, device=device)
        return unet

    def try_out(self) -> None:
        """Denoise small latents of zeros."""
        side = 2 ** len(self.network.config.block_out_channels)
        x_t = torch.zeros(1, self.input_channels, side, side, device=self.device, dtype=self.dtype)
        inputs = (x_t.new_zeros(1, 4, self.width),) if self.width else ()
        self.network(x_t, 1, *inputs, class_labels=self._blank_label(x_t), return_dict=False)

    @blames_network
    def forward(
        self,
        x_t: Tensor,
        t: int | Tensor,
        cond: Conditioning,
        *,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Return the model's output: eps, v, or x0, whichever it was trained to predict.

        Args:
            x_t: (B, 4, h, w). `cond.concat` is appended to its channels.
            t: An integer or (B,).
            cond: The condition of B images; its text is (B, L, D) from `TextEncoder.encode`.
            guidance_scale: A number or (B,); only for a network that is `guided`.

        Returns:
            A tensor shaped like x_t, or with twice its channels where the model learned its variance, in x_t's dtype.

        Raises:
            ArgumentError: `cond` is no `Conditioning`, or does not fit the network or x_t; or the guidance scale is
                given to a network that has no input for it, or missing for one that has.
        """
        self._check_fit(cond, len(x_t))
        if self.guided != (guidance_scale is not None):
            problem = "takes the guidance scale as an input" if self.guided else "has no input for the guidance scale"
            raise ArgumentError(f"this U-Net {problem}: {'give' if self.guided else 'leave out'} guidance_scale.")
        sample = x_t.to(self.device, self.dtype)
        cond = cond.map(self._received)
        if cond.concat is not None:
            sample = torch.cat([sample, cond.concat], dim=1)
        run = self.network if self.run is None else self.run
        told: dict[str, Any] = {"class_labels": cond.label}
        if self.width:  # a UNet2DModel takes labels alone
            down, mid = (None, None) if cond.residuals is None else cond.residuals
            told |= {
                "encoder_hidden_states": cond.text,
                "encoder_attention_mask": cond.mask,
                "timestep_cond": None if guidance_scale is None else self._guidance(guidance_scale),
                "added_cond_kwargs": cond.added,
                "down_block_additional_residuals": down,
                "mid_block_additional_residual": mid,
            }
        with shared_timestep(isinstance(t, int)), padded(cond.mask):
            output: Tensor = run(sample, timesteps_of(t, self.device), return_dict=False, **told)[0]
        return output.to(x_t)

    def check_runs(self, what: str) -> None:
        """Raise ArgumentError for `what` works on the network itself, where an engine computes in its place."""
        if self.run is not None:
            raise ArgumentError(f"{what} works on the U-Net's network, and an engine runs in its place; take it out.")

    def _check_fit(self, cond: Conditioning, batch_size: int) -> None:
        """Raise ArgumentError unless the network can use every part of a condition of `batch_size` images."""
        check_condition(cond)
        if not self.width:
            self._check_fits_without_text(cond, batch_size)
            return
        if cond.text is None or cond.text.ndim != 3 or cond.text.shape[2] != self.width:
            given = "none" if cond.text is None else f"of shape {tuple(cond.text.shape)}"
            raise ArgumentError(
                f"this U-Net attends to text embeddings (B, L, {self.width}); the condition's are {given}."
            )
        if len(cond) != batch_size:
            raise ArgumentError(f"a condition of {len(cond)} images does not fit x_t of {batch_size}.")
        self._check_beside(cond)
        self._check_label(cond.label)

    def _check_fits_without_text(self, cond: Conditioning, batch_size: int) -> None:
        """Raise ArgumentError unless a network that takes no text can use every part of a condition."""
        for part in ("text", "mask", "residuals", "added"):
            if getattr(cond, part) is not None:
                raise ArgumentError(f"this U-Net takes no text; leave `{part}` out of the condition.")
        if self.takes_labels != (cond.label is not None):
            verb, rest = ("takes class labels", "give") if self.takes_labels else ("takes no class labels", "leave out")
            raise ArgumentError(f"this U-Net {verb}: {rest} `label` in the condition.")
        if len(cond) not in (batch_size, *([] if self.takes_labels else [0])):
            raise ArgumentError(f"a condition of {len(cond)} images does not fit x_t of {batch_size}.")
        if cond.label is not None and cond.label.device.type == "cpu":  # on a GPU this would synchronise
            self._check_labels(cond.label)
        self._check_beside(cond)

    def _check_labels(self, label: Tensor) -> None:
        """Raise ArgumentError unless the network has all these labels (B,)."""
        count = self.network.config.num_class_embeds
        if count is not None and bool(((label < 0) | (label >= count)).any()):
            raise ArgumentError(f"class labels of this U-Net are from 0 to {count - 1}, not {label.tolist()}.")

    def _check_beside(self, cond: Conditioning) -> None:
        """Raise ArgumentError unless the condition's `concat` has the channels that the network takes beside x_t."""
        beside = 0 if cond.concat is None else cond.concat.shape[1]
        if beside != (wanted := self.input_channels - self.channels):
            raise ArgumentError(
                f"this U-Net takes {wanted} channels beside x_t; the condition's `concat` has {beside}."
            )

    def _check_label(self, label: Tensor | None) -> None:
        """Raise ArgumentError unless a network of text takes a label, or none, as it is given."""
        if label is not None and getattr(self.network, "class_embedding", None) is None:
            raise ArgumentError("this U-Net takes no class labels; leave `label` out of the condition.")
        if label is None and self._takes_vectors:
            raise ArgumentError("this U-Net takes the embedding of an image as `label`; draw with sdkit.UnCLIP.")
        if label is None and self.condition == LOW_RES:
            raise ArgumentError("this U-Net takes the noise level of the image to enlarge; give it as `label`.")

    @property
    def _takes_vectors(self) -> bool:
        """Whether the label is a vector, such as CLIP's embedding of an image."""
        return bool(self.network.config.class_embed_type == "projection")

    def _blank_label(self, x_t: Tensor) -> Tensor | None:
        """Return a label (1,) or (1, D) of zeros, or None if the network takes none."""
        if self.takes_labels or self.condition == LOW_RES:
            return x_t.new_zeros(1, dtype=torch.long)
        return (
            x_t.new_zeros(1, self.network.config.projection_class_embeddings_input_dim) if self._takes_vectors else None
        )

    def _received(self, part: Tensor) -> Tensor:
        """Move a part of the condition to the network's device. Cast it if it is floating-point."""
        return part.to(self.device, self.dtype) if part.is_floating_point() else part.to(self.device)

    def _guidance(self, scale: float | Tensor) -> Tensor:
        """Embed a guidance scale: a number as (1, W), (B,) as (B, W)."""
        width = self.network.config.time_cond_proj_dim
        if isinstance(scale, Tensor):
            return guidance_embedding(scale.reshape(-1), width).to(self.device, self.dtype)
        return _number_embedding(float(scale), width, self.device, self.dtype)

    @torch.no_grad()
    def cross_attention(
        self, x_t: Tensor, t: int | Tensor, cond: Conditioning, *, guidance_scale: float | Tensor | None = None
    ) -> Tensor:
        """Return the attention that each position pays to each token of the prompt.

        This is the mean over heads and layers, as in DAAM (Tang et al. 2022, https://arxiv.org/abs/2210.04885). Smaller
        maps are upsampled.

        Args:
            x_t: As in `forward`.
            t: As in `forward`.
            cond: As in `forward`.
            guidance_scale: As in `forward`.

        Returns:
            (B, L, h, w) float32. At each position, the values of the L tokens add up to 1.
        """
        self.check_runs("cross-attention")
        if not self.width:
            raise ArgumentError("this U-Net takes no text, and attends to no words.")
        height, width = x_t.shape[2:]
        maps: list[Tensor] = []

        def look(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, context = args[0], kwargs["encoder_hidden_states"]
            q, k = (attn.head_to_batch_dim(y).float() for y in (attn.to_q(x), attn.to_k(context)))
            shares = (q @ k.transpose(1, 2) * attn.scale).softmax(dim=-1)  # (B * heads, h w, L)
            mean = shares.unflatten(0, (len(x), -1)).mean(1).transpose(1, 2)  # (B, L, h w)
            coarse = mean.unflatten(2, _sides(mean.shape[2], height, width))
            maps.append(F.interpolate(coarse, (height, width), mode="bilinear"))

        with ExitStack() as hooks:
            hooks.enter_context(eager())
            for name, layer in self.network.named_modules():
                if name.endswith(".attn2"):
                    hooks.enter_context(layer.register_forward_pre_hook(look, with_kwargs=True))
            self(x_t, t, cond, guidance_scale=guidance_scale)
        return torch.stack(maps).mean(0)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Embed guidance scales as sinusoids of w = scale - 1 (Luo et al. 2023, https://arxiv.org/abs/2310.04378, section
    4.2; Meng et al. 2023, https://arxiv.org/abs/2210.03142).

    Computed in float32, as in training: the angles are so large that in other precisions their sines differ.

    Args:
        scale: (B,).
        width: Width of the embedding.

    Returns:
        (B, width).
    """
    w = (scale.detach().cpu().double() - 1).float() * 1000
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = w[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


@lru_cache(maxsize=8)
def _number_embedding(scale: float, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `guidance_embedding` (1, width) of a number, on a device. Every step of a sampler has the same number, and
    a copy to a GPU in each step would synchronise with it."""
    with torch.inference_mode(False):  # a cached tensor must also serve callers that need gradients
        return guidance_embedding(torch.tensor([scale]), width).to(device, dtype)


def _as_weights(network: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Return the input of an embedding in the dtype of its weights."""
    return (inputs[0].to(network.linear_1.weight.dtype),)


def _sides(area: int, height: int, width: int) -> tuple[int, int]:
    """Return height and width of a feature map with `area` positions: those of the latents, halved and rounded up
    as often as it takes."""
    while height * width > area:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _one(value: Any) -> int:
    """Return a config's number, or the first one if the config repeats it for each side or block."""
    return int(value[0] if isinstance(value, (list, tuple)) else value)
