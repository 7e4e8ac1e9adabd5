"""Run a network on large images in overlapping tiles, blended so that no seam shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.arguments import whole_number
from sdkit.engines.compile import eager
from sdkit.progress import progress

SMALLEST_TILE = 16  # latents on each side


def check_tile(tile: int | None, factor: int = 1) -> None:
    """Raise ArgumentError if tiles are too small. None (tile as needed) and 0 (never tile) are valid.

    Args:
        tile: The side in pixels.
        factor: Pixels that a latent spans on each side. The default, 1, is the smallest of any VAE, for use before a
            VAE is loaded: it rejects tiles that are too small for every VAE.
    """
    if tile:
        whole_number("tile (0 is none)", tile, SMALLEST_TILE * factor)


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, down: int = 1, up: int = 1) -> Tensor:
    """Compute `run(x)` in overlapping square tiles.

    Overlaps are blended with weights that fall to almost 0 at a tile's edge, where convolutions lack
    context. The weights are normalised: a constant stays constant.

    Args:
        run: A function of (B, C, h, w) that changes the resolution by `up` / `down`.
        x: (B, C, H, W).
        tile: Side of a tile in x. Neighbours overlap by at least about a quarter of it.
        down: Factor by which `run` reduces the resolution. Tiles begin at multiples of it.
        up: Factor by which `run` increases the resolution.

    Returns:
        `run(x)`, float32, on the CPU.
    """
    height, width = x.shape[2:]
    boxes = [(top, left) for top in starts(height, tile, down) for left in starts(width, tile, down)]
    total = weight = torch.empty(0)
    for top, left in progress(boxes, description="tiles"):
        y = run(x[:, :, top : top + tile, left : left + tile]).float().cpu()
        if not total.numel():
            total = torch.zeros(*y.shape[:2], height * up // down, width * up // down)
            weight = torch.zeros(1, 1, *total.shape[2:])
        rows, columns = y.shape[2:]
        window = ramp(rows)[:, None] * ramp(columns)[None, :]
        t, s = top * up // down, left * up // down
        total[:, :, t : t + rows, s : s + columns] += window * y
        weight[:, :, t : t + rows, s : s + columns] += window
    return total / weight


@contextmanager
def whole_image_statistics(network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Iterator[None]:
    """Make every GroupNorm of `network` use the mean and variance of the whole x while the context is open.

    Without this, each tile is normalised by its own content, and brightness and contrast differ from tile to tile. The
    statistics come from one run over x downsampled (nearest) to the size of a tile.

    Args:
        network: The network whose norms are replaced, for this thread only.
        run: The function that calls the network.
        x: (B, C, H, W).
        tile: Side of a tile in x.
    """
    owner = threading.get_ident()  # other threads may use the network meanwhile, without tiles
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def grouped(norm: nn.GroupNorm, h: Tensor) -> Tensor:  # (B, C, ...) -> (B, groups, the rest)
        return h.float().reshape(len(h), norm.num_groups, -1)

    def observe(norm: nn.GroupNorm, inputs: Any, _: Tensor) -> None:
        if threading.get_ident() != owner:
            return
        variance, mean = torch.var_mean(grouped(norm, inputs[0]), dim=2, keepdim=True, correction=0)
        seen[norm] = mean, torch.rsqrt(variance + norm.eps)

    def replace(norm: nn.GroupNorm, inputs: Any, output: Tensor) -> Tensor:
        if threading.get_ident() != owner:
            return output
        h, (mean, scale) = inputs[0], seen[norm]
        normal = ((grouped(norm, h) - mean) * scale).reshape(h.shape)
        shape = (1, -1) + (1,) * (h.ndim - 2)
        return (normal * norm.weight.reshape(shape) + norm.bias.reshape(shape)).to(h.dtype)

    if not norms:
        yield
        return
    with ExitStack() as hooks:
        hooks.enter_context(eager())
        for norm in norms:
            hooks.enter_context(norm.register_forward_hook(observe))
        run(F.interpolate(x, size=(min(tile, x.shape[2]), min(tile, x.shape[3])), mode="nearest"))
    with ExitStack() as hooks:
        hooks.enter_context(eager())
        for norm in norms:
            hooks.enter_context(norm.register_forward_hook(replace))
        yield


def starts(length: int, tile: int, multiple: int) -> list[int]:
    """Return where tiles begin along a side: multiples of `multiple`, evenly spaced, overlapping by about a quarter."""
    if length <= tile:
        return [0]
    n = 1 + -(-(length - tile) // (tile * 3 // 4))
    return [round(i * (length - tile) / (n - 1) / multiple) * multiple for i in range(n)]


def ramp(n: int) -> Tensor:
    """Return the weights (n,) of a tile along one side: 1 in the middle half, falling smoothly to almost 0 at both
    edges."""
    edge = max(1, n // 4)
    distance = torch.minimum(torch.arange(n) + 0.5, n - 0.5 - torch.arange(n)) / edge
    return torch.sin(distance.clamp(max=1) * torch.pi / 2) ** 2
