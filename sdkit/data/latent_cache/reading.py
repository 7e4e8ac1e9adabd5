"""Reading a latent cache: random access to moments, token ids and embeddings, none of it read before it is wanted."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from sdkit.data.latent_cache.manifest import Manifest, Shard, difference
from sdkit.data.latent_cache.shard_file import ShardFile, unreadable
from sdkit.data.transform import Transform
from sdkit.errors import CacheError
from sdkit.files import expanded, sha256, status

AGAIN = "run the same sdkit cache command again, which makes what is missing"


class Prompt(TypedDict):
    """A caption as the text encoder takes it, in k chunks."""

    ids: Tensor  # (k, 77), int64
    embeddings: Tensor | None  # (77 k, D), float32


class Item(Prompt):
    """One augmentation of one image."""

    mean: Tensor  # (4, H/8, W/8), float32, raw: not scaled
    logvar: Tensor  # the same
    name: str
    index: int  # of the example in its data set
    augmentation: int


class LatentCache:
    """The posterior moments and token ids that `sdkit.data.cache` wrote: `cache[i]` of `len(cache)` items.

    Item i is augmentation i % a of the (i // a)-th usable image, in the data's own order. Shards are memory-mapped:
    what is not asked for is not read. Raises `CacheError` where there is no whole cache.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = expanded(path)
        self.manifest = Manifest.read(self.path)
        if not self.manifest.complete:
            raise CacheError(f"the cache {self.path} is not finished; {AGAIN}.")
        if missing := missing_files(self.path, self.manifest):
            raise CacheError(
                f"{missing[0].file} of the cache {self.path} is missing or cut short ({len(missing)} such files); "
                f"{AGAIN}."
            )
        self._ends = list(accumulate(shard.items for shard in self.manifest.shards))
        self._opened: dict[str, ShardFile] = {}
        self._lengths: dict[str, int] = {}  # of the axes that depend on the networks, once a shard was opened

    def __reduce__(self) -> tuple[type[LatentCache], tuple[Path]]:
        return LatentCache, (self.path,)  # mapped files do not travel to other processes

    def __len__(self) -> int:
        return self.manifest.items

    def __getitem__(self, i: int) -> Item:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no item {i} among {len(self)}.")
        i %= len(self)
        number = bisect.bisect_right(self._ends, i)
        one = self.manifest.shards[number]
        row, augmentation = divmod(i - (self._ends[number - 1] if number else 0), self.manifest.settings.augmentations)
        with _raised_as_cache_error(self.path / one.file):
            shard = self._shard(one)
            index = int(shard.get("index", row))
            if index >= self.manifest.examples:
                raise ValueError("is damaged: it holds examples that belong elsewhere")
            return {
                "mean": shard.get("mean", row, augmentation).float(),
                "logvar": shard.get("logvar", row, augmentation).float(),
                "name": shard.name(row),
                "index": index,
                "augmentation": augmentation,
                **_prompt(shard, row),
            }

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    @property
    def empty(self) -> Prompt:
        """The empty prompt, in one chunk: what dropped captions become."""
        assert self.manifest.empty  # of every complete manifest
        with _raised_as_cache_error(self.path / self.manifest.empty.file):
            return _prompt(self._shard(self.manifest.empty), 0)

    def check_model(
        self,
        *,
        vae: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
        factor: int | None = None,
        tokenizer: str | None = None,
        text: str | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Raise `CacheError` where the cache was not made for what a run is to train; None is not compared.

        vae, scale, shift, factor: of the `VAE`: its `identity`, and so on.
        tokenizer, text: see `sdkit.data.latent_cache.manifest`; `text` matters to a cache with embeddings only.
        transform: as the run would do it.
        """
        made = self.manifest.settings
        wanted: dict[str, Any] = {
            "vae": vae, "scale": scale, "shift": shift, "factor": factor, "tokenizer": tokenizer,
        }  # fmt: skip
        wanted["text"] = text if made.embeddings else None
        if transform:
            wanted |= {"size": transform.size, "crop": transform.crop, "flip": transform.flip}
        if found := difference(made, {name: value for name, value in wanted.items() if value is not None}):
            raise CacheError(
                f"the cache {self.path} (of {self.manifest.model}) was made with {found} as in this run; make another "
                "with sdkit cache for this run, or run with what it was made with."
            )

    def verify(self) -> None:
        """Read the whole cache. Raises `CacheError`, naming the files whose checksums are wrong."""
        if damaged := damaged_files(self.path, self.manifest):
            raise CacheError(
                f"{', '.join(damaged)} of the cache {self.path} "
                f"{'are' if len(damaged) > 1 else 'is'} damaged (wrong checksum); delete that, then {AGAIN}."
            )

    def _shard(self, one: Shard) -> ShardFile:
        if one.file not in self._opened:
            made, is_prompt = self.manifest.settings, one == self.manifest.empty
            shard = ShardFile(self.path / one.file, made, self._lengths, prompt_only=is_prompt)
            if shard.images * made.augmentations != one.items:
                raise ValueError("holds another number of images than the manifest says")
            self._lengths |= {axis: shard.lengths[axis] for axis in "CLD" if axis in shard.lengths}
            self._opened[one.file] = shard
        return self._opened[one.file]


def _prompt(shard: ShardFile, row: int) -> Prompt:
    embeddings = shard.ragged("embeddings", row, "ids").flatten(0, 1).float() if shard.has("embeddings") else None
    return {"ids": shard.ragged("ids", row).long(), "embeddings": embeddings}


@contextlib.contextmanager
def _raised_as_cache_error(path: Path) -> Iterator[None]:
    """Raise `CacheError` for what is wrong with the file of a cache."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CacheError(f"{path} {error}; delete it, then {AGAIN}.") from error


def missing_files(folder: Path, manifest: Manifest) -> list[Shard]:
    """Files of the manifest that are missing, or not of their size. Raises `CacheError` where that cannot be known."""

    def whole(one: Shard) -> bool:
        try:
            return status(folder / one.file).st_size == one.bytes
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unreadable(folder / one.file, error) from error

    return [one for one in manifest.files if not whole(one)]


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the manifest's files that are missing, or whose checksums are wrong. Raises `CacheError` for one that
    cannot be read."""
    missing = missing_files(folder, manifest)

    def whole(one: Shard) -> bool:
        try:
            return sha256(folder / one.file) == one.sha256
        except OSError as error:
            raise unreadable(folder / one.file, error) from error

    return [one.file for one in manifest.files if one in missing or not whole(one)]
