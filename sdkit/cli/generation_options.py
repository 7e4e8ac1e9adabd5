"""Options of the commands that draw images of prompts, each for a field of `Generation`.

They have no default. Only options that are given are in the parsed arguments, so that others keep their values from
elsewhere, such as the PNG of --from.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sdkit.cli.field_options import FieldOption, field_options
from sdkit.cli.options import PREDICTION_TYPES, SAMPLERS, SPACINGS, Add, choices
from sdkit.errors import ArgumentError
from sdkit.pipelines.settings import DrawingSettings

if TYPE_CHECKING:
    from sdkit.pipelines.generation import Generation

UNSET: dict[str, Any] = {"default": argparse.SUPPRESS}


def drawing_options() -> dict[str, FieldOption]:
    """Return the options for the fields of `DrawingSettings`."""
    others = {
        "num_inference_steps": ("--steps",),
        "guidance_scale": ("--scale",),
        "guidance_rescale": ("--rescale",),
        "guidance_interval": ("--interval",),
        "padding_mask_crop": ("--only-masked",),
    }
    metavars: dict[str, str | tuple[str, ...]] = {
        "height": "PIXELS",
        "width": "PIXELS",
        "mask_blur": "PIXELS",
        "padding_mask_crop": "PIXELS",
        "sampler": choices(SAMPLERS),
        "spacing": choices(SPACINGS),
        "guidance_interval": ("LOW", "HIGH"),
    }
    return field_options(DrawingSettings, others, metavars)


def prompt_options(add: Add) -> None:
    """Add --negative-prompt and --seed."""
    add("--negative-prompt", metavar="TEXT", help="Description of what to avoid", **UNSET)
    seed = "Random seed of the first image; later images take the next numbers (default: 0)"
    add("--seed", type=int, metavar="N", help=seed, **UNSET)


def add_on_options(add: Add) -> None:
    """Add the options for a single file's parameterisation, LoRAs, and textual inversion embeddings."""
    prediction_type = "What a single file's U-Net predicts (default: detected)"
    add("--prediction-type", metavar=choices(PREDICTION_TYPES), help=prediction_type, **UNSET)
    lora = "Add a LoRA: a file, a folder, or a Hub id. May be given several times; all are added"
    add("--lora", action="append", metavar="SOURCE", help=lora, **UNSET)
    lora_scale = "Scale of the LoRA; with several, give one for each, in the same order (default: 1)"
    add("--lora-scale", action="append", type=float, metavar="S", help=lora_scale, **UNSET)
    embedding = "Add a textual inversion embedding: a file, a folder, or a Hub id. May be given several times"
    add("--embedding", action="append", metavar="SOURCE", help=embedding, **UNSET)
    token = "Word that stands for the embedding; with several, one for each, in the same order (default: its own)"
    add("--embedding-token", action="append", metavar="WORD", help=token, **UNSET)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `Generation` that options give."""
    from dataclasses import fields

    from sdkit.pipelines.generation import Generation

    options = drawing_options()
    given = {field.name: getattr(args, field.name) for field in fields(Generation) if field.name in args}
    for name, value in given.items():
        if name in options:
            given[name] = options[name].value(value)
        elif isinstance(value, list):
            given[name] = tuple(value)
    return given


def check_guidance(given: dict[str, Any], generation: Generation) -> None:
    """Raise ArgumentError if an option of guidance is given at scale 1, where guidance is off and would ignore it."""
    options = {"negative_prompt": "negative-prompt", "guidance_rescale": "rescale", "guidance_interval": "interval"}
    unused = [option for name, option in options.items() if given.get(name)]
    if unused and generation.guidance_scale == generation.image_guidance_scale == 1:
        raise ArgumentError(f"--{unused[0]} belongs to guidance, and --scale 1 is none; leave one of them out.")
