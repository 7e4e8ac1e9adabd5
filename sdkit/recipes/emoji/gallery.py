"""Retrieval: which picture in which style an image shows, by LPIPS features of all of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor

from sdkit import images as image_io
from sdkit.atomic import atomic_write
from sdkit.networks.lpips import LPIPS
from sdkit.progress import progress
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import Composition, Part
from sdkit.recipes.emoji.drawings import Drawings
from sdkit.recipes.emoji.figures import ALIGNED, aligned
from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, pictures

GRID = 6  # LPIPS features are averaged over a grid of this many cells on a side
EXTENT = 96  # extent in pixels of the pictures in the gallery, before they are aligned
BATCH = 32


class Match(NamedTuple):
    """The picture and the style that an image shows.

    Attributes:
        rank: Number of pictures of the named style that are nearer to the image than the named one; 0 is best.
        style: Style of the picture that is nearest, among all pictures in all styles.
        own_style: Style in which the named picture is nearest.
    """

    rank: int
    style: str
    own_style: str


class Gallery:
    """LPIPS features of every picture in every style on a background, cached in a folder (0.1 GB for each style).

    Images are aligned before they are compared, so that size and place have no influence. Neither has a mirror image:
    of an image and its mirror image the nearer one counts.

    Args:
        drawings: The pictures in all styles.
        lpips: LPIPS with its weights.
        folder: Folder of the cached features.

    Attributes:
        files: Code points of the pictures, as in pictures.tsv.
        digest: Fingerprint of the packages' files (names and sizes) and of LPIPS's heads, part of the cached files'
            names.
    """

    def __init__(self, drawings: Drawings, lpips: LPIPS, folder: Path) -> None:
        self.drawings, self.lpips, self.folder = drawings, lpips, folder
        self.files = [picture.file for picture in pictures()]
        digest = hashlib.sha256(f"{EXTENT} {ALIGNED} {GRID}".encode())
        for path in (*(drawings.solid / f"{file}.webp" for file in self.files), *drawings.files):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for head in lpips.heads:
            digest.update(head.detach().cpu().float().numpy().tobytes())
        self.digest = digest.hexdigest()[:8]

    def matches(self, asked: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Match]:
        """Return what each image shows.

        Args:
            asked: For each image a prompt for one picture, with its style and its background.
            images: The images.
        """
        found: dict[int, Match] = {}
        for background in dict.fromkeys(prompt.background for prompt in asked):
            chosen = [i for i, prompt in enumerate(asked) if prompt.background == background]
            distances = self._distances(background, [images[i] for i in chosen])
            found |= {i: self._match(asked[i], of_one) for i, of_one in zip(chosen, distances, strict=True)}
        return [found[i] for i in range(len(asked))]

    def _match(self, prompt: Prompt, distances: Tensor) -> Match:
        """Return what an image shows, from its distances (styles, pictures)."""
        own, in_style = self.files.index(prompt.pictures[0].file), distances[STYLES.index(prompt.style)]
        rank = int((in_style < in_style[own]).sum())
        return Match(rank, STYLES[int(distances.amin(1).argmin())], STYLES[int(distances[:, own].argmin())])

    def _distances(self, background: str, images: Sequence[Image.Image]) -> Tensor:
        """Return squared distances (images, styles, pictures)."""
        cut = [aligned(image) for image in images]
        both = [self._compute(side).float() for side in (cut, [ImageOps.mirror(image) for image in cut])]
        columns = []
        for style in STYLES:
            reference = self._features(background, style).float()
            columns.append(torch.minimum(*(_squared_distances(side, reference) for side in both)))
        return torch.stack(columns, dim=1)

    def _features(self, background: str, style: str) -> Tensor:
        """Return the features (N, D) of all pictures in a style on a background, from the cache if it has them."""
        colour = bytes(BACKGROUNDS[background]).hex()
        path = self.folder / f"{style}-{colour}-{self.digest}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):  # the file is missing or damaged
            return safetensors.torch.load_file(path)["features"]
        images = [aligned(self._canonical(i, background, style)) for i in range(len(self.files))]
        features = self._compute(images, f"{style} pictures on {background}")
        with atomic_write(path) as temporary:
            temporary.write_bytes(safetensors.torch.save({"features": features}))
        return features

    def _canonical(self, i: int, background: str, style: str) -> Image.Image:
        """Return picture i in the middle of a background."""
        part = Part(picture=pictures()[i], extent=EXTENT, across=0.5, down=0.5, mirrored=False)
        return Composition(parts=(part,), style=style, background=background, caption="").drawn(self.drawings)

    @torch.no_grad()
    def _compute(self, images: Sequence[Image.Image], description: str = "features") -> Tensor:
        """Return the features (N, D) of N images, in float16."""
        batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        parts = [
            self.lpips.features(torch.stack(image_io.to_tensors(batch)), GRID).half()
            for batch in progress(batches, description=description)
        ]
        return torch.cat(parts)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|^2 (N, M) of the rows of (N, D) and (M, D)."""
    return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T


def halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return the left and the right half of an image."""
    middle = image.width // 2
    return image.crop((0, 0, middle, image.height)), image.crop((middle, 0, image.width, image.height))


def of_each(asked: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """Return for each prompt of two pictures the prompts of the left and of the right one alone."""
    return [
        (Prompt(one.pictures[:1], one.style, one.background), Prompt(one.pictures[1:], one.style, one.background))
        for one in asked
    ]
