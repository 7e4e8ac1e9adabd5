"""What a run keeps on disk: its settings, metrics, checkpoints and result."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import filelock

from sdkit import __version__
from sdkit.atomic import atomic_write, remove_leftovers
from sdkit.errors import TrainingError
from sdkit.files import open_regular
from sdkit.messages import clean, reason
from sdkit.strict_json import parse_object, read_object, require
from sdkit.training.checkpoint import Checkpoint, checkpoints, newest, read_state, save, whole_folder
from sdkit.training.settings import LoopSettings

WORDS = {  # of what is not told by its values
    "data_identity": "its data was other (names, captions or sizes of files)",
    "model_identity": "its model was another (weights or noise schedule)",
    "vae_identity": "its VAE was another (weights or scale)",
    "lpips_identity": "its LPIPS had other weights",
    "validation_identity": "its validation data was other (names, captions or sizes of files)",
    "samples_per_step": "its steps took {was} samples, these take {now} (batch_size x gradient_accumulation_steps x "
    "processes, whose product must stay)",
}


LONGEST_LINE = 2**20  # bytes, of metrics
NUMBERS = {int, float, type(None)}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:  # NUL, or letters that no path can hold
        raise OSError(errno.EINVAL, "no folder can have this name", str(folder)) from error


def _is_config(found: Any) -> bool:
    return isinstance(found, dict) and "sdkit" in found and isinstance(found.get("settings"), dict)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; see `metrics_in`."""
    return [entry for _, entry in metrics_in(path)]


def metrics_in(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a metrics.jsonl, one at a time, and what they hold: a step, and a number or None by each other name.
    A line of anything else is left out, as one that was cut short by the end of its process. Raises `OSError`."""
    with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
        while line := file.readline(LONGEST_LINE):
            with contextlib.suppress(ValueError):
                entry = parse_object(line)
                step, values = entry.get("step"), entry.values()
                if type(step) is int and 0 <= step < 2**31 and {type(one) for one in values} <= NUMBERS:
                    yield line, entry


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins: after `step` steps, with that `checkpoint`, having `validated` that step; result/ is of step
    `exported` (-1: none)."""

    step: int
    checkpoint: Path | None
    validated: bool
    exported: int


class RunFolder:
    """A run's folder as the main process holds it, from `open` to `close`: config.json, metrics.jsonl, checkpoints/,
    samples/ and, at the end, result/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.result = path / "result"
        self._lock = filelock.FileLock(path / ".lock", timeout=0)
        self._metrics: IO[str] | None = None
        self._run = ""

    def open(self, settings: LoopSettings, processes: int, identity: Mapping[str, str] | None = None) -> Start:
        """Lock the folder, and make it or see that it holds the run of `settings`, up to the fields that may change,
        with the same `Stage.identity`.

        Raises TrainingError where the folder cannot be written, is in use, or holds anything else.
        """
        per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
        config: dict[str, Any] = {"sdkit": __version__, "stage": type(settings).__name__, "samples_per_step": per_step}
        config |= {f"{name}_identity": value for name, value in (identity or {}).items()}
        config["settings"] = parse_object(json.dumps(asdict(settings), default=str))
        try:
            _make(self.path)
            self._config()  # before anything is written into somebody else's folder
            self._lock.acquire()
            config["run"] = self._run = self._compared(self._config(), config, settings.may_change)
            for folder in (self.path, self.checkpoints, self.path / "samples"):
                remove_leftovers(folder)
            checkpoint = newest(self.checkpoints)
            if checkpoint and read_state(checkpoint).get("run") != self._run:
                raise TrainingError(f"{checkpoint} is of another run; remove it, or name another out_dir.")
            step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
            with atomic_write(self.path / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")
            validated = self._rewind(step if checkpoint else -1)
            for name in ("checkpoints", "samples"):
                (self.path / name).mkdir(exist_ok=True)
        except filelock.Timeout as error:
            raise TrainingError(
                f"another process trains in {self.path}; wait for it, or name another out_dir."
            ) from error
        except OSError as error:
            place = Path(os.fsdecode(error.filename or self.path))
            at = f" ({place.name})" if place.parent == self.path else ""
            raise TrainingError(
                f"cannot train in {self.path}: {reason(error)}{at}; name a folder that can be written."
            ) from error
        return Start(step=step, checkpoint=checkpoint, validated=validated, exported=self._exported())

    def _config(self) -> dict[str, Any] | None:
        """The config.json of the run that is here, if any. Raises TrainingError where there is something else."""
        old: dict[str, Any] | None
        try:
            old = read_object(self.path / "config.json")
        except FileNotFoundError:
            old = None
        except ValueError:
            old = {}
        used = [name for name in ("checkpoints", "samples", "result", "metrics.jsonl") if (self.path / name).exists()]
        if (old is None and used) or (old is not None and not _is_config(old)):
            raise TrainingError(f"{self.path} holds files that are of no run of sdkit; name another out_dir.")
        return old

    def _compared(self, old: dict[str, Any] | None, config: dict[str, Any], may_change: Collection[str]) -> str:
        """The identity of the run that is here or would be, by which it knows its checkpoints. Raises TrainingError
        where it is not the one of `config`."""
        free = {*may_change, "sdkit", "settings"}
        was, now = ({k: v for k, v in {**c["settings"], **c}.items() if k not in free} for c in (old or config, config))
        if not old or not (checkpoints(self.checkpoints) or self.result.exists()):  # there is nothing to lose
            return hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
        for name in sorted(now.keys() & was.keys(), key=lambda name: (name != "stage", name)):
            if was[name] != now[name]:
                values = {"was": clean(repr(was[name])), "now": clean(repr(now[name]))}
                told = WORDS.get(name, f"{name} was {{was}}, is {{now}}").format(**values)
                raise TrainingError(
                    f"{self.path} holds another run: {told}; name another out_dir (only these may change: "
                    f"{', '.join(sorted(may_change))})."
                )
        steps = [one["settings"].get("max_steps") for one in (old, config)]
        if steps[0] != steps[1] and not str(now["lr_scheduler"]).startswith("constant"):
            warnings.warn(
                f"max_steps was {clean(steps[0])}, is {steps[1]}: the {now['lr_scheduler']} learning-rate "
                "schedule now goes on as if it had been so from the start.", stacklevel=2,
            )  # fmt: skip
        return str(old.get("run"))

    def _rewind(self, step: int) -> bool:
        """Drop the metrics of what came after the checkpoint, for it will come again. Returns whether `step` was
        validated."""
        path, validated = self.path / "metrics.jsonl", False
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for line, entry in metrics_in(path):
                if entry["step"] <= step:
                    file.write(line.rstrip(b"\r\n") + b"\n")
                    validated |= entry["step"] == step and any(key.startswith("validation/") for key in entry)
        self._metrics = path.open("a")
        return validated

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self._appending() as metrics:
            metrics.write(json.dumps(line, allow_nan=False) + "\n")
            metrics.flush()

    @contextlib.contextmanager
    def _appending(self) -> Iterator[IO[str]]:
        assert self._metrics is not None
        try:
            yield self._metrics
        except OSError as error:
            raise TrainingError(
                f"cannot write {self._metrics.name}: {reason(error)}; make room and run again."
            ) from error

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint that the metrics on the disk reach up to."""
        with self._appending() as metrics:
            os.fsync(metrics.fileno())
        save(self.checkpoints, replace(checkpoint, state={**checkpoint.state, "run": self._run}), keep)

    def export(self, fill: Callable[[Path], None], step: int) -> None:
        """Make result/ atomically."""
        with whole_folder(self.result) as temporary:
            fill(temporary)
            (temporary / "training.json").write_text(json.dumps({"step": step}))

    def _exported(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            fields = read_object(self.result / "training.json")
            require(fields, {"step": int})
            return int(fields["step"])
        return -1

    def close(self) -> None:
        """Release the folder for other processes."""
        with contextlib.suppress(OSError):  # what a full disk refused was told when it was written
            if self._metrics is not None:
                self._metrics.close()
        self._lock.release()
