"""Evaluation of autoencoders, compared with diffusers, scikit-image, scipy, and NumPy."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageOps
from torch import nn

import sdkit
from sdkit.data import open_examples
from sdkit.errors import ArgumentError, DataError, ImageError, SdkitError, SourceError
from sdkit.evaluation import Extractor, VAEEvaluation, evaluate_vae, open_extractor, reconstruction_sheet
from sdkit.evaluation import reconstruction as module
from sdkit.networks.autoencoder_kinds import PixelIdentity
from sdkit.networks.lpips import LPIPS
from tests.helpers.sentences import one_sentence

SIDE = 64


def kl(seed: int = 0) -> sdkit.VAE:
    """Make a VAE with random weights, and with latents that are mostly noise."""
    torch.manual_seed(seed)
    network = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, scaling_factor=0.3, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return sdkit.VAE(network, name="random").eval()


@pytest.fixture(scope="module")
def crops(astronaut: Image.Image, chelsea: Image.Image, coffee: Image.Image) -> list[Image.Image]:
    """Cut twelve pictures of 64 x 64 pixels from photos."""
    boxes = [(x, y, x + SIDE, y + SIDE) for x, y in ((40, 20), (120, 100), (200, 150), (230, 60))]
    return [photo.crop(box) for photo in (astronaut, chelsea, coffee) for box in boxes]


@pytest.fixture(scope="module")
def alex() -> Extractor:
    return open_extractor("alex", device="cpu")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS.from_pretrained("alex")


@pytest.fixture
def run(alex: Extractor, lpips: LPIPS) -> Callable[..., VAEEvaluation]:
    """Evaluate on the CPU in float32, with networks that are already loaded."""

    def evaluate(vae: Any, images: Any, **options: Any) -> VAEEvaluation:
        usual = {"lpips": lpips, "extractor": alex, "device": "cpu", "dtype": "fp32"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "1?[26] images are fewer than the")
            return evaluate_vae(vae, images, **usual | options)

    return evaluate


def colours(width: int = 2) -> Extractor:
    """Make an extractor of so few features that a few images suffice for their covariance."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, width)).requires_grad_(False)
    return Extractor(network, lambda pixels: (network(pixels / 255), None), name="colours", width=width, side=32)


def test_metrics_equal_independent_ones(crops: list[Image.Image], lpips: LPIPS) -> None:
    """The reconstruction is diffusers', rounded to 8 bits; PSNR and SSIM are scikit-image's, the distance scipy's."""
    vae, extractor = kl(), colours(6)
    found = evaluate_vae(vae, crops, extractor=extractor, device="cpu", batch_size=5)
    psnrs, ssims, distances, decoded = list[float](), list[float](), list[float](), list[Image.Image]()
    with torch.no_grad():
        for crop in crops:
            x = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 127.5 - 1
            y = vae.network.decode(vae.network.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            levels = ((y[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
            decoded.append(Image.fromarray(levels))
            psnrs.append(skimage.metrics.peak_signal_noise_ratio(np.array(crop), levels))
            ssims.append(
                skimage.metrics.structural_similarity(
                    np.array(crop), levels, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5,
                    use_sample_covariance=False,
                )
            )  # fmt: skip
            distances.append(float(lpips(x, torch.from_numpy(levels).permute(2, 0, 1)[None] / 127.5 - 1)))
    assert found.psnr == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert found.ssim == pytest.approx(np.mean(ssims), abs=1e-4)
    assert found.lpips == pytest.approx(np.mean(distances), abs=1e-4)
    a, b = extractor(crops).double().numpy(), extractor(decoded).double().numpy()
    root = np.real(scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert found.rfid == pytest.approx(expected, rel=1e-3)
    assert (found.vae, found.images, found.size) == ("random", 12, (SIDE, SIDE))
    assert (found.extractor, found.lpips_network) == ("colours", "alex")
    ranked = sorted(distances)
    assert [one.lpips for one in found.best] == pytest.approx(ranked[:4], abs=1e-4)
    assert [one.lpips for one in found.worst] == pytest.approx(ranked[:-5:-1], abs=1e-4)


def test_latents_equal_numpy_s_and_samples(crops: list[Image.Image]) -> None:
    """The closed form of the variance equals NumPy's formula, and the statistics of sampled latents."""
    vae = kl()
    found = evaluate_vae(vae, crops, extractor=colours(), device="cpu", batch_size=5)
    mean, logvar = (one.double().numpy() for one in vae.moments(crops))
    noise = np.exp(logvar).mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + noise
    assert np.allclose(found.latent_mean, (mean.mean((0, 2, 3)) - 0.1) * 0.3, rtol=1e-4, atol=1e-6)
    assert np.allclose(found.latent_std, np.sqrt(variance) * 0.3, rtol=1e-4)
    assert found.noise_share == pytest.approx(noise.sum() / variance.sum(), rel=1e-4)
    samples = torch.stack([vae.encode(crops, seed=100 * i) for i in range(40)]) / vae.scale
    assert found.unit_scale == pytest.approx(1 / float(samples.std()), rel=0.01)
    assert found.scale == 0.3
    assert found.noise_share > 0.5  # otherwise this test would not see the noise


def test_a_vae_without_posterior_has_no_noise(crops: list[Image.Image]) -> None:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    tiny = sdkit.VAE(AutoencoderTiny(**widths), name="tiny").eval()
    assert evaluate_vae(tiny, crops[:3], extractor=colours(), device="cpu").noise_share < 1e-9


def test_controls_enclose_the_embedded_vae(
    sd: sdkit.StableDiffusion, crops: list[Image.Image], run: Callable[..., VAEEvaluation]
) -> None:
    pixels, emoji, blur = (run(vae, crops) for vae in ("pixels", sd.vae, "blur"))
    assert (pixels.psnr, pixels.ssim, pixels.lpips) == (math.inf, pytest.approx(1), 0)
    assert pixels.rfid == pytest.approx(0, abs=1e-9)
    assert pixels.psnr > emoji.psnr > blur.psnr
    assert pixels.ssim > emoji.ssim > blur.ssim
    assert pixels.lpips < emoji.lpips < blur.lpips
    assert pixels.rfid < emoji.rfid < blur.rfid
    levels = np.stack([np.array(crop) for crop in crops]) / 127.5 - 1
    assert np.allclose(pixels.latent_mean, levels.mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(pixels.latent_std, levels.std((0, 1, 2)), atol=1e-6)


def test_metrics_rank_blur(
    crops: list[Image.Image], run: Callable[..., VAEEvaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger squares are worse by each metric, on real pictures."""
    found = list[VAEEvaluation]()
    for side in (2, 6, 16):
        monkeypatch.setattr(module, "BLUR_SIDE", side)
        found.append(run("blur", crops[::2]))
    for metric, worse in (("psnr", -1), ("ssim", -1), ("lpips", 1), ("rfid", 1)):
        values = [worse * getattr(one, metric) for one in found]
        assert values == sorted(values), metric
        assert len(set(values)) == len(values), metric


def test_batches_do_not_matter(crops: list[Image.Image]) -> None:
    vae, options = kl(), {"extractor": colours(), "device": "cpu"}
    whole, *others = (evaluate_vae(vae, crops, batch_size=n, **options).asdict() for n in (None, 1, 5))
    for other in others:
        for key, value in whole.items():
            if key in ("psnr", "ssim", "lpips", "rfid", "latent_mean", "latent_std", "unit_scale", "noise_share"):
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_images_may_be_files_examples_and_tensors(crops: list[Image.Image], tmp_path: Path) -> None:
    """All kinds give the same numbers: a folder, its examples, paths, and tensors."""
    for i, crop in enumerate(crops[:4]):
        crop.save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    tensors = torch.stack(sdkit.images.to_tensors(crops[:4]))
    vae, options = kl(), {"extractor": colours(), "device": "cpu"}
    kinds = [crops[:4], tmp_path, str(tmp_path), paths, open_examples(tmp_path), tensors]
    found = [evaluate_vae(vae, images, **options) for images in kinds]
    assert {one.psnr for one in found} == {found[0].psnr}
    assert {one.rfid for one in found} == {found[0].rfid}
    assert found[4].worst[0].name in {path.name for path in paths}


def test_size_reduces_and_crops(astronaut: Image.Image, coffee: Image.Image) -> None:
    """Photos of different sizes are fitted as by Pillow's ImageOps.fit."""
    vae, options = kl(), {"extractor": colours(), "device": "cpu"}
    found = evaluate_vae(vae, [astronaut, coffee], size=(48, 80), **options)
    fitted = [ImageOps.fit(photo, (80, 48), Image.Resampling.LANCZOS) for photo in (astronaut, coffee)]
    assert found.size == (48, 80)
    assert found.psnr == evaluate_vae(vae, fitted, **options).psnr


def test_sizes_that_the_vae_must_pad(crops: list[Image.Image]) -> None:
    """45 x 50 pixels do not divide by 8: the edges are repeated, and cropped off again."""
    cut = [crop.crop((0, 0, 45, 50)) for crop in crops[:2]]
    vae = kl()
    found = evaluate_vae(vae, cut, extractor=colours(), device="cpu")
    expected = sdkit.metrics.psnr(cut, vae.reconstruct(cut))
    assert found.psnr == pytest.approx(float(expected.mean()), abs=1e-6)


def test_images_that_cannot_be_used_are_skipped(crops: list[Image.Image], tmp_path: Path) -> None:
    for i, crop in enumerate(crops[:3]):
        crop.save(tmp_path / f"{i}.png")
    (tmp_path / "0-torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    crops[3].crop((0, 0, 40, 64)).save(tmp_path / "1-small.png")
    options: dict[str, Any] = {"extractor": colours(), "device": "cpu", "size": SIDE}
    found = evaluate_vae(kl(), tmp_path, batch_size=2, **options)
    assert [Path(name).name for name, _ in found.skipped] == ["0-torn.png", "1-small.png"]
    assert "40 x 64 pixels are less than 64 x 64" in found.skipped[1][1]
    assert found.images == 3
    assert found.psnr == pytest.approx(evaluate_vae(kl(), crops[:3], **options).psnr, abs=1e-4)


def test_one_image_has_no_frechet_distance(crops: list[Image.Image]) -> None:
    found = evaluate_vae(kl(), crops[:1], extractor=colours(), device="cpu")
    assert found.rfid is None
    assert found.worst[0].name == found.best[0].name == "image 1"


def test_lpips_may_be_left_out(crops: list[Image.Image]) -> None:
    found = evaluate_vae(kl(), crops, extractor=colours(), device="cpu", lpips=None)
    assert (found.lpips, found.lpips_network) == (None, None)
    assert found.worst[0].psnr < found.best[0].psnr
    assert reconstruction_sheet([found]).width > 8 * SIDE


def test_json_holds_no_picture_and_no_infinity(crops: list[Image.Image]) -> None:
    found = evaluate_vae("pixels", crops, extractor=colours(), device="cpu")
    text = json.dumps(found.asdict(), allow_nan=False)
    values = json.loads(text)
    assert values["psnr"] is None
    assert values["worst"][0]["psnr"] is None
    assert values["lpips"] == 0
    assert set(values) == set(VAEEvaluation.__dataclass_fields__)


def test_sheet_shows_the_images_above_their_reconstructions(crops: list[Image.Image]) -> None:
    vae = kl()
    found = evaluate_vae(vae, crops, extractor=colours(), device="cpu")
    sheet = np.asarray(reconstruction_sheet([found, found]))
    assert sheet.shape[1] > 8 * SIDE
    assert sheet.shape[0] > 4 * SIDE
    for one in (found.worst[0], found.best[-1]):
        assert np.array_equal(np.asarray(one.decoded), np.asarray(vae.reconstruct(one.original)[0]))
        for picture in (one.original, one.decoded):
            assert _holds(sheet, np.asarray(picture)) == 2  # each of the two evaluations shows it


def _holds(sheet: Any, picture: Any) -> int:
    """Return how many times a picture lies on a sheet."""
    height, width = picture.shape[:2]
    first = (sheet == picture[0, 0]).all(-1) & np.roll((sheet == picture[0, 1]).all(-1), -1, axis=1)
    corners = zip(*np.nonzero(first), strict=True)
    return sum(np.array_equal(sheet[y : y + height, x : x + width], picture) for y, x in corners)


def test_a_few_batches_are_held_at_a_time(crops: list[Image.Image]) -> None:
    """Of 90 images, there are at most those of four batches, of the readers, and of the sheet at a time."""
    alive, most = set[int](), 0
    numbers = itertools.count()

    class Made:
        name = "made"

        def load(self) -> Image.Image:
            nonlocal most
            picture, number = crops[0].copy(), next(numbers)
            alive.add(number)
            weakref.finalize(picture, alive.discard, number)
            most = max(most, len(alive))
            return picture

    found = evaluate_vae("blur", [Made()] * 90, batch_size=2, extractor=colours(), device="cpu", lpips=None)
    assert found.images == 90
    assert most <= 4 * 2 + 2 * module.SHOWN + module.READERS < 60


def test_peak_memory_and_speed_are_measured(crops: list[Image.Image]) -> None:
    found = evaluate_vae(kl(), crops, extractor=colours(), device="cpu")
    assert found.encoded_per_second > 0
    assert found.decoded_per_second > 0
    assert found.peak_memory is None or found.peak_memory > 50e6


class TestBadInput:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        (tmp_path / "empty").mkdir()
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        return tmp_path

    @pytest.mark.parametrize(
        ("options", "kind", "fragment"),
        [
            ({"images": []}, DataError, "there are no images to evaluate on"),
            ({"images": 3}, ArgumentError, "images must be a folder, or a list of images, paths, or examples, not int"),
            ({"images": Image.new("RGB", (64, 64))}, ArgumentError, "images must be a folder, or a list"),
            ({"images": "{}/no"}, SdkitError, "no"),
            ({"images": "{}/empty"}, SdkitError, "empty"),
            ({"images": "{}/torn"}, DataError, "none of 1 images can be used; the first: "),
            ({"images": ["no.png"]}, DataError, "none of 1 images can be used; the first: "),
            ({"images": [torch.zeros(2, 3, 64, 64)]}, ArgumentError, "item 1 of the images is a batch of 2"),
            ({"images": [Image.new("RGB", (20, 64))]}, DataError, "20 x 64 pixels are too few to compare images"),
            ({"size": 0}, ArgumentError, "size must be a whole number"),
            ({"size": 16}, ArgumentError, "size 16 x 16 is too small to compare images; give at least 31 pixels"),
            ({"size": (64, 64, 3)}, ArgumentError, "size must be one number of pixels, or (height, width)"),
            ({"size": 512}, DataError, "64 x 64 pixels are less than 512 x 512; give a smaller size"),
            ({"batch_size": 0}, ArgumentError, "batch_size must be a whole number of at least 1"),
            ({"extractor": "vgg"}, ArgumentError, "extractor 'vgg' is not one of"),
            ({"lpips": "no/such/file"}, SourceError, "no/such/file"),
            ({"vae": "no/such/vae"}, SourceError, "no/such/vae"),
            ({"vae": nn.Identity()}, ArgumentError, "a Identity is no VAE to evaluate"),
            ({"dtype": "fp8"}, ArgumentError, "dtype 'fp8' is not one of"),
            ({"device": "tpu"}, ArgumentError, "device 'tpu' cannot be used"),
        ],
    )
    def test_is_one_sentence(self, files: Path, options: dict[str, Any], kind: type[SdkitError], fragment: str) -> None:
        given: dict[str, Any] = {"vae": "pixels", "images": [Image.new("RGB", (64, 64))], "device": "cpu"} | options
        if isinstance(given["images"], str):
            given["images"] = given["images"].format(files)
        one_sentence(lambda: evaluate_vae(**given), kind, fragment)

    def test_sizes_differ(self, crops: list[Image.Image]) -> None:
        images = [crops[0], crops[1].crop((0, 0, 40, 50))]
        one_sentence(
            lambda: evaluate_vae(sdkit.VAE(PixelIdentity()), images, extractor=colours(), device="cpu"),
            ImageError,
            "image 2 has 40 x 50 pixels, others have 64 x 64: give a size",
        )

    def test_weights_that_are_not_finite(self, crops: list[Image.Image]) -> None:
        broken = kl()
        broken.network.encoder.conv_in.weight.data.fill_(math.nan)
        one_sentence(
            lambda: evaluate_vae(broken, crops, extractor=colours(), device="cpu"),
            SourceError,
            "'random' gives latents that are not finite; its weights are to blame",
        )


def test_reset_of_the_peak() -> None:
    """The peak includes what was freed, and a reset forgets it. A process of its own has no freed memory to reuse."""
    from sdkit.engines.memory import CLEAR

    if not CLEAR.exists():
        pytest.skip("this system cannot reset the peak")
    script = """
import torch
from sdkit.engines.memory import peak_memory, reset_peak_memory

for megabytes in (1, 400, 1):
    reset_peak_memory(torch.device("cpu"))
    block = torch.ones(megabytes * 250_000)
    del block
    print(peak_memory(torch.device("cpu")))
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    small, large, again = map(int, told.stdout.split())
    assert large - small > 300e6
    assert again < large - 300e6
