"""The command line: `main` runs one command."""

from __future__ import annotations

from sdkit.cli.commands import main

__all__ = ["main"]
