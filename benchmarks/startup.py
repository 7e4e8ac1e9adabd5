"""Measure the start-up time of `import sdkit` and of `sdkit --help`, compared with a Python that does nothing.

    python benchmarks/startup.py
    python benchmarks/startup.py --runs 20

Each time is the best of several runs. The commands take turns, so that a busy moment of the computer affects them all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import sdkit": ["-c", "import sdkit"],
    "sdkit --help": ["-m", "sdkit", "--help"],
}


def seconds(arguments: list[str]) -> float:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", type=int, default=10, help="number of runs; the best one counts (default: %(default)s)"
    )
    runs = parser.parse_args().runs
    times = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(runs)]
    best = {name: min(turn[name] for turn in times) for name in COMMANDS}
    for name, took in best.items():
        print(f"{name:<16} {took * 1000:6.0f} ms   x {took / best['python -c pass']:.2f}")


if __name__ == "__main__":
    main()
