"""Makes the same cache in many folders, each killed by SIGKILL at another point.

OUT/N is killed before the N-th step of writing files (a file's fsync, its rename, or the folder's fsync) and then
resumed. The last N is larger than the number of steps, so that cache is never killed. OUT/often is killed again and
again.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sdkit
from sdkit.data import cache

SETTINGS: dict[str, Any] = {"size": 16, "shard_size": 2, "dtype": "fp32", "device": "cpu"}


def make(data: str, out: Path, kill_at: int = 0) -> bool:
    """Make the cache in a fork, which is killed before step `kill_at` (0: never). Return whether it was killed."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL if killed else status == 0
        return killed
    steps = 0

    def killing(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)

        return run

    os.fsync, Path.replace = killing(os.fsync), killing(Path.replace)  # type: ignore[method-assign]
    cache("emoji", data, out, **SETTINGS)
    os._exit(0)


def main(data: str, out: Path) -> None:
    """Make all caches, and print how often OUT/N and OUT/often were killed."""
    for part in (sdkit.VAE, sdkit.TextEncoder):  # loaded once, before the forks
        part.from_pretrained = functools.cache(part.from_pretrained)  # type: ignore[method-assign,assignment]
    sdkit.VAE.from_pretrained("emoji", dtype=torch.float32, device=torch.device("cpu"))
    sdkit.TextEncoder.from_pretrained("emoji", dtype="fp32", device="cpu")
    point = 1
    while make(data, out / str(point), point):
        assert not make(data, out / str(point))
        point += 1
    deaths = 0
    while make(data, out / "often", 8):  # at this step one shard is in place and the next is not renamed yet
        deaths += 1
    print(point - 1, deaths)
