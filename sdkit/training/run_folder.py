"""The folder of a run: its settings, metrics, checkpoints, and result."""

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
from sdkit.atomic import atomic_write, remove_leftovers, whole_folder
from sdkit.errors import TrainingError
from sdkit.files import open_regular
from sdkit.messages import clean, reason
from sdkit.strict_json import parse_object, read_object, require
from sdkit.training.checkpoint import Checkpoint, checkpoints, newest, read_state, save
from sdkit.training.settings import DenoisingSettings, LoopSettings

DIFFERENCES = {  # setting -> description of the difference, where the two values alone would not explain it
    "data_identity": "its data was different (names, captions, or sizes of files)",
    "model_identity": "its model was different (weights or noise schedule)",
    "vae_identity": "its VAE was different (weights or scale)",
    "lpips_backbone_identity": "its LPIPS was the network {was}, this is {now} (give lpips= or --lpips as it was)",
    "lpips_identity": "its LPIPS had different weights (see lpips in its config.json)",
    "validation_identity": "its validation data was different (names, captions, or sizes of files)",
    "classes_identity": "its classes were different (names or order)",
    "contrast_identity": "its contrast was over {was} pairs, this is over {now} (batch_size x processes, whose product "
    "must stay)",
    "samples_per_step": "its steps took {was} samples, these take {now} (batch_size x gradient_accumulation_steps x "
    "processes, whose product must stay)",
}


def _difference(name: str) -> str:
    """Return the sentence for a difference between two runs that `DIFFERENCES` lacks."""
    if name.endswith("_identity"):  # a fingerprint, which tells a reader nothing
        return f"its {name.removesuffix('_identity').replace('_', ' ')} was different (by its fingerprint)"
    return f"{name} was {{was}}, is {{now}}"


LONGEST_LINE = 2**20  # largest length, in bytes, of a line of metrics.jsonl
METRIC_TYPES = {int, float, type(None)}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:  # the name holds NUL, or characters that no path can hold
        raise OSError(errno.EINVAL, "no folder can have this name", str(folder)) from error


def _is_config(found: Any) -> bool:
    return isinstance(found, dict) and "sdkit" in found and isinstance(found.get("settings"), dict)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics.jsonl as a list; see `metrics_in`."""
    return [entry for _, entry in metrics_in(path)]


def metrics_in(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a metrics.jsonl with its entry: a step, and a number or None for each metric.

    Malformed lines are ignored, such as one that was cut short when its process ended.

    Args:
        path: The file. A missing file has no lines.

    Raises:
        OSError: The file cannot be read.
    """
    with contextlib.suppress(FileNotFoundError), open_regular(path) as file:
        while line := file.readline(LONGEST_LINE):
            with contextlib.suppress(ValueError):
                entry = parse_object(line)
                step, values = entry.get("step"), entry.values()
                if type(step) is int and 0 <= step < 2**31 and {type(value) for value in values} <= METRIC_TYPES:
                    yield line, entry


def _warn_of_repeats(config: Mapping[str, Any]) -> None:
    """Warn if a denoising run continues from the result of another run, on the same data with the same seed."""
    settings = config["settings"]
    model, earlier = Path(str(settings.get("model") or "")), dict[str, Any]()
    with contextlib.suppress(OSError, ValueError):
        earlier = read_object(model.parent / "config.json") if model.name == "result" else {}
    if (
        _is_config(earlier)
        and earlier.get("data_identity") == config.get("data_identity")
        and earlier["settings"].get("seed") == settings["seed"]
    ):
        warnings.warn(
            f"{clean(model)} was trained on this data with seed {settings['seed']}: the same images would come in the "
            "same order with the same noise again, which would be learned by heart; give another seed.", stacklevel=2,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Start:
    """State of a run folder when it is opened.

    Attributes:
        step: Number of optimizer steps made.
        checkpoint: The checkpoint to resume from; None for a new run.
        validated: Whether metrics.jsonl has validation metrics of this step.
        exported: Step of the result in result/; -1 if there is none.
    """

    step: int
    checkpoint: Path | None
    validated: bool
    exported: int


class RunFolder:
    """The folder of a run, locked by the main process from `open` to `close`.

    It holds config.json, metrics.jsonl, checkpoints/, samples/, and, at the end of the run, result/.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        checkpoints: Its folder of checkpoints.
        result: Its folder of the exported result.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.result = path / "result"
        self._lock = filelock.FileLock(path / ".lock", timeout=0)
        self._metrics: IO[str] | None = None
        self._run = ""

    def open(self, settings: LoopSettings, processes: int, identity: Mapping[str, str] | None = None) -> Start:
        """Lock the folder. Make it, or check that it holds the run to resume.

        Args:
            settings: Settings of the run. They must equal those in config.json, except the fields that may change.
            processes: Number of processes.
            identity: Fingerprints of the data and the model; see `Stage.identity`. They must equal those in
                config.json.

        Returns:
            The state from which the run starts.

        Raises:
            TrainingError: The folder cannot be written, is in use, or holds another run or other files.
        """
        per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
        config: dict[str, Any] = {"sdkit": __version__, "stage": type(settings).__name__, "samples_per_step": per_step}
        config |= {f"{name}_identity": value for name, value in (identity or {}).items()}
        config["settings"] = parse_object(json.dumps(asdict(settings), default=str))
        try:
            _make(self.path)
            self._read_config()  # refuse a foreign folder before the lock file is written into it
            self._lock.acquire()
            config["run"] = self._run = self._check_same_run(self._read_config(), config, settings.may_change)
            for folder in (self.path, self.checkpoints, self.path / "samples"):
                remove_leftovers(folder)
            checkpoint = newest(self.checkpoints)
            if checkpoint and read_state(checkpoint).get("run") != self._run:
                raise TrainingError(f"{checkpoint} is of another run; remove it, or name another out_dir.")
            step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
            if checkpoint is None and isinstance(settings, DenoisingSettings):
                _warn_of_repeats(config)
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

    def _read_config(self) -> dict[str, Any] | None:
        """Return the config.json of the run in this folder, or None if there is no run.

        Raises:
            TrainingError: The folder holds files that do not belong to a run.
        """
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

    def _check_same_run(self, old: dict[str, Any] | None, config: dict[str, Any], may_change: Collection[str]) -> str:
        """Check that `config` describes the run in this folder, if any, and return the run's identity.

        Each checkpoint carries this identity, so that a checkpoint of another run is recognised.

        Args:
            old: The config.json of the run in this folder.
            config: The config.json that would be written.
            may_change: Names of settings that may differ.

        Raises:
            TrainingError: The folder holds another run.
        """
        ignored = {*may_change, "sdkit", "settings"}
        was, now = (
            {key: value for key, value in {**each["settings"], **each}.items() if key not in ignored}
            for each in (old or config, config)
        )
        if not old or not (checkpoints(self.checkpoints) or self.result.exists()):  # a new run: nothing to overwrite
            return hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
        for name in sorted(now.keys() & was.keys(), key=lambda name: (name != "stage", name)):
            if was[name] != now[name]:
                values = {"was": clean(repr(was[name])), "now": clean(repr(now[name]))}
                difference = DIFFERENCES.get(name, _difference(name)).format(**values)
                raise TrainingError(
                    f"{self.path} holds another run: {difference}; name another out_dir (only these may change: "
                    f"{', '.join(sorted(may_change))})."
                )
        old_steps, new_steps = (each["settings"].get("max_steps") for each in (old, config))
        if old_steps != new_steps and not str(now["lr_scheduler"]).startswith("constant"):
            warnings.warn(
                f"max_steps was {clean(old_steps)}, is {new_steps}: the {now['lr_scheduler']} learning-rate "
                "schedule now goes on as if it had been so from the start.", stacklevel=2,
            )  # fmt: skip
        return str(old.get("run"))

    def _rewind(self, step: int) -> bool:
        """Drop the metrics of steps after `step`, which will be made again. Return whether `step` was validated."""
        path, validated = self.path / "metrics.jsonl", False
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for line, entry in metrics_in(path):
                if entry["step"] <= step:
                    file.write(line.rstrip(b"\r\n") + b"\n")
                    validated |= entry["step"] == step and any(key.startswith("validation/") for key in entry)
        self._metrics = path.open("a")
        return validated

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line of metrics to metrics.jsonl.

        Raises:
            TrainingError: The line cannot be written.
        """
        with self._appending() as metrics:
            metrics.write(json.dumps(line, allow_nan=False) + "\n")
            metrics.flush()

    @contextlib.contextmanager
    def _appending(self) -> Iterator[IO[str]]:
        """Yield the open metrics.jsonl, and turn an OSError of the body into a TrainingError."""
        assert self._metrics is not None
        try:
            yield self._metrics
        except OSError as error:
            raise TrainingError(
                f"cannot write {self._metrics.name}: {reason(error)}; make room and run again."
            ) from error

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Flush the metrics to disk (fsync). Then write a checkpoint, and keep only the last `keep` checkpoints.

        Raises:
            TrainingError: The metrics or the checkpoint cannot be written.
        """
        with self._appending() as metrics:
            os.fsync(metrics.fileno())
        save(self.checkpoints, replace(checkpoint, state={**checkpoint.state, "run": self._run}), keep)

    def export(self, fill: Callable[[Path], None], step: int) -> None:
        """Write result/ atomically.

        Args:
            fill: Writes the result into an empty folder.
            step: Optimizer step of the result.

        Raises:
            TrainingError: The result cannot be written.
        """
        with whole_folder(self.result, TrainingError) as temporary:
            fill(temporary)
            (temporary / "training.json").write_text(json.dumps({"step": step}))

    def _exported(self) -> int:
        """Return the step of the result in result/, or -1 if there is none."""
        with contextlib.suppress(OSError, ValueError):
            fields = read_object(self.result / "training.json")
            require(fields, {"step": int})
            return int(fields["step"])
        return -1

    def close(self) -> None:
        """Release the folder for other processes."""
        with contextlib.suppress(OSError):  # a full disk raised an error already when the line was written
            if self._metrics is not None:
                self._metrics.close()
        self._lock.release()
