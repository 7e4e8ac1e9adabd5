"""Time and memory of sdkit on a GPU beside diffusers, with random weights in the shape of Stable Diffusion 1.5.

Sides: `sdkit`, with its defaults; `diffusers`, as its users write it: float16 and nothing else; `tuned`, diffusers in
bfloat16 with channels_last. In the measurements named `compiled`, sdkit and `tuned` run through torch.compile. The
sides take turns within one process, and the medians of their times are compared. Each measurement is a function of a
`Place` that returns numbers: seconds by side, their ratios to sdkit's, peak memory in bytes, and the share of the
card's bfloat16 peak. `benchmarks/gpu.py` runs them.
"""

from __future__ import annotations

import contextlib
import io
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sdkit
from benchmarks.gpu_checks import Place
from sdkit.engines.device import release_memory
from sdkit.training.run_folder import read_metrics

Json = dict[str, Any]
Measure = Callable[[Place], Json]

PROMPT = "a photo of an astronaut riding a horse on mars"
TURNS = 3
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 multiply-adds a second, times two, from NVIDIA's data sheets, by a part of the card's name."""


def machine(device: torch.device) -> Json:
    """Names and versions that the numbers depend on."""
    import diffusers

    facts = {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    return facts | {"diffusers": diffusers.__version__, "sdkit": sdkit.__version__}


def limit_memory(device: torch.device, bytes_: float) -> None:
    """Let this process use at most so many bytes of a GPU's memory. More raises torch.OutOfMemoryError."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, bytes_ / total), device)


def is_well(device: torch.device) -> bool:
    """Return whether the device still computes. After some errors, every further call of a process fails."""
    try:
        release_memory(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def summary(numbers: Json) -> str:
    """The numbers of a measurement in a line."""
    parts = []
    for side, seconds in numbers.get("seconds", {}).items():
        ratio = f", {numbers['ratios'][side]:.2f} x sdkit's" if side in numbers.get("ratios", {}) else ""
        peak = numbers.get("peak_bytes", {}).get(side)
        parts.append(f"{side} {seconds:.3f} s{ratio}" + (f", {peak / 1e9:.2f} GB" if peak else ""))
    if numbers.get("share_of_peak"):
        parts.append(f"{numbers['share_of_peak']:.0%} of the card's bf16 peak")
    return "; ".join([*parts, *numbers.get("notes", [])])


def draw(place: Place, images: int, compiled: bool) -> Json:
    """Text to images: 512 px, 30 DDIM steps, guidance 7.5. Seconds are those of all images together."""
    size, steps = (64, 2) if place.tiny else (512, 30)
    folder = model_folder(place)
    options: Json = {
        "num_inference_steps": steps, "num_images_per_prompt": images, "guidance_scale": 7.5, "height": size,
        "width": size,
    }  # fmt: skip
    sd = sdkit.StableDiffusion.from_pretrained(folder, dtype="bf16", device=place.device, compile=compiled)
    tuned = _diffusers(folder, torch.bfloat16, place, channels_last=True)
    sides: dict[str, Callable[[], Any]] = {"sdkit": partial(sd, PROMPT, **options, batch_size=images)}
    if compiled:
        tuned.unet.compile()
        tuned.vae.decoder.compile()
    else:
        as_written = _diffusers(folder, torch.float16, place, channels_last=False)
        sides["diffusers"] = partial(as_written, PROMPT, **options)
    sides["tuned"] = partial(tuned, PROMPT, **options)
    numbers = compare(sides, place)
    flops = steps * _flops(sd, 2 * images, size)
    return numbers | _share(flops, numbers["seconds"]["sdkit"], place)


def vae(place: Place, size: int, count: int) -> Json:
    """Encode and decode `count` images of `size` pixels: seconds of both."""
    size = 128 if place.tiny else size
    folder = model_folder(place)
    ours = sdkit.VAE.from_pretrained(folder, dtype="bf16", device=place.device)
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sides: dict[str, Callable[[], Any]] = {
        "sdkit": lambda: ours.decode(ours.encode(pixels, sample=False), output_type="pt")
    }
    for name, dtype, channels_last in (("diffusers", torch.float16, False), ("tuned", torch.bfloat16, True)):
        sides[name] = partial(_there_and_back, _diffusers(folder, dtype, place, channels_last).vae, pixels, place)
    return compare(sides, place)


@torch.no_grad()
def _there_and_back(network: Any, pixels: Tensor, place: Place) -> Tensor:
    latents = network.encode(pixels.to(place.device, network.dtype)).latent_dist.mode()
    decoded: Tensor = network.decode(latents).sample.float().cpu()
    return decoded


def train_unet(place: Place) -> Json:
    """A training step of the whole U-Net in bfloat16, from a cache, beside diffusers' script."""
    from benchmarks import training

    training.DEVICE = place.device
    batch, size = (1, 64) if place.tiny else (4, 512)  # both sides' weights and optimizers already take 28 GB
    photos = _pictures(place.scratch / "photos", 16, size)
    with contextlib.redirect_stdout(io.StringIO()):
        times = training.steps(
            place.scratch, model_folder(place), photos, size, batch, "bf16", 2 if place.tiny else 8, bare=False
        )
    seconds = {side: median(values) for side, values in times.items()}
    numbers: Json = {"seconds": seconds, "ratios": _ratios(times), "peak_bytes": {}}
    sd = sdkit.StableDiffusion.from_pretrained(model_folder(place), dtype="bf16", device=place.device)
    return numbers | _share(3 * _flops(sd, batch, size), seconds["sdkit"], place)  # backward costs twice the forward


def train(place: Place, stage: str, **settings: Any) -> Json:
    """A training step of sdkit alone: its median time, and the peak of memory."""
    from sdkit.data import cache
    from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae

    steps, size = (4, 64) if place.tiny else (12, 512)
    photos = _pictures(place.scratch / "photos", 16, size)
    values: Json = {
        "model": model_folder(place), "out_dir": place.scratch / "run", "size": size, "max_steps": steps,
        "batch_size": 1 if place.tiny else 8, "mixed_precision": "bf16", "ema_decay": 0, "save_every": 10**6,
        "validate_every": 10**6,
    } | settings  # fmt: skip
    _reset_peak(place)
    with contextlib.redirect_stderr(io.StringIO()):
        if stage == "vae":
            run = train_vae(VAEConfig(data=photos, lpips_weight=0, **values))
        else:
            latents = cache(model_folder(place), photos, place.scratch / "cache", size=size, embeddings=True)
            _reset_peak(place)
            run = train_unet(UNetConfig(data=latents, **values))
    seconds = [row["seconds"] for row in read_metrics(run / "metrics.jsonl") if "seconds" in row]
    return {"seconds": {"sdkit": median(seconds[2:])}, "peak_bytes": {"sdkit": _peak(place)}}


def least_memory_to_draw(place: Place) -> Json:
    """Draw one image of 512 px with every part but the working one in the CPU's memory. Asked: 3 GB."""
    size, steps = (64, 2) if place.tiny else (512, 30)
    sd = sdkit.StableDiffusion.from_pretrained(model_folder(place), dtype="fp16", device=place.device, offload=True)
    _reset_peak(place)
    seconds, _ = timed(partial(sd, PROMPT, num_inference_steps=steps, height=size, width=size), place)
    return _within(3e9, {"seconds": {"sdkit": seconds}, "peak_bytes": {"sdkit": _peak(place)}})


def least_memory_to_train(place: Place) -> Json:
    """Train a LoRA of rank 4 with gradient checkpointing, and 8-bit AdamW where it is installed. Asked: 6 GB."""
    try:
        import bitsandbytes  # noqa: F401

        eight = True
    except ImportError:
        eight = False
    numbers = train(
        place, "unet", lora_rank=4, gradient_checkpointing=True, use_8bit_adam=eight, batch_size=1,
    )  # fmt: skip
    return _within(6e9, numbers)


MEASUREMENTS: dict[str, Measure] = {
    "draw-1": partial(draw, images=1, compiled=False),
    "train-unet": train_unet,
    "train-lora": partial(train, stage="unet", lora_rank=16),
    "train-vae": partial(train, stage="vae", batch_size=2),
    "least-memory-draw": least_memory_to_draw,
    "least-memory-lora": least_memory_to_train,
    "vae-512": partial(vae, size=512, count=4),
    "vae-2048": partial(vae, size=2048, count=1),
    "draw-8": partial(draw, images=8, compiled=False),
    "draw-1-compiled": partial(draw, images=1, compiled=True),
    "draw-8-compiled": partial(draw, images=8, compiled=True),
}
"""Measurements by name, in the order in which they run."""


def model_folder(place: Place) -> Path:
    """The folder of a model of SD 1.5's shape with random weights, which is made once for all steps."""
    from benchmarks.training import make_model

    folder = place.scratch.parent / "sd15"
    if not (folder / "scheduler").exists():  # saved last
        make_model(folder, 0.1 if place.tiny else 1)
    return folder


def compare(sides: dict[str, Callable[[], Any]], place: Place) -> Json:
    """Run each side once to warm up, then all in turns. Returns medians, ratios within turns, and peaks of memory."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, int | None] = {}
    for turn in range(TURNS + 1):
        for side, run in sides.items():
            before = _reset_peak(place)
            seconds, _ = timed(run, place)
            if turn:  # the first warms up
                times[side].append(seconds)
                peak = _peak(place)
                peaks[side] = None if peak is None else peak - before
    notes = ["peaks are those above the weights of all sides"] if place.device.type == "cuda" else []
    return {
        "seconds": {side: median(values) for side, values in times.items()},
        "ratios": _ratios(times), "peak_bytes": peaks, "times": times, "notes": notes,
    }  # fmt: skip


def timed(run: Callable[[], Any], place: Place) -> tuple[float, Any]:
    """Seconds until the device has done all of `run()`, and what that returned."""
    _synchronize(place)
    began = time.perf_counter()
    result = run()
    _synchronize(place)
    return time.perf_counter() - began, result


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Each other side's time, divided by sdkit's in the same turn: the median over the turns."""
    ours = times["sdkit"]
    others = {side: values for side, values in times.items() if side != "sdkit"}
    return {side: median(b / a for a, b in zip(ours, values, strict=False)) for side, values in others.items()}


def _diffusers(folder: Path, dtype: torch.dtype, place: Place, channels_last: bool) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(place.device)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def _pictures(folder: Path, n: int, size: int) -> Path:
    from PIL import Image

    folder.mkdir()
    noise = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, pixels in enumerate(torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)):
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text("clouds of colour")
    return folder


def _flops(sd: sdkit.StableDiffusion, rows: int, size: int) -> int:
    """Floating-point operations of one pass of the U-Net over `rows` latents."""
    x = torch.zeros(rows, 4, size // 8, size // 8, device=sd.unet.device, dtype=sd.unet.dtype)
    cond = x.new_zeros(rows, 77, sd.unet.width)
    stance = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), stance, FlopCounterMode(display=False) as counter:
        sd.unet.network(x, torch.tensor([1], device=x.device), cond)
    return counter.get_total_flops()


def _share(flops: int, seconds: float, place: Place) -> Json:
    """The share of the card's bfloat16 peak, where the peak is known."""
    if place.device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(place.device)
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    return {"flops": flops} if peak is None else {"flops": flops, "share_of_peak": flops / seconds / peak}


def _within(limit: float, numbers: Json) -> Json:
    peak = numbers["peak_bytes"]["sdkit"]
    if peak is None:
        return numbers
    return numbers | {"notes": [f"{'within' if peak <= limit else 'ABOVE'} the {limit / 1e9:.0f} GB asked for"]}


def _reset_peak(place: Place) -> int:
    """Begin to measure the peak of memory. Returns the bytes that are in use now."""
    if place.device.type != "cuda":
        return 0
    release_memory(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    return torch.cuda.memory_allocated(place.device)


def _peak(place: Place) -> int | None:
    return torch.cuda.max_memory_allocated(place.device) if place.device.type == "cuda" else None


def _synchronize(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
