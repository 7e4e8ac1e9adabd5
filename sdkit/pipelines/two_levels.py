"""Images from the codes of a VQ-VAE-2: top codes first, then the bottom codes that fit them (Razavi et al. 2019,
https://arxiv.org/abs/1906.00446, section 3.2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit import images as image_io
from sdkit.arguments import one_of, seeded, whole_number
from sdkit.engines.device import resolve_device
from sdkit.errors import ArgumentError, SourceError
from sdkit.fields import takes_fields
from sdkit.files import expanded
from sdkit.loading.fingerprint import weights_fingerprint
from sdkit.loading.tokenizer import load_tokenizer
from sdkit.messages import clean
from sdkit.networks.code_prior import CodePrior, load_prior
from sdkit.networks.vqvae2 import VQVAE2, load_vqvae2
from sdkit.pipelines.code_conditions import ConditionReader
from sdkit.pipelines.code_sampling import CodeSampling, SamplingKeywords, draw_codes
from sdkit.pipelines.tokens import PRIOR, TOKENIZER

if TYPE_CHECKING:
    from typing_extensions import Unpack

VQVAE2_FOLDER = "vqvae2"
"""Subfolder of the VQ-VAE-2 in the result of a prior of one of its levels."""


class TwoLevelPipeline:
    """A VQ-VAE-2 and a prior of each level.

    Args:
        network: The VQ-VAE-2.
        top: The prior of its top codes.
        bottom: The prior of its bottom codes, with the top codes as its map.
        tokenizer: The tokenizer of a top prior of texts; None for others.

    Attributes:
        network: The VQ-VAE-2.
        top: The prior of its top codes.
        bottom: The prior of its bottom codes.
        tokenizer: The tokenizer, or None.

    Raises:
        SourceError: The priors do not fit each other or the network.
    """

    def __init__(self, network: VQVAE2, top: CodePrior, bottom: CodePrior, tokenizer: Any = None) -> None:
        codes = network.config.num_vq_embeddings
        below = bottom.shape
        fits = below.condition == "map" and below.condition_shape == top.shape.grid and below.ratio == 2
        if not fits or {top.shape.codes, bottom.shape.codes, bottom.shape.tokens} != {codes}:
            raise SourceError("the priors are not those of the two levels of one VQ-VAE-2; give the top one first.")
        self.network, self.top, self.bottom, self.tokenizer = network, top, bottom, tokenizer
        self._read = ConditionReader(top.shape, tokenizer, _no_maps)

    @classmethod
    def from_pretrained(
        cls, top: str | os.PathLike[str], bottom: str | os.PathLike[str], *, device: str | torch.device = "auto"
    ) -> TwoLevelPipeline:
        """Load the results of two runs of `train_prior`, of level "top" and of level "bottom".

        Args:
            top: The result of the top level.
            bottom: The result of the bottom level, trained on the same VQ-VAE-2.
            device: As in `sdkit.VAE.from_pretrained`.

        Raises:
            SourceError: A part is missing or damaged, or the two do not fit each other.
        """
        place = resolve_device(device)
        folders = [expanded(top), expanded(bottom)]
        for folder in folders:
            if not (folder / VQVAE2_FOLDER).is_dir():
                raise SourceError(f"{clean(folder)!r} has no folder {VQVAE2_FOLDER}/; give the result of train prior.")
        network, other = (load_vqvae2(folder / VQVAE2_FOLDER) for folder in folders)
        if weights_fingerprint(network) != weights_fingerprint(other):
            raise SourceError("the two priors were trained on different VQ-VAE-2s; give those of one.")
        first, second = (load_prior(folder / PRIOR).to(place) for folder in folders)
        tokenizer = load_tokenizer(folders[0] / TOKENIZER) if first.shape.condition == "text" else None
        return cls(network.to(place), first, second, tokenizer)

    @takes_fields(CodeSampling)
    def __call__(
        self,
        condition: Any = None,
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        output_type: str = "pil",
        **options: Unpack[SamplingKeywords],
    ) -> Any:
        """Draw images of the size of the training images.

        Args:
            condition: A condition of the top prior, as in `TokenPipeline.__call__`. Guidance is that of the top level.
            num_images: Images of each condition.
            seed: Image i is drawn with seed + i, or with the i-th seed of a list.
            output_type: "pil", "np", "pt", or "codes".

        Returns:
            B images, as `TokenPipeline.__call__` returns them; or the top codes (B, h/2, w/2) and the bottom codes
            (B, h, w).

        Raises:
            ArgumentError: An argument is impossible, or the top prior has no such condition.
        """
        one_of("output_type", output_type, (*image_io.OUTPUT_TYPES, "codes"))
        guided = CodeSampling(**options)
        plain = replace(guided, guidance_scale=1.0)
        conditions, uncond, count = self._read(condition, whole_number("num_images", num_images, 1), guided)
        generators = seeded(seed, count)
        top = draw_codes(self.top, generators, condition=conditions, uncond=uncond, sampling=guided)
        bottom = draw_codes(self.bottom, generators, condition=top, sampling=plain)
        if output_type == "codes":
            return top, bottom
        device = next(self.network.parameters()).device
        pixels = self.network.decode(top.to(device), bottom.to(device)).cpu()
        return image_io.from_tensors([*pixels], output_type)


def _no_maps(_: Any) -> Tensor:
    raise ArgumentError("the top prior of a VQ-VAE-2 has no maps; leave the condition out.")
