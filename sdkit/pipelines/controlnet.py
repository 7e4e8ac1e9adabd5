"""ControlNets in the pipeline: their images and settings, and a model that takes their outputs.

`controlled` turns a model into one that runs ControlNets before it in each step. Guidance, samplers, and all that is
built on them call the new model like the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.arguments import flag, number
from sdkit.diffusion.conditioning import Conditioning, Residuals
from sdkit.diffusion.guidance import Model
from sdkit.diffusion.samplers import Timesteps
from sdkit.errors import ArgumentError
from sdkit.images import Images, to_tensors
from sdkit.networks.controlnet import ControlNet
from sdkit.networks.denoiser import UNet
from sdkit.pipelines.image_to_image import check_number, check_one_size, for_each_image, resized

if TYPE_CHECKING:
    from sdkit.pipelines.settings import DrawingSettings

ControlNets: TypeAlias = ControlNet | Sequence[ControlNet]
"""One ControlNet, or several."""
SHARED = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
"""Settings that take one number for all ControlNets, or one for each."""
OWN = (*SHARED, "guess_mode")
"""Settings of `DrawingSettings` that belong to ControlNets."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One ControlNet of a call, with its images.

    Attributes:
        network: The ControlNet.
        images: (N, 3, H, W) in [0, 1], on the CPU.
        scale: Factor of its outputs.
        start: Share of the steps before which it does nothing, in [0, 1].
        end: Share of the steps after which it does nothing, in [0, 1].
        guess_mode: Whether it acts on the conditional half of a guided batch only, and less at fine levels.
    """

    network: ControlNet
    images: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    def __getitem__(self, index: list[int]) -> Control:
        """Select images of the batch, and move them to the ControlNet's device."""
        return replace(self, images=self.images[index].to(self.network.device))

    def acts(self, step: int, steps: int) -> bool:
        """Return whether it does anything in a step, counted from 0. As in diffusers, the whole step must lie between
        start and end."""
        return self.scale != 0 and step / steps >= self.start and (step + 1) / steps <= self.end

    def residuals(self, x_t: Tensor, t: int, cond: Conditioning) -> Residuals:
        """Return its outputs for x_t (n B, 4, h, w), where B is its number of images.

        A guided batch is [uncond, cond], and n is 2. In guess mode, the outputs of the first half are zero.
        """
        guess, n = self.guess_mode or self.network.pools, len(x_t) // len(self.images)
        network: Any = torch.inference_mode()(self.network)
        if guess and n == 2:
            half = len(self.images)
            down, mid = network(x_t[half:], t, cond[half:], self.images, scale=self.scale, guess_mode=True)
            return tuple(_after_zeros(one) for one in down), _after_zeros(mid)
        images = self.images.repeat(n, 1, 1, 1)
        residuals: Residuals = network(x_t, t, cond, images, scale=self.scale, guess_mode=guess)
        return residuals


def check_control_settings(settings: DrawingSettings) -> None:
    """Raise ArgumentError for settings of ControlNets that are out of range."""
    for name, low, high in (
        ("controlnet_conditioning_scale", -1e3, 1e3),
        ("control_guidance_start", 0, 1),
        ("control_guidance_end", 0, 1),
    ):
        for value in _listed(getattr(settings, name)):
            number(name, value, low, high)
    flag("guess_mode", settings.guess_mode)
    starts, ends = _listed(settings.control_guidance_start), _listed(settings.control_guidance_end)
    n = max(len(starts), len(ends))
    if len(starts) not in (1, n) or len(ends) not in (1, n):
        raise ArgumentError(f"{len(starts)} of control_guidance_start cannot go with {len(ends)} of its end.")
    for start, end in zip(starts * (n // len(starts)), ends * (n // len(ends)), strict=True):
        if start >= end:
            raise ArgumentError(f"control_guidance_start {start:g} must be below control_guidance_end {end:g}.")


def check_control_numbers(settings: DrawingSettings, networks: int, images: int) -> None:
    """Raise ArgumentError unless there are as many images as ControlNets, and settings that fit their number."""
    if not networks:
        _check_unused(settings, image=images > 0)
        return
    if not images:
        raise ArgumentError("a ControlNet needs an image to follow; give it as control_image.")
    if images != networks:
        raise ArgumentError(
            f"{images} of control_image cannot serve {networks} ControlNets: give the image of each, in the same order."
        )
    for name in SHARED:
        _for_each(name, getattr(settings, name), networks)


def open_controls(
    controlnet: ControlNets | None, control_image: Any, settings: DrawingSettings, *, prompts: int, copies: int
) -> list[Control]:
    """Check the ControlNets of a call, and read their images.

    Args:
        controlnet: A ControlNet, a list of them, or None.
        control_image: The image of the ControlNet, for all prompts, or one for each prompt; with a list of ControlNets,
            a list with this for each of them.
        settings: How to draw.
        prompts: Number of prompts.
        copies: Number of images of each prompt.

    Returns:
        The ControlNets, with an image for each of the `prompts` * `copies` images.

    Raises:
        ImageError: Something is no image.
        ArgumentError: An argument is missing, out of range, or of a number that does not fit.
    """
    if controlnet is None:
        _check_unused(settings, image=control_image is not None)
        return []
    networks: list[Any] = list(controlnet) if isinstance(controlnet, (list, tuple)) else [controlnet]
    if not networks or not all(isinstance(network, ControlNet) for network in networks):
        raise ArgumentError(
            "controlnet takes ControlNets, as from sdkit.ControlNet.from_pretrained(source): give one, or a list of "
            "them."
        )
    several = isinstance(controlnet, (list, tuple)) and isinstance(control_image, (list, tuple))
    given = list(control_image) if several else [control_image]
    check_control_settings(settings)
    check_control_numbers(settings, len(networks), 0 if control_image is None else len(given))
    scales, starts, ends = (_for_each(name, getattr(settings, name), len(networks)) for name in SHARED)
    return [
        Control(
            network=network,
            images=_read(images, prompts, copies),
            scale=scale,
            start=start,
            end=end,
            guess_mode=settings.guess_mode,
        )
        for network, images, scale, start, end in zip(networks, given, scales, starts, ends, strict=True)
    ]


def in_region(controls: Sequence[Control], whole: tuple[int, int], box: tuple[int, int, int, int]) -> list[Control]:
    """Crop the images of ControlNets to the region of an image that is drawn.

    Args:
        controls: The ControlNets.
        whole: Height and width of the whole image, which the control images show.
        box: Top, left, bottom, and right of the region, in pixels.
    """
    top, left, bottom, right = box
    return [
        replace(control, images=_resized(control.images, whole)[:, :, top:bottom, left:right]) for control in controls
    ]


def fitted(controls: Sequence[Control], unet: UNet, factor: int, size: tuple[int, int]) -> list[Control]:
    """Bring the images of ControlNets to the size of a drawing.

    They are resized with 8 bits a channel, as in diffusers. As for the VAE, the right and lower edges are repeated up
    to a multiple of `factor`.

    Args:
        controls: The ControlNets.
        unet: The U-Net.
        factor: Pixels for each latent position, on each side, of the VAE.
        size: Height and width of the drawing in pixels.

    Raises:
        ArgumentError: A ControlNet does not fit the U-Net.
    """
    for control in controls:
        control.network.check_fits(unet, factor)
    below, beside = (-length % factor for length in size)
    return [
        replace(control, images=F.pad(_resized(control.images, size), (0, beside, 0, below), mode="replicate"))
        for control in controls
    ]


def controlled(model: Model, controls: Sequence[Control], timesteps: Timesteps) -> Model:
    """Return a model that runs ControlNets before `model`, and adds up their outputs in `Conditioning.residuals`.

    A ControlNet that does nothing in a step is not run.

    Args:
        model: The U-Net.
        controls: ControlNets with the images of the batch.
        timesteps: Pairs (t, t_prev) of the steps, which the shares `start` and `end` are counted in. A timestep inside
            a step, where some samplers evaluate the model too, belongs to it.
    """
    if not controls:
        return model

    def call(x_t: Tensor, t: int, cond: Conditioning) -> Tensor:
        step = max(0, sum(first >= t for first, _ in timesteps) - 1)
        acting = [control for control in controls if control.acts(step, len(timesteps))]
        residuals = [control.residuals(x_t, t, cond) for control in acting]
        return model(x_t, t, replace(cond, residuals=_added(residuals)) if residuals else cond)

    return call


def _added(residuals: Sequence[Residuals]) -> Residuals:
    """Add up the outputs of several ControlNets, on the device of the first."""
    down, mid = residuals[0]
    for more_down, more_mid in residuals[1:]:
        down = tuple(one + other.to(one) for one, other in zip(down, more_down, strict=True))
        mid = mid + more_mid.to(mid)
    return down, mid


def _after_zeros(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x), x])


def _check_unused(settings: DrawingSettings, *, image: bool) -> None:
    """Raise ArgumentError for anything that belongs to a ControlNet, where there is none."""
    given = [name for name in OWN if getattr(settings, name) != getattr(type(settings), name)]  # its default
    if given := [*given, *(["control_image"] if image else [])]:
        raise ArgumentError(f"{given[0]} belongs to a ControlNet; give one as controlnet, or leave {given[0]} out.")


def _listed(value: float | Sequence[float]) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


def _for_each(name: str, value: float | Sequence[float], n: int) -> list[float]:
    """Return a setting for each of n ControlNets."""
    values = _listed(value)
    if len(values) not in (1, n):
        raise ArgumentError(f"{len(values)} of {name} cannot serve {n} ControlNets: give one, or one for each.")
    return values * n if len(values) == 1 else values


def _read(images: Images, prompts: int, copies: int) -> Tensor:
    """Read the images of one ControlNet. Returns (prompts * copies, 3, H, W) in [0, 1], on the CPU."""
    found = [one.detach().cpu() for one in to_tensors(images)]
    check_number("control images", len(found), prompts)
    check_one_size("control images", found)
    return for_each_image(((torch.stack(found) + 1) / 2).clamp(0, 1), prompts, copies)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (N, 3, H, W) in [0, 1] to a height and a width. Images of that size are returned unchanged."""
    return images if tuple(images.shape[2:]) == size else (resized(images * 2 - 1, size) + 1) / 2
