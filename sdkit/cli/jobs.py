"""File-level jobs: what the command line does, as functions for Python users too.

Files go through a batch at a time and each is written as soon as it is done, whole or not at all: a folder of any size
fits in memory, and an interrupted run keeps what it finished. An input that cannot be used is reported and the others
are done; anything wrong with the job itself (an argument, the output folder) raises `SdkitError` and ends it.
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
from sdkit.arguments import strings, whole_number
from sdkit.data import latent_file as latents
from sdkit.errors import ArgumentError, LatentError, SdkitError
from sdkit.evaluation import similarity as metrics
from sdkit.file_search import find_files
from sdkit.files import check_name, encodable, status, utf8_name
from sdkit.messages import reason
from sdkit.networks.autoencoder import VAE
from sdkit.pipelines.generation import Generation
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.progress import progress

PROMPTS = 64 * 2**20  # bytes of the largest file of prompts
PATIENCE = 5  # seconds to wait for the first byte in a named pipe
PIXELS_HELD = 2048 * 2048  # of input read before they go through a network: about 50 MB in float32

T = TypeVar("T")
Sized = TypeVar("Sized", Image.Image, latents.Latent)  # have a width and a height
Batch: TypeAlias = list[tuple[Path, Sized]]


@dataclass(frozen=True, kw_only=True)
class Report(Generic[T]):
    """What became of a job's inputs."""

    done: list[T] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)  # inputs that could not be used, and why not
    on_done: Callable[[T], object] = lambda _: None  # called with each as soon as it is finished

    def add(self, one: T) -> None:
        """One more is finished."""
        self.done.append(one)
        self.on_done(one)

    def fail(self, source: Path, error: SdkitError) -> None:
        """An input cannot be used; the sentence names it."""
        self.failed.append((source, str(error) if str(source) in str(error) else f"{source}: {error}"))


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An image that went through a VAE and back."""

    source: Path
    path: Path  # the original beside its reconstruction
    height: int
    width: int
    psnr: float  # dB; infinite where the two are equal
    ssim: float | None  # None for an image smaller than SSIM's window of 11 x 11 pixels


def check_files(out: str | Path, *, batch_size: int | None = None, tile: int | None = None, seed: int = 0) -> None:
    """Raise `SdkitError` where the jobs below cannot take these, which can be told before a model is loaded."""
    whole_number("seed", seed, 0, 2**62)
    if batch_size is not None:
        whole_number("batch_size", batch_size, 1)
    if tile:
        whole_number("tile (0 is none)", tile, 128)
    _check_writable(Path(out))


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
    """Images, or folders of them, to latent files in `out`, with the sub-folders that they had.

    The i-th file is drawn from the posterior with `seed` + i, even where files before it are broken; `sample=False`
    takes the mean. `report`, here and below, is one to add to, which tells of the work while it goes on.
    """
    check_files(out, batch_size=batch_size, tile=tile, seed=seed)
    targets, report = _targets(paths, images.READABLE, out, ".safetensors"), report or Report()
    seeds = {source: seed + i for i, source in enumerate(targets)}

    def encode(batch: Batch[Image.Image]) -> Any:
        generators = [torch.Generator().manual_seed(seeds[source]) for source, _ in batch]
        pictures = [image for _, image in batch]
        return vae.encode(pictures, sample=sample, generator=generators, batch_size=batch_size, tile=tile)

    for batch in _batches(targets, images.read, batch_size, report, "encode"):
        for source, image, z in _made(encode, batch, report):
            latent = latents.Latent(
                z=z, height=image.height, width=image.width, vae=vae.identity, vae_name=vae.name, scale=vae.scale,
                shift=vae.shift, factor=vae.factor, dtype=str(vae.dtype).removeprefix("torch."), sdkit=__version__,
                source=os.fsencode(source.name).decode(errors="replace"),
            )  # fmt: skip
            latents.save(latent, targets[source])
            report.add(targets[source])
    return report


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
    """Latent files, or folders of them, to PNGs in `out`, of the original sizes. `force` takes another VAE's too."""

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

    check_files(out, batch_size=batch_size, tile=tile)
    targets, report = _targets(paths, {".safetensors"}, out, ".png"), report or Report()
    for batch in _batches(targets, load, batch_size, report, "decode"):
        for source, _, image in _made(decode, batch, report):
            images.save(image, targets[source])
            report.add(targets[source])
    return report


def reconstruct_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "reconstructions",
    *,
    batch_size: int | None = None,
    tile: int | None = None,
    report: Report[Reconstruction] | None = None,
) -> Report[Reconstruction]:
    """Images, or folders of them, through the VAE and back: in `out`, PNGs of originals beside reconstructions."""

    def reconstruct(batch: Batch[Image.Image]) -> Any:
        return vae.reconstruct([image for _, image in batch], batch_size=batch_size, tile=tile)

    check_files(out, batch_size=batch_size, tile=tile)
    targets, report = _targets(paths, images.READABLE, out, "-reconstruction.png"), report or Report()
    for batch in _batches(targets, images.read, batch_size, report, "reconstruct"):
        for source, x, y in _made(reconstruct, batch, report):
            path = targets[source]
            images.save(images.grid([x, y], 2, padding=4), path)
            psnr = metrics.psnr(x, y).item()
            ssim = metrics.ssim(x, y).item() if min(x.size) >= metrics.WINDOW else None
            one = Reconstruction(source=source, path=path, height=x.height, width=x.width, psnr=psnr, ssim=ssim)
            report.add(one)
    return report


def mean_scores(done: Sequence[Reconstruction]) -> tuple[float | None, float | None]:
    """Mean PSNR and mean SSIM, each of the images that have one."""
    ssims = [one.ssim for one in done if one.ssim is not None]
    return fmean(one.psnr for one in done) if done else None, fmean(ssims) if ssims else None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a UTF-8 file ("-": standard input), one a line; empty lines and # comments are skipped.

    It may be a pipe, if something is written to it within seconds.
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
    if not stat.S_ISFIFO(status(path).st_mode):
        with Path(path).open("rb") as file:
            return file.read(PROMPTS + 1)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # returns before the other end is opened
    with os.fdopen(descriptor, "rb") as pipe:
        select.select([pipe], [], [], PATIENCE)
        os.set_blocking(descriptor, True)
        return pipe.read(PROMPTS + 1)  # at once, and nothing, if the other end is not open


def check_generation(
    prompts: Sequence[str], out: str | Path, generation: Generation, *, count: int = 1, batch_size: int | None = None
) -> int:
    """How many images `generate_files` makes of these; raises what it would, but without a model."""
    generation.check()
    n = len(strings("prompts", prompts)) * whole_number("count", count, 1)
    if batch_size is not None:
        whole_number("batch_size", batch_size, 1)
    if _is_image_name(Path(out)) and (Path(out).suffix.lower() != ".png" or n > 1):
        raise ArgumentError(f"{out} cannot hold {n} PNG image(s); give a folder, or a .png for a single image.")
    _check_writable(Path(out), is_file=_is_image_name(Path(out)))
    return n


def generate_files(
    sd: StableDiffusion,
    prompts: Sequence[str],
    out: str | Path = "outputs",
    generation: Generation | None = None,
    *,
    count: int = 1,
    grid: bool = False,
    batch_size: int | None = None,
    report: Report[Path] | None = None,
) -> list[Path]:
    """`count` images of each prompt as PNGs that hold their recipes, numbered on from those in the folder `out`.

    `out` may be a file name ending in .png, for a single image; in a folder nothing is overwritten, by several runs at
    once neither. Image i has the seed `generation.seed` + i; `generation.prompt` is not used. `grid` adds one more
    picture, of all images with labels.
    """
    generation, report = generation or Generation(), report or Report()
    n = check_generation(prompts, out, generation, count=count, batch_size=batch_size)
    side = sd.unet.sample_size * sd.vae.factor
    at_once = batch_size or sd.images_at_once(generation.height or side, generation.width or side)
    wanted = ((prompt, generation.seed + r * count + c) for r, prompt in enumerate(prompts) for c in range(count))
    batches = iter(lambda: list(itertools.islice(wanted, at_once)), [])
    numbers = _numbers(Path(out))
    made: dict[str, Image.Image] = {}  # by caption
    for batch in progress(batches, total=-(-n // at_once), description="generate"):
        for (prompt, seed), image in zip(batch, _generate(sd, batch, generation), strict=True):
            one = replace(
                generation, prompt=prompt, seed=seed, height=image.height, width=image.width, model=sd.name,
                guidance_scale=sd.guidance_scale if generation.guidance_scale is None else generation.guidance_scale,
                spacing=generation.spacing or sd.schedule.timestep_spacing,
                dtype=str(sd.unet.dtype).removeprefix("torch."),
            )  # fmt: skip
            report.add(_save(image, Path(out), f"{_slug(prompt)}-{seed}", numbers, one.text()))
            made |= {f"seed {seed}: {prompt}": image} if grid else {}
    if grid:
        sheet = images.grid([*made.values()], count if count > 1 else None, padding=6, captions=[*made])
        beside = Path(out).with_stem(f"{Path(out).stem}-grid") if _is_image_name(Path(out)) else Path(out)
        report.add(_save(sheet, beside, "grid", numbers))
    return report.done


def _generate(sd: StableDiffusion, batch: Sequence[tuple[str, int]], generation: Generation) -> list[Image.Image]:
    prompts, seeds = zip(*batch, strict=True)
    made: list[Image.Image] = sd(
        prompts, generation.negative_prompt, generation.height, generation.width, generation.num_inference_steps,
        generation.guidance_scale, generation.sampler, generation.eta, seeds, spacing=generation.spacing,
        guidance_rescale=generation.guidance_rescale, guidance_interval=generation.guidance_interval,
        clip_skip=generation.clip_skip, weighting=generation.weighting, batch_size=len(batch),
    )  # fmt: skip
    return made


DEMO_PROMPTS = (
    "a red apple on a blue background", "a fox on a green background",
    "a balloon on a turquoise background", "a birthday cake on a pink background",
    "a panda on an orange background", "a cactus on a yellow background",
    "an octopus on a white background", "a rocket on a purple background",
    "a unicorn on a blue background", "a strawberry on a black background",
    "a sunflower on a red background", "a ghost on a brown background",
)  # fmt: skip
DEMO_PHOTOS = ("astronaut", "chelsea", "coffee")


def demo_files(
    sd: StableDiffusion, out: str | Path = "demo", photos: Sequence[str | Path] = ()
) -> tuple[Path, str, Report[Reconstruction]]:
    """Images from prompts, and photos through the VAE and back.

    Returns the path of the former, as one grid, what the photos are (where none are given scikit-image's, or if it is
    not installed the generated images), and what became of them.
    """
    folder = Path(out)
    _check_writable(folder)
    made = sd(DEMO_PROMPTS, seed=[0] * len(DEMO_PROMPTS))
    images.save(images.grid(made, 4, padding=6, captions=DEMO_PROMPTS), folder / "generated.png")
    if photos:
        return folder / "generated.png", "photos given", reconstruct_files(sd.vae, photos, folder)
    kind, pictures = "generated images", dict(zip(map(_slug, DEMO_PROMPTS), made, strict=True))
    with contextlib.suppress(ImportError):
        from skimage import data  # of the extra `dev`

        pictures = {name: Image.fromarray(getattr(data, name)()) for name in DEMO_PHOTOS}
        kind = "photos of scikit-image"
    photos = [folder / "photos" / f"{name}.png" for name in pictures]
    for path, picture in zip(photos, pictures.values(), strict=True):
        images.save(picture, path)
    return folder / "generated.png", kind, reconstruct_files(sd.vae, photos, folder)


def _is_image_name(out: Path) -> bool:
    return out.suffix.lower() in images.FORMATS and not os.path.isdir(out)  # noqa: PTH112 - pathlib's may raise


def _save(
    image: Image.Image, out: Path, stem: str, numbers: Iterable[int], text: Mapping[str, str] | None = None
) -> Path:
    """Write a PNG to `out`, or where that is a folder below the first of `numbers` that is free; its path."""
    if _is_image_name(out):
        images.save(image, out, text)
        return out
    for number in numbers:
        path = out / f"{number:04d}-{stem}.png"
        with contextlib.suppress(FileExistsError):  # another run took the name meanwhile
            images.save(image, path, text, overwrite=False)
            return path
    raise AssertionError("there are always more numbers")


def _numbers(folder: Path) -> Iterator[int]:
    """Yield numbers for files: each above those of all files that are in `folder` then, and above the one before."""
    last = 0
    while True:
        with contextlib.suppress(OSError):
            found = (re.match(r"(\d{4,})-", file.name, re.ASCII) for file in folder.iterdir())
            last = max(last, *(int(match[1]) for match in found if match), 0)
        last += 1
        yield last


def _slug(prompt: str) -> str:
    """A prompt's letters and digits, as a part of a file name of at most 160 bytes."""
    slug = re.sub(r"[\W_]+", "-", encodable(prompt).lower())[:40].strip("-") or "image"
    return os.fsdecode(slug.encode())  # in UTF-8, too, where the system has another encoding for names


def _check_writable(path: Path, *, is_file: bool = False) -> None:
    """Refuse a folder, or a file, now, not after the work, where nothing can be written into it."""
    try:
        check_name(path)
        above = path.parents if is_file else (path, *path.parents)
        tempfile.TemporaryFile(dir=next(folder for folder in above if folder.exists())).close()
    except OSError as error:
        raise SdkitError(f"cannot write into {path}: {reason(error)}; give another folder.") from error


def _targets(paths: Iterable[str | Path], suffixes: Collection[str], out: str | Path, ending: str) -> dict[Path, Path]:
    """Each input and where its output goes: below `out` as the input lies below its folder, with another `ending`.

    Inputs that differ only in their suffix keep it in the output's name, and no input is ever overwritten. What an
    earlier run left in an `out` inside an input folder is no input.
    """
    names, folder = list(paths), Path(out)
    unreadable = images.UNREADABLE if ".png" in suffixes else ()
    sources, given = find_files(names, suffixes, unreadable), [Path(name) for name in names]
    roots = {source: next((root for root in given if root in source.parents), source.parent) for source in sources}
    earlier = {source for source in sources if _is_in(source, folder) and _is_in(folder, roots[source])}
    below = {source: source.relative_to(roots[source]) for source in sources if source not in earlier}
    shared = Counter(str(path.with_suffix("")).casefold() for path in below.values())  # one, to some file systems
    taken = {os.path.realpath(source).casefold() for source in below}
    targets = {}
    for source, path in below.items():
        stem = path.with_name(path.stem if shared[str(path.with_suffix("")).casefold()] == 1 else path.name)
        name = utf8_name(str(stem))  # safetensors opens no file whose name is not UTF-8
        tries = (folder / f"{name}{f'-{n}' if n else ''}{ending}" for n in itertools.count())
        targets[source] = next(target for target in tries if os.path.realpath(target).casefold() not in taken)
        taken.add(os.path.realpath(targets[source]).casefold())
    return targets


def _is_in(path: Path, folder: Path) -> bool:
    """However the two are written."""
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents  # noqa: PTH100 - links stay as named


def _made(
    make: Callable[[Batch[Sized]], Sequence[T]], batch: Batch[Sized], report: Report[Any]
) -> Iterator[tuple[Path, Sized, T]]:
    """Each input and what `make` makes of it; one by one where it refuses the batch, so that only the bad ones fail."""
    try:
        results = make(batch)
    except SdkitError as error:
        if len(batch) == 1:
            report.fail(batch[0][0], error)
            return
        for one in batch:
            yield from _made(make, [one], report)
    else:
        for (source, sized), result in zip(batch, results, strict=True):
            yield source, sized, result


def _batches(
    sources: Collection[Path], load: Callable[[Path], Sized], batch_size: int | None, report: Report[Any], name: str
) -> Iterator[Batch[Sized]]:
    """The inputs that can be loaded, as many at a time as fit; the others go into the report."""
    batch: Batch[Sized] = []
    held = 0
    for source in progress(sources, total=len(sources), description=name):
        try:
            batch.append((source, load(source)))
        except SdkitError as error:
            report.fail(source, error)
            continue
        held += batch[-1][1].width * batch[-1][1].height
        if held >= PIXELS_HELD and len(batch) >= (batch_size or 1):
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
