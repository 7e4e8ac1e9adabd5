"""Settings that all stages share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdkit.errors import ArgumentError
from sdkit.files import expanded
from sdkit.training.settings.loop import LoopSettings
from sdkit.training.settings.metric import Metric

AUGMENTATIONS = ("crop", "flip")


@dataclass(frozen=True, kw_only=True)
class StageSettings(LoopSettings):
    """Settings that all stages share.

    Attributes:
        model: Model to fine-tune: a Hub id, a diffusers folder, a single file, or "emoji", the embedded model.
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, or a data set's id on the Hub; for the U-Net also a latent cache.
        split: Split of a data set on the Hub.
        image_column: Column of the images in parquet files and data sets of the Hub; None detects it.
        class_folders: Read names of folders as sd-scripts does: each image in "10_zork dog" counts ten
            times, and has the caption "zork dog" if it has no other. Where no folder is named so, the caption
            is the folder's name: its class.
        out_dir: Run folder. An existing run is resumed.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        init: A config.json of diffusers, or a folder with one: train a network of this shape from scratch.
        size: Size of the training images in pixels, one number or (height, width); None takes the model's
            own.
        augment: Augmentations: crop (at a random place instead of the centre) and flip (mirror half of the
            images).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more
            time.
        evaluate: Metrics of pictures at each validation: lpips, frechet, kid, and, for a U-Net, clip_score.
            A VAE's reconstructions, or a U-Net's drawings of captions, are compared with the held-out images.
            Another extractor than alex may follow, as in frechet:inception or kid:dinov2. Distances of so few
            images can be compared only with each other.
    """

    model: str | os.PathLike[str] = "emoji"
    data: str | os.PathLike[str]
    split: str = "train"
    image_column: str | None = None
    class_folders: bool = False
    out_dir: str | os.PathLike[str]
    learning_rate: float = 1e-5
    init: str | os.PathLike[str] | None = None
    size: int | tuple[int, int] | None = None
    augment: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    evaluate: tuple[str, ...] = ()

    # "init" is a path. The fingerprint of the model changes with the contents of the file.
    may_change = LoopSettings.may_change | {"evaluate", "init"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, number, one_of, path_or_name, strings
        from sdkit.data.transform import sides

        for name in ("model", "out_dir", *self._data_fields, *(["init"] if self.init is not None else [])):
            path_or_name(name, getattr(self, name))
        self._keep("out_dir", str(expanded(self.out_dir)))
        for name in self._data_fields:
            self._keep_apart(name, getattr(self, name))
        if expanded(self.out_dir).resolve() == expanded(self.model).resolve():
            raise ArgumentError(f"out_dir {str(self.out_dir)!r} is the model's own folder; name another.")
        self._keep("learning_rate", number("learning_rate", self.learning_rate, 0, 1))
        if self.learning_rate == 0:
            raise ArgumentError("learning_rate must be above 0.")
        if self.size is not None:
            self._keep("size", sides(self.size))
        self._keep("augment", tuple(strings("augment", self.augment)) if self.augment else ())
        for name in self.augment:
            one_of("augment", name, AUGMENTATIONS)
        self._keep("evaluate", tuple(strings("evaluate", self.evaluate)) if self.evaluate else ())
        keys = [metric.key for metric in self.metrics]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise ArgumentError(f"evaluate names {repeated} twice; leave one of them out.")
        flag("gradient_checkpointing", self.gradient_checkpointing)
        flag("class_folders", self.class_folders)
        for name, value in self.opened_with().items():
            if value is not None and not isinstance(value, (str, bool)):
                raise ArgumentError(f"{name} must be text, not {value!r}.")

    @property
    def _data_fields(self) -> tuple[str, ...]:
        """Names of the fields that hold the data to train on."""
        return ("data",)

    @property
    def sources(self) -> list[str | os.PathLike[str]]:
        """Data sets to train on."""
        return [getattr(self, name) for name in self._data_fields]

    @property
    def metrics(self) -> list[Metric]:
        """Metrics that `evaluate` names."""
        return [Metric.parse(text) for text in self.evaluate]

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        names = ("split", "image_column", "class_folders")
        return {name: getattr(self, name) for name in names}

    def _keep_apart(self, name: str, data: str | os.PathLike[str]) -> None:
        """Raise ArgumentError for an out_dir inside the data, because a resumed run would train on its own samples/."""
        inner, outer = (expanded(path).resolve() for path in (self.out_dir, data))
        if os.path.isdir(outer) and inner.is_relative_to(outer):  # noqa: PTH112 - pathlib's raises for overlong names
            raise ArgumentError(
                f"out_dir {str(self.out_dir)!r} lies in {name} {os.fspath(data)!r}, and its pictures would be trained "
                "on; name another."
            )

    @property
    def samples(self) -> Path:
        """Folder of the images that validation saves."""
        return Path(self.out_dir) / "samples"
