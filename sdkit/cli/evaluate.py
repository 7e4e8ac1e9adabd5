"""The commands of `sdkit evaluate`: metrics, beside controls that show what the numbers mean."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.cli.console import complain, say, say_json, say_table
from sdkit.cli.generation_options import (
    UNSET,
    add_on_options,
    check_guidance,
    drawing_options,
    given_settings,
    prompt_options,
)
from sdkit.cli.options import (
    DTYPES,
    Commands,
    add_command,
    add_command_group,
    batch_size_option,
    choices,
    config_option,
    device_option,
    offload_option,
    place_options,
    vae_option,
)
from sdkit.errors import ArgumentError
from sdkit.messages import printable
from sdkit.processes import is_main_process

if TYPE_CHECKING:
    from PIL import Image

    from sdkit.evaluation.generated_images import ImageEvaluation, Row
    from sdkit.evaluation.reconstruction import VAEEvaluation
    from sdkit.pipelines.generation import Generation
    from sdkit.pipelines.text_to_image import StableDiffusion

MOST_CHANNELS = 4  # channels of latents in a table; --json has all of them
SHOWN = 5  # number of skipped images to name; further ones are only counted

OF_INPUTS = (
    *("image_guidance_scale", "strength", "mask_blur", "padding_mask_crop", "controlnet_conditioning_scale"),
    *("control_guidance_start", "control_guidance_end", "guess_mode"),
)
"""Fields of `DrawingSettings` that need an image, a mask, or a condition; images to measure are drawn of prompts."""

# Metric -> its column in a table, the factor that it is multiplied by there, and its digits.
COLUMNS = {
    "frechet": ("Fréchet", 1, 3),
    "frechet_at_infinity": ("Fréchet, N→∞", 1, 3),
    "kid": ("KID x 1000", 1000, 3),
    "cmmd": ("CMMD", 1, 3),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
    "inception_score": ("Inception score", 1, 2),
    "clip_score": ("CLIP score", 1, 3),
    "clip_cosine": ("100 cos", 1, 2),
}


@dataclass(frozen=True, kw_only=True)
class ImagesSettings:
    """Settings of `sdkit evaluate images`; each is an argument or an option of the command.

    Attributes:
        generated: Folder or data set of the generated images; None if a model draws them.
        reference: Folder or data set of real images.
        split: Split of data sets on the Hub.
        extractor: Names of feature extractors.
        prompts: File of prompts.
        model: Source of a model that draws the images.
        drawing: Field of `Generation` -> its value, for the options that say how that model draws.
        count: Images per prompt.
        json: Whether to print JSON.
        batch_size: Images in one pass.
        device: Where networks compute.
        compile: Whether the model that draws is compiled.
        offload: Whether each of its networks is on the GPU only while it works.
    """

    generated: str | None
    reference: str
    split: str
    extractor: Sequence[str]
    prompts: str | None
    model: str | None
    drawing: Mapping[str, Any]
    count: int | None
    json: bool
    batch_size: int
    device: str
    compile: bool
    offload: bool

    def __post_init__(self) -> None:
        if self.generated is not None and self.model is not None:
            raise ArgumentError("GENERATED and --model both say what to measure; leave one of them out.")
        if self.generated is None and self.model is None:
            raise ArgumentError("there is nothing to measure; give GENERATED, or --model and --prompts.")
        if self.model is not None and self.prompts is None:
            raise ArgumentError("--model needs prompts to draw images from; give --prompts FILE.")
        given = [*self.drawing, *(["count"] if self.count is not None else [])]
        given += [name for name in ("compile", "offload") if getattr(self, name)]
        if self.model is None and given:
            option = given[0].replace("_", "-")
            raise ArgumentError(f"--{option} belongs to --model, and there is none; leave it out.")

    def generation(self) -> Generation:
        """Return what to draw, with the defaults of `sdkit generate`."""
        from sdkit.pipelines.generation import Generation

        given = {"model": self.model, **self.drawing}
        return Generation(**given)


def add_evaluate_commands(commands: Commands) -> None:
    """Add `evaluate` and its sub-commands."""
    evaluate = add_command_group(
        commands,
        "evaluate",
        "Measure images and VAEs, beside controls that show what numbers mean.",
        ("sdkit evaluate images outputs/ --reference photos/", "sdkit evaluate vae emoji runs/v/result --data photos/"),
    )
    _add_images(evaluate)
    _add_vae(evaluate)


def images(args: argparse.Namespace) -> int:
    """Compare generated images with real ones.

    Prints the Fréchet distance, KID, precision, and recall; with the extractor
    "inception" also the Inception score, with "clip" CMMD, and with --prompts
    the CLIP score. Below stand control rows: one half of the reference compared
    with the other, which is the best to expect, and the mean image, the worst.
    """
    from sdkit.cli.jobs import read_prompts
    from sdkit.data import open_examples
    from sdkit.evaluation import evaluate_images

    args.drawing = {name: value for name, value in given_settings(args).items() if name != "model"}
    settings = ImagesSettings(**{field.name: getattr(args, field.name) for field in fields(ImagesSettings)})
    prompts = read_prompts(settings.prompts) if settings.prompts else None
    reference = open_examples(settings.reference, split=settings.split)
    options: dict[str, Any] = {
        "extractors": settings.extractor,
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
    if settings.generated is not None:
        generated = open_examples(settings.generated, split=settings.split)
        found = evaluate_images(generated, reference, prompts=prompts, **options)
    else:
        draw, count = _drawing(settings, prompts or [])
        # Drawing needs prompts, but no CLIP, and the usual one does not ship: measure the score only if one is named.
        scored = prompts if any(name.partition(":")[0] == "clip" for name in settings.extractor) else None
        found = evaluate_images(draw, reference, prompts=scored, count=count, **options)
    if is_main_process():
        if settings.json:
            say_json(found.asdict())
        else:
            _print_tables(found)
        _complain_of_skipped(found)
    return 1 if found.skipped else 0


def _drawing(settings: ImagesSettings, prompts: Sequence[str]) -> tuple[Callable[[range], list[Image.Image]], int]:
    """Return the function that draws images by their numbers, and their count. It loads the model when it is called."""
    from sdkit.arguments import first_seed, whole_number

    generation = settings.generation()
    generation.check()
    check_guidance(dict(settings.drawing), generation)
    repeats = 1 if settings.count is None else whole_number("count", settings.count, 1)
    first_seed(generation.seed, repeats * len(prompts))

    loras, _ = generation.loras()
    embeddings, _ = generation.embeddings()

    @functools.cache
    def model() -> StableDiffusion:
        sd = _load(settings, generation)
        for lora, scale in loras:
            sd.merge_lora(lora, scale)
        for embedding in embeddings:
            sd.add_embedding(embedding)
        return sd

    def draw(numbers: range) -> list[Image.Image]:
        texts = [prompts[number // repeats] for number in numbers]
        seeds = [generation.seed + number for number in numbers]
        drawn: list[Image.Image] = model()(texts, seed=seeds, **generation.options())
        return drawn

    return draw, repeats * len(prompts)


def _load(settings: ImagesSettings, generation: Generation) -> StableDiffusion:
    from sdkit.evaluation.sharing import own_share
    from sdkit.pipelines.text_to_image import StableDiffusion

    return StableDiffusion.from_pretrained(
        generation.model, dtype=generation.dtype, device=own_share(settings.device).device,
        revision=generation.revision, variant=generation.variant, config=generation.config,
        prediction_type=generation.prediction_type, vae=generation.vae, compile=settings.compile,
        offload=settings.offload,
    )  # fmt: skip


def _print_tables(found: ImageEvaluation) -> None:
    """Print a table for each extractor: its name, and a row for the images and for each control."""
    names = dict.fromkeys(score.extractor for row in found.rows for score in row.scores)
    for i, name in enumerate(names):
        scores = [score for row in found.rows for score in row.scores if score.extractor == name]
        metrics = [metric for metric in COLUMNS if any(score.metric == metric for score in scores)]
        say(printable(f"{chr(10) * bool(i)}{name}: {scores[0].width} features; images {scores[0].resizing}"))
        heads = ["", "N", "compared with", *(COLUMNS[metric][0] for metric in metrics)]
        rows = [row for row in found.rows if any(score.extractor == name for score in row.scores)]
        say_table([heads, *(_cells(row, name, metrics) for row in rows)])


def _cells(row: Row, extractor: str, metrics: Sequence[str]) -> list[str]:
    """Return the cells of a table's row."""
    first = next(score for score in row.scores if score.extractor == extractor)
    cells = [row.name, str(first.count), "" if first.reference_count is None else str(first.reference_count)]
    for metric in metrics:
        score = row.get(metric, extractor)
        _, factor, digits = COLUMNS[metric]
        if score is None:
            cells.append("-")
            continue
        bounds = "" if score.interval is None else " ({:.{d}f} to {:.{d}f})".format(*score.interval, d=digits)
        cells.append(f"{score.value * factor:.{digits}f}{bounds}")
    return cells


def _complain_of_skipped(found: ImageEvaluation | VAEEvaluation) -> None:
    for name, reason in found.skipped[:SHOWN]:
        complain(f"{name} is skipped: {reason}")
    if len(found.skipped) > SHOWN:
        complain(f"{len(found.skipped) - SHOWN} more images are skipped.")


SHEET = "vae-evaluation.png"
CONTROLS = ("pixels", "blur")
"""Controls that `sdkit evaluate vae` adds to its tables: one loses nothing, the other all but blocks of 16 pixels."""


def vae(args: argparse.Namespace) -> int:
    """Encode and decode images with VAEs, and compare what they lose.

    Prints PSNR, SSIM, LPIPS, and the Fréchet distance between the images and
    their reconstructions (rFID); mean and standard deviation of the latents; and
    speed and memory. Two control rows stand below: the pixels themselves, which
    lose nothing, and a blur that keeps one colour of each 16 x 16 pixels. The
    worst and the best reconstructions of each VAE are drawn side by side.
    """
    from sdkit.cli.jobs import check_writable
    from sdkit.data import open_examples
    from sdkit.evaluation import evaluate_vae, open_extractor, reconstruction_sheet
    from sdkit.evaluation.sharing import own_share
    from sdkit.networks.autoencoder import VAE
    from sdkit.networks.lpips import LPIPS

    named = None if args.sheet is None else Path(args.sheet)
    if named is not None and named.suffix.lower() != ".png":
        raise ArgumentError(f"the sheet {named} must be a .png; give another name.")
    check_writable(named or Path(SHEET), is_file=True)
    sources = list(dict.fromkeys(args.sources))
    for source in sources[1:]:  # a wrong one is reported before the first has been measured
        if source not in CONTROLS:
            VAE.from_pretrained(source, dtype=args.dtype, device="cpu")
    examples, device = open_examples(args.data, split=args.split), own_share(args.device).device
    options: dict[str, Any] = {
        "size": args.size[0] if len(args.size) == 1 else tuple(args.size),
        "lpips": LPIPS.from_pretrained(args.lpips).to(device),
        "extractor": open_extractor(args.extractor, device=device),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": device,
    }
    found = [evaluate_vae(source, examples, **options) for source in sources]
    controls = [evaluate_vae(source, examples, **options) for source in CONTROLS if source not in sources]
    if is_main_process():
        sheet = _save_sheet(reconstruction_sheet(found), named)
        if args.json:
            rows = {"vaes": [one.asdict() for one in found], "controls": [one.asdict() for one in controls]}
            say_json({"data": args.data, **rows, "sheet": sheet})
        else:
            _print_vaes([*found, *controls], options["extractor"].resizing)
            say(printable(f"The worst and the best reconstructions: {sheet}"))
        _complain_of_skipped(found[0])
    return 1 if found[0].skipped else 0


def _save_sheet(sheet: Image.Image, named: Path | None) -> Path:
    """Write the sheet to the file that the user named, or else to a new one. Return its path.

    As with `--out` of `sdkit generate`: a file that is named is replaced, any other file stays.
    """
    from sdkit import images as image_io

    if named is not None:
        image_io.save(sheet, named)
        return named
    first = Path(SHEET)
    names = (first.with_stem(f"{first.stem}-{n}") for n in itertools.count(2))
    for path in itertools.chain([first], names):
        with contextlib.suppress(FileExistsError):
            image_io.save(sheet, path, overwrite=False)
            return path
    raise AssertionError("there are always more names")


def _print_vaes(found: Sequence[VAEEvaluation], resizing: str) -> None:
    """Print a table of what VAEs lose and cost, and a table of their latents."""
    first = found[0]
    height, width = first.size
    say(f"{first.images} images of {width} x {height} pixels; LPIPS with {first.lpips_network}")
    say(printable(f"rFID with {first.extractor}: images {resizing}"))
    heads = ("VAE", "PSNR (dB)", "SSIM", "LPIPS", "rFID", "encode (1/s)", "decode (1/s)", "memory (MB)")
    say_table([heads, *(
        (one.vae, f"{one.psnr:.2f}", f"{one.ssim:.4f}", _decimal(one.lpips), _decimal(one.rfid),
         f"{one.encoded_per_second:.1f}", f"{one.decoded_per_second:.1f}",
         "-" if one.peak_memory is None else f"{one.peak_memory / 1e6:.0f}")
        for one in found
    )])  # fmt: skip
    say("")
    channels = ("latents of", "mean of each channel", "standard deviation", "scale", "scale for 1", "noise (%)")
    say_table([channels, *(
        (one.vae, _numbers(one.latent_mean), _numbers(one.latent_std), f"{one.scale:.4f}", f"{one.unit_scale:.4f}",
         f"{100 * one.noise_share:.2g}")
        for one in found
    )])  # fmt: skip


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _numbers(values: Sequence[float]) -> str:
    shown = " ".join(f"{value:.2f}" for value in values[:MOST_CHANNELS])
    return shown + (" ..." if len(values) > MOST_CHANNELS else "")


def _add_images(commands: Commands) -> None:
    parser = add_command(
        commands,
        images,
        usage="[GENERATED] --reference DATA [OPTION ...]",
        examples=(
            "sdkit evaluate images outputs/ --reference photos/",
            "sdkit evaluate images outputs/ --reference photos/ --extractor dinov2 clip",
            "sdkit evaluate images outputs/ --reference photos/ --prompts prompts.txt",
            "sdkit evaluate images -m runs/u/result --prompts p.txt --reference photos/",
            "accelerate launch -m sdkit evaluate images outputs/ --reference photos/",
        ),
    )
    add = parser.add_argument_group("what to measure").add_argument
    kinds = "a folder of images, .tar or .parquet files, or a data set's id on the Hub"
    add("generated", nargs="?", metavar="GENERATED", help=f"The generated images: {kinds}")
    add("--reference", required=True, metavar="DATA", help="Real images, of the same kinds; at least as many")
    add("--split", default="train", metavar="NAME", help="Split of a data set on the Hub (default: train)")
    prompts = (
        "File of the prompts of the images, one per line, in the order of their names; each may have several "
        "successive images. Adds the CLIP score and the extractor clip; with --model only if clip is named"
    )
    add("--prompts", metavar="FILE", help=prompts)
    add = parser.add_argument_group("how to measure").add_argument
    extractor = (
        "Feature extractors: alex (embedded), inception (the FID's), dinov2, or clip; with :SOURCE, such as "
        "clip:FOLDER, for other weights than the usual. clip:emoji is embedded, for images of emoji (default: alex)"
    )
    add("--extractor", nargs="+", default=["alex"], metavar="NAME[:SOURCE]", help=extractor)
    add = parser.add_argument_group("model that draws the images, in place of GENERATED").add_argument
    add("--model", "-m", metavar="SOURCE", help='A Hub id, a folder, a single file, or "emoji"; needs --prompts')
    add("--revision", metavar="NAME", help="Branch, tag, or commit of a Hub id", **UNSET)
    add("--variant", metavar="NAME", help='Variant of the weights, such as "fp16"', **UNSET)
    config_option(add, **UNSET)
    vae_option(add, **UNSET)
    add_on_options(add)
    add = parser.add_argument_group("how that model draws").add_argument
    prompt_options(add)
    add(
        "--num-images-per-prompt",
        "--count",
        dest="count",
        type=int,
        metavar="N",
        help="Images per prompt (default: 1)",
    )
    for name, option in drawing_options().items():
        if name not in OF_INPUTS:
            option.add_to(add)
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="Print the scores as JSON")
    add = parser.add_argument_group("speed and memory").add_argument
    add("--batch-size", type=int, default=32, metavar="N", help="Images in one pass (default: 32)")
    place_options(add, **UNSET)
    offload_option(add)


def _add_vae(commands: Commands) -> None:
    parser = add_command(
        commands,
        vae,
        usage="SOURCE ... --data DATA [OPTION ...]",
        examples=(
            "sdkit evaluate vae emoji runs/v/result --data photos/",
            "sdkit evaluate vae sd-v1-5.safetensors --data photos/ --size 512 --json",
            "accelerate launch -m sdkit evaluate vae emoji --data photos/",
        ),
    )
    add = parser.add_argument_group("what to measure").add_argument
    sources = 'VAEs, or models with one: Hub ids, folders, single files, or "emoji", the embedded model'
    add("sources", nargs="+", metavar="SOURCE", help=sources)
    data = "Images to encode and decode: a folder of images, .tar or .parquet files, or a data set's id on the Hub"
    add("--data", required=True, metavar="DATA", help=data)
    add("--split", default="train", metavar="NAME", help="Split of a data set on the Hub (default: train)")
    add = parser.add_argument_group("how to measure").add_argument
    size = "Side of the images, or height and width; larger ones are reduced and cropped, smaller ones are skipped"
    add("--size", nargs="+", type=int, default=[256], metavar="PIXELS", help=f"{size} (default: 256)")
    lpips = "Weights of LPIPS: alex (embedded), vgg, a file, or a Hub id (default: alex)"
    add("--lpips", default="alex", metavar="SOURCE", help=lpips)
    extractor = "Feature extractor of rFID: alex (embedded), inception (the FID's), dinov2, or clip (default: alex)"
    add("--extractor", default="alex", metavar="NAME[:SOURCE]", help=extractor)
    add = parser.add_argument_group("output").add_argument
    sheet = f"Picture of the worst and the best reconstructions (default: {SHEET}, or a new name where that exists)"
    add("--sheet", metavar="FILE", help=sheet)
    add("--json", action="store_true", help="Print the measurements as JSON")
    add = parser.add_argument_group("speed and memory").add_argument
    batch_size_option(add)
    dtype = "Precision of the VAEs; auto is bf16 where the hardware supports it, else fp32 (default: auto)"
    add("--dtype", default="auto", metavar=choices(DTYPES), help=dtype)
    device_option(add)
