"""Tensors are made on the device of the network, and denoising never makes the CPU wait for it.

The second device of these tests is "meta", which has shapes and no numbers: reading a number from it, or copying from
it to the CPU, raises. Copies to it are counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.guidance import APG, guided
from sdkit.pipelines.steps import denoise
from sdkit.samplers import ddim, ddpm, dpmpp_2m

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies between devices, as (from, to)."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            sources = {x.device.type for x in args if isinstance(x, Tensor) and x.ndim}
            self.count.update((source, result.device.type) for source in sources if source != result.device.type)
        return result


@pytest.fixture(scope="module")
def unet() -> sdkit.UNet:
    return sdkit.UNet.from_pretrained("emoji", dtype="fp32", device="cpu").to(META)


def conditioning(unet: sdkit.UNet) -> Conditioning:
    return Conditioning(torch.empty(2, 77, unet.width, device=META))


@pytest.mark.parametrize("options", [{}, {"phi": 0.7}, {"projected": APG(momentum=-0.5)}, {"interval": (0.2, 5.0)}])
@pytest.mark.parametrize("sampler", [ddim, ddpm, dpmpp_2m])
@torch.no_grad()
def test_denoising_never_waits_for_the_device(unet: sdkit.UNet, sampler: Any, options: dict[str, Any]) -> None:
    schedule = sdkit.NoiseSchedule.scaled_linear()
    predict = guided(unet, schedule, conditioning(unet), conditioning(unet), 3.0, **options)
    generators = [torch.Generator(), torch.Generator()]
    with Copies() as copies:
        z = denoise(
            predict, torch.empty(2, 4, 16, 16, device=META), schedule, schedule.timesteps(4), sampler=sampler,
            generators=generators,
        )  # fmt: skip
    assert z.device == META
    # DDPM's noise is drawn on the CPU, where a seed means the same for every device; its last step adds none.
    assert copies.count == ({("cpu", "meta"): 3} if sampler is ddpm else {})


@torch.no_grad()
def test_the_counter_sees_copies_and_reads() -> None:
    """Otherwise the test above would prove nothing."""
    with Copies() as copies:
        torch.zeros(3).to(META)
    assert copies.count == {("cpu", "meta"): 1}
    with pytest.raises(NotImplementedError):
        torch.zeros(3, device=META).cpu()
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device=META).item()


@torch.no_grad()
def test_encoders_compute_on_their_own_device() -> None:
    vae = sdkit.VAE.from_pretrained("emoji", dtype="fp32", device="cpu").to(META)
    mean, logvar = vae.posterior(torch.zeros(1, 3, 64, 64))
    assert mean.device == logvar.device == META
    assert vae(torch.zeros(1, 3, 64, 64)).pixels.device == META


@torch.no_grad()
def test_a_batch_of_timesteps_is_moved_to_the_device(unet: sdkit.UNet) -> None:
    with Copies() as copies:
        output = unet(torch.empty(2, 4, 16, 16, device=META), torch.tensor([3, 500]), conditioning(unet))
    assert output.device == META
    assert copies.count == {("cpu", "meta"): 1}
