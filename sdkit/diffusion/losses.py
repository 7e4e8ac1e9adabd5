"""Training losses and their weights: reconstruction, KL, VQ, adversarial, and denoising.

Each loss is a pure function that returns a scalar tensor. It is computed in float32, whatever the precision of the
networks, or in float64 for float64 inputs. LPIPS is a pretrained network; see `sdkit.networks.lpips`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkit.arguments import PREDICTIONS, number, one_of
from sdkit.errors import ArgumentError

DELTA = 1e-6
"""Epsilon in the denominator of the adaptive weight."""
LARGEST = 1e4
"""Upper bound of the adaptive weight."""
HALF_LEVEL = 1 / 255
"""Half the distance of two levels of a pixel in [-1, 1]."""
TINY = 1e-12
"""Smallest difference of two logarithms, where they are equal to the last digit."""


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference of `x` and `y`, which have the same shape."""
    return (_wide(x) - _wide(y)).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference of `x` and `y`, which have the same shape."""
    return (_wide(x) - _wide(y)).square().mean()


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL divergence of posteriors N(mean, exp(logvar)) from N(0, 1), in nats (Kingma & Welling 2014,
    https://arxiv.org/abs/1312.6114, appendix B).

    The divergence is summed over an image's latents and averaged over images. Latent diffusion's weight of 1e-6
    (Rombach et al. 2022, appendix G) assumes a reconstruction loss summed over pixels and channels. For a mean over
    them, the equivalent weight is 1e-6 / (3 H W).

    Args:
        mean: (B, 4, h, w), means of the posteriors.
        logvar: (B, 4, h, w), their log-variances.
    """
    mean, logvar = _wide(mean), _wide(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def vq(latents: Tensor, codes: Tensor, beta: float = 0.25) -> Tensor:
    """Return the VQ-VAE loss: the codebook loss plus `beta` times the commitment loss (van den Oord et al. 2017,
    https://arxiv.org/abs/1711.00937, second and third term of eq. 3), as means over all values.

    Args:
        latents: (B, C, h, w), the encoder's output.
        codes: (B, C, h, w), the nearest code of each latent.
        beta: Weight of the commitment loss.
    """
    z, e = _wide(latents), _wide(codes)
    return (e - z.detach()).square().mean() + number("beta", beta, 0) * (z - e.detach()).square().mean()


def without_gradient(codes: Tensor) -> Tensor:
    """Return codes with a gradient of zero, for a codebook that follows moving averages (van den Oord et al. 2017,
    appendix A.1) and not the codebook loss, which would otherwise count in the norm by which gradients are clipped."""
    return codes.detach() + 0 * codes  # zero, not missing: processes exchange the gradients of all weights


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim & Ye 2017, https://arxiv.org/abs/1705.02894), halved as in VQGAN.

    It is 1 for logits of 0, and 0 where real logits are above 1 and fake ones below -1.

    Args:
        real: Logits of real images, of any shape.
        fake: Logits of detached reconstructions, of any shape.
    """
    return 0.5 * (F.relu(1 - _wide(real)).mean() + F.relu(1 + _wide(fake)).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Return the generator's hinge loss (Lim & Ye 2017): minus the mean of the discriminator's logits `fake`."""
    return -_wide(fake).mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer_weight: Tensor,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the weight of the adversarial loss at which its gradient in the decoder's last layer is as large as the
    reconstruction loss's.

    lambda = |grad of reconstruction| / (|grad of adversarial| + 1e-6), at most 1e4 (Esser et al. 2021,
    https://arxiv.org/abs/2012.09841, eq. 7). The weight has no gradient, and both losses keep their graphs.

    Args:
        reconstruction_loss: A scalar.
        adversarial_loss: A scalar.
        last_layer_weight: The weight of the decoder's last convolution, on which both losses depend.
        average: Averages a gradient over all processes, such as `partial(accelerator.reduce, reduction="mean")`, so
            that lambda is the same in each. None for a single process.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer_weight, retain_graph=True)[0]
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    reconstruction, adversarial = (_wide(average(g) if average else g).norm() for g in gradients)
    weight: Tensor = reconstruction / (adversarial + DELTA)
    return weight.clamp(max=LARGEST)


def min_snr_weight(snr: Tensor, gamma: float | None, prediction_type: str, *, keep_noisiest: bool = False) -> Tensor:
    """Return the min-SNR weight of each sample in `diffusion_loss` (Hang et al. 2023,
    https://arxiv.org/abs/2303.09556, section 3.4).

    The weight of an x0 loss is min(snr, gamma). The equivalent weight of an eps loss is min(snr, gamma) / snr, and that
    of a v loss is min(snr, gamma) / (snr + 1). At zero terminal SNR the weight of an eps loss is its limit, 1.

    Args:
        snr: (B,), the signal-to-noise ratio at each sample's timestep, in [0, infinity].
        gamma: Bound of the signal-to-noise ratio, at least 0.001; the paper uses 5. None weights all samples by 1.
        prediction_type: "epsilon", "v_prediction", or "sample" (x0).
        keep_noisiest: For v and x0, use snr + 1 in place of snr inside the minimum. Min-SNR gives the noisiest steps
            of v and x0 almost no weight, and none at zero terminal SNR, although these steps decide an image's
            colours. The weight of a v loss is then min(1, gamma / (snr + 1)), which is 1 for the noisiest steps, as is
            the weight of an eps loss. Ignored for eps.

    Returns:
        Weights (B,).

    Raises:
        ArgumentError: `gamma` is out of range, or the prediction type is unknown.
    """
    kind = PREDICTIONS[one_of("prediction_type", prediction_type, PREDICTIONS)]
    if gamma is None:
        return torch.ones_like(snr)
    gamma = number("gamma", gamma, low=1e-3)
    if kind == "epsilon":
        return (gamma / snr).clamp(max=1)
    weight = (snr + 1 if keep_noisiest else snr).clamp(max=gamma)  # the weight of an x0 loss
    return weight / (snr + 1) if kind == "v_prediction" else weight


def diffusion_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the denoising loss (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 14): the batch mean of `weight`
    times each sample's mean squared error.

    Args:
        output: (B, ...), the model's output: eps, v, or x0.
        target: (B, ...), in the same parameterisation, as from `NoiseSchedule.target`.
        weight: (B,), as from `min_snr_weight`; None weights all samples by 1.

    Raises:
        ArgumentError: The shapes do not match.
    """
    if output.shape != target.shape or (weight is not None and weight.shape != output.shape[:1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (output, target, weight) if x is not None)
        raise ArgumentError(f"output, target and weight must be (B, ...), the same, and (B,), not {shapes}.")
    errors = (_wide(output) - _wide(target)).square().flatten(1).mean(1)
    return (errors if weight is None else errors * weight.to(errors)).mean()


def normal_kl(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """Return the KL divergence of N(mean, exp(logvar)) from N(other_mean, exp(other_logvar)), element by element, in
    nats. The tensors have one shape, or broadcast to one.
    """
    mean, logvar, other_mean, other_logvar = map(_wide, (mean, logvar, other_mean, other_logvar))
    difference = logvar - other_logvar
    apart = (mean - other_mean).square() * torch.exp(-other_logvar)
    return 0.5 * (torch.expm1(difference) - difference + apart)  # exp(x) - 1 would lose the digits of a small x


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return -log p(x) of pixels of 256 levels under a Gaussian, element by element, in nats (Ho et al. 2020,
    https://arxiv.org/abs/2006.11239, eq. 13).

    A level has the Gaussian's mass within 1/255 of it; the darkest and the brightest have all that lies beyond, too.

    Args:
        x: Pixels in [-1, 1], of the levels -1, -1 + 2/255, ..., 1.
        mean: The Gaussian's mean, shaped like x.
        log_scale: The logarithm of its standard deviation, shaped like x.
    """
    dtype = _wide(mean).dtype
    # Far in a tail, float32 has no gradient; Apple's GPU has no float64.
    exact = torch.float32 if mean.device.type == "mps" else torch.float64
    x, mean, log_scale = x.to(exact), mean.to(exact), log_scale.to(exact)
    low, high = ((x + side - mean) * torch.exp(-log_scale) for side in (-HALF_LEVEL, HALF_LEVEL))
    # By symmetry, work in the lower tail, where a difference of masses keeps its digits.
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)
    mirrored = x > mean
    darkest, brightest = x < -1 + HALF_LEVEL, x > 1 - HALF_LEVEL
    open_low, open_high = torch.where(mirrored, brightest, darkest), torch.where(mirrored, darkest, brightest)
    upper = torch.where(open_high, torch.zeros_like(high), torch.special.log_ndtr(high))
    lower = torch.special.log_ndtr(low)
    within = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-TINY)))
    return -torch.where(open_low, upper, within).to(dtype)


def _wide(x: Tensor) -> Tensor:
    """Cast half precision to float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
