"""Measures of images, as `sdkit.metrics`: see `sdkit.evaluation`."""

from __future__ import annotations

from sdkit.evaluation.similarity import (
    WINDOW,
    codebook_use,
    psnr,
    ssim,
)

__all__ = [
    "WINDOW",
    "codebook_use",
    "psnr",
    "ssim",
]
