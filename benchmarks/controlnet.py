"""Train a ControlNet on edges of the embedded model's pictures, and measure how well drawings follow edges.

    python benchmarks/controlnet.py --out runs/edges            # about five minutes on one CPU core

The embedded model draws large pictures near the middle. Here each is mirrored, shrunk, and moved at random, and its
caption says neither size nor place, so that only its edges say where it belongs. The ControlNet learns from 400
pictures with two such variants each, encoded once into a latent cache, and is measured on pictures of other emoji.

Agreement of edges is the intersection over union (IoU) of the drawing's edges with the given ones, where an edge pixel
counts as shared if the other image has one within a pixel. It is shown beside two controls: drawings without the
ControlNet, and drawings that follow the edges of another picture. Finished parts are kept: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

import sdkit
from sdkit.images import canny, grid, read
from sdkit.recipes.emoji.compositions import described
from sdkit.recipes.emoji.figures import FRAME
from sdkit.recipes.emoji.pictures import SIZE, Picture, pictures
from sdkit.training import ControlNetConfig, train_controlnet

TRAINED, HELD_OUT = pictures()[::2][:400], pictures()[1::60][:16]
VARIANTS = 2  # of each picture in training
DRAWN = {"sampler": "dpm++2m", "num_inference_steps": 10, "guidance_scale": 1.0, "batch_size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a ControlNet on edges, and measure how drawings follow them.")
    parser.add_argument("--out", type=Path, default=Path("runs/edges"), help="results (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="(default: %(default)s)")
    args = parser.parse_args()
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32")
    start = time.process_time()
    data = moved_pictures(sd, TRAINED, args.out / "pictures", VARIANTS)
    held_out = moved_pictures(sd, HELD_OUT, args.out / "held_out", 1)
    cache = sdkit.data.cache("emoji", data, args.out / "cache", size=SIZE, embeddings=True)
    print(f"data: {time.process_time() - start:.0f} s of CPU time")
    start = time.process_time()
    config = ControlNetConfig(
        data=cache, conditioning_data=data, condition="canny", out_dir=args.out / "run", max_steps=args.steps,
        batch_size=8, learning_rate=args.learning_rate, optimizer="muon", lr_scheduler="cosine", lr_warmup_steps=30,
        caption_dropout=0.7, mixed_precision="bf16", ema_decay=0, validate_every=args.steps, save_every=100,
    )  # fmt: skip
    run = train_controlnet(config)
    print(f"training: {time.process_time() - start:.0f} s of CPU time")
    control = sdkit.ControlNet.from_pretrained(run / "result", dtype="fp32")
    rows = measured(sd, control, held_out, args.out / "drawn.png")
    (args.out / "iou.json").write_text(json.dumps(rows, indent=1) + "\n")
    for name, values in rows.items():
        print(f"{name:28}", "  ".join(f"{what} {value:.3f}" for what, value in values.items()))


def moved_pictures(sd: sdkit.StableDiffusion, chosen: Sequence[Picture], folder: Path, variants: int) -> Path:
    """Draw pictures, and write variants of each, mirrored, shrunk, and moved, with captions, into a folder."""
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(0)
    prompts = [
        described([one.name], style=rng.choice(one.styles), size="large", background=rng.choice(one.backgrounds))
        for one in chosen
    ]
    drawn = sd(prompts, seed=range(len(prompts)), **DRAWN)
    lines = []
    for i, (prompt, image) in enumerate(zip(prompts, drawn, strict=True)):
        text = prompt.replace("large ", "", 1)
        for j in range(variants):
            moved(image, rng).save(folder / f"{i:03}-{j}.png")
            lines.append(json.dumps({"file_name": f"{i:03}-{j}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def moved(image: Image.Image, rng: Random) -> Image.Image:
    """Return a picture, mirrored half of the time, at a random size and place on its own background."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    inner = np.zeros((SIZE, SIZE), dtype=bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    background = np.median(np.asarray(image)[~inner], axis=0)
    side = round(SIZE * rng.uniform(0.5, 1))
    canvas = Image.new("RGB", image.size, tuple(int(level) for level in background))
    corner = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), corner)
    return canvas


def measured(
    sd: sdkit.StableDiffusion, control: sdkit.ControlNet, folder: Path, sheet: Path
) -> dict[str, dict[str, float]]:
    """Draw each picture of a folder by its edges, and return the agreement of edges.

    Also write a sheet of the first twelve. Its rows are the pictures, their edges, and then, with the caption, drawings
    that follow these edges, drawings that follow other edges, and drawings without a ControlNet; and the same with an
    empty caption.
    """
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    originals, captions = [read(folder / row["file_name"]) for row in rows], [row["text"] for row in rows]
    edges = [canny(image) for image in originals]
    others = edges[5:] + edges[:5]
    found: dict[str, dict[str, float]] = {}
    shown = [originals, edges]
    for name, texts in (("with the caption", captions), ("with an empty caption", [""] * len(captions))):
        options = {"seed": range(len(texts)), **DRAWN}
        following, shuffled = (sd(texts, controlnet=control, control_image=one, **options) for one in (edges, others))
        plain = sd(texts, **options)
        found[name] = {
            "following": agreement(following, edges),
            "shuffled": agreement(shuffled, edges),
            "shuffled, to its own edges": agreement(shuffled, others),
            "no ControlNet": agreement(plain, edges),
        }
        shown += [following, shuffled, plain]
    grid([image for row in shown for image in row[:12]], 12).save(sheet)
    return found


def agreement(images: Sequence[Image.Image], edges: Sequence[Image.Image]) -> float:
    """Return the mean IoU of images' edges with given ones."""
    return float(np.mean([iou(on(canny(image)), on(given)) for image, given in zip(images, edges, strict=True)]))


def on(edges: Image.Image) -> npt.NDArray[np.bool_]:
    return np.asarray(edges.convert("L")) > 0


def iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Return the IoU of two edge maps (H, W). A pixel is shared if the other map has one within a pixel."""
    shared = ((a & thickened(b)).sum() + (b & thickened(a)).sum()) / 2
    return float(shared / max(1.0, a.sum() + b.sum() - shared))


def thickened(edges: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels (H, W) that have an edge within a pixel, also diagonally."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(edges, 1), (3, 3))
    near: npt.NDArray[np.bool_] = windows.any((2, 3))
    return near


if __name__ == "__main__":
    main()
