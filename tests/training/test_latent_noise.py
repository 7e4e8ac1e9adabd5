"""Training of a decoder on noisy latents: what it reads, and what validation reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sdkit.data.transform import draw
from sdkit.errors import ArgumentError
from sdkit.training import VAEConfig, train_vae
from sdkit.training.batches import noise_of, samples_of
from sdkit.training.stages.vae import NOISY, VAEStage
from tests.helpers import tiny_vae
from tests.helpers.tiny_vae import HELD_OUT, LATENT, lines

NOISE = 0.8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae.make(tmp_path_factory.mktemp("latent_noise"))


def config(made: Path, out: Path, **changes: Any) -> VAEConfig:
    return tiny_vae.config(made, out, **{"batch_size": 8, "learning_rate": 3e-3, "latent_noise": NOISE} | changes)


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    return train_vae(config(made, made / "run"))


def image(path: Path) -> Tensor:
    """Read an image as (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / 127.5 - 1)[None]


def mean_square(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean())


def test_the_decoder_reads_a_sample_of_the_posterior_with_noise_of_a_random_strength(
    made: Path, run: Path, tmp_path: Path
) -> None:
    """The first logged loss is that of diffusers' network, with the noise added by hand, to 1e-4."""
    settings = config(made, tmp_path)
    stage = VAEStage(settings)
    network = AutoencoderKL.from_pretrained(made / "model" / "vae")
    samples = samples_of(settings, 0, 0, 0, 1, stage.size)
    total = 0.0
    for (n, _), name in zip(samples, stage.names(samples), strict=True):
        source, x = noise_of(0, n), image(made / "photos" / name)
        eps = torch.randn(LATENT, generator=source)
        strength = NOISE * torch.randn((), generator=source).abs()
        noise = strength * torch.randn(LATENT, generator=source)
        with torch.no_grad():
            posterior = network.encode(x).latent_dist
            z = posterior.mean + posterior.std * eps + noise / network.config.scaling_factor
            total += mean_square(network.decode(z).sample, x)
    assert lines(run, "loss")[0]["l2"] == pytest.approx(total / len(samples), rel=1e-4)


def test_the_strength_is_half_normal(made: Path, tmp_path: Path) -> None:
    stage = VAEStage(config(made, tmp_path))
    strengths = stage.batch([(n, 0) for n in range(400)])["noise"].flatten(1).std(1)
    # E|n| = sqrt(2 / pi), and E n^2 = 1; 400 draws
    assert float(strengths.mean()) == pytest.approx(NOISE * (2 / np.pi) ** 0.5, rel=0.12)
    assert float(strengths.square().mean()) == pytest.approx(NOISE**2, rel=0.22)


def test_without_it_a_batch_has_no_noise_and_the_same_posterior_noise(made: Path, tmp_path: Path) -> None:
    noisy, plain = (VAEStage(config(made, tmp_path, latent_noise=value)).batch([(5, 3)]) for value in (NOISE, 0.0))
    assert noisy.keys() - plain.keys() == {"noise"}
    assert torch.equal(noisy["eps"], plain["eps"])


def test_validation_decodes_latents_with_noise_too(made: Path, run: Path) -> None:
    """Against diffusers' network, to 1e-3 dB, before and after training."""
    for line, folder in zip(lines(run, "validation/psnr"), (made / "model" / "vae", run / "result"), strict=True):
        network = AutoencoderKL.from_pretrained(folder)
        values = []
        for i, name in enumerate(HELD_OUT):
            x, noise = image(made / "photos" / name), torch.randn(LATENT, generator=draw(0, i, NOISY))
            with torch.no_grad():
                z = network.encode(x).latent_dist.mean + NOISE * noise / network.config.scaling_factor
                values.append(-10 * np.log10(mean_square(network.decode(z).sample.clamp(-1, 1), x) / 4))
        assert line["validation/noisy_psnr"] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize("changes", [{"train_encoder": True}, {"init": "config.json"}, {"regularizer": "vq"}], ids=str)
def test_it_is_for_the_decoder_of_a_trained_autoencoder(made: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="latent_noise trains the decoder of an AutoencoderKL alone"):
        config(made, tmp_path, **changes)
