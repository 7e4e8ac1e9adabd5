"""Conversion of images between PIL images, uint8 arrays, and float tensors.

There are three representations:

- PIL image of any mode. `to_rgb` makes it 8-bit RGB, upright, and opaque.
- uint8 array (H, W), (H, W, 1|3|4), or (B, H, W, 1|3|4), in [0, 255].
- float tensor (3, H, W) or (B, 3, H, W), in [-1, 1], as the networks take it: x = uint8 / 127.5 - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sdkit.arguments import one_of
from sdkit.errors import ImageError
from sdkit.images.image_file import read
from sdkit.images.rgb import to_rgb

OneImage: TypeAlias = "Image.Image | npt.NDArray[Any] | Tensor | str | Path"
"""An image, a batch of images, or the path of an image."""
Images: TypeAlias = "OneImage | Sequence[OneImage]"
"""Anything that holds images; see `to_tensors`."""

OUTPUT_TYPES = ("pil", "np", "pt")
"""Types of output that `from_tensors` makes."""
TOLERANCE = 1e-2
"""Largest excess over [-1, 1] that a tensor may have, from rounding in half precision or resampling."""


def to_tensors(images: Images) -> list[Tensor]:
    """Convert anything that holds images to float32 tensors (3, H, W) in [-1, 1], one per image.

    Args:
        images: A PIL image, array, tensor, path, or a list of these; sizes may differ. Paths are read, and transparency
            is laid over white. Tensors keep their device and their gradient, and may exceed [-1, 1] by 1e-2.

    Raises:
        ImageError: Something is no image, or has another range of values.
    """
    return [_to_tensor(image) if isinstance(image, Image.Image) else image for image in flat(images)]


def _to_tensor(rgb: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)  # (3, H, W)
    return levels.contiguous().float() / 127.5 - 1


def flat(images: Images) -> list[Image.Image | Tensor]:
    """Return one entry per image: a tensor stays a tensor, float32 (3, H, W); anything else becomes an RGB image."""
    if isinstance(images, Image.Image):
        return [to_rgb(images)]
    if isinstance(images, (str, Path)):
        return [read(images)]
    if isinstance(images, np.ndarray):
        return [*_from_array(images)]
    if isinstance(images, Tensor):
        return [*_checked(images)]
    if not isinstance(images, (list, tuple)):
        raise ImageError(f"type {type(images).__name__} is no image; give PIL images, arrays, tensors or paths.")
    if not images:
        raise ImageError("the list of images is empty; give at least one.")
    return [image for item in images for image in flat(item)]


def _from_array(array: npt.NDArray[Any]) -> list[Image.Image]:
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype} has no certain range; give uint8 in [0, 255], "
            "or a float tensor (B, 3, H, W) in [-1, 1]."
        )
    batch = array[..., None] if array.ndim == 2 else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape:
        raise ImageError(f"an array of shape {array.shape} is no image; give (H, W), (H, W, 1|3|4), (B, H, W, 1|3|4).")
    return [to_rgb(Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one)) for one in batch]


def _checked(x: Tensor) -> Tensor:  # -> (B, 3, H, W)
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or batch.shape[1] != 3 or 0 in batch.shape:
        raise ImageError(f"a tensor of shape {tuple(x.shape)} is no image; give (3, H, W) or (B, 3, H, W), RGB.")
    if not x.is_floating_point():
        raise ImageError(f"a tensor of {x.dtype} is not in [-1, 1]; convert values in [0, 255] by x / 127.5 - 1.")
    low, high = (float(bound) for bound in torch.aminmax(batch.detach().float()))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ImageError("a tensor has values that are not finite; an image's are in [-1, 1].")
    if low < -1 - TOLERANCE or high > 1 + TOLERANCE:
        raise ImageError(
            f"a tensor has values from {low:.4g} to {high:.4g}, outside [-1, 1]; "
            "convert values in [0, 255] by x / 127.5 - 1, in [0, 1] by x * 2 - 1, and clamp what is slightly outside."
        )
    return batch.float()


def to_uint8(x: Tensor) -> npt.NDArray[np.uint8]:
    """Convert a float tensor to 8-bit levels, rounded and clamped.

    This inverts `to_tensors` exactly for all 256 levels, even if the tensor was stored as float16 or bfloat16 in
    between. In [-1, 1], bfloat16 errs by at most 1/512, which is a quarter of the step between two levels. The
    arithmetic here is float32; in bfloat16 it would change levels.

    Args:
        x: Float tensor (B, 3, H, W) or (3, H, W) in [-1, 1].

    Returns:
        uint8 array (B, H, W, 3).

    Raises:
        ImageError: The tensor has another shape or dtype, or holds NaN.
    """
    if not x.is_floating_point() or x.ndim not in (3, 4) or x.shape[-3] != 3:
        raise ImageError(f"a tensor {tuple(x.shape)} of {x.dtype} is no image; give float (B, 3, H, W) in [-1, 1].")
    batch = x.detach().float() if x.ndim == 4 else x.detach().float()[None]
    if torch.isnan(batch).any():
        raise ImageError("a tensor has values that are not numbers (NaN), which no pixel can show.")
    levels = ((batch + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(x: Tensor) -> list[Image.Image]:
    """Convert a float tensor (B, 3, H, W) or (3, H, W) in [-1, 1] to RGB images; see `to_uint8`."""
    return [Image.fromarray(levels) for levels in to_uint8(x)]


def from_tensors(images: Sequence[Tensor], output_type: str) -> Any:
    """Convert tensors (3, H, W) in [-1, 1] to an output type, one of `OUTPUT_TYPES`.

    Returns:
        "pil": a list of RGB images. "np": a uint8 array (B, H, W, 3). "pt": a tensor (B, 3, H, W). If sizes differ,
        "np" and "pt" are lists of (H, W, 3) and (3, H, W).

    Raises:
        ArgumentError: `output_type` is unknown.
    """
    one_of("output_type", output_type, OUTPUT_TYPES)
    same_size = len({image.shape for image in images}) == 1
    if output_type == "pt":
        return torch.stack(list(images)) if same_size else list(images)
    levels = [to_uint8(image)[0] for image in images]
    if output_type == "np":
        return np.stack(levels) if same_size else levels
    return [Image.fromarray(one) for one in levels]
