"""Metrics of a model: of its VAE, of how images follow their prompts, and of their variety and distribution.

Each takes images, so that real images and images from other sources can be measured in the same way, as controls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdkit import images as image_io
from sdkit.evaluation.extractors import open_extractor
from sdkit.evaluation.frechet import frechet_distance
from sdkit.evaluation.precision_recall import precision_recall
from sdkit.evaluation.similarity import psnr, ssim
from sdkit.networks.autoencoder import VAE
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.figures import background_of, figure_of
from sdkit.recipes.emoji.gallery import Gallery, halves, of_each

BATCH = 32
STEPS = 30  # sampling steps at which models are compared
Images = Sequence[Image.Image]
Measured = dict[str, float | None]


def share(right: Sequence[bool]) -> float | None:
    """Return the share of True, from 0 to 1, or None of nothing."""
    return sum(right) / len(right) if right else None


def fidelity(gallery: Gallery, asked: Sequence[Prompt], images: Images) -> Measured:
    """Measure how well images show the picture, style, and background that their prompts name.

    Args:
        gallery: Features of all pictures.
        asked: Prompts of one picture with its style and background.
        images: An image for each prompt.

    Returns:
        `prompts`, their number; `top1` and `top5`, the shares of prompts whose picture ranks first and among the first
        five of its style; `style`, the share whose nearest picture, among those of all styles, has the named style;
        `own style`, the share that is nearest to the named style among the named picture's styles, so that a wrong
        shape counts less; and `background`, the share with the right background. Shares are from 0 to 1, or None of no
        prompts.
    """
    matches = gallery.matches(asked, images)
    pairs = list(zip(asked, matches, strict=True))
    return {
        "prompts": len(asked),
        "top1": share([match.rank < 1 for match in matches]),
        "top5": share([match.rank < 5 for match in matches]),
        "style": share([match.style == prompt.style for prompt, match in pairs]),
        "own style": share([match.own_style == prompt.style for prompt, match in pairs]),
        "background": share([background_of(image) == one.background for one, image in zip(asked, images, strict=True)]),
    }


def fidelity_of_two(gallery: Gallery, asked: Sequence[Prompt], images: Images) -> Measured:
    """Measure with `fidelity` how well the halves of images show the left and the right picture of their prompts."""
    prompts = [prompt for both in of_each(asked) for prompt in both]
    return fidelity(gallery, prompts, [half for image in images for half in halves(image)])


def arrangement(asked: Sequence[Prompt], images: Images) -> Measured:
    """Measure how well images have the sizes, places, and backgrounds that their prompts name.

    Returns:
        `prompts`, their number; and `size`, `place`, and `background`, the shares of the prompts that name one whose
        image has it.
    """
    seen = [(one, figure_of(image), background_of(image)) for one, image in zip(asked, images, strict=True)]
    return {
        "prompts": len(asked),
        "size": share([figure is not None and figure.size == one.size for one, figure, _ in seen if one.size]),
        "place": share([figure is not None and figure.place == one.place for one, figure, _ in seen if one.place]),
        "background": share([background == one.background for one, _, background in seen if one.background]),
    }


def variety(groups: Sequence[Images]) -> float:
    """Return the standard deviation over the images of a group, in levels of 255, averaged over pixels and groups."""
    deviations = [
        np.stack([np.asarray(image.convert("RGB"), dtype=np.float64) for image in group]).std(axis=0, ddof=1).mean()
        for group in groups
    ]
    return float(np.mean(deviations))


def features_of(images: Images) -> Tensor:
    """Return AlexNet's features (N, D) of images, as `sdkit evaluate images` takes them."""
    return open_extractor("alex")(list(images))


def distribution(generated: Tensor, real: Tensor) -> Measured:
    """Return the Fréchet distance between features, and the precision and recall of the generated ones."""
    near = precision_recall(generated, real)
    return {
        "frechet": frechet_distance(generated, real),
        "precision": near.precision,
        "recall": near.recall,
    }


def generated(
    model: StableDiffusion,
    texts: Sequence[str],
    *,
    scale: float | None = None,
    steps: int | None = None,
    sampler: str = "ddim",
) -> list[Image.Image]:
    """Return an image for each prompt, from seeds 0, 1, 2, and so on. None is the model's own scale, and `STEPS`."""
    images: list[Image.Image] = model(
        list(texts), guidance_scale=scale, num_inference_steps=steps or STEPS, sampler=sampler, batch_size=BATCH
    )
    return images


def vae_quality(vae: VAE, images: Images, lpips: LPIPS) -> Measured:
    """Return PSNR (dB), SSIM, and LPIPS between images and their reconstructions, averaged over the images."""
    rows = []
    for i in range(0, len(images), BATCH):
        batch = list(images[i : i + BATCH])
        reconstructed = vae.reconstruct(batch)
        x, y = (torch.stack(image_io.to_tensors(side)) for side in (batch, reconstructed))
        with torch.no_grad():
            rows += list(zip(psnr(batch, reconstructed), ssim(batch, reconstructed), lpips(x, y), strict=True))
    names = ("psnr", "ssim", "lpips")
    return {name: float(np.mean([float(row[k]) for row in rows])) for k, name in enumerate(names)}
