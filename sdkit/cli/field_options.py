"""Options of the command line for the fields of a dataclass, made from the fields' types, defaults, and descriptions.

A field whose option is not given is absent from the parsed arguments, so that it keeps its value from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from sdkit.cli.options import Add
from sdkit.fields import field_docs


@dataclass(frozen=True, kw_only=True)
class FieldOption:
    """A field of a dataclass, which an option or a JSON file can set.

    Attributes:
        name: Name of the field.
        doc: Description of the field.
        default: Default, or MISSING for a required field.
        kind: Type of a value: bool, int, float, or str.
        is_path: Whether a value may be a path.
        single: Whether the field takes one value. `size`, for example, takes one value or a tuple.
        several: Number of values in the field's tuple, "+" for a tuple of any length, or None for one value.
        optional: Whether the field takes None.
        others: Further names of the option, such as "-m".
        metavar: Placeholder for a value in the help; None is one that fits the type, such as N or PATH.
    """

    name: str
    doc: str
    default: Any
    kind: type
    is_path: bool
    single: bool
    several: int | str | None
    optional: bool
    others: tuple[str, ...]
    metavar: str | tuple[str, ...] | None

    @property
    def option(self) -> str:
        """Name of the option."""
        return f"--{self.name.replace('_', '-')}"

    def add_to(self, add: Add) -> None:
        """Add the option. If it is not given, the parsed arguments lack it."""
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": self._help()}
        if self.kind is bool:
            add(self.option, action=argparse.BooleanOptionalAction, **options)
            return
        if self.several:
            options["nargs"] = self.several
        usual = "PATH" if self.is_path else {int: "N", float: "X"}.get(self.kind, "TEXT")
        names = (self.option, *self.others)
        add(*names, dest=self.name, type=self._parser(), metavar=self.metavar or usual, **options)

    def _help(self) -> str:
        """Return the help of the option: the field's description, and its default.

        If the default is None, the description explains it; its word None becomes "the default".
        """
        doc = self.doc.removesuffix(".").replace("`", "")
        if self.default is None:  # on the command line, an option that is left out stands for None
            doc = re.sub(r"(^|[.:] )None\b", r"\1The default", doc)
            doc = re.sub(r"\bNone\b", "the default", doc)
        words = {"True": "yes", "False": "no", "": "empty"}
        unsaid = self.default in (MISSING, None, ())
        value = " ".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)
        default = "" if unsaid else f" (default: {words.get(value, value)})"
        return f"{doc}{default}".replace("%", "%%")

    def _parser(self) -> Callable[[str], Any]:
        """Return the function that parses a value on the command line; "none" is None for fields that take it."""

        def parse(text: str) -> Any:
            return None if self.optional and text.lower() == "none" else self.kind(text)

        parse.__name__ = self.kind.__name__  # argparse quotes this name in its errors: "invalid int value"
        return parse

    def value(self, found: Any) -> Any:
        """Convert a list from argparse or JSON to one value or a tuple. The settings check the value."""
        if isinstance(found, list):
            return found[0] if self.single and len(found) == 1 else tuple(found)
        return found


def field_options(
    cls: type, others: Mapping[str, tuple[str, ...]], metavars: Mapping[str, str | tuple[str, ...]]
) -> dict[str, FieldOption]:
    """Return the options for a dataclass's fields: its own first, then those it inherits.

    Args:
        cls: The dataclass. Its docstring and its base classes' describe each field in a section `Attributes:`.
        others: Further names of some fields' options.
        metavars: Placeholders of some fields' values in the help.
    """
    hints, docs, found = get_type_hints(cls), field_docs(cls), dict[str, FieldOption]()
    for field in fields(cls):
        hint = hints[field.name]
        kinds = [hint] if get_origin(hint) in (None, tuple) else get_args(hint)  # a union has several types
        plain = [kind for kind in kinds if kind is not NoneType and get_origin(kind) is not tuple]
        items = [get_args(kind) for kind in kinds if get_origin(kind) is tuple]
        found[field.name] = FieldOption(
            name=field.name, doc=docs[field.name], default=field.default, kind=plain[0] if plain else items[0][0],
            is_path=any(get_origin(kind) is os.PathLike for kind in kinds), single=bool(plain),
            several=_several(items[0], bool(plain)) if items else None, optional=NoneType in kinds,
            others=others.get(field.name, ()), metavar=metavars.get(field.name),
        )  # fmt: skip
    return {name: found[name] for name in docs}


def _several(items: tuple[Any, ...], single: bool) -> int | str:
    """Return the number of values that a field takes: that of a tuple of fixed length, else "+".

    Args:
        items: Types of the tuple's items.
        single: Whether the field also takes one value instead of the tuple.
    """
    return "+" if single or Ellipsis in items else len(items)
