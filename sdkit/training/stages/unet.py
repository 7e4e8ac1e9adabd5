"""Fine-tuning the U-Net: latents and captions -> noise -> network -> denoising loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.losses import diffusion_loss
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.engines.attention import PlainWhereSmall
from sdkit.errors import ArgumentError
from sdkit.evaluation.likelihood import bits_per_dimension
from sdkit.images import to_tensors
from sdkit.loading.configs import LOW_RES
from sdkit.loading.new_network import new_network
from sdkit.loading.place import EMBEDDED
from sdkit.loading.source import USUAL_GUIDANCE, Source
from sdkit.networks.autoencoder import VAE
from sdkit.networks.class_names import ClassNames
from sdkit.networks.denoiser import UNet
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.saving import save_pipeline, save_without_text
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.training.distributed import split_over_processes
from sdkit.training.loop import fit
from sdkit.training.settings import UNetConfig
from sdkit.training.signals import raise_if_stopped
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.classes import LABEL_GUIDANCE, LabelledExamples, classes_of
from sdkit.training.stages.concatenation import DroppedConditions, condition_image, open_conditioned, prepare_input
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.drawing import VALIDATION_STEPS, Drawing
from sdkit.training.stages.dreambooth import ClassImages, open_instances, prior_preserving_loss
from sdkit.training.stages.encoding import BatchEncoder
from sdkit.training.stages.evaluating import Picture, PictureMetrics
from sdkit.training.stages.examples import (
    CachedLatents,
    DenoisingExamples,
    ImageLatents,
    collated,
    denoising_rows,
    open_provider,
    validation_batch,
    validation_metrics,
)
from sdkit.training.stages.image_labels import ImageLabels
from sdkit.training.stages.images import identity_of, training_transform
from sdkit.training.stages.kinds import (
    Addition,
    check_bits,
    check_variance,
    check_with_text,
    check_without_text,
    scheduler_of,
)
from sdkit.training.stages.lora import add_lora_layers, export_lora
from sdkit.training.stages.upsampling import Upsampling
from sdkit.training.stages.variational import TimestepSampler, losses_with_variance, timesteps_of

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_unet(config: UNetConfig) -> Path:
    """Fine-tune a U-Net (the whole network or a LoRA), or train one from scratch. An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images, or a latent cache of encoded images.

    Returns:
        The run folder. Its result/ is a pipeline in diffusers layout, or a LoRA in
        pytorch_lora_weights.safetensors.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.

    Example:
        >>> from sdkit.training import UNetConfig, train_unet
        >>> settings = UNetConfig(data="photos", default_caption="a photo", out_dir="runs/lora", lora_rank=4,
        ...                       size=64, max_steps=2)
        >>> run = train_unet(settings)
        >>> sorted(path.name for path in (run / "result").iterdir())
        ['pytorch_lora_weights.safetensors', 'training.json']
    """
    stage = UNetStage(config)
    return fit(stage, config, Path(config.out_dir), before=stage.prepare)


class Denoiser(nn.Module):
    """The U-Net, and the text encoder if it is in training, as one network.

    Processes exchange gradients when a network is called, so the two must be called as one.

    Args:
        unet: The U-Net.
        text: The text encoder in training, or None.
        timesteps: Draws timesteps by importance, and is kept here so that checkpoints hold its losses; or None.
    """

    def __init__(self, unet: UNet, text: TextEncoder | None, timesteps: TimestepSampler | None = None) -> None:
        super().__init__()
        self.unet, self.text, self.timesteps = unet, text, timesteps

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the U-Net's output, shaped like `x_t`.

        Args:
            x_t: Noised latents (B, 4, h, w).
            t: Timesteps (B,).
            cond: Captions. Its `text` is embeddings (B, 77k, D), or token ids (B, k, 77) if the text encoder is in
                training.
        """
        if self.text is not None and cond.text is not None:
            ids = cond.text
            embeddings = self.text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]).flatten(1, 2)
            cond = replace(cond, text=embeddings)
        output: Tensor = self.unet(x_t, t, cond)
        return output


class UNetStage:
    """The stage of `train_unet`: one player (the U-Net, and the text encoder if it is trained), and a frozen VAE.

    Args:
        config: Settings of the run.

    Attributes:
        evaluators: Functions of the step that return further metrics of each validation, the same on every process.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
    """

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        model = Source.open(config.model)
        vae_source = model if config.vae is None else Source.open(config.vae)
        self.vae = VAE(vae_source.autoencoder()).eval().requires_grad_(False)
        # A model without text still reads captions, which name its classes: as those of the embedded model are read.
        reads = model if config.init is not None or model.takes_text else Source.open(EMBEDDED)
        self.text = TextEncoder(*reads.text_encoder()).eval().requires_grad_(False)
        # The export needs an unused copy, because tokenizing changes what a tokenizer saves.
        self.tokenizer = copy.deepcopy(self.text.tokenizer)
        latents = self.vae.kind.makes_latents
        self.scheduler = scheduler_of(model, config, latents=latents)
        self.schedule = NoiseSchedule.from_config(self.scheduler, latents=latents)
        self.guidance_scale = USUAL_GUIDANCE if config.init else model.guidance_scale
        self.objective = DenoisingObjective(
            self.schedule, snr_gamma=config.snr_gamma, noise_offset=config.noise_offset,
            importance=config.timestep_sampling == "importance",
            logit_normal=(config.logit_mean, config.logit_std) if config.timestep_sampling == "logit_normal" else None,
        )  # fmt: skip
        if self.objective.zero_snr and self.schedule.prediction_type == "epsilon":
            raise ArgumentError(
                "at zero terminal SNR the noise says nothing of the image: train with prediction_type v_prediction or "
                "sample, or without zero_snr."
            )
        self.labels = None if config.image_encoder is None else ImageLabels(config, config.image_encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._make_networks(model)
        side = self.unet.sample_size * self.vae.factor
        self.latents: DenoisingExamples
        if config.instance_data is not None:
            self.latents = open_instances(config, config.instance_data, self.vae, self.text, (side, side))
        elif self.unet.condition is not None:
            self.latents = open_conditioned(config, self.unet.condition, self.vae, self.text, (side, side))
        else:
            self.latents = open_provider(
                config.data, self.vae, self.text, size=config.size, own_size=(side, side), augment=config.augment,
                seed=config.seed, trains_text=config.train_text_encoder,
                takes_captions=self.unet.width > 0 or self.unet.takes_labels, **config.opened_with(),
            )  # fmt: skip
        self._name_classes()
        self.encoder = BatchEncoder(
            self.vae, self.prompts, scale=self.latents.scale, shift=self.latents.shift,
            trains_text=config.train_text_encoder,
            half=config.mixed_precision == "bf16",  # not in float16, where this VAE can overflow
            label=None if self.labels is None else self.labels.label,
        )  # fmt: skip
        networks = identity_of(self.vae.network, self.text.network, self.unet.network, schedule=self.scheduler)
        self.identity = {"data": self.latents.identity, "model": networks, "vae": self.vae.identity}
        if self.labels is not None:
            self.identity["image_encoder"] = self.labels.identity
        self.size = len(self.latents.train)
        self.upsampling: Upsampling | None = None
        self.low_res: dict[str, Any] | None = None  # the config of the small images' noise; None is DDPM's
        low_res = NoiseSchedule.linear()
        if self.unet.condition == LOW_RES:
            self.low_res = model.low_res_config()
            low_res = low_res if self.low_res is None else NoiseSchedule.from_config(self.low_res)
            factor = self.unet.upscale_factor or self.vae.factor
            self.upsampling = Upsampling(config, self.vae, factor, low_res, self.latents.shape)
        conditions = DroppedConditions(config) if self.unet.condition not in (None, LOW_RES) else None
        self.additions: list[Addition] = [one for one in (self.labels, self.upsampling, conditions) if one is not None]
        self.evaluators: list[Callable[[int], Mapping[str, float]]] = []
        height, width = (side * self.vae.factor for side in self.latents.shape)
        self.drawing = Drawing(
            self.unet, self.vae, self.prompts, self.schedule, prompts=config.validation_prompts,
            folder=config.samples, size=(height, width), guidance_scale=self.guidance_scale,
            half=HALF.get(config.mixed_precision), trains_text=config.train_text_encoder,
            conditions=[self._condition(i) for i in range(len(config.validation_prompts)) if self.unet.condition],
            low_res_schedule=low_res,
        )  # fmt: skip
        self.class_images: ClassImages | None = None
        if config.class_prompt is not None:
            self.class_images = self._class_images(config.class_prompt, (height, width))
        if config.validation_prompts:
            self.evaluators.append(self.drawing)
        if config.evaluate:
            self.pictures = PictureMetrics(
                config.metrics, count=len(self.latents.held_out), picture=self._picture, size=(height, width),
                device=lambda: self.unet.device,
            )  # fmt: skip
            self.evaluators.append(self._evaluate)
        if config.bits_per_dimension:
            check_bits(config, self.vae, self.schedule)
            self.evaluators.append(self._bits_per_dimension)
        rate, ema = config.learning_rate, config.ema_decay > 0
        learn = self._learn_losses if config.timestep_sampling == "importance" else None
        self.players = [Player("unet", self.denoiser, self.loss, learning_rate=rate, ema=ema, after_update=learn)]

    def _make_networks(self, model: Source) -> None:
        """Load or make the U-Net, and mark the parameters to train. Raises ArgumentError if it cannot be trained."""
        config = self.config
        embedded = self.labels is not None
        if config.init is not None:
            network = new_network(config.init, "unet")
        else:
            network = model.denoiser(conditioned=True, embedded=embedded)
        prepare_input(network, config)
        if self.labels is not None:
            self.labels.add_to(network)
        self.unet = UNet(network)
        self.prompts: TextEncoder = self.text if self.unet.width else ClassNames()
        StableDiffusion(self.vae, self.prompts, self.unet, self.schedule)  # raises if the parts do not fit each other
        if self.unet.width:
            check_with_text(config, self.unet, embedded=embedded)
        else:
            check_without_text(config, self.unet)
        if self.unet.inpaints:
            raise ArgumentError("an inpainting U-Net cannot be trained; give a text-to-image model.")
        check_variance(config, self.unet, self.schedule)
        if self.unet.guided:
            raise ArgumentError(
                "a U-Net that takes the guidance scale as an input (latent consistency) cannot be trained; give the "
                "model that it was distilled from."
            )
        if hasattr(network, "set_attn_processor"):  # a UNet2DModel has none
            network.set_attn_processor(PlainWhereSmall())
        trained = {"U-Net": network} | ({"text encoder": self.text.network} if config.train_text_encoder else {})
        if config.lora_rank is not None:
            add_lora_layers(trained, config, config.lora_rank, HALF.get(config.mixed_precision, torch.float32))
        for part in trained.values():
            if config.lora_rank is None:
                part.requires_grad_(True)
            if config.gradient_checkpointing:
                enable_gradient_checkpointing(part)
        timesteps = TimestepSampler(self.schedule.num_timesteps) if self.objective.importance else None
        self.denoiser = Denoiser(self.unet, self.text if config.train_text_encoder else None, timesteps)

    def _name_classes(self) -> None:
        """Read captions as classes, if the U-Net takes labels. Choose the guidance scale of a model without text."""
        if self.unet.width:
            return
        names = ClassNames()
        if self.unet.takes_labels:
            if not isinstance(self.latents, (CachedLatents, ImageLatents)):
                raise ArgumentError("conditions need a U-Net of text; leave them out, or give another.")
            names = classes_of(self.config, self.unet, self.latents, from_scratch=self.config.init is not None)
            self.latents = LabelledExamples(self.latents, names.classes, names.none)
        if self.config.init is not None:
            # Without dropout the label for no class is untrained, and guidance would steer away from noise.
            self.guidance_scale = LABEL_GUIDANCE if names.none is not None and self.config.caption_dropout else 1.0
        if self.config.validation_prompts:
            names.check(self.config.validation_prompts)
        self.prompts = names

    def _class_images(self, prompt: str, size: tuple[int, int]) -> ClassImages:
        """Open or plan the class images of DreamBooth, and add their fingerprint to that of the data."""
        images = ClassImages(
            self.config, training_transform(size, self.config.augment), self.text.tokenize(prompt)[0][0],
            model=(self.identity["model"], self.guidance_scale, VALIDATION_STEPS), draw=self.drawing.draw,
            skipped=self.latents.skipped,
        )  # fmt: skip
        self.identity["class_images"] = images.identity
        return images

    def prepare(self) -> None:
        """Draw the class images of DreamBooth that are missing, on every process, with the untrained networks."""
        if self.class_images is None:
            return
        self.denoiser.eval().to(PartialState().device)
        with torch.no_grad():
            self.class_images.prepare()
        self.denoiser.cpu()
        self.drawing.rest()

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return posterior or pixels, caption, timestep, and noise of samples (n, item), as `collated` does.

        With class images, as many of them follow. All random values depend only on n and the seed.
        """
        config = self.config
        dropout = config.caption_dropout if config.instance_data is None else 0.0
        rows = denoising_rows(
            samples, self.latents, self.objective, self._shape, seed=config.seed, caption_dropout=dropout
        )
        if self.class_images is not None:
            rows += self.class_images.rows(samples, self.objective, self._shape)
        if self.objective.importance:
            rows = [row | {"n": n} for row, (n, _) in zip(rows, samples, strict=True)]
        batch = collated(rows)
        for addition in self.additions:
            batch = addition.added(batch, samples)
        return batch

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Shape (4, h, w) of the latents of one example."""
        height, width = self.latents.shape
        return (self.vae.channels, height, width)

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.latents.name(item) for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the loss, and its parts to log; see `DenoisingObjective.loss`, `prior_preserving_loss`, and
        `losses_with_variance`."""
        if self.config.loss != "simple":
            return self._loss_with_variance(networks["unet"], batch)
        output, target = self._denoised(networks["unet"], batch)
        if self.class_images is not None:
            return prior_preserving_loss(self.objective, output, target, batch["t"], self.config.prior_weight)
        return self.objective.loss(output, target, batch["t"], batch.get("weight"))

    def _loss_with_variance(self, network: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a U-Net that learns its variance, and its parts. The batch gets the `losses` of its
        samples at their timesteps, from which timesteps are drawn by importance."""
        sampler, importance = timesteps_of(network), torch.ones(len(batch["t"]))
        t = torch.tensor(batch["t"])
        if sampler is not None:
            t, importance = sampler.draw(batch["t"])
        x0 = self.encoder.latents(batch)
        x_t, target = self.objective.noised(x0, batch["eps"], t)
        losses, parts = losses_with_variance(
            self.objective, self.encoder.output(network, x_t, t, batch), target, x0, x_t, t, kind=self.config.loss,
            vlb_weight=self.config.vlb_weight, pixels=not self.vae.kind.makes_latents,
        )  # fmt: skip
        importance = importance.to(losses)
        if "weight" in batch:
            importance = importance * batch["weight"].to(losses)
        if sampler is not None:
            batch["losses"] = list(zip(batch["n"], t.tolist(), losses.tolist(), strict=True))
        return (importance * losses).mean(), {name: (importance * part).mean() for name, part in parts.items()}

    def _learn_losses(
        self, networks: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]], step: int
    ) -> Mapping[str, float]:
        """Let the sampler of timesteps remember the losses of an optimizer step."""
        del step
        sampler = timesteps_of(networks["unet"])
        if sampler is not None:
            sampler.learn([one for batch in batches for one in batch["losses"]])
        return {}

    def _denoised(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the network's output for noised latents, and its target, both (B, 4, h, w)."""
        return self.encoder.denoised(self.objective, network, batch)

    def validate(self, step: int) -> dict[str, float]:
        """Return the unweighted loss on a fixed grid of held-out images, noises, and timesteps.

        Also save images of the validation prompts in samples/, and the names of skipped images in skipped.json.
        Metrics of the `evaluators` come last.
        """
        return validation_metrics(
            self.latents, self._validation_loss, self.evaluators, step,
            skipped=Path(self.config.out_dir) / "skipped.json",
        )  # fmt: skip

    def _validation_loss(self, i: int) -> float:
        """Return the loss of one held-out image over the validation grid."""
        batch = validation_batch(i, self.latents, self.objective, self._shape, self.unet.device)
        output, target = self._denoised(self.denoiser, self._held_out(batch, i))
        return float(diffusion_loss(output[:, : target.shape[1]], target))  # beside it may be a learned variance

    def _held_out(self, batch: dict[str, Any], i: int) -> dict[str, Any]:
        """Return a batch of held-out image i with what this kind of U-Net reads beside captions."""
        for addition in self.additions:
            batch = addition.held_out(batch, i)
        return batch

    def _bits_per_dimension(self, step: int) -> Mapping[str, float]:
        """Return the mean bits per dimension of the held-out images; see `bits_per_dimension`."""
        found = split_over_processes(len(self.latents.held_out), self._bits_of)
        return {"bits_per_dimension": math.fsum(found) / len(found)}

    def _bits_of(self, i: int) -> float:
        """Return the bits per dimension of held-out image i, always with the same noise."""
        rows = collated([self.latents.validation(i)])
        device = self.unet.device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in rows.items()}
        batch["posterior_eps"] = torch.zeros(1, *self._shape, device=device)
        x0, cond = self.encoder.latents(batch), self.encoder.conditioning(self._held_out(batch, i))

        def predict(x_t: Tensor, t: int) -> Prediction:
            raise_if_stopped()
            return self.schedule.prediction(self.denoiser(x_t, torch.full((1,), t, device=device), cond), x_t, t)

        levels = ((x0 + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # a cache rounds pixels to float16
        count = self.config.bits_per_dimension
        return float(bits_per_dimension(predict, levels, self.schedule, timesteps=count, seed=i))

    def _evaluate(self, step: int) -> Mapping[str, float]:
        """Return the metrics of pictures of the held-out captions."""
        metrics = self.pictures(step)
        self.drawing.rest()
        return metrics

    def _condition(self, i: int) -> Tensor:
        """Return the condition of held-out image i, or of the first ones again, as the pipeline takes it."""
        row, kind = self.latents.validation(i % len(self.latents.held_out)), self.unet.condition
        if self.upsampling is not None:
            return self.upsampling.low(row)
        return condition_image(row, kind or "", self.vae, self.unet.device)

    def _picture(self, i: int) -> Picture:
        """Draw the caption of held-out image i, always from the same seed. A cached image is decoded."""
        row, caption = self.latents.validation(i), self.latents.held_out_caption(i)
        if not (self.unet.width or self.unet.takes_labels):
            caption = ""
        condition = self._condition(i) if self.unet.condition else None
        (drawn,) = to_tensors(self.drawing.draw(caption, seed=i, condition=condition))
        return Picture(drawn, self.encoder.original(row, self.unet.device), caption)

    def export(self, folder: Path) -> None:
        """Write the LoRA, or the pipeline in diffusers layout, into an empty folder."""
        if self.config.lora_rank is not None:
            self._export_lora(folder)
        elif self.unet.width:
            self._export_with_text(folder)
        else:
            self._export_without_text(folder)

    def _export_lora(self, folder: Path) -> None:
        """Write the LoRA of the U-Net, and of the text encoder if it was trained."""
        text = self.text.network if self.config.train_text_encoder else None
        export_lora(folder, self.config, self.unet.network, text)

    def _export_with_text(self, folder: Path) -> None:
        """Write a pipeline of Stable Diffusion; or of unCLIP, if the U-Net reads embeddings of images."""
        save_pipeline(
            folder, vae=self.vae, text_encoder=self.text.network, tokenizer=self.tokenizer, unet=self.unet.network,
            scheduler=self.scheduler, guidance_scale=self.guidance_scale, low_res_scheduler=self.low_res,
        )  # fmt: skip
        if self.labels is not None:
            self.labels.export(folder)

    def _export_without_text(self, folder: Path) -> None:
        """Write a pipeline of a U-Net that takes classes, or nothing."""
        save_without_text(
            folder, vae=self.vae, unet=self.unet.network, scheduler=self.scheduler, guidance_scale=self.guidance_scale
        )


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Enable gradient checkpointing in a network of diffusers or transformers."""
    # The method's name in diffusers, in recent versions of transformers, and in older ones.
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(network, next(name for name in names if hasattr(network, name)))()
