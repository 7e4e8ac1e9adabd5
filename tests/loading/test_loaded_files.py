"""Weights and settings are loaded from the very files that were opened and checked, whatever a folder points to."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

import sdkit
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.single_file import ASSETS
from tests.helpers.loaders import describe, load_text, load_unet, load_vae

EMOJI = ASSETS / "emoji"
LOADERS: dict[str, Callable[..., Any]] = {
    "vae": load_vae,
    "unet": load_unet,
    "text_encoder": lambda source, **options: load_text(source, **options)[0],
}
STEMS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
THEIRS: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMOJI, tmp_path / "model"))


def weights_of(model: Path, part: str) -> Path:
    return model / part / f"{STEMS[part]}.safetensors"


def shard(model: Path, part: str, suffix: str = ".safetensors", variant: str = "") -> Path:
    """Split the weights of `part` into two shards, remove the single file, and return the index."""
    whole = weights_of(model, part)
    tensors, names = load_file(whole), {}
    whole.unlink()
    middle = f".{variant}" if variant else ""
    for i, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        name = f"{STEMS[part]}{middle}-0000{i + 1}-of-00002{suffix}"
        held = {key: tensors[key] for key in keys}
        if suffix == ".bin":
            torch.save(held, whole.with_name(name))
        else:
            save_file(held, whole.with_name(name), {"format": "pt"})
        names |= dict.fromkeys(keys, name)
    stem = "pytorch_model" if suffix == ".bin" and part == "text_encoder" else STEMS[part]
    index = whole.with_name(f"{stem}{suffix}.index{middle}.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def edit(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


def assert_equal(network: torch.nn.Module, reference: torch.nn.Module) -> None:
    found, expected = network.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not network.training


# Single files and shards


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_load_as_by_their_own_library(part: str, dtype: torch.dtype) -> None:
    ours, theirs = LOADERS[part](EMOJI, dtype=dtype), THEIRS[part].from_pretrained(EMOJI / part, dtype=dtype)
    assert_equal(ours, theirs)
    ignored = {"_name_or_path", "_diffusers_version", "transformers_version", "architectures", "dtype", "_class_name"}
    settings = [
        {key: value for key, value in dict(config).items() if key not in ignored}
        for config in ((x.to_dict() if part == "text_encoder" else x) for x in (ours.config, theirs.config))
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("part", LOADERS)
def test_the_one_file_wins_over_an_index_beside_it(model: Path, part: str) -> None:
    path = weights_of(model, part)
    tensors = load_file(path)
    save_file({key: torch.zeros_like(x) for key, x in tensors.items()}, path.with_name("other.safetensors"))
    index = {"weight_map": dict.fromkeys(tensors, "other.safetensors")}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    assert_equal(LOADERS[part](model), LOADERS[part](EMOJI))


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_load_and_are_described_as_one_file(model: Path, part: str, suffix: str) -> None:
    shard(model, part, suffix)
    assert_equal(LOADERS[part](model), LOADERS[part](EMOJI))
    assert describe(model).components == describe("emoji").components


def test_shards_of_a_variant(model: Path) -> None:
    shard(model, "unet", variant="fp16")
    assert_equal(load_unet(model, variant="fp16"), load_unet(EMOJI))


@pytest.mark.parametrize(
    "name",
    ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "*.safetensors", "a\\b.safetensors", "a.py", 5],
)
def test_an_index_names_files_beside_it_alone(model: Path, name: Any) -> None:
    index = shard(model, "unet")
    placed = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=placed | {"conv_in.weight": name})
    for call in (load_unet, describe):
        with pytest.raises(
            SourceError, match=r"says that conv_in\.weight is in .*, which is no file of weights beside it"
        ):
            call(model)


def test_an_index_and_its_shards_must_agree(model: Path) -> None:
    index = shard(model, "unet")
    content = json.loads(index.read_text())
    more = content["weight_map"] | {"zzz": content["weight_map"]["conv_in.bias"]}
    edit(index, weight_map=more)
    with pytest.raises(
        SourceError, match=r"of-00002\.safetensors' lacks zzz, unlike .*index\.json says; download both"
    ):
        load_unet(model)
    fewer = {key: name for key, name in content["weight_map"].items() if key != "conv_in.bias"}
    edit(index, weight_map=fewer)
    with pytest.raises(
        SourceError, match=r"of-00002\.safetensors' also holds conv_in\.bias, unlike .*index\.json says"
    ):
        load_unet(model)
    edit(index, weight_map=[])
    with pytest.raises(SourceError, match=r"index\.json' has no weight_map, as an index of shards has"):
        load_unet(model)
    edit(index, weight_map=content["weight_map"])
    (model / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"00002-of-00002\.safetensors' does not exist; give a source that has it"):
        load_unet(model)


# Variants


def renamed(model: Path, part: str, variant: str) -> None:
    path = weights_of(model, part)
    path.rename(path.with_name(path.name.replace(".", f".{variant}.", 1)))


@pytest.mark.parametrize("part", LOADERS)
def test_variants_that_are_there_are_named(model: Path, part: str) -> None:
    shutil.copy(weights_of(model, part), weights_of(model, part).with_suffix(".fp16.safetensors"))
    renamed(model, part, "non_ema")
    with pytest.raises(
        SourceError, match=r"has no .*model\.safetensors, but the variant 'fp16' and 'non_ema'; choose it"
    ):
        LOADERS[part](model)
    with pytest.raises(SourceError, match=r"has no .*model\.bf16\.safetensors, but the variant 'fp16' and 'non_ema'; "):
        LOADERS[part](model, variant="bf16")
    assert_equal(LOADERS[part](model, variant="non_ema"), LOADERS[part](EMOJI))


def test_a_part_without_the_variant_is_loaded_from_its_plain_file(model: Path) -> None:
    renamed(model, "unet", "fp16")
    assert_equal(load_vae(model, variant="fp16"), load_vae(EMOJI))
    with pytest.raises(SourceError, match=r"has no vae/diffusion_pytorch_model\.fp61\.safetensors; give a folder"):
        load_vae(model, variant="fp61")  # a variant that no part has
    with pytest.raises(ArgumentError, match=r"^variant '\.\./x' is not one word such as 'fp16'"):
        load_vae(model, variant="../x")


# Configs


@pytest.mark.parametrize("part", LOADERS)
def test_the_class_follows_from_the_role(model: Path, part: str) -> None:
    path = model / part / "config.json"
    named = ("_class_name", "architectures")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in named}))
    for where in (model, model / part):
        assert_equal(LOADERS[part](where), LOADERS[part](EMOJI))
    assert describe(model).components == describe("emoji").components
    others = {"vae": load_unet, "unet": load_vae, "text_encoder": load_vae}
    with pytest.raises(SourceError, match="holds an unknown network, not a"):
        others[part](model / part)


CODE: dict[str, Any] = {
    "auto_map": {"AutoModel": "evil--evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"},
    "attn_implementation": "org/kernel",
    "_attn_implementation": "org/kernel",
    "_attn_implementation_internal": "org/kernel",
    "trust_remote_code": True,
    "_pre_quantization_dtype": "float16",
    "torch_dtype": "evil",
    "dtype": "evil",
    "use_kernels": True,
    "return_dict": False,
    "_name_or_path": "org/evil",
    "name_or_path": "org/evil",
    "pretrained_model_name_or_path": "org/evil",
    "_use_default_values": ["in_channels", "sample_size"],
}
TOKENIZER_CODE: dict[str, Any] = CODE | {
    "tokenizer_class": "Evil",
    "gguf_file": "evil.gguf",
    "init_inputs": [{"a": 0}],
    "fast_tokenizer_files": ["tokenizer.99.json"],
    "tokenizer_file": "/etc/passwd",
    "vocab_file": "/etc/passwd",
    "tokenizer_object": "evil",
    "vocab": {"a": 0},
    "merges": ["a b"],
    "backend": "sentencepiece",
    "processor_class": "Evil",
}


def test_keys_that_name_code_or_files_are_dropped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that name code or files must have no effect: no connection, no search for a foreign module, and the same
    model.
    """
    for part in LOADERS:
        edit(model / part / "config.json", **CODE)
    edit(model / "tokenizer" / "tokenizer_config.json", **TOKENIZER_CODE)
    (model / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(TOKENIZER_CODE))
    (model / "text_encoder" / "generation_config.json").write_text(json.dumps(CODE | {"max_length": "x"}))
    for where in (model, model / "text_encoder", model / "tokenizer"):
        (where / "evil.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    looked_for: list[str] = []

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if listening and (event.startswith("socket.") or (event == "open" and "evil" in str(args[0]))):
            looked_for.append(f"{event} {args}")

    def refuse(*args: Any, **options: Any) -> None:
        looked_for.append(f"socket {args}")
        raise OSError("no network here")

    class Finder:
        @staticmethod
        def find_spec(name: str, *args: Any) -> None:
            if "evil" in name.lower() or name.startswith(("kernels", "transformers_modules")):
                looked_for.append(f"import {name}")

    listening = True
    sys.addaudithook(heard)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    try:
        loaded = {part: load(model) for part, load in LOADERS.items()}
        words = load_text(model)[1]
    finally:
        listening = False
    assert not looked_for
    for part, network in loaded.items():
        assert_equal(network, LOADERS[part](EMOJI))
    assert words.get_vocab() == load_text(EMOJI)[1].get_vocab()
    assert not {*CODE} & {*dict(loaded["unet"].config)}
    assert isinstance(loaded["text_encoder"](torch.tensor([[1, 2]])).last_hidden_state, torch.Tensor)


@pytest.mark.parametrize("part", LOADERS)
def test_quantized_weights_are_refused(model: Path, part: str) -> None:
    edit(model / part / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(
        SourceError, match=r"config\.json' is the config of quantized weights .*; give the model in float16"
    ):
        LOADERS[part](model)


def test_old_names_of_a_decoder_s_attention(model: Path) -> None:
    """Files written by diffusers before 0.18 have other names for attention. diffusers reads them too."""
    path = weights_of(model, "vae")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(model / "vae")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(new, name): x for key, x in tensors.items()}
    assert tensors.keys() != load_file(path).keys()
    save_file(tensors, path, {"format": "pt"})
    assert_equal(load_vae(model), AutoencoderKL.from_pretrained(model / "vae"))


def test_a_tensor_that_a_text_encoder_has_no_place_for_is_named(model: Path) -> None:
    path = weights_of(model, "text_encoder")
    save_file(load_file(path) | {"encoder.more.weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(SourceError, match=r"encoder\.more\.weight is not part of that network\.$"):
        load_text(model)


# A folder of the Hub's cache as a source


def test_a_folder_of_the_cache_stands_for_its_snapshot(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "models--org--name"
    (base / "snapshots").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"is a folder of the Hub's cache with no snapshot: give another source"):
        load_vae(base)
    model.rename(base / "snapshots" / "a1")
    assert_equal(load_vae(base), load_vae(EMOJI))
    assert describe(base).path == base / "snapshots" / "a1"
    (base / "snapshots" / "b2").mkdir()
    with pytest.raises(SourceError, match=r"with several snapshots: give one of snapshots/ \(a1, b2\)\.$"):
        load_vae(base)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("a1\n")
    assert_equal(load_vae(base), load_vae(EMOJI))


# Threads


def test_threads_that_load_at_once() -> None:
    """A server may load models in several threads. Each must get its model, and global settings must be restored."""

    def state() -> tuple[Any, ...]:
        logs = [(x.get_verbosity(), x.is_progress_bar_enabled()) for x in (diffusers_logging, transformers_logging)]
        return torch.get_default_dtype(), logs

    before = state()
    expected = {dtype: sdkit.StableDiffusion.from_pretrained("emoji", dtype=dtype) for dtype in ("fp32", "bf16")}

    def load(i: int) -> bool:
        dtype = ("fp32", "bf16")[i % 2]
        sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype=dtype)
        pairs = zip(sd.unet.parameters(), expected[dtype].unet.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load, range(16)))
    assert state() == before
