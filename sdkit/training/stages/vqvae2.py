"""Training a VQ-VAE-2 (Razavi et al. 2019, https://arxiv.org/abs/1906.00446): pixels, two levels of codes, pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor, nn

from sdkit import images as image_io
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform, draw, sides
from sdkit.diffusion.losses import l2
from sdkit.errors import ArgumentError, DataError
from sdkit.evaluation.codebook import codebook_use
from sdkit.evaluation.similarity import psnr
from sdkit.networks.vqvae2 import VQVAE2, TwoLevels
from sdkit.training.distributed import sharded_as, split_over_processes, unwrapped
from sdkit.training.loop import fit
from sdkit.training.settings import LEVELS, VQVAE2Config
from sdkit.training.signals import raise_if_stopped
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.codebook import Chosen, CodebookAverages, of_all_processes
from sdkit.training.stages.evaluating import Picture, PictureMetrics
from sdkit.training.stages.images import (
    TrainingImages,
    identity_of,
    is_cache,
    report_skipped,
    split,
    training_transform,
)

GROUPS = 32  # largest number of groups of the group norms
SHOWN = 8  # images on the sheet of each validation
RESTARTS = {"top": 2**32 - 2, "bottom": 2**32 - 3}
"""Passed to `draw` as the number of an augmentation; no image has that many."""


def train_vqvae2(config: VQVAE2Config) -> Path:
    """Train a VQ-VAE-2 from scratch. An existing run is resumed.

    Args:
        config: Settings of the run.

    Returns:
        The run folder. Its result/ is for `train_prior` with a level, and for `VQVAE2.from_pretrained`.

    Raises:
        SdkitError: The settings or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.
    """
    return fit(VQVAE2Stage(config), config, Path(config.out_dir))


class WithAverages(nn.Module):
    """A VQ-VAE-2 and the moving averages of its codes, which checkpoints hold with it.

    Args:
        network: The network.
        decay: Decay of the averages; 0 makes none.
    """

    def __init__(self, network: VQVAE2, decay: float) -> None:
        super().__init__()
        self.network = network
        levels = LEVELS if decay else ()
        self.averages = nn.ModuleDict(
            {level: CodebookAverages(codebook_of(network, level), decay=decay) for level in levels}
        )

    def forward(self, pixels: Tensor) -> TwoLevels:
        """Return the reconstruction of pixels (B, 3, H, W)."""
        found: TwoLevels = self.network(pixels, train_codes=len(self.averages) == 0)
        return found


def codebook_of(network: VQVAE2, level: str) -> Tensor:
    """Return the codes (N, C) of a level, "top" or "bottom"."""
    codes: Tensor = network.get_parameter(f"{level}_codes.weight")
    return codes


class VQVAE2Stage:
    """The stage of `train_vqvae2`: one player, the VQ-VAE-2.

    Args:
        config: Settings of the run.

    Attributes:
        evaluators: Functions of the step that return further metrics of each validation, the same on every process.

    Raises:
        SdkitError: The settings or the data cannot be used.
    """

    def __init__(self, config: VQVAE2Config) -> None:
        self.config = config
        height, width = size = sides(config.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            channels = config.width
            network = VQVAE2(
                (channels,) * 3, (channels,) * 2, latent_channels=config.latent_channels,
                num_vq_embeddings=config.codes, norm_num_groups=math.gcd(GROUPS, channels), sample_size=size,
            )  # fmt: skip
        if height % (2 * network.factor) or width % (2 * network.factor):
            raise ArgumentError(f"size {height} x {width} must divide by {2 * network.factor}; change it.")
        if is_cache(config.data):
            raise DataError(f"{config.data!s} is a latent cache; give the images that it was made of.")
        self.identity = {"model": identity_of(network)}
        self.model = WithAverages(network, config.codebook_decay)
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        examples = open_examples(config.data, **config.opened_with())
        self.identity["data"] = examples.identity
        self.train, self.held_out = split(len(examples))
        self.images = TrainingImages(examples, training_transform(size, config.augment), config.seed)
        self.validation = TrainingImages(examples, Transform(size=size), seed=0)
        self.validation.skipped = self.images.skipped
        self.size = len(self.train)
        self.evaluators: list[Callable[[int], Mapping[str, float]]] = []
        if config.evaluate:
            pictures = PictureMetrics(
                config.metrics, count=len(self.held_out), picture=self._picture, size=size, device=lambda: self._device
            )
            self.evaluators.append(pictures)
        rate, ema = config.learning_rate, config.ema_decay > 0
        update = self.update_codes if config.codebook_decay else None
        self.players = [
            Player("vqvae2", self.model, self.loss, learning_rate=rate, ema=ema, after_update=update),
        ]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return pixels (B, 3, H, W) of samples (n, item), and their numbers n."""
        pixels = [self.images.load(self.train, item, n // self.size)[0] for n, item in samples]
        return {"pixels": torch.stack(pixels), "n": torch.tensor([n for n, _ in samples])}

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.images.examples[int(self.train[item])].name for _, item in samples]

    def loss(
        self,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Any],
        step: int,  # noqa: ARG002 - all steps are alike
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the squared error of the reconstruction plus the losses of both codebooks; and these parts.

        The latents and codes are added to the batch, for the moving averages.
        """
        found: TwoLevels = networks["vqvae2"](batch["pixels"])
        batch["levels"] = {
            "top": (found.z_top.detach().float(), found.top), "bottom": (found.z_bottom.detach().float(), found.bottom)
        }  # fmt: skip
        reconstruction = l2(found.pixels, batch["pixels"])
        return reconstruction + found.loss, {"l2": reconstruction.detach(), "codebook": found.loss.detach()}

    def update_codes(
        self, networks: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]], step: int
    ) -> Mapping[str, float]:
        """Update both codebooks from the latents of an optimizer step on all processes.

        Returns:
            The number of codes of each level that were restarted.
        """
        model = unwrapped(networks["vqvae2"])
        assert isinstance(model, WithAverages)
        restarted = {}
        for level in LEVELS:
            latents = torch.cat([batch["levels"][level][0] for batch in batches]).flatten(2).mT.contiguous()
            numbers = torch.cat([batch["levels"][level][1].flatten() for batch in batches])
            averages = model.averages.get_submodule(level)
            assert isinstance(averages, CodebookAverages)
            chosen = Chosen.of(latents.flatten(0, 1), numbers, self.config.codes)
            everything = partial(of_all_processes, latents, batches)
            chosen = Chosen(*(reduce(tensor, "mean") for tensor in chosen))
            generator = draw(self.config.seed, step, RESTARTS[level])
            restarted[f"{level}_codes_restarted"] = float(averages.step(chosen, everything, generator))
            codebook = codebook_of(model.network, level)
            codebook.copy_(sharded_as(averages.codebook, codebook))
        return restarted

    def validate(self, step: int) -> dict[str, float]:
        """Return the PSNR (dB) of the held-out images, and how much of each codebook they use, and its perplexity.

        Also save a sheet of the first ones, and the names of skipped images in skipped.json. Metrics of the
        `evaluators` come last.
        """
        found = split_over_processes(len(self.held_out), self._measured)
        report_skipped(self.images.skipped, Path(self.config.out_dir) / "skipped.json")
        metrics = {"psnr": math.fsum(one[0] for one in found) / len(found)}
        for k, level in enumerate(LEVELS):
            codes = torch.cat([(one[1], one[2])[k].flatten() for one in found])
            metrics[f"{level}_codebook_use"], metrics[f"{level}_perplexity"] = codebook_use(codes, self.config.codes)
        if PartialState().is_main_process:
            pairs = [one[3] for one in found[:SHOWN]]
            sheet = [Image.fromarray(pair[k]) for k in range(2) for pair in pairs]
            rows = ("original", f"step {step}")
            picture = image_io.grid(sheet, len(pairs), padding=4, row_labels=rows)
            image_io.save(picture, self.config.samples / f"step-{step:08d}.png")
        for evaluator in self.evaluators:
            metrics |= evaluator(step)
        return metrics

    def _measured(self, i: int) -> tuple[float, Tensor, Tensor, Any]:
        """Return the PSNR of held-out image i, its top and bottom codes, and it beside its reconstruction."""
        raise_if_stopped()
        x = self.validation.load_held_out(self.held_out, i)[0][None].to(self._device)
        found = self.model.network(x)
        y = found.pixels.clamp(-1, 1).nan_to_num()
        pair = image_io.from_tensors([x[0].cpu(), y[0].cpu()], "np")
        return float(psnr(x.cpu(), y.cpu())), found.top.cpu(), found.bottom.cpu(), pair

    def _picture(self, i: int) -> Picture:
        """Return held-out image i and its reconstruction."""
        x = self.validation.load_held_out(self.held_out, i)[0]
        y = self.model.network(x[None].to(self._device)).pixels[0]
        return Picture(y.clamp(-1, 1).nan_to_num().cpu(), x)

    def export(self, folder: Path) -> None:
        """Write the network in diffusers' format into an empty folder."""
        self.model.network.save_pretrained(folder)
