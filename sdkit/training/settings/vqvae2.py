"""Settings of `train_vqvae2`."""

from __future__ import annotations

from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.training.settings.stage import StageSettings


@dataclass(frozen=True, kw_only=True)
class VQVAE2Config(StageSettings):
    """Settings of `train_vqvae2`. The network is always trained from scratch.

    Attributes:
        width: Channels of the networks of both levels.
        latent_channels: Channels of a code.
        codes: Codes of each level's codebook.
        codebook_decay: Decay of the moving averages that the codes follow, with a k-means start and restarts
            of dead codes; 0 trains the codes by gradient alone.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        size: Size of the training images in pixels, one number or (height, width), multiples of 8.
    """

    width: int = 128
    latent_channels: int = 32
    codes: int = 512
    codebook_decay: float = 0.99
    learning_rate: float = 3e-4
    size: int | tuple[int, int] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import number, whole_number

        for name, most in (("width", 4096), ("latent_channels", 4096), ("codes", 2**20)):
            self._keep(name, whole_number(name, getattr(self, name), 2, most))
        self._keep("codebook_decay", number("codebook_decay", self.codebook_decay, 0, 0.9999))
        if self.init is not None:
            raise ArgumentError("init has no meaning for a VQ-VAE-2, whose shape is width and codes; leave it out.")
        if any(metric.name == "clip_score" for metric in self.metrics):
            raise ArgumentError("evaluate clip_score compares drawings with prompts, and there is none; leave it out.")
