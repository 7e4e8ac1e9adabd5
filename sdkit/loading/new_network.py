"""Networks to train from scratch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sdkit.errors import SourceError
from sdkit.files import expanded
from sdkit.loading.configs import class_name, read_config
from sdkit.loading.parts import PARTS, Part
from sdkit.loading.single_file import check_size, empty
from sdkit.loading.tensors import guarded, is_file


def new_network(config: str | os.PathLike[str], name: str, **changes: Any) -> Any:
    """Return a network with random weights, in training mode, on the CPU.

    Args:
        config: A config.json of diffusers; or a folder with one, in itself or in a subfolder named `name`.
        name: The part: "vae", "unet", or "classifier".
        **changes: Fields of the config to replace.

    Raises:
        SourceError: There is no config, or it is damaged, of another class, or of too large a network.
    """
    part = PARTS[name]
    file = config_file(config, part)
    fields = read_config(file, part.checks) | changes
    found = class_name(fields)
    if found not in part.trainable:
        wanted = " or ".join(part.trainable)
        raise SourceError(f"{str(file)!r} is the config of {found}, not of {wanted}; give another.")
    check_size(part, fields, file)
    with guarded(f"the config {str(file)!r}"):
        return empty(part, fields)


def config_file(config: str | os.PathLike[str], part: Part) -> Path:
    """Return the file of a part's config: `config` itself, or the one in that folder. Raise SourceError without one."""
    path = expanded(config)
    candidates = (path, path / part.config, path / part.config_path)
    if not (file := next((candidate for candidate in candidates if is_file(candidate)), None)):
        raise SourceError(
            f"there is no config at {str(path)!r}; give a config.json of diffusers, or a folder with one."
        )
    return file
