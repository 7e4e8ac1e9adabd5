"""Metrics: public names of `sdkit.evaluation`."""

from __future__ import annotations

from sdkit.evaluation.codebook import codebook_use
from sdkit.evaluation.similarity import WINDOW, psnr, ssim

__all__ = [
    "WINDOW",
    "codebook_use",
    "psnr",
    "ssim",
]
