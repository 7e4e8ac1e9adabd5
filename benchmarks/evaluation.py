"""Measure the time and memory of evaluating a VAE, compared with a loop over single images, and of the extractors.

    python benchmarks/evaluation.py                                # about three minutes on two CPU cores
    python benchmarks/evaluation.py --images 3000 --parts evaluate # memory must not grow with the number of images

Each measurement runs in its own process, after a few images that do not count. The images are JPEGs of 300 x 300
pixels, cropped at random from a photo of scikit-image, and evaluated at 256 x 256. The loop calls the same functions of
sdkit for one image after the other. CPU time is that of all threads, and memory the process's peak.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDE, WARM = 256, 8

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
EVALUATE = """
def work(paths):
    evaluate_vae(vae, paths, size=side, lpips=lpips, extractor=extractor, device=device)
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

folder, n, warm, side, name, device = Path(sys.argv[1]), *map(int, sys.argv[2:5]), *sys.argv[5:]
paths = sorted(folder.iterdir())[:n]
extractor = open_extractor(name, device=device)
if {with_vae}:
    vae, lpips = sdkit.VAE.from_pretrained("emoji", device=device), LPIPS.from_pretrained("alex").to(device)
{work}
work(paths[:warm])
begun, worked = time.perf_counter(), time.process_time()
work(paths)
rate, cpu = len(paths) / (time.perf_counter() - begun), 1000 * (time.process_time() - worked) / len(paths)
print(rate, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of evaluation.")
    parser.add_argument("--parts", nargs="+", default=["loop", "evaluate"], choices=("loop", "evaluate", "none"))
    parser.add_argument("--extractors", nargs="*", default=["alex"], metavar="NAME[:SOURCE]", help="(default: alex)")
    parser.add_argument("--images", type=int, default=96, metavar="N", help="number of images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best counts (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), args.images)
        for part, work in (("loop", LOOP), ("evaluate", EVALUATE)):
            if part in args.parts:
                show(part, work, "alex", Path(scratch), args)
        for name in args.extractors:
            show(f"extractor {name}", EXTRACT, name, Path(scratch), args)


def make(folder: Path, n: int) -> None:
    import numpy as np
    import skimage.data
    from PIL import Image

    photo, rng = Image.fromarray(skimage.data.astronaut()), np.random.default_rng(0)
    for i, (left, top) in enumerate(rng.integers(0, 512 - 300, size=(n, 2)).tolist()):
        photo.crop((left, top, left + 300, top + 300)).save(folder / f"{i:05d}.jpg", quality=92)


def show(part: str, work: str, name: str, folder: Path, args: argparse.Namespace) -> None:
    """Print the images per second and the memory of one part, each repeat in a new process."""
    source = CHILD.format(work=work, with_vae=work is not EXTRACT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    sizes = [str(n) for n in (args.images, WARM, SIDE)]
    command = [sys.executable, "-W", "ignore", "-c", source, str(folder), *sizes, name, args.device]
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
