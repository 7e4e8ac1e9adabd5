"""A1111's description of an image, its "infotext": web pages and other readers find the prompt in it.

AUTOMATIC1111's stable-diffusion-webui stores it as the text chunk "parameters" of a PNG. `Generation` does not read it:
it names neither all settings nor the place of the model.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from sdkit import __version__
from sdkit.loading.tensors import SUFFIXES

if TYPE_CHECKING:
    from sdkit.pipelines.generation import Generation

KEY = "parameters"
"""Key of the text chunk."""
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m_sde": "DPM++ 2M SDE",
    "dpm++sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "tcd": "TCD",
}
"""Name of a sampler -> A1111's name of it. A1111 has neither DDPM nor TCD."""
SCHEDULES = {"karras": "Karras", "exponential": "Exponential"}
"""Spacing -> A1111's "Schedule type"."""


def infotext(generation: Generation) -> str:
    """Return a generation's prompt, negative prompt, and settings as A1111 writes them.

    As in A1111's `create_infotext`, the prompts stand as they are, on one line or several, and the settings in the last
    line. A value of a setting is quoted as JSON where it holds a comma, a colon, or a line break. Settings that are not
    known, since the model decides on them, are left out.
    """
    masked = generation.mask_image is not None
    sized = generation.height is not None and generation.width is not None
    settings: dict[str, Any] = {
        "Steps": generation.num_inference_steps,
        "Sampler": SAMPLERS.get(generation.sampler, generation.sampler),
        "Schedule type": SCHEDULES.get(generation.spacing or ""),
        "CFG scale": generation.guidance_scale,
        "Image CFG scale": generation.image_guidance_scale if generation.condition else None,
        "Seed": generation.seed,
        "Size": f"{generation.width}x{generation.height}" if sized else None,
        "Model": _model(generation.model),
        "Denoising strength": generation.strength_used(mask=masked) if generation.image else None,
        "Mask blur": generation.mask_blur if masked else None,
        "Clip skip": generation.clip_skip + 1 if generation.clip_skip else None,  # A1111 counts the last layer as 1
        "Eta DDIM": generation.eta or None,
        "Version": f"sdkit {__version__}",
    }
    negative = f"\nNegative prompt: {generation.negative_prompt}" if generation.negative_prompt else ""
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    return f"{generation.prompt}{negative}\n{last}".strip()


def _model(source: str) -> str:
    """Return the name of a model as A1111 shows it: the last part of its path, without the suffix of a file."""
    path = PurePath(source)
    return (path.stem if path.suffix in SUFFIXES else path.name) or source


def _quoted(value: Any) -> str:
    """Quote a value as A1111 does, if it holds a character that ends or separates settings."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text
