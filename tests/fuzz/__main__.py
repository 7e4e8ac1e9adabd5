"""Read damaged files, and print each case that ends with anything but a result or an `SdkitError`.

    python -m tests.fuzz                                    1,000 cases over all targets
    python -m tests.fuzz --target tar --seed 57             one case, as named in a failure
    python -m tests.fuzz --target tar --seed 3 --count 500  seeds 3 to 502 of one target
    python -m tests.fuzz --target tar --seed 57 --keep DIR  also save the damaged input in DIR
    python -m tests.fuzz --valid                            the undamaged inputs, which must give results

A case depends only on its target and seed. It is read in a separate process. That process may not use more than 1 GB of
memory or 5 s of CPU time, write outside its output folder, start a process, open a connection, or run code from the
input.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import Failure, Worker, cases
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="kind of input (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--count", type=int, help="cases (default: 1 of one target, 1,000 of all)")
    parser.add_argument("--keep", type=Path, help="copy the damaged input into this folder")
    parser.add_argument("--valid", action="store_true", help="read what is not damaged")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    count = args.count or (1 if args.target else 1000)
    found, done = list[Failure](), 0
    causes = Counter[tuple[str, str]]()
    asked = [(name, None) for name in names] if args.valid else cases(names, args.seed, count)
    with Worker() as worker:
        for target, seed in asked:
            done += 1
            if failure := worker.ask(target, seed, args.keep):
                found.append(failure)
                causes[failure.cause] += 1
                print(failure, flush=True)
    print(f"{done} cases, {len(found)} failures of {len(causes)} causes")
    for (where, problem), number in causes.most_common():
        print(f"{number:6}  {problem}  {where}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
