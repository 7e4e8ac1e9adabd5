"""Settings of `train_classifier`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.training.settings.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(StageSettings):
    """Settings of `train_classifier`. `data` may also be a latent cache.

    The default network is ADM's of three levels, of 10 million weights; `init` takes the config of an `EncoderUNet`
    of another shape.

    Attributes:
        model: Model that the classifier is to guide, for its VAE, its noise schedule, and its size: a Hub id, a
            diffusers folder, a single file, or "emoji", the embedded model.
        vae: VAE to use in place of the model's own: a folder, a Hub id, or a single file; "pixels" classifies
            pixels.
        classifier: Classifier to train further: a folder or a Hub id. None trains one from scratch.
        label_column: Column of the classes: a key of metadata.jsonl, a field of .json files in tar shards, or a
            column of parquet files and data sets of the Hub. None takes the names of folders.
        label_data: With a latent cache: the images that it was made of, to read the classes from. None takes
            the names of their folders.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
    """

    vae: str | os.PathLike[str] | None = None
    classifier: str | os.PathLike[str] | None = None
    label_column: str | None = None
    label_data: str | os.PathLike[str] | None = None
    learning_rate: float = 3e-4

    # Paths; fingerprints cover the contents.
    may_change = StageSettings.may_change | {"vae", "classifier", "label_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import path_or_name

        for name in ("vae", "classifier", "label_column", "label_data"):
            if (value := getattr(self, name)) is not None:
                path_or_name(name, value)
        if self.classifier is not None and self.init is not None:
            raise ArgumentError("classifier and init both name the network to train; leave one of them out.")
        if self.evaluate:
            raise ArgumentError("evaluate measures pictures, and a classifier makes none; leave it out.")
        if self.label_data is not None:
            self._keep_apart("label_data", self.label_data)
