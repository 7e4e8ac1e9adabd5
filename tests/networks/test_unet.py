"""The U-Net wrapper against the network inside it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.engines.compile import compile_modules
from sdkit.loading.lora_file import LoRA
from sdkit.networks.denoiser import guidance_embedding
from tests.helpers.networks import guided_network


@pytest.fixture(scope="module")
def unet(sd: sdkit.StableDiffusion) -> sdkit.UNet:
    return sd.unet


def inputs(batch: int) -> tuple[torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(batch, 4, 16, 16, generator=generator)
    return x_t, Conditioning(torch.randn(batch, 25, 192, generator=generator))


@torch.no_grad()
def test_equals_the_network(unet: sdkit.UNet) -> None:
    x_t, cond = inputs(3)
    expected = unet.network(x_t, 500, encoder_hidden_states=cond.text).sample
    torch.testing.assert_close(unet(x_t, 500, cond), expected, atol=1e-5, rtol=0)
    t = torch.tensor([1, 500, 999])
    expected = torch.cat([unet(x_t[i : i + 1], int(t[i]), cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(unet(x_t, t, cond), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(unet(x_t, 1, cond), unet(x_t, 500, cond), atol=1e-2)


@torch.no_grad()
def test_the_same_in_any_batch(unet: sdkit.UNet) -> None:
    """The pooled text has one row for each image, and in float32 the rounding of few rows depends on their number."""
    x_t, cond = inputs(8)
    chosen = [6, 2]
    torch.testing.assert_close(unet(x_t[chosen], 500, cond[chosen]), unet(x_t, 500, cond)[chosen], atol=1e-5, rtol=0)
    unet = sdkit.UNet.from_pretrained("emoji", dtype="bf16", device="cpu")
    assert torch.equal(unet(x_t[chosen], 500, cond[chosen]), unet(x_t, 500, cond)[chosen])


@torch.no_grad()
def test_two_threads_may_share_it(unet: sdkit.UNet) -> None:
    """One thread has a timestep for the whole batch, the other one for each image."""
    x_t, cond = inputs(4)
    t = torch.tensor([1, 300, 600, 999])
    expected = unet(x_t, t, cond)
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(lambda: [unet(x_t, 500, cond) for _ in range(20)])
        while not sampling.done():
            with torch.no_grad():
                torch.testing.assert_close(unet(x_t, t, cond), expected, atol=1e-5, rtol=0)


def test_float32_in_and_out_and_gradient(unet: sdkit.UNet) -> None:
    half = sdkit.UNet.from_pretrained("emoji", dtype="bf16", device="cpu")
    x_t, cond = inputs(2)
    output = half(x_t, 500, cond)
    assert output.dtype == torch.float32
    assert (output - unet(x_t, 500, cond)).abs().max() < 0.1
    trained = copy.deepcopy(unet)
    trained(x_t, torch.tensor([3, 900]), cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@torch.no_grad()
def test_compiled_gives_the_same(unet: sdkit.UNet) -> None:
    compiled = sdkit.UNet.from_pretrained("emoji", dtype="fp32", device="cpu", compile=True)
    x_t, cond = inputs(2)
    torch.testing.assert_close(compiled(x_t, 500, cond), unet(x_t, 500, cond), atol=1e-4, rtol=0)
    t = torch.tensor([3, 900])
    torch.testing.assert_close(compiled(x_t, t, cond), unet(x_t, t, cond), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_call_leaves_the_network_as_it_was(sd: sdkit.StableDiffusion) -> None:
    """A call with one timestep for the batch must not change the network: a later direct call may have several."""
    x, cond, t = torch.randn(2, 4, 16, 16), Conditioning(sd.text.encode(["a", "b"])), torch.tensor([1, 999])
    sd.unet(x, 500, cond)
    theirs = sd.unet.network(x, t, encoder_hidden_states=cond.text).sample
    torch.testing.assert_close(theirs, sd.unet(x, t, cond))
    assert float((theirs[1] - sd.unet(x, 1, cond)[1]).abs().max()) > 1e-2


class TestConditioning:
    @torch.no_grad()
    def test_concat_is_appended_to_the_channels(self) -> None:
        unet = sdkit.UNet(small_network(in_channels=9))
        x_t, masked = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
        text = torch.randn(2, 3, 8)
        expected = unet.network(torch.cat([x_t, masked], dim=1), 500, encoder_hidden_states=text).sample
        got = unet(x_t, 500, Conditioning(text, concat=masked))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_residuals_are_those_of_a_controlnet(self) -> None:
        network = small_network()
        unet = sdkit.UNet(network)
        x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
        controlnet = ControlNetModel.from_unet(network)
        for p in controlnet.parameters():  # its last layers start at zero
            torch.nn.init.normal_(p, std=0.1)
        down, mid = controlnet(x_t, 500, text, torch.randn(2, 3, 64, 64), return_dict=False)
        expected = network(
            x_t,
            500,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        got = unet(x_t, 500, Conditioning(text, residuals=(tuple(down), mid)))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert (got - unet(x_t, 500, Conditioning(text))).abs().max() > 1e-3

    @torch.no_grad()
    def test_padding_changes_nothing(self) -> None:
        """Neither for the cross-attention nor for the pooled text, whose embedding diffusers takes of all tokens."""
        unet = sdkit.UNet(small_network(addition_embed_type="text", addition_embed_type_num_heads=2))
        x_t, text, lengths = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 8), (6, 2, 4)
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        alone = [unet(x_t[i : i + 1], 500, Conditioning(text[i : i + 1, :n])) for i, n in enumerate(lengths)]
        torch.testing.assert_close(unet(x_t, 500, Conditioning(text, mask=mask)), torch.cat(alone), atol=1e-5, rtol=0)
        unmasked = unet(x_t, 500, Conditioning(text))  # the mask of the call before is forgotten
        torch.testing.assert_close(unmasked[:1], alone[0], atol=1e-5, rtol=0)
        assert (unmasked[1] - alone[1]).abs().max() > 1e-3

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
    @torch.no_grad()
    def test_padding_changes_nothing_when_compiled(self) -> None:
        """Each call has its own mask, whatever that of the call was in which the network was compiled."""
        pools = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
        unet, compiled = (sdkit.UNet(small_network(**pools)) for _ in range(2))
        compile_modules(compiled.network, device=torch.device("cpu"))
        x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 8)
        masks = (torch.arange(6) < torch.tensor(lengths)[:, None] for lengths in ([6, 2], [3, 3]))
        for mask in (None, *masks, None):
            cond = Conditioning(text, mask=mask)
            torch.testing.assert_close(compiled(x_t, 500, cond), unet(x_t, 500, cond), atol=1e-4, rtol=0)

    def test_a_bare_tensor_is_refused(self, unet: sdkit.UNet) -> None:
        with pytest.raises(sdkit.ArgumentError, match="not Tensor"):
            unet(torch.zeros(1, 4, 8, 8), 500, torch.zeros(1, 4, 192))


class TestGuidanceAsAnInput:
    """U-Nets of latent consistency models (`time_cond_proj_dim`)."""

    @pytest.fixture(scope="class")
    @classmethod
    def guided(cls) -> sdkit.UNet:
        return sdkit.UNet(guided_network())

    @pytest.mark.parametrize("width", [16, 17, 256])
    def test_embedding_is_that_of_diffusers(self, width: int) -> None:
        scales = torch.tensor([0.0, 1.0, 1.1, 7.5, 8.5, 100.0])
        expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=width)
        assert torch.equal(guidance_embedding(scales, width), expected)

    @torch.no_grad()
    def test_equals_the_network(self, guided: sdkit.UNet) -> None:
        x_t = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))[0]
        cond = Conditioning(torch.randn(2, 5, 8))
        scales = torch.tensor([1.5, 8.0])
        expected = guided.network(
            x_t, 500, encoder_hidden_states=cond.text, timestep_cond=guidance_embedding(scales, 16)
        ).sample
        torch.testing.assert_close(guided(x_t, 500, cond, guidance_scale=scales), expected, atol=1e-5, rtol=0)
        for i, scale in enumerate((1.5, 8.0)):
            one = guided(x_t, 500, cond, guidance_scale=scale)
            torch.testing.assert_close(one[i], expected[i], atol=1e-5, rtol=0)
            alone = guided(x_t[:1], 500, cond[:1], guidance_scale=scale)
            torch.testing.assert_close(one[:1], alone, atol=1e-5, rtol=0)
        assert (expected[0] - guided(x_t, 500, cond, guidance_scale=8.0)[0]).abs().max() > 1e-4
        shares = guided.cross_attention(x_t, 500, cond, guidance_scale=8.0)
        torch.testing.assert_close(shares.sum(1), torch.ones(2, 8, 8))

    def test_is_given_where_it_is_an_input_and_nowhere_else(self, unet: sdkit.UNet, guided: sdkit.UNet) -> None:
        x_t, cond = inputs(1)
        with pytest.raises(sdkit.ArgumentError, match="takes the guidance scale as an input: give guidance_scale"):
            guided(x_t, 500, cond.map(lambda part: part[..., :8]))
        with pytest.raises(sdkit.ArgumentError, match="has no input for the guidance scale: leave out guidance_scale"):
            unet(x_t, 500, cond, guidance_scale=2.0)


def small_network(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, **options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("inputs", "outputs", "channels"), [(4, 4, 4), (9, 4, 4), (4, 8, 4), (3, 6, 3)])
def test_channels_are_those_of_the_latents(inputs: int, outputs: int, channels: int) -> None:
    unet = sdkit.UNet(small_network(in_channels=inputs, out_channels=outputs))
    assert (unet.channels, unet.input_channels) == (channels, inputs)
    unet.try_out()


@torch.no_grad()
def test_an_engine_runs_in_the_networks_place(sd: sdkit.StableDiffusion) -> None:
    unet = sdkit.UNet(copy.deepcopy(sd.unet.network))
    x_t, cond = inputs(2)
    expected, keys = unet(x_t, 500, cond), unet.state_dict().keys()
    unet.run = lambda *args, **options: tuple(2 * part for part in unet.network(*args, **options))
    assert torch.equal(unet(x_t, 500, cond), 2 * expected)
    assert unet.state_dict().keys() == keys
    with pytest.raises(sdkit.ArgumentError, match=r"^cross-attention works on the U-Net's network, and an engine runs"):
        unet.cross_attention(x_t, 500, cond)
    with pytest.raises(sdkit.ArgumentError, match=r"^a LoRA works on the U-Net's network, and an engine runs"):
        sdkit.StableDiffusion(sd.vae, sd.text, unet, sd.schedule).merge_lora(LoRA(label="x", unet={}, text_encoder={}))
