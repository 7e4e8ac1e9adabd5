"""The VAE against diffusers' own encode and decode: sizes, batches, tiles, precision, and its fingerprint."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor, nn

import sdkit
from sdkit.networks.autoencoder_kinds import LOWEST_LOGVAR

SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}


@pytest.fixture(scope="module")
def random_vae() -> sdkit.VAE:
    """Make a VAE of SD 1.x's architecture with 84 M random weights."""
    torch.manual_seed(0)
    return sdkit.VAE(AutoencoderKL(**SD_VAE).eval())


@pytest.fixture(scope="module")
def vae(sd: sdkit.StableDiffusion) -> sdkit.VAE:
    return sd.vae


@pytest.fixture(scope="module")
def tiny() -> sdkit.VAE:
    torch.manual_seed(1)
    return sdkit.VAE(AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4).eval())


def tensor(image: Image.Image) -> Tensor:  # (1, 3, H, W) in [-1, 1]
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@contextmanager
def passes(module: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes of the inputs of `module`."""
    shapes: list[tuple[int, ...]] = []
    with module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape))):
        yield shapes


@pytest.fixture(scope="module")
def pixels(astronaut: Image.Image) -> Tensor:
    return tensor(astronaut.resize((64, 96)))


@pytest.fixture(scope="module")
def whole(vae: sdkit.VAE, coffee: Image.Image) -> tuple[Tensor, np.ndarray]:
    """Return the latents of a photo and their decoded image, both without tiles."""
    z = vae.encode(coffee, sample=False, tile=0)
    return z, vae.decode(z, output_type="np", tile=0)[0]


class TestAgainstDiffusers:
    def test_scale(self, random_vae: sdkit.VAE, vae: sdkit.VAE) -> None:
        assert random_vae.scale == 0.18215
        assert vae.scale == pytest.approx(0.4560635350530022)

    def test_moments(self, random_vae: sdkit.VAE, pixels: Tensor) -> None:
        with torch.no_grad():
            posterior = random_vae.network.encode(pixels).latent_dist
        mean, logvar = random_vae.moments(pixels)
        torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=0)

    def test_encode(self, random_vae: sdkit.VAE, pixels: Tensor) -> None:
        with torch.no_grad():
            posterior = random_vae.network.encode(pixels).latent_dist
        torch.testing.assert_close(random_vae.encode(pixels, sample=False), posterior.mean * 0.18215, atol=1e-5, rtol=0)
        theirs = posterior.sample(torch.Generator().manual_seed(7)) * 0.18215
        torch.testing.assert_close(random_vae.encode(pixels, seed=7), theirs, atol=1e-5, rtol=0)
        ours = random_vae.encode(pixels, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    def test_decode(self, random_vae: sdkit.VAE) -> None:
        z = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            theirs = random_vae.network.decode(z / 0.18215).sample
        assert theirs.std() > 0.01
        torch.testing.assert_close(random_vae.decode(z, output_type="pt"), theirs.clamp(-1, 1), atol=1e-5, rtol=0)

    def test_shift(self, pixels: Tensor) -> None:
        torch.manual_seed(0)
        small = {**SD_VAE, "block_out_channels": [32] * 4, "layers_per_block": 1}
        vae = sdkit.VAE(AutoencoderKL(**small, shift_factor=0.25).eval())
        with torch.no_grad():
            mean = vae.network.encode(pixels).latent_dist.mean
            back = vae.network.decode(mean).sample.clamp(-1, 1)
        z = vae.encode(pixels, sample=False)
        torch.testing.assert_close(z, (mean - 0.25) * 0.18215, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(z, output_type="pt"), back, atol=1e-5, rtol=0)

    def test_autoencoder_tiny(self, tiny: sdkit.VAE, pixels: Tensor) -> None:
        with torch.no_grad():
            latents = tiny.network.encode(pixels).latents
            theirs = tiny.network.decode(latents).sample
        torch.testing.assert_close(tiny.encode(pixels), latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(tiny.decode(latents, output_type="pt"), theirs.clamp(-1, 1), atol=1e-5, rtol=0)
        assert (tiny.moments(pixels)[1] == LOWEST_LOGVAR).all()
        assert tiny.factor == 8


class TestImages:
    @pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (75, 100), (129, 64)], ids=str)
    def test_any_size_comes_back_at_its_own(
        self, vae: sdkit.VAE, astronaut: Image.Image, size: tuple[int, int]
    ) -> None:
        image = astronaut.crop((100, 100, 100 + size[0], 100 + size[1]))
        (back,) = vae.reconstruct(image)
        assert back.size == size
        assert vae.encode(image).shape == (1, 4, -(-size[1] // 8), -(-size[0] // 8))

    def test_edges_are_repeated(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        pixels = np.asarray(astronaut)[:75, :100]
        padded = np.pad(pixels, ((0, 5), (0, 4), (0, 0)), mode="edge")
        assert torch.equal(vae.encode(pixels, sample=False), vae.encode(padded, sample=False))

    def test_mixed_sizes_in_one_list(self, vae: sdkit.VAE, astronaut: Image.Image, chelsea: Image.Image) -> None:
        images = [
            astronaut.resize((64, 64)),
            chelsea.resize((100, 75)),
            astronaut.resize((32, 64)),
            chelsea.resize((64, 64)),
        ]
        z = vae.encode(images, seed=3)
        for i, image in enumerate(images):
            torch.testing.assert_close(z[i], vae.encode(image, seed=3 + i)[0], atol=1e-5, rtol=0)
        assert [image.size for image in vae.reconstruct(images)] == [image.size for image in images]
        assert [x.shape for x in vae.reconstruct(images, output_type="pt")][1] == (3, 75, 100)

    def test_every_kind_of_image(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        image = astronaut.resize((48, 40))
        z = vae.encode(image, sample=False)
        for same in ([image], np.asarray(image), np.asarray(image)[None], tensor(image), tensor(image)[0]):
            torch.testing.assert_close(vae.encode(same, sample=False), z, atol=1e-5, rtol=0)
        for mode in ("L", "LA", "P", "PA", "RGBA", "CMYK", "1", "I;16"):
            assert (
                vae.encode(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)).shape == z.shape
            )

    def test_exif_rotation(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        image, file = astronaut.resize((48, 40)), io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
        image.save(file, "PNG", exif=exif)
        turned = vae.encode(image.transpose(Image.Transpose.ROTATE_270), sample=False)
        assert torch.equal(vae.encode(Image.open(file), sample=False), turned)

    def test_photos_through_the_embedded_vae(
        self, vae: sdkit.VAE, astronaut: Image.Image, chelsea: Image.Image, coffee: Image.Image
    ) -> None:
        values = sdkit.metrics.psnr([astronaut, chelsea, coffee], vae.reconstruct([astronaut, chelsea, coffee]))
        print(
            "PSNR of astronaut, chelsea, coffee through the embedded VAE:",
            [f"{value:.2f} dB" for value in values.tolist()],
        )
        assert (values > 21).all()

    def test_decoding_twice_gives_the_same_bytes(self, vae: sdkit.VAE) -> None:
        z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        assert [image.tobytes() for image in vae.decode(z)] == [image.tobytes() for image in vae.decode(z)]

    def test_reconstruct_takes_the_mean_unless_asked(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        image = astronaut.resize((32, 32))
        mean = vae.decode(vae.encode(image, sample=False), output_type="np")
        assert np.array_equal(vae.reconstruct(image, output_type="np"), mean)
        assert not np.array_equal(vae.reconstruct(image, output_type="np", sample=True, seed=0), mean)

    def test_output_types_agree(self, vae: sdkit.VAE) -> None:
        z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pil, array, pixels = (vae.decode(z, output_type=kind, size=(60, 50)) for kind in ("pil", "np", "pt"))
        assert array.dtype == np.uint8
        assert array.shape == (2, 60, 50, 3)
        assert pixels.shape == (2, 3, 60, 50)
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        assert np.array_equal(np.stack([np.asarray(image) for image in pil]), array)
        assert np.array_equal(np.round((pixels.numpy() + 1) * 127.5).transpose(0, 2, 3, 1), array)

    def test_seeds(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        images = [astronaut.resize((32, 32))] * 2
        mean, logvar = vae.moments(images)
        z = vae.encode(images, seed=5)
        eps = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
        torch.testing.assert_close(z, (mean + torch.exp(logvar / 2) * eps) * vae.scale, atol=1e-5, rtol=0)
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        assert torch.equal(z, vae.encode(images, generator=generators))
        assert not torch.equal(vae.encode(images), vae.encode(images))


class TestBatches:
    def test_batch_size_bounds_each_pass(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        pixels = (
            tensor(astronaut).unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 64, 64)[:7]
        )
        with passes(vae.network.encoder) as encoded:
            z = vae.encode(pixels, seed=0, batch_size=3)
        with passes(vae.network.decoder) as decoded:
            images = vae.decode(z, output_type="pt", batch_size=3)
        assert [shape[0] for shape in encoded] == [shape[0] for shape in decoded] == [3, 3, 1]
        torch.testing.assert_close(z, vae.encode(pixels, seed=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(images, vae.decode(z, output_type="pt"), atol=1e-5, rtol=0)

    def test_on_a_cpu_bfloat16_images_are_the_same_to_the_bit_alone_and_in_a_batch(self) -> None:
        vae = sdkit.VAE.from_pretrained("emoji", dtype="bf16", device="cpu")
        z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        assert np.array_equal(vae.decode(z, output_type="np")[3], vae.decode(z[3], output_type="np")[0])


class TestTiles:
    def test_no_seam(self, vae: sdkit.VAE, coffee: Image.Image, whole: tuple[Tensor, np.ndarray]) -> None:
        z, image = whole
        tiled = vae.decode(z, output_type="np", tile=256)[0]
        assert psnr(tiled, image) > 40
        assert (vae.encode(coffee, sample=False, tile=256) - z).square().mean().sqrt() < 0.03 * z.std()

        def worst_seam(image: np.ndarray, other: np.ndarray) -> float:
            """Return the worst step of the error between neighbouring columns, in multiples of the median step."""
            steps = np.abs(np.diff(image.astype(float) - other, axis=1)).mean(axis=(0, 2))
            return float(steps.max() / np.median(steps))

        butted = np.concatenate([vae.decode(part, output_type="np")[0] for part in z.split(25, dim=3)], axis=1)
        assert worst_seam(butted, image) > 6  # tiles side by side without blending, so the measure does see seams
        assert worst_seam(tiled, image) < 3

    def test_one_tile_is_the_whole(self, vae: sdkit.VAE, whole: tuple[Tensor, np.ndarray]) -> None:
        z, image = whole
        assert np.abs(vae.decode(z, output_type="np", tile=1024)[0].astype(int) - image).max() <= 1

    def test_large_images_are_tiled_unasked(self) -> None:
        vae = sdkit.VAE(
            AutoencoderKL(
                **{**SD_VAE, "block_out_channels": [4] * 4, "norm_num_groups": 2, "mid_block_add_attention": False}
            )
        )
        z = torch.zeros(1, 4, 200, 200)
        with passes(vae.network.decoder) as decoded:
            vae.decode(z)
        assert max(shape[2] * shape[3] for shape in decoded) <= 128 * 128
        assert len(decoded) == 1 + 4  # one pass for the statistics, then 2 x 2 tiles
        with passes(vae.network.decoder) as decoded:
            vae.decode(z[:, :, :150, :150])
        assert len(decoded) == 1
        with passes(vae.network.encoder) as encoded:
            vae.encode(torch.zeros(1, 3, 1600, 1600))
        assert len(encoded) == 1 + 4

    def test_another_thread_may_decode_meanwhile(self, vae: sdkit.VAE, whole: tuple[Tensor, np.ndarray]) -> None:
        z, _ = whole
        small = z[:, :, :16, :16]
        expected = vae.decode(small, output_type="pt")
        with ThreadPoolExecutor(1) as pool:
            tiling = pool.submit(vae.decode, z, tile=128)
            while not tiling.done():
                torch.testing.assert_close(vae.decode(small, output_type="pt"), expected, atol=1e-5, rtol=0)


class TestPrecision:
    def test_bfloat16_is_within_45_db(self, vae: sdkit.VAE, astronaut: Image.Image, chelsea: Image.Image) -> None:
        fast = sdkit.VAE.from_pretrained("emoji", dtype="bf16", device="cpu")
        z = vae.encode([astronaut, chelsea], sample=False)
        for exact, rounded in zip(vae.decode(z, output_type="np"), fast.decode(z, output_type="np"), strict=True):
            assert psnr(exact, rounded) > 45

    def test_bfloat16_is_within_45_db_at_full_size(self, random_vae: sdkit.VAE) -> None:
        fast = copy.deepcopy(random_vae).to(torch.bfloat16)
        z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        assert psnr(random_vae.decode(z, output_type="np"), fast.decode(z, output_type="np")) > 45

    def test_float16_overflow_is_redone_in_float32(self) -> None:
        exact = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu")
        with torch.no_grad():  # residuals of bright latents exceed 65,504, as in SD's own VAE
            exact.network.decoder.conv_in.weight *= 1000
        half = copy.deepcopy(exact).to(torch.float16)
        z = (
            torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
            * torch.tensor([0.1, 100, 0.1])[:, None, None, None]
        )
        with torch.no_grad():
            raw = half.network.decode((z / half.scale).half()).sample.isfinite().flatten(1).all(dim=1)
        assert raw.tolist() == [True, False, True]  # otherwise the test would prove nothing

        with pytest.warns(UserWarning, match=r"overflowed in float16") as caught:
            ours = half.decode(z, output_type="np", batch_size=3)
        assert len(caught) == 1
        half.decode(z)  # warned once: a second warning would be an error here
        assert half.dtype == torch.float16
        assert psnr(ours[1], exact.decode(z.half().float(), output_type="np")[1]) > 35
        assert psnr(ours[0], exact.decode(z, output_type="np")[0]) > 35

    def test_float16_overflow_in_tiles_and_batches(self) -> None:
        torch.manual_seed(0)
        small = {**SD_VAE, "block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 4}
        exact = sdkit.VAE(AutoencoderKL(**small).eval())
        with torch.no_grad():
            exact.network.decoder.conv_in.weight *= 1000
        half = copy.deepcopy(exact).to(torch.float16)
        z = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))
        z = z * torch.tensor([0.01, 100, 0.01])[:, None, None, None]
        with pytest.warns(UserWarning, match=r"overflowed in float16") as caught:
            ours = half.decode(z, output_type="pt", batch_size=3, tile=128)
        assert {warning.filename for warning in caught} == {
            inspect.getfile(sdkit.VAE)
        }  # the command line shows only warnings from sdkit
        expected = exact.decode(z.half().float(), output_type="pt", batch_size=3, tile=128)
        torch.testing.assert_close(ours, expected, atol=0.03, rtol=0)
        half.float()(torch.zeros(1, 3, 32, 32))[0].sum().backward()  # its weights can still be trained
        assert not any(p.is_inference() for p in half.parameters())

    def test_auto_is_bfloat16_only_where_the_hardware_has_it(self) -> None:
        cpu = sdkit.VAE.from_pretrained("emoji", device="cpu")
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        assert cpu.dtype == (torch.bfloat16 if native else torch.float32)


class TestIdentity:
    def test_the_same_in_every_dtype(self, vae: sdkit.VAE) -> None:
        for dtype in ("bf16", "fp16"):
            assert sdkit.VAE.from_pretrained("emoji", dtype=dtype, device="cpu").identity == vae.identity

    def test_follows_the_encoder_and_the_scale_not_the_decoder(self, vae: sdkit.VAE) -> None:
        network = copy.deepcopy(vae.network)
        with torch.no_grad():
            network.decoder.conv_in.weight += 0.01
        assert sdkit.VAE(network).identity == vae.identity
        with torch.no_grad():
            network.encoder.conv_out.weight += 0.01
        assert sdkit.VAE(network).identity != vae.identity
        for change in ({"scaling_factor": 0.18215}, {"shift_factor": 0.5}):
            network = copy.deepcopy(vae.network)
            network.register_to_config(**change)
            assert sdkit.VAE(network).identity != vae.identity
        network = copy.deepcopy(vae.network)
        with torch.no_grad():
            network.quant_conv.bias[-1] += 0.01
        assert sdkit.VAE(network).identity != vae.identity


class TestTraining:
    def test_forward_has_gradient_and_equals_encode_and_decode(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        vae = copy.deepcopy(vae)
        x = tensor(astronaut.resize((32, 32)))
        eps = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(9))
        reconstruction, mean, logvar, _, _ = vae(x, eps)
        torch.testing.assert_close(torch.stack([mean, logvar]), torch.stack(vae.moments(x)), atol=1e-5, rtol=0)
        theirs = vae.decode(vae.encode(x, seed=9), output_type="pt")
        torch.testing.assert_close(reconstruction.detach().clamp(-1, 1), theirs, atol=1e-5, rtol=0)
        reconstruction.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())

    def test_latents_can_enter_autograd(self, vae: sdkit.VAE, astronaut: Image.Image) -> None:
        z = vae.encode(astronaut.resize((32, 32)), sample=False)
        weight = torch.ones(1, requires_grad=True)
        (z * weight).sum().backward()
        torch.testing.assert_close(weight.grad, z.sum()[None])

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
    def test_compiled_gives_the_same_image(self, vae: sdkit.VAE) -> None:
        compiled = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu", compile=True)
        z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            compiled.decode(z, output_type="pt"), vae.decode(z, output_type="pt"), atol=1e-4, rtol=0
        )


def test_pixels_are_decoded_with_gradient(vae: sdkit.VAE) -> None:
    z = torch.randn(1, vae.channels, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = vae.pixels(z)
    assert torch.equal(x.detach().clamp(-1, 1), vae.decode(z.detach(), output_type="pt"))
    assert float(torch.autograd.grad(x.sum(), z)[0].abs().max()) > 0
    for wrong in (z[0], z[:, 1:], [z]):
        with pytest.raises(sdkit.ArgumentError, match=rf"^latents must be a tensor \(B, {vae.channels}, h, w\), not "):
            vae.pixels(wrong)  # type: ignore[arg-type]
