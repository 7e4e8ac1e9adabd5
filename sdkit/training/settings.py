"""The settings of each stage: all that a run depends on, written to its config.json."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.errors import ArgumentError
from sdkit.fields import documented
from sdkit.files import expanded
from sdkit.training import LoopSettings

if TYPE_CHECKING:
    from sdkit.data.transform import Transform

AUGMENTATIONS = ("crop", "flip")
RECONSTRUCTIONS = ("l1", "l2")
REGULARIZERS = ("none", "kl", "vq")
LPIPS = "SDKIT_LPIPS"  # an environment variable


@documented
@dataclass(frozen=True, kw_only=True)
class StageSettings(LoopSettings):
    """What both stages have."""

    model: str | os.PathLike[str] = "emoji"
    """What is fine-tuned: any source that `sdkit.StableDiffusion.from_pretrained` takes."""
    data: str | os.PathLike[str]
    """A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or .parquet files, a data
    set's id on the Hub; for the U-Net also a latent cache, which can stream what does not fit on the disk."""
    split: str = "train"
    """Split of a data set on the Hub."""
    image_column: str | None = None
    """Column of the images in parquet files and data sets of the Hub; None finds it."""
    class_folders: bool = False
    """Read names of folders as sd-scripts does: each image in "10_zork dog" counts ten times, and has the caption
    "zork dog" if it has no other."""
    out_dir: str | os.PathLike[str]
    """The run folder. A run that is there goes on."""
    learning_rate: float = 1e-5
    """Of AdamW, before its schedule."""
    init: str | os.PathLike[str] | None = None
    """A config.json of diffusers, or a folder with one: the network trains from nothing, in this shape."""
    size: int | tuple[int, int] | None = None
    """Of the training images in pixels, one number or (height, width); None takes the model's own."""
    augment: tuple[str, ...] = ()
    """Of crop (at random places, not the centre) and flip (left and right, half of the time)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    may_change = LoopSettings.may_change | {"init"}  # a path; the identity of the model tells what came of it

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, number, one_of, path_or_name, strings
        from sdkit.data.transform import sides

        for name in ("model", "data", "out_dir", *(["init"] if self.init is not None else [])):
            path_or_name(name, getattr(self, name))
        self._keep("out_dir", str(expanded(self.out_dir)))
        self._keep_apart("data", self.data)
        if expanded(self.out_dir).resolve() == expanded(self.model).resolve():
            raise ArgumentError(f"out_dir {str(self.out_dir)!r} is the model's own folder; name another.")
        self._keep("learning_rate", number("learning_rate", self.learning_rate, 0, 1))
        if self.learning_rate == 0:
            raise ArgumentError("learning_rate must be above 0.")
        if self.size is not None:
            self._keep("size", sides(self.size))
        self._keep("augment", tuple(strings("augment", self.augment)) if self.augment else ())
        for name in self.augment:
            one_of("augment", name, AUGMENTATIONS)
        flag("gradient_checkpointing", self.gradient_checkpointing)
        flag("class_folders", self.class_folders)
        for name, value in self.opened_with().items():
            if value is not None and not isinstance(value, (str, bool)):
                raise ArgumentError(f"{name} must be text, not {value!r}.")

    def opened_with(self) -> dict[str, Any]:
        """Parameters of `open_examples` for `data`."""
        names = ("split", "image_column", "class_folders")
        return {name: getattr(self, name) for name in names}

    def _keep_apart(self, name: str, data: str | os.PathLike[str]) -> None:
        """Else a run that is taken up again would learn from the pictures of its own samples/."""
        inner, outer = (expanded(path).resolve() for path in (self.out_dir, data))
        if os.path.isdir(outer) and inner.is_relative_to(outer):  # noqa: PTH112 - pathlib's raises for overlong names
            raise ArgumentError(
                f"out_dir {str(self.out_dir)!r} lies in {name} {os.fspath(data)!r}, of which its pictures would become "
                "a part; name another."
            )

    def transform(self, size: tuple[int, int]) -> Transform:
        """What happens to a training image."""
        from sdkit.data.transform import Transform

        crop = "random" if "crop" in self.augment else "center"
        return Transform(size=size, crop=crop, flip="flip" in self.augment)

    @property
    def samples(self) -> Path:
        """Where images that show progress go."""
        return Path(self.out_dir) / "samples"


@documented
@dataclass(frozen=True, kw_only=True)
class VAEConfig(StageSettings):
    """Settings of `train_vae`: the loss is reconstruction + lpips_weight * LPIPS + kl_weight * KL + disc_weight *
    adversarial, or the codebook's loss in place of the KL."""

    train_encoder: bool = False
    """Also what makes the latents, which U-Nets and caches made for this VAE may not survive."""
    reconstruction: str = "l2"
    """l1 (as in latent diffusion) or l2 (as in Stability's ft-mse)."""
    lpips_weight: float = 0.1
    """Without LPIPS reconstructions are blurred."""
    lpips: str | os.PathLike[str] | None = None
    """Its weights, as `sdkit.networks.lpips.LPIPS.from_pretrained` takes them; None is what SDKIT_LPIPS names."""
    regularizer: str = "kl"
    """What keeps latents in order: kl, vq (of a VQModel, and of no other) or none, an autoencoder without noise."""
    kl_weight: float = 1e-6
    """Beside a reconstruction loss summed over pixels, as in latent diffusion; counts where the encoder trains."""
    disc_weight: float = 0.0
    """Of the PatchGAN discriminator, times VQGAN's adaptive weight (of each micro-batch); 0 has none, latent diffusion
    0.5."""
    disc_start: int = 0
    """The optimizer step from which the discriminator plays."""
    validation_data: str | os.PathLike[str] | None = None
    """Held-out images (the first 64 count); None holds out a twentieth of the data, at most 16."""

    may_change = StageSettings.may_change | {"lpips", "validation_data"}  # paths, too

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, number, one_of, path_or_name, whole_number

        if self.lpips is None and os.environ.get(LPIPS):
            self._keep("lpips", os.environ[LPIPS])  # which the run then depends on
        for name in ("lpips", "validation_data"):
            if (value := getattr(self, name)) is not None:
                path_or_name(name, value)
        if self.validation_data is not None:
            self._keep_apart("validation_data", self.validation_data)
        flag("train_encoder", self.train_encoder)
        one_of("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        one_of("regularizer", self.regularizer, REGULARIZERS)
        for name in ("lpips_weight", "kl_weight", "disc_weight"):
            self._keep(name, number(name, getattr(self, name), 0))
        self._keep("disc_start", whole_number("disc_start", self.disc_start, 0))
        if self.disc_start and not self.disc_weight:
            raise ArgumentError("disc_start belongs to a discriminator, and there is none; give disc_weight, too.")


@documented
@dataclass(frozen=True, kw_only=True)
class UNetConfig(StageSettings):
    """Settings of `train_unet`. `data` may be a latent cache, too, from which nothing frozen is computed again."""

    vae: str | os.PathLike[str] | None = None
    """A VAE in place of the model's own, for whose latents the U-Net is trained and with which it is exported: a
    folder, a Hub id, or a single file; None takes the model's own."""
    caption_column: str | None = None
    """Column of the captions in parquet files and data sets of the Hub, or key in metadata; None finds it."""
    default_caption: str = ""
    """Caption of the images that have none."""
    lora_rank: int | None = None
    """Train low-rank updates of the attention's projections, of this rank; None trains the whole network."""
    train_text_encoder: bool = False
    """Together with the U-Net."""
    prediction_type: str | None = None
    """What the network learns to predict: epsilon, v_prediction or sample (x0); None is the model's own."""
    zero_snr: bool | None = None
    """Shift the noise schedule so that its last step is pure noise (Lin et al. 2023); None is as the model's is."""
    snr_gamma: float | None = None
    """Min-SNR weights of the loss (Hang et al. 2023), whose gamma is 5; None weighs all timesteps alike. At zero
    terminal SNR the noisiest steps keep their weight (see `min_snr_weight`)."""
    noise_offset: float = 0.0
    """Of each channel's mean noise, for darker and brighter images: about 0.1."""
    caption_dropout: float = 0.1
    """Share of the samples whose caption is left out, which classifier-free guidance needs."""
    validation_prompts: tuple[str, ...] = ()
    """Images of them are made at each validation, always from the same seeds."""

    may_change = StageSettings.may_change | {"vae"}  # a path, too

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import PREDICTIONS, flag, number, one_of, path_or_name, strings, whole_number

        if self.vae is not None:
            path_or_name("vae", self.vae)
        flag("train_text_encoder", self.train_text_encoder)
        if self.zero_snr is not None:
            flag("zero_snr", self.zero_snr)
        if self.lora_rank is not None:
            self._keep("lora_rank", whole_number("lora_rank", self.lora_rank, 1))
            if self.init is not None:
                raise ArgumentError("a network made from init= has nothing for LoRA to add to; leave one of them out.")
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
        """Parameters of `open_examples` for `data`."""
        return super().opened_with() | {"caption_column": self.caption_column, "default_caption": self.default_caption}
