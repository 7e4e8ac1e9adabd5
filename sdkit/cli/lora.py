"""The commands around LoRA files: describe one, and merge several into one file or into a model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from sdkit.cli.console import say, say_json, say_path, say_table
from sdkit.cli.options import DTYPES, Commands, add_command, add_command_group, choices
from sdkit.errors import ArgumentError
from sdkit.messages import printable

SHOWN_TAGS = 10


def add_lora_commands(commands: Commands) -> None:
    """Add `lora` and its sub-commands."""
    examples = ("sdkit lora info zork.safetensors", "sdkit lora merge a.safetensors b.safetensors --out c.safetensors")
    lora = add_command_group(commands, "lora", "Describe LoRA files, and merge them.", examples)
    _add_info(lora)
    _add_merge(lora)


def info(args: argparse.Namespace) -> int:
    """Describe a LoRA file: kind, rank, alpha, layers, and trigger words."""
    from dataclasses import asdict

    from sdkit.loading.lora_tools import describe_lora

    found = describe_lora(args.lora)
    if args.json:
        say_json(asdict(found))
        return 0
    say(printable(found.path))
    rows = [
        ("kind", ", ".join(found.kinds)),
        ("title", found.title),
        ("base model", found.base),
        ("rank", _numbers(found.ranks) or "whole matrices"),
        ("alpha", _numbers(found.alphas)),
        ("layers", ", ".join(f"{n} in the {part}" for part, n in found.layers.items() if n)),
        ("targets", ", ".join(f"{name} ({n})" for name, n in found.targets.items())),
        ("stored as", f"{found.dtype}, {found.parameters / 1e6:,.2f} M parameters"),
        ("trigger words", found.trigger),
        ("merged from", found.merged_from),
        ("tags", ", ".join(f"{tag} ({n})" for tag, n in [*found.tags.items()][:SHOWN_TAGS])),
    ]
    say_table([(name, value) for name, value in rows if value])
    return 0


def _numbers(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def merge(args: argparse.Namespace) -> int:
    """Merge LoRAs into one file, or into a model.

    One file holds the sum of its LoRAs exactly, at the sum of their ranks, and
    the trigger words of all. With --model, a whole model is written; LoHa, LoKr,
    and DoRA need that.
    """
    from sdkit.arguments import number
    from sdkit.loading.lora_file import read_lora

    scales = [number("scale", scale) for scale in args.scale or [1.0] * len(args.loras)]
    if len(scales) != len(args.loras):
        raise ArgumentError(
            f"{len(scales)} of --scale cannot serve {len(args.loras)} LoRAs: give one for each, in the same order, or "
            "none."
        )
    if args.dtype is not None and args.model is None:
        raise ArgumentError("--dtype belongs to --model, and there is none; leave it out.")
    loras = [(read_lora(source), scale) for source, scale in zip(args.loras, scales, strict=True)]
    if any(lora.path is not None and _same_file(lora.path, args.out) for lora, _ in loras):
        raise ArgumentError(f"{args.out} is one of the LoRAs to merge, which would be lost; name another file.")
    if args.model is None:
        from sdkit.loading.lora_tools import join_loras

        join_loras(loras, args.out)
        say_path(Path(args.out))
        return 0
    from sdkit.engines.device import resolve_place
    from sdkit.pipelines.saving import merge_into_model

    dtype, _ = resolve_place(args.dtype or "fp32", "cpu")
    say_path(merge_into_model(args.model, loras, args.out, dtype=dtype))
    return 0


def _same_file(path: Path, out: str) -> bool:
    return os.path.exists(out) and os.path.samefile(path, out)  # noqa: PTH110, PTH121 - pathlib's raises for long names


def _add_info(commands: Commands) -> None:
    parser = add_command(commands, info, usage="LORA [--json]", examples=("sdkit lora info zork.safetensors",))
    parser.add_argument("lora", metavar="LORA", help="A file, a run's result folder, or a Hub id")
    parser.add_argument("--json", action="store_true", help="Print the description as JSON")


def _add_merge(commands: Commands) -> None:
    parser = add_command(
        commands,
        merge,
        usage="LORA [LORA ...] --out PATH [OPTION ...]",
        examples=(
            "sdkit lora merge a.safetensors b.safetensors --out c.safetensors",
            "sdkit lora merge a.safetensors --scale 0.8 --model emoji --out merged/",
        ),
    )
    add = parser.add_argument
    add("loras", nargs="+", metavar="LORA", help="A file, a run's result folder, or a Hub id")
    scale = "Scale of the LoRA; with several, give one for each, in the same order (default: 1)"
    add("--scale", action="append", type=float, metavar="S", help=scale)
    add("--model", "-m", metavar="SOURCE", help="Model to merge them into: a Hub id, a folder, or a single file")
    out = "File to write, ending in .safetensors; with --model, the folder of the new model"
    add("--out", "-o", required=True, metavar="PATH", help=out)
    add("--dtype", metavar=choices(DTYPES[1:]), help="Precision of the new model (default: fp32)")
