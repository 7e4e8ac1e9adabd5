"""DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242): a model learns one object from a few images, while
images of the object's class keep the rest of the class as it is (prior preservation, section 3.2)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdkit.atomic import atomic_write
from sdkit.data.examples import Examples
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform
from sdkit.errors import ArgumentError, DataError
from sdkit.messages import clean
from sdkit.networks.autoencoder import VAE
from sdkit.networks.text_encoder import TextEncoder
from sdkit.processes import is_main_process
from sdkit.training.batches import item_of, noise_of
from sdkit.training.distributed import split_over_processes
from sdkit.training.settings import DreamBoothSettings
from sdkit.training.stage import Samples
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.examples import ImageLatents, Row
from sdkit.training.stages.images import TrainingImages, is_cache, training_transform

CLASS_IMAGES = 100
"""Number of class images that are drawn if nobody says how many; that of diffusers' script."""
OTHER_SEED = 2**31
"""Added to the run's seed for the class images, whose noise and order must be others than the object's. The settings
take seeds below it."""


def open_instances(
    config: DreamBoothSettings, data: str | os.PathLike[str], vae: VAE, text: TextEncoder, own_size: tuple[int, int]
) -> ImageLatents:
    """Open the images of the object to learn.

    Args:
        config: Settings of the run.
        data: The images, `config.instance_data`.
        vae: The VAE of the run.
        text: The text encoder of the run.
        own_size: Height and width that the model was made for, the default size of images.

    Raises:
        ArgumentError: The data are a latent cache, or the VAE cannot encode this size.
        DataError: There is no image, or no image has a caption and there is no `instance_prompt`.
    """
    if is_cache(data):
        raise ArgumentError(_cached("instance_data"))
    height_width: Any = config.size or own_size
    vae.check_size(height_width)
    examples = open_examples(data, **config.opened_with())
    if config.instance_prompt is not None:
        examples = examples.captioned(config.instance_prompt)
    elif not examples.has_captions:
        raise DataError(
            f"no image in {clean(examples.source)} has a caption; say what the object is called (instance_prompt)."
        )
    return ImageLatents(examples, training_transform(height_width, config.augment), vae, text, seed=config.seed)


class ClassImages:
    """Images of the object's class: those in `class_data`, and those that the model draws before it is trained.

    The drawn ones are files in the run folder. Each depends on its number and the model alone, so that they are the
    same for any number of processes, and a run that was killed draws only those that are missing.

    Args:
        config: Settings of the run, with a `class_prompt`.
        transform: The transform of training images.
        ids: Token ids (k, 77) of the class prompt.
        model: What a drawn image depends on beside the settings, such as the fingerprint of the networks.
        draw: Function from prompt and seed to an image.
        skipped: Name of each unusable image found so far -> the reason; this class adds to it.

    Attributes:
        given: Images of `class_data`; None if there are none.
        own: Number of them that are used.
        wanted: Number of images to draw.
        folder: Folder of the drawn images. Its name changes with everything that they depend on.
        identity: Fingerprint of the class images.

    Raises:
        SdkitError: `class_data` cannot be opened.
    """

    def __init__(
        self,
        config: DreamBoothSettings,
        transform: Transform,
        ids: Tensor,
        *,
        model: Sequence[str | float],
        draw: Callable[[str, int], Image.Image],
        skipped: dict[str, str],
    ) -> None:
        assert config.class_prompt is not None
        self.prompt, self.seed, self.ids, self._transform = config.class_prompt, config.seed, ids, transform
        self._draw, self._skipped = draw, skipped
        self.given = None if config.class_data is None else self._open_given(config, config.class_data)
        found = 0 if self.given is None else len(self.given.examples)
        count = config.class_count or found or CLASS_IMAGES
        self.own = min(found, count)
        self.wanted = count - self.own
        drawn = [*model, self.prompt, config.seed, config.mixed_precision, list(transform.size)]
        self.folder = Path(config.out_dir) / "class_images" / _fingerprint(drawn)
        known = None if self.given is None else self.given.examples.identity
        self.identity = _fingerprint([known, self.own, self.wanted, self.folder.name if self.wanted else None])
        self._drawn: TrainingImages | None = None

    def _open_given(self, config: DreamBoothSettings, data: str | os.PathLike[str]) -> TrainingImages:
        if is_cache(data):
            raise ArgumentError(_cached("class_data"))
        return self._images(open_examples(data, split=config.split))

    def _images(self, examples: Examples) -> TrainingImages:
        images = TrainingImages(examples, self._transform, self.seed + OTHER_SEED)
        images.skipped = self._skipped
        return images

    def __len__(self) -> int:
        return self.own + self.wanted

    def prepare(self) -> None:
        """Draw the images that are missing. Call this on every process, with the networks as they are before training.

        Raises:
            Unfinished: A process was asked to stop. The images drawn so far are kept.
        """
        if not self.wanted:
            return
        missing = sum(not self._file(i).exists() for i in range(self.wanted))
        hidden = None if missing and is_main_process() else True  # None: tqdm hides the bar if stderr is no terminal
        with tqdm(total=self.wanted, disable=hidden, desc="class images") as bar:
            split_over_processes(self.wanted, lambda i: self._make(i, bar))
        self._drawn = self._images(open_examples(self.folder))

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:05}.png"

    def _make(self, i: int, bar: tqdm[Any]) -> None:
        """Draw image i, unless its file exists."""
        file = self._file(i)
        if not file.exists():
            image = self._draw(self.prompt, self.seed + i)
            with atomic_write(file) as temporary:
                image.save(temporary)
        bar.update()

    def load(self, item: int, epoch: int) -> Row:
        """Return class image `item`, or the next usable one, augmented for `epoch`."""
        if self.given is not None and item < self.own:
            pixels, _ = self.given.load(range(self.own), item, epoch)
        else:
            assert self._drawn is not None
            pixels, _ = self._drawn.load(range(self.wanted), item - self.own, epoch)
        return {"pixels": pixels, "ids": self.ids}

    def rows(self, samples: Samples, objective: DenoisingObjective, shape: tuple[int, ...]) -> list[dict[str, Any]]:
        """Return a class image for each sample (n, item), with a timestep and noise of its own, as rows of a batch.

        They depend only on n and the seed.
        """
        rows = []
        for n, _ in samples:
            generator = noise_of(self.seed + OTHER_SEED, n)
            item = item_of(self.seed + OTHER_SEED, n, len(self))
            row: dict[str, Any] = {**self.load(item, n // len(self)), "t": objective.timestep(generator)}
            rows.append(row | objective.noise(shape, generator))
        return rows


def prior_preserving_loss(
    objective: DenoisingObjective, output: Tensor, target: Tensor, t: Sequence[int], prior_weight: float
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Return DreamBooth's loss (Ruiz et al. 2023, section 3.2): that of the object plus `prior_weight` times that of
    the class. Both have the weights of min-SNR, as w_t stands before both in the paper; diffusers' script weights the
    first alone.

    Args:
        objective: The denoising objective.
        output: Output of the network (2B, C, h, w): first for the object's images, then for the class's.
        target: Its target (2B, C, h, w).
        t: Timesteps, one for each of the 2B.
        prior_weight: Weight of the class's loss.

    Returns:
        The loss; and `instance_loss` and `prior_loss`, its two parts.
    """
    half = len(output) // 2
    instance, _ = objective.loss(output[:half], target[:half], t[:half])
    prior, _ = objective.loss(output[half:], target[half:], t[half:])
    return instance + prior_weight * prior, {"instance_loss": instance.detach(), "prior_loss": prior.detach()}


def _cached(name: str) -> str:
    return f"{name} is a latent cache, which DreamBooth cannot read; give the images themselves."


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
