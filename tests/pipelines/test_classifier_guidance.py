"""Classifier guidance in the pipeline: against the samplers' steps, seeds, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdkit
from sdkit.errors import ArgumentError
from sdkit.guidance import Conditioning, guided
from sdkit.guidance import classifier as guided_by
from sdkit.loading.encoder_unet import EncoderUNet
from sdkit.pipelines.steps import denoise
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

SHAPE = {key: value for key, value in tiny.CLASSIFIER.items() if key != "_class_name"}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> sdkit.StableDiffusion:
    folder = tiny.model(tmp_path_factory.mktemp("model"))
    return sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def classifier() -> sdkit.Classifier:
    torch.manual_seed(0)
    network = EncoderUNet(**SHAPE, in_channels=4, num_classes=3, class_names=["ant", "bee", "cat"])
    torch.nn.init.normal_(network.head.weight, std=3.0)
    return sdkit.Classifier(network.eval())


OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}


def test_is_that_of_the_samplers_steps(sd: sdkit.StableDiffusion, classifier: sdkit.Classifier) -> None:
    """The gradient of log p(y | x_t) is subtracted from the eps of classifier-free guidance in every step."""
    found = sd("a", classifier=classifier, class_labels="bee", classifier_scale=3.0, seed=2, **OPTIONS)
    cond, uncond = Conditioning(sd.text.encode(["a", ""])).chunk(2)
    x_T = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        predict = guided(sd.unet, sd.schedule, cond, uncond, scale=2.0)
        predict = guided_by(predict, lambda x, t: classifier(x, t).log_softmax(1)[:, 1], sd.schedule, 3.0)
        expected = denoise(predict, x_T, sd.schedule, sd.schedule.timesteps(3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, sd("a", seed=2, **OPTIONS), atol=1e-3)


def test_each_prompt_has_its_class(sd: sdkit.StableDiffusion, classifier: sdkit.Classifier) -> None:
    """Also where images are drawn in other batches than they come in: the second prompt has more tokens."""
    prompts, labels = ["a", "red apple blue cat " * 12, "b"], ["ant", 2, "bee"]
    common: dict[str, Any] = {"classifier": classifier, "classifier_scale": 3.0, **OPTIONS}
    together = sd(prompts, class_labels=labels, num_images_per_prompt=2, **common)
    for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        for k in (2 * i, 2 * i + 1):
            alone = sd(prompt, class_labels=label, seed=k, **common)
            torch.testing.assert_close(together[k : k + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_scale_of_zero_draws_as_without(sd: sdkit.StableDiffusion, classifier: sdkit.Classifier) -> None:
    zero = sd("a", classifier=classifier, class_labels="bee", classifier_scale=0.0, **OPTIONS)
    torch.testing.assert_close(zero, sd("a", **OPTIONS), atol=1e-5, rtol=1e-5)


def test_bad_input(sd: sdkit.StableDiffusion, classifier: sdkit.Classifier) -> None:
    other = sdkit.Classifier(EncoderUNet(**SHAPE, in_channels=3, num_classes=2))
    stated = sdkit.Classifier(EncoderUNet(**SHAPE, in_channels=4, num_classes=2, latents="0123456789abcdef"))
    wrong: Any = torch.nn.Identity()
    for options, fragment in (
        ({"classifier": classifier}, "a classifier needs the classes to draw; give them as class_labels"),
        ({"class_labels": "bee"}, "class_labels belongs to a classifier; give one as classifier"),
        ({"classifier_scale": 2.0}, "classifier_scale belongs to a classifier; give one as classifier"),
        ({"classifier": classifier, "class_labels": "dog"}, "this classifier knows no class 'dog'"),
        ({"classifier": classifier, "class_labels": [0, 1]}, "2 class_labels cannot serve 1 prompts"),
        ({"classifier": classifier, "class_labels": 0, "classifier_scale": float("nan")}, "the guidance scale must be"),
        ({"classifier": wrong, "class_labels": 0}, "classifier must be a sdkit.Classifier, not Identity"),
        ({"classifier": other, "class_labels": 0}, "was trained on the latents of another VAE"),
        ({"classifier": stated, "class_labels": 0}, "was trained on the latents of another VAE"),
    ):
        given: dict[str, Any] = {**OPTIONS, **options}
        one_sentence(lambda given=given: sd("a", **given), ArgumentError, fragment)
