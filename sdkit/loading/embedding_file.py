"""Textual inversion embeddings (Gal et al. 2022, https://arxiv.org/abs/2208.01618) as files.

They are written so that both diffusers and A1111 read them: one tensor, named by its token. They are read in that
layout, and in both of A1111's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sdkit.atomic import atomic_write
from sdkit.errors import ArgumentError, SourceError
from sdkit.files import sha256
from sdkit.loading.add_on import AddOn
from sdkit.loading.tensors import (
    BYTES,
    EMBEDDING,
    TensorFile,
    is_finite,
    not_finite,
    open_tensors,
)
from sdkit.messages import clean
from sdkit.tensor_files import METADATA

FILENAME = "learned_embeds.safetensors"
ADD_ON = AddOn(name="an embedding", usual=(FILENAME,), pickles=("learned_embeds.bin",))
NAMELESS = "emb_params"
"""Name of the tensor in A1111's .safetensors files. The token is the file's name then."""
FLOATS = {getattr(torch, name) for name in BYTES}


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A textual inversion embedding that was read from a file.

    Attributes:
        label: The file as messages name it.
        token: The token that stands for it in prompts.
        vectors: Its vectors (n, D), float32.
        sha256: SHA-256 of the file.
    """

    label: str
    token: str
    vectors: Tensor
    sha256: str


def save_embedding(token: str, vectors: Tensor, path: str | Path) -> None:
    """Write an embedding to one .safetensors file, atomically, for diffusers, A1111, and `read_embedding`.

    diffusers takes the token from the file, and A1111 takes the file's name as the token.

    Args:
        token: Its token.
        vectors: Its vectors (n, D).
        path: The file, ending in .safetensors.

    Raises:
        ArgumentError: The token or the name cannot be used.
    """
    check_token(token)
    if Path(path).suffix != ".safetensors":
        raise ArgumentError(f"an embedding cannot be saved as {str(path)!r}; give a name that ends in .safetensors.")
    data = safetensors.torch.save({token: vectors.detach().float().cpu().contiguous()}, {"format": "pt"})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def check_token(token: str) -> None:
    """Raise ArgumentError unless a file can hold an embedding of this token."""
    if not isinstance(token, str) or not token:
        raise ArgumentError(f"token must be a word, not {token!r}.")
    if token == METADATA:
        raise ArgumentError(f"the token {token!r} is a name that .safetensors files use themselves; give another.")


def read_embedding(
    source: str | os.PathLike[str],
    *,
    token: str | None = None,
    filename: str | None = None,
    revision: str | None = None,
) -> Embedding:
    """Read a textual inversion embedding in the layout of diffusers or A1111.

    Args:
        source: A file, a folder, or a Hub id.
        token: Token that stands for it in prompts; None is the one that the file names, or else the file's own name
            without its suffix.
        filename: The file in a folder or Hub repository. None takes the first that exists of
            learned_embeds.safetensors, the only .safetensors file (in a local folder), learned_embeds.bin, and the only
            .bin file (in a local folder).
        revision: A branch, tag, or commit of a Hub repository.

    Raises:
        SourceError: The file is missing, damaged, or of another kind: a LoRA, an embedding of Stable Diffusion XL.
    """
    path = ADD_ON.locate(source, filename, revision)
    file = open_tensors(path)
    name = _only_name(file)
    (vectors,) = file.read([name]).values()
    if vectors.dtype not in FLOATS:
        kind = str(vectors.dtype).removeprefix("torch.")
        raise SourceError(f"{file.label} holds {clean(name)} as {kind} numbers, not as floats; give another file.")
    if vectors.ndim not in (1, 2) or not vectors.numel():
        shape = "x".join(map(str, vectors.shape)) or "a scalar"
        raise SourceError(
            f"{file.label} holds no textual inversion embedding: its {clean(name)} is {shape}, not a list of vectors; "
            "give another file."
        )
    if not is_finite(vectors):
        raise not_finite(file.label, name)
    nameless = name == NAMELESS or name.startswith(f"{EMBEDDING}.")
    own = (file.metadata.get("name") or path.stem) if nameless else name
    return Embedding(
        label=file.label,
        token=own if token is None else token,
        vectors=torch.atleast_2d(vectors.detach().float().clone()),
        sha256=sha256(path),
    )


def _only_name(file: TensorFile) -> str:
    """Return the name of the embedding's tensor. Raise SourceError if the file holds something else."""
    names = list(file.shapes)
    if {"clip_g", "clip_l"} & {*names}:
        raise SourceError(
            f"{file.label} is a textual inversion embedding of Stable Diffusion XL or a later model, which has several "
            "text encoders; give one of Stable Diffusion 1.x or 2.x."
        )
    if any("lora" in name or "hada_w" in name or "lokr_w" in name for name in names):
        raise SourceError(f"{file.label} looks like a LoRA, not an embedding; load it with load_lora (--lora).")
    if len(names) != 1:
        some = ", ".join(map(clean, sorted(names)[:3]))
        raise SourceError(
            f"{file.label} holds {len(names)} tensors ({some}{', ...' if len(names) > 3 else ''}), and a file with a "
            "textual inversion embedding holds one; give another file."
        )
    return names[0]
