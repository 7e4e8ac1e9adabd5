"""Text to image: the only place where the four parts meet.

prompts -> TextEncoder -> cond, uncond; seeds -> x_T; `guided(unet, cond, uncond)` -> a predictor; a sampler's loop over
it -> z; `VAE.decode` -> images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sdkit import images as image_io
from sdkit.arguments import number, one_of, seeded, strings, whole_number
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.guidance import APG, Model, guided
from sdkit.diffusion.samplers import Step
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.engines.device import resolve_place
from sdkit.errors import ArgumentError, SdkitError
from sdkit.files import expanded
from sdkit.loading.lora_file import read_lora
from sdkit.loading.source import USUAL_GUIDANCE, Source
from sdkit.loading.tensors import is_file
from sdkit.messages import clean
from sdkit.networks.autoencoder import VAE
from sdkit.networks.denoiser import UNet
from sdkit.networks.lora import merge_lora
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.steps import check_sampler, check_side, decode, denoise, embed, start

LATENTS_AT_ONCE = 4 * 64 * 64
"""Latent positions that are denoised together where no `batch_size` is given: four images of 512 x 512, sixty-four of
128 x 128."""


class StableDiffusion:
    """Stable Diffusion 1.x / 2.x: a VAE, a text encoder, a U-Net and the noise schedule that it was trained with.

    Attributes: these four, as `vae`, `text`, `unet`, `schedule`; `name`, the source; and
        `guidance_scale`, at which it draws unless told otherwise: its model_index.json's `_guidance_scale`, or 7.5.
    """

    def __init__(
        self, vae: VAE, text: TextEncoder, unet: UNet, schedule: NoiseSchedule, *, name: str = "",
        guidance_scale: float = USUAL_GUIDANCE,
    ) -> None:  # fmt: skip
        if unet.width != text.width:
            raise ArgumentError(
                f"this U-Net attends to embeddings of width {unet.width}, this text encoder makes {text.width}: "
                "they belong to different models."
            )
        if unet.channels != vae.channels:
            raise ArgumentError(
                f"this U-Net takes {unet.channels} channels, this VAE's latents have {vae.channels}: "
                "they do not make one text-to-image model."
            )
        self.vae = vae
        self.text = text
        self.unet = unet
        self.schedule = schedule
        self.name = name
        self.guidance_scale = guidance_scale

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] = "emoji",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        variant: str | None = None,
        config: str | PathLike[str] | None = None,
        prediction_type: str | None = None,
        vae: str | PathLike[str] | None = None,
        compile: bool = False,
    ) -> StableDiffusion:
        """Load a whole model.

        source: "emoji", the small model that comes with sdkit; a Hub repository
            ("stable-diffusion-v1-5/stable-diffusion-v1-5"); a folder in diffusers layout; or one .safetensors / .ckpt
            file in the original layout (CompVis, A1111, civitai), which needs no network.
        dtype: "auto" (bfloat16 where the hardware multiplies it, else float32), "fp32", "bf16", "fp16".
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" ...
        revision, variant: of a Hub repository: branch, tag or commit; "fp16" for weights stored so.
        config: a folder of configs, for a single file of another shape than SD 1.x and 2.x.
        prediction_type: for a single file of SD 2.x that is not recognised: "epsilon" or "v_prediction".
        vae: a VAE in place of the model's own, which may then have none: any source of this kind, or a VAE's own
            folder, file, or Hub repository; `revision` and `variant` are the model's alone.
        compile: run U-Net and VAE through torch.compile.

        Raises SourceError, in one sentence, where the source is missing, unreadable, of another kind, or cannot be
        downloaded.
        """
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config, prediction_type=prediction_type)
        beside = opened
        if vae is not None:
            beside = Source.open(vae, config=config if is_file(expanded(vae)) else None)  # a folder has its own configs
        return cls(
            VAE.from_source(beside, dtype=dtype, device=device, compile=compile),
            TextEncoder.from_source(opened, dtype=dtype, device=device),
            UNet.from_source(opened, dtype=dtype, device=device, compile=compile),
            opened.schedule(),
            name=opened.name,
            guidance_scale=opened.guidance_scale,
        )

    def load_lora(
        self,
        source: str | PathLike[str],
        scale: float = 1.0,
        *,
        filename: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Add `scale` times a LoRA to the weights of the U-Net and of the text encoder.

        source: a file, a folder or a Hub id, in the layout of diffusers or of kohya (A1111, civitai).
        filename: of the file in a folder or Hub repository, where it is not pytorch_lora_weights.safetensors.
        revision: a branch, tag or commit, for a Hub id.

        Sampling is as fast as without it. Several add up; the same one loaded with -scale undoes it, up to rounding. In
        half precision, updates smaller than the weights' own rounding are partly lost; dtype "fp32" keeps them.
        Raises SourceError, and changes nothing, where it cannot be read or was made for another model.
        """
        scale = number("scale", scale)
        lora = read_lora(source, filename=filename, revision=revision)
        merge_lora(lora, self.unet.network, self.text.network, scale)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        sampler: str = "ddim",
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[Step], object] | None = None,
        *,
        spacing: str | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        apg: APG | None = None,
        clip_skip: int = 0,
        weighting: bool = False,
        batch_size: int | None = None,
    ) -> Any:
        """Images of prompts: `num_images_per_prompt` of the first, then of the second, and so on.

        negative_prompt: what to steer away from, one for all or one for each prompt; None is "".
        height, width: pixels, any number from 8; None is the size that the model was trained on.
        num_inference_steps, spacing: see `NoiseSchedule.timesteps`; spacing None is the model's own.
        guidance_scale: None is the model's own, 7.5 for most; 1 is no guidance, at half the cost. See `sdkit.guidance`
            for `guidance_rescale` (phi), `guidance_interval` (noise levels) and `apg`. A latent consistency model's
            U-Net takes the scale as an input: one pass a step, by the sampler that is chosen (not by LCM's own), and
            no negative prompt.
        sampler: "ddim" (`eta` from 0, deterministic, to 1, DDPM), "ddpm" or "dpm++2m".
        seed: image i starts from seed + i, or from the i-th of a list; the same seed gives the same image alone and in
            a batch.
        latents: (N, 4, h, w) standard normal noise to start from in place of the seeds'.
        output_type: "pil", a list of PIL images; "np", uint8 (N, H, W, 3); "pt", float32 (N, 3, H, W) in [-1, 1];
            "latent", the scaled latents (N, 4, h, w) as they are, even where they are not finite.
        callback: called with each `Step` of each batch.
        clip_skip, weighting: see `TextEncoder.encode`.
        batch_size: images denoised together; None fits it to their size.
        """
        one_of("output_type", output_type, (*image_io.OUTPUT_TYPES, "latent"))
        check_sampler(sampler, eta)
        prompts, negatives = self._prompts(prompt, negative_prompt, num_images_per_prompt)
        height, width = self._size(height, width, latents)
        generators = seeded(seed, len(prompts))
        timesteps = self.schedule.timesteps(num_inference_steps, spacing)
        guidance: dict[str, Any] = {"interval": guidance_interval, "phi": guidance_rescale, "projected": apg}
        model, scale = self._model(guidance_scale, negatives, guidance)

        x_T = start(generators, self._latent_shape(height, width), latents)
        z = torch.empty_like(x_T)
        with torch.no_grad():
            for chosen, chunks in self._batches(prompts, negatives, scale, weighting, x_T, batch_size):
                encode: dict[str, Any] = {"clip_skip": clip_skip, "weighting": weighting, "chunks": chunks}
                # Moved once, not in every step, where the text encoder is on another device.
                cond = embed(self.text, [prompts[i] for i in chosen], **encode).to(self.unet.device)
                uncond = None
                if scale != 1:
                    uncond = embed(self.text, [negatives[i] for i in chosen], **encode).to(self.unet.device)
                if output_type != "latent":
                    self._check_embeddings([cond] if uncond is None else [cond, uncond], weighting)
                predict = guided(model, self.schedule, cond, uncond, scale, **guidance)
                z[chosen] = denoise(
                    predict, x_T[chosen].to(self.unet.device), self.schedule, timesteps, sampler=sampler, eta=eta,
                    generators=[generators[i] for i in chosen], callback=callback,
                ).cpu()  # fmt: skip
        if output_type == "latent":
            return z
        if not bool(torch.isfinite(z).all()):
            raise SdkitError(f"the U-Net gave numbers that are not finite; {_remedy(self.unet)}.")
        return decode(self.vae, z, (height, width), output_type=output_type, batch_size=batch_size)

    def _model(
        self, guidance_scale: float | None, negatives: list[str], guidance: dict[str, Any]
    ) -> tuple[Model, float]:
        """The U-Net as guidance calls it, and the scale at which to guide it."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        # Inference mode for the U-Net alone: the tensors of a `Step` must be ordinary ones.
        unet: Any = torch.inference_mode()(self.unet)
        if not self.unet.guided:
            return unet, scale
        self._check_guided(negatives, guidance)
        # The U-Net guides itself: one pass.
        return partial(unet, guidance_scale=number("the guidance scale", scale, -1e6, 1e6)), 1.0

    def _check_embeddings(self, conditions: list[Conditioning], weighting: bool) -> None:
        """Raise SdkitError, with the cause, where the text encoder gave numbers that are not finite."""
        if all(one.text is not None and bool(torch.isfinite(one.text).all()) for one in conditions):
            return
        if weighting and bool(torch.isfinite(self.text.encode("")).all()):
            raise SdkitError("the prompt's weights are so large that its embedding is not finite; give smaller ones.")
        raise SdkitError(f"the text encoder gave numbers that are not finite; {_remedy(self.text)}.")

    @staticmethod
    def _check_guided(negatives: list[str], guidance: dict[str, Any]) -> None:
        """Refuse what a U-Net that takes the guidance scale as an input has no use for."""
        used = {"negative_prompt": any(negatives), "guidance_interval": guidance["interval"] is not None,
                "guidance_rescale": bool(guidance["phi"]), "apg": guidance["projected"] is not None}  # fmt: skip
        if option := next((option for option, given in used.items() if given), None):
            raise ArgumentError(
                "this model's U-Net takes the guidance scale as an input and makes one pass, without guidance: "
                f"{option} has no meaning for it; leave it out."
            )

    def images_at_once(self, height: int, width: int) -> int:
        """How many images of this size, in pixels, are denoised together where no `batch_size` is given."""
        return max(1, LATENTS_AT_ONCE * self.vae.factor**2 // max(1, height * width))

    def _prompts(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, copies: int
    ) -> tuple[list[str], list[str]]:
        """The prompt and the negative prompt of each image."""
        prompts = strings("prompt", prompt)
        negatives = strings("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if not isinstance(negative_prompt, (list, tuple)):
            negatives *= len(prompts)
        if len(negatives) != len(prompts):
            raise ArgumentError(
                f"{len(negatives)} negative prompts cannot serve {len(prompts)} prompts: give one, or one for each."
            )
        copies = whole_number("num_images_per_prompt", copies, 1)
        return [text for text in prompts for _ in range(copies)], [text for text in negatives for _ in range(copies)]

    def _size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        factor, side = self.vae.factor, self.unet.sample_size
        if latents is not None:
            if not isinstance(latents, Tensor) or latents.ndim != 4:
                raise ArgumentError("latents must be a tensor (N, 4, h, w) of standard normal noise.")
            height = latents.shape[2] * factor if height is None else height
            width = latents.shape[3] * factor if width is None else width
        height = check_side("height", side * factor if height is None else height, factor)
        return height, check_side("width", side * factor if width is None else width, factor)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(4, ceil(H / 8), ceil(W / 8)): the shape of one image's latents."""
        return self.vae.channels, -(-height // self.vae.factor), -(-width // self.vae.factor)

    def _batches(
        self,
        prompts: list[str],
        negatives: list[str],
        scale: float,
        weighting: bool,
        x_T: Tensor,
        batch_size: int | None,
    ) -> Iterator[tuple[list[int], int]]:
        """Indices of images to denoise together, and their number of chunks of tokens.

        Images whose prompts need different numbers of chunks never meet: the padding would change them.
        """
        lengths: dict[str, int] = {
            text: self.text.tokenize(text, weighting=weighting)[0].shape[1] for text in {*prompts, *negatives}
        }
        groups: dict[int, list[int]] = {}
        for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
            chunks = lengths[prompt] if scale == 1 else max(lengths[prompt], lengths[negative])
            groups.setdefault(chunks, []).append(i)
        fitting = self.images_at_once(x_T.shape[2] * self.vae.factor, x_T.shape[3] * self.vae.factor)
        n = fitting if batch_size is None else whole_number("batch_size", batch_size, 1)
        for chunks, indices in sorted(groups.items()):
            yield from ((indices[i : i + n], chunks) for i in range(0, len(indices), n))


def _remedy(part: UNet | TextEncoder) -> str:
    """How to come by finite numbers from a network that gave others."""
    broken = next((name for name, weight in part.network.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        return f"its weight {clean(broken)} is not: load the model anew, from a file that is whole"
    if part.dtype == torch.float16:
        return "float16 holds none above 65504: take dtype 'fp32' or 'bf16'"
    return "its weights are: take a smaller guidance scale, smaller prompt weights, or a LoRA at a smaller scale"
