"""Images with captions, for stages that learn from pairs of both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sdkit.data.examples import Examples
from sdkit.data.sources import open_examples
from sdkit.errors import DataError
from sdkit.messages import clean
from sdkit.processes import is_main_process
from sdkit.training.stages.images import is_cache, split


def open_captioned(data: str | os.PathLike[str], what: str, opened_with: Mapping[str, Any]) -> Examples:
    """Open images with captions. Raise DataError for a latent cache, from which `what` cannot learn."""
    if is_cache(data):
        raise DataError(
            f"{os.fspath(data)!r} is a latent cache, and {what} learns from images; give those it was made of."
        )
    examples: Examples = open_examples(data, **opened_with)
    return examples


def captioned(examples: Examples, what: str) -> npt.NDArray[np.int64]:
    """Return the indices of examples with a caption, and warn of others.

    Raises:
        DataError: Fewer than two have a caption, or all have the same, from which `what` (with its article) cannot
            learn.
    """
    captions = examples.captions
    found = np.array([i for i, caption in enumerate(captions) if caption], dtype=np.int64)
    if len(found) < 2:
        raise DataError(
            f"{len(found)} of the {len(captions)} images in {clean(examples.source)} have a caption, and {what} "
            "learns from pairs; write captions into NAME.txt beside each image, or name caption_column."
        )
    if len({captions[i] for i in found}) < 2:
        raise DataError(
            f"all images in {clean(examples.source)} have one caption, from which {what} learns nothing; give "
            "images with captions of their own."
        )
    if len(found) < len(captions) and is_main_process():
        warnings.warn(
            f"{len(captions) - len(found)} of the {len(captions)} images in {clean(examples.source)} have no caption, "
            "and are left out.", stacklevel=2,
        )  # fmt: skip
    return found


def split_captioned(examples: Examples, what: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[int]]:
    """Return the indices of all pairs, of training pairs, and of held-out pairs; see `split`."""
    pairs = captioned(examples, what)
    train, held_out = split(len(pairs))
    return pairs, pairs[train], [int(pairs[i]) for i in held_out]
