"""Training teaches: fine-tuned models draw, reconstruct, and remember, and models trained from scratch learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.images import to_tensors
from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae
from sdkit.training.run_folder import read_metrics
from tests.helpers import shared_data, tiny

SIDE = 128
NEW = ("a zork", "a blick", "a frum", "a dwop")  # words that the embedded model has not been trained on
OLD = (
    "a large 3d red apple on a yellow background", "a large 3d star on a purple background",
    "a large 3d blue heart on a white background", "a large 3d evergreen tree on a pink background",
    "a large 3d cat on a red background", "a large 3d pizza on a turquoise background",
)  # fmt: skip
OTHERS = (
    "a large 3d red car on a white background", "a large 3d sun on a blue background",
    "a large 3d dog on a yellow background", "a large 3d house on a green background",
    "a large 3d fish on a pink background", "a large 3d frog on a black background",
    "a large flat tulip on a gray background", "a large noto tangerine on a blue background",
    "a large twemoji full moon on a purple background", "a small hamburger on the left of an orange background",
    "a small bird at the top of a white background", "a rose and a lemon on a black background",
)  # fmt: skip
"""Pictures of the model itself, of all its styles and sizes."""
COMMON: dict[str, Any] = {"lr_scheduler": "cosine", "save_every": 10**4, "validate_every": 10**4}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def drawings() -> list[Image.Image]:
    """Draw a checkerboard, rings, stripes, and a cross, each 128 x 128 pixels."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    masks = (
        (x // 16 + y // 16) % 2 == 0,
        np.hypot(x - 63.5, y - 63.5) // 10 % 2 == 0,
        (x + y) // 14 % 2 == 0,
        (abs(x - 63.5) < 14) | (abs(y - 63.5) < 14),
    )
    colours = (((200, 30, 30), 250), ((30, 60, 200), 250), ((20, 140, 50), 250), ((120, 40, 160), 250))
    return [
        Image.fromarray(np.where(mask[..., None], colour, ground).astype(np.uint8))
        for mask, (colour, ground) in zip(masks, colours, strict=True)
    ]


def draw(sd: sdkit.StableDiffusion, prompts: tuple[str, ...]) -> Tensor:
    images: Tensor = sd(list(prompts), num_inference_steps=20, guidance_scale=4, seed=7, output_type="pt")
    return images


def nearest(images: Tensor, among: Tensor) -> list[int]:
    """Return for each image (N, 3, H, W) the index of the image of `among` with the least squared difference."""
    return torch.cdist(images.flatten(1), among.flatten(1)).argmin(1).tolist()


def test_lora_learns_new_words_and_keeps_old_ones(tmp_path: Path) -> None:
    """Learn invented names for four drawings, with twelve pictures of the model itself as prior preservation
    (DreamBooth, Ruiz et al. 2022). Each name must then draw its drawing, and other prompts what they drew before.
    """
    folder = tmp_path / "drawings"
    folder.mkdir()
    sd = sdkit.StableDiffusion.from_pretrained("emoji")
    before = draw(sd, NEW + OLD)
    own = list(zip(OTHERS, sd(list(OTHERS), num_inference_steps=20, guidance_scale=4, seed=100), strict=True))
    for i, (caption, image) in enumerate(3 * list(zip(NEW, drawings(), strict=True)) + own):
        image.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption)
    config = UNetConfig(
        data=folder, out_dir=tmp_path / "run", lora_rank=16, learning_rate=2e-3, max_steps=250, batch_size=8,
        lora_targets=("attention", "feed_forward", "convolutions"), ema_decay=0, save_every=1000, validate_every=1000,
        lr_scheduler="cosine",
    )  # fmt: skip
    sd.load_lora(train_unet(config) / "result")
    after = draw(sd, NEW + OLD)
    sdkit.images.grid([*before, *after], columns=len(NEW + OLD)).save(tmp_path / "before-and-after.png")
    known = torch.cat([torch.stack(to_tensors(drawings())), before[len(NEW) :]])
    assert nearest(after, known) == list(range(len(NEW + OLD)))
    assert nearest(before[: len(NEW)], known) != [0, 1, 2, 3]  # the model could not draw them before


def crops(folder: Path, names: tuple[str, ...], n: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        photo = Image.fromarray(getattr(skimage.data, names[i % len(names)])())
        left, top = (int(rng.integers(0, room - 160)) for room in photo.size)
        photo.crop((left, top, left + 160, top + 160)).save(folder / f"{i:03}.png")
    return folder


def test_a_decoder_tuned_on_textures_gains_on_another(tmp_path: Path) -> None:
    """The embedded VAE has seen few textures. After its decoder is tuned on grass and gravel, PSNR on bricks must rise
    by 1 dB and LPIPS fall by 0.05, although LPIPS is not in the loss.
    """
    config = VAEConfig(
        data=crops(tmp_path / "train", ("grass", "gravel"), 96), out_dir=tmp_path / "run", size=64,
        validation_data=crops(tmp_path / "held-out", ("brick",), 12), augment=("crop", "flip"), max_steps=80,
        batch_size=8, learning_rate=1e-4, lpips=shared_data.lpips_weights(), lpips_weight=0, ema_decay=0.9, **COMMON,
    )  # fmt: skip
    run = train_vae(config)
    first, last = (line for line in read_metrics(run / "metrics.jsonl") if "validation/psnr" in line)
    assert last["validation/psnr"] > first["validation/psnr"] + 1
    assert last["validation/lpips"] < first["validation/lpips"] - 0.05


def test_a_decoder_learns_to_forgive_noise_on_its_latents(tmp_path: Path) -> None:
    """The control is the same run without noise. Its decoder is better at clean latents, and worse at noisy ones."""
    held_out, spread, found = crops(tmp_path / "held-out", ("brick",), 12), 0.4, {}
    data = crops(tmp_path / "train", ("grass", "gravel"), 96)
    for noise in (spread, 0.0):
        settings: dict[str, Any] = {
            "data": data, "validation_data": held_out, "size": 64, "batch_size": 8, "learning_rate": 1e-4,
            "lpips_weight": 0, "ema_decay": 0.0, **COMMON,
        }  # fmt: skip
        run = train_vae(VAEConfig(out_dir=tmp_path / f"{noise}", max_steps=80, latent_noise=noise, **settings))
        judged = VAEConfig(
            model=run / "result", out_dir=tmp_path / f"judged-{noise}", max_steps=1, latent_noise=spread, **settings
        )
        first = read_metrics(train_vae(judged) / "metrics.jsonl")[0]
        found[noise] = first["validation/psnr"], first["validation/noisy_psnr"]
    assert found[spread][0] < found[0.0][0]
    assert found[spread][1] > found[0.0][1] + 1


def test_a_vae_and_a_unet_learn_from_nothing(tmp_path: Path) -> None:
    """Train on discs of four colours. The VAE must exceed 22 dB, the U-Net's validation loss (v) fall below 0.35, and a
    prompt draw its colour. One thread is used, because the networks are too small for more.
    """
    torch.set_num_threads(1)
    model, data = tiny.model(tmp_path / "model"), tiny.photos(tmp_path / "discs", 256)
    shape = json.loads((model / "vae" / "config.json").read_text()) | {"block_out_channels": [16, 32, 32, 32]}
    (model / "vae" / "config.json").write_text(json.dumps(shape))
    vae = train_vae(
        VAEConfig(
            init=model / "vae", data=data, out_dir=tmp_path / "vae", learning_rate=5e-3, max_steps=1000, batch_size=16,
            lpips_weight=0, kl_weight=1e-4, ema_decay=0.98, **COMMON,
        )
    )  # fmt: skip
    assert validation(vae, "psnr") > 22
    for part in (vae / "result").iterdir():
        part.rename(model / "vae" / part.name)
    cache = sdkit.data.cache(model, data, tmp_path / "cache")
    run = train_unet(
        UNetConfig(
            model=model, init=model / "unet", data=cache, out_dir=tmp_path / "unet", learning_rate=2e-3, max_steps=1500,
            batch_size=32, train_text_encoder=True, prediction_type="v", ema_decay=0.99, **COMMON,
        )
    )  # fmt: skip
    assert validation(run, "loss") < 0.35
    sd = sdkit.StableDiffusion.from_pretrained(run / "result", dtype="fp32")
    colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (235, 205, 40)}
    # Two images of each learned caption.
    images = sd([f"a {name} disc" for name in colours] * 2, guidance_scale=1, output_type="np")
    sdkit.images.grid(list(images)).save(tmp_path / "discs.png")
    # Distance of each pixel from the background.
    far = torch.tensor(np.abs(images.astype(np.float32) - 245).sum(3).reshape(8, -1))
    pixels = torch.tensor(images.astype(np.float32).reshape(8, -1, 3))
    drawn = torch.stack([one[at.topk(60).indices].mean(0) for one, at in zip(pixels, far, strict=True)])
    assert nearest(drawn, torch.tensor(list(colours.values())).float()) == [0, 1, 2, 3] * 2


def validation(run: Path, key: str) -> float:
    """Return a measure of the last validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    value: float = [line[f"validation/{key}"] for line in lines if f"validation/{key}" in line][-1]
    return value
