"""The parser of every command: it raises errors of one sentence, and refuses an option that is given twice."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from sdkit.errors import ArgumentError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `ArgumentError`, also for an option that is given twice, as `--x --no-x` is.

    An option may be given several times if its action is "append".
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._given: set[str] = set()

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As `ArgumentParser` does."""
        self._given.clear()
        return super().parse_known_args(*args, **kwargs)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse calls this each time that it meets an option."""
        if action.option_strings and not isinstance(action, argparse._AppendAction):
            if action.dest in self._given:
                name = "/".join(option for option in action.option_strings if option.startswith("--"))
                together = f", with all values after one {name}" if action.nargs == "+" else ""
                self.error(f"{name} is given twice: give it once{together}")
            self._given.add(action.dest)
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Raise `ArgumentError`."""
        raise ArgumentError(f"{message}; see {self.prog} --help.")
