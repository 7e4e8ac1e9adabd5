"""`DrawingSettings`: how to draw an image. The call of the pipeline, PNGs, and the command line take them from here.

A new setting is a field here, with its description, its check, and its type in `DrawingKeywords`; and the pipeline does
what it says. Importing this module does not load PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

PIPELINE = "pipeline"
"""Text chunk of a PNG that says which kind of model drew it; Stable Diffusion's have none."""
PRIOR_STEPS, PRIOR_GUIDANCE = 25, 4.0  # of DALL-E 2
DECODER_STEPS, DECODER_GUIDANCE = 20, 10.0


@dataclass(frozen=True, kw_only=True)
class DrawingSettings:
    """How to draw an image.

    Attributes:
        height: Height in pixels, any number from 8. None is that of the model's training images.
        width: Width in pixels, any number from 8. None is that of the model's training images.
        num_inference_steps: Number of sampling steps, at most the model's number of timesteps. More take longer.
        sampler: Sampler: "ddim", "euler", "heun", "dpm++2m", or "unipc", which add no noise; "ddpm", "euler_a",
            "dpm++2m_sde", or "dpm++sde", which do; or "lcm" or "tcd", for consistency models.
        eta: Share of fresh noise that sampler "ddim" or "tcd" adds, from 0 (deterministic) to 1.
        spacing: Spacing of the timesteps: "leading", "trailing", "linspace", "karras", "exponential", or "lcm". None
            is the sampler's own, else the model's.
        guidance_scale: Guidance scale: higher follows the prompt more closely; 1 turns guidance off and halves the
            cost. None is the model's own, 7.5 for most.
        guidance_rescale: Strength phi of rescaled guidance, from 0 (off) to 1, against overexposure.
        guidance_interval: Noise levels sigma in (low, high] at which to guide. None guides at all of them.
        image_guidance_scale: With a condition: scale of the image; higher follows it more closely. 1 is off; any other
            value makes three evaluations a step (InstructPix2Pix uses 1.5).
        strength: With an image to start from: share of the steps that are made, above 0 and at most 1. Low values stay
            close to the image. None is 0.8, or 1 with a mask.
        mask_blur: With a mask: blur of its edge, inwards, as a standard deviation in pixels; 0 is a sharp edge.
        padding_mask_crop: With a mask: draw only the masked region, enlarged, with this many pixels around it. None
            draws the whole image.
        controlnet_conditioning_scale: Strength of a ControlNet: factor of what it adds to the U-Net. One number for
            all ControlNets, or one for each.
        control_guidance_start: Share of the steps, from 0 to 1, before a ControlNet begins to act. One number, or one
            for each.
        control_guidance_end: Share of the steps after which a ControlNet no longer acts. One number, or one for each.
        guess_mode: Let ControlNets guess what the control image shows: they act less on fine detail, and not on the
            negative prompt, so that an empty prompt works.
        clip_skip: Number of the text encoder's last layers to skip.
        weighting: Read weights in prompts, such as (word:1.3), as A1111 does.
    """

    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 30
    sampler: str = "ddim"
    eta: float = 0.0
    spacing: str | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    image_guidance_scale: float = 1.0
    strength: float | None = None
    mask_blur: float = 0.0
    padding_mask_crop: int | None = None
    controlnet_conditioning_scale: float | tuple[float, ...] = 1.0
    control_guidance_start: float | tuple[float, ...] = 0.0
    control_guidance_end: float | tuple[float, ...] = 1.0
    guess_mode: bool = False
    clip_skip: int = 0
    weighting: bool = False

    def check(self) -> None:
        """Raise ArgumentError for values that no model accepts.

        Each rule is a function beside the code that uses the value, which checks it again with the model's own bounds.
        """
        from sdkit.diffusion.guidance import (  # imported late: they load PyTorch
            check_image_scale,
            check_interval,
            check_rescale,
            check_scale,
        )
        from sdkit.diffusion.samplers import sampler_by_name
        from sdkit.diffusion.schedule import check_spacing, check_steps
        from sdkit.networks.text_encoder import check_clip_skip
        from sdkit.pipelines.controlnet import check_control_settings
        from sdkit.pipelines.image_to_image import check_strength
        from sdkit.pipelines.inpainting import check_mask_blur, check_padding
        from sdkit.pipelines.steps import check_side

        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None:
                check_side(name, pixels)
        check_control_settings(self)
        check_steps(self.num_inference_steps)
        sampler_by_name(self.sampler, eta=self.eta)
        if self.spacing is not None:
            check_spacing(self.spacing)
        if self.guidance_scale is not None:
            check_scale(self.guidance_scale)
        check_rescale(self.guidance_rescale)
        check_interval(self.guidance_interval)
        check_image_scale(self.image_guidance_scale)
        check_strength(self.strength)
        check_mask_blur(self.mask_blur)
        check_padding(self.padding_mask_crop)
        check_clip_skip(self.clip_skip)

    def strength_used(self, *, mask: bool) -> float:
        """Return the strength with an image: the given one, else diffusers' defaults, which differ with a mask."""
        usual = 1.0 if mask else 0.8
        return usual if self.strength is None else self.strength


class DrawingKeywords(TypedDict, total=False):
    """The fields of `DrawingSettings` as keywords, for type checkers."""

    height: int | None
    width: int | None
    num_inference_steps: int
    sampler: str
    eta: float
    spacing: str | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    image_guidance_scale: float
    strength: float | None
    mask_blur: float
    padding_mask_crop: int | None
    controlnet_conditioning_scale: float | tuple[float, ...]
    control_guidance_start: float | tuple[float, ...]
    control_guidance_end: float | tuple[float, ...]
    guess_mode: bool
    clip_skip: int
    weighting: bool
