"""Providers of examples for a denoiser: images, or posteriors from a latent cache, each with its caption."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.data.examples import Examples, warn_of_captions
from sdkit.data.latent_cache import manifest
from sdkit.data.latent_cache.reading import Item, LatentCache, Prompt
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform
from sdkit.errors import ArgumentError
from sdkit.messages import clean
from sdkit.networks.autoencoder import Autoencoder
from sdkit.networks.text_encoder import TextEncoder
from sdkit.processes import is_main_process
from sdkit.training.batches import noise_of
from sdkit.training.distributed import split_over_processes
from sdkit.training.stage import Samples
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.images import TrainingImages, is_cache, report_skipped, split, training_transform

Row = dict[str, Tensor]
"""The tensors of one example.

The caption is `ids` (k, 77), and also `embeddings` (77k, D) if a cache holds them. The image is `pixels` (3, H, W), or
the posterior's `mean` and `logvar` (4, h, w), not scaled. If examples count differently in the loss, each
has its `weight`, a scalar.
"""

VERIFIED = 8 * 2**30
"""Largest cache, in bytes, to verify by its checksums before training. `sdkit cache` verifies caches of any size."""


class DenoisingExamples(Protocol):
    """Interface of the providers of examples.

    Attributes:
        scale: Scale of the latents.
        shift: Shift of the latents.
        shape: Height and width of the latents.
        train: Indices of the training examples.
        held_out: Indices of the held-out examples.
        empty: The empty caption, as in `Row`.
        identity: Fingerprint of the data.
        skipped: Name of each unusable image found so far -> the reason.
    """

    scale: float
    shift: float
    shape: tuple[int, int]
    train: npt.NDArray[np.int64]
    held_out: list[int]
    empty: Row
    identity: str
    skipped: dict[str, str]

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, augmented for `epoch`."""

    def validation(self, i: int) -> Row:
        """Return held-out example i."""

    def held_out_caption(self, i: int) -> str:
        """Return the caption of held-out example i."""

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""


class CachedLatents:
    """Examples from a latent cache. For the attributes see `DenoisingExamples`.

    Args:
        data: The cache. It must have been made with the same networks.
        vae: The VAE of the run.
        text: The text encoder of the run.
        size: Size of the images in pixels; None takes that of the cache.
        augment: Augmentations that the cache must have been made with; it may have more.
        trains_text: Whether the text encoder is trained. The embeddings of the cache are then ignored.
        takes_captions: Whether to warn where no image has a caption.
    """

    def __init__(
        self,
        data: str | PathLike[str],
        vae: Autoencoder,
        text: TextEncoder,
        *,
        size: int | tuple[int, int] | None = None,
        augment: Collection[str] = (),
        trains_text: bool = False,
        takes_captions: bool = True,
    ) -> None:
        self.cache, self._text = LatentCache(data), text
        made = self.cache.manifest.settings
        self.cache.check_model(
            vae=vae.identity, scale=vae.scale, shift=vae.shift, factor=vae.factor,
            tokenizer=manifest.tokenizer_identity(text),
            text=None if trains_text else manifest.text_identity(text),
            transform=wanted_of_cache(self.cache, size, augment),
        )  # fmt: skip
        self._embedded = made.embeddings and not trains_text
        self.scale, self.shift = made.scale, made.shift
        self.shape = (made.size[0] // made.factor, made.size[1] // made.factor)
        self.train, self.held_out = split_cache(self.cache)
        self.empty = self._caption(self.cache.empty)
        self.identity = self.cache.manifest.identity
        verify_if_small(self.cache)
        self.skipped = {image.name: image.reason for image in self.cache.manifest.skipped}
        if takes_captions:
            self._warn_of_captions(made.augmentations)

    def _warn_of_captions(self, copies: int) -> None:
        """Warn, in the main process, if no image of the cache has a caption."""
        images = range(0, len(self.cache), copies)
        empty = self.empty["ids"]
        if is_main_process() and all(torch.equal(self.cache[i]["ids"], empty) for i in images):
            warnings.warn(
                f"none of the {len(images)} images in {clean(self.cache.path)} has a caption; the empty prompt is "
                "taken for all.", stacklevel=1,
            )  # fmt: skip

    def load(self, item: int, epoch: int) -> Row:  # noqa: ARG002 - a cache's augmentations are examples of their own
        """Return training example `item`."""
        return self._example(int(self.train[item]))

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        return self._example(self.held_out[i])

    def held_out_caption(self, i: int) -> str:
        """Return the caption of held-out example i, as its tokens spell it: a cache does not hold the text."""
        return self._text.spelled(self.cache[self.held_out[i]]["ids"])

    def captions(self) -> Iterator[tuple[Tensor, str]]:
        """Yield the token ids (k, 77) and the text, as its tokens spell it, of each distinct caption."""
        distinct = {(ids := self.cache[i]["ids"]).numpy().tobytes(): ids for i in range(len(self.cache))}
        return ((ids, self._text.spelled(ids)) for ids in distinct.values())

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""
        return self.cache.name(int(self.train[item]))

    def _example(self, index: int) -> Row:
        item = self.cache[index]
        return {"mean": item["mean"], "logvar": item["logvar"], **self._caption(item)}

    def _caption(self, entry: Item | Prompt) -> Row:
        embeddings = entry["embeddings"] if self._embedded else None
        return {"ids": entry["ids"]} | ({} if embeddings is None else {"embeddings": embeddings})


class ImageLatents:
    """Examples from images. For the attributes see `DenoisingExamples`.

    The stage encodes the images at each step, and each epoch has new crops and flips.

    Args:
        examples: Images with captions.
        transform: The transform of training images.
        vae: The VAE of the run.
        text: The text encoder of the run.
        seed: Random seed of the augmentations.
        takes_captions: Whether to warn where no image has a caption.
    """

    def __init__(
        self, examples: Examples, transform: Transform, vae: Autoencoder, text: TextEncoder, *, seed: int = 0,
        takes_captions: bool = True,
    ) -> None:  # fmt: skip
        if takes_captions:
            warn_of_captions(examples)
        size = transform.size
        self.images = TrainingImages(examples, transform, seed)
        self.identity = examples.identity
        self.validation_images = TrainingImages(examples, Transform(size=size), seed=0)
        self.scale, self.shift = vae.scale, vae.shift
        self.shape = (size[0] // vae.factor, size[1] // vae.factor)
        self.train, self.held_out = split(len(examples))
        self._text = text
        self.empty = {"ids": self._ids("")}
        self.skipped = self.images.skipped = self.validation_images.skipped

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, or the next usable one, augmented for `epoch`."""
        pixels, example = self.images.load(self.train, item, epoch)
        return {"pixels": pixels, "ids": self._ids(example.caption)}

    def validation(self, i: int) -> Row:
        """Return held-out example i."""
        pixels, example = self.validation_images.load_held_out(self.held_out, i)
        return {"pixels": pixels, "ids": self._ids(example.caption)}

    def held_out_caption(self, i: int) -> str:
        """Return the caption of held-out example i."""
        return self.validation_images.load_held_out(self.held_out, i)[1].caption

    def captions(self) -> Iterator[tuple[Tensor, str]]:
        """Yield the token ids (k, 77) and the text of each distinct caption."""
        return ((self._ids(caption), caption) for caption in dict.fromkeys(self.images.examples.captions))

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""
        return self.images.examples[int(self.train[item])].name

    def _ids(self, caption: str) -> Tensor:
        ids: Tensor = self._text.tokenize(caption)[0][0]
        return ids


def open_provider(
    data: str | PathLike[str],
    vae: Autoencoder,
    text: TextEncoder,
    *,
    size: int | tuple[int, int] | None = None,
    own_size: tuple[int, int],
    augment: Collection[str] = (),
    seed: int = 0,
    trains_text: bool = False,
    takes_captions: bool = True,
    cached: type[CachedLatents] = CachedLatents,
    **opened_with: Any,
) -> DenoisingExamples:
    """Open `data`, which is a latent cache or images.

    Args:
        data: A latent cache, or any source that `open_examples` takes.
        vae: The VAE of the run.
        text: The text encoder of the run.
        size: Size of the images in pixels; None takes that of the cache, or `own_size`.
        own_size: Height and width that the model was made for, the default size of images.
        augment: Augmentations, as in `training_transform`.
        seed: Random seed of the augmentations of images.
        trains_text: Whether the text encoder is trained.
        takes_captions: Whether the U-Net takes captions or classes.
        cached: The provider of examples from a cache.
        **opened_with: Keyword arguments of `open_examples`. A latent cache takes none but defaults.

    Raises:
        SdkitError: The data cannot be opened, or do not fit the settings or the networks.
    """
    if is_cache(data):
        check_opened_with_nothing(opened_with)
        own = {} if takes_captions else {"takes_captions": False}
        return cached(data, vae, text, size=size, augment=augment, trains_text=trains_text, **own)
    height_width: Any = size or own_size
    vae.check_size(height_width)
    examples = open_examples(data, **opened_with)
    transform = training_transform(height_width, augment)
    return ImageLatents(examples, transform, vae, text, seed=seed, takes_captions=takes_captions)


def wanted_of_cache(cache: LatentCache, size: int | tuple[int, int] | None, augment: Collection[str]) -> Transform:
    """Return the transform that a run asks of a cache: its own size and augmentations, unless the run names others."""
    made = cache.manifest.settings
    wanted: Any = size or made.size
    crop = "random" if "crop" in augment else made.crop
    return Transform(size=wanted, crop=crop, flip="flip" in augment or made.flip)


def split_cache(cache: LatentCache) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Return the indices of a cache's training examples, all augmentations of each image, and of its held-out ones, the
    first augmentation of each image; see `split`."""
    copies = cache.manifest.settings.augmentations
    train, held_out = split(cache.manifest.images)
    return (train[:, None] * copies + np.arange(copies)).ravel(), [image * copies for image in held_out]


def verify_if_small(cache: LatentCache) -> None:
    """Verify a cache by its checksums, in the main process, unless that would take long."""
    if is_main_process() and sum(file.bytes for file in cache.manifest.files) <= VERIFIED:
        cache.verify()


def check_opened_with_nothing(opened_with: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless all keyword arguments of `open_examples` are defaults, as a latent cache needs."""
    defaults = {name: parameter.default for name, parameter in signature(open_examples).parameters.items()}
    if given := [name for name, value in opened_with.items() if value != defaults[name]]:
        raise ArgumentError(f"{given[0]}= has no meaning for a latent cache; give it to sdkit cache instead.")


def denoising_batch(
    samples: Samples,
    examples: DenoisingExamples,
    objective: DenoisingObjective,
    shape: tuple[int, ...],
    *,
    seed: int,
    caption_dropout: float,
) -> dict[str, Any]:
    """Return examples with a timestep `t` and noise for each, as `collated` does. For the arguments see
    `denoising_rows`."""
    drawn = denoising_rows(samples, examples, objective, shape, seed=seed, caption_dropout=caption_dropout)
    return collated(drawn)


def denoising_rows(
    samples: Samples,
    examples: DenoisingExamples,
    objective: DenoisingObjective,
    shape: tuple[int, ...],
    *,
    seed: int,
    caption_dropout: float,
) -> list[dict[str, Any]]:
    """Return examples with a timestep `t` and noise for each, as rows of a batch.

    All random values depend only on n and the seed.

    Args:
        samples: Pairs (n, item) of the number of a sample in the run, and the index of its example.
        examples: The provider of examples.
        objective: The objective that draws timesteps and noise.
        shape: Shape (C, h, w) of the latents of one example.
        seed: Random seed of the run.
        caption_dropout: Share of the samples whose caption is replaced by the empty one.
    """
    rows = []
    for n, item in samples:
        row: dict[str, Any] = {**examples.load(item, n // len(examples.train))}
        generator = noise_of(seed, n)
        if float(torch.rand((), generator=generator)) < caption_dropout:
            row |= examples.empty
        row["t"] = objective.timestep(generator)
        row |= objective.noise(shape, generator)
        rows.append(row)
    return rows


def validation_batch(
    i: int, examples: DenoisingExamples, objective: DenoisingObjective, shape: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """Return held-out example i at each point of the validation grid, as `collated` does, with its tensors on a device.

    Args:
        i: Number of the held-out example.
        examples: The provider of examples.
        objective: The objective that draws the grid.
        shape: Shape (C, h, w) of the latents of one example.
        device: Device of the tensors.
    """
    example = examples.validation(i)
    rows = [example | drawn for drawn in objective.validation_grid(i, shape)]
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in collated(rows).items()}


def validation_metrics(
    examples: DenoisingExamples,
    loss: Callable[[int], float],
    evaluators: Iterable[Callable[[int], Mapping[str, float]]],
    step: int,
    *,
    skipped: Path,
) -> dict[str, float]:
    """Return the mean loss of the held-out examples, which processes share, and the metrics of evaluators.

    Args:
        examples: The provider of examples.
        loss: Returns the loss of held-out example i.
        evaluators: Functions of the step that return further metrics, in order.
        step: The step of the run.
        skipped: File to write the names of skipped images to.
    """
    losses = split_over_processes(len(examples.held_out), loss)
    report_skipped(examples.skipped, skipped)
    metrics = {"loss": math.fsum(losses) / len(losses)}
    for evaluator in evaluators:
        metrics |= evaluator(step)
    return metrics


def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch of rows.

    Args:
        rows: Examples as in `Row`. They may hold further tensors and values.

    Returns:
        Tensors stacked along a new first axis, and other values as lists. Captions are padded to the longest, and
        `mask` (B, 77k) is False at the padding; it is None if all captions are equally long. `keys` holds the padded
        token ids of each caption as bytes.
    """
    lengths = [row["ids"].numel() for row in rows]
    batch: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    for key in {"ids", "embeddings"} & batch.keys():
        longest = max(len(value) for value in batch[key])
        batch[key] = [F.pad(value, (0, 0, 0, longest - len(value))) for value in batch[key]]
    stacked = {key: torch.stack(values) for key, values in batch.items() if isinstance(values[0], Tensor)}
    keys = [ids.numpy().tobytes() for ids in batch["ids"]]
    mask = None if len({*lengths}) == 1 else torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return batch | stacked | {"keys": keys, "mask": mask}
