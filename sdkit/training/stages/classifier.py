"""Training a classifier of noisy images: latents and classes -> noise -> network -> cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.data.labels import Labels
from sdkit.data.latent_cache.writing import own_size
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError
from sdkit.loading.new_network import new_network
from sdkit.loading.source import Source
from sdkit.messages import no_warnings, quiet
from sdkit.networks.autoencoder import VAE, latents_of
from sdkit.networks.classifier import Classifier
from sdkit.training.batches import noise_of
from sdkit.training.distributed import split_over_processes
from sdkit.training.loop import fit
from sdkit.training.settings import ClassifierConfig
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.images import identity_of, report_skipped
from sdkit.training.stages.labelled import open_labelled

RANGES = 4
"""Ranges of timesteps for which validation reports loss and accuracy, from the least noise to the most."""


def train_classifier(config: ClassifierConfig) -> Path:
    """Train a classifier of noisy images x_t, for `sdkit.guidance.classifier` (Dhariwal & Nichol 2021,
    https://arxiv.org/abs/2105.05233, section 4). An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images with classes, or a latent cache of them.

    Returns:
        The run folder. Its result/ is a classifier that `sdkit.Classifier.from_pretrained` loads.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.
    """
    return fit(ClassifierStage(config), config, Path(config.out_dir))


class ClassifierStage:
    """The stage of `train_classifier`: one player, the classifier; and a frozen VAE.

    Args:
        config: Settings of the run.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        self.config = config
        model = Source.open(config.model)
        vae_source = model if config.vae is None else Source.open(config.vae)
        self.vae = VAE(vae_source.autoencoder()).eval().requires_grad_(False)
        self.schedule: NoiseSchedule = model.schedule(latents=self.vae.kind.makes_latents)
        self.objective = DenoisingObjective(self.schedule)
        start = None if config.classifier is None else Classifier(Source.open(config.classifier).classifier())

        def numbered(labels: Labels) -> Labels:
            return labels if start is None else labels.numbered_as(start.classes, f"the classifier {config.classifier}")

        self.examples = open_labelled(config, self.vae, lambda: own_size(model, vae_source), numbered)
        self.classes = self.examples.labels.classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.classifier = self._new() if start is None else start
        self.classifier.check_fits(self.vae)
        self._check_size()
        self.classifier.network.requires_grad_(True)
        if config.gradient_checkpointing:
            self.classifier.network.enable_gradient_checkpointing()
        self.identity = {
            "data": self.examples.identity,
            "model": identity_of(self.vae.network, self.classifier.network, schedule=model.scheduler_config()),
            "vae": self.vae.identity,
        }
        self.size = len(self.examples.train)
        rate, ema = config.learning_rate, config.ema_decay > 0
        self.players = [Player("classifier", self.classifier, self.loss, learning_rate=rate, ema=ema)]

    def _new(self) -> Classifier:
        """Return a classifier with random weights, of the shape of `init` or of the default shape."""
        fields = {
            "in_channels": self.vae.channels, "num_classes": len(self.classes), "class_names": list(self.classes),
            "latents": self.vae.identity,
        }  # fmt: skip
        if self.config.init is not None:
            return Classifier(new_network(self.config.init, "classifier", **fields))
        from sdkit.loading.encoder_unet import EncoderUNet

        return Classifier(EncoderUNet(**fields))

    def _check_size(self) -> None:
        """Raise ArgumentError if the network cannot halve the latents of the images as often as it does."""
        if any(side % self.classifier.factor for side in self.examples.shape):
            needed = self.classifier.factor * self.vae.factor
            height, width = (side * self.vae.factor for side in self.examples.shape)
            raise ArgumentError(
                f"the sides of the images must divide by {needed} for this classifier, and {width} x {height} do not: "
                "give another size, or an init with fewer levels."
            )

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return posterior or pixels, class, timestep, and noise of samples (n, item).

        All random values depend only on n and the seed.
        """
        rows = []
        for n, item in samples:
            generator = noise_of(self.config.seed, n)
            row: dict[str, Any] = {**self.examples.load(item, n // self.size)}
            row["t"] = self.objective.timestep(generator)
            rows.append(row | self.objective.noise(self._shape, generator))
        return _stacked(rows)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one example."""
        return (self.vae.channels, *self.examples.shape)

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.examples.name(item) for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the cross-entropy, and the accuracy to log."""
        x_t, t = self._noised(batch)
        logits = networks["classifier"](x_t, t.to(x_t.device))
        accuracy = (logits.argmax(dim=1) == batch["label"]).float().mean()
        return F.cross_entropy(logits, batch["label"]), {"accuracy": accuracy}

    def _noised(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the noised latents (B, C, h, w) of a batch, and its timesteps (B,), on the CPU."""
        if "pixels" in batch:
            pixels = batch["pixels"]
            half = self.config.mixed_precision == "bf16"  # not in float16, where SD's VAE can overflow
            with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
                mean, logvar = self.vae.to(pixels.device).posterior(pixels)
        else:
            mean, logvar = batch["mean"], batch["logvar"]
        x0 = latents_of(mean, logvar, batch["posterior_eps"], self.examples.scale, self.examples.shift)
        t = torch.tensor(batch["t"])
        return self.schedule.add_noise(x0, batch["eps"], t), t

    def validate(self, step: int) -> dict[str, float]:
        """Return cross-entropy and accuracy on a fixed grid of held-out images, noises, and timesteps.

        They are means over all timesteps, and over each quarter of them: "accuracy_t0_249" is that of the least noise.
        The names of skipped images are written to skipped.json.
        """
        found = split_over_processes(len(self.examples.held_out), self._measured)
        report_skipped(self.examples.skipped, Path(self.config.out_dir) / "skipped.json")
        rows = [row for image in found for row in image]
        metrics = _means(rows, "")
        steps = self.schedule.num_timesteps
        for k in range(RANGES):
            low, high = k * steps // RANGES, (k + 1) * steps // RANGES
            within = [row for row in rows if low <= row[0] < high]
            metrics |= _means(within, f"_t{low}_{high - 1}") if within else {}
        return metrics

    def _measured(self, i: int) -> list[tuple[int, float, float]]:
        """Return (timestep, cross-entropy, 1 if it is right) of held-out image i at each point of the grid."""
        example = self.examples.validation(i)
        grid = self.objective.validation_grid(i, self._shape)
        rows = _stacked([{**example, **drawn} for drawn in grid])
        device = self.classifier.device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in rows.items()}
        logits, labels = self.classifier(*self._noised(batch)), batch["label"]
        losses = F.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(dim=1) == labels).float()
        return list(zip(batch["t"], losses.tolist(), right.tolist(), strict=True))

    def export(self, folder: Path) -> None:
        """Write the classifier in diffusers layout into an empty folder."""
        with quiet("diffusers"), no_warnings():
            self.classifier.network.save_pretrained(folder)


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the tensors of rows, stacked along a new first axis, and other values as lists: timesteps stay on the
    CPU, where the noise schedule is, since a GPU would synchronise for them."""
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(values) if name != "t" else values for name, values in batch.items()}


def _means(rows: list[tuple[int, float, float]], suffix: str) -> dict[str, float]:
    """Return the mean cross-entropy and accuracy of rows (timestep, cross-entropy, right)."""
    losses, right = (math.fsum(row[k] for row in rows) / len(rows) for k in (1, 2))
    return {f"loss{suffix}": losses, f"accuracy{suffix}": right}
