from __future__ import annotations

import json
import math
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from sdkit.errors import ArgumentError, DataError, TrainingError
from sdkit.training import loop
from sdkit.training.batches import loaded_ahead, samples_of
from sdkit.training.checkpoint import checkpoints, newest
from sdkit.training.distributed import make_accelerator
from sdkit.training.run_folder import read_metrics
from sdkit.training.settings import LR_SCHEDULERS, LoopSettings
from tests.helpers import forks, toy
from tests.helpers.toy_runs import (
    RUN,
    difference,
    everything,
    files,
    fit,
    last,
    logged,
    metrics,
    one_thread,  # noqa: F401
    process,
    rank,
    said,
    train,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(out, RUN) == 0
    return out


# Interrupting and resuming


@pytest.mark.parametrize(
    "hook",
    [
        "SIGKILL batch 2",  # before anything is saved
        "SIGKILL generator 6",  # among the micro-batches of a step
        "SIGKILL discriminator 3",  # between the steps of the players
        "SIGKILL validate 2",
        "SIGKILL os.mkdir:.sdkit- 2",  # a checkpoint has been begun
        "SIGKILL open:state.json 2",  # its tensors are written
        "SIGKILL open:manifest.json 2",  # all but its checksums are written
        "SIGKILL os.rename:step- 2",  # it is complete, but not renamed yet
        "SIGKILL os.rename:step- 3",  # it is in place beside the old one
        "SIGKILL os.remove:.safetensors 3",  # the old one is partly removed
        "SIGKILL export 1",
        "SIGKILL validate 1;SIGKILL os.rename:step- 4",
    ],
)
def test_a_killed_run_ends_as_one_never_stopped_to_the_bit(hook: str, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    while hook:  # kill the run, resume it, and kill it again
        first, _, hook = hook.partition(";")
        assert train(out, RUN, first) == -signal.SIGKILL
        assert not (out / "result").exists()
        # Guards against a common defect: the old checkpoint is deleted before the new one is complete.
        if "os.re" in first:
            assert newest(out / "checkpoints")
    assert train(out, RUN) == 0
    assert everything(out) == everything(uninterrupted)
    assert not [*tmp_path.rglob(".sdkit-*")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_pass_and_leaves_a_checkpoint(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    """Micro-batches of the interrupted step must leave no trace: no gradients, random numbers, or batch statistics."""
    assert train(tmp_path / "run", RUN, f"{number.name} generator 3") == 128 + number  # in the first half of step 2
    assert newest(tmp_path / "run" / "checkpoints").name == "step-00000001"  # type: ignore[union-attr]
    assert "stopped after step 1, with a checkpoint" in said(tmp_path / "run")
    assert train(tmp_path / "run", RUN, f"{number.name} generator 2") == 128 + number  # in the second half of step 2
    assert newest(tmp_path / "run" / "checkpoints").name == "step-00000002"  # type: ignore[union-attr]
    assert train(tmp_path / "run", RUN, f"{number.name} batch 3") == 128 + number  # while it is being loaded
    assert train(tmp_path / "run", RUN, f"{number.name} validate 1") == 128 + number  # during the validation of step 4
    assert train(tmp_path / "run", RUN) == 0
    assert everything(tmp_path / "run") == everything(uninterrupted)


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    assert train(tmp_path / "run", RUN, "SIGINT generator 5;SIGTERM generator 5;SIGINT generator 5") == 130
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


def test_a_damaged_newest_checkpoint_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    settings = RUN | {"keep_checkpoints": 3}
    assert train(tmp_path / "run", settings, "SIGKILL generator 14") == -signal.SIGKILL
    *_, before, damaged = sorted(checkpoints(tmp_path / "run" / "checkpoints"))
    content = bytearray((damaged / "generator.ema.safetensors").read_bytes())
    content[-3] ^= 1
    (damaged / "generator.ema.safetensors").write_bytes(content)
    with pytest.warns(
        UserWarning, match=rf"{damaged} is damaged \(the checksum of generator.ema.safetensors is wrong\)"
    ):
        fit(tmp_path / "run", **RUN)
    assert before.name == "step-00000004"
    assert everything(tmp_path / "run") == everything(uninterrupted)


def test_a_full_disk_leaves_the_last_good_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", RUN, "FSIZE generator 6") == 2
    assert "checkpoints/step-00000004: " in said(tmp_path / "run")
    assert "what was there before is untouched" in said(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(tmp_path / "run", RUN) == 0
    assert everything(tmp_path / "run") == everything(uninterrupted)


def test_a_finished_run_is_left_alone_and_says_so(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(uninterrupted)
    stage = fit(uninterrupted, **RUN)
    assert files(uninterrupted) == before
    assert not stage.calls
    assert capsys.readouterr().err == f"{uninterrupted} is finished: step 9, see {uninterrupted / 'result'}.\n"


def test_more_steps_go_on_from_the_end_and_replace_the_result(tmp_path: Path) -> None:
    constant = RUN | {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    fit(tmp_path / "whole", **constant)
    fit(tmp_path / "parts", **constant | {"max_steps": 5})
    short = files(tmp_path / "parts" / "result")
    fit(tmp_path / "parts", **constant)
    assert files(tmp_path / "parts" / "result") == files(tmp_path / "whole" / "result") != short
    assert files(tmp_path / "parts" / "checkpoints") == files(tmp_path / "whole" / "checkpoints")


def test_resuming_sees_each_sample_of_each_epoch_once(tmp_path: Path) -> None:
    """Guards against a common defect: resuming starts the epoch again."""
    settings = RUN | {"lr_scheduler": "constant", "lr_warmup_steps": 0, "max_steps": 10}
    one = fit(tmp_path / "run", **settings | {"max_steps": 4})  # 16 of 20 samples, so in the middle of the second epoch
    two = fit(tmp_path / "run", **settings)
    # Sorted, because samples are loaded in several threads.
    numbers, items = zip(*sorted(one.samples + two.samples), strict=True)
    assert list(numbers) == list(range(40))
    epochs = [items[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4  # each epoch has another order


# One step


def test_validation_does_not_touch_training(uninterrupted: Path, tmp_path: Path) -> None:
    """Validation that draws random numbers must not change training, so that runs stay comparable."""
    fit(tmp_path / "run", **RUN | {"validate_every": 1})
    assert files(tmp_path / "run" / "checkpoints") == files(uninterrupted / "checkpoints")
    assert [line["step"] for line in metrics(tmp_path / "run") if "validation/mse" in line] == list(range(10))
    assert [line["step"] for line in metrics(uninterrupted) if "validation/mse" in line] == [0, 4, 8, 9]


def test_validation_and_result_are_of_the_averaged_weights(tmp_path: Path) -> None:
    stage = fit(tmp_path / "run", max_steps=4, ema_decay=0.5)
    averages, result = (
        last(tmp_path / "run", "generator.ema"),
        load_file(tmp_path / "run" / "result" / "toy.safetensors"),
    )
    assert averages.pop("num_updates") == 4
    assert all(torch.equal(averages[name], result[name]) for name in averages)
    assert difference(averages, {name: last(tmp_path / "run", "generator")[name] for name in averages}) > 1e-3
    stage.generator.load_state_dict(result)
    stage.generator.eval()
    with torch.no_grad():
        mse = stage.validate(4)["mse"]
    assert mse == logged(tmp_path / "run", "validation/mse")[-1]


def test_only_what_requires_gradients_is_trained_and_saved(tmp_path: Path) -> None:
    """Guards against a common defect: `module.requires_grad = False` freezes nothing."""
    untouched = toy.Toy(toy.ToySettings()).generator.state_dict()
    stage = fit(tmp_path / "run", max_steps=3)
    moved = {name for name, value in stage.generator.state_dict().items() if not torch.equal(value, untouched[name])}
    assert moved == {"0.weight", "4.weight", "4.bias"} == set(last(tmp_path / "run", "generator"))
    state = last(tmp_path / "run", "generator.optimizer")
    assert set(state) == {f"{name}/{entry}" for name in moved for entry in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rates_follow_the_schedule_in_each_players_own_optimizer_steps(name: str, tmp_path: Path) -> None:
    """Guards against common defects: one step count for generator and discriminator, and counting micro-batches."""
    warmup = 0 if name == "constant" else 2
    settings = {"lr_scheduler": name, "lr_warmup_steps": warmup, "max_steps": 8, "discriminator_starts_at": 3}
    fit(tmp_path / "run", gradient_accumulation_steps=2, **settings)
    for key, rate, steps in (("lr", 1e-2, 8), ("discriminator/lr", 5e-3, 5)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        expected = []
        for _ in range(steps):
            expected += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        assert logged(tmp_path / "run", key) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_clipping_clips(limit: float | None, tmp_path: Path) -> None:
    """Guards against a common defect: clipping an exhausted iterator. AdamW's average after one step is 0.1 times the
    gradient, from which the clipped norm follows.
    """
    fit(tmp_path / "run", max_steps=1, max_grad_norm=limit, gradient_accumulation_steps=2)
    for player, prefix in (("generator", ""), ("discriminator", "discriminator/")):
        state = last(tmp_path / "run", f"{player}.optimizer")
        taken = [10 * value.flatten() for name, value in state.items() if name.endswith("exp_avg")]
        (norm,) = logged(tmp_path / "run", f"{prefix}grad_norm")
        assert norm > 0.1
        assert float(torch.cat(taken).norm()) == pytest.approx(limit or norm, rel=1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    plain = {"max_steps": 5, "max_grad_norm": None}
    fit(tmp_path / "4", batch_size=4, **plain)
    fit(tmp_path / "1", gradient_accumulation_steps=4, **plain)
    for name in ("generator", "generator.ema", "discriminator"):
        assert difference(last(tmp_path / "4", name), last(tmp_path / "1", name)) < 1e-5


def test_weights_and_averages_are_float32_whatever_the_network_came_in(tmp_path: Path) -> None:
    """Guards against a common defect: in half precision, small steps of weights and averages round to nothing."""
    before = toy.Toy(toy.ToySettings(half=True)).generator[0].weight.detach().float()
    fit(tmp_path / "run", half=True, max_steps=1, learning_rate=1e-6, mixed_precision="bf16")
    for name in ("generator", "generator.ema", "generator.optimizer"):
        assert {value.dtype for key, value in last(tmp_path / "run", name).items() if key != "num_updates"} == {
            torch.float32
        }
    moved = (last(tmp_path / "run", "generator")["0.weight"] - before).abs()
    assert float(moved.median()) == pytest.approx(1e-6, rel=0.05)  # AdamW's first step equals the learning rate


def test_the_first_player_lets_the_second_ones_gradients_alone(tmp_path: Path) -> None:
    """The generator's loss passes through the discriminator, but must not add to the discriminator's gradients."""
    stage = fit(tmp_path / "run", max_steps=1, max_grad_norm=None)
    fresh = toy.Toy(stage.settings)
    batch = fresh.batch(stage.samples)
    fresh.generator_loss({"generator": fresh.generator, "discriminator": fresh.discriminator}, batch, 0)
    loss, _ = fresh.discriminator_loss({"discriminator": fresh.discriminator}, batch, 0)
    loss.backward()
    state = last(tmp_path / "run", "discriminator.optimizer")
    for name, p in fresh.discriminator.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(10 * state[f"{name}/exp_avg"], p.grad)


def test_a_gradient_scaler_finds_its_scale_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16's gradient scaler, here on the CPU, with two players and accumulation. Steps that overflow must change
    nothing.
    """

    def scaled(settings: LoopSettings, out_dir: Path) -> Accelerator:
        accelerator = make_accelerator(settings, out_dir)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=40)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", scaled)

    def train(out: Path, steps: int) -> None:
        settings = toy.ToySettings(max_steps=steps, save_every=1, keep_checkpoints=20, gradient_accumulation_steps=2)
        loop.fit(toy.Toy(settings), settings, out)

    train(tmp_path / "whole", 16)
    train(tmp_path / "parts", 3)
    train(tmp_path / "parts", 16)
    assert files(tmp_path / "parts" / "checkpoints") == files(tmp_path / "whole" / "checkpoints")
    overflowed = [line["grad_norm"] is None for line in metrics(tmp_path / "whole") if "loss" in line]
    assert overflowed[0]
    assert not overflowed[-1]
    assert not any("skipped" in line for line in metrics(tmp_path / "whole"))
    *_, first = checkpoints(tmp_path / "whole" / "checkpoints")
    fresh = toy.Toy(toy.ToySettings()).generator[0].weight
    assert torch.equal(load_file(first / "generator.safetensors")["0.weight"], fresh)
    assert last(tmp_path / "whole", "generator.ema")["num_updates"] == 16 - sum(overflowed)


def test_an_overflow_in_float16_skips_the_update_and_halves_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's gradient scaler, with float16 autocast on the CPU. The third step's gradient is not finite: weights,
    optimizer, and moving average must stay as they were, and a resumed run must continue at the halved scale.
    """
    dtypes: set[torch.dtype] = set()

    def scaled(settings: LoopSettings, out_dir: Path) -> Accelerator:
        accelerator = make_accelerator(settings, out_dir)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", scaled)

    def train(out: Path, steps: int) -> None:
        settings = toy.ToySettings(
            max_steps=steps, save_every=1, keep_checkpoints=20, steep_samples=(2,), ema_decay=0.5, discriminator=False,
            lr_scheduler="constant_with_warmup", lr_warmup_steps=5,
        )  # fmt: skip
        stage = toy.Toy(settings)
        stage.generator[4].register_forward_hook(lambda _, args, output: dtypes.add(output.dtype))
        loop.fit(stage, settings, out)

    train(tmp_path / "whole", 8)
    assert torch.float16 in dtypes
    for stop in (3, 8):  # the first run ends right after the overflow
        train(tmp_path / "parts", stop)
    assert files(tmp_path / "parts" / "checkpoints") == files(tmp_path / "whole" / "checkpoints")

    saved = dict(enumerate(reversed(checkpoints(tmp_path / "whole" / "checkpoints")), 1))
    for name in ("generator", "generator.optimizer", "generator.ema"):
        assert [files(saved[step])[f"{name}.safetensors"] for step in (2, 3)] == 2 * [
            files(saved[2])[f"{name}.safetensors"]
        ]
        assert files(saved[4])[f"{name}.safetensors"] != files(saved[3])[f"{name}.safetensors"]
    scalers = [json.loads((saved[step] / "state.json").read_text())["scaler"] for step in saved]
    # Three good steps in a row double the scale: those after the overflow, not the two before it.
    assert [state["scale"] for state in scalers] == [1024, 1024, 512, 512, 512, 1024, 1024, 1024]
    assert [state["_growth_tracker"] for state in scalers] == [1, 2, 0, 1, 2, 0, 1, 2]

    lines = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [3]
    assert not any("skipped" in line for line in lines)  # a scaler that looks for its scale is no bad data
    # The learning rate depends on the number of the step, whether or not the step is skipped.
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * min(1, step / 5) for step in range(8)])
    assert last(tmp_path / "whole", "generator.ema")["num_updates"] == 7
    steps = {float(v) for k, v in last(tmp_path / "whole", "generator.optimizer").items() if k.endswith("/step")}
    assert steps == {7.0}


# Losses that are not finite


@pytest.mark.parametrize("kind", ["nan_samples", "steep_samples"])
def test_a_step_without_a_finite_loss_is_skipped_counted_and_named(kind: str, tmp_path: Path) -> None:
    """Sample 5 is in the second half of step 2. The whole step must leave no trace, not even in
    BatchNorm's statistics.
    """
    settings = RUN | {"max_steps": 2, "discriminator": False, kind: (5,), "lr_warmup_steps": 0, "save_every": 1}
    settings |= {"keep_checkpoints": 2}
    item = samples_of(toy.ToySettings(**settings), 1, 0, 0, 1, 10)[1][1]
    with pytest.warns(UserWarning, match="step 2 is skipped: the loss or its gradient is not finite") as caught:
        fit(tmp_path / "run", **settings)
    assert f"example-{item}.png" in str(caught[0].message)
    named = str(caught[0].message).count(".png")
    # Losses are checked for each micro-batch, gradients only for the whole step.
    assert named == (2 if kind == "nan_samples" else 4)
    line = next(line for line in metrics(tmp_path / "run") if line["step"] == 2)
    assert line["skipped"] == 1
    assert line["loss" if kind == "nan_samples" else "grad_norm"] is None
    two, one = (files(folder) for folder in checkpoints(tmp_path / "run" / "checkpoints"))
    for name in ("generator", "generator.optimizer", "generator.ema"):
        assert one[f"{name}.safetensors"] == two[f"{name}.safetensors"]


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_files_names(tmp_path: Path) -> None:
    settings = {
        "max_steps": 40,
        "batch_size": 2,
        "save_every": 5,
        "nan_samples": tuple(range(6, 100)),
    }  # from step 4 on
    files_named = r"in 10 steps in a row .* \(example-\d.png, example-\d.png\); look at them, or lower"
    with pytest.raises(TrainingError, match=files_named), pytest.warns(UserWarning, match="is skipped"):
        fit(tmp_path / "run", **settings)
    assert [line["skipped"] for line in metrics(tmp_path / "run") if "skipped" in line] == list(range(1, 11))
    with pytest.raises(TrainingError, match=files_named), pytest.warns(UserWarning, match="is skipped"):
        fit(tmp_path / "run", **settings)  # continues the count from the checkpoint of step 10
    assert metrics(tmp_path / "run")[-1] | {"step": 13, "skipped": 10} == metrics(tmp_path / "run")[-1]


def test_good_steps_between_bad_ones_keep_a_run_going(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="is skipped"):
        fit(tmp_path / "run", max_steps=30, discriminator=False, nan_samples=tuple(n for n in range(30) if n % 5))
    assert metrics(tmp_path / "run")[-2]["skipped"] == 24


# Several processes


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Launch two processes, which train several runs one after another."""
    folder = tmp_path_factory.mktemp("launched")
    plain = {"max_steps": 6, "batch_size": 2, "lr_scheduler": "linear", "validate_every": 3}
    dropout = RUN | {
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "batch_norm": False,
    }
    scenarios: list[dict[str, Any]] = [
        {"out": "plain", "settings": plain},
        {"out": "whole", "settings": dropout},
        {"out": "parts", "settings": dropout | {"max_steps": 5}},
        {"out": "parts", "settings": dropout},
        {"out": "nan", "settings": plain | {"nan_samples": [6]}},  # in step 2, on the second process
        {"out": "stopped", "settings": plain, "hooks": {"1": "SIGTERM generator 2"}},
        {"out": "other", "settings": plain},
        {"out": "other", "settings": plain | {"learning_rate": 1.0}},
    ]
    for scenario in scenarios:
        scenario["out"] = str(folder / scenario["out"])
    ended = forks.launch(toy.launched, scenarios)
    assert ended.codes == [0, 0], ended.err
    return folder


@pytest.mark.parametrize("split", [{"batch_size": 4}, {"batch_size": 2, "gradient_accumulation_steps": 2}])
def test_two_processes_train_as_one(split: dict[str, int], launched: Path, tmp_path: Path) -> None:
    """Guards against common defects: a learning-rate schedule stepped once per process, and data that is
    not sharded.
    """
    fit(tmp_path / "run", max_steps=6, lr_scheduler="linear", validate_every=3, **split)
    many, one = metrics(launched / "plain"), metrics(tmp_path / "run")
    assert [line.keys() for line in many] == [line.keys() for line in one]
    for key in {key for line in one for key in line}:
        assert logged(launched / "plain", key) == pytest.approx(logged(tmp_path / "run", key), abs=1e-5, rel=1e-5)
    for name in ("generator", "generator.ema", "discriminator"):
        assert difference(last(launched / "plain", name), last(tmp_path / "run", name)) < 1e-5


def test_gradients_of_both_players_are_reduced(launched: Path) -> None:
    """Guards against a common defect: networks called without DDP's wrapper, so that the ranks drift apart."""
    for name in ("plain", "whole", "nan"):
        (_, zero), (_, one) = rank(launched / name, 0), rank(launched / name, 1)
        assert {key.split("/")[0] for key in zero} == {"generator", "discriminator"}
        assert difference(zero, one) == 0


def test_processes_share_the_data_and_validation_and_one_writes(launched: Path) -> None:
    """Guards against common defects: no sharding, validation on the first process only, and every process writing the
    result.
    """
    (zero, _), (one, _) = rank(launched / "plain", 0), rank(launched / "plain", 1)
    assert sorted(n for n, _ in zero["samples"] + one["samples"]) == list(range(24))
    assert zero["calls"]["validate"] == one["calls"]["validate"] == 3
    assert zero["calls"]["export"] == 1
    assert "export" not in one["calls"]


def test_every_process_resumes_with_its_own_random_numbers(launched: Path) -> None:
    """Guards against common defects: saving only the first process's random state, and one seed for all processes."""
    (weights, result, lines), whole = everything(launched / "parts"), everything(launched / "whole")
    assert (weights, result) == whole[:2]
    assert [line for line in lines if "loss" in line] == [line for line in whole[2] if "loss" in line]
    assert json.loads((launched / "parts" / "rank-1.json").read_text())["calls"]["generator"] == 4  # steps 6 to 9
    rng = last(launched / "whole", "rng")
    assert not torch.equal(rng["0/torch"], rng["1/torch"])


def test_processes_agree_to_skip_and_to_stop(launched: Path) -> None:
    (skipped,) = (line for line in metrics(launched / "nan") if "skipped" in line)
    assert skipped["step"] == 2
    (zero, _), (one, _) = rank(launched / "stopped", 0), rank(launched / "stopped", 1)
    assert zero["exit_code"] == one["exit_code"] == 143
    assert [path.name for path in checkpoints(launched / "stopped" / "checkpoints")] == ["step-00000002"]


def test_an_error_of_the_first_process_ends_all_alike(launched: Path) -> None:
    (zero, _), (one, _) = rank(launched / "other", 0), rank(launched / "other", 1)
    assert zero["exit_code"] == one["exit_code"] == 2
    assert zero["error"] == one["error"]
    assert "learning_rate was 0.01, is 1.0" in one["error"]


def test_a_run_goes_on_with_another_number_of_processes(launched: Path, tmp_path: Path) -> None:
    """The number of processes may change on resume if the samples in an optimizer step stay as many."""
    plain = {"max_steps": 6, "lr_scheduler": "linear", "validate_every": 3}
    fit(launched / "stopped", batch_size=4, **plain)
    fit(tmp_path / "whole", batch_size=4, **plain)
    for name in ("generator", "discriminator"):
        assert difference(last(launched / "stopped", name), last(tmp_path / "whole", name)) < 1e-5


# Around the loop


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    first = process(tmp_path / "run", RUN, "SIGSTOP generator 3")
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.02)
        with pytest.raises(TrainingError, match=f"another process trains in {tmp_path / 'run'}; wait for it"):
            fit(tmp_path / "run", **RUN)
    finally:
        first.kill()
        first.join()
    fit(tmp_path / "run", **RUN)  # a killed process holds no lock


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot train in .*/file/run: not a directory; name a folder"):
        fit(tmp_path / "file" / "run")
    # The reason differs for an ordinary user, for root, and in a container.
    denied = "(permission denied|operation not permitted|read-only file system)"
    with pytest.raises(TrainingError, match=f"cannot train in /sys/sdkit-run: {denied}; name a folder that can be"):
        fit(Path("/sys/sdkit-run"))


def test_a_tracker_gets_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory, tracker, heard = "recorder", False, None, []

        def __init__(self, run_name: str) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.heard.append((None, values))

        def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
            self.heard.append((step, values))

        def finish(self) -> None:
            self.heard.append(("finished", {}))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    fit(tmp_path / "run", max_steps=2, report_to=("recorder",))
    (first, settings), *lines, (end, _) = Recorder.heard
    assert (first, end, settings["learning_rate"]) == (None, "finished", 1e-2)
    assert [{"step": step, **values} for step, values in lines] == read_metrics(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"report_to": "nothing"}, "nothing"),
        (
            {"report_to": ("comet_ml",)},
            "report_to names 'comet_ml', which is not installed; install it, or leave it out",
        ),
        ({"mixed_precision": "fp16"}, "mixed_precision 'fp16' needs a GPU; use 'bf16' or 'no'"),
        ({"use_8bit_adam": True}, "use_8bit_adam needs bitsandbytes; install it, or leave it off"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-9}, "lr_scheduler polynomial: lr_end"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_sentence(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and "mixed_precision" in settings:
        pytest.skip("this machine can")
    with pytest.raises(ArgumentError, match=sentence):
        fit(tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, not 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, not 1.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be"),
        ({"save_every": 0}, "save_every must be"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be"),
        ({"validate_every": -1}, "validate_every must be"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps must be"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2147483647, not -1"),
        ({"ema_decay": 1.1}, "ema_decay must be a number from 0 to 1, not 1.1"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be"),
        ({"max_grad_norm": 0}, "max_grad_norm must be"),
        ({"report_to": [7]}, "report_to must be a string or a list of at least one string"),
        ({"mixed_precision": "fp8"}, "mixed_precision 'fp8' is not one of 'no', 'bf16', 'fp16'"),
        ({"lr_scheduler": "sawtooth"}, "lr_scheduler 'sawtooth' is not one of 'constant'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        toy.ToySettings(**settings)


def test_an_error_in_a_loading_thread_ends_the_run_with_it(tmp_path: Path) -> None:
    def broken(name: str, k: int) -> None:
        if (name, k) == ("batch", 3):
            raise DataError("there is no image left.")

    with pytest.raises(DataError, match="there is no image left"):
        fit(tmp_path / "run", broken)


def test_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    """Notebooks and servers train in other threads, in which signal handlers cannot be set."""
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=fit, args=(tmp_path / "run",), kwargs={"max_steps": 2})
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "result").is_dir()
    fit(tmp_path / "other", max_steps=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_bar_shows_loss_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        text = ""
        encoding = "utf-8"

        def write(self, text: str) -> None:
            Terminal.text += text

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    fit(tmp_path / "run", at=lambda name, k: time.sleep(0.06), max_steps=4)
    assert "training:  50%|" in Terminal.text
    assert re.search(r"2/4 \[\d\d:\d\d<\d\d:\d\d, ", Terminal.text)
    assert "it/s, loss=" in Terminal.text


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_for_a_gpu_are_pinned_and_otherwise_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: set[int] = set()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        kept.append(copy)
        return copy

    kept: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    settings = toy.ToySettings(max_steps=7, batch_size=3, gradient_accumulation_steps=2)
    stage = toy.Toy(settings)
    monkeypatch.setattr(stage, "batch", lambda samples: {**toy.Toy.batch(stage, samples), "parts": [stage.x[:2], 5]})
    with loaded_ahead(stage, settings, 2, 0, 1, torch.device(kind)) as batches:
        loaded = list(batches)
    assert [samples for samples, _ in loaded] == [
        samples_of(settings, s, i, 0, 1, 10) for s in range(2, 7) for i in (0, 1)
    ]
    for samples, batch in loaded:
        expected = stage.batch(samples)
        assert batch.keys() == expected.keys()
        assert (batch["n"], batch["parts"][1]) == (expected["n"], 5)
        for ours, own in ((batch["x"], expected["x"]), (batch["y"], expected["y"]), (batch["parts"][0], stage.x[:2])):
            assert torch.equal(ours, own)
            assert (ours.data_ptr() in pinned) == (kind == "cuda")


def test_settings_may_be_numpy_s(tmp_path: Path) -> None:
    """NumPy's numbers are accepted, and make the same run as Python's."""
    import numpy as np

    fit(tmp_path / "run", batch_size=np.int64(2), seed=np.int64(3), max_steps=1)
    fit(tmp_path / "run", batch_size=2, seed=3, max_steps=2)
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]


def test_a_player_that_would_begin_after_the_end(tmp_path: Path) -> None:
    fit(tmp_path / "run", max_steps=2, discriminator_starts_at=2, lr_scheduler="polynomial")
