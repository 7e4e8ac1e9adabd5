"""Energies for `sdkit.guidance.energy`: functions of the predicted clean image that are small where it is as it should
be. All of them look at pixels, and `pixels` of each turns x0 into them: `VAE.pixels`, which keeps the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.arguments import strings
from sdkit.errors import ArgumentError
from sdkit.images import Images, to_tensors
from sdkit.networks.clip import CLIP
from sdkit.networks.lpips import LPIPS

Energy = Callable[[Tensor], Tensor]
"""energy(x0) -> (B,), differentiable in x0 (B, C, h, w)."""


def text_energy(clip: CLIP, prompts: str | Sequence[str], pixels: Callable[[Tensor], Tensor]) -> Energy:
    """Return the energy of CLIP guidance: 1 - cos(image embedding, text embedding) (Nichol et al. 2021,
    https://arxiv.org/abs/2112.10741, section 2.4, with a CLIP of clean images on x0).

    Args:
        clip: The CLIP, on the device of the images: `CLIP.from_pretrained`, or `CLIP(model, tokenizer)` around one of
            transformers.
        prompts: The text of all images, or one for each.
        pixels: Turns x0 into pixels (B, 3, H, W) in [-1, 1]: `VAE.pixels`.

    Returns:
        energy(x0) -> (B,), from 0 to 2. The image is resized to the side that CLIP takes.
    """
    texts = strings("prompts", prompts)
    with torch.no_grad():
        wanted = clip.embed_texts(clip.tokenize(texts).to(clip.device))

    def energy(x0: Tensor) -> Tensor:
        _check_number("prompts", len(texts), len(x0))
        images = pixels(x0).to(clip.device, clip.dtype)
        resized = F.interpolate(images, (clip.side, clip.side), mode="bicubic", align_corners=False, antialias=True)
        return (1 - F.cosine_similarity(clip.embed_images(resized), wanted)).to(x0)

    return energy


def style_energy(image: Images, pixels: Callable[[Tensor], Tensor], *, lpips: LPIPS | None = None) -> Energy:
    """Return the style loss of Gatys et al. 2016 (https://arxiv.org/abs/1508.06576, eq. 4-5): the squared distance
    between the Gram matrices of features of the image and of a reference, averaged over layers.

    Gram matrices are divided by the number of positions, so that the reference may have another size.

    Args:
        image: The image whose style is wanted.
        pixels: Turns x0 into pixels (B, 3, H, W) in [-1, 1]: `VAE.pixels`.
        lpips: The network whose features are compared, on the device of the images; None is `LPIPS.from_pretrained()`,
            AlexNet where no weights of VGG, as in the paper, are at hand.

    Returns:
        energy(x0) -> (B,).

    Raises:
        ArgumentError: There is not one image.
        ImageError: The image cannot be read, or is too small for the network.
    """
    network = LPIPS.from_pretrained() if lpips is None else lpips
    reference = _one(image)
    with torch.no_grad():
        wanted = [_gram(h) for h in network.activations(reference.to(network.scale))]

    def energy(x0: Tensor) -> Tensor:
        found = [_gram(h) for h in network.activations(pixels(x0))]
        losses = [(a - b).square().mean((1, 2)) / 4 for a, b in zip(found, wanted, strict=True)]
        return torch.stack(losses).mean(0).to(x0)

    return energy


def image_energy(image: Images, pixels: Callable[[Tensor], Tensor], *, lpips: LPIPS | None = None) -> Energy:
    """Return the distance to a reference image: LPIPS if its network is given, or else the mean squared error.

    Args:
        image: The reference, one for all images or one for each, of the size of the drawing.
        pixels: Turns x0 into pixels (B, 3, H, W) in [-1, 1]: `VAE.pixels`.
        lpips: An LPIPS, on the device of the images; None takes the mean squared error.

    Returns:
        energy(x0) -> (B,).

    Raises:
        ImageError: Something is no image.
        ArgumentError: Later: the references have another size or number than the images.

    Example:
        >>> import sdkit, torch
        >>> vae = sdkit.VAE.from_pretrained("emoji")
        >>> distance = sdkit.guidance.image_energy(sdkit.images.read("photo.jpg").resize((64, 64)), vae.pixels)
        >>> distance(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1])
    """
    references = to_tensors(image)

    def energy(x0: Tensor) -> Tensor:
        drawn = pixels(x0)
        _check_number("references", len(references), len(drawn))
        if any(one.shape != drawn.shape[1:] for one in references):
            height, width = drawn.shape[2:]
            raise ArgumentError(f"the reference must have {width} x {height} pixels, as the drawing; resize it.")
        wanted = torch.stack(list(references)).to(drawn).expand(drawn.shape)
        distances = (drawn - wanted).square().mean((1, 2, 3)) if lpips is None else lpips(drawn, wanted)
        return distances.to(x0)

    return energy


def _gram(h: Tensor) -> Tensor:
    """Return the Gram matrices (B, C, C) of features (B, C, h, w), divided by the number of positions."""
    rows = h.flatten(2)
    return rows @ rows.transpose(1, 2) / rows.shape[2]


def _one(image: Images) -> Tensor:
    """Return one image (1, 3, H, W). Raise ArgumentError if there are several."""
    images = to_tensors(image)
    if len(images) != 1:
        raise ArgumentError(f"a style is that of one image, not of {len(images)}; give one.")
    return images[0][None]


def _check_number(what: str, n: int, images: int) -> None:
    """Raise ArgumentError unless there is one of `what`, or one for each image."""
    if n not in (1, images):
        raise ArgumentError(f"{n} {what} cannot serve {images} images: give one, or one for each.")
