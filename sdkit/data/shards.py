"""The shards of a latent cache: what is in them, made and saved.

A shard is a safetensors file of N images in A augmentations:

    mean, logvar          (N, A, 4, H/8, W/8) float16   raw moments of the posterior
    index                 (N,) int64                    of the example in its data set
    ids, ids_ends         (K, 77) int32, (N,) int64     token ids; image n's chunks end at ids_ends[n]
    embeddings            (K, 77, D) float16            last hidden states of the text encoder, where asked for
    names, names_ends     (bytes,) uint8, (N,) int64    UTF-8
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdkit.data.examples import Example
from sdkit.data.manifest import Settings, Skipped
from sdkit.data.prefetch import ahead
from sdkit.data.transform import Transform, draw
from sdkit.errors import ImageError
from sdkit.files import atomic_write, encodable
from sdkit.models.text import CHUNKS_AT_ONCE, TextEncoder
from sdkit.models.vae import PIXELS_AT_ONCE, VAE

HEADER = "sdkit"  # the one key of a shard's metadata: with several, safetensors would write them in any order


@dataclass(frozen=True)
class _Loaded:
    index: int
    example: Example
    pixels: list[Tensor]  # (3, H, W), one for each augmentation; none where the image cannot be used
    reason: str = ""


class ShardEncoder:
    """Makes the tensors of a shard."""

    def __init__(
        self, vae: VAE, text: TextEncoder, transform: Transform, settings: Settings, pool: ThreadPoolExecutor,
        batch_size: int | None,
    ) -> None:  # fmt: skip
        self.vae, self.text, self.transform, self.settings, self.pool = vae, text, transform, settings, pool
        self.batch_size = batch_size
        height, width = settings.size
        fitting = batch_size or max(1, PIXELS_AT_ONCE // (height * width))
        self.images_at_once = -(-fitting // settings.augmentations)

    def shard(self, rows: Iterable[tuple[int, Example]]) -> tuple[dict[str, Tensor], list[Skipped]]:
        """Tensors of the examples that can be used, and the others."""
        height, width = (side // self.vae.factor for side in self.settings.size)
        shape = (0, self.settings.augmentations, self.vae.channels, height, width)
        moments = [torch.empty(2, *shape, dtype=torch.float16)]
        kept: list[_Loaded] = []
        skipped: list[_Loaded] = []
        loaded = iter(ahead(self.pool, self._load, rows, 2 * self.images_at_once))
        while batch := list(islice(loaded, self.images_at_once)):
            usable = [one for one in batch if one.pixels]
            skipped += [one for one in batch if not one.pixels]
            if usable:
                both, finite = self._moments([x for one in usable for x in one.pixels], shape[1:])
                moments.append(both[:, finite])
                kept += [replace(one, pixels=[]) for one, good in zip(usable, finite, strict=True) if good]
                reason = "the VAE gives numbers that are not finite for it."
                skipped += [replace(one, reason=reason) for one, good in zip(usable, finite, strict=True) if not good]
        mean, logvar = torch.cat(moments, dim=1)
        names, name_ends = _packed([one.example.name for one in kept])
        tensors = {"mean": mean, "logvar": logvar, "names": names, "names_ends": name_ends}
        tensors["index"] = torch.tensor([one.index for one in kept], dtype=torch.int64)
        tensors |= self.prompts([one.example.caption for one in kept])
        skipped.sort(key=lambda one: one.index)
        told = [Skipped(name=one.example.name, reason=encodable(one.reason)) for one in skipped]
        return tensors, told

    def _load(self, numbered: tuple[int, Example]) -> _Loaded:
        index, example = numbered
        draws = (draw(self.settings.seed, index, a) for a in range(self.settings.augmentations))
        try:
            image = example.load()
            bare = replace(example, data=None)
            return _Loaded(index, bare, [self.transform(image, generator) for generator in draws])
        except ImageError as error:
            return _Loaded(index, replace(example, data=None), [], str(error))

    def _moments(self, pixels: list[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, list[bool]]:
        """Mean and logvar (2, n, a, 4, H/8, W/8), float16, of n images, and whether those of each are finite."""
        means, logvars = self.vae.moments(pixels, batch_size=self.batch_size)
        both = torch.stack([means, logvars]).half().unflatten(1, (-1, shape[0]))
        return both, both.isfinite().all(dim=0).flatten(1).all(dim=1).tolist()

    def prompts(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids (K, 77), int32, of the chunks of all captions; where each caption's end; their embeddings."""
        rows = [self.text.tokenize(caption)[0][0] for caption in captions]  # (k, 77) each
        ids = torch.cat([torch.empty(0, self.text.length, dtype=torch.int64), *rows])
        ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
        tensors = {"ids": ids.int(), "ids_ends": ends}
        if self.settings.embeddings:
            with torch.inference_mode():
                parts = [self.text(part).half().cpu() for part in ids.split(CHUNKS_AT_ONCE) if len(part)]
            empty = torch.empty(0, self.text.length, self.text.width, dtype=torch.float16)
            tensors["embeddings"] = torch.cat([empty, *parts])
        return tensors


def _packed(names: list[str]) -> tuple[Tensor, Tensor]:
    """Names as UTF-8 in one tensor, and where each ends."""
    encoded = [encodable(name).encode() for name in names]
    ends = torch.tensor([len(one) for one in encoded], dtype=torch.int64).cumsum(0)
    return torch.tensor(list(b"".join(encoded)), dtype=torch.uint8), ends


def shard_file(number: int) -> str:
    """Name of the shard with this number."""
    return f"shard-{number:05}.safetensors"


def _digest(settings: Settings) -> str:
    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()


def save(path: Path, tensors: dict[str, Tensor], skipped: list[Skipped], settings: Settings) -> None:
    """Write a shard, whole or not at all; its header names what was skipped, and what made it."""
    header = json.dumps({"settings": _digest(settings), "skipped": [asdict(one) for one in skipped]})
    encoded = safetensors.torch.save({name: x.contiguous() for name, x in tensors.items()}, {HEADER: header})
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def header_of(path: Path, settings: Settings) -> dict[str, Any] | None:
    """`skipped` of a shard, and how many `images` and `items` it holds; None where there is no whole one of these
    settings."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            images, each = file.get_slice("mean").get_shape()[:2] if "mean" in file.keys() else (0, 0)  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return header | {"images": images, "items": images * each} if header.get("settings") == _digest(settings) else None
