"""Training an upsampler: the loss against diffusers' networks, noise levels, pixels and latents, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

import sdkit
from sdkit.data import cache
from sdkit.errors import ArgumentError, CacheError
from sdkit.training import UNetConfig, train_unet
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.unet import UNetStage
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

pytest.importorskip("datasets")

BATCH = [(n, n) for n in range(4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, images, and caches of them with and without the images themselves as a map."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 23)
    common: dict[str, Any] = {"size": tiny.SIZE, "dtype": "fp32", "device": "cpu"}
    beside = {"conditioning_data": folder / "photos", "condition_kind": "map"}
    cache(folder / "model", folder / "photos", folder / "cache", **common, **beside)
    cache(folder / "model", folder / "photos", folder / "plain cache", **common)
    plain = {"_class_name": "UNet2DModel", "sample_size": 32, "down_block_types": ["DownBlock2D"] * 2}
    plain |= {"up_block_types": ["UpBlock2D"] * 2, "block_out_channels": [8, 8], "norm_num_groups": 4}
    (folder / "plain.json").write_text(json.dumps(plain))
    ours = json.loads((folder / "model" / "unet" / "config.json").read_text())
    (folder / "learned.json").write_text(json.dumps(ours | {"in_channels": 3, "out_channels": 6}))
    (folder / "labelled.json").write_text(json.dumps(ours | {"num_class_embeds": 3}))
    return folder


def config(made: Path, **changes: Any) -> UNetConfig:
    own: dict[str, Any] = {
        "model": made / "model", "data": made / "photos", "out_dir": made / "unused", "size": tiny.SIZE,
        "batch_size": 4, "max_steps": 5, "learning_rate": 5e-3, "ema_decay": 0.0, "upscale_factor": 8, "seed": 1,
    }  # fmt: skip
    return UNetConfig(**own | changes)


def awake(stage: UNetStage) -> UNetStage:
    """Give what is zero at first random weights."""
    torch.manual_seed(3)
    for part in (stage.unet.network.conv_in, stage.unet.network.class_embedding):
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return stage


@pytest.mark.parametrize("vae", [None, "pixels"])
def test_the_loss_is_that_of_diffusers_networks(made: Path, vae: str | None, tmp_path: Path) -> None:
    """The U-Net reads x_t, the image at an eighth of its size with noise of its own, and the level of that noise. In
    pixels the small image is enlarged to the size of x_t."""
    changes: dict[str, Any] = {}
    if vae:
        shape = {"block_out_channels": (16, 32), "in_channels": 3, "out_channels": 3, "sample_size": 32}
        tiny.networks((16, 16), unet={**tiny.TWO_LEVELS, **shape}).unet.save_pretrained(tmp_path)
        changes = {"vae": vae, "init": tmp_path}
    stage = awake(UNetStage(config(made, caption_dropout=0.0, augment=("crop",), **changes)))
    batch = stage.batch(BATCH)
    found, _ = stage.loss({"unet": stage.denoiser}, batch, 0)
    low = batch["pixels"].unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5))  # (4, 3, 4, 4)
    assert batch["label"].shape == (4,)
    # The noise is what the U-Net reads, less the image.
    a = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[batch["label"]].float()[:, None, None, None]
    t, text = torch.tensor(batch["t"]), stage.encoder.captions(batch)
    scheduler = DDPMScheduler.from_pretrained(made / "model" / "scheduler")
    with torch.no_grad():
        if vae:
            x0 = batch["pixels"]
            enlarged = torch.nn.functional.interpolate(a.sqrt() * low, (32, 32), mode="bilinear", align_corners=False)
            rest = batch["concat"] - enlarged
        else:
            network = AutoencoderKL.from_pretrained(made / "model" / "vae")
            posterior = network.encode(batch["pixels"]).latent_dist
            x0 = (posterior.mean + posterior.std * batch["posterior_eps"]) * network.config.scaling_factor
            rest = batch["concat"] - a.sqrt() * low
        x_t = torch.cat([scheduler.add_noise(x0, batch["eps"], t), batch["concat"]], dim=1)
        output = stage.unet.network(x_t, t, text, class_labels=batch["label"]).sample
    torch.testing.assert_close(found.detach(), (output - batch["eps"]).square().mean(), atol=1e-4, rtol=1e-4)
    if not vae:
        noise = rest / (1 - a).sqrt()
        assert abs(float(noise.std()) - 1) < 0.2
        assert abs(float((noise * low).mean())) < 0.15
    found.backward()  # type: ignore[no-untyped-call]
    for part in (stage.unet.network.conv_in, stage.unet.network.class_embedding):
        assert all(float(p.grad.abs().max()) > 0 for p in part.parameters())


def test_bits_per_dimension_of_an_upsampler_of_pixels(made: Path, tmp_path: Path) -> None:
    """Validation gives the U-Net the small image, too. The estimate is that of the function with this condition."""
    shape = {"block_out_channels": (16, 32), "in_channels": 3, "out_channels": 3, "sample_size": 32}
    tiny.networks((16, 16), unet={**tiny.TWO_LEVELS, **shape}).unet.save_pretrained(tmp_path)
    stage = awake(UNetStage(config(made, vae="pixels", init=tmp_path, bits_per_dimension=4)))
    with torch.no_grad():
        found = stage.validate(0)["bits_per_dimension"]
        row = stage.latents.validation(0)
        batch = stage._held_out({"pixels": row["pixels"][None], "posterior_eps": torch.zeros(1, 3, 32, 32)}, 0)
        cond = sdkit.guidance.Conditioning(
            stage.text(row["ids"]).flatten(0, 1)[None], concat=batch["concat"], label=batch["label"]
        )
        assert batch["label"].tolist() == [20]
        predict = sdkit.guidance.guided(stage.unet, stage.schedule, cond, scale=1)
        expected = sdkit.metrics.bits_per_dimension(predict, row["pixels"][None], stage.schedule, timesteps=4)
    assert len(stage.latents.held_out) == 1
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_levels_are_uniform_and_depend_on_the_sample_alone(made: Path) -> None:
    stage = UNetStage(config(made, noise_augmentation=9))
    batch = stage.batch([(n, n % 7) for n in range(400)])
    counts = torch.bincount(batch["label"], minlength=10)
    assert counts.shape == (10,)  # from 0 up to 9
    assert counts.min() > 20  # 40 are expected
    alone = stage.batch([(123, 123 % 7)])
    for name in ("label", "concat", "eps"):
        assert torch.equal(alone[name][0], batch[name][123])
    none = UNetStage(config(made, noise_augmentation=0)).batch(BATCH)
    low = none["pixels"].unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5))
    assert none["label"].tolist() == [0] * 4
    assert float((none["concat"] - low).std()) == pytest.approx(0.01, rel=0.2)  # level 0 has a beta of 1e-4


def test_a_cache_gives_the_losses_of_images(made: Path) -> None:
    straight, cached = (awake(UNetStage(config(made, data=made / data))) for data in ("photos", "cache"))
    for samples in (BATCH, [(n, n % 22) for n in range(20, 26)]):
        one, other = straight.batch(samples), cached.batch(samples)
        assert torch.equal(one["label"], other["label"])
        torch.testing.assert_close(one["concat"], other["concat"], atol=1e-3, rtol=0)  # stored in float16
        expected, _ = straight.loss({"unet": straight.denoiser}, one, 0)
        found, _ = cached.loss({"unet": cached.denoiser}, other, 0)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = train_unet(config(made, out_dir=made / "run", evaluate=("lpips",), validation_prompts=("a red disc",)))
    torch.set_num_threads(threads)
    return out


GOLDEN = [1.104927, 0.8875, 1.034209, 0.970596, 0.745541]


def test_golden_losses(run: Path) -> None:
    """Losses in float32 on one thread, to 1e-3. A change in these numbers is a change in what is learned."""
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert losses == pytest.approx(GOLDEN, rel=1e-3)


def test_the_result_enlarges_and_trains_further(made: Path, run: Path) -> None:
    sd = sdkit.StableDiffusion.from_pretrained(run / "result", dtype="fp32", device="cpu")
    assert (sd.unet.condition, sd.upscale_factor) == ("low_res", 8)
    assert sd.low_res_schedule.alphas_cumprod[0] == pytest.approx(1 - 1e-4)
    theirs = UNet2DConditionModel.from_pretrained(run / "result" / "unet")
    assert (theirs.config.in_channels, theirs.config.class_embed_type) == (7, "timestep")
    assert float(theirs.class_embedding.linear_2.weight.detach().abs().max()) > 0  # trained
    small = torch.rand(1, 3, 4, 4) * 2 - 1
    (image,) = sd("a red disc", condition=small, num_inference_steps=2)
    assert image.size == (32, 32)
    cascade = sdkit.Cascade([sdkit.StableDiffusion.from_pretrained(made / "model", device="cpu"), sd])
    (image,) = cascade("a red disc", num_inference_steps=1, options=[{"height": 8, "width": 8}, {}])
    assert image.size == (64, 64)
    assert len([*(run / "samples").iterdir()]) == 2
    assert "validation/lpips" in [*read_metrics(run / "metrics.jsonl")][-1]
    again = UNetStage(config(made, model=run / "result", upscale_factor=None))
    assert again.upsampling is not None
    assert again.upsampling.factor == 8
    UNetStage(config(made, model=run / "result", upscale_factor=8, lora_rank=2))


def test_command_line(run: Path, tmp_path: Path) -> None:
    from sdkit.cli import main

    sdkit.images.to_pil(torch.rand(1, 3, 4, 6) * 2 - 1)[0].save(tmp_path / "small.png")
    arguments = ["generate", "a red disc", "--model", run / "result", "--condition", tmp_path / "small.png"]
    assert main([str(one) for one in [*arguments, "--steps", 2, "--out", tmp_path / "large.png"]]) == 0
    assert sdkit.images.read(tmp_path / "large.png").size == (48, 32)
    assert main(["generate", "--from", str(tmp_path / "large.png"), "--out", str(tmp_path / "again.png")]) == 0
    one, other = (np.asarray(sdkit.images.read(tmp_path / name)) for name in ("large.png", "again.png"))
    assert np.array_equal(one, other)


BAD: list[tuple[dict[str, Any], type[sdkit.SdkitError], str]] = [
    ({"upscale_factor": 1}, ArgumentError, "upscale_factor must be a whole number from 2 to 64, not 1"),
    ({"upscale_factor": 4}, ArgumentError, "upscale_factor 4 must be a multiple of 8, this VAE's pixels for each"),
    ({"upscale_factor": 64}, ArgumentError, "size 32 x 32 must divide by upscale_factor, 64; change one of them"),
    ({"noise_augmentation": -1}, ArgumentError, "noise_augmentation must be a whole number of at least 0, not -1"),
    ({"noise_augmentation": 1000}, ArgumentError, "noise_augmentation must be below 1000, the noise levels"),
    ({"condition_dropout": 0.2}, ArgumentError, "condition_dropout is not for an upsampler"),
    ({"model": "./run/result", "upscale_factor": None, "condition_dropout": 0.2}, ArgumentError,
     "condition_dropout is not for an upsampler"),
    ({"upscale_factor": None, "noise_augmentation": 9}, ArgumentError, "noise_augmentation belongs to an upsampler"),
    ({"init": "./learned.json", "vae": "pixels", "loss": "hybrid"}, ArgumentError, "predicts no variance of its own"),
    ({"upscale_factor": None, "classes": ("a", "b")}, ArgumentError, "classes are of a UNet2DModel with"),
    ({"upscale_factor": None, "init": "./labelled.json"}, ArgumentError, "takes more than text, labels or other"),
    ({"condition_column": "a"}, ArgumentError, "is made of the image itself; leave condition_column out"),
    ({"conditioning_data": "a"}, ArgumentError, "is made of the image itself; leave conditioning_data out"),
    ({"lora_rank": 2}, ArgumentError, "a LoRA cannot train the new input channels of an upsampler"),
    ({"init": "./plain.json", "vae": "pixels"}, ArgumentError, "an upsampler reads captions, and a UNet2DModel none"),
    ({"data": "./plain cache"}, CacheError, "does not hold the small images that an upsampler reads"),
    ({"data": "./cache", "upscale_factor": 16}, CacheError, "cannot hold images 16 times smaller"),
    ({"model": "./run/result", "upscale_factor": 16}, ArgumentError, "this upsampler enlarges 8 times, not 16"),
    ({"model": "./run/result", "upscale_factor": None, "conditioning_data": "./photos"}, ArgumentError,
     "is made of the image itself; leave condition_column out"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "fragment"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(
    made: Path, run: Path, change: dict[str, Any], kind: type[sdkit.SdkitError], fragment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(made)
    one_sentence(lambda: UNetStage(config(made, **change)), kind, fragment)
