"""Output streams, signals, and exit codes of a command's process."""

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
"""Seconds that the launcher is given to notice that one process has ended, and to end the rest."""

REMINDER = 0.5
"""Interval in seconds at which a stop that a library swallowed is raised again."""


def prepare_streams() -> None:
    """Make stdout and stderr accept any file name. Discard the output to a stream that the process lacks."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the locale may not encode every file name


def outlives_main_process() -> bool:
    """Wait, and return whether this process, which is not the main one, must report its error itself.

    If all processes fail with the same error, the main process reports it, and the launcher ends the rest during the
    wait. A process that is still running after the wait has failed alone. Ctrl-C ends the wait without a report.
    """
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        return False
    return True


def complain(sentence: str) -> None:
    """Print a sentence as one line on stderr. Control characters, such as those in file names, become "?"."""
    with contextlib.suppress(OSError):  # stderr may be closed, and then the error can be reported nowhere
        sys.stderr.write(f"sdkit: {printable(sentence)}\n")


def say(text: str) -> None:
    """Print a line on stdout at once, above a progress bar if there is one.

    Raises:
        BrokenPipeError: The reader of stdout, such as `head`, has closed the pipe.
        SdkitError: The line cannot be written for another reason, such as a full disk.
    """
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        try:
            sys.stdout.write(f"{text}\n")
        except OSError as error:
            raise _output_error(error) from error
        flush()


def say_path(path: Path) -> None:
    """Print a path: unchanged to a file or pipe, with control characters replaced by "?" on a terminal."""
    say(printable(str(path)) if sys.stdout.isatty() else str(path))


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with their columns aligned."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say_json(value: Any) -> None:
    """Print a value as JSON; types that JSON lacks, such as paths, become strings."""
    say(json.dumps(value, indent=2, default=str, allow_nan=False))


def flush() -> None:
    """Flush stdout. Raises the same errors as `say`."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _output_error(error) from error


def _output_error(error: OSError) -> OSError | SdkitError:
    """Return the error to raise after a failed write to stdout: BrokenPipeError, or SdkitError for any other cause."""
    if isinstance(error, BrokenPipeError):
        return error
    mute_stdout()
    return SdkitError(f"cannot write to the standard output: {str(error.strerror).lower()}.")


def mute_stdout() -> None:
    """Discard what is left in stdout's buffer. Otherwise Python would try to write it at exit, and print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Stops:
    """Signal handlers that raise a stop (`Stopped` or KeyboardInterrupt), again and again if a library swallows it.

    A stop is swallowed if it is raised inside a `__del__`, or in a `try` block with a bare `except`. While a stop
    propagates, `finally` blocks and context managers clean up. During this cleanup the next signal is ignored, and the
    one after it ends the process at once.
    """

    def __init__(self) -> None:
        self._number = self._ignored = 0
        self.timer = hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL

    def stop(self, number: int, _: object) -> None:
        """Handle a signal that asks the process to end."""
        if self._number and self._propagates():
            self._ignored += 1
            if self._ignored > 1:
                os._exit(128 + number)
            return
        self._number = self._number or number
        if self.timer:
            signal.setitimer(signal.ITIMER_REAL, REMINDER, REMINDER)
        self.remind()

    def remind(self, *_: object) -> None:
        """Raise the stop that a signal asked for, unless it is propagating already. Also the handler of the timer."""
        if self._number and not self._propagates():
            raise KeyboardInterrupt if self._number == signal.SIGINT else Stopped(self._number)

    @staticmethod
    def _propagates() -> bool:
        """Return whether the exception that is being handled is, or was caused by, a stop."""
        error = sys.exc_info()[1]
        return error is not None and stop_in(error) is not None


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Stopped`, so that temporary files are removed as after Ctrl-C; see `_Stops`.

    A no-op outside of the main thread, where Python allows no handlers. Only default handlers are replaced: SIGHUP
    stays ignored after nohup.
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
        stops.remind()  # the work may have ended before the timer could raise a lost stop again
    finally:
        sys.unraisablehook = hook
        if stops.timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of(work: Callable[[], int]) -> int:
    """Run the whole work of a process, and return the exit code.

    Stop signals, and errors that a user or the system causes, are reported in one line. Unexpected errors propagate. If
    SDKIT_DEBUG is set, all errors propagate except a closed pipe on stdout.

    Args:
        work: Does the work, and returns an exit code.

    Returns:
        The exit code of `work`; after an error or a signal, a number above 0.
    """
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
        elif isinstance(error, BrokenPipeError):  # the reader of stdout, such as `head`, has closed the pipe
            mute_stdout()
            return 141
        elif isinstance(error, (SdkitError, OSError, UnicodeEncodeError)) and not os.environ.get("SDKIT_DEBUG"):
            code, sentence = int(getattr(error, "exit_code", 2)), _sentence(error)
        else:
            raise
    if is_main_process() or (code < 128 and outlives_main_process()):
        complain(sentence)
    return code


def _check_folder() -> None:
    """Raise SdkitError if the working folder was deleted. Libraries would fail later, each in its own way."""
    try:
        os.getcwd()  # noqa: PTH109 - pathlib's is the same
    except OSError as error:
        raise SdkitError("the working folder is not there any more; change into one that is.") from error


def _sentence(error: Exception) -> str:
    """Return an error's message. An error of the system, such as too many open files, is put into a sentence."""
    if isinstance(error, UnicodeEncodeError):
        return f"{clean(repr(error.object))} cannot be written in the {error.encoding} of this locale; use UTF-8."
    if isinstance(error, OSError):
        at = f"{clean(os.fsdecode(error.filename))}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"the system refused: {at}{clean(error.strerror or str(error)).lower()}; SDKIT_DEBUG=1 shows where."
    return str(error)


def _warn(message: Warning | str, _category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Print a warning of sdkit in one line. Drop warnings of other libraries, which are meant for programmers."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        complain(str(message))
