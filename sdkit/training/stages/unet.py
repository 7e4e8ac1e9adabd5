"""Fine-tuning the U-Net: latents and captions -> noise -> network -> denoising loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from sdkit import images as image_io
from sdkit.data.examples import open_examples
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.losses import diffusion_loss
from sdkit.diffusion.schedule import NoiseSchedule, completed
from sdkit.engines.attention import PlainWhereSmall
from sdkit.errors import ArgumentError
from sdkit.loading.configs import GUIDANCE
from sdkit.loading.lora_file import FILENAME, save_lora
from sdkit.loading.new_network import new_network
from sdkit.loading.source import USUAL_GUIDANCE, Source
from sdkit.loading.tensors import quiet
from sdkit.networks.autoencoder import VAE, latents_of
from sdkit.networks.denoiser import UNet
from sdkit.networks.lora import TARGETS, add_lora, lora_tensors
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.training.batches import noise_of
from sdkit.training.distributed import split_over_processes
from sdkit.training.loop import fit
from sdkit.training.settings import UNetConfig
from sdkit.training.signals import raise_if_stopped
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.examples import CachedLatents, ImageLatents
from sdkit.training.stages.images import identity_of, is_cache, report_skipped, training_transform

VALIDATION_STEPS = 25  # of the images of fixed prompts
REMEMBERED = 4096  # captions whose embeddings are kept in memory, each 0.24 MB for SD 1.x; a cache has room for all
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_unet(config: UNetConfig) -> Path:
    """Fine-tune a U-Net, whole or by LoRA, or train one from scratch, and return the run folder.

    result/ is a whole pipeline as diffusers has it, or pytorch_lora_weights.safetensors. `config.data` is a latent
    cache, from which the VAE has nothing to do, or images. An existing run is resumed.
    Raises SdkitError in one sentence for what the user can put right, and TrainingStopped after SIGTERM or Ctrl-C, once
    a checkpoint is written.
    """
    return fit(UNetStage(config), config, Path(config.out_dir))


class Denoiser(nn.Module):
    """U-Net and, where it is trained along, text encoder: one network to call, so that processes reduce the gradients
    of both."""

    def __init__(self, unet: UNet, text: TextEncoder | None) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The U-Net's output; `cond.text` is embeddings (B, 77k, D), or token ids (B, k, 77) if the text encoder is
        trained."""
        if self.text is not None and cond.text is not None:
            ids = cond.text
            embeddings = self.text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2]).flatten(1, 2)
            cond = replace(cond, text=embeddings)
        output: Tensor = self.unet(x_t, t, cond)
        return output


class UNetStage:
    """What `sdkit.training.loop.fit` trains."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        model = Source.open(config.model)
        beside = model if config.vae is None else Source.open(config.vae)
        self.vae = VAE(beside.autoencoder()).eval().requires_grad_(False)
        self.text = TextEncoder(*model.text_encoder()).eval().requires_grad_(False)
        # An unused copy, for the export: using a tokenizer changes what it saves.
        self.tokenizer = copy.deepcopy(self.text.tokenizer)
        self.scheduler = _scheduler(model, config)
        self.schedule = NoiseSchedule.from_config(self.scheduler, latents=True)
        self.guidance_scale = USUAL_GUIDANCE if config.init else model.guidance_scale
        self.objective = DenoisingObjective(self.schedule, snr_gamma=config.snr_gamma, noise_offset=config.noise_offset)
        if self.objective.zero_snr and self.schedule.prediction_type == "epsilon":
            raise ArgumentError(
                "at zero terminal SNR the noise says nothing of the image: train with prediction_type v_prediction or "
                "sample, or without zero_snr."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._make_networks(model)
        side = self.unet.sample_size * self.vae.factor
        self.latents = open_latents(config, self.vae, self.text, (side, side))
        networks = identity_of(self.vae.network, self.text.network, self.unet.network, schedule=self.scheduler)
        self.identity = {"data": self.latents.identity, "model": networks, "vae": self.vae.identity}
        self.size = len(self.latents.train)
        rate, ema = config.learning_rate, config.ema_decay > 0
        self.players = [Player("unet", self.denoiser, self.loss, learning_rate=rate, ema=ema)]
        self._embeddings: dict[bytes, Tensor] = {}

    def _make_networks(self, model: Source) -> None:
        config = self.config
        network = model.denoiser() if config.init is None else new_network(config.init, "unet")
        self.unet = UNet(network)
        StableDiffusion(self.vae, self.text, self.unet, self.schedule)  # says so where they do not belong together
        if network.config.out_channels != network.config.in_channels:
            raise ArgumentError(
                "a U-Net that learned its variance cannot be trained; give one that predicts one thing."
            )
        if self.unet.guided:
            raise ArgumentError(
                "a U-Net that takes the guidance scale as an input (latent consistency) cannot be trained; give the "
                "model that it was distilled from."
            )
        network.set_attn_processor(PlainWhereSmall())
        trained = [network, *([self.text.network] if config.train_text_encoder else [])]
        for one in trained:
            if config.lora_rank is None:
                one.requires_grad_(True)
            elif config.lora_rank > (widest := _widest(one)):
                raise ArgumentError(
                    f"lora_rank {config.lora_rank} is above the width of this model's attention, {widest}, where LoRA "
                    "saves nothing; give a smaller one."
                )
            else:
                for p in one.parameters():  # frozen weights may be in half precision, since autocast casts them anyway
                    p.data = p.data.to(HALF.get(config.mixed_precision, torch.float32))
                add_lora(one, config.lora_rank)
            if config.gradient_checkpointing:
                names = ("enable_gradient_checkpointing", "activation_checkpointing_enable")  # diffusers, transformers
                getattr(one, next((name for name in names if hasattr(one, name)), "gradient_checkpointing_enable"))()
        self.denoiser = Denoiser(self.unet, self.text if config.train_text_encoder else None)

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return posterior or pixels, caption, timestep, and noise of samples (n, item).

        Noise depends only on n and the seed.
        """
        rows = []
        for n, item in samples:
            example = self.latents.load(item, n // self.size)
            source = noise_of(self.config.seed, n)
            dropped = float(torch.rand((), generator=source)) < self.config.caption_dropout
            t = self.objective.timestep(source)
            rows.append(
                {
                    **example,
                    **(self.latents.empty if dropped else {}),
                    **self.objective.noise(self._shape, source),
                    "t": t,
                }
            )
        return collated(rows)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(4, h, w) of the latents of one example."""
        height, width = self.latents.shape
        return (self.vae.channels, height, width)

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.latents.name(item) for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The weighted denoising loss, and beside it `mse`, the same without weights, where there are some."""
        output, target = self._denoised(networks["unet"], batch)
        return self.objective.loss(output, target, batch["t"])

    def _denoised(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the network's output for noised latents, and its target."""
        t, eps = torch.tensor(batch["t"]), batch["eps"]
        if "pixels" in batch:
            half = self.config.mixed_precision == "bf16"  # in float16 this VAE can overflow
            with torch.no_grad(), torch.autocast(eps.device.type, torch.bfloat16, enabled=half):
                mean, logvar = self.vae.to(eps.device).posterior(batch["pixels"])
        else:
            mean, logvar = batch["mean"], batch["logvar"]
        z = latents_of(mean, logvar, batch["posterior_eps"], self.latents.scale, self.latents.shift)
        x_t, target = self.objective.noised(z, eps, t)
        return network(x_t, t.to(eps.device), Conditioning(self._cond(batch), batch["mask"])), target

    def _cond(self, batch: Mapping[str, Any]) -> Tensor:
        """Token ids for a text encoder in training, embeddings of a frozen one."""
        if self.config.train_text_encoder:
            ids: Tensor = batch["ids"]
            return ids
        if "embeddings" in batch:
            embeddings: Tensor = batch["embeddings"]
            return embeddings
        return torch.stack([self._embedding(ids, key) for ids, key in zip(batch["ids"], batch["keys"], strict=True)])

    @torch.no_grad()
    def _embedding(self, ids: Tensor, key: bytes) -> Tensor:
        """Return embeddings (77k, D) of one caption's ids (k, 77). Captions are encoded one at a time: a resumed run
        starts with an empty cache and must get bit-identical embeddings."""
        if key in self._embeddings:
            return self._embeddings[key].to(ids.device)
        embedding: Tensor = self.text.to(ids.device)(ids).flatten(0, 1)
        if len(self._embeddings) < REMEMBERED:
            self._embeddings[key] = embedding.cpu()
        return embedding

    def validate(self, step: int) -> dict[str, float]:
        """The loss, without weights, over a fixed grid of images, noises and timesteps, and images of fixed prompts."""
        losses = split_over_processes(len(self.latents.held_out), self._validation_loss)
        report_skipped(self.latents.skipped, Path(self.config.out_dir) / "skipped.json")
        if self.config.validation_prompts:
            self._show(step)
        return {"loss": math.fsum(losses) / len(losses)}

    def _validation_loss(self, i: int) -> float:
        """Return the loss of one held-out image over the validation grid."""
        example = self.latents.validation(i)
        rows = [example | drawn for drawn in self.objective.validation_grid(i, self._shape)]
        device = self.unet.device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in collated(rows).items()}
        return float(diffusion_loss(*self._denoised(self.denoiser, batch)))

    def _show(self, step: int) -> None:
        prompts = self.config.validation_prompts
        images = [
            Image.fromarray(pixels)
            for pixels in split_over_processes(len(prompts), lambda i: np.asarray(self._drawn(prompts[i], i)))
        ]
        self.vae.cpu()
        if not self.config.train_text_encoder:
            self.text.cpu()
        if PartialState().is_main_process:
            sheet = image_io.grid(images, captions=prompts, padding=8)
            image_io.save(sheet, self.config.samples / f"step-{step:08d}.png")

    def _drawn(self, prompt: str, seed: int) -> Image.Image:
        """An image of the networks as they are, in the run's precision; decoded in float32."""
        device, half = self.unet.device, HALF.get(self.config.mixed_precision)
        height, width = (side * self.vae.factor for side in self.latents.shape)
        sd = StableDiffusion(self.vae.to(device), self.text.to(device), self.unet, self.schedule)
        with torch.autocast(device.type, half, enabled=half is not None):
            z = sd(
                prompt, seed=seed, height=height, width=width, num_inference_steps=VALIDATION_STEPS,
                guidance_scale=self.guidance_scale, output_type="latent", callback=lambda _: raise_if_stopped(),
            )  # fmt: skip
        # What is no number any more is shown all the same: a run that went wrong is ended by the loop, which says why.
        pixels = self.vae.decode(z.nan_to_num(0, 0, 0), output_type="pt")
        return image_io.to_pil(pixels.nan_to_num(0))[0]

    def export(self, folder: Path) -> None:
        """LoRA's weights, or the whole pipeline in diffusers layout."""
        text = self.text if self.config.train_text_encoder else None
        if self.config.lora_rank is not None:
            save_lora(lora_tensors(self.unet.network, text and text.network), folder / FILENAME)
            return
        with quiet():
            import diffusers

            scheduler = getattr(diffusers, self.scheduler.get("_class_name") or "DDIMScheduler")
            pipeline = diffusers.StableDiffusionPipeline(
                vae=self.vae.network, text_encoder=self.text.network, tokenizer=self.tokenizer,
                unet=self.unet.network, scheduler=scheduler.from_config(self.scheduler), safety_checker=None,
                feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
            if self.guidance_scale != USUAL_GUIDANCE:
                pipeline.register_to_config(**{GUIDANCE: self.guidance_scale})
            pipeline.save_pretrained(folder)


def open_latents(
    config: UNetConfig, vae: VAE, text: TextEncoder, own_size: tuple[int, int]
) -> CachedLatents | ImageLatents:
    """Open `config.data`: a latent cache, or images, by default of the model's `own_size`."""
    if is_cache(config.data):
        defaults = {field.name: field.default for field in fields(config)}
        if given := [name for name, value in config.opened_with().items() if value != defaults[name]]:
            raise ArgumentError(f"{given[0]}= has no meaning for a latent cache; give it to sdkit cache instead.")
        trains_text = config.train_text_encoder
        return CachedLatents(config.data, vae, text, size=config.size, augment=config.augment, trains_text=trains_text)
    size: Any = config.size or own_size
    vae.check_size(size)
    examples = open_examples(config.data, **config.opened_with())
    return ImageLatents(examples, training_transform(size, config.augment), vae, text, seed=config.seed)


def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of rows. Captions of fewer chunks of tokens than the longest are filled up, and `mask` (B, 77k) says
    which tokens count; it is None where all captions are of one length."""
    lengths = [row["ids"].numel() for row in rows]
    batch: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    for key in {"ids", "embeddings"} & batch.keys():
        most = max(len(value) for value in batch[key])
        batch[key] = [F.pad(value, (0, 0, 0, most - len(value))) for value in batch[key]]
    stacked = {key: torch.stack(values) for key, values in batch.items() if isinstance(values[0], Tensor)}
    keys = [ids.numpy().tobytes() for ids in batch["ids"]]
    mask = None if len({*lengths}) == 1 else torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return batch | stacked | {"keys": keys, "mask": mask}


def _widest(network: nn.Module) -> int:
    """Return the highest rank that a layer with LoRA can have."""
    layers = (layer for name, layer in network.named_modules() if name.endswith(TARGETS))
    return max(min(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear))


def _scheduler(model: Source, config: UNetConfig) -> dict[str, Any]:
    """Return the model's scheduler config, with the changes that the run asks for."""
    scheduler = model.scheduler_config()
    own = {"prediction_type": scheduler.get("prediction_type", "epsilon")}
    own["zero_snr"] = bool(scheduler.get("rescale_betas_zero_snr"))
    changed = [name for name, value in own.items() if getattr(config, name) not in (None, value)]
    if changed and config.lora_rank is not None:
        raise ArgumentError(f"a LoRA is used with the model's own noise schedule, which {changed[0]} would change.")
    if config.prediction_type is not None:
        scheduler["prediction_type"] = config.prediction_type
    if config.zero_snr is not None:
        scheduler["rescale_betas_zero_snr"] = config.zero_snr
    if config.zero_snr:  # steps must begin with the last timestep
        scheduler["timestep_spacing"] = "trailing"
    if config.zero_snr or config.prediction_type == "sample":  # SD 1.x ships PNDM, which supports neither
        # Keys that are left out mean other things to another scheduler. Latents are never clipped.
        scheduler = completed(scheduler) | {"_class_name": "DDIMScheduler", "clip_sample": False}
    return scheduler
