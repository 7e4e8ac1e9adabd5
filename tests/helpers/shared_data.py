"""The only place where tests look outside the repository, for weights and data that are not part of it.

They are expected in the folder named by the environment variable SDKIT_SHARED_DATA, by default `shared/data` beside the
repository. A test that needs a missing file is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "SDKIT_SHARED_DATA"
FOLDER = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[3] / "shared" / "data")


def find(name: str) -> Path | None:
    """Return the path of a shared file or folder, or None if it is missing."""
    path = FOLDER / name
    return path if path.exists() else None


def need(name: str) -> Path:
    """Return the path of a shared file or folder. If it is missing, skip the test."""
    path = find(name)
    if path is None:
        pytest.skip(f"{name} is not in {FOLDER}; {VARIABLE} can name another folder")
    return path


def lpips_weights() -> Path:
    """Return the path of LPIPS's real weights, which SDKIT_LPIPS can name too. If they are missing, skip the test."""
    named = os.environ.get("SDKIT_LPIPS")
    if named and Path(named).is_file():
        return Path(named)
    return need("lpips_vgg16.safetensors")
