"""The pixel identity: an autoencoder that changes nothing and can replace any other autoencoder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.source import Source
from sdkit.networks.autoencoder import Autoencoder, latents_of
from sdkit.networks.autoencoder_kinds import PixelIdentity
from sdkit.pipelines.steps import decode
from sdkit.training.stages.denoising import DenoisingObjective
from tests.helpers import tiny


@pytest.fixture
def identity() -> sdkit.VAE:
    return sdkit.VAE(PixelIdentity(), name="pixels").eval()


def rgb(width: int = 5, height: int = 7) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 40, y * 30, 200) for y in range(height) for x in range(width)])
    return image


class TestPixelIdentity:
    def test_its_sizes(self, identity: sdkit.VAE) -> None:
        assert (identity.factor, identity.channels, identity.scale, identity.shift) == (1, 3, 1.0, 0.0)
        assert (identity.device, identity.dtype) == (torch.device("cpu"), torch.float32)
        assert identity.codebook is None

    def test_encoding_and_decoding_change_nothing(self, identity: sdkit.VAE) -> None:
        x = torch.rand(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert torch.equal(identity.encode(x), x)
        assert torch.equal(identity.encode(x, seed=3), x)
        assert torch.equal(identity.moments(x)[0], x)
        assert torch.equal(identity.decode(x, output_type="pt"), x)
        assert torch.equal(identity(x).pixels, x)

    def test_decoding_clamps_to_the_range_of_pixels(self, identity: sdkit.VAE) -> None:
        z = torch.tensor([-3.0, 0.5, 3.0]).reshape(1, 3, 1, 1)
        assert identity.decode(z, output_type="pt").flatten().tolist() == [-1.0, 0.5, 1.0]

    def test_an_image_comes_back(self, identity: sdkit.VAE) -> None:
        (back,) = identity.reconstruct(rgb())
        assert back.tobytes() == rgb().tobytes()

    def test_tiles(self, identity: sdkit.VAE) -> None:
        x = torch.rand(1, 3, 20, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
        torch.testing.assert_close(identity.encode(x, tile=16), x)

    def test_it_moves_without_weights(self, identity: sdkit.VAE) -> None:
        assert identity.to(torch.bfloat16).dtype == torch.bfloat16
        assert copy.deepcopy(identity).float().dtype == torch.float32
        assert identity.to("meta").device == torch.device("meta")

    def test_a_denoising_objective_works_on_pixels(self, identity: sdkit.VAE) -> None:
        """Posterior, noise, target, and loss must work as for latents, and an exact prediction must have loss 0."""
        objective = DenoisingObjective(sdkit.NoiseSchedule.scaled_linear())
        mean, logvar = identity.moments([rgb(8, 8)])
        noise = objective.noise((identity.channels, 8, 8), torch.Generator().manual_seed(0))
        x0 = latents_of(mean, logvar, noise["posterior_eps"][None], identity.scale, identity.shift)
        torch.testing.assert_close(x0, mean, atol=3e-6, rtol=0)
        _, target = objective.noised(x0, noise["eps"][None], torch.tensor([500]))
        assert objective.loss(target, target, [500])[0] == 0

    def test_a_pipeline_draws_pixels(self, sd: sdkit.StableDiffusion, identity: sdkit.VAE) -> None:
        torch.manual_seed(0)
        network = UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=4, cross_attention_dim=sd.text.width,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        unet = sdkit.UNet(network.eval())
        pixels = sdkit.StableDiffusion(identity, sd.text, unet, sd.schedule)
        (image,) = pixels("a cat", height=16, width=24, num_inference_steps=2)
        assert image.size == (24, 16)
        with torch.no_grad():
            output = unet(torch.zeros(1, 3, 8, 8), 1, Conditioning(torch.zeros(1, 4, unet.width)))
        assert output.shape == (1, 3, 8, 8)

    def test_the_steps_take_it(self, identity: sdkit.VAE) -> None:
        autoencoder: Autoencoder = identity
        z = autoencoder.encode(rgb(), sample=False)
        assert decode(autoencoder, z, (7, 5))[0].tobytes() == rgb().tobytes()


def test_a_network_without_codes_says_so(identity: sdkit.VAE) -> None:
    with pytest.raises(ArgumentError, match="has no codebook"):
        identity.quantize(torch.zeros(1, 3, 2, 2))


def test_the_source_named_pixels() -> None:
    vae = sdkit.VAE.from_pretrained("pixels", dtype="bf16", device="cpu", compile=True)
    assert (vae.name, vae.factor, vae.dtype) == ("pixels", 1, torch.bfloat16)
    assert isinstance(vae.network, PixelIdentity)
    (part,) = Source.open("pixels").describe().components
    assert (part.class_name, part.config["factor"]) == ("PixelIdentity", 1)
    with pytest.raises(SourceError, match=r"^'pixels' holds a PixelIdentity, not a U-Net"):
        sdkit.UNet.from_pretrained("pixels", device="cpu")


def test_a_model_of_pixels_is_loaded_with_vae_pixels(tmp_path: Path) -> None:
    """Its schedule keeps the bound of x0, so that what it draws stays in the range of pixels."""
    model = tiny.model(tmp_path)
    UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(model / "unet") | {"in_channels": 3, "out_channels": 3}
    ).save_pretrained(model / "unet")
    DDIMScheduler(clip_sample=True).save_pretrained(model / "scheduler")
    sd = sdkit.StableDiffusion.from_pretrained(model, vae="pixels", device="cpu", dtype="fp32")
    assert sd.schedule.clip_x0 == 1
    z = sd("a cat", height=16, width=24, num_inference_steps=2, output_type="latent")
    assert z.shape == (1, 3, 16, 24)
    assert z.abs().max() <= 1
    assert sd("a cat", height=16, width=24, num_inference_steps=2, output_type="np").shape == (1, 16, 24, 3)
    with pytest.raises(ArgumentError, match="takes 3 channels, this VAE's latents have 4"):
        sdkit.StableDiffusion.from_pretrained(model, device="cpu")
