"""Fully sharded data parallelism: two processes, each with half of every weight, must train as one process does."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sdkit.errors import ArgumentError
from sdkit.training import UNetConfig, VAEConfig, loop, train_unet, train_vae
from sdkit.training.checkpoint import checkpoints
from tests.helpers import forks, sharded, tiny
from tests.helpers.toy_runs import RUN, difference, everything, fit, last, logged, metrics, one_thread, rank  # noqa: F401

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
machine_rank: 0
main_process_port: 0
num_machines: 1
num_processes: 2
"""
PLAIN: dict[str, Any] = {"max_steps": 6, "batch_size": 2, "lr_scheduler": "linear", "validate_every": 3}
DROPOUT = RUN | {"lr_scheduler": "constant", "lr_warmup_steps": 0}
UNET: dict[str, Any] = {"max_steps": 3, "batch_size": 2}
UNETS: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "unwrapped": UNET,
    "frozen": UNET | {"frozen": True},
    "half": UNET | {"frozen": True, "mixed_precision": "bf16"},
}


def stage(folder: Path, out: str, batch_size: int) -> dict[str, Any]:
    settings = {"model": folder / "model", "data": folder / "photos", "out_dir": folder / out, "batch_size": batch_size}
    return {"max_steps": 3, **{key: value if isinstance(value, int) else str(value) for key, value in settings.items()}}


def vae(folder: Path, out: str, batch_size: int) -> dict[str, Any]:
    return stage(folder, out, batch_size) | {"disc_weight": 0.5, "disc_start": 1, "lpips_weight": 0, "ema_decay": 0}


def vq(folder: Path, out: str, batch_size: int) -> dict[str, Any]:
    """Return settings that train a codebook from scratch, whose codes die soon."""
    shape = {
        "_class_name": "VQModel", "num_vq_embeddings": 16, "block_out_channels": [16] * 3, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 4, "sample_size": tiny.SIZE, "mid_block_add_attention": False,
    }  # fmt: skip
    (folder / "shape.json").write_text(json.dumps(shape))
    own = {"init": str(folder / "shape.json"), "regularizer": "vq", "codebook_decay": 0.05}
    return stage(folder, out, batch_size) | own | {"lpips_weight": 0, "ema_decay": 0}


def lora(folder: Path, out: str, batch_size: int) -> dict[str, Any]:
    extra = {"lora_rank": 2, "train_text_encoder": True, "gradient_checkpointing": True}
    return stage(folder, out, batch_size) | extra | {"validation_prompts": ["a red disc"]}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Launch two processes, which train several runs one after another.

    PyTorch's collectives on CPUs, which stand in for GPUs here, have once ended a process by a segmentation fault, in
    one of hundreds of launches. All is then launched anew, once.
    """
    folder, ended = _launched(tmp_path_factory)
    if -signal.SIGSEGV in ended.codes:
        folder, ended = _launched(tmp_path_factory)
    assert ended.codes == [0, 0], ended.err
    return folder


def _launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, forks.Ended]:
    folder = tmp_path_factory.mktemp("launched")
    fit(folder / "begun", **PLAIN | {"batch_size": 4, "max_steps": 3, "lr_scheduler": "constant"})
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 8)
    scenarios: list[dict[str, Any]] = [
        {"out": "plain", "settings": PLAIN},
        {"out": "accumulated", "settings": PLAIN | {"gradient_accumulation_steps": 2, "batch_size": 1}},
        {"out": "bf16", "settings": PLAIN | {"mixed_precision": "bf16", "half": True}},
        {"out": "scaled", "scaled": PLAIN | {"max_steps": 12}},
        {"out": "whole", "settings": DROPOUT},
        {"out": "parts", "settings": DROPOUT | {"max_steps": 5}},
        {"out": "parts", "settings": DROPOUT},
        {"out": "begun", "settings": PLAIN | {"lr_scheduler": "constant"}},
        {"out": "nan", "settings": PLAIN | {"nan_samples": [6], "save_every": 1, "discriminator": False}},
        {"out": "stopped", "settings": PLAIN, "hooks": {"1": "SIGTERM generator 2"}},
        *({"out": name, "unet": UNETS[name]} for name in ("unet", "frozen", "half")),
        {"out": "unwrapped", "unet": UNETS["unwrapped"], "environment": {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}},
        {"out": "vae", "train_vae": vae(folder, "vae", 2)},
        {"out": "vq", "train_vae": vq(folder, "vq", 2)},
        {"out": "lora", "train_unet": lora(folder, "lora", 2)},
        {"out": "by size", "settings": PLAIN, "environment": {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}},
        {
            "out": "version 1",
            "settings": PLAIN,
            "environment": {"FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "false"},
        },
        {"out": "recomputed", "settings": PLAIN, "environment": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}},
        {"out": "8 bit", "settings": PLAIN | {"use_8bit_adam": True}},
        {"out": "matrices", "settings": PLAIN | {"optimizer": "muon"}},
    ]
    for scenario in scenarios:
        scenario["out"] = str(folder / scenario["out"])
        Path(scenario["out"]).mkdir(exist_ok=True)
    (folder / "fsdp.yaml").write_text(CONFIG)
    return folder, forks.launch(sharded.launched, scenarios, options=("--config_file", str(folder / "fsdp.yaml")))


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_split_networks_train_as_whole_ones(name: str, launched: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", **PLAIN | {"batch_size": 4})
    split, one = metrics(launched / name), metrics(tmp_path / "run")
    assert [line.keys() for line in split] == [line.keys() for line in one]
    for key in {key for line in one for key in line}:
        assert logged(launched / name, key) == pytest.approx(logged(tmp_path / "run", key), abs=1e-5, rel=1e-5)
    for file in ("generator", "generator.ema", "generator.optimizer", "discriminator", "discriminator.optimizer"):
        assert difference(last(launched / name, file), last(tmp_path / "run", file)) < 1e-5


def test_autocast_is_that_of_one_process(launched: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run", **PLAIN | {"batch_size": 4, "mixed_precision": "bf16", "half": True})
    for key in ("loss", "validation/mse"):
        assert logged(launched / "bf16", key) == pytest.approx(logged(tmp_path / "run", key), rel=1e-3)
    assert difference(last(launched / "bf16", "generator"), last(tmp_path / "run", "generator")) < 1e-3
    assert {value.dtype for value in last(launched / "bf16", "generator.optimizer").values()} == {torch.float32}


def test_a_gradient_scaler_finds_its_scale(launched: Path) -> None:
    """fp16's gradient scaler: if a step overflows on one process, both must skip it."""
    overflowed = [line["grad_norm"] is None for line in metrics(launched / "scaled") if "loss" in line]
    assert overflowed[0] > overflowed[-1]
    assert last(launched / "scaled", "generator.ema")["num_updates"] == len(overflowed) - sum(overflowed)
    assert logged(launched / "scaled")[-1] < logged(launched / "scaled")[0]


def test_the_result_is_of_the_averaged_weights_and_of_one_process(launched: Path) -> None:
    averages, result = last(launched / "plain", "generator.ema"), load_file(launched / "plain/result/toy.safetensors")
    del averages["num_updates"]
    assert all(torch.equal(averages[name], result[name]) for name in averages)
    assert difference(averages, {name: last(launched / "plain", "generator")[name] for name in averages}) > 1e-3
    (zero, _), (one, _) = rank(launched / "plain", 0), rank(launched / "plain", 1)
    assert (zero["calls"]["export"], "export" in one["calls"]) == (1, False)


def test_every_process_validates_the_same_networks(launched: Path) -> None:
    """BatchNorm's statistics, which are not sharded, must be equal too."""
    for name in ("plain", "whole", "nan"):
        (_, zero), (_, one) = rank(launched / name, 0), rank(launched / name, 1)
        assert difference(zero, one) == 0


def test_it_is_resumed_to_the_bit(launched: Path) -> None:
    (weights, result, lines), whole = everything(launched / "parts"), everything(launched / "whole")
    assert (weights, result) == whole[:2]
    assert [line for line in lines if "loss" in line] == [line for line in whole[2] if "loss" in line]
    assert json.loads((launched / "parts/rank-1.json").read_text())["calls"]["generator"] == 8  # steps 6 to 9


@pytest.mark.parametrize("name", ["begun", "stopped"])
def test_a_run_goes_on_with_and_without_it(name: str, launched: Path, tmp_path: Path) -> None:
    settings = PLAIN | {"batch_size": 4, "lr_scheduler": "constant" if name == "begun" else "linear"}
    if name == "stopped":
        assert [path.name for path in checkpoints(launched / name / "checkpoints")] == ["step-00000002"]
        fit(launched / name, **settings)
    fit(tmp_path / "whole", **settings)
    for file in ("generator", "generator.ema", "generator.optimizer", "discriminator"):
        assert difference(last(launched / name, file), last(tmp_path / "whole", file)) < 1e-5


def test_processes_agree_to_skip(launched: Path) -> None:
    (skipped,) = (line for line in metrics(launched / "nan") if "skipped" in line)
    assert (skipped["step"], skipped["loss"]) == (2, None)
    (zero, _), (one, _) = rank(launched / "nan", 0), rank(launched / "nan", 1)
    assert zero["exit_code"] == one["exit_code"] == 0
    assert len([line for line in metrics(launched / "nan") if line.get("loss")]) == 5
    assert last(launched / "nan", "generator.ema")["num_updates"] == 5


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_is_split_by_its_blocks(name: str, launched: Path, tmp_path: Path) -> None:
    stage = sharded.UNetStage(sharded.UNetSettings(**UNETS[name] | {"batch_size": 4}))
    blocks = [type(m).__name__ in UNet2DConditionModel._no_split_modules for m in stage.denoiser.modules()]
    loop.fit(stage, stage.settings, tmp_path)
    assert int((launched / name / "groups").read_text()) == (1 if name == "unwrapped" else 1 + sum(blocks))
    for key in ("loss", "grad_norm", "validation/mse"):
        tolerance = 0.01 if stage.half else 1e-5
        assert logged(launched / name, key) == pytest.approx(logged(tmp_path, key), rel=tolerance)
    split, one = (UNet2DConditionModel.from_pretrained(path / "result") for path in (launched / name, tmp_path))
    for left, right in (
        (split.state_dict(), one.state_dict()),
        (last(launched / name, "unet"), last(tmp_path, "unet")),
    ):
        # Half precision allows for the rounding of AdamW's 3 steps.
        assert difference(left, right) < (3e-3 if stage.half else 1e-4)
    assert ("unet.conv_in.weight" in last(launched / name, "unet")) != stage.settings.frozen


@pytest.mark.parametrize("name", ["vae", "vq", "lora"])
def test_stages_train(name: str, launched: Path) -> None:
    if name == "lora":
        train_unet(UNetConfig(**lora(launched, "one lora", 4)))
    else:
        train_vae(VAEConfig(**{"vae": vae, "vq": vq}[name](launched, f"one {name}", 4)))
    for key in {key for line in metrics(launched / f"one {name}") for key in line}:
        split, one = (logged(launched / out, key) for out in (name, f"one {name}"))
        assert split == pytest.approx(one, rel=1e-4, abs=1e-5), key
    files_of = {path.name for path in (launched / name / "result").iterdir()}
    assert files_of == {path.name for path in (launched / f"one {name}" / "result").iterdir()}
    for file in (launched / name / "result").glob("*.safetensors"):
        assert difference(load_file(file), load_file(launched / f"one {name}" / "result" / file.name)) < 1e-5
    if name == "vae":
        both = [json.loads((launched / out / "result/config.json").read_text()) for out in ("vae", "one vae")]
        assert [{**config, "_name_or_path": ""} for config in both] == [{**both[1], "_name_or_path": ""}] * 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("version 1", "FSDP works in version 2 alone; set fsdp_version: 2."),
        ("by size", "FSDP splits networks by the blocks that they name themselves"),
        ("recomputed", "fsdp_activation_checkpointing does not work here; leave it off."),
        ("8 bit", "use_8bit_adam does not work with FSDP; leave it off."),
        ("matrices", "optimizer muon needs whole matrices, which FSDP splits; take adamw."),
    ],
)
def test_what_does_not_go_with_it_is_told(name: str, sentence: str, launched: Path) -> None:
    assert all(sentence in json.loads((launched / name / f"rank-{i}.json").read_text())["error"] for i in (0, 1))


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ArgumentError, match="DeepSpeed does not work here; launch with FSDP"):
        fit(tmp_path / "run", **PLAIN)
