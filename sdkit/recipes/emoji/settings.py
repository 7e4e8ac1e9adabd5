"""The files beside this one: shapes of the networks and settings of the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILES = {"scheduler": "scheduler_config.json"}


def shape_file(part: str) -> Path:
    """The config of a part of the pipeline, in shapes/."""
    return HERE / "shapes" / part / FILES.get(part, "config.json")


def shape(part: str) -> dict[str, Any]:
    """What it holds."""
    return _read(shape_file(part))


def settings(run: str) -> dict[str, Any]:
    """What runs/RUN.json says of a training run; its model, data and folder are the recipe's to name."""
    return _read(HERE / "runs" / f"{run}.json")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
