"""Checks of arguments: each returns the value, or raises ArgumentError with a sentence that names the argument."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch

from sdkit.errors import ArgumentError
from sdkit.messages import clean

LONGEST_SIDE = 16384
"""Largest height or width of an image, in pixels. Memory runs out well before."""
PREDICTIONS = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "x0": "sample",
    "sample": "sample",
}
"""Accepted name of a model's parameterisation -> diffusers' name."""


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """Check that `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} {value!r} is not one of {', '.join(map(repr, choices))}.")
    return value


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Check that `value` is a whole number (NumPy's too) from `low` to `high`, both included."""
    try:
        n = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        n = low - 1
    if n < low or (high is not None and n > high):
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ArgumentError(f"{name} must be a whole number {span}, not {value!r}.")
    return n


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Check that `value` is a finite number from `low` to `high`, both included."""
    try:
        x = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number or a fraction beyond the largest float
        x = math.inf
    if not math.isfinite(x) or not low <= x <= high:
        if math.isinf(low) and math.isinf(high):
            raise ArgumentError(f"{name} must be a finite number, not {value!r}.")
        span = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ArgumentError(f"{name} must be a number {span}, not {value!r}.")
    return x


def flag(name: str, value: Any) -> bool:
    """Check that `value` is True or False. Other types raise: the string "no", for example, is truthy."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, not {value!r}.")
    return value


def possible_name(name: str | os.PathLike[str]) -> bool:
    """Return whether a file can have this name on this system: it can be encoded, and holds no NUL."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def path_or_name(name: str, value: Any) -> str:
    """Check that `value` is a non-empty path or name, legal on this system; return it as a string."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ArgumentError(f"{name} must be a path or a name, not {value!r}.")
    if not possible_name(value):
        raise ArgumentError(f"{name} is {clean(repr(value))}, a name that no file can have here; give another.")
    return os.fspath(value)


def noise_levels(name: str, value: Any) -> tuple[float, float]:
    """Check that `value` is an interval (low, high] of noise levels, with 0 <= low < high; high may be infinite."""
    numbers = isinstance(value, (tuple, list)) and all(isinstance(level, Real) for level in value)
    if not numbers or len(value) != 2 or not 0 <= value[0] < value[1]:
        raise ArgumentError(f"{name} must be two noise levels, 0 <= low < high, not {value}.")
    return value[0], value[1]


def strings(name: str, value: Any) -> list[str]:
    """Check that `value` is a string or a list of at least one string; return a list."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items or not all(isinstance(item, str) for item in items):
        raise ArgumentError(f"{name} must be a string or a list of at least one string.")
    if any("\ud800" <= letter <= "\udfff" for item in items for letter in item):
        raise ArgumentError(f"{name} is not valid Unicode text; give it in UTF-8.")
    return list(items)


def first_seed(seed: object, n: int) -> int:
    """Return the first of `n` successive seeds. Raise ArgumentError unless PyTorch's generators take all of them."""
    return whole_number("seed", seed, 0, 2**63 - n)


def seeded(seed: int | Sequence[int], n: int) -> list[torch.Generator]:
    """Return a CPU generator for each of `n` images: image i has seed + i, or the i-th seed of a list."""
    scalar = isinstance(seed, str) or getattr(seed, "ndim", 1) == 0  # a tensor of one number has no length
    seeds = list(seed) if isinstance(seed, Iterable) and not scalar else None
    if seeds is not None and len(seeds) != n:
        raise ArgumentError(f"{len(seeds)} seeds cannot serve {n} images: give one, or one for each.")
    if seeds is None:
        first = first_seed(seed, n)
        seeds = [first + i for i in range(n)]
    return [torch.Generator().manual_seed(first_seed(value, 1)) for value in seeds]
