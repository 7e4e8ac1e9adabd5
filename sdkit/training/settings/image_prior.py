"""Settings of `train_image_prior`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sdkit.errors import ArgumentError
from sdkit.training.settings.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class ImagePriorConfig(StageSettings):
    """Settings of `train_image_prior`. All images are embedded once, before the first step.

    Attributes:
        model: CLIP whose embeddings the prior learns: a folder or a Hub id in transformers' layout, or the result of
            `train_clip`.
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, or a data set's id on the Hub. Images without a caption are left out.
        prior: Prior to train further: a folder or a Hub id in the layout of StableUnCLIPPipeline, or the result of
            an earlier run.
        init: A config.json of diffusers' PriorTransformer, or a folder with one: train from scratch.
        caption_column: Column of the captions in parquet files and data sets of the Hub, or key in
            metadata; None detects it.
        caption_dropout: Share of samples trained with an empty caption, which classifier-free guidance
            needs.
    """

    model: str | os.PathLike[str] = "openai/clip-vit-large-patch14"
    prior: str | os.PathLike[str] | None = None
    caption_column: str | None = None
    caption_dropout: float = 0.1

    may_change = StageSettings.may_change | {"prior"}  # a path; a fingerprint covers the contents

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import number, path_or_name

        if self.size is not None:
            raise ArgumentError("size has no meaning for a prior; the config of its CLIP names the size of its images.")
        if self.augment:
            raise ArgumentError("augment has no meaning for a prior, whose images are embedded once; leave it out.")
        if self.evaluate:
            raise ArgumentError("evaluate measures pictures, and a prior makes none; leave it out.")
        if self.gradient_checkpointing:
            raise ArgumentError("gradient_checkpointing is not offered by diffusers' PriorTransformer; leave it out.")
        if self.prior is not None:
            path_or_name("prior", self.prior)
        if (self.prior is None) == (self.init is None):
            raise ArgumentError("a prior is either trained further or made: give one of prior and init.")
        self._keep("caption_dropout", number("caption_dropout", self.caption_dropout, 0, 1))

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        return super().opened_with() | {"caption_column": self.caption_column}
