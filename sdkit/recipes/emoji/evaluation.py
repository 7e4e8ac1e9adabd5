"""Metrics of a model: the quality of its VAE's reconstructions, and the fidelity of its images to their prompts.

Fidelity is measured by retrieval: the nearest neighbour of a generated image, by LPIPS features, should be the emoji
that the prompt names. Candidates are all emoji on the same background, including those that no caption names.
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

SHOWN_ON = ("white", "black", "blue", "yellow")  # backgrounds on which retrieval is measured
SCALE, STEPS = 5.0, 30  # guidance scale and sampling steps at which models are compared
GRID = 8  # LPIPS features are averaged over a grid of this many cells on a side
FRAME = 4  # width in pixels of the edge that gives the colour of the background
BATCH = 32
Measured = dict[str, float | None]


@dataclass(frozen=True)
class Prompt:
    """A prompt for a picture on a background.

    Attributes:
        picture: The picture.
        background: Name of the background's colour.
    """

    picture: Picture
    background: str

    @property
    def text(self) -> str:
        """The prompt in words, like a training caption."""
        return caption(self.picture.name, self.background)

    @property
    def held_out(self) -> bool:
        """Whether this pair was held out of training."""
        return self.background == self.picture.held_out


def prompts(n: int) -> list[Prompt]:
    """Return n prompts from training, spread over the pictures and the backgrounds in `SHOWN_ON`."""
    pairs = (Prompt(picture, SHOWN_ON[i % len(SHOWN_ON)]) for i, picture in enumerate(_spread(n)))
    return [pair if not pair.held_out else Prompt(pair.picture, "white") for pair in pairs]


def prompts_held_out(n: int) -> list[Prompt]:
    """Return n prompts whose pairs of picture and background were held out of training."""
    return [Prompt(picture, picture.held_out) for picture in _spread(n)]


def _spread(n: int) -> list[Picture]:
    """Return n pictures, spread evenly over pictures.tsv."""
    return [pictures()[i * len(pictures()) // n] for i in range(n)]


class Gallery:
    """LPIPS features of every emoji on a background, cached in a folder (0.3 GB for each background).

    Args:
        drawn: assets/ of the unpacked npm package.
        lpips: LPIPS with its weights.
        folder: Folder of the cached features.

    Attributes:
        names: Names of the emoji's files, without .webp.
        digest: Fingerprint of the emoji files (names and sizes) and of LPIPS's heads, part of the cached files' names.
    """

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
        """Return for each image how many emoji are nearer to it than the one that it should show; 0 is best.

        Args:
            background: Name of the background's colour.
            images: The images.
            names: For each image, the name of the file of the emoji that it should show.
        """
        if not images:
            return []
        reference = self._features(background).float()
        features = self._compute(images).float()
        # |a - b|^2 without the term |a|^2, which is the same for all candidates b.
        distances = reference.square().sum(1) - 2 * features @ reference.T
        return [int((row < row[self.names.index(name)]).sum()) for row, name in zip(distances, names, strict=True)]

    def _features(self, background: str) -> Tensor:
        """Return the features (N, D) of all emoji on a background, from the cache if it has them."""
        colour = BACKGROUNDS[background]
        path = self.folder / f"{bytes(colour).hex()}-{self.digest}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):  # the file is missing or damaged
            return safetensors.torch.load_file(path)["features"]
        images = [composed(read(self.drawn, name), colour) for name in self.names]
        features = self._compute(images, f"emoji on {background}")
        with atomic_write(path) as temporary:
            temporary.write_bytes(safetensors.torch.save({"features": features}))
        return features

    @torch.no_grad()
    def _compute(self, images: Sequence[Image.Image], description: str = "features") -> Tensor:
        """Return the features (N, D) of N images, in float16."""
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        parts = [
            self.lpips.features(torch.stack(image_io.to_tensors(batch)), GRID).half()
            for batch in progress(batches, description=description)
        ]
        return torch.cat(parts)


def fidelity(gallery: Gallery, asked: Sequence[Prompt], images: Sequence[Image.Image]) -> Measured:
    """Measure how well images show what their prompts name.

    Args:
        gallery: Features of all emoji.
        asked: The prompts.
        images: An image for each prompt.

    Returns:
        `prompts`, the number of prompts; `retrieved`, the number of prompts with a background in `SHOWN_ON`, for
        which retrieval is measured; `top1` and `top5`, the shares of these prompts whose emoji ranks first and among
        the first five (None if there are none); and `background`, the share of all images that have the right
        background. Shares are from 0 to 1.
    """
    ranks: list[int] = []
    for background in SHOWN_ON:
        chosen = [(image, p.picture.file) for image, p in zip(images, asked, strict=True) if p.background == background]
        ranks += gallery.ranks(background, [image for image, _ in chosen], [name for _, name in chosen])
    right_background = [background_of(image) == p.background for image, p in zip(images, asked, strict=True)]
    return {
        "prompts": len(asked),
        "retrieved": len(ranks),
        "top1": sum(rank < 1 for rank in ranks) / len(ranks) if ranks else None,
        "top5": sum(rank < 5 for rank in ranks) / len(ranks) if ranks else None,
        "background": sum(right_background) / len(right_background),
    }


def background_of(image: Image.Image) -> str:
    """Return the name of the colour that is nearest, in sRGB, to the median of the image's edge."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    colour = np.median(pixels[~inner], axis=0)
    return min(BACKGROUNDS, key=lambda name: math.dist(colour, BACKGROUNDS[name]))


def generated(model: StableDiffusion, asked: Sequence[Prompt], scale: float, steps: int) -> list[Image.Image]:
    """Return an image for each prompt, sampled by DDIM from seeds 0, 1, 2, and so on."""
    texts = [prompt.text for prompt in asked]
    images: list[Image.Image] = model(texts, guidance_scale=scale, num_inference_steps=steps, batch_size=BATCH)
    return images


def vae_quality(vae: VAE, images: Sequence[Image.Image], lpips: LPIPS) -> Measured:
    """Return PSNR (dB), SSIM, and LPIPS between images and their reconstructions, averaged over the images."""
    rows = []
    for i in range(0, len(images), BATCH):
        batch = list(images[i : i + BATCH])
        reconstructed = vae.reconstruct(batch)
        x, y = (torch.stack(image_io.to_tensors(side)) for side in (batch, reconstructed))
        with torch.no_grad():
            rows += list(zip(psnr(batch, reconstructed), ssim(batch, reconstructed), lpips(x, y), strict=True))
    names = ("psnr", "ssim", "lpips")
    return {name: float(np.mean([float(row[k]) for row in rows])) for k, name in enumerate(names)}
