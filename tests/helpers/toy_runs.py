"""Runs of the toy stage: training it in this process or in another, and reading the files that a run has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdkit.training import loop
from sdkit.training.checkpoint import checkpoints
from tests.helpers import forks, toy
from tests.helpers.runs import files, metrics

# A short run with the hard cases: epochs that end inside a step (10 examples, 4 samples a step), dropout, and a second
# player that starts late.
RUN: dict[str, Any] = {
    "max_steps": 9,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_every": 2,
    "keep_checkpoints": 1,
    "validate_every": 4,
    "dropout": 0.3,
    "batch_norm": True,
    "discriminator_starts_at": 3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}


def fit(out: Path, at: Any = lambda name, k: None, **settings: Any) -> toy.Toy:
    stage = toy.Toy(toy.ToySettings(**settings), at)
    assert loop.fit(stage, stage.settings, out) == out
    return stage


def process(out: Path, settings: dict[str, Any], hook: str = "") -> Any:
    """Start training in another process."""
    return forks.start(toy.train, out, toy.ToySettings(**settings), hook)


def train(out: Path, settings: dict[str, Any], hook: str = "") -> int:
    """Train in another process and return its exit code; -N if signal N killed it."""
    started = process(out, settings, hook)
    started.join(60)
    code: int = started.exitcode
    return code


def said(out: Path) -> str:
    return out.with_suffix(".error").read_text().strip()


def logged(out: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in metrics(out) if key in line]


def everything(out: Path) -> tuple[dict[str, bytes], dict[str, bytes], list[dict[str, Any]]]:
    """Read all that two bit-identical runs share: the files of the checkpoints, the files of the result, and the
    metrics.
    """
    return files(out / "checkpoints"), files(out / "result"), metrics(out)


def last(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(out / "checkpoints")[0] / f"{name}.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the other processes do. The order of a sum changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rank(out: Path, number: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((out / f"rank-{number}.json").read_text()), load_file(out / f"rank-{number}.safetensors")
