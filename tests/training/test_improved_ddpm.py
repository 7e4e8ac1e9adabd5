"""Pixel diffusion with classes or without: improved DDPM's loss and timesteps against NumPy, whole runs, saved models
in diffusers' own pipelines, and users' mistakes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler
from PIL import Image

import sdkit
from sdkit.cli import main
from sdkit.data import cache
from sdkit.diffusion.likelihood import step_term
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import ArgumentError, SdkitError
from sdkit.guidance import Conditioning, guided
from sdkit.images import to_tensors
from sdkit.loading.source import Source
from sdkit.metrics import bits_per_dimension
from sdkit.training import UNetConfig, train_unet
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.unet import UNetStage
from sdkit.training.stages.variational import HISTORY, UNIFORM, TimestepSampler
from tests.helpers import classes, tiny

pytest.importorskip("datasets")

LEARNED = {"out_channels": 6, "num_class_embeds": 4, "resnet_time_scale_shift": "scale_shift"}


@dataclass(frozen=True)
class Kit:
    folder: Path
    data: Path
    cached: Path

    def config(self, out: Path, kind: str = "hybrid", **changes: Any) -> UNetConfig:
        """Return settings of six steps of four samples, of the network in the kit's folder of this name."""
        settings: dict[str, Any] = {
            "init": self.folder / kind, "vae": "pixels", "data": self.data, "out_dir": out, "max_steps": 6,
            "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.0, "validate_every": 6,
        }  # fmt: skip
        own = {"loss": "hybrid", "timestep_sampling": "importance"} if kind == "hybrid" else {}
        return UNetConfig(**settings | own | changes)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("pixels")
    classes.init(folder / "hybrid", timesteps=30, **LEARNED)
    classes.init(folder / "plain", timesteps=30)
    classes.init(folder / "ddpm")
    data = classes.pictures(folder / "data", 24)
    cached = cache("emoji", data, folder / "cache", vae="pixels", size=classes.SIDE, dtype="fp32", device="cpu")
    return Kit(folder, data, cached)


@pytest.fixture(scope="module")
def labelled(kit: Kit) -> Path:
    """Train a model of classes that learns its variance; return the run folder."""
    return train_unet(
        kit.config(
            kit.folder / "labelled", validation_prompts=("red", "blue"), bits_per_dimension=30, evaluate=("frechet",)
        )
    )


@pytest.fixture(scope="module")
def unconditional(kit: Kit) -> Path:
    return train_unet(kit.config(kit.folder / "unconditional", "plain", validation_prompts=("", "")))


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def validations(out: Path, name: str) -> list[float]:
    return [line[f"validation/{name}"] for line in read_metrics(out / "metrics.jsonl") if f"validation/{name}" in line]


class TestTimesteps:
    def test_shares_are_those_of_eq_18(self) -> None:
        T, rng = 5, np.random.default_rng(0)
        sampler = TimestepSampler(T)
        seen: dict[int, list[float]] = {t: [] for t in range(T)}
        for n in range(200):
            t, loss = int(rng.integers(T)), float(np.float32(rng.exponential()))
            expected = np.full(T, 1 / T)
            if all(len(losses) >= 10 for losses in seen.values()):
                roots = np.array([np.sqrt(np.mean(np.square(losses[-10:]))) for losses in seen.values()])
                expected = (1 - UNIFORM) * roots / roots.sum() + UNIFORM / T
            np.testing.assert_allclose(sampler.shares().numpy(), expected, rtol=1e-12)
            sampler.learn([(n, t, loss)])
            seen[t].append(loss)
        assert (HISTORY, UNIFORM) == (10, 0.001)
        assert np.ptp(sampler.shares().numpy()) > 0.02

    def test_draws_follow_the_shares_and_weights_undo_them(self) -> None:
        T = 4
        sampler = TimestepSampler(T)
        sampler.learn([(n, n % T, float(1 + n % T)) for n in range(10 * T)])
        n = 200_000
        places = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
        t, weights = sampler.draw([*places, 0.0, 1 - 1e-16])
        assert t[-2:].tolist() == [0, T - 1]
        shares = np.bincount(t[:n].numpy(), minlength=T) / n
        np.testing.assert_allclose(shares, [0.1, 0.2, 0.3, 0.4], atol=0.005)
        values = torch.tensor([3.0, -1.0, 7.0, 2.0], dtype=torch.float64)  # any function of t keeps its mean
        assert float((weights[:n] * values[t[:n]]).mean()) == pytest.approx(2.75, rel=0.01)

    def test_until_each_has_ten_losses_they_are_uniform(self) -> None:
        sampler = TimestepSampler(3)
        sampler.learn([(n, n % 3, 100.0 * (n % 3)) for n in range(29)])
        t, weights = sampler.draw([0.0, 0.34, 0.99])
        assert (t.tolist(), weights.tolist()) == ([0, 1, 2], [1.0, 1.0, 1.0])

    def test_losses_that_vanish_leave_them_uniform(self) -> None:
        sampler = TimestepSampler(2)
        sampler.learn([(n, n % 2, 0.0) for n in range(20)])
        assert sampler.shares().tolist() == [0.5, 0.5]


class TestLoss:
    @pytest.mark.parametrize("kind", ["hybrid", "vlb"])
    def test_is_that_of_the_paper(self, kit: Kit, kind: str) -> None:
        """The terms of eq. 16, from diffusers' network called by hand. `step_term` has tests of its own."""
        changes: dict[str, Any] = {"loss": kind, "timestep_sampling": "uniform", "caption_dropout": 0.5}
        changes |= {"vlb_weight": 0.01} if kind == "hybrid" else {}
        stage = UNetStage(kit.config(Path("unused"), **changes))
        batch = stage.batch([(n, n) for n in range(8)])
        batch["t"][:2] = [0, 29]
        assert 3 in batch["label"].tolist()  # the label of no class
        with torch.no_grad():
            loss, parts = stage.loss({"unet": stage.denoiser}, batch, 0)
        schedule, t = stage.schedule, torch.tensor(batch["t"])
        x0, eps = batch["pixels"], batch["eps"]
        x_t = schedule.add_noise(x0, eps, t)
        with torch.no_grad():
            output = stage.unet.network(x_t, t, batch["label"]).sample
        mse = (output[:, :3] - eps).square().mean()
        vlb = 30 * step_term(schedule, x0, x_t, t, schedule.prediction(output, x_t, t)).mean()
        assert float(parts["mse"]) == pytest.approx(float(mse), rel=1e-5)
        assert float(parts["vlb"]) == pytest.approx(float(vlb), rel=1e-4)
        assert float(loss) == pytest.approx(float(mse + 0.01 * vlb if kind == "hybrid" else vlb), rel=1e-4)

    def test_a_dropped_label_is_that_of_no_class(self, kit: Kit) -> None:
        stage = UNetStage(kit.config(Path("unused"), caption_dropout=1.0))
        assert stage.batch([(n, n) for n in range(4)])["label"].tolist() == [3] * 4
        stage = UNetStage(kit.config(Path("unused"), caption_dropout=0.0))
        samples = [(n, n) for n in range(6)]
        names = [Path(kit.data / name).with_suffix(".txt").read_text() for name in stage.names(samples)]
        labels = stage.batch(samples)["label"].tolist()
        assert [["blue", "green", "red"][label] for label in labels] == names

    def test_from_a_cache_and_from_images_are_the_same(self, kit: Kit, labelled: Path, tmp_path: Path) -> None:
        train_unet(kit.config(tmp_path, data=kit.cached, bits_per_dimension=30))
        assert losses(tmp_path) == pytest.approx(losses(labelled), rel=1e-3)  # a cache holds float16
        assert validations(tmp_path, "bits_per_dimension") == pytest.approx(
            validations(labelled, "bits_per_dimension"), rel=1e-3
        )

    def test_golden_losses(self, labelled: Path, unconditional: Path) -> None:
        assert losses(labelled) == pytest.approx(GOLDEN["hybrid"], rel=1e-3)
        assert losses(unconditional) == pytest.approx(GOLDEN["unconditional"], rel=1e-3)


GOLDEN = {
    "hybrid": [1.109107, 1.017198, 0.971606, 1.016102, 0.951241, 1.062672],
    "unconditional": [0.991593, 0.992311, 0.977405, 1.05579, 0.921614, 0.987677],
}


def load(run: Path) -> sdkit.StableDiffusion:
    return sdkit.StableDiffusion.from_pretrained(run / "result", device="cpu", dtype="fp32")


class TestSavedModels:
    def test_diffusers_ddpm_pipeline_draws_the_same(self, unconditional: Path) -> None:
        sd = load(unconditional)
        theirs = DDPMPipeline.from_pretrained(unconditional / "result")
        theirs.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        expected = theirs(generator=generator, num_inference_steps=10, output_type="np").images
        found = sd("", sampler="ddpm", num_inference_steps=10, seed=5, output_type="pt")
        torch.testing.assert_close(found.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(expected), atol=1e-4, rtol=0)

    def test_diffusers_ddim_pipeline_draws_the_same(self, unconditional: Path) -> None:
        theirs = DDIMPipeline.from_pretrained(unconditional / "result")
        theirs.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        expected = theirs(
            generator=generator, num_inference_steps=10, output_type="np", use_clipped_model_output=True
        ).images
        found = load(unconditional)("", num_inference_steps=10, seed=5, output_type="pt")
        torch.testing.assert_close(found.permute(0, 2, 3, 1) / 2 + 0.5, torch.from_numpy(expected), atol=1e-4, rtol=0)

    def test_a_learned_variance_is_drawn_as_by_diffusers_scheduler(self, labelled: Path) -> None:
        """Guidance by labels, and DDPM with the learned variance, with diffusers' network and scheduler alone."""
        sd, theirs = load(labelled), DDPMPipeline.from_pretrained(labelled / "result")
        assert theirs.scheduler.config.variance_type == "learned_range"
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, 3, 8, 8, generator=generator)
        theirs.scheduler.set_timesteps(10)
        with torch.no_grad():
            for t in theirs.scheduler.timesteps:
                none, blue = (theirs.unet(x, t, torch.tensor([label])).sample for label in (3, 0))
                eps = none[:, :3] + 3.0 * (blue - none)[:, :3]
                x = theirs.scheduler.step(torch.cat([eps, blue[:, 3:]], 1), t, x, generator=generator).prev_sample
        found = sd("blue", sampler="ddpm", num_inference_steps=10, guidance_scale=3.0, seed=3, output_type="pt")
        torch.testing.assert_close(found, x.clamp(-1, 1), atol=1e-4, rtol=0)

    def test_classes_and_guidance_travel_with_the_model(self, labelled: Path, unconditional: Path) -> None:
        sd = load(labelled)
        assert (sd.text.names, sd.text.none, sd.guidance_scale) == (("blue", "green", "red"), 3, 2.0)  # type: ignore[attr-defined]
        assert (sd.schedule.clip_x0, sd.vae.factor) == (1.0, 1)
        assert load(unconditional).guidance_scale == 1.0
        assert [path.name for path in (labelled / "samples").iterdir()] == ["step-00000000.png", "step-00000006.png"]

    def test_a_saved_model_is_trained_further(self, kit: Kit, labelled: Path, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"model": labelled / "result", "init": None, "vae": None, "max_steps": 1, "seed": 1}
        again = load(train_unet(kit.config(tmp_path, **settings)))
        assert again.text.names == ("blue", "green", "red")  # type: ignore[attr-defined]
        assert again.schedule.variance_type == "learned_range"

    def test_from_the_command_line(self, kit: Kit, labelled: Path, tmp_path: Path, capsys: Any) -> None:
        out = tmp_path / "drawn"
        words = ["generate", "red", "blue", "-m", str(labelled / "result"), "-o", str(out), "--steps", "3"]
        assert main([*words, "--sampler", "ddpm"]) == 0
        assert len([*out.glob("*.png")]) == 2
        assert main(["info", str(labelled / "result")]) == 0
        assert "UNet2DModel" in capsys.readouterr().out
        assert main(["generate", "cat", *words[3:]]) == 2
        assert "'cat' is no class of this model; its classes: blue, green, red." in capsys.readouterr().err

    def test_latents_are_denoised_too(self, kit: Kit, tmp_path: Path) -> None:
        """Classes in the latents of a VAE: x0 is not clamped, and the bound's first term is a density."""
        tiny.model(tmp_path / "model")
        shape = LEARNED | {"in_channels": 4, "out_channels": 8, "sample_size": 4}
        own = classes.init(tmp_path / "init", timesteps=30, **shape)
        photos = tiny.photos(tmp_path / "photos", 8)
        settings: dict[str, Any] = {"vae": None, "model": tmp_path / "model", "init": own, "data": photos, "size": 32}
        for path in photos.glob("*.txt"):
            path.write_text(path.read_text().split()[1])
        with pytest.raises(ArgumentError, match=r"^caption_dropout needs a label for no class beside the 4"):
            UNetStage(kit.config(tmp_path / "run", **settings))
        sd = load(train_unet(kit.config(tmp_path / "run", **settings, caption_dropout=0.0, max_steps=2)))
        assert sd.schedule.clip_x0 is None
        assert sd.guidance_scale == 1.0  # without dropout the label for no class is untrained
        assert sd("red", num_inference_steps=2, output_type="np").shape == (1, 32, 32, 3)


def test_a_model_of_text_learns_its_variance_too(kit: Kit, tmp_path: Path) -> None:
    """A `UNet2DConditionModel` of pixels, with the schedule of the model that its text encoder comes from."""
    model = tiny.model(tmp_path / "model")
    shape = json.loads((model / "unet" / "config.json").read_text()) | {"in_channels": 3, "out_channels": 6}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    settings: dict[str, Any] = {"init": tmp_path / "config.json", "model": model, "size": 8, "max_steps": 2}
    sd = load(train_unet(kit.config(tmp_path / "run", **settings, bits_per_dimension=5)))
    assert validations(tmp_path / "run", "bits_per_dimension")[0] > 0
    assert (sd.schedule.variance_type, sd.unet.width) == ("learned_range", 16)
    assert sd("red", sampler="ddpm", num_inference_steps=2, height=8, width=8, output_type="np").shape == (1, 8, 8, 3)


def test_a_model_that_another_toolkit_saved(tmp_path: Path) -> None:
    """A folder of diffusers names no classes and no guidance: labels have their numbers as names, without guidance."""
    DDPMPipeline(classes.network(num_class_embeds=3), DDPMScheduler()).save_pretrained(tmp_path)
    sd = sdkit.StableDiffusion.from_pretrained(tmp_path, vae="pixels", device="cpu", dtype="fp32")
    assert (sd.text.names, sd.guidance_scale) == (("0", "1", "2"), 1.0)  # type: ignore[attr-defined]
    (unet,) = [part for part in Source.open(tmp_path).describe().components if part.part == "unet"]
    assert unet.config == {"in_channels": 3, "num_class_embeds": 3, "sample_size": 8}
    assert sd("2", num_inference_steps=2, output_type="np").shape == (1, 8, 8, 3)
    with pytest.raises(ArgumentError, match="was trained without label dropout, and draws classes alone"):
        sd("2", num_inference_steps=2, guidance_scale=2.0)


class TestBitsPerDimension:
    def test_validation_reports_what_the_public_function_returns(self, kit: Kit, labelled: Path) -> None:
        """The sum over all timesteps, of the one held-out image and its class."""
        sd, stage = load(labelled), UNetStage(kit.config(Path("unused")))
        row = stage.latents.validation(0)
        predict = guided(sd.unet, sd.schedule, Conditioning(label=row["label"][None]), scale=1)
        with torch.no_grad():
            whole = bits_per_dimension(predict, row["pixels"][None], sd.schedule)
        assert validations(labelled, "bits_per_dimension")[-1] == pytest.approx(float(whole), rel=1e-4)
        assert len(stage.latents.held_out) == 1

    def test_an_estimate_of_fewer_timesteps_is_unbiased(self) -> None:
        schedule = NoiseSchedule.linear(25, beta_start=0.02, beta_end=0.4)
        x0 = torch.linspace(-1, 1, 3 * 16).reshape(1, 3, 4, 4)

        def mean_and_error(n: int, timesteps: int | None = None) -> tuple[float, float]:
            found = [
                float(bits_per_dimension(lambda x, t: schedule.prediction(0.3 * x, x, t), x0, schedule, seed=i,
                                         timesteps=timesteps))
                for i in range(n)
            ]  # fmt: skip
            return float(np.mean(found)), float(np.std(found)) / n**0.5

        (whole, error), (estimated, more) = mean_and_error(10), mean_and_error(40, timesteps=8)
        assert estimated == pytest.approx(whole, abs=3.5 * (error**2 + more**2) ** 0.5)
        assert more < 0.03 * whole

    def test_images_are_the_same_alone_and_in_a_batch(self) -> None:
        schedule = NoiseSchedule.linear(12, beta_end=0.4)
        x0 = torch.linspace(-1, 1, 2 * 3 * 16).reshape(2, 3, 4, 4)
        found = bits_per_dimension(lambda x, t: schedule.prediction(0.3 * x, x, t), x0, schedule)
        second = bits_per_dimension(lambda x, t: schedule.prediction(0.3 * x, x, t), x0[1:], schedule, seed=1)
        torch.testing.assert_close(found[1:], second)


def test_folders_name_classes(kit: Kit, tmp_path: Path) -> None:
    data = classes.pictures(tmp_path / "data", 9, in_folders=True)
    stage = UNetStage(kit.config(tmp_path / "run", data=data, class_folders=True))
    assert stage.prompts.names == ("blue", "green", "red")  # type: ignore[attr-defined]
    cached = cache(
        "emoji", data, tmp_path / "cache", vae="pixels", size=8, dtype="fp32", device="cpu", class_folders=True
    )
    assert UNetStage(kit.config(tmp_path / "run", data=cached)).prompts.names == stage.prompts.names  # type: ignore[attr-defined]


def test_classes_that_are_numbers_are_in_their_order(kit: Kit, tmp_path: Path) -> None:
    data = classes.pictures(tmp_path / "data", 12)
    for i, path in enumerate(sorted(data.glob("*.txt"))):
        path.write_text(str(i))
    own = classes.init(tmp_path / "init", num_class_embeds=13)
    stage = UNetStage(kit.config(tmp_path / "run", "plain", init=own, data=data))
    assert stage.prompts.names == tuple(map(str, range(12)))  # type: ignore[attr-defined]


def test_a_caches_classes_answer_to_their_own_names(tmp_path: Path) -> None:
    """A cache spells names by tokens: "1 0" and "t - shirt". Labels and order are those of a run from images."""
    data = classes.pictures(tmp_path / "data", 12)
    for i, path in enumerate(sorted(data.glob("*.txt"))):
        path.write_text(("10", "T-shirt", "9", "ice_cream")[i % 4])
    cached = cache("emoji", data, tmp_path / "cache", vae="pixels", size=classes.SIDE, dtype="fp32", device="cpu")
    init = classes.init(tmp_path / "init", num_class_embeds=5)
    settings: dict[str, Any] = {"init": init, "vae": "pixels", "out_dir": tmp_path / "run", "batch_size": 4}
    one, other = (UNetStage(UNetConfig(data=source, **settings)) for source in (data, cached))
    wanted = ["9", "10", "ice_cream", "T-shirt"]
    for stage in (one, other):
        assert stage.prompts.labels([*wanted, ""]).tolist() == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    samples = [(n, n) for n in range(11)]
    assert torch.equal(one.batch(samples)["label"], other.batch(samples)["label"])
    with pytest.raises(ArgumentError, match="two classes have the same name"):
        UNetStage(UNetConfig(data=data, classes=("10", "1 0", "9", "T-shirt"), **settings))


def test_labels_as_sinusoids_in_half_precision_and_few_timesteps(tmp_path: Path, kit: Kit) -> None:
    """diffusers leaves the sinusoids of labels in float32. Prompts are drawn in as many steps as there are."""
    init = classes.init(tmp_path / "init", timesteps=5, class_embed_type="timestep")
    out = train_unet(kit.config(tmp_path / "run", "plain", init=init, max_steps=1, validation_prompts=("red",)))
    whole, half = (
        sdkit.StableDiffusion.from_pretrained(out / "result", dtype=dtype, device="cpu")(
            "red", num_inference_steps=2, guidance_scale=1.5, output_type="pt"
        )
        for dtype in ("fp32", "bf16")
    )
    torch.testing.assert_close(whole, half, atol=0.1, rtol=0)
    assert not torch.equal(whole, half)


def test_without_a_schedule_beside_it_a_network_is_ddpms(kit: Kit) -> None:
    stage = UNetStage(kit.config(Path("unused"), "ddpm"))
    assert torch.equal(stage.schedule.betas, NoiseSchedule.linear().betas)
    cosine = UNetStage(kit.config(Path("unused"), "ddpm", noise_schedule="cosine"))
    assert torch.equal(cosine.schedule.betas, NoiseSchedule.cosine().betas)
    assert (stage.schedule.clip_x0, stage.guidance_scale) == (1.0, 1.0)


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("one loss too few", "hybrid", {"loss": "simple", "timestep_sampling": "uniform"}, "give loss hybrid, or a U-Net"),
    ("no variance", "plain", {"loss": "hybrid"}, "with 3 output channels, predicts none; set out_channels to 6"),
    ("importance of the simple loss", "plain", {"timestep_sampling": "importance"}, "belongs to the losses hybrid"),
    ("logit-normal bound", "hybrid", {"timestep_sampling": "logit_normal"}, "logit_normal belongs to the loss simple"),
    ("unknown loss", "plain", {"loss": "elbo"}, "loss 'elbo' is not one of 'simple', 'hybrid', 'vlb'"),
    ("weight of nothing", "plain", {"vlb_weight": 0.1}, "vlb_weight belongs to the loss hybrid"),
    ("no weight", "hybrid", {"vlb_weight": 0.0}, "at vlb_weight 0 nothing trains the variance"),
    ("gamma without a simple loss", "hybrid", {"loss": "vlb", "snr_gamma": 5.0}, "snr_gamma weights the simple loss"),
    ("offset", "hybrid", {"noise_offset": 0.1}, "noise_offset draws"),
    ("pure noise", "hybrid", {"zero_snr": True, "prediction_type": "v"}, "the variational bound is not finite"),
    ("unknown schedule", "plain", {"noise_schedule": "sine"}, "noise_schedule 'sine' is not one of"),
    ("schedule of a trained model", "plain", {"noise_schedule": "cosine", "init": None}, "give init, or leave it out"),
    ("too few evaluations", "plain", {"bits_per_dimension": 1}, "must be from 2 to 30, the number of timesteps"),
    ("too many evaluations", "plain", {"bits_per_dimension": 31}, "must be from 2 to 30"),
    ("bits of latents", "plain", {"bits_per_dimension": 9, "vae": None}, "channels"),
    ("classes of a network without", "plain", {"classes": ("red",)}, "takes no classes; set num_class_embeds"),
    ("too many classes", "hybrid", {"classes": ("red", "green", "blue", "a", "b")}, "there are 5 classes, and the"),
    ("no label left", "hybrid", {"classes": ("red", "green", "blue", "a")}, "set num_class_embeds to 5, or"),
    ("class of no name", "hybrid", {"classes": ("red", "blue")}, "is of the class 'green', which is not one"),
    ("an empty name", "hybrid", {"classes": ("red", " ")}, "classes must be names, and one is empty"),
    ("a name twice", "hybrid", {"classes": ("red", "Red", "blue")}, "two classes have the same name"),
    ("prompt of no class", "hybrid", {"validation_prompts": ("cat",)}, "'cat' is no class of this model"),
    ("prompt of nothing", "plain", {"validation_prompts": ("cat",)}, "give validation_prompts that are empty"),
    ("LoRA", "plain", {"lora_rank": 2, "init": None, "model": "unconditional"}, "lora_rank needs a U-Net"),
    ("text encoder", "plain", {"train_text_encoder": True}, "train_text_encoder needs a U-Net that takes text"),
    ("DreamBooth", "plain", {"data": "", "instance_data": "data"}, "instance_data needs a U-Net that takes text"),
    ("CLIP score", "plain", {"evaluate": ("clip_score",)}, "evaluate clip_score compares drawings with prompts"),
    ("classes anew", "plain", {"init": None, "model": "labelled", "loss": "hybrid", "classes": ("a",)}, "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_mistakes(
    kind: str, changes: dict[str, Any], message: str, kit: Kit, labelled: Path, unconditional: Path, tmp_path: Path
) -> None:
    runs = {"labelled": labelled, "unconditional": unconditional}
    if "model" in changes:
        changes = changes | {"model": runs[changes["model"]] / "result", "vae": None}
    if "instance_data" in changes:
        changes = changes | {"instance_data": kit.data}
    with pytest.raises(SdkitError) as told:
        UNetStage(kit.config(tmp_path / "run", kind, **changes))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_mistakes_in_configs(kit: Kit, labelled: Path, tmp_path: Path) -> None:
    learned = classes.init(tmp_path / "learned", timesteps=30, variance_type="learned_range")
    with pytest.raises(ArgumentError, match="says that the variance is learned, and the U-Net predicts none"):
        UNetStage(kit.config(tmp_path / "run", "plain", init=learned))
    vectors = classes.init(tmp_path / "vectors", class_embed_type="identity")
    with pytest.raises(ArgumentError, match="takes vectors in place of class labels"):
        UNetStage(kit.config(tmp_path / "run", "plain", init=vectors))
    data = classes.pictures(tmp_path / "data", 4)
    for path in data.glob("*.txt"):
        path.unlink()
    with pytest.warns(UserWarning, match="has a caption"), pytest.raises(ArgumentError, match="no image has a"):
        UNetStage(kit.config(tmp_path / "run", data=data))
    damaged = json.loads((labelled / "result" / "unet" / "config.json").read_text()) | {"_classes": "blue"}
    (tmp_path / "config.json").write_text(json.dumps(damaged))
    with pytest.raises(SdkitError, match="has _classes 'blue', not a list of names"):
        UNetStage(kit.config(tmp_path / "run", init=tmp_path / "config.json"))


def test_mistakes_in_calls(labelled: Path, unconditional: Path) -> None:
    sd = load(unconditional)

    def bits(x0: torch.Tensor, **options: Any) -> None:
        bits_per_dimension(lambda x, t: sd.schedule.prediction(x, x, t), x0, sd.schedule, **options)

    for call, message in (
        (lambda: sd("a cat"), "draws without prompts and classes"),
        (lambda: load(labelled)("purple"), "'purple' is no class of this model"),
        (lambda: bits(2 * torch.ones(1, 3, 8, 8)), "must be in"),
        (lambda: bits(torch.ones(3, 8, 8)), "are a tensor"),
        (lambda: bits(torch.ones(1, 3, 8, 8), timesteps=31), "timesteps must be a whole number from 2 to 30"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.slow
def test_classes_and_the_variance_are_learned(kit: Kit, tmp_path: Path) -> None:
    """The bound falls, drawings are nearest to the colours of their classes, and the learned variance beats both fixed
    ones."""
    data = classes.pictures(tmp_path / "data", 96)
    run = train_unet(
        kit.config(
            tmp_path / "run", data=data, max_steps=500, batch_size=16, learning_rate=2e-3, ema_decay=0.99,
            bits_per_dimension=30, validate_every=500, save_every=500,
        )
    )  # fmt: skip
    before, after = validations(run, "bits_per_dimension")
    assert after < 8 < before  # 8 bits are those of the pixels as they are stored
    sd = load(run)
    for name in classes.COLOURS:
        drawn = np.stack([np.asarray(image, float) for image in sd([name] * 8, sampler="ddpm", num_inference_steps=30)])
        nearest = min(classes.COLOURS, key=lambda other: np.abs(drawn.mean((0, 1, 2)) - classes.COLOURS[other]).sum())
        assert nearest == name
    x0 = torch.stack(to_tensors([Image.open(kit.data / f"{i:03}.png") for i in range(3)]))
    bits = {}
    for kind in ("learned_range", "fixed_small", "fixed_large"):
        schedule = NoiseSchedule.from_betas(sd.schedule.betas, variance_type=kind)
        predict = guided(sd.unet, schedule, Conditioning(label=torch.tensor([2, 1, 0])), scale=1)
        with torch.no_grad():
            bits[kind] = float(bits_per_dimension(predict, x0, schedule).mean())
    assert bits["learned_range"] < min(bits["fixed_small"], bits["fixed_large"])
