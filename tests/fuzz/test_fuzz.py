"""Whatever is in the files that sdkit reads, it gives a result or reports in one sentence why there is none.

`python -m tests.fuzz --help` explains how to repeat a case.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("datasets")

from sdkit.errors import SdkitError
from tests.fuzz import harness, mutators, targets, worker
from tests.fuzz.harness import Failure, Worker, failures
from tests.fuzz.targets import TARGETS

SHORT, LONG = 300, 10_000


def told(found: list[Failure]) -> str:
    """Describe one case of each cause, the most frequent cause first."""
    causes: dict[tuple[str, str], list[Failure]] = {}
    for failure in found:
        causes.setdefault(failure.cause, []).append(failure)
    ordered = sorted(causes.values(), key=len, reverse=True)
    return f"{len(found)} failures of {len(causes)} causes:\n" + "\n".join(
        f"{len(same)} x {same[0]}" for same in ordered
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[Worker]:
    with Worker() as one:
        yield one


def test_what_is_not_damaged_is_read(shared: Worker) -> None:
    found = [failure for target in TARGETS if (failure := shared.ask(target, None))]
    assert not found, told(found)


def test_damaged_files(shared: Worker) -> None:
    found = failures(shared, TARGETS, 0, SHORT)
    assert not found, told(found)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_ten_thousand_damaged_files(shared: Worker) -> None:
    found = failures(shared, TARGETS, SHORT, LONG)
    assert not found, told(found)


# The harness itself: it reports each kind of misbehaviour, and nothing else


def write_elsewhere(folder: Path, out: Path) -> None:
    (folder.parent / "elsewhere").write_text("x")


def write_in_place(folder: Path, out: Path) -> None:
    (out / "fine").mkdir()
    (out / "fine" / "x").write_text("x")
    raise SdkitError("this is a sentence.")


def start_a_process(folder: Path, out: Path) -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def connect(folder: Path, out: Path) -> None:
    socket.create_connection(("127.0.0.1", 9))


def swallow(folder: Path, out: Path) -> None:
    """Start a process and catch what the audit hook raises. The attempt must be reported all the same."""
    try:
        os.system("true")
    except BaseException as error:
        raise SdkitError("something went wrong.") from error


def take_time(folder: Path, out: Path) -> None:
    end = time.process_time() + worker.SECONDS + 0.5
    while time.process_time() < end:
        pass


def take_memory(folder: Path, out: Path) -> None:
    bytearray(worker.BYTES + 10**8)


def run_the_input(folder: Path, out: Path) -> None:
    exec(compile("1 + 1", str(folder / "x.py"), "exec"))


def two_lines(folder: Path, out: Path) -> None:
    raise SdkitError("one\ntwo")


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (write_in_place, None),
        (write_elsewhere, "writes outside of its folder"),
        (start_a_process, "starts a process"),
        (connect, "connects"),
        (swallow, "starts a process"),
        (take_time, "takes "),
        (take_memory, "takes 1."),
        (run_the_input, "runs code that lies in the input"),
        (two_lines, "not one sentence"),
        (lambda folder, out: 1 / 0, "ZeroDivisionError"),
        (lambda folder, out: sys.exit(1), "SystemExit"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_worker_sees(
    read: Callable[[Path, Path], object], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    watch: worker.Watch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    monkeypatch.setattr(worker, "Watch", lambda: watch)
    cases = worker.Cases(tmp_path)
    for folder in (cases.case, cases.out):
        folder.mkdir()
    found, _ = cases._read(targets.Target(name="one", make=lambda folder: None, read=read))
    assert (found or "").startswith(problem or "nothing") or found is problem


@pytest.fixture(scope="module")
def watch() -> worker.Watch:
    return worker.Watch()  # an audit hook cannot be removed, so all tests share one


def test_a_worker_that_dies_is_told_and_replaced(shared: Worker) -> None:
    assert shared.ask("prompts", None) is None
    assert shared.process is not None
    shared.process.kill()
    failure = shared.ask("prompts", 1)
    assert failure is not None
    assert "the process died (signal 9)" in failure.problem
    assert "--target prompts --seed 1" in str(failure)
    assert shared.ask("prompts", None) is None


def test_a_worker_that_waits_is_told_where(shared: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared.ask("prompts", None) is None
    assert shared.process is not None
    monkeypatch.setattr(harness, "IDLE", 1)
    shared.process.send_signal(signal.SIGSTOP)
    failure = shared.ask("prompts", 1)
    assert failure is not None
    assert "waits for something" in failure.problem


@pytest.mark.parametrize("suffix", [*mutators.STRUCTURED, ".webp"])
def test_damage_depends_on_the_seed_alone(suffix: str) -> None:
    from random import Random

    data = b'{"a": [1, {"b": "c"}]}' if suffix in (".json", ".jsonl") else bytes(range(256)) * 8
    made = [[mutators.mutated(data, suffix, Random(seed)) for seed in range(40)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 20
    assert all(one != data for one in made[0])
