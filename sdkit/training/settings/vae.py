"""Settings of `train_vae`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sdkit.errors import ArgumentError
from sdkit.training.settings.stage import StageSettings

RECONSTRUCTIONS = ("l1", "l2")
REGULARIZERS = ("none", "kl", "vq")
LPIPS_VARIABLE = "SDKIT_LPIPS"  # environment variable that names the weights of LPIPS


@dataclass(frozen=True, kw_only=True)
class VAEConfig(StageSettings):
    """Settings of `train_vae`.

    The loss is reconstruction + lpips_weight * LPIPS + kl_weight * KL + disc_weight * adversarial. A VQModel has the
    codebook loss in place of kl_weight * KL.

    Attributes:
        train_encoder: Train the encoder too. It changes the latents, so U-Nets and caches made for this VAE
            may no longer fit.
        reconstruction: Reconstruction loss: l1 (as in latent diffusion) or l2 (as in Stability's ft-mse).
        lpips_weight: Weight of the perceptual loss LPIPS; without it, reconstructions are blurred.
        lpips: Network of LPIPS: alex, which ships with sdkit, or VGG, recommended where its weights are at
            hand: a file, a folder, or a Hub id of them, or vgg, if the variable SDKIT_LPIPS names them. None
            is what SDKIT_LPIPS names, or else alex.
        regularizer: Regularizer of the latents: kl, vq (for a VQModel only), or none (an autoencoder
            without noise).
        codebook_decay: Decay of the moving averages that the codes of a VQModel follow (VQ-VAE, appendix A.1),
            with a k-means start and restarts of dead codes; 0 trains the codes by gradient alone.
        normalize_codes: Codes of length 1, compared with latents by their angle (ViT-VQGAN).
        kl_weight: Weight of the KL next to a loss summed over pixels, as in latent diffusion; ignored if
            the encoder is frozen.
        disc_weight: Weight of the adversarial loss of a PatchGAN discriminator, multiplied by VQGAN's
            adaptive weight; 0 turns it off, latent diffusion uses 0.5.
        disc_start: Optimizer step from which the discriminator is used.
        input_noise: Standard deviation of Gaussian noise on the input, whose pixels are in [-1, 1]. The target is the
            clean image: a denoising autoencoder (Vincent et al. 2008). 0 adds none.
        mask_ratio: Share of the input's square patches that are masked with grey; the target is the whole image.
        mask_patch: Side of a masked patch in pixels.
        latent_noise: Noise on the scaled latents that the decoder reads, so that it forgives small errors of a U-Net
            (noise-augmented decoding; Zheng et al. 2025, https://arxiv.org/abs/2510.11690, section 4). The standard
            deviation for each sample is the absolute value of a normal draw with this standard deviation. 0 adds none.
        validation_data: Held-out images (the first 64 are used); None holds out a twentieth of the data, at
            most 16.
    """

    train_encoder: bool = False
    reconstruction: str = "l2"
    lpips_weight: float = 0.1
    lpips: str | os.PathLike[str] | None = None
    regularizer: str = "kl"
    codebook_decay: float = 0.99
    normalize_codes: bool = False
    kl_weight: float = 1e-6
    disc_weight: float = 0.0
    disc_start: int = 0
    input_noise: float = 0.0
    mask_ratio: float = 0.0
    mask_patch: int = 8
    latent_noise: float = 0.0
    validation_data: str | os.PathLike[str] | None = None

    may_change = StageSettings.may_change | {"lpips", "validation_data"}  # paths; fingerprints cover the contents

    def __post_init__(self) -> None:
        super().__post_init__()
        from sdkit.arguments import flag, number, one_of, path_or_name, whole_number

        if self.lpips is None:  # saved with the settings, because the run depends on it
            self._keep("lpips", os.environ.get(LPIPS_VARIABLE) or "alex")
        if any(metric.name == "clip_score" for metric in self.metrics):
            raise ArgumentError("evaluate clip_score compares drawings with prompts, and a VAE has none; leave it out.")
        path_or_name("lpips", self.lpips)
        if self.validation_data is not None:
            path_or_name("validation_data", self.validation_data)
            self._keep_apart("validation_data", self.validation_data)
        flag("train_encoder", self.train_encoder)
        one_of("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        one_of("regularizer", self.regularizer, REGULARIZERS)
        self._keep("codebook_decay", number("codebook_decay", self.codebook_decay, 0, 0.9999))
        flag("normalize_codes", self.normalize_codes)
        if self.normalize_codes and not (self.regularizer == "vq" and (self.train_encoder or self.init is not None)):
            raise ArgumentError(
                "normalize_codes changes the codes of a VQModel; it needs regularizer vq, and train_encoder or init."
            )
        for name in ("lpips_weight", "kl_weight", "disc_weight"):
            self._keep(name, number(name, getattr(self, name), 0))
        self._keep("disc_start", whole_number("disc_start", self.disc_start, 0))
        if self.disc_start and not self.disc_weight:
            raise ArgumentError("disc_start belongs to a discriminator, and there is none; give disc_weight, too.")
        self._keep("input_noise", number("input_noise", self.input_noise, 0))
        self._keep("mask_ratio", number("mask_ratio", self.mask_ratio, 0, 0.99))
        self._keep("mask_patch", whole_number("mask_patch", self.mask_patch, 1))
        if self.mask_patch != type(self).mask_patch and not self.mask_ratio:
            raise ArgumentError("mask_patch is the size of masked patches, and none are masked; give mask_ratio, too.")
        self._keep("latent_noise", number("latent_noise", self.latent_noise, 0))
        if self.latent_noise and (self.train_encoder or self.init is not None or self.regularizer == "vq"):
            raise ArgumentError(
                "latent_noise trains the decoder of an AutoencoderKL alone, as an encoder would learn larger latents "
                "against it; leave out train_encoder, init, and regularizer vq, or latent_noise."
            )
