"""Messages: make foreign text safe to quote, and silence other libraries.

Foreign text is text that sdkit did not write: file names, values from files, other libraries' errors.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module

LONGEST_QUOTE = 300
"""Largest number of characters quoted from a foreign text."""
LONGEST_MESSAGE = 1000
"""Largest number of characters in a whole message."""
LISTED = 3
"""Largest number of names that a message lists; the others are only counted."""
DOWNLOADERS = ("datasets", "huggingface_hub")
"""Libraries whose progress bars `quiet` keeps on a terminal: a download may take hours."""

_switching = threading.Lock()
_users: dict[str, int] = {}
"""Library -> number of its open `quiet` blocks."""
_settings: dict[str, tuple[int, bool]] = {}
"""Library -> its log level before the first open `quiet` block, and whether that block disabled its progress bars."""


def printable(text: str) -> str:
    """Return `text` in one line, with "?" for characters that could control a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def clean(foreign: object) -> str:
    """Return a foreign text, path, or value in one line, without control characters, cut if it is too long."""
    text = str(foreign)
    return printable(text) if len(text) <= LONGEST_QUOTE else f"{printable(text[:LONGEST_QUOTE])}..."


def listed(names: Sequence[object]) -> str:
    """List the first names and the number of the others: "a, b, c and 2 more"."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(clean, names[:LISTED])) + more


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without the punctuation at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    begun = lines[0].endswith(":") and lines[1:]  # a line that ends in ":" only announces the next one
    return clean(" ".join(lines[:2] if begun else lines[:1]).rstrip(".:"))


def shortened(message: str) -> str:
    """Cut the middle out of a message that is too long. It begins with the problem, and ends with the remedy."""
    half = LONGEST_MESSAGE // 2
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def system_message(error: Exception) -> str:
    """Return the operating system's message of an `OSError`, or else the first line of a library's message."""
    return clean(error.strerror) if isinstance(error, OSError) and error.strerror else first_line(error)


def reason(error: Exception) -> str:
    """Return `system_message` in lower case, to end a sentence with."""
    return system_message(error).lower()


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Silence the logs and progress bars of "diffusers", "transformers", "huggingface_hub", or "datasets".

    The settings belong to the whole process. If several threads have open `quiet` blocks, the first to
    enter silences a library, and the last to leave restores it.
    """
    with ExitStack() as stack:
        for library in libraries:
            stack.enter_context(_quiet(library))
        yield


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    log = import_module(f"{library}.utils.logging")  # configures the logger; done later, that would reset the level
    bars_enabled, enable_bars, disable_bars = _bars(library)
    with _switching:
        _users[library] = _users.get(library, 0) + 1
        if _users[library] == 1:
            silenced = bars_enabled() and not (library in DOWNLOADERS and sys.stderr.isatty())
            _settings[library] = (log.get_verbosity(), silenced)
            log.set_verbosity(logging.CRITICAL)
            if silenced:
                disable_bars()
    try:
        yield
    finally:
        with _switching:
            _users[library] -= 1
            if _users[library] == 0:
                level, silenced = _settings.pop(library)
                log.set_verbosity(level)
                if silenced:
                    enable_bars()


def _bars(library: str) -> tuple[Callable[[], bool], Callable[[], None], Callable[[], None]]:
    """Return three functions of the library: are progress bars enabled, enable them, and disable them."""
    if library in DOWNLOADERS:
        bars = import_module(f"{library}.utils.tqdm")
        return lambda: not bars.are_progress_bars_disabled(), bars.enable_progress_bars, bars.disable_progress_bars
    bars = import_module(f"{library}.utils.logging")
    return bars.is_progress_bar_enabled, bars.enable_progress_bar, bars.disable_progress_bar


@contextmanager
def no_warnings() -> Iterator[None]:
    """Ignore all warnings while the context is open, in every thread: Python's warning filters are global."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
