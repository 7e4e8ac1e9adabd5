"""A stage that trains in a second, a regression with a discriminator, and hooks that end it at any point."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn

from sdkit.cli import main
from sdkit.errors import SdkitError
from sdkit.training.loop import fit
from sdkit.training.settings import LoopSettings
from sdkit.training.stage import Player, Samples


@dataclass(frozen=True, kw_only=True)
class ToySettings(LoopSettings):
    learning_rate: float = 1e-2
    dropout: float = 0.0
    batch_norm: bool = False
    half: bool = False
    discriminator: bool = True
    discriminator_starts_at: int = 0
    examples: int = 10
    nan_samples: tuple[int, ...] = ()  # samples with a loss of NaN
    steep_samples: tuple[int, ...] = ()  # samples with a loss of 0 and a gradient of NaN


class Toy:
    """A regression with a discriminator.

    It calls `at(name, k)` in the k-th call, counted from 1, of "batch", "generator", "discriminator", "validate", and
    "export".
    """

    def __init__(self, settings: ToySettings, at: Callable[[str, int], None] = lambda name, k: None) -> None:
        self.settings, self.at, self.calls = settings, at, Counter[str]()
        self.samples: list[tuple[int, int]] = []
        generator = torch.Generator().manual_seed(settings.seed)
        self.x = torch.randn(settings.examples, 3, generator=generator)
        self.y = torch.stack([self.x.sin().sum(1), self.x.prod(1)], dim=1)
        torch.manual_seed(settings.seed)
        self.generator = nn.Sequential(
            nn.Linear(3, 16),
            nn.BatchNorm1d(16) if settings.batch_norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(settings.dropout),
            nn.Linear(16, 2),
        )
        self.frozen = self.generator[0].bias.requires_grad_(False)
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        if settings.half:
            self.generator.to(torch.bfloat16)
        rate = settings.learning_rate
        self.players = [Player("generator", self.generator, self.generator_loss, learning_rate=rate, ema=True)]
        if settings.discriminator:
            second = Player("discriminator", self.discriminator, self.discriminator_loss, learning_rate=rate / 2)
            self.players.append(replace(second, starts_at=settings.discriminator_starts_at))
        self.size, self.identity = settings.examples, {"data": f"{settings.examples} random numbers"}

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        self.at(name, self.calls[name])

    def batch(self, samples: Samples) -> dict[str, Any]:
        self._called("batch")
        self.samples += samples
        noise = [
            torch.randn(3, generator=torch.Generator().manual_seed(7919 * n + self.settings.seed)) for n, _ in samples
        ]
        items = [item for _, item in samples]
        return {"x": self.x[items] + 0.1 * torch.stack(noise), "y": self.y[items], "n": [n for n, _ in samples]}

    def names(self, samples: Samples) -> list[str]:
        return [f"example-{item}.png" for _, item in samples]

    def generator_loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        self._called("generator")
        fake = networks["generator"](batch["x"].to(self.generator[0].weight.dtype)).float()
        batch["fake"] = fake.detach()
        error = (fake - batch["y"]).square().mean(1)
        loss = error.mean()
        if {*batch["n"]} & {*self.settings.nan_samples}:
            loss = loss * torch.nan
        if {*batch["n"]} & {*self.settings.steep_samples}:
            loss = (fake * 0).abs().sqrt().mean()  # the slope of the square root is infinite at 0
        parts: dict[str, float | Tensor] = {"mse": loss.detach(), "weight": 0.1}
        if self.settings.discriminator and step >= self.settings.discriminator_starts_at:
            loss = loss - 0.1 * networks["discriminator"](fake).mean()
        return loss, parts

    def discriminator_loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        self._called("discriminator")
        real, fake = networks["discriminator"](torch.cat([batch["y"], batch["fake"]])).chunk(2)
        # Not the hinge loss: its gradients cancel at first up to rounding errors, and AdamW turns these into full
        # steps.
        return nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean(), {}

    def validate(self, step: int) -> dict[str, float]:
        self._called("validate")
        assert not self.generator.training
        torch.rand(5)  # validation must not change the random numbers that training draws
        return {"mse": float((self.generator.float()(self.x) - self.y).square().mean())}

    def export(self, folder: Path) -> None:
        save_file(
            {name: value.contiguous() for name, value in self.generator.state_dict().items()},
            folder / "toy.safetensors",
        )
        self._called("export")


def hooks(spec: str) -> Callable[[str, int], None]:
    """Parse the places where a process is to be ended, separated by ";".

    "SIGKILL batch 3" sends SIGKILL to this process in the third call of "batch". "SIGKILL os.rename:step- 2" sends it
    before the second rename of a path with "step-" in it, as reported by Python's audit events. With "FSIZE" in place
    of a signal, no file can grow beyond 9,000 bytes from then on.
    """
    wishes = [(name, where, int(k)) for name, where, k in (part.split() for part in spec.split(";") if part)]
    counts = Counter[str]()

    def do(name: str) -> None:
        if name == "FSIZE":
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), getattr(signal, name))

    def at(call: str, count: int) -> None:
        for name, where, k in wishes:
            if (call, count) == (where, k):
                do(name)

    def heard(event: str, args: tuple[object, ...]) -> None:
        for name, where, k in wishes:
            wanted, _, text = where.partition(":")
            if event == wanted and any(text in str(arg) for arg in args):
                counts[where] += 1
                if counts[where] == k:
                    do(name)

    if ":" in spec:
        sys.addaudithook(heard)
    return at


def train(out: Path, settings: ToySettings, hook: str = "") -> None:
    """Train in this process, exit with the code of the command line, and write an error to OUT.error."""
    torch.set_num_threads(1)
    error = out.with_suffix(".error").open("w")
    try:
        fit(Toy(settings, hooks(hook)), settings, out)
    except SdkitError as problem:
        print(problem, file=error, flush=True)
        raise SystemExit(getattr(problem, "exit_code", 2)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def train_together(scenario: dict[str, Any]) -> None:
    """Train as one process of several, and write down the samples, calls, and error of this process."""
    rank, out, settings = (
        PartialState(cpu=True).process_index,
        Path(scenario["out"]),
        ToySettings(**scenario["settings"]),
    )
    toy = Toy(settings, hooks(scenario.get("hooks", {}).get(str(rank), "")))
    known: dict[str, Any] = {"exit_code": 0}
    try:
        fit(toy, settings, out)
    except SdkitError as error:
        known = {"exit_code": getattr(error, "exit_code", 2), "error": str(error)}
    known |= {"samples": sorted(toy.samples), "calls": toy.calls}
    (out / f"rank-{rank}.json").write_text(json.dumps(known))
    weights = {f"{player.name}/{name}": p for player in toy.players for name, p in player.network.state_dict().items()}
    save_file(weights, out / f"rank-{rank}.safetensors")


def command(arguments: list[str], hook: str = "") -> int:
    """Run sdkit's command line in this process. `hook` is where it ends, in the notation of `hooks`."""
    hooks(hook)
    return main(arguments)


def launched(scenarios: list[dict[str, Any]]) -> None:
    """Train one run after another, as one process of several."""
    for scenario in scenarios:
        train_together(scenario)
    PartialState().destroy_process_group()
