"""The systems: each function trains one in a workshop, and returns what draws with it.

A system's parts are trained by the toolkit's own stages; only the loop of the GAN is the recipe's. Systems that share a
part, such as the VQ-VAE, train it once, and its time counts for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sdkit
from sdkit.data import cache
from sdkit.images import to_pil
from sdkit.recipes.compare.data import SIDE, WORDS, Images, word_of
from sdkit.recipes.compare.gan import load_generator, train_gan
from sdkit.recipes.compare.workshop import Workshop
from sdkit.training import (
    ClassifierConfig,
    ClipConfig,
    ImagePriorConfig,
    PriorConfig,
    UNetConfig,
    VAEConfig,
    train_classifier,
    train_clip,
    train_image_prior,
    train_prior,
    train_unet,
    train_vae,
)

BATCH = 50  # images drawn at once
STEPS = 25  # sampling steps of diffusion models
PRIOR_STEPS, PRIOR_GUIDANCE = 10, 2.0  # of DALL-E 2's prior
GUIDANCE = 2.0  # of DALL-E, and of DALL-E 2's decoder
CLASSIFIER_SCALE = 1.0
CODES = 16  # of an image


@dataclass(frozen=True)
class Drawer:
    """A trained system.

    Attributes:
        draw: Draws an image for each caption, of which a model without text may use the number alone; from seeds 0, 1,
            2, and so on.
        parts: Names of the trained parts, whose times add up.
        networks: Networks that take part in a drawing.
        evaluations: Evaluations of a network that one image takes; a decoder counts as one.
        asked: What of a caption the system reads: "", "class", or "text".
    """

    draw: Callable[[Sequence[str]], Images]
    parts: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    evaluations: int
    asked: str = ""

    @property
    def weights(self) -> int:
        """Number of weights of the networks."""
        weights = {id(one): one.numel() for network in self.networks for one in network.parameters()}
        return sum(weights.values())


ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 2e-3}
"""Settings of priors over codes, and of the CLIP that judges."""


def _common(steps: int, *, batch_size: int = 16) -> dict[str, Any]:
    """Return settings that all stages share; priors over codes, and the judge, have another optimizer."""
    return {
        "max_steps": steps, "batch_size": batch_size, "optimizer": "muon", "learning_rate": 3e-3,
        "lr_scheduler": "cosine", "lr_warmup_steps": min(50, steps // 4),
        "ema_decay": 0.99, "validate_every": steps, "save_every": max(50, steps // 4),
        "keep_checkpoints": 1,
    }  # fmt: skip


def gan(work: Workshop) -> Drawer:
    """A GAN: one pass from noise to image."""
    generator = load_generator(
        work.trained("gan", lambda out, steps: train_gan(work.digits.training.pictures, out / "result", steps))
    )

    def draw(captions: Sequence[str]) -> Images:
        return to_pil(generator.draw([torch.Generator().manual_seed(seed) for seed in range(len(captions))]))

    return Drawer(draw, ("gan",), (generator,), 1)


def vae(work: Workshop) -> Drawer:
    """A VAE whose latent of 24 numbers is near N(0, I), so that random codes decode to images."""
    model = _autoencoder(work, "vae", regularizer="kl", kl_weight=VAE_KL)
    side = SIDE // model.factor

    def draw(captions: Sequence[str]) -> Images:
        sources = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
        z = torch.stack([torch.randn(model.channels, side, side, generator=source) for source in sources])
        return model.decode(z * model.scale)  # latents are those of the posterior, times the scale

    return Drawer(draw, ("vae",), (model.network.decoder, model.network.post_quant_conv), 1)


VAE_KL = 0.02
"""Weight of the KL of the VAE, beside squared errors summed over pixels: the ELBO of a decoder of variance 0.01.

At a weight of 1, after 600 steps, the decoder still ignored its latent, and drew the mean digit.
"""


def vq_pixelcnn(work: Workshop) -> Drawer:
    """A VQ-VAE, and a PixelCNN of its codes."""
    pipeline = _code_prior(work, "pixelcnn", kind="pixelcnn", layers=5, width=48)
    return _codes(pipeline, "pixelcnn")


def vq_gpt(work: Workshop) -> Drawer:
    """The same VQ-VAE, and a GPT of its codes."""
    return _codes(_code_prior(work, "gpt", kind="transformer", layers=3, width=96, heads=4), "gpt")


def dall_e(work: Workshop, guidance: float = GUIDANCE) -> Drawer:
    """DALL-E: the same VQ-VAE, and a GPT with the caption in front, guided with this scale."""
    pipeline = _code_prior(
        work, "dall-e", kind="transformer", layers=3, width=96, heads=4, conditioned_on="text", model="emoji"
    )

    def draw(captions: Sequence[str]) -> Images:
        drawn: Images = pipeline(list(captions), seed=[*range(len(captions))], guidance_scale=guidance)
        return drawn

    return Drawer(draw, ("vq", "vq-captioned", "dall-e"), _networks(pipeline), 2 * CODES + 1, "text")


def ddpm(work: Workshop) -> Drawer:
    """DDPM on pixels: noise predicted, a linear schedule, fixed variances."""
    return _diffusion(_unet(work, "ddpm", vae="pixels"), ("ddpm",))


def improved_ddpm(work: Workshop) -> Drawer:
    """Improved DDPM on pixels: a cosine schedule, and learned variances by the hybrid loss."""
    model = _unet(work, "improved-ddpm", vae="pixels", noise_schedule="cosine", loss="hybrid")
    return _diffusion(model, ("improved-ddpm",))


def adm(work: Workshop) -> Drawer:
    """ADM on pixels: classes, adaptive group norm, attention at two sizes, and a classifier of noisy images."""
    model = _unet(work, "adm", vae="pixels", class_folders=True, classes=WORDS, noise_schedule="cosine")

    def train(out: Path, steps: int) -> None:
        train_classifier(
            ClassifierConfig(
                model=work.result("adm"), vae="pixels", init=work.shape("classifier"), data=work.classes, out_dir=out,
                **_common(steps),
            )
        )  # fmt: skip

    classifier = sdkit.Classifier.from_pretrained(work.trained("classifier", train), dtype="fp32", device="cpu")

    def draw(captions: Sequence[str]) -> Images:
        words = [WORDS[word_of(caption)] for caption in captions]
        return model(
            words, classifier=classifier, class_labels=words, classifier_scale=CLASSIFIER_SCALE, guidance_scale=1.0,
            num_inference_steps=STEPS, sampler="ddpm", batch_size=BATCH,
        )  # fmt: skip

    return Drawer(draw, ("adm", "classifier"), (model.unet.network, classifier.network), 2 * STEPS, "class")


def ldm_kl(work: Workshop) -> Drawer:
    """Latent diffusion: a VAE with a small KL term, and DDPM in its latents."""
    _autoencoder(work, "kl", regularizer="kl", kl_weight=1e-3)
    data = _latents(work, "kl-latents", work.classes, "kl")
    model = _unet(work, "ldm-kl", vae=work.result("kl"), data=data, batch_size=32)
    return _diffusion(model, ("kl", "kl-latents", "ldm-kl"))


def ldm_vq(work: Workshop) -> Drawer:
    """Latent diffusion: the VQ-VAE, and DDPM in its latents before they are rounded to codes."""
    _vq(work)
    data = _latents(work, "vq-latents", work.classes, "vq")
    model = _unet(work, "ldm-vq", vae=work.result("vq"), data=data, batch_size=32)
    return _diffusion(model, ("vq", "vq-latents", "ldm-vq"))


def dall_e_2(work: Workshop) -> Drawer:
    """DALL-E 2: a CLIP, a prior from captions to its embeddings of images, and a decoder of these to pixels.

    The decoder reads no text, so that all that a caption says goes through the embedding.
    """
    prior = _image_prior(work)
    decoder = _decoder(work, prior)
    model = sdkit.UnCLIP.from_pretrained(decoder, prior=prior, device="cpu")
    assert model.prior is not None
    text_to_embedding = model.prior

    def draw(captions: Sequence[str]) -> Images:
        drawn: list[Any] = []
        for first in range(0, len(captions), BATCH):
            batch = captions[first : first + BATCH]
            sources = [torch.Generator().manual_seed(first + i) for i in range(len(batch))]
            embeddings = text_to_embedding.sample(
                batch, sources, num_inference_steps=PRIOR_STEPS, guidance_scale=PRIOR_GUIDANCE
            )
            drawn += model.draw(
                embeddings, generators=sources, num_inference_steps=STEPS, guidance_scale=GUIDANCE, sampler="ddpm"
            )
        return drawn

    networks = (text_to_embedding.network.network, text_to_embedding.text.network, model.sd.unet.network)
    return Drawer(draw, ("clip", "image-prior", "decoder"), networks, 2 * (PRIOR_STEPS + STEPS), "text")


SYSTEMS: dict[str, Callable[[Workshop], Drawer]] = {
    "GAN": gan,
    "VAE": vae,
    "VQ + PixelCNN": vq_pixelcnn,
    "VQ + GPT": vq_gpt,
    "DDPM": ddpm,
    "improved DDPM": improved_ddpm,
    "ADM, guided": adm,
    "LDM-KL": ldm_kl,
    "LDM-VQ": ldm_vq,
    "DALL-E": dall_e,
    "DALL-E 2": dall_e_2,
}
"""Name -> the function that trains the system and returns its drawer."""


AUTOENCODERS = {"vq": "VQ-VAE", "kl": "VAE of LDM-KL"}
"""Parts that reconstruct images, and what they are called."""


def reconstructions(work: Workshop, part: str, pictures: Images) -> Images:
    """Return pictures through an autoencoder that has been trained."""
    model = sdkit.VAE.from_pretrained(work.result(part), dtype="fp32", device="cpu")
    return model.reconstruct(list(pictures))


def train_the_clip(work: Workshop, part: str, data: Path, seed: int, **settings: Any) -> Path:
    """Train a CLIP, which the part "clip" of DALL-E 2 is, and another that judges."""

    def train(out: Path, steps: int) -> None:
        train_clip(
            ClipConfig(
                init=work.shape("clip"), data=data, out_dir=out, seed=seed,
                **_common(steps, batch_size=64) | settings,
            )
        )  # fmt: skip

    return work.trained(part, train)


def _autoencoder(work: Workshop, part: str, **settings: Any) -> sdkit.VAE:
    def train(out: Path, steps: int) -> None:
        train_vae(
            VAEConfig(
                init=work.shape(part), data=work.classes, out_dir=out, lpips_weight=0.0,
                **_common(steps) | {"ema_decay": 0.0} | settings,
            )
        )  # fmt: skip

    return sdkit.VAE.from_pretrained(work.trained(part, train), dtype="fp32", device="cpu")


def _vq(work: Workshop) -> sdkit.VAE:
    return _autoencoder(work, "vq", regularizer="vq")


def _latents(work: Workshop, part: str, data: Path, vae: str) -> Path:
    """Encode the training images by a trained autoencoder, once for all steps of those that learn its latents."""

    def encode(out: Path, steps: int) -> None:  # noqa: ARG001 - as for all parts
        cache("emoji", data, out / "result", vae=work.result(vae), size=SIDE, device="cpu", workers=1)

    return work.trained(part, encode)


def _code_prior(work: Workshop, part: str, **settings: Any) -> sdkit.TokenPipeline:
    """Train a prior over the codes of the VQ-VAE.

    With AdamW: after as many steps of Muon, most draws of the two GPTs were copies of training digits.
    """
    _vq(work)
    if "conditioned_on" in settings:
        data = _latents(work, "vq-captioned", work.captioned, "vq")
    else:
        data = _latents(work, "vq-latents", work.classes, "vq")

    def train(out: Path, steps: int) -> None:
        train_prior(
            PriorConfig(
                vae=work.result("vq"), data=data, out_dir=out,
                **_common(steps, batch_size=32) | ADAMW | settings,
            )
        )  # fmt: skip

    return sdkit.TokenPipeline.from_pretrained(work.trained(part, train), dtype="fp32", device="cpu")


def _networks(pipeline: sdkit.TokenPipeline) -> tuple[nn.Module, ...]:
    """Return the networks that draw: the prior, the codebook, and the decoder."""
    vq = pipeline.vae.network
    return pipeline.prior, vq.quantize, vq.post_quant_conv, vq.decoder


def _codes(pipeline: sdkit.TokenPipeline, part: str) -> Drawer:
    def draw(captions: Sequence[str]) -> Images:
        drawn: Images = pipeline(num_images=len(captions), seed=0)
        return drawn

    return Drawer(draw, ("vq", "vq-latents", part), _networks(pipeline), CODES + 1)


def _unet(work: Workshop, part: str, **settings: Any) -> sdkit.StableDiffusion:
    def train(out: Path, steps: int) -> None:
        given = {"data": work.classes, **_common(steps), **settings}
        train_unet(UNetConfig(init=work.shape(part), out_dir=out, **given))

    return sdkit.StableDiffusion.from_pretrained(work.trained(part, train), device="cpu")


def _diffusion(model: sdkit.StableDiffusion, parts: tuple[str, ...]) -> Drawer:
    """Return the drawer of a diffusion model without classes."""

    def draw(captions: Sequence[str]) -> Images:
        return model(
            "", num_images_per_prompt=len(captions), guidance_scale=1.0, num_inference_steps=STEPS, sampler="ddpm",
            batch_size=BATCH,
        )  # fmt: skip

    in_latents = len(parts) > 1
    networks: tuple[nn.Module, ...] = (model.unet.network,)
    if in_latents:
        networks += (model.vae.network.decoder, model.vae.network.post_quant_conv)
    return Drawer(draw, parts, networks, STEPS + in_latents)


def _image_prior(work: Workshop) -> Path:
    clip = train_the_clip(work, "clip", work.captioned, seed=0)

    def train(out: Path, steps: int) -> None:
        train_image_prior(
            ImagePriorConfig(
                model=clip, init=work.shape("image-prior"), data=work.captioned, out_dir=out,
                **_common(steps, batch_size=32),
            )
        )  # fmt: skip

    return work.trained("image-prior", train)


def _decoder(work: Workshop, prior: Path) -> Path:
    def train(out: Path, steps: int) -> None:
        train_unet(
            UNetConfig(
                init=work.shape("decoder"), vae="pixels", image_encoder=prior, data=work.captioned, out_dir=out,
                caption_dropout=1.0, noise_schedule="cosine", **_common(steps),
            )
        )  # fmt: skip

    return work.trained("decoder", train)
