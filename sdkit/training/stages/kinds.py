"""The kinds of denoisers that `train_unet` trains beside Stable Diffusion's: without text, and with a learned variance;
and the noise schedule of each.
"""

from __future__ import annotations

from typing import Any, Protocol

from sdkit.diffusion.schedule import NoiseSchedule, completed
from sdkit.errors import ArgumentError
from sdkit.files import expanded
from sdkit.loading.configs import LOW_RES, class_name, read_config
from sdkit.loading.new_network import config_file
from sdkit.loading.parts import SCHEDULER, UNET
from sdkit.loading.source import Source, adds_more_than_text
from sdkit.loading.tensors import is_file
from sdkit.networks.autoencoder import VAE
from sdkit.networks.denoiser import UNet
from sdkit.training.settings import NOISE_SCHEDULES, UNetConfig
from sdkit.training.stage import Samples
from sdkit.training.stages.frozen import keep_schedule


class Addition(Protocol):
    """Further input of a kind of U-Net beside x_t and captions: embeddings of images, a small image, or a condition."""

    def added(self, batch: dict[str, Any], samples: Samples) -> dict[str, Any]:
        """Return a training batch of samples (n, item) with it. What is random depends on n and the seed alone."""

    def held_out(self, batch: dict[str, Any], i: int) -> dict[str, Any]:
        """Return a batch of held-out image i with it, the same in every run."""


DDPM: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}
"""The noise schedule of DDPM (Ho et al. 2020, section 4), with the small one of its two variances."""
BETAS = {"scaled_linear": (0.00085, 0.012)}
"""First and last beta of a schedule in `NOISE_SCHEDULES`; DDPM's for those that are not here."""


def scheduler_of(model: Source, config: UNetConfig, *, latents: bool) -> dict[str, Any]:
    """Return the config of the run's noise schedule: the model's, or that of a network made from `init`, with the
    changes that the run asks for.

    Args:
        model: The model.
        config: Settings of the run.
        latents: Whether latents are denoised, not pixels.
    """
    scheduler = model.scheduler_config() if config.init is None else _beside_init(model, config)
    if config.lora_rank is not None:
        keep_schedule(config, scheduler, "a LoRA")
    if config.noise_schedule is not None:
        start, end = BETAS.get(config.noise_schedule, (DDPM["beta_start"], DDPM["beta_end"]))
        curve = {"beta_schedule": NOISE_SCHEDULES[config.noise_schedule], "beta_start": start, "beta_end": end}
        scheduler = completed(scheduler) | curve
        scheduler.pop("trained_betas", None)
    if config.prediction_type is not None:
        scheduler["prediction_type"] = config.prediction_type
    if config.zero_snr is not None:
        scheduler["rescale_betas_zero_snr"] = config.zero_snr
    if config.zero_snr:  # sampling must start at the last timestep, which is pure noise (Lin et al. 2023)
        scheduler["timestep_spacing"] = "trailing"
    unclipped = {"clip_sample": False} if latents else {}
    if config.loss != "simple":  # the one scheduler that knows a learned variance
        scheduler = (
            completed(scheduler) | {"_class_name": "DDPMScheduler", "variance_type": "learned_range"} | unclipped
        )
    elif config.zero_snr or config.prediction_type == "sample":
        # SD 1.x ships PNDM, which supports neither zero terminal SNR nor x0-prediction; export DDIM instead. Missing
        # keys are filled in first, because their defaults differ between schedulers. Latents are never clipped.
        scheduler = completed(scheduler) | {"_class_name": "DDIMScheduler"} | unclipped
    return scheduler


def _beside_init(model: Source, config: UNetConfig) -> dict[str, Any]:
    """Return the noise schedule of a network made from `init`: the one in its folder; DDPM's, for a U-Net that takes no
    text; or the model's."""
    assert config.init is not None
    beside = expanded(config.init) / SCHEDULER.config_path
    if is_file(beside):
        return read_config(beside, SCHEDULER.checks)
    file = config_file(config.init, UNET)
    takes_text = class_name(read_config(file, UNET.checks)) != "UNet2DModel"
    return model.scheduler_config() if takes_text else dict(DDPM)


def check_variance(config: UNetConfig, unet: UNet, schedule: NoiseSchedule) -> None:
    """Raise ArgumentError unless the loss trains all that the U-Net predicts, and the schedule knows its variance."""
    outputs = unet.network.config.out_channels
    learns = outputs == 2 * unet.channels
    if learns and config.loss == "simple":
        raise ArgumentError(
            "a U-Net that learned its variance cannot be trained by the loss simple, which leaves the variance as it "
            "is; give loss hybrid, or a U-Net that predicts one thing."
        )
    if not learns and config.loss != "simple":
        raise ArgumentError(
            f"loss {config.loss} trains a variance, and this U-Net, with {outputs} output channels, predicts none; set "
            f"out_channels to {2 * unet.channels}, or give loss simple."
        )
    if not learns and schedule.variance_type == "learned_range":
        raise ArgumentError(
            "the noise schedule says that the variance is learned, and the U-Net predicts none; set variance_type to "
            f"fixed_small, or out_channels to {2 * unet.channels} with loss hybrid."
        )
    if config.loss != "simple" and float(schedule.alphas_cumprod[-1]) == 0:
        raise ArgumentError("at zero terminal SNR the variational bound is not finite; leave zero_snr out.")


def check_with_text(config: UNetConfig, unet: UNet, *, embedded: bool) -> None:
    """Raise ArgumentError for settings and labels that a U-Net of text does not take.

    Args:
        config: Settings of the run.
        unet: The U-Net.
        embedded: Whether its labels are embeddings of images.
    """
    if config.classes:
        raise ArgumentError(
            "classes are of a UNet2DModel with num_class_embeds, and this U-Net takes text: leave classes out, or give "
            "another U-Net."
        )
    labelled = getattr(unet.network, "class_embedding", None) is not None
    if unet.condition != LOW_RES and not embedded and (labelled or adds_more_than_text(unet.network.config)):
        raise ArgumentError(
            "this U-Net takes more than text, labels or other embeddings, which train unet does not give; leave "
            "class_embed_type, num_class_embeds, and addition_embed_type out of its config."
        )


def check_without_text(config: UNetConfig, unet: UNet) -> None:
    """Raise ArgumentError for settings that need a text, of a U-Net that takes none."""
    needs_text = {
        "lora_rank": config.lora_rank is not None,
        "train_text_encoder": config.train_text_encoder,
        "instance_data": config.instance_data is not None,
    }
    if name := next((name for name, given in needs_text.items() if given), None):
        raise ArgumentError(f"{name} needs a U-Net that takes text, and this one is a UNet2DModel; leave it out.")
    if not unet.takes_labels:
        if config.classes:
            raise ArgumentError(
                "this U-Net takes no classes; set num_class_embeds in its config, or leave classes out."
            )
        if any(metric.name == "clip_score" for metric in config.metrics):
            raise ArgumentError("evaluate clip_score compares drawings with prompts, and there are none; leave it out.")
    if config.validation_prompts and not unet.takes_labels and any(map(str.strip, config.validation_prompts)):
        raise ArgumentError("this U-Net draws without prompts; give validation_prompts that are empty, one a picture.")
    if unet.network.config.class_embed_type == "identity":
        raise ArgumentError(
            "the U-Net takes vectors in place of class labels (class_embed_type identity); give one with "
            "num_class_embeds."
        )


def check_bits(config: UNetConfig, vae: VAE, schedule: NoiseSchedule) -> None:
    """Raise ArgumentError if a run cannot report bits per dimension."""
    if vae.kind.makes_latents:
        raise ArgumentError("bits_per_dimension is a measure of models of pixels; give vae pixels, or leave it out.")
    if not 2 <= config.bits_per_dimension <= schedule.num_timesteps:
        raise ArgumentError(
            f"bits_per_dimension must be from 2 to {schedule.num_timesteps}, the number of timesteps, or 0 for none."
        )
    if float(schedule.alphas_cumprod[-1]) == 0 and schedule.prediction_type == "epsilon":
        raise ArgumentError("at zero terminal SNR a model of eps has no bits_per_dimension; leave it out.")
