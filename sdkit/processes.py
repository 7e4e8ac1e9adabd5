"""The processes of an `accelerate launch`, before Accelerate itself is loaded."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this is the main one of the processes of an `accelerate launch`, or the only one."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
