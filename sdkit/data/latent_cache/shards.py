"""Encoding of images and captions into the tensors of a latent cache's shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sdkit.data.example import Example
from sdkit.data.latent_cache.manifest import Settings, Skipped
from sdkit.data.latent_cache.shard_file import ShardFile, unreadable
from sdkit.data.pairs import shaped_like
from sdkit.data.transform import Transform, draw
from sdkit.errors import ImageError
from sdkit.files import encodable
from sdkit.loading.source import condition_channels
from sdkit.networks.autoencoder import PIXELS_AT_ONCE, Autoencoder
from sdkit.networks.concatenation import channels_of
from sdkit.networks.text_encoder import CHUNKS_AT_ONCE, TextEncoder
from sdkit.prefetch import ahead


@dataclass(frozen=True)
class _Loaded:
    """An example after its image was loaded and transformed, or could not be.

    Attributes:
        index: Index of the example in its data set.
        example: The example, without its encoded image.
        pixels: (3, H, W) for each augmentation; empty if the image cannot be used.
        conditions: The condition's pixels, likewise; empty if there are no conditions.
        size: Height and width of the image before it was transformed.
        reason: The reason, if the image cannot be used.
    """

    index: int
    example: Example
    pixels: list[Tensor]
    conditions: list[Tensor] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    reason: str = ""


class ShardEncoder:
    """Encodes examples, and their conditions if the cache holds them, into the tensors of a shard."""

    def __init__(
        self, vae: Autoencoder, text: TextEncoder, transform: Transform, settings: Settings, pool: ThreadPoolExecutor,
        batch_size: int | None, conditions: Sequence[Example] | None = None,
    ) -> None:  # fmt: skip
        self.vae, self.text, self.transform, self.settings, self.pool = vae, text, transform, settings, pool
        self.batch_size, self.conditions = batch_size, conditions
        height, width = settings.size
        fitting = batch_size or max(1, PIXELS_AT_ONCE // (height * width))
        self.images_at_once = -(-fitting // settings.augmentations)

    def made(self, path: Path, first: int = 0, count: int | None = None, *, prompt_only: bool = False) -> bool:
        """Return whether `path` already holds an undamaged shard of this cache. Reads the whole file.

        Args:
            path: File of the shard.
            first: Index of its first example.
            count: Number of its examples; None accepts any number.
            prompt_only: Whether it is the file of the empty prompt.

        Raises:
            CacheError: The file cannot be read.
        """
        lengths = {"C": self.vae.channels, "L": self.text.length}
        lengths |= {"D": self.text.width} if self.settings.embeddings else {}
        lengths |= {"E": self._condition_channels} if self.settings.condition else {}
        try:
            shard = ShardFile(path, self.settings, lengths, prompt_only=prompt_only)
            shard.check(self.text.network.get_input_embeddings().num_embeddings, first)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError:  # the file is damaged, or was made with other settings
            return False
        return count is None or shard.examples == count

    def shard(self, rows: Iterable[tuple[int, Example]]) -> tuple[dict[str, Tensor], list[Skipped]]:
        """Return the tensors of the examples that can be used, and the other examples with the reasons."""
        height, width = (side // self.vae.factor for side in self.settings.size)
        shape = (0, self.settings.augmentations, self.vae.channels, height, width)
        moments = [torch.empty(2, *shape, dtype=torch.float16)]
        concat = list[Tensor]()
        encoded: list[_Loaded] = []
        skipped: list[_Loaded] = []
        loaded = iter(ahead(self.pool, self._load, rows, 2 * self.images_at_once))
        while batch := list(islice(loaded, self.images_at_once)):
            usable = [one for one in batch if one.pixels]
            skipped += [one for one in batch if not one.pixels]
            if usable:
                both, finite = self._moments([x for one in usable for x in one.pixels], shape[1:])
                if self.conditions is not None:
                    beside, also = self._concat([x for one in usable for x in one.conditions])
                    finite = [all(pair) for pair in zip(finite, also, strict=True)]
                    concat.append(beside[finite])
                moments.append(both[:, finite])
                encoded += [
                    replace(one, pixels=[], conditions=[]) for one, good in zip(usable, finite, strict=True) if good
                ]
                reason = "the VAE gives numbers that are not finite for it."
                skipped += [replace(one, reason=reason) for one, good in zip(usable, finite, strict=True) if not good]
        mean, logvar = torch.cat(moments, dim=1)
        names, name_ends = _packed([one.example.name for one in encoded])
        tensors = {"mean": mean, "logvar": logvar, "names": names, "names_ends": name_ends}
        tensors["index"] = torch.tensor([one.index for one in encoded], dtype=torch.int64)
        tensors["sizes"] = torch.tensor([one.size for one in encoded], dtype=torch.int32).reshape(-1, 2)
        if self.conditions is not None:
            empty = torch.empty(shape[0], shape[1], self._condition_channels, height, width, dtype=torch.float16)
            tensors["concat"] = torch.cat([empty, *concat])
        tensors |= self.prompts([one.example.caption for one in encoded])
        skipped.sort(key=lambda one: one.index)
        reasons = [Skipped(name=encodable(one.example.name), reason=encodable(one.reason)) for one in skipped]
        return tensors, reasons

    def _load(self, numbered: tuple[int, Example]) -> _Loaded:
        index, example = numbered
        try:
            image = example.load()
            bare = replace(example, data=None)
            pixels, conditions = self._augmented(image, index), list[Tensor]()
            if self.conditions is not None:
                conditions = self._augmented(shaped_like(image.size, self.conditions[index].load()), index)
            return _Loaded(index, bare, pixels, conditions, size=(image.height, image.width))
        except ImageError as error:
            return _Loaded(index, replace(example, data=None), [], reason=str(error))

    def _augmented(self, image: Image.Image, index: int) -> list[Tensor]:
        """Return the pixels (3, H, W) of each augmentation of image `index`, or of its condition."""
        draws = (draw(self.settings.seed, index, a) for a in range(self.settings.augmentations))
        return [self.transform(image, generator) for generator in draws]

    def _moments(self, pixels: list[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, list[bool]]:
        """Encode n images with `a` augmentations each, where `shape` is (a, 4, H/8, W/8).

        Return mean and logvar, stacked to (2, n, a, 4, H/8, W/8), float16, and for each image whether all are finite.
        """
        means, logvars = self.vae.moments(pixels, batch_size=self.batch_size)
        both = torch.stack([means, logvars]).half().unflatten(1, (-1, shape[0]))
        return both, both.isfinite().all(dim=0).flatten(1).all(dim=1).tolist()

    @property
    def _condition_channels(self) -> int:
        return condition_channels(self.settings.condition, self.vae.channels)

    def _concat(self, pixels: list[Tensor]) -> tuple[Tensor, list[bool]]:
        """Return the channels of n conditions with `a` augmentations each, (n, a, C', H/8, W/8), float16, and for each
        condition whether all are finite."""
        rows = channels_of(pixels, self.settings.condition, self.vae, batch_size=self.batch_size).half()
        rows = rows.unflatten(0, (-1, self.settings.augmentations))
        return rows, rows.isfinite().flatten(1).all(dim=1).tolist()

    def prompts(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the tensors of captions: token ids (K, 77) of all chunks, the end of each caption, and embeddings.

        Embeddings are included only if the cache's settings ask for them.
        """
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
    """Return the names as UTF-8 bytes in one tensor, and where each name ends."""
    encoded = [encodable(name).encode() for name in names]
    ends = torch.tensor([len(one) for one in encoded], dtype=torch.int64).cumsum(0)
    return torch.tensor(list(b"".join(encoded)), dtype=torch.uint8), ends
