"""Prove and measure sdkit on a GPU, in at most eight minutes: python benchmarks/gpu.py, or make gpu.

    python benchmarks/gpu.py --out gpu-results             # checks, then measurements
    python benchmarks/gpu.py --only encode draw train      # steps whose names begin so

Each step has a time limit of its own and runs in a worker process, which is started again if a step hangs or crashes.
Results are written after every step: results.json, and results.md for people. So whatever ran before the time is up, or
before the machine is gone, is kept. Steps that could not run are listed with the reason. Nothing is downloaded. A bare
machine needs CUDA PyTorch. What it lacks of diffusers, transformers, accelerate, peft, and what they need, may be
brought as wheels: `--wheels FOLDER` unpacks them for this run.

Exit code: 0 if every check that could run passed, 1 if one failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0
"""Time in which a worker must have imported its libraries and found its device."""
LIMITS = {"check": 60.0, "measure": 150.0}
"""Time limit of a step, in seconds, by its kind."""


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
        if args.wheels:
            use_wheels(args.wheels, site)
        return start(args)


def use_wheels(folder: Path, site: str) -> None:
    """Install wheels into the folder `site`, and let this process and its children import from it."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH", ""))))


def start(args: argparse.Namespace) -> int:
    """List the steps or run them. Returns the exit code."""
    if args.list:
        print(*(f"{kind} {name}" for kind, name in _steps(None)), sep="\n")
        return 0
    if args.device != "cpu" and not _cuda():
        print("There is no GPU that PyTorch can use here; run this on a machine with one.", file=sys.stderr)
        return 2
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Run the chosen steps in turn, and write the results after each."""
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    results: Json = {"machine": {}, "steps": []}
    worker = Worker(args.device, args.tiny)
    try:
        for kind, name in _steps(args.only):
            left = deadline - time.monotonic()
            if left < 5:
                result: Json = {"outcome": "not run", "said": "the time was up"}
            else:
                result = worker.do(kind, name, min(left, LIMITS[kind]))
                results["machine"] = worker.machine or results["machine"]
            results["steps"].append({"kind": kind, "name": name, **result})
            write(args.out, results)
            print(f"{result['outcome']:8} {name}: {result['said']}", flush=True)
    finally:
        worker.close()
        worker.scratch.cleanup()
    failed = [step["name"] for step in results["steps"] if step["outcome"] == "failed"]
    print(f"{len(results['steps'])} steps, {len(failed)} failed; see {args.out / 'results.md'}.")
    return 1 if failed else 0


class Worker:
    """A process that runs steps one after another. It is started at the first step, and again after one that hung.

    Attributes:
        machine: Names of the card and of the libraries, once the process has told them.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        self.scratch = tempfile.TemporaryDirectory()  # outlives the process, which may have to be killed
        self.command = [sys.executable, str(Path(__file__).resolve()), "--worker", device, str(int(tiny))]
        self.command.append(self.scratch.name)
        self.process: subprocess.Popen[str] | None = None
        self.machine: Json = {}

    def do(self, kind: str, name: str, seconds: float) -> Json:
        """Run a step. Returns its outcome ("passed", "failed", "not run"), what it said, and its numbers."""
        began = time.monotonic()
        try:
            if self.process is None:
                self._start()
            process = self.process
            assert process is not None
            assert process.stdin is not None
            process.stdin.write(json.dumps([kind, name]) + "\n")
            process.stdin.flush()
            answer = self._answer(seconds)
        except TimeoutError:
            self.close()
            answer = {"outcome": "failed", "said": f"it took longer than {seconds:.0f} s and was stopped"}
        except (OSError, EOFError):
            code = self.close()
            answer = {"outcome": "failed", "said": f"its process ended with exit code {code}"}
        return answer | {"seconds": round(time.monotonic() - began, 2)}

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        # Deterministic cuBLAS needs its workspace before CUDA starts.
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.machine = self._answer(START_SECONDS)

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

    def close(self) -> int | None:
        """Kill the process, if there is one, and return its exit code."""
        if self.process is None:
            return None
        self.process.kill()
        code = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process = None
        return code


def work(device_name: str, tiny: bool, scratch_root: str) -> None:
    """Be a worker: read the names of steps from stdin, and write a line of JSON for each to stdout."""
    answers = os.fdopen(os.dup(1), "w")  # libraries may print to stdout: they get stderr
    os.dup2(2, 1)
    import torch

    from benchmarks import gpu_checks, gpu_measurements

    device = torch.device(device_name)
    _tell(answers, gpu_measurements.machine(device))
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
                where = traceback.format_exc().splitlines()[-3].strip()
                answer = {"outcome": "failed", "said": f"{type(error).__name__}: {str(error)[:500]} ({where})"}
        _tell(answers, answer)


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


def _steps(only: list[str] | None) -> Iterator[tuple[str, str]]:
    """Yield the kind and the name of each step, checks first."""
    from benchmarks import gpu_checks, gpu_measurements

    for kind, names in (("check", gpu_checks.CHECKS), ("measure", gpu_measurements.MEASUREMENTS)):
        yield from ((kind, name) for name in names if only is None or name.startswith(tuple(only)))


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
        sys.exit(main())
