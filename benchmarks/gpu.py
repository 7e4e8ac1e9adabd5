"""Prove and measure sdkit on a GPU, in at most eight minutes: python benchmarks/gpu.py, or make gpu.

    python benchmarks/gpu.py --out gpu-results             # checks, then measurements
    python benchmarks/gpu.py --only encode draw train      # steps whose names begin so

Each step has a time limit of its own and runs in a worker process, which is started again if a step hangs or crashes.
Results are written after every step: results.json, and results.md for people. So whatever ran before the time is up, or
before the machine is gone, is kept. Steps that could not run are listed with the reason. Steps that compile come last:
they take the longest. At most 40 GB of the card's memory are used. Nothing is downloaded. A bare machine needs CUDA
PyTorch. What it lacks of diffusers, transformers, accelerate, peft, and what they need, may be brought as wheels:
`--wheels FOLDER` unpacks them for this run. benchmarks/README.md says which.

Exit code: 0 if every step that could run passed, 1 if one failed, 2 if nothing can run here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("numpy", "PIL", "safetensors", "diffusers", "transformers", "accelerate", "peft")
"""What the steps import beside PyTorch."""
MEMORY = 40e9
"""Bytes of the card's memory that a worker may use."""
START_SECONDS = 120.0
"""Time in which a worker must have imported its libraries and found its device. A cold disk is slow."""
FAILED_STARTS = 2
"""After this many workers that did not start, the remaining steps are not run."""
LIMITS = {"check": 60.0, "measure": 150.0}
"""Time limit of a step, in seconds, by its kind."""
COMPILE_LIMIT = 240.0
"""Time limit of a step that compiles, in seconds."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prove and measure sdkit on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results (%(default)s)")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of the whole (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="run only the steps whose names begin so")
    parser.add_argument("--device", default="cuda:0", help="device (default: %(default)s); cpu is for tests")
    parser.add_argument("--tiny", action="store_true", help="measure tiny networks: for tests, and as a rehearsal")
    parser.add_argument("--list", action="store_true", help="print the names of the steps, and exit")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of libraries that this machine lacks")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as site:
        if args.wheels and not use_wheels(args.wheels, site):
            print(f"There are no wheels (*.whl) in {args.wheels}.", file=sys.stderr)
            return 2
        return start(args)


def use_wheels(folder: Path, site: str) -> bool:
    """Install wheels into the folder `site`, and let this process and its children import from it. Return whether there
    are any."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return False
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH", ""))))
    return True


def start(args: argparse.Namespace) -> int:
    """List the steps or run them. Returns the exit code."""
    began = time.monotonic()
    if not args.list and args.device != "cpu" and not _cuda():
        print("There is no GPU that PyTorch can use here; run this on a machine with one.", file=sys.stderr)
        return 2
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Python lacks {', '.join(missing)} here; bring wheels in a folder: --wheels FOLDER.", file=sys.stderr)
        return 2
    steps = _steps(args.only)
    if not steps:
        print("No step's name begins so; --list prints the names.", file=sys.stderr)
        return 2
    if args.list:
        print(*(f"{kind} {name}" for kind, name in steps), sep="\n")
        return 0
    return run(steps, args, began + args.seconds)


def run(steps: list[tuple[str, str]], args: argparse.Namespace, deadline: float) -> int:
    """Run the steps in turn until the deadline, and write the results after each. Returns the exit code."""
    args.out.mkdir(parents=True, exist_ok=True)
    results: Json = {"machine": {}, "steps": []}
    worker = Worker(args.device, args.tiny)
    try:
        for kind, name in steps:
            result = worker.do(kind, name, deadline)
            results["machine"] = worker.machine or results["machine"]
            results["steps"].append({"kind": kind, "name": name, **result})
            write(args.out, results)
            print(f"{result['outcome']:8} {name}: {result['said']}", flush=True)
    finally:
        worker.close()
        worker.scratch.cleanup()
    names = {
        outcome: [step["name"] for step in results["steps"] if step["outcome"] == outcome]
        for outcome in ("failed", "not run")
    }
    for outcome, affected in names.items():
        if affected:
            print(f"{outcome}: {', '.join(affected)}")
    print(f"{len(steps)} steps, {len(names['failed'])} failed; see {args.out / 'results.md'}.")
    return 1 if names["failed"] else 0


class Worker:
    """A process that runs steps one after another. It is started at the first step, and again after one that hung.

    Attributes:
        machine: Names of the card and of the libraries, once the process has told them.
        failed_starts: Number of processes that did not start.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        self.scratch = tempfile.TemporaryDirectory()  # outlives the process, which may have to be killed
        self.command = [sys.executable, str(Path(__file__).resolve()), "--worker", device, str(int(tiny))]
        self.command.append(self.scratch.name)
        self.process: subprocess.Popen[str] | None = None
        self.machine: Json = {}
        self.failed_starts = 0

    def do(self, kind: str, name: str, deadline: float) -> Json:
        """Run a step. Returns its outcome ("passed", "failed", "not run"), what it said, and its numbers."""
        if deadline - time.monotonic() < 5:
            return {"outcome": "not run", "said": "the time was up"}
        if self.failed_starts >= FAILED_STARTS:
            return {"outcome": "not run", "said": "no process could be started for it"}
        problem = "" if self._is_running() else self._start(min(START_SECONDS, deadline - time.monotonic()))
        if problem:
            self.failed_starts += 1
            self.close()
            return {"outcome": "failed", "said": f"its process did not start: {problem}"}
        began = time.monotonic()
        seconds = min(COMPILE_LIMIT if "compile" in name else LIMITS[kind], deadline - began)
        try:
            answer = self._asked(kind, name, seconds)
        except TimeoutError:
            self.close()
            answer = {"outcome": "failed", "said": f"it took longer than {seconds:.0f} s and was stopped"}
        except (OSError, EOFError):
            answer = {"outcome": "failed", "said": f"its process ended with exit code {self._ended()}"}
        if answer.pop("restart", False):
            self.close()
        return answer | {"seconds": round(time.monotonic() - began, 2)}

    def _is_running(self) -> bool:
        """Return whether there is a process. One that ended after its last answer is cleared away."""
        if self.process is not None and self.process.poll() is not None:
            self.close()
        return self.process is not None

    def _asked(self, kind: str, name: str, seconds: float) -> Json:
        """Ask the process for a step, and return its answer."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, name]) + "\n")
        self.process.stdin.flush()
        return self._answer(seconds)

    def _start(self, seconds: float) -> str:
        """Start the process. Return what went wrong, or an empty string."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        # Deterministic cuBLAS needs its workspace before CUDA starts.
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        # In a session of its own, it can be killed together with the processes that it has started.
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.machine = self._answer(seconds)
        except TimeoutError:
            return f"no answer within {seconds:.0f} s"
        except (OSError, EOFError):
            return f"exit code {self._ended()}"
        return str(self.machine.pop("problem", ""))

    def _answer(self, seconds: float) -> Json:
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            raise TimeoutError
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        answer: Json = json.loads(line)
        return answer

    def _ended(self) -> int | None:
        """Return the exit code of a process that has closed its output, and clear it away."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return self.close()

    def close(self) -> int | None:
        """Kill the process and its children, if there is one. Return its exit code; None if it cannot be killed."""
        if self.process is None:
            return None
        code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs can keep a process alive
            code = self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent words for a process that is gone
                    stream.close()
        self.process = None
        return code


def work(device_name: str, tiny: bool, scratch_root: str) -> None:
    """Be a worker: read the names of steps from stdin, and write a line of JSON for each to stdout."""
    answers = os.fdopen(os.dup(1), "w")  # libraries may print to stdout: they get stderr
    os.dup2(2, 1)
    try:
        import torch

        from benchmarks import gpu_checks, gpu_measurements

        device = torch.device(device_name)
        gpu_measurements.limit_memory(device, MEMORY)
        machine = gpu_measurements.machine(device)
    except Exception as error:  # noqa: BLE001 - a library of this machine may be broken in any way
        _tell(answers, {"problem": f"{type(error).__name__}: {str(error)[:500]}"})
        return
    _tell(answers, machine)
    for line in sys.stdin:
        kind, name = json.loads(line)
        with tempfile.TemporaryDirectory(dir=scratch_root) as scratch:
            place = gpu_checks.Place(device, Path(scratch), steps=4 if tiny else 10, tiny=tiny)
            try:
                if kind == "check":
                    answer: Json = {"outcome": "passed", "said": gpu_checks.run(name, place)}
                else:
                    numbers = gpu_measurements.MEASUREMENTS[name](place)
                    answer = {"outcome": "measured", "said": gpu_measurements.summary(numbers), "numbers": numbers}
            except gpu_checks.NotRunError as error:
                answer = {"outcome": "not run", "said": str(error)}
            except Exception as error:  # noqa: BLE001 - the next steps may still run
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}, line {frame.lineno}"
                answer = {"outcome": "failed", "said": f"{type(error).__name__}: {str(error)[:500]} ({where})"}
        gc.collect()
        _tell(answers, answer | ({} if gpu_measurements.is_well(device) else {"restart": True}))


def write(folder: Path, results: Json) -> None:
    """Write results.json and results.md atomically."""
    from sdkit.atomic import atomic_write

    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", markdown(results))):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def markdown(results: Json) -> str:
    """The results as a document: the machine, checks, measurements, and what could not run."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = ["# sdkit on a GPU", "", machine, "", "| step | outcome | result | seconds |", "|---|---|---|---|"]
    for step in results["steps"]:
        said = step["said"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {step['name']} | {step['outcome']} | {said} | {step.get('seconds', '')} |")
    return "\n".join(lines) + "\n"


def _steps(only: list[str] | None) -> list[tuple[str, str]]:
    """Return the kind and the name of each step: checks, then measurements, then both kinds of steps that compile."""
    from benchmarks import gpu_checks, gpu_measurements

    kinds = {"check": gpu_checks.CHECKS, "measure": gpu_measurements.MEASUREMENTS}
    steps = [(kind, name) for kind, names in kinds.items() for name in names]
    chosen = [(kind, name) for kind, name in steps if only is None or name.startswith(tuple(only))]
    return sorted(chosen, key=lambda step: "compile" in step[1])


def _cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _tell(answers: IO[str], answer: Json) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # Python puts this file's folder there, not the repository's
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3] == "1", sys.argv[4])
    else:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # leave by way of `finally`
        sys.exit(main())
