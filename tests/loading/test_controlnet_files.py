"""ControlNets loaded from folders and from files in the original layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file

import sdkit
from sdkit.errors import SourceError
from sdkit.loading.parts import CONTROLNET
from sdkit.loading.single_file import ASSETS
from sdkit.loading.source import Source
from tests.helpers import original_layout, tiny
from tests.helpers.networks import control_network


@pytest.fixture(scope="module")
def network() -> Any:
    """A small ControlNet with Stable Diffusion's topology. All its tensors differ, biases and norms too."""
    made = control_network(tiny.networks((8, 16, 16, 16), unet={"layers_per_block": 2}).unet)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(scope="module")
def folder(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("controlnet")
    network.save_pretrained(root / "controlnet")
    return root


def original(network: Any) -> dict[str, torch.Tensor]:
    tensors = original_layout.controlnet(network.state_dict(), layers_per_block=2)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def assert_same(control: sdkit.ControlNet, network: Any) -> None:
    found, expected = control.network.state_dict(), network.state_dict()
    assert found.keys() == expected.keys()
    assert not control.training
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def load(source: Path, **options: Any) -> sdkit.ControlNet:
    return sdkit.ControlNet.from_pretrained(source, dtype="fp32", device="cpu", **options)


def test_folder_of_a_part_and_of_a_pipeline(network: Any, folder: Path) -> None:
    for source in (folder, folder / "controlnet"):
        assert_same(load(source), network)
    config = json.loads((folder / "controlnet" / "config.json").read_text())
    assert Source.open(folder).describe().components[0].config["cross_attention_dim"] == config["cross_attention_dim"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_file_in_the_original_layout(network: Any, folder: Path, tmp_path: Path, suffix: str) -> None:
    tensors, path = original(network), tmp_path / f"control.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    assert_same(load(path, config=folder), network)


def test_file_that_also_holds_a_whole_model(network: Any, folder: Path, tmp_path: Path) -> None:
    """As the first ControlNets came: control_sd15_canny.pth holds Stable Diffusion, too."""
    model = tiny.networks((8, 16, 16, 16), unet={"layers_per_block": 2})
    tensors = original(network) | original_layout.unet(model.unet.state_dict(), layers_per_block=2)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "whole.safetensors")
    assert_same(load(tmp_path / "whole.safetensors", config=folder), network)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2-v"])
def test_public_configs_are_those_that_diffusers_derives_from_the_unet(family: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ASSETS / family / "unet"))
        expected = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        made = ControlNetModel.from_config(ControlNetModel.load_config(ASSETS / family / "controlnet"))
    found, wanted = (json.loads(json.dumps(dict(one.config))) for one in (made, expected))
    assert {key: found[key] for key in wanted if key[0] != "_"} == {key: wanted[key] for key in wanted if key[0] != "_"}
    if family == "sd1":
        assert sum(p.numel() for p in made.parameters()) == 361_279_120


class TestBadInput:
    def refused(self, load: Any) -> str:
        with pytest.raises(SourceError) as caught:
            load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_file_of_a_controlnet_alone_is_no_model(self, network: Any, tmp_path: Path) -> None:
        path = tmp_path / "control.safetensors"
        save_file(original(network), path)
        for kind, noun in ((sdkit.VAE, "a VAE"), (sdkit.UNet, "a U-Net"), (sdkit.StableDiffusion, "a VAE")):
            sentence = self.refused(lambda kind=kind: kind.from_pretrained(path, config=ASSETS / "sd1"))
            assert f"holds a ControlNet, not {noun}; give a whole checkpoint or another source" in sentence

    def test_a_width_of_no_family(self, network: Any, tmp_path: Path) -> None:
        save_file(original(network), tmp_path / "a.safetensors")
        sentence = self.refused(lambda: load(tmp_path / "a.safetensors"))
        assert "looks like a model of another family (cross-attention width 16); SD has 768 or 1024." in sentence

    def test_missing_tensors(self, network: Any, folder: Path, tmp_path: Path) -> None:
        tensors = original(network)
        del tensors["control_model.zero_convs.3.0.bias"]
        save_file(tensors, tmp_path / "a.safetensors")
        sentence = self.refused(lambda: load(tmp_path / "a.safetensors", config=folder))
        assert "controlnet_down_blocks.3.bias" in sentence

    def test_strange_tensors(self, network: Any, folder: Path, tmp_path: Path) -> None:
        save_file(original(network) | {"control_model.zork": torch.zeros(2)}, tmp_path / "a.safetensors")
        assert "control_model.zork" in self.refused(lambda: load(tmp_path / "a.safetensors", config=folder))

    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        tiny.networks((16, 16), unet=tiny.TWO_LEVELS).vae.save_pretrained(tmp_path)
        assert "holds an AutoencoderKL, not a ControlNet (ControlNetModel); give" in self.refused(
            lambda: load(tmp_path)
        )
        assert "holds a ControlNet" not in self.refused(lambda: load(ASSETS / "emoji"))

    def test_another_kind_of_controlnet(self, tmp_path: Path) -> None:
        unet = tiny.networks((8, 16), unet={**tiny.TWO_LEVELS, "class_embed_type": "timestep"}).unet
        control_network(unet).save_pretrained(tmp_path)
        assert "holds a ControlNet of Stable Diffusion XL or of another kind" in self.refused(lambda: load(tmp_path))

    def test_a_value_of_the_config(self, folder: Path, tmp_path: Path) -> None:
        config = json.loads((folder / "controlnet" / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"conditioning_embedding_out_channels": "x"}))
        assert "has conditioning_embedding_out_channels 'x', not a list of whole numbers" in self.refused(
            lambda: load(tmp_path)
        )
        assert CONTROLNET.checks["layers_per_block"][1](2)
