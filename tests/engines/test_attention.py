"""Attention computed in pieces against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, UNet2DConditionModel

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.engines import attention as module
from sdkit.engines.attention import attention, quicken_attention


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (6, 64, 64, 16), (6, 64, 7, 16), (3, 100, 33, 40)], ids=str)
@pytest.mark.parametrize("scores", [1, 50, 5000, 2**21])
def test_equals_pytorchs(shape: tuple[int, int, int, int], scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCORES", scores)
    n, rows, columns, d = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(n, rows, d, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, n, columns, d, generator=generator, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    torch.testing.assert_close(attention(q, k, v), expected, atol=1e-12, rtol=0)


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX PyTorch's own attention is the faster")
def test_networks_give_the_same_with_and_without_it() -> None:
    torch.manual_seed(0)
    small = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    unet = UNet2DConditionModel(
        **small,
        sample_size=8,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(**small, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    x, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    for network, run in (
        (unet, lambda: unet(x, 500, encoder_hidden_states=cond).sample),
        (vae, lambda: vae.decode(x).sample),
    ):
        with torch.no_grad():
            expected = run()
            before = set(map(type, network.attn_processors.values()))
            quicken_attention(network, torch.bfloat16, torch.device("cpu"))
            assert set(map(type, network.attn_processors.values())) != before
            torch.testing.assert_close(run(), expected, atol=1e-5, rtol=0)
        run().sum().backward()  # with gradients, diffusers' own attention runs
        assert all(
            p.grad is not None for name, p in network.named_parameters() if "to_q" in name and "encoder" not in name
        )


def test_only_where_it_is_the_faster() -> None:
    unet = sdkit.UNet.from_pretrained("emoji", dtype="fp32", device="cpu").network
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor2_0"}


class Recorder:
    """An attention processor that records diffusers' own attention probabilities."""

    def __init__(self) -> None:
        self.shares: list[torch.Tensor] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(y) for y in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        shares = attn.get_attention_scores(q, k, attention_mask)
        if encoder_hidden_states is not None:
            self.shares.append(shares)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(shares, v)))


@pytest.mark.parametrize("size", [(16, 16), (13, 22)], ids=str)
def test_cross_attention_maps_equal_diffusers(size: tuple[int, int]) -> None:
    """Sizes may be odd; the U-Net rounds up when it halves them."""
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    cond = sd.text.encode(["a red apple on a blue background", "a dog"])
    x_t = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    recorder = Recorder()
    # Recorded in the same pass, because at scores of 200 the last bit of a layer's input matters.
    sd.unet.network.set_attn_processor(recorder)
    maps = sd.unet.cross_attention(x_t, 500, Conditioning(cond))
    assert maps.shape == (2, cond.shape[1], *size)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, *size))
    layers = []
    sides = [tuple(-(-side // 2**level) for side in size) for level in range(4)]
    for shares in recorder.shares:
        ((h, w),) = [(h, w) for h, w in sides if h * w == shares.shape[1]]
        mean = shares.unflatten(0, (2, -1)).mean(1).transpose(1, 2).unflatten(2, (h, w))
        layers.append(F.interpolate(mean, size, mode="bilinear"))
    torch.testing.assert_close(maps, torch.stack(layers).mean(0), atol=1e-6, rtol=0)


def test_cross_attention_leaves_nothing_behind(sd: sdkit.StableDiffusion) -> None:
    cond, x_t = sd.text.encode("a dog"), torch.zeros(1, 5, 16, 16)  # one channel too many
    with pytest.raises(RuntimeError):
        sd.unet.cross_attention(x_t, 10, Conditioning(cond))
    assert not any(module._forward_pre_hooks for name, module in sd.unet.network.named_modules() if "attn2" in name)
