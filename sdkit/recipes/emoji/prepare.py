"""From the unpacked npm package and a folder of photographs to data sets: tiles for the VAE, captioned images for the
U-Net, and the compositions held out of both."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdkit import images as image_io
from sdkit.errors import DataError, SdkitError
from sdkit.prefetch import ahead
from sdkit.progress import progress
from sdkit.recipes.emoji.pictures import (
    BACKGROUNDS,
    SIDE,
    SIZE,
    caption,
    composed,
    held_out,
    pictures,
    read,
    used,
    with_article,
)
from sdkit.training.checkpoint import whole_folder


class Tiles(NamedTuple):
    """Training images of the VAE."""

    size: int  # pixels a side
    number: int
    photographs: float  # share of them, and of captioned images; the others are any picture anywhere
    captioned: float


TILES = {
    "tiles": Tiles(64, 16_000, 0.4, 0.0),
    "fine_tiles": Tiles(SIZE, 12_000, 0.1, 0.8),
    "details": Tiles(64, 24_000, 0.1, 0.8),
}
AS_CAPTIONED = 0.7  # share of the pictures on large tiles that have the size and place of the captioned images
FLAT = 20  # of 255: photographs' tiles of a smaller standard deviation are drawn again
PHOTO_HEIGHT = 1600  # pixels, to which larger photographs are reduced before tiles are cut

MADE_OF = ".made-of"  # beside the images: a digest of what they were made of
AHEAD = 64  # images that are begun before they are wanted

Captioned = tuple[str, Image.Image, str]  # file name, image, caption


def prepare(drawn: Path, photographs: Path, out: Path) -> None:
    """Write out/tiles, out/fine_tiles, out/details, out/captioned and out/held_out, image folders with a
    metadata.jsonl each.

    One that an earlier call has made, in the same way of files of the same names and sizes, is left as it is.

    drawn        assets/ of the unpacked npm package
    photographs  a folder with those that photos.txt names, at any depth
    """
    stems, photos = used(drawn), _photos(photographs)
    sets: list[tuple[str, Callable[..., list[Captioned]], int]] = [
        *((name, partial(_tile, name, drawn, stems, photos), tiles.number) for name, tiles in TILES.items()),
        ("captioned", partial(_captioned, drawn), len(pictures())),
        ("held_out", partial(_held_out, drawn), len(pictures())),
    ]
    files = [*photos, *(drawn / f"{stem}.webp" for stem in stems)]
    material = [(file.name, file.stat().st_size) for file in files]
    texts = [_texts(number) for number in range(len(pictures()))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside Python's lock
        for name, make, n in sets:
            ways = (TILES.get(name), n, AS_CAPTIONED, FLAT, PHOTO_HEIGHT, SIZE, SIDE, BACKGROUNDS)
            all_of_it = f"{name} {ways} {pictures()} {texts} {material}"
            digest, folder = hashlib.sha256(all_of_it.encode()).hexdigest(), out / name
            if (folder / MADE_OF).is_file() and (folder / MADE_OF).read_text() == digest:
                continue
            if folder.exists() and not (folder / MADE_OF).is_file():
                raise DataError(f"{folder} is there already, and not of this recipe; move it, or name another --out.")
            with whole_folder(folder) as unfinished:
                made = ahead(pool, partial(_written, make, unfinished), range(n), AHEAD)
                try:
                    lines = [line for some in progress(made, n, name) for line in some]
                except SdkitError as error:  # of what is read; `whole_folder` explains what cannot be written
                    raise error from None
                (unfinished / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
                (unfinished / MADE_OF).write_text(digest)


def _written(make: Callable[[int], list[Captioned]], folder: Path, number: int) -> list[str]:
    """The lines of metadata.jsonl of the images of one number, which are written into the folder."""
    lines = []
    for name, image, text in make(number):
        image.save(folder / name, compress_level=1)
        lines.append(json.dumps({"file_name": name, "text": text}) + "\n")
    return lines


def _captioned(drawn: Path, number: int) -> list[Captioned]:
    """A picture on all backgrounds but the one held out."""
    one = pictures()[number]
    image = read(drawn, one.file)
    made = []
    for background, texts in _texts(number).items():
        composition = composed(image, BACKGROUNDS[background])
        made += [(f"{one.file}-{background}-{n}.png", composition, text) for n, text in enumerate(texts)]
    return made


def _texts(number: int) -> dict[str, list[str]]:
    """A picture's captions on each background but the one held out; on white also such as do not name it."""
    one = pictures()[number]
    texts = {}
    for k, background in enumerate(BACKGROUNDS):
        if background == one.held_out:
            continue
        name = one.names[(number + k) % 4 == 3 and len(one.names) > 1]
        texts[background] = [caption(name, background, article=(number + k) % 2 == 0)]
        if background == "white":
            texts[background] += [one.name, *map(with_article, one.names)]
    return texts


def _held_out(drawn: Path, number: int) -> list[Captioned]:
    """A picture on the background that is held out."""
    one = pictures()[number]
    image = composed(read(drawn, one.file), BACKGROUNDS[one.held_out])
    return [(f"{one.file}-{one.held_out}.png", image, caption(one.name, one.held_out))]


def _tile(name: str, drawn: Path, stems: Sequence[str], photos: Sequence[Path], number: int) -> list[Captioned]:
    """A square of a photograph or of a captioned image, or any picture of random size and place on a random
    background."""
    rng = Random(f"{name} {number}")
    tiles, size = TILES[name], TILES[name].size
    kind = rng.random()
    if kind < tiles.photographs:
        tile = _photo_tile(size, photos, rng)
    elif kind < tiles.photographs + tiles.captioned:
        file = rng.choice(pictures()).file
        left, top = (rng.randint(0, SIZE - size) for _ in "xy")
        tile = composed(read(drawn, file), rng.choice(_trained_on(file))).crop((left, top, left + size, top + size))
    else:
        tile = _drawn_tile(size, drawn, stems, rng)
    return [(f"{number:05}.png", tile, "")]


def _photo_tile(size: int, photos: Sequence[Path], rng: Random) -> Image.Image:
    for _ in range(1000):
        photo = _photo(rng.choice(photos))
        side = int(math.exp(rng.uniform(math.log(2 * size), math.log(0.9 * min(photo.size)))))
        left, top = (rng.randint(0, room - side) for room in photo.size)
        tile = photo.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        if np.asarray(tile).std((0, 1)).max() > FLAT:
            return tile
    raise DataError("the photographs show next to nothing but plain areas; are they those that photos.txt names?")


def _drawn_tile(size: int, drawn: Path, stems: Sequence[str], rng: Random) -> Image.Image:
    stem = rng.choice(stems)
    named = _trained_on(stem)
    any_colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    colour = rng.choice(named) if rng.random() < 0.6 else any_colour
    if size == SIZE and rng.random() < AS_CAPTIONED:
        return composed(read(drawn, stem), colour)
    side = rng.randrange(SIZE * 3 // 8, SIZE * 9 // 8)
    reach = min(side, size * 2 // 3)  # of the picture that is on the tile, at least
    corner = (rng.randint(reach - side, size - reach), rng.randint(reach - side, size - reach))
    return composed(read(drawn, stem), colour, size=size, side=side, corner=corner)


def _trained_on(stem: str) -> list[tuple[int, int, int]]:
    """The colours of the backgrounds of a picture that are not held out."""
    return [colour for name, colour in BACKGROUNDS.items() if name != held_out().get(stem)]


@lru_cache(maxsize=64)
def _photo(path: Path) -> Image.Image:
    photo = image_io.read(path)
    if 0.9 * min(photo.size) < 2 * SIZE:
        raise DataError(f"{path} is too small, {photo.width} x {photo.height}; is it the one that photos.txt names?")
    photo.thumbnail((3 * PHOTO_HEIGHT, PHOTO_HEIGHT), Image.Resampling.LANCZOS)
    return photo


def _photos(folder: Path) -> list[Path]:
    """The files that photos.txt names, below a folder."""
    wanted = (Path(__file__).parent / "photos.txt").read_text(encoding="utf-8").split()
    there = sorted(path for path in folder.rglob("*.jpg") if path.is_file())
    found = {end: next((path for path in there if path.as_posix().endswith(f"/{end}")), None) for end in wanted}
    missing = [end for end, path in found.items() if path is None]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} photographs, {missing[0]} first; give the "
            "folder that the packages were unpacked to."
        )
    return [path for path in found.values() if path is not None]
