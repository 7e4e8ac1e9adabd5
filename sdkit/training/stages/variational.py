"""Training with a learned variance, and timesteps drawn by importance (Nichol & Dhariwal 2021,
https://arxiv.org/abs/2102.09672, sections 3.1 and 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from sdkit.diffusion.likelihood import variational_loss
from sdkit.training.distributed import unwrapped
from sdkit.training.stages.denoising import DenoisingObjective

HISTORY = 10  # losses that are remembered of each timestep
UNIFORM = 0.001  # share of the timesteps that are drawn uniformly, so that each is drawn now and then


class TimestepSampler(nn.Module):
    """Draws timesteps in proportion to sqrt(E[L_t^2]), over the last 10 losses at each t (eq. 18).

    Timesteps are drawn uniformly until each has 10 losses. The losses are buffers: a checkpoint holds them.

    Args:
        num_timesteps: T.

    Attributes:
        history: (T, 10) float32, the last losses at each timestep, the oldest first.
        counts: (T,), how many of them there are.
    """

    history: Tensor
    counts: Tensor

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(num_timesteps, HISTORY, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def shares(self) -> Tensor:
        """Return the probability of each timestep (T,), float64, on the CPU."""
        T = len(self.counts)
        history = self.history.cpu().double()
        if bool((self.counts < HISTORY).any()):
            return torch.full((T,), 1 / T, dtype=torch.float64)
        roots = history.square().mean(1).sqrt()
        total = float(roots.sum())
        if total == 0:
            return torch.full((T,), 1 / T, dtype=torch.float64)
        return (1 - UNIFORM) * roots / total + UNIFORM / T

    def draw(self, places: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return timesteps (B,), and the weights (B,) of their losses, with which the mean is that of uniform draws.

        Args:
            places: B numbers, uniform in [0, 1).
        """
        shares = self.shares()
        reached = shares.cumsum(0)
        t = torch.searchsorted(reached, torch.tensor(places, dtype=torch.float64) * reached[-1], right=True)
        t = t.clamp(max=len(shares) - 1)
        return t, 1 / (len(shares) * shares[t])

    def learn(self, losses: Sequence[tuple[int, int, float]]) -> None:
        """Remember losses of an optimizer step.

        Args:
            losses: (n, t, loss) of this process's samples, the n-th of the run. Those of all processes are remembered,
                in the order of n, on each of them.
        """
        history, counts = self.history.cpu(), self.counts.cpu()  # on a GPU, each loss would synchronise
        for _, t, loss in sorted(gather_object(list(losses))):
            count = int(counts[t])
            if count == HISTORY:
                history[t] = history[t].roll(-1)
            history[t, min(count, HISTORY - 1)] = loss
            counts[t] = min(count + 1, HISTORY)
        self.history.copy_(history)
        self.counts.copy_(counts)


def timesteps_of(network: nn.Module) -> TimestepSampler | None:
    """Return the sampler of timesteps that a network in training holds as `timesteps`, or None."""
    return getattr(unwrapped(network), "timesteps", None)


def losses_with_variance(
    objective: DenoisingObjective, output: Tensor, target: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, *, kind: str,
    vlb_weight: float, pixels: bool,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Return the loss of each sample of a model that learns its variance, and its parts.

    The hybrid loss is L_simple + vlb_weight * L_vlb, and in the second term the mean has no gradient (eq. 16). "vlb" is
    L_vlb alone. As in the authors' code, L_vlb is in bits per dimension, and one timestep stands for all T.

    Args:
        objective: The objective. Its min-SNR weights multiply L_simple.
        output: Output of the network (B, 2C, h, w).
        target: Target of its first C channels (B, C, h, w).
        x0: Latents, shaped like the target.
        x_t: Noised latents, shaped like the target.
        t: Timesteps (B,).
        kind: "hybrid" or "vlb".
        vlb_weight: Weight of L_vlb in the hybrid loss; the paper's lambda, 0.001.
        pixels: Whether the latents are pixels.

    Returns:
        The losses (B,); and `mse` and `vlb` (B,), the two terms without weights, `vlb` in bits per dimension.
    """
    T = objective.schedule.num_timesteps
    term = variational_loss(objective.schedule, x0, x_t, t, output, pixels=pixels, moves_mean=kind == "vlb")
    vlb = T * term
    mse = (output[:, : target.shape[1]].float() - target.float()).square().flatten(1).mean(1)
    parts = {"mse": mse.detach(), "vlb": vlb.detach()}
    if kind == "vlb":
        return vlb, parts
    return objective.weights(t.tolist()).to(mse) * mse + vlb_weight * vlb, parts
