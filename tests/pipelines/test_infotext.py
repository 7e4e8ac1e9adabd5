"""A1111's text in PNGs, read back by the rules of A1111's own parser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdkit
from sdkit import images
from sdkit.cli.jobs import generate_files
from sdkit.pipelines.generation import Generation

# From A1111's modules/infotext_utils.py (commit 82a973c0, version 1.10.1).
RE_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parsed(text: str) -> dict[str, str]:
    """Parse an infotext as A1111's `parse_generation_parameters` does: prompts line by line, then the last line."""
    *lines, last = text.strip().split("\n")
    if len(RE_PARAM.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        negative = negative or line.startswith("Negative prompt:")
        prompts[negative].append(line.removeprefix("Negative prompt:").strip())
    found = {"Prompt": "\n".join(prompts[False]), "Negative prompt": "\n".join(prompts[True])}
    for name, value in RE_PARAM.findall(last):
        found[name] = json.loads(value) if value[0] == '"' and value[-1] == '"' else value
    return found


def stored(path: Path) -> str:
    return images.read_text(path)["parameters"]


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple on a blue background",
        'a "quoted" cat, with: colons, commas, and (brackets:1.3) \\ backslash',
        "first line\nsecond line, Steps: 3",
        "naïve 猫 ☕",
    ],
)
@pytest.mark.parametrize("negative", ["", "blurry, low quality\nsecond: line"])
def test_a1111_finds_the_prompt_and_the_settings(tmp_path: Path, prompt: str, negative: str) -> None:
    generation = Generation(
        prompt=prompt, negative_prompt=negative, seed=2**40, num_inference_steps=7, guidance_scale=4.5,
        sampler="dpm++2m", height=64, width=72, model='models/my, "model": 1.5.safetensors', clip_skip=1,
    )  # fmt: skip
    images.save(Image.new("RGB", (8, 8)), tmp_path / "x.png", generation.text())
    assert parsed(stored(tmp_path / "x.png")) == {
        "Prompt": prompt,
        "Negative prompt": negative,
        "Steps": "7",
        "Sampler": "DPM++ 2M",
        "CFG scale": "4.5",
        "Seed": str(2**40),
        "Size": "72x64",
        "Model": 'my, "model": 1.5',
        "Clip skip": "2",
        "Version": f"sdkit {sdkit.__version__}",
    }
    assert Generation.read(tmp_path / "x.png").prompt == prompt


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("emoji", "emoji"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5"),
        ("/models/v1-5-pruned.ckpt", "v1-5-pruned"),
        ("/models/sd.v1.5", "sd.v1.5"),
        ("/", "/"),
    ],
)
def test_the_name_of_the_model(source: str, name: str) -> None:
    assert parsed(Generation(prompt="a", model=source).text()["parameters"])["Model"] == name


def test_a_drawn_image_says_the_models_own_scale_and_size(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    (path,) = generate_files(sd, ["a cat"], tmp_path / "x.png", Generation(num_inference_steps=1, seed=3, eta=0.5))
    found = parsed(stored(path))
    assert found == found | {"Prompt": "a cat", "Seed": "3", "Size": "128x128", "Sampler": "DDIM", "Eta DDIM": "0.5"}
    assert float(found["CFG scale"]) == sd.guidance_scale


def test_strength_and_mask_blur_are_named_as_in_a1111() -> None:
    inputs = {"image": "photo.png", "mask_image": "mask.png"}
    found = parsed(Generation(prompt="a", **inputs, mask_blur=4.0).text()["parameters"])
    assert (found["Denoising strength"], found["Mask blur"]) == ("1.0", "4.0")
    found = parsed(Generation(prompt="a", image="photo.png").text()["parameters"])
    assert found["Denoising strength"] == "0.8"
    assert "Mask blur" not in found


def test_our_own_text_wins(tmp_path: Path) -> None:
    generation = Generation(prompt="ours", num_inference_steps=7)
    theirs: dict[str, Any] = {"parameters": "theirs\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8"}
    images.save(Image.new("RGB", (8, 8)), tmp_path / "x.png", generation.text() | theirs)
    assert Generation.read(tmp_path / "x.png") == generation
    images.save(Image.new("RGB", (8, 8)), tmp_path / "y.png", theirs)
    with pytest.raises(sdkit.ImageError, match="does not say how it was made"):
        Generation.read(tmp_path / "y.png")
