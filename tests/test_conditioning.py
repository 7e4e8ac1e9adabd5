from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError


def full(batch: int, seed: int) -> Conditioning:
    """Make a condition with all parts."""
    g = torch.Generator().manual_seed(seed)
    sides = [torch.randn(batch, 8, side, side, generator=g) for side in (8, 4, 2)]
    return Conditioning(
        torch.randn(batch, 7, 4, generator=g),
        mask=torch.rand(batch, 7, generator=g) > 0.5,
        concat=torch.randn(batch, 5, 8, 8, generator=g),
        residuals=((sides[0], sides[1]), sides[2]),
        label=torch.randint(10, (batch,), generator=g),
        added={"text_embeds": torch.randn(batch, 6, generator=g)},
    )


def tensors(cond: Conditioning) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def keep(part: torch.Tensor) -> torch.Tensor:
        found.append(part)
        return part

    cond.map(keep)
    return found


def test_chunk_is_the_inverse_of_cat() -> None:
    a, b = full(3, 0), full(3, 1)
    both = Conditioning.cat([a, b])
    assert len(both) == 6
    for got, expected in zip(both.chunk(2), (a, b), strict=True):
        assert len(tensors(got)) == 8
        assert all(torch.equal(x, y) for x, y in zip(tensors(got), tensors(expected), strict=True))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (Conditioning(torch.zeros(1, 7, 8)), Conditioning(torch.zeros(1, 9, 8)), "cannot be joined"),
        (Conditioning(added={"x": torch.zeros(1)}), Conditioning(added={"y": torch.zeros(1)}), "the same names"),
    ],
)
def test_cat_refuses_conditions_that_differ(a: Conditioning, b: Conditioning, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Conditioning.cat([a, b])


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (Conditioning(), "the condition's are none"),
        (Conditioning(torch.zeros(2, 7, 3)), r"the condition's are of shape \(2, 7, 3\)"),
        (Conditioning(torch.zeros(1, 7, 64)), "a condition of 1 images does not fit x_t of 2"),
        (Conditioning(torch.zeros(2, 7, 64), label=torch.zeros(2).long()), "takes no class labels"),
    ],
)
def test_a_unet_refuses_what_it_cannot_use(cond: Conditioning, message: str) -> None:
    network = UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), sample_size=8,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=message):
        sdkit.UNet(network)(torch.zeros(2, 4, 8, 8), 1, cond)


def test_chunk_refuses_unequal_parts() -> None:
    with pytest.raises(ArgumentError, match="a condition of 5 images cannot be split into 2 equal parts"):
        Conditioning(torch.zeros(5, 7, 8)).chunk(2)


def test_an_absent_mask_counts_all_tokens_beside_a_mask() -> None:
    text, mask = torch.zeros(2, 3, 4), torch.tensor([[True, False, False]] * 2)
    both = Conditioning.cat([Conditioning(text), Conditioning(text, mask)])
    assert both.mask is not None
    assert both.mask.tolist() == [[True] * 3] * 2 + [[True, False, False]] * 2
    assert Conditioning.cat([Conditioning(text)] * 2).mask is None


def test_a_part_that_only_one_has_is_refused() -> None:
    text = torch.zeros(2, 3, 4)
    with pytest.raises(ArgumentError, match="`label`"):
        Conditioning.cat([Conditioning(text, label=torch.zeros(2)), Conditioning(text)])
    with pytest.raises(ArgumentError, match="belongs to a text"):
        Conditioning.cat([Conditioning(label=torch.zeros(2)), Conditioning(text, torch.ones(2, 3))])


def test_indices_repeats_and_devices() -> None:
    cond = full(3, 0)
    for x, y in zip(tensors(cond[[2, 0]]), tensors(cond), strict=True):
        assert torch.equal(x, y[[2, 0]])
    for x, y in zip(tensors(cond.repeat(2)), tensors(cond), strict=True):
        assert torch.equal(x, y[[0, 0, 1, 1, 2, 2]])
    assert {x.device.type for x in tensors(cond.to("meta"))} == {"meta"}
    assert len(cond) == 3
    assert len(Conditioning()) == 0
    assert len(Conditioning(mask=torch.ones(2, 3))) == len(Conditioning(added={"text_embeds": torch.ones(2, 3)})) == 2
    assert len(Conditioning(residuals=full(3, 0).residuals)) == 3
