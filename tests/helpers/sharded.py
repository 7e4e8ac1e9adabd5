"""Training in two processes with FSDP: the counterpart of toy.py, which trains with data parallelism, and a stage
with a U-Net.

Accelerate supports FSDP on GPUs only, although PyTorch's implementation works on CPUs too. The CPUs are therefore
presented to Accelerate as GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, DistributedType, PartialState
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sdkit.training import UNetConfig, VAEConfig, loop, train_unet, train_vae
from sdkit.training.distributed import make_accelerator
from sdkit.training.loop import fit
from sdkit.training.settings import LoopSettings
from sdkit.training.stage import Player, Samples
from tests.helpers import toy


class Split(toy.Toy):
    """A toy stage with both networks sharded over two processes. The second process starts with different weights and
    calls the networks more often.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for p in (*self.generator.parameters(), *self.discriminator.parameters()):
            p.data += PartialState().process_index

    def generator_loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        for network in networks.values():
            assert isinstance(network, FSDPModule)
            for p in network.parameters():
                assert p.to_local().numel() in (p.numel() // 2, p.numel() if p.shape[0] == 1 else -1, 0), p.shape
        return super().generator_loss(networks, batch, step)

    def discriminator_loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        with torch.no_grad():
            # An extra call gathers parameters. They must be freed again after this step.
            networks["generator"](batch["x"])
        return super().discriminator_loss(networks, batch, step)

    def validate(self, step: int) -> dict[str, float]:
        for _ in range(PartialState().process_index):
            self.generator(self.x)
        return super().validate(step)


def make_scaled(settings: LoopSettings, out_dir: Path) -> Accelerator:
    """Make an accelerator with the gradient scaler of fp16, on the CPU."""
    accelerator = make_accelerator(settings, out_dir)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=40)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    return accelerator


@dataclass(frozen=True, kw_only=True)
class UNetSettings(LoopSettings):
    frozen: bool = False


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        predicted: Tensor = self.unet(x, t, text).sample
        return predicted


class UNetStage:
    size = 8

    def __init__(self, settings: UNetSettings) -> None:
        self.settings, self.identity = settings, {"data": "eight images"}
        torch.manual_seed(0)
        self.denoiser = Denoiser().to(memory_format=torch.channels_last)
        self.half = settings.mixed_precision == "bf16"
        for name, p in self.denoiser.named_parameters():
            if settings.frozen and "to_q" not in name:  # LoRA freezes most weights too
                p.requires_grad_(False)
                p.data = p.data.bfloat16() if self.half else p.data
        self.players = [Player("unet", self.denoiser, self.loss, learning_rate=1e-3, ema=True)]
        self.groups = 0

    def batch(self, samples: Samples) -> dict[str, Any]:
        drawn = [torch.Generator().manual_seed(item) for _, item in samples]
        x, text = (torch.stack([torch.randn(shape, generator=g) for g in drawn]) for shape in ((4, 8, 8), (5, 16)))
        return {"x": x, "text": text, "t": torch.tensor([10 * item for _, item in samples])}

    def names(self, samples: Samples) -> list[str]:
        return [str(item) for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        self.groups = sum(isinstance(module, FSDPModule) for module in networks["unet"].modules())
        return (networks["unet"](batch["x"], batch["t"], batch["text"]) - batch["x"]).square().mean(), {}

    def validate(self, step: int) -> dict[str, float]:
        batch = self.batch([(0, item) for item in range(self.size)])
        unet = self.denoiser.unet  # reach the network inside the wrapper
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            predicted = unet(batch["x"], batch["t"], batch["text"]).sample
        return {"mse": float((predicted - batch["x"]).square().mean())}

    def export(self, folder: Path) -> None:
        self.denoiser.unet.save_pretrained(folder)


def _train_together(scenario: dict[str, Any]) -> None:
    os.environ |= scenario.get("environment", {})
    if "scaled" in scenario:
        scaled = toy.ToySettings(**scenario["scaled"])
        with mock.patch.object(loop, "make_accelerator", make_scaled):
            fit(Split(scaled), scaled, scenario["out"])
    if "train_vae" in scenario:
        train_vae(VAEConfig(**scenario["train_vae"]))
    if "train_unet" in scenario:
        train_unet(UNetConfig(**scenario["train_unet"]))
    if "unet" in scenario:
        stage = UNetStage(UNetSettings(**scenario["unet"]))
        fit(stage, stage.settings, scenario["out"])
        (Path(scenario["out"]) / "groups").write_text(str(stage.groups))
    if "settings" in scenario:
        toy.train_together(scenario)


def launched(scenarios: list[dict[str, Any]]) -> None:
    """Train one run after another, as one process of several."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
    toy.Toy = Split  # type: ignore[misc]
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    before = {**os.environ}
    for scenario in scenarios:
        _train_together(scenario)
        os.environ.clear()
        os.environ |= before
    PartialState().destroy_process_group()
