"""What the networks are trained on: reconstruction, KL, adversarial and denoising losses, and their weights.

Each loss is a pure function that returns one number: a scalar tensor, computed in float32 whatever precision the
networks ran in (float64 stays float64). LPIPS, which has weights of its own, is in `sdkit.networks.lpips`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.arguments import PREDICTIONS, number, one_of
from sdkit.errors import ArgumentError

DELTA, LARGEST = 1e-6, 1e4  # of the adaptive weight


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of `x` and `y`, of one shape."""
    return (_wide(x) - _wide(y)).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of `x` and `y`, of one shape."""
    return (_wide(x) - _wide(y)).square().mean()


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of the posteriors N(mean, exp(logvar)), both (B, 4, h, w), from N(0, 1), in nats.

    Kingma & Welling 2014 (https://arxiv.org/abs/1312.6114), appendix B: summed over an image's latents, then the mean
    over images. Beside a reconstruction loss that is a mean over pixels, latent diffusion's weight of 1e-6 (Rombach et
    al. 2022, appendix G), which goes with a sum over them, is 1e-6 / (3 H W).
    """
    mean, logvar = _wide(mean), _wide(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def vq(latents: Tensor, codes: Tensor, beta: float = 0.25) -> Tensor:
    """What a codebook learns by: `codes` come to the `latents` they stand for, and these, by `beta` as much, to them.

    Second and third term of VQ-VAE's loss (van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, eq. 3), as means
    over all values. Both are (B, C, h, w).
    """
    z, e = _wide(latents), _wide(codes)
    return (e - z.detach()).square().mean() + number("beta", beta, 0) * (z - e.detach()).square().mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on its logits, of any shape, for real images and for reconstructions (detached).

    Hinge loss (Lim & Ye 2017, https://arxiv.org/abs/1705.02894), halved as in VQGAN: 1 for logits of 0, 0 where each
    side is beyond its margin of 1.
    """
    return 0.5 * (F.relu(1 - _wide(real)).mean() + F.relu(1 + _wide(fake)).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss (Lim & Ye 2017): minus the discriminator's mean logit for its images."""
    return -_wide(fake).mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer_weight: Tensor,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How much the adversarial loss weighs, so that it pulls the decoder's last layer as hard as the reconstruction.

    lambda = |grad of reconstruction| / (|grad of adversarial| + 1e-6), at most 1e4 and without gradient (Esser et al.
    2021, https://arxiv.org/abs/2012.09841, eq. 7). Both losses keep their graphs.

    last_layer_weight: the weight of the decoder's last convolution, on which both losses depend.
    average:           makes a gradient the mean of all processes', such as `partial(accelerator.reduce,
                       reduction="mean")`: lambda is then the whole batch's, and the same everywhere. None for one
                       process.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0]
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    reconstruction, adversarial = (_wide(average(g) if average else g).norm() for g in gradients)
    weight: Tensor = reconstruction / (adversarial + DELTA)
    return weight.clamp(max=LARGEST)


def min_snr_weight(snr: Tensor, gamma: float | None, prediction_type: str, *, keep_noisiest: bool = False) -> Tensor:
    """The weight of each sample in `diffusion_loss` by its timestep's signal-to-noise ratio (B,), in [0, infinity].

    Min-SNR (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4; 5 is the paper's gamma): the loss in x0
    weighs min(snr, gamma), which is min(snr, gamma) / snr for eps and min(snr, gamma) / (snr + 1) for v. All are 1
    where `gamma` is None. At zero terminal SNR eps takes its limit, 1.

    keep_noisiest: put snr + 1 in place of snr inside the minimum, for v and x0. Min-SNR gives their noisiest steps next
                   to no weight, and none at all at zero terminal SNR, where a picture's colours are decided; then
                   v has min(1, gamma / (snr + 1)): like eps, 1 at the noisy end. It changes nothing for eps.

    Raises ArgumentError for a gamma that is not a number above 0 and for an unknown prediction type.
    """
    kind = PREDICTIONS[one_of("prediction_type", prediction_type, PREDICTIONS)]
    if gamma is None:
        return torch.ones_like(snr)
    gamma = number("gamma", gamma, low=1e-3)
    if kind == "epsilon":
        return (gamma / snr).clamp(max=1)
    weight = (snr + 1 if keep_noisiest else snr).clamp(max=gamma)  # of the loss in x0
    return weight / (snr + 1) if kind == "v_prediction" else weight


def diffusion_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The denoising loss (Ho et al. 2020, eq. 14): the mean over the batch of `weight` times each sample's mean squared
    error.

    output, target: (B, ...), both eps, both v or both x0.
    weight:         (B,), as from `min_snr_weight`; None weighs all alike.
    """
    if output.shape != target.shape or (weight is not None and weight.shape != output.shape[:1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (output, target, weight) if x is not None)
        raise ArgumentError(f"output, target and weight must be (B, ...), the same, and (B,), not {shapes}.")
    errors = (_wide(output) - _wide(target)).square().flatten(1).mean(1)
    return (errors if weight is None else errors * weight.to(errors)).mean()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
