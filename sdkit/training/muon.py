"""Muon: momentum whose updates are orthogonalised, for weight matrices; AdamW for all other parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, which raise small singular values fast (Jordan et al. 2024)."""
ITERATIONS = 5
WIDE = 4  # columns for each row from which a matrix counts as wide
AT_ONCE = 2**20  # elements of small matrices of one shape that are orthogonalised at once
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
        dtype: Data type in which matrices are orthogonalised: float32 or bfloat16.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "matrices": False, "eps": 1e-8}
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 (Accelerate gives it)
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            gradients = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                updates = self._muon(gradients)
            else:
                updates = ((p, _adam(grad, self.state[p], group["betas"], group["eps"])) for p, grad in gradients)
            for p, update in updates:
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _muon(self, gradients: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield matrices and their updates, before these are multiplied by the learning rate.

        Args:
            gradients: Pairs of matrix and gradient.
        """
        by_shape: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, grad in gradients:
            by_shape[len(p), p[0].numel()].append((p, grad))
        for (rows, columns), alike in by_shape.items():
            count = max(1, AT_ONCE // (rows * columns))
            for i in range(0, len(alike), count):
                some = alike[i : i + count]
                directions = torch.stack([_direction(grad, self.state[p]) for p, grad in some])
                updates = RMS * math.sqrt(max(rows, columns)) * orthogonalised(directions, self.dtype)
                yield from ((p, update.reshape(p.shape)) for (p, _), update in zip(some, updates, strict=True))


def _direction(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the matrix that Muon orthogonalises: the gradient with Nesterov momentum."""
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
    return gradient.lerp(momentum, MOMENTUM).flatten(1)


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


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return matrices with all singular values moved close to 1, by a Newton-Schulz iteration.

    An iteration multiplies X by Q = a + b X X^T + c (X X^T)^2. For a convolution's wide matrix it is a fraction of the
    work to compute X X^T and the product of all Q, and to multiply X once, in the end. bfloat16 is too coarse for the
    product, so that these are iterated in their own type.

    Args:
        matrices: (N, m, n).
        dtype: Data type of the iteration, float32 or bfloat16, except for wide matrices.

    Returns:
        (N, m, n), with singular values roughly from 0.7 to 1.2 if those of a matrix are not tiny beside the largest.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    is_wide = x.shape[-1] >= WIDE * x.shape[-2]
    orthogonal = _product(x) @ x if is_wide else _iterated(x.to(dtype)).to(x.dtype)
    return orthogonal.mT if is_tall else orthogonal


def _product(x: Tensor) -> Tensor:
    """Return the product (N, m, m) of the Q of all iterations from matrices (N, m, n)."""
    a, b, c = COEFFICIENTS
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    gram = x @ x.mT
    product = q = a * identity + b * gram + c * gram @ gram
    for _ in range(ITERATIONS - 1):
        gram = q @ gram @ q
        q = a * identity + b * gram + c * gram @ gram
        product = q @ product
    return product


def _iterated(x: Tensor) -> Tensor:
    """Return matrices (N, m, n) after all iterations."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
