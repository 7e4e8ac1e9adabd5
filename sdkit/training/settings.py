"""Settings of each stage: everything that a run depends on, saved in its config.json.

Importing this module does not load PyTorch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sdkit.errors import ArgumentError
from sdkit.fields import with_inherited_fields
from sdkit.files import expanded

# Names in diffusers.optimization.get_scheduler, except piecewise_constant, which needs rules in a syntax of its own.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

AUGMENTATIONS = ("crop", "flip")
CONDITION_KINDS = ("latents", "map")  # names in sdkit.loading.configs.CONDITIONS
LOSSES = ("simple", "hybrid", "vlb")
TIMESTEPS = ("uniform", "importance")
NOISE_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}  # ours: diffusers'
CONDITIONS = ("canny", "grey", "outlines", "colour_blocks")  # names in sdkit.images.conditions.CONDITIONS
PRIORS = ("transformer", "pixelcnn")  # names in sdkit.networks.prior_shape.KINDS
PRIOR_CONDITIONS = ("text", "class", "map")  # names in sdkit.networks.prior_shape.CONDITIONS
LEVELS = ("top", "bottom")  # of a VQ-VAE-2
TEMPLATES = ("object", "style")  # names in sdkit.training.stages.embedding.TEMPLATES
RECONSTRUCTIONS = ("l1", "l2")
REGULARIZERS = ("none", "kl", "vq")
LPIPS_VARIABLE = "SDKIT_LPIPS"  # environment variable that names the weights of LPIPS
METRICS = ("lpips", "frechet", "kid", "clip_score")  # of pictures, at validation


class Metric(NamedTuple):
    """A metric of pictures, as `evaluate` names it.

    Attributes:
        name: "lpips", "frechet", "kid", or "clip_score".
        extractor: Feature extractor, as `sdkit.evaluation.open_extractor` takes it; empty for "lpips".
        key: Name of the metric in metrics.jsonl.
    """

    name: str
    extractor: str
    key: str

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Read "METRIC" or "METRIC:EXTRACTOR", such as "kid:dinov2:facebook/dinov2-base"; for "clip_score", a CLIP.

        Raises:
            ArgumentError: There is no such metric or extractor.
        """
        from sdkit.arguments import one_of
        from sdkit.evaluation.extractors import NAMES

        name, _, extractor = text.partition(":")
        one_of("evaluate", name, METRICS)
        if name == "lpips":
            if extractor:
                raise ArgumentError(f"evaluate {text!r}: lpips takes no extractor; leave it out.")
            return cls(name, "", name)
        if name == "clip_score":
            return cls(name, f"clip:{extractor}" if extractor else "clip", name)
        kind = extractor.partition(":")[0]
        if extractor:
            one_of(f"evaluate {name}: the extractor", kind, NAMES)
        return cls(name, extractor or "alex", f"{name}_{kind}" if extractor else name)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the training loop. The settings of each stage are a subclass.

    Attributes:
        max_steps: Total number of optimizer steps.
        batch_size: Samples per process and micro-batch.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        mixed_precision: Autocast to "bf16" or "fp16"; "no" is float32. Trained weights are always float32.
        seed: Random seed.
        lr_scheduler: Learning-rate schedule: constant, constant_with_warmup, linear, cosine,
            cosine_with_restarts, or polynomial.
        lr_warmup_steps: Optimizer steps in which the learning rate rises from 0, for schedules with a
            warmup.
        max_grad_norm: Largest gradient norm; gradients above it are clipped. None turns clipping off.
        optimizer: adamw, or muon: Muon for the matrices of hidden layers (Jordan et al. 2024), and AdamW for
            all other parameters, at the same learning rate.
        use_8bit_adam: Use AdamW of bitsandbytes, with its state in 8 bits.
        ema_decay: Decay of the moving average of the weights, which is validated and exported; 0 turns it
            off.
        save_every: Save a checkpoint every N steps.
        keep_checkpoints: Keep the last N checkpoints.
        validate_every: Validate every N steps, and before the first step and after the last.
        report_to: Trackers that metrics are also sent to, such as tensorboard and wandb.
    """

    max_steps: int = 1000
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    seed: int = 0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    ema_decay: float = 0.9999
    save_every: int = 100
    keep_checkpoints: int = 2
    validate_every: int = 100
    report_to: tuple[str, ...] = ()

    # Settings that may change when a run is resumed. batch_size and gradient_accumulation_steps may change only if a
    # step still takes the same number of samples.
    may_change: ClassVar[frozenset[str]] = frozenset({
        *("batch_size", "data", "gradient_accumulation_steps", "keep_checkpoints", "max_steps", "model", "out_dir"),
        *("report_to", "save_every", "validate_every"),
    })  # fmt: skip

    def __init_subclass__(cls) -> None:
        cls.__doc__ = with_inherited_fields(cls)

    def __post_init__(self) -> None:
        from sdkit.arguments import flag, number, one_of, strings, whole_number  # imported late: it loads PyTorch

        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_every", "keep_checkpoints"):
            self._keep(name, whole_number(name, getattr(self, name), 1))
        self._keep("validate_every", whole_number("validate_every", self.validate_every, 1))
        self._keep("lr_warmup_steps", whole_number("lr_warmup_steps", self.lr_warmup_steps, 0))
        self._keep("seed", whole_number("seed", self.seed, 0, 2**31 - 1))
        self._keep("ema_decay", number("ema_decay", self.ema_decay, 0, 1))
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ArgumentError("lr_scheduler constant has no lr_warmup_steps; take constant_with_warmup.")
        if self.max_grad_norm is not None:
            self._keep("max_grad_norm", number("max_grad_norm", self.max_grad_norm, 1e-9))
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        one_of("optimizer", self.optimizer, ("adamw", "muon"))
        if flag("use_8bit_adam", self.use_8bit_adam) and self.optimizer == "muon":
            raise ArgumentError("use_8bit_adam belongs to the optimizer adamw; leave it off.")
        self._keep("report_to", tuple(strings("report_to", self.report_to)) if self.report_to else ())

    def _keep(self, name: str, value: object) -> None:
        """Set a field to its checked value. A NumPy number becomes a Python number, which JSON can store."""
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class StageSettings(LoopSettings):
    """Settings that all stages share.

    Attributes:
        model: Model to fine-tune: a Hub id, a diffusers folder, a single file, or "emoji", the embedded model.
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, or a data set's id on the Hub; for the U-Net also a latent cache.
        split: Split of a data set on the Hub.
        image_column: Column of the images in parquet files and data sets of the Hub; None detects it.
        class_folders: Read names of folders as sd-scripts does: each image in "10_zork dog" counts ten
            times, and has the caption "zork dog" if it has no other. Where no folder is named so, the caption
            is the folder's name: its class.
        out_dir: Run folder. An existing run is resumed.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        init: A config.json of diffusers, or a folder with one: train a network of this shape from scratch.
        size: Size of the training images in pixels, one number or (height, width); None takes the model's
            own.
        augment: Augmentations: crop (at a random place instead of the centre) and flip (mirror half of the
            images).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more
            time.
        evaluate: Metrics of pictures at each validation: lpips, frechet, kid, and, for a U-Net, clip_score.
            A VAE's reconstructions, or a U-Net's drawings of captions, are compared with the held-out images.
            Another extractor than alex may follow, as in frechet:inception or kid:dinov2. Distances of so few
            images can be compared only with each other.
    """

    model: str | os.PathLike[str] = "emoji"
    data: str | os.PathLike[str]
    split: str = "train"
    image_column: str | None = None
    class_folders: bool = False
    out_dir: str | os.PathLike[str]
    learning_rate: float = 1e-5
    init: str | os.PathLike[str] | None = None
    size: int | tuple[int, int] | None = None
    augment: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    evaluate: tuple[str, ...] = ()

    # "init" is a path. The fingerprint of the model changes with the contents of the file.
    may_change = LoopSettings.may_change | {"evaluate", "init"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, number, one_of, path_or_name, strings
        from sdkit.data.transform import sides

        for name in ("model", "out_dir", *self._data_fields, *(["init"] if self.init is not None else [])):
            path_or_name(name, getattr(self, name))
        self._keep("out_dir", str(expanded(self.out_dir)))
        for name in self._data_fields:
            self._keep_apart(name, getattr(self, name))
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
        self._keep("evaluate", tuple(strings("evaluate", self.evaluate)) if self.evaluate else ())
        keys = [metric.key for metric in self.metrics]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise ArgumentError(f"evaluate names {repeated} twice; leave one of them out.")
        flag("gradient_checkpointing", self.gradient_checkpointing)
        flag("class_folders", self.class_folders)
        for name, value in self.opened_with().items():
            if value is not None and not isinstance(value, (str, bool)):
                raise ArgumentError(f"{name} must be text, not {value!r}.")

    @property
    def _data_fields(self) -> tuple[str, ...]:
        """Names of the fields that hold the data to train on."""
        return ("data",)

    @property
    def sources(self) -> list[str | os.PathLike[str]]:
        """Data sets to train on."""
        return [getattr(self, name) for name in self._data_fields]

    @property
    def metrics(self) -> list[Metric]:
        """Metrics that `evaluate` names."""
        return [Metric.parse(text) for text in self.evaluate]

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        names = ("split", "image_column", "class_folders")
        return {name: getattr(self, name) for name in names}

    def _keep_apart(self, name: str, data: str | os.PathLike[str]) -> None:
        """Raise ArgumentError for an out_dir inside the data, because a resumed run would train on its own samples/."""
        inner, outer = (expanded(path).resolve() for path in (self.out_dir, data))
        if os.path.isdir(outer) and inner.is_relative_to(outer):  # noqa: PTH112 - pathlib's raises for overlong names
            raise ArgumentError(
                f"out_dir {str(self.out_dir)!r} lies in {name} {os.fspath(data)!r}, and its pictures would be trained "
                "on; name another."
            )

    @property
    def samples(self) -> Path:
        """Folder of the images that validation saves."""
        return Path(self.out_dir) / "samples"


@dataclass(frozen=True, kw_only=True)
class VAEConfig(StageSettings):
    """Settings of `train_vae`.

    The loss is reconstruction + lpips_weight * LPIPS + kl_weight * KL + disc_weight * adversarial. A VQModel has the
    codebook loss in place of kl_weight * KL.

    Attributes:
        train_encoder: Train the encoder too. It changes the latents, so U-Nets and caches made for this VAE
            may no longer fit.
        reconstruction: Reconstruction loss: l1 (as in latent diffusion) or l2 (as in Stability's ft-mse).
        lpips_weight: Weight of the perceptual loss LPIPS; without it, reconstructions are blurred.
        lpips: Network of LPIPS: alex, which ships with sdkit, or VGG, recommended where its weights are at
            hand: a file, a folder, or a Hub id of them, or vgg, if the variable SDKIT_LPIPS names them. None
            is what SDKIT_LPIPS names, or else alex.
        regularizer: Regularizer of the latents: kl, vq (for a VQModel only), or none (an autoencoder
            without noise).
        codebook_decay: Decay of the moving averages that the codes of a VQModel follow (VQ-VAE, appendix A.1),
            with a k-means start and restarts of dead codes; 0 trains the codes by gradient alone.
        normalize_codes: Codes of length 1, compared with latents by their angle (ViT-VQGAN).
        kl_weight: Weight of the KL next to a loss summed over pixels, as in latent diffusion; ignored if
            the encoder is frozen.
        disc_weight: Weight of the adversarial loss of a PatchGAN discriminator, multiplied by VQGAN's
            adaptive weight; 0 turns it off, latent diffusion uses 0.5.
        disc_start: Optimizer step from which the discriminator is used.
        input_noise: Standard deviation of Gaussian noise on the input, whose pixels are in [-1, 1]. The target is the
            clean image: a denoising autoencoder (Vincent et al. 2008). 0 adds none.
        mask_ratio: Share of the input's square patches that are masked with grey; the target is the whole image.
        mask_patch: Side of a masked patch in pixels.
        validation_data: Held-out images (the first 64 are used); None holds out a twentieth of the data, at
            most 16.
    """

    train_encoder: bool = False
    reconstruction: str = "l2"
    lpips_weight: float = 0.1
    lpips: str | os.PathLike[str] | None = None
    regularizer: str = "kl"
    codebook_decay: float = 0.99
    normalize_codes: bool = False
    kl_weight: float = 1e-6
    disc_weight: float = 0.0
    disc_start: int = 0
    input_noise: float = 0.0
    mask_ratio: float = 0.0
    mask_patch: int = 8
    validation_data: str | os.PathLike[str] | None = None

    may_change = StageSettings.may_change | {"lpips", "validation_data"}  # paths; fingerprints cover the contents

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, number, one_of, path_or_name, whole_number

        if self.lpips is None:  # saved with the settings, because the run depends on it
            self._keep("lpips", os.environ.get(LPIPS_VARIABLE) or "alex")
        if any(metric.name == "clip_score" for metric in self.metrics):
            raise ArgumentError("evaluate clip_score compares drawings with prompts, and a VAE has none; leave it out.")
        path_or_name("lpips", self.lpips)
        if self.validation_data is not None:
            path_or_name("validation_data", self.validation_data)
            self._keep_apart("validation_data", self.validation_data)
        flag("train_encoder", self.train_encoder)
        one_of("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        one_of("regularizer", self.regularizer, REGULARIZERS)
        self._keep("codebook_decay", number("codebook_decay", self.codebook_decay, 0, 0.9999))
        flag("normalize_codes", self.normalize_codes)
        if self.normalize_codes and not (self.regularizer == "vq" and (self.train_encoder or self.init is not None)):
            raise ArgumentError(
                "normalize_codes changes the codes of a VQModel; it needs regularizer vq, and train_encoder or init."
            )
        for name in ("lpips_weight", "kl_weight", "disc_weight"):
            self._keep(name, number(name, getattr(self, name), 0))
        self._keep("disc_start", whole_number("disc_start", self.disc_start, 0))
        if self.disc_start and not self.disc_weight:
            raise ArgumentError("disc_start belongs to a discriminator, and there is none; give disc_weight, too.")
        self._keep("input_noise", number("input_noise", self.input_noise, 0))
        self._keep("mask_ratio", number("mask_ratio", self.mask_ratio, 0, 0.99))
        self._keep("mask_patch", whole_number("mask_patch", self.mask_patch, 1))
        if self.mask_patch != type(self).mask_patch and not self.mask_ratio:
            raise ArgumentError("mask_patch is the size of masked patches, and none are masked; give mask_ratio, too.")


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


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings(DenoisingSettings):
    """Settings of DreamBooth (Ruiz et al. 2023, https://arxiv.org/abs/2208.12242), which teaches a model one object.

    Attributes:
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, a data set's id on the Hub, or a latent cache. Left out if instance_data is given.
        instance_data: Images of one object to learn (DreamBooth), about five, in place of data.
        instance_prompt: Caption of all these images: the object's class with a rare word, such as "a sks dog".
            None reads captions as data does. Neither it nor class_prompt is ever dropped.
        class_data: Images of the object's class, on which the model is to stay as it is. None lets the model
            draw them.
        class_prompt: Caption of all class images, such as "a dog". None trains without them, and the model
            forgets the class.
        class_count: Number of class images. The model draws those that class_data lacks, once, into the run
            folder. None is 100 without class_data, and with it the images that it holds.
        prior_weight: Weight of the class images' loss, beside 1 for the object's.
    """

    data: str | os.PathLike[str] = ""
    instance_data: str | os.PathLike[str] | None = None
    instance_prompt: str | None = None
    class_data: str | os.PathLike[str] | None = None
    class_prompt: str | None = None
    class_count: int | None = None
    prior_weight: float = 1.0

    may_change = DenoisingSettings.may_change | {"instance_data", "class_data"}  # paths; a fingerprint covers both

    def __post_init__(self) -> None:
        if self.instance_data is None and self.data == "":
            raise ArgumentError("data must be given (--data), or instance_data (--instance-data), to train on.")
        super().__post_init__()
        from sdkit.arguments import number, whole_number

        self._keep("prior_weight", number("prior_weight", self.prior_weight, 0))
        if self.class_count is not None:
            self._keep("class_count", whole_number("class_count", self.class_count, 1))
        for name in ("instance_prompt", "class_prompt"):
            self._check_prompt(name)
        self._check_instances()
        self._check_class()

    @property
    def _data_fields(self) -> tuple[str, ...]:
        if self.instance_data is None:
            return ("data",)
        return ("instance_data",) if self.class_data is None else ("instance_data", "class_data")

    def _check_prompt(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, str) or not value.strip():
            raise ArgumentError(f"{name} must be a text of at least one word, not {value!r}.")
        self._keep(name, value.strip())

    def _check_instances(self) -> None:
        """Check the settings of the object's images with each other."""
        if self.instance_data is None:
            for name in ("instance_prompt", "class_data", "class_prompt", "class_count"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name} belongs to DreamBooth; give instance_data, or leave it out.")
        elif self.data != "":
            raise ArgumentError("data and instance_data are two ways to say what to train on; leave one of them out.")
        named = [name for name in ("caption_column", "default_caption") if getattr(self, name)]
        if self.instance_prompt is not None and named:
            raise ArgumentError(f"instance_prompt is the caption of all images; leave {named[0]} out.")

    def _check_class(self) -> None:
        """Check the settings of the class images with each other."""
        if self.class_prompt is None:
            for name in ("class_data", "class_count"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name} needs class_prompt, the caption of the class images; give it, too.")
            if self.prior_weight != 1:
                raise ArgumentError("prior_weight belongs to class images; give class_prompt, or leave it out.")
            return
        if self.prior_weight == 0:
            raise ArgumentError("at prior_weight 0 the class images serve for nothing; leave class_prompt out.")
        if self.class_prompt == self.instance_prompt:
            raise ArgumentError(
                f"instance_prompt and class_prompt are both {self.class_prompt!r}, and the class would become the "
                "object; give instance_prompt a rare word more."
            )
        if self.init is not None:
            raise ArgumentError("a network made from init= knows no class to preserve; leave class_prompt out.")
        if self.class_data is not None and self.instance_data is not None:
            one, other = (expanded(path).resolve() for path in (self.instance_data, self.class_data))
            if one == other:
                raise ArgumentError("instance_data and class_data are the same; name images of the whole class.")


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
        timestep_sampling: uniform, or importance: in proportion to the root mean square of the last ten losses
            at each timestep, for the losses hybrid and vlb.
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
        one_of("timestep_sampling", self.timestep_sampling, TIMESTEPS)
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
        if self.loss == "simple" and self.timestep_sampling != "uniform":
            raise ArgumentError("timestep_sampling importance belongs to the losses hybrid and vlb; give one of them.")
        if self.loss == "vlb" and self.snr_gamma is not None:
            raise ArgumentError("snr_gamma weights the simple loss, and vlb has none; leave it out.")
        if self.loss != "simple" and self.instance_data is not None:
            raise ArgumentError("DreamBooth trains by the loss simple; leave loss out.")
        if self.loss != "simple" and self.noise_offset:
            raise ArgumentError(
                "noise_offset draws other noise than the variational bound is of; leave one of them out."
            )

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


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(DenoisingSettings):
    """Settings of `train_controlnet`. The model is frozen; the data need a condition for each image.

    Attributes:
        controlnet: ControlNet to train further: a folder, a Hub id, or a single file. None begins with a copy
            of the U-Net's encoder.
        condition: Make the conditions of the images: canny (edges), grey, outlines (of a mask or a semantic
            map), or colour_blocks. None reads them.
        conditioning_data: Data set of the conditions, images of the same names as those in data; with condition,
            of the images that they are made of, which a latent cache does not hold. None reads the conditions
            from a column of data.
        conditioning_image_column: Column of the conditions in parquet files and data sets of the Hub; beside a
            latent cache, a column of conditioning_data.
        caption_dropout: Share of samples trained with an empty caption, so that the ControlNet learns to read
            the condition alone (Zhang et al. 2023, section 3.4).
        validation_prompts: Prompts of images generated at each validation, always from the same seeds, with
            the conditions of the first held-out images.
    """

    controlnet: str | os.PathLike[str] | None = None
    condition: str | None = None
    conditioning_data: str | os.PathLike[str] | None = None
    conditioning_image_column: str = "conditioning_image"
    caption_dropout: float = 0.5

    # Paths; fingerprints cover the contents.
    may_change = DenoisingSettings.may_change | {"controlnet", "conditioning_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import one_of, path_or_name

        if self.init is not None:
            raise ArgumentError(
                "init has no meaning for a ControlNet, which begins as a copy of the U-Net; leave it out."
            )
        for name in ("controlnet", "conditioning_data"):
            if (value := getattr(self, name)) is not None:
                path_or_name(name, value)
        if self.conditioning_data is not None:
            self._keep_apart("conditioning_data", self.conditioning_data)
        path_or_name("conditioning_image_column", self.conditioning_image_column)
        if self.condition is not None:
            one_of("condition", self.condition, CONDITIONS)
        named = self.conditioning_image_column != type(self).conditioning_image_column
        if named and self.condition is not None and self.conditioning_data is None:
            raise ArgumentError(
                "conditioning_image_column names conditions that are there, and condition makes them of the images; "
                "leave one of them out."
            )


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(DenoisingSettings):
    """Settings of `train_embedding`. All networks are frozen; `data` may also be a latent cache.

    Attributes:
        token: New token to learn, which no word of the vocabulary is, such as "<zork>". Prompts name it so.
        init_token: Word of the vocabulary from whose vector learning starts, such as "cat".
        vectors: Vectors of the token. More vectors show more detail, and take more of a prompt's 75 tokens.
        template: Captions of images whose own caption does not name the token: photos of an object, or
            paintings in a style (Gal et al. 2022).
        keep_norm: Scale the vectors to the mean length of the vocabulary's after each step, so that the other
            words of a prompt keep their weight.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
        ema_decay: Decay of the moving average of the vectors, which is validated and exported; 0 turns it off.
        caption_dropout: Share of samples trained with an empty caption, from which a token learns nothing.
    """

    token: str
    init_token: str
    vectors: int = 1
    template: str = "object"
    keep_norm: bool = False
    learning_rate: float = 5e-3
    ema_decay: float = 0.0
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, one_of, whole_number
        from sdkit.loading.embedding_file import check_token

        check_token(self.token)
        if not isinstance(self.init_token, str) or not self.init_token:
            raise ArgumentError(f"init_token must be a word, not {self.init_token!r}.")
        self._keep("vectors", whole_number("vectors", self.vectors, 1))
        one_of("template", self.template, TEMPLATES)
        flag("keep_norm", self.keep_norm)
        if self.init is not None:
            raise ArgumentError("init has no meaning for an embedding, which is learned for a model; leave it out.")


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


@dataclass(frozen=True, kw_only=True)
class ClipConfig(StageSettings):
    """Settings of `train_clip`. Each image is contrasted with the captions of the others of its micro-batch.

    Attributes:
        model: CLIP to fine-tune: a folder or a Hub id in transformers' layout, or the result of an earlier run.
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, or a data set's id on the Hub. Images without a caption are left out.
        init: A config.json of transformers' CLIPModel, or a folder with one: train a CLIP of this shape from scratch.
        tokenizer: Tokenizer of a CLIP trained from scratch: a folder or a Hub id. None learns one from the captions,
            with as many tokens as the config's vocab_size.
        caption_column: Column of the captions in parquet files and data sets of the Hub, or key in
            metadata; None detects it.
        batch_size: Pairs per process and micro-batch. The contrast is over batch_size x processes pairs, which stay
            the same when a run is resumed. More of them teach more; gradient accumulation does not add to them: it
            averages the losses of separate contrasts.
        validation_data: Held-out pairs (the first 1000 are used); None holds out a twentieth of the data, at
            most 16.
    """

    model: str | os.PathLike[str] = "openai/clip-vit-base-patch32"
    tokenizer: str | os.PathLike[str] | None = None
    caption_column: str | None = None
    batch_size: int = 64
    validation_data: str | os.PathLike[str] | None = None

    # Paths; fingerprints cover the contents.
    may_change = StageSettings.may_change | {"tokenizer", "validation_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import path_or_name

        if self.size is not None:
            raise ArgumentError("size has no meaning for a CLIP, whose config names the size of its images.")
        if self.evaluate:
            raise ArgumentError("evaluate measures pictures, and a CLIP makes none; leave it out.")
        if self.tokenizer is not None:
            path_or_name("tokenizer", self.tokenizer)
            if self.init is None:
                raise ArgumentError("tokenizer belongs to a CLIP trained from scratch; give init, or leave it out.")
        if self.validation_data is not None:
            path_or_name("validation_data", self.validation_data)
            self._keep_apart("validation_data", self.validation_data)

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        return super().opened_with() | {"caption_column": self.caption_column}


@dataclass(frozen=True, kw_only=True)
class ImagePriorConfig(StageSettings):
    """Settings of `train_image_prior`. All images are embedded once, before the first step.

    Attributes:
        model: CLIP whose embeddings the prior learns: a folder or a Hub id in transformers' layout, or the result of
            `train_clip`.
        data: A folder of images with captions (in NAME.txt beside each, or a metadata.jsonl), .tar or
            .parquet files, or a data set's id on the Hub. Images without a caption are left out.
        prior: Prior to train further: a folder or a Hub id in the layout of StableUnCLIPPipeline, or the result of
            an earlier run.
        init: A config.json of diffusers' PriorTransformer, or a folder with one: train from scratch.
        caption_column: Column of the captions in parquet files and data sets of the Hub, or key in
            metadata; None detects it.
        caption_dropout: Share of samples trained with an empty caption, which classifier-free guidance
            needs.
    """

    model: str | os.PathLike[str] = "openai/clip-vit-large-patch14"
    prior: str | os.PathLike[str] | None = None
    caption_column: str | None = None
    caption_dropout: float = 0.1

    may_change = StageSettings.may_change | {"prior"}  # a path; a fingerprint covers the contents

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import number, path_or_name

        if self.size is not None:
            raise ArgumentError("size has no meaning for a prior; the config of its CLIP names the size of its images.")
        if self.augment:
            raise ArgumentError("augment has no meaning for a prior, whose images are embedded once; leave it out.")
        if self.evaluate:
            raise ArgumentError("evaluate measures pictures, and a prior makes none; leave it out.")
        if self.gradient_checkpointing:
            raise ArgumentError("gradient_checkpointing is not offered by diffusers' PriorTransformer; leave it out.")
        if self.prior is not None:
            path_or_name("prior", self.prior)
        if (self.prior is None) == (self.init is None):
            raise ArgumentError("a prior is either trained further or made: give one of prior and init.")
        self._keep("caption_dropout", number("caption_dropout", self.caption_dropout, 0, 1))

    def opened_with(self) -> dict[str, Any]:
        """Return the keyword arguments with which `open_examples` opens `data`."""
        return super().opened_with() | {"caption_column": self.caption_column}


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(StageSettings):
    """Settings of `train_classifier`. `data` may also be a latent cache.

    The default network is ADM's of three levels, of 10 million weights; `init` takes the config of an `EncoderUNet`
    of another shape.

    Attributes:
        model: Model that the classifier is to guide, for its VAE, its noise schedule, and its size: a Hub id, a
            diffusers folder, a single file, or "emoji", the embedded model.
        vae: VAE to use in place of the model's own: a folder, a Hub id, or a single file; "pixels" classifies
            pixels.
        classifier: Classifier to train further: a folder or a Hub id. None trains one from scratch.
        label_column: Column of the classes: a key of metadata.jsonl, a field of .json files in tar shards, or a
            column of parquet files and data sets of the Hub. None takes the names of folders.
        label_data: With a latent cache: the images that it was made of, to read the classes from. None takes
            the names of their folders.
        learning_rate: Learning rate of AdamW, which the schedule multiplies.
    """

    vae: str | os.PathLike[str] | None = None
    classifier: str | os.PathLike[str] | None = None
    label_column: str | None = None
    label_data: str | os.PathLike[str] | None = None
    learning_rate: float = 3e-4

    # Paths; fingerprints cover the contents.
    may_change = StageSettings.may_change | {"vae", "classifier", "label_data"}

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import path_or_name

        for name in ("vae", "classifier", "label_column", "label_data"):
            if (value := getattr(self, name)) is not None:
                path_or_name(name, value)
        if self.classifier is not None and self.init is not None:
            raise ArgumentError("classifier and init both name the network to train; leave one of them out.")
        if self.evaluate:
            raise ArgumentError("evaluate measures pictures, and a classifier makes none; leave it out.")
        if self.label_data is not None:
            self._keep_apart("label_data", self.label_data)


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
