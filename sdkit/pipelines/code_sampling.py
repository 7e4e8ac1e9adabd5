"""Drawing the codes of images with a prior: one by one, with temperature, top-k, top-p, and guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from sdkit.arguments import number, whole_number
from sdkit.diffusion.guidance import cfg, check_scale
from sdkit.errors import ArgumentError
from sdkit.networks.code_prior import CodePrior


@dataclass(frozen=True, kw_only=True)
class CodeSampling:
    """How codes are drawn from their probabilities.

    Attributes:
        temperature: Divisor of the logits; 1 draws from the prior itself, 0 takes the likeliest code.
        top_k: Number of the likeliest codes to draw from; None draws from all.
        top_p: Draw from the fewest of the likeliest codes that have this probability together (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751); None draws from all.
        guidance_scale: Scale of classifier-free guidance on the logits; 1 turns it off.

    Raises:
        ArgumentError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", number("temperature", self.temperature, 0, 1000))
        if self.top_k is not None:
            whole_number("top_k", self.top_k, 1)
        if self.top_p is not None and number("top_p", self.top_p, 0, 1) == 0:
            raise ArgumentError("top_p must be above 0; for the likeliest code alone, take temperature 0.")
        check_scale(self.guidance_scale)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, N), float64, to draw codes with, of logits (B, N)."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        # Shifted, so that the largest logit is 0 and does not overflow at the lowest temperatures.
        p = torch.softmax((logits - logits.amax(1, keepdim=True)) / self.temperature, dim=1)
        if self.top_k is None and self.top_p is None:
            return p
        ordered, order = p.sort(dim=1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = 0
            ordered /= ordered.sum(1, keepdim=True)
        if self.top_p is not None:
            before = ordered.cumsum(1) - ordered
            ordered[before >= self.top_p] = 0
        return torch.zeros_like(p).scatter_(1, order, ordered / ordered.sum(1, keepdim=True))


class SamplingKeywords(TypedDict, total=False):
    """The fields of `CodeSampling` as keywords, for type checkers."""

    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float


def drawn(p: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw a code for each image, by one uniform number of the image's own generator.

    Args:
        p: Probabilities (B, N), float64.
        generators: A generator on the CPU for each image.

    Returns:
        (B,), int64, on the CPU.
    """
    uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=one) for one in generators])
    cumulative = p.cpu().cumsum(1)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return found[:, 0].clamp(max=p.shape[1] - 1)


@torch.no_grad()
def draw_codes(
    prior: CodePrior,
    generators: Sequence[torch.Generator],
    *,
    condition: Tensor | None = None,
    uncond: Tensor | None = None,
    size: tuple[int, int] | None = None,
    known: Tensor | None = None,
    sampling: CodeSampling | None = None,
    cached: bool = True,
    before_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draw the codes of B images in raster order. An image does not depend on the others of its batch.

    Args:
        prior: The prior.
        generators: The generator of each image, on the CPU.
        condition: The conditions (B, ...), int64; None if the prior has none.
        uncond: The conditions that stand for none, shaped alike; for guidance.
        size: Height and width in codes; None is the prior's grid.
        known: The first rows of the images (B, r, w), which are kept.
        sampling: How codes are drawn; None draws from the prior itself.
        cached: Whether a transformer keeps the keys and values of earlier codes.
        before_step: Called before each pass of the prior.

    Returns:
        Codes (B, h, w), int64, on the CPU.
    """
    sampling = CodeSampling() if sampling is None else sampling
    height, width = prior.shape.grid if size is None else size
    guided = condition is not None and sampling.guidance_scale != 1
    if guided:
        assert condition is not None
        assert uncond is not None
        condition = torch.cat([condition, uncond])
    device = next(prior.parameters()).device
    codes = torch.zeros(len(generators), height, width, dtype=torch.int64, device=device)
    rows = 0 if known is None else known.shape[1]
    if known is not None:
        codes[:, :rows] = known.to(device)
    step = prior.stepper(None if condition is None else condition.to(device), (height, width), cached=cached)
    for i in range(rows, height):
        for j in range(width):
            if before_step is not None:
                before_step()
            logits = step(torch.cat([codes, codes]) if guided else codes, i, j)
            if guided:
                with_condition, without = logits.double().chunk(2)
                logits = cfg(without, with_condition, sampling.guidance_scale)
            codes[:, i, j] = drawn(sampling.probabilities(logits), generators).to(device)
    return codes.cpu()
