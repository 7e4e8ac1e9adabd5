"""The four steps from a prompt to an image: `embed`, `start`, `denoise`, and `decode`.

`StableDiffusion` calls them in this order. To call them yourself, with `guided` in between:

    cond, uncond = embed(sd.text, ["a red apple", ""]).chunk(2)
    x_T = start([torch.Generator().manual_seed(0)], (4, 16, 16)).to(sd.unet.device)
    predict = guided(sd.unet, sd.schedule, cond, uncond, scale=1.5)
    z = denoise(predict, x_T, sd.schedule, sd.schedule.timesteps(30))
    images = decode(sd.vae, z, (128, 128))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from sdkit.arguments import LONGEST_SIDE, whole_number
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.samplers import Generators, Sampler, Step, Timesteps, ddim
from sdkit.diffusion.schedule import NoiseSchedule, Predict
from sdkit.errors import ArgumentError
from sdkit.networks.autoencoder import Autoencoder
from sdkit.networks.class_names import ClassNames
from sdkit.networks.text_encoder import TextEncoder
from sdkit.progress import progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image


def embed(
    text: TextEncoder,
    prompts: Sequence[str],
    *,
    clip_skip: int = 0,
    weighting: bool = False,
    chunks: int | None = None,
) -> Conditioning:
    """Encode the prompts of B images. A prompt that occurs several times is encoded once.

    Args:
        text: The text encoder.
        prompts: B prompts.
        clip_skip: Number of the encoder's last layers to skip; see `TextEncoder.encode`.
        weighting: Whether to read `(word:1.3)` as A1111 does; see `TextEncoder.encode`.
        chunks: Number k of chunks of tokens to pad to; None is that of the longest prompt.

    Returns:
        A condition with text embeddings (B, 77k, D). Of `ClassNames` it has labels (B,), or, if there are no classes,
        nothing.
    """
    if isinstance(text, ClassNames):
        text.check(prompts)
        return Conditioning(label=text.labels(prompts).to(text.device) if text.names else None)
    distinct = list(dict.fromkeys(prompts))
    embeddings = text.encode(distinct, clip_skip=clip_skip, weighting=weighting, chunks=chunks)
    return Conditioning(embeddings[[distinct.index(prompt) for prompt in prompts]])


def start(generators: Generators, shape: tuple[int, int, int], latents: Tensor | None = None) -> Tensor:
    """Draw the noise x_T that sampling starts from.

    Args:
        generators: One CPU generator for each of N images.
        shape: (C, h, w), the shape of one image's latents.
        latents: (N, C, h, w) standard normal noise to start from, in place of new noise.

    Returns:
        x_T (N, C, h, w), float32 on the CPU.

    Raises:
        ArgumentError: `latents` have another shape, or are not finite.
    """
    # Draw even if `latents` are given. The steps' noise comes from the same generators; without this draw it would
    # begin with the very numbers of `latents` that were drawn from the same seeds.
    drawn = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    if latents is None:
        return drawn
    if latents.shape != (len(generators), *shape):
        raise ArgumentError(
            f"latents must be of shape {(len(generators), *shape)} for these images, not {tuple(latents.shape)}."
        )
    if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
        raise ArgumentError("latents must be finite floating-point numbers: standard normal noise.")
    return latents.detach().float().cpu()


def denoise(
    predict: Predict,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    sampler: Sampler = ddim,
    generators: Generators | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Tensor:
    """Run a sampler to its end, with a progress bar.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w) noise, on the predictor's device.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        sampler: A function of `sdkit.samplers`, such as `ddim` or `dpmpp_2m`; `sampler_by_name` finds one by name.
        generators: One for each image, for the noise of the steps; None draws from torch's global generator.
        callback: Called with each `Step`.

    Returns:
        Latents (B, C, h, w), scaled as `VAE.encode` returns them.
    """
    steps = sampler(predict, x_T, schedule, timesteps, generators=generators, clip_x0=schedule.clip_x0)
    for step in progress(steps, total=len(timesteps), description="denoise"):
        if callback is not None:
            callback(step)
    return step.x


@overload
def decode(
    vae: Autoencoder,
    z: Tensor,
    size: tuple[int, int],
    *,
    output_type: Literal["pil"] = "pil",
    batch_size: int | None = None,
) -> list[Image.Image]: ...
@overload
def decode(
    vae: Autoencoder, z: Tensor, size: tuple[int, int], *, output_type: Literal["np"], batch_size: int | None = None
) -> npt.NDArray[np.uint8]: ...
@overload
def decode(
    vae: Autoencoder, z: Tensor, size: tuple[int, int], *, output_type: Literal["pt"], batch_size: int | None = None
) -> Tensor: ...
def decode(
    vae: Autoencoder,
    z: Tensor,
    size: tuple[int, int],
    *,
    output_type: Literal["pil", "np", "pt"] = "pil",
    batch_size: int | None = None,
) -> list[Image.Image] | npt.NDArray[np.uint8] | Tensor:
    """Decode latents and crop the images to their size.

    Args:
        vae: The autoencoder.
        z: (N, C, h, w) scaled latents.
        size: Height and width in pixels.
        output_type: "pil", "np", or "pt"; see `VAE.decode`.
        batch_size: Number of images decoded together; None fits it to their size.

    Returns:
        A list of N PIL images; uint8 (N, H, W, 3) for "np"; or float32 (N, 3, H, W) in [-1, 1] for "pt".
    """
    images: list[Image.Image] | npt.NDArray[np.uint8] | Tensor = vae.decode(
        z, size=size, output_type=output_type, batch_size=batch_size
    )
    return images


def check_side(name: str, pixels: int, smallest: int = 8) -> int:
    """Return an image's height or width in pixels. Raise ArgumentError below `smallest` or above `LONGEST_SIDE`."""
    return whole_number(name, pixels, smallest, LONGEST_SIDE)
