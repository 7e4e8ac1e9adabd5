"""Kinds of models that are not Stable Diffusion, as `sdkit generate` tells them apart by their folders."""

from __future__ import annotations

import os

from sdkit.loading.configs import read_json
from sdkit.loading.place import resolve
from sdkit.loading.tensors import is_file
from sdkit.loading.unclip_folder import INDEX

UNCLIP_PIPELINES = ("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline")


def model_kind(source: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Return the kind of a model: "codes" for the result of `train_prior`, "level" for that of one level of a VQ-VAE-2,
    "unclip" for DALL-E 2 in the layout of diffusers' StableUnCLIPPipeline; None for any other.

    Args:
        source: A Hub id, a folder, a file, or the name of an embedded model.
        revision: Branch, tag, or commit of a Hub repository.

    Raises:
        SourceError: There is no such source, or its model_index.json is damaged.
    """
    place = resolve(source, revision=revision)
    if place.kind not in ("hub", "folder"):
        return None
    root = place.root([INDEX])
    if (root / "prior").is_dir():
        for folder, kind in (("vqvae", "codes"), ("vqvae2", "level")):
            if (root / folder).is_dir():
                return kind
    index = read_json(root / INDEX) if is_file(root / INDEX) else {}
    return "unclip" if index.get("_class_name") in UNCLIP_PIPELINES else None
