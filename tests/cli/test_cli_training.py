"""The training commands as a user runs them. Most run in this process; those that are stopped or
launched, in others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdkit
from sdkit.arguments import PREDICTIONS
from sdkit.cli import console, main
from sdkit.cli import training as commands
from sdkit.cli.commands import _parser
from sdkit.cli.training import CHOICES, _add_settings, _settings
from sdkit.data import LatentCache, check
from sdkit.errors import ArgumentError
from sdkit.training import UNetConfig, train_unet
from sdkit.training.checkpoint import checkpoints
from sdkit.training.run_folder import read_metrics
from sdkit.training.settings import StageSettings
from tests.helpers import forks, tiny, toy
from tests.helpers.command_line import Ran

ROOT = Path(__file__).parents[2]
STAGES = {name: stage.settings for name, stage in commands.STAGES.items()}
SMALL = ("--model", "model", "--batch-size", "2", "--size", "32")
LORA = ("train", "unet", "--data", "photos", "--lora-rank", "2", *SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tiny model, photos, and in `run` a LoRA trained from the command line. It is slow, so the
    tests share it.
    """
    folder = tmp_path_factory.mktemp("training")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        steps = ("--max-steps", "4", "--save-every", "2", "--learning-rate", "0.1", "--ema-decay", "0")
        assert main([*LORA, *steps, "--train-text-encoder", "--out-dir", "run"]) == 0
    return folder


@pytest.fixture
def work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the current folder, with links to the content of `folder`, and more inputs of every kind."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "photos", "run"):
        Path(name).symlink_to(folder / name)
    Path("empty").mkdir()
    Path("file").write_text("no folder", encoding="utf-8")
    return tmp_path


# Help


@pytest.mark.parametrize("stage", STAGES)
def test_help_tells_every_field_with_its_docstring_and_default(run: Callable[..., Ran], stage: str) -> None:
    code, out, err = run("train", stage, "--help")
    assert (code, err) == (0, "")
    told = " ".join(out.split())
    for field in fields(STAGES[stage]):
        assert f"--{field.name.replace('_', '-')}" in told
    # This field is inherited through two classes.
    assert stage == "clip" or "--batch-size N Samples per process and micro-batch (default: 1)" in told
    clipping = "Largest gradient norm; gradients above it are clipped. None turns clipping off (default: 1.0)"
    assert f"--max-grad-norm X {clipping}" in told
    libraries = {"clip": "transformers' CLIPModel", "image-prior": "diffusers' PriorTransformer"}
    library = libraries.get(stage, "diffusers")
    assert f"--init PATH A config.json of {library}, or a folder with one: train" in told
    adam = "Use AdamW of bitsandbytes, with its state in 8 bits (default: no)"
    assert f"--use-8bit-adam, --no-use-8bit-adam {adam}" in told
    assert "required, here or in the --config file: --data PATH" in told
    own = {
        "unet": "Train the text encoder together with the U-Net (default: no)",
        "vae": "(as in Stability's ft-mse) (default: l2)",
        "controlnet": "beside a latent cache, a column of conditioning_data (default: cond",
        "embedding": "paintings in a style (Gal et al. 2022) (default: object)",
        "prior": "(a gated PixelCNN) (default: transformer)",
        "clip": "The contrast is over batch_size x processes pairs",
        "image-prior": "CLIP whose embeddings the prior learns",
        "vqvae2": "Codes of each level's codebook (default: 512)",
        "classifier": "Classifier to train further: a folder or a Hub id",
    }
    assert own[stage] in told


@pytest.mark.parametrize("field", CHOICES)
def test_the_choices_in_the_help_are_those_of_the_settings(field: str) -> None:
    name, stage = next((name, stage) for name, stage in STAGES.items() if hasattr(stage, field))
    needed = {"data": "photos"} | {one.name: "photos" for one in fields(stage) if one.default is MISSING}
    with pytest.raises(ArgumentError) as refused:
        stage(**needed | {"out_dir": "run", field: "unheard-of"})
    known = re.findall(r"'([^']+)'", str(refused.value).partition("is not one of")[2])
    assert set(CHOICES[field]) == {PREDICTIONS.get(name, name) for name in known}
    train = _parser()._subparsers._group_actions[0].choices["train"]  # type: ignore[union-attr,index]
    options = train._subparsers._group_actions[0].choices[name]._actions
    (option,) = (option for option in options if option.dest == field)
    assert all(choice in f"{option.metavar} {option.help}" for choice in CHOICES[field])


def test_every_option_is_explained() -> None:
    """A field without a docstring would be an option without help."""
    train = _parser()._subparsers._group_actions[0].choices["train"]  # type: ignore[union-attr,index]
    for stage in STAGES:
        options = {option.dest: option for option in train._subparsers._group_actions[0].choices[stage]._actions}
        for field in fields(STAGES[stage]):
            assert len(options[field.name].help) > 15, field.name


@dataclass(frozen=True, kw_only=True)
class NewConfig(StageSettings):
    """Settings of a stage that is new.

    Attributes:
        unheard_of: A field that no group of the help names.
    """

    unheard_of: int = 3


def test_a_field_without_a_group_is_in_the_last_one() -> None:
    parser = argparse.ArgumentParser()
    _add_settings(parser, NewConfig)
    assert parser.format_help().endswith(
        "\nother:\n  --unheard-of N        A field that no group of the help names (default: 3)\n"
    )


def test_every_field_of_a_stage_has_a_group(run: Callable[..., Ran]) -> None:
    assert not any("\nother:" in run("train", stage, "--help").out for stage in STAGES)


def test_help_loads_no_heavy_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sdkit", "train", "unet", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"sdkit", "argparse"} <= loaded
    assert not loaded & {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "datasets", "tqdm"}


# Options


def settings(stage: str, *arguments: str) -> StageSettings:
    return _settings(STAGES[stage], _parser().parse_args(["train", stage, *arguments]))


COMMON: dict[str, tuple[str, Any]] = {
    "model": ("a/b", "a/b"),
    "data": ("photos", "photos"),
    "split": ("test", "test"),
    "image_column": ("photo", "photo"),
    "class_folders": ("", True),
    "out_dir": ("runs/a", "runs/a"),
    "max_steps": ("7", 7),
    "batch_size": ("3", 3),
    "gradient_accumulation_steps": ("2", 2),
    "mixed_precision": ("bf16", "bf16"),
    "seed": ("5", 5),
    "lr_scheduler": ("cosine", "cosine"),
    "lr_warmup_steps": ("4", 4),
    "max_grad_norm": ("none", None),
    "optimizer": ("adamw", "adamw"),  # muon excludes 8-bit AdamW
    "use_8bit_adam": ("", True),
    "ema_decay": ("0", 0.0),
    "save_every": ("11", 11),
    "keep_checkpoints": ("4", 4),
    "validate_every": ("13", 13),
    "report_to": ("tensorboard wandb", ("tensorboard", "wandb")),
    "learning_rate": ("3e-4", 3e-4),
    "size": ("64 96", (64, 96)),
    "augment": ("crop flip", ("crop", "flip")),
    "gradient_checkpointing": ("", True),
    "evaluate": ("frechet kid:dinov2:some/model", ("frechet", "kid:dinov2:some/model")),
}
DENOISING: dict[str, tuple[str, Any]] = {
    "vae": ("a/vae", "a/vae"),
    "prediction_type": ("v_prediction", "v_prediction"),
    "zero_snr": ("", True),
    "snr_gamma": ("5", 5.0),
    "noise_offset": ("0.1", 0.1),
    "caption_dropout": ("0", 0.0),
    "validation_prompts": ("apple ghost", ("apple", "ghost")),
    "caption_column": ("label", "label"),
    "default_caption": ("ghost", "ghost"),
}
OWN: dict[str, dict[str, tuple[str, Any]]] = {
    "vae": {
        "init": ("config.json", "config.json"),
        "train_encoder": ("", True),
        "reconstruction": ("l1", "l1"),
        "lpips_weight": ("0.5", 0.5),
        "lpips": ("weights", "weights"),
        "regularizer": ("vq", "vq"),
        "codebook_decay": ("0.9", 0.9),
        "normalize_codes": ("", True),
        "kl_weight": ("1e-3", 1e-3),
        "disc_weight": ("0.5", 0.5),
        "disc_start": ("9", 9),
        "input_noise": ("0.5", 0.5),
        "mask_ratio": ("0.75", 0.75),
        "mask_patch": ("4", 4),
        "validation_data": ("others", "others"),
    },
    "unet": {
        "lora_rank": ("8", 8),
        "lora_alpha": ("4", 4.0),
        "lora_dropout": ("0.1", 0.1),
        "lora_rank_stabilized": ("", True),
        "lora_targets": ("attention conv1", ("attention", "conv1")),
        "train_text_encoder": ("", True),
        "condition_column": ("before", "before"),
        "condition_kind": ("map", "map"),
        "condition_dropout": ("0.2", 0.2),
        **DENOISING,
    },
    "controlnet": {
        "controlnet": ("a/controlnet", "a/controlnet"),
        "conditioning_image_column": ("edges", "edges"),
        **DENOISING,
    },
    "embedding": {
        "token": ("<zork>", "<zork>"),
        "init_token": ("cat", "cat"),
        "vectors": ("3", 3),
        "template": ("style", "style"),
        "keep_norm": ("", True),
        **DENOISING,
    },
    "prior": {
        "vae": ("a/vae", "a/vae"),
        "caption_column": ("label", "label"),
        "default_caption": ("ghost", "ghost"),
        "kind": ("transformer", "transformer"),
        "conditioned_on": ("map", "map"),
        "condition_column": ("map", "map"),
        "condition_dropout": ("0.2", 0.2),
        "layers": ("3", 3),
        "width": ("12", 12),
        "heads": ("2", 2),
    },
    "clip": {
        "init": ("clip.json", "clip.json"),
        "tokenizer": ("a/clip", "a/clip"),
        "caption_column": ("text", "text"),
        "validation_data": ("more", "more"),
    },
    "image-prior": {
        "prior": ("a/prior", "a/prior"),
        "caption_column": ("text", "text"),
        "caption_dropout": ("0.2", 0.2),
    },
    "vqvae2": {
        "width": ("12", 12),
        "latent_channels": ("4", 4),
        "codes": ("9", 9),
        "codebook_decay": ("0.9", 0.9),
    },
    "classifier": {
        "vae": ("pixels", "pixels"),
        "classifier": ("a/classifier", "a/classifier"),
        "label_column": ("kind", "kind"),
        "label_data": ("labelled", "labelled"),
    },
}


UPSAMPLER: dict[str, tuple[str, Any]] = {"upscale_factor": ("4", 4), "noise_augmentation": ("9", 9)}


DREAMBOOTH: dict[str, tuple[str, Any]] = {
    "instance_data": ("five", "five"),
    "instance_prompt": ("a zork", "a zork"),
    "class_data": ("class", "class"),
    "class_prompt": ("an apple", "an apple"),
    "class_count": ("9", 9),
    "prior_weight": ("0.5", 0.5),
}


IMPROVED_DDPM: dict[str, tuple[str, Any]] = {
    "init": ("config.json", "config.json"),
    "classes": ("cat dog", ("cat", "dog")),
    "noise_schedule": ("cosine", "cosine"),
    "loss": ("hybrid", "hybrid"),
    "vlb_weight": ("0.01", 0.01),
    "timestep_sampling": ("importance", "importance"),
    "bits_per_dimension": ("9", 9),
}


MADE_HERE: dict[str, tuple[str, Any]] = {"condition": ("canny", "canny")}
LOGIT_NORMAL: dict[str, tuple[str, Any]] = {
    "timestep_sampling": ("logit_normal", "logit_normal"),
    "logit_mean": ("-0.5", -0.5),
    "logit_std": ("1.5", 1.5),
}
DECODER: dict[str, tuple[str, Any]] = {"latent_noise": ("0.1", 0.1)}


@pytest.mark.parametrize(
    ("stage", "own"),
    [
        ("unet", IMPROVED_DDPM),
        ("unet", LOGIT_NORMAL),
        ("unet", UPSAMPLER),
        ("controlnet", MADE_HERE),
        ("vae", DECODER),
    ],
)
def test_fields_that_exclude_others_can_be_set(stage: str, own: dict[str, tuple[str, Any]]) -> None:
    words = [w for name, (text, _) in own.items() for w in (f"--{name.replace('_', '-')}", *text.split())]
    values = {name: value for name, (_, value) in own.items()}
    given = ("--data", "photos", "--out-dir", "run")
    assert settings(stage, *words, *given) == STAGES[stage](**values, data="photos", out_dir="run")


def test_the_fields_of_dreambooth_can_be_set() -> None:
    words = [w for name, (text, _) in DREAMBOOTH.items() for w in (f"--{name.replace('_', '-')}", text)]
    values = {name: value for name, (_, value) in DREAMBOOTH.items()}
    assert settings("unet", *words, "--out-dir", "run") == STAGES["unet"](**values, out_dir="run")


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_can_be_set(stage: str) -> None:
    values = COMMON | OWN[stage]
    others = {  # exclude another one
        "vae": {*DECODER},
        "unet": {
            "init", "conditioning_data", "image_encoder", "embedding_dropout", *DREAMBOOTH, *IMPROVED_DDPM,
            *LOGIT_NORMAL, *UPSAMPLER,
        },
        "controlnet": {"init", "conditioning_data", "condition"}, "embedding": {"init"},
        "prior": {"init", "conditioning_data", "level"}, "vqvae2": {"init"},
        "classifier": {"init", "evaluate"}, "clip": {"size", "evaluate"},
        "image-prior": {"init", "size", "evaluate", "augment", "gradient_checkpointing"},
    }  # fmt: skip
    refused = others[stage] if stage in ("classifier", "clip", "image-prior") else set[str]()
    values = {name: value for name, value in values.items() if name not in refused}
    assert values.keys() | others[stage] == {field.name for field in fields(STAGES[stage])}
    words = [w for name, (text, _) in values.items() for w in (f"--{name.replace('_', '-')}", *text.split())]
    assert settings(stage, *words) == STAGES[stage](**{name: value for name, (_, value) in values.items()})
    for name, (_, value) in values.items():
        assert type(getattr(settings(stage, *words), name)) is type(value), name


def test_what_is_not_given_is_the_default() -> None:
    needed = {"data": "photos", "out_dir": "run"}
    given = ("--data", "photos", "--out-dir", "run")
    assert settings("unet", *given) == UNetConfig(**needed)
    assert settings("unet", *given, "--size", "64", "--no-zero-snr") == UNetConfig(size=64, zero_snr=False, **needed)
    assert settings("unet", *given, "--optimizer", "muon") == UNetConfig(optimizer="muon", **needed)
    assert settings("unet", "-m", "a", *given, "--size", "none") == UNetConfig(model="a", **needed)


def test_settings_come_from_a_file_but_for_what_is_given(work: Path) -> None:
    made = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    again = settings("unet", "--config", "run/config.json")
    assert again == UNetConfig(
        model="model", data="photos", out_dir="run", max_steps=4, save_every=2, lora_rank=2, batch_size=2, size=32,
        learning_rate=0.1, ema_decay=0.0, train_text_encoder=True,
    )  # fmt: skip
    plain = made["settings"] | {"zero_snr": None, "validation_prompts": ["a", "b"], "learning_rate": 1, "size": [40]}
    Path("plain.json").write_text(json.dumps(plain), encoding="utf-8")
    found = settings("unet", "--config", "plain.json", "--no-train-text-encoder", "--lora-rank", "none", "-o", "r")
    assert found == UNetConfig(
        model="model", data="photos", out_dir="r", max_steps=4, save_every=2, batch_size=2, size=40, learning_rate=1.0,
        ema_decay=0.0, validation_prompts=("a", "b"),
    )  # fmt: skip


# Users' mistakes


def file(text: str, *more: str) -> tuple[str, ...]:
    """Return the arguments of a command with `text` as its --config file."""
    return ("train", "unet", "--config", f"={text}", *more)


GIVEN = ("--data", "photos", "--out-dir", "r", "--model", "nowhere")  # no such model, but it is not opened
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "train: no stage": (("train",), "required: COMMAND"),
    "train: unknown stage": (("train", "text"), "invalid choice: 'text'"),
    "train: nothing given": (("train", "vae"), "--data and --out-dir must be given"),
    "train: no data": (("train", "unet", "-o", "r"), "data must be given (--data), or instance_data"),
    "train: no folder": (("train", "vae", "--data", "photos"), "--out-dir must be given"),
    "train: option of the other stage": (("train", "vae", *GIVEN, "--lora-rank", "4"), "--lora-rank"),
    "train: abbreviated": (("train", "unet", *GIVEN, "--lora", "4"), "--lora"),
    "train: a word for a number": (("train", "unet", *GIVEN, "--max-steps", "many"), "invalid int value: 'many'"),
    "train: a word for a number or none": (("train", "unet", *GIVEN, "--lora-rank", "x"), "invalid int value: 'x'"),
    "train: none where there is none": (("train", "unet", *GIVEN, "--seed", "none"), "invalid int value: 'none'"),
    "train: steps 0": (("train", "unet", *GIVEN, "--max-steps", "0"), "max_steps must be a whole number of at least 1"),
    "train: rate nan": (("train", "unet", *GIVEN, "--learning-rate", "nan"), "learning_rate must be a number"),
    "train: three sizes": (("train", "unet", *GIVEN, "--size", "8", "8", "8"), "size must be one number"),
    "train: augment": (("train", "unet", *GIVEN, "--augment", "crop", "spin"), "augment 'spin' is not one of"),
    "train: data missing": (("train", "unet", "-o", "r", "--data", "./no"), "nor the id of a data set on the Hub"),
    "train: data missing, vae": (("train", "vae", "-o", "r", "--data", "no"), "nor the id of a data set on the Hub"),
    "train: out is a file": (("train", "unet", "--data", "photos", "-o", "file"), "cannot write into file"),
    "train: out below a file": (("train", "vae", "--data", "photos", "-o", "file/x"), "cannot write into file"),
    "train: given twice": (("train", "unet", *GIVEN, "--seed", "1", "--seed", "1"), "--seed is given twice: give it"),
    "train: given twice, shortly": (("train", "unet", *GIVEN, "-m", "other"), "--model is given twice: give it once"),
    "train: several, given twice": (
        ("train", "unet", *GIVEN, "--augment", "crop", "--augment", "flip"), "with all values after one --augment"
    ),
    "train: yes and no": (
        ("train", "unet", *GIVEN, "--zero-snr", "--no-zero-snr"), "--zero-snr/--no-zero-snr is given twice: give it"
    ),
    "train: discriminator without weight": (("train", "vae", *GIVEN, "--disc-start", "9"), "give disc_weight, too"),
    "train: no VAE": (("train", "unet", "--data", "photos", "-o", "r", "--model", "model", "--vae", "none/"), "none/"),
    "train: VAE of no name": (("train", "unet", *GIVEN, "--vae", ""), "vae must be a path or a name"),
    "train: no model": (("train", "unet", *GIVEN), "nowhere"),
    "config: missing": (("train", "unet", *GIVEN, "--config", "no.json"), "cannot read no.json: no such file"),
    "config: a folder": (("train", "unet", *GIVEN, "--config", "empty"), "cannot read empty: is a directory"),
    "config: not JSON": (file("{", *GIVEN), "config.json is not valid JSON"),
    "config: deep": (file("[" * 99999, *GIVEN), "config.json is not valid JSON (nested too deeply)"),
    "config: a list": (file("[1]", *GIVEN), "config.json holds no JSON object; give a run's"),
    "config: settings no object": (file('{"settings": 3}', *GIVEN), "holds no settings"),
    "config: unknown field": (file('{"steps": 3}', *GIVEN), "sets 'steps', which is no setting of this stage"),
    "config: of the other stage": (
        file('{"stage": "VAEConfig", "settings": {}}', *GIVEN), "settings of another stage, a VAEConfig; give a UNetC"
    ),
    "config: a string for a number": (file('{"max_steps": "9"}', *GIVEN), "number of at least 1, not '9'"),
    "config: a string for a switch": (
        file('{"train_text_encoder": "no"}', *GIVEN), "train_text_encoder must be True or False, not 'no'"
    ),
    "config: a number for a path": (file('{"init": 5}', *GIVEN), "init must be a path or a name, not 5"),
    "config: null where there is none": (file('{"seed": null}', *GIVEN), "seed must be a whole number"),
    "config: several for one": (file('{"init": ["a", "b"]}', *GIVEN), "init must be a path or a name, not ('a', 'b')"),
    "config: of several one wrong": (file('{"augment": ["crop", 1]}', *GIVEN), "augment must be a string or a list"),
    "config: NaN": (file('{"learning_rate": NaN}', *GIVEN), "learning_rate must be a number"),
    "config: a device": (("train", "unet", *GIVEN, "--config", "/dev/zero"), "/dev/zero: it is not a regular file"),
    "config: of a stage with line breaks": (
        file('{"stage": "a\\n\\u001bb", "settings": {}}', *GIVEN), "a a??b; give a UNetConfig's"
    ),
    "config: no folder": (file('{"data": "photos"}'), "--out-dir must be given"),
    "data: no command": (("data",), "required: COMMAND"),
    "data: missing": (("data", "check", "./no"), "nor the id of a data set"),
    "data: empty": (("data", "check", "empty"), "there is no image, .parquet or .tar file in empty"),
    "data: size 0": (("data", "check", "photos", "--size", "0"), "size must be a whole number"),
    "data: three sizes": (("data", "check", "photos", "--size", "8", "8", "8"), "size must be one number"),
    "data: no model": (("data", "check", "photos", "--model", "nowhere"), "nowhere"),
    "data: a column of a folder": (("data", "check", "photos", "--image-column", "x"), "has no meaning for a folder"),
    "cache: nothing given": (("cache",), "required"),
    "cache: no folder": (("cache", "photos"), "required: --out"),
    "cache: data missing": (("cache", "./no", "-o", "c", "-m", "model"), "nor the id of a data set"),
    "cache: no model": (("cache", "photos", "-o", "c", "-m", "nowhere"), "nowhere"),
    "cache: out is a file": (("cache", "photos", "-o", "file", "-m", "nowhere"), "cannot write into file"),
    "cache: out holds something else": (("cache", "photos", "-o", "photos", "-m", "model"), "holds no latent cache"),
    "cache: given twice": (("cache", "photos", "-o", "c", "-o", "d"), "--out is given twice"),
    "cache: seed of nothing": (("cache", "photos", "-o", "c", "--seed", "3"), "--seed belongs to random crops"),
    "cache: no VAE": (("cache", "photos", "-o", "c", "-m", "model", "--vae", "nowhere"), "'nowhere' is neither a path"),
    "cache: crop": (("cache", "photos", "-o", "c", "-m", "model", "--crop", "left"), "crop 'left' is not one of"),
    "cache: augmentations alike": (
        ("cache", "photos", "-o", "c", "-m", "model", "--augmentations", "2"), "would all be alike"
    ),
    "cache: dtype": (("cache", "photos", "-o", "c", "-m", "model", "--dtype", "int8"), "dtype 'int8'"),
    "cache: device": (("cache", "photos", "-o", "c", "-m", "model", "--device", "toaster"), "device 'toaster'"),
    "cache: size": (("cache", "photos", "-o", "c", "-m", "model", "--size", "36"), "does not divide by 8"),
    "plot: nothing given": (("plot",), "required: RUN"),
    "plot: no run": (("plot", "empty"), "holds no metrics"),
    "plot: no PNG": (("plot", "run", "--out", "x.jpg"), "give a name that ends in .png"),
    "plot: out is a folder": (("plot", "run", "--out", "empty"), "give a name that ends in .png"),
    "plot: out below a file": (("plot", "run", "--out", "file/x.png"), "cannot write file/x.png"),
    "convert: nothing given": (("convert", "run/result"), "required: OUT"),
    "convert: no LoRA": (("convert", "nowhere", "x.safetensors"), "the LoRA 'nowhere' does not exist"),
    "convert: a VAE": (
        ("convert", "model/vae/diffusion_pytorch_model.safetensors", "x.safetensors"), "which is no part of a LoRA"
    ),
    "convert: a name": (("convert", "nowhere", "x.ckpt"), "give a name that ends in .safetensors"),
    "generate: LoRA missing": (("generate", "a", "--lora", "no.safetensors"), "does not exist"),
    "generate: LoRA scale nan": (("generate", "a", "--lora", "run/result", "--lora-scale", "nan"), "lora_scale must"),
    "generate: two scales, one LoRA": (
        ("generate", "a", "--lora", "x", "--lora-scale", "2", "--lora-scale", "1"), "2 of lora_scale cannot serve 1"
    ),
    "generate: one scale, two LoRAs": (
        ("generate", "a", "--lora", "x", "--lora-scale", "2", "--lora", "y"), "1 of lora_scale cannot serve 2 LoRAs"
    ),
    "generate: of two LoRAs one missing": (
        ("generate", "a", "--lora", "run/result", "--lora", "no.safetensors"), "does not exist"
    ),
    "generate: no VAE": (("generate", "a", "--vae", "nowhere"), "'nowhere' is neither a path that exists nor a Hub id"),
    "generate: scale without LoRA": (("generate", "a", "--lora-scale", "2"), "lora_scale belongs to a LoRA"),
    "generate: LoRA of another model": (("generate", "a", "--lora", "run/result"), "was made for another model"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "fragment"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_in_one_sentence(
    run: Callable[..., Ran], work: Path, arguments: tuple[str, ...], fragment: str
) -> None:
    """Mistakes that can be found without a model must be found before the model is opened. Here "nowhere" does not
    exist, and opening it would give another error.
    """
    for argument in arguments:
        if argument.startswith("="):
            Path("config.json").write_text(argument[1:], encoding="utf-8")
    before = sorted(work.rglob("*"))
    code, out, err = run(*("config.json" if argument.startswith("=") else argument for argument in arguments))
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"sdkit: [^\n]+[.?]\n", err), err
    assert fragment in err
    assert sorted(work.rglob("*")) == before


# Results


def test_training_prints_the_result_and_the_same_command_finds_it_done(run: Callable[..., Ran], work: Path) -> None:
    command = ("train", "vae", "--data", "photos", "--out-dir", "r", "--max-steps", 2, "--lpips-weight", 0, *SMALL)
    assert run(*command) == Ran(0, f"r{os.sep}result\n", "")
    made = Path("r/result/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert run(*command) == Ran(0, f"r{os.sep}result\n", "r is finished: step 2, see r/result.\n")
    assert Path("r/result/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == made
    sdkit.VAE.from_pretrained("r/result")
    code, out, err = run("train", "vae", "--config", "r/config.json", "--max-steps", 3)  # resumes in the same folder
    assert (code, out) == (0, f"r{os.sep}result\n")
    assert err == "resuming from r/checkpoints/step-00000002\n"
    assert [line["step"] for line in read_metrics(Path("r/metrics.jsonl")) if "loss" in line] == [1, 2, 3]


def test_the_command_trains_as_the_function_does(work: Path) -> None:
    """The function with the command's options as fields must repeat the run of `folder` bit-identically."""
    Path("again").mkdir()
    config = settings("unet", "--config", "run/config.json", "--out-dir", "again/run")
    assert isinstance(config, UNetConfig)
    train_unet(config)
    theirs, ours = (load_file(path / "result" / "pytorch_lora_weights.safetensors") for path in map(Path, (
        "run", "again/run")))  # fmt: skip
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_cache_tells_what_it_made_and_what_it_skipped(run: Callable[..., Ran], work: Path) -> None:
    tiny.photos(Path("images"), 9)
    for i in range(7):
        Path(f"images/{i:03}.png").write_bytes(b"torn")
    command = ("cache", "images", "--model", "model", "--out", "c", "--size", 40, 32, "--crop", "random", "--flip")
    code, out, err = run(*command, "--augmentations", 3, "--embeddings", "--seed", 4, "--dtype", "fp32")
    assert (code, out) == (0, "c\n2 images, 3 times each; 7 skipped\n")
    *named, more = err.splitlines()
    assert [line.split(" is skipped: ")[0] for line in named] == [f"sdkit: 00{i}.png" for i in range(5)]
    assert "is not an image" in named[0]
    assert more == f"sdkit: 2 more are skipped; c{os.sep}manifest.json names them."
    made = LatentCache("c").manifest.settings
    assert (made.size, made.crop, made.flip, made.augmentations) == ((40, 32), "random", True, 3)
    assert (made.embeddings, made.seed, made.dtype) == (True, 4, "float32")
    assert run("cache", "photos", "--model", "model", "-o", "whole") == Ran(0, "whole\n6 images; 0 skipped\n", "")
    assert LatentCache("whole").manifest.settings.size == (32, 32)
    trained = run("train", "unet", "--data", "whole", "--out-dir", "r", "--max-steps", 1, "--model", "model")
    assert (trained.code, trained.out) == (0, f"r{os.sep}result\n")
    assert (work / "r" / "result" / "model_index.json").is_file()


def test_data_check_prints_its_report(run: Callable[..., Ran], work: Path) -> None:
    tiny.photos(Path("images"), 3)
    Path("images/a\x1b[31m.png").write_bytes(b"torn")
    expected = check("images", size=64, model="model")
    code, out, err = run("data", "check", "images", "--size", 64, "--model", "model")
    assert (code, err) == (0, "")
    assert out == str(expected).replace("\x1b", "?") + "\n"
    assert "3 smaller than the crop" in out
    found = json.loads(run("data", "check", "images", "--size", 64, 64, "--model", "model", "--json").out)
    assert found == json.loads(json.dumps(expected.asdict()))
    assert "crop of 512 x 512" in run("data", "check", "images").out


def test_curves_are_drawn(run: Callable[..., Ran], work: Path) -> None:
    assert run("plot", "run", "--out", "curves.png") == Ran(0, "curves.png\n", "")
    with Image.open("curves.png") as image:
        assert image.width > 500
    assert run("plot", "run").out == f"run{os.sep}metrics.png\n"
    assert Path("run/metrics.png").read_bytes() == Path("curves.png").read_bytes()


QUICK = ("--model", "model", "--steps", "3", "--dtype", "fp32", "--device", "cpu")


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_images_remember_their_lora(run: Callable[..., Ran], work: Path) -> None:
    assert run("generate", "a red disc", *QUICK, "-o", "plain.png").code == 0
    assert run("generate", "a red disc", *QUICK, "--lora", "run/result", "--lora-scale", 3, "-o", "lora.png").code == 0
    sd = sdkit.StableDiffusion.from_pretrained("model", dtype="fp32", device="cpu")
    sd.load_lora("run/result", 3)
    (expected,) = sd("a red disc", num_inference_steps=3, output_type="np")
    np.testing.assert_array_equal(pixels("lora.png"), expected)
    assert np.abs(pixels("plain.png") - expected).max() > 2  # of 255
    with Image.open("lora.png") as image:
        text = image.text  # type: ignore[attr-defined]
    assert {"lora": str(work / "run" / "result"), "lora_scale": "3.0"}.items() <= text.items()
    assert run("generate", "--from", "lora.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("lora.png").read_bytes()
    assert run("generate", "--from", "lora.png", "--lora-scale", 0, "-o", "off.png").code == 0
    np.testing.assert_array_equal(pixels("off.png"), pixels("plain.png"))
    Path("moved").symlink_to(Path("run").readlink())
    assert (
        run("generate", "--from", "lora.png", "--lora", "moved/result", "--lora-scale", 3, "-o", "moved.png").code == 0
    )
    Path("moved").unlink()  # the same path holds another file from here on
    lora = Path("moved", "result", "pytorch_lora_weights.safetensors")
    lora.parent.mkdir(parents=True)
    save_file({key: -value for key, value in load_file("run/result/pytorch_lora_weights.safetensors").items()}, lora)
    done = run("generate", "--from", "moved.png", "-o", "bad.png")
    assert done.code == 2
    assert "has changed since it was drawn with; restore it, or give it anew as lora" in done.err
    assert not Path("bad.png").exists()


def test_a_converted_lora_does_the_same(run: Callable[..., Ran], work: Path) -> None:
    """The alpha may differ from the rank; diffusers' layout has it in the metadata."""
    tensors = load_file("run/result/pytorch_lora_weights.safetensors")
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 5, "text_encoder.r": 2, "text_encoder.lora_alpha": 3})
    save_file(tensors, "scaled.safetensors", {"format": "pt", "lora_adapter_metadata": config})
    weights = {}
    for name in ("run/result", "scaled.safetensors"):
        assert run("convert", name, "k/kohya.safetensors") == Ran(0, f"k{os.sep}kohya.safetensors\n", "")
        written = load_file("k/kohya.safetensors")
        assert all(re.match(r"lora_(unet_|te_text_model_encoder_)\w+\.(lora_down\.weight|lora_up\.weight|alpha)$", key)
                   for key in written)  # fmt: skip
        assert len(written) == 3 / 2 * len(tensors)
        for source in (name, "k/kohya.safetensors"):
            sd = sdkit.StableDiffusion.from_pretrained("model", dtype="fp32", device="cpu")
            sd.load_lora(source)
            weights[name, source] = torch.cat([p.flatten() for n in (sd.unet, sd.text) for p in n.parameters()])
        assert torch.equal(weights[name, name], weights[name, "k/kohya.safetensors"])
    assert not torch.equal(weights["run/result", "run/result"], weights["scaled.safetensors", "scaled.safetensors"])


def drawn(run: Callable[..., Ran], name: str, *options: object) -> Any:
    quick = ("--model", "model", "--steps", 3, "--dtype", "fp32", "--device", "cpu")
    found = run("generate", "a red disc", *quick, *options, "-o", name)
    assert found[::2] == (0, ""), found
    return pixels(name)


def test_several_loras_add_up_each_with_its_scale(run: Callable[..., Ran], work: Path) -> None:
    tensors = load_file("run/result/pytorch_lora_weights.safetensors")
    save_file({key: value.flip(0) if "up" in key else value for key, value in tensors.items()}, "other.safetensors")
    scaled = ("--lora", "run/result", "--lora-scale", 2, "--lora", "other.safetensors", "--lora-scale", -1.5)
    found = {"one": drawn(run, "one.png", "--lora", "other.safetensors"), "scaled": drawn(run, "scaled.png", *scaled)}
    found["both"] = drawn(run, "both.png", "--lora", "run/result", "--lora", "other.safetensors")
    for name, scales in (("both", (1, 1)), ("scaled", (2, -1.5))):
        sd = sdkit.StableDiffusion.from_pretrained("model", dtype="fp32", device="cpu")
        for source, scale in zip(("run/result", "other.safetensors"), scales, strict=True):
            sd.load_lora(source, scale)
        (expected,) = sd("a red disc", num_inference_steps=3, output_type="np")
        np.testing.assert_array_equal(found[name], expected)
        assert np.abs(expected.astype(int) - found["one"]).max() > 2
        assert run("generate", "--from", f"{name}.png", "-o", "again.png").code == 0
        assert Path("again.png").read_bytes() == Path(f"{name}.png").read_bytes()
    # Another LoRA does not inherit the scales in the PNG. A scale alone does not apply to the two LoRAs in it either.
    assert run("generate", "--from", "scaled.png", "--lora", "other.safetensors", "-o", "again.png").code == 0
    np.testing.assert_array_equal(pixels("again.png"), found["one"])
    assert "1 of lora_scale cannot serve 2" in run("generate", "--from", "scaled.png", "--lora-scale", 1).err


def test_a_vae_beside_the_model(run: Callable[..., Ran], work: Path) -> None:
    """Test a VAE in its own folder with images, a PNG, a cache, a run that trains with it, and the run's exported
    pipeline.
    """
    torch.manual_seed(1)
    vae = sdkit.VAE.from_pretrained("model", dtype="fp32", device="cpu")
    with torch.no_grad():
        for parameter in vae.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    vae.network.save_pretrained("other/vae")
    identity = sdkit.VAE.from_pretrained("other", device="cpu").identity
    sd = sdkit.StableDiffusion.from_pretrained("model", vae="other/vae", dtype="fp32", device="cpu")
    assert (sd.vae.identity, sd.name) == (identity, "model")
    (expected,) = sd("a red disc", num_inference_steps=3, output_type="np")
    np.testing.assert_array_equal(drawn(run, "one.png", "--vae", "other"), expected)
    assert np.abs(drawn(run, "plain.png").astype(int) - expected).max() > 2
    with Image.open("one.png") as image:
        assert image.text["vae"] == str(work / "other")  # type: ignore[attr-defined]
    assert run("generate", "--from", "one.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("one.png").read_bytes()

    assert run("cache", "photos", "--out", "cache", "--model", "model", "--vae", "other").code == 0
    assert LatentCache("cache").manifest.settings.vae == identity
    common = ("--ema-decay", 0, *SMALL, "--max-steps")
    assert "made with the VAE" in run("train", "unet", "--data", "cache", "--out-dir", "r", *common, 1).err
    losses = {}
    for data in ("cache", "photos"):
        train = ("train", "unet", "--data", data, "--out-dir", f"r-{data}", *common)
        assert run(*train, 1, "--vae", "other").code == 0
        assert sdkit.VAE.from_pretrained(f"r-{data}/result", device="cpu").identity == identity
        losses[data] = read_metrics(Path(f"r-{data}/metrics.jsonl"))[1]["loss"]
        again = run(*train, 2, "--vae", "other/vae") if data == "cache" else run(*train, 2)
        assert again.code == (0 if data == "cache" else 2)  # paths may change, the VAE may not
    assert "its model was different" in again.err
    assert losses["cache"] == pytest.approx(losses["photos"], rel=2e-3)  # a cache holds float16


# Interrupting and resuming


def started(*arguments: str, hook: str = "", said: str = "said", **environment: str) -> Any:
    """Start the command in another process, which ends at `hook`, in the notation of `toy.hooks`."""
    out, err = (Path(f"{said}{suffix}").resolve() for suffix in (".out", ".err"))
    for path in (out, err):
        path.write_text("")
    return forks.start(toy.command, list(arguments), hook, environment=environment, out=out, err=err)


def ended(process: Any, said: str = "said") -> Ran:
    process.join(120)
    return Ran(process.exitcode, Path(f"{said}.out").read_text(), Path(f"{said}.err").read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(work: Path, name: str, code: int) -> None:
    run = (*LORA, "--out-dir", "r", "--max-steps", "5", "--save-every", "2", "--validate-every", "9")
    told = "sdkit: stopped after step 2, with a checkpoint; the same command resumes it.\n"
    noticed = "\nsdkit: stopping with a checkpoint; Ctrl-C again leaves at once.\n" if name == "SIGINT" else ""
    # The signal arrives while the checkpoint of step 2 is being renamed. No further step follows.
    assert ended(started(*run, hook=f"{name} os.rename:step-00000002 1")) == Ran(code, "", noticed + told)
    assert [path.name for path in checkpoints(Path("r/checkpoints"))] == ["step-00000002"]
    assert not Path("r/result").exists()
    going_on = "resuming from r/checkpoints/step-00000002\n"
    assert ended(started(*run)) == Ran(0, f"r{os.sep}result\n", going_on)
    assert [line["step"] for line in read_metrics(Path("r/metrics.jsonl")) if "loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_a_second_ctrl_c_leaves_at_once(work: Path) -> None:
    run = (*LORA, "--out-dir", "r", "--max-steps", "9", "--save-every", "2", "--validate-every", "9")
    # Both signals arrive at the first rename.
    hook = "SIGINT os.rename:step-00000002 1;SIGINT os.rename:step-00000002 2"
    code, out, err = ended(started(*run, hook=hook))
    assert (code, out) == (130, "")
    assert [line[:15] for line in err.splitlines()] == ["", "sdkit: stopping", "sdkit: stopped;"]


# Several processes


def test_of_many_processes_the_main_one_tells_of_an_error(
    run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ("train", "unet", *GIVEN, "--max-steps", "0")
    other = started(*wrong, said="other", RANK="1", WORLD_SIZE="2")
    assert ended(started(*wrong, RANK="0", WORLD_SIZE="2")).err.startswith("sdkit: max_steps must be")
    other.join(1)
    other.terminate()  # as the launcher does after the main process has ended
    assert ended(other, "other") == Ran(-signal.SIGTERM, "", "")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # The main process does not end this one, so this one must report its own error in the end.
    monkeypatch.setattr(console, "PATIENCE", 0.01)
    assert run(*wrong).err.startswith("sdkit: max_steps must be")
    monkeypatch.setenv("WORLD_SIZE", "1")  # some environments leave WORLD_SIZE set
    monkeypatch.setattr(console, "PATIENCE", 1e6)
    assert run(*wrong).err.startswith("sdkit: max_steps must be")


@pytest.fixture
def launch(work: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that runs `accelerate launch -m sdkit` with two processes on the CPU."""
    # With --cpu, Accelerate starts one process, whatever number is asked for, unless it is configured for MPI.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([*launcher, "-m", "sdkit", *arguments], env=environment, **pipes))
        return running[-1]

    yield start
    for process in running:
        process.terminate()  # the launcher passes the signal on
        process.communicate()


def sentences(err: str) -> list[str]:
    """Return the lines that sdkit itself printed, without the launcher's log."""
    return [line for line in err.splitlines() if line.startswith("sdkit: ")]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_a_launched_run_stops_and_goes_on_and_speaks_with_one_voice(
    launch: Callable[..., subprocess.Popen[str]],
) -> None:
    steps = ("train", "unet", "--data", "photos", "--lora-rank", "2", "--model", "model", "--size", "32")
    steps += ("--batch-size", "1", "--save-every", "100000", "--validate-every", "100000", "--out-dir", "r")
    first = launch(*steps, "--max-steps", "100000")
    metrics = Path("r/metrics.jsonl")
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    done = read_metrics(metrics)[-1]["step"]
    assert out == ""
    assert sentences(err) == [
        "sdkit: stopping with a checkpoint; Ctrl-C again leaves at once.",
        f"sdkit: stopped after step {done}, with a checkpoint; the same command resumes it.",
    ]
    second = forks.launch(toy.command, [*steps, "--max-steps", str(done + 1)])
    assert second == ([0, 0], f"r{os.sep}result\n", second.err)
    assert second.err.count("resuming from") == 1
    assert json.loads(Path("r/config.json").read_text())["samples_per_step"] == 2


@pytest.mark.usefixtures("work")
def test_a_launched_commands_error_is_told_once() -> None:
    codes, out, err = forks.launch(toy.command, [*LORA, "--out-dir", "file"])
    assert (codes[0], out) == (2, "")  # the other is ended by the launcher, or tells after a while
    assert sentences(err) == ["sdkit: cannot write into file: not a directory; give another folder."]
