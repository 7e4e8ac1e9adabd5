"""The variational bound on the likelihood of a diffusion model, term by term (Ho et al. 2020,
https://arxiv.org/abs/2006.11239, eq. 5; Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, section 2.2).

-log p(x_0) <= L_0 + L_1 + ... + L_{T-1} + L_T. Here t counts from 0, as everywhere in this package. `step_term` at
t = 0 is L_0, the code length of the pixels given the least noisy sample. At other t it is the KL divergence of the
true step from t to t - 1 from the model's. `prior_term` is L_T. All terms are means over the dimensions of an image,
in bits, so that their sum is in bits per dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkit.diffusion.losses import discretized_gaussian_nll, normal_kl
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError

BITS = 1 / math.log(2)  # bits of a nat


def posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the log-variance of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6-7).

    At t = 0 the variance is 0; the log-variance returned there is that of t = 1, as in the authors' code.

    Args:
        schedule: The noise schedule.
        x0: (B, ...), the clean sample.
        x_t: The sample at t, shaped like x0.
        t: (B,), timesteps.

    Returns:
        The mean, shaped like x0, and the log-variance (B, 1, ...).
    """
    beta, a, before = schedule.betas, schedule.alphas_cumprod, _alphas_before(schedule)
    of_x0 = before.sqrt() * beta / (1 - a)
    of_x_t = (1 - beta).sqrt() * (1 - before) / (1 - a)
    mean = _at(of_x0, t, x0) * x0 + _at(of_x_t, t, x0) * x_t
    return mean, _at(_posterior_variances(schedule).log(), t, x0)


def reverse_log_variance(schedule: NoiseSchedule, t: Tensor, like: Tensor, variance: Tensor | None = None) -> Tensor:
    """Return the log-variance of the model's step p(x_{t-1} | x_t), by the schedule's `variance_type`.

    Args:
        schedule: The noise schedule.
        t: (B,), timesteps.
        like: (B, ...), a tensor whose dtype, device, and number of axes are taken.
        variance: Position between the two bounds, in [-1, 1], shaped like `like`, as from `Prediction`; only for
            "learned_range" (Nichol & Dhariwal 2021, eq. 15).

    Raises:
        ArgumentError: The variance is learned, and `variance` is None.
    """
    smallest, beta = (_at(table.log(), t, like) for table in (_posterior_variances(schedule), schedule.betas))
    if schedule.variance_type == "fixed_small":
        return smallest
    if schedule.variance_type == "fixed_large":  # the last step decodes pixels, for which beta_0 is too small
        return torch.where(_at(torch.arange(schedule.num_timesteps), t, like) == 0, smallest, beta)
    if variance is None:
        raise ArgumentError(
            "variance_type 'learned_range' needs a model that predicts its variance (twice the output channels)."
        )
    share = (variance.to(beta.dtype) + 1) / 2
    return share * beta + (1 - share) * smallest


def step_term(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, *, pixels: bool = True
) -> Tensor:
    """Return L_t of each image, in bits per dimension.

    Args:
        schedule: The noise schedule.
        x0: (B, ...), images in [-1, 1] of 256 levels; or latents.
        x_t: The noised images, shaped like x0.
        t: (B,), timesteps. At 0 the term is the code length of x0 given x_t, else a KL divergence.
        prediction: The model's prediction at x_t.
        pixels: Whether x0 are pixels of 256 levels. Latents are continuous: L_0 is then minus their log-density.

    Returns:
        (B,), at least 0 for pixels.
    """
    true_mean, true_log_variance = posterior(schedule, x0, x_t, t)
    mean, _ = posterior(schedule, prediction.x0, x_t, t)
    log_variance = reverse_log_variance(schedule, t, x0, prediction.variance)
    divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
    if pixels:
        code = discretized_gaussian_nll(x0, mean, log_variance / 2)
    else:
        code = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean).square() / log_variance.exp())
    first = (t == 0).to(x0.device)
    return torch.where(first, _mean(code), _mean(divergence)) * BITS


def prior_term(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """Return L_T of each image (B,), in bits per dimension: the divergence of q(x_T | x0) from N(0, 1).

    Args:
        schedule: The noise schedule.
        x0: (B, ...), the clean sample.
    """
    a = float(schedule.alphas_cumprod[-1])
    zero = torch.zeros_like(x0)
    return _mean(normal_kl(math.sqrt(a) * x0, zero + math.log(1 - a), zero, zero)) * BITS


def variational_loss(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, *, pixels: bool, moves_mean: bool
) -> Tensor:
    """Return L_t of each image, in bits per dimension, as a loss.

    Args:
        schedule: The noise schedule, of variance type "learned_range".
        x0: (B, C, ...), images in [-1, 1], or latents.
        x_t: The noised images, shaped like x0.
        t: (B,), timesteps.
        output: The model's output (B, 2C, ...).
        pixels: Whether x0 are pixels of 256 levels; see `step_term`.
        moves_mean: Whether the gradient reaches the predicted mean. In the hybrid loss it reaches the variance alone
            (Nichol & Dhariwal 2021, section 3.1).

    Returns:
        (B,).
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    prediction = schedule.prediction(output.to(wide), x_t.to(wide), t)
    if not moves_mean:
        prediction = prediction._replace(x0=prediction.x0.detach())
    return step_term(schedule, x0.to(wide), x_t.to(wide), t, prediction, pixels=pixels)


def _alphas_before(schedule: NoiseSchedule) -> Tensor:
    """Return alphas_cumprod at t - 1 (T,), which is 1 at t = 0."""
    return torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])


def _posterior_variances(schedule: NoiseSchedule) -> Tensor:
    """Return the variance of q(x_{t-1} | x_t, x0) at each t (T,); at t = 0, where it is 0, that of t = 1."""
    variances = (1 - _alphas_before(schedule)) / (1 - schedule.alphas_cumprod) * schedule.betas
    return torch.cat([variances[1:2] if len(variances) > 1 else schedule.betas, variances[1:]])


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return a table's values at t, shaped to broadcast over `like` (B, ...), in float32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return table[t.cpu()].reshape(-1, *[1] * (like.ndim - 1)).to(like.device, wide)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
