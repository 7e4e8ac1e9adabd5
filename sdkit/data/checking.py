"""Check of a data set before training: problems in it, and how training would treat them."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdkit.arguments import whole_number
from sdkit.data.example import Example
from sdkit.data.examples import Examples
from sdkit.data.latent_cache.writing import own_size
from sdkit.data.sources import open_examples
from sdkit.data.transform import MAX_ENLARGEMENT, Transform, sides
from sdkit.errors import ImageError
from sdkit.loading.place import SourceName
from sdkit.loading.single_file import ASSETS
from sdkit.loading.source import Source
from sdkit.loading.tokenizer import load_tokenizer
from sdkit.prefetch import ahead
from sdkit.progress import progress

SD_SIZE = 512
"""Height and width, in pixels, of Stable Diffusion 1.x's training images."""
NEAR_BITS = 4
"""Near duplicates have 64-bit perceptual hashes that differ in at most this many bits."""
NEAR_LEVELS = 12.0
"""Near duplicates have 8 x 8 thumbnails whose mean absolute difference is at most this many of 255 levels."""
SHOWN = 5
"""Largest number of names, or of sizes, that a report lists."""

FINDINGS = {
    "unreadable": ("cannot be read", "training skips them, and names them in its report"),
    "too_small": (f"too small (enlarged over {MAX_ENLARGEMENT} times)", "training skips them, and names them"),
    "enlarged": ("smaller than the crop", "training enlarges them, and learns their blur"),
    "no_caption": ("without a caption, or with an empty one", "training takes the empty prompt: they teach no words"),
    "unread": ("that may hold captions (no image has one)", "they are not read; see where sdkit looks for captions"),
    "long_caption": (
        "with a caption of more tokens than one chunk holds",
        "training encodes them in several; nothing is cut",
    ),
    "duplicates": ("exact duplicates (equal pixels)", "training takes each: they count that much more"),
    "near_duplicates": ("near duplicates (they look alike)", "training takes each: they count that much more"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of problem, and the files that have it.

    Attributes:
        kind: A key of `FINDINGS`.
        what: The problem, in words.
        consequence: How training treats it.
        names: Names of the images or files that have it.
        groups: Names of duplicates, in groups; other problems have `names`.
        reasons: Name -> the particular reason, if reasons differ.
    """

    kind: str
    what: str
    consequence: str
    names: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of images or files that have the problem."""
        return len(self.names) + sum(map(len, self.groups))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A size that images have.

    Attributes:
        width: In pixels.
        height: In pixels.
        count: Number of images of this size.
    """

    width: int
    height: int
    count: int


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Report of `check`: `asdict` gives it as JSON, `str` as text for people.

    Attributes:
        source: Path or id of the data set.
        size: (height, width) of the crop that training would take.
        examples: Number of images.
        usable: Number of images that training would not skip.
        findings: The problems found.
        shapes: Sizes of the readable images, the most frequent first.
    """

    source: str
    size: tuple[int, int]
    examples: int
    usable: int
    findings: tuple[Finding, ...]
    shapes: tuple[Shape, ...]

    def asdict(self) -> dict[str, Any]:
        """Return the report as plain lists and dictionaries."""
        return asdict(self)

    def __str__(self) -> str:
        height, width = self.size
        lines = [
            f"{self.source}: {self.examples} images, {self.usable} of them usable for a crop of {width} x {height}"
        ]
        for found in self.findings:
            files = "files " if found.kind == "unread" else ""
            lines.append(f"{found.count} {files}{found.what}: {found.consequence}.")
            listed = [f"{name}{f': {found.reasons[name]}' if name in found.reasons else ''}" for name in found.names]
            listed += [", ".join(group) for group in found.groups]
            lines += [f"    {one}" for one in listed[:SHOWN]]
            lines += [f"    and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
        if not self.findings:
            lines.append("nothing to complain of.")
        if self.shapes:
            common = ", ".join(f"{one.width} x {one.height} ({one.count})" for one in self.shapes[:SHOWN])
            lines.append(f"{len(self.shapes)} sizes; the most frequent: {common}")
            aspects = sorted(one.width / one.height for one in self.shapes for _ in range(one.count))
            lines.append(
                f"width / height from {aspects[0]:.2f} to {aspects[-1]:.2f}, median {aspects[len(aspects) // 2]:.2f}; "
                "training crops what does not fit."
            )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Look:
    """Facts about an image, without its pixels.

    Attributes:
        name: Name of the example.
        caption: Its caption.
        size: (width, height) in pixels.
        pixels: SHA-256 over size and pixels.
        hash: Perceptual hash.
        thumbnail: 8 x 8 RGB pixels.
        error: Message, if the image cannot be read.
    """

    name: str
    caption: str
    size: tuple[int, int] = (0, 0)
    pixels: bytes = b""
    hash: int = 0
    thumbnail: bytes = b""
    error: str = ""


def check(
    data: str | os.PathLike[str],
    *,
    model: SourceName | None = None,
    size: int | tuple[int, int] | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    class_folders: bool = False,
    default_caption: str = "",
    workers: int = 4,
) -> CheckReport:
    """Read a data set, and report its problems: unreadable or small images, missing or long captions, duplicates.

    Args:
        data: Path or id of the data set; see `open_examples`.
        model: Model that gives the image size and the tokenizer. None takes Stable Diffusion 1.x's: 512 pixels, 77
            tokens.
        size: (height, width) of the crop in pixels, or one number for a square. None takes the model's own size.
        split, image_column, caption_column, streaming, class_folders, default_caption: See `open_examples`.
        workers: Threads that read images.

    Raises:
        DataError: There is no such data set, or no image in it.
    """
    whole_number("workers", workers, 1)
    opened = Source.open(model) if model else None
    if size is None:
        size = own_size(opened, opened) if opened else SD_SIZE
    transform = Transform(size=sides(size))
    examples = open_examples(
        data, split=split, image_column=image_column, caption_column=caption_column, streaming=streaming,
        class_folders=class_folders, default_caption=default_caption,
    )  # fmt: skip
    distinct: Iterable[Example] = examples
    if class_folders:  # the repeats of an image in a class folder are no duplicates
        distinct = {example.name: example for example in examples}.values()
    if opened:
        text, tokenizer = opened.text_encoder()
        del opened  # frees the tensors that a pickled checkpoint holds in memory
        length = int(text.config.max_position_embeddings)
    else:
        tokenizer, length = load_tokenizer(ASSETS / "sd1" / "tokenizer"), 77
    with ThreadPoolExecutor(workers) as pool:
        total = len(examples) if isinstance(examples, Examples) else None
        looks = list(progress(ahead(pool, _look, distinct, 4 * workers), total, "check"))
    readable = [look for look in looks if not look.error]
    factors = {look: transform.enlargement(*look.size) for look in readable}
    tokens = {look: n for look in looks if (n := _tokens(tokenizer, look.caption)) > length - 2}
    findings = (
        _finding("unreadable", {look: look.error for look in looks if look.error}),
        _finding("too_small", too_small := [look for look, n in factors.items() if n > MAX_ENLARGEMENT]),
        _finding("enlarged", [look for look, n in factors.items() if 1 < n <= MAX_ENLARGEMENT]),
        _finding("no_caption", [look for look in looks if not look.caption]),
        Finding(
            kind="unread", what=FINDINGS["unread"][0], consequence=FINDINGS["unread"][1], names=tuple(examples.unread)
        ),
        _finding("long_caption", {look: f"{n} tokens in {-(-n // (length - 2))} chunks" for look, n in tokens.items()}),
        _finding("duplicates", groups=_equal(readable)),
        _finding("near_duplicates", groups=_near(readable)),
    )
    counts = Counter(look.size for look in readable).most_common()
    return CheckReport(
        source=os.fspath(data),
        size=transform.size,
        examples=len(looks),
        usable=len(readable) - len(too_small),
        findings=tuple(found for found in findings if found.count),
        shapes=tuple(Shape(width=width, height=height, count=n) for (width, height), n in counts),
    )


def _finding(kind: str, looks: Collection[_Look] = (), groups: Sequence[Sequence[_Look]] = ()) -> Finding:
    """Make a finding about images, given as a list or as image -> reason, or about groups of images."""
    what, consequence = FINDINGS[kind]
    return Finding(
        kind=kind,
        what=what,
        consequence=consequence,
        names=tuple(look.name for look in looks),
        groups=tuple(tuple(look.name for look in group) for group in groups),
        reasons={look.name: reason for look, reason in looks.items()} if isinstance(looks, Mapping) else {},
    )


def _tokens(tokenizer: Any, caption: str) -> int:
    return len(tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _look(example: Example) -> _Look:
    try:
        image = example.load()
    except ImageError as error:
        return _Look(name=example.name, caption=example.caption, error=str(error))
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
    thumbnail = image.resize((8, 8), Image.Resampling.BOX).tobytes()
    return _Look(
        name=example.name,
        caption=example.caption,
        size=image.size,
        pixels=pixels,
        hash=perceptual_hash(image),
        thumbnail=thumbnail,
    )


_N = np.arange(32)
_DCT = np.cos(math.pi / 32 * (_N + 0.5) * np.arange(8)[:, None])  # (8, 32), the 8 lowest frequencies of the DCT-II


def perceptual_hash(image: Image.Image) -> int:
    """Return pHash, a hash of 64 bits that is similar for images that look alike.

    The image is converted to greyscale and resized to 32 x 32. Each bit tells whether one of the 8 x 8 DCT coefficients
    of lowest frequency is above their median (Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash
    Functions, section 3.2.1).
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    frequencies = _DCT @ grey @ _DCT.T  # (8, 8)
    bits = frequencies.ravel() > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _equal(looks: Sequence[_Look]) -> list[list[_Look]]:
    """Return groups of two or more images with equal pixels."""
    groups: dict[bytes, list[_Look]] = defaultdict(list)
    for look in looks:
        groups[look.pixels].append(look)
    return [group for group in groups.values() if len(group) > 1]


def _near(looks: Sequence[_Look]) -> list[list[_Look]]:
    """Return groups of near duplicates: the connected components of the graph whose edges are near-duplicate pairs.

    Only the first of images with equal pixels is a node. Union-find merges the components.
    """
    distinct = list({look.pixels: look for look in reversed(looks)}.values())[::-1]
    parent = list(range(len(distinct)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    hashes = np.array([look.hash for look in distinct], dtype=np.uint64)
    thumbnails = np.frombuffer(b"".join(look.thumbnail for look in distinct), np.uint8).reshape(-1, 8 * 8 * 3)
    for bucket in _buckets(hashes):
        for k, i in enumerate(bucket[:-1]):
            others = bucket[k + 1 :]
            near = _bit_count(hashes[others] ^ hashes[i]) <= NEAR_BITS
            levels = np.abs(thumbnails[others].astype(np.int16) - thumbnails[i]).mean(axis=1)
            for j in others[near & (levels <= NEAR_LEVELS)]:
                parent[root(int(j))] = root(int(i))
    groups: dict[int, list[_Look]] = defaultdict(list)
    for i, look in enumerate(distinct):
        groups[root(i)].append(look)
    return [group for group in groups.values() if len(group) > 1]


def _buckets(hashes: npt.NDArray[np.uint64]) -> Iterable[npt.NDArray[np.int64]]:
    """Yield groups of indices of hashes, so that only pairs within a group need to be compared.

    The 64 bits are split into NEAR_BITS + 1 bands, and the hashes in a group are equal in one band. Two hashes that
    differ in at most NEAR_BITS bits are equal in at least one (the pigeonhole principle).
    """
    edges = np.linspace(0, 64, NEAR_BITS + 2).astype(int)
    for low, high in pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        yield from (bucket for bucket in np.split(order, starts) if len(bucket) > 1)


def _bit_count(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    bits = np.unpackbits(x[:, None].view(np.uint8), axis=1)
    return np.asarray(bits.sum(axis=1), dtype=np.int64)
