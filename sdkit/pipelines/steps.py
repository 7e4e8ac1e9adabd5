"""The four steps from a prompt to an image: `embed`, `start`, `denoise`, and `decode`. `StableDiffusion` calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdkit.arguments import LONGEST_SIDE, number, one_of, whole_number
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.samplers import SAMPLERS, Generators, Step, Timesteps
from sdkit.diffusion.schedule import NoiseSchedule, Predict
from sdkit.errors import ArgumentError
from sdkit.networks.autoencoder import Autoencoder
from sdkit.networks.text_encoder import TextEncoder
from sdkit.progress import progress


def embed(
    text: TextEncoder,
    prompts: Sequence[str],
    *,
    clip_skip: int = 0,
    weighting: bool = False,
    chunks: int | None = None,
) -> Conditioning:
    """Encode one prompt for each of B images. Each different prompt is encoded once.

    Args:
        text: The text encoder.
        prompts: B prompts.
        clip_skip: See `TextEncoder.encode`, as for `weighting` and `chunks`.
        weighting: Whether to read (word:1.3) as A1111 does.
        chunks: Number of chunks of tokens to pad to; None is that of the longest prompt.

    Returns:
        A condition whose text is (B, 77k, D).
    """
    distinct = list(dict.fromkeys(prompts))
    embeddings = text.encode(distinct, clip_skip=clip_skip, weighting=weighting, chunks=chunks)
    return Conditioning(embeddings[[distinct.index(prompt) for prompt in prompts]])


def start(generators: Generators, shape: tuple[int, int, int], latents: Tensor | None = None) -> Tensor:
    """Draw the noise x_T that sampling starts from.

    Args:
        generators: One for each of N images, from which that image's noise comes.
        shape: (C, h, w) of one image's latents.
        latents: (N, C, h, w) standard normal noise to use in place of the generators'.

    Returns:
        x_T (N, C, h, w), float32 on the CPU.

    Raises:
        ArgumentError: `latents` are of another shape, or not finite.
    """
    # Draw even where `latents` are given: a sampler's own noise comes next from the same generators, and would
    # otherwise equal `latents` that were drawn from the same seeds.
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
    sampler: str = "ddim",
    eta: float = 0.0,
    generators: Generators | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Tensor:
    """Run a sampler to its end, with a progress bar.

    Args:
        predict: A predictor, as from `sdkit.guidance.guided`.
        x_T: (B, C, h, w) noise, on the predictor's device.
        schedule: The model's noise schedule.
        timesteps: Pairs (t, t_prev), as from `schedule.timesteps(n)`.
        sampler: "ddim", "ddpm", or "dpm++2m".
        eta: DDIM's share of DDPM's noise, from 0 to 1.
        generators: One for each image, for the noise of the steps; None is torch's global one.
        callback: Called with each `Step`.

    Returns:
        Latents (B, C, h, w), scaled as `VAE.encode` returns them.

    Raises:
        ArgumentError: The sampler is unknown, or does not take this `eta`.
    """
    check_sampler(sampler, eta)
    options: dict[str, Any] = {"eta": eta} if sampler == "ddim" else {}
    loop = SAMPLERS[sampler](
        predict, x_T, schedule, timesteps, generators=generators, clip_x0=schedule.clip_x0, **options
    )
    for step in progress(loop, total=len(timesteps), description=sampler):
        if callback is not None:
            callback(step)
    return step.x


def decode(
    vae: Autoencoder, z: Tensor, size: tuple[int, int], *, output_type: str = "pil", batch_size: int | None = None
) -> Any:
    """Decode latents and crop the images to their size.

    Args:
        vae: The autoencoder.
        z: (N, C, h, w) scaled latents.
        size: Height and width in pixels.
        output_type: "pil", "np", or "pt"; see `VAE.decode`.
        batch_size: Images decoded together; None fits it to their size.

    Returns:
        N images, as `VAE.decode` returns them.
    """
    return vae.decode(z, size=size, output_type=output_type, batch_size=batch_size)


def check_sampler(sampler: str, eta: float) -> None:
    """Raise ArgumentError for a sampler that does not exist, and for an `eta` that it does not take."""
    one_of("sampler", sampler, SAMPLERS)
    if number("eta", eta, 0, 1) and sampler != "ddim":
        raise ArgumentError(f"eta belongs to sampler 'ddim'; '{sampler}' has none.")


def check_side(name: str, pixels: int, smallest: int = 8) -> int:
    """Return the height or width of an image in pixels. Raise ArgumentError where no model draws images of it."""
    return whole_number(name, pixels, smallest, LONGEST_SIDE)
