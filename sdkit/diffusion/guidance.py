"""Guidance: steer samples by an unconditional prediction, or by the gradient of a classifier or an energy.

`cfg`, `cfg_with_image`, `rescale`, and `apg` are functions of tensors. `guided` turns a model into a predictor that
samplers take; `classifier` guides a predictor by the gradient of a classifier of noisy images, and `energy` by that of
any function of the predicted clean image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdkit.arguments import noise_levels, number
from sdkit.diffusion.conditioning import Conditioning, check_condition
from sdkit.diffusion.schedule import NoiseSchedule, Predict, Prediction
from sdkit.errors import ArgumentError

Model = Callable[[Tensor, int, Conditioning], Tensor]
"""A model: model(x_t, t, cond) returns eps, v, or x0, whichever the network was trained to predict."""
TINY = 1e-30
"""Smallest divisor, against division by zero."""


def check_scale(scale: float) -> float:
    """Return a guidance scale. Raise ArgumentError unless it is a number from -1e6 to 1e6."""
    return number("the guidance scale", scale, -1e6, 1e6)


def check_image_scale(scale: float) -> float:
    """Return an image guidance scale. Raise ArgumentError unless it is a number from 0 to 1e6."""
    return number("image_guidance_scale", scale, 0, 1e6)


def check_rescale(phi: float) -> float:
    """Return the strength of rescaled guidance. Raise ArgumentError unless it is in [0, 1]."""
    return number("the guidance rescale (phi)", phi, 0, 1)


def check_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the noise levels at which to guide. Raise ArgumentError unless they are an interval, or None."""
    return None if interval is None else noise_levels("the guidance interval", interval)


def cfg(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Return uncond + scale * (cond - uncond): classifier-free guidance (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598, eq. 6 with scale = 1 + w).

    Args:
        uncond: (B, ...), the model's output for the empty or the negative prompt.
        cond: (B, ...), its output for the prompt.
        scale: 1 returns `cond`; larger values follow the prompt more closely.
    """
    return uncond + scale * (cond - uncond)


def cfg_with_image(neither: Tensor, image: Tensor, both: Tensor, scale: float, image_scale: float) -> Tensor:
    """Return neither + image_scale * (image - neither) + scale * (both - image): guidance by a text and an image
    (Brooks et al. 2023, https://arxiv.org/abs/2211.09800, eq. 3).

    Args:
        neither: (B, ...), the model's output for the empty or the negative prompt, and no image.
        image: (B, ...), its output for that prompt and the image.
        both: (B, ...), its output for the prompt and the image.
        scale: Scale of the text, the paper's s_T. With `image_scale` 1 the result is that of `cfg`.
        image_scale: Scale of the image, the paper's s_I; 0 ignores it where the text does not need it.
    """
    return neither + image_scale * (image - neither) + scale * (both - image)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Rescale each image's guided output towards the standard deviation of its conditional output (Lin et al. 2023,
    https://arxiv.org/abs/2305.08891, eq. 15-16).

    Args:
        guided: (B, ...), the output of `cfg`.
        cond: (B, ...), the model's output for the prompt.
        phi: Strength: 0 changes nothing, 1 gives the conditional output's standard deviation; the paper uses 0.7.

    Returns:
        A tensor (B, ...).
    """
    dims = tuple(range(1, cond.ndim))
    restored = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=TINY))
    return phi * restored + (1 - phi) * guided


@dataclass(frozen=True, kw_only=True)
class APG:
    """Settings of adaptive projected guidance (Sadat et al. 2024, https://arxiv.org/abs/2410.02416).

    Attributes:
        eta: Weight of the update's component parallel to the conditional prediction, which causes oversaturation.
            1 leaves the update unchanged.
        norm_threshold: Largest norm of the update, the paper's r; 0 sets no bound.
        momentum: The paper's beta. Negative values push away from earlier updates; the paper uses -0.5.
    """

    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        number("eta", self.eta)
        number("norm_threshold", self.norm_threshold, 0)
        number("momentum", self.momentum)


def apg(
    uncond_x0: Tensor, cond_x0: Tensor, scale: float, settings: APG, average: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Guide x0 by adaptive projected guidance (Sadat et al. 2024, https://arxiv.org/abs/2410.02416, Algorithm 1).

    Args:
        uncond_x0: (B, ...), x0 as predicted for the empty or the negative prompt.
        cond_x0: (B, ...), x0 as predicted for the prompt.
        scale: The guidance scale.
        settings: See `APG`.
        average: (B, ...), the running average of updates that the previous step returned; None in the first step.

    Returns:
        The guided x0, and the running average for the next step.
    """
    dims = tuple(range(1, cond_x0.ndim))
    update = average = cond_x0 - uncond_x0 + (0 if average is None else settings.momentum * average)
    if settings.norm_threshold > 0:
        norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
        update = update * (settings.norm_threshold / norm).clamp(max=1)
    unit = cond_x0 / torch.linalg.vector_norm(cond_x0, dim=dims, keepdim=True).clamp(min=TINY)
    parallel = (update * unit).sum(dims, keepdim=True) * unit
    return cond_x0 + (scale - 1) * (update - parallel + settings.eta * parallel), average


def guided(
    model: Model,
    schedule: NoiseSchedule,
    cond: Conditioning,
    uncond: Conditioning | None = None,
    scale: float = 7.5,
    *,
    image_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    phi: float = 0.0,
    projected: APG | None = None,
) -> Predict:
    """Return a predictor that calls `model(x_t, t, cond)` with guidance.

    Make a new predictor for each sampling run: with APG it holds the running average of the updates.

    Args:
        model: Called with x_t (B, C, h, w), an integer t, and a condition of B images. With guidance it makes one pass
            over a batch of 2B, [uncond, cond].
        schedule: Turns the model's output into a `Prediction`.
        cond: The condition of B images.
        uncond: The condition to steer away from, for the same B images: the negative prompts', or the empty prompt's.
            May be None if `scale` and `image_scale` are 1.
        scale: The guidance scale; 1 turns guidance off, and the model gets a batch of B images only.
        image_scale: Scale of the image in `Conditioning.concat`; see `cfg_with_image`. Any value but 1 makes a pass
            over a batch of 3B, [neither, uncond, cond], where neither has `uncond`'s text, and zeros for the image.
        interval: Noise levels (low, high] in which to guide, as sigma = sqrt((1 - a) / a) (Kynkäänniemi et al. 2024,
            https://arxiv.org/abs/2404.07724). Elsewhere guidance is off. None guides at every level.
        phi: Strength of `rescale`, in [0, 1].
        projected: Settings of `apg`, which then replaces `cfg`.

    Returns:
        predict(x_t, t) -> Prediction, as samplers take it.

    Raises:
        ArgumentError: An argument is out of range, or `uncond` is missing.

    Example:
        >>> import torch, sdkit
        >>> from sdkit.guidance import Conditioning, guided
        >>> sd = sdkit.StableDiffusion.from_pretrained("emoji")
        >>> cond, uncond = Conditioning(sd.text.encode(["a cat", ""])).chunk(2)
        >>> predict = guided(sd.unet, sd.schedule, cond, uncond, scale=5.0)
        >>> with torch.inference_mode():
        ...     prediction = predict(torch.randn(1, 4, 16, 16), 999)
        >>> prediction.x0.shape
        torch.Size([1, 4, 16, 16])
    """
    for condition in (cond, *([] if uncond is None else [uncond])):
        check_condition(condition)
    scale = check_scale(scale)
    image_scale, phi, interval = check_image_scale(image_scale), check_rescale(phi), check_interval(interval)
    if projected is not None and not isinstance(projected, APG):
        raise ArgumentError(f"projected guidance takes its settings as sdkit.guidance.APG(...), not {projected!r}.")
    if phi and projected is not None:
        raise ArgumentError("guidance is either rescaled or projected (APG): give one of the two.")
    if projected is not None and image_scale != 1:
        raise ArgumentError("projected guidance (APG) has one scale: leave image_guidance_scale out.")
    if (scale, image_scale) != (1, 1) and uncond is None:
        raise ArgumentError(
            "guidance with a scale other than 1 needs the unconditional embedding (that of the empty prompt)."
        )
    conditions = [cond] if uncond is None else [uncond, cond]
    if image_scale != 1 and uncond is not None:
        if uncond.concat is None:
            raise ArgumentError("image_guidance_scale belongs to a condition's `concat`, and there is none.")
        conditions.insert(0, replace(uncond, concat=torch.zeros_like(uncond.concat)))
    together = Conditioning.cat(conditions)
    average: Tensor | None = None

    def predict(x_t: Tensor, t: int) -> Prediction:
        nonlocal average
        if scale == image_scale == 1 or (interval is not None and not interval[0] < schedule.sigma(t) <= interval[1]):
            return schedule.prediction(model(x_t, t, cond), x_t, t)
        n = len(conditions)
        outputs = model(torch.cat([x_t] * n), t, together).chunk(n)
        out_uncond, out_cond = outputs[-2:]
        if projected is not None:
            p_uncond, p_cond = (schedule.prediction(out, x_t, t) for out in (out_uncond, out_cond))
            x0, average = apg(p_uncond.x0, p_cond.x0, scale, projected, average)
            return schedule.prediction(x0, x_t, t, "sample")._replace(variance=p_cond.variance)
        channels = x_t.shape[1]  # further channels hold a learned variance, which is not guided
        wanted = out_cond[:, :channels]
        if image_scale == 1:
            output = cfg(out_uncond[:, :channels], wanted, scale)
        else:
            output = cfg_with_image(outputs[0][:, :channels], out_uncond[:, :channels], wanted, scale, image_scale)
        if phi:
            output = rescale(output, wanted, phi)
        return schedule.prediction(torch.cat([output, out_cond[:, channels:]], dim=1), x_t, t)

    return predict


def classifier(
    predict: Predict, log_prob: Callable[[Tensor, int], Tensor], schedule: NoiseSchedule, scale: float = 1.0
) -> Predict:
    """Return a predictor with classifier guidance: eps - scale * sqrt(1 - a) * grad log p(y | x_t) (Dhariwal & Nichol
    2021, https://arxiv.org/abs/2105.05233, Algorithm 2).

    Where the SNR is zero, x_t holds no information about the image, and the prediction is left unguided.

    Args:
        predict: The predictor to guide, usually of an unconditional model.
        log_prob: log_prob(x_t, t) -> (B,), the log-probability of each image's wanted class, differentiable in the
            noisy x_t (B, C, h, w).
        schedule: The noise schedule of both models.
        scale: 1 is Bayes' rule; larger values favour images of which the classifier is certain.

    Returns:
        predict(x_t, t) -> Prediction, as samplers take it.

    Raises:
        ArgumentError: `scale` is not a number from -1e6 to 1e6.
    """
    scale = check_scale(scale)

    def guided_by_classifier(x_t: Tensor, t: int) -> Prediction:
        unguided = predict(x_t, t)
        if (a := schedule.alpha_cumprod(t)) == 0:
            return unguided
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(x, t).sum(), x)
        eps = unguided.eps - scale * math.sqrt(1 - a) * gradient
        return schedule.prediction(eps, x_t, t, "epsilon")._replace(variance=unguided.variance)

    return guided_by_classifier


def energy(
    predict: Predict, energy: Callable[[Tensor], Tensor], schedule: NoiseSchedule, scale: float = 1.0
) -> Predict:
    """Return a predictor guided by an energy of the image that it predicts: eps + scale * sqrt(1 - a) * grad E(x0),
    with the gradient taken by x_t, through the network (Bansal et al. 2023, https://arxiv.org/abs/2302.07121, eq. 6).

    This is `classifier` with log p(y | x_t) = -E(x0) up to a constant. The energy sees clean images, so that a network
    which never saw noise will do: CLIP, the features of a style, the distance to a reference. `VAE.pixels` decodes
    latents with gradient.

    Where the SNR is zero, x_t holds no information about the image, and the prediction is left unguided.

    Args:
        predict: The predictor to guide, such as that of `guided`. Its network must not run in inference mode.
        energy: energy(x0) -> (B,), small where the image is as it should be, differentiable in x0 (B, C, h, w).
            Image i's value may depend on image i alone.
        schedule: The model's noise schedule.
        scale: Strength; 0 leaves the prediction as it is.

    Returns:
        predict(x_t, t) -> Prediction, as samplers take it.

    Raises:
        ArgumentError: `scale` is not a number from -1e6 to 1e6, or the energy does not return a number for each image,
            or has no gradient.

    Example:
        >>> import torch, sdkit
        >>> from sdkit.guidance import energy
        >>> schedule = sdkit.NoiseSchedule.scaled_linear()
        >>> def denoise(x_t, t):  # the ideal denoiser of images whose every pixel is normally distributed
        ...     return schedule.prediction(schedule.alpha_cumprod(t) ** 0.5 * x_t, x_t, t, "sample")
        >>> darker = energy(denoise, lambda x0: x0.mean(dim=(1, 2, 3)), schedule, scale=50)
        >>> x_t = torch.randn(1, 4, 8, 8)
        >>> bool(darker(x_t, 500).x0.mean() < denoise(x_t, 500).x0.mean())
        True
    """
    scale = check_scale(scale)

    def guided_by_energy(x_t: Tensor, t: int) -> Prediction:
        if scale == 0 or (a := schedule.alpha_cumprod(t)) == 0:
            return predict(x_t, t)
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            unguided = predict(x, t)
            values = energy(unguided.x0)
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            if shape != (len(x),):
                raise ArgumentError(f"an energy returns ({len(x)},), a number for each image, not {shape}.")
            if not values.requires_grad:
                raise ArgumentError(
                    "the energy has no gradient: compute it from x0 with differentiable operations, and the prediction "
                    "outside inference mode and no_grad."
                )
            (gradient,) = torch.autograd.grad(values.sum(), x)
        eps = unguided.eps.detach() + scale * math.sqrt(1 - a) * gradient
        variance = None if unguided.variance is None else unguided.variance.detach()
        return schedule.prediction(eps, x_t, t, "epsilon")._replace(variance=variance)

    return guided_by_energy
