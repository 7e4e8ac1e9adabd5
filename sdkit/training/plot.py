"""Draw the curves of a run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdkit.atomic import atomic_write
from sdkit.errors import ArgumentError, TrainingError
from sdkit.messages import clean, reason
from sdkit.training.run_folder import metrics_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3  # panels in a row
BLUE, GREEN, RED = "#0b62a4", "#2e7d4f", "#c00000"
COLORS = (BLUE, "#c2571a", GREEN, "#7b4397")  # one for each player
VALIDATION = "validation/"
RATE, NORM = "learning rate", "gradient norm, before clipping"
LEGEND: dict[str, Any] = {"fontsize": 8, "framealpha": 0.8, "edgecolor": "none"}
Array = np.ndarray[Any, np.dtype[np.float64]]
Panel = tuple[str, list[str]]  # title of a panel, and names of the metrics in it
MOST_CURVES = 120
LARGEST = 3e38  # just below the largest float32
Curve = tuple[Array, Array]  # optimizer steps, and values; a value that was not finite is NaN


def plot(run: str | Path, out: str | Path | None = None) -> Path:
    """Draw the metrics of a run.

    Losses and their parts, raw and smoothed, come first, then the metrics of validation, then the learning rates and
    gradient norms of all players.

    Args:
        run: The run folder.
        out: PNG file to write; None is metrics.png in the run folder.

    Returns:
        The path of the PNG file.

    Raises:
        TrainingError: There are no metrics, too many, or they cannot be read.
        ArgumentError: The name `out` does not end in .png, or matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("plot needs matplotlib; install 'sdkit[train]'.") from error
    if out is not None and Path(out).suffix.lower() != ".png":
        raise ArgumentError(f"curves cannot be drawn into {str(out)!r}; give a name that ends in .png.")
    path = Path(run) / "metrics.jsonl"
    curves, skipped = _curves(path)
    if not curves:
        raise TrainingError(f"{path} holds no metrics; name the folder of a run that has begun.")
    rows = _rows(curves)
    columns = max(map(len, rows))
    figure = Figure(figsize=(4.6 * columns, 3.1 * len(rows) + 0.3), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_label(Path(run).resolve().name), fontsize=13, fontweight="bold")
    last = max(steps[-1] for steps, _ in curves.values())
    for row, panels in enumerate(rows):
        for column, (title, keys) in enumerate(panels):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
            _draw(axes, title, {key: curves[key] for key in keys})
            axes.set_xlim(-0.01 * last, max(1.01 * last, 1))
            if row == column == 0 and skipped:
                note = f"{len(skipped)} step{'s' if len(skipped) > 1 else ''} skipped"
                axes.plot(
                    skipped, [0.03] * len(skipped), "|", color=RED, transform=axes.get_xaxis_transform(), label=note
                )
            if row == column == 0 and axes.get_legend_handles_labels()[0]:
                axes.legend(**LEGEND)
    target = Path(run) / "metrics.png" if out is None else Path(out)
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png")
    return target


def _curves(path: Path) -> tuple[dict[str, Curve], list[int]]:
    """Return the curve of each metric, and the steps that were skipped."""
    points: dict[str, array[float]] = {}
    skipped = []
    try:
        for _, line in metrics_in(path):
            if "skipped" in line:
                skipped.append(line["step"])
            for key, value in line.items():
                if key not in ("step", "skipped") and not key.endswith("seconds"):
                    points.setdefault(key, array("d")).extend((line["step"], _drawable(value)))
                    if len(points) > MOST_CURVES:
                        raise TrainingError(f"{path} holds more than {MOST_CURVES} metrics, which is too many to draw.")
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {reason(error)}.") from error
    pairs = {key: np.array(flat).reshape(-1, 2) for key, flat in points.items()}
    return {key: (steps_and_values[:, 0], steps_and_values[:, 1]) for key, steps_and_values in pairs.items()}, skipped


def _drawable(value: float | None) -> float:
    """Return the value, or NaN if it is missing or near the limits of float32, where matplotlib would overflow."""
    return math.nan if value is None or not abs(value) < LARGEST else float(value)


def _label(text: str) -> str:
    """Return a name with "$" escaped, because "$" begins a formula in matplotlib."""
    return clean(text).replace("$", r"\$")


def _rows(curves: Mapping[str, Curve]) -> list[list[Panel]]:
    """Return the panels in rows: losses, then validation, then learning rates and gradient norms.

    A section begins a new row if it does not fit into the current one.
    """
    rates = [key for key in curves if key.split("/")[-1] == "lr"]
    norms = [key for key in curves if key.split("/")[-1] == "grad_norm"]
    measured = [key for key in curves if key.startswith(VALIDATION)]
    losses = [key for key in curves if key not in {*rates, *norms, *measured}]
    rows: list[list[Panel]] = [[]]
    for section in (
        [(key.replace("/", ": "), [key]) for key in losses],
        [(f"validation: {key.removeprefix(VALIDATION)}", [key]) for key in measured],
        [(title, keys) for title, keys in ((RATE, rates), (NORM, norms)) if keys],
    ):
        if len(rows[-1]) + len(section) > COLUMNS:
            rows += [section[i : i + COLUMNS] for i in range(0, len(section), COLUMNS)]
        else:
            rows[-1] += section
    return [row for row in rows if row]


def _draw(axes: Axes, title: str, curves: Mapping[str, Curve]) -> None:
    """Draw one panel. Only validation metrics have points. Losses and gradient norms have a smoothed curve, too."""
    for color, (key, (steps, values)) in zip(COLORS * len(curves), curves.items(), strict=False):
        label = _label(key.split("/")[0]) if "/" in key else "network"
        if len(curves) == 1:
            label = "smoothed"
        if key.startswith(VALIDATION):
            axes.plot(steps, values, "o-", color=GREEN, linewidth=1.5, markersize=3.5)
        elif title == RATE:
            axes.plot(steps, values, color=color, linewidth=1.8, label=label)
        else:
            axes.plot(
                steps, values, color=color, linewidth=0.6, alpha=0.35, label="each step" if len(curves) == 1 else None
            )
            axes.plot(steps, smoothed(values), color=color, linewidth=1.8, label=label)
    finite = np.array([value for value in chain(*(values for _, values in curves.values())) if math.isfinite(value)])
    if title == RATE and len(finite):
        axes.set_ylim(0, 1.08 * max(finite.max(), 0) or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    elif len(finite) and finite.min() > 0 and finite.max() > 30 * np.median(finite):
        axes.set_yscale("log")
    axes.set_title(_label(title), fontsize=11)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(_label(title.split(": ")[-1]), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(**LEGEND)


def smoothed(values: Array) -> Array:
    """Return the moving average (N,) of a curve (N,) under a Gaussian window.

    The window is centred, so that the average does not lag behind. Its standard deviation is a sixtieth of the curve's
    length. NaN is ignored, and the window is cut off at both ends of the curve.
    """
    sigma = max(len(values) / 60, 1e-3)
    reach = min(math.ceil(3 * sigma), len(values) - 1)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), window)[reach : reach + len(values)]
    weight = np.convolve(known, window)[reach : reach + len(values)]
    mean: Array = np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-9)
    return mean
