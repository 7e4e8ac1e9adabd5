from __future__ import annotations

import json
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from sdkit.errors import ArgumentError, SourceError
from sdkit.loading import source
from sdkit.loading.place import resolve
from sdkit.loading.single_file import ASSETS, probe_prediction
from sdkit.loading.tokenizer import load_tokenizer
from tests.helpers import original_layout
from tests.helpers import tiny as tiny_model
from tests.helpers.loaders import describe, load_guidance_scale, load_scheduler_config, load_text, load_unet, load_vae

LOADERS: dict[str, Callable[..., Any]] = {
    "vae": load_vae,
    "unet": load_unet,
    "text": load_text,
    "scheduler": load_scheduler_config,
}
EMOJI = ASSETS / "emoji"
ASTRONAUT = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A model of SD's topology with few channels: in memory, as a diffusers folder, and as a single file."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text: CLIPTextModel
    folder: Path
    file: Path


def make_tiny(root: Path, family: str) -> Tiny:
    second = family == "sd2"
    networks = tiny_model.networks(
        (8, 16, 16, 16),
        vae={"layers_per_block": 2},
        unet={"sample_size": 8}
        | ({"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True} if second else {}),
        text={"hidden_act": "gelu" if second else "quick_gelu"},
    )
    vae, unet, text = networks
    for network in (vae, unet, text):
        # Biases and norms too: in a fresh network they are equal, and the test would not notice if they were mixed up.
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    here = root / family
    networks.save(here)
    copytree(ASSETS / "clip_tokenizer", here / "tokenizer")
    copy(ASSETS / family / "tokenizer" / "tokenizer_config.json", here / "tokenizer")
    copytree(ASSETS / family / "scheduler", here / "scheduler")
    write(here / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    tensors = original(vae, unet, text, open_clip=second)
    tensors |= {"model_ema.diffusion_modelout2bias": torch.zeros(4), "alphas_cumprod": torch.zeros(1000)}
    save_file(tensors, root / f"{family}.safetensors")
    return Tiny(vae=vae.eval(), unet=unet.eval(), text=text.eval(), folder=here, file=root / f"{family}.safetensors")


def original(vae: Any, unet: Any, text: Any, *, open_clip: bool) -> dict[str, torch.Tensor]:
    tensors = original_layout.vae(vae.state_dict())
    tensors |= original_layout.unet(unet.state_dict(), layers_per_block=2)
    tensors |= (original_layout.open_clip if open_clip else original_layout.clip)(text.state_dict())
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def assert_same(network: Any, reference: Any, dtype: torch.dtype = torch.float32) -> None:
    assert not network.training
    found, expected = network.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected[key].to(dtype)), key


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def sd1(root: Path) -> Tiny:
    return make_tiny(root, "sd1")


@pytest.fixture(scope="module")
def sd2(root: Path) -> Tiny:
    return make_tiny(root, "sd2")


@pytest.fixture(params=["sd1", "sd2"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    found: Tiny = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Kinds of sources


@pytest.mark.usefixtures("no_sockets")
def test_embedded() -> None:
    assert_same(load_vae("emoji"), AutoencoderKL.from_pretrained(EMOJI / "vae", dtype=torch.float32))
    assert_same(
        load_unet("emoji", dtype=torch.bfloat16),
        UNet2DConditionModel.from_pretrained(EMOJI / "unet", dtype=torch.bfloat16),
        torch.bfloat16,
    )
    text, tokenizer = load_text("emoji")
    assert {key: tensor.half() for key, tensor in text.state_dict().items()}.keys() == load_file(
        EMOJI / "text_encoder" / "model.safetensors"
    ).keys()
    assert len(tokenizer) == text.config.vocab_size == 2048
    assert load_scheduler_config("emoji") == json.loads((EMOJI / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.usefixtures("no_sockets")
def test_pipeline_folder(tiny: Tiny) -> None:
    assert_same(load_vae(tiny.folder), tiny.vae)
    assert_same(load_unet(str(tiny.folder)), tiny.unet)
    text, tokenizer = load_text(tiny.folder)
    assert_same(text, tiny.text)
    assert tokenizer("a photo of an astronaut riding a horse on mars").input_ids == ASTRONAUT
    assert load_scheduler_config(tiny.folder)["beta_end"] == 0.012


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_component_folders(sd1: Tiny, dtype: torch.dtype) -> None:
    assert_same(load_vae(sd1.folder / "vae", dtype=dtype), sd1.vae, dtype)
    assert_same(load_unet(sd1.folder / "unet", dtype=dtype), sd1.unet, dtype)
    text, tokenizer = load_text(sd1.folder / "text_encoder", dtype=dtype)  # the tokenizer is in the folder beside it
    assert_same(text, sd1.text, dtype)
    assert len(tokenizer) == 49408
    assert load_scheduler_config(sd1.folder / "scheduler") == load_scheduler_config(sd1.folder)


def test_only_the_part_that_is_asked_for_need_exist(sd1: Tiny, tmp_path: Path) -> None:
    copytree(sd1.folder / "unet", tmp_path / "unet")
    assert_same(load_unet(tmp_path), sd1.unet)


def test_taesd_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks: dict[str, Any] = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    tiny = AutoencoderTiny(**layers, **blocks)
    tiny.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    assert isinstance(loaded, AutoencoderTiny)
    assert_same(loaded, tiny)


def test_whole_clip_model_folder(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    copytree(ASSETS / "clip_tokenizer", tmp_path, dirs_exist_ok=True)
    text, tokenizer = load_text(tmp_path)
    ids = torch.tensor([tokenizer("a cat").input_ids])
    expected = model.eval().text_model(ids).last_hidden_state
    assert torch.equal(text(ids).last_hidden_state, expected)
    (component,) = describe(tmp_path).components
    assert component.class_name == "CLIPModel"


def test_old_names_in_a_text_encoder_arrive(sd1: Tiny, tmp_path: Path) -> None:
    """Before transformers 5.6, files had one more level in their names, and a buffer of positions."""
    copytree(sd1.folder / "text_encoder", tmp_path / "text_encoder")
    copytree(sd1.folder / "tokenizer", tmp_path / "tokenizer")
    old = {
        key.removeprefix(original_layout.CLIP_PREFIX): t
        for key, t in original_layout.clip(sd1.text.state_dict()).items()
    }
    save_file(old, tmp_path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_text(tmp_path)[0], sd1.text)


def test_variant_and_pickle_in_a_folder(sd1: Tiny, tmp_path: Path) -> None:
    copytree(sd1.folder / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, weights.with_suffix(".bin"))
    assert_same(load_unet(tmp_path), sd1.unet)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    save_file({key: tensor.half() for key, tensor in tensors.items()}, weights.with_suffix(".fp16.safetensors"))
    # safetensors files have priority over pickles.
    assert torch.equal(load_unet(tmp_path).conv_in.weight, sd1.unet.conv_in.weight * 2)
    halved = load_unet(tmp_path, variant="fp16").conv_in.weight
    assert torch.equal(halved, sd1.unet.conv_in.weight.half().float())


def test_an_existing_path_wins_over_a_hub_id(sd1: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree(sd1.folder / "vae", tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert_same(load_vae("org/name"), sd1.vae)


def test_a_path_from_home(sd1: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sd1.folder.parent))
    assert_same(load_vae("~/sd1"), sd1.vae)


# Single files in the original layout


@pytest.mark.usefixtures("no_sockets")
@torch.inference_mode()
def test_file_equals_folder(tiny: Tiny) -> None:
    generator = torch.Generator().manual_seed(1)
    options = {"config": tiny.folder}
    vae, unet = load_vae(tiny.file, **options), load_unet(tiny.file, **options)
    text, tokenizer = load_text(tiny.file, **options)
    for network, reference in ((vae, tiny.vae), (unet, tiny.unet), (text, tiny.text)):
        assert_same(network, reference)
    images = torch.randn(1, 3, 32, 32, generator=generator)
    assert torch.equal(vae.encode(images).latent_dist.mean, load_vae(tiny.folder).encode(images).latent_dist.mean)
    ids = torch.tensor([tokenizer("a cat!").input_ids])
    cond = text(ids).last_hidden_state
    assert torch.equal(cond, load_text(tiny.folder)[0](ids).last_hidden_state)
    x_t = torch.randn(1, 4, 8, 8, generator=generator)
    assert torch.equal(unet(x_t, 500, cond).sample, load_unet(tiny.folder)(x_t, 500, cond).sample)


def test_vae_alone(sd1: Tiny, tmp_path: Path) -> None:
    for prefix in ("", "first_stage_model.", "vae."):
        tensors = original_layout.vae(sd1.vae.state_dict(), prefix=prefix) | {"loss.logvar": torch.zeros(1)}
        save_file(tensors, tmp_path / "vae.safetensors")
        assert_same(load_vae(tmp_path / "vae.safetensors", config=sd1.folder), sd1.vae)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_pickled_checkpoint(sd1: Tiny, tmp_path: Path, nested: bool, legacy: bool) -> None:
    tensors = load_file(sd1.file)
    content: dict[str, Any] = {"state_dict": tensors, "global_step": 1, "epoch": 2} if nested else tensors
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    assert_same(load_unet(tmp_path / "model.ckpt", config=sd1.folder), sd1.unet)
    assert_same(load_text(tmp_path / "model.ckpt", config=sd1.folder)[0], sd1.text)


def test_half_precision_file(sd2: Tiny, tmp_path: Path) -> None:
    half = {key: t.half() if t.is_floating_point() else t for key, t in load_file(sd2.file).items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded = load_unet(tmp_path / "half.safetensors", config=sd2.folder)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.conv_in.weight, sd2.unet.conv_in.weight.half().float())
    assert_same(load_vae(tmp_path / "half.safetensors", config=sd2.folder, dtype=torch.float16), sd2.vae, torch.float16)


def test_text_names_without_their_middle_level(sd1: Tiny, tmp_path: Path) -> None:
    tensors = original_layout.clip(sd1.text.state_dict())
    save_file({key.replace("text_model.", ""): t for key, t in tensors.items()}, tmp_path / "text.safetensors")
    assert_same(load_text(tmp_path / "text.safetensors", config=sd1.folder)[0], sd1.text)


PUBLISHED = {"vae": 83_653_863, "unet": 859_520_964, "text": 123_060_480}
PUBLISHED_2 = {"vae": 83_653_863, "unet": 865_910_724, "text": 340_387_840}


@pytest.mark.parametrize(("family", "published"), [("sd1", PUBLISHED), ("sd2", PUBLISHED_2), ("sd2-v", PUBLISHED_2)])
def test_public_configs_have_the_published_sizes(family: str, published: dict[str, int]) -> None:
    counts = {part: sum(p.numel() for p in empty(part, family).parameters()) for part in published}
    assert counts == published


def empty(part: str, family: str) -> Any:
    where = ASSETS / family / ("text_encoder" if part == "text" else part)
    with init_empty_weights():
        if part == "text":
            return CLIPTextModel(CLIPTextConfig.from_pretrained(where))
        cls = AutoencoderKL if part == "vae" else UNet2DConditionModel
        return cls.from_config(json.loads((where / "config.json").read_text()))


def random_half(network: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_000_003, generator=generator).half() * 0.02
    sizes = {key: (tensor.numel(), tensor.shape) for key, tensor in network.state_dict().items()}
    # Each tensor is filled from another place in the noise. This is fast, and any two tensors differ.
    return {
        key: noise.roll(7919 * i).repeat(-(-size // len(noise)))[:size].view(shape)
        for i, (key, (size, shape)) in enumerate(sizes.items())
    }


@pytest.mark.usefixtures("no_sockets")
def test_real_size_vae_alone(tmp_path: Path) -> None:
    state = random_half(empty("vae", "sd1"))
    save_file({key: t.contiguous() for key, t in original_layout.vae(state, "").items()}, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors", dtype=torch.float16)
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.config["scaling_factor"] == 0.18215
    (component,) = describe(tmp_path / "vae.safetensors").components
    assert (component.parameters, component.dtype, component.bytes) == (83_653_863, "float16", 2 * 83_653_863)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "published"), [("sd1", PUBLISHED), ("sd2", PUBLISHED_2)])
@pytest.mark.usefixtures("no_sockets")
def test_real_size_checkpoint(tmp_path: Path, family: str, published: dict[str, int]) -> None:
    states = {part: random_half(empty(part, family)) for part in published}
    tensors = original_layout.vae(states["vae"]) | original_layout.unet(states["unet"], layers_per_block=2)
    tensors |= (original_layout.open_clip if family == "sd2" else original_layout.clip)(states["text"])
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    del tensors
    described = {component.part: component for component in describe(file).components}
    for part, loader in (("vae", load_vae), ("unet", load_unet), ("text", load_text)):
        start = time.monotonic()
        loaded = loader(file, dtype=torch.float16)
        print(f"{family} {part}: {time.monotonic() - start:.1f} s")
        network = loaded[0] if part == "text" else loaded
        assert network.state_dict().keys() == states[part].keys()
        assert all(torch.equal(tensor, states[part][key]) for key, tensor in network.state_dict().items())
        if part != "text" or family == "sd1":  # SD 2.x files have an unused text layer
            assert described[part].parameters == published[part]
    # The output of random weights is unlike their input, as a v model's is.
    schedule = load_scheduler_config(file)
    assert schedule["prediction_type"] == ("v_prediction" if family == "sd2" else "epsilon")
    assert load_unet(file, dtype=torch.float16).config["sample_size"] == (96 if family == "sd2" else 64)
    file.unlink()  # two gigabytes, which pytest would not delete


# The tokenizer


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize(("family", "pad"), [("sd1", 49407), ("sd2", 0), ("sd2-v", 0)])
def test_embedded_tokenizer(family: str, pad: int) -> None:
    tokenizer = load_tokenizer(ASSETS / family / "tokenizer")
    assert tokenizer("a photo of an astronaut riding a horse on mars").input_ids == ASTRONAUT
    assert tokenizer("").input_ids == [49406, 49407]
    assert (len(tokenizer), tokenizer.model_max_length, tokenizer.pad_token_id) == (49408, 77, pad)
    padded = tokenizer("A  CAT", padding="max_length").input_ids
    assert padded == [49406, 320, 2368, 49407] + [pad] * 73


def test_vocabulary_is_that_of_clip() -> None:
    vocabulary = json.loads((ASSETS / "clip_tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(49408))
    known = {"!": 0, "a</w>": 320, "cat</w>": 2368, "dog</w>": 1929, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known


# Detecting the config and the prediction type


def sketch(path: Path, metadata: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> Path:
    """Write a file with only the tensors by which a checkpoint is recognised."""
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, metadata=metadata)
    return path


CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
V = {"modelspec.prediction_type": "v"}
EPS = {"modelspec.prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("width", "metadata", "markers", "family", "prediction"),
    [
        (768, {}, (), "sd1", "epsilon"),
        (768, V, (), "sd1", "v_prediction"),
        (768, {}, ("v_pred",), "sd1", "v_prediction"),
        (1024, V, (), "sd2-v", "v_prediction"),
        (1024, EPS, (), "sd2", "epsilon"),
        (1024, EPS, ("v_pred",), "sd2", "epsilon"),  # metadata has priority over markers
        (1024, {}, ("v_pred",), "sd2-v", "v_prediction"),
    ],
)
def test_family_and_stated_prediction(
    tmp_path: Path, width: int, metadata: dict[str, str], markers: tuple[str, ...], family: str, prediction: str
) -> None:
    shapes = {CROSS: (8, width), CONV_IN: (8, 4, 3, 3)} | dict.fromkeys(markers, (0,))
    file = sketch(tmp_path / "model.safetensors", metadata or None, **shapes)
    described = describe(file)
    assert described.family == family
    assert described.components[-1].config["prediction_type"] == prediction
    assert load_scheduler_config(file)["prediction_type"] == prediction
    assert load_scheduler_config(file, prediction_type="sample")["prediction_type"] == "sample"


def test_zero_terminal_snr_marker(tmp_path: Path) -> None:
    shapes = {CROSS: (8, 1024), "v_pred": (0,), "ztsnr": (0,)}
    schedule = load_scheduler_config(sketch(tmp_path / "model.safetensors", **shapes))
    assert schedule["rescale_betas_zero_snr"] is True
    assert schedule["timestep_spacing"] == "trailing"


def test_prediction_type_of_a_folder_can_be_overruled(sd1: Tiny) -> None:
    assert load_scheduler_config(sd1.folder)["prediction_type"] == "epsilon"
    assert load_scheduler_config(sd1.folder, prediction_type="v_prediction")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(("short", "long"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_prediction_types_in_short(sd1: Tiny, sd2: Tiny, short: str, long: str) -> None:
    assert load_scheduler_config(sd1.folder, prediction_type=short)["prediction_type"] == long
    assert load_scheduler_config(sd2.file, config=sd2.folder, prediction_type=short)["prediction_type"] == long


def test_the_guidance_scale_is_what_the_index_says(sd1: Tiny, tmp_path: Path) -> None:
    """The scale is 7.5 where the index does not state it, and for sources without an index."""
    stating = changed(sd1, tmp_path / "stating", "model_index.json", _guidance_scale=3)
    assert load_guidance_scale(stating) == 3.0
    for other in (sd1.folder, sd1.file, sd1.folder / "unet"):
        assert load_guidance_scale(other) == 7.5
    assert 1 < load_guidance_scale("emoji") < 7.5
    for wrong in ("much", True, None, -1, math.nan):
        spoilt = changed(sd1, tmp_path / repr(wrong), "model_index.json", _guidance_scale=wrong)
        with pytest.raises(SourceError, match=r"_guidance_scale .*, not a number from 0 to 100; correct it"):
            load_guidance_scale(spoilt)


def identity_unet(sign: float) -> UNet2DConditionModel:
    """Make a U-Net that returns `sign` times its input: x and -x pass the last skip connection, and silu(x) - silu(-x)
    = x.
    """
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=1,
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()
    state = {key: torch.zeros_like(tensor) for key, tensor in unet.state_dict().items()}
    for channel in range(4):
        state["conv_in.weight"][channel, channel, 1, 1] = 1
        state["conv_in.weight"][channel + 4, channel, 1, 1] = -1
        state["conv_out.weight"][channel, channel, 1, 1] = sign
        state["conv_out.weight"][channel, channel + 4, 1, 1] = -sign
    for channel in range(8):
        state["up_blocks.1.resnets.1.conv_shortcut.weight"][channel, channel + 8] = 1
    state["conv_norm_out.weight"] += 1
    unet.load_state_dict(state)
    return unet


def test_probe_tells_eps_from_v() -> None:
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    unet = identity_unet(1.0)
    output = unet(x, 999, torch.zeros(1, 77, 8)).sample
    # Check that the U-Net does what its docstring says.
    torch.testing.assert_close(output / output.std(), x / x.std(), atol=0.02, rtol=0)
    assert probe_prediction(unet) == "epsilon"
    assert probe_prediction(identity_unet(-1.0)) == "v_prediction"
    assert probe_prediction(load_unet("emoji")) == "v_prediction"  # a trained v model


def test_probe_of_an_inpainting_model() -> None:
    for sign, kind in ((1.0, "epsilon"), (-1.0, "v_prediction")):
        unet = identity_unet(sign)
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        wide = UNet2DConditionModel(**config | {"in_channels": 9}).eval()
        state = unet.state_dict()
        state["conv_in.weight"] = torch.nn.functional.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, 5))
        wide.load_state_dict(state)
        assert probe_prediction(wide) == kind


def test_probe_is_made_once_for_a_file(sd2: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[Any] = []
    monkeypatch.setattr(source.single_file, "probe_prediction", lambda unet: probes.append(unet) or "v_prediction")
    file = source._File(resolve(sd2.file), None)
    assert file.probed(sd2.unet) == file.probed() == "v_prediction"
    assert probes == [sd2.unet]


# Descriptions


def test_describe_tells_of_a_value_that_cannot_be(sd1: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"has block_out_channels 128, not a list of whole numbers or null; correct it"
    ):
        describe(changed(sd1, tmp_path / "a", "vae/config.json", block_out_channels=128))


def test_describe(tiny: Tiny) -> None:
    for described in (describe(tiny.folder), describe(tiny.file, config=tiny.folder)):
        parts = {component.part: component for component in described.components}
        assert parts["vae"].parameters == sum(p.numel() for p in tiny.vae.parameters())
        assert parts["unet"].parameters == sum(p.numel() for p in tiny.unet.parameters())
        assert parts["unet"].dtype == "float32"
        assert parts["unet"].bytes == 4 * sum(p.numel() for p in tiny.unet.parameters())
        assert parts["vae"].config == {"latent_channels": 4, "scaling_factor": 0.18215, "factor": 8}
        assert parts["unet"].config == {"in_channels": 4, "cross_attention_dim": 16, "sample_size": 8}
        assert parts["scheduler"].config["prediction_type"] == "epsilon"
    assert describe(tiny.folder).kind == "folder"
    assert describe(tiny.file, config=tiny.folder).kind == "file"
    assert [component.part for component in describe(tiny.folder / "vae").components] == ["vae"]
    assert describe("emoji").kind == "embedded"


# Silence


def test_loading_is_silent_and_restores_the_logs(tmp_path: Path, sd1: Tiny) -> None:
    code = (
        "import sys; from diffusers.utils import logging as d; from transformers.utils import logging as t;"
        "from tests.helpers.loaders import load_vae, load_unet, load_text;"
        "state = lambda: [(x.get_verbosity(), x.is_progress_bar_enabled()) for x in (d, t)]; before = state();"
        "load_vae(sys.argv[1]); load_unet(sys.argv[1]); load_text(sys.argv[1]);"
        "load_text(sys.argv[2], config=sys.argv[1]);"
        "assert before == state();"
        "assert 'diffusers.pipelines' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(sd1.folder), str(sd1.file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# The Hub and its cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill_cache(cache: Path, repo: str, content: Path, *, revision: str = "main", without: str = "") -> None:
    """Copy `content` into a cache in huggingface_hub's layout: blobs named by hash, and a snapshot of links to them."""
    base = cache / f"models--{repo.replace('/', '--')}"
    (base / "blobs").mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / revision).write_text(COMMIT)
    for i, file in enumerate(sorted(path for path in content.rglob("*") if path.is_file())):
        name = file.relative_to(content)
        if without and str(name).startswith(without):
            continue
        blob = base / "blobs" / f"{i:040x}"
        copy(file, blob)
        link = base / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.mark.usefixtures("no_sockets")
def test_hub_id_from_the_cache(cache: Path, sd1: Tiny) -> None:
    fill_cache(cache, "org/name", sd1.folder)
    assert_same(load_vae("org/name"), sd1.vae)
    assert_same(load_unet("org/name", revision="main"), sd1.unet)
    assert_same(load_unet("org/name", revision=COMMIT), sd1.unet)
    assert_same(load_text("org/name")[0], sd1.text)
    assert load_scheduler_config("org/name") == load_scheduler_config(sd1.folder)
    described = describe("org/name")
    assert (described.kind, described.components) == ("hub", describe(sd1.folder).components)
    assert_same(load_vae(sd1.file, config="org/name"), sd1.vae)


@pytest.mark.usefixtures("no_sockets")
def test_the_guidance_scale_of_a_hub_id(cache: Path, sd1: Tiny, tmp_path: Path) -> None:
    stating = changed(sd1, tmp_path / "stating", "model_index.json", _guidance_scale=3)
    fill_cache(cache, "org/stating", stating)
    fill_cache(cache, "org/silent", stating, without="model_index.json")
    assert load_guidance_scale("org/stating") == 3
    assert load_guidance_scale("org/silent") == 7.5


@pytest.mark.usefixtures("no_sockets")
def test_hub_id_of_a_component_from_the_cache(cache: Path, sd1: Tiny) -> None:
    fill_cache(cache, "org/vae", sd1.folder / "vae")
    assert_same(load_vae("org/vae"), sd1.vae)


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize(
    ("part", "without", "lacks"),
    [
        ("vae", "vae/diffusion", "vae/diffusion_pytorch_model.safetensors"),
        ("unet", "unet", "unet/config.json"),
        ("text", "tokenizer", "tokenizer"),
        ("scheduler", "scheduler", "scheduler/scheduler_config.json"),
    ],
)
def test_partly_cached(cache: Path, sd1: Tiny, part: str, without: str, lacks: str) -> None:
    fill_cache(cache, "org/name", sd1.folder, without=without)
    expected = f"the snapshot of 'org/name' in the cache is incomplete: it lacks {lacks}"
    with pytest.raises(SourceError, match=expected):
        LOADERS[part]("org/name")


class Hub(BaseHTTPRequestHandler):
    """A local server with the part of the Hub's interface that a download needs."""

    files: dict[str, Path]
    refusal: tuple[int, str] | None
    served: list[str]

    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if self.refusal:
            self.answer(self.refusal[0], {"X-Error-Code": self.refusal[1], "X-Error-Message": "refused"}, b"{}")
        elif name.startswith("/api/") and "/tree/" not in name:
            siblings = [{"rfilename": path} for path in self.files]
            self.answer(200, {}, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif name.startswith("/api/"):
            entries = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": f"{i:040x}"}
                for i, (path, file) in enumerate(self.files.items())
            ]
            self.answer(200, {}, json.dumps(entries).encode())
        else:
            path = name.partition(f"/resolve/{COMMIT}/")[2]
            if self.command == "GET":
                self.served.append(path)
            headers = {"ETag": f'"{list(self.files).index(path):040x}"', "X-Repo-Commit": COMMIT}
            self.answer(200, headers, self.files[path].read_bytes())

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@dataclass(kw_only=True)
class HubState:
    served: list[str] = field(default_factory=list)
    handler: type[Hub]


@pytest.fixture
def hub(cache: Path, sd1: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    """Start a Hub that has the tiny model, and other formats and variants of its weights."""
    content = {str(file.relative_to(sd1.folder)): file for file in sd1.folder.rglob("*") if file.is_file()}
    for name in [name for name in content if name.endswith(".safetensors")]:
        content[name.replace(".safetensors", ".fp16.safetensors")] = content[name]
        content[name.replace(".safetensors", ".bin")] = content[name]
    handler = type("Handler", (Hub,), {"files": content, "refusal": None, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield HubState(served=handler.served, handler=handler)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_download_takes_what_is_needed(hub: HubState, sd1: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe("org/name").components[0].parameters is None
    assert not any("model.safetensors" in name for name in hub.served)
    assert_same(load_vae("org/name"), sd1.vae)
    assert_same(load_text("org/name")[0], sd1.text)
    weights = [name for name in hub.served if name.endswith((".safetensors", ".bin"))]
    assert weights == ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
    load_vae("org/name", variant="fp16")
    assert hub.served[-1] == "vae/diffusion_pytorch_model.fp16.safetensors"
    before = list(hub.served)
    load_vae("org/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(load_vae("org/name"), sd1.vae)
    assert hub.served == before  # nothing is downloaded twice
    with pytest.raises(SourceError, match=r"incomplete: it lacks unet/diffusion_pytorch_model\.safetensors"):
        load_unet("org/name")


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ((404, "RevisionNotFound"), r"^'org/name' has no revision 'v9' on the Hub; give a branch, tag or commit\.$"),
        ((403, "GatedRepo"), r"^'org/name' is gated; accept its terms at https://huggingface.co/org/name and log in"),
        ((404, "RepoNotFound"), r"^'org/name' is not on the Hub, or is private; check its spelling"),
        ((401, "RepoNotFound"), r"^'org/name' is not on the Hub, or is private; check its spelling"),
    ],
)
def test_hub_refuses(hub: HubState, refusal: tuple[int, str], expected: str) -> None:
    hub.handler.refusal = refusal
    with pytest.raises(SourceError, match=expected):
        load_vae("org/name", revision="v9")


def test_hub_lacks_the_part(hub: HubState) -> None:
    hub.handler.files = {name: file for name, file in hub.handler.files.items() if not name.startswith("unet")}
    with pytest.raises(SourceError, match=r"^'org/name' has no unet/config\.json on the Hub"):
        load_unet("org/name")
    with pytest.raises(
        SourceError, match=r"^'org/name' has no vae/diffusion_pytorch_model\.bf16\.safetensors, but the variant 'fp16'"
    ):
        load_vae("org/name", variant="bf16")
    files = hub.handler.files
    hub.handler.files = {name: files[name] for name in files if ".fp16." not in name}
    with pytest.raises(
        SourceError, match=r"^'org/name' has no vae/diffusion_pytorch_model\.bf16\.safetensors on the Hub"
    ):
        load_vae("org/name", variant="bf16")


def test_hub_has_shards_and_trained_words(hub: HubState, sd1: Tiny, tmp_path: Path) -> None:
    """The index must be fetched first, then the shards that it names, and every file of the tokenizer."""
    tensors = load_file(sd1.folder / "unet" / "diffusion_pytorch_model.safetensors")
    placed = {key: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in {*placed.values()}:
        save_file({key: x for key, x in tensors.items() if placed[key] == name}, tmp_path / name)
        hub.handler.files[f"unet/{name}"] = tmp_path / name
    index = write(tmp_path / "index.json", {"weight_map": placed})
    hub.handler.files["unet/diffusion_pytorch_model.safetensors.index.json"] = index
    for suffix in ("safetensors", "bin", "fp16.safetensors"):
        hub.handler.files.pop(f"unet/diffusion_pytorch_model.{suffix}")
    hub.handler.files["tokenizer/added_tokens.json"] = write(tmp_path / "added.json", {"<cat-toy>": 49408})
    assert_same(load_unet("org/name"), sd1.unet)
    assert [component.parameters for component in describe("org/name").components[:2]] == [
        None,
        sum(p.numel() for p in sd1.unet.parameters()),
    ]
    with pytest.raises(SourceError, match=r"has 49409 tokens, its text encoder 49408; "):
        load_text("org/name")


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_and_not_cached_is_told_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for part, loader in LOADERS.items():
        with pytest.raises(
            SourceError, match=r"^'org/name' is not in the cache, and the Hub cannot be reached; "
        ) as caught:
            loader("org/name")
        assert "\n" not in str(caught.value), part


# Pickles must not run code


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "vae/diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_not_executed(sd1: Tiny, tmp_path: Path, name: str, zipped: bool) -> None:
    proof, file = tmp_path / "proof", tmp_path / name
    write(tmp_path / "vae" / "config.json", json.loads((sd1.folder / "vae" / "config.json").read_text()))
    content = {"state_dict": {"decoder.conv_in.weight": torch.zeros(1), "x": Malicious(proof)}}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content["state_dict"]["x"]))
    with pytest.raises(SourceError, match="holds more than tensors and so could run code; sdkit executes none"):
        load_vae(tmp_path if name.startswith("vae") else file)
    assert not proof.exists()


# Errors, each in one sentence


def vary(folder_: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """Copy a component's folder with some of its tensors replaced, or removed (None)."""
    copytree(folder_, to)
    (weights,) = to.glob("*.safetensors")
    tensors = {key: t for key, t in (load_file(weights) | changes).items() if t is not None}
    save_file(tensors, weights, metadata={"format": "pt"})
    return to


def damaged(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def spoiled(sd1: Tiny, to: Path, name: str, content: str) -> Path:
    copytree(sd1.folder, to)
    (to / name).write_text(content)
    return to


def changed(sd1: Tiny, to: Path, name: str, **values: Any) -> Path:
    copytree(sd1.folder, to)
    write(to / name, json.loads((to / name).read_text()) | values)
    return to


def linked(path: Path, to: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def vae_alone(sd1: Tiny, to: Path) -> Path:
    save_file(original_layout.vae(sd1.vae.state_dict(), prefix=""), to / "vae.safetensors")
    return to / "vae.safetensors"


Case = tuple[str, Callable[[Tiny, Path], Any], str]
SCHEDULE = "scheduler/scheduler_config.json"
FOREIGN_NAMES = {
    "conditioner.embedders.1.model.ln_final.weight": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.0.x": "Stable Diffusion 3",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "lora_unet_down_blocks_0.lora_down.weight": "a LoRA",
    "emb_params": "a textual inversion embedding",
    "model.diffusion_model.label_emb.0.0.weight": "a class-conditioned model",
}
VALUES: list[tuple[str, str, str, list[Any], str]] = [
    ("vae", "vae/config.json", "scaling_factor", ["big", None, 0, math.nan, math.inf, True, -1], "a number above 0"),
    ("vae", "vae/config.json", "shift_factor", ["x", math.nan, [0]], "a number or null"),
    (
        "unet",
        "unet/config.json",
        "sample_size",
        ["x", 0, [16], [16, 24, 8], 1.5],
        "a whole number, two of them or null",
    ),
    ("unet", "unet/config.json", "cross_attention_dim", ["x", None, [], ["x"], 0], "a whole number or a list"),
    ("scheduler", SCHEDULE, "num_train_timesteps", ["x", None, 0, 1e3, 10**400], "a whole number from 1"),
    ("scheduler", SCHEDULE, "beta_start", ["x", -1, 2, math.nan], "a number from 0 to 1"),
    ("scheduler", SCHEDULE, "beta_end", ["x", None], "a number from 0 to 1"),
    (
        "scheduler",
        SCHEDULE,
        "trained_betas",
        [[1, "x"], [], 0.5, [2], [[0.1]]],
        "a list of numbers from 0 to 1 or null",
    ),
    ("scheduler", SCHEDULE, "clip_sample_range", ["x", None, 0], "a number above 0"),
    ("scheduler", SCHEDULE, "_class_name", [["DDIMScheduler"]], "a word"),
]
CASES: list[Case] = [
    ("vae", lambda m, p: p / "none", r"^the path '.*/none' does not exist"),
    ("vae", lambda m, p: "./none", r"^the path './none' does not exist"),
    ("vae", lambda m, p: "~/none/x", r"^the path '~/none/x' does not exist"),
    ("vae", lambda m, p: "org/none.safetensors", r"^the path 'org/none.safetensors' does not exist"),
    ("unet", lambda m, p: "a/b/c", r"^the path 'a/b/c' does not exist"),
    ("text", lambda m, p: "", r"^the path '' does not exist"),
    ("vae", lambda m, p: "stable-diffusion", r"^'stable-diffusion' is neither a path .* did you mean 'org/"),
    ("vae", lambda m, p: "https://huggingface.co/a/b", r"^'https://huggingface.co/a/b' is a URL; give the Hub id"),
    ("vae", lambda m, p: "org/na me", r"^'org/na me' is neither a path that exists nor a Hub id"),
    (
        "vae",
        lambda m, p: "org/na\nme",
        r"^'org/na\\nme' is neither a path that exists nor a Hub id \(org/name\); check",
    ),
    ("vae", lambda m, p: "a\x1b[2J", r"^'a\\x1b\[2J' is neither a path that exists nor a Hub id"),
    ("vae", lambda m, p: "a\x00/b", r"^'a\\x00/b' is neither a path that exists nor a Hub id"),
    ("vae", lambda m, p: "~nouser/x", r"^the path '~nouser/x' begins with a home folder that does not exist; "),
    ("vae", lambda m, p: "x" * 5000, r"^'x{300}\.\.\.' cannot be read \(File name too long\); check the path"),
    ("vae", lambda m, p: "https://" + "x" * 5000, r"is a URL; give the Hub id"),
    ("vae", lambda m, p: linked(p / "a", "a"), r"a' cannot be read \(Too many levels of symbolic links\); check"),
    ("vae", lambda m, p: linked(p / "a.ckpt", "gone"), r"^the path '.*a.ckpt' does not exist"),
    (
        "vae",
        lambda m, p: linked(p / "vae" / "config.json", "config.json").parents[1],
        r"json' cannot be read \(Too many",
    ),
    ("vae", lambda m, p: linked(p / "vae" / "config.json", "gone").parents[1], r"' has no vae/config.json; give a "),
    ("vae", lambda m, p: (p / "vae" / "config.json").mkdir(parents=True) or p, r"' has no vae/config.json; give a "),
    ("vae", lambda m, p: pipe(p / "a.safetensors"), r"^'.*' is a pipe or a device; give a folder, a regular file or"),
    ("vae", lambda m, p: pipe(p / "a"), r"^'.*' is a pipe or a device; "),
    ("vae", lambda m, p: pipe(p / "vae" / "config.json").parents[1], r"' has no vae/config.json; give a folder"),
    ("vae", lambda m, p: "/dev/null", r"^'/dev/null' is a pipe or a device; "),
    ("vae", lambda m, p: p, r"^'.*' has no vae/config.json; give a folder in diffusers layout"),
    ("scheduler", lambda m, p: p, r"^'.*' has no scheduler/scheduler_config.json; give a folder"),
    ("unet", lambda m, p: damaged(p / "m.safetensors", b"").parent, r"give the file in it \(m.safetensors\)"),
    ("vae", lambda m, p: m.folder / "unet", r"holds a UNet2DConditionModel, not a VAE \(AutoencoderKL or Auto"),
    (
        "unet",
        lambda m, p: m.folder / "vae",
        r"holds an AutoencoderKL, not a U-Net \(UNet2DConditionModel or UNet2DModel\)",
    ),
    ("text", lambda m, p: m.folder / "unet", r"holds a UNet2DConditionModel, not a CLIP text encoder"),
    ("scheduler", lambda m, p: m.folder / "vae", r"holds an AutoencoderKL, not a noise schedule; "),
    ("vae", lambda m, p: m.folder / "scheduler", r"holds a PNDMScheduler, not a VAE"),
    ("unet", lambda m, p: spoiled(m, p / "a", "unet/config.json", "{"), r"config.json' is not valid JSON \("),
    ("unet", lambda m, p: spoiled(m, p / "a", "unet/config.json", "[1]"), r"holds no JSON object"),
    ("scheduler", lambda m, p: spoiled(m, p / "a", "scheduler/scheduler_config.json", ""), r"is not valid JSON"),
    (
        "text",
        lambda m, p: spoiled(m, p / "a", "tokenizer/vocab.json", "{"),
        r"tokenizer/vocab.json' is not valid JSON \(",
    ),
    ("unet", lambda m, p: spoiled(m, p / "a", "unet/config.json", "{}"), r"holds an unknown network, not a U-Net"),
    (
        "unet",
        lambda m, p: spoiled(m, p / "a", "unet/config.json", '{"_class_name": "os.system"}'),
        r"' holds an os\.system, not a U-Net",
    ),
    (
        "unet",
        lambda m, p: spoiled(m, p / "a", "unet/config.json", '{"_class_name": "A\\n\\u001b[2J"}'),
        r"' holds an A\?\?\[2J, not a U-Net",
    ),
    (
        "text",
        lambda m, p: changed(m, p / "a", "text_encoder/config.json", architectures=5),
        r"' holds an unknown network, not a CLIP text encoder",
    ),
    (
        "text",
        lambda m, p: changed(m, p / "a", "text_encoder/config.json", num_hidden_layers="x"),
        r"config.json' has num_hidden_layers 'x', not a whole number from 0 to 1000; correct it\.$",
    ),
    (
        "text",
        lambda m, p: spoiled(m, p / "a", "tokenizer/tokenizer_config.json", '{"model_max_length": "x"}'),
        r"tokenizer_config.json' has model_max_length 'x', not a number; correct it\.$",
    ),
    (
        "text",
        lambda m, p: spoiled(m, p / "a", "tokenizer/tokenizer_config.json", '{"pad_token": null}'),
        r"^the tokenizer in '.*' has no pad_token; correct its tokenizer_config.json\.$",
    ),
    (
        "vae",
        lambda m, p: changed(m, p / "a", "vae/config.json", down_block_types=["Odd"] * 4),
        r"^a VAE in '.*' cannot be loaded: Odd does not exist",
    ),
    (
        "vae",
        lambda m, p: changed(m, p / "a", "vae/config.json", latent_channels=8),
        r"decoder.conv_in.weight is 16x4x3x3 instead of 16x8x",
    ),
    (
        "vae",
        lambda m, p: vary(m.folder / "vae", p / "v", **{"decoder.conv_out.weight": None}),
        r"do not fit the config.json beside them: decoder.conv_out.weight is missing\.$",
    ),
    (
        "vae",
        lambda m, p: vary(m.folder / "vae", p / "v", **{"decoder.conv_out.weight": torch.zeros(3, 4, 3, 3)}),
        r"decoder.conv_out.weight is 3x4x3x3 instead of 3x8x3x3\.$",
    ),
    (
        "vae",
        lambda m, p: vary(m.folder / "vae", p / "v", **{"decoder.more.weight": torch.zeros(3)}),
        r"decoder.more.weight is not part of that network\.$",
    ),
    (
        "text",
        lambda m, p: vary(m.folder / "text_encoder", p / "t", **{"final_layer_norm.bias": None}),
        r"final_layer_norm.bias is missing\.$",
    ),
    ("text", lambda m, p: copytree(m.folder / "text_encoder", p / "t"), r"has no tokenizer \(vocab.json"),
    (
        "text",
        lambda m, p: changed(m, p / "a", "text_encoder/config.json", vocab_size=9),
        r"is 49408x16 instead of 9x16",
    ),
    (
        "text",
        lambda m, p: spoiled(m, p / "a", "tokenizer/tokenizer_config.json", '{"additional_special_tokens": ["<x>"]}'),
        r"^the tokenizer of '.*' has 49409 tokens, its text encoder 49408; ",
    ),
    ("vae", lambda m, p: damaged(p / "a.safetensors", b""), r"a.safetensors' is empty; download it again\.$"),
    ("vae", lambda m, p: damaged(p / "a.ckpt", b""), r"a.ckpt' is empty; download it again\.$"),
    ("vae", lambda m, p: damaged(p / "a.safetensors", b"hello there"), r"is damaged or not a .safetensors file"),
    ("vae", lambda m, p: damaged(p / "a.ckpt", b"hello there"), r"is a damaged pickle, or one that holds more"),
    ("unet", lambda m, p: damaged(p / "a.safetensors", m.file.read_bytes()[:-9]), r"is damaged or not a .safetensors"),
    ("unet", lambda m, p: damaged(p / "a.safetensors", m.file.read_bytes()[:99]), r"is damaged or not a .safetensors"),
    (
        "vae",
        lambda m, p: damaged(p / "a.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        r"Git LFS pointer",
    ),
    ("vae", lambda m, p: damaged(p / "a.txt", b"x"), r"a.txt' is not a file of weights; give a .safetensors"),
    ("vae", lambda m, p: torch.save([torch.zeros(1)], p / "a.pt") or p / "a.pt", r"holds no named tensors"),
    (
        "unet",
        lambda m, p: sketch(p / "a.safetensors", **{"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}),
        r"a.safetensors' holds a VAE, not a U-Net; give a whole checkpoint",
    ),
    (
        "scheduler",
        lambda m, p: sketch(p / "a.safetensors", **{"decoder.conv_in.weight": (8, 4, 3, 3)}),
        r"holds a VAE, not a U-Net",
    ),
    ("vae", lambda m, p: sketch(p / "a.safetensors", **{CROSS: (8, 768)}), r"holds a U-Net, not a VAE; give a whole"),
    ("text", lambda m, p: sketch(p / "a.safetensors", **{CROSS: (8, 768)}), r"holds a U-Net, not a CLIP text encoder"),
    ("unet", lambda m, p: sketch(p / "a.safetensors", **{CROSS: (8, 768)}), r"do not fit the public config 'sd1': "),
    ("unet", lambda m, p: sketch(p / "a.safetensors", **{CROSS: (8, 2048)}), r"like Stable Diffusion XL \(cross-atten"),
    (
        "unet",
        lambda m, p: sketch(p / "a.safetensors", **{CROSS: (8, 99)}),
        r"another family \(cross-attention width 99\)",
    ),
    (
        "unet",
        lambda m, p: sketch(p / "a.safetensors", **{CROSS: (8, 768), CONV_IN: (8, 5, 3, 3)}),
        r"looks like a depth model \(5 input channels\)",
    ),
    (
        "vae",
        lambda m, p: sketch(p / "a.safetensors", **{"decoder.conv_in.weight": (8, 16, 3, 3)}),
        r"VAE of another family: 16 latent channels",
    ),
    (
        "vae",
        lambda m, p: sketch(
            p / "a.safetensors",
            {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"},
            **{"decoder.conv_in.weight": (8, 4, 3, 3)},
        ),
        r"looks like Stable Diffusion XL; ",
    ),
    (
        "vae",
        lambda m, p: sketch(p / "a.safetensors", something=(1,)),
        r"holds neither a Stable Diffusion checkpoint nor",
    ),
    (
        "vae",
        lambda m, p: m.folder / "vae" / "diffusion_pytorch_model.safetensors",
        r"is one part in diffusers layout; give its folder",
    ),
    (
        "text",
        lambda m, p: m.folder / "text_encoder" / "model.safetensors",
        r"is one part in diffusers layout; give its folder",
    ),
    (
        "vae",
        lambda m, p: vae_alone(m, p),
        r"do not fit the public config 'sd1': decoder.conv_in.bias is 16 instead of 512",
    ),
] + [
    ("unet", lambda m, p, n=name: sketch(p / "a.safetensors", **{n: (1,)}), f"looks like {looks_like}")
    for name, looks_like in FOREIGN_NAMES.items()
]
CASES += [
    (
        part,
        lambda m, p, f=file, k=key, v=value: changed(m, p / "a", f, **{k: v}),
        f" has {key} .*, not {wanted}; correct",
    )
    for part, file, key, values, wanted in VALUES
    for value in values
]
CASES += [
    (
        "unet",
        lambda m, p, k=key, s=shape: sketch(p / "a.safetensors", **{k: s}),
        f"is damaged, for its {key} is no matrix",
    )
    for key in ("first_stage_model.decoder.conv_in.weight", CROSS, CONV_IN)
    for shape in ((), (768,))
]


@pytest.mark.parametrize(("part", "make", "expected"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_error_sentences(
    sd1: Tiny,
    tmp_path: Path,
    part: str,
    make: Callable[[Tiny, Path], Any],
    expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    where = make(sd1, tmp_path)
    capfd.readouterr()
    with pytest.raises(SourceError, match=expected) as caught:
        LOADERS[part](where)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda m: load_vae(3), "a model source is a name, a path or a Hub id, not int"),
        (
            lambda m: load_vae("emoji", revision="main"),
            "revision= has no meaning for the embedded model such as 'emoji'",
        ),
        (lambda m: load_vae(m.folder, revision="main"), "revision= has no meaning for a folder"),
        (lambda m: load_unet(m.file, variant="fp16"), "variant= has no meaning for a file"),
        (lambda m: load_unet(m.folder, config=m.folder), "config= has no meaning for a folder"),
        (
            lambda m: load_scheduler_config("emoji", prediction_type="x"),
            "prediction_type 'x' is not one of 'eps', ",
        ),
        (lambda m: load_scheduler_config("emoji", prediction_type=["v"]), r"prediction_type \['v'\] is not one of "),
    ],
)
def test_unfit_arguments(sd1: Tiny, call: Callable[[Tiny], Any], expected: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{expected}"):
        call(sd1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"in_channels": 9}, r"looks like an inpainting model \(9 input channels\); give a text-to-image model"),
        ({"num_class_embeds": 10}, "holds a U-Net of Stable Diffusion XL or of another kind"),
        (
            {"addition_embed_type": "text_image", "encoder_hid_dim": 8},
            "holds a U-Net of Stable Diffusion XL or of another kind",
        ),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 16,
            },
            "holds a U-Net of Stable Diffusion XL or of another kind",
        ),
    ],
)
def test_unets_of_other_kinds_in_diffusers_layout(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    blocks = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "attention_head_dim": 2, "layers_per_block": 1}
    UNet2DConditionModel(**blocks, cross_attention_dim=8, **options).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=expected):
        load_unet(tmp_path)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2-v")])
def test_the_public_configs_serve_models_with_more_inputs_in_single_files(
    tmp_path: Path, width: int, family: str
) -> None:
    """These differ from text-to-image models only in the number of input channels."""
    for channels in (4, 8, 9):
        shapes = {CROSS: (8, width), CONV_IN: (8, channels, 3, 3)}
        description = describe(sketch(tmp_path / f"{channels}.safetensors", V if width == 1024 else None, **shapes))
        unet = next(part for part in description.components if part.part == "unet")
        assert (description.family, unet.config["in_channels"]) == (family, channels)


def test_config_must_be_a_folder_of_configs(sd1: Tiny, sd2: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^config='.*' is a file; give a folder"):
        load_vae(sd1.file, config=sd1.file)
    with pytest.raises(SourceError, match=r"vae/config.json' does not exist; give a source that has it"):
        load_vae(sd1.file, config=tmp_path)
    with pytest.raises(SourceError, match=r"do not fit the config in '.*': "):
        load_unet(sd1.file, config=sd2.folder)


@pytest.mark.parametrize("wanted", [[16, 24], None])
def test_sample_sizes_that_are_legal(sd1: Tiny, tmp_path: Path, wanted: Any) -> None:
    assert (
        load_unet(changed(sd1, tmp_path / "a", "unet/config.json", sample_size=wanted)).config["sample_size"] == wanted
    )


def test_configs_of_a_file_are_checked(sd1: Tiny, tmp_path: Path) -> None:
    own = changed(sd1, tmp_path / "a", "vae/config.json", scaling_factor="big")
    with pytest.raises(
        SourceError, match=r"vae/config.json' has scaling_factor 'big', not a number above 0; correct it"
    ):
        load_vae(sd1.file, config=own)
    pipe(tmp_path / "b" / "vae" / "config.json")
    with pytest.raises(SourceError, match=r"vae/config.json' is not a regular file; give a source that has it\.$"):
        load_vae(sd1.file, config=tmp_path / "b")


@pytest.mark.parametrize("values", [{"norm_num_groups": "x"}, {"act_fn": "x"}, {"cross_attention_dim": 10**15}])
def test_a_failed_load_leaves_the_default_dtype(sd1: Tiny, tmp_path: Path, values: dict[str, Any]) -> None:
    where = changed(sd1, tmp_path / "a", "unet/config.json", **values)
    with pytest.raises(SourceError):
        load_unet(where, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to the superuser")
@pytest.mark.parametrize(
    "closed",
    ["", "vae", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "model.ckpt", "model.safetensors"],
)
def test_closed_to_this_user(sd1: Tiny, tmp_path: Path, closed: str) -> None:
    where = copytree(sd1.folder, tmp_path / "a")
    for name in ("model.ckpt", "model.safetensors"):
        copy(sd1.file, where / name)
    (where / closed).chmod(0)
    try:
        for call in (load_vae, describe):
            with pytest.raises(
                SourceError, match=r"^'.*' cannot be read \(Permission denied\); check the path and its"
            ):
                call(where / closed if closed.startswith("model") else where)
    finally:
        (where / closed).chmod(0o755)
