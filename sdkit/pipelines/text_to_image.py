"""Text to image with `StableDiffusion`, which calls the four functions in `sdkit.pipelines.steps`.

`embed` turns prompts into cond and uncond, and `start` turns seeds into x_T. `sdkit.guidance.guided` makes a predictor
from the U-Net and these conditions, `denoise` samples latents z with it, and `decode` turns z into images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from sdkit.arguments import number, one_of, seeded, strings, whole_number
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.guidance import APG, Model, check_image_scale, check_scale, guided
from sdkit.diffusion.inversion import ITERATIONS, ddim_inversion
from sdkit.diffusion.samplers import Generators, Sampler, Step, Timesteps, default_spacing, sampler_by_name
from sdkit.diffusion.schedule import NoiseSchedule, Predict
from sdkit.engines.device import resolve_place
from sdkit.engines.offload import on_device
from sdkit.errors import ArgumentError, SdkitError
from sdkit.fields import takes_fields
from sdkit.files import expanded
from sdkit.images import OUTPUT_TYPES, Images, from_tensors
from sdkit.loading.configs import LOW_RES
from sdkit.loading.embedding_file import Embedding, read_embedding
from sdkit.loading.lora_file import LoRA, read_lora
from sdkit.loading.source import USUAL_GUIDANCE, Source
from sdkit.loading.tensors import is_file
from sdkit.messages import clean
from sdkit.networks.autoencoder import VAE
from sdkit.networks.class_names import ClassNames
from sdkit.networks.classifier import Classifier
from sdkit.networks.denoiser import UNet
from sdkit.networks.lora import Active, MergedLoRAs
from sdkit.networks.text_encoder import TextEncoder
from sdkit.networks.wrapper import Wrapper
from sdkit.pipelines.classifier_guidance import Labels, Towards, open_classifier
from sdkit.pipelines.concatenation import cut_out, read_condition, told
from sdkit.pipelines.controlnet import Control, ControlNets, controlled, fitted, in_region, open_controls
from sdkit.pipelines.image_to_image import check_inputs, last_steps
from sdkit.pipelines.inpainting import Canvas, Original, keep_outside, latent_mask, open_canvas, without_inside
from sdkit.pipelines.settings import DrawingKeywords, DrawingSettings
from sdkit.pipelines.steps import check_side, decode, denoise, embed, start
from sdkit.pipelines.upsampling import check_noise_level, told_small

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from typing_extensions import Unpack

LATENTS_AT_ONCE = 4 * 64 * 64
"""Latent positions that are denoised together by default: four images of 512 x 512, or 64 of 128 x 128."""


Texts: TypeAlias = str | Sequence[str]
"""One text, or a list of them."""


class CallKeywords(DrawingKeywords, total=False):
    """The keywords of `StableDiffusion.__call__` that all its overloads share, for type checkers."""

    image: Images | None
    mask_image: Any
    seed: int | Sequence[int]
    num_images_per_prompt: int
    latents: Tensor | None
    callback: Callable[[Step], object] | None
    controlnet: ControlNets | None
    control_image: Any
    condition: Images | None
    noise_level: int | None
    classifier: Classifier | None
    class_labels: Labels | None
    classifier_scale: float
    apg: APG | None
    batch_size: int | None


class StableDiffusion:
    """Stable Diffusion 1.x / 2.x: a VAE, a text encoder, a U-Net, and the noise schedule that it was trained with.

    Call it to draw images of prompts. Load one with `from_pretrained`, or put one together from its four parts.

    Example:
        >>> import sdkit
        >>> sd = sdkit.StableDiffusion.from_pretrained("emoji")
        >>> images = sd(["a cat", "a rocket"], num_inference_steps=4, seed=1)
        >>> sdkit.images.grid(images, captions=["a cat", "a rocket"]).save("drawn.png")

    Attributes:
        vae: The autoencoder.
        text: The text encoder; or the names of the classes, of a model that takes labels or nothing in place of text.
        unet: The denoising U-Net.
        schedule: The noise schedule.
        name: The source that the model was loaded from, or "".
        guidance_scale: Guidance scale of a call that gives none: `_guidance_scale` of the model's model_index.json,
            or 7.5.
        offload_to: Device to which each network is moved while it computes; None leaves all networks where they are.
        low_res_schedule: For an upsampler: the schedule by which the image to enlarge is noised. The default is DDPM's.
    """

    def __init__(
        self, vae: VAE, text: TextEncoder, unet: UNet, schedule: NoiseSchedule, *, name: str = "",
        guidance_scale: float = USUAL_GUIDANCE, offload_to: torch.device | None = None,
        low_res_schedule: NoiseSchedule | None = None,
    ) -> None:  # fmt: skip
        if unet.width != text.width:
            raise ArgumentError(
                f"this U-Net attends to embeddings of width {unet.width}, this text encoder makes {text.width}: "
                "they belong to different models."
            )
        takes = unet.channels if unet.inpaints or unet.condition else unet.input_channels
        for verb, channels in (("takes", takes), ("gives", unet.channels)):
            if channels != vae.channels:
                raise ArgumentError(
                    f"this U-Net {verb} {channels} channels, this VAE's latents have {vae.channels}: "
                    "they do not make one text-to-image model."
                )
        self.vae = vae
        self.text = text
        self.unet = unet
        self.schedule = schedule
        self.name = name
        self.guidance_scale = guidance_scale
        self.offload_to = offload_to
        self.low_res_schedule = NoiseSchedule.linear() if low_res_schedule is None else low_res_schedule
        self._loras = MergedLoRAs()

    def __copy__(self) -> StableDiffusion:
        """Refuse: LoRAs and embeddings of a shallow copy would change the original, too."""
        raise ArgumentError(
            "a shallow copy of a pipeline would share its weights, and with them LoRAs and embeddings; take "
            "copy.deepcopy, whose copy has weights of its own."
        )

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
        offload: bool = False,
    ) -> StableDiffusion:
        """Load a whole model.

        Args:
            source: "emoji", the small model that comes with sdkit; a Hub repository
                ("stable-diffusion-v1-5/stable-diffusion-v1-5"); a folder in diffusers layout; or one .safetensors or
                .ckpt file in the original layout (CompVis, A1111, civitai), which needs no network.
            dtype: "fp32", "bf16", "fp16", or "auto": bfloat16 where the hardware multiplies it, else float32.
            device: "cpu", "cuda", "cuda:1", and so on, or "auto": a GPU where there is one.
            revision: Branch, tag, or commit of a Hub repository.
            variant: Variant of a repository's weight files, such as "fp16".
            config: Folder or Hub id with the configs for a single file that the public configs of SD 1.x and 2.x do not
                fit.
            prediction_type: "epsilon", "v_prediction", or "sample", in place of what the source states; see
                `Source.scheduler_config`.
            vae: Source of a VAE that replaces the model's own. A VAE's own folder, file, or Hub repository serves too.
                `revision` and `variant` do not apply to it. "pixels" is the pixel identity, for a U-Net that
                denoises pixels.
            compile: Run the U-Net and the VAE through torch.compile.
            offload: Keep the networks in the CPU's memory, and move each one to `device` only while it computes. GPU
                memory then holds one network at a time, and its activations.

        Raises:
            SourceError: The source is missing, unreadable, of another kind, or cannot be downloaded.
            ArgumentError: An argument is out of range, or the parts do not belong to one model.
        """
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config, prediction_type=prediction_type)
        beside = opened
        if vae is not None:
            beside = Source.open(vae, config=config if is_file(expanded(vae)) else None)  # a folder has its own configs
        home = "cpu" if offload else device
        # Each is set up for `device` before it goes home: layout, attention, and compilation depend on the device.
        autoencoder = VAE.from_source(beside, dtype=dtype, device=device, compile=compile).to(home)
        if opened.takes_text:
            text = TextEncoder.from_source(opened, dtype=dtype, device=device)
            unet = UNet.from_source(opened, dtype=dtype, device=device, compile=compile)
        else:
            unet = UNet.from_source(opened, dtype=dtype, device=device, compile=compile)
            text = ClassNames.of(unet)
        low_res = opened.low_res_config() if unet.condition == LOW_RES else None
        return cls(
            autoencoder,
            text.to(home),
            unet.to(home),
            opened.schedule(latents=autoencoder.kind.makes_latents),
            name=opened.name,
            guidance_scale=opened.guidance_scale,
            offload_to=device if offload else None,
            low_res_schedule=None if low_res is None else NoiseSchedule.from_config(low_res),
        )

    @property
    def upscale_factor(self) -> int:
        """For an upsampler: how many times larger its images are than those that it enlarges."""
        return self.unet.upscale_factor or self.vae.factor

    def load_lora(
        self,
        source: str | PathLike[str],
        scale: float = 1.0,
        name: str | None = None,
        *,
        filename: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Add a LoRA, times `scale`, to the weights of the U-Net and the text encoder.

        Sampling is as fast as without a LoRA. Several LoRAs add up. `set_lora_scales` changes their scales, and
        `unload_lora` takes them out: the weights are then bit-identical to what they were. In half precision, updates
        smaller than the rounding of the weights are partly lost; load the model with dtype "fp32" to keep them.

        LoCon, LoHa, LoKr, and DoRA are loaded as well. The scale multiplies the whole change of a weight, also that of
        DoRA, as in A1111 and ComfyUI; diffusers scales B A within DoRA's norm instead, which differs except at 1.

        Args:
            source: A file, a folder, or a Hub id, in the layout of diffusers, kohya (A1111, civitai), or peft.
            scale: Factor of the LoRA's update.
            name: Name for `set_lora_scales` and `unload_lora`. None is that of the file or its folder, with a number
                if it is taken.
            filename: Name of the file in a folder or Hub repository. None tries the usual names, of which
                pytorch_lora_weights.safetensors comes first.
            revision: Branch, tag, or commit of a Hub repository.

        Returns:
            The LoRA's name.

        Raises:
            SourceError: The LoRA cannot be read, or was made for another model. The weights are unchanged.
            ArgumentError: The scale is not finite, or another LoRA has this name.
        """
        scale = number("scale", scale)
        self._check_lora_name(name)
        lora = read_lora(source, filename=filename, revision=revision)
        return self.merge_lora(lora, scale, name)

    def merge_lora(self, lora: LoRA, scale: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA that has been read; see `load_lora`."""
        if not isinstance(lora, LoRA):
            raise ArgumentError(
                f"merge_lora takes a LoRA as read_lora returns it, not {lora!r}; load_lora reads files."
            )
        self._check_lora_name(name)
        scale = number("scale", scale)
        numbered = (f"{lora.name}-{i}" for i in itertools.count(2))
        free = (each for each in itertools.chain([lora.name], numbered) if each not in self._loras.active)
        own = next(free) if name is None else name
        self._set_loras({**self._loras.active, own: Active(lora, scale)})
        return own

    @property
    def lora_scales(self) -> dict[str, float]:
        """The scale of each loaded LoRA, by name."""
        return {name: one.scale for name, one in self._loras.active.items()}

    def set_lora_scales(self, scales: Mapping[str, float]) -> None:
        """Change the scales of loaded LoRAs. The weights are then as if they had been loaded with these.

        Args:
            scales: Name of a LoRA -> its new scale. 0 turns it off. Others keep theirs.

        Raises:
            ArgumentError: No LoRA has such a name, or a scale is not finite.
            SourceError: A weight would overflow. The weights are unchanged.
        """
        if not isinstance(scales, Mapping):
            raise ArgumentError(f"scales must be a dict of names and numbers, not {type(scales).__name__}.")
        changed = dict(self._loras.active)
        for name, scale in scales.items():
            self._check_loaded(name)
            changed[name] = Active(changed[name].lora, number("scale", scale))
        self._set_loras(changed)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA out again. Without any LoRA, the weights are bit-identical to what they were before.

        Args:
            name: Name of the LoRA; None takes all out.

        Raises:
            ArgumentError: No LoRA has this name, or none is loaded.
        """
        if name is None and not self._loras.active:
            raise ArgumentError("no LoRA is loaded, so there is none to take out.")
        if name is not None:
            self._check_loaded(name)
        kept = {other: one for other, one in self._loras.active.items() if name is not None and other != name}
        self._set_loras(kept)

    def _set_loras(self, active: Mapping[str, Active]) -> None:
        self.unet.check_runs("a LoRA")
        self._loras.set(active, self.unet.network, self.text.network)

    def _check_lora_name(self, name: str | None) -> None:
        """Raise ArgumentError for a name that a LoRA cannot be given."""
        if name is not None and (not isinstance(name, str) or not name):
            raise ArgumentError(f"the name of a LoRA must be text, not {name!r}.")
        if name in self._loras.active:
            raise ArgumentError(f"a LoRA named {clean(name)!r} is loaded already; give another name, or unload it.")

    def _check_loaded(self, name: str) -> None:
        """Raise ArgumentError unless a LoRA of this name is loaded."""
        if not isinstance(name, str) or name not in self._loras.active:
            loaded = ", ".join(map(clean, self._loras.active)) or "none is"
            raise ArgumentError(f"no LoRA named {clean(repr(name))} is loaded; loaded: {loaded}.")

    def load_embedding(
        self,
        source: str | PathLike[str],
        token: str | None = None,
        *,
        filename: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Load a textual inversion embedding, whose token then stands for it in prompts.

        Prompts without the token draw bit-identically as before. The vectors of the embedding stay together in a chunk
        of a long prompt.

        Args:
            source: A file, a folder, or a Hub id, in the layout of diffusers or A1111.
            token: Token that stands for it in prompts; None is the one that the file names, or else the file's own name
                without its suffix.
            filename: Name of the file in a folder or Hub repository. None tries the usual names, of which
                learned_embeds.safetensors comes first.
            revision: Branch, tag, or commit of a Hub repository.

        Returns:
            The token.

        Raises:
            SourceError: The embedding cannot be read, or was made for another model.
            ArgumentError: The token is a word of the vocabulary, or an embedding of that name is loaded.
        """
        embedding = read_embedding(source, token=token, filename=filename, revision=revision)
        self.add_embedding(embedding)
        return embedding.token

    def add_embedding(self, embedding: Embedding) -> None:
        """Add an embedding that has been read; see `load_embedding`."""
        if not isinstance(embedding, Embedding):
            raise ArgumentError(
                f"add_embedding takes an Embedding as read_embedding returns it, not {embedding!r}; load_embedding "
                "reads files."
            )
        self.text.add_token(embedding.token, embedding.vectors, label=embedding.label)

    def unload_embedding(self, token: str | None = None) -> None:
        """Remove the embedding with this token, or all embeddings. Raises ArgumentError if there is none with it."""
        for one in [*self.text.learned] if token is None else [token]:
            self.text.remove_token(one)

    @overload
    def __call__(
        self, prompt: Texts, negative_prompt: Texts | None = None, *, output_type: Literal["pil"] = "pil",
        **options: Unpack[CallKeywords],
    ) -> list[Image.Image]: ...  # fmt: skip
    @overload
    def __call__(
        self, prompt: Texts, negative_prompt: Texts | None = None, *, output_type: Literal["np"],
        **options: Unpack[CallKeywords],
    ) -> npt.NDArray[np.uint8]: ...  # fmt: skip
    @overload
    def __call__(
        self, prompt: Texts, negative_prompt: Texts | None = None, *, output_type: Literal["pt", "latent"],
        **options: Unpack[CallKeywords],
    ) -> Tensor: ...  # fmt: skip
    @takes_fields(DrawingSettings)
    def __call__(
        self,
        prompt: Texts,
        negative_prompt: Texts | None = None,
        *,
        image: Images | None = None,
        mask_image: Any = None,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback: Callable[[Step], object] | None = None,
        controlnet: ControlNets | None = None,
        control_image: Any = None,
        condition: Images | None = None,
        noise_level: int | None = None,
        classifier: Classifier | None = None,
        class_labels: Labels | None = None,
        classifier_scale: float = 1.0,
        apg: APG | None = None,
        batch_size: int | None = None,
        **options: Unpack[DrawingKeywords],
    ) -> list[Image.Image] | npt.NDArray[np.uint8] | Tensor:
        """Draw images of prompts: `num_images_per_prompt` of the first, then of the second, and so on.

        With `image`, sampling starts from that image, and `strength` says how far from it. With `mask_image` too, only
        the white part of the mask is drawn anew; all other pixels come back bit-identical. Any model does both; one
        that was trained to paint into images needs both.

        The U-Net of a latent consistency model takes the guidance scale as an input and makes one pass a step. It
        accepts neither a negative prompt nor any other option of guidance. Its own sampler is "lcm", not the default.

        Args:
            prompt: A prompt, or a list of them.
            negative_prompt: Prompt to steer away from, one for all images or one for each prompt; None is "".
            image: Image to start from, one for all prompts or one for each: PIL images, paths, uint8 arrays, or tensors
                (B, 3, H, W) in [-1, 1]. The height and the width are its own by default; if they are given, it is
                resized.
            mask_image: Mask of that image's size: an image, white where it is drawn anew and black where it is kept; or
                a tensor (H, W) or (B, 1, H, W) of numbers in [0, 1].
            seed: Image i starts from seed + i, or from the i-th seed of a list. A seed gives the same image alone and
                in a batch.
            num_images_per_prompt: Number of images of each prompt.
            latents: (N, 4, h, w) standard normal noise to start from, in place of noise from the seeds. With `image`,
                the noise that is added to it.
            output_type: "pil", "np", "pt", or "latent"; see Returns.
            callback: Called with each `Step` of each batch.
            controlnet: A ControlNet, or a list of them, that the drawing follows. Where the model is offloaded, those
                on the CPU move to the GPU with the U-Net; others stay on their devices.
            control_image: Image that the ControlNet reads, such as edges: one for all prompts, or one for each; PIL
                images, paths, uint8 arrays, or tensors (B, 3, H, W) in [-1, 1]. With a list of ControlNets, a list with
                this for each of them. The height and the width are its own by default; if they are given, it is
                resized.
            condition: Image that the U-Net reads beside the noise, for a model that was trained to: one for all
                prompts, or one for each, as for `image`. The height and the width are its own by default; if others are
                given, it is resized. `image_guidance_scale` says how closely to follow it. An upsampler
                enlarges it.
            noise_level: For an upsampler: noise added to the image to enlarge, a timestep of `low_res_schedule`. More
                noise lets it invent more. None is 20.
            classifier: A classifier of noisy images by whose gradient the drawing is guided, beside `guidance_scale`.
            class_labels: The class that it is guided to, by its name or number: one for all prompts, or one for each.
            classifier_scale: Scale of that gradient; 1 is Bayes' rule.
            apg: Settings of adaptive projected guidance, which replaces classifier-free guidance.
            batch_size: Number of images denoised together; None fits it to their size.

        Returns:
            N images: a list of PIL images for "pil"; uint8 (N, H, W, 3) for "np"; float32 (N, 3, H, W) in [-1, 1] for
            "pt"; scaled latents (N, 4, h, w), float32, for "latent", which are not checked for NaN or infinity.

        Raises:
            ArgumentError: An argument is out of range, contradicts another one, or does not apply to this model.
            SdkitError: The text encoder or the U-Net gives numbers that are not finite.

        Examples:
            >>> import sdkit
            >>> from PIL import Image
            >>> sd = sdkit.StableDiffusion.from_pretrained("emoji")
            >>> images = sd("a red apple on a blue background", num_inference_steps=4, seed=42)
            >>> images[0].save("apple.png")

            Two images of each prompt, as an array:

            >>> sd(["a cat", "a dog"], num_images_per_prompt=2, num_inference_steps=2, output_type="np").shape
            (4, 128, 128, 3)

            From an image, and into a part of it:

            >>> green = sd("a green apple", image=images[0], strength=0.6, num_inference_steps=4)
            >>> mask = Image.new("L", images[0].size)
            >>> mask.paste(255, (32, 32, 96, 96))
            >>> star = sd("a star", image=images[0], mask_image=mask, num_inference_steps=4)
        """
        one_of("output_type", output_type, (*OUTPUT_TYPES, "latent"))
        if callback is not None and not callable(callback):
            raise ArgumentError(f"callback must be a function of a Step, not {callback!r}.")
        prompts, negatives = self._prompts(prompt, negative_prompt, num_images_per_prompt)
        settings = DrawingSettings(**options)
        canvas = self._canvas(image, mask_image, settings, len(prompts), num_images_per_prompt)
        n = len(prompts) // num_images_per_prompt
        controls = open_controls(controlnet, control_image, settings, prompts=n, copies=num_images_per_prompt)
        beside = read_condition(
            condition, self.unet, settings, prompts=n, copies=num_images_per_prompt, controls=bool(controls)
        )
        level = check_noise_level(noise_level, self.unet, self.low_res_schedule)
        towards = open_classifier(
            classifier, class_labels, classifier_scale, self.vae, prompts=n, copies=num_images_per_prompt
        )
        plan = self._plan(
            settings, canvas, controls, prompts, negatives, seed=seed, latents=latents, apg=apg, batch_size=batch_size,
            finite=output_type != "latent", callback=callback, condition=beside, noise_level=level, towards=towards,
        )  # fmt: skip
        if canvas is None:
            z = self._sampled(start(plan.generators, plan.shape, latents), plan)
        else:
            z = self._drawn_on(canvas, plan, latents)
        if output_type == "latent":
            return z
        self._check_latents(z)
        with self._working(self.vae):
            if canvas is None:
                return decode(self.vae, z, plan.size, output_type=output_type, batch_size=batch_size)
            pixels = decode(self.vae, z, plan.size, output_type="pt", batch_size=batch_size)
        finished: list[Image.Image] | npt.NDArray[np.uint8] | Tensor
        finished = from_tensors([*canvas.finished(pixels)], output_type)
        return finished

    @takes_fields(DrawingSettings)
    def invert(
        self,
        image: Images,
        prompt: Texts = "",
        negative_prompt: Texts | None = None,
        *,
        iterations: int = ITERATIONS,
        batch_size: int | None = None,
        **options: Unpack[DrawingKeywords],
    ) -> Tensor:
        """Return the noise that draws an image again, by DDIM inversion.

        `sd(prompt, latents=sd.invert(image, prompt))` draws about what `sd.vae.reconstruct(image)` returns; another
        prompt in the first place edits the image. The other options must be the same in both calls. Guidance makes the
        inversion less reliable: for four drawings of the embedded model, inverted in 30 steps and float32, the PSNR
        against the VAE's reconstruction is 65 to 72 dB at guidance_scale=1; at 1.5 and at 3 it is 64 to 72 dB for three
        of them, and 10 to 12 dB for the fourth.

        Args:
            image: Image to invert, one for all prompts or one for each; see the call.
            prompt: A prompt that describes the image, or a list of them.
            negative_prompt: As in the call.
            iterations: Evaluations of the U-Net for each step; see `sdkit.diffusion.inversion`. 1 is the plain, less
                exact inversion.
            batch_size: As in the call.

        Returns:
            (N, 4, h, w) noise, for the call's `latents`.

        Raises:
            ImageError: Something is no image.
            ArgumentError: An argument is out of range, or belongs to another sampler than DDIM with eta 0.

        Example:
            >>> import sdkit
            >>> sd = sdkit.StableDiffusion.from_pretrained("emoji")
            >>> cat = sd("a cat", seed=1, num_inference_steps=4)
            >>> noise = sd.invert(cat, "a cat", num_inference_steps=4)
            >>> dog = sd("a dog", latents=noise, num_inference_steps=4)
        """
        settings = DrawingSettings(**options)
        if settings.sampler != "ddim" or settings.eta != 0 or settings.strength is not None:
            raise ArgumentError("inversion is DDIM's, over all steps: leave sampler, eta, and strength out.")
        if settings.mask_blur != 0 or settings.padding_mask_crop is not None:
            raise ArgumentError("inversion takes no mask: leave mask_blur and padding_mask_crop out.")
        if self.unet.condition is not None or settings.image_guidance_scale != 1:
            raise ArgumentError(
                "inversion takes no condition: leave image_guidance_scale out, and take a text-to-image model."
            )
        if self.unet.inpaints:
            raise ArgumentError("this model was trained to paint into images; inversion takes a text-to-image model.")
        prompts, negatives = self._prompts(prompt, negative_prompt, 1)
        side = self.unet.sample_size * self.vae.factor
        whole = replace(settings, strength=1.0)
        canvas = open_canvas(image, None, whole, prompts=len(prompts), copies=1, side=side)
        controls = open_controls(None, None, settings, prompts=len(prompts), copies=1)
        plan = self._plan(
            settings, canvas, controls, prompts, negatives, seed=0, latents=None, apg=None, batch_size=batch_size,
            finite=True, callback=None,
        )  # fmt: skip
        with self._working(self.vae):
            z = self.vae.encode(canvas.images, sample=False)
        noise = self._sampled(z, replace(plan, sampler=partial(ddim_inversion, iterations=iterations)))
        self._check_latents(noise)
        return noise

    def _canvas(
        self, image: Images | None, mask_image: Any, settings: DrawingSettings, n: int, copies: int
    ) -> Canvas | None:
        """Read what N images are drawn on; None without an image.

        Args:
            image: As in `__call__`.
            mask_image: As in `__call__`.
            settings: How to draw.
            n: N, the number of prompts times `copies`.
            copies: Number of images of each prompt.
        """
        if self.unet.inpaints and (image is None or mask_image is None):
            raise ArgumentError(
                "this model was trained to paint into images: give image and mask_image, or take a text-to-image model."
            )
        if image is None:
            check_inputs(settings, image=False, mask=mask_image is not None)
            return None
        side = self.unet.sample_size * self.vae.factor
        return open_canvas(image, mask_image, settings, prompts=n // copies, copies=copies, side=side)

    def _plan(
        self, settings: DrawingSettings, canvas: Canvas | None, controls: list[Control], prompts: list[str],
        negatives: list[str], *, seed: int | Sequence[int], latents: Tensor | None, apg: APG | None,
        batch_size: int | None, finite: bool, callback: Callable[[Step], object] | None,
        condition: Tensor | None = None, noise_level: int | None = None,
        towards: Towards | None = None,
    ) -> Plan:  # fmt: skip
        """Check the settings and the arguments of a call against this model, and return all that is drawn."""
        given = (settings.height, settings.width) if canvas is None else canvas.size
        size = self._size(*given, latents, controls[0].images if controls else condition)
        generators = seeded(seed, len(prompts))
        spacing = default_spacing(settings.sampler) if settings.spacing is None else settings.spacing
        timesteps: Timesteps = self.schedule.timesteps(settings.num_inference_steps, spacing)
        if canvas is not None:
            timesteps = last_steps(timesteps, canvas.strength)
            if canvas.box is not None:
                whole = (canvas.whole.shape[2], canvas.whole.shape[3])
                controls = in_region(controls, whole, canvas.box)
                condition = None if condition is None else cut_out(condition, whole, canvas.box)
        guidance: dict[str, Any] = {
            "interval": settings.guidance_interval, "phi": settings.guidance_rescale, "projected": apg,
            "image_scale": check_image_scale(settings.image_guidance_scale),
        }  # fmt: skip
        model, scale = self._model(settings.guidance_scale, negatives, guidance)
        shape = self._latent_shape(*size)
        unguided = scale == 1 and guidance["image_scale"] == 1
        return Plan(
            settings=settings,
            size=size,
            shape=shape,
            timesteps=timesteps,
            generators=generators,
            batches=list(
                self._batches(prompts, None if unguided else negatives, settings.weighting, shape, batch_size)
            ),
            sampler=sampler_by_name(settings.sampler, eta=settings.eta),
            model=model,
            controls=fitted(controls, self.unet, self.vae.factor, size),
            beside=self._told(condition, size, generators, noise_level),
            noise_level=noise_level,
            towards=towards,
            guidance={"scale": scale, **guidance},
            finite=finite,
            callback=callback,
        )

    def _told(
        self, condition: Tensor | None, size: tuple[int, int], generators: Generators, noise_level: int | None
    ) -> Tensor | None:
        """Return what the U-Net reads beside x_t, of conditions (N, 3, H, W); None without them."""
        if condition is None or self.unet.condition is None:
            return None
        if noise_level is not None:
            shape = self._latent_shape(*size)[1:]
            return told_small(
                condition, size, self.upscale_factor, generators, noise_level, self.low_res_schedule, shape
            )
        with self._working(self.vae):
            return told(condition, self.unet.condition, self.vae, size)

    def _drawn_on(self, canvas: Canvas, plan: Plan, latents: Tensor | None) -> Tensor:
        """Sample from the noised latents of a canvas's images, or of their masked part.

        As in diffusers, an image's generator first draws from the posterior of the image, then x_T.

        Args:
            canvas: The images and masks.
            plan: All that is drawn.
            latents: (N, C, h, w) noise in place of that from the seeds, or None.

        Returns:
            Latents (N, C, h, w), float32, on the CPU.
        """
        mask = canvas.mask
        if self.unet.inpaints and mask is not None:
            return self._painted_into(canvas, mask, plan, latents)
        with self._working(self.vae):
            z = self.vae.encode(canvas.images, generator=plan.generators)
        noise = start(plan.generators, plan.shape, latents)
        noised = self.schedule.add_noise(z, noise, plan.timesteps[0][0])
        if mask is None:
            return self._sampled(noised, plan)
        original = Original(z=z, noise=noise, mask=latent_mask(mask, self.vae.factor))
        x_T = noise if canvas.anew else noised
        return original.outside(self._sampled(x_T, plan, self._inside(plan, original)))

    def _painted_into(self, canvas: Canvas, mask: Tensor, plan: Plan, latents: Tensor | None) -> Tensor:
        """Sample with a U-Net that takes the mask and the image without the masked part; see `_drawn_on`."""
        images = canvas.images
        with self._working(self.vae):
            encode = partial(self.vae.encode, generator=plan.generators)
            z = None if canvas.anew else encode(images)
            noise = start(plan.generators, plan.shape, latents)
            masked = encode(without_inside(images, mask))
        x_T = noise if z is None else self.schedule.add_noise(z, noise, plan.timesteps[0][0])
        concat = torch.cat([latent_mask(mask, self.vae.factor), masked], dim=1)
        return self._sampled(x_T, replace(plan, beside=concat))

    def _sampled(self, x_T: Tensor, plan: Plan, predictor: Predictor | None = None) -> Tensor:
        """Embed the prompts of a plan, and denoise its images, batch by batch.

        Args:
            x_T: (N, C, h, w), where sampling starts, on the CPU, at the noise level of the plan's first timestep.
            plan: All that is drawn.
            predictor: Makes the predictor of a batch; None is `guided` with the plan's model and guidance.

        Returns:
            Latents (N, C, h, w), float32, on the CPU.
        """
        z = torch.empty_like(x_T)
        # A ControlNet is its caller's: where it is on a GPU, it stays there.
        waiting = dict.fromkeys(control.network for control in plan.controls if control.network.device.type == "cpu")
        with torch.no_grad():
            for batch in plan.batches:
                with self._working(self.text):
                    cond, uncond = self._embedded(batch, plan)
                with self._working(self.unet, *waiting):
                    predict = (predictor or self._guided(plan))(batch, cond, uncond)
                    z[batch.images] = denoise(
                        predict,
                        x_T[batch.images].to(self.unet.device),
                        self.schedule,
                        plan.timesteps,
                        sampler=plan.sampler,
                        generators=[plan.generators[i] for i in batch.images],
                        callback=plan.callback,
                    ).cpu()
        return z

    def _guided(self, plan: Plan) -> Predictor:
        """Return the function that makes a batch's predictor with the plan's model, conditions, and guidance."""

        def predictor(batch: Batch, cond: Conditioning, uncond: Conditioning | None) -> Predict:
            if plan.beside is not None:
                rows = plan.beside[batch.images].to(self.unet.device)
                level = plan.noise_level
                label = None if level is None else torch.full((len(rows),), level, device=self.unet.device)
                cond = replace(cond, concat=rows, label=label)
                uncond = None if uncond is None else replace(uncond, concat=rows, label=label)
            controls = [control[batch.images] for control in plan.controls]
            model = controlled(plan.model, controls, plan.timesteps)
            predict = guided(model, self.schedule, cond, uncond, **plan.guidance)
            return predict if plan.towards is None else plan.towards.guide(predict, batch.images, self.schedule)

        return predictor

    def _inside(self, plan: Plan, original: Original) -> Predictor:
        """Return the function that makes a batch's predictor, which leaves the original outside the mask."""

        def predictor(batch: Batch, cond: Conditioning, uncond: Conditioning | None) -> Predict:
            rows = original[batch.images].to(self.unet.device)
            return keep_outside(self._guided(plan)(batch, cond, uncond), rows)

        return predictor

    @contextmanager
    def _working(self, *networks: Wrapper) -> Iterator[None]:
        """Keep networks on `offload_to` while they compute; a no-op without offloading."""
        with ExitStack() as moved:
            if self.offload_to is not None:
                for network in networks:
                    moved.enter_context(on_device(network, self.offload_to))
            yield

    def _model(
        self, guidance_scale: float | None, negatives: list[str], guidance: dict[str, Any]
    ) -> tuple[Model, float]:
        """Return the model and the guidance scale to pass to `guided`."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        # Inference mode for the U-Net alone, so that a callback can use the tensors of a `Step` with autograd.
        unet: Any = torch.inference_mode()(self.unet)
        if not self.unet.guided:
            return unet, scale
        self._check_guided(negatives, guidance)
        # A guidance-distilled U-Net takes the scale as an input. Scale 1 keeps `guided` from adding a second pass.
        return partial(unet, guidance_scale=check_scale(scale)), 1.0

    def _check_embeddings(self, conditions: list[Conditioning], weighting: bool) -> None:
        """Raise SdkitError, with the cause, if the text encoder gave numbers that are not finite."""
        if all(one.text is None or bool(torch.isfinite(one.text).all()) for one in conditions):
            return
        if weighting and bool(torch.isfinite(self.text.encode("")).all()):
            raise SdkitError("the prompt's weights are so large that its embedding is not finite; give smaller ones.")
        raise SdkitError(f"the text encoder gave numbers that are not finite; {_remedy(self.text)}.")

    def _check_latents(self, z: Tensor) -> None:
        """Raise SdkitError, with the cause, if the U-Net gave latents that are not finite."""
        if not bool(torch.isfinite(z).all()):
            raise SdkitError(f"the U-Net gave numbers that are not finite; {_remedy(self.unet)}.")

    @staticmethod
    def _check_guided(negatives: list[str], guidance: dict[str, Any]) -> None:
        """Raise ArgumentError for guidance options other than the scale, which a distilled U-Net does not support."""
        used = {"negative_prompt": any(negatives), "guidance_interval": guidance["interval"] is not None,
                "guidance_rescale": bool(guidance["phi"]), "apg": guidance["projected"] is not None,
                "image_guidance_scale": guidance["image_scale"] != 1}  # fmt: skip
        if option := next((option for option, given in used.items() if given), None):
            raise ArgumentError(
                "this model's U-Net takes the guidance scale as an input and makes one pass, without guidance: "
                f"{option} has no meaning for it; leave it out."
            )

    def images_at_once(self, height: int, width: int) -> int:
        """Return the default `batch_size` for images of a height and width in pixels."""
        return max(1, LATENTS_AT_ONCE * self.vae.factor**2 // max(1, height * width))

    def _prompts(
        self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, copies: int
    ) -> tuple[list[str], list[str]]:
        """Return the prompt and the negative prompt of each image."""
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

    def _size(
        self, height: int | None, width: int | None, latents: Tensor | None, followed: Tensor | None
    ) -> tuple[int, int]:
        """Return the images' height and width in pixels: the given ones, else those of `latents`, else those of
        `followed`, control images or conditions (N, 3, H, W), else the model's."""
        factor, side = self.vae.factor, self.unet.sample_size
        if latents is not None:
            if not isinstance(latents, Tensor) or latents.ndim != 4:
                raise ArgumentError("latents must be a tensor (N, 4, h, w) of standard normal noise.")
            height = latents.shape[2] * factor if height is None else height
            width = latents.shape[3] * factor if width is None else width
        elif followed is not None:
            times = self.upscale_factor if self.unet.condition == LOW_RES else 1
            height = followed.shape[2] * times if height is None else height
            width = followed.shape[3] * times if width is None else width
        height = check_side("height", side * factor if height is None else height, factor)
        return height, check_side("width", side * factor if width is None else width, factor)

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of one image's latents, (4, ceil(H / 8), ceil(W / 8))."""
        return self.vae.channels, -(-height // self.vae.factor), -(-width // self.vae.factor)

    def _batches(
        self,
        prompts: list[str],
        negatives: list[str] | None,
        weighting: bool,
        shape: tuple[int, int, int],
        batch_size: int | None,
    ) -> Iterator[Batch]:
        """Group images into batches.

        Images in a batch have prompts with the same number of chunks, since padding a prompt changes its image. Without
        guidance there are no negative prompts.
        """
        against = prompts if negatives is None else negatives
        lengths: dict[str, int] = {
            text: self.text.tokenize(text, weighting=weighting)[0].shape[1] for text in {*prompts, *against}
        }
        groups: dict[int, list[int]] = {}
        for i, (prompt, negative) in enumerate(zip(prompts, against, strict=True)):
            groups.setdefault(max(lengths[prompt], lengths[negative]), []).append(i)
        fitting = self.images_at_once(shape[1] * self.vae.factor, shape[2] * self.vae.factor)
        n = fitting if batch_size is None else whole_number("batch_size", batch_size, 1)
        for chunks, group in sorted(groups.items()):
            for indices in (group[i : i + n] for i in range(0, len(group), n)):
                yield Batch(
                    images=indices,
                    prompts=[prompts[i] for i in indices],
                    negatives=None if negatives is None else [negatives[i] for i in indices],
                    chunks=chunks,
                )

    def _embedded(self, batch: Batch, plan: Plan) -> tuple[Conditioning, Conditioning | None]:
        """Embed a batch's prompts and negative prompts. Where they must be finite, raise SdkitError if they are not."""
        options: dict[str, Any] = {"clip_skip": plan.settings.clip_skip, "weighting": plan.settings.weighting}
        device = self.unet.device if self.offload_to is None else self.offload_to
        conditions = [
            # Moved to the device of the U-Net once, not in every step.
            embed(self.text, texts, chunks=batch.chunks, **options).to(device)
            for texts in (batch.prompts, batch.negatives)
            if texts is not None
        ]
        if plan.finite:
            self._check_embeddings(conditions, plan.settings.weighting)
        return conditions[0], conditions[1] if len(conditions) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images that are denoised together.

    Attributes:
        images: Indices of these images among all images.
        prompts: The prompt of each image.
        negatives: The negative prompt of each image; None without guidance.
        chunks: Number of chunks of tokens that every prompt is padded to.
    """

    images: list[int]
    prompts: list[str]
    negatives: list[str] | None
    chunks: int


Predictor: TypeAlias = Callable[[Batch, Conditioning, Conditioning | None], Predict]
"""predictor(batch, cond, uncond): makes the predictor of a batch from its conditions."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a call draws: its arguments, checked, and with the model's own values for those that were not given.

    Attributes:
        settings: How to draw them, as the call was told.
        size: Height and width of the images in pixels.
        shape: (C, h, w), the shape of one image's latents.
        timesteps: Pairs (t, t_prev), from most noise to least.
        generators: One CPU generator for each of N images.
        batches: All N images, grouped into batches.
        sampler: The sampling loop.
        model: The U-Net as `guided` calls it.
        controls: ControlNets, with images of the size of the drawing.
        beside: (N, C', h, w), what the U-Net reads beside x_t, or None.
        noise_level: Noise level of an upsampler's image to enlarge; None for other models.
        towards: Classes that a classifier guides to, or None.
        guidance: The keywords of `guided`, the scale among them.
        finite: Whether embeddings must be finite.
        callback: Called with each `Step` of each batch.
    """

    settings: DrawingSettings
    size: tuple[int, int]
    shape: tuple[int, int, int]
    timesteps: Timesteps
    generators: Generators
    batches: Sequence[Batch]
    sampler: Sampler
    model: Model
    controls: Sequence[Control]
    beside: Tensor | None
    noise_level: int | None
    towards: Towards | None
    guidance: Mapping[str, Any]
    finite: bool
    callback: Callable[[Step], object] | None


def _remedy(part: UNet | TextEncoder) -> str:
    """Return the end of an error message: why a network gives numbers that are not finite, and what to do."""
    broken = next((name for name, weight in part.network.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        return f"its weight {clean(broken)} is not: load the model anew, from a file that is whole"
    if part.dtype == torch.float16:
        return "float16 holds none above 65504: take dtype 'fp32' or 'bf16'"
    return "its weights are: take a smaller guidance scale, smaller prompt weights, or a LoRA at a smaller scale"
