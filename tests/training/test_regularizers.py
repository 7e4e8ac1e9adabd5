"""The three regularizers of latents (none, KL, a codebook), each compared with diffusers and trained from scratch."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from PIL import Image

import sdkit
from sdkit.diffusion.losses import vq
from sdkit.errors import ArgumentError, SourceError
from sdkit.evaluation.codebook import codebook_use
from sdkit.training import VAEConfig, train_vae
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.vae import VAEStage
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

BLOCKS = 3  # the VAE's factor is 4
SHAPE: dict[str, Any] = {
    "block_out_channels": [16] * BLOCKS,
    "down_block_types": ["DownEncoderBlock2D"] * BLOCKS,
    "up_block_types": ["UpDecoderBlock2D"] * BLOCKS,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": tiny.SIZE,
    "mid_block_add_attention": False,
}
CODES = 32


def config_of(regularizer: str) -> dict[str, Any]:
    own = (
        {"_class_name": "VQModel", "num_vq_embeddings": CODES}
        if regularizer == "vq"
        else {"_class_name": "AutoencoderKL"}
    )
    return SHAPE | own


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.photos(tmp_path_factory.mktemp("discs") / "photos", 40)


@pytest.fixture
def vqmodel() -> VQModel:
    """Make a VQModel with codes spread like its latents, so that many codes are used."""
    torch.manual_seed(0)
    network = VQModel(**{key: value for key, value in config_of("vq").items() if key[0] != "_"}, scaling_factor=0.5)
    network.quantize.embedding.weight.data.normal_(0, 0.3)
    return network.eval()


def pixels(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def run_config(shape: str, photos: Path, folder: Path, **changes: Any) -> VAEConfig:
    """Return settings that train from scratch, without LPIPS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shape.json").write_text(json.dumps(config_of(shape)))
    settings = {
        "regularizer": shape, "batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "lpips_weight": 0.0,
        "init": folder / "shape.json", "data": photos, "out_dir": folder / "run", "ema_decay": 0.0,
    }  # fmt: skip
    return VAEConfig(**settings | changes)


class TestAgainstDiffusers:
    def test_latents_are_those_before_the_codebook(self, vqmodel: VQModel) -> None:
        """`encode` gives latents before the codebook, and images are decoded after it, as in latent diffusion's
        VQ-regularised models.
        """
        vae, x = sdkit.VAE(vqmodel), pixels()
        with torch.no_grad():
            raw = vqmodel.encode(x).latents
            expected = vqmodel.decode(raw).sample.clamp(-1, 1)
        torch.testing.assert_close(vae.encode(x), raw * 0.5)
        torch.testing.assert_close(vae.encode(x, seed=3), raw * 0.5)
        torch.testing.assert_close(vae.decode(raw * 0.5, output_type="pt"), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.reconstruct(x, output_type="pt"), expected, atol=1e-5, rtol=0)
        assert (vae.factor, vae.channels) == (4, 4)

    def test_quantize(self, vqmodel: VQModel) -> None:
        vae = sdkit.VAE(vqmodel)
        raw = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
        codes, numbers = vae.quantize(raw)
        with torch.no_grad():
            expected, _, (_, _, indices) = vqmodel.quantize(raw)
        torch.testing.assert_close(codes, expected)
        assert torch.equal(numbers.flatten(), indices)
        assert numbers.shape == (3, 5, 6)
        assert len(numbers.unique()) > 5

    def test_codebook_loss(self) -> None:
        """diffusers' quantizer with `legacy=False` has the paper's loss. Its default swaps the weights of the two
        terms.
        """
        torch.manual_seed(3)
        quantizer = VectorQuantizer(CODES, 4, beta=0.25, legacy=False)
        quantizer.embedding.weight.data.normal_()
        z = torch.randn(2, 4, 5, 6, requires_grad=True)
        _, expected, (_, _, indices) = quantizer(z)
        codes = quantizer.embedding(indices).reshape(2, 5, 6, 4).movedim(-1, 1)
        found = vq(z, codes)
        torch.testing.assert_close(found, expected)
        theirs = torch.autograd.grad(expected, [z, quantizer.embedding.weight], retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, [z, quantizer.embedding.weight]), theirs)

    @pytest.mark.parametrize("changes", [{}, {"lookup_from_codebook": True}, {"gradient_checkpointing": True}], ids=str)
    def test_gradient_of_the_stage(
        self, vqmodel: VQModel, photos: Path, tmp_path: Path, changes: dict[str, bool]
    ) -> None:
        """Every weight's gradient must equal that of VQModel's own forward pass with the paper's quantizer, whose
        codebook learns by gradient."""
        of_model = {name: value for name, value in changes.items() if name == "lookup_from_codebook"}
        saved = copy.deepcopy(vqmodel)
        saved.register_to_config(**of_model)
        saved.save_pretrained(tmp_path / "model")
        own: dict[str, Any] = {name: value for name, value in changes.items() if name not in of_model}
        own |= {"codebook_decay": 0.0}
        config = run_config("vq", photos, tmp_path, init=None, model=tmp_path / "model", train_encoder=True, **own)
        stage, theirs = VAEStage(config), copy.deepcopy(vqmodel)
        theirs.quantize.legacy = False
        batch = stage.batch([(0, 3), (1, 5)])
        loss, parts = stage.loss({"vae": stage.vae}, batch, 0)
        loss.backward()
        x = batch["pixels"]
        output = theirs.decode(theirs.encode(x).latents)
        expected = (output.sample - x).square().mean() + output.commit_loss
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(parts["codebook"], output.commit_loss.detach())
        for (name, p), q in zip(stage.vae.network.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


class TestCodebookUse:
    def test_all_alike(self) -> None:
        assert codebook_use(torch.arange(8).repeat(5), 8) == pytest.approx((1.0, 8.0))

    def test_one_alone(self) -> None:
        assert codebook_use(torch.full((2, 3), 4), 8) == pytest.approx((1 / 8, 1.0))

    def test_two_of_three_to_one(self) -> None:
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        assert codebook_use(torch.tensor([0, 0, 0, 5]), 8) == pytest.approx((2 / 8, math.exp(entropy)))


class TestTraining:
    @pytest.mark.parametrize("regularizer", ["none", "kl", "vq"])
    def test_from_nothing(self, regularizer: str, photos: Path, tmp_path: Path) -> None:
        """The result must load in sdkit and in diffusers, and reconstruct the training images."""
        steps = 150
        run = train_vae(run_config(regularizer, photos, tmp_path, max_steps=steps, validate_every=steps))
        before, after = (line for line in read_metrics(run / "metrics.jsonl") if "validation/psnr" in line)
        assert after["validation/psnr"] > before["validation/psnr"] + 5
        cls = VQModel if regularizer == "vq" else AutoencoderKL
        assert type(cls.from_pretrained(run / "result")) is cls
        vae = sdkit.VAE.from_pretrained(run / "result", dtype="fp32", device="cpu")
        with Image.open(photos / "000.png") as image:
            first, second = vae.encode(image, seed=0), vae.encode(image, seed=1)
        assert bool((first - second).abs().max() > 1e-4) == (regularizer == "kl")
        # Near 1, because the result's scale was measured.
        assert 0.3 < float(vae.encode(sorted(photos.glob("*.png")), sample=False).std()) < 3
        assert ("validation/perplexity" in after) == (regularizer == "vq")
        if regularizer == "vq":
            assert 1 / CODES <= after["validation/codebook_use"] <= 1
            assert 1 <= after["validation/perplexity"] <= CODES

    def test_without_noise_the_posterior_is_a_point(self, photos: Path, tmp_path: Path) -> None:
        """From the first step on, the log-variance must be so low that images are reconstructed from means."""
        stage = VAEStage(run_config("none", photos, tmp_path))
        _, logvar = stage.vae.moments(pixels())
        assert float(logvar.max()) == -30
        # Weight decay would raise a negative bias.
        optimizer = torch.optim.AdamW(stage.vae.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            stage.loss({"vae": stage.vae}, stage.batch([(0, 1)]), 0)[0].backward()
            optimizer.step()
        assert float(stage.vae.moments(pixels())[1].max()) == -30
        loss, parts = stage.loss({"vae": stage.vae}, stage.batch([(0, 1)]), 0)
        assert parts.keys() == {"l2"}
        assert torch.equal(loss, stage.loss({"vae": stage.vae}, stage.batch([(7, 1)]), 0)[0])

    def test_of_a_decoder_alone_the_codebook_stays(self, vqmodel: VQModel, photos: Path, tmp_path: Path) -> None:
        vqmodel.save_pretrained(tmp_path / "model")
        run = train_vae(run_config("vq", photos, tmp_path, init=None, model=tmp_path / "model"))
        trained = VQModel.from_pretrained(run / "result").state_dict()
        for key, value in vqmodel.state_dict().items():
            frozen = key.startswith(("encoder.", "quant_conv.", "quantize."))
            assert frozen == torch.equal(trained[key], value), key


class TestMistakes:
    @pytest.mark.parametrize(("shape", "asked"), [("vq", "kl"), ("vq", "none"), ("kl", "vq")])
    def test_another_model_s_regularizer(self, shape: str, asked: str, photos: Path, tmp_path: Path) -> None:
        needed = "'vq'" if shape == "vq" else "'kl' or 'none'"
        config = run_config(shape, photos, tmp_path, regularizer=asked)
        one_sentence(lambda: VAEStage(config), ArgumentError, f"its regularizer is {needed}, not {asked!r}")

    def test_a_vae_without_a_codebook(self, sd: sdkit.StableDiffusion) -> None:
        assert sd.vae.codebook is None
        one_sentence(lambda: sd.vae.quantize(torch.zeros(1, 4, 2, 2)), ArgumentError, "has no codebook")

    def test_a_shape_of_another_class(self, photos: Path, tmp_path: Path) -> None:
        config = run_config("kl", photos, tmp_path)
        (tmp_path / "shape.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
        one_sentence(lambda: VAEStage(config), SourceError, "not of AutoencoderKL or VQModel")
