"""Images from codes: a prior draws the codes of a VQ-VAE or VQGAN one by one, and the VQ model decodes them (van den
Oord et al. 2017, https://arxiv.org/abs/1711.00937; Esser et al. 2021, https://arxiv.org/abs/2012.09841; Ramesh et al.
2021, https://arxiv.org/abs/2102.12092)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sdkit import images as image_io
from sdkit.arguments import LONGEST_SIDE, number, one_of, seeded, strings, whole_number
from sdkit.atomic import new_folder, whole_folder
from sdkit.engines.device import resolve_place
from sdkit.errors import ArgumentError, SourceError
from sdkit.evaluation.clip_score import clip_score
from sdkit.evaluation.extractors import Extractor
from sdkit.fields import takes_fields
from sdkit.files import expanded
from sdkit.images.convert import Images
from sdkit.loading.tokenizer import load_tokenizer
from sdkit.messages import clean, no_warnings, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.networks.code_prior import CodePrior, load_prior, log_likelihood, save_prior
from sdkit.pipelines.code_conditions import ConditionReader
from sdkit.pipelines.code_sampling import CodeSampling, SamplingKeywords, draw_codes

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CodeKeywords(SamplingKeywords, total=False):
    """Keyword arguments of `TokenPipeline.__call__`, except `output_type`."""

    num_images: int
    seed: int | Sequence[int]
    height: int | None
    width: int | None
    cached: bool


VQVAE, PRIOR, TOKENIZER = "vqvae", "prior", "tokenizer"
"""Subfolders of a saved pipeline."""


class Reranked(NamedTuple):
    """Images by their CLIP score, best first.

    Attributes:
        images: The images.
        scores: Their CLIP scores, in [0, 2.5], in the same order.
        order: Their positions before.
    """

    images: list[Any]
    scores: list[float]
    order: list[int]


def rerank(images: Sequence[Any], prompt: str, clip: Extractor) -> Reranked:
    """Order images by how well they fit a prompt, as DALL-E does with its 512 samples of each (Ramesh et al. 2021,
    section 2.6).

    Args:
        images: Images of any kind that `sdkit.images` reads.
        prompt: The prompt.
        clip: A CLIP; see `sdkit.evaluation.open_extractor`.

    Raises:
        ArgumentError: There is no image, more than one prompt, or the extractor is no CLIP.
    """
    if len(images) == 0:
        raise ArgumentError("there is no image to rank; give at least one.")
    texts = strings("prompt", prompt)
    if len(texts) != 1:
        raise ArgumentError(f"images are ranked by one prompt, not by {len(texts)}; call this for each.")
    embedded = clip.embed_texts(texts)
    scores = clip_score(clip([*images]), embedded.expand(len(images), -1))
    order = scores.argsort(descending=True, stable=True).tolist()
    return Reranked([images[i] for i in order], scores[order].tolist(), order)


class TokenPipeline:
    """A VQ model and a prior over its codes: prompts, classes, maps, or nothing in, images out.

    Args:
        vae: The VQ-VAE or VQGAN.
        prior: The prior.
        tokenizer: The tokenizer of a prior of texts; None for others.

    Attributes:
        vae: The VQ model.
        prior: The prior.
        tokenizer: The tokenizer, or None.

    Raises:
        SourceError: The parts do not fit each other.
    """

    def __init__(self, vae: VAE, prior: CodePrior, tokenizer: Any = None) -> None:
        codes = prior.shape.codes
        if vae.codebook is None or len(vae.codebook) != codes:
            held = "no codebook" if vae.codebook is None else f"{len(vae.codebook)} codes"
            raise SourceError(f"the prior is for a VQ model of {codes} codes, and this VAE has {held}; give its own.")
        self.vae, self.prior, self.tokenizer = vae, prior, tokenizer
        self._read = ConditionReader(prior.shape, tokenizer, self._codes)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto"
    ) -> TokenPipeline:
        """Load a pipeline from a folder that `save` or `train_prior` wrote.

        Args:
            folder: A folder with vqvae/, prior/, and, for texts, tokenizer/.
            dtype: The dtype of the VQ model, as in `VAE.from_pretrained`. The prior is always float32.
            device: As in `VAE.from_pretrained`.

        Raises:
            SourceError: A part is missing, damaged, or of another kind.
        """
        dtype, device = resolve_place(dtype, device)
        root = expanded(folder)
        for part in (VQVAE, PRIOR):
            if not (root / part).is_dir():
                raise SourceError(f"{clean(root)!r} has no folder {part}/; give the result of sdkit train prior.")
        prior = load_prior(root / PRIOR).to(device)
        tokenizer = load_tokenizer(root / TOKENIZER) if prior.shape.condition == "text" else None
        return cls(VAE.from_pretrained(root / VQVAE, dtype=dtype, device=device), prior, tokenizer)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the pipeline as a folder that `from_pretrained` loads; vqvae/ is in diffusers layout.

        Args:
            folder: The folder to write. It must be absent or empty.

        Raises:
            ArgumentError: The folder holds something.
            SdkitError: The folder cannot be written.
        """
        out = new_folder(folder)
        with whole_folder(out) as temporary:
            self.write(temporary)
        return out

    def write(self, folder: Path) -> None:
        """Write the parts of the pipeline into an empty folder."""
        with quiet("diffusers", "transformers"), no_warnings():
            self.vae.network.save_pretrained(folder / VQVAE)
            save_prior(self.prior, folder / PRIOR)
            if self.tokenizer is not None:
                copy.deepcopy(self.tokenizer).save_pretrained(folder / TOKENIZER)

    @overload
    def __call__(
        self, condition: Any = None, *, output_type: Literal["pil"] = "pil", **options: Unpack[CodeKeywords]
    ) -> list[Image.Image]: ...

    @overload
    def __call__(
        self, condition: Any = None, *, output_type: Literal["np"], **options: Unpack[CodeKeywords]
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def __call__(
        self, condition: Any = None, *, output_type: Literal["pt", "codes"], **options: Unpack[CodeKeywords]
    ) -> Tensor: ...

    @overload
    def __call__(self, condition: Any = None, *, output_type: str, **options: Unpack[CodeKeywords]) -> Any: ...

    @takes_fields(CodeSampling)
    def __call__(
        self,
        condition: Any = None,
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        cached: bool = True,
        output_type: str = "pil",
        **options: Unpack[SamplingKeywords],
    ) -> Any:
        """Draw images.

        Args:
            condition: What to draw: a prompt, the name or number of a class, or a map, as an image; or a list of these.
                None draws without a condition, and so does an empty prompt or name.
            num_images: Images of each condition.
            seed: Image i is drawn with seed + i, or with the i-th seed of a list.
            height: Height in pixels; None is that of the training images, or of the map. A transformer draws no
                smaller images; larger ones through a sliding window (Esser et al. 2021).
            width: Width in pixels, likewise.
            cached: Keep keys and values of a transformer: faster, and the same to rounding.
            output_type: "pil", "np", "pt", or "codes" (B, h, w).

        Returns:
            B images: PIL images, uint8 (B, H, W, 3), float32 (B, 3, H, W) in [-1, 1], or their codes.

        Raises:
            ArgumentError: An argument is impossible, or the prior has no such condition.
        """
        one_of("output_type", output_type, (*image_io.OUTPUT_TYPES, "codes"))
        sampling = CodeSampling(**options)
        conditions, uncond, count = self._read(condition, whole_number("num_images", num_images, 1), sampling)
        size = self._size(height, width, conditions)
        codes = draw_codes(
            self.prior, seeded(seed, count), condition=conditions, uncond=uncond, size=size, sampling=sampling,
            cached=cached,
        )  # fmt: skip
        return codes if output_type == "codes" else self.vae.decode_codes(codes, output_type=output_type)

    @takes_fields(CodeSampling)
    def complete(
        self,
        images: Images,
        condition: Any = None,
        *,
        keep: float = 0.5,
        seed: int | Sequence[int] = 0,
        output_type: str = "pil",
        **options: Unpack[SamplingKeywords],
    ) -> Any:
        """Keep the upper part of images and draw the rest.

        Args:
            images: Images of one size, whose height and width are multiples of the VQ model's factor.
            condition: As in `__call__`, one for all images or one for each.
            keep: Share of the height to keep, in [0, 1]; rounded down to whole rows of codes.
            seed: As in `__call__`.
            output_type: As in `__call__`.

        Returns:
            The images, as `__call__` returns them.

        Raises:
            ArgumentError: As in `__call__`.
        """
        one_of("output_type", output_type, (*image_io.OUTPUT_TYPES, "codes"))
        keep = number("keep", keep, 0, 1)
        sampling = CodeSampling(**options)
        codes = self._codes(images)
        conditions, uncond, count = self._read(condition, None, sampling, len(codes))
        factor = self.vae.factor
        size = self._size(codes.shape[1] * factor, codes.shape[2] * factor, conditions)
        rows = int(keep * codes.shape[1] + 1e-9)  # 0.58 * 50 is 28.999999999999996
        codes = draw_codes(
            self.prior, seeded(seed, count), condition=conditions, uncond=uncond, size=size, known=codes[:, :rows],
            sampling=sampling,
        )  # fmt: skip
        return codes if output_type == "codes" else self.vae.decode_codes(codes, output_type=output_type)

    @torch.no_grad()
    def log_likelihood(self, images: Any, condition: Any = None) -> Tensor:
        """Return the exact log-likelihood of the codes of images, in nats.

        Args:
            images: Images, or their codes as an int64 tensor (B, h, w), of the size of the training images.
            condition: As in `__call__`, one for all images or one for each.

        Returns:
            (B,), float32, on the CPU. Divide by -h w ln 2 for bits per code.

        Raises:
            ArgumentError: The images have another size, or the prior has no such condition.
        """
        codes = images if isinstance(images, Tensor) and images.dtype == torch.int64 else self._codes(images)
        shape = self.prior.shape
        if codes.ndim != 3 or (tuple(codes.shape[1:]) != shape.grid and shape.kind == "transformer"):
            raise ArgumentError(
                f"the likelihood is that of images of {shape.grid[0]} x {shape.grid[1]} codes, not of "
                f"{tuple(codes.shape)}; give images of the size that the prior was trained on."
            )
        if not codes.numel():
            raise ArgumentError("there is no code; give at least one image.")
        if int(codes.min()) < 0 or int(codes.max()) >= shape.codes:
            raise ArgumentError(f"codes are numbers from 0 to {shape.codes - 1}; give codes of this VQ model.")
        conditions = self._read(condition, None, CodeSampling(), len(codes))[0]
        self._size(codes.shape[1] * self.vae.factor, codes.shape[2] * self.vae.factor, conditions)  # of a map, too
        device = next(self.prior.parameters()).device
        found = log_likelihood(
            self.prior, codes.to(device), None if conditions is None else conditions.to(device)
        )  # fmt: skip
        return found.cpu()

    def _codes(self, images: Images) -> Tensor:
        codes = self.vae.codes(images)
        if not isinstance(codes, Tensor):
            raise ArgumentError("the images differ in size; give images of one size.")
        return codes

    def _size(self, height: Any, width: Any, conditions: Tensor | None) -> tuple[int, int]:
        """Return height and width of the images in codes. Raise ArgumentError if the prior cannot draw them."""
        shape, factor = self.prior.shape, self.vae.factor
        usual = shape.grid
        if shape.condition == "map" and conditions is not None:
            usual = (conditions.shape[1] * shape.ratio, conditions.shape[2] * shape.ratio)
        size = []
        for name, value, own, least in zip(("height", "width"), (height, width), usual, shape.grid, strict=True):
            pixels = own * factor if value is None else whole_number(name, value, 1, LONGEST_SIDE)
            if pixels % factor:
                raise ArgumentError(f"{name} must be a multiple of {factor} pixels, not {pixels}.")
            if shape.kind == "transformer" and pixels < least * factor:
                raise ArgumentError(f"{name} must be at least {least * factor} pixels for this prior, not {pixels}.")
            size.append(pixels // factor)
        if shape.condition == "map" and tuple(size) != usual:
            raise ArgumentError(
                f"the map is for images of {usual[0] * factor} x {usual[1] * factor} pixels; give one of the size of "
                f"the images, {size[0] * factor} x {size[1] * factor}."
            )
        return size[0], size[1]
