from __future__ import annotations

import errno
import json
import os
import random
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

from sdkit.errors import TrainingError
from sdkit.training import Player, Trained
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
    whole_folder,
)
from sdkit.training.run_folder import RunFolder, read_metrics

from .toy import ToySettings

CPU = torch.device("cpu")


def at(step: int) -> Checkpoint:
    tensors = {"weights": {"w": torch.full((50,), float(step))}, "rng": {"state": torch.arange(9)}}
    return Checkpoint(step=step, tensors=tensors, state={"skipped": [step, 0]})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# Folders, whole or not at all


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "sub" / "result") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text(text)
            assert not (tmp_path / "sub" / "result").exists() or text == "new"
    assert (tmp_path / "sub" / "result" / "deep" / "file").read_text() == "new"
    assert names(tmp_path / "sub") == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_body_that_fails_leaves_the_old_folder(error: type[BaseException], tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "result") as folder:
            (folder / "file").write_text("new")
            raise error

    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "file").write_text("old")
    with pytest.raises(TrainingError if error is OSError else error):
        fill()
    assert names(tmp_path) == ["result"]
    assert (tmp_path / "result" / "file").read_text() == "old"


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path) -> None:
    """safetensors alone gives its files to their owner only."""
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "result") as folder:
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
    save(tmp_path, at(15), keep=2)  # 20 and 30 were damaged, so the run went on from 10
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_the_old_one_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """Known defect: the old checkpoint is deleted first. A tensor that cannot be written ends the saving."""
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


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "the checksum of weights.safetensors is wrong": lambda folder: flip(folder / "weights.safetensors"),
    "the checksum of rng.safetensors is wrong": lambda folder: os.truncate(folder / "rng.safetensors", 20),
    "the checksum of state.json is wrong": lambda folder: (folder / "state.json").write_text("{}"),
    "weights.safetensors is missing": lambda folder: (folder / "weights.safetensors").unlink(),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").write_text('{"sha256": {"weig'),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_damaged_newest_one_is_passed_over_with_a_sentence(sentence: str, tmp_path: Path) -> None:
    """Known defect: "latest" may be a partial checkpoint."""
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


# What training changes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))


def trained(net: nn.Module) -> Trained:
    def loss(
        networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return networks["net"](batch["x"]).square().mean(), {}

    player = Player("net", net, loss, learning_rate=0.1, ema=True)
    return Trained(player, ToySettings(), Accelerator(cpu=True))


def steps(t: Trained, count: int) -> None:
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


def test_optimizer_state_that_is_no_tensor_is_kept(tmp_path: Path) -> None:
    """8-bit AdamW counts its steps in an int."""
    one, other = trained(network()), trained(network())
    steps(one, 1)
    one.optimizer.state[one.parameters[0]]["count"] = 3
    table = torch.arange(256.0)  # of which all parameters have the same one
    for parameter in one.parameters:
        one.optimizer.state[parameter]["qmap1"] = table
    folder = save(tmp_path, snapshot([one], Accelerator(cpu=True), 1, (0, 0)), keep=1)
    restore([other], Accelerator(cpu=True), load(folder))
    assert other.optimizer.state[other.parameters[0]]["count"] == 3
    assert all(torch.equal(other.optimizer.state[parameter]["qmap1"], table) for parameter in other.parameters)


def test_the_learning_rate_is_that_of_the_settings(tmp_path: Path) -> None:
    one, other = trained(network()), trained(network())
    steps(one, 1)
    other.optimizer.param_groups[0]["lr"] = 0.7
    restore([other], Accelerator(cpu=True), snapshot([one], Accelerator(cpu=True), 1, (0, 0)))
    assert other.optimizer.param_groups[0]["lr"] == 0.7


def test_a_checkpoint_that_cannot_be_removed_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS, one that somebody has open."""

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

    for _ in range(2):  # Gaussian numbers come in pairs, of which the second waits
        draw()
        state = rng_state(CPU)
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        first = draw()
        set_rng_state(state, CPU)
        assert draw() == first
        random.gauss(0, 1)
        np.random.normal()  # noqa: NPY002


# The run's folder


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
    """The folder of a run of three steps, of which the second was saved."""
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
    """Some file systems tell of a quota only then."""

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
        file.write('{"step": 4, "lo')  # where the process was killed
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


@pytest.mark.parametrize("content", ['{"_class_name": "AutoencoderKL"}', "[]", "{"])
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
