"""Sharded weights: an index (`*.index.json`) says which of the files beside it holds which tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdkit.errors import SourceError
from sdkit.loading.configs import read_json
from sdkit.loading.tensors import TensorFile, open_tensors
from sdkit.messages import clean

SHARD = re.compile(r"\w[\w.-]*\.(?:safetensors|bin)")
"""Matches the name of a shard: a file beside the index, so no path, and no glob pattern."""


@dataclass(frozen=True, kw_only=True)
class Shards(TensorFile):
    """Sharded weights, read like a single file.

    Attributes:
        path: The index.
        files: The shards.
    """

    files: tuple[TensorFile, ...]

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors, as stored."""
        wanted = [*keys]
        found: dict[str, torch.Tensor] = {}
        for file in self.files:
            found |= file.read([key for key in wanted if key in file.shapes])
        return found


def index_names(weights: str, variant: str | None) -> list[str]:
    """Return the possible names of the index of a sharded `weights` file.

    A variant's index has two possible names, the newer form first.
    """
    if variant:
        return [f"{weights}.index.{variant}.json", f"{weights}.{variant}.index.json"]
    return [f"{weights}.index.json"]


def read_index(path: Path) -> dict[str, set[str]]:
    """Return shard -> the names of its tensors. Raise SourceError if the index names anything but files beside it."""
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise SourceError(f"{clean(path)!r} has no weight_map, as an index of shards has; download it again.")
    shards: dict[str, set[str]] = defaultdict(set)
    for key, shard in placed.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise SourceError(
                f"{clean(path)!r} says that {clean(key)} is in {clean(repr(shard))}, which is no file of weights "
                "beside it; give another source."
            )
        shards[shard].add(key)
    return dict(sorted(shards.items()))


def open_shards(index: Path) -> Shards:
    """Open every shard that `index` names. Raise SourceError if a shard holds other tensors than the index lists."""
    files = []
    for name, keys in read_index(index).items():
        file = open_tensors(index.parent / name)
        if differing := sorted(keys ^ file.shapes.keys()):
            key, verb = clean(differing[0]), "lacks" if differing[0] in keys else "also holds"
            raise SourceError(f"{file.label} {verb} {key}, unlike {index.name} says; download both again.")
        files.append(file)
    return Shards(
        path=index,
        shapes={key: shape for file in files for key, shape in file.shapes.items()},
        dtypes={key: dtype for file in files for key, dtype in file.dtypes.items()},
        metadata={},
        files=tuple(files),
    )
