"""Manifest of a latent cache: manifest.json beside the shards, with the cache's settings and the files' checksums."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from sdkit.atomic import atomic_write
from sdkit.errors import CacheError
from sdkit.loading.configs import CONDITIONS
from sdkit.loading.fingerprint import weights_fingerprint
from sdkit.messages import clean, reason
from sdkit.networks.text_encoder import TextEncoder
from sdkit.strict_json import read_object, require

MANIFEST_FILE = "manifest.json"
FORMAT = "sdkit.cache"
FORMAT_VERSION = 3
"""Version of the format. Since version 2, the manifest holds a checksum of itself; since 3, a cache may hold
conditions."""
LARGEST = 2**29
"""Largest size in bytes of a manifest that is read: enough to name two million skipped images."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings that the content of a cache depends on.

    Attributes:
        vae: Fingerprint of the VAE; see `VAE.identity`.
        scale: Scale of the VAE's latents. The stored moments are not scaled.
        shift: Shift of the VAE's latents.
        factor: Pixels per latent along each axis.
        text: Fingerprint of the text encoder; see `text_identity`.
        tokenizer: Fingerprint of the tokenizer; see `tokenizer_identity`.
        embeddings: Whether the text encoder's last hidden states are stored.
        size: (height, width) of the images in pixels.
        crop: See `Transform`.
        flip: See `Transform`.
        augmentations: Number of augmentations of each image.
        seed: Seed of the augmentations.
        dtype: Dtype that the VAE computed in.
        data: Fingerprint of the data; see `Examples.identity`.
        shard_size: Examples in a shard; those that cannot be used count.
        condition: Kind of the conditions, "latents" or "map"; empty if there are none. Their fingerprint is part of
            `data`.
    """

    vae: str
    scale: float
    shift: float
    factor: int
    text: str
    tokenizer: str
    embeddings: bool
    size: tuple[int, int]
    crop: str
    flip: bool
    augmentations: int
    seed: int
    dtype: str
    data: str
    shard_size: int
    condition: str = ""


WORDS = {
    "vae": "the VAE",
    "text": "the text encoder",
    "tokenizer": "the tokenizer",
    "data": "the data (names, captions, file sizes)",
}
"""Setting -> its name in messages, where that differs."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of a cache, as the manifest lists it.

    Attributes:
        file: Name of the file.
        items: Number of items in it; see `Manifest`.
        bytes: Size of the file.
        sha256: Checksum of the file.
    """

    file: str
    items: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An image that could not be used, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        settings: Settings that the cache depends on.
        sdkit: Version of sdkit that made the cache.
        model: Name of the model (and VAE), for people.
        source: Path or id of the data set, for people.
        complete: Whether the cache is finished. The fields below are only filled then.
        examples: Images in the data set.
        images: Images in the cache.
        items: Length of the cache: `images` times `augmentations`.
        skipped: Images that could not be used.
        shards: The files with the items, in order.
        empty: The file with the token ids (and embeddings) of the empty prompt; it holds no items.
    """

    settings: Settings
    sdkit: str
    model: str
    source: str
    complete: bool = False
    examples: int = 0
    images: int = 0
    items: int = 0
    skipped: tuple[Skipped, ...] = ()
    shards: tuple[Shard, ...] = ()
    empty: Shard | None = None

    @property
    def files(self) -> tuple[Shard, ...]:
        """All files of the cache except the manifest."""
        return (*self.shards, *([self.empty] if self.empty else []))

    @property
    def identity(self) -> str:
        """Fingerprint of the cache: SHA-256 over the checksums of all files; 16 hex digits."""
        return hashlib.sha256("".join(one.sha256 for one in self.files).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write `folder`/manifest.json, atomically."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=1, ensure_ascii=False) + "\n"
        with atomic_write(folder / MANIFEST_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a cache, complete or not. Raises CacheError if it is missing or damaged."""
        path = folder / MANIFEST_FILE
        try:
            content = read_object(path, LARGEST)
            if content.get("format") != FORMAT:
                raise CacheError(f"{path} is not the manifest of a latent cache; sdkit cache makes them.")
            require(content, {"format_version": int})
            if content["format_version"] > FORMAT_VERSION:
                raise CacheError(f"{folder} was written by a newer version of sdkit; update sdkit to read it.")
            return _parsed(content)
        except FileNotFoundError as error:
            raise CacheError(f"there is no latent cache in {folder}; sdkit cache makes one.") from error
        except OSError as error:
            raise CacheError(f"cannot read {path}: {reason(error)}.") from error
        except ValueError as error:
            raise CacheError(f"{path} is damaged: it {error}; delete the folder and make the cache again.") from error


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(content: dict[str, Any]) -> Manifest:
    """Build a manifest from its JSON.

    Raises:
        ValueError: A field is missing, has another type, or contradicts another. The message is a predicate.
    """
    if content["format_version"] > 1:
        require(content, {"checksum": str})
        if content.pop("checksum") != _checksum(content):
            raise ValueError("has a wrong checksum")
    require(content, {"settings": dict, "empty": (dict, NoneType), "skipped": list, "shards": list})
    given = {key: value for key, value in content.items() if key not in ("format", "format_version")}
    size = given["settings"].get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError("has a 'size' that is not two whole numbers")
    settings = _built(Settings, given["settings"] | {"size": tuple(size)})
    shards = tuple(_built(Shard, one) for one in given["shards"])
    empty = _built(Shard, given["empty"]) if given["empty"] else None
    parts = {"settings": settings, "shards": shards, "empty": empty, "skipped": skipped_from(given["skipped"])}
    manifest = _built(Manifest, given | parts)
    _check(manifest)
    return manifest


KINDS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}
"""Annotation -> type, for fields of plain JSON types. The callers of `_built` check all other fields."""


def _built(cls: type[T], given: Any) -> T:
    """Build a dataclass from a JSON object. Raises ValueError if a field is missing, unknown, or of another type."""
    if not isinstance(given, dict):
        raise ValueError(f"holds something else in place of a {cls.__name__.lower()}")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"has an unknown {clean(unknown[0])!r}")
    needed = {name: field for name, field in known.items() if name in given or field.default is MISSING}
    require(given, {name: KINDS.get(str(field.type), object) for name, field in needed.items()})
    return cls(**given)


def skipped_from(given: list[Any]) -> tuple[Skipped, ...]:
    """Build the skipped images from JSON. Raises ValueError for anything else."""
    return tuple(_built(Skipped, one) for one in given)


def _check(manifest: Manifest) -> None:
    """Raise ValueError if values are impossible or contradict one another."""
    made = manifest.settings
    finite = math.isfinite(made.scale) and math.isfinite(made.shift)
    if made.condition not in ("", *CONDITIONS):
        raise ValueError("has conditions of an unknown kind")
    if not finite or made.scale <= 0 or min(made.factor, made.augmentations, made.shard_size) < 1:
        raise ValueError("has impossible settings")
    if any(side % made.factor for side in made.size):
        raise ValueError("has a 'size' that the 'factor' does not divide")
    for one in manifest.files:
        if one.file in (".", "..") or not re.fullmatch(r"[^/\\:\0]+", one.file):
            raise ValueError(f"names the file {clean(one.file)!r}, which is outside of the folder")
        if min(one.items, one.bytes) < 0 or not re.fullmatch("[0-9a-f]{64}", one.sha256):
            raise ValueError(f"has an impossible size or checksum of {clean(one.file)!r}")
    if len({one.file for one in manifest.files}) < len(manifest.files):
        raise ValueError("names a file twice")
    sums = (manifest.images * made.augmentations, sum(one.items for one in manifest.shards))
    examples = manifest.images + len(manifest.skipped)
    if manifest.complete and (sums != (manifest.items,) * 2 or manifest.examples != examples or not manifest.empty):
        raise ValueError("has numbers that contradict one another")


def difference(made: Settings, wanted: dict[str, Any]) -> str | None:
    """Describe the first setting that differs from `wanted`; None if all are equal."""
    for name, want in wanted.items():
        have = getattr(made, name)
        if have != want:
            return f"{WORDS.get(name, name)} {_shown(have)}, not {_shown(want)}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def text_identity(text: TextEncoder) -> str:
    """Return the fingerprint of a text encoder's weights."""
    return weights_fingerprint(text.network)


def tokenizer_identity(text: TextEncoder) -> str:
    """Return the fingerprint of a tokenizer: SHA-256 over vocabulary and special tokens; 16 hex digits."""
    tokenizer = text.tokenizer
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, text.length]
    return hashlib.sha256(json.dumps([special, sorted(tokenizer.get_vocab().items())]).encode()).hexdigest()[:16]
