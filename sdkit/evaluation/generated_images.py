"""Evaluation of generated images against real ones: every metric beside controls that show what its value means."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from sdkit import images
from sdkit.arguments import strings, whole_number
from sdkit.errors import ArgumentError, ImageError
from sdkit.evaluation.clip_score import clip_cosine, clip_score
from sdkit.evaluation.extractors import Extractor, open_extractor
from sdkit.evaluation.frechet import Z95, frechet_at_infinity, frechet_distance, frechet_interval, warn_if_few
from sdkit.evaluation.kernel_distance import cmmd, kid
from sdkit.evaluation.precision_recall import precision_recall
from sdkit.evaluation.sharing import Share, gathered, own_share
from sdkit.evaluation.summary import Features, Summary
from sdkit.file_search import find_files
from sdkit.images.convert import flat
from sdkit.messages import clean
from sdkit.prefetch import ahead
from sdkit.progress import progress

LEAST = 8
"""Smallest number of images in a set: precision and recall need four in each half of the reference."""
BATCH = 32
"""Images in one pass through an extractor, unless the caller gives another number."""
READERS = min(16, max(2, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
"""Number of threads that read and resize images."""


@runtime_checkable
class Loadable(Protocol):
    """An image that is read when it is needed, such as `sdkit.data.Example`."""

    name: str

    def load(self) -> Image.Image:
        """Read the image."""


Draw: TypeAlias = Callable[[range], Sequence[Any]]
"""Draws the images of these numbers."""
Pictures: TypeAlias = "str | Path | Iterable[Any] | Draw"
"""A folder or a file; images, paths, or `Loadable`s; or a function that draws images."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number, with what must be equal for a comparison with another.

    Attributes:
        metric: "frechet", "frechet_at_infinity", "kid", "precision", "recall", "inception_score", "cmmd", "clip_score",
            or "clip_cosine".
        value: The number, in the unit of the function of that name in `sdkit.evaluation`.
        interval: Its 95 % interval, or None if it has none: from the bootstrap for "frechet", from the standard error
            for the CLIP scores.
        count: Number of images that were measured.
        reference_count: Number of images that they were compared with; None if the metric takes no reference.
        extractor: Name of the feature extractor.
        width: Number of its features.
        resizing: How images were resized for it.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None = None
    count: int
    reference_count: int | None
    extractor: str
    width: int
    resizing: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """The scores of one set of images.

    Attributes:
        name: What was measured: "generated", "half of the reference", "mean image", or "shuffled prompts".
        scores: Its scores, extractor by extractor. A metric that makes no sense for the row is left out.
    """

    name: str
    scores: tuple[Score, ...]

    def get(self, metric: str, extractor: str | None = None) -> Score | None:
        """Return the score of a metric with an extractor (None is the first that has it); None if there is none."""
        fitting = (one for one in self.scores if one.metric == metric and extractor in (None, one.extractor))
        return next(fitting, None)

    def __getitem__(self, metric: str) -> float:
        """Return the value of a metric with the first extractor that has it. Raises KeyError if there is none."""
        found = self.get(metric)
        if found is None:
            raise KeyError(metric)
        return found.value


@dataclass(frozen=True, kw_only=True)
class ImageEvaluation:
    """Result of `evaluate_images`.

    Attributes:
        generated: The generated images compared with the reference.
        floor: A random half of the reference compared with the other half: the best that can be expected, of half as
            many images. Its Inception score is that of the whole reference.
        ceiling: As many copies of the reference's mean image, compared with the reference: the worst that counts.
        shuffled: The generated images with each other's prompts, for the CLIP scores; None without prompts.
        skipped: Names of images that could not be read, each with a sentence that says why.
    """

    generated: Row
    floor: Row
    ceiling: Row
    shuffled: Row | None
    skipped: tuple[tuple[str, str], ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows: the generated images, then the controls."""
        return (self.generated, self.floor, self.ceiling, *([self.shuffled] if self.shuffled else []))

    def asdict(self) -> dict[str, Any]:
        """Return the evaluation as a dict for JSON."""
        return asdict(self)


def evaluate_images(
    generated: Pictures,
    reference: Pictures,
    *,
    extractors: str | Extractor | Sequence[str | Extractor] = "alex",
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    batch_size: int = BATCH,
    device: str | torch.device = "auto",
) -> ImageEvaluation:
    """Measure generated images against real ones.

    Images are streamed. Only the features of at most 10,000 are held, N x D numbers in float32 for each set, which KID,
    CMMD, precision and recall, and the interval take: 4.6 kB an image with "alex". They are a random sample of more
    images, so that the memory does not grow beyond. Under `accelerate launch` the processes share the
    images, and each returns the result.

    Args:
        generated: A folder of images, whose files are sorted; images, paths, or examples of `sdkit.data.open_examples`;
            or a function that draws the images of a `range` of numbers, in which case `count` says how many there are.
        reference: Real images, as a folder or a sequence.
        extractors: Names of feature extractors, as `open_extractor` takes them, or loaded extractors.
        prompts: The prompts of the generated images, in their order, each for as many successive images as it takes.
            They add the CLIP scores, and the extractor "clip" if it is not among the extractors.
        count: Number of images that the function `generated` draws.
        batch_size: Images in one pass through a network, and images drawn together.
        device: Where the extractors compute.

    Returns:
        The scores, beside those of three controls.

    Raises:
        ArgumentError: An argument is wrong, there are fewer than 8 images in a set, or the prompts do not fit.
        ImageError: An image in memory is no image, or no image of a set can be read.
        SourceError: The weights of an extractor are missing or damaged.
    """
    whole_number("batch_size", batch_size, 1)
    share = own_share(device)
    texts = None if prompts is None else strings("prompts", prompts)
    source = _Source.of(generated, "generated", count)
    real = _Source.of(reference, "reference", None)
    if texts is not None:
        source.check_prompts(len(texts))
    opened = _open(extractors, needs_text=texts is not None, device=share.device)
    scorer = None if texts is None else _PromptScorer(opened, texts, source.size)

    reading = _Reading(opened, batch_size, share)
    summaries = reading.summaries(source, scorer)
    references = reading.summaries(real, None)
    found = [_compared(one, mine, theirs) for one, mine, theirs in zip(opened, summaries, references, strict=True)]
    own, floor, ceiling = (tuple(score for rows in found for score in rows[i]) for i in range(3))
    shuffled = None
    if scorer is not None:
        own_scores, ceiling_scores, shuffled_scores = scorer.scores(references[opened.index(scorer.clip)], share)
        own, ceiling = own + own_scores, ceiling + ceiling_scores
        shuffled = Row(name="shuffled prompts", scores=shuffled_scores) if shuffled_scores else None
    return ImageEvaluation(
        generated=Row(name="generated", scores=own),
        floor=Row(name="half of the reference", scores=floor),
        ceiling=Row(name="mean image", scores=ceiling),
        shuffled=shuffled,
        skipped=tuple(reading.skipped),
    )


def _open(extractors: Any, *, needs_text: bool, device: torch.device) -> list[Extractor]:
    """Load the extractors that are not loaded yet, and CLIP if prompts need it."""
    named = [extractors] if isinstance(extractors, (str, Extractor)) else list(extractors)
    if not named:
        raise ArgumentError("there is no feature extractor; name at least one, such as 'alex'.")
    kinds = [one.kind if isinstance(one, Extractor) else str(one).partition(":")[0] for one in named]
    if needs_text and "clip" not in kinds:
        named.append("clip")
    opened = [one if isinstance(one, Extractor) else open_extractor(one, device=device) for one in named]
    names = [one.name for one in opened]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ArgumentError(f"the extractor {clean(repr(repeated))} is named twice; leave one of them out.")
    return opened


class _Source:
    """A set of images that is read or drawn when it is needed.

    Attributes:
        name: "generated" or "reference".
        size: Number of images; None for a stream.
        seen: Number of images that were read from a stream, skipped ones too.
    """

    def __init__(
        self, name: str, size: int | None, batch: Callable[[range], Sequence[Any]] | None, stream: Any
    ) -> None:
        self.name, self.size, self._batch, self._stream = name, size, batch, stream
        self.seen = 0
        if size is not None:
            self.check_size(size)

    @classmethod
    def of(cls, pictures: Any, name: str, count: int | None) -> _Source:
        """Open a set of images; `count` belongs to a function that draws them."""
        if isinstance(pictures, (str, Path)):
            pictures = find_files([pictures], images.READABLE, images.UNREADABLE)
        drawn = callable(pictures) and not isinstance(pictures, Iterable)
        if drawn != (count is not None):
            raise ArgumentError("count= belongs to a function that draws images; give both of them, or neither.")
        if drawn:
            return cls(name, whole_number("count", count, 1), pictures, None)
        if hasattr(pictures, "__len__") and hasattr(pictures, "__getitem__"):
            return cls(name, len(pictures), lambda numbers: [pictures[i] for i in numbers], None)
        if isinstance(pictures, Iterable):
            return cls(name, None, None, pictures)
        kind = type(pictures).__name__
        raise ArgumentError(f"{name} must be a folder, a list of images, or a function that draws them, not {kind}.")

    def check_size(self, size: int) -> None:
        """Raise ArgumentError if these are too few images."""
        if size < LEAST:
            raise ArgumentError(f"{size} {self.name} images are too few to measure; give at least {LEAST}.")

    def check_prompts(self, prompts: int) -> None:
        """Raise ArgumentError if prompts cannot be assigned to the images."""
        size = self.size if self.size is not None else self.seen or prompts
        whole = size % prompts == 0 if self.size is not None else size == prompts
        if not whole:
            raise ArgumentError(
                f"{prompts} prompts cannot be assigned to {size} images; give one for each, or for each group of as "
                "many successive images."
            )

    def own(self, batch_size: int, share: Share) -> Iterator[tuple[int, Any]]:
        """Yield this process's images with their numbers. Processes take whole batches in turn.

        Batches are the same for any number of processes, and so is the rounding of what is computed from them.
        """
        if self._batch is not None and self.size is not None:
            for start in range(share.rank * batch_size, self.size, share.world * batch_size):
                numbers = range(start, min(start + batch_size, self.size))
                items = self._batch(numbers)
                if len(items) != len(numbers):
                    raise ArgumentError(
                        f"the function drew {len(items)} images for {len(numbers)} numbers; draw one each."
                    )
                yield from zip(numbers, items, strict=True)
            return
        for number, item in enumerate(self._stream):
            self.seen = number + 1
            if number // batch_size % share.world == share.rank:
                yield number, item


class _Reading:
    """Reads sets of images, and summarises their features.

    Attributes:
        skipped: Names of images that could not be read, each with the reason.
    """

    def __init__(self, extractors: Sequence[Extractor], batch_size: int, share: Share) -> None:
        self.extractors, self.batch_size, self.share = extractors, batch_size, share
        self.skipped: list[tuple[str, str]] = []

    def summaries(self, source: _Source, scorer: _PromptScorer | None) -> list[Summary]:
        """Return the summary of a set of images for each extractor, and add the images to the CLIP scores."""
        parts = [Summary(one.width, one.side) for one in self.extractors]
        skipped = list[tuple[int, str, str]]()
        own = source.own(self.batch_size, self.share)
        shown = progress(own, total=self._own_size(source), description=source.name) if self.share.rank == 0 else own
        with ThreadPoolExecutor(READERS) as pool:
            ready = ahead(pool, self._prepared, shown, 2 * self.batch_size)
            for _, batch in groupby(ready, key=lambda one: one[0] // self.batch_size):
                self._add(list(batch), parts, scorer, skipped)
        gathered_parts = gathered((parts, skipped), self.share.world)
        lost = sorted(one for _, others in gathered_parts for one in others)
        self.skipped += [(name, why) for _, name, why in lost]
        wholes = [Summary.merged([own[i] for own, _ in gathered_parts]) for i in range(len(parts))]
        if lost and not wholes[0].count:
            raise ImageError(f"none of the {len(lost)} {source.name} images can be read; the first: {lost[0][2]}")
        source.check_size(wholes[0].count)
        if scorer is not None:
            source.check_prompts(scorer.prompts)
        return wholes

    def _own_size(self, source: _Source) -> int | None:
        return None if source.size is None else -(-source.size // self.share.world)

    def _prepared(self, numbered: tuple[int, Any]) -> tuple[int, list[Tensor], tuple[str, str] | None]:
        """Return the number of an image, and the image prepared for each extractor, or why its file is skipped."""
        number, item = numbered
        try:
            image = _read(item)
        except ImageError as error:
            if not isinstance(item, (str, Path, Loadable)):
                raise
            return number, [], (item.name if isinstance(item, Loadable) else str(item), str(error))
        return number, [one.prepare(image) for one in self.extractors], None

    def _add(
        self,
        batch: list[tuple[int, list[Tensor], tuple[str, str] | None]],
        parts: list[Summary],
        scorer: _PromptScorer | None,
        skipped: list[tuple[int, str, str]],
    ) -> None:
        skipped += [(number, *why) for number, _, why in batch if why is not None]
        usable = [(number, prepared) for number, prepared, why in batch if why is None]
        if not usable:
            return
        numbers = torch.tensor([number for number, _ in usable])
        for i, (extractor, part) in enumerate(zip(self.extractors, parts, strict=True)):
            pixels = torch.stack([prepared[i] for _, prepared in usable])
            vectors, logits = extractor.outputs(pixels)
            part.add(numbers, vectors, logits, pixels)
            if scorer is not None and extractor is scorer.clip:
                scorer.add(numbers, vectors)


def _read(item: Any) -> Image.Image:
    """Return one image of a set."""
    if isinstance(item, (str, Path)):
        return images.read(item)
    if isinstance(item, Loadable) and not isinstance(item, Image.Image):
        return item.load()
    found = flat(item)
    if len(found) != 1:
        raise ImageError(f"an entry of a set holds {len(found)} images; give one image an entry.")
    return found[0] if isinstance(found[0], Image.Image) else images.to_pil(found[0])[0]


Scores: TypeAlias = tuple[Score, ...]


def _compared(extractor: Extractor, mine: Summary, theirs: Summary) -> tuple[Scores, Scores, Scores]:
    """Return the scores of generated images, of two halves of the reference, and of its mean image."""
    warn_if_few(min(mine.count, theirs.count), extractor.width, extractor.name)
    reference = theirs.whole()
    mean = Summary.of_copies(theirs.mean_image(), mine.count, extractor).whole()
    halves = (theirs.half(0), theirs.half(1))
    return (
        tuple(_scores(extractor, mine.whole(), reference, interval=True)),
        tuple(_scores(extractor, halves[0], halves[1])),
        tuple(_scores(extractor, replace(mean, count=mine.count), reference, extrapolated=False)),
    )


def _score(
    extractor: Extractor, metric: str, value: float, n: int, m: int | None, bounds: tuple[float, float] | None = None
) -> Score:
    return Score(
        metric=metric, value=value, interval=bounds, count=n, reference_count=m, extractor=extractor.name,
        width=extractor.width, resizing=extractor.resizing,
    )  # fmt: skip


def _scores(
    extractor: Extractor, a: Features, b: Features, *, interval: bool = False, extrapolated: bool = True
) -> Iterator[Score]:
    distance = frechet_distance(a.exact, b.exact)
    bounds = frechet_interval(a.vectors, b.exact, distance) if interval else None
    yield _score(extractor, "frechet", distance, a.count, b.count, bounds)
    n, m = len(a.vectors), len(b.vectors)
    if extrapolated:
        yield _score(extractor, "frechet_at_infinity", frechet_at_infinity(a.vectors, b.vectors), n, m)
    yield _score(extractor, "kid", kid(a.vectors, b.vectors), n, m)
    shares = precision_recall(a.vectors, b.vectors)
    yield _score(extractor, "precision", shares.precision, n, m)
    yield _score(extractor, "recall", shares.recall, n, m)
    if extractor.kind == "clip":
        yield _score(extractor, "cmmd", cmmd(a.vectors, b.vectors), n, m)
    if a.classes is not None:
        yield _score(extractor, "inception_score", a.classes.value(), a.classes.count, None)


class _Mean:
    """Mean of numbers that arrive in batches, with its standard error."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # count, sum, and sum of squares

    def add(self, values: Tensor) -> None:
        values = values.double()
        self.sums += torch.stack([torch.tensor(len(values)).double(), values.sum(), values.square().sum()])

    def value(self) -> tuple[int, float, tuple[float, float]]:
        """Return the count, the mean, and its 95 % interval."""
        n, total, squares = self.sums.tolist()
        mean = total / n
        variance = max(0.0, squares / n - mean**2) * n / max(n - 1, 1)
        margin = Z95 * (variance / n) ** 0.5
        return int(n), mean, (mean - margin, mean + margin)


CLIP_METRICS = {"clip_score": clip_score, "clip_cosine": clip_cosine}


class _PromptScorer:
    """CLIP scores of images with their prompts, and with the prompts of other images.

    Attributes:
        clip: The extractor.
        prompts: Number of prompts.
    """

    def __init__(self, extractors: Sequence[Extractor], texts: Sequence[str], size: int | None) -> None:
        self.clip = next(one for one in extractors if one.kind == "clip")
        self.prompts = len(texts)
        self._repeats = 1 if size is None else size // len(texts)
        self._texts = self.clip.embed_texts(texts)
        self._own = {name: _Mean() for name in CLIP_METRICS}
        self._shuffled = {name: _Mean() for name in CLIP_METRICS}

    def add(self, numbers: Tensor, vectors: Tensor) -> None:
        """Add images by their numbers (B,) and embeddings (B, D)."""
        rows = numbers // self._repeats
        if int(rows.max()) >= self.prompts:
            raise ArgumentError(
                f"{self.prompts} prompts cannot be assigned to more images of a stream; give one prompt for each image."
            )
        # Half of the list away, prompts are unlike even where neighbours in the list are variants of each other.
        others = (rows + max(1, self.prompts // 2)) % self.prompts
        for name, metric in CLIP_METRICS.items():
            self._own[name].add(metric(vectors, self._texts[rows]))
            self._shuffled[name].add(metric(vectors, self._texts[others]))

    def scores(self, reference: Summary, share: Share) -> tuple[Scores, Scores, Scores]:
        """Return the scores of the images, of the reference's mean image, and of the images with others' prompts."""
        mean_image, _ = self.clip.outputs(reference.mean_image()[None])
        ceiling = {name: _Mean() for name in CLIP_METRICS}
        for name, metric in CLIP_METRICS.items():
            ceiling[name].add(metric(mean_image.expand(len(self._texts), -1), self._texts))
        for means in (self._own, self._shuffled):
            for mean in means.values():
                mean.sums = torch.stack(gathered(mean.sums, share.world)).sum(dim=0)
        shuffled = self._shuffled if self.prompts > 1 else {}
        return self._named(self._own), self._named(ceiling), self._named(shuffled)

    def _named(self, means: dict[str, _Mean]) -> Scores:
        values = {name: mean.value() for name, mean in means.items()}
        return tuple(_score(self.clip, name, mean, n, None, bounds) for name, (n, mean, bounds) in values.items())
