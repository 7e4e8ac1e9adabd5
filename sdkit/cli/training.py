"""The commands around training: check data, cache latents, train, plot a run, and convert a LoRA.

The options of `sdkit train` are the fields of the stage's settings. Their help is read from the settings' docstrings.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sdkit.cli.console import complain, say, say_json, say_path
from sdkit.cli.field_options import FieldOption, field_options
from sdkit.cli.options import (
    CROPS,
    DTYPES,
    PREDICTION_TYPES,
    Add,
    Commands,
    add_command,
    add_command_group,
    batch_size_option,
    choices,
    device_option,
    vae_option,
)
from sdkit.errors import ArgumentError
from sdkit.messages import clean, printable, reason
from sdkit.processes import is_main_process
from sdkit.strict_json import read_object
from sdkit.training.settings import (
    AUGMENTATIONS,
    CONDITION_KINDS,
    CONDITIONS,
    LEVELS,
    LOSSES,
    LR_SCHEDULERS,
    NOISE_SCHEDULES,
    PRIOR_CONDITIONS,
    PRIORS,
    RECONSTRUCTIONS,
    REGULARIZERS,
    TEMPLATES,
    TIMESTEPS,
    ClassifierConfig,
    ClipConfig,
    ControlNetConfig,
    EmbeddingConfig,
    ImagePriorConfig,
    PriorConfig,
    StageSettings,
    UNetConfig,
    VAEConfig,
    VQVAE2Config,
)

if TYPE_CHECKING:
    from sdkit.data import Manifest

Settings = TypeVar("Settings", bound=StageSettings)

STAGE_USAGE = "--data PATH --out-dir PATH [OPTION ...]"
SHORT = {"model": ("-m",), "out_dir": ("-o",)}
SHOWN = 5  # number of skipped images to name; further ones are only counted

# Choices to show in the help. The settings reject other values.
CHOICES = {
    "mixed_precision": ("no", "bf16", "fp16"),
    "lr_scheduler": LR_SCHEDULERS,
    "augment": AUGMENTATIONS,
    "prediction_type": PREDICTION_TYPES,
    "reconstruction": RECONSTRUCTIONS,
    "regularizer": REGULARIZERS,
    "condition": CONDITIONS,
    "template": TEMPLATES,
    "condition_kind": CONDITION_KINDS,
    "kind": PRIORS,
    "conditioned_on": PRIOR_CONDITIONS,
    "level": LEVELS,
    "loss": LOSSES,
    "timestep_sampling": TIMESTEPS,
    "noise_schedule": tuple(NOISE_SCHEDULES),
}

# Title of a group of options in the help -> its fields. Fields that a stage lacks are left out.
GROUPS = {
    "required, here or in the --config file": "data out_dir token init_token",
    "data": "split image_column caption_column default_caption class_folders size augment "
    "condition condition_column conditioning_data conditioning_image_column condition_kind template "
    "label_column label_data",
    "DreamBooth: one object from a few images": "instance_data instance_prompt class_data class_prompt class_count "
    "prior_weight",
    "model": "model vae prior init tokenizer",
    "what is trained": "lora_rank lora_alpha lora_dropout lora_rank_stabilized lora_targets train_text_encoder "
    "classes train_encoder controlnet classifier vectors keep_norm kind conditioned_on level layers width heads "
    "latent_channels codes image_encoder upscale_factor",
    "loss": "loss vlb_weight timestep_sampling logit_mean logit_std noise_schedule prediction_type zero_snr snr_gamma "
    "noise_offset caption_dropout condition_dropout embedding_dropout noise_augmentation "
    "reconstruction lpips_weight lpips regularizer codebook_decay normalize_codes kl_weight disc_weight disc_start "
    "input_noise mask_ratio mask_patch latent_noise",
    "optimisation": "max_steps batch_size gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps "
    "optimizer max_grad_norm ema_decay seed",
    "speed and memory": "mixed_precision gradient_checkpointing use_8bit_adam",
    "validation": "validate_every validation_data validation_prompts evaluate bits_per_dimension",
    "checkpoints and logs": "save_every keep_checkpoints report_to",
}


class StageCommand(NamedTuple):
    """A command of `sdkit train`. `sdkit.training` has its function, train_NAME, with underscores.

    Attributes:
        settings: Class of its settings, whose fields are its options.
        summary: Its description.
        examples: Command lines to show in its help.
        usage: Its options that must be given.
    """

    settings: type[StageSettings]
    summary: str
    examples: tuple[str, ...]
    usage: str = STAGE_USAGE


STAGES = {
    "vae": StageCommand(
        VAEConfig,
        "Fine-tune the VAE: its decoder, or all of it.",
        (
            "sdkit train vae --data photos/ --out-dir runs/vae",
            "sdkit train vae --data photos/ --out-dir runs/vae --disc-weight 0.5",
            "sdkit train vae --data photos/ -o run --train-encoder --input-noise 0.5",
        ),
    ),
    "unet": StageCommand(
        UNetConfig,
        "Fine-tune the U-Net, whole or by LoRA.",
        (
            "sdkit train unet --data photos/ --out-dir runs/zork --lora-rank 8",
            "sdkit train unet --config runs/zork/config.json --max-steps 2000",
            'sdkit train unet --instance-data dog/ --instance-prompt "sks dog" -o runs/dog',
            "sdkit train unet --data edits.parquet --condition-column before -o runs/edit",
            "accelerate launch -m sdkit train unet --data cache/ --out-dir runs/full",
        ),
    ),
    "controlnet": StageCommand(
        ControlNetConfig,
        "Train a ControlNet, for the model to follow edges or other images.",
        (
            "sdkit train controlnet --data photos/ --condition canny --out-dir runs/edges",
            "sdkit train controlnet --data photos/ --conditioning-data maps/ --out-dir run",
        ),
    ),
    "embedding": StageCommand(
        EmbeddingConfig,
        "Learn a new word from a few images (textual inversion).",
        ('sdkit train embedding --token "<zork>" --init-token cat --data five/ -o run',),
        "--token T --init-token T --data PATH -o PATH ...",
    ),
    "prior": StageCommand(
        PriorConfig,
        "Learn the codes of a VQ-VAE or VQGAN, to draw images with them.",
        (
            "sdkit train prior --data photos/ --vae vq/ --conditioned-on text -o run",
            "sdkit train prior --data cache/ --vae vq/ --kind pixelcnn -o run",
            "sdkit train prior --data photos/ --vae runs/two/result --level top -o run",
        ),
    ),
    "clip": StageCommand(
        ClipConfig,
        "Train a CLIP, which embeds images and captions in one space.",
        (
            "sdkit train clip --data photos/ --model openai/clip-vit-base-patch32 -o run",
            "sdkit train clip --data photos/ --init config.json --out-dir runs/clip",
        ),
    ),
    "image-prior": StageCommand(
        ImagePriorConfig,
        "Train the prior of DALL-E 2: from a text to CLIP's embedding of an image.",
        ("sdkit train image-prior --data photos/ --model clip/ --init c.json -o run",),
    ),
    "classifier": StageCommand(
        ClassifierConfig,
        "Train a classifier of noisy images, to guide a model by.",
        (
            "sdkit train classifier --data animals/ --out-dir runs/classifier",
            "sdkit train classifier --data a.parquet --label-column kind -o run",
        ),
    ),
    "vqvae2": StageCommand(
        VQVAE2Config,
        "Train a VQ-VAE-2: two levels of codes, for a prior of each.",
        ("sdkit train vqvae2 --data photos/ --size 64 --out-dir runs/two",),
    ),
}


def add_training_commands(commands: Commands) -> None:
    """Add the commands in the order in which a user needs them."""
    data = add_command_group(commands, "data", "Check a data set.", ("sdkit data check photos/",))
    _add_check(data)
    _add_cache(commands)
    about = (
        "Fine-tune a model, or resume a run.\n\nCtrl-C leaves a checkpoint; the same command resumes the run from it."
    )
    train = add_command_group(
        commands,
        "train",
        about,
        (
            "sdkit train unet --data photos/ --out-dir runs/zork --lora-rank 8",
            "sdkit train vae --data photos/ --out-dir runs/vae",
        ),
    )
    for name, stage in STAGES.items():
        _add_stage(train, name, stage)
    _add_plot(commands)
    _add_convert(commands)


def check(args: argparse.Namespace) -> int:
    """Check a data set before training.

    Reports broken, small, and duplicate images, and captions that are missing
    or too long.
    """
    from sdkit.data import check

    report = check(args.data, model=args.model, size=_size(args.size), **_given_data(args))
    if args.json:
        say_json(report.asdict())
    else:
        for line in str(report).splitlines():
            say(printable(line))
    return 0


def cache(args: argparse.Namespace) -> int:
    """Encode images and captions once, before training the U-Net.

    Training from a cache needs neither the VAE nor the images.
    """
    from sdkit.cli.jobs import check_files
    from sdkit.data import LatentCache, cache

    check_files(args.out)
    if args.seed is not None and args.crop == "center" and not args.flip:
        raise ArgumentError("--seed belongs to random crops and flips, and there are none; leave it out.")
    options = (
        *("crop", "flip", "augmentations", "embeddings", "batch_size", "dtype", "device", "vae"),
        *("condition_column", "conditioning_data", "condition_kind"),
    )
    given = {name: getattr(args, name) for name in options} | {"seed": 0 if args.seed is None else args.seed}
    folder = cache(args.model, args.data, args.out, size=_size(args.size), **given, **_given_data(args))
    if is_main_process():
        _print_cache(folder, LatentCache(folder).manifest)
    return 0  # even if images were skipped, so that scripts continue to training


def _print_cache(folder: Path, made: Manifest) -> None:
    """Print the folder of a cache, its number of images, and the images that were skipped."""
    say_path(folder)
    copies = made.settings.augmentations
    say(f"{made.images} images{f', {copies} times each' if copies > 1 else ''}; {len(made.skipped)} skipped")
    for one in made.skipped[:SHOWN]:
        complain(f"{one.name} is skipped: {one.reason}")
    if len(made.skipped) > SHOWN:
        complain(f"{len(made.skipped) - SHOWN} more are skipped; {folder / 'manifest.json'} names them.")


def _train(name: str, args: argparse.Namespace) -> int:
    from sdkit import training
    from sdkit.cli.jobs import check_files
    from sdkit.data.sources import check_source

    settings = _settings(STAGES[name].settings, args)
    check_files(Path(settings.out_dir))
    for source in settings.sources:
        check_source(source)
    folder = getattr(training, f"train_{name.replace('-', '_')}")(settings)
    if is_main_process():
        say_path(folder / "result")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw a run's losses, validation, and learning rate as a PNG."""
    from sdkit.training.plot import plot

    say_path(plot(args.run, args.out))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Convert a LoRA to the layout of kohya's scripts, which A1111 reads."""
    from sdkit.loading.lora_file import convert_lora

    convert_lora(args.lora, args.out)
    say_path(Path(args.out))
    return 0


def _add_check(commands: Commands) -> None:
    parser = add_command(
        commands,
        check,
        usage="DATA [OPTION ...]",
        examples=("sdkit data check photos/", "sdkit data check photos/ --size 512 --json"),
    )
    _data_options(parser)
    add = parser.add_argument_group("what to check for").add_argument
    model = "Model to be trained, for its image size and tokenizer (default: those of SD 1.x)"
    add("--model", "-m", metavar="SOURCE", help=model)
    _size_option(add)
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="Print the report as JSON")


def _add_cache(commands: Commands) -> None:
    parser = add_command(
        commands,
        cache,
        usage="DATA --out FOLDER [OPTION ...]",
        examples=(
            "sdkit cache photos/ --out cache/ --embeddings",
            "sdkit cache photos/ --out cache/ --crop random --flip --augmentations 4",
        ),
    )
    _data_options(parser)
    add = parser.add_argument_group("conditions that the U-Net is to read").add_argument
    column = "Column of the conditions in .parquet files and on the Hub; the cache then holds them, too"
    add("--condition-column", metavar="NAME", help=column)
    add("--conditioning-data", metavar="DATA", help="Data set of the conditions: images of the same names as in DATA")
    add("--condition-kind", metavar=choices(CONDITION_KINDS), help="What the U-Net reads of them (default: latents)")
    add = parser.add_argument_group("model").add_argument
    sources = 'A Hub id, a diffusers folder, a single file, or "emoji", the embedded model (default: emoji)'
    add("--model", "-m", default="emoji", metavar="SOURCE", help=sources)
    vae_option(add)
    add = parser.add_argument_group("images").add_argument
    _size_option(add)
    add("--crop", default="center", metavar=choices(CROPS), help="Where to crop images to that size (default: center)")
    add("--flip", action="store_true", help="Mirror half of the images left to right")
    add(
        "--augmentations",
        type=int,
        default=1,
        metavar="N",
        help="Copies of each image, each with its own random crop and flip (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="Random seed of crops and flips (default: 0)")
    add = parser.add_argument_group("output").add_argument
    add("--out", "-o", required=True, metavar="FOLDER", help="Folder of the cache. An interrupted cache is resumed")
    add(
        "--embeddings",
        action="store_true",
        help="Also store the captions' embeddings, so that training needs no text encoder",
    )
    add = parser.add_argument_group("speed and memory").add_argument
    batch_size_option(add)
    dtype = "Precision to encode in; the cache keeps its rounding (default: fp32)"
    add("--dtype", default="fp32", metavar=choices(DTYPES), help=dtype)
    device_option(add)


def _size_option(add: Add) -> None:
    size = "Side of the training images, or their height and width (default: the model's own)"
    add("--size", type=int, nargs="+", metavar="PIXELS", help=size)


def _size(numbers: list[int] | None) -> Any:
    """Return the values of --size in the form of the Python API: None, one number, or (height, width)."""
    return numbers[0] if numbers and len(numbers) == 1 else numbers and tuple(numbers)


def _data_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("data", metavar="DATA", help="A folder of images, .tar or .parquet files, or a data set's id on the Hub")
    add("--split", default="train", metavar="NAME", help="Split of a data set on the Hub (default: train)")
    image_column = "Column of the images in .parquet files and on the Hub (default: detected)"
    add("--image-column", metavar="NAME", help=image_column)
    caption_column = "Column of the captions, or their key in metadata (default: detected)"
    add("--caption-column", metavar="NAME", help=caption_column)
    default_caption = "Caption of images without one (default: the empty prompt)"
    add("--default-caption", metavar="TEXT", default="", help=default_caption)
    class_folders = (
        "Repeat each image in a folder such as '10_zork dog' ten times, with 'zork dog' as its default caption"
    )
    add("--class-folders", action="store_true", help=class_folders)
    add("--streaming", action="store_true", help="Read the data while it is downloaded, without a copy on the disk")


def _given_data(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options from `_data_options` as keyword arguments."""
    names = ("split", "image_column", "caption_column", "streaming", "class_folders", "default_caption")
    return {name: getattr(args, name) for name in names}


def _add_plot(commands: Commands) -> None:
    parser = add_command(commands, plot, usage="RUN [--out FILE.png]", examples=("sdkit plot runs/zork",))
    parser.add_argument("run", metavar="RUN", help="Run folder of sdkit train")
    parser.add_argument("--out", "-o", metavar="FILE.png", help="File to write (default: RUN/metrics.png)")


def _add_convert(commands: Commands) -> None:
    parser = add_command(
        commands,
        convert,
        usage="LORA OUT.safetensors",
        examples=("sdkit convert runs/zork/result zork.safetensors",),
    )
    parser.add_argument("lora", metavar="LORA", help="A file, a run's result folder, or a Hub id")
    parser.add_argument("out", metavar="OUT.safetensors", help="File to write")


def _add_stage(commands: Commands, name: str, stage: StageCommand) -> None:
    def run(args: argparse.Namespace) -> int:
        return _train(name, args)

    run.__name__, run.__doc__ = name, stage.summary
    _add_settings(add_command(commands, run, usage=stage.usage, examples=stage.examples), stage.settings)


def _add_settings(parser: argparse.ArgumentParser, stage: type[StageSettings]) -> None:
    """Add the fields of a stage's settings as options, in the groups of `GROUPS`, and the others in a last one."""
    config = "Read settings from a file, such as a run's config.json; options given here override it"
    parser.add_argument("--config", metavar="FILE.json", help=config)
    known = _options(stage)
    groups = {title: names.split() for title, names in GROUPS.items()}
    grouped = {name for names in groups.values() for name in names}
    for title, names in {**groups, "other": [name for name in known if name not in grouped]}.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name in known:
                known[name].add_to(group.add_argument)


def _options(stage: type[StageSettings]) -> dict[str, FieldOption]:
    """Return the options for the fields of a stage's settings."""
    return field_options(stage, SHORT, {name: choices(names) for name, names in CHOICES.items()})


def _settings(stage: type[Settings], args: argparse.Namespace) -> Settings:
    """Return the settings of a run: those in the --config file, overridden by the options that are given."""
    known = _options(stage)
    given = {name: field.value(getattr(args, name)) for name, field in known.items() if name in args}
    values = (_from_file(Path(args.config), stage.__name__, known) if args.config else {}) | given
    if missing := [field.option for field in known.values() if field.default is MISSING and field.name not in values]:
        raise ArgumentError(f"{' and '.join(missing)} must be given, or a --config FILE.json that names them.")
    return stage(**values)


def _from_file(path: Path, stage: str, known: Mapping[str, FieldOption]) -> dict[str, Any]:
    """Read settings from a run's config.json, or from a JSON object of fields."""
    try:
        found = read_object(path)
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {reason(error)}.") from error
    except ValueError as error:
        raise ArgumentError(f"{path} {error}; give a run's config.json, or an object of settings.") from error
    if found.get("stage", stage) != stage:
        other = clean(found["stage"])
        raise ArgumentError(f"{path} holds the settings of another stage, a {other}; give a {stage}'s.")
    values = found.get("settings", found)
    if not isinstance(values, dict):
        raise ArgumentError(f"{path} holds no settings; give a run's config.json, or an object of them.")
    if unknown := [name for name in values if name not in known]:
        raise ArgumentError(f"{path} sets {clean(unknown[0])!r}, which is no setting of this stage; leave it out.")
    return {name: known[name].value(value) for name, value in values.items()}
