"""The variational autoencoder of Stable Diffusion: images to latents one eighth their size, and back.

Three representations, each with its own name: pixels, float in [-1, 1], (B, 3, H, W); the posterior's raw `mean` and
`logvar`, (B, 4, H/8, W/8); and latents `z`, which are z_raw * scale (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752, section 3.1 and appendix G: the scale makes their variance about 1). Only this module
multiplies and divides by the scale.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit import images as image_io
from sdkit.arguments import one_of, seeded, whole_number
from sdkit.engines.attention import quicken_attention
from sdkit.engines.compile import compile_modules
from sdkit.engines.device import memory_format, resolve_place
from sdkit.errors import ArgumentError, SdkitError, SourceError
from sdkit.images import Images
from sdkit.loading.fingerprint import fingerprint
from sdkit.loading.source import Source
from sdkit.loading.tensors import is_finite
from sdkit.networks.autoencoder_kinds import PixelIdentity, kind_of, nearest_codes, sampled
from sdkit.networks.tiling import tiled, whole_image_statistics
from sdkit.networks.wrapper import Wrapper, blames_network
from sdkit.progress import progress

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

PIXELS_AT_ONCE = 4 * 512 * 512
"""Pixels that go through the network in one pass where no `batch_size` is given: activations take about 5 kB a pixel in
float32."""
TILED_FROM = 1536 * 1536
"""Pixels of an image from which it is tiled by default."""


class Forward(NamedTuple):
    """What `VAE.forward` returns.

    Attributes:
        pixels: The reconstruction (B, 3, H, W).
        mean: Of the posterior (B, 4, H/8, W/8), or a VQModel's latents before they are rounded to codes.
        logvar: Of the posterior, likewise.
        codes: A VQModel's, likewise, which its codebook learns by.
    """

    pixels: Tensor
    mean: Tensor
    logvar: Tensor
    codes: Tensor | None = None


class Autoencoder(Protocol):
    """Images to scaled latents and back, as the pipelines, the latent cache, and the stages use it.

    `VAE` implements it around every kind of network: KL, VQ, tiny, and the pixel identity. See
    `sdkit.networks.autoencoder_kinds`.

    Attributes:
        name: The source that it came from.
        scale: Factor from raw to scaled latents.
        shift: Number that is subtracted from raw latents before they are scaled.
        channels: Channels of a latent.
        factor: Pixels that one latent position spans on each side.
        identity: Fingerprint of the side that makes latents.
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
    ) -> Any:
        """Return scaled latents; see `VAE.encode`."""

    def decode(
        self,
        z: Any,
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Return images; see `VAE.decode`."""

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError for a (height, width) in pixels that does not divide by `factor`."""


class VAE(Wrapper):
    """An `AutoencoderKL`, or `AutoencoderTiny` or `VQModel`, with the process around it: any image in, scaled latents
    out, and back.

    One may be used by several threads, in inference (by one in float16, whose overflows are done again in float32); its
    tensors come back on the CPU.

    Attributes: `network`, diffusers' own module; `scale` and `shift`, from its config; `factor`, pixels a latent spans
        on each side (8); `channels` of a latent (4); `identity`, a fingerprint of the encoder, by which latent files
        know their VAE, taken when it was loaded; `name`, where it came from.
    """

    def __init__(self, network: AutoencoderKL | AutoencoderTiny | VQModel | PixelIdentity, *, name: str = "") -> None:
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
        """Load a VAE from any source that `sdkit.StableDiffusion.from_pretrained` takes, or a VAE's own folder, file or
        Hub repository.

        `dtype` "auto" is bfloat16 where the hardware multiplies it, else float32; `compile` runs it through
        torch.compile. Raises SourceError where the source cannot be found or holds no VAE.
        """
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config)
        return cls.from_source(opened, dtype=dtype, device=device, compile=compile)

    @classmethod
    def from_source(cls, source: Source, *, dtype: torch.dtype, device: torch.device, compile: bool = False) -> VAE:
        """Load a VAE from an open source; `dtype` and `device` are resolved already."""
        # Loaded in float32, so that the identity does not depend on the dtype asked for.
        vae = cls(source.autoencoder(torch.float32), name=source.name)
        vae.eval().to(device=device, dtype=dtype, memory_format=memory_format(dtype))  # type: ignore[call-overload]
        if not all(map(is_finite, vae.parameters())):
            raise SourceError(f"{vae._label} has weights that are too large for {dtype}; take dtype 'fp32'.")
        quicken_attention(vae.network, dtype, device)
        if compile:
            compile_modules(vae.network.encoder, vae.network.decoder)
        return vae

    def encode(
        self,
        images: Images,
        *,
        sample: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Scaled latents of images: (B, 4, H/8, W/8) float32; a list of (4, H/8, W/8) where the images differ in size.

        images: a PIL image, a path, a uint8 array (B, H, W, 3), a float tensor (B, 3, H, W) in [-1, 1], or a list of
            such. Any size: the right and lower edges are repeated up to a multiple of 8 (hand `size` to `decode` to
            have them cropped off again).
        sample: draw from the posterior; False takes its mean.
        generator, seed: what the draws come from; image i uses `seed` + i, or its own of a list of generators.
        batch_size: images in one pass; None fits it to their size.
        tile: side, in pixels, of overlapping tiles that are encoded one by one and blended; None tiles images of more
            than 2.3 megapixels, 0 none.
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

    def moments(self, images: Images, *, batch_size: int | None = None, tile: int | None = None) -> Any:
        """Mean and log-variance of the posterior, raw (not scaled), each (B, 4, H/8, W/8) float32, or lists where sizes
        differ; see `encode`."""
        means, logvars = self._moments(image_io.to_tensors(images), batch_size, tile)
        return _stack(means), _stack(logvars)

    def decode(
        self,
        z: Any,
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        tile: int | None = None,
    ) -> Any:
        """Images of scaled latents (B, 4, h, w), (4, h, w) or a list of (4, h, w).

        size: (height, width) in pixels to crop to, for all or for each; None keeps all of (8h, 8w).
        output_type: "pil", a list of PIL images; "np", uint8 (B, H, W, 3); "pt", float32 (B, 3, H, W) clamped to [-1,
            1]. The last two are lists where sizes differ.
        batch_size, tile: as in `encode`.
        """
        one_of("output_type", output_type, image_io.OUTPUT_TYPES)
        latents = self._latents(z)
        sizes = self._sizes(size, latents)
        raw = [latent / self.scale + self.shift for latent in latents]
        decoded = self._each(self._decode, raw, batch_size, tile, 1, self.factor, "decode")
        if not all(map(is_finite, decoded)):
            raise self._overflow()
        cropped = [x.clamp(-1, 1)[:, :height, :width] for x, (height, width) in zip(decoded, sizes, strict=True)]
        return image_io.from_tensors(cropped, output_type)

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
        """Encode and decode: what the VAE keeps of `images`, each at its own size. Through the posterior's mean, or a
        sample of it."""
        pixels = image_io.to_tensors(images)
        sizes = [(x.shape[1], x.shape[2]) for x in pixels]
        z = self.encode(pixels, sample=sample, seed=seed, batch_size=batch_size, tile=tile)
        return self.decode(z, size=sizes, output_type=output_type, batch_size=batch_size, tile=tile)

    def try_out(self) -> None:
        """Encode and decode a grey image."""
        side = 4 * self.factor
        self.kind.posterior(torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype))
        self._run_decoder(self._black())

    def _black(self) -> Tensor:
        """Raw latents that are all 0, which every decoder takes."""
        return torch.zeros(1, self.channels, 4, 4)

    @property
    def _label(self) -> str:
        return f"the VAE of {self.name!r}" if self.name else "this VAE"

    @torch.inference_mode()
    def _overflow(self) -> SdkitError:
        """The error for decoded images that are not finite: the latents or the VAE may be at fault."""
        if is_finite(self._decode(self._black())):
            return ArgumentError(f"{self._label} overflows for these latents; they are far from any that it encodes.")
        return SourceError(f"{self._label} gives images that are not finite; its weights are to blame: give another.")

    @blames_network
    def forward(self, x: Tensor, eps: Tensor | None = None) -> Forward:
        """Everything that training needs, with gradient.

        x: pixels (B, 3, H, W), H and W multiples of 8. eps: standard normal noise that draws from the posterior; None
        takes its mean. Of a VQModel the decoder gets the nearest codes, whose gradient goes straight through to the
        latents that they stand for (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, section 3.2).
        """
        mean, logvar = self.posterior(x)
        pixels, codes = self.kind.reconstruct(mean, logvar, eps, self.dtype)
        return Forward(pixels, mean, logvar, codes)

    @property
    def codebook(self) -> Tensor | None:
        """The codes (N, C) of a VQModel, which each place of its latents is rounded to; None of other VAEs."""
        return self.kind.codebook

    def quantize(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes to raw latents (B, C, h, w): themselves, of that shape, and their numbers (B, h, w)."""
        if self.codebook is None:
            raise ArgumentError(f"{self.name or 'this VAE'} has no codebook; that is what a VQModel has.")
        return nearest_codes(self.codebook, raw)

    @blames_network
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw mean and log-variance, (B, 4, H/8, W/8) float32, of pixels (B, 3, H, W), with gradient; H and W multiples
        of 8."""
        return self.kind.posterior(x.to(self.device, self.dtype))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ArgumentError for a (height, width) in pixels that `forward` and `posterior` cannot take."""
        if any(side % self.factor for side in size):
            raise ArgumentError(
                f"size {size[0]} x {size[1]} does not divide by {self.factor}, as this VAE needs; change it."
            )

    def _moments(
        self, pixels: list[Tensor], batch_size: int | None, tile: int | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        padded = [self._pad(x) for x in pixels]
        moments = self._each(self._encode_finite, padded, batch_size, tile, self.factor, 1, "encode")
        means, logvars = zip(*(both.chunk(2) for both in moments), strict=True)
        return list(means), list(logvars)

    def _pad(self, x: Tensor) -> Tensor:
        """(3, H, W) with its lower and right edges repeated up to a multiple of `factor`."""
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
        """`run` over each item (C, H, W), in batches; see `_tiled`."""
        results = [torch.empty(0)] * len(items)
        for chosen in progress(list(self._batches(items, batch_size, up**2)), description=name):
            batch = self._tiled(run, torch.stack([items[i] for i in chosen]), tile, down, up)
            for i, result in zip(chosen, batch, strict=True):
                results[i] = result.clone()  # outside of inference mode, so that autograd takes it
        return results

    def _batches(self, items: Sequence[Tensor], batch_size: int | None, area: int) -> Iterator[list[int]]:
        """Indices of items to go through the network together: of one shape, and not more than fit."""
        if batch_size is not None:
            batch_size = whole_number("batch_size", batch_size, 1)
        # A CPU is no faster in batches, and in half precision batches of different sizes round visibly differently.
        one_by_one = self.device.type == "cpu" and self.dtype != torch.float32
        shapes: dict[torch.Size, list[int]] = {}
        for i, item in enumerate(items):
            shapes.setdefault(item.shape, []).append(i)
        for shape, indices in shapes.items():
            n = batch_size or (1 if one_by_one else max(1, PIXELS_AT_ONCE // (shape[1] * shape[2] * area)))
            yield from (indices[i : i + n] for i in range(0, len(indices), n))

    @torch.inference_mode()
    def _tiled(self, run: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, down: int, up: int) -> Tensor:
        """`run` over x (B, C, H, W), whole or in tiles; `tile` is in pixels, x in pixels (down = 8) or latents (up =
        8)."""
        if tile is None:
            tile = 1024 if x.shape[2] * x.shape[3] * up**2 > TILED_FROM else 0
        if tile == 0:
            return run(x).float().cpu()
        tile = whole_number("tile (0 is none)", tile, 16 * self.factor)
        side = tile // self.factor * down
        with whole_image_statistics(self.network, run, x, side):
            return tiled(run, x, tile=side, down=down, up=up)

    @blames_network
    def _run_decoder(self, raw: Tensor) -> Tensor:
        return self.kind.decode(raw.to(self.device, self.dtype))

    def _encode_finite(self, x: Tensor) -> Tensor:
        return self._finite(lambda x: torch.cat(self.posterior(x), dim=1), x)

    def _decode(self, raw: Tensor) -> Tensor:
        return self._finite(self._run_decoder, raw)

    def _finite(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`run(x)`; images that overflow in float16 (SD's activations pass 65,504) are done again in float32."""
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
                y[bad] = run(x)[bad]  # the whole batch, for which tiles have statistics
            finally:
                self._convert(torch.float16)  # each of its numbers is a float32 number: the weights are unchanged
        return y

    def _convert(self, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # or the weights could never be trained again
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
    """Scaled latents of a raw posterior: a sample of it by standard normal noise `eps`, its mean where that is None."""
    return (sampled(mean, logvar, eps) - shift) * scale


def _generators(n: int, generator: Any, seed: int | None) -> list[torch.Generator | None]:
    """One source of noise for each of n images."""
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


def _stack(tensors: list[Tensor]) -> Any:
    """One tensor where all have one shape, else the list."""
    return torch.stack(tensors) if len({x.shape for x in tensors}) == 1 else tensors
