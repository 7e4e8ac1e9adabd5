"""Make the data sets from the unpacked npm packages and a folder of photographs.

There are tiles for the VAE, captioned images for the U-Net, and images that are held out of both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdkit import images as image_io
from sdkit.atomic import whole_folder
from sdkit.errors import DataError, SdkitError, TrainingError
from sdkit.prefetch import ahead
from sdkit.progress import progress
from sdkit.recipes.emoji import compositions
from sdkit.recipes.emoji.compositions import Companions, Composition, all_pairs, companions
from sdkit.recipes.emoji.drawings import Drawings
from sdkit.recipes.emoji.pictures import (
    BACKGROUNDS,
    SIDE,
    SIZE,
    STYLES,
    Picture,
    composed,
    held_out,
    pictures,
    read,
    used,
)


class Tiles(NamedTuple):
    """A training set of the VAE.

    Shares are from 0 to 1. The remaining tiles show any emoji, mostly at a random size and place.

    Attributes:
        size: Pixels on a side.
        number: Number of tiles.
        photographs: Share of tiles cut from photographs.
        captioned: Share of tiles cut from captioned images.
    """

    size: int
    number: int
    photographs: float
    captioned: float


TILES = {
    "tiles": Tiles(64, 16_000, 0.4, 0.0),
    "fine_tiles": Tiles(SIZE, 12_000, 0.1, 0.8),
    "details": Tiles(64, 24_000, 0.1, 0.8),
}
CAPTIONED = {"plain": 4, "captioned": 16}
"""Captioned set -> images of each pair of picture and style: `compositions.plain` ones, and then all kinds."""
TWO = 0.12  # share of captioned images with two pictures, of those that can have them
AS_CAPTIONED = 0.7  # share of `_drawn_tile`'s SIZE x SIZE tiles that show the picture as large as possible
FLAT = 20  # largest standard deviation, of values from 0 to 255, at which a photograph's tile counts as plain
PHOTO_HEIGHT = 1600  # pixels; larger photographs are reduced to this before tiles are cut

MADE_OF = ".made-of"  # file beside the images with a digest of their raw material and settings
AHEAD = 64  # pictures or tiles that threads make ahead of time

Captioned = tuple[str, Image.Image, str]  # file name, image, caption


class _Set(NamedTuple):
    """A data set to make.

    Attributes:
        make: Function from a number to its images.
        n: Number of calls of `make`.
        made_of: Description of everything that the images depend on, except the raw material.
    """

    make: Callable[[int], list[Captioned]]
    n: int
    made_of: object


def prepare_tiles(drawings: Drawings, photographs: Path, out: Path, names: Collection[str] = tuple(TILES)) -> None:
    """Write the data sets of the VAE: those of `TILES`, and out/held_out.

    Each is a folder of images with a metadata.jsonl. A data set that an earlier call made in the same way, from files
    with the same names and sizes, is left unchanged.

    Args:
        drawings: The pictures in all styles.
        photographs: Folder with the photographs that photos.txt names, at any depth.
        out: Folder to write.
        names: The sets of `TILES` to write.

    Raises:
        DataError: Raw material is missing or damaged, or `out` holds folders of something else.
        TrainingError: A folder cannot be written.
    """
    stems, photos = used(drawings.solid), _photos(photographs)
    beside, held = companions(pictures()), [_held_out_plan(number) for number in range(len(pictures()))]
    constants = (AS_CAPTIONED, FLAT, PHOTO_HEIGHT, SIDE)
    samples = [_plan(name, picture, style, beside) for name in CAPTIONED for picture, style in all_pairs(pictures())]
    sets = {
        name: _Set(partial(_tile, name, drawings, stems, photos, beside), tiles.number, (tiles, constants, samples))
        for name, tiles in TILES.items()
        if name in names
    }
    sets["held_out"] = _Set(partial(_captioned, drawings, [[one] for one in held]), len(held), held)
    _make(sets, [*photos, *(drawings.solid / f"{stem}.webp" for stem in stems), *drawings.files], out)


def prepare_captioned(drawings: Drawings, out: Path) -> None:
    """Write the data sets of the U-Net, which `CAPTIONED` lists, as `prepare_tiles` does.

    Raises:
        DataError: Raw material is missing or damaged, or `out` holds folders of something else.
        TrainingError: A folder cannot be written.
    """
    stems, beside = used(drawings.solid), companions(pictures())
    sets = {}
    for name in CAPTIONED:
        plans = [_plan(name, picture, style, beside) for picture, style in all_pairs(pictures())]
        sets[name] = _Set(partial(_captioned, drawings, plans), len(plans), plans)
    _make(sets, [*(drawings.solid / f"{stem}.webp" for stem in stems), *drawings.files], out)


def _make(sets: Mapping[str, _Set], files: Sequence[Path], out: Path) -> None:
    """Write the data sets, except those that an earlier call made in the same way from the same files."""
    material = [(file.name, file.stat().st_size) for file in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads help, because Pillow releases the GIL
        for name, one in sets.items():
            rules = f"{SIZE} {compositions.MARGIN} {compositions.GRID} {compositions.STRIDE} {BACKGROUNDS}"
            made_of = f"{name} {one.n} {one.made_of} {rules} {material}"
            digest, folder = hashlib.sha256(made_of.encode()).hexdigest(), out / name
            if (folder / MADE_OF).is_file() and (folder / MADE_OF).read_text() == digest:
                continue
            if folder.exists() and not (folder / MADE_OF).is_file():
                raise DataError(f"{folder} is there already, and not of this recipe; move it, or name another --out.")
            with whole_folder(folder, TrainingError) as unfinished:
                made = ahead(pool, partial(_written, one.make, unfinished), range(one.n), AHEAD)
                try:
                    lines = [line for lines_of_one in progress(made, one.n, name) for line in lines_of_one]
                except SdkitError as error:  # without its cause, which `whole_folder` would take for a failed write
                    raise error from None
                (unfinished / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
                (unfinished / MADE_OF).write_text(digest)


def _written(make: Callable[[int], list[Captioned]], folder: Path, number: int) -> list[str]:
    """Write the images of one tile or picture into the folder, and return their lines of metadata.jsonl."""
    lines = []
    for name, image, text in make(number):
        image.save(folder / name, compress_level=1)
        lines.append(json.dumps({"file_name": name, "text": text}) + "\n")
    return lines


def _captioned(drawings: Drawings, plans: Sequence[Sequence[Composition]], number: int) -> list[Captioned]:
    """Return the images of one of the plans."""
    return [
        (f"{number:04}-{n}.png", composition.drawn(drawings), composition.caption)
        for n, composition in enumerate(plans[number])
    ]


def _plan(name: str, picture: Picture, style: str, beside: Companions) -> list[Composition]:
    """Return the compositions of a picture in a style in one of the captioned sets."""
    rng = Random(f"{name} {picture.file} {style}")
    if name == "plain":
        return [compositions.plain(picture, style, rng) for _ in range(CAPTIONED[name])]
    return [_composition(picture, style, beside, rng) for _ in range(CAPTIONED[name])]


def _composition(picture: Picture, style: str, beside: Companions, rng: Random) -> Composition:
    """Return a random composition of a picture in a style, in some cases beside another picture."""
    if rng.random() >= TWO or picture not in beside[style] or len(beside[style]) < 2:
        return compositions.one(picture, style, rng)
    other = picture
    while other == picture:
        other = rng.choice(beside[style])
    both = [picture, other]
    rng.shuffle(both)
    return compositions.two(both, style, rng)


def _held_out_plan(number: int) -> Composition:
    """Return a picture on its held-out background, and in its held-out style if there is one."""
    picture = pictures()[number]
    style = picture.held_out_style or STYLES[number % len(STYLES)]
    return compositions.one(picture, style, Random(f"held_out {picture.file}"), [picture.held_out])


def _tile(
    name: str, drawings: Drawings, stems: Sequence[str], photos: Sequence[Path], beside: Companions, number: int
) -> list[Captioned]:
    """Return a tile: a square of a photograph, a square of a composition, or any picture at a random place."""
    rng = Random(f"{name} {number}")
    tiles, size = TILES[name], TILES[name].size
    kind = rng.random()
    if kind < tiles.photographs:
        tile = _photo_tile(size, photos, rng)
    elif kind < tiles.photographs + tiles.captioned:
        picture = rng.choice(pictures())
        composition = _composition(picture, rng.choice(picture.styles), beside, rng)
        left, top = (rng.randint(0, SIZE - size) for _ in "xy")
        tile = composition.drawn(drawings).crop((left, top, left + size, top + size))
    else:
        tile = _drawn_tile(size, drawings.solid, stems, rng)
    return [(f"{number:05}.png", tile, "")]


def _photo_tile(size: int, photos: Sequence[Path], rng: Random) -> Image.Image:
    """Return a random square of a random photograph, resized to the tile's size. Plain squares are rejected."""
    for _ in range(1000):
        photo = _photo(rng.choice(photos))
        side = int(math.exp(rng.uniform(math.log(2 * size), math.log(0.9 * min(photo.size)))))
        left, top = (rng.randint(0, room - side) for room in photo.size)
        tile = photo.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        if np.asarray(tile).std((0, 1)).max() > FLAT:
            return tile
    raise DataError("the photographs show next to nothing but plain areas; are they those that photos.txt names?")


def _drawn_tile(size: int, drawn: Path, stems: Sequence[str], rng: Random) -> Image.Image:
    """Return a random picture on a random background, mostly at a random size and place."""
    stem = rng.choice(stems)
    named = _trained_on(stem)
    any_colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    colour = rng.choice(named) if rng.random() < 0.6 else any_colour
    if size == SIZE and rng.random() < AS_CAPTIONED:
        return composed(read(drawn, stem), colour)
    side = rng.randrange(SIZE * 3 // 8, SIZE * 9 // 8)
    reach = min(side, size * 2 // 3)  # at least this much of the picture, in each direction, is on the tile
    corner = (rng.randint(reach - side, size - reach), rng.randint(reach - side, size - reach))
    return composed(read(drawn, stem), colour, size=size, side=side, corner=corner)


def _trained_on(stem: str) -> list[tuple[int, int, int]]:
    """Return the background colours of an emoji in training: all except the held-out one."""
    return [colour for name, colour in BACKGROUNDS.items() if name != held_out().get(stem)]


@lru_cache(maxsize=64)
def _photo(path: Path) -> Image.Image:
    """Return a photograph, reduced if it is large."""
    photo = image_io.read(path)
    if 0.9 * min(photo.size) < 2 * SIZE:
        raise DataError(f"{path} is too small, {photo.width} x {photo.height}; is it the one that photos.txt names?")
    photo.thumbnail((3 * PHOTO_HEIGHT, PHOTO_HEIGHT), Image.Resampling.LANCZOS)
    return photo


def _photos(folder: Path) -> list[Path]:
    """Return the files that photos.txt names, at any depth in `folder`. Raises DataError if any is missing."""
    wanted = (Path(__file__).parent / "photos.txt").read_text(encoding="utf-8").split()
    files = sorted(path for path in folder.rglob("*.jpg") if path.is_file())
    found = {end: next((path for path in files if path.as_posix().endswith(f"/{end}")), None) for end in wanted}
    missing = [end for end, path in found.items() if path is None]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(wanted)} photographs, {missing[0]} first; give the "
            "folder that the packages were unpacked to."
        )
    return [path for path in found.values() if path is not None]
