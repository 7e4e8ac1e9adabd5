"""Makes a cache, in another process of the tests."""

from __future__ import annotations

import os
import sys
from typing import Any

import sdkit
from sdkit.data import cache


def made(data: str, out: str, **settings: Any) -> int:
    """Make a cache, and print the number of processes that share the work; return the exit code."""
    try:
        cache("emoji", data, out, **{"dtype": "fp32", **settings})
        print(os.environ.get("WORLD_SIZE", "1"))
    except sdkit.SdkitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
