"""The classifier of noisy images: against diffusers' U-Net and NumPy, loading, its gradient, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

import sdkit
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError, SourceError
from sdkit.guidance import classifier as guided_by
from sdkit.loading.encoder_unet import EncoderUNet
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

CLASSES = ("ant", "bee", "cat")


def network(**changes: Any) -> EncoderUNet:
    torch.manual_seed(0)
    shape = {key: value for key, value in tiny.CLASSIFIER.items() if key != "_class_name"}
    given = {"in_channels": 4, "num_classes": 3, "class_names": CLASSES} | changes
    made: EncoderUNet = EncoderUNet(**shape | given).eval()
    return made


@pytest.fixture
def classifier() -> sdkit.Classifier:
    return sdkit.Classifier(network())


def noisy(n: int, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_features_are_those_of_diffusers_unet() -> None:
    """With the same weights, the down path and the middle block compute what those of a `UNet2DModel` do."""
    ours = network()
    theirs = UNet2DModel(
        in_channels=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=8, norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    unused = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert all(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in unused.missing_keys)
    assert all(name.startswith(("norm_out", "pool", "head")) for name in unused.unexpected_keys)
    features: list[Tensor] = []
    for one in (ours, theirs):
        one.mid_block.register_forward_hook(lambda _, __, output: features.append(output))
    x_t, t = noisy(3), torch.tensor([7, 400, 999])
    with torch.no_grad():
        ours(x_t, t), theirs(x_t, t)
    assert torch.equal(*features)


def test_logits_are_attention_pooling_in_numpy() -> None:
    """Pooling is one query, the mean of all positions, which attends to itself and to them (Radford et al. 2021,
    section 2.3), here with two heads of eight channels."""
    net = network()
    inner: list[Tensor] = []
    net.mid_block.register_forward_hook(lambda _, __, output: inner.append(output))
    with torch.no_grad():
        logits = net(noisy(2), torch.tensor([3, 700]))
    state = {name: value.double().numpy() for name, value in net.state_dict().items()}

    def linear(x: Any, name: str) -> Any:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i, h in enumerate(inner[0].double().numpy()):
        groups = h.reshape(4, -1)
        normed = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
        x = normed.reshape(16, -1).T * state["norm_out.weight"] + state["norm_out.bias"]  # (positions, channels)
        x = x / (1 + np.exp(-x))
        query = x.mean(0) + state["pool.positional_embedding"][0]
        x = np.vstack([query, x])
        q, k, v = linear(query, "pool.q_proj"), linear(x, "pool.k_proj"), linear(x, "pool.v_proj")
        pooled = []
        for head in (slice(0, 8), slice(8, 16)):
            scores = k[:, head] @ q[head] / math.sqrt(8)
            weights = np.exp(scores - scores.max())
            pooled.append(weights / weights.sum() @ v[:, head])
        np.testing.assert_allclose(logits[i], linear(np.concatenate(pooled), "head"), atol=1e-5)


def test_image_i_is_bit_identical_alone_and_in_a_batch(classifier: sdkit.Classifier) -> None:
    x_t = noisy(5)
    with torch.no_grad():
        together = classifier(x_t, 300)
        assert together.shape == (5, 3)
        for i in range(5):
            torch.testing.assert_close(classifier(x_t[i : i + 1], 300)[0], together[i], atol=1e-6, rtol=0)
        assert not torch.allclose(classifier(x_t, 900), together)


def test_log_prob_chooses_classes_by_name_and_number(classifier: sdkit.Classifier) -> None:
    x_t = noisy(3)
    with torch.no_grad():
        expected = classifier(x_t, 500).softmax(1).log()
        for labels, columns in (("bee", [1, 1, 1]), (2, [2, 2, 2]), (["cat", 0, "bee"], [2, 0, 1])):
            found = classifier.log_prob(labels)(x_t, 500)
            torch.testing.assert_close(found, expected[[0, 1, 2], columns])


@pytest.mark.parametrize("labels", ["bee", ["cat", "ant"]])
def test_guidance_is_the_finite_difference_of_the_log_probability(labels: str | Sequence[str]) -> None:
    """Central differences of every coordinate of both images. diffusers computes the softmax of pooling in float32."""
    classifier = sdkit.Classifier(network().double())
    schedule, t, h = NoiseSchedule.scaled_linear(), 400, 3e-3
    log_prob = classifier.log_prob(labels)

    def predict(x_t: Tensor, t: int) -> Prediction:
        return schedule.prediction(0.3 * x_t, x_t, t)

    x_t = noisy(2, side=2, dtype=torch.float64)
    numeric = torch.zeros(2, x_t[0].numel(), dtype=torch.float64)
    steps = h * torch.eye(x_t[0].numel(), dtype=torch.float64).reshape(-1, 1, *x_t.shape[1:])
    with torch.no_grad():
        for k, step in enumerate(steps):
            numeric[:, k] = (log_prob(x_t + step, t) - log_prob(x_t - step, t)) / (2 * h)
    noise = math.sqrt(1 - float(schedule.alphas_cumprod[t]))
    found = (predict(x_t, t).eps - guided_by(predict, log_prob, schedule, 3.0)(x_t, t).eps) / (3.0 * noise)
    assert float(numeric.norm(dim=1).min()) > 0.005
    assert float((found.flatten(1) - numeric).norm() / numeric.norm()) < 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_folder_loads(tmp_path: Path, dtype: str) -> None:
    net = network()
    net.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = sdkit.Classifier.from_pretrained(tmp_path, dtype=dtype, device="cpu")
    assert loaded.classes == CLASSES
    assert loaded.name == str(tmp_path)
    with torch.no_grad():
        expected, found = sdkit.Classifier(net)(noisy(2), 100), loaded(noisy(2), 100)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol={"fp32": 0, "bf16": 0.05}[dtype], rtol=0)


class TestBadInput:
    def test_of_calls(self, classifier: sdkit.Classifier) -> None:
        log_prob = classifier.log_prob(["ant", "bee"])
        for run, fragment in (
            (
                lambda: classifier(noisy(1)[:, :3], 1),
                "takes x_t (B, 4, h, w) whose sides divide by 2, not (1, 3, 8, 8)",
            ),
            (lambda: classifier(noisy(1, side=5), 1), "whose sides divide by 2, not (1, 4, 5, 5)"),
            (
                lambda: classifier.log_prob("dog"),
                "knows no class 'dog'; it knows ant, bee, cat, or their numbers from 0",
            ),
            (lambda: classifier.log_prob(3), "knows no class 3"),
            (lambda: classifier.log_prob(-1), "knows no class -1"),
            (lambda: classifier.log_prob([True]), "knows no class True"),
            (lambda: classifier.log_prob([]), "labels must be names or numbers of classes, not []"),
            (lambda: log_prob(noisy(3), 1), "2 labels cannot serve 3 images: give one, or one for each"),
            (lambda: sdkit.Classifier(network(class_names=["a"])), "names 1 classes, and its network has 3"),
        ):
            one_sentence(run, ArgumentError, fragment)

    def test_of_folders(self, tmp_path: Path) -> None:
        network().save_pretrained(tmp_path)
        load = lambda: sdkit.Classifier.from_pretrained(tmp_path, device="cpu")  # noqa: E731
        good = json.loads((tmp_path / "config.json").read_text())
        for change, fragment in (
            ({"num_classes": 0}, "has num_classes 0, not a whole number from 1"),
            ({"class_names": "abc"}, "has class_names 'abc', not a list of words or null"),
            ({"num_classes": 4, "class_names": None}, "the weights in"),
            ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel, not a classifier (EncoderUNet)"),
            ({"down_block_types": ["Secret"] * 2}, "a classifier in"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(good | change))
            one_sentence(load, SourceError, fragment)
        one_sentence(lambda: sdkit.Classifier.from_pretrained("emoji"), SourceError, "classifier")
