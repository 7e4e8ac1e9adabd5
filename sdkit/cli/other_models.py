"""`sdkit generate` with models other than Stable Diffusion: priors over codes, and DALL-E 2.

Which one it is follows from the folder of --model, or from the PNG of --from. Each kind takes the options that set a
field of its settings; any other option is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.cli.console import say_path
from sdkit.cli.field_options import FieldOption, field_options
from sdkit.cli.generation_options import UNSET
from sdkit.cli.options import SAMPLERS, Add, choices
from sdkit.errors import ArgumentError
from sdkit.pipelines.other_generations import KINDS, CodeGeneration, UnCLIPGeneration, read_other
from sdkit.pipelines.settings import PIPELINE

if TYPE_CHECKING:
    from PIL import Image

    from sdkit.pipelines.other_generations import OtherGeneration

TITLES = {None: "Stable Diffusion", "codes": "a prior over codes", "unclip": "unCLIP (DALL-E 2)"}
"""Kind of a model -> what messages call it."""
OWN = ("temperature", "top_k", "top_p", "prior", "prior_num_inference_steps", "prior_guidance_scale", "prior_sampler")
"""Fields that the settings of Stable Diffusion lack."""
FLAGS = ("compile", "offload", "preview", "preview_every", "preview_vae")
"""Options that only Stable Diffusion takes, and that set no field of its settings."""


def add_other_options(add: Add) -> None:
    """Add the options for the fields `OWN`."""
    for option in _own_options().values():
        option.add_to(add)


def upsampler_options(add: Add) -> None:
    """Add --upsampler and --noise-level."""
    upsampler = "Enlarge the images with an upsampler, a model trained with upscale_factor. May be given several times"
    add("--upsampler", action="append", metavar="SOURCE", help=upsampler, **UNSET)
    noise = "Noise on the image that an upsampler enlarges, or on the embedding that unCLIP draws: a timestep"
    add("--noise-level", type=int, metavar="N", help=noise, **UNSET)


def kind_of(args: argparse.Namespace) -> str | None:
    """Return the kind of the model that a command draws with; None for Stable Diffusion.

    Raises:
        ArgumentError: The PNG of --from was drawn by a model of another kind, or the model draws nothing alone.
        SdkitError: The PNG or the model cannot be read.
    """
    from sdkit import images
    from sdkit.loading.model_kind import model_kind

    text = images.read_text(args.from_image) if args.from_image else {}
    stated = text.get(PIPELINE)
    if "model" not in args and stated in KINDS:
        return stated
    model = getattr(args, "model", None)
    kind = None if model is None else model_kind(model, getattr(args, "revision", None))
    if kind == "level":
        raise ArgumentError(
            f"{model!r} draws one level of a VQ-VAE-2, and an image needs both; draw with TwoLevelPipeline in Python."
        )
    if args.from_image and model is not None and stated != kind:
        if stated not in KINDS:  # the image may be one that no model drew
            raise ArgumentError(f"{args.from_image} was not drawn by {TITLES[kind]}, as {model!r} is; give options.")
        drew = TITLES[stated]
        raise ArgumentError(f"{args.from_image} was drawn by {drew}, and {model!r} is {TITLES[kind]}; give options.")
    return kind


def check_options(args: argparse.Namespace, kind: str | None) -> None:
    """Raise ArgumentError for an option that does not apply to models of this kind."""
    from sdkit.pipelines.generation import Generation

    known = {field.name for cls in (Generation, *KINDS.values()) for field in fields(cls)}
    own = {field.name for field in fields(Generation if kind is None else KINDS[kind])}
    unfit = [name for name in vars(args) if name in known - own]
    if kind is not None:
        unfit += [name for name in FLAGS if getattr(args, name) not in (None, False)]
    if unfit:
        raise ArgumentError(f"--{unfit[0].replace('_', '-')} does not apply to {TITLES[kind]}; leave it out.")


def generate_other(args: argparse.Namespace, kind: str) -> int:
    """Generate images with a model of this kind."""
    from sdkit.cli.jobs import Report, check_drawing, read_prompts, write_drawings
    from sdkit.engines.device import resolve_place

    settings = _settings(args, kind)
    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    if not prompts and not args.from_image and not settings.takes_no_prompt:
        raise ArgumentError("there is no prompt; give one, --prompts FILE, --image FILE, or --from IMAGE.png.")
    settings.check()
    prompts = prompts or [settings.prompt]
    check_drawing(prompts, args.out, settings.seed, count=args.count, batch_size=args.batch_size)
    given, settings = settings.inputs()
    resolve_place(settings.dtype, args.device)
    pipeline: Any = settings.load(args.device)
    report = Report[Path](on_done=say_path)

    def describe(prompt: str, seed: int, image: Image.Image) -> Mapping[str, str]:
        del image
        return replace(settings, prompt=prompt, seed=seed).text()

    write_drawings(
        prompts, settings.seed, lambda texts, seeds: settings.draw(pipeline, texts, seeds, given), describe,
        Path(args.out), count=args.count, at_once=args.batch_size or settings.at_once(pipeline), grid=args.grid,
        report=report,
    )  # fmt: skip
    return 0


def _settings(args: argparse.Namespace, kind: str) -> OtherGeneration:
    """Return the settings that options give, and those of the PNG of --from."""
    cls, options = KINDS[kind], _own_options()
    given = {field.name: getattr(args, field.name) for field in fields(cls) if field.name in args}
    given = {name: options[name].value(value) if name in options else value for name, value in given.items()}
    for name in ("condition", "image"):  # an input that is given anew may hold anything
        if name in given:
            given[f"{name}_sha256"] = None
    return replace(read_other(args.from_image, kind), **given) if args.from_image else cls(**given)


def _own_options() -> dict[str, FieldOption]:
    """Return the options for the fields `OWN`."""
    others = {"prior_num_inference_steps": ("--prior-steps",), "prior_guidance_scale": ("--prior-scale",)}
    metavars: dict[str, str | tuple[str, ...]] = {"prior": "SOURCE", "prior_sampler": choices(SAMPLERS)}
    options = field_options(CodeGeneration, others, metavars) | field_options(UnCLIPGeneration, others, metavars)
    return {name: options[name] for name in OWN}
