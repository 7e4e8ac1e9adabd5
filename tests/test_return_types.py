"""Return types depend on `output_type`. The types that mypy infers in this file must equal those of the returned
values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

import sdkit
from sdkit.pipelines.steps import decode


def test_call(sd: sdkit.StableDiffusion) -> None:
    pil = sd("a cat", num_inference_steps=1, height=32, width=32)
    assert_type(pil, list[Image.Image])
    assert isinstance(pil[0], Image.Image)
    array = sd("a cat", num_inference_steps=1, height=32, width=32, output_type="np")
    assert_type(array, npt.NDArray[np.uint8])
    assert array.dtype == np.uint8
    options = sd("a cat", num_inference_steps=1, height=32, width=32, spacing="leading", batch_size=1)
    assert_type(options, list[Image.Image])
    pixels = sd("a cat", num_inference_steps=1, height=32, width=32, output_type="pt")
    assert_type(pixels, Tensor)
    assert pixels.shape == (1, 3, 32, 32)
    latents = sd("a cat", num_inference_steps=1, height=32, width=32, output_type="latent")
    assert_type(latents, Tensor)
    assert latents.shape == (1, 4, 4, 4)


def test_decode(sd: sdkit.StableDiffusion) -> None:
    z = torch.zeros(1, 4, 4, 4)
    assert_type(decode(sd.vae, z, (32, 32)), list[Image.Image])
    assert_type(decode(sd.vae, z, (32, 32), output_type="np"), npt.NDArray[np.uint8])
    assert_type(decode(sd.vae, z, (32, 32), output_type="pt"), Tensor)
