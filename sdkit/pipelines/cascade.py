"""Cascades: a model, and upsamplers that enlarge its images (Ho et al. 2022, https://arxiv.org/abs/2106.15282)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdkit.arguments import one_of, seeded, strings, whole_number
from sdkit.errors import ArgumentError
from sdkit.images import OUTPUT_TYPES, from_tensors
from sdkit.loading.configs import LOW_RES
from sdkit.pipelines.text_to_image import StableDiffusion

SHARED = ("prompt", "negative_prompt", "seed", "num_images_per_prompt", "output_type", "condition")
"""Keywords of a stage's call that the cascade gives itself."""


class Cascade:
    """A model, and upsamplers that enlarge its images one after another (Ho et al. 2022; GLIDE, Nichol et al. 2021,
    https://arxiv.org/abs/2112.10741).

    Args:
        stages: The base model, then the upsamplers, such as `StableDiffusion.from_pretrained` loads them.

    Attributes:
        stages: The models.

    Raises:
        ArgumentError: There is no upsampler, the base is one, or another model is none.
    """

    def __init__(self, stages: Sequence[StableDiffusion]) -> None:
        if other := [one for one in stages if not isinstance(one, StableDiffusion)]:
            raise ArgumentError(f"the models of a cascade are sdkit.StableDiffusion, not {type(other[0]).__name__}.")
        if len(stages) < 2:
            raise ArgumentError("a cascade has a base model and at least one upsampler; give both.")
        base, *upsamplers = stages
        if base.unet.condition is not None or base.unet.inpaints:
            raise ArgumentError("the first model of a cascade draws from the prompt alone; give a text-to-image model.")
        if wrong := [i for i, one in enumerate(upsamplers, start=2) if one.unet.condition != LOW_RES]:
            raise ArgumentError(
                f"model {wrong[0]} of the cascade is no upsampler; give one that was trained with upscale_factor."
            )
        self.stages = (base, *upsamplers)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        options: Sequence[Mapping[str, Any]] | None = None,
        **common: Any,
    ) -> Any:
        """Draw images of prompts with the base model, and enlarge them.

        Each image has one seed. The base draws from it, and each upsampler from a further seed that is drawn from it:
        an upsampler that began with the base's own noise would find it in the image.

        Args:
            prompt: A prompt, or a list of them.
            negative_prompt: One for all images, or one for each prompt; None is "".
            seed: Image i starts from seed + i, or from the i-th seed of a list.
            num_images_per_prompt: Number of images of each prompt.
            output_type: "pil", "np", or "pt"; see `StableDiffusion.__call__`.
            options: Further keywords of each stage's call, such as `num_inference_steps`, or `noise_level` for an
                upsampler; one mapping for each stage.
            **common: Further keywords of all calls.

        Returns:
            N images, as `StableDiffusion.__call__` returns them.

        Raises:
            ArgumentError: An argument is out of range, or `options` are not one mapping for each stage.

        Example:
            >>> import sdkit
            >>> from sdkit.networks.concatenation import widen
            >>> base = sdkit.StableDiffusion.from_pretrained("emoji")
            >>> network = sdkit.UNet.from_pretrained("emoji").network
            >>> widen(network, "low_res")  # untrained: it does not look at the small image yet
            >>> upsampler = sdkit.StableDiffusion(base.vae, base.text, sdkit.UNet(network), base.schedule)
            >>> cascade = sdkit.Cascade([base, upsampler])
            >>> images = cascade("a cat", num_inference_steps=1, options=[{"height": 16, "width": 16}, {}])
            >>> images[0].size
            (128, 128)
        """
        one_of("output_type", output_type, OUTPUT_TYPES)
        own: list[dict[str, Any]] = [{} for _ in self.stages] if options is None else [dict(one) for one in options]
        if len(own) != len(self.stages):
            raise ArgumentError(
                f"{len(own)} options cannot serve {len(self.stages)} stages: give one mapping for each."
            )
        if given := [name for name in SHARED for one in own if name in one]:
            raise ArgumentError(
                f"{given[0]} is the same for all stages, or made by the cascade; take it out of options."
            )
        copies = whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        prompts = [text for text in strings("prompt", prompt) for _ in range(copies)]
        negatives = negative_prompt
        if negatives is not None and not isinstance(negatives, str):
            negatives = [text for text in strings("negative_prompt", negatives) for _ in range(copies)]
        generators = seeded(seed, len(prompts))
        seeds = [generator.initial_seed() for generator in generators]
        images: Tensor | None = None
        for stage, keywords in zip(self.stages, own, strict=True):
            keywords |= {} if images is None else {"condition": images}
            images = stage(prompts, negatives, seed=seeds, output_type="pt", **common | keywords)
            seeds = [int(torch.randint(2**31, (), generator=generator)) for generator in generators]
        assert images is not None  # there are stages
        return from_tensors(list(images), output_type)
