"""Weights of the recipe's own networks: the generator of the GAN, and the classifier that judges."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sdkit.errors import SourceError
from sdkit.messages import clean, first_line


def load_weights(network: nn.Module, path: Path) -> None:
    """Load the weights of a network.

    Raises:
        SourceError: The file is missing, damaged, or of another network.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SourceError(
            f"{clean(repr(str(path)))} is missing or damaged ({first_line(error)}); name another --out."
        ) from error
