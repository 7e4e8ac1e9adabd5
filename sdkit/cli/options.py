"""Options that several commands share, and the layout of help: one usage line, groups, choices, and examples."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Add: TypeAlias = Callable[..., object]
Commands: TypeAlias = "argparse._SubParsersAction[Any]"
Command: TypeAlias = Callable[[argparse.Namespace], int]

# The parser shows these choices but does not check them: the function that uses a value refuses a wrong one, in one
# sentence. They repeat that function's own constants (SAMPLERS, DTYPES, ...), because importing those would import
# PyTorch. A test compares the two.
SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "dpm++2m", "dpm++2m_sde", "dpm++sde", "unipc", "lcm", "tcd")
SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "lcm")
CROPS = ("center", "random")
DTYPES = ("auto", "fp32", "bf16", "fp16")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

LONGEST_CHOICES = 40  # columns; a wider list is shown as NAME, and the option's help names the choices


def choices(names: Sequence[str]) -> str:
    """Return the metavar of an option that takes one of `names`: {a,b,c}, or NAME where the list is too wide."""
    shown = f"{{{','.join(names)}}}"
    return shown if len(shown) <= LONGEST_CHOICES else "NAME"


def add_command(commands: Commands, run: Command, *, usage: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Add a command that is named after its function and described by its docstring.

    Args:
        commands: The commands to add it to.
        run: The function that runs the command and returns its exit code.
        usage: The arguments in the usage line.
        examples: Command lines to show below the options.

    Returns:
        The command's parser, to add options to.
    """
    child = _add_parser(commands, run.__name__, inspect.getdoc(run) or "", examples)
    child.usage = f"%(prog)s {usage}"
    child.set_defaults(command=run)
    return child


def add_command_group(commands: Commands, name: str, description: str, examples: Sequence[str]) -> Commands:
    """Add a command with subcommands, and return the object to add them to."""
    child = _add_parser(commands, name, description, examples)
    inside: Commands = child.add_subparsers(required=True, metavar="COMMAND", title="commands")
    return inside


def _add_parser(commands: Commands, name: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    summary = description.partition("\n")[0]
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, epilog=epilog(examples)
    )
    return parser


def epilog(examples: Sequence[str]) -> str:
    """Return the end of a help text: examples to copy."""
    return "\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples])


def model_options(add: Add, **default: Any) -> None:
    """Add the options that say which model to load."""
    sources = 'A Hub id, a diffusers folder, a single file, or "emoji", the embedded model (default: emoji)'
    add("--model", "-m", metavar="SOURCE", help=sources, **{"default": "emoji", **default})
    add("--revision", metavar="NAME", help="Branch, tag, or commit of a Hub id", **default)
    add("--variant", metavar="NAME", help='Variant of the weights, such as "fp16"', **default)
    config_option(add, **default)


def vae_option(add: Add, **default: Any) -> None:
    """Add --vae, which replaces the model's own VAE."""
    sources = "Use this VAE instead of the model's own: a Hub id, a folder, or a single file"
    add("--vae", metavar="SOURCE", help=sources, **default)


def config_option(add: Add, **default: Any) -> None:
    """Add --config, the folder of configs for a checkpoint in a single file."""
    add("--config", metavar="FOLDER", help="Folder of configs for a single file of an unusual shape", **default)


def batch_size_option(add: Add) -> None:
    """Add --batch-size."""
    add("--batch-size", type=int, metavar="N", help="Images per batch (default: as many as usually fit in memory)")


def place_options(add: Add, **default: Any) -> None:
    """Add --dtype, --device, and --compile: how and where the networks run."""
    dtype = "Precision of the weights; auto is bf16 where the hardware supports it, else fp32 (default: auto)"
    add("--dtype", metavar=choices(DTYPES), help=dtype, **default)
    device_option(add)
    add("--compile", action="store_true", help="Run the networks through torch.compile")


def offload_option(add: Add) -> None:
    """Add --offload, which keeps each network in CPU memory except while it runs."""
    add("--offload", action="store_true", help="Keep each network on the GPU only while it works: the least GPU memory")


def device_option(add: Add) -> None:
    """Add --device, on which the networks run."""
    device = "auto (a GPU if there is one), cpu, cuda, cuda:1 ... (default: auto)"
    add("--device", default="auto", metavar="DEVICE", help=device)
