"""Measure the time and memory of evaluating VAEs and images, compared with loops over single images.

    python benchmarks/evaluation.py                                       # about five minutes on two CPU cores
    python benchmarks/evaluation.py --vae tiny --parts evaluate images --images 3000 --repeats 1
    python benchmarks/evaluation.py --parts none --images 8 --repeats 1 --extractors alex inception dinov2 clip

The second line shows that memory does not grow with the number of images; the network's part of it is constant, so that
a tiny VAE will do. In the third line, networks of the papers' sizes have random weights, which take as long as trained
ones; NAME:SOURCE takes others. Each measurement runs in its own process, after a few images that do not
count. The images are JPEGs of 300 x 300 pixels, cropped at random from a photo of scikit-image, and evaluated at
256 x 256. CPU time is that of all threads, and memory the process's peak.

| part | what runs |
|---|---|
| diffusers | the loop as users of diffusers write it: AutoencoderKL in its own float32, scikit-image, and LPIPS |
| loop | the same loop with sdkit's VAE, in the precision that it chooses, and sdkit's metrics |
| evaluate | `sdkit.evaluation.evaluate_vae` |
| images | `sdkit.evaluation.evaluate_images` of the images half of the images against the other half |
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE = 256
WARM = 8  # images that do not count; `evaluate_images` takes at least as many on each side

LOOP = """
from PIL import Image, ImageOps
from sdkit import images
from sdkit.metrics import psnr, ssim

def work(paths):
    scores, real, decoded = [], [], []
    for path in paths:
        picture = ImageOps.fit(images.read(path), (side, side), Image.Resampling.LANCZOS)
        (made,) = vae.reconstruct(picture)
        x, y = (torch.stack(images.to_tensors(one)) for one in (picture, made))
        with torch.inference_mode():
            scores.append((float(psnr(x, y)), float(ssim(x, y)), float(lpips(x.to(device), y.to(device)))))
        real.append(extractor(picture))
        decoded.append(extractor(made))
    distance = frechet_distance(Moments.of(torch.cat(real)), Moments.of(torch.cat(decoded)))
"""
DIFFUSERS = """
import numpy as np
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

network = vae.network.to(memory_format=torch.contiguous_format, dtype=torch.float32)
gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)

@torch.no_grad()
def work(paths):
    scores, real, decoded = [], [], []
    for path in paths:
        picture = ImageOps.fit(Image.open(path).convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        a = np.asarray(picture)
        x = torch.tensor(a).permute(2, 0, 1)[None].to(device) / 127.5 - 1
        y = network.decode(network.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        b = ((y[0].permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
        ssim = structural_similarity(a, b, channel_axis=-1, data_range=255, **gaussian)
        scores.append((peak_signal_noise_ratio(a, b, data_range=255), ssim, float(lpips(x, y))))
        real.append(extractor(picture))
        decoded.append(extractor(Image.fromarray(b)))
    return frechet_distance(torch.cat(real), torch.cat(decoded))
"""
EVALUATE = """
def work(paths):
    evaluate_vae(vae, paths, size=side, lpips=lpips, extractor=extractor, device=device)
"""
IMAGES = """
from sdkit.evaluation import evaluate_images

def work(paths):
    evaluate_images(paths[::2], paths[1::2], extractors=extractor, device=device)
"""
EXTRACT = """
from sdkit import images

def work(paths):
    for i in range(0, len(paths), 32):
        extractor([images.read(path) for path in paths[i : i + 32]])
"""
CHILD = """
import resource, sys, time, torch
from pathlib import Path
import sdkit
from sdkit.evaluation import Moments, evaluate_vae, frechet_distance, open_extractor
from sdkit.networks.lpips import LPIPS

folder, n, warm, side = Path(sys.argv[1]), *map(int, sys.argv[2:5])
name, device, source = sys.argv[5:]
paths = sorted(folder.iterdir())[:n]
extractor = open_extractor(name, device=device)
if {with_vae}:
    vae, lpips = sdkit.VAE.from_pretrained(source, device=device), LPIPS.from_pretrained("alex").to(device)
{work}
work(paths[:warm])
begun, worked = time.perf_counter(), time.process_time()
work(paths)
rate, cpu = len(paths) / (time.perf_counter() - begun), 1000 * (time.process_time() - worked) / len(paths)
print(rate, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


PARTS = {"diffusers": DIFFUSERS, "loop": LOOP, "evaluate": EVALUATE, "images": IMAGES}
TINY = {
    "block_out_channels": [8] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 4, "mid_block_add_attention": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of evaluation.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=(*PARTS, "none"))
    parser.add_argument("--extractors", nargs="*", default=["alex"], metavar="NAME[:SOURCE]", help="(default: alex)")
    parser.add_argument("--vae", default="emoji", metavar="SOURCE", help='or "tiny" (default: emoji)')
    parser.add_argument("--images", type=int, default=96, metavar="N", help="number of images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best counts (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, vae = Path(scratch, "images"), args.vae
        make(folder, args.images)
        if vae == "tiny":
            vae = save_tiny_vae(Path(scratch, "vae"))
        for part in PARTS:
            if part in args.parts:
                show(part, PARTS[part], "alex", folder, vae, args)
        for name in args.extractors:
            opened = save_random(name, Path(scratch, name)) if name in ("inception", "dinov2", "clip") else name
            show(f"extractor {name}", EXTRACT, opened, folder, vae, args)


def make(folder: Path, n: int) -> None:
    import numpy as np
    import skimage.data
    from PIL import Image

    folder.mkdir()
    photo, rng = Image.fromarray(skimage.data.astronaut()), np.random.default_rng(0)
    for i, (left, top) in enumerate(rng.integers(0, 512 - 300, size=(n, 2)).tolist()):
        photo.crop((left, top, left + 300, top + 300)).save(folder / f"{i:05d}.jpg", quality=92)


def save_tiny_vae(folder: Path) -> str:
    """Write a VAE with random weights, and return its source."""
    from diffusers import AutoencoderKL

    AutoencoderKL(**TINY).save_pretrained(folder)
    return str(folder)


def save_random(kind: str, folder: Path) -> str:
    """Write the network of an extractor with random weights, and return its name for `open_extractor`."""
    import torch
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    from sdkit.evaluation.inception import Inception

    torch.manual_seed(0)
    if kind == "inception":
        folder.mkdir()
        torch.save(Inception().state_dict(), folder / "weights.pth")
        return f"inception:{folder / 'weights.pth'}"
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**shape, image_size=518, patch_size=14)).save_pretrained(folder)
    else:
        vision = shape | {"intermediate_size": 4096, "image_size": 336, "patch_size": 14}
        CLIPModel(CLIPConfig(vision_config=vision, projection_dim=768)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "sdkit/assets/emoji/tokenizer").save_pretrained(folder)
    return f"{kind}:{folder}"


def show(part: str, work: str, name: str, folder: Path, vae: str, args: argparse.Namespace) -> None:
    """Print the images per second and the memory of one part, each repeat in a new process."""
    source = CHILD.format(work=work, with_vae=work not in (EXTRACT, IMAGES))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    sizes = [str(n) for n in (args.images, 2 * WARM if work is IMAGES else WARM, SIDE)]
    command = [sys.executable, "-W", "ignore", "-c", source, str(folder), *sizes, name, args.device, vae]
    found = []
    for _ in range(args.repeats):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
        found.append([float(value) for value in done.stdout.split()[-3:]])
    rates, cpu, memory = zip(*found, strict=True)
    print(
        f"{part}: {max(rates):.2f} images per second, {min(cpu):.0f} ms of CPU time each, {max(memory):.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
