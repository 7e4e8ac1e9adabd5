"""Losses against closed forms or other libraries, and their gradients against finite differences in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

from sdkit.diffusion.losses import (
    adaptive_weight,
    diffusion_loss,
    hinge_discriminator,
    hinge_generator,
    kl,
    l1,
    l2,
    min_snr_weight,
)
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError

SNR = torch.tensor([0.0, 1e-4, 0.5, 4.999, 5.0, 7.0, 1e3, math.inf], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestGradients:
    """Gradients must equal finite differences. No random input below lies within 1e-6 of a kink."""

    @pytest.mark.parametrize(
        "loss", [l1, l2, kl, hinge_discriminator, diffusion_loss], ids=lambda loss: str(loss.__name__)
    )
    def test_of_both_sides(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        x, y = randn(3, 2, 4, 4).requires_grad_(), randn(3, 2, 4, 4, seed=1).requires_grad_()
        assert gradcheck(loss, (x, y))
        for gradient in torch.autograd.grad(loss(x, y), (x, y)):
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0

    def test_of_the_generators_hinge_loss(self) -> None:
        assert gradcheck(hinge_generator, (randn(2, 1, 3, 3).requires_grad_(),))

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("keep_noisiest", [False, True])
    def test_of_the_diffusion_loss_under_min_snr(self, kind: str, keep_noisiest: bool) -> None:
        weight = min_snr_weight(SNR[1:7], 5, kind, keep_noisiest=keep_noisiest)
        output, target = randn(6, 2, 3, 3).requires_grad_(), randn(6, 2, 3, 3, seed=1)
        assert gradcheck(lambda output: diffusion_loss(output, target, weight), (output,))
        (gradient,) = torch.autograd.grad(diffusion_loss(output, target, weight), output)
        expected = 2 * (output - target) / 18 * weight[:, None, None, None] / 6
        torch.testing.assert_close(gradient, expected)

    def test_push_the_logits_the_right_way(self) -> None:
        real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
        hinge_discriminator(real, fake).backward()
        assert (real.grad < 0).all()  # a step against the gradient raises the logits of real images
        assert (fake.grad > 0).all()
        (gradient,) = torch.autograd.grad(hinge_generator(fake), fake)
        assert (gradient < 0).all()


class TestValues:
    def test_l1_and_l2(self) -> None:
        x, y = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[0.0, 2.0], [0.5, 1.0]])
        assert l1(x, y).item() == pytest.approx((1 + 4 + 0 + 2) / 4)
        assert l2(x, y).item() == pytest.approx((1 + 16 + 0 + 4) / 4)

    def test_kl_equals_torch_distributions(self) -> None:
        mean, logvar = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
        standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
        expected = kl_divergence(Normal(mean, torch.exp(logvar / 2)), standard).sum() / 3
        torch.testing.assert_close(kl(mean, logvar), expected, rtol=1e-12, atol=0)

    def test_kl_is_zero_for_the_prior_itself(self) -> None:
        assert kl(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)).item() == 0

    def test_kl_is_finite_for_what_diffusers_clamps_logvar_to(self) -> None:
        for logvar in (-30.0, 20.0):
            assert kl(torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), logvar)).isfinite()

    @pytest.mark.parametrize(
        ("real", "fake", "loss"), [([0], [0], 1), ([1, 5], [-1, -9], 0), ([2, -1], [0.5, -3], 0.5 * (1 + 0.75))]
    )
    def test_hinge(self, real: list[float], fake: list[float], loss: float) -> None:
        assert hinge_discriminator(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(loss)
        assert hinge_generator(torch.tensor(fake)).item() == pytest.approx(-sum(fake) / len(fake))

    def test_diffusion_loss_is_the_mean_of_weighted_means(self) -> None:
        output, target = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0)
        target[1] = 3
        assert diffusion_loss(output, target).item() == pytest.approx((4 + 9) / 2)
        weight = torch.tensor([0.25, 2.0], dtype=torch.float64)
        assert diffusion_loss(output, target, weight).item() == pytest.approx((0.25 * 4 + 2 * 9) / 2)

    @pytest.mark.parametrize("loss", [l1, l2, diffusion_loss], ids=lambda loss: str(loss.__name__))
    def test_a_batch_is_the_mean_of_its_parts(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        x, y = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
        parts = torch.stack([loss(x[:2], y[:2]), loss(x[2:], y[2:])]).mean()
        torch.testing.assert_close(loss(x, y), parts)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        x, y = 300 * randn(2, 4, 8, 8).to(dtype), 300 * randn(2, 4, 8, 8, seed=1).to(dtype)  # 300^2 overflows float16
        for loss in (l1, l2, hinge_discriminator, diffusion_loss):
            assert loss(x, y).dtype == torch.float32
            torch.testing.assert_close(loss(x, y), loss(x.float(), y.float()), rtol=0, atol=0)
        torch.testing.assert_close(kl(x, y / 300), kl(x.float(), (y / 300).float()), rtol=0, atol=0)
        torch.testing.assert_close(hinge_generator(x), hinge_generator(x.float()), rtol=0, atol=0)

    def test_autocast_does_not_lower_the_precision(self) -> None:
        x, y = randn(2, 4, 8, 8).float(), randn(2, 4, 8, 8, seed=1).float()
        for loss in (l1, l2, kl, hinge_discriminator, diffusion_loss):
            outside = loss(x, y)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(loss(x, y), outside, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("output", "target", "weight"),
        [((2, 4), (2, 4), (4,)), ((2, 4), (2, 4), (2, 1)), ((1, 4), (1, 4), (2,)), ((2, 8), (2, 4), (2,))],
    )
    def test_shapes_that_would_broadcast_are_refused(
        self, output: tuple[int, ...], target: tuple[int, ...], weight: tuple[int, ...]
    ) -> None:
        with pytest.raises(ArgumentError, match="output, target and weight must be"):
            diffusion_loss(torch.zeros(output), torch.zeros(target), torch.zeros(weight))


class TestMinSNR:
    def test_in_closed_form(self) -> None:
        for snr, eps, v, x0 in [
            (0.5, 1, 0.5 / 1.5, 0.5),
            (5, 1, 5 / 6, 5),
            (20, 5 / 20, 5 / 21, 5),
            (0, 1, 0, 0),  # eps: the limit of snr / snr
            (math.inf, 0, 0, 5),
        ]:
            for kind, expected in (("epsilon", eps), ("v_prediction", v), ("sample", x0)):
                assert min_snr_weight(torch.tensor([snr]), 5, kind).item() == pytest.approx(expected, rel=1e-6)

    def test_all_kinds_weigh_the_same_error_alike(self) -> None:
        schedule = NoiseSchedule.scaled_linear()
        x0, eps, wrong = randn(8, 4, 4, 4), randn(8, 4, 4, 4, seed=1), randn(8, 4, 4, 4, seed=2)
        t = torch.tensor([0, 10, 100, 300, 500, 700, 900, 999])
        x_t = schedule.add_noise(x0, eps, t)
        wrong_eps = schedule.prediction(wrong, x_t, t, "sample").eps  # the eps that corresponds to x0 = `wrong`
        outputs = {
            "sample": (wrong, x0),
            "epsilon": (wrong_eps, eps),
            "v_prediction": (schedule.velocity(wrong, wrong_eps, t), schedule.velocity(x0, eps, t)),
        }
        losses = [diffusion_loss(*pair, min_snr_weight(schedule.snr(t), 5, kind)) for kind, pair in outputs.items()]
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(losses[2], losses[0])

    @pytest.mark.parametrize("kind", ["eps", "epsilon", "v", "v_prediction", "x0", "sample"])
    @pytest.mark.parametrize("keep_noisiest", [False, True])
    def test_is_finite_at_every_timestep_of_zero_terminal_snr(self, kind: str, keep_noisiest: bool) -> None:
        schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
        snr = schedule.snr(torch.arange(schedule.num_timesteps))
        assert snr[-1] == 0
        weight = min_snr_weight(snr, 5, kind, keep_noisiest=keep_noisiest)
        assert weight.isfinite().all()
        assert (weight >= 0).all()

    def test_no_gamma_is_no_weight(self) -> None:
        for kind in ("epsilon", "v_prediction", "sample"):
            assert min_snr_weight(SNR, None, kind).tolist() == [1] * len(SNR)

    def test_keep_noisiest_gives_the_noisy_end_of_v_and_x0_its_due(self) -> None:
        weight = min_snr_weight(SNR, 5, "v_prediction", keep_noisiest=True)
        torch.testing.assert_close(weight, (5 / (SNR + 1)).clamp(max=1))
        assert weight[0] == 1
        plain = min_snr_weight(SNR, 5, "v_prediction")
        assert torch.equal(weight[SNR >= 5], plain[SNR >= 5])
        assert (weight[SNR < 4] > plain[SNR < 4]).all()
        x0 = min_snr_weight(SNR[:-1], 5, "sample", keep_noisiest=True)
        torch.testing.assert_close(x0, weight[:-1] * (SNR[:-1] + 1))
        assert torch.equal(min_snr_weight(SNR, 5, "epsilon", keep_noisiest=True), min_snr_weight(SNR, 5, "epsilon"))

    @pytest.mark.parametrize("gamma", [0, -1, math.nan, math.inf, "5"])
    def test_a_gamma_that_cannot_be_is_one_sentence(self, gamma: float) -> None:
        with pytest.raises(ArgumentError, match=r"^gamma must be a number of at least 0\.001, not .*\.$"):
            min_snr_weight(SNR, gamma, "epsilon")

    def test_an_unknown_kind_is_one_sentence(self) -> None:
        with pytest.raises(ArgumentError, match="prediction_type 'flow' is not one of"):
            min_snr_weight(SNR, 5, "flow")


class TestAdaptiveWeight:
    def test_in_closed_form(self) -> None:
        w = torch.tensor([3.0, 4.0], requires_grad=True)  # the gradients are 2 w, with length 10, and (1, 1) / 2
        weight = adaptive_weight(w.square().sum(), w.mean(), w)
        assert weight.item() == pytest.approx(10 / (0.5**0.5 + 1e-6), rel=1e-6)
        assert not weight.requires_grad

    @pytest.mark.parametrize(("scale", "expected"), [(0.0, 1e4), (1e-9, 1e4), (1e-6, 0.5 * 1e6)])
    def test_is_bounded(self, scale: float, expected: float) -> None:
        w = torch.ones(1, requires_grad=True)
        assert adaptive_weight(w.sum(), scale * w.sum(), w).item() == pytest.approx(min(expected, 1e4))
        assert adaptive_weight(0 * w.sum(), w.sum(), w).item() == 0

    def test_makes_both_pull_alike_and_leaves_the_graphs_and_gradients_alone(self) -> None:
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).double()
        critic = nn.Conv2d(3, 1, 4).double()
        image = decoder(randn(2, 4, 8, 8))
        reconstruction, adversarial = l1(image, randn(2, 3, 8, 8, seed=1)), hinge_generator(critic(image))
        last = decoder[2].weight
        weight = adaptive_weight(reconstruction, adversarial, last)
        assert all(p.grad is None for p in [*decoder.parameters(), *critic.parameters()])
        (pull,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (adversarial_pull,) = torch.autograd.grad(weight * adversarial, last, retain_graph=True)
        # The formula adds 1e-6 to the norm.
        torch.testing.assert_close(adversarial_pull.norm(), pull.norm(), rtol=1e-4, atol=0)
        (reconstruction + weight * adversarial).backward()
        assert all(p.grad.abs().sum() > 0 for p in decoder.parameters())

    def test_averaged_over_processes_is_that_of_the_whole_batch(self) -> None:
        x, y = randn(4, 3), randn(4, 3, seed=1)
        w = randn(3, seed=2).requires_grad_()

        def losses(rows: slice) -> tuple[Tensor, Tensor]:
            return l2(x[rows] * w, y[rows]), hinge_generator((x[rows] * w).sum(1))

        whole = adaptive_weight(*losses(slice(0, 4)), w)
        others = iter([torch.autograd.grad(loss, w)[0] for loss in losses(slice(2, 4))])
        half = adaptive_weight(*losses(slice(0, 2)), w, average=lambda gradient: (gradient + next(others)) / 2)
        torch.testing.assert_close(half, whole)
        assert abs(adaptive_weight(*losses(slice(0, 2)), w) - whole) > 0.01  # half of the batch has another weight
