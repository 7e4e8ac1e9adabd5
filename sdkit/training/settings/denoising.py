"""Settings shared by all stages that train a network to denoise."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sdkit.training.settings.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(StageSettings):
    """Settings shared by all stages that train a network to denoise latents of captioned images.

    Attributes:
        vae: VAE to use in place of the model's own: a folder, a Hub id, or a single file. The U-Net is trained
            on its latents and exported with it. None takes the model's own, "pixels" trains on pixels.
        caption_column: Column of the captions in parquet files and data sets of the Hub, or key in
            metadata; None detects it.
        default_caption: Caption of images without one.
        prediction_type: What the network learns to predict: epsilon, v_prediction or sample (x0); None is
            the model's own.
        zero_snr: Shift the noise schedule so that its last step is pure noise (Lin et al. 2023); None keeps
            the model's.
        snr_gamma: Gamma of the min-SNR weights (Hang et al. 2023, who use 5); None weights all timesteps
            equally. At zero terminal SNR the noisiest steps keep their weight.
        noise_offset: Size of an offset added to each channel's noise, about 0.1, for darker and brighter
            images; 0 turns it off.
        caption_dropout: Share of samples trained with an empty caption, which classifier-free guidance
            needs.
        validation_prompts: Prompts of images generated at each validation, always from the same seeds.
    """

    vae: str | os.PathLike[str] | None = None
    caption_column: str | None = None
    default_caption: str = ""
    prediction_type: str | None = None
    zero_snr: bool | None = None
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    caption_dropout: float = 0.1
    validation_prompts: tuple[str, ...] = ()

    may_change = StageSettings.may_change | {"vae"}  # a path; a fingerprint covers the contents

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import PREDICTIONS, flag, number, one_of, path_or_name, strings

        if self.vae is not None:
            path_or_name("vae", self.vae)
        if self.zero_snr is not None:
            flag("zero_snr", self.zero_snr)
        if self.prediction_type is not None:
            kind = PREDICTIONS[one_of("prediction_type", self.prediction_type, PREDICTIONS)]
            self._keep("prediction_type", kind)
        if self.snr_gamma is not None:
            self._keep("snr_gamma", number("snr_gamma", self.snr_gamma, 1e-3))
        self._keep("noise_offset", number("noise_offset", self.noise_offset, 0))
        self._keep("caption_dropout", number("caption_dropout", self.caption_dropout, 0, 1))
        if self.validation_prompts:
            prompts = tuple(strings("validation_prompts", self.validation_prompts))
            self._keep("validation_prompts", prompts)

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        return super().opened_with() | {"caption_column": self.caption_column, "default_caption": self.default_caption}
