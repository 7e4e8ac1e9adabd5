"""`ClassList`: names of classes and their numbers, for the classes of a data set and of every kind of model."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

LONGEST_NUMBER = 18
"""Digits of the longest name that is read as a number."""


@dataclass(frozen=True)
class ClassList:
    """Names of classes, in the order of their numbers.

    Names that differ only in case or spaces are one class, because a latent cache knows captions by their tokens, which
    spell "T-shirt" as "t - shirt" and "10" as "1 0".

    Attributes:
        names: The names. Those of a model may be alike; each is then found as it is written.

    Example:
        >>> from sdkit.networks.class_list import ClassList
        >>> classes = ClassList.of(["dog", "10", "Cat", "9", "dog"])
        >>> classes.names, classes.number("cat"), classes.number("cow")
        (('9', '10', 'Cat', 'dog'), 2, None)
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> ClassList:
        """Return the classes of a data set: numbers by their value, then other names in alphabetical order.

        Args:
            names: The class of each example, or all that there are; empty ones are left out.
        """
        distinct = {plain(name): name for name in sorted(set(names))}  # one spelling, whatever the examples' order
        return cls(tuple(distinct[name] for name in sorted(filter(None, distinct), key=_order)))

    def number(self, name: str) -> int | None:
        """Return the number of a class, or None if there is none of this name."""
        for numbers, spelled in ((self._written, name), (self._folded, _folded(name)), (self._plain, plain(name))):
            if spelled in numbers:
                return numbers[spelled]
        return None

    @property
    def identity(self) -> str:
        """SHA-256 over the names; 16 hex digits."""
        return hashlib.sha256("".join(f"{name}\0" for name in self.names).encode()).hexdigest()[:16]

    @property
    def alike(self) -> bool:
        """Whether two names differ only in case or spaces."""
        return len(self._plain) < len(self.names)

    @cached_property
    def _written(self) -> dict[str, int]:
        return _first_of_each(self.names)

    @cached_property
    def _folded(self) -> dict[str, int]:
        return _first_of_each(map(_folded, self.names))

    @cached_property
    def _plain(self) -> dict[str, int]:
        return _first_of_each(map(plain, self.names))


def plain(name: str) -> str:
    """Return a name in lower case, without spaces."""
    return "".join(unicodedata.normalize("NFC", name).lower().split())


def _folded(name: str) -> str:
    return name.strip().lower()  # casefold() would take "Maße" for "Masse", which `plain` tells apart


def _first_of_each(names: Iterable[str]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for i, name in enumerate(names):
        numbers.setdefault(name, i)
    return numbers


def _order(name: str) -> tuple[int, int, str]:
    """Return what to sort a plain name by."""
    is_number = name.isdecimal() and len(name) <= LONGEST_NUMBER
    return (0, int(name), name) if is_number else (1, 0, name)
