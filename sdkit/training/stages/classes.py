"""Captions as classes, for a U-Net that takes labels and for a prior of classes."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from sdkit.errors import ArgumentError
from sdkit.loading.configs import CLASSES
from sdkit.messages import clean
from sdkit.networks.class_list import ClassList, plain
from sdkit.networks.class_names import ClassNames
from sdkit.networks.denoiser import UNet
from sdkit.training.settings import UNetConfig
from sdkit.training.stages.examples import CachedLatents, ImageLatents, Row

LABEL_GUIDANCE = 2.0
"""Guidance scale of a model of classes that is trained with label dropout."""
MOST_FOUND = 1000
"""Largest number of classes that are taken from captions. More are no classes, but descriptions."""


class LabelledExamples:
    """Examples whose caption is the name of a class: each row has its `label` too, a scalar. For the attributes see
    `DenoisingExamples`.

    Args:
        examples: The examples.
        classes: The classes.
        none: The label of an image without a caption; None if the network has no such label.

    Raises:
        ArgumentError: A caption is that of no class.
    """

    def __init__(self, examples: CachedLatents | ImageLatents, classes: ClassList, none: int | None) -> None:
        self.examples, self.classes, self.none = examples, classes, none
        self.scale, self.shift, self.shape = examples.scale, examples.shift, examples.shape
        self.train: npt.NDArray[np.int64] = examples.train
        self.held_out, self.skipped = examples.held_out, examples.skipped
        if classes.alike:
            raise ArgumentError("two classes have the same name but for case and spaces; rename one.")
        self._labels: dict[bytes, int] = {}  # by the tokens of a caption: a cache has no more
        for ids, caption in examples.captions():
            label = classes.number(caption) if plain(caption) else none
            if label is None:
                raise self._unknown(caption)
            self._labels[ids.numpy().tobytes()] = label
        self.empty = examples.empty if none is None else examples.empty | {"label": torch.tensor(none)}
        self.identity = hashlib.sha256(f"{examples.identity} {classes.names}".encode()).hexdigest()[:16]

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, augmented for `epoch`."""
        return self._labelled(self.examples.load(item, epoch))

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        return self._labelled(self.examples.validation(i))

    def held_out_caption(self, i: int) -> str:
        """Return the name of the class of held-out example i."""
        label = int(self.validation(i)["label"])
        return "" if label == self.none else self.classes.names[label]

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""
        return self.examples.name(item)

    def _labelled(self, row: Row) -> Row:
        return row | {"label": torch.tensor(self._labels[row["ids"].numpy().tobytes()])}

    def _unknown(self, caption: str) -> ArgumentError:
        if not plain(caption):
            return ArgumentError(
                "an image has no class, and this U-Net has no label for that; give it a caption, or one more of "
                "num_class_embeds."
            )
        return ArgumentError(
            f"an image is of the class {clean(repr(caption))}, which is not one of classes; add it to them, or "
            "give the image another caption."
        )


def classes_of(
    config: UNetConfig, unet: UNet, examples: CachedLatents | ImageLatents, *, from_scratch: bool
) -> ClassNames:
    """Return the classes of a run, and name them in the config of its network.

    Args:
        config: Settings of the run.
        unet: The U-Net, which takes labels.
        examples: The examples, whose captions are the classes if neither the settings nor the network name them.
        from_scratch: Whether the U-Net has not been trained yet.

    Raises:
        ArgumentError: The classes do not fit the network or the settings.
    """
    stated = unet.network.config.get(CLASSES)
    count = unet.network.config.num_class_embeds
    if stated and config.classes and tuple(stated) != config.classes:
        raise ArgumentError("the model has classes of its own, and classes names others; leave it out.")
    names = list(config.classes or stated or [])
    if not names:
        if not from_scratch:
            raise ArgumentError("this model does not name its classes; give classes, in the order of its labels.")
        names = list(_few(caption_classes(examples)).names)
    if count is not None and len(names) > count:
        raise ArgumentError(
            f"there are {len(names)} classes, and the U-Net has {count} labels; set num_class_embeds to "
            f"{len(names) + 1}, of which one is that of no class."
        )
    if config.caption_dropout and count is not None and len(names) == count:
        raise ArgumentError(
            f"caption_dropout needs a label for no class beside the {count}; set num_class_embeds to {count + 1}, or "
            "caption_dropout to 0."
        )
    unet.network.register_to_config(**{CLASSES: names})
    return ClassNames.of(unet)


def caption_classes(examples: CachedLatents | ImageLatents) -> ClassList:
    """Return the classes that the captions of examples are; the empty caption is none."""
    return ClassList.of(caption for _, caption in examples.captions())


def _few(found: ClassList) -> ClassList:
    """Return the classes of captions. Raise ArgumentError if there are none, or so many that they are descriptions."""
    if not found.names:
        raise ArgumentError(
            "the U-Net takes class labels, and no image has a caption to be its class; name a caption_column, or give "
            "class_folders."
        )
    if len(found.names) > MOST_FOUND:
        raise ArgumentError(
            f"the images have {len(found.names)} different captions, too many to be classes; name classes, or another "
            "caption_column."
        )
    return found
