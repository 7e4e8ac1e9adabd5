"""Classifier guidance in the pipeline (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdkit.diffusion.guidance import check_scale, classifier
from sdkit.diffusion.schedule import NoiseSchedule, Predict
from sdkit.errors import ArgumentError
from sdkit.networks.classifier import Classifier

if TYPE_CHECKING:
    from sdkit.networks.autoencoder import VAE

Labels = str | int | Sequence[str | int]
"""A class by its name or number, or a list of them."""


@dataclass(frozen=True, kw_only=True)
class Towards:
    """The classes that N images are guided to.

    Attributes:
        network: The classifier.
        numbers: The number of each image's class.
        scale: Scale of the classifier's gradient.
    """

    network: Classifier
    numbers: Sequence[int]
    scale: float

    def guide(self, predict: Predict, images: Sequence[int], schedule: NoiseSchedule) -> Predict:
        """Return the predictor of the images with these indices, with guidance."""
        log_prob = self.network.log_prob([self.numbers[i] for i in images])
        return classifier(predict, log_prob, schedule, self.scale)


def open_classifier(
    network: Classifier | None, labels: Labels | None, scale: float, vae: VAE, *, prompts: int, copies: int
) -> Towards | None:
    """Check the classifier of a call, and its classes.

    Args:
        network: The classifier; None is none.
        labels: The class of all images, or one for each prompt.
        scale: Scale of its gradient.
        vae: The VAE of the model.
        prompts: Number of prompts.
        copies: Number of images of each prompt.

    Returns:
        What to guide by; None without a classifier.

    Raises:
        ArgumentError: The classifier is none, was trained for another VAE, or does not know a class; or there are
            labels without a classifier, or too few.
    """
    scale = check_scale(scale)
    if network is None:
        if labels is not None or scale != 1:
            name = "classifier_scale" if labels is None else "class_labels"
            raise ArgumentError(f"{name} belongs to a classifier; give one as classifier, or leave {name} out.")
        return None
    if not isinstance(network, Classifier):
        raise ArgumentError(f"classifier must be a sdkit.Classifier, not {type(network).__name__}.")
    if labels is None:
        raise ArgumentError("a classifier needs the classes to draw; give them as class_labels.")
    network.check_fits(vae)
    numbers = network.numbers_of(labels)
    if len(numbers) not in (1, prompts):
        raise ArgumentError(f"{len(numbers)} class_labels cannot serve {prompts} prompts: give one, or one for each.")
    each = numbers * prompts if len(numbers) == 1 else numbers
    return Towards(network=network, numbers=[number for number in each for _ in range(copies)], scale=scale)
