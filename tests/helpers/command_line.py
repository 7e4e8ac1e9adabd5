"""Results of commands that tests run in their own process."""

from __future__ import annotations

from typing import NamedTuple


class Ran(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str
