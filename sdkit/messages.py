"""Foreign text (file names, values from files, other libraries' errors) made fit to be quoted in a message."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_QUOTE = 300
LONGEST_MESSAGE = 1000
LISTED = 3  # names of many that a message gives


def printable(text: str) -> str:
    """`text` in one line, with "?" for what might steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def clean(foreign: object) -> str:
    """A foreign text, path, or value in one line, without control characters, and not too long."""
    text = str(foreign)
    return printable(text) if len(text) <= LONGEST_QUOTE else f"{printable(text[:LONGEST_QUOTE])}..."


def listed(names: Sequence[object]) -> str:
    """The first names, and the number of the others: "a, b, c and 2 more"."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(clean, names[:LISTED])) + more


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without the punctuation at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    begun = lines[0].endswith(":") and lines[1:]  # the second says what the first announces
    return clean(" ".join(lines[:2] if begun else lines[:1]).rstrip(".:"))


def shortened(message: str) -> str:
    """`message` without its middle where it is too long: the problem stands at its beginning, the remedy at its end."""
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def reason(error: Exception) -> str:
    """The system's or a library's message, as the end of a sentence."""
    return str(getattr(error, "strerror", None) or first_line(error)).lower()
