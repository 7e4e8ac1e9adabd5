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
from typing import Any

from sdkit.errors import SdkitError
from sdkit.messages import clean, printable
from sdkit.processes import is_main_process
from sdkit.stops import Stopped, stop_in

PATIENCE = 10
"""Seconds in which a launcher notices that a process has ended, and ends the others."""

REMINDER = 0.5
"""Seconds after which a stop that a library swallowed is raised again."""


def prepare_streams() -> None:
    """Let stdout and stderr hold any file name, and make up for those that the process was started without."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know every letter of a file name


def left_alone() -> bool:
    """Whether this process, which ends with an error, has to tell of it though it is not the main one.

    What all processes meet, the main one tells; with that the launcher ends the others, which wait here.
    """
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        return False
    return True


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
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
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


class _Stops:
    """Handlers that raise `Stopped` or KeyboardInterrupt, and raise it again where a library swallowed it.

    A stop is lost where it is raised inside a `__del__` or a bare `except`. While it propagates (`finally` blocks and
    context managers clear up then) one more signal is ignored, and the one after that ends the process at once.
    """

    def __init__(self) -> None:
        self._number = self._ignored = 0
        self.timer = hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL

    def stop(self, number: int, _: object) -> None:
        """Handle a signal that asks the process to end."""
        if self._number and self._on_its_way():
            self._ignored += 1
            if self._ignored > 1:
                os._exit(128 + number)
            return
        self._number = self._number or number
        if self.timer:
            signal.setitimer(signal.ITIMER_REAL, REMINDER, REMINDER)
        self.remind()

    def remind(self, *_: object) -> None:
        """Raise the stop that was asked for, if any, unless it propagates already. Handles the timer, too."""
        if self._number and not self._on_its_way():
            raise KeyboardInterrupt if self._number == signal.SIGINT else Stopped(self._number)

    @staticmethod
    def _on_its_way() -> bool:
        error = sys.exc_info()[1]
        return error is not None and stop_in(error) is not None


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped`, so that, as after Ctrl-C, temporary files are removed; see `_Stops`.

    Only in the main thread, which alone may have handlers, and only where they would end the process: nohup's SIGHUP
    stays ignored.
    """
    stops, before, default = _Stops(), dict[int, Any](), (signal.SIG_DFL, signal.default_int_handler)
    names = ("SIGTERM", "SIGHUP", "SIGINT") if threading.current_thread() is threading.main_thread() else ()
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        if signal.getsignal(number) in default:
            before[number] = signal.signal(number, stops.stop)
    stops.timer = stops.timer and bool(before)
    if stops.timer:
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stops.remind)
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_value and stop_in(lost.exc_value) else hook(lost)
    try:
        yield
        stops.remind()  # the work may have ended before the timer did
    finally:
        sys.unraisablehook = hook
        if stops.timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of(work: Callable[[], int]) -> int:
    """Do the work of a whole process and return its exit code: what `work` returns, or, once the error or the signal
    that ended it is told in one line, a number above 0."""
    prepare_streams()
    try:
        with signals_raised(), warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warn  # type: ignore[assignment]
            _check_folder()
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
        elif isinstance(error, (SdkitError, OSError, UnicodeEncodeError)) and not os.environ.get("SDKIT_DEBUG"):
            code, sentence = int(getattr(error, "exit_code", 2)), _sentence(error)
        else:
            raise
    if is_main_process() or (code < 128 and left_alone()):
        complain(sentence)
    return code


def _check_folder() -> None:
    """Raise `SdkitError` where the working folder is gone: each library fails in its own way then, some on import."""
    try:
        os.getcwd()  # noqa: PTH109 - pathlib's is the same, with an import more
    except OSError as error:
        raise SdkitError("the working folder is not there any more; change into one that is.") from error


def _sentence(error: Exception) -> str:
    """The message of an error, or a sentence for a refusal of the system that no code expects (too many open files)."""
    if isinstance(error, UnicodeEncodeError):
        return f"{clean(repr(error.object))} cannot be written in the {error.encoding} of this locale; use UTF-8."
    if isinstance(error, OSError):
        at = f"{clean(os.fsdecode(error.filename))}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"the system refused: {at}{clean(error.strerror or str(error)).lower()}; SDKIT_DEBUG=1 shows where."
    return str(error)


def _warn(message: Warning | str, _category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    if Path(filename).is_relative_to(Path(__file__).parents[1]):  # other libraries' warnings are for programmers
        complain(str(message))
