"""Muon: momentum whose updates are orthogonalised, for weight matrices; AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, which raise small singular values fast (Jordan et al. 2024)."""
ITERATIONS = 5
RMS = 0.2  # root mean square of AdamW's usual updates, which Muon's are scaled to (Liu et al. 2025, section 2.2)
FIRST_AND_LAST = ("conv_in", "conv_out", "patch_embedding")  # diffusers' names, and transformers' in vision models


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for parameter groups with `matrices`, and AdamW for all others.

    A convolution's weights (out, in, h, w) count as a matrix (out, in * h * w). The learning rate and the weight decay
    mean the same for both, because Muon's updates have the root mean square of AdamW's (Liu et al. 2025, eq. 4).

    Args:
        params: Parameter groups; the option `matrices` of a group is False unless it is given.
        lr: Learning rate.
        betas: Decay rates of AdamW's moving averages.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "matrices": False, "eps": 1e-8}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 (Accelerate gives it)
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if group["matrices"]:
                        update = _muon(p.grad, self.state[p])
                    else:
                        update = _adam(p.grad, self.state[p], group["betas"], group["eps"])
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _muon(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Return Muon's update, with Nesterov momentum, before it is multiplied by the learning rate."""
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
    matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)
    scale = RMS * math.sqrt(max(matrix.shape))
    update: Tensor = scale * orthogonalised(matrix)
    return update.reshape(gradient.shape)


def _adam(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """Return Adam's update (Kingma & Ba 2015, algorithm 1), before it is multiplied by the learning rate."""
    if not state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
    state["step"] += 1
    first, second = betas
    mean: Tensor = state["exp_avg"].lerp_(gradient, 1 - first)
    square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    deviation = (square / (1 - second ** state["step"])).sqrt_().add_(eps)
    update: Tensor = mean / deviation / (1 - first ** state["step"])
    return update


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the matrix with all singular values moved close to 1, by a Newton-Schulz iteration.

    An iteration multiplies X by Q = a + b X X^T + c (X X^T)^2. Here X X^T and the product of all Q are computed, and X
    is multiplied once, in the end: for a convolution's wide matrix this is a fraction of the work.

    Args:
        matrix: (m, n).

    Returns:
        (m, n), with singular values roughly from 0.7 to 1.2 if those of `matrix` are not tiny beside the largest.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    gram = x @ x.mT
    product = q = a * identity + b * gram + c * gram @ gram
    for _ in range(ITERATIONS - 1):
        gram = q @ gram @ q
        q = a * identity + b * gram + c * gram @ gram
        product = q @ product
    orthogonal: Tensor = product @ x
    return orthogonal.mT if is_tall else orthogonal


def split(groups: Iterable[dict[str, Any]], network: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups of a network with the weight matrices of its hidden layers in groups of their own.

    Biases, gains, embeddings (those of an image's patches, too), and diffusers' first and last convolutions are left to
    AdamW (Jordan et al. 2024).

    Args:
        groups: Parameter groups of any optimizer.
        network: The network with these parameters.
    """
    embeddings = {p for module in network.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    matrices = {
        p
        for name, p in network.named_parameters()
        if p.ndim >= 2
        and name.endswith("weight")  # not diffusers' `positional_embedding` (1, N, D)
        and p not in embeddings
        and not any(layer in name for layer in FIRST_AND_LAST)
    }
    both = [
        group | {"params": [p for p in group["params"] if (p in matrices) == are_matrices], "matrices": are_matrices}
        for group in groups
        for are_matrices in (True, False)
    ]
    return [group for group in both if group["params"]]
