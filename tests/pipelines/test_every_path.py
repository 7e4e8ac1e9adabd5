"""Every way to draw, on small models: image i is the same alone and in a batch, and evaluations are counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sdkit
from sdkit.diffusion.samplers import SAMPLERS
from sdkit.loading.lora_file import LoRA
from sdkit.loading.lora_update import LowRank, Update
from sdkit.networks.concatenation import widen
from tests.helpers.networks import control_network, sd_shaped

SIZE = 64
PROMPTS = ["a cat", "a red apple on a blue background", "a <zork>"]
ALL = range(len(PROMPTS))
LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Things:
    """Models by name, ControlNets for them, and for each prompt an image, a mask, and edges."""

    models: dict[str, sdkit.StableDiffusion]
    controls: list[sdkit.ControlNet]
    images: Tensor
    masks: Tensor
    edges: Tensor


@pytest.fixture(scope="module")
def things(sd: sdkit.StableDiffusion) -> Things:
    """All models are one random model: with nine channels, with conditions beside x_t, or with two LoRAs."""
    text = copy.deepcopy(sd.text)
    text.add_token("<zork>", drawn(2, text.width, seed=1))
    plain, nine = (sd_shaped(text, channels)[0] for channels in (4, 9))
    models = {"plain": plain, "nine channels": nine, "LoRAs": copy.deepcopy(plain)}
    for kind in ("latents", "map"):
        network = copy.deepcopy(plain.unet.network)
        widen(network, kind)
        nn.init.normal_(network.conv_in.weight, std=0.1, generator=torch.Generator().manual_seed(2))
        models[kind] = sdkit.StableDiffusion(plain.vae, text, sdkit.UNet(network), plain.schedule)
    width = plain.unet.network.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k.in_features
    for seed in (3, 4):
        factors = LowRank(down=drawn(2, width, seed=seed), up=drawn(width, 2, seed=seed))
        lora = LoRA(label="a LoRA", unet={LAYER: Update(factors=factors, alpha=2.0)}, text_encoder={})
        models["LoRAs"].merge_lora(lora, 0.5)
    pixels = torch.rand(2, len(PROMPTS), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    masks = torch.zeros(len(PROMPTS), 1, SIZE, SIZE)
    for i in ALL:
        masks[i, :, 8 * i : 8 * i + 32, 16:56] = 1
    controls = [sdkit.ControlNet(control_network(plain.unet.network, seed=seed)) for seed in (6, 7)]
    return Things(models=models, controls=controls, images=pixels[0], masks=masks, edges=pixels[1])


class Way(NamedTuple):
    """A way to draw.

    Attributes:
        given: Keywords of the call for the prompts of these numbers.
        unet: Rows of each pass of the U-Net for one image.
        control: Rows of each pass of a ControlNet for one image.
        model: Name of the model.
    """

    given: Callable[[Things, Sequence[int]], dict[str, Any]]
    unet: Sequence[int] = (2, 2, 2)  # with guidance
    control: Sequence[int] = ()
    model: str = "plain"


def from_image(t: Things, i: Sequence[int]) -> dict[str, Any]:
    return {"image": t.images[i], "strength": 0.6}


def masked(t: Things, i: Sequence[int]) -> dict[str, Any]:
    return {"image": t.images[i], "mask_image": t.masks[i]}


def only_masked(t: Things, _: Sequence[int]) -> dict[str, Any]:
    return {"image": t.images[0], "mask_image": t.masks[0], "padding_mask_crop": 4}


def edges(t: Things, i: Sequence[int]) -> dict[str, Any]:
    return {"controlnet": t.controls[0], "control_image": t.edges[i]}


def two(t: Things, i: Sequence[int]) -> dict[str, Any]:
    return {"controlnet": t.controls, "control_image": [t.edges[i], t.images[i]]}


def beside(t: Things, i: Sequence[int]) -> dict[str, Any]:
    return {"condition": t.images[i]}


def shaped(_: Things, __: Sequence[int]) -> dict[str, Any]:
    return {"height": SIZE, "width": SIZE}


def sampled(name: str) -> Callable[[Things, Sequence[int]], dict[str, Any]]:
    return lambda t, i: from_image(t, i) | {"sampler": name}


WAYS = {
    "a learned token": Way(shaped),
    "two LoRAs": Way(shaped, model="LoRAs"),
    "an image": Way(from_image, [2, 2]),
    "a mask": Way(masked),
    "a mask, nine channels": Way(masked, model="nine channels"),
    "only the masked region": Way(only_masked),
    "only the masked region, nine channels": Way(only_masked, model="nine channels"),
    "a ControlNet": Way(edges, control=[2, 2, 2]),
    "a ControlNet, guess mode": Way(lambda t, i: edges(t, i) | {"guess_mode": True}, control=[1, 1, 1]),
    "two ControlNets": Way(two, control=[2] * 6),
    "two ControlNets, guess mode": Way(lambda t, i: two(t, i) | {"guess_mode": True}, control=[1] * 6),
    "two ControlNets, one of which stops": Way(
        lambda t, i: two(t, i) | {"control_guidance_end": [1.0, 0.4]}, control=[2] * 4
    ),
    "a ControlNet and an image": Way(lambda t, i: edges(t, i) | from_image(t, i), [2, 2], control=[2, 2]),
    "a ControlNet and a mask": Way(lambda t, i: edges(t, i) | masked(t, i), control=[2, 2, 2]),
    "a ControlNet and only the masked region": Way(lambda t, i: edges(t, i) | only_masked(t, i), control=[2, 2, 2]),
    "a map": Way(beside, model="map"),
    "a map with image guidance": Way(lambda t, i: beside(t, i) | {"image_guidance_scale": 1.5}, [3, 3, 3], model="map"),
    "InstructPix2Pix": Way(lambda t, i: beside(t, i) | {"image_guidance_scale": 1.5}, [3, 3, 3], model="latents"),
    **{name: Way(sampled(name), [2] * (3 if name in ("heun", "dpm++sde") else 2)) for name in SAMPLERS},
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_image_i_is_the_same_alone_and_in_a_batch(things: Things, name: str) -> None:
    way = WAYS[name]
    model, rows = things.models[way.model], {"unet": list[int](), "control": list[int]()}
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.5, "output_type": "latent"}

    def counted(kind: str) -> Callable[..., None]:
        return lambda _, inputs: rows[kind].append(len(inputs[0]))

    with ExitStack() as held:
        held.enter_context(model.unet.network.register_forward_pre_hook(counted("unet")))
        for control in things.controls:
            held.enter_context(control.network.register_forward_pre_hook(counted("control")))
        together = model(PROMPTS, seed=5, **options, **way.given(things, ALL))
    assert rows == {kind: [len(PROMPTS) * n for n in getattr(way, kind)] for kind in rows}
    for i in ALL:
        alone = model(PROMPTS[i], seed=5 + i, **options, **way.given(things, [i]))
        torch.testing.assert_close(alone[0], together[i], atol=5e-5, rtol=0)
    assert float((together[0] - together[1]).abs().max()) > 0.1
