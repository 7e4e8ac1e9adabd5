"""Noise augmentation of an image's embedding, by which a decoder learns how far to trust it (Ho et al. 2022,
https://arxiv.org/abs/2106.15282; stable unCLIP)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdkit.arguments import whole_number
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingNoise:
    """Statistics of embeddings, and the schedule that noises them.

    Attributes:
        mean: (D,), the mean of each value of the embeddings.
        std: (D,), their standard deviation.
        schedule: The noise schedule; a noise level is one of its timesteps.
    """

    mean: Tensor
    std: Tensor
    schedule: NoiseSchedule

    @property
    def width(self) -> int:
        """D, the width of the embeddings."""
        return len(self.mean)

    def level(self, level: int) -> int:
        """Return a noise level. Raise ArgumentError unless it is a timestep of the schedule."""
        return whole_number("noise_level", level, 0, self.schedule.num_timesteps - 1)

    def label(self, embeddings: Tensor, levels: Tensor, eps: Tensor) -> Tensor:
        """Return what the decoder reads of embeddings: the noised embedding, and sinusoids of the noise level.

        As in diffusers' StableUnCLIPPipeline, the embedding is normalised, noised, and brought back to its own scale.

        Args:
            embeddings: (B, D).
            levels: Noise levels (B,).
            eps: Standard normal noise (B, D).

        Returns:
            (B, 2D), float32. Zeros in its place mean no embedding, for classifier-free guidance.

        Raises:
            ArgumentError: The embeddings have another shape.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise ArgumentError(f"embeddings must be (B, {self.width}), not {tuple(embeddings.shape)}.")
        mean, std = self.mean.to(embeddings.device), self.std.to(embeddings.device)
        noised = self.schedule.add_noise((embeddings.float() - mean) / std, eps.to(embeddings.device), levels)
        return torch.cat([noised * std + mean, sinusoids(levels, self.width).to(embeddings.device)], dim=1)


def sinusoids(levels: Tensor, width: int) -> Tensor:
    """Return cosines, then sines of numbers (B,) at falling frequencies from 1 (Vaswani et al. 2017), as (B, width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half))
    angles = levels.cpu()[:, None].float() * frequencies
    return torch.nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))
