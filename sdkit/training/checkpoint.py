"""Checkpoints of safetensors and JSON, written atomically, from which a run resumes bit-identically.

A checkpoint is a folder with the SHA-256 of each of its files. It is written under a temporary name, and renamed when
it is complete. Nothing in it can execute code when it is loaded. Names, shapes, and types are compared with those in
training before anything is restored, because an optimizer's kernels trust the shapes: a state smaller than its
parameter would be read out of bounds.
"""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdkit.atomic import beside, whole_folder
from sdkit.engines.device import device_rng_state, set_device_rng_state
from sdkit.errors import TrainingError
from sdkit.files import sha256
from sdkit.messages import clean, reason
from sdkit.strict_json import read_object, require
from sdkit.training.distributed import full_tensor, is_sharded, sharded_as
from sdkit.training.muon import Muon
from sdkit.training.prepared import PreparedPlayer

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-\d{8}")
NOT_A_FILE = (errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.EFBIG)  # not a regular file, or one that is too large
Tensors = Mapping[str, Tensor]
Kind = tuple[torch.Size, torch.dtype] | type  # shape and dtype of a tensor, or the type of a number


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run after a number of optimizer steps.

    Attributes:
        step: Number of optimizer steps.
        tensors: Tensors by file (without .safetensors), then by name.
        state: Content of state.json.
    """

    step: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def save(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint as `root`/step-N, then remove old ones.

    Checkpoints of later steps are removed as well: they were left by a run that has since been resumed from an earlier
    one.

    Args:
        root: Folder of the checkpoints.
        checkpoint: The checkpoint of step N.
        keep: Number of checkpoints to keep, the new one included.

    Returns:
        The folder of the new checkpoint.

    Raises:
        TrainingError: The checkpoint cannot be written.
    """
    folder = root / f"step-{checkpoint.step:08d}"
    with whole_folder(folder, TrainingError) as temporary:
        for name, tensors in checkpoint.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}))
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"step": checkpoint.step, "sha256": sums}, indent=1))
    to_keep = [path for path in checkpoints(root) if path.name <= folder.name][:keep]
    for path in checkpoints(root):
        if path not in to_keep:
            # Rename before removing, so that a half-removed checkpoint never has a checkpoint's name.
            shutil.rmtree(path.rename(beside(path)), ignore_errors=True)
    return folder


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint that `newest` has returned.

    Raises:
        TrainingError: A file cannot be read, or is not a safetensors file although its checksum is right.
    """
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
    """Return the content of a checkpoint's state.json.

    Raises:
        ValueError: The file is not one that `save` writes.
        OSError: The file cannot be read.
    """
    state = read_object(folder / STATE)
    require(state, {"step": int, "skipped": list, "optimizer": dict})
    if folder.name != f"step-{state['step']:08d}":
        raise ValueError("is of another step")
    return state


def _sums(folder: Path) -> dict[str, str]:
    """Return a checkpoint's checksums by file name. Raises ValueError and OSError, as `read_state` does."""
    fields = read_object(folder / MANIFEST)
    require(fields, {"sha256": dict})
    sums: dict[str, str] = fields["sha256"]
    if any(Path(name).name != name for name in sums) or STATE not in sums:
        raise ValueError("names other files than those of a checkpoint")
    return sums


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints in `root`, newest first, damaged ones included.

    Raises:
        OSError: The folder cannot be listed.
    """
    try:
        # Path.glob would return nothing for a folder that cannot be listed; iterdir raises.
        return sorted((path for path in root.iterdir() if NAME.fullmatch(path.name)), reverse=True)
    except FileNotFoundError:
        return []


def newest(root: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there are no checkpoints.

    A damaged checkpoint is skipped with a warning.

    Raises:
        TrainingError: All checkpoints are damaged, or one cannot be read, for example for lack of permission. As it
            may be undamaged, it is not skipped.
    """
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
    """Return a description of a checkpoint's damage, or "". Raises OSError if a file cannot be read."""
    name = MANIFEST
    try:
        for name, checksum in _sums(folder).items():
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
    players: Sequence[PreparedPlayer], accelerator: Accelerator, step: int, skipped: Sequence[int]
) -> Checkpoint:
    """Return a checkpoint of everything that the next step depends on. Call this on every process.

    Args:
        players: The players. Their tensors are not copied.
        accelerator: The Accelerator that prepared them.
        step: Number of optimizer steps made.
        skipped: Number of skipped steps in total, and since the last step that was not skipped.
    """
    rng = gather_object([rng_state(accelerator.device)])
    tensors: dict[str, Tensors] = {"rng": {f"{i}/{name}": v for i, own in enumerate(rng) for name, v in own.items()}}
    numbers = {}
    for prepared in players:
        name = prepared.player.name
        tensors[name] = _network_tensors(prepared.player.network)
        optimizer_state = prepared.optimizer.state
        state = {f"{n}/{entry}": v for n, p in _named(prepared) for entry, v in optimizer_state.get(p, {}).items()}
        state_tensors = {key: v for key, v in state.items() if isinstance(v, Tensor)}
        # 8-bit AdamW shares its lookup tables between parameters, and safetensors refuses to write shared memory.
        tensors[f"{name}.optimizer"] = {key: v.clone() if "/qmap" in key else v for key, v in state_tensors.items()}
        # Some optimizers keep plain numbers too, such as the step of 8-bit AdamW.
        numbers[name] = {key: v for key, v in state.items() if not isinstance(v, Tensor)}
        if prepared.ema:
            tensors[f"{name}.ema"] = prepared.ema.state_dict()
    if is_sharded(accelerator):
        tensors = {file: _gathered(parts, accelerator) for file, parts in tensors.items()}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    return Checkpoint(step=step, tensors=tensors, state={"skipped": skipped, "scaler": scaler, "optimizer": numbers})


def restore(players: Sequence[PreparedPlayer], accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Restore players and random number generators from a checkpoint, in place.

    Raises:
        TrainingError: `snapshot` could not have made this checkpoint from these players. Nothing has been restored.
    """
    _check(players, accelerator, checkpoint)
    for prepared in players:
        name = prepared.player.name
        _restore_network(prepared.player.network, checkpoint.tensors[name])
        _restore_optimizer(prepared, {**checkpoint.tensors[f"{name}.optimizer"], **checkpoint.state["optimizer"][name]})
        if prepared.ema:
            own, saved = prepared.ema.state_dict(), checkpoint.tensors[f"{name}.ema"]
            prepared.ema.load_state_dict({n: sharded_as(value, own.get(n, value)) for n, value in saved.items()})
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    prefix = f"{accelerator.process_index}/"
    rng = {key.removeprefix(prefix): v for key, v in checkpoint.tensors["rng"].items() if key.startswith(prefix)}
    if rng:  # a process that the saved run did not have keeps its freshly seeded generators
        set_rng_state(rng, accelerator.device)


def _check(players: Sequence[PreparedPlayer], accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Raise TrainingError unless all names, shapes, and types in a checkpoint are those that `snapshot` would give."""
    tensors, state = checkpoint.tensors, checkpoint.state
    player_names = {prepared.player.name for prepared in players}
    if tensors.keys() != _files(players) or state["optimizer"].keys() != player_names:
        raise TrainingError("the checkpoint is of other networks than those in training; name another out_dir.")
    for prepared in players:
        name, ema = prepared.player.name, prepared.ema
        if _kinds(tensors[name]) != _kinds(_network_tensors(prepared.player.network)):
            raise TrainingError("the checkpoint is of other parameters than those in training; name another out_dir.")
        if ema and _kinds(tensors[f"{name}.ema"]) != _kinds(ema.state_dict()):
            raise _mismatch(f"its moving average of the {name} is of other parameters")
        if not isinstance(state["optimizer"][name], Mapping):
            raise _mismatch(f"its optimizer of the {name} is damaged")
        _check_optimizer(prepared, {**tensors[f"{name}.optimizer"], **state["optimizer"][name]}, checkpoint.step)
    if len(state["skipped"]) != 2 or not all(type(count) is int and count >= 0 for count in state["skipped"]):
        raise _mismatch("its numbers of skipped steps are none")
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    if scaler is not None and _plausible_numbers(scaler) != _plausible_numbers(state.get("scaler")):
        raise _mismatch("its gradient scaler is of other settings")
    rng_dtypes = {name: value.dtype for name, value in rng_state(torch.device("cpu")).items()} | {"cuda": torch.uint8}
    for key, value in tensors["rng"].items():
        if rng_dtypes.get(key.split("/")[-1]) != value.dtype:
            raise _mismatch(f"its random numbers hold {clean(key)!r}")


def _mismatch(problem: str) -> TrainingError:
    return TrainingError(f"the checkpoint is not of this run: {problem}; remove it, or name another out_dir.")


def _kind(value: Any) -> Kind:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)


def _kinds(values: Mapping[str, Any]) -> dict[str, Kind]:
    return {name: _kind(value) for name, value in values.items()}


def _plausible_numbers(values: Any) -> dict[str, bool] | None:
    """Return, by name, whether each value is a number in a gradient scaler's range; None if `values` is no mapping."""
    if not isinstance(values, Mapping):
        return None
    return {name: type(value) in (int, float) and 0 <= value < 1e38 for name, value in values.items()}


def _check_optimizer(prepared: PreparedPlayer, state: Mapping[str, Any], steps: int) -> None:
    """Raise TrainingError unless the optimizer's state fits its parameters.

    A parameter has no state before its first gradient. After it, the state has all entries of this kind of optimizer.
    """
    optimizer, parameters = prepared.optimizer, dict(_named(prepared))
    optimizer_class = type(getattr(optimizer, "optimizer", optimizer))  # without Accelerate's wrapper
    matrices = {p for group in optimizer.param_groups if group.get("matrices") for p in group["params"]}
    expected: dict[object, dict[str, Kind]] = {}  # cached by kind of parameter: each kind costs a trial step
    entries_of: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        entries_of.setdefault(name, {})[entry] = value
    for name, entries in entries_of.items():
        p = parameters.get(name)
        if p is None:
            raise _mismatch(f"its optimizer knows {clean(name)!r}, which is not trained")
        kind = (_kind(p), p in matrices)
        if kind not in expected:
            options = {"matrices": True} if p in matrices else {}
            expected[kind] = _kinds(_state_after_a_step(optimizer_class, p, options))
        if _kinds(entries) != expected[kind]:
            raise _mismatch(f"the optimizer's state of {name} is of other shapes or types")
        count = entries.get("step", 0)
        if not 0 <= (count.item() if isinstance(count, Tensor) else count) <= steps:
            raise _mismatch(f"its optimizer made other than 0 to {steps} steps of {name}")


def _state_after_a_step(
    optimizer: type[torch.optim.Optimizer], p: Tensor, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state that an optimizer of this class has for a parameter like `p` after its first step.

    Args:
        optimizer: The class.
        p: The parameter.
        options: Options of the parameter's group on which the entries depend.
    """
    # The "meta" device computes nothing and needs no memory, but bitsandbytes' optimizer does not run on it.
    device = "meta" if optimizer in (torch.optim.AdamW, Muon) else p.device
    parameter = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    fresh = optimizer([{"params": [parameter], **options}])  # type: ignore[call-arg]
    fresh.step()
    return dict(fresh.state[parameter])


def _files(players: Sequence[PreparedPlayer]) -> set[str]:
    """Return the names of a checkpoint's tensor files, without .safetensors."""
    names = {prepared.player.name for prepared in players}
    averaged = {prepared.player.name for prepared in players if prepared.ema}
    return {"rng", *names, *(f"{name}.optimizer" for name in names), *(f"{name}.ema" for name in averaged)}


def _gathered(tensors: Tensors, accelerator: Accelerator) -> Tensors:
    """Gather sharded tensors to the main process's CPU. Other processes get an empty dict, but must call this, too."""
    full = ((name, full_tensor(value)) for name, value in tensors.items())
    return {name: value.cpu() for name, value in full if accelerator.is_main_process}


def _named(prepared: PreparedPlayer) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters as pairs (name, parameter)."""
    return [(name, p) for name, p in prepared.player.network.named_parameters() if p.requires_grad]


def _network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes in a network: trainable parameters and buffers."""
    state = network.state_dict()  # without non-persistent buffers, which a checkpoint leaves out, too
    names = [n for n, p in network.named_parameters() if p.requires_grad] + [n for n, _ in network.named_buffers()]
    return {name: state[name] for name in names if name in state}


@torch.no_grad()
def _restore_network(network: nn.Module, tensors: Tensors) -> None:
    for name, value in _network_tensors(network).items():
        value.copy_(sharded_as(tensors[name], value))


def _restore_optimizer(prepared: PreparedPlayer, state: Mapping[str, Any]) -> None:
    """Restore the optimizer's state, but keep its current learning rate and other settings."""
    parameters = dict(_named(prepared))
    indices = {p: i for i, p in enumerate(p for group in prepared.optimizer.param_groups for p in group["params"])}
    by_index: dict[int, dict[str, Any]] = {}  # optimizers identify parameters by index, checkpoints by name
    for key, value in state.items():
        name, entry = key.rsplit("/", 1)
        p = parameters[name]
        parameter_shaped = isinstance(value, Tensor) and value.shape == p.shape
        by_index.setdefault(indices[p], {})[entry] = sharded_as(value, p) if parameter_shaped else value
    settings = prepared.optimizer.state_dict()["param_groups"]
    prepared.optimizer.load_state_dict({"state": by_index, "param_groups": settings})
    for p, entries in prepared.optimizer.state.items():
        for entry, value in entries.items():  # safetensors drops the memory format, without which each step is slower
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                entries[entry] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's global generators: Python's, NumPy's, and PyTorch's on CPU and GPU."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - for libraries that use it
    state = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.append(np.asarray(keys), [position, has_gauss]).astype(np.int64)),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    on_gpu = device_rng_state(device)
    return state if on_gpu is None else state | {"cuda": on_gpu}


def set_rng_state(state: Tensors, device: torch.device) -> None:
    """Set this process's global generators to states from `rng_state`.

    Raises:
        TrainingError: The states are not valid.
    """
    try:
        random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_gauss"].tolist()), None)))
        *keys, position, has_gauss = state["numpy"].tolist()
        if not 0 <= position <= len(keys):  # NumPy does not check this, and would read out of bounds
            raise ValueError("a position outside of its numbers")
        np.random.set_state(  # noqa: NPY002
            ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item())
        )
        torch.set_rng_state(state["torch"])
        if "cuda" in state:
            set_device_rng_state(state["cuda"], device)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _mismatch("its random numbers are damaged") from error
