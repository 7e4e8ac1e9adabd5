"""Evaluation of autoencoders: what they lose of images, what their latents look like, and what they cost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sdkit.arguments import LONGEST_SIDE, whole_number
from sdkit.diffusion.latent_space import Statistics, statistics
from sdkit.engines.device import resolve_dtype
from sdkit.engines.memory import peak_memory, reset_peak_memory
from sdkit.errors import ArgumentError, DataError, ImageError, SourceError
from sdkit.evaluation.extractors import Extractor, open_extractor
from sdkit.evaluation.frechet import frechet_distance, warn_if_few
from sdkit.evaluation.generated_images import READERS, Loadable
from sdkit.evaluation.moments import Moments
from sdkit.evaluation.sharing import Share, gathered, own_share
from sdkit.evaluation.similarity import WINDOW, psnr, ssim
from sdkit.file_search import find_files
from sdkit.images import READABLE, UNREADABLE, grid, to_pil, to_tensors
from sdkit.images.convert import flat
from sdkit.loading.tensors import is_finite
from sdkit.networks.autoencoder import PIXELS_AT_ONCE, VAE
from sdkit.networks.lpips import LPIPS
from sdkit.prefetch import ahead
from sdkit.progress import progress

SHOWN = 4
"""Reconstructions of each end, the worst and the best, that an evaluation keeps."""
BLUR, BLUR_SIDE = "blur", 16
"""Name of the control that keeps one colour of each square, and the side of the square in pixels."""


class Pictures(Protocol):
    """A list of images, or of anything that `evaluate_vae` reads as an image, such as `sdkit.data.Examples`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The subject of an evaluation: a VAE, or a control.

    Attributes:
        name: Its name.
        scale: Factor from raw to scaled latents.
        shift: Number that is subtracted from raw latents before they are scaled.
        device: Where it computes.
        encode: pixels (B, 3, H, W) -> raw mean and log-variance of the posterior, (B, C, h, w).
        decode: Raw latents (B, C, h, w) and (H, W) -> pixels (B, 3, H, W) on the CPU.
    """

    name: str
    scale: float
    shift: float
    device: torch.device
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, tuple[int, int]], Tensor]


def blur() -> Subject:
    """Return the control that any autoencoder must beat: it keeps the mean colour of each square of 16 pixels a side,
    and enlarges these colours bilinearly."""

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.avg_pool2d(x, BLUR_SIDE, ceil_mode=True)
        return mean, torch.full_like(mean, -math.inf)  # a point: the variance is 0

    def decode(raw: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(raw, size=size, mode="bilinear")

    return Subject(name=BLUR, scale=1.0, shift=0.0, device=torch.device("cpu"), encode=encode, decode=decode)


def subject_of(vae: VAE, batch_size: int | None) -> Subject:
    """Return a VAE as `evaluate_vae` measures it. It repeats in float32 what overflows in float16."""
    name = vae.name or "VAE"
    if vae.device.type == "cpu":
        # The activations of one image fit the cache better: with images of 256 pixels, the embedded VAE takes 0.67 of
        # the time that it takes with batches of 8.
        batch_size = batch_size or 1

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = vae.moments(x, batch_size=batch_size)
        if not (is_finite(mean) and is_finite(logvar)):
            raise SourceError(f"{name!r} gives latents that are not finite; its weights are to blame: give another.")
        return mean, logvar

    def decode(raw: Tensor, size: tuple[int, int]) -> Tensor:
        z = (raw - vae.shift) * vae.scale
        return vae.decode(z, size=size, output_type="pt", batch_size=batch_size)

    return Subject(name=name, scale=vae.scale, shift=vae.shift, device=vae.device, encode=encode, decode=decode)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One image, how it came back, and how far it is from itself.

    Attributes:
        name: Name of the image.
        psnr: Peak signal-to-noise ratio in dB; infinite for equal images.
        ssim: Structural similarity.
        lpips: Perceptual distance; None if it was not measured.
        original: The image.
        decoded: Its reconstruction.
    """

    name: str
    psnr: float
    ssim: float
    lpips: float | None
    original: Image.Image
    decoded: Image.Image


class Skipped(NamedTuple):
    """The name of an image that cannot be used, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class VAEEvaluation:
    """The measurements of `evaluate_vae`.

    Images are decoded from the posterior's mean, and compared as 8-bit images. Means are over images.

    Attributes:
        vae: Name of the VAE.
        images: Number of images.
        size: (height, width) of the images in pixels; the first image's if they differ.
        psnr: Mean peak signal-to-noise ratio in dB; infinite if no image lost anything.
        ssim: Mean structural similarity.
        lpips: Mean LPIPS; None if it was not measured.
        lpips_network: "alex" or "vgg"; None if LPIPS was not measured.
        rfid: Fréchet distance between the images and their reconstructions (rFID); None for a single image.
        extractor: Name of the network whose features `rfid` compares.
        latent_mean: Mean of each channel of the scaled latents.
        latent_std: Standard deviation of each channel of the scaled latents, sampled from the posterior.
        scale: The VAE's scale.
        unit_scale: Scale that would make the standard deviation of all latents together 1.
        noise_share: Share of the latents' variance that is the posterior's noise, from 0 to 1.
        encoded_per_second: Images that one process encodes in a second.
        decoded_per_second: Images that one process decodes in a second.
        peak_memory: Largest memory in bytes while encoding and decoding: of the GPU, or, on a CPU, of the process. None
            where the system does not tell.
        skipped: Name of each image that could not be used, and the reason.
        worst: Reconstructions with the largest LPIPS (or the smallest PSNR), the worst one first.
        best: Those with the smallest LPIPS (or the largest PSNR), the best one first.
    """

    vae: str
    images: int
    size: tuple[int, int]
    psnr: float
    ssim: float
    lpips: float | None
    lpips_network: str | None
    rfid: float | None
    extractor: str
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    scale: float
    unit_scale: float
    noise_share: float
    encoded_per_second: float
    decoded_per_second: float
    peak_memory: int | None
    skipped: tuple[Skipped, ...]
    worst: tuple[Reconstruction, ...]
    best: tuple[Reconstruction, ...]

    def asdict(self) -> dict[str, Any]:
        """Return all but the pictures as plain values for JSON, in which infinity becomes None."""
        values = {key: _finite(value) for key, value in vars(self).items()}
        values["skipped"] = [one._asdict() for one in self.skipped]
        for end in ("worst", "best"):
            values[end] = [
                {"name": one.name, "psnr": _finite(one.psnr), "ssim": one.ssim, "lpips": one.lpips}
                for one in getattr(self, end)
            ]
        return values


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_vae(
    vae: str | os.PathLike[str] | VAE,
    images: str | Path | Pictures,
    *,
    size: int | tuple[int, int] | None = None,
    lpips: str | LPIPS | None = "alex",
    extractor: str | Extractor = "alex",
    batch_size: int | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> VAEEvaluation:
    """Encode and decode images, and measure what is lost, what the latents look like, and what it costs.

    Images are streamed: threads read them, and a few batches are held at a time. Of each image only its name and its
    scores are kept. Under `accelerate launch` the
    processes share the images, and each returns the same result.

    Args:
        vae: A VAE, or the source of one, as `VAE.from_pretrained` takes it. Two names are controls: "pixels", which
            loses nothing, and "blur", which keeps one colour of each 16 x 16 pixels.
        images: A folder of images, whose files are sorted; or a list of images, of paths, or of examples from
            `sdkit.data.open_examples`. All have one size, unless `size` is given.
        size: Side in pixels, or (height, width), to which images are reduced and cropped at the centre. Smaller images
            are skipped: enlarged, they would be smooth, and easy to encode.
        lpips: "alex", "vgg", or another source of LPIPS; None leaves it out.
        extractor: Network whose features the Fréchet distance compares, as `open_extractor` takes it.
        batch_size: Images in one pass; None fits it to their size.
        dtype: As in `VAE.from_pretrained`, for a source.
        device: Likewise. LPIPS and the extractor run there, too.

    Returns:
        The measurements. They mean little without those of the controls on the same images.

    Raises:
        ArgumentError: An argument is wrong.
        SourceError: A network cannot be loaded.
        DataError: There are no images, or none can be used.
        ImageError: The images differ in size, and `size` is None.

    Example:
        >>> import sdkit
        >>> found = sdkit.evaluation.evaluate_vae("emoji", "photos", size=64)
        >>> control = sdkit.evaluation.evaluate_vae("blur", "photos", size=64)
        >>> found.images, found.psnr > control.psnr, found.lpips < control.lpips
        (3, True, True)
    """
    if batch_size is not None:
        whole_number("batch_size", batch_size, 1)
    sides = None if size is None else _sides(size)
    pictures = _listed(images)
    share = own_share(device)
    subject = _opened(vae, batch_size, dtype, share.device)
    on = vae.device if isinstance(vae, VAE) else share.device
    measure = _Measure(
        subject=subject,
        lpips=LPIPS.from_pretrained(lpips).to(on) if isinstance(lpips, str) else lpips,
        extractor=extractor if isinstance(extractor, Extractor) else open_extractor(extractor, device=on),
    )
    return _Evaluation(pictures, measure, sides, batch_size, share).run()


def reconstruction_sheet(evaluations: Sequence[VAEEvaluation]) -> Image.Image:
    """Draw the worst and the best reconstructions of each VAE: a row of images above a row of reconstructions.

    Args:
        evaluations: At least one, of the same images.
    """
    pictures, captions, rows = list[Image.Image](), list[str](), list[str]()
    for found in evaluations:
        ends = [*found.worst, *found.best]
        pictures += [one.original for one in ends] + [one.decoded for one in ends]
        captions += [Path(one.name).name for one in ends] + [_caption(one) for one in ends]
        rows += ["images", found.vae]
    above = ["worst"] * len(evaluations[0].worst) + ["best"] * len(evaluations[0].best)
    return grid(pictures, len(above), padding=4, captions=captions, row_labels=rows, column_labels=above)


def _caption(one: Reconstruction) -> str:
    return f"{one.psnr:.2f} dB" + ("" if one.lpips is None else f", LPIPS {one.lpips:.3f}")


class Loaded(NamedTuple):
    """An image that was read.

    Attributes:
        number: Its place among the images.
        name: Its name.
        picture: The image, resized and cropped.
        prepared: The image as the extractor takes it.
    """

    number: int
    name: str
    picture: Image.Image
    prepared: Tensor


class Scores(NamedTuple):
    """The metrics of one image."""

    number: int
    name: str
    psnr: float
    ssim: float
    lpips: float | None


class Batch(NamedTuple):
    """Measurements of one batch.

    Attributes:
        number: Its place among the batches.
        scores: Metrics of its images.
        latents: Statistics of the raw means of the posteriors; None if no image can be used.
        noise: Statistics of the variances of the posteriors, likewise.
        encoding: Seconds of encoding per image.
        decoding: Seconds of decoding per image.
        peak: Peak memory in bytes, if the system tells.
        skipped: Its images that cannot be used.
    """

    number: int
    scores: list[Scores]
    latents: Statistics | None
    noise: Statistics | None
    encoding: float
    decoding: float
    peak: int | None
    skipped: list[Skipped]


class _Measure:
    """Measures batches of images.

    Attributes:
        subject: What encodes and decodes.
        lpips: LPIPS, or None to leave it out.
        extractor: Network whose features are collected.
        originals: Moments of the features of all images so far.
        decoded: Moments of the features of their reconstructions.
        kept: The best and the worst reconstructions so far, the best one first.
    """

    def __init__(self, subject: Subject, lpips: LPIPS | None, extractor: Extractor) -> None:
        self.subject, self.lpips, self.extractor = subject, lpips, extractor
        self.originals, self.decoded = Moments(extractor.width), Moments(extractor.width)
        self.kept = list[Reconstruction]()

    @property
    def smallest(self) -> int:
        """Smallest side of an image in pixels."""
        return max(WINDOW, self.lpips.smallest if self.lpips else 0)

    def __call__(self, number: int, read: Sequence[Loaded | Skipped], pool: ThreadPoolExecutor) -> Batch:
        """Measure one batch. The threads of `pool` compare images while this thread runs LPIPS and the extractor."""
        skipped = [one for one in read if isinstance(one, Skipped)]
        loaded = [one for one in read if isinstance(one, Loaded)]
        if not loaded:
            return Batch(number, [], None, None, 0.0, 0.0, None, skipped)
        x = torch.stack(to_tensors([one.picture for one in loaded]))
        reset_peak_memory(self.subject.device)
        begun = time.perf_counter()
        mean, logvar = self.subject.encode(x)
        encoded = time.perf_counter()
        y = self.subject.decode(mean, (x.shape[2], x.shape[3]))
        ended = time.perf_counter()
        peak = peak_memory(self.subject.device)
        decoded = to_pil(y)
        y = torch.stack(to_tensors(decoded))  # rounded to 8 bits, as it would be saved
        similarities = [pool.submit(_similarity, a, b) for a, b in zip(x, y, strict=True)]
        prepared = [pool.submit(self.extractor.prepare, picture) for picture in decoded]
        distances = self._distances(x, y)
        self.originals.add(self.extractor.outputs(torch.stack([one.prepared for one in loaded]))[0])
        self.decoded.add(self.extractor.outputs(torch.stack([one.result() for one in prepared]))[0])
        scores = [
            Scores(one.number, one.name, *similarity.result(), distance)
            for one, similarity, distance in zip(loaded, similarities, distances, strict=True)
        ]
        self._keep(
            [
                Reconstruction(
                    name=score.name, psnr=score.psnr, ssim=score.ssim, lpips=score.lpips, original=one.picture,
                    decoded=made,
                )
                for one, score, made in zip(loaded, scores, decoded, strict=True)
            ]
        )  # fmt: skip
        seconds = ((encoded - begun) / len(x), (ended - encoded) / len(x))
        return Batch(number, scores, statistics(mean), statistics(logvar.exp()), *seconds, peak, skipped)

    def _distances(self, x: Tensor, y: Tensor) -> list[float | None]:
        if self.lpips is None:
            return [None] * len(x)
        device = self.lpips.shift.device
        with torch.inference_mode():
            return [*map(float, self.lpips(x.to(device), y.to(device)))]

    def _keep(self, found: Sequence[Reconstruction]) -> None:
        """Keep the best and the worst reconstructions of all batches so far."""
        ranked = sorted([*self.kept, *found], key=_badness)
        self.kept = ranked if len(ranked) <= 2 * SHOWN else ranked[:SHOWN] + ranked[-SHOWN:]


class _Evaluation:
    """Reads images, and collects the measurements of all batches and processes; see `evaluate_vae`."""

    def __init__(
        self, images: Pictures, measure: _Measure, size: tuple[int, int] | None, batch_size: int | None,
        share: Share,
    ) -> None:  # fmt: skip
        self.images, self.measure, self.share = images, measure, share
        if size is not None and min(size) < measure.smallest:
            raise ArgumentError(
                f"size {size[0]} x {size[1]} is too small to compare images; give at least {measure.smallest} pixels."
            )
        self.given = size
        self.size = size or self._first_size()
        self.at_once = batch_size or max(1, PIXELS_AT_ONCE // math.prod(self.size))

    def _first_size(self) -> tuple[int, int]:
        """Return the (height, width) of the first image that can be used."""
        reasons = list[str]()
        for number in range(len(self.images)):
            read = self._load((number, self.images[number]))
            if isinstance(read, Loaded):
                return read.picture.height, read.picture.width
            reasons.append(read.reason)
        raise _unusable(len(self.images), reasons[0])

    def run(self) -> VAEEvaluation:
        """Measure all images."""
        measure = self.measure
        own = list(self._batches())
        found = gathered((own, measure.originals, measure.decoded, measure.kept), self.share.world)
        # In the order of the images: sums then do not depend on the number of processes.
        batches = sorted((batch for one, *_ in found for batch in one), key=lambda batch: batch.number)
        scores = [one for batch in batches for one in batch.scores]
        skipped = [one for batch in batches for one in batch.skipped]
        if not scores:
            raise _unusable(len(self.images), skipped[0].reason)
        extractor, lpips = measure.extractor, measure.lpips
        originals = Moments.merged([one for _, one, _, _ in found])
        decoded = Moments.merged([one for _, _, one, _ in found])
        ranked = sorted((one for *_, kept in found for one in kept), key=_badness)
        shown = max(1, min(SHOWN, len(scores) // 2))
        if self.share.rank == 0 and len(scores) > 1:
            warn_if_few(len(scores), extractor.width, extractor.name)
        measured = [batch for batch in batches if batch.scores]
        return VAEEvaluation(
            vae=measure.subject.name,
            images=len(scores),
            size=self.size,
            psnr=_average([one.psnr for one in scores]),
            ssim=_average([one.ssim for one in scores]),
            lpips=_average([one.lpips for one in scores if one.lpips is not None]) if lpips else None,
            lpips_network=lpips.network if lpips else None,
            rfid=frechet_distance(originals, decoded) if len(scores) > 1 else None,
            extractor=extractor.name,
            **_latents(measured, measure.subject),
            encoded_per_second=1 / median(batch.encoding for batch in measured),
            decoded_per_second=1 / median(batch.decoding for batch in measured),
            peak_memory=max((batch.peak for batch in measured if batch.peak is not None), default=None),
            skipped=tuple(skipped),
            worst=tuple(ranked[: -shown - 1 : -1]),
            best=tuple(ranked[:shown]),
        )

    def _batches(self) -> Iterator[Batch]:
        """Yield the measurements of this process's batches: they take whole batches in turn.

        Batches are the same for any number of processes, and so is the rounding of what is computed from them.
        """
        every, world = range(0, len(self.images), self.at_once), self.share.world
        own = [range(start, min(start + self.at_once, len(self.images))) for start in every[self.share.rank :: world]]
        items = ((number, self.images[number]) for numbers in own for number in numbers)
        shown = progress(own, description=f"evaluate {self.measure.subject.name}") if self.share.rank == 0 else own
        with ThreadPoolExecutor(READERS) as pool:
            loaded = ahead(pool, self._load, items, 2 * self.at_once)
            for numbers in shown:
                batch = [next(loaded) for _ in numbers]
                self._check_sizes(batch)
                yield self.measure(numbers.start, batch, pool)

    def _load(self, item: tuple[int, Any]) -> Loaded | Skipped:
        number, source = item
        name = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", f"image {number + 1}"))
        try:
            picture = self._picture(source, number)
        except ImageError as error:
            return Skipped(name, str(error))
        return Loaded(number, name, picture, self.measure.extractor.prepare(picture))

    def _picture(self, source: Any, number: int) -> Image.Image:
        """Read an image, and reduce and crop it. Raise ImageError if it cannot be used."""
        picture, smallest = _read(source, number), self.measure.smallest
        if min(picture.size) < smallest:
            raise ImageError(
                f"{picture.width} x {picture.height} pixels are too few to compare images; it takes {smallest}."
            )
        if self.given is None:
            return picture
        height, width = self.given
        if picture.width < width or picture.height < height:
            raise ImageError(
                f"{picture.width} x {picture.height} pixels are less than {width} x {height}; give a smaller size."
            )
        return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)

    def _check_sizes(self, batch: Sequence[Loaded | Skipped]) -> None:
        for one in batch:
            if isinstance(one, Loaded) and (one.picture.height, one.picture.width) != self.size:
                raise ImageError(
                    f"{one.name} has {one.picture.width} x {one.picture.height} pixels, others have "
                    f"{self.size[1]} x {self.size[0]}: give a size to which all are reduced and cropped."
                )


def _badness(one: Reconstruction) -> tuple[float, str]:
    """Return the key by which reconstructions are ranked, from the best to the worst."""
    return -one.psnr if one.lpips is None else one.lpips, one.name


def _latents(batches: Sequence[Batch], subject: Subject) -> dict[str, Any]:
    """Return the fields of `VAEEvaluation` that describe the latents."""
    means = reduce(add, [batch.latents for batch in batches if batch.latents is not None])
    noise = reduce(add, [batch.noise for batch in batches if batch.noise is not None]).mean
    # Law of total variance: the variance of the posteriors' means, plus the mean of their variances.
    raw = Statistics(count=means.count, mean=means.mean, variance=means.variance + noise)
    total = float(raw.variance.sum())
    return {
        "latent_mean": tuple(((raw.mean - subject.shift) * subject.scale).tolist()),
        "latent_std": tuple((raw.std * subject.scale).tolist()),
        "scale": subject.scale,
        "unit_scale": raw.scale,
        "noise_share": float(noise.sum()) / total if total > 0 else 0.0,
    }


def _similarity(x: Tensor, y: Tensor) -> tuple[float, float]:
    return float(psnr(x, y)), float(ssim(x, y))


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _unusable(n: int, reason: str) -> DataError:
    return DataError(f"none of {n} images can be used; the first: {reason}")


def _listed(images: Any) -> Pictures:
    if isinstance(images, (str, Path)):
        return find_files([images], READABLE, UNREADABLE)
    if isinstance(images, Image.Image) or not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        kind = type(images).__name__
        raise ArgumentError(f"images must be a folder, or a list of images, paths, or examples, not {kind}.")
    if len(images) == 0:
        raise DataError("there are no images to evaluate on; give at least one.")
    return images  # type: ignore[no-any-return]


def _read(source: Any, number: int) -> Image.Image:
    if isinstance(source, Loadable) and not isinstance(source, Image.Image):
        return source.load()
    pictures = flat(source)
    if len(pictures) != 1:
        raise ArgumentError(f"item {number + 1} of the images is a batch of {len(pictures)}; list them one by one.")
    return pictures[0] if isinstance(pictures[0], Image.Image) else to_pil(pictures[0])[0]


def _sides(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2:
        raise ArgumentError(f"size must be one number of pixels, or (height, width), not {size!r}.")
    height, width = (whole_number("size", side, 1, LONGEST_SIDE) for side in sides)
    return height, width


def _opened(vae: Any, batch_size: int | None, dtype: str | torch.dtype, device: torch.device) -> Subject:
    if isinstance(vae, (str, os.PathLike)):
        if os.fspath(vae) == BLUR:
            return blur()
        vae = VAE.from_pretrained(vae, dtype=resolve_dtype(dtype, device), device=device)
    if not isinstance(vae, VAE):
        raise ArgumentError(f"a {type(vae).__name__} is no VAE to evaluate; give a sdkit.VAE, or the source of one.")
    return subject_of(vae, batch_size)
