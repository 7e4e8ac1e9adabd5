"""Models side by side: measured, and written down as numbers, a table, curves and contact sheets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdkit import images as image_io
from sdkit.data.transform import Transform
from sdkit.errors import DataError
from sdkit.files import atomic_write
from sdkit.lpips import LPIPS
from sdkit.pipeline import StableDiffusion
from sdkit.recipes.emoji import evaluation as measure
from sdkit.recipes.emoji.evaluation import SCALE, STEPS, Gallery, Prompt
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed, read

SCALES, STEP_COUNTS = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0), (5, 10, 20, 30, 50)
PHOTO = 256  # pixels a side
COMPOSITIONS = 256  # of those held out, that the VAE is judged by
SHOWN, COLUMNS = 48, 8  # images on a contact sheet
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # of skimage.data, and none of them in training

Row = dict[str, Any]


def evaluate(
    models: Sequence[str | os.PathLike[str]], drawn: Path, out: Path, *, prompts: int = 320, sweeps: bool = True
) -> str:
    """Measure each model and write, into the folder `out`, evaluation.json, table.md and for each model a contact
    sheet, its VAE's sheet and its curves; returns the table.

    drawn    assets/ of the unpacked npm package
    prompts  that each model draws; half of them at each further guidance scale and number of steps
    sweeps   whether to look at these
    """
    out.mkdir(parents=True, exist_ok=True)
    lpips = LPIPS.from_pretrained()
    gallery = Gallery(drawn, lpips, out / "gallery")
    rows = {str(model): _row(model, gallery, lpips, out, prompts, sweeps) for model in models}
    table = _table(rows)
    for name, text in (("evaluation.json", json.dumps(rows, indent=2) + "\n"), ("table.md", table)):
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return table


def _row(source: str | os.PathLike[str], gallery: Gallery, lpips: LPIPS, out: Path, n: int, sweeps: bool) -> Row:
    model = StableDiffusion.from_pretrained(source)
    name = Path(source).name
    seen, held_out = measure.prompts(n), measure.prompts_held_out(n)
    real = [_composed(gallery.drawn, prompt) for prompt in seen]
    through = model.vae.reconstruct(real)
    drawn = measure.generated(model, seen, SCALE, STEPS)
    row: Row = {
        "vae, held-out compositions": measure.vae_quality(model, _compositions(gallery.drawn), lpips),
        "vae, held-out photos": measure.vae_quality(model, photos(), lpips),
        "through the VAE": measure.fidelity(gallery, seen, through),
        "generated": measure.fidelity(gallery, seen, drawn),
        "generated, held-out pairs": measure.fidelity(
            gallery, held_out, measure.generated(model, held_out, SCALE, STEPS)
        ),
    }
    _save_sheet(out / f"{name}-generated.png", drawn, seen)
    _save_vae_sheet(out / f"{name}-vae.png", model, [*real[:4], *photos()])
    if sweeps:
        some = seen[::2]
        settings = [*((scale, STEPS) for scale in SCALES), *((SCALE, steps) for steps in STEP_COUNTS)]
        found = {at: measure.fidelity(gallery, some, measure.generated(model, some, *at)) for at in {*settings}}
        row["scales"] = {scale: found[scale, STEPS] for scale in SCALES}
        row["steps"] = {steps: found[SCALE, steps] for steps in STEP_COUNTS}
        _save_curves(out / f"{name}-curves.png", row)
    return row


def photos() -> list[Image.Image]:
    """Photographs of scikit-image, 256 x 256: the shorter side resized to that, and the middle cut out."""
    try:
        from skimage import data
    except ImportError as error:
        raise DataError("the photographs that judge the VAE are scikit-image's: pip install scikit-image.") from error
    cut, unused = Transform(size=(PHOTO, PHOTO)), torch.Generator()  # in the middle, by no chance
    pixels = [cut(Image.fromarray(getattr(data, name)()), unused) for name in PHOTOS]
    return image_io.to_pil(torch.stack(pixels))


def _composed(drawn: Path, prompt: Prompt) -> Image.Image:
    return composed(read(drawn, prompt.picture.file), BACKGROUNDS[prompt.background])


def _compositions(drawn: Path) -> list[Image.Image]:
    return [_composed(drawn, prompt) for prompt in measure.prompts_held_out(COMPOSITIONS)]


def _save_sheet(path: Path, images: Sequence[Image.Image], asked: Sequence[Prompt]) -> None:
    every = max(1, len(images) // SHOWN)
    texts = [prompt.text for prompt in asked[::every][:SHOWN]]
    image_io.save(image_io.grid(images[::every][:SHOWN], COLUMNS, padding=6, captions=texts), path)


def _save_vae_sheet(path: Path, model: StableDiffusion, originals: Sequence[Image.Image]) -> None:
    both = [*originals, *model.vae.reconstruct(list(originals))]
    labels = ("original", "through the VAE")
    image_io.save(image_io.grid(both, len(originals), padding=6, row_labels=labels), path)


def _table(rows: Mapping[str, Row]) -> str:
    """Markdown, a line for each number and a column for each model."""
    lines = [f"| | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in _lines(rows)]
    return "\n".join(lines) + "\n"


def _lines(rows: Mapping[str, Row]) -> Iterator[tuple[str, list[str]]]:
    units = {"psnr": "{:.2f} dB", "ssim": "{:.3f}", "lpips": "{:.4f}"}
    first = next(iter(rows.values()))
    for group, measured in first.items():
        for name in measured if group not in ("scales", "steps") else ():
            form = units.get(name, "{:.1%}" if isinstance(measured[name], float) else "{}")
            yield f"{group}: {name}", [form.format(row[group][name]) for row in rows.values()]


def _save_curves(path: Path, row: Row) -> None:
    """Fidelity against guidance scale and against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("scales", "guidance scale", f"{STEPS} steps"), ("steps", "DDIM steps", f"guidance scale {SCALE:g}"))
    for place, (key, label, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for name, text in (("background", "background right"), ("top5", "among the first five"), ("top1", "first")):
            axes.plot([float(x) for x in row[key]], [m[name] for m in row[key].values()], "o-", label=text)
        axes.set(xlabel=label, ylabel="share of prompts", ylim=(0, 1.02), title=title)
        axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
