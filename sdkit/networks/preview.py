"""Fast previews of latents: a linear map to RGB, or a tiny decoder.

The maps that ship are `SD1` and `EMOJI`. `fit_rgb_map` makes one for another VAE. To fit that of the embedded model
again, on 96 pictures that it draws (a minute on a CPU):

    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    texts = [p.text for p in sdkit.recipes.emoji.asked.open_prompts(96, background=True)]
    z = sd(texts, num_inference_steps=10, output_type="latent")
    print(sdkit.latents.fit_rgb_map([(z, sd.vae.decode(z, output_type="pt"))]))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit.diffusion.samplers import Step
from sdkit.errors import ArgumentError
from sdkit.images import grid, to_pil, to_tensors
from sdkit.images.convert import Images
from sdkit.networks.autoencoder import Autoencoder

SD1_SCALE = 0.18215
"""Scale of the VAE of Stable Diffusion 1.x and 2.x."""


@dataclass(frozen=True, kw_only=True)
class RGBMap:
    """A linear map from scaled latents to RGB at their own size: rgb = z @ weight + bias, at each position.

    Attributes:
        weight: C rows of three numbers, which are the RGB of one unit of each channel.
        bias: RGB of latents of zeros, in [-1, 1].
        r2: Share of the variance of RGB that the map explains on the pictures that it was fitted to; None if unknown.
    """

    weight: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    r2: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return RGB (B, 3, h, w) in [-1, 1], float32, of scaled latents (B, C, h, w).

        Raises:
            ArgumentError: The latents have another shape, or another number of channels.
        """
        if z.ndim != 4 or z.shape[1] != len(self.weight):
            raise ArgumentError(
                f"this preview takes latents (B, {len(self.weight)}, h, w), not {tuple(z.shape)}: they are another "
                "VAE's; fit a map for it with sdkit.latents.fit_rgb_map."
            )
        weight, bias = z.new_tensor(self.weight, dtype=torch.float32), z.new_tensor(self.bias, dtype=torch.float32)
        rgb = torch.einsum("bchw,cr->brhw", z.detach().float(), weight) + bias[:, None, None]
        return rgb.clamp(-1, 1)


SD1 = RGBMap(weight=((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)))
"""The map that people use for Stable Diffusion 1.x, found by keturn for 1.4; 2.x has the same VAE. Source:
https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204/2"""
EMOJI = RGBMap(
    weight=((0.4670, 0.0526, -0.3906), (0.3129, 0.1283, 0.8308), (-0.4694, -0.1989, 0.1202), (0.2200, 0.6046, 0.3742)),
    bias=(0.4733, -0.1583, 0.2404),
    r2=0.9307,
)
"""The map of the embedded model's VAE, fitted with the commands in this module's docstring."""
EMOJI_IDENTITY = "1ab3cebb762753d3"
"""Fingerprint of the encoder that `EMOJI` belongs to."""
PIXELS = RGBMap(weight=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), r2=1.0)
"""The map of the pixel identity."""


def fit_rgb_map(pairs: Iterable[tuple[Tensor, Images]]) -> RGBMap:
    """Fit a linear map from latents to RGB by least squares.

    Args:
        pairs: Batches of scaled latents (B, C, h, w), and their B images, as `sdkit.images.to_tensors` takes them. The
            images are averaged over the square of each position. An iterator will do: one batch is held at a time.

    Returns:
        The map, with its R^2 over all three channels of RGB.

    Raises:
        ArgumentError: There are no pairs, or the numbers of latents, images, or channels differ.

    Example:
        >>> import sdkit
        >>> vae = sdkit.VAE.from_pretrained("emoji", device="cpu")
        >>> fitted = sdkit.latents.fit_rgb_map([(vae.encode("photo.jpg", sample=False), "photo.jpg")])
        >>> fitted.r2 > 0.8
        True
    """
    moments: Tensor | None = None
    for z, images in pairs:
        rows = _rows(z, images)
        products = rows.T @ rows  # of [z, 1, rgb] with itself: all that least squares needs
        if moments is not None and moments.shape != products.shape:
            raise ArgumentError("the latents to fit a preview to differ in their channels; take those of one VAE.")
        moments = products if moments is None else moments + products
    if moments is None:
        raise ArgumentError("there are no pairs of latents and images to fit a preview to; give at least one.")
    inputs, targets, squares = moments[:-3, :-3], moments[:-3, -3:], moments[-3:, -3:].diagonal()
    solution = torch.linalg.pinv(inputs, hermitian=True) @ targets  # (C + 1, 3); channels may be collinear
    sums, count = targets[-1], inputs[-1, -1]  # the column of ones gives the sums over all positions
    error = squares.sum() - (solution * targets).sum()
    total = (squares - sums**2 / count).sum()
    *weight, bias = ((red, green, blue) for red, green, blue in solution.tolist())
    return RGBMap(weight=tuple(weight), bias=bias, r2=float(1 - error / total) if total > 0 else None)


def _rows(z: Tensor, images: Images) -> Tensor:
    """Return one row [z, 1, rgb] (C + 4,), float64, for each position of a batch."""
    pixels = to_tensors(images)
    if not isinstance(z, Tensor) or z.ndim != 4 or len(z) != len(pixels):
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ArgumentError(f"{len(pixels)} image(s) need latents ({len(pixels)}, C, h, w), not {shape}.")
    size = (z.shape[2], z.shape[3])
    rgb = torch.stack([F.adaptive_avg_pool2d(x.detach().cpu().double(), size) for x in pixels])
    latents = z.detach().cpu().double()
    rows = torch.cat([latents, torch.ones_like(latents[:, :1]), rgb], dim=1)
    if not bool(torch.isfinite(rows).all()):
        raise ArgumentError("the latents to fit a preview to must be finite numbers.")
    return rows.movedim(1, -1).flatten(0, -2)


def rgb_map_of(vae: Autoencoder) -> RGBMap:
    """Return the shipped map for a VAE's latents.

    Raises:
        ArgumentError: None ships for it.
    """
    if vae.identity == EMOJI_IDENTITY:
        return EMOJI
    if vae.factor == 1 and vae.channels == 3:
        return PIXELS
    # Fine-tuned VAEs of SD have other fingerprints; their latents still mean the same, or no U-Net would fit.
    if vae.channels == 4 and vae.shift == 0 and math.isclose(vae.scale, SD1_SCALE, rel_tol=1e-4):
        return SD1
    raise ArgumentError(
        f"no preview ships for the VAE of {vae.name!r}; fit one with sdkit.latents.fit_rgb_map, or give a tiny "
        "autoencoder for its latents."
    )


def previewer(vae: Autoencoder, by: RGBMap | Autoencoder | None = None) -> Callable[[Step], Image.Image]:
    """Return a function that shows the image that is forming, as the callback of a pipeline or a sampler gets it.

    Args:
        vae: The VAE whose latents are sampled.
        by: What draws the preview: an `RGBMap`; or a tiny autoencoder with the same latents, such as
            `sdkit.VAE.from_pretrained("madebyollin/taesd")` for Stable Diffusion 1.x, which shows details and takes
            longer. None takes the map that ships.

    Returns:
        preview(step): the prediction of the clean image at this step, at the image's size; a grid if a batch has
        several images.

    Raises:
        ArgumentError: No map ships for this VAE, or `by` is for latents of other channels or size.

    Example:
        >>> import sdkit
        >>> sd = sdkit.StableDiffusion.from_pretrained("emoji")
        >>> preview = sdkit.latents.previewer(sd.vae)
        >>> shown = []  # in a notebook: lambda step: (clear_output(wait=True), display(preview(step)))
        >>> images = sd("a cat", num_inference_steps=4, callback=lambda step: shown.append(preview(step)))
        >>> len(shown), shown[0].size
        (4, (128, 128))
    """
    draw = rgb_map_of(vae) if by is None else by
    if isinstance(draw, RGBMap):
        return lambda step: _enlarged(draw(step.x0), vae.factor)
    if (draw.channels, draw.factor) != (vae.channels, vae.factor):
        raise ArgumentError(
            f"the VAE of {draw.name!r} decodes latents of {draw.channels} channels and {draw.factor} pixels a side, "
            f"these have {vae.channels} and {vae.factor}: it cannot preview them; give another."
        )
    tiny = draw
    return lambda step: grid(tiny.decode(step.x0, output_type="pil"))


def _enlarged(rgb: Tensor, factor: int) -> Image.Image:
    """Return a batch (B, 3, h, w) as a grid of images, enlarged `factor` times.

    A preview must cost little beside a step: images are put together while they are small, and Pillow enlarges them.
    """
    images, _, height, width = rgb.shape
    columns = math.ceil(math.sqrt(images))
    rows = math.ceil(images / columns)
    cells = F.pad(rgb, (0, 0, 0, 0, 0, 0, 0, rows * columns - images), value=1.0)  # white
    sheet = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
    (small,) = to_pil(sheet)
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.BILINEAR)
