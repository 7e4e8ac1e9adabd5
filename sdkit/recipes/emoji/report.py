"""Evaluate models side by side, and write numbers, a table, curves, and contact sheets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
from sdkit.recipes.emoji import asked as ask
from sdkit.recipes.emoji import evaluation as measure
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import Composition
from sdkit.recipes.emoji.drawings import Drawings
from sdkit.recipes.emoji.evaluation import Measured
from sdkit.recipes.emoji.gallery import Gallery

SCALES, STEP_COUNTS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5), (1, 5, 10, 20, 30)
FAST, SAMPLERS = 8, ("ddim", "dpm++2m")  # steps at which samplers are compared
SEEDS, TWO = 8, 5  # images of each open prompt; for each prompt of two pictures this many of one
PHOTO = 256  # side of the photographs in pixels
SHOWN, COLUMNS = 64, 8  # images on a contact sheet, and in a row of it
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # names in skimage.data; training uses none of them
CONTROLS = ("real pictures", "mean image")

Row = dict[str, Any]
Pictures = Sequence[Image.Image]
Paint = Callable[[str, Sequence[Prompt]], Pictures]
"""Makes an image for each prompt of a group of questions."""


@dataclass(frozen=True)
class Questions:
    """Questions to every model.

    Attributes:
        named: Prompts of a picture, its style, and its background.
        held_out: The same, of pairs of picture and style that no training image shows.
        placed: Prompts with sizes, places, and held-out backgrounds.
        two: Prompts of two pictures side by side.
        open: Prompts with a background that leave style, size, and place open, `SEEDS` times each.
        compositions: Random compositions, whose captions are prompts.
    """

    named: Sequence[Prompt]
    held_out: Sequence[Prompt]
    placed: Sequence[Prompt]
    two: Sequence[Prompt]
    open: Sequence[Prompt]
    compositions: Sequence[Composition]

    @classmethod
    def of(cls, prompts: int, images: int) -> Questions:
        """Return questions with this many prompts of each kind, and this many images for their distribution."""
        repeated = [one for one in ask.open_prompts(max(1, prompts // SEEDS), background=True) for _ in range(SEEDS)]
        return cls(
            ask.named(prompts), ask.held_out_pairs(prompts), ask.placed(prompts),
            ask.pairs_beside(max(1, prompts // TWO)), repeated, ask.sampled(images, "generated"),
        )  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """Real pictures, with which images are compared.

    Attributes:
        drawings: The pictures in all styles.
        gallery: Features of all pictures.
        real: Features of real compositions, as many as the questions ask for, but others.
    """

    drawings: Drawings
    gallery: Gallery
    real: Tensor

    @classmethod
    def of(cls, drawings: Drawings, lpips: LPIPS, folder: Path, images: int) -> Judge:
        """Return a judge with the features of this many real compositions."""
        real = [one.drawn(drawings) for one in ask.sampled(images, "real")]
        return cls(drawings, Gallery(drawings, lpips, folder), measure.features_of(real))

    def row(self, questions: Questions, paint: Paint, pictures: Pictures) -> Row:
        """Return the metrics of the images that `paint` makes, and of images of the questions' compositions."""
        large = [replace(one, size="large") for one in questions.named]  # in which details can be judged
        groups = {
            name: (asked, paint(name, asked))
            for name, asked in (
                ("named", questions.named), ("named, large", large),
                ("held-out pairs", questions.held_out), ("placed", questions.placed), ("two", questions.two),
                ("variety", questions.open),
            )
        }  # fmt: skip
        repeated = groups["variety"][1]
        return {
            "named": measure.fidelity(self.gallery, *groups["named"]),
            "named, large": measure.fidelity(self.gallery, *groups["named, large"]),
            "held-out pairs": measure.fidelity(self.gallery, *groups["held-out pairs"]),
            "placed": measure.arrangement(*groups["placed"]),
            "two": measure.fidelity_of_two(self.gallery, *groups["two"]),
            "variety": {
                "deviation": measure.variety([repeated[i : i + SEEDS] for i in range(0, len(repeated), SEEDS)])
            },
            "distribution": self.distribution(pictures),
        }

    def distribution(self, pictures: Pictures) -> Measured:
        """Return the distance from as many real images, precision, and recall."""
        return measure.distribution(measure.features_of(pictures), self.real[: len(pictures)])


def evaluate(
    models: Sequence[str | os.PathLike[str]],
    drawings: Drawings,
    out: Path,
    *,
    prompts: int = 320,
    images: int = 1000,
    sweeps: bool = True,
) -> str:
    """Measure models and controls, and write the results.

    The folder gets evaluation.json, table.md, and for each model contact sheets of its images and its VAE's
    reconstructions, and its curves.

    Args:
        models: Sources of the models.
        drawings: The pictures in all styles.
        out: Folder of the results. Results of earlier calls are kept in it.
        prompts: Number of prompts of each kind.
        images: Number of images whose distribution is compared with that of real ones.
        sweeps: Whether to measure at other guidance scales, numbers of steps, and samplers, too.

    Returns:
        The table, in Markdown, of the controls, these models, and those measured before.

    Raises:
        SdkitError: A model, a picture, or a library is missing, or two models would share their files' names.
    """
    whole_number("prompts", prompts, SEEDS)
    whole_number("images", images, SEEDS)
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
    lpips, photographs = LPIPS.from_pretrained("vgg"), photos()
    # Load everything first, so that a missing model is reported before the first one has been measured for hours.
    loaded = [StableDiffusion.from_pretrained(source) for source in names]
    questions = Questions.of(prompts, images)
    judge = Judge.of(drawings, lpips, out / "gallery", images)
    rows |= _controls(judge, questions)
    for model, (source, name) in zip(loaded, names.items(), strict=True):
        rows[source] = _measured(model, source, judge, questions, photographs, out / name)
        table = _save_rows(out, rows)
        if sweeps:
            rows[source] |= _sweeps(model, judge, questions, rows[source])
            table = _save_rows(out, rows)
            _save_curves(out / f"{name}-curves.png", rows[source])
    return table


def _controls(judge: Judge, questions: Questions) -> dict[str, Row]:
    """Return the rows of real pictures, the best that counts, and of their mean image, the worst."""
    pictures = [one.drawn(judge.drawings) for one in questions.compositions]
    mean = Image.fromarray(np.mean([np.asarray(one) for one in pictures], axis=0).round().astype(np.uint8))
    paints: tuple[Paint, ...] = (
        lambda _, asked: [one.composition(seed).drawn(judge.drawings) for seed, one in enumerate(asked)],
        lambda _, asked: [mean] * len(asked),
    )
    return {
        name: judge.row(questions, paint, made)
        for name, paint, made in zip(CONTROLS, paints, (pictures, [mean] * len(pictures)), strict=True)
    }


def _measured(
    model: StableDiffusion, source: str, judge: Judge, questions: Questions, photographs: Pictures, out: Path
) -> Row:
    """Return the metrics of a model at its own guidance scale, and save its contact sheets as OUT-*.png."""
    vae = VAE.from_pretrained(source, dtype="fp32")  # the precision in which training validates it
    compositions = [one.drawn(judge.drawings) for one in questions.compositions[: len(questions.named)]]
    _save_vae_sheet(Path(f"{out}-vae.png"), vae, [*compositions[:4], *photographs])

    def paint(group: str, asked: Sequence[Prompt]) -> Pictures:
        made = measure.generated(model, [one.text for one in asked])
        true = [one.composition().drawn(judge.drawings) for one in asked] if group == "held-out pairs" else None
        _save_sheet(Path(f"{out}-{_slug(group)}.png"), asked, made, true)
        return made

    return {
        "vae, compositions": measure.vae_quality(vae, compositions, judge.gallery.lpips),
        "vae, photographs": measure.vae_quality(vae, photographs, judge.gallery.lpips),
        **judge.row(questions, paint, measure.generated(model, [one.caption for one in questions.compositions])),
    }


def _sweeps(model: StableDiffusion, judge: Judge, questions: Questions, row: Row) -> Row:
    """Return metrics at all guidance scales, step counts, and samplers.

    For scales they are those of as many compositions as there are prompts, with the fidelity of the named pictures.
    The distribution at the usual number of steps is taken from `row`, and not drawn again.
    """
    captions = [one.caption for one in questions.compositions]
    texts, few = [one.text for one in questions.named], captions[: len(questions.named)]
    return {
        "scales": {
            scale: judge.distribution(measure.generated(model, few, scale=scale))
            | measure.fidelity(judge.gallery, questions.named, measure.generated(model, texts, scale=scale))
            for scale in SCALES
        },
        "steps": {
            steps: row["distribution"]
            if steps == measure.STEPS
            else judge.distribution(measure.generated(model, captions, steps=steps))
            for steps in STEP_COUNTS
        },
        "samplers": {
            name: judge.distribution(measure.generated(model, captions, steps=FAST, sampler=name)) for name in SAMPLERS
        },
    }


def _slug(text: str) -> str:
    """Return a text, such as a model's source, as a slug for file names."""
    return re.sub(r"[^\w.]+", "-", text)[-100:].strip("-.")


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


def photos() -> list[Image.Image]:
    """Return the sample photographs that come with scikit-image, resized and cropped at the centre to 256 x 256."""
    try:
        from skimage import data
    except ImportError as error:
        raise DataError("the photographs that judge the VAE are scikit-image's: pip install scikit-image.") from error
    crop, unused_generator = Transform(size=(PHOTO, PHOTO)), torch.Generator()  # a centre crop is not random
    pixels = [crop(Image.fromarray(getattr(data, name)()), unused_generator) for name in PHOTOS]
    return image_io.to_pil(torch.stack(pixels))


def _save_sheet(path: Path, asked: Sequence[Prompt], made: Pictures, true: Pictures | None = None) -> None:
    """Save a contact sheet of images with their prompts; where true pictures are given, each row of them below."""
    if true is None:
        shown, captions = list(made[:SHOWN]), [one.text for one in asked[:SHOWN]]
    else:
        shown, captions = [], []
        for i in range(0, min(len(made), SHOWN // 2), COLUMNS):
            row = made[i : i + COLUMNS]
            shown += [*row, *true[i : i + len(row)]]
            captions += [*(one.text for one in asked[i : i + len(row)]), *["the true picture"] * len(row)]
    image_io.save(image_io.grid(shown, COLUMNS, padding=6, captions=captions), path)


def _save_vae_sheet(path: Path, vae: VAE, originals: Pictures) -> None:
    """Save a contact sheet of images and their reconstructions."""
    both = [*originals, *vae.reconstruct(list(originals))]
    labels = ("original", "through the VAE")
    image_io.save(image_io.grid(both, len(originals), padding=6, row_labels=labels), path)


def _table(rows: Mapping[str, Row]) -> str:
    """Return a Markdown table with a line for each metric and a column for each model or control."""
    lines = [f"| | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in _lines(rows)]
    return "\n".join(lines) + "\n"


UNITS = {
    "psnr": "{:.2f} dB", "ssim": "{:.3f}", "lpips": "{:.4f}", "prompts": "{}", "frechet": "{:.3g}",
    "deviation": "{:.1f} of 255",
}  # fmt: skip
"""Metric -> how it is written. The others are shares."""


def _lines(rows: Mapping[str, Row]) -> Iterator[tuple[str, list[str]]]:
    """Yield the label and the cells of each line. A model that lacks the metric has "-"."""
    measures: dict[str, dict[str, None]] = {}  # metrics of all models by group; each inner dict is an ordered set
    for row in rows.values():
        for group in (name for name in row if name not in ("scales", "steps", "samplers")):
            measures.setdefault(group, {}).update(dict.fromkeys(row[group]))
    for group, names in measures.items():
        for name in names:
            form = UNITS.get(name, "{:.1%}")
            values = [row.get(group, {}).get(name) for row in rows.values()]
            yield f"{group}: {name}", ["-" if value is None else form.format(value) for value in values]


def _canvas() -> Any:
    """Return an empty matplotlib figure. Raises ArgumentError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("the curves need matplotlib; install 'sdkit[train]', or give --no-sweeps.") from error
    figure = Figure(figsize=(12, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save_curves(path: Path, row: Row) -> None:
    """Draw fidelity and recall against the guidance scale, and the Fréchet distance against the number of steps."""
    figure = _canvas()
    panels: tuple[tuple[str, str, dict[str, str]], ...] = (
        ("scales", "guidance scale", {"top1": "top-1", "style": "style", "recall": "recall", "precision": "precision"}),
        ("scales", "guidance scale", {"frechet": "Fréchet distance"}),
        ("steps", "DDIM steps", {"frechet": "Fréchet distance"}),
    )
    for place, (key, label, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, text in names.items():
            axes.plot([float(x) for x in row[key]], [one[name] for one in row[key].values()], "o-", label=text)
        axes.set(xlabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
