"""Settings of `train_controlnet`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.training.settings.denoising import DenoisingSettings

CONDITIONS = ("canny", "grey", "outlines", "colour_blocks")  # names in sdkit.images.conditions.CONDITIONS


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(DenoisingSettings):
    """Settings of `train_controlnet`. The model is frozen; the data need a condition for each image.

    Attributes:
        controlnet: ControlNet to train further: a folder, a Hub id, or a single file. None begins with a copy
            of the U-Net's encoder.
        condition: Make the conditions of the images: canny (edges), grey, outlines (of a mask or a semantic
            map), or colour_blocks. None reads them.
        conditioning_data: Data set of the conditions, images of the same names as those in data; with condition,
            of the images that they are made of, which a latent cache does not hold. None reads the conditions
            from a column of data.
        conditioning_image_column: Column of the conditions in parquet files and data sets of the Hub; beside a
            latent cache, a column of conditioning_data.
        caption_dropout: Share of samples trained with an empty caption, so that the ControlNet learns to read
            the condition alone (Zhang et al. 2023, section 3.4).
        validation_prompts: Prompts of images generated at each validation, always from the same seeds, with
            the conditions of the first held-out images.
    """

    controlnet: str | os.PathLike[str] | None = None
    condition: str | None = None
    conditioning_data: str | os.PathLike[str] | None = None
    conditioning_image_column: str = "conditioning_image"
    caption_dropout: float = 0.5

    # Paths; fingerprints cover the contents.
    may_change = DenoisingSettings.may_change | {"controlnet", "conditioning_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import one_of, path_or_name

        if self.init is not None:
            raise ArgumentError(
                "init has no meaning for a ControlNet, which begins as a copy of the U-Net; leave it out."
            )
        for name in ("controlnet", "conditioning_data"):
            if (value := getattr(self, name)) is not None:
                path_or_name(name, value)
        if self.conditioning_data is not None:
            self._keep_apart("conditioning_data", self.conditioning_data)
        path_or_name("conditioning_image_column", self.conditioning_image_column)
        if self.condition is not None:
            one_of("condition", self.condition, CONDITIONS)
        named = self.conditioning_image_column != type(self).conditioning_image_column
        if named and self.condition is not None and self.conditioning_data is None:
            raise ArgumentError(
                "conditioning_image_column names conditions that are there, and condition makes them of the images; "
                "leave one of them out."
            )
