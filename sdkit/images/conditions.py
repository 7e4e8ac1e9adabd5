"""Images for a ControlNet to follow, made from other images without a network: edges, grey, outlines, and colours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdkit.arguments import number, whole_number
from sdkit.errors import ArgumentError
from sdkit.images.rgb import to_rgb

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

EVERY_SIDE = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
"""Steps to the eight neighbours of a pixel."""


def canny(image: Image.Image, *, low: float = 0.1, high: float = 0.2, sigma: float = 1.0) -> Image.Image:
    """Draw the edges of an image, white on black (Canny 1986, https://doi.org/10.1109/TPAMI.1986.4767851).

    An edge is where the gradient of the smoothed grey image is largest along its own direction. Edges above `high` are
    kept, and those above `low` that touch them.

    Args:
        image: An image of any mode.
        low: Lower threshold of the gradient. A step from black to white has a gradient of about 4 before smoothing,
            and of about 1.5 after it.
        high: Upper threshold, at least `low`.
        sigma: Standard deviation, in pixels, of the Gaussian that smooths the image; 0 does not smooth it.

    Raises:
        ArgumentError: A threshold or `sigma` is out of range.
    """
    low, high = number("low", low, 0), number("high", high, 0)
    if high < low:
        raise ArgumentError(f"high {high:g} must be at least low {low:g}.")
    smooth = _smoothed(_levels(image), number("sigma", sigma, 0, 100))
    down, right = _gradient(smooth, 0), _gradient(smooth, 1)
    thin = _thinned(np.hypot(down, right), down, right)
    return _drawn(_connected(thin >= high, (thin > 0) & (thin >= low)))


def grey(image: Image.Image) -> Image.Image:
    """Return an image without its colours, in mode RGB (luma of ITU-R BT.601)."""
    return to_rgb(image).convert("L").convert("RGB")


def outlines(image: Image.Image) -> Image.Image:
    """Draw the outlines of a mask or of a semantic map, white on black.

    A pixel is on an outline if one of its four neighbours has another colour. Outlines are thus two pixels wide, one on
    each side.

    Args:
        image: An image whose regions each have one colour, of any mode.
    """
    colours = np.asarray(to_rgb(image))
    beside = (colours[:, 1:] != colours[:, :-1]).any(2)  # (H, W - 1)
    below = (colours[1:] != colours[:-1]).any(2)  # (H - 1, W)
    edges = np.zeros(colours.shape[:2], dtype=bool)
    edges[:, 1:] |= beside
    edges[:, :-1] |= beside
    edges[1:] |= below
    edges[:-1] |= below
    return _drawn(edges)


def colour_blocks(image: Image.Image, size: int = 32) -> Image.Image:
    """Return an image with each block of `size` x `size` pixels in its mean colour.

    Args:
        image: An image of any mode.
        size: Side of a block in pixels. Blocks at the right and lower edges are smaller where it does not divide the
            image.
    """
    size = whole_number("size", size, 1)
    levels = np.asarray(to_rgb(image), dtype=np.float64)
    rows, columns = (np.arange(0, length, size) for length in levels.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(levels, rows, axis=0), columns, axis=1)
    heights, widths = (np.diff([*starts, n]) for starts, n in zip((rows, columns), levels.shape[:2], strict=True))
    means = np.rint(sums / (heights[:, None] * widths)[..., None]).astype(np.uint8)
    return Image.fromarray(means.repeat(heights, axis=0).repeat(widths, axis=1))


CONDITIONS = {"canny": canny, "grey": grey, "outlines": outlines, "colour_blocks": colour_blocks}
"""Name -> function that makes a condition of an image."""


def _levels(image: Image.Image) -> Array:
    """Return the grey levels (H, W) of an image in [0, 1]."""
    return np.asarray(to_rgb(image).convert("L"), dtype=np.float64) / 255


def _drawn(edges: Mask) -> Image.Image:
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def _smoothed(levels: Array, sigma: float) -> Array:
    """Smooth by a Gaussian, cut off at 4 sigma. At the borders, only pixels inside the image count."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return levels
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return _blurred(levels, weights) / _blurred(np.ones_like(levels), weights)


def _blurred(x: Array, weights: Array) -> Array:
    """Convolve (H, W) with symmetric weights along both axes; it is 0 outside the image."""
    radius = len(weights) // 2
    for axis in (0, 1):
        padding = [(radius, radius) if one == axis else (0, 0) for one in (0, 1)]
        x = np.lib.stride_tricks.sliding_window_view(np.pad(x, padding), len(weights), axis=axis) @ weights
    return x


def _gradient(x: Array, axis: int) -> Array:
    """Return Sobel's derivative of (H, W) along an axis, with the borders repeated."""
    x = np.pad(x, 1, mode="edge")
    across = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:] if axis == 0 else x[:-2] + 2 * x[1:-1] + x[2:]
    derivative: Array = across[2:] - across[:-2] if axis == 0 else across[:, 2:] - across[:, :-2]
    return derivative


def _thinned(magnitude: Array, down: Array, right: Array) -> Array:
    """Set a gradient's magnitude to 0 where it is no maximum along its direction, and at the borders.

    The values one step along the gradient and one step against it are interpolated between two neighbours each.

    Args:
        magnitude: (H, W), the length of the gradient.
        down: (H, W), its vertical component.
        right: (H, W), its horizontal component.
    """
    padded = np.pad(magnitude, 1)
    height, width = magnitude.shape

    def neighbour(i: int, j: int) -> Array:
        return padded[1 + i : 1 + i + height, 1 + j : 1 + j + width]

    steep, aligned = abs(down) > abs(right), down * right >= 0  # aligned: towards the lower right or the upper left
    longer = np.where(steep, abs(down), abs(right))
    share = np.divide(np.where(steep, abs(right), abs(down)), longer, out=np.zeros_like(longer), where=longer > 0)
    largest = np.ones_like(steep)
    for way in (1, -1):
        sideways = np.where(aligned, neighbour(0, way), neighbour(0, -way))
        straight = np.where(steep, neighbour(way, 0), sideways)
        diagonal = np.where(aligned, neighbour(way, way), neighbour(way, -way))
        largest &= diagonal * share + straight * (1 - share) <= magnitude
    inside = np.zeros_like(largest)
    inside[1:-1, 1:-1] = True
    return np.where(largest & inside, magnitude, 0)


def _connected(strong: Mask, weak: Mask) -> Mask:
    """Return the pixels of `weak` that are connected with a pixel of `strong` through `weak`, also diagonally."""
    width = weak.shape[1] + 2
    free = np.pad(weak, 1).ravel()
    steps = np.array([i * width + j for i, j in EVERY_SIDE])
    found = np.pad(strong & weak, 1).ravel()
    front = np.flatnonzero(found)
    while len(front):
        around = np.unique(front[:, None] + steps)
        front = around[free[around] & ~found[around]]
        found[front] = True
    return found.reshape(-1, width)[1:-1, 1:-1]
