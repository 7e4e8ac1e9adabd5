"""Learning a codebook that does not collapse: moving averages, a k-means start, and restarts of dead codes.

With the codebook loss alone (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, eq. 3), a code that is never
chosen is never updated, and most codes of a small data set die that way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor, nn

from sdkit.networks.autoencoder_kinds import nearest_codes

KMEANS_ITERATIONS = 10
DEAD = 0.1
"""A code is dead if it is chosen less often than this, on average, relative to an equal share of all latents."""


class Chosen(NamedTuple):
    """How often each code was chosen, and by which latents, as shares of all latents.

    Attributes:
        shares: (N,), the share of the latents that chose each code; they add up to 1.
        sums: (N, C), the sum of the latents that chose each code, divided by the number of all latents.
    """

    shares: Tensor
    sums: Tensor

    @classmethod
    def of(cls, latents: Tensor, numbers: Tensor, size: int) -> Chosen:
        """Count latents (M, C) that chose the codes with these numbers (M,), of a codebook of `size` codes."""
        counts = torch.bincount(numbers, minlength=size).to(latents)
        sums = latents.new_zeros(size, latents.shape[1]).index_add_(0, numbers, latents)
        return cls(counts / len(latents), sums / len(latents))


class CodebookAverages(nn.Module):
    """The moving averages that a codebook is made of (van den Oord et al. 2017, appendix A.1).

    They are buffers, so that checkpoints hold them, and a skipped step leaves no trace.

    Args:
        codebook: The codes (N, C) to begin with.
        decay: Factor gamma of the old averages in an update.
        normalize: Whether codes have length 1.
        learned: Whether the codes are already good. Other codes are replaced by k-means at the first step.

    Attributes:
        shares: N_i of eq. 6, (N,), divided by the number of latents, so that steps of any size have equal weight.
        sums: m_i of eq. 7, (N, C), divided alike.
        started: Whether the codes are learned.
    """

    shares: Tensor
    sums: Tensor
    started: Tensor

    def __init__(self, codebook: Tensor, *, decay: float, normalize: bool = False, learned: bool = False) -> None:
        super().__init__()
        self.decay, self.normalize = decay, normalize
        self.register_buffer("shares", torch.full((len(codebook),), 1 / len(codebook)))
        self.register_buffer("sums", codebook.detach().float() / len(codebook))
        self.register_buffer("started", torch.tensor(learned))

    @property
    def codebook(self) -> Tensor:
        """The codes (N, C), e_i of eq. 8."""
        codes = self.sums / self.shares[:, None]
        return F.normalize(codes, dim=1) if self.normalize else codes

    @property
    def dead(self) -> Tensor:
        """Whether each code is dead (N,)."""
        return self.shares < DEAD / len(self.shares)

    def step(self, chosen: Chosen, latents: Callable[[], Tensor], generator: torch.Generator) -> int:
        """Learn from the latents of an optimizer step.

        Args:
            chosen: How often these latents chose each code.
            latents: A function that returns the latents (M, C). It is called only if codes are to be replaced.
            generator: The random generator of this step, on the CPU.

        Returns:
            The number of codes that were dead, and have been restarted.
        """
        if not self.started:
            self._replace(torch.ones_like(self.dead), kmeans(latents(), self.codebook, generator, self.normalize))
            self.started.fill_(True)
            return 0
        self.shares.lerp_(chosen.shares, 1 - self.decay)
        self.sums.lerp_(chosen.sums, 1 - self.decay)
        dead = self.dead
        if dead.any():
            self._replace(dead, moved(self.codebook, dead, latents(), generator))
        return int(dead.sum())

    def _replace(self, which: Tensor, codebook: Tensor) -> None:
        """Give some codes (N,) new values, and an equal share of the latents, so that they live for some steps."""
        self.shares[which] = 1 / len(self.shares)
        self.sums[which] = codebook[which] / len(self.shares)


def of_all_processes(latents: Tensor, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the latents (M, C) of a step in the order of samples, which does not depend on the processes.

    Args:
        latents: Those of this process (B, h w, C).
        batches: Its micro-batches, each with the numbers `n` (b,) of its samples.
    """
    order = gather(torch.cat([batch["n"] for batch in batches])).argsort()
    everything: Tensor = gather(latents)
    return everything[order].flatten(0, 1)


def moved(codebook: Tensor, which: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Return the codebook with some codes replaced by different latents.

    Latents are drawn with probabilities proportional to their squared distance from the nearest code, as in k-means++
    (Arthur & Vassilvitskii 2007). If fewer latents differ from all codes, fewer codes are replaced.

    Args:
        codebook: (N, C).
        which: Which codes are replaced, (N,).
        latents: (M, C).
        generator: A generator on the CPU.
    """
    distances = (latents - nearest_codes(codebook, latents[..., None, None])[0][..., 0, 0]).square().sum(1).cpu()
    places = which.nonzero()[:, 0][: int((distances > 0).sum())]
    codebook = codebook.clone()
    if len(places):
        drawn = torch.multinomial(distances, len(places), generator=generator)
        codebook[places] = latents[drawn.to(latents.device)]
    return codebook


def kmeans(latents: Tensor, codebook: Tensor, generator: torch.Generator, normalize: bool = False) -> Tensor:
    """Return the centres (N, C) of latents that Lloyd's algorithm finds.

    Args:
        latents: (M, C).
        codebook: (N, C), the codes that remain if there are fewer different latents than codes.
        generator: A generator on the CPU.
        normalize: Whether centres have length 1 (spherical k-means).
    """
    chosen = Chosen(codebook.new_zeros(len(codebook)), torch.zeros_like(codebook))
    for _ in range(KMEANS_ITERATIONS):
        codebook = moved(codebook, chosen.shares == 0, latents, generator)
        numbers = nearest_codes(codebook, latents[..., None, None])[1].flatten()
        chosen = Chosen.of(latents, numbers, len(codebook))
        used = chosen.shares > 0
        codebook[used] = chosen.sums[used] / chosen.shares[used, None]
        if normalize:
            codebook = F.normalize(codebook, dim=1)
    return codebook
