"""What a command has of its process: the two streams it writes to, and the signals that end it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sdkit.errors import SdkitError
from sdkit.messages import Stopped, stop_in

PATIENCE = 10
"""Seconds in which a launcher notices that a process has ended, and ends the others."""


def prepare_streams() -> None:
    """Let stdout and stderr hold any file name, and make up for those that the process was started without."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a file name


def is_main_process() -> bool:
    """Whether this is the main one of the processes of an `accelerate launch`, or the only one."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def left_alone() -> bool:
    """Whether this process, which ends with an error, has to tell of it though it is not the main one.

    What all processes meet, the main one tells; with that the launcher ends the others, which wait here.
    """
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        return False
    return True


def printable(text: str) -> str:
    """`text` in one line, with "?" for what might steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def complain(sentence: str) -> None:
    """One line on stderr, whatever is in the names it quotes."""
    with contextlib.suppress(OSError):  # nobody can be told that nobody can be told
        sys.stderr.write(f"sdkit: {printable(sentence)}\n")


def say(text: str) -> None:
    """A line on stdout, now, and above a progress bar if there is one. Raises `SdkitError` where there is no room."""
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        try:
            sys.stdout.write(f"{text}\n")
        except OSError as error:
            raise _unwritten(error) from error
        flush()


def say_path(path: Path) -> None:
    """As it is for other programs, but for a terminal without what might steer it."""
    say(printable(str(path)) if sys.stdout.isatty() else str(path))


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows with their columns aligned."""
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    for row in clean:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say_json(value: Any) -> None:
    """A value as JSON, with strings for what JSON does not know (paths)."""
    say(json.dumps(value, indent=2, default=str, allow_nan=False))


def flush() -> None:
    """Write out what stdout still holds; raises as `say` does."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> OSError | SdkitError:
    if isinstance(error, BrokenPipeError):
        return error
    mute_stdout()
    return SdkitError(f"cannot write to the standard output: {str(error.strerror).lower()}.")


def mute_stdout() -> None:
    """Without this Python would complain, while it exits, of what it cannot write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped`, so that, as after Ctrl-C, temporary files are removed.

    Only in the main thread, which alone may have handlers, and only where they would end the process: nohup's SIGHUP
    stays ignored.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = [number for number in known if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, _: object) -> NoReturn:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # a second one is not to disturb the clearing up
        raise Stopped(number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def exit_code_of(work: Callable[[], int]) -> int:
    """Do the work of a whole process and return its exit code: what `work` returns, or, once the error or the signal
    that ended it is told in one line, a number above 0."""
    prepare_streams()
    try:
        with signals_raised(), warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warn  # type: ignore[assignment]
            return work()
    except BaseException as error:
        stop = stop_in(error)
        if isinstance(stop, Stopped):
            code, sentence = 128 + stop.number, f"{stop}; the files that were finished are whole."
        elif isinstance(stop, KeyboardInterrupt):
            code, sentence = 130, "stopped; the files that were finished are whole."
        elif isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
            mute_stdout()
            return 141
        elif isinstance(error, SdkitError) and not os.environ.get("SDKIT_DEBUG"):
            code, sentence = int(getattr(error, "exit_code", 2)), str(error)
        else:
            raise
    if is_main_process() or (code < 128 and left_alone()):
        complain(sentence)
    return code


def _warn(message: Warning | str, _category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    if Path(filename).is_relative_to(Path(__file__).parent):  # other libraries' warnings are for programmers
        complain(str(message))
