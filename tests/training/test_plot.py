from __future__ import annotations

import json
import math
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdkit.errors import ArgumentError, TrainingError
from sdkit.training.plot import plot, smoothed
from sdkit.training.run_folder import metrics_in, read_metrics


def run(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, **values: float | None) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "l1": 0.5 / step, "lr": 1e-4, "grad_norm": 2.0, "seconds": 0.1, **values}


def reddish(path: Path) -> int:
    """Count the pixels in the colour of skipped steps."""
    r, g, b = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    return int(((r - g > 120) & (r - b > 120)).sum())


def green(path: Path) -> int:
    """Count the pixels in the colour of validation."""
    r, g, b = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    return int(((g - r > 50) & (g - b > 30)).sum())


def test_a_run_becomes_a_picture(tmp_path: Path) -> None:
    lines = [line(step) for step in range(1, 100)]
    path = plot(run(tmp_path / "run", lines))
    assert path == tmp_path / "run" / "metrics.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
    assert green(path) == reddish(path) == 0
    assert width == round(2 * 4.6 * 130) and height == round((2 * 3.1 + 0.3) * 130)  # noqa: PT018 - loss, l1; lr, norm


def test_validation_and_skipped_steps_are_drawn(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "validation/psnr": 20.0, "validation/seconds": 3.0}]
    lines += [line(step, loss=None, skipped=step - 7) if step in (8, 9) else line(step) for step in range(1, 30)]
    lines += [{"step": 29, "validation/psnr": 22.0, "validation/seconds": 3.0}]
    path = plot(run(tmp_path / "run", lines), tmp_path / "other.png")
    assert path == tmp_path / "other.png"
    assert green(path) > 300
    assert reddish(path) > 20


@pytest.mark.parametrize(
    "lines",
    [
        [line(1)],
        [{"step": 0, "validation/loss": 0.2}],
        [line(1, loss=None, grad_norm=None, skipped=1)],
        [
            line(step, loss=10.0 ** (step % 9), **{"discriminator/loss": -1.0, "discriminator/lr": 0.0})
            for step in (1, 2, 8)
        ],
    ],
)
def test_short_and_odd_runs_can_be_drawn(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    assert plot(run(tmp_path / "run", lines)).stat().st_size > 5000


def test_no_metrics_are_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", run(tmp_path / "empty", [])):
        with pytest.raises(TrainingError, match="holds no metrics; name the folder of a run that has begun"):
            plot(folder)


def test_curves_are_a_png(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"curves cannot be drawn into 'x.jpg'; give a name that ends in .png"):
        plot(run(tmp_path / "run", [line(1)]), "x.jpg")


def test_without_matplotlib_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match="plot needs matplotlib"):
        plot(run(tmp_path / "run", [line(1)]))


def test_smoothing_keeps_lines_does_not_lag_and_takes_noise_away() -> None:
    x = np.linspace(0, 1, 600)
    noise = np.random.default_rng(0).normal(size=600)
    np.testing.assert_allclose(smoothed(np.full(600, 3.0)), 3.0, rtol=1e-12)
    inner = slice(40, -40)  # without the ends, where the window is not symmetric
    np.testing.assert_allclose(smoothed(x)[inner], x[inner], atol=1e-12)
    # Standard deviation of white noise under a Gaussian window.
    expected = 1 / math.sqrt(2 * math.sqrt(math.pi) * 600 / 60)
    assert smoothed(noise)[inner].std() == pytest.approx(expected, rel=0.25)


def test_smoothing_leaves_out_what_is_not_a_number() -> None:
    values = np.full(200, 5.0)
    values[50:60] = np.nan
    np.testing.assert_allclose(smoothed(values), 5.0, rtol=1e-12)
    assert np.isnan(smoothed(np.full(3, np.nan))).all()


BIGGEST = 10**400  # JSON allows integers that no float can hold


@pytest.mark.parametrize(
    "values",
    [
        {"loss": math.inf, "lr": math.nan},
        {"loss": BIGGEST, "lr": -BIGGEST},
        {"loss": 1e308, "lr": 1e308, "grad_norm": -1e308},
        {"loss": None, "lr": None, "grad_norm": None, "validation/loss": None},
        {"lr": -1.0},
        {r"$\foo$": 1.0, r"validation/$\bad{": 2.0, "a\nb": 3.0, "": 4.0, "/lr": 5.0, "\ud800": 6.0},
    ],
    ids=["infinite", "no float", "overflowing", "nothing known", "negative rate", "formulas for names"],
)
def test_whatever_numbers_and_names_are_there_a_picture_is_drawn(values: dict[str, Any], tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 1.0, "lr": 1e-3}, {"step": 2, **values}, {"step": 3, "loss": 2.0, "lr": 1e-3}]
    for kept in (lines, lines[1:2]):
        with Image.open(plot(run(tmp_path / "run", kept))) as image:
            assert image.format == "PNG"


@pytest.mark.parametrize(
    "line",
    [
        {"step": True, "loss": 1.0},
        {"step": 1, "loss": True},
        {"step": -1, "loss": 1.0},
        {"step": 10**300, "loss": 1.0},
        {"step": 1, "loss": "1"},
        {"loss": 1.0},
        [1],
    ],
)
def test_lines_of_anything_but_numbers_count_for_nothing(line: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no metrics"):
        plot(run(tmp_path / "run", [line]))


def test_lines_without_end_and_brackets_without_end_count_for_nothing(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    lines = (folder / "metrics.jsonl").read_text()
    for junk in ("[" * 100_000, '{"step": 1, "loss": ' + "1" * 3 * 2**20 + "}", "\0" * 2**21):
        (folder / "metrics.jsonl").write_text(f"{junk}\n{lines}")
        assert read_metrics(folder / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_metrics_are_read_a_line_at_a_time(tmp_path: Path) -> None:
    """A file larger than memory must not prevent a run from resuming."""
    folder = run(tmp_path / "run", [{"step": step, "a long name " * 40: 1.0} for step in range(10_000)])
    tracemalloc.start()
    assert sum(1 for _ in metrics_in(folder / "metrics.jsonl")) == 10_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * 2**20 < (folder / "metrics.jsonl").stat().st_size


def test_a_thousand_metrics_are_told_and_not_drawn(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", [{"step": 1, **{f"metric {i}": 1.0 for i in range(1000)}}])
    with pytest.raises(TrainingError, match="holds more than 120 metrics, which is too many to draw"):
        plot(folder)


@pytest.mark.parametrize("name", ["pipe", "folder"])
def test_metrics_that_are_no_file_are_told(name: str, tmp_path: Path) -> None:
    (os.mkfifo if name == "pipe" else os.mkdir)(tmp_path / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"cannot read .*metrics\.jsonl: (it is not a regular file|is a directory)"):
        plot(tmp_path)
