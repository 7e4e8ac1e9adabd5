from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdkit.errors import ArgumentError, TrainingError
from sdkit.training.plot import plot, smoothed


def run(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, **values: float | None) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "l1": 0.5 / step, "lr": 1e-4, "grad_norm": 2.0, "seconds": 0.1, **values}


def reddish(path: Path) -> int:
    """The number of pixels in the colour of skipped steps."""
    r, g, b = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    return int(((r - g > 120) & (r - b > 120)).sum())


def green(path: Path) -> int:
    """The number of pixels in the colour of validation."""
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
    inner = slice(40, -40)  # a window that ends at the curve's end is not symmetric
    np.testing.assert_allclose(smoothed(x)[inner], x[inner], atol=1e-12)
    expected = 1 / math.sqrt(2 * math.sqrt(math.pi) * 600 / 60)  # of white noise under a Gaussian window
    assert smoothed(noise)[inner].std() == pytest.approx(expected, rel=0.25)


def test_smoothing_leaves_out_what_is_not_a_number() -> None:
    values = np.full(200, 5.0)
    values[50:60] = np.nan
    np.testing.assert_allclose(smoothed(values), 5.0, rtol=1e-12)
    assert np.isnan(smoothed(np.full(3, np.nan))).all()
