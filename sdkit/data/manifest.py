"""What a latent cache is made of and with: manifest.json, beside its shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sdkit.errors import CacheError
from sdkit.files import atomic_write, reason
from sdkit.models.text import TextEncoder
from sdkit.models.wrapper import fingerprint

NAME = "manifest.json"
FORMAT = "sdkit.cache"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the content of a cache depends on."""

    vae: str
    """`VAE.identity`."""
    scale: float
    shift: float
    factor: int
    text: str
    """`text_identity`."""
    tokenizer: str
    """`tokenizer_identity`."""
    embeddings: bool
    """Whether the text encoder's last hidden states are stored."""
    size: tuple[int, int]
    """(height, width) of the images in pixels."""
    crop: str
    flip: bool
    augmentations: int
    """Of each image."""
    seed: int
    """Of the augmentations."""
    dtype: str
    """What the VAE computed in."""
    data: str
    """`Examples.identity`."""
    shard_size: int
    """Examples of a shard, broken ones among them."""


WORDS = {
    "vae": "the VAE",
    "text": "the text encoder",
    "tokenizer": "the tokenizer",
    "data": "the data (names, captions, file sizes)",
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a cache."""

    file: str
    items: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An image that could not be used."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of manifest.json."""

    settings: Settings
    sdkit: str
    """Version that made it."""
    model: str
    """What VAE and text encoder were loaded from, and `source` what the images were: for people."""
    source: str
    complete: bool = False
    examples: int = 0
    """Images with captions that the data held."""
    images: int = 0
    """Those of them that are in the cache."""
    items: int = 0
    """`images` times `augmentations`: the length of the cache."""
    skipped: tuple[Skipped, ...] = ()
    shards: tuple[Shard, ...] = ()
    empty: Shard | None = None
    """The file of the empty prompt's token ids (and embeddings), without items."""

    @property
    def files(self) -> tuple[Shard, ...]:
        """All files beside the manifest."""
        return (*self.shards, *([self.empty] if self.empty else []))

    @property
    def identity(self) -> str:
        """SHA-256 over the checksums of all files; 16 hexadecimal digits."""
        return hashlib.sha256("".join(one.sha256 for one in self.files).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write it as `folder`/manifest.json, whole or not at all."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        text = json.dumps(head | asdict(self), indent=1, ensure_ascii=False) + "\n"
        with atomic_write(folder / NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a cache, complete or not. Raises `CacheError` where there is none, or a damaged one."""
        path = folder / NAME
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise CacheError(f"{path} is not the manifest of a latent cache; sdkit cache makes them.")
            if fields.pop("format_version") > FORMAT_VERSION:
                raise CacheError(f"{folder} was written by a newer version of sdkit; update sdkit to read it.")
            settings, empty = fields.pop("settings"), fields.pop("empty")
            return cls(
                empty=Shard(**empty) if empty else None,
                settings=Settings(**settings | {"size": tuple(settings["size"])}),
                skipped=tuple(Skipped(**one) for one in fields.pop("skipped")),
                shards=tuple(Shard(**one) for one in fields.pop("shards")),
                **fields,
            )
        except FileNotFoundError as error:
            raise CacheError(f"there is no latent cache in {folder}; sdkit cache makes one.") from error
        except OSError as error:
            raise CacheError(f"cannot read {path}: {reason(error)}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{path} is damaged; delete the folder and make the cache again.") from error


def difference(made: Settings, wanted: dict[str, Any]) -> str | None:
    """The first of the settings that is not as wanted, in words."""
    for name, want in wanted.items():
        have = getattr(made, name)
        if have != want:
            return f"{WORDS.get(name, name)} {_shown(have)}, not {_shown(want)}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def text_identity(text: TextEncoder) -> str:
    """Fingerprint of a text encoder's weights, as `VAE.identity` is one of a VAE's."""
    return weights_identity(text.network)


def weights_identity(network: nn.Module) -> str:
    """Fingerprint of all weights of a network, which must be loaded in float32: bfloat16 would round it to another."""
    return fingerprint(nn.ModuleDict({"encoder": network}), scale=1.0, shift=0.0)  # that is the part it looks at


def tokenizer_identity(text: TextEncoder) -> str:
    """SHA-256 over the vocabulary and the special tokens; 16 hexadecimal digits."""
    tokenizer = text.tokenizer
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, text.length]
    return hashlib.sha256(json.dumps([special, sorted(tokenizer.get_vocab().items())]).encode()).hexdigest()[:16]
