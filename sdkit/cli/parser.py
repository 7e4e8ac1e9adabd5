"""The parser of every command: its errors are one sentence, and it refuses an option that is given twice."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from sdkit.errors import ArgumentError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises ArgumentError instead of exiting.

    An option that is given twice is an error, and so is `--x --no-x`, unless the option's action is "append".
    Descriptions and epilogs keep their line breaks.
    """

    def __init__(self, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False, "formatter_class": raw, **options, "add_help": False})
        self.add_argument("-h", "--help", action="help", help="Show this help")
        self._given: set[str] = set()

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse like `ArgumentParser`, and forget the options of an earlier parse."""
        self._given.clear()
        return super().parse_known_args(*args, **kwargs)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Convert an option's values. argparse calls this once for each time that the option is given."""
        if action.option_strings and not isinstance(action, argparse._AppendAction):
            if action.dest in self._given:
                name = "/".join(option for option in action.option_strings if option.startswith("--"))
                together = f", with all values after one {name}" if action.nargs == "+" else ""
                self.error(f"{name} is given twice: give it once{together}")
            self._given.add(action.dest)
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Raise ArgumentError."""
        raise ArgumentError(f"{message}; see {self.prog} --help.")
