"""Image to image: sampling starts from the noised latents of an image (SDEdit, Meng et al. 2021,
https://arxiv.org/abs/2108.01073).

`strength` says how much noise: of n steps, the last round(strength * n) are made. The rest of the way is that of text
to image, and `StableDiffusion` calls these functions before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdkit.arguments import number
from sdkit.diffusion.samplers import Timesteps
from sdkit.errors import ArgumentError, ImageError
from sdkit.images import Images, to_pil, to_tensors
from sdkit.pipelines.steps import check_side

if TYPE_CHECKING:
    from sdkit.pipelines.settings import DrawingSettings


def check_strength(strength: float | None) -> float | None:
    """Return a strength. Raise ArgumentError unless it is None, or a number above 0 and at most 1."""
    if strength is None or number("strength", strength, 0, 1) > 0:
        return strength
    raise ArgumentError("strength must be above 0: at 0 the image would come back unchanged.")


def check_inputs(settings: DrawingSettings, *, image: bool, mask: bool) -> None:
    """Raise ArgumentError for a setting that belongs to an image or a mask which is not given.

    Args:
        settings: How to draw.
        image: Whether there is an image to start from.
        mask: Whether there is a mask.
    """
    if mask and not image:
        raise ArgumentError("mask_image belongs to an image; give it as image.")
    if settings.strength is not None and not image:
        raise ArgumentError("strength belongs to an image to start from; give one as image, or leave strength out.")
    used = {"mask_blur": settings.mask_blur != 0, "padding_mask_crop": settings.padding_mask_crop is not None}
    for name in used:
        if used[name] and not mask:
            raise ArgumentError(f"{name} belongs to a mask; give one as mask_image, or leave {name} out.")


def last_steps(timesteps: Timesteps, strength: float) -> Timesteps:
    """Return the last round(strength * n) of n steps, at least one.

    diffusers truncates the product instead, which loses a step where it falls just short of a whole number: 100 * 0.29
    is 28.999999999999996.

    Args:
        timesteps: n pairs (t, t_prev).
        strength: In (0, 1].
    """
    return timesteps[-max(1, round(strength * len(timesteps))) :]


def read_images(image: Images, prompts: int) -> Tensor:
    """Read the images to start from.

    Args:
        image: One image for all prompts, or one for each; see `sdkit.images.to_tensors`.
        prompts: Number of prompts.

    Returns:
        (1, 3, H, W) or (`prompts`, 3, H, W), float32 in [-1, 1], on the CPU.

    Raises:
        ImageError: Something is no image, or an image is too small or too large.
        ArgumentError: The images have several sizes, or their number is wrong.
    """
    images = [one.detach().cpu() for one in to_tensors(image)]
    check_number("images", len(images), prompts)
    check_one_size("images", images)
    try:
        for name, pixels in zip(("height", "width"), images[0].shape[1:], strict=True):
            check_side(name, pixels)
    except ArgumentError as error:
        raise ImageError(f"the image cannot be drawn on: its {error}") from error
    return torch.stack(images)


def check_one_size(what: str, images: Sequence[Tensor]) -> None:
    """Raise ArgumentError unless all of `what`, images (3, H, W), have one size."""
    sizes = sorted({(one.shape[1], one.shape[2]) for one in images})
    if len(sizes) > 1:
        (height, width), (other_height, other_width) = sizes[:2]
        raise ArgumentError(
            f"the {what} differ in size: {width} x {height} and {other_width} x {other_height} pixels; resize them, or "
            "draw them one by one."
        )


def check_number(what: str, n: int, prompts: int) -> None:
    """Raise ArgumentError unless there is one of `what`, or one for each prompt."""
    if n not in (1, prompts):
        raise ArgumentError(f"{n} {what} cannot serve {prompts} prompts: give one, or one for each.")


def resized(images: Tensor, size: tuple[int, int], filter: Any = Image.Resampling.LANCZOS) -> Tensor:
    """Resize images with 8 bits a channel, as diffusers does. Images of that size are returned unchanged.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        size: Height and width in pixels.
        filter: Pillow's filter.

    Returns:
        (N, 3, height, width) in [-1, 1].
    """
    height, width = size
    if tuple(images.shape[2:]) == size:
        return images
    return torch.stack(to_tensors([one.resize((width, height), filter) for one in to_pil(images)]))


def for_each_image(rows: Tensor, prompts: int, copies: int) -> Tensor:
    """Return (N, ...), the row of each of N = prompts * copies images, from one row for all prompts or one for each."""
    if len(rows) == 1:
        return rows.expand(prompts * copies, *rows.shape[1:])  # takes no memory
    return rows.repeat_interleave(copies, dim=0)
