"""What a process makes of signals: exit codes, whatever libraries do to the exceptions, and nothing left half done."""

from __future__ import annotations

import signal

import pytest

from sdkit.console import exit_code_of
from sdkit.errors import SdkitError
from sdkit.messages import Stopped, stop_in
from sdkit.models.weights import guarded


def raising(stop: BaseException) -> None:
    """Raise `stop` where Python 3.11 wraps it in a RuntimeError."""

    class Named:
        def __set_name__(self, owner: type, name: str) -> None:
            raise stop

    type("Owner", (), {"named": Named()})


@pytest.mark.parametrize(("stop", "code"), [(Stopped(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
class TestWrappedStops:
    def test_is_found_below_other_errors(self, stop: BaseException, code: int) -> None:
        try:
            raising(stop)
        except (RuntimeError, Stopped, KeyboardInterrupt) as error:  # Python 3.12 wraps nothing
            told = SdkitError("the model is damaged.")
            told.__cause__ = error
        assert stop_in(told) is stop

    def test_passes_a_guarded_load(self, stop: BaseException, code: int) -> None:
        with pytest.raises(type(stop)), guarded("a VAE"):
            raising(stop)

    def test_decides_the_exit_code(self, stop: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
        def work() -> int:
            raising(stop)
            return 0

        def told() -> int:
            try:
                raising(stop)
            except (RuntimeError, Stopped, KeyboardInterrupt) as error:
                raise SdkitError("the model is damaged.") from error
            return 0

        assert (exit_code_of(work), exit_code_of(told)) == (code, code)
        assert "damaged" not in capsys.readouterr().err


def test_an_error_without_a_stop_has_none_even_where_its_chain_is_a_circle() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__context__ = second, first
    assert stop_in(first) is None
