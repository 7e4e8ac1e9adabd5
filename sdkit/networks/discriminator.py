"""The PatchGAN discriminator of adversarial VAE training."""

from __future__ import annotations

from torch import Tensor, nn

from sdkit.errors import ImageError

SMALLEST = 24  # pixels on each side, which give one logit


class Discriminator(nn.Module):
    """A classifier of patches of 70 x 70 pixels: how real does each one look?

    The architecture is that of Isola et al. 2017 (https://arxiv.org/abs/1611.07004, appendix 6.1.2), with three layers
    as in VQGAN (Esser et al. 2021), and weights initialised from N(0, 0.02). GroupNorm replaces BatchNorm, so that a
    logit depends on its own image alone, however batches are split by processes and gradient accumulation.

    Args:
        channels: Channels after the first convolution, a multiple of 16. The next layers have two, four, and eight
            times as many.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for stride in (2, 2, 1):
            layers += [
                nn.Conv2d(channels, 2 * channels, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(32, 2 * channels),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of patches.

        Args:
            x: Images (B, 3, H, W) in [-1, 1], of at least 24 x 24 pixels.

        Returns:
            (B, 1, H/8 - 2, W/8 - 2).

        Raises:
            ImageError: The images are smaller.
        """
        if min(x.shape[2:]) < SMALLEST:
            height, width = x.shape[2:]
            raise ImageError(
                f"the discriminator needs images of at least {SMALLEST} x {SMALLEST} pixels, not {width} x {height}."
            )
        logits: Tensor = self.layers(x)
        return logits
