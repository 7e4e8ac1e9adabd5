"""Networks that are on the device only while they work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sdkit
from sdkit.engines.offload import on_device
from sdkit.networks.wrapper import Wrapper
from tests.helpers.networks import control_network


def test_each_network_works_on_the_device_and_waits_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    expected = plain(["a cat", "a dog"], num_inference_steps=2, output_type="np", batch_size=1)
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu", offload=True)
    names = {id(sd.text): "text", id(sd.unet): "unet", id(sd.vae): "vae"}
    moves = []
    to: Callable[..., Any] = Wrapper.to

    def noted(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        moves.append((names.get(id(self)), str(args[0])))
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Wrapper, "to", noted)
    sd.offload_to = torch.device("cpu", 0)  # another name of the CPU, so that the two kinds of move can be told apart
    images = sd(["a cat", "a dog"], num_inference_steps=2, output_type="np", batch_size=1)
    assert (images == expected).all()
    order = ["text", "unet", "text", "unet", "vae"]  # two batches, decoded together
    assert moves == [(name, place) for name in order for place in ("cpu:0", "cpu")]


def test_a_controlnet_works_with_the_unet_and_waits_on_the_cpu(
    sd: sdkit.StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls = [sdkit.ControlNet(control_network(sd.unet.network, seed=seed)) for seed in range(2)]
    options: dict[str, Any] = {
        "controlnet": [controls[0], controls[1], controls[0]], "control_image": [torch.zeros(1, 3, 32, 32)] * 3,
        "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip
    expected = sd("a cat", **options)
    places: list[tuple[str, ...]] = []
    monkeypatch.setattr(sd, "offload_to", torch.device("cpu", 0))
    moved = {id(network): "cpu" for network in (sd.text, sd.unet, sd.vae, *controls)}
    to: Callable[..., Any] = Wrapper.to

    def noted(self: Wrapper, *args: Any, **kwargs: Any) -> Any:
        moved[id(self)] = str(args[0])
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Wrapper, "to", noted)
    with controls[1].network.register_forward_pre_hook(lambda *_: places.append((*moved.values(),))):
        found = sd("a cat", **options)
    assert torch.equal(found, expected)
    assert places == [("cpu", "cpu:0", "cpu", "cpu:0", "cpu:0")] * 2
    assert {*moved.values()} == {"cpu"}


def test_a_network_comes_back_after_an_error() -> None:
    unet = sdkit.UNet.from_pretrained("emoji", dtype="fp32", device="cpu")
    with pytest.raises(KeyError), on_device(unet, torch.device("cpu", 0)):
        raise KeyError
    assert unet.device == torch.device("cpu")
