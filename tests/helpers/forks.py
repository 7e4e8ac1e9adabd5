"""Processes forked from one that has already imported the libraries: a new Python takes eight seconds to do so.

`start` starts a process, `run` waits for its end too, and `launch` does so with several that work together.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).parents[2]
TWO = (
    "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip
"""Options of `accelerate launch` for two processes. With --cpu, it starts one, whatever number is asked for."""
LIMIT = 240.0  # seconds


class Ended(NamedTuple):
    """Exit codes of all processes, -N for those that signal N ended, and what they have written together."""

    codes: list[int]
    out: str
    err: str


@functools.cache
def _context() -> ForkServerContext:
    """Start the process that all others are forked from, in an environment without a GPU and with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    with mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()
    return context


def start(
    function: Callable[..., object],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    out: Path | None = None,
    err: Path | None = None,
) -> ForkServerProcess:
    """Start a process that calls a function in the current folder. What the function returns is the exit code.

    Args:
        function: A function of a module that can be imported.
        arguments: Its arguments, which must be picklable.
        environment: Changes of the environment variables.
        out: File to which the standard output is appended.
        err: File to which the standard error is appended.
    """
    process = _context().Process(target=_run, args=(function, arguments, Path.cwd(), environment or {}, out, err))
    process.start()
    return process


def _run(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    folder: Path,
    environment: Mapping[str, str],
    out: Path | None,
    err: Path | None,
) -> None:
    # The tests' own parent may have set signals to be ignored: shells do so with SIGINT for background jobs, and nohup
    # with SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        if path:
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    raise SystemExit(function(*arguments))


def run(function: Callable[..., object], *arguments: Any) -> Ended:
    """Call a function in another process, and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        codes = _wait([start(function, *arguments, out=out, err=err)])
        return Ended(codes, out.read_text(), err.read_text())


def launch(function: Callable[..., object], *arguments: Any, options: Sequence[str] = TWO) -> Ended:
    """Call a function in several processes, with the environment that `accelerate launch` gives them.

    If one fails, the others are terminated.

    Args:
        function: A function of a module that can be imported.
        arguments: Its arguments, which must be picklable.
        options: Options of `accelerate launch`.
    """
    parsed = launch_command_parser().parse_args([*options, "--main_process_port", "0", "script.py"])
    parsed = _validate_launch_command(parsed)[0]
    common = prepare_multi_gpu_env(parsed)
    common = {name: value for name, value in common.items() if value != os.environ.get(name)}
    count = parsed.num_processes
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(parsed.main_process_port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        running = [
            start(function, *arguments, environment=common | {"RANK": rank, "LOCAL_RANK": rank}, out=out, err=err)
            for rank in map(str, range(count))
        ]
        codes = _wait(running)
        return Ended(codes, out.read_text(), err.read_text())


def _wait(running: Sequence[ForkServerProcess]) -> list[int]:
    deadline = time.monotonic() + LIMIT
    left = list(running)
    while left and time.monotonic() < deadline and not any(process.exitcode for process in running):
        multiprocessing.connection.wait([process.sentinel for process in left], timeout=1)
        left = [process for process in left if process.exitcode is None]
    for process in left:
        process.join(1)  # it may end with the same error by itself
        process.terminate()
        process.join(5)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in running]
