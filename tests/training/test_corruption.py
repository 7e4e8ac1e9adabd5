"""A denoising autoencoder: how its input is corrupted, what it is compared with, and what validation reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sdkit.data.transform import draw
from sdkit.training import VAEConfig, train_vae
from sdkit.training.batches import noise_of, samples_of
from sdkit.training.stages.corruption import Corruption
from sdkit.training.stages.vae import CORRUPTED, VAEStage
from tests.helpers import tiny, tiny_vae
from tests.helpers.tiny_vae import HELD_OUT, LATENT, lines

NOISE, RATIO, PATCH = 0.4, 0.75, 4
SQUARES = (tiny.SIZE // PATCH) ** 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae.make(tmp_path_factory.mktemp("corruption"))


def config(made: Path, out: Path, **changes: Any) -> VAEConfig:
    settings: dict[str, Any] = {
        "batch_size": 2, "learning_rate": 1e-3, "train_encoder": True, "kl_weight": 0.0,
        "input_noise": NOISE, "mask_ratio": RATIO, "mask_patch": PATCH,
    }  # fmt: skip
    return tiny_vae.config(made, out, **settings | changes)


def image(path: Path) -> npt.NDArray[np.float32]:
    """Read an image as (3, H, W) in [-1, 1]."""
    return np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / 127.5 - 1


def by_hand(x: npt.NDArray[np.float32], source: torch.Generator) -> npt.NDArray[np.float32]:
    """Add noise to an image and grey its patches one by one, by loops in NumPy."""
    y = x + NOISE * torch.randn(x.shape, generator=source).numpy()
    for one in torch.randperm(SQUARES, generator=source)[: round(RATIO * SQUARES)].tolist():
        top, left = PATCH * (one // (tiny.SIZE // PATCH)), PATCH * (one % (tiny.SIZE // PATCH))
        y[:, top : top + PATCH, left : left + PATCH] = 0
    return y


def psnr(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> float:
    """Return the PSNR in dB of pixels in [-1, 1], after those of y are clipped."""
    return float(-10 * np.log10(np.square((x - y.clip(-1, 1)) / 2).mean()))


@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=str)
def test_masks_are_whole_patches_as_many_as_the_ratio_says(size: tuple[int, int]) -> None:
    x = 1 + torch.rand(3, *size)  # no pixel is 0
    patches = size[0] * size[1] // PATCH**2
    seen = torch.zeros(size)
    for seed in range(200):
        y = Corruption(0.0, RATIO, PATCH)(x, torch.Generator().manual_seed(seed))
        masked = (y == 0).all(0)
        assert torch.equal(y[:, ~masked], x[:, ~masked])
        assert not y[:, masked].any()
        tiles = masked.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2).float().mean(2)
        assert {*tiles.flatten().tolist()} == {0.0, 1.0}  # each patch as a whole
        assert tiles.sum() == round(RATIO * patches)
        seen += masked
    # Each pixel is masked in 75 % of the draws: 150 of 200, with a standard deviation of 6.
    assert seen.min() > 150 - 5 * 6.2
    assert seen.max() < 150 + 5 * 6.2


def test_noise_has_the_standard_deviation_that_was_asked_for_and_no_bounds() -> None:
    x = torch.full((3, 64, 64), 0.9)
    y = Corruption(0.5, 0.0, PATCH)(x, torch.Generator().manual_seed(0))
    assert torch.equal(y, x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert float((y - x).std()) == pytest.approx(0.5, rel=0.03)
    assert y.max() > 1


def test_a_batch_holds_the_clean_image_the_same_noise_as_before_and_the_corrupted_input(
    made: Path, tmp_path: Path
) -> None:
    """A sample's corruption depends on its number alone: not on its batch, and not on the example."""
    stage = VAEStage(config(made, tmp_path, seed=3))
    plain = VAEStage(config(made, tmp_path, seed=3, input_noise=0.0, mask_ratio=0.0, mask_patch=8))
    samples = [(0, 3), (1, 5), (40, 3)]
    batch, without = stage.batch(samples), plain.batch(samples)
    assert without.keys() == {"pixels", "eps", "n"}
    assert all(torch.equal(batch[name], without[name]) for name in without)
    for j, (n, _) in enumerate(samples):
        source = noise_of(3, n)
        assert torch.equal(torch.randn(LATENT, generator=source), batch["eps"][j])
        expected = torch.from_numpy(by_hand(batch["pixels"][j].numpy(), source))
        torch.testing.assert_close(batch["corrupted"][j], expected, atol=1e-6, rtol=0)
        assert torch.equal(stage.batch([samples[j]])["corrupted"][0], batch["corrupted"][j])
    assert not torch.equal(batch["corrupted"][0], batch["corrupted"][2])  # another epoch


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    with pytest.warns(UserWarning, match="latents have moved by"):
        return train_vae(config(made, made / "run", max_steps=10, save_every=1, keep_checkpoints=20))


def test_the_loss_compares_the_reconstruction_with_the_clean_image(made: Path, run: Path, tmp_path: Path) -> None:
    """The first logged loss is that of diffusers' network on the input corrupted by hand, to 1e-4."""
    settings = config(made, tmp_path)
    stage = VAEStage(settings)
    network = AutoencoderKL.from_pretrained(made / "model" / "vae")
    samples = samples_of(settings, 0, 0, 0, 1, stage.size)
    total = 0.0
    for (n, _), name in zip(samples, stage.names(samples), strict=True):
        source, x = noise_of(0, n), image(made / "photos" / name)
        eps = torch.randn(LATENT, generator=source)
        with torch.no_grad():
            posterior = network.encode(torch.from_numpy(by_hand(x, source))[None]).latent_dist
            y = network.decode(posterior.mean + posterior.std * eps).sample[0].numpy()
        total += float(np.square(y - x).mean())
    assert lines(run, "loss")[0]["l2"] == pytest.approx(total / len(samples), rel=1e-4)


GOLDEN = [0.790768, 0.726341, 0.522457, 0.512960, 0.405518, 0.325273, 0.283292, 0.295901, 0.205819, 0.194924]


def test_golden_losses(run: Path) -> None:
    assert [line["loss"] for line in lines(run, "loss")] == pytest.approx(GOLDEN, rel=1e-3)


def test_validation_measures_clean_and_corrupted_input(made: Path, run: Path) -> None:
    """Both against diffusers' network, and the corrupted input itself, to 1e-3 dB; the same corruption each time."""
    first, last = lines(run, "validation/psnr")
    for line, folder in ((first, made / "model" / "vae"), (last, run / "result")):
        network = AutoencoderKL.from_pretrained(folder)
        expected: dict[str, list[float]] = {"psnr": [], "corrupted_psnr": [], "input_psnr": []}
        for i, name in enumerate(HELD_OUT):
            x = image(made / "photos" / name)
            corrupted = by_hand(x, draw(0, i, CORRUPTED))
            with torch.no_grad():
                clean, restored = network(torch.from_numpy(np.stack([x, corrupted]))).sample.numpy()
            for key, y in (("psnr", clean), ("corrupted_psnr", restored), ("input_psnr", corrupted)):
                expected[key].append(psnr(x, y))
        for key, values in expected.items():
            assert line[f"validation/{key}"] == pytest.approx(np.mean(values), abs=1e-3), key
    assert first["validation/corrupted_psnr"] != last["validation/corrupted_psnr"]
    assert {"validation/corrupted_ssim", "validation/corrupted_lpips"} <= last.keys()
    with Image.open(run / "samples" / "step-00000010.png") as sheet:  # four rows of two images
        assert sheet.height > 4 * tiny.SIZE


def test_a_plain_run_reports_nothing_of_corruption(made: Path, tmp_path: Path) -> None:
    stage = VAEStage(config(made, tmp_path, input_noise=0.0, mask_ratio=0.0, mask_patch=8))
    with torch.no_grad():
        assert not [key for key in stage.validate(0) if "corrupted" in key or "input" in key]
