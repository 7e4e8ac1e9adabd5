"""Corruption of a denoising autoencoder's input: Gaussian noise, and masks of square patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdkit.errors import ArgumentError


@dataclass(frozen=True)
class Corruption:
    """Corrupts images before the encoder sees them (Vincent et al. 2008, "Extracting and composing robust features with
    denoising autoencoders", section 2.3; patches as in He et al. 2022, https://arxiv.org/abs/2111.06377).

    Attributes:
        noise: Standard deviation of Gaussian noise added to pixels in [-1, 1].
        mask_ratio: Share of an image's patches that are masked, from 0 to below 1.
        patch: Side of a square patch in pixels.
    """

    noise: float
    mask_ratio: float
    patch: int

    def check(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError if images of `size` (height, width) cannot be cut into patches or masked by the ratio."""
        if not self.mask_ratio:
            return
        if any(side % self.patch for side in size):
            raise ArgumentError(
                f"size {size[0]} x {size[1]} does not divide into patches of {self.patch} x {self.patch} pixels; "
                "change mask_patch."
            )
        patches = (size[0] // self.patch) * (size[1] // self.patch)
        masked = self._masked(patches)
        if masked in (0, patches):
            raise ArgumentError(
                f"mask_ratio {self.mask_ratio:g} masks {masked} of the {patches} patches of an image; change it, or "
                "take a smaller mask_patch."
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a corrupted copy of one image.

        Noisy pixels may leave [-1, 1]. Masked patches are 0, a medium grey; their number is round(ratio * patches).

        Args:
            x: Pixels (3, H, W) in [-1, 1].
            generator: Source of the noise and then of the masked patches.
        """
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=generator)
        if self.mask_ratio:
            rows, columns = (side // self.patch for side in x.shape[1:])
            masked = torch.randperm(rows * columns, generator=generator)[: self._masked(rows * columns)]
            visible = torch.ones(rows * columns)
            visible[masked] = 0
            x = x * visible.reshape(1, rows, columns).repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        return x

    def _masked(self, patches: int) -> int:
        """Return how many of an image's patches are masked."""
        return round(self.mask_ratio * patches)
