"""Compare each path of drawing with diffusers' pipeline for it: image to image, inpainting, ControlNets, samplers.

    python benchmarks/pipelines.py                                # all parts, about five minutes on two CPU cores
    python benchmarks/pipelines.py --parts samplers inpaint9      # only these two

Parts: `text`, text to image, for comparison; `img2img`; `inpaint`, with a U-Net of four input channels; `inpaint9`,
with one of nine; `control` and `controls`, one ControlNet and two; `edit`, InstructPix2Pix; `loras`, two LoRAs, which
sdkit merges into the weights; `embedding`, textual inversion; `samplers`, each sampler's steps without a network.

Both sides have the same weights, steps, dtype, and seeds: those of the embedded model, and random ones for nine
channels and for ControlNets. They take turns within one process, and the result is the median of the ratios within
turns, because seconds vary on a busy computer. Before that, each side draws once, and their images are compared: `off`
is the mean difference in levels from 0 to 255, over the middle of the image, which is what the mask shows.

diffusers' scheduler for dpm++sde needs torchsde, so that sampler is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.diffusion.samplers import default_spacing, sampler_by_name
from sdkit.guidance import Conditioning, guided
from sdkit.loading.embedding_file import save_embedding

EMOJI = Path(__file__).resolve().parent.parent / "sdkit" / "assets" / "emoji"
PATHS = ("text", "img2img", "inpaint", "inpaint9", "control", "controls", "edit", "loras", "embedding")
PARTS = (*PATHS, "samplers")
PROMPT, SCALE, SIZE = "a red apple on a blue background", 3.0, 128
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "dpm++2m_sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
"""Sampler -> diffusers' scheduler, and its settings."""
Side = Callable[[], Any]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare each path of drawing with diffusers' pipeline for it.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="(default: 1 4)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    machine = [processor(), f"torch {torch.__version__}", f"diffusers {diffusers.__version__}", args.dtype]
    print(*machine, sep=", ")
    print("Ratios are sdkit / diffusers: of CPU times with the lowest and the highest of the turns, and of seconds.\n")
    print(f"{'':22}sdkit  diffusers   CPU  (from - to)   seconds    off")
    rows: list[Row] = []
    for part in args.parts:
        for n in args.batch_sizes:
            sides = sampler_sides(n, args) if part == "samplers" else path_sides(part, n, args)
            for name, ours, theirs in sides:
                rows.append({"name": name, "batch": n, **compared(ours, theirs, args.turns)})
                show(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


def compared(ours: Side, theirs: Side, turns: int) -> Row:
    """Time both sides in turns, the first of which changes. Returns medians and ratios."""
    pixels = [side() for side in (ours, theirs)]
    times: dict[str, list[tuple[float, float]]] = {"sdkit": [], "diffusers": []}
    order = [("sdkit", ours), ("diffusers", theirs)]
    for _ in range(turns):
        for name, side in order:
            began = time.perf_counter(), time.process_time()
            side()
            times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        order.reverse()
    row: Row = {name: median(cpu for _, cpu in times[name]) for name in times}
    for figure, i in (("seconds", 0), ("cpu", 1)):
        pairs = zip(times["sdkit"], times["diffusers"], strict=True)
        ratios = sorted(one[i] / other[i] for one, other in pairs)
        row[figure] = {"ratio": median(ratios), "ratios": ratios}
    if pixels[0] is not None:
        row["off"] = off(*pixels)
    return row


def off(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Return the mean difference of the middles of images, in levels."""
    box = middle(SIZE)
    pairs = [[np.asarray(image.crop(box), float) for image in pair] for pair in zip(images, others, strict=True)]
    return float(np.mean([np.abs(one - other).mean() for one, other in pairs]))


def show(row: Row) -> None:
    cpu = row["cpu"]
    spread = f"({cpu['ratios'][0]:.2f} - {cpu['ratios'][-1]:.2f})"
    times = f"{row['sdkit'] * 1e3:8.1f} ms{row['diffusers'] * 1e3:8.1f} ms   {cpu['ratio']:.2f}  {spread}"
    difference = f"{row['off']:9.2f}" if "off" in row else ""
    print(f"{row['name']:12} x {row['batch']}{times}   {row['seconds']['ratio']:7.2f}{difference}", flush=True)


def middle(size: int) -> tuple[int, int, int, int]:
    """Return the box that the mask shows: the middle half of each side."""
    return size // 4, size // 4, size * 3 // 4, size * 3 // 4


def path_sides(part: str, n: int, args: argparse.Namespace) -> Iterator[tuple[str, Side, Side]]:
    """Yield the name of a path, and what draws n images on it with sdkit and with diffusers."""
    channels = {"inpaint9": 9, "edit": 8}.get(part, 4)
    controls = {"control": 1, "controls": 2}.get(part, 0)
    (sd, ours), (model, theirs) = (networks(channels, controls, args.dtype) for _ in range(2))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    mask = Image.new("L", image.size)
    mask.paste(255, middle(SIZE))
    edges = [sdkit.images.canny(image), sdkit.images.colour_blocks(image)][:controls]
    common: Row = {"num_inference_steps": args.steps, "guidance_scale": SCALE}
    kind, own, other = {
        "text": ("", {}, {}),
        "img2img": ("Img2Img", {"strength": 0.8}, {}),
        "inpaint": ("Inpaint", {"strength": 0.8, "mask_image": mask}, {}),
        "inpaint9": ("Inpaint", {"strength": 1.0, "mask_image": mask}, {}),
        "control": ("ControlNet", {}, {"image": edges[:1]}),
        "controls": ("ControlNet", {}, {"image": edges}),
        "edit": ("InstructPix2Pix", {"image_guidance_scale": 1.5}, {"image": image}),
        "loras": ("", {}, {}),
        "embedding": ("", {}, {}),
    }[part]
    common |= own
    if kind in ("Img2Img", "Inpaint"):
        common["image"] = image
    following: Row = {"controlnet": ours, "control_image": edges} if controls else {}
    if part == "edit":
        following = {"condition": image}
    prompt = PROMPT.replace("apple", "<zork>") if part == "embedding" else PROMPT
    pipe = pipeline(model, theirs, kind)
    if part == "loras":
        load_loras(sd, pipe)
    if part == "embedding":
        load_embedding(sd, pipe)

    def drawn() -> Any:
        return sd([prompt] * n, seed=0, **common, **following)

    def expected() -> Any:
        size = {} if kind in ("ControlNet", "Img2Img", "InstructPix2Pix") else {"height": SIZE, "width": SIZE}
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        one_each = {key: value * n if controls == 1 else value for key, value in other.items()}
        prompts = [prompt] * n if controls < 2 else prompt
        copies = {} if controls < 2 else {"num_images_per_prompt": n}
        return pipe(prompts, generator=generators, **size, **common, **one_each, **copies).images

    yield part, drawn, expected


def networks(channels: int, controls: int, dtype: str) -> tuple[sdkit.StableDiffusion, list[sdkit.ControlNet]]:
    """Load the embedded model, and make ControlNets for it, and a U-Net of another number of input channels, if wanted.
    Their random weights are the same in each call."""
    sd = sdkit.StableDiffusion.from_pretrained(EMOJI, dtype=dtype, device="cpu")
    place: Row = {"dtype": getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])}
    torch.manual_seed(0)
    if channels != sd.unet.channels:
        config = dict(sd.unet.network.config) | {"in_channels": channels}
        unet = sdkit.UNet(diffusers.UNet2DConditionModel.from_config(config).to(**place).eval())
        sd = sdkit.StableDiffusion(sd.vae, sd.text, unet, sd.schedule)
    made = [diffusers.ControlNetModel.from_unet(sd.unet.network) for _ in range(controls)]
    for network in made:
        for block in (*network.controlnet_down_blocks, network.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.01)
    return sd, [sdkit.ControlNet(network.to(**place).eval()) for network in made]


def pipeline(sd: sdkit.StableDiffusion, controls: Sequence[sdkit.ControlNet], kind: str) -> Any:
    """Make diffusers' pipeline of a kind ("Img2Img", for example) of a model's networks, with DDIM."""
    made = [control.network for control in controls]
    with_controls = {"controlnet": made[0] if len(made) == 1 else diffusers.MultiControlNetModel(made)} if made else {}
    from_folder = partial(getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained, EMOJI)
    pipe = from_folder(
        vae=sd.vae.network, text_encoder=sd.text.network, unet=sd.unet.network, safety_checker=None,
        scheduler=diffusers.DDIMScheduler.from_pretrained(EMOJI, subfolder="scheduler"), **with_controls,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_loras(sd: sdkit.StableDiffusion, pipe: Any) -> None:
    """Load two LoRAs with random weights, at scales 0.8 and 0.5."""
    scales = {"one": 0.8, "other": 0.5}
    with tempfile.TemporaryDirectory() as scratch:
        for seed, name in enumerate(scales):
            torch.manual_seed(seed)
            unet = diffusers.UNet2DConditionModel.from_pretrained(EMOJI, subfolder="unet")
            names = ["to_q", "to_k", "to_v", "to_out.0"]
            unet.add_adapter(LoraConfig(r=8, init_lora_weights="gaussian", target_modules=names))
            for weights in (weights for key, weights in unet.named_parameters() if "lora_B" in key):
                torch.nn.init.normal_(weights, std=0.02)
            layers = get_peft_model_state_dict(unet)
            diffusers.StableDiffusionPipeline.save_lora_weights(f"{scratch}/{name}", unet_lora_layers=layers)
            sd.load_lora(f"{scratch}/{name}", scales[name])
            pipe.load_lora_weights(f"{scratch}/{name}", adapter_name=name)
        pipe.set_adapters([*scales], [*scales.values()])


def load_embedding(sd: sdkit.StableDiffusion, pipe: Any) -> None:
    """Load a textual inversion embedding of four random vectors."""
    with tempfile.TemporaryDirectory() as scratch:
        vectors = torch.randn(4, sd.text.width, generator=torch.Generator().manual_seed(0)) * 0.1
        save_embedding("<zork>", vectors, f"{scratch}/zork.safetensors")
        sd.load_embedding(f"{scratch}/zork.safetensors")
        pipe.load_textual_inversion(f"{scratch}/zork.safetensors")


def sampler_sides(n: int, args: argparse.Namespace) -> Iterator[tuple[str, Side, Side]]:
    """Yield the name of each sampler, and what runs its loop with sdkit and with diffusers, guidance included. In place
    of a network there is its output, of the size of a drawing of 512 x 512 pixels."""
    x_T = torch.randn(n, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    output = torch.randn(2 * n, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    config = diffusers.DDIMScheduler.load_config(EMOJI, subfolder="scheduler")
    for name in SCHEDULERS:
        ours = partial(sampled, sdkit.NoiseSchedule.from_config(config), name, x_T, output, args.steps)
        yield name, ours, partial(scheduled, config, name, x_T, output, args.steps)


@torch.inference_mode()
def sampled(schedule: sdkit.NoiseSchedule, name: str, x_T: Tensor, output: Tensor, steps: int) -> None:
    """Run a loop of sdkit's."""
    nothing = Conditioning(torch.zeros(len(x_T), 1, 1))
    predict = guided(lambda *_: output, schedule, nothing, nothing, scale=SCALE)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x_T))]
    timesteps = schedule.timesteps(steps, default_spacing(name))
    for _ in sampler_by_name(name)(predict, x_T, schedule, timesteps, generators=generators):
        pass


@torch.inference_mode()
def scheduled(config: Row, name: str, x_T: Tensor, output: Tensor, steps: int) -> None:
    """Run a loop of diffusers', as its pipelines do."""
    kind, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind).from_config(config, **settings)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x_T))]
    draws = {"generator": generators} if name in ("ddpm", "euler_a", "dpm++2m_sde", "lcm", "tcd") else {}
    x = x_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(torch.cat([x, x]), t)
        uncond, cond = output.chunk(2)
        x = scheduler.step(uncond + SCALE * (cond - uncond), t, x, **draws).prev_sample


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
