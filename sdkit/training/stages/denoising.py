"""The denoising objective: the noise, the target of the network, and the weights of the loss.

It knows neither networks nor data sets, so that every stage that denoises can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdkit.diffusion.losses import diffusion_loss, min_snr_weight
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.training.batches import noise_of

VALIDATION_TIMESTEPS = 8  # timesteps at which each held-out example is evaluated


class DenoisingObjective:
    """Noise, timesteps, targets, and the loss of a model that denoises.

    Args:
        schedule: The noise schedule. Its `prediction_type` decides the target.
        snr_gamma: Gamma of the min-SNR weights (Hang et al. 2023); None weights all timesteps equally.
        noise_offset: Standard deviation of the random constant that is added to each channel's noise in training.
        importance: Whether timesteps are drawn by `TimestepSampler`, which needs a place in [0, 1) for each.
        logit_normal: Mean and standard deviation of the normal draw whose sigmoid is t / T (Esser et al. 2024,
            section 3.1); None draws t uniformly.

    Attributes:
        schedule: The noise schedule.
        snr_gamma: Gamma of the min-SNR weights, or None.
        noise_offset: Standard deviation of the noise offset.
        importance: Whether `timestep` returns a place in [0, 1) in place of a timestep.
        logit_normal: Mean and standard deviation of logit-normal timesteps, or None.
        zero_snr: Whether the last timestep is pure noise.
    """

    def __init__(
        self, schedule: NoiseSchedule, *, snr_gamma: float | None = None, noise_offset: float = 0.0,
        importance: bool = False, logit_normal: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        self.schedule, self.snr_gamma, self.noise_offset = schedule, snr_gamma, noise_offset
        self.importance, self.logit_normal = importance, logit_normal
        self.zero_snr = float(schedule.alphas_cumprod[-1]) == 0

    def timestep(self, generator: torch.Generator) -> int | float:
        """Draw a timestep; or, for timesteps drawn by importance, its place in [0, 1)."""
        if self.importance:
            return float(torch.rand((), generator=generator, dtype=torch.float64))
        if self.logit_normal:
            mean, std = self.logit_normal
            place = torch.sigmoid(mean + std * torch.randn((), generator=generator, dtype=torch.float64))
            return min(int(place * self.schedule.num_timesteps), self.schedule.num_timesteps - 1)
        return int(torch.randint(self.schedule.num_timesteps, (), generator=generator))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the noise of one training sample.

        Args:
            shape: Shape (C, h, w) of the latents.
            generator: Generator of the sample.

        Returns:
            `posterior_eps`, which samples the posterior of an autoencoder, and `eps`, which noises the latents.
        """
        return self._draw(shape, generator, self.noise_offset)

    def validation_grid(self, i: int, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """Return noise (as `noise` does) and timestep `t` of each evaluation of held-out example i.

        They are the same in every run. The noise has no offset, and the timesteps are spread over the schedule.
        """
        T, n = self.schedule.num_timesteps, VALIDATION_TIMESTEPS
        return [self._draw(shape, noise_of(0, i * n + j), 0) | {"t": (2 * j + 1) * T // (2 * n)} for j in range(n)]

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and the target of the network.

        Args:
            x0: Latents (B, C, h, w).
            eps: Noise (B, C, h, w).
            t: Timesteps (B,).
        """
        return self.schedule.add_noise(x0, eps, t), self.schedule.target(x0, eps, t)

    def loss(
        self, output: Tensor, target: Tensor, t: Sequence[int], weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the mean squared error with min-SNR weights, and its parts to log.

        Args:
            output: Output of the network (B, C, h, w).
            target: Its target (B, C, h, w).
            t: Timesteps, one for each sample.
            weights: Weights of the samples (B,), which multiply those of min-SNR; None weights all samples by 1.

        Returns:
            The loss; and, if `snr_gamma` is set, `mse`, the loss without weights.
        """
        weight = self.weights(t).to(output.device)
        if weights is not None:
            weight = weight * weights.to(weight)
        loss, unweighted = diffusion_loss(output, target, weight), self.snr_gamma is None and weights is None
        return loss, {} if unweighted else {"mse": diffusion_loss(output, target).detach()}

    def weights(self, t: Sequence[int]) -> Tensor:
        """Return the min-SNR weights (B,) of timesteps, on the CPU."""
        snr = self.schedule.snr(torch.tensor(t)).float()
        return min_snr_weight(snr, self.snr_gamma, self.schedule.prediction_type, keep_noisiest=self.zero_snr)

    @staticmethod
    def _draw(shape: tuple[int, ...], generator: torch.Generator, offset_factor: float) -> dict[str, Tensor]:
        # The order of these draws must not change, or runs would no longer reproduce their results.
        posterior, eps, offset = (
            torch.randn(s, generator=generator) for s in (shape, shape, (shape[0], *[1] * (len(shape) - 1)))
        )
        return {"posterior_eps": posterior, "eps": eps + offset_factor * offset}
