"""How good a model is: what its VAE loses, and whether its images show what their prompts name.

Fidelity is retrieval: the nearest neighbour of a generated image, by LPIPS features, among all emoji on the same
background (also those that no caption names) must be the one that the prompt names.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from sdkit import images as image_io
from sdkit.atomic import atomic_write
from sdkit.evaluation.similarity import psnr, ssim
from sdkit.networks.autoencoder import VAE
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.progress import progress
from sdkit.recipes.emoji.pictures import BACKGROUNDS, SIDE, Picture, caption, composed, pictures, read, used

SHOWN_ON = ("white", "black", "blue", "yellow")  # backgrounds of the prompts that retrieval judges
SCALE, STEPS = 5.0, 30  # at which models are compared
GRID = 8  # cells a side over which LPIPS features are averaged
FRAME = 4  # pixels at the edge, by which the background's colour is told
BATCH = 32
Measured = dict[str, float | None]


@dataclass(frozen=True)
class Prompt:
    """A picture asked for on a background."""

    picture: Picture
    background: str

    @property
    def text(self) -> str:
        """As training captions are."""
        return caption(self.picture.name, self.background)

    @property
    def held_out(self) -> bool:
        """Whether no training image shows this pair."""
        return self.background == self.picture.held_out


def prompts(n: int) -> list[Prompt]:
    """n pairs that were trained on, spread over the pictures and `SHOWN_ON`."""
    pairs = (Prompt(one, SHOWN_ON[i % len(SHOWN_ON)]) for i, one in enumerate(_spread(n)))
    return [pair if not pair.held_out else Prompt(pair.picture, "white") for pair in pairs]


def prompts_held_out(n: int) -> list[Prompt]:
    """n pairs that were not."""
    return [Prompt(one, one.held_out) for one in _spread(n)]


def _spread(n: int) -> list[Picture]:
    """n pictures, evenly through the table."""
    return [pictures()[i * len(pictures()) // n] for i in range(n)]


class Gallery:
    """LPIPS features of every emoji on a background, kept in a folder (0.3 GB for each background) from one evaluation
    to the next."""

    def __init__(self, drawn: Path, lpips: LPIPS, folder: Path) -> None:
        self.drawn, self.lpips, self.folder = drawn, lpips, folder
        self.names = used(drawn)
        digest = hashlib.sha256(f"{SIDE} {GRID}".encode())
        for name in self.names:
            digest.update(f"{name} {(drawn / f'{name}.webp').stat().st_size}\n".encode())
        for head in lpips.heads:
            digest.update(head.detach().cpu().float().numpy().tobytes())
        self.digest = digest.hexdigest()[:8]

    def ranks(self, background: str, images: Sequence[Image.Image], names: Sequence[str]) -> list[int]:
        """Of each image, how many emoji are nearer to it than the one it should show: 0 where that one is nearest."""
        if not images:
            return []
        reference = self._features(background).float()
        features = self._of(images).float()
        # |a - b|^2 without |a|^2, which is the same for all candidates
        distances = reference.square().sum(1) - 2 * features @ reference.T
        return [int((row < row[self.names.index(name)]).sum()) for row, name in zip(distances, names, strict=True)]

    def _features(self, background: str) -> Tensor:
        colour = BACKGROUNDS[background]
        path = self.folder / f"{bytes(colour).hex()}-{self.digest}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):  # not there, or damaged
            return safetensors.torch.load_file(path)["features"]
        every = [composed(read(self.drawn, name), colour) for name in self.names]
        features = self._of(every, f"emoji on {background}")
        with atomic_write(path) as temporary:
            temporary.write_bytes(safetensors.torch.save({"features": features}))
        return features

    @torch.no_grad()
    def _of(self, images: Sequence[Image.Image], description: str = "features") -> Tensor:
        """(N, D) float16."""
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        parts = [
            self.lpips.features(torch.stack(image_io.to_tensors(batch)), GRID).half()
            for batch in progress(batches, description=description)
        ]
        return torch.cat(parts)


def fidelity(gallery: Gallery, asked: Sequence[Prompt], images: Sequence[Image.Image]) -> Measured:
    """Shares of images, from 0 to 1: retrieved first and among the first five, and of the background asked for.

    Retrieval judges those of `SHOWN_ON` alone, whose galleries are there; where there is none of them it is None.
    """
    ranks: list[int] = []
    for background in SHOWN_ON:
        chosen = [(image, p.picture.file) for image, p in zip(images, asked, strict=True) if p.background == background]
        ranks += gallery.ranks(background, [image for image, _ in chosen], [name for _, name in chosen])
    right = [background_of(image) == p.background for image, p in zip(images, asked, strict=True)]
    return {
        "prompts": len(asked),
        "retrieved": len(ranks),
        "top1": sum(rank < 1 for rank in ranks) / len(ranks) if ranks else None,
        "top5": sum(rank < 5 for rank in ranks) / len(ranks) if ranks else None,
        "background": sum(right) / len(right),
    }


def background_of(image: Image.Image) -> str:
    """The named colour nearest, in sRGB, to the median of the image's edge."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    colour = np.median(pixels[~inner], axis=0)
    return min(BACKGROUNDS, key=lambda name: math.dist(colour, BACKGROUNDS[name]))


def generated(model: StableDiffusion, asked: Sequence[Prompt], scale: float, steps: int) -> list[Image.Image]:
    """One image of each prompt, of seeds 0, 1, 2 ..., by DDIM."""
    texts = [prompt.text for prompt in asked]
    made: list[Image.Image] = model(texts, guidance_scale=scale, num_inference_steps=steps, batch_size=BATCH)
    return made


def vae_quality(vae: VAE, images: Sequence[Image.Image], lpips: LPIPS) -> Measured:
    """Averages over images of what is lost through the VAE: PSNR (dB), SSIM and LPIPS."""
    rows = []
    for i in range(0, len(images), BATCH):
        batch = list(images[i : i + BATCH])
        through = vae.reconstruct(batch)
        x, y = (torch.stack(image_io.to_tensors(side)) for side in (batch, through))
        with torch.no_grad():
            rows += list(zip(psnr(batch, through), ssim(batch, through), lpips(x, y), strict=True))
    names = ("psnr", "ssim", "lpips")
    return {name: float(np.mean([float(row[k]) for row in rows])) for k, name in enumerate(names)}
