"""Settings of `train_unet`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.training.settings.dreambooth import DreamBoothSettings

CONDITION_KINDS = ("latents", "map")  # names in sdkit.loading.configs.CONDITIONS
LOSSES = ("simple", "hybrid", "vlb")
TIMESTEPS = ("uniform", "logit_normal", "importance")
NOISE_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}  # ours: diffusers'


@dataclass(frozen=True, kw_only=True)
class UNetConfig(DreamBoothSettings):
    """Settings of `train_unet`. `data` may also be a latent cache, which spares the work of the frozen networks.

    Attributes:
        lora_rank: Rank of the LoRA; None trains the whole network.
        lora_alpha: Alpha of the LoRA, whose update is multiplied by alpha / rank; None is the rank.
        lora_dropout: Share of the inputs of the LoRA's layers that are set to 0 in training.
        lora_rank_stabilized: Multiply by alpha / sqrt(rank) instead, so that a high rank learns as fast
            (rsLoRA, Kalajdzievski 2023).
        lora_targets: Layers of the LoRA: attention, feed_forward, convolutions, or ends of layers' names, such as
            attn2.to_k.
        train_text_encoder: Train the text encoder together with the U-Net.
        condition_column: Column of an image that the U-Net is to read beside the noise, in parquet files and
            data sets of the Hub: the image to edit, a semantic map, or the image itself to enlarge. Its first
            convolution gets further channels, which begin at zero.
        conditioning_data: Data set of the conditions, images of the same names as those in data, in place of
            condition_column. A latent cache holds its own.
        condition_kind: What the U-Net reads of a condition: its latents, or, with map, its colours at the size
            of the latents. None is the model's own, or latents.
        condition_dropout: Share of samples trained without their condition, which image guidance needs; half
            of them without their caption, too (InstructPix2Pix).
        image_encoder: Folder with CLIP's image encoder, and the statistics of its embeddings, such as the result of
            `train_image_prior`. The U-Net then reads the noised embedding of each image, as DALL-E 2's decoder does.
        embedding_dropout: Share of samples trained without that embedding, which guidance needs.
        upscale_factor: Train an upsampler: the U-Net reads the image itself, this many times smaller, with noise.
            None is the model's own.
        noise_augmentation: Largest noise level of an upsampler's small image; each sample has a level from 0 up
            to it (Ho et al. 2022), which the U-Net is told.
        classes: Names of the classes, in the order of their labels, for a U-Net that takes labels (a
            UNet2DModel with num_class_embeds). Captions are then names of classes, and caption_dropout
            drops labels. Left out, the captions of data are the classes.
        noise_schedule: Noise schedule of a U-Net made from init: linear (DDPM), scaled_linear (Stable
            Diffusion), or cosine (Nichol & Dhariwal 2021). None is the one beside init, or DDPM's for a
            UNet2DModel, or the model's.
        loss: simple (the mean squared error), hybrid, or vlb. The last two train a U-Net with twice the output
            channels, which learns its variance (Nichol & Dhariwal 2021): hybrid adds vlb_weight times the
            variational bound, of which the mean has no gradient; vlb is the bound alone.
        vlb_weight: Weight of the variational bound in the hybrid loss.
        timestep_sampling: uniform; logit_normal: T times the sigmoid of a normal draw (Esser et al. 2024,
            https://arxiv.org/abs/2403.03206, section 3.1), so that the middle timesteps are drawn more often; or
            importance: in proportion to the root mean square of the last ten losses at each timestep, for the losses
            hybrid and vlb.
        logit_mean: Mean of that normal draw. Above 0 noisier timesteps are drawn more often, below 0 cleaner ones.
        logit_std: Its standard deviation.
        bits_per_dimension: Evaluations of the U-Net for each held-out image with which validation estimates
            the bits per dimension of a model of pixels; as many as timesteps give the exact bound, 0 none.
    """

    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_rank_stabilized: bool = False
    lora_targets: tuple[str, ...] = ("attention",)
    train_text_encoder: bool = False
    condition_column: str | None = None
    conditioning_data: str | os.PathLike[str] | None = None
    condition_kind: str | None = None
    condition_dropout: float = 0.1
    image_encoder: str | os.PathLike[str] | None = None
    embedding_dropout: float = 0.1
    upscale_factor: int | None = None
    noise_augmentation: int = 350
    classes: tuple[str, ...] = ()
    noise_schedule: str | None = None
    loss: str = "simple"
    vlb_weight: float = 0.001
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    bits_per_dimension: int = 0

    # Paths; fingerprints cover the contents.
    may_change = DreamBoothSettings.may_change | {"conditioning_data", "image_encoder"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, strings, whole_number

        flag("train_text_encoder", self.train_text_encoder)
        self._check_lora()
        self._check_condition()
        self._check_image_encoder()
        self._check_loss()
        if self.classes:
            self._keep("classes", tuple(strings("classes", self.classes)))
            if not all(name.strip() for name in self.classes):
                raise ArgumentError("classes must be names, and one is empty; the empty caption is no class.")
        if self.lora_rank is not None:
            self._keep("lora_rank", whole_number("lora_rank", self.lora_rank, 1))
            if self.init is not None:
                raise ArgumentError("a network made from init= has nothing for LoRA to add to; leave one of them out.")

    def _check_loss(self) -> None:
        """Check the settings of the loss with each other."""
        from sdkit.arguments import number, one_of, whole_number

        one_of("loss", self.loss, LOSSES)
        self._check_timesteps()
        self._keep("vlb_weight", number("vlb_weight", self.vlb_weight, 0))
        self._keep("bits_per_dimension", whole_number("bits_per_dimension", self.bits_per_dimension, 0))
        if self.noise_schedule is not None:
            one_of("noise_schedule", self.noise_schedule, NOISE_SCHEDULES)
            if self.init is None:
                raise ArgumentError(
                    "noise_schedule is that of a U-Net trained from scratch; give init, or leave it out, as a trained "
                    "model has its own."
                )
        if self.loss != "hybrid" and self.vlb_weight != type(self).vlb_weight:
            raise ArgumentError("vlb_weight belongs to the loss hybrid; leave it out, or give loss hybrid.")
        if self.loss == "hybrid" and self.vlb_weight == 0:
            raise ArgumentError("at vlb_weight 0 nothing trains the variance; give a larger one, or loss simple.")
        if self.loss == "vlb" and self.snr_gamma is not None:
            raise ArgumentError("snr_gamma weights the simple loss, and vlb has none; leave it out.")
        if self.loss != "simple" and self.instance_data is not None:
            raise ArgumentError("DreamBooth trains by the loss simple; leave loss out.")
        if self.loss != "simple" and self.noise_offset:
            raise ArgumentError(
                "noise_offset draws other noise than the variational bound is of; leave one of them out."
            )

    def _check_timesteps(self) -> None:
        """Check how timesteps are drawn, and whether that suits the loss."""
        from sdkit.arguments import number, one_of

        one_of("timestep_sampling", self.timestep_sampling, TIMESTEPS)
        self._keep("logit_mean", number("logit_mean", self.logit_mean, -5, 5))
        self._keep("logit_std", number("logit_std", self.logit_std, 0.01, 5))
        given = [name for name in ("logit_mean", "logit_std") if getattr(self, name) != getattr(type(self), name)]
        if given and self.timestep_sampling != "logit_normal":
            raise ArgumentError(f"{given[0]} belongs to timestep_sampling logit_normal; give that, too.")
        if self.loss == "simple" and self.timestep_sampling == "importance":
            raise ArgumentError("timestep_sampling importance belongs to the losses hybrid and vlb; give one of them.")
        if self.loss != "simple" and self.timestep_sampling == "logit_normal":
            raise ArgumentError("timestep_sampling logit_normal belongs to the loss simple; leave one of them out.")

    def _check_lora(self) -> None:
        """Check the settings of the LoRA, except its rank."""
        from sdkit.arguments import flag, number, strings

        if self.lora_alpha is not None:
            self._keep("lora_alpha", number("lora_alpha", self.lora_alpha, 1e-6, 1e6))
        self._keep("lora_dropout", number("lora_dropout", self.lora_dropout, 0, 0.99))
        flag("lora_rank_stabilized", self.lora_rank_stabilized)
        self._keep("lora_targets", tuple(strings("lora_targets", self.lora_targets)))
        names = ("lora_alpha", "lora_dropout", "lora_rank_stabilized", "lora_targets")
        given = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if given and self.lora_rank is None:
            raise ArgumentError(f"{given[0]} belongs to a LoRA, and there is none; give lora_rank, too.")

    def _check_image_encoder(self) -> None:
        """Raise ArgumentError for settings that a decoder of image embeddings cannot be trained with."""
        from sdkit.arguments import number, path_or_name

        self._keep("embedding_dropout", number("embedding_dropout", self.embedding_dropout, 0, 1))
        if self.image_encoder is None:
            if self.embedding_dropout != type(self).embedding_dropout:
                raise ArgumentError("embedding_dropout belongs to image_encoder, and there is none; give it, too.")
            return
        path_or_name("image_encoder", self.image_encoder)
        unfit = ("instance_data", "condition_column", "conditioning_data", "condition_kind", "upscale_factor")
        for name in (*unfit, "lora_rank", "evaluate", "validation_prompts"):
            if getattr(self, name) not in (None, ()):
                raise ArgumentError(f"{name} has no meaning for a U-Net that reads image embeddings; leave it out.")

    def _check_condition(self) -> None:
        """Raise ArgumentError for settings of conditions that contradict each other."""
        from sdkit.arguments import number, whole_number
        from sdkit.data.pairs import check_conditions

        check_conditions(self.condition_column, self.conditioning_data, self.condition_kind)
        for name in ("condition_column", "conditioning_data", "condition_kind"):
            if getattr(self, name) is not None and self.instance_data is not None:
                raise ArgumentError(f"{name} has no meaning for DreamBooth, which learns from images alone.")
        if self.conditioning_data is not None:
            self._keep_apart("conditioning_data", self.conditioning_data)
        self._keep("condition_dropout", number("condition_dropout", self.condition_dropout, 0, 1))
        self._keep("noise_augmentation", whole_number("noise_augmentation", self.noise_augmentation, 0))
        if self.upscale_factor is not None:
            self._keep("upscale_factor", whole_number("upscale_factor", self.upscale_factor, 2, 64))
            given = [name for name in ("condition_column", "conditioning_data", "condition_kind", "instance_data")
                     if getattr(self, name) is not None]  # fmt: skip
            if given:
                raise ArgumentError(f"an upsampler's condition is made of the image itself; leave {given[0]} out.")
