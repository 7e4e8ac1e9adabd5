"""Signals: exit codes, exceptions that libraries wrap or lose, and no partial files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sdkit.cli.console import exit_code_of
from sdkit.errors import SdkitError
from sdkit.loading.tensors import guarded
from sdkit.stops import Stopped, stop_in


def raising(stop: BaseException) -> None:
    """Raise `stop` in a place where Python 3.11 wraps it in a RuntimeError."""

    class Named:
        def __set_name__(self, owner: type, name: str) -> None:
            raise stop

    type("Owner", (), {"named": Named()})


@pytest.mark.parametrize(("stop", "code"), [(Stopped(signal.SIGTERM), 143), (KeyboardInterrupt(), 130)])
class TestWrappedStops:
    def test_is_found_below_other_errors(self, stop: BaseException, code: int) -> None:
        try:
            raising(stop)
        except (RuntimeError, Stopped, KeyboardInterrupt) as error:  # Python 3.12 does not wrap it
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


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from sdkit.cli.console import exit_code_of

def send(name):
    os.kill(os.getpid(), getattr(signal, name))

def rest(seconds):  # of many short sleeps, each of which a signal can end
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)

{work}
sys.exit(exit_code_of(work))
"""


def run(work: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `work`, the source of a function with that name, in a subprocess."""
    script = SCRIPT.format(work=textwrap.dedent(work))
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize(
    "lost",
    [
        """
        class Trash:
            def __del__(self):
                send(sys.argv[1])
                rest(0.1)

        def work():
            Trash()
            rest(30)
            return 0
        """,
        """
        def work():
            try:
                send(sys.argv[1])
                rest(30)
            except:
                pass
            rest(30)
            return 0
        """,
        """
        def work():
            try:
                send(sys.argv[1])
                rest(30)
            except:
                pass
            return 0  # before anything could remind of it
        """,
    ],
    ids=["in __del__", "in a bare except", "at the end"],
)
def test_a_signal_whose_exception_is_lost_ends_the_process_all_the_same(lost: str, name: str, code: int) -> None:
    """Guards against a defect: the handler was removed after the first signal, and the process could only be killed."""
    ended = run(lost, name)
    assert ended.returncode == code
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("sdkit: stopped")


CLEARS_UP = """
def work():
    temporary = Path(sys.argv[1])
    temporary.touch()
    try:
        send(sys.argv[2])
        rest(30)
    finally:
        for name in sys.argv[3:]:
            send(name)
        rest(1.2)  # longer than the reminder
        temporary.unlink()
    return 0
"""


@pytest.mark.parametrize(("first", "second", "code"), [("SIGTERM", "SIGINT", 143), ("SIGINT", "SIGTERM", 130)])
def test_a_second_signal_does_not_disturb_the_clearing_up_and_a_third_ends_it(
    first: str, second: str, code: int, tmp_path: Path
) -> None:
    assert run(CLEARS_UP, tmp_path / "one", first).returncode == code
    assert run(CLEARS_UP, tmp_path / "two", first, second).returncode == code
    assert not [*tmp_path.iterdir()]
    assert run(CLEARS_UP, tmp_path / "three", first, second, first).returncode == code
    assert [*tmp_path.iterdir()] == [tmp_path / "three"]


def test_signals_are_as_before_afterwards() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
    before = [*map(signal.getsignal, numbers), sys.unraisablehook]
    assert exit_code_of(lambda: 7) == 7
    assert [*map(signal.getsignal, numbers), sys.unraisablehook] == before


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    work = """
    folder = Path(sys.argv[1])
    os.chdir(folder)
    folder.rmdir()

    def work():
        import torch
        return 0
    """
    (tmp_path / "gone").mkdir()
    ended = run(work, tmp_path / "gone")
    assert ended.returncode == 2
    assert ended.stderr == "sdkit: the working folder is not there any more; change into one that is.\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(24, "Too many open files", "a\nb"), "the system refused: a?b: too many open files;"),
        (PermissionError("no"), "the system refused: no;"),
        (
            UnicodeEncodeError("ascii", "\u732b.png", 0, 1, "no"),
            "'\u732b.png' cannot be written in the ascii of this locale",
        ),
    ],
)
def test_what_the_system_refuses_anywhere_is_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> int:
        raise error

    assert exit_code_of(work) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"sdkit: {sentence}")
    assert len(told.splitlines()) == 1
    monkeypatch.setenv("SDKIT_DEBUG", "1")
    with pytest.raises(type(error)):
        exit_code_of(work)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_costs_nothing(closed: int) -> None:
    work = "def work():\n    from sdkit.cli.console import say\n    say('\u732b')\n    return 0"
    script = f"import os, subprocess, sys; os.close({closed}); sys.exit(subprocess.call(sys.argv[1:], close_fds=False))"
    command = [sys.executable, "-c", script, sys.executable, "-c", SCRIPT.format(work=work)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"LC_ALL": "C"})
    assert (ended.returncode, ended.stderr) == (0, "")
