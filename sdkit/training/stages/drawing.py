"""Images of prompts, drawn at each validation with the networks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from sdkit import images as image_io
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.networks.autoencoder import VAE
from sdkit.networks.controlnet import ControlNet
from sdkit.networks.denoiser import UNet
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.training.distributed import split_over_processes
from sdkit.training.signals import raise_if_stopped

VALIDATION_STEPS = 25  # sampling steps of the images of validation prompts, where the schedule has as many


class Drawing:
    """Draws prompts with the networks of a run. As an evaluator, it saves a sheet of the validation prompts' images.

    Args:
        unet: The U-Net in training. The other networks are brought to its device.
        vae: The VAE.
        text: The text encoder.
        schedule: The noise schedule.
        prompts: Prompts on the sheets, always drawn from the same seeds.
        folder: Folder of the sheets.
        size: Height and width of the images in pixels.
        guidance_scale: Guidance scale.
        half: Type of the run's autocast; None is float32.
        trains_text: Whether the text encoder is in training. If not, it leaves the GPU after the drawing.
        controlnet: A ControlNet in training, or None.
        control_images: Its image (3, H, W) in [-1, 1] for each prompt.
        conditions: For each prompt, the image (3, H, W) in [-1, 1] that the U-Net reads beside the noise.
        low_res_schedule: The noise schedule of an upsampler's small images.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text: TextEncoder,
        schedule: NoiseSchedule,
        *,
        prompts: Sequence[str],
        folder: Path,
        size: tuple[int, int],
        guidance_scale: float,
        half: torch.dtype | None = None,
        trains_text: bool = False,
        controlnet: ControlNet | None = None,
        control_images: Sequence[Tensor] = (),
        conditions: Sequence[Tensor] = (),
        low_res_schedule: NoiseSchedule | None = None,
    ) -> None:
        self.unet, self.vae, self.text, self.schedule = unet, vae, text, schedule
        self.prompts, self.folder, self.size = prompts, folder, size
        self.guidance_scale, self.half, self.trains_text = guidance_scale, half, trains_text
        self.controlnet, self.control_images, self.conditions = controlnet, control_images, conditions
        self.low_res_schedule = low_res_schedule

    def __call__(self, step: int) -> Mapping[str, float]:
        """Save a sheet with an image of each prompt. There are no metrics to return."""
        images = [
            Image.fromarray(pixels)
            for pixels in split_over_processes(len(self.prompts), lambda i: np.asarray(self._prompt(i)))
        ]
        self.rest()
        if PartialState().is_main_process:
            sheet = image_io.grid(images, captions=self.prompts, padding=8)
            image_io.save(sheet, self.folder / f"step-{step:08d}.png")
        return {}

    def rest(self) -> None:
        """Move the frozen networks to the CPU: they need GPU memory only while they work."""
        self.vae.cpu()
        if not self.trains_text:
            self.text.cpu()

    def _prompt(self, i: int) -> Image.Image:
        control_image = self.control_images[i] if self.control_images else None
        return self.draw(self.prompts[i], i, control_image, self.conditions[i] if self.conditions else None)

    def draw(
        self, prompt: str, seed: int, control_image: Tensor | None = None, condition: Tensor | None = None
    ) -> Image.Image:
        """Return an image of `prompt`, generated in the run's precision and decoded in float32.

        Args:
            prompt: The prompt.
            seed: Seed of the noise.
            control_image: (3, H, W) in [-1, 1], what the ControlNet reads.
            condition: (3, H, W) in [-1, 1], what the U-Net reads beside the noise.
        """
        device, (height, width) = self.unet.device, self.size
        steps = min(VALIDATION_STEPS, self.schedule.num_timesteps)
        vae, text = self.vae.to(device), self.text.to(device)
        sd = StableDiffusion(vae, text, self.unet, self.schedule, low_res_schedule=self.low_res_schedule)
        with torch.autocast(device.type, self.half, enabled=self.half is not None):
            z = sd(
                prompt, seed=seed, height=height, width=width, num_inference_steps=steps,
                guidance_scale=self.guidance_scale, controlnet=self.controlnet, control_image=control_image,
                condition=condition, output_type="latent", callback=lambda _: raise_if_stopped(),
            )  # fmt: skip
        # Draw NaN as grey instead of raising here: the loop ends a run that has diverged, and says why.
        pixels = self.vae.decode(z.nan_to_num(0, 0, 0), output_type="pt")
        return image_io.to_pil(pixels.nan_to_num(0))[0]
