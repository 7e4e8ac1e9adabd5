"""Failing calls: the error blames the network or the input, whichever is at fault."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.single_file import ASSETS

IMAGE = Image.new("RGB", (32, 32), "teal")


def configured(to: Path, part: str, **values: Any) -> Path:
    shutil.copytree(ASSETS / "emoji", to)
    path = to / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return to


class TestNetworksThatCannotRun:
    """Networks with weights that fit, but which fail when they are called."""

    def test_vae(self) -> None:
        vae = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu")
        vae.network.encoder.conv_norm_out.num_groups = 7
        vae.network.decoder.conv_norm_out.num_groups = 7
        told = r"^the config of 'emoji' makes a network that cannot run: .*; correct it, or give another source\.$"
        for call in (
            lambda: vae.encode(IMAGE),
            lambda: vae.moments(IMAGE),
            lambda: vae.decode(torch.zeros(1, 4, 4, 4)),
            lambda: vae(torch.zeros(1, 3, 32, 32)),
        ):
            with pytest.raises(SourceError, match=told):
                call()

    def test_unet(self) -> None:
        unet = sdkit.UNet.from_pretrained("emoji", dtype="fp32", device="cpu")
        unet.network.conv_norm_out.num_groups = 7
        with pytest.raises(SourceError, match=r"^the config of 'emoji' makes a network that cannot run: "):
            unet(torch.zeros(1, 4, 8, 8), 1, Conditioning(torch.zeros(1, 4, unet.width)))

    def test_a_config_that_breaks_in_the_forward_pass(self, tmp_path: Path) -> None:
        where = configured(tmp_path / "m", "unet", downsample_padding=3)
        unet = sdkit.UNet.from_pretrained(where, dtype="fp32", device="cpu")
        with pytest.raises(SourceError, match=r"m' makes a network that cannot run: "):
            unet(torch.zeros(1, 4, 8, 8), 1, Conditioning(torch.zeros(1, 4, unet.width)))

    @pytest.mark.parametrize("clip_skip", [0, 1])
    def test_text_encoder(self, clip_skip: int) -> None:
        text = sdkit.TextEncoder.from_pretrained("emoji", dtype="fp32", device="cpu")
        layers = getattr(text.network, "text_model", text.network).encoder.layers
        layers[0].mlp.fc2 = torch.nn.Linear(3, 3)
        with pytest.raises(SourceError, match=r"^the config of 'emoji' makes a network that cannot run: "):
            text.encode("a cat", clip_skip=clip_skip)


class TestNetworksThatRun:
    """Errors with another cause pass unchanged."""

    def test_an_input_of_another_shape(self, sd: sdkit.StableDiffusion) -> None:
        with pytest.raises(RuntimeError, match="channels"):
            sd.vae(torch.zeros(1, 5, 32, 32))
        with pytest.raises(RuntimeError):
            sd.unet(torch.zeros(1, 5, 8, 8), 1, Conditioning(torch.zeros(1, 4, sd.unet.width)))

    @pytest.mark.parametrize(
        "error", [MemoryError(), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")]
    )
    def test_what_ends_a_call(self, sd: sdkit.StableDiffusion, error: BaseException) -> None:
        calls = []

        def stop(*_: Any) -> None:
            calls.append(1)
            raise error

        handle = sd.vae.network.encoder.register_forward_pre_hook(stop)
        try:
            with pytest.raises(type(error)):
                sd.vae.encode(IMAGE)
        finally:
            handle.remove()
        assert calls == [1]  # the network was not called again to find the cause

    def test_a_good_call_runs_once(self, sd: sdkit.StableDiffusion) -> None:
        calls: list[int] = []
        handle = sd.unet.network.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            sd.unet(torch.zeros(1, 4, 8, 8), 1, Conditioning(torch.zeros(1, 4, sd.unet.width)))
        finally:
            handle.remove()
        assert calls == [1]


class TestNumbersThatAreNotFinite:
    @pytest.mark.parametrize("output_type", ["pil", "pt"])
    def test_a_vae_that_gives_none(self, output_type: str) -> None:
        vae = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu")
        with torch.no_grad():
            vae.network.decoder.conv_in.weight.fill_(float("nan"))
            vae.network.encoder.conv_in.weight.fill_(float("nan"))
        with pytest.raises(SourceError, match=r"^the VAE of 'emoji' gives images that are not finite; its weights are"):
            vae.decode(torch.zeros(1, 4, 4, 4), output_type=output_type)
        with pytest.raises(
            SourceError, match=r"^the VAE of 'emoji' gives latents that are not finite; its weights are"
        ):
            vae.encode(IMAGE)

    def test_latents_that_no_vae_could_decode(self, sd: sdkit.StableDiffusion) -> None:
        with pytest.raises(ArgumentError, match=r"^the VAE of 'emoji' overflows for these latents; they are far from"):
            sd.vae.decode(torch.full((1, 4, 4, 4), 3e38))


class TestDeviceAndDtype:
    """A wrapper's device and dtype must follow its weights when it is moved or converted."""

    @pytest.mark.parametrize("part", ["vae", "unet", "text"])
    def test_they_follow_the_weights(self, sd: sdkit.StableDiffusion, part: str) -> None:
        wrapper = copy.deepcopy(getattr(sd, part))
        conversions = (
            lambda w: w.half(), lambda w: w.float(), lambda w: w.to(torch.bfloat16), lambda w: w.double(),
            lambda w: w.to("cpu", torch.float32), lambda w: nn.ModuleDict({"inside": w}).to("meta"),
        )  # fmt: skip
        for convert in conversions:
            convert(wrapper)
            weight = next(wrapper.parameters())
            assert (wrapper.dtype, wrapper.device) == (weight.dtype, weight.device)
        assert wrapper.device.type == "meta"

    def test_a_copy_is_moved_alone(self, sd: sdkit.StableDiffusion) -> None:
        assert copy.deepcopy(sd.vae).half().dtype == torch.float16
        assert sd.vae.dtype == next(sd.vae.parameters()).dtype
