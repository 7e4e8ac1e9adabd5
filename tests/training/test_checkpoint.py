from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from sdkit.atomic import whole_folder
from sdkit.errors import SdkitError, TrainingError
from sdkit.messages import reason
from sdkit.training.checkpoint import (
    Checkpoint,
    checkpoints,
    load,
    newest,
    restore,
    rng_state,
    save,
    set_rng_state,
    snapshot,
)
from sdkit.training.prepared import PreparedPlayer
from sdkit.training.run_folder import RunFolder, read_metrics
from sdkit.training.stage import Player
from tests.helpers.toy import ToySettings

CPU = torch.device("cpu")


def at(step: int) -> Checkpoint:
    tensors = {"weights": {"w": torch.full((50,), float(step))}, "rng": {"state": torch.arange(9)}}
    return Checkpoint(step=step, tensors=tensors, state={"skipped": [step, 0], "optimizer": {}})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# Atomic folders


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "sub" / "result", TrainingError) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text(text)
            assert not (tmp_path / "sub" / "result").exists() or text == "new"
    assert (tmp_path / "sub" / "result" / "deep" / "file").read_text() == "new"
    assert names(tmp_path / "sub") == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_body_that_fails_leaves_the_old_folder(error: type[BaseException], tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "result", TrainingError) as folder:
            (folder / "file").write_text("new")
            raise error

    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "file").write_text("old")
    with pytest.raises(TrainingError if error is OSError else error):
        fill()
    assert names(tmp_path) == ["result"]
    assert (tmp_path / "result" / "file").read_text() == "old"


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path) -> None:
    """safetensors makes files that only their owner may read. They must follow the umask."""
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "result", TrainingError) as folder:
            save_file({"w": torch.zeros(1)}, folder / "w.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "result" / "w.safetensors").stat().st_mode & 0o777 == 0o640


# Checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = save(tmp_path, at(7), keep=1)
    loaded = load(folder)
    assert (loaded.step, loaded.state["skipped"]) == (7, [7, 0])
    assert loaded.tensors.keys() == {"weights", "rng"}
    assert torch.equal(loaded.tensors["weights"]["w"], torch.full((50,), 7.0))


def test_nothing_in_it_can_execute_code(tmp_path: Path) -> None:
    assert {path.suffix for path in save(tmp_path, at(1), keep=1).iterdir()} == {".safetensors", ".json"}


def test_the_last_n_are_kept(tmp_path: Path) -> None:
    for step in (5, 90, 100, 1000):
        save(tmp_path, at(step), keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00001000"]


def test_what_lies_beyond_a_run_taken_up_earlier_goes(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, at(step), keep=3)
    # The run resumed from step 10, because the checkpoints of steps 20 and 30 were damaged.
    save(tmp_path, at(15), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_the_old_one_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Guards against a common defect: the old checkpoint is deleted first. Here a tensor that cannot be written
    interrupts the saving.
    """
    save(tmp_path, at(1), keep=1)
    broken = replace(at(2), state={"not": object()})
    with pytest.raises(TypeError):
        save(tmp_path, broken, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path) == tmp_path / "step-00000001"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replaced_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def contents(**changes: Any) -> bytes:
    return json.dumps({"step": 2, "skipped": [2, 0], "optimizer": {}} | changes).encode()


def rewritten(folder: Path, name: str, content: bytes) -> None:
    """Rewrite a file of a checkpoint, and record the checksum of the new content in the manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "the checksum of weights.safetensors is wrong": lambda folder: flip(folder / "weights.safetensors"),
    "the checksum of rng.safetensors is wrong": lambda folder: os.truncate(folder / "rng.safetensors", 20),
    "the checksum of state.json is wrong": lambda folder: (folder / "state.json").write_text("{}"),
    "weights.safetensors is missing": lambda folder: (folder / "weights.safetensors").unlink(),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    r"manifest.json is not valid JSON \(.*\)": lambda folder: (folder / "manifest.json").write_text(
        '{"sha256": {"weig'
    ),
    r"manifest.json is not valid JSON \(nested too deeply\)": lambda folder: (folder / "manifest.json").write_text(
        "[" * 100_000
    ),
    "manifest.json has no 'sha256'": lambda folder: (folder / "manifest.json").write_text("{}"),
    "manifest.json names other files than those of a checkpoint": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({"sha256": {"state.json": "", "../../secret": ""}})
    ),
    "manifest.json cannot be read": lambda folder: replaced_by_a_pipe(folder / "manifest.json"),
    "rng.safetensors cannot be read": lambda folder: replaced_by_a_pipe(folder / "rng.safetensors"),
    "state.json is not valid JSON .*": lambda folder: rewritten(folder, "state.json", b"{"),
    "state.json holds no JSON object": lambda folder: rewritten(folder, "state.json", b"[]"),
    "state.json has a 'step' of another type": lambda f: rewritten(f, "state.json", contents(step="x")),
    "state.json is of another step": lambda f: rewritten(f, "state.json", contents(step=-1)),
    "state.json has a 'skipped' of another type": lambda folder: rewritten(
        folder, "state.json", contents(skipped=None)
    ),
    "state.json has a 'optimizer' of another type": lambda folder: rewritten(
        folder, "state.json", contents(optimizer=[])
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_damaged_newest_one_is_passed_over_with_a_sentence(sentence: str, tmp_path: Path) -> None:
    """Guards against a common defect: resuming from a partial checkpoint."""
    for step in (1, 2):
        save(tmp_path, at(step), keep=2)
    DAMAGES[sentence](tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match=rf"step-00000002 is damaged \({sentence}\); the one before it is used"):
        assert newest(tmp_path) == tmp_path / "step-00000001"


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path: Path) -> None:
    save(tmp_path, at(1), keep=1)
    flip(tmp_path / "step-00000001" / "state.json")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(TrainingError, match=r"every checkpoint in .* is damaged; remove that folder to begin"),
    ):
        newest(tmp_path)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    assert checkpoints(tmp_path / "nowhere") == []


# Saving and restoring what training changes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))


def trained(net: nn.Module) -> PreparedPlayer:
    def loss(
        networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return networks["net"](batch["x"]).square().mean(), {}

    player = Player("net", net, loss, learning_rate=0.1, ema=True)
    return PreparedPlayer(player, ToySettings(), Accelerator(cpu=True))


def steps(t: PreparedPlayer, count: int) -> None:
    for _ in range(count):
        t.network(torch.rand(2, 2, 5, 5)).square().mean().backward()
        t.optimizer.step()
        t.optimizer.zero_grad()
        assert t.ema
        t.ema.update()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_on_to_the_bit_from_a_snapshot(memory_format: torch.memory_format, tmp_path: Path) -> None:
    one, other = (trained(network().to(memory_format=memory_format)) for _ in range(2))
    accelerator = Accelerator(cpu=True)
    steps(one, 3)
    folder = save(tmp_path, snapshot([one], accelerator, 3, (0, 0)), keep=1)
    steps(one, 2)
    torch.rand(100)
    restore([other], accelerator, load(folder))
    steps(other, 2)
    left, right = (snapshot([t], accelerator, 5, (0, 0)).tensors for t in (one, other))
    assert {f"{file}/{name}" for file in left for name in left[file]} == {f"{f}/{n}" for f in right for n in right[f]}
    assert "1.running_mean" in left["net"]
    assert all(torch.equal(left[file][name], right[file][name]) for file in left for name in left[file])
    weight = other.parameters[0]
    assert other.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


class Quantized(torch.optim.Optimizer):
    """An optimizer with the state of bitsandbytes' 8-bit AdamW: an int, a table that all parameters
    share, and blocks.
    """

    table = torch.arange(256.0)

    def __init__(self, parameters: Any, lr: float = 1e-3, **_: Any) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            state["qmap1"], state["state1"] = self.table, torch.zeros_like(p, dtype=torch.uint8)
            state["absmax1"] = torch.zeros(math.ceil(p.numel() / 4))


def quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PreparedPlayer, Checkpoint]:
    """Return a player to be restored that trains with `Quantized`, and a checkpoint after 3 steps."""
    function = "sdkit.training.prepared.make_optimizer"
    monkeypatch.setattr(function, lambda player, settings, device: Quantized(player.network.parameters()))
    one, other = trained(network()), trained(network())
    steps(one, 3)
    return other, load(save(tmp_path, snapshot([one], Accelerator(cpu=True), 3, (0, 0)), keep=1))


def test_optimizer_state_that_is_no_tensor_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit AdamW counts its steps in an int."""
    other, found = quantized(tmp_path, monkeypatch)
    restore([other], Accelerator(cpu=True), found)
    states = [other.optimizer.state[parameter] for parameter in other.parameters]
    assert [one["step"] for one in states] == [3] * len(states)
    assert all(torch.equal(one["qmap1"], Quantized.table) for one in states)


@pytest.mark.parametrize(
    "tensors", [{"0.weight/absmax1": torch.zeros(2)}, {"0.weight/state1": torch.zeros(3, 2, 3, 3)}]
)
def test_the_states_of_other_optimizers_are_compared_with_what_those_would_have(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, found = quantized(tmp_path, monkeypatch)
    changed = {**found.tensors, "net.optimizer": {**found.tensors["net.optimizer"], **tensors}}
    with pytest.raises(TrainingError, match=r"the optimizer's state of 0\.weight is of other shapes or types"):
        restore([other], Accelerator(cpu=True), replace(found, tensors=changed))


def swapped(file: str, **changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    """Return a function that changes tensors of one file of a checkpoint. None removes a tensor."""

    def change(found: Checkpoint) -> Checkpoint:
        tensors = {name: value for name, value in {**found.tensors[file], **changes}.items() if value is not None}
        return replace(found, tensors={**found.tensors, file: tensors})

    return change


def with_state(**changes: Any) -> Callable[[Checkpoint], Checkpoint]:
    return lambda found: replace(found, state={**found.state, **changes})


def shrunk(file: str) -> Callable[[Checkpoint], Checkpoint]:
    """Return a function that cuts each tensor of a file down to its first value."""
    return lambda found: swapped(file, **{k: v.flatten()[:1].clone() for k, v in found.tensors[file].items()})(found)


NAN = math.nan
WEIGHT = torch.zeros(3, 2, 3, 3)
NUMPY = torch.zeros(626, dtype=torch.int64)
MISFITS: Mapping[str, tuple[Callable[[Checkpoint], Checkpoint], str]] = {
    "shapes": (shrunk("net.optimizer"), "the optimizer's state of .* is of other shapes or types"),
    "one shape": (
        swapped("net.optimizer", **{"0.weight/exp_avg": torch.zeros(3)}),
        "the optimizer's state of 0.weight",
    ),
    "type": (swapped("net.optimizer", **{"0.weight/exp_avg": WEIGHT.half()}), "the optimizer's state of 0.weight"),
    "half a state": (swapped("net.optimizer", **{"0.weight/exp_avg": None}), "the optimizer's state of 0.weight"),
    "foreign entry": (swapped("net.optimizer", **{"0.weight/x": WEIGHT}), "the optimizer's state of 0.weight"),
    "foreign key": (swapped("net.optimizer", **{"evil/x": WEIGHT}), "its optimizer knows 'evil', which is not trained"),
    "no slash": (swapped("net.optimizer", x=WEIGHT), "its optimizer knows '', which is not trained"),
    "steps": (swapped("net.optimizer", **{"0.weight/step": torch.tensor(4.0)}), "made other than 0 to 3 steps"),
    "nan steps": (
        swapped("net.optimizer", **{"0.weight/step": torch.tensor(math.nan)}),
        "made other than 0 to 3 steps",
    ),
    "weights": (swapped("net", **{"0.weight": torch.zeros(1)}), "of other parameters than those in training"),
    "half weights": (swapped("net", **{"0.weight": WEIGHT.half()}), "of other parameters than those in training"),
    "no weight": (swapped("net", **{"0.weight": None}), "of other parameters than those in training"),
    "average": (swapped("net.ema", **{"0.weight": torch.zeros(1)}), "its moving average of the net is of other"),
    "updates": (swapped("net.ema", num_updates=torch.zeros(2)), "its moving average of the net is of other"),
    "number for a tensor": (
        with_state(optimizer={"net": {"0.weight/exp_avg": 1}}),
        "the optimizer's state of 0.weight is of other shapes or types",
    ),
    "no player": (with_state(optimizer={}), "of other networks than those in training"),
    "player of another type": (with_state(optimizer={"net": []}), "its optimizer of the net is damaged"),
    "skipped": (with_state(skipped=[0]), "its numbers of skipped steps are none"),
    "skipped of another type": (with_state(skipped=[0, "1"]), "its numbers of skipped steps are none"),
    "random numbers": (shrunk("rng"), "its random numbers are damaged"),
    "numpy reads beyond": (
        swapped("rng", **{"0/numpy": torch.cat([NUMPY[:624], torch.tensor([10**6, 0])])}),
        "its random numbers are damaged",
    ),
    "numpy of another size": (swapped("rng", **{"0/numpy": NUMPY[:20]}), "its random numbers are damaged"),
    "torch's": (swapped("rng", **{"0/torch": torch.zeros(5056, dtype=torch.uint8)}), "its random numbers are damaged"),
    "fewer random numbers": (swapped("rng", **{"0/python": None}), "its random numbers are damaged"),
    "other random numbers": (swapped("rng", **{"0/dice": torch.zeros(1)}), "its random numbers hold '0/dice'"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_nothing_is_restored_that_the_run_could_not_have_written(kind: str) -> None:
    """Guards against memory corruption: AdamW's kernels write beyond the ends of states that are smaller than their
    parameter.
    """
    change, sentence = MISFITS[kind]
    one, other = trained(network()), trained(network())
    steps(one, 3)
    found = change(snapshot([one], Accelerator(cpu=True), 3, (0, 0)))
    state = rng_state(CPU)
    with pytest.raises(TrainingError, match=sentence):
        restore([other], Accelerator(cpu=True), found)
    set_rng_state(state, CPU)


@pytest.mark.parametrize("scaler", [None, {}, [], {"scale": "x"}, {"scale": math.nan}, {"scale": 10**400}])
def test_a_gradient_scaler_of_other_contents_is_refused(scaler: Any) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    one = trained(network())
    found = snapshot([one], accelerator, 0, (0, 0))
    whole = {**found.state["scaler"], **scaler} if isinstance(scaler, dict) and scaler else scaler
    with pytest.raises(TrainingError, match="its gradient scaler is of other settings"):
        restore([one], accelerator, with_state(scaler=whole)(found))
    restore([one], accelerator, found)


def test_a_file_of_no_tensors_is_told_even_where_its_checksum_is_right(tmp_path: Path) -> None:
    folder = save(tmp_path, at(2), keep=1)
    rewritten(folder, "weights.safetensors", b"junk" * 30)
    assert newest(tmp_path) == folder
    with pytest.raises(TrainingError, match=r"step-00000002 cannot be read: .*; remove it, or name another out_dir"):
        load(folder)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would resume from an older checkpoint, and the next save would remove this one."""

    def closed(path: Path) -> str:
        raise error

    for step in (1, 2):
        save(tmp_path, at(step), keep=2)
    monkeypatch.setattr("sdkit.training.checkpoint.sha256", closed)
    told = rf"cannot read checkpoint .*step-00000002: {reason(error)}; make it readable, or move it away"
    with pytest.raises(TrainingError, match=told):
        newest(tmp_path)


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    save(tmp_path, at(1), keep=1)
    monkeypatch.setattr("pathlib.Path.iterdir", closed)
    with pytest.raises(PermissionError):
        newest(tmp_path)


def test_the_learning_rate_is_that_of_the_settings(tmp_path: Path) -> None:
    one, other = trained(network()), trained(network())
    steps(one, 1)
    other.optimizer.param_groups[0]["lr"] = 0.7
    restore([other], Accelerator(cpu=True), snapshot([one], Accelerator(cpu=True), 1, (0, 0)))
    assert other.optimizer.param_groups[0]["lr"] == 0.7


def test_a_checkpoint_that_cannot_be_removed_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS, a folder cannot be removed while somebody has a file in it open."""

    def busy(_: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    one = trained(network())
    monkeypatch.setattr("sdkit.training.checkpoint.shutil.rmtree", busy)
    for step in (1, 2):
        save(tmp_path, snapshot([one], Accelerator(cpu=True), step, (0, 0)), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_a_checkpoint_of_another_network_is_refused() -> None:
    found = snapshot([trained(network())], Accelerator(cpu=True), 1, (0, 0))
    other = trained(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)))
    with pytest.raises(TrainingError, match="of other parameters than those in training"):
        restore([other], Accelerator(cpu=True), found)
    with pytest.raises(TrainingError, match="of other networks than those in training"):
        restore([], Accelerator(cpu=True), found)


def test_all_random_numbers_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), float(torch.rand(1))]  # noqa: NPY002

    for _ in range(2):  # Gaussian numbers are made in pairs; the second one of a pair is part of the generator's state
        draw()
        state = rng_state(CPU)
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        first = draw()
        set_rng_state(state, CPU)
        assert draw() == first
        random.gauss(0, 1)
        np.random.normal()  # noqa: NPY002


# Run folders


def opened(path: Path, processes: int = 1, **settings: Any) -> RunFolder:
    run = RunFolder(path)
    try:
        run.open(ToySettings(**settings), processes)
    except TrainingError:
        run.close()
        raise
    return run


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Make the folder of a run that has logged three steps and saved the second."""
    run = opened(tmp_path / "run")
    for step in (1, 2, 3):
        run.log({"step": step, "loss": step / 3})
        if step == 2:
            run.save(at(2), keep=1)
    run.close()
    return tmp_path / "run"


def test_a_result_without_its_checkpoints_is_not_overwritten_by_another_run(begun: Path) -> None:
    run = opened(begun)
    run.export(lambda folder: (folder / "weights").touch(), 3)
    run.close()
    shutil.rmtree(begun / "checkpoints")
    with pytest.raises(TrainingError, match="holds another run: learning_rate was"):
        opened(begun, learning_rate=0.5)
    assert (begun / "result" / "weights").exists()
    opened(begun).close()


def test_metrics_that_cannot_be_kept_are_told(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems report an exceeded quota only on fsync."""

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    run = opened(begun)
    monkeypatch.setattr("sdkit.training.run_folder.os.fsync", full)
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: disk quota exceeded; make room"):
        run.save(at(4), keep=1)
    run.close()


def test_metrics_beyond_the_checkpoint_are_dropped_and_those_before_it_stay(begun: Path) -> None:
    whole = (begun / "metrics.jsonl").read_text().splitlines()
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a partial line, as left by a killed process
    assert [line["step"] for line in read_metrics(begun / "metrics.jsonl")] == [1, 2, 3]
    run = RunFolder(begun)
    start = run.open(ToySettings(), 1)
    assert (start.step, start.checkpoint, start.validated, start.exported) == (
        2,
        begun / "checkpoints/step-00000002",
        False,
        -1,
    )
    run.log({"step": 3, "loss": None})
    run.close()
    assert (begun / "metrics.jsonl").read_text().splitlines() == [*whole[:2], '{"step": 3, "loss": null}']


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.01, is 0.5"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"mixed_precision": "bf16"}, "mixed_precision was 'no', is 'bf16'"),
        ({"nan_samples": (1, 2)}, r"nan_samples was \[\], is \[1, 2\]"),
        ({"batch_size": 3}, r"its steps took 1 samples, these take 3 \(.*\)"),
        ({"processes": 2}, r"its steps took 1 samples, these take 2 \(.*\)"),
    ],
)
def test_another_run_is_not_written_over(change: dict[str, Any], sentence: str, begun: Path) -> None:
    before = (begun / "config.json").read_text()
    with pytest.raises(
        TrainingError, match=rf"holds another run: {sentence}; name another out_dir \(only these may change:"
    ):
        opened(begun, **change)
    assert (begun / "config.json").read_text() == before


def test_another_fingerprint_is_told_in_words(tmp_path: Path) -> None:
    identity = {"data": "a", "control_net": "b"}
    run = RunFolder(tmp_path / "run")
    run.open(ToySettings(), 1, identity)
    run.save(at(1), keep=1)
    run.close()
    for name, sentence in (
        ("data", r"its data was different \(names, captions, or sizes of files\)"),
        ("control_net", r"its control net was different \(by its fingerprint\)"),
    ):
        with pytest.raises(TrainingError, match=rf"holds another run: {sentence}; name another out_dir"):
            run.open(ToySettings(), 1, identity | {name: "c"})
        run.close()


def test_the_run_of_another_stage_is_not_written_over(begun: Path) -> None:
    class OtherSettings(ToySettings):
        pass

    run = RunFolder(begun)
    with pytest.raises(TrainingError, match="stage was 'ToySettings', is 'OtherSettings'"):
        run.open(OtherSettings(), 1)
    run.close()


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": 50},
        {"save_every": 3, "keep_checkpoints": 9, "validate_every": 2},
        {"report_to": ("tensorboard",)},
    ],
)
def test_some_fields_may_change(change: dict[str, Any], begun: Path) -> None:
    opened(begun, **change).close()
    settings = json.loads((begun / "config.json").read_text())["settings"]
    assert all(settings[name] == json.loads(json.dumps(value)) for name, value in change.items())


def test_the_order_of_settings_in_a_config_is_free(begun: Path) -> None:
    """Runs of older versions have their settings in another order."""
    config = json.loads((begun / "config.json").read_text())
    backwards = {name: config["settings"][name] for name in reversed(config["settings"])}
    (begun / "config.json").write_text(json.dumps(config | {"settings": backwards}))
    opened(begun).close()
    assert json.loads((begun / "config.json").read_text()) == config


def test_a_step_may_be_split_otherwise(tmp_path: Path) -> None:
    run = opened(tmp_path, batch_size=2, gradient_accumulation_steps=3, processes=4)
    run.save(at(1), keep=1)
    run.close()
    opened(tmp_path, batch_size=8, gradient_accumulation_steps=1, processes=3).close()


def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.log({"step": 1, "loss": 1.0})
    run.close()
    opened(tmp_path, learning_rate=0.5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("name", ["result", "samples", "checkpoints"])
def test_a_folder_of_something_else_is_not_written_into(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(TrainingError, match="holds files that are of no run of sdkit; name another out_dir"):
        opened(tmp_path)


@pytest.mark.parametrize("content", ['{"_class_name": "AutoencoderKL"}', "[]", "{", "[" * 100_000])
def test_a_models_folder_is_not_written_into(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(TrainingError, match="holds files that are of no run of sdkit"):
        opened(tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_what_killed_processes_left_is_removed(begun: Path) -> None:
    for folder in (begun / ".sdkit-0123", begun / "checkpoints" / ".sdkit-4567"):
        folder.mkdir()
        (folder / "half.safetensors").touch()
    opened(begun).close()
    assert not [*begun.rglob(".sdkit-*")]


@pytest.mark.parametrize("name", ["config.json", ".lock", "checkpoints", "metrics.jsonl"])
def test_what_is_no_file_or_no_folder_is_told_by_its_name(name: str, begun: Path) -> None:
    path = begun / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.touch() if name == "checkpoints" else path.mkdir()
    with pytest.raises(
        SdkitError,
        match=rf"{re.escape(name)}.*(is a directory|not a directory|it is a folder)|"
        rf"(is a directory|not a directory) \({re.escape(name)}\)",
    ):
        opened(begun)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result/training.json"])
def test_pipes_in_a_run_folder_are_not_waited_for(name: str, begun: Path) -> None:
    (begun / "result").mkdir(exist_ok=True)
    (begun / name).unlink(missing_ok=True)
    os.mkfifo(begun / name)
    if name == "result/training.json":
        run = RunFolder(begun)
        assert run.open(ToySettings(), 1).exported == -1
        run.close()
    else:
        with pytest.raises(SdkitError, match="regular file"):
            opened(begun)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", '{"step": "x"}', '{"step": true}', '{"step": null}', ""])
def test_a_result_whose_step_cannot_be_known_is_made_anew(content: str, begun: Path) -> None:
    (begun / "result").mkdir()
    (begun / "result" / "training.json").write_text(content)
    run = RunFolder(begun)
    assert run.open(ToySettings(), 1).exported == -1
    run.close()


def test_a_stale_lock_holds_nobody_up(begun: Path) -> None:
    (begun / ".lock").write_text("4194304")  # as left by a killed process
    opened(begun).close()


def test_values_of_a_foreign_run_are_quoted_in_short(begun: Path) -> None:
    config = json.loads((begun / "config.json").read_text())
    config["settings"]["learning_rate"] = "\x1b[2J{now}" * 10_000
    (begun / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=r"learning_rate was .*\.\.\., is 0.01; name another out_dir") as caught:
        opened(begun)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("out", ["a\0b", "n" * 300, "\ud800"])
def test_names_that_no_folder_can_have(out: str, tmp_path: Path) -> None:
    with pytest.raises(SdkitError):
        opened(tmp_path / out)
