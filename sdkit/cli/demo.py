"""The demo: a grid of images that shows what can be drawn, and photos taken through the VAE."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from sdkit import images
from sdkit.cli.jobs import Reconstruction, Report, check_writable, reconstruct_files
from sdkit.pipelines.text_to_image import StableDiffusion

COLUMNS = 4
SEEDED = ("a fox", "a birthday cake on a pink background")
"""Prompts that are drawn once for each seed, from 0."""
DIFFERENT = (
    "a large 3d cactus on a yellow background", "a large flat cactus on a yellow background",
    "a large noto cactus on a yellow background", "a large twemoji cactus on a yellow background",
    "a large panda on an orange background", "a small unicorn on the left of a blue background",
    "a small rocket at the top of a black background", "a ghost and a balloon on a green background",
)  # fmt: skip
"""Prompts of all four styles, and of sizes, places, and two things."""
SKETCHED = "a large 3d red apple on a yellow background"
PAIR = "a flat panda and a flat cactus on a purple background"
CHANGED = "a flat panda and a flat ghost on a purple background"
PHOTOS = ("astronaut", "chelsea", "coffee")  # names in skimage.data


def demo_files(
    sd: StableDiffusion, out: str | Path = "demo", photos: Sequence[str | Path] = ()
) -> tuple[Path, str, Report[Reconstruction]]:
    """Generate a grid of images, and encode and decode photos.

    The rows of the grid are: two prompts with four seeds each; a thing in four styles; sizes, places, and two things;
    and image to image and inpainting, each with what it started from.

    Args:
        sd: The model.
        out: Output folder.
        photos: Images to encode and decode. By default three photos of scikit-image, or the generated images if
            scikit-image is not installed.

    Returns:
        The path of the grid, a description of the photos ("photos of scikit-image"), and the report of their
        reconstructions.
    """
    folder = Path(out)
    check_writable(folder)
    captions, made = _drawn(sd)
    images.save(images.grid(made, COLUMNS, padding=6, captions=captions), folder / "generated.png")
    if photos:
        return folder / "generated.png", "photos given", reconstruct_files(sd.vae, photos, folder)
    kind, pictures = "generated images", {f"{i:02d}": image for i, image in enumerate(made, start=1)}
    with contextlib.suppress(ImportError):
        from skimage import data  # scikit-image comes with the extra `dev`

        pictures = {name: Image.fromarray(getattr(data, name)()) for name in PHOTOS}
        kind = "photos of scikit-image"
    photos = [folder / "photos" / f"{name}.png" for name in pictures]
    for path, picture in zip(photos, pictures.values(), strict=True):
        images.save(picture, path)
    return folder / "generated.png", kind, reconstruct_files(sd.vae, photos, folder)


def _drawn(sd: StableDiffusion) -> tuple[list[str], list[Image.Image]]:
    """Draw the images of the grid, and return their captions, too."""
    seeded = [(prompt, seed) for prompt in SEEDED for seed in range(COLUMNS)]
    prompts, seeds = zip(*seeded, *((prompt, 0) for prompt in (*DIFFERENT, PAIR)), strict=True)
    *made, pair = sd(prompts, seed=seeds)
    captions = [f"{prompt} (seed {seed})" for prompt, seed in seeded]
    sketch = _sketch(pair.size)
    (apple,) = sd(SKETCHED, image=sketch, strength=0.7)
    (changed,) = sd(CHANGED, image=pair, mask_image=_right_half(pair.size))
    return (
        [*captions, *DIFFERENT, "a sketch", f"image to image: {SKETCHED}", PAIR, f"inpainted: {CHANGED}"],
        [*made, sketch, apple, pair, changed],
    )


def _sketch(size: tuple[int, int]) -> Image.Image:
    """Return a sketch of an apple of three flat shapes."""
    width, height = size
    sketch = Image.new("RGB", size, (250, 215, 70))
    pen = ImageDraw.Draw(sketch)
    pen.ellipse((0.15 * width, 0.25 * height, 0.85 * width, 0.9 * height), fill=(200, 30, 40))
    pen.line((0.5 * width, 0.3 * height, 0.55 * width, 0.1 * height), fill=(90, 60, 30), width=max(1, width // 24))
    pen.ellipse((0.55 * width, 0.1 * height, 0.75 * width, 0.22 * height), fill=(70, 160, 60))
    return sketch


def _right_half(size: tuple[int, int]) -> Image.Image:
    """Return a mask of the right half."""
    width, height = size
    mask = Image.new("L", size)
    mask.paste(255, (width // 2, 0, width, height))
    return mask
