"""Networks to train from scratch."""

from __future__ import annotations

import os
from typing import Any

from sdkit.errors import SourceError
from sdkit.files import expanded
from sdkit.loading.configs import read_config
from sdkit.loading.diffusers_folder import class_name
from sdkit.loading.single_file import check_size, empty
from sdkit.loading.tensors import guarded, is_file

TRAINABLE = {"vae": ("AutoencoderKL", "VQModel"), "unet": ("UNet2DConditionModel",)}


def new_network(config: str | os.PathLike[str], part: str) -> Any:
    """Return a network with random weights, in training mode, on the CPU.

    Args:
        config: A config.json of diffusers; or a folder with one, in itself or in a subfolder named `part`.
        part: "vae" or "unet".

    Raises:
        SourceError: There is no config, or it is damaged, of another class, or of too large a network.
    """
    path = expanded(config)
    candidates = (path, path / "config.json", path / part / "config.json")
    if not (file := next((candidate for candidate in candidates if is_file(candidate)), None)):
        raise SourceError(
            f"there is no config at {str(path)!r}; give a config.json of diffusers, or a folder with one."
        )
    fields = read_config(file, part)
    name = class_name(fields)
    if name not in TRAINABLE[part]:
        wanted = " or ".join(TRAINABLE[part])
        raise SourceError(f"{str(file)!r} is the config of {name}, not of {wanted}; give another.")
    check_size(part, fields, file)
    with guarded(f"the config {str(file)!r}"):
        return empty(part, fields)
