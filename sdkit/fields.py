"""Descriptions of a class's fields, read from the `Attributes:` section of its docstring (Google style)."""

from __future__ import annotations

import inspect
import re
import textwrap

SECTION = "Attributes:"


def field_docs(cls: type) -> dict[str, str]:
    """Return the description of each field of a class: its own fields first, then those it inherits."""
    docs: dict[str, str] = {}
    for base in cls.__mro__:
        section = inspect.cleandoc(base.__doc__ or "").partition(f"{SECTION}\n")[2]
        for name, text in re.findall(r"^    (\w+): ((?:.|\n(?=        ))*)", section, flags=re.MULTILINE):
            docs.setdefault(name, " ".join(text.split()))
    return docs


def with_inherited_fields(cls: type) -> str:
    """Return a class's docstring with the descriptions of inherited fields appended, so that `help` shows them all."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    own = doc.partition(SECTION)[2]
    inherited = (f"{name}: {text}" for name, text in field_docs(cls).items() if f"\n    {name}: " not in own)
    wrapped = (textwrap.fill(line, 110, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in inherited)
    return "\n".join([doc, *wrapped])
