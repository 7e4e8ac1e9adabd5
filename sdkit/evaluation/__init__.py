"""Metrics: similarity of images, distances between sets of images, fit of images and prompts, and codebook usage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdkit.lazy import attributes

if TYPE_CHECKING:  # `as` re-exports a name for type checkers, which cannot evaluate the computed __all__ below
    from sdkit.evaluation.clip_score import clip_cosine as clip_cosine
    from sdkit.evaluation.extractors import Extractor as Extractor
    from sdkit.evaluation.extractors import open_extractor as open_extractor
    from sdkit.evaluation.frechet import frechet_at_infinity as frechet_at_infinity
    from sdkit.evaluation.frechet import frechet_distance as frechet_distance
    from sdkit.evaluation.generated_images import ImageEvaluation as ImageEvaluation
    from sdkit.evaluation.generated_images import Row as Row
    from sdkit.evaluation.generated_images import Score as Score
    from sdkit.evaluation.generated_images import evaluate_images as evaluate_images
    from sdkit.evaluation.inception_score import InceptionScore as InceptionScore
    from sdkit.evaluation.kernel_distance import cmmd as cmmd
    from sdkit.evaluation.kernel_distance import kid as kid
    from sdkit.evaluation.moments import Moments as Moments
    from sdkit.evaluation.reconstruction import Reconstruction as Reconstruction
    from sdkit.evaluation.reconstruction import VAEEvaluation as VAEEvaluation
    from sdkit.evaluation.reconstruction import evaluate_vae as evaluate_vae
    from sdkit.evaluation.reconstruction import reconstruction_sheet as reconstruction_sheet
    from sdkit.evaluation.similarity import psnr as psnr
    from sdkit.evaluation.similarity import ssim as ssim

# `clip_score` and `precision_recall` are modules here, with a function of that name in each.
_HOMES = {
    "Extractor": "sdkit.evaluation.extractors",
    "ImageEvaluation": "sdkit.evaluation.generated_images",
    "InceptionScore": "sdkit.evaluation.inception_score",
    "Moments": "sdkit.evaluation.moments",
    "Reconstruction": "sdkit.evaluation.reconstruction",
    "Row": "sdkit.evaluation.generated_images",
    "Score": "sdkit.evaluation.generated_images",
    "VAEEvaluation": "sdkit.evaluation.reconstruction",
    "clip_cosine": "sdkit.evaluation.clip_score",
    "cmmd": "sdkit.evaluation.kernel_distance",
    "evaluate_images": "sdkit.evaluation.generated_images",
    "evaluate_vae": "sdkit.evaluation.reconstruction",
    "frechet_at_infinity": "sdkit.evaluation.frechet",
    "frechet_distance": "sdkit.evaluation.frechet",
    "kid": "sdkit.evaluation.kernel_distance",
    "open_extractor": "sdkit.evaluation.extractors",
    "psnr": "sdkit.evaluation.similarity",
    "reconstruction_sheet": "sdkit.evaluation.reconstruction",
    "ssim": "sdkit.evaluation.similarity",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:  # with a module `__getattr__`, a type checker would accept misspelt names
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
