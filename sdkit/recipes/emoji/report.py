"""Evaluate models side by side, and write numbers, a table, curves, and contact sheets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from sdkit import images as image_io
from sdkit.arguments import whole_number
from sdkit.atomic import atomic_write
from sdkit.cli.jobs import check_files
from sdkit.data.transform import Transform
from sdkit.errors import ArgumentError, DataError
from sdkit.networks.autoencoder import VAE
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.generation import anywhere
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.recipes.emoji import evaluation as measure
from sdkit.recipes.emoji.evaluation import SCALE, STEPS, Gallery, Prompt
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed, read

SCALES, STEP_COUNTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0), (5, 10, 20, 30, 50)
PHOTO = 256  # side of the photographs in pixels
COMPOSITIONS = 256  # held-out images on which the VAE is measured
SHOWN, COLUMNS = 48, 8  # images on a contact sheet, and in a row of it
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # names in skimage.data; training uses none of them

Row = dict[str, Any]
Asked = Sequence[Prompt]


def evaluate(
    models: Sequence[str | os.PathLike[str]], drawn: Path, out: Path, *, prompts: int = 320, sweeps: bool = True
) -> str:
    """Measure models, and write the results.

    The folder gets evaluation.json, table.md, and for each model a contact sheet of its images, one of its VAE's
    reconstructions, and its curves.

    Args:
        models: Sources of the models.
        drawn: assets/ of the unpacked npm package.
        out: Folder of the results. Results of earlier calls are kept in it.
        prompts: Number of prompts from training, and of held-out prompts.
        sweeps: Whether to measure at other guidance scales and numbers of steps, too.

    Returns:
        The table, in Markdown, of these models and of those measured before.

    Raises:
        SdkitError: A model, a picture, or a library is missing, or two models would share their files' names.
    """
    whole_number("prompts", prompts, 1)
    check_files(out)
    rows = _earlier(out / "evaluation.json")
    names = {source: _slug(source) for source in (anywhere(os.fspath(model)) for model in models)}
    known = names | {source: _slug(source) for source in rows}
    if len(names) < len(models) or len({*known.values()}) < len(known):
        raise ArgumentError(
            f"two of the models ({', '.join(known)}) would write files of the same name; give each its own --out."
        )
    if sweeps:
        _canvas()
    lpips = LPIPS.from_pretrained("vgg")
    gallery = Gallery(drawn, lpips, out / "gallery")
    asked = measure.prompts(prompts), measure.prompts_held_out(prompts)
    if missing := {prompt.picture.file for of_one_kind in asked for prompt in of_one_kind} - {*gallery.names}:
        raise DataError(f"{drawn} lacks {len(missing)} pictures, {min(missing)}.webp first; is it of another version?")
    # Load everything first, so that a missing model is reported before the first one has been measured for hours.
    photographs, loaded = photos(), [StableDiffusion.from_pretrained(source) for source in names]
    for model, (source, name) in zip(loaded, names.items(), strict=True):
        vae = VAE.from_pretrained(source, dtype="fp32")
        row, drawn_images = _row(model, vae, gallery, photographs, *asked)
        if (before := rows.get(source, {})).get("generated") == row["generated"]:
            row = before | row  # equal results: the model is unchanged, and its earlier sweeps stay valid
        else:
            (out / f"{name}-curves.png").unlink(missing_ok=True)
        rows[source] = row
        table = _save_rows(out, rows)
        _save_sheet(out / f"{name}-generated.png", drawn_images, asked[0])
        _save_vae_sheet(out / f"{name}-vae.png", vae, [*(_composed(drawn, one) for one in asked[1][:4]), *photographs])
        if sweeps:
            row |= _sweeps(model, gallery, row, *asked)
            table = _save_rows(out, rows)
            _save_curves(out / f"{name}-curves.png", row)
    return table


def _slug(source: str) -> str:
    """Return a model's source as a slug for file names."""
    return re.sub(r"[^\w.]+", "-", source)[-100:].strip("-.")


def _save_rows(out: Path, rows: Mapping[str, Row]) -> str:
    """Write evaluation.json and table.md, and return the table."""
    with atomic_write(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    table = _table(rows)
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    return table


def _earlier(path: Path) -> dict[str, Row]:
    """Return the rows of earlier calls. Raises DataError if the file is damaged."""
    try:
        rows: dict[str, Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not all(isinstance(group, dict) for row in rows.values() for group in row.values()):
            raise ValueError
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged; remove it.") from error
    return rows


def _row(
    model: StableDiffusion, vae: VAE, gallery: Gallery, photographs: Sequence[Image.Image], seen: Asked, held_out: Asked
) -> tuple[Row, list[Image.Image]]:
    """Return the metrics of a model, and its images for the prompts from training.

    `vae` is the model's VAE in float32, the precision in which training validates it.
    """
    compositions = [_composed(gallery.drawn, prompt) for prompt in measure.prompts_held_out(COMPOSITIONS)]
    reconstructed = vae.reconstruct([_composed(gallery.drawn, prompt) for prompt in seen])
    drawn = measure.generated(model, seen, SCALE, STEPS)
    return {
        "vae, held-out compositions": measure.vae_quality(vae, compositions, gallery.lpips),
        "vae, held-out photos": measure.vae_quality(vae, photographs, gallery.lpips),
        "through the VAE": measure.fidelity(gallery, seen, reconstructed),
        "generated": measure.fidelity(gallery, seen, drawn),
        "generated, held-out pairs": measure.fidelity(
            gallery, held_out, measure.generated(model, held_out, SCALE, STEPS)
        ),
    }, drawn


def _sweeps(model: StableDiffusion, gallery: Gallery, row: Row, seen: Asked, held_out: Asked) -> Row:
    """Return the fidelity at all guidance scales and step counts, with the background accuracy on held-out pairs.

    The metrics at (SCALE, STEPS) are taken from `row`, and not computed again.
    """
    measured: dict[tuple[float, int], tuple[measure.Measured, measure.Measured]] = {
        (SCALE, STEPS): (row["generated"], row["generated, held-out pairs"])
    }
    for point in (*((scale, STEPS) for scale in SCALES), *((SCALE, steps) for steps in STEP_COUNTS)):
        if point not in measured:
            of_seen, of_held_out = (
                measure.fidelity(gallery, asked, measure.generated(model, asked, *point)) for asked in (seen, held_out)
            )
            measured[point] = of_seen, of_held_out
    merged = {
        point: of_seen | {"background, held-out pairs": of_held_out["background"]}
        for point, (of_seen, of_held_out) in measured.items()
    }
    return {
        "scales": {scale: merged[scale, STEPS] for scale in SCALES},
        "steps": {steps: merged[SCALE, steps] for steps in STEP_COUNTS},
    }


def photos() -> list[Image.Image]:
    """Return the sample photographs that come with scikit-image, resized and cropped at the centre to 256 x 256."""
    try:
        from skimage import data
    except ImportError as error:
        raise DataError("the photographs that judge the VAE are scikit-image's: pip install scikit-image.") from error
    crop, unused_generator = Transform(size=(PHOTO, PHOTO)), torch.Generator()  # a centre crop is not random
    pixels = [crop(Image.fromarray(getattr(data, name)()), unused_generator) for name in PHOTOS]
    return image_io.to_pil(torch.stack(pixels))


def _composed(drawn: Path, prompt: Prompt) -> Image.Image:
    """Return the reference image of a prompt: the emoji itself on its background."""
    return composed(read(drawn, prompt.picture.file), BACKGROUNDS[prompt.background])


def _save_sheet(path: Path, images: Sequence[Image.Image], asked: Asked) -> None:
    """Save a contact sheet of some of the images with their prompts."""
    # A random choice, because every n-th prompt could have the same background.
    chosen = sorted(Random(0).sample(range(len(images)), min(SHOWN, len(images))))
    texts = [asked[i].text for i in chosen]
    image_io.save(image_io.grid([images[i] for i in chosen], COLUMNS, padding=6, captions=texts), path)


def _save_vae_sheet(path: Path, vae: VAE, originals: Sequence[Image.Image]) -> None:
    """Save a contact sheet of images and their reconstructions."""
    both = [*originals, *vae.reconstruct(list(originals))]
    labels = ("original", "through the VAE")
    image_io.save(image_io.grid(both, len(originals), padding=6, row_labels=labels), path)


def _table(rows: Mapping[str, Row]) -> str:
    """Return a Markdown table with a line for each metric and a column for each model."""
    lines = [f"| | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in _lines(rows)]
    return "\n".join(lines) + "\n"


def _lines(rows: Mapping[str, Row]) -> Iterator[tuple[str, list[str]]]:
    """Yield the label and the cells of each line. A model that lacks the metric has "-"."""
    units = {"psnr": "{:.2f} dB", "ssim": "{:.3f}", "lpips": "{:.4f}"}
    measures: dict[str, dict[str, None]] = {}  # metrics of all models by group; each inner dict is an ordered set
    for row in rows.values():
        for group in (name for name in row if name not in ("scales", "steps")):
            measures.setdefault(group, {}).update(dict.fromkeys(row[group]))
    for group, names in measures.items():
        for name in names:
            form = units.get(name, "{}" if name in ("prompts", "retrieved") else "{:.1%}")
            values = [row.get(group, {}).get(name) for row in rows.values()]
            yield f"{group}: {name}", ["-" if value is None else form.format(value) for value in values]


def _canvas() -> Any:
    """Return an empty matplotlib figure. Raises ArgumentError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("the curves need matplotlib; install 'sdkit[train]', or give --no-sweeps.") from error
    figure = Figure(figsize=(9, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save_curves(path: Path, row: Row) -> None:
    """Draw fidelity against the guidance scale and against the number of steps."""
    figure = _canvas()
    panels = (("scales", "guidance scale", f"{STEPS} steps"), ("steps", "DDIM steps", f"guidance scale {SCALE:g}"))
    for place, (key, label, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        lines = (
            ("background, held-out pairs", "background right (held-out pairs)"),
            ("top5", "top-5"),
            ("top1", "top-1"),
        )
        for name, text in lines:
            axes.plot([float(x) for x in row[key]], [m[name] for m in row[key].values()], "o-", label=text)
        axes.set(xlabel=label, ylabel="share of prompts", ylim=(0, 1.02), title=title)
        axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
