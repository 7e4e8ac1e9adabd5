"""What a run keeps on disk: its folder, settings and metrics, and checkpoints of safetensors and JSON.

A checkpoint is a folder, written beside its place and renamed when it is whole, with the SHA-256 of each of its files.
Nothing in it can execute code when it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import filelock
import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdkit import __version__
from sdkit.errors import SdkitError, TrainingError
from sdkit.files import atomic_write
from sdkit.training import LoopSettings, Trained
from sdkit.training.sharding import is_sharded, split_as, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"
STATE = "state.json"
Tensors = Mapping[str, Tensor]


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` for the body to fill; it becomes `path` when the body ends well.

    Whoever reads `path` sees no folder, the old one, or the whole new one, also after a power cut. Whatever ends the
    body early removes the temporary folder. An `OSError` (a full disk) is raised as a TrainingError.
    """
    temporary = _beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():  # safetensors writes what nobody else may read
                inside.chmod(temporary.stat().st_mode & 0o666)
            _sync(inside)
        _sync(temporary)
        old = path.rename(_beside(path)) if path.exists() else None  # a folder cannot be renamed onto another
        temporary.rename(path)
        _sync(path.parent)
        if old:
            shutil.rmtree(old)
    except (OSError, SafetensorError, SdkitError) as error:
        cause = error.__cause__ if isinstance(error, SdkitError) else error  # what it names is not there any more
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = getattr(cause, "strerror", None) or str(cause)
        raise TrainingError(
            f"cannot write {path}: {reason.lower()}; earlier checkpoints are untouched, so make room and run again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that nobody looks at, and that `RunFolder.open` removes."""
    return path.parent / f".sdkit-{secrets.token_hex(8)}"


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows can open no folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`tensors`: by file, then by name; `state`: what JSON holds; both as they were after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `root`/step-N and, once it is whole, remove all but the last `keep` up to step N, and those beyond it (of
    a run that was taken up again from before them). Raises TrainingError where it cannot be written."""
    folder = root / f"step-{checkpoint.step:08d}"
    with whole_folder(folder) as temporary:
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}))
        sums = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"step": checkpoint.step, "sha256": sums}, indent=1))
    kept = [path for path in checkpoints(root) if path.name <= folder.name][:keep]
    for path in checkpoints(root):
        if path not in kept:
            shutil.rmtree(path.rename(_beside(path)))  # no part of it is ever seen under its name
    return folder


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint that `newest` found whole."""
    state = json.loads((folder / STATE).read_text())
    tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints in `root`, damaged ones too, the newest first."""
    return sorted(root.glob("step-*"), reverse=True)


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is whole, None where there is none at all. A damaged one is passed over with a
    warning; raises TrainingError where all are damaged."""
    found = checkpoints(root)
    for folder in found:
        damage = _damage(folder)
        if not damage:
            return folder
        warnings.warn(f"checkpoint {folder} is damaged ({damage}); the one before it is used.", stacklevel=2)
    if found:
        raise TrainingError(f"every checkpoint in {root} is damaged; remove that folder to begin the run again.")
    return None


def _damage(folder: Path) -> str:
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
        wrong = [name for name, checksum in sums.items() if _sha256(folder / name) != checksum]
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return f"the checksum of {wrong[0]} is wrong" if wrong else ""


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def snapshot(trained: Sequence[Trained], accelerator: Accelerator, step: int, skipped: Sequence[int]) -> Checkpoint:
    """All that the next step depends on. The tensors are not copied. To be called on every process."""
    rng = gather_object([rng_state(accelerator.device)])
    tensors: dict[str, Tensors] = {"rng": {f"{i}/{name}": v for i, own in enumerate(rng) for name, v in own.items()}}
    numbers = {}
    for t in trained:
        name = t.player.name
        tensors[name] = _network_tensors(t.player.network)
        state = {f"{n}/{entry}": v for n, p in _named(t) for entry, v in t.optimizer.state.get(p, {}).items()}
        tensors[f"{name}.optimizer"] = {key: v for key, v in state.items() if isinstance(v, Tensor)}
        numbers[name] = {key: v for key, v in state.items() if not isinstance(v, Tensor)}  # as 8-bit AdamW's step
        if t.ema:
            tensors[f"{name}.ema"] = t.ema.state_dict()
    if is_sharded(accelerator):
        tensors = {file: _gathered(parts, accelerator) for file, parts in tensors.items()}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    return Checkpoint(step=step, tensors=tensors, state={"skipped": skipped, "scaler": scaler, "optimizer": numbers})


def restore(trained: Sequence[Trained], accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Bring players and this process to where `snapshot` found them."""
    if checkpoint.tensors.keys() != _files(trained):
        raise TrainingError("the checkpoint is of other networks than those in training; name another out_dir.")
    for t in trained:
        name = t.player.name
        _restore_network(t.player.network, checkpoint.tensors[name])
        _restore_optimizer(t, {**checkpoint.tensors[f"{name}.optimizer"], **checkpoint.state["optimizer"][name]})
        if t.ema:
            own = t.ema.state_dict()
            t.ema.load_state_dict({n: split_as(v, own.get(n, v)) for n, v in checkpoint.tensors[f"{name}.ema"].items()})
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    mine = f"{accelerator.process_index}/"
    rng = {key.removeprefix(mine): v for key, v in checkpoint.tensors["rng"].items() if key.startswith(mine)}
    if rng:  # more processes than before begin with a seed of their own
        set_rng_state(rng, accelerator.device)


def _files(trained: Sequence[Trained]) -> set[str]:
    names = {t.player.name for t in trained}
    return {"rng", *names, *(f"{n}.optimizer" for n in names), *(f"{t.player.name}.ema" for t in trained if t.ema)}


def _gathered(tensors: Tensors, accelerator: Accelerator) -> Tensors:
    """All of each tensor, on the CPU of the main process; nothing on the others."""
    every = ((name, whole(value)) for name, value in tensors.items())
    return {name: value.cpu() for name, value in every if accelerator.is_main_process}


def _named(trained: Trained) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in trained.player.network.named_parameters() if p.requires_grad]


def _network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """What training changes in a network: its trainable parameters, and its buffers."""
    state = network.state_dict()  # of the buffers, only those that a network's file holds are in it
    names = [n for n, p in network.named_parameters() if p.requires_grad] + [n for n, _ in network.named_buffers()]
    return {name: state[name] for name in names if name in state}


@torch.no_grad()
def _restore_network(network: nn.Module, tensors: Tensors) -> None:
    present = _network_tensors(network)
    if {n: value.shape for n, value in present.items()} != {n: value.shape for n, value in tensors.items()}:
        raise TrainingError("the checkpoint is of other parameters than those in training; name another out_dir.")
    for name, value in present.items():
        value.copy_(split_as(tensors[name], value))


def _restore_optimizer(trained: Trained, state: Mapping[str, Any]) -> None:
    """The optimizer's learning rate and other settings stay its own."""
    parameters = dict(_named(trained))
    numbers = {p: i for i, p in enumerate(p for group in trained.optimizer.param_groups for p in group["params"])}
    numbered: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        name, entry = key.rsplit("/", 1)
        p = parameters[name]
        split = isinstance(value, Tensor) and value.shape == p.shape
        numbered.setdefault(numbers[p], {})[entry] = split_as(value, p) if split else value
    settings = trained.optimizer.state_dict()["param_groups"]
    trained.optimizer.load_state_dict({"state": numbered, "param_groups": settings})
    for p, entries in trained.optimizer.state.items():
        for entry, value in entries.items():  # in the parameter's memory format, without which each step is slower
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                entries[entry] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This process's global random number generators: Python's, NumPy's, PyTorch's on the CPU and on its GPU."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - whoever uses it has it restored
    state = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.append(np.asarray(keys), [position, has_gauss]).astype(np.int64)),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: Tensors, device: torch.device) -> None:
    """Set this process's generators to what `rng_state` gave."""
    random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_gauss"].tolist()), None)))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item())
    )
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that was cut short by the end of its process is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "step" in entry:
                lines.append(entry)
    return lines


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

    def open(self, settings: LoopSettings, processes: int) -> Start:
        """Lock the folder, and make it or see that it holds the run of `settings`, up to the fields that may change.

        Raises TrainingError where the folder cannot be written, is in use, or holds anything else.
        """
        per_step = settings.batch_size * settings.gradient_accumulation_steps * processes
        config = {"sdkit": __version__, "stage": type(settings).__name__, "samples_per_step": per_step}
        config["settings"] = json.loads(json.dumps(asdict(settings), default=str))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check(config, settings.may_change)  # before anything is written into somebody else's folder
            self._lock.acquire()
            config["run"] = self._run = self._check(config, settings.may_change)
            for folder in (self.path, self.checkpoints, self.path / "samples"):
                for unfinished in folder.glob(".sdkit-*"):  # of a process that was killed
                    shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
            checkpoint = newest(self.checkpoints)
            if checkpoint and json.loads((checkpoint / STATE).read_text()).get("run") != self._run:
                raise TrainingError(f"{checkpoint} is of another run; remove it, or name another out_dir.")
            step = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
            with atomic_write(self.path / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")
            lines = self._rewind(step if checkpoint else -1)
            for name in ("checkpoints", "samples"):
                (self.path / name).mkdir(exist_ok=True)
        except filelock.Timeout as error:
            raise TrainingError(
                f"another process trains in {self.path}; wait for it, or name another out_dir."
            ) from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TrainingError(f"cannot train in {self.path}: {reason}; name a folder that can be written.") from error
        validated = any(key.startswith("validation/") for line in lines if line["step"] == step for key in line)
        return Start(step=step, checkpoint=checkpoint, validated=validated, exported=self._exported())

    def _check(self, config: Mapping[str, Any], may_change: Collection[str]) -> str:
        """The identity of the run that is here or would be, by which it knows its checkpoints."""
        try:
            old = json.loads((self.path / "config.json").read_text())
        except FileNotFoundError:
            old = None
        except ValueError:
            old = {}
        used = [name for name in ("checkpoints", "samples", "result", "metrics.jsonl") if (self.path / name).exists()]
        if (old is None and used) or (old is not None and (not isinstance(old, dict) or "sdkit" not in old)):
            raise TrainingError(f"{self.path} holds files that are of no run of sdkit; name another out_dir.")
        free = {*may_change, "sdkit", "settings"}
        was, now = ({k: v for k, v in {**c["settings"], **c}.items() if k not in free} for c in (old or config, config))
        if not old or not checkpoints(self.checkpoints):  # there is nothing to lose
            return hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
        for name in sorted(now.keys() & was.keys()):
            if was[name] != now[name]:
                raise TrainingError(
                    f"{self.path} holds another run: {name} was {was[name]!r}, is {now[name]!r}; name another "
                    f"out_dir (only these may change: {', '.join(sorted(may_change))})."
                )
        return str(old.get("run"))

    def _rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the metrics of what came after the checkpoint, for it will come again."""
        path = self.path / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._metrics = path.open("a")
        return lines

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
            self._metrics.flush()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TrainingError(f"cannot write {self._metrics.name}: {reason}; make room and run again.") from error

    def save(self, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint that the metrics on the disk reach up to."""
        assert self._metrics is not None
        os.fsync(self._metrics.fileno())
        save(self.checkpoints, replace(checkpoint, state={**checkpoint.state, "run": self._run}), keep)

    def export(self, fill: Callable[[Path], None], step: int) -> None:
        """Make result/, whole or not at all."""
        with whole_folder(self.result) as temporary:
            fill(temporary)
            (temporary / "training.json").write_text(json.dumps({"step": step}))

    def _exported(self) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((self.result / "training.json").read_text())["step"])
        return -1

    def close(self) -> None:
        """Let other processes have the folder."""
        with contextlib.suppress(OSError):  # what a full disk refused was told when it was written
            if self._metrics is not None:
                self._metrics.close()
        self._lock.release()
