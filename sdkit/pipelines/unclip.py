"""DALL-E 2 (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125): a prior turns a text into the CLIP embedding of an
image, and a decoder turns the embedding into an image.

Without a prior, the decoder draws variations of an image, and images between two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdkit.arguments import seeded, strings, whole_number
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.embedding_noise import EmbeddingNoise
from sdkit.diffusion.guidance import guided
from sdkit.diffusion.latent_space import slerp
from sdkit.diffusion.samplers import Generators, sampler_by_name
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.engines.device import resolve_place
from sdkit.errors import ArgumentError
from sdkit.images import Images, to_pil
from sdkit.images.convert import flat
from sdkit.loading.source import Source
from sdkit.loading.unclip_folder import UnCLIPFolder
from sdkit.networks.autoencoder import VAE
from sdkit.networks.clip import ImageEncoder, TextTower
from sdkit.networks.denoiser import UNet
from sdkit.networks.image_prior import ImagePrior
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.settings import DECODER_GUIDANCE, DECODER_STEPS, PRIOR_GUIDANCE, PRIOR_STEPS
from sdkit.pipelines.steps import decode, denoise, embed, start
from sdkit.pipelines.text_to_image import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A prior, with the text encoder that it reads and its noise schedule.

    Attributes:
        network: The prior.
        text: CLIP's text encoder, with the projection into the space of images.
        schedule: The noise schedule; it predicts x0.
    """

    network: ImagePrior
    text: TextTower
    schedule: NoiseSchedule

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[str],
        generators: Generators,
        *,
        num_inference_steps: int = PRIOR_STEPS,
        guidance_scale: float = PRIOR_GUIDANCE,
        sampler: str = "ddpm",
    ) -> Tensor:
        """Draw an embedding of an image for each of B prompts.

        Args:
            prompts: B prompts.
            generators: One CPU generator for each, for x_T and then for the steps' noise.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Scale of classifier-free guidance against the empty prompt; 1 turns it off.
            sampler: Name of a sampler.

        Returns:
            (B, D), float32, on the prior's device.

        Raises:
            ArgumentError: The steps, the scale, or the sampler are impossible.
        """
        cond = self.text.condition(prompts)
        uncond = self.text.condition([""] * len(prompts)) if guidance_scale != 1 else None
        x_T = torch.stack([torch.randn(self.network.width, generator=generator) for generator in generators])
        predict = guided(self.network, self.schedule, cond, uncond, guidance_scale)
        x0 = denoise(
            predict, x_T.to(self.network.device), self.schedule, self.schedule.timesteps(num_inference_steps),
            sampler=sampler_by_name(sampler), generators=generators,
        )  # fmt: skip
        return self.network.embeddings(x0)


class UnCLIP:
    """A decoder of image embeddings, with the CLIP that makes them, and a prior that draws them for a text.

    Args:
        sd: The decoder: a VAE, a text encoder, a U-Net that takes an embedding as its class label, and the schedule.
        noise: The noise augmentation of embeddings.
        image_encoder: CLIP's image encoder, for variations; None can only draw from embeddings and texts.
        prior: The prior; None can only draw from embeddings and images.

    Attributes:
        sd: As above, and so are the others.
        noise: As above.
        image_encoder: As above.
        prior: As above.

    Raises:
        ArgumentError: The parts do not fit each other.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        noise: EmbeddingNoise,
        image_encoder: ImageEncoder | None = None,
        prior: Prior | None = None,
    ) -> None:
        settings = sd.unet.network.config
        if settings.class_embed_type != "projection":
            raise ArgumentError("this U-Net takes no embedding of an image; give a decoder of unCLIP.")
        taken = settings.projection_class_embeddings_input_dim
        if taken != 2 * noise.width:
            raise ArgumentError(
                f"this U-Net takes labels of width {taken}; noised embeddings of width {noise.width} and their noise "
                f"level make {2 * noise.width}: the parts belong to different models."
            )
        for part, width in (
            ("image encoder", image_encoder and image_encoder.width), ("prior", prior and prior.network.width)
        ):  # fmt: skip
            if width is not None and width != noise.width:
                raise ArgumentError(
                    f"the {part}'s embeddings are of width {width}, the decoder's of {noise.width}: the parts belong "
                    "to different models."
                )
        self.sd, self.noise, self.image_encoder, self.prior = sd, noise, image_encoder, prior

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        prior: str | PathLike[str] | None = None,
        dtype: str | torch.dtype = "fp32",
        device: str | torch.device = "auto",
    ) -> UnCLIP:
        """Load a model.

        Args:
            source: A folder or a Hub id in the layout of diffusers' StableUnCLIPPipeline or
                StableUnCLIPImg2ImgPipeline, such as the result of `train_unet` with `image_encoder`.
            prior: Another folder with the prior, such as the result of `train_image_prior`; None takes the source's
                own, if there is one.
            dtype: "fp32", "bf16", "fp16", or "auto": bfloat16 where the hardware multiplies it, else float32. Noise
                schedules, and the statistics of embeddings, are never in half precision.
            device: "cpu", "cuda", or "auto": a GPU where there is one.

        Raises:
            SourceError: A part is missing, damaged, or of another kind.
            ArgumentError: The parts do not belong to one model.
        """
        dtype, on = resolve_place(dtype, device)
        opened, folder = Source.open(source), UnCLIPFolder(source)
        vae, text = VAE(opened.autoencoder(dtype)), TextEncoder(*opened.text_encoder(dtype))
        unet = UNet(opened.denoiser(dtype, embedded=True))
        for part in (vae, text, unet):
            part.eval().to(on)
        sd = StableDiffusion(vae, text, unet, opened.schedule(latents=vae.kind.makes_latents), name=opened.name)
        beside = folder if prior is None else UnCLIPFolder(prior)
        encoder = next((one for one in (folder, beside) if one.has("image_encoder")), None)
        return cls(
            sd,
            folder.noise(),
            None if encoder is None else ImageEncoder(encoder.network("image_encoder")).to(on, dtype),
            open_prior(beside, on, dtype) if prior is not None or folder.has("prior") else None,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        prior_num_inference_steps: int = PRIOR_STEPS,
        prior_guidance_scale: float = PRIOR_GUIDANCE,
        prior_sampler: str = "ddpm",
        **drawing: Any,
    ) -> list[Image.Image]:
        """Draw an image for each prompt: text -> embedding -> image.

        Args:
            prompt: One prompt, or a list of them.
            seed: Seed of the first image; image i has seed + i, or the i-th of a list.
            prior_num_inference_steps: Steps of the prior's sampler.
            prior_guidance_scale: Guidance scale of the prior.
            prior_sampler: Sampler of the prior.
            **drawing: Arguments of `draw`.

        Returns:
            PIL images.

        Raises:
            ArgumentError: An argument is impossible, or there is no prior.
        """
        prompts = strings("prompt", prompt)
        generators = seeded(seed, len(prompts))
        if self.prior is None:
            raise ArgumentError("this model has no prior, so it draws no texts; give prior=, or images to vary.")
        embeddings = self.prior.sample(
            prompts, generators, num_inference_steps=prior_num_inference_steps, guidance_scale=prior_guidance_scale,
            sampler=prior_sampler,
        )  # fmt: skip
        return self.draw(embeddings, prompt=prompts, generators=generators, **drawing)

    @torch.inference_mode()
    def draw(
        self,
        embeddings: Tensor,
        *,
        prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        noise_level: int = 0,
        num_inference_steps: int = DECODER_STEPS,
        guidance_scale: float = DECODER_GUIDANCE,
        sampler: str = "ddim",
        generators: Generators | None = None,
    ) -> list[Image.Image]:
        """Draw an image of each embedding.

        Args:
            embeddings: (B, D), CLIP's embeddings of images, of the length that CLIP gives them.
            prompt: Text that the decoder reads beside each; or a list of B texts.
            seed: As in `__call__`; ignored if there are generators.
            noise_level: Timestep of the noise that is added to the embedding; more of it gives more variety.
            num_inference_steps: Steps of the decoder's sampler.
            guidance_scale: Guidance scale against no embedding and the empty prompt; 1 turns it off. The default is
                stable unCLIP's; it saturates a small decoder that was trained for minutes, which needs about 2.
            sampler: Name of a sampler.
            generators: One CPU generator for each image: for the embedding's noise, x_T, and the steps' noise.

        Returns:
            B PIL images.

        Raises:
            ArgumentError: An argument is impossible, or the embeddings are not those of this model's CLIP.
        """
        if not isinstance(embeddings, Tensor) or not embeddings.numel() or not bool(embeddings.isfinite().all()):
            raise ArgumentError("embeddings must be a tensor (B, D) of finite numbers, as embed_images returns it.")
        n, sd = len(embeddings), self.sd
        prompts = [prompt] * n if isinstance(prompt, str) else strings("prompt", prompt)
        if len(prompts) != n:
            raise ArgumentError(f"{len(prompts)} prompts do not serve {n} embeddings; give one, or one for each.")
        generators = seeded(seed, n) if generators is None else generators
        levels = torch.full((n,), self.noise.level(noise_level))
        eps = torch.stack([torch.randn(self.noise.width, generator=generator) for generator in generators])
        label = self.noise.label(embeddings.to(sd.unet.device), levels, eps)
        cond, uncond = embed(sd.text, [*prompts, *[""] * n]).chunk(2)
        cond, uncond = (
            Conditioning(one.text, label=given) for one, given in ((cond, label), (uncond, torch.zeros_like(label)))
        )
        side = sd.unet.sample_size
        x_T = start(generators, (sd.unet.channels, side, side)).to(sd.unet.device)
        predict = guided(sd.unet, sd.schedule, cond, uncond, guidance_scale)
        z = denoise(
            predict, x_T, sd.schedule, sd.schedule.timesteps(num_inference_steps),
            sampler=sampler_by_name(sampler), generators=generators,
        )  # fmt: skip
        return decode(sd.vae, z, (side * sd.vae.factor, side * sd.vae.factor))

    def embed_images(self, images: Images) -> Tensor:
        """Return CLIP's embeddings (B, D) of images.

        Raises:
            ArgumentError: There is no image encoder.
        """
        if self.image_encoder is None:
            raise ArgumentError("this model has no image encoder; give one that has image_encoder/, or embeddings.")
        pictures = [image if isinstance(image, Image.Image) else to_pil(image)[0] for image in flat(images)]
        return self.image_encoder.embed(pictures)

    def variations(self, image: Images, n: int = 4, **drawing: Any) -> list[Image.Image]:
        """Draw n variations of an image: it is embedded, and the decoder draws the embedding from other seeds.

        Args:
            image: One image.
            n: Number of variations.
            **drawing: Arguments of `draw`.

        Returns:
            n PIL images.

        Raises:
            ArgumentError: There is more than one image, or no image encoder, or an argument is impossible.
        """
        embeddings = self.embed_images(image)
        if len(embeddings) != 1:
            raise ArgumentError(f"variations are of one image, not of {len(embeddings)}; call this for each.")
        return self.draw(embeddings.expand(whole_number("n", n, 1), -1), **drawing)

    def interpolate(self, a: Images, b: Images, n: int = 8, *, seed: int = 0, **drawing: Any) -> list[Image.Image]:
        """Draw n images from one image to another: the direction of the embedding moves along the great circle between
        theirs, and its length from one to the other. All images have one seed.

        Args:
            a: The image at the beginning.
            b: The image at the end.
            n: Number of images, at least 2; the first has the embedding of `a`, the last that of `b`.
            seed: Seed of all of them, so that they differ by their embeddings alone.
            **drawing: Arguments of `draw`.

        Returns:
            n PIL images.

        Raises:
            ArgumentError: An end is not one image, or there is no image encoder, or an argument is impossible.
        """
        first, last = self.embed_images(a).cpu(), self.embed_images(b).cpu()
        if len(first) != 1 or len(last) != 1:
            raise ArgumentError("interpolation is between two single images; give one at each end.")
        position = torch.linspace(0, 1, whole_number("n", n, 2))
        a_unit, b_unit = (F.normalize(one).reshape(-1, 1, 1) for one in (first, last))  # one vector: (D, 1, 1)
        length = torch.lerp(first.norm(), last.norm(), position)
        between = slerp(a_unit, b_unit, position).flatten(1) * length[:, None]
        return self.draw(between, seed=[seed] * n, **drawing)


def open_prior(folder: UnCLIPFolder, device: torch.device, dtype: torch.dtype = torch.float32) -> Prior:
    """Load a prior. Raises ArgumentError if its text encoder is not the one that it was made for."""
    network = ImagePrior(folder.network("prior"))
    text = TextTower(folder.network("prior_text_encoder"), folder.tokenizer())
    network.check_fits(text.width, text.hidden, text.length)
    statistics = network.network.clip_mean.data, network.network.clip_std.data
    network.to(dtype)
    network.network.clip_mean.data, network.network.clip_std.data = statistics  # half precision would round them
    return Prior(network=network.to(device), text=text.to(device, dtype), schedule=folder.schedule("prior_scheduler"))
