"""Shards of a latent cache, one file each: saved, opened, and checked.

A shard is a safetensors file of N images with A augmentations each:

    mean, logvar          (N, A, C, H/8, W/8) float16   raw moments of the posterior
    index                 (N,) int64                    index of the example in its data set, ascending
    sizes                 (N, 2) int32                  height and width of the image before it was cropped
    ids, ids_ends         (K, 77) int32, (N,) int64     token ids; image n's chunks end at ids_ends[n]
    embeddings            (K, 77, D) float16            last hidden states of the text encoder, optional
    names, names_ends     (bytes,) uint8, (N,) int64    UTF-8; image n's name ends at names_ends[n]

Its only metadata key holds JSON: a checksum of the cache's settings, and the images that could not be used. The file of
the empty prompt holds only ids, ids_ends, and embeddings. Early versions wrote no sizes. The message of each
`ValueError` in this module is a predicate ("is damaged: ..."), which the caller completes with the name of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sdkit.atomic import atomic_write
from sdkit.data.latent_cache.manifest import Settings, Skipped, skipped_from
from sdkit.errors import CacheError
from sdkit.messages import reason
from sdkit.strict_json import parse_object, require
from sdkit.tensor_files import open_mapped

HEADER = "sdkit"
"""The only key of a shard's metadata: safetensors writes several keys in random order, so the checksum would vary."""
LAYOUT = {
    "mean": ("F16", "NACHW"),
    "logvar": ("F16", "NACHW"),
    "index": ("I64", "N"),
    "sizes": ("I32", "NS"),
    "names": ("U8", "B"),
    "names_ends": ("I64", "N"),
    "ids": ("I32", "KL"),
    "ids_ends": ("I64", "N"),
    "embeddings": ("F16", "KLD"),
    "concat": ("F16", "NAEHW"),
}
"""Tensor -> its type and axes. An axis has the same length in all tensors."""
PROMPT = ("ids", "ids_ends", "embeddings")
"""Tensors in the file of the empty prompt."""


def shard_file(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05}.safetensors"


def _digest(settings: Settings) -> str:
    given = asdict(settings)
    if not settings.condition:  # as in caches of format version 2
        del given["condition"]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def save(path: Path, tensors: dict[str, Tensor], skipped: Sequence[Skipped], settings: Settings) -> None:
    """Write a shard, atomically. Its metadata hold the skipped images, and a checksum of the settings."""
    header = json.dumps({"settings": _digest(settings), "skipped": [asdict(one) for one in skipped]})
    encoded = safetensors.torch.save({name: x.contiguous() for name, x in tensors.items()}, {HEADER: header})
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def unreadable(path: Path, error: OSError) -> CacheError:
    """Return the error for a file that the system fails to read. The file may be undamaged."""
    return CacheError(f"cannot read {path}: {reason(error)}; check the disk and its permissions.")


class ShardFile:
    """An opened shard. It is memory-mapped, so only the entries that are accessed are read from disk.

    Opening a shard checks dtypes and shapes; each method checks the numbers that it reads.

    Args:
        path: The file.
        settings: Settings of the cache.
        lengths: Known lengths of axes in `LAYOUT`. C, E, L, and D depend on the networks.
        prompt_only: Whether the file is that of the empty prompt.

    Attributes:
        images: Number of images in it.
        skipped: Images that could not be used.
        lengths: Lengths of all its axes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged or was made with other settings; methods raise it for damaged numbers.
    """

    def __init__(
        self, path: Path, settings: Settings, lengths: Mapping[str, int] | None = None, *, prompt_only: bool = False
    ) -> None:
        file = open_mapped(path)
        header = parse_object((file.metadata() or {}).get(HEADER, "{}"))
        require(header, {"settings": str, "skipped": list})
        if header["settings"] != _digest(settings):
            raise ValueError("was made with other settings")
        self.skipped = skipped_from(header["skipped"])
        height, width = settings.size
        self.lengths = {
            "S": 2,
            "A": settings.augmentations,
            "H": height // settings.factor,
            "W": width // settings.factor,
        }
        self.lengths |= {"N": 1} if prompt_only else {}
        self.lengths |= lengths or {}
        absent = {"embeddings": not settings.embeddings, "concat": not settings.condition}
        absent["sizes"] = "sizes" not in file.keys()  # noqa: SIM118 - not a dict, so `in` does not work
        wanted = [name for name in LAYOUT if not absent.get(name)]
        self._tensors: dict[str, Any] = {}
        for name in (name for name in wanted if not prompt_only or name in PROMPT):
            self._tensors[name] = self._checked(name, file)
        self.images = 0 if prompt_only else self.lengths["N"]

    def _checked(self, name: str, file: Any) -> Any:
        if name not in file.keys():  # noqa: SIM118 - not a dict, so `in` does not work
            raise ValueError(f"lacks the tensor {name!r}")
        dtype, axes = LAYOUT[name]
        part = file.get_slice(name)
        shape = part.get_shape()
        fits = len(shape) == len(axes) and all(
            self.lengths.setdefault(axis, n) == n for axis, n in zip(axes, shape, strict=True)
        )
        if part.get_dtype() != dtype or not fits:
            raise ValueError(f"holds {name!r} of another type or shape than a shard of this cache has")
        return part

    def has(self, name: str) -> bool:
        """Return whether the shard has this tensor; some are optional."""
        return name in self._tensors

    def get(self, name: str, *at: int) -> Tensor:
        """Return a copy of the tensor `name` at the indices `at`. Nothing else is read."""
        return self._sound(name, self._tensors[name][at])

    def ragged(self, name: str, row: int, ends: str | None = None) -> Tensor:
        """Return a copy of one row of a ragged tensor: rows of different lengths, concatenated.

        Row i ends at entry i of the tensor `name` + "_ends", or of `ends` + "_ends" if given.
        """
        limits = self._tensors[f"{ends or name}_ends"]
        start, end = int(limits[row - 1]) if row else 0, int(limits[row])
        if not 0 <= start <= end <= self._tensors[name].get_shape()[0] or (start == end and name != "names"):
            raise ValueError(f"is damaged: row {row} of {name!r} would go from {start} to {end}")
        return self._sound(name, self._tensors[name][start:end])

    def name(self, row: int) -> str:
        """Return the name of the image in `row`."""
        try:
            return bytes(self.ragged("names", row).tolist()).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"is damaged: the name of row {row} is not UTF-8") from error

    def _sound(self, name: str, part: Tensor) -> Tensor:
        """Copy a part of the tensor `name` into memory. Raises ValueError for NaN, infinity, or negative integers, and
        for sizes of 0."""
        copy, least = part.clone(), int(name == "sizes")
        if not copy.isfinite().all() if copy.is_floating_point() else bool((copy < least).any()):
            raise ValueError(f"is damaged: {name!r} holds impossible numbers")
        return copy

    def check(self, vocabulary: int, first: int = 0) -> None:
        """Read the whole shard, and check its numbers.

        Args:
            vocabulary: Number of tokens in the text encoder's vocabulary.
            first: Index of the shard's first example in the data set.

        Raises:
            ValueError: Numbers are impossible or contradict one another.
        """
        for name, part in self._tensors.items():
            whole = self._sound(name, part[:])
            if name == "ids" and len(whole) and whole.max() >= vocabulary:
                raise ValueError("is damaged: there are no such token ids")
            if name == "index":
                order = [first - 1, *whole.tolist(), first + self.examples]
                if any(one >= other for one, other in pairwise(order)):
                    raise ValueError("is damaged: it holds examples that belong elsewhere")
            if name.endswith("_ends"):
                ends, total = whole.tolist(), self._tensors[name.removesuffix("_ends")].get_shape()[0]
                if ends != sorted(ends) or (ends[-1] if ends else 0) != total:
                    raise ValueError(f"is damaged: {name!r} does not ascend to {total}")
        for row in range(self.images):
            self.name(row)
            self.ragged("ids", row)

    @property
    def examples(self) -> int:
        """Number of examples that the shard covers, including those that could not be used."""
        return self.images + len(self.skipped)
