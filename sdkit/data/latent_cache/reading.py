"""Reading a latent cache: random access to moments, token ids, and embeddings in memory-mapped shards."""

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
"""The remedy with which messages about an incomplete or damaged cache end."""


class Prompt(TypedDict):
    """The token ids of a caption, in k chunks, and its embeddings.

    Attributes:
        ids: Token ids (k, 77), int64.
        embeddings: Last hidden states of the text encoder (77 k, D), float32; None if the cache has none.
    """

    ids: Tensor
    embeddings: Tensor | None


class Item(Prompt):
    """One augmentation of one image, and its caption.

    Attributes:
        mean: Mean of the posterior (4, H/8, W/8), float32, not scaled.
        logvar: Log-variance of the posterior (4, H/8, W/8), float32, not scaled.
        concat: Channels of the condition (C', H/8, W/8), float32; None if the cache has none. See
            `sdkit.networks.concatenation.channels_of`.
        size: Height and width of the image in pixels, before it was cropped; None if an early version of sdkit made the
            cache.
        name: Name of the example.
        index: Index of the example in its data set.
        augmentation: Number of the augmentation, from 0.
    """

    mean: Tensor
    logvar: Tensor
    concat: Tensor | None
    size: tuple[int, int] | None
    name: str
    index: int
    augmentation: int


class LatentCache:
    """A sequence of items with the posterior moments and token ids that `sdkit.data.cache` wrote.

    Let n be the number of augmentations of each image: item i is augmentation i % n of usable image i // n, in the
    order of the data set. Shards are memory-mapped, so only the items that are accessed are read from disk.

    Attributes:
        path: Folder of the cache.
        manifest: The content of its manifest.json.

    Raises:
        CacheError: There is no cache, or it is not finished or damaged.
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
        self._lengths: dict[str, int] = {}  # sizes of the axes C, E, L, and D; known from the first shard

    def __reduce__(self) -> tuple[type[LatentCache], tuple[Path]]:
        return LatentCache, (self.path,)  # memory-mapped files cannot be pickled; the copy opens them again

    def __len__(self) -> int:
        return self.manifest.items

    def __getitem__(self, i: int) -> Item:
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no item {i} among {len(self)}.")
        i %= len(self)
        one, row, augmentation = self._place(i)
        with _raised_as_cache_error(self.path / one.file):
            shard = self._shard(one)
            return {
                "mean": shard.get("mean", row, augmentation).float(),
                "logvar": shard.get("logvar", row, augmentation).float(),
                "name": shard.name(row),
                "index": self.index(i),
                "augmentation": augmentation,
                "size": _size(shard, row),
                "concat": shard.get("concat", row, augmentation).float() if shard.has("concat") else None,
                **_prompt(shard, row),
            }

    def name(self, i: int) -> str:
        """Return the name of the example of item i. Its tensors are not read."""
        one, row, _ = self._place(i)
        with _raised_as_cache_error(self.path / one.file):
            return self._shard(one).name(row)

    def index(self, i: int) -> int:
        """Return the index of item i's example in its data set. No other tensor is read."""
        one, row, _ = self._place(i)
        with _raised_as_cache_error(self.path / one.file):
            index = int(self._shard(one).get("index", row))
            if index >= self.manifest.examples:
                raise ValueError("is damaged: it holds examples that belong elsewhere")
            return index

    def _place(self, i: int) -> tuple[Shard, int, int]:
        """Return the shard of item i, its row there, and the number of its augmentation."""
        number = bisect.bisect_right(self._ends, i)
        first = self._ends[number - 1] if number else 0
        return self.manifest.shards[number], *divmod(i - first, self.manifest.settings.augmentations)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    @property
    def empty(self) -> Prompt:
        """The empty prompt, in one chunk. Caption dropout replaces captions by it."""
        assert self.manifest.empty  # every complete manifest lists the file of the empty prompt
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
        """Raise CacheError if the cache was made with other networks or settings than those of a run.

        Arguments that are None are not compared.

        Args:
            vae: Fingerprint of the run's VAE; see `VAE.identity`.
            scale: Scale of that VAE.
            shift: Shift of that VAE.
            factor: Pixels per latent of that VAE.
            tokenizer: Fingerprint of the run's tokenizer; see `tokenizer_identity`.
            text: Fingerprint of the run's text encoder; see `text_identity`. Ignored if the cache has no embeddings.
            transform: The run's resizing and cropping.
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
        """Read the whole cache. Raises CacheError with the names of files whose checksums are wrong."""
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
            self._lengths |= {axis: shard.lengths[axis] for axis in "CELD" if axis in shard.lengths}
            self._opened[one.file] = shard
        return self._opened[one.file]


def _size(shard: ShardFile, row: int) -> tuple[int, int] | None:
    if not shard.has("sizes"):
        return None
    height, width = shard.get("sizes", row).tolist()
    return height, width


def _prompt(shard: ShardFile, row: int) -> Prompt:
    embeddings = shard.ragged("embeddings", row, "ids").flatten(0, 1).float() if shard.has("embeddings") else None
    return {"ids": shard.ragged("ids", row).long(), "embeddings": embeddings}


@contextlib.contextmanager
def _raised_as_cache_error(path: Path) -> Iterator[None]:
    """Raise `OSError` and `ValueError` from reading a file of a cache as `CacheError`."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CacheError(f"{path} {error}; delete it, then {AGAIN}.") from error


def missing_files(folder: Path, manifest: Manifest) -> list[Shard]:
    """Return the files of a cache that are missing, or have another size than the manifest states.

    Raises CacheError if the size of a file cannot be read.
    """

    def whole(one: Shard) -> bool:
        try:
            return status(folder / one.file).st_size == one.bytes
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unreadable(folder / one.file, error) from error

    return [one for one in manifest.files if not whole(one)]


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names of files that are missing or have a wrong checksum. Raises CacheError if one is unreadable."""
    missing = missing_files(folder, manifest)

    def whole(one: Shard) -> bool:
        try:
            return sha256(folder / one.file) == one.sha256
        except OSError as error:
            raise unreadable(folder / one.file, error) from error

    return [one.file for one in manifest.files if one in missing or not whole(one)]
