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
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from sdkit import __version__, images, latents, metrics
from sdkit.arguments import strings, whole
from sdkit.errors import ArgumentError, LatentError, SdkitError
from sdkit.files import encodable, find
from sdkit.models.vae import VAE
from sdkit.pipeline import StableDiffusion
from sdkit.progress import progress
from sdkit.recipe import Recipe

PIXELS_HELD = 2048 * 2048  # of input read before they go through a network: about 50 MB in float32

T = TypeVar("T")
Sized = TypeVar("Sized", Image.Image, latents.Latent)  # have a width and a height


@dataclass(frozen=True, kw_only=True)
class Report(Generic[T]):
    """What became of a job's inputs."""

    done: list[T]
    failed: list[tuple[Path, str]]  # each input that could not be used, and the sentence that says why


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """An image that went through a VAE and back."""

    source: Path
    path: Path  # the original beside its reconstruction
    height: int
    width: int
    psnr: float  # dB; infinite where the two are equal
    ssim: float | None  # None for an image smaller than SSIM's window of 11 x 11 pixels


def encode_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "latents",
    *,
    sample: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    tile: int | None = None,
) -> Report[Path]:
    """Images, or folders of them, to latent files in `out`, with the sub-folders that they had.

    The i-th file is drawn from the posterior with `seed` + i, even where files before it are broken; `sample=False`
    takes the mean.
    """
    seed = whole("seed", seed, 0, 2**62)
    targets, report = _targets(paths, images.READABLE, out, ".safetensors"), Report[Path](done=[], failed=[])
    seeds = {source: seed + i for i, source in enumerate(targets)}
    for batch in _batches(targets, images.read, batch_size, report, "encode"):
        generators = [torch.Generator().manual_seed(seeds[source]) for source, _ in batch]
        pictures = [image for _, image in batch]
        zs = vae.encode(pictures, sample=sample, generator=generators, batch_size=batch_size, tile=tile)
        for (source, image), z in zip(batch, zs, strict=True):
            latent = latents.Latent(
                z=z, height=image.height, width=image.width, vae=vae.identity, vae_name=vae.name, scale=vae.scale,
                shift=vae.shift, factor=vae.factor, dtype=str(vae.dtype).removeprefix("torch."), sdkit=__version__,
                source=source.name,
            )  # fmt: skip
            latents.save(latent, targets[source])
            report.done.append(targets[source])
    return report


def decode_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "decoded",
    *,
    force: bool = False,
    batch_size: int | None = None,
    tile: int | None = None,
) -> Report[Path]:
    """Latent files, or folders of them, to PNGs in `out`, of the original sizes. `force` takes another VAE's too."""

    def load(path: Path) -> latents.Latent:
        latent = latents.load(path)
        latents.check_vae(latent, vae.identity, force)
        if (len(latent.z), latent.factor) != (vae.channels, vae.factor):
            raise LatentError(f"{len(latent.z)} channels of factor {latent.factor} do not fit this VAE; use another.")
        return latent

    targets, report = _targets(paths, {".safetensors"}, out, ".png"), Report[Path](done=[], failed=[])
    for batch in _batches(targets, load, batch_size, report, "decode"):
        sizes = [(latent.height, latent.width) for _, latent in batch]
        decoded = vae.decode([latent.z for _, latent in batch], size=sizes, batch_size=batch_size, tile=tile)
        for (source, _), image in zip(batch, decoded, strict=True):
            images.save(image, targets[source])
            report.done.append(targets[source])
    return report


def reconstruct_files(
    vae: VAE,
    paths: Iterable[str | Path],
    out: str | Path = "reconstructions",
    *,
    batch_size: int | None = None,
    tile: int | None = None,
) -> Report[Reconstruction]:
    """Images, or folders of them, through the VAE and back: in `out`, PNGs of originals beside reconstructions."""
    targets = _targets(paths, images.READABLE, out, "-reconstruction.png")
    report = Report[Reconstruction](done=[], failed=[])
    for batch in _batches(targets, images.read, batch_size, report, "reconstruct"):
        after = vae.reconstruct([image for _, image in batch], batch_size=batch_size, tile=tile)
        for (source, x), y in zip(batch, after, strict=True):
            path = targets[source]
            images.save(images.grid([x, y], 2, padding=4), path)
            psnr = metrics.psnr(x, y).item()
            ssim = metrics.ssim(x, y).item() if min(x.size) >= metrics.WINDOW else None
            one = Reconstruction(source=source, path=path, height=x.height, width=x.width, psnr=psnr, ssim=ssim)
            report.done.append(one)
    return report


def mean_scores(done: Sequence[Reconstruction]) -> tuple[float | None, float | None]:
    """Mean PSNR and mean SSIM, each of the images that have one."""
    ssims = [one.ssim for one in done if one.ssim is not None]
    return fmean(one.psnr for one in done) if done else None, fmean(ssims) if ssims else None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a UTF-8 file ("-": standard input), one a line; empty lines and # comments are skipped."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ArgumentError(f"cannot read the prompts in {path}: {str(error.strerror).lower()}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 text, as a file of prompts has to be; save it as such.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ArgumentError(f"there is no prompt in {path}; write one a line.")
    return prompts


def generate_files(
    sd: StableDiffusion,
    prompts: Sequence[str],
    out: str | Path = "outputs",
    recipe: Recipe | None = None,
    *,
    count: int = 1,
    grid: bool = False,
    batch_size: int | None = None,
) -> list[Path]:
    """`count` images of each prompt as PNGs that hold their recipes, numbered on from those in the folder `out`.

    `out` may be a file name ending in .png, for a single image. Image i has the seed `recipe.seed` + i; `recipe.prompt`
    is not used. `grid` adds one more picture, of all images with labels.
    """
    recipe = recipe or Recipe()
    n = len(strings("prompts", prompts)) * whole("count", count, 1)
    path_of = _names(Path(out), n)
    side = sd.unet.sample_size * sd.vae.factor
    fitting = sd.images_at_once(recipe.height or side, recipe.width or side)
    at_once = fitting if batch_size is None else whole("batch_size", batch_size, 1)
    wanted = ((prompt, recipe.seed + r * count + c) for r, prompt in enumerate(prompts) for c in range(count))
    batches = iter(lambda: list(itertools.islice(wanted, at_once)), [])
    made: dict[str, Image.Image] = {}  # by caption
    written: list[Path] = []
    for batch in progress(batches, total=-(-n // at_once), description="generate"):
        for (prompt, seed), image in zip(batch, _generate(sd, batch, recipe), strict=True):
            one = replace(
                recipe, prompt=prompt, seed=seed, height=image.height, width=image.width, model=sd.name,
                spacing=recipe.spacing or sd.schedule.timestep_spacing, dtype=str(sd.unet.dtype).removeprefix("torch."),
            )  # fmt: skip
            written.append(path_of(len(written) + 1, f"{_slug(prompt)}-{seed}"))
            images.save(image, written[-1], one.text())
            made |= {f"seed {seed}: {prompt}": image} if grid else {}
    if grid:
        written.append(path_of(len(written) + 1, "grid"))
        columns = count if count > 1 else None
        images.save(images.grid([*made.values()], columns, padding=6, captions=[*made]), written[-1])
    return written


def _generate(sd: StableDiffusion, batch: Sequence[tuple[str, int]], recipe: Recipe) -> list[Image.Image]:
    prompts, seeds = zip(*batch, strict=True)
    made: list[Image.Image] = sd(
        prompts, recipe.negative_prompt, recipe.height, recipe.width, recipe.steps, recipe.scale, recipe.sampler,
        recipe.eta, seeds, spacing=recipe.spacing, guidance_rescale=recipe.rescale, guidance_interval=recipe.interval,
        clip_skip=recipe.clip_skip, weighting=recipe.weighting, batch_size=len(batch),
    )  # fmt: skip
    return made


DEMO_SUBJECTS = ("red apple", "ghost", "panda", "cactus", "fox", "red heart", "birthday cake")
DEMO_COLORS = ("white", "yellow", "pink", "green", "blue", "purple", "black")
DEMO_PHOTOS = ("astronaut", "chelsea", "coffee")


def demo_files(
    sd: StableDiffusion, out: str | Path = "demo", photos: Sequence[str | Path] = ()
) -> tuple[Path, str, Report[Reconstruction]]:
    """A labelled grid of images from prompts, and photos through the VAE and back.

    Returns the grid's path, what the photos are (where none are given scikit-image's, or if it is not installed the
    generated images), and what became of them.
    """
    folder = _folder(Path(out))
    prompts = [f"a {subject} on a {color} background" for subject in DEMO_SUBJECTS for color in DEMO_COLORS]
    made = sd(prompts, guidance_scale=5.0, seed=[0] * len(prompts))
    rows, columns = [f"a {subject}" for subject in DEMO_SUBJECTS], [f"on {color}" for color in DEMO_COLORS]
    images.save(images.grid(made, padding=6, row_labels=rows, column_labels=columns), folder / "generated.png")
    if photos:
        return folder / "generated.png", "photos given", reconstruct_files(sd.vae, photos, folder)
    kind, pictures = "generated images", dict(zip(DEMO_SUBJECTS, made[:: len(DEMO_COLORS)], strict=True))
    with contextlib.suppress(ImportError):
        from skimage import data  # of the extra `dev`

        kind, pictures = (
            "photos of scikit-image",
            {name: Image.fromarray(getattr(data, name)()) for name in DEMO_PHOTOS},
        )
    photos = [folder / "photos" / f"{name}.png" for name in pictures]
    for path, picture in zip(photos, pictures.values(), strict=True):
        images.save(picture, path)
    return folder / "generated.png", kind, reconstruct_files(sd.vae, photos, folder)


def _names(out: Path, n: int) -> Callable[[int, str], Path]:
    """What to call the i-th (from 1) of `n` images, given its stem; no file of the folder `out` has that name."""
    suffix = out.suffix.lower()
    if suffix in images.FORMATS and not out.is_dir():
        if suffix != ".png" or n > 1:
            raise ArgumentError(f"{out} cannot hold {n} PNG image(s); give a folder, or a .png for a single image.")
        _folder(out.parent)
        return lambda i, stem: out if i == 1 else out.with_stem(f"{out.stem}-{stem}")
    numbers = [int(match[1]) for file in _folder(out).iterdir() if (match := re.match(r"(\d{4,9})-", file.name))]
    last = max(numbers, default=0)
    return lambda i, stem: out / f"{last + i:04d}-{stem}.png"


def _slug(prompt: str) -> str:
    """A prompt's letters and digits, as a part of a file name of at most 160 bytes."""
    return re.sub(r"[\W_]+", "-", encodable(prompt).lower())[:40].strip("-") or "image"


def _folder(path: Path) -> Path:
    """The folder, made where it is missing; refused now, not after the work, where nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SdkitError(f"cannot write into {path}: {str(error.strerror).lower()}; give another folder.") from error
    return path


def _targets(paths: Iterable[str | Path], suffixes: Collection[str], out: str | Path, ending: str) -> dict[Path, Path]:
    """Each input and where its output goes: below `out` as the input lies below its folder, with another `ending`.

    Inputs that differ only in their suffix keep it in the output's name, and no input is ever overwritten. What an
    earlier run left in an `out` inside an input folder is no input.
    """
    names, folder = list(paths), Path(out)
    sources, given = find(names, suffixes), [Path(name) for name in names]
    _folder(folder)
    roots = {source: next((root for root in given if root in source.parents), source.parent) for source in sources}
    earlier = {source for source in sources if folder in source.parents and roots[source] in folder.parents}
    below = {source: source.relative_to(roots[source]) for source in sources if source not in earlier}
    shared = Counter(str(path.with_suffix("")).casefold() for path in below.values())  # one, to some file systems
    taken = {os.path.realpath(source).casefold() for source in below}
    targets = {}
    for source, path in below.items():
        stem = path.with_name(path.stem if shared[str(path.with_suffix("")).casefold()] == 1 else path.name)
        name = os.fsencode(stem).decode(errors="replace")  # safetensors opens no file whose name is not UTF-8
        tries = (folder / f"{name}{f'-{n}' if n else ''}{ending}" for n in itertools.count())
        targets[source] = next(target for target in tries if os.path.realpath(target).casefold() not in taken)
        taken.add(os.path.realpath(targets[source]).casefold())
    return targets


def _batches(
    sources: Collection[Path], load: Callable[[Path], Sized], batch_size: int | None, report: Report[Any], name: str
) -> Iterator[list[tuple[Path, Sized]]]:
    """The inputs that can be loaded, as many at a time as fit; the others go into the report."""
    batch: list[tuple[Path, Sized]] = []
    held = 0
    for source in progress(sources, total=len(sources), description=name):
        try:
            batch.append((source, load(source)))
        except SdkitError as error:
            report.failed.append((source, str(error) if str(source) in str(error) else f"{source}: {error}"))
            continue
        held += batch[-1][1].width * batch[-1][1].height
        if held >= PIXELS_HELD and len(batch) >= (batch_size or 1):
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
