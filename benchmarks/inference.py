"""Compare time and memory of sdkit with diffusers in its usual form: `StableDiffusionPipeline` in float32 with DDIM.

    python benchmarks/inference.py                      # all parts, about eight minutes on two CPU cores
    python benchmarks/inference.py --parts emoji cold   # only these two

Parts: `sd15`, one image with the SD 1.5 architecture; `vae`, its VAE on photos; `emoji`, four images with the embedded
model; `cold`, the same as a whole process, including imports.

Each measurement runs in its own process, to get its own peak of memory. The two sides take turns, and the result is the
median of the ratios within turns, because seconds vary on a busy computer. There, OMP_WAIT_POLICY=passive also keeps
threads from spinning while they wait.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "sdkit" / "assets"
PARTS = ("sd15", "vae", "emoji", "cold")
SIDES = ("sdkit", "diffusers")
PROMPT, SCALE = "a red apple on a blue background", 7.5


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare sdkit with diffusers in time and memory.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="number of turns of each part (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 4 for sd15, 30 for emoji and cold)")
    parser.add_argument("--size", type=int, default=512, help="side in pixels, for sd15 and vae (default: %(default)s)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="model for sd15 and vae (default: random weights)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        machine, folder = start({"do": "facts"})["machine"], args.model or Path(scratch, "sd15")
        if not args.model and {"sd15", "vae"} & set(args.parts):
            start({"do": "make", "folder": str(folder)})
        turns = {part: [turn(part, args, folder, scratch) for _ in range(args.repeats)] for part in args.parts}
    rows = [row for part in args.parts for row in summarise(part, turns[part])]
    show(machine, rows)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows, "turns": turns}, indent=2) + "\n")


def turn(part: str, args: argparse.Namespace, folder: Path, scratch: str) -> Json:
    """Measure each side once: {"sdkit": {...}, "diffusers": {...}}."""
    job: Json = {"do": "vae" if part == "vae" else "generate", "warm_up": part != "cold", "out": scratch}
    if part in ("emoji", "cold"):
        job |= {"model": str(ASSETS / "emoji"), "size": 128, "images": 4, "steps": args.steps or 30}
    else:
        job |= {"model": str(folder), "size": args.size, "images": 1, "steps": args.steps or 4}
    command = ["-m", "sdkit", "generate", PROMPT, "--out", scratch, "--count", "4", "--steps", str(job["steps"])]
    result: Json = {}
    for side in SIDES:
        result[side] = start(job | {"side": side}, command if part == "cold" and side == "sdkit" else None)
        if part == "cold":
            result[side]["timings"] = {"process": result[side]["process"]}
        print(part, side, result[side]["timings"], file=sys.stderr, flush=True)
    return result


def start(job: Json, command: list[str] | None = None) -> Json:
    """Run `job`, or `command`, in a new Python. Return what it measured, with the process's time and peak of memory."""
    arguments = command or [str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        cost = {"seconds": time.perf_counter() - begin, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        out.seek(0), err.seek(0)
        if status:
            sys.exit(f"{' '.join(arguments)} failed:\n{err.read().decode()}")
        result: Json = {} if command else json.loads(out.read().splitlines()[-1])
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"process": cost | {"peak_bytes": peak_bytes}, "peak_bytes": peak_bytes} | result


def work(job: Json) -> None:
    """Run `job` as a worker, and print what was measured. On a GPU, memory is the GPU's."""
    import torch

    result = {"generate": generate, "vae": vae, "make": make, "facts": facts}[job["do"]](job)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    print(json.dumps(result | peak))


def generate(job: Json) -> Json:
    """Draw images from text with one side's pipeline."""
    import torch

    always: Json = {"num_images_per_prompt": job["images"], "guidance_scale": SCALE}
    size = {"height": job["size"], "width": job["size"]}
    # A first call leaves lazy imports and first allocations out of the measurement. On a GPU it has the full size, so
    # that the choice of kernels for this size is left out, too.
    first = size if torch.cuda.is_available() else {"height": 64, "width": 64}
    if job["side"] == "sdkit":
        import sdkit

        sd = sdkit.StableDiffusion.from_pretrained(job["model"])
        sd(PROMPT, num_inference_steps=1, **first, **always)
        marks: list[float] = []  # times at which a network is entered and left, in turn
        for network in (sd.text.network, sd.unet.network):
            network.register_forward_pre_hook(lambda *_: marks.append(now()))
            network.register_forward_hook(lambda *_: marks.append(now()))
        loop, z = timed(lambda: sd(PROMPT, num_inference_steps=job["steps"], output_type="latent", **size, **always))
        decode, _ = timed(lambda: sd.vae.decode(z))
        both = {figure: loop[figure] + decode[figure] for figure in loop}
        overhead = loop["seconds"] / (sum(marks[1::2]) - sum(marks[::2])) - 1
        return {"timings": {"images": both}, "overhead": overhead}

    from diffusers import DDIMScheduler, StableDiffusionPipeline

    # float32 is the default, but a text encoder stored in half precision stays in it unless the dtype is named.
    pipe = StableDiffusionPipeline.from_pretrained(job["model"], safety_checker=None, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    if job["warm_up"]:
        pipe(PROMPT, num_inference_steps=1, **first, **always)
    images, output = timed(lambda: pipe(PROMPT, num_inference_steps=job["steps"], **size, **always))
    for i, image in enumerate(output.images):
        image.save(Path(job["out"], f"{i}.png"))
    return {"timings": {"images": images}}


def vae(job: Json) -> Json:
    """Encode and decode photos with sdkit, or with a loop over diffusers' `AutoencoderKL`."""
    import torch
    from PIL import Image
    from skimage import data

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = (getattr(data, name)() for name in ("astronaut", "coffee"))
    photos = [Image.fromarray(source).resize((job["size"], job["size"])) for source in sources]
    first = photos[0] if device == "cuda" else photos[0].resize((64, 64))
    if job["side"] == "sdkit":
        import sdkit

        ours = sdkit.VAE.from_pretrained(job["model"])
        ours.reconstruct(first)
        encode, z = timed(lambda: ours.encode(photos, sample=False))
        decode, _ = timed(lambda: ours.decode(z))
        return {"timings": {"encode": encode, "decode": decode}}

    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    theirs = AutoencoderKL.from_pretrained(job["model"], subfolder="vae").to(device)
    processor, scale = VaeImageProcessor(), theirs.config.scaling_factor

    def encoded(photo: Image.Image) -> Any:
        return theirs.encode(processor.preprocess(photo).to(device)).latent_dist.mode() * scale

    def decoded(z: Any) -> Any:
        return processor.postprocess(theirs.decode(z / scale).sample)[0]

    with torch.no_grad():
        decoded(encoded(first))
        encode, z = timed(lambda: [encoded(photo) for photo in photos])
        decode, _ = timed(lambda: [decoded(latent) for latent in z])
    return {"timings": {"encode": encode, "decode": decode}}


def make(job: Json) -> Json:
    """Write a pipeline's folder with the SD 1.5 architecture, from sdkit's configs and a fixed seed."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(str(ASSETS / "sd1" / "vae"))),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(ASSETS / "sd1" / "unet"))),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(ASSETS / "sd1" / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(ASSETS / "clip_tokenizer", model_max_length=77),
        scheduler=DDIMScheduler.from_pretrained(ASSETS / "sd1" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(job["folder"])
    return {}


def facts(_: Json) -> Json:
    """Return what the numbers depend on: the processor and the versions."""
    import diffusers
    import torch

    from sdkit.engines.device import has_native_bf16, resolve_device

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    bf16 = "bf16 in hardware" if has_native_bf16(resolve_device()) else "no bf16 in hardware"
    return {"machine": [name, bf16, f"torch {torch.__version__}", f"diffusers {diffusers.__version__}"]}


def timed(run: Callable[[], Any]) -> tuple[Json, Any]:
    """Return the time that `run()` took, and its result."""
    seconds, cpu_seconds = now(), time.process_time()
    result = run()
    return {"seconds": now() - seconds, "cpu_seconds": time.process_time() - cpu_seconds}, result


def now() -> float:
    """Return the time in seconds, after a GPU has finished its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def summarise(part: str, turns: list[Json]) -> list[Json]:
    """Return a row for each timed job: medians of both sides over the turns, and the ratios within turns."""
    rows = []
    for name in turns[0]["sdkit"]["timings"]:
        row: Json = {"part": part, "timed": name}
        for figure in ("seconds", "cpu_seconds", "peak_bytes"):
            pairs = [[(t[side] | t[side]["timings"][name])[figure] for side in SIDES] for t in turns]
            ratios = sorted(ours / theirs for ours, theirs in pairs)
            row[figure] = {side: median(pair[i] for pair in pairs) for i, side in enumerate(SIDES)}
            row[figure] |= {"ratio": median(ratios), "ratios": ratios}
        if "overhead" in turns[0]["sdkit"]:
            row["loop"] = f"{median(t['sdkit']['overhead'] for t in turns):.2%}"
        rows.append(row)
    return rows


def show(machine: list[str], rows: list[Json]) -> None:
    print(*machine, sep=", ")
    print(
        "Ratios are sdkit / diffusers; CPU is the ratio of CPU times; loop is the loop's overhead over the networks.\n"
    )
    print(f"{'':19}sdkit diffusers  ratio (from - to)    CPU      sdkit  diffusers  ratio   loop")
    for row in rows:
        t, cpu, m = row["seconds"], row["cpu_seconds"], row["peak_bytes"]
        spread = f"({t['ratios'][0]:.2f} - {t['ratios'][-1]:.2f})"
        times = f"{t['sdkit']:6.2f} s{t['diffusers']:8.2f} s   {t['ratio']:.2f} {spread}   {cpu['ratio']:.2f}"
        memory = f"{m['sdkit'] / 1e6:8.0f} MB{m['diffusers'] / 1e6:8.0f} MB   {m['ratio']:.2f}"
        print(f"{row['part'] + ' ' + row['timed']:16}{times}{memory}  {row.get('loop', '')}".rstrip())


if __name__ == "__main__":
    work(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main()
