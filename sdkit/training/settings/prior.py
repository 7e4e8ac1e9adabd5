"""Settings of `train_prior`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sdkit.errors import ArgumentError
from sdkit.training.settings.stage import StageSettings

PRIORS = ("transformer", "pixelcnn")  # names in sdkit.networks.prior_shape.KINDS
PRIOR_CONDITIONS = ("text", "class", "map")  # names in sdkit.networks.prior_shape.CONDITIONS
LEVELS = ("top", "bottom")  # of a VQ-VAE-2


@dataclass(frozen=True, kw_only=True)
class PriorConfig(StageSettings):
    """Settings of `train_prior`. `data` may also be a latent cache, which spares the work of the VQ model.

    Attributes:
        model: Source of the tokenizer, and of the VQ model unless vae names one: a Hub id, a diffusers folder, a
            single file, or "emoji", the embedded model.
        vae: VQ-VAE or VQGAN whose codes the prior learns: a folder, a Hub id, or a single file. None takes the
            model's own.
        caption_column: Column of the captions in parquet files and data sets of the Hub, or key in
            metadata; None detects it.
        default_caption: Caption of images without one.
        kind: Network of the prior: transformer (a GPT, with its condition in front) or pixelcnn (a gated
            PixelCNN).
        conditioned_on: What the prior is conditioned on: text (captions, only for a transformer), class (each
            different caption is one), or map (the codes of a second image, such as a semantic map). None
            learns images alone.
        condition_column: Column of the maps, in parquet files and data sets of the Hub.
        conditioning_data: Data set of the maps, images of the same names as those in data, in place of
            condition_column. A latent cache holds its own.
        condition_dropout: Share of samples trained without their condition, which classifier-free guidance
            needs.
        level: Codes of a VQ-VAE-2, which vae then names: top, or bottom, whose condition is always the top
            codes. None is for a VQ model of one level.
        layers: Layers of the network.
        width: Channels of the network.
        heads: Attention heads of a transformer, by which width must be divisible.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        size: Size of the training images in pixels, one number or (height, width); None takes the VQ model's
            own.
    """

    vae: str | os.PathLike[str] | None = None
    caption_column: str | None = None
    default_caption: str = ""
    kind: str = "transformer"
    conditioned_on: str | None = None
    condition_column: str | None = None
    conditioning_data: str | os.PathLike[str] | None = None
    condition_dropout: float = 0.1
    level: str | None = None
    layers: int = 8
    width: int = 256
    heads: int = 8
    learning_rate: float = 3e-4

    # Paths; fingerprints cover the contents.
    may_change = StageSettings.may_change | {"vae", "conditioning_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import number, one_of, path_or_name, whole_number

        for name in ("vae", "condition_column", "conditioning_data"):
            if (value := getattr(self, name)) is not None:
                path_or_name(name, value)
        one_of("kind", self.kind, PRIORS)
        if self.conditioned_on is not None:
            one_of("conditioned_on", self.conditioned_on, PRIOR_CONDITIONS)
        if self.level is not None:
            one_of("level", self.level, LEVELS)
        self._keep("condition_dropout", number("condition_dropout", self.condition_dropout, 0, 1))
        for name, most in (("layers", 1000), ("width", 16384), ("heads", 1024)):
            self._keep(name, whole_number(name, getattr(self, name), 1, most))
        self._check_together()

    def _check_together(self) -> None:
        """Raise ArgumentError for settings that contradict each other."""
        if self.init is not None:
            raise ArgumentError("init has no meaning for a prior, whose shape is layers and width; leave it out.")
        if self.kind == "pixelcnn" and self.conditioned_on == "text":
            raise ArgumentError("a pixelcnn is conditioned on a class or a map; for text take kind transformer.")
        if self.kind == "pixelcnn" and self.gradient_checkpointing:
            raise ArgumentError("gradient_checkpointing is for a transformer; leave it out, or take fewer layers.")
        if self.kind == "transformer" and self.width % self.heads:
            raise ArgumentError(f"width {self.width} is not divisible by {self.heads} heads; change one of the two.")
        places = [name for name in ("condition_column", "conditioning_data") if getattr(self, name) is not None]
        if places and self.conditioned_on != "map":
            raise ArgumentError(f"{places[0]} belongs to maps; give conditioned_on map, or leave it out.")
        if len(places) == 2:
            raise ArgumentError("condition_column and conditioning_data both name the maps; leave one of them out.")
        if self.conditioning_data is not None:
            self._keep_apart("conditioning_data", self.conditioning_data)
        if self.level == "bottom" and self.conditioned_on is not None:
            raise ArgumentError("the bottom level is conditioned on the top codes; leave conditioned_on out.")
        if self.level is not None and (self.conditioned_on == "map" or self.evaluate):
            given = "evaluate" if self.evaluate else "conditioned_on map"
            raise ArgumentError(f"{given} is for a VQ model of one level; leave it out, or leave level out.")
        if self.level is not None and self.vae is None:
            raise ArgumentError("level belongs to a VQ-VAE-2; name its folder as vae, or leave level out.")
        if any(metric.name == "clip_score" for metric in self.metrics) and self.conditioned_on != "text":
            raise ArgumentError("evaluate clip_score compares drawings with prompts; it needs conditioned_on text.")

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        return super().opened_with() | {"caption_column": self.caption_column, "default_caption": self.default_caption}
