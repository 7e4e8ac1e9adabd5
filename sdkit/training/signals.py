"""Stopping a run: handlers record a signal, and the loop checks for it between two passes of a network."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, ClassVar

from sdkit.errors import SdkitError
from sdkit.processes import is_main_process

if TYPE_CHECKING:
    from types import FrameType


class TrainingStopped(SdkitError):  # noqa: N818 - a stop is not an error
    """The run was asked to stop, and has saved a checkpoint.

    Attributes:
        exit_code: 128 plus the number of the signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Unfinished(Exception):  # noqa: N818 - a stop is not an error
    """Work after the last finished step was discarded because the process was asked to stop."""


class StopSignals:
    """Context that records SIGTERM, SIGHUP, and Ctrl-C for the loop.

    A second Ctrl-C is passed to the handler that the context replaced; Python's own raises KeyboardInterrupt.

    Attributes:
        exit_code: 0 until a signal arrives, then 128 plus its number.
        active: The context that is open in this process, if any. Signals concern the whole process.
    """

    active: ClassVar[StopSignals | None] = None

    def __init__(self) -> None:
        self.exit_code = 0
        self._interrupted = False

    def __enter__(self) -> StopSignals:
        in_main = threading.current_thread() is threading.main_thread()  # only the main thread may set handlers
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        # A signal that is ignored stays ignored: nohup relies on that for SIGHUP.
        handled = [n for n in known if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {n: signal.signal(n, self._note) for n in handled if in_main}
        StopSignals.active = self if in_main else StopSignals.active
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        if StopSignals.active is self:
            StopSignals.active = None

    def _note(self, which: int, frame: FrameType | None) -> None:
        if which == signal.SIGINT and self._interrupted:
            before = self._before[which]
            (before if callable(before) else signal.default_int_handler)(which, frame)
        if which == signal.SIGINT:
            self._interrupted = True
            if is_main_process():
                with contextlib.suppress(OSError):  # stderr may be closed
                    os.write(2, b"\nsdkit: stopping with a checkpoint; Ctrl-C again leaves at once.\n")
        self.exit_code = self.exit_code or 128 + which


def raise_if_stopped() -> None:
    """Raise `Unfinished` if this process was asked to stop. Call this before each pass of a network."""
    if StopSignals.active and StopSignals.active.exit_code:
        raise Unfinished
