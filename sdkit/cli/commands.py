"""The command line: one function per command, which reads the options, does the work, and prints the result.

Results go to stdout, progress and errors to stderr. Exit codes: 0 for success; 1 if some inputs failed and the rest
succeeded; 2 for an error that a user can fix, reported in one sentence; 130 after Ctrl-C, 143 after SIGTERM, 129 after
SIGHUP, also if training stopped with a checkpoint; 141 if the reader of stdout closed the pipe. Heavy libraries are
imported inside the commands, so that --help is fast.
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
from sdkit.cli.evaluate import add_evaluate_commands
from sdkit.cli.generation_options import (
    UNSET,
    add_on_options,
    check_guidance,
    drawing_options,
    given_settings,
    prompt_options,
)
from sdkit.cli.lora import add_lora_commands
from sdkit.cli.options import (
    Add,
    Commands,
    add_command,
    batch_size_option,
    config_option,
    epilog,
    model_options,
    offload_option,
    place_options,
    vae_option,
)
from sdkit.cli.other_models import add_other_options, check_options, generate_other, kind_of, upsampler_options
from sdkit.cli.parser import Parser
from sdkit.cli.training import add_training_commands
from sdkit.errors import ArgumentError, SdkitError
from sdkit.file_search import find_files
from sdkit.messages import printable

if TYPE_CHECKING:
    from sdkit.cli.jobs import Reconstruction, Report
    from sdkit.cli.preview import PreviewFile
    from sdkit.networks.autoencoder import VAE
    from sdkit.networks.controlnet import ControlNet
    from sdkit.pipelines.generation import Generation
    from sdkit.pipelines.text_to_image import StableDiffusion


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The command and its options; None takes those of the process, `sys.argv[1:]`.
    """
    return exit_code_of(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        code: int = 0
        with contextlib.suppress(SystemExit):  # argparse raises SystemExit after --help and --version
            args = _parser().parse_args(argv)
            code = args.command(args)
        flush()
        return code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise SdkitError("the memory does not suffice; give a smaller --batch-size, --tile or image size.") from error


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether Python or PyTorch ran out of memory.

    On a GPU, PyTorch raises OutOfMemoryError. On a CPU, it raises a RuntimeError that only its message identifies.
    """
    cpu = any(words in str(error) for words in ("can't allocate memory", "not enough memory"))
    return cpu or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextlib.contextmanager
def _failures_printed(report: Report[Any]) -> Iterator[None]:
    """Print the failed inputs at the end of the block, even if an error or Ctrl-C ends it."""
    try:
        yield
    finally:
        for _, sentence in report.failed:
            complain(sentence)


def generate(args: argparse.Namespace) -> int:
    """Generate images from text prompts."""
    kind = kind_of(args)
    check_options(args, kind)
    return _generate_sd(args) if kind is None else generate_other(args, kind)


def _generate_sd(args: argparse.Namespace) -> int:
    """Generate images with Stable Diffusion."""
    from dataclasses import replace

    from sdkit.arguments import whole_number
    from sdkit.cli.jobs import Report, check_generation, read_prompts, run_generation
    from sdkit.pipelines.generation import Generation

    if not args.prompts and not args.prompts_file and not args.from_image:
        raise ArgumentError("there is no prompt; give one, --prompts FILE or --from IMAGE.png.")
    prompts = args.prompts + (read_prompts(args.prompts_file) if args.prompts_file else [])
    given = given_settings(args)
    generation = (Generation.read(args.from_image) if args.from_image else Generation()).but(**given)
    check_guidance(given, generation)
    # Checked before a model is loaded or downloaded.
    job = check_generation(
        prompts or [generation.prompt], args.out, generation, count=args.count, batch_size=args.batch_size
    )
    _check_place(generation.dtype, args.device)
    if args.preview_every is not None:
        whole_number("preview_every", args.preview_every, 1)
    # LoRAs and embeddings are small: read them before the model, so that a bad one is reported early.
    loras, settings = job.generation.loras()
    embeddings, settings = settings.embeddings()
    job = replace(job, generation=settings)
    controlnets = _load_controlnets(args, generation)
    if generation.upsampler and (args.preview or args.preview_every is not None or args.preview_vae is not None):
        raise ArgumentError("--preview shows the latents of one model, and --upsampler adds others; leave one out.")
    report, sd = Report[Path](on_done=say_path), _load_sd(args, generation)
    upsamplers = _load_upsamplers(args, generation)
    for lora, scale in loras:
        sd.merge_lora(lora, scale)
    for embedding in embeddings:
        sd.add_embedding(embedding)
    preview = _preview(args, sd)
    run_generation(
        sd, job, grid=args.grid, controlnets=controlnets, upsamplers=upsamplers, report=report, callback=preview
    )
    return 0


def _preview(args: argparse.Namespace, sd: StableDiffusion) -> PreviewFile | None:
    """Return the callback that shows the forming images; None if no option asks for it."""
    if not args.preview and args.preview_every is None and args.preview_vae is None:
        return None
    from sdkit.cli.jobs import is_image_name
    from sdkit.cli.preview import PreviewFile, preview_path
    from sdkit.networks.autoencoder import VAE
    from sdkit.networks.preview import previewer

    options = {"dtype": sd.vae.dtype, "device": args.device}
    tiny = None if args.preview_vae is None else VAE.from_pretrained(args.preview_vae, **options)
    out = Path(args.out)
    path = preview_path(out, is_file=is_image_name(out))
    return PreviewFile(path, previewer(sd.vae, tiny), args.preview_every)


def encode(args: argparse.Namespace) -> int:
    """Encode images to latent files."""
    from sdkit.cli.jobs import Report, encode_files
    from sdkit.images import READABLE

    if args.mean and args.seed is not None:
        raise ArgumentError("--seed belongs to a sample, and --mean draws none; leave one of them out.")
    seed = 0 if args.seed is None else args.seed
    report, options = Report[Path](on_done=say_path), _checked(args, READABLE, seed) | {"seed": seed}
    with _failures_printed(report):
        encode_files(_load_vae(args), args.paths, sample=not args.mean, report=report, **options)
    return 1 if report.failed else 0


def decode(args: argparse.Namespace) -> int:
    """Decode latent files to PNGs."""
    from sdkit.cli.jobs import Report, decode_files

    report, options = Report[Path](on_done=say_path), _checked(args, {".safetensors"})
    with _failures_printed(report):
        decode_files(_load_vae(args), args.paths, force=args.force, report=report, **options)
    return 1 if report.failed else 0


def reconstruct(args: argparse.Namespace) -> int:
    """Encode and decode images, and measure what is lost."""
    from sdkit.cli.jobs import Reconstruction, Report, reconstruct_files
    from sdkit.images import READABLE

    def show(**more: str) -> None:
        if args.json:
            say_json(_scores_as_dict(args.model, report) | more)
        elif report.done:
            _print_scores(report)

    report, options = Report[Reconstruction](), _checked(args, READABLE)
    vae = _load_vae(args)
    with _failures_printed(report):
        try:
            reconstruct_files(vae, args.paths, report=report, **options)
        except BaseException as error:
            show(error=str(error) or "stopped")
            raise
        show()
    return 1 if report.failed else 0


def info(args: argparse.Namespace) -> int:
    """Describe a model: its parts, their sizes, and their configs."""
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
    """Generate a few images, and encode and decode photos."""
    from sdkit.cli.demo import demo_files
    from sdkit.cli.jobs import check_files
    from sdkit.images import READABLE
    from sdkit.pipelines.generation import Generation

    if args.photos:
        find_files(args.photos, READABLE)
    check_files(args.out)
    _check_place(args.dtype, args.device)
    grid, kind, report = demo_files(_load_sd(args, Generation(dtype=args.dtype)), args.out, args.photos)
    with _failures_printed(report):
        say(printable(f"Images generated from a few prompts: {grid}"))
        say(f"{kind}, encoded and decoded (the original on the left):")
        _print_scores(report)
    return 1 if report.failed else 0


def _checked(args: argparse.Namespace, suffixes: Collection[str], seed: int = 0) -> dict[str, Any]:
    """Check the options of a job on files before its model is loaded, and return them as keyword arguments."""
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


def _load_controlnets(args: argparse.Namespace, generation: Generation) -> list[ControlNet]:
    from sdkit.engines.device import resolve_place
    from sdkit.networks.controlnet import ControlNet

    dtype, device = resolve_place(generation.dtype, args.device)
    home = "cpu" if args.offload else device  # the pipeline moves it with the U-Net
    return [ControlNet.from_pretrained(source, dtype=dtype, device=home) for source in generation.controlnet]


def _load_sd(args: argparse.Namespace, generation: Generation) -> StableDiffusion:
    from sdkit.pipelines.text_to_image import StableDiffusion

    return StableDiffusion.from_pretrained(
        generation.model, dtype=generation.dtype, device=args.device, revision=generation.revision,
        variant=generation.variant, config=generation.config, prediction_type=generation.prediction_type,
        vae=generation.vae, compile=args.compile, offload=args.offload,
    )  # fmt: skip


def _load_upsamplers(args: argparse.Namespace, generation: Generation) -> list[StableDiffusion]:
    from sdkit.pipelines.text_to_image import StableDiffusion

    return [
        StableDiffusion.from_pretrained(
            source, dtype=generation.dtype, device=args.device, compile=args.compile, offload=args.offload
        )
        for source in generation.upsampler
    ]


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
    """Return a report as a dict for JSON. JSON has no infinity, so the PSNR of identical images becomes null."""
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
    parser = Parser(
        prog="sdkit",
        description="Stable Diffusion 1.x and 2.x: encode and decode, generate, and fine-tune.",
        epilog=f"{epilog(EXAMPLES)}\n\n'sdkit COMMAND --help' explains the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"sdkit {__version__}", help="Show the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add_to in (_add_generate, _add_encode, _add_decode, _add_reconstruct, _add_info, _add_demo):
        add_to(commands)
    add_training_commands(commands)
    add_lora_commands(commands)
    add_evaluate_commands(commands)
    return parser


EXAMPLES = (
    "sdkit demo",
    'sdkit generate "a red apple on a blue background" --seed 42',
    "sdkit encode photos/ --out latents/",
    "sdkit train unet --data photos/ --out-dir runs/zork --lora-rank 8",
)


def _add_generate(commands: Commands) -> None:
    """Add `generate`.

    Options that set a field of `Generation` are stored under the field's name. They have no default: only options that
    are given override the settings in the PNG of --from.
    """
    parser = add_command(
        commands,
        generate,
        usage="[PROMPT ...] [OPTION ...]",
        examples=(
            'sdkit generate "a red apple on a blue background" --count 4 --grid',
            'sdkit generate "a fox" --image cat.png --strength 0.6',
            'sdkit generate "a hat" --image cat.png --mask head.png',
            'sdkit generate "a cat" --model sd-v1-5.safetensors --steps 20 --scale 7',
            "sdkit generate --from outputs/0001-a-cat-0.png --seed 7 --out again.png",
            "sdkit generate --prompts prompts.txt --lora runs/zork/result --lora-scale 0.8",
            'sdkit generate "a fox" --controlnet runs/edges/result --control-image a.png',
            'sdkit generate "make it red" --model runs/edit/result --condition cat.png',
            'sdkit generate "a cat" --model runs/prior/result --temperature 0.9 --top-k 50',
            'sdkit generate "a cat" -m runs/small/result --upsampler runs/large/result',
        ),
    )
    what, how = (parser.add_argument_group(title).add_argument for title in ("what to draw", "how to draw it"))
    _add_what_to_draw(what)
    for name, option in drawing_options().items():
        option.add_to(what if name in ("height", "width") else how)
    add = parser.add_argument_group("model").add_argument
    model_options(add, **UNSET)
    vae_option(add, **UNSET)
    add_on_options(add)
    controlnet = "Add a ControlNet: a folder, a file, or a Hub id. May be given several times"
    add("--controlnet", action="append", metavar="SOURCE", help=controlnet, **UNSET)
    control_image = "Image that the ControlNet follows, such as edges; with several, one for each, in the same order"
    add("--control-image", action="append", metavar="FILE", help=control_image, **UNSET)
    upsampler_options(add)
    add_other_options(parser.add_argument_group("priors over codes, and DALL-E 2").add_argument)
    add = parser.add_argument_group("where to write").add_argument
    add("--out", "-o", metavar="PATH", default="outputs", help="Folder, or a .png for one image (default: outputs)")
    add("--grid", action="store_true", help="Also write one picture of all images, with labels")
    preview = "Show the forming images in preview.jpg (or NAME-preview.jpg), as often as takes at most 2 %% of the time"
    add("--preview", action="store_true", help=preview)
    add("--preview-every", type=int, metavar="N", help="Show them after every N-th step")
    tiny = "Show them with a tiny VAE for the model's latents, such as madebyollin/taesd: sharper, and slower"
    add("--preview-vae", metavar="SOURCE", help=tiny)
    add = parser.add_argument_group("speed and memory").add_argument
    batch_size_option(add)
    place_options(add, **UNSET)
    offload_option(add)


def _add_what_to_draw(add: Add) -> None:
    add("prompts", nargs="*", metavar="PROMPT", help="Description of an image; each prompt makes --count images")
    add("--image", metavar="FILE", help="Image to start from", **UNSET)
    mask = "Mask of --image: only its white part is drawn anew"
    add("--mask-image", "--mask", metavar="FILE", help=mask, **UNSET)
    condition = "Image that the model reads beside the noise, if it was trained with conditions"
    add("--condition", metavar="FILE", help=condition, **UNSET)
    prompts = 'File of more prompts, one per line; "-" reads stdin. Lines that begin with # are skipped'
    add("--prompts", dest="prompts_file", metavar="FILE", help=prompts)
    again = "Draw an image that sdkit made again; options given here override its own"
    add("--from", dest="from_image", metavar="IMAGE.png", help=again)
    prompt_options(add)
    add(
        "--num-images-per-prompt",
        "--count",
        dest="count",
        type=int,
        default=1,
        metavar="N",
        help="Images per prompt (default: 1)",
    )


def _add_encode(commands: Commands) -> None:
    parser = add_command(
        commands,
        encode,
        usage="IMAGE|FOLDER ... [OPTION ...]",
        examples=("sdkit encode photo.jpg", "sdkit encode photos/ --out latents/ --mean --tile 512"),
    )
    add = _add_files(parser, "IMAGE|FOLDER", "Images; folders are searched, with their sub-folders", "latents")
    add("--mean", action="store_true", help="Take the mean of the posterior instead of a sample")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="Random seed of the first image; later images take the next numbers (default: 0)",
    )
    _add_model(parser)


def _add_decode(commands: Commands) -> None:
    parser = add_command(
        commands,
        decode,
        usage="LATENT|FOLDER ... [OPTION ...]",
        examples=("sdkit decode latents/ --out decoded/",),
    )
    latents = "Files that sdkit encode wrote; folders are searched, with their sub-folders"
    add = _add_files(parser, "LATENT|FOLDER", latents, "decoded")
    add("--force", action="store_true", help="Decode latents of another VAE too, if their shape fits")
    _add_model(parser)


def _add_reconstruct(commands: Commands) -> None:
    parser = add_command(
        commands,
        reconstruct,
        usage="IMAGE|FOLDER ... [OPTION ...]",
        examples=("sdkit reconstruct photo.jpg", "sdkit reconstruct photos/ --model runs/vae/result --json"),
    )
    images = "Images; folders are searched, with their sub-folders"
    add = _add_files(parser, "IMAGE|FOLDER", images, "reconstructions")
    add("--json", action="store_true", help="Print the scores as JSON; an infinite PSNR is null")
    _add_model(parser)


def _add_files(parser: argparse.ArgumentParser, metavar: str, about: str, out: str) -> Add:
    """Add the input paths and the output folder of a job. Return the `add_argument` of their group."""
    add = parser.add_argument_group("input and output").add_argument
    add("paths", nargs="+", metavar=metavar, help=about)
    add("--out", "-o", default=out, metavar="FOLDER", help="Output folder (default: %(default)s)")
    return add


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the model, and those for speed and memory."""
    model_options(parser.add_argument_group("model").add_argument)
    add = parser.add_argument_group("speed and memory").add_argument
    batch_size_option(add)
    tile = "Side of the tiles for large images; 0 is no tiles (default: 1024 for images above 2.3 megapixels)"
    add("--tile", type=int, metavar="PIXELS", help=tile)
    place_options(add, default="auto")


def _add_info(commands: Commands) -> None:
    parser = add_command(
        commands,
        info,
        usage="SOURCE [OPTION ...]",
        examples=("sdkit info emoji", "sdkit info stable-diffusion-v1-5/stable-diffusion-v1-5 --json"),
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help='A Hub id, a diffusers folder, a single file, or "emoji", the embedded model')
    add("--revision", metavar="NAME", help="Branch, tag, or commit of a Hub id")
    config_option(add)
    add("--json", action="store_true", help="Print the description as JSON")


def _add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        demo,
        usage="[PHOTO ...] [OPTION ...]",
        examples=("sdkit demo", "sdkit demo photo.jpg --out demo/"),
    )
    add = parser.add_argument
    add("photos", nargs="*", metavar="PHOTO", help="Photos to encode and decode (default: scikit-image's)")
    add("--out", "-o", default="demo", metavar="FOLDER", help="Output folder (default: %(default)s)")
    place_options(add, default="auto")
    offload_option(add)
