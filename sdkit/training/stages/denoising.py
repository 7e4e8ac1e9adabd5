"""The denoising objective: which noise is drawn, what a network is to predict from it, and how the error is weighted.

It knows neither networks nor data sets, so that every stage that denoises can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdkit.diffusion.losses import diffusion_loss, min_snr_weight
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.training.stages.images import noise_of

VALIDATION_TIMESTEPS = 8  # of each held-out example


class DenoisingObjective:
    """Noise, timesteps, targets, and the loss of a model that denoises.

    Args:
        schedule: The noise schedule; its `prediction_type` decides the target.
        snr_gamma: Gamma of the min-SNR weights (Hang et al. 2023); None weighs all timesteps alike.
        noise_offset: Share of an offset that each channel's noise gets in training.
    """

    def __init__(self, schedule: NoiseSchedule, *, snr_gamma: float | None = None, noise_offset: float = 0.0) -> None:
        self.schedule, self.snr_gamma, self.noise_offset = schedule, snr_gamma, noise_offset
        self.zero_snr = float(schedule.alphas_cumprod[-1]) == 0

    def timestep(self, generator: torch.Generator) -> int:
        """Draw a timestep, uniformly."""
        return int(torch.randint(self.schedule.num_timesteps, (), generator=generator))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the noise of one training sample of `shape` (C, h, w).

        Returns:
            `posterior_eps`, for sampling the posterior of an autoencoder, and `eps`, with the offset of each channel.
        """
        return self._drawn(shape, generator, self.noise_offset)

    def validation_grid(self, i: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """Return noise and timestep of each validation pass of held-out example i: the same in every run, without
        offset, at timesteps spread over the whole schedule."""
        T, n = self.schedule.num_timesteps, VALIDATION_TIMESTEPS
        return [self._drawn(shape, noise_of(0, i * n + j), 0) | {"t": (2 * j + 1) * T // (2 * n)} for j in range(n)]

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and the target of the network there, both shaped like x0 (B, C, h, w); `t` is (B,)."""
        return self.schedule.add_noise(x0, eps, t), self.schedule.target(x0, eps, t)

    def loss(self, output: Tensor, target: Tensor, t: Sequence[int]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss with min-SNR weights, and `mse`, the loss without them, where there are weights."""
        snr = self.schedule.snr(torch.tensor(t)).float()
        weight = min_snr_weight(snr, self.snr_gamma, self.schedule.prediction_type, keep_noisiest=self.zero_snr)
        loss = diffusion_loss(output, target, weight.to(output.device))
        return loss, {} if self.snr_gamma is None else {"mse": diffusion_loss(output, target).detach()}

    @staticmethod
    def _drawn(shape: tuple[int, ...], generator: torch.Generator, offset_share: float) -> dict[str, Tensor]:
        # The order of these draws is part of what makes a resumed run bit-identical.
        posterior, eps, offset = (
            torch.randn(s, generator=generator) for s in (shape, shape, (shape[0], *[1] * (len(shape) - 1)))
        )
        return {"posterior_eps": posterior, "eps": eps + offset_share * offset}
