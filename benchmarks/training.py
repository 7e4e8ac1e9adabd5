"""Compare training steps of sdkit with those of diffusers' example script, and the cache with a naive loop.

    python benchmarks/training.py                       # all parts, about ten minutes on two CPU cores
    python benchmarks/training.py --parts step --width 1 --batch-size 8 --precision bf16     # on a GPU

Parts: `step`, U-Net fine-tuning at the shape of SD 1.5, by default at half its width; `overhead`, the same with the
embedded model, on which steps are so short that the cost of the loop shows; `cache`, encoding a folder of photos.

In `step` and `overhead` three sides take turns within one process, step by step, so that other load on the computer
affects all of them alike:
- sdkit's whole `train_unet` from a cache, including loading, logging, and clipping;
- the step of diffusers' train_text_to_image.py, including VAE and text encoder;
- forward, backward, and optimizer alone.
All use the same networks, batch, and precision, without EMA. AdamW is PyTorch's default in the script, and fused in the
bare step. The results are medians of the ratios within turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import sdkit.data
from sdkit.loading.source import Source
from sdkit.training import UNetConfig
from sdkit.training.loop import fit
from sdkit.training.stages.unet import UNetStage

ASSETS = Path(__file__).resolve().parent.parent / "sdkit" / "assets"
PARTS = ("step", "overhead", "cache")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP = 2  # first turns, which are not counted
Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare sdkit's training with diffusers' example script.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument(
        "--turns",
        type=int,
        default=8,
        help="steps of each side; overhead takes ten times as many (default: %(default)s)",
    )
    parser.add_argument(
        "--width",
        type=float,
        default=0.5,
        help="width of the networks as a fraction of SD 1.5's (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=512, help="side in pixels, for step (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="batch size of step; overhead uses 8 (default: %(default)s)"
    )
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=24, help="number of images for cache (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {args.precision}\n")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if "step" in args.parts:
            model = make_model(root / "sd15", args.width)
            batch = args.batch_size
            photos = make_photos(root / "photos", 4 * batch, args.size)
            results["step"] = steps(root / "step", model, photos, args.size, batch, args.precision, args.turns)
            show(f"SD 1.5 x {args.width:g}, {args.size} px, batch {batch}", results["step"], batch)
        if "overhead" in args.parts:
            turns = 10 * args.turns
            photos = make_photos(root / "small-photos", 32, 128)
            results["overhead"] = steps(root / "overhead", ASSETS / "emoji", photos, 128, 8, args.precision, turns)
            show("embedded model, 128 px, batch 8", results["overhead"], 8)
        if "cache" in args.parts:
            results["cache"] = caching(root, args.images)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def steps(
    root: Path, model: Path, photos: Path, size: int, batch_size: int, precision: str, turns: int, *, bare: bool = True
) -> Times:
    """Return the seconds that each step of each side took. Without `bare`, that side is left out."""
    with contextlib.redirect_stderr(io.StringIO()):
        cache = sdkit.data.cache(model, photos, root / "cache", size=size, embeddings=True)
    config = UNetConfig(
        model=model, data=cache, out_dir=root / "run", max_steps=turns + WARM_UP + 1, batch_size=batch_size,
        mixed_precision=precision, ema_decay=0, save_every=10**6, validate_every=10**6, caption_dropout=0,
    )  # fmt: skip
    others = {"diffusers": Script(model, size, batch_size, precision)}
    if bare:
        others["bare"] = Script(model, size, batch_size, precision, network=others["diffusers"])
    stage = TakingTurns(config, others)
    with contextlib.suppress(StopIteration):
        fit(stage, config, Path(config.out_dir))
    return {side: seconds[WARM_UP:] for side, seconds in stage.times.items()}


class TakingTurns(UNetStage):
    """A U-Net stage that stops sdkit's clock at each call of the loss, and lets the other sides do one step each.

    A step of sdkit is thus measured from one call of the loss to the next, and includes the whole loop.
    """

    def __init__(self, config: UNetConfig, others: Mapping[str, Script]) -> None:
        super().__init__(config)
        self.others, self.times = others, {side: list[float]() for side in ("sdkit", *others)}
        self.began: float | None = None

    def validate(self, step: int) -> dict[str, float]:  # noqa: ARG002
        return {}

    def export(self, folder: Path) -> None: ...

    def loss(self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int) -> Any:
        if self.began is not None:
            self.times["sdkit"].append(now() - self.began)
            for side, other in self.others.items():
                began = now()
                other.bare_step() if side == "bare" else other.step()
                self.times[side].append(now() - began)
        self.began = now()
        return super().loss(networks, batch, step)


class Script:
    """The training step of diffusers' examples/text_to_image/train_text_to_image.py: frozen VAE and text encoder in the
    precision of the run, the U-Net in float32 under autocast."""

    def __init__(
        self, model: Path, size: int, batch_size: int, precision: str, *, network: Script | None = None
    ) -> None:
        from diffusers import DDPMScheduler

        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        torch.manual_seed(0)
        if network is not None:  # share the U-Net: two copies may not fit into memory
            self.__dict__ |= network.__dict__
            self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-5, fused=True)  # PyTorch's fastest AdamW
            return
        source = Source.open(model)
        self.vae = source.autoencoder(self.dtype).to(DEVICE).requires_grad_(False)
        text, tokenizer = source.text_encoder(self.dtype)
        self.text, self.unet = text.to(DEVICE).requires_grad_(False), source.denoiser().to(DEVICE).train()
        self.scheduler = DDPMScheduler.from_config(source.scheduler_config())
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-5)  # as in the script
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
        self.pixels = torch.rand(batch_size, 3, size, size).mul(2).sub(1)
        length = min(tokenizer.model_max_length, text.config.max_position_embeddings)
        captions = ["a photo"] * batch_size
        self.ids = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
        self.x_t = torch.randn(batch_size, 4, size // 8, size // 8, device=DEVICE)
        self.t = torch.randint(0, 1000, (batch_size,), device=DEVICE)
        self.cond = torch.randn(batch_size, length, text.config.hidden_size, device=DEVICE)
        self.target = torch.randn_like(self.x_t)

    def step(self) -> None:
        pixels = self.pixels.to(DEVICE)
        with torch.no_grad():
            latents = self.vae.encode(pixels.to(self.dtype)).latent_dist.sample() * self.vae.config.scaling_factor
            cond = self.text(self.ids.to(DEVICE)).last_hidden_state
        noise = torch.randn_like(latents)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=DEVICE).long()
        noisy = self.scheduler.add_noise(latents, noise, t)
        kind = self.scheduler.config.prediction_type
        target = noise if kind == "epsilon" else self.scheduler.get_velocity(latents, noise, t)
        self._update(noisy, t, cond, target, max_norm=1.0)

    def bare_step(self) -> None:
        self._update(self.x_t, self.t, self.cond, self.target, max_norm=None)

    def _update(self, x_t: Tensor, t: Tensor, cond: Tensor, target: Tensor, max_norm: float | None) -> None:
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(x_t, t, cond, return_dict=False)[0]
        self.scaler.scale(F.mse_loss(output.float(), target.float())).backward()
        if max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def caching(root: Path, n: int) -> dict[str, Any]:
    """Time the encoding of a folder at 256 px with the embedded VAE: by sdkit, and one by one in float32."""
    folder = make_photos(root / "folder", n, 512)

    def naive() -> None:
        source = Source.open("emoji")
        vae = source.autoencoder().to(DEVICE)
        _, tokenizer = source.text_encoder()
        for path in sorted(folder.glob("*.png")):
            image = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
            x = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float().to(DEVICE) / 127.5 - 1
            with torch.no_grad():
                posterior = vae.encode(x).latent_dist
            ids = tokenizer(path.with_suffix(".txt").read_text()).input_ids
            torch.save((posterior.mean.cpu(), posterior.logvar.cpu(), ids), root / f"{path.stem}.pt")

    seconds: Times = {"sdkit": [], "naive": []}
    for turn in range(4):
        with contextlib.redirect_stderr(io.StringIO()):
            ours = timed(partial(sdkit.data.cache, "emoji", folder, root / f"cache-{turn}", size=256))
        theirs = timed(naive)
        if turn:  # the first turn is a warm-up
            seconds["sdkit"].append(ours), seconds["naive"].append(theirs)
    ratios = [theirs / ours for ours, theirs in zip(seconds["sdkit"], seconds["naive"], strict=True)]
    print(f"cache, {n} photos at 256 px, embedded VAE")
    rates = {side: n / median(taken) for side, taken in seconds.items()}
    print(f"  sdkit {rates['sdkit']:.1f} images/s, one by one in float32 {rates['naive']:.1f}")
    print(f"  {median(ratios):.2f} times as fast ({min(ratios):.2f} - {max(ratios):.2f})")
    return {**seconds}


def show(title: str, times: Times, batch_size: int) -> None:
    print(f"training, {title}")
    for side, seconds in times.items():
        print(f"  {side:9} {median(seconds):8.3f} s/step {batch_size / median(seconds):8.2f} images/s")
    ours = np.array(times["sdkit"])
    for side in ("diffusers", "bare"):
        ratios = np.array(times[side]) / ours
        quarter, half, three = np.percentile(ratios, [25, 50, 75])
        print(f"  rate of sdkit / {side}: {half:.3f} (quartiles {quarter:.3f} - {three:.3f})")
    print(flush=True)


def make_model(folder: Path, width: float) -> Path:
    """Write a pipeline's folder with the SD 1.5 architecture, every width scaled by `width`, and random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def narrow(value: int, unit: int) -> int:
        return max(1, round(value * width / unit)) * unit

    def scaled(config: Any, *keys: str) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for key in keys:
            value, unit = config[key], 1 if key == "num_attention_heads" else 32  # GroupNorm has 32 groups
            changed[key] = [narrow(v, unit) for v in value] if isinstance(value, (list, tuple)) else narrow(value, unit)
        return {**config} | changed

    torch.manual_seed(0)
    unet = UNet2DConditionModel.load_config(str(ASSETS / "sd1" / "unet"))
    vae = AutoencoderKL.load_config(str(ASSETS / "sd1" / "vae"))
    text = json.loads((ASSETS / "sd1" / "text_encoder" / "config.json").read_text())
    UNet2DConditionModel.from_config(scaled(unet, "block_out_channels", "cross_attention_dim")).save_pretrained(
        folder / "unet"
    )
    AutoencoderKL.from_config(scaled(vae, "block_out_channels")).save_pretrained(folder / "vae")
    heads = scaled(text, "hidden_size", "intermediate_size", "num_attention_heads")
    CLIPTextModel(CLIPTextConfig(**heads)).save_pretrained(folder / "text_encoder")
    CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer", model_max_length=77).save_pretrained(folder / "tokenizer")
    DDIMScheduler.from_pretrained(ASSETS / "sd1" / "scheduler").save_pretrained(folder / "scheduler")
    return folder


def make_photos(folder: Path, n: int, size: int) -> Path:
    """Write n crops of scikit-image's photos, with captions."""
    from skimage import data as photos

    folder.mkdir(parents=True)
    sources = [Image.fromarray(getattr(photos, name)()) for name in ("astronaut", "coffee", "chelsea")]
    rng = np.random.default_rng(0)
    for i in range(n):
        source = sources[i % len(sources)]
        side = min(source.size) - int(rng.integers(0, 60))
        left, top = (int(rng.integers(0, room - side + 1)) for room in source.size)
        source.crop((left, top, left + side, top + side)).resize((size, size)).save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text("a photo")
    return folder


def timed(run: Callable[[], object]) -> float:
    began = now()
    run()
    return now() - began


def now() -> float:
    """Return the time in seconds, after a GPU has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
