"""The judges, which no system is trained with: a classifier of digits, whose features measure distances, and a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkit.atomic import whole_folder
from sdkit.errors import SourceError, TrainingError
from sdkit.evaluation.extractors import Extractor, open_extractor
from sdkit.recipes.compare.data import CAPTIONS, SIDE, Captioned, Images, levels
from sdkit.recipes.compare.weights import load_weights
from sdkit.recipes.half_clip import write_half

FEATURES = 32
CLASSIFIER, CLIP = "classifier.safetensors", "clip"
"""Files of the judges."""
BATCH, SHIFT = 64, 2


class DigitNet(nn.Module):
    """A small convolutional classifier of grey digits, whose last hidden layer is a vector of 32 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(4 * 32, FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of images (B, 1, 16, 16) in [-1, 1]."""
        logits: Tensor = self.head(F.relu(self.body(images)))
        return logits


@dataclass(frozen=True)
class Judges:
    """The judges.

    Attributes:
        classifier: The classifier.
        clip: The CLIP.
    """

    classifier: DigitNet
    clip: Extractor

    @torch.no_grad()
    def features(self, pictures: Images) -> Tensor:
        """Return the classifier's features (N, 32)."""
        found: Tensor = self.classifier.body(_pixels(pictures))
        return found

    @torch.no_grad()
    def logits(self, pictures: Images) -> Tensor:
        """Return the classifier's logits (N, 10)."""
        found: Tensor = self.classifier(_pixels(pictures))
        return found

    def accuracy(self, pictures: Images, labels: Sequence[int]) -> float:
        """Return the share of pictures that the classifier reads as the wanted digits."""
        return float((self.logits(pictures).argmax(1) == torch.tensor(labels)).double().mean())

    def retrieval(self, pictures: Images, captions: Sequence[str]) -> float:
        """Return the share of pictures whose caption is the nearest of all twenty, by the CLIP."""
        texts = F.normalize(self.clip.embed_texts(list(CAPTIONS)))
        nearest = (self.clip(list(pictures)) @ texts.T).argmax(1).tolist()
        right: list[bool] = [CAPTIONS[i] == caption for i, caption in zip(nearest, captions, strict=True)]
        return sum(right) / len(right)


def load_judges(folder: Path) -> Judges:
    """Load the judges of a comparison.

    Raises:
        SourceError: They are missing or damaged.
    """
    if not (folder / CLASSIFIER).is_file():
        raise SourceError(f"there are no judges in {str(folder)!r}; run the comparison first.")
    classifier = DigitNet()
    load_weights(classifier, folder / CLASSIFIER)
    return Judges(classifier.float().eval(), open_extractor(f"clip:{folder / CLIP}", device="cpu"))


def save_judges(folder: Path, training: Captioned, clip: Path, steps: int) -> None:
    """Train the classifier, and write it and a trained CLIP in float16.

    Args:
        folder: Folder of the judges.
        training: Digits to train on.
        clip: Result of `train_clip`.
        steps: Steps of the classifier.
    """
    classifier = trained_classifier(training, steps)
    with whole_folder(folder, TrainingError) as out:
        save_file({key: value.half().contiguous() for key, value in classifier.state_dict().items()}, out / CLASSIFIER)
        write_half(clip, out / CLIP)


def trained_classifier(training: Captioned, steps: int, seed: int = 0) -> DigitNet:
    """Train a classifier on digits that are shifted by up to two pixels."""
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitNet()
    padded = F.pad(_pixels(training.pictures), (SHIFT,) * 4, value=-1.0)
    labels = torch.tensor(training.labels)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=source)
        top, left = torch.randint(2 * SHIFT + 1, (2,), generator=source).tolist()
        loss = F.cross_entropy(network(padded[chosen, :, top : top + SIDE, left : left + SIDE]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval()


def _pixels(pictures: Images) -> Tensor:
    """Return pictures as (N, 1, 16, 16) in [-1, 1]."""
    return levels(pictures).reshape(-1, 1, SIDE, SIDE) / 127.5 - 1
