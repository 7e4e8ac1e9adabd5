"""Stand-ins for the recipe's downloads: discs in place of the drawn pictures, noise in place of the photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdkit.recipes.emoji import prepare as module
from sdkit.recipes.emoji.drawings import VECTORS, Drawings
from sdkit.recipes.emoji.pictures import pictures

FEW = pictures()[:5]
COLOUR = (200, 30, 90)
COLOURS = {"3d": COLOUR, "flat": (10, 200, 10), "noto": (10, 10, 200), "twemoji": (0, 180, 180)}
NOT_USED = ("1f1e6-1f1e8", "0023-fe0f-20e3", "1f44b-1f3fd", "1f3f4-e0067_e0062_e0065_e006e_e0067")


def make_drawn(folder: Path) -> Path:
    """Make a folder like the npm package's assets/: discs of 256 pixels for the first pictures, one picture that has no
    name, and files that the recipe ignores.
    """
    folder.mkdir()
    disc = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(disc).ellipse((8, 8, 247, 247), fill=(*COLOUR, 255))
    for stem in (*(one.file for one in FEW), "1f468", *NOT_USED):
        disc.save(folder / f"{stem}.webp", lossless=True)
    return folder


def make_photographs(folder: Path) -> Path:
    """Write noise in the place of each of the recipe's photographs."""
    noise = np.random.default_rng(0).integers(256, size=(300, 320, 3), dtype=np.uint8)
    for name in (Path(module.__file__).parent / "photos.txt").read_text().split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / name)
    return folder


def make_vectors(folder: Path) -> Path:
    """Make a folder like the npm packages @iconify-json: discs in the colours of `COLOURS` for the first pictures.

    Their left halves are darker. As in the packages, "-fe0f" and "_" of the code points are left out.
    """
    for style, package in VECTORS.items():
        colour = "rgb({},{},{})".format(*COLOURS[style])
        body = f'<circle cx="16" cy="16" r="15" fill="{colour}"/><path d="M16 1a15 15 0 0 0 0 30z" fill-opacity=".5"/>'
        icons = {one.name.replace(" ", "-"): {"body": body} for one in FEW}
        characters = {one.file.replace("-fe0f", "").replace("_", "-"): one.name.replace(" ", "-") for one in FEW}
        (folder / package).mkdir(parents=True)
        (folder / package / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
        (folder / package / "chars.json").write_text(json.dumps(characters))
    return folder


def make_drawings(folder: Path) -> Drawings:
    """Make stand-ins for all four npm packages."""
    folder.mkdir(exist_ok=True)
    return Drawings(make_drawn(folder / "assets"), make_vectors(folder / "vectors"))
