"""Checks of the frozen model for which a ControlNet, a textual inversion embedding, or a LoRA is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdkit.errors import ArgumentError
from sdkit.networks.denoiser import UNet
from sdkit.training.settings import DenoisingSettings


def keep_schedule(config: DenoisingSettings, scheduler: Mapping[str, Any], what: str) -> None:
    """Raise ArgumentError if a run asks for another noise schedule than the model's.

    Args:
        config: Settings of the run.
        scheduler: The config of the model's scheduler.
        what: The thing that is trained, with its article.
    """
    own = {
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "zero_snr": bool(scheduler.get("rescale_betas_zero_snr")),
    }
    if changed := [name for name, value in own.items() if getattr(config, name) not in (None, value)]:
        raise ArgumentError(f"{what} is used with the model's own noise schedule, which {changed[0]} would change.")


def check_frozen(unet: UNet, what: str) -> None:
    """Raise ArgumentError if nothing can be trained with a frozen U-Net; `what` is trained, with its article."""
    if unet.inpaints:
        raise ArgumentError(f"{what} cannot be trained with an inpainting U-Net; give a text-to-image model.")
    if unet.guided:
        raise ArgumentError(
            "a U-Net that takes the guidance scale as an input (latent consistency) cannot be trained with; give the "
            "model that it was distilled from."
        )
    if unet.network.config.out_channels != unet.channels:
        raise ArgumentError(
            "a U-Net that learned its variance cannot be trained with; give one that predicts one thing."
        )
