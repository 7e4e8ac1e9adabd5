"""Training of the VAE: pixels -> `VAE.forward` -> reconstruction, LPIPS, KL or codebook, and adversarial loss."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor, nn

from sdkit import images as image_io
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform, draw
from sdkit.diffusion.losses import (
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    kl,
    l1,
    l2,
    vq,
    without_gradient,
)
from sdkit.errors import ArgumentError, DataError
from sdkit.evaluation.codebook import codebook_use, use_of_counts
from sdkit.evaluation.similarity import WINDOW, psnr, ssim
from sdkit.loading.new_network import new_network
from sdkit.loading.source import Source
from sdkit.networks.autoencoder import VAE
from sdkit.networks.autoencoder_kinds import Kind, kind_of
from sdkit.networks.discriminator import SMALLEST as DISCRIMINATOR_SMALLEST
from sdkit.networks.discriminator import Discriminator
from sdkit.networks.lpips import LPIPS
from sdkit.training.batches import noise_of
from sdkit.training.distributed import full_tensor, sharded_as, split_over_processes, unwrapped
from sdkit.training.loop import fit
from sdkit.training.settings import VAEConfig
from sdkit.training.signals import raise_if_stopped
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.codebook import Chosen, CodebookAverages, of_all_processes
from sdkit.training.stages.corruption import Corruption
from sdkit.training.stages.evaluating import Picture, PictureMetrics
from sdkit.training.stages.images import (
    TrainingImages,
    identity_of,
    is_cache,
    report_skipped,
    split,
    training_transform,
)

GAN_BETAS = (0.5, 0.9)  # AdamW betas of the discriminator, as in VQGAN
MOST_VALIDATED = 64  # largest number of images of `validation_data` that are used
SHOWN = 8  # images on the sheet of each validation
AVERAGES = "codebook_averages"  # name of the codebook's moving averages in the VAE
RESTARTS = 2**32 - 2  # passed to `draw` as the number of an augmentation; no image has this many
CORRUPTED = 2**32 - 3  # passed to `draw` as the number of an augmentation, for held-out images
NOISY = 2**32 - 4  # passed to `draw` as the number of an augmentation, for the latents of held-out images
TOLERATED_DRIFT = 0.1  # drift of latents, in their standard deviations, above which validation warns


def train_vae(config: VAEConfig) -> Path:
    """Fine-tune a VAE, or train one from scratch. An existing run is resumed.

    By default only the decoder is trained: latents keep their meaning, so U-Nets and caches made for this VAE stay
    valid. With `train_encoder`, validation measures how far latents have moved from those of the starting VAE.

    Args:
        config: Settings of the run.

    Returns:
        The run folder. Its result/ is the VAE in diffusers layout.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.

    Example:
        >>> import sdkit
        >>> from sdkit.training import VAEConfig, train_vae
        >>> run = train_vae(VAEConfig(data="photos", out_dir="runs/vae", size=64, max_steps=2))
        >>> vae = sdkit.VAE.from_pretrained(run / "result")
        >>> vae.factor, vae.channels
        (8, 4)
    """
    return fit(VAEStage(config), config, Path(config.out_dir))


class Measured(NamedTuple):
    """Measurements of one held-out image.

    Attributes:
        numbers: Metrics and moments by name.
        pictures: The image and its reconstruction, and with corruption the corrupted image and its reconstruction;
            None except for the first `SHOWN` images.
        codes: Code indices of a `VQModel`; None for other kinds.
    """

    numbers: dict[str, float]
    pictures: list[Image.Image] | None
    codes: Tensor | None


class VAEStage:
    """The stage of `train_vae`: a VAE and, for the adversarial loss, a discriminator.

    Attributes:
        evaluators: Functions of the step that return further metrics of each validation, the same on every process.
    """

    def __init__(self, config: VAEConfig) -> None:
        self.config = config
        self.trains_encoder = config.train_encoder or config.init is not None
        self.trains_codebook = self.trains_encoder and config.regularizer == "vq"
        self._make_networks()
        size = self._size()
        self._load_lpips(size)
        self._check_size(size)
        self.corruption = self._corruption(size)
        self._open_data(size)
        self.size = len(self.train)
        self.evaluators: list[Callable[[int], Mapping[str, float]]] = []
        metrics = [metric for metric in config.metrics if metric.name != "lpips"]  # `validate` reports LPIPS itself
        if metrics:
            pictures = PictureMetrics(
                metrics, count=len(self.held_out), picture=self._picture, size=size, device=lambda: self.vae.device
            )
            self.evaluators.append(pictures)
        self.players = [
            Player(
                "vae", self.vae, self.loss, learning_rate=config.learning_rate, ema=config.ema_decay > 0,
                after_update=self.update_codebook if self.trains_codebook else None,
            )
        ]  # fmt: skip
        if self.discriminator:
            self.players.append(
                Player(
                    "discriminator", self.discriminator, self.discriminator_loss, learning_rate=config.learning_rate,
                    starts_at=config.disc_start, betas=GAN_BETAS,
                )
            )  # fmt: skip

    def _make_networks(self) -> None:
        """Load the VAE or make a new one, freeze what is not trained, and make the discriminator."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = (
                Source.open(config.model).autoencoder() if config.init is None else new_network(config.init, "vae")
            )
            self.discriminator = Discriminator() if config.disc_weight else None
        label = os.fspath(config.model if config.init is None else config.init)
        kind = _trainable_kind(network, config.regularizer, label)
        if config.regularizer == "none":
            kind.remove_noise()
        self.vae = VAE(network, name=str(config.model))
        if self.trains_codebook:
            self._make_codebook_averages()
        if not self.trains_encoder:
            for part in kind.encoder_parts:
                part.requires_grad_(False)
        if config.gradient_checkpointing:
            # The parts of a VQModel support it, but the class does not declare that.
            network._supports_gradient_checkpointing = True
            network.enable_gradient_checkpointing()
        # A frozen copy of the starting encoder, to measure how far latents move.
        fine_tuned = config.train_encoder and config.init is None
        self.start = VAE(copy.deepcopy(network)).eval().requires_grad_(False) if fine_tuned else None
        if self.start:
            self.start.network.decoder = nn.Identity()

    @torch.no_grad()
    def _make_codebook_averages(self) -> None:
        """Normalise the codes if asked, and add their moving averages to the VAE, so that checkpoints hold them."""
        config = self.config
        codebook: Any = self.vae.codebook
        if config.normalize_codes:
            self.vae.kind.normalizes = True
            codebook.copy_(F.normalize(codebook, dim=1))
        if config.codebook_decay:
            averages = CodebookAverages(
                codebook, decay=config.codebook_decay, normalize=config.normalize_codes, learned=config.init is None
            )
            self.vae.add_module(AVERAGES, averages)

    def _load_lpips(self, size: tuple[int, int]) -> None:
        """Load LPIPS for validation and for the loss. With bf16, the loss uses a copy in bfloat16.

        If it is not in the loss and nobody named its weights, images that are too small for it are not measured by it.
        """
        config = self.config
        self.lpips: LPIPS | None = LPIPS.from_pretrained(config.lpips)
        needed = config.lpips_weight or config.lpips != "alex" or "lpips" in config.evaluate
        if not needed and min(size) < self.lpips.smallest:
            self.lpips = None
        self.training_lpips = self.lpips
        if self.lpips and config.lpips_weight and config.mixed_precision == "bf16":
            # On two cores, a step of the embedded model's VAE takes 0.45 s with channels_last, and 0.52 s without it.
            self.training_lpips = copy.deepcopy(self.lpips).bfloat16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _open_data(self, size: tuple[int, int]) -> None:
        """Open training and held-out images of `size` (height, width), and compute the run's fingerprints."""
        config = self.config
        for data in (config.data, config.validation_data):
            if data is not None and is_cache(data):
                raise DataError(
                    f"{os.fspath(data)!r} is a latent cache, and a VAE learns from images; give those it was made of."
                )
        examples = held_out = open_examples(config.data, **config.opened_with())
        self.train, self.held_out = split(len(examples))
        if config.validation_data is not None:
            held_out = open_examples(config.validation_data)
            self.train, self.held_out = np.arange(len(examples)), [*range(min(MOST_VALIDATED, len(held_out)))]
        self.images = TrainingImages(examples, training_transform(size, config.augment), config.seed)
        self.validation = TrainingImages(held_out, Transform(size=size), seed=0)
        if held_out is examples:
            self.validation.skipped = self.images.skipped
        self.identity = {"data": examples.identity, "model": identity_of(self.vae.network)}
        self.identity["validation"] = (
            held_out.identity if config.validation_data is not None else "held out of the data"
        )
        if self.lpips and config.lpips_weight:
            self.identity["lpips"] = identity_of(self.lpips)
            self.identity["lpips_backbone"] = self.lpips.network

    def _size(self) -> tuple[int, int]:
        """Return height and width of the images: those of the settings, or the VAE's own."""
        own: Any = self.vae.network.config.sample_size
        size: Any = self.config.size or ((own, own) if isinstance(own, int) else tuple(own))
        return size  # type: ignore[no-any-return]

    def _check_size(self, size: tuple[int, int]) -> None:
        """Raise ArgumentError if a network cannot take images of `size`."""
        needed = [WINDOW, self.lpips.smallest if self.lpips else 0, DISCRIMINATOR_SMALLEST if self.discriminator else 0]
        smallest = max(needed)
        if any(side % self.vae.factor or side < smallest for side in size):
            raise ArgumentError(
                f"size {size[0]} x {size[1]} must divide by {self.vae.factor} and be at least {smallest}; change it."
            )

    def _corruption(self, size: tuple[int, int]) -> Corruption | None:
        """Return the corruption of the input; None if the settings ask for none.

        Raises:
            ArgumentError: Images of `size` (height, width) cannot be masked so.
        """
        config = self.config
        if not config.input_noise and not config.mask_ratio:
            return None
        corruption = Corruption(config.input_noise, config.mask_ratio, config.mask_patch)
        corruption.check(size)
        return corruption

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return the training batch of samples (n, item).

        It has pixels (B, 3, H, W), the posterior's noise (B, 4, H/8, W/8), the corrupted input if it is corrupted, and
        the noise on the latents, like the posterior's, if there is any.
        """
        pixels = [self.images.load(self.train, item, n // self.size)[0] for n, item in samples]
        height, width = (side // self.vae.factor for side in self.images.transform.size)
        sources = [noise_of(self.config.seed, n) for n, _ in samples]
        eps = [torch.randn(self.vae.channels, height, width, generator=source) for source in sources]
        batch = {"pixels": torch.stack(pixels), "eps": torch.stack(eps), "n": torch.tensor([n for n, _ in samples])}
        if self.corruption:
            corrupted = [self.corruption(x, source) for x, source in zip(pixels, sources, strict=True)]
            batch["corrupted"] = torch.stack(corrupted)
        if spread := self.config.latent_noise:
            strength = [spread * torch.randn((), generator=source).abs() for source in sources]
            unit = [torch.randn(eps[0].shape, generator=source) for source in sources]
            batch["noise"] = torch.stack(strength)[:, None, None, None] * torch.stack(unit)
        return batch

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.images.examples[int(self.train[item])].name for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Compute the VAE's loss.

        It adds up reconstruction, LPIPS, and KL or codebook loss, as in latent diffusion (Rombach et al. 2022, appendix
        G), and the adversarial loss with VQGAN's adaptive weight (Esser et al. 2021, eq. 7). A denoising autoencoder
        reads the corrupted input; all terms compare its reconstruction with the clean image.

        Args:
            networks: "vae" and "discriminator", wrapped by Accelerate.
            batch: As `batch` returns it. The reconstruction is added to it, for the discriminator.
            step: The optimizer step. The adversarial loss is added from `disc_start` on.

        Returns:
            The loss, and its parts by name.
        """
        config, x = self.config, batch["pixels"]
        eps = batch["eps"] if config.regularizer == "kl" else None
        y, mean, logvar, codes, numbers = networks["vae"](batch.get("corrupted", x), eps, batch.get("noise"))
        loss = (l1 if config.reconstruction == "l1" else l2)(y, x)
        parts: dict[str, float | Tensor] = {config.reconstruction: loss.detach()}
        if config.lpips_weight and self.training_lpips:
            lpips = self.training_lpips.to(x.device)(y, x).mean()
            loss = loss + config.lpips_weight * lpips
            parts["lpips"] = lpips.detach()
        reconstruction = loss
        if self.trains_codebook:
            latents = F.normalize(mean, dim=1) if config.normalize_codes else mean
            batch["latents"], batch["numbers"] = latents.detach(), numbers
            codebook = vq(latents, without_gradient(codes) if config.codebook_decay else codes)
            loss = loss + codebook
            parts["codebook"] = codebook.detach()
        if self.trains_encoder and config.regularizer == "kl" and config.kl_weight:
            divergence = kl(mean, logvar)
            loss = loss + config.kl_weight * divergence / x[0].numel()
            parts["kl"] = divergence.detach()
        if self.discriminator and step >= config.disc_start:
            batch["reconstruction"] = y.detach()
            adversarial = hinge_generator(networks["discriminator"](y))
            last = _vae_of(networks["vae"]).network.decoder.conv_out.weight
            n = x[0].numel()  # sums over an image's values, because the gradients of means underflow in float16
            average = partial(reduce, reduction="mean")
            weight = adaptive_weight(reconstruction * n, adversarial * n, last, average)
            loss = loss + config.disc_weight * weight * adversarial
            parts |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        return loss, parts

    def update_codebook(
        self, networks: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]], step: int
    ) -> Mapping[str, float]:
        """Update the codebook from the latents of an optimizer step on all processes.

        Args:
            networks: As in `loss`.
            batches: The micro-batches, to which `loss` has added the latents, and the numbers of their codes.
            step: The optimizer step.

        Returns:
            The share of codes that this step used, their perplexity, and the number of codes that were restarted.
        """
        vae = _vae_of(networks["vae"])
        latents = torch.cat([batch["latents"] for batch in batches]).flatten(2).mT.contiguous()  # (B, h * w, C)
        numbers = torch.cat([batch["numbers"].flatten() for batch in batches])
        codebook: Any = vae.codebook
        own = Chosen.of(latents.flatten(0, 1), numbers, len(codebook))
        chosen = Chosen(*(reduce(tensor, "mean") for tensor in own))
        used, perplexity = use_of_counts(chosen.shares)
        metrics = {"codebook_use": used, "perplexity": perplexity}
        if self.config.codebook_decay:
            averages = vae.get_submodule(AVERAGES)
            assert isinstance(averages, CodebookAverages)
            everything = partial(of_all_processes, latents, batches)
            metrics["codes_restarted"] = averages.step(chosen, everything, draw(self.config.seed, step, RESTARTS))
            codebook.copy_(sharded_as(averages.codebook, codebook))
        elif self.config.normalize_codes:
            codebook.copy_(sharded_as(F.normalize(full_tensor(codebook), dim=1), codebook))
        return metrics

    def discriminator_loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Compute the discriminator's hinge loss on the images and their reconstructions, which `loss` has stored."""
        both = torch.cat([batch["pixels"], batch["reconstruction"]])
        real, fake = networks["discriminator"](both).float().chunk(2)
        return hinge_discriminator(real, fake), {"real": real.mean(), "fake": fake.mean()}

    def validate(self, step: int) -> dict[str, float]:
        """Measure held-out images, reconstructed from the posterior's mean, and save a sheet of the first ones.

        Returns:
            PSNR (dB) and SSIM, and LPIPS if the images are large enough for it; mean and standard deviation of the
            scaled latents, and `recommended_scale`, the VAE scale that would make their standard deviation 1; for a
            `VQModel`, how much of the codebook is in use, and its perplexity. With corruption, also `corrupted_psnr`,
            `corrupted_ssim`, and `corrupted_lpips` of reconstructions from corrupted input, and `input_psnr` of that
            input itself, which the reconstruction should exceed; the corruption of an image is always the same. With
            noise on the latents, also `noisy_psnr`, `noisy_ssim`, and `noisy_lpips` of images decoded from latents
            with noise of standard deviation `latent_noise`. If the encoder is fine-tuned, also
            `latent_drift`: the root mean square distance of the latents from those of the starting VAE, in standard
            deviations of the latter. Metrics of the `evaluators` come last.
        """
        found = split_over_processes(len(self.held_out), self._measured)
        report_skipped(self.images.skipped | self.validation.skipped, Path(self.config.out_dir) / "skipped.json")
        average = _average([one.numbers for one in found])
        metrics = {key: value for key, value in average.items() if key.endswith(("psnr", "ssim", "lpips"))}
        std = _deviation(average, "")
        metrics["latent_mean"] = (average["mean"] - self.vae.shift) * self.vae.scale
        metrics["latent_std"], metrics["recommended_scale"] = std * self.vae.scale, 1 / std
        if self.vae.codebook is not None:
            chosen = torch.cat([one.codes.flatten() for one in found if one.codes is not None])
            metrics["codebook_use"], metrics["perplexity"] = codebook_use(chosen, len(self.vae.codebook))
        if self.start:
            metrics["latent_drift"] = math.sqrt(average["moved"]) / _deviation(average, "start_")
        if PartialState().is_main_process:
            self._show([one.pictures for one in found if one.pictures], step)
            if metrics.get("latent_drift", 0) > TOLERATED_DRIFT:
                warnings.warn(
                    f"latents have moved by {metrics['latent_drift']:.2f} of their standard deviation: U-Nets and "
                    "caches made for the starting VAE no longer fit.", stacklevel=2,
                )  # fmt: skip
        for evaluator in self.evaluators:
            metrics |= evaluator(step)
        return metrics

    def _measured(self, i: int) -> Measured:
        """Return the measurements of held-out image i."""
        raise_if_stopped()
        x = self.validation.load_held_out(self.held_out, i)[0][None].to(self.vae.device)
        # VAE.forward runs in float32; calling self.vae would run Accelerate's autocast
        y, mean, logvar, _, numbers = VAE.forward(self.vae, x)
        measured = self._similarity(x, y, "")
        pictures = [x, y]
        if self.corruption:
            corrupted = self.corruption(x[0].cpu(), draw(self.config.seed, i, CORRUPTED))[None].to(x.device)
            restored = VAE.forward(self.vae, corrupted)[0]
            measured |= self._similarity(x, restored, "corrupted_")
            measured["input_psnr"] = float(psnr(x.cpu(), corrupted.clamp(-1, 1).cpu()))
            pictures += [corrupted, restored]
        if self.config.latent_noise:
            noise = torch.randn(mean[0].shape, generator=draw(self.config.seed, i, NOISY))[None].to(x.device)
            forgiving = VAE.forward(self.vae, x, noise=self.config.latent_noise * noise)[0]
            measured |= self._similarity(x, forgiving, "noisy_")
        measured |= _moments(mean, logvar, "")
        if self.start:
            start_mean, start_logvar = self.start.to(x.device).posterior(x)
            measured |= _moments(start_mean, start_logvar, "start_")
            measured["moved"] = float((mean - start_mean).square().mean())
        shown = [image_io.to_pil(one.clamp(-1, 1).nan_to_num())[0] for one in pictures] if i < SHOWN else None
        return Measured(measured, shown, None if numbers is None else numbers.cpu())

    def _similarity(self, x: Tensor, y: Tensor, prefix: str) -> dict[str, float]:
        """Return PSNR, SSIM, and LPIPS of an image x and its reconstruction y, (1, 3, H, W), with prefixed names."""
        y = y.clamp(-1, 1)
        measured = {f"{prefix}psnr": float(psnr(x.cpu(), y.cpu())), f"{prefix}ssim": float(ssim(x.cpu(), y.cpu()))}
        if self.lpips:
            measured[f"{prefix}lpips"] = float(self.lpips.to(x.device)(x, y))
        return measured

    def _picture(self, i: int) -> Picture:
        """Return held-out image i and its reconstruction from the posterior's mean."""
        x = self.validation.load_held_out(self.held_out, i)[0]
        y = VAE.forward(self.vae, x[None].to(self.vae.device))[0][0]
        return Picture(y.clamp(-1, 1).nan_to_num().cpu(), x)

    def _show(self, columns: list[list[Image.Image]], step: int) -> None:
        """Save a sheet; each column has the pictures of one held-out image."""
        pictures = [picture for row in zip(*columns, strict=True) for picture in row]
        rows = ("original", f"step {step}", "corrupted", f"step {step}")[: len(columns[0])]
        sheet = image_io.grid(pictures, len(columns), padding=4, row_labels=rows)
        image_io.save(sheet, self.config.samples / f"step-{step:08d}.png")

    def export(self, folder: Path) -> None:
        """Save the VAE in diffusers layout.

        A VAE that was trained from scratch gets the scale at which its latents have standard deviation 1.
        """
        if self.config.init is not None:
            average = _average([self._measured(i).numbers for i in range(len(self.held_out))])
            self.vae.network.register_to_config(scaling_factor=1 / _deviation(average, ""))
        if self.config.normalize_codes:  # moving averages of weights shorten the codes
            codebook: Any = self.vae.codebook
            codebook.copy_(F.normalize(codebook, dim=1))
        self.vae.network.save_pretrained(folder)


def _trainable_kind(network: Any, regularizer: str, label: str) -> Kind:
    """Return the kind of an autoencoder network. Raise ArgumentError if it cannot be trained with the regularizer."""
    kind, name = kind_of(network), type(network).__name__
    article = "an" if name.startswith("A") else "a"
    if kind is None or not kind.regularizers:
        raise ArgumentError(
            f"{label!r} holds {article} {name}, which cannot be trained; give an AutoencoderKL or VQModel."
        )
    if regularizer not in kind.regularizers:
        fitting = " or ".join(map(repr, kind.regularizers))
        raise ArgumentError(f"{label!r} holds {article} {name}: its regularizer is {fitting}, not {regularizer!r}.")
    return kind


def _vae_of(network: nn.Module) -> VAE:
    """Return the VAE that is trained, without the wrapper of several processes."""
    vae = unwrapped(network)
    assert isinstance(vae, VAE)
    return vae


def _average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _moments(mean: Tensor, logvar: Tensor, prefix: str) -> dict[str, float]:
    """Return the first and second moment of latents sampled from the posterior."""
    return {f"{prefix}mean": float(mean.mean()), f"{prefix}square": float((mean.square() + logvar.exp()).mean())}


def _deviation(moments: Mapping[str, float], prefix: str) -> float:
    """Return the standard deviation of latents, given `_moments` averaged over images."""
    return math.sqrt(max(moments[f"{prefix}square"] - moments[f"{prefix}mean"] ** 2, 1e-12))
