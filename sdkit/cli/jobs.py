"""Jobs on files: the work behind the commands, as functions that Python code can call, too.

Inputs are processed in batches, and each output is written atomically as soon as it is finished. A folder may therefore
be of any size, and an interrupted job keeps its finished files. An input that cannot be used is reported and skipped. A
wrong argument, or an output folder that cannot be written, raises `SdkitError`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from PIL import Image

from sdkit import __version__, images
from sdkit.arguments import first_seed, strings, whole_number
from sdkit.data import latent_file as latents
from sdkit.diffusion.samplers import Step, default_spacing
from sdkit.errors import ArgumentError, LatentError, SdkitError
from sdkit.evaluation import similarity as metrics
from sdkit.file_search import find_files
from sdkit.files import check_name, encodable, status, utf8_name
from sdkit.messages import reason
from sdkit.networks.autoencoder import VAE
from sdkit.networks.controlnet import ControlNet
from sdkit.networks.tiling import check_tile
from sdkit.pipelines.cascade import Cascade
from sdkit.pipelines.generation import Generation
from sdkit.pipelines.inpainting import open_canvas
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.progress import progress

PROMPTS = 64 * 2**20  # largest size, in bytes, of a file of prompts
PATIENCE = 5  # seconds to wait for the first byte from a named pipe
PIXELS_HELD = 2048 * 2048  # a batch has at least this many pixels: about 50 MB in float32

T = TypeVar("T")
Result = TypeVar("Result")
Sized = TypeVar("Sized", Image.Image, latents.Latent)  # a loaded input; both types have a width and a height
Batch: TypeAlias = list[tuple[Path, Sized]]


@dataclass(frozen=True, kw_only=True)
class Report(Generic[T]):
    """Results of a job, added while it runs.

    Attributes:
        done: One result for each finished output.
        failed: Inputs that could not be used, each with a sentence that says why.
        on_done: Called with each result as soon as its output is written.
    """

    done: list[T] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    on_done: Callable[[T], object] = lambda _: None

    def add(self, result: T) -> None:
        """Add the result of a finished output."""
        self.done.append(result)
        self.on_done(result)

    def fail(self, source: Path, error: SdkitError) -> None:
        """Add an input that cannot be used, with the error's message. A path that the message lacks is put in front."""
        self.failed.append((source, str(error) if str(source) in str(error) else f"{source}: {error}"))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Scores of an image that was encoded and decoded.

    Attributes:
        source: The image.
        path: A PNG of the original beside its reconstruction.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        psnr: Peak signal-to-noise ratio in dB; infinite if the reconstruction equals the image.
        ssim: Structural similarity, at most 1; None for an image that is smaller than the window of 11 x 11 pixels.
    """

    source: Path
    path: Path
    height: int
    width: int
    psnr: float
    ssim: float | None


def check_files(out: str | Path, *, batch_size: int | None = None, tile: int | None = None, seed: int = 0) -> None:
    """Raise `SdkitError` for arguments that the jobs below reject whatever the model, before one is loaded.

    Args:
        out: The output folder, which must be writable.
        batch_size: Images per batch; None takes as many as fit.
        tile: Side of tiles in pixels. Refused here only if it is too small for every VAE; a VAE may need more.
        seed: Seed of the first file.
    """
    whole_number("seed", seed, 0, 2**62)  # the seeds of later files are larger, and must stay below 2**63
    if batch_size is not None:
        whole_number("batch_size", batch_size, 1)
    check_tile(tile)
    check_writable(Path(out))


def encode_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "latents",
    *,
    sample: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    tile: int | None = None,
    report: Report[Path] | None = None,
) -> Report[Path]:
    """Encode images to latent files.

    Args:
        vae: The autoencoder.
        paths: Images, or folders that are searched for images.
        out: Output folder. Sub-folders of the input folders are recreated in it.
        sample: Whether to draw from the posterior; False takes its mean.
        seed: Random seed. File i, counted from 0, is sampled with `seed` + i, even if files before it cannot be read.
        batch_size: Images per batch; None takes as many as fit.
        tile: Side, in pixels, of the tiles that large images are cut into, as in `VAE.encode`.
        report: The report to add to; None makes a new one.

    Returns:
        The report, with the paths of the latent files.

    Raises:
        SdkitError: An argument is wrong, there is no input, or an output cannot be written.
    """
    check_files(out, batch_size=batch_size, tile=tile, seed=seed)
    check_tile(tile, vae.factor)
    targets = _targets(paths, images.READABLE, out, ".safetensors")
    seeds = {source: seed + i for i, source in enumerate(targets)}

    def encode(batch: Batch[Image.Image]) -> Any:
        generators = [torch.Generator().manual_seed(seeds[source]) for source, _ in batch]
        pictures = [image for _, image in batch]
        return vae.encode(pictures, sample=sample, generator=generators, batch_size=batch_size, tile=tile)

    def write(source: Path, image: Image.Image, z: torch.Tensor) -> Path:
        latent = latents.Latent(
            z=z, height=image.height, width=image.width, vae=vae.identity, vae_name=vae.name, scale=vae.scale,
            shift=vae.shift, factor=vae.factor, dtype=str(vae.dtype).removeprefix("torch."), sdkit=__version__,
            source=os.fsencode(source.name).decode(errors="replace"),
        )  # fmt: skip
        latents.save(latent, targets[source])
        return targets[source]

    return _process(targets, images.read, encode, write, batch_size, report, "encode")


def decode_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "decoded",
    *,
    force: bool = False,
    batch_size: int | None = None,
    tile: int | None = None,
    report: Report[Path] | None = None,
) -> Report[Path]:
    """Decode latent files to PNGs of the original sizes.

    Args:
        vae: The autoencoder.
        paths: Latent files, or folders that are searched for them.
        out: Output folder. Sub-folders of the input folders are recreated in it.
        force: Whether to decode latents of another VAE too, if their shape fits.
        batch_size: Latents per batch; None takes as many as fit.
        tile: Side, in pixels, of the tiles that large images are cut into, as in `VAE.decode`.
        report: The report to add to; None makes a new one.

    Returns:
        The report, with the paths of the PNGs.

    Raises:
        SdkitError: An argument is wrong, there is no input, or an output cannot be written.
    """

    def load(path: Path) -> latents.Latent:
        latent = latents.load(path)
        latents.check_vae(latent, vae.identity, force, scale=vae.scale, shift=vae.shift)
        if (len(latent.z), latent.factor) != (vae.channels, vae.factor):
            raise LatentError(f"{len(latent.z)} channels of factor {latent.factor} do not fit this VAE; use another.")
        return latent

    def decode(batch: Batch[latents.Latent]) -> Any:
        sizes = [(latent.height, latent.width) for _, latent in batch]
        zs = [latent.z for _, latent in batch]
        return vae.decode(zs, size=sizes, batch_size=batch_size, tile=tile)

    def write(source: Path, _: latents.Latent, image: Image.Image) -> Path:
        images.save(image, targets[source])
        return targets[source]

    check_files(out, batch_size=batch_size, tile=tile)
    check_tile(tile, vae.factor)
    targets = _targets(paths, {".safetensors"}, out, ".png")
    return _process(targets, load, decode, write, batch_size, report, "decode")


def reconstruct_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "reconstructions",
    *,
    batch_size: int | None = None,
    tile: int | None = None,
    report: Report[Reconstruction] | None = None,
) -> Report[Reconstruction]:
    """Encode and decode images, write PNGs of originals beside reconstructions, and measure the differences.

    Args:
        vae: The autoencoder.
        paths: Images, or folders that are searched for images.
        out: Output folder. Sub-folders of the input folders are recreated in it.
        batch_size: Images per batch; None takes as many as fit.
        tile: Side, in pixels, of the tiles that large images are cut into, as in `VAE.reconstruct`.
        report: The report to add to; None makes a new one.

    Returns:
        The report, with a `Reconstruction` for each image.

    Raises:
        SdkitError: An argument is wrong, there is no input, or an output cannot be written.
    """

    def reconstruct(batch: Batch[Image.Image]) -> Any:
        return vae.reconstruct([image for _, image in batch], batch_size=batch_size, tile=tile)

    def write(source: Path, x: Image.Image, y: Image.Image) -> Reconstruction:
        path = targets[source]
        images.save(images.grid([x, y], 2, padding=4), path)
        psnr = metrics.psnr(x, y).item()
        ssim = metrics.ssim(x, y).item() if min(x.size) >= metrics.WINDOW else None
        return Reconstruction(source=source, path=path, height=x.height, width=x.width, psnr=psnr, ssim=ssim)

    check_files(out, batch_size=batch_size, tile=tile)
    check_tile(tile, vae.factor)
    targets = _targets(paths, images.READABLE, out, "-reconstruction.png")
    return _process(targets, images.read, reconstruct, write, batch_size, report, "reconstruct")


def mean_scores(done: Sequence[Reconstruction]) -> tuple[float | None, float | None]:
    """Return the mean PSNR, and the mean SSIM of the images that have one. A mean over no images is None."""
    psnrs = [one.psnr for one in done]
    ssims = [one.ssim for one in done if one.ssim is not None]
    return fmean(psnrs) if psnrs else None, fmean(ssims) if ssims else None


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a UTF-8 file, one per line; empty lines, and lines that begin with #, are skipped.

    Args:
        path: A file, a named pipe to which another process writes within 5 seconds, or "-" for standard input.

    Raises:
        ArgumentError: The file cannot be read, is not UTF-8, is too large, or holds no prompt.
    """
    if str(path) == "-" and sys.stdin is None:
        raise ArgumentError("there is no standard input to read prompts from; name a file of them.")
    try:
        data = sys.stdin.buffer.read(PROMPTS + 1) if str(path) == "-" else _read_prompts(path)
        if len(data) > PROMPTS:
            raise ArgumentError(f"{path} is larger than {PROMPTS // 2**20} MiB: no file of prompts is; check the name.")
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ArgumentError(f"cannot read the prompts in {path}: {reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 text, as a file of prompts has to be; save it as such.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ArgumentError(f"there is no prompt in {path}; write one a line.")
    return prompts


def _read_prompts(path: str | Path) -> bytes:
    """Read the bytes of a file or of a named pipe, without waiting forever for the pipe's other end."""
    if not stat.S_ISFIFO(status(path).st_mode):
        with Path(path).open("rb") as file:
            return file.read(PROMPTS + 1)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opens the pipe at once, even without a writer
    with os.fdopen(descriptor, "rb") as pipe:
        select.select([pipe], [], [], PATIENCE)
        os.set_blocking(descriptor, True)
        return pipe.read(PROMPTS + 1)  # returns b"" at once if the pipe has no writer


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """Arguments of `generate_files` that have been checked, and the images that they name, read once.

    Attributes:
        prompts: The prompts.
        out: A folder, or a .png for a single image.
        generation: Settings of the images, with the SHA-256 of each input.
        count: Images per prompt.
        batch_size: Images generated together; None takes as many as fit.
        inputs: The image, the mask, and the condition, as keywords of the pipeline's call.
        control_images: The images of the ControlNets.
    """

    prompts: Sequence[str]
    out: Path
    generation: Generation
    count: int
    batch_size: int | None
    inputs: Mapping[str, Image.Image]
    control_images: Sequence[Image.Image]


def check_generation(
    prompts: Sequence[str], out: str | Path, generation: Generation, *, count: int = 1, batch_size: int | None = None
) -> GenerationJob:
    """Check the arguments of `generate_files` before a model is loaded, and read the images that they name.

    Args:
        prompts: At least one prompt.
        out: A folder, or a .png for a single image.
        generation: Settings of the images.
        count: Images per prompt.
        batch_size: Images generated together; None takes as many as fit.

    Raises:
        SdkitError: An argument is wrong whatever the model, or `out` cannot be written.
    """
    generation.check()
    inputs, generation = generation.inputs()
    control_images, generation = generation.control_images()
    if "image" in inputs:
        open_canvas(inputs["image"], inputs.get("mask_image"), generation, prompts=1, copies=1, side=512)
    prompts = strings("prompts", prompts)
    check_drawing(prompts, out, generation.seed, count=count, batch_size=batch_size)
    return GenerationJob(
        prompts=prompts, out=Path(out), generation=generation, count=count, batch_size=batch_size, inputs=inputs,
        control_images=control_images,
    )  # fmt: skip


def check_drawing(
    prompts: Sequence[str], out: str | Path, seed: int, *, count: int = 1, batch_size: int | None = None
) -> None:
    """Raise SdkitError for arguments of `write_drawings` that cannot be, or if `out` cannot be written."""
    n = len(strings("prompts", prompts)) * whole_number("count", count, 1)
    first_seed(seed, n)
    if batch_size is not None:
        whole_number("batch_size", batch_size, 1)
    if is_image_name(Path(out)) and (Path(out).suffix.lower() != ".png" or n > 1):
        raise ArgumentError(f"{out} cannot hold {n} PNG image(s); give a folder, or a .png for a single image.")
    check_writable(Path(out), is_file=is_image_name(Path(out)))


def write_drawings(
    prompts: Sequence[str],
    seed: int,
    draw: Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]],
    describe: Callable[[str, int, Image.Image], Mapping[str, str]],
    out: Path,
    *,
    count: int,
    at_once: int,
    grid: bool,
    report: Report[Path],
) -> None:
    """Draw `count` images of each prompt, and write them as PNGs.

    Args:
        prompts: The prompts.
        seed: Seed of the first image; image i, counted over all prompts, has `seed` + i.
        draw: Returns an image for each prompt and seed of a batch.
        describe: Returns the text chunks of the PNG of an image, given its prompt and seed.
        out: As in `generate_files`.
        count: Images per prompt.
        at_once: Images in a batch.
        grid: Whether to write also a grid of all images, with labels.
        report: The report to add to.

    Raises:
        SdkitError: An argument does not fit the model, or an output cannot be written.
    """
    repeated = itertools.product(prompts, range(count))
    wanted = ((prompt, seed + i) for i, (prompt, _) in enumerate(repeated))
    batches = iter(lambda: list(itertools.islice(wanted, at_once)), [])  # stops at the first empty batch
    numbers = _numbers(out)
    labelled: dict[str, Image.Image] = {}  # label -> image, for the grid
    for batch in progress(batches, total=-(-len(prompts) * count // at_once), description="generate"):
        texts, seeds = zip(*batch, strict=True)
        for text, own, image in zip(texts, seeds, draw(texts, seeds), strict=True):
            report.add(_save(image, out, f"{_slug(text)}-{own}", numbers, describe(text, own, image)))
            if grid:
                labelled[f"seed {own}: {text}"] = image
    if grid:
        sheet = images.grid([*labelled.values()], count if count > 1 else None, padding=6, captions=[*labelled])
        beside = out.with_stem(f"{out.stem}-grid") if is_image_name(out) else out
        report.add(_save(sheet, beside, "grid", numbers))


def generate_files(
    sd: StableDiffusion,
    prompts: Sequence[str],
    out: str | Path = "outputs",
    generation: Generation | None = None,
    *,
    count: int = 1,
    grid: bool = False,
    batch_size: int | None = None,
    controlnets: Sequence[ControlNet] = (),
    upsamplers: Sequence[StableDiffusion] = (),
    report: Report[Path] | None = None,
    callback: Callable[[Step], object] | None = None,
) -> list[Path]:
    """Generate `count` images of each prompt, as PNGs with their `Generation` in the metadata.

    Args:
        sd: The model.
        prompts: At least one prompt.
        out: A folder, or a .png for a single image. In a folder, numbers continue after the highest one there, and no
            file is overwritten, even if several runs share the folder.
        generation: Settings of the images; None takes the defaults. Its prompt is ignored. Image i, counted over all
            prompts, has the seed `generation.seed` + i.
        count: Images per prompt.
        grid: Whether to write also a grid of all images, with labels.
        batch_size: Images generated together; None takes as many as fit.
        controlnets: The ControlNets that `generation.controlnet` names.
        upsamplers: The upsamplers that `generation.upsampler` names.
        report: The report to add to; None makes a new one.
        callback: Called with each `Step` of each batch, for example a `PreviewFile`.

    Returns:
        The paths of the PNGs.

    Raises:
        SdkitError: An argument is wrong, or an output cannot be written.
    """
    job = check_generation(prompts, out, generation or Generation(), count=count, batch_size=batch_size)
    return run_generation(
        sd, job, grid=grid, controlnets=controlnets, upsamplers=upsamplers, report=report, callback=callback
    )


def run_generation(
    sd: StableDiffusion,
    job: GenerationJob,
    *,
    grid: bool = False,
    controlnets: Sequence[ControlNet] = (),
    upsamplers: Sequence[StableDiffusion] = (),
    report: Report[Path] | None = None,
    callback: Callable[[Step], object] | None = None,
) -> list[Path]:
    """Generate the images of a job. For the other arguments see `generate_files`.

    Raises:
        SdkitError: An argument does not fit the model, or an output cannot be written.
    """
    report = report or Report()
    generation, out = job.generation, job.out
    drawn_on = [job.inputs[name] for name in ("image", "condition") if name in job.inputs] or job.control_images
    inputs: dict[str, Any] = {**job.inputs}
    if controlnets:
        inputs |= {"controlnet": [*controlnets], "control_image": [*job.control_images]}
    side = sd.unet.sample_size * sd.vae.factor
    whole_size = drawn_on and generation.padding_mask_crop is None  # a region is about as large as a training image
    width, height = drawn_on[0].size if whole_size else (side, side)
    at_once = job.batch_size or sd.images_at_once(generation.height or height, generation.width or width)
    cascade = Cascade([sd, *upsamplers]) if upsamplers else None
    if generation.noise_level is not None:
        inputs["noise_level"] = generation.noise_level

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        if cascade is not None:
            return _enlarged(cascade, prompts, seeds, generation, job.batch_size)
        drawn: list[Image.Image] = sd(
            prompts, seed=seeds, batch_size=len(prompts), callback=callback, **generation.options(), **inputs
        )
        return drawn

    def describe(prompt: str, seed: int, image: Image.Image) -> dict[str, str]:
        own = replace(
            generation, prompt=prompt, seed=seed, model=sd.name, dtype=str(sd.unet.dtype).removeprefix("torch.")
        )
        if cascade is not None:  # what is not given is each model's own
            return own.text()
        # The size of an enlarged region is not that of the image.
        sized: dict[str, Any] = (
            {} if generation.padding_mask_crop is not None else {"height": image.height, "width": image.width}
        )
        return replace(
            own, **sized,
            guidance_scale=sd.guidance_scale if generation.guidance_scale is None else generation.guidance_scale,
            spacing=generation.spacing or default_spacing(generation.sampler) or sd.schedule.timestep_spacing,
        ).text()  # fmt: skip

    write_drawings(
        job.prompts, generation.seed, draw, describe, out, count=job.count, at_once=at_once, grid=grid, report=report
    )
    return report.done


def _enlarged(
    cascade: Cascade, prompts: Sequence[str], seeds: Sequence[int], generation: Generation, batch_size: int | None
) -> list[Image.Image]:
    """Draw an image of each prompt with the first model, and enlarge it with the others.

    Without a batch size, each model takes as many images at once as fit: an upsampler's are larger.
    """
    common = generation.options()
    base = {name: common.pop(name) for name in ("height", "width")}
    above = {} if generation.noise_level is None else {"noise_level": generation.noise_level}
    drawn: list[Image.Image] = cascade(
        prompts, common.pop("negative_prompt"), seed=seeds, batch_size=batch_size,
        options=[base, *[above] * (len(cascade.stages) - 1)], **common,
    )  # fmt: skip
    return drawn


def is_image_name(out: Path) -> bool:
    """Return whether `out` names an image file rather than a folder."""
    return out.suffix.lower() in images.FORMATS and not os.path.isdir(out)  # noqa: PTH112 - pathlib's may raise


def _save(
    image: Image.Image, out: Path, stem: str, numbers: Iterable[int], text: Mapping[str, str] | None = None
) -> Path:
    """Write a PNG to the file `out`, or into the folder `out` under the first free number. Return its path."""
    if is_image_name(out):
        images.save(image, out, text)
        return out
    for number in numbers:
        path = out / f"{number:04d}-{stem}.png"
        with contextlib.suppress(FileExistsError):  # another run has just taken the name
            images.save(image, path, text, overwrite=False)
            return path
    raise AssertionError("there are always more numbers")


def _numbers(folder: Path) -> Iterator[int]:
    """Yield increasing numbers for new files, each above the numbers of all files in `folder` at that time."""
    last = 0
    while True:
        with contextlib.suppress(OSError):
            found = (re.match(r"(\d{4,})-", file.name, re.ASCII) for file in folder.iterdir())
            last = max(last, *(int(match[1]) for match in found if match), 0)
        last += 1
        yield last


def _slug(prompt: str) -> str:
    """Return a prompt as a slug for file names: at most 40 letters, digits, and hyphens (160 bytes)."""
    slug = re.sub(r"[\W_]+", "-", encodable(prompt).lower())[:40].strip("-") or "image"
    return os.fsdecode(slug.encode())  # the name on disk is UTF-8 whatever the locale


def check_writable(path: Path, *, is_file: bool = False) -> None:
    """Raise SdkitError if a folder or a file cannot be written, before any work is done for it."""
    try:
        check_name(path)
        above = path.parents if is_file else (path, *path.parents)
        tempfile.TemporaryFile(dir=next(folder for folder in above if folder.exists())).close()
    except OSError as error:
        raise SdkitError(f"cannot write into {path}: {reason(error)}; give another folder.") from error


def _targets(paths: Iterable[str | Path], suffixes: Collection[str], out: str | Path, ending: str) -> dict[Path, Path]:
    """Return the output path of each input: its path relative to the given folder, placed in `out`, with `ending`.

    Inputs whose names differ only in the suffix keep it in the output's name. No output overwrites an input. If `out`
    lies inside an input folder, the files in `out` are taken for outputs of an earlier run, and skipped.
    """
    names, folder = list(paths), Path(out)
    unreadable = images.UNREADABLE if ".png" in suffixes else ()
    sources, given = find_files(names, suffixes, unreadable), [Path(name) for name in names]
    roots = {source: next((root for root in given if root in source.parents), source.parent) for source in sources}
    earlier = {source for source in sources if _is_in(source, folder) and _is_in(folder, roots[source])}
    below = {source: source.relative_to(roots[source]) for source in sources if source not in earlier}
    # Names are compared without case: on some file systems "a.png" and "A.png" are one file.
    shared = Counter(str(path.with_suffix("")).casefold() for path in below.values())
    taken = {os.path.realpath(source).casefold() for source in below}
    targets = {}
    for source, path in below.items():
        stem = path.with_name(path.stem if shared[str(path.with_suffix("")).casefold()] == 1 else path.name)
        name = utf8_name(str(stem))  # safetensors cannot open a file whose name is not UTF-8
        tries = (folder / f"{name}{f'-{n}' if n else ''}{ending}" for n in itertools.count())
        targets[source] = next(target for target in tries if os.path.realpath(target).casefold() not in taken)
        taken.add(os.path.realpath(targets[source]).casefold())
    return targets


def _is_in(path: Path, folder: Path) -> bool:
    """Return whether `path` lies in `folder`. Either may be relative; links are not followed."""
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents  # noqa: PTH100 - not `resolve`d


def _process(
    sources: Collection[Path],
    load: Callable[[Path], Sized],
    run: Callable[[Batch[Sized]], Sequence[Result]],
    write: Callable[[Path, Sized, Result], T],
    batch_size: int | None,
    report: Report[T] | None,
    name: str,
) -> Report[T]:
    """Load inputs, run a network on them in batches, and write each result as soon as its batch is finished.

    Args:
        sources: The inputs.
        load: Reads an input.
        run: Returns one result for each input of a batch.
        write: Writes a result, and returns its entry for the report.
        batch_size: Smallest number of inputs in a batch, except the last one; None is 1.
        report: The report to add to; None makes a new one.
        name: Name of the job, for its progress bar.
    """
    report = report or Report()
    for batch in _batches(sources, load, batch_size, report, name):
        for source, loaded, result in _results(run, batch, report):
            report.add(write(source, loaded, result))
    return report


def _results(
    run: Callable[[Batch[Sized]], Sequence[Result]], batch: Batch[Sized], report: Report[Any]
) -> Iterator[tuple[Path, Sized, Result]]:
    """Yield each input with its result.

    If `run` raises an SdkitError for a batch, its inputs are run one by one, so that only the faulty ones fail.
    """
    try:
        results = run(batch)
    except SdkitError as error:
        if len(batch) == 1:
            report.fail(batch[0][0], error)
            return
        for one in batch:
            yield from _results(run, [one], report)
    else:
        for (source, loaded), result in zip(batch, results, strict=True):
            yield source, loaded, result


def _batches(
    sources: Collection[Path], load: Callable[[Path], Sized], batch_size: int | None, report: Report[Any], name: str
) -> Iterator[Batch[Sized]]:
    """Load the inputs, and yield them in batches. Inputs that cannot be loaded are added to the report.

    Each batch except the last has at least `PIXELS_HELD` pixels and `batch_size` inputs.
    """
    batch: Batch[Sized] = []
    pixels = 0
    for source in progress(sources, total=len(sources), description=name):
        try:
            batch.append((source, load(source)))
        except SdkitError as error:
            report.fail(source, error)
            continue
        pixels += batch[-1][1].width * batch[-1][1].height
        if pixels >= PIXELS_HELD and len(batch) >= (batch_size or 1):
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch
