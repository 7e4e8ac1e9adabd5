"""Descriptions of a class's fields, read from the `Attributes:` section of its docstring (Google style)."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import Parameter
from typing import Any, TypeVar

SECTION = "Attributes:"

Function = TypeVar("Function", bound=Callable[..., Any])


def field_docs(cls: type) -> dict[str, str]:
    """Return the description of each field of a class: its own fields first, then those it inherits."""
    docs: dict[str, str] = {}
    for base in cls.__mro__:
        section = inspect.cleandoc(base.__doc__ or "").partition(f"{SECTION}\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): ((?:.|\n(?=        ))*)", section, flags=re.MULTILINE):
            docs.setdefault(name, " ".join(text.split()))
    return docs


def with_inherited_fields(cls: type) -> str:
    """Return a class's docstring with the descriptions of inherited fields appended, so that `help` shows them all."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    own = doc.partition(SECTION)[2]
    inherited = {name: text for name, text in field_docs(cls).items() if f"\n    {name}: " not in own}
    return "\n".join([doc, *_entries(inherited)])


def takes_fields(cls: Any) -> Callable[[Function], Function]:
    """Return a decorator for a function that takes the fields of a dataclass as its last keywords, `**options`.

    The signature and the `Args:` section of the function then name each field, so that `help`, editors, and
    `inspect.signature` show it. The function's own docstring describes only its other arguments.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        taken = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(cls)
        ]
        before, section, after = inspect.cleandoc(function.__doc__ or "").partition("\n\nReturns:\n")
        function.__doc__ = "\n".join([before, *_entries(field_docs(cls))]) + section + after
        function.__signature__ = signature.replace(parameters=[*own, *taken])  # type: ignore[attr-defined]
        return function

    return decorate


def _entries(docs: dict[str, str]) -> Iterable[str]:
    """Yield the lines of a section of a docstring, wrapped, one entry for each name and its description."""
    for name, text in docs.items():
        yield textwrap.fill(f"{name}: {text}", 110, initial_indent=" " * 4, subsequent_indent=" " * 8)
