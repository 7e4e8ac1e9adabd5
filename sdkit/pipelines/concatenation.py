"""Conditions by concatenation in the pipeline: an image of which the U-Net reads the latents, or the colours at the
size of the latents, as further channels beside x_t (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3;
Brooks et al. 2023, https://arxiv.org/abs/2211.09800)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkit.diffusion.guidance import check_image_scale
from sdkit.errors import ArgumentError
from sdkit.images import Images, to_tensors
from sdkit.networks.concatenation import channels_of
from sdkit.pipelines.image_to_image import check_number, check_one_size, for_each_image, resized

if TYPE_CHECKING:
    from sdkit.networks.autoencoder import VAE
    from sdkit.networks.denoiser import UNet
    from sdkit.pipelines.settings import DrawingSettings


def check_condition_settings(settings: DrawingSettings, *, condition: bool) -> None:
    """Raise ArgumentError for an image guidance scale that is out of range, or belongs to no condition.

    Args:
        settings: How to draw.
        condition: Whether there is a condition.
    """
    if check_image_scale(settings.image_guidance_scale) != 1 and not condition:
        raise ArgumentError(
            "image_guidance_scale belongs to a condition; give one as condition, or leave image_guidance_scale out."
        )


def read_condition(
    condition: Images | None, unet: UNet, settings: DrawingSettings, *, prompts: int, copies: int, controls: bool
) -> Tensor | None:
    """Check the condition of a call, and read its images.

    Args:
        condition: One image for all prompts, or one for each; None is none.
        unet: The U-Net that it is for.
        settings: How to draw.
        prompts: Number of prompts.
        copies: Number of images of each prompt.
        controls: Whether there is a ControlNet.

    Returns:
        (`prompts` * `copies`, 3, H, W) in [-1, 1], on the CPU; None without a condition.

    Raises:
        ImageError: Something is no image.
        ArgumentError: The U-Net takes no condition, or needs one; or images have several sizes or a wrong number.
    """
    check_condition_settings(settings, condition=condition is not None)
    if condition is None:
        if unet.condition is not None:
            raise ArgumentError("this model draws from an image: give one as condition, or take a text-to-image model.")
        return None
    if unet.condition is None:
        own = "an image and a mask" if unet.inpaints else "no image beside the noise"
        raise ArgumentError(
            f"this model's U-Net takes {own}: leave condition out, or take a model that was trained with conditions."
        )
    if controls:
        raise ArgumentError("a ControlNet cannot act on a model that takes a condition: leave one of the two out.")
    images = [one.detach().cpu() for one in to_tensors(condition)]
    check_number("conditions", len(images), prompts)
    check_one_size("conditions", images)
    return for_each_image(torch.stack(images), prompts, copies)


def cut_out(images: Tensor, whole: tuple[int, int], box: tuple[int, int, int, int]) -> Tensor:
    """Return the region of conditions (N, 3, H, W) that is drawn, of a picture of which they show the whole.

    Args:
        images: The conditions.
        whole: Height and width of the picture.
        box: Top, left, bottom, and right of the region in it, in pixels.
    """
    top, left, bottom, right = box
    return _each(images, lambda one: resized(one, whole)[:, :, top:bottom, left:right])


def told(images: Tensor, kind: str, vae: VAE, size: tuple[int, int]) -> Tensor:
    """Return the channels that the U-Net reads beside x_t.

    Args:
        images: Conditions (N, 3, H, W) in [-1, 1]. They are resized to `size` if they have another.
        kind: "latents" or "map"; see `sdkit.UNet`.
        vae: The VAE, on the device that it computes on.
        size: Height and width of the drawing in pixels.

    Returns:
        (N, C', ceil(height / factor), ceil(width / factor)), on the CPU; see `channels_of`.
    """
    return _each(images, lambda one: channels_of([*resized(one, size)], kind, vae))


def _each(images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to each of N images, once if they are all one image that is repeated without memory."""
    if len(images) > 1 and images.stride(0) == 0:
        once = function(images[:1])
        return once.expand(len(images), *once.shape[1:])
    return torch.cat([function(one) for one in images.split(1)])
