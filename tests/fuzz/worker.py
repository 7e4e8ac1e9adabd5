"""A process that reads damaged files, one case for each line of its input, and reports what went wrong.

`python -m tests.fuzz.worker FOLDER` reads lines of JSON, {"target": ..., "seed": ...}. It answers each with two lines:
before it reads the case, {"what": what is damaged}; then {"problem": null or a sentence, "where": the lines of sdkit
that were reached}. `harness.Worker` starts and supervises it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

SECONDS, BYTES = 5, 10**9
"""CPU time in seconds and growth of memory in bytes that reading one damaged file may take."""

PATHS = {  # audit events that change the disk, and which of their arguments are paths
    "os.remove": (0,), "os.rename": (0, 1), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.chmod": (0,), "os.chown": (0,), "os.truncate": (0,), "os.utime": (0,), "os.setxattr": (0,),
    "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,), "shutil.unpack_archive": (1,),
    "shutil.copytree": (1,),
}  # fmt: skip
FORBIDDEN = {
    "subprocess.Popen": "starts a process", "os.system": "starts a process", "os.exec": "starts a process",
    "os.posix_spawn": "starts a process", "os.spawn": "starts a process", "os.fork": "starts a process",
    "os.forkpty": "starts a process", "pty.spawn": "starts a process", "os.startfile": "starts a process",
    "socket.connect": "connects", "socket.getaddrinfo": "connects", "socket.gethostbyname": "connects",
    "socket.sendto": "connects", "socket.bind": "connects", "urllib.Request": "connects", "webbrowser.open": "connects",
    "pickle.find_class": "unpickles objects", "ctypes.dlopen": "loads a library",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """Raised by the audit hook on a forbidden event. It is a BaseException, so that `except Exception` lets it pass."""


class Watch:
    """An audit hook. While `roots` is set, it forbids writing elsewhere, starting processes, connecting, and running
    code.
    """

    def __init__(self) -> None:
        self.roots: list[str] | None = None
        self.inputs = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.roots is None:
            return
        if event in FORBIDDEN:
            self._refuse(f"{FORBIDDEN[event]} ({event} {str(args)[:200]})")
        elif event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITING and not isinstance(path, int):
                self._check(event, path, -1)
        elif event in PATHS:
            folder = next((arg for arg in args[len(PATHS[event]) :] if type(arg) is int and arg > 2), -1)
            for i in PATHS[event]:
                self._check(
                    event, args[i], folder if event in ("os.remove", "os.rmdir", "os.mkdir", "os.rename") else -1
                )
        elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(self.inputs):
            self._refuse(f"runs code that lies in the input ({args[0].co_filename})")

    def _check(self, event: str, path: Any, folder: int) -> None:
        if isinstance(path, int):
            return
        roots, self.roots = self.roots or [], None  # events during the check are the harness's own
        try:
            place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - a link itself is what is removed
            if folder > 2 and not os.path.isabs(os.fsdecode(path)):  # noqa: PTH117
                place = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))  # noqa: PTH115, PTH118
            real = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))  # noqa: PTH118, PTH119, PTH120
            real = os.path.realpath(real) if event == "open" else real
            allowed = real == os.devnull or any(f"{real}/".startswith(f"{root}/") for root in roots)
            allowed |= event in ("os.remove", "os.rmdir") and not os.path.lexists(place)
        finally:
            self.roots = roots
        if not allowed:
            self._refuse(f"writes outside of its folder ({event} {place[:200]})")

    def _refuse(self, problem: str) -> None:
        self.seen.append(problem)
        raise Forbidden(problem)


class Cases:
    """Makes the cases of all targets below one folder, and reads them."""

    def __init__(self, root: Path, tell: Callable[[dict[str, Any]], None] = lambda answer: None) -> None:
        from tests.fuzz import targets

        self.targets, self.tell = targets, tell
        targets.set_home(root / "valid")
        self.case, self.out, self.home = root / "case", root / "out", Path(os.environ["HF_HOME"]).parent
        self.watch = Watch()
        self.warm: set[str] = set()

    def run(self, name: str, seed: int, keep: str | None = None) -> dict[str, Any]:
        """Make a case and read it."""
        from tests.fuzz import mutators

        target = self.targets.TARGETS[name]
        valid = self.targets.valid(target)
        self._warm_up(target, valid)
        self._fresh(valid)
        rng = Random(f"{name} {seed}")
        what = mutators.damage(self.case, target.damageable(self.case), rng)
        if rng.random() < 0.9:
            target.repair(self.case)
        if keep:
            shutil.copytree(self.case, keep, symlinks=True, dirs_exist_ok=True)
        self.tell({"what": what})
        problem, where = self._read(target)
        return {"problem": problem, "where": where}

    def check_valid(self, name: str) -> dict[str, Any]:
        """Read the undamaged input of a target, which must give a result."""
        target = self.targets.TARGETS[name]
        valid = self.targets.valid(target)
        self._warm_up(target, valid)
        self._fresh(valid)
        problem, where = self._read(target, accept_errors=False)
        return {"problem": problem, "where": where}

    def _warm_up(self, target: Any, valid: Path) -> None:
        """Read the valid input once, so that the imports and set-up of the first read do not count for a case."""
        if target.name not in self.warm:
            self._fresh(valid)
            with contextlib.suppress(Exception):  # `check_valid` reports a valid input that fails
                target.read(self.case, self.out)
            self.warm.add(target.name)

    def _fresh(self, valid: Path) -> None:
        from tests.fuzz.mutators import copy_of

        copy_of(valid, self.case)
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        shutil.rmtree(self.home / "hf" / "datasets", ignore_errors=True)

    def _read(self, target: Any, accept_errors: bool = True) -> tuple[str | None, str]:
        """Return the first problem and the lines of sdkit where it occurred, or (None, "")."""
        import torch

        from sdkit.errors import SdkitError

        problem, where = None, ""
        place = os.getcwd()  # noqa: PTH109
        self.watch.seen.clear()
        self.watch.inputs = str(self.case)
        roots = [self.out, self.home, *([self.case] if target.writes_input else [])]
        before, began = _peak(reset=True), time.process_time()
        self.watch.roots = [os.path.realpath(root) for root in roots]
        try:
            target.read(self.case, self.out)
        except SdkitError as error:
            message = str(error)
            if not accept_errors:
                problem, where = f"refused: {message}", _where(error)
            elif not message.strip() or "\n" in message or len(message) > 1100:
                problem, where = f"not one sentence: {message!r:.400}", _where(error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            self.watch.roots = None
            problem, where = f"{type(error).__name__}: {str(error)[:300]}", _where(error)
        finally:
            self.watch.roots = None
        seconds, grown = time.process_time() - began, _peak() - before
        if self.watch.seen:
            problem = self.watch.seen[0]
        elif problem is None and seconds > SECONDS:
            problem = f"takes {seconds:.1f} s"
        elif problem is None and grown > BYTES:
            problem = f"takes {grown / 1e9:.1f} GB"
        elif problem is None and torch.get_default_dtype() != torch.float32:
            problem = f"leaves torch's default dtype {torch.get_default_dtype()}"
            torch.set_default_dtype(torch.float32)
        elif problem is None and os.getcwd() != place:  # noqa: PTH109
            problem = "leaves another working folder"
        elif problem is None and (left := [*self.out.rglob(".sdkit-*")]):
            problem = f"leaves {left[0].name}"
        os.chdir(place)
        return problem, where


def _where(error: BaseException) -> str:
    """Return the last two lines of sdkit in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sdkit/" in frame.filename and "/site-packages/" not in frame.filename]
    return " > ".join(f"{frame.filename.rpartition('/sdkit/')[2]}:{frame.lineno}" for frame in ours[-2:])


def _peak(reset: bool = False) -> int:
    """Return the peak memory of this process since the last reset, in bytes; 0 if it is unknown."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")  # discard what the commands print
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the harness sends this signal before it kills a process that hangs
    warnings.simplefilter("ignore")
    import torch

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    torch.set_num_threads(1)
    cases = Cases(Path(sys.argv[1]), tell)
    tell({"ready": os.getpid()})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["seed"] is None:
                answer = cases.check_valid(asked["target"])
            else:
                answer = cases.run(asked["target"], asked["seed"], asked.get("keep"))
        except BaseException:  # noqa: BLE001 - ours, then
            answer = {"problem": f"the harness failed: {traceback.format_exc()[-1500:]}", "where": ""}
        tell(answer)


if __name__ == "__main__":
    serve()
