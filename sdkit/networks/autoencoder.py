"""The autoencoder of Stable Diffusion: images to latents of one eighth their size, and back.

Three representations, each with its own name:

- pixels: float, in [-1, 1], (B, 3, H, W);
- the posterior: raw `mean` and `logvar`, (B, 4, H/8, W/8);
- latents `z`: (raw - shift) * scale, where the scale makes their variance about 1 (Rombach et al. 2022,
  https://arxiv.org/abs/2112.10752, section 3.1 and appendix G).

Only this module converts between raw and scaled latents.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit import images as image_io
from sdkit.arguments import one_of, seeded, whole_number
from sdkit.engines.attention import quicken_attention
from sdkit.engines.compile import compile_modules
from sdkit.engines.device import memory_format, resolve_place
from sdkit.errors import ArgumentError, SdkitError, SourceError
from sdkit.images.convert import Images, OneImage
from sdkit.loading.fingerprint import fingerprint
from sdkit.loading.source import Source
from sdkit.loading.tensors import is_finite
from sdkit.networks.autoencoder_kinds import PixelIdentity, kind_of, nearest_codes, sampled
from sdkit.networks.tiling import check_tile, tiled, whole_image_statistics
from sdkit.networks.wrapper import Wrapper, blames_network
from sdkit.progress import progress

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

PIXELS_AT_ONCE = 4 * 512 * 512
"""Pixels in one pass through the network, if no `batch_size` is given. Activations take about 5 kB a pixel in
float32."""
TILED_FROM = 1536 * 1536
"""Images with more pixels than this are tiled by default."""


class Forward(NamedTuple):
    """A reconstruction and its posterior, as `VAE.forward` returns them.

    Attributes:
        pixels: The reconstruction (B, 3, H, W).
        mean: Mean of the posterior (B, 4, H/8, W/8). For a `VQModel`: the latents before quantization.
        logvar: Log-variance of the posterior, shaped like `mean`.
        codes: The codes that a `VQModel` decoded, shaped like `mean`, for the codebook loss; None for other kinds.
        numbers: The numbers of these codes (B, H/8, W/8); None for other kinds.
    """

    pixels: Tensor
    mean: Tensor
    logvar: Tensor
    codes: Tensor | None = None
    numbers: Tensor | None = None


class Autoencoder(Protocol):
    """Interface of an autoencoder, as the pipelines, the latent cache, and the training stages use it.

    `VAE` implements it for every kind of network: KL, VQ, tiny, and the pixel identity. See
    `sdkit.networks.autoencoder_kinds`.

    Attributes:
        name: The source that it came from.
        scale: Factor from raw to scaled latents.
        shift: Number that is subtracted from raw latents before they are scaled.
        channels: Channels of a latent.
        factor: Pixels that one latent position spans on each side.
        identity: Fingerprint of the encoder.
        device: The device that it computes on; its results are on the CPU.
        dtype: The dtype that it computes in; its results are float32.
    """

    name: str
    scale: float
    shift: float
    channels: int
    factor: int
    identity: str
    device: torch.device
    dtype: torch.dtype

    def moments(self, images: Images, *, batch_size: int | None = None, tile: int | None = None) -> Any:
        """Return mean and log-variance of the posterior; see `VAE.moments`."""

    def encode(
        self,
        images: Images,
        *,
        sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Return scaled latents; see `VAE.encode`."""

    def decode(
        self,
        z: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Return images; see `VAE.decode`."""

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError if a height or width in pixels is not a multiple of `factor`."""


class VAE(Wrapper):
    """An autoencoder: any image in, scaled latents out, and back.

    The network is diffusers' `AutoencoderKL`, `AutoencoderTiny`, or `VQModel`, or a `PixelIdentity`. This class reads
    and pads images, runs them in batches or tiles, and samples and scales latents. Results are on the CPU.

    Inference is thread-safe, except in float16: if an image overflows, the weights are float32 for a moment.

    Args:
        network: The network.
        name: The source that it came from, for messages.

    Attributes:
        network: The network.
        kind: The encoding and decoding of this class of network; see `sdkit.networks.autoencoder_kinds`.
        name: The source that it came from.
        scale: Factor from raw to scaled latents, from the network's config.
        shift: Number that is subtracted from raw latents before they are scaled, from the network's config.
        channels: Channels of a latent (4).
        factor: Pixels that one latent position spans on each side (8).
        identity: Fingerprint of the encoder when it was loaded. Latent files and caches name their VAE by it.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.

    Example:
        >>> import sdkit
        >>> vae = sdkit.VAE.from_pretrained("emoji", device="cpu")
        >>> vae.factor, vae.channels
        (8, 4)
        >>> from PIL import Image
        >>> (image,) = vae.reconstruct(Image.new("RGB", (100, 60), "teal"))
        >>> image.size
        (100, 60)
    """

    def __init__(self, network: AutoencoderKL | AutoencoderTiny | VQModel | PixelIdentity, *, name: str = "") -> None:
        """Wrap a network; `from_pretrained` loads one."""
        kind = kind_of(network)
        if kind is None:
            raise ArgumentError(
                f"a {type(network).__name__} is not a VAE: give an AutoencoderKL, an AutoencoderTiny or a VQModel."
            )
        super().__init__(network, name=name)
        self.kind = kind
        self.scale, self.shift, self.channels, self.factor = kind.scale, kind.shift, kind.channels, kind.factor
        self.identity = fingerprint(network, self.scale, self.shift)
        self._overflowed = False

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
    ) -> VAE:
        """Load a VAE.

        Args:
            source: Anything that `sdkit.StableDiffusion.from_pretrained` takes; or a VAE's own folder, file, or Hub
                repository.
            dtype: "auto", "fp32", "bf16", "fp16", or a torch.dtype. "auto" is bfloat16 if the hardware supports it,
                else float32.
            device: "auto", or a device of torch. "auto" is a CUDA GPU, else Apple's, else the CPU.
            revision: A branch, tag, or commit of a Hub repository.
            variant: The variant of the weights in a folder or Hub repository, such as "fp16".
            config: A folder or Hub id with the configs for a single file. None takes Stable Diffusion's public ones.
            compile: Run the network through torch.compile.

        Raises:
            SourceError: The source does not exist, is damaged, or holds no VAE.
        """
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config)
        return cls.from_source(opened, dtype=dtype, device=device, compile=compile)

    @classmethod
    def from_source(cls, source: Source, *, dtype: torch.dtype, device: torch.device, compile: bool = False) -> VAE:
        """Load a VAE from an opened `Source`."""
        # Load in float32: the identity must not depend on the dtype.
        vae = cls(source.autoencoder(torch.float32), name=source.name)
        vae.eval().to(device=device, dtype=dtype, memory_format=memory_format(dtype))  # type: ignore[call-overload]
        if not all(map(is_finite, vae.parameters())):
            raise SourceError(f"{vae._label} has weights that are too large for {dtype}; take dtype 'fp32'.")
        quicken_attention(vae.network, dtype, device)
        if compile:
            compile_modules(*vae.kind.compiled_parts, device=device)
        return vae

    @overload
    def encode(
        self,
        images: OneImage,
        *,
        sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        images: Images,
        *,
        sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor | list[Tensor]: ...

    def encode(
        self,
        images: Images,
        *,
        sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Encode images to scaled latents.

        Args:
            images: A PIL image, a path, a uint8 array (B, H, W, 3), a float tensor (B, 3, H, W) in [-1, 1], or a list
                of these. Any size: the right and lower edges are repeated up to a multiple of 8. Pass the
                original (height, width) to `decode` as `size` to crop the padding off.
            sample: Draw from the posterior. False takes its mean.
            generator: The source of the noise: one generator for all images, or a list of one for each. None is torch's
                global generator.
            seed: Seeds image i with `seed` + i, in place of `generator`.
            batch_size: Images in one pass. None chooses it by their size.
            tile: Side, in pixels, of overlapping tiles that are encoded one by one and blended. 0 turns tiling off.
                None tiles images of more than 2.3 megapixels.

        Returns:
            Latents (B, 4, H/8, W/8), float32, on the CPU; a list of (4, H/8, W/8) if the images differ in size.

        Raises:
            ImageError: An image cannot be read or is out of range.
            ArgumentError: Both `seed` and `generator` are given, or the number of generators is wrong.

        Example:
            >>> import sdkit
            >>> from PIL import Image
            >>> vae = sdkit.VAE.from_pretrained("emoji", device="cpu")
            >>> z = vae.encode(Image.new("RGB", (100, 60), "teal"), seed=0)
            >>> tuple(z.shape)
            (1, 4, 8, 13)
        """
        pixels = image_io.to_tensors(images)
        generators = _generators(len(pixels), generator, seed)
        means, logvars = self._moments(pixels, batch_size, tile)
        latents = []
        for mean, logvar, source in zip(means, logvars, generators, strict=True):
            draws = sample and not self.kind.is_point(logvar)
            place = source.device if source else None
            eps = torch.randn(mean.shape, generator=source, device=place).to(mean) if draws else None
            latents.append(latents_of(mean, logvar, eps, self.scale, self.shift))
        if not all(map(is_finite, latents)):
            raise SourceError(
                f"{self._label} gives latents that are not finite; its weights are to blame: give another."
            )
        return _stack(latents)

    @overload
    def moments(
        self, images: OneImage, *, batch_size: int | None = None, tile: int | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def moments(self, images: Images, *, batch_size: int | None = None, tile: int | None = None) -> Any: ...

    def moments(self, images: Images, *, batch_size: int | None = None, tile: int | None = None) -> Any:
        """Return mean and log-variance of the posterior of images, raw (not scaled).

        Args:
            images: As in `encode`.
            batch_size: As in `encode`.
            tile: As in `encode`.

        Returns:
            Two tensors (B, 4, H/8, W/8), float32, on the CPU; two lists of (4, H/8, W/8) if the images differ in size.
        """
        means, logvars = self._moments(image_io.to_tensors(images), batch_size, tile)
        return _stack(means), _stack(logvars)

    @overload
    def decode(
        self,
        z: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: Literal["pil"] = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> list[Image.Image]: ...

    @overload
    def decode(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        output_type: Literal["np"],
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def decode(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        output_type: Literal["pt"],
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor: ...

    @overload
    def decode(
        self,
        z: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any: ...

    def decode(
        self,
        z: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Decode scaled latents to images.

        Args:
            z: Latents (B, 4, h, w), (4, h, w), or a list of (4, h, w).
            size: (height, width) in pixels to crop to, one for all images or one for each. None keeps all of (8h, 8w).
            output_type: "pil", "np", or "pt".
            batch_size: Images in one pass. None chooses it by their size.
            tile: Side of tiles in pixels, as in `encode`.

        Returns:
            "pil": a list of PIL images. "np": uint8 (B, H, W, 3). "pt": float32 (B, 3, H, W), clamped to [-1, 1], on
            the CPU. The last two are lists if the images differ in size.

        Raises:
            ArgumentError: `z` is not latents of this VAE, or `size` is larger than the decoded image.

        Example:
            >>> import sdkit
            >>> import torch
            >>> vae = sdkit.VAE.from_pretrained("emoji", device="cpu")
            >>> z = torch.zeros(1, 4, 8, 13)
            >>> (image,) = vae.decode(z, size=(60, 100))
            >>> image.size
            (100, 60)
            >>> tuple(vae.decode(z, output_type="pt").shape)
            (1, 3, 64, 104)
        """
        one_of("output_type", output_type, image_io.OUTPUT_TYPES)
        latents = self._latents(z)
        sizes = self._sizes(size, latents)
        raw = [self._raw(latent) for latent in latents]
        if self.codebook is not None:
            raw = [self._rounded(one)[0] for one in raw]
        return self._decoded_images(raw, sizes, output_type, batch_size, tile)

    @overload
    def codes(self, images: OneImage, *, batch_size: int | None = None, tile: int | None = None) -> Tensor: ...

    @overload
    def codes(
        self, images: Images, *, batch_size: int | None = None, tile: int | None = None
    ) -> Tensor | list[Tensor]: ...

    def codes(self, images: Images, *, batch_size: int | None = None, tile: int | None = None) -> Tensor | list[Tensor]:
        """Encode images to codes of a `VQModel`: the number of the nearest code at each latent position.

        Args:
            images: As in `encode`.
            batch_size: As in `encode`.
            tile: As in `encode`.

        Returns:
            Numbers from 0 to N - 1 of a codebook of N codes: (B, H/8, W/8), int64, on the CPU; a list of (H/8, W/8) if
            the images differ in size.

        Raises:
            ArgumentError: This VAE has no codebook.
            ImageError: An image cannot be read or is out of range.
        """
        self._require_codebook()
        z = self.encode(images, sample=False, batch_size=batch_size, tile=tile)
        return _stack([self._rounded(self._raw(latent))[1] for latent in z])

    @overload
    def decode_codes(
        self,
        codes: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: Literal["pil"] = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> list[Image.Image]: ...

    @overload
    def decode_codes(
        self,
        codes: Tensor,
        *,
        size: tuple[int, int] | None = None,
        output_type: Literal["np"],
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def decode_codes(
        self,
        codes: Tensor,
        *,
        size: tuple[int, int] | None = None,
        output_type: Literal["pt"],
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor: ...

    @overload
    def decode_codes(
        self,
        codes: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any: ...

    def decode_codes(
        self,
        codes: Tensor | Sequence[Tensor],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Decode codes of a `VQModel` to images. Codes of `codes` give bit-identical images to `reconstruct`.

        Args:
            codes: Numbers of codes, of any integer dtype: (B, h, w), (h, w), or a list of (h, w).
            size: As in `decode`.
            output_type: As in `decode`.
            batch_size: As in `decode`.
            tile: As in `decode`.

        Returns:
            Images, as `decode` returns them.

        Raises:
            ArgumentError: This VAE has no codebook, `codes` is not codes of it, or `size` is larger than the decoded
                image.
        """
        one_of("output_type", output_type, image_io.OUTPUT_TYPES)
        codebook = self._require_codebook().detach().float().cpu()
        raw = [codebook[numbers].movedim(-1, 0) for numbers in _numbers_of_codes(codes, len(codebook))]
        return self._decoded_images(raw, self._sizes(size, raw), output_type, batch_size, tile)

    @overload
    def reconstruct(
        self,
        images: Images,
        *,
        output_type: Literal["pil"] = "pil",
        sample: bool = False,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> list[Image.Image]: ...

    @overload
    def reconstruct(
        self,
        images: OneImage,
        *,
        output_type: Literal["np"],
        sample: bool = False,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def reconstruct(
        self,
        images: OneImage,
        *,
        output_type: Literal["pt"],
        sample: bool = False,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Tensor: ...

    @overload
    def reconstruct(
        self,
        images: Images,
        *,
        output_type: str = "pil",
        sample: bool = False,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any: ...

    def reconstruct(
        self,
        images: Images,
        *,
        output_type: str = "pil",
        sample: bool = False,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Encode and decode images, each at its own size, to see what the autoencoder preserves.

        Args:
            images: As in `encode`.
            output_type: As in `decode`.
            sample: Draw from the posterior. False, unlike in `encode`, takes its mean.
            seed: Seeds image i with `seed` + i.
            batch_size: As in `encode`.
            tile: As in `encode`.

        Returns:
            Images, as `decode` returns them.
        """
        pixels = image_io.to_tensors(images)
        sizes = [(x.shape[1], x.shape[2]) for x in pixels]
        z = self.encode(pixels, sample=sample, seed=seed, batch_size=batch_size, tile=tile)
        return self.decode(z, size=sizes, output_type=output_type, batch_size=batch_size, tile=tile)

    def try_out(self) -> None:
        """Encode a grey image, and decode latents of zeros."""
        side = 4 * self.factor
        self.kind.posterior(torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype))
        self._run_decoder(self._black())

    def _black(self) -> Tensor:
        """Return raw latents of zeros, which are valid for every decoder."""
        return torch.zeros(1, self.channels, 4, 4)

    @property
    def _label(self) -> str:
        return f"the VAE of {self.name!r}" if self.name else "this VAE"

    @torch.inference_mode()
    def _overflow(self) -> SdkitError:
        """Return the error for decoded images that are not finite: a SourceError (the VAE is to blame) if latents of
        zeros fail, too; else an ArgumentError (the latents are)."""
        if is_finite(self._decode(self._black())):
            return ArgumentError(f"{self._label} overflows for these latents; they are far from any that it encodes.")
        return SourceError(f"{self._label} gives images that are not finite; its weights are to blame: give another.")

    @blames_network
    def forward(self, x: Tensor, eps: Tensor | None = None, noise: Tensor | None = None) -> Forward:
        """Reconstruct pixels with gradient, for training.

        Args:
            x: Pixels (B, 3, H, W) in [-1, 1]; H and W are multiples of 8.
            eps: Standard normal noise (B, 4, H/8, W/8), for a sample of the posterior. None takes the mean.
            noise: Noise (B, 4, H/8, W/8) to add to the scaled latents that are decoded.

        Returns:
            The reconstruction, the posterior, and a `VQModel`'s codes. The reconstruction's gradient bypasses the
            quantization and reaches `mean`; the gradient of the codes reaches the codebook.
        """
        mean, logvar = self.posterior(x)
        centre = mean if noise is None else mean + noise / self.scale
        pixels, codes, numbers = self.kind.reconstruct(centre, logvar, eps, self.dtype)
        return Forward(pixels, mean, logvar, codes, numbers)

    @property
    def codebook(self) -> Tensor | None:
        """The codes (N, C) that a `VQModel` rounds its latents to; None for other kinds."""
        return self.kind.codebook

    def quantize(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Round raw latents (B, C, h, w) to codes. Return the codes, shaped like `raw`, and their indices (B, h, w)."""
        return nearest_codes(self._require_codebook(), raw)

    def _require_codebook(self) -> Tensor:
        if self.codebook is None:
            raise ArgumentError(f"{self.name or 'this VAE'} has no codebook; that is what a VQModel has.")
        return self.codebook

    def _raw(self, latent: Tensor) -> Tensor:
        return latent / self.scale + self.shift

    @torch.no_grad()
    def _rounded(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Round the raw latents (C, h, w) of one image to codes. Return the codes and their numbers (h, w).

        Images are rounded one by one: a near tie between two codes must not depend on the batch or the tile.
        """
        codes, numbers = self.quantize(raw[None])
        return codes[0].cpu(), numbers[0].cpu()

    @blames_network
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the posterior with gradient, for training.

        Args:
            x: Pixels (B, 3, H, W) in [-1, 1]; H and W are multiples of 8.

        Returns:
            Raw mean and log-variance, each (B, 4, H/8, W/8), float32.
        """
        return self.kind.posterior(x.to(self.device, self.dtype))

    @blames_network
    def pixels(self, z: Tensor) -> Tensor:
        """Decode scaled latents with gradient, for guidance by what an image looks like (`sdkit.guidance.energy`).

        Args:
            z: Scaled latents (B, 4, h, w), as `encode` returns them.

        Returns:
            Pixels (B, 3, 8h, 8w), float32. Unlike those of `decode`, they are not clamped to [-1, 1], where the
            gradient would vanish.

        Raises:
            ArgumentError: The latents are of another shape.
        """
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != self.channels:
            raise ArgumentError(f"latents must be a tensor (B, {self.channels}, h, w), not {shape}.")
        return self.kind.decode(self._raw(z).to(self.device, self.dtype))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError for a (height, width) in pixels that `forward` and `posterior` do not take."""
        if any(side % self.factor for side in size):
            raise ArgumentError(
                f"size {size[0]} x {size[1]} does not divide by {self.factor}, as this VAE needs; change it."
            )

    def _moments(
        self, pixels: list[Tensor], batch_size: int | None, tile: int | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        # Views of one image, such as the rows of an expanded tensor, are encoded once.
        views = [(x.data_ptr(), x.shape, x.stride(), x.device) for x in pixels]
        distinct = dict(zip(views, pixels, strict=True))
        padded = [self._pad(x) for x in distinct.values()]
        encoded = self._each(self._encode_finite, padded, batch_size, tile, self.factor, 1, "encode")
        moments = dict(zip(distinct, encoded, strict=True))
        means, logvars = zip(*(moments[view].chunk(2) for view in views), strict=True)
        return list(means), list(logvars)

    def _pad(self, x: Tensor) -> Tensor:
        """Repeat the lower and right edges of (3, H, W) up to a multiple of `factor`."""
        height, width = x.shape[1:]
        return F.pad(x[None], (0, -width % self.factor, 0, -height % self.factor), mode="replicate")[0]

    def _each(
        self,
        run: Callable[[Tensor], Tensor],
        items: Sequence[Tensor],
        batch_size: int | None,
        tile: int | None,
        down: int,
        up: int,
        name: str,
    ) -> list[Tensor]:
        """Return `run(item)` for each item (C, H, W), computed in batches; other parameters are as in `_tiled`."""
        results = [torch.empty(0)] * len(items)
        for chosen in progress(list(self._batches(items, batch_size, up**2)), description=name):
            batch = self._tiled(run, torch.stack([items[i] for i in chosen]), tile, down, up)
            for i, result in zip(chosen, batch, strict=True):
                results[i] = result.clone()  # autograd refuses tensors that were made in inference mode
        return results

    def _batches(self, items: Sequence[Tensor], batch_size: int | None, area: int) -> Iterator[list[int]]:
        """Yield the indices of each batch: items of one shape, `batch_size` or as many as `PIXELS_AT_ONCE` allows."""
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size, 1)
        # A CPU is no faster with batches, and in half precision the result visibly depends on the size of the batch.
        one_by_one = self.device.type == "cpu" and self.dtype != torch.float32
        shapes: dict[torch.Size, list[int]] = {}
        for i, item in enumerate(items):
            shapes.setdefault(item.shape, []).append(i)
        for shape, indices in shapes.items():
            n = batch_size or (1 if one_by_one else max(1, PIXELS_AT_ONCE // (shape[1] * shape[2] * area)))
            yield from (indices[i : i + n] for i in range(0, len(indices), n))

    @torch.inference_mode()
    def _tiled(self, run: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, down: int, up: int) -> Tensor:
        """Return `run(x)` for x (B, C, H, W), computed whole or in tiles.

        `tile` is in pixels. x is in pixels (`down` = 8, `up` = 1) or latents (`down` = 1, `up` = 8).
        """
        if tile is None:
            tile = 1024 if x.shape[2] * x.shape[3] * up**2 > TILED_FROM else 0
        if tile == 0:
            return run(x).float().cpu()
        check_tile(tile, self.factor)
        side = tile // self.factor * down
        with whole_image_statistics(self.network, run, x, side):
            return tiled(run, x, tile=side, down=down, up=up)

    def _decoded_images(
        self,
        raw: list[Tensor],
        sizes: list[tuple[int, int]],
        output_type: str,
        batch_size: int | None,
        tile: int | None,
    ) -> Any:
        """Decode raw latents or codes (C, h, w), and crop each image to its size (height, width) in pixels."""
        decoded = self._each(self._decode, raw, batch_size, tile, 1, self.factor, "decode")
        if not all(map(is_finite, decoded)):
            raise self._overflow()
        cropped = [x.clamp(-1, 1)[:, :height, :width] for x, (height, width) in zip(decoded, sizes, strict=True)]
        return image_io.from_tensors(cropped, output_type)

    @blames_network
    def _run_decoder(self, raw: Tensor) -> Tensor:
        return self.kind.decode(raw.to(self.device, self.dtype))

    def _encode_finite(self, x: Tensor) -> Tensor:
        return self._finite(lambda x: torch.cat(self.posterior(x), dim=1), x)

    def _decode(self, raw: Tensor) -> Tensor:
        return self._finite(self._run_decoder, raw)

    def _finite(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `run(x)`. Images that overflow float16 (SD's activations exceed 65,504) are recomputed in float32."""
        y = run(x)
        if self.dtype != torch.float16:
            return y
        bad = ~torch.isfinite(y).flatten(1).all(dim=1)
        if bool(bad.any()):
            if not self._overflowed:
                warnings.warn(
                    "the VAE overflowed in float16; the images concerned are computed again in float32.", stacklevel=2
                )
                self._overflowed = True
            try:
                self._convert(torch.float32)
                y[bad] = run(x)[bad]  # the whole batch, whose statistics a tile's group norms hold
            finally:
                self._convert(torch.float16)  # exact: the float32 weights came from float16
        return y

    def _convert(self, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # weights that were made in inference mode could not be trained
            self.to(dtype)

    def _latents(self, z: Any) -> list[Tensor]:
        if isinstance(z, Tensor) and z.ndim in (0, 3):
            z = [z]
        if not isinstance(z, (Tensor, list, tuple)) or len(z) == 0:
            raise ArgumentError(
                "latents must be a tensor (B, 4, h, w) or a list of tensors (4, h, w), of at least one image."
            )
        for latent in z:
            shape = tuple(latent.shape) if isinstance(latent, Tensor) else type(latent).__name__
            if not isinstance(latent, Tensor) or latent.ndim != 3 or len(latent) != self.channels or not latent.numel():
                raise ArgumentError(f"a latent of this VAE is a tensor ({self.channels}, h, w), not {shape}.")
            if not latent.is_floating_point() or not bool(torch.isfinite(latent).all()):
                raise ArgumentError("latents must be finite floating-point numbers.")
        return [latent.detach().float() for latent in z]

    def _sizes(self, size: Any, latents: list[Tensor]) -> list[tuple[int, int]]:
        full = [(x.shape[1] * self.factor, x.shape[2] * self.factor) for x in latents]
        if size is None:
            return full
        try:
            pairs = size if any(isinstance(one, Sequence) for one in size) else [size] * len(latents)
            sizes = [(operator.index(height), operator.index(width)) for height, width in pairs]
            fits = all(0 < h <= H and 0 < w <= W for (h, w), (H, W) in zip(sizes, full, strict=True))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ArgumentError(
                "size must be (height, width) within the decoded image, one for all or one for each of "
                f"{len(latents)}, not {size}."
            )
        return sizes


def latents_of(mean: Tensor, logvar: Tensor, eps: Tensor | None, scale: float, shift: float) -> Tensor:
    """Return the scaled latents of a raw posterior: its sample by `eps`, or its mean.

    Args:
        mean: (B, C, h, w).
        logvar: Shaped like `mean`.
        eps: Standard normal noise, for a sample of the posterior. None takes the mean.
        scale: The autoencoder's `scale`.
        shift: The autoencoder's `shift`.
    """
    return (sampled(mean, logvar, eps) - shift) * scale


def _numbers_of_codes(codes: Any, size: int) -> list[Tensor]:
    """Return the codes of each image (h, w), int64, on the CPU. Raise ArgumentError for what is not codes.

    Args:
        codes: What `VAE.decode_codes` was given.
        size: Number of codes in the codebook.
    """
    if isinstance(codes, Tensor) and codes.ndim in (0, 2):
        codes = [codes]
    if not isinstance(codes, (Tensor, list, tuple)) or len(codes) == 0:
        raise ArgumentError("codes must be a tensor (B, h, w) or a list of tensors (h, w), of at least one image.")
    for one in codes:
        shape = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        if not isinstance(one, Tensor) or one.ndim != 2 or not one.numel():
            raise ArgumentError(f"the codes of an image are a tensor (h, w), not {shape}.")
        if one.dtype.is_floating_point or one.dtype.is_complex or one.dtype == torch.bool:
            raise ArgumentError(f"codes must be whole numbers, such as torch.int64, not {one.dtype}.")
        lowest, highest = (int(bound) for bound in one.long().aminmax())
        if lowest < 0 or highest >= size:
            raise ArgumentError(
                f"the codes of this VAE are numbers from 0 to {size - 1}, not {lowest if lowest < 0 else highest}."
            )
    return [one.detach().long().cpu() for one in codes]


def _generators(n: int, generator: Any, seed: int | None) -> list[torch.Generator | None]:
    """Return the generator of each of n images; None stands for torch's global generator."""
    if seed is not None and generator is not None:
        raise ArgumentError("the noise comes from a seed or from generators: give one of the two.")
    if seed is not None:
        return list(seeded(seed, n))
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * n
    if len(generators) != n:
        raise ArgumentError(f"{len(generators)} generators cannot serve {n} images: give one, or one for each.")
    if not all(one is None or isinstance(one, torch.Generator) for one in generators):
        raise ArgumentError("generator must be a torch.Generator, or a list of one for each image.")
    return generators


def _stack(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    """Stack tensors if all have the same shape; otherwise return the list."""
    return torch.stack(tensors) if len({x.shape for x in tensors}) == 1 else tensors
