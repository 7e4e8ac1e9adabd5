"""Checks that a GPU computes what the CPU computes: every public path, in each dtype, against the CPU's float32.

Each check is a function of a `Place`. It raises AssertionError where numbers differ by more than a stated tolerance,
and `NotRunError` where the machine lacks something. It returns a short sentence with what was measured.
`benchmarks/gpu.py` runs them; `pytest -m gpu` runs them one by one; the ordinary tests run them with the CPU in the
card's place.

Errors of latents and embeddings are root-mean-square errors, divided by the reference's standard deviation.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import sdkit
from sdkit.samplers import SAMPLERS
from sdkit.training.run_folder import read_metrics

DTYPES = ("fp32", "bf16", "fp16")
LATENTS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest error of latents and text embeddings."""
PSNR = {"fp32": 60.0, "bf16": 28.0, "fp16": 40.0}
"""Smallest PSNR in dB of decoded images."""
DRAWN = {"fp32": 45.0, "bf16": 22.0, "fp16": 30.0}
"""Smallest PSNR in dB of images drawn in eight steps: rounding errors add up over the steps. Prompts leave little open,
so that rounding does not lead to another picture."""
LOSSES = {"no": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Largest relative difference of the training losses of ten steps."""
PROMPTS = ("a large 3d red apple on a yellow background", "a large 3d blue circle on a white background")
STEPS = 8
EMBEDDED = Path(sdkit.__file__).parent / "assets" / "emoji"


@dataclass(frozen=True)
class Place:
    """Where to run a check.

    Attributes:
        device: The card, or the CPU that stands in for it in tests.
        scratch: An empty folder.
        steps: Training steps of each check.
        tiny: Whether to measure tiny networks in place of SD 1.5's shape.
    """

    device: torch.device
    scratch: Path
    steps: int = 10
    tiny: bool = False


class NotRunError(Exception):
    """The machine lacks what a check needs. The message says what."""


Check = Callable[[Place], str]


def encode(place: Place, dtype: str) -> str:
    reference = _vae("cpu", "fp32").encode(_photos(), seed=0)
    return _close(_vae(str(place.device), dtype).encode(_photos(), seed=0), reference, LATENTS[dtype])


def decode(place: Place, dtype: str) -> str:
    z = _vae("cpu", "fp32").encode(_photos(), sample=False)
    return _similar(_vae(str(place.device), dtype).decode(z), _vae("cpu", "fp32").decode(z), PSNR[dtype])


def tiles(place: Place, dtype: str) -> str:
    image = _photos(256)[0]
    ours, reference = (_vae(str(device), kind) for device, kind in ((place.device, dtype), ("cpu", "fp32")))
    z = reference.encode(image, sample=False, tile=128)
    said = _close(ours.encode(image, sample=False, tile=128), z, LATENTS[dtype])
    return f"{said}; {_similar(ours.decode(z, tile=128), reference.decode(z, tile=128), PSNR[dtype])}"


def overflow(place: Place) -> str:
    """A decoder that overflows in float16 is run again in float32, and is in float16 afterwards."""
    exact = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu")
    half = sdkit.VAE.from_pretrained("emoji", dtype="fp16", device=place.device)
    for vae in (exact, half):
        with torch.no_grad():
            vae.network.decoder.conv_in.weight *= 1000
    z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    z *= torch.tensor([0.1, 100, 0.1])[:, None, None, None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = half.decode(z, batch_size=3)
    assert any("overflowed in float16" in str(one.message) for one in caught), "nothing overflowed"
    assert half.dtype == torch.float16, f"the VAE was left in {half.dtype}"
    return _similar(images, exact.decode(z.half().float()), 35.0)


def text(place: Place, dtype: str) -> str:
    reference = _pipeline("cpu", "fp32").text.encode(list(PROMPTS))
    return _close(_pipeline(str(place.device), dtype).text.encode(list(PROMPTS)), reference, LATENTS[dtype])


def draw(place: Place, dtype: str, sampler: str, eta: float = 0.0) -> str:
    return _similar(_drawn(str(place.device), dtype, sampler, eta), _drawn("cpu", "fp32", sampler, eta), DRAWN[dtype])


def alone(place: Place, dtype: str) -> str:
    """Image i of a batch is the image that is drawn alone, up to the rounding of kernels for another batch size."""
    sd = _pipeline(str(place.device), dtype)
    prompt = "a large 3d cat on a red background"
    batch = sd(prompt, num_images_per_prompt=4, num_inference_steps=STEPS, batch_size=4)
    return _similar([batch[2]], sd(prompt, seed=2, num_inference_steps=STEPS), DRAWN[dtype])


def lora(place: Place) -> str:
    """A LoRA trained on the CPU changes the images of both places alike."""
    run = _train(place, "lora", place.steps, cpu=True, lora_rank=4, learning_rate=1e-2)
    images = []
    for device in (place.device, torch.device("cpu")):
        sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device=device)
        sd.load_lora(run / "result")
        images.append(sd(list(PROMPTS), num_inference_steps=STEPS))
    plain = _pipeline("cpu", "fp32")(list(PROMPTS), num_inference_steps=STEPS)
    assert _psnr(images[1], plain) < 35, "the LoRA changes nothing, so that this check would show nothing"
    return _similar(*images, DRAWN["fp32"])


def latent_cache(place: Place) -> str:
    from sdkit.data import LatentCache, cache

    folder = _folder(place)
    made = [
        cache("emoji", folder, place.scratch / f"cache-{name}", size=64, embeddings=True, device=device)
        for name, device in (("card", place.device), ("cpu", "cpu"))
    ]
    card, cpu = (LatentCache(one) for one in made)
    assert len(card) == len(cpu), f"{len(card)} and {len(cpu)} images"
    keys = [key for key, value in cpu[0].items() if isinstance(value, Tensor) and value.is_floating_point()]
    return "; ".join(
        f"{key} {_close(*(torch.stack([one[i][key] for i in range(len(cpu))]).float() for one in (card, cpu)), 2e-3)}"
        for key in keys
    )


def unet_training(place: Place, precision: str, **settings: Any) -> str:
    return _losses_agree(place, "unet", precision, settings)


def vae_training(place: Place, precision: str, **settings: Any) -> str:
    return _losses_agree(place, "vae", precision, settings)


def scaler_overflow(place: Place) -> str:
    """Steps whose float16 gradients overflow are skipped, and training goes on at a smaller loss scale."""
    import accelerate.accelerator as library

    _refuse_fp16_on_cpu(place, "fp16")
    large = partial(library.get_grad_scaler, init_scale=2.0**40, growth_interval=10_000, backoff_factor=2.0**-12)
    with patch.object(library, "get_grad_scaler", large):
        run = _train(place, "scaler", place.steps, mixed_precision="fp16", ema_decay=0)
    before, after = (load_file(_unet_file(folder)) for folder in (EMBEDDED, run / "result"))
    moved = sum(float((after[key] - before[key].float()).abs().sum()) for key in before)
    assert 0 < moved < math.inf, f"the weights moved by {moved}"
    norms = [row.get("grad_norm") for row in read_metrics(run / "metrics.jsonl")]
    overflowed = sum(norm is None for norm in norms)
    assert 0 < overflowed < len(norms), f"{overflowed} of {len(norms)} steps overflowed"
    return f"{overflowed} of {len(norms)} steps overflowed and were skipped"


def adam_in_8_bits(place: Place) -> str:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise NotRunError("bitsandbytes is not installed") from error
    eight = _train(place, "eight", place.steps, use_8bit_adam=True, learning_rate=1e-3)
    plain = _train(place, "32-bits", place.steps, learning_rate=1e-3)
    said = _relative(_loss_curve(eight), _loss_curve(plain), 2e-2)
    sizes = [next(run.rglob("unet.optimizer.safetensors")).stat().st_size for run in (eight, plain)]
    assert sizes[0] < sizes[1] / 3, f"the optimizer's state takes {sizes[0]} bytes, and {sizes[1]} in 32 bits"
    return said


def resume(place: Place) -> str:
    """A run killed after half of its steps and resumed ends with the very weights of a run that was not."""
    half = place.steps // 2
    with _deterministic():
        whole = _train(place, "whole", place.steps, ema_decay=0.9, save_every=1)
        _killed(place, "killed", place.steps, after=half)
        killed = _train(place, "killed", place.steps, ema_decay=0.9, save_every=1)
    ours, reference = (load_file(_unet_file(run / "result")) for run in (killed, whole))
    assert all(torch.equal(ours[key], reference[key]) for key in reference), "the weights differ"
    return "bit-identical" if place.device.type == "cuda" else "bit-identical (CPU)"


def fsdp(place: Place) -> str:
    """FSDP 2 on one card, through `accelerate launch`, gives the losses of a run without it."""
    if place.device.type != "cuda":
        raise NotRunError("Accelerate does not shard a single process on a CPU; tests/training/test_fsdp.py takes two")
    settings = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "1", "--num_machines", "1"]
    settings += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    settings += ["--fsdp_auto_wrap_policy", "NO_WRAP"]
    run = place.scratch / "fsdp"
    script = place.scratch / "fsdp.py"
    script.write_text(
        "from accelerate import DistributedType, PartialState\n"
        "from accelerate.state import AcceleratorState\n"
        "from sdkit.training import UNetConfig, train_unet\n"
        f"train_unet(UNetConfig(**{_settings(place, run, place.steps)!r}))\n"
        "assert AcceleratorState().distributed_type == DistributedType.FSDP, AcceleratorState().distributed_type\n"
        "PartialState().destroy_process_group()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *settings, str(script)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_environment(place),
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=50)
    finally:
        process.terminate()  # it ends the process that it has launched, which killing it would not
        process.wait()
    assert process.returncode == 0, said[-2000:]
    return _relative(_loss_curve(run), _loss_curve(_train(place, "no-fsdp", place.steps)), LOSSES["no"])


def compiled(place: Place) -> str:
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device=place.device, compile=True)
    options: dict[str, Any] = {"num_inference_steps": STEPS}
    return _similar(sd(PROMPTS[0], **options), _pipeline("cpu", "fp32")(PROMPTS[0], **options), DRAWN["fp32"])


def compiled_training(place: Place) -> str:
    if place.device.type != "cuda":
        raise NotRunError("torch.compile loses gradients on a CPU, where sdkit refuses it")
    plain = _train(place, "eager", place.steps)
    with patch.dict(os.environ, {"ACCELERATE_DYNAMO_BACKEND": "inductor"}):
        run = _train(place, "compiled", place.steps)
    return _relative(_loss_curve(run), _loss_curve(plain), LOSSES["no"])


REST: dict[str, Any] = {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "gradient_checkpointing": True}
CHECKS: dict[str, Check] = {
    **{f"encode-{dtype}": partial(encode, dtype=dtype) for dtype in DTYPES},
    **{f"decode-{dtype}": partial(decode, dtype=dtype) for dtype in DTYPES},
    **{f"tiles-{dtype}": partial(tiles, dtype=dtype) for dtype in DTYPES},
    "overflow": overflow,
    **{f"text-{dtype}": partial(text, dtype=dtype) for dtype in DTYPES},
    **{
        f"draw-{sampler}-{dtype}": partial(draw, dtype=dtype, sampler=sampler)
        for dtype in DTYPES
        for sampler in ("ddim", "ddpm", "dpm++2m")
    },
    **{
        f"draw-{sampler}-fp32": partial(draw, dtype="fp32", sampler=sampler)
        for sampler in SAMPLERS
        if sampler not in ("ddim", "ddpm", "dpm++2m")
    },
    "draw-ddim-eta-fp32": partial(draw, dtype="fp32", sampler="ddim", eta=0.5),
    **{f"alone-{dtype}": partial(alone, dtype=dtype) for dtype in DTYPES},
    "lora": lora,
    "cache": latent_cache,
    **{f"train-unet-{kind}": partial(unet_training, precision=kind, **REST) for kind in LOSSES},
    **{f"train-lora-{kind}": partial(unet_training, precision=kind, lora_rank=4, **REST) for kind in LOSSES},
    "train-text-encoder": partial(unet_training, precision="no", train_text_encoder=True),
    **{f"train-vae-{kind}": partial(vae_training, precision=kind, **REST) for kind in LOSSES},
    "train-vae-discriminator": partial(vae_training, precision="no", train_encoder=True, disc_weight=0.5),
    "scaler-overflow": scaler_overflow,
    "adam-8-bits": adam_in_8_bits,
    "resume": resume,
    "fsdp": fsdp,
    "compile": compiled,
    "compile-training": compiled_training,
}
"""Checks by name, in the order in which they run: the cheapest and most important first."""


def run(name: str, place: Place) -> str:
    """Run one check with float32 products in full float32. Returns what it measured."""
    torch.manual_seed(0)
    with _full_float32():
        return CHECKS[name](place)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switch TensorFloat-32 off: its products have ten bits of mantissa, and the references have 23."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let PyTorch use deterministic kernels alone. CUBLAS_WORKSPACE_CONFIG must be set before CUDA starts."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@cache
def _drawn(device: str, dtype: str, sampler: str, eta: float) -> list[Image.Image]:
    return _pipeline(device, dtype)(list(PROMPTS), sampler=sampler, eta=eta, num_inference_steps=STEPS)


@cache
def _vae(device: str, dtype: str) -> sdkit.VAE:
    return sdkit.VAE.from_pretrained("emoji", dtype=dtype, device=device)


@cache
def _pipeline(device: str, dtype: str) -> sdkit.StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained("emoji", dtype=dtype, device=device)


def _photos(side: int = 128) -> list[Image.Image]:
    """Two smooth pictures with edges: sums of waves, seeded, and a disc."""
    y, x = np.mgrid[0:side, 0:side] / side
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(2):
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-3, 3, (3, 3))]
        pixels = np.stack(waves, axis=-1) * 0.4 + 0.5
        pixels[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06] = (0.9, 0.2, 0.1)
        pictures.append(Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)))
    return pictures


def _folder(place: Place) -> Path:
    """A folder of eight captioned images of 64 pixels."""
    folder = place.scratch / "photos"
    if not folder.exists():
        folder.mkdir(parents=True)
        for i in range(8):
            picture = _photos(64)[i % 2].rotate(45 * i, fillcolor=(255, 255, 255))
            picture.save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(PROMPTS[i % 2])
    return folder


def _settings(place: Place, run: Path, steps: int, stage: str = "unet", **settings: Any) -> dict[str, Any]:
    always: dict[str, Any] = {
        "model": "emoji", "data": str(_folder(place)), "out_dir": str(run), "size": 64, "max_steps": steps,
        "batch_size": 2, "save_every": steps, "validate_every": 10 * steps, "ema_decay": 0, "learning_rate": 1e-4,
    }  # fmt: skip
    if stage == "vae":
        always |= {"lpips_weight": 0}
    return always | settings


def _options(settings: Mapping[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _train(place: Place, name: str, steps: int, *, stage: str = "unet", cpu: bool = False, **settings: Any) -> Path:
    """Train on the card, or on the CPU, in a run folder of this name. An existing run is resumed."""
    from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae

    on_cpu = cpu or place.device.type == "cpu"
    values = _settings(place, place.scratch / name, steps, stage, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate chooses a process's device once
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}):
        try:
            chosen = PartialState().device.type
            assert chosen == ("cpu" if on_cpu else place.device.type), f"Accelerate trains on {chosen}"
            return train_vae(VAEConfig(**values)) if stage == "vae" else train_unet(UNetConfig(**values))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _killed(place: Place, name: str, steps: int, after: int) -> None:
    """Start the run of `resume` in a process of its own, and kill it with SIGKILL once it has logged `after` steps."""
    run = place.scratch / name
    settings = _settings(place, run, steps, ema_decay=0.9, save_every=1)
    code = (
        "import torch; torch.use_deterministic_algorithms(True)\n"
        "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False\n"
        f"from sdkit.cli import main; main(['train', 'unet', *{_options(settings)!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=_environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and len(_losses(run)) < after:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    killed = process.returncode == -signal.SIGKILL
    assert killed, f"the run that was to be killed ended by itself: exit code {process.returncode}"


def _environment(place: Place) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    own = {"ACCELERATE_USE_CPU": "true"} if place.device.type == "cpu" else {}
    return {**os.environ, "PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **own}


def _losses_agree(place: Place, stage: str, precision: str, settings: dict[str, Any]) -> str:
    """Train for some steps on the card, and in float32 on the CPU, and compare the losses of each step."""
    _refuse_fp16_on_cpu(place, precision)
    ours = _train(place, "run", place.steps, stage=stage, mixed_precision=precision, **settings)
    # All precisions have one reference, which is trained once: `_train` finds the finished run.
    shared = replace(place, scratch=place.scratch.parent / "references")
    name = "-".join([stage, *(f"{key}-{value}" for key, value in settings.items())])
    reference = _train(shared, name, place.steps, stage=stage, cpu=True, **settings)
    return _relative(_loss_curve(ours), _loss_curve(reference), LOSSES[precision])


def _refuse_fp16_on_cpu(place: Place, precision: str) -> None:
    if precision == "fp16" and place.device.type == "cpu":
        raise NotRunError("sdkit trains in fp16 on a GPU only")


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def _loss_curve(run: Path) -> Tensor:
    return torch.tensor(_losses(run), dtype=torch.float64)


def _unet_file(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def _close(ours: Tensor, reference: Tensor, tolerance: float) -> str:
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    error = float((ours - reference).pow(2).mean().sqrt() / reference.std())
    assert error <= tolerance, f"error {error:.1e} is above {tolerance:.0e}"
    return f"error {error:.1e} (at most {tolerance:.0e})"


def _relative(ours: Tensor, reference: Tensor, tolerance: float) -> str:
    assert len(ours) == len(reference) > 0, f"{len(ours)} and {len(reference)} losses were logged"
    error = float(((ours - reference).abs() / reference.abs()).max())
    assert error <= tolerance, f"a loss differs by {error:.1e}, above {tolerance:.0e}"
    return f"losses differ by {error:.1e} (at most {tolerance:.0e})"


def _psnr(ours: list[Image.Image], reference: list[Image.Image]) -> float:
    pairs = zip(ours, reference, strict=True)
    errors = [np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) for a, b in pairs]
    return 10 * math.log10(255**2 / max(float(np.mean(errors)), 1e-9))


def _similar(ours: Any, reference: Any, smallest: float) -> str:
    value = _psnr(ours, reference)
    assert value >= smallest, f"PSNR {value:.1f} dB is below {smallest:.0f} dB"
    return f"PSNR {value:.1f} dB (at least {smallest:.0f})"
