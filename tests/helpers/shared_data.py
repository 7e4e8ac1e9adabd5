"""The one place where tests look outside the repository: weights and data that do not ship.

They lie in the folder that the environment variable SDKIT_SHARED_DATA names, or else in `shared/data` beside the
repository. A test that needs one of them is skipped where it is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "SDKIT_SHARED_DATA"
FOLDER = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[3] / "shared" / "data")


def find(name: str) -> Path | None:
    """The file or folder of this name, or None where there is none."""
    path = FOLDER / name
    return path if path.exists() else None


def need(name: str) -> Path:
    """The file or folder of this name; skips the test where there is none."""
    path = find(name)
    if path is None:
        pytest.skip(f"{name} is not in {FOLDER}; {VARIABLE} can name another folder")
    return path


def lpips_weights() -> Path:
    """The real weights of LPIPS, which SDKIT_LPIPS may name too; skips the test where there are none."""
    named = os.environ.get("SDKIT_LPIPS")
    if named and Path(named).is_file():
        return Path(named)
    return need("lpips_vgg16.safetensors")
