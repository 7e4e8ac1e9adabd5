"""Inpainting: only the inside of a mask is drawn anew.

With any model (4 channels), the predicted image and noise are those of the original outside the mask, so that the
latents there follow the noised original at each step (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, eq. 8;
Avrahami et al. 2023, https://arxiv.org/abs/2206.02779). A U-Net that was trained to paint into images (9 channels) is
given the mask and the latents of the image without the masked part (Rombach et al. 2022, section 4.5). Both ways end in
pixels: each pixel outside the mask is that of the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit.arguments import number, whole_number
from sdkit.diffusion.schedule import Predict, Prediction
from sdkit.errors import ArgumentError, ImageError
from sdkit.images import Images, read, to_rgb, to_tensors
from sdkit.pipelines.image_to_image import (
    check_inputs,
    check_number,
    check_strength,
    for_each_image,
    read_images,
    resized,
)
from sdkit.pipelines.steps import check_side

if TYPE_CHECKING:
    from sdkit.pipelines.settings import DrawingSettings

LARGEST_BLUR = 512
"""Largest `mask_blur`, in pixels."""
LONGEST = 4
"""Longest side of an enlarged region, in sides of the model's training images."""
CELL = 8
"""The side of the enlarged region is a multiple of this, so that no latent shows padding."""

Box = tuple[int, int, int, int]
"""Top, left, bottom, and right of a region, in pixels; bottom and right are outside."""


def check_mask_blur(blur: float) -> float:
    """Return the blur of a mask's edge. Raise ArgumentError unless it is a number from 0 to `LARGEST_BLUR`."""
    return number("mask_blur", blur, 0, LARGEST_BLUR)


def check_padding(padding: int | None) -> int | None:
    """Return the padding of the masked region. Raise ArgumentError unless it is None or a whole number from 0."""
    return None if padding is None else whole_number("padding_mask_crop", padding, 0)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Images to draw on, and what of them is drawn anew.

    Attributes:
        whole: (N, 3, H, W) in [-1, 1], the images.
        whole_mask: (N, 1, H, W), 1 where pixels are drawn anew and 0 where they are kept; None draws all of them.
        box: The region that is drawn, enlarged; None draws the whole image.
        size: Height and width in pixels at which it is drawn.
        strength: Share of the steps that are made, in (0, 1].
        blur: Standard deviation in pixels of the blur of the mask's edge.
    """

    whole: Tensor
    whole_mask: Tensor | None
    box: Box | None
    size: tuple[int, int]
    strength: float
    blur: float

    @property
    def images(self) -> Tensor:
        """The region to draw, (N, 3, h, w) at the size at which it is drawn."""
        return self.whole if self.box is None else resized(cropped(self.whole, self.box), self.size)

    @property
    def mask(self) -> Tensor | None:
        """The mask of that region, (N, 1, h, w)."""
        if self.box is None or self.whole_mask is None:
            return self.whole_mask
        return resized_mask(cropped(self.whole_mask, self.box), self.size)

    @property
    def anew(self) -> bool:
        """Whether the masked part starts from pure noise, as if nothing had been there."""
        return self.whole_mask is not None and self.strength == 1

    def finished(self, pixels: Tensor) -> Tensor:
        """Put what was drawn into the images. Outside the mask, the result has exactly the pixels of the images.

        Args:
            pixels: (N, 3, h, w) in [-1, 1], as drawn.

        Returns:
            (N, 3, H, W) in [-1, 1].
        """
        if self.whole_mask is None:
            return pixels
        top, left, bottom, right = self.box or (0, 0, *self.whole.shape[2:])
        drawn = self.whole.clone()
        drawn[:, :, top:bottom, left:right] = resized(pixels, (bottom - top, right - left))
        share = feathered(self.whole_mask, self.blur)
        return torch.where(share > 0, share * drawn + (1 - share) * self.whole, self.whole)


def open_canvas(
    image: Images, mask_image: Any, settings: DrawingSettings, *, prompts: int, copies: int, side: int
) -> Canvas:
    """Read the images and masks of a call, and bring them to the size at which they are drawn.

    Args:
        image: The argument `image` of the call.
        mask_image: Its argument `mask_image`; None draws all of the image.
        settings: How to draw.
        prompts: Number of prompts.
        copies: Number of images of each prompt.
        side: Side in pixels of the model's training images, for a region that is enlarged.

    Raises:
        ImageError: Something is no image, or is too small or too large.
        ArgumentError: The mask is empty, or of another size; or arguments contradict each other.
    """
    check_inputs(settings, image=True, mask=mask_image is not None)
    check_strength(settings.strength)
    for name, pixels in (("height", settings.height), ("width", settings.width)):
        if pixels is not None:
            check_side(name, pixels)
    padding, blur = check_padding(settings.padding_mask_crop), check_mask_blur(settings.mask_blur)
    whole = read_images(image, prompts)
    mask = None if mask_image is None else read_masks(mask_image, (whole.shape[2], whole.shape[3]), prompts)
    box = None
    if mask is not None and padding is not None:
        if len(whole) > 1 or len(mask) > 1:
            raise ArgumentError("padding_mask_crop draws one region: give one image and one mask, or leave it out.")
        box = region(mask, padding, settings.height, settings.width)
        size = drawing_size(box, settings.height, settings.width, side)
    else:
        size = settings.height or whole.shape[2], settings.width or whole.shape[3]
        whole = resized(whole, size)
        mask = None if mask is None else resized_mask(mask, size)
    return Canvas(
        whole=for_each_image(whole, prompts, copies),
        whole_mask=None if mask is None else for_each_image(mask, prompts, copies),
        box=box,
        size=size,
        strength=settings.strength_used(mask=mask is not None),
        blur=blur,
    )


def read_masks(mask_image: Any, size: tuple[int, int], prompts: int) -> Tensor:
    """Read masks. White is drawn anew, and black is kept, as is what is transparent.

    Args:
        mask_image: An image, or one for each prompt: anything that `sdkit.images.to_tensors` takes, of which grey is
            split at its middle; or a tensor (H, W), (1, H, W), or (B, 1, H, W) of booleans or of numbers in [0, 1].
        size: Height and width of the images.
        prompts: Number of prompts.

    Returns:
        (1, 1, H, W) or (`prompts`, 1, H, W) of 0 and 1, float32.
    """
    masks = _masks(mask_image)
    check_number("masks", len(masks), prompts)
    for mask in masks:
        if tuple(mask.shape[1:]) != size:
            raise ArgumentError(
                f"the mask has {mask.shape[2]} x {mask.shape[1]} pixels, the image {size[1]} x {size[0]}: give a mask "
                "of the image's size."
            )
        if not mask.any():
            raise ArgumentError("the mask is black, so that nothing would be drawn: paint the part to draw white.")
    return torch.stack(masks)


def _masks(mask_image: Any) -> list[Tensor]:
    """Return each mask as (1, H, W), 0 or 1."""
    if isinstance(mask_image, (list, tuple)) and mask_image:
        return [mask for one in mask_image for mask in _masks(one)]
    if isinstance(mask_image, Tensor):
        return _masks_of(mask_image)
    if isinstance(mask_image, (str, Path)):
        mask_image = read(mask_image, background="black")
    elif isinstance(mask_image, Image.Image):
        mask_image = to_rgb(mask_image, background="black")
    return [(one.mean(0, keepdim=True) >= 0).float() for one in to_tensors(mask_image)]


def _masks_of(mask: Tensor) -> list[Tensor]:
    """Return the masks in a tensor (H, W), (1, H, W), or (B, 1, H, W)."""
    batch = mask.detach().cpu()[(None,) * max(0, 4 - mask.ndim)]
    if batch.ndim != 4 or batch.shape[1] != 1 or 0 in batch.shape:
        raise ImageError(f"a tensor of shape {tuple(mask.shape)} is no mask; give (H, W) or (B, 1, H, W).")
    if batch.is_complex():
        raise ImageError(f"a tensor of {mask.dtype} is no mask; give booleans, or numbers in [0, 1].")
    values = batch.float()
    if not bool(((values >= 0) & (values <= 1)).all()):  # false for NaN, too
        raise ImageError("a mask's numbers must be in [0, 1]: 1 where the image is drawn anew, 0 where it is kept.")
    return [*(values >= 0.5).float()]


def cropped(x: Tensor, box: Box) -> Tensor:
    """Return a region of (N, C, H, W)."""
    top, left, bottom, right = box
    return x[:, :, top:bottom, left:right]


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks (N, 1, H, W) to a height and a width, by the nearest pixel."""
    return F.interpolate(mask, size, mode="nearest-exact")


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Return the mask of the latents: a latent is drawn anew if any of its pixels is.

    diffusers takes the first pixel of each block of 8 x 8, which loses lines thinner than a block, and moves edges.

    Args:
        mask: (N, 1, H, W) of 0 and 1.
        factor: Side of the block of pixels that a latent stands for.

    Returns:
        (N, 1, ceil(H / factor), ceil(W / factor)) of 0 and 1.
    """
    return F.max_pool2d(mask, factor, ceil_mode=True)


def without_inside(images: Tensor, mask: Tensor) -> Tensor:
    """Return images with zeros, which are grey, inside their masks.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        mask: (N, 1, H, W) of 0 and 1.

    Returns:
        (N, 3, H, W). Where all images and all masks are views of one, so are the results, which the VAE encodes once.
    """
    if images.stride(0) == mask.stride(0) == 0:
        return (images[:1] * (1 - mask[:1])).expand(images.shape)
    return images * (1 - mask)


def feathered(mask: Tensor, blur: float) -> Tensor:
    """Return the share of what was drawn in each pixel: 0 outside the mask, rising to 1 inside its edge.

    The edge is blurred inwards alone, so that pixels outside the mask stay what they are.

    Args:
        mask: (N, 1, H, W) of 0 and 1.
        blur: Standard deviation in pixels of a Gaussian blur; 0 returns the mask.

    Returns:
        (N, 1, H, W) in [0, 1].
    """
    if blur == 0:
        return mask
    radius = math.ceil(3 * blur)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / blur) ** 2).float()
    kernel = (weights / weights.sum())[None, None, None]  # (1, 1, 1, K)
    padded = F.pad(mask, (radius,) * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))
    return mask * (2 * blurred - 1).clamp(0, 1)  # at a straight edge the blurred mask is 1/2


def region(mask: Tensor, padding: int, height: int | None, width: int | None) -> Box:
    """Return the region around the masked pixels, with `padding` pixels on each side where the image has them.

    With a height and a width, the region grows to their aspect ratio, as far as the image allows, as in A1111's "only
    masked".

    Args:
        mask: (1, 1, H, W), not empty.
        padding: Pixels around the mask.
        height: Height in pixels at which the region is drawn, or None.
        width: Width, or None.
    """
    rows, columns = (mask[0, 0].any(dim).nonzero() for dim in (1, 0))
    sides = [
        (max(0, int(found[0]) - padding), min(limit, int(found[-1]) + 1 + padding))
        for found, limit in ((rows, mask.shape[2]), (columns, mask.shape[3]))
    ]
    (top, bottom), (left, right) = sides
    if height is not None and width is not None:
        top, bottom = _grown(top, bottom, round((right - left) * height / width), mask.shape[2])
        left, right = _grown(left, right, round((bottom - top) * width / height), mask.shape[3])
    return top, left, bottom, right


def _grown(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """Grow the interval [low, high) to a length on both sides, within [0, limit). One that is longer is unchanged."""
    length = min(max(length, high - low), limit)
    low = min(max(0, low - (length - (high - low)) // 2), limit - length)
    return low, low + length


def drawing_size(box: Box, height: int | None, width: int | None, side: int) -> tuple[int, int]:
    """Return the height and the width at which a region is drawn: the given ones, else those of the region's shape with
    about the number of pixels of the model's training images.

    Args:
        box: The region.
        height: Height in pixels; None follows from the region.
        width: Width, likewise.
        side: Side in pixels of the model's training images.
    """
    top, left, bottom, right = box
    scale = side / math.sqrt((bottom - top) * (right - left))
    scale = min(scale, LONGEST * side / max(bottom - top, right - left))  # a thin region would get very long
    own = [max(CELL, round(length * scale / CELL) * CELL) for length in (bottom - top, right - left)]
    return height or own[0], width or own[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Original:
    """Latents of images of which only a part is drawn anew.

    Attributes:
        z: (B, C, h, w), the scaled latents of the images.
        noise: Standard normal noise shaped like `z`, which sampling starts from.
        mask: (B, 1, h, w), 1 where latents are drawn anew, 0 where they are kept.
    """

    z: Tensor
    noise: Tensor
    mask: Tensor

    def __getitem__(self, index: list[int]) -> Original:
        """Select images of the batch."""
        return Original(z=self.z[index], noise=self.noise[index], mask=self.mask[index])

    def to(self, device: torch.device | str) -> Original:
        """Return the latents on a device."""
        return Original(z=self.z.to(device), noise=self.noise.to(device), mask=self.mask.to(device))

    def outside(self, drawn: Tensor) -> Tensor:
        """Return latents (B, C, h, w) with the original's outside the mask."""
        return torch.where(self.mask > 0, drawn, self.z)


def keep_outside(predict: Predict, original: Original) -> Predict:
    """Return a predictor that knows the image outside the mask: there x0 and eps are those of the original.

    A deterministic sampler then keeps the latents there at sqrt(a) z + sqrt(1 - a) noise, the noised original, at each
    step, as diffusers' pipeline sets them. A sampler that adds noise draws another noised original at each step.

    Args:
        predict: The predictor to change.
        original: The images' latents, on the predictor's device.
    """

    def predict_inside(x_t: Tensor, t: int) -> Prediction:
        prediction = predict(x_t, t)
        return prediction._replace(
            x0=torch.where(original.mask > 0, prediction.x0, original.z),
            eps=torch.where(original.mask > 0, prediction.eps, original.noise),
        )

    return predict_inside
