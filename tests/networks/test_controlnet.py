"""The ControlNet wrapper against the network inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError, SourceError
from tests.helpers import tiny
from tests.helpers.networks import control_network


@pytest.fixture(scope="module")
def control() -> sdkit.ControlNet:
    return sdkit.ControlNet(control_network(tiny.networks((16, 32), unet=tiny.TWO_LEVELS).unet))


def inputs(batch: int) -> tuple[torch.Tensor, Conditioning, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, 4, 8, 8), Conditioning(torch.randn(batch, 6, 16)), torch.rand(batch, 3, 64, 64)


def flat(residuals: Any) -> list[torch.Tensor]:
    down, mid = residuals
    return [*down, mid]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"guess_mode": True, "scale": 2.0}], ids=str)
def test_equals_the_network(control: sdkit.ControlNet, options: dict[str, Any]) -> None:
    x_t, cond, image = inputs(3)
    theirs = {("conditioning_scale" if name == "scale" else name): value for name, value in options.items()}
    down, mid = control.network(x_t, 500, cond.text, image, return_dict=False, **theirs)
    found = flat(control(x_t, 500, cond, image, **options))
    assert len(found) == len(down) + 1 == 5
    for one, other in zip(found, [*down, mid], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_same_to_the_bit_in_any_batch(control: sdkit.ControlNet) -> None:
    x_t, cond, image = inputs(6)
    whole = flat(control(x_t, 500, cond, image))
    some = [4, 1]
    for one, other in zip(flat(control(x_t[some], 500, cond[some], image[some])), whole, strict=True):
        assert torch.equal(one, other[some])


@torch.no_grad()
def test_masked_tokens_are_as_if_they_were_not_there(control: sdkit.ControlNet) -> None:
    x_t, cond, image = inputs(4)
    lengths, t = torch.tensor([6, 3, 6, 2]), torch.tensor([1, 500, 999, 20])
    mask = torch.arange(6) < lengths[:, None]
    found = flat(control(x_t, t, Conditioning(cond.text, mask), image))
    for i, length in enumerate(lengths.tolist()):
        alone = Conditioning(cond.text[i : i + 1, :length])  # type: ignore[index]
        for one, other in zip(flat(control(x_t[i : i + 1], int(t[i]), alone, image[i : i + 1])), found, strict=True):
            torch.testing.assert_close(one, other[i : i + 1], atol=1e-5, rtol=0)


def test_attributes(control: sdkit.ControlNet) -> None:
    assert (control.channels, control.image_channels, control.factor, control.pools) == (4, 3, 8, False)


def test_bad_input(control: sdkit.ControlNet) -> None:
    x_t, cond, image = inputs(1)
    with pytest.raises(ArgumentError, match=r"^the condition is given as sdkit.guidance.Conditioning"):
        control(x_t, 1, cond.text, image)
    with pytest.raises(ArgumentError, match=r"^a ControlNet attends to text embeddings, and the condition has none"):
        control(x_t, 1, Conditioning(), image)


def test_a_config_that_cannot_run_is_blamed() -> None:
    network = control_network(tiny.networks((16, 32), unet=tiny.TWO_LEVELS).unet)
    network.down_blocks[0].resnets[0].norm1.num_groups = 5  # as a config with 5 groups for 16 channels would make it
    x_t, cond, image = inputs(1)
    with pytest.raises(SourceError, match=r"makes a network that cannot run"):
        sdkit.ControlNet(network)(x_t, 1, cond, image)
