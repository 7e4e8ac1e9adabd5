"""The discriminator: its size by the paper's numbers, its gradients, and independence of the images in a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sdkit.diffusion.losses import hinge_discriminator, hinge_generator
from sdkit.errors import ImageError
from sdkit.networks.discriminator import Discriminator


@pytest.fixture(scope="module")
def network() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator()


def small(seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(channels=16)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_size(network: Discriminator) -> None:
    # 4 x 4 convolutions 3-64-128-256-512-1 with biases where no norm follows, and the norms' scales and shifts
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(p.numel() for p in network.parameters()) == weights + 64 + 1 + 2 * (128 + 256 + 512)


@pytest.mark.parametrize("size", [(24, 24), (64, 96), (70, 25)])
def test_a_logit_for_each_patch(network: Discriminator, size: tuple[int, int]) -> None:
    assert network(pixels(2, 3, *size)).shape == (2, 1, size[0] // 8 - 2, size[1] // 8 - 2)


def test_a_patch_is_70_pixels_wide(network: Discriminator) -> None:
    bare = copy.deepcopy(network)
    for i, layer in enumerate(bare.layers):
        if isinstance(layer, nn.GroupNorm):  # a group norm depends on the whole image
            bare.layers[i] = nn.Identity()
    x = pixels(1, 3, 128, 128).requires_grad_()
    logits = bare(x)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], x)
    seen = gradient[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_first_weights(network: Discriminator) -> None:
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d):
            tolerance = 5 * 0.02 / (2 * layer.weight.numel()) ** 0.5  # five standard errors of the deviation
            assert layer.weight.std().item() == pytest.approx(0.02, abs=tolerance)
            assert layer.bias is None or not layer.bias.any()
    assert network(pixels(1, 3, 64, 64)).abs().max() < 5


def test_an_image_has_the_same_logits_alone_and_in_a_batch_in_training_and_after(network: Discriminator) -> None:
    x = pixels(4, 3, 32, 32)
    together = network.train()(x)
    torch.testing.assert_close(together[2:3], network(x[2:3]), atol=1e-5, rtol=0)
    assert torch.equal(network(x), together)  # a pass leaves no state behind
    assert torch.equal(network.eval()(x), together)
    assert not list(network.buffers())


def test_gradients_do_not_depend_on_how_a_batch_is_split() -> None:
    whole, parts = small(), small()
    real, fake = pixels(4, 3, 32, 32), pixels(4, 3, 32, 32, seed=1)
    hinge_discriminator(whole(real), whole(fake)).backward()
    for rows in (slice(0, 2), slice(2, 4)):
        (hinge_discriminator(parts(real[rows]), parts(fake[rows])) / 2).backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_hinge_losses_reach_every_weight_and_the_image() -> None:
    network = small()
    hinge_discriminator(network(pixels(2, 3, 32, 32)), network(pixels(2, 3, 32, 32, seed=1))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The last bias moves real and fake logits alike. Within both margins of the hinge loss this cancels.
        assert parameter.grad.abs().sum() > 0 or name == "layers.11.bias", name
    x = pixels(2, 3, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(hinge_generator(network(x)), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


def test_gradient_equals_finite_differences() -> None:
    network = small().double()
    x = pixels(1, 3, 24, 24).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hinge_generator(network(x)), (x,), fast_mode=True)
    weight, fake = network.layers[2].weight, pixels(1, 3, 24, 24, seed=1).double()
    assert torch.autograd.gradcheck(
        lambda weight: hinge_discriminator(
            *(torch.func.functional_call(network, {"layers.2.weight": weight}, (image,)) for image in (x, fake))
        ),
        (weight,),
        fast_mode=True,
    )


def test_learns_sharp_from_blocky() -> None:
    torch.manual_seed(0)
    network = Discriminator()  # with few channels, a group has a single channel, and normalisation hides its energy
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.9))
    losses = []
    for step in range(45):
        sharp, other = pixels(8, 3, 48, 48, seed=step).chunk(2)
        blocky = nn.functional.interpolate(nn.functional.avg_pool2d(other, 2), scale_factor=2)
        loss = hinge_discriminator(network(sharp), network(blocky))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert sum(losses[-5:]) / 5 < 0.2


@pytest.mark.parametrize(("height", "width"), [(23, 64), (64, 16)])
def test_too_small_an_image_is_one_sentence(network: Discriminator, height: int, width: int) -> None:
    with pytest.raises(ImageError, match=f"at least 24 x 24 pixels, not {width} x {height}"):
        network(torch.zeros(1, 3, height, width))
