"""Metrics of the pictures that runs make: computed anew with NumPy from pictures that the saved models make, and in two
processes as in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.data import cache
from sdkit.errors import ArgumentError
from sdkit.evaluation import open_extractor
from sdkit.networks.lpips import LPIPS
from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.unet import UNetStage
from tests.helpers import VALIDATION_STEPS, forks, tiny
from tests.helpers import runs as helper
from tests.helpers.clip import save_clip
from tests.helpers.sentences import one_sentence

pytest.importorskip("datasets")
pytest.importorskip("peft")

COUNT = 3  # images; with fewer than 20, all are validated
FROZEN = 1e-12  # a learning rate at which both validations see the same weights
LONG = "a red disc beside a blue disc " * 6  # two chunks of tokens


@dataclass(frozen=True)
class Kit:
    model: Path
    photos: Path
    cache: Path
    clip: Path

    def settings(self, out: Path, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"model": self.model, "data": self.photos, "out_dir": out, "size": tiny.SIZE}
        return settings | {"max_steps": 1, "ema_decay": 0.0, "learning_rate": FROZEN} | changes

    @property
    def files(self) -> list[Path]:
        return sorted(self.photos.glob("*.png"))

    @property
    def captions(self) -> list[str]:
        return [file.with_suffix(".txt").read_text() for file in self.files]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("evaluating")
    model, photos = tiny.model(folder / "model"), tiny.photos(folder / "photos", COUNT)
    (photos / "001.txt").write_text(LONG)
    made = cache(model, photos, folder / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")
    return Kit(model, photos, made, save_clip(folder / "clip"))


def validation(out: Path) -> list[dict[str, float]]:
    """Read the lines of validation without their times."""
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "validation/seconds" in line]
    return [{key.removeprefix("validation/"): value for key, value in line.items()} for line in lines]


def frechet(a: Any, b: Any) -> float:
    """|m_a - m_b|^2 + Tr A + Tr B - 2 Tr (AB)^(1/2), whose last trace is the nuclear norm of the product of centred
    data matrices.
    """
    a, b = a.double().numpy(), b.double().numpy()
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    trace = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * trace)


def kid(a: Any, b: Any) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    n = len(a)
    within, others, across = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    unbiased = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (within, others))
    return float(unbiased - 2 * across.mean())


def features(images: Any, extractor: str = "alex") -> Tensor:
    """Extract features one image at a time."""
    network = open_extractor(extractor, device="cpu")
    return torch.cat([network(image) for image in images])


def test_reconstructions_are_compared_with_the_images(kit: Kit, tmp_path: Path) -> None:
    config = VAEConfig(
        **kit.settings(tmp_path, lpips_weight=0, evaluate=("lpips", "frechet", "kid:clip:" + str(kit.clip)))
    )
    train_vae(config)
    vae = sdkit.VAE.from_pretrained(tmp_path / "result", dtype="fp32", device="cpu")
    originals, made = [Image.open(file) for file in kit.files], vae.reconstruct(kit.files)
    last = validation(tmp_path)[-1]
    assert last["frechet"] == pytest.approx(frechet(features(made), features(originals)), rel=1e-4)
    clip = f"clip:{kit.clip}"
    assert last["kid_clip"] == pytest.approx(kid(features(made, clip), features(originals, clip)), rel=1e-3)
    x, y = (torch.stack(sdkit.images.to_tensors(images)) for images in (originals, made))
    with torch.no_grad():
        assert last["lpips"] == pytest.approx(float(LPIPS.from_pretrained("alex")(y, x).mean()), rel=0.02)  # of 8 bits


@pytest.mark.filterwarnings("ignore:.*and this CLIP reads 30")
@pytest.mark.parametrize("data", ["photos", "cache"])
def test_drawings_of_the_captions_are_compared_with_the_images(data: str, kit: Kit, tmp_path: Path) -> None:
    """From a cache, the images are what the VAE decodes, and the captions what their tokens spell."""
    wanted = ("lpips", "frechet", "kid", f"clip_score:{kit.clip}")
    changes = {} if data == "photos" else {"size": None}
    train_unet(UNetConfig(**kit.settings(tmp_path, evaluate=wanted, **changes | {"data": getattr(kit, data)})))
    sd = sdkit.StableDiffusion.from_pretrained(tmp_path / "result", dtype="fp32", device="cpu")
    drawn = [
        sd(caption, seed=i, height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=VALIDATION_STEPS)[0]
        for i, caption in enumerate(kit.captions)
    ]
    originals: list[Image.Image] = (
        [Image.open(file) for file in kit.files] if data == "photos" else sd.vae.reconstruct(kit.files)
    )
    expected = {"frechet": frechet, "kid": kid}
    found, a, b = validation(tmp_path)[-1], features(drawn), features(originals)
    for name, metric in expected.items():
        assert found[name] == pytest.approx(metric(a, b), rel=3e-3), name  # the drawings here are of 8 bits
    x, y = (torch.stack(sdkit.images.to_tensors(images)) for images in (originals, drawn))
    with torch.no_grad():
        assert found["lpips"] == pytest.approx(float(LPIPS.from_pretrained("alex")(y, x).mean()), rel=1e-3)
    clip = open_extractor(f"clip:{kit.clip}", device="cpu")
    images, texts = (x / x.norm(dim=1, keepdim=True) for x in (clip(drawn), clip.embed_texts(kit.captions)))
    scores = 2.5 * (images * texts).sum(1).clamp(min=0)
    assert found["clip_score"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert {"frechet", "kid", "lpips", "clip_score", "loss", "step", "seconds"} == found.keys()


def test_the_same_pictures_are_drawn_whatever_else_is_validated(kit: Kit, tmp_path: Path) -> None:
    """Metrics change neither the run nor the sheets of the validation prompts."""
    common = {"learning_rate": 1e-3, "validation_prompts": ("a red disc",), "max_steps": 2}
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    train_unet(UNetConfig(**kit.settings(plain, **common)))
    train_unet(UNetConfig(**kit.settings(evaluated, evaluate=("frechet",), **common)))
    losses = [
        [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line] for out in (plain, evaluated)
    ]
    assert losses[0] == losses[1]
    sheets = [(out / "samples" / "step-00000002.png").read_bytes() for out in (plain, evaluated)]
    assert sheets[0] == sheets[1]
    train_unet(UNetConfig(**kit.settings(evaluated, evaluate=("kid",), **common | {"max_steps": 3})))  # it may change
    assert [("frechet" in line, "kid" in line) for line in validation(evaluated)] == [(True, False)] * 2 + [
        (False, True)
    ]


@pytest.mark.slow
def test_two_processes_measure_as_one(kit: Kit, tmp_path: Path) -> None:
    """To 1e-6, before training and after a step that changes nothing."""
    many, one = tmp_path / "many", tmp_path / "one"
    wanted = ("lpips", "frechet", "kid")
    runs: dict[str, dict[str, Any]] = {
        "vae": {"lpips_weight": 0.1, "evaluate": wanted},
        "unet": {"evaluate": (*wanted, f"clip_score:{kit.clip}"), "data": kit.cache, "size": None},
    }
    scenarios = [{"stage": name, "settings": kit.settings(many / name, **changes)} for name, changes in runs.items()]
    ended = forks.launch(helper.launched, scenarios)
    assert ended.codes == [0, 0], ended.err
    for name, changes in runs.items():
        config = helper.config_of(name, kit.settings(one / name, **changes | {"batch_size": 2}))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        train_vae(config) if isinstance(config, VAEConfig) else train_unet(config)
        torch.set_num_threads(threads)
        lines = [
            [{key: value for key, value in line.items() if key != "seconds"} for line in validation(out / name)]
            for out in (many, one)
        ]
        assert len(lines[0]) == len(lines[1]) == 2
        for left, right in zip(*lines, strict=True):
            assert left.keys() >= {"lpips", "frechet", "kid"}
            assert left == pytest.approx(right, rel=1e-6, abs=1e-6), name


WRONG = [
    ("both", "fid", "evaluate 'fid' is not one of 'lpips', 'frechet', 'kid', 'clip_score'"),
    ("both", 3, "evaluate must be a string or a list of at least one string"),
    ("both", ("frechet", "frechet"), "evaluate names frechet twice; leave one of them out"),
    ("both", ("kid:clip:a", "kid:clip:b"), "evaluate names kid_clip twice; leave one of them out"),
    ("both", "frechet:resnet", "the extractor 'resnet' is not one of 'alex', 'inception', 'dinov2', 'clip'"),
    ("both", "lpips:vgg", "evaluate 'lpips:vgg': lpips takes no extractor; leave it out"),
    ("vae", "clip_score", "clip_score compares drawings with prompts, and a VAE has none; leave it out"),
]


@pytest.mark.parametrize(("stage", "evaluate", "sentence"), WRONG)
def test_what_cannot_be_measured_is_one_sentence(stage: str, evaluate: Any, sentence: str, kit: Kit) -> None:
    for settings in [VAEConfig, UNetConfig] if stage == "both" else [VAEConfig]:
        one_sentence(
            lambda made=settings: made(data="photos", out_dir="run", evaluate=evaluate), ArgumentError, sentence
        )


def test_pictures_that_are_too_small_or_too_few_are_one_sentence(kit: Kit, tmp_path: Path) -> None:
    def stage(**changes: Any) -> UNetStage:
        return UNetStage(UNetConfig(**kit.settings(tmp_path / "run", **changes)))

    one_sentence(
        lambda: stage(evaluate="lpips", size=16), ArgumentError,
        "evaluate lpips needs pictures of at least 31 x 31 pixels, not 16 x 16; leave it out, or change the size",
    )  # fmt: skip
    single = tiny.photos(tmp_path / "single", 1)
    one_sentence(
        lambda: stage(evaluate="kid", data=single), ArgumentError,
        "evaluate kid needs at least 2 held-out images, and there is 1; leave it out",
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "a red disc", LONG, "A  Red,disc!", "a red disc on the left"])
def test_tokens_spell_a_text_with_the_same_tokens(text: str, kit: Kit) -> None:
    for source in (kit.model, "emoji"):
        encoder = sdkit.TextEncoder.from_pretrained(source, device="cpu")
        ids = encoder.tokenize(text)[0][0]
        assert torch.equal(encoder.tokenize(encoder.spelled(ids))[0][0], ids)
