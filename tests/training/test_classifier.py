"""Training a classifier of noisy images: the loss, data, the result, guidance of a known model, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.diffusion.schedule import NoiseSchedule, Prediction
from sdkit.errors import ArgumentError, CacheError, DataError, SourceError
from sdkit.guidance import classifier as guided_by
from sdkit.pipelines.steps import denoise, start
from sdkit.training import ClassifierConfig, train_classifier
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.classifier import ClassifierStage
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

pytest.importorskip("datasets")

BATCH = [(n, n) for n in range(4)]
COLOURS = ("blue", "green", "red", "yellow")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, images in folders of their colours, the same images beside metadata, and a cache of each."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "flat", 24)
    lines = []
    for path in sorted((folder / "flat").glob("*.png")):
        colour = path.with_suffix(".txt").read_text().split()[1]
        (folder / "kinds" / colour).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "kinds" / colour)
        lines.append(json.dumps({"file_name": path.name, "text": f"a {colour} disc", "colour": colour}) + "\n")
    (folder / "flat" / "metadata.jsonl").write_text("".join(lines))
    (folder / "init.json").write_text(json.dumps(tiny.CLASSIFIER))
    for data in ("kinds", "flat"):
        sdkit.data.cache(
            folder / "model", folder / data, folder / f"{data} cache", size=tiny.SIZE, dtype="fp32", device="cpu"
        )
    return folder


def config(made: Path, **changes: Any) -> ClassifierConfig:
    own: dict[str, Any] = {
        "model": made / "model", "data": made / "kinds", "init": made / "init.json", "out_dir": made / "unused",
        "batch_size": 4, "max_steps": 10, "learning_rate": 1e-3, "ema_decay": 0.0,
    }  # fmt: skip
    return ClassifierConfig(**own | changes)


def test_the_loss_is_the_cross_entropy_of_diffusers_noisy_latents(made: Path) -> None:
    stage = ClassifierStage(config(made))
    batch = stage.batch(BATCH)
    found, parts = stage.loss({"classifier": stage.classifier}, batch, 0)
    vae = AutoencoderKL.from_pretrained(made / "model" / "vae")
    scheduler = DDIMScheduler.from_pretrained(made / "model" / "scheduler")
    losses, right = [], []
    for i, (_, item) in enumerate(BATCH):
        image = Image.open(made / "kinds" / stage.names([(0, item)])[0])
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        x0 = (posterior.mean + posterior.std * batch["posterior_eps"][i]) * vae.config.scaling_factor
        t = torch.tensor(batch["t"][i : i + 1])
        logits = stage.classifier.network(scheduler.add_noise(x0, batch["eps"][i : i + 1], t), t)[0]
        wanted = COLOURS.index(stage.names([(0, item)])[0].split("/")[0])
        losses.append(logits.logsumexp(0) - logits[wanted])
        right.append(float(logits.argmax() == wanted))
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    assert float(parts["accuracy"]) == pytest.approx(sum(right) / len(right))
    assert stage.classes == COLOURS
    found.backward()  # type: ignore[no-untyped-call]
    assert all(float(p.grad.abs().max()) > 0 for p in stage.classifier.parameters())
    assert not any(p.requires_grad for p in stage.vae.parameters())


def test_timesteps_and_noise_depend_on_the_sample_alone(made: Path) -> None:
    stage = ClassifierStage(config(made))
    together = stage.batch([(n, n % 7) for n in range(200)])
    alone = stage.batch([(123, 123 % 7)])
    assert together["t"][123:124] == alone["t"]
    assert all(torch.equal(together[name][123:124], alone[name]) for name in together if name != "t")
    quarters = torch.bincount(torch.tensor(together["t"]) // 250, minlength=4)
    assert max(together["t"]) < 1000
    assert quarters.min() > 30  # 50 are expected


class TestData:
    def test_a_column_gives_the_classes_of_folders(self, made: Path) -> None:
        one, other = (
            ClassifierStage(config(made)),
            ClassifierStage(config(made, data=made / "flat", label_column="colour")),
        )
        assert one.classes == other.classes == COLOURS

        def classes(stage: ClassifierStage) -> dict[str, int]:
            return {
                Path(stage.names([(0, i)])[0]).name: int(stage.examples.load(i, 0)["label"]) for i in range(stage.size)
            }

        both = classes(one).keys() & classes(other).keys()
        assert len(both) > 18
        assert {name: classes(one)[name] for name in both} == {name: classes(other)[name] for name in both}

    @pytest.mark.parametrize("data", ["kinds", "flat"])
    def test_losses_from_a_cache_are_those_from_images(self, made: Path, data: str) -> None:
        """A cache of a flat folder reads the classes from the images. Moments are stored in float16."""
        column = {"label_column": "colour"} if data == "flat" else {}
        beside = {"label_data": made / "flat"} if data == "flat" else {}
        straight = ClassifierStage(config(made, data=made / data, **column))
        cached = ClassifierStage(config(made, data=made / f"{data} cache", **column, **beside))
        assert cached.size == straight.size == 23
        for samples in (BATCH, [(n, n % 23) for n in range(20, 26)]):
            one, other = straight.batch(samples), cached.batch(samples)
            assert all(torch.equal(one[name], other[name]) for name in ("label", "eps", "posterior_eps"))
            assert one["t"] == other["t"]
            expected, _ = straight.loss({"classifier": straight.classifier}, one, 0)
            found, _ = cached.loss({"classifier": cached.classifier}, other, 0)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert straight.identity["data"] != cached.identity["data"]
        assert straight.identity["model"] == cached.identity["model"]

    def test_pixels(self, made: Path) -> None:
        stage = ClassifierStage(config(made, vae="pixels", size=tiny.SIZE))
        assert stage.classifier.channels == 3
        batch = stage.batch(BATCH)
        a = stage.schedule.alphas_cumprod[batch["t"]].float()[:, None, None, None]
        expected = a.sqrt() * batch["pixels"] + (1 - a).sqrt() * batch["eps"]
        torch.testing.assert_close(stage._noised(batch)[0], expected)


@pytest.fixture(scope="module")
def run(made: Path) -> Path:
    return train_classifier(
        config(made, out_dir=made / "run", augment=("flip",), gradient_checkpointing=True, validate_every=5)
    )


GOLDEN = [1.356989, 1.397918, 1.360678, 1.55574, 1.418537, 1.53787, 1.342752, 1.539763, 1.346864, 1.304459]


def test_golden_losses(run: Path) -> None:
    """Losses of ten steps in float32, to 1e-3. A change in these numbers is a change in what is learned."""
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert losses == pytest.approx(GOLDEN, rel=1e-3)


def test_validation_reports_ranges_of_timesteps(made: Path, run: Path) -> None:
    """Computed again from the grid's definition: eight timesteps in the middle of eighths, two in each quarter."""
    last = [line for line in read_metrics(run / "metrics.jsonl") if "validation/loss" in line][-1]
    stage = ClassifierStage(config(made, classifier=run / "result", init=None))
    row = stage.examples.validation(0)
    losses, right = [], []
    for j in range(8):
        drawn = stage.objective.validation_grid(0, (4, 4, 4))[j]
        t = torch.tensor([125 * j + 62])
        mean, logvar = stage.vae.posterior(row["pixels"][None])
        x0 = (mean + torch.exp(logvar / 2) * drawn["posterior_eps"]) * stage.vae.scale
        a = stage.schedule.alphas_cumprod[t].float()
        logits = stage.classifier.network(a.sqrt() * x0 + (1 - a).sqrt() * drawn["eps"], t).detach()
        losses.append(float(F.cross_entropy(logits, row["label"][None])))
        right.append(float(logits.argmax() == row["label"]))
    assert last["validation/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert last["validation/accuracy"] == pytest.approx(np.mean(right))
    for k in range(4):
        name = f"t{250 * k}_{250 * k + 249}"
        assert last[f"validation/loss_{name}"] == pytest.approx(np.mean(losses[2 * k : 2 * k + 2]), rel=1e-4)
        assert last[f"validation/accuracy_{name}"] == pytest.approx(np.mean(right[2 * k : 2 * k + 2]))


def test_the_result_loads_fits_its_model_and_trains_further(made: Path, run: Path) -> None:
    classifier = sdkit.Classifier.from_pretrained(run / "result", dtype="fp32", device="cpu")
    assert classifier.classes == COLOURS
    sd = sdkit.StableDiffusion.from_pretrained(made / "model", dtype="fp32", device="cpu")
    classifier.check_fits(sd.vae)
    sentence = "this classifier was trained on the latents of another VAE: train one for this model"
    for other in ("emoji", "pixels"):
        vae = sdkit.VAE.from_pretrained(other, dtype="fp32", device="cpu")
        one_sentence(lambda vae=vae: classifier.check_fits(vae), ArgumentError, sentence)
    again = ClassifierStage(config(made, classifier=run / "result", init=None))
    for name, weight in classifier.network.state_dict().items():
        assert torch.equal(weight, again.classifier.network.state_dict()[name])


def test_numbers_of_classes_stay_those_of_the_classifier(made: Path, run: Path, tmp_path: Path) -> None:
    for colour in ("yellow", "green"):
        shutil.copytree(made / "kinds" / colour, tmp_path / colour)
    stage = ClassifierStage(config(made, data=tmp_path, classifier=run / "result", init=None))
    assert stage.classes == COLOURS
    assert {int(stage.examples.load(i, 0)["label"]) for i in range(stage.size)} == {1, 3}
    (tmp_path / "green").rename(tmp_path / "violet")
    with pytest.raises(DataError, match=r"result knows no class violet; leave these images out"):
        ClassifierStage(config(made, data=tmp_path, classifier=run / "result", init=None))


BAD: list[tuple[dict[str, Any], type[sdkit.SdkitError], str]] = [
    ({"evaluate": ("lpips",)}, ArgumentError, "evaluate measures pictures, and a classifier makes none; leave it out"),
    ({"classifier": "x"}, ArgumentError, "classifier and init both name the network to train; leave one of them out"),
    ({"classifier": "emoji", "init": None}, SourceError, "classifier"),
    ({"classifier": ""}, ArgumentError, "classifier must be a path or a name, not ''"),
    ({"label_column": 3}, ArgumentError, "label_column must be a path or a name, not 3"),
    ({"label_column": "color"}, DataError, "label_column: no line of a metadata.jsonl in"),
    ({"label_data": "./flat"}, ArgumentError, "label_data names the classes of a latent cache, and data holds images"),
    ({"data": "./flat"}, DataError, "lie in no folder, such as 000.png, and have no class"),
    ({"data": "./kinds/red"}, DataError, "6 of 6 images in"),
    ({"data": "./flat cache"}, DataError, "lie in no folder, such as 000.png"),
    ({"data": "./flat cache", "label_column": "colour"}, ArgumentError, "a latent cache holds no columns: name"),
    ({"data": "./flat cache", "label_data": "./kinds"}, DataError, "has no image called 000.png (24 of 24"),
    ({"data": "./kinds cache", "size": 64}, CacheError, "was made with size 32 x 32, not 64 x 64"),
    ({"data": "./kinds cache", "vae": "pixels"}, CacheError, "the cache"),
    ({"data": "./kinds cache", "image_column": "a"}, ArgumentError, "image_column= has no meaning for a latent cache"),
    ({"size": 24}, ArgumentError, "the sides of the images must divide by 16 for this classifier, and 24 x 24 do not"),
    ({"size": 20}, ArgumentError, "size 20 x 20 does not divide by 8, as this VAE needs; change it"),
    ({"init": "./model"}, SourceError, "there is no config at"),
    ({"init": "./model/unet"}, SourceError, "is the config of UNet2DConditionModel, not of EncoderUNet; give another"),
    ({"vae": "./none"}, SourceError, "does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "fragment"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(
    made: Path, change: dict[str, Any], kind: type[sdkit.SdkitError], fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    one_sentence(lambda: ClassifierStage(config(made, **change)), kind, fragment)


def test_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdkit.cli import main

    arguments = ["train", "classifier", "--data", made / "flat", "--label-column", "colour", "--model", made / "model"]
    arguments += ["--init", made / "init.json", "--out-dir", tmp_path / "run", "--max-steps", 1]
    assert main([str(one) for one in arguments]) == 0
    classifier = sdkit.Classifier.from_pretrained(tmp_path / "run" / "result", device="cpu")
    assert classifier.classes == COLOURS
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run" / "result")]) == 0
    assert "classifier" in capsys.readouterr().out


# A model that is known exactly: a mixture of two Gaussians. The classifier is trained on images of it.

SIDE, STD = 8, 0.15
MEANS = torch.zeros(2, 3, SIDE, SIDE)
MEANS[0, 0, :, :4], MEANS[0, 2, :, 4:] = 0.25, 0.25  # red on the left, blue on the right
MEANS[1, 0, :, 4:], MEANS[1, 2, :, :4] = 0.25, 0.25  # the other way round


def log_joint(x: Tensor, a: float) -> Tensor:
    """Return log p(x_t, y) (B, 2) up to a constant: x_t given y has mean sqrt(a) m_y and variance a s^2 + 1 - a."""
    squares = (x[:, None] - math.sqrt(a) * MEANS).square().sum((2, 3, 4))
    return -squares / (2 * (a * STD**2 + 1 - a))


def exact(schedule: NoiseSchedule) -> Callable[[Tensor, int], Prediction]:
    """Return the exact predictor of the mixture: E[x0 | x_t]."""

    def predict(x_t: Tensor, t: int) -> Prediction:
        a = float(schedule.alphas_cumprod[t])
        gain = math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        means = MEANS + gain * (x_t[:, None] - math.sqrt(a) * MEANS)  # (B, 2, 3, h, w)
        shares = log_joint(x_t, a).softmax(1)
        return schedule.prediction((shares[:, :, None, None, None] * means).sum(1), x_t, t, "sample")

    return predict


def test_guidance_draws_the_wanted_class_of_a_known_model(made: Path, tmp_path: Path) -> None:
    """Without guidance, half of the samples are of either class, by the exact posterior. A classifier trained on 200
    images of them must bring most to the wanted class, and with a negative scale most away from it."""
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        pixels = MEANS[i % 2] + STD * torch.randn(3, SIDE, SIDE, generator=generator)
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        sdkit.images.to_pil(pixels)[0].save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    out = train_classifier(
        config(
            made, data=tmp_path / "data", out_dir=tmp_path / "run", vae="pixels", size=SIDE, batch_size=32,
            max_steps=120, learning_rate=3e-3,
        )
    )  # fmt: skip
    classifier = sdkit.Classifier.from_pretrained(out / "result", dtype="fp32", device="cpu")
    schedule = NoiseSchedule.scaled_linear()
    x_T = start([torch.Generator().manual_seed(i) for i in range(64)], (3, SIDE, SIDE))
    shares = {}
    for label in "ab":
        for scale in (0.0, 1.0, -1.0):
            predict = guided_by(exact(schedule), classifier.log_prob(label), schedule, scale)
            drawn = denoise(predict, x_T, schedule, schedule.timesteps(15))
            shares[label, scale] = float(log_joint(drawn, 1.0).softmax(1)[:, "ab".index(label)].mean())
    for label in "ab":
        assert 0.35 < shares[label, 0.0] < 0.65
        assert shares[label, 1.0] > 0.75
        assert shares[label, -1.0] < 0.35
