"""Training a CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): an image and its caption are drawn together
in one space, and pushed away from the other captions and images of their batch."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn

from sdkit.data.examples import Examples
from sdkit.data.transform import Transform
from sdkit.diffusion.contrastive import contrastive, equal_rows
from sdkit.errors import ArgumentError
from sdkit.evaluation.retrieval import retrieval
from sdkit.loading.transformers_folder import clip_config, new_clip, own_tokenizer
from sdkit.messages import no_warnings, quiet
from sdkit.networks.clip import CLIP, PIXELS
from sdkit.training.distributed import split_over_processes
from sdkit.training.learned_tokenizer import learn_tokenizer
from sdkit.training.loop import fit
from sdkit.training.settings import ClipConfig
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.captioned import captioned, open_captioned, split_captioned
from sdkit.training.stages.images import (
    TrainingImages,
    identity_of,
    report_skipped,
    training_transform,
)
from sdkit.training.stages.unet import enable_gradient_checkpointing

LARGEST_SCALE = 100.0  # of the logits; the paper clips it there, because training is unstable beyond
BETAS = (0.9, 0.98)  # of AdamW, for vision transformers (table 18 of the paper)
MOST_VALIDATED = 1000  # pairs of validation_data


def train_clip(config: ClipConfig) -> Path:
    """Train a CLIP on images and their captions, or fine-tune one. An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images with captions.

    Returns:
        The run folder. Its result/ is a CLIP in transformers' layout, with its tokenizer: for
        `CLIPModel.from_pretrained`, `sdkit.evaluation.open_extractor("clip:FOLDER")`, and `sdkit evaluate`.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.
    """
    return fit(CLIPStage(config), config, Path(config.out_dir))


class CLIPStage:
    """The stage of `train_clip`: one player, the CLIP.

    The loss of a micro-batch contrasts its pairs on all processes: embeddings are gathered, so two processes with N
    pairs each train as one with 2 N. With gradient accumulation, a step averages the losses of separate contrasts.
    Pairs of one contrast with the same caption are no wrong answers for each other. Weights decay, but gains and biases
    do not (section 2.5 of the paper).

    Args:
        config: Settings of the run.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
    """

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.contrast = config.batch_size * PartialState().num_processes
        if self.contrast < 2:
            raise ArgumentError("batch_size 1 leaves an image nothing to be contrasted with; give at least 2.")
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ArgumentError("FSDP cannot shard a CLIP, whose temperature is one number; launch without it.")
        examples = open_captioned(config.data, "a CLIP", config.opened_with())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.clip = self._make_clip(examples)
        # The export needs an unused copy, because tokenizing changes what a tokenizer saves.
        self.tokenizer = copy.deepcopy(self.clip.tokenizer)
        self.pairs, self.train, held_out = split_captioned(examples, "a CLIP")
        size = (self.clip.side, self.clip.side)
        self.images = TrainingImages(examples, training_transform(size, config.augment), config.seed)
        self.identity = {
            "data": examples.identity,
            "model": identity_of(self.clip.network),
            "tokenizer": tokenizer_fingerprint(self.clip.tokenizer),
            "validation": "held out of the data",
            "contrast": str(self.contrast),
        }
        self.validation, self.held_out = TrainingImages(examples, Transform(size=size), seed=0), held_out
        self.validation.skipped = self.images.skipped
        if config.validation_data is not None:
            named = {"image_column": config.image_column, "caption_column": config.caption_column}
            others = open_captioned(config.validation_data, "a CLIP", named)
            self.validation = TrainingImages(others, Transform(size=size), seed=0)
            self.train, self.held_out = self.pairs, [int(i) for i in captioned(others, "a CLIP")[:MOST_VALIDATED]]
            self.identity["validation"] = others.identity
        self.size = len(self.train)
        rate, ema = config.learning_rate, config.ema_decay > 0
        self.players = [
            Player(
                "clip", self.clip, self.loss, learning_rate=rate, ema=ema, betas=BETAS, decays_gains=False,
                after_update=self.clip_scale,
            )
        ]  # fmt: skip

    def _make_clip(self, examples: Examples) -> CLIP:
        """Load the CLIP, or make one with a tokenizer that is given or learned from the captions."""
        config = self.config
        if config.init is None:
            clip = CLIP.from_pretrained(config.model, device="cpu")
        else:
            sizes = clip_config(config.init)
            if config.tokenizer is not None:
                words = own_tokenizer(config.tokenizer)
            else:
                text = sizes["text_config"]
                captions = (caption for caption in examples.captions if caption)
                words = learn_tokenizer(
                    captions, text.get("vocab_size", 49408), text.get("max_position_embeddings", 77)
                )
            clip = CLIP(new_clip(sizes, words), words)
        clip.requires_grad_(True)
        if PartialState().device.type == "cpu" and config.mixed_precision != "no":
            # The backward pass of PyTorch's fused attention is slow there: see PlainWhereSmall. A step of 128 pairs of
            # the emoji recipe takes 0.25 s with plain attention, and 0.42 s with fused.
            clip.network.set_attn_implementation("eager")
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(clip.network)
        return clip

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return pixels (B, 3, H, W) in [-1, 1] and token ids (B, 77) of samples (n, item)."""
        loaded = [self.images.load(self.train, item, n // self.size) for n, item in samples]
        ids = self.clip.tokenize([example.caption for _, example in loaded])
        return {"pixels": torch.stack([pixels for pixels, _ in loaded]), "ids": ids}

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.images.examples[int(self.train[item])].name for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the contrastive loss over the pairs of all processes, and the factor of the logits."""
        images, texts, scale = networks["clip"](batch["pixels"], batch["ids"])
        same = equal_rows(gather(batch["ids"]))
        loss = contrastive(gathered(images), gathered(texts), scale, same)
        return loss, {"logit_scale": scale.detach()}

    def clip_scale(
        self, networks: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]], step: int
    ) -> Mapping[str, float]:
        """Clip the factor of the logits at 100 after each update."""
        self.clip.network.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return {}

    def validate(self, step: int) -> dict[str, float]:
        """Return the loss of the held-out pairs as one contrast, and how often they find each other (`retrieval`)."""
        found = split_over_processes(len(self.held_out), self._embedded)
        report_skipped(self.images.skipped | self.validation.skipped, Path(self.config.out_dir) / "skipped.json")
        images, texts, ids = (torch.stack(parts) for parts in zip(*(one[:3] for one in found), strict=True))
        scale = self.clip.network.logit_scale.exp().cpu()
        metrics = {"loss": float(contrastive(images, texts, scale, equal_rows(ids)))}
        return metrics | retrieval(images, texts, [one[3] for one in found])

    def _embedded(self, i: int) -> tuple[Tensor, Tensor, Tensor, str]:
        """Return the embeddings of held-out pair i (D,), its token ids, and its caption."""
        pixels, example = self.validation.load(self.held_out, i, 0)
        ids = self.clip.tokenize(example.caption)
        # CLIP.forward runs in float32; calling self.clip would run Accelerate's autocast
        image, text, _ = CLIP.forward(self.clip, pixels[None].to(self.clip.device), ids.to(self.clip.device))
        return image[0].cpu(), text[0].cpu(), ids[0], example.caption

    def export(self, folder: Path) -> None:
        """Write the CLIP in transformers' layout into an empty folder, with its tokenizer and preprocessing."""
        with quiet("transformers"), no_warnings():
            self.clip.network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing(self.clip.side), indent=2) + "\n")


def gathered(embeddings: Tensor) -> Tensor:
    """Return the embeddings (N, D) of all processes in the order of samples. Only a process's own have a gradient.

    Each process computes the loss L of all N pairs, but its backward pass goes through its own embeddings alone. The
    processes' average of these gradients would be dL / number of processes, hence the factor.
    """
    state = PartialState()
    if state.num_processes == 1:
        return embeddings
    everything: Tensor = gather(embeddings.detach())
    parts = [*everything.chunk(state.num_processes)]
    embeddings.register_hook(lambda gradient: gradient * state.num_processes)
    parts[state.process_index] = embeddings
    return torch.cat(parts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a fingerprint of a tokenizer: SHA-256 over its vocabulary and special tokens."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([special, sorted(tokenizer.get_vocab().items())]).encode()).hexdigest()[:16]


def preprocessing(side: int) -> dict[str, Any]:
    """Return preprocessor_config.json, which tells transformers how to resize and scale images."""
    mean, std = PIXELS
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }
