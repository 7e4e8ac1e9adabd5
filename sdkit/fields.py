"""The docstrings that stand under a class's fields, where `help` finds them."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from itertools import pairwise
from typing import TypeVar

C = TypeVar("C", bound=type)


def documented(cls: C) -> C:
    """A class decorator: the docstring goes on with those of the fields, read from the source when it is asked for."""
    cls.__doc__ = _Docstring(inspect.cleandoc(cls.__doc__ or ""))
    return cls


class _Docstring(str):
    def __get__(self, instance: object, owner: type) -> str:
        with contextlib.suppress(OSError):  # where there is no source
            lines = (f"{name}: {doc}" for name, doc in field_docs(owner).items())
            return "\n".join([self, "", *(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)])
        return self


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each annotated field of a class: its own ones first, then those that it inherits."""
    docs: dict[str, str] = {}
    for base in (base for base in cls.__mro__ if inspect.get_annotations(base)):
        (node,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(node, ast.ClassDef)
        for field, below in pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                docs.setdefault(field.target.id, " ".join(ast.literal_eval(below.value).split()))
    return docs
