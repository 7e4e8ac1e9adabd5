"""Images to codes of a VQModel and back, against diffusers' own quantizer and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import sdkit
from sdkit.errors import ArgumentError
from sdkit.networks import autoencoder_kinds
from tests.helpers.sentences import one_sentence

CODES = 48


def vqmodel(**changes: Any) -> VQModel:
    """Make a VQModel with latents of a quarter of the image's size. Its codes are some of the latents of an image."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "block_out_channels": [16] * 3, "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32,
        "mid_block_add_attention": False, "num_vq_embeddings": CODES, "scaling_factor": 0.3,
    }  # fmt: skip
    network = VQModel(**shape | changes)
    with torch.no_grad():
        latents = network.encode(torch.rand(1, 3, 32, 32) * 2 - 1).latents[0].flatten(1).T  # (64, C)
        network.quantize.embedding.weight.copy_(latents[:CODES])
    return network.eval()


@pytest.fixture(scope="module")
def vae() -> sdkit.VAE:
    return sdkit.VAE(vqmodel())


def pixels(height: int = 24, width: int = 40, n: int = 2) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"lookup_from_codebook": True},
            {"vq_embed_dim": 3},
            {"norm_type": "spatial", "block_out_channels": [32] * 3},  # spatial norms have 32 groups
        ],
        ids=str,
    )
    def test_codes_and_images(self, changes: dict[str, Any]) -> None:
        network = vqmodel(**changes)
        vae, x = sdkit.VAE(network), pixels()
        codes = vae.codes(x)
        with torch.no_grad():
            raw = network.encode(x).latents
            _, _, (_, _, indices) = network.quantize(raw)
            expected = network.decode(raw).sample.clamp(-1, 1)
        assert codes.dtype == torch.int64
        assert codes.shape == (2, 6, 10)
        assert torch.equal(codes.flatten(), indices)
        assert len(codes.unique()) > 5
        torch.testing.assert_close(vae.decode_codes(codes, output_type="pt"), expected, atol=1e-5, rtol=0)

    def test_any_codes_are_decoded_as_they_are(self, vae: sdkit.VAE) -> None:
        """Two codes may be equal. Decoding must look up the vectors, and never round to a code again."""
        codes = torch.arange(CODES).reshape(1, 6, 8)
        decoder = vae.network.decoder
        vectors = vae.network.quantize.get_codebook_entry(codes.flatten(), (1, 6, 8, 4))
        with torch.no_grad():
            expected = decoder(vae.network.post_quant_conv(vectors)).clamp(-1, 1)
        assert torch.equal(vae.decode_codes(codes, output_type="pt"), expected)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bit_identical_to_reconstruct(self, dtype: torch.dtype) -> None:
        vae = sdkit.VAE(vqmodel()).to(dtype)
        x = pixels(21, 39)
        expected = vae.reconstruct(x, output_type="pt")
        assert torch.equal(vae.decode_codes(vae.codes(x), size=(21, 39), output_type="pt"), expected)

    def test_bit_identical_in_tiles(self, vae: sdkit.VAE) -> None:
        x = pixels(100, 136)
        expected = vae.reconstruct(x, output_type="pt", tile=64)
        codes = vae.codes(x, tile=64)
        assert torch.equal(vae.decode_codes(codes, output_type="pt", tile=64), expected)
        assert not torch.equal(vae.decode_codes(codes, output_type="pt"), expected)

    def test_a_scale_that_rounds(self) -> None:
        """Latents are scaled and unscaled on the way; the rounding of these must not change a code."""
        vae, x = sdkit.VAE(vqmodel(scaling_factor=0.18215)), pixels(n=4)
        raw, _ = vae.moments(x)
        assert torch.equal(vae.codes(x), vae.quantize(raw)[1])
        assert torch.equal(
            vae.decode_codes(vae.codes(x), output_type="pt"), vae.decode(vae.encode(x), output_type="pt")
        )

    def test_lists_of_several_sizes(self, vae: sdkit.VAE) -> None:
        images = [Image.new("RGB", size, color) for size, color in (((30, 17), "teal"), ((12, 40), "red"))]
        codes = vae.codes(images)
        assert [tuple(one.shape) for one in codes] == [(5, 8), (10, 3)]
        found = vae.decode_codes(codes, size=[(17, 30), (40, 12)])
        assert [image.tobytes() for image in found] == [image.tobytes() for image in vae.reconstruct(images)]
        assert torch.equal(vae.codes(images[0])[0], codes[0])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
    def test_one_image_of_another_integer_dtype(self, vae: sdkit.VAE, dtype: torch.dtype) -> None:
        codes = vae.codes(pixels(n=1))
        (image,) = vae.decode_codes(codes[0].to(dtype), size=(22, 33))
        assert image.size == (33, 22)
        assert image.tobytes() == vae.decode_codes(codes, size=(22, 33))[0].tobytes()

    def test_few_distances_at_once(self, vae: sdkit.VAE, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(2))
        expected = vae.quantize(raw)
        monkeypatch.setattr(autoencoder_kinds, "DISTANCES_AT_ONCE", 11 * CODES)
        found = vae.quantize(raw)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])

    def test_return_types(self, vae: sdkit.VAE) -> None:
        codes = vae.codes(pixels())
        assert_type(codes, Tensor)
        assert_type(vae.codes([pixels()]), Tensor | list[Tensor])
        pil = vae.decode_codes(codes)
        assert_type(pil, list[Image.Image])
        assert isinstance(pil[0], Image.Image)
        array = vae.decode_codes(codes, output_type="np")
        assert_type(array, npt.NDArray[np.uint8])
        assert array.dtype == np.uint8
        assert array.shape == (2, 24, 40, 3)
        tensor = vae.decode_codes(codes, output_type="pt")
        assert_type(tensor, Tensor)
        assert tensor.shape == (2, 3, 24, 40)


class TestMistakes:
    @pytest.mark.parametrize(
        ("codes", "fragment"),
        [
            (torch.full((1, 2, 2), CODES), f"numbers from 0 to {CODES - 1}, not {CODES}"),
            (torch.full((1, 2, 2), -1), f"numbers from 0 to {CODES - 1}, not -1"),
            (torch.zeros(1, 2, 2), "must be whole numbers, such as torch.int64, not torch.float32"),
            (torch.zeros(1, 2, 2, dtype=torch.bool), "not torch.bool"),
            (torch.zeros(1, 4, 2, 2, dtype=torch.int64), "a tensor (h, w), not (4, 2, 2)"),
            (torch.zeros(2, dtype=torch.int64), "a tensor (h, w), not ()"),
            (torch.tensor(3), "a tensor (h, w), not ()"),
            (torch.zeros(1, 0, 2, dtype=torch.int64), "a tensor (h, w), not (0, 2)"),
            (torch.zeros(0, 2, 2, dtype=torch.int64), "of at least one image"),
            ([[0, 1], [2, 3]], "a tensor (h, w), not list"),
            ("codes.pt", "codes must be a tensor (B, h, w)"),
        ],
        ids=str,
    )
    def test_what_is_not_codes(self, vae: sdkit.VAE, codes: Any, fragment: str) -> None:
        one_sentence(lambda: vae.decode_codes(codes), ArgumentError, fragment)

    def test_other_arguments_are_checked_as_in_decode(self, vae: sdkit.VAE) -> None:
        codes = torch.zeros(1, 2, 3, dtype=torch.int64)
        one_sentence(lambda: vae.decode_codes(codes, size=(9, 12)), ArgumentError, "size must be (height, width)")
        one_sentence(lambda: vae.decode_codes(codes, output_type="jpg"), ArgumentError, "output_type")
        one_sentence(lambda: vae.decode_codes(codes, tile=1), ArgumentError, "tile")
        one_sentence(lambda: vae.decode_codes(codes, batch_size=0), ArgumentError, "batch_size")

    def test_a_vae_without_codes(self, sd: sdkit.StableDiffusion) -> None:
        one_sentence(lambda: sd.vae.codes(pixels()), ArgumentError, "has no codebook")
        codes = torch.zeros(1, 2, 2, dtype=torch.int64)
        one_sentence(lambda: sd.vae.decode_codes(codes), ArgumentError, "has no codebook")
