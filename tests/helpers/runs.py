"""Training runs of the real stages in other processes, which can be killed at any point; see `Runs` and `launched`."""

from __future__ import annotations

import json
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save, save_file

from sdkit.errors import SdkitError
from sdkit.networks.lpips import LPIPS
from sdkit.training import (
    ClassifierConfig,
    ClipConfig,
    ControlNetConfig,
    EmbeddingConfig,
    ImagePriorConfig,
    PriorConfig,
    UNetConfig,
    VAEConfig,
    VQVAE2Config,
    checkpoint,
    train_classifier,
    train_clip,
    train_controlnet,
    train_embedding,
    train_image_prior,
    train_prior,
    train_unet,
    train_vae,
    train_vqvae2,
)
from sdkit.training.ema import EMA
from sdkit.training.loop import fit
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.classifier import ClassifierStage
from sdkit.training.stages.clip import CLIPStage
from sdkit.training.stages.controlnet import ControlNetStage
from sdkit.training.stages.embedding import EmbeddingStage
from sdkit.training.stages.image_prior import ImagePriorStage
from sdkit.training.stages.prior import PriorStage
from sdkit.training.stages.unet import UNetStage
from sdkit.training.stages.vae import VAEStage
from sdkit.training.stages.vqvae2 import VQVAE2Stage
from tests.helpers import forks, toy

STAGES: dict[str, tuple[Any, Any, Callable[[Any], Path]]] = {
    "vae": (VAEConfig, VAEStage, train_vae),
    "unet": (UNetConfig, UNetStage, train_unet),
    "controlnet": (ControlNetConfig, ControlNetStage, train_controlnet),
    "embedding": (EmbeddingConfig, EmbeddingStage, train_embedding),
    "classifier": (ClassifierConfig, ClassifierStage, train_classifier),
    "clip": (ClipConfig, CLIPStage, train_clip),
    "image_prior": (ImagePriorConfig, ImagePriorStage, train_image_prior),
    "prior": (PriorConfig, PriorStage, train_prior),
    "vqvae2": (VQVAE2Config, VQVAE2Stage, train_vqvae2),
}
CALLS = ("batch", "loss", "discriminator_loss", "validate", "export")


class Runs:
    """Trains in forked processes."""

    process: int
    """Process id of the last run."""

    def __call__(self, stage: str, settings: dict[str, Any], hook: str = "") -> int:
        """Run a training stage in another process and return its exit code.

        Args:
            stage: A key of `STAGES`.
            settings: Fields of the stage's settings.
            hook: Where to end the process, in the notation of `toy.hooks` with the names of `calling`.

        Returns:
            The exit code; -N if signal N killed or stopped the process.
        """
        process = forks.start(train, stage, settings, hook)
        assert process.pid
        self.process = process.pid
        while process.exitcode is None:
            if "SIGSTOP" in hook and _is_stopped(process.pid):
                return -signal.SIGSTOP
            process.join(0.05 if "SIGSTOP" in hook else None)
        return process.exitcode

    def said(self, settings: dict[str, Any]) -> str:
        """Return the error sentence that the last run ended with."""
        return _sentence(settings).read_text()


def _is_stopped(process: int) -> bool:
    """Return whether a signal has stopped a process, which has not ended."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _sentence(settings: dict[str, Any]) -> Path:
    return Path(f"{settings['out_dir']}.sentence")


def lpips_weights(path: Path) -> Path:
    """Write random weights for LPIPS. They are good enough where no test looks at the pictures."""
    torch.manual_seed(0)
    state = LPIPS("vgg").state_dict().items()
    names = {k: f"lin{k[6:]}.weight" if k.startswith("heads.") else k.replace("vgg", "features") for k, _ in state}
    save_file({names[key]: value for key, value in state}, path)
    return path


def config_of(stage: str, settings: dict[str, Any]) -> Any:
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return STAGES[stage][0](**settings)


def calling(at: Callable[[str, int], None]) -> None:
    """Patch this process so that it calls `at(name, k)` in the k-th call of each stage method, in the k-th `update` of
    an average, and ("half") in the middle of writing the k-th file of a checkpoint.
    """
    counts, lock = Counter[str](), threading.Lock()

    def called(name: str) -> None:
        with lock:  # batches are made in several threads
            counts[name] += 1
            count = counts[name]
        at(name, count)

    def told(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            called(name)
            return method(*arguments)

        return run

    def in_two(tensors: dict[str, torch.Tensor], path: Path) -> None:
        data = save(tensors)
        path.write_bytes(data[: len(data) // 2])
        called("half")
        path.write_bytes(data)

    for _, stage, _ in STAGES.values():
        for name in CALLS:
            if hasattr(stage, name):
                setattr(stage, name, told(name, getattr(stage, name)))
    EMA.update = told("update", EMA.update)  # type: ignore[method-assign]
    checkpoint.save_file = in_two  # type: ignore[assignment]


def train(stage: str, settings: dict[str, Any], hook: str) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if hook:
        calling(toy.hooks(hook))
    config = config_of(stage, settings)
    try:
        STAGES[stage][2](config)
    except SdkitError as error:
        _sentence(settings).write_text(str(error))
        return int(getattr(error, "exit_code", 2))
    return 0


def _train_together(scenario: dict[str, Any]) -> None:
    """Train as one process of several, and write down the samples and files that this process was responsible for."""
    rank = PartialState(cpu=True).process_index
    config = config_of(scenario["stage"], scenario["settings"])
    stage = STAGES[scenario["stage"]][1](config)
    samples: list[tuple[int, int]] = []
    batch = stage.batch
    stage.batch = lambda mine: samples.extend(mine) or batch(mine)  # type: ignore[func-returns-value]
    RENAMED.clear()
    fit(stage, config, Path(config.out_dir), before=getattr(stage, "prepare", None))
    out = Path(config.out_dir)
    inside = sorted({path.relative_to(out).parts[0] for path in RENAMED if path.is_relative_to(out)})
    (out / f"rank-{rank}.json").write_text(json.dumps({"samples": sorted(samples), "wrote": inside}))
    weights = {
        f"{player.name}/{name}": p for player in stage.players for name, p in player.network.state_dict().items()
    }
    # Copies, because a GPT's head shares its weights with the embedding.
    save_file({name: p.contiguous().clone() for name, p in weights.items()}, out / f"rank-{rank}.safetensors")


RENAMED: list[Path] = []  # paths that this process renamed into place; all files of a run are written by such a rename


def launched(scenarios: list[dict[str, Any]]) -> None:
    """Train one run after another, as one process of several."""
    warnings.simplefilter("ignore")
    sys.addaudithook(lambda event, args: RENAMED.append(Path(args[1])) if event == "os.rename" else None)
    for scenario in scenarios:
        _train_together(scenario)
    PartialState().destroy_process_group()


def metrics(out: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run without its times."""
    return [
        {k: v for k, v in line.items() if not k.endswith("seconds")} for line in read_metrics(out / "metrics.jsonl")
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def everything(out: Path) -> dict[str, Any]:
    """Read all that two bit-identical runs share: checkpoints (weights, averages, optimizer states, random numbers),
    result, pictures, class images, metrics, and skipped files.
    """
    found: dict[str, Any] = {name: files(out / name) for name in ("checkpoints", "result", "samples", "class_images")}
    skipped = out / "skipped.json"
    return found | {"metrics": metrics(out), "skipped": skipped.exists() and json.loads(skipped.read_text())}
