"""The moving average against its recurrence in float64 and against diffusers' EMA, and that resuming it is
bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdkit.errors import TrainingError
from sdkit.training.ema import EMA


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    layers[0].bias.requires_grad_(False)
    return layers


@torch.no_grad()
def walk(layers: nn.Module, steps: int, seed: int = 0, size: float = 1.0) -> Iterator[None]:
    """Move the trainable weights at random, as an optimizer might."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in layers.parameters():
            p += size * torch.randn(p.shape, generator=generator).to(p) * p.requires_grad
        yield


def weights(layers: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in layers.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_recurrence(decay: float) -> None:
    layers = network()
    ema, expected = EMA(layers, decay), layers[1].weight.detach().double().clone()
    for n, _ in enumerate(walk(layers, 40)):
        ema.update()
        kept = min(decay, (1 + n) / (10 + n))  # decays of 0.1, 2/11, 0.25, ..., 0.8163
        expected = kept * expected + (1 - kept) * layers[1].weight.detach().double()
    torch.testing.assert_close(ema.state_dict()["1.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.num_updates == 40


def test_equal_to_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    layers = network()
    theirs, ours = EMAModel(layers.parameters(), decay=0.7), EMA(layers, 0.7)
    # The first step of diffusers copies the weights; ours keeps a tenth of the initial ones. Both agree while the
    # weights have not moved.
    theirs.step(layers.parameters())
    ours.update()
    for _ in walk(layers, 30):
        theirs.step(layers.parameters())
        ours.update()
    with ours.swapped():
        for a, b in zip(weights(layers), theirs.shadow_params, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_constant_weights_are_their_own_average() -> None:
    layers = network()
    ema = EMA(layers)
    for _ in range(10):
        ema.update()
    assert torch.equal(ema.state_dict()["1.weight"], layers[1].weight)


def test_only_what_is_trained_is_averaged() -> None:
    assert set(EMA(network()).state_dict()) == {"0.weight", "1.weight", "1.bias", "num_updates"}


def test_is_in_float32_where_the_weights_are_not() -> None:
    layers = network(torch.bfloat16)
    ema = EMA(layers, 0.9999)
    before = ema.state_dict()["1.weight"].clone()
    for _ in walk(layers, 1, size=1e-2):
        ema.update()
    ema.num_updates = 10**6  # late steps of 1e-4 would be lost in bfloat16
    middle = ema.state_dict()["1.weight"].clone()
    ema.update()
    assert middle.dtype == torch.float32
    assert not torch.equal(before, middle)
    assert not torch.equal(middle, ema.state_dict()["1.weight"])


def test_swapped_gives_the_average_and_brings_the_weights_back_to_the_bit() -> None:
    layers = network()
    ema = EMA(layers)
    for _ in walk(layers, 5):
        ema.update()
    own, addresses = weights(layers), [p.data_ptr() for p in layers.parameters()]
    with ema.swapped():
        assert torch.equal(layers[1].weight, ema.state_dict()["1.weight"])
        assert torch.equal(layers[0].bias, own[1])
        assert not torch.equal(layers[1].weight, own[2])
        assert [p.data_ptr() for p in layers.parameters()] == addresses  # DDP and optimizers refer to these tensors
    assert all(map(torch.equal, weights(layers), own))
    with pytest.raises(KeyboardInterrupt), ema.swapped():
        raise KeyboardInterrupt
    assert all(map(torch.equal, weights(layers), own))


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    layers = network()
    ema = EMA(layers)
    for step, _ in enumerate(walk(layers, 10)):
        ema.update()
        if step == 5:
            save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    again = network()
    steps = walk(again, 10)
    for _ in range(6):
        next(steps)
    resumed = EMA(again)  # made from weights that loading then replaces, as on resuming
    saved = load_file(tmp_path / "ema.safetensors")
    resumed.load_state_dict(saved)
    assert resumed.num_updates == 6
    for _ in steps:
        resumed.update()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in ema.state_dict().items())
    # `update` does not change the loaded tensors, because they were copied.
    assert not torch.equal(saved["1.weight"], resumed.state_dict()["1.weight"])


@pytest.mark.parametrize("other", [nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))])
def test_another_networks_is_one_sentence(other: nn.Module) -> None:
    with pytest.raises(TrainingError, match=r"^the saved moving average is of other parameters than .*\.$"):
        EMA(network()).load_state_dict(EMA(other).state_dict())
