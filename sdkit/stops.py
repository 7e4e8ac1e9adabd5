"""Stops: requests to end the process (a signal, Ctrl-C, `sys.exit`), also where another library hides them."""

from __future__ import annotations

import signal


class Stopped(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


STOPS = (Stopped, KeyboardInterrupt, SystemExit)


def stop_in(error: BaseException) -> BaseException | None:
    """Return the stop (a signal, Ctrl-C, `sys.exit`) that `error` is or was caused by; None if there is none.

    Other code may wrap a stop in an error of its own: Python 3.11 does in `__set_name__`, and ctypes and regex do, too.
    Without this search, such a stop would be reported as a damaged file.
    """
    seen: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, STOPS):
            return one
        seen[id(one)] = one
        waiting += [one.__context__, one.__cause__]
    return None
