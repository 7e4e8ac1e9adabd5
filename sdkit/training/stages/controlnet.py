"""Training a ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): a copy of the frozen U-Net's encoder
learns, behind convolutions that begin at zero, to add what an image says to the U-Net's skip connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.losses import diffusion_loss
from sdkit.engines.attention import PlainWhereSmall
from sdkit.images import to_tensors
from sdkit.loading.source import Source
from sdkit.messages import no_warnings, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.networks.controlnet import ControlNet
from sdkit.networks.denoiser import UNet
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.training.loop import fit
from sdkit.training.settings import ControlNetConfig
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.conditions import open_control_examples
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.drawing import Drawing
from sdkit.training.stages.encoding import BatchEncoder
from sdkit.training.stages.evaluating import Picture, PictureMetrics
from sdkit.training.stages.examples import Row, denoising_batch, validation_batch, validation_metrics
from sdkit.training.stages.frozen import check_frozen, keep_schedule
from sdkit.training.stages.images import identity_of
from sdkit.training.stages.unet import HALF, enable_gradient_checkpointing

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

EMBEDDING_CHANNELS = (16, 32, 96, 256, 256, 256)
"""Channels of the levels of the network that reads the image. The first four are those of the paper and of diffusers;
each further level serves a VAE of twice the factor."""


def train_controlnet(config: ControlNetConfig) -> Path:
    """Train a ControlNet for a frozen model. An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images with captions, and each has a condition: in a
            column, in another folder, or made of the image. Or it is a latent cache of the images; conditions are then
            in another folder, or made of the images in it.

    Returns:
        The run folder. Its result/ is a ControlNet in diffusers layout.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.

    Example:
        >>> from sdkit.training import ControlNetConfig, train_controlnet
        >>> settings = ControlNetConfig(data="photos", default_caption="a photo", out_dir="runs/edges",
        ...                             condition="canny", size=64, max_steps=2)
        >>> run = train_controlnet(settings)
        >>> sorted(path.name for path in (run / "result").iterdir())
        ['config.json', 'diffusion_pytorch_model.safetensors', 'training.json']
    """
    return fit(ControlNetStage(config), config, Path(config.out_dir))


class ControlledDenoiser(nn.Module):
    """A frozen U-Net and the ControlNet in training, as one network.

    Processes exchange gradients when a network is called, so the two must be called as one.

    Args:
        unet: The U-Net.
        controlnet: The ControlNet.
    """

    def __init__(self, unet: UNet, controlnet: ControlNet) -> None:
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning, image: Tensor) -> Tensor:
        """Return the U-Net's output, shaped like `x_t`.

        Args:
            x_t: Noised latents (B, 4, h, w).
            t: Timesteps (B,).
            cond: Captions; its `text` is (B, 77k, D).
            image: Conditions (B, 3, H, W) in [0, 1].
        """
        residuals = self.controlnet(x_t, t, cond, image)
        output: Tensor = self.unet(x_t, t, replace(cond, residuals=residuals))
        return output


class ControlNetStage:
    """The stage of `train_controlnet`: one player, the ControlNet; and a frozen VAE, text encoder, and U-Net.

    Args:
        config: Settings of the run.

    Attributes:
        evaluators: Functions of the step that return further metrics of each validation, the same on every process.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        self.config = config
        model = Source.open(config.model)
        vae_source = model if config.vae is None else Source.open(config.vae)
        self.vae = VAE(vae_source.autoencoder()).eval().requires_grad_(False)
        self.text = TextEncoder(*model.text_encoder()).eval().requires_grad_(False)
        self.unet = UNet(model.denoiser()).eval().requires_grad_(False)
        self.schedule = model.schedule(latents=self.vae.kind.makes_latents)
        keep_schedule(config, model.scheduler_config(), "a ControlNet")
        StableDiffusion(self.vae, self.text, self.unet, self.schedule)  # raises if the parts do not fit each other
        self.objective = DenoisingObjective(self.schedule, snr_gamma=config.snr_gamma, noise_offset=config.noise_offset)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._make_controlnet()
        side = self.unet.sample_size * self.vae.factor
        self.examples = open_control_examples(
            config.data, self.vae, self.text, condition=config.condition, conditioning_data=config.conditioning_data,
            conditioning_image_column=config.conditioning_image_column, size=config.size, own_size=(side, side),
            augment=config.augment, seed=config.seed, **config.opened_with(),
        )  # fmt: skip
        self.encoder = BatchEncoder(
            self.vae, self.text, scale=self.examples.scale, shift=self.examples.shift,
            half=config.mixed_precision == "bf16",  # not in float16, where this VAE can overflow
        )  # fmt: skip
        networks = (self.vae.network, self.text.network, self.unet.network, self.controlnet.network)
        self.identity = {
            "data": self.examples.identity,
            "model": identity_of(*networks, schedule=model.scheduler_config()),
            "vae": self.vae.identity,
        }
        self.size = len(self.examples.train)
        self.evaluators: list[Callable[[int], Mapping[str, float]]] = []
        self.drawing = self._drawing(model.guidance_scale)
        if config.validation_prompts:
            self.evaluators.append(self.drawing)
        if config.evaluate:
            self.pictures = PictureMetrics(
                config.metrics, count=len(self.examples.held_out), picture=self._picture, size=self.drawing.size,
                device=lambda: self.unet.device,
            )  # fmt: skip
            self.evaluators.append(self._evaluate)
        rate, ema = config.learning_rate, config.ema_decay > 0
        self.players = [Player("controlnet", self.denoiser, self.loss, learning_rate=rate, ema=ema)]

    def _make_controlnet(self) -> None:
        """Load the ControlNet, or make one of the U-Net. Raises ArgumentError if it cannot be trained."""
        from diffusers import ControlNetModel

        config = self.config
        check_frozen(self.unet, "a ControlNet")
        levels = int(math.log2(self.vae.factor)) + 1
        if config.controlnet is not None:
            network = Source.open(config.controlnet).controlnet()
        else:
            with quiet("diffusers"):
                network = ControlNetModel.from_unet(
                    self.unet.network, conditioning_embedding_out_channels=EMBEDDING_CHANNELS[:levels]
                )
            _keep_heads(network, self.unet.network)
        self.controlnet = ControlNet(network.requires_grad_(True))
        self.controlnet.check_fits(self.unet, self.vae.factor)
        for p in self.unet.parameters():  # frozen weights can be in half precision, since autocast casts them anyway
            p.data = p.data.to(HALF.get(config.mixed_precision, torch.float32))
        for part in (self.unet.network, network):
            part.set_attn_processor(PlainWhereSmall())
            if config.gradient_checkpointing:
                enable_gradient_checkpointing(part)
        self.denoiser = ControlledDenoiser(self.unet, self.controlnet)

    def _drawing(self, guidance_scale: float) -> Drawing:
        """Return the drawing of the validation prompts, each with the condition of a held-out image."""
        config, held_out = self.config, self.examples.held_out
        height, width = (side * self.vae.factor for side in self.examples.shape)
        conditions = [
            control_image(self.examples.validation(i % len(held_out))) for i in range(len(config.validation_prompts))
        ]
        return Drawing(
            self.unet, self.vae, self.text, self.schedule, prompts=config.validation_prompts, folder=config.samples,
            size=(height, width), guidance_scale=guidance_scale, half=HALF.get(config.mixed_precision),
            controlnet=self.controlnet, control_images=conditions,
        )  # fmt: skip

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return pixels, condition, caption, timestep, and noise of samples (n, item), as `collated` does.

        All random values depend only on n and the seed.
        """
        config = self.config
        return denoising_batch(
            samples,
            self.examples,
            self.objective,
            self._shape,
            seed=config.seed,
            caption_dropout=config.caption_dropout,
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Shape (4, h, w) of the latents of one example."""
        height, width = self.examples.shape
        return (self.vae.channels, height, width)

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.examples.name(item) for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the denoising loss, and its parts to log; see `DenoisingObjective.loss`."""
        output, target = self._denoised(networks["controlnet"], batch)
        return self.objective.loss(output, target, batch["t"], batch.get("weight"))

    def _denoised(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the network's output for noised latents, and its target, both (B, 4, h, w)."""
        return self.encoder.denoised(self.objective, network, batch, batch["condition"])

    def validate(self, step: int) -> dict[str, float]:
        """Return the unweighted loss on a fixed grid of held-out images, noises, and timesteps.

        Also save images of the validation prompts in samples/, and the names of skipped images in skipped.json.
        Metrics of the `evaluators` come last.
        """
        return validation_metrics(
            self.examples, self._validation_loss, self.evaluators, step,
            skipped=Path(self.config.out_dir) / "skipped.json",
        )  # fmt: skip

    def _validation_loss(self, i: int) -> float:
        """Return the loss of one held-out image over the validation grid."""
        batch = validation_batch(i, self.examples, self.objective, self._shape, self.controlnet.device)
        return float(diffusion_loss(*self._denoised(self.denoiser, batch)))

    def _evaluate(self, step: int) -> Mapping[str, float]:
        """Return the metrics of pictures of the held-out captions and conditions."""
        metrics = self.pictures(step)
        self.drawing.rest()
        return metrics

    def _picture(self, i: int) -> Picture:
        """Draw the caption of held-out image i with its condition, always from the same seed. A cached image is
        decoded."""
        row, caption = self.examples.validation(i), self.examples.held_out_caption(i)
        (drawn,) = to_tensors(self.drawing.draw(caption, i, control_image(row)))
        return Picture(drawn, self.encoder.original(row, self.unet.device), caption)

    def export(self, folder: Path) -> None:
        """Write the ControlNet in diffusers layout into an empty folder."""
        with quiet("diffusers"), no_warnings():
            self.controlnet.network.save_pretrained(folder)


def control_image(row: Row) -> Tensor:
    """Return the condition of an example as the pipeline takes it, (3, H, W) in [-1, 1]."""
    return row["condition"] * 2 - 1


def _keep_heads(controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Pool the text with as many heads as the U-Net does, which `ControlNetModel.from_unet` leaves at its default."""
    config: Any = unet.config
    if config.addition_embed_type == "text":
        heads, pool = config.addition_embed_type_num_heads, controlnet.add_embedding.pool
        controlnet.register_to_config(addition_embed_type_num_heads=heads)
        pool.num_heads, pool.dim_per_head = heads, pool.k_proj.in_features // heads
