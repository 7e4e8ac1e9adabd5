"""Users' mistakes in training. Each is reported in one sentence that names the cause and says what to do, and leaves no
partial files. Full disks and two runs at once are tested in test_runs.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import sdkit
from sdkit.data import cache
from sdkit.data.latent_cache.manifest import Manifest
from sdkit.errors import CacheError, DataError, TrainingError
from sdkit.networks.lpips import EMBEDDED
from sdkit.training import PriorConfig, UNetConfig, VAEConfig, VQVAE2Config, train_unet, train_vae
from sdkit.training.checkpoint import checkpoints, newest
from sdkit.training.run_folder import read_metrics
from tests.helpers import tiny
from tests.helpers.runs import lpips_weights
from tests.helpers.sentences import one_sentence

ARGUMENT, SOURCE, DATA, CACHE, TRAINING = sdkit.ArgumentError, sdkit.SourceError, DataError, CacheError, TrainingError
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: it is faster for networks this small, and the order of a sum changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDKIT_LPIPS", raising=False)


# Settings that are refused before anything is loaded

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": NAN}, "learning_rate must be a number from 0 to 1, not nan"),
    ({"learning_rate": INF}, "learning_rate must be a number from 0 to 1, not inf"),
    ({"learning_rate": 0}, "learning_rate must be above 0"),
    ({"learning_rate": -1e-5}, "learning_rate must be a number from 0 to 1, not -1e-05"),
    ({"learning_rate": 1.5}, "learning_rate must be a number from 0 to 1, not 1.5"),
    ({"learning_rate": "1e-5"}, "learning_rate must be a number from 0 to 1, not '1e-5'"),
    ({"max_steps": "10"}, "max_steps must be a whole number of at least 1, not '10'"),
    ({"batch_size": 2.0}, "batch_size must be a whole number of at least 1, not 2.0"),
    ({"model": 3}, "model must be a path or a name, not 3"),
    ({"model": ""}, "model must be a path or a name, not ''"),
    ({"data": None}, "data must be a path or a name, not None"),
    ({"out_dir": ""}, "out_dir must be a path or a name, not ''"),
    ({"out_dir": "a\0b"}, "out_dir is 'a\\x00b', a name that no file can have here; give another"),
    ({"model": "\ud800"}, "model is '\\ud800', a name that no file can have here; give another"),
    ({"data": "\0"}, "data is '\\x00', a name that no file can have here; give another"),
    ({"init": "\0"}, "init is '\\x00', a name that no file can have here; give another"),
    ({"init": 3}, "init must be a path or a name, not 3"),
    ({"size": "big"}, "size must be a whole number from 8 to 16384, not 'big'"),
    ({"size": (8, 8, 8)}, "size must be one number of pixels, or (height, width), not (8, 8, 8)"),
    ({"size": 7}, "size must be a whole number from 8 to 16384, not 7"),
    ({"augment": ("rotate",)}, "augment 'rotate' is not one of 'crop', 'flip'"),
    ({"augment": 3}, "augment must be a string or a list of at least one string"),
    ({"gradient_checkpointing": "no"}, "gradient_checkpointing must be True or False, not 'no'"),
    ({"optimizer": "sgd"}, "optimizer 'sgd' is not one of 'adamw', 'muon'"),
    ({"optimizer": "muon", "use_8bit_adam": True}, "use_8bit_adam belongs to the optimizer adamw; leave it off"),
    ({"use_8bit_adam": "no"}, "use_8bit_adam must be True or False, not 'no'"),
    ({"ema_decay": "0.9"}, "ema_decay must be a number from 0 to 1, not '0.9'"),
    ({"max_grad_norm": NAN}, "max_grad_norm must be a number"),
    ({"seed": None}, "seed must be a whole number from 0 to 2147483647, not None"),
    ({"mixed_precision": None}, "mixed_precision None is not one of 'no', 'bf16', 'fp16'"),
    ({"lr_scheduler": "sawtooth"}, "lr_scheduler 'sawtooth' is not one of 'constant'"),
    ({"report_to": 3}, "report_to must be a string or a list of at least one string"),
]
VAE: list[tuple[dict[str, Any], str]] = [
    ({"reconstruction": "l3"}, "reconstruction 'l3' is not one of 'l1', 'l2'"),
    ({"lpips_weight": -1}, "lpips_weight must be a number of at least 0, not -1"),
    ({"regularizer": "l2"}, "regularizer 'l2' is not one of 'none', 'kl', 'vq'"),
    ({"kl_weight": NAN}, "kl_weight must be a number of at least 0, not nan"),
    ({"disc_weight": "0.5"}, "disc_weight must be a number of at least 0, not '0.5'"),
    ({"disc_start": 1.5}, "disc_start must be a whole number of at least 0, not 1.5"),
    ({"lpips": 3}, "lpips must be a path or a name, not 3"),
    ({"validation_data": 3}, "validation_data must be a path or a name, not 3"),
    ({"train_encoder": "no"}, "train_encoder must be True or False, not 'no'"),
    ({"input_noise": -0.5}, "input_noise must be a number of at least 0, not -0.5"),
    ({"input_noise": "much"}, "input_noise must be a number of at least 0, not 'much'"),
    ({"mask_ratio": 1}, "mask_ratio must be a number from 0 to 0.99, not 1"),
    ({"mask_ratio": NAN}, "mask_ratio must be a number from 0 to 0.99, not nan"),
    ({"mask_ratio": 0.5, "mask_patch": 0}, "mask_patch must be a whole number of at least 1, not 0"),
    ({"mask_patch": 4}, "mask_patch is the size of masked patches, and none are masked; give mask_ratio, too"),
]
UNET: list[tuple[dict[str, Any], str]] = [
    ({"prediction_type": "noise"}, "prediction_type 'noise' is not one of 'eps', 'epsilon', 'v'"),
    ({"lora_rank": 0}, "lora_rank must be a whole number of at least 1, not 0"),
    ({"lora_rank": "4"}, "lora_rank must be a whole number of at least 1, not '4'"),
    ({"lora_alpha": 4}, "lora_alpha belongs to a LoRA, and there is none; give lora_rank, too"),
    ({"lora_targets": ("convolutions",)}, "lora_targets belongs to a LoRA, and there is none; give lora_rank, too"),
    ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha must be a number from 1e-06 to 1e+06, not 0"),
    ({"lora_rank": 4, "lora_dropout": 1}, "lora_dropout must be a number from 0 to 0.99, not 1"),
    ({"lora_rank": 4, "lora_rank_stabilized": "no"}, "lora_rank_stabilized must be True or False, not 'no'"),
    ({"lora_rank": 4, "lora_targets": 3}, "lora_targets must be a string or a list of at least one string"),
    ({"lora_rank": 4, "init": "config.json"}, "a network made from init= has nothing for LoRA to add to"),
    ({"snr_gamma": 0}, "snr_gamma must be a number of at least 0.001, not 0"),
    (
        {"timestep_sampling": "normal"},
        "timestep_sampling 'normal' is not one of 'uniform', 'logit_normal', 'importance'",
    ),
    ({"logit_mean": 0.5}, "logit_mean belongs to timestep_sampling logit_normal; give that, too"),
    ({"logit_std": 0.5}, "logit_std belongs to timestep_sampling logit_normal; give that, too"),
    ({"timestep_sampling": "logit_normal", "logit_std": 0}, "logit_std must be a number from 0.01 to 5, not 0"),
    ({"timestep_sampling": "logit_normal", "logit_mean": 9}, "logit_mean must be a number from -5 to 5, not 9"),
    ({"noise_offset": -0.1}, "noise_offset must be a number of at least 0, not -0.1"),
    ({"caption_dropout": 1.5}, "caption_dropout must be a number from 0 to 1, not 1.5"),
    ({"validation_prompts": 3}, "validation_prompts must be a string or a list of at least one string"),
    ({"validation_prompts": ("a", 3)}, "validation_prompts must be a string or a list of at least one string"),
    ({"train_text_encoder": "no"}, "train_text_encoder must be True or False, not 'no'"),
    ({"zero_snr": "no"}, "zero_snr must be True or False, not 'no'"),
]
SETTINGS = [(config, *case) for config in (VAEConfig, UNetConfig, PriorConfig, VQVAE2Config) for case in BOTH]
SETTINGS += [(VAEConfig, *case) for case in VAE] + [(UNetConfig, *case) for case in UNET]


@pytest.mark.parametrize(("config", "change", "fragment"), SETTINGS, ids=lambda value: getattr(value, "__name__", None))
def test_settings(config: Any, change: dict[str, Any], fragment: str) -> None:
    one_sentence(lambda: config(**{"data": "photos", "out_dir": "run"} | change), ARGUMENT, fragment)


@pytest.mark.parametrize("out", [".", "run", "../photos/deep/run", "link/run"])
def test_a_run_inside_of_its_data(out: str, tmp_path: Path) -> None:
    """A resumed run would train on its own sample pictures."""
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "link").symlink_to(photos)
    for change in ({"data": photos}, {"data": "org/photos", "validation_data": photos}):
        sentence = f"lies in {[*change][-1]} {str(photos)!r}, and its pictures would be trained on; name another"
        one_sentence(lambda change=change: VAEConfig(out_dir=photos / out, **change), ARGUMENT, sentence)
    VAEConfig(out_dir=tmp_path / "photos-run", data=photos)


def test_a_home_folder_is_found_in_python_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert UNetConfig(data="~/photos", out_dir="~/run").samples == tmp_path / "run" / "samples"


# Models, data, and the machine's limits


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 3)
    lpips_weights(folder / "lpips.safetensors")
    cache(folder / "model", folder / "photos", folder / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")
    return folder


def train(stage: str, kit: Path, out: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"model": kit / "model", "data": kit / "photos", "out_dir": out, "size": tiny.SIZE}
    settings |= {"max_steps": 1, "save_every": 50, "ema_decay": 0.0}
    if stage == "vae":
        return train_vae(VAEConfig(**settings | {"lpips_weight": 0.0} | changes))
    return train_unet(UNetConfig(**settings | changes))


def nothing_half_done(out: Path) -> None:
    """Check that there is no temporary file, and that the run folder does not exist or is an empty run's."""
    assert not [*out.parent.rglob(".sdkit-*")]
    if out.is_dir():
        inside = {path.name for path in out.iterdir()}
        assert inside <= {".lock", "config.json", "metrics.jsonl", "checkpoints", "samples", "skipped.json"}
        assert not [*(out / "checkpoints").iterdir()]


def folder(path: Path, **contents: bytes) -> Path:
    """Make a folder of files with these contents; __ in a name stands for a dot."""
    path.mkdir()
    for name, content in contents.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def dots(path: Path) -> Path:
    path.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (1, 1)).save(path / name)
    return path


def nan_pixels(path: Path) -> Path:
    path.mkdir()
    Image.fromarray(np.full((40, 40), NAN, np.float32)).save(path / "a.tiff")
    return path


def other_model(kit: Path, path: Path, part: str = "unet", **config: Any) -> Path:
    """Copy the model with another U-Net, or without one part."""
    shutil.copytree(kit / "model", path)
    shutil.rmtree(path / part)
    if config:
        own = json.loads((kit / "model" / "unet" / "config.json").read_text())
        UNet2DConditionModel.from_config(own | config).save_pretrained(path / "unet")
    return path


def taesd(path: Path) -> Path:
    shape = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**shape, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(path / "vae")
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def damaged(kit: Path, path: Path, how: str) -> Path:
    """Copy the cache and damage it as an accident would."""
    shutil.copytree(kit / "cache", path)
    shard = path / "shard-00000.safetensors"
    if how == "unfinished":
        replace(Manifest.read(path), complete=False).write(path)
    elif how == "no manifest":
        (path / "manifest.json").write_text("{")
    elif how == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif how == "gone":
        shard.unlink()
    else:
        size = shard.stat().st_size
        shard.write_bytes(b"\xff" * size)
    return path


def other_vae(kit: Path, path: Path) -> Path:
    """Copy the model with other encoder weights."""
    shutil.copytree(kit / "model", path)
    weights = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] *= 1.5
    save_file(tensors, weights, {"format": "pt"})
    return path


Make = Callable[[Path, Path], dict[str, Any]]
# Stages, what happens, settings (from the kit and a folder for the case), the kind of error, and fragments of its
# sentence.
CASES: list[tuple[str, str, Make, type[sdkit.SdkitError], tuple[str, ...]]] = [
    ("both", "empty folder", lambda k, p: {"data": folder(p / "d")}, DATA, ("there is no image, .parquet or",)),
    ("both", "no images", lambda k, p: {"data": folder(p / "d", a__txt=b"x")}, DATA, ("d (but 1 .txt file); name ot",)),
    ("both", "dots only", lambda k, p: {"data": dots(p / "d")}, DATA,
     ("2 images in a row in ", "a.png: 1 x 1 pixels are too few for a crop of 32 x 32", "; look at the data with")),
    ("both", "broken images only", lambda k, p: {"data": folder(p / "d", a__png=b"x", b__jpg=b"")}, DATA,
     ("2 images in a row in ", "a.png is not an image", "; look at the data with sdkit data check")),
    ("both", "NaN pixels", lambda k, p: {"data": nan_pixels(p / "d")}, DATA, ("a.tiff", "values from nan to nan")),
    ("both", "data is an image", lambda k, p: {"data": k / "photos" / "000.png"}, DATA,
     ("000.png is no data set; name",)),
    ("both", "no data", lambda k, p: {"data": p / "x" / "photos"}, DATA,
     ("photos' is neither a path that exists nor",)),
    ("both", "no home", lambda k, p: {"data": "~nobody.at.all/photos"}, DATA, ("is neither a path that exists nor",)),
    ("both", "no model", lambda k, p: {"model": p / "model"}, SOURCE, ("model' does not exist; give one that does",)),
    ("both", "misspelt model", lambda k, p: {"model": "emojy"}, SOURCE, ("'emojy' is neither a path that exists nor",)),
    ("both", "no network", lambda k, p: {"model": "some/body"}, SOURCE,
     ("'some/body' is not in the cache, and the Hub",)),
    ("vae", "a U-Net's folder", lambda k, p: {"model": k / "model" / "unet"}, SOURCE,
     ("holds a UNet2DCond", "not a VAE")),
    ("unet", "a VAE's folder", lambda k, p: {"model": k / "model" / "vae"}, SOURCE,
     ("holds an AutoencoderKL, not a CLIP",)),
    ("unet", "no text encoder", lambda k, p: {"model": other_model(k, p / "m", "text_encoder")}, SOURCE,
     ("m' has no text_encoder/config.json; give",)),
    ("unet", "no tokenizer", lambda k, p: {"model": other_model(k, p / "m", "tokenizer")}, SOURCE,
     ("has no tokenizer",)),
    ("unet", "no schedule", lambda k, p: {"model": other_model(k, p / "m", "scheduler")}, SOURCE,
     ("m' has no scheduler/",)),
    ("unet", "inpainting", lambda k, p: {"model": other_model(k, p / "m", in_channels=9)}, SOURCE,
     ("looks like an inpainting model (9 input channels); give a text-to-image model",)),
    ("unet", "learned variance", lambda k, p: {"model": other_model(k, p / "m", out_channels=8)}, ARGUMENT,
     ("a U-Net that learned its variance cannot be trained",)),
    ("unet", "another text encoder", lambda k, p: {"model": other_model(k, p / "m", cross_attention_dim=24)}, ARGUMENT,
     ("this U-Net attends to embeddings of width 24, this text encoder makes 16",)),
    ("vae", "AutoencoderTiny", lambda k, p: {"model": taesd(p / "t")}, ARGUMENT,
     ("t' holds an AutoencoderTiny, which cannot be trained; give an AutoencoderKL",)),
    ("vae", "AutoencoderTiny as init", lambda k, p: {"init": taesd(p / "t")}, SOURCE,
     ("is the config of AutoencoderTiny, not of AutoencoderKL or VQModel; give another",)),
    ("both", "no init", lambda k, p: {"init": p / "x"}, SOURCE,
     ("there is no config at ", "x'; give a config.json of")),
    ("vae", "init of a U-Net", lambda k, p: {"init": k / "model" / "unet"}, SOURCE,
     ("is the config of UNet2DCond", "not of")),
    ("unet", "init of a VAE", lambda k, p: {"init": k / "model" / "vae"}, SOURCE,
     ("is the config of AutoencoderKL, not of",)),
    ("both", "init is no JSON", lambda k, p: {"init": written(p / "c.json", "{")}, SOURCE,
     ("c.json' is not valid JSON",)),
    ("both", "init is a list", lambda k, p: {"init": written(p / "c.json", "[]")}, SOURCE,
     ("c.json' ", "holds no JSON object")),
    ("unet", "init of another width", lambda k, p: {"init": other_model(k, p / "m", cross_attention_dim=24)}, ARGUMENT,
     ("of width 24, this text encoder makes 16",)),
    ("unet", "eps at zero SNR", lambda k, p: {"zero_snr": True}, ARGUMENT,
     ("at zero terminal SNR the noise says nothing of the image: train with prediction_type v_prediction or sample",)),
    ("both", "size", lambda k, p: {"size": 36}, ARGUMENT, ("size 36 x 36", "divide by 8", "; change it")),
    ("both", "size, one side", lambda k, p: {"size": (32, 36)}, ARGUMENT,
     ("size 32 x 36", "divide by 8", "; change it")),
    ("vae", "too small for SSIM", lambda k, p: {"size": 8}, ARGUMENT,
     ("size 8 x 8 must divide by 8 and be at least 11",)),
    ("vae", "too small for LPIPS", lambda k, p: {"size": 8, "lpips": k / "lpips.safetensors"}, ARGUMENT,
     ("size 8 x 8 must divide by 8 and be at least 16; change it",)),
    ("vae", "too small for AlexNet", lambda k, p: {"size": (32, 24), "lpips_weight": 0.1}, ARGUMENT,
     ("size 32 x 24 must divide by 8 and be at least 31; change it",)),
    ("vae", "too small for a named AlexNet file", lambda k, p: {"size": 24, "lpips": EMBEDDED}, ARGUMENT,
     ("size 24 x 24 must divide by 8 and be at least 31; change it",)),
    ("vae", "too small for the discriminator", lambda k, p: {"size": 16, "disc_weight": 0.5}, ARGUMENT,
     ("size 16 x 16 must divide by 8 and be at least 24; change it",)),
    ("unet", "rank", lambda k, p: {"lora_rank": 10**9}, ARGUMENT, (
        "lora_rank 1000000000 is above", "added to, 32, ")),
    ("unet", "target", lambda k, p: {"lora_rank": 2, "lora_targets": ("attention", "to_z")}, ARGUMENT,
     ("lora_targets names 'to_z', and no layer that is trained has this name; give attention",)),
    ("unet", "target of the text encoder alone", lambda k, p: {"lora_rank": 2, "lora_targets": ("fc1",)}, ARGUMENT,
     ("lora_targets names 'fc1', and no layer",)),
    ("unet", "no target in the text encoder",
     lambda k, p: {"lora_rank": 2, "lora_targets": ("convolutions",), "train_text_encoder": True}, ARGUMENT,
     ("lora_targets names no layer of the text encoder; add one, such as attention",)),
    ("vae", "patches that do not fit", lambda k, p: {"mask_ratio": 0.5, "mask_patch": 12}, ARGUMENT,
     ("size 32 x 32 does not divide into patches of 12 x 12 pixels; change mask_patch",)),
    ("vae", "no patch is masked", lambda k, p: {"mask_ratio": 0.02}, ARGUMENT,
     ("mask_ratio 0.02 masks 0 of the 16 patches of an image; change it, or take a smaller mask_patch",)),
    ("vae", "one patch alone", lambda k, p: {"mask_ratio": 0.5, "mask_patch": 32}, ARGUMENT,
     ("mask_ratio 0.5 masks 0 of the 1 patches of an image",)),
    ("vae", "all patches are masked", lambda k, p: {"mask_ratio": 0.98}, ARGUMENT,
     ("mask_ratio 0.98 masks 16 of the 16 patches of an image",)),
    ("vae", "no VGG", lambda k, p: {"lpips_weight": 0.1, "lpips": "vgg"}, SOURCE,
     ("the weights of LPIPS with VGG do not ship: put", "SDKIT_LPIPS", "'alex'")),
    ("vae", "LPIPS is missing", lambda k, p: {"lpips": p / "l.safetensors"}, SOURCE,
     ("the weights of LPIPS are not at ", "l.safetensors'; give a file of them")),
    ("vae", "LPIPS is damaged", lambda k, p: {"lpips": written(p / "l.safetensors", b"x" * 99)}, SOURCE,
     ("l.safetensors' is damaged", "; download it again")),
    ("vae", "LPIPS is something else", lambda k, p: {"lpips": k / "cache" / "shard-00000.safetensors"}, SOURCE,
     ("does not hold the weights of LPIPS with VGG-16",)),
    ("vae", "nothing to validate on", lambda k, p: {"validation_data": folder(p / "v")}, DATA,
     ("there is no image", "/v;")),
    ("vae", "no folder to validate on", lambda k, p: {"validation_data": p / "v"}, DATA,
     ("v' is neither a path that",)),
    ("vae", "broken ones to validate on", lambda k, p: {"validation_data": dots(p / "v")}, DATA,
     ("v cannot be used, the first: a.png",)),
    ("vae", "a cache", lambda k, p: {"data": k / "cache"}, DATA,
     ("cache' is a latent cache, and a VAE learns from images; give those it was made of",)),
    ("vae", "a cache to validate on", lambda k, p: {"validation_data": k / "cache"}, DATA,
     ("cache' is a latent cache",)),
    ("unet", "unfinished cache", lambda k, p: {"data": damaged(k, p / "c", "unfinished")}, CACHE,
     ("the cache ", "c is not finished; run the same sdkit cache command again")),
    ("unet", "damaged manifest", lambda k, p: {"data": damaged(k, p / "c", "no manifest")}, CACHE,
     ("manifest.json is damag",)),
    ("unet", "cut shard", lambda k, p: {"data": damaged(k, p / "c", "cut")}, CACHE,
     ("shard-00000.safetensors of the cache",)),
    ("unet", "lost shard", lambda k, p: {"data": damaged(k, p / "c", "gone")}, CACHE, ("is missing or cut short",)),
    ("unet", "damaged shard", lambda k, p: {"data": damaged(k, p / "c", "bytes")}, CACHE,
     ("is damaged (wrong checksum); delete that, then",)),
    ("unet", "cache of another VAE", lambda k, p: {"data": k / "cache", "model": other_vae(k, p / "m")}, CACHE,
     ("was made with the VAE ", "as in this run; make another with sdkit cache for this run")),
    ("unet", "cache of another size", lambda k, p: {"data": k / "cache", "size": 64}, CACHE,
     ("size 32 x 32, not 64 x 64",)),
    ("unet", "cache without crops", lambda k, p: {"data": k / "cache", "augment": "crop"}, CACHE,
     ("crop center, not random",)),
    ("unet", "cache without flips", lambda k, p: {"data": k / "cache", "augment": "flip"}, CACHE,
     ("flip false, not true",)),
    ("both", "unknown tracker", lambda k, p: {"report_to": "nothing"}, ARGUMENT,
     ("report_to 'nothing' is not one of",)),
    ("both", "missing tracker", lambda k, p: {"report_to": "comet_ml"}, ARGUMENT,
     ("'comet_ml', which is not installed",)),
    ("both", "fp16 on a CPU", lambda k, p: {"mixed_precision": "fp16"}, ARGUMENT, ("'fp16' needs a GPU; use 'bf16'",)),
    ("both", "no bitsandbytes", lambda k, p: {"use_8bit_adam": True}, ARGUMENT, ("needs bitsandbytes; install it",)),
    ("both", "rate below the schedule's end", lambda k, p: {"lr_scheduler": "polynomial", "learning_rate": 1e-9},
     ARGUMENT, ("lr_scheduler polynomial: lr_end (1e-07) must be smaller than initial lr (1e-09); take",)),
    ("both", "out_dir is a file", lambda k, p: {"out_dir": written(p / "f", "")}, TRAINING,
     ("cannot train in ", "f: file exists; name a folder that can be written")),
    ("both", "out_dir is in a file", lambda k, p: {"out_dir": written(p / "f", "") / "run"}, TRAINING,
     ("f/run: not a directory; name a folder that can be written",)),
    ("both", "a model's out_dir", lambda k, p: {"out_dir": shutil.copytree(k / "model" / "vae", p / "v")}, TRAINING,
     ("v holds files that are of no run of sdkit; name another out_dir",)),
    ("both", "somebody's out_dir", lambda k, p: {"out_dir": folder(p / "f", metrics__jsonl=b"")}, TRAINING,
     ("f holds files that are of no run of sdkit",)),
]  # fmt: skip
IDS = [f"{stage}: {what}" for one, what, *_ in CASES for stage in (("vae", "unet") if one == "both" else (one,))]


@pytest.mark.parametrize(
    ("stage", "make", "kind", "fragments"),
    [(s, *case[2:]) for case in CASES for s in (("vae", "unet") if case[0] == "both" else case[:1])],
    ids=IDS,
)
def test_training(
    stage: str, make: Make, kind: type[sdkit.SdkitError], fragments: tuple[str, ...], kit: Path, tmp_path: Path
) -> None:
    changes = make(kit, tmp_path)
    if torch.cuda.is_available() and "mixed_precision" in changes:
        pytest.skip("this machine can")
    out = Path(changes.pop("out_dir", tmp_path / "run"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is skipped")
        one_sentence(lambda: train(stage, kit, out, **changes), kind, *fragments)
    if out in (tmp_path / "run", tmp_path / "f" / "run"):
        nothing_half_done(out)
    else:  # files of another program
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a read-only file system")
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_read_only_place(stage: str, kit: Path) -> None:
    """Tested in /proc: root may write into folders without write permission, but not there."""
    one_sentence(lambda: train(stage, kit, Path("/proc/sdkit/run")), TRAINING, "cannot train in /proc/sdkit/run: ")


def test_no_captions_are_no_error(kit: Path, tmp_path: Path) -> None:
    data = shutil.copytree(kit / "photos", tmp_path / "data", ignore=shutil.ignore_patterns("*.txt"))
    assert np.isfinite(losses(train("unet", kit, tmp_path / "unet", data=data, max_steps=2))).all()
    assert np.isfinite(losses(train("vae", kit, tmp_path / "vae", data=data, max_steps=2))).all()


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


# Values that are not finite


def overflow_in_model(kit: Path, path: Path, part: str, key: str) -> Path:
    shutil.copytree(kit / "model", path)
    weights = path / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors[key].fill_(3e38)  # finite, as loading demands, but sums of its products overflow
    save_file(tensors, weights, {"format": "pt"})
    return path


BAD_NUMBERS: dict[str, tuple[str, Make]] = {
    "a VAE's decoder": ("vae", lambda k, p: {"model": overflow_in_model(k, p / "m", "vae", "decoder.conv_out.weight")}),
    "a VAE's encoder": ("vae", lambda k, p: {"model": overflow_in_model(k, p / "m", "vae", "encoder.conv_in.weight")}),
    "a U-Net": ("unet", lambda k, p: {"model": overflow_in_model(k, p / "m", "unet", "conv_in.weight")}),
    "the U-Net's VAE": (
        "unet",
        lambda k, p: {"model": overflow_in_model(k, p / "m", "vae", "encoder.conv_out.weight")},
    ),
    "LoRA's U-Net": (
        "unet",
        lambda k, p: {"model": overflow_in_model(k, p / "m", "unet", "conv_in.weight"), "lora_rank": 2},
    ),
}


@pytest.mark.parametrize("what", BAD_NUMBERS)
def test_no_finite_loss_ends_the_run_with_the_files_names(what: str, kit: Path, tmp_path: Path) -> None:
    """Pictures drawn during validation must not raise first, although they are computed from the same values."""
    stage, make = BAD_NUMBERS[what]
    changes = make(kit, tmp_path) | ({"validation_prompts": ("a disc",)} if stage == "unet" else {})
    with pytest.warns(UserWarning, match=r"step \d+ is skipped: the loss or its gradient is not finite \(00\d.png"):
        one_sentence(
            lambda: train(stage, kit, tmp_path / "run", max_steps=20, **changes),
            TRAINING,
            "in 10 steps in a row the loss or its gradient is not finite (00",
            ".png); look at them, or lower the learning rate",
        )
    nothing_half_done(tmp_path / "run")
    assert [line["skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]] == [*range(1, 11)]
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000000.png"]


# Run folders


@pytest.fixture(scope="module")
def done(kit: Path) -> Path:
    """Train a run of two steps, with a checkpoint of each."""
    return train("unet", kit, kit / "done", max_steps=2, save_every=1, ema_decay=0.9)


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 2e-5}, "learning_rate was 1e-05, is 2e-05"),
    ({"seed": 1}, "seed was 0, is 1"),
    ({"size": 40}, "size was [32, 32], is [40, 40]"),
    ({"augment": "flip"}, "augment was [], is ['flip']"),
    ({"lora_rank": 2}, "lora_rank was None, is 2"),
    ({"train_text_encoder": True}, "train_text_encoder was False, is True"),
    ({"snr_gamma": 5.0}, "snr_gamma was None, is 5.0"),
    ({"mixed_precision": "bf16"}, "mixed_precision was 'no', is 'bf16'"),
    ({"ema_decay": 0.0}, "ema_decay was 0.9, is 0.0"),
    ({"batch_size": 3}, "its steps took 1 samples, these take 3 (batch_size x "),
    ({"gradient_accumulation_steps": 2}, "its steps took 1 samples, these take 2 (batch_size x "),
    ({"stage": "vae"}, "stage was 'UNetConfig', is 'VAEConfig'"),
]


@pytest.mark.parametrize(("change", "fragment"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_the_folder_of_another_run(change: dict[str, Any], fragment: str, run: Path, kit: Path) -> None:
    before, stage = files(run), change.get("stage", "unet")
    settings = {"max_steps": 3, "ema_decay": 0.9, **change}
    settings.pop("stage", None)
    words = (f"{run} holds another run: {fragment}", "; name another out_dir (only these may change: batch_size, ")
    one_sentence(lambda: train(stage, kit, run, **settings), TRAINING, *words)
    assert files(run) == before


@pytest.mark.parametrize("change", ["another image", "another caption", "an image less", "a cache"])
def test_the_data_of_another_run(change: str, run: Path, kit: Path) -> None:
    data = shutil.copytree(kit / "photos", run.parent / "photos")
    if change == "another image":
        shutil.copy(data / "000.png", data / "100.png")
    elif change == "another caption":
        (data / "000.txt").write_text("a black disc")
    elif change == "an image less":
        (data / "002.png").unlink()
    before = files(run)
    different = "its data was different (names, captions, or sizes of files)"
    sentence = f"{run} holds another run: {different}; name another out_dir"
    one_sentence(lambda: again(kit, run, data=kit / "cache" if change == "a cache" else data), TRAINING, sentence)
    assert files(run) == before


def test_the_same_data_elsewhere(run: Path, kit: Path) -> None:
    again(kit, run, data=shutil.copytree(kit / "photos", run.parent / "photos"))
    assert newest(run / "checkpoints") == run / "checkpoints" / "step-00000003"


def again(kit: Path, run: Path, **changes: Any) -> Path:
    return train("unet", kit, run, **{"save_every": 1, "ema_decay": 0.9, "max_steps": 3} | changes)


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_than_are_done(steps: int, run: Path, kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    again(kit, run, max_steps=steps)
    assert capsys.readouterr().err == f"{run} is finished: step 2, see {run / 'result'}.\n"
    assert {**files(run), "config.json": b""} == {**before, "config.json": b""}


def test_fewer_steps_than_are_done_where_there_is_no_result(run: Path, kit: Path) -> None:
    before = files(run / "result")
    shutil.rmtree(run / "result")
    again(kit, run, max_steps=1)
    assert files(run / "result") == before


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"lora_rank": 2}, {"data": "cache"}], ids=lambda change: next(iter(change))
)
def test_a_checkpoint_of_another_run_copied_in(change: dict[str, Any], run: Path, kit: Path) -> None:
    """Refuse a checkpoint of another run, even if its tensors would fit."""
    data = {"data": kit / "cache"} if "data" in change else {}
    other = again(kit, run.parent / "other", **change | data)
    shutil.copytree(other / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000003")
    before = files(run)
    sentence = f"{run}/checkpoints/step-00000003 is of another run; remove it, or name another out_dir"
    one_sentence(lambda: again(kit, run), TRAINING, sentence)
    assert files(run) == before
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    again(kit, run)


def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, kit: Path, tmp_path: Path) -> None:
    whole = again(kit, tmp_path / "whole")
    (run / "checkpoints" / "step-00000002" / "unet.ema.safetensors").write_bytes(b"")
    with pytest.warns(
        UserWarning, match=r"step-00000002 is damaged \(the checksum of unet.ema.safetensors is wrong\); the"
    ):
        again(kit, run)
    assert files(run / "checkpoints") == files(whole / "checkpoints")
    assert files(run / "result") == files(whole / "result")


def test_damaged_checkpoints_alone(run: Path, kit: Path) -> None:
    for path in checkpoints(run / "checkpoints"):
        (path / "state.json").unlink()
    before = files(run)
    with pytest.warns(UserWarning, match="is damaged"):
        one_sentence(
            lambda: again(kit, run), TRAINING, "every checkpoint in ", " is damaged; remove that folder to begin"
        )
    assert files(run) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"_class_name": "AutoencoderKL"}'])
def test_a_damaged_config(content: str, run: Path, kit: Path) -> None:
    (run / "config.json").write_text(content)
    before = files(run)
    one_sentence(lambda: again(kit, run), TRAINING, f"{run} holds files that are of no run of sdkit")
    assert files(run) == before


def test_settings_that_may_change_do(run: Path, kit: Path) -> None:
    moved = run.rename(run.parent / "moved")
    again(kit, moved, keep_checkpoints=1, validate_every=2, save_every=3)
    assert newest(moved / "checkpoints") == moved / "checkpoints" / "step-00000003"
    assert len(checkpoints(moved / "checkpoints")) == 1


def test_files_of_a_vae_run_may_move(kit: Path, tmp_path: Path) -> None:
    """Paths may change on resume. The contents of LPIPS's weights and of the validation images may not."""
    held_out = shutil.copytree(kit / "photos", tmp_path / "held_out")
    lpips = Path(shutil.copy(kit / "lpips.safetensors", tmp_path / "lpips.safetensors"))
    settings: dict[str, Any] = {"lpips_weight": 0.1, "ema_decay": 0.9, "init": kit / "model" / "vae" / "config.json"}
    run = train("vae", kit, tmp_path / "run", lpips=lpips, validation_data=held_out, **settings)
    shape = shutil.copy(settings["init"], tmp_path / "config.json")
    settings |= {"max_steps": 2, "init": shape}
    held_out, lpips = held_out.rename(tmp_path / "elsewhere"), lpips.rename(tmp_path / "weights.safetensors")
    train("vae", kit, run, lpips=lpips, validation_data=held_out, **settings)
    assert newest(run / "checkpoints") == run / "checkpoints" / "step-00000002"
    weights = load_file(lpips)
    save_file({key: value * 2 for key, value in weights.items()}, tmp_path / "others.safetensors")
    (held_out / "000.txt").write_text("another caption")
    holds = f"{run} holds another run: "
    for change, fragment in (
        ({"lpips": tmp_path / "others.safetensors", "validation_data": held_out}, "its LPIPS had different weights"),
        ({"lpips": lpips, "validation_data": held_out}, "its validation data was different"),
        ({"lpips": lpips, "validation_data": None}, "its validation data was different"),
    ):
        wanted = {**settings, **change}
        one_sentence(lambda wanted=wanted: train("vae", kit, run, **wanted), TRAINING, holds + fragment)


@pytest.mark.parametrize("before", ["alex", "lpips.safetensors"])
def test_a_run_keeps_its_network_of_lpips(
    before: str, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another network is refused, however it is named. Runs of VGG from before the choice resume without being asked
    for a network."""
    networks = {"alex": "alex", "lpips.safetensors": "vgg"}
    (after,) = networks.keys() - {before}
    monkeypatch.setenv("SDKIT_LPIPS", str(kit / before) if before != "alex" else "")
    run = train("vae", kit, tmp_path / "run", lpips_weight=0.1)
    config = json.loads((run / "config.json").read_text())
    assert config["lpips_backbone_identity"] == networks[before]
    assert config["settings"]["lpips"].endswith(before)
    sentence = f"holds another run: its LPIPS was the network '{networks[before]}', this is '{networks[after]}' (give"
    named = after if after == "alex" else kit / after
    one_sentence(lambda: train("vae", kit, run, lpips_weight=0.1, lpips=named), TRAINING, sentence)
    monkeypatch.setenv("SDKIT_LPIPS", str(named))
    one_sentence(lambda: train("vae", kit, run, lpips_weight=0.1), TRAINING, sentence)
    monkeypatch.setenv("SDKIT_LPIPS", str(kit / before) if before != "alex" else "")
    del config["lpips_backbone_identity"]
    (run / "config.json").write_text(json.dumps(config))
    train("vae", kit, run, lpips_weight=0.1, max_steps=2)
    assert newest(run / "checkpoints") == run / "checkpoints" / "step-00000002"


def test_torch_compile_on_a_cpu(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled training on a CPU would go on silently with gradients of 0."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    one_sentence(
        lambda: train("unet", kit, tmp_path / "run"),
        ARGUMENT,
        "torch.compile loses gradients on a CPU; leave Accelerate's",
    )
    monkeypatch.undo()
    assert Accelerator().state.dynamo_plugin.backend == "NO"  # other Accelerators keep the default backend


def test_names_too_long_for_a_file(kit: Path, tmp_path: Path) -> None:
    name = "x" * 300
    one_sentence(lambda: train("vae", kit, tmp_path / "run", data=name), DATA, "neither a path that exists nor")
    one_sentence(lambda: train("unet", kit, tmp_path / "run", data=name), DATA, "neither a path that exists nor")
    lacking = {"lpips": name, "lpips_weight": 0.1}
    one_sentence(lambda: train("vae", kit, tmp_path / "run", **lacking), SOURCE, "cannot be read (File name too long)")


def test_an_empty_variable_names_no_lpips(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDKIT_LPIPS", "")
    assert VAEConfig(data=kit, out_dir=tmp_path / "run").lpips == "alex"
