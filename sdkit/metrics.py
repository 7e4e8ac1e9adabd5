"""Metrics: public names of `sdkit.evaluation`."""

from __future__ import annotations

from sdkit.evaluation.codebook import codebook_use
from sdkit.evaluation.likelihood import bits_per_dimension
from sdkit.evaluation.similarity import WINDOW, psnr, ssim

__all__ = [
    "WINDOW",
    "bits_per_dimension",
    "codebook_use",
    "psnr",
    "ssim",
]
