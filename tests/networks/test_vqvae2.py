"""VQ-VAE-2: the shapes of both levels, gradients, files, and priors of its codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.errors import ArgumentError, SourceError
from sdkit.networks.code_prior import log_likelihood, new_prior
from sdkit.networks.prior_shape import PriorShape
from sdkit.networks.vqvae2 import VQVAE2, load_vqvae2
from sdkit.pipelines.code_sampling import draw_codes
from tests.helpers.sentences import one_sentence


@pytest.fixture
def network() -> VQVAE2:
    torch.manual_seed(0)
    return VQVAE2(
        block_out_channels=(8, 8, 8), top_channels=(8, 8), latent_channels=4, num_vq_embeddings=6, norm_num_groups=4
    )


def pixels(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes(network: VQVAE2) -> None:
    x = pixels(16, 24)
    found = network(x)
    assert found.pixels.shape == x.shape
    assert (found.top.shape, found.bottom.shape) == ((2, 2, 3), (2, 4, 6))
    assert found.loss.shape == ()
    one_sentence(lambda: network(pixels(16, 20)), ArgumentError, "must be multiples of 8 pixels, not 16 x 20")


def test_codes_decode_to_the_reconstruction(network: VQVAE2) -> None:
    x = pixels(16, 16)
    found = network(x)
    assert all(torch.equal(one, other) for one, other in zip(network.encode(x), (found.top, found.bottom), strict=True))
    torch.testing.assert_close(network.decode(found.top, found.bottom), found.pixels.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    changed = (found.top + 1) % 6
    assert float((network.decode(changed, found.bottom) - network.decode(found.top, found.bottom)).abs().max()) > 1e-4


def test_codes_need_no_decoder(network: VQVAE2, monkeypatch: pytest.MonkeyPatch) -> None:
    found = network.encode(pixels(16, 16))
    monkeypatch.setattr(network, "decoder", None)
    assert all(torch.equal(one, other) for one, other in zip(network.encode(pixels(16, 16)), found, strict=True))
    one_sentence(lambda: network.encode(pixels(16, 20)), ArgumentError, "must be multiples of 8 pixels, not 16 x 20")


def test_the_loss_is_that_of_both_codebooks(network: VQVAE2) -> None:
    """Codebook and commitment (0.25) losses of each level, derived from the parts (eq. 1 and 2 of the paper)."""
    x = pixels(16, 16)
    below = network.bottom_encoder(x)
    z_top = network.top_encoder(below)
    total, decoded = torch.zeros(()), []
    for z, table in ((z_top, network.top_codes), (None, network.bottom_codes)):
        if z is None:
            z = network.joined(torch.cat([network.top_decoder(decoded[0]), below], dim=1))
        distances = (z.movedim(1, -1)[..., None, :] - table.weight).square().sum(-1)
        codes = table.weight[distances.argmin(-1)].movedim(-1, 1)
        decoded.append(codes)
        total = total + F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
    torch.testing.assert_close(network(x).loss, total, atol=1e-6, rtol=1e-4)


def test_gradients(network: VQVAE2) -> None:
    """The reconstruction reaches all networks and no code, through both roundings; the other loss reaches the codes."""
    found = network(pixels(16, 16))
    found.pixels.square().mean().backward(retain_graph=True)
    reached = {
        name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())
    }
    networks = {"bottom_encoder", "top_encoder", "top_decoder", "joined", "upsampled", "decoder"}
    assert reached == networks
    without = [n for n, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert {name.split(".")[0] for name in without} <= {"top_codes", "bottom_codes"}
    found.loss.backward()
    assert network.top_codes.weight.grad.abs().sum() > 0
    assert network.bottom_codes.weight.grad.abs().sum() > 0


def test_saved_and_loaded_by_diffusers(network: VQVAE2, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    x = pixels(16, 16)
    assert torch.equal(VQVAE2.from_pretrained(tmp_path)(x).pixels, network(x).pixels)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"layers_per_block": 10**9}, "has layers_per_block 1000000000, not a whole number from 0 to 1000"),
    ({"layers_per_block": 300}, "asks for 1,500 layers, more than its weights"),
    ({"block_out_channels": [8] * 10**4}, "has block_out_channels"),
    ({"latent_channels": -4}, "has latent_channels -4, not a whole number from 1"),
    ({"num_vq_embeddings": 10**6}, "bottom_codes.weight is 6x4 instead of 1000000x4"),
    ({"block_out_channels": [10**6] * 3}, "do not fit its config"),
    ({"norm_num_groups": 3}, "cannot be loaded"),
]


def test_damaged_files_are_one_sentence(network: VQVAE2, tmp_path: Path) -> None:
    """Sizes are refused before memory is taken."""
    network.save_pretrained(tmp_path)
    assert all(map(torch.equal, load_vqvae2(tmp_path).state_dict().values(), network.state_dict().values()))
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    written = json.loads(config.read_text())
    for change, sentence in BAD:
        config.write_text(json.dumps(written | change))
        one_sentence(lambda: load_vqvae2(tmp_path), SourceError, sentence)
    config.write_text(json.dumps(written))
    tensors = load_file(weights)
    save_file(tensors | {"joined.bias": tensors["joined.bias"] * torch.nan}, weights)
    one_sentence(lambda: load_vqvae2(tmp_path), SourceError, "joined.bias is not finite")
    save_file({name: tensor for name, tensor in tensors.items() if name != "joined.bias"}, weights)
    one_sentence(lambda: load_vqvae2(tmp_path), SourceError, "joined.bias is missing")


def test_priors_of_both_levels(network: VQVAE2) -> None:
    """A bottom prior reads the top codes as its map; images are drawn from the top down."""
    torch.manual_seed(0)
    common = {"kind": "pixelcnn", "codes": 6, "layers": 2, "width": 8}
    top_prior = new_prior(PriorShape(grid=(2, 2), **common)).eval()
    shape = PriorShape(grid=(4, 4), condition="map", condition_shape=(2, 2), tokens=6, **common)
    bottom_prior = new_prior(shape).eval()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    top = draw_codes(top_prior, generators)
    bottom = draw_codes(bottom_prior, generators, condition=top)
    assert network.decode(top, bottom).shape == (2, 3, 16, 16)
    with torch.no_grad():
        own, other = (log_likelihood(bottom_prior, bottom, map_) for map_ in (top, (top + 1) % 6))
    assert float((own - other).abs().min()) > 0
