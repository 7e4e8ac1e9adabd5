"""Priors over the codes of a VQ model: made, saved, loaded, and their exact likelihood."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.configs import read_json
from sdkit.loading.tensors import check_dtypes, guarded, is_finite, open_tensors
from sdkit.messages import clean
from sdkit.networks.code_transformer import CodeTransformer
from sdkit.networks.pixelcnn import GatedPixelCNN
from sdkit.networks.prior_shape import PriorShape

CONFIG, WEIGHTS = "config.json", "model.safetensors"

CodePrior = CodeTransformer | GatedPixelCNN
"""A prior: logits = prior(codes, condition), and `prior.stepper` for sampling."""


def new_prior(shape: PriorShape) -> CodePrior:
    """Return a prior with random weights, in training mode, on the CPU."""
    return CodeTransformer(shape) if shape.kind == "transformer" else GatedPixelCNN(shape)


def parameters_of(shape: PriorShape) -> int:
    """Return the number of parameters of a prior, which is not built."""
    with torch.device("meta"):
        return sum(p.numel() for p in new_prior(shape).parameters())


def log_likelihood(prior: CodePrior, codes: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return the exact log-likelihood of images, in nats: the sum of log p(code | codes before it, condition).

    Args:
        prior: The prior.
        codes: (B, h, w), int64.
        condition: (B, *condition_shape), int64; None if the prior has none.

    Returns:
        (B,), float32.

    Raises:
        ArgumentError: The prior has a condition and none is given, or the other way round.
    """
    if (condition is None) != (prior.shape.condition is None):
        kind = prior.shape.condition
        expected = "no condition" if kind is None else f"a condition of kind {kind}"
        raise ArgumentError(f"this prior takes {expected}; {'leave it out' if kind is None else 'give one'}.")
    logits: Tensor = prior(codes, condition).float()
    return -F.cross_entropy(logits.movedim(-1, 1), codes, reduction="none").sum((1, 2))


def save_prior(prior: CodePrior, folder: Path) -> None:
    """Write the config and the weights of a prior into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(prior.shape.asdict(), indent=2) + "\n", encoding="utf-8")
    save_file(_weights(prior), folder / WEIGHTS)


def load_prior(folder: Path) -> CodePrior:
    """Load a prior, in eval mode, float32, on the CPU.

    Args:
        folder: A folder that `save_prior` wrote.

    Raises:
        SourceError: The folder holds no prior, or a damaged one.
    """
    path, label = folder / CONFIG, f"the prior in {str(folder)!r}"
    shape = PriorShape.from_config(read_json(path), repr(str(path)))
    with guarded(label), torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in _weights(new_prior(shape)).items()}
    file = open_tensors(folder / WEIGHTS)
    # Before memory is taken: a damaged config may ask for any amount of it.
    if names := sorted(name for name in {**file.shapes, **expected} if file.shapes.get(name) != expected.get(name)):
        raise SourceError(
            f"the weights of {label} do not fit its config, such as {clean(names[0])}; give files of one run."
        )
    check_dtypes(file, expected)
    with guarded(label):
        prior = new_prior(shape)
        prior.load_state_dict({name: tensor.float() for name, tensor in file.read(expected).items()}, strict=False)
    if not all(map(is_finite, prior.parameters())):
        raise SourceError(f"{label} has weights that are not finite; train it again, or give another.")
    return prior.eval()


def _weights(prior: CodePrior) -> dict[str, Tensor]:
    """Return the tensors to save. The head of a GPT shares its weights with the embedding."""
    state = prior.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items() if not name.endswith("lm_head.weight")}
