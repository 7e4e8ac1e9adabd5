"""The processes of an `accelerate launch`, as the environment describes them, without importing Accelerate."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Return whether this is the main process of an `accelerate launch`, or the only process."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
