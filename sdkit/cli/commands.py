"""The command line: one function a command, which parses, calls and prints; the work is in `sdkit.cli.jobs`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 all done; 1 some inputs failed, the others are done;
2 a user's error, told in one sentence (some errors have a code of their own); 130 stopped by Ctrl-C, 143 by SIGTERM,
129 by SIGHUP. Heavy libraries are imported by the commands using them, so that --help is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit import __version__
from sdkit.cli.console import complain, exit_code_of, flush, say, say_json, say_path, say_table
from sdkit.cli.parser import Parser
from sdkit.cli.training import Add, add_command, add_training_commands
from sdkit.errors import ArgumentError, SdkitError
from sdkit.files import find_files
from sdkit.messages import printable

if TYPE_CHECKING:
    from sdkit.cli.jobs import Reconstruction, Report
    from sdkit.networks.autoencoder import VAE
    from sdkit.pipelines.generation import Generation
    from sdkit.pipelines.text_to_image import StableDiffusion


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` None takes the process's own arguments."""
    return exit_code_of(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        code: int = 0
        with contextlib.suppress(SystemExit):  # argparse's own, of --help and --version
            args = _parser().parse_args(argv)
            code = args.command(args)
        flush()
        return code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise SdkitError("the memory does not suffice; give a smaller --batch-size, --tile or image size.") from error


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for a GPU's memory, but tells only in words that the machine's is full."""
    told = any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextlib.contextmanager
def _failures_told(report: Report[Any]) -> Iterator[None]:
    """Tell of inputs that failed, also where an error or Ctrl-C ends the job."""
    try:
        yield
    finally:
        for _, sentence in report.failed:
            complain(sentence)


def generate(args: argparse.Namespace) -> int:
    """Make images from prompts."""
    from dataclasses import fields

    from sdkit.cli.jobs import Report, check_generation, generate_files, read_prompts
    from sdkit.pipelines.generation import Generation

    if not args.prompts and not args.prompts_file and not args.from_image:
        raise ArgumentError("there is no prompt; give one, --prompts FILE or --from IMAGE.png.")
    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    given = {field.name: getattr(args, field.name) for field in fields(Generation) if field.name in args}
    generation = (Generation.read(args.from_image) if args.from_image else Generation()).but(**given)
    guides = {"negative_prompt": "negative-prompt", "guidance_rescale": "rescale", "guidance_interval": "interval"}
    idle = [option for name, option in guides.items() if given.get(name)]
    if idle and generation.guidance_scale == 1:
        option = idle[0]
        raise ArgumentError(f"--{option} belongs to guidance, and --scale 1 is none; leave one of them out.")
    sizes = {"count": args.count, "batch_size": args.batch_size}
    prompts = prompts or [generation.prompt]
    check_generation(prompts, args.out, generation, **sizes)  # told before a model is loaded, or even downloaded
    _check_place(generation.dtype, args.device)
    report = Report[Path](on_done=say_path)
    generate_files(_load_sd(args, generation), prompts, args.out, generation, grid=args.grid, report=report, **sizes)
    return 0


def encode(args: argparse.Namespace) -> int:
    """Encode images to latent files."""
    from sdkit.cli.jobs import Report, encode_files
    from sdkit.images import READABLE

    if args.mean and args.seed is not None:
        raise ArgumentError("--seed belongs to a sample, and --mean draws none; leave one of them out.")
    seed = 0 if args.seed is None else args.seed
    report, options = Report[Path](on_done=say_path), _checked(args, READABLE, seed) | {"seed": seed}
    with _failures_told(report):
        encode_files(_load_vae(args), args.paths, sample=not args.mean, report=report, **options)
    return 1 if report.failed else 0


def decode(args: argparse.Namespace) -> int:
    """Decode latent files to PNGs."""
    from sdkit.cli.jobs import Report, decode_files

    report, options = Report[Path](on_done=say_path), _checked(args, {".safetensors"})
    with _failures_told(report):
        decode_files(_load_vae(args), args.paths, force=args.force, report=report, **options)
    return 1 if report.failed else 0


def reconstruct(args: argparse.Namespace) -> int:
    """Take images through the VAE and back, and measure what it keeps."""
    from sdkit.cli.jobs import Reconstruction, Report, reconstruct_files
    from sdkit.images import READABLE

    def show(**more: str) -> None:
        if args.json:
            say_json(_scores_as_dict(args.model, report) | more)
        elif report.done:
            _print_scores(report)

    report, options = Report[Reconstruction](), _checked(args, READABLE)
    vae = _load_vae(args)
    with _failures_told(report):
        try:
            reconstruct_files(vae, args.paths, report=report, **options)
        except BaseException as error:
            show(error=str(error) or "stopped")
            raise
        show()
    return 1 if report.failed else 0


def info(args: argparse.Namespace) -> int:
    """Tell what a model source is and holds."""
    from dataclasses import asdict

    from sdkit.loading.source import Source

    description = Source.open(args.source, revision=args.revision, config=args.config).describe()
    if args.json:
        say_json(asdict(description))
        return 0
    kind = f"{description.kind}, {description.family}" if description.family else description.kind
    say(printable(f"{description.source} ({kind}): {description.path}"))
    rows = [("part", "class", "parameters", "stored as", "config")]
    for part in description.components:
        count = "" if part.parameters is None else f"{part.parameters / 1e6:,.1f} M"
        config = ", ".join(f"{key} {value}" for key, value in part.config.items())
        rows.append((part.part, part.class_name, count, part.dtype or "", config))
    say_table(rows)
    return 0


def demo(args: argparse.Namespace) -> int:
    """Generate a grid of images, and take photos through the VAE and back."""
    from sdkit.cli.jobs import check_files, demo_files
    from sdkit.images import READABLE
    from sdkit.pipelines.generation import Generation

    if args.photos:
        find_files(args.photos, READABLE)
    check_files(args.out)
    _check_place(args.dtype, args.device)
    grid, kind, report = demo_files(_load_sd(args, Generation(dtype=args.dtype)), args.out, args.photos)
    with _failures_told(report):
        say(printable(f"Images generated from a few prompts: {grid}"))
        say(f"{kind}, encoded and decoded (the original on the left):")
        _print_scores(report)
    return 1 if report.failed else 0


def _checked(args: argparse.Namespace, suffixes: Collection[str], seed: int = 0) -> dict[str, Any]:
    """The options of a job on files; what is wrong is told before a model is loaded, or even downloaded."""
    from sdkit.cli.jobs import check_files

    find_files(args.paths, suffixes)
    options = {"out": args.out, "batch_size": args.batch_size, "tile": args.tile}
    check_files(**options, seed=seed)
    _check_place(args.dtype, args.device)
    return options


def _check_place(dtype: str, device: str) -> None:
    from sdkit.engines.device import resolve_place

    resolve_place(dtype, device)


def _load_vae(args: argparse.Namespace) -> VAE:
    from sdkit.networks.autoencoder import VAE

    return VAE.from_pretrained(
        args.model, dtype=args.dtype, device=args.device, revision=args.revision, variant=args.variant,
        config=args.config, compile=args.compile,
    )  # fmt: skip


def _load_sd(args: argparse.Namespace, generation: Generation) -> StableDiffusion:
    from sdkit.loading.lora_file import read_lora
    from sdkit.networks.lora import merge_lora
    from sdkit.pipelines.text_to_image import StableDiffusion

    loras = [(read_lora(source), scale) for source, scale in generation.loras]  # first: they are smaller
    sd = StableDiffusion.from_pretrained(
        generation.model, dtype=generation.dtype, device=args.device, revision=generation.revision,
        variant=generation.variant, config=generation.config, prediction_type=generation.prediction_type,
        vae=generation.vae, compile=args.compile,
    )  # fmt: skip
    for lora, scale in loras:
        merge_lora(lora, sd.unet.network, sd.text.network, scale)
    return sd


def _print_scores(report: Report[Reconstruction]) -> None:
    from sdkit.cli.jobs import mean_scores

    rows = [("image", "size", "PSNR (dB)", "SSIM", "written to")]
    for one in report.done:
        size = f"{one.width} x {one.height}"
        rows.append((one.source.name, size, _number(one.psnr, 2), _number(one.ssim, 4), str(one.path)))
    psnr, ssim = mean_scores(report.done)
    rows.append(("mean", "", _number(psnr, 2), _number(ssim, 4), ""))
    say_table(rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _scores_as_dict(model: str, report: Report[Reconstruction]) -> dict[str, Any]:
    """JSON has no infinity (the PSNR of equal images): it becomes null."""
    from dataclasses import asdict

    from sdkit.cli.jobs import mean_scores

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    psnr, ssim = mean_scores(report.done)
    return {
        "model": model,
        "images": [asdict(one) | {"psnr": finite(one.psnr)} for one in report.done],
        "mean": {"psnr": finite(psnr), "ssim": ssim},
        "failed": [{"source": path, "error": sentence} for path, sentence in report.failed],
    }


def _parser() -> argparse.ArgumentParser:
    about = "Stable Diffusion 1.x / 2.x: images from text, through the VAE and back, and fine-tuning."
    parser = Parser(prog="sdkit", description=about)
    parser.add_argument("--version", action="version", version=f"sdkit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, add_options in (
        (generate, _generate_options),
        (encode, _encode_options),
        (decode, _decode_options),
        (reconstruct, _reconstruct_options),
        (info, _info_options),
        (demo, _demo_options),
    ):
        add_command(commands, command, add_options)
    add_training_commands(commands)
    return parser


def _generate_options(add: Add) -> None:
    """Add the options. Those of a `Generation` are stored under its field's name, without a default: only what is given
    overrides the values of --from."""
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    add("prompts", nargs="*", metavar="PROMPT", help="what to show; each makes --count images")
    add("--prompts", dest="prompts_file", metavar="FILE", help='more prompts, one a line; "-" is stdin, # a comment')
    add("--from", dest="from_image", metavar="IMAGE.png", help="make this image again, but for options given beside it")
    add("--out", "-o", default="outputs", help="folder, or a .png for a single image (default: %(default)s)")
    add("--count", type=int, default=1, metavar="N", help="images of each prompt, each with the next seed (default: 1)")
    add("--grid", action="store_true", help="also write one picture of all images, labelled")
    add("--batch-size", type=int, metavar="N", help="images at a time (default: as many as usually fit)")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from, the more the higher --scale is", **unset)
    add("--steps", dest="num_inference_steps", type=int, metavar="N", help="of the sampler (default: 30)", **unset)
    add(
        "--scale",
        dest="guidance_scale",
        type=float,
        metavar="S",
        help="of guidance; 1 is none (default: the model's own)",
        **unset,
    )
    add("--sampler", help="ddim, ddpm or dpm++2m (default: ddim)", **unset)
    add("--eta", type=float, help="noise that ddim adds, from 0 (default) to 1", **unset)
    add("--spacing", help="leading, trailing or linspace (default: the model's)", **unset)
    add("--seed", type=int, metavar="N", help="of the first image (default: 0)", **unset)
    add("--height", type=int, metavar="PIXELS", help="(default: the model's own)", **unset)
    add("--width", type=int, metavar="PIXELS", help="(default: the model's own)", **unset)
    add("--clip-skip", type=int, metavar="N", help="last text layers to pass over (default: 0)", **unset)
    add("--weighting", action=argparse.BooleanOptionalAction, help="read (word:1.3) as A1111 does", **unset)
    add(
        "--rescale",
        dest="guidance_rescale",
        type=float,
        metavar="PHI",
        help="guidance rescale, from 0 (default) to 1",
        **unset,
    )
    levels = "noise levels sigma between which to guide (default: all)"
    add("--interval", dest="guidance_interval", nargs=2, type=float, metavar=("LO", "HI"), help=levels, **unset)
    _model_options(add, **unset)
    add("--prediction-type", metavar="KIND", help="of a single file: epsilon or v_prediction", **unset)
    add("--vae", metavar="SOURCE", help="in place of the model's own: a folder, a Hub id, or a single file", **unset)
    several: dict[str, Any] = {"action": "append", **unset}
    add("--lora", metavar="LORA", help="a file, a folder, or a Hub id; may be given again: all are added", **several)
    of_each = "how much of it to add (default: 1); of several LoRAs, give one for each, in the same order"
    add("--lora-scale", type=float, metavar="S", help=of_each, **several)


def _encode_options(add: Add) -> None:
    add("paths", nargs="+", metavar="IMAGE|FOLDER", help="folders are searched through")
    _files_options(add, "latents")
    add("--mean", action="store_true", help="the mean of the posterior, in place of a sample")
    add("--seed", type=int, metavar="N", help="of the first image; the next ones follow (default: 0)")
    _model_options(add)


def _decode_options(add: Add) -> None:
    add("paths", nargs="+", metavar="LATENT|FOLDER", help="what sdkit encode wrote; folders are searched through")
    _files_options(add, "decoded")
    add("--force", action="store_true", help="decode latents of another VAE, too")
    _model_options(add)


def _reconstruct_options(add: Add) -> None:
    add("paths", nargs="+", metavar="IMAGE|FOLDER", help="folders are searched through")
    _files_options(add, "reconstructions")
    add("--json", action="store_true", help="print the scores as JSON; an infinite PSNR is null")
    _model_options(add)


def _info_options(add: Add) -> None:
    add("source", metavar="SOURCE", help='"emoji", a Hub id, a diffusers folder or a single file')
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--config", metavar="FOLDER", help="of configs, for a single file of unusual shape")
    add("--json", action="store_true", help="print it as JSON")


def _demo_options(add: Add) -> None:
    add("photos", nargs="*", metavar="PHOTO", help="to encode and decode (default: scikit-image's photos)")
    add("--out", "-o", default="demo", metavar="FOLDER", help="(default: %(default)s)")
    _place_options(add, default="auto")


def _files_options(add: Add, out: str) -> None:
    add("--out", "-o", default=out, metavar="FOLDER", help="(default: %(default)s)")
    add("--batch-size", type=int, metavar="N", help="images at a time (default: as many as usually fit)")
    add("--tile", type=int, metavar="PIXELS", help="side of tiles; 0 is none (default: 1024 over 2.3 megapixels)")


def _model_options(add: Add, **default: Any) -> None:
    kinds = "a Hub id, a diffusers folder or a single file (default: emoji, which is embedded)"
    add("--model", "-m", metavar="SOURCE", help=kinds, **{"default": "emoji", **default})
    add("--revision", help="branch, tag or commit of a Hub id", **default)
    add("--variant", help='of the weights, such as "fp16"', **default)
    add("--config", metavar="FOLDER", help="of configs, for a single file of unusual shape", **default)
    _place_options(add, **{"default": "auto", **default})


def _place_options(add: Add, **default: Any) -> None:
    add("--dtype", help="auto, fp32, bf16 or fp16 (default: auto)", **default)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    add("--compile", action="store_true", help="run the networks through torch.compile")
