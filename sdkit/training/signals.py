"""Stopping a run: signals are noted, and the loop looks for them between two passes of a network."""

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
    """The run was asked to stop, and saved a checkpoint. `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Unfinished(Exception):  # noqa: N818 - a stop is not an error
    """Work after the last finished step was discarded, because the process was asked to stop."""


class StopSignals:
    """Context that notes SIGTERM, SIGHUP, and Ctrl-C for the loop: `exit_code` is 0 until one arrives, then 128 plus
    its number.

    A second Ctrl-C is handled as outside the context, and so raises KeyboardInterrupt.
    """

    noting: ClassVar[StopSignals | None] = None  # the active context: signals concern the whole process

    def __init__(self) -> None:
        self.exit_code = 0
        self._interrupted = False

    def __enter__(self) -> StopSignals:
        in_main = threading.current_thread() is threading.main_thread()  # Python gives signals to no other thread
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        taken = [n for n in known if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]  # as nohup's SIGHUP
        self._before = {n: signal.signal(n, self._note) for n in taken if in_main}
        StopSignals.noting = self if in_main else StopSignals.noting
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        if StopSignals.noting is self:
            StopSignals.noting = None

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
    """Raise `Unfinished` if this process was asked to stop. Call it before each pass of a network."""
    if StopSignals.noting and StopSignals.noting.exit_code:
        raise Unfinished
