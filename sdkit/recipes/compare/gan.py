"""A small GAN (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661): the one system without a stage of its own.

The shapes are those of DCGAN (Radford et al. 2016, https://arxiv.org/abs/1511.06434), the losses the hinge losses of
sdkit's discriminators, with spectral normalisation (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkit.diffusion.losses import hinge_discriminator, hinge_generator
from sdkit.images import to_tensors
from sdkit.recipes.compare.data import Images
from sdkit.recipes.compare.weights import load_weights

LATENTS = 64
BATCH = 32
RATE, BETAS = 4e-4, (0.5, 0.99)
DECAY = 0.995
"""Decay of the moving average of the generator, which draws."""
SHIFT = 1
"""Largest shift in pixels of the images that the discriminator sees, real and drawn ones alike."""
WEIGHTS = "generator.safetensors"


class Generator(nn.Sequential):
    """Latents (B, 64) to images (B, 1, 16, 16) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(LATENTS, 64 * 16),
            nn.Unflatten(1, (64, 4, 4)),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 48, 4, stride=2, padding=1),  # 8 x 8
            nn.BatchNorm2d(48),
            nn.ReLU(),
            nn.ConvTranspose2d(48, 32, 4, stride=2, padding=1),  # 16 x 16
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 1, 3, padding=1),
            nn.Tanh(),
        )

    @torch.no_grad()
    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """Return an image (B, 3, 16, 16) for each generator."""
        z = torch.stack([torch.randn(LATENTS, generator=one) for one in generators])
        images: Tensor = self(z)
        return images.expand(-1, 3, -1, -1)


def discriminator() -> nn.Module:
    """Return a network of images (B, 1, 16, 16) to logits (B, 1)."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(1, 32, 4, stride=2, padding=1)),  # 8 x 8
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(32, 64, 4, stride=2, padding=1)),  # 4 x 4
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(64, 96, 3, padding=1)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        norm(nn.Linear(96 * 16, 1)),
    )


def shifted(images: Tensor, source: torch.Generator) -> Tensor:
    """Shift a batch by up to a pixel, differentiably. The background moves in from the border.

    Without this, a discriminator that sees 1,200 images learns them by heart (Zhao et al. 2020,
    https://arxiv.org/abs/2006.10738).
    """
    padded = nn.functional.pad(images, (SHIFT,) * 4, value=-1.0)
    top, left = torch.randint(2 * SHIFT + 1, (2,), generator=source).tolist()
    height, width = images.shape[2:]
    return padded[:, :, top : top + height, left : left + width]


def train_gan(pictures: Images, out: Path, steps: int, seed: int = 0) -> None:
    """Train a generator on pictures, and write its moving average as out/generator.safetensors.

    Args:
        pictures: Training pictures.
        out: Folder of the result.
        steps: Steps of both networks.
        seed: Random seed.
    """
    real = torch.stack(to_tensors(list(pictures)))[:, :1]  # grey: the first of three equal channels
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawing, judging, average = Generator(), discriminator(), Generator()
    average.load_state_dict(drawing.state_dict())
    optimizers = [torch.optim.Adam(one.parameters(), RATE, BETAS) for one in (drawing, judging)]
    for step in range(steps):
        chosen = real[torch.randint(len(real), (BATCH,), generator=source)]
        drawn = drawing(torch.randn(BATCH, LATENTS, generator=source))
        loss = hinge_discriminator(judging(shifted(chosen, source)), judging(shifted(drawn.detach(), source)))
        _step(optimizers[1], loss)
        _step(optimizers[0], hinge_generator(judging(shifted(drawn, source))))
        decay = min(DECAY, (1 + step) / (10 + step))
        for kept, new in zip(average.state_dict().values(), drawing.state_dict().values(), strict=True):
            kept.copy_(torch.lerp(kept, new, 1 - decay) if kept.is_floating_point() else new)
    out.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in average.state_dict().items()}, out / WEIGHTS)


def load_generator(folder: Path) -> Generator:
    """Load a trained generator. Raise SourceError if it is missing or damaged."""
    generator = Generator()
    load_weights(generator, folder / WEIGHTS)
    return generator.eval()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
