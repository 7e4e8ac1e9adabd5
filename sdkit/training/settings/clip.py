"""Settings of `train_clip`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sdkit.errors import ArgumentError
from sdkit.training.settings.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class ClipConfig(StageSettings):
    """Settings of `train_clip`. Each image is contrasted with the captions of the others of its micro-batch.

    Attributes:
        model: CLIP to fine-tune: a folder or a Hub id in transformers' layout, the result of an earlier run, or
            "emoji", the embedded CLIP.
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, or a data set's id on the Hub. Images without a caption are left out.
        init: A config.json of transformers' CLIPModel, or a folder with one: train a CLIP of this shape from scratch.
        tokenizer: Tokenizer of a CLIP trained from scratch: a folder or a Hub id. None learns one from the captions,
            with as many tokens as the config's vocab_size.
        caption_column: Column of the captions in parquet files and data sets of the Hub, or key in
            metadata; None detects it.
        batch_size: Pairs per process and micro-batch. The contrast is over batch_size x processes pairs, which stay
            the same when a run is resumed. More of them teach more; gradient accumulation does not add to them: it
            averages the losses of separate contrasts.
        validation_data: Held-out pairs (the first 1000 are used); None holds out a twentieth of the data, at
            most 16.
    """

    model: str | os.PathLike[str] = "openai/clip-vit-base-patch32"
    tokenizer: str | os.PathLike[str] | None = None
    caption_column: str | None = None
    batch_size: int = 64
    validation_data: str | os.PathLike[str] | None = None

    # Paths; fingerprints cover the contents.
    may_change = StageSettings.may_change | {"tokenizer", "validation_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import path_or_name

        if self.size is not None:
            raise ArgumentError("size has no meaning for a CLIP, whose config names the size of its images.")
        if self.evaluate:
            raise ArgumentError("evaluate measures pictures, and a CLIP makes none; leave it out.")
        if self.tokenizer is not None:
            path_or_name("tokenizer", self.tokenizer)
            if self.init is None:
                raise ArgumentError("tokenizer belongs to a CLIP trained from scratch; give init, or leave it out.")
        if self.validation_data is not None:
            path_or_name("validation_data", self.validation_data)
            self._keep_apart("validation_data", self.validation_data)

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        return super().opened_with() | {"caption_column": self.caption_column}
