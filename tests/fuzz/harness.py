"""Supervises the process that reads damaged files, and replaces it if it crashes, hangs, or uses too much memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.fuzz.worker import BYTES, SECONDS

IDLE, WORK = 10, 0.5
"""Limits, in seconds, by which a process that hangs is recognised: it waits for something (a pipe, a lock) that never
comes if it has computed for less than WORK in the last IDLE. Threads of libraries compute a little even then.
"""
START = 300
"""Seconds in which a process must have imported the libraries, or made a valid input."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that ended neither with a result nor with an `SdkitError`."""

    target: str
    seed: int | None
    """None if the undamaged input was read"""
    what: str
    problem: str
    where: str

    @property
    def cause(self) -> tuple[str, str]:
        """Key that groups failures which one fix would probably solve."""
        return self.where.rpartition(" > ")[2] or self.target, self.problem.split(":")[0].split("(")[0]

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" --seed {self.seed}"
        place = f" [{self.where}]" if self.where else ""
        return f"python -m tests.fuzz --target {self.target}{seed}\n    {self.what}: {self.problem}{place}"


class Worker:
    """A `tests.fuzz.worker` process. It is started on demand, and again after it has ended."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sdkit-fuzz-"))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, target: str, seed: int | None, keep: Path | None = None) -> Failure | None:
        """Have the process read one case. Return None if nothing is wrong."""
        if self.process is None:
            self._start()
        assert self.process
        assert self.process.stdin
        asked = {"target": target, "seed": seed, "keep": keep and str(keep)}
        with contextlib.suppress(BrokenPipeError):  # a dead process is noticed below
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        answer: dict[str, Any] = {"what": "nothing is damaged" if seed is None else "the case is being made"}
        while "problem" not in answer:
            answer |= self._answer()
        if answer["problem"] is None:
            return None
        return Failure(target=target, seed=seed, what=answer["what"], problem=answer["problem"], where=answer["where"])

    def _start(self) -> None:
        home = self.folder / "home"
        for name in ("hf", "tmp", "mpl", "cwd"):
            (home / name).mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "HF_HUB_CACHE": str(home / "hf" / "hub"),
            "HF_DATASETS_CACHE": str(home / "hf" / "datasets"), "TMPDIR": str(home / "tmp"),
            "MPLCONFIGDIR": str(home / "mpl"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        environment.pop("SDKIT_DEBUG", None)
        self.errors = (self.folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(self.folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, bufsize=0, env=environment, cwd=home / "cwd",
        )  # fmt: skip
        if "ready" not in (answer := self._answer(START)):
            raise RuntimeError(f"no worker can be started: {answer}\n{self._said()}")

    def _answer(self, limit: float | None = None) -> dict[str, Any]:
        """Return the next line of the process, or the reason why there is none.

        Without a `limit` in seconds, the process may take as long as it works, but may neither idle nor use too much
        memory.
        """
        assert self.process
        assert self.process.stdout
        began = busy = time.monotonic()
        first_cpu, first_memory, _ = self._usage()
        cpu, looks, ready = first_cpu, 0, 0
        # The output is not buffered: `select` does not see lines that have already been read.
        while not select.select([self.process.stdout], [], [], 0.05)[0]:
            now, (used, held, runnable) = time.monotonic(), self._usage()
            looks, ready = looks + 1, ready + runnable
            # The process works, or waits for a free processor.
            if used > cpu + WORK or (now - busy > IDLE and ready > looks / 5):
                cpu, busy, looks, ready = used, now, 0, 0
            if limit is not None:
                if now - began > limit:
                    return self._end(f"does not answer within {limit} s")
            elif now - busy > IDLE:
                return self._end("does not end: it waits for something")
            elif held - first_memory > 4 * BYTES:
                return self._end(f"takes over {4 * BYTES / 1e9:.0f} GB")
            elif used - first_cpu > 6 * SECONDS:
                return self._end(f"does not end within {6 * SECONDS} s of CPU time")
        line = self.process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.process.wait()
        return self._end(f"the process died ({f'signal {-code}' if code < 0 else f'exit code {code}'})")

    def _usage(self) -> tuple[float, int, bool]:
        """Measure the process: CPU time in seconds, memory in bytes, and whether it is running or waits only for a
        processor or a disk.
        """
        assert self.process
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0, 0, False
        ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
        return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"), fields[0] in "RD"

    def _end(self, problem: str) -> dict[str, Any]:
        assert self.process
        if self.process.poll() is None:  # ask for its stack before it is killed
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        ours = "\n".join(line for line in self._said().splitlines() if "site-packages" not in line)
        frames = re.findall(r'File ".*/sdkit/(.*)", line (\d+) in', ours)  # innermost frame first
        where = " > ".join(f"{file}:{line}" for file, line in frames[:2][::-1])
        self._stop()
        return {"problem": problem, "where": where}

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-20_000:]

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.errors.close()
            self.process = None


def cases(names: Iterable[str], seed: int, count: int) -> Iterator[tuple[str, int]]:
    """Yield `count` pairs of target and seed. The targets take turns; the seeds count up from `seed`."""
    targets = list(names)
    for i in range(count):
        yield targets[i % len(targets)], seed + i // len(targets)


def failures(worker: Worker, names: Iterable[str], seed: int, count: int) -> list[Failure]:
    """Read `count` cases and return those that failed."""
    found = (worker.ask(target, number) for target, number in cases(names, seed, count))
    return [failure for failure in found if failure]
