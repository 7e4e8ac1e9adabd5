"""Read the recipe's files: configs of the networks (shapes/), and settings of the training runs (runs/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILES = {"scheduler": "scheduler_config.json"}


def shape_file(part: str) -> Path:
    """Return the config file, in shapes/, of a part of the pipeline."""
    return HERE / "shapes" / part / FILES.get(part, "config.json")


def shape(part: str) -> dict[str, Any]:
    """Return the config of a part of the pipeline."""
    return _read(shape_file(part))


def settings(run: str) -> dict[str, Any]:
    """Return the settings of a training run, from runs/. Its model, data, and folder are added by the recipe.

    Runs of the U-Net draw the prompts in prompts.txt at each validation: a sheet of eight rows of eight images.
    """
    prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
    return _read(HERE / "runs" / f"{run}.json") | ({"validation_prompts": prompts} if run.startswith("unet") else {})


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
