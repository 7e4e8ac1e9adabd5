"""The commands around training: look at data, cache latents, train, draw the curves, convert a LoRA.

The options of `sdkit train` are the fields of its settings, and their help is the docstring under each.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_origin, get_type_hints

from sdkit.cli.console import complain, say, say_json, say_path
from sdkit.errors import ArgumentError
from sdkit.fields import field_docs
from sdkit.files import reason
from sdkit.messages import clean, printable
from sdkit.processes import is_main_process
from sdkit.strict_json import read_object

if TYPE_CHECKING:
    from sdkit.data import Manifest
    from sdkit.training.settings import StageSettings

Add: TypeAlias = Callable[..., object]
Commands: TypeAlias = "argparse._SubParsersAction[Any]"
Command: TypeAlias = Callable[[argparse.Namespace], int]

SETTINGS = {"vae": "VAEConfig", "unet": "UNetConfig"}
SHORT = {"model": ("-m",), "out_dir": ("-o",)}
SHOWN = 5
"""Images that could not be used and are named."""


def add_command(commands: Commands, run: Command, add_options: Callable[[Add], None]) -> None:
    """A command with its function's name and docstring."""
    child = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
    child.set_defaults(command=run)
    add_options(child.add_argument)


def add_training_commands(commands: Commands) -> None:
    """In the order in which one needs them."""
    data = _group(commands, "data", "Look at a data set.")
    add_command(data, check, _check_options)
    add_command(commands, cache, _cache_options)
    train = _group(commands, "train", "Fine-tune a model; the same command again goes on with a run that was stopped.")
    _add_stage(train, "vae", "Fine-tune the VAE: its decoder, or all of it.")
    _add_stage(train, "unet", "Fine-tune the U-Net, whole or by LoRA.")
    add_command(commands, plot, _plot_options)
    add_command(commands, convert, _convert_options)


def _group(commands: Commands, name: str, summary: str) -> Commands:
    child = commands.add_parser(name, help=summary, description=summary)
    inside: Commands = child.add_subparsers(required=True, metavar="COMMAND")
    return inside


def check(args: argparse.Namespace) -> int:
    """Look for what training would stumble over: broken, small and equal images, captions that are missing or long."""
    from sdkit.data import check

    report = check(args.data, model=args.model, size=_size(args.size), **_data_options(args))
    if args.json:
        say_json(report.asdict())
    else:
        for line in str(report).splitlines():
            say(printable(line))
    return 0


def cache(args: argparse.Namespace) -> int:
    """Encode images and captions once, so that training the U-Net need not do it in each step."""
    from sdkit.cli.jobs import check_files
    from sdkit.data import LatentCache, cache

    check_files(args.out)
    if args.seed is not None and args.crop == "center" and not args.flip:
        raise ArgumentError("--seed belongs to random crops and flips, and there are none; leave it out.")
    options = ("crop", "flip", "augmentations", "embeddings", "batch_size", "dtype", "device", "vae")
    given = {name: getattr(args, name) for name in options} | {"seed": 0 if args.seed is None else args.seed}
    folder = cache(args.model, args.data, args.out, size=_size(args.size), **given, **_data_options(args))
    if is_main_process():
        _tell_cache(folder, LatentCache(folder).manifest)
    return 0  # a broken image ends no run, and no script that goes on from here


def _tell_cache(folder: Path, made: Manifest) -> None:
    say_path(folder)
    copies = made.settings.augmentations
    say(f"{made.images} images{f', {copies} times each' if copies > 1 else ''}; {len(made.skipped)} skipped")
    for one in made.skipped[:SHOWN]:
        complain(f"{one.name} is skipped: {one.reason}")
    if len(made.skipped) > SHOWN:
        complain(f"{len(made.skipped) - SHOWN} more are skipped; {folder / 'manifest.json'} names them.")


def train(stage: str, args: argparse.Namespace) -> int:
    """Train one of `SETTINGS`."""
    from sdkit import training
    from sdkit.cli.jobs import check_files
    from sdkit.data.examples import check_source

    settings = _settings(getattr(training, SETTINGS[stage]), args)
    check_files(Path(settings.out_dir))
    check_source(settings.data)
    run: Path = getattr(training, f"train_{stage}")(settings)
    if is_main_process():
        say_path(run / "result")
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw a run's losses, validation and learning rate."""
    from sdkit.training.plot import plot

    say_path(plot(args.run, args.out))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Write a LoRA in the layout of kohya's scripts, which A1111 and others read."""
    from sdkit.loading.lora_file import convert_lora

    convert_lora(args.lora, args.out)
    say_path(Path(args.out))
    return 0


def _check_options(add: Add) -> None:
    add("data", metavar="DATA", help="a folder of images, .tar or .parquet files, or a data set's id on the Hub")
    add("--model", "-m", metavar="SOURCE", help="whose size and tokenizer count (default: those of SD 1.x)")
    _size_option(add)
    _source_options(add)
    add("--json", action="store_true", help="print all that is found, as JSON")


def _cache_options(add: Add) -> None:
    add("data", metavar="DATA", help="a folder of images, .tar or .parquet files, or a data set's id on the Hub")
    add("--out", "-o", required=True, metavar="FOLDER", help="for the cache; one that was begun there is finished")
    kinds = "a Hub id, a diffusers folder or a single file (default: emoji, which is embedded)"
    add("--model", "-m", default="emoji", metavar="SOURCE", help=kinds)
    add("--vae", metavar="SOURCE", help="in place of the model's own: a folder, a Hub id, or a single file")
    _size_option(add)
    add("--crop", default="center", metavar="PLACE", help="center or random (default: center)")
    add("--flip", action="store_true", help="mirror left and right, half of the time")
    add("--augmentations", type=int, default=1, metavar="N", help="of each image, cropped and flipped (default: 1)")
    add("--embeddings", action="store_true", help="store what the text encoder makes of the captions, too")
    _source_options(add)
    add("--batch-size", type=int, metavar="N", help="images at a time (default: as many as usually fit)")
    add("--dtype", default="fp32", help="auto, fp32, bf16 or fp16, whose rounding stays in the cache (default: fp32)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--seed", type=int, metavar="N", help="of crops and flips (default: 0)")


def _size_option(add: Add) -> None:
    add("--size", type=int, nargs="+", metavar="PIXELS", help="a side, or height and width (default: the model's own)")


def _size(numbers: list[int] | None) -> Any:
    """As the functions take it: None, one number, or (height, width)."""
    return numbers[0] if numbers and len(numbers) == 1 else numbers and tuple(numbers)


def _source_options(add: Add) -> None:
    add("--split", default="train", help="of a data set on the Hub (default: train)")
    add("--image-column", metavar="NAME", help="of parquet files and data sets of the Hub (default: found)")
    add("--caption-column", metavar="NAME", help="there, or the key in metadata.jsonl or .json (default: found)")
    add("--streaming", action="store_true", help="read it as it comes, without a copy on the disk")
    classes = "folders named like '10_zork dog': each image ten times, by default with the caption 'zork dog'"
    add("--class-folders", action="store_true", help=classes)
    add("--default-caption", metavar="TEXT", default="", help="of images that have none (default: the empty prompt)")


def _data_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("split", "image_column", "caption_column", "streaming", "class_folders", "default_caption")
    return {name: getattr(args, name) for name in names}


def _plot_options(add: Add) -> None:
    add("run", metavar="RUN", help="the folder of a run")
    add("--out", "-o", metavar="FILE.png", help="(default: metrics.png in it)")


def _convert_options(add: Add) -> None:
    add("lora", metavar="LORA", help="a file, a run's result folder or a Hub id")
    add("out", metavar="OUT.safetensors", help="the file to write")


def _add_stage(commands: Commands, stage: str, summary: str) -> None:
    from sdkit.training import settings as config

    child = commands.add_parser(stage, help=summary, description=summary)
    child.usage = f"{child.prog} --data PATH --out-dir PATH [OPTION ...]"
    child.set_defaults(command=partial(train, stage))
    child.add_argument("--config", metavar="FILE.json", help="settings from a file, such as a run's config.json")
    needed = child.add_argument_group("needed, here or in that file")
    settings = child.add_argument_group("settings, which go before those of the file")
    for field in _fields(getattr(config, SETTINGS[stage])).values():
        field.add_to((needed if field.default is MISSING else settings).add_argument)


def _settings(stage: type[StageSettings], args: argparse.Namespace) -> StageSettings:
    """Those of the file of --config, but for options given beside it."""
    known = _fields(stage)
    given = {name: field.value(getattr(args, name)) for name, field in known.items() if name in args}
    values = (_from_file(Path(args.config), stage.__name__, known) if args.config else {}) | given
    if missing := [field.option for field in known.values() if field.default is MISSING and field.name not in values]:
        raise ArgumentError(f"{' and '.join(missing)} must be given, or a --config FILE.json that names them.")
    return stage(**values)


def _from_file(path: Path, stage: str, known: Mapping[str, _Field]) -> dict[str, Any]:
    """Settings out of a run's config.json, or of an object of fields."""
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


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A field of a stage's settings, as an option and as a value in JSON."""

    name: str
    doc: str
    default: Any
    kind: type
    """bool, int, float or str."""
    is_path: bool
    single: bool
    """Whether it can be one value, and ..."""
    several: bool
    """... whether it can be a tuple of such values ..."""
    optional: bool
    """... or None."""

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def add_to(self, add: Add) -> None:
        """Add the option, which sets nothing where it is not given."""
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": self._help()}
        if self.kind is bool:
            add(self.option, action=argparse.BooleanOptionalAction, **options)
            return
        if self.several:
            options["nargs"] = "+"
        metavar = "PATH" if self.is_path else {int: "N", float: "X"}.get(self.kind, "TEXT")
        add(self.option, *SHORT.get(self.name, ()), type=self._parser(), metavar=metavar, **options)

    def _help(self) -> str:
        words = {"None": "none", "True": "yes", "False": "no"}
        default = words.get(str(self.default), self.default)
        shown = "" if self.default in (MISSING, ()) else f" (default: {default})"
        return f"{self.doc.removesuffix('.')}{shown}".replace("%", "%%")

    def _parser(self) -> Callable[[str], Any]:
        def parse(text: str) -> Any:
            return None if self.optional and text.lower() == "none" else self.kind(text)

        parse.__name__ = self.kind.__name__  # which argparse names where a value is wrong
        return parse

    def value(self, found: Any) -> Any:
        """What argparse or JSON found, as the field has it; whether it is right, the settings find out."""
        if isinstance(found, list):
            return found[0] if self.single and len(found) == 1 else tuple(found)
        return found


def _fields(stage: type) -> dict[str, _Field]:
    """The fields of a stage's settings: its own ones first, then those that it inherits."""
    hints, docs, found = get_type_hints(stage), field_docs(stage), dict[str, _Field]()
    for field in fields(stage):
        hint = hints[field.name]
        kinds = [hint] if get_origin(hint) in (None, tuple) else get_args(hint)  # of a union
        plain = [kind for kind in kinds if kind is not NoneType and get_origin(kind) is not tuple]
        items = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
        found[field.name] = _Field(
            name=field.name, doc=docs[field.name], default=field.default, kind=[*plain, *items][0],
            is_path=any(get_origin(kind) is os.PathLike for kind in kinds), single=bool(plain), several=bool(items),
            optional=NoneType in kinds,
        )  # fmt: skip
    return {name: found[name] for name in docs}
