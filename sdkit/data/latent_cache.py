"""Reading a latent cache: random access to moments, token ids and embeddings, none of it read before it is wanted."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdkit.data.manifest import Manifest, Shard, difference
from sdkit.data.transform import Transform
from sdkit.errors import CacheError
from sdkit.files import expanded, sha256

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
        self._opened: dict[str, _Mapped] = {}

    def __reduce__(self) -> tuple[type[LatentCache], tuple[Path]]:
        return LatentCache, (self.path,)  # mapped files do not travel to other processes

    def __len__(self) -> int:
        return self.manifest.items

    def __getitem__(self, i: int) -> Item:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no item {i} among {len(self)}.")
        i %= len(self)
        number = bisect.bisect_right(self._ends, i)
        shard = self._shard(self.manifest.shards[number])
        row, augmentation = divmod(i - (self._ends[number - 1] if number else 0), self.manifest.settings.augmentations)
        return {
            "mean": shard.get("mean", row, augmentation).float(),
            "logvar": shard.get("logvar", row, augmentation).float(),
            "name": bytes(shard.ragged("names", row).tolist()).decode(),
            "index": int(shard.get("index", row)),
            "augmentation": augmentation,
            **self._prompt(shard, row),
        }

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    @property
    def empty(self) -> Prompt:
        """The empty prompt, in one chunk: what dropped captions become."""
        assert self.manifest.empty  # of every complete manifest
        return self._prompt(self._shard(self.manifest.empty), 0)

    def check_model(
        self,
        *,
        vae: str | None = None,
        scale: float | None = None,
        tokenizer: str | None = None,
        text: str | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Raise `CacheError` where the cache was not made for what a run is to train; None is not compared.

        vae, scale: of the `VAE`: its `identity` and `scale`. tokenizer, text: see `sdkit.data.manifest`; `text` matters
            to a cache with embeddings only. transform: as the run would do it.
        """
        made = self.manifest.settings
        wanted: dict[str, Any] = {"vae": vae, "scale": scale, "tokenizer": tokenizer}
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

    def _shard(self, shard: Shard) -> _Mapped:
        if shard.file not in self._opened:
            self._opened[shard.file] = _Mapped(self.path / shard.file)
        return self._opened[shard.file]

    def _prompt(self, shard: _Mapped, row: int) -> Prompt:
        embeddings = shard.ragged("embeddings", row, "ids").flatten(0, 1).float() if shard.has("embeddings") else None
        return {"ids": shard.ragged("ids", row).long(), "embeddings": embeddings}


class _Mapped:
    """A memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CacheError(f"cannot read {path} ({error}); delete it, then {AGAIN}.") from error
        self._tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict

    def has(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str, *at: int) -> Tensor:
        """A copy of one entry of a tensor: the rest of it is not touched."""
        part: Tensor = self._tensors[name][at]
        return part.clone()

    def ragged(self, name: str, row: int, ends: str | None = None) -> Tensor:
        """A copy of the entries of a tensor that belong to `row`, of which each row has its own number."""
        limits = self._tensors[f"{ends or name}_ends"]
        start = int(limits[row - 1]) if row else 0
        part: Tensor = self._tensors[name][start : int(limits[row])]
        return part.clone()


def missing_files(folder: Path, manifest: Manifest) -> list[Shard]:
    """Files of the manifest that are not there, or not of their size."""

    def whole(one: Shard) -> bool:
        path = folder / one.file
        return path.is_file() and path.stat().st_size == one.bytes

    return [one for one in manifest.files if not whole(one)]


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of the manifest's files whose checksums are wrong, or that cannot be read."""

    def whole(one: Shard) -> bool:
        with contextlib.suppress(OSError):
            return sha256(folder / one.file) == one.sha256
        return False

    return [one.file for one in manifest.files if not whole(one)]
