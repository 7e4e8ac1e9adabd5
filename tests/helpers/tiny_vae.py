"""Short runs of `train_vae` on the tiny model and its photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdkit.training import VAEConfig
from sdkit.training.run_folder import read_metrics
from tests.helpers import tiny

LATENT = (4, tiny.SIZE // 8, tiny.SIZE // 8)
HELD_OUT = ("010.png", "030.png")  # of the photos of `make`


def make(folder: Path) -> Path:
    """Write folder/model, and 40 images in folder/photos. Return the folder."""
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 40)
    return folder


def config(made: Path, out: Path, **changes: Any) -> VAEConfig:
    """Return settings of three steps on what `make` has written, without LPIPS in the loss and without an EMA."""
    settings: dict[str, Any] = {
        "model": made / "model", "data": made / "photos", "out_dir": out, "max_steps": 3, "lpips_weight": 0.0,
        "ema_decay": 0.0,
    }  # fmt: skip
    return VAEConfig(**settings | changes)


def lines(run: Path, key: str) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl that have this key."""
    return [line for line in read_metrics(run / "metrics.jsonl") if key in line]
