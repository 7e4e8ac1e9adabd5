"""Tensors are made on the device of the network, and denoising never makes the CPU wait for it.

The second device of these tests is "meta", which has shapes and no numbers: reading a number from it (`item`, `bool`,
`tolist`, `nonzero`), or copying from it to the CPU, raises. Copies to it are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.guidance import classifier
from sdkit.diffusion.samplers import SAMPLERS, noise_like
from sdkit.diffusion.schedule import PREDICTIONS
from sdkit.guidance import APG, guided
from sdkit.pipelines.steps import denoise
from sdkit.samplers import ddim
from tests.helpers.networks import guided_network

META = torch.device("meta")
STEPS = 3
Copied = Counter[tuple[str, str]]
NOISE = {
    **dict.fromkeys(("ddpm", "euler_a", "dpm++2m_sde", "lcm"), STEPS - 1),
    "dpm++sde": 2 * (STEPS - 1),
    "ddim, eta 1": STEPS,
}
"""Draws of noise, by sampler. Noise is drawn on the CPU, where a seed means the same for every device, and is copied.
The last step adds none, except DDIM's."""


class Copies(TorchDispatchMode):
    """Counts copies between devices, as (from, to)."""

    def __init__(self, count: Copied) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            sources = {x.device.type for x in args if isinstance(x, Tensor) and x.ndim}
            self.count.update((source, result.device.type) for source in sources if source != result.device.type)
        return result


class FromPython(TorchFunctionMode):
    """Counts Python's numbers that become tensors on another device than the CPU, and lists used as an index there.

    PyTorch makes such a tensor on the CPU and copies it, which a `TorchDispatchMode` does not see.
    """

    def __init__(self, count: Copied) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            new = not any(result is x for x in args) and result.device.type != "cpu"
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            new = args[0].device.type != "cpu" and any(isinstance(one, list) for one in index)
        else:
            new = False
        self.count.update([("cpu", args[0].device.type if result is None else result.device.type)] if new else [])
        return result


@contextmanager
def counted() -> Iterator[Copied]:
    count: Copied = Counter()
    with torch.no_grad(), FromPython(count), Copies(count):
        yield count


@pytest.fixture(scope="module")
def unet() -> sdkit.UNet:
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
    )  # fmt: skip
    return sdkit.UNet(network.eval()).to(META)


def conditioning(unet: sdkit.UNet) -> Conditioning:
    text = torch.empty(2, 5, unet.width, device=META)
    return Conditioning(text, mask=torch.empty(2, 5, dtype=torch.bool, device=META))


def noise() -> Tensor:
    return torch.empty(2, 4, 8, 8, device=META)


def copies_of(predict: Any, schedule: sdkit.NoiseSchedule, sampler: Callable[..., Any] = ddim) -> Copied:
    """Sample, and return the copies that were made."""
    generators = [torch.Generator(), torch.Generator()]
    schedule.sigma(0)  # made once for a schedule: its tables, as Python's numbers
    with counted() as count:
        z = denoise(predict, noise(), schedule, schedule.timesteps(STEPS), sampler=sampler, generators=generators)
    assert z.device == META
    return count


@pytest.mark.parametrize(
    "options", [{}, {"phi": 0.7}, {"projected": APG(momentum=-0.5, norm_threshold=2.5)}, {"interval": (0.2, 5.0)}]
)
@pytest.mark.parametrize("name", [*SAMPLERS, "ddim, eta 1"])
def test_denoising_never_waits_for_the_device(unet: sdkit.UNet, name: str, options: dict[str, Any]) -> None:
    schedule = sdkit.NoiseSchedule.scaled_linear()
    predict = guided(unet, schedule, conditioning(unet), conditioning(unet), 3.0, **options)
    count = copies_of(predict, schedule, SAMPLERS.get(name, partial(ddim, eta=1.0)))
    assert count == ({("cpu", "meta"): NOISE[name]} if name in NOISE else {})


@pytest.mark.parametrize("prediction_type", sorted(set(PREDICTIONS.values())))
@pytest.mark.parametrize("name", SAMPLERS)
def test_nor_does_any_parameterisation_or_clipping(unet: sdkit.UNet, name: str, prediction_type: str) -> None:
    schedule = replace(sdkit.NoiseSchedule.scaled_linear(), prediction_type=prediction_type, clip_x0=1.0)
    count = copies_of(guided(unet, schedule, conditioning(unet), scale=1.0), schedule, SAMPLERS[name])
    assert sum(count.values()) == NOISE.get(name, 0)


def test_nor_does_a_classifiers_guidance(unet: sdkit.UNet) -> None:
    schedule = sdkit.NoiseSchedule.scaled_linear()
    unguided = guided(unet, schedule, conditioning(unet), scale=1.0)
    predict = classifier(unguided, lambda x_t, t: -x_t.square().flatten(1).sum(1), schedule, 2.0)
    assert not copies_of(predict, schedule)


def test_nor_does_a_network_that_takes_the_guidance_scale() -> None:
    """Its embedding is computed on the CPU and copied in the first step alone."""
    unet = sdkit.UNet(guided_network()).to(META)
    schedule = sdkit.NoiseSchedule.scaled_linear()
    predict = guided(partial(unet, guidance_scale=6.25), schedule, conditioning(unet), scale=1.0)
    assert copies_of(predict, schedule) == {("cpu", "meta"): 1}


def test_the_counters_see_copies_and_reads() -> None:
    """Otherwise the tests above would prove nothing."""
    x = torch.zeros(3, device=META)
    for copy in (
        lambda: torch.zeros(3).to(META),
        lambda: torch.tensor([1], device=META),
        lambda: torch.as_tensor(1.0, device=META),
        lambda: x.new_tensor([1.0]),
        lambda: x[[0, 2]],
    ):
        with counted() as count:
            copy()
        assert count == {("cpu", "meta"): 1}
    for free in (lambda: torch.full((3,), 2.0, device=META), lambda: x * 2.0, lambda: x[1:], lambda: torch.tensor([1])):
        with counted() as count:
            free()
        assert not count
    with pytest.raises(NotImplementedError):
        x.cpu()
    for read in (lambda: x[0].item(), lambda: bool((x > 0).any()), x.tolist, x.nonzero):
        with pytest.raises(RuntimeError):  # NotImplementedError among them
            read()


def test_noise_is_copied_to_a_gpu_asynchronously(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to a GPU is asynchronous only from pinned memory. Fake tensors stand for those of the GPU."""
    sources: list[Tensor] = []
    copies: list[tuple[Tensor, dict[str, Any]]] = []

    class ToDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append((args[0], kwargs))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(Tensor, "pin_memory", lambda self: sources.append(self) or self)
    with FakeTensorMode(), ToDevice():
        x = torch.empty(2, 4, 8, 8, device="cuda:0")
        drawn = noise_like(x, [torch.Generator(), torch.Generator()])
    assert drawn.device == x.device
    ((source, options),) = copies
    assert source is sources[0]
    assert options["non_blocking"]


@torch.no_grad()
def test_encoders_compute_on_their_own_device() -> None:
    vae = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu").to(META)
    mean, logvar = vae.posterior(torch.zeros(1, 3, 64, 64))
    assert mean.device == logvar.device == META
    assert vae(torch.zeros(1, 3, 64, 64)).pixels.device == META


@torch.no_grad()
def test_a_batch_of_timesteps_is_moved_to_the_device(unet: sdkit.UNet) -> None:
    with counted() as count:
        output = unet(noise(), torch.tensor([3, 500]), conditioning(unet))
    assert output.device == META
    assert count == {("cpu", "meta"): 1}
