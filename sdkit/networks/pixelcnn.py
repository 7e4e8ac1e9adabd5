"""The gated PixelCNN (van den Oord et al. 2016, https://arxiv.org/abs/1606.05328) over the codes of a VQ model.

The image is read in raster order: row by row, each from left to right. Two stacks of convolutions see the past of a
position, without a blind spot: the vertical stack all rows above, the horizontal stack what is left of it in its own
row. A masked convolution is computed as one with a smaller kernel, and a shift (section 2.2 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.networks.prior_shape import PriorShape

FIRST_KERNEL, KERNEL = 7, 3
"""Sides of the kernels of the first layer, whose mask is A, and of the others, whose mask is B."""


class GatedPixelCNN(nn.Module):
    """A gated PixelCNN: the probability of each code, given those before it and a condition.

    A class is an embedding that all positions share (eq. 4 of the paper); a map of codes is one that differs between
    positions (eq. 5), and may be coarser than the image, as in VQ-VAE-2.

    Args:
        shape: The shape; its condition is "class", "map", or None.
    """

    def __init__(self, shape: PriorShape) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.embedding = nn.Embedding(shape.codes, width)
        self.condition = None if shape.condition is None else Condition(shape)
        conditioned, last = shape.condition is not None, shape.layers - 1
        self.layers = nn.ModuleList(
            GatedLayer(width, FIRST_KERNEL if i == 0 else KERNEL, first=i == 0, last=i == last, conditioned=conditioned)
            for i in range(shape.layers)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, shape.codes, 1))

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the logits (B, h, w, N) of each code, given the codes before it.

        Args:
            codes: (B, h, w), int64, of any height and width.
            condition: Classes (B,), or maps (B, h' >= h / ratio, w / ratio), int64; None if there is no condition.
        """
        features = self.condition(condition) if self.condition is not None else None
        return self._logits(codes, features)

    def _logits(self, codes: Tensor, features: Tensor | None) -> Tensor:
        if features is not None and features.shape[2] > 1:
            features = features[:, :, : codes.shape[1]]
        vertical = horizontal = self.embedding(codes).movedim(-1, 1)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, features)
        logits: Tensor = self.head(horizontal).movedim(1, -1)
        return logits

    def stepper(self, condition: Tensor | None, size: tuple[int, int], *, cached: bool = True) -> Step:  # noqa: ARG002 - the interface of both kinds
        """Return a function (codes (B, h, w), i, j) -> logits (B, N) of position (i, j); codes after it are ignored.

        Args:
            condition: As in `forward`.
            size: Height and width of the images in codes.
            cached: Ignored; there is no cache.
        """
        features = self.condition(condition) if self.condition is not None else None

        def step(codes: Tensor, i: int, j: int) -> Tensor:
            return self._logits(codes[:, : i + 1], features)[:, i, j]  # rows below are never seen

        return step


Step = Callable[[Tensor, int, int], Tensor]
"""Signature: step(codes (B, h, w), i, j) -> logits (B, N) of the code at row i and column j."""


class Condition(nn.Module):
    """The features of a condition (B, C, 1, 1), or (B, C, h, w) for a map.

    Args:
        shape: The shape of the prior.
    """

    def __init__(self, shape: PriorShape) -> None:
        super().__init__()
        self.ratio, width = shape.ratio, shape.width
        self.embedding = nn.Embedding(shape.tokens + 1, width)
        self.surroundings = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2) if shape.condition == "map" else None

    def forward(self, condition: Tensor) -> Tensor:
        """Return the features of classes (B,) or maps (B, h', w')."""
        features: Tensor = self.embedding(condition)
        if self.surroundings is None:
            return features[:, :, None, None]
        features = features.movedim(-1, 1)
        features = features + self.surroundings(features)  # a map may be seen as a whole
        return features.repeat_interleave(self.ratio, 2).repeat_interleave(self.ratio, 3)


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2 of the paper).

    Args:
        width: C, the number of channels.
        kernel: Side k of the kernel.
        first: Whether the mask is A: a position does not see itself.
        last: Whether nothing reads the vertical stack after this layer.
        conditioned: Whether there is a condition.
    """

    def __init__(self, width: int, kernel: int, *, first: bool, last: bool, conditioned: bool) -> None:
        super().__init__()
        self.radius, self.first, self.last = kernel // 2, first, last
        # Rows from k // 2 above to this one. They are shifted by one where the horizontal stack reads them.
        self.vertical = nn.Conv2d(width, 2 * width, (self.radius + 1, kernel))
        # Columns from k // 2 to the left to this one, which mask A leaves out.
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.radius + (not first)))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        # Without the layers that nothing reads: processes wait for the gradient of each parameter.
        self.condition = nn.Conv2d(width, 2 * width, 1) if conditioned else None
        self.vertical_condition = nn.Conv2d(width, 2 * width, 1) if conditioned and not last else None

    def forward(self, vertical: Tensor, horizontal: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the outputs of the two stacks, both (B, C, h, w).

        Args:
            vertical: (B, C, h, w).
            horizontal: (B, C, h, w).
            features: Features of the condition (B, C, h or 1, w or 1), or None.
        """
        r = self.radius
        below = self.vertical(F.pad(vertical, (r, r, r, 0)))
        above = F.pad(below[:, :, :-1], (0, 0, 1, 0))
        beside = F.pad(horizontal, (r, 0, 0, 0))
        beside = self.horizontal(beside[:, :, :, :-1] if self.first else beside)
        new = beside + self.link(above)
        if features is not None and self.condition is not None:
            new = new + self.condition(features)
        if features is not None and self.vertical_condition is not None:
            below = below + self.vertical_condition(features)
        added = self.out(gated(new))
        # The first layer has no residual connection: it would hand on the code itself.
        return gated(below), added if self.first else horizontal + added


def gated(features: Tensor) -> Tensor:
    """Return tanh(a) * sigmoid(b) (eq. 2 of the paper) of features (B, 2C, h, w) whose halves are a and b."""
    a, b = features.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)
