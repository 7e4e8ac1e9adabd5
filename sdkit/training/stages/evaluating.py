"""Metrics of the pictures that a run makes, measured at each validation against the held-out images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkit.errors import ArgumentError
from sdkit.evaluation.clip_score import clip_score
from sdkit.evaluation.extractors import Extractor, open_extractor
from sdkit.evaluation.frechet import frechet_distance
from sdkit.evaluation.kernel_distance import kid
from sdkit.images import to_pil
from sdkit.networks.lpips import LPIPS
from sdkit.training.distributed import split_over_processes
from sdkit.training.settings import Metric


class Picture(NamedTuple):
    """A picture that a run has made, and the held-out image that it should resemble.

    Attributes:
        made: The picture (3, H, W) in [-1, 1].
        original: The held-out image, shaped like it.
        caption: The caption of the image.
    """

    made: Tensor
    original: Tensor
    caption: str = ""


class Measured(NamedTuple):
    """One picture, as the metrics need it.

    Attributes:
        lpips: Its LPIPS from the original; None if that is not asked for.
        features: Extractor -> features of the picture and of the original (2, D).
        texts: Extractor -> embedding of the caption (D,), for CLIP scores.
    """

    lpips: float | None
    features: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]


class PictureMetrics:
    """An evaluator of a stage: metrics of one picture for each held-out image.

    Each process makes and measures its share of the pictures. All processes then have all features, in the same order,
    so the metrics do not depend on the number of processes.

    Args:
        metrics: Metrics to report.
        count: Number of held-out images.
        picture: Makes the picture for held-out image i.
        size: Height and width of the pictures in pixels.
        device: Returns the device of the run's networks.

    Raises:
        ArgumentError: A metric cannot be computed of pictures of this size.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        *,
        count: int,
        picture: Callable[[int], Picture],
        size: tuple[int, int],
        device: Callable[[], torch.device],
    ) -> None:
        self.metrics, self.count, self.picture, self.device = metrics, count, picture, device
        self.lpips = LPIPS.from_pretrained("alex") if any(one.name == "lpips" for one in metrics) else None
        if self.lpips and min(size) < self.lpips.smallest:
            raise ArgumentError(
                f"evaluate lpips needs pictures of at least {self.lpips.smallest} x {self.lpips.smallest} pixels, not "
                f"{size[0]} x {size[1]}; leave it out, or change the size."
            )
        if count < 2 and any(one.name == "kid" for one in metrics):
            raise ArgumentError("evaluate kid needs at least 2 held-out images, and there is 1; leave it out.")
        self._opened: dict[str, Extractor] = {}

    def __call__(self, step: int) -> Mapping[str, float]:  # noqa: ARG002 - pictures depend on the weights alone
        """Return the metrics by name, the same on every process."""
        networks = self._networks()
        for network in networks:
            network.to(self.device())
        found = split_over_processes(self.count, self._measured)
        for network in networks:  # frozen networks need GPU memory only while they work
            network.cpu()
        return {metric.key: self._value(metric, found) for metric in self.metrics}

    def _networks(self) -> list[Any]:
        """Return the frozen networks that measure. Extractors are loaded here: the device is known only now."""
        for name in {metric.extractor for metric in self.metrics} - {"", *self._opened}:
            self._opened[name] = open_extractor(name, device=self.device())
        return [*(extractor.network for extractor in self._opened.values()), *([self.lpips] if self.lpips else [])]

    def _measured(self, i: int) -> Measured:
        """Make and measure the picture for held-out image i."""
        picture = self.picture(i)
        both = torch.stack([picture.made, picture.original])
        images = to_pil(both)
        lpips = None
        if self.lpips:
            made, original = both.to(self.device()).chunk(2)
            lpips = float(self.lpips(made, original))
        features = {name: extractor(images) for name, extractor in self._opened.items()}
        scored = {metric.extractor for metric in self.metrics if metric.name == "clip_score"}
        texts = {name: self._opened[name].embed_texts([picture.caption])[0] for name in scored}
        return Measured(lpips, features, texts)

    def _value(self, metric: Metric, found: Sequence[Measured]) -> float:
        """Return one metric of all pictures."""
        if metric.name == "lpips":
            return sum(one.lpips or 0.0 for one in found) / len(found)
        made, originals = torch.stack([one.features[metric.extractor] for one in found]).unbind(1)
        if metric.name == "frechet":
            return frechet_distance(made, originals)
        if metric.name == "kid":
            return kid(made, originals)
        return float(clip_score(made, torch.stack([one.texts[metric.extractor] for one in found])).mean())
