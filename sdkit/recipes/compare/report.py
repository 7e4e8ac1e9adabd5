"""The comparison: train and draw what is missing, measure all, and write the table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdkit.arguments import number, one_of, whole_number
from sdkit.atomic import atomic_write
from sdkit.cli.jobs import check_writable
from sdkit.errors import ArgumentError
from sdkit.recipes.compare import data, draws, systems
from sdkit.recipes.compare.draws import HELD_OUT, Cost
from sdkit.recipes.compare.judging import load_judges, save_judges
from sdkit.recipes.compare.measuring import DRAWS, JUDGES, Row, measured
from sdkit.recipes.compare.systems import SYSTEMS, reconstructions, train_the_clip
from sdkit.recipes.compare.workshop import Workshop

SHIPPED = Path(__file__).parents[2] / "assets" / "compare"
"""Draws, judges, and table of one whole comparison."""
IMAGES = 300
SWEEP, SCALES = "guidance", (1.0, 1.5, 2.0, 4.0, 8.0)
"""Subfolder of DALL-E's draws at other guidance scales, and the scales."""
LEAST = 8
JUDGE_SEED = 1
JUDGE = systems.ADAMW | {"lr_warmup_steps": 0}
"""Settings of the CLIP that judges, by which the shipped one was trained."""
JUDGE_STEPS = 400
HEAD = (
    "system", "Fréchet", "precision", "recall", "nearest", "right digit", "own caption", "training", "weights",
    "evaluations", "ms per image",
)  # fmt: skip


def compare(
    out: Path,
    names: Sequence[str] = tuple(SYSTEMS),
    *,
    scale: float = 1.0,
    images: int = IMAGES,
    progress: Callable[[str], object] | None = None,
) -> list[Row]:
    """Train systems on the same digits, draw with each, and measure the draws. What is there already is kept.

    The folder gets comparison.json, comparison.md, draws/, judges/, guidance/ (DALL-E at other scales), and a
    run folder for each part.

    Args:
        out: Folder of the comparison.
        names: Names of the systems, as in `SYSTEMS`.
        scale: Share of the recipe's steps, such as 0.1 for a quick comparison.
        images: Images that each system draws, from 8 to 300.
        progress: Called with the name of each system before its turn; None reports nothing.

    Returns:
        Rows of the controls, and of all systems in the folder.

    Raises:
        SdkitError: An argument is impossible, the folder belongs to another comparison, or something is missing.
    """
    for name in names:
        one_of("system", name, SYSTEMS)
    number("scale", scale, 1e-4, 100)
    whole_number("images", images, LEAST, data.HELD_OUT)
    check_writable(out)
    for cost, _ in draws.every(out / DRAWS):
        if cost.images != images:
            raise ArgumentError(
                f"{cost.name} has drawn {cost.images} images in {str(out)!r}, and this comparison asks for {images}; "
                "name another --out, or the same --images as before."
            )
    digits = data.digits()
    work = Workshop(out, digits, scale)
    work.check_scale()  # draws that are there are kept, and must be of as long a training
    data.write(digits.training, out / "data")
    if not (out / JUDGES).exists():
        if progress is not None:
            progress("judges")
        clip = train_the_clip(work, "judge-clip", work.everything, JUDGE_SEED, **JUDGE)
        save_judges(out / JUDGES, digits.training, clip, max(2, round(JUDGE_STEPS * min(scale, 1))))
    load_judges(out / JUDGES)  # before minutes of training: those that were there may be damaged
    for name in names:
        if progress is not None:
            progress(name)
        _draw(work, name, images)
    _draw_reconstructions(work, images)
    if "DALL-E" in names:
        _draw_sweep(work, images)
    rows = measured(out, digits)
    with atomic_write(out / "comparison.json") as path:
        path.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    with atomic_write(out / "comparison.md") as path:
        path.write_text(table(rows), encoding="utf-8")
    return rows


def _draw(work: Workshop, name: str, images: int) -> None:
    """Train a system and draw with it, unless its draws are there."""
    folder = work.folder / DRAWS
    if draws.load(folder, name) is not None:
        return
    drawer = SYSTEMS[name](work)
    start = time.process_time()
    pictures = drawer.draw(work.digits.reference.captions[:images])
    seconds = (time.process_time() - start) / images
    cost = Cost(
        name=name, images=images, order=list(SYSTEMS).index(name), asked=drawer.asked, weights=drawer.weights,
        training=sum(map(work.seconds, drawer.parts)), evaluations=drawer.evaluations, seconds=seconds,
    )  # fmt: skip
    draws.save(folder, cost, pictures)


def _draw_sweep(work: Workshop, images: int) -> None:
    """Draw with DALL-E at other guidance scales, for the curve of fidelity and variety.

    At its own scale the draws are those of the comparison.
    """
    for order, scale in enumerate(SCALES):
        name = f"guidance {scale:g}"
        if draws.load(work.folder / SWEEP, name) is not None:
            continue
        if scale == systems.GUIDANCE:
            own = draws.load(work.folder / DRAWS, "DALL-E")
            assert own is not None  # drawn before
            pictures: data.Images = own[1]
        else:
            pictures = systems.dall_e(work, scale).draw(work.digits.reference.captions[:images])
        draws.save(work.folder / SWEEP, Cost(name=name, images=images, order=order, asked="text"), pictures)


def _draw_reconstructions(work: Workshop, images: int) -> None:
    """Reconstruct held-out digits by the autoencoders that have been trained, as controls."""
    folder = work.folder / DRAWS
    for order, part in ((-2, "vq"), (-1, "kl")):
        name = f"held-out, through the {systems.AUTOENCODERS[part]}"
        if work.result(part).is_dir() and draws.load(folder, name) is None:
            pictures = reconstructions(work, part, work.digits.held_out.pictures[:images])
            draws.save(
                folder, Cost(name=name, images=images, order=order, asked="text", captions_of=HELD_OUT), pictures
            )


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON, whose numbers are rounded to six digits."""
    content = asdict(row)
    cost = content.pop("cost")
    numbers = {key: value if value is None else float(f"{value:.6g}") for key, value in content.items()}
    return {**cost, **numbers}


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table in Markdown."""
    cells = [list(HEAD), ["-" * len(name) for name in HEAD], *[_cells(row) for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        + " |"
        for pairs in ([*zip(line, widths, strict=True)] for line in cells)
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    cost = row.cost
    return [
        cost.name,
        f"{row.frechet:.1f} ± {row.margin:.1f}",
        f"{row.precision:.0%}",
        f"{row.recall:.0%}",
        f"{row.nearest:.0f}",
        "" if row.accuracy is None else f"{row.accuracy:.0%}",
        "" if row.retrieval is None else f"{row.retrieval:.0%}",
        "" if cost.training is None else f"{cost.training:.0f} s",
        "" if cost.weights is None else f"{cost.weights / 1e6:.2f} M",
        "" if cost.evaluations is None else str(cost.evaluations),
        "" if cost.seconds is None else f"{1000 * cost.seconds:.1f}",
    ]
