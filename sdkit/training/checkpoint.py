"""Checkpoints of safetensors and JSON, written atomically, from which a run resumes bit-identically.

A checkpoint is a folder, written beside its place and renamed when it is whole, with the SHA-256 of each of its files.
Nothing in it can execute code when it is loaded, and nothing is restored that this run could not have written: an
optimizer's kernels read and write as many values as the parameter has, whatever the size of its state.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdkit.atomic import beside, sync
from sdkit.errors import SdkitError, TrainingError
from sdkit.files import sha256
from sdkit.messages import clean, reason
from sdkit.strict_json import read_object, require
from sdkit.training.distributed import full_tensor, is_sharded, split_as
from sdkit.training.prepared import PreparedPlayer

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-\d{8}")
NOT_A_FILE = (errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EFBIG)  # where something else lies in its place
Tensors = Mapping[str, Tensor]
Kind = tuple[torch.Size, torch.dtype] | type  # of a tensor, or of a number


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` for the body to fill; it becomes `path` when the body ends well.

    Whoever reads `path` sees no folder, the old one, or the whole new one, also after a power cut. Whatever ends the
    body early removes the temporary folder. An `OSError` (a full disk) is raised as a TrainingError.
    """
    temporary = beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():  # safetensors writes what nobody else may read
                inside.chmod(temporary.stat().st_mode & 0o666)
            sync(inside)
        sync(temporary)
        old = path.rename(beside(path)) if path.exists() else None  # a folder cannot be renamed onto another
        temporary.rename(path)
        sync(path.parent)
        if old:
            shutil.rmtree(old, ignore_errors=True)  # what is left of it goes with the next start's `remove_leftovers`
    except (OSError, SafetensorError, SdkitError) as error:
        cause = error.__cause__ if isinstance(error, SdkitError) else error  # what it names is not there any more
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        raise TrainingError(
            f"cannot write {path}: {reason(cause)}; what was there before is untouched, so make room and run again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`tensors`: by file, then by name; `state`: what JSON holds; both as they were after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `root`/step-N and, once it is whole, remove all but the last `keep` up to step N, and those beyond it (of
    a run that was resumed from before them). Raises TrainingError where it cannot be written."""
    folder = root / f"step-{checkpoint.step:08d}"
    with whole_folder(folder) as temporary:
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}))
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"step": checkpoint.step, "sha256": sums}, indent=1))
    kept = [path for path in checkpoints(root) if path.name <= folder.name][:keep]
    for path in checkpoints(root):
        if path not in kept:
            shutil.rmtree(path.rename(beside(path)), ignore_errors=True)  # no part is ever seen under its name
    return folder


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint that `newest` found whole. Raises TrainingError where its files hold no tensors all the same,
    or cannot be read."""
    try:
        state = read_state(folder)
        files = sorted(folder / name for name in _sums(folder) if name.endswith(".safetensors"))
        tensors = {file.stem: load_file(file) for file in files}
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {folder} cannot be read: {reason(error)}; remove it, or name another out_dir."
        ) from error
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises `ValueError` where `save` did not write it, and `OSError`."""
    state = read_object(folder / STATE)
    require(state, {"step": int, "skipped": list, "optimizer": dict})
    if folder.name != f"step-{state['step']:08d}":
        raise ValueError("is of another step")
    return state


def _sums(folder: Path) -> dict[str, str]:
    """Checksums by file name. Raises as `read_state`."""
    fields = read_object(folder / MANIFEST)
    require(fields, {"sha256": dict})
    sums: dict[str, str] = fields["sha256"]
    if any(Path(name).name != name for name in sums) or STATE not in sums:
        raise ValueError("names other files than those of a checkpoint")
    return sums


def checkpoints(root: Path) -> list[Path]:
    """List checkpoints in `root`, damaged ones too, newest first. Raises `OSError` where it cannot be listed: a glob
    would find nothing there."""
    try:
        return sorted((path for path in root.iterdir() if NAME.fullmatch(path.name)), reverse=True)
    except FileNotFoundError:
        return []


def newest(root: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None where there is none at all. A damaged one is passed over with a
    warning; raises TrainingError where all are damaged, or where one cannot be read, which is no damage."""
    found = checkpoints(root)
    for folder in found:
        try:
            damage = _damage(folder)
        except OSError as error:
            raise TrainingError(
                f"cannot read checkpoint {folder}: {reason(error)}; make it readable, or move it away."
            ) from error
        if not damage:
            return folder
        before = "; the one before it is used" if folder != found[-1] else ""
        warnings.warn(f"checkpoint {folder} is damaged ({damage}){before}.", stacklevel=2)
    if found:
        raise TrainingError(f"every checkpoint in {root} is damaged; remove that folder to begin the run again.")
    return None


def _damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or "". Raises `OSError` where that cannot be
    known."""
    name = MANIFEST
    try:
        for name, checksum in {**_sums(folder)}.items():
            if sha256(folder / name) != checksum:
                return f"the checksum of {name} is wrong"
        name = STATE
        read_state(folder)
    except FileNotFoundError:
        return f"{name} is missing"
    except ValueError as error:
        return f"{name} {error}"
    except OSError as error:
        if error.errno in NOT_A_FILE:
            return f"{name} cannot be read"
        raise
    return ""


def snapshot(
    prepared: Sequence[PreparedPlayer], accelerator: Accelerator, step: int, skipped: Sequence[int]
) -> Checkpoint:
    """Return everything that the next step depends on. Tensors are not copied. Call it on every process."""
    rng = gather_object([rng_state(accelerator.device)])
    tensors: dict[str, Tensors] = {"rng": {f"{i}/{name}": v for i, own in enumerate(rng) for name, v in own.items()}}
    numbers = {}
    for t in prepared:
        name = t.player.name
        tensors[name] = _network_tensors(t.player.network)
        state = {f"{n}/{entry}": v for n, p in _named(t) for entry, v in t.optimizer.state.get(p, {}).items()}
        kept = {key: v for key, v in state.items() if isinstance(v, Tensor)}
        # 8-bit AdamW's tables are shared by all parameters, and safetensors writes nothing twice.
        tensors[f"{name}.optimizer"] = {key: v.clone() if "/qmap" in key else v for key, v in kept.items()}
        numbers[name] = {key: v for key, v in state.items() if not isinstance(v, Tensor)}  # as 8-bit AdamW's step
        if t.ema:
            tensors[f"{name}.ema"] = t.ema.state_dict()
    if is_sharded(accelerator):
        tensors = {file: _gathered(parts, accelerator) for file, parts in tensors.items()}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    return Checkpoint(step=step, tensors=tensors, state={"skipped": skipped, "scaler": scaler, "optimizer": numbers})


def restore(prepared: Sequence[PreparedPlayer], accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Restore players and random number generators from a checkpoint. Raises TrainingError where these could not have
    given the checkpoint."""
    _check(prepared, accelerator, checkpoint)
    for t in prepared:
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


def _check(prepared: Sequence[PreparedPlayer], accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Compare names, shapes, and types of all that is in a checkpoint with what `snapshot` would give."""
    tensors, state = checkpoint.tensors, checkpoint.state
    if tensors.keys() != _files(prepared) or state["optimizer"].keys() != {t.player.name for t in prepared}:
        raise TrainingError("the checkpoint is of other networks than those in training; name another out_dir.")
    for t in prepared:
        name = t.player.name
        if _kinds(tensors[name]) != _kinds(_network_tensors(t.player.network)):
            raise TrainingError("the checkpoint is of other parameters than those in training; name another out_dir.")
        if t.ema and _kinds(tensors[f"{name}.ema"]) != _kinds(t.ema.state_dict()):
            raise _misfit(f"its moving average of the {name} is of other parameters")
        if not isinstance(state["optimizer"][name], Mapping):
            raise _misfit(f"its optimizer of the {name} is damaged")
        _check_optimizer(t, {**tensors[f"{name}.optimizer"], **state["optimizer"][name]}, checkpoint.step)
    if len(state["skipped"]) != 2 or not all(type(count) is int and count >= 0 for count in state["skipped"]):
        raise _misfit("its numbers of skipped steps are none")
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    if scaler is not None and _numbers(scaler) != _numbers(state.get("scaler")):
        raise _misfit("its gradient scaler is of other settings")
    usual = {name: value.dtype for name, value in rng_state(torch.device("cpu")).items()} | {"cuda": torch.uint8}
    for key, value in tensors["rng"].items():
        if usual.get(key.split("/")[-1]) != value.dtype:
            raise _misfit(f"its random numbers hold {clean(key)!r}")


def _misfit(problem: str) -> TrainingError:
    return TrainingError(f"the checkpoint is not of this run: {problem}; remove it, or name another out_dir.")


def _kind(value: Any) -> Kind:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)


def _kinds(values: Mapping[str, Any]) -> dict[str, Kind]:
    return {name: _kind(value) for name, value in values.items()}


def _numbers(values: Any) -> dict[str, bool] | None:
    """Names of numbers, and whether each may be one of a gradient scaler."""
    if not isinstance(values, Mapping):
        return None
    return {name: type(one) in (int, float) and 0 <= one < 1e38 for name, one in values.items()}


def _check_optimizer(prepared: PreparedPlayer, state: Mapping[str, Any], steps: int) -> None:
    """A parameter has either no state, as before its first gradient, or all that one has after it."""
    optimizer, parameters = prepared.optimizer, dict(_named(prepared))
    like = type(getattr(optimizer, "optimizer", optimizer))  # which Accelerate wraps
    usual: dict[Kind, dict[str, Kind]] = {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        found.setdefault(name, {})[entry] = value
    for name, entries in found.items():
        p = parameters.get(name)
        if p is None:
            raise _misfit(f"its optimizer knows {clean(name)!r}, which is not trained")
        kind = _kind(p)
        if kind not in usual:
            usual[kind] = _kinds(_after_a_step(like, p))
        if _kinds(entries) != usual[kind]:
            raise _misfit(f"the optimizer's state of {name} is of other shapes or types")
        count = entries.get("step", 0)
        if not 0 <= (count.item() if isinstance(count, Tensor) else count) <= steps:
            raise _misfit(f"its optimizer made other than 0 to {steps} steps of {name}")


def _after_a_step(optimizer: type[torch.optim.Optimizer], p: Tensor) -> dict[str, Any]:
    """The state that such an optimizer has of a parameter like `p` after its first step."""
    device = "meta" if optimizer is torch.optim.AdamW else p.device  # where nothing is computed
    parameter = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    fresh = optimizer([parameter])  # type: ignore[call-arg]
    fresh.step()
    return dict(fresh.state[parameter])


def _files(prepared: Sequence[PreparedPlayer]) -> set[str]:
    names = {t.player.name for t in prepared}
    return {"rng", *names, *(f"{n}.optimizer" for n in names), *(f"{t.player.name}.ema" for t in prepared if t.ema)}


def _gathered(tensors: Tensors, accelerator: Accelerator) -> Tensors:
    """All of each tensor, on the CPU of the main process; nothing on the others."""
    every = ((name, full_tensor(value)) for name, value in tensors.items())
    return {name: value.cpu() for name, value in every if accelerator.is_main_process}


def _named(prepared: PreparedPlayer) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in prepared.player.network.named_parameters() if p.requires_grad]


def _network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes in a network: trainable parameters and buffers."""
    state = network.state_dict()  # of the buffers, only those that a network's file holds are in it
    names = [n for n, p in network.named_parameters() if p.requires_grad] + [n for n, _ in network.named_buffers()]
    return {name: state[name] for name in names if name in state}


@torch.no_grad()
def _restore_network(network: nn.Module, tensors: Tensors) -> None:
    for name, value in _network_tensors(network).items():
        value.copy_(split_as(tensors[name], value))


def _restore_optimizer(prepared: PreparedPlayer, state: Mapping[str, Any]) -> None:
    """Restore the optimizer's state; its learning rate and other settings stay as they are."""
    parameters = dict(_named(prepared))
    numbers = {p: i for i, p in enumerate(p for group in prepared.optimizer.param_groups for p in group["params"])}
    numbered: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        name, entry = key.rsplit("/", 1)
        p = parameters[name]
        split = isinstance(value, Tensor) and value.shape == p.shape
        numbered.setdefault(numbers[p], {})[entry] = split_as(value, p) if split else value
    settings = prepared.optimizer.state_dict()["param_groups"]
    prepared.optimizer.load_state_dict({"state": numbered, "param_groups": settings})
    for p, entries in prepared.optimizer.state.items():
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
    """Set this process's generators to what `rng_state` gave. Raises TrainingError for anything else."""
    try:
        random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_gauss"].tolist()), None)))
        *keys, position, has_gauss = state["numpy"].tolist()
        if not 0 <= position <= len(keys):  # NumPy would read there
            raise ValueError("a position outside of its numbers")
        np.random.set_state(  # noqa: NPY002
            ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item())
        )
        torch.set_rng_state(state["torch"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _misfit("its random numbers are damaged") from error
