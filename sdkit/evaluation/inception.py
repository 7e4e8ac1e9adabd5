"""The Inception network of the FID (Heusel et al. 2017), in the state dict layout of pytorch-fid and torch-fidelity.

It is Inception v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567) as TensorFlow trained it in 2015. It differs
from later versions: it has 1008 classes, its average pooling leaves the padding out, and its last block takes a maximum
where the others take an average.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 2048
"""Number of features."""
CLASSES = 1008
"""Number of classes; 1,000 of them are ImageNet's."""


class Inception(nn.Module):
    """Inception v3 of the FID. Its weights are random until a state dict is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = BlockA(192, pooled=32)
        self.Mixed_5c = BlockA(256, pooled=64)
        self.Mixed_5d = BlockA(288, pooled=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, inner=128)
        self.Mixed_6c = BlockC(768, inner=160)
        self.Mixed_6d = BlockC(768, inner=160)
        self.Mixed_6e = BlockC(768, inner=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, largest=False)
        self.Mixed_7c = BlockE(2048, largest=True)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled features, and the logits.

        Args:
            x: Images (B, 3, 299, 299) in [-1, 1].

        Returns:
            Features (B, 2048), and logits (B, 1008) without the bias, as the Inception score takes them.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


class Convolution(nn.Module):
    """Convolution, batch normalisation, and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, h, w)."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BlockA(nn.Module):
    """Branches of 1 x 1, 5 x 5, and two 3 x 3 convolutions, and of average pooling (figure 5 of the paper)."""

    def __init__(self, inputs: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1 = Convolution(inputs, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 224 + pooled, h, w)."""
        fives = self.branch5x5_2(self.branch5x5_1(x))
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), fives, threes, self.branch_pool(_averaged(x))], dim=1)


class BlockB(nn.Module):
    """Halves the resolution: branches of one and of three 3 x 3 convolutions, and of maximum pooling (figure 10)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 480 + inputs, h/2, w/2)."""
        threes = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), threes, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """Branches of 1 x 1, of one and of two pairs of 1 x 7 and 7 x 1 convolutions, and of average pooling (figure 6)."""

    def __init__(self, inputs: int, *, inner: int) -> None:
        super().__init__()
        flat, tall = ((1, 7), (0, 3)), ((7, 1), (3, 0))  # kernels with their padding
        self.branch1x1 = Convolution(inputs, 192, 1)
        self.branch7x7_1 = Convolution(inputs, inner, 1)
        self.branch7x7_2 = Convolution(inner, inner, flat[0], padding=flat[1])
        self.branch7x7_3 = Convolution(inner, 192, tall[0], padding=tall[1])
        self.branch7x7dbl_1 = Convolution(inputs, inner, 1)
        self.branch7x7dbl_2 = Convolution(inner, inner, tall[0], padding=tall[1])
        self.branch7x7dbl_3 = Convolution(inner, inner, flat[0], padding=flat[1])
        self.branch7x7dbl_4 = Convolution(inner, inner, tall[0], padding=tall[1])
        self.branch7x7dbl_5 = Convolution(inner, 192, flat[0], padding=flat[1])
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 768, h, w)."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_averaged(x))], dim=1)


class BlockD(nn.Module):
    """Halves the resolution: branches of 3 x 3, of 7 x 7 and 3 x 3 convolutions, and of maximum pooling."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inputs, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 512 + inputs, h/2, w/2)."""
        threes = self.branch3x3_2(self.branch3x3_1(x))
        sevens = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([threes, sevens, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """Branches of 1 x 1, and of 3 x 3 convolutions that split into 1 x 3 and 3 x 1, and of pooling (figure 7).

    Args:
        inputs: Number of channels.
        largest: Whether the last branch pools by the maximum, not by the average.
    """

    def __init__(self, inputs: int, *, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 2048, h, w)."""
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.largest else _averaged(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(parts, dim=1)


def _averaged(x: Tensor) -> Tensor:
    """Return the average over the 3 x 3 pixels around each pixel, without those outside the image."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
